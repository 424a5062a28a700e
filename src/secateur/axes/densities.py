"""What a network costs at any widths, and the densities and widths of most synaptic flow within budgets of costs.

Cai, Hua, Chen, Suh, De Sa, Zhang 2022, arXiv:2203.02549: the synaptic flow to be expected of random masks over random
weights is, but for a constant, the product of all layers' densities. A layer of r_in and r_out of its channels has a
density of r_in r_out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from secateur.errors import BudgetError
from secateur.site import Part, Site

Numbers = np.ndarray


def best_densities(weights: Numbers, work: Numbers, most_weights: float, most_work: float) -> Numbers:
    """SynExp in closed form: p = min(1, 1 / (mu a + nu b)), by bisection over mu within one over nu [layers].

    A budget that does not bind has a multiplier of 0; without any, all densities are 1.
    """

    def given(nu: float) -> Numbers:
        return _least(lambda mu: np.minimum(1, 1 / np.maximum(mu * weights + nu * work, 1e-300)), weights, most_weights)

    return _least(given, work, most_work)


def _least(densities: Callable[[float], Numbers], cost: Numbers, most: float) -> Numbers:
    """Densities at the smallest multiplier of 0 and more that keeps a cost within a budget."""
    if cost @ densities(0.0) <= most:
        return densities(0.0)
    low, high = 0.0, 1 / most
    while cost @ densities(high) > most:
        low, high = high, 2 * high
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if cost @ densities(middle) > most else (low, middle)
    return densities(high)


@dataclass(frozen=True, eq=False)
class Costs:
    """What a network costs at any widths: each tensor is as large as the product of two sides, of so many channels.

    A side is `fixed` entries that nothing can take out and `per` of each channel of a group; the sums over tensors are
    of parameters, biases and norms included, and of multiply-adds.
    """

    full: Numbers  # channels of each group [groups]
    fixed: Numbers  # [tensors, 2]
    per: Numbers  # [tensors, 2, groups]
    weights: Numbers  # parameters per pair of entries [tensors]: a kernel's area
    work: Numbers  # multiply-adds per pair of entries [tensors]
    layers: tuple[str, ...]  # the tensors that are matrices or kernels, by name
    place: Numbers  # where those are among the tensors
    widest: float = 1.0  # times its channels that a group may have

    @property
    def top(self) -> Numbers:
        """The most channels each group may have [groups]."""
        return np.floor(self.full * self.widest + 1e-9)

    @classmethod
    def of(cls, model: nn.Module, sites: Sequence[Site]) -> "Costs":
        """Of all parameters that channels of some sites own a part of."""
        found: dict[str, list[tuple[int, Part]]] = {}
        trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
        for group, site in enumerate(sites):
            for part in site.parts:
                if part.name in trained:
                    found.setdefault(part.name, []).append((group, part))
        fixed, per = np.ones((len(found), 2)), np.zeros((len(found), 2, len(sites)))
        area, work, layers, place = np.ones(len(found)), np.zeros(len(found)), [], []
        for row, (name, parts) in enumerate(found.items()):
            shape, axes = list(parts[0][1].shape), list(dict.fromkeys(part.axis or 0 for _, part in parts))
            for side, axis in enumerate(axes):
                fixed[row, side] = shape[axis]
                for group, part in parts:
                    if (part.axis or 0) == axis:
                        owned = int((part.owned() >= 0).sum())
                        per[row, side, group] += owned / sites[group].units
                        fixed[row, side] -= owned
            area[row] = np.prod([size for axis, size in enumerate(shape) if axis not in axes])
            if len(shape) > 1:
                work[row] = area[row] * parts[0][1].uses
                layers.append(name)
                place.append(row)
        full = np.array([site.units for site in sites], dtype=float)
        return cls(full, fixed, per, area, work, tuple(layers), np.array(place, dtype=int))

    def sides(self, widths: Numbers) -> Numbers:
        """How long each side is [tensors, 2]."""
        return self.fixed + self.per @ widths

    def total(self, widths: Numbers, of: Numbers) -> float:
        """The sum over tensors, of `weights` or `work`."""
        return float(of @ self.sides(widths).prod(1))

    def densities(self, widths: Numbers) -> Numbers:
        """The share of each layer that is left [layers]."""
        return (self.sides(widths).prod(1) / self.sides(self.full).prod(1))[self.place]


@dataclass(frozen=True, eq=False)
class Limit:
    """No more than so much of one cost."""

    of: Numbers  # per pair of entries [tensors]
    most: float
    what: str  # "parameters"


def log_sides(costs: Costs, x: Numbers) -> tuple[Numbers, Numbers]:
    """The sides at widths e^x [tensors, 2], and the slopes of the logarithm of each layer's size [layers, groups]."""
    sides = costs.sides(np.exp(x))
    return sides, (costs.per * np.exp(x) / sides[:, :, None])[costs.place].sum(1)


