"""Gradients held to a length, for networks whose losses have cliffs: recurrent ones, and language models."""

import torch

from secateur.errors import SettingError
from secateur.train import Loop, Rule

__all__ = ["Clip"]


class Clip(Rule):
    """All gradients together are no longer than a norm (Pascanu, Mikolov, Bengio 2013, arXiv 1211.5063, section 3.2).

    Goes after a rule that masks gradients, so that what is masked does not count.
    """

    def __init__(self, norm: float = 1.0) -> None:
        if not norm > 0:
            raise SettingError(
                f"gradients of a norm of {norm:g} were asked for", "a norm is above 0", "Give 1, say, or leave it out."
            )
        self.norm = norm

    def before_step(self, loop: Loop) -> None:
        """Scale what is too long."""
        torch.nn.utils.clip_grad_norm_([p for p in loop.model.parameters() if p.grad is not None], self.norm)
