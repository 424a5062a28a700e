"""Which small part of a model is trained, and behind which adapters.

    biases  norms  head  embeddings  everything        tensors as they are
    mask-lora  lora-prune  scale-lora  lora            adapters on the matrices, merged afterwards
    statistics                                         nothing is trained: batch norms are recalibrated

Zimmer et al. 2023, "PERP", arXiv:2312.15230, section 3. `union` joins several; the first to ask for a tensor has it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur import adapters
from secateur.adapters import LowRank, tied_names
from secateur.errors import SettingError, SiteError
from secateur.site import Part, tensors
from secateur.walk import stacks


@dataclass(frozen=True, eq=False)
class Place:
    """What a subset chooses from: the model, the matrices that may be adapted, and what of each tensor is kept."""

    model: nn.Module
    matrices: Mapping[str, Part]  # tensor name -> how it is seen
    keep: Mapping[str, Tensor]  # of those tensors that have zeros to keep, as stored
    draw: Callable[[str], torch.Generator]

    def low(self, name: str, rank: int) -> LowRank:
        """A product of low rank for a tensor."""
        part = self.matrices.get(name)
        value = tensors(self.model)[name]
        return LowRank(value, rank, stacked=part is not None and part.index is not None, turned=_turned(part))

    def kept(self, name: str) -> Tensor:
        """What of a tensor is kept: all of it where it has no zeros to keep."""
        found = self.keep.get(name)
        return torch.ones_like(tensors(self.model)[name], dtype=torch.bool) if found is None else found


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a subset wants trained."""

    whole: tuple[str, ...] = ()  # tensors trained as they are
    adapters: Mapping[str, nn.Module] = field(default_factory=dict)  # tensor name -> Adapter
    samples: int = 0  # calibration examples on which batch norms are recalibrated first
    note: str = ""


@runtime_checkable
class Subset(Protocol):
    """A small part of a model to be trained."""

    def choose(self, place: Place) -> Chosen:
        """Which tensors, and behind which adapters."""
        ...


@dataclass(frozen=True)
class Biases:
    """Every bias there is; Llama and its like have none."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        norms = set(_scales(place.model))
        return Chosen(
            tuple(
                n
                for n, p in place.model.named_parameters()
                if p.dim() == 1 and "bias" in n.rpartition(".")[2] and n not in norms
            )
        )


@dataclass(frozen=True)
class Norms:
    """The scales and shifts of every norm, known by what they are: modules whose only parameters are vectors."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(tuple(_scales(place.model)))


@dataclass(frozen=True)
class Statistics:
    """The running mean and variance of batch norms, taken anew before any training: no parameter is trained for it."""

    samples: int = 1024  # calibration examples, or as many as there are

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        norms = [m for m in place.model.modules() if isinstance(m, _BatchNorm)]
        return Chosen(samples=self.samples if norms else 0, note=f"{len(norms)} batch norms were recalibrated")


