"""One self-contained page about a run, or about several side by side.

Everything is inside: style, drawings, and the code that draws them. The page's own policy forbids it the network.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import ModelError
from secateur.outcome import Record, write_text
from secateur.report import figures
from secateur.report.compare import Point, compare_table, dense, metric, points, series, shown, zero_shot_table
from secateur.report.damage import damage_table, rise
from secateur.report.ledger import lines, ways
from secateur.report.lessons import findings, passport
from secateur.report.pictures import grids
from secateur.report.sentence import headline

if TYPE_CHECKING:
    from markupsafe import Markup

    from secateur.report.charts import Drawing


@dataclass(frozen=True)
class Claim:
    """What a paper says, beside what was measured here."""

    paper: str  # authors, year, or title
    says: str  # with its setting: model, data, sparsity
    measured: str = ""  # here; empty when it was not
    arxiv: str = ""  # "2306.11695"


def write(records: Sequence[Record], path: str | Path, title: str = "", extra: Sequence[Claim] = ()) -> None:
    """Write the page of some runs to a file, whole or not at all. Raises as `page` does."""
    write_text(path, page(records, title, extra))


def page(records: Sequence[Record], title: str = "", extra: Sequence[Claim] = ()) -> str:
    """The page of one run, or of several of one task and model compared, as HTML that needs no network.

    `extra` is what papers claim, to stand beside what was measured. Raises SettingError for no records, TaskError for
    runs that cannot be compared, ModelError when the packages that draw are not installed.
    """
    found = points(records)
    try:
        import jinja2

        from secateur.report import charts

        bundle = _bundle()
    except ImportError as error:
        raise ModelError(
            "a report was asked for", f"{error.name} is not installed", "Install it: pip install 'secateur[report]'."
        ) from error

    newest = [r for p in found for r in p.records]
    passports = [passport(p) for p in found]
    single = len(newest) == 1
    at = shown(found)
    first = newest[0]
    drawings = [
        charts.quality_against_sparsity(newest),
        charts.quality_against_compute(newest) or charts.quality_against_size(newest),
    ]
    cut = charts.kept_by_site(at[0].records[0].sites) if len(at) == 1 else charts.kept_by_block(at)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("secateur.report", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(figures=figures, role=charts.role, kept=charts.kept, rise=rise)
    harmed = charts.damage_by_example(at)
    environment.filters["code"] = _code
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, sort_keys=True, default=str)
    boot = environment.get_template("draw.js").render()
    name = first.model.get("name") or "model"
    return environment.get_template("page.html").render(
        title=title or (f"{name} {_made(found[0])}" if single else f"{name}: {len(series(found))} methods"),
        sentence=headline(newest),
        single=single,
        first=first,
        records=newest,
        drawings=[_figure(d) for d in drawings if d is not None],
        cut=None if cut is None else _figure(cut),
        pictures=grids([(p.series, p.records[0]) for p in at]),
        curves=[_figure(d) for d in (*charts.curves(at), *charts.densities(at))],
        metric=metric(first),
        dense=dense(newest),
        table=compare_table(newest),
        zero_shot=zero_shot_table(newest),
        lessons=findings(newest),
        passports=passports,
        told=[(title, name, how) for title, name, how in _TOLD if any(getattr(p, name) is not None for p in passports)],
        damage=damage_table(found),
        harmed=None if harmed is None else _figure(harmed),
        seeds=sorted({len(p.records) for p in found}),
        shown=[(p, p.records[0], lines(p.records[0])) for p in at],
        at=_at(at),
        hows=ways([p.records[0] for p in at]),
        notes=_notes(found),
        commands=list(dict.fromkeys(r.command for r in newest if r.command)),
        settings=[(p.series, p.records[0].settings) for p in (found if not single else at)],
        machines=_distinct([r.machine for r in newest]),
        versions=_distinct([r.versions for r in newest]),
        claims=list(extra),
        bundle=bundle,
        boot=boot,
        hashes=[_hash(bundle), _hash(boot)],
    )


_TOLD = (
    ("mean density in training", "mean_density", figures.percent),
    ("peak", "peak_density", figures.percent),
    ("training operations", "compute", figures.work),
    ("weights ever there", "explored", figures.percent),
    ("accuracy under noise", "noisy", figures.quality),
    ("calibration error", "calibration", figures.quality),
)
"""Columns of what runs say of themselves, where one does: title, field of the passport, how it is written."""


def _code(text: str) -> "Markup":
    """What stands between backticks, as code."""
    from markupsafe import Markup, escape

    pieces = text.split("`")
    return Markup("").join(Markup("<code>{}</code>").format(p) if i % 2 else escape(p) for i, p in enumerate(pieces))


def _made(point: Point) -> str:
    """What a method did to a model, in its own word: who starts sparse was not pruned."""
    sparse = passport(point).origin == "sparse-to-sparse"
    return f"{'trained sparse' if sparse else 'pruned'} with {point.records[0].method}"


def _figure(drawing: "Drawing") -> dict[str, str]:
    # "<" never appears as itself, so that no name in the data can end the element it is written in.
    spec = json.dumps(drawing.spec, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return {"title": drawing.title, "caption": drawing.caption, "spec": spec}


@lru_cache(maxsize=1)
def _bundle() -> str:
    import vl_convert

    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;").replace("</script", "<\\/script").strip()


def _hash(script: str) -> str:
    """How a page's policy names a script that may run: by what is in it."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def _at(at: Sequence[Point]) -> str:
    """The sparsities of the runs that are shown one by one, in words."""
    places = list(dict.fromkeys(figures.percent(p.position) for p in at if not p.control or len(at) == 1))
    return ", ".join(places[:3]) + (" and others" if len(places) > 3 else "")


def _notes(found: Sequence[Point]) -> list[tuple[str, list[str]]]:
    """Each note once, with the series whose runs made it."""
    who: dict[str, list[str]] = {}
    for p in found:
        for record in p.records:
            for note in record.notes:
                names = who.setdefault(note, [])
                if p.series not in names:
                    names.append(p.series)
    return list(who.items())


def _distinct(values: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(v, sort_keys=True, default=str): v for v in values if v}.values())
