"""STUN: experts that behave alike go first, single weights in what is left go second.

Lee, Hwang, Qiao, Campos, Yao, He. "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning." ACL 2025.
arXiv:2409.06211. With R[i] the router's row of expert i and a[i, j] the tokens that were sent to both i and j:

    D[i, j] = l1 ||R[i] - R[j]|| - l2 a[i, j]              how differently two experts behave

    merge the two closest while D < t, and all of them are that close: one t for all layers, for the number wanted
    keep of each cluster the expert nearest to its mean; where a layer ends with very few, the means themselves

then Wanda, with OWL's spending, inside the experts that are left and the other matrices, up to the whole sparsity:
1 - (1 - s) / (1 - s_e) of what the experts' s_e left.
"""

import heapq
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Owl, Pattern, PerRow, Rank, Uniform
from secateur.axes.criteria import wanda_score
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import Scored, fitted, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, Merge, Remove, apply_
from secateur.errors import BudgetError, EvidenceError, SettingError
from secateur.evidence import Evidence, observe
from secateur.graph.experts import Mixture, mixtures, routing
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors, total_units
from secateur.task import Batch, Task
from secateur.walk import Feed


class Distance(Protocol):
    """How differently two experts behave."""

    @property
    def needs_data(self) -> bool:
        """Whether it looks at what was routed."""
        ...

    def between(self, rows: Tensor, seen: Evidence, name: str) -> Tensor:
        """Router rows [experts, hidden], and what was routed -> [experts, experts], float64, symmetric."""
        ...


def row_distance(rows: Tensor) -> Tensor:
    """Between the rows of a router [experts, hidden]: [experts, experts], float64."""
    rows = rows.detach().double().cpu()
    # Not by a gram: near rows would differ by the rounding of their squares.
    return torch.stack([(rows - row).norm(dim=1) for row in rows])


def together_distance(seen: Evidence, name: str, scaled: bool) -> Tensor:
    """Minus the tokens that two experts share [experts, experts]; over their mean if scaled.

    Raises EvidenceError where no token is sent to two experts, as with top-1 routing.
    """
    shared = seen.sums["together"].clone()
    count = len(shared)
    shared.fill_diagonal_(0)
    if not float(shared.sum()) > 0:
        raise EvidenceError(
            f"experts of {name} were to be compared by the tokens they share",
            "no token is sent to two of them",
            "Give distance=router-rows, which needs no data.",
        )
    return -shared / (shared.sum() / (count * (count - 1)) if scaled else 1.0)


@dataclass(frozen=True)
class RouterRows:
    """Experts whose router rows are close get like tokens: (l1, l2) = (1, 0), without any data."""

    relative: bool = False  # over the norm of the whole router, so that layers with long rows compare with others

    needs_data: ClassVar = False

    def between(self, rows: Tensor, seen: Evidence, name: str) -> Tensor:
        """See Distance."""
        found = row_distance(rows)
        return found / max(float(rows.detach().double().norm()), 1e-300) if self.relative else found


@dataclass(frozen=True)
class Together:
    """Experts that are sent the same tokens do like work: (l1, l2) = (0, 1), after one forward pass."""

    scaled: bool = True  # over the layer's mean, so that one threshold serves all

    needs_data: ClassVar = True

    def between(self, rows: Tensor, seen: Evidence, name: str) -> Tensor:
        """See Distance."""
        return together_distance(seen, name, self.scaled)


@dataclass(frozen=True)
class Both:
    """Rows and shared tokens added up: (l1, l2) = (1, 1) for a mix of 1."""

    mix: float = 1.0  # how much the shared tokens, over their mean, count beside the rows

    needs_data: ClassVar = True

    def between(self, rows: Tensor, seen: Evidence, name: str) -> Tensor:
        """See Distance."""
        return row_distance(rows) + self.mix * together_distance(seen, name, scaled=True)


