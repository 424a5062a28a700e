"""A network that reads networks makes one easier to prune: train it on a few, then send any of their kind through it.

Liu, Wang, Zhang. "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning." 2025.
arXiv:2506.12041. (Not the MetaPruning of 2019, which generates weights for given widths.) A network is a graph: a node
for each channel of each layer, with its norm and bias, an edge for each kernel from one channel to another, and an edge
of a lone 1 where a shortcut leads past layers. The metanetwork is a graph network that changes nodes and edges, and
what comes out is a network of the same shape. It is trained so that this

    computes well           cross-entropy over training batches, nothing else being trained
    has channels to spare   a pull towards zero on whole groups, gamma = alpha^((I_max - I) / (I_max - I_min)) times
                            the weights, hardest on groups of the smallest norm I

and the gradient of both goes back through the new weights into the metanetwork. Used, it is a step before ordinary
pruning: theta -> metanetwork -> fine-tune -> prune groups by their norm, a few at a time -> fine-tune.
"""

import copy
import json
import operator
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import isfinite
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from secateur import stored
from secateur.axes.budgets import Terms
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold, LearningRate
from secateur.edit import Edit, Remove, Update, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError
from secateur.graph import couple, left_of, removals
from secateur.method import Card, Method, check_sparsity
from secateur.outcome import Outcome, count_flops
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task, forever, generator, quality
from secateur.train import History, fit, seeded

# A network as a graph

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


# The metanetwork


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


# What it is trained for


def group_norms(site: Site, named: Tensors) -> Tensor:
    """I = the root of the mean, over a group's tensors, of what they say of each unit in squares; the largest is 1.

    Matrices, kernels and the scales of norms count; biases do not.
    """
    parts = [part for part in site.parts if len(part.shape) > 1 or part.name.endswith("weight")]
    squares = [
        Site(site.name, site.kind, site.shape, (part,)).gather({part.name: named[part.name].detach().square()})
        for part in parts
    ]
    mean = torch.stack(squares).mean(0)
    return (mean / mean.max().clamp(min=1e-30)).sqrt()


@runtime_checkable
class Pull(Protocol):
    """What draws new weights to where they can be pruned: a gradient, without a loss of its own."""

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """By tensor name, for those that are drawn."""
        ...


@dataclass(frozen=True)
class Grouped:
    """Groups as a whole, the weakest hardest: gamma * w with gamma from 1 to alpha."""

    alpha: float = 16.0

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """See Pull. Groups that are all of one norm are left alone: none is weaker."""
        found: dict[str, Tensor] = {}
        for site in sites:
            norm = group_norms(site, named)
            span = norm.max() - norm.min()
            if float(span) <= 1e-12:
                continue
            gamma = self.alpha ** ((norm.max() - norm) / span)
            for part in site.parts:
                if part.name in named and (len(part.shape) > 1 or part.name.endswith("weight")):
                    value = part.read(named).detach()
                    pull = part.expand(gamma.to(value), nobody=0.0) * value
                    found[part.name] = found[part.name] + pull if part.name in found else pull
        return found


@dataclass(frozen=True)
class Single:
    """Every weight of a matrix or kernel by its sign: for pruning single weights, in any pattern."""

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """See Pull."""
        return {name: value.detach().sign() for name, value in named.items() if value.dim() > 1}


class _Called(nn.Module):
    """A network called with other tensors than its own."""

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, dict(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.given, args, kwargs)


def meta_gradient(
    metanetwork: Metanetwork,
    wires: Wiring,
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    batches: Iterable[Batch],
    pull: Pull,
    strength: float,
) -> float:
    """Give the metanetwork the gradient of one network's loss and pull; the loss, a mean over the batches.

    The network itself stays as it is, its norms in evaluation mode.
    """
    changed = metanetwork.changed(wires, tensors(model))
    leaves = {name: value.detach().requires_grad_() for name, value in changed.items()}
    called, held = _Called(model.eval(), leaves), list(batches)
    total = 0.0
    for batch in held:  # one after the other, so that one batch's activations are in memory
        loss = task.loss(called, batch) / len(held)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    gradients = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for name, value in pull.gradients(sites, {**tensors(model), **{k: v.detach() for k, v in leaves.items()}}).items():
        if name in gradients:
            gradients[name] = gradients[name] + strength * value
    torch.autograd.backward(list(changed.values()), [gradients[name] for name in changed])
    return total


