"""What kinds of pruning differ in, one thing at a time: seven pairs, each a controlled experiment.

Cheng, Zhang, Shi. "A Survey on Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and Recommendations."
TPAMI 2024. arXiv:2308.06767. Its axes are the fields of a card, and `secateur.registry` answers its questions; here are
the contrasts it draws:

    1  single weights and channels, N:M between them        2  one cut and many
    3  chosen without data and with                         4  from initial weights and from trained ones
    5  fine-tuned and trained from new weights              6  pruned before and after a change of task
    7  the same channels for every input and its own

Both sides of a pair have the network, data, sparsity, seeds and training after the cut in common, and every side is
told with what it came to: parameters that are left, multiply-adds, epochs, work, time. A pair is clear where the sides
differ by more than two standard deviations, and reproduced where the side that the survey names is then ahead. Our
knowledge of the survey's body is from memory: for pairs where we do not know which side it names, none is.

    pairs = [Patterns(), Schedules()]
    print(text(contrasts(pairs, run(pairs, ground, seeds=(0, 1, 2)))))
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from statistics import fmean, stdev
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import NM, Global, PerMatrix, Uniform
from secateur.axes.gates import Gates, gated_units, insert_
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.axes.schedules import Schedule, Steps
from secateur.cut import weights
from secateur.edit import Edit, Mask
from secateur.errors import EvidenceError, SettingError, did_you_mean
from secateur.graph import couple
from secateur.method import Card, Method, check_sparsity
from secateur.methods.l1_norm import L1Norm
from secateur.methods.magnitude import Magnitude
from secateur.methods.polarization import Consensus
from secateur.methods.snip import Snip
from secateur.methods.synflow import Synflow
from secateur.methods.wanda import Wanda
from secateur.outcome import time_pair
from secateur.site import Part, total_units
from secateur.studies.rethinking import FORWARD_AND_BACKWARD, Arm, Recipe, audit, held, work_of
from secateur.task import Task, generator, modes_of, restore_modes_
from secateur.train import Loop, Rule, fit

CARD = Card(
    9, "A Survey on Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and Recommendations",
    arxiv="2308.06767", venue="TPAMI", year=2024, granularity=("weight", "channel"), needs=("labels", "training"),
    criterion=("any",), tasks=("any",), stage=("any",), schedule=("any",), allocation=("any",), retraining=("any",),
    choice=("any",), start=("any",), input=("any",), transfer=("any",),
)  # fmt: skip

CLEAR = 2.0  # standard deviations that the sides of a pair must differ by


@dataclass(frozen=True, eq=False, kw_only=True)
class Ground:
    """What both sides of a pair have in common."""

    start: Callable[[int], nn.Module]  # the network before training, of a seed
    trained: Callable[[int], nn.Module]  # and after, a new copy at every call
    task: Callable[[int, float], Task]  # of a seed, its learning rate times a number
    examples: int  # to train on
    batch: int
    sparsity: float = 0.5  # of the weights that can be pruned
    epochs: float = 3.0  # of training after the cut, unless the pair is about it
    rate: float = 0.1  # of that training, as a fraction of the dense one's
    before: float | None = None  # epochs of the dense training; None where that is not known
    split: str = "test"
    repeats: int = 5  # of each forward pass that is timed; 0: none is

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if not (self.epochs > 0 and self.rate > 0 and self.examples > 0 and self.batch > 0):
            raise SettingError(
                f"{self.epochs:g} epochs over {self.examples} examples in batches of {self.batch}, at {self.rate:g} of "
                "the learning rate, were asked for",
                "each is to be above 0",
                "Give what both sides are trained with after the cut.",
            )

    @property
    def steps(self) -> int:
        """Optimizer steps after the cut, one at least."""
        return self.steps_of(self.epochs)

    def steps_of(self, epochs: float) -> int:
        """Optimizer steps of some epochs, one at least."""
        return max(1, round(epochs * self.examples / self.batch))

    def epochs_of(self, steps: int) -> float:
        """How often steps see each example."""
        return steps * self.batch / self.examples


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a pair with one seed: what it came to, and what it took."""

    pair: int
    name: str
    seed: int
    quality: float
    metric: str
    higher: bool  # whether more of the metric is better
    sparsity: float
    denominator: str  # what the sparsity is a fraction of
    parameters: float  # that are not zero, over those of the dense network
    flops: float  # of a forward pass over the dense one's; zeros are free, gates are not
    epochs: float  # of training after the first cut
    before: float | None  # of training before it; None: the weights came trained
    work: float  # of both trainings, in forward passes of the dense network over one example; from `before` where known
    time: float | None = None  # of a forward pass over the dense one's, as it is: masks save none

    def __post_init__(self) -> None:
        if not self.denominator:
            raise SettingError(
                f"a sparsity of {self.sparsity:g} of {self.name} was to be compared",
                "it is not said what it is a fraction of",
                "Give the denominator, such as 'all parameters'.",
            )


