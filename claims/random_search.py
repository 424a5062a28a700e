"""Random search against random masks on Fashion-MNIST: whether picking the best of 200 starts changes anything."""

import copy
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean, stdev

import torch
from torch import Tensor, nn

from claims.gradual import network
from claims.harness import Claim, Expectation, Settings
from secateur.axes import keep_top
from secateur.graph import couple
from secateur.methods.l1_norm import l1_norm
from secateur.methods.random_search import Choice, EvenNodes, StartingLoss, search, sub_network
from secateur.site import Site, tensors
from secateur.task import Batch, Task, generator
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Adam
from secateur.train import fit

WIDTHS = (784, 1024, 1024, 10)
SPARSITIES = ("0.8", "0.9", "0.98")


@lru_cache(maxsize=1)
def parent(seed: int, images: int, samples: int) -> tuple[nn.Module, Task, tuple[Site, ...], list[Batch]]:
    """The whole network before training, its hidden nodes, and the examples that masks are judged on."""
    task = fashion_mnist(
        train_size=images, val_size=1000, test_size=5000, flat=True, seed=seed, batch=128, learner=Adam(1e-3)
    )
    model = network(WIDTHS, seed)
    return model, task, couple(model, task.example).need("channel"), list(task.batches("train", samples))


def thinned(model: nn.Module, sites: Sequence[Site], keep: Choice) -> nn.Module:
    small = copy.deepcopy(model)
    sub_network(small, sites, keep)
    return small


def learnt(model: nn.Module, task: Task, settings: Settings) -> dict[str, float]:
    """Trained by the one recipe: where it ends, and how fast it got there."""
    losses = fit(model, task, settings["steps"]).losses
    smooth = torch.tensor(losses).unfold(0, 20, 1).mean(1)
    below = (smooth < settings["goal"]).nonzero()
    return {
        "accuracy": task.measure(model, "test")["accuracy"],
        "steps to the goal": float(below[0]) + 20 if len(below) else float(len(losses)),
        "area": fmean(losses),
    }


def ranks(values: Sequence[float]) -> Tensor:
    return torch.tensor(values).argsort().argsort().double()


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    model, task, sites, batches = parent(seed, settings["images"], settings["samples"])
    kind, _, target = condition.partition("@")
    if kind == "dense":
        return learnt(copy.deepcopy(model), task, settings)
    sizes, sparsity = {site.name: site.units for site in sites}, float(target)

    def choice(number: int, purpose: str = "random search") -> Choice:
        return EvenNodes().choice(sizes, sparsity, generator(task, f"{purpose} {number}"))

    def start(keep: Choice) -> float:
        return StartingLoss().cost(thinned(model, sites, keep), task, batches)

    if kind == "search":
        found = search(settings["trials"], lambda t: start(choice(t)))
        return {
            **learnt(thinned(model, sites, choice(found.best)), task, settings),
            "starting loss": min(found.costs),
        }
    if kind == "trained nodes":  # a search that may look at a whole training: what the comparison can see
        dense = copy.deepcopy(model)
        fit(dense, task, settings["steps"])
        scores = {site.name: l1_norm(site, tensors(dense)) for site in sites}
        keep = {name: keep_top(s, max(1, round((1 - sparsity) * len(s)))) for name, s in scores.items()}
        return learnt(thinned(model, sites, keep), task, settings)
    rows, starts = [], []
    for number in range(settings["draws"] if kind == "random" else settings["ranked"]):
        keep = choice(number, kind)
        starts.append(start(keep))
        rows.append(learnt(thinned(model, sites, keep), task, settings))
    accuracies = [row["accuracy"] for row in rows]
    if kind == "ranked":
        both = torch.stack([ranks(starts), ranks(accuracies)])
        return {"rank correlation": float(torch.corrcoef(both)[0, 1])}
    means = {name: fmean(row[name] for row in rows) for name in rows[0]}
    return {**means, "starting loss": fmean(starts), "spread of accuracy": stdev(accuracies)}


def level(sparsity: str, central: bool = True) -> tuple[Expectation, Expectation]:
    """Two one-sided expectations: neither is half a point of accuracy or more ahead of the other."""
    pair = (f"search@{sparsity}", f"random@{sparsity}")
    words = ("ahead of", "behind")
    return tuple(  # type: ignore[return-value]
        Expectation(
            f"At {float(sparsity):.0%} the search is not half a point {word} random masks",
            *sides,
            "accuracy",
            "higher",
            margin=-0.005,
            central=central,
        )
        for word, sides in zip(words, (pair[::-1], pair), strict=True)
    )


CLAIM = Claim(
    name="random_search",
    number=42,
    says="Sub-networks found by random search before training neither perform better nor converge faster than random "
    "sub-networks of the same sparsity, and much of the dense network's performance is kept even when most is gone.",
    source="arXiv:2403.08265, abstract",
    here="A 784-1024-1024-10 MLP on 12,000 pictures of Fashion-MNIST, five epochs of Adam; the best of 200 masks by "
    "the loss of the untrained sub-network on 1,000 training pictures, against the mean of five masks drawn once. "
    "Level means within half a point of accuracy in both directions (two one-sided tests). The seed draws the "
    "initial weights, the order of the data and, in streams of their own, the masks.",
    conditions=(
        "dense",
        *(f"{kind}@{s}" for s in SPARSITIES for kind in ("random", "search")),
        "ranked@0.9",
        "trained nodes@0.98",
    ),
    seeds=(0, 1, 2, 3, 4, 5, 6, 7),
    settings={
        "images": 12_000,
        "samples": 1000,
        "trials": 200,
        "draws": 5,
        "ranked": 12,
        "steps": 470,
        "goal": 0.5,
    },
    large={"images": 55_000, "steps": 4300, "draws": 10, "ranked": 40},
    expects=(
        *level("0.8"),
        *level("0.9"),
        *level("0.98", central=False),  # masks differ by more than the margin there: five draws may not decide
        Expectation(
            "At 90 % the search does not reach the goal in less than 0.9 of the steps",
            "random@0.9",
            "search@0.9",
            "steps to the goal",
            "lower",
            margin=0.9,
            ratio=True,
        ),
        Expectation(
            "A tenth of the nodes ends within five points of the whole network",
            "random@0.9",
            "dense",
            "accuracy",
            "higher",
            margin=-0.05,
        ),
        Expectation(
            "The starting loss says little of where a mask ends: rank correlation above -0.3",
            "ranked@0.9",
            -0.3,
            "rank correlation",
            "higher",
            margin=0.0,
            central=False,
        ),
        Expectation("and below 0.3", "ranked@0.9", 0.3, "rank correlation", "lower", margin=0.0, central=False),
        Expectation(
            "Nodes that were large after training are ahead, so that a difference would be seen",
            "trained nodes@0.98",
            "random@0.98",
            "accuracy",
            "higher",
            central=False,
        ),
    ),
)
