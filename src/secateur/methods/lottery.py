"""A network holds a small one that, from the same initial weights, trains as well alone.

Frankle, Carbin. "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks." ICLR 2019.
arXiv:1803.03635, section 2 and appendix B, strategy 1: train, drop a fraction of the weights that are left, put the
others back to where they started, again and again. The mask and the initial weights together are the ticket.

The paper's controls are here too: the same mask on other initial weights, a shuffled mask, and one-shot pruning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import keep_top
from secateur.axes.rules import Hold, LearningRate, Validate, everything, sparsity_of
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import ModelError, SettingError, SiteError, did_you_mean
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.train import History, Loop, Rule, Snapshot, fit, seeded


class Scope(Protocol):
    """Which weights compete for staying."""

    def drop(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], fraction: float
    ) -> dict[str, Tensor]:
        """New masks inside the old ones, with a fraction of what is left dropped."""
        ...


@dataclass(frozen=True)
class LayerByLayer:
    """Each layer loses the same fraction of what it has left, the output layer less: small fully connected nets."""

    output: float = 0.5  # the last layer's rate, as a share of the others'
    last: str = ""  # its name; empty: the last of the sites

    def drop(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], fraction: float
    ) -> dict[str, Tensor]:
        """round(fraction * left) go from each layer; one weight always stays. Raises SettingError for no such layer."""
        names = [site.name for site in sites]
        last = self.last or names[-1]
        if last not in names:
            raise SettingError(
                f"a rate for the layer {last!r} was given", "it is not pruned", did_you_mean(last, names)
            )
        found = {}
        for site in sites:
            left = int(keep[site.name].sum())
            gone = round(fraction * (self.output if site.name == last else 1.0) * left)
            count = max(left - gone, min(left, 1))
            flat, within = scores[site.name].reshape(-1), keep[site.name].reshape(-1).to(scores[site.name].device)
            found[site.name] = keep_top(flat, count, within).reshape(site.shape)
        return found


@dataclass(frozen=True)
class Together:
    """All layers compete, and may lose different shares: deep convolutional nets."""

    def drop(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], fraction: float
    ) -> dict[str, Tensor]:
        """ceil(fraction * left) go from the pool of all layers; one weight always stays."""
        flat = torch.cat([scores[site.name].reshape(-1) for site in sites])
        within = torch.cat([keep[site.name].reshape(-1) for site in sites]).to(flat.device)
        left = int(within.sum())
        chosen = keep_top(flat, max(left - ceil(fraction * left - 1e-9), min(left, 1)), within)
        pieces = torch.split(chosen, [site.units for site in sites])
        return {site.name: piece.reshape(site.shape) for site, piece in zip(sites, pieces, strict=True)}


class Policy(Protocol):
    """What happens to the weights that stay after a round."""

    @property
    def step(self) -> int:
        """The step whose weights are put aside."""
        ...

    def start(self, early: Snapshot, epoch: int) -> Snapshot | None:
        """Where the next training starts, reading data from an epoch on; None: where the last one ended."""
        ...


@dataclass(frozen=True)
class Rewind:
    """They go back to their values at a step, and the learning rate's course with them; 0 is the paper's."""

    step: int = 0

    def start(self, early: Snapshot, epoch: int) -> Snapshot | None:
        """The weights of that step, an optimizer that has seen nothing, data in a new order."""
        return replace(early.weights_only(), epoch=early.epoch + epoch)


@dataclass(frozen=True)
class Stay:
    """They go on from where training left them: strategy 2 of the paper's appendix B, Han et al. 2015."""

    step: ClassVar[int] = 0

    def start(self, early: Snapshot, epoch: int) -> Snapshot | None:
        """No way back."""
        return None


@dataclass(frozen=True, kw_only=True)
class Lottery(Method):
    """Train, drop the smallest of what is left, go back to the start; at last train the ticket."""

    rounds: int = 7  # of train, drop and rewind: 0.8^7 leaves 21 %
    fraction: float = 0.2  # of the weights left that each round drops
    scope: Scope = LayerByLayer()
    rewind: Policy = Rewind(0)
    steps: int = 2000  # optimizer steps of each training; there are rounds + 1
    rate_floor: float = 1.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        48,
        "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        arxiv="1803.03635",
        venue="ICLR",
        year=2019,
        when="around training",
        needs=("labels", "training"),
        axes="criterion rule snapshot",
        reports="tickets of 21 % of LeNet's weights learn faster and better than the whole, and than other weights "
        "under the same mask; at 3.6 % they still match it",
        checked="tests/methods/test_lottery.py::test_a_ticket_beats_its_controls_on_digits",
        differs=(
            "exactly round(p n) of n weights go: the paper's code drops those up to and including the cutoff",
            "biases go back to their own initial values, which need not be zero",
            "no sparsity is asked for: rounds and fraction give it, and the notes say what it is",
        ),
    )
    tiny: ClassVar = {"rounds": 2, "steps": 15}

    def check(self) -> None:
        """Raise SettingError for rounds, fractions and rewinding that cannot be."""
        if self.rounds < 1 or self.steps < 1:
            raise SettingError(
                f"{self.rounds} rounds of {self.steps} steps were asked for",
                "a ticket takes one of each at least",
                "Give rounds and steps above 0.",
            )
        if not 0 < self.fraction < 1:
            raise SettingError(
                f"a fraction of {self.fraction:g} a round was asked for",
                "each round drops a part of what is left, in (0, 1)",
                "Give 0.2, as the paper does.",
            )
        if not 0 <= self.rewind.step < self.steps:
            raise SettingError(
                f"rewinding to step {self.rewind.step} was asked for",
                f"training has {self.steps} steps",
                "Rewind to an earlier step; 0 is the start.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The ticket, trained: its mask is the edits, its initial weights those the model came with."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        keep, origin = everything(sites), Snapshot.of(model)
        early, history = self._dense(model, task, origin)
        whole = history
        for _ in range(self.rounds):
            keep = self.scope.drop(sites, magnitudes(model, sites), keep, self.fraction)
            start = self.rewind.start(early, history.epoch)
            rules = [LearningRate(floor=self.rate_floor), Hold(sites, keep)]
            history = fit(model, task, self.steps, rules, epoch=history.epoch, resume_from=start)
            whole = whole.then(history)
        edits = apply_(model, [Mask(site, keep[site.name]) for site in sites])
        left = sum(int(k.sum()) for k in keep.values())
        still = untouched(model, origin, sites, keep)
        notes = [
            f"{1 - sparsity_of(keep):.2%} of the weights are left after {self.rounds} rounds",
            f"{still:,} of the {left:,} weights left never moved from where they started",
        ]
        return Outcome(model, edits, whole, notes=notes + whole.notes)

    def _dense(self, model: nn.Module, task: Task, origin: Snapshot) -> tuple[Snapshot, History]:
        """The first training, and the weights to rewind to, taken on its way."""
        early = [origin]

        def take(loop: Loop) -> None:
            if loop.step == self.rewind.step:
                early.append(Snapshot.of(model, loop))

        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor)], watch=take)
        return early[-1], history


