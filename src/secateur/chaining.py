"""Where a traced model's packed layers follow one another, and the chains that they then run as."""

import copy
import inspect
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from secateur.formats.chain import ConvChain, Link
from secateur.formats.conv import ANY, SparseConv2d
from secateur.formats.decoder import Decoder, parts_of
from secateur.formats.linear import SparseLinear
from secateur.formats.linear_chain import LinearChain
from secateur.formats.planned import RELU
from secateur.formats.program import Gate, Product

_BOUNDS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU), RELU),
    **dict.fromkeys((F.relu6, nn.ReLU6), (0.0, 6.0)),
}
_PRODUCTS = {operator.mul, torch.mul, "mul"}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in a model for inference


def chained(model: nn.Module) -> nn.Module:
    """A model whose packed layers run as chains, sums, bounds and gates between them included; it shares all with it.

    The model itself where it has none, or cannot be traced: what comes back is a GraphModule otherwise, or the chain
    where that is all there is.
    """
    kinds = {type(module) for module in model.modules()}
    # What only multiplies may be called in several ways, of which a trace knows one.
    if SparseConv2d not in kinds and not (SparseLinear in kinds and _takes_one(model)):
        return model
    traced = _traced(model)
    if traced is None:
        return model
    graph, made = traced
    if not made:
        return model
    if _is_all(graph):
        return _alone(graph, made, model)
    found = fx.GraphModule({**_targets(model, graph, made), **made}, graph, type(model).__name__)
    found.training = model.training
    return found


def chained_within(model: nn.Module) -> nn.Module:
    """A model in which modules that are nothing but a chain of packed linear layers are one; it shares all with it.

    For models that cannot be traced, such as language models: of each block of these the gated part can.
    """
    instead: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        layers = sum(type(child) is SparseLinear for child in module.children())
        if module is model or layers < 2 or has_hooks(module) or not _takes_one(module):
            continue
        traced = _traced(module)
        if traced is not None and traced[1] and _is_all(traced[0]):
            instead[module] = _alone(*traced, module)
    return sharing(model, instead) if instead else model


def decoding(model: nn.Module) -> nn.Module:
    """A model in which the blocks of a decoder are one module, which runs them in one call; it shares all with it.

    The model itself where it has none, or not all linear layers of them are packed (`formats.decoder`).
    """
    if not any(_blocks_of(module) for module in model.modules()):
        return model
    made = sharing(model, {})  # not in the model itself: its blocks have to read the configuration of the copy
    for module in list(made.modules()):
        for name, blocks in _blocks_of(module).items():
            setattr(module, name, nn.ModuleList([Decoder(blocks).train(module.training)]))
    return made


