"""The catalogue: its words, what is derived, its answers to the survey's questions, and that cards keep to the code."""

import ast
import importlib
import json
import shlex
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from secateur.axes import NM, Blocks, PerRow
from secateur.axes.patterns import ChannelBlocks, Taps
from secateur.claims import results
from secateur.cli import main
from secateur.described import DESCRIBED
from secateur.errors import SettingError
from secateur.formats import FORMATS
from secateur.method import Card, load, names
from secateur.methods.icbs import ICBS
from secateur.methods.magnitude import Magnitude
from secateur.methods.sr_ste import SrSte
from secateur.methods.wanda import Wanda
from secateur.registry import (
    AXIS_NAMES,
    EXECUTION,
    Situation,
    allocation_of,
    derived,
    grouped,
    missing,
    of_method,
    patterns_of,
    query,
    recommend,
    rows,
    strange,
    study_cards,
)
from secateur.vocabulary import AXES

ROOT = Path(__file__).parent.parent


@cache
def known():
    """The rows of methods, read once."""
    return rows()


@pytest.fixture(scope="module")
def everything():
    return rows(studies=True, described=True)


def called(found):
    return {row.name for row in found}


def listed(*arguments):
    done = CliRunner().invoke(main, ["list", *arguments, "--json"])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


# The cards


def test_every_card_answers_the_survey():
    """What is told here is to be written into the file that is named."""
    lacking = []
    for name in names():
        kind = load(name)
        gaps = missing(kind.card, allocates=bool(allocation_of(kind)))
        lacking += [f"src/secateur/methods/{name}.py: its Card has no {axis}=(...)" for axis in gaps]
        lacking += [f"src/secateur/methods/{name}.py: its Card has {value}" for value in strange(kind.card)]
    for name, card in study_cards().items():
        gaps = missing(card)
        lacking += [f"src/secateur/studies/{name}.py: its CARD has no {axis}=(...)" for axis in gaps]
    for name, card in DESCRIBED.items():
        lacking += [f"src/secateur/described.py, {name}: no {axis}=(...)" for axis in missing(card)]
    assert not lacking, "cards are incomplete; the words are in src/secateur/vocabulary.py:\n" + "\n".join(lacking)


def test_every_study_has_a_card():
    files = {path.stem for path in (ROOT / "src/secateur/studies").glob("*.py")} - {"__init__"}
    lacking = [f"src/secateur/studies/{name}.py: it has no CARD = Card(...)" for name in files - study_cards().keys()]
    assert not lacking, "\n".join(lacking)


def test_a_word_that_there_is_not_is_refused_where_the_card_is_made():
    with pytest.raises(SettingError, match="criterion 'magnitud' was given, but no") as found:
        Card(0, "A toy", criterion=("magnitud",))
    assert "Did you mean magnitude" in found.value.do
    with pytest.raises(SettingError, match=r"an axis has a tuple of values\.\nWrite tasks=\('classification',\)"):
        Card(0, "A toy", tasks="classification")


def test_a_bare_card_lacks_what_cannot_be_derived():
    assert missing(Card(0, "A toy")) == ["criterion", "tasks", "allocation"]
    assert missing(Card(0, "A toy"), allocates=True) == ["criterion", "tasks"]
    trained = Card(0, "A toy", when="during training", needs=("labels", "training"))
    assert missing(trained) == ["criterion", "tasks", "stage", "schedule", "allocation"]
    said = Card(0, "A toy", criterion=("unknown",), tasks=("unknown",), allocation=("unknown",))
    assert missing(said) == []  # "unknown" is an answer
    assert strange(Card(0, "A toy", granularity=("voxels",), needs=("gold",))) == [
        "granularity 'voxels'",
        "needs 'gold'",
    ]


def test_every_axis_is_closed_and_every_row_is_on_it(everything):
    for row in everything:
        assert set(row.axes) >= set(AXIS_NAMES)
        for axis, words in AXES.items():
            assert row.axes[axis] <= {*words, "unknown", "any"}, (row.name, axis)
            assert row.axes[axis], (row.name, axis)


def test_what_is_derived_by_hand():
    found = derived(Card(0, "A", needs=("calibration",), criterion=("activation",)), frozenset({"unstructured", "N:M"}))
    assert found["stage"] == {"one shot"}
    assert found["gradients"] == {"none"}
    assert (found["data"], found["supervision"], found["choice"]) == ({"unlabelled"}, {"none"}, {"data-driven"})
    assert found["speedup"] == {"specific"}
    assert {"NM", "Bitmap", "KBlocked"} <= found["execution"]
    assert found["updates"] == {"none"}
    whole = derived(Card(0, "B", granularity=("channel", "weight"), criterion=("second-order",), needs=("labels",)))
    assert whole["speedup"] == {"universal", "specific"}
    assert "dense" in whole["execution"]
    assert whole["gradients"] == {"second"}
    trained = derived(Card(0, "C", when="around training", needs=("labels", "training"), allocation=("learned",)))
    assert (trained["retraining"], trained["updates"], trained["scope"]) == ({"weight-rewind"}, {"trained"}, {"global"})
    assert derived(Card(0, "D", when="at inference", granularity=("cache",)))["input"] == {"dynamic"}


