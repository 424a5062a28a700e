"""For very high sparsity: the kept weights of sixteen outputs side by side, each with the input it multiplies."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.formats.bitmap import LANES
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

MOST_INPUTS = 2**15 - 1


class Struct(ctypes.Structure):
    """`Sell` of kernels/sell.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("columns", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Sell16:
    """Sliced ELLPACK: a value and the number of its input for each weight that is kept.

    Sixteen outputs make a panel, as long as its fullest output; the others are filled up with zeros for input 0.

    columns [steps, 16], int16 and values [steps, 16]: a step of a panel holds one weight of each of its outputs
    offsets [panels + 1], int64: the step at which a panel begins, and the number of steps at the end

    4 bytes a kept weight at 16 bits, where a bitmap takes 2 and a bit for every weight: smaller above 94 % sparsity,
    and faster before that, as nothing is read or done for weights that are not there.

    Source: Monakov, Lokhmotov and Avetisyan, "Automatically tuning sparse matrix-vector multiplication for GPU
    architectures", HiPEAC 2010.
    """

    names: ClassVar[tuple[str, ...]] = ("columns", "values", "offsets")
    code: ClassVar[int] = 2
    version: ClassVar[int] = 1

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
        outputs, inputs = weight.shape
        panels = -(-outputs // LANES)
        counts = torch.zeros(panels * LANES, dtype=torch.int64)
        counts[:outputs] = keep.sum(1)
        offsets = torch.zeros(panels + 1, dtype=torch.int64)
        offsets[1:] = counts.view(panels, LANES).amax(1).cumsum(0)
        rows, columns = keep.nonzero(as_tuple=True)  # in order of rows, so a weight's place in its row follows
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        at = (offsets[rows // LANES] + place) * LANES + rows % LANES
        steps = int(offsets[-1])
        values = weight.new_zeros(steps * LANES).index_copy_(0, at, weight[keep])
        indices = torch.zeros(steps * LANES, dtype=torch.int16).index_copy_(0, at, columns.to(torch.int16))
        tensors = {"columns": indices.view(steps, LANES), "values": values.view(steps, LANES), "offsets": offsets}
        return Packed(self, (outputs, inputs), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        columns, values, offsets = (packed.tensors[name] for name in self.names)
        outputs, inputs = packed.shape
        panels = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())  # [steps]
        rows = panels.unsqueeze(1) * LANES + torch.arange(LANES)  # [steps, lanes]
        real = rows < outputs
        made = values.new_zeros(outputs, inputs)
        # Added, not set: what fills up is zero, and must not overwrite the weight of input 0.
        return made.index_put_((rows[real], columns[real].long()), values[real], accumulate=True)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless columns, values and offsets agree."""
        columns, values, offsets = (packed.tensors[name] for name in self.names)
        outputs, inputs = packed.shape
        panels = -(-outputs // LANES)
        if inputs > MOST_INPUTS:
            raise broken(packed, f"an index here names {MOST_INPUTS} inputs")
        if columns.dtype is not torch.int16 or offsets.dtype is not torch.int64:
            raise broken(packed, f"its columns are {columns.dtype} and its offsets {offsets.dtype}")
        if values.dim() != 2 or values.shape[1] != LANES or columns.shape != values.shape:
            raise broken(packed, f"its columns are {list(columns.shape)} and its values {list(values.shape)}")
        bounds = offsets.shape == (panels + 1,) and int(offsets[0]) == 0 and int(offsets[-1]) == len(values)
        if not bounds or bool((offsets.diff() < 0).any()):
            raise broken(packed, f"its offsets do not lead through {panels} panels of {len(values)} steps")
        if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < inputs:
            raise broken(
                packed, f"its columns reach from {int(columns.min())} to {int(columns.max())} of {inputs} inputs"
            )

    def call(self, packed: Packed) -> Call:
        """sell_matmul, over panels."""
        given = packed.tensors
        struct = Struct(*packed.shape, *(pointer(given[name]) for name in self.names))
        name, steps = VALUES[packed.dtype], len(given["values"])
        # At 50, 90 and 97 % both ways take as long at about 8, 18 and 50 rows; this is 8, 24 and 70.
        many = 4 + 2 * packed.shape[0] * packed.shape[1] // max(1, steps * LANES)
        return Call(f"sell_matmul_{name}", struct, len(given["offsets"]) - 1, expand=f"sell_expand_{name}", many=many)
