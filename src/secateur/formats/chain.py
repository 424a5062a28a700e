"""Packed convolutions that follow one another, with the sums and bounds between them, run in one call."""

import ctypes
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import kernels
from secateur.formats.conv import ANY, Call, Form, SparseConv2d, arranged, out_size, point
from secateur.formats.eager import recorded, transformed
from secateur.formats.group_cols import GroupCols
from secateur.formats.packed import Packed, learns
from secateur.formats.pages import empty
from secateur.formats.planned import Plan, Planned, bounded
from secateur.formats.stretches import STRETCH, Layer, Leg, Stretch, at_once, in_turn

MEAN_LINEAR = "mean_linear_f32"
FLOAT = torch.empty(0)
BEYOND = 512
"""Floats behind a value that kernels may read, whole vectors at a time."""
LINE, APART = 16, 256
"""Floats of a line of the caches; and those that channels are not whole numbers of apart: few such stay in a cache."""
OFTEN, OFTEN_ELSEWHERE = {"avx512bf16": 4}, 8
"""Loads of a pixel for each copy of it that a kernel would lay out, from which on that takes less, by the level of the
processor. Measured on an EPYC and on a Xeon."""


@dataclass(frozen=True)
class Link:
    """One convolution of a chain. Values are numbered: the inputs of the chain, then what each link gives."""

    source: int  # what it convolves
    more: int | None = None  # what is added to the outcome
    step: int = 1  # of what is added only every so many-th pixel is, along both axes,
    around: tuple[int, int] = (0, 0)  # and nothing to so many outputs before its channels, and after them
    between: tuple[float, float] = ANY  # what the sum is held between: (0, inf) is ReLU


