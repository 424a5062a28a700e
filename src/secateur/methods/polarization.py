"""Gates that see each input learn to agree with each other; what they all keep shut is then taken out.

Zhi, Babbar, Liu, Sun, Silavong, Shi, Moran. "Learning a Consensus Sub-Network with Polarization Regularization and One
Pass Training." 2023. arXiv:2302.10798. Beside each unit, a residual block or a channel, a small gate looks at the
input and opens or shuts; with g the share of a batch that a gate is open for, and c what its unit costs, training adds

    polarization    mean over gates of g (1 - g)            0 only where a gate treats the whole batch alike
    budget          (sum c g / sum c - (1 - sparsity))^2    the share that is to be left

to the loss, the first more and more strongly. At last gates that are open for at least half of held-out examples are
taken for open, the units of the others are removed with all the gates, and a plain smaller network is left.

During training every unit is computed, open or shut, so that batch norms inside see every input, and nothing is saved
yet; in a causal model a gate looks at the mean over all tokens, later ones too. What is left has no gates to look.

Not to be confused with the polarization of batch-norm scales (Zhuang et al. 2020), which has no gates.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Linear, Schedule
from secateur.cut import passing, selected
from secateur.edit import Edit, Mask, Replace, apply_
from secateur.errors import EvidenceError, GraphError, ModelError, SettingError, did_you_mean
from secateur.graph import Coupling, couple, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Part, Site
from secateur.task import Batch, Task, generator
from secateur.train import Loop, Rule, fit, seeded

HOME = "consensus_gates"
"""Where the gates are in a model that is trained with them."""

KINDS = ("layer", "channel", "head")


def polarization(opened: Tensor) -> Tensor:
    """Mean of g (1 - g) over gates, g [gates] the share of a batch each is open for: 0 where all agree, 1/4 at most."""
    return (opened * (1 - opened)).mean()


def disagreement(opened: Tensor) -> float:
    """The mean share of examples that a gate treats otherwise than most, in [0, 1/2]: D on the paper's card."""
    return float(torch.minimum(opened, 1 - opened).mean())


def active(opened: Tensor, cost: Tensor) -> Tensor:
    """The share of the cost that is open: sum c g / sum c."""
    return (opened * cost).sum() / cost.sum()


# What a step function learns from


@runtime_checkable
class Surrogate(Protocol):
    """A smooth stand-in for the step 1[z > 0], whose slope the gradient takes."""

    def __call__(self, z: Tensor) -> Tensor:
        """Any function of z with that slope."""
        ...


@dataclass(frozen=True)
class SigmoidSlope:
    """The slope of a sigmoid; beyond a limit that at the limit for what leads back, and none for what leads away.

    So a gate far shut can still open. Were it pushed further, polarization would drive it, with the weights before it,
    without end: agreement is never firm enough for g (1 - g), whose slope at 0 and 1 is not 0.
    """

    limit: float = 4.0

    def __call__(self, z: Tensor) -> Tensor:
        """A sigmoid with straight tails."""
        z = _homeward(z, self.limit)
        near = z.clamp(-self.limit, self.limit)
        edge = torch.sigmoid(torch.tensor(self.limit)).item()
        return torch.sigmoid(near) + (z - near) * (edge * (1 - edge))


def _homeward(z: Tensor, limit: float) -> Tensor:
    """The same values; beyond a limit a gradient gets through only where a step against it leads back."""
    z = z.clone()
    if z.requires_grad:
        far, side = z.detach().abs() > limit, z.detach().sign()
        z.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: gradient.masked_fill(far & (gradient * side < 0), 0)
        )
    return z


@dataclass(frozen=True)
class ClippedIdentity:
    """Slope 1 up to a limit, none beyond."""

    limit: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """The clipped value."""
        return z.clamp(-self.limit, self.limit)


def step(z: Tensor, surrogate: Surrogate) -> Tensor:
    """1 where z > 0, else 0, with the gradient of a surrogate; can be differentiated twice."""
    smooth = surrogate(z)
    return (z > 0).to(z.dtype) + (smooth - smooth.detach())


