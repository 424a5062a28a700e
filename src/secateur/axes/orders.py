"""In which order the output channels lie, so that those that belong together fall into the same blocks.

Putting the units of a coupled set in another order, with all that writes, reads, norms or filters them, leaves what a
network computes alone. But a pattern of blocks of n consecutive channels (`ChannelBlocks`) keeps more where rows that
are large at the same inputs are neighbours. One order serves a whole set: every layer that writes into a residual
stream has its rows moved, and what counts is what all of them keep together.

    AsTrained   as it is
    ByNorm      rows by their size: Lin et al. "1xN Pattern for Pruning Convolutional Neural Networks", 2021,
                arXiv:2105.14713
    Clustered   blocks grown one row at a time, then swaps of two rows while they help
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.patterns import ChannelBlocks
from secateur.edit import Rotate
from secateur.graph.fit import close
from secateur.graph.trace import answer, plain
from secateur.site import Site, tensors
from secateur.task import Batch


@dataclass(frozen=True, eq=False)
class Rows:
    """What a coupled set needs to know of one layer that writes it."""

    size: Tensor  # L1 norm of each kernel as the layer lies, float32 [out, in]
    at: Tensor  # the row that each place of the set is [units], int64
    n: int  # rows of a block
    keep: int  # kernels to keep

    def moved(self, order: Tensor) -> Tensor:
        """The norms with the units of the set in an order [out, in]: place j gets unit order[j]."""
        found = self.size.clone()
        found[self.at] = self.size[self.at[order]]
        return found

    def kept(self, order: Tensor) -> float:
        """What the best blocks keep in an order."""
        pattern, size = ChannelBlocks(self.n), self.moved(order)
        mask = pattern.select(size, pattern.nearest(tuple(size.shape), self.keep))
        return float(size[mask].sum(dtype=torch.float64))


def kept(layers: Sequence[Rows], order: Tensor) -> float:
    """What all layers of a set keep together."""
    return sum(layer.kept(order) for layer in layers)


@runtime_checkable
class Order(Protocol):
    """Which order the units of a coupled set are put in."""

    def of(self, layers: Sequence[Rows], units: int) -> Tensor | None:
        """Place j gets unit order[j]: a permutation [units], int64. None leaves them."""
        ...


@dataclass(frozen=True)
class AsTrained:
    """As it is."""

    def of(self, layers: Sequence[Rows], units: int) -> Tensor | None:
        """See Order."""
        return None


@dataclass(frozen=True)
class ByNorm:
    """The largest rows first, by the sum of their norms over the layers of the set."""

    def of(self, layers: Sequence[Rows], units: int) -> Tensor | None:
        """See Order."""
        norm = torch.stack([layer.size[layer.at].sum(1, dtype=torch.float64) for layer in layers]).sum(0)
        return torch.argsort(norm, descending=True, stable=True)


@dataclass(frozen=True)
class Clustered:
    """Each block grown from the rows that add most above the threshold; then swaps of two rows while they help.

    Against a threshold t, a layer's kept norm is at most the sum over blocks of max(norm - t, 0), plus a constant, and
    equal to it where t is the smallest block kept: swaps climb that sum, and t is taken anew after each round.
    """

    rounds: int = 8  # passes over all rows at most; a pass that gains nothing is the last

    def of(self, layers: Sequence[Rows], units: int) -> Tensor | None:
        """See Order."""
        starts = [torch.arange(units), ByNorm().of(layers, units), grown(layers, units)]
        order = max((s for s in starts if s is not None), key=lambda s: kept(layers, s))
        best, most = order, kept(layers, order)
        for _ in range(self.rounds):
            order = swapped(layers, order)
            if (now := kept(layers, order)) <= most * (1 + 1e-6):
                return order if now > most else best
            best, most = order, now
        return best


class _Blocks:
    """One layer's blocks while its rows move: their sums, and the threshold each is held against."""

    def __init__(self, layer: Rows, order: Tensor) -> None:
        pattern, size = ChannelBlocks(layer.n), layer.moved(order)
        shape = (int(size.shape[0]), int(size.shape[1]))
        whole = pattern.whole(shape)
        rows = torch.arange(shape[0])
        block = torch.where(rows < whole, rows // layer.n, whole // layer.n + rows - whole)  # which block a row is in
        self.size, self.at, self.block = layer.size, layer.at, block[layer.at]  # of each place
        self.sums = torch.zeros(int(block[-1]) + 1, shape[1]).index_add(0, block, size)
        self.limits = torch.empty(len(self.sums), 1)
        self.n = torch.bincount(block)  # rows of each block
        wide = whole // layer.n
        for part, many in zip((slice(0, wide), slice(wide, None)), pattern.counts(shape, layer.keep), strict=True):
            self.limits[part] = _smallest_kept(self.sums[part].reshape(-1), many)
        self.rows = size[layer.at]  # what lies at each place now [units, in]
        self.alien = size.clone().index_fill_(0, layer.at, 0)  # rows of other sets
        self.of_row = block
        self.now = self.above(self.sums, torch.arange(len(self.sums)))

    def above(self, sums: Tensor, block: Tensor) -> Tensor:
        """How far sums of some blocks lie above their thresholds, summed over inputs."""
        return (sums - self.limits[block]).clamp_(min=0).sum(1)

    def gains(self, place: int) -> Tensor:
        """What swapping a place with each other would gain [units]; those in its own block gain nothing."""
        here, mine = self.block[place], self.rows[place]
        other = self.sums[self.block]
        taken = self.above(self.sums[here] - mine + self.rows, here.expand(len(self.rows)))
        given = self.above(other - self.rows + mine, self.block)
        gain = taken + given - self.now[here] - self.now[self.block]
        return gain.masked_fill_(self.block == here, 0)

    def swap_(self, a: int, b: int) -> None:
        change = self.rows[b] - self.rows[a]
        self.sums[self.block[a]] += change
        self.sums[self.block[b]] -= change
        self.rows[[a, b]] = self.rows[[b, a]]
        both = self.block[[a, b]]
        self.now[both] = self.above(self.sums[both], both)


def _smallest_kept(sums: Tensor, many: int) -> float:
    """The least of the sums that are kept; where all or none are, one that makes no difference."""
    if many == 0 or many == len(sums):
        return 0.0 if many else float("inf")
    return float(torch.kthvalue(sums, len(sums) - many + 1).values)


def swapped(layers: Sequence[Rows], order: Tensor) -> Tensor:
    """An order after every place, in turn, was swapped with the one with which it gains most, if it gains."""
    order, blocks = order.clone(), [_Blocks(layer, order) for layer in layers]
    least = 1e-6 * sum(float(b.sums.sum()) for b in blocks) / len(order)
    for place in range(len(order)):
        gain = torch.stack([b.gains(place) for b in blocks]).sum(0)
        other = int(gain.argmax())
        if float(gain[other]) > least:
            for each in blocks:
                each.swap_(place, other)
            order[[place, other]] = order[[other, place]]
    return order


def grown(layers: Sequence[Rows], units: int) -> Tensor:
    """An order made place after place: the unit that raises the block there most above its share of the threshold."""
    blocks = [_Blocks(layer, torch.arange(units)) for layer in layers]
    for each in blocks:  # nothing is placed yet but what other sets own
        each.sums = torch.zeros_like(each.sums).index_add(0, each.of_row, each.alien)
    filled = [b.n - torch.bincount(b.block, minlength=len(b.n)) for b in blocks]
    left, order = torch.arange(units), torch.empty(units, dtype=torch.long)
    for place in range(units):
        worth = torch.zeros(len(left))
        for each, full in zip(blocks, filled, strict=True):
            here = each.block[place]
            full[here] += 1
            limit = each.limits[here] * (full[here] / each.n[here])
            worth += (each.sums[here] + each.size[each.at[left]] - limit).clamp_(min=0).sum(1)
        best = int(worth.argmax())
        unit = left[best]
        order[place] = unit
        left = torch.cat([left[:best], left[best + 1 :]])
        for each in blocks:
            each.sums[each.block[place]] += each.size[each.at[unit]]
    return order


def rearrange_(
    model: nn.Module,
    example: Batch,
    coupled: Sequence[Site],
    sites: Sequence[Site],
    keep: Mapping[str, int],
    n: int,
    order: Order,
) -> tuple[list[Rotate], list[str]]:
    """Put every coupled set in the order that lets its layers keep more; the edits, and remarks on sets left alone.

    `keep` is the number of weights that each of some layers (`sites`) is to keep in blocks of n rows. A set stays as
    it is where the order keeps no more, where one of its units owns several rows of a layer, and where the model's
    answer to the example would change. Sets that share layers are done one after the other.
    """
    layers = {site.parts[0].key: site for site in sites}
    edits: list[Rotate] = []
    left: list[str] = []
    with plain(model):
        for site in coupled:
            rows = _rows(model, site, layers, keep, n)
            if rows is None:
                left.append(f"{site.name} stays in its order: a unit owns several rows of a layer")
                continue
            found = order.of(rows, site.units) if rows else None
            if found is None or kept(rows, found) <= kept(rows, torch.arange(site.units)):
                continue
            before, edit = answer(model, example), Rotate(site, found)
            edit.apply_(model)
            if all(close(a, b) for a, b in zip(before, answer(model, example), strict=True)):
                edits.append(edit)
            else:
                Rotate(site, torch.argsort(found)).apply_(model)
                left.append(f"{site.name} stays in its order: in another the model's answer would change")
    return edits, left


def _rows(
    model: nn.Module, site: Site, layers: Mapping[str, Site], keep: Mapping[str, int], n: int
) -> list[Rows] | None:
    """The layers that write a set and are to be cut, as they lie now; None where a unit owns several rows of one."""
    named, found = tensors(model), []
    for part in site.parts:
        layer = layers.get(part.key)
        if layer is None or part.axis != 0 or part.owner is None:
            continue
        owner = part.owner.reshape(-1)
        at = torch.argsort(owner, stable=True)[int((owner < 0).sum()) :]
        if len(at) != site.units:
            return None
        size = part.read(named).detach().float().abs().cpu()
        weights = size.shape[2:].numel()
        size = size.sum(tuple(range(2, size.dim()))) if size.dim() > 2 else size
        found.append(Rows(size, at, n, keep[layer.name] // weights))
    return found
