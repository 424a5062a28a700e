"""Detection: boxes, the loss, average precision, FastestDet and the blood cells it was trained on."""

import base64
from dataclasses import replace
from itertools import islice

import pytest
import torch
from detectors import detector, scenes, toy
from torch import nn

from secateur import tasks
from secateur.edit import Mask, apply_
from secateur.errors import SettingError, TaskError
from secateur.graph import couple, removals
from secateur.method import prune
from secateur.methods.magnitude import Magnitude
from secateur.models import load, open_model, save
from secateur.models.fastestdet import FastestDet, boxes
from secateur.report.pictures import grids, size_of
from secateur.task import Batch
from secateur.tasks.detection import candidates, detection_loss, found_in, iou, mirrored, precision, siou, thinned
from secateur.train import fit

pytest.importorskip("pycocotools", reason="average precision is pycocotools'")


def test_boxes_of_cells_worked_by_hand():
    answer = torch.zeros(1, 6, 2, 4)
    answer[0, 1, 1, 2], answer[0, 3, 1, 2] = torch.atanh(torch.tensor(0.5)), torch.log(torch.tensor(3.0))
    # Middle at column 2 + 0.5 of 4, row 1 of 2; 3/4 of the picture wide, half of it high.
    torch.testing.assert_close(boxes(answer)[0, 1, 2], torch.tensor([0.625 - 0.375, 0.25, 0.625 + 0.375, 0.75]))


def test_iou_and_siou_worked_by_hand():
    first, second = torch.tensor([[0.0, 0.0, 0.4, 0.4]]), torch.tensor([[0.2, 0.0, 0.6, 0.4]])
    assert float(iou(first, second)) == pytest.approx(1 / 3)
    # Beside each other: no angle, so the exponent is 2 - 0; a distance of 0.2 within 0.6; the shapes are alike.
    distance = 1 - torch.exp(torch.tensor(-2 / 9))
    assert float(siou(first, second)) == pytest.approx(1 / 3 - float(distance) / 2, abs=1e-5)
    assert float(siou(first, first)) == pytest.approx(1)
    narrow = torch.tensor([[0.1, 0.0, 0.3, 0.4]])  # half as wide about the same middle
    shape = (1 - torch.exp(torch.tensor(-0.5))) ** 4
    assert float(siou(first, narrow)) == pytest.approx(0.5 - float(shape) / 2, abs=1e-5)
    far = torch.tensor([[0.9, 0.9, 1.0, 1.0]], requires_grad=True)
    siou(far, first).backward()
    assert bool(far.grad.isfinite().all())
    assert float(far.grad.abs().sum()) > 0  # boxes that do not meet still learn where to go


def test_overlapping_boxes_of_one_class_are_thinned_surest_first():
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.9], [0.0, 0.0, 0.9, 1.0], [0.0, 0.0, 0.3, 1.0]])
    score, label = torch.tensor([0.5, 0.9, 0.6, 0.4]), torch.tensor([0, 0, 1, 0])
    assert thinned(box, score, label).tolist() == [1, 2, 3]


def test_a_label_is_answered_by_its_cell_and_the_next_to_the_right_and_below():
    which, row, column = candidates(torch.tensor([[0.2, 0.2, 0.4, 0.4], [0.7, 0.0, 0.9, 0.2]]), 4, 4)
    assert list(zip(which.tolist(), row.tolist(), column.tolist(), strict=True)) == [
        *((0, 1, 1), (0, 1, 2), (0, 2, 1), (0, 2, 2)),  # middle at 1.2 cells either way
        *((1, 0, 3), (1, 1, 3)),  # at 3.2 and 0.4: to the right there is nothing
    ]


