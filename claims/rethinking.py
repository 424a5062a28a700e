"""Pruned networks from new weights against fine-tuning, three pruners: a VGG of six convolutions on Fashion-MNIST."""

import copy
from functools import lru_cache

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Steps
from secateur.edit import Edit
from secateur.method import Method
from secateur.methods.l1_norm import L1Norm
from secateur.methods.magnitude import Magnitude
from secateur.methods.slimming import Slimming
from secateur.studies.rethinking import BUDGETS, Recipe, audit, work_of
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import fit

ARMS = {
    "l1": ("fine-tune", "scratch-E", "scratch-B", "scratch-all"),
    "slimming": ("fine-tune", "scratch-B", "scratch-all"),
    "weights": ("fine-tune", "scratch-E"),
}


def network(seed: int, settings: Settings) -> nn.Module:
    """Three stages of two convolutions with batch norms, each stage twice as wide as the one before."""
    layers: list[nn.Module] = []
    into, width = 1, settings["width"]
    for stage in range(3):
        for _ in range(2):
            out = width * 2**stage
            layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
            into = out
        layers.append(nn.MaxPool2d(2) if stage < 2 else nn.AdaptiveAvgPool2d(1))
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(into, 10))
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def task_of(seed: int, settings: Settings) -> Task:
    return fashion_mnist(
        train_size=settings["images"],
        test_size=settings["test"],
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=settings["decay"]),
        seed=seed,
    )


def steps_of(settings: Settings) -> int:
    return round(settings["epochs"] * settings["images"] / settings["batch"])


@lru_cache(maxsize=1)
def whole(seed: int, frozen: tuple) -> nn.Module:
    """The dense network, trained by the recipe."""
    settings = dict(frozen)
    model = network(seed, settings)
    fit(model, task_of(seed, settings), steps_of(settings), [LearningRate(Steps())])
    return model


@lru_cache(maxsize=1)
def pruned(pruner: str, seed: int, frozen: tuple) -> tuple[nn.Module, list[Edit]]:
    """A pruned network: of the trained one, or trained while it is pruned."""
    settings = dict(frozen)
    methods: dict[str, Method] = {
        "l1": L1Norm(sparsity=settings["channels"]),
        "slimming": Slimming(
            sparsity=settings["channels"], strength=settings["pull"], floor=2, steps=steps_of(settings)
        ),
        "weights": Magnitude(sparsity=settings["weights"]),
    }
    model = network(seed, settings) if pruner == "slimming" else copy.deepcopy(whole(seed, frozen))
    done = methods[pruner].run(model, task_of(seed, settings))
    return done.model, done.edits


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, frozen = task_of(seed, settings), tuple(sorted(settings.items()))
    if condition == "dense":
        return {"accuracy": task.measure(whole(seed, frozen), "test")["accuracy"]}
    pruner, _, name = condition.partition(" ")
    model, edits = pruned(pruner, seed, frozen)
    dense = work_of(network(seed, settings), task)
    budgets = [budget for budget in BUDGETS if budget.name == name]
    (arm,) = audit(model, edits, task, Recipe(steps_of(settings)), dense, budgets=budgets)
    return {
        "accuracy": arm.values["accuracy"],
        "epochs": arm.steps * settings["batch"] / settings["images"],
        "work": arm.work,
        "work with all before": arm.total,
        "work of the network": work_of(model, task) / dense,
    }


CLAIM = Claim(
    name="rethinking",
    number=36,
    says="Training a structurally pruned network from new weights, for as much work as the dense training took, is as "
    "good as fine-tuning the weights that pruning kept: VGG-16 cut by L1 norm 93.78 against 93.41 % on CIFAR-10, "
    "VGG-19 slimmed 93.81 against 93.60; of weight-level pruning at high sparsity it is not true.",
    source="arXiv:1810.05270, tables 1, 4 and 6",
    here="A VGG of six convolutions, 16 to 64 wide, on 3,000 pictures of Fashion-MNIST, 4 epochs; half of the channels "
    "by L1 norm or by network slimming, or 95 % of the weights by magnitude, each from new weights and fine-tuned for "
    "a quarter as many steps; epochs and work of each are told.",
    conditions=("dense", *(f"{pruner} {arm}" for pruner, arms in ARMS.items() for arm in arms)),
    expects=(
        Expectation(
            "Cut by L1 norm, scratch-B is not half a point behind fine-tuning",
            "l1 scratch-B",
            "l1 fine-tune",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation(
            "Slimmed, neither",
            "slimming scratch-B",
            "slimming fine-tune",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation(
            "Of 95 % of the weights gone, fine-tuning is not half a point behind new weights",
            "weights fine-tune",
            "weights scratch-E",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation(
            "For as much work as pruning took in all, new weights are not half a point behind fine-tuning",
            "l1 scratch-all",
            "l1 fine-tune",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "nor are those of the slimmed network",
            "slimming scratch-all",
            "slimming fine-tune",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "More work from new weights is better: scratch-B beats scratch-E",
            "l1 scratch-B",
            "l1 scratch-E",
            "accuracy",
            "higher",
            central=False,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "width": 16,
        "images": 3000,
        "test": 3000,
        "batch": 64,
        "epochs": 4,
        "rate": 0.05,
        "decay": 1e-4,
        "channels": 0.5,
        "weights": 0.95,
        "pull": 1e-3,
    },
    large={"width": 64, "images": 55_000, "test": 10_000, "batch": 128, "epochs": 40, "pull": 1e-4},
)
