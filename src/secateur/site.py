"""Where something can be removed, and what would go with it.

A site is a grid of units that live or die whole: the weights of a matrix, its 4x1 blocks, a channel coupled
over three layers, a head, an expert, a layer. The only difference between these is `owner`: which unit owns
which element of which tensor. `gather` (sum over what a unit owns) and `expand` (give an element its unit's
value) are adjoint, and they are all that granularity means.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from secateur.errors import ModelError, SettingError, SiteError, did_you_mean

Tensors = Mapping[str, Tensor]
"""By dotted name: parameters and buffers, their gradients, or the contents of a cache."""

Kind = Literal["weight", "block", "channel", "head", "expert", "layer", "stream", "choice", "cache", "voxel"]
Unit = Literal["weights", "units", "parameters", "flops", "bytes", "latency"]
"""What a budget is a fraction of: the weights or the units of what is cut; or the whole network's rest."""


@dataclass(frozen=True, eq=False)
class Part:
    """The share of one tensor that a site's units own.

    A part is seen outputs first: `[out, in]` for a matrix, `[out, in, kh, kw]` for a convolution, whatever the
    order it is stored in.
    """

    name: str  # "blocks.3.mlp.up.weight"
    shape: tuple[int, ...]  # as seen, outputs first
    owner: Tensor | None = None  # int64, broadcastable to shape; None: each element is a unit; -1: nobody's
    index: int | None = None  # this expert of a stacked tensor [experts, ...]
    turned: bool = False  # stored inputs first (the Conv1D of GPT-2): seen through a transpose
    uses: float = 1.0  # multiply-adds each element takes part in per example: positions of a convolution
    itemsize: int = 4  # bytes an element takes

    @property
    def key(self) -> str:
        """The name, with the expert's number when there is one."""
        return self.name if self.index is None else f"{self.name}[{self.index}]"

    @property
    def module(self) -> str:
        """The path of the module that holds the tensor: "blocks.3.mlp.up"; "" for the model itself."""
        return self.name.rpartition(".")[0]

    @property
    def axis(self) -> int | None:
        """The one axis along which the owner varies, or None."""
        if self.owner is None:
            return 0 if len(self.shape) == 1 else None
        wide = [d for d, size in enumerate(self.owner.shape) if size > 1]
        if len(wide) == 1:
            return wide[0] + len(self.shape) - self.owner.dim()
        return None

    @property
    def makes(self) -> bool:
        """Whether its units are what a matrix or kernel puts out, and not what it reads."""
        return len(self.shape) > 1 and self.axis == 0

    def view(self, tensor: Tensor) -> Tensor:
        """The part of a whole tensor, outputs first; a view, so that writing to it writes to the tensor."""
        seen = tensor if self.index is None else tensor[self.index]
        return seen.transpose(0, -1) if self.turned else seen

    def read(self, tensors: Tensors) -> Tensor:
        """The part, out of a mapping of whole tensors, outputs first."""
        if self.name not in tensors:
            raise SiteError(
                f"site part {self.name!r} was asked for", "no tensor has that name", did_you_mean(self.name, tensors)
            )
        return self.view(tensors[self.name])

    def expand(self, units: Tensor, nobody: float = 0.0) -> Tensor:
        """One value per unit -> one per element, broadcastable to the part; -1 gets `nobody`."""
        if self.owner is None:
            return units.reshape(self.shape)
        owner, flat = self.owner.to(units.device), units.reshape(-1)
        fill = torch.full((), nobody, dtype=flat.dtype, device=flat.device)
        return torch.where(owner >= 0, flat[owner.clamp(min=0)], fill)

    def owned(self) -> Tensor:
        """Which unit owns each element along the owner's own axes (int64)."""
        if self.owner is None:
            return torch.arange(prod(self.shape)).reshape(self.shape)
        return self.owner


@dataclass(frozen=True, eq=False)
class Number:
    """A number a module keeps about its own shape, which must change when units go."""

    module: str  # dotted path of the module, "" for the model itself
    attribute: str  # "num_heads", "out_features"; "config.num_attention_heads" of a config of its own
    per_unit: float  # how much of the attribute one unit accounts for


