"""Comparing and measuring: what is always there, equal data, cells done once, stopping, and what is refused."""

import json
import os
import signal
from pathlib import Path

import pytest
from command_line import run, said

from secateur.cli import BAD_INPUT, INTERRUPTED
from secateur.cli.compare import ALWAYS, asked
from secateur.method import load
from secateur.outcome import Record
from secateur.tasks import zero_shot

VECTORS = ("compare", "tiny:mlp", "--task", "tiny:toy_vectors", "--no-timing")
TEXT = ("compare", "tiny:decoder", "--task", "tiny:toy_text", "--set", "samples=8", "--damage", "8")


def records_of(page):
    folder = page.with_name(page.stem + "-records")
    return [Record.read(p) for p in sorted(folder.glob("*.json")) if not p.name.endswith(".failed.json")]


@pytest.fixture(autouse=True)
def _drawing():
    pytest.importorskip("altair", reason="the report's packages are not installed: pip install 'secateur[report]'")


# What is compared


def test_a_grid_of_five_sparsities_and_two_seeds_is_run_once(tmp_path):
    out = tmp_path / "page.html"
    args = (*VECTORS, "--methods", "magnitude,magnitude(pattern=2:4),sparsegpt", "--sparsity", "0.1,0.3,50%,0.7,0.9")
    args += ("--seeds", "2", "--set", "samples=9999", "--out", out)
    first = run(*args, "--json")
    found = json.loads(first.stdout)
    for name in ("random", "magnitude (pattern=per-matrix)"):
        mine = {(row["asked"], row["seeds"]) for row in found["table"] if row["method"] == name}
        assert mine == {(s, 2) for s in (0.1, 0.3, 0.5, 0.7, 0.9)}, name
    assert {row["asked"] for row in found["table"] if row["method"] == "int8"} == {None}
    assert found["dense"] is not None
    # More samples than there are: the runs fail, are shown, and do not stop the others.
    assert {f["method"] for f in found["failures"]} == {"sparsegpt"}
    assert len(found["failures"]) == 10
    assert "sparsegpt(samples=9999), seed 0 failed" in out.read_text()
    # There are no layers to take out, which nobody asked for: said, and no failure.
    (left_out,) = found["left_out"]
    assert left_out.startswith("shortgpt is left out: it has not one stack")
    assert left_out in out.read_text()
    # magnitude 10, 2:4 2, sparsegpt 10, random 10, int8 2, shortgpt 10
    assert "44 runs, 0 of them done before" in said(first)
    again = run(*args)
    assert "44 runs, 24 of them done before" in said(again)
    for words in ("dense", "what it costs", "failed: ", "accuracy on toy-vectors (higher is better)"):
        assert words in again.stdout, words
    run("report", tmp_path / "page-records", "--out", tmp_path / "again.html")
    assert (tmp_path / "again.html").exists()


def test_the_dense_model_is_measured_once_for_all_seeds(tmp_path, monkeypatch):
    from secateur.tasks.labelled import Labelled

    measured = []
    plain = Labelled.measure
    monkeypatch.setattr(Labelled, "measure", lambda task, *rest: measured.append(task.seed) or plain(task, *rest))
    args = (*VECTORS, "--methods", "magnitude", "--seeds", "3", "--out")
    run(*args, tmp_path / "one.html")
    assert len(measured) == 1 + 3 * 3  # magnitude, random and int8
    before = {json.dumps(r.measured("before")) for r in records_of(tmp_path / "one.html")}
    assert len(before) == 1
    measured.clear()
    monkeypatch.setattr(Labelled, "measured_on", lambda task: str(task.seed))  # data that the seed moves
    run(*args, tmp_path / "three.html")
    assert len(measured) == 3 + 3 * 3


def test_simple_baselines_are_always_there_on_equal_data(tmp_path):
    out = tmp_path / "page.html"
    found = json.loads(run(*TEXT, "--methods", "wanda", "--out", out, "--json").stdout)
    rows = {row["method"]: row for row in found["table"]}
    assert set(rows) == {"wanda", *ALWAYS}
    assert (found["failures"], found["left_out"]) == ([], [])
    dense = next(r for r in records_of(out) if r.method == "wanda").ledger.before
    # Zeros, bytes, work: a mask saves neither bytes nor work, fewer layers save both, fewer bits save bytes.
    assert rows["wanda"]["stored_bytes"] == dense.stored_bytes
    assert rows["wanda"]["flops"] == dense.flops
    assert rows["wanda"]["zeros"] > 9000
    assert rows["shortgpt"]["stored_bytes"] < dense.stored_bytes
    assert rows["shortgpt"]["flops"] < dense.flops
    assert rows["int8"]["stored_bytes"] < dense.stored_bytes / 2
    assert rows["int8"]["flops"] == dense.flops
    for row in rows.values():
        assert row["milliseconds"] > 0
        assert row["milliseconds_dense"] > 0
    assert rows["int8"]["flips"] < rows["random"]["flips"]
    # Half the layers are half of the weights in them: the same share as was asked of the others.
    removed = {r.method: r.ledger.share for r in records_of(out)}
    assert removed["shortgpt"] == pytest.approx(removed["wanda"])
    assert "every method that looks at data was calibrated on 8 examples" in out.read_text()


