"""From a model and an example to positions: torch.export, then one rule an operator."""

import contextlib
import gc
import inspect
import io
import logging
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from secateur.errors import GraphError
from secateur.graph.positions import Ints
from secateur.graph.rules import Traced, Tracing, find
from secateur.site import plain as plain_name
from secateur.site import tensors
from secateur.task import Batch


@dataclass(frozen=True)
class Frozen:
    """Something that was not made removable, and why."""

    what: str  # an operator, "aten.lstm", or a site
    where: str  # the module it is in, "" for the model itself
    why: str

    def __str__(self) -> str:
        return f"frozen: {self.what} at {self.where or 'the model itself'}: {self.why}"


@dataclass(frozen=True, eq=False)
class Network:
    """A followed network: the positions of the model's own tensors, in the order they are first used."""

    tracing: Tracing
    own: Mapping[str, Traced]
    frozen: tuple[Frozen, ...]
    shapes: Mapping[str, Ints] = field(default_factory=dict)  # norms without weights: what their shape is a length of


@contextlib.contextmanager
def plain(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, without a cache of keys and values, as it was afterwards."""
    training = [m for m in model.modules() if m.training]
    found: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    configs = {id(c): c for c in found if hasattr(c, "use_cache")}
    cached = [(c, c.use_cache) for c in configs.values()]
    model.eval()
    try:
        for config, _ in cached:
            config.use_cache = False
        with torch.no_grad():
            yield
    finally:
        for config, value in cached:
            config.use_cache = value
        for module in training:
            module.training = True


def arguments(model: nn.Module, example: Batch) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call; Hugging Face models are asked for no cache."""
    if not isinstance(example.inputs, Mapping):
        return tuple(example.inputs), {}
    given = dict(example.inputs)
    if "use_cache" not in given and "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    return (), given


def answer(model: nn.Module, example: Batch) -> list[Tensor]:
    """Every floating-point tensor of the model's answer."""
    args, kwargs = arguments(model, example)
    found = pytree.tree_leaves(model(*args, **kwargs))
    return [v.detach() for v in found if isinstance(v, Tensor) and v.is_floating_point()]


def follow(model: nn.Module, example: Batch) -> Network:
    """Trace a model and say of every position what lives and dies with it.

    A module inside the model that cannot be traced is kept whole, with what it reads and writes, and named. Raises
    GraphError, with the exporter's reason, for a model whose own forward pass cannot be traced.
    """
    args, kwargs = arguments(model, example)
    held: dict[str, str] = {}
    program = None
    while program is None:
        with plain(model), _quiet(), _held(model, args, kwargs, tuple(held)):
            try:
                program = torch.export.export(model, args, kwargs, strict=False)
            except Exception as error:  # the exporter has no class of its own for what it cannot trace
                first = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
                reason = f"{type(error).__name__}: {first[:300]}{_line(error)}"
                where = culprit(model, error)
                if where and where not in held:
                    held[where] = reason
                    continue
                raise GraphError(
                    f"the coupling of a {type(model).__name__} was asked for",
                    f"torch.export cannot trace its forward pass: {reason}",
                    "Put that step into a module of its own, which is then kept whole while the rest is cut; or use a "
                    "method that masks weights, which needs no trace.",
                ) from error
    run = _Interpreter(model, example.size, held)
    run.run_program(program)
    return Network(run.tracing, run.own, tuple(dict.fromkeys(run.frozen)), run.shapes)


@contextlib.contextmanager
def _held(model: nn.Module, args: Any, kwargs: Any, paths: Collection[str]) -> Iterator[None]:
    """These modules hand on what they gave when the model was run once, through an operator without a rule."""
    given: dict[str, list[Any]] = {path: [] for path in paths}
    hooks = [model.get_submodule(p).register_forward_hook(lambda *_, p=p: given[p].append(_[-1])) for p in paths]
    try:
        if paths:
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()

    def stand_in(path: str) -> Any:
        calls = iter(given[path])

        def forward(*inputs: Any, **more: Any) -> Any:
            read = [v for v in pytree.tree_leaves((inputs, more)) if isinstance(v, Tensor)]
            out = next(calls)
            return pytree.tree_map(lambda v: _hand_on(v, read) if isinstance(v, Tensor) else v, out)

        return forward

    for path in paths:
        model.get_submodule(path).forward = stand_in(path)
    try:
        yield
    finally:
        for path in paths:
            del model.get_submodule(path).forward


@torch.library.custom_op("secateur::held", mutates_args=())
def _hand_on(value: Tensor, read: list[Tensor]) -> Tensor:
    """What a module that is not traced gave, tied to what it read."""
    return value.clone()


@_hand_on.register_fake
def _(value: Tensor, read: list[Tensor]) -> Tensor:
    return torch.empty_like(value)


def culprit(model: nn.Module, error: BaseException) -> str | None:
    """The path of the innermost module of the model in whose own code an error arose, or None."""
    paths = {id(module): path for path, module in model.named_modules()}
    found = None
    frame = error.__traceback__
    while frame is not None:
        here = frame.tb_frame.f_locals.get("self")
        if isinstance(here, nn.Module) and id(here) in paths and not type(here).__module__.startswith("torch.nn."):
            found = paths[id(here)]
        frame = frame.tb_next
    return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No warnings of recurrent layers, which keep their weights in a list too, no listing of a failed trace, no search
    for garbage."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    nowhere = io.StringIO()
    collects = gc.isenabled()
    gc.disable()  # the exporter makes objects by the million and few that are to be collected: an eighth of its time
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if collects:
            gc.enable()


def _line(error: BaseException) -> str:
    """Where in the model's own code an error arose."""
    ours = (str(Path(torch.__file__).parent), str(Path(__file__).parent))
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(ours)]
    return f", at {frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}" if frames else ""


