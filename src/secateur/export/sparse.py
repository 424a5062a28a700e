"""A file that is small because the model is sparse: where the numbers are, and the numbers that are not zero.

A safetensors file. A tensor NAME of rows [r, c] (its first axis by all the others) is kept in the way that takes the
fewest bytes, which its `__metadata__` names under "tensors", as JSON:

    dense    NAME itself
    bitmap   NAME.bitmap, a bit for each number in order, the lowest bit of a byte first; NAME.values, those marked
    nm       of each m in a row at most n: NAME.values [r, c / m * n] and NAME.places, 2 bits each (4 where m > 4)
    int8     with any of the three: values are int8, and NAME.scale [r] is what a row's are multiplied by

Every number comes back as it was; -0.0, which a mask makes of what was negative, as 0.

docs/guides/export.md has a reader of 50 lines that needs NumPy and nothing else.
"""

import copy
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import stored
from secateur.errors import ExportError, ModelError
from secateur.export.exporting import answer, in_float32
from secateur.formats import bits
from secateur.formats.nm import place_bits, places_of
from secateur.models import Opened, hf
from secateur.models.folder import Entry, few, header, refuse_pickle

FORMAT, VERSION = "secateur-sparse", "1"
GROUPS = ((1, 4), (2, 4), (1, 8), (2, 8), (4, 8))
"""The n:m that are looked for."""

_WIDE = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}
_CODES = {code: dtype for dtype, code in stored.CODES.items()}


@dataclass(frozen=True)
class Int8:
    """A matrix that is exactly whole numbers times a scale for each row."""

    values: Tensor  # [r, ...] int8
    scale: Tensor  # [r] float32; of experts in one tensor [experts, r]

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The matrix again."""
        return scaled(self.values, self.scale, dtype)


def scaled(values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers times their row's scale, in a dtype."""
    return (values.float() * scale.reshape(*scale.shape, *[1] * (values.ndim - scale.ndim))).to(dtype)


def int8_of(weight: Tensor) -> Int8 | None:
    """The 8-bit form a matrix was rounded to, found in its values alone; None for any other.

    Of three axes the first may be experts, each a matrix with rows of its own.
    Rounding to the weight's own dtype leaves an interval for the scale with each number, and what they have in common
    gives it back: the form is exact, or it is not given.
    """
    if not weight.is_floating_point() or weight.ndim < 2 or not weight.numel():
        return None
    for axes in (1, 2) if weight.ndim == 3 else (1,):  # that a row is one of
        rows = weight.detach().flatten(0, axes - 1).flatten(1)
        if _int8_rows(rows[:4].contiguous()) is None:  # most matrices are told by their first rows
            continue
        found = _int8_rows(rows.contiguous())
        if found is not None:
            return Int8(found[0].reshape(weight.shape), found[1].reshape(weight.shape[:axes]))
    return None


def _int8_rows(rows: Tensor) -> tuple[Tensor, Tensor] | None:
    if not bool(torch.isfinite(rows).all()) or not bool(rows.any()):
        return None
    size = rows.double().abs()
    largest = size.amax(1, keepdim=True)
    guess = torch.where(largest > 0, largest, 1.0) / 127
    levels = (size / guess).round()
    bits = rows.abs().view(_WIDE[rows.element_size()])
    above, below = ((bits + step).clamp(min=0).view(rows.dtype).double() for step in (1, -1))
    some = levels > 0
    least = torch.where(some, (size + below) / 2 / levels.clamp(min=1), 0.0).amax(1)
    most = torch.where(some, (size + above) / 2 / levels.clamp(min=1), math.inf).amin(1)
    scale = torch.where(torch.isfinite(most), (least + most) / 2, 0.0).float()
    values = (levels * rows.double().sign()).to(torch.int8)
    return (values, scale) if torch.equal(scaled(values, scale, rows.dtype), rows) else None


