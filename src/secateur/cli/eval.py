"""`secateur eval`: how good a model is, and what it costs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import TASK, Verb, looking, measuring, running, spoken, terminal

if TYPE_CHECKING:
    from secateur.cli.terminal import Terminal


@click.command("eval", cls=Verb)
@click.argument("model", metavar="DIR|MODEL")
@click.option("--against", metavar="DIR|MODEL", help="The model it was made from: what got worse since, text by text.")
@click.option("--timing/--no-timing", default=True, show_default=True, help="Time a forward pass.")
@looking
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    against: str | None,
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
    """Measure how good a model is, and what it costs.

    A folder saved here is measured on the task it was pruned with, unless --task names another. Quality, questions,
    bytes, work and time are lines of their own.
    """
    from secateur.cli.measuring import bytes_on_disk, damage_between, look_from
    from secateur.cli.opening import model_from, set_threads, task_from
    from secateur.method import check_fits
    from secateur.outcome import Size, stored_bytes, time_forward, time_pair

    speaker = terminal(spoken)
    set_threads(threads)
    look = look_from(eval_split, zero_shot, limit, damage if against else 0)
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        look.check(opened.tokenizer)
        name, given, own = _own_task(model) if task is None else (task, {}, None)
        given = {**given, **ctx.meta[TASK]}
        chosen = task_from(opened, name, given, seed if seed is not None else own or 0)
    other = None
    if against is not None:
        with speaker.busy(f"opening {against}"):
            other = model_from(against, dtype=dtype, device=device, online=online)
            check_fits(other.model, chosen)
    with speaker.busy(f"measuring on {', '.join([chosen.name, *look.zero_shot])}"):
        seen = look.at(opened.model, chosen, opened.tokenizer)
    size = Size.of(opened.model, chosen.example)
    on_disk = bytes_on_disk(opened.source)
    told: dict[str, Any] = {
        "model": opened.name,
        "source": opened.source,
        "task": chosen.name,
        "split": eval_split,
        "seed": chosen.seed,
        "metric": chosen.metric,
        "higher_is_better": chosen.higher_is_better,
        "values": seen.values,
        "zero_shot": seen.questions,
        "size": asdict(size)
        | {
            "stored_bytes": on_disk or stored_bytes(opened.model),
            "stored": "on disk" if on_disk else "if saved as it is",
        },
    }
    if other is None:
        times = [time_forward(opened.model, chosen.example)] if timing else []
    else:
        with speaker.busy(f"measuring {against}"):
            before = look.at(other.model, chosen, other.tokenizer)
        found = damage_between(before, seen, eval_split, opened.tokenizer)
        told["against"] = {"model": other.name, "values": before.values, "zero_shot": before.questions}
        told["damage"] = None if found is None else asdict(found) | {"worse": found.worse}
        times = list(time_pair(opened.model, other.model, chosen.example)) if timing else []
    if times:
        told["timing"] = asdict(times[0])
    if len(times) > 1:
        told["against"]["timing"] = asdict(times[1])
    speaker.emit(told)
    if not speaker.as_json:
        _show(speaker, told)


def _show(speaker: "Terminal", told: dict[str, Any]) -> None:
    from secateur.cli.measuring import told_zero_shot
    from secateur.cli.terminal import table
    from secateur.report import figures

    values, metric, other = told["values"], told["metric"], told.get("against")
    sense = "higher" if told["higher_is_better"] else "lower"
    rest = ", ".join(f"{k} {figures.value(v)}" for k, v in values.items() if k != metric)
    window = f" over windows of {values['window']:,.0f} tokens" if "window" in values else ""
    against = f", {other['model']} {figures.quality(other['values'][metric])}" if other else ""
    speaker.show(
        f"{metric} {figures.quality(values[metric])}{window} ({sense} is better{against}) "
        f"for {told['model']} on {told['task']}, {told['split']}: {rest}"
    )
    if told["zero_shot"]:
        columns = ("acc", "acc_norm", "guessing", "questions")
        for name, found in (
            (told["model"], told["zero_shot"]),
            *([(other["model"], other["zero_shot"])] if other else []),
        ):
            shown = table("zero-shot, lm-eval harness", *columns, title=name, right=columns)
            for row in told_zero_shot(found):
                shown.add_row(*row)
            speaker.show(shown)
    if told.get("damage"):
        _show_damage(speaker, told["damage"])
    size, timing = told["size"], told.get("timing")
    lines = [
        ("parameters", f"{size['parameters']:,}, of them zero {size['zeros']:,} (which save nothing by themselves)"),
        ("bytes in memory", figures.size(size["memory_bytes"])),
        ("bytes stored", f"{figures.size(size['stored_bytes'])} ({size['stored']})"),
        ("work per forward pass", f"{figures.work(size['flops'])}, counted as if dense, over the task's example"),
        ("time per forward pass", figures.ABSENT if timing is None else _time(timing, other)),
    ]
    for name, text in lines:
        speaker.show(f"{name:<22} {text}")


def _time(timing: dict[str, Any], other: dict[str, Any] | None) -> str:
    told = f"{timing['milliseconds']:,.2f} ms (spread {timing['spread']:,.2f} ms)"
    if other:
        told += f", {other['model']} {other['timing']['milliseconds']:,.2f} ms, both in turn"
    return (
        f"{told}; median of {timing['repeats']}, batch {timing['batch']}, {timing['threads']} "
        f"thread{'s' * (timing['threads'] != 1)}, {timing['dtype']}"
    )


def _show_damage(speaker: "Terminal", found: dict[str, Any]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures
    from secateur.report.damage import rise

    flips, lost, gained = (figures.percent(round(found[key], 4)) for key in ("flips", "lost", "gained"))
    speaker.show(
        f"{found['worse']} of {found['examples']} {found['what']} got worse; of {found['predictions']:,} top answers "
        f"{flips} flipped, {lost} from right to wrong, {gained} from wrong to right"
    )
    columns = ("example", "loss", "rise", "flipped")
    shown = table(*columns, "worst place, after", "right", "was", "now", title="those that lost most", right=columns)
    for harm in found["worst"]:
        shown.add_row(
            str(harm["example"]), figures.quality(harm["after"]), rise(harm["after"] - harm["before"]),
            figures.percent(round(harm["flips"], 3)), escape(" ".join(harm["context"].split())),
            *(escape(repr(harm[key])) for key in ("wanted", "said_before", "said_after")),
        )  # fmt: skip
    if found["worst"]:
        speaker.show(shown)


def _own_task(model: str) -> tuple[str | None, dict[str, Any], int | None]:
    """The task in the recipe of a folder that was saved here."""
    from secateur.models.folder import is_ours
    from secateur.recipe import read

    folder = Path(model.rpartition("::")[2] or model)
    if not folder.is_dir() or not is_ours(folder) or not (folder / "recipe.yaml").exists():
        return None, {}, None
    recipe = read(folder / "recipe.yaml")
    return recipe.task or None, dict(recipe.task_settings), recipe.seed
