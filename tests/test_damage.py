"""Which examples got worse: by hand, against the task's own loss, and on the page."""

import copy
import json
import math
from dataclasses import dataclass, replace

import jsonschema
import pytest
import torch
from tiny import cnn, make_task, toy_images, toy_text, trained
from torch import Tensor, nn

from secateur import prune
from secateur.errors import TaskError
from secateur.methods.magnitude import Magnitude
from secateur.outcome import Damage, Harm, Record, record_schema
from secateur.task import Batch
from secateur.tasks.damage import Answer, answers, damage


def answer(wanted: list[int], losses: list[float], said: list[int]) -> Answer:
    ids = torch.tensor([9, *wanted])
    return Answer(ids, torch.tensor(wanted), torch.tensor(losses), torch.tensor(said))


BEFORE = [answer([1, 2, 3, 4], [0.1, 0.2, 0.3, 0.4], [1, 2, 3, 5]), answer([1, 1, 1, 1], [1.0] * 4, [1, 0, 0, 0])]
AFTER = [answer([1, 2, 3, 4], [0.1, 0.2, 2.7, 0.4], [1, 2, 7, 4]), answer([1, 1, 1, 1], [0.5] * 4, [1, 0, 0, 2])]


def test_damage_by_hand():
    found = damage(BEFORE, AFTER, "val", lambda ids: "".join("abcdefghij"[i] for i in ids))
    # Of 8 predictions 3 flip: one from right to wrong, one from wrong to right, one from wrong to wrong.
    assert (found.flips, found.lost, found.gained) == (3 / 8, 1 / 8, 1 / 8)
    assert (found.examples, found.predictions, found.what, found.worse) == (2, 8, "windows of 5 tokens", 1)
    assert found.differences == pytest.approx([2.4 / 4, -0.5])
    (worst,) = found.worst
    assert (worst.example, worst.wanted, worst.said_before, worst.said_after) == (0, "d", "d", "h")
    assert worst.context == "jbc"
    assert worst.flips == 0.5


def test_a_loss_that_is_no_number_is_the_worst():
    lost = [BEFORE[0], replace(AFTER[1], losses=torch.full((4,), math.nan))]
    found = damage(BEFORE, lost, "val")
    assert found.differences == [0.0, math.inf]
    assert [harm.example for harm in found.worst] == [1]


def test_answers_to_other_examples_are_refused():
    with pytest.raises(TaskError, match="answers to other examples"):
        damage(BEFORE, AFTER[::-1], "val")
    with pytest.raises(TaskError, match="there are none"):
        damage([], [], "val")


def test_losses_of_texts_are_those_the_task_measures():
    model, task = trained("decoder"), toy_text()
    found = answers(model, task, "val", 10_000)
    measured = task.measure(model, "val")
    assert len(found) == measured["windows"]
    assert sum(a.loss for a in found) / len(found) == pytest.approx(measured["nll"], rel=1e-5)
    assert len(answers(model, task, "val", 3)) == 3


def test_answers_of_a_classifier_are_its_accuracy():
    model, task = cnn(), toy_images()
    found = answers(model, task, "test", 10_000)
    assert sum(int(a.right.sum()) for a in found) / len(found) == task.measure(model, "test")["accuracy"]
    harmed = damage(found, answers(cnn(seed=1), task, "test", 10_000), "test")
    assert harmed.what == "examples"
    assert harmed.worst[0].context == f"example {harmed.worst[0].example}"


def test_a_model_is_not_damaged_by_itself_and_stays_in_its_mode():
    model, task = trained("decoder").train(), make_task("decoder")
    found = damage(answers(model, task), answers(copy.deepcopy(model), task), "val")
    assert (found.flips, found.worse, found.worst) == (0.0, 0, [])
    assert model.training


def test_more_sparsity_does_more_damage():
    model, task = trained("decoder"), make_task("decoder")
    whole = answers(model, task)
    found = [
        damage(whole, answers(prune(model, Magnitude(sparsity=s), task).model, task), "val") for s in (0.1, 0.5, 0.9)
    ]
    assert found[0].flips < found[1].flips < found[2].flips
    assert found[0].worse < found[2].worse


def test_a_task_without_answers_to_choose_from_says_so():
    @dataclass(frozen=True)
    class Regression:
        name: str = "regression"

        def batches(self, split: str) -> list[Batch]:
            return [Batch((torch.zeros(2, 3),), torch.zeros(2, 4))]

    with pytest.raises(TaskError, match="not one out of several"):
        answers(nn.Linear(3, 4), Regression())  # type: ignore[arg-type]


def test_a_record_keeps_damage_and_reads_it_back(tmp_path):
    task = make_task("mlp")
    record = prune(trained("mlp"), Magnitude(), task).record
    harm = Harm(3, 1.0, math.inf, 0.5, "a text", "yes", "yes", "no")
    kept = replace(record, damage=Damage("val", 2, "texts", 8, 0.25, 0.1, 0.05, [0.5, math.inf], [harm]))
    kept.write(tmp_path / "run.json")
    assert Record.read(tmp_path / "run.json") == kept
    record.write(tmp_path / "bare.json")
    jsonschema.validate(json.loads((tmp_path / "bare.json").read_text()), record_schema())


def test_records_without_damage_read_as_before(tmp_path):
    prune(trained("mlp"), Magnitude(), make_task("mlp")).record.write(tmp_path / "run.json")
    old = json.loads((tmp_path / "run.json").read_text())
    del old["damage"]
    (tmp_path / "run.json").write_text(json.dumps(old))
    assert Record.read(tmp_path / "run.json").damage is None


def test_long_windows_go_through_in_pieces(monkeypatch):
    from secateur.tasks import damage as module

    model, task = trained("decoder"), toy_text(window=32)
    whole = answers(model, task, "val", 4)
    monkeypatch.setattr(module, "ROWS", 5)
    for one, other in zip(whole, answers(model, task, "val", 4), strict=True):
        torch.testing.assert_close(one.losses, other.losses)
        assert torch.equal(one.said, other.said)


def shape(x: Tensor) -> list[int]:
    return list(x.shape)


def test_shapes_of_an_answer():
    found = answers(trained("decoder"), toy_text(), "val", 1)[0]
    assert (shape(found.inputs), shape(found.wanted), shape(found.losses), shape(found.said)) == (
        [16],
        [15],
        [15],
        [15],
    )
