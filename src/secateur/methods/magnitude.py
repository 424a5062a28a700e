"""Magnitude: a weight matters if it is large.

The oldest criterion and the baseline of every other; Hagiwara 1994, Han et al. 2015, arXiv:1506.02626.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Pattern, PerMatrix, Rank, Uniform
from secateur.axes import Magnitude as Score
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Magnitude(Method):
    """Keep the largest weights of each matrix, or of all together. No data, no update."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    pattern: Pattern = PerMatrix()
    allocation: Allocation = Uniform()  # global: one threshold for all, usual on CNNs and poor on language models
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "Learning both weights and connections for efficient neural networks",
        arxiv="1506.02626",
        year=2015,
        axes="criterion pattern allocation",
        criterion=("magnitude",),
        tasks=("any",),
        reports="LLaMA-2-7B at 50 %: WikiText-2 perplexity 14.89 against 5.12 dense (figures of the Wanda paper).",
        checked="tests/methods/test_oneshot.py::test_magnitude_keeps_the_largest",
    )

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        sites, solver = weights(model, self.include, self.exclude), Rank(Score(), self.pattern)
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(model, sites, allocation, Budget(self.sparsity), solver.criterion, (), pattern=self.pattern)
        return Outcome(model, sweep(model, sites, solver, keep, ()), notes=notes)
