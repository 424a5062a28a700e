"""Random search: draw many sub-networks before training, keep the one that starts best, and train it.

"Random Search as a Baseline for Sparse Neural Network Architecture Search." 2024. arXiv:2403.08265. A mask z of hidden
nodes is drawn T times at one sparsity; the winner is the one whose untrained network f(x; W0 z) has the lowest loss on
some training examples, and is trained from the values it started with. The paper's finding is that it is no better
than a mask drawn once: a neutral baseline for whatever else searches, at an equal number of forward passes.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.edit import Edit, Update, apply_
from secateur.errors import BudgetError, SettingError
from secateur.evidence import calm
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Batch, Task, generator, logits_of
from secateur.train import History, fit

Choice = Mapping[str, Tensor]
"""Which nodes of each site stay, bool [nodes]."""


# Propose


@runtime_checkable
class Draw(Protocol):
    """How a choice of nodes is drawn."""

    def choice(self, sizes: Mapping[str, int], sparsity: float, draw: torch.Generator) -> Choice:
        """Nodes that stay, one at least at each site; `sizes` says how many each has."""
        ...


@dataclass(frozen=True)
class EvenNodes:
    """The same fraction of every layer, rounded."""

    def choice(self, sizes: Mapping[str, int], sparsity: float, draw: torch.Generator) -> Choice:
        """See Draw."""
        return {name: _some(size, max(1, round((1 - sparsity) * size)), draw) for name, size in sizes.items()}


@dataclass(frozen=True)
class AnyNodes:
    """Nodes from all layers together: the total is exact, and a draw that empties a layer is drawn again."""

    tries: int = 1000

    def choice(self, sizes: Mapping[str, int], sparsity: float, draw: torch.Generator) -> Choice:
        """See Draw. Raises BudgetError when every try has emptied a layer."""
        total = sum(sizes.values())
        keep = max(len(sizes), round((1 - sparsity) * total))
        for _ in range(self.tries):
            parts = torch.split(_some(total, keep, draw), list(sizes.values()))
            if all(bool(part.any()) for part in parts):
                return dict(zip(sizes, parts, strict=True))
        raise BudgetError(
            f"{keep} of {total} nodes were to be drawn from {len(sizes)} layers",
            f"{self.tries} draws in a row emptied one of them",
            "Ask for less sparsity, or draw=even-nodes.",
        )


def _some(size: int, keep: int, draw: torch.Generator) -> Tensor:
    chosen = torch.zeros(size, dtype=torch.bool)
    chosen[torch.randperm(size, generator=draw)[:keep]] = True
    return chosen


# Score


@runtime_checkable
class Promise(Protocol):
    """What an untrained sub-network is judged by."""

    def cost(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
        """Lower is better. The model is a copy, and may be changed."""
        ...


@dataclass(frozen=True)
class StartingLoss:
    """The mean loss before any training. Small outputs do well: log(classes) is what saying nothing costs."""

    def cost(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
        """See Promise."""
        with calm(model), torch.no_grad():
            size = sum(batch.size for batch in batches)
            return sum(float(task.loss(model, batch)) * batch.size for batch in batches) / size


@dataclass(frozen=True)
class StartingError:
    """The fraction of labels that the largest output misses before any training: sizes of outputs do not matter."""

    def cost(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
        """See Promise. Raises SettingError for batches without labels."""
        wrong = total = 0
        with calm(model), torch.no_grad():
            for batch in batches:
                if not isinstance(batch.target, Tensor) or batch.target.dim() != 1:
                    raise SettingError(
                        f"sub-networks were to be judged by their errors on {task.name}",
                        "its examples have no label each",
                        "Use starting-loss.",
                    )
                wrong += int((_outputs(model, batch).argmax(-1).cpu() != batch.target.cpu()).sum())
                total += batch.size
        return wrong / total


@dataclass(frozen=True)
class EarlyLoss:
    """The loss after a few steps of training, which count as three forward passes each."""

    steps: int = 10

    def cost(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> float:
        """See Promise."""
        fit(model, task, self.steps)
        return StartingLoss().cost(model, task, batches)


def _outputs(model: nn.Module, batch: Batch) -> Tensor:
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return logits_of(batch.to(device).through(model))


# Keep


@dataclass(frozen=True)
class Searched:
    """What a search has found, and all it looked at."""

    best: int  # number of the winner, from 0
    costs: tuple[float, ...]  # of each trial


def search(trials: int, cost: Callable[[int], float]) -> Searched:
    """The trial of the lowest cost, the first of equals. A trial is known by its number alone, in whatever order."""
    costs = tuple(cost(t) for t in range(trials))
    return Searched(min(range(trials), key=lambda t: (costs[t] != costs[t], costs[t])), costs)


def sub_network(model: nn.Module, sites: Sequence[Site], keep: Choice, rescale: bool = False) -> list[Edit]:
    """Take the nodes that do not stay out of a model; the edits made.

    With `rescale`, what reads a layer is multiplied by how many times fewer nodes it has, so that sums keep their size.
    """
    named, larger = tensors(model), dict[str, Tensor]()
    for site in sites if rescale else ():
        factor = torch.full((site.units,), site.units / int(keep[site.name].sum()), dtype=torch.float64)
        for part in site.parts:
            if part.axis == 1:  # its own columns alone: others of them may read another layer
                seen = part.view(larger.setdefault(part.name, named[part.name].detach().clone()))
                seen.mul_(part.expand(factor, nobody=1.0).to(seen))
    return apply_(model, [*(Update(name, value) for name, value in larger.items()), *removals(sites, keep)])


@dataclass(frozen=True, kw_only=True)
class RandomSearch(Method):
    """Draw sub-networks, train the one that starts best. With trials=1, a random mask: the control.

    Nodes are taken out, not masked, so that what is trained is smaller in fact. Which trial draws what depends on the
    seed and the trial's number alone.
    """

    sparsity: float = 0.9  # fraction of the hidden nodes (channels, neurons) taken out, in [0, 1)
    trials: int = 200  # sub-networks looked at
    samples: int = 1000  # training examples they are judged on
    draw: Draw = EvenNodes()  # any-nodes draws from all layers together
    judge: Promise = StartingLoss()  # starting-error and early-loss are the alternatives
    rescale: bool = False  # whether what reads a thinned layer is multiplied to keep the size of sums; the paper: W0
    steps: int = 500  # of training the winner; 0 for none

    card: ClassVar = Card(
        42,
        "Random search as a baseline for sparse neural network architecture search",
        arxiv="2403.08265",
        year=2024,
        when="before training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "rnn"),
        axes="draw judge",
        criterion=("random", "search"),
        tasks=("classification",),
        allocation=("uniform",),
        learns=("search",),
        fusion=("architecture search",),
        reports="Sub-networks found by random search neither perform better nor converge faster than random ones.",
        checked="tests/methods/test_random_search.py::test_the_winner_is_the_first_of_the_lowest",
        differs=(
            "The protocol is a reconstruction from the abstract: the paper's code and tables were not available.",
            "Convolutions' channels and transformers' neurons are nodes as well.",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "trials": 4, "samples": 16, "steps": 5}

    def budget(self) -> Budget:
        """A fraction of nodes."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        check_sparsity(self.sparsity)
        for name, least in {"trials": 1, "samples": 1, "steps": 0}.items():
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} was asked for", f"{least} is the least", "Give more.")

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises GraphError for a model without hidden layers that can be thinned."""
        self.check()
        coupling = couple(model, task.example)
        found = coupling.need("channel")
        sites = [site for site in found if coupling.multiples.get(site.name, 1) == 1]
        if not sites:
            raise SettingError(
                "hidden nodes were to be drawn", "all of them go in groups only", "Use l1_norm, which keeps multiples."
            )
        batches = list(task.batches("train", self.samples))  # never those that the result is measured on
        sizes = {site.name: site.units for site in sites}

        def drawn(trial: int) -> Choice:
            return self.draw.choice(sizes, self.sparsity, generator(task, f"random search {trial}"))

        def cost(trial: int) -> float:
            candidate = copy.deepcopy(model)
            sub_network(candidate, sites, drawn(trial), self.rescale)
            return self.judge.cost(candidate, task, batches)

        result = search(self.trials, cost)
        before = sum(p.numel() for p in model.parameters())
        edits = sub_network(model, sites, drawn(result.best), self.rescale)
        left = sum(p.numel() for p in model.parameters())
        examples = sum(batch.size for batch in batches)
        extra = 3 * self.judge.steps if isinstance(self.judge, EarlyLoss) else 0
        notes = [
            f"{self.trials:,} sub-networks looked at on {examples:,} examples each: {self.trials * examples:,} forward "
            f"passes of examples" + (f", and {self.trials * extra:,} of training batches" if extra else ""),
            f"trial {result.best} won: {min(result.costs):.4g}, of a median of {median(result.costs):.4g} and a worst "
            f"of {max(result.costs):.4g}",
            f"{sum(map(int, (k.sum() for k in drawn(result.best).values()))):,} of {sum(sizes.values()):,} nodes stay, "
            f"and {left:,} of {before:,} parameters",
        ]
        notes += [f"left alone: {site.name}, whose nodes go in groups" for site in found if site not in sites]
        history = fit(model, task, self.steps) if self.steps else History()
        for step, value in enumerate(history.losses, 1):
            history.log("training loss", step, value)
        return Outcome(model, edits, history, notes=notes + history.notes)
