"""Around training: what a round drops, where what stays goes back to, and the loop of rounds itself.

    train -> [choose what stays -> go back -> train] * rounds

    Rewind(k)     weights and clock go back to step k; 0 is where training started
    Stay(k)       the weights stay as trained, and the clock alone goes back: 0 is the whole course once more

A `Scope` says which weights compete for staying, a `Policy` what becomes of those that do, a `Course` is one training,
and `search` runs the rounds. The controls of a ticket (shuffled masks, other initial weights) are here, too.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.patterns import keep_top
from secateur.axes.rules import Hold, LearningRate, everything
from secateur.axes.schedules import Cosine, Curve
from secateur.errors import ModelError, ResumeError, SettingError, did_you_mean
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.train import History, Loop, Rule, Snapshot, fit, seeded
from secateur.walk import journal_place

Keep = dict[str, Tensor]
"""Masks: site name -> bool [*site.shape], True keeps."""


@runtime_checkable
class Scope(Protocol):
    """Which weights compete for staying."""

    def drop(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], fraction: float
    ) -> Keep:
        """New masks inside the old ones, with a fraction of what is left dropped."""
        ...


@dataclass(frozen=True)
class LayerByLayer:
    """Each layer loses the same fraction of what it has left, the output layer less: small fully connected nets."""

    output: float = 0.5  # the last layer's rate, as a share of the others'
    last: str = ""  # its name; empty: the last of the sites

    def drop(
        self, sites: Sequence[Site], scores: Mapping[str, Tensor], keep: Mapping[str, Tensor], fraction: float
    ) -> Keep:
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
    ) -> Keep:
        """ceil(fraction * left) go from the pool of all layers; one weight always stays."""
        flat, within = pooled(sites, scores), pooled(sites, keep)
        left = int(within.sum())
        chosen = keep_top(flat, max(left - ceil(fraction * left - 1e-9), min(left, 1)), within.to(flat.device))
        return apart(sites, chosen)


def pooled(sites: Sequence[Site], values: Mapping[str, Tensor]) -> Tensor:
    """The values of all sites in one row, in the order of the sites."""
    return torch.cat([values[site.name].reshape(-1) for site in sites])


def apart(sites: Sequence[Site], row: Tensor) -> Keep:
    """One row of values as those of each site again."""
    pieces = torch.split(row, [site.units for site in sites])
    return {site.name: piece.reshape(site.shape) for site, piece in zip(sites, pieces, strict=True)}


@runtime_checkable
class Policy(Protocol):
    """What happens to the weights that stay after a round."""

    @property
    def step(self) -> int:
        """The step to which the clock goes back, whose state is put aside."""
        ...

    def start(self, model: nn.Module, early: Snapshot, epoch: int) -> Snapshot:
        """Where the next training starts, reading data from an epoch on; the optimizer has seen nothing."""
        ...


@dataclass(frozen=True)
class Rewind:
    """They go back to their values at a step, and the learning rate's course with them; 0 is where they started."""

    step: int = 0

    def start(self, model: nn.Module, early: Snapshot, epoch: int) -> Snapshot:
        """Weights, buffers, clock and place in the data of that step; the data in a new order."""
        return replace(early.weights_only(), epoch=early.epoch + epoch)


@dataclass(frozen=True)
class Stay:
    """They go on from where training left them, and the learning rate's course alone goes back to a step.

    Step 0 is Han et al. 2015 with the course run again; later ones are learning-rate rewinding (Renda, Frankle,
    Carbin 2020, arXiv 2003.02389).
    """

    step: int = 0

    def start(self, model: nn.Module, early: Snapshot, epoch: int) -> Snapshot:
        """The weights as they are, at that step's clock and place in the data."""
        return replace(Snapshot.of(model), step=early.step, place=early.place, epoch=early.epoch + epoch)


