"""The compiled kernels: found, checked and called here; without them torch computes the same, slower.

A kernel is called by its name and runs in the best variant for this processor. SECATEUR_ISA (base, avx2, avx512,
avx512bf16, amx or neon) forces a lower level, for tests and for comparing. The library lies in the package, where the
build puts it, or in a checkout under build/kernels, by a hash of the sources: `python -m secateur.kernels` builds it
there. SECATEUR_KERNELS names another file, such as one with sanitizers.
"""

import ctypes
import functools
import hashlib
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.errors import KernelError, SettingError, did_you_mean

VERSION = 10
"""What secateur_version() of the library must say: raised with every change to a struct that Python fills in, or to
the levels, which are told by number."""

LEVELS = ("base", "avx2", "avx512", "avx512bf16", "amx", "neon")
"""The instruction sets kernels are written for, each holding those before it; base runs anywhere, neon on AArch64."""

FORCED, ELSEWHERE = "SECATEUR_ISA", "SECATEUR_KERNELS"
SOURCES = Path(__file__).resolve().parent
FILE = "libsecateur.so"


@dataclass(frozen=True)
class Kernel:
    """One compiled function, in the variant that runs here."""

    name: str
    level: str
    pointer: int
    library: "Library"


class Library:
    """The loaded library, and the level up to which its kernels are used."""

    def __init__(self, path: Path) -> None:
        """Load the library at a path. Raises KernelError when it is not one of this version."""
        try:
            loaded = ctypes.CDLL(str(path))
            version = loaded.secateur_version()
        except (OSError, AttributeError) as error:
            raise KernelError(
                f"the compiled kernels were to be loaded from {path}",
                f"the system refuses them: {error}",
                "Build them again with `python -m secateur.kernels`, or install secateur again.",
            ) from error
        if version != VERSION:
            raise KernelError(
                f"the compiled kernels were to be loaded from {path}",
                f"they are of version {version} and this is {VERSION}",
                "Build them again with `python -m secateur.kernels`, or install secateur again.",
            )
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self.path = path
        self.machine = LEVELS[loaded.secateur_machine()]
        self._find = loaded.secateur_find
        self._find.restype = pointer
        self._find.argtypes = [ctypes.c_char_p, integer, ctypes.POINTER(integer)]
        self.matmul = loaded.secateur_matmul
        self.matmul.restype = None
        self.matmul.argtypes = [pointer, pointer, pointer, pointer, pointer, long, long, integer]
        self.run = loaded.secateur_run
        self.run.restype = None
        self.run.argtypes = [pointer, pointer, long, integer]
        self.run_all = loaded.secateur_run_all
        self.run_all.restype = None
        self.run_all.argtypes = [pointer, long, pointer, long, pointer, integer]

    def find(self, name: str, level: str) -> Kernel | None:
        """The kernel of a name, in the highest variant up to a level; None when the library has none."""
        found = ctypes.c_int()
        pointer = self._find(name.encode(), LEVELS.index(level), ctypes.byref(found))
        return Kernel(name, LEVELS[found.value], pointer, self) if pointer else None


@functools.cache
def library() -> Library | None:
    """The library, loaded once a process; None where there is none, said once. Raises KernelError when it is broken."""
    path = where()
    if path is None:
        warnings.warn(without(), UserWarning, stacklevel=3)
        return None
    return Library(path)


def where() -> Path | None:
    """The file of the library, or None: where SECATEUR_KERNELS says, in the package, or in its checkout."""
    if ELSEWHERE in os.environ:
        return Path(os.environ[ELSEWHERE])
    found = (SOURCES / FILE, built())
    return next((path for path in found if path is not None and path.exists()), None)


def without() -> str:
    """Why nothing compiled runs here, and what to do about it."""
    if checkout() is None:
        return (
            "secateur was installed without its compiled kernels, so torch computes what they would, slower. "
            "Install a C++ compiler and then secateur again."
        )
    return (
        "The compiled kernels of this checkout are not built, so torch computes what they would, slower. "
        "`python -m secateur.kernels` builds them."
    )


def checkout() -> Path | None:
    """The root of the checkout this package lies in, or None when it was installed."""
    root = SOURCES.parents[2]
    return root if (root / "pyproject.toml").exists() and SOURCES.parent.parent.name == "src" else None


def built() -> Path | None:
    """Where a checkout keeps the library of its sources as they are, built or not; None when installed."""
    root = checkout()
    return None if root is None else root / "build" / "kernels" / fingerprint() / FILE


