"""CFSP: one forward pass says which blocks do much and which neurons are loud; the others' neurons go.

Wang, Ma, Wang, Chen, Fan, Shan, Yang, Xu, Liu, Qin. "CFSP: An Efficient Structured Pruning Framework for LLMs with
Coarse-to-Fine Activation Information." COLING 2025. arXiv:2409.13199. With x what flows into a block, y what flows out
of it, h what flows into the matrix W that reads its neurons, V the matrices that make them (gate and up), and p the
share of neurons to be removed:

    I[l] = mean over tokens of arccos(cos(x, y)) / pi                      coarse: how much block l does
    s[l] = sigmoid(13.1072 a (I[l] - mean I))
    r[l] = s[l] / mean(s) * (1 - p)                                        the share of its neurons that stay
    F[i] = A[i] = ||h[:, i]||                                              fine: how much neuron i matters in it

The fine score is what the authors' released code ranks by, in which the weights of equation 8 cancel. The equation
itself, as others transcribe it, is score=relative:

    F[i] = sum_j |W[j, i]| A[i] / (||W[j, :]|| ||A||) + sum_V sum_j |V[i, j]| / ||V[i, :]||

Attention is left alone. Adapters of a rank that follows s may win back what was lost, and are merged.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur import adapters
from secateur.axes import Allocation, Scores, keep_top, kept_of
from secateur.axes.budgets import Terms, terms
from secateur.axes.influence import Angle, Change, Watched, watched
from secateur.axes.recovery import Retrain, Training, Work, kept_weights
from secateur.axes.rules import LearningRate
from secateur.axes.subsets import Chosen, Place, union
from secateur.cut import weights
from secateur.edit import Edit, Mask, apply_
from secateur.errors import BudgetError, EvidenceError, SettingError
from secateur.evidence import calm
from secateur.graph import couple, removals
from secateur.graph.inner import inner, reader
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, Site, Tensors, tensors, total_units
from secateur.task import Batch, Task, generator
from secateur.train import History

CONTRAST = 13.1072  # the authors divide a sum by 10^4, over 128 x 1024 tokens: as a mean, for any number of tokens


def emphasis(influence: Tensor, contrast: float = 1.0) -> Tensor:
    """How much each block does [blocks] -> what it is worth beside the others [blocks], float64, 1 on average."""
    found = torch.sigmoid(CONTRAST * contrast * (influence.double() - influence.double().mean()))
    return found / found.mean()


def kept_shares(influence: Tensor, sparsity: float, contrast: float = 1.0) -> Tensor:
    """The share of its neurons each block keeps [blocks], float64: 1 - sparsity on average, none above 1.

    Where the best block would keep more than it has, all are drawn towards the mean.
    """
    worth, room = emphasis(influence, contrast), 1 / (1 - sparsity)
    if room == 1:
        return torch.ones_like(worth)  # nothing is to go: there is no room above the mean
    top = float(worth.max())
    if top >= room:
        worth = 1 + (worth - 1) * ((room - 1) / (top - 1) / 1.05)
    return worth * (1 - sparsity)


def whole_widths(
    wanted: Sequence[float], units: Sequence[int], multiple: int = 1, total: int | None = None
) -> list[int]:
    """Widths that are multiples, or all there is, nearest to some real ones.

    With a total, those furthest off are moved by a multiple until the sum is within half a multiple of it.
    """
    found = [
        min(max(int((w + multiple / 2) // multiple) * multiple, multiple), n)
        for w, n in zip(wanted, units, strict=True)
    ]
    while total is not None and 2 * abs(total - sum(found)) > multiple:
        if sum(found) < total:
            able = [i for i, n in enumerate(units) if found[i] < n]
            where = max(able, key=lambda i: wanted[i] - found[i], default=None)
            step = 0 if where is None else min((found[where] // multiple + 1) * multiple, units[where])
        else:
            able = [i for i in range(len(units)) if found[i] > multiple]
            where = max(able, key=lambda i: found[i] - wanted[i], default=None)
            step = 0 if where is None else (found[where] - 1) // multiple * multiple
        if where is None:
            break
        found[where] = step
    return found


@runtime_checkable
class Fractional(Protocol):
    """An allocation that can say what each site is to keep before it is rounded."""

    def exact(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, float]:
        """Units to keep, as real numbers: site name -> units."""
        ...


@dataclass(frozen=True)
class Sigmoid:
    """Sites whose scores are higher on average keep more, bent by a sigmoid so that no block is emptied.

    The contrast is meant for scores that are angles, in shares of half a turn.
    """

    contrast: float = 1.0  # a in the paper: 0 is uniform

    needs_scores: ClassVar = True

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError where a block would be left nothing."""
        wanted = list(self.exact(sites, budget, scores).values())
        found = whole_widths(wanted, [s.units for s in sites], total=kept_of(total_units(sites), budget.sparsity))
        return {site.name: count for site, count in zip(sites, found, strict=True)}

    def exact(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, float]:
        """See Fractional. Raises as `spread` does."""
        if scores is None:
            raise SettingError("blocks were to be compared", "no scores were given", "Give how much each block does.")
        influence = torch.stack([scores[site.name].double().mean() for site in sites])
        shares = kept_shares(influence, budget.sparsity, self.contrast)
        wanted = {site.name: float(share) * site.units for share, site in zip(shares, sites, strict=True)}
        bare = next((site for site in sites if wanted[site.name] < 1), None)
        if bare is not None:
            raise BudgetError(
                f"a sparsity of {budget.sparsity:g} was asked for",
                f"{bare.name} would be left without any of its {bare.units} units",
                "Ask for a lower sparsity, or for less contrast.",
            )
        return wanted


