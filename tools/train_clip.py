"""Trains a small CLIP on Fashion-MNIST with captions, as no pretrained one can be had offline.

    python -m tools.train_clip                     writes ~/.cache/secateur/clip-fashion ($SECATEUR_CACHE/clip-fashion)
    secateur prune ~/.cache/secateur/clip-fashion ecoflap --sparsity 0.6 --out pruned

The folder is in Hugging Face form, with a tokenizer of the captions' own words: transformers opens it as any CLIP. The
pictures come from the data pack (SECATEUR_DATA). About 12 minutes on one core.
"""

import argparse
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from secateur.tasks.captioned import FASHION, VIEWS, Captioned, fashion_pairs, worded
from secateur.tasks.pack import cache

STEPS, BATCH, RATE = 1800, 128, 1e-3
SPECIAL = ("<pad>", "<s>", "<unk>", "</s>")


def tell(line: str) -> None:
    """A line on the standard output, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def tokenizer() -> Any:
    """A token for every word of the captions, a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for way in worded(FASHION, len(VIEWS)) for text in way for word in text.split()})
    vocabulary = {word: place for place, word in enumerate([*SPECIAL, *words])}
    plain = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    ends = [(word, vocabulary[word]) for word in ("<s>", "</s>")]
    plain.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=plain,
        pad_token="<pad>",
        bos_token="<s>",
        unk_token="<unk>",
        eos_token="</s>",
        model_max_length=20,
    )


def network(words: int, seed: int) -> Any:
    """A CLIP of 1.7 M parameters: pictures of 28 pixels in patches of 7, six layers of 128; text, four layers of 96."""
    from transformers import CLIPConfig, CLIPModel

    text = {
        "vocab_size": words,
        "hidden_size": 96,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 20,
        "pad_token_id": SPECIAL.index("<pad>"),
        "bos_token_id": SPECIAL.index("<s>"),
        "eos_token_id": SPECIAL.index("</s>"),
    }
    picture = {
        "image_size": 28,
        "patch_size": 7,
        "num_channels": 3,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return CLIPModel(CLIPConfig(text_config=text, vision_config=picture, projection_dim=64))


def train_(model: Any, task: Captioned, steps: int, say: Callable[[str], None]) -> None:
    """AdamW with a warm-up and a cosine, on pictures in drawn views and captions in drawn words."""
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.05)
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, s / steps)))
    )
    model.train()
    start, step, epoch = time.perf_counter(), 0, 0
    while step < steps:
        for batch in task.batches("train", epoch=epoch):
            optimizer.zero_grad()
            loss = task.loss(model, batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step % 100 == 0 or step == steps:
                say(f"step {step} of {steps}   loss {loss.item():.3f}   {time.perf_counter() - start:.0f} s")
            if step == steps:
                break
        epoch += 1
    model.eval()


def build(folder: Path, steps: int = STEPS, seed: int = 0, say: Callable[[str], None] = tell) -> Path:
    """Train the model into a folder that appears whole or not at all."""
    words = tokenizer()
    task = fashion_pairs(words, size=28, batch=BATCH, seed=seed)
    model = network(len(words), seed)
    train_(model, task, steps, say)
    found = task.measure(model, "val")
    say("   ".join(f"{key} {value:.4g}" for key, value in found.items()))
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    model.save_pretrained(partial)
    words.save_pretrained(partial)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    return folder


def clip_fashion(say: Callable[[str], None] = tell) -> Path:
    """The folder of the trained model, trained first where there is none yet."""
    folder = cache() / "clip-fashion"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        build(folder, say=say)
    return folder


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.train_clip", description="Train a small CLIP.")
    parser.add_argument("folder", nargs="?", type=Path, default=cache() / "clip-fashion")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    if given.folder.exists() and not (given.folder / "config.json").exists():
        sys.stderr.write(f"{given.folder} exists and is no model: give another folder.\n")
        return 2
    given.folder.parent.mkdir(parents=True, exist_ok=True)
    tell(str(build(given.folder, given.steps, given.seed)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
