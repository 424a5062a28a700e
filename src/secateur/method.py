"""A paper as a frozen dataclass: its fields are the hyper-parameters and the command line, `run` its algorithm."""

import copy
import hashlib
import importlib
import pkgutil
import resource
import sys
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from secateur.errors import BudgetError, ModelError, SettingError, TaskError, did_you_mean
from secateur.outcome import (
    SCHEMA_VERSION,
    Ledger,
    Measurement,
    Outcome,
    Record,
    Shows,
    Size,
    about_machine,
    about_model,
    about_task,
    about_versions,
    elements,
    now,
    site_rows,
    time_pair,
)
from secateur.site import Unit, tensors, uncompiled
from secateur.task import Task, modes_of, restore_modes_
from secateur.vocabulary import AXES, checked
from secateur.walk import journal

When = Literal["before training", "during training", "after training", "around training", "at inference", "recovery"]


FAMILIES = ("mlp", "cnn", "decoder", "encoder", "vision transformer", "rnn", "moe")
"""The kinds of model that "any" on a card stands for."""

SPECIAL_FAMILIES = ("voxel network",)
"""Kinds that a card has to name, since they lie outside what most methods look at."""


@dataclass(frozen=True)
class Budget:
    """How much to remove: a fraction in [0, 1) of something."""

    sparsity: float = 0.5
    of: Unit = "weights"

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)


def check_sparsity(value: float, name: str = "sparsity") -> None:
    """Raise SettingError unless a fraction removed is in [0, 1)."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        hint = f"Did you mean {value / 100:g}?" if isinstance(value, (int, float)) and 1 <= value < 100 else ""
        raise SettingError(
            f"{name} {value} was asked for",
            f"a {name} is the fraction removed, in [0, 1)",
            hint or "Give a fraction such as 0.5, or 50% on the command line.",
        )


def check_count(value: int, of: str, least: int = 1) -> None:
    """Raise SettingError for fewer of something than there can be."""
    if value < least:
        raise SettingError(
            f"{value} {of} were asked for", f"it takes {least} at least", f"Give {least} or more, or leave it out."
        )


@dataclass(frozen=True)
class Card:
    """What is known of a method before it runs: where it comes from, where it fits, what was checked."""

    number: int  # the paper's number in this project; 0 for baselines
    title: str
    arxiv: str = ""
    venue: str = ""  # for what is not on arXiv
    year: int = 0
    when: When = "after training"
    granularity: tuple[str, ...] = ("weight",)  # kinds of site
    needs: tuple[str, ...] = ()  # "calibration", "labels", "training"
    families: tuple[str, ...] = ("any",)  # "any", or some of FAMILIES and SPECIAL_FAMILIES
    axes: str = ""  # the words it is made of: "criterion pattern allocation"
    reports: str = ""  # what the paper reports, in a sentence
    checked: str = ""  # the test that pins it: "tests/methods/test_wanda.py::test_..."
    differs: tuple[str, ...] = ()  # each deliberate departure, with the reason

    # The survey's axes, in the words of secateur.vocabulary. () is what secateur.registry derives from the rest of the
    # card and from the code, where it can; a test names the cards that lack what cannot be derived.
    criterion: tuple[str, ...] = ()  # never derived
    tasks: tuple[str, ...] = ()  # the paper's; never derived
    stage: tuple[str, ...] = ()  # derived unless during training
    schedule: tuple[str, ...] = ()  # derived where nothing is trained, or it is after the cut
    allocation: tuple[str, ...] = ()  # derived where it is a setting: the default's
    retraining: tuple[str, ...] = ()
    gradients: tuple[str, ...] = ()
    updates: tuple[str, ...] = ()
    choice: tuple[str, ...] = ()
    learns: tuple[str, ...] = ()
    fusion: tuple[str, ...] = ()
    models: tuple[str, ...] = ()  # beside those of `families`
    transfer: tuple[str, ...] = ()
    start: tuple[str, ...] = ()
    input: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for axis in AXES:
            checked(axis, getattr(self, axis, ()))


class Method(ABC):
    """A published way of making a model smaller.

    Subclasses are final frozen dataclasses. Fields are the hyper-parameters, and the command line.
    """

    card: ClassVar[Card]
    tiny: ClassVar[dict[str, object]] = {}  # settings for a run of about a second

    @abstractmethod
    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Change the model, and say what was done. Neither prints nor touches files."""

    def budget(self) -> Budget | None:
        """The target, for methods that have one."""
        sparsity = getattr(self, "sparsity", None)
        return None if sparsity is None else Budget(float(sparsity))

    def check(self) -> None:
        """Raise SettingError for settings that cannot work, before any data is read."""
        self.budget()
        samples = getattr(self, "samples", 1)
        if isinstance(samples, int):  # a negative number would mean all but so many
            check_count(samples, "calibration samples")

    def training_steps(self) -> int | None:
        """Optimizer steps of a run, for its price: `steps` once and once more a round; None where the run decides.

        A method that trains otherwise says so itself.
        """
        steps, rounds = getattr(self, "steps", None), getattr(self, "rounds", 0)
        if not isinstance(steps, int):
            return None
        return steps * (1 + rounds) if isinstance(rounds, int) else steps

    @property
    def name(self) -> str:
        """The name it is loaded by: that of its file."""
        return type(self).__module__.rpartition(".")[2]


