"""How compressible weights are, by the PQ index, and what follows from it: how much to prune, and when to stop.

Diao, Wang, Zhang, Yang, Ding, Tarokh. "Pruning Deep Neural Networks from a Sparsity Perspective." ICLR 2023.
arXiv:2302.05601, section 3, definition 1 and theorem 2. Of d numbers w and 0 < p < q:

    I = 1 - d^(1/q - 1/p) |w|_p / |w|_q            0 where all are equally large; larger, the fewer hold the rest up
    r >= d (1 + eta)^(-q / (q - p)) (1 - I)^(pq / (q - p))           how many have to stay; eta: the slack

A `Pool` says which weights are measured together, an `Amount` how many of each pool go, and a `Stopping` reads the
curve of the index over the rounds. `Indexed` draws that curve in any training, `Pq` spends a budget by the bound.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.allocations import Scores, kept_of, rescaled
from secateur.axes.rewinding import Keep, apart, magnitudes, pooled
from secateur.axes.rules import everything
from secateur.errors import EvidenceError, SettingError
from secateur.method import Budget
from secateur.site import Site, total_units
from secateur.train import Loop, Rule

__all__ = [
    "Adaptive",
    "Amount",
    "EachLayer",
    "EachNeuron",
    "Fraction",
    "Indexed",
    "Never",
    "Pool",
    "Pq",
    "PqIndex",
    "Stopping",
    "Turned",
    "WholeNetwork",
    "drop_smallest",
    "gini",
    "live_of",
]


@dataclass(frozen=True)
class PqIndex:
    """How unequal the sizes of some numbers are: 0 for all alike, towards 1 for few that stand out.

    It does not change with scale, nor when all is doubled in number. For p <= 1 <= q zeros more raise it, and giving
    from the large to the small, or adding to all, lowers it. Raises SettingError unless 0 < p < q.
    """

    p: float = 0.5
    q: float = 1.0

    def __post_init__(self) -> None:
        if not (isfinite(self.q) and 0 < self.p < self.q):
            raise SettingError(
                f"a PQ index with p={self.p:g} and q={self.q:g} was asked for",
                "it compares two norms of which the first has the smaller power, 0 < p < q",
                "Give p=0.5 and q=1, or p=1 and q=2, as the paper does.",
            )

    def of(self, values: Tensor, live: Tensor | None = None) -> Tensor:
        """The index along the last axis [..., n] -> [...], float64, of the entries that are live; 0 where none is.

        Raises EvidenceError for numbers that are not finite.
        """
        # float64, and means of numbers brought to [0, 1]: sums of |w|^p over a network underflow in single precision,
        # and d^(1/p) overflows. The index does not depend on scale.
        sizes = values.detach().abs().double()
        if not bool(torch.isfinite(sizes).all()):
            raise EvidenceError(
                "the PQ index of weights was asked for", "they hold NaN or infinity", "Repair or reload them first."
            )
        live = torch.ones_like(sizes, dtype=torch.bool) if live is None else live.to(sizes.device)
        sizes = sizes.masked_fill(~live, 0)
        count = live.sum(-1).double().clamp(min=1)
        largest = sizes.amax(-1, keepdim=True) if sizes.shape[-1] else sizes.sum(-1, keepdim=True)
        sizes = sizes / torch.where(largest > 0, largest, 1.0)
        low, high = ((sizes.pow(r).sum(-1) / count).pow(1 / r) for r in (self.p, self.q))
        ratio = torch.where(high > 0, low / torch.where(high > 0, high, 1.0), 1.0)
        return (1 - ratio).clamp(min=0)

    def least(self, index: Tensor, count: Tensor, slack: float = 0.0) -> Tensor:
        """How many of `count` numbers with that index must stay, rounded up: float64, m in the paper (theorem 2).

        Of k equal numbers among zeros it is k to the unit, without slack.
        """
        p, q = self.p, self.q
        exact = count.double() * (1 + slack) ** (-q / (q - p)) * (1 - index.double()).pow(p * q / (q - p))
        return torch.ceil(exact * (1 - 1e-12) - 1e-9).clamp(min=0)  # a rounding error above a whole number is none


def gini(values: Tensor, live: Tensor | None = None) -> float:
    """The Gini index of the sizes of numbers, the index the paper draws beside: 0 for all alike, towards 1.

    G = sum_i (2i - n - 1) x_i / (n sum x), x = |w| + 1e-7 in ascending order.
    """
    sizes = values.detach().abs().double().reshape(-1)
    sizes = (sizes if live is None else sizes[live.reshape(-1).to(sizes.device)]) + 1e-7
    n = len(sizes)
    if n == 0:
        return 0.0
    place = torch.arange(1, n + 1, dtype=torch.float64, device=sizes.device)
    return float(((2 * place - n - 1) * sizes.sort().values).sum() / (n * sizes.sum()))


# Which weights are measured together


@runtime_checkable
class Pool(Protocol):
    """Which weights are measured, and compete, together."""

    def rows(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> list[Tensor]:
        """The values of all sites as matrices [pools, weights of each]."""
        ...

    def sites(self, sites: Sequence[Site], rows: Sequence[Tensor]) -> Keep:
        """Such matrices as values of each site again [*site.shape]."""
        ...


@dataclass(frozen=True)
class WholeNetwork:
    """All weights are one pool: layers may lose very different shares."""

    def rows(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> list[Tensor]:
        """One matrix of one row."""
        return [pooled(sites, values)[None]]

    def sites(self, sites: Sequence[Site], rows: Sequence[Tensor]) -> Keep:
        """See Pool."""
        return apart(sites, rows[0][0])


@dataclass(frozen=True)
class EachLayer:
    """Each matrix or kernel is a pool."""

    def rows(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> list[Tensor]:
        """A matrix of one row for each site."""
        return [values[site.name].reshape(1, -1) for site in sites]

    def sites(self, sites: Sequence[Site], rows: Sequence[Tensor]) -> Keep:
        """See Pool."""
        return {site.name: row.reshape(site.shape) for site, row in zip(sites, rows, strict=True)}


@dataclass(frozen=True)
class EachNeuron:
    """The weights into each neuron, or of each filter, are a pool."""

    def rows(self, sites: Sequence[Site], values: Mapping[str, Tensor]) -> list[Tensor]:
        """A matrix for each site, with a row for each output."""
        return [values[site.name].reshape(site.shape[0], -1) for site in sites]

    def sites(self, sites: Sequence[Site], rows: Sequence[Tensor]) -> Keep:
        """See Pool."""
        return EachLayer().sites(sites, rows)


# How many go


@runtime_checkable
class Amount(Protocol):
    """How many of each pool's weights go in a round."""

    def gone(self, values: Tensor, live: Tensor) -> Tensor:
        """Whole numbers [pools], below the number live, for weights [pools, n] of which some are live."""
        ...


