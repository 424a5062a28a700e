"""`secateur list`: the catalogue."""

from typing import Any

import click

from secateur.cli.options import spoken, terminal

AXES = {
    "when": "before, during, after or around training, at inference, recovery.",
    "granularity": "What is removed: weight, channel, head, expert, layer, ...",
    "family": "For this kind of network: decoder (or LLM), encoder, cnn, rnn, moe, ...",
    "needs": "What it asks for: calibration, labels, training; or nothing.",
    "stage": "When, in detail: one-shot, prune-and-finetune, rewinding, sparse-to-sparse, score-or-mask, ...",
    "criterion": "What a unit is judged by: magnitude, norm, first-order, activation, similarity, learned, ...",
    "pattern": "What zeros lie in: unstructured, N:M, block, 1xN, taps, structured.",
    "speedup": "universal: faster with dense kernels; specific: where zeros have kernels of their own.",
    "execution": "What the result runs as here: dense, or a format: NM, Bitmap, Block, GroupCols, ...",
    "gradients": "Of the loss: none, first, second.",
    "updates": "What becomes of the weights that stay: none, solved (without training), trained.",
    "data": "none, unlabelled, labels.",
    "supervision": "none, self-supervised, supervised.",
    "choice": "data-free or data-driven, whatever is trained on afterwards.",
    "scope": "layer-wise or global.",
    "allocation": "How the budget is spent: uniform, ERK, score-driven, learned, ...",
    "schedule": "one-shot, geometric, cubic, linear, custom.",
    "retraining": "none, finetune, weight-rewind, LR-rewind, from-scratch.",
    "learns": "What of the choice is learnt: none, masks-or-gates, meta-network, bi-level, search, ...",
    "fusion": "With quantisation, low-rank, distillation, architecture-search; or none.",
    "start": "From weights that are initialised or pretrained.",
    "input": "static, or dynamic: other units for other inputs.",
    "transfer": "For the original-task, or a target-task.",
    "model": "The survey's words: CNN, ViT, BERT, LLM, MoE, RNN, diffusion, vision-language, SR, ...",
    "task": "What its paper is about: classification, language-modelling, detection, ...",
    "status": "implemented, partial (its claim is not measured), registry-only.",
}  # fmt: skip
"""Every axis of `secateur.registry` and what it says; the first four are the oldest."""

ANSWERS = ("sparse_kernels", "training", "calibration", "pretrained", "target")  # that only a recommendation asks for


def _axes(function: Any) -> Any:
    for name, help in reversed(AXES.items()):
        function = click.option(f"--{name}", is_flag=False, flag_value="", metavar="[A,B]", help=help)(function)
    return function


def _answers(function: Any) -> Any:
    for decorate in (
        click.option("--target", help="What is to be smaller: parameters, flops, latency, bytes. [default: flops]"),
        click.option("--pretrained/--no-pretrained", default=None, help="A trained model is given. [default: yes]"),
        click.option("--calibration/--no-calibration", default=None, help="Examples are there. [default: yes]"),
        click.option("--training/--no-training", default=None, help="Training can be afforded. [default: yes]"),
        click.option(
            "--sparse-kernels/--no-sparse-kernels",
            default=None,
            help="Zeros have a library or device of their own. [default: no]",
        ),
        click.option(
            "--recommend",
            is_flag=True,
            help="Walk from what you have (options below, --no-labels, --family) to methods of this list.",
        ),
    ):
        function = decorate(function)
    return function


@click.command("list")
@_axes
@click.option("--no-update", is_flag=True, help="Only methods that can leave the weights that stay as they are.")
@click.option("--labels/--no-labels", default=None, help="Only methods that ask for labels, or for none.")
@click.option("--remeasured", is_flag=True, help="Every expectation that was measured here, and how far off it was.")
@click.option("--all", "everything", is_flag=True, help="Studies, and methods that are only described, as well.")
@_answers
@spoken
def command(
    no_update: bool,
    labels: bool | None,
    remeasured: bool,
    everything: bool,
    recommend: bool,
    sparse_kernels: bool | None,
    training: bool | None,
    calibration: bool | None,
    pretrained: bool | None,
    target: str | None,
    **spoken: Any,
) -> None:
    """Every method: its paper, when it runs, what it needs, and whether its claim held here.

    An option per axis of the survey of pruning (arXiv:2308.06767); of several values, any. An axis without a value
    groups the list by it: `secateur list --pattern N:M --criterion`.
    """
    from secateur.errors import SettingError
    from secateur.registry import Situation, grouped, query, rows

    speaker = terminal(spoken)
    answers = dict(zip(ANSWERS, (sparse_kernels, training, calibration, pretrained, target), strict=True))
    given = {axis: spoken[axis] for axis in AXES if spoken[axis] is not None}
    if recommend:
        others = [f"--{axis}" for axis in given if axis != "family"]
        others += [
            o for o, on in (("--no-update", no_update), ("--remeasured", remeasured), ("--all", everything)) if on
        ]
        if others or given.get("family") == "":
            raise SettingError(
                f"a recommendation was asked for with {(others or ['--family'])[0]}",
                "it is made from what you have, not from what methods say",
                "Give --family FAMILY and the answers, or leave --recommend out.",
            )
        told = {name: value for name, value in answers.items() if value is not None}
        _recommend(
            speaker,
            Situation(**told, labels=labels is not False, family=given.get("family")),  # type: ignore[arg-type]  # options carry their types in click, not here
        )
        return
    stray = next((name for name, value in answers.items() if value is not None), None)
    if stray is not None:
        raise SettingError(
            f"--{stray.replace('_', '-')} was given", "it is an answer for --recommend", "Add --recommend, or leave it."
        )
    found = rows(studies=everything, described=everything)
    for axis, value in given.items():
        if value:
            found = _asked(axis, value, found)
    if no_update:
        found = query(found, updates="none")
    if labels is not None:
        found = query(found, data="labels" if labels else ("none", "unlabelled"))
    bare = [axis for axis, value in given.items() if not value]
    if len(bare) > 1 or (bare and remeasured):
        raise SettingError(
            f"the list was to be grouped by {' and '.join([*bare, 'what was measured'][:2])}",
            "it is grouped by one thing",
            "Give a value to the others.",
        )
    if remeasured:
        _remeasured(speaker, found)
    elif bare:
        _grouped(speaker, bare[0], grouped(found, bare[0]))
    else:
        about = [row.about() for row in found]
        speaker.emit(about)
        if not speaker.as_json:
            _show(speaker, about)


