"""The residual stream of a transformer: who writes to it, who reads it, and how to turn it into another basis.

In a pre-norm transformer every block reads the stream through a norm and adds to it. `follow` finds the stream by
watching one example go through, with no code per architecture:

    segment 0       the embeddings                      read through norm 0 by q, k, v
    segment 1       segment 0 + what o_proj writes      read through norm 1 by gate, up
    segment 2       segment 1 + what down_proj writes   ...

A segment's basis is free once the norms have no scale of their own: `fuse` moves scales and shifts into the readers,
and `add_shortcuts` gives each addition a matrix on its shortcut, so that two segments may have different bases and
widths. `Rotate` and `Remove` on the `sites` then do the rest.

Source: Ashkboos et al. 2024, arXiv 2401.15024, section 3 (computational invariance; theorem 1).
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from secateur.edit import Edit, Replace, Update, replacement
from secateur.errors import GraphError
from secateur.evidence import calm
from secateur.site import Part, Site, Tensors, tensors
from secateur.task import Batch
from secateur.walk import stacks

ADVICE = "Use a pre-norm decoder of the Llama, Mistral, Qwen, GPT-2, OPT, GPT-NeoX or Phi kind, or another method."


@dataclass(frozen=True)
class Segment:
    """The stream between two additions: one basis. Names of parameters, except the norms', which are modules'."""

    embeddings: tuple[str, ...]  # tables that start the stream: the first segment's only
    writers: tuple[str, ...]  # weights whose output is added to the segment before, as they run; two in parallel blocks
    norms: tuple[str, ...]  # modules the segment is read through
    readers: tuple[tuple[str, ...], ...]  # per norm: weights that read its output


@dataclass(frozen=True)
class Stream:
    """A residual stream, in the order in which it is written."""

    width: int
    segments: tuple[Segment, ...]
    reshaped: bool = False  # whether what the last norm puts out is reshaped to the width the stream began with


# Finding the stream


@dataclass(frozen=True)
class _Embedded:
    tables: tuple[str, ...]


@dataclass(frozen=True)
class _At:
    segment: int


@dataclass(frozen=True)
class _Normed:
    norm: str


@dataclass(frozen=True)
class _Written:
    weights: tuple[str, ...]


_Tag = _Embedded | _At | _Normed | _Written

_SAME = frozenset(
    ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "__getitem__", "contiguous", "clone", "detach")
) | frozenset(("to", "float", "type", "type_as", "dropout"))
_SUMS = frozenset(("add", "__add__", "__radd__", "add_", "__iadd__"))
_PRODUCTS = {"linear": (0, 1), "addmm": (1, 2), "matmul": (0, 1), "mm": (0, 1), "__matmul__": (0, 1)}


def follow(model: nn.Module, example: Batch) -> Stream:
    """Find the residual stream of a pre-norm transformer by watching one example.

    Raises GraphError, saying where, when the stream meets something that a change of basis would not pass through:
    a norm after the addition, a multiplier, a mixture of experts, a read without a norm.
    """
    watcher = _Follower(model)
    with calm(model), torch.no_grad(), watcher:
        few(example).through(model)
    return watcher.stream()


def few(batch: Batch, tokens: int = 8) -> Batch:
    """One short example is enough to see who reads and who writes."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point():
            return value[:1, :tokens]
        return value[:1] if isinstance(value, Tensor) and value.dim() else value

    if isinstance(batch.inputs, Mapping):
        return Batch({k: cut(v) for k, v in batch.inputs.items()})
    return Batch(tuple(cut(v) for v in batch.inputs))


