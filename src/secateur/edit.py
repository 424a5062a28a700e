"""One change to a model. Edits are the only code that changes one; a list of them is the record of a run.

    Mask      zero what is not kept
    Gate      what the forward pass sees = weight * gate(weight)
    Update    new values for a tensor
    Rotate    a change of basis along each part's own axis
    Remove    units taken out physically, in every part
    Merge     units averaged into clusters
    Replace   another module here

`save` and `load` keep a list as safetensors, never pickle; `apply_` replays it.
"""

import copy
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur import stored
from secateur.errors import ModelError, SiteError, did_you_mean
from secateur.narrow import refit_attention_
from secateur.site import Number, Part, Site, Tensors, module_of, tensors

VERSION = 1


@runtime_checkable
class Edit(Protocol):
    """One change to a model."""

    def apply_(self, model: nn.Module) -> None:
        """Make the change."""
        ...

    def describe(self) -> str:
        """The change in a line."""
        ...


@final
class Mask:
    """Zero what is not kept, and remember it. The choice is stored as one bit a unit."""

    def __init__(self, site: Site, keep: Tensor) -> None:
        if tuple(keep.shape) != tuple(site.shape):
            raise SiteError(
                f"a mask of {tuple(keep.shape)} for {site.name} was given",
                f"its units are {site.shape}",
                "Give one boolean per unit.",
            )
        self.site = site
        self._bits = np.packbits(keep.detach().cpu().numpy().reshape(-1).astype(bool))
        self.kept = int(keep.sum())

    @property
    def keep(self) -> Tensor:
        """Boolean [*site.shape], True keeps."""
        flat = np.unpackbits(self._bits, count=self.site.units).astype(bool)
        return torch.from_numpy(flat).reshape(self.site.shape)

    def apply_(self, model: nn.Module) -> None:
        """Write zeros, in place."""
        named = tensors(model)
        gone = ~self.keep
        with torch.no_grad():
            for part in self.site.parts:
                seen = part.read(named)
                seen.masked_fill_(part.expand(gone).to(seen.device), 0)

    def describe(self) -> str:
        """`mask blocks.0.mlp.up.weight: 1,536 of 3,072 weights kept`."""
        return f"mask {self.site.name}: {self.kept:,} of {self.site.units:,} {self.site.kind}s kept"


@final
class Update:
    """New values for a tensor, or a bias that was not there.

    The values become the model's own storage: to keep them apart, give a clone.
    """

    def __init__(self, name: str, value: Tensor) -> None:
        self.name, self.value = name, value.detach()

    def apply_(self, model: nn.Module) -> None:
        """Set the tensor; a missing bias of a module that is there is added."""
        named = tensors(model)
        if self.name in named and named[self.name].shape == self.value.shape:
            # Into the storage that is there: a new one per tensor would leave holes in memory as a walk goes on.
            old = named[self.name].detach()
            self.value = old.copy_(self.value)
            return
        owner, attribute = _holder(model, self.name)
        if self.name not in named and attribute != "bias":
            raise SiteError(
                f"new values for {self.name!r} were given", "no tensor has that name", did_you_mean(self.name, named)
            )
        _set_tensor(model, self.name, self.value) if self.name in named else owner.register_parameter(
            attribute, nn.Parameter(self.value.clone())
        )

    def describe(self) -> str:
        """`update blocks.0.mlp.up.weight [64, 32]`."""
        return f"update {self.name} {list(self.value.shape)}"


