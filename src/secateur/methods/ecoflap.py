"""ECoFLaP: first ask the whole model, by forward passes alone, where the loss is steep; then prune layer by layer.

Sung, Yoon, Bansal. "ECoFLaP: Efficient Coarse-to-Fine Layer-Wise Pruning for Vision-Language Models." ICLR 2024.
arXiv:2310.02998. The coarse stage, which gives every block of every tower its sparsity, is secateur.axes.Ecoflap; the
fine stage is Wanda or SparseGPT with those.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Criterion, Ecoflap, ObsSweep, Pattern, PerMatrix, PerRow, Rank, Wanda
from secateur.axes.patterns import check_pattern
from secateur.axes.solvers import Solver
from secateur.axes.sweep import BySite, fitted, gradients, spread, sweep
from secateur.axes.zeroth_order import component
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True, kw_only=True)
class ECoFLaP(Method):
    """Give each block its sparsity by the steepness of the loss, over all towers at once, then decide within it."""

    sparsity: float = 0.5  # fraction of all the weights set to zero, in [0, 1)
    samples: int = 128  # calibration examples of the fine stage; the coarse one has a number of its own
    allocation: Allocation = Ecoflap()  # the coarse stage: how steep the loss is, what shares a sparsity, budgets
    criterion: Criterion = Wanda()  # the fine stage: what makes a weight worth keeping within its matrix
    pattern: Pattern = PerRow()  # which choices are legal
    solver: Rank | ObsSweep = Rank()  # rank by the criterion, or obs-sweep, which is SparseGPT
    whole: tuple[str, ...] = ()  # towers ranked by matrix rather than by row; the authors' code does so for pictures
    feed: Feed = "pruned"  # a block is scored on what the blocks pruned before it put out
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        33,
        "ECoFLaP: efficient coarse-to-fine layer-wise pruning for vision-language models",
        arxiv="2310.02998",
        year=2023,
        needs=("calibration",),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="allocation criterion pattern solver",
        criterion=("activation", "magnitude", "second-order"),
        tasks=("retrieval", "language modelling"),
        gradients=("none",),
        updates=("none", "solved"),
        models=("vision-language",),
        reports="BLIP at 50 % without training: Flickr30k image retrieval at 1 is 86.9 dense, 72.3 by Wanda, 79.5 by "
        "ECoFLaP; COCO CIDEr 133.3, 97.1, 111.0.",
        checked="tests/methods/test_ecoflap.py::test_the_mean_slope_is_the_norm_of_the_gradient",
        differs=(
            "A tensor that was moved is put back from a copy of it, bit for bit, where the code takes the noise away "
            "again and leaves a rounding error at every draw; the copy is of one tensor at a time.",
            "Four draws of noise per batch, where the paper takes one over smaller and more batches.",
            "The budget is met to the weight; the code adds what rounding up gave away instead of taking it back, and "
            "keeps too much.",
            "Where no block that has room has a score, what is left goes by room; the code's shares become NaN there.",
            "Every tower is ranked by row unless `whole` names it; the code ranks the pictures' by matrix.",
        ),
    )
    tiny: ClassVar = {"samples": 4}

    def check(self) -> None:
        """See Method. Raises SettingError or PatternError for parts that contradict one another."""
        super().check()
        check_pattern(self.pattern, self.sparsity)
        if self.pattern.fixed is not None:
            raise SettingError(
                f"blocks of different sparsities were asked for in the pattern {self.pattern}",
                "it prescribes what every matrix keeps",
                "Use wanda or sparsegpt with it, or another pattern here.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises BudgetError for budgets of towers that do not fit together, SiteError for a component
        that is not there, EvidenceError when the loss feels nothing."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        apart = {site.name for name in self.whole for site in component(sites, name)}
        solver = self.fine(apart)
        batches = list(task.batches("calibration", self.samples))
        whole = gradients(model, sites, batches, solver.needs, task.loss)
        wanted = spread(model, sites, self.allocation, Budget(self.sparsity), self.criterion, batches, whole, task)
        return Outcome(model, sweep(model, sites, solver, self.legal(sites, wanted, apart), batches, self.feed, whole))

    def fine(self, apart: Collection[str]) -> Solver:
        """What decides a matrix: by row, and in the sites apart anywhere in it."""

        def of(pattern: Pattern) -> Solver:
            found = replace(self.solver, pattern=pattern)
            return replace(found, criterion=self.criterion) if isinstance(found, Rank) else found

        return BySite(apart, of(PerMatrix()), of(self.pattern)) if apart else of(self.pattern)

    def legal(self, sites: Sequence[Site], keep: Mapping[str, int], apart: Collection[str]) -> dict[str, int]:
        """Counts that the patterns can keep, the total held."""
        there = [site for site in sites if site.name in apart]
        rest = [site for site in sites if site.name not in apart]
        return {**fitted(there, keep, PerMatrix()), **fitted(rest, keep, self.pattern)}
