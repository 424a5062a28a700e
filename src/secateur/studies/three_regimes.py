"""Which way to turn the training of a network that is to be pruned, told by how its retrained copies lie together.

Zhou, Yang, Chang, Mahoney. "A Three-regime Model of Network Pruning." ICML 2023. arXiv:2305.18383. The density that is
left is a load; what adds noise to the dense training (stopping early, small batches, a large learning rate, a large
radius of SAM) is a temperature. Prune once, retrain the pruned network several times in different orders of the data,
and of each pair of copies measure, on training data,

    LMC   linear mode connectivity: the mean error of both ends less the error that is farthest from it on the line
          between them; negative is a barrier, and 0 well connected
    CKA   similarity of their outputs, in [0, 1]

    I      LMC < -eps                   poorly connected        raise the temperature
    II-A   LMC >= -eps, CKA < kappa     connected, dissimilar   lower it
    II-B   LMC >= -eps, CKA >= kappa    connected, similar      stay

    grid = Grid(EarlyStop(), (400, 800, 1600), (0.03, 0.1, 0.5), Course(1600, Steps(), floor=0.0), Retrain(800))
    cells = grid.measure(model, task)
    edges = calibrated(cells)
    advise(cells[0], edges, grid.knob, grid.settings).says

What departs from the paper: it draws maps and gives no boundaries, so eps and kappa are calibrated here; copies with a
better path between them (LMC > eps: their training was too short) count as connected; exactly as many weights are kept
as the density asks.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import combinations, pairwise
from math import inf, isfinite, isnan, nan
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.axes.allocations import Allocation, Uniform
from secateur.axes.branching import Candidate, Fall, Order, Restart, Retraining, branch
from secateur.axes.correlation import rank_correlation
from secateur.axes.rewinding import Course, train_whole
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Steps
from secateur.axes.sharpness import Sam
from secateur.axes.soup import Refresh, merged
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, SettingError, TaskError
from secateur.method import Card
from secateur.methods.global_mp import magnitudes, masks_of
from secateur.methods.stable_lottery import check_orders
from secateur.outcome import fingerprint
from secateur.site import Site
from secateur.task import Task, logits_of
from secateur.tasks.labelled import device_of, evaluating
from secateur.train import Loop, Rule, Snapshot, fit

CARD = Card(
    35, "A Three-regime Model of Network Pruning", arxiv="2305.18383", venue="ICML", year=2023,
    needs=("labels", "training"), families=("mlp", "cnn"), criterion=("magnitude",), tasks=("classification",),
    schedule=("one-shot",), allocation=("uniform",),
)  # fmt: skip

# The two measurements


def connectivity(errors: Sequence[float]) -> float:
    """LMC of errors in [0, 1] along a line, ends included: their mean less the error farthest from it.

    Negative where there is a barrier; positive where a better path lies between the ends. The first of equals.
    """
    ends = (errors[0] + errors[-1]) / 2
    return ends - max(errors, key=lambda error: abs(ends - error))


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two networks' outputs [examples, classes], in [0, 1].

    ||X'Y||^2 / (||X'X|| ||Y'Y||) on centred columns, in float64: equal to <K, L> / (||K|| ||L||) of centred Gram
    matrices, without a matrix of examples by examples. nan where a network says the same to every example. Kornblith,
    Norouzi, Lee, Hinton 2019, arXiv:1905.00414, section 3.
    """
    (x, x_constant), (y, y_constant) = _centred(x), _centred(y)
    if x_constant or y_constant:
        return nan
    return float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def _centred(outputs: Tensor) -> tuple[Tensor, bool]:
    """Outputs less their mean, and whether nothing is left but rounding."""
    outputs = outputs.double()
    centred = outputs - outputs.mean(0)
    return centred, bool(centred.square().sum() <= 1e-12 * outputs.square().sum())


