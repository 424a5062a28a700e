"""Where data files lie, and what was made from them: the folders that SECATEUR_DATA and SECATEUR_CACHE name."""

import os
from pathlib import Path

from secateur.errors import TaskError


def folder() -> Path | None:
    """The folder of data files: SECATEUR_DATA, or `shared/data` beside a checkout; None when there is none."""
    named = os.environ.get("SECATEUR_DATA")
    found = Path(named) if named else Path(__file__).parents[4] / "shared" / "data"
    return found if found.is_dir() else None


def cache() -> Path:
    """Where what was trained here is kept between runs: SECATEUR_CACHE, or ~/.cache/secateur."""
    return Path(os.environ.get("SECATEUR_CACHE") or Path.home() / ".cache" / "secateur")


def file(name: str, asked: str) -> Path:
    """A file of the folder. Raises TaskError, with what to set, when it is not there."""
    place = folder()
    if place is not None and (place / name).is_file():
        return place / name
    raise TaskError(
        f"task {asked!r} was asked for",
        f"{name} is not in {place}" if place else "there is no folder of data",
        f"Set SECATEUR_DATA to a folder that holds {name}.",
    )
