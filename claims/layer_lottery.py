"""Blocks taken out before training, by four scores and by chance, against filters: ResNet-32 on Fashion-MNIST."""

import copy
import time

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import keep_top
from secateur.axes.probes import Grasp, Snip
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.edit import apply_
from secateur.graph import couple, removals
from secateur.methods.layer_lottery import BlockScore, Chance, LayerLottery, MeanOf, Size
from secateur.models.resnet import CifarResNet
from secateur.outcome import count_flops
from secateur.site import Part, Site
from secateur.task import Task
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
        test_size=settings["test"],
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=settings["decay"]),
        seed=seed,
    )


def filters(model: nn.Module, task: Task, work: float, samples: int) -> nn.Module:
    """Without the filters inside blocks whose weights SNIP scores lowest on the mean, down to so much work."""
    inner = [site for site in couple(model, task.example).need("channel") if site.block]
    made = {site.name: next(part for part in site.parts if part.axis == 0 and len(part.shape) > 1) for site in inner}
    sites = [Site(part.name, "weight", part.shape, (Part(part.name, part.shape),)) for part in made.values()]
    found = Snip(samples).read(model, sites, task, 0.0).scores
    scores = [found[made[site.name].name].flatten(1).mean(1) for site in inner]
    pool = torch.cat([score.masked_fill(keep_top(score, 1), torch.inf) for score in scores])

    def cut(count: int) -> nn.Module:
        smaller, parts = copy.deepcopy(model), torch.split(keep_top(pool, count), [site.units for site in inner])
        apply_(smaller, removals(inner, {site.name: part for site, part in zip(inner, parts, strict=True)}))
        return smaller

    low, high = len(inner), len(pool)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (count_flops(cut(middle), task.example) or 0) <= work else (low, middle)
    return cut(low)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model, whole = task_of(seed, settings), network(seed, settings), network(seed, settings)
    steps = round(settings["epochs"] * settings["images"] / settings["batch"])
    samples, blocks = settings["samples"], (settings["depth"] - 2) // 2
    scores: dict[str, BlockScore] = {
        "signed": MeanOf(),
        "grasp": MeanOf(Grasp(samples // 10)),
        "snip": MeanOf(Snip(samples)),
        "chance": Chance(),
        "size": Size(),
    }
    if condition != "dense":
        score = scores.get(condition, scores["snip"])
        method = LayerLottery(sparsity=settings["blocks"] / blocks, score=score, steps=1)
        method.run(model, task)
        model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
        if condition == "filters":  # no more work than without the blocks that SNIP takes out
            model = filters(network(seed, settings), task, count_flops(model, task.example) or 0, samples)
    start = time.process_time()
    fit(model, task, steps, [LearningRate()])
    seconds = (time.process_time() - start) / steps
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "work left": (count_flops(model, task.example) or 0) / (count_flops(whole, task.example) or 1),
        "parameters left": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters()),
        "seconds a step": seconds,
    }


CLAIM = Claim(
    name="layer_lottery",
    number=41,
    says="Residual networks without some of their blocks, chosen before training in one pass, train to the accuracy of "
    "the whole, in less time: ResNet-32 on CIFAR-10 without 5 of 15 blocks loses 1.0 point chosen by SNIP and "
    "gains 0.1 chosen by GraSP, while filters taken out lose more.",
    source="arXiv:2301.10835, tables 1 to 3 (no code was published)",
    here="ResNet-32 of width 8 on 2,000 pictures of Fashion-MNIST, 4 epochs, without 5 of its 15 blocks, chosen by the "
    "signed score the paper calls GraSP, by GraSP itself, by SNIP, by chance and by weight size (a control), against "
    "filters inside blocks taken out by SNIP for the same work.",
    conditions=("dense", "signed", "grasp", "snip", "chance", "size", "filters"),
    expects=(
        Expectation(
            "Without a third of the blocks, by the signed score, accuracy is within a point of the whole network",
            "signed",
            "dense",
            "accuracy",
            "higher",
            margin=-0.01,
        ),
        Expectation("and so it is by SNIP", "snip", "dense", "accuracy", "higher", margin=-0.01),
        Expectation(
            "A step takes less time by a factor above 1.3",
            "snip",
            "dense",
            "seconds a step",
            "lower",
            margin=1.3,
            ratio=True,
        ),
        Expectation("Filters out for the same work do worse", "signed", "filters", "accuracy", "higher", central=False),
        Expectation(
            "Blocks by chance are within a point of the signed score",
            "chance",
            "signed",
            "accuracy",
            "higher",
            margin=-0.01,
            central=False,
        ),
        Expectation("GraSP itself is within a point, too", "grasp", "dense", "accuracy", "higher", margin=-0.01,
                    central=False),
        Expectation("Weight size, which ranks stages, does worse than chance", "chance", "size", "accuracy", "higher",
                    central=False),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "depth": 32,
        "width": 8,
        "images": 2000,
        "test": 3000,
        "batch": 64,
        "epochs": 4,
        "rate": 0.1,
        "decay": 5e-4,
        "blocks": 5,
        "samples": 250,
    },
    large={"width": 16, "images": 55_000, "test": 10_000, "batch": 128, "epochs": 60},
)  # fmt: skip
