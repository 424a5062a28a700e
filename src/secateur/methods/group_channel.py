"""Scales of norms trained to be small, channels removed group by group, and the dense network's attention taught again.

Chu, Li, Bai, Hu, Chen, Lu. "Group channel pruning and spatial attention distilling for object detection." Applied
Intelligence, 2022. arXiv:2306.01526. In three stages, each of which can be left out:

    1  dynamic sparse training    all scales are pulled to zero; later the weaker ones as before, the others hardly
    2  group channel pruning      each group of layers has its own threshold; what a removed channel's shift gave is
                                  absorbed by the layers behind it
    3  attention distilling       the loss gets the distance between the maps of attention of the dense network and
                                  of what is left
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Global, Scores, keep_top
from secateur.axes.budgets import Terms, terms
from secateur.axes.distillation import Distil
from secateur.axes.penalties import Pressure, ScalePenalty, Weakest
from secateur.axes.rules import LearningRate
from secateur.axes.scales import Absorbed, Constants, Scaled, cuts, scale_names, scaled
from secateur.edit import apply_
from secateur.errors import SettingError, did_you_mean
from secateur.graph import couple
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.train import History, Rule, fit


def groups_of(names: Sequence[str]) -> dict[str, str]:
    """Which part of the network each of some names is in: name -> the part's own name.

    Parts are modules, from the outermost; one that holds more than half of all names is opened up.
    """
    found = dict.fromkeys(names, "")
    while True:
        sizes = {group: [n for n in names if found[n] == group] for group in dict.fromkeys(found.values())}
        group = max(sizes, key=lambda g: len(sizes[g]))
        deeper = {n: ".".join(n.split(".")[: group.count(".") + 1 + bool(group)]) for n in sizes[group]}
        if len(sizes[group]) * 2 <= len(names) or all(deeper[n] == group for n in deeper):
            return found
        found |= deeper


@dataclass(frozen=True)
class Grouped:
    """Each group of layers has a threshold of its own, so that a group of small scales is not emptied for another's.

    A site whose name a glob of `sparsities` matches is in that group and loses that fraction; the others are grouped
    by the module they are in, and lose what the budget says.
    """

    sparsities: tuple[tuple[str, float], ...] = ()  # glob of site names and sparsity, in pairs; a mapping will do

    needs_scores = True

    def __post_init__(self) -> None:
        if isinstance(self.sparsities, Mapping):
            object.__setattr__(self, "sparsities", tuple(self.sparsities.items()))
        for glob, value in self.sparsities:
            check_sparsity(value, f"sparsity of {glob}")

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises SettingError for a glob that matches no site."""
        groups: dict[tuple[str, float], list[Site]] = {}
        for glob, _ in self.sparsities:
            if not any(fnmatchcase(site.name, glob) for site in sites):
                names = [site.name for site in sites]
                raise SettingError(
                    f"a sparsity for {glob!r} was given", "no site has such a name", did_you_mean(glob, names)
                )
        part = groups_of([site.name for site in sites])
        for site in sites:
            given = [pair for pair in self.sparsities if fnmatchcase(site.name, pair[0])]
            groups.setdefault(given[0] if given else (part[site.name], budget.sparsity), []).append(site)
        keep: dict[str, int] = {}
        for (_, sparsity), members in groups.items():
            keep |= Global().spread(members, Budget(sparsity, of="units"), scores)
        return keep


@runtime_checkable
class Merge(Protocol):
    """What tied layers, each with a scale for a channel, make of it together."""

    def score(self, sizes: Tensor) -> Tensor:
        """|scale| at each member [members, units] -> one score per unit [units]."""
        ...