@dataclass(frozen=True)
class Compared:
    """Two sides held against each other, and the one the survey names."""

    left: str
    right: str
    named: str = ""  # left, right, or none


@runtime_checkable
class Pair(Protocol):
    """A contrast that differs in one factor."""

    @property
    def number(self) -> int:
        """The survey's, 1 to 7."""
        ...

    @property
    def factor(self) -> str:
        """What the sides differ in."""
        ...

    @property
    def fixed(self) -> str:
        """What they share, beside the ground."""
        ...

    @property
    def compared(self) -> tuple[Compared, ...]:
        """Which sides, the one that decides first."""
        ...

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """Every side with a seed."""
        ...


# Accounting


def left_of(model: nn.Module) -> int:
    """Parameters that are not zero."""
    return sum(int(torch.count_nonzero(p)) for p in model.parameters())


def side_of(
    pair: int,
    name: str,
    ground: Ground,
    seed: int,
    model: nn.Module,
    *,
    hold: Hold | None = None,
    epochs: float,
    before: float | None = 0.0,
    flops: float | None = None,
    quality: float | None = None,
    of: Task | None = None,
) -> Side:
    """Measure a model, count what is left of it, and add up what it took.

    `before` defaults to no dense training; `flops` and `quality` are given where the model does not tell them itself.
    """
    task, dense = ground.task(seed, 1.0) if of is None else of, ground.start(seed)
    whole = work_of(dense, task)
    share = work_of(model, task, hold) / whole if flops is None else flops
    left, there = left_of(model), sum(p.numel() for p in dense.parameters())
    seen = FORWARD_AND_BACKWARD * ground.examples
    return Side(
        pair=pair,
        name=name,
        seed=seed,
        quality=task.measure(model, ground.split)[task.metric] if quality is None else quality,
        metric=task.metric,
        higher=task.higher_is_better,
        sparsity=1 - left / there,
        denominator="all parameters",
        parameters=left / there,
        flops=share,
        epochs=epochs,
        before=before,
        work=seen * (epochs * share + (before or 0.0)),
        time=timed(dense, model, task, ground),
    )


def timed(dense: nn.Module, model: nn.Module, task: Task, ground: Ground) -> float | None:
    """A forward pass of a model over that of the dense one, in turn on the same batch; None where nothing is timed."""
    if ground.repeats < 2:
        return None
    batch = next(iter(task.batches(ground.split, min(ground.batch, 64))))
    first, second = time_pair(dense, model, batch, ground.repeats)
    return second.milliseconds / first.milliseconds


def tuned(model: nn.Module, edits: Iterable[Edit], ground: Ground, task: Task) -> Hold | None:
    """Train what a cut left for the epochs of the ground, masks held; the rule that holds them, if any is there."""
    hold = held(model, edits)
    rules = [LearningRate(), *([hold] if hold.sites else [])]
    fit(model, task, ground.steps, rules)
    return hold if hold.sites else None


