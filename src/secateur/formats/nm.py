"""At most N of each M consecutive inputs: N values and N small numbers that say which inputs they are of."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SettingError
from secateur.formats import bits
from secateur.formats.bitmap import LANES
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

GROUPS = (2, 4, 8, 16)
"""The M there are: a group of x has to lie in one register."""

MANY = {"amx": 48}
"""Rows from which a weight of 16 bits is written out and multiplied as a dense one: measured, one thread."""

PAIRS = {"avx512bf16": 48}
"""Likewise where torch multiplies nothing but bfloat16 that fast."""


class Struct(ctypes.Structure):
    """`NM` of kernels/nm.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("n", ctypes.c_int64),
        ("m", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class NM:
    """N:M sparsity, as 2:4: every group of M inputs of an output keeps N weights, or fewer.

    values [panels, groups, N, 16]: a slot is one weight of each of the 16 outputs of a panel; what is missing is zero
    places [panels, groups, N, bytes], uint8: the input within its group that each of them multiplies, 2 bits an output
        for M up to 4 and 4 bits above, the first output lowest

    2:4 at 16 bits takes 0.56 of the dense bytes, as a bitmap at 50 % does; nothing has to be counted or expanded.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv:2104.08378, section 3.
    """

    n: int = 2  # kept
    m: int = 4  # of so many: 2, 4, 8 or 16

    names: ClassVar[tuple[str, ...]] = ("places", "values")
    code: ClassVar[int] = 4
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.m not in GROUPS or not 1 <= self.n < self.m:
            raise SettingError(
                f"the format {self.n}:{self.m} was asked for",
                f"M is one of {', '.join(map(str, GROUPS))} and N is from 1 to M - 1",
                "Take 2:4 or 4:8, or a bitmap for any other pattern.",
            )

    @property
    def name(self) -> str:
        """`2:4`."""
        return f"{self.n}:{self.m}"

    @property
    def settings(self) -> tuple[int, ...]:
        """N and M."""
        return self.n, self.m

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """Rows that no whole number of groups fills, or a group that keeps more than N."""
        reason = unsuited(weight, mask)
        if reason is not None:
            return reason
        if weight.shape[1] % self.m:
            return f"its {weight.shape[1]} inputs are no whole number of groups of {self.m}"
        most = int(kept(weight, mask).view(weight.shape[0], -1, self.m).sum(2).max())
        return None if most <= self.n else f"a group of {self.m} inputs keeps {most}"

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in slots. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        outputs, inputs = weight.shape
        keep = kept(weight, mask).cpu().view(outputs, -1, self.m)
        places = places_of(keep, self.n)
        there = keep.gather(2, places)
        values = weight.view(outputs, -1, self.m).gather(2, places) * there
        slots = _slots(values).contiguous()  # [panels, groups, n, lanes]
        tensors = {"places": bits.written(_slots(places * there), place_bits(self.m)), "values": slots}
        return Packed(self, (outputs, inputs), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        outputs, inputs = packed.shape
        values = _rows(packed.tensors["values"])[:outputs]  # [out, groups, n]
        places = _rows(bits.read(packed.tensors["places"], place_bits(self.m)))[:outputs].long()
        made = values.new_zeros(outputs, inputs // self.m, self.m)
        # Added, not set: what is missing is a zero at the first input of its group.
        return made.scatter_add_(2, places, values).view(outputs, inputs)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless places and values fit the shape."""
        places, values = packed.tensors["places"], packed.tensors["values"]
        outputs, inputs = packed.shape
        slots = (-(-outputs // LANES), inputs // self.m, self.n)
        if values.shape != (*slots, LANES) or inputs % self.m:
            raise broken(packed, f"its values are {list(values.shape)}, where {[*slots, LANES]} belong")
        if places.dtype is not torch.uint8 or places.shape != (*slots, 2 * place_bits(self.m)):
            raise broken(packed, f"its places are {places.dtype} {list(places.shape)}")
        if self.m in (2, 8) and int(bits.read(places, place_bits(self.m)).max()) >= self.m:
            raise broken(packed, f"a place is beyond its group of {self.m}")

    def call(self, packed: Packed) -> Call:
        """nm_matmul, over panels."""
        given = packed.tensors
        struct = Struct(*packed.shape, self.n, self.m, *(pointer(given[name]) for name in self.names))
        name = VALUES[packed.dtype]
        items = len(given["values"])
        many = MANY | PAIRS if packed.dtype is torch.bfloat16 else MANY
        return Call(f"nm_matmul_{name}", struct, items, expand=f"nm_expand_{name}", many=many)


def places_of(keep: Tensor, n: int) -> Tensor:
    """The places of n of each group [..., m], those that are kept first, and both parts in order: [..., n]."""
    return torch.sort(keep.logical_not().to(torch.uint8), dim=-1, stable=True).indices[..., :n]


def place_bits(m: int) -> int:
    """The bits that a place in a group of m is written in."""
    return 2 if m <= 4 else 4


def _slots(rows: Tensor) -> Tensor:
    """[out, groups, n] with the outputs of a panel side by side: [panels, groups, n, 16]."""
    full = F.pad(rows, (0, 0, 0, 0, 0, -rows.shape[0] % LANES))
    return full.view(-1, LANES, *full.shape[1:]).permute(0, 2, 3, 1)


def _rows(slots: Tensor) -> Tensor:
    """What `_slots` was made of, filled up: [panels * 16, groups, n]."""
    return slots.permute(0, 3, 1, 2).reshape(-1, *slots.shape[1:3])