def test_methods_are_calibrated_alike_unless_told_otherwise():
    named, always = asked("wanda(samples=7),sparsegpt,flap", "0.5", ())
    assert [m.samples for m in named] == [7, 7, 7]
    assert {m.name: m.samples for m in always if hasattr(m, "samples")} == {"shortgpt": 7}
    named, _ = asked("sparsegpt,wanda", "0.5", ())
    assert [m.samples for m in named] == [128, 128]
    named, always = asked("magnitude,random,shortgpt,int8", "0.3,0.5", ())
    assert len(named) == 7
    assert always == []


def test_unequal_data_that_was_asked_for_is_said(tmp_path):
    out = tmp_path / "page.html"
    run(*TEXT[:4], "--methods", "wanda(samples=4),sparsegpt(samples=8)", "--no-timing", "--damage", "0", "--out", out)
    assert "NOT calibrated on equally many examples, as was asked: wanda, shortgpt on 4; sparsegpt on 8" in (
        out.read_text()
    )


# Damage


def test_damage_is_in_every_record_and_on_the_page(tmp_path):
    out = tmp_path / "page.html"
    run(*TEXT, "--methods", "magnitude", "--sparsity", "0.8", "--no-timing", "--out", out)
    found = {r.method: r.damage for r in records_of(out)}
    assert all(d.examples == 8 and len(d.differences) == 8 and d.what == "windows of 16 tokens" for d in found.values())
    assert found["int8"].flips < found["magnitude"].flips
    page = out.read_text()
    for words in ("<h2>Damage</h2>", "answers flipped", "right, now wrong", "that lost most", "Example by example"):
        assert words in page, words
    assert page.index("<h2>Results</h2>") < page.index("<h2>Damage</h2>") < page.index("<h2>What was cut</h2>")


# Stopping and going on


@pytest.mark.parametrize("by", ["interrupt", "term"])
def test_a_comparison_that_is_stopped_shows_what_there_is_and_goes_on(by, tmp_path, monkeypatch):
    args = (*VECTORS, "--methods", "magnitude", "--out", tmp_path / "page.html")

    def stop(self, model, task):
        if by == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGTERM)
    whole = load("random").run
    monkeypatch.setattr(load("random"), "run", stop)
    stopped = run(*args, code=INTERRUPTED)
    assert "run the same command again" in said(stopped)
    assert "shows the 1 runs of 4 that are there" in said(stopped)
    assert "stopped after 1 of 4 runs" in (tmp_path / "page.html").read_text()
    assert signal.getsignal(signal.SIGTERM) is handler
    assert not list(tmp_path.rglob("*.partial"))
    monkeypatch.setattr(load("random"), "run", whole)
    assert "4 runs, 1 of them done before" in said(run(*args))
    assert "stopped after" not in (tmp_path / "page.html").read_text()


def test_a_comparison_stopped_before_anything_was_done_writes_no_page(tmp_path, monkeypatch):
    def stop(self, model, task):
        raise KeyboardInterrupt

    monkeypatch.setattr(load("magnitude"), "run", stop)
    run(*VECTORS, "--methods", "magnitude", "--out", tmp_path / "page.html", code=INTERRUPTED)
    assert not (tmp_path / "page.html").exists()


def test_what_is_looked_at_is_part_of_what_was_done(tmp_path):
    args = (*VECTORS, "--methods", "magnitude", "--out", tmp_path / "page.html")
    run(*args)
    assert "3 of them done before" in said(run(*args))
    assert "0 of them done before" in said(run(*args, "--damage", "3"))
    assert "0 of them done before" in said(run(*args, "--eval-split", "test"))
    assert "0 of them done before" in said(run(*args, "--seed", "5"))
    assert "3 of them done before" in said(run(*args, "--damage", "3"))


def test_everything_failing_ends_with_an_error(tmp_path, monkeypatch):
    from secateur.errors import EvidenceError

    def fail(self, model, task):
        raise EvidenceError("a run was wanted", "it fails", "Try another.")

    for name in ALWAYS:
        monkeypatch.setattr(load(name), "run", fail)
    found = run(*VECTORS, "--methods", "magnitude", "--out", tmp_path / "page.html", code=BAD_INPUT)
    assert "all of them failed, the first with: a run was wanted, but it fails" in said(found)


# Questions


