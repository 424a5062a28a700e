"""Small trainable changes to weights, of low rank or of every element, that merge exactly into them.

    Lora        W + c B A                                  fills zeros in: for weights that have none
    LoraPrune   W + c B A in training, W + c (B A) * M when merged
    MaskLora    W + c (B A) * M                            what is trained is what is merged
    ScaleLora   W * (B A)                                  zeros stay by themselves
    Offset      W + D, D in float32                        for the few tensors trained whole in half precision

Each stands behind the weight it changes as a parametrisation, so that any layer takes it, and `adapted` merges it on
the way out: plain weights, no hooks, no further parameters. M is what is kept, and is given; it is not read off W.
Hu et al. 2021, "LoRA", arXiv:2106.09685; the variants that keep zeros: Zimmer et al. 2023, arXiv:2312.15230.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import prod
from typing import Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.edit import Edit, Update
from secateur.errors import BudgetError, ModelError, SettingError, SiteError, did_you_mean
from secateur.site import tensors

__all__ = [
    "Adapter",
    "Lora",
    "LoraPrune",
    "LowRank",
    "MaskLora",
    "Offset",
    "ScaleLora",
    "adapted",
    "check_kept",
    "tied_names",
]


class Adapter(Protocol):
    """A module that maps a weight, as it is stored, to the weight the forward pass sees."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The weight in training."""
        ...

    def merged(self, weight: Tensor) -> Tensor:
        """The weight that takes the place of both."""
        ...


@final
class LowRank(nn.Module):
    """B A in the shape of a weight: A [r, in], B [out, r], float32 or wider.

    A kernel is seen as [out, in * kh * kw]. `stacked` experts [experts, ., .] have an A and a B each; a weight that
    is `turned` (the Conv1D of GPT-2) is stored inputs first. A rank above the smaller side is cut to it: it would
    add parameters and nothing they could express.
    """

    def __init__(self, weight: Tensor, rank: int, *, stacked: bool = False, turned: bool = False) -> None:
        super().__init__()
        if rank < 1:
            raise SettingError(f"an adapter of rank {rank} was asked for", "a rank is 1 at least", "Give 16, say.")
        if weight.dim() < 2:
            raise SiteError(
                f"an adapter for a tensor {list(weight.shape)} was asked for",
                "it is no matrix",
                "Train it whole: it has few elements.",
            )
        self.shape, self.turned = tuple(weight.shape), turned
        lead = self.shape[:1] if stacked else ()
        rows, *rest = self.shape[len(lead) :]
        columns = prod(rest)
        if turned:
            rows, columns = columns, rows
        self.rank = min(rank, rows, columns)
        dtype = torch.promote_types(weight.dtype, torch.float32)  # in half precision Adam's steps round to nothing
        self.a = nn.Parameter(torch.empty(*lead, self.rank, columns, dtype=dtype, device=weight.device))
        self.b = nn.Parameter(torch.empty(*lead, rows, self.rank, dtype=dtype, device=weight.device))

    @torch.no_grad()
    def start_at_zero_(self, draw: torch.Generator) -> "LowRank":
        """B = 0, and A uniform within 1 / sqrt(in), so that B A is zero and B has a gradient."""
        bound = self.a.shape[-1] ** -0.5
        self.a.copy_(torch.rand(self.a.shape, generator=draw, dtype=self.a.dtype) * 2 * bound - bound)
        self.b.zero_()
        return self

    @torch.no_grad()
    def start_at_one_(self) -> "LowRank":
        """A = B = 1 / sqrt(r), so that B A is one everywhere."""
        self.a.fill_(self.rank**-0.5)
        self.b.fill_(self.rank**-0.5)
        return self

    def forward(self) -> Tensor:
        """B A, as the weight is stored."""
        product = self.b @ self.a
        return (product.transpose(-2, -1) if self.turned else product).reshape(self.shape)


@final
class Lora(nn.Module):
    """W + c B A. Merging it fills in every zero."""

    def __init__(self, low: LowRank, scale: float) -> None:
        super().__init__()
        self.low, self.scale = low, scale

    def forward(self, weight: Tensor) -> Tensor:
        """W + c B A."""
        return weight + (self.scale * self.low()).to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """What the forward pass sees."""
        return self(weight)


@final
class LoraPrune(nn.Module):
    """W + c B A in training; what falls on a zero is cut off when merged, and with it some of what was learnt."""

    keep: Tensor

    def __init__(self, low: LowRank, scale: float, keep: Tensor) -> None:
        super().__init__()
        self.low, self.scale = low, scale
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """W + c B A."""
        return weight + (self.scale * self.low()).to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """(W + c B A) * M."""
        return self(weight).masked_fill(~self.keep, 0)


@final
class MaskLora(nn.Module):
    """W + c (B A) * M, in training as when merged.

    The product has the size of the weight and is made anew in each pass: about one more weight a layer in memory.
    """

    keep: Tensor

    def __init__(self, low: LowRank, scale: float, keep: Tensor) -> None:
        super().__init__()
        self.low, self.scale = low, scale
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """W + c (B A) * M."""
        return weight + (self.scale * self.low()).masked_fill(~self.keep, 0).to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """What the forward pass sees."""
        return self(weight)


