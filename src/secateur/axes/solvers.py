"""Decide one site, mask and weights together."""

import ctypes
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur import kernels
from secateur.axes.criteria import Criterion, Magnitude, gram_factor
from secateur.axes.patterns import Pattern, PerRow, PerSlab
from secateur.axes.refiners import Refiner
from secateur.edit import Edit, Mask, Update
from secateur.errors import EvidenceError
from secateur.evidence import Evidence
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
        rows = weight.flatten(1).chunk(len(groups), dim=0)
        keep = self.pattern.nearest(site.shape, keep)
        masks, values = [], []
        for number, (own, hessian) in enumerate(zip(rows, groups, strict=True)):
            share = keep * (number + 1) // len(groups) - keep * number // len(groups)
            mask, value = self.sweep(own.float(), hessian, share, site.name)
            masks.append(mask)
            values.append(value)
        mask = torch.cat(masks).reshape(site.shape)
        value = torch.cat(values).reshape(site.shape).to(weight.dtype)
        whole = tensors[part.name].detach()
        if part.index is not None:
            whole = whole.clone()
            part.view(whole).copy_(value)
            value = whole
        elif part.turned:
            value = value.transpose(0, -1).contiguous()
        return [Update(part.name, value), Mask(site, mask)]

    def sweep(self, weight: Tensor, gram: Tensor, keep: int, name: str = "") -> tuple[Tensor, Tensor]:
        """Mask and new weights [out, in] that keep `keep` of them, given the inputs' gram [in, in]."""
        rows, columns = weight.shape
        factor, dead = gram_factor(gram, self.damp, name)  # R, lower triangular: H = R^T R
        scale = factor.diagonal().unsqueeze(1)
        # All that follows is turned, [columns, rows], so that what a column has lies in one piece.
        value = weight.T.contiguous()
        if value.data_ptr() == weight.data_ptr():
            value = value.clone()
        value[dead] = 0
        push = torch.zeros_like(value)  # what the columns so far ask of those to come
        mask = torch.ones(rows, columns, dtype=torch.bool)
        span = self.pattern.span
        kept = 0
        for a in range(0, columns, self.block):
            b = min(a + self.block, columns)
            change = torch.empty(b - a, rows, dtype=value.dtype)  # w - q
            step = b - a if span is None else max(span, 1)
            for c in range(a, b, step):
                d = min(c + step, b)
                inner, here, square = push[c:d], change[c - a : d - a], factor[c:d, c:d]
                if c > a:
                    inner.addmm_(factor[c:d, a:c], change[: c - a])
                # As the weights stand if nothing in these columns is dropped: what the choice is made on.
                free = torch.linalg.solve_triangular(square, inner, upper=False).add_(value[c:d])
                score = free.mul_(scale[c:d]).square_().T.contiguous()
                # What is due by now less what was kept: a pattern's rounding here is made up for by the next columns.
                share = min(max(keep * d // columns - kept, 0), rows * (d - c))
                share = self.pattern.nearest((rows, d - c), share)
                kept += share
                chosen = self.pattern.select(score, share)
                mask[:, c:d] = chosen
                plain, stays = value[c:d], chosen.T.contiguous()
                if not _compiled(plain, inner, square, stays, here):
                    held = stays.to(value.dtype)
                    for j in range(d - c):
                        due = inner[j] if j == 0 else torch.addmv(inner[j], here[:j].T, square[j, :j])
                        torch.sub(
                            plain[j], torch.add(plain[j], due, alpha=1 / float(square[j, j])).mul_(held[j]), out=here[j]
                        )
                plain.sub_(here)
            push[b:].addmm_(factor[b:, a:b], change)
        result = value.T.contiguous()
        result[~mask] = 0
        return mask, result


class Struct(ctypes.Structure):
    """`Sweep` of kernels/sweep.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("plain", "push", "factor", "stays", "change")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "stride")),
    )


def _compiled(plain: Tensor, push: Tensor, factor: Tensor, stays: Tensor, change: Tensor) -> bool:
    """Whether the compiled kernel has written the columns' change [columns, rows]; torch has to where it has not."""
    kernel = kernels.find("sweep_f32")
    if kernel is None or plain.dtype is not torch.float32 or plain.device.type != "cpu" or factor.stride(1) != 1:
        return False
    columns, rows = plain.shape
    where = (t.data_ptr() for t in (plain, push, factor, stays, change))
    kernels.run(kernel, Struct(*where, rows, columns, factor.stride(0)), -(-rows // 16))
    return True


def _gram(site: Site, seen: Evidence) -> Tensor:
    if seen.count == 0 or "gram" not in seen.sums:
        raise EvidenceError(
            f"{site.name} was to be swept with the gram of its inputs",
            "no calibration token reached it",
            "Give more calibration data, or leave it out with exclude.",
        )
    return seen.sums["gram"]