def test_average_precision_of_a_case_worked_by_hand():
    wanted = [torch.tensor([[0.0, 0.0, 100.0, 100.0, 0.0], [200.0, 200.0, 220.0, 220.0, 0.0]])]
    found = [
        torch.tensor(
            [
                [0.0, 0.0, 100.0, 90.0, 0.9, 0.0],  # IoU 0.9 with the first
                [400.0, 400.0, 420.0, 420.0, 0.8, 0.0],  # nothing there
                [0.0, 0.0, 100.0, 100.0, 0.75, 0.0],  # the first again: counted once
                [200.0, 200.0, 220.0, 212.0, 0.7, 0.0],  # IoU 0.6 with the second
            ]
        )
    ]
    values = precision(found, wanted, ("cell", "other"))
    # Precision 1 up to a recall of 1/2 (51 of 101 places), then 2/4.
    assert values["map50"] == pytest.approx((51 + 50 * 0.5) / 101)
    assert values["map50 cell"] == values["map50"]
    assert "map50 other" not in values  # of which there are none
    assert "map50 medium" not in values
    assert (values["map50 small"], values["map50 large"]) == (
        pytest.approx(1 / 2),  # the only one of its size, with a miss of that size before it
        pytest.approx(1.0),
    )
    assert values["map"] < values["map50"]
    assert precision([torch.zeros(0, 6)], wanted, ("cell",))["map50"] == 0


def test_a_right_answer_costs_almost_nothing_and_each_mistake_costs_more():
    target = torch.tensor([[0.0, 0.2, 0.2, 0.5, 0.5, 1.0]])
    answer = torch.zeros(1, 7, 4, 4)
    for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)):
        middle = torch.tensor([0.35 * 4 - column, 0.35 * 4 - row])
        answer[0, 1:3, row, column] = torch.atanh(middle)
        answer[0, 3:5, row, column] = torch.logit(torch.tensor(0.3))
        answer[0, [0, 6], row, column] = 1.0
    right = float(detection_loss(answer, target))
    assert right < 0.01
    for channel, value in ((0, 0.2), (1, 0.0), (3, 2.0), (6, 0.2)):
        wrong = answer.clone()
        wrong[0, channel] = value
        assert float(detection_loss(wrong, target)) > right + 0.01, channel
    assert float(detection_loss(torch.zeros(1, 7, 4, 4), torch.zeros(0, 6))) == 0  # nothing there, nothing said


def test_mirroring_moves_boxes_with_what_they_hold():
    pictures, labels = scenes(1, 0)
    for how in ([True, False], [False, True], [True, True]):
        turned, moved = mirrored(pictures[0], labels[0], torch.tensor(how))
        for before, after in zip(labels[0], moved, strict=True):
            x1, y1, x2, y2 = (before[:4] * 64).round().int().tolist()
            u1, v1, u2, v2 = (after[:4] * 64).round().int().tolist()
            assert int(pictures[0][:, y1:y2, x1:x2].sum()) == int(turned[:, v1:v2, u1:u2].sum())
            assert (u2 - u1, v2 - v1) == (x2 - x1, y2 - y1)


@pytest.fixture(scope="module")
def learnt():
    model, task = detector(), toy(batch=8)
    history = fit(model, task, 120)
    return model, task, history


def test_a_small_detector_learns_to_find_things(learnt):
    model, task, history = learnt
    assert sum(history.losses[-10:]) < 0.5 * sum(history.losses[:10])
    values = task.measure(model, "test")
    assert values["map50"] > 0.4
    assert task.measure(detector(), "test")["map50"] < 0.05
    assert {"map50 square", "map50 bar", "map", "loss", "pictures"} <= set(values)
    assert values == pytest.approx(replace(task, batch=16).measure(model, "test"), rel=1e-4)


def test_what_it_finds_is_drawn_before_and_after(learnt):
    model, task, _ = learnt
    done = prune(model, Magnitude(sparsity=0.5), task, measure="val")
    assert [row.of.split(",")[0] for row in done.record.pictures] == ["labelled (square red", "before", "after"]
    (grid,) = grids([("magnitude", done.record)])
    assert len(grid.captions) == 3
    assert size_of(grid.rows[0].png) == (3 * 64, 64)
    blank = task.show(detector(), "untrained")
    assert base64.b64decode(blank.png) != base64.b64decode(done.record.pictures[0].png)
    assert "map50 square" in done.record.measured("after")


