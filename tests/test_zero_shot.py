"""Multiple choice by the lm-eval harness: what is refused, that prompts are the harness's, and that nothing moves."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from tiny import VOCABULARY, decoder, trained

from secateur.errors import ModelError, TaskError
from secateur.tasks import zero_shot
from secateur.tasks.zero_shot import PROMPTS, names, questions


def line(question="which is it", choices=("red", "green"), gold=0, **more):
    return json.dumps({"question": question, "choices": list(choices), "gold": gold, **more})


@pytest.fixture
def asked(tmp_path):
    """A file of twelve questions whose right answer is always the first."""
    path = tmp_path / "colours.jsonl"
    path.write_text("\n".join(line(f"question {'abcdefghijkl'[i]}") for i in range(12)))
    return str(path)


@pytest.fixture(scope="module")
def tokenizer():
    """Characters as tokens, for the vocabulary of the tiny decoder."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    letters = ["<s>", "</s>", "<unk>", *"abcdefghijklmnopqrstuvwxyzQA: \n"]
    model = tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token="<unk>")
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    assert len(letters) <= VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def harness():
    return pytest.importorskip("lm_eval", reason="the harness is not installed: pip install 'secateur[eval]'")


# Without the harness


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(TaskError, match="none of that name") as caught:
        questions("arc_esay")
    assert caught.value.do.startswith("Did you mean arc_easy? There are: arc_challenge")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "no question"),
        ("not json", "line 1 is no question"),
        ('{"question": "a"}', "line 1 is no question"),
        (line(gold=2), "line 1 has 2 choices, and the right one is 2"),
        (line(gold="A"), "the right one is 'A'"),
        (line(choices=["only"]), "line 1 has 1 choices"),
        (line() + "\n" + line(choices=["", "b"]), "line 2 has 2 choices"),
    ],
)
def test_a_file_that_holds_no_questions_is_refused(text, found, tmp_path):
    path = tmp_path / "own.jsonl"
    path.write_text(text)
    with pytest.raises(TaskError, match="zero-shot task") as caught:
        questions(str(path))
    assert found in caught.value.found
    assert caught.value.do


def test_a_packed_file_is_read(tmp_path):
    path = tmp_path / "own.jsonl.gz"
    path.write_bytes(gzip.compress((line() + "\n\n" + line(gold=1)).encode()))
    assert [q["gold"] for q in questions(str(path))] == [0, 1]


def test_a_missing_harness_says_what_to_install(monkeypatch, asked, tokenizer):
    monkeypatch.setattr(zero_shot, "_harness_is_there", lambda: False)
    with pytest.raises(ModelError, match="lm-eval harness is not installed") as caught:
        zero_shot.zero_shot(decoder(), tokenizer, [asked])
    assert caught.value.do == "Install it: pip install 'secateur[eval]'."


def test_a_model_without_a_tokenizer_is_refused(monkeypatch, asked):
    monkeypatch.setattr(zero_shot, "_harness_is_there", lambda: True)
    with pytest.raises(ModelError, match="without a tokenizer"):
        zero_shot.check([asked], None)
    zero_shot.check([], None)


@pytest.mark.data
def test_the_pack_has_questions_of_every_name(data, monkeypatch):
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    counts = {name: len(questions(name)) for name in names()}
    assert counts == {
        "arc_challenge": 1172,
        "arc_easy": 2376,
        "boolq_no_passage": 3270,
        "openbookqa": 500,
        "piqa": 1838,
        "social_iqa": 1954,
        "winogrande": 1267,
    }
    assert all("_" in q["question"] for q in questions("winogrande"))


# With it

THEIRS = {
    "arc_easy": ("arc/arc_easy.yaml", {"question": "{q}"}),
    "arc_challenge": ("arc/arc_challenge.yaml", {"question": "{q}"}),
    "openbookqa": ("openbookqa/openbookqa.yaml", {"question_stem": "{q}"}),
    "piqa": ("piqa/piqa.yaml", {"goal": "{q}"}),
    "social_iqa": ("siqa/siqa.yaml", {"context": "{c}", "question": "{q}"}),
}


@pytest.mark.parametrize("name", THEIRS)
def test_prompts_and_metrics_are_those_of_the_harness(name, harness):
    import yaml
    from jinja2 import Template

    file, fields = THEIRS[name]
    config = {}
    for each in ("arc/arc_easy.yaml", file):  # arc_challenge says only in what it differs
        config |= yaml.safe_load((Path(harness.__file__).parent / "tasks" / each).read_text())
        if name != "arc_challenge":
            config = yaml.safe_load((Path(harness.__file__).parent / "tasks" / file).read_text())
    doc = {key: value.format(q="Why?", c="It rained.") for key, value in fields.items()}
    text = config["doc_to_text"]
    theirs = doc[text] if text in doc else Template(text, keep_trailing_newline=True).render(doc)
    ours = PROMPTS[name].text({"question": "It rained. Why?" if name == "social_iqa" else "Why?"})
    assert ours == theirs
    assert list(PROMPTS[name].metrics) == [m["metric"] for m in config["metric_list"]]


def test_accuracies_are_what_the_likelihoods_say(asked, tokenizer, harness):
    """The harness's own numbers, beside log-likelihoods summed here by hand."""
    model = trained("decoder")
    found = zero_shot.zero_shot(model, tokenizer, [asked], batch=4)["colours"]
    right = normalised = 0
    for q in questions(asked):
        sums = []
        for choice in q["choices"]:
            context, whole = (tokenizer.encode(f"Question: {q['question']}\nAnswer:{c}") for c in ("", f" {choice}"))
            with torch.no_grad():
                logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
        right += sums[0] > sums[1]
        normalised += sums[0] / len("red") > sums[1] / len("green")
    assert found["acc"] == pytest.approx(right / 12)
    assert found["acc_norm"] == pytest.approx(normalised / 12)
    assert (found["questions"], found["chance"]) == (12.0, 0.5)


def test_neither_the_model_nor_the_world_is_changed(asked, tokenizer, harness, capsys):
    """The harness ties heads anew, pads tokenizers, and seeds everything: none of it may be seen here."""
    model = decoder().train()
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone() * 2)  # config says it is tied
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    pad = tokenizer.pad_token
    zero_shot.zero_shot(model, tokenizer, [asked], limit=3)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.training
    assert "tie_weights" not in vars(model)
    assert tokenizer.pad_token == pad
    assert torch.equal(torch.get_rng_state(), state)
    assert capsys.readouterr() == ("", "")


def test_a_limit_is_said_and_a_question_alone_has_no_error(asked, tokenizer, harness):
    found = zero_shot.zero_shot(decoder(), tokenizer, [asked], limit=1)["colours"]
    assert found["questions"] == 1.0
    assert found["acc"] in (0.0, 1.0)


def test_a_blank_is_filled_and_the_rest_is_scored(tokenizer, harness, monkeypatch):
    rows = [{"question": "a _ is red", "choices": ["cat", "dog"], "gold": 1}] * 4
    monkeypatch.setattr(zero_shot, "questions", lambda name: rows)
    model = trained("decoder")
    found = zero_shot.zero_shot(model, tokenizer, ["winogrande"])["winogrande"]
    sums = []
    for choice in ("cat", "dog"):
        context, whole = tokenizer.encode(f"a {choice}"), tokenizer.encode(f"a {choice} is red")
        with torch.no_grad():
            logs = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        sums.append(sum(float(logs[i - 1, whole[i]]) for i in range(len(context), len(whole))))
    assert found["acc"] == float(sums[1] > sums[0])
    assert "acc_norm" not in found
