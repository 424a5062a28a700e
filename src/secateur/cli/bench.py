"""`secateur bench`: how fast a model is here, each layer dense or packed, as measured."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import TASK, Verb, running, spoken, terminal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from secateur.accelerate import Accelerated
    from secateur.cli.terminal import Terminal
    from secateur.formats import Format
    from secateur.models import Opened
    from secateur.task import Batch


@click.command("bench", cls=Verb)
@click.argument("model", metavar="DIR|MODEL")
@click.option("--tokens", type=click.IntRange(1), default=1, show_default=True, metavar="N", help="1 is decoding.")
@click.option("--explain", is_flag=True, help="Every layer: what was tried, what was chosen and why, and the limits.")
@click.option(
    "--formats",
    metavar="A,B",
    help="What to try: bitmap, sell-blocked, bitmap-int8, group-cols-4, .. [default: all but bitmap-int8]",
)
@click.option("--task", metavar="TASK", help="Whose example is run, for a model that takes no token ids.")
@running
@spoken
@click.pass_context
def command(
    ctx: click.Context,
    /,
    model: str,
    tokens: int,
    explain: bool,
    formats: str | None,
    task: str | None,
    seed: int | None,
    device: str | None,
    dtype: str | None,
    threads: int | None,
    online: bool,
    **spoken: Any,
) -> None:
    """How fast a model is on this machine, with each layer in the storage that is fastest, dense among them.

    Nothing is written: `secateur.accelerate` gives the same model in Python. --dtype bfloat16 is the faster one where
    the processor multiplies it itself (levels avx512bf16 and amx).
    """
    from secateur import kernels
    from secateur.accelerate import accelerate
    from secateur.cli.opening import model_from, set_threads

    speaker = terminal(spoken)
    set_threads(threads)
    tried = _formats(formats)
    with speaker.busy(f"opening {model}"):
        opened = model_from(model, dtype=dtype, device=device, online=online)
        example = _example(opened, tokens, task, ctx.meta[TASK], seed or 0)
    with speaker.busy("timing each layer in each format"):
        found = accelerate(opened.model, example, threads=threads, formats=tried)
    told = {
        "model": opened.name,
        "tokens": example.tokens,
        "level": found.level,
        "library": str(kernels.where() or "none"),
        "chosen": found.chosen,
        "dense": asdict(found.dense),
        "now": asdict(found.now),
        "error": found.error,
        "layers": [asdict(choice) for choice in found.choices],
    }
    if explain:
        with speaker.busy("looking for the limits"):
            told |= _limits(found, tried)
    speaker.emit(told)
    if not speaker.as_json:
        _show(speaker, opened.name, found, told, explain)


def _example(opened: "Opened", tokens: int, task: str | None, given: dict[str, Any], seed: int) -> "Batch":
    from secateur.models.hf import example_inputs
    from secateur.task import Batch

    inputs = {} if task is not None else example_inputs(opened.model)
    if not inputs:
        from secateur.cli.opening import task_from

        return task_from(opened, task, given, seed).example
    if set(inputs) == {"input_ids"}:
        ids = inputs["input_ids"]
        inputs["input_ids"] = ids.repeat(1, -(-tokens // ids.shape[1]))[:, :tokens]
    return Batch(inputs)


def _formats(asked: str | None) -> "Sequence[Format]":
    from secateur.candidates import FORMATS
    from secateur.errors import SettingError, did_you_mean
    from secateur.formats import FORMATS as ALL

    if asked is None:
        return FORMATS
    known = {format.name: format for format in (*(kind() for kind in ALL.values()), *FORMATS)}
    for name in asked.split(","):
        if name not in known:
            raise SettingError(
                f"format {name!r} was asked for", "there is none of that name", did_you_mean(name, known)
            )
    return [known[name] for name in asked.split(",")]


def _limits(found: "Accelerated", formats: "Sequence[Format]") -> dict[str, Any]:
    """What memory gives, and the sparsity from which each format wins at each shape."""
    import torch

    from secateur.accelerate import break_even, memory_speed
    from secateur.candidates import FEWEST, holds
    from secateur.formats import GroupCols

    dtype = getattr(torch, found.dense.dtype)
    tried = {(choice.shape, choice.rows, choice.slid) for choice in found.choices if choice.trials}
    even: dict[str, dict[str, float | None]] = {}
    for shape, rows, slid in sorted(tried, key=str):
        name = f"{'x'.join(map(str, shape))} at {rows}"
        if slid is not None and rows < FEWEST and shape[2:] == (1, 1) and slid.groups == 1 and slid.stride == (1, 1):
            shape, slid = shape[:2], None  # of so few pixels it is tried as a linear layer
        some = [f for f in formats if holds(f, shape, slid) and (rows >= FEWEST or not isinstance(f, GroupCols))]
        if some:
            even[name] = {f.name: break_even(shape, rows, dtype, f, slid) for f in some}
    return {"memory_bytes_per_second": memory_speed(), "break_even": even}


def _show(speaker: "Terminal", name: str, found: "Accelerated", told: dict[str, Any], explain: bool) -> None:
    from secateur import kernels
    from secateur.report import figures

    if explain:
        _explain(speaker, found, told)
    if kernels.where() is None:
        speaker.show(kernels.without())
    layers = ", ".join(f"{count} {name}" for name, count in found.chosen.items())
    before, after = found.dense.milliseconds, found.now.milliseconds
    speaker.show(
        f"{name}   {layers}   {before:.2f} -> {after:.2f} ms ({before / after:.2f}x)   {found.dense.dtype}, "
        f"{figures.count(found.now.threads)} threads, {found.level}"
    )
    sizes = [
        [trial.nbytes for trial in c.trials[:1]] + [t.nbytes for t in (c.trial(c.chosen),) if t] for c in found.choices
    ]
    tried = [size for size in sizes if len(size) == 2]
    if tried:
        speaker.show(
            f"layers that were tried take {figures.size(sum(s[0] for s in tried))} dense and "
            f"{figures.size(sum(s[1] for s in tried))} as chosen; outputs differ by {found.error:.1e} of the largest"
        )


def _explain(speaker: "Terminal", found: "Accelerated", told: dict[str, Any]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table

    speed = told["memory_bytes_per_second"]
    rows = {choice.rows for choice in found.choices if choice.rows}
    lines = []
    for choice in found.choices:
        dense, now = choice.trial("dense"), choice.trial(choice.chosen)
        share = now.nbytes / (now.milliseconds / 1e3) / speed if now and speed else None
        lines.append(
            (
                choice.layer,
                "x".join(map(str, choice.shape)) + (f" at {choice.rows}" if len(rows) > 1 else ""),
                f"{choice.sparsity:.0%}",
                f"{dense.milliseconds:.3f}" if dense else "",
                f"{now.milliseconds:.3f}" if now else "",
                choice.chosen,
                f"{share:.0%}" if share else "",
            )
        )
    heads = ("layer", "shape", "zeros", "dense ms", "ms", "as", "memory")
    shown = table(*heads, right=("zeros", "dense ms", "ms", "memory"), whole=("shape", "as"))
    room = speaker.result.width - sum(
        2 + max(len(line[place]) for line in (heads, *lines)) for place in range(1, len(heads))
    )
    for name, *cells in lines:
        shown.add_row(escape(_shortened(name, room)), *cells)
    speaker.show(shown)
    if len(rows) == 1:
        speaker.show(f"\neach layer multiplies {rows.pop()} row(s) at a time")
    reasons: dict[str, list[str]] = {}
    for choice in found.choices:
        if choice.chosen == "dense":
            reasons.setdefault(choice.why, []).append(choice.layer)
    for why, layers in reasons.items():
        more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        speaker.show(f"dense: {layers[0]}{more}, as {why}")
    if speed:
        speaker.show(f"memory gives {speed / 1e9:.1f} GB/s; a share above 100 % came from the cache")
    for shape, even in told["break_even"].items():
        found_at = ", ".join(f"{name} {'never' if at is None else f'from {at:.0%}'}" for name, at in even.items())
        speaker.show(f"{shape} rows: faster than dense {found_at}")


def _shortened(name: str, room: int) -> str:
    """A layer's name in so many letters: its end, which tells it from others; never less than twelve."""
    room = max(room, 12)
    return name if len(name) <= room else "…" + name[len(name) - room + 1 :]
