"""Whole blocks of weights: one number says where a block is, and its values lie as a register takes them."""

import ctypes
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from secateur.errors import SettingError
from secateur.formats.packed import VALUES, Call, Packed, broken, kept, pointer, refuse, unsuited

EMPTIEST = 1 << 20
"""How many times as many weights as numbers it holds a matrix may have, for a file to be believed."""


class Struct(ctypes.Structure):
    """`Block` of kernels/block.h."""

    _fields_ = (
        ("outputs", ctypes.c_int64),
        ("inputs", ctypes.c_int64),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("places", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Block:
    """Blocks of rows x columns, of which those that hold a kept weight are stored whole.

    places [blocks], int32: the first input of a block over the columns, rising within a row of blocks
    values [blocks, columns, rows]: the block, an input after the other
    offsets [outputs / rows + 1], int64: where the blocks of a row of blocks begin, and their number at the end

    Kernels take 1, 2, 4, 8 or 16 rows by as many columns as fill a register of 16 with them, or a multiple of those:
    16x1, 8x2, 4x4, 1x16; others are computed by the oracle, slowly.
    """

    rows: int = 16  # outputs of a block
    columns: int = 1  # inputs of a block

    names: ClassVar[tuple[str, ...]] = ("places", "values", "offsets")
    code: ClassVar[int] = 5
    version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise SettingError(
                f"blocks of {self.rows}x{self.columns} were asked for", "a block has no such side", "Take 16x1 or 1x16."
            )

    @property
    def name(self) -> str:
        """`16x1`."""
        return f"{self.rows}x{self.columns}"

    @property
    def settings(self) -> tuple[int, ...]:
        """Rows and columns."""
        return self.rows, self.columns

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """A shape that is no whole number of blocks."""
        reason = unsuited(weight, mask)
        if reason is None and (weight.shape[0] % self.rows or weight.shape[1] % self.columns):
            return f"{list(weight.shape)} is no whole number of blocks of {self.name}"
        return reason

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> Packed:
        """The weight in blocks. Raises FormatError on `why_not`."""
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        there = self._blocks(keep).any(3).any(2)  # [rows of blocks, columns of blocks]
        values = self._blocks(weight.masked_fill(~keep, 0))[there].contiguous()
        offsets = torch.zeros(len(there) + 1, dtype=torch.int64)
        offsets[1:] = there.sum(1).cumsum(0)
        places = there.nonzero()[:, 1].to(torch.int32)
        shape = (weight.shape[0], weight.shape[1])
        return Packed(self, shape, {"places": places, "values": values, "offsets": offsets})

    def dense(self, packed: Packed) -> Tensor:
        """The weight that was packed."""
        places, values, offsets = (packed.tensors[name] for name in self.names)
        made = values.new_zeros(packed.shape)
        at = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
        self._blocks(made)[at, places.long()] = values
        return made

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless places, values and offsets agree."""
        places, values, offsets = (packed.tensors[name] for name in self.names)
        outputs, inputs = packed.shape
        if outputs * inputs > EMPTIEST * (offsets.numel() + values.numel()):  # before memory is taken for it
            raise broken(packed, f"it says {outputs * inputs:,} weights and holds {values.numel():,} numbers")
        if outputs % self.rows or inputs % self.columns:
            raise broken(packed, f"its shape is no whole number of blocks of {self.name}")
        if places.dtype is not torch.int32 or offsets.dtype is not torch.int64:
            raise broken(packed, f"its places are {places.dtype} and its offsets {offsets.dtype}")
        if values.shape != (places.numel(), self.columns, self.rows) or places.dim() != 1:
            raise broken(packed, f"its places are {list(places.shape)} and its values {list(values.shape)}")
        bounds = offsets.shape == (outputs // self.rows + 1,) and int(offsets[0]) == 0
        if not bounds or int(offsets[-1]) != len(places) or bool((offsets.diff() < 0).any()):
            raise broken(packed, f"its offsets do not lead through {len(places)} blocks")
        at = torch.repeat_interleave(torch.arange(len(offsets) - 1), offsets.diff())
        order = at * (inputs // self.columns) + places
        within = places.numel() == 0 or 0 <= int(places.min()) <= int(places.max()) < inputs // self.columns
        if not within or bool((order.diff() <= 0).any()):
            raise broken(packed, f"its places do not rise within {inputs // self.columns} blocks of a row")

    def call(self, packed: Packed) -> Call:
        """block_matmul, over rows of blocks."""
        given = packed.tensors
        struct = Struct(*packed.shape, self.rows, self.columns, *(pointer(given[name]) for name in self.names))
        return Call(f"block_matmul_{VALUES[packed.dtype]}", struct, len(given["offsets"]) - 1)

    def _blocks(self, matrix: Tensor) -> Tensor:
        """A view [rows of blocks, columns of blocks, columns, rows] of a matrix [out, in]."""
        grid = matrix.view(-1, self.rows, matrix.shape[1] // self.columns, self.columns)
        return grid.permute(0, 2, 3, 1)
