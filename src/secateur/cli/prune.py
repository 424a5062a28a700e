"""`secateur prune`: from a model and a method to a folder that loads elsewhere."""

import contextlib
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli import MISSED
from secateur.cli.options import SETTINGS, TASK, Verb, command_line, measuring, running, spoken, terminal

if TYPE_CHECKING:
    from secateur.cli.terminal import Blocks, Terminal
    from secateur.distributed import Processes
    from secateur.method import Method
    from secateur.models import Opened
    from secateur.outcome import Measurement, Outcome, Record
    from secateur.plan import Plan
    from secateur.task import Task


BEFORE = "before.json"  # in the journal: the quality before, so that it is measured once


@click.command("prune", cls=Verb)
@click.argument("model")
@click.argument("method")
@click.option("--out", required=True, metavar="DIR", help="Where the pruned model is saved: a folder, or FILE.onnx.")
@click.option("--overwrite", is_flag=True, help="Replace a model that secateur saved there before.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of a recipe.")
@click.option(
    "--resume", metavar="DIR", help="Where finished blocks are kept until the end. [default: hidden, beside DIR]"
)
@click.option("--fresh", is_flag=True, help="Forget what an earlier, unfinished run left there.")
@click.option("--offload", is_flag=True, help="Keep the weights in a file beside DIR: for models larger than memory.")
@click.option("--then", multiple=True, metavar="METHOD", help="Another method after it, such as int8.")
@click.option("--serve", metavar="TARGET", help="Only shapes that it loads: hf, gguf, onnx, openvino or sparse.")
@click.option("--no-eval", is_flag=True, help="Do not measure quality before and after.")
@click.option("--timing", is_flag=True, help="Time a forward pass of both models, in turn.")
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    method: str,
    out: str,
    overwrite: bool,
    overrides: tuple[str, ...],
    resume: str | None,
    fresh: bool,
    no_eval: bool,
    timing: bool,
    task: str | None,
    eval_split: str,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    offload: bool = False,
    then: tuple[str, ...] = (),
    serve: str | None = None,
    **spoken: Any,
) -> int:
    """Prune a model and save it, with its record, its recipe and a card.

    MODEL is a Hugging Face folder, a GGUF or ONNX file, module:function, a folder saved here, or a name such as
    smollm2. METHOD is a method or a recipe (.yaml); `secateur prune MODEL METHOD --help` lists its settings. The
    network of an ONNX file can be saved as one: --out FILE.onnx. A run that was cut off is
    taken up again by the same command. Ends with 2 for bad input, and with 3 when the target was missed.
    """
    from secateur.distributed import together

    with together() as ours:
        return _command(
            ctx,
            ours,
            terminal(spoken) if ours.first else terminal({"quiet": True}),
            model=model,
            method=method,
            target=Path(out),
            overwrite=overwrite,
            overrides=overrides,
            then=then,
            serve=serve,
            resume=resume,
            fresh=fresh,
            split=None if no_eval or not ours.first else eval_split,
            timing=timing and ours.first,
            task=task,
            seed=seed,
            device=device,
            dtype=dtype,
            threads=threads,
            online=online,
            offload=offload,
        )


