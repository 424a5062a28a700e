"""Optimizers as values: what a task is usually trained with, written down once and printed in records."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.optim import Optimizer


class Learner(Protocol):
    """Makes an optimizer for parameters."""

    @property
    def rate(self) -> float:
        """The learning rate."""
        ...

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer."""
        ...


@dataclass(frozen=True)
class Sgd:
    """Stochastic gradient descent with momentum: the usual choice for convolutional networks."""

    rate: float = 0.1
    momentum: float = 0.9
    decay: float = 0.0
    nesterov: bool = False

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh torch.optim.SGD."""
        return torch.optim.SGD(
            parameters, self.rate, momentum=self.momentum, weight_decay=self.decay, nesterov=self.nesterov
        )


@dataclass(frozen=True)
class Adam:
    """Adam (Kingma and Ba 2014, arXiv 1412.6980)."""

    rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh torch.optim.Adam."""
        return torch.optim.Adam(parameters, self.rate, betas=self.betas)


@dataclass(frozen=True)
class AdamW:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101)."""

    rate: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    decay: float = 0.0

    def __call__(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh torch.optim.AdamW."""
        return torch.optim.AdamW(parameters, self.rate, betas=self.betas, weight_decay=self.decay)
