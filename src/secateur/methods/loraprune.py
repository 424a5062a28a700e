"""LoRAPrune: adapters learn a task and say on the way which heads and neurons it can do without.

Zhang, Chen, Shen, Yang, Ou, Yu, Zhuang. "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient
Fine-Tuning." ACL Findings 2024. arXiv:2305.18403, section 3. W is frozen, c B A is learnt beside it, and gA, gB are the
gradients of A and B; that of W is never taken. What one step of rate 1 would take from B A stands for it:

    G = gB A + B gA - gB gA                                the surrogate gradient of W
    E = (G * (W + c B A))^2                                what each weight is worth
    s = sum over the module's matrices of v / ||v||        v: sums of E over what each head or neuron owns of a matrix
    S <- 0.9 S + 0.1 s                                     at each optimizer step

Every few steps the units with the least S are shut, as many in each layer as a cubic ramp says: what q, k, v, gate and
up put out for them is multiplied by 0. So they get no gradient, and do not come back. At last adapters are merged
and units that are shut are taken out: a small dense model.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.adapters import LowRank, tied_names
from secateur.axes import Curve, Linear, Power, Schedule, Scores, keep_top, kept_of, text_of
from secateur.axes.budgets import Met, Terms
from secateur.axes.groups import by_unit
from secateur.axes.hooks import Adapted, adaptable, hooked, is_linear
from secateur.axes.recovery import Retrain, only
from secateur.axes.rules import LearningRate, everything, sparsity_of
from secateur.cut import DEFAULT_EXCLUDE
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import BudgetError, ModelError, SettingError, SiteError
from secateur.graph import couple, removals
from secateur.graph.inner import inner
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, Unit, total_units
from secateur.task import Task, generator
from secateur.train import Loop, Rule, fit

# What a unit is worth


def surrogate_gradient(a: Tensor, b: Tensor, grad_a: Tensor, grad_b: Tensor, product: bool = True) -> Tensor:
    """What a step of rate 1 would take from B A: gB A + B gA - gB gA, of A [r, in] and B [out, r]: [out, in].

    Without the product it is the first-order part alone, which scales with the gradient as the gradient of W would.
    """
    found = grad_b @ a + b @ grad_a
    return found - grad_b @ grad_a if product else found


def weight_scores(gradient: Tensor, weight: Tensor, power: float = 2.0) -> Tensor:
    """|G * W|^power [out, in]: 2 is the paper's equation, 1 the authors' code."""
    return (gradient * weight).abs().pow(power)


def unit_length(values: Tensor) -> Tensor:
    """A vector over its length; zeros stay zeros."""
    length = torch.linalg.vector_norm(values)
    return values / length if length > 0 else values


@runtime_checkable
class Score(Protocol):
    """What each weight of a matrix is worth; its units are worth the sums."""

    whole: ClassVar[bool]  # whether it reads the gradient of W, which then takes as much memory as W

    def of(self, layer: Adapted, draw: torch.Generator) -> Tensor:
        """[out, in]; from a layer with an adapter, whose gradients are there."""
        ...


@dataclass(frozen=True)
class LowRankGradient:
    """By the gradients of A and B: the paper's."""

    power: float = 2.0  # of |G * W|: 2 as in the paper's equation, 1 as in the authors' code
    product: bool = True  # the last term of G, which is of second order in the gradient, and so assumes a rate of 1

    whole: ClassVar = False

    def __post_init__(self) -> None:
        check_power(self.power)

    def of(self, layer: Adapted, draw: torch.Generator) -> Tensor:
        """See Score. An adapter that no gradient reached says nothing: zeros."""
        low = layer.low
        if low is None or low.a.grad is None or low.b.grad is None:
            return torch.zeros(layer.part.shape)
        gradient = surrogate_gradient(low.a.detach(), low.b.detach(), low.a.grad, low.b.grad, self.product)
        return weight_scores(gradient, layer.weight(), self.power)