def packed(name: str, value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A tensor in the form that takes the fewest bytes, and what the file says of it."""
    value = value.detach().cpu().contiguous()
    about: dict[str, Any] = {"shape": list(value.shape), "dtype": stored.CODES[value.dtype]}
    found, extra = int8_of(value), dict[str, Tensor]()
    if found is not None:
        extra[f"{name}.scale"], about["int8"] = found.scale, True
        value = found.values
    rows = value.flatten(1) if value.ndim > 1 else value.reshape(1, -1)
    if not value.numel() or value.dtype == torch.bool:
        return extra | {name: value}, about | {"layout": "dense"}
    there = rows != 0
    each, count = value.element_size(), int(there.sum())
    sizes: dict[tuple[str, int, int], int] = {
        ("nm", n, m): value.numel() // m * n * each + math.ceil(value.numel() // m * n * place_bits(m) / 8)
        for n, m in GROUPS
        if _fits(there, n, m)
    }
    sizes[("bitmap", 0, 0)] = count * each + math.ceil(value.numel() / 8)
    sizes[("dense", 0, 0)] = value.numel() * each
    layout, n, m = min(sizes, key=lambda key: sizes[key])
    about["layout"] = layout
    if layout == "dense":
        return extra | {name: value}, about
    if layout == "bitmap":
        made = {f"{name}.bitmap": bits.written(there.reshape(-1), 1), f"{name}.values": rows[there]}
        return extra | made, about
    places, values = _grouped(rows, there, n, m)
    made = {f"{name}.values": values, f"{name}.places": bits.written(places.reshape(-1), place_bits(m))}
    return extra | made, about | {"n": n, "m": m}


def _fits(there: Tensor, n: int, m: int) -> bool:
    return there.shape[1] % m == 0 and int(there.reshape(-1, m).sum(1).max()) <= n


def _grouped(rows: Tensor, there: Tensor, n: int, m: int) -> tuple[Tensor, Tensor]:
    """The place in its group of each number that is kept, in order, and the numbers: [r, c / m * n] both."""
    groups = there.reshape(rows.shape[0], -1, m)
    order = places_of(groups, n).sort(dim=2).values
    values = rows.reshape(groups.shape).gather(2, order)
    return order.flatten(1), values.flatten(1)


def write(values: Mapping[str, Tensor], path: Path, about: Mapping[str, str] | None = None) -> dict[str, str]:
    """Write tensors to a sparse file; returns tensor -> layout. `about` goes to the metadata as it is."""
    tensors: dict[str, Tensor] = {}
    said: dict[str, Any] = {}
    for name, value in values.items():
        made, said[name] = packed(name, value)
        tensors |= made
    metadata = {**(about or {}), "format": FORMAT, "version": VERSION, "tensors": json.dumps(said)}
    stored.write(tensors, path, metadata)
    return {
        name: ("int8 " if each.get("int8") else "") + (f"{each['n']}:{each['m']}" if "n" in each else each["layout"])
        for name, each in said.items()
    }


def is_sparse(path: Path) -> bool:
    """Whether a safetensors file is one of this layout."""
    return _metadata(path).get("format") == FORMAT


def read(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a sparse file as it was, in its shape and dtype.

    Raises ModelError for a file that is not whole, is of another version, or whose marks and values do not agree.
    """
    from safetensors import safe_open

    place = Path(path)
    there, metadata = header(place), _metadata(place)
    said = _said(place, metadata)
    _account(place, said, there)
    with safe_open(str(place), framework="pt") as file:
        return {name: _dense(place, name, each, file.get_tensor) for name, each in said.items()}


def _metadata(path: Path) -> dict[str, str]:
    from safetensors import SafetensorError, safe_open

    refuse_pickle(path)
    try:
        with safe_open(str(path), framework="np") as file:
            return dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError) as error:
        raise ModelError(
            f"tensors were to be read from {path}", f"it is not a whole safetensors file: {error}", "Copy it again."
        ) from error