def magnitudes(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """|w| of every weight, site by site."""
    named = tensors(model)
    return {site.name: site.parts[0].read(named).detach().abs() for site in sites}


def untouched(model: nn.Module, start: Snapshot, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> int:
    """How many kept weights are, to the bit, where they started.

    Weights of inputs that are always zero get no gradient; they keep their initial size, survive, and do nothing.
    """
    named = tensors(model)
    count = 0
    for site in sites:
        if site.parts[0].name not in start.model:
            raise SiteError(
                f"{site.name} was to be compared with its start", "the snapshot has no such tensor", "Take it anew."
            )
        same = site.parts[0].read(named).detach() == site.parts[0].read(start.model).to(
            named[site.parts[0].name].device
        )
        count += int((same & keep[site.name].to(same.device)).sum())
    return count


# The controls, for anyone who claims to have a winning ticket


def train_ticket(
    model: nn.Module,
    task: Task,
    steps: int,
    sites: Sequence[Site],
    keep: Mapping[str, Tensor],
    start: Snapshot | None = None,
    *,
    epoch: int = 0,
    validate: int = 0,
) -> History:
    """Train a sub-network alone from a start (or from the model as it is), under its mask; changes the model.

    `validate` is the number of steps between validations, 0 for none.
    """
    rules: list[Rule] = [Hold(sites, keep)]
    if validate:
        rules.append(Validate(validate))
    resume = None if start is None else replace(start.weights_only(), epoch=start.epoch + epoch)
    return fit(model, task, steps, rules, epoch=epoch, resume_from=resume)


def reinitialize_(model: nn.Module, draw: torch.Generator) -> None:
    """New initial weights from the distribution the modules themselves draw from; changes the model.

    Raises ModelError where a parameter belongs to a module that cannot draw.
    """
    with seeded(model, int(torch.randint(1 << 62, (), generator=draw))):
        for name, module in model.named_modules():
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ModelError(
                    f"{name or type(model).__name__} was to be initialised anew",
                    f"{type(module).__name__} has no reset_parameters",
                    "Give the class one that draws its initial weights.",
                )


def shuffled(keep: Mapping[str, Tensor], draw: torch.Generator) -> dict[str, Tensor]:
    """Masks with as many weights in each layer, anywhere in it."""
    return {
        name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=draw).to(mask.device)].reshape(mask.shape)
        for name, mask in keep.items()
    }


def one_shot(scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks with as many weights in each layer, all chosen by one training's scores."""
    return {
        name: keep_top(scores[name].reshape(-1), int(mask.sum())).reshape(mask.shape) for name, mask in keep.items()
    }


def controls(
    model: nn.Module,
    task: Task,
    steps: int,
    sites: Sequence[Site],
    keep: Mapping[str, Tensor],
    start: Snapshot,
    draw: torch.Generator,
    *,
    draws: int = 3,
    epoch: int = 0,
    validate: int = 0,
) -> dict[str, list[History]]:
    """The ticket and its controls, each trained alone; the model is left as the last control left it.

    "ticket": the mask and its own start. "reinitialised": the same mask, other initial weights, each draw with a data
    order of its own. "random mask": a mask shuffled within each layer, on the ticket's start.
    """
    found = {"ticket": [train_ticket(model, task, steps, sites, keep, start, epoch=epoch, validate=validate)]}
    for name in ("reinitialised", "random mask"):
        found[name] = []
        for number in range(draws):
            start.restore_(model)
            mask = keep
            origin: Snapshot | None = start
            if name == "reinitialised":
                reinitialize_(model, draw)
                origin = None
            else:
                mask = shuffled(keep, draw)
            later = epoch + 1000 * (number + 1)  # no two draws see the data in one order
            found[name].append(train_ticket(model, task, steps, sites, mask, origin, epoch=later, validate=validate))
    return found
