"""A network's own answers as a task: what it says to some inputs is what a smaller one should say.

For networks whose data is not at hand, such as a file from somebody else: the inputs are noise of the right shapes, or
those of a file; nobody labelled them. The quality is how far the answers are from the whole network's, |a - b| / |b|.
"""

import copy
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TaskError
from secateur.models.onnx import Network
from secateur.task import Batch, Task, stream
from secateur.tasks.labelled import device_of, evaluating
from secateur.tasks.learners import AdamW, Learner


@dataclass(frozen=True, eq=False)
class Answers:
    """What a network answers, to be answered by what is left of it; mean squared error, relative to its size."""

    whole: nn.Module  # as it was, never changed
    held: Sequence[tuple[Tensor, ...]]  # inputs, an example (or as many as the network's shapes say) each
    seed: int = 0
    samples: int = 64  # examples of each split
    learner: Learner = field(default_factory=AdamW)
    name: str = "answers"
    metric: str = field(default="difference", init=False)
    higher_is_better: bool = field(default=False, init=False)
    clients: Sequence[Task] = ()

    @property
    def example(self) -> Batch:
        """See Task."""
        return Batch(self.held[0])

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """See Task; "val" and "test" are the second half of what there is, the rest the first."""
        half = -(-len(self.held) // 2)
        mine = list(self.held[half:] or self.held) if split in ("val", "test") else list(self.held[:half])
        if split == "train":
            order = torch.randperm(len(mine), generator=stream(self.seed, f"train {epoch}")).tolist()
            mine = [mine[i] for i in order]
        left = sum(_size(x) for x in mine) if n is None else n
        for inputs in mine:
            if left <= 0:
                return
            left -= _size(inputs)
            yield Batch(inputs)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See Task."""
        batch = batch.to(device_of(model))
        with evaluating(self.whole):
            wanted = _all(batch.through(self.whole))
        found = _all(batch.through(model))
        apart = [(a.float() - b.float()).square().mean() for a, b in zip(found, wanted, strict=True)]
        size = sum(float(b.float().square().mean()) for b in wanted)
        return torch.stack(apart).sum() / max(size, 1e-12)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"difference": |a - b| / |b| over all answers, "examples"}."""
        apart = size = 0.0
        count = 0
        with evaluating(model), evaluating(self.whole):
            for batch in self.batches(split):
                batch = batch.to(device_of(model))
                for a, b in zip(_all(batch.through(model)), _all(batch.through(self.whole)), strict=True):
                    apart += float((a.double() - b.double()).square().sum())
                    size += float(b.double().square().sum())
                count += batch.size
        return {"difference": (apart / max(size, 1e-30)) ** 0.5, "examples": float(count)}

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """See Task."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """See Task."""
        found = hashlib.sha256(repr((self.seed, self.samples, self.learner)).encode())
        for inputs in self.held:
            for x in inputs:
                found.update(x.contiguous().numpy().tobytes())
        return found.hexdigest()[:16]


def answers(model: Network, *, seed: int = 0, samples: int = 64, inputs: str = "") -> Answers:
    """The answers of a network to noise, or to the arrays of an .npz file, one for each input by name: [examples, ...].

    Raises TaskError for a file whose arrays are not the network's inputs.
    """
    held = _noise(model, seed, samples) if not inputs else _arrays(model, Path(inputs), samples)
    return Answers(copy.deepcopy(model).eval(), held, seed=seed, samples=samples)


def _noise(model: Network, seed: int, samples: int) -> list[tuple[Tensor, ...]]:
    draw, found, count = stream(seed, "inputs"), [], 0
    while count < 2 * samples:
        found.append(model.example(draw=draw))
        count += _size(found[-1])
    return found


def _arrays(model: Network, file: Path, samples: int) -> list[tuple[Tensor, ...]]:
    asked = f"the inputs in {file} were to be used"
    try:
        with np.load(file, allow_pickle=False) as held:
            values = {name: held[name] for name in held.files}
    except (OSError, ValueError) as error:
        raise TaskError(asked, f"it is no .npz of plain arrays: {error}", "Write it with numpy.savez.") from error
    names = [i.name for i in model.inputs]
    if len(names) == len(values) == 1:
        values = {names[0]: next(iter(values.values()))}
    if missing := [n for n in names if n not in values]:
        raise TaskError(
            asked, f"it holds {', '.join(values)}, and not {missing[0]!r}", f"Name the arrays {', '.join(names)}."
        )
    total = min(len(v) for v in values.values())
    each = next((i.shape[0] for i in model.inputs if i.shape and isinstance(i.shape[0], int)), 1)
    found = []
    for start in range(0, min(total, 2 * samples) - each + 1, each):
        rows = [torch.from_numpy(values[i.name][start : start + each]).to(i.dtype) for i in model.inputs]
        found.append(tuple(rows))
    if not found:
        raise TaskError(asked, f"it holds {total} examples", f"Give {each} at least.")
    return found


def _size(inputs: tuple[Tensor, ...]) -> int:
    return len(inputs[0]) if inputs and inputs[0].dim() else 1


def _all(answer: Any) -> list[Tensor]:
    found = list(answer.values()) if isinstance(answer, dict) else [answer]
    return [v for v in found if v.is_floating_point()]
