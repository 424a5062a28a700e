"""Pulling only what will go against pulling everything, by one plan: ResNet-20 on CIFAR-10, half of every layer."""

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.penalties import L1, Condemned, Everywhere
from secateur.axes.rules import LearningRate
from secateur.axes.scales import Below, Scaled, below, channels_kept, scale_names, scaled
from secateur.edit import apply_
from secateur.graph import couple, removals
from secateur.method import Budget
from secateur.methods.mask_sparsity import Penalty, Ranked, executed
from secateur.models import open_model
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.images import Images, cifar10
from secateur.tasks.learners import Sgd
from secateur.train import History, fit


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


def tuned(model: nn.Module, task: Images, steps: int, epoch: int) -> History:
    optimizer = task.optimizer(model.parameters())
    return fit(model, task, steps, [LearningRate()], optimizer, epoch=epoch)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen = tuple(sorted(settings.items()))
    task, model = task_of(seed, frozen), copy.deepcopy(dense())
    if condition == "dense":
        return {"accuracy": task.measure(model, "test")["accuracy"]}
    keep, epoch = plan(seed, frozen)
    sites, penalty = sites_of(), Penalty(settings["strength"], L1())
    named = tensors(model)
    kept = channels_kept(sites, keep, named)
    start = {name: named[name].detach().abs().clone() for name in kept}
    if condition != "cut":  # the cut of the dense weights gets the same steps, without a penalty, after it
        pressure = Condemned(kept) if condition == "masked" else Everywhere()
        epoch = fit(model, task, settings["steps"], [penalty.rule(sites, pressure)], epoch=epoch).epoch
    before = task.measure(model, "test")["accuracy"]
    named = tensors(model)
    condemned = torch.cat([named[n].detach().abs()[~k] for n, k in kept.items()])
    staying = torch.cat([named[n].detach().abs()[k] for n, k in kept.items()])
    was = torch.cat([start[n][k] for n, k in kept.items()])
    # MaskSparsity is cut by its threshold, which is the method; the others by the plan itself.
    final = executed(sites, named, Below(settings["threshold"]), 1) if condition == "masked" else keep
    wrong = sum(int((final[n] != keep[n]).sum()) for n in keep)
    low = [below(named[n], Below(settings["threshold"]), 0) for n in scale_names(sites)]
    apply_(model, removals([one.site for one in sites], final))
    after = task.measure(model, "test")["accuracy"]
    tuned(model, task, settings["tune"] + (settings["steps"] if condition == "cut" else 0), epoch)
    return {
        "before": before,
        "after": after,
        "drop": before - after,
        "accuracy": task.measure(model, "test")["accuracy"],
        "scales kept": float(staying.mean() / was.mean()),
        "condemned below": float((condemned <= settings["threshold"]).float().mean()),
        "below": float(torch.cat(low).float().mean()),
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
    "dense network cut by the mask. The same number of steps for all, after the cut at a rate that falls. Accuracy on "
    "1,000 test images; settings were chosen on seed 9.",
    conditions=("dense", "cut", "slimmed", "masked"),
    once=("dense",),
    expects=(
        ahead("slimmed", "before", "MaskSparsity is ahead just before the cut"),
        ahead("slimmed", "after", "and just after it"),
        ahead("slimmed", "accuracy", "and after the same fine-tuning"),
        Expectation("the cut costs at most a point", "masked", 0.01, "drop", "lower"),
        ahead("cut", "after", "a network cut by the same mask is worse before it is trained", margin=0.2),
        ahead("cut", "accuracy", "and after as many steps in all", central=False),
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
    settings={
        "images": 10_000,
        "test": 1000,
        "batch": 32,
        "rate": 0.01,
        "sparsity": 0.5,
        "strength": 0.08,
        "threshold": 0.01,
        "search": 40,
        "steps": 220,
        "tune": 60,
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
