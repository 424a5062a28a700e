"""What every format shares: a packed weight, made of plain tensors, that multiplies and turns back into a dense one."""

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats.eager import recorded, transformed, unseen

VALUES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
"""The dtypes of weights that formats hold, and what kernels call them."""


class Expand(ctypes.Structure):
    """`Expand` of kernels/expand.h."""

    _fields_ = (("weight", ctypes.c_void_p), ("dense", ctypes.c_void_p))


@dataclass(frozen=True)
class Call:
    """What the kernels of a format need: the name of one, the struct it reads, and how many items there are."""

    kernel: str  # empty where none multiplies, and torch does, with the dense weight
    weight: ctypes.Structure
    items: int
    bias: Tensor | None = None  # that the format holds with the weight and its kernels add
    expand: str | None = None  # the kernel that writes the weight out, for a dense product
    many: Mapping[str, int] = field(default_factory=dict)  # rows from which that is faster, at levels where it can be

    @cached_property
    def address(self) -> int:
        """Where the struct is."""
        return ctypes.addressof(self.weight)


class Format(Protocol):
    """A way to keep what survives of a weight matrix. A frozen dataclass: its fields are its settings."""

    names: ClassVar[tuple[str, ...]]  # of its tensors, in the order in which they are passed on
    code: ClassVar[int]  # its number in a header; never given to another
    version: ClassVar[int]  # raised when the layout of the tensors changes

    @property
    def name(self) -> str:
        """What a table calls it: `bitmap`, `2:4`."""
        ...

    @property
    def settings(self) -> tuple[int, ...]:
        """What stands in the header after the shape."""
        ...

    def why_not(self, weight: Tensor, mask: Tensor | None = None) -> str | None:
        """Why this format cannot hold a weight [out, in] that keeps what its mask says; None when it can."""
        ...

    def pack(self, weight: Tensor, mask: Tensor | None = None) -> "Packed":
        """The weight in this format. Without a mask all that is not zero is kept. Raises FormatError on `why_not`."""
        ...

    def dense(self, packed: "Packed") -> Tensor:
        """The dense weight [out, in] that was packed, in torch alone."""
        ...

    def check(self, packed: "Packed") -> None:
        """Raise FormatError unless the tensors fit the shape and one another."""
        ...

    def call(self, packed: "Packed") -> Call:
        """What its kernels are called with."""
        ...


@dataclass(frozen=True, eq=False)
class Packed:
    """A weight matrix in a format: multiplies, and turns back into the dense one."""

    format: Format
    shape: tuple[int, int]  # outputs, inputs
    tensors: Mapping[str, Tensor]  # contiguous, on the CPU; "values" among them

    def __post_init__(self) -> None:
        _ = self._watched  # as they are now

    def __reduce__(self) -> tuple[type["Packed"], tuple[Format, tuple[int, int], dict[str, Tensor]]]:
        # What is kept for calls points to the tensors of this one, so a copy makes its own.
        return Packed, (self.format, self.shape, dict(self.tensors))

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight, and so of what it multiplies: that of the scales, where there are some."""
        return self.tensors["scales" if "scales" in self.tensors else "values"].dtype

    @property
    def nbytes(self) -> int:
        """What the packed weight takes in memory."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    @property
    def header(self) -> Tensor:
        """Which format this is, to be saved beside the tensors: code, version, outputs, inputs, settings."""
        return torch.tensor([self.format.code, self.format.version, *self.shape, *self.format.settings])

    def dense(self) -> Tensor:
        """The weight [out, in] as it was packed; what was not kept is zero."""
        return self.format.dense(self)

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x W^T + bias, for x [..., inputs] of the weight's dtype.

        Where no kernel is compiled, a gradient is asked for, or torch looks on (`formats.eager`), it goes through the
        dense weight, which is then kept. Raises FormatError for another dtype, shape or device, and when the tensors
        were changed after packing.
        """
        return self.multiplied(x, bias, plainly=recorded())

    def multiplied(self, x: Tensor, bias: Tensor | None = None, plainly: bool = False) -> Tensor:
        """The same, for who has asked whether torch looks on: `plainly`, through the dense weight in any case."""
        # A small layer takes a few microseconds, so what is asked here is asked in the cheapest way, and once: where a
        # large weight has just gone through the caches, each look takes several itself.
        dims = [*x.shape]
        if x.dtype is not self._dtype or dims[-1:] != self._width or not x.is_cpu:
            raise FormatError(
                f"{self._said} was to multiply {x.dtype} {list(x.shape)} on {x.device}",
                f"it takes {self.dtype} [..., {self.shape[1]}] on the CPU",
                "Convert what is given, or pack the layer again in its dtype.",
            )
        if bias is not None and (bias.dtype is not self._dtype or bias.shape != self.shape[:1] or bias.stride(0) != 1):
            raise FormatError(
                f"{self._said} was to add a bias {bias.dtype} {list(bias.shape)}",
                f"it takes {self.dtype} [{self.shape[0]}], contiguous",
                "Convert the bias.",
            )
        self.unchanged()
        call = self.prepared
        kernel = kernels.find(call.kernel)
        if plainly or kernel is None or transformed(x, bias) or learns(x, bias):
            y = F.linear(x, self.plain, bias)
            return y if call.bias is None else y + call.bias
        numbers = x.numel()
        expand = self.writes(numbers)
        if expand is not None:
            return F.linear(x, self.written(expand, torch.empty(self.shape, dtype=self.dtype)), bias)
        # As many rows as there are, whatever its axes; of a conjugate's imaginary part torch keeps the sign as a mark.
        x = x.resolve_neg().contiguous()
        bias = None if bias is None else bias.resolve_neg()
        inputs = dims[-1]
        dims[-1] = self.shape[0]
        y = x.new_empty(*dims)
        kernels.matmul(kernel, call.address, x, y, bias, numbers // inputs, call.items)
        return y

    def writes(self, numbers: int) -> kernels.Kernel | None:
        """What writes the dense weight out, where torch's product with it is faster for so many numbers of x."""
        call = self.prepared
        least = call.many.get(kernels.level()) if call.many else None
        # Of other widths torch's product of 16 bits reads past the end of a row, and an infinity there spoils the row.
        if call.expand is None or least is None or self.shape[1] % 32 or numbers < least * self.shape[1]:
            return None
        return kernels.find(call.expand)

    def written(self, kernel: kernels.Kernel, into: Tensor) -> Tensor:
        """The dense weight, as a kernel writes it into a matrix of its shape and dtype: not kept."""
        call = Expand(ctypes.addressof(self.prepared.weight), into.data_ptr())
        kernels.run(kernel, call, self.prepared.items)
        return into

    def unchanged(self) -> None:
        """Raise FormatError when the tensors were changed after packing."""
        for tensor, version in self._watched:
            if tensor._version != version:
                raise FormatError(
                    f"{self._said} was to multiply",
                    "its tensors were changed after packing",
                    "Change the dense weight and pack it again.",
                )

    @cached_property
    def prepared(self) -> Call:
        """What its kernels are called with, made once."""
        with unseen():
            return self.format.call(self)

    @cached_property
    def beside(self) -> list["Packed"]:
        """Others that share its first tensor (`formats.state.made_of`)."""
        return []

    @cached_property
    def chains(self) -> list[Any]:
        """Chains that begin with it, by what an operator was given for them (`formats.linear_chain`)."""
        return []

    @cached_property
    def cuts(self) -> dict[Any, Any]:
        """How `formats.conv` cuts the work into items, by the shape of what is convolved and how."""
        return {}

    @cached_property
    def plain(self) -> Tensor:
        """The dense weight as a matrix, made once and kept."""
        with unseen():
            return self.dense().flatten(1)

    @cached_property
    def _watched(self) -> tuple[tuple[Tensor, int], ...]:
        # Tensors of inference mode count no versions, and cannot be changed outside it.
        return tuple((t, t._version) for t in self.tensors.values() if not t.is_inference())

    @cached_property
    def _dtype(self) -> torch.dtype:
        return self.dtype

    @cached_property
    def _width(self) -> list[int]:
        return [self.shape[1]]

    @property
    def _said(self) -> str:
        return f"a {self.format.name} weight {list(self.shape)}"


