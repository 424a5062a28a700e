"""Improve a choice before it is applied, while the weights left out are still there."""

from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.criteria import measured, over_inputs, wanda_score
from secateur.axes.patterns import NM, Pattern, PerMatrix, PerRow
from secateur.edit import Mask
from secateur.errors import EvidenceError, PatternError, SettingError
from secateur.evidence import Evidence
from secateur.site import Tensors


@runtime_checkable
class Refiner(Protocol):
    """How a choice becomes a better one of the same pattern and size."""

    @property
    def needs(self) -> frozenset[str]:
        """The evidence it reads."""
        ...

    def fits(self, pattern: Pattern) -> None:
        """Raise PatternError for a pattern whose choices it cannot improve, before any data is read."""
        ...

    def refine(self, mask: Mask, score: Tensor, pattern: Pattern, tensors: Tensors, seen: Evidence) -> Mask:
        """A better mask of the same site, nothing applied yet: `tensors` are dense, `score` is what chose the mask."""
        ...


@dataclass(frozen=True)
class Dsnot:
    """Swap weights of a row, one in for one out, until the mean of its output is what it was.

    Zhang et al. 2023, "Dynamic Sparse No Training", arXiv:2310.08915, section 3, equations 3 to 5. With C = W s, where
    s is the mean input, a row's expected output lacks e = the sum of C over what is left out. As long as |e| is above
    the threshold, and for `rounds` at most, all rows at once:

        grow    of what the first choice left out, the C of e's sign that is largest for the input's variance v^power
        prune   of what it kept, the cheapest |W| ||X|| with a C of the other sign, so that this lowers |e| as well

    In groups of n:m the partner is the lowest score in the grown weight's own group instead, and a row stops before
    e changes sign. A weight is swapped once at most, and a row that has stopped stays so. The mean is per token and
    the variance within each example, so that the length of the examples does not matter.
    """

    rounds: int = 50  # swaps of a row, at most
    threshold: float = 0.1 / 2048  # on |e| per token: 0.1 in the authors' code, which sums over 2,048 tokens
    power: float = 1.0  # how much a steady input is preferred when growing
    overshoot: bool = True  # whether a row's last swap may turn the sign of e; in groups it may not

    needs: ClassVar[frozenset[str]] = frozenset({"input", "input_square", "input_scatter"})

    def __post_init__(self) -> None:
        if self.rounds < 1 or self.threshold < 0:
            raise SettingError(
                f"{self.rounds} rounds down to {self.threshold:g} were asked for",
                "there is one round at least, and a threshold is 0 or more",
                "Give rounds=50 and threshold=5e-5.",
            )

    def fits(self, pattern: Pattern) -> None:
        """See Refiner."""
        if not isinstance(pattern, (PerRow, PerMatrix, NM)):
            raise PatternError(
                f"a choice in the pattern {pattern} was to be refined by swaps along rows",
                "a swap of two single weights would break that pattern",
                "Use per-row, per-matrix or n:m, or refine nothing.",
            )

    def refine(self, mask: Mask, score: Tensor, pattern: Pattern, tensors: Tensors, seen: Evidence) -> Mask:
        """See Refiner. Raises EvidenceError where nothing flowed in, or the weights left out are zero already."""
        self.fits(pattern)
        site = mask.site
        weight = site.parts[0].read(tensors).detach().double()
        count = max(seen.count, 1)
        mean = over_inputs(measured(site, seen, "input") / count, weight)
        scatter = over_inputs(measured(site, seen, "input_scatter") / count, weight)
        cost = _rows(wanda_score(weight, measured(site, seen, "input_square")))
        keep = _rows(mask.keep)
        dense = _rows(weight)
        if not bool(keep.all()) and not bool(dense[~keep].any()):
            raise EvidenceError(
                f"the choice at {site.name} was to be refined",
                "the weights it leaves out are zero already, so that none can come back",
                "Refine before the choice is applied: start from the dense model.",
            )
        contribution = _rows(weight * mean)
        merit = contribution / _rows(steadiness(scatter).expand_as(weight)).pow(self.power)
        if isinstance(pattern, NM):
            found = swapped_in_groups(
                contribution, merit, _rows(score.double()), keep, pattern.m, self.rounds, self.threshold
            )
        else:
            found = swapped_in_rows(contribution, merit, cost, keep, self.rounds, self.threshold, self.overshoot)
        assert torch.equal(found.sum(1), keep.sum(1)), "a swap keeps as many as it found"
        return Mask(site, _back(found, site.shape))


def lacking(contribution: Tensor, keep: Tensor) -> Tensor:
    """What each row's expected output lacks: C [rows, in] summed over what is left out -> [rows]; epsilon."""
    return contribution.masked_fill(keep, 0).sum(1)