class Fine(Protocol):
    """What a neuron is worth among those of its block."""

    def read(self, weight: Tensor, loud: Tensor) -> Tensor:
        """By the matrix that reads them [out, in] and how loud each is [in]: [in], all float64."""
        ...

    def made(self, weight: Tensor) -> Tensor:
        """By a matrix that makes them [rows, in]: [rows], to be added."""
        ...


@dataclass(frozen=True)
class Relative:
    """Equation 8: its share of what it is added to, its share of all activity, how evenly its own weights are spread.

    In the sums over a neuron's own weights it is only the spread that counts: their size cancels.
    """

    def read(self, weight: Tensor, loud: Tensor) -> Tensor:
        """See Fine."""
        share = weight.abs() / weight.norm(dim=1, keepdim=True).clamp(min=1e-300)
        return share.sum(0) * loud / loud.norm().clamp(min=1e-300)

    def made(self, weight: Tensor) -> Tensor:
        """See Fine."""
        return weight.abs().sum(1) / weight.norm(dim=1).clamp(min=1e-300)


@dataclass(frozen=True)
class Loudness:
    """How loud it is, to a power: what the authors' released default comes to, for its weights cancel."""

    power: float = 1.0  # 0.5 is their one_a

    def read(self, weight: Tensor, loud: Tensor) -> Tensor:
        """See Fine."""
        return loud**self.power

    def made(self, weight: Tensor) -> Tensor:
        """See Fine."""
        return torch.zeros(len(weight), dtype=weight.dtype)


@dataclass(frozen=True)
class Weighted:
    """Mean |w| of what it sends on times how loud it is: Wanda's score, a column at a time."""

    def read(self, weight: Tensor, loud: Tensor) -> Tensor:
        """See Fine."""
        return weight.abs().mean(0) * loud

    def made(self, weight: Tensor) -> Tensor:
        """See Fine."""
        return torch.zeros(len(weight), dtype=weight.dtype)


@dataclass(frozen=True)
class Outgoing:
    """Mean |w| of what it sends on: magnitude."""

    def read(self, weight: Tensor, loud: Tensor) -> Tensor:
        """See Fine."""
        return weight.abs().mean(0)

    def made(self, weight: Tensor) -> Tensor:
        """See Fine."""
        return torch.zeros(len(weight), dtype=weight.dtype)


