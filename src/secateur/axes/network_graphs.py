"""A network as a graph, and back exactly: nodes for channels, edges for the kernels between them.

A node for each channel of each layer, with its norm and bias; an edge for each kernel from one channel to another, and
an edge of a lone 1 where a shortcut leads past layers. Liu, Wang, Zhang 2025, arXiv:2506.12041, section 3.
"""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import GraphError
from secateur.site import Tensors

NODE = 5  # numbers of a node: a norm's weight and bias, its running mean and variance, and the layer's bias
PLAIN = (1.0, 0.0, 0.0, 1.0, 0.0)  # of a node that has neither
LEARNT = (0, 1, 4)  # those that the metanetwork changes: running statistics are seen, and copied
SAME = (nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity, nn.Flatten, nn.Dropout, nn.Dropout2d,
        nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d, nn.Softmax, nn.LogSoftmax)  # fmt: skip
"""Modules through which channels stay the channels they are."""

SAME_CALLS = frozenset(
    {
        *("relu", "relu_", "relu6", "gelu", "silu", "leaky_relu", "softmax", "log_softmax", "dropout", "contiguous"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "flatten", "view"),
        *("reshape", "squeeze", "clone"),
    }
)
"""Functions and tensors' methods of that kind."""


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer's share of the edges."""

    name: str  # of the module
    shape: tuple[int, ...]  # of its weight
    edges: slice
    nodes: Tensor  # int64 [out]: those it makes
    places: Tensor  # int64 [taps]: where a kernel's numbers stand among an edge's, in the middle


@dataclass(frozen=True, eq=False)
class Wiring:
    """Which nodes there are, and which edges lead from where to where; no values."""

    nodes: int
    source: Tensor  # int64 [edges]
    target: Tensor
    layers: tuple[Layer, ...]
    norms: tuple[tuple[str, Tensor], ...]  # batch norms and the nodes they norm
    shortcuts: slice  # the edges that are no weights
    side: int = 3  # of the kernels that an edge has room for

    @property
    def taps(self) -> int:
        """Numbers of an edge."""
        return self.side**2


