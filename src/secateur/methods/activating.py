"""Let units fire more often while another method prunes: take negative weights that training hardly moved as well.

Liu, Ghosh, Tan, Motani. "AP: Selective Activation for De-sparsifying Pruned Neural Networks." TMLR 2023.
arXiv:2212.06145. The dead rate of a network is the share of (unit, input) pairs whose ReLU puts out zero: static, of
units that never fire; dynamic, of all others. A pruned network asks for a lower dynamic rate, and gets it when some of
what goes are negative weights, which hold pre-activations down. In each round of pruning p of what is left,

    the method pruned with removes p - q by its own criterion,
    AP removes q of the weights left before: those with theta_e < 0 of the smallest |theta_e - theta_s|,

theta_s and theta_e being the weights where the round's training started and ended; then what stays goes back to its
initial values. Not a method by itself: it stands around any other that is told a sparsity and answers with masks.

    Activating(around=Snip())
    Activating(around=OneShot(criterion=Gradient(), allocation=Global(), pattern=PerMatrix()))
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.axes import Global, keep_top
from secateur.axes.allocations import gaps
from secateur.axes.rewinding import (
    Aside,
    Course,
    Keep,
    Policy,
    Rewind,
    Rounds,
    apart,
    check_rounds,
    magnitudes,
    pooled,
    search,
)
from secateur.axes.rules import sparsity_of
from secateur.axes.schedules import Cosine, Curve
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import calm
from secateur.method import Card, Method
from secateur.methods.magnitude import Magnitude
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task, generator
from secateur.train import Loop, Rule, Snapshot
from secateur.walk import unjournalled

# Which units fire


@dataclass(frozen=True)
class Firing:
    """How often the units of one activation, or of all, put nothing out."""

    units: int  # channels times positions
    static: float  # share of them that fire for no input
    dynamic: float  # share of the rest of (unit, input) pairs that do not fire, of all pairs

    @property
    def dead(self) -> float:
        """The share of pairs that do not fire."""
        return self.static + self.dynamic


@dataclass(frozen=True)
class DeadRates:
    """The dead rates of a network on some examples."""

    layers: Mapping[str, Firing]  # by the module whose forward calls the activation
    functions: tuple[str, ...]  # which activations there are: "relu"
    examples: int

    @property
    def total(self) -> Firing:
        """All units together; rates of zero where there are none."""
        units = sum(layer.units for layer in self.layers.values())
        share = [layer.units / max(units, 1) for layer in self.layers.values()]
        static = sum(s * layer.static for s, layer in zip(share, self.layers.values(), strict=True))
        return Firing(units, static, sum(s * x.dynamic for s, x in zip(share, self.layers.values(), strict=True)))


EXACT = frozenset({"relu", "relu_", "relu6"})  # put out zero, exactly where what they are given is not above zero
SMOOTH = frozenset({"leaky_relu", "leaky_relu_", "elu", "elu_", "celu", "selu", "gelu", "silu", "mish", "hardswish"})


class _Watch(TorchFunctionMode):
    """Counts, while it is active, where activations are given nothing above zero.

    What an activation is given is looked at before it is called, so that one that works in place hides nothing.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.ever: dict[str, Tensor] = {}  # bool [units]: has fired
        self.off: dict[str, int] = {}
        self.pairs: dict[str, int] = {}
        self.functions: set[str] = set()
        self._inside: list[str] = []
        self._calls: dict[str, int] = {}

    def forward(self, batch: Batch) -> None:
        """Put one batch through the model."""
        self._inside, self._calls = [], {}
        hooks = []
        for name, module in self.model.named_modules():
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: self._inside.append(name)))
            hooks.append(module.register_forward_hook(lambda *_: (self._inside.pop(), None)[1]))
        try:
            with self:
                batch.through(self.model)
        finally:
            for hook in hooks:
                hook.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count, then do what was asked."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in EXACT or name in SMOOTH:
            given = args[0] if args else kwargs.get("input")
            if isinstance(given, Tensor) and given.dim() > 1:
                self.functions.add(name.removesuffix("_"))
                self._count(given.detach() <= 0)
        return func(*args, **kwargs)

    def _count(self, off: Tensor) -> None:  # [examples, units...]
        where = self._inside[-1] if self._inside else ""
        self._calls[where] = self._calls.get(where, 0) + 1
        key = where if self._calls[where] == 1 else f"{where}#{self._calls[where]}"
        fired = (~off).any(0)
        if key in self.ever and self.ever[key].shape != fired.shape:
            raise EvidenceError(
                f"the units of {key or 'the model'} that fire were to be counted",
                f"there are {list(self.ever[key].shape)} in one batch and {list(fired.shape)} in another",
                "Give examples of one size.",
            )
        self.ever[key] = self.ever[key] | fired if key in self.ever else fired
        self.off[key] = self.off.get(key, 0) + int(off.sum())
        self.pairs[key] = self.pairs.get(key, 0) + off.numel()


