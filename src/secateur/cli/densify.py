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
    target = Path(out) if out else Path(file).with_name(Path(file).name.replace(".sparse", "", 1))
    asked = f"{file} was to be written out to {target}"
    if target.absolute() == Path(file).absolute():
        raise ModelError(asked, "that is the same file", "Give --out.")
    if target.exists() and not overwrite:
        raise ModelError(asked, "something is there already", "Give another name, or --overwrite.")
    with speaker.busy(f"reading {file}"):
        size = densify(file, target)
    speaker.emit({"path": str(target), "bytes": size, "sparse_bytes": Path(file).stat().st_size})
    if not speaker.as_json:
        speaker.show(f"{target}   {figures.size(size)} from {figures.size(Path(file).stat().st_size)}")