def cut_and_tuned(pair: int, name: str, method: Method, ground: Ground, seed: int) -> Side:
    """The trained network, cut by a method, trained for the epochs of the ground."""
    model, task = ground.trained(seed), ground.task(seed, ground.rate)
    done = method.run(model, task)
    hold = tuned(done.model, done.edits, ground, task)
    return side_of(pair, name, ground, seed, done.model, hold=hold, epochs=ground.epochs, before=ground.before)


# 1 Patterns


def nm_of(sparsity: float) -> NM | None:
    """The N:M of a sparsity with groups of 4, 8 or 16, or None: 0.5 is 2:4, 0.75 is 1:4."""
    for m in (4, 8, 16):
        n = (1 - sparsity) * m
        if round(n) >= 1 and abs(n - round(n)) < 1e-9:
            return NM(round(n), m)
    return None


@dataclass(frozen=True)
class Patterns:
    """1: where zeros lie. The norm of what goes decides; as many parameters go, and in a further side as much work."""

    number: ClassVar[int] = 1
    factor: ClassVar[str] = "single weights, N:M, or channels"
    fixed: ClassVar[str] = "criterion (L1), parameters removed; in one side multiply-adds instead; shares alike"
    compared: ClassVar[tuple[Compared, ...]] = (
        Compared("weights", "channels", "weights"),
        Compared("weights", "channels, equal flops", "weights"),
        Compared("weights", "N:M"),
        Compared("N:M", "channels"),
    )

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair. N:M is left out where the sparsity is that of no such pattern."""
        pattern, model = nm_of(ground.sparsity), ground.trained(seed)
        task = ground.task(seed, ground.rate)
        short = tuple(
            site.name for site in weights(model) if pattern is not None and site.shape[1] % pattern.m
        )  # too few inputs for a group: left whole in both masks
        sites, all_ = weights(model, exclude=short), sum(p.numel() for p in model.parameters())
        removed = sum(site.units - int((1 - ground.sparsity) * site.units + 0.5) for site in sites) / all_
        plain = Magnitude(sparsity=ground.sparsity, exclude=short)
        sides = [cut_and_tuned(1, "weights", plain, ground, seed)]
        if pattern is not None:
            sides.append(cut_and_tuned(1, "N:M", replace(plain, pattern=pattern), ground, seed))
        sides.append(cut_and_tuned(1, "channels", L1Norm(sparsity=removed, of="parameters"), ground, seed))
        work = 1 - work_of(model, task, held(model, plain.run(model, task).edits)) / work_of(ground.start(seed), task)
        sides.append(cut_and_tuned(1, "channels, equal flops", L1Norm(sparsity=work, of="flops"), ground, seed))
        return sides


# 2 Schedules


@dataclass(frozen=True)
class Geometric:
    """Of k cuts, each leaves the same share of what is there: a curve from the first cut to the last."""

    sparsity: float  # after the last
    cuts: int

    def after(self, cuts: float) -> float:
        """The sparsity after some of the cuts: 1 - (1 - s)^(c / k)."""
        return float(1 - (1 - self.sparsity) ** (cuts / self.cuts))

    def __call__(self, u: float) -> float:
        """The share of the way gone from the first cut to the last."""
        first, last = self.after(1), self.sparsity
        return (self.after(1 + u * (self.cuts - 1)) - first) / (last - first)


@dataclass(frozen=True)
class Schedules:
    """2: one cut, or several, each of the same share of what is left; under one training at a constant rate.

    A rate that falls would leave the late cuts nothing to be made up by.
    """

    cuts: int = 5

    number: ClassVar[int] = 2
    factor: ClassVar[str] = "one cut, or many"
    fixed: ClassVar[str] = "criterion (magnitude), final sparsity, epochs in all, learning rate, which is constant"
    compared: ClassVar[tuple[Compared, ...]] = (Compared("many cuts", "one cut", "many cuts"),)

    def __post_init__(self) -> None:
        if self.cuts < 2:
            raise SettingError(f"{self.cuts} cuts were to stand against one", "that is no contrast", "Give 2 or more.")

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair. Raises SettingError for fewer steps than cuts."""
        if ground.steps < self.cuts:
            raise SettingError(
                f"{self.cuts} cuts in {ground.steps} steps were asked for", "a cut needs one", "Train for longer."
            )
        every, s = ground.steps // self.cuts, ground.sparsity
        curve, until = Geometric(s, self.cuts), every * (self.cuts - 1) / ground.steps
        many = Schedule(start=curve.after(1), end=s, begin=0.0, until=until, curve=curve, every=every)
        one = Schedule(start=s, end=s, begin=0.0, until=0.0)
        return [
            self._trained(name, schedule, ground, seed) for name, schedule in (("many cuts", many), ("one cut", one))
        ]

    def _trained(self, name: str, schedule: Schedule, ground: Ground, seed: int) -> Side:
        model, task = ground.trained(seed), ground.task(seed, ground.rate)
        hold = ramped(model, task, schedule, ground.steps, floor=1.0)
        side = side_of(2, name, ground, seed, model, hold=hold, epochs=ground.epochs, before=ground.before)
        return as_cut(side, schedule, ground)


