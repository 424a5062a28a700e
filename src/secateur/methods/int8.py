"""Eight bits: keep every weight, and write each in one byte. What a pruned model must beat at the same size.

Rounding to the nearest of 255 levels, a scale for each row of outputs, as Dettmers, Lewis, Belkada, Zettlemoyer.
"LLM.int8(): 8-bit Matrix Multiplication for Transformers at Scale." 2022. arXiv:2208.07339, section 2.1, give it:

    scale[i] = max over j of |W[i, j]| / 127        W[i, j] becomes scale[i] * round(W[i, j] / scale[i])
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Update, apply_
from secateur.method import Card, Method
from secateur.outcome import Outcome, stored_bytes
from secateur.site import tensors
from secateur.task import Task

LEVELS = 127  # on either side of zero


def rounded(weight: Tensor) -> Tensor:
    """A matrix or kernel [out, ...] as its 8-bit form reads back, in the same type; a row of zeros stays."""
    rows = weight.flatten(1).float()
    scale = rows.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / LEVELS
    return ((rows / scale).round() * scale).reshape(weight.shape).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Int8(Method):
    """Round the weights to 8 bits, a scale a row. Removes nothing: the control for every claim of fewer bytes."""

    include: tuple[str, ...] = ()  # what to round, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "8-bit weights by rounding (control)",
        arxiv="2208.07339",
        year=2022,
        axes="edit",
        criterion=("none",),
        tasks=("any",),
        allocation=("none",),
        updates=("solved",),
        fusion=("quantisation",),
        checked="tests/methods/test_int8.py::test_rounding_by_hand",
        differs=(
            "Weights only: activations stay as they are, so that no outliers need a path of their own.",
            "The rounding is simulated: the model computes in its own type, and the bytes of the 8-bit form are "
            "counted.",
        ),
    )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        sites = weights(model, self.include, self.exclude)
        named = tensors(model)
        fresh: dict[str, Tensor] = {}
        saved = 0
        for site in sites:
            part = site.parts[0]
            whole = fresh.setdefault(part.name, named[part.name].detach().clone())
            seen = part.view(whole)  # [out, ...]
            seen.copy_(rounded(seen))
            scales = seen.shape[0] * seen.element_size()
            saved += seen.numel() * (seen.element_size() - 1) - scales
        taken = stored_bytes(model) - saved
        edits = apply_(model, [Update(name, value) for name, value in fresh.items()])
        notes = [
            f"the weights in {len(sites)} sites are rounded to 8 bits with a scale a row; kept so they would take "
            f"{taken:,} bytes with all that is left alone, in memory here they take what they took"
        ]
        return Outcome(model, edits, notes=notes, stored_bytes=taken)
