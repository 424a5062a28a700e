"""The drawings of a report as Vega-Lite, with their data inside.

Text and grid take their colours from the page, so that one drawing serves light, dark and paper. A series is told by
shape as well as by colour.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt

from secateur.outcome import Ledger, Record, SiteRow
from secateur.report import figures
from secateur.report.compare import COMPUTE, DENSITY, Point, at_step, dense, metric, points, series

# Of middling lightness, so that each stands out on white and on black; told apart by most colour-blind readers.
COLOURS = ("#2b7bba", "#d5622a", "#1a9870", "#b45fa6", "#b58a10", "#44a5cf", "#9c5a3c", "#808080")
SHAPES = ("circle", "square", "triangle-up", "diamond", "triangle-down", "cross", "triangle-right", "triangle-left")
POINTS_PER_CURVE = 400
BARS = 60
CELLS = 3000
SECONDS = "seconds"  # the curve that says when each step was reached
MOMENTS = 24  # of training, at which densities are drawn


@dataclass(frozen=True)
class Drawing:
    """A chart and the words under it."""

    spec: Mapping[str, Any]  # Vega-Lite
    title: str
    caption: str


def quality_against_sparsity(records: Sequence[Record]) -> Drawing | None:
    """The quality of each series against the sparsity asked for; None when nothing was measured."""
    return _quality_chart(
        records,
        lambda p: p.position,
        0.0,
        alt.X("x:Q", title="sparsity asked for", axis=alt.Axis(format=".0%", tickCount=6), scale=_near()),
        "Quality against sparsity",
        "Further right, more was removed.",
    )


def quality_against_size(records: Sequence[Record]) -> Drawing | None:
    """The quality against the bytes stored, or where nothing was saved, against the parameters left."""
    before = records[0].ledger.before
    sizes = [p.mean(_megabytes) for p in points(records)]
    if any(size is not None for size in sizes):
        return _quality_chart(
            records,
            lambda p: p.mean(_megabytes),
            None if before.stored_bytes is None else before.stored_bytes / 1e6,
            alt.X("x:Q", title="stored size (MB)", axis=alt.Axis(format=",.3~f", tickCount=6), scale=_near()),
            "Quality against stored size",
            "Further left, the saved weights are smaller."
            + (" Runs that were not saved are left out." if None in sizes else ""),
        )
    return _quality_chart(
        records,
        lambda p: p.mean(lambda of: of.after.parameters - of.after.zeros),
        before.parameters - before.zeros,
        alt.X("x:Q", title="parameters that are not zero", axis=alt.Axis(format="~s", tickCount=6), scale=_near()),
        "Quality against parameters left",
        "Further left, fewer parameters are not zero. No run was saved, so that stored sizes are not known.",
    )


def quality_against_compute(records: Sequence[Record]) -> Drawing | None:
    """The quality against the operations spent in training; None where runs did not say what they spent."""

    def spent(p: Point) -> float | None:
        each = [r.curves[COMPUTE][-1][1] for r in p.records if r.curves.get(COMPUTE)]
        return sum(each) / len(each) if each else None

    found = points(records)
    if all(spent(p) is None for p in found):
        return None
    return _quality_chart(
        records,
        spent,
        None,
        alt.X("x:Q", title="operations in training", axis=alt.Axis(format=".2~s", tickCount=6), scale=_near()),
        "Quality against training compute",
        "Further left, training was cheaper: forward and backward, as if zeros cost nothing, "
        "which dense kernels do not achieve.",
    )


def densities(found: Sequence[Point]) -> list[Drawing]:
    """How full each site was over training, a chart for each series whose runs logged it."""
    drawings = []
    for p in found:
        logged = {n.removeprefix(DENSITY): c for n, c in p.records[0].curves.items() if n.startswith(DENSITY) and c}
        if not logged:
            continue
        order = [row.site for row in p.records[0].sites if row.site in logged] or list(logged)
        short = shorten(order)
        last = max(step for name in order for step, _ in logged[name])
        last = max([last, *(step for step, _ in p.records[0].curves.get(COMPUTE, []))])
        moments = sorted({round(last * i / (MOMENTS - 1)) for i in range(MOMENTS)})
        cells = [
            {"x": str(moment), "y": short[name], "kept": at_step(logged[name], moment), "site": name}
            for name in order[: CELLS // len(moments)]
            for moment in moments
        ]
        drawn = _heat(cells, [str(m) for m in moments], [short[n] for n in order], "step", "", ("site",))
        drawings.append(
            Drawing(drawn.spec, f"Layer densities over training: {p.series}", "Yellow: all of the layer is there.")
        )
    return drawings


def kept_by_site(rows: Sequence[SiteRow]) -> Drawing | None:
    """What one run kept, site by site, grouped by block; None when it cut nothing."""
    if not rows:
        return None
    blocks = list(dict.fromkeys(r.block for r in rows))
    roles = list(dict.fromkeys(role(r) for r in rows))
    regular = len(blocks) > 1 and len(roles) <= 24 and len(rows) >= 0.5 * len(blocks) * len(roles)
    if regular and len(rows) <= CELLS:
        short = shorten(blocks)
        cells = [
            {"x": short[r.block], "y": role(r), "kept": kept(r), "site": r.site, "units": f"{r.kept:,} of {r.units:,}"}
            for r in rows
        ]
        return _heat(cells, [short[b] for b in blocks], roles, "block", "", ("site", "units"))
    if len(rows) <= BARS:
        return _bars([{"name": r.site, "kept": kept(r), "units": f"{r.kept:,} of {r.units:,}"} for r in rows], "site")
    if 1 < len(blocks) <= 2 * BARS:
        short = shorten(blocks)
        return _bars([{"name": short[b], "kept": kept_in(rows, b), "units": "all"} for b in blocks], "block")
    most = sorted(rows, key=kept)[:BARS]
    drawn = _bars([{"name": r.site, "kept": kept(r), "units": f"{r.kept:,} of {r.units:,}"} for r in most], "site")
    return Drawing(drawn.spec, drawn.title, f"{drawn.caption} The {BARS} sites cut most, of {len(rows):,}.")


def kept_by_block(found: Sequence[Point]) -> Drawing | None:
    """What each of several runs kept, block by block; None when none cut anything."""
    every = [(p, p.records[0].sites) for p in found if p.records[0].sites]
    if not every:
        return None
    blocks = list(dict.fromkeys(r.block for _, rows in every for r in rows))
    if len(blocks) < 2:  # no blocks to speak of: the sites themselves
        names = list(dict.fromkeys(r.site for _, rows in every for r in rows))[: CELLS // len(every)]
        short = shorten(names)
        cells = [
            {"x": short[r.site], "y": p.series, "kept": kept(r), "site": r.site}
            for p, rows in every
            for r in rows
            if r.site in short
        ]
        return _heat(cells, [short[n] for n in names], [p.series for p, _ in every], "site", "", ("site",))
    short = shorten(blocks)
    cells = [
        {"x": short[b], "y": p.series, "kept": kept_in(rows, b), "block": b}
        for p, rows in every
        for b in blocks
        if any(r.block == b for r in rows)
    ]
    return _heat(cells, [short[b] for b in blocks], [p.series for p, _ in every], "block", "", ("block",))


def curves(found: Sequence[Point], most: int = 12) -> list[Drawing]:
    """One chart for each curve that the runs logged, and a second over the seconds where those were logged beside it.

    A run that logs a curve "seconds" says how long it had taken at each of its steps.
    """
    own = {SECONDS, COMPUTE}
    names = sorted(n for n in {n for p in found for n in p.records[0].curves} - own if not n.startswith(DENSITY))
    drawings = []
    for name in names[:most]:
        lines = {p.series: p.records[0].curves.get(name, []) for p in found}
        drawings.append(_curve(name, lines, "step", f"{name} over the steps", name))
        clocks = {p.series: dict(p.records[0].curves.get(SECONDS, [])) for p in found}
        timed = {
            one: [(clocks[one][step], value) for step, value in line]
            for one, line in lines.items()
            if clocks[one] and all(step in clocks[one] for step, _ in line)
        }
        drawings.append(_curve(name, timed, SECONDS, f"{name} over the time it took", f"{name} against time"))
    return [d for d in drawings if d is not None]


def _curve(
    name: str, lines: Mapping[str, Sequence[tuple[float, float]]], across: str, description: str, title: str
) -> Drawing | None:
    """A line for each series; None where there is no point to draw."""
    values, left_out = [], 0
    for series_name, line in lines.items():
        finite = [(at, value) for at, value in line if math.isfinite(value)]
        left_out += len(line) - len(finite)
        stride = max(1, math.ceil(len(finite) / POINTS_PER_CURVE))
        kept_points = list(finite[::stride])
        if finite and kept_points[-1] != finite[-1]:
            kept_points.append(finite[-1])
        values += [{across: at, "value": value, "series": series_name} for at, value in kept_points]
    if not values:
        return None
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_line(strokeWidth=2, point=len(values) <= 20 * len(lines))
        .encode(
            x=alt.X(f"{across}:Q", title=across, axis=alt.Axis(format="~s", tickCount=6)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False), axis=alt.Axis(format=".4~g", tickCount=5)),
            color=_colour(list(lines), legend=len(lines) > 1),
            tooltip=[alt.Tooltip("series:N"), alt.Tooltip(f"{across}:Q"), alt.Tooltip("value:Q", format=".4~g")],
        )
    )
    caption = f"{left_out} points that are not finite are left out." if left_out else ""
    return Drawing(_finished(chart, 180, description), title, caption)


def damage_by_example(found: Sequence[Point]) -> Drawing | None:
    """How much the loss of each single example rose, a tick each; None when it was not looked at."""
    every = [(p, p.records[0].damage) for p in found if p.records[0].damage is not None]
    values = [
        {"series": p.series, "rise": difference, "example": i}
        for p, damage in every
        if damage is not None
        for i, difference in enumerate(damage.differences)
        if math.isfinite(difference)
    ]
    if not values:
        return None
    names = [p.series for p, _ in every]
    lost = sum(len(damage.differences) for _, damage in every if damage is not None) - len(values)
    chart = (
        alt.Chart(alt.InlineData(values=values))
        .mark_tick(thickness=2, opacity=0.55)
        .encode(
            x=alt.X("rise:Q", title="loss after - loss before (nats)", axis=alt.Axis(format=".3~g", tickCount=6)),
            y=alt.Y("series:N", sort=names, title=None, axis=alt.Axis(labelLimit=180)),
            color=_colour(names, legend=False),
            tooltip=[
                alt.Tooltip("series:N", title="method"),
                alt.Tooltip("example:Q"),
                alt.Tooltip("rise:Q", title="rise", format=".4~g"),
            ],
        )
    )
    caption = "A tick is one example; right of zero it got worse." + (
        f" {lost} whose loss is no longer finite are left out." if lost else ""
    )
    spec = _finished(chart, max(70, 30 * len(names)), "how much the loss of each example rose")
    return Drawing(spec, "Example by example", caption)


def kept(row: SiteRow) -> float:
    """The fraction of a site that is still there."""
    return 1 - row.removed / row.weights if row.weights else row.kept / row.units if row.units else 1.0


def kept_in(rows: Sequence[SiteRow], block: str) -> float:
    """The fraction of a block's weights that is still there."""
    mine = [r for r in rows if r.block == block]
    weights = sum(r.weights for r in mine)
    return 1 - sum(r.removed for r in mine) / weights if weights else 1.0


