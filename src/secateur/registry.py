"""Every row of the catalogue with all that is known of it, to be asked by any of it.

Cheng, Zhang, Shi. "A Survey on Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and Recommendations."
TPAMI 2024. arXiv:2308.06767. What a card does not say is derived here: from its other fields, from the settings of the
method, from the results of claims. What cannot be derived is "unknown".

    for row in query(when="after training", family="LLM", gradients="none", updates="none"): print(row.name)
    recommend(Situation(sparse_kernels=False, training=False)).rows

The command line is `secateur list`, with an option for each axis, and `secateur list --recommend`.
"""

import importlib
import pkgutil
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import cache
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from secateur.axes import NM, Allocation, Blocks, Er, Erk, Pattern, Taps, Uniform
from secateur.axes.allocations import ErkPlus, UniformPlus
from secateur.axes.patterns import ChannelBlocks
from secateur.claims import ClaimResult, Verdict, results
from secateur.described import DESCRIBED
from secateur.errors import PatternError, SecateurError, SettingError, did_you_mean
from secateur.method import FAMILIES, SPECIAL_FAMILIES, Card, Method, When, load, names
from secateur.site import Kind
from secateur.vocabulary import ANY, AXES, UNKNOWN

Status = Literal["implemented", "partial", "registry-only"]
Sort = Literal["method", "study", "described"]

NEEDS = ("calibration", "labels", "training")
SINGLE = frozenset({"weight", "block", "cache"})  # kinds of site whose units leave holes; all others leave less

MODELS = {
    "mlp": "MLP",
    "cnn": "CNN",
    "decoder": "LLM",
    "encoder": "BERT",
    "vision transformer": "ViT",
    "rnn": "RNN",
    "moe": "MoE",
    "voxel network": "3D",
}
"""The survey's word for each family."""

LETTERS = {"weight": "W", "block": "B", "channel": "C", "head": "H", "layer": "L"}
"""The letters of the survey's tables; every other kind of site is Other. A filter or neuron is a channel here."""

EXECUTION = {
    "structured": ("dense",),
    "unstructured": ("Bitmap", "Sell8", "Sell16", "SellBlocked", "KBlocked"),
    "N:M": ("NM", "Bitmap"),
    "block": ("Block", "GroupCols", "Bitmap"),
    "1xN": ("GroupCols", "Bitmap"),
    "taps": ("DepthTaps",),
}
"""What a pattern can be run as: dense kernels, or formats of secateur.formats."""

_TRIED: dict[str, Pattern] = {"N:M": NM(2, 4), "block": Blocks(4, 1), "1xN": ChannelBlocks(4), "taps": Taps()}

AXIS_NAMES = (
    "when", "stage", "granularity", "families", "models", "needs", "data", "supervision", "gradients", "updates",
    "criterion", "pattern", "scope", "allocation", "schedule", "retraining", "learns", "fusion", "choice", "start",
    "input", "transfer", "speedup", "execution", "tasks", "status",
)  # fmt: skip
"""Everything a query may ask for."""


@dataclass(frozen=True)
class Remeasured:
    """One expectation of a paper's claim, as it came out here."""

    says: str
    theirs: str  # the paper's claim, with its figures
    source: str
    here: str
    metric: str
    asked: float  # the advantage there had to be more of
    ours: float  # the mean advantage over the seeds
    low: float | None
    high: float | None
    ratio: bool  # whether these are factors
    seeds: int
    verdict: Verdict
    central: bool
    commit: str
    hardware: str

    @property
    def off(self) -> float:
        """How far it is above what was asked for; below, where it is negative. A factor less one, of ratios."""
        return self.ours / self.asked - 1 if self.ratio else self.ours - self.asked