@dataclass(frozen=True)
class Chain(Method):
    """Methods one after another, each on the model the one before it left."""

    methods: tuple[Method, ...]

    card: ClassVar = Card(0, "Chain", venue="secateur", year=2026, axes="chain")

    def check(self) -> None:
        """Check every link, and that there is one."""
        if not self.methods:
            raise SettingError("a chain of methods was asked for", "it has no links", "Give one method at least.")
        for method in self.methods:
            method.check()
        masking = [m for m in self.methods if _masks(m)]
        for place, later in enumerate(masking):
            for earlier in masking[:place]:
                first, then = _target(earlier), _target(later)
                if _chooses_from(earlier) == _chooses_from(later) and then <= first:
                    raise SettingError(
                        f"{later.name} was to mask {then:g} of the weights after {earlier.name}",
                        f"{earlier.name} masks {first:g} of the same weights already, which leaves it nothing to do",
                        f"Ask {later.name} for more than {first:g}, all that is to be gone by then, or leave it out.",
                    )

    def budget(self) -> Budget | None:
        """The links' budgets together, where they can be added up: see `composed`."""
        return composed(self.methods)[0]

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Run each in turn and join what they say."""
        done = Outcome(model)
        for method in self.methods:
            found = method.run(done.model, task)
            done.model = found.model
            done.edits += found.edits
            done.notes += found.notes
            done.stored_bytes = found.stored_bytes
            if found.history is not None:
                done.history = found.history if done.history is None else done.history.then(found.history)
        budget, why = composed(self.methods)
        if budget is None:
            done.notes.append(f"This chain has no target of its own: {why}; each link meets its own.")
        return done

    @property
    def name(self) -> str:
        """`stun+perp`."""
        return "+".join(method.name for method in self.methods)


def composed(methods: Sequence[Method]) -> tuple[Budget | None, str]:
    """What several budgets come to together, and where they do not add up, why.

    What is taken out is taken from what the links before left: 1 - (1 - s1)(1 - s2). A mask counts what is zero by
    then, wherever it came from: of several, the largest. A recovery removes nothing.
    """
    out, masked, units, chosen = 1.0, 0.0, set(), set()
    for method in methods:
        budget = method.budget()
        if budget is None:
            if method.card.when != "recovery":
                return None, f"{method.name} has none"
            continue
        units.add(budget.of)
        if _masks(method):
            chosen.add(repr(_chooses_from(method)[:2]))
            masked = max(masked, budget.sparsity)
        else:
            out *= 1 - budget.sparsity
    if len(units) > 1:
        return None, f"a sparsity of {' and one of '.join(sorted(units))} do not add up to one"
    if len(chosen) > 1:
        return None, "its masks are of different weights"
    return (Budget(1 - out * (1 - masked), units.pop()), "") if units else (None, "no link has one")


def _masks(method: Method) -> bool:
    """Whether a method zeroes single weights or blocks of them, so that its sparsity counts zeros that are there."""
    return method.budget() is not None and set(method.card.granularity) <= {"weight", "block"}


def _target(method: Method) -> float:
    budget = method.budget()
    return 0.0 if budget is None else budget.sparsity


def _chooses_from(method: Method) -> tuple[Any, ...]:
    """Which weights a method chooses from, and in which pattern."""
    return tuple(getattr(method, name, None) for name in ("include", "exclude", "pattern"))


def names() -> list[str]:
    """Every method by name, sorted."""
    import secateur.methods

    return sorted(m.name for m in pkgutil.iter_modules(secateur.methods.__path__) if not m.name.startswith("_"))


def load(name: str) -> type[Method]:
    """The method of a name. Raises SettingError, with the nearest name, when there is none."""
    if name not in names():
        from secateur.described import DESCRIBED

        if name in DESCRIBED:
            raise SettingError(
                f"method {name!r} was asked for",
                f"it is described, not implemented: {DESCRIBED[name].title} ({DESCRIBED[name].year})",
                "`secateur list` names those that run.",
            )
        raise SettingError(f"method {name!r} was asked for", "there is none of that name", did_you_mean(name, names()))
    module = importlib.import_module(f"secateur.methods.{name}")
    found = [
        v
        for v in vars(module).values()
        if isinstance(v, type) and issubclass(v, Method) and v.__module__ == module.__name__
    ]
    assert len(found) == 1, f"methods/{name}.py must hold one method, and holds {len(found)}"
    return found[0]


def prune(
    model: nn.Module,
    method: Method,
    task: Task,
    *,
    inplace: bool = False,
    measure: str | None = None,
    timing: bool = False,
    resume: str | Path | None = None,
    name: str = "",
    command: str = "",
) -> Outcome:
    """Run a method on a model and account for it: the front door.

    The caller's model is left alone unless `inplace`. Of a compiled one, what it compiles is pruned and handed back, to
    be compiled again. `measure` names a split on which quality is taken before and
    after; `timing` times a forward pass of both. `resume` is a folder in which a run that was cut off is taken up
    at the block it had reached. Raises SettingError for bad settings, ModelError for weights that are not finite,
    BudgetError when a target was not met.
    """
    method.check()
    model = uncompiled(model)
    refuse_nan(model)
    start = time.perf_counter()
    check_fits(model, task)
    example = task.example
    before, whole = Size.of(model, example), elements(model)
    about = about_model(model, name)
    measurements = []
    if measure is not None:
        measurements.append(Measurement("before", measure, task.measure(model, measure)))
    shown = [*task.references(), task.show(model, "before")] if isinstance(task, Shows) else []
    budget = method.budget()
    timing = timing or (budget is not None and budget.of == "latency")  # what was asked for is taken again at the end
    dense = model if (timing and not inplace) else copy.deepcopy(model) if timing else None
    work = model if inplace else copy.deepcopy(model)
    identity = f"{about['fingerprint']}/{task.fingerprint()}/{task.seed}/{method.name}/{settings(method)}"
    _forget_gradients_(work)  # a copy has those of the caller's model
    with journal(resume, hashlib.sha256(identity.encode()).hexdigest()):
        outcome = method.run(work, task)
    _forget_gradients_(outcome.model)  # of weights that have moved since
    after = replace(Size.of(outcome.model, example), stored_bytes=outcome.stored_bytes)
    if measure is not None:
        measurements.append(Measurement("after", measure, task.measure(outcome.model, measure)))
    if isinstance(task, Shows):
        outcome.pictures = [*shown, task.show(outcome.model, "after"), *outcome.pictures]
    timings = time_pair(dense, outcome.model, example) if dense is not None else (None, None)
    outcome.ledger = Ledger.of_run(
        (before, after), outcome.edits, whole, outcome.model, budget.of if budget else "weights", timings,
    )  # fmt: skip
    outcome.record = Record(
        schema=SCHEMA_VERSION,
        secateur=about_versions().get("secateur", "0"),
        created=now(),
        command=command,
        method=method.name,
        settings=settings(method),
        model=about,
        task=about_task(task),
        ledger=outcome.ledger,
        sites=site_rows(outcome.edits),
        measurements=measurements,
        edits=dict(Counter(type(e).__name__ for e in outcome.edits)),
        curves=outcome.history.curves if outcome.history else {},
        notes=outcome.notes,
        pictures=outcome.pictures,
        seconds=time.perf_counter() - start,
        peak_memory_bytes=peak_memory(),
        machine=about_machine(),
        versions=about_versions(),
    )
    return outcome


def _forget_gradients_(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None


def settings(method: Method) -> dict[str, Any]:
    """A method's fields as JSON values; parts in the short form the command line takes."""
    from secateur.axes import text_of

    if isinstance(method, Chain):
        return {"methods": [{"method": m.name, **settings(m)} for m in method.methods]}

    def plain(value: Any) -> Any:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, (tuple, list)):
            return [plain(v) for v in value]
        if isinstance(value, Method):
            return {"method": value.name, **settings(value)}
        return text_of(value)

    return {f.name: plain(getattr(method, f.name)) for f in fields(method)}  # type: ignore[arg-type]


