"""What ranks first by accuracy alone, and where training costs the same: an MLP on Fashion-MNIST, five ways."""

from itertools import pairwise

from torch import nn

from claims.gradual import matched, network
from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes import Global
from secateur.axes.rules import Hold, LearningRate
from secateur.cut import weights
from secateur.edit import Mask
from secateur.method import Method
from secateur.methods.magnitude import Magnitude
from secateur.methods.random_pruning import RandomPruning
from secateur.methods.rigl import RigL
from secateur.methods.snip import Snip
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.tasks.robustness import robustness
from secateur.train import fit

WIDTHS = (784, 300, 100, 10)
LEVELS = ("0.9", "0.95")
KINDS = ("snip", "rigl", "static", "small dense")


def task_of(condition: str, seed: int, settings: Settings) -> Task:
    """Fashion-MNIST with the learning rate that was best for a kind under its budget."""
    kind, _, rest = condition.partition("@")
    learner = Sgd(settings["rates"][f"{kind}, operations" if "operations" in rest else kind], decay=5e-4, nesterov=True)
    return fashion_mnist(train_size=settings["images"], flat=True, seed=seed, batch=settings["batch"], learner=learner)


def density(model: nn.Module) -> float:
    """Of the matrices of a model, against those of the whole network: what a step of training costs of a dense one."""
    return sum(int((p != 0).sum()) for p in model.parameters() if p.dim() == 2) / whole()


def whole() -> int:
    return sum(a * b for a, b in pairwise(WIDTHS))


def magnitude(task: Task, sparsity: float, seed: int, steps: int, settings: Settings) -> tuple[nn.Module, float]:
    """Train whole, keep the largest of all weights, train on: two thirds and a third of the steps."""
    model, first = network(WIDTHS, seed), round(steps * settings["first"])
    fit(model, task, first, [LearningRate()])
    edits = Magnitude(sparsity=sparsity, allocation=Global()).run(model, task).edits
    keep = {edit.site.name: edit.keep for edit in edits if isinstance(edit, Mask)}
    fit(model, task, steps - first, [LearningRate(), Hold(weights(model), keep)], epoch=100)
    return model, first + (steps - first) * density(model)


def method_of(kind: str, sparsity: float, steps: int, settings: Settings) -> Method:
    if kind == "snip":
        return Snip(sparsity=sparsity, steps=steps, samples=settings["samples"])
    if kind == "static":
        return RandomPruning(sparsity=sparsity, steps=steps)
    return RigL(sparsity=sparsity, steps=steps, every=max(1, steps // settings["updates"]))


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, rest = condition.partition("@")
    level, _, budget = rest.partition(" at equal ")
    task = task_of(condition, seed, settings)
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    if kind == "dense":
        model = network(WIDTHS, seed)
        fit(model, task, steps, [LearningRate()])
        return told(model, task, float(steps))
    sparsity = float(level)
    if kind == "magnitude":
        model, spent = magnitude(task, sparsity, seed, steps, settings)
        return told(model, task, spent)
    small = matched(WIDTHS, sparsity)
    share = sum(a * b for a, b in pairwise(small)) / whole() if kind == "small dense" else 1 - sparsity
    if budget == "operations":  # as many as training whole and then pruned takes
        first = settings["first"]
        steps = round(steps * (first + (1 - first) * (1 - sparsity)) / share)
    if kind == "small dense":
        model = network(small, seed)
        fit(model, task, steps, [LearningRate()])
    else:
        model = method_of(kind, sparsity, steps, settings).run(network(WIDTHS, seed), task).model
    return told(model, task, steps * density(model))


def told(model: nn.Module, task: Task, spent: float) -> dict[str, float]:
    """Accuracies, and what training cost in steps of the dense network."""
    more = robustness(model, task, "test")
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "accuracy under noise": more["accuracy under noise"],
        "calibration error": more["calibration error"],
        "dense steps": spent,
    }


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """How far magnitude leads each, by both budgets."""
    first = measured["magnitude@0.95"]["accuracy"]
    return {
        f"lead over {kind} at equal {budget}": {
            "accuracy": first - measured[f"{kind}@0.95 at equal {budget}"]["accuracy"]
        }
        for kind in KINDS
        for budget in ("epochs", "operations")
    }


def epochs(kind: str, level: str = "0.95") -> str:
    return f"{kind}@{level} at equal epochs"


def operations(kind: str) -> str:
    return f"{kind}@0.95 at equal operations"


CLAIM = Claim(
    name="ten_lessons",
    number=10,
    says="Sparse networks are to be held against dense ones of the same size, ranked at what training cost, and beside "
    "random masks with good shares: without that a ranking says little.",
    source="arXiv:2302.02596, abstract (a handbook without figures; the experiment is ours)",
    here="An MLP 784-300-100-10 on 6,000 pictures of Fashion-MNIST. Equal epochs: 9; equal operations: as many as "
    "training it whole for 6 and what magnitude left for 3, zeros counted as free. Accuracy on 10,000 test pictures. "
    "Learning rates are the best of 0.02, 0.05, 0.1, 0.2 and 0.4 for each kind and budget at 95 %, on seed 9.",
    conditions=(
        "dense",
        "magnitude@0.95",
        *(epochs(kind) for kind in KINDS),
        *(operations(kind) for kind in KINDS),
        *(epochs(kind, "0.9") for kind in ("snip", "static")),
    ),
    expects=(
        Expectation(
            "by accuracy alone magnitude after training is ahead of RigL",
            "magnitude@0.95",
            epochs("rigl"),
            "accuracy",
            "higher",
        ),
        Expectation("and of SNIP", "magnitude@0.95", epochs("snip"), "accuracy", "higher"),
        Expectation(
            "and of a dense network of the same size", "magnitude@0.95", epochs("small dense"), "accuracy", "higher"
        ),
        Expectation(
            "at equal operations its lead over RigL is smaller",
            "lead over rigl at equal operations",
            "lead over rigl at equal epochs",
            "accuracy",
            "lower",
        ),
        Expectation(
            "and that over a fixed random mask",
            "lead over static at equal operations",
            "lead over static at equal epochs",
            "accuracy",
            "lower",
        ),
        Expectation(
            "at 90 % random masks with ERK shares are not behind SNIP by more than a point",
            epochs("static", "0.9"),
            epochs("snip", "0.9"),
            "accuracy",
            "higher",
            margin=-0.01,
        ),
        Expectation(
            "a mask that moves often enough beats one that stays, at equal operations",
            operations("rigl"),
            operations("static"),
            "accuracy",
            "higher",
        ),
        Expectation(
            "at equal operations the dense network of the same size is behind RigL",
            operations("rigl"),
            operations("small dense"),
            "accuracy",
            "higher",
            central=False,
        ),
    ),
    derive=derive,
    settings={
        "images": 6000,
        "batch": 128,
        "epochs": 9,
        "first": 2 / 3,
        "rates": {
            "dense": 0.1,
            "magnitude": 0.2,
            "snip": 0.4,
            "rigl": 0.1,
            "static": 0.4,
            "small dense": 0.05,
            "snip, operations": 0.4,
            "rigl, operations": 0.2,
            "static, operations": 0.4,
            "small dense, operations": 0.1,
        },
        "samples": 512,
        "updates": 40,
    },
)
