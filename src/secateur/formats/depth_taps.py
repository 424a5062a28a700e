"""Depthwise convolutions of which a few taps are kept: a loop for each number of taps skips all others."""

import ctypes
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from secateur.errors import SettingError
from secateur.formats.packed import Call, Packed, broken, kept, pointer, refuse

MOST_TAPS = 63
"""Taps a kernel may have: a shape is a bit for each in a number of 64 bits, and none of them is its sign."""

MOST_SHAPES = 2**15 - 1

PIXELS = 4096
"""Of an item, so that what a channel sees and its outcome stay in the first cache."""


class Struct(ctypes.Structure):
    """`DepthTaps` of kernels/depth_taps.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("channels", "taps")),
        *((name, ctypes.c_void_p) for name in ("values", "shapes", "which", "begins")),
    )


@dataclass(frozen=True)
class DepthTaps:
    """For every channel of a depthwise convolution the taps it keeps, and which of a few shapes they make.

    values [channels + kept]: of each channel its bias, then its taps, along the rows of the kernel
    shapes [shapes], int64: a bit for every tap that a shape keeps, the first tap lowest; rising
    which [channels], int16: the shape of each

    Channels of any mask are held; where they share few shapes, as `axes.Taps` leaves them, the table is small. It is
    convolved with `formats.conv`; `matmul` takes it as a matrix [channels, taps].

    Source: Xu, Liu, Xu, Wang, Li, Yan, Li, Fu, Pan, Chen. "SparseByteNN: A Novel Mobile Inference Acceleration
    Framework Based on Fine-Grained Group Sparsity." 2023. arXiv:2310.19509, which prunes depthwise kernels to patterns
    and publishes no layout of them.
    """

    high: int = 0  # of the kernel, as `pack` finds it
    wide: int = 0

    names: ClassVar[tuple[str, ...]] = ("values", "shapes", "which")
    code: ClassVar[int] = 7
    version: ClassVar[int] = 1
    convolves: ClassVar[str] = "depth_taps_conv_f32"

    def __post_init__(self) -> None:
        if not 0 <= self.high * self.wide <= MOST_TAPS or min(self.high, self.wide) < 0:
            raise SettingError(
                f"a depthwise kernel of {self.high}x{self.wide} was asked for",
                f"a shape has room for {MOST_TAPS} taps",
                "Leave it: `pack` finds it.",
            )

    @property
    def name(self) -> str:
        """`depth-taps`."""
        return "depth-taps"

    @property
    def settings(self) -> tuple[int, ...]:
        """The kernel."""
        return self.high, self.wide

    @property
    def taps(self) -> int:
        """Of a kernel."""
        return max(1, self.high * self.wide)

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """Anything but a depthwise convolution in float32, of up to 63 taps and 32,767 shapes of kernels."""
        if weight.dim() != 4 or weight.shape[1] != 1 or not weight.numel():
            return f"it is {list(weight.shape)}, not a depthwise convolution [channels, 1, high, wide]"
        if weight.dtype is not torch.float32:
            return f"its dtype is {weight.dtype}, and there is one of torch.float32"
        if mask is not None and (mask.dtype is not torch.bool or mask.shape != weight.shape):
            return f"its mask is {mask.dtype} {list(mask.shape)}, not bool {list(weight.shape)}"
        if weight[0].numel() > MOST_TAPS:
            return f"its kernels have {weight[0].numel()} taps, more than {MOST_TAPS}"
        shapes = len(set(_shapes(kept(weight, mask)).tolist()))
        return f"its kernels have {shapes:,} shapes, more than {MOST_SHAPES:,}" if shapes > MOST_SHAPES else None

    def unsuited(self, channels: int, groups: int, outputs: int) -> str | None:
        """Why a convolution of so many inputs, groups and outputs cannot be held; None when it can."""
        if groups == channels == outputs and channels > 1:
            return None
        return f"it is not depthwise: {groups} groups of {channels} inputs and {outputs} outputs"

    def pack(self, weight: Tensor, mask: Tensor | None = None, bias: Tensor | None = None) -> Packed:
        """The weight [channels, 1, high, wide], and with it a bias [channels].

        Without a mask all that is not zero is kept. Raises FormatError on `why_not`.
        """
        refuse(self, weight, mask)
        weight = weight.detach().cpu()
        keep = kept(weight, mask).cpu()
        of = _shapes(keep)
        shapes = torch.tensor(sorted(set(of.tolist())))
        which = torch.searchsorted(shapes, of)
        held = weight.new_zeros(len(weight)) if bias is None else bias.detach().cpu().to(weight.dtype)
        there = torch.cat([torch.ones(len(weight), 1, dtype=torch.bool), keep.flatten(1)], 1)
        values = torch.cat([held.unsqueeze(1), weight.flatten(1)], 1)[there]
        tensors = {"values": values, "shapes": shapes, "which": which.to(torch.int16)}
        found = replace(self, high=weight.shape[2], wide=weight.shape[3])
        return Packed(found, (len(weight), found.taps), tensors)

    def dense(self, packed: Packed) -> Tensor:
        """The weight [channels, 1, high, wide] that was packed."""
        keep = self._kept(packed)
        values = packed.tensors["values"]
        made = values.new_zeros(packed.shape)
        made[keep] = values[~self._biases(packed)]
        return made.view(-1, 1, self.high, self.wide)

    def bias(self, packed: Packed) -> Tensor:
        """The bias [channels] that was packed with the weight, zeros where there was none."""
        return packed.tensors["values"][self._biases(packed)]

    def inputs(self, shape: tuple[int, int]) -> int:
        """Channels of the pictures, for a packed weight of a shape."""
        return shape[0]

    def groups(self, shape: tuple[int, int]) -> int:
        """Of the convolution: each channel by itself."""
        return shape[0]

    def cut(self, shape: tuple[int, int], out: tuple[int, int], pictures: int, threads: int) -> tuple[int, int]:
        """Rows of the outcome in an item, and into how many parts its channels are divided."""
        chunk = max(1, PIXELS // out[1])
        together = max(1, PIXELS // (out[0] * out[1]))  # channels
        return chunk, -(-shape[0] // together)

    def check(self, packed: Packed) -> None:
        """Raise FormatError unless shapes, which and values agree."""
        values, shapes, which = (packed.tensors[name] for name in self.names)
        channels, taps = packed.shape
        if taps != self.high * self.wide:
            raise broken(packed, f"its {taps} taps are no kernel of {self.high}x{self.wide}")
        if (values.dtype, shapes.dtype, which.dtype) != (torch.float32, torch.int64, torch.int16):
            raise broken(packed, f"its {', '.join(self.names)} are not torch.float32, torch.int64, torch.int16")
        if values.dim() != 1 or shapes.dim() != 1 or which.shape != (channels,):
            raise broken(packed, f"its shapes are {list(shapes.shape)} and its channels {list(which.shape)}")
        if (
            not len(shapes)
            or int(shapes.min()) < 0
            or int(shapes.max()) >= 1 << taps
            or bool((shapes.diff() <= 0).any())
        ):
            raise broken(packed, f"its shapes do not rise within {taps} taps")
        if int(which.min()) < 0 or int(which.max()) >= len(shapes):
            raise broken(packed, f"a channel has shape {int(which.max())} of {len(shapes)}")
        if (stored := channels + int(self._kept(packed).sum())) != len(values):
            raise broken(packed, f"its shapes speak of {stored} values, and there are {len(values)}")

    def call(self, packed: Packed) -> Call:
        """No kernel multiplies it: torch does, with the dense weight."""
        bias = self.bias(packed)
        return Call("", self.struct(packed), packed.shape[0], bias if bias.any() else None)

    def struct(self, packed: Packed) -> Struct:
        """What kernels read: the tensors as they are, and where the values of each channel begin."""
        counts = self._kept(packed).sum(1) + 1
        begins = counts.cumsum(0) - counts
        values, shapes, which = (packed.tensors[name] for name in self.names)
        made = Struct(*packed.shape, *(pointer(t) for t in (values, shapes, which, begins)))
        made.kept = (begins,)  # the struct points to it
        return made

    def _kept(self, packed: Packed) -> Tensor:
        """The mask [channels, taps]."""
        of = packed.tensors["shapes"][packed.tensors["which"].long()]
        return (of.unsqueeze(1) >> torch.arange(packed.shape[1]) & 1).bool()

    def _biases(self, packed: Packed) -> Tensor:
        """Which values are biases."""
        counts = self._kept(packed).sum(1) + 1
        found = torch.zeros(len(packed.tensors["values"]), dtype=torch.bool)
        found[counts.cumsum(0) - counts] = True
        return found


def _shapes(keep: Tensor) -> Tensor:
    """The shape of each kernel of a mask [channels, 1, high, wide] as a number."""
    bits: Any = 1 << torch.arange(keep[0].numel(), device=keep.device)
    return (keep.flatten(1) * bits).sum(1)