@dataclass(frozen=True, eq=False)
class Candidate:
    """A metanetwork at some point of its training."""

    step: int
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class MetaTraining:
    """How a metanetwork is trained: networks of the kind first, then itself on them, one after the other."""

    networks: int = 4  # that are trained for it to see
    first: int = 400  # optimizer steps of each
    steps: int = 30  # passes over these networks
    batches: int = 4  # training batches of each network's loss
    rate: float = 5e-3  # AdamW's; the authors' is 1e-3, over many more passes
    decay: float = 5e-4
    strength: float = 0.1  # of the pull, beside a mean of the loss; the authors' 10 is beside a sum over 100 batches
    pull: Pull = Grouped()  # single() for pruning single weights
    hidden: int = 16
    layers: int = 3
    step: float = 0.05  # of the change: eta; the authors' is 0.01 to 0.05
    side: int = 3  # of the largest kernel
    looks: int = 6  # points of the training that are tried on held-out data; the best is taken

    def check(self) -> None:
        """Raise SettingError for counts below one and rates that are none."""
        for name in ("networks", "steps", "batches", "hidden", "layers", "side", "looks"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} was given", "one is the least", "Give more.")
        for name in ("rate", "step"):
            if not (isfinite(value := getattr(self, name)) and value > 0):
                raise SettingError(f"{name}={value} was given", "it is above 0", "Leave it out for the default.")
        if self.first < 0 or self.strength < 0 or self.decay < 0 or not self.side % 2:
            raise SettingError(
                f"first={self.first}, strength={self.strength:g}, decay={self.decay:g}, side={self.side} were given",
                "they are 0 or more, and kernels have a middle",
                "Give 0 or more, and an odd side.",
            )

    def seen(self, model: nn.Module, task: Task) -> list[nn.Module]:
        """Networks of a model's architecture from other initial weights, trained on the task."""
        found = []
        for number in range(self.networks):
            other = copy.deepcopy(model)
            reinitialize_(other, generator(task, f"network {number}"))
            fit(other, task, self.first, [LearningRate()], epoch=1000 * (1 + number))
            found.append(other.eval())
        return found

    def train(
        self,
        networks: Sequence[nn.Module],
        task: Task,
        watch: Callable[[int, float], None] | None = None,
    ) -> tuple[Metanetwork, list[Candidate], History]:
        """A metanetwork trained on some networks, and what it was at a few points on the way."""
        self.check()
        history = History()
        with seeded(networks[0], generator(task, "metanetwork").initial_seed()):
            made = Metanetwork(self.hidden, self.layers, self.side, self.step)
        wires = [wiring(network, self.side) for network in networks]
        sites = [couple(network, task.example).of("channel") for network in networks]
        optimizer = torch.optim.AdamW(made.parameters(), self.rate, weight_decay=self.decay)
        data, candidates = forever(task, 500_000), []
        at = {round(self.steps * (look + 1) / self.looks) for look in range(self.looks)}
        for step in range(1, self.steps + 1):
            for wire, network, groups in zip(wires, networks, sites, strict=True):
                batches = [batch for _, _, batch in islice(data, self.batches)]
                optimizer.zero_grad()
                loss = meta_gradient(made, wire, network, groups, task, batches, self.pull, self.strength)
                optimizer.step()
                history.losses.append(loss)
            history.log("loss through the metanetwork", len(history.losses), loss)
            if watch is not None:
                watch(step, loss)
            if step in at:
                candidates.append(Candidate(step, {k: v.clone() for k, v in made.state_dict().items()}))
        return made, candidates, history


@runtime_checkable
class Source(Protocol):
    """Where a metanetwork comes from."""

    def check(self) -> None:
        """Raise SettingError for settings that cannot be."""
        ...

    def training_steps(self) -> int:
        """Batches that go forward and back through a network of the kind before there is one."""
        ...

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """One for networks of a model's kind, and what is to be said of it."""
        ...


