"""Soups against their candidates and against one network retrained as long: a small network with batch norms."""

import copy
from dataclasses import replace
from functools import lru_cache
from statistics import fmean

import torch
from torch import Tensor, nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes.patterns import keep_top
from secateur.axes.rewinding import magnitudes, reinitialize_
from secateur.axes.rules import LearningRate
from secateur.axes.soup import GreedySoup, Refresh, basin, merged
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.methods.soups import Soups, alone
from secateur.models.resnet import CifarResNet
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.tasks.images import cifar10, fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot, fit


class Ensemble(nn.Module):
    """The logarithm of the mean of several networks' probabilities: [batch, classes]."""

    def __init__(self, models: list[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([model(x).softmax(-1) for model in self.models]).mean(0).log()


def small(seed: int) -> nn.Module:
    """Four convolutions with batch norms, 79,000 weights: [batch, 1, 28, 28] -> [batch, 10]."""
    layers: list[nn.Module] = []
    for a, b, stride in ((1, 16, 2), (16, 32, 2), (32, 64, 1), (64, 96, 2)):
        layers += [nn.Conv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(96, 10))
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


@lru_cache(maxsize=1)
def task_of(seed: int, frozen: tuple) -> Task:
    settings = dict(frozen)
    given = {
        "train_size": settings["images"],
        "val_size": 2000,
        "seed": seed,
        "batch": settings["batch"],
        "learner": Sgd(settings["rate"], decay=1e-4, nesterov=True),
    }
    return cifar10(**given) if settings["network"] == "resnet20" else fashion_mnist(**given)


@lru_cache(maxsize=1)
def dense(seed: int, frozen: tuple) -> nn.Module:
    settings = dict(frozen)
    if settings["network"] == "resnet20":
        model: nn.Module = CifarResNet(20)
        reinitialize_(model, torch.Generator().manual_seed(seed))
    else:
        model = small(seed)
    model.to(settings["device"])
    fit(model, task_of(seed, frozen), steps_of(settings, settings["dense epochs"]), [LearningRate(warmup=0.05)])
    return model


def steps_of(settings: Settings, epochs: float) -> int:
    return round(epochs * settings["images"] / settings["batch"])


def method_of(settings: Settings) -> Soups:
    return Soups(
        sparsity=settings["sparsity"],
        phases=settings["phases"],
        replicas=settings["replicas"],
        steps=steps_of(settings, settings["epochs"]),
        recalibrate=settings["recalibrate"],
    )


class Bench:
    """One seed's network on the bench: states go in, what they are worth comes out."""

    def __init__(self, seed: int, frozen: tuple) -> None:
        self.task, self.model = task_of(seed, frozen), copy.deepcopy(dense(seed, frozen))
        self.sites = weights(self.model)
        self.refresh = Refresh(dict(frozen)["recalibrate"])

    def worth(self, state: Snapshot, *, statistics: bool = True) -> dict[str, float]:
        """Accuracy and sparsity; the statistics of batch norms are taken anew, for every row alike."""
        (self.refresh if statistics else Refresh(0.0)).restore_(self.model, state, self.task)
        return {"accuracy": self.task.measure(self.model, "test")["accuracy"], "sparsity": sparsity(self)}


def sparsity(bench: Bench) -> float:
    named = tensors(bench.model)
    zeros = sum(int((site.parts[0].read(named) == 0).sum()) for site in bench.sites)
    return zeros / sum(site.units for site in bench.sites)


@lru_cache(maxsize=1)
def cooked(seed: int, frozen: tuple) -> dict[str, dict[str, float]]:
    """The soups of a seed, and all that can be said of the candidates of the last phase."""
    settings = dict(frozen)
    bench, method = Bench(seed, frozen), method_of(settings)
    end = method.cook(bench.model, bench.task, bench.sites)
    found = {"soup": bench.worth(end.state)}
    some = list(end.candidates)
    rows, held_out, ready = [], [], []
    for candidate in some:
        rows.append(bench.worth(candidate.state))
        held_out.append(bench.task.measure(bench.model, "val")["accuracy"])
        ready.append(copy.deepcopy(bench.model))

    def taste(numbers: list[int]) -> float:
        bench.refresh.restore_(bench.model, merged(bench.sites, [some[i] for i in numbers]), bench.task)
        return bench.task.measure(bench.model, "val")["accuracy"]

    chosen = GreedySoup().choose(held_out, taste)
    found["greedy soup"] = bench.worth(merged(bench.sites, [some[i] for i in chosen]))
    found["greedy soup"]["candidates"] = float(len(chosen))
    found["mean candidate"] = {key: fmean(row[key] for row in rows) for key in rows[0]}
    found["best candidate"] = rows[held_out.index(max(held_out))]
    found["averaged statistics"] = bench.worth(merged(bench.sites, some), statistics=False)
    found["ensemble"] = {"accuracy": bench.task.measure(Ensemble(ready), "test")["accuracy"]}
    about = basin(bench.sites, some)
    found["soup"] |= {"distance": about.farthest, "angle": about.angle}
    found["soup"]["barrier"] = end.history.curves["barrier between candidates"][-1][1]
    return found


@lru_cache(maxsize=1)
def apart(seed: int, frozen: tuple) -> dict[str, dict[str, float]]:
    """Runs of iterative pruning, each with masks of its own, and what their mean is worth."""
    settings = dict(frozen)
    bench, method, ends = Bench(seed, frozen), method_of(settings), []
    start = Snapshot.of(bench.model)
    for number in range(settings["replicas"]):
        start.restore_(bench.model)
        ends.append(alone(bench.model, bench.task, bench.sites, method, epoch=1000 * number).state)
    mean = Snapshot.average(ends)
    found = {"imp": bench.worth(ends[0]), "mean of imps": bench.worth(mean)}
    mean.restore_(bench.model)
    apply_(bench.model, smallest(bench.model, bench.sites, settings["sparsity"]))
    found["mean of imps, pruned again"] = bench.worth(Snapshot.of(bench.model))
    return found


def smallest(model: nn.Module, sites: list[Site], share: float) -> list[Mask]:
    sizes = magnitudes(model, sites)
    row = torch.cat([sizes[site.name].reshape(-1) for site in sites])
    keep = keep_top(row, len(row) - int(share * len(row))).split([site.units for site in sites])
    return [Mask(site, k.reshape(site.shape)) for site, k in zip(sites, keep, strict=True)]


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen = tuple(sorted(settings.items()))
    if condition == "dense":
        bench = Bench(seed, frozen)
        return bench.worth(Snapshot.of(bench.model))
    if condition == "imp, as long":
        bench, method = Bench(seed, frozen), method_of(settings)
        longer = replace(method, steps=method.steps * settings["replicas"])
        return bench.worth(alone(bench.model, bench.task, bench.sites, longer).state)
    rows = apart if condition in ("imp", "mean of imps", "mean of imps, pruned again") else cooked
    return rows(seed, frozen)[condition]


CLAIM = Claim(
    name="soups",
    number=6,
    says="Averaging replicas retrained within one mask beats the best of them by one to two points at high sparsity, "
    "and phases of it beat one network retrained as long as all replicas together; sparsity is kept exactly.",
    source="arXiv:2306.16788, abstract and section 3",
    here="A small convolutional net with batch norms (79,000 weights) on 20,000 images of Fashion-MNIST, to 95 % in "
    "three phases with three replicas of two epochs each; data order varied, learning rate linear to 0. Batch norms "
    "take their statistics anew in every row, those of single networks too. The greedy soup and the best candidate "
    "are of the last phase, chosen on held-out data.",
    conditions=(
        "dense",
        "soup",
        "greedy soup",
        "mean candidate",
        "best candidate",
        "averaged statistics",
        "ensemble",
        "imp",
        "mean of imps",
        "mean of imps, pruned again",
        "imp, as long",
    ),
    expects=(
        Expectation("a soup beats one network retrained once", "soup", "imp", "accuracy", "higher"),
        Expectation("it beats its candidates' mean", "soup", "mean candidate", "accuracy", "higher"),
        Expectation(
            "it is not more than 0.3 points behind one network retrained as long as all replicas",
            "soup",
            "imp, as long",
            "accuracy",
            "higher",
            margin=-0.003,
        ),
        Expectation(
            "its sparsity is that of one network", "soup", "imp", "sparsity", "higher", margin=-1e-6, exact=True
        ),
        Expectation(
            "the mean of networks pruned apart is less sparse by more than a point",
            "soup",
            "mean of imps",
            "sparsity",
            "higher",
            margin=0.01,
        ),
        Expectation("it beats its best candidate", "soup", "best candidate", "accuracy", "higher", central=False),
        Expectation(
            "it beats one network retrained as long as all replicas",
            "soup",
            "imp, as long",
            "accuracy",
            "higher",
            central=False,
        ),
        Expectation(
            "with averaged statistics it loses", "soup", "averaged statistics", "accuracy", "higher", central=False
        ),
        Expectation(
            "it beats the mean of networks pruned apart, pruned again",
            "soup",
            "mean of imps, pruned again",
            "accuracy",
            "higher",
            central=False,
        ),
        Expectation(
            "it is not more than half a point behind the ensemble of its candidates",
            "soup",
            "ensemble",
            "accuracy",
            "higher",
            margin=-0.005,
            central=False,
        ),
    ),
    settings={
        "network": "small",
        "images": 20_000,
        "batch": 64,
        "rate": 0.1,
        "dense epochs": 6,
        "sparsity": 0.95,
        "phases": 3,
        "replicas": 3,
        "epochs": 2,
        "recalibrate": 0.2,
        "device": "cpu",
    },
    large={
        "network": "resnet20",
        "images": 45_000,
        "batch": 128,
        "dense epochs": 100,
        "epochs": 10,
        "device": "cuda",
    },
)
