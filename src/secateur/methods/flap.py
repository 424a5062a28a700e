"""FLAP: a feature that hardly moves can be replaced by its mean; so units go that fluctuate least.

An, Zhao, Yu, Tang, Wang. "Fluctuation-based Adaptive Structured Pruning for Large Language Models." AAAI 2024.
arXiv:2312.11983. For the matrix W that reads heads or neurons (o_proj, down_proj) and its inputs X:

    score[j] = var(X[:, j]) * ||W[:, j]||^2                     WIFV, the weighted fluctuation
    z[j]     = (score[j] - mean(score)) / std(score)            per matrix, so that all compare under one budget
    bias    += W[:, removed] @ mean(X[:, removed])              what is gone on average is put back
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Scores, keep_top
from secateur.axes.budgets import Terms, terms
from secateur.axes.influence import tokens_of
from secateur.axes.spending import check_affordable, per_block, spend_everywhere, total_cost
from secateur.distributed import present
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import BudgetError, EvidenceError, GraphError, SettingError
from secateur.evidence import Evidence, merged, unshared
from secateur.graph import couple, removals
from secateur.graph.inner import inner, reader
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task
from secateur.walk import Block, look


@dataclass(frozen=True, eq=False)
class Flow:
    """What flowed into a matrix, per column and in float64: how many tokens, their mean, their variance."""

    tokens: int
    mean: Tensor  # [in]
    variance: Tensor  # [in], the mean square around the mean


@dataclass(eq=False)
class Running:
    """A flow while it is measured, merged batch after batch (Chan et al. 1979): exact."""

    tokens: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros(()))
    around: Tensor = field(default_factory=lambda: torch.zeros(()))  # sum of squares around the mean

    def add(self, rows: Tensor) -> None:
        """More rows [tokens, in]."""
        x = rows.double()
        if not len(x):
            return
        middle = x.mean(0)
        inside = (x - middle).square().sum(0)
        if not self.tokens:
            self.tokens, self.mean, self.around = len(x), middle, inside
            return
        both, step = self.tokens + len(x), middle - self.mean
        self.around = self.around + inside + step.square() * (self.tokens * len(x) / both)
        self.tokens, self.mean = both, self.mean + step * (len(x) / both)

    def flow(self) -> Flow:
        """What it comes to."""
        return Flow(self.tokens, self.mean, self.around / max(self.tokens, 1))


def flow_of(rows: Iterable[Tensor]) -> Flow:
    """Mean and variance of all rows [tokens, in] together."""
    found = Running()
    for more in rows:
        found.add(more)
    return found.flow()


def of_all(mine: Mapping[str, Running]) -> dict[str, Flow]:
    """Flows by name, of all processes that calibrate together: each has a mean of its own."""
    if present().alone:
        return {name: each.flow() for name, each in mine.items()}
    every = merged({n: Evidence(m.tokens, {"sum": m.mean * m.tokens} if m.tokens else {}) for n, m in mine.items()})
    mean = {name: seen.mean("sum") for name, seen in every.items() if seen.count}
    around = merged(
        {
            n: Evidence(m.tokens, {"around": m.around + m.tokens * (m.mean - mean[n]).square()} if m.tokens else {})
            for n, m in mine.items()
        }
    )
    return {
        name: Flow(seen.count, mean[name], seen.mean("around")) if seen.count else mine[name].flow()
        for name, seen in around.items()
    }


class Score(Protocol):
    """What makes a column of a matrix worth keeping."""

    def of(self, weight: Tensor, flow: Flow) -> Tensor:
        """Weight [out, in], float64, and what flows into it -> [in], higher = keep."""
        ...


@dataclass(frozen=True)
class Wifv:
    """Fluctuation times the column's squared norm: what replacing the feature by its mean costs in squared output."""

    def of(self, weight: Tensor, flow: Flow) -> Tensor:
        """See Score."""
        return flow.variance * weight.square().sum(0)


@dataclass(frozen=True)
class Ifv:
    """Fluctuation alone."""

    def of(self, weight: Tensor, flow: Flow) -> Tensor:
        """See Score."""
        return flow.variance


@dataclass(frozen=True)
class Wifn:
    """Mean |w| times the norm of what flows in: Wanda's score, a column at a time."""

    def of(self, weight: Tensor, flow: Flow) -> Tensor:
        """See Score."""
        return weight.abs().mean(0) * (flow.variance + flow.mean.square()).sqrt()


@dataclass(frozen=True)
class ColumnNorm:
    """The column's norm alone: magnitude, which looks at no data."""

    def of(self, weight: Tensor, flow: Flow) -> Tensor:
        """See Score."""
        return weight.square().sum(0).sqrt()


def standardised(score: Tensor) -> Tensor:
    """Zero mean and unit deviation (unbiased), so that layers compare; all zero where all are equal."""
    deviation = score.std() if len(score) > 1 else torch.zeros((), dtype=score.dtype)
    if not float(deviation) > 1e-12 * float(score.abs().max()):  # equal but for rounding: no unit is worse
        return torch.zeros_like(score)
    return (score - score.mean()) / deviation


