"""The pages are true: their Python runs, in order and page by page, and prints what stands below it."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import click
import pytest

from secateur.method import load, names

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


def commands():
    """Every `secateur ...` line of the pages, the README and the Makefile."""
    found = []
    for path in [*PAGES, ROOT / "README.md", ROOT / "Makefile"]:
        text = path.read_text(encoding="utf-8").replace("\\\n", " ")
        fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
        for line in "\n".join(fenced).splitlines() if path.suffix == ".md" else text.splitlines():
            hit = re.match(r"\s*(?:\$ |\$\(BIN\)/)?secateur ([a-z]+\b[^#]*)", line)
            if hit:
                found.append(pytest.param(shlex.split(hit[1]), id=f"{path.name}: {hit[1][:60].strip()}"))
    return found


@pytest.mark.parametrize("words", commands())
def test_command_of_a_page_exists(words):
    """The verb is one, and every option is the verb's own or a field of the method it is given."""
    cli = pytest.importorskip("secateur.cli")
    if not hasattr(cli, "main"):
        pytest.skip("there is no command line yet")
    verb = cli.main.get_command(click.Context(cli.main), words[0])
    assert verb is not None, f"there is no verb {words[0]!r}"
    own = {option for parameter in verb.params for option in [*parameter.opts, *parameter.secondary_opts]}
    fields = {field for word in words[1:] if word in names() for field in load(word).__dataclass_fields__}
    for word in words[1:]:
        if word.startswith("--"):
            option = word.partition("=")[0].partition(".")[0]  # --task.window sets a part of --task
            assert option in own or option[2:].replace("-", "_") in fields, f"{words[0]} has no option {option}"
