"""A network holds a small one that, from the same initial weights, trains as well alone.

Frankle, Carbin. "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks." ICLR 2019.
arXiv:1803.03635, section 2 and appendix B, strategy 1: train, drop a fraction of the weights that are left, put the
others back to where they started, again and again. The mask and the initial weights together are the ticket.

The paper's controls are here too: the same mask on other initial weights, a shuffled mask, and one-shot pruning.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes.rewinding import (
    Aside,
    Course,
    Keep,
    LayerByLayer,
    Policy,
    Rewind,
    Scope,
    check_rounds,
    magnitudes,
    reinitialize_,
    search,
    shuffled,
)
from secateur.axes.rules import Hold, Validate, sparsity_of
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import SiteError
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.train import History, Rule, Snapshot, fit


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
        criterion=("magnitude",),
        tasks=("classification",),
        schedule=("geometric",),
        allocation=("uniform",),
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

    @property
    def course(self) -> Course:
        """One training."""
        return Course(self.steps, floor=self.rate_floor)

    def check(self) -> None:
        """Raise SettingError for rounds, fractions and rewinding that cannot be."""
        check_rounds(self.rounds, self.fraction)
        self.course.check(self.rewind)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The ticket, trained: its mask is the edits, its initial weights those the model came with."""
        self.check()
        sites, origin = weights(model, self.include, self.exclude), Snapshot.of(model)

        def drop(keep: Keep, start: Snapshot) -> Keep:
            return self.scope.drop(sites, magnitudes(model, sites), keep, self.fraction)

        aside = Aside()
        found = search(
            model, task, sites, self.course, self.rewind, self.rounds, drop,
            resume_from=aside.read(), watch=aside.write,
        )  # fmt: skip
        edits = apply_(model, [Mask(site, found.keep[site.name]) for site in sites])
        left = sum(int(k.sum()) for k in found.keep.values())
        still = untouched(model, origin, sites, found.keep)
        notes = [
            f"{1 - sparsity_of(found.keep):.2%} of the weights are left after {self.rounds} rounds",
            f"{still:,} of the {left:,} weights left never moved from where they started",
        ]
        return Outcome(model, edits, found.history, notes=notes + found.history.notes)


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
