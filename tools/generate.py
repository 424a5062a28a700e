"""Writes what is derived from the code, so that no table is kept by hand.

python tools/generate.py            writes every generated file that is stale
python tools/generate.py --check    says which are stale, and fails if any is

README.md                       what stands between <!-- methods -->, <!-- session -->, <!-- speed --> and
                                <!-- figure --> marks
docs/figure.svg                 the README's figure, from the result of a claim
src/secateur/methods/README.md  the catalogue
docs/reference/*.md             a page per method and per study: idea, source, settings
claims/README.md                every claim, what was measured, the verdict
docs/record.schema.json         the run record
docs/claim.schema.json          the result of a claim
docs/*speed.md, docs/*/*speed.md  the tables of the benchmarks, from their results; those of other processors apart
docs/coverage.md                the networks of the zoo, from what tests/test_zoo.py found of each
"""

import argparse
import hashlib
import importlib
import inspect
import json
import pkgutil
import sys
from dataclasses import MISSING
from pathlib import Path
from textwrap import wrap
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import secateur.studies  # noqa: E402
from benchmarks import kept, peers, whole_models  # noqa: E402
from claims import harness  # noqa: E402
from secateur import method as catalogue  # noqa: E402
from secateur import registry  # noqa: E402
from secateur.claims import ClaimResult, Figure, Finding, claim_schema  # noqa: E402
from secateur.method import Card, Method  # noqa: E402
from secateur.outcome import Record, record_schema, write_text  # noqa: E402
from secateur.recipe import settings_of, text_of_value  # noqa: E402
from secateur.report import summary  # noqa: E402

RECORDS = ROOT / "docs" / "records"
COVERAGE = ROOT / "docs" / "coverage.json"
NOTE = "<!-- Written by tools/generate.py: do not edit. -->"