@dataclass(frozen=True)
class Trained:
    """Trained for this run, which takes longer than all the rest: worth it for more than one network."""

    training: MetaTraining = field(default_factory=MetaTraining)

    def check(self) -> None:
        """See Source."""
        self.training.check()

    def training_steps(self) -> int:
        """See Source."""
        each = self.training.first + self.training.steps * self.training.batches
        return self.training.networks * each

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """See Source."""
        networks = self.training.seen(model, task)
        made, candidates, history = self.training.train(networks, task)
        step, quality = best(made, candidates, networks[0], task, flops)
        return made, [
            f"the metanetwork was trained on {len(networks)} networks in {len(history.losses)} steps of "
            f"{self.training.batches} batches; that of pass {step} is used: validation {task.metric} {quality:.4g} of "
            f"one of these with {flops:.0%} of its multiply-adds gone, nothing being trained"
        ]


@dataclass(frozen=True)
class Kept:
    """As tools/train_metanetwork.py has written it to a file, which is read once, when settings are checked."""

    path: str = ""

    @cached_property
    def held(self) -> Metanetwork:
        """What the file holds. Raises SettingError where none is named, ModelError where it is no metanetwork."""
        if not self.path:
            raise SettingError("a metanetwork from a file was asked for", "no file is named", "Give kept(path='...').")
        return Metanetwork.load(self.path)

    def check(self) -> None:
        """Raise SettingError or ModelError for a file that is no metanetwork, before any data is read."""
        _ = self.held

    def training_steps(self) -> int:
        """See Source."""
        return 0

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """See Source."""
        return copy.deepcopy(self.held), [f"the metanetwork is that of {self.path}"]


def best(
    metanetwork: Metanetwork, candidates: Sequence[Candidate], model: nn.Module, task: Task, flops: float
) -> tuple[int, float]:
    """Give a metanetwork the state that leaves most of held-out quality in a network, pruned as it comes out.

    Early states leave little to be pruned, late ones have lost accuracy. Batch norms take their statistics anew,
    nothing is trained, and validation data decides. Returns the step of that state, and the quality.
    """
    tried = []
    for candidate in candidates:
        metanetwork.load_state_dict(dict(candidate.state))
        work = copy.deepcopy(model)
        passed_(work, metanetwork)
        prune_groups_(work, task.example, flops)
        recalibrate_(work, some(task, 512))
        tried.append(quality(task, task.measure(work, "val")))
    place = max(range(len(tried)), key=tried.__getitem__)
    metanetwork.load_state_dict(dict(candidates[place].state))
    return candidates[place].step, abs(tried[place])


# Using it


@torch.no_grad()
def passed_(model: nn.Module, metanetwork: Metanetwork) -> list[Edit]:
    """Send a network through a metanetwork: new values for all that is learnt."""
    wires = wiring(model, metanetwork.side)
    named = tensors(model)
    changed = metanetwork.to(next(model.parameters()).device).changed(wires, named)
    return list(apply_(model, [Update(name, value.to(named[name].dtype)) for name, value in changed.items()]))


def prune_groups_(
    model: nn.Module, example: Batch, flops: float, share: float = 0.005, protect: tuple[str, ...] = ()
) -> tuple[list[Remove], list[str]]:
    """Take out the groups of smallest norm, a share of all units at a time, until a fraction of the work is gone.

    Norms are taken anew each time, over what is left. One unit of each site stays. The edits take out at once what went
    bit by bit. Raises BudgetError where that is too much.
    """
    coupling = couple(model, example)
    free = Terms(flops, protect=protect).free(model, coupling.need("channel"))
    sites: Sequence[Site] = [site for site in free if coupling.multiples.get(site.name, 1) == 1]
    before = count_flops(model, example) or 0
    each = max(1, round(share * sum(site.units for site in sites)))
    first, left = sites, before
    whole = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}
    while left > (1 - flops) * before:
        named = tensors(model)
        scores = {site.name: group_norms(site, named) for site in sites}
        ranked = sorted(
            (float(score), name, unit)
            for name, values in scores.items()
            if len(values) > 1
            for unit, score in enumerate(values)
        )
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}
        gone = 0
        for _, name, unit in ranked:
            if gone < each and int(keep[name].sum()) > 1:
                keep[name][unit], gone = False, gone + 1
        if not gone:
            raise BudgetError(
                f"{flops:.1%} of the multiply-adds were to be taken out with whole channels",
                f"{1 - left / before:.1%} can be, one channel being left at each of {len(sites)} sites",
                f"Ask for flops={int(1e3 * (1 - left / before)) / 1e3:g} at most.",
            )
        apply_(model, removals(sites, keep))
        sites = left_of(sites, keep)
        for name, mask in keep.items():
            whole[name][whole[name].nonzero().squeeze(1)[~mask]] = False
        left = count_flops(model, example) or 0
    return removals(first, whole), [
        f"{1 - left / max(before, 1):.1%} of the multiply-adds are gone, {before / max(left, 1):.2f} times fewer; "
        f"{flops:.1%} were asked for",
        *(str(each_) for each_ in coupling.frozen),
    ]


