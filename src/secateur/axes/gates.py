"""Gates that look at each input and open or shut a unit of the model: a residual block, a channel, a head."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from secateur.axes.residual import blocks_of, first_tensor
from secateur.cut import selected
from secateur.errors import EvidenceError, GraphError, ModelError, SettingError, did_you_mean
from secateur.graph import Coupling
from secateur.outcome import flop_counter
from secateur.site import Part, Site
from secateur.task import Batch, Task, modes_of, restore_modes_
from secateur.train import seeded

HOME = "consensus_gates"
"""Where the gates are in a model that is trained with them."""


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

    def __post_init__(self) -> None:
        _check_limit(self.limit)

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

    def __post_init__(self) -> None:
        _check_limit(self.limit)

    def __call__(self, z: Tensor) -> Tensor:
        """The clipped value."""
        return z.clamp(-self.limit, self.limit)


def _check_limit(limit: float) -> None:
    if not limit > 0:
        raise SettingError(
            f"a slope up to {limit:g} was asked for", "a gate would learn nothing without one", "Give 4, or 1."
        )


def step(z: Tensor, surrogate: Surrogate) -> Tensor:
    """1 where z > 0, else 0, with the gradient of a surrogate; can be differentiated twice."""
    smooth = surrogate(z)
    return (z > 0).to(z.dtype) + (smooth - smooth.detach())


# Gates


class _Seen:
    """What a gate last said; not part of the model, and not copied with it."""

    def __init__(self) -> None:
        self.opened: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Seen":
        return _Seen()


class ConsensusGate(nn.Module):
    """Opens or shuts units by looking at an input: [batch, ...] -> 0 or 1 [batch, units]. Features lie on one axis."""

    def __init__(self, width: int, units: int, hidden: int, start: float, surrogate: Surrogate, axis: int = -1) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, hidden), nn.Linear(hidden, units)
        nn.init.constant_(self.last.bias, start)
        self.surrogate, self.axis, self.seen = surrogate, axis, _Seen()

    def forward(self, x: Tensor) -> Tensor:
        """The mean over pixels or tokens through a small network, and its sign; remembered until the next."""
        weight = self.first.weight
        z = self.last(torch.relu(self.first(_pooled(x, self.axis).to(weight.dtype))))
        self.seen.opened = opened = step(z, self.surrogate)
        return opened


def _pooled(x: Tensor, axis: int) -> Tensor:
    """The mean over all but the batch and one axis."""
    others = [place for place in range(1, x.dim()) if place != axis % x.dim()]
    return x.mean(others) if others else x


def _features(block: nn.Module, x: Tensor) -> int:
    """The axis of the features in what a block is given: 1 or -1, as the first of its layers that says so has it."""
    for module in block.modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.modules.batchnorm._NormBase, nn.GroupNorm)):
            return 1
        if isinstance(module, (nn.Linear, nn.LayerNorm, nn.RMSNorm)):
            # a norm of pictures may call itself a layer norm, and move the axis
            return -1 if isinstance(module, nn.Linear) or x.shape[-1] == module.normalized_shape[-1] else 1
    return 1 if x.dim() == 4 else -1


# Hooks are objects and no closures: a copy of the model takes copies of them, with the copies of the gates.


@dataclass(eq=False)
class _Bypass:
    """What a block gives is its output where the gate is open, and its input where it is shut."""

    gate: ConsensusGate

    def __call__(self, module: nn.Module, args: Any, kwargs: Any, answer: Any) -> Any:
        x = first_tensor([*args, *kwargs.values()])
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
        x = first_tensor(args)
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
    axis: int = -1  # of the features in what the gate looks at


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
        modules = [ConsensusGate(g.width, g.site.units, hidden, start, surrogate, g.axis).to(g.device) for g in guarded]
    gates = Gates(model, guarded, modules)
    model.add_module(HOME, nn.ModuleList(modules))
    for each, gate in zip(guarded, modules, strict=True):
        gates.handles += each.hooks(model, gate)
    return gates


# What can be gated


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
    modes = modes_of(model)
    hooks = [
        modules[name].register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls[name].append((first_tensor([*args, *kwargs.values()]), out)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with flop_counter() as counter:
            example.through(model.eval())
    finally:
        restore_modes_(model, modes)
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
            answer = first_tensor([out])
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
        axis = _features(modules[name], x)
        found.append(Guarded(name, site, cost, x.shape[axis], x.device, _bypass(name), outputs, axis))
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
        first = model.get_submodule(makers[0].module)
        weight = first.weight
        assert isinstance(weight, Tensor)
        width, axis = makers[0].shape[1], -1
        if isinstance(first, nn.modules.conv._ConvNd):
            width, axis = first.in_channels, 1
        found.append(
            Guarded(site.name, site, site.cost("flops").reshape(-1), int(width), weight.device,
                    _shutting(makers[0], readers), axis=axis)
        )  # fmt: skip
    return found, notes


def _plain(model: nn.Module, part: Part, reads: bool) -> bool:
    """Whether a gate can look at, or shut, what goes through a part."""
    module = model.get_submodule(part.module)
    if part.index is not None or isinstance(module, nn.RNNBase) or part.axis not in (0, 1):
        return False
    if len(part.shape) < 2:
        return True
    known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)) or type(module).__name__ == "Conv1D"
    grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1
    return known and not (reads and grouped)


def _shutting(maker: Part, readers: Sequence[Part]) -> Callable[[nn.Module, ConsensusGate], list[RemovableHandle]]:
    def hooks(model: nn.Module, gate: ConsensusGate) -> list[RemovableHandle]:
        made = model.get_submodule(maker.module)
        found = [made.register_forward_pre_hook(_Look(gate))]
        for part in readers:
            module = model.get_submodule(part.module)
            assert part.owner is not None
            axis = 1 if isinstance(module, nn.modules.conv._ConvNd) else -1
            found.append(module.register_forward_pre_hook(_Shut(gate, part.owner.reshape(-1), axis)))
        return found

    return hooks


# Hardening


@torch.no_grad()
def open_for(model: nn.Module, gates: Gates, batches: Iterable[Batch]) -> Tensor:
    """The share of some examples that each gate is open for, float64 [units of all]. Raises EvidenceError for none."""
    modes = modes_of(model)
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
        restore_modes_(model, modes)
        gates.forget()
    if not count:
        raise EvidenceError("a consensus was to be found", "there are no examples", "Give held-out data.")
    return total / count
