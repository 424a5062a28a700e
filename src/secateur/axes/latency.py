"""What a forward pass takes on this machine at other widths: each layer timed by itself once, and remembered.

Matrices and kernels are timed at a few widths along each side that can be cut, and in between prices are interpolated.
What is left of the network's time (activations, norms, attention's own products) goes with what the layers put out. A
trial, the network cut and timed against the dense one in turn, corrects both. Every time is kept in a file, so that
the same question has the same answer until the machine, the threads or torch are others.
"""

import contextlib
import hashlib
import json
import os
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_flatten

from secateur.errors import ModelError
from secateur.outcome import about_machine, write_text
from secateur.site import tensors
from secateur.task import Batch, modes_of, restore_modes_

TOLERANCE = 0.05
"""How far what is reached may be from what was asked, as a fraction of the dense time."""

FRACTIONS = (1 / 16, 1 / 4, 1 / 2, 3 / 4, 1.0)
"""The widths at which a layer is timed, as fractions of what it has."""

TURNS = 15
"""How often a call is timed; the median counts."""


@dataclass(frozen=True)
class Layer:
    """A matrix or kernel as it is called: enough to time it at other widths."""

    name: str  # of its module
    weight: str  # of its tensor
    kind: str  # linear, conv1d, conv2d, conv3d
    widths: tuple[int, int]  # out, in; of a depthwise kernel both are its channels
    given: tuple[int, ...]  # the shape of what flows in
    dtype: torch.dtype
    bias: bool
    kernel: tuple[int, ...] = ()
    options: tuple[Any, ...] = ()  # stride, padding, dilation
    depthwise: bool = False

    @property
    def key(self) -> str:
        """What it is remembered by, without its widths."""
        given = list(self.given)
        given[1 if self.kind.startswith("conv") else -1] = 0
        return (
            f"{self.kind} {self.kernel} {self.options} {'depthwise ' * self.depthwise}{'bias ' * self.bias}"
            f"on {given} {str(self.dtype).removeprefix('torch.')}"
        )

    def call(self, out: int, into: int) -> Callable[[], Tensor]:
        """A call of a layer like it, of other widths."""
        given = list(self.given)
        given[1 if self.kind.startswith("conv") else -1] = into
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(given, generator=draw).to(self.dtype)
        weight = torch.randn((out, 1 if self.depthwise else into, *self.kernel), generator=draw).to(self.dtype)
        bias = torch.zeros(out, dtype=self.dtype) if self.bias else None
        if self.kind == "linear":
            return lambda: F.linear(x, weight, bias)
        convolve: Any = {"conv1d": F.conv1d, "conv2d": F.conv2d, "conv3d": F.conv3d}[self.kind]
        groups = into if self.depthwise else 1
        return lambda: convolve(x, weight, bias, *self.options, groups)


@dataclass(frozen=True)
class Priced:
    """What a layer takes now, and would take."""

    layer: str
    kind: str
    widths: tuple[int, int]  # out, in
    keep: tuple[int, int]
    milliseconds: float
    milliseconds_kept: float
    candidates: tuple[tuple[int, int, float], ...]  # out, in, milliseconds: what was timed


@dataclass
class Book:
    """Times that were measured on this machine, by what was timed."""

    folder: Path
    times: dict[str, float] = field(default_factory=dict)
    changed: bool = False

    @classmethod
    def open(cls) -> "Book":
        """That of this machine: in SECATEUR_CACHE, or where caches are kept for this user."""
        given = os.environ.get("SECATEUR_CACHE")
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        book = cls(Path(given) if given else home / "secateur")
        with contextlib.suppress(OSError, ValueError, AttributeError):
            read = json.loads(book.path.read_text(encoding="utf-8"))["times"]
            book.times = {str(key): float(value) for key, value in read.items()}
        return book

    @property
    def path(self) -> Path:
        """The file of this machine, number of threads and torch."""
        about = {**about_machine(), "torch": torch.__version__}
        name = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        return self.folder / "latency" / f"{name}.json"

    def time(self, key: str, measure: Callable[[], float]) -> float:
        """The time of something: as it was measured once, or measured now."""
        if key not in self.times:
            self.times[key], self.changed = measure(), True
        return self.times[key]

    def close(self) -> None:
        """Write down what was measured; a folder that cannot be written to is no reason to fail."""
        if not self.changed:
            return
        with contextlib.suppress(OSError, ModelError):
            known = Book.open().times  # what another process wrote meanwhile stands
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.times = {**self.times, **known}
            about = {**about_machine(), "torch": torch.__version__}
            write_text(self.path, json.dumps({"machine": about, "times": self.times}, indent=0, sort_keys=True))
            self.changed = False


