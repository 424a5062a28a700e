"""What is looked at when a model is measured: quality, questions, single examples, bytes, work and time."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from secateur.errors import TaskError
from secateur.outcome import Damage, Measurement
from secateur.task import Task
from secateur.tasks.damage import Answer, answers, damage
from secateur.tasks.zero_shot import check, questions, zero_shot

ZERO_SHOT = "zero-shot"
"""The split that measurements of questions stand under in a record."""


@dataclass(frozen=True, eq=False)
class Seen:
    """What was found of one model."""

    values: dict[str, float]  # of the task
    questions: dict[str, dict[str, float]]  # zero-shot task -> its values
    answers: list[Answer]  # to the examples that damage is found in

    def measurements(self, when: str, split: str) -> list[Measurement]:
        """As a record keeps them."""
        kept = [Measurement(when, split, self.values)]
        for name, values in self.questions.items():
            kept.append(Measurement(when, ZERO_SHOT, {f"{name} {key}": value for key, value in values.items()}))
        return kept


@dataclass(frozen=True)
class Look:
    """What is to be looked at."""

    split: str
    zero_shot: tuple[str, ...] = ()
    limit: int | None = None  # questions of each zero-shot task
    examples: int = 64  # in which damage is looked for; 0 for none

    def check(self, tokenizer: Any) -> None:
        """Raise TaskError or ModelError for questions that cannot be asked, before anything is run."""
        check(self.zero_shot, tokenizer)

    def mark(self) -> str:
        """A short hash that is equal only when the same is looked at: questions by what they say."""
        asked = {name: questions(name)[: self.limit] for name in self.zero_shot}
        whole = json.dumps([self.split, asked, self.examples], sort_keys=True)
        return hashlib.sha256(whole.encode()).hexdigest()[:16]

    def at(self, model: nn.Module, task: Task, tokenizer: Any) -> Seen:
        """Look at a model."""
        values = task.measure(model, self.split)
        asked = zero_shot(model, tokenizer, self.zero_shot, self.limit) if self.zero_shot else {}
        return Seen(values, asked, self._answers(model, task))

    def _answers(self, model: nn.Module, task: Task) -> list[Answer]:
        if not self.examples:
            return []
        try:
            return answers(model, task, self.split, self.examples)
        except TaskError:
            return []  # a detector, an image made: there is a metric, and no top answer that could flip


def damage_between(before: Seen, after: Seen, split: str, tokenizer: Any) -> Damage | None:
    """What happened between two models; None where no single answers were looked at."""
    if not before.answers or not after.answers:
        return None
    return damage(before.answers, after.answers, split, getattr(tokenizer, "decode", None))


def look_from(split: str, zero_shot: str | None, limit: int | None, damage: int) -> Look:
    """What the options ask for."""
    named = tuple(name.strip() for name in (zero_shot or "").split(",") if name.strip())
    return Look(split, tuple(dict.fromkeys(named)), limit, damage)


def bytes_on_disk(source: str) -> int | None:
    """The bytes of the weights in a folder or a file; None for what is not on disk."""
    place = Path(source.rpartition("::")[2] or source)
    if place.is_dir():
        found = [p.stat().st_size for p in place.iterdir() if p.suffix in (".safetensors", ".gguf")
                 and p.name != "edits.safetensors"]  # fmt: skip
        return sum(found) or None
    return place.stat().st_size if place.is_file() and place.suffix in (".safetensors", ".gguf") else None


def told_zero_shot(values: dict[str, dict[str, float]]) -> Sequence[tuple[str, str, str, str, str]]:
    """Rows of a table: task, accuracy, per byte, guessing, questions."""
    from secateur.report import figures

    def share(found: dict[str, float], key: str) -> str:
        if key not in found:
            return ""
        error = found.get(f"{key}_stderr")
        spread = "" if error is None or error != error else f" ± {100 * error:.1f}"
        return f"{100 * found[key]:.1f}%{spread}"

    return [
        (name, share(v, "acc"), share(v, "acc_norm"), f"{100 * v['chance']:.1f}%", figures.count(v["questions"]))
        for name, v in values.items()
    ]
