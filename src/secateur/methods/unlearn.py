"""Prune first, then unlearn: a sparse network forgets training examples nearly as retraining without them would.

Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu. "Model Sparsity Can Simplify Machine Unlearning." NeurIPS 2023.
arXiv:2304.04934. With a mask m and the weights w0 that training left, approximate unlearning moves m * w alone,

    w = m * (w0 + change),

and its distance from retraining is bounded by a term in which m shrinks both the curvature and |m * (w - w0)|
(section 3). How the change is found is an `Unlearner`; what is measured is how far from exact retraining it ends.

    Chain((GlobalMagnitude(sparsity=0.95), Unlearn(by=FineTune())))          one cut, trained on, then forgetting
    Chain((StableLottery(rounds=1, fraction=0.95, ...), Unlearn(...)))       the paper's cut, with rewinding
    Chain((Lottery(rounds=14), Unlearn(...)))  Chain((Synflow(0.95), ...))   other masks
    Unlearn(by=SparseFineTune())                                             pruning and forgetting at once

A backdoor is cleansed alike: tasks.poisoned(task) is a task whose poisoned images are what to forget.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.membership import Attack, Forgotten, Svm
from secateur.axes.recovery import kept_weights, known_beside
from secateur.axes.unlearners import FineTune, Request, Unlearner, near_zero
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import SettingError, TaskError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import tensors, unwrapped
from secateur.task import Forgettable, Task


@runtime_checkable
class Wanted(Protocol):
    """What is to be forgotten."""

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        ...

    def divide(self, task: Forgettable) -> Forgettable:
        """The task with "forget" and "retain" beside "train". Raises TaskError where either would be empty."""
        ...


@dataclass(frozen=True)
class Share:
    """A share of the training examples, drawn by the task's seed."""

    fraction: float = 0.1

    def check(self) -> None:
        """See Wanted."""
        if not 0 < self.fraction < 1:
            raise SettingError(
                f"a share of {self.fraction:g} was to be forgotten", "it is a fraction, in (0, 1)", "Give 0.1, say."
            )

    def divide(self, task: Forgettable) -> Forgettable:
        """See Wanted."""
        return cast(Forgettable, task.forgetting(share=self.fraction))


@dataclass(frozen=True)
class Label:
    """Every training example of one class, which test data then is not asked about either."""

    index: int = 0  # of the class

    def check(self) -> None:
        """See Wanted."""
        if self.index < 0:
            raise SettingError(f"class {self.index} was to be forgotten", "classes are counted from 0", "Give 0, say.")

    def divide(self, task: Forgettable) -> Forgettable:
        """See Wanted."""
        return cast(Forgettable, task.forgetting(label=self.index))


