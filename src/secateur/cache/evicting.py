"""The past of one attention layer that forgets whole tokens: what pruning their elements is measured against.

Zhang, Sheng, Zhou, Chen, Zheng, Cai, Song, Tian, Re, Barrett, Wang, Chen. "H2O: Heavy-Hitter Oracle for Efficient
Generative Inference of Large Language Models." 2023. arXiv:2306.14048, section 4; Xiao, Tian, Chen, Han, Lewis.
"Efficient Streaming Language Models with Attention Sinks." 2023. arXiv:2309.17453, section 3.2.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.axes.cached import HeavyHitters, Ranking, kept
from secateur.axes.patterns import keep_top
from secateur.cache.past import behind, check_share, check_window
from secateur.errors import SettingError

BLOCK = 256  # queries that attend at a time: all of a long prompt would make a matrix of its length squared


@dataclass(frozen=True)
class Eviction:
    """Which tokens are forgotten whole, and when: each head keeps as many of its own choice."""

    sparsity: float = 0.7  # of the tokens behind the window
    window: int = 32  # the newest tokens, which stay
    chunk: int = 32  # how many leave the window before some are forgotten
    by: Ranking = field(default_factory=HeavyHitters)

    def __post_init__(self) -> None:
        check_share("sparsity", self.sparsity)
        check_window(self.window)
        if self.chunk < 1:
            raise SettingError(f"chunks of {self.chunk} tokens were asked for", "that is none", "Give 1 or more.")

    def begin(self) -> "Remaining":
        """A past with nothing in it."""
        return Remaining(self)

    def as_decoded(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, prefill: int
    ) -> Tensor:
        """What each token of a text would have got, had it been decoded: as many at a time as nothing is forgotten."""
        past, tokens, outs = self.begin(), keys.shape[2], []
        start, end = 0, prefill or self._next(0)
        while start < tokens:
            end = min(end, tokens)
            past.append_(keys[:, :, start:end], values[:, :, start:end])
            rows = None if mask is None else mask[:, :, start:end]
            outs.append(past.attend(query[:, :, start:end], rows, scaling))
            past.settle_(query[:, :, start:end])
            start, end = end, self._next(end)
        return torch.cat(outs, 2)

    def _next(self, tokens: int) -> int:
        """How many tokens there are when more may be forgotten than of so many."""
        return self.window + ((tokens - self.window) // self.chunk + 1) * self.chunk


class Remaining:
    """Keys and values [batch, heads, left, width] of the tokens that are left, where they stood, and who asked."""

    def __init__(self, pruning: Eviction) -> None:
        self.pruning = pruning
        self.tokens = 0  # how many there have been
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._places = torch.empty(0, dtype=torch.int32)  # [batch, heads, left], rising
        self._received = torch.empty(0)  # [batch, heads, left], the attention each has got

    @property
    def as_it_was(self) -> bool:
        """False: attention is always computed here, since it is what tokens are ranked by."""
        return False

    @property
    def behind(self) -> int:
        """How many tokens have been chosen among: those that can no longer be taken back."""
        return int(behind(torch.tensor(self.tokens), self.pruning.window, self.pruning.chunk))

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that are left."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        held = (self.keys, self.values, self._places, self._received)
        return sum(t.numel() * t.element_size() for t in held if t is not None)

    def append_(self, keys: Tensor, values: Tensor) -> None:
        """Take in new tokens [batch, heads, new, width]."""
        batch, heads, new, _ = keys.shape
        place = torch.arange(self.tokens, self.tokens + new, dtype=torch.int32, device=keys.device)
        place, none = place.expand(batch, heads, new), torch.zeros(batch, heads, new, device=keys.device)
        if self.keys is None or self.values is None:
            self.keys, self.values, self._places, self._received = keys, values, place, none
        else:
            self.keys, self.values = torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2)
            self._places = torch.cat([self._places, place], 2)
            self._received = torch.cat([self._received, none], 2)
        self.tokens += new

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The newest tokens' query [batch, query heads, new, width] against what is left -> the same shape."""
        keys, values = self.tail
        batch, heads = keys.shape[:2]
        new, outs = query.shape[2], []
        lead = self.tokens - new  # the place of the first query
        for start in range(0, new, BLOCK):
            block = query[:, :, start : start + BLOCK].float()
            q = block.unflatten(1, (heads, -1))  # type: ignore[no-untyped-call]  # [batch, heads, group, n, width]
            scores = torch.einsum("bhgqd,bhkd->bhgqk", q, keys.float()) * scaling
            rows = block.shape[2]
            if mask is None:
                asking = torch.arange(lead + start, lead + start + rows, device=query.device)
                seen = self._places[:, :, None, :] <= asking[:, None]  # [batch, heads, n, left]
            else:
                part = mask[:, :, start : start + BLOCK].expand(batch, heads, -1, -1)
                seen = part.gather(-1, self._places.long()[:, :, None].expand(-1, -1, rows, -1))
            seen = seen.unsqueeze(2)
            scores = scores.masked_fill(~seen, float("-inf")) if seen.dtype == torch.bool else scores + seen
            weights = scores.softmax(-1).nan_to_num(0.0)  # a row of padding attends to nothing
            self._received = self._received + weights.sum((2, 3))
            outs.append(torch.einsum("bhgqk,bhkd->bhgqd", weights, values.float()).flatten(1, 2).to(query.dtype))
        return torch.cat(outs, 2)

    def settle_(self, query: Tensor) -> None:
        """After attention: of those behind the window the best stay, when another chunk has left it."""
        (keys, values), count = self.tail, self.behind
        old = int((self._places[0, 0] < count).sum())
        stay = kept(count, self.pruning.sparsity) if count else 0
        if stay >= old:
            return
        score = self.pruning.by.score(self._received[:, :, :old], self._places[:, :, :old])
        keep = torch.ones(self._places.shape, dtype=torch.bool, device=keys.device)
        keep[:, :, :old] = keep_top(score, stay)
        index = keep.nonzero()[:, 2].reshape(*keep.shape[:2], -1)  # [batch, heads, left], rising
        wide = index.unsqueeze(-1).expand(-1, -1, -1, keys.shape[-1])
        self.keys, self.values = keys.gather(2, wide), values.gather(2, wide)
        self._places, self._received = self._places.gather(2, index), self._received.gather(2, index)

    def keep_(self, tokens: int) -> None:
        """Forget the newest, so that there are so many."""
        left = self.tail[0].shape[2] - (self.tokens - tokens)
        self.keys, self.values = (t[:, :, :left] for t in self.tail)
        self._places, self._received = self._places[:, :, :left], self._received[:, :, :left]
        self.tokens = tokens

    def select_(self, rows: Tensor) -> None:
        """Keep other rows of the batch."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values, self._places, self._received = (
                t.index_select(0, rows.to(t.device)) for t in (*self.tail, self._places, self._received)
            )
