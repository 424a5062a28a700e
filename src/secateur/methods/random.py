"""Random: nothing matters more than anything else. What every criterion must beat."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Pattern, PerMatrix, Rank, Uniform
from secateur.axes import Random as Score
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep weights by the toss of the task's own coin. The control in every comparison."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    pattern: Pattern = PerMatrix()
    allocation: Allocation = Uniform()
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "Random pruning (control)",
        venue="folklore",
        year=1990,
        axes="criterion pattern allocation",
        criterion=("random",),
        tasks=("any",),
        checked="tests/methods/test_oneshot.py::test_random_depends_on_the_seed_alone",
    )

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        sites, solver = weights(model, self.include, self.exclude), Rank(Score(task.seed), self.pattern)
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(model, sites, allocation, Budget(self.sparsity), solver.criterion, (), pattern=self.pattern)
        return Outcome(model, sweep(model, sites, solver, keep, ()), notes=notes)
