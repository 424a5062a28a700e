"""What each paper claims and what was measured here, as the files of `claims/results` have it.

The files come with the package; in a checkout they are read from the repository. They are written by the harness
of `claims/`, verdicts included: nothing in them is typed by hand.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from secateur.errors import ModelError
from secateur.outcome import write_text

SCHEMA_VERSION = 1

Verdict = Literal["holds", "does not hold at this size", "inconclusive"]
Better = Literal["lower", "higher"]


@dataclass(frozen=True)
class Cell:
    """One condition measured with one seed."""

    condition: str  # "wanda@0.5"
    seed: int
    values: dict[str, float]  # "perplexity" -> 23.4
    seconds: float = 0.0
    processor: str = ""  # where it was measured; empty where the result's machine measured all cells


@dataclass(frozen=True)
class Figure:
    """One metric of one condition over the seeds, with the 95 % t-interval of its mean."""

    condition: str
    metric: str
    mean: float
    low: float | None  # None with fewer than two seeds, or where a single measurement serves all of them
    high: float | None
    seeds: dict[int, float]  # each seed's value


@dataclass(frozen=True)
class Finding:
    """An expectation, and what the seeds say to it.

    The advantage of a seed is how much better left is than right: a difference, or a factor when `ratio`; it is
    positive (above one) when left is better, whichever direction is better.
    """

    says: str
    left: str
    right: str  # a condition, or a number
    metric: str
    better: Better
    ratio: bool
    margin: float  # the advantage there must be more of
    central: bool  # whether the verdict on the claim hangs on it
    advantage: float  # the mean (the geometric one for a ratio)
    low: float | None  # its 95 % t-interval, paired by seed
    high: float | None
    seeds: dict[int, float]  # each seed's advantage
    wins: int  # seeds above the margin
    sign_p: float  # two-sided sign test
    verdict: Verdict


@dataclass(frozen=True)
class ClaimResult:
    """A paper's central claim measured again."""

    schema: int
    name: str  # of the method or study, and of the file
    number: int  # the paper's number here; 0 for baselines
    says: str  # the paper's claim in a sentence, with its figures
    source: str  # "arXiv:2306.11695, table 2"
    here: str  # what was measured instead, in a sentence
    large: bool  # whether the settings are the large ones
    settings: dict[str, Any]
    seeds: list[int]
    verdict: Verdict
    findings: list[Finding]
    figures: list[Figure]
    cells: list[Cell]
    fingerprint: str  # of the settings: cells of another fingerprint are not comparable
    seconds: float  # of all cells together
    created: str
    commit: str = ""  # of the code that measured
    machine: dict[str, Any] = field(default_factory=dict)  # the last to measure a cell
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def processors(self) -> list[str]:
        """The processors that measured its cells, each once."""
        last = str(self.machine.get("processor", "an unknown processor"))
        return list(dict.fromkeys(cell.processor or last for cell in self.cells))

    def write(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        write_text(path, json.dumps(asdict(self), indent=1, sort_keys=True, allow_nan=False) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "ClaimResult":
        """Read and check a result. Raises ModelError when the file is not one."""
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(cls).validate_json(Path(path).read_bytes())
        except (ValidationError, OSError) as error:
            raise ModelError(
                f"the result of a claim was to be read from {path}",
                f"it is not one: {str(error).splitlines()[0]}",
                "Measure it again with `make claims NAME=...`.",
            ) from error


def claim_schema() -> dict[str, Any]:
    """The JSON schema of a claim's result."""
    from pydantic import TypeAdapter

    return TypeAdapter(ClaimResult).json_schema()


def folder() -> Path | None:
    """Where the results lie: in the package, or in the checkout it was installed from; None when nowhere."""
    here = Path(__file__).resolve().parent
    for found in (here / "results", here.parents[1] / "claims" / "results"):
        if found.is_dir():
            return found
    return None


def results(*, large: bool = False) -> dict[str, ClaimResult]:
    """Every measured claim by the name of its method, sorted; with the large settings if asked."""
    where = folder()
    if where is None:
        return {}
    found = (ClaimResult.read(path) for path in sorted(where.glob("*.json")))
    return {result.name: result for result in found if result.large == large}