class _Follower(TorchFunctionMode):
    """Tags what is known of each tensor, operation by operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = type(model).__name__
        self._tags: dict[int, tuple[Tensor, _Tag]] = {}  # with the tensor, so that no id is used twice
        self._names: dict[tuple[int, int], list[str]] = {}
        for name, value in model.named_parameters(remove_duplicate=False):
            self._names.setdefault((value.data_ptr(), value.numel()), []).append(name)
        self._tables = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Embedding)}
        self._root = model
        self._inside = 0  # how deep in norms: what a norm does inside is its own affair
        self._hooks: list[Any] = []
        self.lost: list[str] = []  # what became of embeddings that are no longer followed
        self.segments: list[dict[str, list[Any]]] = []
        self.width = 0
        self._order: dict[str, int] = {}  # weights, as they are met
        self._reshaped: set[str] = set()  # norms whose output is given a shape with a width in it

    def __enter__(self) -> "_Follower":
        for name, module in self._root.named_modules():
            if "norm" in type(module).__name__.lower() and not any(True for _ in module.children()):
                self._hooks.append(module.register_forward_pre_hook(self._enter_norm))
                self._hooks.append(module.register_forward_hook(self._leave_norm(name)))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *about: Any) -> None:
        super().__exit__(*about)  # type: ignore[no-untyped-call]
        for hook in self._hooks:
            hook.remove()

    def _enter_norm(self, *_: Any) -> None:
        self._inside += 1

    def _leave_norm(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, args: Any, out: Any) -> None:
            self._inside -= 1
            place = self._stream_at(self._tag(args[0])) if args else None
            if place is None:
                return
            norms = self.segments[place]["norms"]
            if name in norms:
                raise self._error(f"{name} reads it twice")
            norms.append(name)
            self.segments[place]["readers"].append([])
            self._put(out, _Normed(name))

        return hook

    def _tag(self, value: Any) -> _Tag | None:
        held = self._tags.get(id(value))
        return held[1] if held is not None and held[0] is value else None

    def _put(self, value: Tensor, tag: _Tag | None) -> None:
        if tag is None:
            self._tags.pop(id(value), None)
        else:
            self._tags[id(value)] = (value, tag)

    def _stream_at(self, tag: _Tag | None) -> int | None:
        """The segment a tag stands for; embeddings become the first one when they are read or added to."""
        if isinstance(tag, _At):
            return tag.segment
        if not isinstance(tag, _Embedded):
            return None
        if not self.segments:
            self.segments.append({"embeddings": list(tag.tables), "writers": [], "norms": [], "readers": []})
        elif self.segments[0]["embeddings"] != list(tag.tables):
            return None
        return 0

    def _error(self, found: str) -> GraphError:
        return GraphError(f"the residual stream of {self.model} was to be followed", found, ADVICE)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was asked, then say what is known of the result."""
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "embedding":
            out = func(*args, **kwargs)
            weight = args[1] if len(args) > 1 else kwargs["weight"]
            table = self._named(weight, self._tables)
            if table is not None:
                self.width = self.width or out.shape[-1]
                self._put(out, _Embedded((table,)))
            return out
        known = [t for v in tree_flatten((args, kwargs))[0] if (t := self._tag(v)) is not None]
        out = func(*args, **kwargs)
        if name in _PRODUCTS and isinstance(out, Tensor):
            self._product(name, args, kwargs, out, known)
        elif known and any(isinstance(v, Tensor) for v in tree_flatten(out)[0]):
            self._other(name, args, kwargs, out, known)
        return out

    def _named(self, weight: Tensor, among: Iterable[str] | None = None) -> str | None:
        names = self._names.get((weight.data_ptr(), weight.numel()), [])
        chosen = [n for n in names if (n in self._tables) == (among is not None)]
        return chosen[0] if chosen else None

    def _product(self, func: str, args: tuple[Any, ...], kwargs: Any, out: Tensor, known: list[_Tag]) -> None:
        at, by = _PRODUCTS[func]
        x = args[at] if len(args) > at else kwargs.get("input")
        weight = args[by] if len(args) > by else kwargs.get("weight", kwargs.get("mat2"))
        tag = self._tag(x)
        name = self._named(weight) if isinstance(weight, Tensor) else None
        if isinstance(tag, _Normed):
            if name is None:
                raise self._error(f"the output of {tag.norm} meets a weight that is not a parameter of the model")
            for segment in self.segments:
                if tag.norm in segment["norms"]:
                    segment["readers"][segment["norms"].index(tag.norm)].append(name)
        elif isinstance(tag, _At):
            raise self._error(f"{name or func} reads it without a norm")
        elif isinstance(tag, _Embedded):
            self.lost.append(f"{tag.tables[0]} is read by {name or func} without a norm")
        elif known and name is None:
            self._other(func, args, kwargs, out, known)
        if name is not None:
            self._order.setdefault(name, len(self._order))
            self._put(out, _Written((name,)))

    def _other(self, func: str, args: tuple[Any, ...], kwargs: Any, out: Any, known: list[_Tag]) -> None:
        first = self._tag(args[0]) if args else None
        if func in _SUMS and len(args) == 2 and not kwargs:
            self._put(out, self._sum(first, self._tag(args[1])))
        elif func in _SAME and isinstance(out, Tensor) and first is not None and out.shape[-1:] == args[0].shape[-1:]:
            if func in ("view", "reshape") and isinstance(first, _Normed) and tree_flatten(args[1:])[0][-1] != -1:
                self._reshaped.add(first.norm)
            self._put(out, first)
        else:
            for tag in known:
                if isinstance(tag, _At):
                    raise self._error(
                        f"after addition {tag.segment} it goes through {func!r}, which a change of basis may alter"
                    )
                if isinstance(tag, _Normed):
                    raise self._error(f"the output of {tag.norm} goes through {func!r} rather than into linear layers")
                if isinstance(tag, _Embedded):
                    self.lost.append(f"{tag.tables[0]} goes through {func!r}")
            if isinstance(out, Tensor):
                self._put(out, None)

    def _sum(self, a: _Tag | None, b: _Tag | None) -> _Tag | None:
        for one, other in ((a, b), (b, a)):
            if isinstance(one, _Normed):
                raise self._error(
                    f"the output of {one.norm} goes on as the stream: it stands after an addition (post-norm), or at"
                    " the start"
                )
            if isinstance(one, _Embedded) and isinstance(other, _Embedded):
                return _Embedded((*one.tables, *other.tables)) if one is a else _Embedded((*other.tables, *one.tables))
        if isinstance(a, _Written) and isinstance(b, _Written):
            return _Written((*a.weights, *b.weights))
        for one, other in ((a, b), (b, a)):
            place = self._stream_at(one)
            if place is None:
                continue
            if not isinstance(other, _Written):
                if isinstance(one, _Embedded) and len(self.segments) == 1 and not self.segments[0]["norms"]:
                    self.segments.clear()
                    self.lost.append(f"{one.tables[0]} is added to what no embedding gives")
                    return None
                raise self._error(f"what is added to it after addition {place} is not the output of linear layers")
            if place + 1 != len(self.segments):
                raise self._error(f"addition {place + 1} goes back to an earlier state of it")
            if place == 0 or self.segments[place]["norms"]:
                self.segments.append({"embeddings": [], "writers": [], "norms": [], "readers": []})
            self.segments[-1]["writers"] += other.weights
            return _At(len(self.segments) - 1)
        return None

    def stream(self) -> Stream:
        """What was found, once everything has been seen. Raises GraphError when it is not whole."""
        if len(self.segments) < 2:
            lost = f": {self.lost[0]}" if self.lost else ""
            raise self._error(f"no stream leads from an embedding through norms and additions{lost}")
        for place, segment in enumerate(self.segments):
            if not segment["norms"]:
                raise self._error(f"nothing reads it after addition {place}")
            for norm, readers in zip(segment["norms"], segment["readers"], strict=True):
                if not readers:
                    raise self._error(f"no linear layer reads the output of {norm}")
        used = [n for s in self.segments for n in (*s["writers"], *(r for rs in s["readers"] for r in rs))]
        twice = next((n for n in used if used.count(n) > 1), None)
        if twice is not None:
            raise self._error(f"{twice} is used twice")
        found = tuple(
            Segment(
                tuple(s["embeddings"]),
                tuple(sorted(s["writers"], key=self._order.__getitem__)),
                tuple(s["norms"]),
                tuple(map(tuple, s["readers"])),
            )
            for s in self.segments
        )
        return Stream(self.width, found, any(norm in self._reshaped for norm in found[-1].norms))