@dataclass(frozen=True)
class Row:
    """A method, a study, or a method that is only described, with its values on every axis."""

    name: str
    sort: Sort
    card: Card
    axes: Mapping[str, frozenset[str]]
    claim: ClaimResult | None = None

    @property
    def status(self) -> Status:
        """Calculated: registry-only without code; partial without a test that pins it, or a paper's claim measured."""
        if self.sort == "described":
            return "registry-only"
        pinned = bool(self.card.checked) or self.sort == "study"
        return "implemented" if pinned and (self.card.number == 0 or self.claim is not None) else "partial"

    @property
    def verdict(self) -> str:
        """What came of its claim here."""
        return self.claim.verdict if self.claim is not None else "not measured"

    @property
    def remeasured(self) -> list[Remeasured]:
        """Every expectation of its claim; none where it was not measured."""
        claim = self.claim
        if claim is None:
            return []
        return [
            Remeasured(
                f.says, claim.says, claim.source, claim.here, f.metric, f.margin, f.advantage, f.low, f.high, f.ratio,
                len(f.seeds), f.verdict, f.central, claim.commit, ", ".join(claim.processors),
            )
            for f in claim.findings
        ]  # fmt: skip

    @property
    def letters(self) -> tuple[str, ...]:
        """Its granularity in the letters of the survey's tables."""
        return tuple(dict.fromkeys(LETTERS.get(kind, "Other") for kind in self.card.granularity))

    @property
    def told(self) -> dict[str, str]:
        """Its values on the axes that the head of a card does not say, each in the order of the words."""
        beside = (axis for axis in AXIS_NAMES if axis not in ("when", "granularity", "families", "models", "needs"))
        return {
            "task" if axis == "tasks" else axis: ", ".join(sorted(self.axes[axis], key=[*words_of(axis), ANY].index))
            for axis in beside
        }

    def has(self, axis: str, values: Iterable[str]) -> bool:
        """Whether it has one of some values on an axis; "any" is all of them but the special families."""
        mine, asked = self.axes[axis], set(values)
        return not mine.isdisjoint(asked) or (ANY in mine and not asked <= set(SPECIAL_FAMILIES))

    def about(self) -> dict[str, Any]:
        """All of it as JSON values."""
        axes = {axis: sorted(values) for axis, values in self.axes.items()}
        return {
            "name": self.name,
            "sort": self.sort,
            "number": self.card.number,
            "title": self.card.title,
            "year": self.card.year,
            "arxiv": self.card.arxiv,
            "venue": self.card.venue,
            **axes,
            "when": self.card.when,
            "granularity": list(self.card.granularity),
            "letters": list(self.letters),
            "families": list(self.card.families),
            "needs": list(self.card.needs),
            "status": self.status,
            "reports": self.card.reports,
            "verdict": self.verdict,
        }


# What is derived


def of_method(name: str, kind: type[Method], claim: ClaimResult | None = None) -> Row:
    """The row of a method."""
    return _row(name, "method", kind.card, patterns_of(kind), allocation_of(kind), claim)


def _row(
    name: str, sort: Sort, card: Card, pattern: frozenset[str], allocation: frozenset[str], claim: ClaimResult | None
) -> Row:
    axes = derived(card, pattern, allocation)
    bare = Row(name, sort, card, axes, claim)
    return Row(name, sort, card, MappingProxyType({**axes, "status": frozenset({bare.status})}), claim)


