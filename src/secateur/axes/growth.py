"""Weights that leave and others that come while training goes on, as many as a schedule says.

One rule, `Rewire`, and its parts:

    who leaves   Smallest          the smallest in size
                 NearestZero       the smallest of each sign                       (SET)
    who comes    AtRandom          by chance                                       (SET)
                 Steepest          where the loss is steepest along a weight of 0  (RigL, GraNet)
                 Steepest(0.9)     the same over the last batches                  (SNFS)
    how they     Cleared           nothing is remembered of them
    start        Typical           the same, but the scale of their steps is that of their layer
    how many     `exchange`, a falling or constant schedule; `ramp`, the sparsity where it is to rise

A weight that comes starts at zero. Between updates the masked weights are zero to the bit, and the optimizer knows
nothing of them. The gradient is that of the weight as the forward pass sees it, so that masked ones have it too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.allocations import Allocation, Global, among
from secateur.axes.criteria import Magnitude, Random
from secateur.axes.patterns import PerMatrix, keep_top
from secateur.axes.rules import Hold, everything, sparsity_of
from secateur.axes.schedules import Schedule
from secateur.edit import Mask
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import Evidence
from secateur.method import Budget
from secateur.site import Part, Site, Tensors
from secateur.task import stream
from secateur.train import Loop, Rule


def random_masks(sites: Sequence[Site], counts: Mapping[str, int], seed: int) -> dict[str, Tensor]:
    """Masks that keep so many units of each site, anywhere: site name -> bool [*site.shape]."""
    score = {site.name: Random(seed).score(site, {}, Evidence()) for site in sites}
    return {site.name: PerMatrix().select(score[site.name], counts[site.name]) for site in sites}


@runtime_checkable
class Leaving(Protocol):
    """Which of the units that are there go."""

    def leave(self, site: Site, named: Tensors, active: Tensor, count: int) -> Tensor:
        """Bool [*site.shape], True for exactly `count` units, all of them active."""
        ...


@dataclass(frozen=True)
class Smallest:
    """The smallest in size go."""

    def leave(self, site: Site, named: Tensors, active: Tensor, count: int) -> Tensor:
        """See Leaving; of equals, the first."""
        score = -Magnitude().score(site, named, Evidence())
        return _most(score, count, active)


@dataclass(frozen=True)
class NearestZero:
    """The smallest positive and the largest negative go, as many of each sign as there are more of it.

    Mocanu et al. 2018, arXiv:1707.04780, algorithm 1. A unit's sign is that of its weights' sum; zeros count as
    positive.
    """

    def leave(self, site: Site, named: Tensors, active: Tensor, count: int) -> Tensor:
        """See Leaving."""
        value = site.gather({part.name: named[part.name].detach() for part in site.parts})
        positive, negative = active & (value >= 0), active & (value < 0)
        total, plus = int(active.sum()), int(positive.sum())
        of_plus = min(max(round(count * plus / total) if total else 0, count - (total - plus)), plus)
        return _most(-value, of_plus, positive) | _most(value, count - of_plus, negative)


@runtime_checkable
class Coming(Protocol):
    """Which of the units that are not there come."""

    @property
    def memory(self) -> float | None:
        """How much of the running mean of gradients stays at each step; None: gradients are not looked at."""
        ...

    def score(self, site: Site, slope: Tensor | None, draw: torch.Generator) -> Tensor:
        """One score per unit [*site.shape], the highest come. `slope` is the gradient's size."""
        ...


@dataclass(frozen=True)
class AtRandom:
    """Any may come. Mocanu et al. 2018, arXiv:1707.04780."""

    memory: ClassVar[None] = None

    def score(self, site: Site, slope: Tensor | None, draw: torch.Generator) -> Tensor:
        """Uniform in [0, 1)."""
        return torch.rand(site.shape, generator=draw)


