"""Decide one site, mask and weights together."""

import ctypes
from dataclasses import dataclass, field
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur import kernels
from secateur.axes.criteria import Criterion, Magnitude, gram_factor
from secateur.axes.patterns import NM, ChannelBlocks, Pattern, PerRow, PerSlab, Taps
from secateur.axes.refiners import Refiner
from secateur.edit import Edit, Mask, Update
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import Evidence
from secateur.kernels.products import add_product
from secateur.site import Site, Tensors


@runtime_checkable
class Solver(Protocol):
    """How one site is decided."""

    @property
    def needs(self) -> frozenset[str]:
        """The evidence it reads."""
        ...

    def solve(self, site: Site, tensors: Tensors, seen: Evidence, keep: int) -> list[Edit]:
        """Edits that leave `keep` units of the site, nothing applied yet."""
        ...


@dataclass(frozen=True)
class Rank:
    """Score, choose the best a pattern allows, and perhaps improve the choice: most methods."""

    criterion: Criterion = field(default_factory=Magnitude)
    pattern: Pattern = field(default_factory=PerRow)
    refine: Refiner | None = None

    @property
    def needs(self) -> frozenset[str]:
        """What the criterion and the refiner read."""
        return self.criterion.needs | (frozenset() if self.refine is None else self.refine.needs)

    def solve(self, site: Site, tensors: Tensors, seen: Evidence, keep: int) -> list[Edit]:
        """See Solver."""
        score = self.criterion.score(site, tensors, seen)
        mask = Mask(site, self.pattern.select(score, self.pattern.nearest(site.shape, keep)))
        if self.refine is not None:
            mask = self.refine.refine(mask, score, self.pattern, tensors, seen)
        return [mask]


