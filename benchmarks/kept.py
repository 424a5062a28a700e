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
    machine = about_machine()
    if not result.exists() or _alike(result, machine):
        return result, page
    folder = re.sub(r"[^a-z0-9]+", "-", machine["processor"].lower()).strip("-")
    other = result.parent / folder / result.name
    if other.exists() and not _alike(other, machine):
        folder = f"{folder}-{machine['family']}"
    return result.parent / folder / result.name, page.parent / folder / page.name


def everywhere(result: Path, page: Path) -> list[tuple[Path, Path]]:
    """All results of a benchmark there are, the first machine's first, and where their pages go."""
    others = sorted(result.parent.glob(f"*/{result.name}"))
    found = [(path, page.parent / path.parent.name / page.name) for path in others]
    return [(result, page), *found] if result.exists() else found


def processor(machine: dict[str, Any]) -> str:
    """A processor's name, with its family where that is kept: a hypervisor calls several generations the same."""
    return machine["processor"] + (f" (family {machine['family']})" if "family" in machine else "")


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


def _alike(result: Path, machine: dict[str, Any]) -> bool:
    """Whether a result is of such a processor: of the same name and, where both say it, of the same generation."""
    kept = json.loads(result.read_text(encoding="utf-8"))["machine"]
    families = {found["family"] for found in (kept, machine) if "family" in found}
    return kept["processor"] == machine["processor"] and len(families) < 2
