"""The mean of networks that share a mask: which of them go in, whether they lie in one basin, and their batch norms."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import acos, ceil, degrees
from statistics import fmean
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.branching import Candidate, Keep
from secateur.axes.recalibration import recalibrate_
from secateur.errors import ModelError, SettingError
from secateur.site import Site
from secateur.task import Batch, Task
from secateur.train import Snapshot


def merged(sites: Sequence[Site], candidates: Sequence[Candidate], shares: Sequence[float] | None = None) -> Snapshot:
    """sum_i lambda_i theta_i over all that is in the states, in float64; whole numbers are the first one's.

    `shares` are the lambdas, equal when not given, scaled to a sum of 1. Masks are not averaged, nor found again in
    the mean. Raises ModelError for candidates whose masks differ, naming them, and for one with weights where its
    mask has none.
    """
    if not candidates:
        raise SettingError("candidates were to be merged", "there are none", "Give one at least.")
    first = candidates[0].keep
    unlike = [s.name for s in sites if any(not torch.equal(c.keep[s.name], first[s.name]) for c in candidates)]
    if unlike:
        raise ModelError(
            f"{len(candidates)} candidates were to be merged",
            f"their masks differ in {', '.join(unlike)}",
            "Branch from one pruned model: the mean of different masks has the zeros that all of them share, no more.",
        )
    for number, candidate in enumerate(candidates):
        if filled := _filled(sites, candidate.state.model, first):
            raise ModelError(
                f"{len(candidates)} candidates were to be merged",
                f"number {number} has weights outside its mask in {', '.join(filled)}",
                "Hold the mask while retraining.",
            )
    return Snapshot.average([c.state for c in candidates], shares)


def _filled(sites: Sequence[Site], state: Mapping[str, Tensor], keep: Keep) -> list[str]:
    """The sites at which a state is not zero where masks say so."""
    found = []
    for site in sites:
        gone = site.expand(~keep[site.name])
        if any(bool((p.read(state) * gone[p.key].to(p.read(state).device)).any()) for p in site.parts):
            found.append(site.name)
    return found


@dataclass(frozen=True)
class Refresh:
    """Puts a state into the model with the statistics of its batch norms taken anew, on a share of the training data.

    As training sees the data, augmented; dropout is off, and nothing is trained.
    """

    share: float = 1.0

    def restore_(self, model: nn.Module, state: Snapshot, task: Task) -> Snapshot:
        """The state as it then is; changes the model."""
        state.restore_(model)
        if not self.share:
            return state
        recalibrate_(model, self._batches(task, next(model.parameters()).device))
        return Snapshot.of(model)

    def _batches(self, task: Task, device: torch.device) -> Iterator[Batch]:
        left = ceil(self.share * sum(1 for _ in task.batches("train")) - 1e-9)
        for number, batch in enumerate(task.batches("train")):
            if number == left:
                return
            yield batch.to(device)


Taste = Callable[[Sequence[int]], float]
"""The quality of the soup of some candidates, by number, on held-out data; higher is better."""


@runtime_checkable
class Recipe(Protocol):
    """Which candidates go into a soup."""

    @property
    def tastes(self) -> bool:
        """Whether it looks at held-out data."""
        ...

    def choose(self, alone: Sequence[float], taste: Taste) -> list[int]:
        """The candidates by number, in the order they went in; `alone` is the quality of each, where it `tastes`."""
        ...


@dataclass(frozen=True)
class UniformSoup:
    """All of them."""

    tastes: ClassVar[bool] = False

    def choose(self, alone: Sequence[float], taste: Taste) -> list[int]:
        """See Recipe."""
        return list(range(len(alone)))


@dataclass(frozen=True)
class GreedySoup:
    """The best, then each that does not make the soup worse, best first (Wortsman et al. 2022, arXiv 2203.05482)."""

    tastes: ClassVar[bool] = True

    def choose(self, alone: Sequence[float], taste: Taste) -> list[int]:
        """See Recipe."""
        ranked = sorted(range(len(alone)), key=lambda number: -alone[number])  # of equals the first
        chosen, best = ranked[:1], alone[ranked[0]]
        for number in ranked[1:]:
            if (value := taste([*chosen, number])) >= best:
                chosen, best = [*chosen, number], value
        return chosen


@dataclass(frozen=True)
class Basin:
    """Whether candidates lie in one basin, as those must that are averaged; over the kept weights."""

    farthest: float  # L2 distance of the two farthest apart
    mean: float  # of all pairs
    angle: float  # the widest between two, in degrees
    centre: float  # L2 distance of the farthest from the mean of all
    pair: tuple[int, int]  # the two farthest apart, by number


def basin(sites: Sequence[Site], candidates: Sequence[Candidate]) -> Basin:
    """How far apart two or more candidates are, in float64."""

    def kept(candidate: Candidate) -> Tensor:
        found = []
        for site in sites:
            here = site.expand(candidate.keep[site.name])
            for part in site.parts:
                value = part.read(candidate.state.model)
                found.append(value[here[part.key].to(value.device).expand_as(value)].double().cpu())
        return torch.cat(found)

    rows = [kept(c) for c in candidates]
    apart = {(i, j): float((rows[i] - rows[j]).norm()) for i, j in combinations(range(len(rows)), 2)}

    def turn(i: int, j: int) -> float:
        lengths = float(rows[i].norm() * rows[j].norm())
        return degrees(acos(max(-1.0, min(1.0, float(rows[i] @ rows[j]) / lengths)))) if lengths else 0.0

    centre = torch.stack(rows).mean(0)
    return Basin(
        max(apart.values()),
        fmean(apart.values()),
        max(turn(i, j) if d else 0.0 for (i, j), d in apart.items()),
        max(float((row - centre).norm()) for row in rows),
        max(apart, key=lambda pair: apart[pair]),
    )
