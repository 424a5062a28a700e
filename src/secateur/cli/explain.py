"""`secateur explain`: one method, whole."""

import inspect
import re
import sys
from collections.abc import Iterable
from dataclasses import MISSING, is_dataclass
from typing import Any

import click

from secateur.cli.options import metavar, spoken, terminal


@click.command("explain")
@click.argument("method")
@spoken
def command(method: str, **spoken: Any) -> None:
    """One method: the idea, the settings, what the paper reports, what was measured here.

    METHOD may also be a part that settings take: owl, global, per-row, ...
    """
    from secateur.described import DESCRIBED
    from secateur.method import load, names

    speaker = terminal(spoken)
    name = method if method in names() else method.replace("-", "_")
    if name not in names():
        if name in DESCRIBED:
            load(name)  # raises, with what is known of it
        about = _part(method)
        speaker.emit(about)
        if not speaker.as_json:
            _show_part(speaker, about)
        return
    about = _method(name, load(name))
    speaker.emit(about)
    if not speaker.as_json:
        _show(speaker, about)


def _method(name: str, kind: Any) -> dict[str, Any]:
    from dataclasses import asdict

    from secateur.claims import results
    from secateur.registry import of_method

    claim = results().get(name)
    row = of_method(name, kind, claim)
    about = (
        asdict(kind.card)
        | row.about()
        | {
            "told": row.told,
            "idea": inspect.cleandoc(sys.modules[kind.__module__].__doc__ or ""),
            "does": inspect.cleandoc(kind.__doc__ or ""),
            "settings": _settings(kind),
            "measured": None,
        }
    )
    if claim is not None:
        about["measured"] = {
            "verdict": claim.verdict,
            "says": claim.says,
            "source": claim.source,
            "here": claim.here,
            "seeds": len(claim.seeds),
            "findings": [{"says": f.says, "verdict": f.verdict, "central": f.central} for f in claim.findings],
        }
    return about


def _settings(kind: Any) -> list[dict[str, Any]]:
    from secateur.axes import words
    from secateur.recipe import fitting, settings_of, text_of_value

    known = words(sys.modules[kind.__module__])
    return [
        {
            "name": setting.name,
            "type": setting.written,
            "default": None if setting.default is MISSING else text_of_value(setting.default),
            "comment": setting.comment,
            "choices": list(setting.choices) or (sorted(fitting(setting.hint, known)) if setting.part else []),
            "metavar": metavar(setting),
        }
        for setting in settings_of(kind).values()
    ]


def _show(speaker: Any, about: dict[str, Any]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table

    speaker.show(f"{about['name']}\n")
    speaker.show(about["idea"] + "\n")
    speaker.show(about["does"] + "\n")
    facts = table("", "")
    source = ", ".join(
        str(v) for v in (f"arXiv:{about['arxiv']}" if about["arxiv"] else "", about["venue"], about["year"]) if v
    )
    number = f" (paper {about['number']} of this project)" if about["number"] else ""
    facts.show_header = False
    for head, text in (
        ("paper", f"{about['title']}. {source}{number}"),
        ("when", about["when"]),
        ("removes", ", ".join(about["granularity"])),
        ("models", ", ".join(about["families"])),
        ("needs", ", ".join(about["needs"]) or "nothing but the model"),
        ("reports", about["reports"] or "nothing that was noted"),
        ("measured", _measured(about["measured"])),
        ("pinned by", about["checked"]),
        *(("differs", line) for line in about["differs"]),
    ):
        if text:
            facts.add_row(f"[bold]{head}[/]", escape(str(text)))
    speaker.show(facts)
    speaker.show("\nOn the survey's axes, each an option of `secateur list`:")
    shown = table("axis", "")
    for axis, values in about["told"].items():
        shown.add_row(f"[bold]{axis}[/]", escape(values))
    speaker.show(shown)
    _show_settings(speaker, about["settings"])


def _measured(found: dict[str, Any] | None) -> str:
    if found is None:
        return "not yet"
    lines = [f"{found['verdict']}, over {found['seeds']} seeds. {found['here']}"]
    lines += [f"{f['verdict']}: {f['says']}" for f in found["findings"]]
    return "\n".join(lines)


def _show_settings(speaker: Any, settings: list[dict[str, Any]]) -> None:
    from rich.markup import escape

    from secateur.cli.terminal import table

    if not settings:
        return
    shown = table("setting", "type", "default", "", title="\nSettings, each an option of `secateur prune`")
    for each in settings:
        comment = each["comment"]
        choices = f"{'.' * bool(comment)} One of: {', '.join(each['choices'])}." if each["choices"] else ""
        default = "required" if each["default"] is None else each["default"] or "none"
        option = f"--{each['name'].replace('_', '-')}"
        shown.add_row(f"[bold]{option}[/]", escape(each["type"]), escape(default), escape((comment + choices).strip()))
    speaker.show(shown)


def _part(word: str) -> dict[str, Any]:
    """A part by the word it goes by. Raises SettingError, with the nearest word, for what is none."""
    from secateur.axes import words

    shared = words()
    key = _plain(word)
    taken = {} if key in shared else _of_methods()
    if key in shared:
        found = [shared[key]]
    elif key in taken:
        found = [*taken[key]]
    else:
        raise _unknown(word, {*shared, *taken})
    first, *others = (_about(word, kind, taken.get(key, {}).get(kind, [])) for kind in found)
    return first | ({"others": others} if others else {})


def _plain(word: str) -> str:
    """The name under which a part is kept: `2:4` and `N:M` are nm, `4x1` and `RxC` blocks."""
    for shape, key in ((r"[\dnm]+:[\dnm]+", "nm"), (r"(\d+|r)x(\d+|c)", "blocks")):
        if re.fullmatch(shape, word, re.IGNORECASE):
            return key
    return word.replace("_", "-")


def _of_methods() -> dict[str, dict[type, list[str]]]:
    """The parts that settings take, by name, with whose they are: a word can mean one thing in each method."""
    from secateur.axes import words
    from secateur.method import load, names
    from secateur.recipe import fitting, settings_of

    found: dict[str, dict[type, list[str]]] = {}
    for name in names():
        kind = load(name)
        known = words(sys.modules[kind.__module__])
        for setting in settings_of(kind).values():
            for word, part in fitting(setting.hint, known).items():
                found.setdefault(word, {}).setdefault(part, []).append(f"{name} --{setting.name.replace('_', '-')}")
    return found


def _unknown(word: str, parts: Iterable[str]) -> Exception:
    from secateur.errors import SettingError, nearest
    from secateur.method import names

    return SettingError(
        f"method {word!r} was asked for",
        "neither a method nor a part goes by that name",
        nearest(word, {*names(), *parts})
        + "`secateur list` has every method, and `secateur explain METHOD` the parts its settings take.",
    )


def _about(word: str, kind: Any, takers: list[str]) -> dict[str, Any]:
    settings = _settings(kind) if is_dataclass(kind) else []
    about = {"name": word, "idea": inspect.cleandoc(kind.__doc__ or ""), "settings": settings}
    return about | ({"takers": takers} if takers else {})


def _show_part(speaker: Any, about: dict[str, Any]) -> None:
    for each in (about, *about.get("others", [])):
        of = f" of {', '.join(each['takers'])}" if "takers" in each else " of methods"
        speaker.show(f"{each['name']}, a part that settings{of} take\n")
        speaker.show(each["idea"])
        _show_settings(speaker, each["settings"])
