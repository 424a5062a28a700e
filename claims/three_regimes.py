"""Connectivity and similarity of pruned copies against where test error turns: a small residual network."""

from functools import lru_cache
from math import isnan, nan
from statistics import fmean

import torch
from torch import nn

from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes.rewinding import Course, reinitialize_
from secateur.axes.schedules import Steps
from secateur.axes.soup import Refresh
from secateur.models.resnet import CifarResNet
from secateur.studies.three_regimes import (
    Boundaries,
    Cell,
    EarlyStop,
    Grid,
    Meter,
    Retrain,
    best,
    by_density,
    calibrated,
    chosen,
    chosen_dense,
    directions,
    family,
    followed,
    probe,
    trend,
)
from secateur.task import Task
from secateur.tasks.images import cifar10, fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot

EPOCHS = (2, 4, 12)  # after which the dense training is stopped; the last is the fixed default
DENSITIES = (0.03, 0.1, 0.2, 0.5)


def network(seed: int, settings: Settings) -> nn.Module:
    resnet = CifarResNet(settings["depth"], width=settings["width"], channels=settings["channels"])
    model = nn.Sequential(nn.AvgPool2d(settings["pool"]), resnet) if settings["pool"] > 1 else resnet
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model.to(settings["device"])


@lru_cache(maxsize=1)
def task_of(seed: int, frozen: tuple) -> Task:
    settings = dict(frozen)
    return {"fashion-mnist": fashion_mnist, "cifar10": cifar10}[settings["data"]](
        train_size=settings["images"],
        val_size=1000,
        test_size=settings["test"],
        seed=seed,
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=1e-4),
    )


def steps_of(settings: Settings, epochs: float) -> int:
    return round(epochs * settings["images"] / settings["batch"])


def grid_of(settings: Settings) -> Grid:
    return Grid(
        EarlyStop(),
        tuple(float(steps_of(settings, epochs * settings["stretch"])) for epochs in EPOCHS),
        DENSITIES,
        Course(steps_of(settings, EPOCHS[-1] * settings["stretch"]), Steps(), floor=0.0),
        Retrain(steps_of(settings, settings["epochs"]), copies=settings["copies"], last=settings["last"]),
        meter=Meter(refresh=Refresh(settings["refresh"]), examples=settings["compared"]),
    )


@lru_cache(maxsize=1)
def dense(seed: int, frozen: tuple) -> dict[float, Snapshot]:
    settings = dict(frozen)
    grid = grid_of(settings)
    return family(network(seed, settings), task_of(seed, frozen), grid.knob, grid.settings, grid.course)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen, grid = tuple(sorted(settings.items())), grid_of(settings)
    epochs, density = condition.split("@")
    model, setting = network(seed, settings), grid.settings[EPOCHS.index(int(epochs))]
    dense(seed, frozen)[setting].restore_(model)
    found = probe(model, task_of(seed, frozen), float(density), grid.retrain, grid.cut, grid.meter, setting=setting)
    collapsed = isnan(found.similar)
    return {
        "error": found.error,
        "dense error": found.dense,
        "lmc": found.connected,
        "cka": 0.0 if collapsed else found.similar,
        "collapsed": float(collapsed),
    }