@dataclass(frozen=True)
class ObsSweep:
    """Go through the columns; drop the weights that cost least and let the columns still to come make up for them.

    Frantar and Alistarh 2023, "SparseGPT", arXiv:2301.00774, section 3, after Optimal Brain Surgeon. The result is
    the paper's; the way there takes one Cholesky factor instead of an inverse and two: with P the reversal of the
    columns and P H P = L L^T, R = P L^T P is lower triangular with H = R^T R, and U = chol(H^-1) of the paper is
    R^-T. The weight of column j, when its turn comes, is then

        w~_j = w_j + sum over i < j of (R_ji / R_jj) (w_i - q_i)

    with w the original and q the final weights, and its saliency w~_j^2 / U_jj^2 is (w~_j R_jj)^2.
    """

    pattern: Pattern = field(default_factory=PerSlab)
    block: int = 128  # columns whose choice is made at once
    damp: float = 0.01  # added to the diagonal, as a share of its mean

    def __post_init__(self) -> None:
        if self.pattern.span is not None and self.block % self.pattern.span:
            raise SettingError(
                f"a sweep by blocks of {self.block} columns was asked for",
                f"{self.pattern} decides {self.pattern.span} columns together, and blocks would cut them apart",
                f"Give block={-(-self.block // self.pattern.span) * self.pattern.span}, or another multiple.",
            )

    @property
    def needs(self) -> frozenset[str]:
        """The gram of the inputs."""
        return frozenset({"gram"})

    def solve(self, site: Site, tensors: Tensors, seen: Evidence, keep: int) -> list[Edit]:
        """See Solver. Raises EvidenceError where there is too little data to invert."""
        part = site.parts[0]
        weight = part.read(tensors).detach()
        gram = _gram(site, seen)
        groups = gram if gram.dim() == 3 else gram.unsqueeze(0)
        keep, kernel = self.pattern.nearest(site.shape, keep), tuple(site.shape[2:])
        # Groups of N:M are of neighbouring input channels: columns lie so that these stand side by side.
        last = isinstance(self.pattern, NM) and bool(kernel)
        order = torch.arange(gram.shape[-1]).reshape(-1, prod(kernel)).T.reshape(-1) if last else None
        flat = (weight.movedim(1, -1) if last else weight).flatten(1)
        rows = flat.chunk(len(groups), dim=0)
        masks, values = [], []
        for number, (own, hessian) in enumerate(zip(rows, groups, strict=True)):
            share = keep * (number + 1) // len(groups) - keep * number // len(groups)
            own_gram = hessian if order is None else hessian[order][:, order]
            mask, value = self.sweep(own.float(), own_gram, share, site.name, kernel)
            masks.append(mask)
            values.append(value)
        shape = (site.shape[0], *kernel, site.shape[1]) if last else site.shape
        mask, value = (torch.cat(found).reshape(shape) for found in (masks, values))
        if last:
            mask, value = mask.movedim(-1, 1), value.movedim(-1, 1)
        value = value.to(weight.dtype)
        whole = tensors[part.name].detach()
        if part.index is not None:
            whole = whole.clone()
            part.view(whole).copy_(value)
            value = whole
        elif part.turned:
            value = value.transpose(0, -1).contiguous()
        return [Update(part.name, value), Mask(site, mask)]

    def sweep(
        self, weight: Tensor, gram: Tensor, keep: int, name: str = "", kernel: tuple[int, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Mask and new weights [out, in] that keep `keep` of them, given the inputs' gram [in, in].

        `kernel` is the size of a convolution's, whose columns go channel by channel, for patterns that decide it whole.
        """
        rows, columns = weight.shape
        factor, dead = gram_factor(gram, self.damp, name)  # R, lower triangular: H = R^T R
        plain = weight.contiguous()
        if bool(dead.any()):
            plain = plain.masked_fill(dead, 0)
        # What the columns so far ask of those to come; of those done, the new weights. Rows are a line longer than they
        # are wide: apart by a large power of two, they would push one another out of the caches.
        push = torch.empty(rows, columns + 16, dtype=plain.dtype, device=plain.device)[:, :columns]
        mask = torch.empty(rows, columns, dtype=torch.bool)
        span = self.pattern.span
        kernel = kernel if isinstance(self.pattern, (ChannelBlocks, Taps)) else ()
        block = max(self.block // prod(kernel), 1) * prod(kernel)  # whole kernels
        push[:, :block] = 0
        kept = 0
        for a in range(0, columns, block):
            b = min(a + block, columns)
            change = torch.empty(rows, b - a, dtype=plain.dtype)  # w - q
            step = b - a if span is None else max(span, 1)
            for c in range(a, b, step):
                d = min(c + step, b)
                now = Columns(plain[:, c:d], push[:, c:d], factor[c:d, c:d])
                if c > a:
                    now.push.addmm_(change[:, : c - a], factor[c:d, a:c].T)
                # As the weights stand if nothing in these columns is dropped: what the choice is made on.
                score = now.saliency()
                # What is due by now less what was kept: a pattern's rounding here is made up for by the next columns.
                share = min(max(keep * d // columns - kept, 0), rows * (d - c))
                whole = (rows, (d - c) // prod(kernel), *kernel)
                share = self.pattern.nearest(whole, share)
                kept += share
                chosen = self.pattern.select(score.reshape(whole), share).reshape(rows, d - c)
                mask[:, c:d] = chosen
                now.settle(chosen, change[:, c - a : d - a])
            add_product(push[:, b:], change, factor[b:, a:b], fresh=a == 0)
        return mask, push


@dataclass(frozen=True)
class Columns:
    """Some neighbouring columns of a weight that are decided at once."""

    plain: Tensor  # [rows, columns]: w, as it was
    push: Tensor  # [rows, columns]: what the columns before them ask of these
    factor: Tensor  # [columns, columns]: their own part of R, lower triangular

    def saliency(self) -> Tensor:
        """(w~_j R_jj)^2 [rows, columns], if all of them stay."""
        score = torch.empty_like(self.plain, memory_format=torch.contiguous_format)
        kernel = self._kernel()
        if kernel is not None and kernel.level != "base":  # the oracle takes five times as long as torch
            self.run(kernel, None, score)
        else:
            free = torch.linalg.solve_triangular(self.factor, self.push.T, upper=False).T.add(self.plain)
            torch.mul(free, self.factor.diagonal(), out=score).square_()
        return score

    def settle(self, stays: Tensor, change: Tensor) -> None:
        """Put the new weights where `push` is, 0 where they go, and what they lost, w - q, into `change`."""
        kernel = self._kernel()
        if kernel is not None:
            self.run(kernel, stays.contiguous(), change)
            return
        for j in range(stays.shape[1]):
            due = self.push[:, j] if j == 0 else torch.addmv(self.push[:, j], change[:, :j], self.factor[j, :j])
            new = torch.add(self.plain[:, j], due, alpha=1 / float(self.factor[j, j])).mul_(stays[:, j])
            torch.sub(self.plain[:, j], new, out=change[:, j])
            self.push[:, j] = new

    def run(self, kernel: kernels.Kernel, stays: Tensor | None, found: Tensor) -> None:
        """Either by the compiled kernel: the saliency where it is not said what stays."""
        rows, columns = self.plain.shape
        lying = (self.plain, self.push, self.factor, stays, found)
        where = (None if t is None else t.data_ptr() for t in lying)
        apart = (0 if t is None else t.stride(0) for t in lying)
        kernels.run(kernel, Struct(*where, rows, columns, *apart), -(-rows // 16))

    def _kernel(self) -> kernels.Kernel | None:
        """What is compiled for these, or None where torch has to do."""
        if self.plain.dtype is not torch.float32 or self.plain.device.type != "cpu":
            return None
        return kernels.find("sweep_f32")


class Struct(ctypes.Structure):
    """`Sweep` of kernels/sweep.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plain", "push", "factor", "stays", "found")),
        *((name, ctypes.c_int64) for name in ("rows", "columns")),
        *((f"{name}_apart", ctypes.c_int64) for name in ("plain", "push", "factor", "stays", "found")),
    )


def _gram(site: Site, seen: Evidence) -> Tensor:
    if seen.count == 0 or "gram" not in seen.sums:
        raise EvidenceError(
            f"{site.name} was to be swept with the gram of its inputs",
            "no calibration token reached it in a product, or in a convolution over one or two axes",
            "Give more calibration data, or leave it out with exclude.",
        )
    return seen.sums["gram"]
