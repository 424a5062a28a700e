"""The pages are true: their Python runs, in order and page by page, and prints what stands below it."""

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*(ROOT / "docs").glob("*/*.md"), ROOT / "docs" / "README.md"])
BLOCK = re.compile(r"(<!-- not run[^\n]*-->\n)?```python\n(.*?)```\n(?:\n```text\n(.*?)```\n)?", re.DOTALL)


def blocks(path):
    """The Python of a page, each block with what it should print and the line it stands on."""
    text = path.read_text(encoding="utf-8")
    for found in BLOCK.finditer(text):
        if not found[1]:
            yield found[2], found[3] or "", text[: found.start()].count("\n") + 2


def pages():
    found = [p for p in PAGES if p.parent.name != "reference" and any(blocks(p))]
    return [pytest.param(p, id=p.relative_to(ROOT).as_posix()) for p in found]


@pytest.mark.parametrize("page", pages())
def test_python_of_a_page_runs_and_prints_what_it_says(page, tmp_path, monkeypatch):
    pytest.importorskip("sklearn", reason="the pages use scikit-learn's digits")
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "page"}
    for source, printed, line in blocks(page):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + source, str(page), "exec"), names)
        assert out.getvalue() == printed, f"{page.name} line {line}"
