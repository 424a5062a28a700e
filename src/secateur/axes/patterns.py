"""Scores and a number to a legal choice of exactly that many.

One selector serves every pattern: of n units the lowest are dropped in the order (score, then flat index), so that
exactly the asked number stays, ties included.
"""

import ctypes
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from secateur import kernels
from secateur.errors import PatternError


@runtime_checkable
class Pattern(Protocol):
    """Which choices are legal."""

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """Boolean like score [out, ...], True for exactly `keep` units, only where `within` is True if given.

        Raises PatternError where that many cannot be kept in this pattern.
        """
        ...

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """The closest count this pattern can keep. Raises PatternError for a shape it does not fit."""
        ...

    @property
    def span(self) -> int | None:
        """How many columns are decided together: a sweep may not choose between them. None: any."""
        ...

    @property
    def fixed(self) -> float | None:
        """The sparsity the pattern itself prescribes, if it does."""
        ...


RANKED = (torch.float32, torch.float64)  # others are, as float32
SELECTED = (torch.float32, torch.bfloat16, torch.float16)  # by the kernel, which is given pieces of others
ITEM = 1 << 12  # scores a thread takes at a time
AT_ONCE = 1 << 20  # scores ranked together where rows are apart, so that a wide layer needs no copy of itself


def keep_top(score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
    """The one exact selector: along the last axis keep exactly the top `keep`, as boolean like score [..., n].

    The lowest are dropped in the order (score, then index). Raises PatternError for NaN, and for a count that is
    negative, more than there are, or more than `within` allows.
    """
    n = score.shape[-1]
    if not 0 <= keep <= n:
        raise PatternError(f"{keep} of {n} units were to be kept", f"there are {n}", "Ask for 0 up to all of them.")
    value = score.detach()
    if value.dtype not in RANKED and (within is not None or value.dtype not in SELECTED):
        value = value.float()
    if within is not None:
        if int(within.sum(-1).min()) < keep:
            raise PatternError(
                f"{keep} units were to be kept among those allowed",
                f"only {int(within.sum(-1).min())} are allowed",
                "Keep fewer, or allow more.",
            )
        lowest = torch.finfo(value.dtype).min
        value = value.clamp(min=lowest).masked_fill(~within, -torch.inf)
    drop = n - keep
    chosen = _compiled(value, drop) if 0 < drop < n else None
    if chosen is not None:
        return chosen
    if value.dtype not in RANKED:
        value = value.float()
    if bool(value.isnan().any()):
        raise _not_numbers()
    if drop == 0 or n == 0:
        return torch.ones_like(value, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(value, dtype=torch.bool)
    if value.dim() == 2 and value.numel() > AT_ONCE and len(value) > 1:  # rows are apart: few need be worked on at once
        return torch.cat([_top(rows, drop) for rows in torch.split(value, max(1, AT_ONCE // n))])
    return _top(value, drop)


def _not_numbers() -> PatternError:
    return PatternError("units were to be ranked", "some scores are NaN", "Look for NaN in weights or evidence.")


class Struct(ctypes.Structure):
    """`Select` of kernels/select.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("score", "keep", "odd")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "drop", "together")),
    )


def _compiled(value: Tensor, drop: int) -> Tensor | None:
    """The choice by the compiled kernel; None where there is none for the dtype, the device or this machine."""
    if value.dtype not in SELECTED or value.device.type != "cpu" or not value.numel():
        return None
    kernel = kernels.find("select_f32")
    if kernel is None:
        return None
    width = value.shape[-1]
    rows = value.contiguous().view(-1, width)
    out, odd = torch.empty(rows.shape, dtype=torch.bool), ctypes.c_int32()
    together = max(1, ITEM // width)
    # What has to become float32 first does so by pieces that a cache holds: new memory takes longer than the choice.
    each = len(rows) if value.dtype is torch.float32 else max(1, AT_ONCE // 4 // width)
    for some, chosen in zip(torch.split(rows, each), torch.split(out, each), strict=True):
        some = some.float()
        where = (some.data_ptr(), chosen.data_ptr(), ctypes.addressof(odd))
        kernels.run(kernel, Struct(*where, len(some), width, drop, together), -(-len(some) // together))
    if odd.value:
        raise _not_numbers()
    return out.view(value.shape)


def _top(value: Tensor, drop: int) -> Tensor:
    threshold = _kth_smallest(value, drop)
    gone = value <= threshold
    excess = gone.sum(-1, keepdim=True) - drop  # of those that equal the threshold, the last few stay
    if bool((excess > 0).any()):
        tied = value == threshold
        need = tied.sum(-1, keepdim=True) - excess
        gone &= ~tied | (tied.cumsum(-1) <= need)
    return ~gone


def _kth_smallest(value: Tensor, k: int) -> Tensor:
    """The k-th smallest (from 1) along the last axis, kept as an axis of one."""
    if value.device.type == "cpu":
        part = np.partition(value.numpy(), k - 1, axis=-1)[..., k - 1 : k]
        return torch.from_numpy(np.ascontiguousarray(part))
    return torch.kthvalue(value, k, dim=-1, keepdim=True).values


@dataclass(frozen=True)
class PerMatrix:
    """The best anywhere in the tensor."""

    span = None
    fixed = None

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        allowed = None if within is None else within.reshape(-1)
        return keep_top(score.reshape(-1), keep, allowed).reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """Any count will do."""
        return min(max(keep, 0), prod(shape))


@dataclass(frozen=True)
class PerRow:
    """The same number in each output row."""

    span = None
    fixed = None

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        rows = score.flatten(1) if score.dim() > 1 else score.reshape(1, -1)
        each, left = divmod(keep, rows.shape[0])
        if left:
            raise PatternError(
                f"{keep} units were to be kept, the same number in each row",
                f"there are {rows.shape[0]} rows",
                f"Keep {each * rows.shape[0]}, or use per-matrix.",
            )
        return keep_top(rows, each, None if within is None else within.reshape(rows.shape)).reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """The nearest multiple of the number of rows, the larger of two as near."""
        rows = shape[0] if len(shape) > 1 else 1
        return min((2 * keep + rows) // (2 * rows) * rows, prod(shape))


@dataclass(frozen=True)
class PerSlab:
    """The best within each slab of columns, each slab keeping its share: what a sweep of 128 columns does."""

    width: int = 128

    span = None
    fixed = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise PatternError(f"slabs of {self.width} columns were asked for", "a width is at least 1", "Give 128.")

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        flat = score.flatten(1) if score.dim() > 1 else score.reshape(1, -1)
        allowed = None if within is None else within.reshape(flat.shape)
        out, columns, done = torch.empty_like(flat, dtype=torch.bool), flat.shape[1], 0
        for a in range(0, columns, self.width):
            b = min(a + self.width, columns)
            share = keep * b // columns - done  # so that the shares add up
            done += share
            slab = flat[:, a:b].reshape(-1)
            inside = None if allowed is None else allowed[:, a:b].reshape(-1)
            out[:, a:b] = keep_top(slab, share, inside).reshape(-1, b - a)
        return out.reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """Any count will do."""
        return min(max(keep, 0), prod(shape))


@dataclass(frozen=True)
class NM:
    """In each row, n kept of every m consecutive input features.

    "2:4" keeps 2 of 4. n is the number KEPT; much published code counts the pruned ones.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(f"{self.n}:{self.m} was asked for", "n of m needs 0 < n <= m", "Give 2:4, say.")

    @property
    def span(self) -> int:
        """A group is decided together."""
        return self.m

    @property
    def fixed(self) -> float:
        """1 - n/m."""
        return 1 - self.n / self.m

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern; a convolution's groups run over its input channels."""
        if keep != self.nearest(tuple(score.shape), keep):
            raise PatternError(
                f"{keep} of {score.numel()} units were to be kept in the pattern {self.n}:{self.m}",
                f"it keeps {score.numel() * self.n // self.m}",
                f"Ask for a sparsity of {self.fixed:g}.",
            )
        rows = score.movedim(1, -1) if score.dim() > 2 else score
        groups = rows.reshape(-1, self.m)
        allowed = None
        if within is not None:
            allowed = (within.movedim(1, -1) if score.dim() > 2 else within).reshape(-1, self.m)
        chosen = keep_top(groups, self.n, allowed).reshape(rows.shape)
        return chosen.movedim(-1, 1) if score.dim() > 2 else chosen

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """n/m of all, whatever was asked."""
        inputs = shape[1] if len(shape) > 1 else shape[0]
        if inputs % self.m:
            raise PatternError(
                f"{self.n}:{self.m} needs rows whose length is a multiple of {self.m}",
                f"the shape is {list(shape)}",
                "Leave the site out with exclude, or use per-row.",
            )
        return prod(shape) // self.m * self.n


@dataclass(frozen=True)
class Blocks:
    """Blocks of r rows by c columns live or die whole, by the sum of their scores; "4x1"."""

    r: int = 4
    c: int = 1

    fixed = None

    def __post_init__(self) -> None:
        if self.r < 1 or self.c < 1:
            raise PatternError(f"blocks {self.r}x{self.c} were asked for", "sizes are at least 1", "Give 4x1, say.")

    @property
    def span(self) -> int:
        """The columns of a block are decided together."""
        return self.c

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        flat = score.flatten(1)
        rows, columns = self._grid(tuple(score.shape))
        if keep % (self.r * self.c):
            raise PatternError(
                f"{keep} units were to be kept in blocks {self.r}x{self.c}",
                f"a block has {self.r * self.c}",
                f"Keep {self.nearest(tuple(score.shape), keep)}.",
            )
        tiles = flat.reshape(rows, self.r, columns, self.c)
        allowed = None
        if within is not None:
            allowed = within.reshape(tiles.shape).all(3).all(1).reshape(-1)
        chosen = keep_top(tiles.sum((1, 3)).reshape(-1), keep // (self.r * self.c), allowed)
        whole = chosen.reshape(rows, 1, columns, 1).expand(rows, self.r, columns, self.c)
        return whole.reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """The nearest whole number of blocks."""
        self._grid(shape)
        size = self.r * self.c
        return min((2 * keep + size) // (2 * size) * size, prod(shape))

    def _grid(self, shape: tuple[int, ...]) -> tuple[int, int]:
        inputs = prod(shape[1:])
        if len(shape) < 2 or shape[0] % self.r or inputs % self.c:
            raise PatternError(
                f"blocks {self.r}x{self.c} need {self.r} to divide the rows and {self.c} the columns",
                f"the shape is {list(shape)}",
                "Leave the site out with exclude, or use other blocks.",
            )
        return shape[0] // self.r, inputs // self.c


@dataclass(frozen=True)
class ChannelBlocks:
    """Whole kernels of n consecutive output channels at one input channel live or die together, by their sum.

    A block is n x 1 in a matrix and n x 1 x k x k in a convolution: a kernel loads an input once for n outputs. Rows
    left over at the end are blocks of one, and keep their share. Lin et al. "1xN Pattern for Pruning Convolutional
    Neural Networks", 2021, arXiv:2105.14713; "SparseByteNN", 2023, arXiv:2310.19509.
    """

    n: int = 4

    span = None
    fixed = None

    def __post_init__(self) -> None:
        if self.n < 1:
            raise PatternError(
                f"blocks of {self.n} output channels were asked for", "a block has one at least", "Give 4, say."
            )

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        shape = tuple(score.shape)
        if keep != self.nearest(shape, keep):
            raise PatternError(
                f"{keep} of {score.numel()} units were to be kept in blocks of {self.n} output channels",
                f"a block has {self.n * prod(shape[2:])}",
                f"Keep {self.nearest(shape, keep)}.",
            )
        blocks, single = self.counts(shape, keep)
        chosen = []
        for n, rows, many in (
            (self.n, slice(0, self.whole(shape)), blocks),
            (1, slice(self.whole(shape), None), single),
        ):
            body = score[rows].reshape(-1, n, shape[1], prod(shape[2:]))
            allowed = None if within is None else within[rows].reshape(body.shape).all(3).all(1).reshape(-1)
            grid = keep_top(body.sum((1, 3)).reshape(-1), many, allowed).reshape(-1, 1, shape[1], 1)
            chosen.append(grid.expand(body.shape).reshape(-1, *shape[1:]))
        return torch.cat(chosen)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """The nearest number of whole blocks, those of the last rows in proportion."""
        blocks, single = self.counts(shape, keep)
        return (blocks * self.n + single) * prod(shape[2:])

    def whole(self, shape: tuple[int, ...]) -> int:
        """How many rows are in blocks of n; those after them are blocks of one."""
        return shape[0] // self.n * self.n

    def counts(self, shape: tuple[int, ...], keep: int) -> tuple[int, int]:
        """How many blocks of n, and of one, stand for so many units."""
        if len(shape) < 2:
            raise PatternError(
                f"blocks of {self.n} output channels were asked for",
                f"the shape is {list(shape)}",
                "Give a matrix or a kernel: outputs, inputs and perhaps more.",
            )
        size, rows = prod(shape[2:]), self.whole(shape)
        kernels = min(max((2 * keep + size) // (2 * size), 0), shape[0] * shape[1])
        most, alone = rows // self.n * shape[1], (shape[0] - rows) * shape[1]
        low, high = 0, most  # the last block whose middle is not beyond so many kernels
        while low < high:
            middle = (low + high + 1) // 2
            if 2 * kernels >= self.n * (2 * middle - 1) + 2 * _before(middle, most, alone):
                low = middle
            else:
                high = middle - 1
        last = _before(low + 1, most, alone) if low < most else alone
        return low, min(max(kernels - low * self.n, _before(low, most, alone) if low else 0), last)


def _before(block: int, blocks: int, alone: int) -> int:
    """How many of some blocks of one come before a block of n, counted from 1, when they come evenly among the others.

    In one order for all counts: with more to keep, no fewer of either kind are kept.
    """
    return ((2 * block - 1) * alone + blocks) // (2 * blocks)


@dataclass(frozen=True)
class Taps:
    """Each 3x3 kernel keeps four taps in the one of eight shapes that keeps the most of it.

    The centre and three neighbours: a square towards a corner, or all but one of the taps beside it. Niu et al.
    "PatDNN", 2020, arXiv:2001.00138, has such sets of patterns.
    """

    span = None
    fixed: ClassVar[float] = 5 / 9

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern. Raises PatternError where no shape lies within what is allowed."""
        if keep != self.nearest(tuple(score.shape), keep):
            raise PatternError(
                f"{keep} of {score.numel()} units were to be kept, four taps of each kernel",
                f"that is {score.numel() * 4 // 9}",
                "Ask for that many.",
            )
        allowed = score if within is None else score.masked_fill(~within, -torch.inf)
        worth = torch.stack([allowed.reshape(-1, 9)[:, shape].sum(1) for shape in SHAPES.tolist()], 1)
        if bool(worth.isnan().any()) or bool((worth.amax(1) == -torch.inf).any()):
            raise PatternError(
                "four taps of each kernel were to be kept",
                "some scores are NaN, or some kernel has no shape left among what is allowed",
                "Look for NaN in weights, or allow more.",
            )
        best = SHAPES.to(score.device)[worth.argmax(1)]
        return (
            torch.zeros(worth.shape[0], 9, dtype=torch.bool, device=score.device)
            .scatter(1, best, True)
            .reshape(score.shape)
        )

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """Four of nine, whatever was asked."""
        if len(shape) != 4 or shape[2:] != (3, 3):
            raise PatternError(
                "four taps of each 3x3 kernel were to be kept",
                f"the shape is {list(shape)}",
                "Leave the site out with exclude, or use another pattern.",
            )
        return prod(shape) // 9 * 4


SHAPES = torch.tensor(
    [(0, 1, 3, 4), (1, 2, 4, 5), (3, 4, 6, 7), (4, 5, 7, 8), (1, 3, 4, 5), (1, 3, 4, 7), (1, 4, 5, 7), (3, 4, 5, 7)]
)
"""The taps each shape of `Taps` keeps, of nine counted along the rows."""


def check_pattern(pattern: Pattern, sparsity: float) -> None:
    """Raise PatternError when a sparsity is not the one a pattern prescribes."""
    if pattern.fixed is not None and abs(pattern.fixed - sparsity) > 1e-6:
        raise PatternError(
            f"a sparsity of {sparsity:g} was asked for in the pattern {pattern}",
            f"that pattern always removes {pattern.fixed:g}",
            f"Ask for sparsity={pattern.fixed:g}, or for another pattern.",
        )