def steadiness(scatter: Tensor) -> Tensor:
    """Variances as a share of the largest, none below 1e-8: an input that never varies is preferred, not infinitely."""
    largest = scatter.max()
    return (scatter / largest).clamp(min=1e-8) if float(largest) > 0 else torch.ones_like(scatter)


def swapped_in_rows(
    contribution: Tensor,
    merit: Tensor,
    cost: Tensor,
    keep: Tensor,
    rounds: int,
    threshold: float,
    overshoot: bool = True,
) -> Tensor:
    """The better choice, all [rows, in]: C, C over the variance, what pruning costs, and the choice to start from.

    Candidates are ranked once, and each is used once; a row without any stops.
    """
    keep, start = keep.clone(), keep
    few, many = contribution < 0, contribution > 0  # zero has no sign: neither
    grow = [_best(-merit, ~start & few, rounds), _best(merit, ~start & many, rounds)]  # by the sign of what is lacking
    prune = [_best(-cost, start & many, rounds), _best(-cost, start & few, rounds)]
    order = [torch.stack([side[0] for side in both]) for both in (grow, prune)]  # [2, rows, rounds at most]
    there = [torch.stack([side[1] for side in both]) for both in (grow, prune)]  # [2, rows]
    place = torch.zeros(2, 2, len(keep), dtype=torch.long)  # how far in each ranking
    lack = lacking(contribution, keep)
    first = lack.sign()
    rows = torch.arange(len(keep))
    for _ in range(min(rounds, keep.shape[1])):
        rows = rows[lack[rows].abs() > threshold]
        side = (lack[rows] > 0).long()
        left = (place[0, side, rows] < there[0][side, rows]) & (place[1, side, rows] < there[1][side, rows])
        rows, side = rows[left], side[left]
        g = order[0][side, rows, place[0, side, rows]]
        q = order[1][side, rows, place[1, side, rows]]
        after = lack[rows] - contribution[rows, g] + contribution[rows, q]
        if not overshoot:
            still = after.sign() == first[rows]
            rows, side, g, q, after = rows[still], side[still], g[still], q[still], after[still]
        if not len(rows):
            break
        keep[rows, g], keep[rows, q] = True, False
        place[0, side, rows] += 1
        place[1, side, rows] += 1
        lack[rows] = after
    return keep


def swapped_in_groups(
    contribution: Tensor, merit: Tensor, score: Tensor, keep: Tensor, m: int, rounds: int, threshold: float
) -> Tensor:
    """The better choice with as many kept in every m consecutive inputs, all [rows, in]; see swapped_in_rows.

    A weight whose group has nothing left to swap with is passed over.
    """
    keep, start = keep.clone(), keep
    lack = lacking(contribution, keep)
    first = lack.sign()
    order, there = _best(merit * first[:, None], ~start & (contribution.sign() == first[:, None]), rounds)
    free = start.reshape(len(keep), -1, m).clone()  # kept from the start, and not swapped yet
    price = score.reshape(len(keep), -1, m)
    rows = torch.arange(len(keep))
    for step in range(order.shape[1]):
        rows = rows[(lack[rows].abs() > threshold) & (there[rows] > step)]
        if not len(rows):
            break
        g = order[rows, step]
        group = g // m
        cheapest = price[rows, group].masked_fill(~free[rows, group], torch.inf).min(1)
        inside = cheapest.indices
        q = group * m + inside
        after = lack[rows] - contribution[rows, g] + contribution[rows, q]
        partner = free[rows, group, inside]
        going = ~partner | (after.sign() == first[rows])
        swap = partner & going
        at = rows[swap]
        keep[at, g[swap]], keep[at, q[swap]] = True, False
        free[at, group[swap], inside[swap]] = False
        lack[at] = after[swap]
        rows = rows[going]
    return keep


def _best(value: Tensor, allowed: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """In each row the places of the allowed, best first [rows, most], and how many there are [rows]."""
    ranked = value.masked_fill(~allowed, -torch.inf).sort(dim=1, descending=True, stable=True).indices[:, :most]
    return ranked, allowed.sum(1).clamp(max=ranked.shape[1])


def _rows(value: Tensor) -> Tensor:
    """[out, in, ...] -> [out, in * ...] with the inputs of one position side by side, as n:m groups them."""
    return (value.movedim(1, -1) if value.dim() > 2 else value).flatten(1)


def _back(rows: Tensor, shape: tuple[int, ...]) -> Tensor:
    if len(shape) <= 2:
        return rows.reshape(shape)
    return rows.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1)
