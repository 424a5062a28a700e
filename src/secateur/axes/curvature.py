"""How the loss bends at some weights of a site: from each example's own gradient, or from second derivatives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from secateur.axes.probes import refuse_once_differentiable, twice_differentiable
from secateur.errors import EvidenceError
from secateur.site import Site, tensors
from secateur.task import Batch


@runtime_checkable
class Curvature(Protocol):
    """What stands for the second derivatives of the loss in a block."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """[block, block], from each example's gradient [examples, block], or from calling `exact`."""
        ...


@dataclass(frozen=True)
class Fisher:
    """The mean over examples of g g^T: the paper's choice. Its rank is at most the number of examples."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        return gradients.T @ gradients / len(gradients)


@dataclass(frozen=True)
class MeanGradient:
    """The mean gradient's own g g^T: of rank one."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        mean = gradients.mean(0)
        return mean[:, None] * mean


@dataclass(frozen=True)
class ExactHessian:
    """The second derivatives themselves, a backward pass for each weight of the block: for small blocks."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        return exact()


# What the loss says of a site


def own_gradients(
    model: nn.Module, site: Site, batch: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> tuple[Tensor, float]:
    """Each example's gradient at a site [examples, units], float32, and the mean loss.

    One example at a time: a mean over a batch has lost them. Raises EvidenceError for a frozen or unused weight.
    """
    part = site.parts[0]
    value = tensors(model)[part.name]
    if not value.requires_grad:
        raise EvidenceError(
            f"the gradient of {site.name} was asked for",
            "it is frozen (requires_grad is False)",
            "Call requires_grad_(True) on it, or leave it out with exclude.",
        )
    rows, total = torch.zeros(len(batch), site.units), 0.0
    for place, example in enumerate(batch):
        with torch.enable_grad():
            found = loss(model, example)
            (whole,) = torch.autograd.grad(found, value, allow_unused=True)
        total += float(found.detach())
        if whole is not None:  # an expert may see no token
            rows[place] = part.view(whole).reshape(-1).float().cpu()
    if not bool(torch.isfinite(rows.sum())):  # of whichever example: a sum keeps it
        raise EvidenceError(
            f"the gradient of {site.name} was measured",
            "it holds NaN or infinity",
            "Look for overflow; half precision often needs bfloat16 or float32.",
        )
    return rows, total / len(batch)


def mean_loss(model: nn.Module, batch: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> float:
    """The mean over examples of the loss of the model as it is."""
    with torch.no_grad():
        return sum(float(loss(model, example)) for example in batch) / len(batch)


def exact_hessian(
    model: nn.Module,
    site: Site,
    places: Tensor,
    batch: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> Tensor:
    """The mean over examples of the second derivatives of the loss at some places of a site [block, block].

    Attention runs unfused meanwhile, as fused kernels have no second derivative. Raises ModelError, with its name, for
    another operation that has none.
    """
    part = site.parts[0]
    value = tensors(model)[part.name]
    total = torch.zeros(len(places), len(places), dtype=torch.float64)
    asked = f"entries of the exact Hessian of {type(model).__name__} were asked for", "curvature=fisher"
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        for example in batch:
            found = loss(model, example)
            refuse_once_differentiable(found, *asked)
            (whole,) = torch.autograd.grad(found, value, create_graph=True, allow_unused=True)
            if whole is None or not whole.requires_grad:  # an expert may see no token, and a line does not bend
                continue
            slope = part.view(whole).reshape(-1)[places.to(whole.device)]
            for i, each in enumerate(slope):
                with twice_differentiable(*asked):
                    (row,) = torch.autograd.grad(each, value, retain_graph=True, allow_unused=True)
                if row is not None:
                    total[i] += part.view(row).reshape(-1)[places.to(row.device)].double().cpu()
    total /= len(batch)
    return (total + total.T) / 2
