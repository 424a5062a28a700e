"""Stretches of a chain that a few pictures go through at a time, so that what lies between the layers stays in a cache.

A layer that all pictures go through at once leaves what it makes in memory, where the next finds it; its weight is read
once for all of them. Fewer pictures at a time leave it in the second cache, and a weight is read more often. Which of
both takes fewer bytes differs from layer to layer of a network: the first have large pictures, the last large weights.
"""

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

STRETCH = "conv_stretch"
EVEN = 8
"""Shares of a thread from which on all threads have about as many."""
ROOMS = 64
"""At most, one for each thread."""
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
UNKNOWN = 2**20
"""Where Linux tells of the caches of a core, and the bytes of the second one where it does not."""
VALUES = 3  # of a layer: what it reads, what it makes, and what is added


@dataclass(frozen=True)
class Layer:
    """The bytes of a layer: what it reads, makes and adds for a picture, what of that it makes, and its weight."""

    values: int
    makes: int
    weight: int


class Leg(ctypes.Structure):
    """`StretchStep` of kernels/conv_stretch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("kernel", "call")),
        *((name, ctypes.c_int64 * VALUES) for name in ("apart", "rooms")),
    )


class Stretch(ctypes.Structure):
    """`Stretch` of kernels/conv_stretch.h: layers, and how many pictures of all go through them at a time."""

    _fields_ = (
        ("steps", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("count", "pictures", "together")),
        ("taken", ctypes.c_uint64),
    )

    @classmethod
    def of(cls, legs: Sequence[Leg], pictures: int, together: int) -> "Stretch":
        """A stretch of legs, whose structs must stay where they are."""
        held = (Leg * len(legs))(*legs)
        found = cls(ctypes.addressof(held), len(legs), pictures, together, 0)
        found.held = held  # as long as what points to them
        return found

    @property
    def items(self) -> int:
        """How often pictures go through it."""
        return -(-self.pictures // self.together)


def at_once(layers: Sequence[Layer], pictures: int, threads: int) -> list[int]:
    """How many pictures best go through each layer at a time: all, or fewer, so that threads have as much to do.

    What costs is read from beyond the second cache: a weight, once for so many pictures; and what a layer makes, unless
    as many go through the next one, and all that both have of them stays near.
    """
    near = second_cache() // 4 * 3  # the rest is for what kernels lay out
    some, found = [pictures], 1
    while found < pictures and threads <= ROOMS:
        # Each thread gets as many, or so many small shares that one more or less is little.
        if threads == 1 or pictures % (found * threads) == 0 or pictures >= EVEN * found * threads:
            some.append(found)
        found *= 2
    # The least of all ways there are to the layer before, by how many go through that.
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}
    before = 0
    for layer in layers:
        through: dict[int, tuple[float, list[int]]] = {}
        for many in some:
            if many < pictures and many * layer.values > near:
                continue
            costs = {
                last: cost + (0 if last == many < pictures or pictures * before <= near else 3 * before * (last > 0))
                for last, (cost, _) in best.items()
            }
            last = min(costs, key=costs.__getitem__)
            through[many] = costs[last] + layer.weight / many, [*best[last][1], many]
        best, before = through, layer.makes
    return min(best.values(), key=lambda way: way[0])[1]


def in_turn(at_once: Sequence[int]) -> list[tuple[range, int]]:
    """Layers that follow one another with as many pictures at a time, and how many."""
    found, begin = list[tuple[range, int]](), 0
    for some, of_them in groupby(at_once):
        end = begin + len(list(of_them))
        found.append((range(begin, end), some))
        begin = end
    return found


@functools.cache
def second_cache() -> int:
    """Bytes of the second cache of a core, as Linux says, or what is usual."""
    for index in CACHES.glob("index*"):
        try:
            if (index / "level").read_text().strip() == "2":
                return int((index / "size").read_text().strip().removesuffix("K")) * 1024
        except (OSError, ValueError):
            continue
    return UNKNOWN
