"""Which formats are worth trying for a layer on what it sees, and why the others are not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur import kernels
from secateur.formats import Bitmap, BitmapInt8, DepthTaps, Format, GroupCols, KBlocked, SellBlocked
from secateur.formats import conv as convolutions
from secateur.formats.conv import Form
from secateur.formats.linear import why_no_linear
from secateur.task import Batch

FORMATS: tuple[Format, ...] = (
    Bitmap(),
    SellBlocked(),
    *(GroupCols(rows) for rows in (1, 2, 4, 8)),
    *(KBlocked(depth) for depth in (128, 256)),
    DepthTaps(),
)
"""What is tried for a layer, unless other formats are asked for: of these a convolution takes `GroupCols`, and a
depthwise one `DepthTaps`."""

Layer = nn.Linear | nn.Conv2d

WORTH = 0.3  # sparsity below which no format was ever faster with many rows, or in float32: such layers are not packed
SHARED = 0.15  # the same for groups of FEWEST_SHARED outputs and more, which share what they load
FEWEST_SHARED = 4
SMALL = 2**14  # weights of a convolution that is tried whatever its zeros
FEW = 16  # rows of 16 bits up to which a bitmap of a whole weight is read faster than F.linear reads the weight
FEWEST, FEWEST_SINGLE = 16, 4  # rows of an input below which the lanes of `GroupCols` and `KBlocked` are empty
SINGLE, MOST_SINGLE = 0.8, 64  # zeros from which, and rows up to which, `KBlocked` is tried beside a matrix unit
FULLEST = 0.8  # of what groups store that must not be zero: with less, smaller groups do less


@dataclass(frozen=True)
class Slide:
    """How a kernel goes over the pictures of the example."""

    pictures: int
    size: tuple[int, int]  # of a picture: high, wide
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int = 1


@dataclass(frozen=True)
class Seen:
    """The input a layer has when the model sees the example; the largest, where it is called often."""

    shape: tuple[int, ...]
    last: bool  # whether its channels lie beside one another

    def rows(self, layer: Layer) -> int:
        """Rows of a linear layer's input, pixels of a convolution's outcome."""
        if isinstance(layer, nn.Linear):
            return math.prod(self.shape[:-1])
        of = zip(self.shape[2:], layer.kernel_size, *convolutions.slide(layer), strict=True)
        high, wide = ((n + 2 * pad - apart * (taps - 1) - 1) // step + 1 for n, taps, step, pad, apart in of)
        return self.shape[0] * high * wide

    def slid(self, layer: nn.Conv2d) -> Slide:
        """How the kernel goes over it."""
        return Slide(self.shape[0], (self.shape[2], self.shape[3]), *convolutions.slide(layer), layer.groups)

    def example(self, layer: Layer) -> Tensor:
        """Noise of that shape."""
        x = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(layer.weight.dtype)
        return x.to(memory_format=torch.channels_last) if self.last else x


def seen_by(model: nn.Module, layers: Mapping[str, Layer], batch: Batch) -> dict[str, Seen]:
    """The inputs of the layers that the example reaches."""
    found: dict[str, Seen] = {}

    def hook(name: str) -> Any:
        def see(layer: nn.Module, args: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> None:
            x = args[0] if args else named["input"]
            shape = (x.numel() // x.shape[-1], x.shape[-1]) if isinstance(layer, nn.Linear) else tuple(x.shape)
            shape = shape if len(shape) != 3 else (1, *shape)  # one picture
            if name not in found or math.prod(found[name].shape) < x.numel():
                last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
                found[name] = Seen(shape, last)

        return see

    handles = [layer.register_forward_pre_hook(hook(name), with_kwargs=True) for name, layer in layers.items()]
    try:
        batch.through(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def holds(format: Format, shape: tuple[int, ...], slid: Slide | None) -> bool:
    """Whether a format is for layers of a weight's shape: matrices, or convolutions of so many groups."""
    if slid is None:
        return not isinstance(format, DepthTaps)
    return isinstance(format, Form) and format.unsuited(shape[1] * slid.groups, slid.groups, shape[0]) is None


def worth_trying(formats: Sequence[Format], weight: Tensor, rows: int) -> list[Format]:
    """The formats that may be faster for a weight: below a sparsity only groups of several outputs, in float32, and
    bitmaps for a few rows of 16 bits. Small convolutions are tried even whole: a call of torch's takes longer."""
    if (sparsity := sparsity_of(weight)) >= WORTH:
        return list(formats)
    shared: list[Format] = [f for f in formats if isinstance(f, GroupCols) and f.rows >= FEWEST_SHARED]
    if weight.dtype is torch.float32 and weight.dim() == 4 and weight.numel() <= SMALL:
        return [*shared, *(format for format in formats if isinstance(format, DepthTaps))]
    if sparsity >= SHARED and weight.dtype is torch.float32:
        return shared
    if rows > FEW or weight.dtype is torch.float32 or weight.dim() > 2:
        return []
    return [format for format in formats if isinstance(format, (Bitmap, BitmapInt8))]


def why_not(format: Format, layer: Layer, seen: Seen) -> str | None:
    """Why a format is not tried for a layer; None when it is."""
    reason: str | None = None
    if isinstance(layer, nn.Conv2d):
        if not isinstance(format, Form):
            if seen.rows(layer) >= FEWEST or why_no_linear(layer) is not None:
                return "it holds no convolution"
            return format.why_not(layer.weight.flatten(1))
        reason = format.unsuited(layer.in_channels, layer.groups, layer.out_channels)
    reason = reason or format.why_not(layer.weight)
    if reason is not None or not isinstance(format, (GroupCols, KBlocked)):
        return reason
    fewest = FEWEST_SINGLE if isinstance(format, KBlocked) else FEWEST
    if (rows := seen.rows(layer)) < fewest and not isinstance(layer, nn.Conv2d):  # in a chain it may make up for that
        return f"{rows} rows leave its lanes empty"
    if isinstance(format, KBlocked):
        return _why_not_single(layer.weight, rows)
    full = format.fullness(layer.weight)
    return f"{full:.0%} of what its groups store is not zero" if full < FULLEST else None


def _why_not_single(weight: Tensor, rows: int) -> str | None:
    """Why `KBlocked` is not tried: a matrix unit multiplies whole weights faster, but for few that are left."""
    if weight.dtype is torch.float32 or (weight.dtype is torch.bfloat16 and kernels.level() != "amx"):
        return None
    if weight.dtype is torch.float16:
        return "it is for float32 and bfloat16"
    if rows > MOST_SINGLE:
        return f"in bfloat16 it is for up to {MOST_SINGLE} rows beside a matrix unit"
    zeros = sparsity_of(weight)
    return (
        None if zeros >= SINGLE else f"beside a matrix unit it is for {SINGLE:.0%} zeros and more, and {zeros:.0%} are"
    )


def sparsity_of(weight: Tensor) -> float:
    """The share of a weight that is zero."""
    return float((weight == 0).sum()) / weight.numel()