# Norms without a scale, additions with a matrix


@replacement
class StreamNorm(nn.Module):
    """x / sqrt(sum of squares / width + eps): a norm without scale, whose divisor is the width before slicing.

    Hands its input to the writer that carries the shortcut, and takes a stream that is wider than the model's own
    addition could make it, where one is handed on.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps
        self.carries = False  # whether a writer asks for the input
        self.narrow = 0  # width of the input as it last came
        self.seen: Tensor | None = None
        self.given: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        """What it is built from."""
        return {"width": self.width, "eps": self.eps}

    def give_(self, stream: Tensor, first: bool) -> None:
        """Take part of a stream that is wider than the input will be; the first part replaces what was never used."""
        self.given = stream if first or self.given is None else self.given + stream

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        if self.given is not None:
            x, self.given = self.given.reshape(*x.shape[:-1], -1), None
        self.narrow = x.shape[-1]
        if self.carries:
            self.seen = x
        wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
        square = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """The original width and eps."""
        return f"{self.width}, eps={self.eps}"


class GivenLinear(nn.Linear):
    """A linear layer that is zero until its values are given: none are drawn from the caller's generator."""

    def reset_parameters(self) -> None:
        """Zeros."""
        for value in self.parameters(recurse=False):
            nn.init.zeros_(value)


