"""Whether a network still shows that it was trained on some examples, and how near forgetting comes to retraining.

An attacker sees how sure the network is of an example's true class. Examples it was trained on, and others it was not,
teach the attacker to tell them apart; of what was to be forgotten it should then say "not in training":

    MIA-efficacy = |{x in D_f : the attacker calls x an outsider}| / |D_f|

Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu. "Model Sparsity Can Simplify Machine Unlearning." NeurIPS 2023.
arXiv:2304.04934, section 2 and appendix C; the attack is that of confidences of Song and Mittal 2021.

    Svm         a support vector machine on the confidences: the paper's. Needs scikit-learn
    Threshold   the one confidence that parts the two best
"""

import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.errors import EvidenceError, ModelError, SettingError
from secateur.evidence import calm
from secateur.task import Batch, Forgettable


@runtime_checkable
class Attack(Protocol):
    """Who tells from confidences whether examples were trained on."""

    @property
    def samples(self) -> int:
        """How many examples of each kind it learns from, at most."""
        ...

    def check(self) -> None:
        """Raise SettingError where it could not work, before anything is measured."""
        ...

    def outsiders(self, inside: Tensor, outside: Tensor, asked: Tensor) -> Tensor:
        """Which of the confidences asked about [N] are called "not in training": bool [N].

        `inside` are confidences of examples that were trained on, `outside` of others; as many of each.
        """
        ...


@dataclass(frozen=True)
class Svm:
    """A support vector machine with a radial kernel of width 1: the paper's attacker. Needs scikit-learn."""

    samples: int = 2000  # examples of each kind it learns from, at most
    cost: float = 3.0  # C of the machine

    def check(self) -> None:
        """See Attack."""
        _check_samples(self.samples)
        if not self.cost > 0:
            raise SettingError(f"a cost of {self.cost:g} was asked for", "it is above 0", "Give 3, as the paper does.")
        if importlib.util.find_spec("sklearn") is None:
            raise SettingError(
                "an attack by a support vector machine was asked for",
                "scikit-learn is not installed",
                "pip install 'secateur[studies]', or use attack=threshold.",
            )

    def outsiders(self, inside: Tensor, outside: Tensor, asked: Tensor) -> Tensor:
        """See Attack."""
        from sklearn.svm import SVC

        _check_pair(inside, outside)
        known = torch.cat([inside, outside]).double().unsqueeze(1).numpy()
        member = [1] * len(inside) + [0] * len(outside)
        machine = SVC(C=self.cost, gamma="auto", kernel="rbf").fit(known, member)
        return torch.from_numpy(machine.predict(asked.double().unsqueeze(1).numpy()) == 0)


@dataclass(frozen=True)
class Threshold:
    """An example is an insider if the network is at least so sure: the confidence that parts the two best."""

    samples: int = 2000  # examples of each kind it learns from, at most

    def check(self) -> None:
        """See Attack."""
        _check_samples(self.samples)

    def outsiders(self, inside: Tensor, outside: Tensor, asked: Tensor) -> Tensor:
        """See Attack."""
        return asked < best_threshold(inside, outside)


def best_threshold(inside: Tensor, outside: Tensor) -> float:
    """The least t for which calling "inside" what is t or more is right most often, of as many of each kind.

    One of the confidences that are there; infinity where calling everything an outsider is no worse.
    Raises EvidenceError without confidences of either kind.
    """
    _check_pair(inside, outside)
    candidates = torch.cat([inside, outside]).double().sort().values
    # right at t: insiders that are t or more, and outsiders below t
    inner = len(inside) - torch.searchsorted(inside.double().sort().values, candidates)
    outer = torch.searchsorted(outside.double().sort().values, candidates)
    right = inner * len(outside) + outer * len(inside)  # whole numbers: in fractions equals would differ by rounding
    best = int(right.argmax())
    return float(candidates[best]) if int(right[best]) > len(inside) * len(outside) else float("inf")


def _check_samples(samples: int) -> None:
    if samples < 1:
        raise SettingError(f"an attack on {samples} examples was asked for", "it learns from some", "Give 2000, say.")