def role(row: SiteRow) -> str:
    """What a site is within its block: its name without the block's."""
    name = row.site.removesuffix(".weight")
    inside = name.removeprefix(row.block + ".") if row.block else name
    return inside or name


def shorten(names: Sequence[str]) -> dict[str, str]:
    """Names without the dotted beginning that they share, as long as they stay different."""
    split = [n.split(".") for n in names if n]
    shared = 0
    if len(split) > 1:
        for level in zip(*split, strict=False):
            if len(set(level)) > 1:
                break
            shared += 1
    short = {n: ".".join(n.split(".")[shared:]) or n or "elsewhere" for n in names}
    return short if len(set(short.values())) == len(set(names)) else {n: n for n in names}


def _megabytes(ledger: Ledger) -> float | None:
    return None if ledger.after.stored_bytes is None else ledger.after.stored_bytes / 1e6


def _quality_chart(
    records: Sequence[Record],
    where: Callable[[Point], float | None],
    start: float | None,
    x: alt.X,
    title: str,
    reading: str,
) -> Drawing | None:
    """Quality over some measure of size, of which `start` is that of the dense model."""
    found = points(records)
    name, whole = metric(records[0]) or "quality", dense(records)
    values: list[dict[str, Any]] = []
    lost: list[dict[str, Any]] = []
    for p in found:
        at = where(p)
        if at is None or p.quality is None:
            continue
        about: dict[str, Any] = {"series": p.series, "x": at, "seeds": len(p.records), "reached": p.reached}
        if math.isfinite(p.quality):
            half = p.half or 0.0
            values.append(
                {
                    **about,
                    "y": p.quality,
                    "low": p.quality - half,
                    "high": p.quality + half,
                    "told": figures.interval(p.quality, p.half),
                }
            )
        else:
            lost.append({**about, "told": f"diverged in {p.diverged} of {len(p.records)}"})
    if not values and not lost:
        return None
    finite_dense = whole if whole is not None and math.isfinite(whole) else None
    spans = [v[key] for v in values for key in ("y", "low", "high")] + ([] if finite_dense is None else [finite_dense])
    heights = [v["y"] for v in values] + ([] if finite_dense is None else [finite_dense])
    logarithmic = "perplexity" in name.lower() and bool(heights) and min(heights) > 0
    clipped = False
    if logarithmic:
        # An interval around a mean may reach below zero, where a logarithm has no place: it is drawn to the edge.
        floor = min(h for h in [*heights, *(s for s in spans if s > min(heights) / 2)])
        clipped = any(v["low"] < floor for v in values)
        for v in values:
            v["low"] = max(v["low"], floor)
        margin = max(1.08, (max(spans) / floor) ** 0.05)
        top = max(spans) * (margin**2 if lost else margin)  # room for the crosses
        floor /= margin
        scale = alt.Scale(type="log", domain=[floor, top], nice=False)
        ticks = _ticks(floor, top)
        axis = alt.Axis(format=",.4~g" if top < 10_000 else "~s", tickCount=6)
        if top > 4 * floor:  # over less than that, the usual ticks are few enough
            axis.values = ticks
    else:
        scale, axis = alt.Scale(zero=False, padding=24 if lost else 8), alt.Axis(format=".4~g", tickCount=6)
    better = "higher" if records[0].task.get("higher_is_better") else "lower"
    y = alt.Y("y:Q", title=f"{name} ({better} is better)", scale=scale, axis=axis)
    names = series(found)
    colour, shape = _colour(names), alt.Shape("series:N", scale=alt.Scale(domain=names, range=_shapes(names)))
    shape = shape.legend(orient="bottom", title=None) if len(names) > 1 else shape.legend(None)
    tips = [
        alt.Tooltip("series:N", title="method"),
        alt.Tooltip("reached:Q", title="sparsity reached", format=".2%"),
        alt.Tooltip("told:N", title=name),
        alt.Tooltip("seeds:Q", title="seeds"),
    ]
    layers: list[alt.Chart] = []
    if values:
        base = alt.Chart(alt.InlineData(values=values)).encode(x=x, color=colour)
        layers.append(base.mark_line(strokeWidth=1.75).encode(y=y, order=alt.Order("reached:Q")))
        layers.append(base.mark_rule(strokeWidth=1.5).encode(y=alt.Y("low:Q", scale=scale), y2="high:Q"))
        layers.append(base.mark_point(size=60, filled=True, opacity=1).encode(y=y, shape=shape, tooltip=tips))
    if lost:
        cross = "M-1,-1L1,1M-1,1L1,-1"
        marks = alt.Chart(alt.InlineData(values=lost)).mark_point(shape=cross, size=45, strokeWidth=2.5, opacity=1)
        layers.append(marks.encode(x=x, y=alt.value(8), color=colour, tooltip=tips))
    if finite_dense is not None:
        line = alt.Chart(alt.InlineData(values=[{"y": finite_dense, "told": f"dense {figures.quality(finite_dense)}"}]))
        layers.append(line.mark_rule(strokeDash=[6, 4], strokeWidth=1.5, color="#808080").encode(y=y))
        if start is not None and len({v["x"] for v in values}) == 1:  # one point alone has nothing to stand against
            whole_model = {"x": start, "y": finite_dense, "told": figures.quality(finite_dense)}
            spot = alt.Chart(alt.InlineData(values=[whole_model]))
            layers.append(spot.mark_point(size=60, filled=True, opacity=1, color="#808080").encode(x=x, y=y))
        # At the end where points are far from the dense model's quality.
        left = start is not None and start > 0
        dy = -7 if better == "lower" else 12
        words = line.mark_text(align="left" if left else "right", dx=4 if left else -4, dy=dy, fontSize=12)
        layers.append(words.encode(x=alt.value(0 if left else "width"), y=y, text="told:N"))
    caption = [reading]
    if any(p.half is not None for p in found):
        caption.append("Upright lines are 95% intervals over the seeds.")
    if clipped:
        caption.append("Intervals that reach beyond the scale are cut off at its edge.")
    if finite_dense is not None:
        caption.append("The dashed line is the model before pruning.")
    if logarithmic:
        caption.append("The upright scale is logarithmic: equal distances are equal factors.")
    if lost:
        caption.append("A cross at the top marks a run that diverged.")
    spec = _finished(alt.layer(*layers), 300, f"{title}: {name} of {', '.join(names)}")
    return Drawing(spec, title, " ".join(caption))


