"""One pruned network retrained several times over, each time otherwise, under the same masks."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.axes.rules import Hold, LearningRate
from secateur.axes.schedules import Curve, Linear
from secateur.distributed import present, shared
from secateur.errors import SettingError
from secateur.site import Site
from secateur.task import Task
from secateur.train import History, Rule, Snapshot, fit

Keep = Mapping[str, Tensor]
"""Masks: site name -> bool [*site.shape], True keeps."""


# Branch: what one replica does differently from another


@dataclass(frozen=True)
class Retraining:
    """How one replica is retrained."""

    steps: int  # optimizer steps
    epoch: int = 0  # the first epoch of data: its number is what the order is drawn from
    rate: float = 1.0  # the highest learning rate, as a multiple of the task's
    decay: float | None = None  # weight decay; None: the task's

    def optimizer(self, model: nn.Module, task: Task) -> Optimizer:
        """The task's own, at this rate and decay. Raises SettingError where it has no weight decay to change."""
        made = task.optimizer([p for p in model.parameters() if p.requires_grad])
        for group in made.param_groups:
            group["lr"] *= self.rate
            if self.decay is not None:
                if "weight_decay" not in group:
                    raise SettingError(
                        f"a weight decay of {self.decay:g} was asked for",
                        f"{type(made).__name__} has none",
                        "Vary the order of the data instead: vary=order.",
                    )
                group["weight_decay"] = self.decay
        return made


@runtime_checkable
class Variation(Protocol):
    """The one hyper-parameter in which replicas differ."""

    def check(self, replicas: int) -> None:
        """Raise SettingError where it does not say what each of so many replicas does."""
        ...

    def of(self, number: int, given: Retraining) -> Retraining:
        """What a replica, counted from 0, does with what all are given."""
        ...


@dataclass(frozen=True)
class Order:
    """Another order of the data, and other draws of dropout; the weights they start from are the same."""

    apart: ClassVar[int] = 100_000  # epochs between replicas: none meets another's order

    def check(self, replicas: int) -> None:
        """See Variation."""

    def of(self, number: int, given: Retraining) -> Retraining:
        """See Variation."""
        return replace(given, epoch=given.epoch + number * self.apart)


@dataclass(frozen=True)
class Decays:
    """A weight decay each."""

    values: tuple[float, ...] = (5e-5, 1e-4, 2e-4)

    def check(self, replicas: int) -> None:
        """See Variation."""
        _one_each(self.values, replicas, "weight decays", zero=True)

    def of(self, number: int, given: Retraining) -> Retraining:
        """See Variation."""
        return replace(given, decay=self.values[number])


@dataclass(frozen=True)
class Lengths:
    """A length of retraining each, as a multiple of the steps asked for."""

    values: tuple[float, ...] = (0.5, 1.0, 1.5)

    def check(self, replicas: int) -> None:
        """See Variation."""
        _one_each(self.values, replicas, "lengths")

    def of(self, number: int, given: Retraining) -> Retraining:
        """See Variation."""
        return replace(given, steps=max(round(given.steps * self.values[number]), 1))


@dataclass(frozen=True)
class Rates:
    """A highest learning rate each, as a multiple of what all would have."""

    values: tuple[float, ...] = (0.5, 1.0, 1.5)

    def check(self, replicas: int) -> None:
        """See Variation."""
        _one_each(self.values, replicas, "learning rates")

    def of(self, number: int, given: Retraining) -> Retraining:
        """See Variation."""
        return replace(given, rate=given.rate * self.values[number])


def _one_each(values: tuple[float, ...], replicas: int, name: str, zero: bool = False) -> None:
    if len(values) != replicas:
        raise SettingError(
            f"{replicas} replicas were to have {name} {', '.join(f'{v:g}' for v in values)}",
            f"those are {len(values)}",
            "Give one value for each replica.",
        )
    if any(not (0 < v < float("inf") or (zero and v == 0)) for v in values) or len(set(values)) < len(values):
        raise SettingError(
            f"{name} {', '.join(f'{v:g}' for v in values)} were asked for",
            "each is a positive number, and no two are alike",
            "Replicas that do not differ make no soup.",
        )


@runtime_checkable
class Restart(Protocol):
    """How the learning rate goes through each retraining."""

    def rule(self) -> LearningRate:
        """Its course."""
        ...

    def rate(self, shrunk: float, fraction: float, steps: int) -> float:
        """The highest rate, as a multiple of the task's.

        `shrunk` is |what was pruned| / |what was there|, L2 norms; `fraction` that of the weights there that went.
        """
        ...


@dataclass(frozen=True)
class Fall:
    """From the task's rate to the floor after a short warm-up: linear is LLR, a cosine CLR, steps SLR.

    The names are of Zimmer, Spiegel, Pokutta 2021, arXiv 2111.00843. FT, the last small rate throughout, is
    fall(warmup=0, floor=1, top=0.01).
    """

    curve: Curve = Linear()
    warmup: float = 0.1  # fraction of the steps in which the rate rises
    floor: float = 0.0  # the rate at the end, as a fraction of the highest
    top: float = 1.0  # the highest rate, as a multiple of the task's

    def rule(self) -> LearningRate:
        """See Restart."""
        return LearningRate(self.curve, self.warmup, self.floor)

    def rate(self, shrunk: float, fraction: float, steps: int) -> float:
        """See Restart."""
        return self.top


@dataclass(frozen=True)
class AdaptiveFall:
    """ALLR: linear from a rate that grows with what pruning took away; small cuts need no large rate.

    The highest rate is that of the task times shrunk / sqrt(fraction), held between steps / whole and 1: Zimmer,
    Spiegel, Pokutta 2021, arXiv 2111.00843.
    """

    whole: int = 0  # steps of the training that made the dense model, for the least rate; 0: there is no least
    warmup: float = 0.1  # fraction of the steps in which the rate rises

    def rule(self) -> LearningRate:
        """See Restart."""
        return LearningRate(Linear(), self.warmup)

    def rate(self, shrunk: float, fraction: float, steps: int) -> float:
        """See Restart."""
        least = min(steps / self.whole, 1.0) if self.whole else 0.0
        return min(max(shrunk / sqrt(fraction), least), 1.0) if fraction else least or 1.0


@dataclass(frozen=True, eq=False)
class Candidate:
    """A replica, retrained: its whole state, the masks it was held under, and how it went."""

    state: Snapshot
    keep: Keep
    history: History


def branch(
    model: nn.Module,
    task: Task,
    sites: Sequence[Site],
    keep: Keep,
    ways: Sequence[Retraining],
    course: Restart,
    more: Sequence[Rule] = (),
) -> list[Candidate]:
    """Retrain one pruned network in several ways, all under the same masks; the model is left where it started.

    `more` are rules for all of them, which come after the masks.

    Among processes that work together (see `secateur.distributed`), each retrains its share of the replicas, and
    all get all of them.
    """
    ours, start = present(), Snapshot.of(model)
    mine: dict[int, tuple[dict[str, Tensor], object]] = {}
    for number in range(ours.rank, len(ways), ours.count):
        start.restore_(model)
        way = ways[number]
        rules = [course.rule(), Hold(sites, keep), *more]
        history = fit(model, task, way.steps, rules, way.optimizer(model, task), epoch=way.epoch)
        mine[number] = (dict(Snapshot.of(model).model), asdict(history))
    start.restore_(model)
    return [
        Candidate(Snapshot(held), keep, History(**cast(dict[str, Any], said))) for held, said in shared(mine, len(ways))
    ]
