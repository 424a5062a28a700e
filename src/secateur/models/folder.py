"""Reading folders and files that somebody else may have made: nothing in them runs, and nothing is believed unchecked.

A folder of ours lists each of its files with a sha256. Names are plain, links are refused, tensors come from
safetensors alone, and the sizes a configuration asks for are compared with the file before memory is taken.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.outcome import SCHEMA_VERSION

FORMAT = 1  # of the "saved" part of secateur.json
RECORD = "secateur.json"
CARD = "README.md"  # the one file people are meant to edit; nothing is read from it
PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".joblib", ".npy", ".npz")
CODE = (".py", ".pyc", ".so", ".dll", ".dylib", ".sh")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@dataclass(frozen=True)
class Entry:
    """What a file says of one tensor before any of it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """How many numbers it holds."""
        count = 1
        for size in self.shape:
            count *= size
        return count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ModelError when the file is missing, too long for one, or something else."""
    asked = f"{path} was to be read"
    try:
        if path.stat().st_size > 256 * 1024 * 1024:
            raise ModelError(
                asked, f"it has {path.stat().st_size:,} bytes", "No configuration is that long: get it again."
            )
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(asked, "there is no such file", "Give a folder that holds it.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(asked, f"it is not JSON: {error}", "Get the file again.") from error
    if not isinstance(value, dict):
        raise ModelError(asked, f"it holds a {type(value).__name__}, not an object", "Get the file again.")
    return value


def plain_name(name: object, where: str) -> str:
    """A file name without folders or tricks. Raises ModelError for any other."""
    if not isinstance(name, str) or not _PLAIN.fullmatch(name):
        raise ModelError(
            f"{where} was to be followed",
            f"it names {name!r}, which may lead out of the folder",
            "Do not use this folder: names must be plain file names inside it.",
        )
    return name


def refuse_pickle(path: Path) -> None:
    """Raise ModelError for a file that could run code when read: by its name, or by its first bytes."""
    asked = f"weights were to be read from {path}"
    do = (
        "Convert it where you trust it: safetensors.torch.save_file(torch.load(file, weights_only=True), "
        "'model.safetensors')."
    )
    if path.suffix.lower() in PICKLES:
        raise ModelError(asked, f"a {path.suffix} file can run code when it is read", do)
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise ModelError(asked, f"it cannot be read: {error}", "Check the path.") from error
    # A safetensors file starts with the length of its header, which may happen to be 0x80, then a brace.
    if start[8:] != b"{" and (start[:4] == b"PK\x03\x04" or start[:1] == b"\x80"):
        raise ModelError(asked, "its first bytes are those of a pickle, which can run code when it is read", do)


def header(path: Path) -> dict[str, Entry]:
    """Every tensor's shape and dtype in a safetensors file, without reading any. Raises ModelError if not whole."""
    from safetensors import SafetensorError, safe_open

    asked = f"tensors were to be read from {path}"
    if not path.exists():
        raise ModelError(asked, "there is no such file", "Check the path.")
    refuse_pickle(path)
    try:
        with safe_open(str(path), framework="np") as file:  # as "pt" it would map the file as memory to be written to
            found = {}
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = Entry(tuple(part.get_shape()), _DTYPES[part.get_dtype()])
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(asked, f"it is not a whole safetensors file: {error}", "Copy or download it again.") from error
    except KeyError as error:
        raise ModelError(asked, f"it has tensors of dtype {error}", "Store them in a dtype of torch.") from error
    return found


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a safetensors file. Raises ModelError when it is not whole."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    refuse_pickle(path)
    try:
        return load_file(str(path))
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"tensors were to be read from {path}", f"it is not a whole safetensors file: {error}", "Copy it again."
        ) from error


def few(names: Iterable[str], most: int = 4) -> str:
    """The first few of many names."""
    known = sorted(names)
    return ", ".join(known[:most]) + (f" and {len(known) - most} more" if len(known) > most else "")