def _blocks_of(module: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists of a module, by name, that hold nothing but blocks of packed layers."""
    if isinstance(module, Decoder):
        return {}
    lists = {name: [*child] for name, child in module.named_children() if type(child) is nn.ModuleList}
    return {name: found for name, found in lists.items() if found and all(parts_of(block) for block in found)}


def sharing(model: nn.Module, instead: Mapping[Any, nn.Module]) -> nn.Module:
    """A model that shares everything with another but the layers that stand in for its own."""
    # A copy in which nothing is copied: all parameters, buffers and the layers that go are taken as they are.
    same: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**same, **{id(old): new for old, new in instead.items()}})


def _is_all(graph: fx.Graph) -> bool:
    """Whether one call of one value is all that a graph with a chain does."""
    nodes = list(graph.nodes)
    alone = [node.op for node in nodes] == ["placeholder", "call_module", "output"]
    return alone and (nodes[1].args, nodes[2].args) == ((nodes[0],), (nodes[1],)) and not nodes[0].args


def _alone(graph: fx.Graph, made: Mapping[str, ConvChain | LinearChain], model: nn.Module) -> nn.Module:
    """The chain that is all of a model, called as it was."""
    chain = next(iter(made.values()))
    chain.names = (str(next(iter(graph.nodes)).target),)
    return chain.train(model.training)


def _takes_one(module: nn.Module) -> bool:
    """Whether a module is called with one value, and cannot be with more."""
    try:
        given = list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):
        return False
    return len(given) == 1 and given[0].kind in (given[0].POSITIONAL_ONLY, given[0].POSITIONAL_OR_KEYWORD)


def has_hooks(module: nn.Module) -> bool:
    """Whether something else happens where a module is called; torch's masks, which are in the weight, do not count."""
    before = [hook for hook in module._forward_pre_hooks.values() if not isinstance(hook, BasePruningMethod)]
    return bool(module._forward_hooks or before or module._backward_hooks or module._backward_pre_hooks)


def _traced(model: nn.Module) -> tuple[fx.Graph, dict[str, ConvChain | LinearChain]] | None:
    """The graph of a model, with chains in it, and the chains by their names; None where it cannot be traced."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model's own code raises when it meets no numbers
        return None
    _without_nothing(model, graph)
    if any(_changes_what_others_read(model, node) for node in graph.nodes):
        return None  # the order of what happens counts there, and not only what reads what
    root = dict(model.named_modules())
    made: dict[str, ConvChain | LinearChain] = {}
    now: dict[fx.Node, fx.Node] = {}  # what chains before have put in place of a node

    def named(chain: ConvChain | LinearChain) -> str:
        name = f"chain_{len(made)}"
        while name in root:
            name += "_"
        made[name] = chain
        return name

    steps = _linear(model, graph)
    for convolutions in _chains(graph, _convolutions(model, graph)):
        _put(model, graph, convolutions, named, now)
    for step in steps:
        step.now(now)
    for linear in _chains(graph, steps):
        _put_linear(model, graph, linear, named, now)
    if made:
        _in_order(graph)
    return graph, made


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, path: str) -> bool:
        """Packed layers are whole, as those of torch are."""
        return type(module).__module__.startswith("secateur.formats.") or super().is_leaf_module(module, path)


@dataclass
class _Found:
    """One convolution with what follows it."""

    conv: fx.Node
    source: fx.Node
    last: fx.Node  # whose value the link gives
    more: fx.Node | None = None
    step: int = 1
    around: tuple[int, int] = (0, 0)
    between: tuple[float, float] = ANY

    @property
    def nodes(self) -> list[fx.Node]:
        """The convolution, the sum and the bounds."""
        return _from_to(self.conv, self.last)

    @property
    def reads(self) -> list[fx.Node]:
        """What it convolves, and what it adds."""
        return [self.source] if self.more is None else [self.source, self.more]

    def now(self, instead: Mapping[fx.Node, fx.Node]) -> None:
        """Reads what stands in place of a node."""
        self.source = instead.get(self.source, self.source)
        self.more = None if self.more is None else instead.get(self.more, self.more)


@dataclass
class _Step:
    """One linear layer with the bounds that follow it, or a gate of what such layers give."""

    first: fx.Node
    source: fx.Node
    last: fx.Node
    times: fx.Node | None = None
    between: tuple[float, float] = ANY

    @property
    def nodes(self) -> list[fx.Node]:
        """The layer and the bounds, or SiLU and the product with it."""
        return _from_to(self.first, self.last)

    @property
    def reads(self) -> list[fx.Node]:
        """What it multiplies, or what a gate does."""
        return [self.source] if self.times is None else [self.source, self.times]

    def now(self, instead: Mapping[fx.Node, fx.Node]) -> None:
        """Reads what stands in place of a node."""
        self.source = instead.get(self.source, self.source)
        self.times = None if self.times is None else instead.get(self.times, self.times)


_Link = TypeVar("_Link", _Found, _Step)


@dataclass
class _Chain(Generic[_Link]):
    links: list[_Link]

    @property
    def inside(self) -> dict[fx.Node, int]:
        """What each link gives, by its number."""
        return {link.last: i for i, link in enumerate(self.links)}

    @property
    def mine(self) -> set[fx.Node]:
        """All nodes of all links."""
        return {node for link in self.links for node in link.nodes}

    @property
    def inputs(self) -> list[fx.Node]:
        """What comes from outside."""
        return list(dict.fromkeys(node for link in self.links for node in link.reads if node not in self.inside))

    @property
    def given(self) -> list[fx.Node]:
        """What is read outside."""
        mine = self.mine
        return [link.last for link in self.links if any(user not in mine for user in link.last.users)]

    @property
    def number(self) -> dict[fx.Node, int]:
        """Of each value: the inputs, and then what each link gives."""
        inputs = self.inputs
        return {n: i for i, n in enumerate(inputs)} | {n: i + len(inputs) for n, i in self.inside.items()}


def _changes_what_others_read(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node writes to a value that is read elsewhere, or may be a part of one that is."""
    if node.target is operator.setitem or node.kwargs.get("out") is not None:
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module":
        writes = bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    else:
        writes = bool(node.kwargs.get("inplace")) or node.target in _IN_PLACE
        writes |= node.op in ("call_method", "call_function") and name.endswith("_") and not name.endswith("__")
    if not writes or not node.args or not isinstance(node.args[0], fx.Node):
        return writes
    written = node.args[0]
    of_module = written.op == "call_module" and _what(model, written) not in (nn.Flatten, nn.Unflatten)
    fresh = of_module or written.target in _SUMS or written.target in _BOUNDS
    return not fresh or len(written.users) > 1


def _without_nothing(model: nn.Module, graph: fx.Graph) -> None:
    """Takes out the modules that hand on what they are given."""
    for node in list(graph.nodes):
        if node.op == "call_module" and isinstance(model.get_submodule(node.target), _NOTHING) and len(node.args) == 1:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)


