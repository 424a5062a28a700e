"""Where a traced model's packed convolutions follow one another, and the chains that they then run as."""

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from secateur.formats.chain import RELU, ConvChain, Link
from secateur.formats.conv import ANY, SparseConv2d

_BOUNDS: dict[Any, tuple[float, float]] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU), RELU),
    **dict.fromkeys((F.relu6, nn.ReLU6), (0.0, 6.0)),
}
_SUMS = {operator.add, operator.iadd, torch.add, "add", "add_"}
_IN_PLACE = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout2d)  # in a model for inference


def chained(model: nn.Module) -> nn.Module:
    """A model whose packed convolutions run as chains, sums and ReLUs between them included; it shares all with it.

    The model itself where it has none, or cannot be traced: what comes back is a GraphModule otherwise.
    """
    if not any(isinstance(module, SparseConv2d) for module in model.modules()):
        return model
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a model's own code raises when it meets no numbers
        return model
    _without_nothing(model, graph)
    if any(_changes_what_others_read(model, node) for node in graph.nodes):
        return model  # the order of what happens counts there, and not only what reads what
    chains = _chains(model, graph)
    if not chains:
        return model
    root = dict(model.named_modules())
    made: dict[str, nn.Module] = {}
    now: dict[fx.Node, fx.Node] = {}  # what chains before have put in place of a node
    for number, chain in enumerate(chains):
        name = f"chain_{number}"
        while name in root:
            name += "_"
        made[name] = _put(model, graph, chain, name, now)
    _in_order(graph)
    found = fx.GraphModule({**_targets(model, graph, made), **made}, graph, type(model).__name__)
    found.training = model.training
    return found


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


@dataclass
class _Chain:
    links: list[_Found] = field(default_factory=list)


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


def _chains(model: nn.Module, graph: fx.Graph) -> list[_Chain]:
    """Links in order, one chain as long as nothing that a link reads needs what the chain gives, from outside it."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    found: list[_Chain] = []
    links = []
    for node in list(graph.nodes):
        if node.op == "call_module" and _what(model, node) is SparseConv2d and len(node.args) == 1:
            link = _link(model, graph, node, order)
            links.append(link)
    links.sort(key=lambda link: order[link.last])
    chain, inside, after = _Chain(), set[fx.Node](), set[fx.Node]()
    for link in links:
        needs = [n for n in (link.source, link.more) if n is not None and n not in inside]
        if chain.links and any(n in after for n in needs):
            found.append(chain)
            chain, inside = _Chain(), set()
        chain.links.append(link)
        inside.add(link.last)
        mine = {n for each in chain.links for n in _nodes(each)}
        after = _after(graph, inside, mine)
    found.append(chain)
    return [c for c in found if len(c.links) > 1 or any(n.more is not None or n.between != ANY for n in c.links)]


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


def _nodes(link: _Found) -> list[fx.Node]:
    """The convolution, the sum and the bounds."""
    found, node = [link.conv], link.conv
    while node is not link.last:
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


def _put(model: nn.Module, graph: fx.Graph, chain: _Chain, name: str, now: dict[fx.Node, fx.Node]) -> ConvChain:
    """A call of a chain in place of its links."""
    for link in chain.links:
        link.source = now.get(link.source, link.source)
        link.more = now.get(link.more, link.more) if link.more is not None else None
    inside = {link.last: i for i, link in enumerate(chain.links)}
    mine = {node for link in chain.links for node in _nodes(link)}
    reads = [n for link in chain.links for n in (link.source, link.more) if n is not None and n not in inside]
    inputs = list(dict.fromkeys(reads))
    number = {node: i for i, node in enumerate(inputs)} | {n: i + len(inputs) for n, i in inside.items()}
    given = [link.last for link in chain.links if any(user not in mine for user in link.last.users)]
    layers = [model.get_submodule(str(link.conv.target)) for link in chain.links]
    links = [
        Link(
            number[link.source], None if link.more is None else number[link.more], link.step, link.around, link.between
        )
        for link in chain.links
    ]
    end = _ending(model, chain.links[-1].last)
    head = None if end is None else end[1]
    given_back = [number[node] for node in given]
    made = ConvChain(layers, links, len(inputs), given_back, head)  # type: ignore[arg-type]  # found as Module
    with graph.inserting_after(chain.links[-1].last):
        call = graph.call_module(name, tuple(inputs))
    at = call
    for i, node in enumerate(given):
        value = call
        if len(given) > 1:
            with graph.inserting_after(at):
                value = at = graph.call_function(operator.getitem, (call, i))
        if end is not None and node is chain.links[-1].last:
            end[0][-1].replace_all_uses_with(value)
            for each in reversed(end[0]):
                graph.erase_node(each)
            continue
        now[node] = value
        node.replace_all_uses_with(value, delete_user_cb=lambda user: user not in mine)
    for node in reversed([n for link in chain.links for n in _nodes(link)]):
        graph.erase_node(node)
    return made


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


def _targets(model: nn.Module, graph: fx.Graph, made: dict[str, nn.Module]) -> dict[str, Any]:
    """What the nodes of a graph name of a model."""
    found: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "call_module" and node.target not in made:
            found[str(node.target)] = model.get_submodule(str(node.target))
        elif node.op == "get_attr":
            found[str(node.target)] = operator.attrgetter(str(node.target))(model)
    return found
