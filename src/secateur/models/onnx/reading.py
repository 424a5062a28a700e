"""Reading an ONNX file: whole, in a version and with operators that are known, or not at all.

Nothing in a file is run before it was checked, and no file beside it is read but the data it says is its own.
"""

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from secateur.errors import ModelError
from secateur.models.onnx.operators import Node

OLDEST = 7  # before it, broadcasting and batch norms had another meaning
STANDARD = ("", "ai.onnx")


def packages(asked: str) -> tuple[Any, Any]:
    """onnx and onnxruntime. Raises ModelError when one is not installed."""
    missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise ModelError(asked, f"{' and '.join(missing)} is not installed", "pip install 'secateur[onnx]'")
    import onnx
    import onnxruntime

    return onnx, onnxruntime


def read(path: str | Path) -> Any:
    """The graph in a file, with the data that lies beside it, as an onnx.ModelProto.

    Raises ModelError for a file that is no ONNX, whose data is missing, of a version that is too old or too new, and
    for nodes that are not known, by name.
    """
    place = Path(path)
    asked = f"{path} was to be opened"
    onnx, runtime = packages(asked)
    try:
        found = onnx.load(str(place), load_external_data=False)
    except Exception as error:  # protobuf's own class for what it cannot decode differs by version
        raise ModelError(asked, f"it is not a whole ONNX file: {_line(error)}", "Get it again.") from error
    if not found.graph.node:
        raise ModelError(asked, "it is not a whole ONNX file: its graph has no nodes", "Get it again.")
    _check_data(onnx, found, place, asked)
    onnx.load_external_data_for_model(found, str(place.parent))
    _check_version(onnx, found, asked)
    if found.functions:
        found = onnx.inliner.inline_local_functions(found)
    _check_nodes(onnx, runtime, found, asked)
    try:
        onnx.checker.check_model(found)
    except Exception as error:  # the checker's own class, or protobuf's for a file too large
        raise ModelError(asked, f"onnx.checker says: {_line(error)}", "Export the network again.") from error
    return found


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__)[:300]


def _check_data(onnx: Any, found: Any, place: Path, asked: str) -> None:
    """Raise ModelError where tensors lie in a file that is not there, is too short, or is elsewhere."""
    for tensor in _external(onnx, found):
        about = {entry.key: entry.value for entry in tensor.external_data}
        name = about.get("location", "")
        if not name or Path(name).is_absolute() or ".." in Path(name).parts:
            raise ModelError(
                asked, f"{tensor.name} lies in {name!r}, which is not beside the file", "Save it with data beside it."
            )
        file = place.parent / name
        if not file.is_file():
            raise ModelError(
                asked,
                f"{tensor.name} and others lie in {name!r}, and there is no such file beside it",
                f"Put {name} into {place.resolve().parent}.",
            )
        end = int(about.get("offset", 0)) + int(about.get("length", 0))
        if file.stat().st_size < end:
            raise ModelError(
                asked,
                f"{name} has {file.stat().st_size:,} bytes, and {tensor.name} ends at {end:,}",
                f"Get {name} again.",
            )


def _external(onnx: Any, found: Any) -> Iterator[Any]:
    for tensor in found.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            yield tensor


def _check_version(onnx: Any, found: Any, asked: str) -> None:
    version = next((o.version for o in found.opset_import if o.domain in STANDARD), 0)
    newest = onnx.defs.onnx_opset_version()
    if version < OLDEST:
        raise ModelError(
            asked,
            f"it is of opset {version}, and the oldest that is read is {OLDEST}",
            "Export it with a newer opset, or convert it: onnx.version_converter.convert_version(model, 13).",
        )
    if version > newest:
        raise ModelError(
            asked, f"it is of opset {version}, and onnx {onnx.__version__} knows {newest}", "Install a newer onnx."
        )


def _check_nodes(onnx: Any, runtime: Any, found: Any, asked: str) -> None:
    """Raise ModelError for nodes that hold graphs of their own, and for those that nothing here can run."""
    unknown = []
    for node in found.graph.node:
        what = f"node {node.name or node.output[0]!r} is a {node.op_type}"
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS) for a in node.attribute):
            raise ModelError(
                asked,
                f"{what}, which holds a graph of its own",
                "Export the network without loops and branches (trace it, or give it inputs of fixed shape).",
            )
        if not (node.domain in STANDARD and onnx.defs.has(node.op_type)):
            unknown.append((node, what))
    if not unknown:
        return
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:  # some that the standard does not know are ONNX Runtime's own
        runtime.InferenceSession(found.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its own classes, one a cause
        node, what = unknown[0]
        more = f" (and {len(unknown) - 1} more)" if len(unknown) > 1 else ""
        raise ModelError(
            asked,
            f"{what} of the domain {node.domain!r}{more}, which neither ONNX nor ONNX Runtime knows",
            "Export the network with standard operators, or without this part.",
        ) from error


def nodes(found: Any) -> list[Node]:
    """The nodes of a graph, in order, with plain attributes."""
    from onnx import helper

    versions = {o.domain: o.version for o in found.opset_import}
    standard = versions.get("", versions.get("ai.onnx", 0))
    listed = []
    for index, node in enumerate(found.graph.node):
        kind = node.op_type if node.domain in STANDARD else f"{node.domain}.{node.op_type}"
        attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        name = node.name or next((o for o in node.output if o), f"node{index}")
        listed.append(Node(index, kind, name, tuple(node.input), tuple(node.output), attributes, standard))
    return listed


def weights(found: Any) -> dict[str, np.ndarray]:
    """The initialisers of a graph by name."""
    from onnx import numpy_helper

    return {t.name: numpy_helper.to_array(t) for t in found.graph.initializer}


def constants(found: Any, listed: list[Node]) -> dict[str, np.ndarray]:
    """Initialisers and Constant nodes by name."""
    values = weights(found)
    for node in listed:
        if node.kind == "Constant":
            values[node.outputs[0]] = _constant(node)
    return values


def _constant(node: Node) -> np.ndarray:
    from onnx import numpy_helper

    for name, value in node.attributes.items():
        if name == "value":
            return numpy_helper.to_array(value)
        if name in ("value_float", "value_floats"):
            return np.asarray(value, np.float32)
        if name in ("value_int", "value_ints"):
            return np.asarray(value, np.int64)
    raise ModelError(
        f"the constant {node.name!r} was to be read", "it is no tensor of numbers", "Export the network again."
    )
