"""Retrain next to nothing: biases, norms and small adapters bring back most of what pruning cost.

Zimmer, Andoni, Spiegel, Pokutta. "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs." 2023.
arXiv:2312.15230, section 3. Of a pruned model W = W * M only a few parameters are trained, the rest is frozen: every
bias, the scales of every norm, the head, and for the pruned matrices a product of low rank that keeps the zeros,

    W + c (B A) * M        (MaskLora; B = 0 and A random at the start, c = alpha / r)

merged at the end, so that no parameter is added and the same weights are zero. `Retrain` minimises the task's loss;
`Reconstruct` goes block after block and minimises |block(x) - dense block(x)|^2, x being what the blocks mended
before it put out.

    Chain((Wanda(sparsity=0.6), Perp()))                   after any method; M is read off the zeros
    Perp(after=Wanda(sparsity=0.6), by=Reconstruct())      the dense blocks are at hand, and M is Wanda's own
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from torch import Tensor, nn

from secateur.adapters import check_kept
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.recovery import Retrain, Training, Way, Work, kept_weights, known_beside, recovered
from secateur.axes.rules import LearningRate
from secateur.axes.subsets import ADAPTERS, Biases, Chosen, Head, Lora, MaskLora, Norms, Place, Subset, union
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part
from secateur.task import Task, generator
from secateur.train import History


@dataclass(frozen=True, kw_only=True)
class Perp(Method):
    """Retrain a small part of a pruned model, with its zeros where they are."""

    subsets: tuple[Subset, ...] = (Biases(), Norms(), Head(), MaskLora())  # what is trained; the first to ask has it
    by: Way = Retrain()  # retrain: the task's loss; reconstruct: each block towards the dense one
    steps: int = 1000  # of training; a block's, when reconstructing
    rate: float = 5e-4  # learning rate of AdamW at its peak; the paper searches 5e-6 to 5e-3
    warmup: float = 0.1  # fraction of the steps in which the rate rises; it falls linearly after
    decay: float = 0.0  # weight decay
    after: Method | None = None  # what prunes first; none: the model is pruned already
    include: tuple[str, ...] = ()  # matrices that adapters go on, by name, class or role; () is every one in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        17,
        "PERP: rethinking the prune-retrain paradigm in the era of LLMs",
        arxiv="2312.15230",
        year=2023,
        when="recovery",
        needs=("training",),
        axes="recovery adapters rule",
        criterion=("none",),
        tasks=("classification", "language modelling"),
        schedule=("one-shot",),
        allocation=("none",),
        fusion=("low-rank",),
        reports="OPT-2.7B to 30B: 0.27 to 0.35 % of the parameters suffice to match full retraining after magnitude "
        "pruning; at 50 % OPT-6.7B falls from 10.86 perplexity to 969 before any.",
        checked="tests/methods/test_perp.py::test_a_small_part_recovers_nearly_what_everything_does",
        differs=(
            "masks come from the edits, or from the zeros the model was given; they are never read again after that",
            "the number of examples in a step is the task's batch: there is no accumulation of gradients",
            "with after= a method prunes the whole model before blocks are reconstructed, and not block by block",
            "norms are known by what they hold, where the authors' code lists four classes",
            "the authors' scale_lora stops at a method that does not exist; here it is the paper's W * (B A)",
            "in half precision what is trained is kept in float32 beside the weight",
        ),
    )
    tiny: ClassVar = {"steps": 6, "rate": 5e-3}

    def budget(self) -> Budget | None:
        """That of the method before it, when there is one."""
        return None if self.after is None else self.after.budget()

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        if self.after is not None:
            self.after.check()
        if not self.subsets:
            raise SettingError("a recovery was asked for", "it trains nothing", "Give subsets=norms,mask-lora, say.")
        families = [s for s in self.subsets if isinstance(s, ADAPTERS)]
        if len(families) > 1:
            raise SettingError(
                f"{' and '.join(type(s).__name__ for s in families)} were asked for",
                "a matrix takes one adapter",
                "Keep one of them; MaskLora is the paper's best.",
            )
        for subset in self.subsets:
            if getattr(subset, "rank", 1) < 1:
                raise SettingError(f"{subset} was asked for", "a rank is 1 at least", "Give 16, say.")
        if self.steps < 1 or not 0 < self.rate < inf or not 0 <= self.decay < inf:
            raise SettingError(
                f"steps={self.steps}, rate={self.rate:g} and decay={self.decay:g} were asked for",
                "steps start at 1, a rate is above 0 and a decay is not below",
                "Give steps=1000, rate=5e-4 and decay=0.",
            )
        LearningRate(warmup=self.warmup)

    @property
    def needs_dense(self) -> bool:
        """See Recovery."""
        return self.by.dense

    def fits_masks(self) -> None:
        """See Recovery."""
        if any(isinstance(subset, Lora) for subset in self.subsets):
            raise SettingError(
                "masked weights were to be recovered by ordinary adapters (lora)",
                "merging them would fill the zeros in",
                "Use mask-lora, whose adapters keep them.",
            )

    def ready(self, model: nn.Module, task: Task) -> None:
        """See Recovery."""
        self.by.ready(model, task)
        self._matrices(model)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises SiteError when nothing is there to train, BudgetError if a zero were filled in."""
        self.check()
        dense, masks = known_beside()
        if self.after is None:
            return self.recover(model, task, masks, dense)
        self.by.ready(model, task)
        dense = copy.deepcopy(model) if self.needs_dense else None
        done = self.after.run(model, task)
        return recovered(done, self, task, dense)

    def recover(self, model: nn.Module, task: Task, masks: Sequence[Mask], dense: nn.Module | None) -> Outcome:
        """See Recovery. Raises as `run` does."""
        self.ready(model, task)
        keep = kept_weights(model, masks)
        chosen, said = self.choose(model, task, keep)
        edits: list[Edit] = []
        history = History()
        if chosen.samples:
            edits += recalibrate_(model, some(task, chosen.samples))
        if chosen.whole or chosen.adapters:
            training = Training(self.steps, self.rate, self.warmup, self.decay)
            changed, history = self.by.mend(Work(training, model, task, chosen, keep, dense))
            edits += changed
        check_kept(model, keep)
        gone = sum(int((~k).sum()) for k in keep.values())
        said.append(f"{gone:,} zeros were kept in place" if gone else "no weight was zero: none had to be kept")
        return Outcome(model, edits, history, notes=said + history.notes)

    def choose(self, model: nn.Module, task: Task, keep: Mapping[str, Tensor]) -> tuple[Chosen, list[str]]:
        """The union of the subsets, and how large a share of the model each is. Raises SiteError when it is empty."""
        place = Place(model, self._matrices(model), keep, lambda name: generator(task, f"perp {name}"))
        return union(self.subsets, place)

    def _matrices(self, model: nn.Module) -> dict[str, Part]:
        if not any(isinstance(subset, ADAPTERS) for subset in self.subsets):
            return {}
        return {site.parts[0].name: site.parts[0] for site in weights(model, self.include, self.exclude)}
