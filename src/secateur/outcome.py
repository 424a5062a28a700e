"""What a run did and what it cost: the outcome, the ledger, and the run record that everything else reads.

Zeros, bytes and milliseconds are three different lines: a masked dense model has many zeros and saves neither.
"""

import datetime
import hashlib
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from secateur.edit import Edit, Mask, Merge, Remove
from secateur.errors import ModelError
from secateur.site import Site
from secateur.task import Batch, Task, modes_of, restore_modes_
from secateur.train import History

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Size:
    """How big a model is, each line counted by itself."""

    parameters: int  # elements of all parameters, tied ones once
    zeros: int  # of those, exactly zero
    memory_bytes: int  # of all parameters and buffers as they lie in memory
    flops: int | None = None  # of one forward pass over the task's example, as if dense
    stored_bytes: int | None = None  # of the saved weights; None when nothing was saved

    @classmethod
    def of(cls, model: nn.Module, example: Batch | None = None) -> "Size":
        """Count a model."""
        parameters = list(model.parameters())
        return cls(
            parameters=sum(p.numel() for p in parameters),
            zeros=sum(int((p == 0).sum()) for p in parameters),
            memory_bytes=sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()]),
            flops=None if example is None else count_flops(model, example),
        )


@dataclass(frozen=True)
class Timing:
    """How long a forward pass takes here: only to be compared within one run."""

    milliseconds: float  # the median
    spread: float  # between the quartiles
    repeats: int
    batch: int
    threads: int
    dtype: str
    compiled: bool = False


@dataclass(frozen=True)
class Ledger:
    """The cost before and after."""

    before: Size
    after: Size
    prunable: int = 0  # elements of the parameters the method could have pruned, each counted once
    removed: int = 0  # of those, zeroed by a mask or gone from the model
    timing_before: Timing | None = None
    timing_after: Timing | None = None
    units: int = 0  # in the sites: a channel coupled over three tensors is one
    units_removed: int = 0
    of: str = "weights"  # what the method's target is a fraction of: see Unit

    @property
    def sparsity(self) -> float:
        """The fraction removed of what the target counts."""
        if self.of == "units":
            return self.units_removed / self.units if self.units else 0.0
        whole = self.whole_of(self.of)
        return self.share if whole is None else 1 - whole[1] / whole[0]

    def whole_of(self, of: str) -> tuple[float, float] | None:
        """The whole model before and after in some unit; None for what is of the sites alone, or was not taken."""
        before, after = self.before, self.after
        if of == "latency" and self.timing_before and self.timing_after:
            return self.timing_before.milliseconds, self.timing_after.milliseconds
        if of == "flops" and before.flops and after.flops is not None:
            return float(before.flops), float(after.flops)
        if of == "parameters":
            return float(before.parameters), float(after.parameters)
        return (float(before.memory_bytes), float(after.memory_bytes)) if of == "bytes" else None

    @property
    def share(self) -> float:
        """The fraction removed of the prunable elements."""
        return self.removed / self.prunable if self.prunable else 0.0

    @classmethod
    def of_run(
        cls,
        sizes: tuple[Size, Size],
        edits: Sequence[Edit],
        before: Mapping[str, int],
        model: nn.Module,
        of: str = "weights",
        timings: tuple[Timing | None, Timing | None] = (None, None),
    ) -> "Ledger":
        """What edits took away, given the elements each parameter had before and the model that is left."""
        last = {e.site.name: e for e in edits if isinstance(e, (Mask, Remove, Merge))}
        names = {part.name for e in last.values() for part in e.site.parts if part.name in before}
        left = elements(model)
        prunable = sum(before[name] for name in names)
        rows = site_rows(edits)
        there = {e.site.name: e.site for e in last.values() if isinstance(e, Mask) and _there(e.site, left)}
        gone = prunable - sum(left.get(name, 0) for name in names)
        for row in rows:
            if row.site in there and _whole(there[row.site], left):
                # What came with a replacement was not there to be removed: it stands for some of what was.
                gone += row.removed if _there(there[row.site], before) else row.removed - row.weights
        # Masks of what was made smaller since say nothing of what is left: its zeros do.
        smaller = {p.name for site in there.values() if not _whole(site, left) for p in site.parts if p.name in names}
        gone += sum(int((model.get_parameter(name) == 0).sum()) for name in smaller)
        units, kept = sum(row.units for row in rows), sum(row.kept for row in rows)
        return cls(*sizes, prunable, max(0, min(gone, prunable)), *timings, units, units - kept, of)


