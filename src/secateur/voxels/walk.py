"""What a network of levels of voxels leaves open: which voxels go on to the next finer level, and who reads the text.

A network asks its guide on the way from coarse to fine. The guide that it is built with lets every voxel have all its
children, and has voxels and words read each other once, at the coarsest level.
"""

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.voxels.fusion import BiEncoder, Words
from secateur.voxels.sparse import Voxels

COARSEST = 2
"""The level a walk begins at; the finest is 0."""


@dataclass(frozen=True, eq=False)
class Grounded:
    """What a network finds for sentences: a box, and how sure it is of it, at every voxel of the finest level."""

    scene: Tensor  # int64 [n], sorted
    centres: Tensor  # [n, 3], metres
    boxes: Tensor  # [n, 6]: centre and sides, metres
    scores: Tensor  # [n], logits
    scenes: int

    def best(self) -> Tensor:
        """The surest box of each scene [scenes, 6]; the first of several."""
        found = []
        for number in range(self.scenes):
            mine = self.scene == number
            found.append(self.boxes[mine][int(self.scores[mine].argmax())])
        return torch.stack(found)


@runtime_checkable
class Guide(Protocol):
    """Decides between levels: 2 is the coarsest, 0 the finest."""

    def read(self, level: int, x: Voxels, words: Words) -> tuple[Voxels, Words]:
        """Voxels that have arrived at level 2 or 1, and the words, each with what the other says; perhaps fewer."""
        ...

    def thinned(self, level: int, x: Voxels) -> Voxels:
        """The voxels of a level that shall have children."""
        ...

    def chosen(self, level: int, x: Voxels) -> Voxels:
        """Those of the children, now at this level, that stay."""
        ...

    def completed(self, x: Voxels, made: Voxels, seen: Voxels, words: Words) -> Voxels:
        """The finest level with what is missing: `made` are all children, `seen` what the backbone saw there."""
        ...


class FusedOnce(nn.Module):
    """Every voxel has all its children, and the text is read at the coarsest level alone."""

    def __init__(self, encoder: BiEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def read(self, level: int, x: Voxels, words: Words) -> tuple[Voxels, Words]:
        """See Guide."""
        return self.encoder(x, words) if level == COARSEST else (x, words)

    def thinned(self, level: int, x: Voxels) -> Voxels:
        """All."""
        return x

    def chosen(self, level: int, x: Voxels) -> Voxels:
        """All."""
        return x

    def completed(self, x: Voxels, made: Voxels, seen: Voxels, words: Words) -> Voxels:
        """As it is: nothing is missing."""
        return x


@runtime_checkable
class Walks(Protocol):
    """A network that walks from coarse voxels to fine ones and asks a guide on the way."""

    guide: Any  # a Guide
    size: float  # metres a side of a voxel
    strides: tuple[int, int, int]  # voxels a side of a cell at levels 0, 1 and 2