def dead_rates(model: nn.Module, batches: Iterable[Batch]) -> DeadRates:
    """Which units never fire on some examples, and how often the others do not; batch norms in evaluation mode.

    A unit is one element of what an activation puts out for one example: a channel at a position. It does not fire
    where its pre-activation is not above zero, which for a ReLU is where it puts out exactly zero; for smooth
    activations (GELU, SiLU ...) the same is called dead, though a little comes through.
    """
    watch, examples = _Watch(model), 0
    with calm(model), torch.no_grad():
        for batch in batches:
            watch.forward(batch)
            examples += batch.size
    layers = {}
    for key, ever in watch.ever.items():
        static = int((~ever).sum()) / ever.numel()
        layers[key] = Firing(ever.numel(), static, max(watch.off[key] / watch.pairs[key] - static, 0.0))
    return DeadRates(layers, tuple(sorted(watch.functions)), examples)


class Meter(Rule):
    """Logs dead rates where a training starts and where it ends, and the share of weights that are negative."""

    def __init__(self, sites: Sequence[Site], samples: int) -> None:
        self.sites, self.samples = list(sites), samples
        self.seen: DeadRates | None = None
        self.before = self.after = Firing(0, 0.0, 0.0)

    def start(self, loop: Loop) -> None:
        """Measure the network as it starts, masked."""
        self.before = self._read(loop)

    def finish(self, loop: Loop) -> None:
        """Measure the trained network."""
        self.after = self._read(loop)
        kept = torch.cat([site.parts[0].read(loop.tensors).detach().reshape(-1) for site in self.sites])
        loop.log("negative weights", float((kept < 0).sum()) / max(int(torch.count_nonzero(kept)), 1))

    def _read(self, loop: Loop) -> Firing:
        assert loop.task is not None
        device = next(loop.model.parameters()).device
        batches = (batch.to(device) for batch in loop.task.batches("calibration", self.samples))
        self.seen = dead_rates(loop.model, batches)
        total = self.seen.total
        if total.units:
            loop.log("dynamic dead rate", total.dynamic)
            loop.log("static dead rate", total.static)
        return total

    def remarks(self) -> list[str]:
        """What was found, and what "dead" means where activations are smooth."""
        if self.seen is None:
            return []
        if not self.seen.layers:
            return ["no activation like a ReLU was seen: which units fire cannot be told, and AP has no ground here"]
        notes = [
            f"dead rate on {self.seen.examples:,} examples over the last training: dynamic {self.before.dynamic:.1%} "
            f"-> {self.after.dynamic:.1%}, static {self.before.static:.1%} -> {self.after.static:.1%}"
        ]
        if smooth := SMOOTH & set(self.seen.functions):
            notes.append(f"{', '.join(sorted(smooth))}: dead means a pre-activation at or below zero")
        return notes


# Which weights go