def within(costs: Costs, limits: Sequence[Limit], widths: Numbers) -> bool:
    """Whether no cost at some widths is above its limit."""
    return all(costs.total(widths, limit.of) <= limit.most + 1e-6 for limit in limits)


def check_least(costs: Costs, limits: Sequence[Limit], least: Numbers | None = None) -> None:
    """Raise BudgetError, with the least there can be, for a limit that one channel everywhere is above."""
    least = np.ones_like(costs.full) if least is None else least
    for limit in limits:
        if (count := costs.total(least, limit.of)) > limit.most + 1e-6:
            whole = costs.total(costs.full, limit.of)
            raise BudgetError(
                f"{limit.most:,.0f} of {whole:,.0f} {limit.what} were to be left",
                f"the narrowest network there is, with the least channels everywhere, has {count:,.0f}",
                f"Ask for a sparsity of at most {int((1 - count / whole) * 1e4) / 1e4:g}.",
            )


def climb(costs: Costs, limits: Sequence[Limit], goal: Callable[[Numbers], tuple[float, Numbers, Numbers]]) -> Numbers:
    """Widths of one channel up to the most within the limits, where a goal is highest: Newton's method in logarithms.

    Boundaries repel, less and less, as in interior-point methods (Boyd and Vandenberghe 2004, section 11.3).
    """
    check_least(costs, limits)
    top = np.log(np.maximum(costs.top, 1 + 1e-9))
    x, start = top * 0.5, 0.5
    while not all(costs.total(np.exp(x), limit.of) < limit.most for limit in limits):
        start /= 4
        x = top * start
        if start < 1e-12:
            return np.ones_like(top)

    def barrier(x: Numbers, sharp: float) -> tuple[float, Numbers, Numbers]:
        value, slope, bend = goal(x)
        value, slope, bend = -sharp * value, -sharp * slope, sharp * bend
        rooms = [limit.most - costs.total(np.exp(x), limit.of) for limit in limits]
        if min([*rooms, float(x.min()), float((top - x).min())]) <= 0:
            return np.inf, slope, bend
        value += -np.log(x).sum() - np.log(top - x).sum() - np.log(rooms).sum()
        slope = slope - 1 / x + 1 / (top - x)
        bend = bend + np.diag(1 / x**2 + 1 / (top - x) ** 2)
        sides, each = costs.sides(np.exp(x)), costs.per * np.exp(x)
        for limit, room in zip(limits, rooms, strict=True):
            first, second = each[:, 0], each[:, 1]  # slopes of the two sides [tensors, groups]
            a, b = limit.of * sides[:, 1], limit.of * sides[:, 0]
            steep = a @ first + b @ second
            cross = first.T @ (limit.of[:, None] * second)
            slope = slope + steep / room
            bend = bend + (np.diag(steep) + cross + cross.T) / room + np.outer(steep, steep) / room**2
        return float(value), slope, bend

    sharp = 1.0
    while sharp < 1e10:
        for _ in range(60):
            value, slope, bend = barrier(x, sharp)
            step = -np.linalg.solve(bend + 1e-12 * np.eye(len(x)), slope)
            if -slope @ step < 1e-9:
                break
            size = 1.0
            while size > 1e-12 and barrier(x + size * step, sharp)[0] > value + 0.25 * size * (slope @ step):
                size /= 2
            x = x + size * step
        sharp *= 10
    return np.exp(x)


def whole_widths(costs: Costs, limits: Sequence[Limit], real: Numbers, multiples: Numbers) -> Numbers:
    """Whole numbers of channels: rounded down, then one more where most is missing, as long as the budgets allow."""
    least = np.minimum(multiples, costs.full)
    found = np.clip(np.floor(real / multiples + 1e-9) * multiples, least, costs.top)
    if not within(costs, limits, found):
        check_least(costs, limits, least)
        found = least.copy()
    room = np.ones(len(found), dtype=bool)
    while room.any():
        group = int(np.argmax(np.where(room, real / found, -1)))
        more = found.copy()
        more[group] = min(more[group] + multiples[group], costs.top[group])
        if more[group] > found[group] and within(costs, limits, more):
            found = more
        else:
            room[group] = False  # nor later: the others only grow
    return found
