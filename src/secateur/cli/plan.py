"""`secateur plan`: a dry run, priced before any damage."""

from dataclasses import asdict
from typing import Any

import click

from secateur.cli.options import SETTINGS, TASK, Verb, measuring, running, spoken, terminal


@click.command("plan", cls=Verb)
@click.argument("model")
@click.argument("method")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Change a setting of a recipe.")
@click.option("--then", multiple=True, metavar="METHOD", help="Another method after it, such as int8.")
@click.option("--serve", metavar="TARGET", help="Only shapes that it loads: hf, gguf, onnx, openvino or sparse.")
@click.option("--no-trial", is_flag=True, help="Do not prune one block of a copy to estimate the time.")
@measuring
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    method: str,
    overrides: tuple[str, ...],
    then: tuple[str, ...],
    serve: str | None,
    no_trial: bool,
    task: str | None,
    eval_split: str,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    **spoken: Any,
) -> None:
    """A dry run: what would go, what it would cost, and how long it would take. Changes nothing.

    METHOD is a method or a recipe (.yaml); `secateur plan MODEL METHOD --help` lists its settings.
    """
    from dataclasses import replace

    from secateur.cli.opening import (
        calibrated_recipe,
        model_from,
        recipe_from,
        scalars,
        served_recipe,
        set_threads,
        task_from,
    )
    from secateur.plan import plan

    speaker = terminal(spoken)
    set_threads(threads)
    recipe = recipe_from(method, ctx.meta[SETTINGS], overrides, then)
    recipe.method.check()
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype or recipe.dtype, device=device or recipe.device, online=online)
        recipe, given_up = served_recipe(recipe, serve, opened.model)
        settings = {**(recipe.task_settings if task in (None, recipe.task) else {}), **scalars(ctx.meta[TASK])}
        chosen = task_from(opened, task or recipe.task, settings, seed if seed is not None else recipe.seed or 0)
    recipe, fewer = calibrated_recipe(recipe, method, ctx.meta[SETTINGS], overrides, chosen)
    with speaker.busy("looking at every site, and trying one block on a copy"):
        found = plan(recipe.method, opened.model, chosen, trial=not no_trial)
    found = replace(found, notes=[*found.notes, *fewer, *(f"serve {serve}: {said}" for said in given_up)])
    speaker.emit(asdict(found) | {"model": model, "task": chosen.name, "serve": serve, "given_up": given_up})
    if not speaker.as_json:
        _show(speaker, found, opened.name, chosen.name)


def _show(speaker: Any, found: Any, model: str, task: str) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures

    speaker.show(f"{found.method} on {model}, calibrated and measured on {task}. Nothing was changed.\n")
    if found.rows:
        single = all(row.kind == "weight" for row in found.rows)  # then units are weights
        heads = (
            ("site", "shape", "weights", "to remove")
            if single
            else ("site", "kind", "units", "to keep", "weights", "to remove")
        )
        shown = table(*heads, right=("units", "to keep", "weights", "to remove"))
        for row in shortened(found.rows):
            keep, gone = (_or_later(row[key]) for key in ("keep", "removed"))
            weights, units = f"{row['weights']:,}", f"{row['units']:,}"
            cells = (row["shape"], weights, gone) if single else (row["kind"], units, keep, weights, gone)
            shown.add_row(escape(row["site"]), *cells)
        speaker.show(shown)
        speaker.show("")
    if found.prices:
        show_prices(speaker, found.prices)
    if found.asked is not None:
        speaker.show(f"sparsity    {found.asked:g} of {found.denominator}")
    else:
        speaker.show(f"sparsity    of {found.denominator}")
    show_left(speaker.show, found.left)
    for frozen in found.frozen:
        speaker.show(f"frozen      {frozen}")
    for note in found.notes:
        speaker.show(f"note        {note}")
    speaker.show("")
    cost = table("", "before", "after (estimated)", right=("before", "after (estimated)"))
    after = found.after
    for name, key, write in (
        ("parameters", "parameters", figures.count),
        ("zeros among them", "zeros", figures.count),
        ("bytes in memory", "memory_bytes", figures.size),
        ("work per forward pass, as if dense", "flops", figures.work),
    ):
        cost.add_row(
            name,
            write(getattr(found.before, key)),
            "decided in the run" if after is None else write(getattr(after, key)),
        )
    speaker.show(cost)
    price = found.price
    if price is not None:
        time = "not known" if price.seconds is None else f"about {figures.duration(price.seconds)}"
        memory = "not known" if price.memory_bytes is None else f"about {figures.size(price.memory_bytes)}"
        speaker.show(f"\npruning     {time}, peak memory {memory}")
        speaker.show(f"            estimated: {price.how}")


def show_prices(speaker: Any, prices: Any) -> None:
    """What layers take now and would take, those that are alike as one, and what was timed between."""
    from secateur.cli.terminal import table

    shown = table("layer", "outputs x inputs", "ms", "to keep", "ms", "timed: ms at outputs x inputs", right=("ms",))
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for price in prices:
        alike.setdefault((price.kind, price.widths, price.keep, price.candidates), []).append(price)
    for same in alike.values():
        one = same[0]
        named = one.layer if len(same) == 1 else f"{len(same)} like {one.layer}"
        ladder = [f"{ms:.3g} at {o}x{i}" for o, i, ms in one.candidates if o * one.widths[1] == i * one.widths[0]] or [
            f"{ms:.3g} at {o}x{i}" for o, i, ms in one.candidates
        ]
        shown.add_row(
            named, "x".join(map(str, one.widths)), f"{one.milliseconds:.3g}", "x".join(map(str, one.keep)),
            f"{one.milliseconds_kept:.3g}", ", ".join(ladder),
        )  # fmt: skip
    speaker.show(shown)
    speaker.show("")


def _or_later(number: int | None) -> str:
    return "in the run" if number is None else f"{number:,}"


def shortened(rows: Any) -> list[dict[str, Any]]:
    """Rows for a table, those of blocks that are alike as one."""
    alike: dict[tuple[Any, ...], list[Any]] = {}
    for row in rows:
        own = row.site.removeprefix(row.block) if row.block else row.site
        alike.setdefault((own, row.kind, row.shape, row.keep) if row.block else (row.site,), []).append(row)
    found = []
    for same in alike.values():
        first = same[0]
        own = first.site.removeprefix(first.block).lstrip(".")
        name = f"{len(same)} x {own}" if own else f"{len(same)} like {first.site}"  # a block may be a site itself
        name = first.site if len(same) == 1 else name
        found.append(
            {
                "site": name,
                "kind": first.kind,
                "shape": "x".join(map(str, first.shape)),
                "units": sum(r.units for r in same),
                "keep": None if first.keep is None else sum(r.keep for r in same),
                "weights": sum(r.weights for r in same),
                "removed": None if first.removed is None else sum(r.removed for r in same),
            }
        )
    return found


def show_left(say: Any, left: Any) -> None:
    """What is left alone, by what it is for."""
    roles: dict[str, list[Any]] = {}
    for each in left:
        roles.setdefault(each.role, []).append(each)
    for role, members in roles.items():
        some = ", ".join(m.name for m in members[:2]) + (f" and {len(members) - 2} more" if len(members) > 2 else "")
        say(f"left alone  {role}: {sum(m.parameters for m in members):,} parameters ({some})")
