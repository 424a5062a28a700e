"""Whether what pruning kept is worth more than its shape: the pruned network, trained from new weights, beside it.

Liu, Sun, Zhou, Huang, Darrell. "Rethinking the Value of Network Pruning." ICLR 2019. arXiv:1810.05270, section 3. With
E the steps of the dense recipe, F_d and F_p the work of the dense and of the pruned network per example:

    fine-tune    inherited weights, a quarter of E, at the last learning rate of the recipe
    scratch-E    new weights, E steps, the recipe's schedule
    scratch-B    new weights, E F_d / F_p steps, the schedule at the same fractions: as much work as the dense training
    scratch-all  new weights, as much work as pruning took in all: dense training, the pruner's own, and fine-tuning

of any outcome of any method: channels, heads, blocks or experts that are gone, single weights under their mask.

    for arm in audit(model, edits, task, Recipe(steps=2000), dense_work):
        print(arm.name, arm.steps, arm.work, arm.total, arm.values)
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod, sqrt
from statistics import fmean, stdev
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import nn

from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.schedules import Steps
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import SettingError
from secateur.method import Card
from secateur.outcome import flop_counter
from secateur.site import tensors
from secateur.task import Task, generator, modes_of, restore_modes_
from secateur.train import Rule, fit

CARD = Card(
    36, "Rethinking the Value of Network Pruning", arxiv="1810.05270", venue="ICLR", year=2019,
    granularity=("weight", "channel"), needs=("labels", "training"), criterion=("any",), tasks=("classification",),
    schedule=("one-shot",), allocation=("any",), retraining=("finetune", "from scratch"),
)  # fmt: skip

FORWARD_AND_BACKWARD = 3  # a backward pass takes as much work as two forward ones


@dataclass(frozen=True)
class Recipe:
    """How the dense network was trained."""

    steps: int  # E
    drops: Steps = Steps()  # of the learning rate, at fractions of training
    fine_tune: float = 0.25  # steps of fine-tuning, as a fraction of E: 40 of 160 epochs in the paper

    def __post_init__(self) -> None:
        if self.steps < 1 or not self.fine_tune >= 0:
            raise SettingError(
                f"a dense training of {self.steps} steps, and {self.fine_tune:g} of that to fine-tune, was given",
                "the first is 1 at least, and the second is not negative",
                "Give what the dense network was trained for.",
            )

    @property
    def last(self) -> float:
        """The last learning rate, as a fraction of the first."""
        return float(self.drops.by ** len(self.drops.at))


@dataclass(frozen=True)
class Work:
    """Multiply-adds times two per example, and what was spent before an arm starts."""

    dense: float  # of the dense network: F_d
    pruned: float  # of the pruned network, masked weights not counted: F_p
    batch: int  # examples of a step
    before: float = 0.0  # spent by the pruner's own training, beside that of the dense network

    @property
    def ratio(self) -> float:
        """F_d / F_p."""
        return self.dense / self.pruned

    def of_steps(self, steps: int, per_example: float) -> float:
        """What steps of training take."""
        return FORWARD_AND_BACKWARD * per_example * self.batch * steps


# Arms


@runtime_checkable
class Budget(Protocol):
    """How long, from which weights, and at which learning rate the pruned network is trained."""

    @property
    def name(self) -> str:
        """What the arm is called."""
        ...

    @property
    def fresh(self) -> bool:
        """Whether it starts from new weights."""
        ...

    def steps(self, recipe: Recipe, work: Work) -> int:
        """Optimizer steps, one at least."""
        ...

    def rate(self, recipe: Recipe) -> Rule:
        """How the learning rate moves."""
        ...


@dataclass(frozen=True)
class FineTune:
    """The weights that pruning left, at the recipe's last learning rate."""

    name: ClassVar[str] = "fine-tune"
    fresh: ClassVar[bool] = False

    def steps(self, recipe: Recipe, work: Work) -> int:
        """A fraction of the recipe's."""
        return max(1, int(recipe.fine_tune * recipe.steps))

    def rate(self, recipe: Recipe) -> Rule:
        """Low and constant."""
        return LearningRate(_Constant(recipe.last))


@dataclass(frozen=True)
class _Constant:
    """A curve on which a learning rate stands at a fraction of its base."""

    share: float

    def __call__(self, u: float) -> float:
        return 1 - self.share


