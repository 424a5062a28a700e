"""One shot, of any parts: criterion, pattern, allocation, solver, refiner and recovery, whoever published them.

No paper: the pipeline that one-shot methods share, with each of its parts a setting. `wanda`, `sparsegpt`, `gblm` and
`dsnot` are this with the parts their authors chose.

    OneShot(criterion=Gblm(), pattern=NM(2, 4), refine=Dsnot(), recover=Perp(steps=200))
"""

import copy
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import nn

from secateur.axes import (
    Allocation,
    Criterion,
    ObsSweep,
    Pattern,
    PerRow,
    Rank,
    Refiner,
    Solver,
    Uniform,
    Wanda,
    text_of,
)
from secateur.axes.allocations import Measuring
from secateur.axes.patterns import check_pattern
from secateur.axes.recovery import Recovery, recovered
from secateur.axes.sweep import BySite, gradients, refined_sites, spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True, kw_only=True)
class OneShot(Method):
    """Score, spend the budget, then decide block after block, each part as you choose it."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    samples: int = 128  # calibration examples
    criterion: Criterion = Wanda()  # what makes a weight worth keeping; what an allocation looks at, too
    pattern: Pattern = PerRow()  # which choices are legal
    allocation: Allocation = Uniform()  # how the budget is spent over the matrices
    solver: Rank | ObsSweep = Rank()  # rank by the criterion, or obs-sweep, which chooses and mends in one
    refine: Refiner | None = None  # what improves a choice before it is applied
    recover: Method | None = None  # what trains the pruned model back, its zeros in place: perp
    only: tuple[str, ...] = ()  # where choices are refined, by name, class or role; () is everywhere
    feed: Feed = "pruned"  # what reaches a block: outputs of the blocks as they are by now, or as they were (dense)
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "One shot, of any parts",
        venue="secateur",
        year=2026,
        needs=("calibration",),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="criterion pattern allocation solver refiner recovery",
        criterion=("magnitude", "activation", "first-order", "second-order", "random"),
        gradients=("none", "first"),  # second-order scores are of inputs, not of the loss
        choice=("data-free", "data-driven"),
        tasks=("any",),
        updates=("none", "solved"),
        checked="tests/methods/test_oneshot_combinations.py::test_every_legal_combination_runs_and_meets_its_budget",
    )
    tiny: ClassVar = {"samples": 4}

    def check(self) -> None:
        """See Method. Raises SettingError or PatternError for parts that contradict one another."""
        super().check()
        check_pattern(self.pattern, self.sparsity)
        if self.refine is not None:
            self.refine.fits(self.pattern)
        elif self.only:
            raise SettingError(
                f"only {', '.join(self.only)} was to be refined", "there is no refiner", "Give refine=dsnot, say."
            )
        own = type(self.solver)()
        for part in ("criterion", "pattern", "refine"):
            if getattr(self.solver, part, None) != getattr(own, part, None):
                raise SettingError(
                    f"the solver {text_of(self.solver)} was asked for",
                    f"its {part} is a setting beside it",
                    f"Give {part}={text_of(getattr(self.solver, part))} instead.",
                )
        if isinstance(self.solver, ObsSweep):
            self._check_sweep()
        if self.recover is not None:
            self._check_recovery(self.recover)

    def _check_recovery(self, recover: Method) -> None:
        asked = f"a pruned model was to be recovered by {recover.name}"
        if not isinstance(recover, Recovery):
            raise SettingError(asked, "it prunes", "Give recover=perp, or run one after the other in a chain.")
        before = getattr(recover, "after", None)
        if before is not None:
            raise SettingError(
                asked,
                f"it prunes first, by {before.name}, and the model is pruned already",
                f"Give {recover.name} without after.",
            )
        recover.check()
        recover.fits_masks()

    def _check_sweep(self) -> None:
        replace(self.solver, pattern=self.pattern)  # raises for blocks that cut the pattern's groups apart
        if self.refine is not None:
            raise SettingError(
                f"a choice of {text_of(self.solver)} was to be refined by {text_of(self.refine)}",
                "the sweep changes the weights as it chooses, and what it left out cannot come back",
                "Use solver=rank with criterion=obs, the sweep's own saliency, or refine nothing.",
            )
        if self.criterion != Wanda() and not self.allocation.needs_scores:
            raise SettingError(
                f"the criterion {text_of(self.criterion)} was asked for with {text_of(self.solver)}",
                f"the sweep chooses by a saliency of its own, and {text_of(self.allocation)} looks at no scores",
                "Use solver=rank, or an allocation that looks at scores, such as owl.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises SettingError when nothing is to be refined, and where the recovery could not work."""
        self.check()
        by, dense = self.recover, None
        if isinstance(by, Recovery):
            by.ready(model, task)  # before hours of pruning, not after
            dense = copy.deepcopy(model) if by.needs_dense else None
        sites = weights(model, self.include, self.exclude)
        solver: Solver = replace(self.solver, pattern=self.pattern)
        if isinstance(solver, Rank):
            solver = replace(solver, criterion=self.criterion)
            if self.refine is not None:
                names = refined_sites(model, sites, self.only)
                solver = BySite(names, replace(solver, refine=self.refine), solver)
        allocation, notes = spendable(self.allocation, self.pattern)
        needs = solver.needs | (self.criterion.needs if allocation.needs_scores else frozenset())
        follows = isinstance(allocation, Measuring)  # the loss, over data of its own accord
        batches = list(task.batches("calibration", self.samples)) if needs or follows else []
        whole = gradients(model, sites, batches, needs, task.loss)
        budget = Budget(self.sparsity)
        keep = spread(model, sites, allocation, budget, self.criterion, batches, whole, task, self.pattern)
        done = Outcome(model, sweep(model, sites, solver, keep, batches, self.feed, whole), notes=notes)
        return recovered(done, by, task, dense) if isinstance(by, Recovery) else done
