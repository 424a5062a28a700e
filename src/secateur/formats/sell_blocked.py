"""For high sparsity and few rows: the kept weights of sixteen outputs side by side, for 256 inputs at a time."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.formats.bitmap import LANES
from secateur.formats.k_blocked import CHUNK, fullest_first
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

DEPTH, EACH = 256, 2  # of kernels/sell_blocked.h: inputs of a block, and weights of an output in a step


class Struct(ctypes.Structure):
    """`SellBlocked` of kernels/sell_blocked.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class SellBlocked:
    """Sliced ELLPACK in blocks of inputs: a value and a byte, which input of its 256, for each weight that is kept.

    Outputs come in chunks of 256. For each block of inputs those of a chunk are sorted by how many weights they keep,
    and sixteen that follow one another make a panel, as long as its fullest output; the others are filled up with zeros
    for the first input of the block. Panels follow one another, within a block, blocks within a chunk.

    columns [steps, 16, 2], uint8 and values [steps, 16, 2]: a step of a panel holds two weights of each of its outputs
    rows [panels, 16], uint8: which output of its chunk stands where; outputs are rounded up to a multiple of sixteen
    offsets [panels + 1], int64: the step at which a panel begins, and the number of steps at the end

    The inputs of a block are few enough for a processor to look them up in registers (AVX-512 VBMI), where a gather
    takes five to ten times as long. 3 bytes a kept weight at 16 bits and 5 at 32, as `Sell8`: as small as a bitmap at
    90 % sparsity and smaller from there on. Above 98 %, where blocks keep few weights of an output, `Sell8` is.

    Source: sorted slices as in `Sell16`; blocks of as many inputs as a processor can look up are secateur's own.
    """

    names: ClassVar[tuple[str, ...]] = ("columns", "values", "rows", "offsets")
    code: ClassVar[int] = 10
    version: ClassVar[int] = 1

    @property
    def name(self) -> str:
        """`sell-blocked`."""
        return "sell-blocked"

    @property
    def settings(self) -> tuple[int, ...]:
        """It has none."""
        return ()

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """It holds any matrix."""
        return unsuited(weight, mask)

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in blocks. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        (outputs, inputs), blocks, panels = weight.shape, _blocks(weight.shape[1]), _panels(weight.shape[0])
        fill = 0, blocks * DEPTH - inputs, 0, panels * LANES - outputs
        counts = F.pad(keep, fill).view(panels * LANES, blocks, DEPTH).sum(2)
        order = fullest_first(counts.T).T  # [outputs, blocks]
        stands = order.argsort(0)
        fullest = counts.gather(0, order).view(panels, LANES, blocks).amax(1)
        where = _where(panels, blocks)
        steps = torch.zeros(panels * blocks, dtype=torch.int64)
        steps[where] = -(-fullest // EACH)
        offsets = F.pad(steps.cumsum(0), (1, 0))
        row, column = keep.nonzero(as_tuple=True)  # in order of rows, and of blocks within each
        block = column // DEPTH
        first = counts[:outputs].flatten().cumsum(0).view(outputs, blocks) - counts[:outputs]
        place = torch.arange(len(row)) - first[row, block]  # among the weights of its output in its block
        stand = stands[row, block]
        at = (offsets[where[stand // LANES, block]] + place // EACH) * LANES * EACH
        at += stand % LANES * EACH + place % EACH
        size = int(offsets[-1]) * LANES * EACH
        columns = torch.zeros(size, dtype=torch.uint8).index_copy_(0, at, (column % DEPTH).to(torch.uint8))
        rows = torch.empty(panels * blocks, LANES, dtype=torch.uint8)
        rows[where] = (order % CHUNK).to(torch.uint8).view(panels, LANES, blocks).transpose(1, 2)
        tensors = {
            "columns": columns.view(-1, LANES, EACH),
            "values": weight.new_zeros(size).index_copy_(0, at, weight[keep]).view(-1, LANES, EACH),
            "rows": rows,
            "offsets": offsets,
        }
        return Packed(self, (outputs, inputs), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        outputs, inputs = self._places(packed)
        values = packed.tensors["values"]
        real = outputs < packed.shape[0]
        made = values.new_zeros(packed.shape)
        # Added, not set: what fills up is zero, and must not overwrite the first weight of the block.
        return made.index_put_((outputs[real], inputs[real]), values[real], accumulate=True)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless columns, values, rows and offsets agree."""
        columns, values, rows, offsets = (packed.tensors[name] for name in self.names)
        blocks, panels = _blocks(packed.shape[1]), _panels(packed.shape[0])
        found = columns.dtype, rows.dtype, offsets.dtype
        if found != (torch.uint8, torch.uint8, torch.int64):
            raise broken(packed, f"its columns are {found[0]}, its rows {found[1]} and its offsets {found[2]}")
        if values.dim() != 3 or values.shape[1:] != (LANES, EACH) or columns.shape != values.shape:
            raise broken(packed, f"its columns are {list(columns.shape)} and its values {list(values.shape)}")
        bounds = offsets.shape == (panels * blocks + 1,) and int(offsets[0]) == 0 and int(offsets[-1]) == len(values)
        if not bounds or bool((offsets.diff() < 0).any()):
            raise broken(packed, f"its offsets do not lead through {panels * blocks} panels of {len(values)} steps")
        if rows.shape != (panels * blocks, LANES):
            raise broken(packed, f"its rows are {list(rows.shape)}, for {panels * blocks} panels")
        stand = rows[_where(panels, blocks)].long().transpose(1, 2).reshape(panels * LANES, blocks)
        outputs = torch.arange(panels * LANES).unsqueeze(1)
        if not torch.equal((stand + outputs // CHUNK * CHUNK).sort(0).values, outputs.expand(-1, blocks)):
            raise broken(packed, f"its rows do not name each output of {panels} panels once in each block")
        if columns.numel() and (most := int(self._places(packed)[1].max())) >= packed.shape[1]:
            raise broken(packed, f"its columns reach to {most} of {packed.shape[1]} inputs")

    def call(self, packed: Packed) -> Call:
        """sell_blocked_matmul, over chunks of outputs."""
        struct = Struct(*packed.shape, *(pointer(packed.tensors[name]) for name in self.names))
        name, stored = VALUES[packed.dtype], packed.tensors["values"].numel() / (packed.shape[0] * packed.shape[1])
        # Two lines that cross, measured on an EPYC at three shapes: writing out takes as long as 52 rows, and of dense
        # weights no more than 0.15 may be stored for a row to take less than in a dense product. Both ways take as
        # long at 75 rows of 50 % zeros and 210 of 80 %. That of the matrix unit was not measured.
        many = {"amx": 32} | ({"avx512bf16": round(52 / (1 - 0.15 / stored))} if stored > 0.16 else {})
        items = -(-packed.shape[0] // CHUNK)
        return Call(f"sell_blocked_matmul_{name}", struct, items, expand=f"sell_blocked_expand_{name}", many=many)

    def _places(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """The output and the input of each weight, both [steps, 16, 2]."""
        rows, columns, offsets = (packed.tensors[name] for name in ("rows", "columns", "offsets"))
        blocks, panels = _blocks(packed.shape[1]), _panels(packed.shape[0])
        where = _where(panels, blocks).flatten()  # of panels, then of blocks
        first, block = torch.empty_like(where), torch.empty_like(where)
        first[where] = (torch.arange(panels) * LANES // CHUNK * CHUNK).repeat_interleave(blocks)
        block[where] = torch.arange(blocks).repeat(panels)
        of = torch.arange(len(where)).repeat_interleave(offsets.diff())  # the panel of each step
        outputs = (first.unsqueeze(1) + rows)[of].unsqueeze(2).expand(columns.shape)
        return outputs, columns + (block[of] * DEPTH).view(-1, 1, 1)


def _blocks(inputs: int) -> int:
    return -(-inputs // DEPTH)


def _panels(outputs: int) -> int:
    return -(-outputs // LANES)


def _where(panels: int, blocks: int) -> Tensor:
    """Where a panel of outputs lies for each block, [panels, blocks]: chunk by chunk, block by block."""
    panel, block = torch.arange(panels).unsqueeze(1), torch.arange(blocks).unsqueeze(0)
    of_chunk = CHUNK // LANES
    begin = panel // of_chunk * of_chunk
    width = torch.minimum(torch.tensor(of_chunk), panels - begin)  # of the last chunk fewer
    return begin * blocks + block * width + panel % of_chunk
