"""Prune while pre-training, in the middle of the compute: what counts is how many parameters there were on average.

Jin, Humayun, Evci, Subramanian, Yazdanbakhsh, Alistarh, Dziugaite. "The Journey Matters: Average Parameter Count over
Pre-training Unifies Sparse and Dense Scaling Laws." ICLR 2025. arXiv:2501.12486: dense until a quarter of the compute
is spent, then the smallest weights of all matrices together go, a constant share of what is left at each of n events,

    keep a fraction (1 - S)^((i + 1) / n) of all weights at event i = 0 ... n - 1

until three quarters are, then the rest with the mask held. A step costs as much as there are weights, so that a share
of the compute is not a share of the steps. The law of dense training holds with the mean over training as the count:

    L = E + A / N_mean^alpha + B / D^beta,      N_mean = (1 / T) sum over t of N_t

Differs: an event falls on every `every`-th step from the window's start, where the paper's code wants steps divisible
by it and shifts events that are not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import Exponential, Global, Schedule
from secateur.axes.clipping import Clip
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import BudgetError, SettingError
from secateur.method import Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, total_units
from secateur.task import Task
from secateur.train import Loop, Rule, fit


@dataclass(frozen=True)
class Window:
    """When weights go, in optimizer steps: events at start, start + every, ..., end; training goes on to `steps`."""

    start: int
    end: int
    steps: int
    every: int
    sparsity: float

    @property
    def events(self) -> int:
        """How many times weights are removed: n."""
        return (self.end - self.start) // self.every + 1

    def density(self, step: int) -> float:
        """The fraction of weights that is there while a step is taken, counted from 0."""
        if step < self.start or not self.sparsity:
            return 1.0
        done = min((step - self.start) // self.every + 1, self.events)
        return (1 - self.sparsity) ** (done / self.events)

    @property
    def compute(self) -> float:
        """The cost of all steps, in steps of the dense network."""
        return sum(self.density(step) for step in range(self.steps))

    @property
    def average(self) -> float:
        """The mean fraction of weights over training: N_mean / N."""
        return self.compute / self.steps

    def schedule(self) -> Schedule:
        """As a schedule of sparsity: an exponential that starts one interval early, so that the first event counts."""
        if self.events == 1:
            share = self.start / self.steps
            return Schedule(end=self.sparsity, begin=share, until=share, every=self.every)
        return Schedule(
            end=self.sparsity,
            begin=(self.start - self.every) / self.steps,
            until=self.end / self.steps,
            curve=Exponential(-log(1 - self.sparsity)) if self.sparsity else Exponential(),
            every=self.every,
        )


def window(budget: float, sparsity: float, begin: float = 0.25, until: float = 0.75, every: int = 1) -> Window:
    """The steps between which to prune so that `begin` and `until` of the compute are spent then, and `budget` in all.

    The budget is in steps of the dense network. In the limit of small intervals pruning lasts
    (until - begin) budget (-ln(1 - S)) / S steps and what comes after (1 - until) budget / (1 - S). `begin` equal to
    `until` is all at once. The first event of several is no earlier than one interval in. Raises SettingError for
    fractions out of order, BudgetError for a budget that leaves no room for two events.
    """
    check_sparsity(sparsity)
    if not 0 <= begin <= until <= 1:
        raise SettingError(
            f"pruning from {begin:g} to {until:g} of the compute was asked for",
            "they are fractions of it, the first not above the second",
            "Give 0.25 and 0.75, say.",
        )
    if every < 1:
        raise SettingError(f"an event every {every} steps was asked for", "steps are whole", "Give 1 or more.")
    lasts = (until - begin) * budget * (-log(1 - sparsity) / sparsity if sparsity else 1.0)
    start = round(begin * budget) if begin == until else max(round(begin * budget), every)
    count = round(lasts / every)
    if begin < until and count < 1:
        raise BudgetError(
            f"pruning over {until - begin:.0%} of {budget:g} steps' compute, every {every} steps, was asked for",
            f"that is {lasts:.1f} steps, in which there is no room for two events",
            "Give a larger budget, or a smaller interval.",
        )
    end = start + count * every
    spent = start + sum((1 - sparsity) ** ((i + 1) / (count + 1)) for i in range(count)) * every
    steps = end + max(round((budget - spent) / (1 - sparsity)), 0)
    return Window(start, max(end, 0), max(steps, end, 1), every, sparsity)


class Masking(Protocol):
    """A rule that knows which units are there."""

    @property
    def keep(self) -> Mapping[str, Tensor]:
        """Masks: site name -> bool."""
        ...


class Accountant(Rule):
    """Counts the weights that are there at every step, and their mean over training.

    Goes after the rule whose masks it reads; without one it counts a dense network. The curve "active parameters" has a
    point for every change.
    """

    def __init__(self, sites: Sequence[Site], masking: Masking | None = None) -> None:
        self.sites, self.masking = list(sites), masking
        self.spent = 0.0  # sum over steps of the weights that were there
        self.steps = 0
        self.active = total_units(self.sites)
        self._seen: Mapping[str, Tensor] | None = None

    @property
    def average(self) -> float:
        """Weights over training, in the mean: N_mean; before the first step, all there are."""
        return self.spent / self.steps if self.steps else float(self.active)

    def before_forward(self, loop: Loop) -> None:
        """Count what this step is taken with."""
        if self.masking is not None and self.masking.keep is not self._seen:
            self._seen = self.masking.keep
            self.active = sum(int(torch.count_nonzero(self._seen[site.name])) for site in self.sites)
            loop.log("active parameters", self.active)
        self.spent += self.active
        self.steps += 1

    def finish(self, loop: Loop) -> None:
        """What is there in the end."""
        if self.masking is not None:
            self.active = sum(int(torch.count_nonzero(self.masking.keep[site.name])) for site in self.sites)
        loop.log("average parameters", self.average)

    def state(self) -> dict[str, Any]:
        """The sum so far."""
        return {"spent": self.spent, "steps": self.steps}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """Go on from it."""
        self.spent, self.steps, self._seen = state["spent"], state["steps"], None


@dataclass(frozen=True, kw_only=True)
class AverageParameters(Method):
    """Pre-train on a budget of compute, with the smallest weights going between a quarter and three quarters of it."""

    sparsity: float = 0.5  # of all prunable weights together, at the end: S
    budget_steps: float = (
        1000  # the compute, in steps of the dense network; the run has more steps, as they get cheaper
    )
    begin: float = 0.25  # share of the compute at which pruning starts
    until: float = 0.75  # and ends; equal to begin: all at once
    every: int = 20  # optimizer steps between events
    warmup: float = 0.05  # fraction of the steps in which the learning rate rises
    rate_floor: float = 0.1  # learning rate at the end of its cosine, as a fraction of the highest
    norm: float = 1.0  # gradients are clipped to it
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense, and out of the count

    card: ClassVar = Card(
        8,
        "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
        arxiv="2501.12486",
        year=2025,
        when="during training",
        needs=("labels", "training"),
        axes="schedule criterion allocation rule",
        criterion=("magnitude",),
        tasks=("language modelling",),
        stage=("score or mask",),
        schedule=("custom",),
        allocation=("score-driven",),
        reports="pruned at 25 to 75 % of the compute, a network is as good as a dense one trained as long that has as "
        "many parameters as it had on average, and smaller in the end",
        checked="tests/methods/test_average_parameters.py::test_the_plan_is_that_of_the_released_models",
        differs=(
            "events start at the window's start, whatever the interval divides; the paper's code fires at multiples of "
            "the interval, which moves events of a start that is none",
            "the last event leaves n - floor(S n) weights where the code keeps int((1 - S) n): at most one more",
            "the output projection is dense and not counted unless exclude= says otherwise; the code prunes one that "
            "is not tied",
            "what is gone is exactly zero, and so are its gradient and what the optimizer knows of it",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.6, "budget_steps": 24, "every": 4}

    def window(self) -> Window:
        """When weights go."""
        return window(self.budget_steps, self.sparsity, self.begin, self.until, self.every)

    def check(self) -> None:
        """Raise SettingError or BudgetError for a window that cannot be."""
        self.window().schedule().check_sparsity()
        LearningRate(warmup=self.warmup, floor=self.rate_floor)
        Clip(self.norm)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train in three phases; the masks it ends with are the edits."""
        self.check()
        plan, sites = self.window(), weights(model, self.include, self.exclude)
        ramp = Gradual(sites, plan.schedule(), allocation=Global(), holder=Hold(sites))
        count = Accountant(sites, ramp)
        rate = LearningRate(warmup=self.warmup, floor=self.rate_floor)
        history = fit(model, task, plan.steps, [rate, ramp, count, Clip(self.norm)])
        edits = apply_(model, ramp.masks())
        units = total_units(sites)
        first, last = plan.start / plan.steps, plan.end / plan.steps
        notes = [
            f"weights went between steps {plan.start:,} and {plan.end:,} of {plan.steps:,}: {first:.0%} to {last:.0%} "
            f"of the steps, {self.begin:.0%} to {self.until:.0%} of the compute",
            f"{count.average:,.0f} weights on average ({count.average / units:.2%} of {units:,}), {count.active:,} in "
            f"the end; {count.spent / units:,.1f} dense steps' compute",
        ]
        return Outcome(model, edits, history, notes=notes + history.notes)