@dataclass(frozen=True)
class ScratchE:
    """New weights, the recipe as it is."""

    name: ClassVar[str] = "scratch-E"
    fresh: ClassVar[bool] = True

    def steps(self, recipe: Recipe, work: Work) -> int:
        """E."""
        return recipe.steps

    def rate(self, recipe: Recipe) -> Rule:
        """The recipe's."""
        return LearningRate(recipe.drops)


@dataclass(frozen=True)
class ScratchB:
    """New weights, and as much work as the dense training took; the schedule at the same fractions."""

    most: float = float("inf")  # times E: 2 in the paper's ImageNet runs

    name: ClassVar[str] = "scratch-B"
    fresh: ClassVar[bool] = True

    def steps(self, recipe: Recipe, work: Work) -> int:
        """The whole part of E F_d / F_p."""
        return max(1, int(recipe.steps * min(work.ratio, self.most) + 1e-9))

    def rate(self, recipe: Recipe) -> Rule:
        """The recipe's, stretched."""
        return LearningRate(recipe.drops)


@dataclass(frozen=True)
class ScratchAll:
    """New weights, and as much work as pruning took in all; where training is short, fine-tuning is much of that."""

    name: ClassVar[str] = "scratch-all"
    fresh: ClassVar[bool] = True

    def steps(self, recipe: Recipe, work: Work) -> int:
        """The dense training, the pruner's own and fine-tuning, in steps of the pruned network."""
        spent = work.of_steps(recipe.steps, work.dense) + work.before
        spent += work.of_steps(FineTune().steps(recipe, work), work.pruned)
        return max(1, int(spent / work.of_steps(1, work.pruned) + 1e-9))

    def rate(self, recipe: Recipe) -> Rule:
        """The recipe's, stretched."""
        return LearningRate(recipe.drops)


BUDGETS: tuple[Budget, ...] = (FineTune(), ScratchE(), ScratchB(), ScratchAll())


@dataclass(frozen=True)
class Arm:
    """One training of the pruned network: how long it was, what it cost and how good it became."""

    name: str
    seed: int
    steps: int
    work: float  # of this training: multiply-adds times two
    total: float  # with what must have been spent before it can start
    values: dict[str, float]  # quality after the last step


def held(model: nn.Module, edits: Iterable[Edit]) -> Hold:
    """The masks of single weights, or blocks of them, that stand in a model; held from the first step."""
    named = tensors(model)
    stands = [
        edit
        for edit in edits
        if isinstance(edit, Mask)
        and edit.site.kind in ("weight", "block")
        and all(p.name in named and p.view(named[p.name]).shape == p.shape for p in edit.site.parts)
    ]
    return Hold.of(stands)


def work_of(model: nn.Module, task: Task, hold: Hold | None = None) -> float:
    """Multiply-adds times two of a forward pass per example; layers under a mask count by the share that stays.

    Products of matrices and convolutions, as torch counts them; nothing else. A layer of several weights, such as a
    recurrent one or the experts of a block, counts by the share that stays of all of them.
    """
    example, modes = task.example, modes_of(model)
    with torch.no_grad(), flop_counter() as counter:
        example.through(model.eval())
    restore_modes_(model, modes)
    counts, head = counter.get_flop_counts(), type(model).__name__ + "."
    by_module = {name.removeprefix(head): sum(each.values()) for name, each in counts.items()}
    total = float(counter.get_total_flops())
    gone, seen = dict[str, float](), dict[str, int]()  # elements that are masked, and looked at, by module
    for site in hold.sites if hold is not None else ():
        assert hold is not None
        if len(site.parts) == 1:
            (part,) = site.parts
            share, size = float(hold.keep[site.name].double().mean()), prod(part.shape)
            gone[part.module] = gone.get(part.module, 0.0) + (1 - share) * size
            seen[part.module] = seen.get(part.module, 0) + size
    for name, elements in gone.items():
        own = model.get_submodule(name).named_parameters(recurse=False, remove_duplicate=False)
        whole = max(sum(p.numel() for _, p in own if p.dim() > 1), seen[name])
        total -= by_module.get(name, 0) * elements / whole
    return total / example.size