class ConvChain(Planned["_Plan"]):
    """Layers of packed convolutions, each with what it reads, and what is added to it: for inference, on the CPU.

    With a head, a dense linear layer, its product with the means of the channels of the last value that would be given
    back is given in its place. A gradient flows to the inputs and the head, as it does in each layer by itself.
    """

    def __init__(
        self,
        layers: Sequence[SparseConv2d],
        links: Sequence[Link],
        inputs: int,
        outputs: Sequence[int],
        head: nn.Linear | None = None,
    ) -> None:
        """A layer for every link; so many inputs; the values that are given back; and the head."""
        super().__init__()
        self.layers, self.head = nn.ModuleList(layers), head
        self.links, self.inputs, self.outputs = tuple(links), inputs, tuple(outputs)

    def forward(self, *inputs: Tensor, **named: Tensor) -> Tensor | tuple[Tensor, ...]:
        """The outcome of inputs [pictures, channels, high, wide], in a tuple where several values are given back.

        Raises FormatError as the layers do.
        """
        if named:
            inputs = self.in_order(inputs, named)
        plan = None if recorded() or transformed(*inputs) else self._plan(inputs)
        if plan is None:
            found = self._one_by_one(inputs)
        else:
            found = plan.run(inputs)
            self.keep(plan)
            if plan.head is None and self.head is not None:
                found = self._headed(list(found))
        return found if len(found) > 1 else found[0]

    def extra_repr(self) -> str:
        """Numbers of inputs and outputs."""
        return f"inputs={self.inputs}, outputs={len(self.outputs)}"

    def _one_by_one(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        values = list(inputs)
        for layer, link in zip(self.layers, self.links, strict=True):
            y = layer(values[link.source])
            if link.more is not None:
                more = values[link.more][..., :: link.step, :: link.step]
                y = y + (more if link.around == (0, 0) else F.pad(more, (0, 0, 0, 0, *link.around)))
            values.append(bounded(y, link.between))
        return self._headed([values[i] for i in self.outputs])

    def _headed(self, found: list[Tensor]) -> tuple[Tensor, ...]:
        return tuple(found) if self.head is None else (*found[:-1], self.head(found[-1].mean((2, 3))))

    def _plan(self, inputs: Sequence[Tensor]) -> "_Plan | None":
        """What runs these inputs in one call, or None where a layer has to be asked by itself."""
        for x in inputs:
            if x.dtype is not torch.float32 or not x.is_cpu or x.dim() != 4 or not x.is_contiguous():
                return None
            if learns(x) or x.is_neg():
                return None
        head = self._modules.get("head")  # not by attribute: a module takes a microsecond to find one
        headed = head is not None and not (torch.is_grad_enabled() and learns(*head._parameters.values()))
        key = (torch.get_num_threads(), headed, *(x.shape for x in inputs))
        return self.taken(key, lambda: _Plan(self, key, inputs))


class _Plan(Plan):
    """The structs of all convolutions for inputs of some shape, and the memory between them."""

    def __init__(self, chain: ConvChain, key: tuple[Any, ...], inputs: Sequence[Tensor]) -> None:
        super().__init__(key)
        threads, self.head = key[0], chain.head if key[1] else None
        layers: list[SparseConv2d] = list(chain.layers)  # type: ignore[arg-type]  # a ModuleList says Module
        held = [layer.packed for layer in layers]
        self.within(chain._modules)
        self.within(chain.layers._modules)
        for layer, packed in zip(layers, held, strict=True):
            packed.unchanged()
            self.watch(layer._buffers, list(packed.tensors))
        names = [packed.format.convolves for packed in held if isinstance(packed.format, Form)]
        self.need([*names, *([] if self.head is None else [MEAN_LINEAR])])
        if not self.possible:
            return
        last = {i: n for n, link in enumerate(chain.links) for i in (link.source, link.more) if i is not None}
        outputs = chain.outputs if self.head is None else chain.outputs[:-1]  # of convolutions
        around = _around(chain, held, outputs)
        pictures, first = len(inputs[0]), len(inputs)
        free: list[tuple[int, _Value]] = []
        values = [_Value(x.as_strided(x.shape, _strides(x.shape))) for x in inputs]  # sizes of one can have any stride
        places: list[list[int]] = [[] for _ in range(first + len(layers))]  # of each value: where its pointer goes
        steps: list[tuple[kernels.Kernel, ctypes.Structure, int]] = []
        calls = list[Call]()
        for stretch, some in in_turn(self._at_once(chain, held, inputs)):
            fewer, legs = some < pictures, list[Leg]()
            rooms = min(threads, -(-pictures // some)) if fewer else 0
            # What only these layers read has room for the pictures on their way alone.
            inner = {first + n for n in stretch if fewer and last.get(first + n) in stretch} - {*chain.outputs}
            for n in stretch:
                link, x = chain.links[n], values[chain.links[n].source].tensor[:some]
                more = None if link.more is None else values[link.more].tensor[:some]
                linked = _linked(layers[n], held[n], link, x, more, around, 1 if fewer else threads)
                self.possible = linked is not None
                if linked is None:
                    return
                call, shape = linked
                calls.append(call)
                places[link.source].append(_at(call, "x"))
                places[len(values)].append(_at(call, "y"))
                if link.more is not None:
                    places[link.more].append(_at(call, "more"))
                kernel = self.kernels[names[n]]
                assert kernel is not None, "asked above"
                zeros, alone = around[len(values)], len(values) in inner
                wanted = zeros, (shape[0] if alone else pictures, *shape[1:]), alone
                given = len(values) in outputs
                alike = [i for i, (z, v) in enumerate(free) if (z, v.shape, v.alone) == wanted and not given]
                if alike:
                    values.append(free.pop(alike[0])[1])
                else:
                    values.append(_given(wanted[1]) if given else _room(*wanted[:2], rooms if alone else 0))
                call.y_row, call.y_plane = _apart(values[-1].tensor)
                if fewer:
                    of = (values[link.source], values[-1], values[link.more or 0])
                    apart, from_room = (0 if v.alone else v.tensor.stride(0) for v in of), (v.room for v in of)
                    legs.append(Leg(kernel.pointer, ctypes.addressof(call), (*apart,), (*from_room,)))
                else:
                    steps.append((kernel, call, shape[0] * call.chunks * call.parts))
                mine = {i for i in (link.source, link.more) if i is not None and i >= first} - {*chain.outputs}
                free += [(around[i], values[i]) for i in mine if last[i] == n]
            free = [(z, v) for z, v in free if not v.alone]  # the next have as many pictures, or rooms, of their own
            if fewer:
                kernel, struct = self.kernels[STRETCH], Stretch.of(legs, pictures, some)
                assert kernel is not None, "or all pictures would go together"
                steps.append((kernel, struct, struct.items))
        for place, value in zip(places[first:], values[first:], strict=True):
            for at in place:
                ctypes.c_void_p.from_address(at).value = value.tensor.data_ptr()
        between = [v.tensor for i, v in enumerate(values) if i >= first and i not in outputs]
        self._shapes = [values[i].shape for i in outputs]
        anew = [*places[:first], *(places[i] for i in outputs)]
        if self.head is not None:
            ending, kernel = _ending(self.head, values[chain.outputs[-1]].tensor), self.kernels[MEAN_LINEAR]
            assert kernel is not None, "asked above"
            self.possible = ending is not None
            if ending is None:
                return
            steps.append((kernel, ending, ending.pictures))
            self._shapes.append((ending.pictures, ending.outputs))
            anew.append([_at(ending, "y")])
            self.point(self.head._parameters)
        self._structs = calls, [call for _, call, _ in steps], between  # what pointers point to
        self._steps = kernels.Steps(steps, [(at, which) for which, each in enumerate(anew) for at in each])

    def _at_once(self, chain: ConvChain, held: Sequence[Packed], inputs: Sequence[Tensor]) -> list[int]:
        """How many pictures go through each layer at a time."""
        pictures, threads = len(inputs[0]), self.key[0]
        self.kernels[STRETCH] = kernels.find(STRETCH)
        if pictures < 2 or self.kernels[STRETCH] is None or any(len(x) != pictures for x in inputs):
            return [pictures] * len(held)
        sizes, found = [tuple(x.shape[1:]) for x in inputs], list[Layer]()
        for layer, link, packed in zip(chain.layers, chain.links, held, strict=True):
            assert isinstance(layer, SparseConv2d) and isinstance(packed.format, Form)
            slides = layer.stride, layer.padding, layer.dilation
            sizes.append((packed.shape[0], *out_size(packed.format, sizes[link.source][1:], *slides)))
            more = 0 if link.more is None else math.prod(sizes[link.more])
            weight = sum(tensor.nbytes for tensor in packed.tensors.values())
            made = 4 * math.prod(sizes[-1])
            found.append(Layer(4 * (math.prod(sizes[link.source]) + more) + made, made, weight))
        return at_once(found, pictures, threads)

    def run(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """All convolutions, in order."""
        found = tuple([inputs[0].new_empty(shape) for shape in self._shapes])
        self._steps.run([t.data_ptr() for t in (*inputs, *found)], self.key[0])
        return found


def _linked(
    layer: SparseConv2d,
    packed: Packed,
    link: Link,
    x: Tensor,
    more: Tensor | None,
    around: Sequence[int],
    threads: int,
) -> tuple[Call, tuple[int, int, int, int]] | None:
    """The work of one layer without the pointers to values, and the shape of what it makes.

    None where nothing is made, where what is added is of another shape, or where bounds are met twice.
    """
    call, shape = arranged(packed, x, layer.stride, layer.padding, layer.dilation, threads)
    call.low, call.high = _both(layer.between, link.between)
    call.x_row, call.x_plane = _apart(x)
    call.x_around = around[link.source] if _zeros(layer, packed) else 0
    point(call, packed)
    sums = more is None or (_adds(call, link, more, shape) and layer.between == ANY)
    return (call, shape) if math.prod(shape) and sums and call.low <= call.high else None


class Ending(ctypes.Structure):
    """`MeanLinear` of kernels/mean_linear.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "y", "weight", "bias")),
        *((name, ctypes.c_int64) for name in ("pictures", "channels", "height", "width", "row", "plane", "outputs")),
    )


def _ending(head: nn.Linear, value: Tensor) -> Ending | None:
    """What computes the head of a chain from a value, or None where torch has to."""
    weight, bias, (pictures, channels, high, wide) = head.weight, head.bias, value.shape
    plain = all(p.dtype is torch.float32 and p.is_cpu and p.is_contiguous() for p in head.parameters())
    if not plain or weight.shape[1] != channels or not value.numel():
        return None
    row, plane = (wide, high * wide) if value.is_contiguous() else _apart(value)
    pointers = value.data_ptr(), None, weight.data_ptr(), None if bias is None else bias.data_ptr()
    return Ending(*pointers, pictures, channels, high, wide, row, plane, weight.shape[0])


def _around(chain: ConvChain, held: Sequence[Packed], outputs: Sequence[int]) -> list[int]:
    """How many rows and columns of zeros to keep around each value, so that it is read where it lies: 0 for none.

    Only where the kernel of its layer knows of them, and all that convolve it do.
    """
    layers: list[SparseConv2d] = list(chain.layers)  # type: ignore[arg-type]  # a ModuleList says Module
    alone = [
        isinstance(p.format, GroupCols) and (p.format.taps, c.stride, c.padding) == (1, (1, 1), (0, 0))
        for p, c in zip(held, layers, strict=True)
    ]  # convolutions of pixels, which take them without gaps
    wanted = [_zeros(layer, packed) for layer, packed in zip(layers, held, strict=True)]
    found = [0] * (chain.inputs + len(layers))
    for n, packed in enumerate(held):
        value = chain.inputs + n
        readers = [i for i, link in enumerate(chain.links) if link.source == value]
        knows = isinstance(packed.format, GroupCols) and not any(alone[i] for i in (n, *readers))
        if knows and value not in outputs:
            # Or as around what it is made from: then the pixels of both follow one another alike.
            found[value] = max((wanted[i] for i in readers), default=0) or min(found[chain.links[n].source], wanted[n])
    return found


def _zeros(layer: SparseConv2d, packed: Packed) -> int:
    """How many rows and columns of zeros a layer wants around what it convolves, to read it where it lies.

    One that loads an input often wants none: its kernel lays pictures out anew, so that no load lies across two lines.
    """
    form, pad = packed.format, layer.padding[0]
    if not isinstance(form, GroupCols) or layer.stride != (1, 1) or layer.padding != (pad, pad):
        return 0
    same = form.high == form.wide and all(2 * pad == (form.high - 1) * apart for apart in layer.dilation)
    least = OFTEN.get(kernels.level(), OFTEN_ELSEWHERE)
    often = form.loads(packed) > least * form.wide * form.inputs(packed.shape)
    return 0 if often or not same else pad


@dataclass(frozen=True)
class _Value:
    """What a layer reads or makes: all pictures, or with rooms those on their way through a stretch, once a thread."""

    tensor: Tensor  # of the first room
    room: int = 0  # floats from one room to the next, or 0

    @property
    def alone(self) -> bool:
        return self.room > 0

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)


def _room(around: int, shape: tuple[int, ...], rooms: int) -> _Value:
    """Memory for a value, or for so many threads: rows, and channels, with zeros between them."""
    pictures, channels, high, wide = shape
    row = wide + around  # the zeros behind a row are those before the next
    plane = row * (high + 2 * around)
    if plane % APART == 0:  # channels would push one another out of the caches
        plane += LINE
    floats = pictures * channels * plane + (BEYOND + 4 * around * row if around else 0)
    each = -(-floats // LINE) * LINE
    memory = empty((each * max(1, rooms),), FLOAT)
    if around:
        memory.zero_()
    tensor = memory.as_strided(shape, (channels * plane, plane, row, 1), around * row + around)
    return _Value(tensor, each if rooms else 0)


def _given(shape: tuple[int, ...]) -> _Value:
    """What is given back, as torch has it; its memory is another each time."""
    return _Value(FLOAT.new_empty(shape))


def _strides(shape: Sequence[int]) -> tuple[int, int, int, int]:
    _, channels, high, wide = shape
    return channels * high * wide, high * wide, wide, 1


def _apart(value: Tensor) -> tuple[int, int]:
    """Floats from one row of a value to the next, and from one channel."""
    return value.stride(2), value.stride(1)


def _at(call: Call | Ending, field: str) -> int:
    """The address of a pointer in a struct."""
    return ctypes.addressof(call) + int(getattr(type(call), field).offset)


def _adds(call: Call, link: Link, more: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a value can be added to an outcome of a shape, the struct being told how."""
    call.more_row, call.more_plane = _apart(more)
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
