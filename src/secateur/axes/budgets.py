"""What is asked of a cut, in the units people deploy: how much of what is to go, and which widths may be left.

A sparsity is a fraction of the `units` or the `weights` of what is cut, or of the whole network's `parameters`, `flops`
(of a forward pass), `bytes` in memory, or `latency`: its time on this machine. Any allocation serves any of these: it
is asked for the sparsity at which what goes is right. What two sites own together goes once, so what is counted is
what is left, not the sum of what units own.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import lcm, prod
from typing import Protocol, cast, get_args

import torch
from torch import nn

from secateur.axes.allocations import kept_of
from secateur.axes.latency import Latency, Priced
from secateur.edit import apply_
from secateur.errors import BudgetError, SettingError, SiteError, did_you_mean
from secateur.graph import removals
from secateur.method import Budget, check_sparsity
from secateur.outcome import count_flops
from secateur.site import Part, Site, Unit, tensors
from secateur.task import Batch

UNITS: tuple[Unit, ...] = get_args(Unit)
"""What a sparsity may be a fraction of."""

Counts = Mapping[str, int]
"""Site name -> units to keep."""

ROUNDS = 5
"""How often what is priced is corrected by what a trial shows."""


def every_layer(sites: Sequence[Site], sparsity: float) -> dict[str, int]:
    """The same fraction of the units of each site, of which one stays."""
    return {site.name: max(1, kept_of(site.units, sparsity)) for site in sites}


class Asking(Protocol):
    """A method whose cut can be asked for in any unit and held to some widths."""

    @property
    def sparsity(self) -> float:
        """The fraction removed."""
        ...

    @property
    def of(self) -> str:
        """What it is a fraction of."""
        ...

    @property
    def round_to(self) -> int:
        """What widths are multiples of."""
        ...

    @property
    def uniform(self) -> bool:
        """Whether sites of one kind and size get one width."""
        ...

    @property
    def protect(self) -> tuple[str, ...]:
        """Sites or tensors left alone, by name."""
        ...


@dataclass(frozen=True)
class Met:
    """How many units stay at each site, and what was reached by that."""

    counts: dict[str, int]
    asked: float  # sparsity
    reached: float  # the same fraction of what is left, as priced, or as tried where that was needed
    step: float  # what the widest step of one site is of the whole: what is asked can be met to within half of it
    of: Unit
    notes: tuple[str, ...] = ()
    prices: tuple[Priced, ...] = ()  # of each layer, where time is what was asked for

    @property
    def words(self) -> str:
        """What was asked and, where it is not of units, what was reached: `0.3 of the flops (0.2987 reached)`."""
        if self.of in ("units", "weights"):
            return f"{self.asked:g}"
        return f"{self.asked:g} of the {self.of} ({self.reached:.4f} reached)"


@dataclass(frozen=True)
class Terms:
    """What is asked of a cut."""

    sparsity: float
    of: Unit = "weights"
    native: Unit | None = None  # in what the method's allocation spends: asked for that, it has the word
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # sites of one kind and size get one width
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name or glob
    least: int = 1  # units that stay at each site

    @property
    def budget(self) -> Budget:
        """The fraction, and what it is of."""
        return Budget(self.sparsity, of=self.of)

    def check(self) -> None:
        """Raise SettingError for terms that no network could meet."""
        check_sparsity(self.sparsity)
        if self.of not in UNITS:
            raise SettingError(
                f"a sparsity of {self.of!r} was asked for", "there is no such unit", did_you_mean(self.of, UNITS)
            )
        if self.round_to < 1:
            raise SettingError(
                f"widths in multiples of {self.round_to} were asked for", "a multiple is 1 at least", "Give 8 or 16."
            )

    def free(self, model: nn.Module, sites: Sequence[Site]) -> list[Site]:
        """The sites that are not protected. Raises SiteError for a pattern that nothing has, or that leaves no site."""
        named = tensors(model) if self.protect else {}
        names = {*named, *(name for name, _ in model.named_modules()), *(site.name for site in sites)}
        for glob in self.protect:
            if not any(fnmatchcase(name, glob) for name in names):
                raise SiteError(
                    f"{glob!r} was to be protected",
                    "no site, module or tensor has such a name",
                    did_you_mean(glob, {site.name for site in sites}),
                )
        found = [site for site in sites if not self.protects(site)]
        if not found and sites:
            raise SiteError(
                f"{', '.join(self.protect)} were to be protected",
                f"nothing is left of {len(sites)} sites that could be cut",
                "Protect fewer.",
            )
        return found

    def protects(self, site: Site) -> bool:
        """Whether a site, or a tensor of it, is to be left alone."""
        names = (site.name, *(part.name for part in site.parts))
        return any(fnmatchcase(name, glob) for glob in self.protect for name in names)

    def left_alone(self, sites: Sequence[Site]) -> list[str]:
        """A note for each site that is protected."""
        return [f"left alone: {site.name}" for site in sites if self.protects(site)]

    def multiples(self, sites: Sequence[Site], own: Mapping[str, int]) -> dict[str, int]:
        """What each site's width must be a multiple of, given what the network itself wants."""
        return {site.name: lcm(self.round_to, own.get(site.name, 1)) for site in sites}

    def shaped(self, sites: Sequence[Site], wanted: Counts, multiples: Mapping[str, int]) -> dict[str, int]:
        """Counts made equal among sites alike where that was asked, and multiples; `least` at least."""
        found = dict(wanted)
        for names in self.alike(sites):
            found.update(dict.fromkeys(names, round(sum(found[name] for name in names) / len(names))))
        for site in sites:
            if (of := multiples.get(site.name, 1)) > 1 and found[site.name] < site.units:
                found[site.name] = min(site.units, max(round(found[site.name] / of) * of, of))
            found[site.name] = min(site.units, max(self.least, found[site.name]))
        return found

    def alike(self, sites: Sequence[Site]) -> list[list[str]]:
        """Names of the sites that move together: those of one kind and size where one width was asked, else each."""
        found: dict[object, list[str]] = {}
        for site in sites:
            found.setdefault((site.kind, site.units) if self.uniform else site.name, []).append(site.name)
        return list(found.values())

    def counts(
        self,
        model: nn.Module,
        example: Batch,
        sites: Sequence[Site],
        own: Mapping[str, int],
        spread: Callable[[float], Counts],
    ) -> Met:
        """Units to keep at each site so that what is asked goes.

        `spread` is the method's allocation: what it keeps at a sparsity in its native unit. `own` are multiples that
        the network wants. Raises BudgetError where too little can go.
        """
        multiples = self.multiples(sites, own)
        measure = measured_in(self.of, model, example, sites)
        step = _step(self.alike(sites), sites, multiples, measure)
        if self.of == self.native:
            spent = spread(self.sparsity)
            found = {site.name: min(site.units, max(self.least, spent[site.name])) for site in sites}
            if self.shaped(sites, found, multiples) == found:
                return Met(found, self.sparsity, measure.gone(found) / measure.whole, step, self.of)

        def at(sparsity: float) -> dict[str, int]:
            return self.shaped(sites, spread(sparsity), multiples)

        wanted = self.sparsity * measure.whole
        aim, best, notes = wanted, dict[str, int](), list[str]()
        seen: dict[tuple[int, ...], float] = {}
        for _ in range(ROUNDS):
            found = self._nearest(at, sites, multiples, measure, aim)
            key = tuple(found.values())
            if key in seen:
                break
            tried = measure.tried(found)
            seen[key] = measure.gone(found) if tried is None else tried
            if not best or abs(seen[key] - wanted) < abs(seen[tuple(best.values())] - wanted):
                best = found
            if tried is None or abs(tried - wanted) <= measure.close:
                break
            aim = max(0.0, aim + wanted - tried)  # what is not priced, such as attention's own products, goes as well
        real = seen[tuple(best.values())]
        if self.of != self.native:
            notes.append(f"{self.sparsity:g} of the {self.of} asked for, {real / measure.whole:.4f} reached")
        notes += [
            f"{site.name} keeps {best[site.name]} of {site.units} to make a multiple of {multiples[site.name]}"
            for site in sites
            if multiples[site.name] > 1 and best[site.name] < site.units
        ]
        prices = measure.priced(best)
        return Met(best, self.sparsity, real / measure.whole, step, self.of, tuple(notes), prices)

    def _nearest(
        self,
        at: Callable[[float], dict[str, int]],
        sites: Sequence[Site],
        multiples: Mapping[str, int],
        measure: "Measure",
        wanted: float,
    ) -> dict[str, int]:
        """Counts of which what goes is nearest to what is wanted, between two that the allocation gives in turn."""
        low, high = 0.0, 1 - 1e-9
        less, more, why = at(low), None, None
        for turn in range(42):
            middle = (low + high) / 2 if turn else high
            try:
                found = at(middle)
            except BudgetError as error:  # more than the allocation can give
                high, why = middle, error
                continue
            if measure.gone(found) < wanted * (1 - 1e-9):
                low, less = middle, found
                if not turn:
                    break
            else:
                high, more = middle, found
        if more is None:
            most = measure.gone(less)
            if most >= wanted * (1 - 1e-9):
                return less
            where = "the one site" if len(sites) == 1 else f"each of {len(sites)} sites"
            many = f"{'one unit' if self.least == 1 else f'{self.least} units'} left at {where}"
            left = many if why is None else "what the allocation spares"
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} of the {self.of} was asked for",
                f"{most / measure.whole:.4g} can be reached with {left}",
                "Ask for less, protect fewer sites, or add kinds." if why is None else why.do,
            )
        best = less
        for names in sorted(self.alike(sites), key=lambda names: less[names[0]] - more[names[0]], reverse=True):
            moved = best | {name: more[name] for name in names}
            if abs(measure.gone(moved) - wanted) <= abs(measure.gone(best) - wanted):
                best = moved
        return self._refined(best, sites, multiples, measure, wanted) if self.uniform or self.round_to > 1 else best

    def _refined(
        self,
        counts: dict[str, int],
        sites: Sequence[Site],
        multiples: Mapping[str, int],
        measure: "Measure",
        wanted: float,
    ) -> dict[str, int]:
        """Counts nearer to what is wanted, where widths that move together leave a gap: narrow ones make up for it."""
        units, best = {site.name: site.units for site in sites}, counts
        for _ in range(sum(units.values())):
            off = measure.gone(best) - wanted
            moves = []
            for names in self.alike(sites):
                by = multiples[names[0]] if off > 0 else -multiples[names[0]]
                if all(max(1, self.least) <= best[name] + by <= units[name] for name in names):
                    moved = best | {name: best[name] + by for name in names}
                    moves.append((abs(measure.gone(moved) - wanted), moved))
            nearest = min(moves, key=lambda move: move[0], default=None)
            if nearest is None or nearest[0] >= abs(off) * (1 - 1e-9):
                break
            best = nearest[1]
        return best