@dataclass(frozen=True)
class Course:
    """One training from its first step to its last, and how the learning rate moves over it."""

    steps: int
    curve: Curve = Cosine()
    warmup: float = 0.0  # fraction of the steps in which the rate rises
    floor: float = 1.0  # the rate at the end, as a fraction of that at the start; 1: constant

    def check(self, policy: Policy) -> None:
        """Raise SettingError for a course that cannot be, or does not reach the step gone back to."""
        if self.steps < 1:
            raise SettingError(
                f"trainings of {self.steps} steps were asked for", "a ticket takes one at least", "Give steps above 0."
            )
        if not 0 <= policy.step < self.steps:
            raise SettingError(
                f"rewinding to step {policy.step} was asked for",
                f"training has {self.steps} steps",
                "Rewind to an earlier step; 0 is the start.",
            )
        LearningRate(self.curve, self.warmup, self.floor)

    def train(
        self,
        model: nn.Module,
        task: Task,
        sites: Sequence[Site] = (),
        keep: Mapping[str, Tensor] | None = None,
        start: Snapshot | None = None,
        *,
        epoch: int = 0,
        more: Sequence[Rule] = (),
        watch: Callable[[Loop], None] | None = None,
    ) -> History:
        """Train a network, or what masks leave of it, from a state on; the clock starts where the state's is.

        Without `start`, from the model as it is. Changes the model.
        """
        rules: list[Rule] = [LearningRate(self.curve, self.warmup, self.floor)]
        if keep is not None:
            rules.append(Hold(sites, keep))
        return fit(model, task, self.steps, [*rules, *more], epoch=epoch, watch=watch, resume_from=start)


@dataclass(frozen=True, eq=False)
class Whole:
    """The training of the whole network: states it passed, where it ended, and how it went."""

    states: Mapping[int, Snapshot]  # by step
    end: Snapshot
    history: History

    def at(self, step: int) -> Snapshot:
        """The state at a step. Raises ResumeError where none was put aside."""
        if step not in self.states:
            raise ResumeError(
                f"the weights at step {step} were to be gone back to",
                f"those at {', '.join(map(str, sorted(self.states)))} were put aside",
                "Train the whole network again, putting that step aside.",
            )
        return self.states[step]


def train_whole(
    model: nn.Module, task: Task, course: Course, at: Iterable[int] = (0,), more: Sequence[Rule] = ()
) -> Whole:
    """Train the whole network and put its states at some steps aside; one training serves many rewinding points."""
    wanted = set(at)
    states = {0: Snapshot.of(model)} if 0 in wanted else {}

    def take(loop: Loop) -> None:
        if loop.step in wanted:
            states[loop.step] = Snapshot.of(model, loop)

    history = course.train(model, task, watch=take, more=more)
    return Whole(states, Snapshot.of(model), history)


@dataclass(frozen=True, eq=False)
class Rounds:
    """How far a search is: everything that the next round needs, and how it went."""

    done: int  # rounds
    keep: Keep
    early: Snapshot  # where the weights go back to
    start: Snapshot  # where the last training started
    end: Snapshot  # and ended
    last: History  # of the last training
    history: History  # of all of them
    beside: Mapping[str, Any] = field(default_factory=dict)  # what the one that chooses wants to remember

    def snapshot(self) -> Snapshot:
        """All of it as one value that can be saved."""
        held = {
            "done": self.done,
            "keep": dict(self.keep),
            "early": _held(self.early),
            "start": _held(self.start),
            "last": vars(self.last),
            "history": vars(self.history),
            "beside": dict(self.beside),
        }
        return replace(self.end, rules=(held,))

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Rounds":
        """What `snapshot` put into one. Raises ResumeError for any other."""
        held: Mapping[str, Any] = snapshot.rules[0] if snapshot.rules else {}
        if "keep" not in held or "early" not in held:
            raise ResumeError(
                "a search in rounds was to be taken up again", "the snapshot is of one training", "Give one of Rounds."
            )
        early, start = (replace(Snapshot(held[key]["model"]), **held[key]["place"]) for key in ("early", "start"))
        last, history = (History(**held[key]) for key in ("last", "history"))
        end, beside = replace(snapshot, rules=None), held.get("beside", {})
        return cls(held["done"], dict(held["keep"]), early, start, end, last, history, beside)


def _held(state: Snapshot) -> dict[str, Any]:
    return {
        "model": dict(state.model),
        "place": {"step": state.step, "epoch": state.epoch, "place": state.place},
    }


