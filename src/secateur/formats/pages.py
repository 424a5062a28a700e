"""Tensors in large pages of memory, for what a processor goes through again and again: weights, and caches of tokens.

Of 4 KB pages 43 MB are ten thousand, more than a processor knows the places of. It looks up each that it does not know,
in tables, twice over in a virtual machine, and what it reads ahead of need ends with the page. Linux maps 2 MB at once
where it is asked to (`madvise`; "madvise" or "always" in /sys/kernel/mm/transparent_hugepage/enabled).
"""

import mmap
from collections.abc import Iterator, Sequence
from math import prod

import torch
from torch import Tensor

from secateur.formats.packed import Packed

PAGE, CHUNK = 2**21, 2**26
"""Bytes of a large page; and of the most that is asked for at once, which is held twice while it is filled."""
APART = 64
"""Where tensors begin, in bytes."""
LEAST = 2**22
"""Bytes below which tensors stay where they are: the caches hold them."""


def in_large_pages(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same contiguous tensors, copied side by side; as they are where they are small, or there are no such pages.

    Each has a storage of its own, so that it is saved and copied by itself; all of them keep the memory.
    """
    if sum(tensor.nbytes for tensor in tensors) < LEAST or not all(tensor.is_cpu for tensor in tensors):
        return list(tensors)
    found = list[Tensor]()
    for some in _chunks(tensors):
        room = _room(sum(map(_padded, some)))
        if room is None:
            return [*found, *tensors[len(found) :]]
        memory, at = room
        for tensor in some:
            found.append(_in(memory, at, tensor.shape, tensor.dtype).copy_(tensor) if tensor.numel() else tensor)
            at += _padded(tensor)
    return found


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """A tensor of a shape, of the dtype and on the device of another, in large pages where it is large."""
    size = prod(shape) * like.element_size()
    room = _room(size) if size >= LEAST and like.is_cpu else None
    return like.new_empty(*shape) if room is None else _in(*room, shape, like.dtype)


def settled(weights: Sequence[Packed]) -> list[Packed]:
    """The same packed weights with their tensors in large pages."""
    tensors = iter(in_large_pages([tensor for packed in weights for tensor in packed.tensors.values()]))
    return [Packed(w.format, w.shape, {name: next(tensors) for name in w.tensors}) for w in weights]


def _chunks(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    some, size = list[Tensor](), 0
    for tensor in tensors:
        if some and size + _padded(tensor) > CHUNK:
            yield some
            some, size = [], 0
        some.append(tensor)
        size += _padded(tensor)
    yield some


def _in(memory: mmap.mmap, at: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.frombuffer(memory, dtype=dtype, count=prod(shape), offset=at).view(*shape)


def _padded(tensor: Tensor) -> int:
    return -(-tensor.nbytes // APART) * APART


def _room(size: int) -> tuple[mmap.mmap, int] | None:
    """Memory with so many bytes from a place in it on, where a large page begins; None where there is none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):  # only Linux has
        return None
    memory = mmap.mmap(-1, -(-size // PAGE) * PAGE + PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # built without
        return None
    return memory, -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % PAGE
