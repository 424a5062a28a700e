"""A model card: what a pruned model is and what it cost, from measured numbers only."""

import json
from collections.abc import Sequence

from secateur.outcome import Record
from secateur.report import figures
from secateur.report.compare import asked
from secateur.report.ledger import lines
from secateur.report.sentence import summary

_SPECIAL = "\\`*_{}[]<>#|~!$"


def model_card(record: Record) -> str:
    """The card of a run's model, as Markdown with the front matter that model hubs read."""
    name = str(record.model.get("name") or "model")
    rows = lines(record)
    target = asked(record.settings)
    about = [("method", record.method)]
    if target is not None:
        about.append(("sparsity asked for", figures.percent(target)))
    about += [
        ("sparsity reached", f"{figures.percent(record.ledger.sparsity)} of {record.ledger.prunable:,} weights"),
        ("sites cut", f"{len(record.sites):,}"),
        ("task", str(record.task.get("name", "not given"))),
        ("seed", str(record.task.get("seed", "not given"))),
        ("made", record.created),
    ]
    measured = [
        (m.split, key, m.when, figures.value(value))
        for m in record.measurements
        for key, value in sorted(m.values.items())
    ]
    parts = [
        "---\ntags:\n- pruned\n- secateur\n---",
        f"# {escape(name)}, pruned with {escape(record.method)}",
        escape(summary(record)),
        _table(("", ""), about),
        "## Quality",
        _table(("split", "value", "when", "measured"), measured) if measured else "Not measured.",
        "## Cost",
        _table(("", "before", "after"), [(r.name, r.before, r.after) for r in rows]),
    ]
    if record.notes:
        parts += ["## Notes", "\n".join(f"- {escape(note)}" for note in record.notes)]
    parts += ["## To make it again"]
    if record.command:
        parts.append(_code(record.command))
    parts += ["Settings:", _code(json.dumps(record.settings, indent=1, sort_keys=True, default=str))]
    made = dict(sorted({**record.machine, **record.versions}.items()))
    parts += ["## Measured on", _table(("", ""), [(k, str(v)) for k, v in made.items()]) if made else "Not recorded."]
    return "\n\n".join(parts) + "\n"


def escape(text: str) -> str:
    """Text as it is meant, whatever Markdown or HTML it looks like, on one line."""
    return "".join(f"\\{c}" if c in _SPECIAL else c for c in " ".join(text.split()))


def _code(text: str) -> str:
    # Indented rather than fenced: no text inside can end the block.
    return "\n".join(f"    {line}" for line in text.splitlines())


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    out = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(out + ["| " + " | ".join(escape(str(cell)) for cell in row) + " |" for row in rows])
