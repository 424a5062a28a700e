"""Packed linear layers that follow one another, with the bounds and gates between them, run in one call."""

import ctypes
import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import kernels
from secateur.formats import FORMATS
from secateur.formats.conv import ANY
from secateur.formats.linear import SparseLinear
from secateur.formats.packed import VALUES
from secateur.formats.planned import Plan, Planned, bounded
from secateur.formats.state import MOST, made_of

ALIGNED = 64
"""Bytes between values in memory are a multiple of it."""
LITTLE = 2**16
"""Bytes of values between the steps that a plan keeps; more is taken for each call."""
HELD, SILU, SPAN = 0, 1, 8192  # of kernels/activate.h
PRODUCT, GATE = 0, 1  # steps, as an operator takes them


@dataclass(frozen=True)
class Product:
    """The next layer of a chain. Values are numbered: the inputs of the chain, then what each step gives."""

    source: int  # what it multiplies
    between: tuple[float, float] = ANY  # what the outcome is held between: (0, inf) is ReLU


@dataclass(frozen=True)
class Gate:
    """SiLU of a value, times another: the gate of SwiGLU."""

    source: int
    times: int | None = None  # nothing, where SiLU is all


class LinearChain(Planned["_Plan"]):
    """Packed linear layers, each with what it reads, and the gates between them: for inference, on the CPU.

    A gradient flows to the inputs and to biases that learn, as it does in each layer by itself.
    """

    def __init__(
        self, layers: Sequence[SparseLinear], steps: Sequence[Product | Gate], inputs: int, outputs: Sequence[int]
    ) -> None:
        """A layer for every product, in their order; so many inputs; and the values that are given back."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.steps, self.inputs, self.outputs = tuple(steps), inputs, tuple(outputs)
        # As an operator takes them: a product by its source, a gate by both of its values, with -1 where there is one.
        self._numbers = [n for step in steps for n in _numbers(step)]
        self._bounds = [b for step in steps for b in (step.between if isinstance(step, Product) else ANY)]

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outcome of inputs [..., inputs of their layers], in a tuple where several values are given back.

        Raises FormatError as the layers do.
        """
        if named:
            inputs = self.in_order(inputs, named)
        if torch.compiler.is_compiling():
            return given_back(packed_chain(inputs, *self._as_given()))
        return given_back(self.run(inputs))

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The values that are given back, as `forward` does where nothing is compiled."""
        plan = self._plan(inputs)
        if plan is None:
            return self._one_by_one(inputs)
        found = plan.run(inputs)
        self.keep(plan)
        return found

    def extra_repr(self) -> str:
        """Numbers of inputs and outputs."""
        return f"inputs={self.inputs}, outputs={len(self.outputs)}"

    def _as_given(self) -> tuple[Any, ...]:
        """What `packed_chain` takes after the inputs."""
        layers: list[SparseLinear] = list(self.layers)  # type: ignore[arg-type]  # a ModuleList says Module
        tensors = [getattr(layer, name) for layer in layers for name in layer._packed.format.names]
        biases = [layer.bias for layer in layers]
        headers = [number for layer in layers for number in (len(layer._header), *layer._header)]
        return tensors, biases, headers, self._numbers, self._bounds, list(self.outputs)

    def _one_by_one(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values, layers = list(inputs), iter(self.layers)
        for step in self.steps:
            if isinstance(step, Product):
                values.append(bounded(next(layers)(values[step.source]), step.between))
            else:
                y = F.silu(values[step.source])
                values.append(y if step.times is None else y * values[step.times])
        return tuple(values[i] for i in self.outputs)

    def _plan(self, inputs: Sequence[Tensor]) -> "_Plan | None":
        """What runs these inputs in one call, or None where a layer has to be asked by itself."""
        learns = torch.is_grad_enabled()
        for x in inputs:
            if not (x.is_cpu and x.is_contiguous()) or (learns and x.requires_grad) or x.is_neg():
                return None
        if learns and any(
            layer._parameters["bias"] is not None and layer._parameters["bias"].requires_grad for layer in self.layers
        ):
            return None
        key = (torch.get_num_threads(), *(x.dtype for x in inputs), *(x.shape for x in inputs))
        return self.taken(key, lambda: _Plan(self, key, inputs))


def given_back(found: Sequence[Tensor]) -> Tensor | tuple[Tensor, ...]:
    """A value alone, or several in a tuple."""
    return tuple(found) if len(found) > 1 else found[0]


def _numbers(step: Product | Gate) -> tuple[int, int, int]:
    if isinstance(step, Product):
        return PRODUCT, step.source, -1
    return GATE, step.source, -1 if step.times is None else step.times


def _steps(numbers: Sequence[int], bounds: Sequence[float]) -> list[Product | Gate]:
    """What `_numbers` was made from."""
    found: list[Product | Gate] = []
    for i, (kind, source, times) in enumerate(zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True)):
        between = bounds[2 * i], bounds[2 * i + 1]
        found.append(Product(source, between) if kind == PRODUCT else Gate(source, None if times < 0 else times))
    return found


_OPERATORS: Any = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types
_OPERATORS.define(
    "packed_chain(Tensor[] inputs, Tensor[] tensors, Tensor?[] biases, int[] headers, int[] steps, float[] bounds, "
    "int[] outputs) -> Tensor[]",
    tags=torch.Tag.pt2_compliant_tag,
)


def packed_chain(
    inputs: Sequence[Tensor],
    tensors: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    headers: Sequence[int],
    steps: Sequence[int],
    bounds: Sequence[float],
    outputs: Sequence[int],
) -> Sequence[Tensor]:
    """What a chain gives back, its layers being given by the tensors of their formats, their biases and their headers.

    A header comes after its length. A step is three numbers, as `_numbers` has it, and two bounds.
    """
    found: Sequence[Tensor] = torch.ops.secateur.packed_chain.default(
        inputs, tensors, biases, headers, steps, bounds, outputs
    )
    return found


def _run(
    inputs: Sequence[Tensor], tensors: Sequence[Tensor], biases: Sequence[Tensor | None], *numbers: Sequence[Any]
) -> list[Tensor]:
    headers, steps, bounds, outputs = numbers
    each = _headers(headers)
    first = made_of(tensors[: len(FORMATS[each[0][0]].names)], each[0])
    for chain, given, beside, said in first.chains:
        if said == numbers and all(map(operator.is_, given, tensors)) and all(map(operator.is_, beside, biases)):
            return list(chain.run(inputs))
    layers, at = [], 0
    for header, bias in zip(each, biases, strict=True):
        names = FORMATS[header[0]].names
        layers.append(SparseLinear(made_of(tensors[at : at + len(names)], header), bias))
        at += len(names)
    chain = LinearChain(layers, _steps(steps, bounds), len(inputs), outputs)
    first.chains.insert(0, (chain, list(tensors), list(biases), numbers))
    first.chains[MOST:] = []
    return list(chain.run(inputs))


def _headers(flat: Sequence[int]) -> list[list[int]]:
    found, at = [], 0
    while at < len(flat):
        found.append(list(flat[at + 1 : at + 1 + flat[at]]))
        at += 1 + flat[at]
    return found


_OPERATORS.impl("packed_chain", _run, "CPU")


@torch.library.register_fake("secateur::packed_chain")  # type: ignore[untyped-decorator]  # nor here
def _(
    inputs: Sequence[Tensor], tensors: Sequence[Tensor], biases: Sequence[Tensor | None], *numbers: Sequence[Any]
) -> list[Tensor]:
    headers, steps, bounds, outputs = numbers
    each, shapes = iter(_headers(headers)), [tuple(x.shape) for x in inputs]
    for step in _steps(steps, bounds):
        shape = shapes[step.source]
        shapes.append((*shape[:-1], next(each)[2]) if isinstance(step, Product) else shape)
    return [inputs[0].new_empty(shapes[i]) for i in outputs]


class Matmul(ctypes.Structure):
    """`Matmul` of kernels/kernels.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "x", "y", "bias")),
        ("rows", ctypes.c_int64),
    )


