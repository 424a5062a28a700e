"""Channels that the scales of norms switch off: which scales, thresholds, and agreement among layers that are tied.

Where a batch norm follows a convolution, its scale says how loud each channel is, and a scale of zero leaves nothing
of the channel but a constant. Channels of layers that are added up (a residual stage) live and die together, so each
of them has as many scales as there are layers, the MEMBERS of its site. Depthwise convolutions pass a channel on:
their norms go with it and have no say.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from secateur.axes.patterns import keep_top
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import SettingError, SiteError
from secateur.graph import Coupling, removals
from secateur.site import Part, Site, Tensors, tensors
from secateur.task import Batch, modes_of, restore_modes_
from secateur.train import seeded

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm)
WEIGHED = (nn.modules.conv._ConvNd, nn.Linear)


@dataclass(frozen=True, eq=False)
class Scaled:
    """A site of channels, and the norms that scale them."""

    site: Site
    members: tuple[Part, ...]  # the scale of each norm that follows a producing layer; depthwise ones left out

    def sizes(self, tensors: Tensors) -> Tensor:
        """|scale| of each unit at each member [members, units]; the largest where a unit has several channels."""
        return torch.stack(
            [_largest(part, part.read(tensors).detach().abs(), self.site.units) for part in self.members]
        )

    def flags(self, entries: Tensors) -> Tensor:
        """Of booleans per channel, by tensor name: whether ALL channels of a unit have it [members, units]."""
        return torch.stack([~_largest(p, (~entries[p.name]).float(), self.site.units).bool() for p in self.members])


def _largest(part: Part, values: Tensor, units: int) -> Tensor:
    owner = part.owned().reshape(-1).to(values.device)
    mine = owner >= 0
    return values.new_zeros(units).scatter_reduce_(0, owner[mine], values[mine], "amax")


def norms_after(model: nn.Module, example: Batch) -> dict[str, str]:
    """Which norm each convolution or linear layer goes straight into: name -> name. Takes one forward pass."""
    made: dict[int, tuple[str, Tensor]] = {}  # the tensor is kept, so that its identity is not given to another
    found: dict[str, str] = {}

    def output(name: str) -> Any:
        return lambda module, args, out: made.__setitem__(id(out), (name, out))

    def arrival(name: str) -> Any:
        def see(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and id(args[0]) in made:
                found[made[id(args[0])][0]] = name

        return see

    hooks = [m.register_forward_hook(output(n)) for n, m in model.named_modules() if isinstance(m, WEIGHED)]
    hooks += [m.register_forward_pre_hook(arrival(n)) for n, m in model.named_modules() if isinstance(m, NORMS)]
    try:
        _look(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def _look(model: nn.Module, example: Batch) -> None:
    modes = modes_of(model)
    model.eval()
    try:
        with seeded(model, 0):
            example.through(model)
    finally:
        restore_modes_(model, modes)


def scaled(model: nn.Module, example: Batch, coupling: Coupling) -> tuple[list[Scaled], list[str]]:
    """The sites of channels whose every producing layer goes straight into a norm with scales, and the other sites.

    Raises SiteError when there are none: a model without norms, or whose norms have no scales or were folded away.
    """
    after, named = norms_after(model, example), tensors(model)
    found, others = [], []
    for site in coupling.of("channel"):
        scales = {part.name: part for part in site.parts}
        producers = [p for p in site.parts if p.axis == 0 and len(p.shape) > 1 and not _passes_on(model, p)]
        members = [scales.get(f"{after.get(p.name.rpartition('.')[0])}.weight") for p in producers]
        if producers and all(part is not None for part in members):
            found.append(Scaled(site, tuple(dict.fromkeys(p for p in members if p is not None))))
        else:
            others.append(site.name)
    if not found:
        kinds = [m for m in model.modules() if isinstance(m, NORMS)]
        bare = [m for m in kinds if getattr(m, "weight", None) is None]
        reasons = "; ".join(str(f) for f in coupling.frozen[:3])
        there = "it has no batch norms" if not kinds else "none of its layers goes straight into a norm with scales"
        raise SiteError(
            f"channels of a {type(model).__name__} were to be pruned by the scales of its norms",
            "its norms have no scales (affine=False)" if kinds and len(bare) == len(kinds) else there
            + (f" ({reasons})" if reasons else ""),
            "Train the network with a batch norm after each convolution, not folded, or use l1_norm.",
        )  # fmt: skip
    assert all(part.name in named for one in found for part in one.members)
    return found, others


def _passes_on(model: nn.Module, part: Part) -> bool:
    """Whether a tensor is a depthwise convolution's, which makes no channels of its own."""
    module = model.get_submodule(part.module)
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def scale_names(sites: Sequence[Scaled]) -> list[str]:
    """The members of all sites, each once, in order."""
    return list(dict.fromkeys(part.name for one in sites for part in one.members))


