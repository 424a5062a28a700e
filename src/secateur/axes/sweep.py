"""The pipeline that most one-shot methods share: spend the budget, then decide the sites block after block."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from torch import Tensor, nn

from secateur.axes import text_of
from secateur.axes.allocations import Allocation, Measuring, Scores, Uniform
from secateur.axes.criteria import Criterion
from secateur.axes.patterns import Pattern
from secateur.axes.solvers import Solver
from secateur.cut import selected
from secateur.edit import Edit, apply_
from secateur.errors import SettingError
from secateur.evidence import GRADS, INPUTS, Evidence, examples, observe
from secateur.method import Budget
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task
from secateur.walk import Feed, walk

NOTHING: Mapping[str, Evidence] = MappingProxyType({})
"""No evidence of the whole model."""


@dataclass(frozen=True, eq=False)
class BySite:
    """One solver for some sites, another for the rest."""

    names: Collection[str]  # of the sites that `there` decides
    there: Solver
    rest: Solver

    @property
    def needs(self) -> frozenset[str]:
        """What either reads."""
        return self.there.needs | self.rest.needs

    def solve(self, site: Site, tensors: Tensors, seen: Evidence, keep: int) -> list[Edit]:
        """See Solver."""
        return (self.there if site.name in self.names else self.rest).solve(site, tensors, seen, keep)


def refined_sites(model: nn.Module, sites: Sequence[Site], only: Sequence[str]) -> frozenset[str]:
    """The names of the sites whose choice is to be improved: those of a selection, or all for ().

    Raises SettingError when it selects none of them.
    """
    tensor = {site.name: site.parts[0].name for site in sites}
    found = set(selected(model, list(dict.fromkeys(tensor.values())), only)) if only else set(tensor.values())
    if not found:
        raise SettingError(
            f"only {', '.join(only)} of {type(model).__name__} was to be refined",
            "none of the matrices to be pruned is that",
            "Give only=() to refine them all, or another selection.",
        )
    return frozenset(name for name, part in tensor.items() if part in found)


def gradients(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    needs: Collection[str],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> Mapping[str, Evidence]:
    """What the gradients of the model as it is say of each site, one example at a time: in a batch, signs cancel.

    Of what is needed only the gradients are measured; where none is, there is no pass. Give the result to `spread`
    and `sweep`, which put it beside the inputs they measure themselves.
    """
    wanted = frozenset(needs) & GRADS
    return observe(model, sites, examples(batches), wanted, loss) if wanted else NOTHING


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
    whole: Mapping[str, Evidence] = NOTHING,
    task: Task | None = None,
    pattern: Pattern | None = None,
) -> dict[str, int]:
    """Units to keep at each site; where the allocation looks at scores, from one pass over the dense model.

    `whole` is evidence of the whole model that the criterion needs beside the inputs: see `gradients`. The task is for
    allocations that follow the loss. With a `pattern` what an uneven allocation says is `fitted` to it. Raises
    SettingError for an allocation that follows the loss when there is no task or no data.
    """
    keep = allocation.spread(sites, budget, _scores(model, sites, allocation, criterion, batches, whole, task))
    if pattern is None or allocation == Uniform():  # which says what each matrix keeps, not what all keep together
        return keep
    return fitted(sites, keep, pattern)


def _scores(
    model: nn.Module,
    sites: Sequence[Site],
    allocation: Allocation,
    criterion: Criterion,
    batches: Sequence[Batch],
    whole: Mapping[str, Evidence],
    task: Task | None,
) -> Scores | None:
    """What an allocation looks at; None for one that looks at nothing."""
    if isinstance(allocation, Measuring):
        if task is None or not batches:
            raise SettingError(
                f"the allocation {type(allocation).__name__} was asked for",
                "it follows the loss over calibration data, and this method has none",
                "Use oneshot, with the criterion of your choice, or give samples.",
            )
        return allocation.scores_of(model, sites, batches, task)
    if not allocation.needs_scores:
        return None
    inputs = criterion.needs & INPUTS
    seen = dict(observe(model, sites, batches, inputs)) if inputs else {}
    for name, more in whole.items():
        seen[name] = seen.get(name, Evidence()).beside(more)
    return Scored({s.name: s for s in sites}, tensors(model), criterion, seen)


def spendable(allocation: Allocation, pattern: Pattern) -> tuple[Allocation, list[str]]:
    """The allocation and no remark; or uniform, said in words, where the pattern prescribes what every matrix keeps."""
    if pattern.fixed is None or allocation == Uniform():
        return allocation, []
    said = f"{text_of(pattern)} prescribes what every matrix keeps: {text_of(allocation)} has nothing to spend"
    return Uniform(), [said]


def fitted(sites: Sequence[Site], keep: Mapping[str, int], pattern: Pattern) -> dict[str, int]:
    """Counts that a pattern can keep, what is rounded at one site made up for at the next, so that the total holds.

    Raises PatternError for a shape the pattern does not fit.
    """
    found, due = {}, 0
    for site in sites:
        due += keep[site.name]
        found[site.name] = pattern.nearest(site.shape, min(max(due, 0), site.units))
        due -= found[site.name]
    return found


def sweep(
    model: nn.Module,
    sites: Sequence[Site],
    solver: Solver,
    keep: Mapping[str, int],
    batches: Sequence[Batch],
    feed: Feed = "pruned",
    whole: Mapping[str, Evidence] = NOTHING,
) -> list[Edit]:
    """Decide and change every site, block after block, each observed on the inputs that really reach it.

    `whole` is evidence of the whole model that the solver needs beside the inputs, taken before anything is changed:
    see `gradients`. A solver that needs no inputs needs no walk.
    """
    inputs = solver.needs & INPUTS

    def decide(site: Site, named: Tensors, seen: Evidence) -> list[Edit]:
        seen = seen.beside(whole.get(site.name, Evidence()))
        return apply_(model, solver.solve(site, named, seen, keep[site.name]))

    if not inputs:
        named = tensors(model)
        return [edit for site in sites for edit in decide(site, named, Evidence())]
    edits: list[Edit] = []
    for block in walk(model, batches, feed=feed, edits=edits):
        here = block.pick(sites)
        seen = block.observe(here, inputs)
        for site in here:
            edits += decide(site, block.tensors, seen.pop(site.name))  # a gram is given back when it has served
    return edits