@final
class Rotate:
    """A change of basis along each part's own axis: x becomes x Q, for readers and writers alike.

    The matrix is [old, new]: square and orthogonal to leave the function alone, narrower to slice as well. A
    permutation is one, and may be given and kept as the order of the units [units]: place j gets unit order[j], with
    all that it owns, so that it also fits units with several entries along an axis.
    """

    def __init__(self, site: Site, matrix: Tensor) -> None:
        ordered = matrix.dim() == 1 and not matrix.is_floating_point()
        if ordered and matrix.sort().values.tolist() != list(range(site.units)):
            raise SiteError(
                f"an order of {len(matrix)} units for {site.name} was given",
                f"it has {site.units}, each to be named once",
                f"Give a permutation of 0 to {site.units - 1}.",
            )
        if not ordered and (matrix.dim() != 2 or matrix.shape[0] != site.units):
            raise SiteError(
                f"a basis of {list(matrix.shape)} for {site.name} was given",
                f"it has {site.units} directions",
                "Give a matrix of [directions, directions kept].",
            )
        self.site = site
        self.matrix = matrix.detach().cpu().long() if ordered else matrix.detach().double().cpu()

    def apply_(self, model: nn.Module) -> None:
        """Contract every part with the matrix, in float64; or put its entries in the order, as they are."""
        named = tensors(model)
        held = dict(named)
        if self.matrix.dim() == 1:
            _reorder_(named, self.site, self.matrix)
            return
        for part in self.site.parts:
            _contract(model, named, held, part, self.matrix, self.site.name)
        _refit(model, self.site, self.matrix.shape[1])

    def describe(self) -> str:
        """`rotate blocks.0.stream: 576 -> 432 directions`; `rotate layer1: 16 channels in another order`."""
        if self.matrix.dim() == 1:
            return f"rotate {self.site.name}: {self.site.units} {self.site.kind}s in another order"
        return f"rotate {self.site.name}: {self.matrix.shape[0]} -> {self.matrix.shape[1]} directions"


@final
class Remove:
    """Take units out physically: every part gets smaller, and the modules' own numbers with it."""

    def __init__(self, site: Site, keep: Tensor) -> None:
        if not site.removable:
            raise SiteError(
                f"units of {site.name} were to be removed",
                "some of its units are scattered, so that no smaller tensor holds the rest",
                "Use Mask, or cut the model with channels, heads or layers.",
            )
        if tuple(keep.shape) != tuple(site.shape):
            raise SiteError(
                f"a choice of {tuple(keep.shape)} for {site.name} was given", f"its units are {site.shape}", ""
            )
        if not bool(keep.any()):
            raise SiteError(f"all {site.units} units of {site.name} were to be removed", "one at least must stay", "")
        self.site, self.keep = site, keep.detach().cpu().bool()

    def apply_(self, model: nn.Module) -> None:
        """Slice every part, then set out_features, num_heads and the like to what is left."""
        named = tensors(model)
        held = dict(named)  # as `named`, and under each of its names what a tied tensor has become
        keep = self.keep.reshape(-1)
        with torch.no_grad():
            for part in self.site.parts:
                axis, positions = _positions(part, keep)
                seen = part.read(named)
                smaller = seen.index_select(axis, positions.to(seen.device))
                whole = smaller.transpose(0, -1).contiguous() if part.turned else smaller
                # Two parts may be two sides of one tensor: the second reads what the first left.
                named[part.name] = _set_tensor(model, part.name, whole, held)
        _refit(model, self.site, int(keep.sum()))

    def describe(self) -> str:
        """`remove blocks.0.mlp: 96 of 128 channels kept`."""
        return f"remove {self.site.name}: {int(self.keep.sum()):,} of {self.site.units:,} {self.site.kind}s kept"


@final
class Merge:
    """Average units into clusters: unit u goes to assignment[u] with its weight."""

    def __init__(self, site: Site, assignment: Tensor, weights: Tensor) -> None:
        self.site, self.assignment, self.weights = site, assignment.long().cpu(), weights.double().cpu()

    def apply_(self, model: nn.Module) -> None:
        """Contract every part with the [units, clusters] matrix of the weights."""
        clusters = int(self.assignment.max()) + 1
        matrix = torch.zeros(self.site.units, clusters, dtype=torch.float64)
        matrix[torch.arange(self.site.units), self.assignment] = self.weights
        named = tensors(model)
        held = dict(named)
        for part in self.site.parts:
            _contract(model, named, held, part, matrix, self.site.name)
        _refit(model, self.site, clusters)

    def describe(self) -> str:
        """`merge blocks.0.experts: 16 -> 4 experts`."""
        return f"merge {self.site.name}: {self.site.units} -> {int(self.assignment.max()) + 1} {self.site.kind}s"