def channels_kept(sites: Sequence[Scaled], keep: Mapping[str, Tensor], named: Tensors) -> dict[str, Tensor]:
    """Masks of units as masks of each scale's channels, True where nobody's: tensor name -> bool [channels]."""
    found: dict[str, Tensor] = {}
    for one in sites:
        for part in one.members:
            mine = part.expand(keep[one.site.name].reshape(-1), nobody=1.0).reshape(-1)
            found[part.name] = found.get(part.name, torch.ones(len(named[part.name]), dtype=torch.bool)) & mine
    return found


def cuts(sites: Sequence[Scaled], keep: Mapping[str, Tensor]) -> list[Edit]:
    """Edits that take out what is not kept; sites that stay whole come first, as masks that keep all.

    So that what was reached is counted over all sites that could have lost something.
    """
    whole = [Mask(one.site, keep[one.site.name]) for one in sites if bool(keep[one.site.name].all())]
    return [*whole, *removals([one.site for one in sites], keep)]


# Thresholds


@runtime_checkable
class Threshold(Protocol):
    """How small a scale of one norm must be for its channel to go."""

    def of(self, scale: Tensor) -> float:
        """Channels of |scale| no larger than this go."""
        ...


@dataclass(frozen=True)
class Below:
    """The same for every norm."""

    size: float = 0.01

    def __post_init__(self) -> None:
        if self.size < 0:
            raise SettingError(f"a threshold of {self.size:g} was given", "sizes are not negative", "Give 0.01.")

    def of(self, scale: Tensor) -> float:
        """The size."""
        return self.size


@dataclass(frozen=True)
class Energy:
    """The smallest scales go that hold a given share of the squares of their norm.

    Jiang et al. 2022, arXiv:2201.06776, in the authors' code: midway between the two sizes at which the running sum
    passes the share; everything where no scale reaches 0.001.
    """

    share: float = 1e-4

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise SettingError(f"a share of {self.share:g} was given", "it is a fraction, in [0, 1)", "Give 0.0001.")

    def of(self, scale: Tensor) -> float:
        """The size between what goes and what stays."""
        size = scale.detach().abs().double().clamp(min=1e-18).sort().values
        if float(size[-1]) < 1e-3:
            return 1.0
        over = size.square().cumsum(0) > self.share * size.square().sum()
        first = int(over.int().argmax())
        return 0.0 if first == 0 else float(size[first - 1] + size[first]) / 2


def below(scale: Tensor, threshold: Threshold, least: int = 1) -> Tensor:
    """Which channels of one norm go [channels]: of those at or below the threshold all, but `least` stay."""
    size = scale.detach().abs()
    gone = size <= threshold.of(scale)
    if int((~gone).sum()) < min(least, len(size)):
        gone = ~keep_top(size, min(least, len(size)))
    return gone


def agreed(flags: Tensor) -> Tensor:
    """What layers that are tied take out together [units], of what each would take out alone [members, units].

    Those with the most votes: of the largest number of votes that at least as many units have as the most reluctant
    member would take out (Jiang et al. 2022, in the authors' code). So never fewer than that one wanted.
    """
    votes, need = flags.sum(0), int(flags.sum(1).min())
    if need == 0:
        return torch.zeros_like(votes, dtype=torch.bool)
    most = max(i for i in range(1, len(flags) + 1) if int((votes >= i).sum()) >= need)
    return votes >= most


