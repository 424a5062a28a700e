"""One budget to a count per site."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.patterns import keep_top
from secateur.errors import BudgetError, SettingError
from secateur.method import Budget
from secateur.site import Site, total_units

Scores = Mapping[str, Tensor]
"""Site name -> score [*site.shape], higher = keep; may be computed as it is asked for."""


@runtime_checkable
class Allocation(Protocol):
    """How a budget is spent over sites."""

    @property
    def needs_scores(self) -> bool:
        """Whether `spread` looks at scores."""
        ...

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """Units to keep at each site. Raises BudgetError where the budget cannot be met."""
        ...


def kept_of(units: int, sparsity: float) -> int:
    """How many of some units stay: all but floor(sparsity * units)."""
    return units - int(sparsity * units + 1e-9)  # 0.3 * 10 is 3 less a rounding error


@dataclass(frozen=True)
class Uniform:
    """The same sparsity everywhere."""

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        return {site.name: kept_of(site.units, budget.sparsity) for site in sites}


@dataclass(frozen=True)
class Global:
    """One threshold over all sites, so that the best stay wherever they are.

    `floor`: each site keeps at least this fraction OF ALL UNITS TOGETHER (or all it has), which prevents a layer
    from vanishing (Gupta et al. 2022, arXiv:2209.14624, minimum threshold). The total stays exact.
    """

    floor: float = 0.0

    needs_scores = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError when the floors together exceed what is to be kept."""
        if scores is None:
            raise SettingError(
                "a global allocation was asked for", "no scores were given", "Give a criterion's scores."
            )
        total = total_units(sites)
        keep = kept_of(total, budget.sparsity)
        least = {site.name: min(int(self.floor * total), site.units) for site in sites}
        if sum(least.values()) > keep:
            least_each = int(self.floor * total)
            raise BudgetError(
                f"a sparsity of {budget.sparsity:g} with {least_each:,} units left at each site was asked for",
                f"the floors alone keep {sum(least.values()):,} of {total:,}",
                f"Ask for at most {1 - sum(least.values()) / total:.4f}, or lower the floor.",
            )

        def ranked() -> Iterable[Tensor]:
            for site in sites:
                score = scores[site.name].reshape(-1).float()
                if least[site.name]:
                    score = score.masked_fill(keep_top(score, least[site.name]), torch.inf)
                yield score

        gone = _dropped(ranked, total - keep)
        return {site.name: site.units - g for site, g in zip(sites, gone, strict=True)}


def _dropped(chunks: Callable[[], Iterable[Tensor]], drop: int) -> list[int]:
    """How many of the `drop` smallest lie in each chunk; ties go in the order of the chunks.

    Two passes of a histogram over the bits of the scores instead of a sort of all of them at once, so that no more
    than one chunk need exist at a time.
    """
    if drop == 0:
        return [0 for _ in chunks()]
    high = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks():
        high += torch.bincount(_ordered(chunk) >> 16, minlength=1 << 16)
    bucket = int(torch.searchsorted(high.cumsum(0), drop))
    before = int(high[:bucket].sum())
    low = torch.zeros(1 << 16, dtype=torch.int64)
    for chunk in chunks():
        keys = _ordered(chunk)
        low += torch.bincount(keys[(keys >> 16) == bucket] & 0xFFFF, minlength=1 << 16)
    place = int(torch.searchsorted(low.cumsum(0), drop - before))
    threshold, ties = (bucket << 16) | place, drop - before - int(low[:place].sum())
    out = []
    for chunk in chunks():
        keys = _ordered(chunk)
        tied = min(ties, int((keys == threshold).sum()))
        ties -= tied
        out.append(int((keys < threshold).sum()) + tied)
    return out


def _ordered(score: Tensor) -> Tensor:
    """float32 -> int64 in [0, 2^32) in the same order."""
    if bool(score.isnan().any()):
        raise BudgetError("sites were to be ranked together", "some scores are NaN", "Look for NaN in the weights.")
    bits = (score + 0.0).view(torch.int32).long()  # + 0.0 makes -0 equal 0
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF) + (1 << 31), bits + (1 << 31))