@dataclass(frozen=True)
class Steepest:
    """Those come whose gradient is the largest in size.

    Evci et al. 2020, arXiv:1911.11134, section 3: the gradient of the present batch, at a weight of zero. With a
    memory, the running mean over steps: Dettmers and Zettlemoyer 2019, arXiv:1907.04840.
    """

    memory: float = 0.0  # how much of the running mean stays at each step; 0: the present batch alone

    def __post_init__(self) -> None:
        if not 0 <= self.memory < 1:
            raise SettingError(f"a memory of {self.memory:g} was asked for", "it is in [0, 1)", "Give 0, or 0.9.")

    def score(self, site: Site, slope: Tensor | None, draw: torch.Generator) -> Tensor:
        """The gradient's size, summed over what a unit owns."""
        assert slope is not None
        return slope


@runtime_checkable
class Moments(Protocol):
    """What the optimizer is told of units that come."""

    def settle(self, loop: Loop, part: Part, fresh: Tensor, there: Tensor) -> None:
        """`fresh` and `there` are True at elements of the part that come, and that were there before."""
        ...


@dataclass(frozen=True)
class Cleared:
    """Nothing: momentum and second moments start at zero, as in RigL's code."""

    def settle(self, loop: Loop, part: Part, fresh: Tensor, there: Tensor) -> None:
        """They are zero already: masked weights have none."""


@dataclass(frozen=True)
class Typical:
    """Momentum starts at zero, second moments at the mean of the layer.

    Adam and its like divide by the root of a mean of squares, whose start they correct for by the number of steps of
    the whole run: of a new weight with no squares yet the first step would be many times the learning rate.
    """

    SECOND: ClassVar[frozenset[str]] = frozenset({"exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta"})

    def settle(self, loop: Loop, part: Part, fresh: Tensor, there: Tensor) -> None:
        """Write the mean over those that were there."""
        state = loop.optimizer.state.get(loop.tensors[part.name], {})
        for name in self.SECOND & state.keys():
            seen = part.view(state[name])
            if bool(there.any()):
                seen.masked_fill_(fresh, float(seen[there].mean()))


def _most(score: Tensor, count: int, within: Tensor) -> Tensor:
    """The `count` highest among those allowed, exactly: what is not allowed can never win a tie."""
    return keep_top(score.reshape(-1), count, within.reshape(-1).to(score.device)).reshape(score.shape)


