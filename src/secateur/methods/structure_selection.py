"""Sparse structure selection: training pulls a factor of each filter, or block, to zero; what has none goes.

Huang, Wang. "Data-Driven Sparse Structure Selection for Deep Neural Networks." ECCV 2018. arXiv:1707.01213, sections
3.1 and 3.2. With factors l, a strength g and a rate h, every step of the weights goes with one of accelerated proximal
gradient,

    z = soft(l - h dL/dl, h g),    v = z - l + m v,    l = z + m v

so that factors become zero exactly. A filter's factor scales what reads it, a block's what its last layer adds to the
shortcut; those that stay are folded into these layers, which changes nothing.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.axes.filters import filters, readers
from secateur.axes.residual import Ran, blocks_site, first_tensor, removable_blocks
from secateur.axes.rules import LearningRate
from secateur.cut import passing
from secateur.edit import Edit, Mask, Replace, Update, apply_
from secateur.errors import GraphError, SettingError, did_you_mean
from secateur.graph import removals
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, Site, tensors
from secateur.task import Task, modes_of, restore_modes_
from secateur.train import Loop, Rule, fit

KINDS = ("channel", "layer")


def soft(value: Tensor, by: float) -> Tensor:
    """Towards zero by so much, and no further than zero."""
    return value.sign() * (value.abs() - by).clamp(min=0)


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of a site's filters, or of one block, while it is trained."""

    name: str
    site: Site
    value: Tensor  # [units], a leaf with gradient
    scaled: tuple[tuple[str, Part | None], ...]  # modules: whose inputs are scaled, by part; or outputs, without one
    outputs: int = 0  # of a block: how many values it gives back

    def hook_(self, model: nn.Module) -> list[RemovableHandle]:
        """Let the factors scale what flows; until the handles are removed."""
        return [self._on(model.get_submodule(name), part) for name, part in self.scaled]

    def _on(self, module: nn.Module, part: Part | None) -> RemovableHandle:
        if part is None:
            return module.register_forward_hook(lambda m, args, out: out * self.value.to(out.dtype))

        def scale(m: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            factor = part.expand(self.value, nobody=1.0).reshape(-1).to(args[0].dtype)
            if isinstance(m, nn.modules.conv._ConvNd):
                factor = factor.repeat(m.groups)  # a unit is a channel of every group
            shape = [1] * args[0].dim()
            shape[1 if isinstance(m, nn.modules.conv._ConvNd) else -1] = -1
            return (args[0] * factor.reshape(shape), *args[1:])

        return module.register_forward_pre_hook(scale)

    def fold(self, model: nn.Module, keep: Tensor) -> list[Edit]:
        """What stays, with its factors in the weights they scale; not applied yet."""
        named, edits = tensors(model), list[Edit]()
        factor = torch.where(keep, self.value.detach(), 1.0)
        for name, part in self.scaled:
            if part is not None:
                value = named[part.name].detach()
                edits.append(Update(part.name, value * part.expand(factor, nobody=1.0).to(value)))
            elif bool(keep.all()):
                for key in ("weight", "bias"):
                    if f"{name}.{key}" in named:
                        edits.append(Update(f"{name}.{key}", named[f"{name}.{key}"].detach() * factor))
        return edits


class Proximal(Rule):
    """Steps factors by accelerated proximal gradient, beside the optimizer's steps of the weights.

    The rate is the optimizer's own of the moment. A factor counts as zero where its last proximal point is: momentum
    may carry the factor itself a little past it. The curve "zero factors" is their share.
    """

    def __init__(self, factors: Sequence[Factors], strength: float, momentum: float = 0.9) -> None:
        if not (isfinite(strength) and strength > 0) or not 0 <= momentum < 1:
            raise SettingError(
                f"a strength of {strength:g} and a momentum of {momentum:g} were asked for",
                "the first is above 0, the second in [0, 1)",
                "Give 0.002 and 0.9, say.",
            )
        self.factors, self.strength, self.momentum = list(factors), strength, momentum
        self.moving = [torch.zeros_like(each.value.detach()) for each in self.factors]
        self.points = [each.value.detach().clone() for each in self.factors]

    def before_forward(self, loop: Loop) -> None:
        """Forget the gradients of the last step."""
        for each in self.factors:
            each.value.grad = None

    def after_step(self, loop: Loop) -> None:
        """Step the factors."""
        rate = float(loop.optimizer.param_groups[0]["lr"])
        with torch.no_grad():
            for place, each in enumerate(self.factors):
                if each.value.grad is None:
                    continue
                point = soft(each.value - rate * each.value.grad, rate * self.strength)
                self.moving[place] = point - each.value + self.momentum * self.moving[place]
                each.value.copy_(point + self.momentum * self.moving[place])
                self.points[place] = point
        if loop.step % max(1, loop.steps // 20) == 0 or loop.step == loop.steps:
            every = torch.cat(self.points)
            loop.log("zero factors", float((every == 0).float().mean()))

    def finish(self, loop: Loop) -> None:
        """The factors are their proximal points."""
        with torch.no_grad():
            for each, point in zip(self.factors, self.points, strict=True):
                each.value.copy_(point)

    def state(self) -> dict[str, Any]:
        """Factors, momentum and points."""
        values = [each.value.detach().clone() for each in self.factors]
        return {"values": values, "moving": list(self.moving), "points": list(self.points)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """The same."""
        with torch.no_grad():
            for each, value in zip(self.factors, state["values"], strict=True):
                each.value.copy_(value)
        self.moving, self.points = list(state["moving"]), list(state["points"])


def factors_of_filters(model: nn.Module, sites: Sequence[Site]) -> list[Factors]:
    """One factor per filter, at what reads it."""
    device = next(model.parameters()).device
    return [
        Factors(
            site.name,
            site,
            torch.ones(site.units, device=device, requires_grad=True),
            tuple((part.module, part) for part in readers(site)),
        )
        for site in sites
        if readers(site)
    ]


def factors_of_blocks(model: nn.Module, blocks: Sequence[Ran]) -> tuple[list[Factors], list[str]]:
    """One factor per block, at the last of its layers that runs; and why others have none.

    A block whose input is not what is left without that layer has none: a factor of zero would not be its going.
    """
    found, notes = [], []
    for block in blocks:
        module = model.get_submodule(block.name)
        last = _last_layer(module, block)
        if last is None:
            notes.append(f"{block.name} has no factor: its last layer alone does not stand between it and its input")
            continue
        value = torch.ones(1, device=next(module.parameters()).device, requires_grad=True)
        site = blocks_site(model, [block.name], block.name)
        found.append(Factors(block.name, site, value, ((f"{block.name}.{last}", None),), block.outputs))
    return found, notes


@torch.no_grad()
def _last_layer(module: nn.Module, block: Ran) -> str | None:
    """The layer to run last, if a block hands on what it is given once that gives zeros."""
    order: list[str] = []
    layers = {n: m for n, m in module.named_modules() if next(m.parameters(recurse=False), None) is not None}
    hooks = [m.register_forward_hook(lambda m, a, o, n=n: order.append(n)) for n, m in layers.items()]
    args, kwargs = block.arguments
    modes = modes_of(module)
    module.eval()
    try:
        module(*args, **kwargs)
        hooks.append(layers[order[-1]].register_forward_hook(lambda m, a, out: torch.zeros_like(out)))
        answer = first_tensor([module(*args, **kwargs)])
    finally:
        restore_modes_(module, modes)
        for hook in hooks:
            hook.remove()
    assert block.given is not None
    same = answer is not None and (torch.equal(answer, block.given) or torch.equal(answer, block.given.relu()))
    return order[-1] if same else None


@dataclass(frozen=True, kw_only=True)
class StructureSelection(Method):
    """Train weights and factors together, take out what has a factor of zero, fold the others in."""

    strength: float = 0.002  # of the pull on factors: gamma; more of it takes more out
    kinds: tuple[str, ...] = ("channel",)  # what has factors: channel (filters), layer (residual blocks)
    momentum: float = 0.9  # of the factors
    steps: int = 1000  # of training with factors
    recover: int = 0  # optimizer steps of fine-tuning what is left
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start

    card: ClassVar = Card(
        0,
        "Data-Driven Sparse Structure Selection for Deep Neural Networks",
        arxiv="1707.01213",
        venue="ECCV",
        year=2018,
        when="during training",
        granularity=KINDS,
        needs=("labels", "training"),
        families=("cnn",),
        axes="rule graph",
        criterion=("learned",),
        tasks=("classification",),
        stage=("sparsity regularisation",),
        schedule=("custom",),
        allocation=("learned",),
        learns=("masks or gates",),
        reports="ResNet-50 on ImageNet cut to 41, 32 and 26 layers, each in one training",
        checked="tests/methods/test_filter_methods.py::test_a_factor_of_zero_is_the_unit_gone_and_others_fold_in",
        differs=(
            "no sparsity is asked for: the strength decides it, and the notes say what came of it",
            "what is left of a layer is one filter at least",
        ),
    )
    tiny: ClassVar = {"steps": 40, "strength": 0.2}

    def check(self) -> None:
        """Raise SettingError for kinds, strengths or a training that cannot be."""
        Proximal([], self.strength, self.momentum)
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(
                f"factors for {list(self.kinds)} were asked for",
                "filters and residual blocks have them",
                did_you_mean(unknown[0] if unknown else "", KINDS),
            )
        if self.steps < 1 or self.recover < 0:
            raise SettingError(
                f"steps={self.steps} and recover={self.recover} were given", "one and none are the least", "Give more."
            )
        LearningRate(floor=self.rate_floor)

    def factors(self, model: nn.Module, task: Task) -> tuple[list[Factors], list[str]]:
        """What is scaled, and remarks. Raises GraphError where nothing can be."""
        found, notes = list[Factors](), list[str]()
        if "channel" in self.kinds:
            sites, notes = filters(model, task.example)
            found = factors_of_filters(model, sites)
        if "layer" in self.kinds:
            blocks, why = removable_blocks(model, task.example)
            more, said = factors_of_blocks(model, [block for block in blocks if block.name not in why])
            found, notes = found + more, notes + said
        if not found:
            raise GraphError(
                f"factors for each {' and '.join(self.kinds)} of {type(model).__name__} were asked for",
                "; ".join(notes[:3]) or "nothing reads what its convolutions write",
                "Use other kinds, or soft_filter.",
            )
        return found, notes

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train with factors, fold, take out."""
        self.check()
        factors, notes = self.factors(model, task)
        handles = [handle for each in factors for handle in each.hook_(model)]
        try:
            rules: list[Rule] = [LearningRate(floor=self.rate_floor), Proximal(factors, self.strength, self.momentum)]
            history = fit(model, task, self.steps, rules)
        finally:
            for handle in handles:
                handle.remove()
        edits, keep = list[Edit](), dict[str, Tensor]()
        for each in factors:
            stays = (each.value.detach() != 0).cpu()
            if each.site.kind != "layer" and not bool(stays.any()):
                stays[int(each.value.detach().abs().argmax())] = True
                notes.append(f"every factor of {each.name} is zero: one filter stays")
            keep[each.name] = stays
            edits += apply_(model, each.fold(model, stays))
        edits += apply_(model, removals([each.site for each in factors if each.site.kind != "layer"], keep))
        edits += apply_(model, _blocks_out(model, [each for each in factors if each.site.kind == "layer"], keep))
        total = torch.cat(list(keep.values()))
        notes.append(f"{int(total.sum())} of {len(total)} structures are left at a strength of {self.strength:g}")
        if self.recover:
            history = history.then(fit(model, task, self.recover, [LearningRate()], epoch=history.epoch))
        return Outcome(model, edits, history, notes=notes + history.notes)


def _blocks_out(model: nn.Module, factors: Sequence[Factors], keep: Mapping[str, Tensor]) -> list[Edit]:
    gone = [each for each in factors if not bool(keep[each.name].all())]
    if not gone:
        return []
    names = [each.name for each in factors]
    stays = torch.tensor([bool(keep[name].all()) for name in names])
    edits: list[Edit] = [Mask(blocks_site(model, names), stays)]
    return [*edits, *(Replace(each.name, passing(model.get_submodule(each.name), each.outputs)) for each in gone)]
