"""`python -m secateur.kernels`: build the kernels of a checkout, and say what runs here."""

import sys

from secateur import kernels
from secateur.errors import SecateurError
from secateur.kernels.building import build


def main() -> int:
    """Build what is not built, and print the library and its level."""
    path = kernels.where()
    try:
        if path is None:
            path = build()
        print(f"{path}: {kernels.Library(path).machine} here, {kernels.level()} in use")  # noqa: T201
    except SecateurError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
