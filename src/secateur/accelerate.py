"""Every linear layer in the storage that is fastest on this machine, as measured here: dense where sparse loses."""

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from secateur import kernels
from secateur.errors import SettingError
from secateur.formats import Bitmap, BitmapInt8, Format, Sell16
from secateur.formats.linear import SparseLinear
from secateur.formats.packed import Packed
from secateur.outcome import Timing, time_pair
from secateur.task import Batch

FORMATS: tuple[Format, ...] = (Bitmap(), Sell16())
"""What is tried for a layer, unless other formats are asked for."""

WORTH = 0.3  # sparsity below which no format was ever faster with many rows, or in float32: such layers are not packed
FEW = 16  # rows of 16 bits up to which a bitmap of a whole weight is read faster than F.linear reads the weight
MARGIN = 0.05  # of the dense time that a format must save: less is noise
AT_ONCE = 2**29  # bytes of dense weights that are measured together
ROUNDS = 9


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
    shape: tuple[int, int]  # outputs, inputs
    rows: int  # of its input, in the example
    sparsity: float
    chosen: str  # the name of a trial
    why: str
    trials: tuple[Trial, ...] = ()  # dense first; none when nothing was tried

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
    """A copy of a model for inference, with each linear layer in the storage that was fastest on this example.

    The example has the batch and the number of tokens that the model will be used with: one token for decoding, a
    window for reading prompts. Layers are timed one after the other, as the model calls them, so that weights come from
    where they will. The whole is then timed in turn with the dense model, and stays dense when it is not faster.
    `dtype` converts the copy first; `threads` are used here, and are those to use it with.

    Raises SettingError for a model that is not on the CPU or has no linear layer, and for threads below one.
    """
    batch = _batch(example)
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if devices:
        raise SettingError(
            "a model was to be accelerated", f"it lies on {', '.join(sorted(devices))}", "Move it to the CPU first."
        )
    if threads is not None and threads < 1:
        raise SettingError("a model was to be accelerated", f"threads are {threads}", "Give one or more.")
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    if dtype is not None:
        dense = dense.to(dtype)
        batch = _converted(batch, dtype)
    layers = {
        name: module
        for name, module in dense.named_modules()
        if type(module) is nn.Linear and not parametrize.is_parametrized(module)
    }
    if not layers:
        raise SettingError(
            "a model was to be accelerated", f"{type(model).__name__} has no linear layer", "Give one that has."
        )
    with _threads(threads), torch.no_grad():
        rows = _rows(dense, layers, batch)
        chosen: dict[str, Packed] = {}
        choices: list[Choice] = []
        for some in _at_once(layers):
            for choice, packed in _measured(some, rows, formats):
                choices.append(choice)
                if packed is not None:
                    chosen[choice.layer] = packed
        sparse = _with(
            dense, {layers[name]: SparseLinear(packed, layers[name].bias) for name, packed in chosen.items()}
        )
        before, after = time_pair(dense, sparse, batch)
        if chosen and after.milliseconds > before.milliseconds:
            why = f"the whole model was slower with it: {after.milliseconds:.3g} ms, dense {before.milliseconds:.3g}"
            choices = [c if c.chosen == "dense" else _kept_dense(c, why) for c in choices]
            sparse, after = dense, before
        error = _difference(batch.through(dense), batch.through(sparse))
    return Accelerated(sparse, tuple(choices), before, after, error, kernels.level())


def break_even(shape: tuple[int, int], rows: int, dtype: torch.dtype, format: Format) -> float | None:
    """The sparsity from which a format is faster than dense at a shape, measured on random masks; None for never.

    Outputs beyond 4096 are left out: time grows with them, for dense as for sparse.
    """
    made = torch.Generator().manual_seed(0)
    outputs, inputs = min(shape[0], 4096), shape[1]
    weight = torch.randn(outputs, inputs, generator=made).to(dtype)
    noise = torch.rand(outputs, inputs, generator=made)
    x = torch.randn(rows, inputs, generator=made).to(dtype)
    before: tuple[float, float] | None = None
    with torch.no_grad():
        for sparsity in (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95):
            packed = format.pack(weight, noise >= sparsity)
            dense, sparse = _medians([lambda: F.linear(x, weight), lambda p=packed: p.matmul(x)], ROUNDS)
            gain = dense - sparse
            if gain >= 0:
                if before is None:
                    return sparsity
                at, loss = before
                return at + (sparsity - at) * loss / (loss + gain)
            before = sparsity, -gain
    return None


def memory_speed(nbytes: int = 2**28) -> float | None:
    """Bytes a second that can be read from memory with the threads in use; None without compiled kernels."""
    kernel = kernels.find("memory_read")
    if kernel is None:
        return None
    data = torch.zeros(nbytes, dtype=torch.uint8)
    seconds, clock = [], _clock()
    for _ in range(5):
        start = clock()
        kernels.run(kernel, kernels.Memory(data.data_ptr(), nbytes), kernels.Memory.items(nbytes))
        seconds.append(clock() - start)
    return nbytes / statistics.median(seconds)


