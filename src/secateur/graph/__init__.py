"""Which positions of which tensors live and die together, for any model, with no code for an architecture.

`couple` traces a model, follows every operator (Wang et al. "Structurally Prune Anything", 2024, arXiv:2403.18955,
section 3.2, on positions rather than masks), and returns the sites whose units can be taken out whole. Rotary pairs,
grouped queries, tied embeddings, concatenations and shuffles come out as classes of positions. An operator without a
rule keeps what it touches and is named, and every site is tried before it is offered: the model without some units
must give what the model with those units at zero gives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from secateur.edit import Remove
from secateur.errors import GraphError
from secateur.graph.fit import fit
from secateur.graph.positions import Ints, Positions
from secateur.graph.rules import ATTENTION, STATISTIC
from secateur.graph.trace import Frozen, Network, follow
from secateur.site import Kind, Number, Part, Site, module_of, tensors
from secateur.task import Batch

__all__ = ["Coupling", "Frozen", "channels", "couple", "heads", "left_of", "removals"]


@dataclass(frozen=True)
class Coupling:
    """What can be taken out of a model whole, and what cannot and why."""

    sites: tuple[Site, ...]
    frozen: tuple[Frozen, ...] = ()
    inexact: frozenset[str] = frozenset()  # sites a norm takes statistics over: removing a unit is not zeroing it
    multiples: Mapping[str, int] = field(default_factory=dict)  # sites of which a multiple of so many must stay

    def of(self, *kinds: Kind) -> tuple[Site, ...]:
        """The sites of these kinds."""
        return tuple(site for site in self.sites if site.kind in kinds)

    def need(self, *kinds: Kind) -> tuple[Site, ...]:
        """The sites of these kinds. Raises GraphError, naming what is frozen, when there is none."""
        found = self.of(*kinds)
        if not found:
            reasons = "; ".join(str(f) for f in self.frozen[:5]) or "no operator couples any"
            raise GraphError(
                f"sites of kind {' or '.join(kinds)} were asked for",
                f"none can be taken out ({reasons})",
                "Use a method that masks weights, which needs no coupling.",
            )
        return found

    def check_exact(self, sites: Iterable[Site], advice: Callable[[Site], str]) -> None:
        """Raise GraphError, with advice, for a site of which a masked unit is not a missing one."""
        for site in sites:
            if site.name in self.inexact:
                raise GraphError(
                    f"units of {site.name} were to be masked",
                    "a norm takes statistics over all of them, in which one counts that is zero",
                    advice(site),
                )


def couple(model: nn.Module, example: Batch, *, verify: bool = True) -> Coupling:
    """Every site whose units can be taken out whole: channels, neurons, attention heads and the residual stream.

    `verify` tries every site on the example, and finds the numbers (a count of heads) that modules keep about
    themselves; it takes a copy of the weights for as long as it lasts. Without it a site may break the forward pass.
    A `Part.uses` counts products of matrices and convolutions, not biases, norms, or attention's own products.
    Raises GraphError for a model that cannot be traced.
    """
    network = follow(model, example)
    sites, inexact = _sites(model, network)
    frozen = list(network.frozen)
    multiples: dict[str, int] = {}
    if verify:
        sites, failed, multiples = fit(model, example, sites, inexact)
        frozen += failed
    return Coupling(tuple(sites), tuple(frozen), frozenset(s.name for s in sites) & inexact, multiples)


def channels(model: nn.Module, example: Batch, *, verify: bool = True) -> tuple[Site, ...]:
    """Channels of convolutions and neurons of MLPs, each with all that reads and writes it."""
    return couple(model, example, verify=verify).of("channel")


def heads(model: nn.Module, example: Batch, *, verify: bool = True) -> tuple[Site, ...]:
    """Attention heads: a key-value head with all its query heads is one unit."""
    return couple(model, example, verify=verify).of("head")


def removals(sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Remove]:
    """Edits that take out what is not kept, one site after another.

    Where two sites own different entries of one dimension (a concatenation), the later is restated for the tensor
    that the earlier leaves. Sites without an entry in `keep`, or that keep all, are left out. Each edit fits only
    after those before it.
    """
    left: dict[tuple[str, int], Tensor] = {}  # of the dimensions already cut: which entries are still there
    found = []
    for site in sites:
        kept = keep.get(site.name)
        if kept is None or bool(kept.all()):
            continue
        parts = []
        for part in site.parts:
            assert part.axis is not None and part.owner is not None, "graph sites are removable"
            owner = part.owner.reshape(-1)
            still = left.get((part.key, part.axis), torch.ones(len(owner), dtype=torch.bool))
            gone = (owner >= 0) & ~kept.reshape(-1)[owner.clamp(min=0)]
            left[part.key, part.axis] = still & ~gone
            shape = list(part.shape)
            for axis in range(len(shape)):
                if axis == part.axis:
                    shape[axis] = int(still.sum())
                elif (part.key, axis) in left:
                    shape[axis] = int(left[part.key, axis].sum())
            view = [1] * len(shape)
            view[part.axis] = -1
            parts.append(replace(part, shape=tuple(shape), owner=owner[still].reshape(view)))
        found.append(Remove(replace(site, parts=tuple(parts)), kept))
    return found


def left_of(sites: Sequence[Site], keep: Mapping[str, Tensor]) -> tuple[Site, ...]:
    """The same sites once `removals` of what is not kept were applied, without following the model again.

    A site that is down to one unit stays as it is: nothing can be taken from it.
    """
    still: dict[tuple[str, int], Tensor] = {}  # of the dimensions that are cut: which entries are left
    for site in sites:
        kept = keep.get(site.name)
        for part in site.parts if kept is not None else ():
            if part.axis is None or part.owner is None:
                continue
            owner = part.owner.reshape(-1)
            alive = (owner < 0) | kept.reshape(-1)[owner.clamp(min=0)]  # type: ignore[union-attr]  # the parts of coupled sites have owners
            still[part.key, part.axis] = still.get((part.key, part.axis), torch.ones_like(alive)) & alive
    found = []
    for site in sites:
        kept = keep.get(site.name, torch.ones(site.units, dtype=torch.bool)).reshape(-1)
        number = torch.where(kept, kept.cumsum(0) - 1, -1)
        parts = []
        for part in site.parts:
            if part.axis is None or part.owner is None:
                parts.append(part)
                continue
            owner = part.owner.reshape(-1)
            owner = torch.where(owner >= 0, number[owner.clamp(min=0)], owner)
            if (part.key, part.axis) in still:
                owner = owner[still[part.key, part.axis]]
            sizes = [int(still[part.key, a].sum()) if (part.key, a) in still else n for a, n in enumerate(part.shape)]
            view = [1] * len(sizes)
            view[part.axis] = -1
            parts.append(replace(part, shape=tuple(sizes), owner=owner.reshape(view)))
        found.append(replace(site, shape=(int(kept.sum()),), parts=tuple(parts)))
    return tuple(found)


def _sites(model: nn.Module, network: Network) -> tuple[list[Site], frozenset[str]]:
    """The classes of positions that the model's own tensors share, as sites."""
    p = network.tracing.positions
    p.settle()
    named = tensors(model)
    dims = [(name, axis, d) for name, traced in network.own.items() for axis, d in enumerate(traced.dims) if len(d) > 1]
    leaves = [p.leaves(d) for _, _, d in dims]
    group_of, unit_of, groups = _groups(p, dims, leaves)
    owners = _owners(leaves, group_of, unit_of, groups)
    lengths = {path: group_of[p.leaves(d)] for path, d in network.shapes.items()}  # [length, k]
    found: list[tuple[Site, bool]] = []
    claimed: dict[int, np.ndarray] = {}

    def rank(group: int) -> tuple[bool, int]:
        return (not bool(p.marked(groups[group][:1], ATTENTION)[0]), -len(groups[group]))

    for group in sorted(owners, key=rank):
        mine = owners[group]
        overlaps = any((claimed[i] & (o >= 0)).any() for i, o in mine if i in claimed)
        if overlaps or len(groups[group]) < 2 or all(len(network.own[dims[i][0]].dims) < 2 for i, _ in mine):
            continue
        for i, o in mine:
            claimed[i] = claimed.get(i, np.zeros(len(o), bool)) | (o >= 0)
        parts = [_part(network, named, dims[i][0], dims[i][1], o) for i, o in mine]
        units = groups[group]
        statistic = bool(p.marked(units, STATISTIC).any())
        block = _block(model, [part.name for part in parts])
        wide = statistic and not block and len({b for part in parts if (b := _block(model, [part.name]))}) > 1
        kind = "head" if p.marked(units, ATTENTION).all() else "stream" if wide else "channel"
        numbers = tuple(
            Number(path, "normalized_shape", float((at == group).sum() / len(units)))
            for path, at in lengths.items()
            if (at == group).any()
        )
        found.append((Site("", cast(Kind, kind), (len(units),), tuple(parts), numbers, block), statistic))
    order = {name: i for i, name in enumerate(network.own)}
    found.sort(key=lambda pair: (order[pair[0].parts[0].name], -pair[0].units))
    names = _names(model, [site for site, _ in found])
    sites = [replace(site, name=name) for (site, _), name in zip(found, names, strict=True)]
    inexact = frozenset(name for (_, statistic), name in zip(found, names, strict=True) if statistic)
    return sites, inexact


