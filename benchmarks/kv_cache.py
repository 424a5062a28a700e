"""Attention of one new token to a packed cache, against the best that torch has for the dense one; `generate`; bytes.

    python -m benchmarks.kv_cache [--rounds 15] [--least 1024] [--most 65536] [--part attention] [--part generate]

For each shape and context the candidates run in turn, so that what else the machine does hits all of them; the median
of the rounds counts, in processor time of the one thread. Peers: scaled_dot_product_attention with grouped queries,
the same with the queries of a head folded into its length, and two products with a softmax between. For `generate`
the peer is what transformers does by itself. Writes results/kv_cache.json, from which docs/kv-cache-speed.md is made;
parts and contexts that are not asked for stay in it as they were.
"""

import argparse
import copy
import ctypes
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import kept
from secateur import kernels
from secateur.axes.cached import PerToken
from secateur.cache import Past, Pruning, sparse_cache
from secateur.cache.attention import attend
from secateur.cache.layers import prune_
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "kv_cache.json"
PAGE = HERE.parent / "docs" / "kv-cache-speed.md"
SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128), "Llama-3-70B": (8, 8, 128), "multi-head": (8, 1, 128)}
CONTEXTS = (1024, 4096, 16384, 65536)
SPARSITIES = (0.5, 0.7)