def neuron_scores(site: Site, named: Tensors, loud: Tensor, fine: Fine) -> Tensor:
    """One score per neuron [units], float64, by the matrices that make it and the one that reads it."""
    down, score = reader(site), torch.zeros(site.units, dtype=torch.float64)
    for part in site.parts:
        if len(part.shape) != 2:
            continue  # a bias says nothing of how a neuron is spread
        weight = part.read(named).detach().double().cpu()
        found = fine.read(weight, loud) if part is down else fine.made(weight)
        assert part.owner is not None
        owner = part.owner.reshape(-1)
        mine = owner >= 0
        score.index_add_(0, owner[mine], found[mine])
    return score


# Recovery


class Order(Protocol):
    """What a block is worth when adapters are given their ranks."""

    def of(self, worth: Tensor) -> Tensor:
        """Emphasis [blocks] -> what ranks are in proportion to [blocks]."""
        ...


@dataclass(frozen=True)
class Importance:
    """Blocks that do much are trained more."""

    def of(self, worth: Tensor) -> Tensor:
        """See Order."""
        return worth


@dataclass(frozen=True)
class Even:
    """All blocks alike: plain LoRA."""

    def of(self, worth: Tensor) -> Tensor:
        """See Order."""
        return torch.ones_like(worth)


@dataclass(frozen=True)
class Inverse:
    """Blocks that do little, and lost most, are trained more."""

    def of(self, worth: Tensor) -> Tensor:
        """See Order."""
        return 1 / worth


def ranks_of(worth: Sequence[float], cost: Sequence[int], rank: int) -> list[int]:
    """Ranks in proportion to what blocks are worth, 1 at least, that cost no more than `rank` everywhere would.

    `cost` is what one rank takes in a block, in parameters. Fractions are rounded up where they are largest, as far
    as the budget goes.
    """
    budget = rank * sum(cost)
    scale = budget / sum(w * c for w, c in zip(worth, cost, strict=True))
    found = [max(1, int(w * scale)) for w in worth]
    left = budget - sum(r * c for r, c in zip(found, cost, strict=True))
    while left < 0:  # the least worthy were raised to 1
        most = max((i for i in range(len(found)) if found[i] > 1), key=lambda i: found[i] - worth[i] * scale)
        found[most], left = found[most] - 1, left + cost[most]
    for place in sorted(range(len(found)), key=lambda i: found[i] - worth[i] * scale):
        if worth[place] * scale > found[place] and cost[place] <= left:
            found[place], left = found[place] + 1, left - cost[place]
    return found


@dataclass(frozen=True)
class IgLora:
    """Adapters on every matrix of every block, of a rank that follows how much the block does, merged afterwards."""

    rank: int = 8  # on average: together they take no more than this rank everywhere; cut to a matrix's smaller side
    steps: int = 200
    rate: float = 1e-4  # learning rate of AdamW at its peak
    warmup: float = 0.05  # fraction of the steps in which the rate rises; it falls linearly after
    scale: float = 2.0  # alpha / r, the same in every block
    by: Order = Importance()  # even: plain LoRA; inverse: what lost most is trained most
    contrast: float = 1.0  # a in the paper

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        if self.rank < 1 or self.steps < 1 or not self.rate > 0:
            raise SettingError(
                f"rank={self.rank}, steps={self.steps} and rate={self.rate:g} were asked for",
                "ranks and steps start at 1, and a rate is above 0",
                "Give rank=8, steps=200 and rate=1e-4.",
            )
        LearningRate(warmup=self.warmup)

    def ranks(self, model: nn.Module, influence: Mapping[str, float]) -> dict[str, int]:
        """A rank for each block: its dotted name -> rank."""
        worth = self.by.of(emphasis(torch.tensor(list(influence.values())), self.contrast)).tolist()
        sides = {name: _sides(part) for name, part in _matrices(model).items()}
        cost = [sum(c for name, c in sides.items() if name.startswith(f"{block}.")) for block in influence]
        return dict(zip(influence, ranks_of(worth, cost, self.rank), strict=True))

    def recover(
        self, model: nn.Module, task: Task, influence: Mapping[str, float]
    ) -> tuple[list[Edit], History, list[str]]:
        """Train and merge: what changed, how it went, and what there is to say."""
        keep, ranks = kept_weights(model), self.ranks(model, influence)
        place = Place(model, _matrices(model), keep, lambda name: generator(task, f"cfsp {name}"))
        chosen, notes = union([RankedLora(ranks, self.scale)], place)
        training = Training(self.steps, self.rate, self.warmup, 0.0)
        edits, history = Retrain().mend(Work(training, model, task, chosen, keep, None))
        said = ", ".join(f"{block.rpartition('.')[2]} {rank}" for block, rank in ranks.items())
        return edits, history, [f"ranks of the adapters by block: {said}", *notes]


