"""`secateur report`: runs that were saved, as one page."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from secateur.cli.options import spoken, terminal

if TYPE_CHECKING:
    from secateur.cli.terminal import Terminal
    from secateur.outcome import Record
    from secateur.report import Claim
    from secateur.studies.ten_lessons import Finding


@click.command("report")
@click.argument("runs", nargs=-1, required=True, metavar="DIR|RECORDS...")
@click.option("--out", required=True, metavar="FILE.html", help="Where the page is written.")
@click.option("--title", default="", metavar="TEXT", help="What stands above it.")
@click.option("--strict", is_flag=True, help="Fail where one of the ten lessons it is checked by is broken.")
@spoken
def command(runs: tuple[str, ...], out: str, title: str, strict: bool, **spoken: Any) -> None:
    """Runs that were saved, as one page that needs no network.

    Each is a folder that prune saved, a folder of records, or a record (secateur.json).
    """
    from secateur.outcome import refuse_place
    from secateur.report import compare_table, headline, write
    from secateur.report.lessons import findings

    speaker = terminal(spoken)
    refuse_place(out)
    records = records_in(runs)
    Path(out).resolve().parent.mkdir(parents=True, exist_ok=True)
    write(records, out, title, claims_of(records))
    lessons = findings(records)
    said = [asdict(found) for found in lessons]
    speaker.emit({"out": out, "headline": headline(records), "lessons": said, "table": compare_table(records)})
    if not speaker.as_json:
        tell(speaker, lessons)
        speaker.show(headline(records))
        speaker.show(f"{out}: {len(records)} run{'s' * (len(records) != 1)}")
    if strict:
        refuse_broken(lessons)


def tell(speaker: "Terminal", lessons: "Sequence[Finding]") -> None:
    """Warnings and errors, each with what can be done about it; the page has the rest."""
    for found in lessons:
        if found.level != "info":
            speaker.show(f"lesson {found.lesson}: {found.message}. {found.remedy}")


def refuse_broken(lessons: "Sequence[Finding]") -> None:
    """Raise EvidenceError where there are warnings or errors."""
    from secateur.errors import EvidenceError

    broken = [found for found in lessons if found.level != "info"]
    if broken:
        numbers = ", ".join(str(n) for n in sorted({found.lesson for found in broken}))
        raise EvidenceError(
            "a comparison was to keep the ten lessons of sparse networks",
            f"it breaks {numbers}; the gravest: {broken[0].message}",
            broken[0].remedy,
        )


def records_in(places: tuple[str, ...]) -> "list[Record]":
    """The records of folders and files. Raises ModelError for a place that holds none."""
    from secateur.errors import ModelError
    from secateur.outcome import Record

    found = []
    for place in map(Path, places):
        if not place.is_dir():
            found.append(Record.read(place))
            continue
        own = place / "secateur.json"
        files = (
            [own] if own.exists() else sorted(p for p in place.glob("*.json") if not p.name.endswith(".failed.json"))
        )
        files = files or sorted(place.glob("*/secateur.json"))
        if not files:
            raise ModelError(
                f"records were to be read from {place}", "it holds none", "Give a folder that prune or compare wrote."
            )
        found += [Record.read(file) for file in files]
    return found


def claims_of(records: "list[Record]") -> "list[Claim]":
    """What the papers of the methods claim, and what was measured of it here."""
    from secateur.claims import results
    from secateur.method import load, names
    from secateur.report import Claim

    measured, known = results(), names()
    found = []
    for name in dict.fromkeys(part for record in records for part in record.method.split("+")):
        if name not in known or not (card := load(name).card).reports:
            continue
        here = f"{measured[name].verdict}: {measured[name].here}" if name in measured else ""
        found.append(Claim(f"{card.title} ({card.year})", card.reports, here, card.arxiv))
    return found