@replacement
class StreamLinear(GivenLinear):
    """A linear layer that writes to the stream, and turns the stream it is added to into its own basis.

    The model adds the output to x; with a shortcut S [out, in] the output is W a + b + S x - x, so that the sum is
    S x + W a + b. Where S is not square the sum is handed to the next norm, `onto`, and the model adds zeros.
    """

    def __init__(self, inputs: int, outputs: int, bias: bool, beside: str, onto: str, shortcut: bool) -> None:
        super().__init__(inputs, outputs, bias)
        self.beside, self.onto = beside, onto  # the norm that sees x; the norm that reads the sum
        self.shortcut = nn.Parameter(torch.eye(outputs)) if shortcut else None
        self.width = outputs
        self._links: tuple[StreamNorm, StreamNorm] | None = None

    def settings(self) -> dict[str, Any]:
        """What it is built from."""
        return {
            "inputs": self.in_features,
            "outputs": self.width,
            "bias": self.bias is not None,
            "beside": self.beside,
            "onto": self.onto,
            "shortcut": self.shortcut is not None,
        }

    def join_(self, model: nn.Module) -> None:
        """Find the two norms in the model."""
        beside, onto = model.get_submodule(self.beside), model.get_submodule(self.onto)
        assert isinstance(beside, StreamNorm) and isinstance(onto, StreamNorm), "norms are replaced first"
        self._links = (beside, onto)  # in a tuple, so that they are not registered here as well
        if self.shortcut is not None:
            beside.carries = True

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]; [..., width of x] where the sum is handed on."""
        assert self._links is not None, "joined when it was put into the model"
        beside, onto = self._links
        out = F.linear(input, self.weight, self.bias)
        narrow, x = beside.narrow, None
        if self.shortcut is not None:
            x, beside.seen = beside.seen, None
            assert x is not None, "the norm runs before the layers behind it"
            out = out + F.linear(x, self.shortcut).reshape(out.shape)
        if out.shape[-1] != narrow:
            onto.give_(out, first=x is not None)
            return out.new_zeros(*out.shape[:-1], narrow)
        return out if x is None else out - x.reshape(out.shape)


def handing_on(model: nn.Module) -> set[str]:
    """The paths of the layers that write where a stream changes its width: the sum goes past what they put out."""
    writers = {name: module for name, module in model.named_modules() if isinstance(module, StreamLinear)}
    onto = {w.onto for w in writers.values() if w.shortcut is not None and w.shortcut.shape[0] != w.shortcut.shape[1]}
    return {name for name, writer in writers.items() if writer.onto in onto}


@replacement
class UntiedLinear(GivenLinear):
    """A linear layer with a weight of its own, where it used to share the embedding's."""

    def settings(self) -> dict[str, Any]:
        """What it is built from."""
        return {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}

    def join_(self, model: nn.Module) -> None:
        """Say in the model's configuration that nothing is shared, or a later tie would undo it."""
        for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
            if hasattr(config, "tie_word_embeddings"):
                config.tie_word_embeddings = False


