"""N:M masks that are chosen anew after every step of training, and how a network grows into them.

Training has three phases, `Phases`: dense, then a `Decay`, then hard masks. A decay says at every step which pattern
the masks are of, and what is left of a masked weight in the forward pass:

    AtOnce               the pattern aimed at, and nothing: there is no second phase     (STE, SR-STE)
    MaskExponential      that pattern, and e^(-beta tau)                                 (MdGf)
    MaskLinear           that pattern, and max(0, 1 - beta tau)                          (MdGf)
    StructureStepwise    7:8, 4:8, 2:8, 1:8 in turn, and nothing                         (SdGf)
    StructureGeometric   8:64, 4:32, 2:16, 1:8                                           (SdGf)
    StructureDensify     1:64, 1:32, 1:16, 1:8
    StructureCustom      the patterns it lists

What a masked weight learns is the `Flow` of the `Shadow` that keeps the dense weights. `Remask` is the rule.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import exp, log
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.criteria import Criterion, Magnitude
from secateur.axes.patterns import NM, Pattern
from secateur.axes.rules import Chained, Flow, Shadow, everything, sparsity_of
from secateur.edit import Mask
from secateur.errors import PatternError, SettingError, SiteError
from secateur.evidence import Evidence
from secateur.site import Site
from secateur.train import Loop, Rule


class Stage(NamedTuple):
    """What the forward pass sees at a step."""

    pattern: NM | None  # None: everything, as it is
    share: float  # what is left of a masked weight, in [0, 1]; 0: the mask is hard


@runtime_checkable
class Decay(Protocol):
    """What happens between the dense phase and the hard one."""

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """Every pattern on the way, the last that aimed at."""
        ...

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """The stage of step `tau` of the `span` steps of this phase, counted from 0."""
        ...


@dataclass(frozen=True)
class AtOnce:
    """Hard masks of the pattern aimed at as soon as the dense phase is over."""

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """The one aimed at."""
        return (target,)

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """Hard from the first step."""
        return Stage(target, 0.0)


@dataclass(frozen=True)
class MaskExponential:
    """Masked weights are seen as e^(-beta tau) times themselves, tau being the steps since the dense phase.

    Bambhaniya et al. 2024, arXiv 2402.04744: MdGf-exponential. Never quite zero: the hard phase makes it so.
    """

    beta: float | None = None  # per step; None: a hundredth is left at `by`
    by: float = 0.7  # fraction of the phase after which a hundredth is left, where beta is None

    def __post_init__(self) -> None:
        _check_beta(self.beta, self.by)

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """The one aimed at."""
        return (target,)

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """What is left after tau steps."""
        beta = log(100) / (self.by * span) if self.beta is None else self.beta
        return Stage(target, exp(-beta * tau))


@dataclass(frozen=True)
class MaskLinear:
    """Masked weights are seen as max(0, 1 - beta tau) times themselves.

    Bambhaniya et al. 2024, arXiv 2402.04744: MdGf-linear.
    """

    beta: float | None = None  # per step; None: nothing is left at `by`
    by: float = 0.7  # fraction of the phase after which nothing is left, where beta is None

    def __post_init__(self) -> None:
        _check_beta(self.beta, self.by)

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """The one aimed at."""
        return (target,)

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """What is left after tau steps."""
        beta = 1 / (self.by * span) if self.beta is None else self.beta
        return Stage(target, max(0.0, 1 - beta * tau))


def _check_beta(beta: float | None, by: float) -> None:
    if beta is not None and not 0 <= beta < float("inf"):
        raise SettingError(f"a decay of beta={beta} was asked for", "it is 0 or above, per step", "Give 0.0002, say.")
    if not 0 < by <= 1:
        raise SettingError(f"a decay by {by:g} was asked for", "it is a fraction of a phase, in (0, 1]", "Give 0.7.")


@dataclass(frozen=True)
class StructureStepwise:
    """M-1 of M are kept, then half of M, a quarter, ..., and N in the end, for equal times.

    Bambhaniya et al. 2024, arXiv 2402.04744: SdGf-stepwise.
    """

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """7:8, 4:8, 2:8, 1:8 for 1:8."""
        kept = [target.m - 1]
        while kept[-1] > target.n:
            kept.append(target.m >> len(kept))
        return (*(NM(n, target.m) for n in kept if n > target.n), target)

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """The frame that step is in."""
        return _frame(self.patterns(target), tau, span)


@dataclass(frozen=True)
class StructureGeometric:
    """Groups are longer at first and keep as many times more: the sparsity is the same throughout, the choice freer.

    Bambhaniya et al. 2024, arXiv 2402.04744: SdGf-geometric.
    """

    frames: int = 4  # M 2^(frames - 1) must divide the inputs

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """8:64, 4:32, 2:16, 1:8 for 1:8."""
        return tuple(NM(target.n << i, target.m << i) for i in reversed(range(self.frames)))

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """The frame that step is in."""
        return _frame(self.patterns(target), tau, span)


@dataclass(frozen=True)
class StructureDensify:
    """Groups are longer at first and keep as few: sparser than what is aimed at, and denser from frame to frame.

    From the authors' code of Bambhaniya et al. 2024, arXiv 2402.04744.
    """

    frames: int = 4  # M 2^(frames - 1) must divide the inputs

    def __post_init__(self) -> None:
        _check_frames(self.frames)

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """1:64, 1:32, 1:16, 1:8 for 1:8."""
        return tuple(NM(target.n, target.m << i) for i in reversed(range(self.frames)))

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """The frame that step is in."""
        return _frame(self.patterns(target), tau, span)


@dataclass(frozen=True)
class StructureCustom:
    """Patterns of one's own for equal times, each a pair (kept, of); the last is that aimed at."""

    frames: tuple[tuple[int, int], ...] = ((4, 8), (2, 8), (1, 8))

    def patterns(self, target: NM) -> tuple[NM, ...]:
        """Those listed. Raises SettingError where the last is not the one aimed at."""
        if not self.frames or tuple(self.frames[-1]) != (target.n, target.m):
            last = "nothing" if not self.frames else "{}:{}".format(*self.frames[-1])
            raise SettingError(
                f"masks of {target.n}:{target.m} were asked for",
                f"the patterns on the way end in {last}",
                f"End them in ({target.n}, {target.m}).",
            )
        return tuple(NM(n, m) for n, m in self.frames)

    def stage(self, target: NM, tau: int, span: int) -> Stage:
        """The frame that step is in."""
        return _frame(self.patterns(target), tau, span)


