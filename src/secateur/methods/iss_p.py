"""Shrink the smallest weights a little after every step, ranked anew each time; only later fix them and cut.

Wang, Wang, Zhang, Fu, Tao. "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution." ICCV 2023.
arXiv:2303.09650, section 3 and algorithm 1. Training starts from random weights, all of them live. After each of the
first K_p optimizer steps, in every layer l of n_l weights,

    P_l = the r n_l smallest |W_l|,    W_l[P_l] <- alpha W_l[P_l]

so that a weight with a persistent gradient climbs back out of P_l. Then the masks are fixed, P_l is zeroed, and the
rest is trained on. alpha = 0 is iterative hard thresholding; a penalty that grows on P_l instead is the paper's ISS-R;
ranked once it is the regularisation of ASSL and SRP; without a stage before the cut (until=0) it is plain L1-norm
pruning, of random weights or of those of a dense network.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Magnitude, Pattern, PerMatrix, Uniform
from secateur.axes.patterns import check_pattern, keep_top
from secateur.axes.rules import Hold, LearningRate, sparsity_of
from secateur.axes.schedules import Cosine, Curve, Jump, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import PatternError, SettingError
from secateur.evidence import Evidence
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import Loop, Rule, fit


@runtime_checkable
class Softening(Protocol):
    """What weights that are to go feel before they are cut."""

    @property
    def factor(self) -> float:
        """What they are multiplied by after each step."""
        ...

    @property
    def pull(self) -> float:
        """How strong a penalty |pull W|^2 / 2 becomes on a weight that is to go all the while; it grows evenly."""
        ...


@dataclass(frozen=True)
class Shrinkage:
    """Multiplied after every step; 0: iterative hard thresholding (Blumensath and Davies 2009)."""

    factor: float = 0.95  # alpha
    pull: ClassVar[float] = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.factor < 1:
            raise SettingError(
                f"shrinking by a factor of {self.factor:g} was asked for", "it is in [0, 1)", "Give 0.95."
            )


@dataclass(frozen=True)
class GrowingPenalty:
    """Pulled to zero through the gradient, the harder the longer (Wang, Qin, Zhang, Fu 2021, arXiv:2012.09243)."""

    pull: float = 0.5  # in the end, on a weight that was chosen all the while; the authors stop there
    factor: ClassVar[float] = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.pull < float("inf"):
            raise SettingError(f"a penalty of {self.pull:g} was asked for", "it is above 0", "Give 0.5.")


@dataclass(frozen=True)
class FlatNM:
    """n kept of every m consecutive weights of the flattened tensor: groups run across kernel positions.

    What the authors' code does; no hardware multiplies it. NM is along input channels.
    """

    n: int = 2
    m: int = 4

    def __post_init__(self) -> None:
        if not 0 < self.n <= self.m:
            raise PatternError(f"{self.n} of {self.m} were asked for", "n of m needs 0 < n <= m", "Give 2 of 4, say.")

    @property
    def span(self) -> int:
        """A group is decided together."""
        return self.m

    @property
    def fixed(self) -> float:
        """1 - n/m."""
        return 1 - self.n / self.m

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        if keep != self.nearest(tuple(score.shape), keep):
            raise PatternError(
                f"{keep} of {score.numel()} units were to be kept, {self.n} of every {self.m}",
                f"that is {score.numel() * self.n // self.m}",
                f"Ask for a sparsity of {self.fixed:g}.",
            )
        allowed = None if within is None else within.reshape(-1, self.m)
        return keep_top(score.reshape(-1, self.m), self.n, allowed).reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """n/m of all, whatever was asked."""
        units = torch.Size(shape).numel()
        if units % self.m:
            raise PatternError(
                f"{self.n} of every {self.m} weights were to be kept",
                f"the shape {list(shape)} holds {units}, which is no multiple",
                "Leave the site out with exclude, or use other numbers.",
            )
        return units // self.m * self.n


@dataclass(frozen=True)
class Late:
    """Nothing until a moment, then another curve over what is left."""

    begin: float = 0.5
    curve: Curve = Cosine()

    def __post_init__(self) -> None:
        if not 0 <= self.begin <= 1:
            raise SettingError(
                f"a curve that begins at {self.begin:g} was asked for", "it is a fraction of training", "Give 0.5."
            )

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return 0.0 if u <= self.begin else self.curve((u - self.begin) / (1 - self.begin))


class SoftShrink(Rule):
    """Softens what is to go after every step, ranked anew, and cuts it at the schedule's end.

    Until then no weight is masked and every gradient is whole; the optimizer is told nothing, so that a weight that
    it keeps pushing returns. After it the masks are held (`hold`). Curves: "churn", the fraction of what is to go
    that was not to go `watch` steps before; "mass", its share of all |W|; "sparsity" from the cut on.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        sparsity: float,
        until: float = 0.5,
        softening: Softening | None = None,
        allocation: Allocation | None = None,
        pattern: Pattern | None = None,
        every: int = 1,
        watch: int = 100,
    ) -> None:
        if every < 0 or watch < 1:
            raise SettingError(
                f"ranking every {every} steps, watched every {watch}, was asked for",
                "steps are whole: 0 or more, and 1 or more",
                "Give every=1, or every=0 to rank once, before the first step.",
            )
        self.cut = Schedule(start=0.0, end=sparsity, begin=until, until=until, curve=Jump())
        self.cut.check_sparsity()
        self.sites, self.sparsity = list(sites), sparsity
        self.softening: Softening = Shrinkage() if softening is None else softening
        self.allocation: Allocation = Uniform() if allocation is None else allocation
        self.pattern: Pattern = PerMatrix() if pattern is None else pattern
        self.every, self.watch = every, watch
        self.hold = Hold(self.sites)
        self.keep: dict[str, Tensor] = {}  # what is not to go, as last ranked
        self.pressure: dict[str, Tensor] = {}  # the strength of each unit's penalty
        self._past: dict[str, Tensor] = {}
        self.frozen = False
        self.mass = 0.0  # share of all |W| that the cut took

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.hold.masks()

    def start(self, loop: Loop) -> None:
        """Rank once."""
        if (late := self.cut.late()) is not None:
            loop.note(late)
        self.hold.start(loop)
        self.keep = self.rank(loop)
        self._past = self.keep
        if self.softening.pull:
            self.pressure = {site.name: torch.zeros(site.shape) for site in self.sites}

    def rank(self, loop: Loop) -> dict[str, Tensor]:
        """Exactly as many as asked of each site by magnitude, as the weights are now: True stays."""
        named = loop.tensors
        scores = {site.name: Magnitude().score(site, named, Evidence()) for site in self.sites}
        counts = self.allocation.spread(self.sites, Budget(self.sparsity), scores)
        return {
            site.name: self.pattern.select(
                scores[site.name], self.pattern.nearest(tuple(site.shape), counts[site.name])
            ).cpu()
            for site in self.sites
        }

    def before_forward(self, loop: Loop) -> None:
        """Cut, when it is time."""
        if not self.frozen and loop.step >= self.cut.window(loop.steps)[1]:
            self.freeze(loop)

    def before_step(self, loop: Loop) -> None:
        """Add the penalty's gradient; after the cut, mask it."""
        if self.frozen:
            self.hold.before_step(loop)
            return
        for name, pressure in self.pressure.items():
            self._each(loop, name, pressure, _pulled)

    def after_step(self, loop: Loop) -> None:
        """Rank the weights as they are stored now, and shrink those that are to go."""
        if self.frozen:
            self.hold.after_step(loop)
            return
        due = self.every > 0 and loop.step % self.every == 0
        if due:
            self.keep = self.rank(loop)
        if due or self.every == 0:
            times = max(self.every, 1)
            # ranked every few steps, a weight is shrunk for all of them at once
            for name, keep in self.keep.items():
                if self.softening.factor < 1:
                    self._each(loop, name, torch.where(keep, 1.0, self.softening.factor**times), _scaled)
                if self.softening.pull:
                    grown = self.softening.pull * times / max(self.cut.window(loop.steps)[1], 1)
                    self.pressure[name] += grown * ~keep
        if loop.step % self.watch == 0:
            self._look(loop)

    def _look(self, loop: Loop) -> None:
        gone = sum(int((~keep).sum()) for keep in self.keep.values())
        fresh = sum(int((~keep & self._past[name]).sum()) for name, keep in self.keep.items())
        loop.log("churn", fresh / gone if gone else 0.0)
        loop.log("mass", self._mass(loop))
        self._past = self.keep

    def _mass(self, loop: Loop) -> float:
        """The share of all |W| that lies in what is to go."""
        named, total, mine = loop.tensors, 0.0, 0.0
        for site in self.sites:
            size = site.gather({part.name: named[part.name].detach().abs() for part in site.parts}).double().cpu()
            total, mine = total + float(size.sum()), mine + float(size[~self.keep[site.name]].sum())
        return mine / total if total else 0.0

    def _each(self, loop: Loop, name: str, units: Tensor, change: Any) -> None:
        """Change every part of a site, given one value per unit."""
        named = loop.tensors
        site = next(site for site in self.sites if site.name == name)
        spread = site.expand(units, nobody=1.0 if change is _scaled else 0.0)
        for part in site.parts:
            change(part, named[part.name], spread[part.key])

    def freeze(self, loop: Loop) -> None:
        """Fix the masks by an exact ranking, zero what goes, and hold it from here on."""
        if self.every:
            self.keep = self.rank(loop)
        self.mass, self.frozen = self._mass(loop), True
        loop.log("mass", self.mass)
        self.hold.change(loop, self.keep)
        loop.log("sparsity", sparsity_of(self.keep))
        if self.mass > 0.01 and self.cut.until > 0:
            loop.note(
                f"the cut took {self.mass:.1%} of all weights' size, more than the 1 % that passes unnoticed: shrink "
                "for longer, or by a smaller factor (under Adam such weights rest near rate / (1 - factor))"
            )

    def finish(self, loop: Loop) -> None:
        """The cut, where it was to come with the last step; a remark when training stopped before it."""
        last = self.cut.window(loop.steps)[1]
        if not self.frozen and loop.step == last:
            self.freeze(loop)
        if not self.frozen:
            loop.note(
                f"training stopped after {loop.step} of {loop.steps} steps, before the cut at {last}: nothing is masked"
            )

    def state(self) -> dict[str, Any]:
        """What is to go, the penalties, and the masks once they are there."""
        return {
            "keep": dict(self.keep),
            "past": dict(self._past),
            "pressure": {name: value.clone() for name, value in self.pressure.items()},
            "frozen": self.frozen,
            "mass": self.mass,
            "hold": self.hold.state(),
        }

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.keep, self._past = dict(state["keep"]), dict(state["past"])
        self.pressure = dict(state["pressure"])
        self.frozen, self.mass = bool(state["frozen"]), float(state["mass"])
        self.hold.resume(loop, state["hold"])


