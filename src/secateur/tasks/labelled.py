"""Examples with a class each, held in memory: vectors, images, sequences."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.task import Batch, Task, generator, logits_of, modes_of, restore_modes_
from secateur.tasks.learners import Learner, Sgd


@dataclass(frozen=True, eq=False)
class Labelled:
    """Classification of examples held in memory; the loss is cross-entropy.

    `splits` maps "train", "val", "test" and any other name (such as "forget") to tensors: the model's positional
    inputs, each [N, ...], and last the labels [N]. "calibration" is drawn from "train" by the seed, unless there is
    a split of that name.
    """

    name: str
    splits: Mapping[str, tuple[Tensor, ...]]
    seed: int = 0
    batch: int = 128  # examples that go through a model together
    samples: int = 512  # calibration examples, where a method does not say how many
    learner: Learner = field(default_factory=Sgd)
    clients: Sequence[Task] = ()
    metric: str = field(default="accuracy", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise TaskError(f"{self.name} with batches of {self.batch} was asked for", "one is the least", "Give 1.")
        for split, (*inputs, labels) in self.splits.items():
            lengths = sorted({len(tensor) for tensor in inputs})
            if lengths != [len(labels)]:
                raise TaskError(
                    f"split {split!r} of {self.name} was given {' or '.join(map(str, lengths)) or 'no'} examples",
                    f"there are {len(labels)} labels",
                    "Give one label per example.",
                )

    @property
    def example(self) -> Batch:
        """Two examples of the first split, for tracing."""
        return self._batch(next(iter(self.splits.values())), torch.arange(2), None)

    @property
    def classes(self) -> int:
        """How many classes there are."""
        return max(int(held[-1].max()) for held in self.splits.values() if len(held[-1])) + 1

    def prepare(self, inputs: tuple[Tensor, ...], noise: torch.Generator | None) -> tuple[Tensor, ...]:
        """What the model is given for stored inputs; `noise` drives augmentation, and is None outside training."""
        return inputs

    def _batch(self, held: tuple[Tensor, ...], place: Tensor, noise: torch.Generator | None) -> Batch:
        *inputs, labels = (tensor[place] for tensor in held)
        return Batch(self.prepare(tuple(inputs), noise), labels.long())

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of a split, up to n examples; raises TaskError when there are fewer."""
        held = self._split("train" if split == "calibration" and split not in self.splits else split)
        labels = held[-1]
        if split == "calibration":
            n = min(self.samples, len(labels)) if n is None else n
        if n is not None and n > len(labels):
            raise TaskError(
                f"{n:,} examples of {self.name}'s {split!r} split were asked for",
                f"it holds {len(labels):,}",
                "Ask for fewer, or give more data.",
            )
        order, noise = torch.arange(len(labels)), None
        if split == "train":
            noise = generator(self, f"train {epoch}")
            order = torch.randperm(len(labels), generator=noise)
        elif split == "calibration":
            order = torch.randperm(len(labels), generator=generator(self, "calibration"))
        for place in pieces(order[:n], self.batch):
            yield self._batch(held, place, noise)

    def _split(self, split: str) -> tuple[Tensor, ...]:
        if split not in self.splits:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.splits)
            )
        if len(self.splits[split][-1]) == 0:
            raise TaskError(f"split {split!r} of {self.name} was asked for", "it is empty", "Give it examples.")
        return self.splits[split]

    def trained_on(self, split: str) -> "Labelled":
        """The task whose "train" is another of its splits, and "calibration" is drawn from that. Raises TaskError."""
        held = {name: tensors for name, tensors in self.splits.items() if name != "calibration"}
        return replace(self, splits={**held, "train": self._split(split)})

    def forgetting(self, *, share: float = 0.1, label: int | None = None) -> "Labelled":
        """See secateur.tasks.forgetting."""
        from secateur.tasks.divided import forgetting

        return forgetting(self, share=share, label=label)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy in float32."""
        batch = batch.to(device_of(model))
        return F.cross_entropy(logits_of(batch.through(model)).float(), batch.target)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"accuracy" in [0, 1], "loss" in nats, "examples"}; training splits are measured without augmentation."""
        held = self._split(split)
        right, total, device, count = 0, 0.0, device_of(model), len(held[-1])
        with evaluating(model):
            for place in pieces(torch.arange(count), self.batch):
                batch = self._batch(held, place, None).to(device)
                logits = logits_of(batch.through(model)).float()
                right += int((logits.argmax(-1) == batch.target).sum())
                total += float(F.cross_entropy(logits, batch.target, reduction="sum"))
        return {"accuracy": right / count, "loss": total / count, "examples": float(count)}

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the examples, the labels and the settings."""
        return self._fingerprint

    def measured_on(self) -> str:
        """The fingerprint but for the seed, which moves calibration and training only."""
        return replace(self, seed=0).fingerprint()

    @cached_property
    def _fingerprint(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("splits", "clients")}
        held = {f"{split} {i}": t for split, tensors in sorted(self.splits.items()) for i, t in enumerate(tensors)}
        return digest(plain, held, [c.fingerprint() for c in self.clients])


def pieces(values: Tensor, size: int) -> list[Tensor]:
    """A tensor cut along its first axis into pieces of a size, the last one perhaps shorter."""
    return [values[i : i + size] for i in range(0, len(values), size)]


def digest(settings: Mapping[str, Any], tensors: Mapping[str, Tensor], more: Sequence[str] = ()) -> str:
    """Sixteen hexadecimal digits for settings that print the same everywhere, and tensors."""
    found = hashlib.sha256(repr(sorted((k, repr(v)) for k, v in settings.items())).encode())
    for name, value in tensors.items():
        found.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    for text in more:
        found.update(text.encode())
    return found.hexdigest()[:16]


def device_of(model: nn.Module) -> torch.device:
    """Where a model's first tensor is."""
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back after."""
    modes = modes_of(model)
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        restore_modes_(model, modes)