def ramped(model: nn.Module, task: Task, schedule: Schedule, steps: int, floor: float = 0.0) -> Hold:
    """Train while a schedule cuts the smallest weights of each layer for good; the rule that holds the masks.

    `floor` is the learning rate at the end of its cosine, as a fraction of that at the start; 1 is constant.
    """
    hold = Hold(weights(model))
    fit(model, task, steps, [LearningRate(floor=floor), Gradual(hold.sites, schedule, holder=hold)])
    return hold


def as_cut(side: Side, schedule: Schedule, ground: Ground) -> Side:
    """A side with the work of what its schedule had left at each step: until the last cut more was there than is now.

    The shares of the layers are the same at every cut, so that work goes with the sparsity.
    """
    gone, held = 0.0, 0.0
    for step in range(ground.steps):
        if schedule.due(step, ground.steps):  # a mask stays as it is until then, while the curve goes on
            held = schedule.value(step, ground.steps)
        gone += held
    left = 1 - gone / (schedule.end * ground.steps)
    more = FORWARD_AND_BACKWARD * ground.examples * ground.epochs * (1 - side.flops) * left
    return replace(side, work=side.work + more)


# 3 Data


@dataclass(frozen=True)
class Data:
    """3: what weights are chosen by. Layers keep equal shares, so that nothing but the choice within them differs."""

    samples: int = 256  # that SNIP and Wanda look at
    rounds: int = 20  # of SynFlow

    number: ClassVar[int] = 3
    factor: ClassVar[str] = "chosen without data, or with"
    fixed: ClassVar[str] = "pattern (single weights), sparsity of every layer"
    compared: ClassVar[tuple[Compared, ...]] = (
        Compared("magnitude", "snip"),
        Compared("magnitude", "wanda"),
        Compared("synflow", "snip"),
        Compared("synflow", "wanda"),
    )

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair. On a trained network SNIP's score is that of first-order Taylor expansion."""
        s = ground.sparsity
        methods: dict[str, Method] = {
            "magnitude": Magnitude(sparsity=s),
            "synflow": Synflow(sparsity=s, rounds=self.rounds, allocation=Uniform(), steps=0),
            "snip": Snip(sparsity=s, samples=self.samples, allocation=Uniform(), steps=0),
            "wanda": Wanda(sparsity=s, samples=self.samples, pattern=PerMatrix()),
        }
        return [cut_and_tuned(3, name, method, ground, seed) for name, method in methods.items()]


# 4 Start