def _asked(axis: str, value: str, found: Any) -> Any:
    """The rows that have one of some values. Raises SettingError that names the option."""
    from secateur.errors import SettingError
    from secateur.registry import query

    try:
        return query(found, **{axis: tuple(each.strip() for each in value.split(","))})
    except SettingError as error:
        raise SettingError(f"--{axis} {value} was asked for", error.found, error.do) from error


def _grouped(speaker: Any, axis: str, found: dict[str, list[str]]) -> None:
    """A value of an axis in a line, with the methods that have it."""
    from rich.markup import escape

    from secateur.cli.terminal import table

    speaker.emit([{axis: value, "methods": names} for value, names in found.items()])
    if speaker.as_json:
        return
    if not found:
        speaker.show("No method is all of that.")
        return
    shown = table(axis, "methods")
    for value, names in found.items():
        shown.add_row(f"[bold]{escape(value)}[/]", ", ".join(names))
    speaker.show(shown)


def _remeasured(speaker: Any, found: Any) -> None:
    """Every expectation of the claims of some rows: what was asked for, what came out, how far that is off."""
    from dataclasses import asdict

    from rich.markup import escape

    from secateur.cli.terminal import table

    told = [(row, each) for row in found for each in row.remeasured]
    speaker.emit([{"name": row.name, **asdict(each), "off": each.off} for row, each in told])
    if speaker.as_json:
        return
    if not told:
        speaker.show("No claim of these was measured.")
        return
    shown = table("method", "expected", "more than", "here", "off by", "verdict", right=("more than", "here", "off by"))
    for row, each in told:
        times, says = "x" if each.ratio else "", each.says if each.central else f"({each.says})"
        off = f"{each.off:+.1%}" if each.ratio else f"{each.off:+.3g}"
        verdict = f"[{STYLE.get(each.verdict, 'dim')}]{each.verdict}[/]"
        shown.add_row(row.name, escape(says), f"{each.asked:g}{times}", f"{each.ours:.3g}{times}", off, verdict)
    speaker.show(shown)
    claims = len({row.name for row, _ in told})
    speaker.show(
        f"\n{len(told)} expectations of {claims} claims; off by: what came out less what was asked for, of factors in "
        "per cent. In brackets: the verdict on the claim does not hang on it."
    )


def _recommend(speaker: Any, situation: Any) -> None:
    """The walk, and where it ends."""
    from rich.markup import escape

    from secateur.cli.terminal import table
    from secateur.registry import recommend

    advice = recommend(situation)
    speaker.emit(
        {
            "steps": [vars(step) for step in advice.steps],
            "methods": [row.about() for row in advice.rows],
            "beside": list(advice.beside),
            "commands": advice.commands,
        }
    )
    if speaker.as_json:
        return
    shown = table("question", "answer", "so", "left", right=("left",))
    for step in advice.steps:
        shown.add_row(step.question, f"[bold]{escape(step.answer)}[/]", escape(step.so), str(step.left))
    speaker.show(shown)
    speaker.show("")
    _show(speaker, [row.about() for row in advice.rows])
    speaker.show(f"\nAlways beside it: {', '.join(escape(each) for each in advice.beside)}.")
    for line in advice.commands:
        speaker.show(f"  {escape(line)}")


STYLE = {"holds": "green", "does not hold at this size": "red", "inconclusive": "yellow"}
WIDE = 100  # columns of a terminal, from which on the year has room


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
    between = 1 if speaker.result.width < WIDE else 2
    if sum(_widths(heads, cells, 0, between)) + between * (len(heads) - 1) > speaker.result.width:
        heads.remove("NN")  # rather than break words
    shown = table(*heads, right=("NN", "year"), whole=("method",))
    shown.collapse_padding = speaker.result.width < WIDE
    for column, width in zip(shown.columns, _widths(heads, cells, speaker.result.width, between), strict=True):
        column.width = width
    for cell in cells:
        verdict = cell["claim, here"]
        marked = cell | {
            "method": f"[bold]{escape(cell['method'])}[/]",
            "claim, here": f"[{STYLE.get(verdict, 'dim')}]{verdict}[/]",
        }
        shown.add_row(*(marked[head] for head in heads))
    if not rows:
        speaker.show("No method is all of that.")
        return
    speaker.show(shown)
    told = [_counted(sum(row["sort"] == sort for row in rows), one, many) for sort, one, many in SORTS]
    speaker.show(f"\n{', '.join(filter(None, told))}; `secateur explain METHOD` says more.")


SORTS = (("method", "method", "methods"), ("study", "study", "studies"), ("described", *["only described"] * 2))


def _counted(count: int, one: str, many: str) -> str:
    return f"{count} {one if count == 1 else many}" if count else ""
