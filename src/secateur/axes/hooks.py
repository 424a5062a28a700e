"""What stands beside a linear layer while adapters are trained: hooks, and the layers that can take one.

Behind a parametrisation (`secateur.adapters`) the product B A is made in every pass, in the size of the weight. Here it
never is, and what a layer puts out can be masked with it or without it.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.adapters import LowRank
from secateur.cut import weights
from secateur.errors import SiteError
from secateur.site import Part
from secateur.stream import handing_on


class Hook(Protocol):
    """A linear layer's part, and what is done to what the layer puts out."""

    part: Part

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """What is put out instead."""
        ...


@contextmanager
def hooked(model: nn.Module, layers: Mapping[str, Hook]) -> Iterator[None]:
    """Within this, adapters and masks take part in the forward pass; afterwards the model is as it was."""
    hooks = [model.get_submodule(layer.part.module).register_forward_hook(layer) for layer in layers.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Adapted:
    """A linear layer and what stands beside it: y = (W x + b + c B A x) * mask. A forward hook.

    The product B A is never made in training, and of W no gradient is asked: what is kept is of the adapter's size.
    """

    def __init__(
        self, part: Part, frozen: nn.Parameter, low: LowRank | None, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        self.part, self.frozen, self.low = part, frozen, low
        self.scale, self.dropout = scale, dropout
        self.mask: Tensor | None = None  # of what is put out [out]; None: all of it counts

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """What the layer puts out, with what is learnt beside it, masked."""
        if self.low is not None:
            x = F.dropout(given[0].to(self.low.a.dtype), self.dropout, module.training)
            out = out + (self.scale * F.linear(F.linear(x, self.low.a), self.low.b)).to(out.dtype)
        return out if self.mask is None else out * self.mask.to(out)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + c B A, as it is stored and in the dtype of W."""
        if self.low is None:
            return self.frozen.detach()
        low = self.low()
        return (self.frozen.detach().to(low.dtype) + self.scale * low).to(self.frozen.dtype)

    def weight(self) -> Tensor:
        """The same, outputs first: [out, in], float32 or wider."""
        seen = self.part.view(self.merged())
        return seen if seen.dtype == torch.float64 else seen.float()


def is_linear(module: nn.Module) -> bool:
    """Whether a module multiplies its one input by its weight when it is called; GPT-2's Conv1D does."""
    # nn.MultiheadAttention reads the weight of its out_proj and never calls it.
    plain = isinstance(module, nn.Linear) and type(module).__name__ != "NonDynamicallyQuantizableLinear"
    return plain or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def adaptable(model: nn.Module, include: Sequence[str], exclude: Sequence[str]) -> dict[str, Part]:
    """The matrices of a model's linear layers by the name of the weight, of those chosen as `weights` chooses.

    A layer may have further matrices, such as the shortcut of a sliced stream: an adapter goes beside its weight. One
    that changes the width of such a stream is left out: what it makes goes past what it puts out. Raises SiteError
    where there are none.
    """
    parts = [site.parts[0] for site in weights(model, include, exclude)]
    past = handing_on(model)
    found = {
        part.name: part
        for part in parts
        if part.name == f"{part.module}.weight"
        and part.index is None
        and part.module not in past
        and is_linear(model.get_submodule(part.module))
    }
    if not found:
        raise SiteError(
            f"adapters for {type(model).__name__} were asked for",
            "none of the matrices chosen is that of a linear layer",
            "Widen include=, or narrow exclude=.",
        )
    return found