def _check_pair(inside: Tensor, outside: Tensor) -> None:
    if not len(inside) or not len(outside):
        raise EvidenceError(
            "an attack was to tell what a network was trained on",
            f"it is shown {len(inside)} such examples and {len(outside)} others",
            "Give it some of each.",
        )


@dataclass(frozen=True, eq=False)
class Seen:
    """What a network makes of some examples."""

    sure: Tensor  # the probability of the true class [N], float64
    right: Tensor  # whether the likeliest class is the true one [N]

    @property
    def accuracy(self) -> float:
        """The fraction it is right about."""
        return float(self.right.double().mean())


def seen(model: nn.Module, batches: Iterable[Batch]) -> Seen:
    """Show a network examples, in eval mode. Raises EvidenceError for none, ModelError for a model without classes."""
    sure, right = [], []
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with calm(model), torch.no_grad():
        for batch in batches:
            there = batch.to(device)
            logits = class_logits(there.through(model))
            # float64: confidences next to 1 differ in digits that float32 does not have
            chances = logits.double().softmax(-1)
            sure.append(chances.gather(1, there.target.unsqueeze(1)).squeeze(1).cpu())
            right.append((logits.argmax(-1) == there.target).cpu())
    if not sure:
        raise EvidenceError("a network was to be shown examples", "there are none", "Give some.")
    return Seen(torch.cat(sure), torch.cat(right))


def class_logits(answer: object) -> Tensor:
    """The logits [batch, classes] in a model's answer. Raises ModelError for an answer of another form."""
    found = answer[0] if isinstance(answer, tuple) else getattr(answer, "logits", answer)
    if not isinstance(found, Tensor) or found.dim() != 2:
        there = f"logits {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ModelError(
            "a network was to say how sure it is of a class",
            f"it answers with {there}",
            "Give one that classifies: one row of logits for each example.",
        )
    return found


def drawn(task: Forgettable, split: str, most: int) -> Iterable[Batch]:
    """Examples of a split, drawn by the task's seed, without augmentation; all of them where there are no more."""
    return task.trained_on(split).batches("calibration", min(most, len(task.splits[split][-1])))


@dataclass(frozen=True)
class Forgotten:
    """How well a network forgot, in the paper's four numbers, each a fraction in [0, 1]."""

    unlearning: float  # UA: 1 - accuracy on what was to be forgotten
    membership: float  # MIA-efficacy: what of it an attacker calls "not in training"
    retain: float  # RA: accuracy on what is retained
    test: float  # TA: accuracy on test data

    @classmethod
    def of(cls, model: nn.Module, task: Forgettable, attack: Attack, most: int = 10_000) -> "Forgotten":
        """Measure a network on a divided task, on up to so many examples of each split, drawn by its seed.

        Raises EvidenceError for a network whose confidences are not numbers: no attack can tell anything from them.
        """
        forget, retain, test = (seen(model, drawn(task, split, most)) for split in ("forget", "retain", "test"))
        if lost := sum(int(found.sure.isnan().sum()) for found in (forget, retain, test)):
            raise EvidenceError(
                "how well a network forgot was to be measured",
                f"how sure it is of {lost:,} examples is not a number",
                "Take a smaller step, by a lower scale or rate; or look for NaN in the weights and the data.",
            )
        pair = min(len(retain.sure), len(test.sure), attack.samples)  # as many of each, or the attack leans to one
        called = attack.outsiders(retain.sure[:pair], test.sure[:pair], forget.sure)
        return cls(1 - forget.accuracy, float(called.double().mean()), retain.accuracy, test.accuracy)

    def gap(self, exact: "Forgotten") -> float:
        """How far from an exact retraining: the mean absolute difference of the four. Smaller is better."""
        return fmean(abs(getattr(self, f.name) - getattr(exact, f.name)) for f in fields(self))

    def describe(self) -> str:
        """`UA 0.540, MIA 0.310, RA 0.990, TA 0.910`."""
        return f"UA {self.unlearning:.3f}, MIA {self.membership:.3f}, RA {self.retain:.3f}, TA {self.test:.3f}"
