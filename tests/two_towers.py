"""A tiny CLIP and captions it can learn within a second: pictures of 8x8 pixels, one of four patterns under noise."""

import copy
from functools import lru_cache
from typing import Any

import torch
from tiny import seeded
from torch import Tensor, nn

from secateur.tasks.captioned import Captioned
from secateur.tasks.learners import Adam
from secateur.train import fit

CLASSES, WORDS = 4, 24


def clip(seed: int = 0, pictures: int = 3, texts: int = 2, **changes: Any) -> nn.Module:
    """CLIPModel: hidden 32, MLP 64, 4 heads in either tower; patches of 4."""
    from transformers import CLIPConfig, CLIPModel

    both = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, **changes}
    text = {**both, "vocab_size": WORDS, "num_hidden_layers": texts, "max_position_embeddings": 8}
    text |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    picture = {**both, "image_size": 8, "patch_size": 4, "num_hidden_layers": pictures}
    config = CLIPConfig(text_config=text, vision_config=picture, projection_dim=16)
    return seeded(lambda: CLIPModel(config).float(), seed)


def words() -> tuple[Tensor, Tensor]:
    """Two wordings of a caption for each class, of unequal lengths: ids and mask [2, 4, 5]."""
    ids = torch.zeros(2, CLASSES, 5, dtype=torch.int64)
    for kind in range(CLASSES):
        ids[0, kind, :4] = torch.tensor([1, 4, 8 + kind, 3])
        ids[1, kind] = torch.tensor([1, 5, 12 + kind, 6, 3])
    return ids, (ids != 0).long()


def captioned(seed: int = 0, batch: int = 32, **changes: Any) -> Captioned:
    """512 pictures to train on, 128 each for val and test."""
    draw = torch.Generator().manual_seed(1005)
    patterns = torch.randint(40, 216, (CLASSES, 1, 8, 8), generator=draw)
    labels = torch.randint(CLASSES, (768,), generator=draw)
    noisy = patterns[labels] + 30 * torch.randn(768, 1, 8, 8, generator=draw)
    pictures = noisy.clamp(0, 255).to(torch.uint8)
    cuts = zip(("train", "val", "test"), pictures.split([512, 128, 128]), labels.split([512, 128, 128]), strict=True)
    splits = {split: (x, y) for split, x, y in cuts}
    given = {"views": 1, "size": 8, "learner": Adam(3e-3), **changes}
    return Captioned("toy-captions", splits, *words(), seed=seed, batch=batch, **given)


@lru_cache
def _trained(seed: int, steps: int) -> nn.Module:
    model = clip(seed)
    fit(model, captioned(seed), steps)
    return model.eval()


def trained_clip(seed: int = 0, steps: int = 120) -> nn.Module:
    """The tiny CLIP, trained; each caller gets a copy."""
    return copy.deepcopy(_trained(seed, steps))
