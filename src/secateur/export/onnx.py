"""A graph for ONNX Runtime: any shape goes, since a cut network is as plain as one that was built so.

Traced by torch, with batch and tokens left open. What was rounded to 8 bits is kept in 8 bits: the matrix becomes
int8 numbers, a scale a row, and a DequantizeLinear before its use.
"""

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export.exporting import in_float32, missing
from secateur.export.sparse import int8_of
from secateur.models import Opened, hf, pipelines

OPSET = 18
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
"""What to put in a session's options so that 8-bit matrices are multiplied with float32, as they are by torch."""

LARGE = 2**16
"""Numbers from which a matrix is worth keeping once when it is there twice."""

LARGEST = 2**31 - 2**20
"""What one ONNX file may hold, in bytes, less some for the graph itself."""


class Told(nn.Module):
    """A model of transformers as a function of tensors in order: no cache, no dictionaries, one answer."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        """The logits, or the last hidden state where there are none."""
        out = self.model(**dict(zip(self.names, values, strict=True)), **self._options())
        found = getattr(out, "logits", None)
        if found is None:
            found = getattr(out, "last_hidden_state", None)
        return out[0] if found is None else found

    def _options(self) -> dict[str, Any]:
        return {"use_cache": False} if getattr(self.model.config, "use_cache", False) else {}


@dataclass(frozen=True)
class Form:
    """The export to ONNX."""

    suffix: str = ".onnx"

    def need(self) -> None:
        """See Target."""
        _onnx()

    def runtime(self) -> str:
        """See Target."""
        _runtime()
        return f"ONNX Runtime {metadata.version('onnxruntime')}"

    def why_not(self, model: nn.Module) -> str:
        """See Target. Any shape goes; two gigabytes are the most that one file holds."""
        if isinstance(model, pipelines.Pipeline):
            return "it is a pipeline of several models"
        held = sum(p.numel() * 4 for p in model.parameters())
        if held > LARGEST:
            return f"its weights are {held / 1e9:.1f} GB in float32, and an ONNX file holds 2.1 GB at most"
        return ""

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """See Target."""
        model, notes = opened.model, []
        kept = next(model.parameters()).dtype
        if kept != torch.float32:
            notes.append(f"the weights are {str(kept).removeprefix('torch.')} and are written as float32")
        int8 = {
            name: found
            for name, value in hf.stored(model).items()
            if (found := int8_of(value)) is not None and found.scale.ndim == 1  # one axis is all a graph's scales have
        }
        _trace(model, path, _masked(model, probes[1]))
        if int8:
            smaller = _keep_int8(path, [found.dense(kept).float() for found in int8.values()], [*int8.values()])
            notes.append(f"{smaller} matrices are kept in 8 bits with a scale a row")
            notes.append("ONNX Runtime rounds what they are multiplied with to 8 bits too: for these answers, set "
                         f"{EXACT[0]} to {EXACT[1]} in the session's options")  # fmt: skip
        _keep_once(path)
        return notes

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """See Target."""
        options = _runtime().SessionOptions()
        options.log_severity_level = 4
        options.add_session_config_entry(*EXACT)
        session = _runtime().InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        return [torch.from_numpy(session.run(None, arrays(opened.model, each))[0]).float() for each in probes]

    def tolerance(self, path: Path) -> float:
        """See Target. float32 throughout: another order of summation; the model's own half precision."""
        return 1e-3


def arrays(model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, Any]:
    """A small input as the graph takes it."""
    return {name: value.numpy() for name, value in _masked(model, probe).items()}


