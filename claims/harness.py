"""Measures a claim: every condition with every seed, then a verdict by a rule fixed beforehand.

    python -m claims.harness                    the claims, and how far each is
    python -m claims.harness wanda              measures what is missing, writes results/wanda.json
    python -m claims.harness wanda --only dense --threads 2

A claim is a file `claims/NAME.py` with a `CLAIM` and a function `cell(condition, seed, settings)` that measures one
condition with one seed. Each cell is written to `results/NAME.partial` as soon as it is there, so a run that was
killed goes on where it was. The verdict is calculated here and nowhere else:

    the advantage of a seed     left better than right by this much, on the same seed
    holds                       the 95 % t-interval of the mean advantage lies above the margin
    does not hold at this size  it lies below the margin
    inconclusive                it contains the margin, or the seeds do not differ (fewer than two, or all alike,
                                unless the expectation is of an exact count)

The claim as a whole holds when every central expectation does, and does not when one does not.
"""

import argparse
import hashlib
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from math import comb, exp, isfinite, log
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from secateur.claims import SCHEMA_VERSION, Better, Cell, ClaimResult, Figure, Finding, Verdict
from secateur.errors import EvidenceError, ResumeError, SettingError, did_you_mean
from secateur.outcome import about_machine, about_versions, now
from secateur.report.compare import half_width

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"

Settings = Mapping[str, Any]
Measured = Mapping[str, Mapping[str, float]]  # condition -> metric -> value
Measure = Callable[[str, int, Settings], Mapping[str, float]]  # condition, seed, settings -> metric -> value
Derive = Callable[[Measured], Mapping[str, Mapping[str, float]]]


@dataclass(frozen=True)
class Expectation:
    """That one condition is better than another, by more than a margin.

    A margin of 0 (1 for a ratio) asks for better at all; a negative one (below 1) for not much worse.
    """

    says: str  # "Wanda beats magnitude at 50 %"
    left: str  # the condition that should be better
    right: str | float  # than this condition, or than this number
    metric: str  # "perplexity"
    better: Better = "lower"  # which direction of the metric is better
    margin: float | None = None  # the advantage there must be more of; 0, or 1 for a ratio
    ratio: bool = False  # the advantage as a factor: for perplexities, times and sizes
    central: bool = True  # whether the verdict on the claim hangs on it
    exact: bool = False  # a count, such as bytes or weights, that the seeds cannot change: one value decides

    @property
    def least(self) -> float:
        """The margin that counts."""
        return (1.0 if self.ratio else 0.0) if self.margin is None else self.margin


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what has to come out here for it to hold."""

    name: str  # of the method or study, and of this file
    number: int  # the paper's number here; 0 for baselines
    says: str  # the paper's claim in a sentence, with its figures
    source: str  # "arXiv:2306.11695, table 2"
    here: str  # what is measured instead, in a sentence: model, data, size
    conditions: tuple[str, ...]  # what is measured: "dense", "wanda@0.5"
    expects: tuple[Expectation, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    settings: Settings = field(default_factory=dict)  # what `cell` reads: JSON values
    large: Settings = field(default_factory=dict)  # what --large changes in them
    once: tuple[str, ...] = ()  # conditions without randomness: measured with the first seed, good for all
    derive: Derive | None = None  # further conditions calculated from one seed's measured ones
    version: int = 1  # to be raised when `cell` measures something else under the same settings

    def sized(self, large: bool) -> dict[str, Any]:
        """The settings of a size."""
        return {**self.settings, **(self.large if large else {})}

    def fingerprint(self, large: bool) -> str:
        """A hash of what makes cells comparable."""
        text = json.dumps([self.name, self.version, self.sized(large)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def cells(self) -> list[tuple[str, int]]:
        """Every (condition, seed) to measure: seed after seed, so that early results can be paired."""
        first = self.seeds[0]
        return [(c, s) for s in self.seeds for c in self.conditions if s == first or c not in self.once]


def interval(values: Sequence[float]) -> tuple[float | None, float | None]:
    """The 95 % t-interval of a mean; (None, None) for fewer than two values, or one not finite."""
    if len(values) < 2:
        return None, None
    half = half_width(values)
    return (None, None) if half is None else (fmean(values) - half, fmean(values) + half)


def sign_test(wins: int, losses: int) -> float:
    """Two-sided probability of a split at least as lopsided, were a win as likely as a loss."""
    n = wins + losses
    tail = sum(comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def judge(low: float | None, high: float | None, margin: float) -> Verdict:
    """The verdict on one expectation, from the interval of its advantage."""
    if low is None or high is None or low <= margin <= high:
        return "inconclusive"
    return "holds" if low > margin else "does not hold at this size"


def judge_all(findings: Sequence[Finding]) -> Verdict:
    """The verdict on a claim, from those of its central expectations."""
    verdicts = [f.verdict for f in findings if f.central]
    if "does not hold at this size" in verdicts:
        return "does not hold at this size"
    return "holds" if verdicts and all(v == "holds" for v in verdicts) else "inconclusive"


def find(expected: Expectation, seen: Mapping[int, Measured]) -> Finding:
    """An expectation held against each seed's measurements."""
    advantages: dict[int, float] = {}
    for seed, measured in seen.items():
        left = _value(measured, expected.left, expected.metric)
        right = expected.right
        right = _value(measured, right, expected.metric) if isinstance(right, str) else float(right)
        if expected.ratio and min(left, right) <= 0:
            raise EvidenceError(
                f"the ratio of {expected.left} to {expected.right} was expected in {expected.says!r}",
                f"seed {seed} has {left:g} and {right:g}",
                "Compare values that are not positive by difference.",
            )
        advantage = log(left / right) if expected.ratio else left - right
        advantages[seed] = advantage if expected.better == "higher" else -advantage
    values, back = list(advantages.values()), exp if expected.ratio else float
    mean = fmean(values)
    if len(set(values)) > 1:
        low, high = interval(values)
    else:  # seeds that change nothing are one measurement, however often it is repeated
        low, high = (mean, mean) if expected.exact else (None, None)
    low, high = (None if low is None else back(low)), (None if high is None else back(high))
    least = log(expected.least) if expected.ratio else expected.least
    wins, losses = sum(v > least for v in values), sum(v < least for v in values)
    return Finding(
        says=expected.says,
        left=expected.left,
        right=str(expected.right),
        metric=expected.metric,
        better=expected.better,
        ratio=expected.ratio,
        margin=expected.least,
        central=expected.central,
        advantage=back(mean),
        low=low,
        high=high,
        seeds={seed: back(v) for seed, v in advantages.items()},
        wins=wins,
        sign_p=sign_test(wins, losses),
        verdict=judge(low, high, expected.least),
    )


