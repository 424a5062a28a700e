"""Packed linear layers that follow one another, with the bounds and gates between them, run in one call."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.formats import FORMATS
from secateur.formats.conv import ANY
from secateur.formats.eager import recorded, traced, transformed
from secateur.formats.linear import SparseLinear
from secateur.formats.packed import learns
from secateur.formats.planned import Planned, bounded
from secateur.formats.program import Gate, Product, Program
from secateur.formats.state import MOST, made_of

PRODUCT, GATE = 0, 1  # steps, as an operator takes them


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
        if not torch.compiler.is_compiling() and traced():
            return given_back(self._one_by_one(inputs))
        if recorded() and (torch.compiler.is_compiling() or not (transformed() or self._learns(inputs))):
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

    def _learns(self, inputs: Sequence[Tensor]) -> bool:
        return torch.is_grad_enabled() and learns(*inputs, *(layer._parameters["bias"] for layer in self.layers))

    def _plan(self, inputs: Sequence[Tensor]) -> "_Plan | None":
        """What runs these inputs in one call, or None where a layer has to be asked by itself."""
        if transformed(*inputs) or self._learns(inputs):
            return None
        for x in inputs:
            if not (x.is_cpu and x.is_contiguous()) or x.is_neg():
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


class _Plan(Program):
    """The structs of all steps for inputs of some shape, and the memory between them, if that is little."""

    def __init__(self, chain: LinearChain, key: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
        super().__init__(key, inputs[0].dtype, key[0])
        self.within(chain._modules)
        self.within(chain.layers._modules)
        layers: list[SparseLinear] = list(chain.layers)  # type: ignore[arg-type]  # a ModuleList says Module
        for layer in layers:
            self.take(layer)
        self.possible &= {x.dtype for x in inputs} == {self.dtype}
        if not self.possible:
            return
        given = [self.value(tuple(x.shape)) for x in inputs]
        values = self.add_steps(chain.steps, layers, given)
        if self.possible:
            self._shapes = [self.shapes[values[i]] for i in chain.outputs]
            self.lay_out([*given, *(values[i] for i in chain.outputs)])

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All steps, in order."""
        found = tuple([inputs[0].new_empty(shape) for shape in self._shapes])
        self.start([t.data_ptr() for t in (*inputs, *found)], inputs[0])
        return found