@dataclass(frozen=True)
class Majority:
    """A channel stays where at least half of the layers would keep it: "or" in the authors' code."""

    def score(self, sizes: Tensor) -> Tensor:
        """The size that at least half of the members reach."""
        return sizes.sort(0, descending=True).values[(len(sizes) + 1) // 2 - 1]


@dataclass(frozen=True)
class AnyKeeps:
    """A channel stays where one layer would keep it: "and" in the authors' code."""

    def score(self, sizes: Tensor) -> Tensor:
        """The largest size."""
        return sizes.amax(0)


@dataclass(frozen=True)
class Sparsest:
    """The layer with the smallest scales decides for all: "least" in the authors' code."""

    def score(self, sizes: Tensor) -> Tensor:
        """The sizes of the member with the smallest mean."""
        return sizes[int(sizes.mean(1).argmin())]


@dataclass(frozen=True, kw_only=True)
class GroupChannel(Method):
    """Train scales to be small, remove channels by a threshold for each group, and distil attention to recover."""

    sparsity: float = 0.5  # fraction taken out, in [0, 1): of the channels of every group, or of what `of` says
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    steps: int = 200  # of sparse training; 0 ranks the scales as they are
    strength: float = 0.01  # s: what a penalised scale's gradient gets
    pressure: Pressure = Weakest()  # on which scales: weakest(share=0.65, leak=0.01, begin=0.4), or everywhere
    allocation: Allocation = Grouped()  # a threshold for each group of layers; global is one for all
    merge: Merge = Majority()  # what tied layers decide together: majority, any-keeps, sparsest
    floor: float = 0.1  # of a site's channels that stay whatever their scales, at least
    least: int = 1  # how many stay where that fraction is none
    constants: Constants = Absorbed()  # what a removed channel's shift gave: absorbed, or dropped
    tune: int = 100  # steps of plain training after the cut
    distil: int = 100  # steps of training with attention distilled from the dense network, after those
    layers: tuple[str, ...] = ()  # modules whose attention is distilled, by name or glob; (): each group's last norm
    attention: float = 5.0  # how much the mean distance of attention weighs beside the task's loss
    rate: float = 1.0  # learning rate after the cut, as a fraction of the task's; it falls along a cosine
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        49,
        "Group channel pruning and spatial attention distilling for object detection",
        arxiv="2306.01526",
        venue="Applied Intelligence",
        year=2022,
        when="during training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("cnn",),
        axes="rule criterion allocation edit",
        criterion=("norm scale",),
        start=("pretrained",),
        tasks=("detection",),
        stage=("sparsity regularisation",),
        schedule=("custom",),
        retraining=("finetune",),
        fusion=("distillation",),
        reports="YOLOv4 on PASCAL VOC: 64.7 % fewer parameters and 34.9 % less work.",
        checked="tests/methods/test_group_channel.py::test_three_stages_on_a_detector_with_real_boxes",
        differs=(
            "thresholds are counts of coupled channels, so that what is asked is what goes; the published percentages "
            "0.97 and 0.865 belong to a vector that the authors' code leaves mostly at zero, and are not used",
            "the penalty is added once a step; the authors' code adds it for every batch that is gathered",
            "attention is compared by the sum over positions, not the mean, so that one weight serves maps of any "
            "size: the paper's are 1e6, 1e3 and 1e4",
            "a channel's constant is followed by running the network, so that any network will do; at borders it is "
            "right on average",
            "at least a tenth of a site's channels stay; the authors' floor, 1 % or 16 channels, is "
            "floor=0.01, least=16, and more than small detectors have",
            "the distillation of outputs, optional in the authors' code, is left out",
        ),
    )
    tiny: ClassVar = {"steps": 30, "strength": 0.05, "tune": 5, "distil": 10}

    def budget(self) -> Budget | None:
        """The fraction of channels, where no group has one of its own."""
        own = isinstance(self.allocation, Grouped) and self.allocation.sparsities
        return None if own else self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends units."""
        return terms(self, "units", self.least)

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        check_sparsity(self.floor, "floor")
        if self.of != "units" and self.budget() is None:
            raise SettingError(
                f"a sparsity of the {self.of} was asked for",
                "every group of layers has a sparsity of its own",
                "Leave one of the two out.",
            )
        if min(self.steps, self.tune, self.distil) < 0 or self.least < 1:
            raise SettingError(
                f"steps={self.steps}, tune={self.tune}, distil={self.distil}, least={self.least} were given",
                "counts of steps are not negative, and a channel stays at least",
                "Give 0 to leave a stage out, and least=1.",
            )
        for name in ("strength", "attention", "rate"):
            if not getattr(self, name) > 0:
                raise SettingError(
                    f"{name}={getattr(self, name):g} was given",
                    "it is above 0",
                    "To leave a stage out, give it 0 steps.",
                )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found, others = scaled(model, task.example, coupling)
        self.terms.free(model, [one.site for one in found])
        sites = [one for one in found if not self.terms.protects(one.site)]
        names = list(dict(model.named_modules()))
        layers = self.taught(sites, names)
        teacher = copy.deepcopy(model)
        history = History()
        if self.steps:
            history = fit(model, task, self.steps, [ScalePenalty(scale_names(sites), self.strength, self.pressure)])
        bare = [one.site for one in sites]
        spread = partial(self.spread, bare, self.scores(model, sites))
        met = self.terms.counts(model, task.example, bare, coupling.multiples, spread)
        keep = self.keep(model, sites, met.counts)
        edits = apply_(model, self.constants.edits(model, sites, keep, task.example))
        edits += apply_(model, cuts(sites, keep))
        history = self.recover(model, task, self.tune, [], history)
        history = self.recover(model, task, self.distil, [Distil(teacher, layers, self.attention)], history)
        notes = self.notes(sites, keep) + [f"left alone: {name} is not scaled by norms throughout" for name in others]
        notes += [*self.terms.left_alone([one.site for one in found]), *met.notes]
        return Outcome(model, edits, history, notes=notes + history.notes)

    def keep(
        self, model: nn.Module, sites: Sequence[Scaled], counts: Mapping[str, int] | None = None
    ) -> dict[str, Tensor]:
        """Which channels stay: those of the largest merged scales, so many, or as many as the allocation says."""
        scores = self.scores(model, sites)
        if counts is None:
            counts = self.spread([one.site for one in sites], scores, self.sparsity)
        return {one.site.name: keep_top(scores[one.site.name], counts[one.site.name]) for one in sites}

    def scores(self, model: nn.Module, sites: Sequence[Scaled]) -> dict[str, Tensor]:
        """What tied layers together say of each channel."""
        named = tensors(model)
        return {one.site.name: self.merge.score(one.sizes(named)) for one in sites}

    def spread(self, sites: Sequence[Site], scores: Scores, sparsity: float) -> dict[str, int]:
        """Channels to keep at each site, by the allocation.

        A floor's channels come first whatever their scales, so that a group loses as many as were asked, elsewhere.
        """
        least = {site.name: min(site.units, int(self.floor * site.units) or self.least) for site in sites}
        first = {name: score.masked_fill(keep_top(score, least[name]), torch.inf) for name, score in scores.items()}
        counts = self.allocation.spread(sites, Budget(sparsity, of="units"), first)
        return {name: max(count, least[name]) for name, count in counts.items()}

    def taught(self, sites: Sequence[Scaled], names: Sequence[str]) -> list[str]:
        """The modules whose attention is distilled. Raises SettingError for a glob that matches none."""
        if not self.layers:
            part = groups_of([one.site.name for one in sites])
            last = {part[one.site.name]: one.members[-1].name.removesuffix(".weight") for one in sites}
            return list(last.values())
        found = []
        for glob in self.layers:
            hits = [name for name in names if fnmatchcase(name, glob)]
            if not hits:
                raise SettingError(
                    f"attention at {glob!r} was to be distilled", "no module has such a name", did_you_mean(glob, names)
                )
            found += hits
        return found

    def recover(self, model: nn.Module, task: Task, steps: int, rules: Sequence[Rule], history: History) -> History:
        """Train what is left; the history so far, with that behind it."""
        if not steps:
            return history
        optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
        for group in optimizer.param_groups:
            group["lr"] *= self.rate
        return history.then(fit(model, task, steps, [LearningRate(), *rules], optimizer, epoch=history.epoch))

    def notes(self, sites: Sequence[Scaled], keep: Mapping[str, Tensor]) -> list[str]:
        """What each group lost, and where a layer was left almost empty."""
        part = groups_of([one.site.name for one in sites])
        found = []
        for group in dict.fromkeys(part.values()):
            mine = [one.site for one in sites if part[one.site.name] == group]
            units, kept = sum(s.units for s in mine), sum(int(keep[s.name].sum()) for s in mine)
            found.append(f"{group or 'the network'}: {kept:,} of {units:,} channels kept")
        share, name = min((float(k.float().mean()), name) for name, k in keep.items())
        return [f"channels kept by group: {'; '.join(found)}", f"fewest kept of a layer: {share:.0%}, of {name}"]