@dataclass(frozen=True)
class Start:
    """4: SNIP before any training, or magnitude after it; the same training of what is left, and in a third side more.

    The third gives the initial weights as many epochs in all as the trained ones had.
    """

    samples: int = 256

    number: ClassVar[int] = 4
    factor: ClassVar[str] = "from initial weights, or from trained ones"
    fixed: ClassVar[str] = "pattern (single weights, one ranking), sparsity, epochs and learning rate after the cut"
    compared: ClassVar[tuple[Compared, ...]] = (
        Compared("trained", "initial", "trained"),
        Compared("trained", "initial, as long in all"),
    )

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair. Raises SettingError where it is not known how long the dense training was."""
        if ground.before is None:
            raise SettingError(
                "initial weights were to be held against trained ones",
                "it is not known for how long those were trained",
                "Give `before`, in epochs.",
            )
        same = replace(ground, rate=1.0)  # initial weights learn nothing at the rate of fine-tuning
        kept = Magnitude(sparsity=ground.sparsity, allocation=Global())
        sides = [cut_and_tuned(4, "trained", kept, same, seed)]
        for name, epochs in (("initial", ground.epochs), ("initial, as long in all", ground.epochs + ground.before)):
            model, task = ground.start(seed), ground.task(seed, 1.0)
            done = Snip(sparsity=ground.sparsity, samples=self.samples, steps=0).run(model, task)
            longer = replace(same, epochs=epochs)
            hold = tuned(done.model, done.edits, longer, task)
            sides.append(side_of(4, name, ground, seed, done.model, hold=hold, epochs=epochs))
        return sides


# 5 Weights


@dataclass(frozen=True)
class Inherited:
    """5: the weights that pruning left, fine-tuned, or new ones in the same shape: see secateur.studies.rethinking.

    scratch-E is trained for as many epochs as fine-tuning, scratch-B for as much work as those epochs are of the dense
    network. New weights have the rate of dense training, which falls to that of fine-tuning half-way.
    """

    number: ClassVar[int] = 5
    factor: ClassVar[str] = "inherited weights, or new ones"
    fixed: ClassVar[str] = "architecture (channels by L1); epochs for scratch-E, work for scratch-B"
    compared: ClassVar[tuple[Compared, ...]] = (
        Compared("fine-tune", "scratch-E", "fine-tune"),
        Compared("fine-tune", "scratch-B"),
        Compared("scratch-B", "scratch-E"),
    )

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair."""
        model, task = ground.trained(seed), ground.task(seed, 1.0)
        dense = work_of(model, task)
        done = L1Norm(sparsity=ground.sparsity, of="parameters").run(model, task)
        recipe = Recipe(ground.steps, Steps(at=(0.5,), by=ground.rate), fine_tune=1.0)
        arms = audit(done.model, done.edits, task, recipe, dense, split=ground.split)
        return [self._side(arm, done.model, ground, task) for arm in arms if arm.name != "scratch-all"]

    def _side(self, arm: Arm, model: nn.Module, ground: Ground, task: Task) -> Side:
        return side_of(
            5, arm.name, ground, arm.seed, model, epochs=ground.epochs_of(arm.steps),
            before=0.0 if arm.name.startswith("scratch") else ground.before, quality=arm.values[task.metric],
        )  # fmt: skip


# 6 Task