def derived(
    card: Card, pattern: frozenset[str] = frozenset(), allocation: frozenset[str] = frozenset()
) -> dict[str, frozenset[str]]:
    """A card's values on every axis but `status`; what it says itself comes first.

    `pattern` and `allocation` are what the settings of the method say. Pure.
    """
    trains = "training" in card.needs
    found = {axis: frozenset(getattr(card, axis, ()) or ()) for axis in AXES}
    found["when"], found["needs"] = frozenset({card.when}), frozenset(card.needs) or frozenset({"nothing"})
    found["granularity"], found["families"] = frozenset(card.granularity), frozenset(card.families)
    kinds = FAMILIES if ANY in card.families else card.families
    found["models"] |= {MODELS[kind] for kind in kinds if kind in MODELS}

    def unless(axis: str, *values: str) -> None:
        found[axis] = found[axis] or frozenset(values or (UNKNOWN,))

    unless("criterion")
    unless("tasks")
    unless("stage", *_STAGE.get((card.when, trains), _STAGE.get((card.when, None), ())))
    unless("schedule", *(("one-shot",) if not trains or card.when == "before training" else ()))
    unless("retraining", *_RETRAINING[card.when] if trains else ("none",))
    unless("updates", "trained" if trains else "none")
    unless("learns", "none")
    unless("fusion", "none")
    unless("transfer", "original task")
    criterion = found["criterion"]
    orders = {order for order in ("first", "second") if f"{order}-order" in criterion}
    orders |= {"first"} if trains or "learned" in criterion else set()
    unless("gradients", *(sorted(orders) or ["none"]))
    sees = not criterion <= {"magnitude", "norm", "norm scale", "random", "none", "information"}
    unless("choice", *((UNKNOWN,) if UNKNOWN in criterion else ("data-driven",) if sees else ("data-free",)))
    unless("start", "initialised" if card.when in ("before training", "during training") else "pretrained")
    unless("input", "dynamic" if card.when == "at inference" else "static")
    labels, some = "labels" in card.needs, "calibration" in card.needs or trains
    unless("data", "labels" if labels else "unlabelled" if some else "none")
    taught = trains or not found["gradients"] <= {"none"}
    unless("supervision", "supervised" if labels else "self-supervised" if some and taught else "none")
    found["allocation"] = found["allocation"] or allocation or frozenset({UNKNOWN})
    unless("scope", *sorted({_SCOPE.get(each, "layer-wise") for each in found["allocation"]}))
    removes = criterion != {"none"} or found["allocation"] != {"none"}
    holes, whole = bool(found["granularity"] & SINGLE), bool(found["granularity"] - SINGLE)
    if not removes:  # nothing is taken away
        found["pattern"], holes, whole = frozenset({"unstructured"}), False, False
    blocky = {"block"} if "block" in found["granularity"] else set()
    plain = {"unstructured"} if found["granularity"] & {"weight", "cache"} and not pattern else set()
    found["pattern"] |= (pattern if holes else frozenset()) | blocky | plain | ({"structured"} if whole else set())
    unless("speedup", *(["universal"] * whole + ["specific"] * holes or ["none"]))
    formats = {each for one in found["pattern"] if removes for each in EXECUTION[one]}
    if found["granularity"] == {"cache"}:
        formats = {"BitmapKV"}
    if "quantisation" in found["fusion"]:
        formats = {"BitmapInt8"}
    found["execution"] = frozenset(formats or {"dense"})
    return found


_STAGE: dict[tuple[When, bool | None], tuple[str, ...]] = {
    ("before training", None): ("at initialisation",),
    ("after training", True): ("prune and finetune",),
    ("after training", False): ("one shot",),
    ("around training", None): ("rewinding",),
    ("at inference", None): ("run time",),
    ("recovery", None): ("recovery",),
}

_RETRAINING: dict[When, tuple[str, ...]] = {
    "before training": ("from scratch",),
    "during training": ("none",),
    "after training": ("finetune",),
    "around training": ("weight-rewind",),
    "at inference": ("none",),
    "recovery": ("finetune",),
}

_SCOPE = {"score-driven": "global", "learned": "global", "none": "none", UNKNOWN: UNKNOWN, ANY: ANY}


def patterns_of(kind: type[Method]) -> frozenset[str]:
    """The patterns a method takes: each is tried, and those its `check` refuses are left out.

    Empty for a method without such a setting. A method whose default is N:M takes nothing else that is tried.
    """
    setting = _setting(kind, Pattern)
    if setting is None or setting.default is None:
        return frozenset()
    found = {word for word, pattern in _TRIED.items() if _takes(kind, setting, pattern)}
    return frozenset(found if isinstance(setting.default, NM) else found | {"unstructured"})