def clock() -> float:
    """Seconds: of this thread alone where it does all the work, so that others on the machine do not count."""
    return time.thread_time() if torch.get_num_threads() == 1 else time.perf_counter()


def milliseconds(call: Callable[[], Any], turns: int = TURNS) -> float:
    """The median time of a call, after two that warm up."""
    times = []
    with torch.no_grad():
        for turn in range(turns + 2):
            start = clock()
            call()
            if turn >= 2:
                times.append((clock() - start) * 1e3)
    return statistics.median(times)


def share(first: nn.Module, second: nn.Module, example: Batch, turns: int = TURNS) -> float:
    """What the second takes of the time of the first: both in turn, and the ratio of the medians."""
    models = (first, second)
    times: tuple[list[float], list[float]] = ([], [])
    modes = [modes_of(model) for model in models]
    try:
        for model in models:
            model.eval()
        with torch.no_grad():
            for turn in range(turns + 2):
                for model, kept in zip(models, times, strict=True):
                    start = clock()
                    example.through(model)
                    if turn >= 2:
                        kept.append(clock() - start)
    finally:
        for model, each in zip(models, modes, strict=True):
            restore_modes_(model, each)
    return statistics.median(times[1]) / statistics.median(times[0])


@torch.no_grad()
def layers_of(model: nn.Module, example: Batch) -> list[Layer]:
    """Every call of a matrix or kernel in a forward pass, as it is made."""
    found: list[Layer] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.modules.conv._ConvNd)) or type(module).__name__ == "Conv1D":

            def note(module: Any, args: tuple[Any, ...], name: str = name) -> None:
                if args and isinstance(args[0], Tensor) and (layer := _layer(name, module, args[0])) is not None:
                    found.append(layer)

            handles.append(module.register_forward_pre_hook(note))
    modes = modes_of(model)
    try:
        model.eval()
        example.through(model)
    finally:
        restore_modes_(model, modes)
        for handle in handles:
            handle.remove()
    return found


def _layer(name: str, module: Any, x: Tensor) -> Layer | None:
    weight, given = module.weight, tuple(x.shape)
    bias = getattr(module, "bias", None) is not None
    if isinstance(module, nn.modules.conv._ConvNd):
        depthwise = module.groups > 1 and module.groups == module.in_channels == module.out_channels
        if module.transposed or (module.groups > 1 and not depthwise) or module.padding_mode != "zeros":
            return None
        kind = f"conv{len(module.kernel_size)}d"
        options = (module.stride, module.padding, module.dilation)
        if x.dim() != len(module.kernel_size) + 2:
            return None  # without an axis of examples
        into = module.out_channels if depthwise else module.in_channels
        return Layer(
            name, f"{name}.weight", kind, (module.out_channels, into), given, weight.dtype, bias,
            tuple(module.kernel_size), options, depthwise,
        )  # fmt: skip
    widths = (weight.shape[1], weight.shape[0]) if type(module).__name__ == "Conv1D" else tuple(weight.shape)
    return Layer(name, f"{name}.weight", "linear", (widths[0], widths[1]), given, weight.dtype, bias)


def candidates(width: int, cut: bool) -> list[int]:
    """The widths at which one side of a layer is timed."""
    return sorted({max(1, round(width * fraction)) for fraction in FRACTIONS}) if cut else [width]


@dataclass(frozen=True)
class Table:
    """What a layer takes at some widths."""

    out: list[int]
    into: list[int]
    times: list[list[float]]  # [out, in], milliseconds

    def at(self, out: int, into: int) -> float:
        """The price of any widths: linear between those that were timed, and as at the least of them below it."""
        (o, p), (i, q) = _between(self.out, out), _between(self.into, into)
        low, high = self.times[o], self.times[min(o + 1, len(self.out) - 1)]
        j = min(i + 1, len(self.into) - 1)
        return (1 - p) * ((1 - q) * low[i] + q * low[j]) + p * ((1 - q) * high[i] + q * high[j])


def _between(widths: Sequence[int], width: int) -> tuple[int, float]:
    """The place below a width, and how far it is on the way to the next one."""
    place = min(max(bisect_right(widths, width) - 1, 0), max(len(widths) - 2, 0))
    if len(widths) == 1:
        return 0, 0.0
    return place, max(0.0, (width - widths[place]) / (widths[place + 1] - widths[place]))