@dataclass(frozen=True)
class Embeddings:
    """Every embedding, whole; where it is tied to the head, the head with it."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        tied = tied_names(place.model)
        names = [
            f"{n}.weight" for n, m in place.model.named_modules() if isinstance(m, nn.Embedding) and m.weight.dim() == 2
        ]
        shared = [n for n in names if n in tied]
        note = f"{shared[0]} is one tensor with {', '.join(n for n in tied[shared[0]] if n != shared[0])}: both change"
        return Chosen(tuple(names), note=note if shared else "")


@dataclass(frozen=True)
class Head:
    """The last linear layer behind an ordinary adapter, or whole where the adapter would be no smaller.

    One tied to the embedding is left alone: merging would change the embedding as well.
    """

    rank: int = 16
    scale: float = 2.0  # c = alpha / r

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        name = _head(place.model)
        if name is None:
            return Chosen()
        if name in tied_names(place.model):
            return Chosen(note=f"{name} is tied to the embedding and was left alone")
        low = place.low(name, self.rank)
        if low.a.numel() + low.b.numel() >= tensors(place.model)[name].numel():
            return Chosen((name,))
        low.start_at_zero_(place.draw(name))
        if name in place.keep:
            return Chosen(adapters={name: adapters.MaskLora(low, self.scale, place.keep[name])})
        return Chosen(adapters={name: adapters.Lora(low, self.scale)})


@dataclass(frozen=True)
class MaskLora:
    """Each matrix W + c (B A) * M, in training as when merged: the paper's best."""

    rank: int = 16
    scale: float = 2.0  # c = alpha / r

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(
            adapters={
                n: adapters.MaskLora(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale, place.kept(n))
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class LoraPrune:
    """Each matrix W + c B A in training; what falls on a zero is cut off when merged."""

    rank: int = 16
    scale: float = 2.0

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(
            adapters={
                n: adapters.LoraPrune(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale, place.kept(n))
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class ScaleLora:
    """Each matrix W * (B A), with B A = 1 at the start."""

    rank: int = 16

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(adapters={n: adapters.ScaleLora(place.low(n, self.rank).start_at_one_()) for n in place.matrices})


@dataclass(frozen=True)
class Lora:
    """Each matrix W + c B A: for models whose units were taken out, since it would fill zeros in."""

    rank: int = 16
    scale: float = 2.0

    def choose(self, place: Place) -> Chosen:
        """See Subset. Raises SettingError where a matrix has zeros."""
        for name in place.matrices:
            if name in place.keep:
                gone = int((~place.keep[name]).sum())
                raise SettingError(
                    "ordinary adapters (lora) were asked for",
                    f"{name} has {gone:,} zeros, which merging would fill in",
                    "Use mask-lora, whose adapters keep them.",
                )
        return Chosen(
            adapters={
                n: adapters.Lora(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale)
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class Everything:
    """All parameters, masks held: full retraining, which the others are compared with."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(tuple(n for n, p in place.model.named_parameters() if p.is_floating_point()))


def union(subsets: Sequence[Subset], place: Place) -> tuple[Chosen, list[str]]:
    """What several subsets want trained together, and how large a share of the model each is.

    The first to ask for a tensor has it. Raises SiteError when they come to nothing.
    """
    named = dict(place.model.named_parameters())
    shared = tied_names(place.model)
    whole: list[str] = []
    behind: dict[str, nn.Module] = {}
    lines, notes = [], []
    total = sum(p.numel() for p in named.values())
    trained = samples = 0
    for subset in subsets:
        found = subset.choose(place)
        mine = [n for n in dict.fromkeys(found.whole) if n in named and n not in whole and n not in behind]
        on = {n: a for n, a in found.adapters.items() if n not in whole and n not in behind}
        for name in list(mine):
            half = named[name].element_size() < 4 and named[name].is_floating_point()
            if half and name in shared:
                notes.append(f"{name} is shared, and is trained in {named[name].dtype} as it is")
            elif half:
                mine.remove(name)
                on[name] = adapters.Offset(named[name], place.keep.get(name))
        count = sum(named[n].numel() for n in mine) + sum(p.numel() for a in on.values() for p in a.parameters())
        lines.append(f"{type(subset).__name__} {count:,}")
        notes += [found.note] if found.note else []
        trained, samples = trained + count, max(samples, found.samples)
        whole += mine
        behind.update(on)
    if not trained and not samples:
        raise SiteError(
            f"{', '.join(type(s).__name__ for s in subsets)} of {type(place.model).__name__} were to be trained",
            "it has none of them",
            "Add another subset, such as mask-lora.",
        )
    share = f"{trained:,} parameters were trained, {trained / total:.2%} of the model's {total:,}: {', '.join(lines)}"
    return Chosen(tuple(whole), behind, samples), [share, *notes]


ADAPTERS = (MaskLora, LoraPrune, ScaleLora, Lora)
"""Those that put an adapter on each matrix, which takes one."""


def _scales(model: nn.Module) -> list[str]:
    """The parameters of norms: of modules that hold vectors and nothing else, one of them a scale."""
    found = []
    known = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        alone = not any(True for child in module.children() for _ in child.parameters())
        vectors = bool(own) and all(p.dim() == 1 for p in own.values())
        if alone and vectors and not isinstance(module, nn.PReLU) and own.keys() & {"weight", "scale", "gamma"}:
            found += [f"{path}.{n}" if path else n for n in own]
    return [name for name in found if name in known]


def _head(model: nn.Module) -> str | None:
    """The weight of the output layer: as the model says, or the last linear layer outside its blocks."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{block}." for stack in stacks(model) for block in stack)
    last = None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (module is output or not path.startswith(inside)):
            last = f"{path}.weight" if path else "weight"
            if module is output:
                return last
    return last


def _turned(part: Part | None) -> bool:
    return part is not None and part.turned
