"""Sparsity-informed pruning against lottery tickets, round by round: an MLP on Fashion-MNIST, three scopes."""

import copy
from itertools import pairwise

import torch
from safetensors.torch import load_file
from torch import nn

from claims.gradual import network
from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes.clipping import Clip
from secateur.axes.pq import (
    Adaptive,
    Amount,
    EachLayer,
    EachNeuron,
    Fraction,
    Indexed,
    Pool,
    PqIndex,
    Turned,
    WholeNetwork,
    drop_smallest,
    gini,
)
from secateur.axes.rewinding import Course, Keep, Rewind, Rounds, magnitudes, search
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.methods.sap import Best, values
from secateur.models.resnet import CifarResNet
from secateur.task import Task
from secateur.tasks import pack
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot

WIDTHS = (784, 128, 256, 10)  # the paper's MLP: 128, then twice as wide
POOLS: dict[str, Pool] = {"global": WholeNetwork(), "layer": EachLayer(), "neuron": EachNeuron()}
INDICES = {"sap(0.5, 1)": PqIndex(0.5, 1.0), "sap(1, 2)": PqIndex(1.0, 2.0)}
FIFTH, DROP = 0.2, 0.01


def task_of(seed: int, settings: Settings) -> Task:
    return fashion_mnist(
        train_size=settings["images"],
        val_size=settings["validation"],
        test_size=settings["test"],
        flat=True,
        seed=seed,
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=settings["decay"], nesterov=True),
    )


def masked(model: nn.Module, keep: Keep) -> nn.Module:
    small = copy.deepcopy(model)
    apply_(small, [Mask(site, keep[site.name]) for site in weights(small, exclude=())])
    return small


