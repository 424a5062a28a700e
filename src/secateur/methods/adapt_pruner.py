"""Adapt-Pruner: cut a little, look again, cut more where little happens; and train in between, under one curve.

Wang, Pan, Diao, Pan, Zhang, Pi, Zhang. "Adapt-Pruner: Adaptive Structural Pruning for Efficient Small Language Model
Training." 2025. arXiv:2502.03460. With x what flows into block i and y what flows out, s[i] the fraction of its heads
and neurons gone, and g the gradient of the loss, each of K small steps is, on the model as it has become:

    I[i] = -mean over tokens of cos(x, y);   I <- I - mean(I);   I <- I / max |I|
    s[i] <- clip(s[i] + S / K - A I[i], 0, 0.99)        A = S / K: the block that does most stands still
    of each site go the units with the least sum |w g|, until a fraction s[i] of it is gone

Adapt-Accel (`stages` and `steps`): prune to the first of J evenly spaced sizes, train all that is left on the next
share of the text, prune to the second, and so on; the learning rate is one curve over all stages, warmed up, held, and
brought down at the end.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.axes import Scores, keep_top, kept_of
from secateur.axes.budgets import Terms
from secateur.axes.influence import Change, Turn, watched
from secateur.axes.spending import check_affordable, total_cost
from secateur.axes.taylor import Combine, First, Taylor, Total, gradients, group_scores
from secateur.edit import Edit, Mask, apply_
from secateur.errors import BudgetError, SettingError
from secateur.graph import couple, left_of, removals
from secateur.graph.inner import inner
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Batch, Task, logits_of
from secateur.train import History, Loop, Rule, Snapshot, fit

SLACK = 1e-6  # of a weight: what counts as none
MOST = 0.99  # of a block's units may go; one stays at each site whatever that comes to


class Scale(Protocol):
    """How much each block does -> importance that can be compared: mean 0, within [-1, 1]."""

    def of(self, change: Tensor) -> Tensor:
        """[blocks] -> [blocks], float64; all 0 where blocks are alike."""
        ...


@dataclass(frozen=True)
class ByLargest:
    """Over the largest deviation, as in the paper.

    One block that stands out leaves the others near 0; and with an amplitude of a whole step it is never cut itself,
    so that of two blocks only one is.
    """

    def of(self, change: Tensor) -> Tensor:
        """See Scale."""
        apart = change.double() - change.double().mean()
        most = float(apart.abs().max())
        return apart / most if most > 1e-12 * float(change.abs().max()) else torch.zeros_like(apart)


@dataclass(frozen=True)
class ByRank:
    """By place among the blocks, evenly from -1 to 1; blocks that are alike share a place."""

    def of(self, change: Tensor) -> Tensor:
        """See Scale."""
        if len(change) < 2:
            return torch.zeros_like(change.double())
        below = (change[None] < change[:, None]).sum(1).double()
        above = (change[None] > change[:, None]).sum(1).double()
        return (below - above) / (len(change) - 1)


def advanced(gone: Tensor, importance: Tensor, step: float, amplitude: float, part: float = 1.0) -> Tensor:
    """The fraction of each block that is to be gone [blocks] after a step, or after a part of one."""
    return (gone + part * (step - amplitude * importance)).clamp(0, MOST)


def counts_at(sites: Sequence[Site], start: Mapping[str, int], gone: Mapping[str, float]) -> dict[str, int]:
    """Units left at each site when a fraction of what its block started with is gone: whole ones, and one at least.

    Nothing grows back: where less is to be gone than is, all stay.
    """
    return {s.name: min(s.units, max(1, kept_of(start[s.name], gone[s.block]))) for s in sites}


def unit_costs(sites: Sequence[Site]) -> dict[str, float]:
    """What a unit of each site owns, in weights."""
    return {site.name: float(site.cost().mean()) for site in sites}


def cost_of(sites: Sequence[Site], counts: Mapping[str, int], each: Mapping[str, float]) -> float:
    """What sites lose when they are cut to some counts, in weights."""
    return sum(each[site.name] * (site.units - counts[site.name]) for site in sites)


@dataclass(frozen=True)
class Bent:
    """What blocks would lose if they went on doing what they do now: those with high scores less.

    One look instead of many: what can be said before the run, and the allocation for a single cut.
    """

    bend: float = 1.0  # A K / S: 1 leaves the best block alone, 0 is uniform
    scale: Scale = ByLargest()

    needs_scores: ClassVar = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation; a site's score is the mean over its units."""
        if scores is None:
            raise SettingError("blocks were to be compared", "no scores were given", "Give how much each block does.")
        spend = budget.sparsity * total_cost(sites)
        check_affordable(sites, spend, total_cost(sites))
        blocks = list(dict.fromkeys(site.block for site in sites))
        means = {s.block: float(scores[s.name].double().mean()) for s in sites}
        importance = self.scale.of(torch.tensor([means[block] for block in blocks], dtype=torch.float64))
        start, each = {site.name: site.units for site in sites}, unit_costs(sites)

        def at(part: float) -> dict[str, int]:
            gone = advanced(torch.zeros(len(blocks), dtype=torch.float64), importance, 1.0, self.bend, part)
            return counts_at(sites, start, dict(zip(blocks, gone.tolist(), strict=True)))

        return at(_least(lambda part: cost_of(sites, at(part), each) >= spend - SLACK, 1000.0))


