"""Methods that train, side by side: the same epochs, order of data and augmentation, and what each spent."""

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import SecateurError, SettingError, did_you_mean

if TYPE_CHECKING:
    from torch import nn

    from secateur.method import Method
    from secateur.outcome import Outcome, Record
    from secateur.task import Task

LEVELS = "0.5,0.8,0.9,0.95,0.98"
"""Five operating points, where none are asked for."""

SEEDS = 3
"""Runs of each, where their number is not asked for."""

BASELINES = {
    "random_pruning": "a random mask with ERK shares, held from the start",
    "gradual": "magnitude, a little at a time",
    "dense": "a dense network of the same size, and the whole one",
}
"""What is in every comparison of training, and why."""

BACKWARD = 2  # operations of a backward pass for one of the forward
POINTS = 50  # of the curve of what was spent
LOGS = ("tensorboard", "wandb", "mlflow")


@dataclass(frozen=True)
class Job:
    """One run, with all that another process needs to make it."""

    model: str
    method: "Method"
    task: str | None
    given: Mapping[str, Any]
    seed: int
    split: str
    command: str = ""
    threads: int | None = None
    dtype: str | None = None
    device: str | None = None
    folder: str = "."  # in which the command was given
    paths: tuple[str, ...] = field(default=())  # where modules are looked for


def run(job: Job) -> str:
    """Train, measure, and give the record as JSON; a failure as JSON with "error". Works in any process."""
    import os
    import sys

    sys.path.extend(path for path in job.paths if path not in sys.path)
    if Path(job.folder).is_dir() and Path(job.folder) != Path.cwd():
        os.chdir(job.folder)
    try:
        return _record(job)
    except (SecateurError, RuntimeError) as error:
        parts = {key: str(getattr(error, key, "")) for key in ("asked", "found", "do")}
        return json.dumps({"error": str(error), **parts})


def _record(job: Job) -> str:
    import copy
    from dataclasses import asdict

    from secateur.cli.dense import redrawn_
    from secateur.cli.opening import model_from, set_threads, task_from
    from secateur.method import prune
    from secateur.outcome import Measurement
    from secateur.tasks.robustness import robustness

    set_threads(job.threads)
    opened = model_from(job.model, dtype=job.dtype, device=job.device, online=False)
    task = task_from(opened, job.task, job.given, job.seed)
    redrawn_(opened.model, job.seed)
    start = copy.deepcopy(opened.model)
    outcome = prune(opened.model, job.method, task, inplace=True, name=opened.name, command=job.command)
    assert outcome.record is not None
    values = {**task.measure(outcome.model, job.split), **robustness(outcome.model, task, job.split)}
    measured = [Measurement("after", job.split, values)]
    curves = {**outcome.record.curves, **spent(start, outcome, task)}
    return json.dumps(asdict(replace(outcome.record, measurements=measured, curves=curves)), sort_keys=True)