@runtime_checkable
class Order(Protocol):
    """In which order weights of the sign go."""

    def cost(self, start: Tensor, end: Tensor, draw: torch.Generator) -> Tensor:
        """A number per weight [n]; the lowest go first."""
        ...


@dataclass(frozen=True)
class LeastMoved:
    """Those first that training moved least: |theta_e - theta_s|, the paper's."""

    def cost(self, start: Tensor, end: Tensor, draw: torch.Generator) -> Tensor:
        """See Order."""
        return (end - start).abs()


@dataclass(frozen=True)
class MostMoved:
    """Those first that training moved most: a contrast."""

    def cost(self, start: Tensor, end: Tensor, draw: torch.Generator) -> Tensor:
        """See Order."""
        return -(end - start).abs()


@dataclass(frozen=True)
class AnyOrder:
    """Any of them: a contrast."""

    def cost(self, start: Tensor, end: Tensor, draw: torch.Generator) -> Tensor:
        """See Order."""
        return torch.rand(end.shape, generator=draw).to(end.device)


def lowest(cost: Tensor, size: Tensor, within: Tensor, count: int) -> Tensor:
    """Exactly `count` of those within, lowest cost first, then the smaller, then in order: bool [n], True goes."""
    places = within.nonzero().squeeze(1)
    rank = torch.argsort(size[places], stable=True)
    rank = rank[torch.argsort(cost[places][rank], stable=True)]
    gone = torch.zeros_like(within)
    gone[places[rank[:count]]] = True
    return gone


# The method around another


