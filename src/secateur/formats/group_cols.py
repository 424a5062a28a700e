"""Groups of outputs that keep the same columns: an input is loaded once for all outputs of a group."""

import ctypes
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from secateur import kernels
from secateur.errors import SettingError
from secateur.formats import k_blocked
from secateur.formats.k_blocked import CHUNK, blocked
from secateur.formats.packed import Call, Packed, broken, kept, pointer, refuse, unsuited

ROWS = (1, 2, 4, 8, 16)
"""How many outputs a group can have."""

DEPTHS = {1: 144, 2: 144, 4: 288, 8: 288, 16: 288}
"""By rows of a group: columns of a block, for what is laid out of it to stay in the first cache, or where an input that
is loaded serves four outputs and more, near. Measured."""

DEEP = {8: 1024, 16: 1024}
"""The same of matrices and of kernels with one tap, of which nothing is laid out: sums wait less often, as
kernels take such groups over all tiles in turn (OFTEN in kernels/group_cols_tiles.h). Measured."""

THIN, THINNEST, OF_THIN = {"avx512bf16": 0.15}, 0.05, {1: 216, 2: 216}
"""And of kernels with several taps of which no more than a share is kept, by the level of the processor: few weights of
a block make it costly that sums are loaded and stored for each, and what is laid out is loaded less often. Measured on
an EPYC; on a Xeon blocks of 256 were slower below 95 % zeros."""

MOST_TAPS = 2**16 - 1
"""Of a kernel: a column of a block, and be it of one channel, is a number of 16 bits."""

SUMS = 2**18
"""Of an item of a convolution, so that they stay in the second cache."""

PIXELS, WHOLE = 768, 1024
"""Of an item, at most; and where nothing is laid out of it in copies, or it is a whole picture. Measured."""

EMPTIEST = 1 << 20
"""How many times as many weights as numbers it holds a matrix may have, for a file to be believed."""