def terms(asking: Asking, native: Unit | None = None, least: int = 1) -> Terms:
    """What a method's settings ask of a cut; `native` is the unit in which its allocation spends, if it meets any."""
    return Terms(
        asking.sparsity,
        cast(Unit, asking.of),  # looked at by Terms.check
        native,
        asking.round_to,
        asking.uniform,
        asking.protect,
        least,
    )


# What goes, in each unit


class Measure(Protocol):
    """What goes with the units that do not stay."""

    @property
    def whole(self) -> float:
        """What a sparsity is a fraction of."""
        ...

    @property
    def close(self) -> float:
        """How far from what is wanted a trial may be."""
        ...

    def gone(self, counts: Counts) -> float:
        """What goes, as priced."""
        ...

    def tried(self, counts: Counts) -> float | None:
        """What goes from the network itself, cut and looked at; None where the price is exact."""
        ...

    def priced(self, counts: Counts) -> tuple[Priced, ...]:
        """What each layer takes now and would take, where that was measured."""
        ...


class Shapes:
    """The shapes of all tensors that sites touch, at any widths: as if the first units of each site stayed."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self.parts: dict[str, Part] = {}
        self._cuts: dict[str, list[tuple[int, str, list[int]]]] = {}  # axis, site, entries gone at 0, 1, ... units
        for site in sites:
            for part in site.parts:
                assert part.axis is not None and part.owner is not None, "coupled units are along one axis"
                self.parts.setdefault(part.key, part)
                owner = part.owner.reshape(-1)
                each = torch.bincount(owner[owner >= 0], minlength=site.units)
                total = int(each.sum())
                gone = [total, *(total - each.cumsum(0)).tolist()]
                self._cuts.setdefault(part.key, []).append((part.axis, site.name, gone))

    @property
    def cuts(self) -> dict[str, set[int]]:
        """Along which sides each tensor can be cut."""
        return {key: {axis for axis, _, _ in cuts} for key, cuts in self._cuts.items()}

    def of(self, key: str, counts: Counts) -> tuple[int, ...]:
        """The shape of one tensor, outputs first; () for one that no site touches."""
        if key not in self.parts:
            return ()
        size = list(self.parts[key].shape)
        for axis, name, gone in self._cuts[key]:
            if name in counts:
                size[axis] -= gone[counts[name]]
        return tuple(size)


class Linear:
    """So much for each element that is left, of weights, bytes, or the multiply-adds and adds it takes part in."""

    def __init__(self, sites: Sequence[Site], each: Callable[[Part], float], whole: float | None = None) -> None:
        self._shapes = Shapes(sites)
        self._each = {key: worth for key, part in self._shapes.parts.items() if (worth := each(part))}
        self._held = sum(prod(self._shapes.parts[key].shape) * worth for key, worth in self._each.items())
        self.whole = self._held if whole is None else whole
        self.close = 0.0

    def gone(self, counts: Counts) -> float:
        """See Measure."""
        return self._held - sum(prod(self._shapes.of(key, counts)) * worth for key, worth in self._each.items())

    def tried(self, counts: Counts) -> None:
        """See Measure: nothing is left out."""
        return

    def priced(self, counts: Counts) -> tuple[Priced, ...]:
        """See Measure."""
        return ()


class Units:
    """One for each unit."""

    def __init__(self, sites: Sequence[Site]) -> None:
        self._units = {site.name: site.units for site in sites}
        self.whole, self.close = float(sum(self._units.values())), 0.0

    def gone(self, counts: Counts) -> float:
        """See Measure."""
        return float(sum(units - counts[name] for name, units in self._units.items()))

    def tried(self, counts: Counts) -> None:
        """See Measure: nothing is left out."""
        return

    def priced(self, counts: Counts) -> tuple[Priced, ...]:
        """See Measure."""
        return ()


class Work:
    """Multiply-adds and adds of the whole network, for an example.

    Those of matrices and kernels are priced; where heads go, attention's own products go as well, and are counted on
    a copy that is cut.
    """

    def __init__(self, model: nn.Module, example: Batch, sites: Sequence[Site]) -> None:
        self._priced = Linear(sites, lambda part: 2 * part.uses)
        self._model, self._example, self._sites = model, example, sites
        total = count_flops(model, example)
        self.whole = self._priced.whole if total is None else total / example.size
        self.close = 1e-4 * self.whole
        self._counted = total is not None and any(site.kind == "head" for site in sites)

    def gone(self, counts: Counts) -> float:
        """See Measure."""
        return self._priced.gone(counts)

    def tried(self, counts: Counts) -> float | None:
        """See Measure."""
        if not self._counted:
            return None
        left = count_flops(trial(self._model, self._sites, counts), self._example)
        return None if left is None else self.whole - left / self._example.size

    def priced(self, counts: Counts) -> tuple[Priced, ...]:
        """See Measure."""
        return ()


def trial(model: nn.Module, sites: Sequence[Site], counts: Counts) -> nn.Module:
    """A copy with so many units at each site, the first ones: as large and as fast as any other choice."""
    work = copy.deepcopy(model)
    apply_(work, removals(sites, {site.name: torch.arange(site.units) < counts[site.name] for site in sites}))
    return work


def measured_in(of: Unit, model: nn.Module, example: Batch, sites: Sequence[Site]) -> Measure:
    """What a sparsity of some unit counts."""
    if of == "units":
        return Units(sites)
    if of == "flops":
        return Work(model, example, sites)
    if of == "latency":
        shapes = Shapes(sites)
        return Latency(model, example, shapes.of, shapes.cuts, lambda counts: trial(model, sites, counts))
    if of == "bytes":
        return Linear(sites, lambda p: float(p.itemsize), _bytes(model))
    learnt, named = {id(p) for p in model.parameters()}, tensors(model)
    total = None if of == "weights" else float(sum(p.numel() for p in model.parameters()))
    return Linear(sites, lambda p: float(id(named[p.name]) in learnt), total)  # statistics of norms are no weights


def _bytes(model: nn.Module) -> float:
    return float(sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()]))


def _step(
    alike: Sequence[Sequence[str]], sites: Sequence[Site], multiples: Mapping[str, int], measure: Measure
) -> float:
    """The most that one step of one width takes, as a fraction of the whole."""
    full = {site.name: site.units for site in sites}
    found = 0.0
    for names in alike:
        less = full | {name: max(0, full[name] - multiples[name]) for name in names}
        found = max(found, measure.gone(less) / measure.whole)
    return found


__all__ = ["UNITS", "Asking", "Measure", "Met", "Shapes", "Terms", "every_layer", "measured_in", "terms", "trial"]
