"""Every layer in the storage that is fastest on this machine, as measured here: dense where sparse loses."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils._pytree import tree_leaves

from secateur import kernels
from secateur.candidates import (
    FORMATS,
    SHARED,
    WORTH,
    Layer,
    Seen,
    Slide,
    holds,
    seen_by,
    sparsity_of,
    why_not,
    worth_trying,
)
from secateur.chaining import chained, chained_within, decoding, has_hooks, sharing
from secateur.errors import SettingError
from secateur.formats import Bitmap, BitmapInt8, Format, GroupCols
from secateur.formats import conv as convolutions
from secateur.formats.chain import ConvChain
from secateur.formats.conv import Form, SparseConv2d
from secateur.formats.decoder import Decoder
from secateur.formats.linear import SparseLinear, SparsePointwise
from secateur.formats.packed import Packed
from secateur.formats.pages import empty, in_large_pages, settled
from secateur.outcome import Timing, time_pair
from secateur.task import Batch

SAME = 1e-4  # of the largest number, by which answers may differ for the order of sums
TWICE = 2.0  # times as long as dense that a convolution may take packed, to be tried in a chain all the same
MARGIN = 0.05  # of the dense time that a format must save: less is noise
AT_ONCE = 2**29  # bytes of dense weights that are measured together
ROUNDS, PASSES = 7, 3  # of all turns, and of the calls of a turn


@dataclass(frozen=True)
class Trial:
    """One way to store a layer, and what it came to."""

    name: str  # of the format, or "dense"
    milliseconds: float  # the median of one call
    nbytes: int


@dataclass(frozen=True)
class Choice:
    """What became of a layer, and why."""

    layer: str
    shape: tuple[int, ...]  # outputs, inputs, and the kernel of a convolution
    rows: int  # of its input, in the example; of a convolution the pixels of its outcome
    sparsity: float
    chosen: str  # the name of a trial
    why: str
    trials: tuple[Trial, ...] = ()  # dense first; none when nothing was tried
    slid: Slide | None = None  # of a convolution, where there are trials

    def trial(self, name: str) -> Trial | None:
        """What a way of storing it came to, or None when it was not tried."""
        return next((trial for trial in self.trials if trial.name == name), None)


@dataclass(frozen=True, eq=False)
class Accelerated:
    """A model for inference on this machine, and the table its layers were chosen by."""

    model: nn.Module
    choices: tuple[Choice, ...]
    dense: Timing  # of the whole model, before
    now: Timing  # and after, in turn with it
    error: float  # the largest difference in the first output, over the largest number there
    level: str  # of the kernels

    @property
    def chosen(self) -> dict[str, int]:
        """How many layers came to lie in each storage."""
        names = [choice.chosen for choice in self.choices]
        return {name: names.count(name) for name in sorted(set(names))}


def accelerate(
    model: nn.Module,
    example: Batch | Tensor | tuple[Any, ...] | Mapping[str, Any],
    *,
    dtype: torch.dtype | None = None,
    threads: int | None = None,
    formats: Sequence[Format] = FORMATS,
) -> Accelerated:
    """A copy of a model for inference, with each layer in the storage that was fastest on this example.

    Layers are linear ones and two-dimensional convolutions. One stays dense unless it is faster packed than in the
    fastest of the ways torch has for it: as the model calls it, for convolutions with channels last too, from the
    layout of the model and back to it, and those that look at one pixel as a product.

    Where the model can be traced, batch norms go into the convolutions before them, whether those are packed or not,
    and packed layers that follow one another run as one `ConvChain` or `LinearChain`, in what is then a GraphModule, or
    the chain itself. Of other models, modules that are nothing but packed linear layers do, and blocks of a language
    model whose linear layers are all packed, as one `Decoder`: all of them in one call for each new token.

    The example has the batch and the number of tokens that the model will be used with: one token for decoding, a
    window for reading prompts. Layers are timed one after the other, as the model calls them, so that weights come from
    where they will. The whole is then timed in turn with the dense model, and stays dense when it is not faster.
    `dtype` converts the copy first; `threads` are used here, and are those to use it with.

    Raises SettingError for a model that is not on the CPU or has no such layer, for what is no format, and for threads
    below one.
    """
    batch = _batch(example)
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if devices:
        raise SettingError(
            "a model was to be accelerated", f"it lies on {', '.join(sorted(devices))}", "Move it to the CPU first."
        )
    if odd := [format for format in formats if not hasattr(format, "why_not")]:
        raise SettingError(
            "a model was to be accelerated",
            f"the formats hold {odd[0]!r}, which is none",
            "Give formats of secateur.formats, such as Bitmap().",
        )
    if threads is not None and threads < 1:
        raise SettingError("a model was to be accelerated", f"threads are {threads}", "Give one or more.")
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        dense = dense.to(dtype)
        batch = _converted(batch, dtype)
    base = _folded(dense)
    layers = {
        name: module
        for name, module in base.named_modules()
        if type(module) in (nn.Linear, nn.Conv2d) and not parametrize.is_parametrized(module)
    }
    if not layers:
        raise SettingError(
            "a model was to be accelerated",
            f"{type(model).__name__} has no linear layer and no convolution",
            "Give one that has.",
        )
    with _threads(threads), torch.no_grad():
        seen = seen_by(base, layers, batch)
        chosen: dict[str, nn.Module] = {}
        beside: dict[str, nn.Module] = {}  # convolutions that are slower so, which a chain may make up for
        choices: list[Choice] = []
        for some in _at_once(layers):
            for choice, packed, other in _measured(some, seen, formats):
                choices.append(choice)
                chosen |= {} if packed is None else {choice.layer: packed}
                beside |= {} if other is None else {choice.layer: other}
        _settle([*chosen.values()], [at for name, at in layers.items() if name not in chosen])
        _settle([*beside.values()], [])  # by themselves, to be given back by themselves where no chain takes them
        sparse = _in_chains(sharing(base, {layers[name]: packed for name, packed in chosen.items()}), batch)
        if beside:
            sparse, choices, chosen = _all_chained(base, layers, chosen, beside, choices, sparse, batch)
        before, after = time_pair(dense, sparse, batch)
        if not chosen and base is dense:  # one model twice: between its times is noise alone
            sparse, after = dense, before
        elif after.milliseconds > before.milliseconds:
            why = f"the whole model was slower with it: {after.milliseconds:.3g} ms, dense {before.milliseconds:.3g}"
            choices = [c if c.chosen == "dense" else _kept_dense(c, why) for c in choices]
            sparse, after = dense, before
        error = _difference(batch.through(dense), batch.through(sparse))
    return Accelerated(sparse, tuple(choices), before, after, error, kernels.level())


def _settle(packed: Sequence[nn.Module], dense: Sequence[nn.Module]) -> None:
    """Put what packed layers hold into large pages, and the weights of linear ones that stay dense."""
    layers = [each for module in packed for each in module.modules() if isinstance(each, (SparseLinear, SparseConv2d))]
    for layer, held in zip(layers, settled([layer.packed for layer in layers]), strict=True):
        layer._hold(held)
    plain = {id(at.weight): at.weight for at in dense if isinstance(at, nn.Linear) and at.weight.is_contiguous()}
    for weight, moved in zip(plain.values(), in_large_pages(list(plain.values())), strict=True):
        weight.data = moved


def _in_chains(model: nn.Module, batch: Batch) -> nn.Module:
    """A model with its packed layers in chains; as it is when it does not answer the example the same then.

    A trace does not show all that Python may do, such as to count calls, and nothing would say so later.
    """
    for way in (chained, chained_within):
        made = way(model)
        if made is not model and _answers_alike(model, made, batch):
            break
    else:
        return model
    decoded = decoding(made)
    decoders = [module for module in decoded.modules() if isinstance(module, Decoder)]
    return decoded if decoders and all(decoder.agrees() for decoder in decoders) else made


def _answers_alike(model: nn.Module, made: nn.Module, batch: Batch) -> bool:
    try:
        one, other = (tree_leaves(batch.through(each)) for each in (model, made))
        return len(one) == len(other) and all(_difference(a, b) <= SAME for a, b in zip(one, other, strict=True))
    except (RuntimeError, TypeError, ValueError):  # what was traced does not take the example as it is given
        return False


def _all_chained(
    base: nn.Module,
    layers: Mapping[str, Layer],
    chosen: dict[str, nn.Module],
    beside: dict[str, nn.Module],
    choices: list[Choice],
    sparse: nn.Module,
    batch: Batch,
) -> tuple[nn.Module, list[Choice], dict[str, nn.Module]]:
    """The model with every convolution as a chain takes it, where one chain of them all is faster than what it is.

    A layer by itself is timed with the call of it; in a chain there is none, but what is no part of it ends it.
    """
    packed = {**chosen, **beside}
    longer = _in_chains(sharing(base, {layers[name]: at for name, at in packed.items()}), batch)
    if not any(isinstance(module, ConvChain) for module in longer.modules()):
        return sparse, choices, chosen
    now, then = time_pair(sparse, longer, batch)
    if then.milliseconds > now.milliseconds * (1 - MARGIN):
        return sparse, choices, chosen
    why = f"in a chain: the whole model takes {then.milliseconds:.3g} ms with it, {now.milliseconds:.3g} without"
    names = {name: at.packed.format.name for name, at in beside.items() if isinstance(at, SparseConv2d)}
    told = [replace(c, chosen=names[c.layer], why=why) if c.layer in names else c for c in choices]
    return longer, told, packed


def break_even(
    shape: tuple[int, ...], rows: int, dtype: torch.dtype, format: Format, slid: Slide | None = None
) -> float | None:
    """The sparsity from which a format is faster than dense at a shape, measured on random masks; None for never.

    The masks keep whole groups of outputs where the format has them. Outputs beyond 4096 are left out: time grows with
    them, for dense as for sparse. A convolution says with `slid` what it goes over.
    """
    made = torch.Generator().manual_seed(0)
    shape = (min(shape[0], 4096) if slid is None or slid.groups == 1 else shape[0], *shape[1:])
    weight = torch.randn(shape, generator=made).to(dtype)
    of_group = format.rows if isinstance(format, GroupCols) else 1
    noise = torch.rand(-(-shape[0] // of_group), *shape[1:], generator=made).repeat_interleave(of_group, 0)[: shape[0]]
    size = (rows, shape[1]) if slid is None else (slid.pictures, shape[1] * slid.groups, *slid.size)
    x = torch.randn(size, generator=made).to(dtype)
    if not holds(format, shape, slid) or format.why_not(weight) is not None:
        return None
    before: tuple[float, float] | None = None
    with torch.no_grad():
        for sparsity in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            packed = format.pack(weight, noise >= sparsity)
            dense, sparse = _medians([[call] for call in _both_ways(weight, packed, x, slid)], ROUNDS)
            gain = dense - sparse
            if gain >= 0:
                if before is None:
                    return sparsity
                at, loss = before
                return at + (sparsity - at) * loss / (loss + gain)
            before = sparsity, -gain
    return None


def _both_ways(weight: Tensor, packed: Packed, x: Tensor, slid: Slide | None) -> list[Callable[[], Tensor]]:
    """A weight as a dense layer has it, and packed."""
    if slid is None:
        return [lambda: F.linear(x, weight), lambda: packed.matmul(x)]
    how = slid.stride, slid.padding, slid.dilation
    return [lambda: F.conv2d(x, weight, None, *how, slid.groups), lambda: convolutions.convolve(packed, x, *how)]


def memory_speed(nbytes: int = 2**28) -> float | None:
    """Bytes a second that can be read from memory with the threads in use; None without compiled kernels."""
    kernel = kernels.find("memory_read")
    if kernel is None:
        return None
    data = empty((nbytes,), torch.empty(0, dtype=torch.uint8)).zero_()  # in large pages, as what is packed
    seconds, clock = [], _clock()
    for _ in range(5):
        start = clock()
        kernels.run(kernel, kernels.Memory(data.data_ptr(), nbytes), kernels.Memory.items(nbytes))
        seconds.append(clock() - start)
    return nbytes / statistics.median(seconds)


def _measured(
    layers: Mapping[str, Layer], seen: Mapping[str, Seen], formats: Sequence[Format]
) -> Iterator[tuple[Choice, nn.Module | None, nn.Module | None]]:
    """Each layer with what was chosen for it and the packed layer, and where that is not for chains one that is."""
    packed: dict[str, dict[str, SparseLinear | SparseConv2d | SparsePointwise]] = {}
    reasons: dict[str, str] = {}
    calls: list[tuple[str, str, Any]] = []
    slides = {name: seen[name].slid(at) for name, at in layers.items() if name in seen and isinstance(at, nn.Conv2d)}
    for name, layer in layers.items():
        packed[name] = {}
        why_none = convolutions.why_not(layer) if isinstance(layer, nn.Conv2d) else None
        if seen.get(name) is None:
            reasons[name] = "the example does not reach it"
        elif has_hooks(layer):
            reasons[name] = "it has hooks, which nobody would call where it is packed"
        elif why_none is not None:
            reasons[name] = why_none
        elif not (tried := worth_trying(formats, layer.weight, seen[name].rows(layer))):
            least = SHARED if layer.weight.dtype is torch.float32 else WORTH
            reasons[name] = f"{sparsity_of(layer.weight):.0%} of it is zero, and below {least:.0%} no format is faster"
        else:
            for format in tried:
                why = why_not(format, layer, seen[name])
                if why is None:
                    packed[name][format.name] = _packed(layer, format)
                elif name not in reasons or holds(format, tuple(layer.weight.shape), slides.get(name)):
                    reasons[name] = f"{format.name}: {why}"
        if not packed[name]:
            reasons.setdefault(name, "none of the formats is for it")
            continue
        x = seen[name].example(layer)
        calls += [(name, way, call) for way, call in _dense_ways(layer, x)]
        calls += [(name, way, lambda x=x, at=at: at(x)) for way, at in packed[name].items()]
    calls.sort(key=lambda call: call[1])
    turns = [[call for _, _, call in turn] for _, turn in groupby(calls, key=lambda call: call[1])]
    times: dict[str, dict[str, float]] = {name: {} for name in layers}
    for (name, way, _), seconds in zip(calls, _medians(turns, ROUNDS), strict=True):
        times[name][way] = seconds * 1e3
    for name, layer in layers.items():
        size, held = layer.weight.numel() * layer.weight.element_size(), packed[name]
        ways = [*(way for way in times[name] if way not in held), *held]
        trials = tuple(Trial(at, times[name][at], held[at].packed.nbytes if at in held else size) for at in ways)
        shape, sparsity, rows = tuple(layer.weight.shape), sparsity_of(layer.weight), 0
        if name in seen:
            rows = seen[name].rows(layer)
        if not trials:
            yield Choice(name, shape, rows, sparsity, "dense", reasons[name]), None, None
            continue
        slid = slides.get(name)
        best = min((t for t in trials if t.name in held), key=lambda trial: trial.milliseconds)
        dense = min((t for t in trials if t.name not in held), key=lambda trial: trial.milliseconds)
        links = [t for t in trials if isinstance(held.get(t.name), SparseConv2d)]
        link = min(links, key=lambda trial: trial.milliseconds, default=None)
        other = held[link.name] if link is not None and link.milliseconds < TWICE * dense.milliseconds else None
        if best.milliseconds > dense.milliseconds * (1 - MARGIN):
            why = f"{best.name} takes {best.milliseconds:.3g} ms, {dense.name} {dense.milliseconds:.3g}"
            yield Choice(name, shape, rows, sparsity, "dense", why, trials, slid), None, other
        else:
            why = f"{dense.milliseconds / best.milliseconds:.2f} times as fast as {dense.name}"
            chosen = held[best.name]
            yield (
                Choice(name, shape, rows, sparsity, best.name, why, trials, slid),
                chosen,
                None if chosen is other else other,
            )


def _packed(layer: Layer, format: Format) -> SparseLinear | SparseConv2d | SparsePointwise:
    if isinstance(layer, nn.Linear):
        bits = 8 if isinstance(format, BitmapInt8) else 8 * layer.weight.element_size()
        # With a value for each weight no mask is read, which takes less than what zeros would save.
        full = isinstance(format, (Bitmap, BitmapInt8)) and sparsity_of(layer.weight) < 1 / bits
        return SparseLinear.of(layer, format, torch.ones_like(layer.weight, dtype=torch.bool) if full else None)
    return SparseConv2d.of(layer, format) if isinstance(format, Form) else SparsePointwise.of(layer, format)


def _dense_ways(layer: Layer, x: Tensor) -> list[tuple[str, Callable[[], Tensor]]]:
    """What torch has for a layer, by name: as the model calls it first."""
    ways: list[tuple[str, Callable[[], Tensor]]] = [("dense", lambda: layer(x))]
    if isinstance(layer, nn.Linear):
        return ways
    weight, bias, slide = layer.weight, layer.bias, convolutions.slide(layer)
    before = torch.channels_last if not x.is_contiguous() else torch.contiguous_format
    turned = weight.contiguous(memory_format=torch.channels_last)

    def last() -> Tensor:  # with the way there and back, as the model around it would have it
        there = x.contiguous(memory_format=torch.channels_last)
        return F.conv2d(there, turned, bias, *slide, layer.groups).contiguous(memory_format=before)

    ways.append(("dense, channels last", last))
    if layer.groups == 1 and layer.kernel_size == (1, 1) and slide[:2] == ((1, 1), (0, 0)) and len(x) == 1:
        matrix, pixels = weight.flatten(1), x.flatten(2)[0]
        if bias is None:
            ways.append(("dense, as a product", lambda: matrix @ pixels))
        else:
            ways.append(("dense, as a product", lambda: torch.addmm(bias.unsqueeze(1), matrix, pixels)))
    return ways


def _medians(turns: Sequence[Sequence[Callable[[], Tensor]]], rounds: int) -> list[float]:
    """The median seconds of each call of each turn, one turn after another.

    A turn is one way through all layers. Its calls are made a few times, and the last time counts: caches then hold of
    the weights what they will where the model is called again and again, and no more.
    """
    times: list[list[list[float]]] = [[[] for _ in turn] for turn in turns]
    clock = _clock()
    for _ in range(rounds):
        for turn, kept in zip(turns, times, strict=True):
            for call in (*turn,) * (PASSES - 1):
                call()
            for call, mine in zip(turn, kept, strict=True):
                start = clock()
                call()
                mine.append(clock() - start)
    return [statistics.median(mine) for kept in times for mine in kept]


def _clock() -> Callable[[], float]:
    """With one thread the processor's time for it, which other programs do not lengthen."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _folded(model: nn.Module) -> nn.Module:
    """A model whose convolutions do what the batch norms after them did; the model itself where there are none.

    A norm goes where the trace shows it to be all that sees the outcome of a convolution, each called once.
    """
    if not any(type(module) is nn.BatchNorm2d for module in model.modules()):
        return model
    try:
        nodes = list(torch.fx.symbolic_trace(model).graph.nodes)
    except Exception:  # whatever a model's own code raises when it meets no numbers
        return model
    called = [id(model.get_submodule(node.target)) for node in nodes if node.op == "call_module"]
    read = {node.target.rpartition(".")[0] for node in nodes if node.op == "get_attr"}  # weights that code looks at
    instead: dict[nn.Module, nn.Module] = {}
    for node in nodes:
        after = next(iter(node.users), None)
        if node.op != "call_module" or len(node.users) != 1 or after is None or after.op != "call_module":
            continue
        conv, norm = model.get_submodule(node.target), model.get_submodule(after.target)
        if type(conv) is not nn.Conv2d or parametrize.is_parametrized(conv) or type(norm) is not nn.BatchNorm2d:
            continue
        if has_hooks(conv) or has_hooks(norm):
            continue
        once = called.count(id(conv)) == called.count(id(norm)) == 1 and not {node.target, after.target} & read
        if once and norm.running_var is not None:
            instead |= {conv: fuse_conv_bn_eval(conv, norm), norm: nn.Identity()}
    return sharing(model, instead) if instead else model


