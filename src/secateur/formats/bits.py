"""Small numbers in bytes: several in one, the first in its lowest bits. All formats and files write them so."""

import torch
from torch import Tensor
from torch.nn import functional as F


def written(numbers: Tensor, width: int) -> Tensor:
    """Numbers [..., n] of `width` bits (1, 2, 4) each in bytes [..., n * width / 8], the last filled up with zeros."""
    each = 8 // width
    full = F.pad(numbers.to(torch.uint8), (0, -numbers.shape[-1] % each))
    shifts = width * torch.arange(each, dtype=torch.uint8)
    return (full.view(*full.shape[:-1], full.shape[-1] // each, each) << shifts).sum(-1, dtype=torch.uint8)


def read(packed: Tensor, width: int) -> Tensor:
    """What `written` wrote, with what the last byte was filled up with: [..., bytes * 8 / width], uint8."""
    shifts = width * torch.arange(8 // width, dtype=torch.uint8)
    return (packed.unsqueeze(-1) >> shifts & (2**width - 1)).flatten(-2)