def _said(path: Path, metadata: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    asked = f"{path} was to be read as a sparse file"
    if metadata.get("format") != FORMAT:
        raise ModelError(
            asked,
            f"its format is {metadata.get('format')!r}, not {FORMAT!r}",
            "Give a file made by `secateur export DIR --to sparse`; any other safetensors file is dense already.",
        )
    if metadata.get("version") != VERSION:
        raise ModelError(
            asked,
            f"it is of version {metadata.get('version')!r}, and this secateur reads version {VERSION}",
            "Upgrade secateur, or densify it where it was made.",
        )
    try:
        said = json.loads(metadata.get("tensors", ""))
    except (ValueError, RecursionError):
        said = None
    if not isinstance(said, dict) or not all(_well_said(each) for each in said.values()):
        raise ModelError(asked, "what it says of its tensors cannot be understood", "Get the file again.")
    return said


def _well_said(each: object) -> bool:
    if not isinstance(each, dict):
        return False
    shape, n, m = each.get("shape"), each.get("n"), each.get("m")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < 2**40 for size in shape)
    if not sizes or each.get("dtype") not in _CODES or each.get("int8", True) is not True:
        return False
    if each.get("layout") == "nm":
        return type(n) is int and type(m) is int and 0 < n <= m <= 16
    return each.get("layout") in ("dense", "bitmap")


def _parts(name: str, each: Mapping[str, Any], scales: tuple[int, ...]) -> dict[str, Entry]:
    """The tensors that one is kept in: shape and dtype of each, -1 where any length may be."""
    shape = each["shape"]
    total = math.prod(shape)
    rows = shape[0] if len(shape) > 1 else 1
    kept = torch.int8 if each.get("int8") else _CODES[each["dtype"]]
    wanted = {f"{name}.scale": Entry(scales, torch.float32)} if each.get("int8") else {}
    if each["layout"] == "dense":
        return wanted | {name: Entry(tuple(shape), kept)}
    if each["layout"] == "bitmap":
        marks = Entry((math.ceil(total / 8),), torch.uint8)
        return wanted | {f"{name}.bitmap": marks, f"{name}.values": Entry((-1,), kept)}
    n, m = each["n"], each["m"]
    count = total // m * n
    wide = count // rows if rows else 0
    places = Entry((math.ceil(count * place_bits(m) / 8),), torch.uint8)
    return wanted | {f"{name}.values": Entry((rows, wide), kept), f"{name}.places": places}


def _account(path: Path, said: Mapping[str, Mapping[str, Any]], there: Mapping[str, Entry]) -> None:
    """Raise ModelError, before any memory is taken, unless the file holds exactly what it says it does."""
    wanted: dict[str, Entry] = {}
    for name, each in said.items():
        cols = math.prod(each["shape"][1:]) if len(each["shape"]) > 1 else math.prod(each["shape"])
        if each["layout"] == "nm" and (cols % each["m"] or not each["shape"]):
            _refuse(path, name, f"its rows of {cols} are no whole number of groups of {each['m']}")
        scale = there.get(f"{name}.scale")
        axes = 2 if scale is not None and len(scale.shape) == 2 and len(each["shape"]) == 3 else 1  # experts, or not
        parts = _parts(name, each, tuple(each["shape"][:axes]) if len(each["shape"]) > 1 else (1,))
        if parts.keys() & wanted.keys():
            _refuse(path, name, "two tensors are kept under one name")
        wanted |= parts
    for name in sorted(wanted.keys() | there.keys()):
        if name not in there or name not in wanted:
            _refuse(path, name, "it is missing" if name in wanted else "nothing is said of it")
        shape, found = wanted[name].shape, there[name].shape
        fits = len(shape) == len(found) and all(a in (-1, b) for a, b in zip(shape, found, strict=True))
        if not fits or wanted[name].dtype != there[name].dtype:
            is_, was = (f"{str(e.dtype).removeprefix('torch.')} {list(e.shape)}" for e in (there[name], wanted[name]))
            _refuse(path, name, f"it is {is_} where {was} is said")


