"""A network that is shown a room as points and told of an object in a sentence, and says which box it is.

Guo et al. "Text-guided Sparse Voxel Pruning for Efficient 3D Visual Grounding." 2025. arXiv:2502.10392, without what
prunes: a residual network of sparse convolutions sees three levels of voxels; from the coarsest on every voxel gets its
children and what was seen there, down to the finest, where each says a box and how sure it is. What happens between
the levels is its guide's to decide.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SettingError, TaskError
from secateur.voxels.fusion import BiEncoder, Words
from secateur.voxels.layers import Generative, Norm, Normed, Residual, Strided, Submanifold, pooled
from secateur.voxels.sparse import Voxels, added, per_scene, voxelised
from secateur.voxels.walk import COARSEST, FusedOnce, Grounded, Guide

Stage = tuple[int, int]
"""How many residual blocks, and the stride of the first."""

PRIOR = 0.01
"""How sure a voxel is of its box before it has learnt anything."""


class Reader(nn.Module):
    """Word ids int64 [scenes, words], 0 behind the end -> Words: an embedding and a gated recurrent unit.

    It reads from the last word to the first, so that the first, which stands for the sentence, has heard them all.
    """

    def __init__(self, vocabulary: int, width: int, dropout: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width, padding_idx=0)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.linear, self.norm, self.dropout = nn.Linear(width, width), nn.LayerNorm(width, 1e-12), nn.Dropout(dropout)

    def forward(self, ids: Tensor) -> Words:
        """See the class."""
        count = (ids != 0).sum(1, keepdim=True)
        turned = (count - 1 - torch.arange(ids.shape[1], device=ids.device)).clamp(min=0)  # padding stays behind
        heard, _ = self.gru(self.embedding(ids.gather(1, turned)))
        heard = heard.gather(1, turned[..., None].expand_as(heard))
        return Words(self.dropout(self.norm(self.linear(heard))), ids == 0)


class Backbone(nn.Module):
    """A strided convolution, a maximum, residual stages: the outputs of the last three, finest first."""

    def __init__(self, channels: int, width: int, stages: tuple[Stage, ...]) -> None:
        super().__init__()
        self.stem = Normed(Strided(channels, width // 2), width // 2)
        inputs, found = width // 2, []
        for blocks, stride in stages:
            rest = [Residual(width, width) for _ in range(blocks - 1)]
            found.append(nn.Sequential(Residual(inputs, width, stride), *rest))
            inputs = width
        self.stages = nn.ModuleList(found)

    def forward(self, x: Voxels) -> list[Voxels]:
        """Features [n, channels] -> three levels."""
        x, levels = pooled(self.stem(x)), []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        return levels[-3:]


class Grounder(nn.Module):
    """Points and sentences -> Grounded. The widths and depths of the paper are the defaults, but for the vocabulary.

    `size` is a voxel's side in metres; the stem makes four of it one cell. Raises SettingError for settings that
    cannot be.
    """

    def __init__(
        self,
        vocabulary: int = 30_522,
        width: int = 128,
        size: float = 0.01,
        stages: tuple[Stage, ...] = ((3, 2), (4, 2), (6, 2), (3, 2)),
        heads: int = 8,
        layers: int = 2,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if not size > 0:
            raise SettingError(f"voxels of {size:g} m a side were asked for", "a side is above 0", "Give 0.05, say.")
        if len(stages) < 3 or any(blocks < 1 or stride not in (1, 2) for blocks, stride in stages):
            raise SettingError(
                f"stages {stages} were asked for",
                "there are three at least, of one block or more, with a stride of 1 or 2",
                "Give ((1, 1), (1, 2), (1, 2)), say.",
            )
        if any(stride != 2 for _, stride in stages[-2:]):
            raise SettingError(
                f"stages {stages} were asked for", "the last two do not halve the grid", "Give them a stride of 2."
            )
        self.size = size
        finest = 4 * math.prod(stride for _, stride in stages[:-2])
        self.strides = (finest, 2 * finest, 4 * finest)
        self.text = Reader(vocabulary, width, dropout)
        self.backbone = Backbone(6, width, stages)
        self.guide: nn.Module = FusedOnce(BiEncoder(width, size, layers, heads, width, dropout))
        self.ups = nn.ModuleList(Normed(Generative(width, width), width) for _ in range(COARSEST))
        self.laterals = nn.ModuleList(Normed(Submanifold(width, width), width) for _ in range(COARSEST + 1))
        self.out = Normed(Submanifold(width, width), width)
        self.joint, self.joint_norm = nn.Linear(2 * width, width), Norm(width)
        self.box, self.sure = nn.Linear(width, 6), nn.Linear(width, 1)
        nn.init.constant_(self.sure.bias, math.log(PRIOR / (1 - PRIOR)))

    def forward(self, ids: Tensor, points: Tensor, scene: Tensor) -> Grounded:
        """Words int64 [scenes, words]; x y z in metres and r g b in [0, 1] of all points [n, 6]; their scenes [n].

        Raises TaskError where sentences and clouds do not go together or a scene is empty; see `voxelised` for others.
        """
        check(ids, points, scene)
        guide = self.guide
        assert isinstance(guide, Guide)
        words = self.text(ids)
        levels = self.backbone(voxelised(points[:, :3], points, scene, self.size, len(ids)))
        x, words = guide.read(COARSEST, levels[COARSEST], words)
        x = self.laterals[COARSEST](x)
        made = x
        for level in range(COARSEST - 1, -1, -1):
            made = self.ups[level](guide.thinned(level + 1, x))
            x = added(guide.chosen(level, made), levels[level])
            if level:
                x, words = guide.read(level, x, words)
                x = self.laterals[level](x)
        return self.answered(guide.completed(x, made, levels[0], words), words)

    def answered(self, x: Voxels, words: Words) -> Grounded:
        """A box and how sure it is for each voxel, which reads the sentence's first word."""
        x = self.out(self.laterals[0](x))
        both = torch.cat([x.features, words.features[x.scene, 0]], 1)
        inner = F.relu(self.joint_norm(self.joint(both)))
        box, centres = self.box(inner), x.centres(self.size)
        boxes = torch.cat([centres + box[:, :3], box[:, 3:].clamp(-6, 4).exp()], 1)
        return Grounded(x.scene, centres, boxes, self.sure(inner)[:, 0], x.scenes)


