"""A folder of a stock transformers model, and nothing else in it: config, safetensors, tokenizer.

Uniform cuts go: the same width in every layer, fewer layers, heads or experts change numbers of the config and no
more. Layers of different widths do not, as stock classes build every layer from one number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export.exporting import in_float32
from secateur.models import Opened, hf
from secateur.models.folder import read_json
from secateur.models.loading import from_folder
from secateur.models.saving import stock


@dataclass(frozen=True)
class Form:
    """The export to transformers."""

    suffix: str = "-hf"

    def need(self) -> None:
        """See Target."""
        hf.transformers()

    def runtime(self) -> str:
        """See Target."""
        return f"transformers {hf.transformers().__version__}"

    def why_not(self, model: nn.Module) -> str:
        """See Target. The shapes are tried when the folder is written, where a config is looked for that has them."""
        if not hf.is_hf(model):
            return f"{type(model).__name__} is no class of transformers"
        return ""

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """See Target."""
        path.mkdir()
        config, why, _ = stock(path, opened.model, opened)
        if config is None:
            raise ExportError(
                f"{opened.source} was to be exported to a folder for transformers",
                f"stock transformers has no such model: {why}",
                "Cut every layer alike (`secateur prune --serve hf`), load it with secateur.models.load, or export it "
                "to gguf, onnx or openvino, which take layers of different widths.",
            )
        if opened.tokenizer is not None:
            opened.tokenizer.save_pretrained(str(path))
        return []

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """See Target."""
        config = hf.config_from(read_json(path / "config.json"), path)
        kind = hf.class_for(config, path)
        model = from_folder(kind, config, path, getattr(config, "dtype", None) or torch.float32)
        return [hf.answer(in_float32(model), each) for each in probes]

    def tolerance(self, path: Path) -> float:
        """See Target. The same numbers in the same classes; a rounded rotary table may cost a little."""
        return 1e-3
