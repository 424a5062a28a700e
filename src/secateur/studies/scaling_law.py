"""How the loss falls with parameters and tokens, from runs that were made; and which dense network a sparse one equals.

    L(N, D) = E + A / N^alpha + B / D^beta

Hoffmann et al. "Training Compute-Optimal Large Language Models." 2022. arXiv:2203.15556, section 3.3: Huber's loss on
log L, minimised from a grid of starts. Jin et al. 2025 (arXiv:2501.12486) put the mean count over training in place of
N, and sparse and dense runs lie on one law. Needs scipy.

    law = fit_law(runs); law.loss(N, D); interval(runs); relative_error(law, others)
    pair(make, whole, sizes, window(10_000, 0.8))      # a sparse training, and the dense one to hold it against
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import exp, inf, log
from statistics import fmean
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import nn

from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.errors import EvidenceError, SettingError, did_you_mean
from secateur.method import Card
from secateur.methods.average_parameters import Window
from secateur.site import total_units

CARD = Card(
    8, "The Journey Matters: Average Parameter Count over Pre-training Unifies Sparse and Dense Scaling Laws",
    arxiv="2501.12486", venue="ICLR", year=2025, when="during training", needs=("labels", "training"),
    criterion=("magnitude",), tasks=("language modelling",), stage=("score or mask",), schedule=("custom",),
    allocation=("score-driven",),
)  # fmt: skip

NAMES = ("A", "alpha", "B", "beta", "E")
"""What a law is made of; in this order inside."""

Size = TypeVar("Size")


@dataclass(frozen=True)
class Run:
    """A training that was made."""

    parameters: float  # N: the mean over training, of a network whose count changed
    tokens: float  # D
    loss: float  # in nats per token, on held-out text


@dataclass(frozen=True)
class Law:
    """E + A / N^alpha + B / D^beta."""

    A: float
    alpha: float
    B: float
    beta: float
    E: float
    residual: float = field(
        default=0.0, compare=False
    )  # mean |log loss - log predicted| over the runs it was fitted to

    def loss(self, parameters: float, tokens: float) -> float:
        """The loss it predicts."""
        return self.E + self.A / parameters**self.alpha + self.B / tokens**self.beta


def fit_law(runs: Sequence[Run], fixed: Mapping[str, float] | None = None, delta: float = 1e-3) -> Law:
    """The law that fits some runs best: Huber's loss on log L, L-BFGS from the best of a grid of starts.

    `fixed` holds some of A, alpha, B, beta and E where they are. Raises EvidenceError for fewer runs than one more than
    there are values to find (six for all five), and for runs of one size or one length alone, from which what does not
    vary cannot be told from E: fix A and alpha, or B and beta, then (B=0 leaves the term out).
    """
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise SettingError(
            "a scaling law was to be fitted", "scipy is not installed", "Install it: pip install 'secateur[studies]'."
        ) from None
    held = dict(fixed or {})
    for name in held:
        if name not in NAMES:
            raise SettingError(f"{name!r} of a scaling law was fixed", "it has none", did_you_mean(name, NAMES))
    _enough(runs, held)
    n, d = (np.log([getattr(run, key) for run in runs]) for key in ("parameters", "tokens"))
    target = np.log([run.loss for run in runs])
    inner = {name: _inside(name, value) for name, value in held.items()}
    free = [name for name in NAMES if name not in inner]

    def full(x: np.ndarray) -> np.ndarray:
        given = dict(zip(free, x, strict=True))
        return np.array([inner[name] if name in inner else given[name] for name in NAMES])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        a, alpha, b, beta, e = full(x)
        terms = np.stack([a - alpha * n, b - beta * d, np.full_like(n, e)])
        top = terms.max(0)
        share = np.exp(terms - top)
        predicted = top + np.log(share.sum(0))
        share /= share.sum(0)
        off = predicted - target
        value = np.where(np.abs(off) <= delta, 0.5 * off**2, delta * (np.abs(off) - 0.5 * delta)).sum()
        slope = np.clip(off, -delta, delta)
        each = np.stack([share[0], -n * share[0], share[1], -d * share[1], share[2]])
        gradient = (each * slope).sum(1)
        # The loss is of the order of delta squared, below what a minimiser takes for zero.
        return value / delta**2, np.array([gradient[NAMES.index(name)] for name in free]) / delta**2

    grid: dict[str, tuple[float, ...]] = {
        "A": (0.0, 4.0, 8.0),
        "alpha": (0.2, 0.5, 1.0),
        "B": (0.0, 4.0, 8.0),
        "beta": (0.2, 0.5, 1.0),
    }
    grid["E"] = tuple(float(target.min()) + step for step in (-1.5, -0.5, -0.1))
    bounds = [(0.0, 3.0) if name in ("alpha", "beta") else (-20.0, 60.0) for name in free]
    starts = sorted((np.array(x) for x in product(*(grid[name] for name in free))), key=lambda x: loss(x)[0])
    ends = [
        minimize(loss, x, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 2000}) for x in starts[:12]
    ]
    best = full(min(ends, key=lambda end: float(end.fun)).x)
    a, alpha, b, beta, e = (float(value) for value in best)
    law = Law(exp(a), alpha, exp(b) if b > -inf else 0.0, beta, exp(e) if e > -inf else 0.0)
    off = [abs(log(run.loss) - log(law.loss(run.parameters, run.tokens))) for run in runs]
    return Law(law.A, law.alpha, law.B, law.beta, law.E, fmean(off))


def interval(
    runs: Sequence[Run], fixed: Mapping[str, float] | None = None, draws: int = 100, seed: int = 0, share: float = 0.95
) -> dict[str, tuple[float, float]]:
    """Between which values each of A, alpha, B, beta and E lies, from fits to runs drawn again with replacement.

    Draws that cannot be fitted, for they hold too few different runs, are drawn anew. Wide where the runs do not say.
    """
    _enough(runs, dict(fixed or {}))
    generator, found = np.random.default_rng(seed), list[Law]()
    while len(found) < draws:
        drawn = [runs[i] for i in generator.integers(len(runs), size=len(runs))]
        if _reason(drawn, dict(fixed or {}), len({id(run) for run in drawn})) is None:
            found.append(fit_law(drawn, fixed))
    edge = (1 - share) / 2
    values = {name: np.quantile([getattr(law, name) for law in found], [edge, 1 - edge]) for name in NAMES}
    return {name: (float(low), float(high)) for name, (low, high) in values.items()}


def relative_error(law: Law, runs: Iterable[Run]) -> float:
    """The mean of |predicted - measured| / measured, over runs that the law was not fitted to."""
    return fmean(abs(law.loss(run.parameters, run.tokens) - run.loss) / run.loss for run in runs)


def twin(
    make: Callable[[Size], nn.Module],
    sizes: Iterable[Size],
    parameters: float,
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> tuple[Size, int]:
    """The size of dense network whose prunable weights are nearest to a count, and how many they are.

    `make` builds a network of a size, here without memory for its values; the first of equals wins. Raises SettingError
    where there are no sizes.
    """
    found: list[tuple[float, int, Size, int]] = []
    for place, size in enumerate(sizes):
        with torch.device("meta"):
            count = total_units(weights(make(size), include, exclude))
        found.append((abs(count - parameters), place, size, count))
    if not found:
        raise SettingError(
            f"a dense network of {parameters:,.0f} weights was asked for", "no sizes were given", "Give some."
        )
    _, _, size, count = min(found, key=lambda entry: entry[:2])
    return size, count


@dataclass(frozen=True)
class Pair(Generic[Size]):
    """A sparse training and a dense one of equal tokens, equal compute and equal parameters on average."""

    plan: Window  # of the sparse training; the dense one takes as many steps
    size: Size  # of the dense network
    parameters: int  # the dense network's prunable weights
    average: float  # the sparse network's over training, in the mean

    @property
    def mismatch(self) -> float:
        """How far the two counts are apart, as a share of the sparse network's."""
        return abs(self.parameters - self.average) / self.average


