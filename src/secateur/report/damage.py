"""Damage in words and numbers: which examples got worse, and where the answers changed."""

import math
import statistics
from collections.abc import Sequence
from typing import Any

from secateur.report.compare import Point


def damage_table(found: Sequence[Point]) -> list[dict[str, Any]]:
    """A row per method and sparsity, averaged over the seeds that were looked at.

    Keys: method, asked, examples, what, worse (share of the examples), median and most (rise of the loss in nats,
    infinite where it diverged), flips, lost, gained (shares of the predictions). Empty when nothing was looked at.
    """
    rows = []
    for p in found:
        every = [r.damage for r in p.records if r.damage is not None]
        if not every:
            continue
        rows.append(
            {
                "method": p.series,
                "asked": p.asked,
                "examples": every[0].examples,
                "what": every[0].what,
                "worse": statistics.fmean(d.worse / d.examples for d in every),
                "median": statistics.fmean(statistics.median(d.differences) for d in every),
                "most": max(max(d.differences) for d in every),
                "flips": statistics.fmean(d.flips for d in every),
                "lost": statistics.fmean(d.lost for d in every),
                "gained": statistics.fmean(d.gained for d in every),
            }
        )
    return rows


def rise(value: float) -> str:
    """A difference of losses with its sign.

    >>> rise(0.123456), rise(-2.0), rise(float("inf"))
    ('+0.123', '-2.000', 'diverged')
    """
    return f"{value:+.3f}" if math.isfinite(value) else "diverged"