def _value(measured: Measured, condition: str, metric: str) -> float:
    if condition not in measured:
        raise SettingError(
            f"condition {condition!r} is expected something of", "it is not measured", did_you_mean(condition, measured)
        )
    if metric not in measured[condition]:
        raise SettingError(
            f"{metric!r} of {condition} is expected something of",
            "its cell does not return it",
            did_you_mean(metric, measured[condition]),
        )
    return measured[condition][metric]


def by_seed(claim: Claim, cells: Sequence[Cell]) -> dict[int, dict[str, Mapping[str, float]]]:
    """Each seed's measurements, derived ones too; conditions measured once are every seed's."""
    found: dict[int, dict[str, Mapping[str, float]]] = {seed: {} for seed in claim.seeds}
    for cell in cells:
        for seed in claim.seeds if cell.condition in claim.once else (cell.seed,):
            if seed in found and cell.condition in claim.conditions:
                found[seed][cell.condition] = cell.values
    if claim.derive is not None:
        for measured in found.values():
            measured.update(claim.derive(measured))
    return found


def conclude(claim: Claim, cells: Sequence[Cell], large: bool = False, commit: str = "") -> ClaimResult:
    """The result of a claim whose cells are all there. Pure: the same cells give the same verdict."""
    seen = by_seed(claim, cells)
    findings = [find(expected, seen) for expected in claim.expects]
    figures = []
    for condition in dict.fromkeys([*claim.conditions, *(c for measured in seen.values() for c in measured)]):
        metrics = dict.fromkeys(m for measured in seen.values() for m in measured.get(condition, {}))
        for metric in metrics:
            values = {s: m[condition][metric] for s, m in seen.items() if metric in m.get(condition, {})}
            if condition in claim.once:
                values = {claim.seeds[0]: values[claim.seeds[0]]}
            low, high = interval(list(values.values()))
            figures.append(Figure(condition, metric, fmean(values.values()), low, high, values))
    return ClaimResult(
        schema=SCHEMA_VERSION,
        name=claim.name,
        number=claim.number,
        says=claim.says,
        source=claim.source,
        here=claim.here,
        large=large,
        settings=claim.sized(large),
        seeds=list(claim.seeds),
        verdict=judge_all(findings),
        findings=findings,
        figures=figures,
        cells=list(cells),
        fingerprint=claim.fingerprint(large),
        seconds=sum(cell.seconds for cell in cells),
        created=now(),
        commit=commit,
        machine=about_machine(),
        versions=about_versions(),
    )


