"""Averages of weights over training steps, in which what is pruned stays zero.

    average = AveragedModel(model, multi_avg_fn=SparseAverage(0.999))        # torch.optim.swa_utils
    ...
    optimizer.step(); average.update_parameters(model)

A plain average remembers the weights from before they were masked: it is dense for as long as its memory lasts, and one
with equal weights for ever.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SettingError


@dataclass(frozen=True)
class SparseAverage:
    """What a weight was, on average, since it was last zero; zero while it is zero.

    With a decay, the exponential moving average (Polyak and Juditsky 1992); without, all steps count alike, as in
    stochastic weight averaging (Izmailov et al. 2018, arXiv 1803.05407). A weight that comes back starts from zero, and
    its average follows in 1 / (1 - decay) steps. Whole numbers are those of the last step. Give the model as the
    forward pass sees it, which is what it is between steps.
    """

    decay: float | None = 0.999  # how much of the average stays at each step; None: equal weights

    def __post_init__(self) -> None:
        if self.decay is not None and not 0 <= self.decay < 1:
            raise SettingError(
                f"an average with a decay of {self.decay:g} was asked for", "it is in [0, 1)", "Give 0.999, or None."
            )

    @torch.no_grad()
    def __call__(self, averaged: Sequence[Tensor], current: Sequence[Tensor], count: Tensor | int) -> None:
        """Change the averages, given the tensors now and how many steps were averaged before."""
        share = 1 / (int(count) + 1) if self.decay is None else 1 - self.decay
        for mean, now in zip(averaged, current, strict=True):
            if not mean.is_floating_point():
                mean.copy_(now)
                continue
            mean.lerp_(now.detach().to(mean.dtype), share)
            mean.masked_fill_(now == 0, 0)
