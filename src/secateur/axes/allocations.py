"""One budget to a count per site."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.patterns import keep_top
from secateur.errors import BudgetError, SettingError, did_you_mean
from secateur.method import Budget
from secateur.site import Site, total_units
from secateur.task import Batch, Task

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


@runtime_checkable
class Measuring(Allocation, Protocol):
    """An allocation that runs the whole model for scores of its own."""

    def scores_of(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], task: Task) -> Scores:
        """What to give `spread`, of the model as it is now."""
        ...


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
class Alike:
    """What another allocation says, evened out: the same count for sites that do the same in every block.

    Stock loaders build every layer from one number, and take no others.
    """

    around: Allocation = Uniform()

    @property
    def needs_scores(self) -> bool:
        """See Allocation."""
        return self.around.needs_scores

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        wanted = self.around.spread(sites, budget, scores)
        alike: dict[tuple[str, str, int], list[str]] = {}
        for site in sites:
            own = site.name.removeprefix(site.block) if site.block else site.name
            alike.setdefault((own, site.kind, site.units), []).append(site.name)
        found, said = dict(wanted), []
        for (own, kind, units), names in alike.items():
            counts = [wanted[name] for name in names]
            found.update(dict.fromkeys(names, max(1, round(sum(counts) / len(counts)))))
            if len(set(counts)) > 1:
                least, most, mean = min(counts), max(counts), found[names[0]]
                said.append(
                    f"{own.lstrip('.')}: {least:,} to {most:,} of {units:,} {kind}s were to stay, layer by layer; "
                    f"{mean:,} stay in each of {len(names)}"
                )
        object.__setattr__(self, "_said", tuple(said))  # no field: it is not what was asked for, and not in recipes
        return found

    @property
    def given_up(self) -> tuple[str, ...]:
        """What the last spreading evened out, in words with the numbers."""
        return getattr(self, "_said", ())


@dataclass(frozen=True)
class Er:
    """Sites with few inputs and outputs keep more: density in proportion to (in + out) / (in * out).

    Mocanu et al. 2018, arXiv:1707.04780, equation 3 (Erdos-Renyi); the sides of a kernel do not count. A density above
    one is held at one and the rest rescaled.
    """

    power: float = 1.0  # of the proportion: 0 is uniform

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        raw = {site.name: (sum(site.shape[:2]) / prod(site.shape[:2])) ** self.power for site in sites}
        return rescaled(sites, raw, kept_of(total_units(sites), budget.sparsity))


@dataclass(frozen=True)
class Erk:
    """Sites with short sides keep more: density in proportion to the sum of the sides over their product.

    Evci et al. 2020, "Rigging the Lottery", arXiv:1911.11134, section 3 (Erdos-Renyi kernel); a density above one
    is held at one and the rest rescaled.
    """

    power: float = 1.0  # of the proportion: 0 is uniform

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        raw = {site.name: (sum(site.shape) / prod(site.shape)) ** self.power for site in sites}
        return rescaled(sites, raw, kept_of(total_units(sites), budget.sparsity))


@dataclass(frozen=True)
class ErkPlus:
    """ERK, with the classifier taken out of the sharing and given its own sparsity.

    Liu et al. 2022, arXiv:2202.02643, section 3.1: dense in the ImageNet runs. The classifier is the last site that is
    a matrix, and not one of a stack of blocks.
    """

    classifier: float = 0.0  # its sparsity
    power: float = 1.0  # of the proportion of the others

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError when the classifier alone keeps more than the budget."""
        last = _last_matrix(sites)
        given = {} if last is None else {last.name: (1 - self.classifier) * last.units}
        rest = [site for site in sites if site.name not in given]
        raw = {site.name: (sum(site.shape) / prod(site.shape)) ** self.power for site in rest}
        kept = {name: round(count) for name, count in given.items()}
        return kept | rescaled(rest, raw, _left(sites, rest, kept, budget))


@dataclass(frozen=True)
class UniformPlus:
    """The same sparsity everywhere but at the ends: the first kernel stays dense, the classifier keeps a share.

    Gale et al. 2019, arXiv:1902.09574, section 4.3, as in Liu et al. 2022, arXiv:2202.02643, section 3.1. A classifier
    that would keep less than `classifier` of its weights keeps that many; the others share what is left of the budget.
    Of what has no kernels, no layer stays dense.
    """

    classifier: float = 0.8  # the highest sparsity of the last matrix

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError when the two layers alone keep more than the budget."""
        first, last = next((site for site in sites if len(site.shape) > 2), None), _last_matrix(sites)
        given = {} if first is None else {first.name: first.units}
        if last is not None and budget.sparsity > self.classifier:
            given[last.name] = round((1 - self.classifier) * last.units)
        rest = [site for site in sites if site.name not in given]
        return _shared(sites, rest, given, budget)


@dataclass(frozen=True)
class ByName:
    """Each site the sparsity it is given by name; the others share what is left of the budget evenly."""

    sparsities: tuple[tuple[str, float], ...] = ()  # site name and sparsity, in pairs; a mapping will do

    needs_scores = False

    def __post_init__(self) -> None:
        if isinstance(self.sparsities, Mapping):
            object.__setattr__(self, "sparsities", tuple(self.sparsities.items()))
        for name, value in self.sparsities:
            if not 0 <= value <= 1:
                raise SettingError(
                    f"a sparsity of {value:g} at {name} was asked for", "it is a fraction", "Give 0 up to 1."
                )

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises SettingError for a name that no site has."""
        units = {site.name: site.units for site in sites}
        for name, _ in self.sparsities:
            if name not in units:
                raise SettingError(
                    f"a sparsity at {name!r} was given", "no site has that name", did_you_mean(name, units)
                )
        given = {name: round((1 - value) * units[name]) for name, value in self.sparsities}
        return _shared(sites, [site for site in sites if site.name not in given], given, budget)