@pytest.mark.parametrize("verb", [("compare", "--methods", "magnitude", "--out", "page.html"), ("eval",)])
@pytest.mark.parametrize(
    ("named", "there", "advice"),
    [
        ("arc_esay", True, "Did you mean arc_easy?"),
        ("piqa,winograndee", True, "Did you mean winogrande?"),
        ("own.jsonl", False, "pip install 'secateur[eval]'"),
        ("own.jsonl", True, "Give a language model with one"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused_before_anything_runs(
    verb, named, there, advice, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zero_shot, "_harness_is_there", lambda: there)
    real = zero_shot.questions
    rows = [{"question": "a", "choices": ["b", "c"], "gold": 0}]
    monkeypatch.setattr(zero_shot, "questions", lambda name: rows if name == "piqa" else real(name))
    Path("own.jsonl").write_text('{"question": "a", "choices": ["b", "c"], "gold": 0}\n')
    name, *rest = verb
    found = run(name, "tiny:decoder", *rest, "--task", "tiny:toy_text", "--zero-shot", named, code=BAD_INPUT)
    assert advice in said(found)
    assert [p.name for p in tmp_path.iterdir()] == ["own.jsonl"]


def test_answers_to_questions_stand_beside_those_of_the_dense_model(tmp_path, monkeypatch):
    answered = {
        "acc": 0.5,
        "acc_stderr": 0.1,
        "acc_norm": 0.25,
        "acc_norm_stderr": 0.1,
        "questions": 8.0,
        "chance": 0.25,
    }
    seen = []

    def stand_in(model, tokenizer, names, limit=None, batch=8):
        zeros = sum(int((p == 0).sum()) for p in model.parameters())
        seen.append((tuple(names), limit))
        return {name: {**answered, "acc_norm": 0.125 if zeros > 1000 else 0.25} for name in names}

    rows = [{"question": "a", "choices": ["b", "c"], "gold": 0}] * 8
    monkeypatch.setattr("secateur.cli.measuring.zero_shot", stand_in)
    monkeypatch.setattr("secateur.cli.measuring.check", lambda names, tokenizer: None)
    monkeypatch.setattr("secateur.cli.measuring.questions", lambda name: rows)
    args = (*TEXT, "--methods", "magnitude", "--no-timing", "--zero-shot", "arc_easy", "--limit", "8")
    found = run(*args, "--out", tmp_path / "page.html")
    assert set(seen) == {(("arc_easy",), 8)}
    assert "zero-shot accuracy" in found.stdout
    page = (tmp_path / "page.html").read_text()
    section = page[page.index("Questions it was never trained for") : page.index("<h2>Damage</h2>")]
    assert "arc_easy acc_norm" in section
    assert "0.2500 ± 0.1960" in section  # the dense model; over the questions, for one seed
    assert "0.1250 ± 0.1960" in section  # magnitude
    assert "arc_easy: 8 questions, guessing gives 0.2500" in section
    # Other questions are another run.
    rows[0] = {"question": "b", "choices": ["b", "c"], "gold": 0}
    assert "0 of them done before" in said(run(*args, "--out", tmp_path / "page.html"))


# eval


def test_eval_says_quality_bytes_work_and_time_on_lines_of_their_own():
    found = run("eval", "tiny:decoder", "--task", "tiny:toy_text").stdout.splitlines()
    assert found[0].startswith("perplexity ")
    assert "over windows of 16 tokens (lower is better) for decoder on toy-text, val" in found[0]
    assert [line[:21].strip() for line in found[1:]] == [
        "parameters",
        "bytes in memory",
        "bytes stored",
        "work per forward pass",
        "time per forward pass",
    ]
    assert "82.6 kB (if saved as it is)" in found[3]
    assert "batch 1" in found[5]
    assert "float32" in found[5]
    assert "not measured" in run("eval", "tiny:decoder", "--task", "tiny:toy_text", "--no-timing").stdout


def test_eval_against_the_dense_model_lists_what_got_worse(tmp_path):
    prune = ("prune", "tiny:decoder", "magnitude", "--sparsity", "0.8", "--task", "tiny:toy_text", "--no-eval")
    run(*prune, "--out", tmp_path / "out")
    args = ("eval", tmp_path / "out", "--against", "tiny:decoder", "--damage", "6")
    found = json.loads(run(*args, "--json").stdout)
    assert found["damage"]["examples"] == 6
    assert found["damage"]["worse"] == sum(d > 0 for d in found["damage"]["differences"])
    assert 0 < found["damage"]["flips"] <= 1
    assert found["size"]["stored_bytes"] == (tmp_path / "out/model.safetensors").stat().st_size
    assert found["size"]["stored"] == "on disk"
    assert found["timing"]["milliseconds"] > 0
    assert found["against"]["timing"]["milliseconds"] > 0
    shown = run(*args).stdout
    assert "of 6 windows of 16 tokens got worse; of 90 top answers" in shown
    assert "those that lost most" in shown
    assert "both in turn" in shown


def test_eval_against_a_model_that_does_not_take_the_same_data_is_refused():
    found = run("eval", "tiny:decoder", "--task", "tiny:toy_text", "--against", "tiny:mlp", code=BAD_INPUT)
    assert "does not go through the model" in said(found)
