"""Before any training, keep the connections that the loss would notice most.

Lee, Ajanthan, Torr. "SNIP: Single-shot Network Pruning based on Connection Sensitivity." ICLR 2019. arXiv:1810.02340,
section 4.1 and algorithm 1: |w dL/dw| on one batch at the initial weights, the best of all layers together stay, and
what is left is trained.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Global
from secateur.axes.at_init import check_training, trained_from_start
from secateur.axes.probes import Snip as Probe
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Card, Method, check_count
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Snip(Method):
    """Score once by connection sensitivity, cut, train under the mask."""

    sparsity: float = 0.9  # of all prunable weights together
    samples: int = 128  # labelled examples to score on
    allocation: Allocation = Global()  # one ranking of all layers; global(floor=0.0005) keeps each from vanishing
    steps: int = 1000  # of training under the mask; 0: choose only
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        0,
        "SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        arxiv="1810.02340",
        venue="ICLR",
        year=2019,
        when="before training",
        needs=("labels", "training"),
        axes="probe allocation rule",
        criterion=("first-order",),
        tasks=("classification",),
        reports="networks of 5 to 10 % of the weights train as well as the whole, chosen before training in one pass",
        checked="tests/methods/test_at_init.py::test_each_beats_chance_spent_as_evenly",
        differs=("it scores the very weights it then trains; the authors' code draws others to score",),
    )
    tiny: ClassVar = {"sparsity": 0.75, "samples": 32, "steps": 20}

    def check(self) -> None:
        """Raise SettingError for a sparsity or training that cannot be."""
        self.budget()
        check_count(self.samples, "samples")
        check_training(self.steps, self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Probe, choose, train."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        return trained_from_start(
            model, task, sites, Probe(self.samples), self.allocation, self.sparsity,
            steps=self.steps, rate_floor=self.rate_floor,
        )  # fmt: skip