@dataclass(frozen=True)
class FullGradient:
    """By the gradient of W itself, as LLM-Pruner has it: what the surrogate stands for."""

    power: float = 2.0

    whole: ClassVar = True

    def __post_init__(self) -> None:
        check_power(self.power)

    def of(self, layer: Adapted, draw: torch.Generator) -> Tensor:
        """See Score."""
        if layer.frozen.grad is None:
            return torch.zeros(layer.part.shape)
        return weight_scores(layer.part.view(layer.frozen.grad).float(), layer.weight(), self.power)


@dataclass(frozen=True)
class WeightSize:
    """By the weights alone: no gradient is read."""

    power: float = 2.0

    whole: ClassVar = False

    def __post_init__(self) -> None:
        check_power(self.power)

    def of(self, layer: Adapted, draw: torch.Generator) -> Tensor:
        """See Score."""
        return layer.weight().abs().pow(self.power)


@dataclass(frozen=True)
class Chance:
    """By nothing: the control."""

    whole: ClassVar = False

    def of(self, layer: Adapted, draw: torch.Generator) -> Tensor:
        """See Score."""
        return torch.rand(layer.part.shape, generator=draw)


def check_power(power: float) -> None:
    """Raise SettingError for a power that would not rank larger products higher."""
    if not power > 0:
        raise SettingError(f"scores to the power {power:g} were asked for", "a power is above 0", "Give 2, or 1.")


def unit_scores(site: Site, layers: Mapping[str, Adapted], score: Score, keep: Tensor, draw: torch.Generator) -> Tensor:
    """One score per unit [units], float64: of each matrix a vector of length 1, and their sum.

    A matrix without an adapter adds nothing. Units that are shut are left out before the length is taken: B gA is not
    zero in their rows, and would make the matrix count less for the others.
    """
    total = torch.zeros(site.units, dtype=torch.float64)
    for part in site.parts:
        if (layer := layers.get(part.name)) is not None:
            found = by_unit(part, site.units, score.of(layer, draw)).cpu()
            total += unit_length(found * keep)
    return total


# While training