class Struct(ctypes.Structure):
    """`GroupCols` of kernels/group_cols.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("outputs", "columns", "rows")),
        *((name, ctypes.c_void_p) for name in ("values", "counts", "steps")),
        *((name, ctypes.c_int64) for name in ("first", "groups", "whole")),
        *((name, ctypes.c_void_p) for name in ("blocked", "biases")),
    )


@dataclass(frozen=True)
class GroupCols:
    """For every `rows` consecutive outputs, the columns of which one of them keeps a weight, each stored whole.

    A column is an input of a matrix [out, in], or an input and a tap of a convolution [out, in, high, wide], tap after
    tap. Outputs left over by the groups make groups of one.

    values [outputs + weights]: group after group its biases, then for each column it keeps a weight of every row
    counts [groups], int32: how many columns a group keeps
    steps [kept], int32: from a kept column to the next one, through all groups; the last leads back to the first
    first [1], int64: the first kept column, 0 when none is

    A weight that is zero inside a kept column is stored: what is held counts, not what the mask says. Packed from a
    convolution it is one, and is convolved with `formats.conv`; `matmul` takes it as a matrix of its columns.

    Source: Xu, Liu, Xu, Wang, Li, Yan, Li, Fu, Pan, Chen. "SparseByteNN: A Novel Mobile Inference Acceleration
    Framework Based on Fine-Grained Group Sparsity." 2023. arXiv:2310.19509; the stream of steps as in Elsen, Dukhan,
    Gale, Simonyan. "Fast Sparse ConvNets." 2020. arXiv:1911.09723.
    """

    rows: int = 4
    high: int = 0  # of the kernel of a convolution, as `pack` finds it; 0 for a matrix
    wide: int = 0

    names: ClassVar[tuple[str, ...]] = ("values", "counts", "steps", "first")
    code: ClassVar[int] = 6
    version: ClassVar[int] = 1
    convolves: ClassVar[str] = "group_cols_conv_f32"

    def __post_init__(self) -> None:
        if self.rows not in ROWS:
            raise SettingError(
                f"groups of {self.rows} outputs were asked for", "kernels know of others", f"Take one of {ROWS}."
            )
        if min(self.high, self.wide) < 0 or (self.high == 0) != (self.wide == 0):
            raise SettingError(
                f"a kernel of {self.high}x{self.wide} was asked for", "there is none", "Leave it: `pack` finds it."
            )

    @property
    def name(self) -> str:
        """`group-cols-4`."""
        return f"group-cols-{self.rows}"

    @property
    def settings(self) -> tuple[int, ...]:
        """Rows of a group, and the kernel."""
        return self.rows, self.high, self.wide

    @property
    def taps(self) -> int:
        """Columns of an input."""
        return max(1, self.high * self.wide)

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """Anything but float32, a matrix or the weight of a two-dimensional convolution without groups."""
        if weight.dim() not in (2, 4) or not weight.numel():
            return f"it is {list(weight.shape)}, not a matrix [out, in] or a convolution [out, in, high, wide]"
        if weight.dtype is not torch.float32:
            return f"its dtype is {weight.dtype}, and there is one of torch.float32"
        if weight[0, 0].numel() > MOST_TAPS:
            return f"its kernels have {weight[0, 0].numel():,} taps, more than {MOST_TAPS:,}"
        if mask is not None and mask.shape != weight.shape:
            return f"its mask is {mask.dtype} {list(mask.shape)}, not bool {list(weight.shape)}"
        return unsuited(weight.flatten(1), None if mask is None else mask.flatten(1))

    def pack(self, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Packed:
        """The weight [out, in] or [out, in, high, wide] in groups, and with it a bias [out].

        Without a mask all that is not zero is kept. Raises FormatError on `why_not`.
        """
        format = (
            replace(self, **dict(zip(("high", "wide"), weight.shape[2:], strict=False))) if weight.dim() == 4 else self
        )
        refuse(format, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu().flatten(1)
        weight = weight.flatten(1).masked_fill(~keep, 0)
        outputs, columns = weight.shape
        whole = outputs // self.rows
        grouped = whole * self.rows
        there = torch.cat([keep[:grouped].view(whole, self.rows, columns).any(1), keep[grouped:]])  # [groups, columns]
        held = weight.new_zeros(outputs) if bias is None else bias.detach().cpu().to(weight.dtype)
        parts = [
            _stream(
                weight[:grouped].view(whole, self.rows, columns), held[:grouped].view(whole, self.rows), there[:whole]
            ),
            _stream(weight[grouped:].unsqueeze(1), held[grouped:].unsqueeze(1), there[whole:]),
        ]
        place = there.nonzero()[:, 1]
        steps = place.roll(-1) - place
        tensors = {
            "values": torch.cat(parts),
            "counts": there.sum(1).to(torch.int32),
            "steps": steps.to(torch.int32),
            "first": place[:1].clone() if len(place) else torch.zeros(1, dtype=torch.int64),
        }
        return Packed(format, (outputs, columns), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight [out, in] or [out, in, high, wide] that was packed."""
        outputs, columns = packed.shape
        weights, _ = self._parts(packed)
        made = weights.new_zeros(outputs * columns)
        made[self._places(packed)] = weights
        made = made.view(outputs, columns)
        return made.view(outputs, -1, self.high, self.wide) if self.high else made

    def bias(self, packed: Packed) -> Tensor:
        """The bias [out] that was packed with the weight, zeros where there was none."""
        return self._parts(packed)[1]

    def unsuited(self, channels: int, groups: int, outputs: int) -> str | None:
        """Why a convolution of so many inputs, groups and outputs cannot be held; None when it can."""
        return None if groups == 1 else f"it has {groups} groups"

    def inputs(self, shape: tuple[int, int]) -> int:
        """Channels of the pictures, for a packed weight of a shape."""
        return shape[1] // self.taps

    def groups(self, shape: tuple[int, int]) -> int:
        """Of the convolution: one, as every output may see every input."""
        return 1

    def cut(self, shape: tuple[int, int], out: tuple[int, int], pictures: int, threads: int) -> tuple[int, int]:
        """Rows of the outcome in an item, or pixels where `out` is one row of them, and parts of the outputs."""
        size, units = out[0], self._units(shape[0])
        whole = self.taps == 1 or out[0] * out[1] <= WHOLE
        pixels = max(128, min(WHOLE if whole else PIXELS, SUMS // shape[0]))
        if units == 1:  # a picture is divided if not the outputs
            pixels = max(64, min(pixels, -(-out[0] * out[1] // threads)))
        chunk = max(1, pixels // out[1])
        chunks = max(1, -(-size // chunk))
        return chunk, 1 if threads == 1 else min(units, max(1, 2 * threads // max(1, chunks * pictures)))

    def loads(self, packed: Packed) -> int:
        """How many inputs kernels load for one pixel of all outputs."""
        return int(packed.prepared.weight.laid["columns"].numel())

    def density(self, packed: Packed) -> float:
        """The fraction of the weights that is stored, zeros inside kept columns among them."""
        return (packed.tensors["values"].numel() - packed.shape[0]) / (packed.shape[0] * packed.shape[1])

    def fullness(self, weight: Tensor) -> float:
        """The fraction that is not zero of what would be stored of a weight; 1 when nothing is."""
        keep = weight.flatten(1) != 0
        grouped = len(keep) // self.rows * self.rows
        there = keep[:grouped].view(-1, self.rows, keep.shape[1]).any(1).sum() * self.rows + keep[grouped:].sum()
        return float(keep.sum() / there) if there else 1.0

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless counts, steps and values agree."""
        values, counts, steps, first = (packed.tensors[name] for name in self.names)
        outputs, columns = packed.shape
        if outputs * columns > EMPTIEST * values.numel():  # before memory is taken for it
            raise broken(packed, f"it says {outputs * columns:,} weights and holds {values.numel():,} numbers")
        if columns % self.taps:
            raise broken(packed, f"its {columns} columns are no whole number of kernels of {self.high}x{self.wide}")
        dtypes = (torch.float32, torch.int32, torch.int32, torch.int64)
        if tuple(t.dtype for t in (values, counts, steps, first)) != dtypes:
            raise broken(packed, f"its {', '.join(self.names)} are not {', '.join(map(str, dtypes))}")
        groups = self._groups(outputs)
        if counts.shape != (groups,) or values.dim() != 1 or steps.dim() != 1 or first.shape != (1,):
            raise broken(packed, f"its counts are {list(counts.shape)} and its first column {list(first.shape)}")
        heights = self._heights(outputs)
        stored = int((counts.long() * heights).sum())
        if int(counts.min()) < 0 or int(counts.sum()) != len(steps) or stored + outputs != len(values):
            raise broken(
                packed,
                f"its counts speak of {int(counts.sum())} columns and {stored + outputs} values, and there are "
                f"{len(steps)} and {len(values)}",
            )
        place = self._columns(packed)
        within = len(place) == 0 or 0 <= int(place.min()) <= int(place.max()) < columns
        order = torch.repeat_interleave(torch.arange(groups), counts.long()) * columns + place
        if not within or bool((order.diff() <= 0).any()):
            raise broken(packed, f"its steps do not rise within {columns} columns of a group")
        if (int(steps.sum()) if len(steps) else int(first)) != 0:
            raise broken(packed, "its last step does not lead back to its first column")

    def call(self, packed: Packed) -> Call:
        """group_cols_matmul, over as many outputs as are sorted together, with the bias that is held."""
        struct, bias = self.struct(packed), self.bias(packed)
        return Call("group_cols_matmul_f32", struct, self._units(packed.shape[0]), bias if bias.any() else None)

    def struct(self, packed: Packed) -> Struct:
        """What kernels read: the tensors as they are, and the groups by blocks of whole channels."""
        values, counts, steps, first = (packed.tensors[name] for name in self.names)
        (outputs, columns), (weights, biases), places = packed.shape, self._parts(packed), self._places(packed)
        matrix, keep = weights.new_zeros(outputs * columns), torch.zeros(outputs * columns, dtype=torch.bool)
        matrix[places], keep[places] = weights, True
        channels = columns // self.taps
        blocks = -(-channels // max(1, self._deepest(len(weights) / len(matrix)) // self.taps))
        depth = -(-channels // blocks) * self.taps  # as even as can be
        laid = blocked(matrix.view(outputs, -1), keep.view(outputs, -1), depth, self.rows, torch.int16)
        inner = k_blocked.Struct(outputs, columns, depth, laid["rows"].shape[1], *map(pointer, laid.values()))
        inner.kept = (k_blocked.shared(laid),) if self.rows == 1 else ()
        inner.shared = pointer(inner.kept[0]) if inner.kept else None
        made = Struct(
            outputs,
            columns,
            self.rows,
            *(pointer(t) for t in (values, counts, steps)),
            int(first),
            len(counts),
            outputs // self.rows,
            ctypes.addressof(inner),
            pointer(biases),
        )
        made.laid, made.depth, made.inner = laid, depth, inner
        made.kept = *laid.values(), biases  # structs point to them
        return made

    def _deepest(self, share: float) -> int:
        """The most columns of a block, for the share of the weights that is kept."""
        if self.taps == 1:
            return DEEP.get(self.rows, DEPTHS[self.rows])
        thin = share <= THIN.get(kernels.level(), THINNEST)
        return OF_THIN.get(self.rows, DEPTHS[self.rows]) if thin else DEPTHS[self.rows]

    def _units(self, outputs: int) -> int:
        """What is divided among threads: as many outputs as are sorted together."""
        return -(-outputs // CHUNK)

    def _groups(self, outputs: int) -> int:
        return outputs // self.rows + outputs % self.rows

    def _heights(self, outputs: int) -> Tensor:
        """Rows of each group, [groups]."""
        heights = torch.ones(self._groups(outputs), dtype=torch.int64)
        heights[: outputs // self.rows] = self.rows
        return heights

    def _columns(self, packed: Packed) -> Tensor:
        """The column of each step, [kept]."""
        steps = packed.tensors["steps"].long()
        return packed.tensors["first"] + steps.cumsum(0) - steps

    def _places(self, packed: Packed) -> Tensor:
        """Where in the flat matrix each stored weight stands, in the order of the stream."""
        outputs, columns = packed.shape
        counts, heights = packed.tensors["counts"].long(), self._heights(outputs)
        start = heights.cumsum(0) - heights  # the first output of each group
        of = torch.repeat_interleave(torch.arange(len(counts)), counts)
        height = heights[of]
        corner = start[of] * columns + self._columns(packed)
        along = torch.arange(int(height.sum())) - torch.repeat_interleave(height.cumsum(0) - height, height)
        return torch.repeat_interleave(corner, height) + along * columns

    def _parts(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """The stored weights and the biases, which stand before the weights of their group."""
        values, counts = packed.tensors["values"], packed.tensors["counts"].long()
        heights = self._heights(packed.shape[0])
        lengths = heights * (counts + 1)
        inside = torch.arange(len(values)) - torch.repeat_interleave(lengths.cumsum(0) - lengths, lengths)
        of_bias = inside < torch.repeat_interleave(heights, lengths)
        return values[~of_bias], values[of_bias]


def _stream(weight: Tensor, bias: Tensor, there: Tensor) -> Tensor:
    """Groups [groups, rows, columns] as a stream: biases [groups, rows], then the columns that are there."""
    whole = torch.cat([bias.unsqueeze(2), weight], 2).transpose(1, 2)  # [groups, 1 + columns, rows]
    taken = torch.cat([torch.ones(len(there), 1, dtype=torch.bool), there], 1)
    return whole[taken].flatten()
