"""Boxes in a room and the voxels that are to find them: overlaps, who answers for which box, and focal losses.

A box is its centre and its sides in metres [..., 6], axes along those of the room. What a batch of scenes holds is
[m, 8]: the number of the scene, the box, and the box's role in the sentence.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

TARGET, MENTIONED, OTHER = 0, 1, 2
"""Roles: what the sentence asks for, what else it speaks of, and all other objects."""


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes that are broadcast against each other [..., 6]: [...]."""
    shared = _shared(first, second).prod(-1)
    return shared / (first[..., 3:].prod(-1) + second[..., 3:].prod(-1) - shared).clamp(min=1e-9)


def _shared(first: Tensor, second: Tensor) -> Tensor:
    low = torch.maximum(first[..., :3] - first[..., 3:] / 2, second[..., :3] - second[..., 3:] / 2)
    high = torch.minimum(first[..., :3] + first[..., 3:] / 2, second[..., :3] + second[..., 3:] / 2)
    return (high - low).clamp(min=0)


def diou(first: Tensor, second: Tensor) -> Tensor:
    """IoU less the squared distance of the centres over that of the corners of the box around both [..., 6]: [...].

    Zheng et al. 2020, arXiv 1911.08287, equation 7; in (-1, 1], and 1 only for the same box.
    """
    low = torch.minimum(first[..., :3] - first[..., 3:] / 2, second[..., :3] - second[..., 3:] / 2)
    high = torch.maximum(first[..., :3] + first[..., 3:] / 2, second[..., :3] + second[..., 3:] / 2)
    apart = (first[..., :3] - second[..., :3]).square().sum(-1)
    return overlap(first, second) - apart / (high - low).square().sum(-1).clamp(min=1e-9)


def focal(logits: Tensor, wanted: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """-a (1 - p)^gamma log p for each, p the chance given to what is right, a alpha for True: [n], bool [n] -> [n].

    Lin et al. 2017, arXiv 1708.02002, equation 5. The logit is that of True.
    """
    target = wanted.to(logits.dtype)
    lost = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    weight = torch.where(wanted, alpha, 1 - alpha)
    return weight * (1 - torch.exp(-lost)).pow(gamma) * lost


def assigned(centres: Tensor, scene: Tensor, boxes: Tensor, of: Tensor, nearest: int = 32) -> Tensor:
    """Which box each voxel answers for, -1 for none: the `nearest` voxels of each box, and of its boxes the nearest.

    Centres [n, 3] in scenes [n], boxes [m, 6] in scenes `of` [m] -> int64 [n].
    """
    if not len(boxes):  # there is no least of none
        return torch.full_like(scene, -1)
    apart = torch.cdist(boxes[:, :3], centres)  # [m, n]
    apart = apart.masked_fill(of[:, None] != scene, torch.inf)
    close = apart.topk(min(nearest, len(centres)), largest=False, dim=1).indices
    chosen = torch.full_like(apart, torch.inf).scatter(1, close, apart.gather(1, close))  # [m, n]
    least, which = chosen.min(0)
    return torch.where(least.isfinite(), which, -1)


def near(centres: Tensor, scene: Tensor, boxes: Tensor, of: Tensor, side: float) -> Tensor:
    """Whether a voxel lies in a cube of `side` metres around a box's centre, whatever the box's size: bool [n]."""
    away = (centres[None] - boxes[:, None, :3]).abs().amax(-1)  # [m, n]
    return ((away <= side / 2) & (of[:, None] == scene)).any(0)