def _chains(graph: fx.Graph, links: Sequence[_Link]) -> list[_Chain[_Link]]:
    """Links in order, one chain as long as nothing that a link reads needs what the chain gives, from outside it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[_Chain[_Link]] = []
    chain, after = _Chain[_Link]([]), set[fx.Node]()
    for link in sorted(links, key=lambda link: order[link.last]):
        if any(node in after for node in link.reads if node not in chain.inside):
            found.append(chain)
            chain = _Chain[_Link]([])
        chain.links.append(link)
        after = _after(graph, set(chain.inside), chain.mine)
    found.append(chain)
    return [chain for chain in found if len(chain.mine) > 1]  # a layer alone is called as it is


def _convolutions(model: nn.Module, graph: fx.Graph) -> list[_Found]:
    order = {node: i for i, node in enumerate(graph.nodes)}
    return [
        _link(model, graph, node, order)
        for node in list(graph.nodes)
        if node.op == "call_module" and _what(model, node) is SparseConv2d and len(node.args) == 1
    ]


def _linear(model: nn.Module, graph: fx.Graph) -> list[_Step]:
    """Packed linear layers, and gates of what they give."""
    found: list[_Step] = []
    for node in graph.nodes:
        if node.op == "call_module" and _what(model, node) is SparseLinear and len(node.args) == 1 and not node.kwargs:
            step = _Step(node, node.args[0], node)
            follows = _only_user(node)
            bounds = None if follows is None else _BOUNDS.get(_what(model, follows))
            if follows is not None and bounds is not None:
                step.between, step.last = bounds, follows
            found.append(step)
    given = {step.last for step in found}
    for node in graph.nodes:
        if _is_silu(model, node) and node.args[0] in given:
            step = _Step(node, node.args[0], node)
            follows = _only_user(node)
            if follows is not None and _what(model, follows) in _PRODUCTS and len(follows.args) == 2:
                one, other = follows.args
                times = other if one is node else one
                if isinstance(times, fx.Node) and times in given and not follows.kwargs:
                    step.times, step.last = times, follows
            found.append(step)
    return found


def _is_silu(model: nn.Module, node: fx.Node) -> bool:
    if len(node.args) != 1:
        return False
    if node.op == "call_module" and _what(model, node) is nn.SiLU:
        return not model.get_submodule(str(node.target)).inplace and not node.kwargs
    return node.target is F.silu and node.kwargs in ({}, {"inplace": False})


def _link(model: nn.Module, graph: fx.Graph, conv: fx.Node, order: dict[fx.Node, int]) -> _Found:
    link = _Found(conv, conv.args[0], conv)  # type: ignore[arg-type]  # a call of a module has a node
    follows = _only_user(link.last)
    if follows is not None and _what(model, follows) in _SUMS and len(follows.args) == 2 and not follows.kwargs:
        one, other = follows.args
        more = other if one is link.last else one
        if isinstance(more, fx.Node) and more is not link.last and (one is link.last or not _in_place(follows)):
            late = order[more] > order[conv]
            if not (late and _what(model, more) is SparseConv2d and _only_user(more) is follows):
                link.more, link.step, link.around = _sampled(more)
                link.last = follows
                if link.more is not more:  # nobody else reads the shortcut, and a chain reads what it is made of
                    follows.replace_input_with(more, link.more)
                    made_of: Any = more.args[0]
                    graph.erase_node(more)
                    graph.erase_node(made_of)
                follows = _only_user(follows)
    bounds = _BOUNDS.get(_what(model, follows)) if follows is not None else None
    if follows is not None and bounds is not None:
        link.between, link.last = bounds, follows
    return link


def _sampled(node: fx.Node) -> tuple[fx.Node, int, tuple[int, int]]:
    """What is added, and how it is sampled: the shortcut without weights of a block that halves its pictures.

    That is x[:, :, ::n, ::n] with channels of zeros before and behind; anything else is added as it is.
    """
    as_it_is = node, 1, (0, 0)
    if node.target is not F.pad or len(node.args) != 2 or _only_user(node) is None:
        return as_it_is
    inner: Any
    sides: Any
    inner, sides = node.args
    constant = node.kwargs.get("mode", "constant") == "constant" and not node.kwargs.get("value")
    if not constant or not isinstance(inner, fx.Node) or inner.target is not operator.getitem or not _only_user(inner):
        return as_it_is
    before: Any
    at: Any
    before, at = inner.args
    every, numbers = slice(None), isinstance(sides, tuple) and all(isinstance(n, int) for n in sides)
    if not numbers or len(sides) != 6 or sides[:4] != (0, 0, 0, 0) or min(sides) < 0:
        return as_it_is
    if not isinstance(at, tuple) or len(at) != 4 or at[:2] != (every, every) or at[2] != at[3]:
        return as_it_is
    step = at[2].step if isinstance(at[2], slice) and (at[2].start, at[2].stop) == (None, None) else None
    if not isinstance(step, int) or not isinstance(before, fx.Node):
        return as_it_is
    return before, step, (sides[4], sides[5])


def _ending(model: nn.Module, value: fx.Node) -> tuple[list[fx.Node], nn.Linear] | None:
    """The nodes by which a network ends, and its last layer: means of channels, flattened, and a linear layer."""
    pool = _only_user(value)
    if pool is None or not pool.args or pool.args[0] is not value:
        return None
    nodes, what = [pool], _what(model, pool)
    if what in (torch.mean, "mean"):
        named = dict(zip(("dim", "keepdim"), pool.args[1:], strict=False)) | pool.kwargs
        over = named.get("dim")
        if (
            not isinstance(over, (tuple, list))
            or {n % 4 for n in over} != {2, 3}
            or not named.keys() <= {"dim", "keepdim"}
        ):
            return None
        kept = bool(named.get("keepdim", False))
    elif what is nn.AdaptiveAvgPool2d:
        kept = model.get_submodule(str(pool.target)).output_size in (1, (1, 1))
    else:
        kept = what is F.adaptive_avg_pool2d and pool.args[1:] in ((1,), ((1, 1),)) and not pool.kwargs
    if what not in (torch.mean, "mean") and not kept:
        return None
    flat = _only_user(pool)
    if kept:
        if flat is None or not _flattens(model, flat):
            return None
        nodes.append(flat)
        flat = _only_user(flat)
    if flat is None or _what(model, flat) is not nn.Linear or len(flat.args) != 1 or flat.kwargs:
        return None
    head = model.get_submodule(str(flat.target))
    assert isinstance(head, nn.Linear)
    return [*nodes, flat], head


def _flattens(model: nn.Module, node: fx.Node) -> bool:
    """Whether a node makes one axis of all but the first."""
    if _what(model, node) is nn.Flatten:
        module: Any = model.get_submodule(str(node.target))
        return bool((module.start_dim, module.end_dim) == (1, -1))
    return _what(model, node) in (torch.flatten, "flatten") and node.args[1:] in ((1,), (1, -1)) and not node.kwargs


def _what(model: nn.Module, node: fx.Node) -> Any:
    return type(model.get_submodule(str(node.target))) if node.op == "call_module" else node.target


def _in_place(node: fx.Node) -> bool:
    return node.target in (operator.iadd, "add_")


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _from_to(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Nodes of which each is all that reads the one before."""
    found, node = [first], first
    while node is not last:
        node = next(iter(node.users))
        found.append(node)
    return found


