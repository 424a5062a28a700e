"""A trained network holds a small one that does as well with not one weight changed: only the mask is searched for.

Zhang, Lin, Zhong, Chao, Ji. "Lottery Jackpots Exist in Pre-trained Models." TPAMI 2023. arXiv:2104.08700, section 3.
The mask starts with the largest weights, as many in each layer as one threshold over all would leave. Each has a score,
which learns from w * dL/dz, z being the masked weights; the best scores stay, though only a share of the exchanges is
made at a time (short restriction), which falls to almost none. Weights, biases and norms never move.
"""

from dataclasses import dataclass
from math import log
from typing import ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Global, Magnitude, keep_top
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.trained_masks import Swaps, TrainedMask, Transition
from secateur.cut import DEFAULT_EXCLUDE, weights, without_classifier
from secateur.edit import Edit, Mask, apply_
from secateur.errors import BudgetError, SettingError
from secateur.evidence import Evidence, observe
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task, modes_of, restore_modes_
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class Jackpots(Method):
    """Train a score per weight and keep the best, the weights being frozen."""

    sparsity: float = 0.9  # of all prunable weights together
    allocation: Allocation = Global()  # each layer's share, by magnitude; uniform is the other of the paper
    start: Criterion = Magnitude()  # what the first mask keeps in each layer; random is the slow way
    transition: Transition = Swaps()  # exchanges made at a time; swaps(power=0): all, as the authors' code does
    margin: float = 0.01  # by how much the scores of what is out start below 1: how soon exchanges begin
    rate: float = 0.1  # learning rate of the scores, falling to none as a cosine
    momentum: float = 0.9
    decay: float = 0.0  # weight decay of the scores; 0.0005 in the authors' code, which shrinks the margin with time
    steps: int = 1000  # of the search
    samples: int = 512  # examples on which batch norms take their statistics anew, under the final mask
    tune: int = 0  # steps of fine-tuning after the search, weights included and the mask held
    tune_rate: float = 0.01  # learning rate of the fine-tuning
    spare_classifier: bool = True  # the last layer stays dense, as in the paper; it does not count as prunable then
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        24,
        "Lottery Jackpots Exist in Pre-trained Models",
        arxiv="2104.08700",
        venue="TPAMI",
        year=2023,
        when="after training",
        needs=("labels", "training"),
        axes="allocation criterion trained masks rule",
        criterion=("learned", "magnitude"),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("one-shot",),
        retraining=("none",),
        updates=("none",),
        learns=("masks or gates",),
        reports="ResNet-32 on CIFAR-10 has 93.70 % top-1 at 90 % after 30 epochs of searching, no weight changed, and "
        "ResNet-50 more than 70 % on ImageNet at 90 % after five; starting from the largest weights is three times as "
        "fast as from random ones",
        checked="tests/methods/test_jackpots.py::test_a_searched_mask_recovers_what_a_cut_lost_with_no_weight_changed",
        differs=(
            "the share of the exchanges falls as (1 - t / T)^4 to a floor, as the paper describes it; the authors' "
            "scripts round it up to 1 or never use it, and so restrict nothing: swaps(power=0)",
            "exchanges are of ranks, not of thresholds, so that ties, of which there are many at first, neither stop a "
            "layer nor move it",
            "the pre-trained weights are searched; the authors' CIFAR script builds a new network after taking the "
            "layers' shares from them, and searches in random ones",
            "batch norms take their statistics anew at the end, as the last exchanges come after the last batch",
            "scores are not decayed unless asked",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "steps": 20, "samples": 32}

    def check(self) -> None:
        """Raise SettingError for a search that cannot be."""
        self.budget()
        for count, of in (
            (self.steps, "steps of search"),
            (self.tune, "steps of fine-tuning"),
            (self.samples, "examples"),
        ):
            if count < 0:
                raise SettingError(f"{count} {of} were asked for", "a count cannot be negative", "Give 0 or more.")
        for name in ("margin", "rate", "tune_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise SettingError(
                    f"a {name} of {getattr(self, name):g} was asked for", "it is above 0", f"Leave {name} as it is."
                )
        for name, below in (("momentum", 1.0), ("decay", float("inf"))):
            if not 0 <= getattr(self, name) < below:
                raise SettingError(
                    f"a {name} of {getattr(self, name):g} was asked for",
                    f"it is 0 or more{', below 1' if below == 1 else ''}",
                    f"Leave {name} as it is.",
                )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Share the budget, search, take the norms' statistics anew; fine-tune where asked."""
        self.check()
        sites = self.sites(model)
        notes = doubts(model, task)
        rule = self.search(model, task)
        first = [Mask(site, torch.ones(site.shape, dtype=torch.bool)) for site in sites]
        masks = {mask.site.name: mask for mask in [*first, *rule.masks()]}
        history = None
        if rule.parameters():
            history = fit(model, task, self.steps, [LearningRate(), rule], optimizer=self.optimizer(rule))
            masks |= {mask.site.name: mask for mask in rule.masks()}
            notes.append(
                f"{rule.scored.overlap:.2%} of the weights kept at first or in the end were kept at both times"
            )
        edits: list[Edit] = apply_(model, list(masks.values()))
        if self.samples:
            edits += recalibrate_(model, some(task, self.samples))
        if self.tune:
            optimizer = torch.optim.SGD(model.parameters(), self.tune_rate, momentum=0.9)
            epoch = 0 if history is None else history.epoch
            tuned = fit(model, task, self.tune, [LearningRate(), Hold.of(edits)], optimizer, epoch=epoch)
            history = tuned if history is None else history.then(tuned)
        return Outcome(model, edits, history, notes=notes + (history.notes if history else []))

    def sites(self, model: nn.Module) -> list[Site]:
        """What is prunable."""
        sites = weights(model, self.include, self.exclude)
        return without_classifier(sites) if self.spare_classifier else sites

    def search(self, model: nn.Module, task: Task) -> TrainedMask:
        """The rule that searches, its first masks and scores; layers that stay whole have none.

        Raises BudgetError, naming it, for a layer of which nothing would stay.
        """
        sites, named = self.sites(model), tensors(model)
        size = {site.name: Magnitude().score(site, named, Evidence()) for site in sites}
        counts = self.allocation.spread(sites, Budget(self.sparsity), size)
        if empty := [site.name for site in sites if not counts[site.name]]:
            raise BudgetError(
                f"a mask of a sparsity of {self.sparsity:g} was to be searched for",
                f"nothing would be left of {', '.join(empty)}, and the network would be cut in two",
                "Ask for less, or let every layer keep some: allocation=global(floor=0.0005).",
            )
        sites = [site for site in sites if counts[site.name] < site.units]
        seen = {}
        if self.start.needs:
            seen = observe(model, sites, some(task, self.samples), self.start.needs, task.loss)
        keep, scores = {}, {}
        for site in sites:
            score = self.start.score(site, named, seen.get(site.name, Evidence()))
            keep[site.name] = keep_top(score.reshape(-1), counts[site.name]).reshape(site.shape)
            device = site.parts[0].read(named).device
            scores[site.name] = {site.parts[0].key: first_scores(keep[site.name], self.margin).to(device)}
        return TrainedMask(sites, scores, keep, transition=self.transition)

    def optimizer(self, rule: TrainedMask) -> torch.optim.Optimizer:
        """What trains the scores."""
        return torch.optim.SGD(rule.parameters(), self.rate, momentum=self.momentum, weight_decay=self.decay)


def first_scores(keep: Tensor, margin: float) -> Tensor:
    """1 where a mask keeps, and a little less where it does not."""
    return 1 - margin * (~keep).float()


def doubts(model: nn.Module, task: Task) -> list[str]:
    """A remark where a network, before anything is cut, is no better than guessing: there is nothing to find in it.

    Guessing costs log(classes), or log(vocabulary); outputs of another kind are not judged.
    """
    modes = modes_of(model)
    model.eval()
    total, examples, choices = 0.0, 0, 0
    try:
        with torch.no_grad():
            for batch in some(task, 256):
                batch = batch.to(next(model.parameters()).device)
                answer = batch.through(model)
                logits = answer if isinstance(answer, Tensor) else getattr(answer, "logits", None)
                if not isinstance(logits, Tensor) or logits.dim() < 2:
                    return []
                choices = logits.shape[-1]
                total, examples = total + float(task.loss(model, batch)) * batch.size, examples + batch.size
    finally:
        restore_modes_(model, modes)
    if not examples or choices < 2 or total / examples < 0.9 * log(choices):
        return []
    return [
        f"the dense network's loss of {total / examples:.3g} is about that of guessing among {choices}, "
        f"{log(choices):.3g}: is it trained?"
    ]