@dataclass(frozen=True)
class Adaptive:
    """One list of all units, the worst first: AL-AM. With `heads`, a list of heads and one of neurons: AL-MM."""

    heads: float | None = None  # fraction of all heads to remove; None: they compete with the neurons
    least: int = 1  # units that stay at each site

    needs_scores: ClassVar = True

    def __post_init__(self) -> None:
        _check(self.heads, self.least)

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        total = total_cost(sites)
        spend = budget.sparsity * total
        heads, rest = _apart(sites, spend, self.heads)
        first = spend if self.heads is None else self.heads * total_cost(heads)
        check_affordable(heads, first, total, self.least)
        if rest:
            check_affordable(rest, spend - first, total, self.least)
        if scores is None:
            raise SettingError("an adaptive allocation was asked for", "no scores were given", "Give a score's.")
        keep = spend_everywhere(heads, scores, first, self.least)
        spend -= sum(float(site.cost().mean()) * (site.units - keep[site.name]) for site in heads)
        return keep | (spend_everywhere(rest, scores, spend, self.least) if rest else {})


@dataclass(frozen=True)
class PerLayer:
    """The same fraction of every block: UL-UM. With `heads`, that fraction of its heads: UL-MM.

    Heads are rounded to whole ones and neurons make up for it, so that every block ends with the same widths.
    """

    heads: float | None = None  # fraction of each block's heads to remove; None: the sparsity
    least: int = 1  # units that stay at each site

    needs_scores: ClassVar = False

    def __post_init__(self) -> None:
        _check(self.heads, self.least)

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation."""
        _apart(sites, budget.sparsity * total_cost(sites), self.heads)
        return per_block(sites, budget.sparsity, self.heads, self.least)


def _check(heads: float | None, least: int) -> None:
    if heads is not None:
        check_sparsity(heads, "heads")
    if least < 1:
        raise SettingError(f"least={least} was given", "a layer without units is no layer", "Leave 1 or more.")


def _apart(sites: Sequence[Site], spend: float, heads: float | None) -> tuple[list[Site], list[Site]]:
    """Sites that compete: all, or the heads and the rest. Raises BudgetError when the heads alone cost too much."""
    if heads is None:
        return list(sites), []
    apart = [site for site in sites if site.kind == "head"]
    if (wanted := heads * total_cost(apart)) > spend + 1e-6:
        raise BudgetError(
            f"heads of {wanted:,.0f} weights were to be removed",
            f"the whole budget is {spend:,.0f}",
            "Ask for fewer heads, or for a higher sparsity.",
        )
    return apart, [site for site in sites if site.kind != "head"]


@dataclass(frozen=True, kw_only=True)
class FLAP(Method):
    """Take out the heads and neurons that fluctuate least in any block, and put their means into biases.

    No gradient, no retraining; the model gets smaller at once.
    """

    sparsity: float = 0.2  # fraction taken out, in [0, 1): of the weights of all heads and neurons, or of `of`
    of: str = "weights"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    samples: int = 1024  # calibration sequences, as in the paper (of 128 tokens there)
    score: Score = Wifv()  # ifv and wifn are the paper's variants; column-norm looks at no data
    kinds: tuple[str, ...] = ("head", "channel")  # what is taken out: heads, neurons (channel) or both
    allocation: Allocation = Adaptive()  # per-layer gives every block the same widths, which stock loaders take
    head_power: float = 2.0  # what scores of attention are raised to, as in the authors' code; 1 leaves them
    compensate: bool = True  # put the mean of what goes into a bias, made where there is none
    skip: int = 0  # positions at the start of each sequence left out; 1 leaves out the one that attracts attention
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        47,
        "Fluctuation-based adaptive structured pruning for large language models",
        arxiv="2312.11983",
        year=2023,
        granularity=("head", "channel"),
        needs=("calibration",),
        families=("decoder", "encoder", "vision transformer"),
        axes="criterion allocation",
        criterion=("activation",),
        tasks=("language modelling",),
        updates=("solved",),
        reports="LLaMA-7B, WikiText-2 perplexity at 128 tokens: dense 12.62; 20 % 14.62 (Wanda-sp 22.12), "
        "50 % 31.80 (Wanda-sp 366).",
        checked="tests/methods/test_flap.py::test_what_is_removed_costs_the_sum_of_its_scores",
        differs=(
            "Variances are exact; the authors' running update uses the new mean twice and skips the first sequence.",
            "A head or group of queries counts its own weights; the authors' code has 512/3 neurons for any model.",
            "A head that no longer fits the budget is passed over for neurons, so that the target is met to a neuron.",
            "Every site keeps a unit at least; the authors' threshold may leave a layer none.",
        ),
    )
    tiny: ClassVar = {"samples": 16}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends weights."""
        return terms(self, "weights")

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        if self.samples < 1 or self.skip < 0 or not self.head_power > 0:
            raise SettingError(
                f"samples={self.samples}, skip={self.skip}, head_power={self.head_power:g} were given",
                "one sample is seen at least, positions are counted from 0, and a power is above 0",
                "Take the defaults: samples=1024, skip=0, head_power=2.",
            )
        if not self.kinds or set(self.kinds) - {"head", "channel"}:
            raise SettingError(
                f"kinds={','.join(self.kinds)} was given", "units are heads or neurons", "Give head, channel or both."
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = inner(coupling, self.kinds)
        sites, scores = self.terms.free(model, found), dict[str, Tensor]()

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity), scores or _Unseen())

        with suppress(_Unread):  # what cannot be met is refused before any data is read
            self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        flows = self.flows(model, sites, list(task.batches("calibration", self.samples)))
        named = tensors(model)
        scores |= {site.name: self.unit_scores(site, named, flows[site.name]) for site in sites}
        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        keep = {site.name: keep_top(scores[site.name], met.counts[site.name]) for site in sites}
        edits: list[Edit] = []
        added = 0
        if self.compensate:
            for site in sites:
                if not bool(keep[site.name].all()):
                    update = mended_bias(site, named, flows[site.name], keep[site.name])
                    added += 0 if update.name in named else len(update.value)
                    edits.append(update)
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        edits += [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
        edits = apply_(model, edits + list(removals(sites, keep)))
        gone, total = sum(float(s.cost()[~keep[s.name]].sum()) for s in sites), total_cost(sites)
        notes = [
            f"{gone:,.0f} of {total:,.0f} weights of heads and neurons taken out: {gone / total:.4f},"
            f" {met.words} asked for",
            *self.terms.left_alone(found),
            *met.notes,
        ]
        if added:
            notes.append(f"{added:,} biases were added")
        return Outcome(model, edits, notes=[*notes, *(str(frozen) for frozen in coupling.frozen)])

    def flows(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch]) -> dict[str, Flow]:
        """What flows into the matrix that reads each site, everything before it being dense."""
        masks = [b.inputs.get("attention_mask") if isinstance(b.inputs, Mapping) else None for b in batches]
        found: dict[str, Flow] = {}
        for block in look(model, batches):
            modules = {site.name: reader(site).module for site in block.pick(sites)}
            if modules:
                found |= of_all(self._seen(block, modules, masks))
        for site in sites:
            seen = found.get(site.name, Flow(0, torch.zeros(()), torch.zeros(())))
            if seen.tokens < 2 or not bool(torch.isfinite(seen.variance).all()):
                raise EvidenceError(
                    f"{site.name} was to be scored by how it fluctuates",
                    f"{seen.tokens} tokens reached it" if seen.tokens < 2 else "it holds NaN or infinity",
                    "Give more calibration data, or use bfloat16 or float32 where half precision overflows.",
                )
        return found

    def _seen(self, block: Block, modules: Mapping[str, str], masks: Sequence[Tensor | None]) -> dict[str, Running]:
        """The tokens that flow into modules of a block and count, by site, in one pass."""
        running = {name: Running() for name in modules}
        with unshared():
            for caught, mask in zip(block.watch_all(modules.values()), masks, strict=True):
                for name, module in modules.items():
                    running[name].add(_rows(caught[module], mask, self.skip, module))
        return running

    def unit_scores(self, site: Site, named: Tensors, flow: Flow) -> Tensor:
        """Standardised scores of a site's units [units]: of a neuron its column's, of a head the mean of its own."""
        part = reader(site)
        score = self.score.of(part.read(named).detach().double(), flow)
        z = standardised(score.pow(self.head_power) if site.kind == "head" else score)
        assert part.owner is not None
        owner = part.owner.reshape(-1).to(z.device)
        mine = owner >= 0
        total = torch.zeros(site.units, dtype=z.dtype, device=z.device).index_add(0, owner[mine], z[mine])
        return (total / torch.bincount(owner[mine], minlength=site.units)).cpu()


