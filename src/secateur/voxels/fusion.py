"""Voxels and the words of a sentence read each other: attention in both directions.

Jain et al. "Bottom Up Top Down Detection Transformers." 2022. arXiv:2112.08879, and Guo et al. 2025, arXiv:2502.10392:
voxels attend to each other, words to each other, words to voxels, voxels to words; layer norms behind each sum.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.voxels.layers import Norm
from secateur.voxels.sparse import Voxels, per_scene


@dataclass(frozen=True, eq=False)
class Words:
    """The words of a sentence for each scene."""

    features: Tensor  # [scenes, words, channels]
    absent: Tensor  # bool [scenes, words], True behind the end


def padded(features: Tensor, scene: Tensor, scenes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows sorted by scene as [scenes, most, channels], zeros behind; which of these are none [scenes, most]; and
    where each row stands in the flattened first two axes [n]."""
    count = per_scene(scene, scenes)
    most, start = int(count.max()), count.cumsum(0) - count
    place = torch.arange(len(scene), device=scene.device) - start[scene]
    at = scene * most + place
    dense = features.new_zeros(scenes * most, features.shape[1]).index_copy(0, at, features)
    absent = torch.arange(most, device=scene.device) >= count[:, None]
    return dense.view(scenes, most, -1), absent, at


class Place(nn.Module):
    """A code of where a voxel is, learned: metres [n, 3] -> [n, width]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, width), Norm(width), nn.Linear(width, width)

    def forward(self, metres: Tensor) -> Tensor:
        """See the class."""
        return self.last(torch.relu(self.norm(self.first(metres))))


def _mixed(width: int, inner: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, inner), nn.ReLU(), nn.Dropout(dropout), nn.Linear(inner, width))


class Exchange(nn.Module):
    """One layer: each side attends to itself, words attend to voxels, voxels to the words as they were before that."""

    def __init__(self, width: int, heads: int, inner: int, dropout: float) -> None:
        super().__init__()
        each: dict[str, Any] = {"dropout": dropout, "batch_first": True}
        names = ("voxels", "words", "words_to_voxels", "voxels_to_words")
        self.attend = nn.ModuleDict({name: nn.MultiheadAttention(width, heads, **each) for name in names})
        self.mix = nn.ModuleDict({name: _mixed(width, inner, dropout) for name in ("voxels", "words")})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name in (*names, "voxels_mixed", "words_mixed")})
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, place: Tensor, none: Tensor, words: Tensor, absent: Tensor) -> tuple[Tensor, Tensor]:
        """Voxels [scenes, most, width], their place codes and padding, words and theirs -> voxels, words."""
        x = self._sum("voxels", x, x + place, x + place, x, none)
        words = self._sum("words", words, words, words, words, absent)
        told = self._sum("words_to_voxels", words, words, x, x, none)
        told = self.norms["words_mixed"](told + self.dropout(self.mix["words"](told)))
        x = self._sum("voxels_to_words", x, x + place, words, words, absent)
        return self.norms["voxels_mixed"](x + self.dropout(self.mix["voxels"](x))), told

    def _sum(self, name: str, to: Tensor, query: Tensor, key: Tensor, value: Tensor, padding: Tensor) -> Tensor:
        answer, _ = self.attend[name](query, key, value, key_padding_mask=padding, need_weights=False)
        return self.norms[name](to + self.dropout(answer))


class BiEncoder(nn.Module):
    """Layers of exchange between the voxels and the words of each scene; `size` is a voxel's side in metres."""

    def __init__(
        self, width: int, size: float, layers: int = 2, heads: int = 8, inner: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.asked: dict[str, Any] = {"width": width, "size": size, "layers": layers, "heads": heads}
        self.asked |= {"inner": inner, "dropout": dropout}
        self.size = size
        self.place = Place(width)
        self.layers = nn.ModuleList(Exchange(width, heads, inner, dropout) for _ in range(layers))

    def settings(self) -> dict[str, Any]:
        """What builds it again."""
        return dict(self.asked)

    def forward(self, x: Voxels, words: Words) -> tuple[Voxels, Words]:
        """Both with new features. Every scene must have a voxel: attention to nothing has no value."""
        dense, none, at = padded(x.features, x.scene, x.scenes)
        place, _, _ = padded(self.place(x.centres(self.size)), x.scene, x.scenes)
        told = words.features
        for layer in self.layers:
            dense, told = layer(dense, place, none, told, words.absent)
        return x.at(dense.flatten(0, 1)[at]), Words(told, words.absent)
