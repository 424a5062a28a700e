"""L1 norm: a filter matters if its weights are large; the small ones are taken out, with all that reads them.

Li, Kadav, Durdanovic, Samet, Graf. "Pruning Filters for Efficient ConvNets." 2016. arXiv:1608.08710, section 3.1.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Scores, Uniform, keep_top
from secateur.axes.budgets import Terms, terms
from secateur.edit import Edit, Mask, apply_
from secateur.errors import SettingError, did_you_mean
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Kind, Site, Tensors, tensors
from secateur.task import Task

KINDS: tuple[Kind, ...] = ("channel", "head")


def l1_norm(site: Site, tensors: Tensors) -> Tensor:
    """Sum of |w| over the matrices and kernels that each unit owns, divided by how many weights it owns [*site.shape].

    Biases and norms are left out: only what convolves or multiplies counts (section 3.1).
    """
    matrices = {part.name for part in site.parts if len(part.shape) > 1}
    size = {name: torch.ones_like(tensors[name]) for name in matrices}
    rest = {part.name: torch.zeros_like(tensors[part.name]) for part in site.parts if part.name not in matrices}
    total = site.gather({**rest, **{name: tensors[name].detach().abs() for name in matrices}})
    return total / site.gather({**rest, **size})


@dataclass(frozen=True, kw_only=True)
class L1Norm(Method):
    """Take out the channels, neurons and heads whose weights are smallest. No data; the model gets smaller at once."""

    sparsity: float = 0.3  # fraction of what `of` says that is taken out, in [0, 1)
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    kinds: tuple[str, ...] = KINDS  # what is taken out: channel, head
    allocation: Allocation = Uniform()  # the paper's: the same fraction of every layer
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        0,
        "Pruning filters for efficient ConvNets",
        arxiv="1608.08710",
        year=2016,
        granularity=KINDS,
        families=("decoder", "encoder", "vision transformer", "cnn", "mlp", "moe", "rnn"),
        axes="criterion allocation",
        criterion=("norm",),
        tasks=("classification",),
        reports="CIFAR-10, after retraining: 34 % less work for VGG-16 and up to 38 % for ResNet-110.",
        checked="tests/methods/test_l1_norm.py::test_small_filters_go_and_large_ones_stay",
        differs=(
            "The norm is over all that a unit owns, readers too, since they go with it; the paper's is the producer's.",
            "Shortcuts are cut with all the layers they tie; the paper cuts the first layer of a block only.",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.3}

    def budget(self) -> Budget:
        """A fraction of units, unless another unit was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends units."""
        return terms(self, "units")

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(
                f"kinds {list(self.kinds)} were asked for",
                "what can be taken out is a channel or a head",
                did_you_mean(unknown[0] if unknown else "", KINDS),
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = coupling.need(*(kind for kind in KINDS if kind in self.kinds))
        sites = self.terms.free(model, found)
        scores = self.scores_in(model, sites, task)

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity, of="units"), scores)

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        keep = {site.name: keep_top(scores[site.name], met.counts[site.name]) for site in sites}
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        whole: list[Edit] = [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
        edits = apply_(model, [*whole, *removals(sites, keep)])
        notes = [str(frozen) for frozen in coupling.frozen]
        return Outcome(model, list(edits), notes=[*notes, *self.terms.left_alone(found), *met.notes])

    def scores_in(self, model: nn.Module, sites: Sequence[Site], task: Task, samples: int = 0) -> Scores:
        """One score per unit of each site, which takes no data: `plan` reads them too."""
        named = tensors(model)
        return {site.name: l1_norm(site, named) for site in sites}
