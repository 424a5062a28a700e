"""`secateur compare`: methods side by side, at equal sparsity and over seeds."""

import hashlib
import json
import math
import re
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import TASK, Verb, command_line, looking, measuring, running, spoken, terminal

if TYPE_CHECKING:
    from secateur.cli.measuring import Look, Seen
    from secateur.cli.terminal import Terminal
    from secateur.method import Method
    from secateur.models import Opened
    from secateur.outcome import Record
    from secateur.task import Task

ALWAYS = {
    "random": "what every criterion must beat",
    "magnitude": "what needs no data",
    "shortgpt": "fewer layers, at the same share of the parameters",
    "int8": "every weight, in fewer bits",
}
"""What is in every comparison beside the dense model, and why."""


@dataclass(frozen=True)
class Cell:
    """One method with one seed: what is run, and where its record is kept."""

    method: "Method"
    seed: int
    record: Path
    always: bool = False  # nobody named it: it is left out where it does not apply

    @property
    def failure(self) -> Path:
        """Where it is written down that it failed, and why."""
        return self.record.with_suffix(".failed.json")


@click.command("compare", cls=Verb)
@click.argument("model")
@click.option(
    "--methods",
    required=True,
    metavar="A,B,...",
    help="Names, or name(key=value, ...). Random, magnitude, fewer layers and 8-bit weights are always added.",
)
@click.option("--sparsity", metavar="S,...", help="Fractions removed, such as 0.3,50%. [default: 0.5; five to train]")
@click.option(
    "--seeds", type=click.IntRange(1), metavar="N", help="Runs of each, seeded 0 to N-1. [default: 1; 3 to train]"
)
@click.option(
    "--epochs", type=click.FloatRange(0, min_open=True), metavar="N", help="Train from new weights, all for as long."
)
@click.option("--jobs", type=click.IntRange(1), default=1, metavar="N", help="Training runs at a time, in processes.")
@click.option("--ray", metavar="ADDRESS", help="Train on a Ray cluster: auto, local, or an address.")
@click.option("--curves", metavar="WHERE", help="Send curves of training to tensorboard, wandb or mlflow.")
@click.option("--out", required=True, metavar="FILE.html", help="The page. Records go to a folder beside it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of every method that has it.")
@click.option("--strict", is_flag=True, help="Fail where one of the ten lessons it is checked by is broken.")
@click.option(
    "--timing/--no-timing", default=True, show_default=True, help="Time a forward pass of both models, in turn."
)
@looking
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    methods: str,
    sparsity: str | None,
    seeds: int | None,
    epochs: float | None,
    jobs: int,
    ray: str | None,
    curves: str | None,
    out: str,
    overrides: tuple[str, ...],
    strict: bool,
    timing: bool,
    zero_shot: str | None,
    limit: int | None,
    damage: int,
    task: str | None,
    eval_split: str,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    **spoken: Any,
) -> None:
    """Several methods side by side, at equal sparsity and over seeds, on one page.

    Each run leaves a record; those that are there already are not run again. A run that fails is shown and does not
    stop the others. The dense model, random and magnitude pruning, fewer layers and 8-bit weights are always in the
    comparison, and all methods are calibrated on equally many examples.

    With --epochs, methods that train are compared: each from the same new weights, for equally many epochs of the same
    data in the same order. Random masks with ERK shares, gradual magnitude pruning, the dense network and dense ones of
    the same size are then always there, and the page adds what training cost and how full each layer was.
    """
    from secateur.cli.measuring import look_from
    from secateur.cli.opening import model_from, set_threads, task_from
    from secateur.errors import GraphError
    from secateur.outcome import fingerprint, refuse_place
    from secateur.plan import check
    from secateur.task import Seedless

    speaker = terminal(spoken)
    refuse_place(out)
    set_threads(threads)
    if epochs is not None:
        from secateur.cli.training import LEVELS, SEEDS, Job

        blank = Job(model, None, task, ctx.meta[TASK], seed or 0, eval_split, command_line(ctx), threads, dtype, device)  # type: ignore[arg-type]
        places = (sparsity or LEVELS, seeds or SEEDS)
        _trained(speaker, blank, methods, places, overrides, epochs, (jobs, ray, curves), Path(out), strict)
        return
    _only_training({"--jobs": jobs != 1, "--ray": ray is not None, "--curves": curves is not None})
    sparsity, seeds = sparsity or "0.5", seeds or 1
    wanted, always = asked(methods, sparsity, overrides)
    look = look_from(eval_split, zero_shot, limit, damage)
    first = seed or 0
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        look.check(opened.tokenizer)
        tasks = {first + i: task_from(opened, task, ctx.meta[TASK], first + i) for i in range(seeds)}
    page = Path(out)
    folder = page.with_name(page.stem + "-records")
    folder.mkdir(parents=True, exist_ok=True)
    marks = [fingerprint(opened.model), look.mark(), timing]
    cells = [
        Cell(method, number, folder / _name(method, number, [*marks, chosen.fingerprint()]), added)
        for added, group in ((False, wanted), (True, always))
        for method in group
        for number, chosen in tasks.items()
    ]
    todo = [cell for cell in cells if not cell.record.exists()]
    asks = {cell.method: tasks[cell.seed] for cell in todo}
    with speaker.busy("checking every site"):
        problems = {method: _refused(check, method, opened, chosen) for method, chosen in asks.items()}
    _say_what_of(speaker, [method for method, problem in problems.items() if problem is None], opened, tasks[first])
    speaker.say(f"{len(cells)} runs, {len(cells) - len(todo)} of them done before; records in {folder}")
    shown = {number: each.measured_on() if isinstance(each, Seedless) else number for number, each in tasks.items()}
    dense: dict[object, Seen] = {}
    try:
        with _stopped_by_term():
            for number, cell in enumerate(todo, 1):
                label = f"{number} of {len(todo)}  {_label(cell)}"
                error = problems[cell.method]
                if error is None:
                    chosen, same = tasks[cell.seed], shown[cell.seed]
                    if same not in dense:
                        with speaker.busy("measuring the dense model"):
                            dense[same] = look.at(opened.model, chosen, opened.tokenizer)
                    error = _run(speaker, cell, opened, chosen, look, dense[same], timing, command_line(ctx), label)
                if error is not None:
                    _fail(cell, error)
                    left_out = cell.always and isinstance(error, GraphError)
                    speaker.say(
                        f"{label}  {'is left out' if left_out else 'failed'}: {error}", "" if left_out else "red"
                    )
    except KeyboardInterrupt as error:
        done = sum(cell.record.exists() for cell in cells)
        error.add_note(f"What was done is kept in {folder}: run the same command again to go on.")
        if done:
            _finish(
                speaker, cells, out, f"stopped after {done} of {len(cells)} runs: this page holds those that were done"
            )
            error.add_note(f"{out} shows the {done} runs of {len(cells)} that are there.")
        raise
    _finish(speaker, cells, out, "", strict=strict)