Replacement = Callable[..., nn.Module]
_replacements: dict[str, type[nn.Module]] = {"Identity": nn.Identity}


def replacement(kind: type[nn.Module]) -> type[nn.Module]:
    """Class decorator: a module that `Replace` may put into a model and `load` may build again.

    It needs `settings() -> dict` with the JSON values its constructor takes.
    """
    _replacements[kind.__name__] = kind
    return kind


@final
class Replace:
    """Put another module here: an identity, an adapter, a packed layer."""

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name, self.module = name, module

    def apply_(self, model: nn.Module) -> None:
        """Set the module in its parent, and keep a copy: later edits change what is in the model, not the record."""
        owner, attribute = _holder(model, self.name)
        module, self.module = self.module, copy.deepcopy(self.module)
        setattr(owner, attribute, module)
        if hasattr(module, "join_"):  # one that works with other modules finds them by name
            module.join_(model)  # type: ignore[operator]

    def describe(self) -> str:
        """`replace blocks.0.norm by Identity`."""
        return f"replace {self.name} by {type(self.module).__name__}"


@final
class Gate:
    """What the forward pass sees = weight * gate(weight): soft, learned, or recomputed at every pass.

    `gate` is a module that maps a part [as seen] to one factor per unit [*site.shape]; a learned one may ignore
    its argument. `harden` turns gates into plain weights.
    """

    def __init__(self, site: Site, gate: nn.Module) -> None:
        self.site, self.gate = site, gate

    def apply_(self, model: nn.Module) -> None:
        """Parametrise every part's tensor."""
        for part in self.site.parts:
            owner, attribute = _holder(model, part.name)
            parametrize.register_parametrization(owner, attribute, _Gated(self.site, part, self.gate))

    def describe(self) -> str:
        """`gate blocks.0.mlp by HardConcrete`."""
        return f"gate {self.site.name} by {type(self.gate).__name__}"


class _Gated(nn.Module):
    def __init__(self, site: Site, part: Part, gate: nn.Module) -> None:
        super().__init__()
        self.site, self.part, self.gate = site, part, gate

    def forward(self, tensor: Tensor) -> Tensor:
        factor = self.part.expand(self.gate(self.part.view(tensor)), nobody=1.0)
        return tensor * (factor.transpose(0, -1) if self.part.turned else factor)


def gated(model: nn.Module) -> bool:
    """Whether weights are behind something that pruning put there; a weight norm of the model's own is no gate."""
    lists = (module for module in model.modules() if isinstance(module, parametrize.ParametrizationList))
    return any(type(each).__module__.startswith("secateur") for found in lists for each in found)


def harden(model: nn.Module) -> nn.Module:
    """Make what the gates show the weights themselves, and take the gates away; the model, without hooks."""
    for module in list(model.modules()):
        if parametrize.is_parametrized(module):
            for attribute in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, attribute, leave_parametrized=True)
    return model


def apply_(model: nn.Module, edits: Edit | Iterable[Edit]) -> list[Edit]:
    """Make the changes in order, and return them for the record."""
    found = list(edits) if isinstance(edits, Iterable) else [edits]
    for edit in found:
        edit.apply_(model)
    return found


# Helpers of the edits