@runtime_checkable
class Pull(Protocol):
    """How far from the budget is how bad."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """The penalty for a share left, where another is wanted."""
        ...


@dataclass(frozen=True)
class Squared:
    """The square of the difference: neither more nor less than wanted."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """(left - wanted)^2."""
        return (left - wanted).square()


@dataclass(frozen=True)
class Hinge:
    """What is above the budget: less is as good."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """max(0, left - wanted)."""
        return (left - wanted).clamp(min=0)


# Gates


class _Seen:
    """What a gate last said; not part of the model, and not copied with it."""

    def __init__(self) -> None:
        self.opened: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Seen":
        return _Seen()


class ConsensusGate(nn.Module):
    """Opens or shuts units by looking at an input: [batch, ...] -> 0 or 1 [batch, units]."""

    def __init__(self, width: int, units: int, hidden: int, start: float, surrogate: Surrogate) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, units)
        nn.init.constant_(self.last.bias, start)
        self.surrogate, self.seen = surrogate, _Seen()

    def forward(self, x: Tensor) -> Tensor:
        """The mean over pixels or tokens through a small network, and its sign; remembered until the next."""
        weight = self.first.weight
        z = self.last(torch.relu(self.first(_pooled(x).to(weight.dtype))))
        self.seen.opened = opened = step(z, self.surrogate)
        return opened


def _pooled(x: Tensor) -> Tensor:
    if x.dim() == 4:  # [batch, channels, height, width]
        return x.mean((2, 3))
    return x.flatten(1, -2).mean(1) if x.dim() > 2 else x  # [batch, tokens, width]


def _width(x: Tensor) -> int:
    return x.shape[1] if x.dim() == 4 else x.shape[-1]


def _first(values: Iterable[Any]) -> Tensor | None:
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (tuple, list)) and (found := _first(value)) is not None:
            return found
    return None


# Hooks are objects and no closures: a copy of the model takes copies of them, with the copies of the gates.


@dataclass(eq=False)
class _Bypass:
    """What a block gives is its output where the gate is open, and its input where it is shut."""

    gate: ConsensusGate

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
        x = _first([*args, *kwargs.values()])
        out = answer if isinstance(answer, Tensor) else answer[0]
        assert x is not None
        opened = self.gate(x).to(out.dtype)
        opened = opened.reshape(len(x), *[1] * (out.dim() - 1))
        mixed = opened * out + (1 - opened) * x  # exactly one of the two
        return mixed if isinstance(answer, Tensor) else type(answer)((mixed, *answer[1:]))


@dataclass(eq=False)
class _Look:
    """The gate looks at what the layer that makes its channels is given."""

    gate: ConsensusGate

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        x = _first(args)
        assert x is not None
        self.gate(x)


@dataclass(eq=False)
class _Shut:
    """A layer that reads gated channels is given zeros for those that are shut."""

    gate: ConsensusGate
    owner: Tensor  # int64 [inputs of the layer]: the unit each is of, or -1
    channel: int  # the axis of the inputs

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, opened = args[0], self.gate.seen.opened
        if opened is None or len(opened) != len(x):
            raise GraphError(
                "channels were to be gated by what the layer that makes them is given",
                f"{type(module).__name__} reads them before, or in other batches",
                "Leave that site out with exclude=.",
            )
        owner = self.owner.to(x.device)
        factor = torch.where(owner >= 0, opened[:, owner.clamp(min=0)], 1.0).to(x.dtype)  # [batch, inputs]
        shape = [1] * x.dim()
        shape[0], shape[self.channel] = factor.shape
        return (x * factor.reshape(shape), *args[1:])


@dataclass(frozen=True, eq=False)
class Guarded:
    """Units with one gate, and what to do with those that are shut."""

    name: str
    site: Site  # a unit for each of the gate's outputs, [units]
    cost: Tensor  # of each unit, float64 [units]
    width: int  # of what the gate looks at
    device: torch.device
    hooks: Callable[[nn.Module, ConsensusGate], list[RemovableHandle]]
    outputs: int = 0  # of a block: how many values it gives back, 0 for a bare tensor


@dataclass(eq=False)
class Gates:
    """Gates in a model, beside what they guard; `take_out_` leaves the model as it was."""

    model: nn.Module
    guarded: Sequence[Guarded]
    modules: Sequence[ConsensusGate]
    handles: list[RemovableHandle] = field(default_factory=list)

    @property
    def cost(self) -> Tensor:
        """What each unit costs, gate after gate: float64 [units of all]."""
        return torch.cat([each.cost for each in self.guarded])

    def forget(self) -> None:
        """As if no input had been seen."""
        for gate in self.modules:
            gate.seen.opened = None

    def opened(self) -> Tensor:
        """What the gates said of the last batch: 0 or 1 [batch, units of all], with gradient."""
        found = [gate.seen.opened for gate in self.modules]
        silent = [each.name for each, value in zip(self.guarded, found, strict=True) if value is None]
        if silent:
            raise GraphError(
                "the gates' answers to a batch were asked for",
                f"{silent[0]} has not been run",
                "Run the model on the batch first, and let it run every gated block.",
            )
        return torch.cat([value for value in found if value is not None], dim=1)

    def apart(self, units: Tensor) -> list[Tensor]:
        """One value per unit of all, as those of each gate."""
        return list(torch.split(units, [each.site.units for each in self.guarded]))

    def take_out_(self) -> None:
        """Remove every gate and hook."""
        for handle in self.handles:
            handle.remove()
        self.handles = []
        if HOME in self.model._modules:
            del self.model._modules[HOME]

    def optimizer(self, task: Task, rate: float = 1.0) -> Optimizer:
        """The task's optimizer for weights and gates; `rate` multiplies the gates' learning rate.

        The gates' biases are not decayed: decay would draw gates to the edge of shutting.
        """
        inside = list(nn.ModuleList(self.modules).parameters())
        ours = {id(p) for p in inside}
        weights = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        matrices, biases = [p for p in inside if p.dim() > 1], [p for p in inside if p.dim() == 1]
        groups: list[dict[str, Any]] = [{"params": group} for group in (weights, matrices, biases) if group]
        groups[-1]["weight_decay"] = 0.0
        optimizer = task.optimizer(groups)
        for group in optimizer.param_groups[-2:]:
            group["lr"] = group["lr"] * rate
        return optimizer


def insert_(
    model: nn.Module,
    guarded: Sequence[Guarded],
    *,
    hidden: int = 16,
    start: float = 2.0,
    surrogate: Surrogate | None = None,
    seed: int = 0,
) -> Gates:
    """Put a gate beside each of some units; changes the model, and `Gates.take_out_` undoes it.

    Build the optimizer after this, or it will not train the gates. Raises ModelError where there are gates already.
    """
    if HOME in model._modules:
        raise ModelError("gates were to be put in", "the model has some already", "Take those out first.")
    surrogate = SigmoidSlope() if surrogate is None else surrogate
    with seeded(model, seed):
        modules = [ConsensusGate(g.width, g.site.units, hidden, start, surrogate).to(g.device) for g in guarded]
    gates = Gates(model, guarded, modules)
    model.add_module(HOME, nn.ModuleList(modules))
    for each, gate in zip(guarded, modules, strict=True):
        gates.handles += each.hooks(model, gate)
    return gates


# What can be gated


def blocks_of(model: nn.Module) -> list[str]:
    """The dotted names of a model's like blocks: outermost modules, no containers, of a class met more than once."""
    inner = {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and any(True for _ in module.children())
        and any(p.dim() > 1 for p in module.parameters())
    }
    found: list[str] = []
    for name, module in inner.items():
        alike = sum(type(other) is type(module) for other in inner.values())
        if alike > 1 and not any(name.startswith(block + ".") for block in found):
            found.append(name)
    return found