def cells_of(measured: Measured) -> list[Cell]:
    """The map again, its settings in epochs."""
    found = []
    for name in CONDITIONS:
        epochs, density = name.split("@")
        row = measured[name]
        similar = nan if row["collapsed"] else row["cka"]
        found.append(
            Cell(float(epochs), float(density), row["dense error"], (row["error"],), (row["lmc"],), (similar,))
        )
    return found


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """Of each seed's map: its boundaries, where error turns, what came of the advice, and of choosing by it."""
    if not all(name in measured for name in CONDITIONS):
        return {}
    cells, knob = cells_of(measured), EarlyStop()
    edges: Boundaries = calibrated(cells)
    moves = directions(cells, edges, knob)
    taken = [move for move in moves if move.moved]
    zoo = by_density(cells)
    end = float(EPOCHS[-1])
    picks = {
        "fixed": {d: next(c for c in some if c.setting == end) for d, some in zoo.items()},
        "advised": {d: followed(some, edges, knob, end, d) for d, some in zoo.items()},
        "chosen by copies": {d: chosen(some, edges) for d, some in zoo.items()},
        "chosen by dense error": {d: chosen_dense(some) for d, some in zoo.items()},
        "best": {d: min(some, key=lambda c: c.error) for d, some in zoo.items()},
    }
    low, high = (best(cells)[density] for density in (DENSITIES[0], DENSITIES[-1]))
    return {
        "map": {
            "density against best temperature": trend(cells, knob),
            "best epochs at the lowest density": low,
            "best epochs at the highest density": high,
            "eps": edges.eps,
            "kappa": edges.kappa,
        },
        "advice": {
            "share not worse": fmean(move.gain >= 0 for move in moves),
            "moves": float(len(taken)),
            "share of moves not worse": fmean(move.gain >= 0 for move in taken) if taken else 1.0,
            "gain of a move": fmean(move.gain for move in taken) if taken else 0.0,
        },
        **{name: {"error": fmean(c.error for c in some.values())} for name, some in picks.items()},
    }


CONDITIONS = tuple(f"{epochs}@{density:g}" for epochs in EPOCHS for density in DENSITIES)
END = EPOCHS[-1]

CLAIM = Claim(
    name="three_regimes",
    number=35,
    says="At low densities, where copies retrained from one pruned network are not linearly connected, networks whose "
    "dense training was noisier (stopped earlier) are better after pruning, at high densities those trained longer; "
    "the switch is sharp, and connectivity and similarity of outputs tell on which side one is.",
    source="arXiv:2305.18383, abstract and sections 4 and 5",
    here="ResNet-8, 8 channels wide, on 6,000 images of Fashion-MNIST at 14x14 instead of PreResNet-20 on CIFAR-10; "
    "one dense training of 12 epochs, stopped after 2, 4 or 12; 3 to 50 % of each convolution kept by size, two "
    "copies retrained for 5 epochs; settings were looked at with seed 10. Boundaries are calibrated on each seed's "
    "map. Advice to stay counts as not worse. Networks are chosen by the same copies whose error is told, not by a "
    "cheaper pair.",
    conditions=CONDITIONS,
    expects=(
        Expectation(
            "the best temperature rises as density falls: their rank correlation is negative",
            "map",
            0.0,
            "density against best temperature",
        ),
        Expectation("at 3 %, trained to the end, there is a barrier of more than a point", f"{END}@0.03", -0.01, "lmc"),
        Expectation("at 50 % there is not", f"{END}@0.5", -0.01, "lmc", "higher"),
        Expectation(
            "one step as advised is not worse than staying in 70 % of the cells",
            "advice",
            0.7,
            "share not worse",
            "higher",
        ),
        Expectation(
            "nor in 70 % of those where it says to move",
            "advice",
            0.7,
            "share of moves not worse",
            "higher",
            central=False,
        ),
        Expectation("a move gains on average", "advice", 0.0, "gain of a move", "higher", central=False),
        Expectation("followed from the longest training, advice is better", "advised", "fixed", "error", central=False),
        Expectation(
            "choosing by copies is better than by dense error",
            "chosen by copies",
            "chosen by dense error",
            "error",
            central=False,
        ),
        Expectation(
            "copies are more alike at 50 % than at 3 %", f"{END}@0.5", f"{END}@0.03", "cka", "higher", central=False
        ),
    ),
    seeds=(0, 1, 2),
    settings={
        "data": "fashion-mnist",
        "images": 6000,
        "test": 10_000,
        "batch": 128,
        "rate": 0.1,
        "stretch": 1,
        "epochs": 5,
        "copies": 2,
        "last": 1,
        "refresh": 0.25,
        "compared": 6400,
        "depth": 8,
        "width": 8,
        "channels": 1,
        "pool": 2,
        "device": "cpu",
    },
    large={
        "data": "cifar10",
        "images": 45_000,
        "batch": 64,
        "stretch": 13,
        "epochs": 160,
        "copies": 3,
        "last": 5,
        "refresh": 1.0,
        "depth": 20,
        "width": 16,
        "channels": 3,
        "pool": 1,
        "device": "cuda",
    },
    derive=derive,
)
