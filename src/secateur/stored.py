"""Tensors in a safetensors file, written one after the other: what is written need not be in memory twice."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

CODES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""What the format calls a dtype."""

ALIGN = 64  # bytes that the data starts at a multiple of


def preface(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], about: Mapping[str, str]) -> bytes:
    """All that stands before the tensors in a file: where each is, in the order given, and what they are."""
    rows: dict[str, object] = {"__metadata__": dict(about)}
    at = 0
    for name, (shape, dtype) in shapes.items():
        size = dtype.itemsize * torch.Size(shape).numel()
        rows[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    return len(text).to_bytes(8, "little") + text


def write(values: Mapping[str, Tensor], path: Path, about: Mapping[str, str]) -> None:
    """Write tensors to a file that any reader of safetensors takes."""
    # The widest first: each then starts at a multiple of what one of its elements takes.
    order = sorted(values, key=lambda name: -values[name].element_size())
    with path.open("wb") as file:
        file.write(preface({name: (tuple(values[name].shape), values[name].dtype) for name in order}, about))
        for name in order:
            flat = values[name].detach().cpu().contiguous().reshape(-1)
            if flat.numel():
                file.write(flat.view(torch.uint8).numpy().data)
