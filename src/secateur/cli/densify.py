"""`secateur densify`: a sparse file as one that everybody reads."""

from typing import Any

import click

from secateur.cli.options import spoken, terminal


@click.command("densify")
@click.argument("file")
@click.option("--out", metavar="FILE", help="What to write. [default: FILE without .sparse]")
@click.option("--overwrite", is_flag=True, help="Replace what is there.")
@spoken
def command(file: str, out: str | None, overwrite: bool, **spoken: Any) -> None:
    """Write the tensors of a sparse file as a plain safetensors file, every zero written out.

    FILE was made by `secateur export DIR --to sparse`.
    """
    from pathlib import Path

    from secateur.errors import ModelError
    from secateur.export.sparse import densify
    from secateur.report import figures

    speaker = terminal(spoken)
    head, _, tail = Path(file).name.rpartition(".sparse")
    target = Path(out) if out else Path(file).with_name(head + tail)
    asked = f"{file} was to be written out to {target}"
    if not Path(file).is_file():
        what = "that is a folder" if Path(file).is_dir() else "there is no such file"
        raise ModelError(asked, what, "Give the file that `secateur export DIR --to sparse` made.")
    if target.absolute() == Path(file).absolute():
        raise ModelError(asked, "that is the same file", "Give --out.")
    if target.exists() and not overwrite:
        raise ModelError(asked, "something is there already", "Give another name, or --overwrite.")
    with speaker.busy(f"reading {file}"):
        size = densify(file, target)
    speaker.emit({"path": str(target), "bytes": size, "sparse_bytes": Path(file).stat().st_size})
    if not speaker.as_json:
        speaker.show(f"{target}   {figures.size(size)} from {figures.size(Path(file).stat().st_size)}")