def _refuse(path: Path, name: str, why: str) -> None:
    raise ModelError(f"{name} was to be read from {path}", why, "The file is damaged: get it again.")


def _dense(path: Path, name: str, each: Mapping[str, Any], get: Any) -> Tensor:
    shape, dtype = each["shape"], _CODES[each["dtype"]]
    total = math.prod(shape)
    if each["layout"] == "dense":
        value = get(name).clone()  # not the file itself, which may be written anew
    elif each["layout"] == "bitmap":
        marks = bits.read(get(f"{name}.bitmap"), 1)[:total].bool()
        kept = get(f"{name}.values")
        if int(marks.sum()) != kept.numel():
            _refuse(path, name, f"its bitmap marks {int(marks.sum()):,} numbers and {kept.numel():,} are there")
        value = torch.zeros(total, dtype=kept.dtype)
        value[marks] = kept
    else:
        kept, n, m = get(f"{name}.values"), each["n"], each["m"]
        places = bits.read(get(f"{name}.places"), place_bits(m))[: kept.numel()].long().reshape(-1, n)
        if places.numel() and (int(places.max()) >= m or bool((places.diff(dim=1) <= 0).any())):
            _refuse(path, name, f"the places in its groups of {m} do not rise")
        value = torch.zeros(total // m, m, dtype=kept.dtype).scatter_(1, places, kept.reshape(-1, n))
    value = value.reshape(shape)
    return scaled(value, get(f"{name}.scale"), dtype) if each.get("int8") else value


@dataclass(frozen=True)
class Form:
    """The export: every tensor of a model, read back and compared number by number."""

    suffix: str = ".sparse.safetensors"

    def need(self) -> None:
        """See Target."""

    def runtime(self) -> str:
        """See Target."""
        return f"secateur's reader of sparse files, version {VERSION}"

    def why_not(self, model: nn.Module) -> str:
        """See Target. Any tensors will do whose dtype the file has a name for."""
        odd = [(name, value.dtype) for name, value in hf.stored(model).items() if value.dtype not in stored.CODES]
        return f"{odd[0][0]} is {odd[0][1]}, and the file holds {', '.join(_CODES)}" if odd else ""

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """See Target. The config goes with it, so that the file says which network it belongs to."""
        about = {"config": json.dumps(dict(opened.config), default=str)} if opened.config else {}
        counts = Counter(write(hf.stored(opened.model), path, about).values())
        return [f"{many} tensors are kept {layout}" for layout, many in sorted(counts.items())]

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """See Target. Of the model with the tensors read back, which must be the same number by number."""
        values, back = hf.stored(opened.model), read(path)
        wrong = [name for name, value in values.items() if not torch.equal(back[name], value)]
        if wrong or back.keys() != values.keys():
            raise ExportError(
                f"{opened.source} was to be written to a sparse file",
                f"{len(wrong)} tensors do not read back as they were ({few(wrong)})",
                "Report this, with the recipe of the model.",
            )
        fresh = copy.deepcopy(opened.model)
        hf.fill_(fresh, back, hf.aliases_of(opened.model))
        fresh = in_float32(fresh)
        return [answer(fresh, each).cpu() for each in probes]

    def tolerance(self, path: Path) -> float:
        """See Target."""
        return 0.0


def densify(path: str | Path, out: str | Path) -> int:
    """Write a sparse file's tensors as a plain safetensors file, which everybody reads; returns its bytes."""
    values = read(path)
    kept = {k: v for k, v in _metadata(Path(path)).items() if k not in ("format", "version", "tensors")}
    target = Path(out)
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        stored.write(values, partial, {**kept, "format": "pt"})
        partial.replace(target)
    except OSError as error:
        raise ModelError(
            f"{target} was to be written",
            f"the disk refused: {error.strerror or error}",
            "Make room, or write elsewhere.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return target.stat().st_size


__all__ = ["Int8", "densify", "int8_of", "is_sparse", "packed", "read", "scaled", "write"]
