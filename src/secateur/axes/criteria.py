"""Evidence and tensors to one score per unit, higher = keep."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.errors import EvidenceError, SettingError
from secateur.evidence import GRADS, Evidence
from secateur.kernels.products import add_product
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


def over_inputs(value: Tensor, weight: Tensor) -> Tensor:
    """A value per input, [in...] or [groups, in...], so that it can be multiplied with the weight [out, in, ...]."""
    if value.dim() == 2:  # a grouped convolution: each group of rows meets inputs of its own
        value = value.repeat_interleave(weight.shape[0] // value.shape[0], dim=0)
        return value.reshape(weight.shape)
    return value.reshape(1, *weight.shape[1:])


def wanda_score(weight: Tensor, input_square: Tensor) -> Tensor:
    """|W[i, j]| * ||X[:, j]||: weight [out, in, ...], summed squares of the inputs [in...] or [groups, in...]."""
    return weight.detach().abs().mul_(over_inputs(input_square.sqrt().to(weight.dtype), weight))


@dataclass(frozen=True)
class Wanda:
    """A weight matters if it is large, or if what flows into it is loud.

    Sun, Liu, Bair, Kolter 2023, arXiv:2306.11695, section 3, equation 1: S = |W| * ||X||. For a unit that owns many
    weights, the sum over them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"input_square"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """See wanda_score. Raises EvidenceError where nothing flowed in."""
        part = site.parts[0]
        return wanda_score(part.read(tensors).float(), measured(site, seen, "input_square"))


def measured(site: Site, seen: Evidence, key: str) -> Tensor:
    """The sum of some evidence. Raises EvidenceError where nothing was seen."""
    if seen.count == 0 or key not in seen.sums:
        raise EvidenceError(
            f"{site.name} was to be scored by its {'gradients' if key in GRADS else 'inputs'}",
            "no calibration token reached it in a product, or in a convolution over one or two axes",
            "Give more calibration data, or leave it out with exclude.",
        )
    return seen.sums[key]


def gram_factor(gram: Tensor, damp: float, name: str = "") -> tuple[Tensor, Tensor]:
    """R, lower triangular, with H = R^T R for the damped gram H [in, in]; and which inputs are dead [in].

    Raises EvidenceError for a gram that ten times the damping does not make positive definite.
    """
    diagonal = gram.diagonal()
    dead = diagonal == 0
    live = diagonal[~dead]
    mean = float(live.mean()) if len(live) else 1.0
    # Damped, the gram is far from singular, and float32 is enough; what it cannot factor, float64 may. The last try is
    # with ten times the damping.
    for share, dtype in ((damp, torch.float32), (damp, torch.float64), (10 * damp, torch.float64)):
        lower = gram.to(dtype, copy=True)  # one copy, factored in place: of a wide layer it is larger than the weights
        lower.diagonal().masked_fill_(dead, mean).add_(share * mean)
        if factor_(lower):
            return lower.float(), dead
    raise EvidenceError(
        f"the inputs of {name or 'a layer'} were to be inverted",
        "their gram is not positive definite, even with ten times the damping",
        "Give more calibration data, or a larger damp.",
    )


def factor_(matrix: Tensor, block: int = 128) -> bool:
    """Put R, lower triangular with R^T R the matrix, in its place; False where it is not positive definite.

    From the last block up, what is above brought up to date by products of matrices: on one thread faster than
    LAPACK's Cholesky of the reversed matrix, which is the same. The lower triangle is read.
    """
    for b in range(len(matrix), 0, -block):
        a = max(b - block, 0)
        turned, failed = torch.linalg.cholesky_ex(matrix[a:b, a:b].flip(0, 1), upper=True)
        if int(failed):
            return False
        square = turned.flip(0, 1)
        # By a small inverse and a product: a triangular solve of as many columns takes four times as long.
        inverse = torch.linalg.solve_triangular(square.T, torch.eye(b - a, dtype=square.dtype), upper=True)
        left = inverse @ matrix[a:b, :a]
        matrix[a:b, :a], matrix[a:b, a:b], matrix[a:b, b:] = left, square, 0
        add_product(matrix[:a, :a], left.T, left.T, scale=-1, lower=True)
    return True


@dataclass(frozen=True)
class Obs:
    """A weight matters by the error its loss leaves when the inputs to come may make up for it.

    The saliency of a sweep before anything is swept: w_j^2 / U_jj^2 with U = chol(H^-1), upper (Frantar and Alistarh
    2023, arXiv:2301.00774, section 3.3). The weights stay as they are.
    """

    damp: float = 0.01  # added to the diagonal of the gram, as a share of its mean

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """(w_j R_jj)^2 with R of gram_factor, whose diagonal is 1 / U_jj; zero for an input that is always zero."""
        gram = measured(site, seen, "gram")
        weight = site.parts[0].read(tensors).detach().float()
        scales = []
        for each in gram if gram.dim() == 3 else gram.unsqueeze(0):
            factor, dead = gram_factor(each, self.damp, site.name)
            scales.append(factor.diagonal().masked_fill(dead, 0))
        scale = torch.stack(scales) if gram.dim() == 3 else scales[0]
        return (weight * over_inputs(scale, weight)).square()