@torch.no_grad()
def gated_blocks(model: nn.Module, example: Batch, include: Sequence[str] = ()) -> tuple[list[Guarded], list[str]]:
    """Blocks that hand on what they are given in the shape it has, to be gated whole; and why others are not.

    A block that changes the shape is a stage's transition, and stays: without it what follows would not fit. Raises
    GraphError for one that `include` asks for, SettingError for a name that no module has.
    """
    names = list(include) or blocks_of(model)
    modules = dict(model.named_modules())
    for name in names:
        if name not in modules:
            raise SettingError(f"a gate for {name!r} was asked for", "no module has that name",
                               did_you_mean(name, blocks_of(model)))  # fmt: skip
    calls: dict[str, list[tuple[Tensor | None, Any]]] = {name: [] for name in names}
    was_training = model.training
    hooks = [
        modules[name].register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls[name].append((_first([*args, *kwargs.values()]), out)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with FlopCounterMode(display=False) as counter:
            example.through(model.eval())
    finally:
        model.train(was_training)
        for hook in hooks:
            hook.remove()
    work = {key.partition(".")[2]: sum(ops.values()) for key, ops in counter.get_flop_counts().items()}
    found, notes = [], []
    for name in names:
        why = ""
        if len(calls[name]) != 1:
            why = f"it runs {len(calls[name])} times in a forward pass"
        else:
            x, out = calls[name][0]
            answer = _first([out])
            if x is None or answer is None or x.shape != answer.shape:
                shapes = [list(t.shape) if t is not None else None for t in (x, answer)]
                why = f"it has no identity path: {shapes[0]} goes in and {shapes[1]} comes out"
        if why and include:
            raise GraphError(f"a gate for {name} was asked for", why, "Leave it out.")
        if why:
            notes.append(f"{name} is not gated: {why}")
            continue
        assert x is not None
        parts = tuple(
            Part(f"{name}.{key}", tuple(p.shape), torch.zeros((1,) * p.dim(), dtype=torch.long),
                 itemsize=p.element_size())
            for key, p in modules[name].named_parameters()
        )  # fmt: skip
        site = Site(name, "layer", (1,), parts, block=name)
        cost = torch.tensor([float(work.get(name, 0))], dtype=torch.float64) / example.size
        outputs = len(out) if isinstance(out, (tuple, list)) else 0
        found.append(Guarded(name, site, cost, _width(x), x.device, _bypass(name), outputs))
    return found, notes


def _bypass(name: str) -> Callable[[nn.Module, ConsensusGate], list[RemovableHandle]]:
    def hooks(model: nn.Module, gate: ConsensusGate) -> list[RemovableHandle]:
        return [model.get_submodule(name).register_forward_hook(_Bypass(gate), with_kwargs=True)]

    return hooks


def gated_units(
    model: nn.Module, coupling: Coupling, kinds: Sequence[str], exclude: Sequence[str] = ()
) -> tuple[list[Guarded], list[str]]:
    """Channels and heads, each site with a gate that looks at what the layer making them is given; and why not others.

    A shut unit is zero for all that read it, which is what removing it comes to.
    """
    found, notes = [], []
    gone = set(selected(model, [n for n, _ in model.named_parameters()], exclude)) if exclude else set()
    for site in coupling.of("channel", "head"):
        if site.kind not in kinds:
            continue
        if site.name in exclude or any(part.name in gone for part in site.parts):
            notes.append(f"{site.name} is not gated: it was left out")
            continue
        makers = [p for p in site.parts if len(p.shape) > 1 and p.axis == 0]
        readers = [p for p in site.parts if len(p.shape) > 1 and p.axis == 1]
        odd = [p.name for p in site.parts if not _plain(model, p, p in readers)]
        why = f"{odd[0]} is read in another way than a linear layer's or a convolution's" if odd else ""
        why = why or ("" if makers and readers else "nothing reads it") or (
            "a norm takes statistics over it, so that a shut unit is not a missing one"
            if site.name in coupling.inexact else ""
        )  # fmt: skip
        if why:
            notes.append(f"{site.name} is not gated: {why}")
            continue
        first = model.get_submodule(makers[0].name.rpartition(".")[0])
        weight = first.weight
        assert isinstance(weight, Tensor)
        width = first.in_channels if isinstance(first, nn.modules.conv._ConvNd) else makers[0].shape[1]
        found.append(
            Guarded(site.name, site, site.cost("flops").reshape(-1), int(width), weight.device,
                    _shutting(makers[0], readers))
        )  # fmt: skip
    return found, notes


def _plain(model: nn.Module, part: Part, reads: bool) -> bool:
    """Whether a gate can look at, or shut, what goes through a part."""
    module = model.get_submodule(part.name.rpartition(".")[0])
    if part.index is not None or isinstance(module, nn.RNNBase) or part.axis not in (0, 1):
        return False
    if len(part.shape) < 2:
        return True
    known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"
    grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return known and not (reads and grouped)


def _shutting(maker: Part, readers: Sequence[Part]) -> Callable[[nn.Module, ConsensusGate], list[RemovableHandle]]:
    def hooks(model: nn.Module, gate: ConsensusGate) -> list[RemovableHandle]:
        made = model.get_submodule(maker.name.rpartition(".")[0])
        found = [made.register_forward_pre_hook(_Look(gate))]
        for part in readers:
            module = model.get_submodule(part.name.rpartition(".")[0])
            assert part.owner is not None
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            found.append(module.register_forward_pre_hook(_Shut(gate, part.owner.reshape(-1), axis)))
        return found

    return hooks


# Training


class Consensus(Rule):
    """Adds to the loss what holds gates to a budget, and, more and more strongly, to one opinion.

    Curves "open", the share of the cost that is open in the batch, and "disagreement". In several processes the shares
    are those of all their batches together, or each would come to a consensus of its own.
    """

    def __init__(
        self,
        gates: Gates,
        wanted: float,
        strength: float = 2.0,
        polarize: Schedule | None = None,
        pull: Pull | None = None,
        of: str = "units",
    ) -> None:
        if not 0 < wanted <= 1:
            raise SettingError(f"{wanted:g} of the units were to be left", "it is a share in (0, 1]", "Give 0.5.")
        self.gates, self.wanted, self.strength = gates, wanted, strength
        self.polarize = Schedule(end=2.0, until=0.5, curve=Linear(), every=1) if polarize is None else polarize
        self.pull: Pull = Squared() if pull is None else pull
        cost = gates.cost
        self.cost = cost if of == "flops" and bool(cost.sum() > 0) else torch.ones_like(cost)

    def start(self, loop: Loop) -> None:
        """Check that the optimizer trains the gates. Raises SettingError when it does not."""
        held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        inside = [p for gate in self.gates.modules for p in gate.parameters()]
        if not all(id(p) in held for p in inside):
            raise SettingError(
                "gates were to be trained", "the optimizer does not hold them", "Build it after the gates are put in."
            )

    def before_forward(self, loop: Loop) -> None:
        """What was said of the last batch is over."""
        self.gates.forget()

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The loss, the budget's pull and the polarization. Raises EvidenceError for a batch of one example."""
        answers = self.gates.opened()
        if len(answers) < 2 and _processes() < 2:
            raise EvidenceError(
                "gates were to come to a consensus over a batch", "it has one example", "Train with batches of 64."
            )
        opened = shared(answers.float().mean(0))  # half precision would round the share of a large batch
        left = active(opened, self.cost.to(opened))
        loop.log("open", float(left.detach()))
        loop.log("disagreement", disagreement(opened.detach()))
        firmly = self.polarize.value(loop.step, loop.steps)
        return value + self.strength * self.pull(left, self.wanted) + firmly * polarization(opened)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shared(mean: Tensor) -> Tensor:
    """The mean over processes of a value, with gradients that add up right under DistributedDataParallel."""
    if _processes() == 1:
        return mean
    total = mean.detach().clone()
    dist.all_reduce(total)
    # The value is that of all processes, the gradient this one's own: DistributedDataParallel takes the mean of both.
    return mean + (total / _processes() - mean.detach())


# Hardening


@torch.no_grad()
def open_for(model: nn.Module, gates: Gates, batches: Iterable[Batch]) -> Tensor:
    """The share of some examples that each gate is open for, float64 [units of all]. Raises EvidenceError for none."""
    was_training = model.training
    model.eval()
    total, count = torch.zeros(len(gates.cost), dtype=torch.float64), 0
    device = next(model.parameters()).device
    try:
        for batch in batches:
            gates.forget()
            batch.to(device).through(model)
            answers = gates.opened()
            total += answers.double().sum(0).cpu()
            count += len(answers)
    finally:
        model.train(was_training)
        gates.forget()
    if not count:
        raise EvidenceError("a consensus was to be found", "there are no examples", "Give held-out data.")
    return total / count


def consensus(gates: Gates, share: Tensor, model: nn.Module) -> tuple[list[Tensor], list[str]]:
    """Which units of each gate stay: those open for at least half; and what had to be kept though shut.

    Of a site's channels one stays, and one of a stack whose blocks are all gated: nothing would be left of it.
    """
    keep, notes = [each >= 0.5 for each in gates.apart(share)], []
    shares = gates.apart(share)
    for each, mask, value in zip(gates.guarded, keep, shares, strict=True):
        if each.site.kind != "layer" and not bool(mask.any()):
            mask[value.argmax()] = True
            notes.append(f"every unit of {each.name} is shut: the one that is most often open stays")
    blocks = [i for i, each in enumerate(gates.guarded) if each.site.kind == "layer"]
    if blocks and not any(bool(keep[i].any()) for i in blocks):
        notes.append("collapsed: every gated block is shut; a weaker budget prevents that")
    parents: dict[str, list[int]] = {}
    for i in blocks:
        parents.setdefault(gates.guarded[i].name.rpartition(".")[0], []).append(i)
    for parent, members in parents.items():
        inside = [c for c in model.get_submodule(parent).children() if not getattr(c, "passes_through", False)]
        if len(inside) == len(members) and not any(bool(keep[i].any()) for i in members):
            best = max(members, key=lambda i: float(shares[i]))
            keep[best][:] = True
            notes.append(f"every block of {parent or 'the model'} is shut: {gates.guarded[best].name} stays")
    return keep, notes


def harden_(model: nn.Module, gates: Gates, keep: Sequence[Tensor]) -> list[Edit]:
    """Take the gates out, and with them what they keep shut; the edits, for the record."""
    gates.take_out_()
    pairs = list(zip(gates.guarded, keep, strict=True))
    inner = [each.site for each, _ in pairs if each.site.kind != "layer"]
    edits: list[Edit] = list(removals(inner, {each.name: mask for each, mask in pairs}))
    blocks = [(each, bool(mask.any())) for each, mask in pairs if each.site.kind == "layer"]
    if not all(stays for _, stays in blocks):
        edits.append(Mask(_together([each.site for each, _ in blocks]), torch.tensor([stays for _, stays in blocks])))
        edits += [
            Replace(each.name, passing(model.get_submodule(each.name), each.outputs))
            for each, stays in blocks
            if not stays
        ]
    return apply_(model, edits)


def _together(sites: Sequence[Site]) -> Site:
    """Sites of one block each as one site, a unit each."""
    parts = [
        replace(part, owner=torch.full((1,) * len(part.shape), unit))
        for unit, site in enumerate(sites)
        for part in site.parts
    ]
    return Site("gated blocks", "layer", (len(sites),), tuple(parts))


@dataclass(frozen=True, kw_only=True)
class Polarization(Method):
    """Train weights and gates together until the gates agree; take out what they keep shut. One pass of training."""

    sparsity: float = 0.5  # of the units, or of their multiply-adds, that training aims to shut: 1 - rho
    of: str = "units"  # what that is a share of: units or flops
    kinds: tuple[str, ...] = ("layer",)  # what is gated: layer (whole blocks), channel, head
    strength: float = 2.0  # of the budget in the loss: lambda_act
    pull: Pull = Squared()  # how far from the budget is how bad; hinge minds only what is above
    polarize: float = 2.0  # of the polarization in the loss, at its strongest: lambda_polar
    ramp: float = 0.5  # fraction of training over which it rises from 0, so that gates may try things early
    hidden: int = 16  # width of each gate's own small network
    start: float = 2.0  # the gates' first bias: all open
    gate_rate: float = 1.0  # learning rate of the gates, as a multiple of the weights'
    surrogate: Surrogate = SigmoidSlope()  # what the step learns from
    steps: int = 2000  # of training, weights and gates together
    recover: int = 0  # optimizer steps of fine-tuning what is left
    samples: int = 512  # held-out examples on which the consensus is found
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # blocks to gate, by name; () is all that keep the shape of what they are given
    exclude: tuple[str, ...] = ()  # channels and heads to leave alone, by name

    card: ClassVar = Card(
        21,
        "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
        arxiv="2302.10798",
        year=2023,
        when="during training",
        granularity=KINDS,
        needs=("labels", "training"),
        families=("cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="rule gate graph",
        reports="half of the connections of networks for CIFAR-10 and CIFAR-100 go at less than 1 % of accuracy, in "
        "one pass of training",
        checked="tests/methods/test_polarization.py::test_gates_agree_and_hardening_costs_nothing_on_toy_images",
        differs=(
            "reconstructed from the paper's description, without code: the gate's surrogate gradient, the ramp of the "
            "polarization and the squared distance to a budget are choices made here",
            "a gate may be pulled open again however far shut, but is not pushed further: beyond 4 the sigmoid's slope "
            "is held inwards, and there is none outwards",
            "a shut block hands on its input, which is the same as adding nothing where blocks end as they begin",
            "what is left of a stack or of a layer is one unit at least",
        ),
    )
    tiny: ClassVar = {"steps": 40, "strength": 8.0, "gate_rate": 4.0, "samples": 64}

    def budget(self) -> Budget | None:
        """What training aims at, and the consensus decides; none for multiply-adds, which are those gated alone."""
        return Budget(self.sparsity, of="units") if self.of == "units" else None

    def check(self) -> None:
        """Raise SettingError for a budget, strengths or a training that cannot be."""
        check_sparsity(self.sparsity)
        if self.of not in ("units", "flops"):
            raise SettingError(f"a sparsity of {self.of} was asked for", "it is of units or of flops",
                               did_you_mean(self.of, ("units", "flops")))  # fmt: skip
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(f"gates for {list(self.kinds)} were asked for", "layers, channels and heads have them",
                               did_you_mean(unknown[0] if unknown else "", KINDS))  # fmt: skip
        for name in ("steps", "hidden", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} was given", "one is the least", "Give more.")
        for name in ("strength", "polarize", "recover"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise SettingError(f"{name}={value} was given", "it is 0 or more", "Give 2, say.")
        if not (isfinite(self.gate_rate) and self.gate_rate > 0):
            raise SettingError(f"gate_rate={self.gate_rate} was given", "a learning rate is above 0", "Give 1.")
        assert self.schedule()
        LearningRate(floor=self.rate_floor)

    def schedule(self) -> Schedule:
        """How strongly polarization counts as training goes on."""
        return Schedule(end=self.polarize, until=self.ramp, curve=Linear(), every=1)

    def guarded(self, model: nn.Module, example: Batch) -> tuple[list[Guarded], list[str]]:
        """What is to be gated, and why other units are not. Raises GraphError when nothing can be."""
        found, notes = gated_blocks(model, example, self.include) if "layer" in self.kinds else ([], [])
        if {"channel", "head"} & set(self.kinds):
            coupling = couple(model, example)
            more, why = gated_units(model, coupling, self.kinds, self.exclude)
            found, notes = found + more, notes + why + [str(frozen) for frozen in coupling.frozen]
        if not found:
            raise GraphError(
                f"gates for each {' and '.join(self.kinds)} of {type(model).__name__} were asked for",
                f"there is none that can be left out ({'; '.join(notes[:4]) or 'no two blocks are alike'})",
                "Gate other kinds, or name blocks that keep the shape of what they are given with include=.",
            )
        return found, notes

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train with gates, find the consensus on held-out data, take out what is shut."""
        self.check()
        device = next(model.parameters()).device
        guarded, notes = self.guarded(model, task.example.to(device))
        gates = insert_(
            model, guarded, hidden=self.hidden, start=self.start, surrogate=self.surrogate,
            seed=generator(task, "gates").initial_seed(),
        )  # fmt: skip
        try:
            rule = Consensus(gates, 1 - self.sparsity, self.strength, self.schedule(), self.pull, self.of)
            rules = [LearningRate(floor=self.rate_floor), rule]
            history = fit(model, task, self.steps, rules, gates.optimizer(task, self.gate_rate))
            dynamic = task.measure(model, "val")[task.metric]
            share = open_for(model, gates, _some(task, "val", self.samples))
            keep, why = consensus(gates, share, model)
        finally:
            gates.take_out_()
        edits = harden_(model, gates, keep)
        if disagreement(share) > 0:  # norms behind a gate that was not always open saw what no longer comes
            edits += recalibrate_(model, (batch.to(device) for batch in some(task, self.samples)))
        hardened = task.measure(model, "val")[task.metric]
        if self.recover:
            history = history.then(fit(model, task, self.recover, [LearningRate()], epoch=history.epoch))
        left, cost = torch.cat(keep).double(), gates.cost
        history.log(f"validation {task.metric} with gates", self.steps, dynamic)
        history.log(f"validation {task.metric} hardened", self.steps, hardened)
        history.log("held-out disagreement", self.steps, disagreement(share))
        notes.append(
            f"{int(left.sum())} of {len(left)} gated units are left, {float(active(left, cost)):.1%} of their "
            f"multiply-adds; {1 - self.sparsity:.1%} of the {'multiply-adds' if self.of == 'flops' else 'units'} were "
            "aimed at"
        )
        notes.append(f"disagreement {disagreement(share):.4f}: the share of examples that gates treat against the rest")
        notes.append(f"validation {task.metric} {dynamic:.4g} with the gates, {hardened:.4g} without them")
        return Outcome(model, edits, history, notes=notes + why + history.notes)


def _some(task: Task, split: str, samples: int) -> Iterable[Batch]:
    """Batches of a split, as long as there are not that many examples yet."""
    seen = 0
    for batch in task.batches(split):
        if seen >= samples:
            return
        seen += batch.size
        yield batch
