"""Cells: small graphs of feature maps, with all operations mixed on each edge in a search and one of them afterwards.

Liu, Simonyan, Yang. "DARTS: Differentiable Architecture Search." 2019. arXiv:1806.09055, section 2.1 and appendix A. A
cell reads two feature maps. Node i is the sum of what comes along its edges from those two and from the i nodes before
it, and what the nodes give is concatenated. Edges are numbered node by node: node 0 has edges 0 and 1, node 1 has edges
2 to 4. In a search an edge is the sum of all operations, each times its share softmax(alpha)_o; a `Genotype` has two
edges a node, with an operation each. A cell that halves the size of its maps is a reduction, any other normal: cells of
one kind share a row of alpha for each edge.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.edit import replacement
from secateur.errors import SettingError, did_you_mean

# Operations


class Reduced(nn.Module):
    """Half the size: two 1x1 convolutions of stride 2, one pixel apart, give half of the channels each."""

    def __init__(self, width_in: int, width_out: int, affine: bool) -> None:
        super().__init__()
        self.even = nn.Conv2d(width_in, width_out - width_out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(width_in, width_out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, height, width] -> [batch, width_out, height / 2, width / 2], rounded up."""
        x = F.relu(x)
        # padded, so that of an odd size both convolutions see as many pixels
        return self.norm(torch.cat([self.even(x), self.odd(F.pad(x[:, :, 1:, 1:], (0, 1, 0, 1)))], 1))