def _command(
    ctx: click.Context,
    ours: "Processes",
    speaker: "Terminal",
    *,
    model: str,
    method: str,
    target: Path,
    overwrite: bool,
    overrides: tuple[str, ...],
    then: tuple[str, ...],
    serve: str | None,
    resume: str | None,
    fresh: bool,
    split: str | None,
    timing: bool,
    task: str | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    offload: bool,
) -> int:
    """What every process does; the first one alone speaks, measures and writes."""
    from secateur.cli.opening import (
        calibrated_recipe,
        model_from,
        recipe_from,
        scalars,
        served_recipe,
        set_threads,
        task_from,
    )
    from secateur.outcome import refuse_place

    _refuse_journal(ours, resume)
    _refuse_folder(target, overwrite)
    refuse_place(target, folder=target.suffix.lower() != ".onnx")
    if resume is not None:
        _refuse_resume(resume)
    set_threads(threads)
    recipe = recipe_from(method, ctx.meta[SETTINGS], overrides, then)
    recipe.method.check()
    at = target.absolute().parent if offload else None
    with speaker.busy(f"opening {model}"):
        opened = model_from(
            model, dtype=dtype or recipe.dtype, device=device or recipe.device, online=online, offload=at
        )
        recipe, given_up = served_recipe(recipe, serve, opened.model)
        given = {**(recipe.task_settings if task in (None, recipe.task) else {}), **scalars(ctx.meta[TASK])}
        chosen = task_from(opened, task or recipe.task, given, seed if seed is not None else recipe.seed or 0)
    recipe, fewer = calibrated_recipe(recipe, method, ctx.meta[SETTINGS], overrides, chosen)
    recipe = replace(
        recipe,
        model=str(Path(model).resolve()) if Path(model).exists() else model,
        task=_named(task or recipe.task or chosen.name),
        task_settings=given,
        seed=chosen.seed,
        dtype=dtype or recipe.dtype or "float32",
        device=device or recipe.device,
    )
    _refuse_kind(target, opened)
    planned = _announce(speaker, recipe.method, opened, chosen)
    for text in fewer:
        speaker.say(f"note        {text}", "dim")
    if ours.first:
        speaker.log_to(target.with_name(target.name + ".log"), command_line(ctx))
    if not ours.alone:
        speaker.say(f"calibrating in {ours.count} processes; a run that is cut off starts anew")
    journal = Path(resume) if resume else target.with_name(f".{target.name}.journal")
    if fresh and journal.exists():
        _forget(journal)
    outcome = _run(speaker, ours, recipe.method, opened, chosen, journal, split, timing, command_line(ctx))
    if not ours.first:
        return 0
    _note_given_up(outcome, recipe.method, serve, given_up)
    with speaker.busy("saving"):
        from secateur.models import save, save_onnx
        from secateur.models.folder import RECORD

        if target.suffix.lower() == ".onnx":
            record = save_onnx(outcome, opened, target, overwrite=overwrite)
            files = [Path(os.path.abspath(target)), record]
        else:
            folder = save(outcome, opened, target, recipe=recipe.plain(), overwrite=overwrite)
            record, files = folder / RECORD, [*folder.iterdir()]
    if journal.exists():
        _forget(journal)
    done = _finish(speaker, recipe.method, record, files, str(target), planned)
    return done if serve is None else max(done, _serves(serve, outcome, record))


def _note_given_up(outcome: "Outcome", method: "Method", serve: str | None, before: list[str]) -> None:
    """Put into the record what was given up for a target: with the numbers, where the run knows them."""
    if serve is None:
        return
    from secateur.export.serving import given_up

    record, said = _record(outcome), [*before, *given_up(method)]
    outcome.record = replace(record, notes=[*record.notes, *(f"serve {serve}: {each}" for each in said)])


def _serves(serve: str, outcome: "Outcome", record: Path) -> int:
    """Whether a target loads what came out, and if not, say so."""
    from secateur.cli.terminal import explain_error
    from secateur.errors import ExportError
    from secateur.export.serving import refusal
    from secateur.models.folder import read_json

    why = refusal(serve, outcome.model, read_json(record).get("saved", {}).get("why_not"))
    if not why:
        return 0
    do = "Cut it by another method, or export it to onnx or openvino, which take any shape."
    explain_error(ExportError(f"the model was to be served by {serve}", why, do), ["The model was saved all the same."])
    return MISSED


def _refuse_journal(ours: "Processes", resume: str | None) -> None:
    """Raise SettingError where several processes were to keep finished blocks: they would have to agree on them."""
    from secateur.errors import SettingError

    if resume is not None and not ours.alone:
        raise SettingError(
            f"a run of {ours.count} processes was to be kept in {resume}",
            "only a run of one process can be taken up again",
            "Leave --resume out, or start without torchrun.",
        )


def _refuse_resume(place: str) -> None:
    """Raise ResumeError or ModelError for a folder that finished blocks cannot be kept in."""
    from secateur.errors import ResumeError
    from secateur.outcome import refuse_place

    if Path(place).is_file():
        raise ResumeError(f"finished blocks were to be kept in {place}", "it is a file", "Give --resume a folder.")
    refuse_place(place, folder=True)


def _named(task: str) -> str:
    return str(Path(task).resolve()) if Path(task).exists() else task


