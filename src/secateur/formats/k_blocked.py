"""Single weights for products with many rows: blocks of inputs that stay near, four outputs side by side."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import SettingError
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

ABREAST, CHUNK = 4, 256  # of kernels/k_blocked.h: outputs side by side, and outputs that are sorted together
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
    )


def blocked(
    weight: Tensor, keep: Tensor, depth: int, rows: int = 1, index: torch.dtype = torch.uint8
) -> dict[str, Tensor]:
    """What is kept of a matrix [out, in] in blocks of inputs that `index` can count: the tensors of `KBlocked`.

    With `rows` groups of so many outputs share their columns, values are [steps, groups side by side, rows], and an
    output that is none has zeros.
    """
    (outputs, inputs), abreast = weight.shape, max(1, ABREAST // rows)
    blocks, groups = -(-inputs // depth), -(-outputs // rows)
    padded = -(-groups // abreast) * abreast
    fill = 0, blocks * depth - inputs, 0, groups * rows - outputs
    there = F.pad(keep, fill).view(groups, rows, -1).any(1)  # [groups, inputs]
    values = F.pad(weight.masked_fill(~keep, 0), fill).view(groups, rows, -1)
    counts = torch.zeros(blocks, padded, dtype=torch.int64)
    counts[:, :groups] = there.view(groups, blocks, depth).sum(2).T
    # By chunk, then by count, most first; stable, so that the same weight is packed alike everywhere.
    chunk = torch.arange(padded) // (CHUNK // rows)
    order = (chunk * (depth + 1) + depth - counts).argsort(dim=1, stable=True)
    offsets = torch.zeros(blocks * padded // abreast + 1, dtype=torch.int64)
    offsets[1:] = counts.gather(1, order).view(-1, abreast).amax(1).cumsum(0)
    place = order.argsort(1)  # [blocks, padded]: where a group stands
    group, column = there.nonzero(as_tuple=True)
    block = column // depth
    of_group = counts[:, :groups].T.flatten()  # columns follow one another by group, and then by block
    before = (of_group.cumsum(0) - of_group)[group * blocks + block]
    stands = block * padded + place[block, group]
    at = (offsets[stands // abreast] + torch.arange(len(group)) - before) * abreast + stands % abreast
    steps = int(offsets[-1])
    made = weight.new_zeros(steps * abreast, rows).index_copy_(0, at, values[group, :, column])
    columns = torch.zeros(steps * abreast, dtype=index)
    columns.index_copy_(0, at, (column % depth).to(index))
    return {
        "columns": columns.view(steps, abreast),
        "values": made.view(steps, abreast * rows),
        "rows": order.to(torch.int32),
        "offsets": offsets,
    }


@dataclass(frozen=True)
class KBlocked:
    """A value and a byte for each weight that is kept, in blocks of `depth` inputs: for 16 rows and more, in float32.

    In each block the outputs are sorted, 256 at a time, by how many of its weights they keep, and four that follow one
    another go side by side, filled up with zeros for the first input of the block. 256 inputs to a block are for very
    high sparsity, where each output keeps few of them.

    columns [steps, 4], uint8 and values [steps, 4]: a step of a four holds one weight of each of its outputs
    rows [blocks, padded], int32: which output stands where; outputs are rounded up to a multiple of four
    offsets [blocks * padded / 4 + 1], int64: the step at which a four begins, and the number of steps at the end
    """

    depth: int = 128

    names: ClassVar[tuple[str, ...]] = ("columns", "values", "rows", "offsets")
    code: ClassVar[int] = 8
    version: ClassVar[int] = 1

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
        tensors = blocked(weight, kept(weight, mask).cpu(), self.depth)
        return Packed(self, (weight.shape[0], weight.shape[1]), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        values, rows = packed.tensors["values"], packed.tensors["rows"].long()
        outputs, inputs = packed.shape
        of = self._fours(packed)
        at = rows.view(-1, ABREAST)[of]  # [steps, 4]
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
        if values.dim() != 2 or values.shape[1] != ABREAST or columns.shape != values.shape:
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
        """The input of each weight, [steps, 4], for the fours of its steps."""
        block = of // (self._padded(packed.shape[0]) // ABREAST)
        return packed.tensors["columns"].long() + (block * self.depth).unsqueeze(1)