def _there(site: Site, left: Mapping[str, int]) -> bool:
    """Whether every tensor of a site is there still; not so where masked blocks were then replaced."""
    return all(part.name in left for part in site.parts)


def _whole(site: Site, left: Mapping[str, int]) -> bool:
    """Whether every tensor of a site is as large as when it was cut; not so where channels then went."""
    return all(part.index is not None or left[part.name] == prod(part.shape) for part in site.parts)


@dataclass(frozen=True)
class SiteRow:
    """One line of what was cut."""

    site: str
    kind: str
    block: str
    units: int
    kept: int
    weights: int  # elements the site's units own
    removed: int  # of those, gone


@dataclass(frozen=True)
class Measurement:
    """How good a model was: values of one measurement and where it was taken."""

    when: str  # "before", "after"
    split: str
    values: dict[str, float]


@dataclass(frozen=True)
class Harm:
    """An example that got worse, shown where it got worst."""

    example: int  # its place in the split
    before: float  # loss, the mean over its predictions, in nats
    after: float
    flips: float  # share of its predictions whose top answer changed
    context: str  # what stands before the prediction that suffered most
    wanted: str  # the right answer there
    said_before: str
    said_after: str


@dataclass(frozen=True)
class Damage:
    """What a mean hides: which examples got worse, and where the answers changed."""

    split: str
    examples: int
    what: str  # what an example is: "windows of 512 tokens"
    predictions: int  # of all examples together
    flips: float  # share of the predictions whose top answer changed
    lost: float  # share that was right and is wrong
    gained: float  # share that was wrong and is right
    differences: list[float]  # loss after - before of each example in order, in nats; infinite where it diverged
    worst: list[Harm]  # the examples that lost most, the worst first

    @property
    def worse(self) -> int:
        """How many examples have a higher loss than before."""
        return sum(d > 0 for d in self.differences)


@dataclass(frozen=True)
class Pictures:
    """What a model drew: a row of a report's grid."""

    of: str  # "dense", "unet 0.35"
    captions: list[str]
    png: str  # the pictures side by side, in base64


@runtime_checkable
class Shows(Protocol):
    """A task whose models' answers can be looked at: `prune` shows a few from before and after."""

    def references(self) -> list[Pictures]:
        """Rows that no model drew: what was wanted, what a baseline makes of it."""
        ...

    def show(self, model: nn.Module, of: str) -> Pictures:
        """A row of the same pictures by a model."""
        ...


@dataclass(frozen=True)
class Exported:
    """A model in the form of another run-time, and how it was tried there."""

    target: str  # "gguf"
    path: str
    bytes: int  # of all its files
    dense_bytes: int  # of the model's tensors, each number written out
    dtype: str  # the model was in
    difference: float | None  # of the run-time's answers from the model's, as a share of their length; None: not tried
    runtime: str  # with its version; empty where it was not tried
    created: str
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Record:
    """One run, whole: reports, comparisons, studies and claims read this and nothing else."""

    schema: int
    secateur: str
    created: str
    command: str
    method: str
    settings: dict[str, Any]
    model: dict[str, Any]  # name, family, fingerprint
    task: dict[str, Any]  # name, seed, metric, higher_is_better, fingerprint
    ledger: Ledger
    sites: list[SiteRow]
    measurements: list[Measurement] = field(default_factory=list)
    edits: dict[str, int] = field(default_factory=dict)  # kind of edit -> how many
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak_memory_bytes: int | None = None
    machine: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)  # saved file -> sha256
    pictures: list[Pictures] = field(default_factory=list)  # of models that draw
    damage: Damage | None = None  # None where it was not looked at
    exports: list[Exported] = field(default_factory=list)  # made of the saved model since

    def measured(self, when: str) -> dict[str, float]:
        """All values measured before or after, in one dictionary."""
        return {k: v for m in self.measurements if m.when == when for k, v in m.values.items()}

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "Record":
        """Read and check a record. Raises ModelError when it is not one."""
        from pydantic import ValidationError

        try:
            return _adapter().validate_json(Path(path).read_bytes())
        except (ValidationError, OSError) as error:
            raise ModelError(
                f"a run record was to be read from {path}",
                f"it is not one: {str(error).splitlines()[0]}",
                "Give the secateur.json of a saved run.",
            ) from error


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Record)