def _check_frames(frames: int) -> None:
    if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1:
        raise SettingError(f"{frames} frames were asked for", "there is one at least", "Give 4, say.")


def _frame(patterns: Sequence[NM], tau: int, span: int) -> Stage:
    # By place, not by meeting a boundary: a run taken up again between two of them is in the right frame.
    return Stage(patterns[min(tau * len(patterns) // span, len(patterns) - 1)], 0.0)


@dataclass(frozen=True, kw_only=True)
class Phases:
    """Dense for a first part of training, hard masks for a last, a decay in between.

    Raises PatternError for a target that is not N:M, SettingError for parts that leave no training between them.
    """

    target: Pattern = NM(2, 4)
    decay: Decay = AtOnce()
    dense: float = 0.05  # fraction of training without masks
    final: float = 0.2  # fraction of training, at its end, with hard masks of the target

    def __post_init__(self) -> None:
        if not isinstance(self.target, NM):
            raise PatternError(
                f"masks of the pattern {type(self.target).__name__} were to be chosen at every step",
                "these methods keep N of every M consecutive inputs",
                "Give 2:4, or 1:8, say.",
            )
        for name, value in (("dense", self.dense), ("final", self.final)):
            if not 0 <= value < 1:
                raise SettingError(
                    f"a {name} phase of {value:g} was asked for",
                    "it is a fraction of training, in [0, 1)",
                    "Give 0.05, say.",
                )
        if self.dense + self.final >= 1:
            raise SettingError(
                f"a dense phase of {self.dense:g} and a final one of {self.final:g} were asked for",
                "together they leave no training for what is between them",
                "Let their sum be below 1.",
            )
        self.decay.patterns(self.aim)

    @property
    def aim(self) -> NM:
        """The target, known to be N:M."""
        assert isinstance(self.target, NM)
        return self.target

    @property
    def patterns(self) -> tuple[NM, ...]:
        """Every pattern of the whole training."""
        return self.decay.patterns(self.aim)

    def window(self, steps: int) -> tuple[int, int]:
        """The first step after the dense phase and the first of the final one, counted from 0."""
        first = round(self.dense * steps)
        return first, max(first, steps - round(self.final * steps))

    def stage(self, step: int, steps: int) -> Stage:
        """What the forward pass of a step sees, in a training of so many; after the last step, hard masks."""
        first, last = self.window(steps)
        if step < first:
            return Stage(None, 1.0)
        if step >= min(last, steps):
            return Stage(self.aim, 0.0)
        return self.decay.stage(self.aim, step - first, last - first)

    def work(self, steps: int) -> float:
        """Multiply-adds of the masked layers' forward passes over a whole training, as a fraction of dense training's.

        Only hard masks save any: one that decays is multiplied with, however little is left.
        """
        total = 0.0
        for step in range(steps):
            stage = self.stage(step, steps)
            total += 1.0 if stage.pattern is None or stage.share else stage.pattern.n / stage.pattern.m
        return total / steps if steps else 1.0


class Remask(Rule):
    """After every step the masks are chosen anew from the dense weights, which learn as their flow says.

    Masks change with the optimizer's steps only, so that all the forward passes of one step share them. `pull` is a
    decay of masked weights beside the optimizer's own, decoupled from the gradient: value *= 1 - rate * pull. Curves
    of the history: "sparsity", what is exactly zero; and every so many steps "mask flips", the fraction of all units
    whose place in the mask changed since the last point, and "masked share", what is left of a masked weight.

    Raises PatternError for a site that one of the patterns does not divide, before anything is trained; SiteError for
    units that are not single weights; SettingError for a pull that is not a decay, and where the optimizer does not
    train a site.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        phases: Phases,
        flow: Flow | None = None,
        *,
        pull: float = 0.0,
        criterion: Criterion | None = None,
        every: int = 100,
    ) -> None:
        self.sites = list(sites)
        self.phases = phases
        self.criterion: Criterion = Magnitude() if criterion is None else criterion
        self.pull, self.every = pull, every
        if not 0 <= pull < float("inf"):
            raise SettingError(f"a pull of {pull} was asked for", "a decay is 0 or above", "Give 0.0002, say.")
        if every < 1:
            raise SettingError(f"a point every {every} steps was asked for", "steps are whole", "Give 1 or more.")
        if self.criterion.needs:
            raise SettingError(
                f"masks by {type(self.criterion).__name__} were to be chosen at every step",
                f"it needs evidence ({', '.join(sorted(self.criterion.needs))}), and only the weights are at hand",
                "Use a criterion of the weights, such as Magnitude().",
            )
        for site in self.sites:
            if site.kind != "weight":
                raise SiteError(
                    f"N of every M weights of {site.name} were to be kept",
                    f"its units are {site.kind}s",
                    "Cut the model with weights().",
                )
            for pattern in phases.patterns:
                pattern.nearest(site.shape, 0)
        self.holder = Shadow(self.sites, everything(self.sites), Chained() if flow is None else flow)
        self._chosen = everything(self.sites)  # the masks as booleans, however much of a masked weight is left
        self._stage = Stage(None, 1.0)
        self._step = -1  # the step they were chosen for
        self._flips = 0  # since the last point of the curve
        self._decay = 0.0
        self._coarse = ""

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks as they are now: site name -> bool."""
        return self._chosen

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return [Mask(site, self._chosen[site.name]) for site in self.sites]

    def remarks(self, steps: int) -> list[str]:
        """What training cost, and what else had a hand in it, in words."""
        told = [
            f"forward passes of the masked layers took {self.phases.work(steps):.2%} of dense training's "
            "multiply-adds, counting hard masks alone as sparse"
        ]
        if self._decay and not self.holder.flow.held:
            told.append(f"the optimizer's weight decay of {self._decay:g} shrank masked weights too, beside any pull")
        if self._coarse:
            told.append(f"masks were chosen by weights in {self._coarse}: many are as large as others")
        return told

    def start(self, loop: Loop) -> None:
        """Put the dense weights aside."""
        decay = {id(p): float(g.get("weight_decay", 0.0)) for g in loop.optimizer.param_groups for p in g["params"]}
        self.holder.start(loop)
        for site in self.sites:
            weight = loop.tensors[site.parts[0].name]
            if id(weight) not in decay:
                raise SettingError(
                    f"masks of {site.name} were to be chosen while it trains",
                    "the optimizer does not train it",
                    "Give it to the optimizer, unfrozen, or leave it out with exclude.",
                )
            self._decay = max(self._decay, decay[id(weight)])
            if weight.dtype in (torch.bfloat16, torch.float16):
                self._coarse = str(weight.dtype).removeprefix("torch.")

    def before_forward(self, loop: Loop) -> None:
        """Choose the first masks."""
        if self._step < 0:
            self._choose(loop)
            loop.log("sparsity", sparsity_of(self.holder.keep))

    def before_step(self, loop: Loop) -> None:
        """The dense weights go back under the optimizer; where there is a pull, masked ones shrink first."""
        self.holder.before_step(loop)
        if not self.pull:
            return
        rate = {id(p): float(group["lr"]) for group in loop.optimizer.param_groups for p in group["params"]}
        for site in self.sites:
            (part,) = site.parts
            weight = loop.tensors[part.name]
            value, share = part.view(weight.detach()), self.holder.keep[site.name].to(weight.device)
            value.mul_(1 - rate[id(weight)] * self.pull * (1 - share.to(value.dtype)))

    def after_step(self, loop: Loop) -> None:
        """The dense weights are put aside, and the masks of the next step chosen."""
        self.holder.after_step(loop)
        before = sparsity_of(self.holder.keep)
        self._choose(loop)
        if (now := sparsity_of(self.holder.keep)) != before:
            loop.log("sparsity", now)
        if loop.step % self.every == 0 or loop.step == loop.steps:
            loop.log("mask flips", self._flips / sum(site.units for site in self.sites))
            loop.log("masked share", self._stage.share)
            self._flips = 0

    def finish(self, loop: Loop) -> None:
        """Hard masks of the target, whenever training ends; the model keeps what they leave."""
        if self._stage != (self.phases.aim, 0.0):
            loop.note(
                f"training stopped after {loop.step} of {loop.steps} steps, before the masks were hard: they were "
                "made so"
            )
            self._change(Stage(self.phases.aim, 0.0), loop)
            loop.log("sparsity", sparsity_of(self.holder.keep))
        self.holder.finish(loop)

    @contextmanager
    def hardened(self, loop: Loop) -> Iterator[None]:
        """The model as it would be if training ended here: for measuring while masked weights still count."""
        dense, masks = self.holder.values(), self._best(self.phases.aim)
        seen = {name: loop.tensors[name].detach().clone() for name in dense}
        try:
            for site in self.sites:
                (part,) = site.parts
                value = part.view(loop.tensors[part.name].detach())
                value.copy_(part.view(dense[part.name]).masked_fill(~masks[site.name].to(value.device), 0))
            yield
        finally:
            for name, value in seen.items():
                loop.tensors[name].detach().copy_(value)

    def state(self) -> dict[str, Any]:
        """The dense weights and the masks, the step they are for, and the flips not yet logged."""
        return {"holder": self.holder.state(), "keep": dict(self._chosen), "step": self._step, "flips": self._flips}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As they were; the stage is that of the step."""
        self.holder.resume(loop, state["holder"])
        self._chosen, self._step, self._flips = dict(state["keep"]), state["step"], state["flips"]
        self._stage = self.phases.stage(self._step, loop.steps) if self._step >= 0 else Stage(None, 1.0)

    def _choose(self, loop: Loop) -> None:
        stage = self.phases.stage(loop.step, loop.steps)
        if stage.pattern is not None and self._stage.share > 0.05 and not stage.share and self._stage.pattern:
            loop.note(
                f"masked weights still counted {self._stage.share:.0%} when their masks became hard, at step "
                f"{loop.step}: give a larger beta, or more steps"
            )
        self._change(stage, loop)
        self._step = loop.step

    def _change(self, stage: Stage, loop: Loop) -> None:
        dense_on = stage.pattern is None
        if dense_on and self._stage.pattern is None and self._step >= 0:
            return
        chosen = everything(self.sites) if stage.pattern is None else self._best(stage.pattern)
        if not dense_on and stage.pattern == self._stage.pattern:
            self._flips += sum(int((chosen[n].cpu() != k.cpu()).sum()) for n, k in self._chosen.items())
        self._chosen, self._stage = chosen, stage
        shares = chosen if not stage.share else {n: k.float().clamp(min=stage.share) for n, k in chosen.items()}
        self.holder.change(loop, shares)

    def _best(self, pattern: NM) -> dict[str, Tensor]:
        values = self.holder.values()
        found = {}
        for site in self.sites:
            score = self.criterion.score(site, values, Evidence())
            found[site.name] = pattern.select(score, pattern.nearest(site.shape, 0))
        return found