def fuse(model: nn.Module, stream: Stream) -> list[Edit]:
    """Edits that move every norm's scale and shift into the layers that read it; the function stays the same.

    Norms become `StreamNorm`, a shared output layer gets a weight of its own, and where the norms subtract the mean
    (LayerNorm), embeddings and writers do it instead. Everything is calculated in float64. Raises GraphError for a
    norm that is neither RMSNorm nor LayerNorm.
    """
    named = tensors(model)
    kinds = {n: norm_kind(n, model.get_submodule(n), stream.width) for s in stream.segments for n in s.norms}
    centred = {kind.centred for kind in kinds.values()}
    if len(centred) > 1:
        raise GraphError(
            f"the norms of {type(model).__name__} were to be fused", "some subtract the mean and some do not", ADVICE
        )
    tables = {named[n].data_ptr() for s in stream.segments for n in s.embeddings}
    edits: list[Edit] = []
    for segment in stream.segments:
        for norm, readers in zip(segment.norms, segment.readers, strict=True):
            kind = kinds[norm]
            for name in readers:
                edits += _fused(model, named, name, kind, tied=named[name].data_ptr() in tables)
            edits.append(Replace(norm, StreamNorm(stream.width, kind.eps)))
    if centred == {True}:
        for segment in stream.segments:
            for name in segment.embeddings:
                table = named[name].double()
                edits.append(Update(name, (table - table.mean(1, keepdim=True)).to(named[name].dtype)))
            for name in segment.writers:
                axis = 1 if _turned(model, name) else 0
                weight = named[name].double()
                edits.append(Update(name, (weight - weight.mean(axis, keepdim=True)).to(named[name].dtype)))
                bias = _bias(name)
                if bias in named:
                    value = named[bias].double()
                    edits.append(Update(bias, (value - value.mean()).to(named[bias].dtype)))
    return edits


def _fused(model: nn.Module, named: Tensors, name: str, kind: "NormKind", tied: bool) -> list[Edit]:
    path = name.rpartition(".")[0]
    module = model.get_submodule(path)
    turned, old = _turned(model, name), named[name]
    weight = old.double().T if turned else old.double()  # [out, in]
    bias = named[_bias(name)].double() if _bias(name) in named else None
    shift = weight @ kind.shift if kind.shift is not None else None
    weight = weight * kind.scale
    bias = bias if shift is None else shift if bias is None else bias + shift
    if tied:
        own = UntiedLinear(weight.shape[1], weight.shape[0], bias is not None, device=old.device, dtype=old.dtype)
        with torch.no_grad():
            own.weight.copy_(weight)
            if bias is not None:
                own.bias.copy_(bias)
        return [Replace(path, own.train(module.training))]
    edits: list[Edit] = [Update(name, (weight.T.contiguous() if turned else weight).to(old.dtype))]
    if shift is not None and bias is not None:
        edits.append(Update(_bias(name), bias.to(old.dtype)))
    return edits


