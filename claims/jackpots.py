"""Masks searched for in frozen weights, by where they start, against cut and recalibrated ones: a CNN's, 80 to 95 %."""

import copy
from functools import lru_cache

from torch import Tensor, nn

from claims.global_mp import pretrained
from claims.harness import Claim, Expectation, Measured, Settings
from claims.random_pruning import network, task_of
from secateur.axes import Magnitude, Random
from secateur.axes.probes import Given, Snip
from secateur.axes.rules import LearningRate
from secateur.axes.trained_masks import Swaps
from secateur.edit import Mask
from secateur.methods.jackpots import Jackpots
from secateur.site import tensors
from secateur.task import Task
from secateur.tasks.images import cifar10
from secateur.train import fit

LEVELS = ("0.8", "0.9", "0.95")
HARD = "0.95"
STARTS = ("random start", "snip start", "no limit", "a third of the steps")


@lru_cache(maxsize=1)
def dense(seed: int, frozen: tuple) -> tuple[nn.Module, Task]:
    """The trained network to search in, and its task: made once a seed."""
    settings = dict(frozen)
    if settings["network"] == "resnet20":
        task = cifar10(train_size=settings["images"], batch=settings["batch"], seed=seed)
        return pretrained(), task
    task, model = task_of(seed, settings), network(settings["width"], seed)
    fit(model, task, settings["training epochs"] * settings["images"] // settings["batch"], [LearningRate()])
    return model, task


def method_of(kind: str, sparsity: float, seed: int, settings: Settings) -> Jackpots:
    model, task = dense(seed, tuple(sorted(settings.items())))
    steps = settings["epochs"] * settings["images"] // settings["batch"]
    method = Jackpots(sparsity=sparsity, steps=steps, rate=settings["score rate"], samples=settings["samples"])
    start = method.start
    if kind == "random start":
        start = Random(seed)
    elif kind == "snip start":
        start = Given(Snip(settings["samples"]).read(model, method.sites(model), task, sparsity).scores)
    short = {"magnitude": 0, "recalibrated": 0, "a third of the steps": steps // 3}
    return Jackpots(
        sparsity=sparsity,
        steps=short.get(kind, steps),
        rate=settings["score rate"],
        start=start,
        samples=0 if kind == "magnitude" else settings["samples"],
        transition=Swaps(power=0) if kind == "no limit" else Swaps(),
    )


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    trained, task = dense(seed, tuple(sorted(settings.items())))
    if condition == "dense":
        return {"accuracy": task.measure(trained, "test")["accuracy"]}
    kind, _, sparsity = condition.partition("@")
    model, before = copy.deepcopy(trained), tensors(trained)
    method = method_of(kind, float(sparsity), seed, settings)
    first = Jackpots(sparsity=float(sparsity), start=Magnitude()).search(trained, task).keep
    outcome = method.run(model, task)
    keep = {edit.site.name: edit.keep for edit in outcome.edits if isinstance(edit, Mask)}
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "weights changed": float(changed(model, before, keep)),
        "weights left": float(sum(int(k.sum()) for k in keep.values())),
        "kept by magnitude too": sum(int((first[n] & keep[n]).sum()) for n in first)
        / sum(int(keep[n].sum()) for n in first),
    }


def changed(model: nn.Module, before: dict[str, Tensor], keep: dict[str, Tensor]) -> int:
    """Parameters that differ from the trained network's to the bit, apart from those masked."""
    found = 0
    for name, value in model.named_parameters():
        differs = value.detach() != before[name].detach()
        found += int((differs & keep[name]).sum() if name in keep else differs.sum())
    return found


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """The share of what a cut still lacks, its norms recalibrated, that the search wins back."""
    found = {}
    for level in LEVELS:
        names = ("dense", f"recalibrated@{level}", f"search@{level}")
        if all(name in measured for name in names):
            top, low, mid = (measured[name]["accuracy"] for name in names)
            found[f"won back@{level}"] = {"share": (mid - low) / max(top - low, 1e-3)}
    return found


def at(kind: str) -> str:
    return f"{kind}@{HARD}"


CLAIM = Claim(
    name="jackpots",
    number=24,
    says="In a trained network a mask can be searched for, with not one weight changed, that is nearly as accurate: "
    "ResNet-32 on CIFAR-10 has 93.70 % top-1 at 90 % after 30 epochs; starting from the largest weights takes a third "
    "of the search that a random start takes, or less.",
    source="arXiv:2104.08700, abstract; the authors' tables",
    here="A CNN of three convolutions, 16 to 64 channels wide, trained on 10,000 images of Fashion-MNIST; scores "
    "searched for 3 epochs of them, the classifier dense.",
    conditions=(
        "dense",
        *(f"{kind}@{level}" for level in LEVELS for kind in ("magnitude", "recalibrated", "search")),
        *(at(kind) for kind in STARTS),
    ),
    expects=(
        Expectation("at 80 % the search ends within two points of dense", "search@0.8", "dense", "accuracy", "higher",
                    margin=-0.02),
        Expectation("at 95 % it is ahead of recalibration alone by more than three points", at("search"),
                    at("recalibrated"), "accuracy", "higher", margin=0.03),
        Expectation("and wins back more than half of what that lacks", at("won back"), 0.5, "share", "higher"),
        Expectation("no weight is changed", at("search"), 0.5, "weights changed", "lower", exact=True),
        Expectation("from the largest weights, a third of the steps do as much as all from random ones",
                    at("a third of the steps"), at("random start"), "accuracy", "higher"),
        Expectation("at 90 % too it is ahead of recalibration", "search@0.9", "recalibrated@0.9", "accuracy", "higher",
                    central=False),
        Expectation("the largest weights are no worse a start than SNIP's by more than a point", at("search"),
                    at("snip start"), "accuracy", "higher", margin=-0.01, central=False),
        Expectation("with the limit on exchanges it is not behind by more than half a point", at("search"),
                    at("no limit"), "accuracy", "higher", margin=-0.005, central=False),
        Expectation("more than half of what is kept in the end is among the largest", at("search"), 0.5,
                    "kept by magnitude too", "higher", central=False),
        Expectation("as it is, a cut is behind a recalibrated one by ten points", at("recalibrated"), at("magnitude"),
                    "accuracy", "higher", margin=0.1, central=False),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "network": "cnn",
        "width": 16,
        "images": 10_000,
        "batch": 64,
        "rate": 0.05,
        "training epochs": 5,
        "epochs": 3,
        "score rate": 0.1,
        "samples": 512,
    },
    large={"network": "resnet20", "images": 45_000, "batch": 256, "epochs": 30, "samples": 2048},
    derive=derive,
)  # fmt: skip