def _only_training(given: dict[str, bool]) -> None:
    """Raise SettingError for options that need --epochs."""
    from secateur.errors import SettingError

    for name, was in given.items():
        if was:
            raise SettingError(f"{name} was given", "it is for comparisons of training", "Add --epochs, such as 10.")


def _trained(
    speaker: "Terminal",
    blank: Any,
    methods: str,
    grid: tuple[str, int],
    overrides: Sequence[str],
    epochs: float,
    where: tuple[int, str | None, str | None],
    page: Path,
    strict: bool,
) -> None:
    """The grid of a comparison of training: what its hash says is done is not done again."""
    import os
    import sys

    from secateur.cli import training
    from secateur.cli.opening import model_from, task_from
    from secateur.outcome import write_text

    levels, seeds = grid
    workers, ray, log_to = where
    log = None if log_to is None else training.writer(log_to)
    with speaker.busy(f"opening {blank.model}"):
        opened = model_from(blank.model, dtype=blank.dtype, device=blank.device, online=False)
        numbers = [blank.seed + i for i in range(seeds)]
        tasks = {number: task_from(opened, blank.task, blank.given, number) for number in numbers}
        steps = training.steps_of(tasks[numbers[0]], epochs)
        asked = training.asked(methods, levels, overrides, steps)
    folder = page.with_name(page.stem + "-records")
    folder.mkdir(parents=True, exist_ok=True)
    shapes = sorted((name, tuple(p.shape)) for name, p in opened.model.named_parameters())
    marks = {number: ["training", blank.split, shapes, task.fingerprint()] for number, task in tasks.items()}
    cells = [Cell(m, number, folder / _name(m, number, marks[number])) for m in asked for number in numbers]
    todo = [cell for cell in cells if not cell.record.exists()]
    if workers > 1 and blank.threads is None:  # the processors are shared out
        blank = replace(blank, threads=max(1, (os.cpu_count() or 1) // workers))
    here = {"folder": os.getcwd(), "paths": tuple(path or os.getcwd() for path in sys.path)}
    jobs = [replace(blank, method=cell.method, seed=cell.seed, **here) for cell in todo]
    speaker.say(f"{len(cells)} runs of {steps:,} steps, {len(cells) - len(todo)} of them done before; in {folder}")
    stopped = ""
    try:
        with _stopped_by_term():
            for number, (place, text) in enumerate(training.results(jobs, workers, ray), 1):
                cell, found = todo[place], json.loads(text)
                if "error" in found:
                    about = {"method": cell.method.name, "seed": cell.seed, "left_out": False, **found}
                    write_text(cell.failure, json.dumps(about, indent=1, sort_keys=True) + "\n")
                    speaker.say(f"{number} of {len(todo)}  {_said(cell)}  failed: {found['error']}", "red")
                    continue
                write_text(cell.record, text + "\n")
                cell.failure.unlink(missing_ok=True)
                if log is not None:
                    log(_read(cell.record), folder / "curves" / cell.record.name)
                speaker.say(f"{number} of {len(todo)}  {_said(cell)}")
    except KeyboardInterrupt as error:
        done = sum(cell.record.exists() for cell in cells)
        error.add_note(f"What was done is kept in {folder}: run the same command again to go on.")
        stopped = f"stopped after {done} of {len(cells)} runs: this page holds those that were done"
        if done:
            _finish(speaker, cells, str(page), stopped, training.with_dense)
        raise
    _finish(speaker, cells, str(page), stopped, training.with_dense, strict)


def _read(path: Path) -> "Record":
    from secateur.outcome import Record

    return Record.read(path)


def _said(cell: Cell) -> str:
    level = getattr(cell.method, "sparsity", None)
    return f"{cell.method.name}{'' if level is None else f' at {level:g}'}, seed {cell.seed}"


@contextmanager
def _stopped_by_term() -> Iterator[None]:
    """A polite request to end, as a scheduler sends it, stops like Ctrl-C: with what was done in place."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only there may signals be caught
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def asked(methods: str, sparsity: str, overrides: Sequence[str]) -> "tuple[list[Method], list[Method]]":
    """Every method at every sparsity, those that were named and those that are always there.

    All are calibrated on equally many examples: on as many as the first that was named and says so, or uses by
    itself. Raises SettingError for a name or a value that cannot be.
    """
    from secateur.errors import SettingError
    from secateur.method import load
    from secateur.recipe import method_of, settings_of, split_methods

    texts = split_methods(methods)
    if not texts:
        raise SettingError("methods were to be compared", "none is named", "Give --methods wanda,magnitude.")
    changes = [item.partition("=")[::2] for item in overrides]
    used: set[str] = set()
    found: list[Method] = []
    always: list[Method] = []
    told: list[tuple[bool, Method]] = []  # whether it says on how many examples it is calibrated
    kinds = [text.partition("(")[0].strip() for text in texts]
    for text in [*texts, *(name for name in ALWAYS if name not in kinds)]:
        name = type(method_of(text)).__module__.rpartition(".")[2]
        fields = settings_of(load(name))
        inside = re.sub(r"^[^(]*\(?|\)\s*$", "", text)
        own = {key: value for key, value in changes if key.partition(".")[0].replace("-", "_") in fields}
        used |= own.keys()
        fixed = getattr(getattr(_with(text, own), "pattern", None), "fixed", None) is not None
        free = "sparsity" in fields and not re.search(r"\bsparsity\s*=", inside) and "sparsity" not in own and not fixed
        levels = split_methods(sparsity) if free else [""]
        for level in levels:
            given = {**({"sparsity": level} if level else {}), **own}
            method = _with(text, given)
            told.append(("samples" in own or re.search(r"\bsamples\s*=", inside) is not None, method))
            (found if text in texts else always).append(method)
    unknown = [key for key, _ in changes if key not in used]
    if unknown:
        raise SettingError(
            f"--set {unknown[0]} was given", "none of the methods has such a setting", "See `secateur explain`."
        )
    even = _calibrated_alike(told)
    for method in even.values():
        method.check()
    return list(dict.fromkeys(even[m] for m in found)), list(dict.fromkeys(even[m] for m in always))


def _calibrated_alike(told: "Sequence[tuple[bool, Method]]") -> "dict[Method, Method]":
    """Each method, calibrated on as many examples as the others unless it says on how many."""
    having = [(said, method) for said, method in told if isinstance(getattr(method, "samples", None), int)]
    chosen = next((m for said, m in having if said), having[0][1] if having else None)
    samples = getattr(chosen, "samples", None)
    alike = {method: replace(method, samples=samples) for said, method in having if not said}  # type: ignore[type-var]
    return {method: alike.get(method, method) for _, method in told}


def _with(text: str, given: dict[str, str]) -> "Method":
    from secateur.recipe import method_of

    name, _, inside = text.strip().removesuffix(")").partition("(")
    more = ",".join([*([inside] if inside.strip() else []), *(f"{k}={v!r}" for k, v in given.items())])
    return method_of(f"{name}({more})" if more else name)


def _name(method: "Method", seed: int, marks: list[Any]) -> str:
    """A file name that is the same only for the same run: model, data, settings and seed."""
    from secateur.method import settings

    whole = json.dumps([method.name, settings(method), seed, *marks], sort_keys=True, default=str)
    level = getattr(method, "sparsity", None)
    at = "" if level is None else f"-{level:g}"
    return f"{method.name}{at}-seed{seed}-{hashlib.sha256(whole.encode()).hexdigest()[:12]}.json"


def _label(cell: Cell) -> str:
    from secateur.recipe import text_of_method

    return f"{text_of_method(cell.method)}, seed {cell.seed}"


def _say_what_of(speaker: "Terminal", methods: "Sequence[Method]", opened: "Opened", task: "Task") -> None:
    """What the sparsities are fractions of, and what is left alone, once for methods that cut the same."""
    from secateur.cli.plan import show_left
    from secateur.plan import denominator, left_alone, links, sites_of

    told: set[tuple[str, ...]] = set()
    for method in methods:
        first, budget = links(method)[0], method.budget()
        key = tuple(
            map(str, (first.card.granularity, *(getattr(first, n, "") for n in ("include", "exclude", "kinds"))))
        )
        if key in told:
            continue
        told.add(key)
        sites = sites_of(first, opened.model, task).sites
        of = denominator(opened.model, sites, "weights" if budget is None else budget.of)
        speaker.say(f"{method.name}: sparsity of {of}", "dim")
        show_left(lambda text: speaker.say(text, "dim"), left_alone(first, opened.model, sites))


def _refused(check: Any, method: "Method", opened: "Opened", task: "Task") -> Exception | None:
    """Why runs of a method cannot be, found before any data is read."""
    from secateur.errors import SecateurError

    try:
        check(method, opened.model, task)
    except SecateurError as error:
        return error
    return None


def _run(
    speaker: "Terminal",
    cell: Cell,
    opened: "Opened",
    task: "Task",
    look: "Look",
    dense: "Seen",
    timing: bool,
    command: str,
    label: str,
) -> Exception | None:
    from secateur.cli.measuring import damage_between
    from secateur.errors import SecateurError
    from secateur.method import prune
    from secateur.outcome import stored_bytes
    from secateur.report import figures

    try:
        with speaker.busy(label):
            outcome = prune(opened.model, cell.method, task, timing=timing, name=opened.name, command=command)
            seen = look.at(outcome.model, task, opened.tokenizer)
    except (SecateurError, RuntimeError) as error:
        return error
    record = outcome.record
    assert record is not None
    # Nothing is saved here, so that the bytes are those a file would have: a mask saves none.
    before = replace(record.ledger.before, stored_bytes=stored_bytes(opened.model))
    after = replace(record.ledger.after, stored_bytes=outcome.stored_bytes or stored_bytes(outcome.model))
    replace(
        record,
        ledger=replace(record.ledger, before=before, after=after),
        measurements=[*dense.measurements("before", look.split), *seen.measurements("after", look.split)],
        damage=damage_between(dense, seen, look.split, opened.tokenizer),
    ).write(cell.record)
    cell.failure.unlink(missing_ok=True)
    value = figures.quality(seen.values.get(task.metric))
    speaker.say(f"{label}  {task.metric} {value}  {figures.duration(record.seconds)}")
    return None


def _fail(cell: Cell, error: Exception) -> None:
    from secateur.errors import GraphError
    from secateur.method import settings
    from secateur.outcome import write_text

    parts = {key: str(getattr(error, key, "")) for key in ("asked", "found", "do")}
    about = {
        "method": cell.method.name,
        "settings": settings(cell.method),
        "seed": cell.seed,
        "error": str(error),
        "left_out": cell.always and isinstance(error, GraphError),
        **parts,
    }
    write_text(cell.failure, json.dumps(about, indent=1, sort_keys=True) + "\n")


def _gathered(cells: Sequence[Cell]) -> "tuple[list[Record], list[dict[str, Any]]]":
    from secateur.outcome import Record

    records = [Record.read(cell.record) for cell in cells if cell.record.exists()]
    failures = [
        {
            "run": _label(cell) if cell.method.name != "dense" else _said(cell),
            **json.loads(cell.failure.read_text(encoding="utf-8")),
        }
        for cell in cells
        if cell.failure.exists() and not cell.record.exists()
    ]
    return records, failures


def _finish(
    speaker: "Terminal",
    cells: Sequence[Cell],
    out: str,
    stopped: str,
    completed: "Callable[[Sequence[Record]], list[Record]] | None" = None,
    strict: bool = False,
) -> None:
    from secateur.cli.report import claims_of, refuse_broken, tell
    from secateur.errors import EvidenceError
    from secateur.report import compare_table, headline, write
    from secateur.report.lessons import findings

    records, gathered = _gathered(cells)
    failures = [f for f in gathered if not f.get("left_out")]
    left_out = {f"{f['method']} is left out: {f['found'] or f['error']}": f for f in gathered if f.get("left_out")}
    if not records:
        raise EvidenceError(
            f"{len(gathered)} runs were to be compared",
            f"all of them failed, the first with: {gathered[0]['error'].splitlines()[0]}",
            gathered[0]["do"],
        )
    records = records if completed is None else completed(records)
    told = [stopped] if stopped else []
    told += [_calibration(records), *left_out]
    told += [f"{f['run']} failed: {f['error'].splitlines()[0]}" for f in failures]
    noted = [replace(records[0], notes=[*records[0].notes, *filter(None, told)]), *records[1:]]
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    write(noted, out, "", claims_of(records))
    if stopped:
        return
    rows, lessons = compare_table(records), findings(records)
    speaker.emit(
        {
            "out": out,
            "headline": headline(records),
            "lessons": [asdict(found) for found in lessons],
            "dense": rows[0]["dense"],
            "table": rows,
            "failures": failures,
            "left_out": [*left_out],
        }
    )
    if not speaker.as_json:
        _show(speaker, records, rows, failures)
        for line in left_out:
            speaker.show(line)
        tell(speaker, lessons)
        speaker.show(f"\n{headline(records)}")
        speaker.show(out)
    if strict:
        refuse_broken(lessons)


def _calibration(records: "Sequence[Record]") -> str:
    """On how many examples the methods were calibrated, and whether that was the same for all."""
    found: dict[int, list[str]] = {}
    for record in records:
        samples = record.settings.get("samples")
        if isinstance(samples, int) and record.method not in found.setdefault(samples, []):
            found[samples].append(record.method)
    if not found:
        return ""
    if len(found) == 1:
        return f"every method that looks at data was calibrated on {next(iter(found)):,} examples of the same split"
    each = "; ".join(f"{', '.join(names)} on {samples:,}" for samples, names in sorted(found.items()))
    return f"NOT calibrated on equally many examples, as was asked: {each}"


def _show(
    speaker: "Terminal", records: "list[Record]", rows: list[dict[str, Any]], failures: list[dict[str, Any]]
) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures
    from secateur.report.compare import zero_shot_table

    first = records[0]
    task, window, before = first.task, first.measured("before").get("window"), first.ledger.before
    sense = "higher" if task.get("higher_is_better") else "lower"
    over = f", windows of {window:,.0f} tokens" if window else ""
    head = str(task["metric"])
    columns = ["asked", "reached", "seeds", head, "flipped"]
    title = f"{head} on {task['name']}{over} ({sense} is better); flipped: top answers that changed"
    shown = table("method", *columns, title=title, right=columns)
    costs = ["zeros", "stored", "work", "time", "time, dense"]
    paid = table("method", "asked", *costs, title="what it costs", right=["asked", *costs])
    if rows[0]["dense"] is not None:
        shown.add_row("dense", "0%", "0%", "", figures.quality(rows[0]["dense"]), "")
    paid.add_row(
        "dense", "0%", figures.count(before.zeros), figures.size(before.stored_bytes), figures.work(before.flops)
    )
    best: dict[Any, float] = {}
    sign = -1 if task.get("higher_is_better") else 1
    for row in rows:
        if row["quality"] is not None and math.isfinite(row["quality"]):
            best[row["asked"]] = min(best.get(row["asked"], math.inf), sign * row["quality"])
    for row in rows:
        value = figures.interval(row["quality"], row["half_width"])
        bold = (
            row["asked"] is not None and row["quality"] is not None and sign * row["quality"] == best.get(row["asked"])
        )
        asked = "" if row["asked"] is None else figures.percent(row["asked"])
        shown.add_row(
            escape(row["method"]),
            asked,
            figures.percent(row["reached"]),
            str(row["seeds"]),
            f"[bold]{value}[/]" if bold else value,
            "" if row["flips"] is None else figures.percent(round(row["flips"], 3)),
        )
        times = (row["milliseconds"], row["milliseconds_dense"])
        paid.add_row(
            escape(row["method"]),
            asked,
            figures.count(row["zeros"]),
            figures.size(row["stored_bytes"]),
            figures.work(row["flops"]),
            *("" if time is None else f"{figures.quality(time)} ms" for time in times),
        )
    for failure in failures:
        shown.add_row(
            f"[red]{escape(failure['run'])}[/]",
            "",
            "",
            "",
            f"[red]failed: {escape(failure['found'] or failure['error'])}[/]",
        )
    speaker.show(shown)
    speaker.show(paid)
    questions = zero_shot_table(records)
    if questions:
        columns = [*questions[0]["tasks"]]
        accuracies = table("zero-shot accuracy", "sparsity", *columns, right=["sparsity", *columns])
        for row in questions:
            at = "" if row["asked"] is None else figures.percent(row["asked"])
            told = (figures.interval(*pair) for pair in row["tasks"].values())
            accuracies.add_row(escape(row["method"]), at, *told)
        speaker.show(accuracies)