def peers(query: Tensor, keys: Tensor, values: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What a user of torch would call, by name."""
    heads, width = keys.shape[1], keys.shape[3]
    folded = query.reshape(1, heads, -1, width)

    def products() -> Tensor:
        return (folded @ keys.transpose(-1, -2) * width**-0.5).softmax(-1) @ values

    return {
        "sdpa": lambda: scaled_dot_product_attention(query, keys, values, enable_gqa=True),
        "sdpa, folded": lambda: scaled_dot_product_attention(folded, keys, values),
        "products": products,
    }


def measure(shape: tuple[int, int, int], context: int, rounds: int) -> dict[str, Any]:
    heads, group, width = shape
    made = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, heads, context, width, generator=made).bfloat16()
    query = torch.randn(1, heads * group, 1, width, generator=made).bfloat16()
    runs, held = peers(query, keys, values), {"dense": (keys.numel() + values.numel()) * 2}
    for sparsity in SPARSITIES:
        past = Past(Pruning(sparsity, sparsity, window=32))
        past.append_(keys, values)
        past.settle_(query.expand(-1, -1, 2, -1))
        runs[f"packed {sparsity:.0%}"] = lambda past=past: attend(query, past, None, width**-0.5)
        held[f"packed {sparsity:.0%}"] = past.nbytes
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, call in runs.items():
            start = time.thread_time()
            call()
            if turn:  # the first is to warm up
                times[name].append(time.thread_time() - start)
    return {"milliseconds": {n: 1e3 * statistics.median(t) for n, t in times.items()}, "bytes": held}


def pruning_time(rounds: int) -> dict[str, float]:
    """Choosing what stays of 4,096 tokens by 8 heads by 128: the exact choice here, and topk with a scatter."""
    x = torch.randn(1, 8, 4096, 128, generator=torch.Generator().manual_seed(0)).bfloat16()

    def plain() -> Tensor:
        top = x.abs().float().topk(64, dim=-1).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, top, True)

    runs = {"plain": plain, "here": lambda: PerToken().select(x, 0.5)}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, call in runs.items():
            start = time.thread_time()
            call()
            times[name].append(time.thread_time() - start)
    return {n: 1e3 * statistics.median(t) for n, t in times.items()}


def with_row(rows: list[dict[str, Any]], new: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows with one in the place of the last that was of its name and context."""
    where = {(row["name"], row["context"]): row for row in rows}
    return list({**where, (new["name"], new["context"]): new}.values())


def shaped(layers: int, hidden: int, heads: int, over: int, vocabulary: int, **more: Any) -> Any:
    """A decoder in bfloat16 with random weights: what they are does not change the time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "vocab_size": vocabulary, **more}
    counts = {"num_attention_heads": heads, "num_key_value_heads": over, "max_position_embeddings": 2**17}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, **counts, dtype=torch.bfloat16)).bfloat16().eval()


def smollm2() -> Any:
    """The sizes of SmolLM2-135M."""
    return shaped(30, 576, 9, 3, 49152, intermediate_size=1536, tie_word_embeddings=True)


def two_layers() -> Any:
    """Two layers with the attention of Llama-3-8B and little beside it."""
    return shaped(2, 1024, 32, 8, 1024, intermediate_size=2048, head_dim=128)


MODELS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "SmolLM2-135M": (smollm2, (1024, 4096, 8000)),
    "two layers, 32 heads over 8 of 128": (two_layers, (1024, 4096, 16384, 65536)),
}
PIECE = 4096  # tokens put into a cache at a time


def filled(model: Any, context: int, sparsity: float | None) -> Any:
    """A cache that holds so many tokens of noise in each layer: dense, or pruned and packed."""
    from transformers import DynamicCache

    config = model.config
    cache = DynamicCache(config=config)
    if sparsity is not None:
        prune_(cache, Pruning(sparsity, sparsity))
    heads = config.num_key_value_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layer, made = cache.layers[0], torch.Generator().manual_seed(0)
    for start in range(0, context, PIECE):
        size = (2, 1, heads, min(PIECE, context - start), width)
        keys, values = torch.randn(size, generator=made).bfloat16()
        if sparsity is None:
            layer.update(keys, values)
        else:
            layer.past.append_(keys, values)
            layer.attended(keys)
    layer.is_initialized = True
    cache.layers[1:] = [copy.deepcopy(layer) for _ in cache.layers[1:]]
    return cache


def held_by(cache: Any) -> int:
    """Bytes of keys and values, or of what is packed of them."""
    return sum(
        layer.past.nbytes if hasattr(layer, "past") else layer.keys.nbytes + layer.values.nbytes
        for layer in cache.layers
    )


def resident() -> int:
    """Bytes of this process that lie in memory."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system before it is counted
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def generating(model: Any, context: int, rounds: int, new: int = 6) -> dict[str, Any]:
    """Seconds a token of `generate` after a context, and the bytes of the cache, dense and pruned in turn."""
    kinds: dict[str, float | None] = {"dense": None, **{f"packed {s:.0%}": s for s in SPARSITIES}}
    caches, held, grown = {}, {}, {}
    for name, sparsity in kinds.items():
        before = resident()
        caches[name] = filled(model, context, sparsity)
        held[name], grown[name] = held_by(caches[name]), resident() - before
    times: dict[str, list[float]] = {name: [] for name in kinds}
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 0}

    def run(cache: Any) -> float:
        ids = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)
        start = time.thread_time()
        model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, **how)
        return (time.thread_time() - start) / new

    for turn in range(rounds + 1):
        for name, sparsity in kinds.items():
            if sparsity is None:
                taken = run(caches[name])
            else:
                with sparse_cache(model, sparsity):
                    taken = run(caches[name])
            if turn:
                times[name].append(taken)
    seconds = {n: statistics.median(t) for n, t in times.items()}
    return {"tokens_a_second": {n: 1 / s for n, s in seconds.items()}, "bytes": held, "resident": grown}


