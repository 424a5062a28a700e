"""Mustafar: of what a language model remembers of a token, the largest elements are enough once it is no longer new.

Joo, Hosseini, Hadidi, Asgari. "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference."
2025. arXiv:2505.22913, sections 2 and 3. No weight is touched: keys (after rotary embedding) and values of a token
lose their smallest elements when the token leaves the window of the newest, and are packed to a bit an element and
what is left; attention reads the packed form. The prompt is read with everything as it is.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes.cached import Choice, PerToken, kept
from secateur.cache import Pruning, SparseCache
from secateur.edit import Replace, apply_
from secateur.formats.bitmap_kv import TILE
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.task import Task


@dataclass(frozen=True, kw_only=True)
class Mustafar(Method):
    """Prune the key-value cache as text grows. Weights, and the tokens of the window, stay as they are."""

    sparsity: float = 0.7  # of each key and value behind the window
    key_sparsity: float | None = None  # of keys, where they differ
    value_sparsity: float | None = None  # of values, where they differ
    window: int = 32  # the newest tokens, which stay as they are
    chunk: int = 32  # tokens pruned and packed at a time; the authors' kernel takes 256
    keys: Choice = PerToken()  # output-aware, per-channel, and channels (ThinK) are the paper's rivals
    values: Choice = PerToken()
    prefill: int = 0  # tokens of each text that count as its prompt when quality is measured

    card: ClassVar = Card(
        13,
        "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference",
        arxiv="2505.22913",
        year=2025,
        when="at inference",
        granularity=("cache",),
        families=("decoder", "moe"),
        axes="criterion pattern format",
        criterion=("magnitude",),
        tasks=("language modelling",),
        allocation=("uniform",),
        reports="LongBench average of Llama-3-8B-Instruct 43.19 dense, 40.96 with 70 % of keys and values gone; whole "
        "channels by ThinK 26.55 with 70 % of keys alone. The cache takes 45 % of its bytes, up to 2.23 times the "
        "tokens a second.",
        checked="tests/methods/test_mustafar.py::test_pruned_attention_is_that_of_the_masked_cache",
        differs=(
            "Exactly floor(s d) elements of a vector go, ties by place; the authors' code takes one fewer.",
            "What is left is not padded, and where a tile begins is not stored, since all tiles keep equally many.",
            "Channels (ThinK) are chosen anew for every chunk, which is kinder to it than once for all.",
        ),
    )
    tiny: ClassVar = {"window": 4}

    def budget(self) -> Budget | None:
        """None: no weight goes."""
        return None

    def check(self) -> None:
        """Raise SettingError for sparsities, windows or chunks that cannot be."""
        check_sparsity(self.sparsity)
        self.pruning()

    def pruning(self) -> Pruning:
        """The settings as the cache takes them."""
        return Pruning(
            key_sparsity=self.sparsity if self.key_sparsity is None else self.key_sparsity,
            value_sparsity=self.sparsity if self.value_sparsity is None else self.value_sparsity,
            window=self.window,
            chunk=self.chunk,
            keys=self.keys,
            values=self.values,
        )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        rule = self.pruning()
        edits = apply_(model, [Replace("sparse_cache", SparseCache(self.prefill, rule))])
        config = model.config.get_text_config(decoder=True)  # type: ignore[union-attr, operator]
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        each = torch.empty((), dtype=next(model.parameters()).dtype).element_size()
        left = token_bytes(width, rule, each) / (2 * width * each)
        return Outcome(
            model,
            edits,
            notes=[
                f"No weight was removed. Of the key-value cache, tokens behind the newest {self.window} keep "
                f"{kept(width, rule.key_sparsity)} of {width} elements of each key and "
                f"{kept(width, rule.value_sparsity)} of each value: {left:.1%} of their bytes.",
                "Quality is measured as if each token had been decoded with the pruned cache"
                + (f", after a prompt of {self.prefill}." if self.prefill else "."),
                "Work and time are those of a prompt, which is read as it is; what pruning saves is in decoding.",
                "secateur.load opens it with the cache pruned; stock loaders open the weights alone, for which "
                "secateur.sparse_cache does the same.",
            ],
        )


def token_bytes(width: int, rule: Pruning, itemsize: int) -> float:
    """Bytes a packed token takes in one head: what is left of its key and value, and a bit for each element."""
    bits = width / 8 + -(-width // TILE) * TILE / 8
    return (kept(width, rule.key_sparsity) + kept(width, rule.value_sparsity)) * itemsize + bits