class Activate(ctypes.Structure):
    """`Activate` of kernels/activate.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "times", "y")),
        *((name, ctypes.c_int64) for name in ("count", "kind")),
        *((name, ctypes.c_float) for name in ("low", "high")),
    )


class _Plan(Plan):
    """The structs of all steps for inputs of some shape, and the memory between them, if that is little."""

    def __init__(self, chain: LinearChain, key: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
        super().__init__(key)
        layers: list[SparseLinear] = list(chain.layers)  # type: ignore[arg-type]  # a ModuleList says Module
        held = [layer.packed for layer in layers]
        dtype, self._threads = held[0].dtype, key[0]
        for layer, packed in zip(layers, held, strict=True):
            packed.unchanged()
            self.watch(layer._buffers, list(packed.tensors))
            self.point(layer._parameters, ["bias"])
        self._activate = f"activate_{VALUES[dtype]}"
        self.need([*(packed.prepared.kernel for packed in held), self._activate])
        self.possible &= {*(x.dtype for x in inputs), *(packed.dtype for packed in held)} == {dtype}
        self._shapes = [tuple(x.shape) for x in inputs]  # of each value
        self._places: list[list[int]] = [[] for _ in inputs]  # and where its pointer goes
        self._calls: list[tuple[kernels.Kernel, Matmul | Activate, int]] = []
        following = iter(layers)
        for step in chain.steps:
            self.possible = self.possible and (
                self._add_product(step, next(following)) if isinstance(step, Product) else self._add_gate(step)
            )
        if self.possible:
            self._lay_out(inputs, chain.outputs, dtype)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All steps, in order."""
        found = tuple([inputs[0].new_empty(shape) for shape in self._given])
        pointers = [t.data_ptr() for t in (*inputs, *found)]
        if self._between:
            room = inputs[0].new_empty(self._room)  # held until the end of this
            pointers += [room.data_ptr() + at for at in self._between]
        self._steps.run(pointers, self._threads)
        return found

    def _add_product(self, step: Product, layer: SparseLinear) -> bool:
        """Whether it can be done here: not where torch's product with the weight written out is faster."""
        packed, bias, shape = layer.packed, layer.bias, self._shapes[step.source]
        numbers, made = math.prod(shape), len(self._shapes)
        beside = bias is None or (
            bias.dtype is packed.dtype and bias.shape == packed.shape[:1] and bias.is_contiguous() and not bias.is_neg()
        )
        if not beside or shape[-1:] != packed.shape[1:] or not numbers or packed.writes(numbers) is not None:
            return False
        call = Matmul(bias=None if bias is None else bias.data_ptr(), rows=numbers // packed.shape[1])
        call.weight = ctypes.addressof(packed.prepared.weight)
        self._add_value((*shape[:-1], packed.shape[0]))
        self._add_call(packed.prepared.kernel, call, packed.prepared.items, x=step.source, y=made)
        if step.between != ANY:
            self._add_activate(HELD, step.between, x=made, y=made)
        return True

    def _add_gate(self, step: Gate) -> bool:
        """Whether it can be done here: of values of one shape."""
        shape, made = self._shapes[step.source], len(self._shapes)
        if step.times is not None and self._shapes[step.times] != shape:
            return False
        self._add_value(shape)
        self._add_activate(SILU, ANY, x=step.source, y=made, **({} if step.times is None else {"times": step.times}))
        return True

    def _add_value(self, shape: tuple[int, ...]) -> None:
        self._shapes.append(shape)
        self._places.append([])

    def _add_activate(self, kind: int, between: tuple[float, float], **values: int) -> None:
        count = math.prod(self._shapes[values["y"]])
        call = Activate(count=count, kind=kind, low=between[0], high=between[1])
        self._add_call(self._activate, call, -(-count // SPAN), **values)

    def _add_call(self, name: str, call: Matmul | Activate, items: int, **values: int) -> None:
        """A kernel, with the values that fields of its struct point to."""
        kernel = self.kernels[name]
        assert kernel is not None, "asked when the plan was made"
        self._calls.append((kernel, call, items))
        for field, value in values.items():
            self._places[value].append(ctypes.addressof(call) + int(getattr(type(call), field).offset))

    def _lay_out(self, inputs: Sequence[Tensor], outputs: Sequence[int], dtype: torch.dtype) -> None:
        """Where values lie that are not given back."""
        self._given = [self._shapes[i] for i in outputs]
        order, between = [*range(len(inputs)), *outputs], list[int]()
        size = 0
        for value in range(len(inputs), len(self._shapes)):
            if value not in outputs:
                order.append(value)
                between.append(size)
                size += -(-math.prod(self._shapes[value]) * dtype.itemsize // ALIGNED) * ALIGNED
        self._room, self._between = size // dtype.itemsize, between
        places = [(place, which) for which, value in enumerate(order) for place in self._places[value]]
        if size <= LITTLE:
            self._memory, self._between = inputs[0].new_empty(self._room), []
            first = len(inputs) + len(outputs)
            for place, which in places:
                if which >= first:
                    ctypes.c_void_p.from_address(place).value = self._memory.data_ptr() + between[which - first]
            places = [(place, which) for place, which in places if which < first]
        self._steps = kernels.Steps(self._calls, places)
