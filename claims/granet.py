"""Masks that move against masks that stay: SET, RigL, gradual pruning and GraNet at equal steps, and plasticity."""

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from claims.random_pruning import network as cnn
from claims.random_pruning import task_of as fashion
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.method import Method
from secateur.methods.granet import GraNet, plasticity
from secateur.methods.random_pruning import RandomPruning
from secateur.methods.rigl import RigL
from secateur.methods.set import SparseEvolution
from secateur.models.resnet import CifarResNet
from secateur.task import Task
from secateur.tasks.images import cifar10
from secateur.tasks.learners import Sgd
from secateur.train import fit

LEVELS = ("0.95", "0.98")
KINDS = ("static", "set", "rigl", "gradual", "granet from dense", "granet from half")
PROBES = ("plasticity", "plasticity with regrowth", "plasticity at a tenth of the rate")


def task_of(seed: int, settings: Settings) -> Task:
    if settings["network"] == "cnn":
        return fashion(seed, settings)
    learner = Sgd(settings["rate"], decay=5e-4, nesterov=True)
    return cifar10(train_size=settings["images"], batch=settings["batch"], learner=learner, seed=seed)


def network(seed: int, settings: Settings) -> nn.Module:
    if settings["network"] == "cnn":
        return cnn(settings["width"], seed)
    model = CifarResNet(20)
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def method_of(kind: str, sparsity: float, steps: int, every: int) -> Method:
    timing = {"sparsity": sparsity, "steps": steps, "every": every}
    return {
        "static": lambda: RandomPruning(sparsity=sparsity, steps=steps),
        "set": lambda: SparseEvolution(**timing),
        "rigl": lambda: RigL(**timing),
        "gradual": lambda: GraNet(start=0.0, exchange=0.0, exchange_end=0.0, **timing),
        "granet from dense": lambda: GraNet(start=0.0, **timing),
        "granet from half": lambda: GraNet(start=0.5, **timing),
    }[kind]()


def recovery(kind: str, seed: int, settings: Settings, steps: int) -> dict[str, float]:
    """Half a training, at a constant learning rate or with its last tenth at a tenth of it; then the probe."""
    model, task = network(seed, settings), task_of(seed, settings)
    fit(model, task, steps // 2)
    if "tenth" in kind:
        low = {**settings, "rate": settings["rate"] / 10}
        task = task_of(seed, low)
        fit(model, task, steps // 10, epoch=100)
    regrown = 0.01 if "regrowth" in kind else 0.0  # of all weights; as many in the end with it as without
    cut = settings["probe"] + regrown
    found = plasticity(model, task, cut, steps // 10, regrow=regrown / cut, split="test", epoch=200)
    return {"gain": found.gain, "before": found.before, "kept": found.kept}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    kind, _, sparsity = condition.partition("@")
    if kind in PROBES:
        return recovery(kind, seed, settings, steps)
    model, task = network(seed, settings), task_of(seed, settings)
    found = {"training cost": 1.0, "explored": 1.0}
    if kind == "dense":
        fit(model, task, steps, [LearningRate()])
    else:
        outcome = method_of(kind, float(sparsity), steps, settings["dt"]).run(model, task)
        found = read(outcome.notes, 1 - float(sparsity))
    weights = [p.detach() for p in model.parameters() if p.dim() > 1]
    share = sum(int((p != 0).sum()) for p in weights) / sum(p.numel() for p in weights)
    return {"accuracy": task.measure(model, "test")["accuracy"], "share left": share, **found}


def read(notes: list[str], share: float) -> dict[str, float]:
    """Mean share of the weights over all steps, and share that was ever there: from the remarks of a run."""
    for note in notes:
        if "at some time" in note:
            mean, ever = (float(word.rstrip("%")) / 100 for word in note.split() if word.endswith("%"))
            return {"training cost": mean, "explored": ever}
    return {"training cost": share, "explored": share}


def at(kind: str) -> str:
    return f"{kind}@0.98"


CLAIM = Claim(
    name="granet",
    number=15,
    says="Gradual pruning that regrows as much as it exchanges is ahead of sparse training with a fixed number of "
    "weights, from half-dense nearly as good as from dense: ResNet-50 on ImageNet at 90 %, 74.5 % top-1 against 73.0 % "
    "of RigL.",
    source="arXiv:2106.10404, section 4, tables 2 and 3",
    here="A CNN of three convolutions, 16 channels wide at first, on 8,000 images of Fashion-MNIST at 95 and 98 %; "
    "the same steps, batches and optimizer for all; a fixed random ERK mask as the control.",
    conditions=("dense", *(f"{kind}@{level}" for level in LEVELS for kind in KINDS), *PROBES),
    expects=(
        Expectation(
            "GraNet from half beats a fixed mask at 98 %", at("granet from half"), at("static"), "accuracy", "higher"
        ),
        Expectation("and SET", at("granet from half"), at("set"), "accuracy", "higher"),
        Expectation("and RigL", at("granet from half"), at("rigl"), "accuracy", "higher"),
        Expectation("RigL beats a fixed mask at 98 %", at("rigl"), at("static"), "accuracy", "higher", central=False),
        Expectation(
            "RigL is not behind SET by more than half a point",
            at("rigl"),
            at("set"),
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "from half is not behind from dense by more than a point",
            at("granet from half"),
            at("granet from dense"),
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "from dense is not behind gradual pruning by more than half a point",
            at("granet from dense"),
            at("gradual"),
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "from half costs less training than from dense",
            at("granet from half"),
            at("gradual"),
            "training cost",
            "lower",
            exact=True,
            central=False,
        ),
        Expectation(
            "at equal weights, regrowth does not lessen plasticity by more than half a point",
            "plasticity with regrowth",
            "plasticity",
            "gain",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "plasticity is lower once the learning rate has fallen",
            "plasticity",
            "plasticity at a tenth of the rate",
            "gain",
            "higher",
            central=False,
        ),
    ),
    settings={
        "network": "cnn",
        "width": 16,
        "images": 8_000,
        "batch": 64,
        "rate": 0.05,
        "epochs": 4,
        "dt": 25,
        "probe": 0.9,
    },
    large={"network": "resnet20", "images": 45_000, "batch": 128, "rate": 0.1, "epochs": 100, "dt": 1000},
)
