"""A random graph as a source of masks: its nodes become units in layers, its edges the weights that stay.

Edges point from the lower to the higher number, which makes any graph one without cycles. A node's layer is one more
than the deepest of those that point to it, so that every edge goes to a deeper layer: to the next one, where it is a
weight of that layer, or further, where it is a weight of a connection that skips layers.

Darji. "Investigating Sparsity in Recurrent Neural Networks." 2021. arXiv:2407.20601, section 3.2, after Stier and
Granitzer 2019, "Structural Analysis of Sparse Neural Networks". Needs networkx.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any

import torch
from torch import Tensor

from secateur.errors import SettingError

__all__ = ["Wiring", "barabasi_albert", "properties", "watts_strogatz"]


@dataclass(frozen=True)
class Wiring:
    """Nodes numbered from 0, and edges between them, each from the lower number to the higher."""

    nodes: int
    edges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for a, b in self.edges:
            if not 0 <= a < b < self.nodes:
                raise SettingError(
                    f"an edge from {a} to {b} was given",
                    f"an edge goes from a lower to a higher number, of 0 to {self.nodes - 1}",
                    "Give each pair in rising order, or use Wiring.of(graph).",
                )
        if len(self.layers) < 2:
            raise SettingError(
                f"a wiring of {self.nodes} nodes and {len(self.edges)} edges was given",
                "all its nodes are in one layer",
                "Give it edges.",
            )

    @classmethod
    def of(cls, graph: Any) -> "Wiring":
        """The wiring of a networkx graph whose nodes are numbered from 0; which end is which comes from the numbers."""
        edges = sorted({(min(a, b), max(a, b)) for a, b in graph.edges if a != b})
        return cls(graph.number_of_nodes(), tuple(edges))

    @property
    def layers(self) -> tuple[tuple[int, ...], ...]:
        """The nodes of each layer, in rising order; a node without predecessor is in layer 0."""
        depth = [0] * self.nodes
        for a, b in sorted(self.edges, key=lambda edge: edge[1]):  # all that lead to a node are known before it is used
            depth[b] = max(depth[b], depth[a] + 1)
        return tuple(tuple(v for v in range(self.nodes) if depth[v] == d) for d in range(max(depth, default=0) + 1))

    def between(self, source: int, target: int) -> Tensor:
        """Which nodes of one layer lead to which of a deeper one: bool [nodes of target, nodes of source]."""
        rows = {v: i for i, v in enumerate(self.layers[target])}
        columns = {v: i for i, v in enumerate(self.layers[source])}
        found = torch.zeros(len(rows), len(columns), dtype=torch.bool)
        for a, b in self.edges:
            if a in columns and b in rows:
                found[rows[b], columns[a]] = True
        return found

    @property
    def skips(self) -> tuple[tuple[int, int], ...]:
        """The pairs of layers (source, target), two apart or more, that edges lead between."""
        depth = {v: d for d, layer in enumerate(self.layers) for v in layer}
        return tuple(sorted({(depth[a], depth[b]) for a, b in self.edges if depth[b] - depth[a] > 1}))

    @property
    def unread(self) -> tuple[int, ...]:
        """The nodes from which no path of edges leads to the last layer.

        They train all the same; the only ones to read them are their own layer's, through what those remember.
        """
        read = set(self.layers[-1])
        for a, b in sorted(self.edges, reverse=True):
            if b in read:
                read.add(a)
        return tuple(v for v in range(self.nodes) if v not in read)

    @property
    def sources(self) -> int:
        """How many nodes no edge leads to."""
        return self.nodes - len({b for _, b in self.edges})

    @property
    def sinks(self) -> int:
        """How many nodes no edge leads from."""
        return self.nodes - len({a for a, _ in self.edges})

    def graph(self) -> Any:
        """The undirected networkx graph."""
        made = _networkx("the graph of a wiring").Graph()
        made.add_nodes_from(range(self.nodes))
        made.add_edges_from(self.edges)
        return made


def barabasi_albert(nodes: int, draw: torch.Generator) -> Wiring:
    """Nodes that join one after another, each with nodes // 10 edges to those that have many (Barabasi, Albert 1999).

    Below 20 nodes that is one edge each: a tree. Raises SettingError below 10, where it would be none.
    """
    networkx = _networkx("a Barabasi-Albert graph")
    _enough(nodes, "a Barabasi-Albert graph joins each new node by nodes // 10 edges")
    return Wiring.of(networkx.barabasi_albert_graph(nodes, nodes // 10, seed=_seed(draw)))


def watts_strogatz(nodes: int, draw: torch.Generator) -> Wiring:
    """A ring in which each node has nodes // 5 neighbours, every edge then led elsewhere (Watts, Strogatz 1998).

    Drawn until it is connected. Raises SettingError below 10 nodes, and where ten draws did not give a connected one.
    """
    networkx = _networkx("a Watts-Strogatz graph")
    _enough(nodes, "a Watts-Strogatz graph gives each node nodes // 5 neighbours, two at least")
    try:
        found = networkx.connected_watts_strogatz_graph(nodes, nodes // 5, 1.0, tries=10, seed=_seed(draw))
    except networkx.NetworkXError as error:
        raise SettingError(
            f"a connected Watts-Strogatz graph of {nodes} nodes was asked for",
            "ten draws gave none",
            "Draw again, or ask for more nodes.",
        ) from error
    return Wiring.of(found)


def properties(wiring: Wiring) -> dict[str, float]:
    """What is known of a graph before anything is trained, by name.

    Counts of layers, nodes, edges, sources and sinks, and those in the first and the last layer; diameter, density and
    mean shortest path; mean, variance and standard deviation of the eccentricity, of the degree, closeness and
    betweenness centrality of nodes, and of the betweenness of edges. All but layers, sources and sinks are of the
    graph without directions. Raises SettingError for a graph in pieces, where distances are not defined.
    """
    networkx = _networkx("the properties of a graph")
    graph = wiring.graph()
    if not networkx.is_connected(graph):
        raise SettingError(
            "the distances in a graph were asked for", "it is in several pieces", "Measure one piece, or connect them."
        )
    layers = wiring.layers
    far = networkx.eccentricity(graph)
    found = {
        "layers": float(len(layers)),
        "nodes": float(wiring.nodes),
        "edges": float(len(wiring.edges)),
        "sources": float(wiring.sources),
        "sinks": float(wiring.sinks),
        "first layer": float(len(layers[0])),
        "last layer": float(len(layers[-1])),
        "diameter": float(max(far.values())),
        "density": float(networkx.density(graph)),
        "mean shortest path": float(networkx.average_shortest_path_length(graph)),
    }
    many: Mapping[str, Mapping[Any, float]] = {
        "eccentricity": far,
        "degree": networkx.degree_centrality(graph),
        "closeness": networkx.closeness_centrality(graph),
        "betweenness": networkx.betweenness_centrality(graph),
        "edge betweenness": networkx.edge_betweenness_centrality(graph),
    }
    for name, values in many.items():
        found |= _spread(name, [float(v) for v in values.values()])
    return found


def _spread(name: str, values: Iterable[float]) -> dict[str, float]:
    held = list(values)
    var = variance(held) if len(held) > 1 else 0.0
    return {f"{name} mean": fmean(held), f"{name} variance": var, f"{name} deviation": var**0.5}


def _enough(nodes: int, why: str) -> None:
    if nodes < 10:
        raise SettingError(f"a random graph of {nodes} nodes was asked for", why, "Give 10 nodes or more.")


def _networkx(what: str) -> Any:
    try:
        import networkx
    except ImportError:
        raise SettingError(
            f"{what} was asked for", "networkx is not installed", "Install it: pip install 'secateur[studies]'."
        ) from None
    return networkx


def _seed(draw: torch.Generator) -> int:
    return int(torch.randint(1 << 31, (), generator=draw))
