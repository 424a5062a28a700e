"""Convolutions on machines this package is not built on: what its portable source reads and how it is compiled."""

import ctypes
import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from secateur import kernels
from secateur.errors import KernelError
from secateur.formats.conv import ANY, Pair, arranged
from secateur.formats.group_cols import GroupCols
from secateur.formats.packed import Packed

FOLDER = kernels.SOURCES / "portable"
PARTS = FOLDER / "convolutions.cpp", FOLDER / "depth_taps.cpp"
RUN = FOLDER / "run.mjs"
"""Answers a message with what WASM compiled, in Node."""

PLAIN = ("-std=c++17", "-O3", "-fno-math-errno")
AARCH64 = ("aarch64-linux-gnu-g++", *PLAIN, "-static")
WASM = (
    *("clang++", "--target=wasm32", *PLAIN, "-msimd128", "-mbulk-memory"),
    *("-nostdlib", "-fno-exceptions", "-Wl,--no-entry"),
)


def compile_to(target: Path, command: tuple[str, ...]) -> Path:
    """The portable source compiled by AARCH64 or WASM. Raises KernelError without that compiler, and when it fails."""
    if shutil.which(command[0]) is None:
        raise KernelError(
            "the portable kernels were to be compiled", f"there is no {command[0]} on the path", "Install it."
        )
    done = subprocess.run([*command, *map(str, PARTS), "-o", str(target)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(
            "the portable kernels were to be compiled",
            f"`{' '.join(command)}` failed:\n{done.stderr.strip()}",
            "Mend what the compiler names.",
        )
    return target


def message(
    packed: Packed,
    x: Tensor,
    stride: Pair = (1, 1),
    padding: Pair = (0, 0),
    dilation: Pair = (1, 1),
    between: tuple[float, float] = ANY,
) -> tuple[bytes, tuple[int, ...]]:
    """What the portable source is given for `formats.conv.convolve`, and the shape of the outcome at the end of it."""
    call, shape = arranged(packed, x, stride, padding, dilation, 1)
    weight, held, values = packed.prepared.weight, packed.tensors, packed.tensors["values"]
    arrays: tuple[Tensor, ...]
    if isinstance(packed.format, GroupCols):
        numbers = [0, *packed.shape, weight.rows, values.numel(), held["steps"].numel()]
        blocks, padded = weight.laid["rows"].shape
        numbers += [weight.groups, weight.whole, weight.first, weight.depth, blocks, padded, len(weight.laid["values"])]
        arrays = values, held["counts"], held["steps"], *weight.kept
    else:
        numbers = [1, *packed.shape, 1, values.numel(), held["shapes"].numel(), *[0] * 7]
        arrays = values, held["shapes"], *weight.kept, held["which"]
    numbers += [*x.shape, *shape[2:], call.taps_high, call.taps_wide, *stride, *padding, *dilation]
    numbers += [call.chunk, call.chunks, call.parts]
    head = struct.pack(f"<{len(numbers)}i2f", *numbers, *between)
    parts = [head, *map(_bytes, (*arrays, x.contiguous()))]
    return b"".join(part + bytes(-len(part) % 8) for part in parts) + _bytes(torch.zeros(shape)), shape


def outcome(answer: bytes, shape: tuple[int, ...]) -> Tensor:
    """The outcome at the end of an answered message."""
    size = 4 * torch.Size(shape).numel()
    return torch.frombuffer(bytearray(answer[len(answer) - size :]), dtype=torch.float32).view(shape)


def _bytes(tensor: Tensor) -> bytes:
    return ctypes.string_at(tensor.data_ptr(), tensor.numel() * tensor.element_size())
