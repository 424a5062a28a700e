"""Pictures that a model drew before and after it was cut, the same captions and noise in every row."""

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass

from secateur.outcome import Record

SHOWN = 6  # times as large as drawn, at most
WIDEST = 960  # pixels of the page that a row may take


@dataclass(frozen=True)
class Row:
    """Some captions drawn by one model."""

    of: str
    png: str  # in base64
    width: int  # on the page
    height: int


@dataclass(frozen=True)
class Grid:
    """The rows of one run, over its captions."""

    series: str
    captions: list[str]
    rows: list[Row]


def grids(shown: Sequence[tuple[str, Record]]) -> list[Grid]:
    """A grid for each run that has pictures, by its name in the page; what is no PNG is left out."""
    found = []
    for series, record in shown:
        rows = []
        for row in record.pictures:
            wide, high = size_of(row.png)
            if wide:
                times = max(1, min(SHOWN, WIDEST // wide))
                rows.append(Row(row.of, row.png, wide * times, high * times))
        if rows:
            found.append(Grid(series, record.pictures[0].captions, rows))
    return found


def size_of(png: str) -> tuple[int, int]:
    """Width and height of a PNG in base64, as its header says; (0, 0) for anything else."""
    try:
        start = base64.b64decode(png, validate=True)[:24]
    except (binascii.Error, ValueError):
        return 0, 0
    if len(start) < 24 or start[:8] != b"\x89PNG\r\n\x1a\n":
        return 0, 0
    return int.from_bytes(start[16:20]), int.from_bytes(start[20:24])
