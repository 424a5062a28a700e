"""Rooms and sentences: what is said is true and unambiguous; the network that answers; and what is refused."""

import itertools

import pytest
import tiny
import torch

from secateur.errors import SettingError, TaskError
from secateur.models.grounder import Grounder, grounder
from secateur.task import Task
from secateur.tasks import open_task
from secateur.tasks.rooms import COLOURS, SMALL, WORDS, Grounding, Rooms, grounding_loss, rooms, spelt
from secateur.train import fit
from secateur.voxels.walk import Grounded, Walks

SMALLER = {"train_size": 12, "val_size": 2, "test_size": 2, "points": 2000}


@pytest.fixture(scope="module")
def task():
    return rooms(**SMALLER)


def test_boxes_stand_apart_within_the_room(task):
    for boxes in task.splits["train"].boxes:
        assert 6 <= len(boxes) <= 10
        low, high = boxes[:, :3] - boxes[:, 3:] / 2, boxes[:, :3] + boxes[:, 3:] / 2
        assert low.min() >= -1e-6 and high[:, :2].max() <= 4
        for a, b in itertools.combinations(range(len(boxes)), 2):
            gap = torch.maximum(low[a, :2] - high[b, :2], low[b, :2] - high[a, :2]).max()
            assert gap > 0.09


def looks(room, held):
    """Size and colour of each box, found from the room's points."""
    points, found = held.points[room], []
    for box in held.boxes[room]:
        away = ((points[:, :3] - box[:3]).abs() - box[3:] / 2).max(1).values
        colour = points[(away.abs() < 0.02) & (points[:, 2] > 0.1), 3:].mean(0)
        nearest = min(COLOURS, key=lambda name: float((colour - torch.tensor(COLOURS[name])).norm()))
        found.append(("small" if box[3:].prod() < SMALL else "big", nearest))
    return found


def test_sentences_are_true_of_one_box_alone(task):
    held = task.splits["train"]
    related = 0
    for (room, wanted, mentioned), ids in zip(held.asked.tolist(), held.ids, strict=True):
        words, seen = [WORDS[i] for i in ids if i], looks(room, held)
        same = [i for i, look in enumerate(seen) if look == (words[1], words[2])]
        assert wanted in same
        if mentioned < 0:
            assert len(words) == 4 and same == [wanted]
        else:
            related += 1
            assert [i for i, look in enumerate(seen) if look == (words[7], words[8])] == [mentioned]
            centres = held.boxes[room][:, :2]
            assert min(same, key=lambda i: float((centres[i] - centres[mentioned]).norm())) == wanted
    assert 0.3 < related / len(held) < 0.7


def test_rooms_are_the_same_whatever_the_seed_and_the_order_is_not():
    first, again, other = rooms(**SMALLER), rooms(**SMALLER), rooms(**SMALLER, seed=1)
    assert isinstance(first, Task)
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()
    assert torch.equal(first.splits["val"].ids, other.splits["val"].ids)
    ids = [next(iter(t.batches("train"))).inputs["ids"] for t in (first, again, other)]
    assert torch.equal(ids[0], ids[1]) and not torch.equal(ids[0], ids[2])


def test_sentences_of_a_batch_are_their_scenes(task):
    batch = next(iter(task.batches("val", 3)))
    assert batch.size == 3
    assert batch.inputs["scene"].unique().tolist() == [0, 1, 2]
    assert batch.target[batch.target[:, 7] == 0][:, 0].tolist() == [0, 1, 2]


def perfect(batch, shift=0.0):
    """The answer of someone who knows, off by some metres."""
    wanted = batch.target[batch.target[:, 7] == 0]
    boxes = wanted[:, 1:7] + torch.tensor([shift, 0, 0, 0, 0, 0])
    return Grounded(wanted[:, 0].long(), boxes[:, :3], boxes, torch.full((len(wanted),), 9.0), len(wanted))


class Known(torch.nn.Module):
    def __init__(self, task, shift):
        super().__init__()
        self.batches, self.shift = list(task.batches("test")), shift

    def forward(self, ids, points, scene):
        batch = next(b for b in self.batches if torch.equal(b.inputs["points"], points))
        return perfect(batch, self.shift)


def test_accuracy_is_by_overlap(task):
    assert task.measure(Known(task, 0.0), "test")["acc50"] == 1
    off = task.measure(Known(task, 0.2), "test")
    assert off["acc50"] < 1
    assert task.measure(Known(task, 3.0), "test")["acc25"] == 0


def test_the_loss_is_least_for_the_right_box(task):
    batch = next(iter(task.batches("val", 2)))
    right, near, far = (grounding_loss(perfect(batch, s), batch.target) for s in (0.0, 0.1, 1.0))
    assert right < near < far
    assert right < 1e-3


def test_training_lowers_the_loss():
    made, model = tiny.make_task("voxel network"), tiny.make_model("voxel network")
    losses = fit(model, made, 16).losses
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])