def test_patterns_are_those_a_method_takes():
    assert patterns_of(Magnitude) == {"unstructured", "N:M", "block", "1xN", "taps"}
    assert patterns_of(SrSte) == {"N:M"}  # asked for in its check
    assert patterns_of(ICBS) == {"unstructured"}  # it has the setting, and refuses N:M
    assert allocation_of(Wanda) == {"uniform"}


@pytest.mark.parametrize("pattern", EXECUTION)
def test_a_pattern_can_be_run_as_what_is_said(pattern):
    by_name = {kind.__name__: kind for kind in FORMATS.values()}
    choices = {
        "unstructured": PerRow(), "N:M": NM(2, 4), "block": Blocks(4, 1), "1xN": ChannelBlocks(4), "taps": Taps(),
    }  # fmt: skip
    if pattern == "structured":
        assert EXECUTION[pattern] == ("dense",)
        return
    shape = (32, 1, 3, 3) if pattern == "taps" else (32, 64)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    choice = choices[pattern]
    keep = choice.select(weight.abs(), choice.nearest(shape, weight.numel() // 2))
    weight = torch.where(keep, weight, 0.0)
    for name in EXECUTION[pattern]:
        settings = {"NM": (2, 4), "Block": (4, 1), "GroupCols": (4,)}.get(name, ())
        packed = by_name[name](*settings).pack(weight)
        assert torch.equal(packed.dense().reshape(weight.shape), weight), name


def test_status_is_calculated(everything):
    found = {row.name: row for row in everything}
    assert found["wanda"].status == "implemented"
    assert found["magnitude"].status == "implemented"  # a baseline: no paper's claim to measure
    assert found["hrank"].status == "registry-only"
    bare = of_method("wanda", Wanda)
    assert bare.verdict == "not measured"
    paper = of_method("flap", load("flap"))  # a paper of the project without its result
    assert paper.status == "partial"
    assert paper.axes["status"] == {"partial"}


def test_what_is_only_described_is_never_run():
    assert not DESCRIBED.keys() & set(names())
    for name in DESCRIBED:
        with pytest.raises(SettingError, match="it is described, not implemented"):
            load(name)
    assert CliRunner().invoke(main, ["prune", "mlp", "hrank"]).exit_code == 2
    assert "it is described, not implemented" in CliRunner().invoke(main, ["explain", "hrank"]).stderr


@pytest.mark.parametrize(
    ("name", "axis", "values"),
    [
        ("bip", "start", {"pretrained"}),  # its scores begin as the trained weights
        ("mask_sparsity", "start", {"pretrained"}),
        ("group_channel", "start", {"pretrained"}),  # the model as given is the teacher
        ("iss_p", "start", {"initialised"}),
        ("granet", "start", {"initialised"}),
        *(
            (name, "start", {"initialised", "pretrained"})
            for name in ("gradual", "polarization", "turbo_vbi", "fedtiny")
        ),
        ("soft_filter", "start", {"initialised", "pretrained"}),
        ("sparse_then_prune", "retraining", {"none"}),
        ("sparse_then_prune", "stage", {"sparsity regularisation"}),
        ("loraprune", "allocation", {"uniform"}),
        ("loraprune", "scope", {"layer-wise"}),
        ("spa", "gradients", {"none", "first", "second"}),  # by the norm unless told otherwise
        ("oneshot", "gradients", {"none", "first"}),
        ("oneshot", "choice", {"data-free", "data-driven"}),
    ],
)
def test_a_card_says_what_its_paper_and_its_code_do(name, axis, values):
    assert of_method(name, load(name)).axes[axis] == values


def test_what_the_head_of_a_card_does_not_say_is_told_axis_by_axis():
    told = of_method("wanda", Wanda).told
    assert (told["stage"], told["updates"], told["task"]) == ("one shot", "none", "language modelling")
    assert told["pattern"] == "unstructured, N:M, block, 1xN, taps"
    assert told.keys() == {*AXIS_NAMES, "task"} - {"when", "granularity", "families", "models", "needs", "tasks"}
    about = json.loads(CliRunner().invoke(main, ["explain", "wanda", "--json"]).stdout)
    assert about["told"]["stage"] == "one shot" and about["stage"] == ["one shot"]
    shown = CliRunner().invoke(main, ["explain", "granet"]).stdout
    assert "On the survey's axes" in shown and "sparse to sparse, score or mask" in " ".join(shown.split())


# The survey's questions


def test_after_training_language_model_no_gradient_no_update():
    found = called(query(known(), when="after training", family="LLM", gradients="none", updates="none"))
    assert {"wanda", "magnitude", "dsnot", "shortgpt", "cfsp"} <= found
    assert not found & {"sparsegpt", "gblm", "slicegpt", "llm_pruner", "adapt_pruner", "snip"}
    asked = listed("--when", "after", "--family", "decoder", "--gradients", "none", "--no-update")
    assert {row["name"] for row in asked} == found


def test_what_speeds_up_a_plain_processor():
    found = called(query(known(), speedup="universal"))
    assert {"l1_norm", "flap", "shortgpt", "uncurl", "slicegpt", "slimming", "stun"} <= found
    assert not found & {"wanda", "magnitude", "sr_ste", "sparse_byte_nn", "int8", "perp"}
    assert {row["name"] for row in listed("--speedup", "universal")} == found
    assert all("dense" in row.axes["execution"] for row in query(known(), speedup="universal"))


def test_criteria_used_with_n_m():
    found = grouped(query(known(), pattern="N:M"), "criterion")
    assert {"magnitude", "activation", "first-order", "second-order", "random"} <= found.keys()
    assert "sr_ste" in found["magnitude"]
    assert "wanda" in found["activation"]
    assert "icbs" not in {name for each in found.values() for name in each}
    asked = listed("--pattern", "N:M", "--criterion")
    assert {row["criterion"]: row["methods"] for row in asked} == found


def test_which_claims_were_measured_and_how_far_off(everything):
    found = {row.name: row.remeasured for row in everything if row.sort == "method" and row.remeasured}
    assert found.keys() == results().keys() & set(names())
    each = found["wanda"][0]
    assert each.off == pytest.approx(each.ours / each.asked - 1 if each.ratio else each.ours - each.asked)
    assert each.seeds >= 3
    assert each.theirs and each.source and each.commit and each.hardware
    asked = [row for row in listed("--remeasured") if row["name"] == "wanda"]
    assert asked[0]["off"] == pytest.approx(each.off)
    shown = CliRunner().invoke(main, ["list", "--remeasured"]).stdout
    assert "off by" in shown


def test_methods_without_labels():
    found = called(query(known(), data=("none", "unlabelled")))
    assert {"wanda", "magnitude", "slicegpt", "perp", "uncurl", "mustafar"} <= found
    assert not found & {"snip", "icbs", "lottery"}
    assert {row["name"] for row in listed("--no-labels")} == found
    assert found | {row["name"] for row in listed("--labels")} == set(names())


def test_one_axis_any_of_several_and_several_axes_all():
    both = called(query(known(), when=("before training", "recovery")))
    assert both == called(query(known(), when="before training")) | called(query(known(), when="recovery"))
    assert called(query(query(known(), criterion="magnitude"), schedule="cubic")) == called(
        query(known(), criterion="magnitude", schedule="cubic")
    )
    assert "text_to_image" in called(query(known(), model="diffusion"))
    assert "text_to_image" not in called(query(known(), model="RNN"))


def test_bad_questions_are_refused():
    with pytest.raises(SettingError, match="there is no such axis") as found:
        query(known(), granularty="head")
    assert "granularity" in found.value.do
    with pytest.raises(SettingError, match="methods with stage one-shoot were asked for") as found:
        query(known(), stage="one-shoot")
    assert "one shot" in found.value.do
    with pytest.raises(SettingError, match="there is no such axis"):
        grouped(known(), "criteria")
    said = CliRunner().invoke(main, ["list", "--criterion", "magnitde"])
    assert said.exit_code == 2
    assert "--criterion magnitde was asked for" in said.stderr
    for arguments, advice in (
        (("--target", "flops"), "Add --recommend"),
        (("--recommend", "--criterion", "magnitude"), "leave --recommend out"),
        (("--criterion", "--pattern"), "Give a value to the others"),
        (("--recommend", "--target", "speed"), "There are: bytes, flops, latency, parameters"),
        (("--recommend", "--family", "lstm"), "rnn"),
        (("--recommend", "--family", "voxel network"), "secateur list --family 'voxel network'"),
        (("--criterion", "magnitude,nrm"), "no criterion is called 'nrm'"),
    ):
        said = CliRunner().invoke(main, ["list", *arguments])
        assert said.exit_code == 2, arguments
        assert advice in " ".join(said.stderr.split()), said.stderr


def test_an_answer_of_nothing_is_said():
    said = CliRunner().invoke(main, ["list", "--pattern", "N:M", "--family", "rnn", "--input", "dynamic"])
    assert "No method is all of that." in said.stdout
    assert (
        "No method is all of that."
        in CliRunner().invoke(main, ["list", "--input", "dynamic", "--pattern", "N:M", "--criterion"]).stdout
    )


def test_studies_and_described_rows_are_there_when_asked_for():
    found = {row["name"]: row for row in listed("--all")}
    assert found["taxonomy"]["sort"] == "study"
    assert found["hrank"]["status"] == "registry-only"
    assert "taxonomy" not in {row["name"] for row in listed()}


def test_no_word_is_broken_at_80_columns():
    shown = CliRunner().invoke(main, ["list", "--all"], env={"COLUMNS": "80"}).stdout
    assert all(len(line) <= 80 for line in shown.splitlines())
    head = shown.splitlines()[0]
    when = head.index("when")
    words = {word for line in shown.splitlines()[1:-2] for word in line[when:].split()}
    assert {"inference", "inconclusive", "calibration,"} <= words and "inferenc" not in words
    assert f"{len(names())} methods, {len(study_cards())} studies, {len(DESCRIBED)} only described" in shown
    one = CliRunner().invoke(main, ["list", "--retraining", "LR-rewind"]).stdout
    assert "\n1 method;" in one


# The recommendation


def test_the_walk_without_kernels_training_or_labels():
    advice = recommend(Situation(training=False, labels=False, family="LLM"), known())
    assert [step.question.split()[0] for step in advice.steps] == ["what", "is", "is", "is", "is", "what"]
    assert [step.answer for step in advice.steps] == ["LLM", "no", "no", "no", "yes", "flops"]
    assert {row.name for row in advice.rows} >= {"slicegpt", "spa", "cfsp", "flap", "shortgpt", "llm_pruner"}
    assert not any("training" in row.card.needs or "labels" in row.card.needs for row in advice.rows)
    assert all("universal" in row.axes["speedup"] for row in advice.rows)
    order = [row.verdict for row in advice.rows]
    assert order == sorted(order, key=["holds", "inconclusive", "not measured", "does not hold at this size"].index)
    assert advice.beside[:2] == ("spa(criterion=random)", "l1_norm")
    assert "dense network of the same size" in advice.beside[2]


def test_the_walk_with_kernels_and_nothing_else():
    advice = recommend(Situation(sparse_kernels=True, training=False, labels=False, calibration=False), known())
    assert not {row.name for row in advice.rows} & {"magnitude", "random"}  # what others are held against
    assert "passed over" in advice.steps[2].so or advice.rows
    assert advice.beside[:2] == ("random", "magnitude")


def test_the_walk_before_training():
    advice = recommend(Situation(pretrained=False, family="cnn"), known())
    assert {row.card.when for row in advice.rows} <= {"before training", "during training"}
    assert all("universal" in row.axes["speedup"] for row in advice.rows)
    assert advice.commands[0].startswith("secateur compare MODEL --methods ")
    assert advice.commands[0].endswith("--epochs 3")


@pytest.mark.parametrize("family", [None, "cnn", "moe", "rnn", "vision transformer"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("sparse_kernels", [True, False])
def test_every_walk_ends_in_rows_that_run(family, training, sparse_kernels):
    for labels in (True, False):
        for pretrained in (True, False):
            s = Situation(sparse_kernels, training, labels, True, pretrained, "latency", family)
            advice = recommend(s, known())
            assert advice.rows
            assert called(advice.rows) <= set(names())
            assert len(advice.beside) == 3
            lefts = [step.left for step in advice.steps]
            assert lefts == sorted(lefts, reverse=True)


def test_the_walk_on_the_command_line():
    done = CliRunner().invoke(main, ["list", "--recommend", "--no-training", "--no-labels", "--family", "LLM"])
    assert done.exit_code == 0
    assert "is training affordable?" in done.stdout
    assert "Always beside it" in done.stdout
    told = json.loads(CliRunner().invoke(main, ["list", "--recommend", "--no-pretrained", "--json"]).stdout)
    assert told["steps"][-2]["answer"] == "no"
    assert told["methods"]


def test_the_commands_of_the_walk_can_be_parsed():
    from secateur.recipe import method_of, split_methods

    for kernels in (True, False):
        (line,) = recommend(Situation(sparse_kernels=kernels, training=False), known()).commands
        words = shlex.split(line)
        for each in split_methods(words[words.index("--methods") + 1]):
            assert method_of(each).name in names()


def test_the_words_have_one_home():
    tree = ast.parse((ROOT / "src/secateur/vocabulary.py").read_text())
    assert any(isinstance(node, ast.AnnAssign) for node in tree.body)
    fields = set(importlib.import_module("secateur.method").Card.__dataclass_fields__)
    assert fields & AXES.keys() >= {"criterion", "tasks", "stage", "schedule", "allocation"}
