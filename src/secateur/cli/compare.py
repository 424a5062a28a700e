"""`secateur compare`: methods side by side, at equal sparsity and over seeds."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import TASK, Verb, command_line, measuring, running, spoken, terminal

if TYPE_CHECKING:
    from secateur.cli.terminal import Terminal
    from secateur.method import Method
    from secateur.models import Opened
    from secateur.outcome import Record
    from secateur.task import Task

ALWAYS = "random"  # what every criterion must beat


@dataclass(frozen=True)
class Cell:
    """One method with one seed: what is run, and where its record is kept."""

    method: "Method"
    seed: int
    record: Path

    @property
    def failure(self) -> Path:
        """Where it is written down that it failed, and why."""
        return self.record.with_suffix(".failed.json")


@click.command("compare", cls=Verb)
@click.argument("model")
@click.option(
    "--methods", required=True, metavar="A,B,...", help="Names, or name(key=value, ...). Random is always added."
)
@click.option(
    "--sparsity", default="0.5", show_default=True, metavar="S,...", help="Fractions removed, such as 0.3,50%."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="Runs of each, seeded 0 to N-1."
)
@click.option("--out", required=True, metavar="FILE.html", help="The page. Records go to a folder beside it.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="A setting of every method that has it.")
@click.option("--timing", is_flag=True, help="Time a forward pass of both models, in turn.")
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    methods: str,
    sparsity: str,
    seeds: int,
    out: str,
    overrides: tuple[str, ...],
    timing: bool,
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
    stop the others. The dense model and random pruning are always in the comparison.
    """
    from secateur.cli.opening import model_from, set_threads, task_from
    from secateur.outcome import fingerprint
    from secateur.plan import check
    from secateur.report import write

    speaker = terminal(spoken)
    set_threads(threads)
    wanted = asked(methods, sparsity, overrides)
    first = seed or 0
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        tasks = {first + i: task_from(opened, task, ctx.meta[TASK], first + i) for i in range(seeds)}
    page = Path(out)
    folder = page.with_name(page.stem + "-records")
    folder.mkdir(parents=True, exist_ok=True)
    mark = fingerprint(opened.model)
    cells = [
        Cell(method, number, folder / _name(method, number, [mark, chosen.fingerprint(), eval_split, timing]))
        for method in wanted
        for number, chosen in tasks.items()
    ]
    todo = [cell for cell in cells if not cell.record.exists()]
    asks = {cell.method: tasks[cell.seed] for cell in todo}
    with speaker.busy("checking every site"):
        problems = {method: _refused(check, method, opened, chosen) for method, chosen in asks.items()}
    _say_what_of(speaker, [method for method, problem in problems.items() if problem is None], opened, tasks[first])
    speaker.say(f"{len(cells)} runs, {len(cells) - len(todo)} of them done before; records in {folder}")
    before: dict[int, dict[str, float]] = {}
    try:
        for number, cell in enumerate(todo, 1):
            label = f"{number} of {len(todo)}  {_label(cell)}"
            error = problems[cell.method]
            if error is None:
                chosen = tasks[cell.seed]
                if cell.seed not in before:
                    with speaker.busy("measuring the dense model"):
                        before[cell.seed] = chosen.measure(opened.model, eval_split)
                error = _run(
                    speaker, cell, opened, chosen, eval_split, before[cell.seed], timing, command_line(ctx), label
                )
            if error is not None:
                _fail(cell, error)
                speaker.say(f"{label}  failed: {error}", "red")
    except KeyboardInterrupt as error:
        error.add_note(f"What was done is kept in {folder}: run the same command again to go on.")
        raise
    records, failures = _gathered(cells)
    _finish(speaker, records, failures, out, write)


