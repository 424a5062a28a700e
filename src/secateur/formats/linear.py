"""A linear layer that holds its weight packed, and the operator through which torch.compile and torch.export see it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import FormatError
from secateur.formats.eager import recorded, transformed
from secateur.formats.packed import Format, Packed, learns
from secateur.formats.state import loaded, made_of, now, register, weight_of


class SparseLinear(nn.Module):
    """A linear layer on a packed weight: for inference, on the CPU, in the dtype it was packed in.

    Its state holds the packed tensors and their header, so it is saved and loaded like any other. A gradient flows to
    its input and its bias, through the dense weight, but not to what is packed.
    """

    bias: nn.Parameter | None

    def __init__(self, packed: Packed, bias: Tensor | None = None) -> None:
        """A layer of a packed weight [out, in] and a bias [out]. Raises FormatError when they do not fit."""
        super().__init__()
        self.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach(), requires_grad=False))
        self._hold(packed)

    @classmethod
    def of(cls, linear: nn.Linear, format: Format, mask: Tensor | None = None) -> "SparseLinear":
        """A linear layer in a format; without a mask all that is not zero is kept. Raises FormatError on `why_not`."""
        return cls(format.pack(linear.weight, mask), linear.bias)

    @property
    def packed(self) -> Packed:
        """The weight, as it is held. Raises FormatError when a tensor of it was replaced by one that does not fit."""
        current = now(self, self._packed)
        if current is not self._packed:
            self._hold(current)
        return self._packed

    @property
    def weight(self) -> Tensor:
        """The weight [out, in], unpacked when something is computed with it: for networks that ask for its dtype."""
        return weight_of(self, lambda packed: packed.shape)

    def dense(self) -> nn.Linear:
        """The dense layer that this one stands for."""
        outputs, inputs = self.packed.shape
        made = nn.Linear(inputs, outputs, bias=self.bias is not None, dtype=self.packed.dtype, device="meta")
        made.weight = nn.Parameter(self.packed.dense())
        made.register_parameter("bias", self.bias)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """x W^T + bias. Raises FormatError for another dtype, shape or device."""
        if recorded() and (torch.compiler.is_compiling() or not (transformed() or learns(input, self.bias))):
            tensors = [getattr(self, name) for name in self._packed.format.names]
            return packed_linear(input, self.bias, tensors, self._header)
        held, buffers = self._packed, self._buffers  # not by attribute: a module takes a microsecond to find one
        for name, tensor in held.tensors.items():
            if buffers[name] is not tensor:
                held = self.packed
        return held.multiplied(input, self._parameters["bias"])

    def extra_repr(self) -> str:
        """Shape and format."""
        outputs, inputs = self._packed.shape
        return f"in_features={inputs}, out_features={outputs}, bias={self.bias is not None}, {self._packed.format.name}"

    def _hold(self, packed: Packed) -> None:
        outputs = packed.shape[0]
        if self.bias is not None and (self.bias.dtype is not packed.dtype or self.bias.shape != (outputs,)):
            raise FormatError(
                f"a layer was to be made of a {packed.format.name} weight {packed.dtype} {list(packed.shape)}",
                f"its bias is {self.bias.dtype} {list(self.bias.shape)}",
                f"Give one of {packed.dtype} [{outputs}].",
            )
        self._packed = packed
        self._header = packed.header.tolist()
        register(self, packed)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        self._hold(loaded(self._packed, state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._hold(Packed(self._packed.format, self._packed.shape, self._packed.tensors))  # copied onto itself


class SparsePointwise(nn.Module):
    """A 1x1 convolution as the linear layer it is in every pixel: for pictures of so few that lanes would be empty."""

    def __init__(self, linear: SparseLinear) -> None:
        """A convolution, without stride, padding and groups, by a linear layer of its channels."""
        super().__init__()
        self.linear = linear

    @classmethod
    def of(cls, conv: nn.Conv2d, format: Format, mask: Tensor | None = None) -> "SparsePointwise":
        """A convolution in a format of matrices; without a mask all that is not zero is kept.

        Raises FormatError where it looks at more than its pixel, and on `why_not`.
        """
        reason = why_no_linear(conv)
        if reason is not None:
            raise FormatError(f"a convolution was to be packed as {format.name}", reason, "Keep it dense.")
        mask = None if mask is None else mask.flatten(1)
        return cls(SparseLinear(format.pack(conv.weight.flatten(1), mask), conv.bias))

    @property
    def packed(self) -> Packed:
        """The weight, as a matrix."""
        return self.linear.packed

    @property
    def weight(self) -> Tensor:
        """The weight [out, in, 1, 1], unpacked when something is computed with it."""
        return weight_of(self.linear, lambda packed: (*packed.shape, 1, 1))

    def dense(self) -> nn.Conv2d:
        """The dense layer that this one stands for."""
        linear = self.linear.dense()
        made = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, device="meta")
        made.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
        made.register_parameter("bias", linear.bias)
        return made

    def forward(self, input: Tensor) -> Tensor:
        """[pictures, channels, high, wide], or one picture. Raises FormatError for another dtype, shape or device."""
        return self.linear(input.movedim(-3, -1)).movedim(-1, -3).contiguous()


def why_no_linear(conv: nn.Conv2d) -> str | None:
    """Why a convolution is no linear layer in every pixel; None when it is one."""
    alone = conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding in ((0, 0), "valid", "same")
    return None if alone and conv.groups == 1 else "it looks at more than one pixel of all channels, or leaves some out"


# Not `torch.library.custom_op`, which takes three times as long to call: there are hundreds of calls in a token.
_OPERATORS: Any = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types
_OPERATORS.define(
    "packed_linear(Tensor x, Tensor? bias, Tensor[] tensors, int[] header) -> Tensor", tags=torch.Tag.pt2_compliant_tag
)


def packed_linear(x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], header: Sequence[int]) -> Tensor:
    """x W^T + bias for a weight given by the tensors of its format, in the order of its names, and its header."""
    made: Tensor = torch.ops.secateur.packed_linear.default(x, bias, tensors, header)
    return made


def _multiplied(x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], header: Sequence[int]) -> Tensor:
    return made_of(tensors, header).multiplied(x, bias)


_OPERATORS.impl("packed_linear", _multiplied, "CPU")


@torch.library.register_fake("secateur::packed_linear")  # type: ignore[untyped-decorator]  # nor here
def _(x: Tensor, bias: Tensor | None, tensors: Sequence[Tensor], header: Sequence[int]) -> Tensor:
    return x.new_empty(*x.shape[:-1], header[2])
