"""Next-token prediction over token ids, and the texts it is usually measured on."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.task import Batch, Task, generator, logits_of
from secateur.tasks.labelled import device_of, digest, evaluating, pieces
from secateur.tasks.learners import AdamW, Learner

EXAMPLE = 128  # tokens of the example: enough to time, and quick on one core with a model of 135 M parameters
ROWS = 512  # positions turned to float32 at once: a window of 2048 over 49,152 words would take 400 MB


@dataclass(frozen=True, eq=False)
class Text:
    """Next-token prediction; the loss is the negative log-likelihood per predicted token, in nats.

    `ids` maps "calibration", "train", "val", "test" to disjoint streams of token ids [tokens], int64. An example is
    a window of `window` tokens; windows never overlap. Those of "val" and "test" are always the same, from the
    start of the stream; those of "calibration" are drawn by the seed; "train" is cut and shuffled by seed and epoch.
    """

    name: str
    ids: Mapping[str, Tensor]
    window: int = 2048  # tokens per example: perplexity falls as it grows
    batch: int = 1  # windows that go through a model together
    windows: int | None = None  # windows measured at most; None for all
    samples: int = 128  # calibration windows, where a method does not say how many
    seed: int = 0
    learner: Learner = field(default_factory=AdamW)
    clients: Sequence[Task] = ()
    metric: str = field(default="perplexity", init=False)
    higher_is_better: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.window < 2 or self.batch < 1 or (self.windows is not None and self.windows < 1):
            raise TaskError(
                f"{self.name} in windows of {self.window}, {self.batch} at a time, was asked for",
                "a window predicts from two tokens on, and counts start at one",
                "Give window 2 or more, batch and windows 1 or more.",
            )

    @property
    def example(self) -> Batch:
        """The first 128 tokens of the first split, or a window if that is shorter: for tracing and timing."""
        split = next(iter(self.ids))
        return Batch((self._stream(split)[: min(self.window, EXAMPLE)].unsqueeze(0),))

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of token ids [batch, window]; raises TaskError when there are fewer than n windows."""
        stream = self._stream(split)
        spare = len(stream) % self.window
        count = len(stream) // self.window
        order = torch.arange(count)
        start = 0
        if split in ("calibration", "train"):
            stir = generator(self, f"train {epoch}" if split == "train" else "calibration")
            start = int(torch.randint(spare + 1, (), generator=stir))
            order = torch.randperm(count, generator=stir)
        if n is None:
            n = {"calibration": self.samples, "train": count}.get(split, self.windows or count)
            n = min(n, count)
        elif n > count:
            raise TaskError(
                f"{n:,} windows of {self.window:,} tokens of {self.name}'s {split!r} split were asked for",
                f"it holds {len(stream):,} tokens, which make {count:,}",
                "Ask for fewer windows or shorter ones, or give more text.",
            )
        rows = stream[start : start + count * self.window].reshape(count, self.window)
        for place in pieces(order[:n], self.batch):
            yield Batch((rows[place],))

    def _stream(self, split: str) -> Tensor:
        if split not in self.ids:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.ids)
            )
        stream = self.ids[split]
        if len(stream) < self.window:
            raise TaskError(
                f"windows of {self.window:,} tokens of {self.name}'s {split!r} split were asked for",
                f"it holds {len(stream):,} tokens",
                "Ask for a shorter window, or give more text.",
            )
        return stream

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of each next token, in float32."""
        batch = batch.to(device_of(model))
        ids = batch.inputs[0] if isinstance(batch.inputs, tuple) else batch.inputs["input_ids"]
        logits = logits_of(batch.through(model))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"perplexity", "nll" in nats, "tokens" predicted, "window", "windows"}.

        Perplexity is exp of the mean negative log-likelihood over all predicted tokens of all windows; a window's
        first token is not predicted.
        """
        stream = self._stream(split)
        count = len(stream) // self.window
        count = min(count, self.windows or count)
        total, device = 0.0, device_of(model)
        with evaluating(model):
            for rows in pieces(stream[: count * self.window].reshape(count, self.window), self.batch):
                ids = rows.to(device)
                logits = logits_of(model(ids))[:, :-1].flatten(0, 1)
                wanted = ids[:, 1:].flatten()
                for place in range(0, len(wanted), ROWS):
                    some = slice(place, place + ROWS)
                    total += float(F.cross_entropy(logits[some].float(), wanted[some], reduction="sum"))
        tokens = count * (self.window - 1)
        nll = total / tokens
        return {
            "perplexity": math.inf if nll > 700 else math.exp(nll),
            "nll": nll,
            "tokens": float(tokens),
            "window": float(self.window),
            "windows": float(count),
        }

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the token ids and the settings."""
        return self._fingerprint

    def measured_on(self) -> str:
        """The fingerprint but for the seed, which moves calibration and training only."""
        return replace(self, seed=0).fingerprint()

    @cached_property
    def _fingerprint(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("ids", "clients")}
        return digest(plain, dict(sorted(self.ids.items())), [c.fingerprint() for c in self.clients])