def _takes(kind: type[Method], setting: Field[Any], pattern: Pattern) -> bool:
    sparsity = getattr(pattern, "fixed", None) or 0.5
    given: dict[str, Any] = {setting.name: pattern}
    if "sparsity" in {each.name for each in fields(kind)}:  # type: ignore[arg-type]
        given["sparsity"] = sparsity
    try:
        kind(**given).check()
    except (SecateurError, PatternError):
        return False
    return True


def allocation_of(kind: type[Method]) -> frozenset[str]:
    """How a method spends its budget unless told otherwise; empty where that is no setting."""
    setting = _setting(kind, Allocation)
    if setting is None or setting.default is None:
        return frozenset()
    default = setting.default
    if isinstance(default, (Uniform, UniformPlus)):
        return frozenset({"uniform"})
    if isinstance(default, (Erk, ErkPlus)):
        return frozenset({"ERK"})
    if isinstance(default, Er):
        return frozenset({"ER"})
    return frozenset({"by shape" if type(default).__name__ == "SynExp" else "score-driven"})


def _setting(kind: type[Method], part: Any) -> Field[Any] | None:
    hints = get_type_hints(kind)
    settings = (each for each in fields(kind) if part in (hints[each.name], *get_args(hints[each.name])))  # type: ignore[arg-type]
    return next(settings, None)


# The rows


def rows(*, studies: bool = False, described: bool = False) -> list[Row]:
    """Every method, papers of this project first; with studies, and with methods that are only described, if asked."""
    measured = results()
    found = [of_method(name, load(name), measured.get(name)) for name in names()]
    found.sort(key=lambda row: (row.card.number == 0, row.name))
    if studies:
        by_number = {claim.number: claim for claim in measured.values()}  # two files of one paper share its claim
        for name, card in study_cards().items():
            claim = measured.get(name) or (by_number.get(card.number) if card.number else None)
            found.append(_row(name, "study", card, frozenset(), frozenset(), claim))
    if described:
        found += [_row(n, "described", card, frozenset(), frozenset(), None) for n, card in sorted(DESCRIBED.items())]
    return found


@cache
def study_cards() -> dict[str, Card]:
    """The card of each study, by name."""
    import secateur.studies

    found = {}
    for module in pkgutil.iter_modules(secateur.studies.__path__):
        card = getattr(importlib.import_module(f"secateur.studies.{module.name}"), "CARD", None)
        if isinstance(card, Card):
            found[module.name] = card
    return found


def missing(card: Card, *, allocates: bool = False) -> list[str]:
    """The fields that a card must say itself and does not. `allocates`: whether allocation is a setting."""
    axes = derived(card, allocation=frozenset({"uniform"}) if allocates else frozenset())
    asked = ("criterion", "tasks", "stage", "schedule", "allocation")
    return [axis for axis in asked if UNKNOWN in axes[axis] and UNKNOWN not in getattr(card, axis)]


def strange(card: Card) -> list[str]:
    """Values of a card's older fields that no list knows."""
    known = {
        "when": ((card.when,), get_args(When)),
        "granularity": (card.granularity, get_args(Kind)),
        "needs": (card.needs, NEEDS),
        "families": (card.families, (*FAMILIES, *SPECIAL_FAMILIES, ANY)),
    }
    return [f"{axis} {value!r}" for axis, (mine, words) in known.items() for value in mine if value not in words]


# Queries


def query(among: Iterable[Row] | None = None, **asked: str | Sequence[str]) -> list[Row]:
    """The rows that have all that is asked for; of several values of one axis, any.

        query(when="after training", family="LLM", gradients="none", updates="none")
        query(data=("none", "unlabelled"))

    `family` may be one of ours or the survey's word for it; "after" is short for "after training". Raises SettingError
    for an axis or a value that there is none of, with the nearest.
    """
    found = list(rows() if among is None else among)
    for axis, given in asked.items():
        name, values = understood(axis, (given,) if isinstance(given, str) else tuple(given))
        found = [row for row in found if row.has(name, values)]
    return found


