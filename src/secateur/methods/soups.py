"""Retrain a pruned network several times over and average the results: zeros that coincide stay zeros.

Zimmer, Spiegel, Pokutta. "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging." ICLR 2024.
arXiv:2306.16788, section 2: phases of

    prune     the smallest of the weights still there, in all layers together
    branch    retrain m replicas of the pruned network, one hyper-parameter varied between them
    merge     theta = sum_i lambda_i theta_i, inside the mask they share; take batch norms' statistics anew

and the soup of one phase is where the next begins. Started by torchrun, the processes retrain replicas side by side.

Within a mask that is there already, `branch` and `merged` are the last stage of any method, or Soups its recovery:

    OneShot(sparsity=0.7, recover=Soups(replicas=3, steps=500))
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import sqrt
from statistics import fmean
from typing import Any, ClassVar

import torch
from torch import nn

from secateur.axes import Allocation, Global, Magnitude, Pattern, PerMatrix
from secateur.axes.branching import Candidate, Fall, Keep, Order, Restart, Retraining, Variation, branch
from secateur.axes.patterns import check_pattern
from secateur.axes.rules import Hold, everything, sparsity_of
from secateur.axes.soup import Recipe, Refresh, UniformSoup, basin, merged
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import ResumeError, SettingError, SiteError, TaskError
from secateur.evidence import Evidence
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task, quality
from secateur.train import History, Snapshot


@dataclass(frozen=True, eq=False)
class Phase:
    """How far the phases are: everything that the next one needs, and how it went."""

    done: int  # phases
    keep: Keep
    state: Snapshot  # the soup
    epoch: int  # the first epoch of data not drawn from
    history: History
    candidates: tuple[Candidate, ...] = ()  # of the last phase; not kept in a snapshot
    chosen: tuple[int, ...] = ()  # those that went into the soup

    def snapshot(self) -> Snapshot:
        """All of it as one value that can be saved."""
        held = {"phases": self.done, "keep": dict(self.keep), "history": asdict(self.history)}
        return replace(self.state, epoch=self.epoch, rules=(held,))

    @classmethod
    def of(cls, snapshot: Snapshot) -> "Phase":
        """What `snapshot` put into one. Raises ResumeError for any other."""
        held: Mapping[str, Any] = snapshot.rules[0] if snapshot.rules else {}
        if "phases" not in held:
            raise ResumeError(
                "soups were to be taken up again", "the snapshot is of one training", "Give one of a Phase."
            )
        history = History(**held["history"])
        return cls(held["phases"], dict(held["keep"]), Snapshot(snapshot.model), snapshot.epoch, history)


@dataclass(frozen=True, kw_only=True)
class Soups(Method):
    """Prune, retrain several replicas within the mask, average them; again from there."""

    sparsity: float = 0.95  # of all prunable weights together, after the last phase
    phases: int = 3  # of pruning, branching and merging; each drops the same fraction of what is left
    replicas: int = 3  # m: candidates retrained in each phase
    steps: int = 1000  # optimizer steps of each retraining
    vary: Variation = Order()  # the hyper-parameter in which replicas differ
    merge: Recipe = UniformSoup()  # which go into the soup
    course: Restart = Fall()  # of the learning rate
    recalibrate: float = (
        1.0  # q: share of the training data that batch norms take statistics from; 0: they are averaged
    )
    allocation: Allocation = Global()
    pattern: Pattern = PerMatrix()
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        6,
        "Sparse Model Soups: A Recipe for Improved Pruning via Model Averaging",
        arxiv="2306.16788",
        venue="ICLR",
        year=2024,
        when="after training",
        needs=("labels", "training"),
        axes="criterion allocation pattern snapshot rule recovery",
        criterion=("magnitude",),
        tasks=("classification",),
        schedule=("geometric",),
        retraining=("LR-rewind",),
        reports="averaging replicas retrained in one mask beats the best of them by one to two points at high "
        "sparsity, and retraining one model as long as all of them together",
        checked="tests/methods/test_soups.py::test_a_soup_beats_its_candidates_and_longer_retraining",
        differs=(
            "counts of batches are copied: the authors' code averages them as if they were weights",
            "norms, embeddings, heads and routers are left dense: the authors' code takes whatever has a weight",
            "exactly as many weights are zero after each phase as its share of the target says",
            "the statistics of batch norms are a plain mean over batches, so that their order does not matter",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.7, "phases": 2, "replicas": 2, "steps": 8}

    def check(self) -> None:
        """Raise SettingError for settings that make no soup."""
        check_sparsity(self.sparsity)
        if self.sparsity == 0:
            raise SettingError("a sparsity of 0 was asked for", "nothing would be pruned", "Give 0.95, say.")
        if self.phases < 1 or self.steps < 1:
            raise SettingError(
                f"{self.phases} phases of {self.steps} steps were asked for",
                "it takes one of each at least",
                "Give phases=3 and steps=1000, say.",
            )
        self._check_soup()
        check_pattern(self.pattern, self.sparsity)

    def _check_soup(self) -> None:
        if self.replicas < 2:
            raise SettingError(
                f"a soup of {self.replicas} replicas was asked for", "the mean of one is itself", "Give 3, say."
            )
        if not 0 <= self.recalibrate <= 1:
            raise SettingError(
                f"statistics from {self.recalibrate:g} of the training data were asked for",
                "that is a share, in [0, 1]",
                "Give 1 for all of it, 0 for none.",
            )
        self.vary.check(self.replicas)
        self.course.rule()

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The soup of the last phase, under its mask."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        end = self.cook(model, task, sites)
        edits = apply_(model, [Mask(site, end.keep[site.name]) for site in sites])
        return Outcome(model, edits, end.history, notes=list(end.history.notes))

    def cook(
        self,
        model: nn.Module,
        task: Task,
        sites: Sequence[Site],
        *,
        resume_from: Phase | None = None,
        watch: Callable[[Phase], None] | None = None,
    ) -> Phase:
        """All the phases; the model is left as the last soup.

        `watch` is told after each phase; what it is given can be saved, and given as `resume_from` to go on as if
        nothing had happened, in as many processes as there then are.
        """
        self.check()
        self._check_task(task)
        now = resume_from or Phase(0, everything(sites), Snapshot.of(model), 0, History())
        now.state.restore_(model)
        for number in range(now.done, self.phases):
            share = self.share(number + 1)
            keep, shrunk, fraction = self.pruned(model, sites, now.keep, share)
            apply_(model, [Mask(site, keep[site.name]) for site in sites])
            now = self._simmered(model, task, sites, replace(now, keep=keep), (shrunk, fraction))
            if watch is not None:
                watch(now)
        return now

    def share(self, phase: int) -> float:
        """The sparsity after so many phases, each of which drops 1 - (1 - S)^(1/P) of what is left."""
        return self.sparsity if phase == self.phases else 1 - (1 - self.sparsity) ** (phase / self.phases)

    def pruned(
        self, model: nn.Module, sites: Sequence[Site], before: Keep, sparsity: float
    ) -> tuple[Keep, float, float]:
        """Masks inside the old ones, how much of the norm of what was there goes, and how much of its number."""
        named = tensors(model)
        sizes = {site.name: Magnitude().score(site, named, Evidence()) for site in sites}
        within = {site.name: before[site.name].to(sizes[site.name].device) for site in sites}
        # what is gone must not win a tie against a weight that happens to be zero
        scores = {name: size.masked_fill(~within[name], -torch.inf) for name, size in sizes.items()}
        counts = self.allocation.spread(sites, Budget(sparsity), scores)
        keep = {}
        for site in sites:
            count = self.pattern.nearest(site.shape, min(counts[site.name], int(within[site.name].sum())))
            keep[site.name] = self.pattern.select(scores[site.name], count, within[site.name])
        was = sum(int(w.sum()) for w in within.values())
        gone = was - sum(int(k.sum()) for k in keep.values())
        there = sum(float(size.double().square().sum()) for size in sizes.values())
        lost = sum(float(size.double().masked_fill(keep[name], 0).square().sum()) for name, size in sizes.items())
        return keep, sqrt(lost / there) if there else 0.0, gone / was if was else 0.0

    def _check_task(self, task: Task) -> bool:
        """Whether there is held-out data. Raises TaskError when there is none for a soup that looks at it."""
        try:
            if next(iter(task.batches("val", 1)), None) is not None:
                return True
        except TaskError:
            pass
        if self.merge.tastes:
            raise TaskError(
                f"candidates were to be chosen on {task.name}",
                "it has no validation split, and the test split is not to choose by",
                "Give it one, or use merge=uniform-soup.",
            )
        return False

    def _simmered(
        self, model: nn.Module, task: Task, sites: Sequence[Site], now: Phase, lost: tuple[float, float]
    ) -> Phase:
        """Branch and merge within masks; changes the model to the soup."""
        given = Retraining(self.steps, now.epoch, self.course.rate(*lost, self.steps))
        ways = [self.vary.of(number, given) for number in range(self.replicas)]
        found = branch(model, task, sites, now.keep, ways, self.course)
        refresh, history = Refresh(self.recalibrate), now.history.then(found[0].history)
        step, tasted = len(history.losses), self._check_task(task)

        def measured(state: Snapshot) -> tuple[float, float]:
            refresh.restore_(model, state, task)
            return _quality(model, task)

        def log(name: str, value: float) -> None:
            history.log(name, step, value)

        single, losses = [0.0] * len(found), [0.0] * len(found)
        if tasted:
            # as the soups they are compared with: what new statistics bring is not to be the soup's credit
            single, losses = map(list, zip(*(measured(candidate.state) for candidate in found), strict=True))
        chosen = self.merge.choose(single, lambda some: measured(merged(sites, [found[i] for i in some]))[0])
        about = basin(sites, found)
        log("distance between candidates", about.farthest)
        log("angle between candidates", about.angle)
        if about.farthest == 0:
            history.notes.append(f"the replicas are all alike: {type(self.vary).__name__} changes nothing on this task")
        sign = 1.0 if task.higher_is_better else -1.0
        if tasted:
            _, middle = measured(merged(sites, [found[i] for i in about.pair]))
            ends = [losses[i] for i in about.pair]
            log(f"validation {task.metric}, best candidate", sign * max(single))
            log(f"validation {task.metric}, mean candidate", sign * fmean(single))
            log("barrier between candidates", middle - fmean(ends))
            if middle > max(ends):
                history.notes.append(
                    f"phase {now.done + 1}: half-way between candidates {about.pair[0]} and {about.pair[1]} the loss "
                    f"is {middle:.4g}, above both ends: they left the basin they share, and a lower learning rate "
                    "would keep them in it"
                )
        soup = refresh.restore_(model, merged(sites, [found[i] for i in chosen]), task)
        if tasted:
            log(f"validation {task.metric}, soup", sign * _quality(model, task)[0])
        log("candidates in the soup", len(chosen))
        log("sparsity", sparsity_of(now.keep))
        epoch = now.epoch + max(c.history.epoch - w.epoch for c, w in zip(found, ways, strict=True))
        return Phase(now.done + 1, now.keep, soup, epoch, history, tuple(found), tuple(chosen))

    # As the recovery of another method: one phase, within the masks it chose.

    needs_dense: ClassVar[bool] = False

    def fits_masks(self) -> None:
        """See Recovery."""
        self._check_soup()

    def ready(self, model: nn.Module, task: Task) -> None:
        """See Recovery. Raises TaskError without held-out data for a soup that looks at it."""
        self._check_task(task)

    def recover(self, model: nn.Module, task: Task, masks: Sequence[Mask], dense: nn.Module | None) -> Outcome:
        """See Recovery: branch and merge once within masks; sparsity and phases are theirs. Raises SiteError for none.

        Also the last stage of a method that prunes while training: give it the masks that training ended with.
        """
        self._check_soup()
        held = Hold.of(masks)
        if not held.sites:
            raise SiteError(
                "replicas were to be retrained within a mask", "there is none", "Prune first, by a method that masks."
            )
        apply_(model, held.masks())
        before = Snapshot.of(model)
        end = self._simmered(model, task, held.sites, Phase(0, held.keep, before, 0, History()), (1.0, 1.0))
        changed: list[Edit] = [
            Update(name, value.clone())
            for name, value in end.state.model.items()
            if value.is_floating_point() and not torch.equal(value, before.model[name])
        ]
        return Outcome(model, changed, end.history, notes=list(end.history.notes))


def alone(
    model: nn.Module, task: Task, sites: Sequence[Site], method: Soups, steps: int | None = None, *, epoch: int = 0
) -> Phase:
    """The baseline: the same phases with one replica, iterative magnitude pruning; changes the model.

    `steps` are those of each retraining, the method's own where not given: as many times more as there are replicas
    cost what the soups do. `epoch` is the first of the data.
    """
    now = Phase(0, everything(sites), Snapshot.of(model), epoch, History(epoch=epoch))
    for number in range(method.phases):
        keep, shrunk, fraction = method.pruned(model, sites, now.keep, method.share(number + 1))
        apply_(model, [Mask(site, keep[site.name]) for site in sites])
        length = method.steps if steps is None else steps
        way = Retraining(length, now.epoch, method.course.rate(shrunk, fraction, length))
        (found,) = branch(model, task, sites, keep, [way], method.course)
        found.state.restore_(model)
        now = Phase(number + 1, keep, found.state, found.history.epoch, now.history.then(found.history), (found,), (0,))
    return now


def _quality(model: nn.Module, task: Task) -> tuple[float, float]:
    """The task's metric on held-out data, turned so that higher is better, and the loss; without one, less of it."""
    found = task.measure(model, "val")
    value = quality(task, found)
    return value, found.get("loss", -value)
