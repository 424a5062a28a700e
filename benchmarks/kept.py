"""Where what a benchmark measured is kept: machines differ, so each kind of processor has results and pages of its own.

The first one's are results/NAME.json and docs/NAME.md; those of any other lie in a folder named after it, such as
results/amd-epyc and docs/amd-epyc.
"""

import json
import re
from pathlib import Path
from typing import Any

from secateur.outcome import about_machine, write_text


def here(result: Path, page: Path) -> tuple[Path, Path]:
    """Where this machine's result and page go, given where the first one's are."""
    processor = about_machine()["processor"]
    if not result.exists() or _processor(result) == processor:
        return result, page
    folder = re.sub(r"[^a-z0-9]+", "-", processor.lower()).strip("-")
    return result.parent / folder / result.name, page.parent / folder / page.name


def everywhere(result: Path, page: Path) -> list[tuple[Path, Path]]:
    """All results of a benchmark there are, the first machine's first, and where their pages go."""
    others = sorted(result.parent.glob(f"*/{result.name}"))
    found = [(path, page.parent / path.parent.name / page.name) for path in others]
    return [(result, page), *found] if result.exists() else found


def read(result: Path, empty: dict[str, Any]) -> dict[str, Any]:
    """What is kept, or what there is before anything was measured."""
    return json.loads(result.read_text(encoding="utf-8")) if result.exists() else empty


def write(result: Path, found: dict[str, Any]) -> None:
    """Keep what was measured so far."""
    result.parent.mkdir(parents=True, exist_ok=True)
    write_text(result, json.dumps(found, indent=1) + "\n")


def write_page(page: Path, text: str) -> None:
    """Keep the page that was made of it."""
    page.parent.mkdir(parents=True, exist_ok=True)
    write_text(page, text)


def _processor(result: Path) -> str:
    return json.loads(result.read_text(encoding="utf-8"))["machine"]["processor"]
