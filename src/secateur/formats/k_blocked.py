"""Single weights for products with many rows: blocks of inputs that stay near, four outputs side by side."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SettingError
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

ABREAST, CHUNK = 4, 256  # of kernels/k_blocked.h: outputs side by side, and outputs that are sorted together
WINDOW = 16
"""Outputs that change places so that two side by side share many columns."""
PAIRED = {1: 20, 2: 30}
"""Columns of a block that outputs keep on average, from which on that pays, by how many a step has. Measured."""
DEPTHS = 128, 256


class Struct(ctypes.Structure):
    """`KBlocked` of kernels/k_blocked.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("depth", ctypes.c_int64),
        ("padded", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("shared", ctypes.c_void_p),
    )


def blocked(
    weight: Tensor, keep: Tensor, depth: int, rows: int = 1, index: torch.dtype = torch.uint8, each: int = 1
) -> dict[str, Tensor]:
    """What is kept of a matrix [out, in] in blocks of inputs that `index` can count: the tensors of `KBlocked`.

    With `rows` groups of so many outputs share their columns, values are [steps, groups side by side, rows], and an
    output that is none has zeros. With `each` a step has so many columns of each output, next to one another. Single
    outputs that keep many columns stand in pairs, and what both pairs of a four share comes first (`shared` says how
    much that is), for kernels that load it once for two.
    """
    (outputs, inputs), abreast = weight.shape, max(1, ABREAST // rows)
    blocks, groups = -(-inputs // depth), -(-outputs // rows)
    padded = -(-groups // abreast) * abreast
    fill = 0, blocks * depth - inputs, 0, groups * rows - outputs
    there = F.pad(keep, fill).view(groups, rows, -1).any(1)  # [groups, inputs]
    values = F.pad(weight.masked_fill(~keep, 0), fill).view(groups, rows, -1)
    kept = F.pad(there, (0, 0, 0, padded - groups)).view(padded, blocks, depth).transpose(0, 1)
    counts = kept.sum(2)  # [blocks, padded]
    order = fullest_first(counts, CHUNK // rows)
    pairs = abreast == ABREAST and int(counts.sum()) >= PAIRED[each] * counts.numel()
    if pairs:
        order = paired(kept, order)
    kept = kept.gather(1, order.unsqueeze(2).expand_as(kept))  # as they stand
    # Of each column among those of its group.
    places = shared_first(kept, each) if pairs else kept.cumsum(2, dtype=torch.int32) - 1
    offsets = torch.zeros(blocks * padded // abreast + 1, dtype=torch.int64)
    offsets[1:] = -(-kept.sum(2).view(-1, abreast).amax(1) // each)
    offsets.cumsum_(0)
    block, stand, column = kept.nonzero(as_tuple=True)
    bunch = (block * padded + stand) // abreast
    place = places[block, stand, column]
    at = ((offsets[bunch] + place // each) * abreast + stand % abreast) * each + place % each
    steps = int(offsets[-1])
    made = weight.new_zeros(steps * abreast * each, rows)
    made.index_copy_(0, at, values[order[block, stand], :, block * depth + column])
    columns = torch.zeros(steps * abreast * each, dtype=index)
    columns.index_copy_(0, at, column.to(index))
    return {
        "columns": columns.view(steps, abreast * each),
        "values": made.view(steps, abreast * each * rows),
        "rows": order.to(torch.int32),
        "offsets": offsets,
    }


def fullest_first(counts: Tensor, chunk: int = CHUNK) -> Tensor:
    """Where outputs stand that keep so many weights [.., outputs]: chunk by chunk, those that keep most first.

    Stable, so that the same weight is packed alike everywhere.
    """
    of = torch.arange(counts.shape[-1]) // chunk
    return (of * (int(counts.max()) + 1) - counts).argsort(dim=-1, stable=True)


def paired(kept: Tensor, order: Tensor) -> Tensor:
    """The order [blocks, padded] of outputs so that two that follow one another share many of their columns.

    They change places only within sixteen, which keep about as many. Greedy: the two that share most come together
    first, less by how many one keeps more, since what fills up the other has to be multiplied too.
    """
    blocks, padded = order.shape
    whole = padded // WINDOW * WINDOW
    windows = order[:, :whole].reshape(-1, WINDOW)  # [blocks * windows, 16]
    block = torch.arange(len(windows)) // max(1, whole // WINDOW)
    of = kept[block.unsqueeze(1), windows].float()
    count = of.sum(2)
    common = of @ of.transpose(1, 2) - (count.unsqueeze(1) - count.unsqueeze(2)).abs()
    taken = float("-inf")
    common.diagonal(dim1=1, dim2=2).fill_(taken)
    pairs, each = [], torch.arange(len(windows))
    for _ in range(WINDOW // 2):
        best = common.flatten(1).argmax(1)
        pairs.append(torch.stack([best // WINDOW, best % WINDOW], 1))
        for one in pairs[-1].unbind(1):
            common[each, one, :] = common[each, :, one] = taken
    found = torch.stack(pairs, 1)  # [blocks * windows, 8, 2]
    fullest = count.gather(1, found.flatten(1)).view(found.shape).amax(2)
    by_count = fullest.argsort(dim=1, descending=True, stable=True)
    found = found.gather(1, by_count.unsqueeze(2).expand_as(found))
    made = order.clone()
    made[:, :whole] = windows.gather(1, found.flatten(1)).view(blocks, whole)
    return made


def shared_first(kept: Tensor, each: int = 1) -> Tensor:
    """Places of columns [blocks, padded, depth] so that what both pairs of a four share comes first, as many steps."""
    blocks, padded, depth = kept.shape
    both = kept.view(blocks, padded // 2, 2, depth).all(2)
    which = both.cumsum(2, dtype=torch.int32)
    count = both.sum(2).view(blocks, -1, 2).amin(2) // each * each  # of a four
    front = both & (which <= count.repeat_interleave(2, 1).unsqueeze(2))
    front, which = (t.repeat_interleave(2, 1) for t in (front, which))
    rest = (kept & ~front).cumsum(2, dtype=torch.int32) + count.repeat_interleave(4, 1).unsqueeze(2)
    return torch.where(front, which, rest.to(torch.int32)) - 1


def shared(laid: Mapping[str, Tensor]) -> Tensor:
    """How many steps each four begins with in which its first two outputs, and its last two, share columns, int32."""
    offsets, wide = laid["offsets"], laid["columns"].shape[1]
    columns = laid["columns"].view(-1, 2, 2, wide // ABREAST)
    apart = (columns[:, :, 0] != columns[:, :, 1]).flatten(1).any(1).long()
    # A step is one of them while none since its four began is apart.
    before = F.pad(apart.cumsum(0), (1, 0))
    first = before[offsets[:-1]].repeat_interleave(offsets.diff())
    together = F.pad((before[1:] == first).cumsum(0), (1, 0))
    return (together[offsets[1:]] - together[offsets[:-1]]).to(torch.int32)


@dataclass(frozen=True)
class KBlocked:
    """A value and a byte for each weight that is kept, in blocks of `depth` inputs: for 16 rows and more.

    It is for float32, and for bfloat16 where there is no matrix unit, or for few rows.
    In each block the outputs are sorted, 256 at a time, by how many of its weights they keep, and four that follow one
    another go side by side, filled up with zeros for the first input of the block; the first two and the last two are
    such that share many inputs, and begin with these. 256 inputs to a block are for bfloat16, and for very high
    sparsity, where each output keeps few of them.

    columns [steps, 4], uint8 and values [steps, 4]: a step of a four holds one weight of each of its outputs. In
    bfloat16 both are [steps, 8]: two of each, next to one another, which processors multiply and add as one
    rows [blocks, padded], int32: which output stands where; outputs are rounded up to a multiple of four
    offsets [blocks * padded / 4 + 1], int64: the step at which a four begins, and the number of steps at the end
    """

    depth: int = 128

    names: ClassVar[tuple[str, ...]] = ("columns", "values", "rows", "offsets")
    code: ClassVar[int] = 8
    version: ClassVar[int] = 2

    def __post_init__(self) -> None:
        if self.depth not in DEPTHS:
            raise SettingError(
                f"blocks of {self.depth} inputs were asked for", "kernels know of others", f"Take one of {DEPTHS}."
            )

    @property
    def name(self) -> str:
        """`k-blocked-128`."""
        return f"k-blocked-{self.depth}"

    @property
    def settings(self) -> tuple[int, ...]:
        """The inputs in a block."""
        return (self.depth,)

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """It holds any matrix."""
        return unsuited(weight, mask)

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in blocks. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        tensors = blocked(weight, kept(weight, mask).cpu(), self.depth, each=_each(weight.dtype))
        return Packed(self, (weight.shape[0], weight.shape[1]), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        values, rows = packed.tensors["values"], packed.tensors["rows"].long()
        outputs, inputs = packed.shape
        of = self._fours(packed)
        at = rows.view(-1, ABREAST)[of].repeat_interleave(_each(packed.dtype), 1)  # [steps, 4 or 8]
        real = at < outputs
        made = values.new_zeros(outputs, inputs)
        # Added, not set: what fills up is zero, and must not overwrite the first weight of the block.
        return made.index_put_((at[real], self._inputs(packed, of)[real]), values[real], accumulate=True)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless columns, values, rows and offsets agree."""
        columns, values, rows, offsets = (packed.tensors[name] for name in self.names)
        outputs, inputs = packed.shape
        blocks, padded = self._blocks(inputs), self._padded(outputs)
        found = columns.dtype, rows.dtype, offsets.dtype
        if found != (torch.uint8, torch.int32, torch.int64):
            raise broken(packed, f"its columns are {found[0]}, its rows {found[1]} and its offsets {found[2]}")
        if values.dim() != 2 or values.shape[1] != ABREAST * _each(values.dtype) or columns.shape != values.shape:
            raise broken(packed, f"its columns are {list(columns.shape)} and its values {list(values.shape)}")
        if rows.shape != (blocks, padded):
            raise broken(packed, f"its rows are {list(rows.shape)}, for {blocks} blocks of {padded} outputs")
        places = torch.arange(padded)
        in_order = rows.long().sort(1).values
        if bool((in_order != places).any()) or bool((rows // CHUNK != places // CHUNK).any()):
            raise broken(packed, f"its rows do not name each output once, within its {CHUNK}")
        fours = blocks * padded // ABREAST
        bounds = offsets.shape == (fours + 1,) and int(offsets[0]) == 0 and int(offsets[-1]) == len(values)
        if not bounds or bool((offsets.diff() < 0).any()):
            raise broken(packed, f"its offsets do not lead through {fours} fours of {len(values)} steps")
        if columns.numel():
            most = int(self._inputs(packed, self._fours(packed)).max())
            if most >= inputs or int(columns.max()) >= self.depth:
                raise broken(packed, f"its columns reach to {most} of {inputs} inputs, or beyond their block")

    def call(self, packed: Packed) -> Call:
        """k_blocked_matmul, over chunks of outputs."""
        outputs, inputs = packed.shape
        padded = self._padded(outputs)
        given = (pointer(packed.tensors[name]) for name in self.names)
        struct = Struct(outputs, inputs, self.depth, padded, *given)
        struct.kept = (shared(packed.tensors),)
        struct.shared = pointer(struct.kept[0])
        return Call(f"k_blocked_matmul_{VALUES[packed.dtype]}", struct, -(-padded // CHUNK))

    def _blocks(self, inputs: int) -> int:
        return -(-inputs // self.depth)

    def _padded(self, outputs: int) -> int:
        return -(-outputs // ABREAST) * ABREAST

    def _fours(self, packed: Packed) -> Tensor:
        """The four of each step, [steps]."""
        offsets = packed.tensors["offsets"]
        return torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())

    def _inputs(self, packed: Packed, of: Tensor) -> Tensor:
        """The input of each weight, [steps, 4 or 8], for the fours of its steps."""
        block = of // (self._padded(packed.shape[0]) // ABREAST)
        return packed.tensors["columns"].long() + (block * self.depth).unsqueeze(1)


def _each(dtype: torch.dtype) -> int:
    """Weights of an output in a step."""
    return 2 if dtype is torch.bfloat16 else 1