class Shutting(Rule):
    """Follows what units are worth, and shuts more and more of them, until at each site as many are left as asked.

    The gradients that count are those the optimizer is about to use: accumulated, unscaled and clipped. Its layers'
    hooks must be in place: see `hooked`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        counts: Mapping[str, int],
        layers: Mapping[str, Adapted],
        schedule: Schedule,
        score: Score | None = None,
        *,
        smooth: float = 0.9,
        clip: float = 1.0,
        draw: torch.Generator | None = None,
    ) -> None:
        self.sites, self.counts, self.layers = list(sites), dict(counts), layers
        self.schedule, self.smooth, self.clip = schedule, smooth, clip
        self.score: Score = LowRankGradient() if score is None else score
        self.draw = torch.Generator() if draw is None else draw
        self.keep = everything(self.sites)
        self.scores = {site.name: torch.zeros(site.units, dtype=torch.float64) for site in self.sites}
        for site in self.sites:
            if not any(part.name in self.scored for part in site.parts):
                raise SettingError(
                    f"the units of {site.name} were to be scored by adapters",
                    "none of its matrices has one",
                    "Widen include=, or leave the site alone by protect=.",
                )
            for part in site.parts:
                if part.makes and part.name not in layers:
                    raise SiteError(
                        f"units of {site.name} were to be shut",
                        f"{part.name} makes them and is no layer that was given",
                        "Give a layer for it, without an adapter if need be.",
                    )

    @property
    def scored(self) -> dict[str, Adapted]:
        """The layers that units are scored by: those of its sites that have adapters."""
        names = dict.fromkeys(part.name for site in self.sites for part in site.parts)
        return {n: self.layers[n] for n in names if n in self.layers and self.layers[n].low is not None}

    def parameters(self) -> list[Tensor]:
        """A and B of every adapter."""
        return [p for layer in self.layers.values() if layer.low is not None for p in layer.low.parameters()]

    def start(self, loop: Loop) -> None:
        """Say what the schedule means for this run."""
        if (late := self.schedule.late()) is not None:
            loop.note(late)
        loop.occupied(self.keep)

    def before_step(self, loop: Loop) -> None:
        """Clip, score, and shut what is due: in this order, as published."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)
        self.look(loop)
        if self.schedule.due(loop.step, loop.steps):
            self.shut(loop, self.schedule.value(loop.step, loop.steps))

    def look(self, loop: Loop) -> None:
        """Bring what units are worth up to date; a step whose scores are not finite is left out, with a remark."""
        found = {s.name: unit_scores(s, self.scored, self.score, self.keep[s.name], self.draw) for s in self.sites}
        if self.score.whole:
            for layer in self.scored.values():
                layer.frozen.grad = None  # the optimizer does not hold it, and would not clear it
        if not all(bool(values.isfinite().all()) for values in found.values()):
            loop.note("scores that are not finite were left out of the means")
            return
        for name, values in found.items():
            self.scores[name] = smoothed(self.scores[name], values, self.smooth)

    def shut(self, loop: Loop, sparsity: float) -> None:
        """Shut the worst at each site, as many as are to be gone at a sparsity; what is shut stays shut."""
        keep = {}
        for site in self.sites:
            count = self.count(site, sparsity)
            was = self.keep[site.name]
            keep[site.name] = keep_top(self.scores[site.name], min(count, int(was.sum())), was)
        loop.agree(keep)
        self.keep = keep
        self.mask()
        loop.occupied(keep)
        loop.log("sparsity", sparsity_of(keep))

    def count(self, site: Site, sparsity: float) -> int:
        """Units a site has left at a sparsity on the way: all but int(units * sparsity), and never less than at last.

        Where widths were rounded, or the budget is not of units, the way is as long as the site's own cut.
        """
        last, end = self.counts[site.name], self.schedule.end
        own = end if last == kept_of(site.units, end) else (site.units - last) / site.units
        return max(last, kept_of(site.units, own * sparsity / end))

    def mask(self) -> None:
        """Put the masks where the units are made."""
        masks: dict[str, Tensor] = {}
        for site in self.sites:
            for part in site.parts:
                if part.makes:  # two sites may make parts of one matrix
                    mine = part.expand(self.keep[site.name].float(), nobody=1.0).reshape(-1)
                    masks[part.name] = masks[part.name] * mine if part.name in masks else mine
        for name, mask in masks.items():
            self.layers[name].mask = mask.to(self.layers[name].frozen.device)

    def finish(self, loop: Loop) -> None:
        """The last cut, where the schedule ends with training."""
        if loop.step == loop.steps == self.schedule.window(loop.steps)[1]:
            self.shut(loop, self.schedule.end)

    def state(self) -> dict[str, Any]:
        """Scores, masks and adapters."""
        return {"scores": dict(self.scores), "keep": dict(self.keep), "low": [p.detach() for p in self.parameters()]}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As they were."""
        self.scores, self.keep = dict(state["scores"]), {name: k.bool() for name, k in state["keep"].items()}
        with torch.no_grad():
            for parameter, was in zip(self.parameters(), state["low"], strict=True):
                parameter.copy_(was)
        self.mask()


def smoothed(old: Tensor, new: Tensor, smooth: float) -> Tensor:
    """smooth * old + (1 - smooth) * new. The mean starts at zero, which is the same for all units of a layer."""
    return smooth * old + (1 - smooth) * new


@dataclass(frozen=True)
class Inside:
    """The same fraction of the units of every site, but for the blocks at both ends, which are left alone."""

    spare_first: float = 0.1  # fraction of the blocks, rounded down
    spare_last: int = 1
    least: int = 1

    needs_scores: ClassVar = False

    def blocks(self, sites: Sequence[Site]) -> list[str]:
        """The blocks that are not spared. Raises SettingError when there are none."""
        every = list(dict.fromkeys(site.block for site in sites))
        found = every[int(self.spare_first * len(every) + 1e-9) : max(0, len(every) - self.spare_last)]
        if not found:
            raise SettingError(
                f"{self.spare_first:g} of the blocks at the start and {self.spare_last} at the end were to be spared",
                f"there are {len(every)}",
                "Spare fewer: spare_first=0, spare_last=0.",
            )
        return found

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises BudgetError where fewer than `least` units would stay."""
        inside = self.blocks(sites)
        keep = {s.name: kept_of(s.units, budget.sparsity) if s.block in inside else s.units for s in sites}
        for site in sites:
            if keep[site.name] < min(self.least, site.units):
                raise BudgetError(
                    f"{budget.sparsity:g} of the {site.units} {site.kind}s of {site.name} were to be taken out",
                    f"{keep[site.name]} would be left, and {self.least} must be",
                    f"Ask for at most {1 - self.least / site.units:.4g}, or for a smaller least.",
                )
        return keep


