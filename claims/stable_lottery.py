"""Going back to an early step against going back to the start, and twins that say why: a small residual network."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean, pstdev

import torch
from torch import nn

from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes.rewinding import (
    Course,
    Keep,
    Rewind,
    Rounds,
    Together,
    Whole,
    magnitudes,
    reinitialize_,
    search,
    shuffled,
    train_whole,
)
from secateur.cut import weights
from secateur.methods.stable_lottery import Twins, controls
from secateur.models.resnet import CifarResNet
from secateur.site import Site
from secateur.task import Task, generator
from secateur.tasks.images import cifar10, fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot

WHEN = ("start", "early", "later")  # the steps gone back to; the settings say which they are
TWINS = Twins()


def network(kind: str, seed: int, settings: Settings) -> nn.Module:
    if kind == "mlp":
        model: nn.Module = nn.Sequential(
            nn.Flatten(), nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10)
        )
    else:
        resnet = CifarResNet(settings["depth"], width=settings["width"], channels=settings["channels"])
        model = nn.Sequential(nn.AvgPool2d(settings["pool"]), resnet) if settings["pool"] > 1 else resnet
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model.to(settings["device"])


def task_of(kind: str, seed: int, settings: Settings) -> Task:
    data = {"fashion-mnist": fashion_mnist, "cifar10": cifar10}["fashion-mnist" if kind == "mlp" else settings["data"]]
    rate = settings["mlp rate"] if kind == "mlp" else settings["rate"]
    return data(
        train_size=settings["images"],
        val_size=1000,
        test_size=settings["test"],
        seed=seed,
        batch=settings["batch"],
        learner=Sgd(rate, decay=1e-4),
    )


@dataclass(frozen=True, eq=False)
class Ground:
    """What every condition of a seed shares: above all the training of the whole network."""

    model: nn.Module
    task: Task
    sites: Sequence[Site]
    course: Course
    whole: Whole


@lru_cache(maxsize=1)
def ground(kind: str, seed: int, frozen: tuple) -> Ground:
    settings = dict(frozen)
    model, task = network(kind, seed, settings), task_of(kind, seed, settings)
    course = Course(settings["steps"], floor=0.0)
    whole = train_whole(model, task, course, at={0, settings["early"], settings["later"]})
    return Ground(model, task, weights(model), course, whole)


@lru_cache(maxsize=1)
def ticket(kind: str, step: int, seed: int, frozen: tuple) -> tuple[Rounds, Snapshot]:
    """The rounds of a ticket rewound to a step, and where the whole network ends from that step in the twins' order."""
    on, settings = ground(kind, seed, frozen), dict(frozen)

    def drop(keep: Keep, start: Snapshot) -> Keep:
        return Together().drop(on.sites, magnitudes(on.model, on.sites), keep, settings["fraction"])

    found = search(on.model, on.task, on.sites, on.course, Rewind(step), settings["rounds"], drop, whole=on.whole)
    found.early.restore_(on.model)
    return found, TWINS.whole(on.model, on.task, found.early, on.course)


def accuracy(on: Ground, ends: Sequence[Snapshot]) -> float:
    values = []
    for end in ends:
        end.restore_(on.model)
        values.append(on.task.measure(on.model, "test")["accuracy"])
    return fmean(values)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen = tuple(sorted(settings.items()))
    network_kind = "mlp" if condition.startswith("mlp ") else "resnet"
    kind, _, when = condition.removeprefix("mlp ").partition("@")
    on = ground(network_kind, seed, frozen)
    if kind == "dense":
        return {"accuracy": accuracy(on, [on.whole.end])}
    found, whole = ticket(network_kind, {"start": 0, **settings}[when], seed, frozen)
    draw = generator(on.task, condition)
    if kind == "reinitialised":
        keep, start = controls(on.model, found, draw)["reinitialised"]
        ends = []
        for order in Twins.orders:
            on.course.train(on.model, on.task, on.sites, keep, replace(start, epoch=start.epoch + order), epoch=order)
            ends.append(Snapshot.of(on.model))
        return {"accuracy": accuracy(on, ends)}
    keep = shuffled(found.keep, draw) if kind == "random mask" else found.keep
    seen = TWINS.read(on.model, on.task, on.sites, keep, found.early, on.course, whole)
    return {
        "accuracy": accuracy(on, seen.ends),  # the mean over both data orders
        "distance by pruning": seen.pruning.share,
        "distance by data order": seen.order.share,
        "angle by pruning": seen.pruning.angle,
        "angle by data order": seen.order.angle,
        "weights left": float(sum(int(k.sum()) for k in keep.values())),
    }


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """Whether tickets get better as their distances fall, over the steps gone back to."""
    rows = [measured[f"rewound@{when}"] for when in WHEN if f"rewound@{when}" in measured]
    if len(rows) < len(WHEN):
        return {}
    good = [row["accuracy"] for row in rows]
    found = {}
    for name in ("distance by pruning", "distance by data order"):
        far = [row[name] for row in rows]
        spread = pstdev(good) * pstdev(far)
        together = fmean((a - fmean(good)) * (fmean(far) - d) for a, d in zip(good, far, strict=True))
        found[f"accuracy against {name}"] = together / spread if spread else 0.0
    return {"over the steps": found}


