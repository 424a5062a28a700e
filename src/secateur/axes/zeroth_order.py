"""Where a budget should be spent, by how steep the loss is there: seen with forward passes alone, or with gradients.

Sung, Yoon, Bansal. "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models." ICLR 2024.
arXiv:2310.02998, the coarse stage. A group of tensors is moved a little along random noise z, there and back:

    p = (L(w + step z) - L(w - step z)) / (2 step),      E |p| = sqrt(2 / pi) ||dL/dw||

so that the mean of |p| is the size of the gradient, without a graph and without a backward pass. What each group may
keep above a floor is then in proportion to its score, whatever tower of the model it is in.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import ceil, isfinite
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.allocations import Scores, kept_of, rounded
from secateur.distributed import present
from secateur.errors import BudgetError, EvidenceError, SettingError, SiteError, did_you_mean
from secateur.evidence import Evidence, calm, observe, summed
from secateur.method import Budget, check_sparsity
from secateur.site import Site, Tensors, tensors, total_units
from secateur.task import Batch, Task, generator

CHUNK = 1 << 16  # draws of noise that exist at a time


# What goes together


@runtime_checkable
class Grouping(Protocol):
    """Which sites share one score and one sparsity."""

    def group(self, site: Site) -> str:
        """The name of the group a site is in."""
        ...


@dataclass(frozen=True)
class PerSite:
    """Each tensor by itself."""

    def group(self, site: Site) -> str:
        """See Grouping."""
        return site.name


@dataclass(frozen=True)
class PerBlock:
    """All tensors of a block; what is in no block is by itself."""

    def group(self, site: Site) -> str:
        """See Grouping."""
        return site.block or site.name


@dataclass(frozen=True)
class PerTower:
    """All blocks of a stack: the picture's encoder, the text's."""

    def group(self, site: Site) -> str:
        """See Grouping."""
        return tower(site)


def tower(site: Site) -> str:
    """The stack a site's block is in ("vision_model.encoder.layers"), or "" for what is in none."""
    return site.block.rpartition(".")[0]


def component(sites: Sequence[Site], name: str) -> list[Site]:
    """The sites in a component of the model, by its dotted name or the start of it ("vision_model").

    Raises SiteError when none is: a tower left dense because of a typing error would pass for a good result.
    """
    found = [site for site in sites if site.parts[0].name.startswith(name + ".")]
    if not found:
        paths = [t.split(".") for t in dict.fromkeys(map(tower, sites)) if t]
        there = {".".join(path[: n + 1]) for path in paths for n in range(len(path))}
        raise SiteError(
            f"the component {name!r} was named",
            "nothing that is to be pruned lies in it",
            did_you_mean(name, there) if there else "This model has no towers: leave it out.",
        )
    return found


def grouped(sites: Sequence[Site], per: Grouping) -> dict[str, list[Site]]:
    """The sites of each group, in the order they were first met."""
    found: dict[str, list[Site]] = {}
    for site in sites:
        found.setdefault(per.group(site), []).append(site)
    return found


# How steep the loss is


@runtime_checkable
class Steepness(Protocol):
    """How steep the loss is along the weights of each site, seen by running the whole model."""

    def steepness(
        self, model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], task: Task
    ) -> dict[str, float]:
        """Site name -> a number that is larger where the loss feels more; the model is left as it was."""
        ...


