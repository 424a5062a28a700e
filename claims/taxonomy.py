"""The survey's seven pairs: a ResNet-20 on CIFAR-10 for five of them, an MLP on Fashion-MNIST for the other two."""

import json
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from claims.global_mp import pretrained
from claims.gradual import network
from claims.harness import Claim, Expectation, Settings
from secateur.axes.rules import LearningRate
from secateur.models.resnet import resnet20
from secateur.studies.taxonomy import Ground, Side, pair_of
from secateur.task import Task
from secateur.tasks.images import Images, cifar10, fashion_mnist
from secateur.tasks.learners import Adam, Sgd
from secateur.train import fit

SIDES = {
    1: ("weights", "N:M", "channels", "channels, equal flops"),
    2: ("many cuts", "one cut"),
    3: ("magnitude", "synflow", "snip", "wanda"),
    4: ("trained", "initial", "initial, as long in all"),
    5: ("fine-tune", "scratch-E", "scratch-B"),
    6: ("prune, then adapt", "adapt, then prune"),
    7: ("dynamic", "static"),
}
WIDTHS = (784, 300, 100, 10)


@lru_cache(maxsize=1)
def photographs(train: int, test: int) -> Images:
    return cifar10(train_size=train, val_size=500, test_size=test)


@lru_cache(maxsize=1)
def clothes(train: int, test: int, large: bool) -> Images:
    """Fashion-MNIST; large: 32x32, grey in three colours."""
    found = fashion_mnist(train_size=train, val_size=500, test_size=test, flat=not large)
    if not large:
        return found

    def grown(images: Tensor) -> Tensor:
        return F.pad(images, (2, 2, 2, 2)).expand(-1, 3, -1, -1).contiguous()

    splits = {name: (grown(images), labels) for name, (images, labels) in found.splits.items()}
    return replace(found, splits=splits, mean=found.mean * 3, std=found.std * 3)


def untrained(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return resnet20()


def residual(settings: Settings, pair: int) -> Ground:
    def task(seed: int, times: float) -> Task:
        learner = Sgd(settings["rate"] * times, decay=1e-4, nesterov=True)
        return replace(
            photographs(settings["images"], settings["test"]), seed=seed, batch=settings["batch"], learner=learner
        )

    return Ground(
        start=untrained, trained=lambda seed: pretrained(), task=task, examples=settings["images"],
        batch=settings["batch"], sparsity=settings["sparsity"][str(pair)],
        epochs=settings["epochs"], rate=settings["fine"], repeats=3,
    )  # fmt: skip


def target(settings: Settings) -> Any:
    def task(seed: int, times: float) -> Task:
        learner = Sgd(settings["adapt"] * times, decay=1e-4, nesterov=True)
        found = clothes(settings["images"], settings["test"], True)
        return replace(found, seed=seed, batch=settings["batch"], learner=learner)

    return task


def perceptron(settings: Settings, pair: int) -> Ground:
    size, before = settings["mlp images"], settings["mlp epochs"]

    def task(seed: int, times: float) -> Task:
        found = clothes(size, settings["mlp test"], False)
        return replace(found, seed=seed, batch=128, learner=Adam(settings["mlp rate"] * times))

    def start(seed: int) -> nn.Module:
        return network(WIDTHS, seed)

    def trained(seed: int) -> nn.Module:
        model = start(seed)
        fit(model, task(seed, 1.0), round(before * size / 128), [LearningRate()])
        return model

    return Ground(
        start=start, trained=trained, task=task, examples=size, batch=128, sparsity=settings["sparsity"][str(pair)],
        epochs=settings["mlp after"], before=before,
    )  # fmt: skip


@lru_cache(maxsize=1)
def sides(pair: int, seed: int, frozen: str) -> dict[str, Side]:
    settings = json.loads(frozen)
    ground = (perceptron if pair in (4, 7) else residual)(settings, pair)
    return {side.name: side for side in pair_of(pair, target(settings)).run(ground, seed)}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    pair, _, name = condition.partition(": ")
    side = sides(int(pair), seed, json.dumps(dict(settings), sort_keys=True))[name]
    told = {
        "accuracy": side.quality,
        "sparsity": side.sparsity,
        "parameters": side.parameters,
        "flops": side.flops,
        "epochs": side.epochs,
        "work": side.work,
    }
    return told if side.time is None else {**told, "time": side.time}


SETTINGS = {
    "images": 1024,
    "batch": 64,
    "test": 500,
    "epochs": 1.0,
    "rate": 0.1,
    "fine": 0.3,
    "adapt": 0.05,
    "sparsity": {"1": 0.5, "2": 0.8, "3": 0.75, "4": 0.95, "5": 0.3, "6": 0.75, "7": 0.8},
    "mlp images": 6000,
    "mlp test": 10_000,
    "mlp epochs": 6.0,
    "mlp after": 3.0,
    "mlp rate": 2e-3,
}


def expected(says: str, left: str, right: str, *, central: bool = False) -> Expectation:
    return Expectation(says, left, right, "accuracy", "higher", central=central)


CLAIM = Claim(
    name="taxonomy",
    number=9,
    says="Single weights keep more accuracy than structures at equal sparsity; many cuts usually beat one, at more "
    "cost; pruning trained weights beats pruning initial ones in the same pattern; whether fine-tuning beats training "
    "from new weights depends on the budget and the structure.",
    source="arXiv:2308.06767, comparisons (recalled from memory: which side it names for data, transfer and dynamic "
    "pruning we do not know, and those expectations are ours)",
    here="Pairs 1, 2, 3 and 5: a trained ResNet-20 on 1,024 photographs of CIFAR-10, one epoch of 16 steps after the "
    "cut, 500 test pictures. Pair 6: the same network, cut before or half-way through an epoch on Fashion-MNIST at "
    "32x32. Pairs 4 and 7: an MLP 784-300-100-10 on 6,000 pictures of Fashion-MNIST, 6 epochs and 3 after the cut, "
    "10,000 test pictures; in pair 7 the gates' own work is counted. Learning rates were chosen on seed 9.",
    conditions=tuple(f"{pair}: {name}" for pair, names in SIDES.items() for name in names),
    expects=(
        expected("1: single weights beat channels at equal parameters", "1: weights", "1: channels", central=True),
        expected("1: and at equal multiply-adds", "1: weights", "1: channels, equal flops", central=True),
        expected("1: N:M is behind free single weights", "1: weights", "1: N:M"),
        expected("1: and ahead of channels", "1: N:M", "1: channels"),
        expected("2: many cuts beat one in as many epochs", "2: many cuts", "2: one cut", central=True),
        expected("3: Wanda beats magnitude", "3: wanda", "3: magnitude"),
        expected("3: SNIP beats magnitude", "3: snip", "3: magnitude"),
        expected("3: Wanda beats SynFlow", "3: wanda", "3: synflow"),
        expected(
            "4: trained weights beat initial ones, trained as long after the cut",
            "4: trained",
            "4: initial",
            central=True,
        ),
        expected("4: and as long in all", "4: trained", "4: initial, as long in all"),
        expected("5: fine-tuning beats new weights at equal epochs", "5: fine-tune", "5: scratch-E", central=True),
        expected("5: and at equal work", "5: fine-tune", "5: scratch-B"),
        expected("6: pruning once adapted beats pruning before", "6: adapt, then prune", "6: prune, then adapt"),
        expected("7: other channels for each input beat the same for all", "7: dynamic", "7: static"),
    ),
    settings=SETTINGS,
)
