"""A convolution that holds its weight packed, and the operator through which torch.compile and torch.export see it."""

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats.depth_taps import DepthTaps
from secateur.formats.eager import recorded, transformed
from secateur.formats.group_cols import GroupCols
from secateur.formats.packed import Packed, learns
from secateur.formats.state import loaded, made_of, now, register, weight_of

ANY = (-math.inf, math.inf)
PLACES = "group_cols_places_f32"
"""The kernel that finds, once for inputs of a shape, where each column lies in what the others lay out of them."""
SHAPES = 16
"""Of inputs something is kept for: cuts of a packed weight, plans of a chain; with more it begins anew."""
Pair = tuple[int, int]
Form = GroupCols | DepthTaps
"""The formats that hold a convolution."""
KINDS: dict[int, type[Form]] = {kind.code: kind for kind in (GroupCols, DepthTaps)}


class Call(ctypes.Structure):
    """`Convolution` of kernels/convolution.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "x", "y")),
        *((name, ctypes.c_int64) for name in ("pictures", "channels", "height", "width", "out_height", "out_width")),
        *((name, ctypes.c_int64) for name in ("taps_high", "taps_wide", "stride_high", "stride_wide")),
        *((name, ctypes.c_int64) for name in ("pad_high", "pad_wide", "apart_high", "apart_wide")),
        *((name, ctypes.c_int64) for name in ("chunk", "chunks", "parts")),
        ("low", ctypes.c_float),
        ("high", ctypes.c_float),
        ("more", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("more_step", "more_first", "more_channels", "more_height", "more_width")),
        *((name, ctypes.c_int64) for name in ("x_row", "x_plane", "y_row", "y_plane", "more_row", "more_plane")),
        ("x_around", ctypes.c_int64),
        ("places", ctypes.c_void_p),
    )


def convolve(
    packed: Packed,
    x: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    between: tuple[float, float] = ANY,
) -> Tensor:
    """The convolution of x [pictures, channels, high, wide] with a packed weight and its bias, held within bounds.

    (0, inf) is ReLU and (0, 6) ReLU6. Where no kernel is compiled, a gradient is asked for, or torch looks on
    (`formats.eager`), it goes through the dense weight, which is then kept. Raises FormatError for a weight that was
    packed from a matrix, for another dtype, shape or device, and when the tensors were changed after packing.
    """
    return convolved(packed, x, stride, padding, dilation, between, plainly=recorded())


def convolved(
    packed: Packed,
    x: Tensor,
    stride: Pair,
    padding: Pair,
    dilation: Pair,
    between: tuple[float, float],
    plainly: bool = False,
) -> Tensor:
    """The same, for who has asked whether torch looks on: `plainly`, through the dense weight in any case."""
    # A small layer takes a few microseconds, so what is asked here is asked in the cheapest way.
    asked = x.shape, stride, padding, dilation, torch.get_num_threads()
    kernel = kernels.find(getattr(packed.format, "convolves", ""))
    if plainly or kernel is None or transformed(x) or learns(x):
        struct, shape = arranged(packed, x, stride, padding, dilation, torch.get_num_threads())
        packed.unchanged()
        form = _form(packed)
        weight = packed.plain.view(shape[1], -1, struct.taps_high, struct.taps_wide)
        y = F.conv2d(x, weight, packed.prepared.bias, stride, padding, dilation, form.groups(packed.shape))
        return y if between == ANY else y.clamp(*between)
    cut = packed.cuts.get(asked) if x.dtype is torch.float32 and x.is_cpu else None
    if cut is None or cut[0] is not kernel:  # each lays x out in its own way
        struct, shape = arranged(packed, x, stride, padding, dilation, torch.get_num_threads())
        point(struct, packed)
        if len(packed.cuts) >= SHAPES:
            packed.cuts.clear()
        items = shape[0] * struct.chunks * struct.parts if math.prod(shape) else 0
        cut = packed.cuts[asked] = kernel, struct, shape, items
    _, struct, shape, items = cut
    packed.unchanged()
    if not x.is_contiguous() or x.is_neg():  # a sign that torch keeps as a mark
        x = x.resolve_neg().contiguous()
    y = x.new_empty(shape)
    call = Call.from_buffer_copy(struct)  # of its own, since threads may call at once
    call.x, call.y, (call.low, call.high) = x.data_ptr(), y.data_ptr(), between
    kernels.run(kernel, call, items)
    return y


def arranged(
    packed: Packed, x: Tensor, stride: Pair, padding: Pair, dilation: Pair, threads: int
) -> tuple[Call, tuple[int, int, int, int]]:
    """The work of a convolution cut into items for some threads, without its pointers, and the shape of the outcome.

    Raises FormatError as `convolve` does.
    """
    form = _form(packed)
    if x.dtype is not torch.float32 or not x.is_cpu or x.dim() != 4 or x.shape[1] != form.inputs(packed.shape):
        held = [packed.shape[0], packed.shape[1] // form.taps, form.high, form.wide]
        raise FormatError(
            f"a {form.name} weight {held} was to convolve {x.dtype} {list(x.shape)} on {x.device}",
            f"it takes torch.float32 [pictures, {form.inputs(packed.shape)}, high, wide] on the CPU",
            "Convert what is given, or pack the layer again.",
        )
    out = out_size(form, x.shape[2:], stride, padding, dilation)
    of_pixels = isinstance(form, GroupCols) and form.taps == 1 and stride == (1, 1) and padding == (0, 0)
    high, wide = (out[0] * out[1], 1) if of_pixels else out
    chunk, parts = form.cut(packed.shape, (high, wide), x.shape[0], threads)
    chunks = max(1, -(-high // chunk))
    chunk = -(-high // chunks)  # as even as can be
    sizes = (*x.shape, *out, form.high, form.wide, *stride, *padding, *dilation, chunk, chunks, parts)
    call = Call(None, None, None, *sizes)
    call.x_row, call.x_plane = x.shape[3], x.shape[2] * x.shape[3]
    call.y_row, call.y_plane = call.more_row, call.more_plane = out[1], out[0] * out[1]
    return call, (x.shape[0], packed.shape[0], *out)


def point(call: Call, packed: Packed) -> None:
    """Let the work of a convolution point to the weight, and to where its columns lie in x as arranged."""
    weight, form = packed.prepared.weight, packed.format
    call.weight = ctypes.addressof(weight)
    kernel = kernels.find(PLACES) if isinstance(form, GroupCols) else None
    if kernel is not None:
        call.found = torch.empty_like(weight.laid["columns"])  # kept as long as the struct
        call.places = call.found.data_ptr()
        kernels.run(kernel, call, weight.laid["rows"].shape[0])


def out_size(form: Form, size: Sequence[int], stride: Pair, padding: Pair, dilation: Pair) -> Pair:
    """How high and wide the outcome is. Raises FormatError when the padded picture is smaller than the kernel."""
    high, wide = (
        (of + 2 * pad - apart * (taps - 1) - 1) // step + 1
        for of, taps, step, pad, apart in zip(size, (form.high, form.wide), stride, padding, dilation, strict=True)
    )
    if high < 1 or wide < 1:
        raise FormatError(
            f"a kernel of {form.high}x{form.wide} was to convolve pictures of {size[0]}x{size[1]}",
            f"they are smaller than it, with padding {padding} and dilation {dilation}",
            "Give larger pictures.",
        )
    return high, wide


class SparseConv2d(nn.Module):
    """A convolution with a packed weight and its bias: for inference, on the CPU, in float32.

    Its state holds the packed tensors and their header, so it is saved and loaded like any other. A gradient flows to
    its input, through the dense weight, but not to what is packed.
    """

    def __init__(
        self,
        packed: Packed,
        stride: Pair = (1, 1),
        padding: Pair = (0, 0),
        dilation: Pair = (1, 1),
        between: tuple[float, float] = ANY,
    ) -> None:
        """A layer of a packed weight, whose outcome is held between two numbers. Raises FormatError for a matrix."""
        super().__init__()
        self._hold(packed)
        self.stride, self.padding, self.dilation, self.between = stride, padding, dilation, between

    @classmethod
    def of(cls, conv: nn.Conv2d, format: Form, mask: Tensor | None = None) -> "SparseConv2d":
        """A convolution in a format; without a mask all that is not zero is kept. Raises FormatError on `why_not`."""
        reason = why_not(conv) or format.unsuited(conv.in_channels, conv.groups, conv.out_channels)
        if reason is not None:
            raise FormatError(f"a convolution was to be packed as {format.name}", reason, "Keep it dense.")
        return cls(format.pack(conv.weight, mask, conv.bias), *slide(conv))

    @property
    def packed(self) -> Packed:
        """The weight, as it is held. Raises FormatError when a tensor of it was replaced by one that does not fit."""
        current = now(self, self._packed)
        if current is not self._packed:
            self._hold(current)
        return self._packed

    @property
    def weight(self) -> Tensor:
        """The weight [out, in / groups, high, wide], unpacked when something is computed with it."""
        return weight_of(self, _shape)

    def dense(self) -> nn.Conv2d:
        """The dense layer that this one stands for; what holds its outcome between two numbers is not in it."""
        packed, form = self.packed, _form(self.packed)
        bias = form.bias(packed)
        made = nn.Conv2d(
            form.inputs(packed.shape),
            packed.shape[0],
            (form.high, form.wide),
            self.stride,
            self.padding,
            self.dilation,
            form.groups(packed.shape),
            bias=bool(bias.any()),
            device="meta",
        )
        made.weight = nn.Parameter(packed.dense(), requires_grad=False)
        if made.bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """The outcome of an input [pictures, channels, high, wide], or of one picture.

        Raises FormatError for another dtype, shape or device.
        """
        if recorded() and (torch.compiler.is_compiling() or not (transformed() or learns(input))):
            tensors = [getattr(self, name) for name in self._packed.format.names]
            pairs = (*self.stride, *self.padding, *self.dilation)
            x = input if input.dim() == 4 else input.unsqueeze(0)
            y = packed_conv2d(x, tensors, self._header, pairs, self.between)
            return y if input.dim() == 4 else y.squeeze(0)
        if input.dim() == 3:
            return self(input.unsqueeze(0)).squeeze(0)
        return convolved(self.packed, input, self.stride, self.padding, self.dilation, self.between)

    def extra_repr(self) -> str:
        """Shape, geometry and format."""
        form, shape = _form(self._packed), self._packed.shape
        return (
            f"{form.inputs(shape)}, {shape[0]}, kernel_size=({form.high}, {form.wide}), stride={self.stride}, "
            f"padding={self.padding}, dilation={self.dilation}, {form.name}"
        )

    def _hold(self, packed: Packed) -> None:
        _form(packed)
        self._packed = packed
        self._header = packed.header.tolist()
        register(self, packed)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._hold(loaded(self._packed, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._hold(Packed(self._packed.format, self._packed.shape, self._packed.tensors))  # copied onto itself


def slide(conv: nn.Conv2d) -> tuple[Pair, Pair, Pair]:
    """Stride, padding and dilation of a convolution, padding as numbers."""
    stride, dilation = _pair(conv.stride), _pair(conv.dilation)
    if conv.padding == "same":
        high, wide = (apart * (taps - 1) // 2 for taps, apart in zip(conv.kernel_size, dilation, strict=True))
        return stride, (high, wide), dilation
    return stride, (0, 0) if conv.padding == "valid" else _pair(conv.padding), dilation


def why_not(conv: nn.Conv2d) -> str | None:
    """Why no format can hold how a convolution slides: padding with anything but zeros; None when one can."""
    if conv.padding_mode != "zeros":
        return f"its padding is {conv.padding_mode}, not of zeros"
    even = [taps for taps, apart in zip(conv.kernel_size, conv.dilation, strict=True) if apart * (taps - 1) % 2]
    if conv.padding == "same" and even:
        return f"its padding is the same size of outcome, which for a kernel of {conv.kernel_size} is no whole number"
    return None


def _form(packed: Packed) -> Form:
    if not isinstance(packed.format, Form) or not packed.format.high:
        raise FormatError(
            f"a {packed.format.name} weight {list(packed.shape)} was to convolve",
            "it was packed from a matrix",
            "Pack the weight [out, in, high, wide] of the convolution.",
        )
    return packed.format


def _shape(packed: Packed) -> tuple[int, int, int, int]:
    form = _form(packed)
    return packed.shape[0], packed.shape[1] // form.taps, form.high, form.wide


def _pair(value: Any) -> Pair:
    high, wide = value
    return int(high), int(wide)


# Not `torch.library.custom_op`, which takes three times as long to call.
_OPERATORS: Any = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types
_OPERATORS.define(
    "packed_conv2d(Tensor x, Tensor[] tensors, int[] header, int[] pairs, float[] between) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def packed_conv2d(
    x: Tensor, tensors: Sequence[Tensor], header: Sequence[int], pairs: Sequence[int], between: Sequence[float]
) -> Tensor:
    """A convolution with the weight given by the tensors of its format and its header.

    `pairs` are stride, padding and dilation, `between` the numbers that the outcome is held between.
    """
    made: Tensor = torch.ops.secateur.packed_conv2d.default(x, tensors, header, pairs, between)
    return made


def _convolved(
    x: Tensor, tensors: Sequence[Tensor], header: Sequence[int], pairs: Sequence[int], between: Sequence[float]
) -> Tensor:
    low, high = between
    slides = _pair(pairs[:2]), _pair(pairs[2:4]), _pair(pairs[4:])
    return convolved(made_of(tensors, header), x, *slides, (low, high))


_OPERATORS.impl("packed_conv2d", _convolved, "CPU")


@torch.library.register_fake("secateur::packed_conv2d")  # type: ignore[untyped-decorator]  # nor here
def _(
    x: Tensor, tensors: Sequence[Tensor], header: Sequence[int], pairs: Sequence[int], between: Sequence[float]
) -> Tensor:
    form = KINDS[header[0]](*header[4:])
    stride, padding, dilation = _pair(pairs[:2]), _pair(pairs[2:4]), _pair(pairs[4:])
    return x.new_empty(x.shape[0], header[2], *out_size(form, x.shape[2:], stride, padding, dilation))
