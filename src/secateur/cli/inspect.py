"""`secateur inspect`: what a file of weights holds."""

from typing import Any

import click

from secateur.cli.options import spoken, terminal


@click.command("inspect")
@click.argument("file")
@click.option("--all", "every", is_flag=True, help="Every tensor, however many there are.")
@spoken
def command(file: str, every: bool, **spoken: Any) -> None:
    """What a file of weights holds: shapes, bytes, zeros.

    FILE is safetensors, GGUF, ONNX, or a folder of them; nothing in it is run.
    """
    from secateur.models import inspect_file

    speaker = terminal(spoken)
    with speaker.busy(f"reading {file}"):
        found = inspect_file(file)
    speaker.emit(found)
    if not speaker.as_json:
        _show(speaker, found, every)


def _show(speaker: Any, found: dict[str, Any], every: bool) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.report import figures

    tensors = found["tensors"]
    some = tensors if every or len(tensors) <= 40 else [*tensors[:20], None, *tensors[-10:]]
    shown = table("tensor", "shape", "dtype", "bytes", "zeros", right=("bytes", "zeros"))
    for row in some:
        if row is None:
            shown.add_row(f"[dim]... {len(tensors) - 30} more, shown with --all[/]", "", "", "", "")
            continue
        shape = "x".join(map(str, row["shape"])) or "1"
        shown.add_row(escape(row["name"]), shape, row["dtype"], f"{row['bytes']:,}", figures.percent(row["zeros"]))
    speaker.show(shown)
    speaker.show(
        f"\n{found['path']}: {found['format']}, {len(tensors):,} tensors, {found['parameters']:,} numbers, "
        f"{figures.size(found['bytes'])}, {figures.percent(found['zeros'])} of them zero"
    )
    saved = found.get("saved")
    if saved:
        how = "stock loaders take it" if saved.get("stock") else f"load it with secateur: {saved.get('why_not')}"
        speaker.show(f"made with {found.get('method')}; {how}")
