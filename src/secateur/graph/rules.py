"""What each operator says of positions: the rule table.

A rule gets the operator's arguments by name, tensors as `Traced`, and returns the positions of what comes out. What
it unifies lives and dies together; what it freezes stays. An operator without a rule freezes what it touches, and so
does a rule whose result has another shape than the trace saw.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.graph.positions import Ints, Positions

STATISTIC = 1  # something is divided by how many there are: zeroing a unit is not the same as removing it
ATTENTION = 2  # a dimension of attention heads
BLANK = 4  # a tensor made of nothing but zeros: as long as whatever it meets, so that it holds nothing fast

_LARGEST = 1 << 22  # a flattened dimension longer than this is not followed


@dataclass(frozen=True, eq=False)
class Traced:
    """A tensor of the graph: the positions along each dimension, and whose tensor it is when it is the model's."""

    dims: tuple[Ints, ...]
    source: str | None = None
    turned: str | None = None  # whose tensor it is with its dimensions in another order

    @property
    def shape(self) -> tuple[int, ...]:
        """The lengths of the dimensions."""
        return tuple(len(d) for d in self.dims)


class Tracing:
    """What the rules write to: positions, how often a weight is used, and which are stored inputs first."""

    def __init__(self, batch: int) -> None:
        self.positions = Positions()
        self.batch = max(1, batch)
        self.uses: dict[str, float] = {}
        self.turned: set[str] = set()
        self.outputs: tuple[tuple[int, ...], ...] = ()  # shapes of what comes out of the present operator

    @property
    def output(self) -> tuple[int, ...]:
        """The shape of what comes out of the present operator, when it is one tensor."""
        return self.outputs[0]

    def used(self, weight: Traced, times: float) -> None:
        """Count multiply-adds of each element of a weight, over the whole example batch."""
        if (name := weight.source or weight.turned) is not None:
            self.uses[name] = self.uses.get(name, 0.0) + times / self.batch

    def stay(self, n: int) -> Ints:
        """New positions that are never removed."""
        return self.positions.fresh(n, frozen=True)

    def freeze(self, *tensors: Traced) -> None:
        """Keep every position of these."""
        for tensor in tensors:
            for d in tensor.dims:
                self.positions.freeze(d)

    def blank(self, d: Ints) -> bool:
        """Whether a dimension is one of a tensor made of nothing but zeros."""
        return bool(len(d)) and bool(self.positions.marked(d[:1], BLANK)[0])

    def broadcast(self, *tensors: Traced) -> tuple[Ints, ...]:
        """The dimensions of an element-by-element result: what meets lives and dies together."""
        rank = max(len(t.dims) for t in tensors)
        out: list[Ints] = []
        for d in range(-rank, 0):
            here = [t.dims[d] for t in tensors if len(t.dims) >= -d]
            wide = [v for v in here if len(v) != 1] or here[:1]
            wide = [v for v in wide if not self.blank(v)] or wide
            for other in wide[1:]:
                if other is not wide[0]:
                    self.positions.unify(wide[0], other)
            out.append(wide[0])
        return tuple(out)

    def reshape(self, dims: Sequence[Ints], sizes: Sequence[int]) -> tuple[Ints, ...]:
        """The dimensions of a reshaped tensor: runs of equal product are joined, then split."""
        have = [d for d in dims if len(d) != 1]
        want = [s for s in sizes if s != 1]
        found: list[Ints] = []
        i = j = 0
        while i < len(have) and j < len(want):
            start, first, a, b = i, j, len(have[i]), want[j]
            i, j = i + 1, j + 1
            while a != b:
                if a < b:
                    a, i = a * len(have[i]), i + 1
                else:
                    b, j = b * want[j], j + 1
            if i - start == j - first == 1:
                found.append(have[start])
            elif a > _LARGEST:
                for d in have[start:i]:
                    self.positions.freeze(d)
                found += [self.stay(s) for s in want[first:j]]
            else:
                found += self._regrouped(have[start:i], want[first:j])
        wide = iter(found)
        return tuple(next(wide) if s != 1 else self.positions.fresh(1) for s in sizes)

    def _regrouped(self, have: Sequence[Ints], want: Sequence[int]) -> list[Ints]:
        """The dimensions that others of the same product are reshaped to."""
        lengths = [len(d) for d in have]
        strides = {math.prod(sizes[k:]) for sizes in (lengths, want) for k in range(len(sizes) + 1)}
        cuts = sorted(strides)
        if any(b % a for a, b in pairwise(cuts)):
            return self.positions.split(self.positions.join(have), want)
        # Each is split where any of the others ends, so that no product need be compared with another.
        pieces = [self.positions.split(d, n) for d, n in zip(have, _atoms(lengths, cuts), strict=True)]
        atoms = iter([piece for each in pieces for piece in each])
        return [self.positions.join([next(atoms) for _ in n]) for n in _atoms(want, cuts)]


