"""How much the loss would change without a unit: its weights times their gradients, over all that it owns.

With g = dL/dw on some samples, F the mean of the squared gradients of single samples, and sums over a unit's slice of a
tensor (Ma, Fang, Wang 2023, "LLM-Pruner", arXiv:2305.11627, section 3.2):

    vectorize |sum w g|     first sum |w g|     second sum |w^2 F|     mix sum |w g - w^2 F / 2|
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import EvidenceError
from secateur.evidence import calm, examples
from secateur.site import Site, tensors
from secateur.task import Batch, Task


class Taylor(Protocol):
    """How much the loss would change without a slice of a tensor."""

    squares: ClassVar[bool]  # whether it reads F, which takes a backward pass per sample

    def slices(self, weight: Tensor, grad: Tensor, square: Tensor, over: tuple[int, ...]) -> Tensor:
        """A weight, its gradient and its F -> one value per slice, summed over the axes `over`."""
        ...


@dataclass(frozen=True)
class Vectorize:
    """First order, the slice as one: gains and losses inside it cancel."""

    squares: ClassVar = False

    def slices(self, weight: Tensor, grad: Tensor, square: Tensor, over: tuple[int, ...]) -> Tensor:
        """See Taylor."""
        return _sum(weight * grad, over).abs()


@dataclass(frozen=True)
class First:
    """First order, element by element."""

    squares: ClassVar = False

    def slices(self, weight: Tensor, grad: Tensor, square: Tensor, over: tuple[int, ...]) -> Tensor:
        """See Taylor."""
        return _sum((weight * grad).abs(), over)


@dataclass(frozen=True)
class Second:
    """Second order alone, by the diagonal of the Fisher information."""

    squares: ClassVar = True

    def slices(self, weight: Tensor, grad: Tensor, square: Tensor, over: tuple[int, ...]) -> Tensor:
        """See Taylor."""
        return _sum((weight.square() * square).abs(), over)


@dataclass(frozen=True)
class Mix:
    """First and second order, element by element."""

    squares: ClassVar = True

    def slices(self, weight: Tensor, grad: Tensor, square: Tensor, over: tuple[int, ...]) -> Tensor:
        """See Taylor."""
        return _sum((weight * grad - 0.5 * weight.square() * square).abs(), over)


def _sum(values: Tensor, over: tuple[int, ...]) -> Tensor:
    return values.sum(over) if over else values  # sum(()) would be over everything


class Combine(Protocol):
    """The values of a unit's shares of several tensors -> one score."""

    def of(self, parts: Tensor) -> Tensor:
        """[parts, units] -> [units]."""
        ...


@dataclass(frozen=True)
class Total:
    """All shares count."""

    def of(self, parts: Tensor) -> Tensor:
        """See Combine."""
        return parts.sum(0)


@dataclass(frozen=True)
class Average:
    """All shares count; as many of them as there are."""

    def of(self, parts: Tensor) -> Tensor:
        """See Combine."""
        return parts.mean(0)


@dataclass(frozen=True)
class Largest:
    """The share that matters most speaks for the unit."""

    def of(self, parts: Tensor) -> Tensor:
        """See Combine."""
        return parts.amax(0)


@dataclass(frozen=True)
class Product:
    """A unit of which one share does not matter does not matter."""

    def of(self, parts: Tensor) -> Tensor:
        """See Combine."""
        return parts.prod(0)


@dataclass(frozen=True)
class Foremost:
    """The share of the tensor that makes the unit speaks for it."""

    def of(self, parts: Tensor) -> Tensor:
        """See Combine."""
        return parts[0]


def group_scores(
    site: Site,
    named: Mapping[str, Tensor],
    grads: Mapping[str, Tensor],
    squares: Mapping[str, Tensor],
    taylor: Taylor,
    combine: Combine,
) -> Tensor:
    """One score per unit [units], float64: slices are a row or column each, and a head sums those it owns."""
    found = []
    for part in site.parts:
        weight = part.read(named).detach().double()
        grad = part.read(grads).double()
        square = part.read(squares).double() if taylor.squares else grad
        over = tuple(axis for axis in range(weight.dim()) if axis != part.axis)
        slices = taylor.slices(weight, grad, square, over)
        assert part.owner is not None
        owner = part.owner.reshape(-1).to(slices.device)
        mine = owner >= 0
        units = torch.zeros(site.units, dtype=slices.dtype, device=slices.device)
        found.append(units.index_add(0, owner[mine], slices[mine]))
    return combine.of(torch.stack(found)).cpu()


def gradients(
    model: nn.Module, task: Task, batches: Sequence[Batch], names: set[str], squares: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By tensor name: the gradient of the mean loss over all samples, and the mean of single samples' squared ones.

    The second is empty unless asked for; it takes a backward pass per sample. Raises EvidenceError for no samples, and
    for gradients that are not finite.
    """
    named = {name: value for name, value in tensors(model).items() if name in names}
    total: dict[str, Tensor] = {name: torch.zeros_like(v, dtype=torch.float32) for name, v in named.items()}
    square = {name: torch.zeros_like(v) for name, v in total.items()} if squares else {}
    count = sum(batch.size for batch in batches)
    frozen = [value for value in named.values() if not value.requires_grad]
    try:
        for value in frozen:
            value.requires_grad_(True)
        with calm(model), torch.enable_grad():
            for batch in examples(batches) if squares else batches:
                found = torch.autograd.grad(task.loss(model, batch), list(named.values()), allow_unused=True)
                for name, grad in zip(named, found, strict=True):
                    if grad is not None:
                        total[name] += grad.float() * (batch.size / count)
                        if squares:
                            square[name] += grad.float().square() / count
    finally:
        for value in frozen:
            value.requires_grad_(False)
    wrong = next((name for name, value in total.items() if not bool(torch.isfinite(value).all())), None)
    if not count or wrong:
        raise EvidenceError(
            "gradients of the loss were to be taken",
            f"that of {wrong} holds NaN or infinity" if wrong else "there are no calibration samples",
            "Give calibration data; where half precision overflows use bfloat16 or float32.",
        )
    return total, square