def shift_(places: Sequence[Tensor], homes: Sequence[Tensor], seed: int, step: float) -> None:
    """Put tensors at `homes + step * z`, z standard normal and the same whenever the seed is.

    z is drawn anew each time, some rows at a time, and never held: what is kept of it is the seed.
    """
    draw = torch.Generator().manual_seed(seed)
    for place, home in zip(places, homes, strict=True):
        rows = max(1, CHUNK // max(1, home[0].numel()))
        for a in range(0, len(home), rows):
            some = home[a : a + rows]
            noise = torch.randn(some.shape, generator=draw).to(some.device)
            # float32 at least: in half precision w + step z would mostly be w again before it is even rounded
            wide = some if some.dtype == torch.float64 else some.float()
            place[a : a + rows].copy_(torch.add(wide, noise, alpha=step))


@torch.no_grad()
def slopes(loss: Callable[[], Tensor], places: Sequence[Tensor], seeds: Iterable[int], step: float) -> Iterator[float]:
    """For each seed the slope p of a loss along that seed's noise in some tensors, by two forward passes.

    The tensors are put back from a copy of them, bit for bit, whatever happens on the way; adding and taking away
    would leave a rounding error at every draw.
    """
    homes = [place.clone() for place in places]
    try:
        for seed in seeds:
            shift_(places, homes, seed, step)
            up = float(loss())
            shift_(places, homes, seed, -step)
            down = float(loss())
            yield (up - down) / (2 * step)
    finally:
        for place, home in zip(places, homes, strict=True):
            place.copy_(home)


@dataclass(frozen=True)
class ZerothOrder:
    """Mean |p| over batches and draws of noise: forward passes only, in the memory of one forward pass.

    Beside the model there is a copy of the tensors being moved (one tensor, or a block with `together="per-block"`)
    and CHUNK draws of noise. Takes 2 * draws forward passes for each batch and tensor. Groups keep their sum when
    they are moved together, shared among their sites by size.
    """

    samples: int = 32  # calibration examples, as in the paper; batches are used whole
    draws: int = 4  # of noise per batch; the paper takes one, over smaller and more batches
    step: float = 1e-3  # epsilon in the paper; too small, and the difference of two losses is rounding
    power: int = 0  # each tensor's score times the sum of |w| to this power: 0 as in the paper, 1 and 2 its variants
    together: Grouping = PerSite()  # what is moved at a time; per-block takes several times fewer passes

    def __post_init__(self) -> None:
        check_samples(self.samples, self.power)
        if self.draws < 1 or not self.step > 0:
            raise SettingError(
                f"draws={self.draws} and step={self.step} were asked for",
                "a slope takes one draw at least, and a step above 0",
                "Give draws=4 and step=0.001.",
            )

    def steepness(
        self, model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], task: Task
    ) -> dict[str, float]:
        """See Steepness. Raises EvidenceError where the loss is not finite."""
        held, named, found, ours = list(first(batches, self.samples)), tensors(model), {}, present()
        with torch.no_grad(), calm(model):  # dropout would be noise of its own
            for name, members in grouped(sites, self.together).items():
                places = [_stored(site, named) for site in members]
                draw = generator(task, f"noise {name}")
                # Of processes that work together each has every so-manieth batch, with the noise it has in one alone.
                seeds = torch.randint(2**62, (len(held) * ours.count, self.draws), generator=draw)
                seeds = seeds[ours.rank :: ours.count]

                def add(places: list[Tensor] = places, seeds: Tensor = seeds) -> Evidence:
                    total = 0.0
                    for batch, mine in zip(held, seeds.tolist(), strict=True):
                        there = slopes(lambda batch=batch: task.loss(model, batch), places, mine, self.step)  # type: ignore[misc]
                        total += sum(abs(p) for p in there)
                    return Evidence(seeds.numel(), {"slope": torch.tensor(total, dtype=torch.float64)})

                felt = finite(float(summed(name, add).mean("slope")), name)
                units = total_units(members)
                for site, place in zip(members, places, strict=True):
                    size = float(place.double().abs().pow(self.power).sum()) if self.power else 1.0
                    found[site.name] = felt * size * site.units / units
        return found


@dataclass(frozen=True)
class FirstOrder:
    """The size of the gradient itself: one backward pass per batch, in the memory of training.

    The expensive reference: v = |w|^power |g|, squared in g too where the power is 2; the norm of v, averaged over
    batches. order=2, power=0 is the norm of the gradient, which ZerothOrder estimates.
    """

    samples: int = 128  # calibration examples, as in the paper; batches are used whole
    power: int = 1  # of |w|: 0 the gradient alone, 1 as the paper has it for BLIP-2, 2 its square
    order: int = 1  # of the norm over a site's weights: 1 sums, 2 is Euclid's

    def __post_init__(self) -> None:
        check_samples(self.samples, self.power)
        if self.order not in (1, 2):
            raise SettingError(f"a norm of order {self.order} was asked for", "it is 1 or 2", "Give order=1.")

    def steepness(
        self, model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch], task: Task
    ) -> dict[str, float]:
        """See Steepness. Raises EvidenceError where a weight is frozen or a gradient is not finite."""
        named = tensors(model)

        def add() -> Evidence:
            found, count = dict.fromkeys((site.name for site in sites), 0.0), 0
            for batch in first(batches, self.samples):
                seen = observe(model, sites, [batch], {"grad_abs"}, task.loss)
                count += 1
                for site in sites:
                    steep = seen[site.name].sums["grad_abs"]
                    weight = site.parts[0].read(named).detach().double().abs()
                    value = weight.pow(self.power) * steep.pow(max(self.power, 1))
                    found[site.name] += float(value.norm(self.order))
            return Evidence(count, {name: torch.tensor(v, dtype=torch.float64) for name, v in found.items()})

        every = summed("steepness", add)
        return {name: float(total) / max(every.count, 1) for name, total in every.sums.items()}


