"""A graph read from an ONNX file as a module: parameters are its initialisers, the forward pass its nodes.

So whatever works on modules works on it: coupling, evidence, training, edits. Two things make the coupling of
`secateur.graph` serve it as it is. A number in a node that counts positions of a tensor (a part of a reshape's target,
a split's size, where a slice begins) is the length of a vector of ones; when the network is followed, the vector meets
the dimension it counts, and so is cut with it. And what pads a shortcut with zeros is such a vector as well.

A node that torch has no operator for is run by ONNX Runtime, by itself, and freezes what it touches.
"""

import base64
import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.errors import ModelError
from secateur.models.onnx import reading
from secateur.models.onnx.operators import DTYPES, NUMBERS, OPERATORS, Node, ints

_LONGEST = 1 << 16  # a number larger than this counts no units
_SMALL = 16  # floating-point constants of no more elements may be numbers

# Weights go into these, at these places; what goes in elsewhere and is not a vector is a table.
_WEIGHTS = {"Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "Gather": (0,),
            "LayerNormalization": (1, 2), "InstanceNormalization": (1, 2), "GroupNormalization": (1, 2),
            "RMSNormalization": (1,), "PRelu": (1,), "BatchNormalization": (1, 2), "Transpose": (0,),
            "Add": (0, 1), "Sub": (0, 1), "Mul": (0, 1), "Div": (0, 1)}  # fmt: skip
_VECTORS = ("Add", "Sub", "Mul", "Div")


class Place(nn.Module):
    """A path in a network: holds tensors, does nothing."""


