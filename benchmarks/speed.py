"""Products with a sparse weight: secateur's formats against the fastest dense way torch has, in the same run.

    python -m benchmarks.speed [--only decode] [--rounds 5] [--threads 1]

Weights are cold: each call takes another copy of them, more in all than the caches hold. Every way is called once
before any is called again. With one thread the time is the processor's for that thread: what other programs take of it
is not counted, though they disturb the caches; with more it is that of the clock. There are two dense peers:
`F.linear`, as a model calls it, and the weight prepacked for oneDNN, as a frozen compiled model holds it; 8-bit values
have torch's product with dense 8-bit weights besides. Packed weights lie in large pages of memory, as `accelerate`
leaves them, so both are timed with their weight there too.
Writes results/speed.json, cell by cell, from which docs/speed.md is made; a row that was not measured is not there.
"""

import argparse
import ctypes
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import kept
from secateur import kernels
from secateur.accelerate import memory_speed
from secateur.formats import Bitmap, BitmapInt8, Format, GroupCols, KBlocked, Packed, Sell8, SellBlocked, pages
from secateur.formats.pages import in_large_pages, settled
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "speed.json"
PAGE = HERE.parent / "docs" / "speed.md"

COLD = 2**29  # bytes of dense weights that are gone through
SMOLLM2 = [(576, 576), (192, 576), (192, 576), (576, 576), (1536, 576), (1536, 576), (576, 1536)] * 30 + [(49152, 576)]
"""The linear layers of SmolLM2-135M in the order in which a token meets them, [out, in]."""


@dataclass(frozen=True)
class Scenario:
    """A product to be timed: what is multiplied, at which sparsities, in which formats."""

    name: str
    title: str
    shapes: tuple[tuple[int, int], ...]  # one, of which there are copies, or all layers of a model
    rows: int
    dtype: torch.dtype
    sparsities: tuple[float, ...]
    formats: tuple[Format, ...]


SQUARE, LEVELS, BOTH = ((4096, 4096),), (0.5, 0.7, 0.8, 0.9), (Bitmap(), Sell8(), SellBlocked())
SINGLE, BLOCKS = (*LEVELS, 0.95), (GroupCols(1), KBlocked(128), KBlocked(256))
MANY = (Bitmap(), SellBlocked(), *BLOCKS[1:])
HALF = torch.bfloat16
LAYERS = "all linear layers of SmolLM2-135M, bfloat16, one token"
SCENARIOS = (
    Scenario("decode bf16", "4096x4096, bfloat16, 1 row", SQUARE, 1, HALF, LEVELS, (*BOTH, BitmapInt8())),
    Scenario("decode fp32", "4096x4096, float32, 1 row", SQUARE, 1, torch.float32, LEVELS, BOTH),
    Scenario("smollm2 bf16", LAYERS, tuple(SMOLLM2), 1, HALF, (0.5, 0.7), (Bitmap(), BitmapInt8())),
    Scenario(
        "batch bf16", "4096x4096, bfloat16, 16 rows", SQUARE, 16, HALF, LEVELS, (Bitmap(), *BLOCKS[1:], BitmapInt8())
    ),
    Scenario("spmm fp32", "4096x4096, float32, 256 rows", SQUARE, 256, torch.float32, SINGLE, BLOCKS),
    Scenario("small spmm fp32", "1024x1024, float32, 128 rows", ((1024, 1024),), 128, torch.float32, SINGLE, BLOCKS),
    Scenario("prefill bf16", "4096x4096, bfloat16, 512 rows", SQUARE, 512, HALF, (0.5, 0.7, 0.9), MANY),
)


LARGE, READY_LARGE = "F.linear, large pages", "prepacked, large pages"
MADV_COLLAPSE = 25  # of Linux from 6.1 on: pages that are in use become large ones