def test_the_network_without_pruning_makes_every_child():
    model = grounder()
    assert isinstance(model, Walks)
    assert model.strides == (4, 8, 16)
    assert Grounder(stages=((1, 2), (1, 2), (1, 2), (1, 2)), width=8, vocabulary=9).strides == (16, 32, 64)


def test_words_behind_the_end_change_nothing():
    model, batch = tiny.make_model("voxel network"), next(iter(tiny.make_task("voxel network").batches("val", 2)))
    longer = {**batch.inputs, "ids": torch.nn.functional.pad(batch.inputs["ids"], (0, 5))}
    with torch.no_grad():
        torch.testing.assert_close(model(**longer).scores, model(**batch.inputs).scores)


def test_rooms_are_opened_by_name_and_refuse_models_of_other_kinds():
    opened = open_task("rooms", model=grounder(), train_size=2, val_size=1, test_size=1, points="500", seed=3)
    assert isinstance(opened, Grounding)
    assert len(opened.splits["train"].points[0]) == 500
    with pytest.raises(TaskError, match="grounder"):
        open_task("rooms", model=tiny.cnn(), train_size=1, val_size=1, test_size=1)
    with pytest.raises(TaskError, match="Give one of: rooms"):
        open_task("reber", model=grounder())
    with pytest.raises(SettingError, match="none of that name"):
        open_task("rooms", window=3)


# What is refused


def inputs(**changes):
    draw = torch.Generator().manual_seed(0)
    points = torch.rand(200, 6, generator=draw)
    plain = {"ids": torch.ones(2, 3, dtype=torch.int64), "points": points, "scene": torch.arange(200) % 2}
    return {**plain, **changes}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"ids": torch.ones(1, 3, dtype=torch.int64)}, "one sentence per scene"),
        ({"ids": torch.ones(3, 3, dtype=torch.int64)}, "scene 2 has none"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, "no words"),
        ({"points": torch.full((200, 6), float("nan"))}, "NaN"),
        ({"points": torch.zeros(0, 6), "scene": torch.zeros(0, dtype=torch.int64)}, "scene 0 has none"),
        ({"points": torch.zeros(200, 3)}, "x y z r g b"),
        ({"scene": torch.zeros(9, dtype=torch.int64)}, "x y z r g b"),
    ],
)
def test_clouds_and_sentences_that_do_not_go_together_are_refused(changes, says):
    with pytest.raises(TaskError, match=says):
        tiny.make_model("voxel network")(**inputs(**changes))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 0.0}, "above 0"),
        ({"stages": ((1, 2), (1, 2))}, "three at least"),
        ({"stages": ((1, 2), (1, 1), (1, 2))}, "do not halve"),
    ],
)
def test_networks_that_cannot_be_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        Grounder(vocabulary=9, width=8, **changes)


@pytest.mark.parametrize("changes", [{"train_size": 0}, {"fewest": 1}, {"relations": 2.0}, {"side": 1.0}, {"most": 20}])
def test_rooms_that_cannot_be_are_refused(changes):
    with pytest.raises(TaskError):
        rooms(**changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"fewest": 2, "most": 2}, "two of every look"),
        ({"fewest": 4, "most": 4}, "two of every look"),
        ({"colours": 2, "fewest": 3, "most": 7}, "4 looks, of which 2 are there twice"),
        ({"side": 9.0, "most": 40}, "10 looks, of which 11"),
        ({"side": float("nan")}, "a side has 2 m at least"),
    ],
)
def test_rooms_in_which_nothing_could_be_said_are_refused(changes, says):
    with pytest.raises(TaskError, match=says):
        rooms(**{**SMALLER, **changes})


@pytest.mark.parametrize(
    ("changes", "counts"), [({"colours": 2, "most": 6, "fewest": 6}, {6}), ({"fewest": 2, "most": 4}, {3})]
)
def test_rooms_have_as_many_boxes_as_were_asked_for(changes, counts):
    held = rooms(**{**SMALLER, **changes}).splits["train"]
    assert {len(boxes) for boxes in held.boxes} == counts


def test_data_that_does_not_fit_is_refused(task):
    held = task.splits["val"]
    with pytest.raises(TaskError, match="one sentence per question"):
        Grounding("bad", {"train": Rooms(held.points, held.boxes, held.asked, held.ids[:1])})
    with pytest.raises(TaskError, match="one is the least"):
        Grounding("bad", task.splits, batch=0)
    with pytest.raises(TaskError, match="it holds 8"):
        list(task.batches("val", 1000))
    with pytest.raises(TaskError, match="it has none"):
        list(task.batches("vall"))
    with pytest.raises(TaskError, match="is not known"):
        spelt("the orange box")
    with pytest.raises(TaskError, match="answer is a Tensor"):
        task.loss(torch.nn.Linear(1, 1), type(task.example)((torch.ones(1),)))