@dataclass(frozen=True)
class Erk:
    """Sites with short sides keep more: density in proportion to the sum of the sides over their product.

    Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134, section 3 (Erdos-Renyi kernel); a density above one
    is held at one and the rest rescaled.
    """

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        raw = {site.name: sum(site.shape) / prod(site.shape) for site in sites}
        return _rescaled(sites, raw, kept_of(total_units(sites), budget.sparsity))


def _rescaled(sites: Sequence[Site], raw: Mapping[str, float], keep: int) -> dict[str, int]:
    """Densities in proportion to `raw`, none above one, so that `keep` units stay in all; exact."""
    full: set[str] = set()
    while True:
        open_ = [site for site in sites if site.name not in full]
        left = keep - sum(site.units for site in sites if site.name in full)
        weight = sum(raw[site.name] * site.units for site in open_)
        scale = left / weight if weight else 0.0
        over = {site.name for site in open_ if scale * raw[site.name] > 1}
        if not over:
            break
        full |= over
    exact = {
        site.name: float(site.units) if site.name in full else scale * raw[site.name] * site.units for site in sites
    }
    return _rounded(sites, exact, keep)


def _rounded(sites: Sequence[Site], exact: Mapping[str, float], keep: int) -> dict[str, int]:
    """Whole numbers near some real ones that add up: the largest remainders are rounded up."""
    out = {site.name: min(int(exact[site.name]), site.units) for site in sites}
    short = keep - sum(out.values())
    room = [site for site in sites if out[site.name] < site.units]
    for site in sorted(room, key=lambda s: out[s.name] - exact[s.name])[: max(short, 0)]:
        out[site.name] += 1
    return out


@dataclass(frozen=True)
class Owl:
    """Blocks with more outliers among their scores keep more.

    Yin et al. 2023, "Outlier Weighed Layerwise Sparsity", arXiv:2310.05175, section 3: D = 100 * the fraction of a
    block's scores above `outlier` times their mean; densities follow D over a range of 2 * reach around the target,
    and are then shifted so that the weights kept, not the blocks' mean, meet it.
    """

    outlier: float = 5.0  # M in the paper
    reach: float = 0.08  # lambda in the paper

    needs_scores = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation; equal blocks fall back to uniform."""
        if scores is None:
            raise SettingError("an OWL allocation was asked for", "no scores were given", "Give a criterion's scores.")
        blocks = list(dict.fromkeys(site.block for site in sites))
        share = {block: self._outliers([scores[s.name] for s in sites if s.block == block]) for block in blocks}
        low, high = min(share.values()), max(share.values())
        if high == low:
            return Uniform().spread(sites, budget)
        raw = {b: (d - low) / (high - low) * 2 * self.reach for b, d in share.items()}
        units = {b: sum(s.units for s in sites if s.block == b) for b in blocks}
        total = sum(units.values())
        mean = sum(raw[b] * units[b] for b in blocks) / total
        density = {b: min(max(raw[b] - mean + 1 - budget.sparsity, 0.01), 0.99) for b in blocks}
        # Clipping moves the total: shift what is not clipped until the weights kept are right.
        for _ in range(50):
            miss = 1 - budget.sparsity - sum(density[b] * units[b] for b in blocks) / total
            if abs(miss) < 1e-9:
                break
            density = {b: min(max(d + miss, 0.01), 0.99) for b, d in density.items()}
        exact = {site.name: density[site.block] * site.units for site in sites}
        return _rounded(sites, exact, kept_of(total, budget.sparsity))

    def _outliers(self, scores: Sequence[Tensor]) -> float:
        count = sum(s.numel() for s in scores)
        mean = sum(float(s.double().sum()) for s in scores) / count
        return 100 * sum(int((s > self.outlier * mean).sum()) for s in scores) / count
