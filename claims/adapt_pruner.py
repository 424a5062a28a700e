"""Adapt-Pruner: small cuts that follow what blocks do, on SmolLM2-135M; and training in between, on a small Llama."""

import copy
from dataclasses import replace
from functools import lru_cache

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from claims.flap import task_of
from claims.harness import Claim, Expectation, Settings
from claims.wanda import perplexity, smollm2
from secateur.methods.adapt_pruner import AdaptPruner
from secateur.task import Task
from secateur.tasks.corpora import tinyshakespeare
from secateur.tasks.learners import AdamW
from secateur.train import fit


def method_of(condition: str, settings: Settings) -> AdaptPruner:
    """One cut, the same small cuts everywhere, small cuts bent by what blocks do, and bent the wrong way round."""
    kind, _, target = condition.partition("@")
    count = settings["iterations"]
    iterations, amplitude = {
        "one-shot": (1, 0.0),
        "steps": (count, 0.0),
        "adapt": (count, 1 / count),
        "reversed": (count, -1 / count),
    }[kind]
    return AdaptPruner(sparsity=float(target), samples=settings["samples"], iterations=iterations, amplitude=amplitude)


def small_task(seed: int, settings: Settings) -> Task:
    """Shakespeare by characters."""
    return tinyshakespeare(window=64, batch=16, windows=256, seed=seed, learner=AdamW(settings["small_rate"]))


def character_llama(task: Task, seed: int, *, blocks: int, key_values: int, width: int = 96) -> nn.Module:
    """A Llama with six heads, over the characters of a text, with new weights."""
    vocabulary = 1 + max(int(ids.max()) for ids in task.ids.values())  # type: ignore[attr-defined]  # a task of text
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=256, num_hidden_layers=blocks,
        num_attention_heads=6, num_key_value_heads=key_values, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


@lru_cache(maxsize=1)
def small_llama(seed: int, steps: int, rate: float) -> nn.Module:
    """Four blocks of width 96, trained from scratch: what is cut and trained again."""
    task = small_task(seed, {"small_rate": rate})
    model = character_llama(task, seed, blocks=4, key_values=3)
    fit(model, task, steps)
    return model.eval()


def small_cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    """The same steps of training on the same text in one, five or twenty parts, down to the same size."""
    task = small_task(seed, settings)
    model = copy.deepcopy(small_llama(seed, settings["small_first"], settings["small_rate"]))
    before = sum(p.numel() for p in model.parameters())
    kind, _, stages = condition.partition("@")
    if kind == "small dense":
        return {"perplexity": task.measure(model, "test")["perplexity"]}
    method = AdaptPruner(
        sparsity=settings["small_sparsity"], samples=32, stages=int(stages), steps=settings["small_steps"]
    )
    # Half the rate it was trained with: it is not at its beginning.
    model = method.run(model, replace(task, learner=AdamW(settings["small_rate"] / 2))).model
    left = sum(p.numel() for p in model.parameters())
    return {"parameters": left / before, "perplexity": task.measure(model, "test")["perplexity"]}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    if condition.startswith("small"):
        return small_cell(condition, seed, settings)
    task, model = task_of(seed, settings), copy.deepcopy(smollm2().model)
    before = sum(p.numel() for p in model.parameters())
    if condition == "dense":
        return {"perplexity": perplexity(model, task)}
    # Cut on short windows, as published; measured on longer ones.
    done = method_of(condition, settings).run(model, replace(task, window=settings["cut_window"]))
    left = [block.mlp.up_proj.out_features for block in done.model.model.layers]
    parameters = sum(p.numel() for p in done.model.parameters()) / before
    return {
        "parameters": parameters,
        "narrowest": float(min(left)),
        "widest": float(max(left)),
        "perplexity": perplexity(done.model, task),
    }


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="adapt_pruner",
    number=40,
    says="Many tiny cuts, each bent by how much a block changes its input, hurt less than the same cut of every block "
    "(LLaMA-3.1-8B: 1 to 7 points above LLM-Pruner, FLAP and SliceGPT), and training between cuts of about 5 % wins "
    "back more than training after one cut (MobileLLM 350M to 125M in 20 stages).",
    source="arXiv:2502.03460, abstract",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 24 windows of 256 tokens, in bfloat16; the sparsity is of weights "
    "of heads and neurons, cut in steps of 5 % by the gradients of 12 windows of 64 tokens of WikiText-2 drawn by the "
    "seed. In between: a Llama of 4 blocks and width 96 on Shakespeare by characters, cut by half in 1, 5 or 20 stages "
    "with the same 200 steps of 16 windows of 64 characters.",
    conditions=(
        "dense",
        "one-shot@0.2",
        "steps@0.2",
        "adapt@0.2",
        "reversed@0.2",
        "adapt@0.1",
        "steps@0.1",
        "small dense@0",
        "small@1",
        "small@5",
        "small@20",
    ),
    once=("dense",),
    settings={
        "window": 256,
        "windows": 24,
        "cut_window": 64,
        "samples": 12,
        "iterations": 20,
        "small_first": 500,
        "small_steps": 200,
        "small_rate": 2e-3,
        "small_sparsity": 0.5,
    },
    large={"windows": 280, "samples": 512, "iterations": 50, "small_first": 3000, "small_steps": 2000},
    expects=(
        beats("adapt@0.2", "steps@0.2", "Steps bent by what blocks do beat equal ones at 20 %"),
        beats("adapt@0.1", "steps@0.1", "Steps bent by what blocks do beat equal ones at 10 %"),
        beats("steps@0.2", "one-shot@0.2", "Equal small steps beat one cut", central=False),
        beats("adapt@0.2", "reversed@0.2", "Bent the wrong way round they are worse at 20 %"),
        beats("small@5", "small@1", "Training between five cuts beats training after one, at equal text"),
        beats("small@20", "small@1", "Training between twenty cuts beats training after one", central=False),
    ),
)
