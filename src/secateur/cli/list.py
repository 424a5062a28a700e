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
    from secateur.method import When, load, names

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
        and (family is None or family in card.families or "any" in card.families)
        and (needs is None or needs in card.needs or (needs == "nothing" and not card.needs))
    ]
    speaker = terminal(spoken)
    speaker.emit(rows)
    if not speaker.as_json:
        _show(speaker, rows)


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


def _show(speaker: Any, rows: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table

    style = {"holds": "green", "does not hold at this size": "red", "inconclusive": "yellow"}
    heads = ("method", "NN", "year", "when", "removes", "needs", "models", "claim, here")
    shown = table(*heads, right=("NN", "year"), whole=("method", "when"))
    for row in rows:
        verdict = row["verdict"]
        shown.add_row(
            f"[bold]{escape(row['name'])}[/]",
            str(row["number"]) if row["number"] else "-",
            str(row["year"] or ""),
            row["when"],
            ", ".join(row["granularity"]),
            ", ".join(row["needs"]) or "nothing",
            _in_short(row["families"]),
            f"[{style.get(verdict, 'dim')}]{verdict}[/]",
        )
    if not rows:
        speaker.show("No method is all of that.")
        return
    speaker.show(shown)
    speaker.show(f"\n{len(rows)} methods; `secateur explain METHOD` says more of one.")
