"""Few weights and short ones: a bitmap whose values are whole numbers of 8 bits, with a scale for each output."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.formats.bitmap import check_masks, masks_of, matrix_of, spread, steps_of
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

DEPTH = 4
LEVELS = 127  # on either side of zero

MANY = {"amx": 160}
"""Rows from which a weight of 16 bits is written out and multiplied as a dense one: measured, one thread."""


class Struct(ctypes.Structure):
    """`BitmapInt8` of kernels/bitmap.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("masks", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class BitmapInt8:
    """A bitmap of 8-bit values: 1 bit a weight, a byte for each that is kept, a scale for each output.

    The tensors are those of `Bitmap` with a step of four inputs, and

    scales [outputs], in the dtype of what is multiplied: the largest weight of a row over 127

    A weight is its value times its scale, rounded to nothing shorter than float32, so what comes back is not what was
    packed but within half a scale of it; packing that again changes nothing more than rounding does. At 50 % it takes
    0.31 of the bytes of a dense weight of 16 bits, where dense int8 takes 0.5.
    """

    names: ClassVar[tuple[str, ...]] = ("masks", "values", "offsets", "scales")
    code: ClassVar[int] = 3
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """`bitmap-int8`."""
        return "bitmap-int8"

    @property
    def settings(self) -> tuple[int, ...]:
        """It has none."""
        return ()

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """A weight that is not finite has no scale."""
        reason = unsuited(weight, mask)
        if reason is None and not bool(weight.isfinite().all()):
            return "some of its weights are not finite, and 8 bits hold only numbers"
        return reason

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight rounded to 8 bits, as a bitmap. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        scales = (weight * keep).abs().amax(1).float().div(LEVELS).to(weight.dtype)
        divisor = scales.float().masked_fill(scales == 0, 1.0).unsqueeze(1)
        whole = (weight.float() / divisor).round().clamp(-LEVELS, LEVELS).to(torch.int8)
        steps = steps_of(keep, DEPTH)
        masks, offsets = masks_of(steps)
        values = steps_of(whole, DEPTH)[steps]
        shape = (weight.shape[0], weight.shape[1])
        return Packed(self, shape, {"masks": masks, "values": values, "offsets": offsets, "scales": scales})

    def dense(self, packed: Packed) -> Tensor:
        """The weight as 8 bits hold it."""
        given = packed.tensors
        whole = matrix_of(spread(given["masks"], given["values"]), packed.shape, DEPTH)
        return (whole.float() * given["scales"].float().unsqueeze(1)).to(packed.dtype)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless masks, values, offsets and scales agree."""
        values, scales = packed.tensors["values"], packed.tensors["scales"]
        if values.dtype is not torch.int8 or scales.shape != (packed.shape[0],):
            raise broken(packed, f"its values are {values.dtype} and its scales {list(scales.shape)}")
        check_masks(packed, DEPTH)

    def call(self, packed: Packed) -> Call:
        """bitmap_int8_matmul, over panels."""
        given = packed.tensors
        struct = Struct(*packed.shape, *(pointer(given[name]) for name in self.names))
        name = VALUES[packed.dtype]
        items = len(given["offsets"]) - 1
        return Call(f"bitmap_int8_matmul_{name}", struct, items, expand=f"bitmap_int8_expand_{name}", many=MANY)
