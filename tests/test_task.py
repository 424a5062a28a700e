"""The Task protocol: batches, random streams of one's own, training without end."""

import itertools

import pytest
import tiny
import torch
from torch import nn

from secateur import fit, prune
from secateur.errors import TaskError
from secateur.method import load
from secateur.method import tiny as tiny_settings
from secateur.task import Batch, Onward, Task, forever, generator
from secateur.tasks import Labelled


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_toy_tasks_are_tasks_and_fit_their_models(family: str) -> None:
    task, model = tiny.make_task(family), tiny.make_model(family)
    assert isinstance(task, Task)
    task.example.through(model)
    batch = next(iter(task.batches("train")))
    assert task.loss(model, batch).shape == ()
    assert task.metric in task.measure(model)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_tiny_models_can_be_trained(family: str) -> None:
    task = tiny.make_task(family)
    before, after = (task.measure(m) for m in (tiny.make_model(family), tiny.trained(family)))
    loss = "nll" if task.metric == "perplexity" else "loss"
    assert after[loss] < 0.5 * before[loss]
    assert (after[task.metric] > before[task.metric]) == task.higher_is_better


def test_tiny_models_come_from_their_seed_and_leave_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, again, other = tiny.mlp(0), tiny.mlp(0), tiny.mlp(1)
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


def test_a_trained_model_is_the_callers_own() -> None:
    with torch.no_grad():
        tiny.trained("mlp")[0].weight.zero_()
    assert bool(tiny.trained("mlp")[0].weight.any())


@pytest.mark.parametrize("name", ["magnitude", "l1_norm", "global_mp", "wanda"])
def test_modules_keep_their_own_modes_and_gradients_stay_with_the_caller(name: str) -> None:
    task, model = make_images(), small_cnn()
    model.train()
    model[1].eval()  # norms held still while the rest is trained
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    outcome = prune(model, tiny_settings(load(name)), task, measure="val", timing=True)
    for each in (model, outcome.model):
        assert [m.training for m in each.modules()] == [True, True, False, True, True, True, True]
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert all(p.grad is None for p in outcome.model.parameters())
    with pytest.raises(TaskError):
        prune(model, tiny_settings(load(name)), tiny.make_task("decoder"))
    fit(model, task, steps=1)
    assert not model[1].training


def make_images() -> Labelled:
    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(48, 3, 8, 8, generator=draw), torch.randint(0, 4, (48,), generator=draw)
    return Labelled("images", {"train": (images[:32], labels[:32]), "val": (images[32:], labels[32:])}, batch=16)


def small_cnn() -> nn.Sequential:
    kernel = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
    return nn.Sequential(kernel, nn.BatchNorm2d(8), nn.ReLU(), *head)


def test_batch_goes_through_by_position_or_by_keyword() -> None:
    def subtract(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a - b

    a, b = torch.tensor([5.0]), torch.tensor([3.0])
    assert Batch((a, b)).through(subtract) == 2  # type: ignore[arg-type]  # no module, but called as one
    assert Batch({"b": a, "a": b}).through(subtract) == -2  # type: ignore[arg-type]  # likewise


def test_batch_size_is_that_of_the_first_tensor_with_an_axis() -> None:
    assert Batch((torch.zeros(3, 5),)).size == 3
    assert Batch({"scale": torch.tensor(1.0), "x": torch.zeros(4)}).size == 4
    assert Batch(("word",)).size == 1


def test_batch_moves_inputs_and_target_and_keeps_what_is_no_tensor() -> None:
    moved = Batch((torch.zeros(2), "word"), torch.zeros(2)).to("meta")
    assert moved.inputs[0].device.type == "meta"  # type: ignore[index]  # inputs may be a dict, not here
    assert moved.inputs[1] == "word"  # type: ignore[index]  # likewise
    assert moved.target.device.type == "meta"


def test_random_streams_differ_by_purpose_and_seed_only() -> None:
    def draw(seed: int, purpose: str) -> float:
        return float(torch.rand((), generator=generator(tiny.toy_vectors(seed=seed), purpose)))

    assert draw(0, "noise") == draw(0, "noise")
    assert len({draw(0, "noise"), draw(0, "order"), draw(1, "noise")}) == 3


def test_training_goes_on_through_epochs_each_in_its_own_order() -> None:
    task = tiny.toy_vectors(batch=256, examples=768)  # 512 to train on: two batches an epoch
    steps = list(itertools.islice(forever(task), 5))
    assert [(epoch, place) for epoch, place, _ in steps] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0)]
    assert not torch.equal(steps[0][2].target, steps[2][2].target)
    again = next(forever(task, epoch=1))
    assert torch.equal(again[2].inputs[0], steps[2][2].inputs[0])  # type: ignore[index]  # a tuple here


def test_batches_are_drawn_on_from_where_a_run_stopped() -> None:
    task = tiny.toy_vectors(batch=256, examples=768)  # two batches an epoch
    wanted = [(epoch, place + 1, batch) for epoch, place, batch in itertools.islice(forever(task, 3), 9)]
    assert wanted[-1][0] > 3  # into another epoch
    drawn = Onward(3)
    assert drawn.place == (3, 0)
    for number, (epoch, place, batch) in enumerate(wanted):
        assert torch.equal(drawn.next(task).target, batch.target)
        assert drawn.place == (epoch, place)
        if number % 2:
            drawn = Onward(*drawn.place)


def test_nothing_to_train_on_is_an_error() -> None:
    class Empty:
        name = "empty"

        def batches(self, split: str, n: int | None = None, epoch: int = 0) -> list[Batch]:
            return []

    with pytest.raises(TaskError, match=r"empty was to be trained on, but its training split is empty\."):
        next(forever(Empty()))  # type: ignore[arg-type]  # as much of a task as is asked
