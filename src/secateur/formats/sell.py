"""For very high sparsity: the kept weights of sixteen outputs side by side, each with the input it multiplies."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.formats.bitmap import LANES
from secateur.formats.k_blocked import fullest_first
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

MOST_INPUTS = 2**15 - 1
NAMES = ("columns", "values", "offsets", "rows")
FURTHEST = 255
"""That a distance of 8 bits reaches."""


class Struct(ctypes.Structure):
    """`Sell` of kernels/sell.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Sell16:
    """Sliced ELLPACK: a value and the number of its input for each weight that is kept.

    Outputs are sorted, 256 at a time, by how many weights they keep. Sixteen that follow one another make a panel, as
    long as its fullest output; the others are filled up with zeros for input 0.

    columns [steps, 16], int16 and values [steps, 16]: a step of a panel holds one weight of each of its outputs
    offsets [panels + 1], int64: the step at which a panel begins, and the number of steps at the end
    rows [panels, 16], int32: which output stands where; outputs are rounded up to a multiple of sixteen

    4 bytes a kept weight at 16 bits, where a bitmap takes 2 and a bit for every weight: smaller above 94 % sparsity,
    and faster before that, as nothing is read or done for weights that are not there.

    Source: Monakov, Lokhmotov and Avetisyan, "Automatically tuning sparse matrix-vector multiplication for GPU
    architectures", HiPEAC 2010; sorted as in Kreutzer, Hager, Wellein, Fehske and Bishop, "A unified sparse matrix data
    format for efficient general sparse matrix-vector multiplication on modern processors with wide SIMD units", SIAM
    Journal on Scientific Computing 36(5), 2014, arXiv:1307.6209.
    """

    names: ClassVar[tuple[str, ...]] = NAMES
    code: ClassVar[int] = 2
    version: ClassVar[int] = 2  # outputs are sorted

    @property
    def name(self) -> str:
        """`sell16`."""
        return "sell16"

    @property
    def settings(self) -> tuple[int, ...]:
        """It has none."""
        return ()

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """More inputs than an index of 16 bits can name."""
        if weight.dim() == 2 and weight.shape[1] > MOST_INPUTS:
            return f"it has {weight.shape[1]} inputs, and an index here names {MOST_INPUTS}"
        return unsuited(weight, mask)

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in slices. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        rows, columns = keep.nonzero(as_tuple=True)
        tensors = sliced(len(weight), rows, columns.to(torch.int16), weight[keep])
        return Packed(self, (weight.shape[0], weight.shape[1]), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        return spread(packed, packed.tensors["columns"].long())

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless columns, values and offsets agree."""
        check_slices(packed, torch.int16)
        columns, inputs = packed.tensors["columns"], packed.shape[1]
        if inputs > MOST_INPUTS:
            raise broken(packed, f"an index here names {MOST_INPUTS} inputs")
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < inputs:
            raise broken(
                packed, f"its columns reach from {int(columns.min())} to {int(columns.max())} of {inputs} inputs"
            )

    def call(self, packed: Packed) -> Call:
        """sell16_matmul, over panels."""
        return called(packed, "sell16")


@dataclass(frozen=True)
class Sell8:
    """Sliced ELLPACK with distances: a value, and how far its input lies behind the one before, for each weight kept.

    The tensors are those of `Sell16`, but

    columns [steps, 16], uint8: from the input of the step before in the same output to that of this one, the first
    from input 0; a zero bridges every 255 inputs without a weight, and what fills up an output stays where it is

    3 bytes a kept weight at 16 bits and 5 at 32: smaller than `Sell16` up to about 99 % sparsity, and than a bitmap
    from 88 % on.
    """

    names: ClassVar[tuple[str, ...]] = NAMES
    code: ClassVar[int] = 9
    version: ClassVar[int] = 2  # outputs are sorted

    @property
    def name(self) -> str:
        """`sell8`."""
        return "sell8"

    @property
    def settings(self) -> tuple[int, ...]:
        """It has none."""
        return ()

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """It takes what any format takes."""
        return unsuited(weight, mask)

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in slices. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        rows, columns = keep.nonzero(as_tuple=True)  # in order of rows
        before = torch.cat([columns.new_zeros(1), columns[:-1]])[: len(columns)]
        before[1:].masked_fill_(rows[1:] != rows[:-1], 0)
        distances = columns - before
        bridges = (distances - 1).clamp(min=0) // FURTHEST  # zeros before each weight
        last = (bridges + 1).cumsum(0) - 1  # where each weight stands among weights and bridges
        count = int(last[-1]) + 1 if len(last) else 0
        steps = torch.full((count,), FURTHEST).index_copy_(0, last, distances - FURTHEST * bridges)
        values = weight.new_zeros(count).index_copy_(0, last, weight[keep])
        tensors = sliced(len(weight), rows.repeat_interleave(bridges + 1), steps.to(torch.uint8), values)
        return Packed(self, (weight.shape[0], weight.shape[1]), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        return spread(packed, inputs_of(packed))

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless columns, values and offsets agree."""
        check_slices(packed, torch.uint8)
        furthest = inputs_of(packed)
        if furthest.numel() and int(furthest.max()) >= packed.shape[1]:
            raise broken(packed, f"its columns reach to {int(furthest.max())} of {packed.shape[1]} inputs")

    def call(self, packed: Packed) -> Call:
        """sell8_matmul, over panels."""
        return called(packed, "sell8")


def sliced(outputs: int, rows: Tensor, columns: Tensor, values: Tensor) -> dict[str, Tensor]:
    """The tensors of entries that come row by row: their outputs [n], columns [n] and values [n]."""
    panels = -(-outputs // LANES)
    counts = torch.bincount(rows, minlength=panels * LANES)
    order = fullest_first(counts)  # what is no output keeps nothing, and comes last
    stands = order.argsort()[rows]  # where the output of each entry stands
    offsets = torch.zeros(panels + 1, dtype=torch.int64)
    offsets[1:] = counts[order].view(panels, LANES).amax(1).cumsum(0)
    place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    at = (offsets[stands // LANES] + place) * LANES + stands % LANES
    size = int(offsets[-1]) * LANES
    return {
        "columns": columns.new_zeros(size).index_copy_(0, at, columns).view(-1, LANES),
        "values": values.new_zeros(size).index_copy_(0, at, values).view(-1, LANES),
        "offsets": offsets,
        "rows": order.to(torch.int32).view(panels, LANES),
    }


def inputs_of(packed: Packed) -> Tensor:
    """The input of each step and lane, from distances [steps, 16]."""
    distances, offsets = packed.tensors["columns"].long(), packed.tensors["offsets"]
    reached = torch.cat([distances.new_zeros(1, LANES), distances.cumsum(0)])
    return reached[1:] - reached[offsets[:-1]].repeat_interleave(offsets.diff(), 0)


def spread(packed: Packed, inputs: Tensor) -> Tensor:
    """The dense weight of which each step and lane belongs to one of the inputs [steps, 16]."""
    values, offsets = packed.tensors["values"], packed.tensors["offsets"]
    rows = packed.tensors["rows"].long().repeat_interleave(offsets.diff(), 0)  # [steps, lanes]
    real = rows < packed.shape[0]
    made = values.new_zeros(packed.shape)
    # Added, not set: what fills up is zero, and must not overwrite the weight of its input.
    return made.index_put_((rows[real], inputs[real]), values[real], accumulate=True)


def check_slices(packed: Packed, kind: torch.dtype) -> None:
    """Raise FormatError unless the shapes of columns, values and offsets agree, and rows name each output once."""
    columns, values, offsets, rows = (packed.tensors[name] for name in NAMES)
    panels = -(-packed.shape[0] // LANES)
    found = columns.dtype, offsets.dtype, rows.dtype
    if found != (kind, torch.int64, torch.int32):
        raise broken(packed, f"its columns are {found[0]}, its offsets {found[1]} and its rows {found[2]}")
    if values.dim() != 2 or values.shape[1] != LANES or columns.shape != values.shape:
        raise broken(packed, f"its columns are {list(columns.shape)} and its values {list(values.shape)}")
    bounds = offsets.shape == (panels + 1,) and int(offsets[0]) == 0 and int(offsets[-1]) == len(values)
    if not bounds or bool((offsets.diff() < 0).any()):
        raise broken(packed, f"its offsets do not lead through {panels} panels of {len(values)} steps")
    named = rows.flatten()
    if rows.shape != (panels, LANES) or not torch.equal(named.sort().values, torch.arange(panels * LANES).int()):
        raise broken(packed, f"its rows do not name each output of {panels} panels once")
    if bool((named[: packed.shape[0]] >= packed.shape[0]).any()):
        raise broken(packed, "its rows name something that is no output before its outputs")


def called(packed: Packed, kernel: str) -> Call:
    """The kernel of a format with columns of its width."""
    given = packed.tensors
    struct = Struct(*packed.shape, *(pointer(given[name]) for name in NAMES))
    name, panels, steps = VALUES[packed.dtype], len(given["offsets"]) - 1, len(given["values"])
    # At 50, 90 and 97 % both ways take as long at about 8, 18 and 50 rows; this is 8, 24 and 70.
    many = 4 + 2 * packed.shape[0] * packed.shape[1] // max(1, steps * LANES)
    return Call(
        f"{kernel}_matmul_{name}",
        struct,
        panels,
        expand=f"{kernel}_expand_{name}",
        many={"avx512bf16": many, "amx": many},
    )