def _masked(model: nn.Module, probe: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Text with its attention mask, as every user of such a graph gives it, and as lets it be traced."""
    if hf.is_hf(model) and "input_ids" in probe and "decoder_input_ids" not in probe and "pixel_values" not in probe:
        return {**probe, "attention_mask": torch.ones_like(probe["input_ids"])}
    return dict(probe)


def _trace(model: nn.Module, path: Path, probe: Mapping[str, Tensor]) -> None:
    work = in_float32(model)
    values = tuple(probe.values())
    told = Told(work, [*probe]) if hf.is_hf(model) else work
    axes = {n: {0: "batch"} | ({1: "tokens"} if not v.is_floating_point() else {}) for n, v in probe.items()}
    text = any(not v.is_floating_point() for v in values)
    out = "logits" if text else "output"
    with torch.no_grad():
        shape = told(*values).shape
    axes[out] = {0: "batch"} | ({1: "tokens"} if text and len(shape) > 2 else {})
    try:
        with torch.no_grad(), _silence(), _experts_traceable(work):
            torch.onnx.export(
                told, values, str(path), input_names=[*probe], output_names=[out], dynamic_axes=axes,
                opset_version=OPSET, dynamo=False,
            )  # fmt: skip
    except Exception as error:  # whatever the tracer raises for what it cannot follow
        raise ExportError(
            f"{type(model).__name__} was to be traced",
            f"torch.onnx says: {hf.one_line(error)}",
            "Export the parts of it that are plain tensors to tensors.",
        ) from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """The tracer warns of every shape it reads, and prints whole graphs when it fails."""
    level = logging.getLogger("torch.onnx").level
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _nowhere():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.getLogger("torch.onnx").setLevel(level)


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """What is written past Python to its standard output is dropped: the graph at a failure, told to say so or not."""
    try:
        kept = os.dup(1)
    except OSError:  # it is closed
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


@contextlib.contextmanager
def _experts_traceable(model: nn.Module) -> Iterator[None]:
    """Experts as products of batches while it lasts: transformers' other ways sort tokens, which no graph has."""
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    kept = [(c, c._experts_implementation) for c in configs if hasattr(c, "_experts_implementation")]
    for config, _ in kept:
        config._experts_implementation = "batched_mm"
    try:
        yield
    finally:
        for config, way in kept:
            config._experts_implementation = way


def _keep_int8(path: Path, dense: Sequence[Tensor], packed: Sequence[Any]) -> int:
    """Put the 8-bit form of matrices where a graph has them written out, found by their values; returns how many."""
    onnx = _onnx()
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    known = {(tuple(v.shape), v.sum(dtype=torch.float64).item()): (v, p) for v, p in zip(dense, packed, strict=True)}
    nodes, done = [], 0
    for constant in list(graph.initializer):
        if len(constant.dims) < 2 or constant.data_type != onnx.TensorProto.FLOAT:
            continue
        value = torch.from_numpy(numpy_helper.to_array(constant).copy())
        for axis, seen in ((0, value), (1, value.t() if value.ndim == 2 else value)):
            found = known.get((tuple(seen.shape), seen.sum(dtype=torch.float64).item()))
            if found is None or not torch.equal(found[0], seen):
                continue
            numbers = found[1].values if axis == 0 else found[1].values.t().contiguous()
            name = constant.name
            graph.initializer.remove(constant)
            graph.initializer.append(numpy_helper.from_array(numbers.numpy(), f"{name}.int8"))
            graph.initializer.append(numpy_helper.from_array(found[1].scale.numpy(), f"{name}.scale"))
            nodes.append(helper.make_node("DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=axis))
            done += 1
            break
    for node in reversed(nodes):
        graph.node.insert(0, node)
    onnx.save(model, str(path))
    return done


def _keep_once(path: Path) -> None:
    """Keep a large matrix once where a graph has it as it is and turned, as an embedding that is tied to the head.

    The tracer writes both out. A run-time turns it when it loads the graph, and not again.
    """
    onnx = _onnx()
    from onnx import helper, numpy_helper

    model = onnx.load(str(path))
    graph = model.graph
    large = [c for c in graph.initializer if len(c.dims) == 2 and c.dims[0] * c.dims[1] >= LARGE]
    first: dict[tuple[int, int, int], list[tuple[str, Any]]] = {}
    nodes = []
    for constant in large:
        rows, columns = constant.dims
        turned = first.get((constant.data_type, columns, rows), [])
        value = numpy_helper.to_array(constant)
        name = next((n for n, o in turned if (value[0] == o[:, 0]).all() and (value == o.T).all()), None)
        if name is None:
            first.setdefault((constant.data_type, rows, columns), []).append((constant.name, value))
            continue
        nodes.append(helper.make_node("Transpose", [name], [constant.name], perm=[1, 0]))
        graph.initializer.remove(constant)
    if nodes:
        for node in reversed(nodes):
            graph.node.insert(0, node)
        onnx.save(model, str(path))


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise missing("onnx", "onnx", "an ONNX graph was to be written") from error
    return onnx


def _runtime() -> Any:
    try:
        import onnxruntime  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise missing("onnxruntime", "onnx", "an ONNX graph was to be tried in ONNX Runtime") from error
    return onnxruntime
