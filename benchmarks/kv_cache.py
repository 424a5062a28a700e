"""Attention of one new token to a packed cache, against the best that torch has for the dense one; and the bytes.

    python benchmarks/kv_cache.py [--rounds 15] [--most 65536]

For each shape and context the candidates run in turn, so that what else the machine does hits all of them; the median
of the rounds counts, in processor time of the one thread. Peers: scaled_dot_product_attention with grouped queries,
the same with the queries of a head folded into its length, and two products with a softmax between. Writes
results/kv_cache.json, from which docs/kv-cache-speed.md is made.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from secateur import kernels
from secateur.axes.cached import PerToken
from secateur.cache import Past, Pruning
from secateur.cache.attention import attend
from secateur.outcome import about_machine, about_versions, now, write_text

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "kv_cache.json"
PAGE = HERE.parent / "docs" / "kv-cache-speed.md"
SHAPES = {"SmolLM2-135M": (3, 3, 64), "Llama-3-8B": (8, 4, 128), "multi-head": (8, 1, 128)}
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


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Attention to a pruned cache",
        "",
        "Written by `python benchmarks/kv_cache.py`. One new token attends to a context of one text in bfloat16; how "
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
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--most", type=int, default=65536, help="the longest context")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name, shape in SHAPES.items():
        for context in CONTEXTS:
            if context <= asked.most:
                rows.append({"name": name, "shape": shape, "context": context, **measure(shape, context, asked.rounds)})
                print(name, context, rows[-1]["milliseconds"], flush=True)
    machine = about_machine()
    found = {
        "created": now(),
        "machine": machine,
        "versions": about_versions(),
        "about": f"One thread, kernels for {kernels.level()}, on {machine['processor']}.",
        "rows": rows,
        "pruning": pruning_time(asked.rounds),
    }
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(found, indent=1) + "\n")
    write_text(PAGE, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