def _refuse_folder(target: Path, overwrite: bool) -> None:
    """Raise ModelError for a folder that could not be saved to, before anything is run."""
    from secateur.errors import ModelError
    from secateur.models.folder import is_ours

    if not target.exists():
        return
    asked = f"a model was to be saved to {target}"
    if target.suffix.lower() == ".onnx":
        from secateur.models.saving import refuse_onnx

        refuse_onnx(target, asked, overwrite)
        return
    if not is_ours(target):
        raise ModelError(asked, "it exists and secateur did not write it", "Give a folder that does not exist yet.")
    if not overwrite:
        raise ModelError(asked, "a saved model is there", "Give another folder, or --overwrite.")


def _refuse_kind(target: Path, opened: "Opened") -> None:
    """Raise ModelError where an ONNX file is to be written of a network that was not read from one."""
    from secateur.errors import ModelError
    from secateur.models.onnx import Network

    if target.suffix.lower() == ".onnx" and not isinstance(opened.model, Network):
        raise ModelError(
            f"a model was to be saved to {target}",
            f"{opened.name} was not read from an ONNX file",
            "Give a folder, and export that.",
        )


def _announce(speaker: "Terminal", method: "Method", opened: "Opened", task: "Task") -> "Plan":
    """Everything that can be refused before data is read, and what will be left alone."""
    from secateur.cli.plan import show_left
    from secateur.plan import plan

    with speaker.busy("checking every site"):
        found = plan(method, opened.model, task, priced=False)
    asked = "" if found.asked is None else f"sparsity {found.asked:g} of "
    speaker.say(f"{method.name} on {opened.name}: {asked}{found.denominator}")
    show_left(lambda text: speaker.say(text, "dim"), found.left)
    for text in (*(f"frozen      {each}" for each in found.frozen), *(f"note        {each}" for each in found.notes)):
        speaker.say(text, "dim")
    return found


def _run(
    speaker: "Terminal",
    ours: "Processes",
    method: "Method",
    opened: "Opened",
    task: "Task",
    journal: Path,
    split: str | None,
    timing: bool,
    command: str,
) -> "Outcome":
    from secateur.errors import BudgetError, ResumeError
    from secateur.method import prune
    from secateur.outcome import Measurement, fingerprint, write_text
    from secateur.walk import watching

    progress: Blocks | None = None
    taken, mark = [], ""
    try:
        if split is not None:
            mark = f"{fingerprint(opened.model)}/{task.fingerprint()}/{split}"
            values = _before(speaker, opened, task, split, journal / BEFORE, mark)
            taken.append(Measurement("before", split, values))
            speaker.say(f"before: {_quality(task, taken[0])}")
        with speaker.blocks(method.name) as progress, watching(progress):
            outcome = prune(
                opened.model,
                method,
                ours.share(task),
                inplace=True,
                timing=timing,
                resume=journal if ours.alone else None,
                name=opened.name,
                command=command,
            )
        ours.agree(outcome.model)
        if not ours.alone:
            outcome.record = replace(_record(outcome), notes=[*outcome.notes, f"calibrated in {ours.count} processes"])
        if split is not None:
            with speaker.busy(f"measuring {opened.name} after"):
                taken.append(Measurement("after", split, task.measure(outcome.model, split)))
            speaker.say(f"after:  {_quality(task, taken[1])}")
    except ResumeError as error:
        error.add_note("--fresh forgets what is there; --resume DIR names another folder.")
        raise
    except BaseException as error:
        done = len([*journal.glob("block-*")]) if journal.exists() else 0
        if not done and journal.exists():
            _forget(journal)  # nothing in it to take up
        if isinstance(error, BudgetError):
            error.__dict__["exit_code"] = MISSED  # found on the way, not before it
        if done and taken:
            write_text(journal / BEFORE, json.dumps({"of": mark, **taken[0].values}))
        if done:
            of = f" of {progress.total}" if progress is not None and progress.total else ""
            error.add_note(f"{done}{of} blocks are done and kept in {journal}: run the same command again to go on.")
        elif isinstance(error, KeyboardInterrupt):
            error.add_note("No block was done yet, and no model was written.")
        speaker.note(f"ended: {type(error).__name__}: {error}")
        raise
    outcome.record = replace(_record(outcome), measurements=taken)
    return outcome


def _record(outcome: "Outcome") -> "Record":
    assert outcome.record is not None, "prune writes one"
    return outcome.record