class Linkage(Protocol):
    """How far apart two clusters are that an edge would join."""

    def far(self, now: Tensor, whole: Tensor, edge: tuple[int, int], joined: tuple[Tensor, Tensor]) -> float:
        """From distances as they stand (infinite where refused) and as they were, and the clusters' members."""
        ...


@dataclass(frozen=True)
class EndPoints:
    """The furthest that a member of one is from the edge's end in the other: as the authors' code has it."""

    def far(self, now: Tensor, whole: Tensor, edge: tuple[int, int], joined: tuple[Tensor, Tensor]) -> float:
        """See Linkage."""
        (i, j), (first, second) = edge, joined
        return max(float(now[first, j].max()), float(now[second, i].max()))


@dataclass(frozen=True)
class Complete:
    """The furthest that any two members are apart: complete linkage."""

    def far(self, now: Tensor, whole: Tensor, edge: tuple[int, int], joined: tuple[Tensor, Tensor]) -> float:
        """See Linkage."""
        return float(whole[joined[0]][:, joined[1]].max())


def agglomerate(
    distances: Sequence[Tensor], threshold: float, most: Sequence[int], linkage: Linkage, removals: int | None = None
) -> list[Tensor]:
    """Clusters of the experts of each layer [experts], numbered by their first members.

    All layers together, the closest two first (then by layer, i, j): joined if their clusters are nearer than the
    threshold, else refused for good. A layer loses `most` at most, all together `removals`.
    """
    whole = [d.clone().fill_diagonal_(torch.inf) for d in distances]
    now = [d.clone() for d in whole]
    label = [torch.arange(len(d)) for d in whole]
    lost, total = [0] * len(whole), 0
    edges = [
        (value, layer, i, j)
        for layer, d in enumerate(whole)
        for i, row in enumerate(d.tolist())
        for j, value in enumerate(row)
        if i < j and value < threshold
    ]
    heapq.heapify(edges)
    while edges and (removals is None or total < removals):
        _, layer, i, j = heapq.heappop(edges)
        d, of = now[layer], label[layer]
        same = bool(of[i] == of[j])  # joined already by way of others: joining again would loop
        if same or lost[layer] >= most[layer] or d[i, j] == torch.inf:
            continue
        first, second = (of == of[i]).nonzero().reshape(-1), (of == of[j]).nonzero().reshape(-1)
        if linkage.far(d, whole[layer], (i, j), (first, second)) < threshold:
            d[first, j] = d[j, first] = torch.inf
            d[second, i] = d[i, second] = torch.inf
            of[second] = of[i].clone()
            lost[layer], total = lost[layer] + 1, total + 1
        else:
            d[i, j] = d[j, i] = torch.inf
    return [_numbered(of) for of in label]


def _numbered(label: Tensor) -> Tensor:
    order: dict[int, int] = {}
    return torch.tensor([order.setdefault(int(c), len(order)) for c in label])


def clusters_for(
    distances: Sequence[Tensor], removals: int, most: Sequence[int], linkage: Linkage
) -> tuple[list[Tensor], float]:
    """Clusters that are exactly so many fewer than experts over all layers, and the threshold that gives them.

    Counts are steps of the threshold, and but for a few refused edges rise with it: by halves one is searched among the
    distances there are that gives as many and whose lower neighbour does not, and what it would join beyond the number
    wanted is left. Raises BudgetError when no threshold gives as many.
    """
    values = sorted({value for d in distances for value in d[torch.ones_like(d).triu(1).bool()].tolist()})
    steps = [*values, float("inf")]  # an edge is taken below a threshold: steps[k] takes the first k distances

    def gone(threshold: float) -> int:
        found = agglomerate(distances, threshold, most, linkage)
        return sum(len(c) - int(c.max()) - 1 for c in found)

    low, high = 0, len(steps) - 1
    if gone(steps[high]) < removals:
        raise BudgetError(
            f"{removals} experts of {sum(map(len, distances))} were to be removed",
            f"{gone(steps[high])} can be, as each layer keeps as many as a token is sent to",
            "Remove fewer.",
        )
    if removals:
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if gone(steps[middle]) >= removals else (middle, high)
    else:
        high = low
    return agglomerate(distances, steps[high], most, linkage, removals), steps[high]


