"""What to mind before sparse networks are compared: ten lessons, each a check of what the runs say of themselves.

Liu, Wang. "Ten Lessons We Have Learned in the New 'Sparseland': A Short Handbook for Sparse Neural Network
Researchers." 2023. arXiv:2302.02596. Six lessons are named in its abstract; the other four, and the order, are our
reading.

     1  a sparse network is held against two dense ones: its parent, and one of the same size
     2  single weights and whole structures have different aims, and are two tables
     3  sparse networks are not all pruned ones
     4  who starts dense spends what who starts sparse never does
     5  a mask that moves has to see enough to be worth it
     6  before, during and after training have peers of their own
     7  a mask over a dense network saves neither memory nor time
     8  budgets are equal, and met
     9  random masks with good shares, and magnitude, come first
    10  an easy task hides what goes wrong

A run is told of by a passport; `lint` looks at those of one comparison, and trains nothing. `secateur.report.lessons`
makes passports from run records, and every comparison prints what is found.

    for found in lint(passports): print(found.level, found.lesson, found.message, found.remedy)
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal

from secateur.errors import SettingError
from secateur.method import Card

CARD = Card(
    10, "Ten Lessons We Have Learned in the New 'Sparseland'", arxiv="2302.02596", year=2023,
    granularity=("weight", "channel"), needs=("labels", "training"), criterion=("any",), tasks=("any",), stage=("any",),
    schedule=("any",), allocation=("any",),
)  # fmt: skip

Level = Literal["error", "warning", "info"]
Origin = Literal["dense", "post-training", "dense-to-sparse", "sparse-to-sparse"]
Execution = Literal["dense", "masked", "smaller", "packed"]

SAME_SIZE = 0.02  # two networks are of one size when their parameters that are not zero differ by less
SAME_BUDGET = 0.05  # and of one budget of training
MET = 0.001  # a sparsity is met when it is nearer than this to what was asked for
ENOUGH_SEEDS = 3
ENOUGH_UPDATES = 10  # of a mask that moves
ENOUGH_SEEN = 2.0  # weights a moving mask has to have tried, in multiples of those it keeps
FRAILER = 0.02  # of accuracy, that noise takes more of than of the dense network's
SATURATED = 0.01  # of the dense quality: where a random mask is nearer, the task cannot tell methods apart
RANDOM = ("random", "random_pruning")
MAGNITUDE = ("magnitude", "global_mp", "gradual")
WEIGHTS = frozenset({"weight"})


@dataclass(frozen=True, kw_only=True)
class Passport:
    """What a comparison has to know of one operating point besides its quality."""

    name: str  # of the method, with what tells it from others of its name
    method: str  # the name it is loaded by
    asked: float | None  # sparsity; None without a target
    sparsity: float  # as reached
    denominator: str  # what it is a fraction of: "prunable weights"
    origin: Origin
    when: str  # "before training", ...
    pattern: frozenset[str]  # kinds of site: {"weight"}, {"channel", "head"}
    execution: Execution
    seeds: int
    quality: float | None  # the mean over the seeds; None where it was not measured
    half: float | None = None  # half of the 95 % interval of the quality
    parameters: float  # that are not zero
    flops: float | None = None  # of a forward pass, as if dense
    faster: bool = False  # whether the comparison says that it is faster than the dense network
    steps: int | None = None  # of training
    compute: float | None = None  # operations of training, zeros counted as free
    mean_density: float | None = None  # over training
    peak_density: float | None = None
    updates: int | None = None  # of a mask that moves; None for one that stays
    explored: float | None = None  # the fraction of the weights that were ever there
    noisy: float | None = None  # accuracy with noise on the inputs
    calibration: float | None = None  # how far confidence is from being right, in [0, 1]

    def __post_init__(self) -> None:
        if not self.denominator:
            raise SettingError(
                f"a sparsity of {self.sparsity:g} of {self.name} was to be compared",
                "it is not said what it is a fraction of",
                "Give the denominator, such as 'prunable weights'.",
            )

    @property
    def place(self) -> str:
        """Its name and the sparsity it was asked for."""
        return self.name if self.asked is None else f"{self.name} at {self.asked:.0%}"

    @property
    def moves(self) -> bool:
        """Whether its mask moved in training."""
        return self.updates is not None

    @property
    def trained(self) -> bool:
        """Whether it was trained sparse, or towards it."""
        return self.origin in ("dense-to-sparse", "sparse-to-sparse")


@dataclass(frozen=True)
class Finding:
    """What a lesson says to a comparison, and what can be done about it."""

    level: Level
    lesson: int  # 1 to 10
    message: str
    remedy: str


Check = Callable[["Comparison"], Iterator[Finding]]


@dataclass(frozen=True)
class Comparison:
    """The passports of one table."""

    passports: tuple[Passport, ...]
    dense: float | None  # quality of the network before, or of the dense one trained for as long
    higher: bool  # whether more of the quality is better
    noisy: float | None = None  # the accuracy of the dense network with noise on its inputs

    @property
    def sparse(self) -> list[Passport]:
        """Those from which something was removed."""
        return [p for p in self.passports if p.origin != "dense" and p.sparsity > 0]

    @property
    def twins(self) -> list[Passport]:
        """Smaller dense networks."""
        return [p for p in self.passports if p.origin == "dense" and p.asked]

    def ahead(self, one: float, other: float) -> float:
        """How much better one quality is than another."""
        return one - other if self.higher else other - one


def lint(
    passports: Sequence[Passport], dense: float | None = None, higher: bool = True, dense_noisy: float | None = None
) -> list[Finding]:
    """What the ten lessons say to a comparison, the gravest first: a pure function of what is given.

    `dense` is the quality of the dense network, `higher` whether more is better, `dense_noisy` its accuracy with noise
    on the inputs.
    """
    seen = Comparison(tuple(passports), dense, higher, dense_noisy)
    found = [finding for check in CHECKS for finding in check(seen)]
    return sorted(found, key=lambda f: (("error", "warning", "info").index(f.level), f.lesson))


def dense_pair(seen: Comparison) -> Iterator[Finding]:
    """1: the parent, and a dense network of the same size."""
    if not seen.sparse:
        return
    if seen.dense is None:
        yield Finding(
            "warning",
            1,
            "the dense network itself was not measured",
            "Measure it: measure='val', or `secateur compare`.",
        )
    unmatched = [p for p in seen.sparse if p.trained and not any(_as_large(p, twin) for twin in seen.twins)]
    near = {twin.asked: twin for twin in seen.twins}
    alone = [p for p in unmatched if p.asked not in near]
    other = [p for p in unmatched if p.asked in near]
    if other:
        apart = max(abs(near[p.asked].parameters / max(p.parameters, 1) - 1) for p in other)
        yield Finding(
            "warning",
            1,
            f"the dense networks beside {_places(other)} differ from them in size, by up to {apart:.0%}",
            "Wider networks can be cut nearer to a size.",
        )
    if alone:
        yield Finding(
            "warning",
            1,
            f"there is no dense network as large as {_places(alone)}",
            "`secateur compare MODEL --methods ... --epochs N` trains one beside every sparsity.",
        )


def two_tables(seen: Comparison) -> Iterator[Finding]:
    """2: single weights apart from structures; speed only where something is really smaller, or packed."""
    for p in seen.sparse:
        if p.faster and p.execution == "masked":
            yield Finding(
                "error",
                2,
                f"{p.place} is said to be faster, and is a dense network with zeros in it",
                "Cut or pack it first (`accelerate`, `secateur export --to sparse`), and time that.",
            )
    single = [p for p in seen.sparse if p.pattern == WEIGHTS]
    whole = [p for p in seen.sparse if p.pattern and not p.pattern & WEIGHTS]
    if single and whole:
        yield Finding(
            "warning",
            2,
            f"single weights ({_names(single)}) and structures ({_names(whole)}) are in one table: at equal sparsity "
            "the first keep more quality, and only the second are smaller as they are",
            "Rank within each kind, and look at work and time besides.",
        )


def not_all_pruned(seen: Comparison) -> Iterator[Finding]:
    """3: who starts sparse was not pruned."""
    sparse = [p for p in seen.sparse if p.origin == "sparse-to-sparse"]
    if sparse:
        yield Finding(
            "info",
            3,
            f"{_names(sparse)}: trained sparse from the start, not pruned",
            "Call it sparse training where it is reported.",
        )


def different_origins(seen: Comparison) -> Iterator[Finding]:
    """4: a ranking over origins, at one sparsity, needs what training cost."""
    trained = [p for p in seen.sparse if p.trained]
    levels = [[p for p in trained if p.asked == asked] for asked in dict.fromkeys(p.asked for p in trained)]
    mixed = [p for level in levels if len({p.origin for p in level}) > 1 and not _as_dear(level) for p in level]
    dense, sparse = ([p for p in mixed if p.origin == o] for o in ("dense-to-sparse", "sparse-to-sparse"))
    if not mixed:
        return
    spent = [p.compute for p in mixed]
    known = [c for c in spent if c is not None]
    peaks = [p.peak_density for p in sparse if p.peak_density is not None]
    held = f", and never held more than {max(peaks):.0%} of the weights" if peaks and len(peaks) == len(sparse) else ""
    cost = (
        f"it took {min(known):.3g} to {max(known):.3g} operations" if len(known) == len(spent) else "cost is not known"
    )
    yield Finding(
        "warning",
        4,
        f"{_places(dense)} began dense and {_places(sparse)} sparse{held}: {cost}",
        "Rank them at equal training compute: give those that are cheaper more steps.",
    )


def enough_exploration(seen: Comparison) -> Iterator[Finding]:
    """5: a moving mask with too few updates, or that saw too little."""
    for p in seen.sparse:
        if not p.moves or p.updates is None:
            continue
        few = p.updates < ENOUGH_UPDATES
        density = 1 - p.sparsity
        enough = ENOUGH_SEEN * density  # all there is and more, where half of it is kept: that is not asked
        little = p.explored is not None and p.explored < enough < 1
        if few or little:
            tried = "" if p.explored is None else f", and tried {p.explored:.1%} of the weights to keep {density:.1%}"
            yield Finding(
                "warning",
                5,
                f"the mask of {p.place} moved {p.updates} times{tried}: hardly more than one that stays",
                "Give it more steps, or a smaller `every`.",
            )


def peers(seen: Comparison) -> Iterator[Finding]:
    """6: methods of different moments in one table need cost columns."""
    moments = sorted({p.when for p in seen.sparse})
    unknown = [p for p in seen.sparse if p.compute is None]
    if len(moments) > 1 and unknown:
        yield Finding(
            "warning",
            6,
            f"methods of different moments are in one table ({', '.join(moments)}), and what training cost is not "
            f"known of {_names(unknown)}",
            "Compare within one moment, or with --epochs, which counts operations.",
        )


def simulated(seen: Comparison) -> Iterator[Finding]:
    """7: masked is not sparse."""
    masked = [p for p in seen.sparse if p.execution == "masked"]
    if masked:
        yield Finding(
            "info",
            7,
            f"{_names(masked)}: masked-dense (simulated), as large and as slow as the dense network",
            "`secateur export --to sparse` or `accelerate` makes bytes and time of zeros.",
        )


def equal_budgets(seen: Comparison) -> Iterator[Finding]:
    """8: as many steps for all, or operations; sparsity as asked; seeds enough for an interval."""
    for p in seen.passports:
        if p.origin != "dense" and p.asked is not None and abs(p.sparsity - p.asked) > MET:
            yield Finding(
                "warning",
                8,
                f"{p.place} reached {p.sparsity:.2%} of the {p.denominator} where {p.asked:.2%} was asked for",
                "Compare it at what it reached.",
            )
    trained = [p for p in seen.passports if p.steps]
    longest = max(trained, key=lambda p: (p.steps or 0, p.compute or 0.0), default=None)
    most = 0 if longest is None else longest.steps or 0
    short = [p for p in trained if (p.steps or 0) < most * (1 - SAME_BUDGET)]
    equal = [p for p in short if longest is not None and _as_dear([p, longest])]  # dearer steps, so fewer of them
    if equal:
        yield Finding(
            "info",
            8,
            f"{_names(equal)} trained for fewer steps than the longest of {most:,}, and as many operations",
            "Say so: what more steps on the same data reach is another claim.",
        )
    if short := [p for p in short if p not in equal]:
        yield Finding(
            "warning",
            8,
            f"{_names(short)} trained for fewer steps than the longest of {most:,}",
            "Give all as many, or an extended dense twin: `secateur compare --epochs N`.",
        )
    few = [p for p in seen.sparse if p.seeds < ENOUGH_SEEDS]
    if few:
        least = min(p.seeds for p in few)
        yield Finding(
            "warning",
            8,
            f"{_names(few)}: {least} seed{'s' * (least > 1)}, so no difference is sure",
            f"Give --seeds {ENOUGH_SEEDS} or more.",
        )


def baselines_first(seen: Comparison) -> Iterator[Finding]:
    """9: random masks and magnitude beside every method, at its sparsity; the gain is over the better.

    Structures are not held against masks of single weights (see 2), nor what was trained against what was not.
    """
    naive = (*RANDOM, *MAGNITUDE)
    single = [p for p in seen.sparse if not p.pattern or p.pattern & WEIGHTS]
    methods = {(p.asked, p.trained) for p in single if p.asked is not None and p.method not in naive}
    for asked, trained in sorted(methods):
        here = [p for p in single if p.asked is not None and abs(p.asked - asked) < MET and p.trained == trained]
        missing = [
            name
            for name, methods in (("random masks", RANDOM), ("magnitude", MAGNITUDE))
            if not any(p.method in methods for p in here)
        ]
        if missing:
            verb = "secateur compare --epochs N" if trained else "secateur compare"
            yield Finding(
                "warning",
                9,
                f"at {asked:.0%} there is nothing of {' and '.join(missing)} beside the methods",
                f"`{verb}` adds both; give random masks ERK shares where layers differ.",
            )
            continue
        best = _best(seen, [p for p in here if p.method in naive])
        ours = _best(seen, [p for p in here if p.method not in naive])
        if best is not None and ours is not None and best.quality is not None and ours.quality is not None:
            gain = seen.ahead(ours.quality, best.quality)
            unsure = ours.half is not None and best.half is not None and abs(gain) <= ours.half + best.half
            told = ", which these seeds do not tell from nothing" if unsure else ""
            yield Finding(
                "info" if gain > 0 or unsure else "warning",
                9,
                f"at {asked:.0%} {ours.name} is {abs(gain):.3g} {'ahead of' if gain > 0 else 'behind'} {best.name}, "
                f"the best that needs no method{told}",
                "Report the gain over that, not over the worst.",
            )


def easy_task(seen: Comparison) -> Iterator[Finding]:
    """10: where a random mask is as good as the dense network nothing can be told apart; and accuracy is not all."""
    if seen.dense is None or not isfinite(seen.dense):
        return
    for p in seen.sparse:
        if p.noisy is None or p.quality is None or seen.noisy is None or not isfinite(p.quality):
            continue
        more = (p.quality - p.noisy) - (seen.dense - seen.noisy)
        if more > FRAILER:
            yield Finding(
                "warning",
                10,
                f"noise on the inputs takes {p.quality - p.noisy:.3f} of the accuracy of {p.place}, "
                f"{seen.dense - seen.noisy:.3f} of the dense network's",
                "Report the accuracy under noise besides.",
            )
    for p in seen.sparse:
        if p.method not in RANDOM or p.quality is None or not isfinite(p.quality):
            continue
        if seen.ahead(seen.dense, p.quality) <= SATURATED * abs(seen.dense):
            yield Finding(
                "warning",
                10,
                f"a random mask at {p.sparsity:.0%} is within {SATURATED:.0%} of the dense network: this task "
                "cannot tell methods apart there",
                "Take a higher sparsity or a harder task.",
            )


CHECKS: tuple[Check, ...] = (
    dense_pair,
    two_tables,
    not_all_pruned,
    different_origins,
    enough_exploration,
    peers,
    simulated,
    equal_budgets,
    baselines_first,
    easy_task,
)
"""In the order of the lessons."""


def _as_large(sparse: Passport, twin: Passport) -> bool:
    return abs(twin.parameters - sparse.parameters) <= SAME_SIZE * sparse.parameters


def _as_dear(passports: Sequence[Passport]) -> bool:
    """Whether all took as many operations of training."""
    known = [p.compute for p in passports if p.compute is not None]
    return len(known) == len(passports) and max(known) <= min(known) * (1 + SAME_BUDGET)


def _best(seen: Comparison, among: Sequence[Passport]) -> Passport | None:
    known = [p for p in among if p.quality is not None and isfinite(p.quality)]
    return max(known, key=lambda p: seen.ahead(p.quality or 0.0, 0.0), default=None)


def _names(passports: Sequence[Passport]) -> str:
    return _listed(p.name for p in passports)


def _places(passports: Sequence[Passport]) -> str:
    return _listed(p.place for p in passports)


def _listed(found: Iterable[str]) -> str:
    names = list(dict.fromkeys(found))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
