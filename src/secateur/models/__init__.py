"""Opening and saving the models people have."""

from secateur.models.folder import fingerprint
from secateur.models.inspecting import inspect_file
from secateur.models.loading import load, load_edits
from secateur.models.opening import NAMES, Opened, load_checkpoint_, open_model
from secateur.models.saving import index_maps, save, save_onnx

__all__ = [
    "NAMES",
    "Opened",
    "fingerprint",
    "index_maps",
    "inspect_file",
    "load",
    "load_checkpoint_",
    "load_edits",
    "open_model",
    "save",
    "save_onnx",
]