def mended_bias(site: Site, named: Tensors, flow: Flow, keep: Tensor) -> Update:
    """The bias of the matrix that reads a site, with what the removed units give on average added to it."""
    part = reader(site)
    assert part.owner is not None
    weight = part.read(named).detach()
    owner = part.owner.reshape(-1)
    gone = ((owner >= 0) & ~keep[owner.clamp(min=0)]).to(weight.device)
    # float64 until the sum is there: a mean rounded to half precision would be off for every token
    shift = weight.double()[:, gone] @ flow.mean.to(weight.device)[gone]
    name = part.name.removesuffix("weight") + "bias"
    old = named[name].detach().double() if name in named else torch.zeros_like(shift)
    return Update(name, (old + shift).to(weight.dtype))


class _Unread(Exception):  # noqa: N818  scores were asked for, which is no error
    pass


class _Unseen(dict[str, Tensor]):
    """Scores that are not there yet."""

    def __missing__(self, name: str) -> Tensor:
        raise _Unread


def _rows(x: Tensor, mask: Tensor | None, skip: int, module: str) -> Tensor:
    """The tokens that count, a row each: not padding, and not the first `skip` of a sequence."""
    if x.dim() < 3 and skip:
        raise GraphError(
            f"the first {skip} positions at {module} were to be left out",
            "its input has no axis of positions",
            "Use skip=0.",
        )
    x = x[:, skip:] if skip else x
    return tokens_of(x, mask if mask is None or mask.dim() != 2 else mask[:, skip:])