def _atoms(sizes: Sequence[int], cuts: Sequence[int]) -> list[list[int]]:
    """The lengths of what each dimension is made of, outermost first, when all are cut at some strides."""
    found, right = [], 1
    for size in reversed(sizes):
        within = [c for c in cuts if right <= c <= right * size]
        found.append([b // a for a, b in pairwise(within)][::-1])
        right *= size
    return found[::-1]


Rule = Callable[..., Any]
_rules: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: what these ATen operators, whatever their overload, say of positions."""

    def register(f: Rule) -> Rule:
        _rules.update(dict.fromkeys(names, f))
        return f

    return register


def find(name: str) -> Rule | None:
    """The rule of an operator such as "add" or "add_", or None."""
    if name in _rules:
        return _rules[name]
    return _rules.get(name.rstrip("_")) if not name.startswith("_") else None


def _axes(dim: Any, rank: int) -> list[int]:
    if dim is None or (isinstance(dim, (list, tuple)) and not dim):
        return list(range(rank))
    return [int(d) % rank for d in (dim if isinstance(dim, (list, tuple)) else [dim])]


def _tensors(a: dict[str, Any]) -> list[Traced]:
    return [v for v in a.values() if isinstance(v, Traced)]


# Products of matrices


@rule("linear")
def _linear(t: Tracing, a: dict[str, Any]) -> Traced:
    x, w, b = a["input"], a["weight"], a.get("bias")
    t.positions.unify(x.dims[-1], w.dims[-1])
    t.used(w, math.prod(x.shape[:-1]))
    out = w.dims[0] if len(w.dims) == 2 else None
    if b is not None and out is not None:
        t.positions.unify(b.dims[0], out)
    return Traced(x.dims[:-1] + ((out,) if out is not None else ()))


def _matmul(t: Tracing, x: Traced, w: Traced) -> Traced:
    if not x.dims or not w.dims:
        return Traced(x.dims or w.dims)
    rows = x.dims[-2:-1]
    columns = w.dims[-1:] if len(w.dims) > 1 else ()
    t.positions.unify(x.dims[-1], w.dims[-2] if len(w.dims) > 1 else w.dims[-1])
    batch = t.broadcast(Traced(x.dims[:-2]), Traced(w.dims[:-2])) if len(x.dims) > 2 or len(w.dims) > 2 else ()
    out = Traced((*batch, *rows, *columns))
    work = math.prod(out.shape) * len(x.dims[-1])
    t.used(w, work / max(1, math.prod(w.shape)))
    t.used(x, work / max(1, math.prod(x.shape)))
    if w.source is not None and len(w.dims) == 2:
        t.turned.add(w.source)
    return out


@rule("mm", "bmm", "matmul", "mv", "dot")
def _mm(t: Tracing, a: dict[str, Any]) -> Traced:
    x, w = _tensors(a)[:2]
    return _matmul(t, x, w)


@rule("addmm", "baddbmm", "addbmm")
def _addmm(t: Tracing, a: dict[str, Any]) -> Traced:
    bias, x, w = _tensors(a)[:3]
    out = _matmul(t, x, w)
    return Traced(t.broadcast(out, bias))


@rule("einsum")
def _einsum(t: Tracing, a: dict[str, Any]) -> Traced | None:
    equation, operands = a["equation"].replace(" ", ""), a["tensors"]
    if "." in equation or "->" not in equation:
        return None
    left, right = equation.split("->")
    terms = left.split(",")
    seen: dict[str, Ints] = {}
    for term, operand in zip(terms, operands, strict=True):
        if len(set(term)) != len(term):
            return None
        for letter, d in zip(term, operand.dims, strict=True):
            if letter in seen and len(seen[letter]) == len(d):
                t.positions.unify(seen[letter], d)
            elif letter not in seen or len(d) > 1:
                seen[letter] = d
    work = math.prod(len(d) for d in seen.values())
    for operand in operands:
        t.used(operand, work / max(1, math.prod(operand.shape)))
    return Traced(tuple(seen[letter] for letter in right))


@rule("conv1d", "conv2d", "conv3d", "convolution", "_convolution")
def _conv(t: Tracing, a: dict[str, Any]) -> Traced:
    if a.get("transposed"):
        return _conv_transposed(t, a)
    x, w, b, groups = a["input"], a["weight"], a.get("bias"), a.get("groups") or 1
    p, out = t.positions, w.dims[0]
    channels = x.dims[1 - len(w.dims)]
    if groups == 1:
        p.unify(channels, w.dims[1])
    elif groups == len(channels):  # depthwise: an input channel feeds the next few outputs
        many = len(out) // groups
        p.unify(out, channels if many == 1 else p.join([channels, t.stay(many)]))
    else:
        group, within = p.split(channels, [groups, len(channels) // groups])
        group_out, _ = p.split(out, [groups, len(out) // groups])
        p.freeze(group)
        p.freeze(group_out)
        p.unify(within, w.dims[1])
    return _convolved(t, x, w, b, out, transposed=False)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def _conv_transposed(t: Tracing, a: dict[str, Any]) -> Traced:
    x, w, b, groups = a["input"], a["weight"], a.get("bias"), a.get("groups") or 1
    p = t.positions
    channels = x.dims[1 - len(w.dims)]
    p.unify(channels, w.dims[0])
    if groups == 1:
        out = w.dims[1]
    elif groups == len(channels) and len(w.dims[1]) == 1:
        out = channels
    else:
        group, _ = p.split(channels, [groups, len(channels) // groups])
        p.freeze(group)
        out = p.join([group, w.dims[1]])
    return _convolved(t, x, w, b, out, transposed=True)


def _convolved(t: Tracing, x: Traced, w: Traced, b: Traced | None, out: Ints, transposed: bool) -> Traced:
    spatial = len(w.dims) - 2
    for d in (*w.dims[2:], *x.dims[len(x.dims) - spatial :]):
        t.positions.freeze(d)
    if b is not None:
        t.positions.unify(b.dims[0], out)
    sizes = t.output[len(t.output) - spatial :]
    batch = x.dims[: len(x.dims) - spatial - 1]
    # An element meets every position of the output once; transposed, every position of the input.
    met = x.shape[len(x.dims) - spatial :] if transposed else sizes
    t.used(w, math.prod(len(d) for d in batch) * math.prod(met))
    return Traced((*batch, out, *(t.stay(s) for s in sizes)))


@rule("scaled_dot_product_attention")
def _attention(t: Tracing, a: dict[str, Any]) -> Traced:
    q, k, v, mask = a["query"], a["key"], a["value"], a.get("attn_mask")
    p = t.positions
    p.unify(q.dims[-1], k.dims[-1])
    p.freeze(q.dims[-1])  # the default scale is one over the root of how many there are
    p.unify(k.dims[-2], v.dims[-2])
    batch = list(q.dims[:-2])
    for other in (k, v):
        for i, d in enumerate(other.dims[:-2]):
            if len(d) == len(batch[i]):
                p.unify(batch[i], d)
            elif len(d) > 1:  # grouped queries: a key-value head serves the next few query heads
                p.unify(batch[i], p.join([d, t.stay(len(batch[i]) // len(d))]))
    if batch:
        p.mark(batch[-1], ATTENTION)
    if isinstance(mask, Traced):
        t.broadcast(Traced((*batch, q.dims[-2], k.dims[-2])), mask)
    return Traced((*batch, q.dims[-2], v.dims[-1]))


# Norms


@rule("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
      "cudnn_batch_norm", "_batch_norm_with_update", "instance_norm")  # fmt: skip
def _batch_norm(t: Tracing, a: dict[str, Any]) -> Any:
    x, *others = _tensors(a)
    for other in others:
        t.positions.unify(x.dims[1], other.dims[0])
    out = Traced(x.dims)
    return out if len(t.outputs) == 1 else [out, *(Traced(tuple(t.stay(s) for s in o)) for o in t.outputs[1:])]


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def _layer_norm(t: Tracing, a: dict[str, Any]) -> Any:
    x, *others = _tensors(a)
    over = x.dims[len(x.dims) - len(a["normalized_shape"]) :]
    for d in over:
        t.positions.mark(d, STATISTIC)
    for other in others:
        t.broadcast(Traced(over), other)
    out = Traced(x.dims)
    return out if len(t.outputs) == 1 else [out, *(Traced(tuple(t.stay(s) for s in o)) for o in t.outputs[1:])]


@rule("group_norm")
def _group_norm(t: Tracing, a: dict[str, Any]) -> Traced:
    x, groups = a["input"], a["num_groups"]
    p, channels = t.positions, a["input"].dims[1]
    for name in ("weight", "bias"):
        if a.get(name) is not None:
            p.unify(channels, a[name].dims[0])
    group, within = p.split(channels, [groups, len(channels) // groups])
    p.freeze(group)
    p.mark(within, STATISTIC)
    return Traced(x.dims)


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def _softmax(t: Tracing, a: dict[str, Any]) -> Traced:
    x = _tensors(a)[0]
    dim = int(a["dim"]) % len(x.dims)
    t.positions.mark(x.dims[dim], STATISTIC)
    if dim == len(x.dims) - 1:  # scores [..., heads, queries, keys]
        for d in x.dims[:-2]:
            t.positions.mark(d, ATTENTION)
    return Traced(x.dims)


# Recurrent layers


def _cell(t: Tracing, x: Ints, tensors: Sequence[Traced], times: float, projected: bool) -> tuple[Ints, Ints]:
    """One cell: the positions of what it tells the next step, and of its units, which every gate has a row of."""
    p = t.positions
    into, back = tensors[:2]
    told = back.dims[1]
    units = tensors[-1].dims[1] if projected else told
    p.unify(into.dims[1], x)
    if projected:
        p.unify(tensors[-1].dims[0], told)
    for tensor in tensors[: -1 if projected else None]:
        gate, unit = p.split(tensor.dims[0], [len(tensor.dims[0]) // len(units), len(units)])
        p.freeze(gate)
        p.unify(unit, units)
    for tensor in tensors:
        t.used(tensor, times if len(tensor.dims) > 1 else 0.0)
    return told, units


def _starts(t: Tracing, state: Traced, units: Ints) -> None:
    """The state before the first step; zeros are made as wide as the layer says it is, so they hold nothing fast."""
    if not t.blank(state.dims[-1]):
        t.positions.unify(state.dims[-1], units)


@rule("gru", "lstm", "rnn_tanh", "rnn_relu")
def _recurrent(t: Tracing, a: dict[str, Any]) -> list[Traced]:
    """Layers and directions share their units, since the module has one number for all: a unit goes from each."""
    import numpy as np

    p = t.positions
    x = a["data"] if "data" in a else a["input"]
    states = a["hx"] if isinstance(a["hx"], list) else [a["hx"]]
    cells = int(a["num_layers"]) * (1 + bool(a["bidirectional"]))
    each = len(a["params"]) // cells
    projected = each % 2 == 1
    params = [a["params"][i * each : (i + 1) * each] for i in range(cells)]
    below, rows = x.dims[-1], math.prod(x.shape[:-1])
    told: Ints | None = None
    units: Ints | None = None
    for layer in range(int(a["num_layers"])):
        out = []
        for cell in params[layer * cells // int(a["num_layers"]) : (layer + 1) * cells // int(a["num_layers"])]:
            one, its = _cell(t, below, cell, rows, projected)
            if told is not None and units is not None:
                p.unify(told, one)
                p.unify(units, its)
            told, units = one, its
            out.append(one)
        below = np.concatenate(out)
    assert told is not None and units is not None, "a recurrent layer has a cell at least"
    for state, end in zip(states, (told, units), strict=False):
        _starts(t, state, end)
    last = [told, units][: len(states)]
    rest = [Traced((*(t.stay(n) for n in shape[:-1]), d)) for shape, d in zip(t.outputs[1:], last, strict=True)]
    return [Traced((*x.dims[:-1], below)), *rest]


@rule("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
def _recurrent_cell(t: Tracing, a: dict[str, Any]) -> Any:
    x, states = a["input"], a["hx"] if isinstance(a["hx"], list) else [a["hx"]]
    tensors = [a[name] for name in ("w_ih", "w_hh", "b_ih", "b_hh") if a.get(name) is not None]
    units, _ = _cell(t, x.dims[-1], tensors, math.prod(x.shape[:-1]), False)
    for state in states:
        _starts(t, state, units)
    out = [Traced((*x.dims[:-1], units)) for _ in t.outputs]
    return out if len(out) > 1 else out[0]


# Element by element

_ELEMENTWISE = """
__and__ __or__ __xor__ _to_copy abs acos add addcdiv addcmul alias alpha_dropout atan atan2 bfloat16 bitwise_and
bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max clamp_min clone contiguous copy cos cosh cpu cuda
detach detach_ div divide double dropout elu empty_like eq erf erfc erfinv exp exp2 expm1
fake_quantize_per_tensor_affine feature_dropout fill float floor floor_divide fmod frac full_like ge gelu greater gt
half hardshrink hardsigmoid hardswish hardtanh hypot identity int isinf isnan le leaky_relu lerp lift_fresh
lift_fresh_copy log log10 log1p log2 log_sigmoid logaddexp logical_and logical_not logical_or logical_xor logit long
lt masked_fill maximum minimum mish mul multiply nan_to_num native_dropout ne neg ones_like positive pow rand_like
randn_like reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn sigmoid sign silu sin sinh softmax_backward
softplus softshrink sqrt square sub subtract tan tanh tanh_shrink tanhshrink threshold true_divide trunc where xlogy
zero zeros_like
"""


@rule(*_ELEMENTWISE.split())
def _elementwise(t: Tracing, a: dict[str, Any]) -> Any:
    tensors = _tensors(a)
    alone = tensors[0] if len(tensors) == 1 else None
    dims = t.broadcast(*tensors)
    out = Traced(dims) if alone is None else Traced(dims, alone.source, alone.turned)
    return out if len(t.outputs) == 1 else [Traced(dims) for _ in t.outputs]


@rule("to", "type_as")
def _converted(t: Tracing, a: dict[str, Any]) -> Traced:
    return Traced(
        a["self"].dims, a["self"].source, a["self"].turned
    )  # what it is converted like has a shape of its own


@rule("_weight_norm")
def _weight_norm(t: Tracing, a: dict[str, Any]) -> Traced:
    """A weight is its direction v times its length g: zeros of v have no length, so that they may go."""
    return Traced(t.broadcast(a["v"], a["g"]), a["v"].source)


@rule("prelu", "_prelu_kernel")
def _prelu(t: Tracing, a: dict[str, Any]) -> Traced:
    x, w = _tensors(a)[:2]
    if len(w.dims) == 1 and len(w.dims[0]) > 1:
        t.positions.unify(x.dims[1], w.dims[0])
    elif len(w.dims) == len(x.dims):
        t.broadcast(x, w)
    return Traced(x.dims)


@rule("glu")
def _glu(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    dim = int(a.get("dim", -1)) % len(x.dims)
    half, within = t.positions.split(x.dims[dim], [2, len(x.dims[dim]) // 2])
    t.positions.freeze(half)
    return Traced((*x.dims[:dim], within, *x.dims[dim + 1 :]))


@rule("new_ones", "new_full", "new_empty")
def _new(t: Tracing, a: dict[str, Any]) -> Traced:
    return Traced(tuple(t.stay(s) for s in t.output))


@rule("zeros", "new_zeros")
def _zeros(t: Tracing, a: dict[str, Any]) -> Traced:
    dims = tuple(t.stay(s) for s in t.output)
    for d in dims:
        t.positions.mark(d, BLANK)
    return Traced(dims)


# Shapes


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "_reshape_alias", "view_as", "reshape_as")
def _reshape(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    return Traced(t.reshape(x.dims, t.output))


@rule("t", "transpose", "permute", "movedim", "swapaxes", "swapdims", "adjoint", "mT", "numpy_T", "moveaxis")
def _permute(t: Tracing, a: dict[str, Any]) -> Traced | None:
    x = a["self"]
    rank = len(x.dims)
    order = list(range(rank))
    if "dims" in a:
        order = [int(d) % rank for d in a["dims"]]
    elif "dim0" in a or "axis0" in a:
        i, j = int(a.get("dim0", a.get("axis0", 0))) % rank, int(a.get("dim1", a.get("axis1", 1))) % rank
        order[i], order[j] = j, i
    elif "source" in a:
        source, target = _axes(a["source"], rank), _axes(a["destination"], rank)
        placed = dict(zip(target, source, strict=True))
        rest = iter(d for d in range(rank) if d not in source)
        order = [placed[d] if d in placed else next(rest) for d in range(rank)]
    elif rank == 2:
        order = [1, 0]
    elif rank > 2:
        return None
    return Traced(tuple(x.dims[d] for d in order), turned=x.source or x.turned)


@rule("unsqueeze")
def _unsqueeze(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    dim = int(a["dim"]) % (len(x.dims) + 1)
    return Traced((*x.dims[:dim], t.positions.fresh(1), *x.dims[dim:]))


@rule("squeeze")
def _squeeze(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    gone = _axes(a.get("dim"), len(x.dims))
    return Traced(tuple(d for i, d in enumerate(x.dims) if not (i in gone and len(d) == 1)))


@rule("expand", "broadcast_to")
def _expand(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    new = len(t.output) - len(x.dims)
    dims = [t.stay(s) for s in t.output[:new]]
    dims += [d if len(d) == s else t.stay(s) for d, s in zip(x.dims, t.output[new:], strict=True)]
    return Traced(tuple(dims))


@rule("expand_as")
def _expand_as(t: Tracing, a: dict[str, Any]) -> Traced:
    return Traced(t.broadcast(a["self"], a["other"]))


@rule("repeat", "tile")
def _repeat(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    dims = [t.positions.fresh(1)] * (len(t.output) - len(x.dims)) + list(x.dims)
    return Traced(
        tuple(
            d if len(d) == s else t.positions.join([t.stay(s // len(d)), d])
            for d, s in zip(dims, t.output, strict=True)
        )
    )


@rule("repeat_interleave")
def _repeat_interleave(t: Tracing, a: dict[str, Any]) -> Traced | None:
    x, dim = a.get("self"), a.get("dim")
    if not isinstance(x, Traced) or dim is None or not isinstance(a.get("repeats"), int):
        return None
    dim = int(dim) % len(x.dims)
    return Traced((*x.dims[:dim], t.positions.join([x.dims[dim], t.stay(a["repeats"])]), *x.dims[dim + 1 :]))


@rule("cat", "concat", "concatenate")
def _cat(t: Tracing, a: dict[str, Any]) -> Traced:
    import numpy as np

    tensors = [v for v in a["tensors"] if v.shape != (0,)]
    dim = int(a.get("dim", 0)) % len(tensors[0].dims)
    dims = list(tensors[0].dims)
    for other in tensors[1:]:
        for d in range(len(dims)):
            if d != dim:
                t.positions.unify(dims[d], other.dims[d])
    dims[dim] = np.concatenate([v.dims[dim] for v in tensors])
    return Traced(tuple(dims))


@rule("stack")
def _stack(t: Tracing, a: dict[str, Any]) -> Traced:
    tensors = a["tensors"]
    dims = t.broadcast(*tensors)
    dim = int(a.get("dim", 0)) % (len(dims) + 1)
    return Traced((*dims[:dim], t.stay(len(tensors)), *dims[dim:]))


@rule("split", "split_with_sizes", "tensor_split", "unsafe_split")
def _split(t: Tracing, a: dict[str, Any]) -> list[Traced]:
    x = a["self"]
    dim = int(a.get("dim", 0)) % len(x.dims)
    out, start = [], 0
    for shape in t.outputs:
        out.append(Traced((*x.dims[:dim], x.dims[dim][start : start + shape[dim]], *x.dims[dim + 1 :])))
        start += shape[dim]
    return out


@rule("chunk", "unsafe_chunk")
def _chunk(t: Tracing, a: dict[str, Any]) -> list[Traced]:
    x, dim = a["self"], int(a.get("dim", 0)) % len(a["self"].dims)
    n = len(t.outputs)
    if len(x.dims[dim]) % n or any(shape[dim] != t.outputs[0][dim] for shape in t.outputs):
        t.positions.freeze(x.dims[dim])
        return _split(t, a)
    # Chunks stay equal only when each loses the same ones.
    which, within = t.positions.split(x.dims[dim], [n, len(x.dims[dim]) // n])
    t.positions.freeze(which)
    return [Traced((*x.dims[:dim], within, *x.dims[dim + 1 :])) for _ in range(n)]


@rule("unbind")
def _unbind(t: Tracing, a: dict[str, Any]) -> list[Traced]:
    x, dim = a["self"], int(a.get("dim", 0)) % len(a["self"].dims)
    t.positions.freeze(x.dims[dim])
    return [Traced(x.dims[:dim] + x.dims[dim + 1 :]) for _ in t.outputs]


@rule("select")
def _select(t: Tracing, a: dict[str, Any]) -> Traced:
    x, dim = a["self"], int(a["dim"]) % len(a["self"].dims)
    if len(x.dims[dim]) > 1:
        t.positions.freeze(x.dims[dim])
    return Traced(x.dims[:dim] + x.dims[dim + 1 :])


@rule("slice", "narrow")
def _slice(t: Tracing, a: dict[str, Any]) -> Traced:
    x, dim = a["self"], int(a.get("dim") or 0) % len(a["self"].dims)
    d = x.dims[dim]
    step = int(a.get("step") or 1)
    start = a.get("start") or 0
    start = max(0, start + len(d)) if start < 0 else min(start, len(d))
    if step > 1 and len(d) % step == 0 and not t.positions.all_frozen(d):
        # Every second one stays every second one only when whole runs of `step` go.
        _, phase = t.positions.split(d, [len(d) // step, step])
        t.positions.freeze(phase)
    elif step > 1:
        t.positions.freeze(d)
    return Traced((*x.dims[:dim], d[start::step][: t.output[dim]], *x.dims[dim + 1 :]))


@rule("pad", "constant_pad_nd")
def _pad(t: Tracing, a: dict[str, Any]) -> Traced:
    import numpy as np

    x, pad, mode = a["self"], a["pad"], a.get("mode", "constant")
    dims = list(x.dims)
    for i in range(len(pad) // 2):
        d, before, after = len(dims) - 1 - i, int(pad[2 * i]), int(pad[2 * i + 1])
        if not before and not after:
            continue
        if mode != "constant":
            t.positions.freeze(dims[d])
            dims[d] = t.stay(len(dims[d]) + before + after)
            continue
        kept = dims[d][max(0, -before) : len(dims[d]) - max(0, -after)]
        # How much is padded stands in the code, so what is padded stays.
        dims[d] = np.concatenate([t.stay(max(0, before)), kept, t.stay(max(0, after))])
    return Traced(tuple(dims))


@rule("flip")
def _flip(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    gone = _axes(a["dims"], len(x.dims))
    return Traced(tuple(d[::-1] if i in gone else d for i, d in enumerate(x.dims)))


@rule("roll")
def _roll(t: Tracing, a: dict[str, Any]) -> Traced | None:
    x, dims = a["self"], a.get("dims")
    if not dims:
        return None
    gone = _axes(dims, len(x.dims))
    for i in gone:
        t.positions.freeze(x.dims[i])
    return Traced(tuple(t.stay(len(d)) if i in gone else d for i, d in enumerate(x.dims)))


@rule("index_add", "index_copy")
def _index_add(t: Tracing, a: dict[str, Any]) -> Traced:
    x, source, dim = a["self"], a["source"], int(a["dim"]) % len(a["self"].dims)
    t.positions.freeze(x.dims[dim])
    for i, (d, other) in enumerate(zip(x.dims, source.dims, strict=True)):
        if i != dim:
            t.positions.unify(d, other)
    return Traced(x.dims)


@rule("embedding")
def _embedding(t: Tracing, a: dict[str, Any]) -> Traced:
    w, index = a["weight"], a["indices"]
    t.positions.freeze(w.dims[0])
    return Traced((*index.dims, w.dims[1]))


@rule("index", "index_select", "_unsafe_index")
def _index(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    if "dim" in a:
        dim = int(a["dim"]) % len(x.dims)
        t.positions.freeze(x.dims[dim])
        return Traced((*x.dims[:dim], t.stay(t.output[dim]), *x.dims[dim + 1 :]))
    indexed = [i for i, v in enumerate(a["indices"]) if v is not None]
    for i in indexed:
        t.positions.freeze(x.dims[i])
        t.freeze(a["indices"][i])
    rest = [d for i, d in enumerate(x.dims) if i not in indexed]
    new = len(t.output) - len(rest)
    together = indexed == list(range(indexed[0], indexed[-1] + 1))
    at = indexed[0] if together else 0
    return Traced((*rest[:at], *(t.stay(s) for s in t.output[at : at + new]), *rest[at:]))


@rule("index_put", "_index_put_impl", "_unsafe_index_put")
def _index_put(t: Tracing, a: dict[str, Any]) -> Traced:
    x, values = a["self"], a["values"]
    indexed = [i for i, v in enumerate(a["indices"]) if v is not None]
    for i in indexed:
        t.positions.freeze(x.dims[i])
        t.freeze(a["indices"][i])
    behind = x.dims[indexed[-1] + 1 :] if indexed else x.dims
    met = min(len(behind), len(values.dims))
    t.broadcast(Traced(behind[len(behind) - met :]), Traced(values.dims[len(values.dims) - met :])) if met else None
    t.freeze(Traced(values.dims[: len(values.dims) - met]))
    return Traced(x.dims)


@rule("gather")
def _gather(t: Tracing, a: dict[str, Any]) -> Traced:
    x, index, dim = a["self"], a["index"], int(a["dim"]) % max(1, len(a["self"].dims))
    dims = []
    for i, (d, n) in enumerate(zip(x.dims, index.dims, strict=True)):
        if i != dim and len(d) == len(n):
            t.positions.unify(d, n)
        else:
            t.positions.freeze(d)
        dims.append(n if i == dim else d[: len(n)])
    return Traced(tuple(dims))


@rule("affine_grid_generator")
def _affine_grid(t: Tracing, a: dict[str, Any]) -> Traced:
    t.freeze(a["theta"])
    return Traced(tuple(t.stay(n) for n in t.output))


@rule("grid_sampler")
def _grid_sampler(t: Tracing, a: dict[str, Any]) -> Traced:
    x, grid = a["input"], a["grid"]
    t.freeze(grid)
    for d in x.dims[2:]:
        t.positions.freeze(d)
    return Traced((*x.dims[:2], *(t.stay(n) for n in t.output[2:])))


@rule("im2col")
def _im2col(t: Tracing, a: dict[str, Any]) -> Traced:
    """Patches: a channel's run of kernel places beside each other."""
    x = a["self"]
    channel = t.positions.join([x.dims[-3], t.stay(math.prod(a["kernel_size"]))])
    for d in x.dims[-2:]:
        t.positions.freeze(d)
    return Traced((*x.dims[:-3], channel, t.stay(t.output[-1])))


@rule("col2im")
def _col2im(t: Tracing, a: dict[str, Any]) -> Traced:
    x, places = a["self"], math.prod(a["kernel_size"])
    channel, place = t.positions.split(x.dims[-2], [len(x.dims[-2]) // places, places])
    t.positions.freeze(place)
    return Traced((*x.dims[:-2], channel, *(t.stay(n) for n in t.output[-2:])))


# Reductions and pooling


@rule("sum", "linalg_vector_norm", "norm", "frobenius_norm", "nansum")
def _sum(t: Tracing, a: dict[str, Any]) -> Traced:
    x = a["self"]
    gone = _axes(a.get("dim"), len(x.dims)) if x.dims else []
    if len(t.output) == len(x.dims):
        return Traced(tuple(t.positions.fresh(1) if i in gone else d for i, d in enumerate(x.dims)))
    return Traced(tuple(d for i, d in enumerate(x.dims) if i not in gone))


@rule("mean", "var", "std", "amax", "amin", "max", "min", "prod", "logsumexp", "any", "all", "median", "var_mean",
      "std_mean")  # fmt: skip
def _mean(t: Tracing, a: dict[str, Any]) -> Any:
    if "other" in a:
        return _elementwise(t, a)
    x = a["self"]
    for i in _axes(a.get("dim"), len(x.dims)) if x.dims else []:
        t.positions.mark(x.dims[i], STATISTIC)
    found = _sum(t, a)
    return found if len(t.outputs) == 1 else [found for _ in t.outputs]


@rule("topk", "sort", "argsort", "argmax", "argmin", "kthvalue", "diff", "multinomial")
def _ordered(t: Tracing, a: dict[str, Any]) -> Any:
    x = _tensors(a)[0]
    dim = a.get("dim")
    gone = [int(-1 if dim is None else dim) % len(x.dims)] if x.dims else []
    for i in gone:
        t.positions.freeze(x.dims[i])
    dims = [t.stay(len(d)) if i in gone else d for i, d in enumerate(x.dims)]
    outs = []
    for shape in t.outputs:
        kept = dims if len(shape) == len(dims) else [d for i, d in enumerate(dims) if i not in gone]
        outs.append(Traced(tuple(d if len(d) == n else t.stay(n) for d, n in zip(kept, shape, strict=True))))
    return outs if len(outs) > 1 else outs[0]


@rule("grouped_mm_fallback", "_grouped_mm", "grouped_mm")
def _grouped_mm(t: Tracing, a: dict[str, Any]) -> Traced | None:
    """Rows of x [rows, in], each through the matrix of its expert, w [experts, in, out]."""
    x, w = _tensors(a)[:2]
    if len(x.dims) != 2 or len(w.dims) != 3:
        return None
    t.positions.freeze(w.dims[0])
    t.positions.unify(x.dims[1], w.dims[1])
    t.used(w, len(x.dims[0]) / max(1, len(w.dims[0])))
    return Traced((x.dims[0], w.dims[2]))


@rule("cumsum", "cumprod")
def _cumulative(t: Tracing, a: dict[str, Any]) -> Traced:
    return Traced(a["self"].dims)


def _spatial(t: Tracing, x: Traced, spatial: int) -> Traced:
    for d in x.dims[len(x.dims) - spatial :]:
        t.positions.freeze(d)
    kept = len(x.dims) - spatial
    return Traced((*x.dims[:kept], *(t.stay(s) for s in t.output[kept:])))


def _pool(spatial: int) -> Rule:
    def pool(t: Tracing, a: dict[str, Any]) -> Any:
        found = _spatial(t, _tensors(a)[0], spatial)
        return found if len(t.outputs) == 1 else [found for _ in t.outputs]

    return pool


for _n in (1, 2, 3):
    rule(f"max_pool{_n}d", f"max_pool{_n}d_with_indices", f"avg_pool{_n}d", f"adaptive_avg_pool{_n}d",
         f"_adaptive_avg_pool{_n}d", f"adaptive_max_pool{_n}d", f"lp_pool{_n}d")(_pool(_n))  # fmt: skip
    rule(f"upsample_nearest{_n}d", f"_upsample_nearest_exact{_n}d")(_pool(_n))
rule("upsample_linear1d")(_pool(1))
rule("upsample_bilinear2d", "upsample_bicubic2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa")(_pool(2))
rule("upsample_trilinear3d")(_pool(3))


@rule("pixel_shuffle")
def _pixel_shuffle(t: Tracing, a: dict[str, Any]) -> Traced:
    x, square = a["self"], int(a["upscale_factor"]) ** 2
    channel, cell = t.positions.split(x.dims[-3], [len(x.dims[-3]) // square, square])
    t.positions.freeze(cell)
    return Traced((*x.dims[:-3], channel, *(t.stay(s) for s in t.output[-2:])))


@rule("pixel_unshuffle")
def _pixel_unshuffle(t: Tracing, a: dict[str, Any]) -> Traced:
    x, square = a["self"], int(a["downscale_factor"]) ** 2
    channel = t.positions.join([x.dims[-3], t.stay(square)])
    return Traced((*x.dims[:-3], channel, *(t.stay(s) for s in t.output[-2:])))


@rule("channel_shuffle", "native_channel_shuffle")
def _channel_shuffle(t: Tracing, a: dict[str, Any]) -> Traced:
    x, groups = a["self"], int(a["groups"])
    group, within = t.positions.split(x.dims[1], [groups, len(x.dims[1]) // groups])
    t.positions.freeze(group)
    return Traced((x.dims[0], t.positions.join([within, group]), *x.dims[2:]))