def record_schema() -> dict[str, Any]:
    """The JSON schema of a run record."""
    return _adapter().json_schema()


@dataclass
class Outcome:
    """What a method returns: the model, how it got that way, and what it cost."""

    model: nn.Module
    edits: list[Edit] = field(default_factory=list)
    history: History | None = None
    ledger: Ledger | None = None  # filled in by `prune`
    notes: list[str] = field(default_factory=list)
    record: Record | None = None  # filled in by `prune`
    pictures: list[Pictures] = field(default_factory=list)  # of models that draw
    stored_bytes: int | None = None  # of the weights in the form they are meant to be kept in, where that is not this


def site_rows(edits: Sequence[Edit]) -> list[SiteRow]:
    """What was cut, site by site: the last word on each site, in the order they were first met."""
    rows: dict[str, SiteRow] = {}
    for edit in edits:
        if not isinstance(edit, (Mask, Remove, Merge)):
            continue
        site = edit.site
        whole = sum(prod(part.shape) for part in site.parts if part.owner is None)
        cost = None if whole else site.cost("weights")  # single weights cost one each: no grid needed
        weights = whole if cost is None else float(cost.sum())
        if isinstance(edit, Merge):
            kept = int(edit.assignment.max()) + 1
            gone = weights * (1 - kept / site.units)
        else:
            keep = edit.keep
            kept = int(keep.sum())
            gone = float(site.units - kept) if cost is None else float(cost[~keep].sum())
        rows[site.name] = SiteRow(site.name, site.kind, site.block, site.units, kept, round(weights), round(gone))
    return list(rows.values())


@contextmanager
def in_use(model: nn.Module) -> Iterator[None]:
    """While it lasts, a model works as it does in use, where that is not how its quality is measured.

    A module that makes the difference has a context manager `in_use()` of its own.
    """
    with ExitStack() as until:
        for module in model.modules():
            if hasattr(module, "in_use"):
                until.enter_context(module.in_use())  # type: ignore[operator]
        yield


def flop_counter() -> FlopCounterMode:
    """Counts multiply-adds times two as torch does, products of matrices in groups too, which is what experts are."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten._grouped_mm: _grouped_flops})


def _grouped_flops(a: Sequence[int], b: Sequence[int], *_: Any, **__: Any) -> int:
    """Of [rows, in] and [groups, in, out], the rows being shared among groups, or other pairs that torch takes."""
    shared = a[0] if len(a) == 3 and len(b) == 2 else 1  # then it is the columns of b that groups share
    return 2 * prod(a) * b[-1] // shared


def count_flops(model: nn.Module, example: Batch) -> int | None:
    """Multiply-adds times two of a forward pass, counted as it runs; None for a model that cannot run here."""
    modes = modes_of(model)
    trained = [p for p in model.parameters() if p.requires_grad]  # its hooks fail on a parameter handed to a module
    model.eval()
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        with torch.no_grad(), in_use(model), flop_counter() as counter:
            example.through(model)
        return int(counter.get_total_flops())
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        restore_modes_(model, modes)


def stored_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and lasting buffers as a file of them holds, tied ones once."""
    found = {(v.data_ptr(), v.shape, v.stride()): v.nbytes for v in model.state_dict().values() if v.numel()}
    return sum(found.values())


def elements(model: nn.Module) -> dict[str, int]:
    """How many elements each parameter has, by name."""
    return {name: p.numel() for name, p in model.named_parameters(remove_duplicate=False)}


def time_forward(model: nn.Module, example: Batch, repeats: int = 20) -> Timing:
    """Median time of a forward pass over an example, after a warm-up."""
    modes = modes_of(model)
    model.eval()
    times = []
    with torch.no_grad(), in_use(model):
        for _ in range(3):
            example.through(model)
        for _ in range(repeats):
            start = time.perf_counter()
            example.through(model)
            times.append((time.perf_counter() - start) * 1e3)
    restore_modes_(model, modes)
    quarters = statistics.quantiles(times, n=4)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Timing(
        statistics.median(times), quarters[2] - quarters[0], repeats, example.size, torch.get_num_threads(), dtype
    )