class Norm(_BatchNorm):
    """A batch norm over any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class Foreign(nn.Module):
    """A node that is run by ONNX Runtime: no gradient goes through it, and what it touches stays."""

    def __init__(self, kind: str, proto: bytes, dtypes: Sequence[int]) -> None:
        super().__init__()
        self.kind, self.proto, self.dtypes = kind, base64.b64encode(proto).decode(), list(dtypes)

    def forward(self, *given: Tensor) -> list[Tensor]:
        """What the node puts out."""
        if any(x.requires_grad for x in given) and torch.is_grad_enabled():
            raise ModelError(
                f"a gradient through the ONNX operator {self.kind} was asked for",
                "it is run by ONNX Runtime, which gives none",
                "Use a method that needs no gradients, such as l1_norm or spa with obs.",
            )
        return _foreign(self.kind)(self.proto, self.dtypes, list(given))


@functools.cache
def _foreign(kind: str) -> Any:
    def run(proto: str, dtypes: Sequence[int], given: Sequence[Tensor]) -> list[Tensor]:
        session = _session(proto)
        names = [i.name for i in session.get_inputs()]
        found = session.run(None, {n: x.detach().cpu().numpy() for n, x in zip(names, given, strict=True)})
        return [torch.from_numpy(np.ascontiguousarray(v)) for v in found]

    def shapes(proto: str, dtypes: Sequence[int], given: Sequence[Tensor]) -> list[Tensor]:
        session = _session(proto)
        blank = [np.zeros(tuple(x.shape), str(x.dtype).removeprefix("torch.")) for x in given]
        found = session.run(None, {i.name: v for i, v in zip(session.get_inputs(), blank, strict=True)})
        like = given[0]
        return [like.new_empty(v.shape, dtype=DTYPES[d]) for v, d in zip(found, dtypes, strict=True)]

    name = re.sub(r"\W", "_", kind)
    run.__annotations__ = {"proto": str, "dtypes": Sequence[int], "given": Sequence[Tensor], "return": list[Tensor]}
    made = torch.library.custom_op(f"onnx::{name}", run, mutates_args=())
    made.register_fake(shapes)
    return made


@functools.lru_cache(maxsize=64)
def _session(proto: str) -> Any:
    _, runtime = reading.packages("a node was to be run")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    return runtime.InferenceSession(base64.b64decode(proto), options, providers=["CPUExecutionProvider"])


@functools.lru_cache(maxsize=4096)
def _on_numbers(proto: bytes) -> Any:
    from onnx.reference import ReferenceEvaluator

    return ReferenceEvaluator(proto)


@dataclass(frozen=True, eq=False)
class Slot:
    """What a node reads at one place."""

    value: str  # the name of what another node, or an input, gives; "" for nothing
    constant: str = ""  # the constant's name in the file, where it is one
    tensor: str = ""  # the dotted name of the module's tensor for it
    host: bool = False  # read as numbers


@dataclass(frozen=True, eq=False)
class Count:
    """A number in a node that counts positions, and the vector whose length it follows."""

    place: int  # of the input the number stands in; -1: in an attribute
    attribute: str
    at: int  # which number of those
    was: int  # the number in the file
    length: int  # of the vector, in the file
    tensor: str  # the vector's dotted name


@dataclass(frozen=True, eq=False)
class Meeting:
    """A vector and the run of a dimension that it counts."""

    tensor: str
    output: int  # of the node; -1: its first input
    dim: int
    before: bool = False  # of a slice, what lies before the number; of padding, what comes before the rest


@dataclass(frozen=True, eq=False)
class Step:
    """A node and where its inputs come from."""

    node: Node
    slots: tuple[Slot, ...]
    host: bool = False  # all its inputs are numbers
    foreign: str = ""  # the path of the module that runs it
    norm: str = ""  # the path of the batch norm it is
    shape: tuple[int, ...] = ()  # of its weight in the file, for the groups of convolutions
    counts: list[Count] = field(default_factory=list)
    meetings: list[Meeting] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Input:
    """An input of a graph."""

    name: str
    dtype: torch.dtype
    shape: tuple[int | str | None, ...]


class Network(nn.Module):
    """What an ONNX file computes. Give it the graph's inputs in their order, or by name."""

    def __init__(self, proto: Any) -> None:
        super().__init__()
        from onnx import ModelProto

        listed = reading.nodes(proto)
        values = reading.constants(proto, listed)
        self.inputs = tuple(_input(i) for i in proto.graph.input if i.name not in values)
        self.outputs = tuple(o.name for o in proto.graph.output)
        self.rows = {i.name: _rows(i.name, listed, values) for i in self.inputs}
        self.values = {n: v for n, v in values.items() if v.dtype.kind not in "OUS"}
        self.steps: list[Step] = []
        self.opset = listed[0].opset if listed else 0
        self.bare = ModelProto()
        self.bare.CopyFrom(proto)
        for tensor in self.bare.graph.initializer:
            for spent in ("raw_data", "float_data", "int32_data", "int64_data", "double_data", "uint64_data"):
                tensor.ClearField(spent)
        _Build(self, listed).run()

    # What is needed of an input for an example that goes through

    def example(self, batch: int = 1, draw: torch.Generator | None = None) -> tuple[Tensor, ...]:
        """Inputs of the graph's shapes: noise, ones for masks, token ids that are known; so many unless it says."""
        draw = torch.Generator().manual_seed(0) if draw is None else draw
        found = []
        for given in self.inputs:
            shape = [s if isinstance(s, int) else _guess(given, d, batch) for d, s in enumerate(given.shape)]
            if given.dtype.is_floating_point:
                found.append(torch.randn(shape, generator=draw).to(given.dtype))
            elif "mask" in given.name or given.dtype == torch.bool:
                found.append(torch.ones(shape, dtype=given.dtype))
            elif "type" in given.name:
                found.append(torch.zeros(shape, dtype=given.dtype))
            else:
                most = self.rows[given.name] or 2
                found.append(torch.randint(0, most, shape, generator=draw).to(given.dtype))
        return tuple(found)

    def forward(self, *given: Any, **named: Any) -> Any:
        """The graph's answer: a tensor, or a dictionary of several by name."""
        env = self._inputs(given, named)
        for _ in self.run(env):
            pass
        found = {name: _tensor(env[name]) for name in self.outputs}
        return next(iter(found.values())) if len(found) == 1 else found

    def _inputs(self, given: Sequence[Any], named: Mapping[str, Any]) -> dict[str, Any]:
        env: dict[str, Any] = dict(zip((i.name for i in self.inputs), given, strict=False))
        env.update({n: v for n, v in named.items() if any(i.name == n for i in self.inputs)})
        for wanted in self.inputs:
            if wanted.name not in env:
                raise TypeError(f"the network was called without its input {wanted.name!r}")
        return env

    def run(self, env: dict[str, Any]) -> Iterator[tuple[Step, list[Any], list[Any]]]:
        """Run the nodes one by one, the results going into `env`; yields each with its inputs and outputs."""
        following = _following()
        for step in self.steps:
            given = [self.read(step, place, env) for place in range(len(step.slots))]
            found = self.call(step, given, following)
            if following:
                self._meet(step, given, found)
            env.update({name: v for name, v in zip(step.node.outputs, found, strict=False) if name})
            yield step, given, found

    def read(self, step: Step, place: int, env: Mapping[str, Any]) -> Any:
        """What a node reads at a place: a tensor, or numbers with the counts that are in them as they are now."""
        slot = step.slots[place]
        if slot.tensor:
            return self.tensor(slot.tensor)
        if slot.constant:
            return self.numbers(step, place, self.values[slot.constant])
        if not slot.value:
            return None
        found = env[slot.value]
        return found if slot.host or isinstance(found, Tensor) else _tensor(found)

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer by dotted name."""
        module: Any = self
        *path, leaf = name.split(".")
        for piece in path:
            module = module._modules[piece]
        found = module._parameters.get(leaf)
        return module._buffers[leaf] if found is None else found

    def numbers(self, step: Step, place: int, value: np.ndarray, attribute: str = "") -> np.ndarray:
        """Numbers of a node, each that counts positions as many as there are now."""
        mine = [c for c in step.counts if c.place == place and c.attribute == attribute]
        if not mine:
            return value
        value = value.copy()
        flat = value.reshape(-1)
        for count in mine:
            flat[count.at] = count.was + len(self.tensor(count.tensor)) - count.length
        return value

    def attributes(self, step: Step) -> Node:
        """A node whose attributes count what there is now."""
        changed = {c.attribute for c in step.counts if c.attribute}
        if not changed:
            return step.node
        now = {a: ints(self.numbers(step, -1, np.asarray(step.node.attributes[a]), a)) for a in changed}
        n = step.node
        return Node(n.index, n.kind, n.name, n.inputs, n.outputs, {**n.attributes, **now}, n.opset)

    def call(self, step: Step, given: Sequence[Any], following: bool = False) -> list[Any]:
        """What a node makes of its inputs."""
        node = self.attributes(step)
        if node.kind == "Shape":
            shape = np.asarray(tuple(given[0].shape), np.int64)
            return [shape[slice(node.get("start", 0), node.get("end"))]]
        if node.kind == "Size":
            return [np.asarray(np.prod(given[0].shape), np.int64)]
        if step.host:
            return _of_numbers(node, self.opset, given)
        if step.foreign:
            return list(self.get_submodule(step.foreign)(*[_tensor(v) for v in given if v is not None]))
        if step.norm:
            return [self.get_submodule(step.norm)(given[0])]
        if following and node.kind == "Pad" and step.meetings:
            return [self._padded(step, node, given)]
        more = {"shape": step.shape} if step.shape else {}
        found = OPERATORS[node.kind](node, *given, **more)
        return found if isinstance(found, list) else [found]

    def _padded(self, step: Step, node: Node, given: Sequence[Any]) -> Tensor:
        """A dimension padded with zeros that are units of their own."""
        x = given[0]
        for meeting in step.meetings:
            ones = self.tensor(meeting.tensor)
            view = [1] * x.dim()
            view[meeting.dim] = -1
            shape = list(x.shape)
            shape[meeting.dim] = len(ones)
            zeros = (ones * 0).to(x.dtype).reshape(view).expand(shape)
            x = torch.cat([zeros, x] if meeting.before else [x, zeros], meeting.dim)
        return x

    def _meet(self, step: Step, given: Sequence[Any], found: list[Any]) -> None:
        """Let vectors meet the dimensions they count, so that whoever follows the network ties them."""
        if step.node.kind == "Pad":
            return
        for meeting in step.meetings:
            ones = self.tensor(meeting.tensor)
            whole = given[0] if meeting.output < 0 else found[meeting.output]
            if not isinstance(whole, Tensor) or not whole.is_floating_point():
                continue
            view = [1] * whole.dim()
            view[meeting.dim] = -1
            if meeting.before:
                whole.narrow(meeting.dim, 0, len(ones)) * ones.to(whole.dtype).reshape(view)
            else:
                found[meeting.output] = whole * ones.to(whole.dtype).reshape(view)


def _following() -> bool:
    return bool(getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)())


def _tensor(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))


def _of_numbers(node: Node, opset: int, given: Sequence[Any]) -> list[Any]:
    """What a node makes of numbers, by the reference that comes with ONNX."""
    if node.kind == "GatherElements":  # of which the reference cannot do every shape
        x, index = (np.asarray(v) for v in given)
        axis = int(node.get("axis", 0)) % x.ndim
        here = x[tuple(slice(None) if d == axis else slice(0, n) for d, n in enumerate(index.shape))]
        return [np.take_along_axis(here, np.where(index < 0, index + x.shape[axis], index), axis)]
    return list(_on_numbers(_alone(node, opset, len(given))).run(None, _fed(given)))


def _fed(given: Sequence[Any]) -> dict[str, Any]:
    return {f"i{place}": value for place, value in enumerate(given) if value is not None}


@functools.lru_cache(maxsize=4096)
def _alone_of(kind: str, attributes: str, opset: int, present: tuple[bool, ...], outputs: int, raw: bytes) -> bytes:
    from onnx import NodeProto, TensorProto, helper

    node = NodeProto.FromString(raw)
    del node.input[:], node.output[:]
    node.input.extend(f"i{i}" if here else "" for i, here in enumerate(present))
    node.output.extend(f"o{i}" for i in range(outputs))
    into = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in node.input if n]
    out = [helper.make_tensor_value_info(n, TensorProto.UNDEFINED, None) for n in node.output]
    graph = helper.make_graph([node], "alone", into, out)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]).SerializeToString()


def _alone(node: Node, opset: int, given: int) -> bytes:
    """A graph of this node alone."""
    from onnx import helper

    raw = helper.make_node(node.kind, [], [], **node.attributes).SerializeToString()
    present = tuple(bool(name) for name in node.inputs)
    return _alone_of(node.kind, "", opset, present, len(node.outputs), raw)


def _input(info: Any) -> Input:
    kind = info.type.tensor_type
    if kind.elem_type not in DTYPES:
        raise ModelError(
            f"the input {info.name!r} of an ONNX file was to be read",
            "it is no tensor of numbers",
            "Give a network whose inputs are tensors.",
        )
    shape: list[int | str | None] = []
    for dim in kind.shape.dim:
        shape.append(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else dim.dim_param or None)
    return Input(info.name, DTYPES[kind.elem_type], tuple(shape))


def _rows(name: str, listed: Sequence[Node], values: Mapping[str, np.ndarray]) -> int:
    """How many rows the table has that an input chooses from; 0 for one that chooses from none."""
    for node in listed:
        if node.kind == "Gather" and node.inputs[1] == name and node.inputs[0] in values:
            return int(values[node.inputs[0]].shape[int(node.get("axis", 0))])
        if node.kind in ("Cast", "Identity") and node.inputs[0] == name:
            return _rows(node.outputs[0], listed, values)
    return 0


def _guess(given: Input, dim: int, batch: int) -> int:
    """A length for a dimension the file leaves open."""
    if dim == 0:
        return batch
    if given.dtype.is_floating_point and len(given.shape) == 4:
        return 3 if dim == 1 else 64
    return 16


# From a file's nodes to steps


class _Build:
    def __init__(self, network: Network, listed: list[Node]) -> None:
        self.network, self.listed = network, listed
        self.given: dict[tuple[str, int, int] | str, str] = {}  # constant (and its reader) -> dotted name
        self.alias: dict[str, str] = {}  # what an Identity of a constant gives -> the constant
        self.hosts: set[str] = set()  # values that are numbers

    def run(self) -> None:
        values = self.network.values
        for node in self.listed:
            if node.kind == "Constant":
                continue
            source = self.alias.get(node.inputs[0], node.inputs[0]) if node.inputs else ""
            if node.kind == "Identity" and source in values and node.outputs[0] not in self.network.outputs:
                self.alias[node.outputs[0]] = source
                continue
            self.network.steps.append(self.step(node))
        for name in self.network.outputs:
            if name in values:  # an answer that depends on nothing
                blank = Node(-1, "Identity", name, (name,), (name,), {}, self.network.opset)
                self.network.steps.append(self.step(blank))
        try:
            self.count()
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise ModelError(
                "an ONNX network was to be run on an example of its inputs' shapes",
                str(error).splitlines()[0],
                "Export it with fixed shapes.",
            ) from error
        numbers = {slot.constant for step in self.network.steps for slot in step.slots if not slot.tensor}
        self.network.values = {n: v for n, v in self.network.values.items() if n in numbers}

    def constant(self, name: str) -> str:
        return self.alias.get(name, name)

    def hostable(self, name: str) -> bool:
        """Whether a value can be read as numbers."""
        name = self.constant(name)
        if name in self.hosts:
            return True
        value = self.network.values.get(name)
        return value is not None and (value.dtype.kind in "iub" or value.size <= _SMALL)

    def step(self, node: Node) -> Step:
        network = self.network
        present = [n for n in node.inputs if n]
        numbers = NUMBERS.get(node.kind, ())
        random = node.kind.startswith("Random") or node.kind in ("Bernoulli", "Multinomial")
        host = bool(present) and all(self.hostable(n) for n in present) and not random
        if node.kind in ("Shape", "Size") or host:
            self.hosts |= set(node.outputs)
        foreign = not host and node.kind not in OPERATORS and node.kind not in ("Shape", "Size")
        foreign = foreign or (not host and any(
            n and place in numbers and not self.hostable(n) for place, n in enumerate(node.inputs)
        ))  # fmt: skip
        norm = self.norm(node) if node.kind == "BatchNormalization" and not foreign else ""
        slots = []
        for place, name in enumerate(node.inputs):
            name = self.constant(name)
            asked = host or (place in numbers and not foreign)
            index = node.kind == "Gather" and place == 1 and not foreign
            if name not in network.values:
                slots.append(Slot(name, host=asked or (index and name in self.hosts)))
            elif asked or index:
                slots.append(Slot("", constant=name, host=True))
            else:
                slots.append(Slot("", constant=name, tensor=self.tensor(node, place, name)))
        shape: tuple[int, ...] = ()
        if node.kind in ("Conv", "ConvTranspose") and self.constant(node.inputs[1]) in network.values:
            shape = tuple(network.values[self.constant(node.inputs[1])].shape)
        return Step(node, tuple(slots), host, self.foreign(node) if foreign else "", norm, shape)

    def tensor(self, node: Node, place: int, name: str) -> str:
        """The tensor of a constant: one for all that read a matrix, one for each that reads a vector.

        Exporters store vectors that happen to be equal once; that they are equal does not make them one.
        """
        value = self.network.values[name]
        key: tuple[str, int, int] | str = name if value.ndim > 1 else (name, node.index, place)
        if key not in self.given:
            learnt = value.dtype.kind == "f" and value.size > 1 and place in _WEIGHTS.get(node.kind, ())
            if learnt and node.kind in _VECTORS:
                learnt = sum(n > 1 for n in value.shape) == 1
            named = _given_name(name)
            path = _path(name if named else node.name)
            leaf = "weight" if value.ndim > 1 else "bias"
            if named and len(path) > 1:
                *path, leaf = path
            elif learnt and value.ndim == 1 and node.kind in ("Mul", "LayerNormalization", "PRelu") and place == 1:
                leaf = "weight"
            held = torch.from_numpy(value.copy())
            self.given[key] = self.add(path, leaf, nn.Parameter(held) if learnt else held)
        return self.given[key]

    def add(self, path: Sequence[str], leaf: str, value: Tensor) -> str:
        """Put a tensor at a path, under a name that is free."""
        holder, found = self.place(path)
        leaf = _free(holder, leaf)
        if isinstance(value, nn.Parameter):
            holder.register_parameter(leaf, value)
        else:
            holder.register_buffer(leaf, value)
        return ".".join((*found, leaf))

    def place(self, path: Sequence[str], module: nn.Module | None = None) -> tuple[nn.Module, list[str]]:
        holder: nn.Module = self.network
        found: list[str] = []
        for i, piece in enumerate(path):
            last = module is not None and i == len(path) - 1
            if last or not isinstance(holder._modules.get(piece), Place):
                piece = _free(holder, piece)
                holder.add_module(piece, module if last and module is not None else Place())
            found.append(piece)
            holder = holder._modules[piece]  # type: ignore[assignment]
        return holder, found

    def norm(self, node: Node) -> str:
        """The path of a batch norm with the node's constants; "" where they are not constants."""
        names = [self.constant(n) for n in node.inputs[1:5]]
        values = [self.network.values.get(n) for n in names]
        if any(v is None for v in values) or len(node.outputs) > 1 or node.get("training_mode", 0):
            return ""
        scale, shift, mean, spread = (torch.from_numpy(v.copy()) for v in values if v is not None)
        norm = Norm(len(scale), eps=float(node.get("epsilon", 1e-5)))
        norm.weight, norm.bias = nn.Parameter(scale), nn.Parameter(shift)
        norm.running_mean, norm.running_var = mean, spread
        path = _path(names[0])[:-1] if _given_name(names[0]) else []
        _, found = self.place(path or _path(node.name), norm.eval())
        dotted = ".".join(found)
        for place, leaf in enumerate(("weight", "bias", "running_mean", "running_var"), start=1):
            self.given[names[place - 1], node.index, place] = f"{dotted}.{leaf}"
        return dotted

    def foreign(self, node: Node) -> str:
        """The path of the module that runs a node by itself."""
        from onnx import ModelProto, helper

        network = self.network
        proto = network.bare.graph.node[node.index]
        kinds = _kinds(network)
        present = [i for i, n in enumerate(node.inputs) if n]
        alone = type(proto)()
        alone.CopyFrom(proto)
        for i in present:
            alone.input[i] = f"i{i}"
        del alone.output[:]
        alone.output.extend(f"o{i}" for i in range(len(node.outputs)))
        into = [helper.make_tensor_value_info(f"i{i}", kinds.get(node.inputs[i], 1), None) for i in present]
        out = [helper.make_tensor_value_info(f"o{i}", kinds.get(n, 1), None) for i, n in enumerate(node.outputs)]
        made: ModelProto = helper.make_model(
            helper.make_graph([alone], "alone", into, out), opset_imports=list(network.bare.opset_import)
        )
        made.ir_version = max(4, network.bare.ir_version)
        module = Foreign(node.kind, made.SerializeToString(), [kinds.get(n, 1) for n in node.outputs])
        return ".".join(self.place(_path(node.name), module)[1])

    # Numbers that count positions

    @torch.no_grad()
    def count(self) -> None:
        """Run the network once, and find out which numbers of its nodes count positions of what."""
        network = self.network
        network.eval()
        env = network._inputs(network.example(), {})
        origin: dict[str, np.ndarray] = {}  # of numbers that pass through: which element of which constant each is
        keys: list[tuple[int, int, int]] = []  # (step, place, element)
        for at, step in enumerate(network.steps):
            given = [network.read(step, place, env) for place in range(len(step.slots))]
            step, found = self.tried(at, step, given)
            env.update({name: v for name, v in zip(step.node.outputs, found, strict=False) if name})
            self.trace(at, step, given, origin, keys)
            self.sized(at, step, given, found, origin, keys)

    def tried(self, at: int, step: Step, given: list[Any]) -> tuple[Step, list[Any]]:
        """A step and what it gives; by ONNX Runtime where torch's operator does not cover its use."""
        try:
            return step, self.network.call(step, given)
        except NotImplementedError:
            network = self.network
            slots = []
            for place, slot in enumerate(step.slots):
                if slot.constant and not slot.tensor:
                    name = self.tensor(step.node, place, slot.constant)
                    given[place] = network.tensor(name)
                    slot = Slot("", constant=slot.constant, tensor=name)
                slots.append(slot)
            step = Step(step.node, tuple(slots), foreign=self.foreign(step.node))
            network.steps[at] = step
            return step, network.call(step, given)

    def trace(self, at: int, step: Step, given: list[Any], origin: dict[str, np.ndarray], keys: list) -> None:
        """Follow the elements of constants through nodes that only move numbers."""
        moved = (
            "Concat",
            "Gather",
            "Slice",
            "Squeeze",
            "Unsqueeze",
            "Reshape",
            "Identity",
            "Cast",
            "Transpose",
            "Where",
        )
        if not step.host or step.node.kind not in moved:
            return
        data = {"Concat": range(len(given)), "Where": (1, 2)}.get(step.node.kind, (0,))
        ids = [self.ids(at, step, p, given[p], origin, keys) if p in data else given[p] for p in range(len(given))]
        if step.node.kind == "Cast":
            origin[step.node.outputs[0]] = ids[0]
            return
        found = _on_numbers(_alone(step.node, self.network.opset, len(given))).run(None, _fed(ids))
        origin[step.node.outputs[0]] = np.asarray(found[0])

    def ids(self, at: int, step: Step, place: int, value: Any, origin: dict, keys: list) -> np.ndarray:
        """A key for each element of what a node reads; 0 for what was calculated."""
        slot = step.slots[place]
        value = np.asarray(value)
        if slot.constant:
            start = len(keys) + 1
            keys += [(at, place, i) for i in range(value.size)]
            return np.arange(start, start + value.size, dtype=np.int64).reshape(value.shape)
        return origin.get(slot.value, np.zeros(value.shape, np.int64))

    def sized(self, at: int, step: Step, given: list[Any], found: list[Any], origin: dict, keys: list) -> None:
        """Give vectors to the numbers of a node that count positions."""
        if step.host or step.foreign or not found or not isinstance(found[0], Tensor):
            return
        finder = _SIZED.get(step.node.kind)
        for number in finder(step.node, given, found) if finder else ():
            if number.length > _LONGEST:
                continue
            if number.attribute:
                self.counted(at, (at, -1, number.at), ints(step.node.attributes[number.attribute])[number.at], number)
                continue
            ids = self.ids(at, step, number.place, given[number.place], origin, keys).reshape(-1)
            if ids[number.at]:  # else it was calculated, and will be again
                was = int(np.asarray(given[number.place]).reshape(-1)[number.at])
                self.counted(at, keys[ids[number.at] - 1], was, number)

    def counted(self, at: int, key: tuple[int, int, int], was: int, number: "_Number") -> None:
        """Note that a number, wherever it stands, counts what it was found to count."""
        here, holder = self.network.steps[at], self.network.steps[key[0]]
        where = (key[1], number.attribute, key[2])
        known = next((c for c in holder.counts if (c.place, c.attribute, c.at) == where), None)
        if known is None:
            path = [*_path(here.node.name), "counts"]
            name = self.add(path, f"n{len(here.meetings)}", torch.ones(number.length))
            known = Count(*where, was, number.length, name)
            holder.counts.append(known)
        if known.length == number.length:  # else it stays as it is, and what it would be wrong for fails its trial
            here.meetings.append(Meeting(known.tensor, number.output, number.dim, number.before))


