"""Networks with random weights that have a name: the same every time, pruned, saved and read again."""

import pytest
import torch

from secateur import prune
from secateur.cli.opening import usual_task
from secateur.methods.magnitude import Magnitude
from secateur.models import load, open_model, save
from secateur.task import Batch
from secateur.tasks import Bytes, open_task
from secateur.tasks.grammar import reber

WEIGHTS = {
    "cells-small": 36_746,
    "gpt": 858_880,
    "gru": 52_402,
    "lstm": 67_702,
    "mobilenet-quarter": 215_642,
    "vgg": 1_129_514,
    "vit-tiny": 683_242,
}


def example(name: str) -> Batch:
    """A small input of a network."""
    if name in ("gru", "lstm"):
        return reber(train_size=4, val_size=2, test_size=2, shortest=5, longest=8, batch=4).example
    if name == "gpt":
        return Batch((torch.arange(16).reshape(2, 8),))
    return Batch((torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)),))


class Fed:
    """A task of one batch."""

    name, seed, metric, higher_is_better, clients = "fed", 0, "loss", False, ()

    def __init__(self, batch: Batch) -> None:
        self.example = batch

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> list[Batch]:
        return [self.example]

    def fingerprint(self) -> str:
        return "fed"


def _zeros(value: torch.Tensor) -> torch.Tensor:
    return (value == 0).sum()


@pytest.mark.parametrize("name", WEIGHTS)
def test_it_is_the_same_every_time_and_comes_back_from_a_folder(name: str, tmp_path) -> None:
    state = torch.get_rng_state()
    opened, again = open_model(name), open_model(name)
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in opened.model.parameters()) == WEIGHTS[name]
    first, second = opened.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert usual_task(opened) in ("cifar10", "reber", "wikitext2")
    outcome = prune(opened.model, Magnitude(sparsity=0.5), Fed(example(name)))
    save(outcome, opened, tmp_path / "saved")
    back = load(tmp_path / "saved")
    x = example(name)
    ours, theirs = (getattr(a, "logits", a) for a in (x.through(outcome.model), x.through(back)))
    torch.testing.assert_close(ours, theirs)
    zeros, weights = (sum(int(f(p)) for p in back.parameters() if p.dim() > 1) for f in (_zeros, torch.numel))
    assert zeros > 0.3 * weights


def test_a_model_of_256_tokens_without_a_tokenizer_reads_bytes(tmp_path) -> None:
    text = "Prüfen, messen, schneiden. " * 200
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    opened = open_model("gpt")
    task = open_task(str(tmp_path / "text.txt"), model=opened.model, window=32, batch=2)
    (ids,) = task.example.inputs
    assert int(ids.max()) < 256
    assert Bytes().decode(ids[0].tolist()) in text
    assert Bytes().encode("ü") == [195, 188]
    assert float(task.loss(opened.model, task.example)) < 6