def _heat(
    cells: list[dict[str, Any]], xs: Sequence[str], ys: Sequence[str], x_title: str, y_title: str, tips: Sequence[str]
) -> Drawing:
    chart = (
        alt.Chart(alt.InlineData(values=cells))
        .mark_rect()
        .encode(
            x=alt.X("x:N", sort=list(xs), title=x_title, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("y:N", sort=list(ys), title=y_title or None, axis=alt.Axis(labelLimit=150)),
            color=alt.Color(
                "kept:Q",
                title="kept",
                scale=alt.Scale(scheme="viridis", domain=[0, 1]),
                legend=alt.Legend(orient="bottom", format=".0%", gradientLength=160, direction="horizontal"),
            ),
            tooltip=[*(alt.Tooltip(f"{t}:N") for t in tips), alt.Tooltip("kept:Q", format=".2%")],
        )
    )
    spec = _finished(chart, max(90, 26 * len(ys)), f"fraction kept by {x_title}")
    return Drawing(spec, "Fraction kept", "Yellow: all of it is there. Dark: all of it is gone.")


def _bars(bars: list[dict[str, Any]], what: str) -> Drawing:
    chart = (
        alt.Chart(alt.InlineData(values=bars))
        .mark_bar(color=COLOURS[0])
        .encode(
            x=alt.X("kept:Q", title="kept", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)),
            y=alt.Y("name:N", sort=[b["name"] for b in bars], title=None, axis=alt.Axis(labelLimit=180)),
            tooltip=[alt.Tooltip("name:N", title=what), alt.Tooltip("units:N"), alt.Tooltip("kept:Q", format=".2%")],
        )
    )
    spec = _finished(chart, max(60, 18 * len(bars)), f"fraction kept by {what}")
    return Drawing(spec, "Fraction kept", f"A full bar is a {what} of which nothing was removed.")


