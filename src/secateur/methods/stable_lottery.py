"""Deep networks hold tickets too, but they win from a little later on: go back to an early step, not to the start.

Frankle, Dziugaite, Roy, Carbin. "Stabilizing the Lottery Ticket Hypothesis." 2019. arXiv:1903.01611: train to step k
and put W_k aside; train on to the end, drop the smallest weights of all layers together, put the others back to W_k and
the learning rate's course back to step k, again and again.

Why it works from some k on is measured by twins, two trainings that differ in one thing, over kept weights:

    stability to pruning      || m * W_T(whole) - W_T(m * W_k) ||       same data order
    stability to data order   || W_T(m * W_k, u) - W_T(m * W_k, u') ||  two orders u, u'

each for the ticket's mask and for a random one with as many weights in each layer. A matching ticket has the smaller
distances. A third probe, of a later paper (arXiv:1912.05671), is the barrier on the line between the two orders' ends.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import acos, degrees
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.axes.recalibration import recalibrate_
from secateur.axes.rewinding import (
    Aside,
    Course,
    Keep,
    Policy,
    Rewind,
    Rounds,
    Scope,
    Stay,
    Together,
    check_rounds,
    magnitudes,
    reinitialize_,
    search,
    shuffled,
)
from secateur.axes.rules import sparsity_of
from secateur.axes.schedules import Cosine, Curve
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import ResumeError, SettingError, TaskError
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Batch, Task, generator, quality
from secateur.train import Snapshot


@dataclass(frozen=True)
class Apart:
    """How far apart two trainings from one start end, over the weights a mask keeps."""

    distance: float  # L2, in units of the weights: grows with their number and size
    share: float  # of the norm of where the first ended: comparable between sparsities
    angle: float  # between the two ways from the start, in degrees: blind to how far each went


def ends_apart(
    sites: Sequence[Site], keep: Mapping[str, Tensor], start: Snapshot, one: Snapshot, other: Snapshot
) -> Apart:
    """Compare where two trainings ended, over kept weights, in float64."""

    def kept(state: Snapshot) -> Tensor:
        values = [site.parts[0].read(state.model)[keep[site.name].to(_device(state, site))] for site in sites]
        return torch.cat([value.double().cpu() for value in values])

    origin, first, second = kept(start), kept(one), kept(other)
    distance = float((first - second).norm())
    ways = first - origin, second - origin
    product = float(ways[0].norm() * ways[1].norm())
    turn = degrees(acos(max(-1.0, min(1.0, float(ways[0] @ ways[1]) / product)))) if product and distance else 0.0
    norm = float(first.norm())
    return Apart(distance, distance / norm if norm else 0.0, turn)


def _device(state: Snapshot, site: Site) -> torch.device:
    return state.model[site.parts[0].name].device


@dataclass(frozen=True, eq=False)
class Stability:
    """What the twins of one mask say."""

    pruning: Apart  # the sub-network beside the whole one, same data order
    order: Apart  # the sub-network in one data order beside another
    noise: float | None = None  # distance of two trainings that should be one; None: not measured
    barrier: float | None = None  # how much worse the task's metric gets between the two orders' ends, at most
    ends: tuple[Snapshot, ...] = ()  # where the sub-network ended in the first and the second order


@dataclass(frozen=True)
class Twins:
    """Measures both stabilities; costs one training of the whole network and two or three of each mask."""

    points: int = 0  # on the line between the two orders' ends, for the barrier; 0: it is not looked at
    repeat: bool = False  # train a third time as the first: the floor that nondeterminism sets
    split: str = "val"  # what the barrier is measured on

    orders: ClassVar[tuple[int, int]] = (100_000, 200_000)  # of the data: far beyond any epoch a search draws from

    def __post_init__(self) -> None:
        if self.points < 0:
            raise SettingError(
                f"a barrier at {self.points} points was asked for", "a count cannot be negative", "Give 9, or 0."
            )

    def whole(self, model: nn.Module, task: Task, early: Snapshot, course: Course) -> Snapshot:
        """The end of the whole network's training from a state, in the first order. Changes the model.

        Raises ResumeError for a state at or past the end of the course, TaskError for data whose order cannot be
        repeated, or cannot be changed.
        """
        if early.step >= course.steps:
            raise ResumeError(
                f"trainings were to be compared from step {early.step} on",
                f"they end at {course.steps}",
                "Take the state at an earlier step.",
            )
        check_orders(task, early.epoch, self.orders)
        first = self.orders[0]
        course.train(model, task, start=_in_order(early, first), epoch=first)
        return Snapshot.of(model)

    def read(
        self,
        model: nn.Module,
        task: Task,
        sites: Sequence[Site],
        keep: Mapping[str, Tensor],
        early: Snapshot,
        course: Course,
        whole: Snapshot,
    ) -> Stability:
        """Train a sub-network from a state in both orders, and compare; changes the model.

        `whole` is the end that the method of that name gave for the same state and course.
        """

        def end(order: int) -> Snapshot:
            course.train(model, task, sites, keep, _in_order(early, order), epoch=order)
            return Snapshot.of(model)

        first, second = (end(order) for order in self.orders)
        noise = ends_apart(sites, keep, early, first, end(self.orders[0])).distance if self.repeat else None
        barrier = barrier_between(model, task, first, second, self.points, self.split) if self.points else None
        pruning = ends_apart(sites, keep, early, whole, first)
        return Stability(pruning, ends_apart(sites, keep, early, first, second), noise, barrier, (first, second))


def _in_order(state: Snapshot, order: int) -> Snapshot:
    """The same weights at the same place, the data drawn in another order; the optimizer has seen nothing."""
    return replace(state.weights_only(), epoch=state.epoch + order)


def check_orders(task: Task, epoch: int, orders: Iterable[int]) -> None:
    """Raise TaskError unless an order of the data can be had again, augmentation included, and others differ."""
    seen: list[Any] = []
    for order in orders:
        once, again = ([_values(b) for b in islice(task.batches("train", epoch=epoch + order), 2)] for _ in range(2))
        if not _same(once, again):
            raise TaskError(
                f"trainings on {task.name} were to see the same data in the same order",
                "its batches differ from one time to the next",
                "Draw order and augmentation from the task's seed and the epoch, with no workers of their own.",
            )
        if any(_same(once, other) for other in seen):
            raise TaskError(
                f"trainings on {task.name} were to see the data in two orders",
                "its batches are the same in every epoch",
                "Shuffle the training data by the epoch.",
            )
        seen.append(once)


def _values(batch: Batch) -> list[Any]:
    inputs = batch.inputs.values() if isinstance(batch.inputs, Mapping) else batch.inputs
    return [*inputs, batch.target]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(_same(a, b) for a, b in zip(one, other, strict=True))
    return bool(one == other)


def barrier_between(
    model: nn.Module, task: Task, one: Snapshot, other: Snapshot, points: int, split: str = "val"
) -> float:
    """How much worse than the mean of two ends the task's metric gets on the line between them, at most; 0 at least.

    Batch norms are recalibrated at each point, as the mean of two running statistics is that of neither. Frankle,
    Dziugaite, Roy, Carbin 2019, arXiv:1912.05671. Changes the model.
    """
    found, device = [], next(model.parameters()).device
    for place in range(points + 2):
        share = place / (points + 1)
        Snapshot.average([one, other], [1 - share, share]).restore_(model)
        if 0 < place <= points:
            recalibrate_(model, (batch.to(device) for batch in task.batches("calibration")))
        found.append(quality(task, task.measure(model, split)))
    ends = (found[0] + found[-1]) / 2
    between = found[1:-1]
    return max(0.0, ends - min(between))


def controls(model: nn.Module, found: Rounds, draw: torch.Generator) -> dict[str, tuple[Keep, Snapshot]]:
    """What a ticket is to be compared with at equal sparsity: name -> masks, and the state to train them from.

    "ticket": its own mask at W_k. "random mask": as many weights in each layer, anywhere, at W_k. "reinitialised": its
    mask on other initial weights. "rate rewound": its mask on the weights as trained, the learning rate's course alone
    gone back (learning-rate rewinding). All at the clock of step k. Going back to 0 is a search of its own, with
    Rewind(0); training on from the end is Stay(0). The model is left at the ticket's end.
    """
    early = found.early
    reinitialize_(model, draw)
    other = replace(Snapshot.of(model), step=early.step, epoch=early.epoch, place=early.place)
    found.end.restore_(model)
    return {
        "ticket": (found.keep, early),
        "random mask": (shuffled(found.keep, draw), early),
        "reinitialised": (found.keep, other),
        "rate rewound": (found.keep, Stay(early.step).start(model, early, 0)),
    }


@dataclass(frozen=True, kw_only=True)
class StableLottery(Method):
    """Train, drop the smallest weights of all layers, go back to an early step; at last train the ticket."""

    rounds: int = 8  # of train, drop and rewind: 0.8^8 leaves 17 %
    fraction: float = 0.2  # of the weights left that each round drops: p
    rewind: Policy = Rewind(200)  # where what stays goes back to: step k; the paper's are 0.1 to 7 % of training
    steps: int = 4000  # optimizer steps of each training; there are rounds + 1
    scope: Scope = Together()  # which weights compete for staying
    curve: Curve = Cosine()  # how the learning rate falls; the paper's is steps(at=(0.5, 0.75))
    warmup: float = 0.0  # fraction of the steps in which it rises
    rate_floor: float = 0.0  # the rate at the end, as a fraction of that at the start
    probe: Twins | None = None  # measure both stabilities of the ticket and of a random mask; none: do not
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        46,
        "Stabilizing the Lottery Ticket Hypothesis",
        arxiv="1903.01611",
        year=2019,
        when="around training",
        needs=("labels", "training"),
        axes="criterion rule snapshot rewinding",
        criterion=("magnitude",),
        tasks=("classification",),
        schedule=("geometric",),
        allocation=("score-driven",),
        reports="ResNet-50 at 80 % sparsity matches the whole network on ImageNet when rewound early in training, and "
        "fails when rewound to the start; 0.1 to 7 % of training is early enough",
        checked="tests/methods/test_stable_lottery.py::test_twins_of_a_ticket_are_closer_than_those_of_a_random_mask",
        differs=(
            "exactly ceil(p n) of the n weights left go: the reference keeps those strictly above the cutoff, which "
            "drops one more, and all that tie with it",
            "masked weights get no gradient and are zero after the last step too: the reference masks them before "
            "each forward pass, so that momentum moves them and they are saved as they are",
            "every round sees the data in a new order, from the place in the epoch that step k had",
            "distances are also given over the norm, and as angles: batch norm makes the scale of weights free",
        ),
    )
    tiny: ClassVar = {"rounds": 2, "fraction": 0.3, "rewind": Rewind(3), "steps": 15}

    @property
    def course(self) -> Course:
        """One training."""
        return Course(self.steps, self.curve, self.warmup, self.rate_floor)

    def check(self) -> None:
        """Raise SettingError for rounds, fractions and rewinding that cannot be."""
        check_rounds(self.rounds, self.fraction)
        self.course.check(self.rewind)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The ticket, trained from step k to the end: its mask is the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        if self.probe is not None:
            check_orders(task, 0, self.probe.orders)

        def drop(keep: Keep, start: Snapshot) -> Keep:
            return self.scope.drop(sites, magnitudes(model, sites), keep, self.fraction)

        aside = Aside()
        found = search(
            model, task, sites, self.course, self.rewind, self.rounds, drop,
            resume_from=aside.read(), watch=aside.write,
        )  # fmt: skip
        edits = apply_(model, [Mask(site, found.keep[site.name]) for site in sites])
        notes = [
            f"{1 - sparsity_of(found.keep):.2%} of the weights are left after {self.rounds} rounds, each trained from "
            f"step {self.rewind.step} of {self.steps} on with an optimizer that has seen nothing"
        ]
        if self.rewind.step > 0.2 * self.steps:
            notes.append(
                f"step {self.rewind.step} is {self.rewind.step / self.steps:.0%} of training: past a fifth of it, "
                "going back is little more than fine-tuning"
            )
        if self.probe is not None:
            notes += self._stability(model, task, sites, found, self.probe)
            found.end.restore_(model)
        return Outcome(model, edits, found.history, notes=notes + found.history.notes)

    def _stability(self, model: nn.Module, task: Task, sites: Sequence[Site], found: Rounds, probe: Twins) -> list[str]:
        """Both stabilities of the ticket and of a random mask: curves at step k, and lines."""
        whole = probe.whole(model, task, found.early, self.course)
        masks = {"the ticket": found.keep, "a random mask": shuffled(found.keep, generator(task, "random mask"))}
        said = []
        for who, keep in masks.items():
            seen = probe.read(model, task, sites, keep, found.early, self.course, whole)
            for name, apart in (("pruning", seen.pruning), ("data order", seen.order)):
                found.history.log(f"distance by {name} of {who}", self.rewind.step, apart.share)
                said.append(
                    f"stability to {name} of {who}: ends {apart.distance:.4g} apart, {apart.share:.1%} of the norm, "
                    f"at {apart.angle:.0f} degrees"
                )
            if seen.noise is not None:
                said.append(f"two trainings of {who} that should be one end {seen.noise:.4g} apart")
            if seen.barrier is not None:
                said.append(f"between two orders' ends of {who}, {task.metric} is worse by {seen.barrier:.4g} at most")
        return said
