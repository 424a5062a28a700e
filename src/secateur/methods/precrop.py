"""PreCrop: if only each layer's share counts at initialisation, make the layers narrower instead, and train that.

Cai, Hua, Chen, Suh, De Sa, Zhang. "Structured Pruning is All You Need for Pruning CNNs at Initialization." 2022.
arXiv:2203.02549. With density p_l of layer l, a_l weights and b_l multiply-adds, the synaptic flow to be expected of
random masks over random weights is, but for a constant, the product of all p_l, whatever the masks are made of. So

    max sum_l log p_l    subject to    sum_l a_l p_l <= P,    sum_l b_l p_l <= F,    p_l <= 1

(SynExp) needs neither data nor weights. A layer of r_in and r_out of its channels has a density of r_in r_out: widths
come from densities, found thus or lent by SNIP, GraSP, SynFlow or a rule of shapes, or from the same programme over the
widths themselves, where layers that share channels share one r. Nothing is searched for. Without p_l <= 1 the same
programme is PreConfig, which makes some layers wider and others narrower at the same cost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from secateur.axes import Allocation, SynExp
from secateur.axes.budgets import Terms
from secateur.axes.densities import (
    Costs,
    Limit,
    Numbers,
    best_densities,
    check_least,
    climb,
    log_sides,
    whole_widths,
    within,
)
from secateur.axes.donors import Donor
from secateur.axes.filters import writers
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import LearningRate
from secateur.cut import weights
from secateur.edit import Edit, Mask, Rotate, apply_
from secateur.errors import ModelError, SettingError
from secateur.graph import Coupling, couple, left_of, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task, generator
from secateur.train import fit

# Densities to widths


@runtime_checkable
class Widths(Protocol):
    """How many channels each group keeps, in real numbers, given what densities the layers are to have."""

    @property
    def by_densities(self) -> bool:
        """Whether it looks at densities."""
        ...

    def choose(self, costs: Costs, limits: Sequence[Limit], wanted: Numbers) -> Numbers:
        """Widths [groups] from one channel up to the most there may be, within the limits."""
        ...


@dataclass(frozen=True)
class Programme:
    """SynExp over the widths themselves: the largest product of densities that widths can have within the budgets.

    Convex in the logarithms of the widths (a geometric programme) where no side of a layer is partly fixed.
    """

    by_densities: ClassVar[bool] = False

    def choose(self, costs: Costs, limits: Sequence[Limit], wanted: Numbers) -> Numbers:
        """See Widths."""

        def goal(x: Numbers) -> tuple[float, Numbers, Numbers]:
            sides, slopes = log_sides(costs, x)
            return float(np.log(sides[costs.place]).sum()), slopes.sum(0), np.zeros((len(x), len(x)))

        return climb(costs, limits, goal)


@dataclass(frozen=True)
class Nearest:
    """Widths whose layers come nearest to the densities, in logarithms, each layer counting by its weights."""

    by_densities: ClassVar[bool] = True

    def choose(self, costs: Costs, limits: Sequence[Limit], wanted: Numbers) -> Numbers:
        """See Widths."""
        whole = np.log(costs.sides(costs.full)[costs.place]).sum(1)
        count = (costs.weights * costs.sides(costs.full).prod(1))[costs.place]
        share, target = count / count.sum(), np.log(np.maximum(wanted, 1e-9))

        def goal(x: Numbers) -> tuple[float, Numbers, Numbers]:
            sides, slopes = log_sides(costs, x)
            off = np.log(sides[costs.place]).sum(1) - whole - target
            return -float(share @ off**2), -2 * slopes.T @ (share * off), 2 * slopes.T @ (share[:, None] * slopes)

        return climb(costs, limits, goal)


@dataclass(frozen=True)
class Roots:
    """A group keeps the geometric mean of sqrt(p) over the layers that write or read it; scaled to the budgets."""

    by_densities: ClassVar[bool] = True

    def choose(self, costs: Costs, limits: Sequence[Limit], wanted: Numbers) -> Numbers:
        """See Widths."""
        touches = (costs.per[costs.place] > 0).sum(1)  # [layers, groups]
        share = np.exp(touches.T @ (np.log(np.maximum(wanted, 1e-9)) / 2) / np.maximum(touches.sum(0), 1))

        def scaled(by: float) -> Numbers:
            return np.clip(by * share * costs.full, 1, costs.full)

        check_least(costs, limits)
        low, high = 0.0, 1.0
        while high < 1e9 and within(costs, limits, scaled(high)):
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if within(costs, limits, scaled(middle)) else (low, middle)
        return scaled(low)


# Which channels may go


@runtime_checkable
class Scope(Protocol):
    """Which groups of channels may be narrowed."""

    def of(self, sites: Sequence[Site]) -> list[Site]:
        """Some of the sites."""
        ...


@dataclass(frozen=True)
class Everything:
    """All of them, shortcuts too: layers that a shortcut ties are narrowed alike."""

    def of(self, sites: Sequence[Site]) -> list[Site]:
        """See Scope."""
        return list(sites)


@dataclass(frozen=True)
class Branches:
    """Channels that one layer alone writes: the inside of residual blocks, while shortcuts keep their width."""

    def of(self, sites: Sequence[Site]) -> list[Site]:
        """See Scope."""
        return [site for site in sites if len(writers(site)) == 1]


@dataclass(frozen=True, kw_only=True)
class PreCrop(Method):
    """Make every layer as narrow as its share says, draw new weights, train. No data before training, no search."""

    sparsity: float = 0.5  # fraction taken out, in [0, 1), of the parameters that widths decide about; 0: any number
    flops: float = 0.0  # fraction of the multiply-adds of those layers that go; 0: any number
    densities: Allocation = SynExp()  # what each layer is to keep; donor(probe='snip'): as in that probe's mask
    widths: Widths = Programme()  # densities to widths: nearest, roots; programme is SynExp on the widths themselves
    scope: Scope = Everything()  # what may be narrowed; branches: the inside of residual blocks
    widest: float = 1.0  # times its channels that a layer may have; above 1 some become wider: PreConfig
    round_to: int = 1  # widths are multiples of this
    steps: int = 1000  # of training the narrow network; 0: none
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        31,
        "Structured Pruning is All You Need for Pruning CNNs at Initialization",
        arxiv="2203.02549",
        year=2022,
        when="before training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("cnn", "mlp"),
        axes="allocation probe graph",
        criterion=("none",),
        tasks=("classification",),
        choice=("data-free",),
        reports="as good as weight-level pruning at initialisation with the same densities, and up to 2.7 points ahead "
        "of SynFlow on ImageNet with MobileNetV2",
        checked="tests/methods/test_precrop.py::test_the_narrow_network_does_as_well_as_masks_of_the_same_densities",
        differs=(
            "reconstructed without code: the programme over widths and the nearest widths are this project's; roots is "
            "our reading of the paper's rule",
            "PreConfig (widest above 1) holds both parameters and multiply-adds to what they were, or to less",
            "biases and norms count as parameters, and so does the classifier, but nothing that no width decides about:"
            " with branches alone that is much, and a note has the whole network too",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "steps": 20}

    def budget(self) -> Budget | None:
        """The fraction of parameters, or of multiply-adds; none where both are limited, as one may not bind."""
        if (self.sparsity and self.flops) or self.widest > 1:
            return None
        return Budget(self.flops, of="flops") if self.flops else Budget(self.sparsity)

    def check(self) -> None:
        """Raise SettingError for budgets, widths or training that cannot be."""
        check_sparsity(self.sparsity)
        check_sparsity(self.flops, "flops")
        for name, least in (("round_to", 1), ("steps", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} was given", f"{least} is the least", "Give more.")
        if not self.widths.by_densities and not isinstance(self.densities, SynExp):
            raise SettingError(
                f"densities by {type(self.densities).__name__} and widths by a programme were asked for",
                "the programme finds widths without looking at densities",
                "Give widths=nearest or widths=roots, or leave densities at syn-exp.",
            )
        if not 1 <= self.widest < np.inf or (self.widest > 1 and self.widths.by_densities):
            raise SettingError(
                f"widest={self.widest:g} with widths by {type(self.widths).__name__} was given",
                "a layer may have all of its channels at least, and densities above 1 only a programme finds",
                "Give widest=2 and widths=programme, or leave both out.",
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Shares, widths, a narrow network, training."""
        self.check()
        _check_plain(model)
        coupling = couple(model, task.example)
        terms = Terms(self.sparsity, round_to=self.round_to, protect=self.protect)
        found = self.scope.of(coupling.need("channel"))
        sites = terms.free(model, found)
        if not sites:
            raise ModelError(
                f"the inside of residual blocks of {type(model).__name__} was to be narrowed",
                "a shortcut ties every channel",
                "Give scope=everything.",
            )
        before = sum(p.numel() for p in model.parameters())
        costs = replace(Costs.of(model, sites), widest=self.widest)
        limits = self.limits(costs)
        wanted, notes = self.wanted(model, task, costs)
        real = self.widths.choose(costs, limits, wanted)
        self.check_widens(sites)
        multiples = np.array(list(terms.multiples(sites, coupling.multiples).values()))
        widths = whole_widths(costs, limits, real, multiples)
        edits = cropped_(model, sites, widths)
        reinitialize_(model, generator(task, "initial weights"))
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor)])
        notes += [*self.report(costs, sites, widths, coupling), *terms.left_alone(found)]
        if before > costs.total(costs.full, costs.weights):
            after = sum(p.numel() for p in model.parameters())
            notes.append(f"with what no width decides about, {after:,} of {before:,} parameters are left")
        return Outcome(model, edits, history, notes=notes + history.notes)

    def check_widens(self, sites: Sequence[Site]) -> None:
        """Raise ModelError for a tensor that has not one entry for each channel, where layers may become wider."""
        for site in sites if self.widest > 1 else ():
            for part in site.parts:
                if part.owned().numel() != site.units:
                    raise ModelError(
                        f"{site.name} was to be made wider",
                        f"{part.key} has {part.owned().numel()} entries for its {site.units} channels",
                        "Use it without concatenations and with pooling before the classifier, or leave widest at 1.",
                    )

    def limits(self, costs: Costs) -> list[Limit]:
        """The budgets; where layers may become wider, neither cost may be more than it was."""
        found = []
        for share, of, what in (
            (self.sparsity, costs.weights, "parameters"),
            (self.flops, costs.work, "multiply-adds"),
        ):
            if share or self.widest > 1:
                found.append(Limit(of, (1 - share) * costs.total(costs.full, of), what))
        return found

    def wanted(self, model: nn.Module, task: Task, costs: Costs) -> tuple[Numbers, list[str]]:
        """The density each layer is to have, and remarks; for SynExp under both budgets."""
        if isinstance(self.densities, SynExp):
            size = costs.sides(costs.full).prod(1)
            most = [(1 - share) * costs.total(costs.full, of) if share else np.inf
                    for share, of in ((self.sparsity, costs.weights), (self.flops, costs.work))]  # fmt: skip
            weights_, work = ((of * size)[costs.place] for of in (costs.weights, costs.work))
            return best_densities(weights_, work, *most), []
        sites = [site for site in weights(model, exclude=()) if site.name in costs.layers]
        scores, notes = None, []
        sparsity = self.sparsity or self.flops
        if isinstance(self.densities, Donor):
            reading = self.densities.probe.read(model, sites, task, sparsity)
            scores, notes = reading.scores, list(reading.notes)
        keep = self.densities.spread(sites, Budget(sparsity), scores)
        share = {site.name: max(keep[site.name], 1) / site.units for site in sites}
        return np.array([share[name] for name in costs.layers]), notes

    def report(self, costs: Costs, sites: Sequence[Site], found: Numbers, coupling: Coupling) -> list[str]:
        """Both costs, whichever was limited, the widths, and what could not be narrowed."""
        left = [
            f"{costs.total(found, of):,.0f} of {costs.total(costs.full, of):,.0f} {what} are left"
            for of, what in ((costs.weights, "parameters"), (costs.work, "multiply-adds"))
        ]
        widths = ", ".join(f"{site.name} {int(n)}/{site.units}" for site, n in zip(sites, found, strict=True))
        return [*left, f"widths: {widths}", *(str(frozen) for frozen in coupling.frozen)]