def _least(enough: Callable[[float], bool], most: float) -> float:
    """The smallest part of a step, up to `most`, that is enough; `most` when none is."""
    low, high = 0.0, most
    for _ in range(60 if enough(most) else 0):
        middle = (low + high) / 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


# Training in between


def learning_factor(step: int, steps: int, warmup: float, decay: float, floor: float) -> float:
    """What the learning rate is multiplied by at a step of all: up for a while, held, and down to the floor."""
    warm, fall = round(warmup * steps), round(decay * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    left = steps - step
    return 1.0 if left >= fall else floor + (1 - floor) * left / fall


class OneCurve(Rule):
    """Learning rates along one curve over all stages, of which this training is a part."""

    def __init__(self, first: int, steps: int, warmup: float, decay: float, floor: float) -> None:
        self.first, self.steps = first, steps  # steps taken before this part; steps in all
        self.shape = (warmup, decay, floor)
        self._base: list[float] = []

    def start(self, loop: Loop) -> None:
        """Remember where each learning rate starts."""
        self._base = [float(group.setdefault("initial_lr", group["lr"])) for group in loop.optimizer.param_groups]

    def before_forward(self, loop: Loop) -> None:
        """Set the learning rates of the step to come."""
        factor = learning_factor(self.first + loop.step, self.steps, *self.shape)
        for base, group in zip(self._base, loop.optimizer.param_groups, strict=True):
            group["lr"] = base * factor
        loop.log("learning rate", self._base[0] * factor)


class Clip(Rule):
    """The gradient of all parameters together is cut to a length."""

    def __init__(self, most: float) -> None:
        self.most = most

    def before_step(self, loop: Loop) -> None:
        """Shorten what is too long."""
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), self.most)


class Distil(Rule):
    """Agree with a teacher: (1 - a) loss + a T^2 KL(teacher || student), both softened by the temperature T."""

    def __init__(self, teacher: nn.Module, weight: float, temperature: float) -> None:
        self.teacher, self.weight, self.temperature = teacher.eval(), weight, temperature
        self._answer: Any = None

    def watch(self, model: nn.Module) -> Any:
        """A handle of the hook that notes what the student answers."""

        def note(_: nn.Module, __: Any, answer: Any) -> None:
            self._answer = answer

        return model.register_forward_hook(note)

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """See Rule. Raises TaskError for an answer without logits."""
        assert loop.batch is not None, "a step has a batch"
        with torch.no_grad():
            wanted = logits_of(loop.batch.through(self.teacher)).float() / self.temperature
        found = logits_of(self._answer).float() / self.temperature
        apart = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), reduction="none", log_target=True)
        return (1 - self.weight) * value + self.weight * self.temperature**2 * apart.sum(-1).mean()


