"""The past of one attention layer: tokens packed, then a window of tokens as they are."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.axes.cached import Choice, PerToken
from secateur.errors import SettingError
from secateur.formats.bitmap_kv import TILE, BitmapKV, pack


@dataclass(frozen=True)
class Pruning:
    """What is pruned of a cache, and when."""

    key_sparsity: float = 0.7
    value_sparsity: float = 0.7
    window: int = 32  # the newest tokens, which stay as they are
    chunk: int = 32  # tokens packed at a time, once as many have left the window
    keys: Choice = field(default_factory=PerToken)
    values: Choice = field(default_factory=PerToken)

    def __post_init__(self) -> None:
        for name in ("key_sparsity", "value_sparsity"):
            check_share(name, getattr(self, name))
        check_window(self.window)
        for choice in (self.keys, self.values):
            if not isinstance(choice, Choice):
                raise SettingError(
                    f"{choice!r} was to choose what stays of a cache",
                    "it is no choice",
                    "Give one, such as PerToken().",
                )
            step = max(TILE, choice.together)
            if self.chunk < 1 or self.chunk % step:
                raise SettingError(
                    f"chunks of {self.chunk} tokens were asked for",
                    f"{type(choice).__name__} is packed {step} tokens at a time",
                    f"Give a multiple of {step}.",
                )

    def behind(self, tokens: Tensor) -> Tensor:
        """How many tokens are packed once there are so many."""
        return behind(tokens, self.window, self.chunk)

    def begin(self) -> "Past":
        """A past with nothing in it."""
        return Past(self)

    def as_decoded(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, prefill: int
    ) -> Tensor:
        """What each token of a text would have got, had it been decoded."""
        from secateur.cache.attention import attend_as_decoded

        return attend_as_decoded(query, keys, values, mask, scaling, self, prefill)


def behind(tokens: Tensor, window: int, chunk: int) -> Tensor:
    """Of so many tokens, how many have left the window, in whole chunks."""
    return ((tokens - window) // chunk * chunk).clamp(min=0)


def check_share(name: str, value: float) -> None:
    """Raise SettingError for a sparsity that cannot be."""
    if not 0 <= value < 1:
        raise SettingError(
            f"{name} {value} was asked for",
            "a sparsity is the fraction removed, in [0, 1)",
            "Give a fraction such as 0.7.",
        )


def check_window(window: int) -> None:
    """Raise SettingError for a window that cannot be."""
    if window < 0:
        raise SettingError(f"a window of {window} was asked for", "it is negative", "Give 0 or more tokens.")


class Past:
    """Keys and values so far: `packed`, and `keys` and `values` [batch, heads, tail, width] as they are."""

    def __init__(self, pruning: Pruning) -> None:
        self.pruning = pruning
        self.packed: BitmapKV | None = None
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._heard: dict[int, Tensor] = {}  # by the power at which a choice listens: [batch, heads, tail, width]

    @property
    def as_it_was(self) -> bool:
        """Whether nothing is gone yet, so that any attention can read it."""
        return self.packed is None

    @property
    def tokens(self) -> int:
        """How many there are, packed or not."""
        return self.behind + (0 if self.keys is None else self.keys.shape[2])

    @property
    def behind(self) -> int:
        """How many are packed."""
        return 0 if self.packed is None else self.packed.tokens

    @property
    def due(self) -> bool:
        """Whether a chunk of tokens has left the window and is not packed yet."""
        return self.tokens - self.behind >= self.pruning.window + self.pruning.chunk

    @property
    def listens(self) -> bool:
        """Whether what stays depends on the queries that tokens are asked by."""
        return bool(self.pruning.keys.listens or self.pruning.values.listens)

    @property
    def tail(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the tokens that are as they were; there is one at least once attention asks."""
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    @property
    def nbytes(self) -> int:
        """Bytes held, room for tokens to come among them."""
        held = (self.keys, self.values, *self._heard.values())
        tail = sum(t.untyped_storage().nbytes() for t in held if t is not None)
        return tail + (0 if self.packed is None else self.packed.nbytes)

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values of every token, zeros where elements are gone."""
        if self.packed is None:
            return self.tail
        (keys, values), (newest_keys, newest_values) = self.packed.dense(), self.tail
        return torch.cat([keys, newest_keys], 2), torch.cat([values, newest_values], 2)

    def attend(self, query: Tensor, mask: Tensor | None, scaling: float) -> Tensor:
        """The newest tokens' query [batch, query heads, new, width] against the whole past -> the same shape."""
        from secateur.cache.attention import attend

        return attend(query, self, mask, scaling)

    def append_(self, keys: Tensor, values: Tensor) -> None:
        """Take in new tokens [batch, heads, new, width] as they are."""
        self.keys = keys if self.keys is None else torch.cat([self.keys, keys], 2)
        self.values = values if self.values is None else torch.cat([self.values, values], 2)

    def settle_(self, query: Tensor | None) -> None:
        """After attention: what has left the window is pruned and packed, each token once.

        `query` [batch, query heads, new, width] are the queries the tokens of this step were asked by; where nothing
        listens, none are needed.
        """
        if not self.listens and not self.due:
            return
        (whole_keys, whole_values), rule = self.tail, self.pruning
        first = query is not None and self.packed is None and 1 < query.shape[2] == whole_keys.shape[2]
        powers = {rule.keys.listens, rule.values.listens} - {0}
        for power in powers:
            assert query is not None, "something listens"
            self._listen_(query, first, power)
        leaving = int(rule.behind(torch.tensor(self.tokens))) - self.behind
        if leaving > 0:
            asked = {}
            for power in powers:
                # Of a prompt the last queries speak for all: the earlier ones ask about what is not kept for long.
                assert query is not None, "something listens"
                newest = heard_by(query[:, :, -max(1, rule.window) :], whole_keys.shape[1], power)
                asked[power] = newest.sum(2, keepdim=True) if first else self._heard[power][:, :, :leaving]
            keys, values = whole_keys[:, :, :leaving], whole_values[:, :, :leaving]
            more = pack(
                keys,
                values,
                rule.keys.select(keys, rule.key_sparsity, asked.get(rule.keys.listens)),
                rule.values.select(values, rule.value_sparsity, asked.get(rule.values.listens)),
            )
            if self.packed is None:
                self.packed = more
            else:
                self.packed.append_(more)
            # Clones, so that what has left does not stay in memory behind a view.
            self.keys, self.values = whole_keys[:, :, leaving:].clone(), whole_values[:, :, leaving:].clone()
            self._heard = {power: heard[:, :, leaving:].clone() for power, heard in self._heard.items()}

    def _listen_(self, query: Tensor, first: bool, power: int) -> None:
        batch, heads, tail, width = self.tail[0].shape
        new = query.shape[2]
        heard = torch.zeros(batch, heads, tail, width, device=query.device)
        if power in self._heard:
            heard[:, :, : self._heard[power].shape[2]] = self._heard[power]
        if not first:
            loud = heard_by(query, heads, power)
            later = loud.flip(2).cumsum(2).flip(2)  # a token hears the queries from its own on
            heard[:, :, : tail - new] += later[:, :, :1]
            heard[:, :, tail - new :] += later
        self._heard[power] = heard

    def keep_(self, tokens: int) -> None:
        """Forget the newest, so that there are so many; those that are packed stay."""
        left = tokens - self.behind
        self.keys, self.values = (t[:, :, :left] for t in self.tail)
        self._heard = {power: heard[:, :, :left] for power, heard in self._heard.items()}

    def select_(self, rows: Tensor) -> None:
        """Keep other rows of the batch."""
        if self.keys is None or self.values is None:
            return
        self.keys = self.keys.index_select(0, rows.to(self.keys.device))
        self.values = self.values.index_select(0, rows.to(self.values.device))
        self._heard = {p: heard.index_select(0, rows.to(heard.device)) for p, heard in self._heard.items()}
        self.packed = None if self.packed is None else self.packed.select(rows)


def heard_by(query: Tensor, heads: int, power: int) -> Tensor:
    """How loud queries [batch, query heads, tokens, width] are to each head of the cache: |query|^power over its group.

    [batch, heads, tokens, width]
    """
    loud = query.detach().float().abs().pow(power)
    return loud.unflatten(1, (heads, -1)).sum(2)  # type: ignore[no-untyped-call]  # torch has no types for it