@final
class ScaleLora(nn.Module):
    """W * (B A): each weight is scaled, and zero stays zero."""

    def __init__(self, low: LowRank) -> None:
        super().__init__()
        self.low = low

    def forward(self, weight: Tensor) -> Tensor:
        """W * (B A)."""
        return weight * self.low().to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """What the forward pass sees."""
        return self(weight)


@final
class Offset(nn.Module):
    """W + D with D in float32, zero where nothing is kept: Adam's small steps add up before they are rounded."""

    keep: Tensor | None

    def __init__(self, weight: Tensor, keep: Tensor | None = None) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(weight.shape, dtype=torch.float32, device=weight.device))
        self.register_buffer("keep", keep, persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """W + D, rounded once."""
        change = self.change if self.keep is None else self.change.masked_fill(~self.keep, 0)
        return (weight.to(change.dtype) + change).to(weight.dtype)

    def merged(self, weight: Tensor) -> Tensor:
        """What the forward pass sees."""
        return self(weight)


@contextmanager
def adapted(model: nn.Module, adapters: Mapping[str, nn.Module]) -> Iterator[list[Edit]]:
    """Within this the model runs with adapters (tensor name -> Adapter); afterwards they are merged into its weights.

    Yields a list that receives an Update for each merged tensor. When something is raised inside, the adapters are
    taken out and the weights are as they were. Raises SiteError for a name the model does not have, ModelError for a
    tensor that several modules share or that is behind a gate.
    """
    merged: list[Edit] = []
    orders: dict[str, list[str]] = {}
    _check_targets(model, adapters)
    try:
        for name, adapter in adapters.items():
            module, attribute = _holder(model, name)
            orders[name] = list(module._parameters)
            parametrize.register_parametrization(module, attribute, adapter)
        yield merged
        with torch.no_grad():
            values = {n: adapters[n].merged(_original(model, n)).contiguous() for n in adapters}  # type: ignore[operator]
    except BaseException:
        for name in reversed(orders):
            _take_out(model, name, orders[name])
        raise
    for name in reversed(orders):
        _take_out(model, name, orders[name])
    for name, value in values.items():
        module, attribute = _holder(model, name)
        getattr(module, attribute).data = value.detach()
        merged.append(Update(name, value))


def check_kept(model: nn.Module, keep: Mapping[str, Tensor], asked: str = "weights were to be recovered") -> None:
    """Raise BudgetError unless every tensor is zero where it is not kept: the sparsity would have moved."""
    named = tensors(model)
    filled = {n: int((named[n].detach()[~k.to(named[n].device)] != 0).sum()) for n, k in keep.items()}
    worst = max(filled, key=lambda n: filled[n], default="")
    if worst and filled[worst]:
        gone = sum(int((~k).sum()) for k in keep.values())
        raise BudgetError(
            f"{asked} with their {gone:,} zeros in place",
            f"{sum(filled.values()):,} of them are filled in, {filled[worst]:,} in {worst}",
            "Use an adapter that keeps zeros, such as mask-lora, and hold the masks while training.",
        )


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """The names of every parameter that goes by more than one: each name -> all of them."""
    found: dict[int, list[str]] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(value), []).append(name)
    return {name: names for names in found.values() if len(names) > 1 for name in names}


def _check_targets(model: nn.Module, adapters: Mapping[str, nn.Module]) -> None:
    tied, named = tied_names(model), dict(model.named_parameters(remove_duplicate=False))
    for name in adapters:
        asked = f"an adapter was to be put on {name}"
        module = model.get_submodule(name.rpartition(".")[0]) if _has(model, name.rpartition(".")[0]) else None
        if module is not None and parametrize.is_parametrized(module, name.rpartition(".")[2]):
            raise ModelError(asked, "it is behind a gate or another adapter", "Harden it first.")
        if name not in named:
            raise SiteError(asked, "the model has no parameter of that name", did_you_mean(name, named))
        if name in tied:
            others = [other for other in tied[name] if other != name]
            raise ModelError(
                asked,
                f"it is one tensor with {', '.join(others)}, which would change when merged, and not before",
                f"Leave it out with exclude={name.removesuffix('.weight')}, or untie them first.",
            )


def _has(model: nn.Module, path: str) -> bool:
    try:
        model.get_submodule(path)
    except AttributeError:
        return False
    return True


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _original(model: nn.Module, name: str) -> Tensor:
    module, attribute = _holder(model, name)
    found = module.parametrizations[attribute].original  # type: ignore[index,union-attr]
    assert isinstance(found, Tensor)
    return found.detach()


def _take_out(model: nn.Module, name: str, order: Sequence[str]) -> None:
    """The plain parameter again, in its old place: optimizers and files go by the order."""
    module, attribute = _holder(model, name)
    if not parametrize.is_parametrized(module, attribute):
        return
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=False)
    if set(order) == set(module._parameters):
        held = dict(module._parameters)
        module._parameters.clear()
        module._parameters.update({key: held[key] for key in order})