@dataclass(frozen=True)
class _Number:
    """A number of a node that counts positions: where it stands, and what it counts."""

    place: int
    attribute: str
    at: int
    length: int
    output: int
    dim: int
    before: bool = False


def _of_target(node: Node, given: list[Any], found: list[Any]) -> Iterator[_Number]:
    shape, out = ints(given[1]), found[0].shape
    for i, wanted in enumerate(shape):
        dim = i - len(shape) + len(out)
        if wanted > 1 and wanted == out[dim]:
            yield _Number(1, "", i, wanted, 0, dim)


def _of_sizes(node: Node, given: list[Any], found: list[Any]) -> Iterator[_Number]:
    if len(given) > 3 and given[3] is not None and np.asarray(given[3]).size == found[0].dim():
        yield _Number(3, "", 1, found[0].shape[1], 0, 1)


def _of_split(node: Node, given: list[Any], found: list[Any]) -> Iterator[_Number]:
    dim = int(node.get("axis", 0)) % found[0].dim()
    inside = len(given) > 1 and given[1] is not None
    if inside or node.get("split") is not None:
        for i, part in enumerate(found):
            yield _Number(1 if inside else -1, "" if inside else "split", i, part.shape[dim], i, dim)


def _of_slice(node: Node, given: list[Any], found: list[Any]) -> Iterator[_Number]:
    x, inside = given[0], len(given) > 1
    starts, ends = (ints(given[1]), ints(given[2])) if inside else (ints(node.get("starts")), ints(node.get("ends")))
    along = given[3] if len(given) > 3 and given[3] is not None else node.get("axes")
    steps = ints(given[4]) if len(given) > 4 and given[4] is not None else [1] * len(starts)
    axes = list(range(len(starts))) if along is None else ints(along)
    for i, (start, end, axis, step) in enumerate(zip(starts, ends, axes, steps, strict=True)):
        dim = axis % x.dim()
        for place, which, number in ((1, "starts", start), (2, "ends", end)):
            if step == 1 and 0 < number <= x.shape[dim]:
                yield _Number(place if inside else -1, "" if inside else which, i, number, -1, dim, True)