def cropped_(model: nn.Module, sites: Sequence[Site], widths: Sequence[float] | Numbers) -> list[Edit]:
    """Keep the first channels of each site, so many; before training one is as good as another. Changes the model.

    Where more are asked for than there are, channels are repeated: a basis of more directions than units.
    """
    counts = {site.name: int(count) for site, count in zip(sites, widths, strict=True)}
    keep: Mapping[str, Tensor] = {site.name: torch.arange(site.units) < counts[site.name] for site in sites}
    # A site that keeps all is masked by nothing, so that the record counts its weights among those that could go.
    whole: list[Edit] = [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
    edits = apply_(model, [*whole, *removals(sites, keep)])
    wider = [site for site in left_of(sites, keep) if counts[site.name] > site.units]
    return edits + apply_(
        model, [Rotate(site, torch.eye(site.units)[:, torch.arange(counts[site.name]) % site.units]) for site in wider]
    )


def _check_plain(model: nn.Module) -> None:
    """Raise ModelError, naming the module, for a network that is not made of convolutions, matrices and norms."""
    known = (nn.Linear, nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm)
    for name, module in model.named_modules():
        if not isinstance(module, known) and next(module.parameters(recurse=False), None) is not None:
            raise ModelError(
                f"{type(model).__name__} was to be made narrower before training",
                f"{name or 'it'} ({type(module).__name__}) is neither a convolution nor a linear layer nor a norm",
                "Use it for CNNs and MLPs; l1_norm and flap narrow trained transformers.",
            )