def fresh_(model: nn.Module, hold: Hold, draw: torch.Generator) -> nn.Module:
    """New initial weights and statistics for a pruned architecture; masks and buffers that are shape stay.

    Under a mask weights are drawn with variance 2 / n, n the mean number of outputs that an input still leads to.
    """
    reinitialize_(model, draw)
    named = tensors(model)
    with torch.no_grad():
        for site in hold.sites:
            for part in site.parts:
                seen, keep = part.read(named), hold.keep[site.name]
                left = float(part.expand(keep).expand(part.shape).double().mean()) * prod(part.shape)
                outputs = max(left / (part.shape[1] if len(part.shape) > 1 else 1), 1e-9)
                seen.copy_((torch.randn(part.shape, generator=draw) * sqrt(2 / outputs)).to(seen))
                seen.masked_fill_(part.expand(~keep).to(seen.device), 0)
    return model


def audit(
    model: nn.Module,
    edits: Sequence[Edit],
    task: Task,
    recipe: Recipe,
    dense_work: float,
    *,
    budgets: Sequence[Budget] = BUDGETS,
    pruner_steps: int = 0,
    split: str = "test",
) -> list[Arm]:
    """Train a pruned network under each budget, each from the model as given; that is left alone.

    `dense_work` is `work_of` the network before it was pruned, and `pruner_steps` what the pruner itself trained, which
    is counted as work of the dense network. Data come in the same order for all, new weights from the task's seed.
    """
    hold = held(model, edits)
    batch = next(iter(task.batches("train"))).size
    work = Work(dense_work, work_of(model, task, hold), batch)
    work = replace(work, before=work.of_steps(pruner_steps, work.dense))
    return [_trained(model, hold, task, recipe, work, budget, split) for budget in budgets]


def _trained(model: nn.Module, hold: Hold, task: Task, recipe: Recipe, work: Work, budget: Budget, split: str) -> Arm:
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.requires_grad_(True)
    if budget.fresh:
        fresh_(twin, hold, generator(task, f"scratch {budget.name}"))
    steps = budget.steps(recipe, work)
    rules: list[Rule] = [budget.rate(recipe)]
    if hold.sites:
        rules.append(Hold(hold.sites, hold.keep))
    fit(twin, task, steps, rules)
    cost, spent = work.of_steps(steps, work.pruned), 0.0
    if not budget.fresh:
        spent = work.of_steps(recipe.steps, work.dense) + work.before
    return Arm(budget.name, task.seed, steps, cost, cost + spent, task.measure(twin, split))


def ticket(dense: nn.Module, edits: Sequence[Edit]) -> nn.Module:
    """The pruned shape with the weights of a network as it was before training: its edits replayed, values left out.

    For the paper's lottery arm: train it beside networks of new weights.
    """
    twin = copy.deepcopy(dense)
    apply_(twin, [copy.deepcopy(edit) for edit in edits if not _changes_values(edit, twin)])
    return twin


def _changes_values(edit: Edit, model: nn.Module) -> bool:
    return isinstance(edit, Update) and edit.name in tensors(model)


@dataclass(frozen=True)
class Row:
    """An arm over seeds."""

    name: str
    seeds: int
    steps: float  # mean
    work: float
    total: float
    mean: float  # of the task's metric
    spread: float  # its standard deviation; 0 for one seed


def table(arms: Sequence[Arm], metric: str) -> list[Row]:
    """The equal-budget ledger: each arm in the order they were first met, mean and standard deviation over seeds."""
    rows = []
    for name in dict.fromkeys(arm.name for arm in arms):
        mine = [arm for arm in arms if arm.name == name]
        values = [arm.values[metric] for arm in mine]
        rows.append(
            Row(
                name,
                len(mine),
                fmean(arm.steps for arm in mine),
                fmean(arm.work for arm in mine),
                fmean(arm.total for arm in mine),
                fmean(values),
                stdev(values) if len(values) > 1 else 0.0,
            )
        )
    return rows


def advantages(arms: Sequence[Arm], metric: str, left: str, right: str) -> list[float]:
    """How much higher one arm's metric is than another's, seed by seed."""
    found = {(arm.name, arm.seed): arm.values[metric] for arm in arms}
    seeds = [arm.seed for arm in arms if arm.name == left and (right, arm.seed) in found]
    return [found[left, seed] - found[right, seed] for seed in seeds]