def _of_pad(node: Node, given: list[Any], found: list[Any]) -> Iterator[_Number]:
    x = given[0]
    inside = len(given) > 1 and given[1] is not None
    value = given[2] if len(given) > 2 and given[2] is not None else node.get("value", 0.0)
    plain = node.get("mode", b"constant") in (b"constant", "constant") and not np.asarray(value).any()
    pads = ints(given[1]) if inside else ints(node.get("pads"))
    if not plain or len(pads) != 2 * x.dim() or min(pads) < 0:
        return
    padded = {d % x.dim() for d, p in enumerate(pads) if p}
    if padded <= ({1} if x.dim() > 3 else {1, x.dim() - 1}):  # of a picture the channels, not rows and columns
        for d, wide in enumerate(pads):
            if wide:
                before, dim = d < x.dim(), d % x.dim()
                yield _Number(1 if inside else -1, "" if inside else "pads", d, wide, 0, dim, before)


_SIZED = {"Reshape": _of_target, "Expand": _of_target, "Resize": _of_sizes, "Split": _of_split, "Slice": _of_slice,
          "Pad": _of_pad}  # fmt: skip


# Names


def _given_name(name: str) -> bool:
    """Whether somebody gave a constant its name, rather than an exporter."""
    return not re.fullmatch(r"onnx::.*|.*::.*|_?v?\d+|val_\d+|/.*|(Constant|_val|const|b|w)_?\d*(_.*)?", name)


def _path(name: str) -> list[str]:
    pieces = [p for p in re.split(r"[./]", name.replace("::", "_")) if p]
    return [re.sub(r"\s", "_", p) for p in pieces] or ["unnamed"]


_TAKEN = frozenset(dir(nn.Module())) | {"inputs", "outputs", "values", "steps", "opset", "bare", "example", "run",
                                        "read", "numbers", "tensor", "rows"}  # fmt: skip


def _free(holder: nn.Module, name: str) -> str:
    while name in _TAKEN or name in holder._modules or name in holder._parameters or name in holder._buffers:
        name += "_"
    return name


def _kinds(network: Network) -> dict[str, int]:
    """Element types of the values of a graph, as far as they can be inferred."""
    if not hasattr(network, "_found_kinds"):
        from onnx import shape_inference

        inferred = shape_inference.infer_shapes(network.bare)
        infos = [*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output]
        found = {i.name: i.type.tensor_type.elem_type for i in infos}
        found.update({t.name: t.data_type for t in network.bare.graph.initializer})
        object.__setattr__(network, "_found_kinds", {n: k for n, k in found.items() if k})
    return network._found_kinds  # type: ignore[return-value]
