"""Choosing and mending, the parts that pruning spends its time in, against the published formulas done plainly.

    python -m benchmarks.selection [--size 4096] [--rounds 5]

Plainly is as the authors' scripts do it: a full sort and a scatter for rows, a loop over groups with topk for N:M, a
full sort for one threshold, two factors, an inverse and a loop over columns for SparseGPT, topk and a scatter for the
tokens of a cache. Both sides run in turn on one thread, and its processor time counts, which other work on the machine
disturbs least; medians. Writes results/selection.json, from which
docs/selection-speed.md is made.
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import kept
from benchmarks.plain import plain_sweep
from secateur import kernels
from secateur.axes import NM, ObsSweep, keep_top
from secateur.axes.cached import PerToken
from secateur.evidence import add_gram_
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "selection.json"
PAGE = HERE.parent / "docs" / "selection-speed.md"

Pair = tuple[Callable[[], Tensor], Callable[[], Tensor]]  # plainly, here


def rows(size: int) -> Pair:
    score = torch.rand(size, size, generator=torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        order = torch.sort(score, dim=-1, stable=True).indices
        gone = torch.zeros_like(score, dtype=torch.bool)
        return ~gone.scatter_(1, order[:, : size // 2], True)

    return plain, lambda: keep_top(score, size - size // 2)


def groups(size: int) -> Pair:
    score = torch.rand(size, size, generator=torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        gone = torch.zeros_like(score, dtype=torch.bool)
        for at in range(0, size, 4):
            gone.scatter_(1, at + torch.topk(score[:, at : at + 4], 2, dim=1, largest=False).indices, True)
        return ~gone

    return plain, lambda: NM(2, 4).select(score, score.numel() // 2)


def threshold(size: int) -> Pair:
    score = torch.rand(size * size, generator=torch.Generator().manual_seed(0))

    def plain() -> Tensor:
        return score > torch.sort(score).values[len(score) // 2 - 1]

    return plain, lambda: keep_top(score, len(score) - len(score) // 2)


def layer(outputs: int, inputs: int) -> Pair:
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=made)
    x = torch.randn(2 * inputs, inputs, generator=made)
    gram = x.T @ x / len(x)
    gram.diagonal().add_(0)
    solver = ObsSweep()
    return (
        lambda: plain_sweep(weight, gram.clone()) != 0,
        lambda: solver.sweep(weight, gram.clone(), weight.numel() // 2)[0],
    )


def gram(tokens: int, width: int, dtype: torch.dtype) -> Pair:
    x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)
    mean, total = torch.zeros(width, width), torch.zeros(width, width, dtype=torch.float64)
    scale = math.sqrt(2 / tokens)

    def plain() -> Tensor:  # of a first batch, whose mean is that of all
        mean.mul_(0)
        some = x.T.float() * scale
        return mean.add_(some @ some.T)

    def here() -> Tensor:  # the sum, below the diagonal
        total.zero_()
        add_gram_(total, x)
        return total

    return plain, here


def apart(mean: Tensor, total: Tensor, tokens: int) -> float:
    """How far a sum below the diagonal is from twice the mean, as a share of it."""
    wanted = mean.tril().double()
    return float((total.tril() * (2 / tokens) - wanted).norm() / wanted.norm())


def tokens(heads: int, context: int, width: int) -> Pair:
    x = torch.randn(1, heads, context, width, generator=torch.Generator().manual_seed(0)).bfloat16()

    def plain() -> Tensor:
        top = x.abs().topk(width // 2, dim=-1).indices
        return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, top, True)

    return plain, lambda: PerToken().select(x, 0.5)


def agree(plain: Tensor, here: Tensor) -> dict[str, float]:
    """The share of choices that are the same."""
    return {"agree": float((plain == here).float().mean())}


def compare(
    name: str, pair: Pair, rounds: int, alike: Callable[[Tensor, Tensor], dict[str, float]] = agree
) -> dict[str, object]:
    plain, here = pair
    like = alike(plain(), here())  # and both are warm
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for spent, call in zip(times, pair, strict=True):
            start = time.thread_time()
            call()
            spent.append(time.thread_time() - start)
    before, after = (1e3 * statistics.median(t) for t in times)
    print(f"{name}: {before:.1f} ms plainly, {after:.1f} ms here, {before / after:.1f} times", flush=True)
    return {"name": name, "plainly": before, "here": after, **like}


def page(found: dict) -> str:
    """The table as Markdown."""
    lines = [
        "# How fast choosing and mending are",
        "",
        "Written by `python -m benchmarks.selection`. The steps that pruning spends its time in, against the "
        "published formulas done plainly in torch, as the authors' scripts go about them; medians of processor time, "
        "over rounds in which both took turns. Where two scores are equal the plain way may choose the other; sums of "
        "floats, which come in another order, are apart by a share of the whole.",
        "",
        str(found["about"]),
        "",
        "| step | plainly (ms) | here (ms) | times as fast | same choices |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        ratio = row["plainly"] / row["here"]
        like = f"{row['agree']:.4%}" if "agree" in row else f"apart by {row['apart']:.0e}"
        lines.append(f"| {row['name']} | {row['plainly']:.4g} | {row['here']:.4g} | {ratio:.1f} | {like} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    n = asked.size
    cases = {
        f"half of each row, {n} x {n}": rows(n),
        f"2:4, {n} x {n}": groups(n),
        f"one threshold, {n * n:,} scores": threshold(n),
        "SparseGPT, a layer of 1536 x 576": layer(1536, 576),
        "SparseGPT, a layer of 576 x 1536": layer(576, 1536),
        "half of each token of a cache, 4096 x 8 x 128": tokens(8, 4096, 128),
    }
    if n >= 4096:
        cases[f"SparseGPT, a layer of {n} x {n}"] = layer(n, n)
    measured = [compare(name, pair, asked.rounds) for name, pair in cases.items()]
    for dtype in (torch.bfloat16, torch.float32):
        name = f"Hessian, {n} tokens of {n} inputs in {str(dtype).removeprefix('torch.')}"
        measured.append(
            compare(name, gram(n, n, dtype), asked.rounds, lambda mean, total: {"apart": apart(mean, total, n)})
        )
    machine = about_machine()
    found = {
        "created": now(),
        "machine": machine,
        "versions": about_versions(),
        "about": f"One thread, kernels for {kernels.level()}, on {kept.processor(machine)}.",
        "rows": measured,
    }
    result, place = kept.here(RESULT, PAGE)
    kept.write(result, found)
    kept.write_page(place, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