def asked(methods: str, sparsity: str, overrides: Sequence[str]) -> "list[Method]":
    """Every method at every sparsity, random among them. Raises SettingError for a name or a value that cannot be."""
    from secateur.errors import SettingError
    from secateur.method import load
    from secateur.recipe import method_of, settings_of, split_methods

    texts = split_methods(methods)
    if not texts:
        raise SettingError("methods were to be compared", "none is named", "Give --methods wanda,magnitude.")
    changes = [item.partition("=")[::2] for item in overrides]
    used: set[str] = set()
    found: list[Method] = []
    kinds = [text.partition("(")[0].strip() for text in texts]
    for text in [*texts, *([ALWAYS] if ALWAYS not in kinds else [])]:
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
            found.append(_with(text, given))
    unknown = [key for key, _ in changes if key not in used]
    if unknown:
        raise SettingError(
            f"--set {unknown[0]} was given", "none of the methods has such a setting", "See `secateur explain`."
        )
    for method in found:
        method.check()
    return list(dict.fromkeys(found))


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
    split: str,
    before: dict[str, float],
    timing: bool,
    command: str,
    label: str,
) -> Exception | None:
    from secateur.errors import SecateurError
    from secateur.method import prune
    from secateur.outcome import Measurement
    from secateur.report import figures

    try:
        with speaker.busy(label):
            outcome = prune(opened.model, cell.method, task, timing=timing, name=opened.name, command=command)
            after = task.measure(outcome.model, split)
    except (SecateurError, RuntimeError) as error:
        return error
    assert outcome.record is not None
    taken = [Measurement("before", split, before), Measurement("after", split, after)]
    replace(outcome.record, measurements=taken).write(cell.record)
    cell.failure.unlink(missing_ok=True)
    value = figures.quality(after.get(task.metric))
    speaker.say(f"{label}  {task.metric} {value}  {figures.duration(outcome.record.seconds)}")
    return None


def _fail(cell: Cell, error: Exception) -> None:
    from secateur.method import settings
    from secateur.outcome import write_text

    parts = {key: str(getattr(error, key, "")) for key in ("asked", "found", "do")}
    about = {
        "method": cell.method.name,
        "settings": settings(cell.method),
        "seed": cell.seed,
        "error": str(error),
        **parts,
    }
    write_text(cell.failure, json.dumps(about, indent=1, sort_keys=True) + "\n")


def _gathered(cells: Sequence[Cell]) -> "tuple[list[Record], list[dict[str, Any]]]":
    from secateur.outcome import Record

    records = [Record.read(cell.record) for cell in cells if cell.record.exists()]
    failures = [
        {"run": _label(cell), **json.loads(cell.failure.read_text(encoding="utf-8"))}
        for cell in cells
        if cell.failure.exists() and not cell.record.exists()
    ]
    return records, failures


def _finish(speaker: "Terminal", records: "list[Record]", failures: list[dict[str, Any]], out: str, write: Any) -> None:
    from secateur.cli.report import claims_of
    from secateur.errors import EvidenceError
    from secateur.report import compare_table, headline

    if not records:
        raise EvidenceError(
            f"{len(failures)} runs were to be compared",
            f"all of them failed, the first with: {failures[0]['error'].splitlines()[0]}",
            failures[0]["do"],
        )
    told = [f"{f['run']} failed: {f['error'].splitlines()[0]}" for f in failures]
    noted = [replace(records[0], notes=[*records[0].notes, *told]), *records[1:]]
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    write(noted, out, "", claims_of(records))
    rows = compare_table(records)
    speaker.emit(
        {"out": out, "headline": headline(records), "dense": rows[0]["dense"], "table": rows, "failures": failures}
    )
    if not speaker.as_json:
        _show(speaker, records, rows, failures)
        speaker.show(f"\n{headline(records)}")
        speaker.show(out)


def _show(
    speaker: "Terminal", records: "list[Record]", rows: list[dict[str, Any]], failures: list[dict[str, Any]]
) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures

    task = records[0].task
    sense = "higher" if task.get("higher_is_better") else "lower"
    head = f"{task['metric']} on {task['name']} ({sense} is better)"
    shown = table("method", "sparsity", "reached", "seeds", head, right=("sparsity", "reached", "seeds", head))
    if rows[0]["dense"] is not None:
        shown.add_row("dense", "0%", "0%", "", figures.quality(rows[0]["dense"]))
    best: dict[Any, float] = {}
    sign = -1 if task.get("higher_is_better") else 1
    for row in rows:
        if row["quality"] is not None and math.isfinite(row["quality"]):
            best[row["asked"]] = min(best.get(row["asked"], math.inf), sign * row["quality"])
    for row in rows:
        value = figures.interval(row["quality"], row["half_width"])
        bold = row["quality"] is not None and sign * row["quality"] == best.get(row["asked"])
        shown.add_row(
            escape(row["method"]),
            "" if row["asked"] is None else figures.percent(row["asked"]),
            figures.percent(row["reached"]),
            str(row["seeds"]),
            f"[bold]{value}[/]" if bold else value,
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
