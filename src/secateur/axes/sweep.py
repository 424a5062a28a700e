"""The pipeline that most one-shot methods share: spend the budget, then decide the sites block after block."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from secateur.axes.allocations import Allocation
from secateur.axes.criteria import Criterion
from secateur.axes.solvers import Solver
from secateur.edit import Edit, apply_
from secateur.evidence import Evidence, observe
from secateur.method import Budget
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch
from secateur.walk import Feed, walk


@dataclass(frozen=True, eq=False)
class Scored(Mapping[str, Tensor]):
    """Scores computed when they are asked for, so that no more than one site's need exist at a time."""

    sites: Mapping[str, Site]
    named: Tensors
    criterion: Criterion
    seen: Mapping[str, Evidence]

    def __getitem__(self, name: str) -> Tensor:
        return self.criterion.score(self.sites[name], self.named, self.seen.get(name, Evidence()))

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)


def spread(
    model: nn.Module,
    sites: Sequence[Site],
    allocation: Allocation,
    budget: Budget,
    criterion: Criterion,
    batches: Sequence[Batch],
) -> dict[str, int]:
    """Units to keep at each site; where the allocation looks at scores, from one pass over the dense model."""
    if not allocation.needs_scores:
        return allocation.spread(sites, budget)
    seen = observe(model, sites, batches, criterion.needs) if criterion.needs else {}
    return allocation.spread(sites, budget, Scored({s.name: s for s in sites}, tensors(model), criterion, seen))


def sweep(
    model: nn.Module,
    sites: Sequence[Site],
    solver: Solver,
    keep: Mapping[str, int],
    batches: Sequence[Batch],
    feed: Feed = "pruned",
) -> list[Edit]:
    """Decide and change every site, block after block, each observed on the inputs that really reach it.

    A solver that needs no evidence needs no walk.
    """
    if not solver.needs:
        named = tensors(model)
        return [e for site in sites for e in apply_(model, solver.solve(site, named, Evidence(), keep[site.name]))]
    edits: list[Edit] = []
    for block in walk(model, batches, feed=feed, edits=edits):
        here = block.pick(sites)
        seen = block.observe(here, solver.needs)
        for site in here:
            edits += apply_(model, solver.solve(site, block.tensors, seen[site.name], keep[site.name]))
    return edits
