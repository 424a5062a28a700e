"""Prune the smallest a little at a time, and each time let some of what is gone grow back.

Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu. "Sparse Training via Boosting Pruning Plasticity
with Neuroregeneration." NeurIPS 2021. arXiv:2106.10404, section 4 and algorithm 1. From a random ERK mask, or from a
dense network, the sparsity rises along a cubic ramp, the smallest weights of all layers going; at each of its updates
every layer also exchanges a fraction of its smallest weights for as many where the gradient is largest. The exchange
goes on after the ramp's end, a smaller and smaller fraction.
"""

import copy
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes import Allocation, Erk, Uniform
from secateur.axes.allocations import check_scoreless, inhabited
from secateur.axes.growth import Coming, Moments, Rewire, Steepest, Typical, random_masks
from secateur.axes.patterns import PerMatrix, keep_top
from secateur.axes.probes import as_in_training
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.schedules import Cosine, Power, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import tensors
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class GraNet(Method):
    """Train with a sparsity that rises while every layer keeps exchanging its smallest weights."""

    sparsity: float = 0.9  # of all prunable weights together, at the end
    start: float = 0.5  # and at the beginning; 0: from dense to sparse
    begin: float = 0.0  # fraction of training at which the ramp starts
    until: float = 0.6  # and ends
    every: int = 100  # optimizer steps between updates: dt
    exchange: float = 0.5  # fraction of each layer exchanged at the first update, falling as a cosine
    exchange_end: float = 0.005  # and at the end of training; both 0: gradual magnitude pruning
    coming: Coming = Steepest()  # which weights grow
    moments: Moments = Typical()  # what the optimizer is told of them
    allocation: Allocation = Erk()  # the layers' shares in the beginning; later all weights compete
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        15,
        "Sparse Training via Boosting Pruning Plasticity with Neuroregeneration",
        arxiv="2106.10404",
        venue="NeurIPS",
        year=2021,
        when="during training",
        needs=("labels", "training"),
        axes="schedule allocation rule growth",
        criterion=("magnitude", "first-order"),
        tasks=("classification",),
        stage=("sparse to sparse", "score or mask"),
        schedule=("cubic",),
        allocation=("ERK", "score-driven"),
        reports="from half-dense it is ahead of RigL, and level with gradual pruning from dense at a fraction of its "
        "training cost; exchanged weights raise what a pruned network recovers",
        checked="tests/methods/test_granet.py::test_gradual_with_regrowth_beats_a_mask_that_never_moves",
        differs=(
            "counts are exact after every update: the authors' code loses a weight to each strict threshold and to "
            "ties, and grows weights that are there already where too few gradients are not zero",
            "the ramp's last update reaches the target; in the authors' code it stops one update short of it",
            "nothing is exchanged after the last step, as what came would stay zero",
            "second moments of grown weights start at their layer's mean; with SGD there are none",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.75, "steps": 40, "every": 5}

    def ramp(self) -> Schedule:
        """The sparsity."""
        return Schedule(
            start=self.start, end=self.sparsity, begin=self.begin, until=self.until, curve=Power(3.0), every=self.every
        )

    def exchanges(self) -> Schedule:
        """The fraction exchanged, over the whole training."""
        return Schedule(
            start=self.exchange, end=self.exchange_end, until=1.0, curve=Cosine(), every=self.every, falling=True
        )

    def check(self) -> None:
        """Raise SettingError for schedules that cannot be, or training too short to hold them."""
        self.ramp().check_sparsity()
        Rewire([], {}, self.exchanges())
        if self.steps < 1:
            raise SettingError(
                f"a ramp over {self.steps} steps was asked for", "it needs training to happen in", "Give steps above 0."
            )
        check_scoreless(self.allocation)
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """A sparse start, then training under the ramp and the exchanges; the masks it ends with are the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        counts = inhabited(sites, self.allocation.spread(sites, Budget(self.start)))
        rewire = Rewire(
            sites,
            random_masks(sites, counts, task.seed),
            self.exchanges(),
            ramp=self.ramp(),
            coming=self.coming,
            moments=self.moments,
            seed=task.seed,
        )
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), rewire])
        return Outcome(model, apply_(model, rewire.masks()), history, notes=rewire.remarks() + history.notes)


@dataclass(frozen=True)
class Plasticity:
    """What a network loses by a cut, once it has had some steps to recover."""

    before: float  # the task's metric on the uncut network
    after: float  # and after cutting and going on training
    kept: float  # the fraction of prunable weights there in the end

    @property
    def gain(self) -> float:
        """How far the metric is above what it was; mostly below zero."""
        return self.after - self.before


def plasticity(
    model: nn.Module,
    task: Task,
    sparsity: float,
    steps: int,
    *,
    regrow: float = 0.0,
    allocation: Allocation | None = None,
    split: str = "val",
    epoch: int = 0,
) -> Plasticity:
    """How well a network recovers, at this point of its training, from losing a fraction of its weights.

    The smallest of what is there go, spread by the allocation (uniform if None); of all that is not there then, as
    many as `regrow` times what went grow from zero, where the gradient over the calibration data is largest; the
    network goes on training for some steps at the task's own learning rate. The model is left as it was. Section 3.1.
    """
    if not 0 <= regrow <= 1:
        raise SettingError(f"a regrowth of {regrow:g} was asked for", "it is a part of what went", "Give 0 up to 1.")
    work = copy.deepcopy(model)
    sites = weights(work)
    before = task.measure(work, split)[task.metric]
    named = tensors(work)
    size = {site.name: site.parts[0].read(named).detach().abs() for site in sites}
    counts = (Uniform() if allocation is None else allocation).spread(sites, Budget(sparsity), size)
    keep = {s.name: PerMatrix().select(size[s.name], counts[s.name]) & (size[s.name] != 0) for s in sites}
    hold = Hold(sites, keep)
    apply_(work, hold.masks())
    if regrow:
        slope = {site.name: torch.zeros_like(size[site.name]) for site in sites}
        with as_in_training(work, task):
            for batch in task.batches("calibration"):
                found = torch.autograd.grad(
                    task.loss(work, batch), [named[site.parts[0].name] for site in sites], allow_unused=True
                )
                for site, gradient in zip(sites, found, strict=True):
                    if gradient is not None:
                        slope[site.name] += site.parts[0].view(gradient) * batch.size
        for site in sites:
            gone = int((size[site.name] != 0).sum()) - int(keep[site.name].sum())
            grown = keep_top(
                slope[site.name].abs().reshape(-1), round(regrow * gone), ~keep[site.name].reshape(-1)
            ).reshape(site.shape)
            keep[site.name] = keep[site.name] | grown
    fit(work, task, steps, [Hold(sites, keep)], epoch=epoch)
    kept = sum(int(k.sum()) for k in keep.values()) / sum(site.units for site in sites)
    return Plasticity(before, task.measure(work, split)[task.metric], kept)
