"""Building a saved model again: the architecture before the cut, its edits' shapes, then the tensors, checked by name.

Nothing in the folder names code that runs: Hugging Face classes are transformers' own, replaced modules are those
marked with @replacement, and a network of the user's is built by a function the caller gives.
"""

import copy
import importlib
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import edit as edits_file
from secateur.edit import Edit, Mask, Merge, Remove, Replace, Rotate, Update, apply_
from secateur.errors import ModelError, SecateurError
from secateur.models import (
    cells,
    fastestdet,
    fresh,
    grounder,
    hf,
    mobilenet,
    onnx,
    pipelines,
    resnet,
    super_resolution,
)
from secateur.models.folder import Entry, check_saved, check_tensors, few, header, read_json, read_tensors
from secateur.site import Site, Tensors, tensors

_OWN = re.compile(r"secateur(\.[a-z][a-z0-9_]*)+")
Builder = Callable[[], nn.Module]

OWN_BUILDERS: dict[str, Builder] = {
    f"{f.__module__}:{f.__name__}": f
    for f in (
        cells.cells,
        cells.cells_grey,
        cells.cells_small,
        fastestdet.fastestdet,
        fresh.gpt,
        fresh.gru,
        fresh.lstm,
        fresh.vgg,
        fresh.vit_tiny,
        grounder.grounder,
        mobilenet.mobilenet,
        mobilenet.mobilenet_half,
        mobilenet.mobilenet_quarter,
        resnet.resnet20,
        resnet.resnet32,
        resnet.resnet56,
        super_resolution.edsr_x2,
        super_resolution.edsr_x3,
        super_resolution.edsr_x4,
        super_resolution.swinir_x2,
        super_resolution.swinir_x3,
        super_resolution.swinir_x4,
    )
}
"""Architectures of secateur itself, which a folder may name."""


def load(folder: str | Path, *, build: Builder | None = None) -> nn.Module:
    """The model of a folder that `save` wrote, on the CPU, in evaluation, in the dtype it was saved in.

    `build` makes the network before it was cut; it is needed when that was a `module:function` of the user's, since
    code is never imported because a folder names it. Raises ModelError for a folder that was altered, is not whole,
    or does not fit together.
    """
    place = Path(folder)
    if pipelines.is_pipeline(place):
        return pipelines.open_pipeline(place)
    about = check_saved(place)
    saved = about["saved"]
    if saved.get("kind") == "onnx":
        return onnx.load(place / "model.onnx")
    there = header(place / "model.safetensors")
    _know_modules(saved)
    if saved.get("kind") == "hf":
        model = _stock(place, saved, there) if saved.get("stock") is True else _cut(place, saved, there)
        if "secateur.cache" in (saved.get("modules") or ()):
            _join_(model, edits_file.load(place / "edits.safetensors"))
    else:
        model = _built(place, saved, there, build)
    return model.eval()