def test_batches_are_whole_seeded_and_mirrored_in_training_only():
    task = toy(batch=20)
    assert [b.size for b in task.batches("val")] == [20, 20, 8]
    first, again = (next(iter(toy(batch=20, seed=3).batches("train"))) for _ in range(2))
    assert torch.equal(first.inputs[0], again.inputs[0])
    other = next(iter(task.batches("train", epoch=1)))
    assert not torch.equal(first.inputs[0], other.inputs[0])
    assert sum(b.size for b in task.batches("calibration")) == 32
    picture, labels = task.splits["val"][0][0], task.splits["val"][1][0]
    plain = next(iter(task.batches("val")))
    assert torch.equal(plain.inputs[0][0], picture.flip(0).float() / 255)  # BGR
    assert torch.equal(plain.target[plain.target[:, 0] == 0][:, 1:], labels)
    assert task.fingerprint() == toy(batch=20).fingerprint() != toy(batch=20, surest=0.5).fingerprint()


def test_mistakes_are_named():
    pictures, labels = scenes(2, 0)
    with pytest.raises(TaskError, match=r"its boxes are not x1 y1 x2 y2 class, as shares"):
        replace(toy(), splits={"train": (pictures, [held * 64 for held in labels])})
    with pytest.raises(TaskError, match=r"32 does not divide both sides"):
        replace(toy(), splits={"train": (pictures[..., :40], labels)})
    with pytest.raises(TaskError, match=r"there are labels of 1 pictures"):
        replace(toy(), splits={"train": (pictures, labels[:1])})
    with pytest.raises(TaskError, match=r"a box is of class 1 of 1"):
        replace(toy(), classes=("square",))
    with pytest.raises(TaskError, match=r"its answer is \[1, 10\], and \[batch, 7, height, width\] was wanted"):
        toy().loss(nn.Sequential(nn.Flatten(), nn.LazyLinear(10)), toy().example)
    with pytest.raises(TaskError, match=r"3,000 pictures of scenes's 'val' split were asked for"):
        list(toy().batches("val", 3000))
    with pytest.raises(SettingError, match=r"a detector of 0 classes"):
        FastestDet(0)
    with pytest.raises(TaskError, match=r"Give side=96"):
        tasks.bccd(side=100)


def test_fastestdet_is_cut_and_gives_what_it_gives_with_those_channels_at_zero():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FastestDet(3).eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.bias.data.normal_(0, 0.1)
    example = Batch((torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)),))
    coupling = couple(model, example, verify=False)
    assert not coupling.frozen
    draw = torch.Generator().manual_seed(2)
    keep = {s.name: torch.rand(s.units, generator=draw) < 0.6 for s in coupling.sites}
    for mask in keep.values():
        mask[0] = True
    before = sum(p.numel() for p in model.parameters())
    edits = removals(coupling.sites, keep)
    apply_(model, [Mask(s, keep[s.name]) for s in coupling.sites])
    with torch.no_grad():
        masked = model(*example.inputs)
        apply_(model, edits)
        cut = model(*example.inputs)
    torch.testing.assert_close(cut, masked, rtol=1e-4, atol=1e-5)
    # Every channel of the backbone, the neck and the head can go: all but the last convolution's answers.
    assert sum(p.numel() for p in model.parameters()) < 0.55 * before


@pytest.mark.data
def test_the_blood_cell_detector_finds_what_it_is_said_to(data, tmp_path):
    opened = open_model("fastestdet")
    some = tasks.open_task("bccd", model=opened.model, shown=1, train_size=2, val_size=2, test_size=16)
    values = some.measure(opened.model, "test")
    assert values["map50"] > 0.8
    assert values["map50 WBC"] > 0.9
    with pytest.raises(TaskError, match=r"was to find RBC, WBC, Platelets"):
        tasks.open_task("bccd", model=open_model("resnet20").model)
    with pytest.raises(TaskError, match=r"there can be 1 to 205"):
        tasks.bccd(train_size=206)
    done = prune(opened.model, Magnitude(sparsity=0.2), some)
    save(done, opened, tmp_path / "cut")
    again = load(tmp_path / "cut")
    batch = next(islice(some.batches("test"), 1))
    with torch.no_grad():
        assert torch.equal(again(*batch.inputs), done.model(*batch.inputs))
    held = found_in(again(*batch.inputs).detach())[0]
    assert held.shape[1] == 6
    assert bool((held[:-1, 4] >= held[1:, 4]).all())