@dataclass(frozen=True)
class Transfer:
    """6: a network trained on one task is cut at once and trained on another, or half-way through that training."""

    target: Callable[[int, float], Task]  # of a seed, its learning rate times a number; its inputs fit the network

    number: ClassVar[int] = 6
    factor: ClassVar[str] = "pruned on the first task, or once adapted to the second"
    fixed: ClassVar[str] = "criterion (magnitude), sparsity, target data, epochs on it, learning rate over them"
    compared: ClassVar[tuple[Compared, ...]] = (Compared("adapt, then prune", "prune, then adapt"),)

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair."""
        s, task = ground.sparsity, self.target(seed, 1.0)
        moments = {
            "prune, then adapt": Schedule(start=s, end=s, begin=0.0, until=0.0),
            "adapt, then prune": Schedule(end=s, begin=0.5, until=0.5),
        }
        sides = []
        for name, schedule in moments.items():
            model = ground.trained(seed)
            hold = ramped(model, task, schedule, ground.steps)
            side = side_of(6, name, ground, seed, model, hold=hold, epochs=ground.epochs, before=ground.before, of=task)
            sides.append(as_cut(side, schedule, ground))
        return sides


# 7 Input


@dataclass(frozen=True)
class Dynamic:
    """7: gates open other channels for each input, or the same channels stay for all, as much work as that is.

    What the gates themselves take is work. Zeros are counted as free, as if shut channels were not calculated.
    """

    hidden: int = 8  # of the small network that is a gate
    strength: float = 8.0  # of the pull to the budget

    number: ClassVar[int] = 7
    factor: ClassVar[str] = "other channels for each input, or the same for all"
    fixed: ClassVar[str] = "mean multiply-adds of an example, gates counted; epochs and learning rate after the cut"
    compared: ClassVar[tuple[Compared, ...]] = (Compared("dynamic", "static"),)

    def run(self, ground: Ground, seed: int) -> list[Side]:
        """See Pair. Raises EvidenceError where gates and what they leave open are more work than the dense network."""
        inner, task = ground.trained(seed), ground.task(seed, 1.0)
        whole, model = work_of(ground.start(seed), task), _Whole(inner)
        found, _ = gated_units(model, couple(model, task.example), ("channel",))
        gates = insert_(model, found, hidden=self.hidden, seed=generator(task, "gates").initial_seed())
        own = gates_work(gates)
        flat = Schedule(start=0.0, end=0.0, until=0.0, every=1)  # no pull to one opinion
        # The rule counts a matrix at each of its sides; what came of it is counted below, example by example.
        wanted = max((1 - ground.sparsity) - own / whole, 0.05)
        rule, during = Consensus(gates, wanted, self.strength, flat, of="flops"), _Opened(gates)
        fit(model, task, ground.steps, [LearningRate(), rule, during], gates.optimizer(task))
        quality, share = task.measure(model, ground.split)[task.metric], opened_work(model, gates, task, ground, whole)
        flops = share + own / whole
        if not flops < 1:
            raise EvidenceError(
                f"channels were to be gated for {1 - ground.sparsity:.0%} of the work",
                f"gates and what they leave open came to {flops:.0%} of the dense network's",
                "Give smaller gates (hidden), more strength, or more epochs.",
            )
        gates.take_out_()
        dynamic = side_of(
            7, "dynamic", replace(ground, repeats=0), seed, inner, epochs=ground.epochs, before=ground.before,
            flops=flops, quality=quality,
        )  # fmt: skip
        extra = sum(p.numel() for gate in gates.modules for p in gate.parameters())
        there = sum(p.numel() for p in ground.start(seed).parameters())
        # Gates start open: until they shut, training took more than a forward pass takes now.
        more = FORWARD_AND_BACKWARD * ground.examples * ground.epochs * (during.share(whole) - share)
        dynamic = replace(
            dynamic, parameters=dynamic.parameters + extra / there, sparsity=1 - share,
            denominator="multiply-adds without gates", work=dynamic.work + more,
        )  # fmt: skip
        same = replace(ground, rate=1.0)
        return [dynamic, cut_and_tuned(7, "static", L1Norm(sparsity=1 - flops, of="flops"), same, seed)]


class _Opened(Rule):
    """Adds up what gates left open at every step of training."""

    def __init__(self, gates: Gates) -> None:
        self.gates, self.total, self.steps = gates, 0.0, 0

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The loss as it is."""
        self.total += float(open_now(self.gates).mean())
        self.steps += 1
        return value

    def share(self, whole: float) -> float:
        """The mean over the steps, as a share of a network's work."""
        return (self.total / self.steps + ungated(self.gates, whole)) / whole


