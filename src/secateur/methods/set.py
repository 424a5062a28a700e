"""Sparse from the first step to the last: now and then the weights nearest zero go, and others come by chance.

Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta. "Scalable training of artificial neural networks with adaptive sparse
connectivity inspired by network science." Nature Communications 2018. arXiv:1707.04780, algorithm 1: sparse
evolutionary training (SET). A fraction of the smallest positive and of the largest negative weights of each layer is
replaced by as many anywhere else in it. Starts from an Erdos-Renyi mask; the paper's has no kernels, ERK counts them.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Erk
from secateur.axes.allocations import check_scoreless, inhabited
from secateur.axes.growth import AtRandom, Cleared, Leaving, Moments, NearestZero, Rewire, random_masks
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Linear, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class SparseEvolution(Method):
    """Train sparse, replacing weights near zero by random ones."""

    sparsity: float = 0.9  # of all prunable weights together, throughout
    allocation: Allocation = Erk()  # each layer's share
    exchange: float = 0.3  # fraction of each layer exchanged at each update: zeta
    leaving: Leaving = NearestZero()  # which go
    every: int = 100  # optimizer steps between updates; an epoch in the paper
    moments: Moments = Cleared()  # what the optimizer is told of grown weights; typical is safer with Adam
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        0,
        "Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network science",
        arxiv="1707.04780",
        venue="Nature Communications",
        year=2018,
        when="during training",
        needs=("labels", "training"),
        axes="schedule allocation rule growth",
        criterion=("magnitude", "random"),
        tasks=("classification",),
        stage=("sparse to sparse",),
        schedule=("custom",),
        reports="MLPs with a few percent of the weights from start to end match or beat dense ones",
        checked="tests/methods/test_granet.py::test_set_worked_by_hand",
        differs=(
            "updates come every so many steps, not epochs, and none after the last step",
            "a grown weight starts at zero, not at a random value",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 40, "every": 5}

    def exchanges(self) -> Schedule:
        """The fraction exchanged."""
        return Schedule(start=self.exchange, end=self.exchange, until=1.0, curve=Linear(), every=self.every)

    def check(self) -> None:
        """Raise SettingError for schedules that cannot be, or training too short to hold them."""
        self.budget()
        Rewire([], {}, self.exchanges())
        if self.steps < 1:
            raise SettingError(
                f"sparse training of {self.steps} steps was asked for", "it needs one at least", "Give steps above 0."
            )
        check_scoreless(self.allocation)
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """A random mask, moved on as training goes; the last is the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        counts = inhabited(sites, self.allocation.spread(sites, Budget(self.sparsity)))
        rewire = Rewire(
            sites,
            random_masks(sites, counts, task.seed),
            self.exchanges(),
            leaving=self.leaving,
            coming=AtRandom(),
            moments=self.moments,
            seed=task.seed,
        )
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), rewire])
        return Outcome(model, apply_(model, rewire.masks()), history, notes=rewire.remarks() + history.notes)