def fingerprint() -> str:
    """A hash of everything the library is made of."""
    text = hashlib.sha256()
    for path in sorted(p for p in SOURCES.iterdir() if p.suffix in {".cpp", ".h", ".inc", ".txt"}):
        text.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return text.hexdigest()[:16]


def level() -> str:
    """The level kernels run at: the machine's, or the lower one that SECATEUR_ISA asks for.

    Raises SettingError when it asks for one that does not exist or that this processor cannot run.
    """
    return _level(_forced or os.environ.get(FORCED, ""))


def levels() -> tuple[str, ...]:
    """The levels that SECATEUR_ISA and `forced` can ask for on this processor, the lowest first."""
    found = library()
    machine = "base" if found is None else found.machine
    return ("base", "neon") if machine == "neon" else LEVELS[: LEVELS.index(machine) + 1]


@functools.cache
def _level(asked: str) -> str:
    found = library()
    machine = "base" if found is None else found.machine
    if not asked:
        return machine
    if asked not in LEVELS:
        raise SettingError(f"{FORCED}={asked} was asked for", "there is no such level", did_you_mean(asked, LEVELS))
    if found is not None and asked not in levels():
        raise SettingError(
            f"{FORCED}={asked} was asked for",
            f"this processor reaches {machine}",
            f"Ask for {', '.join(levels())}, or leave it unset.",
        )
    return asked


_forced = ""


@contextmanager
def forced(asked: str) -> Iterator[None]:
    """Within this, kernels run at a level up to the one asked for. Raises SettingError as `level` does."""
    global _forced
    _level(asked)
    before, _forced = _forced, asked
    _found.cache_clear()
    try:
        yield
    finally:
        _forced = before
        _found.cache_clear()


@functools.cache
def _found(name: str) -> Kernel | None:
    have = library()
    return None if have is None else have.find(name, level())


def find(name: str) -> Kernel | None:
    """The kernel of a name in the variant that runs here, or None when torch has to do."""
    return _found(name)


def matmul(kernel: Kernel, weight: int, x: Tensor, y: Tensor, bias: Tensor | None, rows: int, items: int) -> None:
    """Compute y = x W^T + bias with a kernel: x [rows, inputs] and y [rows, outputs] contiguous and of one dtype.

    `weight` is where the format's own struct is, `items` the number of pieces its kernels cut the work into. The
    threads are those of torch.
    """
    kernel.library.matmul(
        kernel.pointer,
        weight,
        x.data_ptr(),
        y.data_ptr(),
        None if bias is None else bias.data_ptr(),
        rows,
        items,
        torch.get_num_threads(),
    )


class Memory(ctypes.Structure):
    """`Memory` of kernels/memory.h: what memory_read reads."""

    _fields_ = (("data", ctypes.c_void_p), ("bytes", ctypes.c_int64))

    @staticmethod
    def items(nbytes: int) -> int:
        """Its pieces are pages of 4096 bytes."""
        return -(-nbytes // 4096)


def run(kernel: Kernel, call: ctypes.Structure, items: int) -> None:
    """Run a kernel of any other signature over its items, `call` being the struct it takes."""
    kernel.library.run(kernel.pointer, ctypes.addressof(call), items, torch.get_num_threads())


class Step(ctypes.Structure):
    """`Step` of kernels/library.cpp: a kernel with the struct it takes and its number of items."""

    _fields_ = (("kernel", ctypes.c_void_p), ("call", ctypes.c_void_p), ("items", ctypes.c_int64))


class Place(ctypes.Structure):
    """`Place` of kernels/library.cpp: where a pointer is written before the steps run, and which."""

    _fields_ = (("at", ctypes.c_void_p), ("which", ctypes.c_int64))


class Steps:
    """Several kernels that run one after another in one call, with pointers that are given anew each time."""

    def __init__(self, steps: Sequence[tuple[Kernel, ctypes.Structure, int]], places: Sequence[tuple[int, int]]):
        """Kernels with their structs, which must stay where they are, and items; and which pointer goes where."""
        self._steps = (Step * len(steps))(*(Step(k.pointer, ctypes.addressof(call), n) for k, call, n in steps))
        self._places = (Place * len(places))(*(Place(at, which) for at, which in places))
        self._pointers = (ctypes.c_void_p * (1 + max((which for _, which in places), default=0)))()
        self._run = steps[0][0].library.run_all
        of = ctypes.addressof
        self._given = of(self._steps), len(steps), of(self._places), len(places), of(self._pointers)

    def run(self, pointers: list[Any], threads: int) -> None:
        """Run them all. Two threads must not do so at once."""
        self._pointers[:] = pointers
        self._run(*self._given, threads)