@dataclass(frozen=True)
class Fraction:
    """The same fraction of what is left, whatever the weights: the lottery ticket's."""

    fraction: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise SettingError(
                f"a fraction of {self.fraction:g} a round was asked for",
                "each round drops a part of what is left, in (0, 1)",
                "Give 0.2.",
            )

    def gone(self, values: Tensor, live: Tensor) -> Tensor:
        """floor(fraction * left)."""
        return _some(live.sum(-1), self.fraction)


@dataclass(frozen=True)
class Adaptive:
    """As much as the index of what is left says can go: much while few weights stand out, little near the limit.

    The share scaling * (1 - m / d), held between 0 and `most`, of d weights of which m must stay. Diao et al. 2023,
    arXiv:2302.05601, section 4, algorithm 1.
    """

    index: PqIndex = PqIndex()
    slack: float = 0.0  # eta_r in the paper: mass that may go, as a fraction of what stays
    scaling: float = 1.0  # gamma
    most: float = 0.9  # beta: the largest share of a pool that goes in one round

    def __post_init__(self) -> None:
        if not (isfinite(self.slack) and self.slack >= 0):
            raise SettingError(f"a slack of {self.slack:g} was asked for", "it is 0 or more", "Give 0, as the paper.")
        if not (isfinite(self.scaling) and self.scaling > 0):
            raise SettingError(f"a scaling of {self.scaling:g} was asked for", "it is above 0", "Give 1.")
        if not 0 < self.most < 1:
            raise SettingError(
                f"{self.most:g} of a pool was to go in one round at most",
                "it is a fraction in (0, 1): something has to stay",
                "Give 0.9.",
            )

    def share(self, values: Tensor, live: Tensor) -> Tensor:
        """The share of each pool's live weights that goes [pools], float64: rho in the paper."""
        count = live.sum(-1).double()
        least = self.index.least(self.index.of(values, live), count, self.slack)
        return (self.scaling * (1 - least / count.clamp(min=1))).clamp(0, self.most)

    def gone(self, values: Tensor, live: Tensor) -> Tensor:
        """floor(share * left)."""
        return _some(live.sum(-1), self.share(values, live))


def _some(count: Tensor, share: Tensor | float) -> Tensor:
    """floor(share * count), one at least being left of any."""
    gone = torch.floor(count.double() * share + 1e-9).long()  # 0.3 * 10 is 3 less a rounding error
    return torch.minimum(gone, (count - 1).clamp(min=0))


def drop_smallest(
    sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], pool: Pool, amount: Amount
) -> Keep:
    """New masks inside the old ones: of each pool the smallest go, exactly as many as an amount says.

    Among equals those that come first go.
    """
    values = pool.rows(sites, scores)
    lives = [live.to(v.device) for v, live in zip(values, pool.rows(sites, keep), strict=True)]
    return pool.sites(sites, [_kept(v, live, amount.gone(v, live)) for v, live in zip(values, lives, strict=True)])