def check(ids: Tensor, points: Tensor, scene: Tensor) -> None:
    """Raise TaskError for sentences without words, and where scenes and sentences are not the same number."""
    asked = f"{len(ids)} sentences were to be found in a cloud of {len(points):,} points"
    if points.dim() != 2 or points.shape[1] != 6 or len(scene) != len(points):
        raise TaskError(
            asked,
            f"points are {list(points.shape)} in scenes {list(scene.shape)}",
            "Give x y z r g b of each [n, 6], and its scene [n].",
        )
    if not bool((ids != 0).any(1).all()) or not len(ids):
        raise TaskError(asked, "a sentence has no words", "Give each scene a sentence.")
    if len(points) and not 0 <= int(scene.min()) <= int(scene.max()) < len(ids):
        raise TaskError(
            asked, f"the points are of scenes {int(scene.min())} to {int(scene.max())}", "Give one sentence per scene."
        )
    empty = (per_scene(scene, len(ids)) == 0).nonzero().flatten().tolist()
    if empty:
        raise TaskError(asked, f"scene {empty[0]} has none", "Give every scene points.")


def grounder() -> Grounder:
    """A small one for rooms of boxes: voxels of 6.25 cm, levels of 25, 50 and 100 cm, width 32. Random weights."""
    return Grounder(16, 32, 0.0625, ((1, 1), (1, 2), (1, 2)), heads=4, layers=1)