def table(book: Book, layer: Layer, cut: tuple[bool, bool]) -> Table:
    """A layer's prices, timed where they are not known; `cut` says which of its sides can be, out and in."""
    out, into = candidates(layer.widths[0], cut[0]), candidates(layer.widths[1], cut[1])

    def timed(o: int, i: int) -> float:
        return book.time(f"{layer.key} {o}x{i}", lambda: milliseconds(layer.call(o, i)))

    if layer.depthwise:
        return Table(out, [layer.widths[1]], [[timed(c, c)] for c in out])
    return Table(out, into, [[timed(o, i) for i in into] for o in out])


def network_key(model: nn.Module, example: Batch) -> str:
    """What a whole network is remembered by: its class, the shapes of its tensors, and those of the example."""
    told = hashlib.sha256(type(model).__name__.encode())
    for name, value in tensors(model).items():
        told.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
    for value in tree_flatten(example.inputs)[0]:
        told.update(str((tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value).encode())
    return f"network {told.hexdigest()[:16]}"


class Latency:
    """The time of a forward pass over the example. See secateur.axes.budgets.Measure."""

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        shape: Callable[[str, Mapping[str, int]], tuple[int, ...]],
        cuts: Mapping[str, set[int]],
        trial: Callable[[Mapping[str, int]], nn.Module],
    ) -> None:
        self._model, self._example, self._shape, self._trial = model, example, shape, trial
        self._key = network_key(model, example)
        with booked() as book:
            self.whole = book.time(self._key, lambda: _whole(model, example))
            self._layers = layers_of(model, example)
            self._tables: dict[str, Table] = {}
            for layer in self._layers:
                axes = cuts.get(layer.weight, set())
                self._tables.setdefault(layer.name, table(book, layer, (0 in axes, 1 in axes)))
        self.close = TOLERANCE / 3 * self.whole
        priced = sum(self._price(layer, {}) for layer in self._layers)
        self._scale = min(1.0, self.whole / priced) if priced else 1.0  # apart they may take longer than together
        self._rest = max(0.0, self.whole - priced)
        self._put_out = max(1.0, sum(prod(layer.given) / layer.widths[1] * layer.widths[0] for layer in self._layers))

    def _widths(self, layer: Layer, counts: Mapping[str, int]) -> tuple[int, int]:
        shape = self._shape(layer.weight, counts) if counts else ()
        if not shape:
            return layer.widths
        return (shape[0], shape[0] if layer.depthwise else shape[1])

    def _price(self, layer: Layer, counts: Mapping[str, int]) -> float:
        out, into = self._widths(layer, counts)
        return self._tables[layer.name].at(out, layer.widths[1] if layer.depthwise else into)

    def gone(self, counts: Mapping[str, int]) -> float:
        """See Measure."""
        left = sum(self._price(layer, counts) for layer in self._layers) * self._scale
        put_out = sum(prod(layer.given) / layer.widths[1] * self._widths(layer, counts)[0] for layer in self._layers)
        return self.whole - left - self._rest * put_out / self._put_out

    def tried(self, counts: Mapping[str, int]) -> float:
        """See Measure."""
        key = f"{self._key} {hashlib.sha256(json.dumps(dict(counts), sort_keys=True).encode()).hexdigest()[:16]}"
        with booked() as book:
            left = book.time(key, lambda: share(self._model, self._trial(counts), self._example))
        return self.whole * (1 - left)

    def priced(self, counts: Mapping[str, int]) -> tuple[Priced, ...]:
        """What each layer takes, and would take."""
        found = []
        for layer in {layer.name: layer for layer in self._layers}.values():
            known = self._tables[layer.name]
            found.append(
                Priced(
                    layer.name,
                    layer.kind,
                    layer.widths,
                    self._widths(layer, counts),
                    self._price(layer, {}),
                    self._price(layer, counts),
                    tuple(
                        (o, o if layer.depthwise else i, known.times[row][column])
                        for row, o in enumerate(known.out)
                        for column, i in enumerate(known.into)
                    ),
                )
            )
        return tuple(found)


@contextlib.contextmanager
def booked() -> Iterator[Book]:
    """The book of this machine, written down at the end."""
    book = Book.open()
    try:
        yield book
    finally:
        book.close()


def _whole(model: nn.Module, example: Batch) -> float:
    modes = modes_of(model)
    model.eval()
    try:
        return milliseconds(lambda: example.through(model))
    finally:
        restore_modes_(model, modes)


__all__ = ["TOLERANCE", "Book", "Latency", "Layer", "Priced", "Table", "layers_of", "milliseconds", "share", "table"]
