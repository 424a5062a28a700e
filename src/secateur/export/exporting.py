"""One way for every run-time: write to a temporary name, load it there, compare the answers, rename.

from secateur.export import export

done = export("pruned", "gguf", "pruned.gguf")     # written, loaded by llama.cpp, compared, then renamed
"""

import copy
import importlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import ExportError, SettingError, did_you_mean
from secateur.models import Opened, hf, open_model
from secateur.models.folder import RECORD, header, is_ours, read_json
from secateur.models.saving import write_json
from secateur.outcome import Exported, now, stored_bytes

TARGETS = {
    "hf": "a folder that stock transformers loads",
    "gguf": "a file for llama.cpp and what is built on it",
    "onnx": "a graph for ONNX Runtime and many others",
    "openvino": "a folder for Intel's run-time",
    "sparse": "a small safetensors file: where the numbers are, and those that are not zero",
}
"""Where a model can be taken, and what is made."""

MARK = "secateur-export.json"
"""In a folder that was exported: what it is, so that it may be replaced."""


class Target(Protocol):
    """A form, and the run-time that takes it."""

    suffix: str  # of what is made: ".gguf"; without a dot, of a folder

    def need(self) -> None:
        """Raise ExportError when what writes this form is not installed."""
        ...

    def runtime(self) -> str:
        """The run-time with its version. Raises ExportError when it is not installed."""
        ...

    def why_not(self, model: nn.Module) -> str:
        """Why a model has no such form, or nothing."""
        ...

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """Write the form; returns what the user should know of it."""
        ...

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """What the run-time says to small inputs after loading the form."""
        ...

    def tolerance(self, path: Path) -> float:
        """How far from the model's the answers may be, as a share of their length."""
        ...


def target_named(name: str) -> Target:
    """A target by name. Raises SettingError, with the nearest name, when there is none."""
    if name not in TARGETS:
        raise SettingError(
            f"an export to {name!r} was asked for", "there is no such target", did_you_mean(name, TARGETS)
        )
    found: Target = importlib.import_module(f"secateur.export.{name}").Form()
    return found


def export(
    what: str | Path | Opened,
    to: str,
    out: str | Path | None = None,
    *,
    dtype: str | None = None,
    example: Sequence[int] | None = None,
    verify: bool = True,
    overwrite: bool = False,
) -> Exported:
    """Write a model in the form that a run-time takes, load it there, and compare the answers.

    `what` is anything `open_model` opens, and `dtype` what it is opened in (that of the folder if None). `example` is
    the shape of an input, for networks that do not say. Nothing stands at `out` before the answers agreed; without
    `verify` they are not looked at, and the run-time need not be installed. Raises ExportError for a model the
    run-time does not take and for answers that differ, ModelError for one that cannot be opened, SettingError for a
    name that does not exist.
    """
    form = target_named(to)
    source = what.source if isinstance(what, Opened) else str(what)
    target = Path(os.path.abspath(out if out is not None else default_out(source, to)))
    asked = f"{source} was to be exported to {target}"
    _refuse_target(target, asked, overwrite)
    form.need()
    runtime = _runtime(form) if verify else ""
    opened = what if isinstance(what, Opened) else open_model(what, dtype=dtype or stored_dtype(Path(what)))
    if opened.kind == "pipeline":
        raise ExportError(asked, "it is a pipeline of several models", "Export its parts one by one.")
    if why := form.why_not(opened.model):
        raise ExportError(asked, why, "`secateur plan MODEL METHOD --serve` shows what could be cut instead.")
    inputs = probes(opened, example, asked)
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        path = partial / target.name
        notes = form.write(opened, path, inputs)
        difference = _compare(form, opened, path, inputs, asked) if verify else None
        floats = sorted({str(p.dtype).removeprefix("torch.") for p in opened.model.parameters()})
        done = Exported(
            to, str(target), size_of(path), stored_bytes(opened.model), ", ".join(floats), difference, runtime, now(),
            notes,
        )  # fmt: skip
        if path.is_dir():
            write_json(path / MARK, asdict(done))
        _open_to_readers(path)
        _refuse_target(target, asked, overwrite)  # again: it took a while
        if target.is_dir():
            os.rename(target, partial / "old")
        os.replace(path, target)
    except OSError as error:
        raise ExportError(
            asked, f"the disk refused: {error.strerror or error}", "Make room, or export elsewhere."
        ) from error
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    remember(opened.source, done)
    return done


def _runtime(form: Target) -> str:
    try:
        return form.runtime()
    except ExportError as error:
        do = f"{error.do}, or write it without trying it: verify=False, --unverified."
        raise ExportError(error.asked, error.found, do) from error


def default_out(source: str, to: str) -> str:
    """Beside the model, under its name."""
    place = source.rpartition("::")[2] or source
    stem = place.rstrip("/")
    if Path(stem).suffix in (".gguf", ".safetensors"):
        stem = stem[: -len(Path(stem).suffix)]
    return (stem if Path(place).exists() else Path(stem.replace(":", "_")).name) + target_named(to).suffix