@dataclass(frozen=True, eq=False)
class Site:
    """A place where something can be removed, cut into units that live or die whole."""

    name: str
    kind: Kind
    shape: tuple[int, ...]  # the grid of units: [out, in] for single weights, [H] for heads
    parts: tuple[Part, ...]  # more than one when tensors are coupled
    numbers: tuple[Number, ...] = ()  # what the modules say of themselves
    block: str = ""  # the block the site is in, for allocations that spend by block

    @property
    def units(self) -> int:
        """How many units there are."""
        return prod(self.shape)

    @property
    def removable(self) -> bool:
        """Whether units can be taken out physically: every owner varies along one axis only."""
        return all(part.owner is not None and part.axis is not None for part in self.parts)

    def gather(self, tensors: Tensors) -> Tensor:
        """Sum over what each unit owns, in every part: [*shape], float32 or wider."""
        total: Tensor | None = None
        for part in self.parts:
            value = part.read(tensors)
            found = _gather(part, value, self.units)
            total = found if total is None else total + found
        assert total is not None, "a site has at least one part"
        return total.reshape(self.shape)

    def expand(self, units: Tensor, nobody: float = 0.0) -> dict[str, Tensor]:
        """One value per unit [*shape] -> one per element, broadcastable to each part; -1 gets `nobody`."""
        return {part.key: part.expand(units, nobody) for part in self.parts}

    def cost(self, of: Unit = "weights") -> Tensor:
        """What one unit costs [*shape], float64: weights, multiply-adds per example, bytes, or one."""
        if of not in ("weights", "flops", "bytes", "units"):
            raise SettingError(f"a cost in {of!r} was asked for", "costs are in weights, flops, bytes or units", "")
        total = torch.zeros(self.units, dtype=torch.float64)
        if of == "units":
            return (total + 1).reshape(self.shape)
        for part in self.parts:
            each = {"weights": 1.0, "flops": 2.0 * part.uses, "bytes": float(part.itemsize)}[of]
            if part.owner is None:
                total += each
                continue
            owner = part.owner.reshape(-1)
            repeats = prod(part.shape) / owner.numel()  # elements that share one entry of the owner
            mine = owner[owner >= 0]
            total += torch.bincount(mine, minlength=self.units).double() * (each * repeats)
        return total.reshape(self.shape)


def _gather(part: Part, value: Tensor, units: int) -> Tensor:
    value = value if value.dtype in (torch.float32, torch.float64) else value.float()
    if part.owner is None:
        return value.reshape(-1)
    owner = part.owner.to(value.device)
    owner = owner.reshape((1,) * (value.dim() - owner.dim()) + tuple(owner.shape))
    thin = [d for d in range(value.dim()) if owner.shape[d] == 1 and value.shape[d] != 1]
    if thin:
        value = value.sum(dim=thin, keepdim=True)
    flat, own = value.reshape(-1), owner.expand_as(value).reshape(-1)
    out = torch.zeros(units, dtype=value.dtype, device=value.device)
    return out.index_add(0, own.clamp(min=0), torch.where(own >= 0, flat, torch.zeros_like(flat)))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every parameter and buffer by dotted name, tied ones under each of their names.

    A tensor goes by the name it has without what is wrapped round it: a parametrisation, torch.compile of the model or
    of a part of it, DistributedDataParallel. Raises ModelError for a parameter of a lazy module that has not run yet.
    """
    model = unwrapped(model)
    found: dict[str, Tensor] = {}
    for name, value in model.named_parameters(remove_duplicate=False):
        if is_lazy(value):
            raise ModelError(
                f"the weights of {type(model).__name__} were asked for",
                f"{name} has neither shape nor values yet, as its lazy module has not run",
                "Run the model on an example first.",
            )
        found[plain(name)] = value
    buffers = model.named_buffers(remove_duplicate=False)
    found.update((name.replace(_COMPILED + ".", ""), value) for name, value in buffers)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, inside what compiles it or trains it in several processes."""
    while True:
        if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            model = model.module
        elif (inner := uncompiled(model)) is not model:
            model = inner
        else:
            return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The module that torch.compile holds; any other as it is."""
    inner = model._modules.get(_COMPILED)
    return model if inner is None else inner


_COMPILED = "_orig_mod"  # what torch.compile calls the module it holds


def plain(name: str) -> str:
    """A tensor's name without what is wrapped round the module it is in."""
    name = name.replace(_COMPILED + ".", "")
    return name.replace("parametrizations.", "").removesuffix(".original") if "parametrizations." in name else name


def module_of(model: nn.Module, name: str) -> str:
    """The path of the module that a tensor belongs to: the convolution's, where a weight norm holds the tensor."""
    path = name.rpartition(".")[0]
    while path:
        here: object = model
        for piece in path.split("."):
            here = here._modules.get(piece) if isinstance(here, nn.Module) else None
        if here is not None:
            return path
        path = path.rpartition(".")[0]
    return ""


def total_units(sites: Sequence[Site]) -> int:
    """How many units the sites have together."""
    return sum(site.units for site in sites)
