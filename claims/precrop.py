"""Narrow networks against masks with the same densities, chosen before training: ResNet-8 on Fashion-MNIST."""

import time

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import Global
from secateur.axes.allocations import kept_of
from secateur.axes.donors import Donor
from secateur.axes.probes import Snip as Probe
from secateur.axes.probes import masks_by
from secateur.axes.rewinding import reinitialize_, shuffled
from secateur.axes.rules import Hold, LearningRate
from secateur.cli.dense import Dense
from secateur.cut import weights
from secateur.edit import Edit, Mask, apply_
from secateur.methods.precrop import Nearest, PreCrop
from secateur.methods.random_pruning import RandomPruning
from secateur.models.resnet import CifarResNet
from secateur.outcome import count_flops
from secateur.task import Task, generator
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import fit

HALF = ", half left"  # a quarter is, elsewhere


def network(seed: int, settings: Settings) -> nn.Module:
    model = CifarResNet(settings["depth"], width=settings["width"], channels=1)
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


def masked(model: nn.Module, task: Task, settings: Settings, sparsity: float, mix: bool) -> list[Edit]:
    """SNIP's mask, its places shuffled within each layer or not."""
    sites = weights(model)
    scores = Probe(settings["samples"]).read(model, sites, task, sparsity).scores
    masks = masks_by(sites, scores, Global(), sparsity)
    keep = {mask.site.name: mask.keep for mask in masks}
    if mix:
        keep = shuffled(keep, generator(task, "shuffled"))
    return apply_(model, [Mask(site, keep[site.name]) for site in sites])


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model = task_of(seed, settings), network(seed, settings)
    whole = network(seed, settings)
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    condition, half, _ = condition.partition(HALF)
    sparsity, donor = 0.5 if half else settings["sparsity"], Donor(Probe(settings["samples"]))
    spent = 0.0

    def train(rules: list) -> None:
        nonlocal spent
        start = time.process_time()
        fit(model, task, steps, [LearningRate(), *rules])
        spent = time.process_time() - start

    if condition == "dense":
        train([])
    elif condition in ("snip", "shuffled snip"):
        train([Hold.of(masked(model, task, settings, sparsity, condition != "snip"))])
    elif condition == "random, snip densities":
        done = RandomPruning(sparsity=sparsity, allocation=donor, steps=0).run(model, task)
        train([Hold.of(done.edits)])
    elif condition == "uniform widths":
        Dense(sparsity=sparsity, steps=0).run(model, task)
        train([])
    else:
        crop = {
            "precrop, snip densities": PreCrop(sparsity=sparsity, densities=donor, widths=Nearest(), steps=0),
            "precrop, parameters": PreCrop(sparsity=sparsity, steps=0),
            "precrop, multiply-adds": PreCrop(sparsity=0.0, flops=sparsity, steps=0),
        }[condition]
        crop.run(model, task)
        train([])
    named = [p.detach() for p in model.parameters() if p.dim() > 1]
    prunable = sum(site.units for site in weights(whole))
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "non-zero weights": float(sum(int((p != 0).sum()) for p in named)),
        "weights allowed": float(kept_of(prunable, sparsity)),
        "work left": (count_flops(model, task.example) or 0) / (count_flops(whole, task.example) or 1),
        "seconds a step": spent / steps,
    }


CLAIM = Claim(
    name="precrop",
    number=31,
    says="What counts before training is each layer's density: narrow networks with the layer densities of a pruning "
    "at initialisation train as well as the weight-level masks, and a convex programme gives better densities still.",
    source="arXiv:2203.02549, abstract (no code; the widths are a reconstruction)",
    here="ResNet-8 of width 16 on 3,000 pictures of Fashion-MNIST, 4 epochs, a quarter of the weights left: SNIP's "
    "mask, the same shuffled within layers, random masks of its densities, narrow networks of its densities and of the "
    "programme's under a budget of parameters or of multiply-adds, and one width everywhere; four of these with half "
    "of the weights left.",
    conditions=(
        "dense",
        "snip",
        "shuffled snip",
        "random, snip densities",
        "precrop, snip densities",
        "precrop, parameters",
        "precrop, multiply-adds",
        "uniform widths",
        f"snip{HALF}",
        f"precrop, snip densities{HALF}",
        f"precrop, parameters{HALF}",
        f"uniform widths{HALF}",
    ),
    expects=(
        Expectation(
            "A narrow network of SNIP's densities is within a point of SNIP's mask",
            "precrop, snip densities",
            "snip",
            "accuracy",
            "higher",
            margin=-0.01,
        ),
        Expectation(
            "and takes less time for a step, by a factor of 1.2",
            "precrop, snip densities",
            "snip",
            "seconds a step",
            "lower",
            margin=1.2,
            ratio=True,
        ),
        Expectation(
            "The programme's widths are not half a point behind one width everywhere",
            "precrop, parameters",
            "uniform widths",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation(
            "SNIP's mask loses nothing when its places are shuffled, to within a point",
            "shuffled snip",
            "snip",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "nor do random masks of its densities",
            "random, snip densities",
            "snip",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "A quarter of the multiply-adds takes less than half the time of a step",
            "precrop, multiply-adds",
            "snip",
            "seconds a step",
            "lower",
            margin=2.0,
            ratio=True,
            central=False,
        ),
        Expectation(
            "The programme under a budget of multiply-adds is not half a point behind one width everywhere",
            "precrop, multiply-adds",
            "uniform widths",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "With half of the weights left a narrow network of SNIP's densities is within a point of SNIP's mask",
            f"precrop, snip densities{HALF}",
            f"snip{HALF}",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "and the programme's widths are not half a point behind one width everywhere",
            f"precrop, parameters{HALF}",
            f"uniform widths{HALF}",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "depth": 8,
        "width": 16,
        "images": 3000,
        "test": 3000,
        "batch": 64,
        "epochs": 4,
        "rate": 0.1,
        "decay": 5e-4,
        "sparsity": 0.75,
        "samples": 256,
    },
    large={"depth": 20, "images": 55_000, "test": 10_000, "batch": 128, "epochs": 40},
)
