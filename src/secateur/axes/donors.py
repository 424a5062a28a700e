"""Layers keep as much as in somebody else's mask: allocation without selection."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from secateur.axes.allocations import Global, Scores
from secateur.axes.probes import Probe, Snip
from secateur.method import Budget
from secateur.site import Site


@dataclass(frozen=True)
class Donor:
    """As many everywhere as the best mask by a probe's scores would keep: allocation without selection."""

    probe: Probe = Snip()

    needs_scores: ClassVar[bool] = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation; the scores are the probe's."""
        return Global().spread(sites, budget, scores)
