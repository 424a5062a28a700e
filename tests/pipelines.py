"""Tiny text-to-image pipelines with random weights: a latent one of Stable Diffusion's kind, and one of pixels."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "photo", "of", "the", "red", "blue", "green", "cat", "dog", "house", "tree", "shoe", "bag", "coat"]


def tokenizer(length: int = 8) -> Any:
    """A word-level tokenizer that pads to a few tokens."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    marks = ["<pad>", "<start>", "<end>", "<unk>"]
    inner = Tokenizer(WordLevel({w: i for i, w in enumerate([*marks, *WORDS])}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    inner.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=length,
        pad_token="<pad>", bos_token="<start>", eos_token="<end>", unk_token="<unk>",
    )  # fmt: skip


def unet(channels: int, size: int, width: int) -> Any:
    """A UNet of two levels, with attention to the caption in one."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size, in_channels=channels, out_channels=channels, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 16), attention_head_dim=4, cross_attention_dim=width,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


@lru_cache
def stock() -> Any:
    """diffusers' own StableDiffusionPipeline, of random networks."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        words = tokenizer()
        text = CLIPTextConfig(
            vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
            max_position_embeddings=8, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=16,
        )  # fmt: skip
        return StableDiffusionPipeline(
            vae=vae.eval(), text_encoder=CLIPTextModel(text).eval(), tokenizer=words, unet=unet(4, 8, 16).eval(),
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip


def stable_diffusion(folder: Path) -> Path:
    """The folder of `stock`, as diffusers writes it."""
    stock().save_pretrained(str(folder), safe_serialization=True)
    return folder


def pixels(seed: int = 0) -> Any:
    """BERT and a UNet that draws 8x8 grey pictures."""
    from diffusers import DDIMScheduler
    from transformers import BertConfig, BertModel

    from secateur.models.pipelines import Pipeline

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        words = tokenizer()
        text = BertModel(
            BertConfig(
                vocab_size=len(words),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=8,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                initializer_range=0.2,
            )
        )
        networks = {"text_encoder": text, "unet": unet(1, 8, 16)}
        index = {"_class_name": "Pipeline", "masked_padding": True}
        return Pipeline(networks, words, DDIMScheduler(), index).eval()
