"""The README.md of a saved model: a page made of measured numbers only."""

from collections.abc import Mapping, Sequence
from typing import Any

from secateur.outcome import Record, Size, Timing


def model_card(record: Record, saved: Mapping[str, Any], edits: Sequence[str]) -> str:
    """A model card in Markdown. What was not measured is not mentioned."""
    name = str(record.model.get("name") or saved["class"])
    lines = ["---", "tags:", "- pruned", "- secateur"]
    if saved.get("kind") == "hf":
        lines += [f"library_name: {saved.get('library', 'transformers')}"] if saved["stock"] else []
    if not str(saved.get("source", "")).startswith(("/", ".")) and "/" in str(saved.get("source", "")):
        lines += [f"base_model: {_quoted(saved['source'])}"]
    lines += ["---", "", f"# {name}, pruned", "", _sentence(record, name), ""]
    lines += _measured(record) + _cost(record) + _settings(record) + _loading(saved)
    if edits:
        lines += ["## What was changed", "", *(f"- {edit}" for edit in edits[:12])]
        lines += [f"- and {len(edits) - 12} more, in `edits.safetensors`"] if len(edits) > 12 else []
        lines += [""]
    if record.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in record.notes), ""]
    return "\n".join(lines).rstrip() + "\n"


def _sentence(record: Record, name: str) -> str:
    ledger = record.ledger
    what = f"`{record.method}` was run on {name}" if record.method else f"{name} was changed"
    if ledger.prunable:
        what += f"; {ledger.removed:,} of {ledger.prunable:,} prunable weights are gone ({ledger.share:.1%})"
    return what + "."


def _measured(record: Record) -> list[str]:
    before, after = record.measured("before"), record.measured("after")
    names = sorted(before.keys() | after.keys())
    if not names:
        return []
    splits = sorted({m.split for m in record.measurements})
    title = f"{record.task.get('name', 'task')}, {', '.join(splits)}"
    lines = ["## Measured", "", f"| {title} | before | after |", "| --- | ---: | ---: |"]
    lines += [f"| {n} | {_number(before.get(n))} | {_number(after.get(n))} |" for n in names]
    return [*lines, ""]


def _cost(record: Record) -> list[str]:
    before, after = record.ledger.before, record.ledger.after
    rows: list[tuple[str, str]] = [("parameters", "parameters"), ("zeros among them", "zeros")]
    rows += [("bytes in memory", "memory_bytes"), ("floating-point operations, as if dense", "flops")]

    def cell(size: Size, key: str) -> str:
        value = getattr(size, key)
        return "" if value is None else f"{value:,}"

    lines = ["## Cost", "", "| | before | after |", "| --- | ---: | ---: |"]
    lines += [
        f"| {title} | {cell(before, key)} | {cell(after, key)} |"
        for title, key in rows
        if getattr(before, key) is not None or getattr(after, key) is not None
    ]
    first, second = record.ledger.timing_before, record.ledger.timing_after
    if first is not None and second is not None:
        lines += [f"| milliseconds ({_how(second)}) | {_time(first)} | {_time(second)} |"]
    lines += [""]
    if after.parameters == before.parameters and after.zeros > before.zeros:
        lines += ["Zeros are stored like any other number: this file is not smaller and runs no faster as it is.", ""]
    return lines


def _how(timing: Timing) -> str:
    compiled = ", compiled" if timing.compiled else ""
    return (
        f"batch {timing.batch}, {timing.threads} threads, {timing.dtype}, "
        f"median of {timing.repeats} and quartile spread{compiled}"
    )


def _time(timing: Timing) -> str:
    return f"{timing.milliseconds:.3g} ± {timing.spread:.2g}"


def _settings(record: Record) -> list[str]:
    if not record.method:
        return []
    lines = ["## How", "", f"Method `{record.method}`", ""]
    lines[-2] += f", seed {record.task['seed']}." if "seed" in record.task else "."
    if record.settings:
        lines += ["| setting | value |", "| --- | --- |"]
        lines += [f"| {key} | {_cell(value)} |" for key, value in sorted(record.settings.items())] + [""]
    if record.command:
        lines += ["```", record.command, "```", ""]
    return [*lines, "`recipe.yaml` runs it again; `secateur.json` is the full record.", ""]


def _loading(saved: Mapping[str, Any]) -> list[str]:
    lines = ["## Loading", "", "```python"]
    if saved["kind"] == "onnx":
        lines += ["import onnxruntime", "", 'session = onnxruntime.InferenceSession("model.onnx")', "```", ""]
        return [*lines, f"ONNX Runtime answers as the pruned model did (difference {saved['difference']:.2g}).", ""]
    if saved["stock"]:
        lines += [f"from {saved.get('library', 'transformers')} import {saved['class']}", ""]
        lines += [f'model = {saved["class"]}.from_pretrained("this folder")', "```", ""]
        if saved.get("difference") is not None:
            library = saved.get("library", "transformers")
            lines += [f"Stock {library} answers as the pruned model did (difference {saved['difference']:.2g}).", ""]
        return lines
    argument = ", build=function" if saved["kind"] == "python" else ""
    lines += ["from secateur.models import load", "", f'model = load("this folder"{argument})', "```", ""]
    return [*lines, f"Stock loaders do not take it: {saved['why_not']}.", ""]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _cell(value: Any) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")


def _quoted(text: Any) -> str:
    return '"' + str(text).replace("\\", "\\\\").replace('"', '\\"') + '"'