def generated() -> dict[str, str]:
    """Every generated file by its path in the repository, with the text it should have."""
    methods = {name: catalogue.load(name) for name in catalogue.names()}
    measured = claim_results(large=False)
    pages = {
        "src/secateur/methods/README.md": methods_page(methods, measured),
        "claims/README.md": claims_page(measured, claim_results(large=True)),
        "docs/reference/README.md": reference_index(methods),
        "docs/record.schema.json": json.dumps(record_schema(), indent=1, sort_keys=True) + "\n",
        "docs/claim.schema.json": json.dumps(claim_schema(), indent=1, sort_keys=True) + "\n",
    }
    for name, kind in methods.items():
        pages[f"docs/reference/{name}.md"] = method_page(name, kind, measured.get(name))
    for name, module in studies().items():
        pages[f"docs/reference/{name}.md"] = study_page(name, module, measured.get(name))
    pages |= benchmark_pages()
    if COVERAGE.exists():
        pages["docs/coverage.md"] = coverage_page(json.loads(COVERAGE.read_text(encoding="utf-8")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    catalogued = [method_table(methods, measured, "docs/reference/"), study_table(methods, measured, "docs/reference/")]
    readme = between(readme, "methods", "\n\nStudies, in `secateur.studies`:\n\n".join(catalogued))
    readme = between(readme, "session", session(records(RECORDS / "session")))
    readme = between(readme, "speed", speed_text())
    drawn = measured.get(FIGURE)
    pages["README.md"] = between(readme, "figure", figure_text(drawn))
    if drawn is not None:
        pages["docs/figure.svg"] = figure(drawn)
    return pages


def between(text: str, mark: str, found: str) -> str:
    """A text with what stands between <!-- mark --> and <!-- /mark --> replaced; as it is, without the marks."""
    start, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    if start not in text or end not in text:
        return text
    head, rest = text.split(start, 1)
    return f"{head}{start}\n\n{found}\n\n{end}{rest.split(end, 1)[1]}"


def records(folder: Path) -> list[Record]:
    """The run records of a folder, by file name."""
    return [Record.read(path) for path in sorted(folder.glob("*.json"))]


def session(found: list[Record]) -> str:
    """What was typed and what came of it, from the records of those runs."""
    lines = [line for record in found for line in (f"$ {record.command}", *wrap(summary(record), 110), "")]
    return "\n".join(["```", *lines[:-1], "```"]) if lines else ""


SPEEDS = (  # what is told of, its zeros, the cell it is measured in, ours and, where a precision differs, theirs
    ("SmolLM2-135M, bfloat16, a token", "smollm2 0.5", "secateur bf16", "bf16"),
    ("SmolLM2-135M, 8 bits, a token", "smollm2 0.5", "secateur 8 bits", "Q8_0"),
    ("ResNet-20, a picture", "resnet20 0.8", "secateur", ""),
    ("ResNet-20 four times as wide, 16 pictures", "wide-resnet20 0.8", "secateur", ""),
    ("MobileNet-v1, a picture", "mobilenet 0.5", "secateur", ""),
    ("MobileNet-v1, a picture", "mobilenet 0.8", "secateur", ""),
    (f"perceptron of {'-'.join(map(str, peers.SIZES))}", "mlp 0.8", "secateur", ""),
)
PEERS = ("ONNX Runtime", "OpenVINO", "DeepSparse", "llama.cpp")


def speed_text() -> str:
    """A table for each processor: how many times as fast zeros are as the same weights elsewhere."""
    lines = [
        "Masks are at random, and what zeros cost is another line. Each figure is how many times as fast the "
        "accelerated model is as the same weights elsewhere: one thread, medians of runs that took turns. Below 1 it "
        "is slower. A language model runs elsewhere in bfloat16 or float32, whichever is faster there, and in "
        "llama.cpp as bf16, or as Q8_0 beside 8 bits.",
    ]
    for result, page in kept.everywhere(peers.RESULT, peers.PAGE):
        found = kept.read(result, {})
        cells = {cell["name"]: cell["milliseconds"] for cell in found["cells"]}
        said = f"{kept.processor(found['machine'])}, {found['level']}"
        lines += ["", *table(said, "zeros", "torch", "torch at its best", *PEERS)]
        for what, cell, ours, precision in SPEEDS:
            if cell in cells:
                lines.append(row(what, f"{float(cell.split()[1]):.0%}", *ratios(cells[cell], ours, precision)))
        lines += reading(result.with_name(whole_models.RESULT.name))
        lines += ["", f"[All of them]({page.relative_to(ROOT)}), with versions and dates."]
    return "\n".join(lines)


def ratios(milliseconds: dict[str, float], ours: str, precision: str) -> list[str]:
    """How many times as fast one way is as torch eager, torch at its best and each peer; blank where one is missing."""
    torch = {name: ms for name, ms in milliseconds.items() if name.startswith("torch")}
    eager = next(iter(torch.values()))
    best = {name: [ms for at, ms in milliseconds.items() if at.startswith(name)] for name in PEERS}
    best["llama.cpp"] = [ms for at, ms in milliseconds.items() if at == f"llama.cpp {precision}"]
    rivals = [eager, min(torch.values()), *(min(found, default=None) for found in best.values())]
    return ["" if ms is None else f"{ms / milliseconds[ours]:.2f}" for ms in rivals]


def reading(path: Path) -> list[str]:
    """The lines of a prompt that is read at once: where zeros gain least, and where layers were chosen for it."""
    ways = {way["name"]: way["read"] for way in kept.read(path, {})["ways"]}
    dense = [ways["torch, bfloat16"], min(ms for name, ms in ways.items() if name.startswith("torch"))]
    said = f"SmolLM2-135M, bfloat16, a prompt of {whole_models.WINDOW}"
    forms = {
        "accelerated, 50% zeros": said,
        "accelerated for prompts, 50% zeros, compiled": f"{said}, accelerated for prompts and compiled",
    }
    return [
        row(name, "50%", *(f"{ms / ways[form]:.2f}" for ms in dense), *("" for _ in PEERS))
        for form, name in forms.items()
        if form in ways
    ]


FIGURE = "global_mp"  # the claim that the README's figure is drawn from
ARMS = {"global": "one threshold for all layers", "erk": "by the shape of the layer", "uniform": "the same everywhere"}


def figure_text(result: ClaimResult | None) -> str:
    """The figure, and under it what it shows and how it was made."""
    if result is None:
        return ""
    said = "Accuracy against sparsity: magnitude pruning of a ResNet-20, by how the budget is spent over the layers."
    return "\n".join(
        [
            f"![{said}](docs/figure.svg)",
            "",
            f"{said} {result.here} Bars are 95 % intervals over {len(result.seeds)} seeds. Made by "
            f"`make claims NAME={result.name}`.",
        ]
    )


def figure(result: ClaimResult) -> str:
    """The figure, its first line a fingerprint of the result: drawings differ by machine, results do not."""
    import altair as alt

    rows = [
        {"method": ARMS[arm], "sparsity": float(at), "accuracy": f.mean, "low": f.low, "high": f.high}
        for f in result.figures
        if f.metric == "accuracy"
        for arm, _, at in [f.condition.partition("@")]
        if arm in ARMS
    ]
    x = alt.X(
        "sparsity:Q", title="fraction of the weights removed", scale=alt.Scale(zero=False), axis=alt.Axis(format="%")
    )
    y = alt.Y("accuracy:Q", title="accuracy on CIFAR-10", axis=alt.Axis(format="%"))
    colour = alt.Color("method:N", title="budget spent", scale=alt.Scale(scheme="dark2"))
    data = alt.Chart(alt.Data(values=rows))
    drawing = data.mark_line(point=True).encode(x, y, colour) + data.mark_rule().encode(
        x, alt.Y("low:Q", title=""), alt.Y2("high:Q"), colour
    )
    text = json.dumps(rows, sort_keys=True)
    import vl_convert

    svg = vl_convert.vegalite_to_svg(drawing.properties(width=520, height=280).to_dict())
    return f"<!-- figures {hashlib.sha256(text.encode()).hexdigest()} -->\n{svg}\n"


def stale(pages: dict[str, str]) -> list[str]:
    """The generated files that are not what they should be, and those that should not be there."""
    found = [path for path, text in pages.items() if not (ROOT / path).exists() or not _same(path, text)]
    gone = [p.relative_to(ROOT).as_posix() for p in (ROOT / "docs/reference").glob("*.md")]
    return sorted([*found, *(path for path in gone if path not in pages)])


def _same(path: str, text: str) -> bool:
    there = _read(path)
    return there.split("\n", 1)[0] == text.split("\n", 1)[0] if path.endswith(".svg") else there == text


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def benchmark_pages() -> dict[str, str]:
    """The page of each benchmark that has been run."""
    pages = {}
    for path in sorted((ROOT / "benchmarks").glob("*.py")):
        module = importlib.import_module(f"benchmarks.{path.stem}")
        if hasattr(module, "RESULT"):  # plain.py is what is measured against
            for result, page in kept.everywhere(module.RESULT, module.PAGE):
                pages[str(page.relative_to(ROOT))] = module.page(kept.read(result, {}))
    return pages


def claim_results(large: bool) -> dict[str, ClaimResult]:
    """The measured claims of the repository by name: at our size, or with their large settings."""
    found = (ClaimResult.read(path) for path in sorted(harness.RESULTS.glob("*.json")))
    return {result.name: result for result in found if result.large == large}


def studies() -> dict[str, ModuleType]:
    """The studies by name."""
    names = sorted(m.name for m in pkgutil.iter_modules(secateur.studies.__path__) if not m.name.startswith("_"))
    return {name: importlib.import_module(f"secateur.studies.{name}") for name in names}


# Tables


def row(*cells: object) -> str:
    """A line of a table."""
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(*heads: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*heads), "|" + " --- |" * len(heads)]


def paper(card: Card) -> str:
    """A paper as a link where it is on arXiv."""
    if card.arxiv:
        return f"[{card.title}](https://arxiv.org/abs/{card.arxiv})"
    return card.title


def source(card: Card) -> str:
    """Where and when a paper appeared."""
    return ", ".join(str(v) for v in (f"arXiv:{card.arxiv}" if card.arxiv else "", card.venue, card.year or "") if v)


def method_table(methods: dict[str, type[Method]], measured: dict[str, ClaimResult], link: str) -> str:
    """Every method in a line, papers first, baselines last."""
    lines = table("method", "paper", "year", "when", "removes", "models", "needs", "its claim, measured here")
    for name, kind in sorted(methods.items(), key=lambda m: (m[1].card.number == 0, m[0])):
        card = kind.card
        lines.append(
            row(
                f"[{name}]({link}{name}.md)",
                paper(card),
                card.year or "",
                card.when,
                ", ".join(card.granularity),
                ", ".join(card.families),
                ", ".join(card.needs) or "nothing",
                measured[name].verdict if name in measured else "not measured",
            )
        )
    return "\n".join(lines)


def study_table(methods: dict[str, type[Method]], measured: dict[str, ClaimResult], link: str) -> str:
    """Every study in a line: papers that compare, whose outcome is a table and no model."""
    also = {kind.card.number: f"that of {name}" for name, kind in methods.items()}  # papers of a method and a study
    lines = table("study", "paper", "year", "its claim, measured here")
    for name, card in registry.study_cards().items():
        verdict = measured[name].verdict if name in measured else also.get(card.number, "not measured")
        lines.append(row(f"[{name}]({link}{name}.md)", paper(card), card.year or "", verdict))
    return "\n".join(lines)


def methods_page(methods: dict[str, type[Method]], measured: dict[str, ClaimResult]) -> str:
    """The catalogue beside the method files."""
    papers = sum(kind.card.number > 0 for kind in methods.values())
    numbers = {kind.card.number for kind in methods.values()} | {
        card.number for card in registry.study_cards().values()
    }
    return "\n".join(
        [
            NOTE,
            "# Methods",
            "",
            f"{len(methods)} methods, {papers} of them from the list of papers, which with the studies below counts "
            f"{len(numbers - {0})}.",
            "One paper, one file; `secateur explain NAME` prints its page.",
            "",
            method_table(methods, measured, "../../../docs/reference/"),
            "",
            "Studies, which end in a table and no model:",
            "",
            study_table(methods, measured, "../../../docs/reference/"),
            "",
        ]
    )


# Pages


def coverage_page(rows: dict[str, dict]) -> str:
    """What the zoo test found of each network: what can be cut out of it, and what cannot and why."""
    found = [r["verdict"] for r in rows.values()]
    lines = [
        NOTE,
        "# Which networks can be cut",
        "",
        f"{len(rows)} networks that nobody adapted: tiny, with random weights, built from the configurations of",
        "transformers and diffusers and from plain torch. Each is planned, cut by 30 % (channels and heads), checked",
        "to answer as it does with the same units at zero, saved, loaded, run, and gradients taken; the residual",
        "stream is cut too. `python tests/test_zoo.py` writes the table anew; a test fails where it is out of date.",
        "",
        f"{found.count('works')} work, {found.count('frozen parts')} work with parts that stay, "
        f"{found.count('refused')} {'is' if found.count('refused') == 1 else 'are'} refused.",
        "",
        "- **reach**: the share of the weights in tensors that something can be taken out of. What is missing feeds",
        "  the model's answer, whose shape stays, or is named in the last column.",
        "- **left**: the share of the weights that is left.",
        "- **loads with**: transformers where a stock class takes the result; else `secateur.load`.",
        "",
        *table("network", "class", "family", "channels", "heads", "streams", "reach", "left", "loads with", "stays"),
    ]
    for name, r in sorted(rows.items(), key=lambda pair: (pair[1]["family"], pair[0])):
        sites = r.get("sites", {})
        why = "; ".join(f"{text}{f' ({count} times)' if count > 1 else ''}" for text, count in r["why"].items())
        why = f"`{why.replace('`', '')}`" if why else ""
        cells = [sites.get(kind, 0) or "" for kind in ("channel", "head", "stream")]
        if r["verdict"] == "refused":
            lines.append(row(name, r["network"], r["family"], *cells, "", "", "refused", why))
            continue
        share = [f"{r[key]:.0%}" for key in ("reach", "left")]
        lines.append(row(name, r["network"], r["family"], *cells, *share, r["loads"], why))
    return "\n".join([*lines, ""])


def reference_index(methods: dict[str, type[Method]]) -> str:
    """The first page of the reference."""
    lines = [NOTE, "# Reference", "", "Methods:", ""]
    lines += [f"- [{name}]({name}.md): {first_line(kind)}" for name, kind in methods.items()]
    lines += ["", "Studies:", ""]
    lines += [
        f"- [{name}]({name}.md): {(module.__doc__ or name).splitlines()[0]}" for name, module in studies().items()
    ]
    lines += ["", "Files: the [run record](../record.schema.json), the [result of a claim](../claim.schema.json).", ""]
    return "\n".join(lines)


def first_line(kind: type[Method]) -> str:
    """A method's idea in a line."""
    text = sys.modules[kind.__module__].__doc__ or kind.__doc__ or kind.__name__
    return text.strip().splitlines()[0]


def method_page(name: str, kind: type[Method], result: ClaimResult | None) -> str:
    """A method: its idea, its source, its settings, what was measured."""
    card = kind.card
    module = sys.modules[kind.__module__]
    lines = [NOTE, f"# {name}", "", prose(module), ""]
    facts = {
        "paper": f"{paper(card)}{', ' + source(card) if source(card) else ''}",
        "when": card.when,
        "removes": ", ".join(card.granularity),
        "models": ", ".join(card.families),
        "needs": ", ".join(card.needs) or "nothing but the weights",
        "made of": card.axes,
        "the paper reports": card.reports,
        "pinned by": f"`{card.checked}`" if card.checked else "",
    }
    lines += [*table("", ""), *(row(key, value) for key, value in facts.items() if value), ""]
    if card.differs:
        lines += ["Differs from the paper:", "", *(f"- {text}" for text in card.differs), ""]
    told = registry.of_method(name, kind, result).told
    lines += ["## Axes", "", *table("axis", ""), *(row(axis, values) for axis, values in told.items()), ""]
    lines += ["## Settings", "", *settings_table(kind), ""]
    lines += [
        "```python",
        "from secateur import prune",
        f"from secateur.methods.{name} import {kind.__name__}",
        "",
        f"outcome = prune(model, {kind.__name__}(), task)",
        "```",
        "",
    ]
    return "\n".join([*lines, *claim_section(result)])


def study_page(name: str, module: ModuleType, result: ClaimResult | None) -> str:
    """A study: its question and source, and what was measured."""
    return "\n".join([NOTE, f"# {name}", "", prose(module), "", *claim_section(result)])


def prose(module: ModuleType) -> str:
    """A module's docstring as Markdown: indented lines, which are formulas, stay as they are."""
    lines = inspect.cleandoc(module.__doc__ or "").splitlines()
    return "\n".join(line if line.startswith("    ") else line.replace("*", "\\*") for line in lines)


def settings_table(kind: type[Method]) -> list[str]:
    """A method's fields: type, default, and the comment beside each, as the command line has them."""
    lines = table("setting", "type", "default", "")
    for name, setting in settings_of(kind).items():
        default = "" if setting.default is MISSING else f"`{text_of_value(setting.default) or '()'}`"
        lines.append(row(f"`{name}`", f"`{setting.written}`", default, setting.comment))
    return lines


# Claims


def claims_page(measured: dict[str, ClaimResult], large: dict[str, ClaimResult]) -> str:
    """Every claim, what was measured, the verdict."""
    tally = {v: sum(r.verdict == v for r in measured.values()) for v in _PLURAL}
    known = harness.names()
    lines = [
        NOTE,
        "# Claims",
        "",
        "What each paper claims, measured again here. A claim is a file with its expectations written down before",
        "anything is measured; the harness measures every condition with every seed and calculates the verdict from",
        "the 95 % t-interval of the advantage, paired by seed:",
        "",
        "- **holds**: the interval lies above the margin.",
        "- **does not hold at this size**: it lies below. The models here are small: it says nothing of larger ones.",
        "- **inconclusive**: it contains the margin.",
        "",
        "`make claims NAME=wanda` measures one again; a run that was cut off goes on where it was.",
        "",
        f"{len(known)} claims, {len(measured)} measured: "
        + ", ".join(f"{count} {_PLURAL[v]}" for v, count in tally.items())
        + (f". {len(large)} of them also with `--large`" if large else "")
        + ".",
        "",
    ]
    if known:
        lines += table("claim", "the paper says", "measured here", "seeds", "verdict")
    for name in known:
        claim, _ = harness.load(name)
        says = f"{claim.says} ({claim.source})"
        if name not in measured:
            lines.append(row(f"[{name}]({name}.py)", says, claim.here, len(claim.seeds), "not measured"))
        for size, result in (("", measured.get(name)), (" --large", large.get(name))):
            if result is None:
                continue
            shown = "; ".join(finding_text(f) for f in result.findings if f.central)
            file = harness.paths(name, result.large)[1].name
            here = f"{claim.here} {shown}" if not size else f"With `--large`: {shown}"
            lines.append(row(f"[{name}{size}](results/{file})", says, here, len(result.seeds), f"**{result.verdict}**"))
    return "\n".join([*lines, ""])


_PLURAL = {
    "holds": "hold",
    "does not hold at this size": "do not hold at this size",
    "inconclusive": "are inconclusive",
}


def finding_text(finding: Finding) -> str:
    """An expectation and its advantage in a phrase."""
    times = "x" if finding.ratio else ""
    spread = "" if finding.low is None else f" [{finding.low:.3g}, {finding.high:.3g}]"
    return f"{finding.says}: {finding.metric} better by {finding.advantage:.3g}{times}{spread}"


def claim_section(result: ClaimResult | None) -> list[str]:
    """What was measured of a method's claim."""
    lines = ["## Its claim, measured here", ""]
    if result is None:
        return [*lines, "Not measured yet.", ""]
    lines += [f"The paper: {result.says} ({result.source})", "", f"Here: {result.here}", ""]
    lines += table("expected", "better by", "95 % interval", "more than", "seeds above", "verdict")
    for f in result.findings:
        times = "x" if f.ratio else ""
        spread = "" if f.low is None else f"{f.low:.4g} to {f.high:.4g}"
        says = f.says if f.central else f"({f.says})"
        lines.append(
            row(
                says,
                f"{f.advantage:.4g}{times}",
                spread,
                f"{f.margin:g}{times}",
                f"{f.wins} of {len(f.seeds)}",
                f.verdict,
            )
        )
    lines += ["", *table("condition", "metric", "mean", "95 % interval", "each seed")]
    lines += [figure_row(f) for f in result.figures]
    lines += ["", f"Verdict: **{result.verdict}**. {len(result.cells)} runs, {result.seconds / 60:.0f} minutes on "]
    lines[-1] += f"{' and '.join(result.processors)}, {result.machine.get('threads', '?')} threads."
    return [*lines, ""]


def figure_row(figure: Figure) -> str:
    """A condition's metric in a line."""
    spread = "" if figure.low is None else f"{figure.low:.4g} to {figure.high:.4g}"
    each = ", ".join(f"{value:.4g}" for value in figure.seeds.values())
    return row(figure.condition, figure.metric, f"{figure.mean:.4g}", spread, each)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Write what is derived from the code.")
    parser.add_argument("--check", action="store_true", help="only say which files are stale")
    given = parser.parse_args()
    pages = generated()
    old = stale(pages)
    for path in old:
        sys.stdout.write(f"{'stale' if given.check else 'wrote' if path in pages else 'removed'}   {path}\n")
        if given.check:
            continue
        if path in pages:
            (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
            write_text(ROOT / path, pages[path])
        else:
            (ROOT / path).unlink()
    if given.check and old:
        sys.stdout.write("run `make generate`\n")
    return 1 if given.check and old else 0


if __name__ == "__main__":
    sys.exit(main())
