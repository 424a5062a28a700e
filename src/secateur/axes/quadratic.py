"""Which of n to choose, so many and no more, where pairs of them matter: the least x^T Q x over x in {0, 1}^n."""

from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.errors import SettingError


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss as a function of which weights of a block are left out: x^T matrix x + constant, x in {0, 1}^n."""

    matrix: Tensor  # [block, block], symmetric, float64; Q in the paper
    constant: float

    def value(self, x: Tensor) -> float:
        """Its value for a choice [block], True where a weight is left out."""
        x = x.to(self.matrix.dtype)
        return float(x @ self.matrix @ x) + self.constant


# How a choice is found


@runtime_checkable
class Search(Protocol):
    """How x^T Q x is minimised over x in {0, 1}^n with a given number of ones."""

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """A choice [n] with as many True as `start`, no worse than it; matrix [n, n] is symmetric, float64."""
        ...


@dataclass(frozen=True)
class Exhaustive:
    """Try every choice: for blocks of 20 weights at most."""

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """See Search; the first of equals."""
        n, ones = len(start), int(start.sum())
        if comb(n, ones) > 200_000:
            raise SettingError(
                f"every way to leave {ones} of {n} weights out was to be tried",
                f"there are {comb(n, ones):.2g}",
                "Use anneal, or a block of 20.",
            )
        places = torch.tensor(list(combinations(range(n), ones))).reshape(-1, ones)
        every = torch.zeros(len(places), n, dtype=matrix.dtype).scatter_(1, places, 1.0)
        best = ((every @ matrix) * every).sum(1).argmin()
        return every[best].bool()


@dataclass(frozen=True)
class Anneal:
    """Swap a one and a zero at random; swaps that cost are accepted ever more seldom. The best that was met wins.

    Simulated annealing at inverse temperatures from `hot` to `cold`, on Q scaled to entries of size one on average. A
    sweep offers each weight a partner of the other value, drawn at random. A run ends when a whole temperature accepts
    nothing. Every restart begins at the choice as it stands, so that the result is never worse.
    """

    restarts: int = 10  # 20 for language models in the paper
    hot: float = 1e-3
    cold: float = 100.0
    growth: float = 1.1  # of the inverse temperature, from one to the next
    sweeps: int = 1  # at each temperature

    def __post_init__(self) -> None:
        if min(self.restarts, self.sweeps) < 1 or not 0 < self.hot <= self.cold or self.growth <= 1:
            raise SettingError(
                f"annealing {self.restarts} times from {self.hot:g} to {self.cold:g} by {self.growth:g} was asked for",
                "inverse temperatures are above 0 and grow, and there is one run and one sweep at least",
                "Give hot=0.001, cold=100, growth=1.1.",
            )

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """See Search."""
        n, ones = len(start), int(start.sum())
        sizes = matrix.abs()
        if ones in (0, n) or not bool(sizes.any()):
            return start.clone()
        scaled = matrix / sizes[sizes > 0].mean()
        found = [self._run(scaled, start, draw) for _ in range(self.restarts)]

        def energy(x: Tensor) -> float:  # anew, of Q as it was: sums of many small changes drift
            x = x.to(matrix.dtype)
            return float(x @ matrix @ x)

        return min([start, *found], key=energy)

    def _run(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """One run. What is looked at in the inner loop is in lists and views of memory: tensors cost microseconds."""
        n = len(start)
        pairs = 2 * matrix
        pairs.fill_diagonal_(0)
        # What it costs to turn a one on, the others being as they are; of a one, what it cost.
        price = (matrix.diagonal() + pairs @ start.to(matrix.dtype)).numpy()
        rows = pairs.numpy()
        seen, couple = price.data, rows.data
        x = bytearray(start.to(torch.uint8).numpy().tobytes())
        members = [[i for i in range(n) if not x[i]], [i for i in range(n) if x[i]]]  # of each value
        place = [0] * n
        for side in members:
            for at, i in enumerate(side):
                place[i] = at
        energy = lowest = 0.0
        best = bytes(x)
        beta = self.hot
        while beta <= self.cold:
            accepted = 0
            for _ in range(self.sweeps):
                chance = torch.rand(2, n, generator=draw, dtype=torch.float64)
                limits = (-chance[0].clamp(min=1e-300).log() / beta).tolist()
                partners = chance[1].tolist()
                for i in range(n):
                    others = members[1 - x[i]]
                    j = others[int(partners[i] * len(others))]
                    on, off = (j, i) if x[i] else (i, j)
                    change = seen[on] - seen[off] - couple[on, off]
                    if change > limits[i]:
                        continue
                    price += rows[on]
                    price -= rows[off]
                    x[on], x[off] = 1, 0
                    a, b = place[on], place[off]
                    members[0][a], members[1][b], place[off], place[on] = off, on, a, b
                    accepted += 1
                    energy += change
                    if energy < lowest - 1e-12:
                        lowest, best = energy, bytes(x)
            if not accepted:
                break
            beta *= self.growth
        return torch.frombuffer(bytearray(best), dtype=torch.uint8).bool()