def _join_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Put back what holds no weights and so is nothing to a stock class: the pruning of a cache."""
    for edit in edits:
        if isinstance(edit, Replace) and edit.name not in dict(model.named_modules()) and hasattr(edit.module, "join_"):
            apply_(model, edit)


def load_edits(folder: str | Path) -> list[Edit]:
    """The edits of a saved folder, after checking that they are the ones that were saved."""
    place = Path(folder)
    _know_modules(check_saved(place)["saved"])
    return edits_file.load(place / "edits.safetensors")


def _know_modules(saved: Mapping[str, Any]) -> None:
    """Import those parts of secateur itself that define the modules which were put in; no other code."""
    modules = saved.get("modules")
    for name in modules if isinstance(modules, list) else ():
        if isinstance(name, str) and _OWN.fullmatch(name):
            with suppress(ModuleNotFoundError):  # the edits are refused when read, and say which class is not known
                importlib.import_module(name)


def structure_(model: nn.Module, edits: Iterable[Edit]) -> nn.Module:
    """Replay what edits do to shapes and modules, and leave out what they do to values; the same model."""
    for edit in edits:
        if isinstance(edit, Mask):
            continue
        if isinstance(edit, Update):
            named = tensors(model)
            if edit.name in named and named[edit.name].shape == edit.value.shape:
                continue
        if isinstance(edit, (Remove, Rotate, Merge)):
            _check_parts(edit.site, tensors(model), edit.keep.reshape(-1) if isinstance(edit, Remove) else None)
        if isinstance(edit, Replace):  # a copy, since later edits may cut what was put in
            edit = Replace(edit.name, copy.deepcopy(edit.module))
        apply_(model, edit)
    return model


def _check_parts(site: Site, named: Tensors, keep: Tensor | None = None) -> None:
    """A choice made on a longer or shorter axis would take the wrong positions, or leave some behind.

    What is removed may lie twice along one axis: the second part is of what the first leaves.
    """
    left: dict[tuple[str, int], int] = {}
    for part in site.parts:
        axis, owned = part.axis, part.owned()
        size = owned.numel() if axis is None else left.get((part.key, axis), part.read(named).shape[axis])
        if owned.numel() != size:
            raise ModelError(
                f"{site.name} was to be cut again",
                f"{part.key} has {size} positions where {owned.numel()} were chosen from",
                "Give the edits that belong to this model.",
            )
        if axis is not None and keep is not None:
            gone = (owned >= 0) & ~keep[owned.clamp(min=0)]
            left[part.key, axis] = size - int(gone.sum())


def _stock(folder: Path, saved: dict[str, Any], there: dict[str, Entry]) -> nn.Module:
    config, kind = _class(folder, "config.json", saved, there)
    _check_dtypes(saved, there, folder)
    agree(kind, config, there, folder, exact=True)
    dtype = getattr(config, "dtype", None) or torch.float32
    return from_folder(kind, config, folder, dtype)


def agree(kind: Any, config: Any, there: Mapping[str, Entry], folder: Path, *, exact: bool) -> None:
    """Raise ModelError, before any memory is taken, unless the sizes a config asks for are those of the weights.

    Some models are stored under other names than they have when built, so only their number is compared then;
    `exact` when the file must hold nothing else.
    """
    empty = skeleton(kind, config, folder / "config.json")
    wanted = hf.entries_of(empty, hf.aliases_of(empty))
    if there.keys() == wanted.keys():
        check_tensors(wanted, there, folder / "model.safetensors", dtypes=False)
    in_model, in_file = sum(e.elements for e in wanted.values()), sum(e.elements for e in there.values())
    if in_model > in_file or (exact and in_model != in_file):
        missing, extra = few(wanted.keys() - there.keys()), few(there.keys() - wanted.keys())
        raise ModelError(
            f"{folder} was to be opened",
            f"its config.json asks for {in_model:,} numbers and its weights hold {in_file:,}"
            + (f"; missing: {missing}" if missing else "")
            + (f"; unknown: {extra}" if extra else ""),
            "The rest would be random: get the folder again, or name the right class under architectures.",
        )
    _check_buffers(empty, in_file, folder / "config.json")


def from_folder(kind: Any, config: Any, folder: Path, dtype: torch.dtype) -> nn.Module:
    """A stock model with every tensor from a folder's safetensors. Raises ModelError when one does not come from it."""
    asked = f"{folder} was to be opened"
    try:
        with hf.quiet():
            model, report = kind.from_pretrained(
                str(folder),
                config=config,
                dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,  # they are named in the report, and refused here
                output_loading_info=True,
            )
    except Exception as error:  # whatever transformers and safetensors raise for a damaged folder
        raise ModelError(asked, f"transformers says: {hf.one_line(error)}", "Get it again.") from error
    check_report(report, folder)
    return model


def check_report(report: Mapping[str, Any], where: Path | str) -> None:
    """Raise ModelError when transformers left a tensor out, or made one up."""
    asked = f"{where} was to be opened"
    if report.get("error_msgs"):
        raise ModelError(asked, f"transformers says: {str(report['error_msgs'])[:300]}", "Get it again.")
    if report.get("mismatched_keys"):
        name, there, wanted = sorted(report["mismatched_keys"])[0]
        raise ModelError(asked, f"{name} is {list(there)} in the file and {list(wanted)} in the model", "Get it again.")
    if report.get("missing_keys"):
        names = report["missing_keys"]
        raise ModelError(
            asked,
            f"{len(names)} of its tensors are missing ({few(names)})",
            "They would be random: name the right class under architectures in config.json, or get the folder again.",
        )
    if report.get("unexpected_keys"):
        names = report["unexpected_keys"]
        raise ModelError(
            asked,
            f"{len(names)} of its tensors are unknown to the model ({few(names)})",
            "Name the right class under architectures in config.json.",
        )


def _cut(folder: Path, saved: dict[str, Any], there: dict[str, Entry]) -> nn.Module:
    config, kind = _class(folder, "base_config.json", saved, there)
    edits = edits_file.load(folder / "edits.safetensors")
    where = folder / "base_config.json"
    shape = _replay(skeleton(kind, config, where), edits, folder)  # without storage: nothing is believed yet
    aliases = _aliases(saved, shape, folder)
    check_tensors(hf.entries_of(shape, aliases), there, folder / "model.safetensors", dtypes=False)
    _check_buffers(shape, sum(e.elements for e in there.values()), where)
    _check_dtypes(saved, there, folder)
    model = _replay(hf.empty(kind, config, getattr(config, "dtype", None) or torch.float32), edits, folder)
    hf.fill_(model, read_tensors(folder / "model.safetensors"), aliases)
    return model