def _after(graph: fx.Graph, inside: set[fx.Node], mine: set[fx.Node]) -> set[fx.Node]:
    """What is outside a chain and needs, in the end, what it gives."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in mine and any(n in inside or n in found for n in node.all_input_nodes):
            found.add(node)
    return found


def _put(
    model: nn.Module,
    graph: fx.Graph,
    chain: _Chain[_Found],
    named: Callable[[ConvChain | LinearChain], str],
    now: dict[fx.Node, fx.Node],
) -> None:
    """A call of a chain in place of its links."""
    for link in chain.links:
        link.now(now)
    number, given = chain.number, chain.given
    layers = [model.get_submodule(str(link.conv.target)) for link in chain.links]
    links = [
        Link(
            number[link.source], None if link.more is None else number[link.more], link.step, link.around, link.between
        )
        for link in chain.links
    ]
    last = chain.links[-1].last
    end = _ending(model, last)
    head = None if end is None else end[1]
    given_back = [number[node] for node in given]
    made = ConvChain(layers, links, len(chain.inputs), given_back, head)  # type: ignore[arg-type]  # found as Module
    values = _call(graph, named(made), last, chain.inputs, given)
    if end is not None:
        end[0][-1].replace_all_uses_with(values.pop(last))
        for each in reversed(end[0]):
            graph.erase_node(each)
    _instead(graph, chain, values, now)


def _put_linear(
    model: nn.Module,
    graph: fx.Graph,
    chain: _Chain[_Step],
    named: Callable[[ConvChain | LinearChain], str],
    now: dict[fx.Node, fx.Node],
) -> None:
    """The same of linear layers."""
    for step in chain.links:
        step.now(now)
    number, given = chain.number, chain.given
    layers: list[nn.Module] = []
    steps: list[Product | Gate] = []
    for step in chain.links:
        source, module = number[step.source], _what(model, step.first)
        if module is SparseLinear:
            layers.append(model.get_submodule(str(step.first.target)))
            steps.append(Product(source, step.between))
        else:
            steps.append(Gate(source, None if step.times is None else number[step.times]))
    given_back = [number[node] for node in given]
    made = LinearChain(layers, steps, len(chain.inputs), given_back)  # type: ignore[arg-type]  # found as Module
    _instead(graph, chain, _call(graph, named(made), chain.links[-1].last, chain.inputs, given), now)


def _call(
    graph: fx.Graph, name: str, after: fx.Node, inputs: Sequence[fx.Node], given: Sequence[fx.Node]
) -> dict[fx.Node, fx.Node]:
    """A call of a module behind a node, and where each value that it gives back is."""
    with graph.inserting_after(after):
        call = graph.call_module(name, tuple(inputs))
    if len(given) == 1:
        return {given[0]: call}
    values, at = {}, call
    for i, node in enumerate(given):
        with graph.inserting_after(at):
            values[node] = at = graph.call_function(operator.getitem, (call, i))
    return values


def _instead(
    graph: fx.Graph, chain: _Chain[_Link], values: Mapping[fx.Node, fx.Node], now: dict[fx.Node, fx.Node]
) -> None:
    """What a chain gives back in place of what its links gave, which go."""
    mine = chain.mine
    nodes = [node for link in chain.links for node in link.nodes]
    for node, value in values.items():
        now[node] = value
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in mine)
    for node in reversed(nodes):
        graph.erase_node(node)


def _in_order(graph: fx.Graph) -> None:
    """Every node after what it reads: a chain stands where its last link stood, and some that read it before that."""
    ready: set[fx.Node] = set()
    left: Sequence[fx.Node] = list(graph.nodes)
    last = next(iter(graph.nodes))
    while left:
        later: list[fx.Node] = []
        for node in left:
            waits = node.op == "output" and len(left) > 1
            if not waits and all(n in ready for n in node.all_input_nodes):
                ready.add(node)
                if node is not last:
                    last.append(node)
                last = node
            else:
                later.append(node)
        assert len(later) < len(left), "a chain needs what needs it"
        left = later


def _targets(model: nn.Module, graph: fx.Graph, made: Mapping[str, nn.Module]) -> dict[str, Any]:
    """What the nodes of a graph name of a model."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in made:
            found[str(node.target)] = model.get_submodule(str(node.target))
        elif node.op == "get_attr":
            found[str(node.target)] = operator.attrgetter(str(node.target))(model)
    return found
