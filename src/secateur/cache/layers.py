"""The cache of transformers with a pruned past in it: what `generate` fills and attention reads."""

import threading
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from secateur.cache.evicting import Eviction
from secateur.cache.past import Past, Pruning
from secateur.errors import ModelError
from secateur.formats.decoder import Room

ATTENTION = "secateur"  # the name under which transformers knows the attention below


class Pass(threading.local):
    """What is known of this thread's pass through a model."""

    reads = False  # it is of a model whose attention is the one below
    decoded: tuple[Pruning | Eviction, int] | None = None  # what it is computed as, given no cache; None: as it is


PASS = Pass()


class PrunedLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]  # transformers has no types
    """One layer of a cache, whose tokens are pruned or forgotten as they leave the window."""

    is_sliding = False

    def __init__(self, pruning: Pruning | Eviction) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor here
        self.past = pruning.begin()
        self.waiting = False  # what was handed out has not been attended to by the attention that can read it

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing to be made in advance."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take in new tokens [batch, heads, new, width]; what is returned is read by `attention` alone."""
        if not PASS.reads:
            raise ModelError(
                "a pruned cache was to be read",
                "the attention of this model sees the newest tokens alone",
                "Use it with the model it was pruned in, while its cache is pruned.",
            )
        self.is_initialized, self.waiting = True, True
        self.past.append_(key_states, value_states)
        self.keys, self.values = keys, values = self.past.tail
        shown = keys.view_as(keys)
        shown.past = self  # type: ignore[attr-defined]  # tensors take any
        return shown, values

    def in_one_call(self) -> "PackedPast | None":
        """What blocks that run in one call read of it, with room for a token; None where it has to be asked."""
        past = self.past
        if not PASS.reads or self.waiting or type(past) is not Past or past.packed is None or past.listens:
            return None
        return PackedPast(past, Room.of(past, past.pruning.window + past.pruning.chunk))

    def attended(self, query: Tensor) -> None:
        """The tokens handed out have been attended to."""
        self.past.settle_(query)
        self.settled()

    def settled(self) -> None:
        """The past is as it stays until the next token."""
        self.waiting = False
        self.keys, self.values = self.past.keys, self.past.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many tokens there will be, and which is the first."""
        return self.past.tokens + query_length, 0

    def get_seq_length(self) -> int:
        """How many tokens there are, packed or not."""
        return self.past.tokens

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.past, self.keys, self.values = self.past.pruning.begin(), None, None
        self.is_initialized = self.waiting = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the beams that went on."""
        self.past.select_(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows of the batch."""
        self.past.select_(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.past.keys is not None:
            self.past.select_(torch.arange(self.past.keys.shape[0]).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, by minus their number. Raises ModelError for tokens that are packed."""
        if tokens_to_remove > 0:
            raise ModelError(
                f"a pruned cache was to be cut by {tokens_to_remove}",
                "that was how many tokens are left, in older releases of transformers",
                "Give minus the number of tokens that are to go.",
            )
        gone, tail = abs(tokens_to_remove), self.past.tokens - self.past.behind
        if gone > tail:
            raise ModelError(
                f"the newest {gone} tokens of a pruned cache were to be taken back",
                f"the newest {tail} are as they were, and the rest is packed",
                "Give a window as long as what may be taken back.",
            )
        if gone:
            self.past.keep_(self.past.tokens - gone)


@dataclass(frozen=True)
class PackedPast:
    """The past of a layer whose tokens are packed, but for the newest, which have room behind them."""

    past: Past
    room: Room

    @property
    def held(self) -> tuple[Tensor, Tensor]:
        """Keys and values of the newest."""
        return self.past.tail

    @property
    def tokens(self) -> int:
        """How many there are, packed or not."""
        return self.past.tokens

    def pointers(self) -> tuple[int, ...]:
        """What `PAST` and `PACKED` of `formats.decoder` say of it."""
        packed, tail = self.past.packed, self.room.tokens + 1
        assert packed is not None, "or it would not be in one call"
        sizes = packed.tiles, packed.key_bits.shape[2], packed.key_values.shape[3], packed.value_values.shape[3]
        tensors = packed.key_bits, packed.key_values, packed.value_bits, packed.value_values
        return *self.room.pointers(), *sizes, tail, self.room.keys.shape[2], *(t.data_ptr() for t in tensors)

    def grown(self, layer: PrunedLayer) -> None:
        """A token is added, as the kernel wrote it, and attended to."""
        layer.is_initialized = True
        self.room.grown(self.past)
        self.past.settle_(None)
        layer.settled()


def check_read(cache: Cache, model: nn.Module) -> None:
    """After a pass: raise ModelError where a pruned layer was not read by the attention below."""
    if any(isinstance(layer, PrunedLayer) and layer.waiting for layer in cache.layers):
        raise ModelError(
            f"a pruned cache of {type(model).__name__} was to be read",
            "it computes attention itself, and would see the newest tokens alone",
            "Use a model whose attention goes through transformers' attention interface.",
        )


def prune_(cache: Cache, pruning: Pruning | Eviction) -> None:
    """Make the layers of an empty cache pruned ones; those of a sliding window, and of no attention, stay."""
    if any(isinstance(layer, PrunedLayer) for layer in cache.layers):
        return
    if cache.get_seq_length() > 0:
        raise ModelError(
            "a cache was to be pruned",
            f"it holds {cache.get_seq_length()} tokens that another run put there",
            "Begin with an empty cache, or let generate make one.",
        )
    if cache.layers and all(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise ModelError(
            f"a {type(cache).__name__} was to be pruned",
            "every layer has a sliding window, which holds no more than that as it is",
            "Leave the cache of this model as it is.",
        )
    if getattr(cache, "offloading", False) or not (
        cache.layer_class_to_replicate is DynamicLayer or any(type(layer) is DynamicLayer for layer in cache.layers)
    ):
        raise ModelError(
            f"a {type(cache).__name__} was to be pruned",
            "only layers that grow with the text can be (transformers' DynamicCache, not offloaded)",
            "Leave cache_implementation out.",
        )
    cache.layers = [PrunedLayer(pruning) if type(layer) is DynamicLayer else layer for layer in cache.layers]
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = lambda: PrunedLayer(pruning)  # type: ignore[assignment]  # declared as a class


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention for transformers' interface: query [batch, heads, new, width] -> [batch, new, heads, width]."""
    layer: PrunedLayer | None = getattr(key, "past", None)
    odd = [name for name in ("softcap", "s_aux", "position_bias") if more.get(name) is not None]
    if odd:  # of layers with a sliding window too: torch's attention would leave out what it does not know
        raise _unread(module, ", ".join(odd))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    decoded = PASS.decoded
    if layer is None and (decoded is None or more.get("sliding_window")):  # a sliding window stays as it is
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, **more
        )
        return found
    if more.get("sliding_window"):
        raise _unread(module, "a sliding window")
    if layer is None:
        assert decoded is not None
        pruning, prefill = decoded
        out = pruning.as_decoded(query, key, value, attention_mask, scale, prefill)
    elif layer.past.as_it_was:  # the prompt sees itself as it is
        out = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **more)[0]
        layer.attended(query)
        return out, None
    else:
        out = layer.past.attend(query, attention_mask, scale)
    if layer is not None:
        layer.attended(query)
    return out.transpose(1, 2).contiguous(), None


def _unread(module: nn.Module, asked: str) -> ModelError:
    return ModelError(
        f"attention of {type(module).__name__} was to read a pruned cache",
        f"it asks for {asked}, which that cannot do",
        "Leave the cache of this model as it is.",
    )


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
