"""Prune as much each round as the weights say they can spare, and less and less as they can spare less.

Diao, Wang, Zhang, Yang, Ding, Tarokh. "Pruning Deep Neural Networks from a Sparsity Perspective." ICLR 2023.
arXiv:2302.05601, section 4, algorithm 1: sparsity-informed adaptive pruning (SAP). Round after round the network is
trained, and of each pool of d weights with PQ index I

    m = d (1 + eta)^(-q / (q - p)) (1 - I)^(pq / (q - p))        have to stay, and
    floor(d min(max(gamma (1 - m / d), 0), beta))                of the smallest go;

the others go back to where they started. The index itself is drawn round after round: it falls while weights go that
were not needed, rises near the limit of compression, and falls as the network collapses.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from secateur.axes.clipping import Clip
from secateur.axes.pq import (
    Adaptive,
    Indexed,
    Never,
    Pool,
    PqIndex,
    Stopping,
    WholeNetwork,
    drop_smallest,
)
from secateur.axes.rewinding import Course, Keep, Policy, Rewind, Rounds, magnitudes, search
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import SettingError, TaskError
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.task import Task, quality
from secateur.train import Loop, Rule, Snapshot


class Best(Rule):
    """Training ends with the weights that were best on held-out data, the first of equals."""

    def __init__(self, every: int, split: str = "val") -> None:
        self.every, self.split = every, split
        self.quality: float | None = None
        self.model: Mapping[str, torch.Tensor] = {}

    def start(self, loop: Loop) -> None:
        """Check that there is something to measure on."""
        if loop.task is None:
            raise TaskError("the best weights were to be kept", "this loop has no task", "Keep them in your own loop.")
        self.quality, self.model = None, {}

    def after_step(self, loop: Loop) -> None:
        """Measure every so many steps, and after the last."""
        if loop.step % self.every and loop.step != loop.steps:
            return
        assert loop.task is not None
        measured = loop.task.measure(loop.model, self.split)
        loop.log(f"validation {loop.task.metric}", measured[loop.task.metric])
        found = quality(loop.task, measured)
        if self.quality is None or found > self.quality:
            self.quality, self.model = found, Snapshot.of(loop.model).model

    def finish(self, loop: Loop) -> None:
        """Put the best weights back."""
        if self.model:
            Snapshot(self.model).restore_(loop.model)

    def state(self) -> dict[str, Any]:
        """The best weights so far."""
        return {"quality": self.quality, "model": dict(self.model)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """See state."""
        self.quality, self.model = state["quality"], state["model"]


@dataclass(frozen=True, kw_only=True)
class Sap(Method):
    """Train, ask the weights how many of them have to stay, drop the rest, go back to the start; again and again."""

    rounds: int = 15  # of train, drop and rewind: T; there are rounds + 1 trainings
    p: float = 0.5  # of the PQ index
    q: float = 1.0  # and its larger power
    slack: float = 0.0  # mass that may go, as a fraction of what stays: eta_r
    scaling: float = 1.0  # of the share that goes: gamma
    most: float = 0.9  # the largest share of a pool that goes in one round: beta
    pool: Pool = WholeNetwork()  # which weights are measured together; also each-layer, each-neuron
    rewind: Policy = Rewind(0)  # where what stays goes back to
    stopping: Stopping = Never()  # turned() stops once the index has fallen and risen again
    idle: int = 2  # rounds in which nothing goes, after which it stops
    steps: int = 2000  # optimizer steps of each training: E epochs
    every: int = 100  # steps between looks at held-out data, for the best weights of each training
    clip: float = 1.0  # the largest norm of the gradient; 0: any
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = ()  # what to leave dense; the paper leaves nothing

    card: ClassVar = Card(
        18,
        "Pruning Deep Neural Networks from a Sparsity Perspective",
        arxiv="2302.05601",
        venue="ICLR",
        year=2023,
        when="around training",
        needs=("labels", "training"),
        axes="amount allocation rule snapshot stopping",
        criterion=("magnitude", "information"),
        tasks=("classification",),
        schedule=("custom",),
        allocation=("score-driven",),
        reports="the PQ index falls, rises and falls again as pruning goes on; a pruner led by it compresses more than "
        "the lottery's fixed 20 % a round, in fewer rounds",
        checked="tests/methods/test_sap.py::test_fewer_rounds_than_the_lottery_to_the_same_sparsity_on_digits",
        differs=(
            "the best weights of a training are chosen on the validation split; the paper's code looks at the test set",
            "exactly floor(share * left) weights go, ties by place: the code keeps whatever ties with its threshold",
            "the gradient is clipped after masking: in the code masked entries take part in its norm",
            "no sparsity is asked for: the weights say how much goes, and the notes say what is left",
            "it stops after rounds in which nothing went, which the paper's loop would repeat",
        ),
    )
    tiny: ClassVar = {"rounds": 2, "steps": 15, "every": 10}

    @property
    def index(self) -> PqIndex:
        """The measure of compressibility."""
        return PqIndex(self.p, self.q)

    @property
    def amount(self) -> Adaptive:
        """How many go."""
        return Adaptive(self.index, self.slack, self.scaling, self.most)

    @property
    def course(self) -> Course:
        """One training."""
        return Course(self.steps, floor=self.rate_floor)

    def check(self) -> None:
        """Raise SettingError for an index, an amount, rounds or trainings that cannot be."""
        assert self.amount
        for name, value in (("rounds", self.rounds), ("every", self.every), ("idle", self.idle)):
            if value < 1:
                raise SettingError(f"{name}={value} was given", "it takes one at least", f"Give {name} above 0.")
        if self.clip < 0:
            raise SettingError(f"a gradient no longer than {self.clip:g} was asked for", "a norm is 0 or more", "")
        self.course.check(self.rewind)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The network trained under the last round's masks, which are the edits; the curves hold the index."""
        self.check()
        found = self.search(model, task)
        sites = weights(model, self.include, self.exclude)
        edits = apply_(model, [Mask(site, found.keep[site.name]) for site in sites])
        return Outcome(model, edits, found.history, notes=self.notes(found) + found.history.notes)

    def search(
        self,
        model: nn.Module,
        task: Task,
        *,
        resume_from: Rounds | None = None,
        watch: Callable[[Rounds], None] | None = None,
    ) -> Rounds:
        """The rounds by themselves; what `watch` is given after each can be saved, and gone on from."""
        sites = weights(model, self.include, self.exclude)
        more: list[Rule] = [Clip(self.clip)] if self.clip else []
        more += [Best(self.every), Indexed(sites, self.index)]

        def choose(keep: Keep, start: Snapshot) -> Keep:
            return drop_smallest(sites, magnitudes(model, sites), keep, self.pool, self.amount)

        return search(
            model, task, sites, self.course, self.rewind, self.rounds, choose,
            more=more, resume_from=resume_from, watch=watch, over=lambda now: bool(self.over(now)),
        )  # fmt: skip

    def over(self, now: Rounds) -> str:
        """Why there is to be no further round; empty where there is one."""
        kept, index = values(now, "kept"), values(now, "pq index")
        if len(kept) > self.idle and len(set(kept[-self.idle - 1 :])) == 1:
            return f"nothing went in {self.idle} rounds: by their index all {kept[-1]:.2%} left have to stay"
        if self.stopping.over(index):
            return f"the index has turned: {min(index):.4f} after round {index.index(min(index))}, {index[-1]:.4f} now"
        return ""

    def notes(self, found: Rounds) -> list[str]:
        """What is left, and how it came about, round by round."""
        kept, index = values(found, "kept"), values(found, "pq index")
        notes = [f"{kept[-1]:.2%} of the weights are left after {found.done} rounds"]
        if found.done < self.rounds:
            notes.append(f"stopped after {found.done} of {self.rounds} rounds: {self.over(found)}")
        rows = [f"{k:.2%} {i:.4f}" for k, i in zip(kept, index, strict=True)]
        return [*notes, f"left and PQ index({self.p:g}, {self.q:g}) after each training: {', '.join(rows)}"]


def values(found: Rounds, curve: str) -> list[float]:
    """What was logged under a name, one value a training."""
    return [value for _, value in found.history.curves.get(curve, [])]