def representatives(slabs: Sequence[Tensor], assignment: Tensor) -> Tensor:
    """Of each cluster, the expert whose weights are nearest to the mean of its own: a choice [experts].

    `slabs` are the stacked tensors [experts, ...], taken together; of equals the first.
    """
    keep = torch.zeros(len(assignment), dtype=torch.bool)
    for cluster in range(int(assignment.max()) + 1):
        members = (assignment == cluster).nonzero().reshape(-1)
        off = torch.zeros(len(members), dtype=torch.float64)
        for slab in slabs:
            own = slab.detach()[members.to(slab.device)].double().flatten(1)
            off += (own - own.mean(0)).square().sum(1).cpu()
        # Two experts are equally near to their mean but for rounding, which is not to decide.
        keep[members[int((off <= off.min() * (1 + 1e-9)).nonzero()[0])]] = True
    return keep


def kurtosis(values: Iterable[Tensor]) -> float:
    """Of all numbers together that are not zero: the mean fourth power of their standardised distance from the mean.

    How many outliers there are, and so how much can be taken between them; 3 for a normal distribution.
    """
    sums = torch.zeros(5, dtype=torch.float64)  # of the powers 0 to 4; float64 bears the cancelling, as means are small
    for value in values:
        kept = value[value != 0].double().cpu()
        sums += torch.stack([kept.pow(power).sum() for power in range(5)])
    if not float(sums[0]):
        return float("nan")
    _, m, square, cube, fourth = (sums / sums[0]).tolist()
    second = square - m**2
    return (fourth - 4 * m * cube + 6 * m**2 * square - 3 * m**4) / second**2 if second > 0 else float("nan")


