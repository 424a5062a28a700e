"""What the operators of ONNX are in torch: one function each, so that a network read from a file can be followed,
measured, trained and cut like any other.

An operator gets its attributes and its inputs, tensors except in the places of `NUMBERS`, which say how a result is
shaped and are numpy arrays. The names and meanings are those of the standard; where a version changed one, the
operator looks at the opset.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """One node of a graph: what it does, to which values, with which attributes."""

    index: int  # its place in the file
    kind: str  # "Conv", or "domain.Kind" outside the standard
    name: str
    inputs: tuple[str, ...]  # "" for one that is left out
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    opset: int = 17

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute, or what it is when it is left out."""
        return self.attributes.get(name, default)


Operator = Callable[..., Any]
OPERATORS: dict[str, Operator] = {}

NUMBERS: dict[str, tuple[int, ...]] = {
    "Clip": (1, 2), "ConstantOfShape": (0,), "CumSum": (1,), "Expand": (1,), "Pad": (1, 2, 3), "Range": (0, 1, 2),
    "ReduceL1": (1,), "ReduceL2": (1,), "ReduceLogSumExp": (1,), "ReduceMax": (1,), "ReduceMean": (1,),
    "ReduceMin": (1,), "ReduceProd": (1,), "ReduceSum": (1,), "ReduceSumSquare": (1,), "Reshape": (1,),
    "Resize": (1, 2, 3), "Slice": (1, 2, 3, 4), "Split": (1,), "Squeeze": (1,), "Tile": (1,), "TopK": (1,),
    "Trilu": (1,), "Unsqueeze": (1,), "Upsample": (1,), "Dropout": (1, 2),
}  # fmt: skip
"""Operator -> the places of inputs that are read as numbers, not as tensors."""


def operator(*names: str) -> Callable[[Operator], Operator]:
    """Decorator: what these operators do."""

    def register(f: Operator) -> Operator:
        OPERATORS.update(dict.fromkeys(names, f))
        return f

    return register


DTYPES = {
    1: torch.float32, 2: torch.uint8, 3: torch.int8, 5: torch.int16, 6: torch.int32, 7: torch.int64, 9: torch.bool,
    10: torch.float16, 11: torch.float64, 16: torch.bfloat16,
}  # fmt: skip
"""Numbers of ONNX's element types -> torch's."""


def ints(value: Any) -> list[int]:
    """Numbers as a list of whole ones."""
    return [int(v) for v in np.atleast_1d(value).reshape(-1)]


# Element by element

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Asin": torch.asin, "Atan": torch.atan, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish,
    "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt,
    "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or, "Pow": torch.pow, "Sub": torch.sub,
    "Xor": torch.logical_xor, "Add": torch.add,
}  # fmt: skip

for _name, _unary in _UNARY.items():
    OPERATORS[_name] = lambda n, x, f=_unary: f(x)
for _name, _binary in _BINARY.items():
    OPERATORS[_name] = lambda n, x, y, f=_binary: f(x, y)


@operator("Identity")
def _identity(n: Node, x: Tensor) -> Tensor:
    return x


@operator("Dropout")
def _dropout(n: Node, x: Tensor, *rest: Any) -> Any:
    return x if len(n.outputs) == 1 else [x, torch.ones_like(x, dtype=torch.bool)]


@operator("Div")
def _div(n: Node, x: Tensor, y: Tensor) -> Tensor:
    whole = not x.is_floating_point() and not y.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc") if whole else torch.div(x, y)


