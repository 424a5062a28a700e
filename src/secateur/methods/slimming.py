"""Network slimming: training pulls the scales of all batch norms to zero, and the smallest of all of them go.

Liu, Li, Shen, Huang, Yan, Zhang. "Learning Efficient Convolutional Networks through Network Slimming." ICCV 2017.
arXiv:1708.06519, section 3: the loss plus s sum |gamma| over the scales of the norms behind convolutions, one threshold
for the whole network, and fine-tuning of the narrower one. Its widths are found, not given.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes import Global
from secateur.axes.budgets import Terms, terms
from secateur.axes.patterns import keep_top
from secateur.axes.penalties import ScalePenalty
from secateur.axes.rules import LearningRate
from secateur.axes.scales import scale_names, scaled
from secateur.edit import Edit, Mask, apply_
from secateur.errors import BudgetError, SettingError
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import tensors
from secateur.task import Task
from secateur.train import History, Rule, fit


@dataclass(frozen=True, kw_only=True)
class Slimming(Method):
    """Train with a pull on all scales, take out the channels of the smallest anywhere, fine-tune."""

    sparsity: float = 0.5  # fraction taken out, in [0, 1): of all channels that have a scale, or of what `of` says
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    strength: float = 1e-4  # of the pull, s; 1e-5 for deep residual networks in the paper
    floor: int = 0  # channels that every layer keeps; 0, as in the paper: a layer that would vanish is an error
    steps: int = 1000  # of training with the pull; 0: the scales are taken as they are
    recover: int = 0  # optimizer steps of fine-tuning what is left
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        0,
        "Learning Efficient Convolutional Networks through Network Slimming",
        arxiv="1708.06519",
        venue="ICCV",
        year=2017,
        when="during training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("cnn",),
        axes="rule allocation graph",
        criterion=("norm scale",),
        tasks=("classification",),
        stage=("sparsity regularisation",),
        schedule=("one-shot",),
        allocation=("score-driven",),
        retraining=("finetune",),
        reports="VGG on CIFAR-10 and other sets 20 times smaller with 5 times less work",
        checked="tests/methods/test_filter_methods.py::test_the_smallest_scales_anywhere_go_and_no_layer_may_vanish",
        differs=(
            "channels that a shortcut ties go by the largest of their scales, and go together; the paper selects the "
            "channels that each block reads instead",
            "exactly as many go as asked, ties included",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.25, "steps": 20, "strength": 1e-3, "floor": 1}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the threshold spends units, and may leave a layer none."""
        return terms(self, "units", least=0)

    @property
    def allocation(self) -> Global:
        """One threshold for the whole network."""
        return Global()

    def check(self) -> None:
        """Raise SettingError for a fraction, a pull or a training that cannot be."""
        self.terms.check()
        for name in ("floor", "steps", "recover"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} was given", "0 is the least", "Give 0 or more.")
        if not self.strength > 0:
            raise SettingError(f"a pull of {self.strength:g} was given", "it is above 0", "Give 0.0001.")
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train with the pull, rank all scales together, take out, fine-tune."""
        self.check()
        coupling = couple(model, task.example)
        every, others = scaled(model, task.example, coupling)
        sites, history = self.terms.free(model, [one.site for one in every]), History()
        found = [one for one in every if not self.terms.protects(one.site)]
        if self.steps:
            rules: list[Rule] = [LearningRate(floor=self.rate_floor), ScalePenalty(scale_names(found), self.strength)]
            history = fit(model, task, self.steps, rules)
        named = tensors(model)
        scores = {one.site.name: one.sizes(named).amax(0).float() for one in found}  # the loudest of tied layers
        spared = {name: keep_top(score, min(self.floor, len(score))) for name, score in scores.items()}
        ranked = {name: score.masked_fill(spared[name], torch.inf) for name, score in scores.items()}

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity, of="units"), ranked)

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        counts = met.counts
        vanished = [name for name, count in counts.items() if count == 0]
        if vanished:
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} by one threshold over all scales was asked for",
                f"every channel of {', '.join(vanished)} is below it, and the network would be cut in two",
                "Ask for less, train with a weaker pull, or keep some everywhere: floor=1.",
            )
        keep = {site.name: keep_top(ranked[site.name], counts[site.name]) for site in sites}
        # Sites that keep all are masked by nothing, so that the record counts their channels among all of them.
        whole: list[Edit] = [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
        edits = apply_(model, [*whole, *removals(sites, keep)])
        if self.recover:
            history = history.then(fit(model, task, self.recover, [LearningRate()], epoch=history.epoch))
        widths = ", ".join(f"{site.name} {counts[site.name]}/{site.units}" for site in sites)
        notes = [f"widths found: {widths}", *(f"{name} is left alone: a layer of it has no norm" for name in others)]
        notes += [*self.terms.left_alone([one.site for one in every]), *met.notes]
        return Outcome(model, edits, history, notes=[*notes, *history.notes])