# What becomes of the constant that a switched-off channel leaves


@runtime_checkable
class Constants(Protocol):
    """What is done about act(shift), which a channel still gives when its scale is zero."""

    def edits(
        self, model: nn.Module, sites: Sequence[Scaled], keep: Mapping[str, Tensor], example: Batch
    ) -> list[Edit]:
        """Changes to make before channels go; not applied yet."""
        ...


@dataclass(frozen=True)
class Dropped:
    """Nothing: the constants go with the channels."""

    def edits(
        self, model: nn.Module, sites: Sequence[Scaled], keep: Mapping[str, Tensor], example: Batch
    ) -> list[Edit]:
        """None."""
        return []


@dataclass(frozen=True)
class Absorbed:
    """What reads the channels gets the constants added for good: in the mean of the norm behind it, or its bias.

    Chu et al. 2023, arXiv:2306.01526, stage 2. The authors carry the constant from layer to layer by hand; here the
    network says what it comes to: with the scales at zero but the shifts in place, and without the channels, each
    layer's mean output differs by what it is to be given, after the layers before it have been given theirs. Exact
    away from borders, where padding takes part of a constant; there, right on average.
    """

    def edits(
        self, model: nn.Module, sites: Sequence[Scaled], keep: Mapping[str, Tensor], example: Batch
    ) -> list[Edit]:
        """New means and biases, by one forward pass each with and without the channels."""
        quiet, gone, values = copy.deepcopy(model), copy.deepcopy(model), tensors(model)
        named = tensors(quiet)
        with torch.no_grad():
            for name, kept in channels_kept(sites, keep, named).items():
                named[name].masked_fill_(~kept.to(named[name].device), 0)
        apply_(gone, [Mask(one.site, keep[one.site.name]) for one in sites])
        kinds, after = dict(model.named_modules()), norms_after(model, example)
        norms = [n for n, m in kinds.items() if isinstance(m, _BatchNorm) and m.running_mean is not None]
        direct = {layer for layer, norm in after.items() if norm in norms}
        layers = [n for n, m in kinds.items() if isinstance(m, WEIGHED) and n not in direct]
        wanted: dict[str, Tensor] = {}
        given: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> Tensor:
            wanted[name] = value.movedim(_axis(kinds[name]), -1).flatten(0, -2).mean(0)
            return value

        def shift(name: str, value: Tensor) -> Tensor:
            seen = value.movedim(_axis(kinds[name]), -1)
            given[name] = wanted[name] - seen.flatten(0, -2).mean(0)
            return (seen + given[name]).movedim(-1, _axis(kinds[name]))

        _pass(quiet, norms, layers, example, note)
        _pass(gone, norms, layers, example, shift)
        edits: list[Edit] = []
        for name, more in given.items():
            if float(more.abs().max()) < 1e-6:  # rounding
                continue
            if name in norms:
                edits.append(Update(f"{name}.running_mean", values[f"{name}.running_mean"] - more))
            else:
                bias = values.get(f"{name}.bias")
                edits.append(Update(f"{name}.bias", more if bias is None else bias.detach() + more))
        return edits


def _axis(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _pass(
    model: nn.Module,
    norms: Sequence[str],
    layers: Sequence[str],
    example: Batch,
    act: Callable[[str, Tensor], Tensor],
) -> None:
    """A forward pass in which `act` changes what reaches norms and what leaves other layers."""

    def before(name: str) -> Any:
        return lambda module, args: (act(name, args[0]),)

    def behind(name: str) -> Any:
        return lambda module, args, out: act(name, out)

    for name in norms:
        model.get_submodule(name).register_forward_pre_hook(before(name))
    for name in layers:
        model.get_submodule(name).register_forward_hook(behind(name))
    _look(model, example)