LATER = "rewound@later"

CLAIM = Claim(
    name="stable_lottery",
    number=46,
    says="Tickets of deep networks fail when rewound to the start and match the whole network when rewound to 0.1 to "
    "7 % of training; from there on they are more stable to pruning and to the order of data than random masks.",
    source="arXiv:1903.01611, abstract and figures of stability",
    here="ResNet-8, 8 channels wide, on 10,000 images of Fashion-MNIST at 14x14 instead of ResNet-20 on CIFAR-10; 500 "
    "steps of 64 a training, learning rate 0.1 with batch norm; three rounds of 50 %; rewound to steps 0, 25 and 100; "
    "an MLP as the contrast where nothing is to be gained. Distances are over the norm of the kept weights.",
    conditions=(
        "dense",
        *(f"{kind}@{when}" for when in WHEN for kind in ("rewound", "random mask")),
        "reinitialised@later",
        "mlp dense",
        "mlp rewound@start",
        "mlp rewound@later",
    ),
    expects=(
        Expectation(
            "a ticket rewound to step 100 beats one rewound to 0", LATER, "rewound@start", "accuracy", "higher"
        ),
        Expectation("it is more stable to pruning", LATER, "rewound@start", "distance by pruning"),
        Expectation("than a random mask, too", LATER, "random mask@later", "distance by pruning"),
        Expectation(
            "and more stable to the order of data than a random mask",
            LATER,
            "random mask@later",
            "distance by data order",
        ),
        Expectation("more than one rewound to 0, too", LATER, "rewound@start", "distance by data order", central=False),
        Expectation(
            "step 25 is better than 0 already", "rewound@early", "rewound@start", "accuracy", "higher", central=False
        ),
        Expectation("a ticket beats a random mask", LATER, "random mask@later", "accuracy", "higher", central=False),
        Expectation("and its mask on other weights", LATER, "reinitialised@later", "accuracy", "higher", central=False),
        Expectation(
            "it is not more than two points behind the whole network",
            LATER,
            "dense",
            "accuracy",
            "higher",
            margin=-0.02,
            central=False,
        ),
        Expectation(
            "an MLP's ticket gains less than half a point",
            "mlp rewound@start",
            "mlp rewound@later",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "tickets get better as the distance by pruning falls",
            "over the steps",
            0.0,
            "accuracy against distance by pruning",
            "higher",
            central=False,
        ),
    ),
    seeds=(0, 1, 2, 3),
    settings={
        "data": "fashion-mnist",
        "images": 10_000,
        "test": 10_000,
        "batch": 64,
        "rate": 0.1,
        "mlp rate": 0.05,
        "steps": 500,
        "early": 25,
        "later": 100,
        "rounds": 3,
        "fraction": 0.5,
        "depth": 8,
        "width": 8,
        "channels": 1,
        "pool": 2,
        "device": "cpu",
    },
    large={
        "data": "cifar10",
        "images": 45_000,
        "batch": 128,
        "steps": 8000,
        "early": 200,
        "later": 1000,
        "rounds": 4,
        "depth": 20,
        "width": 16,
        "channels": 3,
        "pool": 1,
        "device": "cuda",
    },
    derive=derive,
)