class Fitted(nn.Module):
    """A 1x1 convolution to another number of channels."""

    def __init__(self, width_in: int, width_out: int, affine: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(width_out, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, height, width] -> [batch, width_out, height, width]."""
        return self.norm(self.conv(F.relu(x)))


class Depthwise(nn.Module):
    """Each channel filtered for itself, then all mixed in every pixel; a dilation spreads the filter out."""

    def __init__(self, width: int, size: int, stride: int, affine: bool, dilation: int = 1) -> None:
        super().__init__()
        pad = dilation * (size - 1) // 2
        self.depthwise = nn.Conv2d(width, width, size, stride, pad, dilation, groups=width, bias=False)
        self.pointwise = nn.Conv2d(width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, height, width] -> the same channels, by the stride smaller."""
        return self.norm(self.pointwise(self.depthwise(F.relu(x))))


class Pooled(nn.Module):
    """The mean or the largest of 3x3 pixels, padding left out, then a norm without weights."""

    def __init__(self, pool: nn.Module, width: int) -> None:
        super().__init__()
        self.pool, self.norm = pool, nn.BatchNorm2d(width, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, height, width] -> the same channels, by the stride smaller."""
        return self.norm(self.pool(x))


def _average(width: int, stride: int, affine: bool) -> nn.Module:
    return Pooled(nn.AvgPool2d(3, stride, 1, count_include_pad=False), width)


def _largest(width: int, stride: int, affine: bool) -> nn.Module:
    return Pooled(nn.MaxPool2d(3, stride, 1), width)


def _skip(width: int, stride: int, affine: bool) -> nn.Module:
    return nn.Identity() if stride == 1 else Reduced(width, width, affine)


def _separable(size: int) -> Callable[[int, int, bool], nn.Module]:
    def make(width: int, stride: int, affine: bool) -> nn.Module:
        return nn.Sequential(Depthwise(width, size, stride, affine), Depthwise(width, size, 1, affine))

    return make


def _dilated(size: int) -> Callable[[int, int, bool], nn.Module]:
    return lambda width, stride, affine: Depthwise(width, size, stride, affine, dilation=2)


NONE = "none"
"""The operation that hands nothing on: it takes a share in a search, and no genotype has it."""

OPERATIONS: Mapping[str, Callable[[int, int, bool], nn.Module] | None] = {
    NONE: None,
    "max_pool_3x3": _largest,
    "avg_pool_3x3": _average,
    "skip_connect": _skip,
    "sep_conv_3x3": _separable(3),
    "sep_conv_5x5": _separable(5),
    "dil_conv_3x3": _dilated(3),
    "dil_conv_5x5": _dilated(5),
}
"""By the names of the paper: the operation from width, stride, and whether its norms have weights."""


def parametric(operation: str) -> bool:
    """Whether an operation has weights of its own, whatever its stride."""
    return "conv" in operation


def _known(operations: Sequence[str], asked: str) -> None:
    for name in operations:
        if name not in OPERATIONS:
            raise SettingError(asked, f"there is no operation {name!r}", did_you_mean(name, OPERATIONS))


@dataclass(frozen=True)
class Space:
    """What a search may choose from."""

    nodes: int = 4  # of a cell
    operations: tuple[str, ...] = tuple(OPERATIONS)  # by the names of OPERATIONS

    def __post_init__(self) -> None:
        asked = f"cells of {self.nodes} nodes with the operations {', '.join(self.operations) or 'none at all'}"
        asked += " were to be searched"
        if self.nodes < 1:
            raise SettingError(asked, "a cell has one node at least", "Give 4, or 2 for a small search.")
        _known(self.operations, asked)
        if len(set(self.operations)) < len(self.operations):
            raise SettingError(asked, "one is named twice", "Name each once.")
        if not any(parametric(name) for name in self.operations):
            raise SettingError(
                asked, "none of them has weights, so that nothing could be learnt", "Add one such as sep_conv_3x3."
            )

    @property
    def edges(self) -> int:
        """How many edges a cell has."""
        return sum(range(2, self.nodes + 2))


SMALL = Space(2, (NONE, "skip_connect", "avg_pool_3x3", "sep_conv_3x3", "dil_conv_3x3"))
"""A space for searches of minutes."""


# Genotypes

Wires = tuple[tuple[tuple[str, int], ...], ...]
"""For each node, an operation and the number of its predecessor for each edge: 0 and 1 are what the cell reads."""


class Genotype(NamedTuple):
    """What a search found, for each kind of cell; of a kind that there is not, nothing.

    As text: `normal sep_conv_3x3<0 skip_connect<1 | dil_conv_3x3<0 skip_connect<2; reduce ...`.
    """

    normal: Wires = ()
    reduce: Wires = ()

    def of(self, kind: str) -> Wires:
        """Of "normal" or "reduce"."""
        return self.normal if kind == "normal" else self.reduce

    @property
    def operations(self) -> list[str]:
        """The operations of all edges."""
        return [name for wires in self for node in wires for name, _ in node]

    @property
    def share(self) -> float:
        """The share of the edges whose operation has weights."""
        found = self.operations
        return sum(map(parametric, found)) / len(found) if found else 0.0

    def __str__(self) -> str:
        said = []
        for kind in ("normal", "reduce"):
            if wires := self.of(kind):
                said.append(f"{kind} {' | '.join(' '.join(f'{o}<{j}' for o, j in node) for node in wires)}")
        return "; ".join(said)

    @classmethod
    def read(cls, text: str) -> "Genotype":
        """The genotype of a text. Raises SettingError for one that stands for none."""
        found: dict[str, Wires] = {}
        for half in filter(None, map(str.strip, text.split(";"))):
            kind, _, rest = half.partition(" ")
            if kind not in ("normal", "reduce") or kind in found:
                raise SettingError(
                    f"the genotype {text!r} was given",
                    f"{kind!r} is no kind of cell, or is there twice",
                    "Write normal ...; reduce ....",
                )
            found[kind] = tuple(tuple(_edges(node, text)) for node in rest.split("|"))
            _legal(found[kind], f"the genotype {text!r} was given")
        if not found:
            raise SettingError(
                "a genotype was to be read", "it is empty", "Write normal sep_conv_3x3<0 skip_connect<1."
            )
        return cls(found.get("normal", ()), found.get("reduce", ()))


def _edges(node: str, text: str) -> Iterator[tuple[str, int]]:
    for word in node.split():
        shape = re.fullmatch(r"(\w+)<(\d+)", word)
        if shape is None:
            raise SettingError(
                f"the genotype {text!r} was given", f"{word!r} is no edge", "Write each as operation<predecessor."
            )
        yield shape[1], int(shape[2])


def _legal(wires: Wires, asked: str) -> None:
    """Raise SettingError for a node with fewer than two predecessors, one that comes later, and none."""
    for place, node in enumerate(wires):
        _known([name for name, _ in node], asked)
        if NONE in (name for name, _ in node):
            raise SettingError(
                asked, f"node {place} has an edge of {NONE!r}", "Leave the edge out, or give it another."
            )
        others = {j for _, j in node}
        if len(others) < 2:
            raise SettingError(
                asked, f"node {place} has {len(others)} predecessor", "Give it two at least, each with an operation."
            )
        if max(others) >= place + 2:
            raise SettingError(
                asked, f"node {place} reads {max(others)}, which comes later", f"Give it any of 0 to {place + 1}."
            )


def derived(share: Tensor, operations: Sequence[str]) -> Wires:
    """The genotype of a kind of cell from the shares of operations [edges, operations]: two edges a node.

    A node keeps the edges whose best operation has most, and each edge that operation; "none" does not count. Of equal
    ones the first. Raises SettingError where edges do not make nodes of two predecessors or more.
    """
    free = [place for place, name in enumerate(operations) if name != NONE]
    best, which = share.detach()[:, free].max(1)
    found: list[tuple[tuple[str, int], ...]] = []
    start = 0
    while start < len(share):
        count = len(found) + 2
        if start + count > len(share):
            raise SettingError(
                f"a genotype was to be derived from {len(share)} edges",
                f"node {len(found)} would have {len(share) - start} of its {count} predecessors",
                "Give 2, 5, 9 or 14 rows: node i has i + 2.",
            )
        mine = best[start : start + count].tolist()
        chosen = sorted(sorted(range(count), key=lambda j: (-mine[j], j))[:2])
        found.append(tuple((operations[free[int(which[start + j])]], j) for j in chosen))
        start += count
    return tuple(found)


def drawn(space: Space, draw: torch.Generator) -> Wires:
    """A genotype of a kind of cell by chance: two of a node's predecessors, and any operation but "none" for each."""
    free = [name for name in space.operations if name != NONE]
    found = []
    for node in range(space.nodes):
        two = sorted(torch.randperm(node + 2, generator=draw)[:2].tolist())
        found.append(tuple((free[int(torch.randint(len(free), (), generator=draw))], j) for j in two))
    return tuple(found)


# Cells


@dataclass(frozen=True)
class Seat:
    """Where a cell stands: channels of the two maps it reads, of each node, and what sizes change."""

    first: int  # channels of the map that is read first
    second: int
    width: int  # of each node; the cell gives nodes * width channels
    reduces: bool = False  # whether it halves the size
    shrunk: bool = False  # whether the first map is twice the size of the second

    @property
    def kind(self) -> str:
        """ "normal" or "reduce"."""
        return "reduce" if self.reduces else "normal"

    def reader(self, affine: bool) -> tuple[nn.Module, nn.Module]:
        """What brings the two maps to the width of the nodes, and to one size."""
        fit = Reduced if self.shrunk else Fitted
        return fit(self.first, self.width, affine), Fitted(self.second, self.width, affine)

    def stride(self, predecessor: int) -> int:
        """Of an edge: a reduction halves what it reads, not its own nodes."""
        return 2 if self.reduces and predecessor < 2 else 1

    def make(self, operation: str, predecessor: int, affine: bool) -> nn.Module:
        """An operation for an edge."""
        build = OPERATIONS[operation]
        assert build is not None, "none is never built"
        return build(self.width, self.stride(predecessor), affine)


class SearchCell(nn.Module):
    """A cell with every operation on every edge, mixed by the softmax of `alpha` [edges, operations].

    `alpha` is no parameter: whoever searches gives all cells of a kind one tensor. Until then operations count alike.
    Norms have no weights, which could make up for the shares. A cell that is given one map reads it twice.
    """

    def __init__(self, seat: Seat, space: Space) -> None:
        super().__init__()
        self.seat, self.space = seat, space
        self.alpha = torch.zeros(space.edges, len(space.operations))
        self.first, self.second = seat.reader(affine=False)
        self.edges = nn.ModuleList(
            nn.ModuleDict({name: seat.make(name, j, affine=False) for name in space.operations if name != NONE})
            for node in range(space.nodes)
            for j in range(node + 2)
        )

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """Two maps [batch, channels, height, width] -> [batch, nodes * width, height, width], halved in a reduction."""
        maps = [self.first(first), self.second(first if second is None else second)]
        share = self.alpha.to(first).softmax(1)
        edge = 0
        for _ in range(self.space.nodes):
            terms = []
            for x in maps:
                terms += [
                    share[edge, place] * self.edges[edge][name](x)  # type: ignore[index]  # a ModuleList says Module
                    for place, name in enumerate(self.space.operations)
                    if name != NONE
                ]
                edge += 1
            maps.append(sum(terms[1:], terms[0]))
        return torch.cat(maps[2:], 1)

    def found(self, genotype: Genotype) -> "FoundCell":
        """The cell that a genotype makes of it. Raises SettingError for one that says nothing of its kind."""
        wires = genotype.of(self.seat.kind)
        if len(wires) != self.space.nodes:
            raise SettingError(
                f"a {self.seat.kind} cell of {self.space.nodes} nodes was to be built",
                f"the genotype has {len(wires)} nodes for that kind",
                "Search with as many nodes, or build the network with as many as the genotype has.",
            )
        seat = self.seat
        return FoundCell(seat.first, seat.second, seat.width, seat.reduces, seat.shrunk, wires)


@replacement
class FoundCell(nn.Module):
    """A cell of a genotype: two edges a node, with one operation each. Norms have weights."""

    def __init__(self, first: int, second: int, width: int, reduces: bool, shrunk: bool, wires: Wires) -> None:
        super().__init__()
        self.seat = Seat(first, second, width, reduces, shrunk)
        self.wires: Wires = tuple(tuple((str(o), int(j)) for o, j in node) for node in wires)  # lists, when read back
        _legal(self.wires, "a cell was to be built")
        self.first, self.second = self.seat.reader(affine=True)
        self.edges = nn.ModuleList(self.seat.make(o, j, affine=True) for node in self.wires for o, j in node)

    def settings(self) -> dict[str, object]:
        """What it takes to build it again."""
        seat = self.seat
        return {
            "first": seat.first,
            "second": seat.second,
            "width": seat.width,
            "reduces": seat.reduces,
            "shrunk": seat.shrunk,
            "wires": [[list(edge) for edge in node] for node in self.wires],
        }

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """See SearchCell."""
        maps = [self.first(first), self.second(first if second is None else second)]
        edge = 0
        for node in self.wires:
            terms = [self.edges[edge + place](maps[j]) for place, (_, j) in enumerate(node)]
            edge += len(node)
            maps.append(sum(terms[1:], terms[0]))
        return torch.cat(maps[2:], 1)
