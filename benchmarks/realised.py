"""How much of the theory arrives: the speed-up of a cut network over the work that was taken out of it.

    python -m benchmarks.realised [--only resnet20] [--turns 15] [--compiled]

Half of the multiply-adds go by SPA, and the cut network is timed against the dense one in turn, eagerly or under
torch.compile, on one thread, one example and 32 at a time. The realised share is the speed-up over the ratio of the
work: 1 is all of it. Times are the thread's own, and medians. What is measured joins what is in results/realised.json,
from which docs/realised-speed.md is made.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from secateur import Batch
from secateur.axes.allocations import Uniform
from secateur.methods.spa import Spa
from secateur.models import open_model
from secateur.outcome import about_machine, about_versions, count_flops, now
from secateur.tasks import open_task

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "realised.json"
PAGE = HERE.parent / "docs" / "realised-speed.md"
SPARSITY = 0.5  # of the multiply-adds
BATCHES = (1, 32)
NETWORKS = ("resnet20", "resnet56", "smollm2")
BLOCKS, TOKENS = 1, 32  # of SmolLM2: one block of 30, and a short prompt


def network(name: str) -> tuple[nn.Module, Any]:
    """A network and a task of its own."""
    opened = open_model(name)
    if name != "smollm2":
        return opened.model, open_task("cifar10", train_size=64, val_size=64, test_size=64)
    opened.model.model.layers = opened.model.model.layers[:BLOCKS]
    opened.model.config.num_hidden_layers = BLOCKS
    return opened.model, open_task("python-docs", tokenizer=opened.tokenizer, window=TOKENS)


def batch_of(name: str, size: int) -> Batch:
    draw = torch.Generator().manual_seed(0)
    if name == "smollm2":
        return Batch({"input_ids": torch.randint(1, 40_000, (size, TOKENS), generator=draw), "use_cache": False})
    return Batch((torch.randn(size, 3, 32, 32, generator=draw),))


@torch.no_grad()
def timed(dense: nn.Module, cut: nn.Module, batch: Batch, turns: int) -> tuple[list[float], list[float]]:
    """Milliseconds of both in turn, after three that warm up."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(turns + 3):
        for model, milliseconds in zip((dense, cut), times, strict=True):
            start = time.thread_time()
            batch.through(model)
            if turn >= 3:
                milliseconds.append((time.thread_time() - start) * 1e3)
    return times


def measure(names: list[str], turns: int, compiled: bool) -> list[dict[str, Any]]:
    found = []
    for name in names:
        dense, task = network(name)
        cut = Spa(sparsity=SPARSITY, of="flops", allocation=Uniform(), round_to=4).run(_copy(dense), task).model
        for size in BATCHES:
            batch = batch_of(name, size)
            work = (count_flops(dense, batch) or 0) / (count_flops(cut, batch) or 1)
            pair = (dense.eval(), cut.eval())
            if compiled:
                torch.compiler.reset()
                pair = (torch.compile(pair[0]), torch.compile(pair[1]))
            times = timed(*pair, batch, turns)
            before, after = (statistics.median(each) for each in times)
            ratios = sorted(a / b for a, b in zip(*times, strict=True))
            row = {
                "network": name, "mode": "compiled" if compiled else "eager", "batch": size, "dense_ms": before,
                "cut_ms": after, "work": work, "speedup": before / after, "realised": before / after / work,
                "quarters": [ratios[len(ratios) // 4], ratios[(3 * len(ratios)) // 4]], "turns": turns,
                "when": now(),
            }  # fmt: skip
            print(json.dumps(row), flush=True)
            found.append(row)
    return found


def _copy(model: nn.Module) -> nn.Module:
    import copy

    return copy.deepcopy(model)


def page(found: dict[str, Any]) -> str:
    lines = [
        "# How much of the theory arrives", "",
        "Written by `python -m benchmarks.realised`. About half of the multiply-adds of each network were taken out "
        "with whole channels and heads by SPA, the same share of every layer, in widths that are multiples of 4. The "
        "cut network was then timed against the dense one in turn. Work is how many times fewer multiply-adds there "
        "are, the speed-up how many times less the thread's own time was (medians; in brackets the quartiles of the "
        f"ratios), and realised is the second over the first. SmolLM2 is its first {BLOCKS} of 30 blocks with the "
        f"embedding and the head, which no cut makes smaller, over {TOKENS} tokens.", "",
        f"torch {found['versions']['torch']}, one thread, on {found['machine']['processor']}.", "",
        "| network | how | batch | dense, ms | cut, ms | work | speed-up | realised |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in found["rows"]:
        low, high = row["quarters"]
        lines.append(
            f"| {row['network']} | {row['mode']} | {row['batch']} | {row['dense_ms']:.2f} | {row['cut_ms']:.2f} | "
            f"{row['work']:.2f} | {row['speedup']:.2f} ({low:.2f} to {high:.2f}) | {row['realised']:.0%} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--compiled", action="store_true")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure([name for name in NETWORKS if given.only in name], given.turns, given.compiled)
    result, place = kept.here(RESULT, PAGE)
    known = kept.read(result, {"rows": []})["rows"]
    new = {(row["network"], row["mode"], row["batch"]): row for row in [*known, *rows]}
    order = sorted(new.values(), key=lambda row: (NETWORKS.index(row["network"]), row["mode"] != "eager", row["batch"]))
    found = {"versions": about_versions(), "machine": about_machine(), "rows": order}
    kept.write(result, found)
    kept.write_page(place, page(found))


if __name__ == "__main__":
    sys.exit(main())