def _shape(value: Any) -> tuple[int, ...]:
    """The lengths of a traced tensor's dimensions; 1 for one that depends on data, which no unit can be along."""
    return tuple(n if isinstance(n, int) else 1 for n in value.shape) if isinstance(value, Tensor) else ()


def _where(node: Any) -> str:
    """The path of the module whose code a node is from; one that is called again has the call's number behind it."""
    stack = node.meta.get("nn_module_stack") or {}
    return list(stack.values())[-1][0].partition("@")[0] if stack else ""


class _Interpreter:
    def __init__(self, model: nn.Module, batch: int, held: Mapping[str, str]) -> None:
        self.held = held  # modules that are kept whole, and why
        self.tracing = Tracing(batch)
        self.own: dict[str, Traced] = {}
        self.frozen: list[Frozen] = []
        self.shapes: dict[str, Ints] = {}
        self._named = tensors(model)
        self._model = model

    def run_program(self, program: Any) -> None:
        signature = program.graph_signature
        given = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        named = {node: plain_name(name) for node, name in given.items()}  # without what parametrises a tensor
        by_tensor: dict[int, Traced] = {}
        inputs: list[Any] = []
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        for node in placeholders:
            value = node.meta.get("val")
            if not isinstance(value, Tensor):
                inputs.append(value)
                continue
            name = named.get(node.name)
            if name is None or not value.is_floating_point():
                inputs.append(Traced(tuple(self.tracing.stay(n) for n in value.shape)))
                continue
            if any(name.startswith(path + ".") for path in self.held):
                inputs.append(Traced(tuple(self.tracing.stay(n) for n in value.shape)))
                continue
            tensor = self._named.get(name)
            if id(tensor) not in by_tensor:
                by_tensor[id(tensor)] = Traced(tuple(self.tracing.positions.fresh(n) for n in value.shape), name)
            inputs.append(by_tensor[id(tensor)])
        # In the order of first use, so that what produces a unit comes before what reads it.
        order = {node: i for i, node in enumerate(program.graph.nodes)}
        first = {n: min((order[u] for u in n.users), default=len(order)) for n in placeholders}
        for _, value in sorted(zip(placeholders, inputs, strict=True), key=lambda pair: first[pair[0]]):
            if isinstance(value, Traced) and value.source is not None:
                self.own.setdefault(value.source, value)
        for out in pytree.tree_leaves(self.run_graph(program.graph_module, inputs)):
            if isinstance(out, Traced):
                self.tracing.freeze(out)

    def run_graph(self, module: Any, inputs: list[Any]) -> Any:
        given = iter(inputs)
        env: dict[Any, Any] = {}
        result: Any = None
        for node in module.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(given)
            elif node.op == "get_attr":
                found: Any = module
                for piece in node.target.split("."):
                    found = getattr(found, piece)
                if isinstance(found, Tensor):
                    found = Traced(tuple(self.tracing.stay(n) for n in found.shape))
                env[node] = found
            elif node.op == "output":
                result = torch.fx.node.map_arg(node.args[0], lambda n: env[n])
            else:
                env[node] = self.call(node, env)
        return result

    def call(self, node: Any, env: dict[Any, Any]) -> Any:
        args = torch.fx.node.map_arg(node.args, lambda n: env[n])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
        if getattr(node.target, "__name__", "") == "getitem":
            return args[0][args[1]]
        value = node.meta.get("val")
        outs = value if isinstance(value, (list, tuple)) else [value]
        name = str(node.target)
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            inner = [i for i, v in enumerate(args) if hasattr(v, "graph")]
            if name.startswith("wrap") and len(inner) == 1:
                return self.run_graph(args[inner[0]], list(args[inner[0] + 1 :]))
        if not any(isinstance(v, Tensor) for v in outs):
            return value
        name = name.removeprefix("aten.").rpartition(".")[0] or name  # without the overload
        touched = [v for v in pytree.tree_leaves((args, kwargs)) if isinstance(v, Traced)]
        shapes = tuple(_shape(v) for v in outs)
        self.tracing.outputs = shapes
        rule = find(name.rpartition(".")[2])
        if rule is not None and (touched or name == "zeros") and hasattr(node.target, "_schema"):
            given = dict(zip((a.name for a in node.target._schema.arguments), args, strict=False)) | kwargs
            conflicts = self.tracing.positions.conflicts
            try:
                found = rule(self.tracing, given)
            except (KeyError, IndexError, AttributeError, ValueError, TypeError) as error:
                return self.give_up(node, name, touched, shapes, value, f"its rule failed: {error}")
            if self.tracing.positions.conflicts != conflicts:
                self.say(node, name, "it splits a dimension where another operator splits it otherwise")
            if name in ("layer_norm", "rms_norm"):
                self.remember(node, given["input"])
            got = found if isinstance(found, list) else [found]
            if found is not None and tuple(v.shape for v in got) == shapes:
                return found
            return self.give_up(node, name, touched, shapes, value, "its rule does not cover this use")
        if name == "secateur.held":
            self.tracing.freeze(*touched)
            path = next((p for p in self.held if p == _where(node)), "")
            kind = type(self._model.get_submodule(path)).__name__
            why = f"torch.export cannot trace it: {self.held.get(path, '')}"
            self.frozen.append(Frozen(f"module {kind}", path, why))
            return self.unknown(shapes, value)
        if all(self.tracing.positions.all_frozen(d) for v in touched for d in v.dims if len(d) > 1):
            return self.unknown(shapes, value)
        return self.give_up(node, name, touched, shapes, value, "there is no rule for this operator")

    def give_up(self, node: Any, name: str, touched: list[Traced], shapes: Any, value: Any, why: str) -> Any:
        self.say(node, name, why)
        self.tracing.freeze(*touched)
        return self.unknown(shapes, value)

    def unknown(self, shapes: Any, value: Any) -> Any:
        found = [Traced(tuple(self.tracing.stay(n) for n in shape)) for shape in shapes]
        return found if isinstance(value, (list, tuple)) else found[0]

    def remember(self, node: Any, x: Traced) -> None:
        """A norm without weights belongs to no part of a site, and yet must be told the shape that is left."""
        where = _where(node)
        module = self._model.get_submodule(where) if where else self._model
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and module.weight is None:
            self.shapes[where] = x.dims[-1]

    def say(self, node: Any, name: str, why: str) -> None:
        where = _where(node)
        self.frozen.append(Frozen(name if "." in name else f"aten.{name}", where, why))