def _colour(names: Sequence[str], legend: bool = True) -> alt.Color:
    shown_as = alt.Legend(orient="bottom", title=None) if legend and len(names) > 1 else None
    return alt.Color("series:N", scale=alt.Scale(domain=list(names), range=_colours(names)), legend=shown_as)


def _colours(names: Sequence[str]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(names))]


def _shapes(names: Sequence[str]) -> list[str]:
    # Each time round one further along, so that no pair of colour and shape returns for 64 series.
    return [SHAPES[(i + i // len(SHAPES)) % len(SHAPES)] for i in range(len(names))]


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers for a logarithmic scale, so few that each can have a label."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1, 2, 3, 5), (1, 2, 5), (1,)):
        ticks = [step * 10**decade for decade in decades for step in steps if low <= step * 10**decade <= high]
        if len(ticks) <= 8:
            return ticks
    stride = math.ceil(len(ticks) / 8)
    return ticks[::stride]


def _near() -> alt.Scale:
    return alt.Scale(zero=False, padding=12)


def _finished(chart: alt.Chart | alt.LayerChart | alt.FacetChart, height: int, description: str) -> dict[str, Any]:
    quiet = {"labelFontSize": 12, "titleFontSize": 12, "titleFontWeight": "normal"}
    with alt.data_transformers.enable("default", max_rows=None):
        spec: dict[str, Any] = chart.properties(
            width="container", height=height, description=description, background="transparent"
        ).to_dict()
    del spec["$schema"]  # an address on the web, which nothing here should name
    spec["autosize"] = {"type": "fit-x", "contains": "padding"}
    spec["config"] = {
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "axis": {**quiet, "grid": True},
        "axisQuantitative": {"labelFlush": False, "labelOverlap": "greedy"},
        "axisBand": {"grid": False},
        "legend": {**quiet, "labelLimit": 220},
    }
    return spec
