"""Any criterion of single weights as one of whole units.

A unit owns rows of some tensors and columns of others. What a criterion says of their elements is summed over each
share, the shares are combined, and the scores of a site are divided by their mean or the like, so that sites can be
compared (Wang, Rong, Cao, Cai, Xu, Gu. "Structurally Prune Anything: Any Architecture, Any Framework, Any Time", 2024,
arXiv:2403.18955, section 3.3). `JointObs` scores and mends at the matrices that read the units (section 3.4, OBSPA).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.criteria import Criterion, measured
from secateur.axes.probes import Probe
from secateur.axes.taylor import Combine
from secateur.edit import Edit, Update
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import GRADS, INPUTS, Evidence, examples, observe
from secateur.site import Part, Site, Tensors, tensors
from secateur.task import Batch, Task


class Normal(Protocol):
    """How the scores of one site are made comparable with those of another."""

    def of(self, score: Tensor) -> Tensor:
        """[units] -> [units], in the same order."""
        ...


@dataclass(frozen=True)
class ByMean:
    """Divided by their mean: one is what a unit of the site is worth on average."""

    def of(self, score: Tensor) -> Tensor:
        """See Normal."""
        return score / score.abs().mean().clamp(min=1e-30)


@dataclass(frozen=True)
class BySum:
    """Divided by their sum: units of wide sites are worth less each."""

    def of(self, score: Tensor) -> Tensor:
        """See Normal."""
        return score / score.abs().sum().clamp(min=1e-30)


@dataclass(frozen=True)
class ByLargest:
    """Divided by the largest."""

    def of(self, score: Tensor) -> Tensor:
        """See Normal."""
        return score / score.abs().max().clamp(min=1e-30)


@dataclass(frozen=True)
class AsTheyAre:
    """Left alone: sites of larger weights keep more."""

    def of(self, score: Tensor) -> Tensor:
        """See Normal."""
        return score


@runtime_checkable
class OfUnits(Protocol):
    """A criterion that says itself what a unit is worth at a tensor, rather than element by element."""

    def share(self, part: Part, units: int, tensors: Tensors, seen: Evidence) -> Tensor:
        """One value per unit [units], float64."""
        ...


def by_unit(part: Part, units: int, values: Tensor) -> Tensor:
    """Sums over what each unit owns of a tensor as seen [units], float64."""
    assert part.axis is not None and part.owner is not None, "coupled units are along one axis"
    owner = part.owner.reshape(-1).to(values.device)
    slices = values.double().sum([a for a in range(values.dim()) if a != part.axis]) if values.dim() > 1 else values
    mine = owner >= 0
    found = torch.zeros(units, dtype=torch.float64, device=values.device)
    return found.index_add(0, owner[mine], slices.double()[mine])


def member(part: Part) -> Site:
    """One tensor of a site, as seen, each element a unit."""
    whole = Part(part.name, part.shape, index=part.index, turned=part.turned, itemsize=part.itemsize)
    return Site(part.key, "weight", part.shape, (whole,))


def readers(site: Site) -> list[Part]:
    """The matrices and kernels that read a site's units, a column or more each."""
    return [part for part in site.parts if part.axis == 1 and len(part.shape) > 1]