@dataclass(frozen=True, kw_only=True)
class Activating(Method):
    """Round after round: train, let a method prune, prune negative weights that hardly moved, go back."""

    around: Method = Magnitude(allocation=Global())  # what prunes: any method told a sparsity that answers with masks
    rounds: int = 8  # of train, prune and go back: 0.8^8 leaves 17 %
    fraction: float = 0.2  # of the weights left that each round removes: p
    activating: float = 0.02  # of that, what AP removes, as a fraction of the weights left: q; 0: none
    order: Order = LeastMoved()  # which of them go first
    sign: int = -1  # of the weights that AP may remove; 1 is the paper's contrast
    rewind: Policy = Rewind(0)  # where what stays goes back to; stay() is the paper's contrast
    steps: int = 2000  # optimizer steps of each training; there are rounds + 1
    curve: Curve = Cosine()  # how the learning rate falls; the paper's is steps(at=(0.5, 0.64))
    warmup: float = 0.1  # fraction of the steps in which it rises; the paper's is a half
    rate_floor: float = 0.0  # the rate at the end, as a fraction of that at the start
    probe: int = 1000  # training examples, as they are, on which dead rates are read; 0: they are not
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        37,
        "AP: Selective Activation for De-sparsifying Pruned Neural Networks",
        arxiv="2212.06145",
        venue="TMLR",
        year=2023,
        when="around training",
        needs=("labels", "training"),
        axes="method order rewinding rule",
        criterion=("magnitude", "activation"),
        tasks=("classification",),
        schedule=("geometric",),
        allocation=("score-driven",),
        reports="around existing methods, 3 to 4 points more at high sparsity on CIFAR-10 and CIFAR-100, 2 to 3 on "
        "ImageNet",
        checked="tests/methods/test_activating.py::test_units_fire_more_often_with_it_than_without",
        differs=(
            "one training a round: the authors train once to prune and once more, from the same weights, to report",
            "weights go back to their initial values, as the paper says; the authors' script draws new ones",
            "norms and biases are not pruned, and each weight is counted once: the authors' code prunes the scales of "
            "batch norms and counts the layer before each bias twice",
            "exactly as many go as asked, ties in the order of size: the authors' code takes all up to a threshold",
            "dead rates are read on training images as they are; the authors' script augments its test set",
            "where too few weights of the sign are left the method pruned with removes the rest, and a note says so",
        ),
    )
    tiny: ClassVar = {"rounds": 2, "fraction": 0.3, "activating": 0.05, "steps": 15, "probe": 64}

    @property
    def course(self) -> Course:
        """One training."""
        return Course(self.steps, self.curve, self.warmup, self.rate_floor)

    def check(self) -> None:
        """Raise SettingError for shares that cannot be, and for a method that cannot be gone round with."""
        check_rounds(self.rounds, self.fraction)
        self.course.check(self.rewind)
        if not 0 <= self.activating < self.fraction:
            raise SettingError(
                f"{self.activating:g} of the weights were to go by AP in rounds of {self.fraction:g}",
                "it is a part of what each round removes, and the method pruned with needs some",
                f"Give 0 up to less than {self.fraction:g}.",
            )
        if self.sign not in (-1, 1):
            raise SettingError(f"weights of sign {self.sign} were to go", "a sign is -1 or 1", "Give -1.")
        if self.probe < 0:
            raise SettingError(f"{self.probe} examples were asked for", "a count cannot be negative", "Give 1000.")
        self.asked(self.fraction - self.activating).check()

    def asked(self, sparsity: float) -> Method:
        """The method pruned with, told a sparsity and to choose only. Raises SettingError where it cannot be told."""
        kind, own = self.around.card, {field.name for field in fields(self.around)}  # type: ignore[arg-type]
        name = f"pruning by {self.around.name} in rounds was asked for"
        if kind.when in ("during training", "around training", "recovery", "at inference"):
            what = {"recovery": "it prunes nothing", "at inference": "it prunes what is not a weight"}
            raise SettingError(
                name,
                what.get(kind.when, "it trains by itself, and would go back twice or not at all"),
                "Give one that chooses from weights as they are, such as magnitude, snip or oneshot.",
            )
        if "sparsity" not in own or set(kind.granularity) != {"weight"}:
            raise SettingError(
                name,
                "it cannot be told a sparsity and answer with masks of single weights",
                "Give magnitude, wanda, snip or oneshot, say.",
            )
        given: dict[str, Any] = {"sparsity": sparsity}
        given |= {"include": self.include, "exclude": self.exclude} if {"include", "exclude"} <= own else {}
        given |= {"steps": 0} if "steps" in own else {}  # of training: rounds train, and the mask is all that is asked
        return replace(self.around, **given)  # type: ignore[type-var]

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """The network of the last round, trained: its masks are the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        split, meter, aside = Split(self, model, task, sites), Meter(sites, self.probe), Aside()
        begun = aside.read()
        if begun is not None:
            split.resume(begun.beside)

        def watch(rounds: Rounds) -> None:
            aside.write(replace(rounds, beside={**split.state(), "remarks": meter.remarks()}))

        found = search(
            model, task, sites, self.course, self.rewind, self.rounds, split.choose,
            more=[meter] if self.probe else [], resume_from=begun, watch=watch,
        )  # fmt: skip
        edits = apply_(model, [Mask(site, found.keep[site.name]) for site in sites])
        notes = [
            f"{1 - sparsity_of(found.keep):.2%} of the weights are left after {self.rounds} rounds: "
            f"{split.gone:,} went by {self.around.name}, {split.activated:,} by AP",
            *split.notes,
            *gaps(sites, found.keep),
            *(meter.remarks() or (begun.beside["remarks"] if begun is not None else [])),
        ]
        return Outcome(model, edits, found.history, notes=notes + found.history.notes)


class Split:
    """How each round of a run is split: what the method pruned with takes, what AP takes, and what was remarked."""

    def __init__(self, method: Activating, model: nn.Module, task: Task, sites: Sequence[Site]) -> None:
        self.method, self.model, self.task = method, model, task
        self.sites = list(sites)
        self.number = self.gone = self.activated = 0
        self.notes: list[str] = []

    def state(self) -> dict[str, Any]:
        """What a run taken up again must know."""
        plain = {"number": self.number, "gone": self.gone, "activated": self.activated, "notes": list(self.notes)}
        return {**plain, "sites": [site.name for site in self.sites]}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Take up again from what `state` gave."""
        self.number, self.gone, self.activated = state["number"], state["gone"], state["activated"]
        self.notes = list(state["notes"])
        self.sites = [site for site in self.sites if site.name in state["sites"]]

    def choose(self, keep: Keep, start: Snapshot) -> Keep:
        """One round: the method's p - q, then AP's q, both of what was left before."""
        self.number += 1
        left = self._left(keep)
        own = int((self.method.fraction - self.method.activating) * left + 1e-9)
        pruned = self._prune(keep, left - own)
        if self.number == 1:  # the share is the same whatever it prunes; its masks say what that is
            left = self._left(keep)
        wanted = int(self.method.activating * left + 1e-9)
        chosen = self._activate(pruned, start, wanted)
        taken = self._left(pruned) - self._left(chosen)
        self.activated += taken
        if taken < wanted:
            short = wanted - taken
            self.notes.append(
                f"round {self.number}: {taken:,} weights of the sign were left of {wanted:,} that were to go by AP; "
                f"{self.method.around.name} was asked for the other {short:,}"
            )
            chosen = self._prune(chosen, max(self._left(chosen) - short, 1))
        self.gone += left - self._left(chosen) - taken
        return chosen

    def _left(self, keep: Mapping[str, Tensor]) -> int:
        return sum(int(keep[site.name].sum()) for site in self.sites)

    def _prune(self, keep: Keep, left: int) -> Keep:
        """What the method pruned with leaves of a network, told how many that should be."""
        work = copy.deepcopy(self.model)
        apply_(work, [Mask(site, keep[site.name]) for site in self.sites])
        units = sum(site.units for site in self.sites)
        with unjournalled():  # rounds are what a run is taken up by
            answer = self.method.asked((units - left) / units).run(work, self.task)
        masks = {edit.site.name: edit.keep for edit in answer.edits if isinstance(edit, Mask)}
        if self.number == 1:
            self._narrow(masks)
        keep = dict(keep)
        old = pooled(self.sites, keep)
        told = torch.cat([masks[site.name].reshape(-1) for site in self.sites]).to(old.device)
        new = old & told
        if missing := min(int(told.sum()), int(old.sum())) - int(new.sum()):
            # It kept weights that are gone, as they tie with some that are not: the largest of these stay instead.
            new = new | keep_top(pooled(self.sites, magnitudes(self.model, self.sites)).cpu(), missing, old & ~new)
        return keep | apart(self.sites, new)

    def _narrow(self, masks: Mapping[str, Tensor]) -> None:
        """Leave out what the method pruned with does not prune."""
        left_out = [site.name for site in self.sites if site.name not in masks]
        self.sites = [site for site in self.sites if site.name in masks]
        if not self.sites:
            raise SettingError(
                f"pruning by {self.method.around.name} in rounds was asked for",
                "none of its masks is of a weight matrix that was to be pruned",
                "Check include and exclude, or give magnitude, snip or oneshot.",
            )
        if left_out:
            self.notes.append(f"{self.method.around.name} does not prune {', '.join(left_out)}: left whole")

    def _activate(self, keep: Keep, start: Snapshot, count: int) -> Keep:
        """What AP leaves: of the weights of the sign, the first `count` go; one weight always stays."""
        end, begun = self._flat(tensors(self.model)), self._flat(start.model)
        old = pooled(self.sites, keep)
        within = old & (end * self.method.sign > 0)
        draw = generator(self.task, f"activating {self.number}")
        count = min(count, int(within.sum()), int(old.sum()) - 1)
        gone = lowest(self.method.order.cost(begun, end, draw), end.abs(), within, count)
        return dict(keep) | apart(self.sites, old & ~gone)

    def _flat(self, named: Tensors) -> Tensor:
        return torch.cat([site.parts[0].read(named).detach().reshape(-1).cpu() for site in self.sites])
