"""Before any training, keep the weights without which gradients would fade.

Wang, Zhang, Grosse. "Picking Winning Tickets Before Training by Preserving Gradient Flow." ICLR 2020.
arXiv:2002.07376, section 4.1 and algorithm 1: a weight's going changes the gradient's squared norm by about
-w (H g); those whose going would raise it, or lower it least, go. H g costs one more backward pass.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Global
from secateur.axes.at_init import check_training, trained_from_start
from secateur.axes.probes import Grasp as Probe
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Card, Method, check_count
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Grasp(Method):
    """Score once by gradient flow, cut, train under the mask."""

    sparsity: float = 0.9  # of all prunable weights together
    per_class: int = 10  # labelled examples of each class to score on; more where there are few classes
    temperature: float = 200.0  # the logits are divided by while scoring
    allocation: Allocation = Global()  # one ranking of all layers; global(floor=0.0005) keeps each from vanishing
    steps: int = 1000  # of training under the mask; 0: choose only
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        0,
        "Picking Winning Tickets Before Training by Preserving Gradient Flow",
        arxiv="2002.07376",
        venue="ICLR",
        year=2020,
        when="before training",
        needs=("labels", "training"),
        axes="probe allocation rule",
        criterion=("second-order",),
        tasks=("classification",),
        reports="ahead of SNIP where very little stays: ResNet-32 and VGG-19 with 2 % of the weights",
        checked="tests/methods/test_at_init.py::test_each_beats_chance_spent_as_evenly",
        differs=(
            "it scores the very weights it then trains; the authors' code draws other linear layers to score",
            "exactly as many weights go as asked: the authors' code keeps or drops all that tie with its threshold",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "per_class": 4, "steps": 20}

    def check(self) -> None:
        """Raise SettingError for a sparsity or training that cannot be."""
        self.budget()
        check_count(self.per_class, "examples of each class")
        check_training(self.steps, self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Probe, choose, train."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        return trained_from_start(
            model, task, sites, Probe(self.per_class, self.temperature), self.allocation, self.sparsity,
            steps=self.steps, rate_floor=self.rate_floor,
        )  # fmt: skip