def _at_once(layers: Mapping[str, Layer]) -> Iterator[dict[str, Layer]]:
    """Layers in groups: all storages of a group are in memory together."""
    some: dict[str, Layer] = {}
    size = 0
    for name, layer in layers.items():
        size += layer.weight.numel() * layer.weight.element_size()
        some[name] = layer
        if size >= AT_ONCE:
            yield some
            some, size = {}, 0
    if some:
        yield some


def _kept_dense(choice: Choice, why: str) -> Choice:
    return replace(choice, chosen="dense", why=why)


def _difference(one: Any, other: Any) -> float:
    first, second = _first(one), _first(other)
    if first is None or second is None or not first.numel():
        return 0.0
    scale = first.double().abs().max()
    return float((first.double() - second.double()).abs().max() / scale) if scale else 0.0


def _first(output: Any) -> Tensor | None:
    """The first floating-point tensor of what a model answered."""
    if isinstance(output, Tensor):
        return output if output.is_floating_point() else None
    values = output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else ()
    return next((found for value in values if (found := _first(value)) is not None), None)


def _batch(example: Batch | Tensor | tuple[Any, ...] | Mapping[str, Any]) -> Batch:
    if isinstance(example, Batch):
        return example
    return Batch((example,) if isinstance(example, Tensor) else example)


def _converted(batch: Batch, dtype: torch.dtype) -> Batch:
    def to(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    if isinstance(batch.inputs, Mapping):
        return Batch({key: to(value) for key, value in batch.inputs.items()}, batch.target)
    return Batch(tuple(to(value) for value in batch.inputs), batch.target)


@contextmanager
def _threads(wanted: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(wanted or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
