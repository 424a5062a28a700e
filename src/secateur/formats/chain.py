"""Packed convolutions that follow one another, with the sums and bounds between them, run in one call.

A small layer takes microseconds, and so does a call of it from Python: what a network of them would spend between its
layers is spent once for all of them here.
"""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import kernels
from secateur.formats.conv import ANY, Call, Form, SparseConv2d, arranged

RELU = (0.0, math.inf)
SHAPES = 16
"""Of inputs a chain keeps memory for; with more it begins anew."""


@dataclass(frozen=True)
class Link:
    """One convolution of a chain. Values are numbered: the inputs of the chain, then what each link gives."""

    source: int  # what it convolves
    more: int | None = None  # what is added to the outcome
    step: int = 1  # of what is added only every so many-th pixel is, along both axes,
    around: tuple[int, int] = (0, 0)  # and nothing to so many outputs before its channels, and after them
    between: tuple[float, float] = ANY  # what the sum is held between: (0, inf) is ReLU


class ConvChain(nn.Module):
    """Layers of packed convolutions, each with what it reads, and what is added to it: for inference, on the CPU.

    A gradient flows to the inputs, as it does in each layer by itself.
    """

    def __init__(self, layers: Sequence[SparseConv2d], links: Sequence[Link], inputs: int, outputs: Sequence[int]):
        """A layer for every link; so many inputs; and the values that are given back."""
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.links, self.inputs, self.outputs = tuple(links), inputs, tuple(outputs)
        # By shapes of inputs, those not in use: a call takes one out, so that threads do not share what it writes to.
        self._plans: dict[tuple[Any, ...], list[_Plan]] = {}

    def forward(self, *inputs: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outcome of inputs [pictures, channels, high, wide], in a tuple where several values are given back.

        Raises FormatError as the layers do.
        """
        plan = None if torch.compiler.is_compiling() else self._plan(inputs)
        if plan is None:
            found = self._one_by_one(inputs)
        else:
            found = plan.run(inputs)
            self._keep(plan)
        return found if len(found) > 1 else found[0]

    def extra_repr(self) -> str:
        """Numbers of inputs and outputs."""
        return f"inputs={self.inputs}, outputs={len(self.outputs)}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def _one_by_one(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = list(inputs)
        for layer, link in zip(self.layers, self.links, strict=True):
            y = layer(values[link.source])
            if link.more is not None:
                more = values[link.more][..., :: link.step, :: link.step]
                y = y + (more if link.around == (0, 0) else F.pad(more, (0, 0, 0, 0, *link.around)))
            if link.between != ANY:  # with the gradients of ReLU and ReLU6 where a bound is met, which are not clamp's
                y = F.relu(y) if link.between == RELU else F.hardtanh(y, *link.between)
            values.append(y)
        return tuple(values[i] for i in self.outputs)

    def _plan(self, inputs: Sequence[Tensor]) -> "_Plan | None":
        """What runs these inputs in one call, or None where a layer has to be asked by itself."""
        if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
            return None
        if not all(map(_fits, inputs)):
            return None
        key = (torch.get_num_threads(), *(x.shape for x in inputs))
        plan = self._kept(key) or _Plan(self, key, inputs)
        if plan.possible:
            return plan
        self._keep(plan)
        return None

    def _kept(self, key: tuple[Any, ...]) -> "_Plan | None":
        """One that no other thread has, and whose weights are as they were."""
        kept = self._plans.get(key, [])
        while True:
            try:
                plan = kept.pop()
            except IndexError:  # asking first would leave another thread time to take it
                return None
            if plan.holds():
                return plan

    def _keep(self, plan: "_Plan") -> None:
        if plan.key not in self._plans and len(self._plans) >= SHAPES:
            self._plans.clear()
        self._plans.setdefault(plan.key, []).append(plan)


def _fits(x: Tensor) -> bool:
    return x.dtype is torch.float32 and x.is_cpu and x.dim() == 4 and x.is_contiguous()


class _Plan:
    """The structs of all convolutions for inputs of some shape, and the memory between them."""

    def __init__(self, chain: ConvChain, key: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
        self.key = key
        layers: list[SparseConv2d] = list(chain.layers)  # type: ignore[arg-type]
        held = [layer.packed for layer in layers]
        for packed in held:
            packed.unchanged()
        self._watched = [
            (layer._buffers, name, tensor, None if tensor.is_inference() else tensor._version)
            for layer, packed in zip(layers, held, strict=True)
            for name, tensor in packed.tensors.items()
        ]
        names = [packed.format.convolves for packed in held if isinstance(packed.format, Form)]
        self._kernels = {name: kernels.find(name) for name in names}
        self.possible = all(kernel is not None for kernel in self._kernels.values())
        if not self.possible:
            return
        last = {i: n for n, link in enumerate(chain.links) for i in (link.source, link.more) if i is not None}
        free: list[Tensor] = []
        values = list(inputs)
        places: list[list[int]] = [
            [] for _ in range(len(inputs) + len(layers))
        ]  # of each value: where its pointer goes
        steps: list[tuple[kernels.Kernel, Call, int]] = []
        for n, (layer, link, packed, name) in enumerate(zip(layers, chain.links, held, names, strict=True)):
            slides = layer.stride, layer.padding, layer.dilation
            call, shape = arranged(packed, values[link.source], *slides, key[0])
            call.weight = ctypes.addressof(packed.prepared.weight)
            call.low, call.high = _both(layer.between, link.between)
            places[link.source].append(_at(call, "x"))
            places[len(values)].append(_at(call, "y"))
            if link.more is not None:
                places[link.more].append(_at(call, "more"))
            # Not where nothing is made, where what is added is of another shape, or where bounds are met twice.
            sums = link.more is None or (_adds(call, link, values[link.more], shape) and layer.between == ANY)
            self.possible = bool(math.prod(shape)) and sums and call.low <= call.high
            if not self.possible:
                return
            kernel = self._kernels[name]
            assert kernel is not None, "asked above"
            steps.append((kernel, call, shape[0] * call.chunks * call.parts))
            given = len(values) in chain.outputs
            again = next((i for i, t in enumerate(free) if t.shape == shape and not given), None)
            values.append(torch.empty(shape) if again is None else free.pop(again))
            mine = {i for i in (link.source, link.more) if i is not None and i >= len(inputs)} - set(chain.outputs)
            free += [values[i] for i in mine if last[i] == n]
        for place, value in zip(places[len(inputs) :], values[len(inputs) :], strict=True):
            for at in place:
                ctypes.c_void_p.from_address(at).value = value.data_ptr()
        between = [v for i, v in enumerate(values) if i >= len(inputs) and i not in chain.outputs]
        self._held = [call for _, call, _ in steps], between  # what pointers point to
        self._shapes = [tuple(values[i].shape) for i in chain.outputs]
        anew = [*places[: len(inputs)], *(places[i] for i in chain.outputs)]
        self._steps = kernels.Steps(steps, [(at, which) for which, each in enumerate(anew) for at in each])

    def holds(self) -> bool:
        """Whether the weights are those it was made for, as they were."""
        for held, name, tensor, version in self._watched:
            if held.get(name) is not tensor or (version is not None and tensor._version != version):
                return False
        return all(kernels.find(name) is kernel for name, kernel in self._kernels.items())

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All convolutions, in order."""
        found = tuple(inputs[0].new_empty(shape) for shape in self._shapes)
        self._steps.run([t.data_ptr() for t in (*inputs, *found)], self.key[0])
        return found


def _at(call: Call, field: str) -> int:
    """The address of a pointer in a struct."""
    return ctypes.addressof(call) + int(getattr(Call, field).offset)


def _adds(call: Call, link: Link, more: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a value can be added to an outcome of a shape, the struct being told how."""
    if link.step == 1 and link.around == (0, 0):
        return tuple(more.shape) == shape
    pictures, channels, high, wide = more.shape
    call.more_step, call.more_first = link.step, link.around[0]
    call.more_channels, call.more_height, call.more_width = channels, high, wide
    sampled = (pictures, channels + sum(link.around), -(-high // link.step), -(-wide // link.step))
    return sampled == shape and min(link.around) >= 0


def _both(one: tuple[float, float], other: tuple[float, float]) -> tuple[float, float]:
    """What is left of two pairs of bounds, one applied after the other."""
    return max(one[0], other[0]), min(one[1], other[1])