@dataclass(frozen=True, kw_only=True)
class AdaptPruner(Method):
    """Heads and neurons go in many small steps, most from blocks that hardly turn the hidden state.

    With `stages` and `steps` the steps are taken between trainings of all that is left: Adapt-Accel.
    """

    sparsity: float = 0.2  # fraction of the weights of all heads and neurons taken out, in [0, 1)
    parameters: int = 0  # of the whole model, embeddings too, to end with; 0: what the sparsity comes to
    samples: int = 512  # calibration sequences of every step, as in the paper (of 64 tokens there)
    iterations: int = 50  # small steps at most, in each stage: K
    ceiling: float = 1.0  # what all of them together would take from every block: S
    amplitude: float = 0.02  # how far a step is bent by what a block does: A; 0 is uniform
    change: Change = Turn()  # how much a block does; squared and absolute are the authors' options
    scale: Scale = ByLargest()  # by-rank does not mind one block that stands out
    taylor: Taylor = First()  # what a unit's slice of a tensor matters to the loss
    combine: Combine = Total()  # what becomes of a unit's shares of several tensors
    stages: int = 1  # sizes on the way, each pruned to and trained at: J; the authors take 5 or 20
    steps: int = 0  # training steps in all stages together; 0 trains nothing
    warmup: float = 0.05  # fraction of all steps in which the learning rate rises
    decay: float = 0.1  # fraction of all steps in which it falls, at the end
    rate_floor: float = 0.0  # what it falls to, as a fraction
    clip: float = 1.0  # longest gradient
    distil: float = 0.0  # weight of agreeing with the model as it was, in place of the loss
    temperature: float = 2.0  # at which they are compared
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        40,
        "Adapt-Pruner: adaptive structural pruning for efficient small language model training",
        arxiv="2502.03460",
        year=2025,
        granularity=("head", "channel"),
        needs=("calibration", "training"),
        families=("decoder", "encoder", "vision transformer"),
        axes="criterion allocation schedule rule",
        criterion=("first-order", "similarity"),
        tasks=("language modelling",),
        schedule=("linear",),
        allocation=("score-driven",),
        reports="LLaMA-3.1-8B, pruning alone: 1 to 7 points of average accuracy above LLM-Pruner, FLAP and SliceGPT. "
        "MobileLLM 350M to 125M with 20 stages of training: MMLU 25.35, level with the one trained from scratch.",
        checked="tests/methods/test_adapt_pruner.py::test_a_step_by_hand",
        differs=(
            "The last step of a stage is shortened, and neurons make up for a head that would be too much, so that the"
            " size asked for is met; the authors stop at the first size below it.",
            "Query heads are scored and cut with the key-value head they read; the authors' shared code pools every"
            " third one instead of neighbours.",
            "Gradients are kept until every score is made; the authors' code clears one that two groups share.",
            "A budget that the steps cannot reach is an error; the authors' code returns what it has.",
            "Scores are made in float64, where half precision would underflow.",
            "The optimizer and its rate are the task's.",
        ),
    )
    tiny: ClassVar = {"samples": 16, "iterations": 10, "amplitude": 0.1, "stages": 2, "steps": 4}

    def budget(self) -> Budget | None:
        """A fraction of the weights, unless a number of parameters is asked for."""
        return None if self.parameters else Budget(self.sparsity)

    @property
    def allocation(self) -> Bent:
        """What can be said beforehand of who loses how much."""
        return Bent(self.amplitude * self.iterations / self.ceiling, self.scale)

    def check(self) -> None:
        """See Method."""
        super().check()
        if min(self.samples, self.iterations, self.stages) < 1 or min(self.steps, self.parameters) < 0:
            raise SettingError(
                f"samples={self.samples}, iterations={self.iterations}, stages={self.stages}, steps={self.steps} and"
                f" parameters={self.parameters} were given",
                "samples, iterations and stages start at 1, steps and parameters at 0",
                "Take the defaults: 512, 50, 1, 0 and 0.",
            )
        if 0 < self.steps < self.stages:
            raise SettingError(
                f"{self.steps} training steps were asked for",
                f"there are {self.stages} stages to train in",
                "Give a step to each at least, or 0 to train nothing.",
            )
        if not 0 < self.ceiling <= 1 or not self.clip > 0 or not self.temperature > 0:
            raise SettingError(
                f"ceiling={self.ceiling:g}, clip={self.clip:g} and temperature={self.temperature:g} were given",
                "a ceiling is a fraction, and the others are above 0",
                "Take the defaults: 1, 1 and 2.",
            )
        if not isfinite(self.amplitude):
            raise SettingError(
                f"amplitude={self.amplitude:g} was given", "steps are bent by it", "Give 0.02, or 0 for uniform steps."
            )
        shares = (self.warmup, self.decay, self.rate_floor, self.distil)
        if not all(0 <= share <= 1 for share in shares) or self.warmup + self.decay > 1:
            raise SettingError(
                f"warmup={self.warmup:g}, decay={self.decay:g}, rate_floor={self.rate_floor:g} and"
                f" distil={self.distil:g} were given",
                "each is a fraction, and the first two share one training",
                "Take the defaults: 0.05, 0.1, 0 and 0.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises BudgetError when the steps are used up before the size is reached."""
        self.check()
        coupling = couple(model, task.example)
        found = inner(coupling)
        terms = Terms(self.sparsity, protect=self.protect)
        whole = sites = tuple(terms.free(model, found))
        total, before = total_cost(whole), sum(p.numel() for p in model.parameters())
        spend = self._spend(whole, before)
        batches = list(task.batches("calibration", self.samples))
        teacher = copy.deepcopy(model) if self.distil and self.steps else None
        alive = {site.name: torch.arange(site.units) for site in whole}  # of the units there were, those left
        history, at, taken, gone = History(), (0, 0), 0, 0.0
        for stage in range(1, self.stages + 1):
            sites, lost, used = self.cut(model, task, sites, batches, spend * stage / self.stages - gone, alive)
            gone, taken = gone + lost, taken + used
            first, last = (self.steps * n // self.stages for n in (stage - 1, stage))
            if last > first:
                trained, at = self.train(model, task, first, last, at, teacher)
                history = history.then(trained)
        keep = {site.name: torch.zeros(site.units, dtype=torch.bool) for site in whole}
        for name, left in alive.items():
            keep[name][left] = True
        # All small cuts of a site come to one: what is taken out of it as it was.
        edits: list[Edit] = [Mask(site, keep[site.name]) for site in whole if bool(keep[site.name].all())]
        edits += removals(whole, keep)
        notes = [
            f"{gone:,.0f} of {total:,.0f} weights of heads and neurons taken out: {gone / total:.4f}, "
            + (f"{self.parameters:,} parameters" if self.parameters else f"{self.sparsity:g}")
            + f" asked for; {before - round(gone):,} parameters are left, after {taken} small steps",
            self._drift(whole, keep),
            *terms.left_alone(found),
            "left by block: " + "; ".join(_left(block, whole, keep) for block in _blocks(whole)),
            *(str(frozen) for frozen in coupling.frozen),
        ]
        return Outcome(model, edits, history if self.steps else None, notes=[*notes, *history.notes])

    def _spend(self, sites: Sequence[Site], before: int) -> float:
        """How many weights are to go. Raises BudgetError, with the least that can be, when so many cannot."""
        total = total_cost(sites)
        if not self.parameters:
            check_affordable(sites, self.sparsity * total, total)
            return self.sparsity * total
        most = cost_of(sites, {site.name: 1 for site in sites}, unit_costs(sites))
        if not before - most <= self.parameters < before:
            raise BudgetError(
                f"{self.parameters:,} parameters were asked for",
                f"the model has {before:,}, of which {total:,.0f} are of heads and neurons",
                f"Ask for less than {before:,}, and {before - most:,.0f} at least: a unit stays at each site.",
            )
        return float(before - self.parameters)

    def cut(
        self,
        model: nn.Module,
        task: Task,
        sites: Sequence[Site],
        batches: Sequence[Batch],
        spend: float,
        alive: dict[str, Tensor],
    ) -> tuple[tuple[Site, ...], float, int]:
        """One stage: small steps until so many weights are gone. The sites left, what went, and in how many steps.

        `alive` is brought up to date. Raises BudgetError when the steps do not suffice.
        """
        left, start = tuple(sites), {site.name: site.units for site in sites}
        gone, lost = torch.zeros(len(_blocks(sites)), dtype=torch.float64), 0.0
        for taken in range(self.iterations):
            if lost >= spend - SLACK:
                return left, lost, taken
            importance, grads, squares = self.look(model, task, left, batches)
            counts, gone = self.next(left, start, gone, importance, spend - lost)
            named, keep = tensors(model), {}
            for site in left:
                if counts[site.name] < site.units:
                    score = group_scores(site, named, grads, squares, self.taylor, self.combine)
                    keep[site.name] = keep_top(score, counts[site.name])
                    alive[site.name] = alive[site.name][keep[site.name]]
            lost += cost_of(left, counts, unit_costs(left))
            apply_(model, removals(left, keep))
            left = left_of(left, keep)
        if lost < spend - SLACK:
            raise BudgetError(
                f"{spend:,.0f} weights were to go in {self.iterations} small steps",
                f"{lost:,.0f} are gone when the steps are used up",
                "Ask for a lower sparsity, for more iterations where the ceiling is below 1, or a smaller amplitude.",
            )
        return left, lost, self.iterations

    def next(
        self, sites: Sequence[Site], start: Mapping[str, int], gone: Tensor, importance: Tensor, wanted: float
    ) -> tuple[dict[str, int], Tensor]:
        """Units left at each site, and the fraction of each block gone, after a step: a short one where it suffices."""
        blocks, each = _blocks(sites), unit_costs(sites)

        def after(part: float) -> Tensor:
            return advanced(gone, importance, self.ceiling / self.iterations, self.amplitude, part)

        def counts(part: float) -> dict[str, int]:
            return counts_at(sites, start, dict(zip(blocks, after(part).tolist(), strict=True)))

        def enough(found: Mapping[str, int]) -> bool:
            return cost_of(sites, found, each) >= wanted - SLACK

        part = _least(lambda part: enough(counts(part)), 1.0)
        whole, just = counts(part), counts(part - 1e-9)
        if enough(whole) and not enough(just):  # the last step: a head that is more than is wanted waits for neurons
            heads = {site.name: just[site.name] for site in sites if site.kind == "head"}
            more = _least(lambda part: enough(counts(part) | heads), 1000.0)
            if enough(counts(more) | heads):
                whole = counts(more) | heads
        return whole, after(part)

    def look(
        self, model: nn.Module, task: Task, sites: Sequence[Site], batches: Sequence[Batch]
    ) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """One pass there and back: how important each block is [blocks], and the gradients by tensor name."""
        blocks, names = _blocks(sites), {part.name for site in sites for part in site.parts}
        device = next(model.parameters()).device
        with watched(model, blocks, self.change) as seen:
            moved = [batch.to(device) for batch in batches]
            grads, squares = gradients(model, task, moved, names, self.taylor.squares)
        importance = self.scale.of(torch.tensor([seen.change(block) for block in blocks], dtype=torch.float64))
        return importance, grads, squares

    def train(
        self, model: nn.Module, task: Task, first: int, last: int, at: tuple[int, int], teacher: nn.Module | None
    ) -> tuple[History, tuple[int, int]]:
        """Steps `first` to `last` of all: their history, and the epoch and place in the data that was reached.

        The optimizer starts anew, for its moments are of other shapes; data and learning rate go on where they were.
        """
        place = list(at)

        def watch(loop: Loop) -> None:
            place[:] = loop.epoch, loop.place

        rules: list[Rule] = [OneCurve(first, self.steps, self.warmup, self.decay, self.rate_floor), Clip(self.clip)]
        with ExitStack() as stack:
            if teacher is not None:
                distil = Distil(teacher, self.distil, self.temperature)
                stack.callback(distil.watch(model).remove)
                rules.append(distil)
            here = Snapshot(model.state_dict(), epoch=at[0], place=at[1])
            history = fit(model, task, last - first, rules, epoch=at[0], watch=watch, resume_from=here)
        return history, (place[0], place[1])

    def _drift(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> str:
        """How much of the heads and how much of the neurons went: whole heads wait until enough is due."""
        said = []
        for kind, word in (("head", "heads"), ("channel", "neurons")):
            mine = [site for site in sites if site.kind == kind]
            if mine:
                gone, units = sum(int((~keep[s.name]).sum()) for s in mine), sum(s.units for s in mine)
                said.append(f"{gone:,} of {units:,} {word} ({gone / units:.1%})")
        return "of which " + " and ".join(said)


def _blocks(sites: Sequence[Site]) -> list[str]:
    return list(dict.fromkeys(site.block for site in sites))


def _left(block: str, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> str:
    """`3: 2 heads, 1,190 neurons`."""
    words = {"head": "heads", "channel": "neurons"}
    mine = [f"{int(keep[s.name].sum()):,} {words[s.kind]}" for s in sites if s.block == block]
    return f"{block.rpartition('.')[2]}: {', '.join(mine)}"
