"""What a method may ask of the world: batches, a loss, a measurement, an optimizer. Never a file or a name."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TaskError


@dataclass(frozen=True, eq=False)
class Batch:
    """Examples that go through a model together, and what should come out."""

    inputs: tuple[Any, ...] | Mapping[str, Any]  # positional or keyword arguments of the model
    target: Any = None  # labels, or None when the inputs are their own target

    def through(self, model: nn.Module) -> Any:
        """The model's answer to the inputs."""
        return model(**self.inputs) if isinstance(self.inputs, Mapping) else model(*self.inputs)

    @property
    def size(self) -> int:
        """How many examples there are: the length of the first tensor."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        return next((len(v) for v in values if isinstance(v, Tensor) and v.dim() > 0), 1)

    @property
    def tokens(self) -> int:
        """How many token ids the inputs hold; 0 for anything else."""
        values = self.inputs.values() if isinstance(self.inputs, Mapping) else self.inputs
        first = next((v for v in values if isinstance(v, Tensor) and v.dim() > 0), None)
        return 0 if first is None or first.is_floating_point() else first.numel()

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""

        def move(value: Any) -> Any:
            return value.to(device) if isinstance(value, Tensor) else value

        inputs: tuple[Any, ...] | Mapping[str, Any]
        if isinstance(self.inputs, Mapping):
            inputs = {k: move(v) for k, v in self.inputs.items()}
        else:
            inputs = tuple(move(v) for v in self.inputs)
        return replace(self, inputs=inputs, target=move(self.target))


def modes_of(model: nn.Module) -> dict[nn.Module, bool]:
    """Whether each module is in training: part of a model in training may well not be, such as norms held still."""
    return {module: module.training for module in model.modules()}


def restore_modes_(model: nn.Module, modes: Mapping[nn.Module, bool]) -> None:
    """Put every module back into the mode it was in; what came meanwhile takes that of the whole."""
    for module in model.modules():
        module.training = modes.get(module, modes[model])
    for module, training in modes.items():
        module.training = training


def logits_of(answer: Any) -> Tensor:
    """The logits in a model's answer: a tensor, something with `logits`, or a tuple that starts with them."""
    if isinstance(answer, Tensor):
        return answer
    found = answer.get("logits") if isinstance(answer, Mapping) else getattr(answer, "logits", None)
    if found is None and isinstance(answer, tuple):
        found = answer[0]
    if not isinstance(found, Tensor):
        raise TaskError(
            "a model's answer was to be compared with its target",
            f"it is a {type(answer).__name__} without logits",
            "Give a model with a head: for classification, or for language modelling.",
        )
    return found


@runtime_checkable
class Task(Protocol):
    """Data, a loss, and how good a model is; all randomness comes from its seed."""

    @property
    def name(self) -> str:
        """What it is called: "wikitext2"."""
        ...

    @property
    def seed(self) -> int:
        """What all its randomness is drawn from."""
        ...

    @property
    def metric(self) -> str:
        """The key of `measure` that is the quality: "perplexity"."""
        ...

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the metric is better."""
        ...

    @property
    def example(self) -> Batch:
        """One small batch, for tracing and for counting work."""
        ...

    @property
    def clients(self) -> Sequence["Task"]:
        """The owners of the data; empty unless federated."""
        ...

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterable[Batch]:
        """Batches of "calibration", "train", "val" or "test", up to n examples in all.

        The order of "train" is drawn from the seed and the epoch; the others are always in the same order. Raises
        TaskError where there is too little data.
        """
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The scalar to lower."""
        ...

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """Quality, with the settings that change it (window length, examples) beside it."""
        ...

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """The optimizer this task is usually trained with."""
        ...

    def fingerprint(self) -> str:
        """A short hash of the data and settings: equal only when the data is."""
        ...


@runtime_checkable
class Seedless(Protocol):
    """A task that measures the same whatever its seed, so that a comparison over seeds need not measure twice."""

    def measured_on(self) -> str:
        """The fingerprint but for the seed: tasks that share it say the same of one model."""
        ...


@runtime_checkable
class Forgettable(Protocol):
    """A task some of whose training examples can be forgotten: it names them, or can be told which they are."""

    @property
    def splits(self) -> Mapping[str, tuple[Tensor, ...]]:
        """The examples by split, inputs first and labels last; "forget" and "retain" where they are named."""
        ...

    def forgetting(self, *, share: float = 0.1, label: int | None = None) -> Any:
        """The task with "train" divided into "forget" and "retain": a share drawn by the seed, or a whole class."""
        ...

    def trained_on(self, split: str) -> Task:
        """The task whose "train" is another of its splits: shuffled and augmented as training data is."""
        ...


class Around:
    """A task that stands around another: as that one in all that a subclass does not change."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @property
    def name(self) -> str:
        """See Task."""
        return self.task.name

    @property
    def seed(self) -> int:
        """See Task."""
        return self.task.seed

    @property
    def metric(self) -> str:
        """See Task."""
        return self.task.metric

    @property
    def higher_is_better(self) -> bool:
        """See Task."""
        return self.task.higher_is_better

    @property
    def example(self) -> Batch:
        """See Task."""
        return self.task.example

    @property
    def clients(self) -> Sequence[Task]:
        """See Task."""
        return self.task.clients

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterable[Batch]:
        """See Task."""
        return self.task.batches(split, n, epoch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See Task."""
        return self.task.loss(model, batch)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """See Task."""
        return self.task.measure(model, split)

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """See Task."""
        return self.task.optimizer(parameters)

    def fingerprint(self) -> str:
        """See Task."""
        return self.task.fingerprint()

    def __getattr__(self, name: str) -> Any:
        """What only some tasks have, such as pictures to draw."""
        if name == "task" or name.startswith("__"):  # asked for before there is a task: a copy being made
            raise AttributeError(name)
        return getattr(self.task, name)


def stream(seed: int, purpose: str) -> torch.Generator:
    """A random stream for one purpose: the same whatever else was drawn before."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def generator(task: Task, purpose: str) -> torch.Generator:
    """A random stream of the task's own for one purpose."""
    return stream(task.seed, purpose)


def quality(task: Task, found: Mapping[str, float]) -> float:
    """The task's metric among what it measured, turned so that higher is better."""
    return found[task.metric] if task.higher_is_better else -found[task.metric]


def forever(task: Task, epoch: int = 0) -> Iterator[tuple[int, int, Batch]]:
    """Training batches without end, each with its epoch and its place in it, each epoch in an order of its own."""
    while True:
        place = -1
        for place, batch in enumerate(task.batches("train", epoch=epoch)):
            yield epoch, place, batch
        if place < 0:
            raise TaskError(f"{task.name} was to be trained on", "its training split is empty", "Give it data.")
        epoch += 1


class Onward:
    """Training batches one after another, from any place on: a run that was cut off draws what would have come next."""

    def __init__(self, epoch: int, drawn: int = 0) -> None:
        """From an epoch on, after so many of its batches."""
        self.place = (epoch, drawn)
        self._batches: Iterator[tuple[int, int, Batch]] | None = None

    def next(self, task: Task) -> Batch:
        """The next batch of a task, the same at every call. Raises TaskError where there is none."""
        if self._batches is None:
            epoch, drawn = self.place
            self._batches = islice(forever(task, epoch), drawn, None)
        epoch, place, batch = next(self._batches)
        self.place = (epoch, place + 1)
        return batch
