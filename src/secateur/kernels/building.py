"""Building the kernels of a checkout: the same CMakeLists.txt as the package's, into build/kernels."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from secateur.errors import KernelError
from secateur.kernels import FILE, SOURCES, built, checkout


def build() -> Path:
    """Build the library of this checkout's sources and return its path; what has not changed is not compiled again.

    Raises KernelError outside a checkout, and where there is no CMake, no C++ compiler, or an error in the sources.
    """
    target, root = built(), checkout()
    if target is None or root is None:
        raise KernelError(
            "the kernels were to be built",
            "this secateur was installed and is no checkout",
            "Install a C++ compiler and then secateur again: pip builds them.",
        )
    return compile_to(target, root / "build" / "kernels" / "cmake")


def compile_to(target: Path, folder: Path, *settings: str) -> Path:
    """Configure and compile in a folder, with further -D settings, and put the library at a path in one step."""
    cmake, ninja = _tool("cmake"), _tool("ninja")
    if cmake is None:
        raise KernelError(
            "the kernels were to be built",
            "there is no cmake on the path",
            "`pip install cmake ninja`, or your system's package.",
        )
    folder.mkdir(parents=True, exist_ok=True)
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []
    _run([cmake, "-S", str(SOURCES), "-B", str(folder), *generator, *settings])
    _run([cmake, "--build", str(folder)])
    made = folder / FILE
    if not made.exists():
        raise KernelError("the kernels were to be built", "cmake finds no C++ compiler", "Install g++ or clang.")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".partial", dir=target.parent)
    os.close(handle)
    shutil.copy(made, name)
    Path(name).replace(target)
    return target


def _tool(name: str) -> str | None:
    """A program on the path, or beside this Python, where pip puts it."""
    return shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines()
        said = [line for line in said if "error" in line.lower()] or said
        raise KernelError(
            "the kernels were to be built",
            f"`{' '.join(command)}` failed:\n" + "\n".join(said[-30:]),
            "Mend what the compiler names, or delete build/kernels/cmake when it is of another machine.",
        )
