"""Only the channels that are going to be removed are trained towards zero; those that stay are left to learn.

Jiang, Zhao, Zhao, An, Tang, Wang. "Pruning-aware Sparse Regularization for Network Pruning." 2022. arXiv:2201.06776.
With K the mask of channels to keep, found in any way, training from the dense weights lowers

    L + s sum |gamma_c| (1 - K_c)        over the scales gamma of all batch norms that follow a layer

and then every channel whose scale fell below a threshold is removed. The mask is a plan; the threshold carries it
out. Without a mask this is network slimming (Liu et al. 2017, arXiv:1708.06519).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Uniform, keep_top
from secateur.axes.penalties import L1, Condemned, Everywhere, Pressure, ScalePenalty, Slope
from secateur.axes.rules import LearningRate
from secateur.axes.scales import (
    Below,
    Constants,
    Dropped,
    Scaled,
    Threshold,
    agreed,
    below,
    channels_kept,
    cuts,
    scale_names,
    scaled,
)
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.evidence import Evidence
from secateur.graph import couple
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Task
from secateur.train import History, Snapshot, fit


@dataclass(frozen=True)
class ScaleSize:
    """A channel matters if the norms behind it are loud: the mean |scale| over the layers it is tied to."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """One score per channel [*site.shape]."""
        scales = {p.name for p in site.parts if p.name.endswith(".weight") and len(p.shape) == 1}
        size = {p.name: tensors[p.name].detach().abs() for p in site.parts if p.name in scales}
        rest = {p.name: torch.zeros_like(tensors[p.name]) for p in site.parts if p.name not in scales}
        count = site.gather({**rest, **{name: torch.ones_like(tensors[name]) for name in scales}})
        return site.gather({**rest, **size}) / count


@runtime_checkable
class Plan(Protocol):
    """Where the mask comes from."""

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        ...

    def keep(
        self, model: nn.Module, task: Task, sites: Sequence[Scaled], budget: Budget, penalty: "Penalty"
    ) -> tuple[dict[str, Tensor] | None, History]:
        """Masks by site, True stays, and what finding them took; None for no mask. Leaves the weights as they were."""
        ...


@dataclass(frozen=True)
class Penalty:
    """How scales are pulled to zero."""

    strength: float
    slope: Slope

    def rule(self, sites: Sequence[Scaled], pressure: Pressure) -> ScalePenalty:
        """The rule that pulls the scales of some sites."""
        return ScalePenalty(scale_names(sites), self.strength, pressure, self.slope)


@dataclass(frozen=True)
class Ranked:
    """The channels with the lowest scores are to go: of the dense weights, or after training that pulls all scales."""

    criterion: Criterion = ScaleSize()
    allocation: Allocation = Uniform()
    steps: int = 0  # of network slimming before scores are taken, thrown away afterwards; the paper's way

    def check(self) -> None:
        """See Plan."""
        if self.steps < 0:
            raise SettingError(
                f"a search of {self.steps} steps was asked for", "a count is not negative", "Give 0 or more."
            )
        if self.criterion.needs:
            raise SettingError(
                f"a mask by {type(self.criterion).__name__} was asked for",
                f"it needs evidence ({', '.join(sorted(self.criterion.needs))}), and plans are made on weights alone",
                "Use scale-size, magnitude or random.",
            )

    def keep(
        self, model: nn.Module, task: Task, sites: Sequence[Scaled], budget: Budget, penalty: Penalty
    ) -> tuple[dict[str, Tensor] | None, History]:
        """See Plan."""
        start, history = Snapshot.of(model), History()
        if self.steps:
            history = fit(model, task, self.steps, [penalty.rule(sites, Everywhere())])
        named = tensors(model)
        scores = {one.site.name: self.criterion.score(one.site, named, Evidence()) for one in sites}
        counts = self.allocation.spread([one.site for one in sites], budget, scores)
        start.restore_(model)  # the masked training starts from the dense weights, not from those of the search
        return {name: keep_top(score, max(1, counts[name])) for name, score in scores.items()}, history


@dataclass(frozen=True)
class NoMask:
    """All scales are pulled, and the threshold alone decides: network slimming."""

    def check(self) -> None:
        """Nothing to check."""

    def keep(
        self, model: nn.Module, task: Task, sites: Sequence[Scaled], budget: Budget, penalty: Penalty
    ) -> tuple[dict[str, Tensor] | None, History]:
        """No mask."""
        return None, History()


def executed(sites: Sequence[Scaled], named: Tensors, threshold: Threshold, least: int) -> dict[str, Tensor]:
    """Masks by site, of what a threshold on every norm takes out, tied layers by agreement; `least` units stay.

    What tied layers agree on may be more than any of them wants to lose alone: the largest on average stay then.
    """
    gone = {name: below(named[name], threshold, least) for name in scale_names(sites)}
    keep = {}
    for one in sites:
        stays = ~agreed(one.flags(gone))
        few = min(least, len(stays))
        if int(stays.sum()) < few:
            stays = keep_top(one.sizes(named).mean(0).masked_fill(stays, torch.inf), few)
        keep[one.site.name] = stays.reshape(one.site.shape)
    return keep


@dataclass(frozen=True, kw_only=True)
class MaskSparsity(Method):
    """Plan a mask, train with the planned channels' scales pulled to zero, remove what fell below a threshold."""

    sparsity: float = 0.5  # fraction of the channels that the plan takes out, in [0, 1)
    plan: Plan = Ranked()  # where the mask comes from; no-mask pulls all scales: network slimming
    strength: float = 0.03  # s: what a penalised scale's gradient gets
    slope: Slope = L1()  # of the penalty: l1, l2 or smooth-l1
    steps: int = 600  # of training with the penalty
    threshold: Threshold = Below()  # on |scale|: below, or energy
    least: int = 1  # channels that stay in each norm whatever their scales
    constants: Constants = Dropped()  # what a removed channel's shift gave: dropped, or absorbed by the next layer
    tune: int = 0  # steps of training after the cut
    tune_rate: float = 0.1  # their learning rate, as a fraction of the task's; it falls along a cosine

    card: ClassVar = Card(
        3,
        "Pruning-aware sparse regularization for network pruning",
        arxiv="2201.06776",
        year=2022,
        when="during training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("cnn",),
        axes="criterion allocation rule edit",
        criterion=("norm scale",),
        start=("pretrained",),
        tasks=("classification", "detection"),
        allocation=("uniform",),
        stage=("sparsity regularisation",),
        schedule=("one-shot",),
        retraining=("finetune",),
        reports="ResNet-110 on CIFAR-10: 63 % less work, no loss; ResNet-50 on ImageNet: 51 % less, 0.76 points lost.",
        checked="tests/methods/test_mask_sparsity.py::test_scales_that_stay_are_left_alone_and_the_cut_costs_nothing",
        differs=(
            "tied layers are found in the graph; the authors list them by hand",
            "all channels of a norm below its floor go but the largest, exactly as many as `least`; the code keeps "
            "the first where sizes are equal",
            "the learning rate is constant while scales are pulled, since what they shrink by is its sum",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "steps": 60, "strength": 0.05, "threshold": Below(0.05), "tune": 5}

    def budget(self) -> Budget | None:
        """None: the threshold decides, and the notes say what it came to."""
        return None

    def check(self) -> None:
        """See Method."""
        check_sparsity(self.sparsity)
        self.plan.check()
        if self.steps < 1 or self.tune < 0 or self.least < 1:
            raise SettingError(
                f"steps={self.steps}, tune={self.tune}, least={self.least} were given",
                "training with the penalty takes a step at least, a channel stays at least, and tune is not negative",
                "Give steps=600, tune=0, least=1.",
            )
        if not self.strength > 0 or not self.tune_rate > 0:
            raise SettingError(
                f"strength={self.strength:g}, tune_rate={self.tune_rate:g} were given",
                "both are above 0",
                "Give strength=0.03, tune_rate=0.1.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        sites, others = scaled(model, task.example, coupling)
        penalty = Penalty(self.strength, self.slope)
        planned, history = self.plan.keep(model, task, sites, Budget(self.sparsity, of="units"), penalty)
        pressure = Everywhere() if planned is None else Condemned(channels_kept(sites, planned, tensors(model)))
        trained = fit(model, task, self.steps, [penalty.rule(sites, pressure)], epoch=history.epoch)
        history = history.then(trained)
        keep = executed(sites, tensors(model), self.threshold, self.least)
        notes = self.notes(model, task, sites, others, planned, keep)
        edits = apply_(model, self.constants.edits(model, sites, keep, task.example))
        edits += apply_(model, cuts(sites, keep))
        if self.tune:
            optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
            for group in optimizer.param_groups:
                group["lr"] *= self.tune_rate
            history = history.then(fit(model, task, self.tune, [LearningRate()], optimizer, epoch=history.epoch))
        return Outcome(model, edits, history, notes=notes + history.notes)

    def notes(
        self,
        model: nn.Module,
        task: Task,
        sites: Sequence[Scaled],
        others: Sequence[str],
        planned: dict[str, Tensor] | None,
        keep: dict[str, Tensor],
    ) -> list[str]:
        """What was planned and what the threshold made of it."""
        units = sum(one.site.units for one in sites)
        gone = units - sum(int(k.sum()) for k in keep.values())
        found = [f"{gone:,} of {units:,} channels removed by the threshold ({gone / units:.1%})"]
        found += [f"left alone: {name} is not scaled by norms throughout" for name in others]
        group = task.optimizer([nn.Parameter(torch.zeros(1))]).param_groups[0]
        swing = float(group["lr"]) * self.strength / (1 - float(group.get("momentum", 0.0)))
        if isinstance(self.threshold, Below) and isinstance(self.slope, L1) and swing > self.threshold.size:
            found.append(
                f"scales at zero swing by up to {swing:.2g}, beyond the threshold of {self.threshold.size:g}: lower "
                "the strength or the learning rate, or use slope=smooth-l1"
            )
        if planned is not None:
            named = tensors(model)
            condemned = {n: ~k for n, k in channels_kept(sites, planned, named).items()}
            low = {name: below(named[name], self.threshold, 0) for name in condemned}
            left = sum(int((condemned[n] & ~low[n]).sum()) for n in condemned)
            total = sum(int(mask.sum()) for mask in condemned.values())
            fallen = sum(int((~condemned[n] & low[n]).sum()) for n in condemned)
            said = f"the plan: {sum(int((~k).sum()) for k in planned.values()):,} channels"
            found.append(
                f"{said}; above the threshold {left:,} of {total:,} condemned scales, below it {fallen:,} of those kept"
                + ("; train for longer, or pull harder" if left > 0.1 * total else "")
            )
        return found