def check_samples(samples: int, power: int) -> None:
    """Raise SettingError for settings that nothing can be seen with."""
    if samples < 1 or power not in (0, 1, 2):
        raise SettingError(
            f"samples={samples} and power={power} were asked for",
            "it takes one example at least, and a power is 0, 1 or 2",
            "Give samples=32 and power=0.",
        )


def finite(value: float, name: str) -> float:
    """A value. Raises EvidenceError, naming where it was measured, when it is not finite."""
    if not isfinite(value):
        raise EvidenceError(
            f"the loss was to be followed while {name} is moved",
            f"its slope is {value}",
            "Look for overflow in the model, or give a smaller step.",
        )
    return value


def _stored(site: Site, named: Tensors) -> Tensor:
    """A site's tensor as it lies in memory, so that writing to it writes to the model."""
    part = site.parts[0]
    whole = named[part.name].detach()
    return whole if part.index is None else whole[part.index]


def first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches until so many examples went by; the last one is used whole, as its loss may compare its examples."""
    ours = present()
    for place, batch in enumerate(batches):
        if samples <= (place * (ours.count - 1) + ours.rank) * batch.size:  # with what other processes have by then
            return
        yield batch
        samples -= batch.size


# What each group keeps


def capped(score: Sequence[float], size: Sequence[int], keep: float, least: Sequence[float]) -> list[float]:
    """How many weights each group keeps: its floor, and a share of the rest in proportion to its score.

    No group keeps more than it has; what it cannot take goes to the others, again by score. Where all that are not
    full have a score of 0, it goes to them by the room they have. The parts add up to `keep`.
    """
    kept = [float(value) for value in least]
    while (left := keep - sum(kept)) > 1e-6:
        room = [n - k for n, k in zip(size, kept, strict=True)]
        share = [a if r > 1e-9 else 0.0 for a, r in zip(score, room, strict=True)]
        if not sum(share):
            share = [max(r, 0.0) for r in room]
        whole = sum(share)
        kept = [min(float(n), k + left * (a / whole)) for n, k, a in zip(size, kept, share, strict=True)]
    return kept


@dataclass(frozen=True, eq=False)
class Felt(Mapping[str, Tensor]):
    """The steepness at each site, taken when the first is asked for: budgets are checked before the model is run."""

    how: Steepness
    model: nn.Module
    sites: Sequence[Site]
    batches: Sequence[Batch]
    task: Task

    @cached_property
    def found(self) -> dict[str, float]:
        """Site name -> steepness. Raises EvidenceError when the loss feels none of them."""
        found = self.how.steepness(self.model, self.sites, self.batches, self.task)
        if not any(found.values()):
            raise EvidenceError(
                f"the steepness of the loss was to be seen at {len(self.sites)} sites",
                "it is 0 at all of them",
                "Give calibration data that the loss depends on, or a larger step.",
            )
        return found

    def __getitem__(self, name: str) -> Tensor:
        return torch.tensor(self.found[name], dtype=torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self.found)

    def __len__(self) -> int:
        return len(self.found)


@dataclass(frozen=True)
class Ecoflap:
    """Blocks along which the loss is steep keep more, over all towers of a model together.

    Sung, Yoon, Bansal 2023, arXiv:2310.02998: one score a block, a floor under each, and what is left in proportion to
    the scores (not to score times size). All tensors of a group share a sparsity; the total is met to the weight. The
    model is run for the scores; given others, such as a criterion's, it spends by their sums.
    """

    steepness: Steepness = ZerothOrder()  # first-order is the expensive reference
    per: Grouping = PerBlock()  # what shares a sparsity; per-site and per-tower are the paper's ablations
    most: float | None = (
        None  # the sparsity no group goes beyond (p_max); none: what is asked for + 0.1, as in the paper
    )
    average: float = 0.0  # the power of its size a group's score is divided by: 0 the paper's sum, 1 its average
    towers: tuple[str, ...] = ()  # budgets of their own, such as vision_model=0.4; the rest makes up for the total

    needs_scores = False  # of a criterion: it has its own

    def __post_init__(self) -> None:
        _asked(self.towers)
        if self.most is not None and not 0 <= self.most <= 1:
            raise SettingError(
                f"at most {self.most:g} of a group was to be removed", "it is a fraction, up to 1", "Give most=0.6."
            )

    def scores_of(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], task: Task) -> Scores:
        """How steep the loss is at each site, once that is asked."""
        return Felt(self.steepness, model, sites, batches, task)

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError for budgets that do not fit together, SiteError for a name that is not
        there, before any score is looked at."""
        shares = self.shares(sites, budget)
        if scores is None:
            raise SettingError(
                "an ECoFLaP allocation was asked for",
                "there is nothing to say how steep the loss is",
                "Use it with ecoflap, oneshot, wanda or sparsegpt, which run the model for it.",
            )
        found: dict[str, int] = {}
        for members, keep in shares:
            found |= self._within(members, keep, scores)
        return {site.name: found[site.name] for site in sites}

    def shares(self, sites: Sequence[Site], budget: Budget) -> list[tuple[list[Site], int]]:
        """Sites that share a budget, and how many weights they keep: a tower with its own, or all the rest.

        Raises SiteError for a tower that is not there, BudgetError for budgets that do not make up the total.
        """
        found: list[tuple[list[Site], int]] = []
        taken: set[str] = set()
        for name, sparsity in _asked(self.towers).items():
            members = component(sites, name)
            if twice := taken & {site.name for site in members}:
                raise SettingError(
                    f"the towers {', '.join(self.towers)} were given",
                    f"{min(twice)} lies in two of them",
                    "Name each component once.",
                )
            taken |= {site.name for site in members}
            found.append((members, kept_of(total_units(members), sparsity)))
        total = total_units(sites)
        rest = [site for site in sites if site.name not in taken]
        held = sum(keep for _, keep in found)
        left = kept_of(total, budget.sparsity) - held
        low, high = 1 - (held + total_units(rest)) / total, 1 - held / total
        # Where every tower is named, four digits of the sparsity are all a caller can be expected to work out.
        if not -5e-4 * total <= left <= total_units(rest) + 5e-4 * total:
            possible = f"between {low:.4f} and {high:.4f}" if rest else f"{high:.4f}"
            raise BudgetError(
                f"a sparsity of {budget.sparsity:g} with {', '.join(self.towers)} was asked for",
                f"these make a total that is {possible}, whatever the rest keeps" if rest else f"these make {possible}",
                f"Ask for a sparsity {possible if rest else f'of {possible}'}, or change a tower's.",
            )
        if rest:
            found.append((rest, min(max(left, 0), total_units(rest))))
        for members, keep in found:
            self._check_most(members, 1 - keep / total_units(members))
        return found

    def _check_most(self, members: Sequence[Site], sparsity: float) -> None:
        if self.most is not None and sparsity > self.most + 1e-6:
            where = "/".join(dict.fromkeys(tower(site) or "the rest" for site in members))
            raise BudgetError(
                f"a sparsity of {sparsity:.4g} of {where} was asked for, and of no group more than {self.most:g}",
                "even with every group at that limit it is not reached",
                f"Ask for at most {self.most:g} there, or raise most.",
            )

    def _within(self, sites: Sequence[Site], keep: int, scores: Scores) -> dict[str, int]:
        """How many weights each of some sites keeps out of one budget."""
        groups = grouped(sites, self.per)
        sizes = [total_units(members) for members in groups.values()]
        felt = [
            finite(sum(float(scores[site.name].sum()) for site in members) / size**self.average, name)
            for (name, members), size in zip(groups.items(), sizes, strict=True)
        ]
        most = min(1.0, 1 - keep / sum(sizes) + 0.1) if self.most is None else self.most
        floors = [min(ceil(size * (1 - most) - 1e-6), size) for size in sizes]
        excess = sum(floors) - keep  # rounding up: at most a weight a group
        for place in sorted(range(len(sizes)), key=lambda k: -floors[k])[: max(excess, 0)]:
            floors[place] -= 1
        kept = capped(felt, sizes, keep, floors)
        exact = {
            site.name: count / size * site.units
            for members, count, size in zip(groups.values(), kept, sizes, strict=True)
            for site in members
        }
        return rounded(sites, exact, keep)


def _asked(towers: Sequence[str]) -> dict[str, float]:
    """Tower -> sparsity. Raises SettingError for what cannot be read so."""
    found: dict[str, float] = {}
    for text in towers:
        name, _, value = text.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            name = ""
        if not name.strip() or len(found) <= towers.index(text):
            raise SettingError(
                f"the budget {text!r} of a tower was given",
                "it cannot be read, or its tower has one already",
                "Write NAME=SPARSITY, such as vision_model=0.4.",
            )
        check_sparsity(found[name.strip()], f"sparsity of {name.strip()}")
    return found
