"""Wanda: a weight matters if it is large, or if what flows into it is loud.

Sun, Liu, Bair, Kolter. "A Simple and Effective Pruning Approach for Large Language Models." ICLR 2024.
arXiv:2306.11695, section 3, equation 1: S[i, j] = |W[i, j]| * ||X[:, j]||, compared within each output row.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Pattern, PerRow, Rank, Uniform
from secateur.axes import Wanda as Score
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True, kw_only=True)
class Wanda(Method):
    """Score every matrix once and keep the best weights of each output row.

    No gradient, no weight update, no retraining.
    """

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    samples: int = 128  # calibration sequences, as in the paper
    pattern: Pattern = PerRow()  # 2:4 gives the paper's N:M results
    allocation: Allocation = Uniform()  # owl spends more where scores have outliers
    feed: Feed = "pruned"  # a block is scored on what the blocks pruned before it put out
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "A simple and effective pruning approach for large language models",
        arxiv="2306.11695",
        year=2023,
        needs=("calibration",),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="criterion pattern allocation",
        criterion=("activation",),
        tasks=("language modelling",),
        reports="LLaMA-2-7B, WikiText-2 perplexity: dense 5.12, 50 % 6.42 (magnitude 14.89), 2:4 11.02.",
        checked="tests/methods/test_oneshot.py::test_wanda_by_hand",
        differs=("A row keeps the whole number nearest to its share, where the code removes the share rounded down.",),
    )
    tiny: ClassVar = {"samples": 4}

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        sites, solver = weights(model, self.include, self.exclude), Rank(Score(), self.pattern)
        batches = list(task.batches("calibration", self.samples))
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(
            model, sites, allocation, Budget(self.sparsity), solver.criterion, batches, task=task, pattern=self.pattern
        )
        return Outcome(model, sweep(model, sites, solver, keep, batches, self.feed), notes=notes)
