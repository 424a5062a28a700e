"""The generated tables, pages and schemas are those of the code, and say what they should."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from claims.harness import Claim, Expectation, conclude
from secateur.claims import Cell
from secateur.method import Card, Method
from tools import generate


@dataclass(frozen=True)
class Toy(Method):
    """A toy."""

    sparsity: float = 0.5  # fraction removed, in [0, 1)
    rounds: int = 3

    card: ClassVar = Card(7, "On | toys", arxiv="2001.00001", year=2020, differs=("It is small.",))

    def run(self, model, task):
        raise NotImplementedError


@dataclass(frozen=True)
class Baseline(Toy):
    card: ClassVar = Card(0, "A baseline", venue="here", year=1990)


def result():
    better = Expectation("A beats B", left="a", right="b", metric="loss")
    claim = Claim("toy", 7, "A beats B by 3.", "section 2", "On a toy.", ("a", "b"), (better,))
    cells = [Cell(c, s, {"loss": v + s * w}) for c, v, w in (("a", 1.0, 1.0), ("b", 3.0, 1.1)) for s in range(3)]
    return conclude(claim, cells)


def test_no_generated_file_is_stale():
    assert generate.stale(generate.generated()) == [], "run `make generate`"


def test_papers_stand_before_baselines_with_their_verdict():
    lines = generate.method_table({"baseline": Baseline, "toy": Toy}, {"toy": result()}, "docs/").splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| [toy](docs/toy.md) | [On \\| toys](https://arxiv.org/abs/2001.00001) | 2020 |")
    assert lines[2].endswith("| holds |")
    assert lines[3].endswith("| not measured |")


def test_speeds_are_ratios_to_every_rival_and_blank_where_one_was_not_measured():
    took = {"torch bf16": 8.0, "torch bf16, compiled": 6.0, "ours": 4.0, "OpenVINO f32": 9.0, "OpenVINO bf16": 3.0}
    assert generate.ratios(took, "ours", "bf16") == ["2.00", "1.50", "", "0.75", "", ""]
    took |= {"llama.cpp bf16": 5.0, "llama.cpp Q4_0": 1.0}
    assert generate.ratios(took, "ours", "bf16")[-1] == "1.25"


def test_a_page_has_the_settings_with_their_comments():
    page = generate.method_page("toy", Toy, result())
    assert "| `sparsity` | `float` | `0.5` | fraction removed, in [0, 1) |" in page
    assert "| stage | one shot |" in page and "| criterion | unknown |" in page
    assert "| `rounds` | `int` | `3` |  |" in page
    assert "- It is small." in page
    assert "Verdict: **holds**. 6 runs" in page


def test_links_of_generated_pages_lead_somewhere():
    for path, text in generate.generated().items():
        if path.endswith(".md"):
            for link in re.findall(r"\]\(([^)#:]+)\)", text):
                target = (generate.ROOT / path).parent / link
                assert target.exists(), f"{path} links to {link}"


def test_links_of_the_docs_lead_somewhere():
    written = [*generate.ROOT.glob("*.md"), *(generate.ROOT / "docs").rglob("*.md")]
    for path in written:
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text(encoding="utf-8")):
            assert (path.parent / Path(link)).exists(), f"{path.name} links to {link}"
