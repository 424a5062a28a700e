"""A key-value cache that is pruned as text grows: tokens behind a window keep their largest elements, packed.

    with sparse_cache(model, 0.7):
        model.generate(**inputs)

`evicting_cache` forgets whole tokens instead, which is what others do. `SparseCache` is the same as a module of the
model, so that it can be an edit, saved and loaded.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn

from secateur.axes.cached import Anything, Channels, Choice, HeavyHitters, Newest, OutputAware, PerChannel, PerToken
from secateur.cache.evicting import Eviction
from secateur.cache.past import Past, Pruning
from secateur.edit import replacement
from secateur.errors import ModelError

__all__ = [
    "Anything",
    "Channels",
    "Choice",
    "Eviction",
    "HeavyHitters",
    "Newest",
    "OutputAware",
    "Past",
    "PerChannel",
    "PerToken",
    "Pruning",
    "SparseCache",
    "evicting_cache",
    "sparse_cache",
]


@replacement
class SparseCache(nn.Module):
    """The pruning of a model's cache, as a module it carries: whatever cache a run begins with is pruned as it fills.

    A forward pass that is given no cache is computed as if each of its tokens had been decoded with one, after the
    first `prefill`, so that a perplexity is that of the pruned cache; `in_use`, as the prompt it would be.
    """

    def __init__(self, prefill: int = 0, pruning: Pruning | Eviction | str | None = None) -> None:
        super().__init__()
        self.prefill = prefill
        self.pruning: Pruning | Eviction = _rule(pruning) if isinstance(pruning, str) else pruning or Pruning()
        self._joined: list[Any] = []
        self._config: Any = None
        self._before: str | None = None
        self._in_use = False

    def settings(self) -> dict[str, Any]:
        """What builds it again."""
        from secateur.axes import text_of

        return {"prefill": self.prefill, "pruning": text_of(self.pruning)}

    def join_(self, model: nn.Module) -> None:
        """Begin to prune a model's cache.

        Raises ModelError for a model whose attention cannot read one, and for one whose cache is pruned already.
        """
        from secateur.cache.layers import ATTENTION

        config: Any = getattr(model, "config", None)
        text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else None
        if text is None or not getattr(model, "_supports_attention_backend", False) or not _causal(model):
            raise ModelError(
                f"the cache of {type(model).__name__} was to be pruned",
                "it is not a language model of transformers whose attention can be exchanged",
                "Give a causal model such as Llama, Mistral or Qwen.",
            )
        if text._attn_implementation == ATTENTION:  # two rules for one cache: the first would hold, and nothing say so
            raise ModelError(
                f"the cache of {type(model).__name__} was to be pruned",
                "it is pruned already, by a block that is not left yet or by an edit the model carries",
                "Leave that first, or give it the settings that are wanted.",
            )
        self._config, self._before = text, text._attn_implementation
        text._attn_implementation = ATTENTION
        self._joined = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, with_kwargs=True, always_call=True),
        ]

    def leave_(self) -> None:
        """Let the model be as it was."""
        for hook in self._joined:
            hook.remove()
        if self._config is not None:
            self._config._attn_implementation = self._before
        self._joined, self._config = [], None

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """While it lasts, a pass that is given no cache is what it is to a user: a prompt, read as it is."""
        before, self._in_use = self._in_use, True
        try:
            yield
        finally:
            self._in_use = before

    def _begin(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        from transformers import DynamicCache

        from secateur.cache.layers import ATTENTION, PASS, prune_

        if self._config._attn_implementation != ATTENTION:
            raise ModelError(
                f"a pruned cache of {type(model).__name__} was to be read",
                f"its attention was set to {self._config._attn_implementation} since, which cannot read one",
                "Set it before the cache is pruned, or leave it.",
            )
        cache = given.get("past_key_values")
        if cache is None and given.get("use_cache"):
            cache = given["past_key_values"] = DynamicCache(config=self._config)
        if cache is None and not self._in_use:
            PASS.decoded = (self.pruning, self.prefill)
            given["use_cache"] = False
        elif cache is not None:
            prune_(cache, self.pruning)
        PASS.reads = True
        return args, given

    def _end(self, model: nn.Module, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
        from secateur.cache.layers import PASS, check_read

        PASS.decoded, PASS.reads = None, False
        if output is not None and given.get("past_key_values") is not None:
            check_read(given["past_key_values"], model)


@contextmanager
def sparse_cache(model: nn.Module, sparsity: float = 0.7, **settings: Any) -> Iterator[SparseCache]:
    """While it lasts, tokens behind the window lose this share of each key and value.

    `settings` are those of `Pruning`: another `key_sparsity` or `value_sparsity`, `window`, `chunk`, and what chooses,
    `keys` and `values`. Raises ModelError for a model whose attention cannot read such a cache.
    """
    with _joined(model, replace(Pruning(key_sparsity=sparsity, value_sparsity=sparsity), **settings)) as cache:
        yield cache


@contextmanager
def evicting_cache(model: nn.Module, sparsity: float = 0.7, **settings: Any) -> Iterator[SparseCache]:
    """While it lasts, each head forgets this share of the tokens behind the window, whole.

    `settings` are those of `Eviction`: `window`, `chunk`, and `by`, which ranks tokens. Positions stay as they were.
    Raises ModelError as `sparse_cache` does.
    """
    with _joined(model, Eviction(sparsity, **settings)) as cache:
        yield cache


@contextmanager
def _joined(model: nn.Module, pruning: Pruning | Eviction) -> Iterator[SparseCache]:
    cache = SparseCache(pruning=pruning)
    cache.join_(model)
    try:
        yield cache
    finally:
        cache.leave_()


def _rule(text: str) -> Any:
    """What is pruned by its text, as a saved edit has it."""
    from secateur.axes import part_of, words
    from secateur.cache import evicting, past

    return part_of(text, words(past, evicting))


def _causal(model: nn.Module) -> bool:
    return hasattr(model, "generate") and "CausalLM" in type(model).__name__