def add_shortcuts(model: nn.Module, stream: Stream, at: Collection[int] | None = None) -> list[Edit]:
    """Edits that give additions a matrix on the shortcut, the identity to begin with; after `fuse`.

    The matrix is the parameter `shortcut` [out, in] of the first writer. `at` says which segments are to begin with
    one; None: all.
    """
    named = tensors(model)
    edits: list[Edit] = []
    for number, (before, segment) in enumerate(zip(stream.segments, stream.segments[1:], strict=False), 1):
        for place, name in enumerate(segment.writers if at is None or number in at else ()):
            old = named[name]
            weight = old.T if _turned(model, name) else old
            bias = named.get(_bias(name))
            module = StreamLinear(
                weight.shape[1], weight.shape[0], bias is not None, before.norms[0], segment.norms[0], place == 0
            ).to(device=old.device, dtype=old.dtype)
            with torch.no_grad():
                module.weight.copy_(weight)
                if bias is not None:
                    module.bias.copy_(bias)
            path = name.rpartition(".")[0]
            edits.append(Replace(path, module.train(model.get_submodule(path).training)))
    return edits


def sites(model: nn.Module, stream: Stream) -> list[Site]:
    """A site of kind "stream" for each segment, its units the stream's directions: [width].

    Parts are the embeddings or writers with their biases, the shortcuts on both sides, and the readers. Norms have no
    part in it: `fuse` first.
    """
    named = tensors(model)
    blocks = [name for stack in stacks(model) for name in stack]
    found = []
    for place, segment in enumerate(stream.segments):
        parts = [_part(model, named, name, axis=1) for name in segment.embeddings]
        for name in segment.writers:
            path = name.rpartition(".")[0]
            parts.append(_part(model, named, name, axis=0))
            parts += [_part(model, named, n, axis=0) for n in (f"{path}.bias", f"{path}.shortcut") if n in named]
        for readers in segment.readers:
            parts += [_part(model, named, name, axis=1) for name in readers]
        after = stream.segments[place + 1].writers if place + 1 < len(stream.segments) else ()
        shortcuts = (f"{name.rpartition('.')[0]}.shortcut" for name in after)
        parts += [_part(model, named, name, axis=1) for name in shortcuts if name in named]
        first = parts[0]
        width = first.shape[0 if segment.writers else 1]
        block = next((b for b in blocks if first.name.startswith(b + ".")), "")
        found.append(Site(f"stream.{place}", "stream", (width,), tuple(parts), block=block))
    return found


def whole(model: nn.Module, stream: Stream) -> Site:
    """The stream as one site, for methods that keep the same directions everywhere; without shortcuts."""
    parts = {part.key: part for site in sites(model, stream) for part in site.parts}
    return Site("stream", "stream", (stream.width,), tuple(parts.values()))


def _part(model: nn.Module, named: Tensors, name: str, axis: int) -> Part:
    value, turned = named[name], _turned(model, name)
    shape = tuple(reversed(value.shape)) if turned else tuple(value.shape)
    grid = [1] * len(shape)
    grid[axis] = shape[axis]
    return Part(name, shape, torch.arange(shape[axis]).reshape(grid), turned=turned, itemsize=value.element_size())


def _turned(model: nn.Module, name: str) -> bool:
    module = model.get_submodule(name.rpartition(".")[0])
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and name.endswith(".weight")


def _bias(weight: str) -> str:
    return weight.rpartition(".")[0] + ".bias"


@dataclass(frozen=True, eq=False)
class NormKind:
    """What a norm does: x, less its mean when centred, over its root mean square, times scale, plus shift."""

    centred: bool
    scale: Tensor  # [width], float64
    shift: Tensor | None
    eps: float

    def times(self, gain: Tensor, factor: float | Tensor) -> Tensor:
        """A gain as it is stored, so that the norm scales by a factor more: what exceeds one where that is stored."""
        apart = self.scale.to(gain.device) - gain.double()
        return (self.scale.to(gain.device) * factor - apart).to(gain.dtype)


