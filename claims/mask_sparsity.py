"""Pulling only what will go against pulling everything, by one plan: ResNet-20 on CIFAR-10, half of every layer."""

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.penalties import L1, Condemned, Everywhere
from secateur.axes.rules import LearningRate
from secateur.axes.scales import Absorbed, Below, Dropped, Scaled, channels_kept, scaled
from secateur.edit import apply_
from secateur.graph import couple, removals
from secateur.method import Budget
from secateur.methods.mask_sparsity import Penalty, Ranked, executed
from secateur.models import open_model
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.images import Images, cifar10
from secateur.tasks.learners import Sgd
from secateur.train import fit


@lru_cache(maxsize=2)
def task_of(seed: int, frozen: tuple) -> Images:
    settings = dict(frozen)
    return cifar10(
        seed=seed,
        train_size=settings["images"],
        val_size=100,
        test_size=settings["test"],
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=1e-4),
    )


@lru_cache(maxsize=1)
def dense() -> nn.Module:
    return open_model("resnet20").model


@lru_cache(maxsize=1)
def sites_of() -> list[Scaled]:
    example = Batch((torch.zeros(1, 3, 32, 32),))
    return scaled(dense(), example, couple(dense(), example))[0]


@lru_cache(maxsize=2)
def plan(seed: int, frozen: tuple) -> tuple[dict[str, Tensor], int]:
    """The one mask that all arms of a seed have: of a short run of network slimming, which is then thrown away."""
    settings = dict(frozen)
    model, task = copy.deepcopy(dense()), task_of(seed, frozen)
    found = Ranked(steps=settings["search"])
    keep, history = found.keep(
        model, task, sites_of(), Budget(settings["sparsity"], of="units"), Penalty(settings["strength"], L1())
    )
    assert keep is not None
    return keep, history.epoch


@lru_cache(maxsize=2)
def pulled(kind: str, seed: int, frozen: tuple) -> tuple[nn.Module, int]:
    """The dense network after training with the condemned scales pulled, or all; and the next unused epoch."""
    settings, model = dict(frozen), copy.deepcopy(dense())
    keep, epoch = plan(seed, frozen)
    pressure = Condemned(channels_kept(sites_of(), keep, tensors(model))) if kind == "masked" else Everywhere()
    rule = Penalty(settings["strength"], L1()).rule(sites_of(), pressure)
    return model, fit(model, task_of(seed, frozen), settings["steps"], [rule], epoch=epoch).epoch


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen = tuple(sorted(settings.items()))
    task = task_of(seed, frozen)
    if condition == "dense":
        return {"accuracy": task.measure(dense(), "test")["accuracy"]}
    keep, epoch = plan(seed, frozen)
    kind, _, constants = condition.partition(", ")
    sites, tune = sites_of(), settings["tune"]
    kept = channels_kept(sites, keep, tensors(dense()))
    was = torch.cat([tensors(dense())[n].detach().abs()[k] for n, k in kept.items()])
    if kind == "cut":  # the dense weights get the steps of the others after the cut
        model, tune = copy.deepcopy(dense()), tune + settings["steps"]
    else:
        trained, epoch = pulled(kind, seed, frozen)
        model = copy.deepcopy(trained)
    before, named = task.measure(model, "test")["accuracy"], tensors(model)
    condemned = torch.cat([named[n].detach().abs()[~k] for n, k in kept.items()])
    staying = torch.cat([named[n].detach().abs()[k] for n, k in kept.items()])
    # MaskSparsity is cut by its threshold, which is the method; the others by the plan itself.
    final = executed(sites, named, Below(settings["threshold"]), 1) if kind == "masked" else keep
    wrong = sum(int((final[n] != keep[n]).sum()) for n in keep)
    apply_(model, (Absorbed() if constants else Dropped()).edits(model, sites, final, task.example))
    apply_(model, removals([one.site for one in sites], final))
    after = task.measure(model, "test")["accuracy"]
    fit(model, task, tune, [LearningRate()], epoch=epoch)
    return {
        "before": before,
        "after": after,
        "drop": before - after,
        "accuracy": task.measure(model, "test")["accuracy"],
        "scales kept": float(staying.mean() / was.mean()),
        "condemned below": float((condemned <= settings["threshold"]).float().mean()),
        "units off plan": float(wrong),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }


def ahead(right: str, metric: str, says: str, central: bool = True, margin: float = 0.0) -> Expectation:
    return Expectation(says, "masked", right, metric, "higher", margin, central=central)


CLAIM = Claim(
    name="mask_sparsity",
    number=3,
    says="Penalising channels that will be kept restricts the network and costs accuracy; with the penalty on "
    "condemned ones alone, removing them is free.",
    source="arXiv:2201.06776, abstract",
    here="ResNet-20 of the data pack on 10,000 images of CIFAR-10 (JPEG copy), half of the channels of every site; one "
    "mask a seed for all arms, by |scale| after a short run of network slimming, thrown away. `slimmed` pulls all "
    "scales and is cut by the mask; `masked` pulls the condemned ones and is cut by the threshold 0.01; `cut` is the "
    "dense network cut by the mask; `absorbed` gives the constants of removed channels to the next layers. The same "
    "number of steps for all, after the cut at a rate that falls. Accuracy on 1,000 test images; settings were chosen "
    "on seed 9.",
    conditions=("dense", "cut", "slimmed", "masked", "masked, absorbed"),
    once=("dense",),
    expects=(
        ahead("slimmed", "before", "MaskSparsity is ahead just before the cut"),
        ahead("slimmed", "after", "and just after it"),
        ahead("slimmed", "accuracy", "and after the same fine-tuning"),
        Expectation("the cut costs at most a point", "masked", 0.01, "drop", "lower"),
        ahead("cut", "after", "a network cut by the same mask is worse before it is trained", margin=0.2),
        ahead("cut", "accuracy", "and after as many steps in all", central=False),
        Expectation(
            "absorbing constants, at most a point too", "masked, absorbed", 0.01, "drop", "lower", central=False
        ),
        Expectation("scales that stay keep their size", "masked", 0.9, "scales kept", "higher"),
        Expectation("network slimming shrinks them", "slimmed", 0.9, "scales kept", "lower"),
        Expectation("condemned scales fall below 0.01", "masked", 0.95, "condemned below", "higher"),
        Expectation(
            "the threshold takes what was planned, but for a channel in twenty",
            "masked",
            13.0,
            "units off plan",
            "lower",
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "images": 10_000,
        "test": 1000,
        "batch": 24,
        "rate": 0.01,
        "sparsity": 0.5,
        "strength": 0.08,
        "threshold": 0.01,
        "search": 30,
        "steps": 300,
        "tune": 50,
    },
    large={
        "images": 45_000,
        "test": 10_000,
        "batch": 128,
        "steps": 10_000,
        "search": 10_000,
        "tune": 7000,
        "strength": 0.003,
    },
)