@dataclass(frozen=True, kw_only=True)
class MetaPruning(Method):
    """Send the network through a metanetwork, fine-tune, prune as usual, fine-tune again."""

    source: Source = Trained()  # of the metanetwork: trained(), kept(path='...')
    flops: float = 0.5  # fraction of multiply-adds to be taken out, in [0, 1); 2.3 times fewer, as in the paper: 0.565
    share: float = 0.005  # of all channels that go at a time
    around: Method | None = None  # what prunes in the place of whole groups: magnitude, say, of any pattern
    settle: int = 300  # optimizer steps of fine-tuning between metanetwork and pruning
    tune: int = 300  # and after pruning
    samples: int = 512  # examples on which batch norms take their statistics anew where nothing is fine-tuned
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        32,
        "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning",
        arxiv="2506.12041",
        year=2025,
        when="around training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("mlp", "cnn"),
        axes="graph metanetwork criterion method",
        reports="ResNet-56 on CIFAR-10 at 2.9 times fewer multiply-adds and VGG-19 on CIFAR-100 at 9 times, as good as "
        "or ahead of group norms with a sparse regulariser",
        checked="tests/methods/test_meta_pruning.py::test_what_comes_out_has_weaker_groups_and_is_ahead_where_most_goes",
        differs=(
            "shortcuts with a convolution have nodes of their own, so that a node has one norm; the authors' has two",
            "a shortcut without parameters is its diagonal alone; their edges of zeros between all pairs are left out",
            "the loss is a mean over batches, theirs a sum that grows with their number: a strength of 0.1 comes to "
            "their 10 beside 100 batches",
            "groups that are all of one norm are not pulled: gamma would be 0/0",
            "the point of meta-training is chosen on validation data, among a few; theirs on test data",
            "networks for meta-training are not pruned a little beforehand",
            "the last layers of the metanetwork start at zero: before its training a network comes out as it went in",
            "no vision transformers: a graph here has convolutions and linear layers",
        ),
    )
    tiny: ClassVar = {
        "source": Trained(MetaTraining(networks=1, first=10, steps=2, batches=1, hidden=8, layers=1, looks=1)),
        "flops": 0.3,
        "share": 0.05,
        "settle": 5,
        "tune": 5,
    }

    def check(self) -> None:
        """Raise SettingError for fractions and counts that cannot be."""
        self.source.check()
        check_sparsity(self.flops, "flops")
        if not 0 < self.share <= 1:
            raise SettingError(f"share={self.share} was given", "it is a share in (0, 1]", "Give 0.005.")
        for name in ("settle", "tune", "samples"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} was given", "a count cannot be negative", "Give 0.")
        if self.around is not None:
            self.around.check()

    def training_steps(self) -> int | None:
        """See Method."""
        inside = 0 if self.around is None or "training" not in self.around.card.needs else self.around.training_steps()
        return None if inside is None else self.source.training_steps() + self.settle + self.tune + inside

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Metanetwork, fine-tuning, pruning, fine-tuning."""
        self.check()
        wiring(model, 3)  # a network that is no graph is refused before anything is trained
        metanetwork, notes = self.source.metanetwork(model, task, self.flops)
        edits = passed_(model, metanetwork)
        history = fit(model, task, self.settle, [LearningRate()])
        if not self.settle:
            edits += recalibrate_(model, some(task, self.samples))
        if self.around is None:
            pruned, said = prune_groups_(model, task.example, self.flops, self.share, self.protect)
            edits, notes, rules = edits + list(pruned), notes + said, []
        else:
            done = self.around.run(model, task)
            edits, notes, rules = edits + done.edits, notes + done.notes, [Hold.of(done.edits)]
        if self.tune:
            rest = fit(model, task, self.tune, [LearningRate(), *rules], epoch=history.epoch)
            history = history.then(rest)
        else:
            edits += recalibrate_(model, some(task, self.samples))
        return Outcome(model, edits, history, notes=notes + history.notes)
