"""Random masks against dense nets of three widths: CNNs on Fashion-MNIST at 90 %, rules and donors of shares."""

import torch
from torch import nn

from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes import Allocation, Erk, Uniform
from secateur.axes.donors import Donor
from secateur.axes.probes import Snip as Probe
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.methods.random_pruning import RandomPruning
from secateur.methods.snip import Snip
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import fit

WIDTHS = ("4", "8", "16")
KINDS = ("dense", "uniform", "erk", "snip shares", "snip", "small dense")


def network(width: int, seed: int) -> nn.Module:
    """Three convolutions of width, 2 width and 4 width channels, and a classifier: 1x28x28 -> 10."""

    def stage(a: int, b: int) -> list[nn.Module]:
        return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]

    layers = [*stage(1, width), nn.MaxPool2d(2), *stage(width, 2 * width), nn.MaxPool2d(2)]
    layers += [*stage(2 * width, 4 * width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, 10)]
    model = nn.Sequential(*layers)
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters() if p.dim() > 1)


def matched(width: int, sparsity: float) -> int:
    """The narrowest dense net with no fewer weights than the sparse one keeps."""
    kept = (1 - sparsity) * size(network(width, 0))
    return next(w for w in range(1, width + 1) if size(network(w, 0)) >= kept)


def task_of(seed: int, settings: Settings) -> Task:
    learner = Sgd(settings["rate"], decay=5e-4, nesterov=True)
    return fashion_mnist(train_size=settings["images"], batch=settings["batch"], learner=learner, seed=seed)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, text = condition.partition("@")
    task, width, sparsity = task_of(seed, settings), int(text), settings["sparsity"]
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    model = network(matched(width, sparsity) if kind == "small dense" else width, seed)
    rules: dict[str, Allocation] = {
        "uniform": Uniform(),
        "erk": Erk(),
        "snip shares": Donor(Probe(settings["samples"])),
    }
    if kind in rules:
        RandomPruning(sparsity=sparsity, allocation=rules[kind], steps=steps).run(model, task)
    elif kind == "snip":
        Snip(sparsity=sparsity, samples=settings["samples"], steps=steps).run(model, task)
    else:
        fit(model, task, steps, [LearningRate()])
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "non-zero weights": float(sum(int((p != 0).sum()) for p in weights)),
    }


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """What each sparse net lacks of the dense one of its width."""
    found = {}
    for width in WIDTHS:
        for kind in KINDS[1:]:
            if {f"dense@{width}", f"{kind}@{width}"} <= measured.keys():
                lost = measured[f"dense@{width}"]["accuracy"] - measured[f"{kind}@{width}"]["accuracy"]
                found[f"gap of {kind}@{width}"] = {"gap": lost}
    return found


CLAIM = Claim(
    name="random_pruning",
    number=2,
    says="Random masks with good shares per layer train as well as dense networks once these are wide and deep enough; "
    "a random Wide ResNet-50 is ahead of the dense one on ImageNet.",
    source="arXiv:2202.02643, abstract and section 4, figures 2 and 3",
    here="CNNs of three convolutions, 4, 8 and 16 channels wide at first, on 10,000 images of Fashion-MNIST at 90 %, "
    "against the dense net of their width, a dense net of no fewer weights, and SNIP's own mask.",
    conditions=tuple(f"{kind}@{width}" for width in WIDTHS for kind in KINDS),
    expects=(
        Expectation("the gap of ERK to dense shrinks from width 4 to 16", "gap of erk@16", "gap of erk@4", "gap"),
        Expectation("at width 16 it is below five points", "erk@16", "dense@16", "accuracy", "higher", margin=-0.05),
        Expectation(
            "ERK is not behind uniform by more than half a point at width 16",
            "erk@16",
            "uniform@16",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation("and shrinks at each doubling", "gap of erk@8", "gap of erk@4", "gap", central=False),
        Expectation("the second, too", "gap of erk@16", "gap of erk@8", "gap", central=False),
        Expectation(
            "SNIP's shares at random places are within a point of SNIP's places at width 16",
            "snip shares@16",
            "snip@16",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "random ERK beats a dense net of no fewer weights at width 16",
            "erk@16",
            "small dense@16",
            "accuracy",
            "higher",
            central=False,
        ),
        Expectation(
            "which it does not outweigh",
            "erk@16",
            "small dense@16",
            "non-zero weights",
            "lower",
            margin=-1.0,
            central=False,
            exact=True,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "images": 10_000,
        "batch": 64,
        "rate": 0.05,
        "epochs": 4,
        "sparsity": 0.9,
        "samples": 128,
    },
    large={"images": 55_000, "epochs": 20, "batch": 128, "rate": 0.1},
    derive=derive,
)