class Aside:
    """Where a search puts its rounds aside while its run is under a journal, and takes them up from; else nowhere.

    search(..., resume_from=aside.read(), watch=aside.write)
    """

    def __init__(self) -> None:
        self.place = journal_place("rounds")

    def read(self) -> Rounds | None:
        """How far an earlier run of the same had got."""
        if self.place is None or not self.place.exists():
            return None
        return Rounds.of(Snapshot.load(self.place))

    def write(self, rounds: Rounds) -> None:
        """Put the state after a round aside, in place of that before it."""
        if self.place is not None:
            rounds.snapshot().save(self.place)


Choose = Callable[[Keep, Snapshot], Keep]
"""New masks inside the old ones, for the model as just trained, given the state its training started from."""


def search(
    model: nn.Module,
    task: Task,
    sites: Sequence[Site],
    course: Course,
    policy: Policy,
    rounds: int,
    choose: Choose,
    *,
    whole: Whole | None = None,
    more: Sequence[Rule] = (),
    resume_from: Rounds | None = None,
    watch: Callable[[Rounds], None] | None = None,
    over: Callable[[Rounds], bool] | None = None,
) -> Rounds:
    """Train, choose what stays, go back, train what stays, again and again; the model is left trained under its masks.

    `whole` is the first training where it was made before. `watch` is told after each round, the first training being
    round 0; what it is given can be saved, and given as `resume_from` to go on as if nothing had happened. `over` is
    asked before each round, and may end the search early.
    """
    if resume_from is None:
        origin = Snapshot.of(model) if whole is None else whole.at(0)
        whole = train_whole(model, task, course, {0, policy.step}, more) if whole is None else whole
        early, history = whole.at(policy.step).weights_only(), whole.history
        now = Rounds(0, everything(sites), early, origin, whole.end, history, history)
        if watch is not None:
            watch(now)
    else:
        now = resume_from
    now.end.restore_(model)
    for number in range(now.done, rounds):
        if over is not None and over(now):
            break
        keep = choose(now.keep, now.start)
        start = policy.start(model, now.early, now.last.epoch)
        last = course.train(model, task, sites, keep, start, epoch=now.last.epoch, more=more)
        now = Rounds(number + 1, keep, now.early, start, Snapshot.of(model), last, now.history.then(last))
        if watch is not None:
            watch(now)
    return now


def check_rounds(rounds: int, fraction: float) -> None:
    """Raise SettingError for a number of rounds, or a fraction that each drops, that cannot be."""
    if rounds < 1:
        raise SettingError(
            f"{rounds} rounds of dropping weights were asked for", "a ticket takes one at least", "Give rounds above 0."
        )
    if not 0 < fraction < 1:
        raise SettingError(
            f"a fraction of {fraction:g} a round was asked for",
            "each round drops a part of what is left, in (0, 1)",
            "Give 0.2, as Frankle and Carbin do.",
        )


def magnitudes(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """|w| of every weight, site by site."""
    named = tensors(model)
    return {site.name: site.parts[0].read(named).detach().abs() for site in sites}


# The controls of a ticket


def reinitialize_(model: nn.Module, draw: torch.Generator) -> None:
    """New initial weights from the distribution the modules themselves draw from; changes the model.

    Models of transformers draw by their own rule. Raises ModelError where a parameter belongs to a module that cannot
    draw.
    """
    own = getattr(model, "_init_weights", None)
    with seeded(model, int(torch.randint(1 << 62, (), generator=draw))), torch.no_grad():
        for name, module in model.named_modules():
            if callable(own):
                own(module)
                continue
            reset = getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)
            if callable(reset):
                reset()
            elif next(module.parameters(recurse=False), None) is not None:
                raise ModelError(
                    f"{name or type(model).__name__} was to be initialised anew",
                    f"{type(module).__name__} has no reset_parameters",
                    "Give the class one that draws its initial weights.",
                )


def shuffled(keep: Mapping[str, Tensor], draw: torch.Generator) -> Keep:
    """Masks with as many weights in each layer, anywhere in it."""
    return {
        name: mask.reshape(-1)[torch.randperm(mask.numel(), generator=draw).to(mask.device)].reshape(mask.shape)
        for name, mask in keep.items()
    }


def one_shot(scores: Mapping[str, Tensor], keep: Mapping[str, Tensor]) -> Keep:
    """Masks with as many weights in each layer, all chosen by one training's scores."""
    return {
        name: keep_top(scores[name].reshape(-1), int(mask.sum())).reshape(mask.shape) for name, mask in keep.items()
    }
