"""How much each component of a model bears: sweeps, the cliff in each, and sparsities for all of them together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol, runtime_checkable

from secateur.errors import SettingError
from secateur.method import check_sparsity


def cliff(points: Sequence[tuple[float, float]], dense: float, ruined: float, tolerance: float) -> float:
    """The largest sparsity up to which a sweep stays near the dense quality; 0 if it leaves at once.

    `points` are (sparsity, value); near is at most `tolerance` of the way from the dense value to a ruined one,
    whichever direction of the metric is better.
    """
    last = 0.0
    for sparsity, value in sorted(points):
        if lost(value, dense, ruined) > tolerance:
            return last
        last = sparsity
    return last


def lost(value: float, dense: float, ruined: float) -> float:
    """How far a value is on the way from dense (0) to ruined (1); negative for one better than dense."""
    return (value - dense) / (ruined - dense) if ruined != dense else 0.0


Shares = Mapping[str, float]
Trial = Callable[[Shares], float]  # component -> sparsity, to the quality of the pipeline pruned so


@runtime_checkable
class Search(Protocol):
    """How the sparsities of components are chosen together."""

    def find(self, trial: Trial, sizes: Mapping[str, int], notes: list[str]) -> dict[str, float]:
        """A sparsity for each component, given how many weights each has; what was found on the way goes to `notes`."""
        ...


@dataclass(frozen=True)
class Line:
    """The paper's: sweep each component by itself to its cliff, then take all of them back from there in step.

    What is found is the most that costs no more than the tolerance: a share of the way from the dense quality to the
    worst that the sweeps saw.
    """

    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
    tolerance: float = 0.1
    step: float = 0.05  # by which all components go back together

    def __post_init__(self) -> None:
        _check_grid(self.grid)
        if not 0 < self.step < 1 or not 0 <= self.tolerance < 1:
            raise SettingError(
                f"a step of {self.step} and a tolerance of {self.tolerance} were asked for",
                "each is a fraction",
                "Give step=0.05 and tolerance=0.1, say.",
            )

    def find(self, trial: Trial, sizes: Mapping[str, int], notes: list[str]) -> dict[str, float]:
        """See Search."""
        dense = trial(dict.fromkeys(sizes, 0.0))
        swept = {name: [(s, trial(by_itself(sizes, name, s))) for s in self.grid] for name in sizes}
        ruined = max((v for line in swept.values() for _, v in line), key=lambda v: abs(v - dense))
        edges = {name: cliff(line, dense, ruined, self.tolerance) for name, line in swept.items()}
        notes += [f"{name}: its cliff by itself is behind {edge:g}" for name, edge in edges.items()]
        back = 0.0
        while any(edge - back > 1e-9 for edge in edges.values()):
            shares = {name: round(max(edge - back, 0.0), 6) for name, edge in edges.items()}
            value = trial(shares)
            if lost(value, dense, ruined) <= self.tolerance:
                notes.append(f"together they were taken back by {back:g}: {abs(value):.4g}, dense {abs(dense):.4g}")
                return shares
            back += self.step
        notes.append("together they bear nothing within the tolerance: all was left dense")
        return dict.fromkeys(sizes, 0.0)


@dataclass(frozen=True)
class AtBudget:
    """Of the configurations that remove one fraction of all prunable weights, the one with the best quality."""

    sparsity: float = 0.5
    grid: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8)  # of all components but the last

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        _check_grid(self.grid)

    def find(self, trial: Trial, sizes: Mapping[str, int], notes: list[str]) -> dict[str, float]:
        """See Search. Uniform sparsity is always among those tried."""
        *first, last = sizes
        total = self.sparsity * sum(sizes.values())
        every = [dict.fromkeys(sizes, self.sparsity)]
        for given in product(self.grid, repeat=len(first)):
            left = (total - sum(s * sizes[n] for n, s in zip(first, given, strict=True))) / sizes[last]
            if -1e-9 <= left < 1 and first:
                every.append({**dict(zip(first, given, strict=True)), last: round(max(left, 0.0), 6)})
        found = [(trial(shares), shares) for shares in every]
        value, best = min(found, key=lambda pair: pair[0])
        same = found[0][0]
        notes.append(f"at {self.sparsity:g} of all: {abs(value):.4g} so, {abs(same):.4g} with the same everywhere")
        return best


def _check_grid(grid: Sequence[float]) -> None:
    for value in grid:
        check_sparsity(value)
    if not grid or list(grid) != sorted(set(grid)):
        raise SettingError(
            f"a sweep over {tuple(grid)} was asked for", "it does not rise", "Give (0.2, 0.4, 0.6), say."
        )


def by_itself(sizes: Mapping[str, int], name: str, share: float) -> dict[str, float]:
    """One component at a sparsity, the others dense."""
    return {other: share if other == name else 0.0 for other in sizes}