def understood(axis: str, values: Sequence[str]) -> tuple[str, tuple[str, ...]]:
    """An axis and values as they are called here. Raises SettingError for those there are none of."""
    name = _ALIASES.get(axis, axis)
    if name not in AXIS_NAMES:
        raise SettingError(
            f"methods were to be found by {axis!r}",
            "there is no such axis",
            did_you_mean(axis, [*AXIS_NAMES, *_ALIASES]),
        )
    known = words_of(name)
    short = {word.removesuffix(" training").removeprefix("at "): word for word in known if name == "when"}
    out = []
    for value in values:
        if name == "families":
            value = {word.lower(): family for family, word in MODELS.items()}.get(value.lower(), value)
        value = short.get(value, value)
        if name == "needs" and value == "none":
            value = "nothing"
        plain = {word.lower().replace(" ", "-"): word for word in known}
        value = value if value in known else plain.get(value.lower().replace(" ", "-"), value)
        if value not in known:
            raise SettingError(
                f"methods with {axis} {value} were asked for",
                f"no {axis} is called {value!r}",
                did_you_mean(value, [*known, *short]),
            )
        out.append(value)
    return name, tuple(out)


def words_of(axis: str) -> tuple[str, ...]:
    """The values an axis can have."""
    own: dict[str, tuple[str, ...]] = {
        "when": get_args(When),
        "granularity": get_args(Kind),
        "needs": (*NEEDS, "nothing"),
        "families": (*FAMILIES, *SPECIAL_FAMILIES),
        "status": get_args(Status),
        "execution": tuple(
            dict.fromkeys([e for each in EXECUTION.values() for e in each] + ["BitmapKV", "BitmapInt8"])
        ),
    }
    return own.get(axis) or (*AXES[axis], UNKNOWN)


_ALIASES = {"family": "families", "task": "tasks", "model": "models"}


def grouped(found: Iterable[Row], axis: str) -> dict[str, list[str]]:
    """The values that some rows have on an axis, each with their names: "which criteria are used with N:M".

    Raises SettingError for an axis that there is not.
    """
    name, _ = understood(axis, ())
    out: dict[str, list[str]] = {}
    for row in found:
        for value in row.axes[name]:
            out.setdefault(value, []).append(row.name)
    order = {word: place for place, word in enumerate(words_of(name))}
    return dict(sorted(out.items(), key=lambda item: (order.get(item[0], len(order)), item[0])))


# The recommendation


Target = Literal["parameters", "flops", "latency", "bytes"]


@dataclass(frozen=True)
class Situation:
    """What the one who asks has, and wants."""

    sparse_kernels: bool = False  # a device or library on which zeros are worth something
    training: bool = True  # can be afforded
    labels: bool = True  # are there for the data
    calibration: bool = True  # some unlabelled examples are there
    pretrained: bool = True  # a trained model is given
    target: Target = "flops"  # what is to be smaller
    family: str | None = None  # of the model: "decoder", "cnn", ...


@dataclass(frozen=True)
class Step:
    """A question, what was answered, and what follows."""

    question: str
    answer: str
    so: str
    left: int  # rows that are left after it


@dataclass(frozen=True)
class Advice:
    """A walk through the questions, the rows it ends in, and what is to be run beside whichever is taken."""

    steps: tuple[Step, ...]
    rows: tuple[Row, ...]
    beside: tuple[str, ...]

    @property
    def commands(self) -> list[str]:
        """The first of the rows and the baselines, compared on the command line."""
        chosen = [*(row.name for row in self.rows[:1]), *self.beside[:2]]
        trains = any("training" in row.card.needs for row in self.rows[:1])
        methods = shlex.quote(",".join(dict.fromkeys(chosen)))  # a shell takes parentheses for its own
        return [f"secateur compare MODEL --methods {methods}{' --epochs 3' if trains else ''}"]