def gradient_norm(site: Site, seen: Evidence, order: int) -> Tensor:
    """Sum over examples of |g|, or the root of the sum of g^2 [as the weight]. Gamma in GBLM, without its factor.

    Raises EvidenceError, naming the site, where it is zero throughout.
    """
    found = measured(site, seen, _ORDERS[order])
    if not bool(found.any()):
        raise EvidenceError(
            f"{site.name} was to be scored by its gradients",
            "every one of them is zero: the loss does not depend on it",
            "Leave it out with exclude, or give calibration data that goes through it.",
        )
    return found if order == 1 else found.sqrt()


_ORDERS = {1: "grad_abs", 2: "grad_square"}


def check_order(order: int) -> None:
    """Raise SettingError unless it is 1 or 2."""
    if order not in _ORDERS:
        raise SettingError(f"a norm of order {order} over the gradients was asked for", "it is 1 or 2", "Give order=2.")


@dataclass(frozen=True)
class Gradient:
    """A weight matters if it is large and the loss is steep along it, whatever the example: S = |W| Gamma.

    Das, Sun, Ma, Shen 2023, arXiv:2311.04902, the ablation without activations; see Gblm.
    """

    order: int = 2  # of the norm over examples: 1 or 2

    def __post_init__(self) -> None:
        check_order(self.order)

    @property
    def needs(self) -> frozenset[str]:
        """The gradients' sizes or squares."""
        return frozenset({_ORDERS[self.order]})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """See gradient_norm."""
        weight = site.parts[0].read(tensors).detach().float().abs()
        return weight * gradient_norm(site, seen, self.order).to(weight.dtype)


def gblm_score(weight: Tensor, loudness: Tensor, steepness: Tensor) -> Tensor:
    """|W| A + |W| Gamma: weight [out, in, ...], A per input [in...] or [groups, in...], Gamma like the weight."""
    return weight.detach().abs() * (over_inputs(loudness, weight) + steepness)


@dataclass(frozen=True)
class Gblm:
    """A weight matters if it is large, and what flows into it is loud or the loss is steep along it.

    Das, Sun, Ma, Shen 2023, "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    arXiv:2311.04902, section 3: S = |W| A + alpha |W| Gamma, with A_j the root of the inputs' squares over the number
    N of examples (not of tokens), and Gamma the l1 or l2 norm over examples of their own gradients in the dense model,
    not divided by N. Gamma grows with N and A with the examples' length, so an alpha belongs to one calibration set:
    unless it is given, it is set at each site so that the gradients' mean term is `mix` of the inputs'.
    """

    alpha: float | None = None  # weight of the gradients: 100 in the authors' code; none: set by mix
    mix: float = 0.1  # mean gradient term over mean activation term, where alpha is none
    order: int = 2  # of the norm over examples: 1 or 2

    def __post_init__(self) -> None:
        check_order(self.order)
        if self.mix < 0 or (self.alpha is not None and self.alpha < 0):
            raise SettingError(
                f"alpha={self.alpha} and mix={self.mix} were asked for",
                "a gradient's size adds to a score",
                "Give 0 or more.",
            )

    @property
    def needs(self) -> frozenset[str]:
        """Inputs' squares, and gradients of single examples with their number."""
        return frozenset({"input_square", _ORDERS[self.order], "grad_count"})

    def terms(self, site: Site, seen: Evidence) -> tuple[Tensor, Tensor]:
        """A per input, and Gamma as the weight. Raises EvidenceError where nothing flowed in or no gradient came."""
        square = measured(site, seen, "input_square")
        steepness = gradient_norm(site, seen, self.order)  # float64: |100 g| over 128 examples overflows float16
        return (square / measured(site, seen, "grad_count")).sqrt(), steepness

    def weight(self, loudness: Tensor, steepness: Tensor) -> float:
        """alpha, as it is given or as `mix` sets it from A and Gamma."""
        return float(self.mix * loudness.mean() / steepness.mean()) if self.alpha is None else self.alpha

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """See gblm_score. Raises EvidenceError where nothing flowed in or no gradient came back."""
        loudness, steepness = self.terms(site, seen)
        return self.mixed(site, tensors, loudness, steepness, self.weight(loudness, steepness))

    def mixed(self, site: Site, tensors: Tensors, loudness: Tensor, steepness: Tensor, alpha: float) -> Tensor:
        """The score of these terms with an alpha."""
        return gblm_score(site.parts[0].read(tensors).float(), loudness.float(), (alpha * steepness).float())