def spent(start: "nn.Module", outcome: "Outcome", task: "Task") -> dict[str, list[tuple[int, float]]]:
    """Curves of the density of each site, and of the operations spent up to a step.

    Forward and backward, three times the forward pass on the batch, each layer in proportion to its density, as Evci
    et al. 2020 (arXiv 1911.11134, appendix H) count: as if zeros cost nothing. What a rule does at its updates is left
    out. A layer without masks counts whole.
    """
    history = outcome.history
    if history is None or not history.losses:
        return {}
    masked = history.densities
    work = _work(start if masked else outcome.model, task)
    batch = _batch(task)
    by_site = {name: work.get(name.rpartition(".")[0], 0.0) * _share(start, name) for name in masked}
    rest = work[""] - sum(by_site.values())
    once = (1 + BACKWARD) * batch
    total, at, reached = 0.0, dict.fromkeys(masked, 1.0), dict.fromkeys(masked, 0)
    steps, points = len(history.losses), [(0, 0.0)]
    for step in range(steps):
        for name, curve in masked.items():
            while reached[name] < len(curve) and curve[reached[name]][0] <= step:
                at[name] = curve[reached[name]][1]
                reached[name] += 1
        total += once * (rest + sum(by_site[name] * at[name] for name in masked))
        if (step + 1) % max(1, steps // POINTS) == 0 or step + 1 == steps:
            points.append((step + 1, total))
    return {**{f"density of {name}": list(curve) for name, curve in masked.items()}, "training compute": points}


def _share(model: "nn.Module", name: str) -> float:
    """What a site's tensor is of all matrices of its module: 1 but for recurrent layers and stacked experts."""
    module, _, tensor = name.rpartition(".")
    own, _, expert = tensor.partition("[")
    sizes = {n: p for n, p in model.get_submodule(module).named_parameters(recurse=False) if p.dim() > 1}
    if own not in sizes:
        return 1.0
    whole = sum(p.numel() for p in sizes.values())
    return sizes[own].numel() / whole / (len(sizes[own]) if expert else 1)


def _batch(task: "Task") -> int:
    """Examples in a training batch."""
    return next(iter(task.batches("train"))).size


def _work(model: "nn.Module", task: "Task") -> dict[str, float]:
    """Operations of a forward pass for one example by module, the whole model's under an empty name."""
    import torch

    from secateur.outcome import flop_counter
    from secateur.task import modes_of, restore_modes_

    modes, example = modes_of(model), task.example
    model.eval()
    with torch.no_grad(), flop_counter() as counter:
        example.through(model)
    restore_modes_(model, modes)
    counts = counter.get_flop_counts()
    head = type(model).__name__ + "."
    found = {name.removeprefix(head): sum(each.values()) / example.size for name, each in counts.items()}
    return {**found, "": counter.get_total_flops() / example.size}


def steps_of(task: "Task", epochs: float) -> int:
    """Optimizer steps in so many epochs, one at least."""
    return max(1, math.ceil(epochs * sum(1 for _ in task.batches("train"))))


def asked(methods: str, levels: str, overrides: Sequence[str], steps: int) -> "list[Method]":
    """Every method at every sparsity, the baselines too, all trained for equally many steps.

    Raises SettingError for a method that does not train, or that is told to train for longer or shorter.
    """
    from dataclasses import fields

    from secateur.axes import Erk
    from secateur.cli.compare import _with
    from secateur.cli.dense import Dense
    from secateur.method import load
    from secateur.recipe import method_of, split_methods

    changes = dict(item.partition("=")[::2] for item in overrides)
    texts = split_methods(methods)
    kinds = [text.partition("(")[0].strip().replace("-", "_") for text in texts]
    texts += [name for name in BASELINES if name not in (*kinds, "dense")]
    found: list[Method] = []
    used: set[str] = set()
    for text in texts:
        kind = type(method_of(text))
        known = {f.name for f in fields(kind)}  # type: ignore[arg-type]  # methods are dataclasses, which `Method` does not say
        if "steps" not in known:
            raise SettingError(
                f"{text} was to be compared over equally many epochs",
                "it does not train, or not for a number of steps",
                "Compare it without --epochs, or name methods that train: set, rigl, granet, random_pruning.",
            )
        told = re.search(r"\bsteps\s*=", text) or "steps" in changes
        if told:
            raise SettingError(
                f"{text} was to be compared over {steps:,} steps",
                "it is told how many it takes",
                "Leave steps out: all train for as many epochs.",
            )
        own = {key: value for key, value in changes.items() if key.partition(".")[0].replace("-", "_") in known}
        used |= own.keys()
        for level in split_methods(levels):
            given = {"steps": str(steps), **own}
            if "sparsity" in known and "sparsity=" not in text.replace(" ", ""):
                given["sparsity"] = level
            method = _with(text, given)
            if text == "random_pruning":
                method = replace(method, allocation=Erk())  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
            every = getattr(method, "every", None)
            if isinstance(every, int) and every * 10 > steps and "every" not in own and "every=" not in text:
                method = replace(method, every=max(1, steps // 20))  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
            found.append(method)
    unknown = [key for key in changes if key not in used]
    if unknown:
        raise SettingError(
            f"--set {unknown[0]} was given", "none of the methods has such a setting", "See `secateur explain`."
        )
    floor = next((m.rate_floor for m in found if hasattr(m, "rate_floor")), 0.0)
    found += [Dense(sparsity=s, steps=steps, rate_floor=floor) for s in (0.0, *_numbers(levels))]
    assert all(load(m.name) for m in found if m.name != "dense")
    for method in found:
        method.check()
    return list(dict.fromkeys(found))


def _numbers(levels: str) -> list[float]:
    """Fractions as they are typed: 0.5, 50%."""
    from secateur.recipe import split_methods

    return [float(text[:-1]) / 100 if text.endswith("%") else float(text) for text in split_methods(levels)]


def results(jobs: Sequence[Job], workers: int, ray: str | None) -> Iterator[tuple[int, str]]:
    """What each run gave, as they end: here, in processes of this machine, or on a Ray cluster."""
    if ray is not None:
        yield from _on_ray(jobs, ray)
    elif workers <= 1:
        yield from ((place, run(job)) for place, job in enumerate(jobs))
    else:
        from multiprocessing import active_children, get_context

        with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=get_context("spawn")) as pool:
            waiting = {pool.submit(run, job): place for place, job in enumerate(jobs)}
            try:
                for done in as_completed(waiting):
                    yield waiting[done], _died(done.exception()) or done.result()
            except BaseException:  # stopped: what is half done is done again
                for child in active_children():
                    child.terminate()
                raise


def _died(error: BaseException | None) -> str | None:
    """What to say of a run whose process is gone; None when it is not."""
    if not isinstance(error, BrokenExecutor):
        return None
    return _failed("its process ended before it did, which the system does where memory is short", "Use fewer --jobs.")


def _failed(found: str, do: str) -> str:
    asked = "a network was to be trained"
    return json.dumps({"error": f"{asked}, but {found}.", "asked": asked, "found": found, "do": do})


def _on_ray(jobs: Sequence[Job], address: str) -> Iterator[tuple[int, str]]:
    try:
        import ray
    except ImportError:
        raise SettingError(
            f"runs were to be sent to a Ray cluster at {address}",
            "ray is not installed",
            "pip install 'secateur[ray]', or leave --ray out and give --jobs.",
        ) from None
    started = not ray.is_initialized()
    if started:
        ray.init(address=None if address == "local" else address, log_to_driver=False, include_dashboard=False)
    try:
        far = ray.remote(num_cpus=1, max_retries=2)(run)
        waiting = {far.remote(job): place for place, job in enumerate(jobs)}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            place = waiting.pop(done)
            try:
                yield place, ray.get(done)
            except ray.exceptions.WorkerCrashedError:
                yield place, _failed("its worker crashed", "Look at the memory of that machine.")
    finally:
        if started:
            ray.shutdown()


def with_dense(records: "Sequence[Record]") -> "list[Record]":
    """The records, each with the quality of the dense network trained from the same seed as what was before."""
    whole = {r.task.get("seed"): r for r in records if r.method == "dense" and not r.settings.get("sparsity")}
    found = []
    for record in records:
        twin = whole.get(record.task.get("seed"))
        before = [] if twin is None else [replace(m, when="before") for m in twin.measurements if m.when == "after"]
        own = [m for m in record.measurements if m.when != "before"]
        model = {**record.model, "fingerprint": f"seed {record.task.get('seed')}"}
        found.append(replace(record, measurements=[*before, *own], model=model))
    return found


def writer(to: str) -> "Callable[[Record, Path], None]":
    """What sends a record's curves to a tracker. Raises SettingError for one that is unknown or not installed."""
    ways = {"tensorboard": _tensorboard, "wandb": _wandb, "mlflow": _mlflow}
    if to not in ways:
        raise SettingError(f"curves were to go to {to!r}", "it is not known", did_you_mean(to, ways))
    package = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}[to]
    from importlib.util import find_spec

    if find_spec(package) is None:
        raise SettingError(f"curves were to go to {to}", f"{package} is not installed", f"pip install {package}")
    return ways[to]


def _values(record: "Record") -> dict[str, float]:
    return record.measured("after")


def _tensorboard(record: "Record", place: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(place.with_suffix(""))) as board:
        for name, points in record.curves.items():
            for step, value in points:
                board.add_scalar(name.replace(" of ", "/"), value, step)
        board.add_text("settings", json.dumps(record.settings, sort_keys=True))
        last = max((points[-1][0] for points in record.curves.values() if points), default=0)
        for name, value in _values(record).items():
            board.add_scalar(f"after/{name}", value, last)


def _wandb(record: "Record", place: Path) -> None:
    import wandb

    with wandb.init(project="secateur", name=place.stem, dir=str(place.parent), config=record.settings) as logged:
        by_step: dict[int, dict[str, float]] = {}
        for name, points in record.curves.items():
            for step, value in points:
                by_step.setdefault(step, {})[name] = value
        for step in sorted(by_step):
            logged.log(by_step[step], step=step)
        logged.summary.update(_values(record))


def _mlflow(record: "Record", place: Path) -> None:
    import mlflow

    with mlflow.start_run(run_name=place.stem):
        mlflow.log_params(record.settings)
        for name, points in record.curves.items():
            for step, value in points:
                mlflow.log_metric(name, value, step=step)
        mlflow.log_metrics({f"after {name}": value for name, value in _values(record).items()})