class Journal:
    """The cells measured so far, one JSON line each, after a line with the fingerprint of the settings.

    Lines are only ever appended, so two runs of one claim, each with an --only of its own, can share the file.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path, self.fingerprint = path, fingerprint

    @property
    def cells(self) -> list[Cell]:
        """Every cell there is, in the order they were measured, each once."""
        if not self.path.exists():
            return []
        rows = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:  # half a line, of a run that was killed
                continue
        found = rows[0].get("fingerprint", "no fingerprint") if rows else self.fingerprint
        if found != self.fingerprint:
            raise ResumeError(
                f"{self.path.name} was to be continued",
                f"its cells were measured with settings {found}, and the claim's are {self.fingerprint} now",
                "Give --fresh to measure anew, or put the settings back.",
            )
        cells: dict[tuple[str, int], Cell] = {}
        for row in rows[1:]:
            cells.setdefault((row["condition"], row["seed"]), Cell(**row))
        return list(cells.values())

    def has(self, condition: str, seed: int) -> bool:
        """Whether a cell was measured."""
        return any(c.condition == condition and c.seed == seed for c in self.cells)

    def add(self, cell: Cell) -> None:
        """Append a cell; it is on disk when this returns."""
        old = self.path.read_bytes() if self.path.exists() else b""
        text = "" if old else json.dumps({"fingerprint": self.fingerprint}) + "\n"
        text += "\n" if old and not old.endswith(b"\n") else ""
        text += json.dumps(asdict(cell), allow_nan=False) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def paths(name: str, large: bool, where: Path | None = None) -> tuple[Path, Path]:
    """The journal and the result of a claim."""
    stem = f"{name}.large" if large else name
    where = where or RESULTS
    return where / f"{stem}.partial", where / f"{stem}.json"


def measure(
    claim: Claim,
    cell: Measure,
    *,
    large: bool = False,
    only: Sequence[str] = (),
    fresh: bool = False,
    where: Path | None = None,
    say: Callable[[str], None] = print,
) -> ClaimResult | None:
    """Measure the missing cells of a claim; the result, or None while cells are missing still."""
    check(claim)
    unknown = [c for c in only if c not in claim.conditions]
    if unknown:
        raise SettingError(
            f"condition {unknown[0]!r} was asked for",
            f"{claim.name} has none of that name",
            did_you_mean(unknown[0], claim.conditions),
        )
    journal_path, result_path = paths(claim.name, large, where)
    journal_path.parent.mkdir(parents=True, exist_ok=True)
    if fresh:
        journal_path.unlink(missing_ok=True)
    fingerprint, settings = claim.fingerprint(large), claim.sized(large)
    journal = Journal(journal_path, fingerprint)
    before = ClaimResult.read(result_path) if result_path.exists() and not fresh else None
    if before is not None and before.fingerprint != fingerprint:
        before = None
    if before is not None and not journal.cells:  # a seed or a condition more: keep what was measured
        for found in before.cells:
            journal.add(replace(found, processor=found.processor or str(before.machine.get("processor", ""))))
    wanted = [(c, s) for c, s in claim.cells() if not only or c in only]
    missing = [(c, s) for c, s in wanted if not journal.has(c, s)]
    for place, (condition, seed) in enumerate(missing, 1):
        start = time.perf_counter()
        values = {k: float(v) for k, v in cell(condition, seed, settings).items()}
        seconds = time.perf_counter() - start
        for metric, value in values.items():
            if not isfinite(value):
                raise EvidenceError(
                    f"{metric} of {condition} with seed {seed} was measured",
                    f"it is {value}",
                    "A cell returns finite numbers: cap what can diverge, and say so in the claim's settings.",
                )
        journal.add(Cell(condition, seed, values, seconds, str(about_machine()["processor"])))
        shown = "   ".join(f"{k} {v:.6g}" for k, v in values.items())
        say(f"{claim.name}   {place}/{len(missing)}   {condition}   seed {seed}   {shown}   {seconds:.1f} s")
    if any(not journal.has(c, s) for c, s in claim.cells()):
        return None
    kept = set(claim.cells())
    cells = [c for c in journal.cells if (c.condition, c.seed) in kept]
    result = conclude(claim, cells, large, commit())
    if before is not None and _measured(before.cells) == _measured(cells):  # judged anew: say where it was measured
        result = replace(
            result, created=before.created, commit=before.commit, machine=before.machine, versions=before.versions
        )
    result.write(result_path)
    journal_path.unlink(missing_ok=True)
    return result


def _measured(cells: Sequence[Cell]) -> list[tuple[str, int, Mapping[str, float]]]:
    return [(cell.condition, cell.seed, cell.values) for cell in cells]


def check(claim: Claim) -> None:
    """Raise SettingError for a claim that cannot be judged, before anything is measured."""
    if not claim.conditions or not claim.expects or not claim.seeds:
        raise SettingError(
            f"claim {claim.name} was to be measured",
            "it has no conditions, no expectations or no seeds",
            "Give at least one of each.",
        )
    for name in claim.once:
        if name not in claim.conditions:
            raise SettingError(
                f"{name!r} is to be measured once", "it is not a condition", did_you_mean(name, claim.conditions)
            )
    for expected in claim.expects:
        sides = [s for s in (expected.left, expected.right) if isinstance(s, str)]
        for side in sides:
            if side not in claim.conditions and claim.derive is None:
                raise SettingError(
                    f"{expected.says!r} is expected of {side!r}",
                    "it is not a condition",
                    did_you_mean(side, claim.conditions),
                )


def commit() -> str:
    """The commit the code is at, with a + when tracked files differ from it; empty outside a repository."""
    try:
        at = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=HERE, capture_output=True, text=True)
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=HERE, capture_output=True, text=True)
    except OSError:
        return ""
    return at.stdout.strip() + ("+" if dirty.stdout.strip() else "") if at.returncode == 0 else ""


def names() -> list[str]:
    """Every claim by name, sorted."""
    return sorted(p.stem for p in HERE.glob("*.py") if p.stem not in ("harness", "__init__"))


def load(name: str) -> tuple[Claim, ModuleType]:
    """A claim and its module. Raises SettingError, with the nearest name, when there is none."""
    if name not in names():
        raise SettingError(f"claim {name!r} was asked for", "there is none of that name", did_you_mean(name, names()))
    module = importlib.import_module(f"claims.{name}")
    claim = module.CLAIM
    if claim.name != name:
        raise SettingError(
            f"claims/{name}.py was opened", f"its claim is named {claim.name!r}", "Name both after the method."
        )
    return claim, module


def summary(result: ClaimResult) -> list[str]:
    """A result in lines."""
    lines = [f"{f.condition}   {f.metric} {f.mean:.6g}{_shown(f.low, f.high)}" for f in result.figures]
    for f in result.findings:
        sign = "x" if f.ratio else ""
        lines.append(
            f"{f.says}: {f.verdict}   (advantage {f.advantage:.4g}{sign}{_shown(f.low, f.high)}, more than "
            f"{f.margin:g}{sign} on {f.wins} of {len(f.seeds)} seeds, sign test p {f.sign_p:.2g})"
        )
    return [*lines, f"{result.name}: {result.verdict}   {len(result.cells)} cells, {result.seconds:.0f} s"]


def _shown(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None else f" [{low:.4g}, {high:.4g}]"


def listing() -> list[str]:
    """Every claim in a line: how far it is, and the verdict."""
    lines = []
    for name in names():
        journal_path, result_path = paths(name, False)
        if result_path.exists():
            state: str = ClaimResult.read(result_path).verdict
        elif journal_path.exists():
            found = len(journal_path.read_text(encoding="utf-8").splitlines()) - 1
            state = f"{found} of {len(load(name)[0].cells())} cells measured"
        else:
            state = "not measured"
        lines.append(f"{name:24} {state}")
    return lines or ["there are no claims"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m claims.harness", description="Measure a paper's claim again.")
    parser.add_argument("name", nargs="?", help="the claim; without it, all are listed")
    parser.add_argument("--large", action="store_true", help="the large settings")
    parser.add_argument("--only", action="append", default=[], metavar="CONDITION", help="only this condition")
    parser.add_argument("--threads", type=int, help="threads torch may use")
    parser.add_argument("--fresh", action="store_true", help="forget what was measured before")
    given = parser.parse_args(arguments)
    if given.name is None:
        print("\n".join(listing()))
        return 0
    if given.threads:
        import torch

        torch.set_num_threads(given.threads)
    try:
        claim, module = load(given.name)
        result = measure(
            claim,
            module.cell,
            large=given.large,
            only=given.only,
            fresh=given.fresh,
            say=lambda line: print(line, flush=True),
        )
    except (SettingError, EvidenceError, ResumeError) as error:
        print(error, file=sys.stderr)
        return 2
    print("\n".join(summary(result)) if result else f"{claim.name}: cells are missing still")
    return 0


if __name__ == "__main__":
    sys.exit(main())