@dataclass(frozen=True, eq=False)
class RankedLora:
    """Adapters of a rank that each block has of its own; zeros are kept."""

    ranks: Mapping[str, int]
    scale: float

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        found: dict[str, nn.Module] = {}
        for name in place.matrices:
            rank = next((r for block, r in self.ranks.items() if name.startswith(f"{block}.")), 0)
            if rank:
                low = place.low(name, rank).start_at_zero_(place.draw(name))
                zeros = name in place.keep
                found[name] = (
                    adapters.MaskLora(low, self.scale, place.keep[name]) if zeros else adapters.Lora(low, self.scale)
                )
        return Chosen(adapters=found)


def _matrices(model: nn.Module) -> dict[str, Part]:
    return {site.parts[0].name: site.parts[0] for site in weights(model)}


def _sides(part: Part) -> int:
    """Rows and columns of a matrix together: what a rank of its adapter takes, in parameters."""
    return part.shape[0] + prod(part.shape[1:])


@dataclass(frozen=True, kw_only=True)
class CFSP(Method):
    """Take neurons out of the feed-forward layers, more where a block does little; the quietest of each block go.

    One forward pass over unlabelled data, no gradient; the model gets smaller at once.
    """

    sparsity: float = 0.2  # fraction taken out, in [0, 1): of the feed-forward neurons, or of what `of` says
    of: str = "units"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    samples: int = 128  # calibration sequences, as in the paper (of 1024 tokens there)
    change: Change = Angle()  # how much a block does; turn, squared and absolute are the authors' options
    score: Fine = Loudness()  # what a neuron is worth within its block, as released; relative is equation 8
    allocation: Allocation = Sigmoid()  # widths by how much blocks do; uniform gives every block the same
    round_to: int = 128  # widths are multiples of this, which hardware likes; 1 is exact
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"
    repair: bool = True  # move widths by a multiple until their sum is right; false: each to the nearest, as published
    recovery: IgLora | None = None  # train adapters afterwards: ig-lora

    card: ClassVar = Card(
        7,
        "CFSP: an efficient structured pruning framework for LLMs with coarse-to-fine activation information",
        arxiv="2409.13199",
        year=2025,
        granularity=("channel",),
        needs=("calibration",),
        families=("decoder", "encoder", "vision transformer"),
        axes="criterion allocation recovery",
        criterion=("activation",),
        tasks=("language modelling",),
        reports="Llama and Qwen: better average zero-shot accuracy and perplexity than magnitude, Wanda and FLAP on "
        "feed-forward neurons at 20 to 50 %; about 1.5 times as fast at high sparsity.",
        checked="tests/methods/test_cfsp.py::test_widths_by_hand",
        differs=(
            "Neurons are ranked by their activity, which is all that is left of equation 8 in the authors' code, whose"
            " weights cancel.",
            "Equation 8 itself (score=relative) is as others transcribe it, with Euclidean norms: we could not compare"
            " it with the paper. Read so, it ranks by how evenly a neuron's own weights are spread, and fails.",
            "How much a block does is a mean over tokens, with the contrast of the published 131,072 tokens, so that"
            " the rule does not depend on how much text was used.",
            "Widths are moved by a multiple until their sum meets the budget; the authors' may miss it by points.",
            "Exactly as many neurons stay as the width says; the authors' threshold keeps one more, and ties.",
            "Ranks of the adapters are rounded so that all together cost no more than plain LoRA; the paper's rounding"
            " is not published.",
        ),
    )
    tiny: ClassVar = {"samples": 16, "round_to": 8}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends units."""
        return terms(self, "units")

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        if self.samples < 1 or self.round_to < 1:
            raise SettingError(
                f"samples={self.samples} and round_to={self.round_to} were given",
                "one sample is seen at least, and widths are multiples of 1 or more",
                "Take the defaults: 128 and 128.",
            )
        if self.recovery is not None:
            self.recovery.check()

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = inner(coupling, ("channel",))
        sites = self.terms.free(model, found)
        multiples = self.terms.multiples(sites, coupling.multiples)
        for site in sites:
            if multiples[site.name] > site.units:
                raise SettingError(
                    f"widths that are multiples of {multiples[site.name]} were asked for",
                    f"{site.name} has {site.units} neurons",
                    "Give a smaller round_to.",
                )
        if self.recovery is not None:
            Retrain().ready(model, task)
        seen = self.seen(model, sites, task.batches("calibration", self.samples))
        influence = {site.block: seen.change(site.block) for site in sites}

        def spread(sparsity: float) -> dict[str, int]:
            return self.widths(sites, influence, multiples, sparsity)

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        counts = met.counts
        named, keep = tensors(model), {}
        for site in sites:
            loud = seen.square(_module(site)).sqrt()
            keep[site.name] = keep_top(neuron_scores(site, named, loud, self.score), counts[site.name])
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        whole = [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
        edits = apply_(model, [*whole, *removals(sites, keep)])
        units, left = total_units(sites), sum(counts.values())
        notes = [
            f"{units - left:,} of {units:,} neurons taken out: {1 - left / units:.4f}, {met.words} asked for",
            *self.terms.left_alone(found),
            *met.notes,
            "neurons left by block, and how much it does: "
            + ", ".join(f"{s.block.rpartition('.')[2]} {counts[s.name]} ({influence[s.block]:.4f})" for s in sites),
            *(str(frozen) for frozen in coupling.frozen),
        ]
        if self.recovery is None:
            return Outcome(model, edits, notes=notes)
        more, history, said = self.recovery.recover(model, task, influence)
        return Outcome(model, [*edits, *more], history, notes=[*notes, *said, *history.notes])

    def seen(self, model: nn.Module, sites: Sequence[Site], batches: Iterable[Batch]) -> Watched:
        """One pass of the dense model: how much each block does, and how loud each neuron is."""
        blocks = list(dict.fromkeys(site.block for site in sites))
        device, passed = next(model.parameters()).device, 0
        with calm(model), torch.no_grad(), watched(model, blocks, self.change, {_module(s) for s in sites}) as found:
            for batch in batches:
                batch.to(device).through(model)
                passed += 1
        if not passed:
            raise EvidenceError("blocks were to be compared", "there are no calibration samples", "Give some.")
        return found

    def widths(
        self,
        sites: Sequence[Site],
        influence: Mapping[str, float],
        multiples: Mapping[str, int],
        sparsity: float | None = None,
    ) -> dict[str, int]:
        """Neurons to keep at each site, at the sparsity that is set, or another."""
        scores = {site.name: torch.full(site.shape, influence[site.block], dtype=torch.float64) for site in sites}
        budget = Budget(self.sparsity if sparsity is None else sparsity)
        counts = self.allocation.spread(sites, budget, scores)
        # Rounded once, to multiples: whole numbers first would tip widths that lie between two.
        exact = self.allocation.exact(sites, budget, scores) if isinstance(self.allocation, Fractional) else counts
        found: dict[str, int] = {}
        for multiple in dict.fromkeys(multiples.values()):
            some = [site for site in sites if multiples[site.name] == multiple]
            wanted = [exact[site.name] for site in some]
            total = sum(counts[site.name] for site in some) if self.repair else None
            fitted = whole_widths(wanted, [site.units for site in some], multiple, total)
            found |= {site.name: count for site, count in zip(some, fitted, strict=True)}
        return found


def _module(site: Site) -> str:
    """The module that reads a site's neurons: what flows into it is what they say."""
    return reader(site).module
