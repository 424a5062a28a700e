"""`secateur list`: the catalogue."""

from collections.abc import Iterable
from typing import Any

import click

from secateur.cli.options import spoken, terminal


@click.command("list")
@click.option("--when", metavar="WHEN", help="before, during, after or around training, at inference, recovery.")
@click.option("--granularity", metavar="KIND", help="What is removed: weight, channel, head, expert, layer, ...")
@click.option("--family", metavar="FAMILY", help="For this kind of network: decoder, encoder, cnn, rnn, ...")
@click.option("--needs", metavar="NEED", help="What it asks for: calibration, labels, training; or nothing.")
@spoken
def command(when: str | None, granularity: str | None, family: str | None, needs: str | None, **spoken: Any) -> None:
    """Every method: its paper, when it runs, what it needs, and whether its claim held here."""
    import typing

    from secateur.claims import results
    from secateur.method import SPECIAL_FAMILIES, When, load, names

    cards = {name: load(name).card for name in names()}
    whens = typing.get_args(When)
    if when is not None:
        short = {w.removesuffix(" training").removeprefix("at "): w for w in whens}
        when = short.get(when, when.replace("-", " "))
        _known("--when", when, (*whens, *short))
    if granularity is not None:
        _known("--granularity", granularity, (g for c in cards.values() for g in c.granularity))
    if family is not None:
        _known("--family", family, (f for c in cards.values() for f in c.families))
    if needs is not None:
        _known(
            "--needs",
            needs,
            ("nothing", "calibration", "labels", "training", *(n for c in cards.values() for n in c.needs)),
        )
    measured = results()
    rows = [
        {
            "name": name,
            "number": card.number,
            "title": card.title,
            "year": card.year,
            "arxiv": card.arxiv,
            "when": card.when,
            "granularity": list(card.granularity),
            "families": list(card.families),
            "needs": list(card.needs),
            "verdict": measured[name].verdict if name in measured else "not measured",
        }
        for name, card in sorted(cards.items(), key=lambda item: (item[1].number == 0, item[0]))
        if when in (None, card.when)
        and (granularity is None or granularity in card.granularity)
        and (family is None or family in card.families or ("any" in card.families and family not in SPECIAL_FAMILIES))
        and (needs is None or needs in card.needs or (needs == "nothing" and not card.needs))
    ]
    speaker = terminal(spoken)
    speaker.emit(rows)
    if not speaker.as_json:
        _show(speaker, rows)


WIDE = 100  # columns of a terminal, from which on the year has room


def _known(option: str, value: str, values: Iterable[str]) -> None:
    from secateur.errors import SettingError, did_you_mean

    if value not in (known := set(values)):
        raise SettingError(
            f"{option} {value} was asked for", "no method says that of itself", did_you_mean(value, known)
        )


def _in_short(families: list[str]) -> str:
    """The families a method takes, or those it does not, whichever says it in fewer words."""
    from secateur.method import FAMILIES

    missing = [family for family in FAMILIES if family not in families]
    return f"all but {', '.join(missing)}" if 0 < len(missing) < 3 and "any" not in families else ", ".join(families)


def _widths(heads: list[str], cells: list[dict[str, str]], room: int, between: int) -> list[int]:
    """Widths of columns that break no word, the rest of the room given where lines are saved; whole where all fits."""
    each = [[head, *(cell[head] for cell in cells)] for head in heads]
    widths = [max(len(word) for text in texts for word in text.split()) for texts in each]
    left = room - sum(widths) - between * (len(heads) - 1)
    for place, texts in enumerate(each):
        more = min(max(left, 0), max(map(len, texts)) - widths[place])
        widths[place] += more
        left -= more
    return widths


def _show(speaker: Any, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table

    style = {"holds": "green", "does not hold at this size": "red", "inconclusive": "yellow"}
    cells = [
        {
            "method": row["name"],
            "NN": str(row["number"]) if row["number"] else "-",
            "year": str(row["year"] or ""),
            "when": row["when"],
            "removes": ", ".join(row["granularity"]),
            "needs": ", ".join(row["needs"]) or "nothing",
            "models": _in_short(row["families"]),
            "claim, here": row["verdict"],
        }
        for row in rows
    ]
    heads = [head for head in cells[0] if head != "year" or speaker.result.width >= WIDE] if cells else []
    shown = table(*heads, right=("NN", "year"), whole=("method",))
    shown.collapse_padding = speaker.result.width < WIDE
    between = 1 if shown.collapse_padding else 2
    for column, width in zip(shown.columns, _widths(heads, cells, speaker.result.width, between), strict=True):
        column.width = width
    for cell in cells:
        verdict = cell["claim, here"]
        marked = cell | {
            "method": f"[bold]{escape(cell['method'])}[/]",
            "claim, here": f"[{style.get(verdict, 'dim')}]{verdict}[/]",
        }
        shown.add_row(*(marked[head] for head in heads))
    if not rows:
        speaker.show("No method is all of that.")
        return
    speaker.show(shown)
    speaker.show(f"\n{len(rows)} methods; `secateur explain METHOD` says more of one.")