def _groups(p: Positions, dims: list, leaves: list[Ints]) -> tuple[Ints, Ints, list[Ints]]:
    """Classes that appear in the same places equally often are the units of one site."""
    signature = np.zeros(len(p), np.uint64)
    first = np.full(len(p), np.iinfo(np.int64).max)
    noise = np.random.default_rng(0)
    seen = 0
    for (_, _, d), leaf in zip(dims, leaves, strict=True):
        for column in range(leaf.shape[1]):
            code = noise.integers(1, 2**63, dtype=np.uint64)
            entries = leaf[:, column]
            where = np.flatnonzero(entries >= 0)
            classes, at, count = np.unique(entries[where], return_index=True, return_counts=True)
            with np.errstate(over="ignore"):
                signature[classes] += code * (2 * count.astype(np.uint64) + 1)
            first[classes] = np.minimum(first[classes], seen + where[at])
        seen += len(d)
    units = np.flatnonzero(signature)
    units = units[~p.frozen(units)]
    if not len(units):
        return np.full(len(p), -1), np.full(len(p), -1), []
    units = units[np.argsort(first[units], kind="stable")]
    group_of, unit_of = np.full(len(p), -1), np.full(len(p), -1)
    groups: list[Ints] = []
    kinds, which = np.unique(signature[units], return_inverse=True)
    order = np.argsort(which, kind="stable")
    for group, members in enumerate(np.split(units[order], np.cumsum(np.bincount(which, minlength=len(kinds)))[:-1])):
        group_of[members], unit_of[members] = group, np.arange(len(members))
        groups.append(members)
    return group_of, unit_of, groups


