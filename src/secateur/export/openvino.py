"""A folder for Intel's run-time: the ONNX graph, read and written again in its own form.

Any shape goes. Without a hint OpenVINO computes in bfloat16 on processors that have it, so that answers are compared,
and users who want the same numbers should ask, with INFERENCE_PRECISION_HINT=f32.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.export import onnx
from secateur.export.exporting import missing
from secateur.models import Opened

GRAPH = "openvino_model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}
"""How to compile the model for what torch computes: nothing rounded to bfloat16, or to 8 bits, on the way."""


@dataclass(frozen=True)
class Form:
    """The export to OpenVINO."""

    suffix: str = "-openvino"

    def need(self) -> None:
        """See Target. The run-time is what writes the form, too."""
        onnx.Form().need()
        _openvino()

    def runtime(self) -> str:
        """See Target."""
        return f"OpenVINO {_openvino().__version__.partition('-')[0]}"

    def why_not(self, model: nn.Module) -> str:
        """See Target. What the graph it is made from holds, it holds."""
        return onnx.Form().why_not(model)

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """See Target. The tokenizer goes with it."""
        openvino = _openvino()
        path.mkdir()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            graph = Path(folder) / "model.onnx"
            notes = onnx.Form().write(opened, graph, probes)
            openvino.save_model(openvino.Core().read_model(str(graph)), str(path / GRAPH), compress_to_fp16=False)
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(str(path))
        exact = ", ".join(f"{key}={value}" for key, value in EXACT.items())
        notes = [note for note in notes if not note.startswith("ONNX Runtime")]
        return [*notes, f"for these answers compile with {exact}; the defaults round more"]

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """See Target."""
        model = _openvino().Core().compile_model(str(path / GRAPH), "CPU", EXACT)
        return [torch.from_numpy(model(onnx.arrays(opened.model, each))[0].copy()).float() for each in probes]

    def tolerance(self, path: Path) -> float:
        """See Target."""
        return onnx.Form().tolerance(path)


def _openvino() -> Any:
    try:
        import openvino  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise missing("openvino", "openvino", "a model was to be written for OpenVINO") from error
    return openvino