def _measured(
    layers: Mapping[str, nn.Linear], rows: Mapping[str, int], formats: Sequence[Format]
) -> Iterator[tuple[Choice, Packed | None]]:
    """Each layer with what was chosen for it, packed unless that is dense."""
    packed: dict[str, list[Packed]] = {}
    reasons: dict[str, str] = {}
    calls: list[tuple[str, str, Any]] = []
    for name, layer in layers.items():
        packed[name] = []
        if rows.get(name) is None:
            reasons[name] = "the example does not reach it"
        elif not (tried := _worth_trying(formats, layer.weight, rows[name])):
            reasons[name] = f"{_sparsity(layer.weight):.0%} of it is zero, and below {WORTH:.0%} no format is faster"
        else:
            for format in tried:
                why = format.why_not(layer.weight)
                if why is None:
                    packed[name].append(format.pack(layer.weight))
                else:
                    reasons[name] = f"{format.name}: {why}"
        if not packed[name]:
            continue
        x = torch.randn(rows[name], layer.in_features, generator=torch.Generator().manual_seed(0)).to(
            layer.weight.dtype
        )
        calls.append((name, "dense", lambda x=x, at=layer: F.linear(x, at.weight, at.bias)))
        for each in packed[name]:
            calls.append((name, each.format.name, lambda x=x, at=layer, p=each: p.matmul(x, at.bias)))
    # Way by way through all layers, so that a layer's weights were pushed out by the others' as they will be.
    calls.sort(key=lambda call: call[1] != "dense")
    calls.sort(key=lambda call: call[1])
    times = dict(zip([call[:2] for call in calls], _medians([call[2] for call in calls], ROUNDS), strict=True))
    for name, layer in layers.items():
        size = layer.weight.numel() * layer.weight.element_size()
        trials = [Trial("dense", times[name, "dense"] * 1e3, size)] if packed[name] else []
        trials += [Trial(p.format.name, times[name, p.format.name] * 1e3, p.nbytes) for p in packed[name]]
        shape, sparsity = (layer.out_features, layer.in_features), _sparsity(layer.weight)
        best = min(trials[1:], key=lambda trial: trial.milliseconds, default=None)
        if best is None:
            yield Choice(name, shape, rows.get(name, 0), sparsity, "dense", reasons[name]), None
        elif best.milliseconds > trials[0].milliseconds * (1 - MARGIN):
            why = f"{best.name} takes {best.milliseconds:.3g} ms, dense {trials[0].milliseconds:.3g}"
            yield Choice(name, shape, rows[name], sparsity, "dense", why, tuple(trials)), None
        else:
            why = f"{trials[0].milliseconds / best.milliseconds:.2f} times as fast as dense"
            found = next(p for p in packed[name] if p.format.name == best.name)
            yield Choice(name, shape, rows[name], sparsity, best.name, why, tuple(trials)), found


def _worth_trying(formats: Sequence[Format], weight: Tensor, rows: int) -> list[Format]:
    """The formats that may be faster for a weight: below a sparsity only bitmaps, for a few rows of 16 bits."""
    if _sparsity(weight) >= WORTH:
        return list(formats)
    if rows > FEW or weight.dtype is torch.float32:
        return []
    return [format for format in formats if isinstance(format, (Bitmap, BitmapInt8))]


def _medians(calls: Sequence[Any], rounds: int) -> list[float]:
    """The median seconds of each call, all of them in turn, after a round that is not counted."""
    times: list[list[float]] = [[] for _ in calls]
    clock = _clock()
    for turn in range(rounds + 1):
        for call, kept in zip(calls, times, strict=True):
            start = clock()
            call()
            if turn:
                kept.append(clock() - start)
    return [statistics.median(kept) for kept in times]


def _clock() -> Callable[[], float]:
    """With one thread the processor's time for it, which other programs do not lengthen."""
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def _rows(model: nn.Module, layers: Mapping[str, nn.Linear], batch: Batch) -> dict[str, int]:
    """How many rows each layer multiplies when the model sees the example; the most, where it is called often."""
    found: dict[str, int] = {}

    def hook(name: str) -> Any:
        def see(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            found[name] = max(found.get(name, 0), args[0].numel() // args[0].shape[-1])

        return see

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in layers.items()]
    try:
        batch.through(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _with(model: nn.Module, instead: Mapping[nn.Linear, SparseLinear]) -> nn.Module:
    """A model that shares everything with another but the layers that stand in for its own."""
    # A copy in which nothing is copied: all parameters, buffers and the layers that go are taken as they are.
    same: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, {**same, **{id(old): new for old, new in instead.items()}})


def _at_once(layers: Mapping[str, nn.Linear]) -> Iterator[dict[str, nn.Linear]]:
    """Layers in groups: all storages of a group are in memory together."""
    some: dict[str, nn.Linear] = {}
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
    return Choice(choice.layer, choice.shape, choice.rows, choice.sparsity, "dense", why, choice.trials)


def _sparsity(weight: Tensor) -> float:
    return float((weight == 0).sum()) / weight.numel()


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
