"""Instructions with answers: the loss is the answer's, and a preface stands before each and is never cut."""

import gzip
import json
import math

import pytest
import tiny
import torch
from torch import nn

from secateur.errors import TaskError
from secateur.tasks.corpora import Bytes, Characters
from secateur.tasks.instructions import SILENT, Instructions, continued, from_file, gsm8k

LETTERS = Characters("abcdefghij")
PAIRS = {"train": [([1, 2], [3]), ([4], [5, 6, 7])], "val": [([1, 2, 3, 4], [5, 6])]}


def task(**changes):
    return Instructions("toy", PAIRS, LETTERS, **{"window": 8, **changes})


class Even(nn.Module):
    """Every token is as likely as any other, but for a bonus to the one that is right by one place."""

    def forward(self, ids):
        return torch.zeros(*ids.shape, 10)


def test_a_batch_by_hand():
    batch = next(iter(task().batches("val")))
    assert batch.inputs[0].tolist() == [[1, 2, 3, 4, 5, 6]]
    assert batch.target.tolist() == [[SILENT] * 4 + [5, 6]]
    rows = {tuple(row) for b in task(batch=2).batches("train") for row in b.inputs[0].tolist()}
    assert rows == {(1, 2, 3, 0), (4, 5, 6, 7)}


def test_a_preface_stands_first_and_is_never_cut():
    asked, answer = task(preface="ja").laid_out(PAIRS["val"][0])
    assert (asked, answer) == ([9, 0, 1, 2, 3, 4], [5, 6])
    # the answer's end goes first, one token of it stays, then the instruction's start
    assert task(preface="ja", window=7).laid_out(PAIRS["val"][0]) == ([9, 0, 1, 2, 3, 4], [5])
    assert task(preface="ja", window=5).laid_out(PAIRS["val"][0]) == ([9, 0, 3, 4], [5])
    assert task().prefaced("ja").prefaced("").before == []
    with pytest.raises(TaskError, match=r"needs one to ask and one to answer"):
        task(preface="jajaja", window=7)


def test_the_loss_is_that_of_the_answer_alone():
    found = task(preface="ja").measure(Even(), "val")
    assert found["nll"] == pytest.approx(math.log(10))
    assert (found["tokens"], found["examples"], found["before"]) == (2, 1, 2)

    class Last(nn.Module):
        """Sure of the token after this one in the alphabet, and so right where the ids count up."""

        def forward(self, ids):
            return 50.0 * nn.functional.one_hot((ids + 1) % 10, 10).float()

    assert task(preface="j").measure(Last(), "val")["nll"] == pytest.approx(0, abs=1e-6)  # "j", then 1, is wrong


def test_batches_follow_the_seed_and_padding_changes_nothing():
    held = {"train": [([i], [i + 1]) for i in range(9)]}
    orders = [
        [b.inputs[0].tolist() for b in Instructions("toy", held, LETTERS, seed=s, batch=1).batches("train", epoch=e)]
        for s, e in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2]
    assert orders[0] != orders[3]
    model, both = tiny.decoder(), task(batch=2)
    batch = next(iter(both.batches("train")))
    apart = [
        float(both.loss(model, b).detach()) * int((b.target != SILENT).sum()) for b in task(batch=1).batches("train")
    ]
    assert float(both.loss(model, batch).detach()) == pytest.approx(sum(apart) / 4, rel=1e-5)


def test_its_fingerprint_is_that_of_ids_and_settings():
    assert task().fingerprint() == task().fingerprint()
    assert task().fingerprint() != task(preface="a").fingerprint()
    assert task(seed=1).fingerprint() != task().fingerprint()
    assert task(seed=1).measured_on() == task().measured_on()


def test_a_text_is_gone_on_with():
    text = tiny.toy_text(window=16)
    found = continued(text, LETTERS, asked=6)
    asked, answer = found.pairs["val"][0]
    assert (asked, answer) == (text.ids["val"][:6].tolist(), text.ids["val"][6:16].tolist())
    assert (found.window, found.batch) == (16, 8)
    assert next(iter(found.prefaced("ab").batches("val"))).inputs[0].shape[1] == 16
    with pytest.raises(TaskError, match="Give 1 to 15"):
        continued(text, LETTERS, asked=16)


def test_a_file_of_instructions(tmp_path):
    rows = [{"instruction": f"add {i}", "input": "and 1" if i % 2 else "", "output": f"{i + 1}"} for i in range(10)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    found = from_file(Bytes(), file=str(file))
    assert found.name == "sums"
    assert {split: len(pairs) for split, pairs in found.pairs.items()} == {
        "train": 7, "calibration": 1, "val": 1, "test": 1,
    }  # fmt: skip
    asked, answer = found.pairs["train"][1]
    assert Bytes().decode(asked) == "\nInstruction: add 1\nInput: and 1\nAnswer: "
    assert Bytes().decode(answer) == "2"


def test_published_problems_are_read(tmp_path, monkeypatch):
    for split in ("train", "test"):
        rows = [json.dumps({"question": f"{split} {i}?", "answer": "#### 1"}) for i in range(20)]
        (tmp_path / f"gsm8k_{split}.jsonl.gz").write_bytes(gzip.compress("\n".join(rows).encode()))
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    found = gsm8k(Bytes(), window=100)
    assert {s: len(p) for s, p in found.pairs.items()} == {"train": 17, "calibration": 2, "val": 1, "test": 20}
    assert Bytes().decode(found.pairs["test"][0][0]) == "\nInstruction: test 0?\nAnswer: "


# Bad input


def test_files_that_hold_none_are_refused(tmp_path):
    with pytest.raises(TaskError, match="cannot be read"):
        from_file(Bytes(), file=str(tmp_path / "none.jsonl"))
    file = tmp_path / "odd.jsonl"
    null = '{"instruction": "a", "output": null}'
    wrong = {"{": "no instruction with an answer", '{"instruction": "a"}': "answer", "": "it holds 0", null: "is null"}
    for text, said in wrong.items():
        file.write_text(text)
        with pytest.raises(TaskError, match=said):
            from_file(Bytes(), file=str(file))


def test_examples_that_are_none_are_refused():
    with pytest.raises(TaskError, match="no instruction or no answer"):
        Instructions("toy", {"train": [([], [1])]}, LETTERS)
    with pytest.raises(TaskError, match="counts start at one"):
        task(batch=0)
    with pytest.raises(TaskError, match="it has none"):
        next(task().batches("test"))
    with pytest.raises(TaskError, match="it holds 2"):
        next(task().batches("train", 3))
