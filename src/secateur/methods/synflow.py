"""Before any training and without data, keep the weights through which most flows from end to end.

Tanaka, Kunin, Yamins, Ganguli. "Pruning neural networks without any data by iteratively conserving synaptic flow."
NeurIPS 2020. arXiv:2006.05467, section 6 and algorithm 1: the flow R is the output of the network with every parameter
replaced by its size, for an input of ones; a weight is worth |w dR/dw|, and the cut is made in rounds, so that what is
left of a narrow layer grows in worth before it is gone.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, Global
from secateur.axes.at_init import check_training, trained_from_start
from secateur.axes.probes import Synflow as Probe
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.method import Card, Method, check_count
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Synflow(Method):
    """Score by synaptic flow and cut a little, again and again; then train under the mask."""

    sparsity: float = 0.9  # of all prunable weights together
    rounds: int = 100  # of scoring and cutting
    allocation: Allocation = Global()  # one ranking of all layers; global(floor=0.0005) keeps each from vanishing
    steps: int = 1000  # of training under the mask; 0: choose only
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        0,
        "Pruning neural networks without any data by iteratively conserving synaptic flow",
        arxiv="2006.05467",
        venue="NeurIPS",
        year=2020,
        when="before training",
        needs=("labels", "training"),
        axes="probe allocation rule",
        criterion=("first-order",),
        tasks=("classification",),
        schedule=("geometric",),
        choice=("data-free",),
        reports="no layer vanishes at any sparsity that leaves it a path, where SNIP and GraSP empty whole layers",
        checked="tests/methods/test_at_init.py::test_each_beats_chance_spent_as_evenly",
        differs=("exactly as many weights go as asked: the authors' code drops what ties with its threshold",),
    )
    tiny: ClassVar = {"sparsity": 0.75, "rounds": 10, "steps": 20}

    def check(self) -> None:
        """Raise SettingError for a sparsity or training that cannot be."""
        self.budget()
        check_count(self.rounds, "rounds of scoring and cutting")
        check_training(self.steps, self.rate_floor)

    def training_steps(self) -> int:
        """See Method: rounds score and cut, and do not train."""
        return self.steps

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Probe, choose, train."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        return trained_from_start(
            model, task, sites, Probe(self.rounds), self.allocation, self.sparsity,
            steps=self.steps, rate_floor=self.rate_floor,
        )  # fmt: skip