def _holder(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    try:
        return model.get_submodule(path), attribute
    except AttributeError:
        modules = [n for n, _ in model.named_modules() if n]
        raise SiteError(
            f"{name!r} was to be changed", f"there is no module {path!r}", did_you_mean(path, modules)
        ) from None


def _set_tensor(model: nn.Module, name: str, value: Tensor, held: dict[str, Tensor] | None = None) -> Tensor:
    """Give a tensor new values of any shape; where it is tied, under each of its names. The new tensor.

    `held` are the model's tensors as they are, which whoever sets many has looked up once; they are kept up to date.
    """
    held = tensors(model) if held is None else held
    old = held[name]
    if isinstance(old, nn.Parameter):
        new: Tensor = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        for module in _holders(model, old, held):
            for attribute, parameter in list(module._parameters.items()):
                if parameter is old:
                    module._parameters[attribute] = new  # type: ignore[assignment]
                    if isinstance(module, nn.RNNBase):  # it computes with a list of its own, made anew so that a copy
                        module._flat_weights = [getattr(module, n) for n in module._flat_weights_names]  # keeps its own
        held.update({other: new for other, tensor in held.items() if tensor is old})
        return new
    owner, attribute = _holder(model, name)
    owner._buffers[attribute] = held[name] = new = value.to(old.dtype)
    return new


def _holders(model: nn.Module, tensor: Tensor, held: Mapping[str, Tensor]) -> list[nn.Module]:
    """The modules that hold a parameter: found by its names, or where something is wrapped round it, among all."""
    found = []
    for name in [name for name, other in held.items() if other is tensor]:
        here: nn.Module | None = model
        path, _, attribute = name.rpartition(".")
        for piece in path.split(".") if path else ():
            here = here._modules.get(piece) if here is not None else None
        if here is None or here._parameters.get(attribute) is not tensor:
            return list(model.modules())
        found.append(here)
    return found


def _positions(part: Part, keep: Tensor) -> tuple[int, Tensor]:
    axis = part.axis
    assert axis is not None and part.owner is not None, "removable was checked"
    owner = part.owner.reshape(-1)
    return axis, ((owner < 0) | keep[owner.clamp(min=0)]).nonzero().reshape(-1)


def _contract(
    model: nn.Module, named: dict[str, Tensor], held: dict[str, Tensor], part: Part, matrix: Tensor, site: str
) -> None:
    axis = part.axis
    if axis is None or (part.owner is not None and part.owner.numel() != matrix.shape[0]):
        raise SiteError(
            f"{site} was to be contracted along one axis",
            f"{part.key} {list(part.shape)} has not one entry per unit",
            "Cut the site so that each unit is one position of one axis.",
        )
    seen = part.read(named)
    order = torch.arange(matrix.shape[0]) if part.owner is None else part.owner.reshape(-1)
    basis = matrix.to(seen.device)[order.to(seen.device)]
    with torch.no_grad():
        value = torch.tensordot(seen.double(), basis, dims=([axis], [0])).movedim(-1, axis).to(seen.dtype)
    value = value.transpose(0, -1).contiguous() if part.turned else value.contiguous()
    named[part.name] = _set_tensor(model, part.name, value, held)


def _reorder_(named: Tensors, site: Site, order: Tensor) -> None:
    """Put what each unit owns of every part where the unit whose place it takes has its own, in place."""
    places = []
    for part in site.parts:
        owner = torch.arange(site.units) if part.owner is None else part.owner.reshape(-1)
        mine = torch.argsort(owner, stable=True)[int((owner < 0).sum()) :]  # by unit, in each as they lie
        counts = torch.bincount(owner[owner >= 0], minlength=site.units)
        if part.axis is None or len(counts) != site.units or int(counts.min()) != int(counts.max()):
            raise SiteError(
                f"the units of {site.name} were to be put in another order",
                f"they own unequal shares of {part.key} {list(part.shape)}, or have no one axis of it",
                "Cut the site so that each unit owns as many positions of one axis.",
            )
        came = torch.arange(len(owner))
        came[mine] = mine.reshape(site.units, -1)[order].reshape(-1)
        places.append((part, part.axis, came))
    with torch.no_grad():
        for part, axis, came in places:
            seen = part.read(named)
            seen.copy_(seen.index_select(axis, came.to(seen.device)))


def _refit(model: nn.Module, site: Site, left: int) -> None:
    """Set the numbers that modules keep about their own shapes to what the tensors now are."""
    for path in dict.fromkeys(module_of(model, part.name) for part in site.parts):
        module = model.get_submodule(path)
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Linear):
            module.out_features, module.in_features = module.weight.shape
        elif isinstance(module, nn.modules.conv._ConvNd):
            out, into = (1, 0) if module.transposed else (0, 1)
            depthwise = module.groups > 1 and module.groups == module.in_channels
            if depthwise:
                module.groups = module.weight.shape[0] // max(1, module.out_channels // module.groups)
            shape = module.weight.shape
            module.out_channels = shape[out] * (module.groups if module.transposed else 1)
            module.in_channels = shape[into] * (1 if module.transposed else module.groups)
        elif isinstance(module, nn.modules.batchnorm._NormBase) and weight is not None:
            module.num_features = len(weight)
        elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and weight is not None:
            module.normalized_shape = tuple(weight.shape)
        elif isinstance(module, nn.GroupNorm) and weight is not None:
            module.num_channels = len(weight)
        elif isinstance(module, nn.Embedding):
            module.num_embeddings, module.embedding_dim = module.weight.shape
        elif isinstance(module, nn.MultiheadAttention):
            refit_attention_(model, path)
        elif isinstance(module, nn.RNNBase):
            layer: Any = module
            layer.input_size, told = layer.weight_ih_l0.shape[1], layer.weight_hh_l0.shape[1]
            layer.hidden_size = layer.weight_hr_l0.shape[1] if layer.proj_size else told
            layer.proj_size = told if layer.proj_size else 0
        elif isinstance(module, nn.RNNCellBase):
            module.input_size, module.hidden_size = module.weight_ih.shape[1], module.weight_hh.shape[1]
        elif type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # GPT-2 stores inputs first
            module.nx, module.nf = tuple(weight.shape)  # type: ignore[union-attr]
    gone = site.units - left
    for number in site.numbers:
        module = model.get_submodule(number.module)
        where, _, attribute = number.attribute.rpartition(".")
        if where:  # of a config that others share: they go on with it as it is
            setattr(module, where, copy.copy(getattr(module, where)))
        holder = getattr(module, where) if where else module
        old = getattr(holder, attribute)
        left_over = round(gone * number.per_unit)
        if isinstance(old, tuple):  # the shape a norm without weights goes by: its last length
            setattr(holder, attribute, (*old[:-1], old[-1] - left_over))
        else:
            setattr(holder, attribute, type(old)(old - left_over))


