"""Prune a little at a time while training, fast at first and slowly at the end.

Zhu, Gupta. "To prune, or not to prune: exploring the efficacy of pruning for model compression." 2017.
arXiv:1710.01878, section 3, equation 1:

    s(t) = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3        for t in {t_0, t_0 + dt, ..., t_0 + n dt}

At each update every layer keeps its largest weights, as many as s(t) says. A masked weight gets no gradient and keeps
its last value, so that it comes back when the weights that stayed shrink below it.

Differs: the last update is always made at the end of the window, whatever dt divides, or s_f is never reached.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Pattern, PerMatrix, Uniform
from secateur.axes.patterns import check_pattern
from secateur.axes.rules import Gradual, Hold, LearningRate, Shadow
from secateur.axes.schedules import Power, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class GradualPruning(Method):
    """Train with a sparsity that rises along a cubic ramp."""

    sparsity: float = 0.9  # of each layer, at the end: s_f
    start: float = 0.0  # and at the beginning: s_i
    begin: float = 0.1  # fraction of training at which the ramp starts
    until: float = 0.7  # and ends; masks never change after it
    every: int = 100  # optimizer steps between updates: dt
    power: float = 3.0  # 3 is the paper's cubic; 1 is linear
    steps: int = 1000  # of training in all
    revive: bool = True  # masked weights keep their values and may come back; False: they are zero for good
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    allocation: Allocation = Uniform()
    pattern: Pattern = PerMatrix()
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        5,
        "To prune, or not to prune: exploring the efficacy of pruning for model compression",
        arxiv="1710.01878",
        year=2017,
        when="during training",
        needs=("labels", "training"),
        axes="schedule criterion allocation pattern rule",
        criterion=("magnitude",),
        start=("initialised", "pretrained"),
        tasks=("classification", "language modelling"),
        stage=("score or mask",),
        schedule=("cubic",),
        reports="a large sparse model beats a small dense one with as many non-zero weights",
        checked="tests/methods/test_gradual.py::test_large_sparse_beats_small_dense",
        differs=(
            "the last update is always made at the window's end, so that the target is reached exactly",
            "the number kept is n - floor(s n), where the TensorFlow code rounds n (1 - s)",
            "masked weights are held to the bit; in the paper's code weight decay and momentum still move them",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 40, "every": 5}

    def schedule(self) -> Schedule:
        """The ramp."""
        return Schedule(
            start=self.start,
            end=self.sparsity,
            begin=self.begin,
            until=self.until,
            curve=Power(self.power),
            every=self.every,
        )

    def check(self) -> None:
        """Raise SettingError for a ramp that cannot be, or training too short to hold it."""
        self.schedule().check_sparsity()
        check_pattern(self.pattern, self.sparsity)
        if self.steps < 1:
            raise SettingError(
                f"a ramp over {self.steps} steps was asked for", "it needs training to happen in", "Give steps above 0."
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train under the ramp; the masks it ends with are the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        holder = Shadow(sites) if self.revive else Hold(sites)
        ramp = Gradual(sites, self.schedule(), allocation=self.allocation, pattern=self.pattern, holder=holder)
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), ramp])
        edits = apply_(model, ramp.masks())
        gone = sum(mask.site.units - mask.kept for mask in ramp.masks())
        units, total = sum(site.units for site in sites), sum(p.numel() for p in model.parameters())
        notes = [
            f"{gone:,} weights are zero: {gone / units:.2%} of the {units:,} in pruned layers, {gone / total:.2%} of "
            f"all {total:,} parameters",
            "masked weights kept their values and could come back" if self.revive else "masked weights were gone",
        ]
        return Outcome(model, edits, history, notes=notes + history.notes)