def tiny(kind: type[Method], **changes: Any) -> Method:
    """A method with the settings for a run of about a second."""
    return replace(kind(), **{**kind.tiny, **changes})  # type: ignore[type-var]


def refuse_nan(model: nn.Module) -> None:
    """Raise ModelError, naming the tensor, when a weight is not finite, or not there yet."""
    tensors(model)  # which refuses those of lazy modules
    for name, value in model.named_parameters():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise ModelError(
                "a model was to be pruned", f"{name} holds NaN or infinity", "Repair or reload the weights first."
            )


def check_fits(model: nn.Module, task: Task) -> None:
    """Raise TaskError when a task's example does not go through a model."""
    modes = modes_of(model)
    try:
        with torch.no_grad():
            task.example.through(model.eval())
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise TaskError(
            f"{type(model).__name__} was to be run on {task.name}",
            f"its example does not go through the model: {str(error).splitlines()[0]}",
            "Give a task whose examples have the shape this model takes.",
        ) from error
    finally:
        restore_modes_(model, modes)


def check_reached(asked: float, ledger: Ledger, tolerance: float) -> None:
    """Raise BudgetError when the sparsity reached is further from the one asked than a tolerance."""
    if abs(ledger.sparsity - asked) > tolerance:
        raise BudgetError(
            f"a sparsity of {asked:g} was asked for",
            f"{ledger.sparsity:.4g} was reached",
            "See the run's notes for what could not be removed, or ask for another pattern.",
        )


def peak_memory() -> int:
    """The most memory this process has held, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