class _Whole(nn.Module):
    """A network in one place: gates are put in beside it, and would be run as a layer of an nn.Sequential."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: object, **kwargs: object) -> object:
        return self.inner(*args, **kwargs)


def gates_work(gates: Gates) -> float:
    """Multiply-adds times two of the gates themselves for an example; what pooling takes is left out."""
    return float(sum(2 * p.numel() for gate in gates.modules for p in gate.parameters() if p.dim() > 1))


@torch.no_grad()
def opened_work(model: nn.Module, gates: Gates, task: Task, ground: Ground, whole: float) -> float:
    """The mean share of a network's work that gates leave open, over the examples of the ground's split.

    A matrix between two gated sets of channels is as open as the one times the other.
    """
    modes, total, count = modes_of(model), 0.0, 0
    model.eval()
    for batch in task.batches(ground.split):
        gates.forget()
        batch.through(model)
        total += float(open_now(gates).sum())
        count += batch.size
    restore_modes_(model, modes)
    gates.forget()
    return (total / count + ungated(gates, whole)) / whole


def ungated(gates: Gates, whole: float) -> float:
    """What of a network's work no gate shuts."""
    parts = {part.name: part for each in gates.guarded for part in each.site.parts if len(part.shape) > 1}
    return whole - sum(_work(part) for part in parts.values())


@torch.no_grad()
def open_now(gates: Gates) -> Tensor:
    """Of each example of the last forward pass, the multiply-adds times two of all gated matrices: [batch]."""
    units = [each.site.units for each in gates.guarded]
    return sum_open(gates, torch.split(gates.opened(), units, dim=1))


def sum_open(gates: Gates, answers: Sequence[Tensor]) -> Tensor:
    """Of each example, the multiply-adds times two of all gated matrices: [batch]."""
    shares: dict[str, Tensor] = {}
    size: dict[str, float] = {}
    for each, opened in zip(gates.guarded, answers, strict=True):
        share = opened.double().mean(1)
        for part in each.site.parts:
            if len(part.shape) > 1:
                shares[part.name] = shares.get(part.name, torch.ones_like(share)) * share
                size[part.name] = _work(part)
    return torch.stack([shares[name] * size[name] for name in shares]).sum(0)


def _work(part: Part) -> float:
    return 2.0 * part.uses * prod(part.shape)


# The table


@dataclass(frozen=True)
class Contrast:
    """Two sides over the seeds."""

    pair: int
    factor: str
    left: str
    right: str
    metric: str
    seeds: int
    left_mean: float
    left_sd: float
    right_mean: float
    right_sd: float
    ahead: str  # the side whose mean is better
    clear: bool  # whether they differ by more than two standard deviations, of the side that varies more
    named: str  # by the survey; empty where we do not know
    costs: Mapping[str, Side]  # each side's first seed: what it took
    decides: bool  # whether it is the pair's own question, and not one beside it

    @property
    def difference(self) -> float:
        """Left less right."""
        return self.left_mean - self.right_mean

    @property
    def reproduced(self) -> bool | None:
        """Whether the side that the survey names is clearly ahead; None where none is named."""
        return (self.clear and self.ahead == self.named) if self.named else None


def run(pairs: Iterable[Pair], ground: Ground, seeds: Sequence[int]) -> list[Side]:
    """Every side of some pairs with every seed, seed after seed."""
    pairs = list(pairs)
    return [side for seed in seeds for pair in pairs for side in pair.run(ground, seed)]