# Keeping edits


class _Store:
    """Collects the tensors and the JSON of a list of edits."""

    kinds: ClassVar[tuple[type, ...]] = (Mask, Update, Rotate, Remove, Merge, Replace)

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.sites: list[dict[str, Any]] = []
        self._seen: dict[int, int] = {}

    def keep(self, value: Tensor) -> str:
        name = f"t{len(self.tensors)}"
        self.tensors[name] = value.detach()
        return name

    def site(self, site: Site) -> int:
        if id(site) not in self._seen:
            self._seen[id(site)] = len(self.sites)
            parts = [
                {
                    "name": p.name,
                    "shape": list(p.shape),
                    "owner": None if p.owner is None else self.keep(p.owner),
                    "index": p.index,
                    "turned": p.turned,
                    "uses": p.uses,
                    "itemsize": p.itemsize,
                }
                for p in site.parts
            ]
            numbers = [[n.module, n.attribute, n.per_unit] for n in site.numbers]
            self.sites.append(
                {
                    "name": site.name,
                    "kind": site.kind,
                    "shape": list(site.shape),
                    "parts": parts,
                    "numbers": numbers,
                    "block": site.block,
                }
            )
        return self._seen[id(site)]

    def edit(self, edit: Edit) -> dict[str, Any]:
        if isinstance(edit, Mask):
            return {"edit": "Mask", "site": self.site(edit.site), "bits": self.keep(torch.from_numpy(edit._bits))}
        if isinstance(edit, Update):
            return {"edit": "Update", "name": edit.name, "value": self.keep(edit.value)}
        if isinstance(edit, Rotate):
            return {"edit": "Rotate", "site": self.site(edit.site), "matrix": self.keep(edit.matrix)}
        if isinstance(edit, Remove):
            return {"edit": "Remove", "site": self.site(edit.site), "keep": self.keep(edit.keep)}
        if isinstance(edit, Merge):
            row = {"assignment": self.keep(edit.assignment), "weights": self.keep(edit.weights)}
            return {"edit": "Merge", "site": self.site(edit.site), **row}
        if isinstance(edit, Replace):
            kind = type(edit.module).__name__
            if _replacements.get(kind) is not type(edit.module):
                raise ModelError(
                    f"{edit.describe()} was to be saved",
                    f"{kind} is not one of {', '.join(sorted(_replacements))}",
                    "Mark its class with @replacement so that it can be built again.",
                )
            settings: dict[str, Any] = getattr(edit.module, "settings", dict)()
            state = {k: self.keep(v) for k, v in edit.module.state_dict().items()}
            return {"edit": "Replace", "name": edit.name, "module": kind, "settings": settings, "state": state}
        raise ModelError(
            f"{edit.describe()} was to be saved",
            f"a {type(edit).__name__} is not a finished change",
            "Harden it first.",
        )