def grouped_scores(
    model: nn.Module,
    sites: Sequence[Site],
    criterion: Criterion | Probe,
    combine: Combine,
    normal: Normal,
    batches: Sequence[Batch],
    task: Task,
    sparsity: float,
) -> dict[str, Tensor]:
    """One score per unit of each site. Raises EvidenceError, naming the site, where nothing was seen of it.

    A criterion of inputs sees matrices and kernels, one of weights or gradients biases and norms too. What is tied is
    one tensor and counts once.
    """
    named = tensors(model)
    learnt = {id(p) for p in model.parameters()}
    inputs = not isinstance(criterion, Probe) and bool(criterion.needs & INPUTS)
    wide = inputs or isinstance(criterion, Probe)
    shares: dict[str, dict[int, Part]] = {}
    for site in sites:
        parts = readers(site) if isinstance(criterion, OfUnits) else site.parts
        mine = [p for p in parts if id(named[p.name]) in learnt and (len(p.shape) > 1 or not wide)]
        shares[site.name] = {hash((id(named[p.name]), p.index, p.axis)): p for p in mine}
    members = {part.key: member(part) for each in shares.values() for part in each.values()}
    given: Mapping[str, Tensor] = {}
    seen: Mapping[str, Evidence] = {}
    if isinstance(criterion, Probe):
        read = criterion.read(model, list(members.values()), task, sparsity).scores
        given = {name: score.nan_to_num(neginf=0.0) for name, score in read.items()}  # gone in an earlier round
    elif criterion.needs:
        alone = examples(batches) if criterion.needs & GRADS else batches
        seen = observe(model, list(members.values()), alone, criterion.needs, task.loss)
    found = {}
    for site in sites:
        values = []
        for part in shares[site.name].values():
            here = seen.get(part.key, Evidence())
            if inputs and not here.count:
                continue  # a table of embeddings, say: nothing flows into it
            if isinstance(criterion, OfUnits):
                values.append(criterion.share(part, site.units, named, here))
            elif isinstance(criterion, Probe):
                values.append(by_unit(part, site.units, given[part.key]))
            else:
                score = criterion.score(members[part.key], named, here)
                values.append(by_unit(part, site.units, score.reshape(part.shape)))
        if not values:
            raise EvidenceError(
                f"{site.name} was to be scored", "nothing that flows into its matrices was seen",
                "Protect it, or use a criterion of weights.",
            )  # fmt: skip
        found[site.name] = normal.of(combine.of(torch.stack(values))).float().cpu()
    return found


# Optimal brain surgery on whole units


