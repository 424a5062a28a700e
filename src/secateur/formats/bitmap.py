"""One bit says whether a weight is there; the values of those that are follow one another."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.formats import bits
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

LANES = 16
"""Outputs that are computed side by side: a panel."""

COUNTS = torch.tensor([i.bit_count() for i in range(256)], dtype=torch.uint8)


class Struct(ctypes.Structure):
    """`Bitmap` of kernels/bitmap.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("masks", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Bitmap:
    """Any mask: 1 bit a weight and the values kept, in the order in which the kernels read them.

    Sixteen outputs make a panel; a step of a panel is its 16 lanes by `depth` consecutive inputs, lane by lane, where
    depth is 4 bytes over the size of a value: 1 for float32, 2 for 16 bits. The last panel and step are filled up with
    weights that are not there.

    masks [panels, steps, 2 * depth], uint8: the bits of a step, the first the lowest of its byte
    values [kept]: panel by panel, step by step, bit by bit
    offsets [panels + 1], int64: where the values of a panel begin, and their number at the end

    At 16 bits and 50 % this is 0.56 of the dense bytes, at 70 % 0.36; below 6 % it is more than dense.
    """

    names: ClassVar[tuple[str, ...]] = ("masks", "values", "offsets")
    code: ClassVar[int] = 1
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """`bitmap`."""
        return "bitmap"

    @property
    def settings(self) -> tuple[int, ...]:
        """It has none."""
        return ()

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """Only what no format can hold."""
        return unsuited(weight, mask)

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight as a bitmap. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        depth = _depth(weight.dtype)
        keep = steps_of(kept(weight, mask).cpu(), depth)
        masks, offsets = masks_of(keep)
        values = steps_of(weight, depth)[keep]
        return Packed(self, _shape(weight), {"masks": masks, "values": values, "offsets": offsets})

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        values = packed.tensors["values"]
        return matrix_of(spread(packed.tensors["masks"], values), packed.shape, _depth(values.dtype))

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless masks, values and offsets agree."""
        check_masks(packed, _depth(packed.tensors["values"].dtype))

    def call(self, packed: Packed) -> Call:
        """bitmap_matmul, over panels."""
        given = packed.tensors
        struct = Struct(*packed.shape, *(pointer(given[name]) for name in self.names))
        return Call(f"bitmap_matmul_{VALUES[packed.dtype]}", struct, len(given["offsets"]) - 1)


def steps_of(matrix: Tensor, depth: int) -> Tensor:
    """A matrix [out, in] in the order of the kernels, filled up with zeros: [panels, steps, lanes * depth]."""
    outputs, inputs = matrix.shape
    full = F.pad(matrix, (0, -inputs % depth, 0, -outputs % LANES))
    grid = full.view(-1, LANES, full.shape[1] // depth, depth)  # [panels, lanes, steps, depth]
    return grid.transpose(1, 2).flatten(2)


def masks_of(keep: Tensor) -> tuple[Tensor, Tensor]:
    """What is kept [panels, steps, bits] as bytes [panels, steps, bits / 8], and where the values of a panel begin."""
    offsets = torch.zeros(keep.shape[0] + 1, dtype=torch.int64)
    offsets[1:] = keep.sum((1, 2)).cumsum(0)
    return bits.written(keep, 1), offsets


def spread(masks: Tensor, values: Tensor) -> Tensor:
    """The values in their places among zeros: [panels, steps, bits]."""
    keep = bits.read(masks, 1).bool()
    return values.new_zeros(keep.shape).masked_scatter_(keep, values)


def check_masks(packed: Packed, depth: int) -> None:
    """Raise FormatError unless masks, values and offsets fit a step of `depth` inputs and agree."""
    masks, values, offsets = (packed.tensors[name] for name in ("masks", "values", "offsets"))
    if masks.dtype is not torch.uint8 or offsets.dtype is not torch.int64:
        raise broken(packed, f"its masks are {masks.dtype} and its offsets {offsets.dtype}")
    outputs, inputs = packed.shape
    panels, steps = -(-outputs // LANES), -(-inputs // depth)
    if masks.shape != (panels, steps, 2 * depth) or offsets.shape != (panels + 1,) or values.dim() != 1:
        raise broken(
            packed,
            f"its masks are {list(masks.shape)} and its offsets {list(offsets.shape)}, where {values.dtype} "
            f"needs {[panels, steps, 2 * depth]} and {[panels + 1]}",
        )
    counted = torch.zeros_like(offsets)
    # A panel at a time: the counts of all bytes at once would be as large as the dense weight.
    counted[1:] = torch.stack([COUNTS[panel.long()].sum(dtype=torch.int64) for panel in masks]).cumsum(0)
    if not torch.equal(counted, offsets) or values.numel() != int(counted[-1]):
        raise broken(
            packed,
            f"its masks keep {int(counted[-1])} weights, its offsets end at {int(offsets[-1])} and there are "
            f"{values.numel()} values",
        )


def matrix_of(steps: Tensor, shape: tuple[int, int], depth: int) -> Tensor:
    """What `steps_of` was made of: [out, in]."""
    grid = steps.view(*steps.shape[:2], LANES, depth).transpose(1, 2)
    return grid.reshape(steps.shape[0] * LANES, -1)[: shape[0], : shape[1]].contiguous()


def _depth(dtype: torch.dtype) -> int:
    return 4 // dtype.itemsize


def _shape(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