def pretrained(depth: int) -> dict[str, float]:
    """The index of each stage of a trained residual network, nothing being trained."""
    model = CifarResNet(depth)
    name = f"resnet{depth}"
    model.load_state_dict(load_file(pack.file(f"weights/{name}_cifar10_jpeg.safetensors", name)))
    sizes = magnitudes(model, weights(model, exclude=()))
    found = {}
    for stage in ("conv1", "layer1", "layer2", "layer3", "linear", ""):
        values_ = torch.cat([size.reshape(-1) for name, size in sizes.items() if name.startswith(stage)])
        found[f"index of {stage or 'all'}"] = float(PqIndex().of(values_))
        found[f"gini of {stage or 'all'}"] = gini(values_)
    return found


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    if condition.startswith("trained resnet"):
        return pretrained(int(condition.removeprefix("trained resnet")))
    kind, _, scope = condition.partition("@")
    model, task = network(WIDTHS, seed), task_of(seed, settings)
    sites, index = weights(model, exclude=()), INDICES.get(kind, PqIndex())
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    amount: Amount = Adaptive(index) if kind in INDICES else Fraction(settings["fraction"])
    accuracy: list[float] = []
    pruned: list[float] = []
    dense: dict[str, torch.Tensor] = {}

    def choose(keep: Keep, start: Snapshot) -> Keep:
        scores = magnitudes(model, sites)
        dense.update({} if dense else {name: score.clone() for name, score in scores.items()})
        chosen = drop_smallest(sites, dense if kind == "one-shot" else scores, keep, POOLS[scope], amount)
        pruned.append(task.measure(masked(model, chosen), "test")["accuracy"])
        return chosen

    def watch(now: Rounds) -> None:
        accuracy.append(task.measure(model, "test")["accuracy"])

    every = max(1, steps // settings["epochs"])
    found = search(
        model, task, sites, Course(steps, floor=0.0), Rewind(0), settings["rounds"], choose,
        more=[Clip(1.0), Best(every), Indexed(sites, index)], watch=watch,
    )  # fmt: skip
    kept, drawn, last = values(found, "kept"), values(found, "pq index"), len(accuracy)
    shares = [1 - b / a for a, b in pairwise(kept)]
    fine = [a >= accuracy[0] - DROP for a in accuracy]
    fell = next((t for t in range(last) if not fine[t]), last)
    turned = next((t for t in range(last) if Turned().over(drawn[: t + 1])), last)
    fifth = next((t for t in range(last) if kept[t] <= FIFTH), last - 1)
    tail = shares[-3:]
    rows = {
        "dense accuracy": accuracy[0],
        "rounds to a fifth": float(next((t for t in range(last) if kept[t] <= FIFTH and fine[t]), last)),
        "accuracy at a fifth": accuracy[fifth],
        "left within a point": min(k for k, good in zip(kept, fine, strict=True) if good),
        "round of the turn": float(turned),
        "round of the drop": float(fell),
        "warning": float(fell - turned),
        "accuracy at the turn": accuracy[min(turned, last - 1)],
        "share of the first round": shares[0],
        "share of the last rounds": sum(tail) / len(tail),
        "left at the end": kept[-1],
        "accuracy at the end": accuracy[-1],
    }
    for t in range(last):  # the curves themselves, for the figure
        rows[f"left after {t}"], rows[f"accuracy after {t}"], rows[f"index after {t}"] = kept[t], accuracy[t], drawn[t]
        rows[f"gini after {t}"] = values(found, "gini")[t]
        if t < len(pruned):
            rows[f"accuracy before training {t + 1}"] = pruned[t]
    return rows


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """How much less goes at last than at first, and where the lottery would have been stopped."""
    found: dict[str, dict[str, float]] = {}
    if ours := measured.get("sap(1, 2)@global"):
        found["shrinking"] = {"share": ours["share of the last rounds"] / ours["share of the first round"]}
    if theirs := measured.get("lottery@global"):
        found["lottery at the turn"] = {"dense accuracy": theirs["accuracy at the turn"]}
    return found


CLAIM = Claim(
    name="sap",
    number=18,
    says="The PQ index falls while a network is pruned of what it does not need, rises as it nears the limit of its "
    "compression and falls as it collapses; a pruner led by it reaches high compression in fewer rounds than lottery "
    "tickets of 20 % a round, prunes less as it nears the limit, and depends less on the scope.",
    source="arXiv:2302.05601, section 5, figures 2 to 4 (curves; no table of numbers)",
    here="The paper's MLP, 784-128-256-10, on 8,000 pictures of Fashion-MNIST, 3 epochs a training instead of 200 and "
    "20 rounds; the best weights by a validation split. The turn is where the index has been above its lowest value "
    "for two rounds; the drop, where accuracy is a point below the dense network's.",
    conditions=(
        "lottery@global",
        "one-shot@global",
        "sap(0.5, 1)@global",
        "sap(1, 2)@global",
        "lottery@layer",
        "sap(1, 2)@layer",
        "lottery@neuron",
        "sap(1, 2)@neuron",
        "trained resnet20",
        "trained resnet56",
    ),
    once=("trained resnet20", "trained resnet56"),
    expects=(
        Expectation(
            "With p=0.5, q=1 it takes fewer rounds than the lottery to a fifth of the weights, within a point of dense",
            "sap(0.5, 1)@global",
            "lottery@global",
            "rounds to a fifth",
            "lower",
        ),
        Expectation(
            "With p=1, q=2 too", "sap(1, 2)@global", "lottery@global", "rounds to a fifth", "lower", exact=True
        ),
        Expectation(
            "The lottery's index turns no later than its accuracy drops",
            "lottery@global",
            0.0,
            "warning",
            "higher",
            margin=-0.5,
        ),
        Expectation("So does that of the adaptive pruner", "sap(1, 2)@global", 0.0, "warning", "higher", margin=-0.5),
        Expectation(
            "Its last rounds drop a share less than 0.7 of the first's",
            "shrinking",
            0.7,
            "share",
            "lower",
        ),
        Expectation(
            "By layer it is not half a point behind the lottery at a fifth",
            "sap(1, 2)@layer",
            "lottery@layer",
            "accuracy at a fifth",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "nor by neuron",
            "sap(1, 2)@neuron",
            "lottery@neuron",
            "accuracy at a fifth",
            "higher",
            margin=-0.005,
            central=False,
        ),
        Expectation(
            "Ranking anew is ahead of ranking the dense network's weights, at the end",
            "lottery@global",
            "one-shot@global",
            "accuracy at the end",
            "higher",
            central=False,
        ),
        Expectation(
            "Stopping where the index turned keeps the dense network's accuracy to a point",
            "lottery at the turn",
            "lottery@global",
            "dense accuracy",
            "higher",
            margin=-DROP,
            central=False,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "images": 8000,
        "validation": 1000,
        "test": 5000,
        "batch": 125,
        "epochs": 3,
        "rounds": 20,
        "rate": 0.1,
        "decay": 5e-4,
        "fraction": 0.2,
    },
    large={"images": 55_000, "validation": 5000, "test": 10_000, "batch": 250, "epochs": 20},
    derive=derive,
)