@operator("Mod")
def _mod(n: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if n.get("fmod", 0) else torch.remainder(x, y)


@operator("Sum")
def _sum(n: Node, *xs: Tensor) -> Tensor:
    return _fold(torch.add, xs)


@operator("Max")
def _max(n: Node, *xs: Tensor) -> Tensor:
    return _fold(torch.maximum, xs)


@operator("Min")
def _min(n: Node, *xs: Tensor) -> Tensor:
    return _fold(torch.minimum, xs)


@operator("Mean")
def _mean(n: Node, *xs: Tensor) -> Tensor:
    return _fold(torch.add, xs) / len(xs)


def _fold(f: Callable[[Tensor, Tensor], Tensor], xs: Sequence[Tensor]) -> Tensor:
    total = xs[0]
    for x in xs[1:]:
        total = f(total, x)
    return total


@operator("Where")
def _where(n: Node, condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    return torch.where(condition, x, y)


@operator("Cast")
def _cast(n: Node, x: Tensor) -> Tensor:
    return x.to(DTYPES[int(n.get("to"))])


@operator("CastLike")
def _cast_like(n: Node, x: Tensor, like: Tensor) -> Tensor:
    return x.to(like.dtype)


@operator("Clip")
def _clip(n: Node, x: Tensor, low: Any = None, high: Any = None) -> Tensor:
    low, high = (n.get("min") if low is None else low), (n.get("max") if high is None else high)
    least, most = (None if v is None else float(np.asarray(v).reshape(())) for v in (low, high))
    return x if least is None and most is None else torch.clamp(x, least, most)


@operator("LeakyRelu")
def _leaky_relu(n: Node, x: Tensor) -> Tensor:
    return F.leaky_relu(x, n.get("alpha", 0.01))


@operator("Elu")
def _elu(n: Node, x: Tensor) -> Tensor:
    return F.elu(x, n.get("alpha", 1.0))


@operator("Celu")
def _celu(n: Node, x: Tensor) -> Tensor:
    return F.celu(x, n.get("alpha", 1.0))


@operator("Selu")
def _selu(n: Node, x: Tensor) -> Tensor:
    alpha, gamma = n.get("alpha", 1.67326319217681884765625), n.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * (torch.exp(x) - 1))


@operator("HardSigmoid")
def _hard_sigmoid(n: Node, x: Tensor) -> Tensor:
    return torch.clamp(n.get("alpha", 0.2) * x + n.get("beta", 0.5), 0.0, 1.0)


@operator("Gelu")
def _gelu(n: Node, x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh" if _text(n.get("approximate", "none")) == "tanh" else "none")


@operator("PRelu")
def _prelu(n: Node, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x > 0, x, slope * x)


@operator("Swish")
def _swish(n: Node, x: Tensor) -> Tensor:
    return x * torch.sigmoid(n.get("alpha", 1.0) * x)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


# Products of matrices, convolutions


@operator("MatMul")
def _matmul(n: Node, x: Tensor, y: Tensor) -> Tensor:
    return torch.matmul(x, y)


@operator("Gemm")
def _gemm(n: Node, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    a = a.t() if n.get("transA", 0) else a
    alpha, beta = n.get("alpha", 1.0), n.get("beta", 1.0)
    if n.get("transB", 0) and alpha == beta == 1 and (c is None or c.dim() == 1):
        return F.linear(a, b, c)
    found = a @ (b.t() if n.get("transB", 0) else b)
    found = found if alpha == 1 else alpha * found
    return found if c is None else found + (c if beta == 1 else beta * c)


@operator("Einsum")
def _einsum(n: Node, *xs: Tensor) -> Tensor:
    return torch.einsum(_text(n.get("equation")), *xs)


def _padding(n: Node, x: Tensor, kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and what is padded before and after each spatial dimension."""
    spatial = len(kernel)
    strides = ints(n.get("strides", [1] * spatial))
    dilations = ints(n.get("dilations", [1] * spatial))
    pads = ints(n.get("pads", [0] * 2 * spatial))
    auto = _text(n.get("auto_pad", "NOTSET"))
    if auto in ("SAME_UPPER", "SAME_LOWER"):
        pads = [0] * 2 * spatial
        for d in range(spatial):
            size = x.shape[d - spatial]
            reach = (kernel[d] - 1) * dilations[d] + 1
            need = max(0, (-(-size // strides[d]) - 1) * strides[d] + reach - size)
            less, more = need // 2, need - need // 2
            pads[d], pads[d + spatial] = (less, more) if auto == "SAME_UPPER" else (more, less)
    return strides, dilations, pads[:spatial], pads[spatial:]


def _padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> tuple[Tensor, list[int]]:
    """The input, padded where the two sides differ, and the padding that is left to the operator."""
    if list(before) == list(after):
        return x, list(before)
    sides = [p for pair in zip(reversed(before), reversed(after), strict=True) for p in pair]
    return F.pad(x, sides, value=value), [0] * len(before)


def groups_of(weight: Tensor, was: int, shape: Sequence[int]) -> int:
    """How many groups a convolution has whose weight was of another shape when it had `was`: depthwise ones follow."""
    return was if was == 1 or shape[1] != 1 else len(weight) // max(1, shape[0] // was)


@operator("Conv")
def _conv(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None, *, shape: Sequence[int] = ()) -> Tensor:
    strides, dilations, before, after = _padding(n, x, w.shape[2:])
    x, pads = _padded(x, before, after)
    f: Any = (F.conv1d, F.conv2d, F.conv3d)[w.dim() - 3]
    return f(x, w, b, strides, pads, dilations, groups_of(w, n.get("group", 1), shape or w.shape))


@operator("ConvTranspose")
def _conv_transpose(n: Node, x: Tensor, w: Tensor, b: Tensor | None = None, *, shape: Sequence[int] = ()) -> Tensor:
    spatial = w.dim() - 2
    strides, dilations = ints(n.get("strides", [1] * spatial)), ints(n.get("dilations", [1] * spatial))
    pads = ints(n.get("pads", [0] * 2 * spatial))
    extra = ints(n.get("output_padding", [0] * spatial))
    if pads[:spatial] != pads[spatial:] or n.get("output_shape") is not None:
        raise NotImplementedError
    f: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    return f(x, w, b, strides, pads[:spatial], extra, groups_of(w, n.get("group", 1), shape or w.shape), dilations)


@operator("MaxPool")
def _max_pool(n: Node, x: Tensor) -> Tensor:
    kernel = ints(n.get("kernel_shape"))
    strides, dilations, before, after = _padding(n, x, kernel)
    x, pads = _padded(x, before, after, float("-inf"))
    f: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    if len(n.outputs) > 1:
        raise NotImplementedError
    return f(x, kernel, strides, pads, dilations, bool(n.get("ceil_mode", 0)))


@operator("AveragePool")
def _average_pool(n: Node, x: Tensor) -> Tensor:
    kernel = ints(n.get("kernel_shape"))
    strides, dilations, before, after = _padding(n, x, kernel)
    if (before != after and not n.get("count_include_pad", 0)) or any(d != 1 for d in dilations):
        raise NotImplementedError
    x, pads = _padded(x, before, after)
    f: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return f(x, kernel, strides, pads, bool(n.get("ceil_mode", 0)), bool(n.get("count_include_pad", 0)))


@operator("GlobalAveragePool")
def _global_average_pool(n: Node, x: Tensor) -> Tensor:
    return x.mean(dim=list(range(2, x.dim())), keepdim=True)


@operator("GlobalMaxPool")
def _global_max_pool(n: Node, x: Tensor) -> Tensor:
    return x.amax(dim=list(range(2, x.dim())), keepdim=True)


# Norms


@operator("BatchNormalization")
def _batch_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    return F.batch_norm(x, mean, var, scale, b, False, 0.0, n.get("epsilon", 1e-5))


@operator("InstanceNormalization")
def _instance_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    over = list(range(2, x.dim()))
    centred = x - x.mean(over, keepdim=True)
    spread = (centred * centred).mean(over, keepdim=True)
    view = (1, -1, *[1] * len(over))
    return centred * torch.rsqrt(spread + n.get("epsilon", 1e-5)) * scale.view(view) + b.view(view)


@operator("LayerNormalization")
def _layer_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor | None = None) -> Tensor:
    if len(n.outputs) > 1:
        raise NotImplementedError
    over = x.shape[int(n.get("axis", -1)) % x.dim() :]
    return F.layer_norm(x, over, scale.reshape(over), None if b is None else b.reshape(over), n.get("epsilon", 1e-5))


@operator("RMSNormalization")
def _rms_norm(n: Node, x: Tensor, scale: Tensor) -> Tensor:
    over = x.shape[int(n.get("axis", -1)) % x.dim() :]
    return F.rms_norm(x, over, scale.reshape(over), n.get("epsilon", 1e-5))


@operator("GroupNormalization")
def _group_norm(n: Node, x: Tensor, scale: Tensor, b: Tensor) -> Tensor:
    if n.opset < 21:  # scale and bias were by group
        raise NotImplementedError
    return F.group_norm(x, int(n.get("num_groups")), scale, b, n.get("epsilon", 1e-5))


@operator("LpNormalization")
def _lp_normalization(n: Node, x: Tensor) -> Tensor:
    axis, p = int(n.get("axis", -1)), int(n.get("p", 2))
    return x / (x.abs().sum(axis, keepdim=True) if p == 1 else (x * x).sum(axis, keepdim=True).sqrt())


@operator("Softmax", "LogSoftmax")
def _softmax(n: Node, x: Tensor) -> Tensor:
    f = F.softmax if n.kind == "Softmax" else F.log_softmax
    axis = int(n.get("axis", -1 if n.opset >= 13 else 1)) % x.dim()
    if n.opset >= 13 or axis == x.dim() - 1:
        return f(x, axis)
    return f(x.flatten(axis), axis).reshape(x.shape)  # before opset 13: over all that follows


# Shapes


@operator("Reshape")
def _reshape(n: Node, x: Tensor, shape: Any) -> Tensor:
    wanted = ints(shape)
    if not n.get("allowzero", 0):
        wanted = [x.shape[d] if s == 0 else s for d, s in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def _flatten(n: Node, x: Tensor) -> Tensor:
    axis = int(n.get("axis", 1))
    axis = axis + x.dim() if axis < 0 else axis
    return x.reshape(prod(x.shape[:axis]), -1)


@operator("Transpose")
def _transpose(n: Node, x: Tensor) -> Tensor:
    return x.permute(ints(n.get("perm", list(range(x.dim()))[::-1])))


@operator("Squeeze")
def _squeeze(n: Node, x: Tensor, axes: Any = None) -> Tensor:
    axes = n.get("axes") if axes is None else axes
    gone = [d for d, s in enumerate(x.shape) if s == 1] if axes is None else [a % x.dim() for a in ints(axes)]
    for axis in sorted(gone, reverse=True):
        x = x.squeeze(axis)
    return x


@operator("Unsqueeze")
def _unsqueeze(n: Node, x: Tensor, axes: Any = None) -> Tensor:
    places = ints(n.get("axes") if axes is None else axes)
    for axis in sorted(a % (x.dim() + len(places)) for a in places):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def _concat(n: Node, *xs: Tensor) -> Tensor:
    return torch.cat(xs, int(n.get("axis")))


@operator("Split")
def _split(n: Node, x: Tensor, sizes: Any = None) -> list[Tensor]:
    sizes, axis = (n.get("split") if sizes is None else sizes), int(n.get("axis", 0))
    if sizes is not None:
        return list(torch.split(x, ints(sizes), axis))
    parts = list(torch.chunk(x, len(n.outputs), axis))
    if len(parts) != len(n.outputs):
        raise NotImplementedError
    return parts


@operator("Slice")
def _slice(n: Node, x: Tensor, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None) -> Tensor:
    first, last = ints(n.get("starts") if starts is None else starts), ints(n.get("ends") if ends is None else ends)
    along = n.get("axes") if axes is None else axes
    places = list(range(len(first))) if along is None else ints(along)
    strides = [1] * len(first) if steps is None else ints(steps)
    for axis, a, b, step in zip(places, first, last, strides, strict=True):
        axis %= x.dim()
        if step < 0:
            if step == -1 and a in (-1, x.shape[axis] - 1) and b < -x.shape[axis]:
                x = x.flip(axis)
                continue
            raise NotImplementedError
        start, stop, _ = slice(a, b, step).indices(x.shape[axis])
        x = x[(*[slice(None)] * axis, slice(start, max(start, stop), step))]
    return x


@operator("Pad")
def _pad(n: Node, x: Tensor, pads: Any = None, value: Any = None, axes: Any = None) -> Tensor:
    mode = _text(n.get("mode", "constant"))
    given = ints(n.get("pads") if pads is None else pads)
    places = list(range(x.dim())) if axes is None else [a % x.dim() for a in ints(axes)]
    fill = n.get("value", 0.0) if value is None else float(np.asarray(value).reshape(()))
    sides = {a: (given[i], given[i + len(places)]) for i, a in enumerate(places)}
    flat = [p for d in reversed(range(x.dim())) for p in sides.get(d, (0, 0))]
    while len(flat) > 2 and flat[-1] == flat[-2] == 0:  # outer dimensions that are not padded
        flat = flat[:-2]
    if mode == "constant":
        return F.pad(x, flat, value=fill)
    return F.pad(x, flat, mode={"reflect": "reflect", "edge": "replicate", "wrap": "circular"}[mode])


@operator("Expand")
def _expand(n: Node, x: Tensor, shape: Any) -> Tensor:
    wanted = ints(shape)
    rank = max(len(wanted), x.dim())
    have, wanted = [1] * (rank - x.dim()) + list(x.shape), [1] * (rank - len(wanted)) + wanted
    return x.expand([max(a, b) if 1 in (a, b) else a for a, b in zip(have, wanted, strict=True)])


@operator("Tile")
def _tile(n: Node, x: Tensor, repeats: Any) -> Tensor:
    return x.repeat(ints(repeats))


@operator("Gather")
def _gather(n: Node, x: Tensor, index: Tensor | Any) -> Tensor:
    axis = int(n.get("axis", 0)) % x.dim()
    if not isinstance(index, Tensor):
        where = np.asarray(index)
        if where.ndim == 0:
            return x.select(axis, int(where) % x.shape[axis])
        run = where.reshape(-1)
        if where.ndim == 1 and len(run) and np.array_equal(run, np.arange(run[0], run[0] + len(run))) and run[0] >= 0:
            return x.narrow(axis, int(run[0]), len(run))
        index = torch.from_numpy(np.array(where))
    index = torch.where(index < 0, index + x.shape[axis], index)
    if axis == 0 and x.dim() == 2 and index.dim() >= 1:
        return F.embedding(index, x)
    found = x.index_select(axis, index.reshape(-1))
    return found.reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def _gather_elements(n: Node, x: Tensor, index: Tensor) -> Tensor:
    axis = int(n.get("axis", 0)) % x.dim()
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@operator("DepthToSpace")
def _depth_to_space(n: Node, x: Tensor) -> Tensor:
    b = int(n.get("blocksize"))
    if _text(n.get("mode", "DCR")) == "CRD":
        return F.pixel_shuffle(x, b)
    many, c, h, w = x.shape
    return x.reshape(many, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(many, c // b**2, h * b, w * b)


@operator("SpaceToDepth")
def _space_to_depth(n: Node, x: Tensor) -> Tensor:
    b = int(n.get("blocksize"))
    many, c, h, w = x.shape
    return x.reshape(many, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(many, c * b**2, h // b, w // b)


@operator("Resize", "Upsample")
def _resize(n: Node, x: Tensor, *rest: Any) -> Tensor:
    given = [None if v is None or np.asarray(v).size == 0 else np.asarray(v).reshape(-1) for v in rest]
    wanted: Any = None
    scales: Any = n.get("scales")
    if n.kind == "Upsample" or n.opset < 11:
        scales = given[0] if given else scales
    else:
        scales, wanted = (given + [None] * 3)[1:3]
    if wanted is None:
        wanted = [np.floor(s * f) for s, f in zip(x.shape, np.asarray(scales, np.float64), strict=True)]
    sizes = ints(wanted)
    if n.get("axes") is not None or sizes[:2] != list(x.shape[:2]):
        raise NotImplementedError
    if sizes == list(x.shape):
        return x
    mode = _text(n.get("mode", "nearest"))
    how = _text(n.get("coordinate_transformation_mode", "asymmetric" if n.opset < 11 else "half_pixel"))
    spatial = len(sizes) - 2
    if mode == "nearest":
        whole = all(s % t == 0 for s, t in zip(sizes[2:], x.shape[2:], strict=True))
        nearest = _text(n.get("nearest_mode", "round_prefer_floor"))
        if not whole and not (how == "asymmetric" and (nearest == "floor" or n.opset < 11)):
            raise NotImplementedError
        return F.interpolate(x, sizes[2:], mode="nearest")
    kinds = {("linear", 1): "linear", ("linear", 2): "bilinear", ("linear", 3): "trilinear", ("cubic", 2): "bicubic"}
    kind = kinds.get((mode, spatial))
    if kind is None or how not in ("half_pixel", "pytorch_half_pixel", "align_corners"):
        raise NotImplementedError
    if mode == "cubic" and n.get("cubic_coeff_a", -0.75) != -0.75:
        raise NotImplementedError
    return F.interpolate(x, sizes[2:], mode=kind, align_corners=how == "align_corners")


# Reductions


def _over(n: Node, x: Tensor, axes: Any) -> tuple[list[int], bool] | None:
    axes = n.get("axes") if axes is None else axes
    if axes is None or np.asarray(axes).size == 0:
        if n.get("noop_with_empty_axes", 0):
            return None
        axes = range(x.dim())
    return [a % x.dim() for a in ints(list(axes))], bool(n.get("keepdims", 1))


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, d, k: x.mean(d, k),
    "ReduceSum": lambda x, d, k: x.sum(d, k),
    "ReduceMax": lambda x, d, k: x.amax(d, k),
    "ReduceMin": lambda x, d, k: x.amin(d, k),
    "ReduceL1": lambda x, d, k: x.abs().sum(d, k),
    "ReduceL2": lambda x, d, k: (x * x).sum(d, k).sqrt(),
    "ReduceSumSquare": lambda x, d, k: (x * x).sum(d, k),
    "ReduceLogSumExp": lambda x, d, k: x.logsumexp(d, k),
}


@operator(*_REDUCTIONS)
def _reduce(n: Node, x: Tensor, axes: Any = None) -> Tensor:
    found = _over(n, x, axes)
    return x if found is None else _REDUCTIONS[n.kind](x, *found)


@operator("ArgMax", "ArgMin")
def _arg(n: Node, x: Tensor) -> Tensor:
    if n.get("select_last_index", 0):
        raise NotImplementedError
    f = torch.argmax if n.kind == "ArgMax" else torch.argmin
    return f(x, int(n.get("axis", 0)), bool(n.get("keepdims", 1)))


@operator("TopK")
def _topk(n: Node, x: Tensor, k: Any = None) -> list[Tensor]:
    count = int(n.get("k") if k is None else np.asarray(k).reshape(-1)[0])
    return list(torch.topk(x, count, int(n.get("axis", -1)), bool(n.get("largest", 1)), bool(n.get("sorted", 1))))


@operator("CumSum")
def _cumsum(n: Node, x: Tensor, axis: Any) -> Tensor:
    if n.get("exclusive", 0) or n.get("reverse", 0):
        raise NotImplementedError
    return torch.cumsum(x, int(np.asarray(axis).reshape(-1)[0]))


@operator("Trilu")
def _trilu(n: Node, x: Tensor, k: Any = None) -> Tensor:
    diagonal = 0 if k is None else int(np.asarray(k).reshape(-1)[0])
    return torch.triu(x, diagonal) if n.get("upper", 1) else torch.tril(x, diagonal)
