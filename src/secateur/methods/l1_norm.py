"""L1 norm: a filter matters if its weights are large; the small ones are taken out, with all that reads them.

Li, Kadav, Durdanovic, Samet, Graf. "Pruning Filters for Efficient ConvNets." 2016. arXiv:1608.08710, section 3.1.
"""

from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import lcm
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Uniform, keep_top, kept_of
from secateur.edit import apply_
from secateur.errors import SettingError, did_you_mean
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method, check_sparsity
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

    sparsity: float = 0.3  # fraction of the units of each site taken out, in [0, 1)
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
        reports="CIFAR-10, after retraining: 34 % less work for VGG-16 and up to 38 % for ResNet-110.",
        checked="tests/methods/test_l1_norm.py::test_small_filters_go_and_large_ones_stay",
        differs=(
            "The norm is over all that a unit owns, readers too, since they go with it; the paper's is the producer's.",
            "Shortcuts are cut with all the layers they tie; the paper cuts the first layer of a block only.",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.3}

    def budget(self) -> Budget:
        """A fraction of units."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """See Method."""
        check_sparsity(self.sparsity)
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(
                f"kinds {list(self.kinds)} were asked for",
                "what can be taken out is a channel or a head",
                did_you_mean(unknown[0] if unknown else "", KINDS),
            )
        if self.round_to < 1:
            raise SettingError(
                f"widths in multiples of {self.round_to} were asked for", "a multiple is 1 at least", "Give 8 or 16."
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = coupling.need(*(kind for kind in KINDS if kind in self.kinds))
        sites = [site for site in found if not self.protected(site)]
        named = tensors(model)
        scores = {site.name: l1_norm(site, named) for site in sites}
        multiples = {site.name: lcm(self.round_to, coupling.multiples.get(site.name, 1)) for site in sites}
        counts = self.rounded(sites, self.allocation.spread(sites, self.budget(), scores), multiples)
        keep = {site.name: keep_top(scores[site.name], counts[site.name]) for site in sites}
        edits = apply_(model, removals(sites, keep))
        notes = [str(frozen) for frozen in coupling.frozen]
        notes += [f"left alone: {site.name}" for site in found if self.protected(site)]
        notes += [
            f"{site.name} keeps {counts[site.name]} of {site.units} to make a multiple of {multiples[site.name]}"
            for site in sites
            if multiples[site.name] > 1 and counts[site.name] != kept_of(site.units, self.sparsity)
        ]
        return Outcome(model, list(edits), notes=notes)

    def protected(self, site: Site) -> bool:
        """Whether a site, or a tensor of it, is to be left alone."""
        names = (site.name, *(part.name for part in site.parts))
        return any(fnmatchcase(name, glob) for glob in self.protect for name in names)

    def rounded(self, sites: list[Site], counts: dict[str, int], multiples: dict[str, int]) -> dict[str, int]:
        """Counts of units to keep, made equal among sites alike where asked, and multiples; one at least."""
        found = dict(counts)
        if self.uniform:
            for alike in {(site.kind, site.units) for site in sites}:
                names = [site.name for site in sites if (site.kind, site.units) == alike]
                found.update(dict.fromkeys(names, round(sum(counts[name] for name in names) / len(names))))
        for site in sites:
            if (of := multiples[site.name]) > 1:
                found[site.name] = min(site.units, max(round(found[site.name] / of) * of, of))
            found[site.name] = max(1, found[site.name])
        return found