def contrasts(pairs: Sequence[Pair], sides: Sequence[Side]) -> list[Contrast]:
    """The comparisons of some pairs, over the seeds that both sides of each have.

    Raises EvidenceError for fewer than two seeds: nothing can be said to be clear.
    """
    out = []
    for pair in pairs:
        mine = [side for side in sides if side.pair == pair.number]
        for place, each in enumerate(pair.compared):
            left, right = ({s.seed: s for s in mine if s.name == name} for name in (each.left, each.right))
            seeds = sorted(left.keys() & right.keys())
            if not left or not right:
                continue  # a side that the ground does not allow
            if len(seeds) < 2:
                raise EvidenceError(
                    f"pair {pair.number} was to be judged ({each.left} and {each.right})",
                    f"both sides were run with {len(seeds)} seed",
                    "Run two seeds at least.",
                )
            values = [[of[seed].quality for seed in seeds] for of in (left, right)]
            means, sds = [fmean(v) for v in values], [stdev(v) for v in values]
            first = next(iter(left.values()))
            better = means[0] > means[1] if first.higher else means[0] < means[1]
            out.append(
                Contrast(
                    pair.number, pair.factor, each.left, each.right, first.metric, len(seeds),
                    means[0], sds[0], means[1], sds[1],
                    each.left if better else each.right,
                    abs(means[0] - means[1]) > CLEAR * max(sds),
                    each.named,
                    {each.left: left[seeds[0]], each.right: right[seeds[0]]},
                    place == 0,
                )
            )  # fmt: skip
    return out


def text(found: Sequence[Contrast]) -> str:
    """One table: a line for each comparison, and under it what each side is and took, once."""
    lines, told = [], set()
    for each in found:
        verdict = {True: "reproduced", False: "not reproduced", None: "clear" if each.clear else "not clear"}
        where = f"{each.pair}" if each.decides else " "
        lines.append(
            f"{where} {each.left} {each.left_mean:.4f} ± {each.left_sd:.4f}, {each.right} {each.right_mean:.4f} ± "
            f"{each.right_sd:.4f} ({each.metric}, {each.seeds} seeds): {each.ahead} by {abs(each.difference):.4f}, "
            f"{verdict[each.reproduced]}"
        )
        for name, side in each.costs.items():
            if (each.pair, name) not in told:
                lines.append(f"      {name}: {took(side)}")
            told.add((each.pair, name))
    return "\n".join(lines)


def took(side: Side) -> str:
    """What a side is and took, in a line."""
    before = "weights came trained" if side.before is None else f"{side.before:g} before"
    time = "" if side.time is None else f", time {side.time:.0%}"
    return (
        f"{side.sparsity:.1%} of {side.denominator} gone; parameters {side.parameters:.1%}, multiply-adds "
        f"{side.flops:.1%}{time}; {side.epochs:g} epochs, {before}; {side.work:.3g} dense forward passes"
    )


PAIRS: dict[str, type] = {
    "1": Patterns,
    "2": Schedules,
    "3": Data,
    "4": Start,
    "5": Inherited,
    "6": Transfer,
    "7": Dynamic,
}
"""Every pair by number; the sixth needs the second task."""


def pair_of(number: int | str, target: Callable[[int, float], Task] | None = None) -> Pair:
    """A pair by its number, with its defaults. Raises SettingError for one that there is not, or without its task."""
    kind = PAIRS.get(str(number))
    if kind is None:
        raise SettingError(f"pair {number} was asked for", "there are seven", did_you_mean(str(number), PAIRS))
    if kind is not Transfer:
        found: Pair = kind()
        return found
    if target is None:
        raise SettingError(
            "pair 6 was asked for", "it needs a second task", "Give `target`: a task of a seed and a learning rate."
        )
    return Transfer(target)


# Beside the pairs


def densities(model: nn.Module, task: Task, methods: Mapping[str, Method]) -> dict[str, dict[str, float]]:
    """What share of each layer different methods keep of one model: by method, then by site. Nothing is trained.

    For the survey's plot of layers at one global sparsity: give each method the same, with allocation=Global().
    """
    out = {}
    for name, method in methods.items():
        done = method.run(copy.deepcopy(model), task)
        out[name] = {e.site.name: e.kept / e.site.units for e in done.edits if isinstance(e, Mask)}
    return out


def total_left(found: Mapping[str, float], model: nn.Module) -> float:
    """The density of a whole model from those of its sites."""
    sites = [site for site in weights(model) if site.name in found]
    return sum(found[site.name] * site.units for site in sites) / total_units(sites)