def _owners(leaves: list[Ints], group_of: Ints, unit_of: Ints, groups: list[Ints]) -> dict[int, list[tuple[int, Ints]]]:
    """Of each group: the dimensions it owns entries of, and which unit owns which entry."""
    owners: dict[int, list[tuple[int, Ints]]] = {g: [] for g in range(len(groups))}
    for i, leaf in enumerate(leaves):
        group = np.where(leaf >= 0, group_of[leaf.clip(min=0)], -1)
        unit = np.where(leaf >= 0, unit_of[leaf.clip(min=0)], -1)
        for g in np.unique(group[group >= 0]):
            mine = np.where(group == g, unit, -1)
            owner = mine.max(axis=1)
            if ((mine >= 0) & (mine != owner[:, None])).any():  # an entry that two units own
                owners.pop(g, None)
            elif g in owners:
                owners[g].append((i, owner))
    return owners


def _part(network: Network, named: Mapping[str, Tensor], name: str, axis: int, owner: Ints) -> Part:
    value = named[name]
    turned = name in network.tracing.turned
    shape = tuple(value.shape)
    if turned:
        shape, axis = shape[::-1], len(shape) - 1 - axis
    view = [1] * len(shape)
    view[axis] = -1
    return Part(
        name,
        shape,
        torch.from_numpy(owner.copy()).reshape(view),
        turned=turned,
        uses=network.tracing.uses.get(name, 0.0),
        itemsize=value.element_size(),
    )


def _block(model: nn.Module, names: Sequence[str]) -> str:
    """The path of the repeated block that all these tensors are in, or ""."""
    found = set()
    for name in names:
        pieces = module_of(model, name).split(".")
        found.add("")
        for i in range(1, len(pieces) + 1):
            if not pieces[i - 1].isdigit():
                continue
            parent, here = model.get_submodule(".".join(pieces[: i - 1])), model.get_submodule(".".join(pieces[:i]))
            like = sum(type(child) is type(here) for child in parent.children())
            if like > 1 and any(True for _ in here.children()):
                found.discard("")
                found.add(".".join(pieces[:i]))
                break
        else:
            return ""
    found.discard("")
    return found.pop() if len(found) == 1 else ""


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _names(model: nn.Module, sites: Sequence[Site]) -> list[str]:
    """The module in a block that holds a whole site, where it holds one only; else the module that makes its units."""
    whole = []
    for site in sites:
        paths = [module_of(model, part.name).split(".") for part in site.parts]
        shared = []
        for pieces in zip(*paths, strict=False):
            if len(set(pieces)) > 1:
                break
            shared.append(pieces[0])
        path = ".".join(shared)
        inside = site.block and (path == site.block or path.startswith(site.block + "."))
        whole.append(path if inside and not isinstance(model.get_submodule(path), _CONTAINERS) else "")
    makers = [_maker(model, site) for site in sites]
    names: list[str] = []
    for site, path, maker in zip(sites, whole, makers, strict=True):
        name = path if path and whole.count(path) == 1 else maker
        while name in names:
            name += f".{site.kind}"
        names.append(name)
    return names


def _maker(model: nn.Module, site: Site) -> str:
    for part in site.parts:
        if site.kind != "stream" and part.makes:
            return module_of(model, part.name)
    return module_of(model, site.parts[0].name)