def pair(
    make: Callable[[Size], nn.Module],
    whole: Size,
    sizes: Iterable[Size],
    plan: Window,
    include: Sequence[str] = (),
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
) -> Pair[Size]:
    """The dense network to hold a sparse training against: that of `sizes` nearest to its mean count of weights."""
    with torch.device("meta"):
        average = plan.average * total_units(weights(make(whole), include, exclude))
    size, count = twin(make, sizes, average, include, exclude)
    return Pair(plan, size, count, average)


def _inside(name: str, value: float) -> float:
    if name in ("alpha", "beta"):
        return float(value)
    return log(value) if value > 0 else -inf


def _enough(runs: Sequence[Run], fixed: Mapping[str, float]) -> None:
    for run in runs:
        if not (run.parameters > 0 and run.tokens > 0 and 0 < run.loss < inf):
            raise EvidenceError(
                "a scaling law was to be fitted",
                f"{run} is no run that ended well",
                "Give runs with parameters, tokens and a finite loss above 0.",
            )
    if (why := _reason(runs, fixed, len(runs))) is not None:
        raise EvidenceError(
            f"a scaling law was to be fitted to {len(runs)} runs",
            why,
            'Make more runs, of other sizes and lengths, or fix values: fixed={"B": 0, "beta": 1} leaves tokens out.',
        )


def _reason(runs: Sequence[Run], fixed: Mapping[str, float], different: int) -> str | None:
    free = len(NAMES) - len(fixed)
    if different < free + 1:
        return f"{free} values are to be found, which takes {free + 1} runs"
    for key, what, needed in (("parameters", "size", {"A", "alpha"}), ("tokens", "length", {"B", "beta"})):
        if len({getattr(run, key) for run in runs}) < 2 and not needed <= set(fixed):
            return f"all are of one {what}"
    return None