def _before(speaker: "Terminal", opened: "Opened", task: "Task", split: str, kept: Path, mark: str) -> dict[str, float]:
    """The quality before: as the run that was cut off measured it, or measured now."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        known = json.loads(kept.read_text(encoding="utf-8"))
        if known.pop("of") == mark:
            return {str(k): float(v) for k, v in known.items()}
    with speaker.busy(f"measuring {opened.name} before, on {task.name}"):
        return task.measure(opened.model, split)


def _quality(task: "Task", taken: "Measurement") -> str:
    from secateur.report import figures

    return f"{task.metric} {figures.quality(taken.values.get(task.metric))} on {task.name}, {taken.split}"


def _forget(journal: Path) -> None:
    """Delete a journal, and nothing that is not one."""
    found = [*journal.iterdir()]
    if all(p.name in ("run.json", BEFORE) or p.name.startswith("block-") for p in found):
        shutil.rmtree(journal, ignore_errors=True)


def _finish(speaker: "Terminal", method: "Method", written: Path, saved: list[Path], out: str, planned: "Plan") -> int:
    from secateur.outcome import Record
    from secateur.report import summary

    record = Record.read(written)
    missed = _missed(record, method, planned)
    speaker.emit(asdict(record) | {"out": os.path.abspath(out), "missed": missed})
    if not speaker.as_json:
        _show_ledger(speaker, record)
        speaker.show("")
        speaker.show(summary(record))
    for note in record.notes:
        speaker.say(f"note   {note}", "dim")
    files = ", ".join(sorted(p.name for p in saved))
    speaker.say(f"saved  {out}   {record.seconds:.1f} s   ({files})")
    if missed:
        from secateur.cli.terminal import explain_error
        from secateur.errors import BudgetError

        explain_error(BudgetError(*missed), ["The model was saved all the same."])
        return MISSED
    return 0


def _missed(record: "Record", method: "Method", planned: "Plan") -> list[str]:
    """What was asked, what was reached and what to do, when a target was not met; to within one unit a site."""
    if planned.asked is None:
        return []
    ledger = record.ledger
    whole = ledger.whole_of(planned.of)
    of_sites = ledger.units_removed / max(ledger.units, 1) if planned.of == "units" else ledger.share
    reached = of_sites if whole is None else 1 - whole[1] / whole[0]
    total = sum(r.weights for r in record.sites) or 1
    slack = sum(r.weights / r.units for r in record.sites if r.units) / total
    if planned.of == "units":
        slack = len(record.sites) / max(sum(r.units for r in record.sites), 1)
    slack = max(slack, planned.step)
    if planned.of == "latency":
        from secateur.axes.latency import TOLERANCE

        slack = max(TOLERANCE, planned.step)
    from secateur.plan import links

    # A chain of masks over the same weights reaches its last target, one of cuts all of them together.
    budgets = [budget for link in (*links(method), method) if (budget := link.budget()) is not None]
    wanted = [planned.asked if planned.reachable is None else planned.reachable, *(b.sparsity for b in budgets)]
    least, most = (min(wanted), max(wanted)) if budgets[1:-1] else (min(wanted[:2]), max(wanted[:2]))
    if least - max(0.005, slack) <= reached <= most + max(0.005, slack):
        return []
    return [
        f"a sparsity of {planned.asked:g} of the {planned.of} was asked for",
        f"{reached:.4g} was reached" + (f", {slack:.2g} away being tolerated" if planned.of == "latency" else ""),
        "See the notes for what could not be removed, or ask for another pattern or sparsity.",
    ]


def _show_ledger(speaker: "Terminal", record: "Record") -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures
    from secateur.report.ledger import lines

    shown = table("", "before", "after", "", right=("before", "after"))
    before, after = record.measured("before"), record.measured("after")
    metric = str(record.task.get("metric"))
    if metric in after:
        split = next((m.split for m in record.measurements), "")
        how = ", ".join(
            f"{k} {figures.value(v)}" for k, v in after.items() if k in ("window", "windows", "tokens", "examples")
        )
        first = figures.quality(before[metric]) if metric in before else ""
        name = f"[bold]{escape(metric)}[/] on {escape(str(record.task['name']))}, {escape(split)}"
        shown.add_row(name, first, figures.quality(after[metric]), f"[dim]{escape(how)}[/]")
    with contextlib.suppress(KeyError):
        for line in lines(record):
            if line.after != figures.ABSENT:
                before_text = "" if line.before == figures.ABSENT else line.before
                shown.add_row(escape(line.name), before_text, line.after, f"[dim]{escape(line.change)}[/]")
    speaker.show(shown)
