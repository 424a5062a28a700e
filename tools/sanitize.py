"""Runs the tests of the kernels under AddressSanitizer and UBSan: python tools/sanitize.py [pytest arguments]

Builds the library with both in build/kernels/sanitized, and runs with it every file of tests/kernels but those that
start processes or compilers. The matrix unit is plain loops in it, so that its kernels run where there is none, and
what it reads and writes is seen. A read or write outside a tensor, an overflow or a misaligned access ends the run with
a report.
"""

import os
import subprocess
import sys
from pathlib import Path

SETTINGS = ("-DSECATEUR_SANITIZE=ON", "-DSECATEUR_TILES_IN_SOFTWARE=ON", "-DCMAKE_CXX_COMPILER=g++")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "src"))

from secateur.errors import KernelError  # noqa: E402
from secateur.kernels import FILE  # noqa: E402
from secateur.kernels.building import compile_to  # noqa: E402


def runtime(name: str) -> str:
    """The sanitizer's own library, which has to be loaded before Python."""
    found = subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return found.stdout.strip()


def main() -> int:
    """Build, and run the grid with what was built; without a compiler there is nothing to look at."""
    folder = ROOT / "build" / "kernels" / "sanitized"
    try:
        library = compile_to(folder / FILE, folder / "cmake", *SETTINGS)
    except KernelError as error:
        sys.stderr.write(f"not run: {error}\n")
        return 0
    made = {
        **os.environ,
        "SECATEUR_KERNELS": str(library),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and torch keep what they have until the end; only the kernels are looked at.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    }
    kept = {"test_library.py", "test_linear.py", "test_portable.py", "test_aarch64.py"}
    found = sorted(str(path) for path in (ROOT / "tests" / "kernels").glob("test_*.py") if path.name not in kept)
    asked = sys.argv[1:] or found
    return subprocess.run([sys.executable, "-m", "pytest", "-q", *asked], cwd=ROOT, env=made, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