@dataclass(frozen=True, kw_only=True)
class LoRAPrune(Method):
    """Train adapters, shut heads and neurons by their gradients meanwhile, and end with a small dense model."""

    sparsity: float = 0.5  # fraction of the heads and of the neurons of each block that is not spared, in [0, 1)
    of: str = "units"  # what sparsity is of: units as said; or weights, parameters, flops, bytes, latency of the whole
    score: Score = LowRankGradient()  # full-gradient, weight-size and chance are what the paper compares with
    rank: int = 8  # of the adapters: r
    alpha: float = 16.0  # c = alpha / r
    dropout: float = 0.05  # of what flows into an adapter
    rate: float = 1e-4  # learning rate of AdamW at its peak; the paper's text has 3e-4, a tiny model wants 1e-3
    warmup: float = 0.1  # fraction of the steps in which the rate rises; it falls linearly after
    clip: float = 1.0  # the longest that all gradients together may be; scores read them clipped
    steps: int = 400  # optimizer steps; the paper's 2 epochs of 25,000 samples are about as many of 128
    start: float = 0.0  # sparsity before the ramp
    begin: float = 0.1  # fraction of training at which the ramp starts
    until: float = 0.9  # and ends, exactly at the sparsity; begin=until is one shot
    curve: Curve = Power(3.0)  # of the ramp
    every: int = 10  # optimizer steps between cuts
    smooth: float = 0.9  # of what a unit was worth before, in the running mean
    spare_first: float = 0.1  # fraction of the blocks, at the start, that is left alone
    spare_last: int = 1  # blocks at the end that are left alone
    least: int = 1  # units that stay at each site
    round_to: int = 1  # widths that are left are multiples of this
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "*.layers.0.*"
    include: tuple[str, ...] = ()  # matrices that adapters go on, by name, class or role; () is every one in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # matrices without adapters

    card: ClassVar = Card(
        38,
        "LoRAPrune: Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning",
        arxiv="2305.18403",
        year=2024,
        when="during training",
        granularity=("head", "channel"),
        needs=("labels", "training"),
        families=("decoder", "encoder", "vision transformer"),
        axes="criterion schedule rule adapters",
        criterion=("first-order",),
        tasks=("language modelling",),
        stage=("score or mask",),
        schedule=("cubic",),
        allocation=("uniform",),
        fusion=("low-rank",),
        start=("pretrained",),
        transfer=("target task",),
        reports="LLaMA-7B at 50 %: WikiText-2 perplexity 30.12 (LLM-Pruner 38.12), PTB 50.30 (66.35), with 52.6 % less "
        "memory.",
        checked="tests/methods/test_loraprune.py::test_the_surrogate_gradient_by_hand",
        differs=(
            "with grouped queries a unit is a key-value head with all the query heads that read it; the authors' code"
            " takes 32 heads for granted, and scores and slices them wrongly",
            "the last cut is made exactly at the ramp's end; in the authors' code it is the one before, and the"
            " sparsity asked for is not reached",
            "what scores multiply by is W + c B A, as in the authors' code; the paper's equation leaves c out",
            "weight scores are squared as in the paper's equation, and no 1e-8 is added to lengths: beside sums of"
            " squares it is not small",
            "units that are shut do not count in the lengths that scores are divided by",
            "what is shut stays shut; the authors build masks anew at each cut, from scores times the last mask",
            "adapters are merged before units are taken out, which comes to the same",
            "weights are of any float type; 8-bit ones are to be turned into floats first",
        ),
    )
    tiny: ClassVar = {"steps": 20, "rate": 5e-3, "every": 2, "rank": 2, "alpha": 4.0}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for; units are those of blocks that are not spared."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut."""
        of: Unit = self.of  # type: ignore[assignment]  # looked at by Terms.check
        return Terms(self.sparsity, of, "units", self.round_to, protect=self.protect, least=self.least)

    @property
    def allocation(self) -> Inside:
        """How the budget is spent: evenly, over the blocks that are not spared."""
        return Inside(self.spare_first, self.spare_last, self.least)

    def schedule(self) -> Schedule:
        """The ramp."""
        return Schedule(
            start=self.start, end=self.sparsity, begin=self.begin, until=self.until, curve=self.curve, every=self.every
        )

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        self.terms.check()
        self.schedule().check_sparsity()
        LearningRate(warmup=self.warmup)
        if min(self.rank, self.steps, self.least) < 1 or min(self.alpha, self.rate, self.clip) <= 0:
            raise SettingError(
                f"rank={self.rank}, steps={self.steps}, least={self.least}, alpha={self.alpha:g}, rate={self.rate:g}"
                f" and clip={self.clip:g} were given",
                "the first three start at 1, and the others are above 0",
                "Take the defaults: 8, 400, 1, 16, 1e-4 and 1.",
            )
        if (
            min(self.dropout, self.smooth, self.spare_first) < 0
            or max(self.dropout, self.smooth, self.spare_first) >= 1
        ):
            raise SettingError(
                f"dropout={self.dropout:g}, smooth={self.smooth:g} and spare_first={self.spare_first:g} were given",
                "they are fractions, in [0, 1)",
                "Take the defaults: 0.05, 0.9 and 0.1.",
            )
        if self.spare_last < 0:
            raise SettingError(
                f"{self.spare_last} blocks at the end were to be spared", "a count is not negative", "Give 0 or more."
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises BudgetError where nothing or too much would go, ModelError for layers it cannot mask.

        Raises GraphError for units that a norm takes statistics over: masked is not removed there.
        """
        self.check()
        Retrain().ready(model, task)
        coupling = couple(model, task.example)
        found = inner(coupling)
        sites = self.terms.free(model, found)

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity, of="units"))

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        inside, cut = self.chosen(sites, met)
        coupling.check_exact(cut, lambda site: f"Leave it alone: protect={site.name}.")
        layers = self.layers(model, task, cut)
        rule = Shutting(
            cut, met.counts, layers, self.schedule(), self.score,
            smooth=self.smooth, clip=self.clip, draw=generator(task, "loraprune scores"),
        )  # fmt: skip
        read = [layer.frozen for layer in rule.scored.values()] if self.score.whole else []
        with only(model, read), hooked(model, layers):
            optimizer = torch.optim.AdamW(rule.parameters(), self.rate, weight_decay=0.0)
            history = fit(model, task, self.steps, [LearningRate(Linear(), self.warmup), rule], optimizer)
        notes = self.notes(inside, rule, met)
        edits: list[Edit] = [Update(n, layer.merged()) for n, layer in layers.items() if layer.low is not None]
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        edits += [Mask(s, torch.ones(s.shape, dtype=torch.bool)) for s in inside if s.name not in rule.keep]
        apply_(model, [*edits, *(cuts := removals(cut, rule.keep))])
        notes += [*self.terms.left_alone(found), *met.notes, *(str(frozen) for frozen in coupling.frozen)]
        return Outcome(model, [*edits, *cuts], history, notes=[*notes, *history.notes])

    def chosen(self, sites: Sequence[Site], met: Met) -> tuple[list[Site], list[Site]]:
        """The sites of blocks that are not spared, and those of them that lose units. Raises BudgetError for none."""
        blocks = self.allocation.blocks(sites)
        inside = [site for site in sites if site.block in blocks]
        cut = [site for site in inside if met.counts[site.name] < site.units]
        if not cut:
            most = max(site.units for site in inside)
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} was asked for",
                f"of {most} units, the most that one of {len(inside)} sites has, it takes none",
                f"Ask for {1 / most:.4g} at least.",
            )
        return inside, cut

    def layers(self, model: nn.Module, task: Task, cut: Sequence[Site]) -> dict[str, Adapted]:
        """The linear layers that get adapters, and those that make units to be shut, by the name of their weight.

        Raises ModelError for a maker of units that is not called as a linear layer, a weight that several layers
        share, and one behind a gate; SiteError where nothing gets an adapter.
        """
        adapted = adaptable(model, self.include, self.exclude)
        makers = {part.name: part for site in cut for part in site.parts if part.makes}
        tied, named = tied_names(model), dict(model.named_parameters(remove_duplicate=False))
        found: dict[str, Adapted] = {}
        for name, part in {**makers, **adapted}.items():
            module = model.get_submodule(part.module)
            asked = f"{name} was to be adapted while units are shut"
            if parametrize.is_parametrized(module):
                raise ModelError(asked, "it is behind a gate or another adapter", "Harden it first.")
            if not is_linear(module):
                raise ModelError(
                    asked,
                    f"a {type(module).__name__} holds it, which is not called as a linear layer",
                    "Use a model whose projections are linear layers of their own, or another method.",
                )
            if name in tied and name in adapted:
                raise ModelError(
                    asked, f"it is one tensor with {', '.join(n for n in tied[name] if n != name)}",
                    f"Leave it out with exclude={name.removesuffix('.weight')}, or untie them first.",
                )  # fmt: skip
            low = None
            if name in adapted:
                low = LowRank(named[name], self.rank, turned=part.turned)
                low.start_at_zero_(generator(task, f"loraprune {name}"))
            found[name] = Adapted(part, named[name], low, self.alpha / self.rank, self.dropout)
        return found

    def notes(self, inside: Sequence[Site], rule: Shutting, met: Met) -> list[str]:
        """What went, what was trained, and what the scores read."""
        said = []
        for kind, word in (("head", "heads"), ("channel", "neurons")):
            mine = [site for site in inside if site.kind == kind]
            gone = sum(site.units - met.counts[site.name] for site in mine)
            if mine:
                units = total_units(mine)
                said.append(f"{gone:,} of {units:,} {word} ({gone / units:.1%})")
        trained = sum(p.numel() for p in rule.parameters())
        behind = sum(layer.frozen.numel() for layer in rule.layers.values() if layer.low is not None)
        small, large = (gradient_bytes(rule.scored.values(), whole) for whole in (False, True))
        bare = [p.name for s in rule.sites for p in s.parts if len(p.shape) > 1 and p.name not in rule.scored]
        notes = [
            f"{' and '.join(said)} taken out of {len({s.block for s in inside})} blocks, {met.words} asked for",
            f"{trained:,} parameters were trained, {trained / behind:.2%} of the matrices they were merged into",
            f"units were scored by {text_of(self.score)}; gradients of the adapters it was about take {small:,} bytes,"
            f" those of the matrices behind them {large:,}",
        ]
        if bare:
            notes.append(f"no adapter, and so no say in what goes: {', '.join(dict.fromkeys(bare))}")
        return notes


def gradient_bytes(layers: Iterable[Adapted], whole: bool) -> int:
    """What the gradients of some layers' adapters take, in bytes, or those of the whole matrices behind them."""
    held = [[layer.frozen] if whole else list(layer.low.parameters()) for layer in layers if layer.low is not None]
    return sum(p.numel() * p.element_size() for each in held for p in each)
