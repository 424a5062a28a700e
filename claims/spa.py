"""OBSPA without fine-tuning on real data, other data and noise, and with it, against norms and torch-pruning."""

import copy
from functools import lru_cache

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import Magnitude
from secateur.axes.groups import JointObs
from secateur.axes.rules import LearningRate
from secateur.methods.spa import Anew, AsTrained, Calibration, Mend, Noise, Spa
from secateur.models import open_model
from secateur.outcome import count_flops
from secateur.tasks.images import Images, cifar10, fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import fit

SPEEDUPS = (1.3, 1.5, 2.0)
WAYS = {
    "norm": (Magnitude(), None, Calibration(), AsTrained()),
    "norm, fresh statistics": (Magnitude(), None, Calibration(), Anew()),
    "obspa, real data": (JointObs(), Mend(), Calibration(), Anew()),
    "obspa, other data": (JointObs(), Mend(), Calibration(), Anew()),
    "obspa, noise": (JointObs(), Mend(), Noise(), AsTrained()),
}
UNTUNED = tuple(f"{way}@{s}" for s in SPEEDUPS for way in WAYS if s == 1.5 or way != "obspa, other data")
TUNED = ("norm, tuned@2.0", "obspa, real data, tuned@2.0")


@lru_cache(maxsize=1)
def task_of(seed: int, images: int, test: int) -> Images:
    learner = Sgd(0.02, decay=5e-5, nesterov=True)
    return cifar10(train_size=images, val_size=500, test_size=test, seed=seed, batch=128, learner=learner)


@lru_cache(maxsize=1)
def elsewhere(samples: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Clothes in grey that a seed draws, enlarged to the photographs' size and put into three channels."""
    x, y = fashion_mnist(train_size=10_000).splits["train"]
    drawn = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:samples]
    wide = torch.nn.functional.pad(x[drawn].reshape(-1, 1, 28, 28), (2, 2, 2, 2)).expand(-1, 3, -1, -1)
    return wide.contiguous(), y[drawn]


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model = task_of(seed, settings["images"], settings["test"]), open_model(settings["network"]).model
    if condition == "dense":
        return {"accuracy": task.measure(model, "test")["accuracy"]}
    way, _, speedup = condition.partition("@")
    name = way.removesuffix(", tuned")
    criterion, repair, data, norms = WAYS[name]
    if name == "obspa, other data":
        task = Images(
            "cifar10 seen through clothes",
            {**task.splits, "calibration": elsewhere(settings["samples"], seed)},
            seed=seed, mean=task.mean, std=task.std, batch=128,
        )  # fmt: skip
    method = Spa(
        sparsity=1 - 1 / float(speedup), of="flops", criterion=criterion, repair=repair, data=data, norms=norms,
        samples=settings["samples"],
    )  # fmt: skip
    dense = copy.deepcopy(model)
    done = method.run(model, task)
    found = {"flops": _flops(dense, task) / _flops(done.model, task)}
    if way.endswith("tuned"):
        fit(done.model, task, settings["steps"], [LearningRate()])
    return {**found, "accuracy": task.measure(done.model, "test")["accuracy"]}


def _flops(model: nn.Module, task: Images) -> float:
    return float(count_flops(model, task.example) or 0)


CLAIM = Claim(
    name="spa",
    number=34,
    says="Without fine-tuning, second-order group scores with weights solved anew keep far more accuracy than group "
    "norms at equal FLOPs, on the network's own data, on other data, and without any.",
    source="arXiv:2403.18955, section 4.3",
    here="ResNet-56 on CIFAR-10 (JPEG copy, 89.5 % top-1), the network at a fraction of its FLOPs: 128 training "
    "images, 128 grey pictures of clothes, or noise; 20 steps of fine-tuning beside it at an equal budget.",
    conditions=("dense", *UNTUNED, *TUNED),
    expects=(
        Expectation(
            "OBSPA on real data keeps 10 points more than group norms at 1.5x",
            "obspa, real data@1.5", "norm@1.5", "accuracy", "higher", margin=0.10,
        ),
        Expectation("and at 2x", "obspa, real data@2.0", "norm@2.0", "accuracy", "higher", margin=0.10),
        Expectation(
            "it is ahead of norms with fresh statistics too, at 1.5x",
            "obspa, real data@1.5", "norm, fresh statistics@1.5", "accuracy", "higher",
        ),
        Expectation(
            "on other data it is ahead of group norms at 1.5x",
            "obspa, other data@1.5", "norm@1.5", "accuracy", "higher",
        ),
        Expectation(
            "on noise it is ahead of group norms at 1.5x", "obspa, noise@1.5", "norm@1.5", "accuracy", "higher"
        ),
        Expectation(
            "noise is behind real data at 1.5x", "obspa, real data@1.5", "obspa, noise@1.5", "accuracy", "higher"
        ),
        Expectation(
            "after equal fine-tuning OBSPA is not behind norms by more than a point at 2x",
            "obspa, real data, tuned@2.0", "norm, tuned@2.0", "accuracy", "higher", margin=-0.01, central=False,
        ),
    ),
    seeds=(0, 1, 2),
    settings={"network": "resnet56", "images": 4000, "test": 1000, "samples": 128, "steps": 20},
    large={"images": 45_000, "test": 10_000, "samples": 1024, "steps": 2000},
    once=("dense", *(f"norm@{s}" for s in SPEEDUPS)),
)  # fmt: skip