def time_pair(first: nn.Module, second: nn.Module, example: Batch, repeats: int = 20) -> tuple[Timing, Timing]:
    """Two models timed in turn, A B A B, so that a drifting machine hurts both alike."""
    models = (first, second)
    modes = [modes_of(m) for m in models]
    times: tuple[list[float], list[float]] = ([], [])
    for m in models:
        m.eval()
    with torch.no_grad(), in_use(first), in_use(second):
        for turn in range(repeats + 2):
            for m, kept in zip(models, times, strict=True):
                start = time.perf_counter()
                example.through(m)
                if turn >= 2:
                    kept.append((time.perf_counter() - start) * 1e3)
    for m, each in zip(models, modes, strict=True):
        restore_modes_(m, each)

    def timing(m: nn.Module, kept: list[float]) -> Timing:
        quarters = statistics.quantiles(kept, n=4)
        numbers = (t.dtype for t in (*m.parameters(), *m.buffers()) if t.is_floating_point())
        dtype = str(next(numbers, torch.float32)).removeprefix("torch.")
        return Timing(
            statistics.median(kept), quarters[2] - quarters[0], repeats, example.size, torch.get_num_threads(), dtype
        )

    return timing(first, times[0]), timing(second, times[1])


def fingerprint(model: nn.Module) -> str:
    """A short hash of every tensor of a model, by name."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def about_machine() -> dict[str, Any]:
    """The machine a number was measured on."""
    name = platform.processor() or platform.machine()
    said: dict[str, str] = {}
    info = Path("/proc/cpuinfo")
    if info.exists():
        pairs = (line.partition(":") for line in info.read_text().splitlines())
        said = {key.strip(): value.strip() for key, _, value in pairs}
    # Behind a hypervisor one name may stand for several generations: "AMD EPYC" for Zen 4 and Zen 5.
    generation = {"family": said["cpu family"]} if "cpu family" in said else {}
    return {
        "processor": said.get("model name", name),
        **generation,
        "cores": os.cpu_count(),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
    }


def about_versions() -> dict[str, str]:
    """The versions of what a number was made with."""
    found = {"python": platform.python_version()}
    for package in ("secateur", "torch", "transformers", "numpy", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def about_task(task: Task) -> dict[str, Any]:
    """What a record says of a task."""
    return {
        "name": task.name,
        "seed": task.seed,
        "metric": task.metric,
        "higher_is_better": task.higher_is_better,
        "fingerprint": task.fingerprint(),
        "example": _shape(task.example),
    }


def _shape(batch: Batch) -> list[int] | None:
    """The shape of one example where that is a single tensor of numbers, such as a picture: what an export asks for."""
    if isinstance(batch.inputs, Mapping) or len(batch.inputs) != 1:
        return None
    only = batch.inputs[0]
    return [1, *only.shape[1:]] if isinstance(only, Tensor) and only.dim() > 1 and only.is_floating_point() else None


def about_model(model: nn.Module, name: str = "") -> dict[str, Any]:
    """What a record says of a model."""
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None) or type(model).__name__
    return {"name": name or type(model).__name__, "family": family, "fingerprint": fingerprint(model)}


def now() -> str:
    """The time, as it stands in records."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def write_text(path: str | Path, text: str) -> None:
    """Write a file whole or not at all: to a temporary name, then rename. Raises ModelError where that is refused."""
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise ModelError(
            f"{target} was to be written",
            f"the system refused: {error.strerror or error}",
            "Make room there, or write elsewhere.",
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()  # gone already, but for a failure or an interruption


def refuse_place(path: str | Path, *, folder: bool = False) -> None:
    """Raise ModelError for a file, or a folder, that could not be written: before there is anything to write."""
    target = Path(path)
    asked = f"{path} was to be written"
    if not folder and target.is_dir():
        raise ModelError(asked, "a folder of that name is there", "Give the name of a file.")
    parent = next(p for p in target.absolute().parents if p.exists())
    if not parent.is_dir():
        raise ModelError(asked, f"{parent} is a file, and no folder", "Write elsewhere.")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise ModelError(asked, f"nothing may be written to {parent}", "Write elsewhere, or change its permissions.")
