"""A metanetwork before group pruning against none, more tuning and direct shrinking: small residual networks."""

import copy
from functools import lru_cache

from torch import Tensor, nn

from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import LearningRate
from secateur.graph import couple
from secateur.methods.meta_pruning import Grouped, passed_, prune_groups_
from secateur.train import Loop, Rule, Snapshot, fit
from tools.train_metanetwork import SETTINGS, metanetwork, network, task_of

TIMES = ("1.5", "2", "3")  # multiply-adds before over after
ARMS = ("groups", "metanetwork", "tuned", "shrunk")


class Shrink(Rule):
    """Draws groups to zero while a network is trained, as the metanetwork is drawn: the pull without it."""

    def __init__(self, model: nn.Module, sites: tuple, strength: float) -> None:
        self.sites, self.strength = sites, strength

    def before_step(self, loop: Loop) -> None:
        for name, pull in Grouped().gradients(self.sites, loop.tensors).items():
            gradient: Tensor | None = loop.tensors[name].grad
            if gradient is not None:
                gradient.add_(pull, alpha=self.strength)


@lru_cache(maxsize=2)
def dense(seed: int, frozen: tuple) -> Snapshot:
    settings = dict(frozen)
    model = network(settings, seed)
    fit(model, task_of(settings, seed), settings["first"], [LearningRate()])
    return Snapshot.of(model)


@lru_cache(maxsize=4)
def prepared(arm: str, seed: int, frozen: tuple) -> Snapshot:
    """What is pruned: all but the first arm have half of the fine-tuning behind them."""
    settings = dict(frozen)
    task, model = task_of(settings, seed), network(settings, seed)
    dense(seed, frozen).restore_(model)
    rules: list[Rule] = [LearningRate()]
    if arm == "metanetwork":
        passed_(model, metanetwork(settings)[0])
    if arm == "shrunk":
        rules.append(Shrink(model, couple(model, task.example).of("channel"), settings["shrink"]))
    if arm != "groups":
        fit(model, task, settings["tune"] // 2, rules, epoch=2000)
    return Snapshot.of(model)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    frozen = tuple(sorted(settings.items()))
    if condition == "meta-training":
        took = dict(metanetwork(settings)[1])
        # A step of a network's own training is one batch forward and back, and so is a batch of the metanetwork's.
        spent = took["optimizer steps for networks"] + took["batches of the metanetwork"]
        return {**took, "networks pruned for the same steps": spent / settings["tune"]}
    arm, _, times = condition.partition("@")
    task, model = task_of(settings, seed), network(settings, seed)
    prepared(arm, seed, frozen).restore_(model)
    before = task.measure(model, "test")["accuracy"]
    prune_groups_(model, task.example, 1 - 1 / float(times), settings["share"])
    cut = task.measure(model, "test")["accuracy"]
    fresh = copy.deepcopy(model)
    recalibrate_(fresh, some(task, 512))
    left = settings["tune"] if arm == "groups" else settings["tune"] - settings["tune"] // 2
    fit(model, task, left, [LearningRate()], epoch=3000)
    return {
        "accuracy before the cut": before,
        "accuracy at the cut": cut,
        "with fresh statistics": task.measure(fresh, "test")["accuracy"],
        "accuracy": task.measure(model, "test")["accuracy"],
    }


def derive(measured: Measured) -> dict[str, dict[str, float]]:
    """The mean over the three sizes."""
    found = {}
    for arm in ARMS:
        rows = [measured[f"{arm}@{times}"] for times in TIMES if f"{arm}@{times}" in measured]
        if len(rows) == len(TIMES):
            found[f"{arm} on average"] = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
    return found


def ahead(times: str, than: str, metric: str, says: str, margin: float = 0.0, central: bool = True) -> Expectation:
    ends = " on average" if times == "all" else f"@{times}"
    return Expectation(says, f"metanetwork{ends}", f"{than}{ends}", metric, "higher", margin, central=central)


CUT, END = "accuracy at the cut", "accuracy"
CLAIM = Claim(
    name="meta_pruning",
    number=32,
    says="A network that has gone through a metanetwork and was fine-tuned keeps its accuracy when groups are pruned "
    "by their norm, to 2.3 to 3 times fewer multiply-adds of ResNet-56, and is as good as or ahead of group pruning "
    "with a sparse regulariser after fine-tuning.",
    source="arXiv:2506.12041, sections 4 and 5 (its tables were not at hand)",
    here="Residual networks of 8 layers, 8 channels wide, on 6,000 pictures of Fashion-MNIST; one metanetwork trained "
    "on four of them, and three others pruned. `groups` is pruned at once, `tuned` fine-tuned first, `shrunk` with the "
    "pull on its own weights; all have 120 steps of fine-tuning in all, so that the metanetwork's own training comes "
    "on top: `meta-training` says what it took.",
    conditions=("meta-training", *(f"{arm}@{times}" for times in TIMES for arm in ARMS)),
    once=("meta-training",),
    expects=(
        ahead("2", "groups", CUT, "At half of the work more is kept at the cut than without"),
        ahead("2", "tuned", CUT, "and than with as much fine-tuning"),
        ahead("3", "groups", CUT, "at a third too"),
        ahead("3", "tuned", CUT, "and with as much fine-tuning"),
        ahead("all", "tuned", END, "After fine-tuning it is not half a point behind, over all sizes", -0.005),
        ahead("1.5", "tuned", CUT, "at two thirds", central=False),
        ahead("2", "shrunk", CUT, "more is kept than by shrinking the network itself", central=False),
        ahead("all", "tuned", "with fresh statistics", "with fresh statistics of norms, over all sizes", central=False),
        ahead("all", "shrunk", END, "after fine-tuning not half a point behind shrinking", -0.005, central=False),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={**SETTINGS, "tune": 120, "share": 0.02, "shrink": 0.003},
    large={"depth": 56, "width": 16, "images": 50_000, "first": 8000, "passes": 100, "batches": 20, "tune": 8000},
    derive=derive,
)
