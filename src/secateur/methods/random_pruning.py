"""A random mask before training is no bad mask, if each layer keeps the right share.

Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy. "The Unreasonable Effectiveness of Random Pruning: Return of the Most
Naive Baseline for Sparse Training." ICLR 2022. arXiv:2202.02643, section 3: how much each layer keeps is one choice,
and which of its weights another. The second is left to chance; the first to a rule of the shapes (uniform, ER, ERK and
their kin), or to a donor: SNIP, GraSP or SynFlow choose a mask, its counts per layer are taken, and its positions not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Erk
from secateur.axes.allocations import check_scoreless, gaps, inhabited
from secateur.axes.at_init import check_training
from secateur.axes.donors import Donor
from secateur.axes.growth import random_masks
from secateur.axes.rules import Hold, LearningRate
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, apply_
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task, generator
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class RandomPruning(Method):
    """Keep weights by chance, layers by a rule, and train what is left from the start."""

    sparsity: float = 0.9  # of all prunable weights together
    allocation: Allocation = Erk()  # each layer's share; donor(probe='grasp'): as in that probe's mask
    rescale: bool = False  # new initial weights, larger by the root of each layer's share that stays
    steps: int = 1000  # of training under the mask, which never changes
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        2,
        "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        arxiv="2202.02643",
        venue="ICLR",
        year=2022,
        when="before training",
        needs=("labels", "training"),
        axes="allocation criterion rule",
        criterion=("random",),
        tasks=("classification",),
        reports="a random mask with good shares per layer trains as well as a dense network once that is wide and deep "
        "enough, ahead of a dense Wide ResNet-50 on ImageNet",
        checked="tests/methods/test_random_pruning.py::test_the_gap_to_dense_shrinks_with_width",
        differs=(
            "as many weights stay as asked, in all and in each layer: the paper's code tosses a coin for each",
            "a layer keeps one weight at least",
            "donors score the initial weights themselves; the paper's code draws others for the scoring",
            "rescaled initial weights go by each layer's share, not by the whole network's",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 20}

    def check(self) -> None:
        """Raise SettingError for a sparsity or training that cannot be."""
        self.budget()
        check_training(self.steps, self.rate_floor)
        if not isinstance(self.allocation, Donor):
            check_scoreless(self.allocation)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Share, draw, train with the mask held."""
        self.check()
        sites, notes = weights(model, self.include, self.exclude), []
        scores = None
        if isinstance(self.allocation, Donor):
            reading = self.allocation.probe.read(model, sites, task, self.sparsity)
            scores, notes = reading.scores, list(reading.notes)
        counts = inhabited(sites, self.allocation.spread(sites, Budget(self.sparsity), scores))
        keep = random_masks(sites, counts, task.seed)
        if self.rescale:
            rescaled_(model, sites, keep, generator(task, "initial weights"))
        edits: list[Edit] = apply_(model, [Mask(site, keep[site.name]) for site in sites])
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), Hold.of(edits)])
        return Outcome(model, edits, history, notes=notes + gaps(sites, keep) + history.notes)


def rescaled_(model: nn.Module, sites: Sequence[Site], keep: Mapping[str, Tensor], draw: torch.Generator) -> None:
    """New weights from a normal distribution of variance 2 / (inputs * share kept), so that outputs keep their size."""
    named = tensors(model)
    with torch.no_grad():
        for site in sites:
            value = site.parts[0].read(named)
            inputs, share = prod(value.shape[1:]), float(keep[site.name].float().mean())
            fresh = torch.randn(value.shape, generator=draw) * sqrt(2 / (inputs * share))
            value.copy_(fresh)
