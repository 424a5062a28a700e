"""Penalties on the scales of norms: pulled to zero while a network is trained, channel by channel.

`ScalePenalty` is the rule, and a `Pressure` says how hard each channel is pulled:

    Everywhere    all alike                                                (network slimming, Liu et al. 2017)
    Condemned     only what a mask is going to remove                      (MaskSparsity, Jiang et al. 2022)
    Weakest       the weaker most, from some moment on, others a little    (Chu et al. 2023)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.patterns import keep_top
from secateur.errors import SettingError, SiteError, did_you_mean
from secateur.site import Tensors
from secateur.train import Loop, Rule


@runtime_checkable
class Slope(Protocol):
    """The derivative of a penalty on a value."""

    def __call__(self, value: Tensor, least: float) -> Tensor:
        """The derivative at a value; a step moves it by `least` times as much."""
        ...


@dataclass(frozen=True)
class L1:
    """The sign: what is small shrinks as fast as what is large, and comes to zero."""

    def __call__(self, value: Tensor, least: float) -> Tensor:
        """The sign of the value, 0 at 0."""
        return value.sign()


@dataclass(frozen=True)
class L2:
    """The value itself: what is small shrinks slowly."""

    def __call__(self, value: Tensor, least: float) -> Tensor:
        """The value."""
        return value


@dataclass(frozen=True)
class SmoothL1:
    """The sign, but the value itself where a step of the sign would pass zero, so that nothing swings round it."""

    def __call__(self, value: Tensor, least: float) -> Tensor:
        """The sign beyond `least`, the value within."""
        return torch.where(value.abs() < least, value, value.sign())


@runtime_checkable
class Pressure(Protocol):
    """How hard each channel's scale is pulled to zero."""

    def shares(self, scales: Tensors, progress: float) -> Tensors:
        """A factor of the strength for every entry, by tensor name, at a share of training; what is left out is 0."""
        ...


@dataclass(frozen=True)
class Everywhere:
    """All alike. Liu, Li, Shen, Huang, Yan, Zhang 2017, arXiv 1708.06519, equation 1."""

    def shares(self, scales: Tensors, progress: float) -> Tensors:
        """Ones."""
        return {name: torch.ones_like(scale) for name, scale in scales.items()}


class Condemned:
    """Only what masks are going to remove: `keep` is True where a channel stays, and names without one are let be.

    Jiang, Zhao, Zhao, An, Tang, Wang 2022, arXiv 2201.06776: s |gamma| (1 - K), K the mask.
    """

    def __init__(self, keep: Tensors) -> None:
        self.keep = {name: mask.bool() for name, mask in keep.items()}

    def shares(self, scales: Tensors, progress: float) -> Tensors:
        """1 where the mask is False. Raises SiteError for a mask of another length than the scale."""
        for name, mask in self.keep.items():
            if name not in scales or mask.shape != scales[name].shape:
                there = list(scales[name].shape) if name in scales else "not among the scales"
                raise SiteError(
                    f"a mask of {list(mask.shape)} for the scale {name} was given",
                    f"that is {there}",
                    "Give one boolean for each channel, True where it stays.",
                )
        return {name: (~mask).to(scales[name]) for name, mask in self.keep.items()}


@dataclass(frozen=True)
class Weakest:
    """All alike at first; then the weakest of all channels as before, and the others hardly, ranked anew every step.

    Chu, Li, Bai, Hu, Chen, Lu 2023, arXiv 2306.01526: after 0.4 of training, 65 % fully, the rest by 1 %.
    """

    share: float = 0.65  # of the channels that are weak
    leak: float = 0.01  # of the strength for the others
    begin: float = 0.4  # share of training from which on they are told apart

    def __post_init__(self) -> None:
        for name in ("share", "leak", "begin"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingError(
                    f"{name}={getattr(self, name):g} of a penalty was given", "it is a fraction, in [0, 1]", "Give 0.5."
                )

    def shares(self, scales: Tensors, progress: float) -> Tensors:
        """1 for the weak by |scale| over all tensors, by count, and the leak for the others."""
        if progress <= self.begin or not scales:
            return Everywhere().shares(scales, progress)
        whole = torch.cat([scale.abs().reshape(-1) for scale in scales.values()])
        strong = keep_top(whole, len(whole) - int(self.share * len(whole) + 1e-9))
        found = torch.split(torch.where(strong, self.leak, 1.0).to(whole), [scale.numel() for scale in scales.values()])
        return {name: value.view_as(scale) for (name, scale), value in zip(scales.items(), found, strict=True)}


class ScalePenalty(Rule):
    """The scales of norms are pulled to zero: strength * share * slope is added to their gradients, once a step.

    A step moves a scale by about rate * strength / (1 - momentum); one at zero swings that far round it. `scales` are
    tensor names; the weight decay of the optimizer works on them as on all else. Gradients that are gathered over
    several batches get it once. The curve "scales below 0.01" is the share of all entries that are all but zero.
    """

    def __init__(
        self, scales: Sequence[str], strength: float, pressure: Pressure | None = None, slope: Slope | None = None
    ) -> None:
        if not strength > 0:
            raise SettingError(
                f"a penalty of strength {strength:g} was asked for", "it pulls only when above 0", "Give 0.001, say."
            )
        if not scales:
            raise SiteError("scales were to be penalised", "there are none", "Give a model with batch norms.")
        self.scales, self.strength = tuple(dict.fromkeys(scales)), strength
        self.pressure: Pressure = Everywhere() if pressure is None else pressure
        self.slope: Slope = L1() if slope is None else slope

    def start(self, loop: Loop) -> None:
        """Find the scales. Raises SiteError for one that is not there, or is not trained."""
        named = loop.tensors
        trained = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        for name in self.scales:
            asked = f"the scale {name} was to be penalised"
            if name not in named:
                raise SiteError(asked, "the model has no tensor of that name", did_you_mean(name, named))
            if not named[name].requires_grad or id(named[name]) not in trained:
                raise SiteError(asked, "it is frozen: it gets no gradient, or no step", "Train it, or leave it out.")
        self._look(loop)

    def before_step(self, loop: Loop) -> None:
        """Add the penalty's share to the gradients."""
        named = loop.tensors
        values = {name: named[name].detach() for name in self.scales}
        rates = {id(p): float(group["lr"]) for group in loop.optimizer.param_groups for p in group["params"]}
        for name, share in self.pressure.shares(values, loop.progress).items():
            scale = named[name]
            if scale.grad is None:
                raise SiteError(
                    f"the scale {name} was to be penalised",
                    "no gradient reached it",
                    "Leave out what the loss ignores.",
                )
            pull = self.slope(values[name], rates[id(scale)] * self.strength)
            scale.grad.add_(share.to(pull) * pull, alpha=self.strength)

    def after_step(self, loop: Loop) -> None:
        """Look now and then."""
        if loop.step % max(1, loop.steps // 20) == 0 or loop.step == loop.steps:
            self._look(loop)

    def _look(self, loop: Loop) -> None:
        named = loop.tensors
        values = torch.cat([named[name].detach().reshape(-1).abs() for name in self.scales])
        loop.log("scales below 0.01", float((values < 0.01).float().mean()))