@dataclass(frozen=True, kw_only=True)
class Unlearn(Method):
    """Make a trained network forget examples, every weight that is zero staying zero."""

    by: Unlearner = FineTune()  # how: from-scratch, fine-tune, ascend, influence, fisher-noise, sparse-fine-tune, ...
    forget: Wanted = Share()  # what, where the task does not say itself: a share of the examples, or a class
    attack: Attack = Svm()  # who tells from confidences what was trained on
    examples: int = 10_000  # of each split that are measured, at most, before and after

    card: ClassVar = Card(
        50,
        "Model Sparsity Can Simplify Machine Unlearning",
        arxiv="2304.04934",
        venue="NeurIPS",
        year=2023,
        when="recovery",
        needs=("labels", "training"),
        families=("mlp", "cnn", "encoder", "vision transformer", "rnn"),
        axes="unlearner attack rule",
        criterion=("none",),
        tasks=("unlearning",),
        schedule=("one-shot",),
        allocation=("none",),
        reports="on CIFAR-10 with ResNet-18, fine-tuning unlearns 22.5 % of a class when dense and 73.6 % at 95 % "
        "sparsity, influence unlearning 87.8 and 99.5 %; the L1 penalty brings 77 points without a mask",
        checked="tests/methods/test_unlearn.py::test_influence_finds_where_the_minimum_is_without_the_examples",
        differs=(
            "steps instead of epochs, and the L1 penalty falls at every step, not every epoch",
            "the one-pass recursion for H^-1 v never leaves the span of v and the first gradient, and is the default; "
            "inverse=woodbury is the exact product with the same gradients",
            "the Hessian is taken on retained examples drawn by the seed, where the authors' code takes the first ones",
            "Fisher information is of single examples, not of the mean over a batch; the authors' special case for "
            "4,500 examples of CIFAR-10, which clears a row of the classifier, is left out",
            "gradient ascent stops where accuracy on retained examples has halved; floor=0 lets it go on",
            "the attacker learns from up to 2,000 examples of each kind, drawn by the seed; of the attacks only the "
            "one on confidences is there, whose figures are published",
            "masks found with the forgotten examples at hand are kept for retraining, as in the paper: to choose them "
            'anew, prune on task.trained_on("retain")',
        ),
    )
    tiny: ClassVar = {"by": FineTune(steps=6), "examples": 64}

    def budget(self) -> Budget | None:
        """That of an unlearner that cuts; the others remove nothing."""
        sparsity = getattr(self.by, "sparsity", None)
        return None if sparsity is None else Budget(float(sparsity))

    def training_steps(self) -> int:
        """Those of the unlearner."""
        return self.by.steps

    def check(self) -> None:
        """Raise SettingError for settings that cannot work, and for an attack that needs what is not installed."""
        self.by.check()
        self.forget.check()
        self.attack.check()
        if self.examples < 1:
            raise SettingError(f"{self.examples} examples were to be measured", "one is the least", "Give 10000, say.")

    @property
    def needs_dense(self) -> bool:
        """See Recovery."""
        return False

    def fits_masks(self) -> None:
        """See Recovery: masks of any kind are kept."""

    def ready(self, model: nn.Module, task: Task) -> None:
        """See Recovery. Raises TaskError for examples that cannot be told apart or divided, and without test data."""
        divided(task, self.forget).trained_on("test")  # a split that is not there, or empty, is refused

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises TaskError for a task that cannot be divided into what to forget and what to retain."""
        self.check()
        _, masks = known_beside()
        return self.recover(model, task, masks, None)

    def recover(self, model: nn.Module, task: Task, masks: Sequence[Mask], dense: nn.Module | None) -> Outcome:
        """See Recovery: divide the data, forget with the zeros held, and measure before and after."""
        request = Request(divided(task, self.forget), kept_weights(unwrapped(model), masks))
        start = {name: value.detach().clone() for name, value in tensors(model).items()}
        before = Forgotten.of(model, request.task, self.attack, self.examples)
        cut, history = self.by.unlearn(model, request)
        edits: list[Edit] = [*changed(model, start), *apply_(model, cut)]
        after = Forgotten.of(model, request.task, self.attack, self.examples)
        near, none = near_zero(model)
        notes = [
            f"{request.count('forget'):,} examples were to be forgotten and {request.count('retain'):,} retained",
            f"before: {before.describe()}; after: {after.describe()} (UA: error on what was to be forgotten; MIA: what "
            "of it an attack calls untrained; RA, TA: accuracy on what is retained, and on test data)",
            f"the weights moved by {moved(model, start):.4g}; {none:,} of matrices and kernels are zero, and {near:,} "
            "below a thousandth of their tensor's largest",
        ]
        return Outcome(model, edits, history if history.losses else None, notes=notes + history.notes)


def divided(task: Task, wanted: Wanted) -> Forgettable:
    """A task with "forget" and "retain": its own where it has them, or as wanted. Raises TaskError."""
    if not isinstance(task, Forgettable):
        raise TaskError(
            f"examples of {task.name} were to be forgotten",
            "its training data has no examples with labels that could be told apart",
            "Give a task of classification, such as cifar10 or fashion-mnist.",
        )
    if "forget" not in task.splits or "retain" not in task.splits:
        return wanted.divide(task)
    check_divided(task.name, task.splits)
    return task


def check_divided(name: str, splits: Mapping[str, tuple[Tensor, ...]]) -> None:
    """Raise TaskError for nothing to forget or to retain, and for examples that are in both or were not trained on."""
    forget, retain = (_rows(splits[split]) for split in ("forget", "retain"))
    for split, rows in (("forget", forget), ("retain", retain)):
        if not rows:
            raise TaskError(f"{name} was to be divided", f"its split {split!r} is empty", "Give it examples.")
    asked = f"{name} was to be divided into what to forget and what to retain"
    # Compared with the training data, in which an example may be there twice; without that, once is all there can be.
    trained = _rows(splits["train"]) if "train" in splits else Counter(set(forget) | set(retain))
    both = (forget + retain) - trained
    if any(row in retain for row in both if row in forget):
        raise TaskError(
            asked,
            f"{sum(both.values()):,} examples are in both, or more often than in its training data",
            "Take what is to be forgotten out of what is retained: tasks.forgetting divides a task.",
        )
    if both:
        raise TaskError(
            asked, f"{sum(both.values()):,} examples are not in its training data", "Give examples that are in it."
        )


def _rows(held: tuple[Tensor, ...]) -> Counter[bytes]:
    """How often each example is there, by its bytes, inputs and label together."""
    if not len(held[-1]):
        return Counter()
    # as bytes: numpy does not know bfloat16
    flat = [tensor.reshape(len(tensor), -1).contiguous().cpu().view(torch.uint8).numpy() for tensor in held]
    return Counter(b"".join(row.tobytes() for row in rows) for rows in zip(*flat, strict=True))


def changed(model: nn.Module, start: Mapping[str, Tensor]) -> list[Update]:
    """An update for every tensor that is not what it was."""
    return [
        Update(name, value.detach().clone())
        for name, value in tensors(model).items()
        if not torch.equal(value, start[name])
    ]


def moved(model: nn.Module, start: Mapping[str, Tensor]) -> float:
    """|m * (w - w0)| over all parameters; what is masked was zero, and is."""
    named = unwrapped(model).named_parameters()
    squares = [(p.detach() - start[name].to(p)).double().square().sum() for name, p in named]
    return float(torch.stack(squares).sum().sqrt())
