"""Training that looks for flat ground: the gradient is taken where the loss nearby is highest.

Foret, Kleiner, Mobahi, Neyshabur. "Sharpness-Aware Minimization for Efficiently Improving Generalization." ICLR 2021.
arXiv:2010.01412, equation 2 and algorithm 1; adaptive: Kwon, Kim, Park, Choi. "ASAM." ICML 2021. arXiv:2102.11600.

    e = rho g / ||g||,    step with the gradient at theta + e        adaptive: e = rho theta^2 g / || |theta| g ||
"""

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.axes.rules import Gradual, Hold, Shadow
from secateur.errors import SettingError, TaskError
from secateur.train import Loop, Rule


def ascent(
    values: Sequence[Tensor], gradients: Sequence[Tensor], radius: float, adaptive: bool = False
) -> list[Tensor]:
    """How far each tensor moves to where the loss is highest, all of them `radius` together; shapes as given.

    `adaptive` measures each weight by its own size, so that rescaling layers changes nothing.
    """
    towards = [v.abs() * g for v, g in zip(values, gradients, strict=True)] if adaptive else list(gradients)
    norm = float(torch.nn.utils.get_total_norm(towards))
    sized = [v.abs() * t for v, t in zip(values, towards, strict=True)] if adaptive else towards
    return [step * (radius / (norm + 1e-12)) for step in sized]


class Sam(Rule):
    """Each step is taken with the gradient found a radius uphill; it costs a second forward and backward pass.

    Masked weights stay zero on the way. Batch norms learn from the first pass alone. Goes before the rules that hold
    masks, which then see the gradient the optimizer gets; raises SettingError after one, and TaskError in a loop of
    your own, where the loss cannot be asked for again.
    """

    def __init__(self, radius: float = 0.05, adaptive: bool = False) -> None:
        if not (isfinite(radius) and radius >= 0):
            raise SettingError(
                f"a radius of {radius:g} was asked for", "it is a distance between weights", "Give 0.05, or 0 for none."
            )
        self.radius, self.adaptive = radius, adaptive

    def start(self, loop: Loop) -> None:
        """Check that the loss can be asked for, and that masks are held after."""
        if loop.task is None:
            raise TaskError(
                "a second gradient a step was asked for", "this loop has no task to ask for the loss", "Train by fit."
            )
        before = list(loop.rules)[: next(i for i, rule in enumerate(loop.rules) if rule is self)]
        if any(isinstance(rule, (Hold, Shadow, Gradual)) for rule in before):
            raise SettingError(
                "a second gradient a step was asked for",
                "a rule that holds masks comes before it, and would not see that gradient",
                "Give Sam first.",
            )

    def before_step(self, loop: Loop) -> None:
        """Go uphill, take the gradient there, come back."""
        if self.radius == 0:
            return
        assert loop.task is not None
        assert loop.batch is not None
        moved = [p for group in loop.optimizer.param_groups for p in group["params"] if p.grad is not None]
        gone = _masked(loop)
        gradients = [_without(p.grad, gone.get(id(p))) for p in moved]
        origin = [p.detach().clone() for p in moved]
        statistics = [b for m in loop.model.modules() if isinstance(m, _BatchNorm) for b in m.buffers()]
        seen = [b.clone() for b in statistics]
        with torch.no_grad():
            for p, step in zip(moved, ascent(origin, gradients, self.radius, self.adaptive), strict=True):
                p.add_(step)
        value = loop.task.loss(loop.model, loop.batch)
        for rule in loop.rules:
            value = rule.loss(loop, value)
        loop.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        with torch.no_grad():
            for p, was in zip(moved, origin, strict=True):
                p.copy_(was)
            for b, was in zip(statistics, seen, strict=True):
                b.copy_(was)


def _masked(loop: Loop) -> dict[int, Tensor]:
    """Where masks of the loop's rules leave nothing: id of the parameter -> bool as it is stored."""
    named, found = loop.tensors, dict[int, Tensor]()
    for rule in loop.rules:
        if not isinstance(rule, (Hold, Shadow, Gradual)):
            continue
        for site in rule.sites:
            gone = site.expand(rule.keep[site.name] == 0)
            for part in site.parts:
                parameter = named[part.name]
                held = found.setdefault(id(parameter), torch.zeros_like(parameter, dtype=torch.bool))
                part.view(held).logical_or_(gone[part.key].to(held.device))
    return found


def _without(gradient: Tensor | None, gone: Tensor | None) -> Tensor:
    assert gradient is not None
    return gradient.detach() if gone is None else gradient.detach().masked_fill(gone, 0)
