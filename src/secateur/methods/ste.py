"""N of every M weights from the start, and every weight learns as if none were masked.

The straight-through estimator: Bengio, Leonard, Courville. "Estimating or Propagating Gradients Through Stochastic
Neurons for Conditional Computation." 2013. arXiv:1308.3432; for N:M masks Zhou et al. 2021, arXiv:2102.04010, section
3. The forward pass sees m W, and W takes the gradient of what was seen, at every place. The plain baseline of `sr_ste`
and `progressive_nm`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import NM, Pattern
from secateur.axes.remasking import Phases, Remask
from secateur.axes.rules import LearningRate, StraightThrough
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class Ste(Method):
    """Train with hard N:M masks, chosen anew at every step, the gradient going straight through them."""

    pattern: Pattern = NM(2, 4)  # n of every m consecutive inputs are KEPT
    dense: float = 0.0  # fraction of training without masks, at its start
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense; m must divide the inputs of the rest

    card: ClassVar = Card(
        0,
        "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional Computation",
        arxiv="1308.3432",
        year=2013,
        when="during training",
        needs=("labels", "training"),
        axes="pattern rule",
        criterion=("magnitude",),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("one-shot",),
        allocation=("uniform",),
        reports="the baseline of N:M training: from scratch behind SR-STE on ImageNet, the more the sparser",
        checked="tests/methods/test_progressive_nm.py::test_a_step_straight_through_by_hand",
        differs=("of equal weights the last stay, as everywhere here",),
    )
    tiny: ClassVar = {
        "steps": 30,
        "include": (r"re:^(?!conv\.weight|vit\.embeddings)",),  # first layers of 3 channels, which 4 does not divide
    }

    def phases(self) -> Phases:
        """Hard masks as soon as the dense phase is over."""
        return Phases(target=self.pattern, dense=self.dense, final=0.0)

    def rule(self, sites: Sequence[Site]) -> Remask:
        """The rule of a training loop: `attach(optimizer, model, method.rule(weights(model)), steps)`."""
        return Remask(sites, self.phases(), StraightThrough())

    def budget(self) -> Budget:
        """1 - n/m of the weights of the layers that are pruned."""
        return Budget(self.phases().aim.fixed)

    def check(self) -> None:
        """Raise SettingError for settings that cannot be, PatternError for a pattern that is not N:M."""
        self.phases()
        if self.steps < 1:
            raise SettingError(
                f"sparse training of {self.steps} steps was asked for", "it needs one at least", "Give steps above 0."
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train under masks that move; the last are the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        remask = self.rule(sites)
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), remask])
        return Outcome(model, apply_(model, remask.masks()), history, notes=remask.remarks(self.steps) + history.notes)