def generated(found: list[dict[str, Any]]) -> list[str]:
    """The table of `generate`."""
    lines = [
        "",
        "## Tokens a second of `generate`",
        "",
        "bfloat16, one text, a cache that already holds the context (noise: what stands in it does not change the "
        "time); processor time of the thread. Dense is the cache `generate` makes by itself, which is copied for each "
        "token: most of what the table above does not explain. Megabytes are those of the keys and values, and in "
        "brackets by how much the process really grew.",
        "",
        "| model | context | dense, tokens a second (MB) | "
        + " | ".join(f"packed {s:.0%} (MB) | times as fast" for s in SPARSITIES)
        + " |",
        "| --- | --- | --- | " + "--- | --- | " * len(SPARSITIES),
    ]
    for row in sorted(found, key=lambda row: (row["name"], row["context"])):
        speed = row["tokens_a_second"]

        def cell(kind: str, row: dict[str, Any] = row) -> str:
            grown = f" [{row['resident'][kind] / 1e6:.0f}]" if "resident" in row else ""
            return f"{row['tokens_a_second'][kind]:.3g} ({row['bytes'][kind] / 1e6:.0f}{grown})"

        cells = [f"{cell(f'packed {s:.0%}')} | {speed[f'packed {s:.0%}'] / speed['dense']:.2f}" for s in SPARSITIES]
        lines.append(f"| {row['name']} | {row['context']:,} | {cell('dense')} | {' | '.join(cells)} |")
    return lines


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Attention to a pruned cache",
        "",
        "Written by `python -m benchmarks.kv_cache`. One new token attends to a context of one text in bfloat16; how "
        "many times as fast as the best of torch's ways to do it with the dense cache, and how many times fewer bytes "
        "the cache takes. Medians of processor time, over rounds in which all took turns. With grouped queries, part "
        "of the gain is that the packed kernel reads each key once for all the queries of a head.",
        "",
        str(found["about"]),
        "",
        "| shape (heads, queries a head, width) | context | best of torch (ms) | "
        + " | ".join(f"packed {s:.0%}: times as fast | fewer bytes" for s in SPARSITIES)
        + " |",
        "| --- | --- | --- | " + "--- | --- | " * len(SPARSITIES),
    ]
    for row in found["rows"]:
        ms, held = row["milliseconds"], row["bytes"]
        best = min(v for n, v in ms.items() if not n.startswith("packed"))
        cells = [
            f"{best / ms[f'packed {s:.0%}']:.2f} | {held['dense'] / held[f'packed {s:.0%}']:.2f}" for s in SPARSITIES
        ]
        shape = f"{row['name']} ({', '.join(map(str, row['shape']))})"
        lines.append(f"| {shape} | {row['context']:,} | {best:.3g} | {' | '.join(cells)} |")
    ms = found["pruning"]
    lines += [
        "",
        f"Choosing the larger half of 4,096 tokens by 8 heads by 128: {ms['here']:.3g} ms here, exact with ties by "
        f"place, {ms['plain']:.3g} ms by topk and a scatter, {ms['plain'] / ms['here']:.2f} times as long.",
    ]
    if "generate" in found:
        lines += generated(found["generate"])
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=int, default=65536, help="the longest context")
    parser.add_argument("--least", type=int, default=0, help="the shortest")
    parser.add_argument("--part", action="append", choices=("attention", "generate"), help="both if not given")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    parts = asked.part or ["attention", "generate"]
    machine = about_machine()
    result, place = kept.here(RESULT, PAGE)
    found: dict[str, Any] = kept.read(result, {})
    found |= {
        "created": now(),
        "machine": machine,
        "versions": about_versions(),
        "about": f"One thread, kernels for {kernels.level()}, on {kept.processor(machine)}.",
    }
    if "attention" in parts:
        for name, shape in SHAPES.items():
            for context in (c for c in CONTEXTS if asked.least <= c <= asked.most):
                row = {"name": name, "shape": shape, "context": context, **measure(shape, context, asked.rounds)}
                print(name, context, row["milliseconds"], flush=True)
                found["rows"] = with_row(found.get("rows", []), row)
        found["pruning"] = pruning_time(asked.rounds)
    if "generate" in parts:
        for name, (make, contexts) in MODELS.items():
            chosen = [c for c in contexts if asked.least <= c <= asked.most]
            model = make() if chosen else None
            for context in chosen:
                row = {"name": name, "context": context, **generating(model, context, min(3, asked.rounds))}
                print(name, context, row, flush=True)
                found["generate"] = with_row(found.get("generate", []), row)
    kept.write(result, found)
    kept.write_page(place, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
