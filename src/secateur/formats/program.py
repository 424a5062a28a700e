"""Kernels that follow one another on rows of linear layers: products, bounds, gates, and the memory between them."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur import kernels
from secateur.formats.conv import ANY
from secateur.formats.linear import SparseLinear
from secateur.formats.packed import VALUES
from secateur.formats.planned import Plan

ALIGNED = 64
"""Bytes between values in memory are a multiple of it."""
LITTLE = 2**16
"""Bytes of values between the steps that a plan keeps; more is taken for each call."""
HELD, SILU, SPAN = 0, 1, 8192  # of kernels/activate.h


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


class Program(Plan):
    """A plan of steps on values, which are numbered as they are made: each is given by the caller, or lies between."""

    def __init__(self, key: tuple[Any, ...], dtype: torch.dtype, threads: int) -> None:
        """Of values of one dtype."""
        super().__init__(key)
        self.dtype, self._threads = dtype, threads
        self.possible = dtype in VALUES
        self.shapes: list[tuple[int, ...]] = []  # of each value
        self._places: list[list[int]] = []  # and where its pointer goes
        self._spans: list[tuple[int, int]] = []  # and the first step that has to do with it, and the last
        self._calls: list[tuple[kernels.Kernel, ctypes.Structure, int]] = []

    def take(self, layer: SparseLinear) -> None:
        """A layer that is to be part of it, watched from now on."""
        packed = layer.packed
        packed.unchanged()
        self.watch(layer._buffers, list(packed.tensors))
        self.point(layer._parameters)
        self.need([packed.prepared.kernel])
        self.possible &= packed.dtype is self.dtype

    def value(self, shape: tuple[int, ...]) -> int:
        """The number of another value."""
        self.shapes.append(shape)
        self._places.append([])
        self._spans.append((-1, -1))
        return len(self.shapes) - 1

    def step(self, name: str, call: ctypes.Structure, items: int, **values: int) -> None:
        """A kernel, with the values that fields of its struct point to; not possible where there is none."""
        self.need([name])
        kernel = self.kernels[name]
        if kernel is None:
            return
        now = len(self._calls)
        self._calls.append((kernel, call, items))
        for field, value in values.items():
            self._places[value].append(ctypes.addressof(call) + int(getattr(type(call), field).offset))
            first = self._spans[value][0]
            self._spans[value] = (now if first < 0 else first), now

    def add_steps(
        self, steps: Sequence[Product | Gate], layers: Sequence[SparseLinear], given: Sequence[int]
    ) -> list[int]:
        """The steps of a chain on values that it is given; its values by number."""
        values, following = [*given], iter(layers)
        for step in steps:
            if isinstance(step, Product):
                values.append(self.add_product(next(following), values[step.source], step.between))
            else:
                values.append(self._add_gate(values[step.source], None if step.times is None else values[step.times]))
        return values

    def add_product(self, layer: SparseLinear, source: int, between: tuple[float, float] = ANY) -> int:
        """What a layer makes of a value: not possible where torch's product with the weight written out is faster."""
        packed, bias, shape = layer.packed, layer.bias, self.shapes[source]
        numbers = math.prod(shape)
        beside = bias is None or (
            bias.dtype is packed.dtype and bias.shape == packed.shape[:1] and bias.is_contiguous() and not bias.is_neg()
        )
        fits = shape[-1:] == packed.shape[1:] and numbers > 0
        self.possible = self.possible and beside and fits and packed.writes(numbers) is None
        call = Matmul(bias=None if bias is None else bias.data_ptr(), rows=numbers // packed.shape[1])
        call.weight = ctypes.addressof(packed.prepared.weight)
        made = self.value((*shape[:-1], packed.shape[0]))
        self.step(packed.prepared.kernel, call, packed.prepared.items, x=source, y=made)
        if between != ANY:
            self._add_activate(HELD, between, x=made, y=made)
        return made

    def _add_gate(self, source: int, times: int | None) -> int:
        """SiLU, times another value: of one shape."""
        made = self.value(self.shapes[source])
        self.possible &= times is None or self.shapes[times] == self.shapes[source]
        self._add_activate(SILU, ANY, x=source, y=made, **({} if times is None else {"times": times}))
        return made

    def _add_activate(self, kind: int, between: tuple[float, float], **values: int) -> None:
        count = math.prod(self.shapes[values["y"]])
        call = Activate(count=count, kind=kind, low=between[0], high=between[1])
        self.step(f"activate_{VALUES[self.dtype]}", call, -(-count // SPAN), **values)

    def lay_out(self, given: Sequence[int]) -> None:
        """Where values lie that the caller does not give, in the order of these: two share a place that never meet."""
        between = [value for value in range(len(self.shapes)) if value not in given and self._spans[value][0] >= 0]
        starts = self._room_for(between)
        self._starts = [starts[value] for value in between]
        order = [*given, *between]
        places = [(place, which) for which, value in enumerate(order) for place in self._places[value]]
        if self._room * self.dtype.itemsize <= LITTLE:
            self._memory = torch.empty(self._room, dtype=self.dtype)
            at = self._memory.data_ptr()
            for value in between:
                for place in self._places[value]:
                    ctypes.c_void_p.from_address(place).value = at + starts[value]
            places, self._starts = [(place, which) for place, which in places if which < len(given)], []
        self._steps = kernels.Steps(self._calls, places)

    def start(self, pointers: list[Any], like: Tensor) -> None:
        """All steps, in order, on what the caller gives, in the order it said."""
        if self._starts:
            room = like.new_empty(self._room)  # held until the end of this
            pointers += [room.data_ptr() + start for start in self._starts]
        self._steps.run(pointers, self._threads)

    def _room_for(self, between: Sequence[int]) -> dict[int, int]:
        """The byte at which each value begins."""
        size = {v: -(-math.prod(self.shapes[v]) * self.dtype.itemsize // ALIGNED) * ALIGNED for v in between}
        found: dict[int, int] = {}
        for value in sorted(between, key=lambda v: self._spans[v]):
            first = self._spans[value][0]
            # What is read while this is written, or afterwards.
            there = sorted((found[v], found[v] + size[v]) for v in found if self._spans[v][1] >= first)
            at = 0
            for start, end in there:
                if at + size[value] <= start:
                    break
                at = max(at, end)
            found[value] = at
        whole = max((found[v] + size[v] for v in between), default=0)
        self._room = whole // self.dtype.itemsize
        return found