def check_tensors(wanted: Mapping[str, Entry], there: Mapping[str, Entry], path: Path, *, dtypes: bool = True) -> None:
    """Raise ModelError unless a file holds exactly the tensors a model has, in their shapes and dtypes."""
    asked = f"a model's tensors were to be read from {path}"
    missing, extra = wanted.keys() - there.keys(), there.keys() - wanted.keys()
    if missing or extra:
        found = [f"{len(missing)} missing ({few(missing)})"] if missing else []
        found += [f"{len(extra)} unknown ({few(extra)})"] if extra else []
        raise ModelError(asked, "of its tensors " + " and ".join(found), "Give the file that belongs to this model.")
    for name, entry in wanted.items():
        if entry.shape != there[name].shape:
            raise ModelError(
                asked,
                f"{name} is {list(there[name].shape)} in the file and {list(entry.shape)} in the model",
                "Give the file that belongs to this model.",
            )
        if dtypes and entry.dtype != there[name].dtype:
            raise ModelError(
                asked,
                f"{name} is {_dtype(there[name].dtype)} in the file and {_dtype(entry.dtype)} in the model",
                "Build the model in the dtype of the file, or convert the file.",
            )


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_ours(folder: Path) -> bool:
    """Whether a folder was saved by secateur: a real folder with a real secateur.json in it."""
    record = folder / RECORD
    return folder.is_dir() and not folder.is_symlink() and record.is_file() and not record.is_symlink()


def check_saved(folder: Path) -> dict[str, Any]:
    """The contents of secateur.json, after checking every file of a saved folder against it.

    Raises ModelError for links, pickles, code, names that lead elsewhere, altered or missing files, and records of
    a newer version.
    """
    asked = f"the saved model {folder} was to be read"
    if not is_ours(folder):
        raise ModelError(asked, f"it has no {RECORD}", "Give a folder that secateur saved, or open it with open_model.")
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ModelError(
                asked, f"{path.name} is a link to {path.readlink()}", "Copy the file itself into the folder."
            )
        if path.suffix.lower() in PICKLES:
            raise ModelError(asked, f"it holds {path.name}, which can run code when read", "Take that file away.")
        if path.suffix.lower() in CODE or path.name == "adapter_config.json":
            raise ModelError(
                asked, f"it holds {path.name}, which no saved model needs", "Take that file away: code is never run."
            )
    about = read_json(folder / RECORD)
    schema, saved = about.get("schema"), about.get("saved")
    version = saved.get("format") if isinstance(saved, dict) else None
    if not isinstance(schema, int) or not isinstance(version, int) or not isinstance(about.get("files"), dict):
        raise ModelError(asked, f"its {RECORD} is not that of a saved model", "Save the model again.")
    if schema > SCHEMA_VERSION or version > FORMAT:
        raise ModelError(
            asked,
            f"it was written in version {schema}.{version}, and this secateur reads up to {SCHEMA_VERSION}.{FORMAT}",
            "Upgrade secateur.",
        )
    for name, digest in about["files"].items():
        path = folder / plain_name(name, f"{RECORD} of {folder}")
        if not path.is_file():
            raise ModelError(asked, f"{name} is missing", "Copy the whole folder again.")
        if name != CARD and sha256(path) != digest:
            raise ModelError(
                asked, f"{name} is not the file that was saved: its sha256 differs", "Copy the folder again."
            )
    weights = "model.onnx" if isinstance(saved, dict) and saved.get("kind") == "onnx" else "model.safetensors"
    for name in (weights, "edits.safetensors"):
        if name not in about["files"]:
            raise ModelError(asked, f"its {RECORD} does not list {name}", "Save the model again.")
    return about


def fingerprint(folder: str | Path) -> str:
    """A short hash of a folder of ours, or of any folder's files by name and content.

    The record itself is left out, as it holds times and machines.
    """
    place = Path(folder)
    digest = hashlib.sha256()
    for path in sorted(p for p in place.rglob("*") if p.is_file() and not p.is_symlink() and p.name != RECORD):
        digest.update(f"{path.relative_to(place).as_posix()}\0{sha256(path)}\n".encode())
    return digest.hexdigest()[:16]