def _scaled(part: Any, tensor: Tensor, factor: Tensor) -> None:
    value = part.view(tensor.detach())
    value.mul_(factor.to(value))


def _pulled(part: Any, tensor: Tensor, pressure: Tensor) -> None:
    if tensor.grad is not None:
        value = part.view(tensor.detach())
        part.view(tensor.grad).add_(pressure.to(value) * value)


@dataclass(frozen=True, kw_only=True)
class IssP(Method):
    """Train from random weights, shrinking the smallest softly, until the masks are fixed and trained on."""

    sparsity: float = 0.9  # of each layer, from the cut on: r
    softening: Softening = Shrinkage()  # shrinkage(factor=0) is hard thresholding; growing-penalty() is ISS-R
    until: float = 0.5  # fraction of training before the cut; 0: cut before the first step, by magnitude
    every: int = 1  # optimizer steps between rankings; 0: ranked once, before the first step (ASSL, SRP)
    steady: float = 0.5  # fraction of training at a constant learning rate, before its cosine
    rate_floor: float = 0.0  # learning rate at the end of the cosine, as a fraction of that at the start
    steps: int = 1000  # of training in all: K_p + K_FT
    watch: int = 100  # optimizer steps between looks at how much of the choice has changed
    allocation: Allocation = Uniform()
    pattern: Pattern = PerMatrix()
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        14,
        "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution",
        arxiv="2303.09650",
        venue="ICCV",
        year=2023,
        when="during training",
        needs=("labels", "training"),
        axes="softening allocation pattern rule",
        criterion=("magnitude",),
        tasks=("super-resolution",),
        stage=("score or mask",),
        schedule=("custom",),
        retraining=("finetune",),
        models=("SR",),
        reports="ahead of one-shot L1 from random and from pretrained weights, of ASSL and of SRP at 90 to 99 % in "
        "EDSR, SwinIR and CAT, without a dense network to start from",
        checked="tests/methods/test_iss_p.py::test_shrinking_softly_beats_a_mask_of_random_weights",
        differs=(
            "the number of steps before the cut is a setting; in the authors' code a counter of regularisation, not "
            "otherwise used, comes to it after some 100,000",
            "counts are exact and without a cap; the code cuts at most 99.5 % of a layer, and its fast version samples "
            "a threshold",
            "n:m runs along input channels; flat-nm is the code's, along the flattened tensor, and sizes that it does "
            "not divide are refused rather than given other numbers",
            "excluded layers are left alone with n:m too; the code prunes them",
            "the optimizer forgets weights at the cut, so that they stay zero; before it nothing is reset",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 40, "watch": 10}

    def check(self) -> None:
        """Raise SettingError for fractions that cannot be, or no training."""
        self.budget()
        if self.sparsity == 0:
            raise SettingError(
                "weights were to be shrunk with a sparsity of 0", "none would be chosen", "Give a fraction such as 0.9."
            )
        check_pattern(self.pattern, self.sparsity)
        self._rule([])
        LearningRate(Late(self.steady), floor=self.rate_floor)
        if self.steps < 1:
            raise SettingError(
                f"sparse training of {self.steps} steps was asked for", "it needs one at least", "Give steps above 0."
            )

    def _rule(self, sites: Sequence[Site]) -> SoftShrink:
        return SoftShrink(
            sites,
            self.sparsity,
            self.until,
            softening=self.softening,
            allocation=self.allocation,
            pattern=self.pattern,
            every=self.every,
            watch=self.watch,
        )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Shrink, cut, and train on; the masks are the edits."""
        self.check()
        rule = self._rule(weights(model, self.include, self.exclude))
        rate = LearningRate(Late(self.steady), floor=self.rate_floor)
        history = fit(model, task, self.steps, [rate, rule])
        steps = rule.cut.window(self.steps)[1]
        notes = [f"cut after {steps:,} of {self.steps:,} steps, {rule.mass:.2%} of all weights' size"]
        return Outcome(model, apply_(model, rule.masks()), history, notes=notes + history.notes)
