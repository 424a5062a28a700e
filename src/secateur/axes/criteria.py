"""Evidence and tensors to one score per unit, higher = keep."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.errors import EvidenceError
from secateur.evidence import Evidence
from secateur.site import Site, Tensors
from secateur.task import stream


@runtime_checkable
class Criterion(Protocol):
    """What makes a unit worth keeping."""

    @property
    def needs(self) -> frozenset[str]:
        """The evidence it reads, checked before any pass over data."""
        ...

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """One score per unit [*site.shape], higher = keep."""
        ...


@dataclass(frozen=True)
class Magnitude:
    """A weight matters if it is large; a unit, if what it owns is large in sum."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """Sum of |w| over what each unit owns."""
        return site.gather({part.name: tensors[part.name].detach().abs() for part in site.parts})


@dataclass(frozen=True)
class Random:
    """No unit matters more than another: the control every criterion must beat."""

    seed: int = 0

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """Uniform in [0, 1), drawn from the seed and the site's name."""
        return torch.rand(site.shape, generator=stream(self.seed, site.name))


def wanda_score(weight: Tensor, input_square: Tensor) -> Tensor:
    """|W[i, j]| * ||X[:, j]||: weight [out, in, ...], summed squares of the inputs [in...] or [groups, in...]."""
    norm = input_square.sqrt().to(weight.dtype)
    if norm.dim() == 2:  # a grouped convolution: each group of rows meets inputs of its own
        norm = norm.repeat_interleave(weight.shape[0] // norm.shape[0], dim=0)
        return weight.detach().abs() * norm.reshape(weight.shape)
    return weight.detach().abs() * norm.reshape(1, *weight.shape[1:])


@dataclass(frozen=True)
class Wanda:
    """A weight matters if it is large, or if what flows into it is loud.

    Sun, Liu, Bair, Kolter 2023, arXiv:2306.11695, section 3, equation 1: S = |W| * ||X||. For a unit that owns many
    weights, the sum over them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_square"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """See wanda_score. Raises EvidenceError where nothing flowed in."""
        if seen.count == 0:
            raise EvidenceError(
                f"{site.name} was to be scored by its inputs",
                "no calibration token reached it",
                "Give more calibration data, or leave it out with exclude.",
            )
        part = site.parts[0]
        return wanda_score(part.read(tensors).float(), seen.sums["input_square"])