class _Wirer:
    """Follows channels through a traced network."""

    def __init__(self, model: nn.Module, side: int) -> None:
        self.model, self.side = model, side
        self.count = 0
        self.source: list[Tensor] = []
        self.target: list[Tensor] = []
        self.edges = 0
        self.layers: list[Layer] = []
        self.norms: list[tuple[str, Tensor]] = []
        self.normed: set[int] = set()
        self.short: list[tuple[Tensor, Tensor]] = []
        self.inputs: Tensor | None = None

    def new(self, number: int) -> Tensor:
        """So many more nodes."""
        self.count += number
        return torch.arange(self.count - number, self.count)

    def layer(self, name: str, module: nn.Module, wire: Tensor | None) -> Tensor:
        """A convolution's or linear layer's nodes, with edges from those it reads."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        groups = module.groups if isinstance(module, nn.Conv2d) else 1
        reads = weight.shape[1] * int(groups)
        if wire is None:
            self.inputs = wire = self.new(reads) if self.inputs is None else self.inputs
        if any(layer.name == name for layer in self.layers):
            raise _unfit(name, module, "it is used twice")
        if len(wire) != reads or bool((wire < 0).any()):
            raise _unfit(name, module, f"it reads {reads} values of {len(wire)} channels, not one of each")
        high, wide = weight.shape[2:] if weight.dim() == 4 else (1, 1)
        if max(high, wide) > self.side or not high % 2 or not wide % 2:
            room = f"an edge has room for {self.side}x{self.side}"
            raise _unfit(name, module, f"its kernels are {high}x{wide}, and {room}")
        made = self.new(weight.shape[0])
        each = weight.shape[0] // int(groups)
        start = torch.arange(weight.shape[0]).div(each, rounding_mode="floor") * weight.shape[1]
        source = wire[start[:, None] + torch.arange(weight.shape[1])]  # [out, in of its group]
        self.source.append(source.reshape(-1))
        self.target.append(made[:, None].expand_as(source).reshape(-1))
        grid = torch.arange(self.side**2).reshape(self.side, self.side)
        top, left = (self.side - high) // 2, (self.side - wide) // 2
        places = grid[top : top + high, left : left + wide].reshape(-1)
        stop = self.edges + source.numel()
        self.layers.append(Layer(name, tuple(weight.shape), slice(self.edges, stop), made, places))
        self.edges = stop
        return made

    def norm(self, name: str, module: nn.Module, wire: Tensor | None) -> Tensor:
        """A batch norm belongs to the nodes it norms."""
        if wire is None or bool((wire < 0).any()) or self.normed & set(wire.tolist()):
            raise _unfit(name, module, "what it norms is not what one layer has just made")
        self.normed |= set(wire.tolist())
        self.norms.append((name, wire))
        return wire

    def sum(self, first: Any, second: Any) -> Any:
        """Where two branches meet, the nodes made last stand for both; edges lead to them from the others."""
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return first if isinstance(first, Tensor) else second
        if len(first) != len(second):
            raise GraphError(
                f"{len(first)} and {len(second)} channels were to be added", "they are not one each", "Leave it dense."
            )
        main, other = (first, second) if int(first.max()) >= int(second.max()) else (second, first)
        wire = torch.where(main < 0, other, main)
        there = (main >= 0) & (other >= 0) & (main != other)
        self.short.append((other[there], main[there]))
        return wire


def _unfit(name: str, module: nn.Module, why: str) -> GraphError:
    return GraphError(
        f"{name} ({type(module).__name__}) was to become part of a graph",
        why,
        "A graph takes 2-d convolutions, linear layers, batch norms, shortcuts and poolings: give a network of these.",
    )


def wiring(model: nn.Module, side: int = 3) -> Wiring:
    """The graph of a network. Raises GraphError, naming it, for a module or an operation that has no place in one."""
    try:
        traced = fx.symbolic_trace(model)
    except Exception as error:  # whatever a forward of any kind raises when given no values
        raise GraphError(
            f"{type(model).__name__} was to become a graph",
            f"its forward cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "Give a network of convolutions, linear layers, batch norms and shortcuts.",
        ) from error
    w = _Wirer(model, side)
    seen: dict[fx.Node, Any] = {}
    for step in traced.graph.nodes:
        seen[step] = _follow(w, step, seen)
    starts, ends = zip(*w.short, strict=True) if w.short else ((), ())
    extra = sum(len(s) for s in starts)
    return Wiring(
        w.count,
        torch.cat([*w.source, *starts]),
        torch.cat([*w.target, *ends]),
        tuple(w.layers),
        tuple(w.norms),
        slice(w.edges, w.edges + extra),
        side,
    )


def _follow(w: _Wirer, step: fx.Node, seen: Mapping[fx.Node, Any]) -> Any:
    """The nodes that stand for the channels of one step's answer; None for the network's inputs."""
    given: list[Any] = [seen[a] if isinstance(a, fx.Node) else a for a in step.args]
    first: Any = given[0] if given else None
    if step.op in ("placeholder", "get_attr"):
        return None
    if step.op == "output":
        return first
    if step.op == "call_module":
        name, module = str(step.target), w.model.get_submodule(str(step.target))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            return w.layer(name, module, first)
        if isinstance(module, _BatchNorm):
            return w.norm(name, module, first)
        if isinstance(module, SAME):
            return first
        raise _unfit(name, module, "it has no place in a graph")
    name = step.target if isinstance(step.target, str) else getattr(step.target, "__name__", str(step.target))
    if name in SAME_CALLS:
        return first
    if name in ("add", "iadd", "add_") or step.target in (operator.add, operator.iadd, torch.add):
        return w.sum(first, given[1])
    if name == "cat" and isinstance(step.args[0], (list, tuple)):
        return torch.cat([seen[a] for a in step.args[0]])  # type: ignore[index]
    if name == "getitem":
        where: Any = step.args[1]
        if not isinstance(first, Tensor):
            return None  # of a shape
        if isinstance(where, tuple) and all(isinstance(s, slice) for s in where[:2]):
            return first[where[1]] if len(where) > 1 else first
    if name in ("size", "getattr", "dim"):
        return None
    if name == "pad" and isinstance(first, Tensor):
        amount: Any = step.args[1]
        before, after = amount[4:6] if len(amount) > 4 else (0, 0)
        return F.pad(first, (before, after), value=-1)
    raise GraphError(
        f"{type(w.model).__name__} was to become a graph",
        f"its forward calls {name}, which has no place in one",
        "Give a network of convolutions, linear layers, batch norms, sums and poolings.",
    )


NORM = ("weight", "bias", "running_mean", "running_var")


def graph_of(wires: Wiring, named: Tensors) -> tuple[Tensor, Tensor]:
    """A network's numbers as those of nodes [nodes, 5] and edges [edges, taps]."""
    like = named[f"{wires.layers[0].name}.weight"].detach()
    nodes = like.new_tensor(PLAIN).repeat(wires.nodes, 1)
    edges = like.new_zeros(len(wires.source), wires.taps)
    for layer in wires.layers:
        weight = named[f"{layer.name}.weight"].detach()
        edges[layer.edges, layer.places] = _flat(weight)
        if (bias := named.get(f"{layer.name}.bias")) is not None:
            nodes[layer.nodes, 4] = bias.detach()
    for name, which in wires.norms:
        for column, key in enumerate(NORM):
            if (value := named.get(f"{name}.{key}")) is not None:
                nodes[which, column] = value.detach()
    edges[wires.shortcuts, wires.taps // 2] = 1.0
    return nodes, edges


def _flat(weight: Tensor) -> Tensor:
    return weight.reshape(weight.shape[0] * weight.shape[1], -1)


def network_of(wires: Wiring, nodes: Tensor, edges: Tensor, named: Tensors) -> dict[str, Tensor]:
    """Back from a graph: everything that is learnt, by name, as `graph_of` had read it."""
    found: dict[str, Tensor] = {}
    for layer in wires.layers:
        found[f"{layer.name}.weight"] = edges[layer.edges][:, layer.places].reshape(layer.shape)
        if f"{layer.name}.bias" in named:
            found[f"{layer.name}.bias"] = nodes[layer.nodes, 4]
    for name, which in wires.norms:
        for column, key in enumerate(NORM[:2]):
            if f"{name}.{key}" in named:
                found[f"{name}.{key}"] = nodes[which, column]
    return found
