"""Gates with and without polarization against blocks taken at random or by scale: ResNet-14 on Fashion-MNIST."""

import copy
from functools import lru_cache

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.gates import gated_blocks
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.cut import passing
from secateur.edit import Replace, apply_
from secateur.method import prune
from secateur.methods.polarization import Polarization
from secateur.models.resnet import CifarResNet
from secateur.outcome import count_flops
from secateur.task import Task, generator
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import fit


def network(seed: int, settings: Settings) -> nn.Module:
    model = CifarResNet(settings["depth"], width=settings["width"], channels=1)
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def task_of(seed: int, settings: Settings) -> Task:
    return fashion_mnist(
        train_size=settings["images"],
        val_size=settings["validation"],
        test_size=settings["test"],
        seed=seed,
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=settings["decay"]),
    )


def steps_of(settings: Settings) -> int:
    return round(settings["epochs"] * settings["images"] / settings["batch"])


@lru_cache(maxsize=1)
def whole(seed: int, frozen: tuple) -> nn.Module:
    """The whole network, trained without gates."""
    settings = dict(frozen)
    model = network(seed, settings)
    fit(model, task_of(seed, settings), steps_of(settings), [LearningRate()])
    return model


def without(model: nn.Module, names: list[str]) -> nn.Module:
    """The model without some of its blocks."""
    apply_(model, [Replace(name, passing(model.get_submodule(name))) for name in names])
    return model


def measured(model: nn.Module, task: Task, dense: nn.Module) -> dict[str, float]:
    flops = (count_flops(model, task.example) or 0) / (count_flops(dense, task.example) or 1)
    return {"accuracy": task.measure(model, "test")["accuracy"], "work left": flops}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, steps, fresh = task_of(seed, settings), steps_of(settings), network(seed, settings)
    blocks = [each.name for each in gated_blocks(fresh, task.example)[0]]
    gone = round(settings["sparsity"] * len(blocks))
    if condition == "full":
        return measured(whole(seed, tuple(sorted(settings.items()))), task, fresh)
    if condition == "random half":
        order = torch.randperm(len(blocks), generator=generator(task, "random half")).tolist()
        model = without(copy.deepcopy(fresh), [blocks[i] for i in order[:gone]])
        fit(model, task, steps, [LearningRate()])
        return measured(model, task, fresh)
    if condition == "by scale":
        model = copy.deepcopy(whole(seed, tuple(sorted(settings.items()))))
        scale = {name: float(model.get_submodule(f"{name}.bn2").weight.detach().abs().mean()) for name in blocks}
        without(model, sorted(blocks, key=lambda name: scale[name])[:gone])
        fit(model, task, steps, [LearningRate()], epoch=1000)
        return measured(model, task, fresh)
    polarize = settings["polarize"] if condition == "consensus" else 0.0
    method = Polarization(
        sparsity=settings["sparsity"], strength=settings["strength"], polarize=polarize, steps=steps,
        samples=settings["validation"],
    )  # fmt: skip
    done = prune(fresh, method, task)
    assert done.history is not None
    last = {name: points[-1][1] for name, points in done.history.curves.items()}
    with_gates, hardened = last["validation accuracy with gates"], last["validation accuracy hardened"]
    return {
        **measured(done.model, task, fresh),
        "disagreement": last["held-out disagreement"],
        "validation accuracy with gates": with_gates,
        "validation accuracy hardened": hardened,
        "loss at hardening": with_gates - hardened,
        "blocks left": float(len(blocks) - sum(isinstance(edit, Replace) for edit in done.edits)),
    }


CLAIM = Claim(
    name="polarization",
    number=21,
    says="With a polarization term the gates come to one decision for all inputs in one pass of training, so that a "
    "static sub-network remains: up to half of the connections of networks for CIFAR-10 and CIFAR-100 are removed at "
    "less than 1 % of accuracy.",
    source="arXiv:2302.10798, abstract (no code; the gates are a reconstruction)",
    here="ResNet-14 of width 8 on 4,000 pictures of Fashion-MNIST, 6 epochs, gates at the four blocks that keep their "
    "shape and half of them to be left; against the same gates held to the budget alone, a random half trained "
    "from scratch, and the half with the largest batch-norm scales of the trained network, trained as long again.",
    conditions=("full", "by scale", "random half", "budget only", "consensus"),
    expects=(
        Expectation(
            "With polarization gates treat less than 1 % of held-out examples against the rest",
            "consensus",
            0.01,
            "disagreement",
            "lower",
            exact=True,
        ),
        Expectation(
            "Held to the budget alone they disagree more, by more than 0.02",
            "consensus",
            "budget only",
            "disagreement",
            "lower",
            margin=0.02,
        ),
        Expectation(
            "Hardening costs less than half a point",
            "consensus",
            0.005,
            "loss at hardening",
            "lower",
            exact=True,
        ),
        Expectation(
            "What is left is within a point of the whole network",
            "consensus",
            "full",
            "accuracy",
            "higher",
            margin=-0.01,
        ),
        Expectation(
            "and not half a point behind a random half trained from scratch",
            "consensus",
            "random half",
            "accuracy",
            "higher",
            margin=-0.005,
        ),
        Expectation(
            "Without polarization hardening costs more",
            "consensus",
            "budget only",
            "loss at hardening",
            "lower",
            central=False,
        ),
        Expectation(
            "It is not a point behind blocks taken by scale, which train twice as long",
            "consensus",
            "by scale",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation(
            "Half of the gated blocks are left, no more", "consensus", 2.5, "blocks left", "lower", exact=True,
            central=False,
        ),
    ),
    settings={
        "depth": 14,
        "width": 8,
        "images": 4000,
        "validation": 1000,
        "test": 4000,
        "batch": 64,
        "epochs": 6,
        "rate": 0.1,
        "decay": 5e-4,
        "sparsity": 0.5,
        "strength": 2.0,
        "polarize": 2.0,
    },
    large={"depth": 20, "width": 16, "images": 55_000, "validation": 5000, "test": 10_000, "batch": 128, "epochs": 40},
)  # fmt: skip
