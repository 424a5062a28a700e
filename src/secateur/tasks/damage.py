"""Which examples a cut made worse, and where the answers changed: what a mean over all of them hides.

Two models of equal perplexity may disagree on a tenth of their answers; which texts pay is worth knowing before a
model is shipped. Counting answers that flip, beside a quality that hardly moves, is after Dutta, Krishnan, Kwatra,
Ramjee. "Accuracy is Not All You Need." 2024. arXiv:2407.09141, section 3.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import TaskError
from secateur.outcome import Damage, Harm
from secateur.task import Batch, Task, logits_of
from secateur.tasks.labelled import device_of, evaluating

SHOWN = 10  # of the examples that lost most
CONTEXT = 24  # tokens shown before the prediction that suffered most
ROWS = 512  # positions turned to float32 at once: a window of 2048 over 49,152 words would take 400 MB


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model says of one example, prediction by prediction."""

    inputs: Tensor  # token ids [predictions + 1], or the example itself
    wanted: Tensor  # the right answers [predictions]
    losses: Tensor  # in nats [predictions]
    said: Tensor  # the top answers [predictions]

    @property
    def loss(self) -> float:
        """The mean over the predictions; infinite when it is not a number."""
        mean = float(self.losses.double().mean())
        return math.inf if math.isnan(mean) else mean

    @property
    def right(self) -> Tensor:
        """Where the top answer is the right one [predictions]."""
        return self.said == self.wanted


def answers(model: nn.Module, task: Task, split: str = "val", most: int = 64) -> list[Answer]:
    """What a model says of the first examples of a split, at most so many.

    Without targets, token ids predict the next one, as language models do; with targets, the logits [batch, ...,
    classes] stand before targets [batch, ...]. Raises TaskError for a task whose answers are of another kind.
    """
    found: list[Answer] = []
    with evaluating(model):
        for batch in task.batches(split):
            found += _of_batch(task, batch, logits_of(batch.to(device_of(model)).through(model)))
            if len(found) >= most:
                break
    return found[:most]


def _of_batch(task: Task, batch: Batch, logits: Tensor) -> list[Answer]:
    values = batch.inputs if isinstance(batch.inputs, tuple) else tuple(batch.inputs.values())
    inputs, wanted = values[0], batch.target
    if wanted is None and batch.tokens:
        logits, wanted = logits[:, :-1], inputs[:, 1:]
    if not isinstance(wanted, Tensor) or wanted.is_floating_point() or logits.shape[:-1] != wanted.shape:
        raise TaskError(
            f"the damage on {task.name} was asked for",
            "its answers are not one out of several at each place",
            "Look at its metric alone (--damage 0), or give a task of texts or of classes.",
        )
    found = []
    for example, right, scores in zip(inputs.cpu(), wanted.cpu(), logits, strict=True):
        target, rows = right.reshape(-1), scores.reshape(-1, scores.shape[-1])
        losses, said = [], []
        for place in range(0, len(target), ROWS):
            some = rows[place : place + ROWS].float()
            losses.append(F.cross_entropy(some, target[place : place + ROWS].to(some.device), reduction="none").cpu())
            said.append(some.argmax(-1).cpu())
        found.append(Answer(example, target, torch.cat(losses), torch.cat(said)))
    return found


def damage(
    before: Sequence[Answer], after: Sequence[Answer], split: str, decode: Callable[[list[int]], str] | None = None
) -> Damage:
    """What happened between the answers of two models to the same examples; `decode` turns token ids into text.

    Raises TaskError when they are not the same, or there are none.
    """
    same = len(before) == len(after) and all(
        torch.equal(a.wanted, b.wanted) for a, b in zip(before, after, strict=True)
    )
    if not before or not same:
        raise TaskError(
            f"the answers to {len(before)} examples of {split!r} were to be compared with {len(after)}",
            "there are none" if not before else "they are answers to other examples",
            "Give both models the same examples.",
        )
    pairs = list(zip(before, after, strict=True))
    count = sum(len(b.wanted) for b in before)
    differences = [_difference(b, a) for b, a in pairs]
    order = sorted(range(len(pairs)), key=lambda i: -differences[i])
    text = bool(before[0].inputs.dim() == 1 and len(before[0].inputs) == len(before[0].wanted) + 1)
    sizes = {len(b.inputs) for b in before}
    what = (f"windows of {sizes.pop()} tokens" if len(sizes) == 1 else "texts") if text else "examples"
    return Damage(
        split=split,
        examples=len(pairs),
        what=what,
        predictions=count,
        flips=sum(int((b.said != a.said).sum()) for b, a in pairs) / count,
        lost=sum(int((b.right & ~a.right).sum()) for b, a in pairs) / count,
        gained=sum(int((~b.right & a.right).sum()) for b, a in pairs) / count,
        differences=differences,
        worst=[_harm(i, *pairs[i], decode if text else None, text) for i in order[:SHOWN] if differences[i] > 0],
    )


def _difference(before: Answer, after: Answer) -> float:
    if not math.isfinite(after.loss):
        return math.inf
    return after.loss - before.loss


def _harm(number: int, before: Answer, after: Answer, decode: Callable[[list[int]], str] | None, text: bool) -> Harm:
    rise = (after.losses.double() - before.losses.double()).nan_to_num(nan=math.inf, posinf=math.inf)
    place = int(rise.argmax())

    def shown(ids: Sequence[int]) -> str:
        return decode(list(ids)) if decode is not None else " ".join(map(str, ids))

    context = shown(before.inputs[max(0, place + 1 - CONTEXT) : place + 1].tolist()) if text else f"example {number}"
    return Harm(
        example=number,
        before=before.loss,
        after=after.loss,
        flips=float((before.said != after.said).double().mean()),
        context=context,
        wanted=shown([int(before.wanted[place])]),
        said_before=shown([int(before.said[place])]),
        said_after=shown([int(after.said[place])]),
    )
