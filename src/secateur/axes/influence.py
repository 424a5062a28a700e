"""How much a block changes what flows through it: where little changes, little is lost by cutting.

With x what flows into a block and y what flows out of it, for each token:

    turn       1 - cos(x, y)             Men et al. 2024, "ShortGPT", arXiv:2403.03853, section 2
    angle      arccos(cos(x, y)) / pi    Wang et al. 2025, "CFSP", arXiv:2409.13199
    squared    mean of (y - x)^2
    absolute   mean of |y - x|

`watched` measures it in whatever passes go through a model while it lasts, forward alone or forward and back.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur.errors import EvidenceError, GraphError


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Of rows [tokens, width] with rows [tokens, width]: [tokens], float64, within [-1, 1]; 0 for a row of zeros."""
    a, b = a.double(), b.double()  # half precision would find blocks alike that are not
    size = a.norm(dim=-1) * b.norm(dim=-1)
    return ((a * b).sum(-1) / size.clamp(min=1e-300)).clamp(-1, 1)  # arccos of 1 + 1e-16 is NaN


@runtime_checkable
class Change(Protocol):
    """How far apart what flows into a block and what flows out of it are."""

    def apart(self, into: Tensor, out: Tensor) -> Tensor:
        """Rows [tokens, width] and rows [tokens, width] -> [tokens], float64, 0 where they are alike."""
        ...


@dataclass(frozen=True)
class Turn:
    """One less the cosine: in [0, 2], quadratic in a small angle."""

    def apart(self, into: Tensor, out: Tensor) -> Tensor:
        """See Change."""
        return 1 - cosine(into, out)


@dataclass(frozen=True)
class Angle:
    """The angle, as a share of half a turn: in [0, 1]."""

    def apart(self, into: Tensor, out: Tensor) -> Tensor:
        """See Change; a quarter of a turn for a row of zeros."""
        return cosine(into, out).arccos() / torch.pi


@dataclass(frozen=True)
class Squared:
    """The mean squared difference."""

    def apart(self, into: Tensor, out: Tensor) -> Tensor:
        """See Change."""
        return (out.double() - into.double()).square().mean(-1)


@dataclass(frozen=True)
class Absolute:
    """The mean size of the difference."""

    def apart(self, into: Tensor, out: Tensor) -> Tensor:
        """See Change."""
        return (out.double() - into.double()).abs().mean(-1)


class Watched:
    """What was measured: the mean change of each block, and the mean square of what flowed into some modules."""

    def __init__(self, change: Change) -> None:
        self.rule = change
        self.mask: Tensor | None = None  # of the pass under way: padding is no token
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, sums: Tensor, count: int) -> None:
        """Add what some tokens came to."""
        self._sums[name] = self._sums[name] + sums if name in self._sums else sums
        self._counts[name] = self._counts.get(name, 0) + count

    def mean(self, name: str) -> Tensor:
        """Of a block its mean change [], of a module the mean square of each input [in], float64, over all tokens.

        Raises EvidenceError, naming it, where nothing was seen or it is not finite.
        """
        found = self._sums.get(name)
        if found is None or not self._counts[name] or not bool(torch.isfinite(found).all()):
            raise EvidenceError(
                f"what flows through {name} was to be measured",
                "no token reached it" if found is None or not self._counts[name] else "it holds NaN or infinity",
                "Give more calibration data, or use bfloat16 or float32 where half precision overflows.",
            )
        return (found / self._counts[name]).cpu()


@contextmanager
def watched(model: nn.Module, blocks: Sequence[str], change: Change, inputs: Collection[str] = ()) -> Iterator[Watched]:
    """Within this, every pass is measured: how much blocks change what flows through them, and what modules are given.

    `blocks` and `inputs` are dotted names. Tokens that an attention mask [examples, tokens] leaves out do not count.
    Raises GraphError for a block that does not hand on a hidden state of one shape.
    """
    seen = Watched(change)
    hooks = [model.register_forward_pre_hook(_masks(seen), with_kwargs=True)]
    for name in blocks:
        hooks.append(model.get_submodule(name).register_forward_hook(_changes(seen, name), with_kwargs=True))
    for name in inputs:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(_squares(seen, name), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, a row each [tokens, width]: those a mask [examples, tokens] leaves out do not."""
    if mask is not None and mask.dim() == 2 and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _masks(seen: Watched) -> Any:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        seen.mask = mask if isinstance(mask, Tensor) else None

    return note


def _changes(seen: Watched, name: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any], answer: Any) -> None:
        into, out = _first((args, kwargs)), _first(answer)
        if into.shape != out.shape:
            raise GraphError(
                f"{name} was to be compared with what it is given",
                f"{list(into.shape)} goes in and {list(out.shape)} comes out",
                "Use a model whose blocks hand on a hidden state of one shape.",
            )
        with torch.no_grad():
            found = seen.rule.apart(tokens_of(into.detach(), seen.mask), tokens_of(out.detach(), seen.mask))
        seen.add(name, found.sum(), len(found))

    return note


def _squares(seen: Watched, name: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows = tokens_of(_first((args, kwargs)).detach(), seen.mask)
        seen.add(name, rows.double().square().sum(0), len(rows))

    return note


def _first(tree: Any) -> Tensor:
    found = next((leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)), None)
    assert found is not None, "a block takes and gives a tensor"
    return found
