"""How much a block changes what flows through it: where little changes, little is lost by cutting.

With x what flows into a block and y what flows out of it, for each token:

    turn       1 - cos(x, y)             Men et al. 2024, "ShortGPT", arXiv:2403.03853, section 2
    angle      arccos(cos(x, y)) / pi    Wang et al. 2025, "CFSP", arXiv:2409.13199
    squared    mean of (y - x)^2
    absolute   mean of |y - x|

`watched` measures it in whatever passes go through a model while it lasts, forward alone or forward and back.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur.errors import EvidenceError, GraphError
from secateur.evidence import Evidence, merged


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

    def __init__(self, rule: Change) -> None:
        self.rule = rule
        self.mask: Tensor | None = None  # of the pass under way: padding is no token
        self._changes: dict[str, tuple[Tensor, int]] = {}
        self._squares: dict[str, tuple[Tensor, int]] = {}

    def change(self, block: str) -> float:
        """The mean change of a block over all tokens. Raises EvidenceError where none was seen, or it is not finite."""
        return float(_mean(block, self._changes.get(block)))

    def square(self, module: str) -> Tensor:
        """The mean square of what flowed into a module [in], float64, over all tokens. Raises as `change` does."""
        return _mean(module, self._squares.get(module)).cpu()

    def merge(self, blocks: Iterable[str], modules: Iterable[str]) -> None:
        """Add what other processes saw of the same blocks and modules, where several calibrate together."""
        for found, names in ((self._changes, blocks), (self._squares, modules)):
            mine = {n: Evidence(found[n][1], {"total": found[n][0]}) if n in found else Evidence() for n in names}
            found.update({n: (e.sums["total"], e.count) for n, e in merged(mine).items() if e.count})

    @torch.no_grad()
    def note_change(self, block: str, into: Tensor, out: Tensor) -> None:
        """Add a pass through a block: [examples, tokens, width] twice."""
        if into.shape != out.shape:
            raise GraphError(
                f"{block} was to be compared with what it is given",
                f"{list(into.shape)} goes in and {list(out.shape)} comes out",
                "Use a model whose blocks hand on a hidden state of one shape.",
            )
        found = self.rule.apart(tokens_of(into.detach(), self.mask), tokens_of(out.detach(), self.mask))
        total, count = self._changes.get(block, (0, 0))
        self._changes[block] = (total + found.sum(), count + len(found))

    @torch.no_grad()
    def note_square(self, module: str, into: Tensor) -> None:
        """Add a pass through a module: [examples, tokens, in]."""
        rows = tokens_of(into.detach(), self.mask)
        total, count = self._squares.get(module, (0, 0))
        self._squares[module] = (total + rows.double().square().sum(0), count + len(rows))


def _mean(name: str, found: tuple[Tensor, int] | None) -> Tensor:
    total, count = found or (torch.zeros(()), 0)
    if not count or not bool(torch.isfinite(total).all()):
        raise EvidenceError(
            f"what flows through {name} was to be measured",
            "it holds NaN or infinity" if count else "no token reached it",
            "Give more calibration data, or use bfloat16 or float32 where half precision overflows.",
        )
    return total / count


@contextmanager
def watched(model: nn.Module, blocks: Sequence[str], change: Change, inputs: Collection[str] = ()) -> Iterator[Watched]:
    """Within this, every pass is measured: how much blocks change what flows through them, and what modules are given.

    `blocks` and `inputs` are dotted names. Tokens that an attention mask [examples, tokens] leaves out do not count.
    Raises GraphError for a block that does not hand on a hidden state of one shape.
    """
    seen = Watched(change)

    def masked(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("attention_mask")
        seen.mask = mask if isinstance(mask, Tensor) else None

    hooks = [model.register_forward_pre_hook(masked, with_kwargs=True)]
    for name in blocks:
        hooks.append(model.get_submodule(name).register_forward_hook(_changed(seen, name), with_kwargs=True))
    for name in inputs:
        hooks.append(model.get_submodule(name).register_forward_pre_hook(_given(seen, name), with_kwargs=True))
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
    seen.merge(blocks, inputs)


def tokens_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """The tokens that count, a row each [tokens, width]: those a mask [examples, tokens] leaves out do not."""
    if mask is not None and mask.dim() == 2 and mask.shape == x.shape[:-1]:
        return x[mask.bool()]
    return x.reshape(-1, x.shape[-1])


def _changed(seen: Watched, block: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any], answer: Any) -> None:
        seen.note_change(block, _first((args, kwargs)), _first(answer))

    return note


def _given(seen: Watched, module: str) -> Any:
    def note(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        seen.note_square(module, _first((args, kwargs)))

    return note


def _first(tree: Any) -> Tensor:
    found = next((leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)), None)
    assert found is not None, "a block takes and gives a tensor"
    return found