@dataclass(frozen=True)
class RoutedWanda:
    """Wanda's score with each matrix's inputs averaged over the tokens that reached it; size alone where none did."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_square"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """|W[i, j]| times the root of the mean square of input j [out, in]."""
        weight = site.parts[0].read(tensors).detach().float()
        if not seen.count:  # all scores would be zero, and the first columns go
            return weight.abs()
        return wanda_score(weight, seen.mean("input_square"))


@dataclass(frozen=True, kw_only=True)
class STUN(Method):
    """Take out experts that behave like others, then single weights by Wanda with OWL's spending. No retraining."""

    sparsity: float = 0.4  # fraction of all prunable weights gone in the end, in [0, 1)
    experts: float = 0.2  # fraction of all experts taken out first, in [0, 1); 0 is Wanda with OWL alone
    samples: int = 128  # calibration sequences
    distance: Distance = RouterRows()  # together, or both, look at which experts share tokens
    linkage: Linkage = EndPoints()  # complete compares all members of two clusters
    most: int | None = None  # experts a layer may lose; None: all but those a token is sent to
    few: int = 3  # a layer left with fewer clusters than this keeps their means (kappa in the paper)
    allocation: Allocation = Owl()  # how the rest is spent over the matrices; uniform is plain Wanda
    pattern: Pattern = PerRow()  # of the weights that stay
    feed: Feed = "pruned"  # a block is scored on what the blocks pruned before it put out
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        16,
        "STUN: structured-then-unstructured pruning for scalable MoE pruning",
        arxiv="2409.06211",
        year=2024,
        granularity=("expert", "weight"),
        needs=("calibration",),
        families=("moe",),
        axes="criterion pattern allocation merge",
        criterion=("similarity", "activation"),
        tasks=("language modelling",),
        updates=("none", "solved"),
        reports="Snowflake Arctic at 40 %, GSM8K: dense 70.74, STUN 70.28, OWL alone 63.76; Mixtral-8x7B-Instruct at "
        "65 %: 25.09 and 1.29.",
        checked="tests/methods/test_stun.py::test_agglomeration_by_hand",
        differs=(
            "One threshold is searched among the distances there are and its last ties are cut off, so that the number "
            "of experts is met exactly; the authors' search steps a number and gives up after ten equal counts.",
            "Two experts of one cluster are passed over; the authors' code may join them again.",
            "Ties go by distance, layer, i, j, so that the result does not depend on the order of a search.",
            "A layer never keeps fewer experts than a token is sent to.",
            "The router is sliced and gets no bias.",
            "Means replace representatives where a layer has fewer than `few` clusters, 3 as in the paper.",
        ),
    )
    tiny: ClassVar = {"samples": 8}

    def check(self) -> None:
        """See Method."""
        super().check()
        check_sparsity(self.experts, "experts")
        check_pattern(self.pattern, self.sparsity)
        if self.pattern.fixed is not None:
            raise SettingError(
                "a pattern that prescribes how much of each row goes was given",
                "what experts leave of the budget is not known beforehand",
                "Take out experts with experts=..., then chain a method with that pattern.",
            )
        if self.samples < 1 or self.few < 0 or (self.most is not None and self.most < 1):
            raise SettingError(
                f"samples={self.samples}, few={self.few}, most={self.most} were given",
                "one sample and one expert are the least, and counts are not negative",
                "Take the defaults: samples=128, few=3, most=None.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        layers, before = mixtures(model), weights(model, self.include, self.exclude)
        total = total_units(before)
        wanted, removals = int(self.sparsity * total + 1e-9), self.removals(layers)
        each = [_weights_of_one(layer, before) for layer in layers]
        _check_share(removals * min(each), wanted, total)
        batches = list(task.batches("calibration", self.samples))
        notes = [f"kurtosis of the weights: {self.kurtosis(model):.3g}"]
        cut = self.expert_edits(model, layers, removals, batches, notes)
        lost = {edit.site.name: lost_of(edit) for edit in cut}
        gone = sum(one * lost.get(layer.site.name, 0) for one, layer in zip(each, layers, strict=True))
        _check_share(gone, wanted, total)
        edits = apply_(model, cut)
        if gone:
            notes.append(
                f"after the experts: kurtosis {self.kurtosis(model):.3g}, {gone / total:.4f} of the weights gone"
            )
        if wanted > gone:
            sites = weights(model, self.include, self.exclude)
            masks = self.mask_weights_(model, sites, wanted - gone, batches, notes)
            gone += sum(edit.site.units - edit.kept for edit in masks if isinstance(edit, Mask))
            edits += masks
            notes.append(f"after the weights: kurtosis {self.kurtosis(model):.3g}")
        notes.append(
            f"{gone:,} of {total:,} weights gone: {gone / total:.4f}, {self.sparsity:g} asked for; routers not counted"
        )
        return Outcome(model, edits, notes=notes)

    def removals(self, layers: Sequence[Mixture]) -> int:
        """How many experts go in all. Raises BudgetError when the layers cannot lose as many."""
        total = sum(layer.site.units for layer in layers)
        count, most = int(self.experts * total + 1e-9), sum(self.may_lose(layer) for layer in layers)
        if count > most:
            raise BudgetError(
                f"{count} of {total} experts were to be removed",
                f"{most} can be: a layer keeps as many as a token is sent to"
                + ("" if self.most is None else f", and loses {self.most} at most"),
                f"Ask for experts={most / total:.4g} at most.",
            )
        return count

    def may_lose(self, layer: Mixture) -> int:
        """How many experts a layer may lose. Raises SettingError when `most` would leave it none."""
        if self.most is not None and self.most >= layer.site.units:
            raise SettingError(
                f"most={self.most} was given",
                f"{layer.site.name} has {layer.site.units} experts, and one at least must stay",
                f"Give {layer.site.units - 1} at most.",
            )
        free = layer.site.units - layer.top_k
        return free if self.most is None else min(self.most, free)

    def expert_edits(
        self, model: nn.Module, layers: Sequence[Mixture], removals: int, batches: Sequence[Batch], notes: list[str]
    ) -> list[Remove | Merge]:
        """Stage 1: so many experts fewer over all layers, by one threshold; not applied yet. Says so in the notes."""
        if not removals:
            return []
        named = tensors(model)
        seen = routing(model, layers, batches) if self.distance.needs_data else {}
        distances = [
            self.distance.between(layer.rows.read(named), seen.get(layer.site.name, Evidence()), layer.site.name)
            for layer in layers
        ]
        most = [self.may_lose(layer) for layer in layers]
        found, threshold = clusters_for(distances, removals, most, self.linkage)
        edits = list[Remove | Merge]()
        for layer, assignment in zip(layers, found, strict=True):
            clusters = int(assignment.max()) + 1
            if clusters == layer.site.units:
                continue
            if clusters < self.few:  # with so few, one expert is too far from the others it stands for
                edits.append(Merge(layer.site, assignment, 1 / torch.bincount(assignment).double()[assignment]))
            else:
                slabs = [part.read(named) for part in layer.own.parts]
                edits.append(Remove(layer.site, representatives(slabs, assignment)))
        left = ", ".join(str(int(a.max()) + 1) for a in found)
        below = "joined at any distance" if threshold == torch.inf else f"joined below a distance of {threshold:.4g}"
        notes.append(f"experts left in each layer: {left}; {below}")
        if not all(layer.normalised for layer in layers):
            notes.append("gates are shares of all experts and are not rescaled: with fewer experts each is larger")
        return edits

    def mask_weights_(
        self, model: nn.Module, sites: Sequence[Site], gone: int, batches: Sequence[Batch], notes: list[str]
    ) -> list[Edit]:
        """Stage 2: so many single weights of the sites set to zero. Names the experts that no token reached."""
        criterion: Criterion = RoutedWanda()
        budget = Budget(gone / total_units(sites))
        seen = observe(model, sites, batches, criterion.needs)
        scores = Scored({site.name: site for site in sites}, tensors(model), criterion, seen)
        keep = self.allocation.spread(sites, budget, scores)
        if self.allocation != Uniform():  # the total is what was asked for, not each matrix
            keep = fitted(sites, keep, self.pattern)
        unseen = [site.name for site in sites if not seen[site.name].count]
        if unseen:
            notes.append(f"no token reached {', '.join(unseen)}: ranked by size alone")
        return sweep(model, sites, Rank(criterion, self.pattern), keep, batches, self.feed)

    def kurtosis(self, model: nn.Module) -> float:
        """Of the weights that may be pruned and are not zero."""
        named = tensors(model)
        return kurtosis(site.parts[0].read(named).detach() for site in weights(model, self.include, self.exclude))


def lost_of(edit: Remove | Merge) -> int:
    """How many units an edit takes away."""
    if isinstance(edit, Merge):
        return edit.site.units - int(edit.assignment.max()) - 1
    return edit.site.units - int(edit.keep.sum())


def _weights_of_one(layer: Mixture, sites: Sequence[Site]) -> int:
    """The weights of one expert of a layer, as far as they are among those to be pruned."""
    names = {part.name for part in layer.own.parts}
    return sum(site.units for site in sites if site.parts[0].name in names and site.parts[0].index == 0)


def _check_share(gone: int, wanted: int, total: int) -> None:
    """Raise BudgetError where the experts alone are more than is to go."""
    if gone > wanted:
        raise BudgetError(
            f"a sparsity of {wanted / total:.4g} was asked for",
            f"the experts alone are {gone / total:.4g} of the weights",
            f"Take out fewer experts, or ask for {gone / total:.4g} or more.",
        )
