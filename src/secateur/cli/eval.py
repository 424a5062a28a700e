"""`secateur eval`: how good a model is."""

from pathlib import Path
from typing import Any

import click

from secateur.cli.options import TASK, Verb, measuring, running, spoken, terminal


@click.command("eval", cls=Verb)
@click.argument("model", metavar="DIR|MODEL")
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    task: str | None,
    eval_split: str,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    **spoken: Any,
) -> None:
    """Measure how good a model is.

    A folder saved here is measured on the task it was pruned with, unless --task names another.
    """
    from secateur.cli.opening import model_from, set_threads, task_from

    speaker = terminal(spoken)
    set_threads(threads)
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        name, given, seen = _own_task(model) if task is None else (task, {}, None)
        given = {**given, **ctx.meta[TASK]}
        chosen = task_from(opened, name, given, seed if seed is not None else seen or 0)
    with speaker.busy(f"measuring on {chosen.name}"):
        values = chosen.measure(opened.model, eval_split)
    sense = "higher" if chosen.higher_is_better else "lower"
    speaker.emit(
        {
            "model": opened.name,
            "source": opened.source,
            "task": chosen.name,
            "split": eval_split,
            "seed": chosen.seed,
            "metric": chosen.metric,
            "higher_is_better": chosen.higher_is_better,
            "values": values,
        }
    )
    if not speaker.as_json:
        from secateur.report import figures

        rest = ", ".join(f"{k} {figures.value(v)}" for k, v in values.items() if k != chosen.metric)
        speaker.show(
            f"{chosen.metric} {figures.quality(values[chosen.metric])} ({sense} is better) "
            f"for {opened.name} on {chosen.name}, {eval_split}: {rest}"
        )


def _own_task(model: str) -> tuple[str | None, dict[str, Any], int | None]:
    """The task in the recipe of a folder that was saved here."""
    from secateur.models.folder import is_ours
    from secateur.recipe import read

    folder = Path(model.rpartition("::")[2] or model)
    if not folder.is_dir() or not is_ours(folder) or not (folder / "recipe.yaml").exists():
        return None, {}, None
    recipe = read(folder / "recipe.yaml")
    return recipe.task or None, dict(recipe.task_settings), recipe.seed
