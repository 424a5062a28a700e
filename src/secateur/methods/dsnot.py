"""DSnoT: swap what a mask left out for what it kept until each output is right on average; no training, no update.

Zhang, Zhao, Lin, Sun, Yao, Han, Tanner, Liu, Ji. "Dynamic Sparse No Training: Training-Free Fine-tuning for Sparse
LLMs." ICLR 2024. arXiv:2310.08915, section 3, algorithm 1. The swaps themselves are secateur.axes.Dsnot.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Criterion, Dsnot, Pattern, PerRow, Rank, Uniform, Wanda
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import BySite, gradients, refined_sites, spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True, kw_only=True)
class DSnoT(Method):
    """Choose by any criterion, then improve the choice row by row with the inputs' means and variances."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    samples: int = 128  # calibration sequences, as in the paper
    start: Criterion = Wanda()  # what makes the first choice: magnitude and obs (SparseGPT's) are in the paper too
    refine: Dsnot = Dsnot()  # how the choice is improved
    only: tuple[str, ...] = ("attention",)  # where it is, by name, class or role, as in the authors' code; () is all
    pattern: Pattern = PerRow()  # per-row, per-matrix or n:m
    allocation: Allocation = Uniform()
    feed: Feed = "pruned"
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        28,
        "Dynamic sparse no training: training-free fine-tuning for sparse LLMs",
        arxiv="2310.08915",
        year=2023,
        needs=("calibration",),
        families=("decoder", "encoder", "vision transformer", "moe"),
        axes="criterion pattern allocation refiner",
        criterion=("activation",),
        tasks=("language modelling",),
        reports="LLaMA-7B at 70 %: WikiText-2 perplexity 26.79 below Wanda's; gains are small at 50 %.",
        checked="tests/methods/test_dsnot.py::test_rows_equal_the_published_procedure",
        differs=(
            "The mean is per token and the threshold 0.1 / 2048, where the code sums over a sequence of 2,048.",
            "A weight grows only if it lowers the error, and a row without candidates stops; the code's pointer can "
            "walk into kept weights and change how many a row keeps.",
            "A row keeps the whole number nearest to its share, where the code removes the share rounded down.",
            "In groups, a grown weight whose group has no partner left is passed over, for the same reason.",
            "SparseGPT's scores come from the inputs' second moments; the code never sums them, so that its scores "
            "are all zero.",
            "Inputs without variance are given a small one, and those with a mean of zero are no candidates.",
        ),
    )
    tiny: ClassVar = {"samples": 4}

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)
        self.refine.fits(self.pattern)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises SettingError when nothing is to be refined."""
        sites, first = weights(model, self.include, self.exclude), Rank(self.start, self.pattern)
        solver = BySite(refined_sites(model, sites, self.only), replace(first, refine=self.refine), first)
        batches = list(task.batches("calibration", self.samples))
        whole = gradients(model, sites, batches, solver.needs, task.loss)
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(
            model, sites, allocation, Budget(self.sparsity), self.start, batches, whole, task, pattern=self.pattern
        )
        return Outcome(model, sweep(model, sites, solver, keep, batches, self.feed, whole), notes=notes)
