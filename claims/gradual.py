"""Large sparse against small dense, and a cubic ramp against a linear one and a single cut: an MLP on Fashion-MNIST."""

from itertools import pairwise

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.methods.gradual import GradualPruning
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Adam
from secateur.train import fit

WIDTHS = (784, 512, 256, 10)


def network(widths: tuple[int, ...], seed: int) -> nn.Module:
    layers = [layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())]
    model = nn.Sequential(*layers[:-1])
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def matched(widths: tuple[int, ...], sparsity: float) -> tuple[int, ...]:
    """Hidden widths shrunk in proportion until a dense net has no fewer weights than the sparse one keeps."""
    kept = (1 - sparsity) * sum(a * b for a, b in pairwise(widths))
    for hidden in range(1, widths[1] + 1):
        small = (widths[0], *(max(round(w * hidden / widths[1]), 1) for w in widths[1:-1]), widths[-1])
        if sum(a * b for a, b in pairwise(small)) >= kept:
            return small
    return widths


def task_of(seed: int, settings: Settings) -> Task:
    return fashion_mnist(flat=True, seed=seed, batch=settings["batch"], learner=Adam(settings["rate"]))


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task = task_of(seed, settings)
    steps = round(settings["epochs"] * 55_000 / settings["batch"])
    kind, _, sparsity = condition.partition("@")
    if kind in ("dense", "small dense"):
        widths = WIDTHS if kind == "dense" else matched(WIDTHS, float(sparsity))
        model = network(widths, seed)
        fit(model, task, steps, [LearningRate()])
    else:
        model = network(WIDTHS, seed)
        ramp = {"begin": settings["begin"], "until": settings["until"]}
        power = {"sparse": 3.0, "cubic": 3.0, "linear": 1.0, "one-shot": 3.0}[kind]
        if kind == "one-shot":
            ramp["begin"] = ramp["until"]  # everything at the step where the ramps end
        method = GradualPruning(sparsity=float(sparsity), steps=steps, every=settings["dt"], power=power, **ramp)
        method.run(model, task)
    weights = [p for p in model.parameters() if p.dim() == 2]
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "non-zero weights": float(sum(int((p != 0).sum()) for p in weights)),
        "non-zero parameters": float(sum(int((p != 0).sum()) for p in model.parameters())),
    }


CLAIM = Claim(
    name="gradual",
    number=5,
    says="A large sparse network beats a small dense one with as many non-zero parameters: MobileNet at 0.46 M has "
    "61.8 % top-1 pruned to 90 %, and 50.6 % when 0.25 as wide.",
    source="arXiv:1710.01878, section 4, tables 1 to 4",
    here="An MLP 784-512-256-10 on Fashion-MNIST trained with the cubic ramp to 90 and 95 %, against dense nets whose "
    "hidden widths shrink in proportion to no fewer weights; same steps, batches and optimizer (Adam, cosine).",
    conditions=(
        "sparse@0.9",
        "small dense@0.9",
        "linear@0.95",
        "one-shot@0.95",
        "cubic@0.95",
        "small dense@0.95",
        "dense",
    ),
    expects=(
        Expectation("sparse beats small dense at 90 %", "sparse@0.9", "small dense@0.9", "accuracy", "higher"),
        Expectation("sparse beats small dense at 95 %", "cubic@0.95", "small dense@0.95", "accuracy", "higher"),
        Expectation(
            "a cubic ramp beats one cut at its end", "cubic@0.95", "one-shot@0.95", "accuracy", "higher", central=False
        ),
        Expectation(
            "a linear ramp beats one cut at its end",
            "linear@0.95",
            "one-shot@0.95",
            "accuracy",
            "higher",
            central=False,
        ),
        Expectation(
            "a cubic ramp is not behind a linear one by more than 0.2 points",
            "cubic@0.95",
            "linear@0.95",
            "accuracy",
            "higher",
            margin=-0.002,
            central=False,
        ),
        Expectation(
            "at 90 % sparse is within a point of the dense net of its width",
            "sparse@0.9",
            "dense",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "the sparse net has no more non-zero weights than the dense one it beats",
            "sparse@0.9",
            "small dense@0.9",
            "non-zero weights",
            "lower",
            margin=-1.0,
            exact=True,
        ),
    ),
    settings={"batch": 256, "rate": 2e-3, "epochs": 8, "begin": 0.1, "until": 0.65, "dt": 25},
    large={"batch": 128, "epochs": 30, "dt": 100},
)
