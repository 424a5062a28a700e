"""A model larger than memory: its weights lie in a file, and a block's are in memory while the block is at work.

    opened = open_model("big-folder", dtype="bfloat16", offload="/scratch")
    outcome = prune(opened.model, Wanda(), task, inplace=True)
    save(outcome, opened, "pruned")

The weights are copied tensor by tensor into a working file, and the model's parameters are views of it (a shared
mapping): what is read is brought in by the system, what a method writes is written to the file, and neither is memory
that must be kept. When a block has been through, its memory is given back. The working file has no name, so nothing is
left behind; what is saved is a copy of it under a temporary name, then renamed with its folder.

Only what is held for the whole model at once still takes memory: gradients, a second copy (`inplace=False`), training.
"""

import json
import mmap
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from secateur.errors import ModelError
from secateur.models import hf
from secateur.models.folder import Entry, few, header
from secateur.stored import CODES, preface
from secateur.walk import stacks

CHUNK = 2**24  # bytes copied at once


@dataclass(frozen=True, eq=False)
class Resting:
    """A safetensors file in which a model's tensors lie; each is a view of it."""

    room: mmap.mmap
    where: Mapping[str, tuple[int, int]]  # tensor name -> first byte and byte after the last, in the file
    entries: Mapping[str, Entry]

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor, as a view of the file."""
        return {name: self._view(name) for name in self.entries}

    def _view(self, name: str) -> Tensor:
        entry, (begin, _) = self.entries[name], self.where[name]
        if not entry.elements:
            return torch.empty(entry.shape, dtype=entry.dtype)
        flat = torch.frombuffer(self.room, dtype=entry.dtype, count=entry.elements, offset=begin)
        return flat.reshape(entry.shape)

    def rest(self, prefix: str = "") -> None:
        """Give back the memory of the tensors whose names start so; the file keeps what they hold."""
        ends = [self.where[name] for name in self.where if name.startswith(prefix)]
        if not ends:
            return
        page = mmap.PAGESIZE
        begin = -(-min(b for b, _ in ends) // page) * page  # whole pages only: the next block's may be at work
        length = max(e for _, e in ends) // page * page - begin
        if length > 0 and hasattr(mmap, "MADV_DONTNEED"):
            self.room.madvise(mmap.MADV_DONTNEED, begin, length)

    def write(self, path: Path) -> None:
        """The file as it is now, as a file of its own."""
        with path.open("wb") as file, memoryview(self.room) as held:
            for begin in range(0, len(held), CHUNK):
                file.write(held[begin : begin + CHUNK])
        self.rest()

    def holds(self, model: nn.Module) -> bool:
        """Whether all of a model lies in the file still, in the shapes it had."""
        second = hf.aliases_of(model)
        low = torch.frombuffer(self.room, dtype=torch.uint8, count=1).data_ptr()
        state = {name: value for name, value in model.state_dict().items() if name not in second}
        return state.keys() == self.entries.keys() and all(
            tuple(value.shape) == self.entries[name].shape and value.data_ptr() == low + self.where[name][0]
            for name, value in state.items()
            if value.numel()
        )


def offloaded(
    kind: Any, config: Any, files: list[Path], dtype: torch.dtype, scratch: Path
) -> tuple[nn.Module, Resting]:
    """A stock model whose weights lie in a working file in a folder, in a dtype; from files of tensors.

    Raises ModelError for weights that are stored under other names than the model has, and for a full disk.
    """
    shape = _hollow(kind, config, dtype)
    wanted = hf.entries_of(shape, hf.aliases_of(shape))
    asked = f"a {kind.__name__} was to be opened from {files[0].parent} without holding it in memory"
    there = {name: file for file in files for name in header(file)}
    missing = wanted.keys() - there.keys()
    if missing:
        raise ModelError(
            asked,
            f"{few(missing)} are not in it under these names: they are put together from others when it is opened",
            "Open it without offload.",
        )
    try:
        resting = _copied(wanted, there, dtype, scratch)
    except OSError as error:
        raise ModelError(
            asked, f"the disk refused {scratch}: {error.strerror or error}", "Make room, or give another folder."
        ) from error
    return attached(shape, resting), resting


def attached(shape: nn.Module, resting: Resting) -> nn.Module:
    """A model without storage, given that of a file; its blocks give their memory back when they are through."""
    hf.fill_(shape, resting.tensors(), hf.aliases_of(shape))
    for stack in stacks(shape):
        for name in stack:
            shape.get_submodule(name).register_forward_hook(_Rest(resting, f"{name}."))
    shape.register_forward_hook(_Rest(resting, ""))
    return shape.eval()


def reread(kind: Any, config: Any, path: Path, dtype: torch.dtype) -> nn.Module:
    """The stock model of a class and config, with the weights of a file that `write` wrote."""
    with path.open("r+b") as file:
        return attached(_hollow(kind, config, dtype), _resting(file))


@dataclass(frozen=True, eq=False)
class _Rest:
    """A forward hook: what was read for this is given back."""

    resting: Resting
    prefix: str

    def __call__(self, *_: object) -> None:
        self.resting.rest(self.prefix)

    def __deepcopy__(self, memo: object) -> "_Rest":
        return self  # a copied model has tensors of its own; the file stays one


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Within this, parameters get no storage once they are made, and buffers, which are computed, do."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.to("meta"), requires_grad=param.requires_grad)
        plain(module, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]


def _hollow(kind: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    with _parameters_on_meta():
        return hf.empty(kind, config, dtype)


def _copied(wanted: Mapping[str, Entry], there: Mapping[str, Path], dtype: torch.dtype, scratch: Path) -> Resting:
    """The tensors, one after the other, in a new file without a name."""
    entries = {n: Entry(e.shape, dtype if e.dtype.is_floating_point else e.dtype) for n, e in wanted.items()}
    # The widest first, so that each starts where one of its elements may; else in the model's order, block by block.
    entries = dict(sorted(entries.items(), key=lambda item: -item[1].dtype.itemsize))
    scratch.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=scratch, prefix=".secateur-") as file:
        file.write(preface({name: (e.shape, e.dtype) for name, e in entries.items()}, {"format": "pt"}))
        for name in entries:
            with there[name].open("rb") as source:
                _copy(name, source, file, entries[name].dtype)
        file.flush()
        return _resting(file)


def _copy(name: str, source: BinaryIO, target: Any, dtype: torch.dtype) -> None:
    """One tensor from one file to the end of another, in another dtype, a chunk at a time."""
    length = int.from_bytes(source.read(8), "little")
    row = json.loads(source.read(length))[name]
    begin, end = (8 + length + int(offset) for offset in row["data_offsets"])
    held = next(d for d, code in CODES.items() if code == row["dtype"])
    source.seek(begin)
    while begin < end:
        chunk = bytearray(source.read(min(CHUNK, end - begin)))
        begin += len(chunk)
        value = torch.frombuffer(chunk, dtype=held)
        if held != dtype:
            value = value.to(dtype)
        target.write(value.view(torch.uint8).numpy().data)


def _resting(file: Any) -> Resting:
    """A file of tensors, mapped: what is written to them is written to it."""
    room = mmap.mmap(file.fileno(), 0)
    start = 8 + int.from_bytes(room[:8], "little")
    rows = json.loads(room[8:start])
    rows.pop("__metadata__", None)
    kinds = {code: dtype for dtype, code in CODES.items()}
    where = {n: (start + r["data_offsets"][0], start + r["data_offsets"][1]) for n, r in rows.items()}
    return Resting(room, where, {n: Entry(tuple(r["shape"]), kinds[r["dtype"]]) for n, r in rows.items()})