def learns(*tensors: Tensor | None) -> bool:
    """Whether a gradient is asked for."""
    for tensor in tensors:
        if tensor is not None and tensor.requires_grad:
            return torch.is_grad_enabled()
    return False


def unsuited(weight: Tensor, mask: Tensor | None) -> str | None:
    """Why no format could hold a weight: not a matrix, of another dtype, or with a mask of another shape."""
    if weight.dim() != 2 or not weight.numel():
        return f"it is {list(weight.shape)}, not a matrix"
    if weight.dtype not in VALUES:
        return f"its dtype is {weight.dtype}, and there is one of {', '.join(map(str, VALUES))}"
    if mask is not None and (mask.dtype is not torch.bool or mask.shape != weight.shape):
        return f"its mask is {mask.dtype} {list(mask.shape)}, not bool {list(weight.shape)}"
    return None


def refuse(format: Format, weight: Tensor, mask: Tensor | None) -> None:
    """Raise FormatError when a format cannot hold a weight."""
    reason = format.why_not(weight, mask)
    if reason is not None:
        raise FormatError(
            f"a weight was to be packed as {format.name}", reason, "Keep it dense, or take another format."
        )


def kept(weight: Tensor, mask: Tensor | None) -> Tensor:
    """What is kept of a weight: where its mask says so, or all that is not zero."""
    return weight != 0 if mask is None else mask


def pointer(tensor: Tensor) -> int:
    """Where a tensor's data begin, for a struct."""
    return tensor.data_ptr()


def whole(packed: Packed) -> Packed:
    """A packed weight whose tensors, come from somewhere else, fit together. Raises FormatError when they do not."""
    format, given = packed.format, packed.tensors
    if min(packed.shape) < 1:
        raise broken(packed, "a weight has an output and an input at least")
    if set(given) != set(format.names):
        raise broken(packed, f"it has {', '.join(sorted(given))} where {', '.join(format.names)} belong")
    for name, tensor in given.items():
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            where = f"on {tensor.device}" if tensor.device.type != "cpu" else f"of strides {tensor.stride()}"
            raise FormatError(
                f"a {format.name} weight {list(packed.shape)} was to be read",
                f"its {name} are {where}",
                "Give contiguous tensors on the CPU.",
            )
    if packed.dtype not in VALUES:
        raise broken(packed, f"its dtype is {packed.dtype}")
    format.check(packed)
    return packed


def broken(packed: Packed, found: str) -> FormatError:
    """The error for a packed weight that is not whole."""
    return FormatError(
        f"a {packed.format.name} weight {list(packed.shape)} was to be read",
        found,
        "The file is damaged or was made by something else: pack the dense weight again.",
    )
