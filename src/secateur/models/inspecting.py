"""Looking into a file or a folder of weights: shapes, dtypes, zeros and bytes, tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.errors import ModelError
from secateur.models.folder import RECORD, fingerprint, header, is_ours, plain_name, read_json, refuse_pickle


def inspect_file(path: str | Path) -> dict[str, Any]:
    """What a safetensors, GGUF or ONNX file, or a folder of them, holds.

    Returns `format`, `tensors` (each with name, shape, dtype, bytes and the fraction of zeros), their totals, the
    file's `metadata`, and for a folder of ours the record's `saved` part and a `fingerprint`. Reads one tensor at a
    time. Raises ModelError for anything else.
    """
    place = Path(path)
    if place.is_dir():
        return _folder(place)
    if place.is_file() and place.suffix.lower() == ".gguf":
        return _gguf(place)
    if place.is_file() and place.suffix.lower() == ".onnx":
        return _onnx(place)
    if place.is_file():
        return _summed("safetensors", place, list(_safetensors(place)), _metadata(place))
    raise ModelError(f"{path} was to be inspected", "there is no such file or folder", "Check the path.")


def _folder(folder: Path) -> dict[str, Any]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        files = [folder / "model.safetensors"]
    elif index.exists():
        names = read_json(index).get("weight_map", {})
        files = [folder / plain_name(n, str(index)) for n in sorted(set(map(str, names.values())))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files and (folder / "model.onnx").exists():
        return _onnx(folder / "model.onnx") | ({"fingerprint": fingerprint(folder)} if is_ours(folder) else {})
    if not files:
        raise ModelError(
            f"{folder} was to be inspected", "it holds no safetensors file", "Give a folder or a file of weights."
        )
    rows = [row for file in files for row in _safetensors(file)]
    found = _summed("folder", folder, rows, _metadata(files[0]))
    if is_ours(folder):
        about = read_json(folder / RECORD)
        found |= {key: about.get(key) for key in ("saved", "method", "settings", "files", "secateur", "created")}
        found["format"] = "secateur"
    return found | {"fingerprint": fingerprint(folder)}


def _summed(kind: str, path: Path, rows: list[dict[str, Any]], metadata: dict[str, Any]) -> dict[str, Any]:
    elements = sum(r["elements"] for r in rows)
    zeros = sum(r["zeros"] * r["elements"] for r in rows)
    return {
        "path": str(path),
        "format": kind,
        "parameters": elements,
        "zeros": zeros / elements if elements else 0.0,
        "bytes": sum(r["bytes"] for r in rows),
        "metadata": metadata,
        "tensors": rows,
    }


def _metadata(path: Path) -> dict[str, Any]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        found = dict(file.metadata() or {})
    return {k: v if len(v) <= 2000 else f"({len(v):,} characters)" for k, v in found.items()}


def _safetensors(path: Path) -> Iterator[dict[str, Any]]:
    from safetensors import safe_open

    entries = header(path)
    with safe_open(str(path), framework="pt") as file:
        for name, entry in entries.items():
            value = file.get_tensor(name)
            wide = value if value.element_size() > 1 or not value.is_floating_point() else value.float()
            yield {
                "name": name,
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "elements": entry.elements,
                "bytes": entry.elements * value.element_size(),
                "zeros": float((wide == 0).sum()) / max(1, entry.elements),
            }


def _onnx(path: Path) -> dict[str, Any]:
    from secateur.models import onnx

    found = onnx.read(path)
    rows = []
    for name, value in onnx.weights(found).items():
        rows.append(
            {
                "name": name,
                "shape": list(value.shape),
                "dtype": str(value.dtype),
                "elements": int(value.size),
                "bytes": int(value.nbytes),
                "zeros": int((value == 0).sum()) / max(1, int(value.size)),
            }
        )
    versions = {o.domain or "ai.onnx": int(o.version) for o in found.opset_import}
    kinds: dict[str, int] = {}
    for node in found.graph.node:
        kinds[node.op_type] = kinds.get(node.op_type, 0) + 1
    about = {"opset": versions, "producer": found.producer_name, "nodes": dict(sorted(kinds.items()))}
    return _summed("onnx", path, rows, about | {e.key: e.value for e in found.metadata_props})


def _gguf(path: Path) -> dict[str, Any]:
    refuse_pickle(path)
    try:
        import gguf
    except ImportError as error:
        raise ModelError(
            f"{path} was to be inspected", "the gguf package is not installed", "pip install 'secateur[gguf]'"
        ) from error
    try:
        rows, about = _read_gguf(gguf, gguf.GGUFReader(str(path)))
    except Exception as error:  # whatever gguf raises for a file that is cut off, or was never one
        raise ModelError(
            f"{path} was to be inspected",
            f"it is not a whole GGUF file: {error or type(error).__name__}",
            "Get it again.",
        ) from error
    return _summed("gguf", path, rows, about)


def _read_gguf(gguf: Any, reader: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    rows = []
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        rows.append(
            {
                "name": tensor.name,
                "shape": [int(n) for n in reversed(tensor.shape)],  # GGUF writes inputs first
                "dtype": tensor.tensor_type.name,
                "elements": int(tensor.n_elements),
                "bytes": int(tensor.n_bytes),
                "zeros": int((values == 0).sum()) / max(1, int(tensor.n_elements)),
            }
        )
    about = {}
    for name, field in reader.fields.items():
        value = field.contents()
        about[name] = f"({len(value):,} entries)" if isinstance(value, list) and len(value) > 16 else value
    return rows, about