def _last_matrix(sites: Sequence[Site]) -> Site | None:
    """The classifier: of a language model, whose sites are those in its blocks, there is none among them."""
    return next((site for site in reversed(sites) if len(site.shape) == 2 and not site.block), None)


def _left(sites: Sequence[Site], rest: Sequence[Site], given: Mapping[str, int], budget: Budget) -> int:
    """What is left of a budget for some sites when the others are given theirs. Raises BudgetError for nothing."""
    total, units = total_units(sites), total_units(rest)
    left = kept_of(total, budget.sparsity) - sum(given.values())
    if left < 0 or left > units:
        least, most = sum(given.values()) / total, (sum(given.values()) + units) / total
        raise BudgetError(
            f"a sparsity of {budget.sparsity:g} was asked for",
            f"{', '.join(given)} keep {sum(given.values()):,} of {total:,} weights whatever the budget",
            f"Ask for a sparsity from {1 - most:.4f} to {1 - least:.4f}, or let them keep another share.",
        )
    return left


def _shared(sites: Sequence[Site], rest: Sequence[Site], given: Mapping[str, int], budget: Budget) -> dict[str, int]:
    left, units = _left(sites, rest, given, budget), total_units(rest)
    return dict(given) | rounded(rest, {site.name: left * site.units / units for site in rest}, left)


def inhabited(sites: Sequence[Site], keep: Mapping[str, int]) -> dict[str, int]:
    """Counts with one unit at least everywhere, what that takes coming from the fullest sites; the total stays.

    A layer that keeps nothing cuts the network in two. Raises BudgetError, naming such layers, when there are fewer
    units than sites.
    """
    found = dict(keep)
    empty = [site.name for site in sites if found[site.name] == 0 and site.units]
    if sum(found.values()) < len(sites) and empty:
        raise BudgetError(
            f"{sum(found.values()):,} weights were to be left in {len(sites)} layers",
            f"nothing would be left of {', '.join(empty)}, and the network would be cut in two",
            f"Ask for a sparsity of at most {1 - len(sites) / total_units(sites):.6f}.",
        )
    for name in empty:
        fullest = max(found, key=lambda key: found[key])
        found[fullest] -= 1
        found[name] += 1
    return found


def check_scoreless(allocation: Allocation) -> None:
    """Raise SettingError for an allocation that looks at scores, where masks start at random and there are none."""
    if allocation.needs_scores or isinstance(allocation, Measuring):
        raise SettingError(
            f"the allocation {type(allocation).__name__} was asked for",
            "it looks at scores, and a random choice has none",
            "Use a rule of the shapes, such as erk, er, uniform-plus or by-name.",
        )


def gaps(sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[str]:
    """What masks leave empty, in words: whole sites, and outputs to which nothing leads."""
    empty = [site.name for site in sites if not bool(keep[site.name].any())]
    dead = {
        site.name: int((~keep[site.name].flatten(1).any(1)).sum())
        for site in sites
        if len(site.shape) > 1 and site.name not in empty
    }
    found = [f"collapsed: nothing is left of {', '.join(empty)}"] if empty else []
    if total := sum(dead.values()):
        most = max(dead, key=lambda name: dead[name])
        layers = sum(count > 0 for count in dead.values())
        found.append(f"no weight leads to {total:,} outputs in {layers} layers, {dead[most]:,} of them in {most}")
    return found


def rescaled(sites: Sequence[Site], raw: Mapping[str, float], keep: int) -> dict[str, int]:
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
    return rounded(sites, exact, keep)


def rounded(sites: Sequence[Site], exact: Mapping[str, float], keep: int) -> dict[str, int]:
    """Whole numbers near some real ones that add up: the largest remainders are rounded up."""
    out = {site.name: min(int(exact[site.name]), site.units) for site in sites}
    short = keep - sum(out.values())
    room = [site for site in sites if out[site.name] < site.units]
    for site in sorted(room, key=lambda s: out[s.name] - exact[s.name])[: max(short, 0)]:
        out[site.name] += 1
    return out


def among(keep: Mapping[str, int], there: Mapping[str, int]) -> dict[str, int]:
    """Counts no larger than what is there; the units that lack room stay where there is most: the total stays.

    On a ramp, where what is gone cannot come back: whole numbers that add up may rise by one at a site while the budget
    falls.
    """
    found = {name: min(count, there[name]) for name, count in keep.items()}
    over = sum(keep.values()) - sum(found.values())
    for name in sorted(found, key=lambda name: found[name] - there[name]) if over else ():
        more = min(over, there[name] - found[name])
        found[name], over = found[name] + more, over - more
    return found


@dataclass(frozen=True)
class SynExp:
    """Every layer keeps the same number of weights, or all it has if that is fewer.

    Cai, Hua, Chen, Suh, De Sa, Zhang 2022, arXiv:2203.02549: the synaptic flow to be expected of random masks over
    random weights is, but for a constant, the product of the layers' densities; under a budget of weights it is
    largest where all layers that are not full have as many.
    """

    needs_scores = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        return rescaled(
            sites, {site.name: 1 / site.units for site in sites}, kept_of(total_units(sites), budget.sparsity)
        )


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
        return rounded(sites, exact, kept_of(total, budget.sparsity))

    def _outliers(self, scores: Sequence[Tensor]) -> float:
        count = sum(s.numel() for s in scores)
        mean = sum(float(s.double().sum()) for s in scores) / count
        return 100 * sum(int((s > self.outlier * mean).sum()) for s in scores) / count
