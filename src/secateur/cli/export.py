"""`secateur export`: to where a model is to run, tried there before anything is left."""

from dataclasses import asdict
from typing import Any

import click

from secateur.cli.options import spoken, terminal

TARGETS = ("hf", "gguf", "onnx", "openvino", "sparse")


@click.command("export")
@click.argument("model")
@click.option("--to", required=True, metavar="|".join(TARGETS), help="The run-time that is to take it.")
@click.option("--out", metavar="PATH", help="What to write. [default: beside MODEL, under its name]")
@click.option("--dtype", metavar="TYPE", help="float32, bfloat16 or float16. [default: that of MODEL]")
@click.option("--example", metavar="1x3x32x32", help="The shape of an input, for networks that do not say.")
@click.option("--unverified", is_flag=True, help="Do not load it in the run-time, which need not be installed.")
@click.option("--overwrite", is_flag=True, help="Replace what an earlier export left there.")
@spoken
def command(
    model: str,
    to: str,
    out: str | None,
    dtype: str | None,
    example: str | None,
    unverified: bool,
    overwrite: bool,
    **spoken: Any,
) -> None:
    """Write a model in the form of a run-time, load it there, and compare the answers.

    MODEL is a folder saved by `secateur prune`, or anything else that prune takes. Nothing is left at PATH unless the
    run-time's answers are the model's. Ends with 2 for a model that the run-time does not take, and with 3 for answers
    that differ.
    """
    from secateur.export import export

    speaker = terminal(spoken)
    shape = None if example is None else shape_of(example)
    with speaker.busy(f"exporting {model} to {to}"):
        done = export(model, to, out, dtype=dtype, example=shape, verify=not unverified, overwrite=overwrite)
    speaker.emit(asdict(done))
    if not speaker.as_json:
        _show(speaker, done)


def shape_of(text: str) -> tuple[int, ...]:
    """`1x3x32x32` as numbers. Raises SettingError for anything else."""
    from secateur.errors import SettingError

    sizes = text.replace(",", "x").split("x")
    if not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
        raise SettingError(f"--example {text} was given", "it is no shape", "Write --example 1x3x32x32.")
    return tuple(map(int, sizes))


def _show(speaker: Any, done: Any) -> None:
    from secateur.report import figures
    from secateur.report.ledger import change

    less = change(done.dense_bytes, done.bytes)
    dense = f"{figures.size(done.dense_bytes)} of tensors in {done.dtype}"
    speaker.show(f"{done.target:<9}{done.path}   {figures.size(done.bytes)} for {dense}: {less}")
    if done.difference is None:
        speaker.show("tried    nowhere, as was asked for")
    else:
        speaker.show(f"tried    {done.runtime} answers as the model does (difference {done.difference:.2g})")
    for note in done.notes:
        speaker.say(f"note     {note}", "dim")
