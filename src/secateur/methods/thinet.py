"""ThiNet: a filter may go if the next layer hardly notices; the others are scaled to make up for it.

Luo, Wu, Lin. "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression." ICCV 2017. arXiv:1707.06342,
section 3.2 and algorithm 1. At a sampled place of the next layer's output, x_c is what channel c brings to it; the set
T that goes is grown one channel at a time,

    T = argmin sum over places of (sum of x_c over T)^2

and the channels that stay are scaled by the least squares of sum x_c = sum w_c x_c over those left (equation 7). Layer
after layer, each seeing what the ones before left, with a little training after each.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes.budgets import Terms, every_layer, terms
from secateur.axes.filters import patches, read_alone, readers
from secateur.axes.recalibration import some
from secateur.axes.rules import LearningRate
from secateur.edit import Edit, Update, apply_
from secateur.errors import EvidenceError, SettingError
from secateur.graph import left_of, removals
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, tensors
from secateur.task import Batch, Task, generator, modes_of, restore_modes_
from secateur.train import History, fit


def least_noticed(gram: Tensor, count: int) -> list[int]:
    """The channels that go, the first to go first: T costs the sum of its gram, 1^T G_T 1 [channels, channels]."""
    cost, gone = gram.diagonal().clone(), list[int]()
    for _ in range(count):
        cost[gone] = torch.inf
        chosen = int(cost.argmin())
        gone.append(chosen)
        cost = cost + 2 * gram[:, chosen]
    return gone


def scales(gram: Tensor, keep: Tensor) -> Tensor:
    """What those that stay are multiplied by so that they add up to all: least squares from the gram [kept]."""
    inside = gram[keep][:, keep]
    ridge = 1e-8 * float(inside.diagonal().mean()) * torch.eye(len(inside), dtype=gram.dtype)
    return torch.linalg.solve(inside + ridge, gram[keep].sum(1))


def contributions(
    module: nn.Module, part: Part, units: int, given: Tensor, places: int, draw: torch.Generator
) -> Tensor:
    """What each unit brings to the output of a layer at random places, without bias [places of each example, units]."""
    weight, owner = part.view(module.get_parameter("weight").detach()), part.owned().reshape(-1)
    unfolded = patches(module, given)  # [n, in, kernel, positions]
    n, positions = len(given), unfolded.shape[-1]
    at = torch.randint(positions, (n, places), generator=draw)
    output = torch.randint(weight.shape[0], (n, places), generator=draw)
    patch = unfolded[torch.arange(n)[:, None], :, :, at]  # [n, places, in, kernel]
    brought = (patch * weight[output].reshape(*output.shape, weight.shape[1], -1)).sum(-1).flatten(0, 1)
    mine = owner >= 0
    return brought.new_zeros(len(brought), units).index_add(1, owner[mine], brought[:, mine])


@torch.no_grad()
def gram_of(
    model: nn.Module, part: Part, units: int, batches: Iterable[Batch], places: int, draw: torch.Generator
) -> Tensor:
    """The gram of contributions to the layer that reads a site, float64 [units, units].

    Raises EvidenceError where nothing flows in.
    """
    module = model.get_submodule(part.module)
    gram, given = torch.zeros(units, units, dtype=torch.float64), list[Tensor]()
    hook = module.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    modes = modes_of(model)
    try:
        model.eval()
        for batch in batches:
            given.clear()
            batch.through(model)
            for value in given:
                for piece in torch.split(value, 16):  # unfolded, an image is as large as nine
                    found = contributions(module, part, units, piece, places, draw).double()
                    gram += found.T @ found
    finally:
        hook.remove()
        restore_modes_(model, modes)
    if not bool(gram.any()):
        raise EvidenceError(
            f"what channels bring to {part.name} was to be measured", "nothing flows in", "Give calibration data."
        )
    return gram


@dataclass(frozen=True, kw_only=True)
class ThiNet(Method):
    """Layer after layer, take out the filters that the next layer notices least, scale the others, train a little."""

    sparsity: float = 0.5  # fraction taken out, in [0, 1): of the filters of each layer, or of what `of` says
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    samples: int = 256  # examples
    places: int = 10  # of the next layer's output, in each example
    each: int = 50  # optimizer steps after each layer
    recover: int = 500  # and at the end
    rate_floor: float = 0.0  # learning rate at the end of the last cosine, as a fraction of that at the start
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        0,
        "ThiNet: A Filter Level Pruning Method for Deep Neural Network Compression",
        arxiv="1707.06342",
        venue="ICCV",
        year=2017,
        granularity=("channel",),
        needs=("calibration", "labels", "training"),
        families=("cnn",),
        axes="solver rule",
        criterion=("activation",),
        tasks=("classification",),
        schedule=("custom",),
        allocation=("uniform",),
        updates=("solved", "trained"),
        reports="VGG-16 on ImageNet with 3.3 times less work at 0.5 points of top-5 accuracy, ResNet-50 with half of "
        "its work and parameters at 1 point",
        checked="tests/methods/test_filter_methods.py::test_filters_go_that_the_next_layer_does_not_notice_by_hand",
        differs=("filters that several layers write or read, as on shortcuts, are left alone",),
    )
    tiny: ClassVar = {"samples": 32, "places": 4, "each": 4, "recover": 8}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends units."""
        return terms(self, "units")

    def check(self) -> None:
        """Raise SettingError for a fraction, samples or training that cannot be."""
        self.terms.check()
        for name, least in (("samples", 1), ("places", 1), ("each", 0), ("recover", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} was given", f"{least} is the least", "Give more.")
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Of each layer in turn: measure, choose, scale, take out, train."""
        self.check()
        found, notes = read_alone(model, task.example)
        sites = self.terms.free(model, found)
        met = self.terms.counts(model, task.example, sites, {}, partial(every_layer, sites))
        notes += [*self.terms.left_alone(found), *met.notes]
        draw, edits, history = generator(task, "places"), list[Edit](), History()
        for place in range(len(sites)):
            site = sites[place]
            (part,) = readers(site)
            gram = gram_of(model, part, site.units, some(task, self.samples), self.places, draw)
            keep = torch.ones(site.units, dtype=torch.bool)
            keep[least_noticed(gram, site.units - met.counts[site.name])] = False
            if bool(keep.all()):
                continue
            factor = torch.ones(site.units, dtype=torch.float64)
            factor[keep] = scales(gram, keep)
            value = tensors(model)[part.name].detach()
            scaled = value * part.expand(factor, nobody=1.0).to(value)
            edits += apply_(model, [Update(part.name, scaled), *removals([site], {site.name: keep})])
            sites = list(left_of(sites, {site.name: keep}))
            history = history.then(fit(model, task, self.each, [LearningRate()], epoch=history.epoch))
        rate = LearningRate(floor=self.rate_floor)
        history = history.then(fit(model, task, self.recover, [rate], epoch=history.epoch))
        return Outcome(model, edits, history, notes=notes + history.notes)