@dataclass(frozen=True)
class JointObs:
    """A unit matters by the error its loss leaves at what reads it, when all other inputs may make up for it.

    With H the damped gram of a reader's inputs and P the columns that read a unit, tr(W_P ([H^-1]_PP)^-1 W_P^T): for
    one column sum_o W[o, p]^2 / [H^-1]_pp (section 3.4). Tensors that write the unit add nothing.
    """

    damp: float = 0.01  # added to the diagonal of the gram, as a share of its mean

    needs: ClassVar[frozenset[str]] = frozenset({"gram"})

    def __post_init__(self) -> None:
        check_damp(self.damp)

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """Of a single matrix, each column for itself: W^2 / [H^-1]_jj."""
        weight = site.parts[0].read(tensors).detach().double()
        grams = damped(measured(site, seen, "gram"), self.damp)
        scale = torch.stack([solved(h, torch.eye(len(h), dtype=h.dtype), site.name).diagonal() for h in grams])
        rows = scale.repeat_interleave(weight.shape[0] // len(scale), dim=0)
        return (weight.square() / rows.reshape(weight.shape[0], *weight.shape[1:])).float()

    def share(self, part: Part, units: int, tensors: Tensors, seen: Evidence) -> Tensor:
        """See OfUnits."""
        weight = part.read(tensors).detach().double().flatten(1)
        columns = _columns(part)
        found = torch.zeros(units, dtype=torch.float64)
        grams = damped(measured(member(part), seen, "gram"), self.damp)
        for own, gram in zip(weight.chunk(len(grams)), grams, strict=True):
            inverse = solved(gram, torch.eye(len(gram), dtype=gram.dtype), part.name)
            mine = columns[columns >= 0]
            if int(torch.bincount(mine).max()) == 1:  # a column each
                found[mine] += (own.square().sum(0) / inverse.diagonal())[columns >= 0]
                continue
            for unit in range(units):
                place = (columns == unit).nonzero().reshape(-1)
                block, read = inverse[place][:, place], own[:, place]
                found[unit] += (solved(block, read.T, part.name) * read.T).sum()
        return found


def _columns(part: Part) -> Tensor:
    """Which unit each column of a flattened matrix or kernel reads [in * kh * kw]; -1 for none."""
    assert part.owner is not None
    return part.owner.reshape(-1).repeat_interleave(prod(part.shape[2:]))


def _alive(part: Part, keep: Tensor) -> Tensor:
    """Which columns of a flattened matrix or kernel read no unit that goes."""
    columns = _columns(part)
    return (columns < 0) | keep.reshape(-1)[columns.clamp(min=0)]


def damped(gram: Tensor, damp: float) -> list[Tensor]:
    """Grams [in, in] of each group of a convolution, made invertible: inputs that are always zero too."""
    found = []
    for each in gram.double() if gram.dim() == 3 else [gram.double()]:
        mean = each.diagonal().mean().clamp(min=1e-12)
        found.append(each + damp * mean * torch.eye(len(each), dtype=torch.float64))
    return found


def check_damp(damp: float) -> None:
    """Raise SettingError for a share of the diagonal that would make a gram less invertible, or is no number."""
    if not (isfinite(damp) and damp >= 0):
        raise SettingError(f"damp={damp:g} was given", "it adds to a diagonal: 0 or more, and finite", "Give 0.01.")


def solved(gram: Tensor, right: Tensor, name: str) -> Tensor:
    """The inverse of a gram times what stands to its right. Raises EvidenceError, naming the layer, for one without."""
    try:
        return torch.linalg.solve(gram, right)
    except RuntimeError as error:  # torch.linalg.LinAlgError is one
        raise EvidenceError(
            f"the inputs of {name} were to be inverted",
            f"their gram of {len(gram)} is singular: an input is zero, or follows from the others",
            "Give a damp above 0, such as 0.01, or more examples.",
        ) from error


def mended(weight: Tensor, gram: Tensor, keep: Tensor, name: str = "a layer") -> Tensor:
    """The matrix [out, in] that does with the columns kept what the whole one did, as well as they can.

    W_R + W_P H_PR H_RR^-1, zero elsewhere; by blocks the same as W_R - W_P ([H^-1]_PP)^-1 [H^-1]_PR.
    """
    weight = weight.double()
    found = torch.zeros_like(weight)
    rest, gone = keep.nonzero().reshape(-1), (~keep).nonzero().reshape(-1)
    moved = solved(gram[rest][:, rest], gram[rest][:, gone] @ weight[:, gone].T, name)
    found[:, rest] = weight[:, rest] + moved.T
    return found


def mend(
    site: Site,
    keep: Tensor,
    tensors: Tensors,
    seen: Mapping[str, Evidence],
    damp: float,
    before: Sequence[tuple[Site, Tensor]] = (),
) -> list[Edit]:
    """New values for all that reads a site, with nothing read of the units that go.

    `before` are sites that lost units already, with what they keep: where a matrix reads them too, as behind a
    concatenation, their columns stay empty, whatever the inputs say that would come through them.
    """
    edits: list[Edit] = []
    for part in readers(site):
        evidence = seen.get(part.key, Evidence())
        if not evidence.count:
            continue  # what nothing flows through is cut as it is
        weight = part.read(tensors).detach()
        alive = _alive(part, keep)
        for other, kept in before:
            for theirs in readers(other):
                if theirs.key == part.key:
                    alive &= _alive(theirs, kept)
        grams = damped(evidence.sums["gram"], damp)
        rows = zip(weight.flatten(1).chunk(len(grams)), grams, strict=True)
        value = (
            torch.cat([mended(own, gram, alive, part.name) for own, gram in rows])
            .reshape(weight.shape)
            .to(weight.dtype)
        )
        whole = tensors[part.name].detach().clone()
        part.view(whole).copy_(value)
        edits.append(Update(part.name, whole))
    return edits