def _kept(values: Tensor, live: Tensor, gone: Tensor) -> Tensor:
    """What stays of each row [pools, n] when its smallest live entries, so many, go."""
    # Stable, what is masked already first: the place in this order says how many live entries are smaller.
    order = values.masked_fill(~live, -torch.inf).sort(dim=-1, stable=True).indices
    masked = (~live).sum(-1, keepdim=True)
    stays = torch.arange(values.shape[-1], device=values.device) >= masked + gone[:, None].to(values.device)
    return torch.zeros_like(live).scatter(-1, order, stays) & live


# The curve over the rounds


@runtime_checkable
class Stopping(Protocol):
    """When to stop pruning, by the values of the index round after round."""

    def over(self, values: Sequence[float]) -> bool:
        """Whether another round would be one too many."""
        ...


@dataclass(frozen=True)
class Never:
    """Go on for all rounds."""

    def over(self, values: Sequence[float]) -> bool:
        """False."""
        return False


@dataclass(frozen=True)
class Turned:
    """Stop once the index has fallen and then been above its lowest value for some rounds.

    It falls as weights that were not needed go, rises as the network nears what it can be compressed to, and falls
    again as it collapses (Diao et al. 2023, section 3.2, the paper's hypothesis).
    """

    patience: int = 2  # rounds above the lowest, one after another
    rise: float = 0.0  # how far above, before it counts
    fall: float = 0.0  # how far below the first value the lowest must be: no turn without a fall

    def __post_init__(self) -> None:
        if self.patience < 1:
            raise SettingError(f"a patience of {self.patience} was asked for", "one round is the least", "Give 2.")

    def over(self, values: Sequence[float]) -> bool:
        """Whether the last rounds were all above the lowest before them, which was below the first."""
        before, last = values[: -self.patience], values[-self.patience :]
        if len(before) < 2:
            return False
        return min(before) < before[0] - self.fall and min(last) > min(before) + self.rise


def live_of(loop: Loop, sites: Sequence[Site]) -> Keep:
    """Which weights are live by the masks that a loop's rules hold; all, where none holds any."""
    held: dict[str, Tensor] = {}
    for rule in loop.rules:
        held.update(getattr(rule, "keep", None) or {})
    return {name: held[name] != 0 if name in held else mask for name, mask in everything(sites).items()}


class Indexed(Rule):
    """Draws the curve of the index as training goes on, beside whatever else the rules do.

    Curves "pq index" and "gini" of all live weights together, "pq index of NAME" of each layer, "kept", the fraction
    that is live. Live is what the masks held by the loop's other rules leave; without masks, everything.
    """

    def __init__(self, sites: Sequence[Site], index: PqIndex | None = None, every: int = 0) -> None:
        if every < 0:
            raise SettingError(f"the index every {every} steps was asked for", "steps are counted", "0: at the end.")
        self.sites, self.index, self.every = list(sites), PqIndex() if index is None else index, every

    def after_step(self, loop: Loop) -> None:
        """Every so many steps; the last is seen to by `finish`."""
        if self.every and loop.step % self.every == 0 and loop.step < loop.steps:
            self.draw(loop)

    def finish(self, loop: Loop) -> None:
        """At the end."""
        self.draw(loop)

    def draw(self, loop: Loop) -> None:
        """Add a point to each curve, now."""
        sizes, keep = magnitudes(loop.model, self.sites), live_of(loop, self.sites)
        values, live = pooled(self.sites, sizes), pooled(self.sites, keep)
        loop.log("pq index", float(self.index.of(values, live)))
        loop.log("gini", gini(values, live))
        loop.log("kept", float(live.double().mean()))
        for name, layer in sizes.items():
            loop.log(f"pq index of {name}", float(self.index.of(layer.reshape(-1), keep[name].reshape(-1))))


# The bound as an allocation


@dataclass(frozen=True)
class Pq:
    """Each layer keeps in proportion to the share that its PQ index says must stay: m / d of the adaptive pruner.

    Diao et al. 2023, arXiv:2302.05601, theorem 2, used once to spread a budget. Of any scores: magnitudes, or a
    criterion's.
    """

    index: PqIndex = PqIndex()
    slack: float = 0.0  # eta_r in the paper

    needs_scores = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises SettingError without scores."""
        if scores is None:
            raise SettingError("a PQ allocation was asked for", "no scores were given", "Give a criterion's scores.")
        raw = {}
        for site in sites:
            flat = scores[site.name].reshape(-1)
            flat = flat.masked_fill(flat == -torch.inf, 0)  # what is masked already, on a ramp
            count = torch.tensor(float(flat.numel()))
            raw[site.name] = float(self.index.least(self.index.of(flat), count, self.slack)) / flat.numel()
        return rescaled(sites, raw, kept_of(total_units(sites), budget.sparsity))
