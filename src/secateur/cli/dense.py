"""The dense network, and smaller dense ones: what a sparse network must beat to be worth its trouble."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes.allocations import kept_of
from secateur.axes.patterns import keep_top
from secateur.axes.rules import LearningRate
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, apply_
from secateur.graph import couple, removals
from secateur.method import Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task, stream
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Train a dense network with as many parameters as a sparse one has that are not zero.

    Every width is cut by one and the same fraction, before training; a network that cannot be that small keeps one
    channel everywhere. Zhu and Gupta 2017, arXiv 1710.01878, section 4: small-dense.
    """

    sparsity: float = 0.0  # of the sparse network that it is as large as; 0: the whole network
    steps: int = 1000  # of training
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start

    card: ClassVar = Card(0, "A dense network of the same size", arxiv="1710.01878", year=2017, when="before training")

    def budget(self) -> None:
        """None: the target is a number of parameters, of which the removed channels are another fraction."""
        return

    def check(self) -> None:
        """Raise SettingError for a sparsity or learning rate that cannot be."""
        check_sparsity(self.sparsity)
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Narrow, draw new weights, train."""
        self.check()
        edits: list[Edit] = []
        notes = []
        if self.sparsity:
            prunable = sum(site.units for site in weights(model, (), DEFAULT_EXCLUDE))
            whole = sum(p.numel() for p in model.parameters())
            aim = whole - prunable + kept_of(prunable, self.sparsity)
            coupling = couple(model, task.example)
            sites = coupling.need("channel")
            multiples = {site.name: coupling.multiples.get(site.name, 1) for site in sites}
            low, high = 0.0, 1.0
            for _ in range(20):  # the widest network that is no larger than the sparse one
                middle = (low + high) / 2
                if _parameters(model, sites, multiples, middle) <= aim:
                    low = middle
                else:
                    high = middle
            edits = list(apply_(model, removals(sites, _narrowed(sites, multiples, low))))
            redrawn_(model, task.seed)
            count = sum(p.numel() for p in model.parameters())
            notes.append(f"{count:,} parameters of {whole:,}, for at most {aim:,} that are not zero")
            if count > aim:
                notes.append("one channel everywhere is more than was asked for")
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor)])
        return Outcome(model, edits, history, notes=notes + history.notes)


def redrawn_(model: nn.Module, seed: int) -> None:
    """New initial weights, the same for the same seed, for every layer that can draw its own; others stay."""
    with torch.random.fork_rng():
        torch.manual_seed(stream(seed, "initial weights").initial_seed())
        for module in model.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()


def _narrowed(sites: Sequence[Site], multiples: dict[str, int], width: float) -> dict[str, Tensor]:
    """The first channels of each site, a fraction of all that the site's multiple divides; one at least."""
    found = {}
    for site in sites:
        of = multiples[site.name]
        count = min(site.units, max(int(width * site.units) // of * of, of))
        found[site.name] = keep_top(-torch.arange(site.units, dtype=torch.float32), count).reshape(site.shape)
    return found


def _parameters(model: nn.Module, sites: Sequence[Site], multiples: dict[str, int], width: float) -> int:
    """How many parameters a narrowed model would have."""
    trial = copy.deepcopy(model)
    apply_(trial, removals(sites, _narrowed(sites, multiples, width)))
    return sum(p.numel() for p in tensors(trial).values() if isinstance(p, nn.Parameter))
