"""Mustafar: SmolLM2-135M's perplexity with a pruned cache, against whole channels, whole tokens, and chance."""

from functools import lru_cache

import torch

from claims.harness import Claim, Expectation, Settings
from claims.wanda import smollm2
from secateur.axes.cached import (
    Anything,
    Channels,
    Choice,
    HeavyHitters,
    Newest,
    OutputAware,
    PerChannel,
    PerToken,
    Ranking,
    kept,
)
from secateur.cache import Eviction, Pruning, evicting_cache, sparse_cache
from secateur.methods.mustafar import token_bytes
from secateur.tasks import wikitext2

CHOICES: dict[str, tuple[Choice, Choice]] = {
    "mustafar": (PerToken(), PerToken()),
    "output-aware": (OutputAware(), PerToken()),
    "per-channel": (PerChannel(), PerChannel()),
    "think": (Channels(), Channels()),
    "random": (Anything(), Anything()),
}
EVICTED: dict[str, Ranking] = {"heavy-hitters": HeavyHitters(), "newest": Newest()}


@lru_cache(maxsize=1)
def model() -> torch.nn.Module:
    """In bfloat16, as its cache would be."""
    return smollm2().model.to(torch.bfloat16)


@lru_cache(maxsize=1)
def text(window: int) -> torch.Tensor:
    """The test text in tokens, one after another."""
    return wikitext2(tokenizer=smollm2().tokenizer, window=window, seed=0).ids["test"].flatten()


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, sparsities = condition.partition("@")
    prefill, length = settings["prefill"], settings["window"]
    ids = text(length)
    # Each seed reads other windows of the text: where they begin is the only thing that is drawn.
    start = torch.randint(length, (1,), generator=torch.Generator().manual_seed(seed)).item()
    each = (len(ids) - start) // length
    chosen = torch.randperm(each, generator=torch.Generator().manual_seed(seed))[: settings["windows"]]
    windows = ids[start : start + each * length].reshape(each, length)[chosen]
    with torch.no_grad():
        if kind == "dense":
            return {"perplexity": perplexity(windows, prefill), "bytes": 1.0}
        key, _, value = sparsities.partition("+")
        if kind in EVICTED:
            share = gone_at_equal_bytes(Pruning(float(key), float(value)))
            with evicting_cache(model(), share, window=settings["recent"], by=EVICTED[kind]) as cache:
                cache.prefill = prefill
                return {"perplexity": perplexity(windows, prefill), "bytes": share_of_bytes(cache.pruning, length)}
        keys, values = CHOICES[kind]
        more = {"key_sparsity": float(key), "value_sparsity": float(value), "keys": keys, "values": values}
        with sparse_cache(model(), window=settings["recent"], **more) as cache:
            cache.prefill = prefill
            return {"perplexity": perplexity(windows, prefill), "bytes": share_of_bytes(cache.pruning, length)}


def perplexity(windows: torch.Tensor, prefill: int) -> float:
    """Of the tokens behind the prompt."""
    lost = 0.0
    for ids in windows.split(4):
        logits = model()(ids, logits_to_keep=ids.shape[1] - prefill + 1).logits[:, :-1].float()
        lost += float(
            torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, prefill:].flatten(), reduction="sum")
        )
    return float(torch.tensor(lost / windows[:, prefill:].numel()).exp())


def width() -> int:
    """Of a head."""
    return int(model().config.hidden_size // model().config.num_attention_heads)


def gone_at_equal_bytes(pruning: Pruning) -> float:
    """The share of whole tokens to forget, so that the others take the bytes that all of them take packed."""
    return 1 - token_bytes(width(), pruning, 2) / (2 * width() * 2)


def share_of_bytes(pruning: Pruning | Eviction, tokens: int) -> float:
    """Bytes that keys and values of one layer really take, over those of the dense cache; not what tokens are ranked
    by, and where they stood."""
    heads = model().config.num_key_value_heads
    noise = torch.randn(2, 1, heads, tokens, width(), generator=torch.Generator().manual_seed(0)).bfloat16()
    if isinstance(pruning, Eviction):
        behind = (tokens - pruning.window) // pruning.chunk * pruning.chunk
        return (kept(behind, pruning.sparsity) + tokens - behind) / tokens
    past = pruning.begin()
    past.append_(*noise)
    past.settle_(torch.zeros(1, model().config.num_attention_heads, tokens, width()))
    heard = sum(t.numel() for t in past._heard.values()) * 4
    return (past.nbytes - heard) / (noise.numel() * 2)


def beats(left: str, right: str, says: str, margin: float = 1.0, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="mustafar",
    number=13,
    says="Of each key and value behind a window of 32 tokens 70 % of the elements can go: LongBench of "
    "Llama-3-8B-Instruct 43.19 dense, 42.84 with 50 % of keys, 41.55 with 70 % of keys, 40.96 with 70 % of both, where "
    "whole channels (ThinK) leave 38.53 and 26.55 with 50 and 70 % of keys; the cache takes 45 % of its bytes.",
    source="arXiv:2505.22913, abstract and tables (by way of a public note)",
    here="SmolLM2-135M-Instruct in bfloat16, WikiText-2 test: prompts of 384 tokens, 128 more read with the pruned "
    "cache, 16 windows that each seed draws; heads are 64 wide. Bytes are those of a packed cache of 512 tokens over "
    "those of the dense one, window and all. Against them, eviction of whole tokens that takes the same bytes: each "
    "head keeps those that got most attention so far (H2O), or the newest and four sinks (StreamingLLM).",
    conditions=(
        "dense",
        "mustafar@0.5+0",
        "mustafar@0.7+0",
        "mustafar@0+0.7",
        "mustafar@0.5+0.5",
        "mustafar@0.7+0.7",
        "mustafar@0.9+0.9",
        "output-aware@0.7+0.7",
        "per-channel@0.7+0.7",
        "think@0.5+0",
        "think@0.7+0",
        "think@0.5+0.5",
        "think@0.7+0.7",
        "random@0.7+0.7",
        "heavy-hitters@0.5+0.5",
        "heavy-hitters@0.7+0.7",
        "newest@0.7+0.7",
    ),
    settings={"prefill": 384, "window": 512, "windows": 16, "recent": 32},
    large={"windows": 280},
    expects=(
        beats("mustafar@0.5+0.5", "dense", "Half of keys and values cost at most a fiftieth", 1 / 1.02),
        beats("mustafar@0.7+0.7", "dense", "70 % of both cost at most a tenth", 1 / 1.1),
        beats("mustafar@0.7+0", "think@0.7+0", "At 70 % of keys whole channels are far worse", 1.5),
        beats("mustafar@0.7+0.7", "think@0.7+0.7", "At 70 % of both as well", 1.5),
        beats("mustafar@0.7+0.7", "random@0.7+0.7", "Chance is far worse", 1.5),
        beats("mustafar@0+0.7", "mustafar@0.7+0", "Values bear it better than keys", central=False),
        beats("mustafar@0.7+0.7", "per-channel@0.7+0.7", "Each token's largest beat each channel's", central=False),
        beats("mustafar@0.5+0.5", "heavy-hitters@0.5+0.5", "Half of each beats H2O at the same bytes", central=False),
        beats("mustafar@0.7+0.7", "heavy-hitters@0.7+0.7", "70 % of each as well", central=False),
        beats("mustafar@0.7+0.7", "newest@0.7+0.7", "And it beats the newest and sinks", central=False),
        Expectation(
            "70 % of both take less than 45 % of the bytes", "mustafar@0.7+0.7", 0.45, "bytes", "lower", exact=True
        ),
    ),
)