def prepacked(weight: Tensor, rows: int) -> Tensor:
    """A weight in oneDNN's own order, for `product` with so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def in_place(ready: Tensor) -> bool:
    """Whether the memory of a prepacked weight could be made large pages where it lies, all but its ends."""
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is None:
        return False
    begin, size = torch.ops.mkldnn.data_ptr(ready), torch.ops.mkldnn._nbytes(ready)
    low, high = -(-begin // pages.PAGE) * pages.PAGE, (begin + size) // pages.PAGE * pages.PAGE
    where = ctypes.c_void_p(low), ctypes.c_size_t(high - low), MADV_COLLAPSE
    return high > low and any(not madvise(*where) for _ in range(3))  # it may be refused while memory is tidied


def product(x: Tensor, ready: Tensor) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, ready, None, "none", [], "")


def in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    scales = weight.abs().amax(1) / 127
    return (weight / scales.unsqueeze(1)).round().clamp(-127, 127).to(torch.int8), scales


def cell(at: Scenario, sparsity: float, rounds: int) -> dict[str, object]:
    """One scenario at one sparsity: seconds of each way, and the bytes of its weights."""
    made = torch.Generator().manual_seed(0)
    distinct = {}
    for shape in dict.fromkeys(at.shapes):
        weight = torch.randn(shape, generator=made).to(at.dtype)
        mask = torch.rand(shape, generator=made) >= sparsity
        distinct[shape] = weight * mask, [format.pack(weight, mask) for format in at.formats]
    x = {width: torch.randn(at.rows, width, generator=made).to(at.dtype) for _, width in distinct}
    size = sum(weight.numel() * weight.element_size() for weight in (distinct[s][0] for s in at.shapes))
    copies = max(1, -(-COLD // size)) if at.rows < 128 else 2  # with many rows arithmetic is the limit, not memory
    ways: dict[str, list[list[Callable[[], Tensor]]]] = {}
    in_large = True  # whether all prepacked weights could be moved
    for _ in range(copies):
        passes: dict[str, list[Callable[[], Tensor]]] = {}
        large = in_large_pages([distinct[shape][0].clone() for shape in at.shapes])
        copied = [
            Packed(one.format, one.shape, {k: v.clone() for k, v in one.tensors.items()})
            for shape in at.shapes
            for one in distinct[shape][1]
        ]
        apart = iter(settled(copied))  # as `accelerate` leaves them
        for shape, there in zip(at.shapes, large, strict=True):
            weight, packed = distinct[shape]
            own, given = weight.clone(), x[shape[1]]
            passes.setdefault("F.linear", []).append(lambda w=own, x=given: F.linear(x, w))
            passes.setdefault(LARGE, []).append(lambda w=there, x=given: F.linear(x, w))
            ready = prepacked(weight, at.rows)
            passes.setdefault("prepacked", []).append(lambda w=ready, x=given: product(x, w))
            again = prepacked(weight, at.rows)
            in_large = in_large and in_place(again)
            passes.setdefault(READY_LARGE, []).append(lambda w=again, x=given: product(x, w))
            if any(isinstance(format, BitmapInt8) for format in at.formats):
                eight, scales = in_eight_bits(weight)
                passes.setdefault("int8", []).append(
                    lambda w=eight, s=scales, x=given: torch.ops.aten._weight_int8pack_mm(x, w, s)
                )
            for _ in packed:
                mine = next(apart)
                passes.setdefault(mine.format.name, []).append(lambda p=mine, x=given: p.matmul(x))
        for name, calls in passes.items():
            ways.setdefault(name, []).append(calls)
    if not in_large:
        del ways[READY_LARGE]
    seconds = times(ways, rounds)
    nbytes = {format.name: sum(distinct[s][1][i].nbytes for s in at.shapes) for i, format in enumerate(at.formats)}
    return {
        "scenario": at.name,
        "sparsity": sparsity,
        "rows": at.rows,
        "copies": copies,
        "load": os.getloadavg()[0],
        "bytes": {"dense": size, **nbytes},
        "median": {name: statistics.median(kept) for name, kept in seconds.items()},
        "quintile": {name: statistics.quantiles(kept, n=5)[0] for name, kept in seconds.items()},
        "calls": len(seconds["F.linear"]),
    }


def times(ways: dict[str, list[list[Callable[[], Tensor]]]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every pass, all ways in turn; the first round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    for turn in range(rounds + 1):
        for copy in range(len(next(iter(ways.values())))):
            for name, passes in ways.items():
                start = clock()
                for call in passes[copy]:
                    call()
                if turn:
                    seconds[name].append(clock() - start)
    return seconds


def page(found: dict[str, object]) -> str:
    """The tables as Markdown."""
    pages_of = ""
    if any(LARGE in row["median"] for row in found["cells"]):
        pages_of = (
            "Packed weights lie in large pages of memory (`formats/pages.py`), where torch does not put dense ones: "
            "`large pages` are those of the peer. "
        )
    lines = [
        "# How fast a sparse weight multiplies",
        "",
        "Written by `python -m benchmarks.speed`. How many times as fast as the dense peer of the same run: the ratio "
        "of medians, and in brackets that of lower quintiles, which other work on the machine disturbs less. With one "
        "thread the time is the processor's for it, so that what other programs take is not counted. Weights come from "
        "memory, another copy each call. `prepacked` is oneDNN's dense product with a weight in its own order, "
        f"`F.linear` what a model calls, `int8` torch's with dense 8-bit weights. {pages_of}What was not "
        "measured is not here.",
        "",
        f"{found['about']}",
    ]
    for at in SCENARIOS:
        cells = [row for row in found["cells"] if row["scenario"] == at.name]
        if not cells:
            continue
        ways = ("prepacked", READY_LARGE, "F.linear", LARGE, "int8")
        peers = [name for name in ways if all(name in row["median"] for row in cells)]
        lines += ["", f"## {at.title[0].upper()}{at.title[1:]}", "", "| sparsity | format | bytes of dense | "]
        lines[-1] += " | ".join(f"over {peer}" for peer in peers) + " | of memory's speed |"
        lines.append("| --- | --- | --- |" + " --- |" * (len(peers) + 1))
        for row in sorted(cells, key=lambda row: row["sparsity"]):
            for name in (format.name for format in at.formats if format.name in row["median"]):
                middle, low = row["median"], row["quintile"]
                gains = [f"{middle[peer] / middle[name]:.2f} ({low[peer] / low[name]:.2f})" for peer in peers]
                speed = found["memory"] and row["bytes"][name] / low[name] / found["memory"]
                lines.append(
                    f"| {row['sparsity']:.0%} | {name} | {row['bytes'][name] / row['bytes']['dense']:.2f} | "
                    + " | ".join(gains)
                    + f" | {f'{speed:.0%}' if speed else ''} |"
                )
    lines += [
        "",
        "A share of the memory's speed is of the lower quintile. That speed is of four streams of reads side "
        "by side, the most memory gives here; what is left in the caches can get above 100 %.",
    ]
    return "\n".join(lines) + "\n"


def about(found: dict[str, object], threads: int, rounds: int) -> str:
    machine = found["machine"]
    memory = f", which reads {found['memory'] / 1e9:.1f} GB/s" if found["memory"] else ""
    loads = [row["load"] for row in found["cells"]]
    return (
        f"{kept.processor(machine)}, {machine['cores']} cores{memory}; {threads} thread(s), "
        f"kernels for {found['level']}, torch {found['versions']['torch']}, {rounds} rounds, "
        f"load average {min(loads):.0f} to {max(loads):.0f}, "
        f"{found['created']}."
    )


def measured(only: Sequence[Scenario], rounds: int, threads: int) -> None:
    """Measure the scenarios, writing after each cell; cells of others stay as they were."""
    result, place = kept.here(RESULT, PAGE)
    found = kept.read(result, {"cells": []})
    found |= {
        "created": now(),
        "settings": {"rounds": rounds, "threads": threads, "cold": COLD},
        "machine": about_machine(),
        "versions": about_versions(),
        "level": kernels.level(),
        "memory": memory_speed(),
    }
    for at in only:
        for sparsity in at.sparsities:
            row = cell(at, sparsity, rounds)
            same = (row["scenario"], row["sparsity"])
            found["cells"] = [*(r for r in found["cells"] if (r["scenario"], r["sparsity"]) != same), row]
            found["about"] = about(found, threads, rounds)
            kept.write(result, found)
            shown = {k: f"{v * 1e3:.3f}" for k, v in row["quintile"].items()}
            print(f"{at.name} {sparsity:.0%}: {shown} ms", flush=True)
    kept.write_page(place, page(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="scenarios whose name begins so")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with torch.no_grad():
        measured([at for at in SCENARIOS if at.name.startswith(asked.only)], asked.rounds, asked.threads)


if __name__ == "__main__":
    main()
