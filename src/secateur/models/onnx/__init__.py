"""ONNX files of any framework: read as a module, cut like one, written again."""

from pathlib import Path

from secateur.errors import ModelError
from secateur.models.onnx.network import Network
from secateur.models.onnx.reading import read, weights
from secateur.models.onnx.writing import answers, difference, run, write

MARK = "secateur"
"""The key of a file's metadata that says secateur wrote it."""

__all__ = ["MARK", "Network", "answers", "difference", "is_ours", "load", "read", "run", "weights", "write"]


def load(path: str | Path) -> Network:
    """The network in a file, in evaluation. Raises ModelError for one that cannot be read whole."""
    network = Network(read(path))
    network.eval()
    return network


def is_ours(path: str | Path) -> bool:
    """Whether secateur wrote an ONNX file."""
    try:
        found = read(path)
    except ModelError:
        return False
    return any(entry.key == MARK for entry in found.metadata_props)
