"""`secateur scratch`: whether what pruning kept is worth more than its shape."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import TASK, Verb, measuring, running, spoken, terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from secateur.cli.terminal import Terminal
    from secateur.outcome import Record
    from secateur.studies.rethinking import Arm, Budget
    from secateur.task import Task

ARMS = "fine-tune,scratch-E,scratch-B,scratch-all"


@click.command("scratch", cls=Verb)
@click.argument("model", metavar="DIR")
@click.option("--epochs", type=float, required=True, metavar="E", help="What the dense network was trained for.")
@click.option("--fine-tune", type=float, metavar="E", help="Epochs of fine-tuning. [default: a quarter of --epochs]")
@click.option("--arms", default=ARMS, show_default=True, metavar="A,B,...", help="What is trained, each from DIR.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True, metavar="N", help="Runs of each arm.")
@click.option("--out", metavar="FILE", help="Where the arms are written as JSON.")
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    epochs: float,
    fine_tune: float | None,
    arms: str,
    seeds: int,
    out: str | None,
    task: str | None,
    eval_split: str,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    **spoken: Any,
) -> None:
    """Train a pruned network from new weights, beside fine-tuning it, and account for the work of both.

    DIR is a folder that `secateur prune` wrote, by any method: what is gone stays gone, and masks are held. scratch-E
    trains for as many epochs as the dense network, scratch-B for as much work, scratch-all for as much as pruning took
    in all. Nothing in DIR is changed.
    """
    from secateur.cli.eval import _own_task
    from secateur.cli.opening import model_from, set_threads, task_from
    from secateur.cli.recover import refuse_unpruned
    from secateur.cli.training import steps_of
    from secateur.models import load_edits
    from secateur.models.folder import RECORD
    from secateur.outcome import Record, refuse_place, write_text
    from secateur.studies.rethinking import Recipe, audit, held, work_of

    speaker, found = terminal(spoken), list[Any]()
    set_threads(threads)
    refuse_unpruned(model)
    if out is not None:
        refuse_place(out)
    budgets = budgets_named(arms)
    recipe_of = Recipe(1, fine_tune=0.25 if fine_tune is None else fine_tune / max(epochs, 1e-9))
    refuse_epochs(epochs)
    record, edits = Record.read(Path(model) / RECORD), load_edits(model)
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        name, given, own = _own_task(model) if task is None else (task, {}, None)
        given = {**given, **ctx.meta[TASK]}
        first = seed if seed is not None else own or 0
    dense = dense_work(record, work_of(opened.model, task_from(opened, name, given, first)))
    chosen: Task
    for number in range(first, first + seeds):
        chosen = task_from(opened, name, given, number)
        recipe = Recipe(steps_of(chosen, epochs), fine_tune=recipe_of.fine_tune)
        for budget in budgets:
            with speaker.busy(f"{budget.name}, seed {number}"):
                found += audit(
                    opened.model, edits, chosen, recipe, dense,
                    budgets=[budget], pruner_steps=pruner_steps(record), split=eval_split,
                )  # fmt: skip
            arm = found[-1]
            speaker.say(f"{arm.name}, seed {arm.seed}: {chosen.metric} {arm.values[chosen.metric]:.4g}")
    told = {
        "model": opened.name,
        "method": record.method,
        "task": chosen.name,
        "split": eval_split,
        "metric": chosen.metric,
        "epochs": epochs,
        "work per example": {
            "dense": dense,
            "pruned": work_of(opened.model, chosen, held(opened.model, edits)),
        },
        "pruner steps": pruner_steps(record),
        "arms": [asdict(arm) for arm in found],
    }
    if out is not None:
        import json

        Path(out).absolute().parent.mkdir(parents=True, exist_ok=True)
        write_text(out, json.dumps(told, indent=1, sort_keys=True) + "\n")
    speaker.emit(told)
    if not speaker.as_json:
        _show(speaker, told, found, chosen)


def budgets_named(arms: str) -> "list[Budget]":
    """The arms asked for. Raises SettingError for one that is not known."""
    from secateur.errors import SettingError, did_you_mean
    from secateur.studies.rethinking import BUDGETS

    known = {budget.name.lower(): budget for budget in BUDGETS}
    asked = [name.strip() for name in arms.split(",") if name.strip()]
    for name in asked:
        if name.lower() not in known:
            raise SettingError(
                f"the arm {name!r} was asked for",
                "there is none of that name",
                did_you_mean(name, [budget.name for budget in BUDGETS]),
            )
    if not asked:
        raise SettingError("no arms were asked for", "one at least is trained", f"Give --arms {ARMS}.")
    return [known[name.lower()] for name in asked]


def refuse_epochs(epochs: float) -> None:
    """Raise SettingError for a dense training of no length."""
    from secateur.errors import SettingError

    if not epochs > 0:
        raise SettingError(
            f"a dense training of {epochs:g} epochs was given",
            "budgets are measured by it",
            "Give the epochs the dense network was trained for.",
        )


def dense_work(record: "Record", now: float) -> float:
    """Work of the dense network per example, given that of the pruned one with masked weights counted.

    Raises ModelError where the record does not say what the two came to.
    """
    from secateur.errors import ModelError

    before, after = record.ledger.before.flops, record.ledger.after.flops
    if not before or not after:
        raise ModelError(
            "the work of a pruned network was to be compared with that of the dense one",
            "its record does not say what that was",
            "Prune it again with this version of secateur.",
        )
    return now * before / after


def pruner_steps(record: "Record") -> int:
    """Optimizer steps that the pruner's settings say it took; 0 for one that does not train."""
    parts = record.settings.get("methods") or [record.settings]
    return sum(int(part.get(key) or 0) for part in parts for key in ("steps", "recover") if _whole(part.get(key)))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _show(speaker: "Terminal", told: dict[str, Any], arms: "Sequence[Arm]", task: "Task") -> None:
    from secateur.cli.terminal import table as columns
    from secateur.report import figures
    from secateur.report.compare import half_width
    from secateur.studies.rethinking import advantages, table

    heads = ("steps", "work", "with all before", task.metric)
    shown = columns("arm", *heads, title=f"{told['method']} on {told['task']}, {told['split']}", right=heads)
    for row in table(arms, task.metric):
        spread = f" ± {row.spread:.2g}" if row.seeds > 1 else ""
        work, total = (figures.work(round(value)) for value in (row.work, row.total))
        shown.add_row(row.name, f"{row.steps:,.0f}", work, total, f"{row.mean:.4g}{spread}")
    speaker.show(shown)
    work = told["work per example"]
    speaker.show(f"the dense network takes {work['dense'] / work['pruned']:.2f} times the work of the pruned one")
    for name in ("scratch-B", "scratch-all"):
        differences = advantages(arms, task.metric, name, "fine-tune")
        if len(differences) > 1:
            half, mean = half_width(differences), sum(differences) / len(differences)
            within = "" if half is None else f" (95 %: {mean - half:+.4f} to {mean + half:+.4f})"
            speaker.show(f"{name} less fine-tune: {mean:+.4f} of {task.metric}{within}, {len(differences)} seeds")
