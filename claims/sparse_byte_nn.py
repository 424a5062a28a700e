"""What finer blocks of output channels, and a rearranged network, are worth: ResNet-20 on CIFAR-10, fine-tuned."""

import copy
from functools import lru_cache
from itertools import pairwise

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur import prune
from secateur.axes.orders import AsTrained, ByNorm, Clustered, Order
from secateur.axes.rules import LearningRate
from secateur.edit import Mask, Rotate, apply_
from secateur.graph import couple
from secateur.methods.l1_norm import L1Norm
from secateur.methods.sparse_byte_nn import SparseByteNN, norm_kept
from secateur.models import open_model
from secateur.tasks.images import Images, cifar10
from secateur.tasks.learners import Sgd
from secateur.train import fit

LEVELS = ("0.3", "0.5", "0.7")
ARMS = ("N=1", "N=4 rearranged", "N=4", "N=8")
ORDERS: dict[str, Order] = {"rearranged": Clustered(), "by norm": ByNorm()}


@lru_cache(maxsize=1)
def task_of(seed: int, frozen: tuple) -> Images:
    settings = dict(frozen)
    return cifar10(
        seed=seed,
        train_size=settings["images"],
        val_size=settings["val"],
        test_size=settings["test"],
        batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=1e-4),
    )


@lru_cache(maxsize=1)
def trained() -> nn.Module:
    return open_model("resnet20").model


def shuffled_(model: nn.Module, seed: int, task: Images) -> nn.Module:
    """The channels of every coupled set in a random order: the same function."""
    draw = torch.Generator().manual_seed(seed)
    for site in couple(model, task.example).of("channel"):
        apply_(model, Rotate(site, torch.randperm(site.units, generator=draw)))
    return model


def tuned(model: nn.Module, task: Images, steps: int) -> dict[str, float]:
    """A dense network, small or whole, trained as long as the others."""
    found = {"before": task.measure(model)["accuracy"]}
    fit(model, task, steps, [LearningRate()])
    weights = [sum(p.numel() for p in m.parameters() if p.dim() > 1) for m in (model, trained())]
    return {**found, "accuracy": task.measure(model, "test")["accuracy"], "stored density": weights[0] / weights[1]}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model, steps = task_of(seed, tuple(sorted(settings.items()))), copy.deepcopy(trained()), settings["steps"]
    arm, _, level = condition.partition(" @ ")
    if arm == "dense":
        return tuned(model, task, steps)
    if arm == "filters":
        return tuned(L1Norm(sparsity=settings["filters"], kinds=("channel",)).run(model, task).model, task, steps)
    if arm == "N=4 shuffled":
        shuffled_(model, seed, task)
    size, _, order = arm.partition(" ")
    method = SparseByteNN(sparsity=float(level), n=int(size[2:]), order=ORDERS.get(order, AsTrained()), steps=steps)
    done = prune(model, method, task)
    masks = [edit for edit in done.edits if isinstance(edit, Mask)]
    apply_(model, [edit for edit in done.edits if isinstance(edit, Rotate)])
    kept = norm_kept(masks, model)
    apply_(model, masks)
    return {
        "accuracy": task.measure(done.model, "test")["accuracy"],
        "before": task.measure(model)["accuracy"],
        "kept norm": kept,
        "stored density": sum(m.kept for m in masks) / sum(m.site.units for m in masks),
    }


def pairs(level: str) -> list[tuple[str, str]]:
    return [(f"{left} @ {level}", f"{right} @ {level}") for left, right in pairwise(ARMS)]


def ahead(left: str, right: str, says: str, margin: float = 0.0, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "accuracy", "higher", margin, central=central)


CLAIM = Claim(
    name="sparse_byte_nn",
    number=19,
    says="Blocks of N output channels cost little accuracy where the whole network is rearranged for them: MobileNet-v1"
    " at 30 % loses 0.224 points on ImageNet. 1xN at 50 %: weights 70.76, N=4 70.05, N=8 69.91, filters 65.35.",
    source="arXiv:2310.19509, abstract; the figures at 50 % from arXiv:2105.14713",
    here="ResNet-20 of the data pack on CIFAR-10 (JPEG copy): blocks of N output channels by one input channel by 3x3 "
    "of the 18 inner convolutions at 30, 50 and 70 %, N of 1, 4 and 8, with the channels of the whole network "
    "rearranged (clustered, by norm, or at random) or as they were; then 36 steps of 32 images with the masks held. "
    "Beside them the dense network, and one with fewer filters and at least as many weights, trained as long. Accuracy "
    "on 1,600 test images; settings were chosen on seed 9.",
    conditions=(
        "dense",
        *(f"{arm} @ {level}" for level in LEVELS for arm in ARMS),
        *(f"{arm} @ 0.5" for arm in ("N=4 by norm", "N=4 shuffled", "filters")),
    ),
    expects=(
        *(
            Expectation(
                f"{left} keeps more of the L1 norm than {right}", left, right, "kept norm", "higher", exact=True
            )
            for level in LEVELS
            for left, right in pairs(level)
        ),
        *(ahead(left, right, f"{left} is ahead of {right}") for left, right in pairs("0.7")),
        *(
            ahead(left, right, f"{left} is not behind {right} by more than a point", -0.01)
            for level in LEVELS[:2]
            for left, right in pairs(level)
        ),
        ahead("N=4 @ 0.5", "filters @ 0.5", "blocks of 4 are ahead of filters at as many weights"),
        ahead("N=4 rearranged @ 0.5", "N=4 shuffled @ 0.5", "rearranged is ahead of a random order", central=False),
        ahead(
            "N=4 rearranged @ 0.5",
            "N=4 by norm @ 0.5",
            "and not behind an order by norm by a point",
            -0.01,
            central=False,
        ),
        ahead(
            "N=4 rearranged @ 0.3",
            "dense",
            "at 30 % it is not behind the dense network, trained as long, by more than a point",
            -0.01,
            central=False,
        ),
        Expectation(
            "the network with fewer filters has no fewer weights",
            "filters @ 0.5",
            0.5,
            "stored density",
            "higher",
            exact=True,
            central=False,
        ),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "images": 2000,
        "val": 500,
        "test": 1600,
        "batch": 32,
        "rate": 0.01,
        "steps": 36,
        "filters": 0.42,
    },
    large={"images": 45_000, "val": 5000, "test": 10_000, "batch": 128, "steps": 704, "rate": 0.02},
)
