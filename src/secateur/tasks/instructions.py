"""Instructions and their answers: the loss is that of the answer alone, and a preface may stand before every one."""

import gzip
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.task import Batch, Task, generator, logits_of
from secateur.tasks import pack
from secateur.tasks.corpora import Tokenizer
from secateur.tasks.labelled import device_of, digest, evaluating
from secateur.tasks.learners import AdamW, Learner
from secateur.tasks.text import Text

SILENT = -100
"""The label of a token that is not to be predicted."""

SHARES = {"train": 0.8, "calibration": 0.1, "val": 0.05, "test": 0.05}
"""What part of the lines of a file goes to each split, in that order."""

Pair = tuple[list[int], list[int]]
"""The token ids of an instruction and of its answer."""


@dataclass(frozen=True, eq=False)
class Instructions:
    """Answers to instructions; the loss is the negative log-likelihood per token of the answers, in nats.

    `pairs` maps "calibration", "train", "val", "test" to instructions with their answers, as token ids. A preface is
    text that stands before every instruction. An example is preface, instruction and answer, cut to `window` tokens:
    the answer loses its end, then the instruction its start, the preface nothing.
    """

    name: str
    pairs: Mapping[str, Sequence[Pair]]
    tokenizer: Tokenizer = field(repr=False)
    preface: str = ""  # what stands before every instruction
    window: int = 512  # tokens of an example at most
    batch: int = 8  # examples that go through a model together
    examples: int | None = None  # examples measured at most; None for all
    samples: int = 128  # calibration examples, where a method does not say how many
    seed: int = 0
    learner: Learner = field(default_factory=AdamW)
    clients: Sequence[Task] = ()
    metric: str = field(default="perplexity", init=False)
    higher_is_better: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or (self.examples is not None and self.examples < 1):
            raise TaskError(
                f"{self.name} with {self.batch} examples at a time, {self.examples} in all, was asked for",
                "counts start at one",
                "Give batch=8, say.",
            )
        if len(self.before) > self.window - 2:
            raise TaskError(
                f"{len(self.before)} tokens were to stand before every instruction of {self.name}",
                f"an example has {self.window} at most, and needs one to ask and one to answer",
                "Shorten the preface, or widen the window.",
            )
        for split, pairs in self.pairs.items():
            if any(not asked or not answer for asked, answer in pairs):
                raise TaskError(
                    f"instructions of {self.name}'s {split!r} split were given",
                    "one has no instruction or no answer",
                    "Leave it out.",
                )

    @cached_property
    def before(self) -> list[int]:
        """The preface as token ids."""
        return _encode(self.tokenizer, self.preface) if self.preface else []

    def prefaced(self, preface: str) -> "Instructions":
        """The same task with another preface. Raises TaskError for one that leaves no room."""
        return replace(self, preface=preface)

    @property
    def example(self) -> Batch:
        """One example of the first split, for tracing and timing."""
        return self._batch(self._split(next(iter(self.pairs)))[:1])

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of token ids [batch, tokens] and labels of the same shape; TaskError when there are fewer than n."""
        pairs = self._split(split)
        order = torch.arange(len(pairs))
        if split in ("calibration", "train"):
            purpose = f"train {epoch}" if split == "train" else "calibration"
            order = torch.randperm(len(pairs), generator=generator(self, purpose))
        if n is None:
            n = {"calibration": self.samples, "train": len(pairs)}.get(split, self.examples or len(pairs))
            n = min(n, len(pairs))
        elif n > len(pairs):
            raise TaskError(
                f"{n:,} examples of {self.name}'s {split!r} split were asked for",
                f"it holds {len(pairs):,}",
                "Ask for fewer, or give more.",
            )
        chosen = order[:n].tolist()
        for start in range(0, n, self.batch):
            yield self._batch([pairs[i] for i in chosen[start : start + self.batch]])

    def _split(self, split: str) -> Sequence[Pair]:
        if not self.pairs.get(split):
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.pairs)
            )
        return self.pairs[split]

    def laid_out(self, pair: Pair) -> Pair:
        """Preface and instruction, and the answer, as long as together they may be: token ids."""
        asked, answer = pair
        room = self.window - len(self.before)
        asked = asked[-(room - 1) :]  # one token is left to answer with
        return [*self.before, *asked], answer[: room - len(asked)]

    def _batch(self, pairs: Sequence[Pair]) -> Batch:
        """Padded at the end, where no token before it looks: no attention mask is needed."""
        found = [self.laid_out(pair) for pair in pairs]
        longest = max(len(asked) + len(answer) for asked, answer in found)
        ids = torch.zeros(len(found), longest, dtype=torch.int64)
        labels = torch.full((len(found), longest), SILENT)
        for row, (asked, answer) in enumerate(found):
            ids[row, : len(asked) + len(answer)] = torch.tensor([*asked, *answer])
            labels[row, len(asked) : len(asked) + len(answer)] = torch.tensor(answer)
        return Batch((ids,), labels)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of each token of the answers, in float32."""
        batch = batch.to(device_of(model))
        logits = logits_of(batch.through(model))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch.target[:, 1:].flatten(), ignore_index=SILENT)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"perplexity", "nll" in nats, "tokens" of answers, "examples", "before": tokens of the preface}.

        Perplexity is exp of the mean negative log-likelihood over all tokens of all answers. With a preface and without
        it compares only where the window is wide enough that no answer is cut: where "tokens" are as many.
        """
        total, tokens, count = 0.0, 0, 0
        with evaluating(model):
            for batch in self.batches(split):
                here = int((batch.target != SILENT).sum())
                total, tokens, count = total + float(self.loss(model, batch)) * here, tokens + here, count + batch.size
        nll = total / tokens
        return {
            "perplexity": math.inf if nll > 700 else math.exp(nll),
            "nll": nll,
            "tokens": float(tokens),
            "examples": float(count),
            "before": float(len(self.before)),
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
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("pairs", "clients", "tokenizer")}
        held = [f"{split}: {pairs}" for split, pairs in sorted(self.pairs.items())]
        return digest(plain, {}, held)


def gsm8k(tokenizer: Tokenizer, *, seed: int = 0, **settings: Any) -> Instructions:
    """Problems of arithmetic in words, with their solutions (Cobbe et al. 2021, arXiv 2110.14168).

    "test" is the published test set; the rest is divided from the training set. `settings` are fields of
    `Instructions`.
    """
    train, test = (_read(pack.file(f"gsm8k_{split}.jsonl.gz", "gsm8k")) for split in ("train", "test"))
    shares = {"train": 0.85, "calibration": 0.1, "val": 0.05}
    pairs = {split: _encoded(tokenizer, some) for split, some in {**_divide(train, shares), "test": test}.items()}
    return Instructions("gsm8k", pairs, tokenizer, seed=seed, **settings)


def from_file(tokenizer: Tokenizer, *, file: str, seed: int = 0, **settings: Any) -> Instructions:
    """The instructions in a file: a line of JSON each, with "instruction", "output" and perhaps "input".

    "question" and "answer" are taken as well. Lines are cut into train, calibration, val and test in that order.
    `settings` are fields of `Instructions`. Raises TaskError for a file that is none.
    """
    path = Path(file)
    pairs = {split: _encoded(tokenizer, some) for split, some in _divide(_read(path), SHARES).items()}
    return Instructions(path.name.split(".")[0], pairs, tokenizer, seed=seed, **settings)


def continued(task: Text, tokenizer: Tokenizer, asked: int, **settings: Any) -> Instructions:
    """A text to be gone on with: of each window of a task the first tokens are the instruction, the rest the answer.

    For text without instructions. `settings` are fields of `Instructions`. Raises TaskError where nothing is left to
    answer.
    """
    if not 0 < asked < task.window:
        raise TaskError(
            f"{asked} tokens of each window of {task.name} were to be the instruction",
            f"a window has {task.window}",
            f"Give 1 to {task.window - 1}.",
        )
    pairs = {}
    for split, ids in task.ids.items():
        rows = ids[: len(ids) // task.window * task.window].reshape(-1, task.window).tolist()
        pairs[split] = [(row[:asked], row[asked:]) for row in rows]
    usual = {"batch": task.batch, "examples": task.windows, "samples": task.samples, "learner": task.learner}
    usual |= {"window": task.window, "seed": task.seed}
    return Instructions(f"{task.name}, continued", pairs, tokenizer, **{**usual, **settings})


def _read(path: Path) -> list[tuple[str, str]]:
    """What the lines of a file ask, laid out, and answer."""
    asked = f"instructions in {str(path)!r} were asked for"
    do = 'Give lines such as {"instruction": "...", "input": "...", "output": "..."}.'
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
        found = [(_asked(row), _said(row, "output", "answer")) for row in rows]
    except OSError as reason:
        raise TaskError(asked, f"it cannot be read ({reason.strerror or reason})", "Check the path.") from None
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as reason:
        raise TaskError(asked, f"a line of it is no instruction with an answer ({reason})", do) from None
    if len(found) < 2 * len(SHARES):
        raise TaskError(asked, f"it holds {len(found)}", f"Give {2 * len(SHARES)} at least.")
    return found


def _asked(row: Mapping[str, Any]) -> str:
    """An instruction, with its input where it has one, up to where the answer begins."""
    asked = _said(row, "instruction", "question").strip()
    given = str(row.get("input") or "").strip()
    return f"\nInstruction: {asked}\n" + (f"Input: {given}\n" if given else "") + "Answer: "


def _said(row: Mapping[str, Any], name: str, other: str) -> str:
    """What goes by one of two names. Raises KeyError where neither is there, TypeError for null."""
    value = row[name if name in row else other]
    if value is None:
        raise TypeError(f"{name if name in row else other} is null")
    return str(value)


def _divide(rows: Sequence[tuple[str, str]], shares: Mapping[str, float]) -> dict[str, Sequence[tuple[str, str]]]:
    """Rows in order, of each split at least one."""
    found, start, edge = {}, 0, 0.0
    for place, (split, share) in enumerate(shares.items()):
        edge += share
        end = min(max(round(edge * len(rows)), start + 1), len(rows) - (len(shares) - place - 1))
        found[split] = rows[start:end]
        start = end
    return found


def _encoded(tokenizer: Tokenizer, rows: Sequence[tuple[str, str]]) -> list[Pair]:
    pairs = [(_encode(tokenizer, asked), _encode(tokenizer, answer)) for asked, answer in rows]
    return [(asked, answer) for asked, answer in pairs if asked and answer]


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    found = tokenizer.encode(text)
    return list(getattr(found, "ids", found))