class Rewire(Rule):
    """Remove and grow at regular steps: sparse training whose masks move.

    At an update, where the `ramp` is due, the sparsity rises to what it says, spread by the `allocation` over the
    sizes of the weights there; where the `exchange` is due, each site loses that fraction of its units and grows as
    many, chosen among all that are not there, those just gone included. One that goes and comes in one update keeps
    its value. Counts are exact after each update. The last step is no time to exchange: what came would stay zero.

    `instead`: on a step that exchanges, the weights stay where they are (RigL); otherwise they move first, and then
    the masks (SET, GraNet). Give the task's seed. Under data parallelism the gradients are those of all processes, and
    so are the masks. Gradients may be clipped by their norm before it, not value by value.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        keep: Mapping[str, Tensor],
        exchange: Schedule,
        *,
        ramp: Schedule | None = None,
        leaving: Leaving | None = None,
        coming: Coming | None = None,
        moments: Moments | None = None,
        allocation: Allocation | None = None,
        whole: Callable[[float], int] = ceil,
        instead: bool = False,
        seed: int = 0,
    ) -> None:
        for value in (exchange.start, exchange.end):
            if not 0 <= value <= 1:
                raise SettingError(
                    f"a fraction of {value:g} was to be exchanged", "it is a part of what is there", "Give 0 up to 1."
                )
        if ramp is not None:
            ramp.check_sparsity()
        self.sites, self.exchange, self.ramp = list(sites), exchange, ramp
        self.holder = Hold(self.sites, keep)
        self.leaving: Leaving = Smallest() if leaving is None else leaving
        self.coming: Coming = Steepest() if coming is None else coming
        self.moments: Moments = Typical() if moments is None else moments
        self.allocation: Allocation = Global() if allocation is None else allocation
        self.whole, self.instead, self.seed = whole, instead, seed
        self.ever = {name: k.clone() for name, k in self.holder.keep.items()}
        self._slopes: dict[str, Tensor] = {}
        self._first: dict[str, Tensor] | None = None
        self._spent, self._steps, self._share = 0.0, 0, 1 - sparsity_of(self.keep)

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks: site name -> bool."""
        return self.holder.keep

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.holder.masks()

    @property
    def explored(self) -> float:
        """The fraction of all units that were ever there."""
        return 1 - sparsity_of(self.ever)

    @property
    def spent(self) -> float:
        """The mean over steps of the fraction of units there: what training cost, against that of a dense network."""
        return self._spent / self._steps if self._steps else self._share

    def remarks(self) -> list[str]:
        """What training cost and how much it saw, in words."""
        return [
            f"{self.spent:.2%} of the weights were there in the mean over all steps, and {self.explored:.2%} at some "
            "time"
        ]

    def start(self, loop: Loop) -> None:
        """Zero what is masked. Raises SettingError for a weight that the optimizer does not have."""
        held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        for site in self.sites:
            for part in site.parts:
                if part.name in loop.tensors and id(loop.tensors[part.name]) not in held:
                    raise SettingError(
                        f"weights of {site.name} were to leave and come",
                        "the optimizer does not train it",
                        "Give it to the optimizer, unfrozen, or leave it out with exclude.",
                    )
        if self.ramp is not None and (late := self.ramp.late()) is not None:
            loop.note(late)
        if loop.step:  # a run taken up again: what it had grown by then is not to be zeroed by the masks it began with
            self._first, self.holder.keep = self.keep, everything(self.sites)
        self.holder.start(loop)
        if not loop.step and not sparsity_of(self.keep):
            loop.log("sparsity", 0.0)

    def before_forward(self, loop: Loop) -> None:
        """Weights that were put back without masks are given those the rule began with."""
        if self._first is not None:
            self.holder.change(loop, self._first)
            self._first = None

    def before_step(self, loop: Loop) -> None:
        """Look at the gradients while they are whole; then masked weights get none."""
        exchanges = self._exchanges(loop, loop.step + 1)
        if self.coming.memory is not None and (exchanges or self.coming.memory):
            self._look(loop, self.coming.memory)
        self.holder.before_step(loop)
        if exchanges and self.instead:
            for group in loop.optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # no gradient: every optimizer leaves the weight and its state alone

    def after_step(self, loop: Loop) -> None:
        """Masked weights are zero again; where an update is due, masks change."""
        self._spent += self._share
        self._steps += 1
        self.holder.after_step(loop)
        rises = self.ramp is not None and self.ramp.due(loop.step, loop.steps)
        exchanges = self._exchanges(loop, loop.step)
        if rises:
            assert self.ramp is not None
            self._raise(loop, self.ramp.value(loop.step, loop.steps))
        if exchanges:
            self._exchange(loop, self.exchange.value(loop.step, loop.steps))
        if rises or exchanges:
            self._share = 1 - sparsity_of(self.keep)
            loop.log("sparsity", sparsity_of(self.keep))
            loop.log("explored", self.explored)

    def finish(self, loop: Loop) -> None:
        """A remark when training stopped before the ramp's end."""
        if self.ramp is not None and loop.step < self.ramp.window(loop.steps)[1]:
            loop.note(
                f"training stopped after {loop.step} of {loop.steps} steps, before the ramp's end: the sparsity is "
                f"{sparsity_of(self.keep):.4g}, not {self.ramp.end:g}"
            )
        self.holder.finish(loop)
        self._slopes = {}

    def state(self) -> dict[str, Any]:
        """The masks, what was ever there, and the running means."""
        counts = {"spent": self._spent, "steps": self._steps}
        return {**self.holder.state(), "ever": dict(self.ever), "slopes": dict(self._slopes), **counts}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """All of it as it was."""
        self._first = None
        self.holder.resume(loop, state)
        self.ever, self._slopes = dict(state["ever"]), dict(state["slopes"])
        self._spent, self._steps, self._share = state["spent"], state["steps"], 1 - sparsity_of(self.keep)

    def _exchanges(self, loop: Loop, step: int) -> bool:
        due = step < loop.steps and self.exchange.due(step, loop.steps)
        return due and self.exchange.value(step, loop.steps) > 0

    def _look(self, loop: Loop, memory: float) -> None:
        """Note the gradient of every part, at masked weights too. Raises EvidenceError where it is not finite."""
        named = loop.tensors
        for site in self.sites:
            for part in site.parts:
                whole = named[part.name].grad
                seen = torch.zeros_like(part.view(named[part.name])) if whole is None else part.view(whole).detach()
                if not bool(torch.isfinite(seen).all()):
                    raise EvidenceError(
                        f"weights of {site.name} were to grow where the gradient is large, after {loop.step} steps",
                        "it holds NaN or infinity",
                        "Lower the learning rate, clip gradients by their norm, or look for NaN in the data.",
                    )
                old = self._slopes.get(part.key)
                fresh = seen if old is None else memory * old.to(seen.device) + (1 - memory) * seen
                self._slopes[part.key] = fresh.clone()

    def _slope(self, site: Site, named: Tensors) -> Tensor | None:
        """The size of the gradient per unit [*site.shape]; None where gradients are not looked at."""
        if self.coming.memory is None:
            return None
        whole: dict[str, Tensor] = {}
        for part in site.parts:
            if part.name not in whole:
                whole[part.name] = torch.zeros_like(named[part.name])
            part.view(whole[part.name]).copy_(self._slopes[part.key].abs())
        return site.gather(whole)

    def _raise(self, loop: Loop, sparsity: float) -> None:
        """Remove the smallest of what is there until the sparsity is what it should be."""
        named = loop.tensors
        scores = {}
        for site in self.sites:
            score = Magnitude().score(site, named, Evidence())
            scores[site.name] = score.masked_fill(~self.keep[site.name].to(score.device), -torch.inf)
        counts = self.allocation.spread(self.sites, Budget(sparsity), scores)
        if self.ramp is None or not self.ramp.falling:
            counts = among(counts, {name: int(keep.sum()) for name, keep in self.keep.items()})
        keep = {}
        for site in self.sites:
            if counts[site.name] == 0:
                loop.note(f"{site.name} keeps nothing from a sparsity of {sparsity:.3g} on; a floor prevents that")
            keep[site.name] = _most(scores[site.name], counts[site.name], self.keep[site.name])
        self.holder.change(loop, keep)

    def _exchange(self, loop: Loop, fraction: float) -> None:
        """In each site some leave, and as many come."""
        named, old, keep = loop.tensors, self.keep, {}
        for site in self.sites:
            there = old[site.name].to(named[site.parts[0].name].device)
            active = int(there.sum())
            count = min(self.whole(round(fraction * active, 9)), active)
            stay = there & ~self.leaving.leave(site, named, there, count)
            draw = stream(self.seed, f"growth/{loop.step}/{site.name}")
            score = self.coming.score(site, self._slope(site, named), draw).to(there.device)
            keep[site.name] = stay | _most(score, count, ~stay)
        self.holder.change(loop, keep)
        for site in self.sites:
            before = old[site.name].to(keep[site.name].device)
            self.ever[site.name] = self.ever[site.name].to(before.device) | keep[site.name]
            self._settle(loop, site, keep[site.name] & ~before, keep[site.name] & before)

    def _settle(self, loop: Loop, site: Site, fresh: Tensor, there: Tensor) -> None:
        for part in site.parts:
            new, same = (site.expand(units)[part.key].expand(part.shape) for units in (fresh, there))
            self.moments.settle(loop, part, new, same)
