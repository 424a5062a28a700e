"""Soft filter pruning: after every epoch the smallest filters are set to zero, and go on learning; at last they go.

He, Kang, Dong, Fu, Yang. "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks." IJCAI 2018.
arXiv:1808.06866, algorithm 1: by Euclidean norm, the same fraction of every layer, chosen anew each time.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import keep_top, kept_of
from secateur.axes.budgets import Terms, every_layer, terms
from secateur.axes.filters import filter_norm, filters, writers
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import LearningRate
from secateur.edit import Edit, apply_
from secateur.errors import SettingError
from secateur.graph import removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import Loop, Rule, fit


class Softly(Rule):
    """Zeroes the filters of lowest norm at the end of every epoch, or every so many steps; nothing is held there.

    Norms behind them keep their shifts, so that gradients still come back and a filter may return.
    """

    def __init__(
        self, sites: Sequence[Site], sparsity: float, every: int = 0, counts: Mapping[str, int] | None = None
    ) -> None:
        check_sparsity(sparsity)
        if every < 0:
            raise SettingError(
                f"zeroing every {every} steps was asked for", "steps are whole", "Give 0 for every epoch."
            )
        self.sites, self.every = list(sites), every
        self.counts = {s.name: max(1, kept_of(s.units, sparsity)) for s in sites} if counts is None else dict(counts)
        self.keep: dict[str, Tensor] = {}
        self.epoch = 0

    def start(self, loop: Loop) -> None:
        """Note the epoch."""
        self.epoch = loop.epoch

    def before_forward(self, loop: Loop) -> None:
        """Zero what is smallest where an epoch has begun, or so many steps are over."""
        due = loop.step > 0 and loop.step % self.every == 0 if self.every else loop.epoch != self.epoch
        self.epoch = loop.epoch
        if due:
            self.zero_(loop)

    def finish(self, loop: Loop) -> None:
        """Zero for the last time."""
        self.zero_(loop)

    def zero_(self, loop: Loop) -> None:
        """Choose anew and zero. The curve "returned" is the share of what was zeroed before that is kept now."""
        before = self.keep
        named = loop.tensors
        self.keep = {}
        with torch.no_grad():
            for site in self.sites:
                keep = keep_top(filter_norm(site, named), self.counts[site.name])
                self.keep[site.name] = keep
                for part in writers(site):
                    seen = part.read(named)
                    seen.masked_fill_(part.expand(~keep).to(seen.device), 0)
        loop.agree(self.keep)
        if before:
            gone = sum(int((~k).sum()) for k in before.values())
            back = sum(int((~k & self.keep[name]).sum()) for name, k in before.items())
            loop.log("returned", back / gone if gone else 0.0)

    def state(self) -> dict[str, Any]:
        """The epoch, and what was kept last."""
        return {"epoch": self.epoch, "keep": dict(self.keep)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """The same."""
        self.epoch, self.keep = int(state["epoch"]), dict(state["keep"])


@dataclass(frozen=True, kw_only=True)
class SoftFilter(Method):
    """Train while the smallest filters are zeroed again and again; then take out those that are zero."""

    sparsity: float = 0.3  # fraction of the filters of each layer, in [0, 1): 1 less the rate of the paper's code
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    every: int = 0  # steps between zeroings; 0: an epoch
    steps: int = 1000  # of training
    samples: int = 512  # examples for fresh statistics of norms after the cut
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        0,
        "Soft Filter Pruning for Accelerating Deep Convolutional Neural Networks",
        arxiv="1808.06866",
        venue="IJCAI",
        year=2018,
        when="during training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("cnn",),
        axes="criterion rule",
        criterion=("norm",),
        start=("initialised", "pretrained"),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("custom",),
        allocation=("uniform",),
        reports="ResNet-101 on ImageNet with 42 % less work and 0.2 points more top-5 accuracy",
        checked="tests/methods/test_filter_methods.py::test_a_filter_that_was_zeroed_may_come_back",
        differs=(
            "layers that a shortcut ties lose the same filters, so that they can be taken out",
            "norms take their statistics anew after the cut, as the constants of zeroed filters go with them",
        ),
    )
    tiny: ClassVar = {"steps": 24, "every": 8, "samples": 64}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends units."""
        return terms(self, "units")

    def check(self) -> None:
        """Raise SettingError for a fraction or a training that cannot be."""
        self.terms.check()
        Softly([], self.sparsity, self.every)
        if self.steps < 1 or self.samples < 1:
            raise SettingError(
                f"steps={self.steps} and samples={self.samples} were given", "one is the least", "Give more."
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train softly, cut, take statistics anew."""
        self.check()
        found, notes = filters(model, task.example)
        sites = self.terms.free(model, found)
        met = self.terms.counts(model, task.example, sites, {}, partial(every_layer, sites))
        notes += [*self.terms.left_alone(found), *met.notes]
        rule = Softly(sites, self.sparsity, self.every, met.counts)
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), rule])
        edits: list[Edit] = apply_(model, removals(sites, rule.keep))
        edits += recalibrate_(model, some(task, self.samples))
        return Outcome(model, edits, history, notes=notes + history.notes)