def _built(folder: Path, saved: dict[str, Any], there: dict[str, Entry], build: Builder | None) -> nn.Module:
    name = saved.get("build")
    builder = build or (OWN_BUILDERS.get(name) if isinstance(name, str) else None)
    if builder is None:
        said = f"it was built by {name}" if name else "it does not say how it was built"
        raise ModelError(
            f"{folder} was to be loaded",
            f"{said}, and code is never imported because a folder names it",
            "Give the function: load(folder, build=function).",
        )
    model = builder()
    _replay(model, edits_file.load(folder / "edits.safetensors"), folder)
    aliases = _aliases(saved, model, folder)
    wanted = hf.entries_of(model, aliases)
    floats = {e.dtype for e in there.values() if e.dtype.is_floating_point}
    if len(floats) == 1:  # saved in another precision than it is built in
        hf.cast_(model, next(iter(floats)))
        wanted = hf.entries_of(model, aliases)
    check_tensors(wanted, there, folder / "model.safetensors")
    hf.fill_(model, read_tensors(folder / "model.safetensors"), aliases)
    return model


def _class(folder: Path, name: str, saved: dict[str, Any], there: dict[str, Entry]) -> tuple[Any, Any]:
    values = read_json(folder / name)
    hf.refuse_code(values, folder / name)
    if "quantization_config" in values:
        raise ModelError(
            f"{folder} was to be loaded", f"its {name} asks for a quantiser", "secateur never writes one: get it again."
        )
    hf.refuse_absurd(values, len(there), folder / name)
    config = hf.config_from(values, folder / name)
    return config, hf.class_named(saved.get("class"), config, folder)


def skeleton(kind: Any, config: Any, where: Path) -> nn.Module:
    """A model of shapes only. Raises ModelError for sizes that no such model has."""
    try:
        return hf.skeleton(kind, config)
    except Exception as error:  # sizes that overflow or do not divide: each architecture has its own exception
        raise ModelError(
            f"the config {where} was to be used",
            f"no {kind.__name__} has these sizes: {hf.one_line(error)}",
            "Get the folder again.",
        ) from error


def _replay(model: nn.Module, edits: list[Edit], folder: Path) -> nn.Module:
    try:
        return structure_(model, edits)
    except (SecateurError, RuntimeError, IndexError, AttributeError, AssertionError, ValueError, TypeError) as error:
        raise ModelError(
            f"the edits of {folder} were to be made again",
            f"they do not fit the architecture: {hf.one_line(error)}",
            "Save the model again with every change recorded as an edit.",
        ) from error


def _check_buffers(model: nn.Module, in_file: int, where: Path) -> None:
    """Tables that are computed and not stored must not be the way to ask for all the memory there is."""
    lasting = set(model.state_dict())
    tables = sum(b.numel() for n, b in model.named_buffers() if n not in lasting)
    if tables > 4 * in_file + 2**28:
        raise ModelError(
            f"the config {where} was to be used",
            f"it asks for tables of {tables:,} numbers beside weights of {in_file:,}",
            "The folder is damaged: get it again.",
        )


def _check_dtypes(saved: Mapping[str, Any], there: Mapping[str, Entry], folder: Path) -> None:
    said = saved.get("dtypes")
    for name, entry in there.items():
        dtype = str(entry.dtype).removeprefix("torch.")
        if entry.dtype.is_floating_point and (not isinstance(said, list) or dtype not in said):
            raise ModelError(
                f"{folder} was to be loaded",
                f"{name} is {dtype} and the record says {said}",
                "The folder does not fit together: save the model again.",
            )
        if not entry.dtype.is_floating_point and name.endswith((".weight", ".bias")):
            raise ModelError(
                f"{folder} was to be loaded",
                f"{name} holds {dtype}, and weights are floating point",
                "The folder does not fit together: save the model again.",
            )


def _aliases(saved: Mapping[str, Any], model: nn.Module, folder: Path) -> dict[str, str]:
    found, names = saved.get("aliases", {}), model.state_dict().keys()
    good = isinstance(found, dict) and all(
        alias in names and isinstance(name, str) and name in names and name not in found
        for alias, name in found.items()
    )
    if not good:
        raise ModelError(
            f"{folder} was to be loaded", "its list of tied tensors does not fit the model", "Save the model again."
        )
    return found
