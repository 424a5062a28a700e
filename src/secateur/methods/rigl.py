"""Sparse from first step to last: at times the smallest weights go, and others come where the loss is steep.

Evci, Gale, Menick, Castro, Elsen. "Rigging the Lottery: Making All Tickets Winners." ICML 2020. arXiv:1911.11134,
section 3 and algorithm 1. The number of weights in each layer, an ERK share, never changes; on an update step masks
move in place of the weights, fewer and fewer of them: alpha / 2 (1 + cos(pi t / T_end)).

With updates far apart and to the end (every=1000, until=1) every weight gets its turn and the time to prove itself:
in-time over-parameterization (Liu et al. 2021, arXiv:2102.02887).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Erk
from secateur.axes.allocations import check_scoreless, inhabited
from secateur.axes.growth import Cleared, Moments, Rewire, Steepest, random_masks
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Cosine, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class RigL(Method):
    """Train sparse, replacing small weights by ones with large gradients."""

    sparsity: float = 0.9  # of all prunable weights together, throughout
    allocation: Allocation = Erk()  # each layer's share
    exchange: float = 0.3  # fraction of each layer exchanged at first, falling to none as a cosine: alpha
    until: float = 0.75  # fraction of training after which masks are fixed: T_end
    every: int = 100  # optimizer steps between updates: dt
    memory: float = 0.0  # of past gradients in choosing what grows; 0.9: sparse networks from scratch (SNFS)
    moments: Moments = Cleared()  # what the optimizer is told of grown weights; typical is safer with Adam
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        0,
        "Rigging the Lottery: Making All Tickets Winners",
        arxiv="1911.11134",
        venue="ICML",
        year=2020,
        when="during training",
        needs=("labels", "training"),
        axes="schedule allocation rule growth",
        criterion=("magnitude", "first-order"),
        tasks=("classification", "language modelling"),
        stage=("sparse to sparse",),
        schedule=("custom",),
        reports="a ResNet-50 of 20 % of the weights throughout has 75.1 % top-1 on ImageNet against 76.8 % dense",
        checked="tests/methods/test_granet.py::test_rigl_worked_by_hand",
        differs=("ties are settled by place; the authors' code adds noise",),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 40, "every": 5}

    def exchanges(self) -> Schedule:
        """The fraction exchanged."""
        return Schedule(start=self.exchange, end=0.0, until=self.until, curve=Cosine(), every=self.every, falling=True)

    def check(self) -> None:
        """Raise SettingError for schedules that cannot be, or training too short to hold them."""
        self.budget()
        Rewire([], {}, self.exchanges(), coming=Steepest(self.memory))
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
            coming=Steepest(self.memory),
            moments=self.moments,
            whole=int,
            instead=True,
            seed=task.seed,
        )
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), rewire])
        return Outcome(model, apply_(model, rewire.masks()), history, notes=rewire.remarks() + history.notes)