def _refuse_target(target: Path, asked: str, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise ExportError(asked, "something is there already", "Give another name, or overwrite=True (--overwrite).")
    if target.is_symlink() or (target.is_dir() and not (target / MARK).is_file()):
        raise ExportError(asked, "what is there was not exported by secateur", "Give a name that does not exist yet.")


def stored_dtype(place: Path) -> str:
    """The one floating-point type of the weights in a folder, or float32."""
    file = place / "model.safetensors"
    if not file.is_file():
        return "float32"
    found = {entry.dtype for entry in header(file).values() if entry.dtype.is_floating_point}
    return str(next(iter(found))).removeprefix("torch.") if len(found) == 1 else "float32"


def probes(opened: Opened, example: Sequence[int] | None, asked: str) -> list[dict[str, Tensor]]:
    """Small inputs of two lengths and batches, since a traced graph may know one by heart."""
    generator = torch.Generator().manual_seed(1)
    if hf.is_hf(opened.model) and example is None:
        first = hf.example_inputs(opened.model)
        if not first:
            raise ExportError(asked, "its config does not say what an input looks like", "Give its shape: --example.")
        return [_plain(first), _plain({name: _another(value, generator) for name, value in first.items()})]
    hint = dict(opened.example_hint) if example is None else {"x": tuple(example)}
    if len(hint) != 1:
        raise ExportError(
            asked,
            "it does not say what an input looks like",
            "Give its shape: example=(1, 3, 32, 32), --example 1x3x32x32.",
        )
    name, shape = next(iter(hint.items()))
    first = {name: torch.randn(shape, generator=generator)}
    return [first, {name: _another(first[name], generator)}]


def _plain(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: (v.float() if v.is_floating_point() else v).cpu() for name, v in values.items()}


def _another(value: Tensor, generator: torch.Generator) -> Tensor:
    """Two examples, and of tokens more of them."""
    if value.is_floating_point():
        return torch.randn((2, *value.shape[1:]), generator=generator).to(value.dtype)
    top = int(value.max()) + 1
    return torch.randint(0, top, (2, 2 * value.shape[1] + 5), generator=generator)


def in_float32(model: nn.Module) -> nn.Module:
    """The model, or a copy in float32 where it is in anything else, so that nothing is rounded on the way."""
    if all(p.dtype == torch.float32 for p in model.parameters()):
        return model.eval()
    return hf.cast_(copy.deepcopy(model), torch.float32).eval()


@torch.no_grad()
def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first tensor a model says to an input, in evaluation and float32."""
    if hf.is_hf(model):
        return hf.answer(model, inputs)
    out = model.eval()(*inputs.values())
    return (out[0] if isinstance(out, (tuple, list)) else out).float()


def _compare(form: Target, opened: Opened, path: Path, inputs: Sequence[Mapping[str, Tensor]], asked: str) -> float:
    """How far the run-time's answers are from the model's, as a share. Raises ExportError when too far."""
    theirs = form.answers(opened, path, inputs)
    allowed, worst, exact = form.tolerance(path), 0.0, in_float32(opened.model)
    for said, given in zip(theirs, inputs, strict=True):
        ours = answer(exact, given).cpu()
        if said.shape != ours.shape:
            raise _differs(asked, f"its answers there are {list(said.shape)} where the model's are {list(ours.shape)}")
        off = float((said - ours).norm() / ours.norm().clamp(min=1e-12))
        if not off <= allowed:  # a NaN is not
            raise _differs(asked, f"its answers there differ by {off:.2g} of their length, and {allowed:g} is allowed")
        worst = max(worst, off)
    return worst


def _differs(asked: str, found: str) -> ExportError:
    error = ExportError(asked, found, "Nothing was left there. Report this, with the recipe of the model.")
    error.__dict__["exit_code"] = 3  # as for any target that was missed
    return error


def _open_to_readers(path: Path) -> None:
    """What temporary files take away from others: the permissions that the user's own files get."""
    mask = os.umask(0)
    os.umask(mask)
    if path.is_dir():
        path.chmod(0o777 & ~mask)


def size_of(path: Path) -> int:
    """The bytes of a file, or of all in a folder."""
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file()) if path.is_dir() else path.stat().st_size


def remember(source: str, done: Exported) -> None:
    """Note an export in the record of the folder it was made from, where that is one of ours and may be written to."""
    folder = Path(source.rpartition("::")[2] or source)
    if not is_ours(folder) or not os.access(folder / RECORD, os.W_OK):
        return
    about: dict[str, Any] = read_json(folder / RECORD)
    earlier = [each for each in about.get("exports", []) if isinstance(each, dict) and each.get("path") != done.path]
    write_json(folder / RECORD, about | {"exports": [*earlier, json.loads(json.dumps(asdict(done)))]})


def missing(package: str, extra: str, asked: str) -> ExportError:
    """The error for something that is not installed."""
    return ExportError(asked, f"{package} is not installed", f"pip install 'secateur[{extra}]'")


__all__ = ["TARGETS", "Target", "answer", "default_out", "export", "in_float32", "missing", "probes", "target_named"]
