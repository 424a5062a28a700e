"""Saving what came out of a run, so that it loads elsewhere: whole or not at all.

A uniform cut (the same width in every layer, fewer layers, heads or experts) is written so that stock loaders take
it, and this is tried before it is said. Any other shape is written for `secateur.load`, with the architecture before
the cut and the edits that lead from it.
"""

import copy
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import edit as edits_file
from secateur.edit import Edit, Mask, Merge, Remove, Replace, Rotate, gated
from secateur.errors import ModelError
from secateur.models import hf, onnx, pipelines
from secateur.models.card import model_card
from secateur.models.folder import CARD, FORMAT, RECORD, check_tensors, is_ours, sha256
from secateur.models.llama_shaped import per_layer_config
from secateur.models.loading import structure_
from secateur.models.offload import Resting, reread
from secateur.models.opening import NAMES, Opened
from secateur.outcome import (
    SCHEMA_VERSION,
    Ledger,
    Outcome,
    Record,
    Size,
    about_machine,
    about_model,
    about_versions,
    elements,
    now,
    site_rows,
    write_text,
)


def save(
    outcome: Outcome,
    opened: Opened | nn.Module | None,
    folder: str | Path,
    *,
    recipe: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a run's model, recipe, edits, record and card into a new folder; returns its path.

    `opened` is what the run started from (`open_model`), or the model itself; it says what the architecture was and
    brings the tokenizer. Raises ModelError when the folder exists (unless `overwrite` and it is ours), when there is
    no room, and when the edits do not lead to the model. Nothing half written is left behind.
    """
    target = Path(os.path.abspath(folder))
    asked = f"a model was to be saved to {folder}"
    _refuse_target(target, asked, overwrite)
    model = outcome.model
    if gated(model):
        raise ModelError(asked, "its weights are still behind gates", "Harden it first: secateur.edit.harden(model).")
    source = opened if isinstance(opened, Opened) else Opened(model, None, type(model).__name__, "", "python")
    partial = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
        _write(partial, outcome, source, recipe)
        mask = os.umask(0)
        os.umask(mask)
        partial.chmod(0o777 & ~mask)
        for file in partial.rglob("*.safetensors"):
            file.chmod(0o666 & ~mask)  # the library lets nobody else read what it writes
        _swap(partial, target, asked, overwrite)
    except OSError as error:
        raise ModelError(
            asked, f"the disk refused: {error.strerror or error}", "Make room, or save elsewhere."
        ) from error
    except Exception as error:
        if type(error).__name__ == "SafetensorError":  # the library's own class for a write that failed
            raise ModelError(asked, f"the disk refused: {error}", "Make room, or save elsewhere.") from error
        raise
    finally:
        if partial is not None:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def _refuse_target(target: Path, asked: str, overwrite: bool) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if not is_ours(target):
        raise ModelError(asked, "it exists and secateur did not write it", "Give a folder that does not exist yet.")
    if not overwrite:
        raise ModelError(asked, "a saved model is there", "Give another folder, or overwrite=True (--overwrite).")


def _swap(partial: Path, target: Path, asked: str, overwrite: bool) -> None:
    _refuse_target(target, asked, overwrite)  # again: the run took a while
    if not target.exists():
        os.rename(partial, target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old-"))
    os.rename(target, old / "model")
    try:
        os.rename(partial, target)
    except OSError:
        os.rename(old / "model", target)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _write(folder: Path, outcome: Outcome, opened: Opened, recipe: Mapping[str, Any] | None) -> None:
    model = outcome.model
    edits = [*opened.edits, *outcome.edits]
    if isinstance(model, pipelines.Pipeline):
        said = pipelines.write(folder, model)
    elif isinstance(model, onnx.Network):
        said = _write_onnx(folder / "model.onnx", outcome, opened)
    else:
        said = (_write_hf if hf.is_hf(model) else _write_python)(folder, model, opened, edits)
    edits_file.save(edits, folder / "edits.safetensors")
    if opened.tokenizer is not None:
        opened.tokenizer.save_pretrained(str(folder))
    record = outcome.record or _record(outcome, opened)
    floats = {v.dtype for v in model.state_dict().values() if v.is_floating_point()}
    said |= {
        "format": FORMAT,
        "dtypes": sorted(str(d).removeprefix("torch.") for d in floats),
        "source": opened.source,
        "modules": sorted({type(e.module).__module__ for e in edits if isinstance(e, Replace)}),
        "opened": opened.kind,
        "index": index_maps(outcome.edits, opened.index),
        "lineage": [*opened.lineage, {"method": record.method, "settings": record.settings, "created": record.created}],
    }
    _write_recipe(folder / "recipe.yaml", recipe or _recipe(record, opened))
    write_text(folder / CARD, model_card(record, said, [e.describe() for e in outcome.edits]))
    weights = [p for kind in ("*.safetensors", "*.onnx", "*.onnx.data") for p in folder.rglob(kind)]
    size = sum(p.stat().st_size for p in weights if p.name != "edits.safetensors")
    ledger = replace(record.ledger, after=replace(record.ledger.after, stored_bytes=size))
    files = {p.relative_to(folder).as_posix(): sha256(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    record = replace(record, ledger=ledger, files=files)
    write_json(folder / RECORD, {**asdict(record), "saved": said})


# ONNX


def save_onnx(
    outcome: Outcome, opened: Opened | nn.Module | None, path: str | Path, *, overwrite: bool = False
) -> Path:
    """Write a run's network to an ONNX file, and its record to a JSON file beside it, whose path is returned.

    Raises ModelError for a network that was not read from an ONNX file, when either file exists (unless `overwrite`
    and the ONNX file is ours), and when ONNX Runtime does not answer as the network does.
    """
    target = Path(os.path.abspath(path))
    asked = f"a model was to be saved to {path}"
    refuse_onnx(target, asked, overwrite)
    if not isinstance(outcome.model, onnx.Network):
        raise ModelError(
            asked,
            f"it is a {type(outcome.model).__name__}, which was not read from an ONNX file",
            "Save it to a folder, and export that.",
        )
    source = opened if isinstance(opened, Opened) else Opened(outcome.model, None, target.stem, "", "onnx")
    record = outcome.record or _record(outcome, source)
    said = _write_onnx(target, outcome, source)
    size = sum(p.stat().st_size for p in target.parent.glob(f"{target.name}*") if p.suffix in (".onnx", ".data"))
    ledger = replace(record.ledger, after=replace(record.ledger.after, stored_bytes=size))
    record = replace(record, ledger=ledger, files={target.name: sha256(target)})
    said |= {"format": FORMAT, "source": source.source, "opened": source.kind}
    beside = target.with_suffix(".json")
    write_json(beside, {**asdict(record), "saved": said})
    return beside


def refuse_onnx(target: Path, asked: str, overwrite: bool) -> None:
    """Raise ModelError for an ONNX file that must not be written over."""
    beside = target.with_suffix(".json")
    for place in (target, beside):
        if place.exists() and not overwrite:
            raise ModelError(asked, f"{place.name} is there already", "Give another name, or --overwrite.")
    if target.exists() and not onnx.is_ours(target):
        raise ModelError(asked, "it exists and secateur did not write it", "Give a file that does not exist yet.")


def _write_onnx(path: Path, outcome: Outcome, opened: Opened) -> dict[str, Any]:
    assert isinstance(outcome.model, onnx.Network), "the callers look"
    method = "" if outcome.record is None else outcome.record.method
    difference = onnx.write(outcome.model, path, {onnx.MARK: about_versions().get("secateur", "0"), "method": method})
    said: dict[str, Any] = {"kind": "onnx", "class": "Network", "build": None, "aliases": {}}
    why = "it is an ONNX file, which ONNX Runtime takes: model.onnx"
    return said | {"stock": False, "why_not": why, "difference": difference}


# Hugging Face


def _write_hf(folder: Path, model: nn.Module, opened: Opened, edits: Sequence[Edit]) -> dict[str, Any]:
    base = _base_config(model, opened)
    kind = type(model)
    if opened.resting is not None and opened.resting.holds(model):
        return _write_resting(folder, model, base, opened.resting)
    config, why, difference = stock(folder, model, opened)
    said: dict[str, Any] = {"kind": "hf", "class": kind.__name__, "build": None, "aliases": {}}
    if config is not None:
        return said | {"stock": True, "why_not": None, "difference": difference}
    aliases = hf.aliases_of(model)
    values = hf.stored(model)
    _check_replay(hf.skeleton(kind, base), edits, model, aliases, folder)
    base.dtype = next(v.dtype for v in values.values() if v.is_floating_point())
    _write_tensors(values, folder / "model.safetensors")
    written = base.to_dict()
    write_json(folder / "base_config.json", written)
    # A type no stock loader knows: one that it knows would be filled with random weights where names differ.
    said_of_it: dict[str, Any] = {"model_type": f"secateur-{base.model_type}", "why_not_stock": why}
    if layers := per_layer_config(model, base):
        said_of_it["per_layer_config"] = {str(place): sizes for place, sizes in layers.items()}
    write_json(folder / "config.json", written | said_of_it)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
    return said | {"stock": False, "why_not": why, "difference": None, "aliases": aliases}


def _write_resting(folder: Path, model: nn.Module, config: Any, resting: Resting) -> dict[str, Any]:
    """A model whose weights lie in a file, in the shapes it was opened with: that file, once it was tried."""
    kind, path = type(model), folder / "model.safetensors"
    config.dtype = next(v.dtype for v in model.state_dict().values() if v.is_floating_point())
    resting.write(path)
    fresh = reread(kind, config, path, config.dtype)
    inputs, difference = hf.example_inputs(model), None
    if inputs:
        ours, stock = hf.answer(model, inputs), hf.answer(fresh, inputs)
        difference = float((ours - stock).abs().max())
        if not difference <= _tolerance(config.dtype) * max(1.0, float(ours.abs().max())):
            raise ModelError(
                f"a model was to be saved to {folder}",
                f"the stock {kind.__name__} of the same weights answers differently, by {difference:.2g}",
                "Open it without offload.",
            )
    config.save_pretrained(str(folder))
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.save_pretrained(str(folder))  # type: ignore[union-attr,operator]
    said: dict[str, Any] = {"kind": "hf", "class": kind.__name__, "build": None, "aliases": {}}
    return said | {"stock": True, "why_not": None, "difference": difference}


def _base_config(model: nn.Module, opened: Opened) -> Any:
    now: Any = model.config
    config = type(now).from_dict(copy.deepcopy(dict(opened.config))) if opened.config else copy.deepcopy(now)
    for name in ("quantization_config", "auto_map"):
        if hasattr(config, name):
            delattr(config, name)
    config.architectures = [type(model).__name__]
    # Of the whole: a part, such as a convolutional backbone, may know no other way of attention than its own.
    config._attn_implementation = {"": now._attn_implementation}
    return config


def stock(folder: Path, model: nn.Module, opened: Opened) -> tuple[Any | None, str, float | None]:
    """Write the model as the stock class of a fitted config, if its answers are the same; else say why not."""
    kind, base = type(model), _base_config(model, opened)
    values = hf.stored(model)
    dtypes = {v.dtype for v in values.values() if v.is_floating_point()}
    if len(dtypes) > 1:
        return None, f"its tensors are of several dtypes: {', '.join(sorted(map(str, dtypes)))}", None
    whole = hf.skeleton(kind, base)
    kept = hf.kept_layers(model, whole)
    shortened = [p for p in kept if len(model.get_submodule(p)) < len(whole.get_submodule(p))]  # type: ignore[arg-type]
    moved = {name: hf.renumbered(name, kept, shortened) for name in model.state_dict()}
    aliases = {moved[a]: moved[n] for a, n in hf.aliases_of(model).items() if moved[a] and moved[n]}
    if getattr(base, "tie_word_embeddings", False) and hf.aliases_of(whole) and not aliases:
        base = copy.deepcopy(base)
        base.tie_word_embeddings = False
    target = {moved[n]: s for n, s in hf.shapes_of(model).items() if moved[n]}
    config, why = hf.fit_config(kind, base, target, kept)  # type: ignore[arg-type]
    if config is None:
        return None, why, None
    config.dtype = dtypes.pop()
    fresh = hf.empty(kind, config, config.dtype)
    whole_file = {moved[n]: v for n, v in values.items() if moved[n]}
    for name, shape in hf.shapes_of(fresh).items():
        if name not in target:  # a bias that came along with another
            whole_file[name] = torch.zeros(shape, dtype=config.dtype)
    hf.fill_(fresh, whole_file, aliases)  # type: ignore[arg-type]
    if getattr(model, "generation_config", None) is not None:
        fresh.generation_config = model.generation_config
    inputs = hf.example_inputs(model)
    difference = None
    if inputs:
        try:
            ours, stock = hf.answer(model, inputs).cpu(), hf.answer(fresh, {k: v.cpu() for k, v in inputs.items()})
        except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
            return None, f"it, or the stock {kind.__name__}, does not answer a small input: {hf.one_line(error)}", None
        difference = float((ours - stock).abs().max())
        if not difference <= _tolerance(config.dtype) * max(1.0, float(ours.abs().max())):
            return None, f"the stock {kind.__name__} of the same shapes answers differently, by {difference:.2g}", None
    with hf.quiet():
        fresh.save_pretrained(str(folder), max_shard_size="100TB")  # type: ignore[operator]
    return config, "", difference


def _tolerance(dtype: torch.dtype) -> float:
    """Of the largest answer: what another order of summation, or a rounded rotary table, may cost."""
    return max(1e-4, 4 * torch.finfo(dtype).eps)


# A network of the user's


def _write_python(folder: Path, model: nn.Module, opened: Opened, edits: Sequence[Edit]) -> dict[str, Any]:
    aliases = hf.aliases_of(model)
    if opened.builder is not None:
        _check_replay(opened.builder(), edits, model, aliases, folder)
    _write_tensors(hf.stored(model), folder / "model.safetensors")
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    why = f"stock loaders do not know {kind}: load it with secateur.load and the function that builds it"
    return {
        "kind": "python",
        "class": kind,
        "build": opened.build,
        "stock": False,
        "why_not": why,
        "difference": None,
        "aliases": aliases,
    }


def _check_replay(
    base: nn.Module, edits: Sequence[Edit], model: nn.Module, aliases: Mapping[str, str], folder: Path
) -> None:
    """Raise ModelError unless the edits lead from the architecture before the cut to the model's shapes."""
    asked = "a model was to be saved with the edits that made it"
    do = "Record every change of shape as an edit, in order."
    try:
        structure_(base, edits)
        check_tensors(hf.entries_of(base, aliases), hf.entries_of(model, aliases), folder, dtypes=False)
    except ModelError as error:
        raise ModelError(asked, f"they do not lead to it: {error.found}", do) from error
    except (LookupError, RuntimeError, AttributeError, AssertionError, ValueError) as error:
        raise ModelError(asked, f"they do not lead to it: {hf.one_line(error)}", do) from error


# The small files


def index_maps(edits: Sequence[Edit], earlier: Mapping[str, Sequence[int]] | None = None) -> dict[str, list[int]]:
    """Site -> which of the original's units it kept, through every cut of that site; single weights left out.

    For merged units, the first of the original's units in each cluster; for units put in another order, in that order.
    """
    found = {name: list(units) for name, units in (earlier or {}).items()}
    for edit in edits:
        if not isinstance(edit, (Remove, Merge, Mask, Rotate)) or edit.site.kind in ("weight", "block"):
            continue
        if isinstance(edit, Rotate) and edit.matrix.dim() != 1:  # in another basis no unit is what it was
            continue
        before = found.get(edit.site.name)
        if before is None or (isinstance(edit, Mask) and len(before) != edit.site.units):
            before = list(range(edit.site.units))
        if len(before) != edit.site.units:
            before = list(range(edit.site.units))
        if isinstance(edit, Merge):
            assignment = edit.assignment.tolist()
            now_kept = [assignment.index(c) for c in range(max(assignment) + 1)]
        elif isinstance(edit, Rotate):
            now_kept = edit.matrix.tolist()
        else:
            now_kept = edit.keep.reshape(-1).nonzero().reshape(-1).tolist()
        found[edit.site.name] = [before[i] for i in now_kept]
    return found


def _record(outcome: Outcome, opened: Opened) -> Record:
    rows = site_rows(outcome.edits)
    sizes = (Size.of(opened.model), Size.of(outcome.model))
    ledger = outcome.ledger or Ledger.of_run(sizes, outcome.edits, elements(opened.model), outcome.model)
    versions = about_versions()
    return Record(
        schema=SCHEMA_VERSION,
        secateur=versions.get("secateur", "0"),
        created=now(),
        command="",
        method="",
        settings={},
        model=about_model(outcome.model, opened.name),
        task={},
        ledger=ledger,
        sites=rows,
        notes=outcome.notes,
        machine=about_machine(),
        versions=versions,
    )


def _recipe(record: Record, opened: Opened) -> dict[str, Any]:
    """What `secateur.recipe.read` takes, from the record alone."""
    steps = record.settings.get("methods") or [{"method": record.method, **record.settings}]
    about = {k: v for k, v in record.task.items() if k not in ("seed", "metric", "higher_is_better", "fingerprint")}
    return {
        "secateur": record.secateur,
        "model": opened.name if opened.name in NAMES else opened.source or opened.name,
        **({"task": about} if about else {}),
        **({"seed": record.task["seed"]} if "seed" in record.task else {}),
        "steps": steps,
    }


def _write_recipe(path: Path, recipe: Mapping[str, Any]) -> None:
    import yaml

    write_text(path, yaml.safe_dump(_plain(recipe), sort_keys=False, allow_unicode=True))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object, sorted, whole or not at all."""
    import json

    write_text(path, json.dumps(value, indent=1, sort_keys=True, default=str) + "\n")


def _write_tensors(values: Mapping[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    save_file(dict(values), str(path), metadata={"format": "pt"})
