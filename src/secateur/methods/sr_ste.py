"""N of every M weights from the start; those that are masked go on learning, and are pulled towards zero.

Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li. "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch."
ICLR 2021. arXiv:2102.04010, section 3, equation 4 (SR-STE):

    W <- W - rate * (g(m W) + strength (1 - m) W)

g is the gradient of the loss at the masked weights, handed straight on to the dense ones; without the pull weights on
the edge come and go at every step (`ste`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import NM, Pattern
from secateur.axes.remasking import Phases, Remask
from secateur.axes.rules import LearningRate, Refined
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class SrSte(Method):
    """Train with hard N:M masks, chosen anew at every step, and pull masked weights towards zero."""

    pattern: Pattern = NM(2, 4)  # n of every m consecutive inputs are KEPT
    strength: float = 2e-4  # of the pull, in the gradient: lambda_w; Adam scales it with the rest
    pull: float = 0.0  # the same, decoupled from the gradient as AdamW's decay is: weight *= 1 - rate * pull
    dense: float = 0.0  # fraction of training without masks, at its start
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense; m must divide the inputs of the rest

    card: ClassVar = Card(
        0,
        "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch",
        arxiv="2102.04010",
        venue="ICLR",
        year=2021,
        when="during training",
        needs=("labels", "training"),
        axes="pattern rule",
        criterion=("magnitude",),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("one-shot",),
        allocation=("uniform",),
        reports="masks settle, and a ResNet-50 with 2:4 from scratch is level with the dense one",
        checked="tests/methods/test_progressive_nm.py::test_sr_ste_by_hand_and_its_pull_settles_the_masks",
        differs=(
            "biases stay; the authors' sparse layers ignore theirs",
            "the pull may be decoupled from the gradient; in Adam's moments it is scaled like everything else",
            "of equal weights the last stay, as everywhere here",
        ),
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
        return Remask(sites, self.phases(), Refined(self.strength), pull=self.pull)

    def budget(self) -> Budget:
        """1 - n/m of the weights of the layers that are pruned."""
        return Budget(self.phases().aim.fixed)

    def check(self) -> None:
        """Raise SettingError for settings that cannot be, PatternError for a pattern that is not N:M."""
        self.rule([])
        if not 0 <= self.strength < float("inf"):
            raise SettingError(
                f"a pull of strength {self.strength} was asked for", "a decay is 0 or above", "Give 0.0002."
            )
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