@dataclass(frozen=True)
class Meter:
    """Reads both measurements of a pair of copies."""

    points: int = 11  # on the line between two copies, ends included
    refresh: Refresh = Refresh()  # statistics of batch norms are taken anew at each of them, the ends too
    examples: int = 6400  # whose outputs are compared, or all there are

    def __post_init__(self) -> None:
        if self.points < 3 or self.examples < 2:
            raise SettingError(
                f"copies were to be compared at {self.points} points and on {self.examples} examples",
                "two points are the ends themselves, and one example is like itself",
                "Give 11 points and 6400 examples, as in the paper.",
            )
        if not 0 <= self.refresh.share <= 1:
            raise SettingError(
                f"statistics of batch norms were to be taken anew on a share of {self.refresh.share:g}",
                "it is a share of the training data, in [0, 1]",
                "Give Refresh(1.0), or 0 where there are no batch norms.",
            )

    def check(self, model: nn.Module, task: Task) -> None:
        """Raise unless errors can be measured, and batch norms can take their statistics anew."""
        if task.metric != "accuracy":
            raise TaskError(
                f"the error of copies on {task.name} was to be measured",
                f"its metric is {task.metric}, and a barrier is told in a share of examples, which is bounded",
                "Give a task of classification.",
            )
        if not self.refresh.share and any(isinstance(m, _BatchNorm) for m in model.modules()):
            raise SettingError(
                "the line between two copies was to be walked with the statistics of batch norms as they are averaged",
                "those fit neither weights, and every pair would look unconnected",
                "Give a share of the training data: refresh=Refresh(1.0).",
            )
        if next(iter(task.batches("train")), None) is None:
            raise TaskError(
                f"copies were to be retrained on {task.name}, and batch norms to take their statistics anew",
                "its training split is empty",
                "Give it data.",
            )

    def along(self, model: nn.Module, task: Task, sites: Sequence[Site], one: Candidate, other: Candidate) -> float:
        """LMC of two copies by errors on training data; changes the model. Raises ModelError where masks differ."""
        errors = []
        for place in range(self.points):
            share = place / (self.points - 1)
            self.refresh.restore_(model, merged(sites, [one, other], [1 - share, share]), task)
            errors.append(_error(model, task, "train"))
        return connectivity(errors)

    def outputs(self, model: nn.Module, task: Task, copy: Candidate, examples: int) -> Tensor:
        """What a copy says of training examples, the same ones to each: [examples, classes]; changes the model."""
        copy.state.restore_(model)
        device, found = device_of(model), []
        with evaluating(model):
            for batch in task.batches("calibration", min(self.examples, examples)):
                found.append(logits_of(batch.to(device).through(model)).flatten(0, -2).cpu())
        return torch.cat(found)

    def pairs(
        self, model: nn.Module, task: Task, sites: Sequence[Site], copies: Sequence[Candidate], examples: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """LMC and CKA of every two copies; changes the model."""
        said = [self.outputs(model, task, copy, examples) for copy in copies]
        lmc = tuple(self.along(model, task, sites, one, other) for one, other in combinations(copies, 2))
        return lmc, tuple(cka(x, y) for x, y in combinations(said, 2))


def _error(model: nn.Module, task: Task, split: str) -> float:
    return 1 - task.measure(model, split)["accuracy"]


# Knobs: what acts as the temperature of the dense training


@runtime_checkable
class Knob(Protocol):
    """A setting of the dense training that adds noise to it."""

    hotter: ClassVar[str]  # how the temperature is raised, in words
    colder: ClassVar[str]

    def temperature(self, setting: float) -> float:
        """Higher where the training is noisier."""
        ...

    def train(self, model: nn.Module, task: Task, settings: Sequence[float], course: Course) -> dict[float, Snapshot]:
        """The dense network at each setting, all from the weights the model has; changes the model."""
        ...


@dataclass(frozen=True)
class EarlyStop:
    """Optimizer steps after which the dense training is stopped: one training, and checkpoints of it."""

    hotter: ClassVar[str] = "stop training earlier"
    colder: ClassVar[str] = "train longer"

    def temperature(self, setting: float) -> float:
        """See Knob."""
        return -setting

    def train(self, model: nn.Module, task: Task, settings: Sequence[float], course: Course) -> dict[float, Snapshot]:
        """See Knob. Raises SettingError for steps that the course does not reach."""
        for setting in settings:
            if not 0 < setting <= course.steps or setting != int(setting):
                raise SettingError(
                    f"a network stopped after {setting:g} steps was asked for",
                    f"its training has {course.steps}",
                    "Give whole steps of it, the last one too.",
                )
        whole = train_whole(model, task, course, {int(setting) for setting in settings})
        return {setting: Snapshot(whole.at(int(setting)).model) for setting in settings}


@dataclass(frozen=True)
class BatchSize:
    """Examples a step of the dense training sees, its steps being as many; retraining keeps the task's own."""

    hotter: ClassVar[str] = "train with smaller batches"
    colder: ClassVar[str] = "train with larger batches"

    def temperature(self, setting: float) -> float:
        """See Knob."""
        return -setting

    def train(self, model: nn.Module, task: Task, settings: Sequence[float], course: Course) -> dict[float, Snapshot]:
        """See Knob. Raises TaskError for a task whose batches cannot be made larger or smaller."""
        for size in settings:
            if not 1 <= size < inf or size != int(size):
                raise SettingError(
                    f"batches of {size:g} examples were asked for", "those are whole, one at least", "Give 64, say."
                )
        given: Any = task
        if not hasattr(task, "batch") or not hasattr(task, "__dataclass_fields__"):
            raise TaskError(
                f"{task.name} was to be trained on with batches of {settings[0]:g}",
                "it has no batch to set",
                "Give a task of secateur.tasks.",
            )
        return _each(model, settings, lambda size: course.train(model, replace(given, batch=int(size))))


@dataclass(frozen=True)
class Rate:
    """The highest learning rate of the dense training, as a multiple of the task's."""

    hotter: ClassVar[str] = "train with a larger learning rate"
    colder: ClassVar[str] = "train with a smaller learning rate"

    def temperature(self, setting: float) -> float:
        """See Knob."""
        return setting

    def train(self, model: nn.Module, task: Task, settings: Sequence[float], course: Course) -> dict[float, Snapshot]:
        """See Knob. Raises SettingError for a rate that is not above 0."""
        for rate in settings:
            if not 0 < rate < inf:
                raise SettingError(
                    f"a learning rate of {rate:g} times the task's was asked for",
                    "it is above 0 and finite",
                    "Give 1 for the task's own.",
                )

        def train(rate: float) -> None:
            optimizer = Retraining(course.steps, rate=rate).optimizer(model, task)
            fit(model, task, course.steps, [LearningRate(course.curve, course.warmup, course.floor)], optimizer)

        return _each(model, settings, train)


@dataclass(frozen=True)
class Radius:
    """The radius of sharpness-aware minimization in the dense training; 0 is plain."""

    adaptive: bool = False  # measured by the size of each weight

    hotter: ClassVar[str] = "train with a larger radius of SAM"
    colder: ClassVar[str] = "train with a smaller radius of SAM"

    def temperature(self, setting: float) -> float:
        """See Knob."""
        return setting

    def train(self, model: nn.Module, task: Task, settings: Sequence[float], course: Course) -> dict[float, Snapshot]:
        """See Knob. Raises SettingError for a radius below 0."""
        rules = {radius: Sam(radius, self.adaptive) for radius in settings}  # all of them, before the first training
        return _each(model, settings, lambda radius: course.train(model, task, more=[rules[radius]]))


def _each(model: nn.Module, settings: Sequence[float], train: Callable[[float], object]) -> dict[float, Snapshot]:
    """A training for each setting, all from one start."""
    start, found = Snapshot.of(model), {}
    for setting in settings:
        start.restore_(model)
        train(setting)
        found[setting] = Snapshot.of(model)
    return found


def family(
    model: nn.Module,
    task: Task,
    knob: Knob,
    settings: Sequence[float],
    course: Course,
    folder: str | Path | None = None,
) -> dict[float, Snapshot]:
    """The dense network at each setting, trained once and good for every density; the model is left as it was.

    In a folder each is kept as a file, named by all that it comes from, and the next call trains what is missing.
    """
    places = dict[float, Path]()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        about = f"{fingerprint(model)}/{task.fingerprint()}/{task.seed}/{knob!r}/{course!r}"
        stem = hashlib.sha256(about.encode()).hexdigest()[:16]
        places = {setting: Path(folder) / f"{stem}-{float(setting)!r}.safetensors" for setting in settings}
    found = {setting: Snapshot.load(place) for setting, place in places.items() if place.exists()}
    if missing := [setting for setting in settings if setting not in found]:
        start = Snapshot.of(model)
        try:
            found |= knob.train(model, task, missing, course)
        finally:
            start.restore_(model)
    for setting in missing if places else ():
        found[setting].save(places[setting])
    return {setting: found[setting] for setting in settings}


# A cell: one dense network, pruned to one density, retrained several times over


@dataclass(frozen=True)
class Cut:
    """Which weights are pruned, and where they are looked for: by size, all at once."""

    allocation: Allocation = Uniform()  # each layer to the same density; Global() compares all of them
    include: tuple[str, ...] = ("Conv2d",)  # convolutions alone: the classifier stays dense; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE

    def masks(self, model: nn.Module, density: float) -> list[Mask]:
        """The largest weights kept, a density of them. Raises SettingError for one outside (0, 1]."""
        check_density(density)
        sites = weights(model, self.include, self.exclude)
        return masks_of(sites, magnitudes(model, sites), self.allocation, 1 - density)


def check_density(density: float) -> None:
    """Raise SettingError unless a share of weights left is in (0, 1]."""
    if not 0 < density <= 1:
        hint = f"Did you mean {density / 100:g}?" if 1 < density <= 100 else "Give 0.05, say."
        raise SettingError(
            f"a density of {density:g} was asked for", "it is the share of weights that stay, in (0, 1]", hint
        )


@dataclass(frozen=True)
class Retrain:
    """How the pruned network is retrained, and how many times over."""

    steps: int  # optimizer steps of each copy
    copies: int = 2  # all from the same weights, in different orders of the data; 3 in the paper
    course: Restart = Fall(Steps(), warmup=0.0)  # the dense recipe again, from its highest learning rate
    last: int = 1  # epochs at whose ends test error is taken, up to the last one; 5 in the paper
    whole: int = 0  # steps of the retraining that this one stands for as a proxy; 0: it stands for itself

    def __post_init__(self) -> None:
        if self.copies < 2:
            raise SettingError(
                f"{self.copies} retrained copies were asked for", "it takes two to be connected", "Give 2 at least."
            )
        if self.steps < 1 or self.last < 1:
            raise SettingError(
                f"{self.steps} steps of retraining, measured at the end of {self.last} epochs, were asked for",
                "it takes one of each at least",
                "Give Retrain(1000), say.",
            )

    def short(self, share: float) -> "Retrain":
        """A cheaper one that stands for this; what it says is a proxy, and is told to be."""
        if not 0 < share <= 1:
            raise SettingError(
                f"a retraining {share:g} times as long was to stand for one of {self.steps} steps",
                "a proxy is shorter",
                "Give a share in (0, 1]: 0.1, say.",
            )
        return replace(self, steps=max(1, round(share * self.steps)), whole=self.whole or self.steps)

    @property
    def proxy(self) -> bool:
        """Whether it is shorter than the one that is meant."""
        return self.steps < self.whole

    def run(
        self, model: nn.Module, task: Task, masks: Sequence[Mask], split: str, epoch: int
    ) -> tuple[list[Candidate], tuple[float, ...]]:
        """The copies, and the test error of each; the model is left under its masks, as it was.

        `epoch` is how many batches make one.
        """
        sites, keep = [mask.site for mask in masks], {mask.site.name: mask.keep for mask in masks}
        given = Retraining(self.steps, epoch=Order.apart, rate=self.course.rate(1.0, 1.0, self.steps))
        ways = [Order().of(number, given) for number in range(self.copies)]
        copies = branch(model, task, sites, keep, ways, self.course, [_Ends(split, self.last, epoch)])
        return copies, tuple(fmean(value for _, value in copy.history.curves[_Ends.curve]) for copy in copies)


class _Ends(Rule):
    """Logs the error at the last step, and at those that are whole epochs before it."""

    curve: ClassVar[str] = "error"

    def __init__(self, split: str, last: int, epoch: int) -> None:
        self.split, self.last, self.epoch = split, last, epoch

    def after_step(self, loop: Loop) -> None:
        """Measure, if this is such a step."""
        left = loop.steps - loop.step
        if left % self.epoch == 0 and left // self.epoch < self.last:
            assert loop.task is not None
            loop.log(self.curve, _error(loop.model, loop.task, self.split))


@dataclass(frozen=True)
class Cell:
    """What was measured of one temperature and one density."""

    setting: float  # of the knob
    density: float  # of the weights that could be pruned, not of all
    dense: float  # test error of the dense network
    errors: tuple[float, ...]  # test error of each copy
    lmc: tuple[float, ...]  # of each pair
    cka: tuple[float, ...]  # of each pair; nan where a copy says the same to every example
    seeds: tuple[int, ...] = (0,)  # of the dense trainings
    proxy: bool = False  # of a retraining shorter than the one meant

    @property
    def error(self) -> float:
        """Test error after pruning and retraining, the mean over copies."""
        return fmean(self.errors)

    @property
    def connected(self) -> float:
        """LMC, the mean over pairs."""
        return fmean(self.lmc)

    @property
    def similar(self) -> float:
        """CKA, the mean over pairs."""
        return fmean(self.cka)


def probe(
    model: nn.Module,
    task: Task,
    density: float,
    retrain: Retrain,
    cut: Cut | None = None,
    meter: Meter | None = None,
    *,
    setting: float = nan,
    split: str = "test",
) -> Cell:
    """Prune a dense network, retrain it several times over and measure; the model is left as it was.

    `setting` is that of the knob it was trained at.
    """
    cut, meter = cut or Cut(), meter or Meter()
    check_density(density)
    meter.check(model, task)
    check_orders(task, 0, [Order.apart, 2 * Order.apart])
    sizes = [batch.size for batch in task.batches("train")]
    start, dense = Snapshot.of(model), _error(model, task, split)
    try:
        masks = cut.masks(model, density)
        apply_(model, masks)
        copies, errors = retrain.run(model, task, masks, split, len(sizes))
        lmc, similar = meter.pairs(model, task, [mask.site for mask in masks], copies, sum(sizes))
    finally:
        start.restore_(model)
    return Cell(setting, density, dense, errors, lmc, similar, (task.seed,), retrain.proxy)


@dataclass(frozen=True)
class Grid:
    """Every temperature at every density; dense networks are trained once."""

    knob: Knob
    settings: tuple[float, ...]
    densities: tuple[float, ...]
    course: Course  # of the dense training
    retrain: Retrain
    cut: Cut = Cut()
    meter: Meter = Meter()
    split: str = "test"  # what error is told of

    def __post_init__(self) -> None:
        if not self.settings or not self.densities:
            raise SettingError(
                "a map of temperatures and densities was to be measured", "one of both is empty", "Give some of each."
            )
        for density in self.densities:
            check_density(density)

    def measure(self, model: nn.Module, task: Task, folder: str | Path | None = None) -> list[Cell]:
        """Its cells, setting after setting; the model is left as it was. See `cells` for one at a time."""
        return list(self.cells(model, task, folder))

    def cells(self, model: nn.Module, task: Task, folder: str | Path | None = None) -> Iterator[Cell]:
        """Each cell as soon as it is measured; dense networks are kept in a folder, if one is given."""
        self.meter.check(model, task)
        start = Snapshot.of(model)
        for setting, state in family(model, task, self.knob, self.settings, self.course, folder).items():
            for density in self.densities:
                state.restore_(model)
                try:
                    cell = probe(
                        model, task, density, self.retrain, self.cut, self.meter, setting=setting, split=self.split
                    )
                finally:
                    start.restore_(model)
                yield cell


def joined(cells: Sequence[Cell]) -> list[Cell]:
    """Cells of several dense seeds as one map: pairs and copies of equal setting and density side by side."""
    found = dict[tuple[float, float], list[Cell]]()
    for cell in cells:
        found.setdefault((cell.setting, cell.density), []).append(cell)
    return [
        Cell(
            setting,
            density,
            fmean(cell.dense for cell in some),
            tuple(value for cell in some for value in cell.errors),
            tuple(value for cell in some for value in cell.lmc),
            tuple(value for cell in some for value in cell.cka),
            tuple(seed for cell in some for seed in cell.seeds),
            any(cell.proxy for cell in some),
        )
        for (setting, density), some in found.items()
    ]


# Regimes


class Regime(Enum):
    """Where a cell lies."""

    POORLY_CONNECTED = "I"
    DISSIMILAR = "II-A"
    SIMILAR = "II-B"
    COLLAPSED = "collapsed"  # a copy says the same to every example

    @property
    def direction(self) -> int:
        """Which way to turn the temperature: up 1, down -1, 0 stay."""
        return {Regime.POORLY_CONNECTED: 1, Regime.DISSIMILAR: -1}.get(self, 0)


@dataclass(frozen=True)
class Placed:
    """The regime of a cell, and how far it is from the next."""

    regime: Regime
    connected_by: float  # LMC + eps, in train error: below 0 in I
    similar_by: float  # CKA - kappa: below 0 in II-A, and in I it does not matter


@dataclass(frozen=True)
class Boundaries:
    """What separates the regimes."""

    eps: float = 0.01  # of train error: how far LMC may be below 0
    kappa: float = 0.9  # of CKA; differs from task to task, so calibrate it

    def __post_init__(self) -> None:
        if not (isfinite(self.eps) and self.eps >= 0 and 0 <= self.kappa <= 1):
            raise SettingError(
                f"boundaries of {self.eps:g} in LMC and {self.kappa:g} in CKA were given",
                "the first is a share of examples, the second a similarity in [0, 1]",
                "Take those of `calibrated`.",
            )

    def place(self, cell: Cell) -> Placed:
        """Where a cell lies."""
        connected, similar = cell.connected + self.eps, cell.similar - self.kappa
        if isnan(similar):
            regime = Regime.COLLAPSED
        elif connected < 0:
            regime = Regime.POORLY_CONNECTED
        else:
            regime = Regime.SIMILAR if similar >= 0 else Regime.DISSIMILAR
        return Placed(regime, connected, similar)


def calibrated(cells: Sequence[Cell]) -> Boundaries:
    """Boundaries of a map: eps is 1 % or two deviations between pairs, kappa lies in the widest gap of sorted CKA.

    The deviation is the median over cells with two pairs or more; the gap is looked for among cells that are connected,
    which kappa is to tell apart, or among all where there are not two of them. Raises EvidenceError for fewer than two
    different values of CKA.
    """
    spreads = [stdev(cell.lmc) for cell in cells if len(cell.lmc) > 1]
    eps = max([0.01, *([2 * median(spreads)] if spreads else [])])
    connected = {cell.similar for cell in cells if cell.connected >= -eps and not isnan(cell.similar)}
    return Boundaries(eps, widest_gap(list(connected) if len(connected) > 1 else [cell.similar for cell in cells]))


def widest_gap(values: Sequence[float]) -> float:
    """The middle of the widest gap between sorted values, the highest of equals; nan are left out."""
    order = sorted({value for value in values if not isnan(value)})
    if len(order) < 2:
        raise EvidenceError(
            f"a boundary was to be found among {len(values)} cells",
            f"they have {len(order)} different values of CKA",
            "Measure a map of several temperatures and densities, or give Boundaries(eps, kappa).",
        )
    low, high = max(pairwise(order), key=lambda gap: (gap[1] - gap[0], gap[1]))
    return (low + high) / 2


@dataclass(frozen=True)
class Advice:
    """Which setting to train at next."""

    setting: float  # that of the cell, where it is to stay
    placed: Placed
    says: str  # in a sentence, with both distances


def advise(cell: Cell, boundaries: Boundaries, knob: Knob, settings: Sequence[float] = ()) -> Advice:
    """The regime of a cell, and the next of some settings in the direction it points to; the cell's own at the end.

    Raises SettingError for a cell that does not say where it stands among them.
    """
    if settings and isnan(cell.setting):
        raise SettingError(
            f"the next of {len(settings)} settings was to be found",
            "the cell does not say at which one its dense network was trained",
            "Say it when measuring: probe(..., setting=800).",
        )
    placed = boundaries.place(cell)
    way = placed.regime.direction
    here = knob.temperature(cell.setting)
    beyond = [s for s in settings if way * (knob.temperature(s) - here) > 0]
    following = min(beyond, key=lambda s: abs(knob.temperature(s) - here)) if beyond else cell.setting
    does = {1: knob.hotter, -1: knob.colder, 0: "stay"}[way]
    if placed.regime is Regime.COLLAPSED:
        does = "prune less: a copy says the same to every example"
    if beyond:
        does += f", {following:g} instead of {cell.setting:g}"
    elif way and settings:
        does += f", but {cell.setting:g} is the last of those given"
    better = (
        " Between copies the error is lower: their retraining was short." if cell.connected > boundaries.eps else ""
    )
    proxy = " Measured after a shorter retraining, which is a proxy." if cell.proxy else ""
    return Advice(
        following,
        placed,
        f"Regime {placed.regime.value}: LMC {cell.connected:+.2%}, {placed.connected_by:+.2%} from its boundary, and "
        f"CKA {cell.similar:.4f}, {placed.similar_by:+.4f} from its own; {does}.{better}{proxy}",
    )


def drawn(cells: Sequence[Cell], boundaries: Boundaries, knob: Knob) -> str:
    """The map in text: hot above, dense to the right; in each cell the regime and the test error in percent.

    The least error of each density is marked.
    """
    named = _one_each(cells)
    densities = list(by_density(cells))
    settings = sorted({cell.setting for cell in cells}, key=knob.temperature, reverse=True)
    least = best(cells)
    lines = [" " * 10 + "".join(f"{density:>16.1%}" for density in densities)]
    for setting in settings:
        line = f"{setting:>10g}"
        for density in densities:
            cell = named.get((setting, density))
            mark = "*" if least[density] == setting else " "
            said = f"{boundaries.place(cell).regime.value} {cell.error:.2%}{mark}" if cell else ""
            line += f"{said:>16}"
        lines.append(line)
    lines.append(
        f"eps {boundaries.eps:.2%} of train error, kappa {boundaries.kappa:.4f}; density of what can be pruned"
    )
    return "\n".join(lines)


# Case studies


def by_density(cells: Sequence[Cell]) -> Mapping[float, list[Cell]]:
    """Cells of each density, in the order of density."""
    return {d: [cell for cell in cells if cell.density == d] for d in sorted({cell.density for cell in cells})}


def _one_each(cells: Sequence[Cell]) -> dict[tuple[float, float], Cell]:
    """Cells by setting and density. Raises EvidenceError where two of several seeds would be taken for one another."""
    found = {(cell.setting, cell.density): cell for cell in cells}
    if len(found) < len(cells):
        raise EvidenceError(
            "a map of temperatures and densities was to be read",
            f"its {len(cells)} cells have {len(found)} places, as those of several seeds do",
            "Join them first: joined(cells); or read the map of one seed.",
        )
    return found


def best(cells: Sequence[Cell]) -> dict[float, float]:
    """The setting of least test error at each density; of equals the first measured. One cell each: see `joined`."""
    _one_each(cells)
    return {density: min(some, key=lambda cell: cell.error).setting for density, some in by_density(cells).items()}


def trend(cells: Sequence[Cell], knob: Knob) -> float:
    """Rank correlation of density and the best temperature there: negative in the paper, whatever the knob.

    With `Radius` this is its case study of SAM: a large radius for low densities, a small one for high.
    """
    found = best(cells)
    return rank_correlation(list(found), [knob.temperature(setting) for setting in found.values()])


@dataclass(frozen=True)
class Move:
    """What came of following the advice by one step."""

    cell: Cell
    advice: Advice
    gain: float  # error here less error there; 0 where it said to stay

    @property
    def moved(self) -> bool:
        """Whether there was somewhere to go."""
        return self.advice.setting != self.cell.setting


def directions(cells: Sequence[Cell], boundaries: Boundaries, knob: Knob) -> list[Move]:
    """The first case study: from each cell of a map one step in the direction that its regime points to."""
    named = _one_each(cells)
    moves = []
    for cell in cells:
        there = [setting for setting, density in named if density == cell.density]
        advice = advise(cell, boundaries, knob, there)
        moves.append(Move(cell, advice, cell.error - named[advice.setting, cell.density].error))
    return moves


def followed(cells: Sequence[Cell], boundaries: Boundaries, knob: Knob, start: float, density: float) -> Cell:
    """Where the advice leads from a setting, at one density, until it says to stay, to turn round, or ends.

    Raises EvidenceError where the map has no such cell.
    """
    named = {setting: cell for (setting, there), cell in _one_each(cells).items() if there == density}
    if start not in named:
        raise EvidenceError(
            f"advice was to be followed from {start:g} at a density of {density:g}",
            f"the map has {', '.join(f'{setting:g}' for setting in named) or 'nothing'} there",
            "Start at a cell that was measured.",
        )
    here, before = named[start], 0
    while True:
        advice = advise(here, boundaries, knob, list(named))
        way = advice.placed.regime.direction
        if advice.setting == here.setting or way == -before:
            return here
        here, before = named[advice.setting], way


def chosen(cells: Sequence[Cell], boundaries: Boundaries) -> Cell:
    """The second case study: of a zoo at one density, the network to prune, by one cheap pair of copies each.

    The most similar of those that are connected; where none is, the best connected. Looks at no test error. Raises
    EvidenceError where all are collapsed.
    """
    there = [cell for cell in cells if not isnan(cell.similar)]
    if not there:
        raise EvidenceError(
            f"one of {len(cells)} networks was to be chosen", "copies of all of them are collapsed", "Prune less."
        )
    connected = [cell for cell in there if cell.connected >= -boundaries.eps]
    if connected:
        return max(connected, key=lambda cell: cell.similar)
    return max(there, key=lambda cell: cell.connected)


def chosen_dense(cells: Sequence[Cell]) -> Cell:
    """The baseline: the network of least test error before it is pruned."""
    return min(cells, key=lambda cell: cell.dense)