def norm_kind(name: str, module: nn.Module, width: int) -> NormKind:
    """What a norm does, found by trying it: scales are stored as they are, or as what exceeds one (Gemma).

    Raises GraphError for one that is neither an RMSNorm nor a LayerNorm.
    """
    own = dict(module.named_parameters(recurse=False))
    reference = next(iter(own.values()), None)
    dtype = torch.float32 if reference is None else reference.dtype
    device = torch.device("cpu") if reference is None else reference.device
    ones = torch.ones(width, dtype=torch.float64, device=device)
    weight, bias = own.get("weight"), own.get("bias")
    scales = [ones] if weight is None else [weight.detach().double(), ones + weight.detach().double()]
    shift = None if bias is None else bias.detach().double()
    said_eps = [getattr(module, key, None) for key in ("variance_epsilon", "eps", "epsilon", "norm_eps")]
    given = [float(value) for value in said_eps if isinstance(value, (int, float))]
    guesses = given[:1] or [1e-5, 1e-6, torch.finfo(dtype).eps]  # some keep it in the code of their forward
    draw = torch.Generator().manual_seed(0)
    sizes = torch.tensor([[1.0], [1e-2], [1e-3]])  # small ones tell whether eps is right
    x = (torch.randn(3, width, generator=draw) * sizes + 0.3 * sizes).to(device=device, dtype=dtype)
    with torch.no_grad():
        said = module(x).double()
    slack = 1e-3 if dtype in (torch.float32, torch.float64) else 5e-2
    for centred, eps in product((False, True), guesses):
        flow = x.double() - x.double().mean(-1, keepdim=True) if centred else x.double()
        flow = flow * torch.rsqrt(flow.square().mean(-1, keepdim=True) + eps)
        for scale in scales:
            made = flow * scale + (0.0 if shift is None else shift)
            if float((made - said).norm()) <= slack * float(said.norm()):
                return NormKind(centred, scale, shift, eps)
    raise GraphError(
        f"the scale of {name} was to be moved into the layers that read it",
        f"a {type(module).__name__} is neither an RMSNorm nor a LayerNorm by what it does",
        ADVICE,
    )


def second_moments(flows: Iterable[Tensor], masks: Sequence[Tensor | None] | None = None) -> tuple[Tensor, int]:
    """Sum of x x^T over tokens [width, width] in float64, uncentred, and how many tokens there were.

    `masks` [batch, tokens], one per flow, leave out padding where they are 0.
    """
    total, count = None, 0
    for place, flow in enumerate(flows):
        rows = flow.reshape(-1, flow.shape[-1]).double()
        mask = None if masks is None else masks[place]
        if mask is not None:
            rows = rows[mask.reshape(-1).bool()]
        gram = rows.T @ rows
        total, count = gram if total is None else total.add_(gram), count + len(rows)
    assert total is not None, "at least one batch"
    return total, count


def rms_norms(model: nn.Module, stream: Stream, advice: str) -> dict[str, NormKind]:
    """What the norms of a stream do, by the name of the gain: those that can go on as they did in a narrower stream.

    Of d channels k are left. What is written times sqrt(k / d) has the mean square that the whole stream had, the
    others being zero; so a plain RMSNorm divides by the same, eps and all, and its gain makes up for the rest:

        g sqrt(d / k) x sqrt(k / d) / sqrt(sum of (x sqrt(k / d))^2 / k + eps) = g x / sqrt(sum of x^2 / d + eps)

    Raises GraphError, with an advice, for a norm that is no RMSNorm with a gain.
    """
    found = {}
    for name in dict.fromkeys(norm for segment in stream.segments for norm in segment.norms):
        module = model.get_submodule(name)
        kind = norm_kind(name, module, stream.width)
        asked = f"channels of the residual stream of {type(model).__name__} were to be masked"
        if kind.centred or kind.shift is not None:
            raise GraphError(
                asked,
                f"{name} ({type(module).__name__}) subtracts the mean or adds a shift, and so makes masked channels"
                " count again",
                advice,
            )
        if not isinstance(getattr(module, "weight", None), Tensor):
            raise GraphError(asked, f"{name} has no gain that could make up for the width", advice)
        found[f"{name}.weight"] = kind
    return found