def recommend(situation: Situation, among: Iterable[Row] | None = None) -> Advice:
    """The survey's advice as a list of questions, ending in rows of this catalogue.

    An answer that would leave nothing is told and passed over, but for the family. Best first: claims that held here,
    then papers of this project, then names. Raises SettingError for a target that there is none of, and for a family
    that there is none of or that none of these rows takes.
    """
    s, walk = situation, []
    if s.target not in get_args(Target):
        raise SettingError(
            f"the target {s.target!r} was given", "nothing is measured so", did_you_mean(s.target, get_args(Target))
        )
    found = [
        row
        for row in (rows() if among is None else among)
        if row.status != "registry-only" and not row.has("stage", ("recovery", "run time")) and row.name not in CONTROLS
    ]
    for question, answer, so, asked in _questions(s):
        left = query(found, **asked)
        if "family" in asked and not left:  # what does not take the model is no advice
            raise SettingError(
                f"a method for {s.family} was to be recommended",
                "none but those that work at run time or recover take it",
                f"See `secateur list --family {shlex.quote(asked['family'])}`.",
            )
        if asked.get("speedup") == "universal":  # of several kinds of zeros, those of single weights would gain nothing
            left = [row for row in left if not row.has("speedup", ("specific",))]
        said = so if left else f"{so}; no row here is all of that, so that this was passed over"
        found = left or found
        walk.append(Step(question, answer, said, len(found)))
    order = ("holds", "inconclusive", "not measured", "does not hold at this size")
    found.sort(key=lambda row: (order.index(row.verdict), row.card.number == 0, row.name))
    structured = not s.sparse_kernels or s.target == "latency"
    plain = ("spa(criterion=random)" if structured else "random", "l1_norm" if structured else "magnitude")
    return Advice(tuple(walk), tuple(found), (*plain, SMALL_DENSE))


CONTROLS = ("random", "int8", "magnitude", "l1_norm", "oneshot", "expert_removal")
"""What others are held against, or put together from: never the recommendation itself."""

SMALL_DENSE = "a dense network of the same size, trained as long"


def _questions(s: Situation) -> Iterator[tuple[str, str, str, dict[str, Any]]]:
    def yes(value: bool) -> str:
        return "yes" if value else "no"

    if s.family is not None:
        yield "what is the model?", s.family, f"methods that take one of {s.family}", {"family": s.family}
    kernels = "single weights, N:M or blocks will do" if s.sparse_kernels else "whole structures: dense kernels suffice"
    yield (
        "is there a library or device for sparse kernels?", yes(s.sparse_kernels), kernels,
        {"speedup": "specific" if s.sparse_kernels else "universal"},
    )  # fmt: skip
    given = "pretrained" if s.pretrained else "initialised"
    so = "prune what was trained" if s.pretrained else "prune before or during training"
    if s.training:
        yield "is training affordable?", "yes", "methods that train may be taken", {}
    else:
        yield "is training affordable?", "no", "after training, in one shot", {"stage": "one shot"}
    known = {"labels", "unlabelled", "none"} if s.labels else {"unlabelled", "none"}
    if not s.calibration and not s.labels:
        known = {"none"}
    told = "any supervision" if s.labels else "self-supervised or data-free" if s.calibration else "data-free"
    yield "is labelled data available?", yes(s.labels), told, {"data": tuple(sorted(known))}
    yield "is a trained model given?", yes(s.pretrained), so, {"start": given}
    units = {
        "parameters": "sparsity counts parameters: of=parameters where there is `of`",
        "flops": "count multiply-adds: of=flops where there is `of`; sparsity of weights is not it",
        "latency": "of=latency, and time it: whole structures, or a format measured by `accelerate`",
        "bytes": "of=bytes, or a packed file: `secateur export --to sparse`",
    }
    speed: dict[str, Any] = {"speedup": "universal"} if s.target == "latency" and not s.sparse_kernels else {}
    yield "what is to be smaller?", s.target, units[s.target], speed
