"""Which elements of a cached key or value stay: one score each, then exactly so many.

    PerToken       |x|, of each token's vector the largest: what Mustafar does
    PerChannel     |x|, of each channel the largest over a group of tokens
    OutputAware    |x| times how loud the queries were in that channel
    Channels       whole channels, by the size of x and of the queries in them: ThinK
    Anything       at random: the control

and of whole tokens, which of them are worth most:

    HeavyHitters   those that got most of the attention so far: H2O
    Newest         the newest, and the first few, on which attention rests: StreamingLLM

Tensors are [batch, heads, tokens, width], heads those of keys and values. Joo, Hosseini, Hadidi, Asgari. "Mustafar:
Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference." 2025. arXiv:2505.22913, section 2; Xu, Jie,
Dong, Wang, Lu, Zhou, Saha, Xiong, Sahoo. "ThinK: Thinner Key Cache by Query-Driven Pruning." 2024. arXiv:2407.21018.
For whole tokens: Zhang et al. "H2O." 2023. arXiv:2306.14048; Xiao et al. "Attention Sinks." 2023. arXiv:2309.17453.
"""

from dataclasses import dataclass
from math import floor
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.patterns import keep_top
from secateur.errors import PatternError


@runtime_checkable
class Choice(Protocol):
    """Which elements stay."""

    @property
    def together(self) -> int:
        """How many tokens in a row are decided together; what is decided at a time is a multiple of it."""
        ...

    @property
    def listens(self) -> int:
        """Whether it asks how loud the queries were: the power to which their sizes are summed; 0 is no."""
        ...

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """Boolean like x [batch, heads, tokens, width], as many True in each run of `together` tokens.

        `heard` [batch, heads, 1 or tokens, width] is the sum of |query|^listens over the queries each token was asked
        by.
        """
        ...


def kept(count: int, sparsity: float) -> int:
    """How many of `count` stay: floor(sparsity * count) go, and one stays at least."""
    return max(1, count - floor(sparsity * count + 1e-9))


@dataclass(frozen=True)
class PerToken:
    """The largest elements of each token's vector."""

    together = 1
    listens = 0

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """See Choice."""
        return keep_top(x.abs(), kept(x.shape[-1], sparsity))


@dataclass(frozen=True)
class PerChannel:
    """The largest elements of each channel over a group of tokens."""

    group: int = 32  # tokens in a group

    listens = 0

    @property
    def together(self) -> int:
        """See Choice."""
        return self.group

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """See Choice. Raises PatternError where the tokens do not make whole groups."""
        if x.shape[2] % self.group:
            raise PatternError(
                f"channels were to be pruned over groups of {self.group} tokens",
                f"there are {x.shape[2]} tokens",
                "Give a multiple of the group.",
            )
        tiled = x.reshape(*x.shape[:2], -1, self.group, x.shape[-1])
        grouped = tiled.transpose(-1, -2)  # [batch, heads, groups, width, group]
        return keep_top(grouped.abs(), kept(self.group, sparsity)).transpose(-1, -2).flatten(2, 3)


@dataclass(frozen=True)
class OutputAware:
    """The elements that are large where the queries are loud."""

    together = 1
    listens = 1

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """See Choice."""
        score = x.abs().float() if heard is None else x.abs().float() * heard
        return keep_top(score, kept(x.shape[-1], sparsity))


@dataclass(frozen=True)
class Channels:
    """Whole channels of all tokens decided at a time, by their energy and that of the queries (ThinK)."""

    together = 1
    listens = 2

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """See Choice."""
        energy = x.float().square().mean(2)  # [batch, heads, width]
        if heard is not None:
            energy = energy * heard.mean(2)
        keep = keep_top(energy, kept(x.shape[-1], sparsity))
        return keep.unsqueeze(2).expand(x.shape)


@dataclass(frozen=True)
class Anything:
    """Elements of each token at random."""

    seed: int = 0

    together = 1
    listens = 0

    def select(self, x: Tensor, sparsity: float, heard: Tensor | None = None) -> Tensor:
        """See Choice."""
        draw = torch.Generator().manual_seed(self.seed)
        score = torch.rand(x.shape, generator=draw).to(x.device)
        return keep_top(score, kept(x.shape[-1], sparsity))


@runtime_checkable
class Ranking(Protocol):
    """What a token is worth to each head."""

    def score(self, received: Tensor, places: Tensor) -> Tensor:
        """One score per token [batch, heads, tokens], from the attention it received and the place it has."""
        ...


@dataclass(frozen=True)
class HeavyHitters:
    """The tokens that got most of the attention of all queries so far."""

    def score(self, received: Tensor, places: Tensor) -> Tensor:
        """See Ranking."""
        return received


@dataclass(frozen=True)
class Newest:
    """The newest tokens, and the first that may be seen: attention that has nowhere else to go rests on them."""

    sinks: int = 4  # how many first ones

    def score(self, received: Tensor, places: Tensor) -> Tensor:
        """See Ranking."""
        seen = received > 0  # what stands in the padding gets nothing
        first = seen & (seen.cumsum(-1) <= self.sinks)
        return torch.where(seen, places.float(), -1.0).masked_fill(first, float("inf"))