def save(edits: Sequence[Edit], path: str | Path) -> None:
    """Write edits to a safetensors file; the JSON that says what they are is its metadata."""
    store = _Store()
    rows = [store.edit(edit) for edit in edits]
    about = {"secateur_edits": str(VERSION), "sites": json.dumps(store.sites), "edits": json.dumps(rows)}
    target = Path(path)
    partial = target.with_name(target.name + ".partial")
    stored.write(store.tensors, partial, about)
    os.replace(partial, target)


def load(path: str | Path) -> list[Edit]:
    """Read edits that `save` wrote. Raises ModelError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            about = file.metadata() or {}
            if about.get("secateur_edits") != str(VERSION):
                raise ModelError(
                    f"edits were to be read from {path}",
                    f"it says version {about.get('secateur_edits', 'none')}, and this is version {VERSION}",
                    "Make the file again with this version of secateur.",
                )
            values = {name: file.get_tensor(name) for name in file.keys()}
            sites = [_site(row, values) for row in json.loads(about["sites"])]
            return [_edit(row, sites, values) for row in json.loads(about["edits"])]
    except (SafetensorError, OSError, KeyError, ValueError, IndexError, TypeError, RuntimeError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"edits were to be read from {path}", f"it is not whole: {error}", "Copy it again.") from error


def _site(row: dict[str, Any], values: Tensors) -> Site:
    parts = tuple(
        Part(
            name=p["name"],
            shape=tuple(p["shape"]),
            owner=None if p["owner"] is None else values[p["owner"]],
            index=p["index"],
            turned=p["turned"],
            uses=p["uses"],
            itemsize=p["itemsize"],
        )
        for p in row["parts"]
    )
    numbers = tuple(Number(*n) for n in row["numbers"])
    return Site(row["name"], row["kind"], tuple(row["shape"]), parts, numbers, row["block"])


def _edit(row: dict[str, Any], sites: Sequence[Site], values: Tensors) -> Edit:
    kind = row["edit"]
    if kind == "Mask":
        site = sites[row["site"]]
        packed = values[row["bits"]].numpy()
        if packed.size != -(-site.units // 8):  # before memory is taken for what the file only claims
            raise ValueError(f"the mask of {site.name} has {packed.size} bytes for {site.units} units")
        bits = np.unpackbits(packed, count=site.units).astype(bool)
        return Mask(site, torch.from_numpy(bits).reshape(site.shape))
    if kind == "Update":
        return Update(row["name"], values[row["value"]])
    if kind == "Rotate":
        return Rotate(sites[row["site"]], values[row["matrix"]])
    if kind == "Remove":
        return Remove(sites[row["site"]], values[row["keep"]])
    if kind == "Merge":
        return Merge(sites[row["site"]], values[row["assignment"]], values[row["weights"]])
    if kind == "Replace":
        if row["module"] not in _replacements:
            raise ModelError(
                f"a module of class {row['module']!r} was to be built",
                "it is not one secateur knows",
                did_you_mean(row["module"], _replacements),
            )
        module = _replacements[row["module"]](**row["settings"])
        module.load_state_dict({k: values[v] for k, v in row["state"].items()})
        return Replace(row["name"], module)
    raise ModelError(f"an edit {kind!r} was to be read", "there is no such edit", "Make the file with this version.")
