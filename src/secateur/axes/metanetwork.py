"""A network that reads the graph of a network and changes it a little: nodes and edges hear one another.

Liu, Wang, Zhang 2025, arXiv:2506.12041, section 3. Channels in another order come out in that order, and one
metanetwork takes networks of any size.
"""

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from secateur import stored
from secateur.axes.network_graphs import LEARNT, NODE, Wiring, graph_of, network_of
from secateur.errors import ModelError
from secateur.site import Tensors


class _Exchange(nn.Module):
    """One layer: nodes hear along the edges and against them, edges hear from both ends."""

    turn: Tensor

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False)
        self.said, self.heard, self.start, self.end = (nn.Linear(hidden, hidden) for _ in range(4))
        self.gathered = nn.Linear(4 * hidden, hidden)
        turn = torch.ones(hidden)
        turn[hidden // 2 :] = -1.0  # half of an edge's numbers change sign against its direction
        self.register_buffer("turn", turn, persistent=False)

    def forward(self, nodes: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """[nodes, hidden] and [edges, hidden]."""
        h, turned = self.norm(nodes), self.turn * edges
        nodes = nodes + self._told(h, edges, source, target) + self._told(h, turned, target, source)
        start, end = F.silu(self.start(h)), F.silu(self.end(h))
        change = start[source] * end[target] * edges + self.turn * (start[target] * end[source] * turned)
        return nodes, edges + change

    def _told(self, h: Tensor, edges: Tensor, source: Tensor, target: Tensor) -> Tensor:
        said = F.silu(self.heard(h))[target] * F.silu(self.said(h))[source] * edges  # [edges, hidden]
        return self.gathered(gathered(said, target, len(h)))


def gathered(values: Tensor, target: Tensor, nodes: int) -> Tensor:
    """Mean, standard deviation, largest and smallest of what comes to each node: [nodes, 4 * hidden]."""
    place = target[:, None].expand_as(values)
    empty = values.new_zeros(nodes, values.shape[1])
    mean = empty.scatter_reduce(0, place, values, "mean", include_self=False)
    square = empty.scatter_reduce(0, place, values.square(), "mean", include_self=False)
    # A root's slope at 0 is infinite: where all that comes is alike the variance counts for a little more than 0.
    spread = ((square - mean.square()).clamp(min=0) + 1e-8).sqrt()
    most = empty.scatter_reduce(0, place, values, "amax", include_self=False)
    least = empty.scatter_reduce(0, place, values, "amin", include_self=False)
    return torch.cat([mean, spread, most, least], dim=1)


class Metanetwork(nn.Module):
    """Changes the graph of a network a little; of no network's size in particular."""

    def __init__(self, hidden: int = 16, layers: int = 3, side: int = 3, step: float = 0.01) -> None:
        super().__init__()
        self.hidden, self.side, self.step = hidden, side, step
        self.node_in, self.edge_in = nn.Linear(NODE, hidden), nn.Linear(side**2, hidden)
        self.exchanges = nn.ModuleList([_Exchange(hidden) for _ in range(layers)])
        self.node_out, self.edge_out = (
            nn.Sequential(
                nn.LayerNorm(hidden, elementwise_affine=False), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, out),
            )
            for out in (len(LEARNT), side**2)
        )  # fmt: skip
        for head in (self.node_out, self.edge_out):  # at first a network comes out as it went in
            for parameter in head[-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, wires: Wiring, nodes: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Nodes [nodes, 5] and edges [edges, taps] of a network of the same shape."""
        if wires.side != self.side:
            raise ModelError(
                f"a graph with edges of {wires.side}x{wires.side} was given",
                f"the metanetwork was made for {self.side}x{self.side}",
                f"Wire the network with side={self.side}, or train a metanetwork for its kernels.",
            )
        h, e = self.node_in(nodes), self.edge_in(edges)
        source, target = wires.source.to(nodes.device), wires.target.to(nodes.device)
        for exchange in self.exchanges:  # edges are as many as weights: what a layer computes is not kept for later
            h, e = checkpoint(exchange, h, e, source, target, use_reentrant=False)
        change = torch.zeros_like(nodes)
        change[:, LEARNT] = self.node_out(h)
        return nodes + self.step * change, edges + self.step * self.edge_out(e)

    def changed(self, wires: Wiring, named: Tensors) -> dict[str, Tensor]:
        """What a network's tensors become."""
        nodes, edges = self(wires, *graph_of(wires, named))
        return network_of(wires, nodes, edges, named)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all."""
        target = Path(path)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        about = {"hidden": self.hidden, "layers": len(self.exchanges), "side": self.side, "step": self.step}
        stored.write(self.state_dict(), partial, {"secateur_metanetwork": json.dumps(about)})
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | Path) -> "Metanetwork":
        """Read what `save` wrote. Raises ModelError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                made = cls(**json.loads((file.metadata() or {})["secateur_metanetwork"]))
                made.load_state_dict({name: file.get_tensor(name) for name in file.keys()})
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ModelError(
                f"a metanetwork was to be read from {path}",
                f"it is none: {str(error).splitlines()[0]}",
                "Train one with tools/train_metanetwork.py.",
            ) from error
        return made
