"""Time and memory of pruning itself: Wanda and SparseGPT here against the published formulas done plainly.

    python benchmarks/pruning.py [--samples 8] [--repeats 3] [--threads 1]

Each side prunes the same SmolLM2-135M on the same windows, in turn, and the masks are compared. Memory is the most
that is held above what the model itself takes, for which the allocator is told to give large pieces back at once:
it would otherwise keep them, for either side, by what went before. A second table grows the width of a 12-block model.
Writes results/pruning.json, from which docs/pruning-speed.md is made.
"""

import argparse
import copy
import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from secateur.edit import Edit, Mask
from secateur.method import Method
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.outcome import about_machine, about_versions, now, write_text
from secateur.task import Batch

HERE = Path(__file__).resolve().parent
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"  # of the GNU C library: pieces above it are given back when they are freed
RESULT = HERE / "results" / "pruning.json"
PAGE = HERE.parent / "docs" / "pruning-speed.md"


class Windows:
    """A task of token windows only: what pruning asks of the world."""

    name, seed, metric, higher_is_better, clients = "windows", 0, "perplexity", False, ()

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids
        self.example = Batch((ids[:1],))

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> list[Batch]:
        return [Batch((row.unsqueeze(0),)) for row in self.ids[:n]]

    def fingerprint(self) -> str:
        return "windows"


# The published formulas, as their authors' scripts go about it: a hook on every matrix, a full sort, and for SparseGPT
# a factor, an inverse, a factor of that, and a loop over the columns.


def inputs_of_first(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], dict[str, object]]:
    caught: list[Tensor] = []
    rest: dict[str, object] = {}

    class Caught(Exception):
        pass

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        caught.append(args[0])
        rest.update(kwargs)
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for row in ids:
        try:
            model(row.unsqueeze(0), use_cache=False)
        except Caught:
            pass
    handle.remove()
    return caught, rest


def plain_prune(model: nn.Module, ids: Tensor, start: Callable, add: Callable, finish: Callable) -> None:
    with torch.no_grad():
        xs, kwargs = inputs_of_first(model, ids)
        for block in model.model.layers:
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            state = {n: start(m) for n, m in linears.items()}
            hooks = [
                m.register_forward_pre_hook(lambda _, args, n=n: add(state[n], args[0].reshape(-1, args[0].shape[-1])))
                for n, m in linears.items()
            ]
            for x in xs:
                block(x, **kwargs)
            for handle in hooks:
                handle.remove()
            for name, linear in linears.items():
                finish(linear, state[name])
            xs = [block(x, **kwargs) for x in xs]


def plain_wanda(model: nn.Module, ids: Tensor) -> None:
    def add(state: dict[str, Tensor], x: Tensor) -> None:
        count = state["count"]
        state["row"] *= count / (count + 1)
        state["count"] = count + 1
        state["row"] += torch.norm(x.float().t(), p=2, dim=1) ** 2 / (count + 1)

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        score = linear.weight.abs() * state["row"].sqrt().reshape(1, -1)
        order = torch.sort(score, dim=-1, stable=True).indices
        gone = torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, : score.shape[1] // 2], True)
        linear.weight[gone] = 0

    plain_prune(model, ids, lambda m: {"row": torch.zeros(m.in_features), "count": 0}, add, finish)


def plain_sweep(w: Tensor, h: Tensor) -> Tensor:
    """A matrix [out, in] at 50 % given its damped-to-be gram h, which is changed."""
    w = w.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for a in range(0, columns, 128):
        b = min(a + 128, columns)
        w1, u1 = w[:, a:b].clone(), u[a:b, a:b]
        q1, e1 = torch.zeros_like(w1), torch.zeros_like(w1)
        score = w1**2 / u1.diagonal().reshape(1, -1) ** 2
        order = torch.sort(score.flatten(), stable=True).indices
        gone = torch.zeros(score.numel(), dtype=torch.bool).scatter_(0, order[: score.numel() // 2], True)
        gone = gone.reshape(score.shape)
        for i in range(b - a):
            column, d = w1[:, i], u1[i, i]
            q = column.clone()
            q[gone[:, i]] = 0
            q1[:, i] = q
            e = (column - q) / d
            w1[:, i:] -= e.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
            e1[:, i] = e
        w[:, a:b] = q1
        w[:, b:] -= e1.matmul(u[a:b, b:])
    return w


def plain_sparsegpt(model: nn.Module, ids: Tensor) -> None:
    def add(state: dict[str, Tensor], x: Tensor) -> None:
        count = state["count"]
        state["h"] *= count / (count + 1)
        state["count"] = count + 1
        x = (2 / (count + 1)) ** 0.5 * x.t()
        state["h"] += x.matmul(x.t())

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        linear.weight.copy_(plain_sweep(linear.weight, state["h"]))

    def start(linear: nn.Linear) -> dict[str, object]:
        return {"h": torch.zeros(linear.in_features, linear.in_features), "count": 0}

    plain_prune(model, ids, start, add, finish)


def ours(method: Method) -> Callable[[nn.Module, Tensor], list[Edit]]:
    def go(model: nn.Module, ids: Tensor) -> list[Edit]:
        return method.run(model, Windows(ids)).edits

    return go


def peak_above(action: Callable[[], object]) -> tuple[float, int, object]:
    """Seconds, the most memory held above the start in bytes, and what the action gave."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before would otherwise hide what is taken now
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to what is held now
    start, clock = _held("VmRSS"), time.perf_counter()
    found = action()
    return time.perf_counter() - clock, _held("VmHWM") - start, found


def zeros(model: nn.Module) -> dict[str, Tensor]:
    """Which weights of the blocks are left: the choice, as both sides leave it in the model."""
    return {n: p.detach() != 0 for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2}


def _held(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def side_by_side(model: nn.Module, ids: Tensor, repeats: int) -> list[dict[str, object]]:
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    activations = ids.numel() * model.config.hidden_size * 4
    rows = []
    for name, first, second in (
        ("wanda", ours(Wanda(samples=len(ids))), plain_wanda),
        ("sparsegpt", ours(SparseGPT(samples=len(ids))), plain_sparsegpt),
    ):
        times: tuple[list[float], list[float]] = ([], [])
        peaks: tuple[list[int], list[int]] = ([], [])
        masks: list[dict[str, Tensor]] = [{}, {}]
        record = 0
        for _ in range(repeats):
            for side, run in enumerate((first, second)):
                work = copy.deepcopy(model)
                seconds, peak, found = peak_above(lambda run=run, work=work: run(work, ids))
                times[side].append(seconds)
                peaks[side].append(peak)
                masks[side] = zeros(work)
                if side == 0:  # what a run gives back, one bit a weight, is held to the end
                    record = sum(-(-e.site.units // 8) for e in found if isinstance(e, Mask))
                del found
        same = [float((masks[0][k] == masks[1][k]).float().mean()) for k in masks[0]]
        ratio = statistics.median(b / a for a, b in zip(*times, strict=True))
        rows.append(
            {
                "method": name,
                "speed-up": ratio,
                "seconds": statistics.median(times[0]),
                "seconds plain": statistics.median(times[1]),
                "mask agreement": statistics.fmean(same),
                "in first block": statistics.fmean(s for k, s in zip(masks[0], same, strict=True) if ".0." in k),
                "extra memory": statistics.median(peaks[0]),
                "masks": record,
                "extra memory plain": statistics.median(peaks[1]),
                "block and activations": block + activations,
            }
        )
    return rows


def growth(widths: tuple[int, ...]) -> list[dict[str, object]]:
    """Extra memory on a 12-block model as it gets wider."""
    from transformers import LlamaConfig, LlamaForCausalLM

    rows = []
    for width in widths:
        config = LlamaConfig(
            hidden_size=width, intermediate_size=3 * width, num_hidden_layers=12, num_attention_heads=8, vocab_size=256
        )
        model = LlamaForCausalLM(config).eval()
        ids = torch.randint(0, 256, (16, 256), generator=torch.Generator().manual_seed(0))
        block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
        for method in (Wanda(samples=16), SparseGPT(samples=16)):
            work = copy.deepcopy(model)
            _, peak, _ = peak_above(lambda m=method, w=work: ours(m)(w, ids))
            rows.append(
                {
                    "width": width,
                    "method": method.name,
                    "model": 12 * block,
                    "block": block,
                    "activations": ids.numel() * width * 4,
                    "extra memory": peak,
                }
            )
    return rows


def page(found: dict[str, object]) -> str:
    """The tables as Markdown."""
    mib = 1 << 20
    lines = [
        "# How fast pruning itself is",
        "",
        "Written by `python benchmarks/pruning.py`. Medians of runs in turn; a speed-up above 1 is ours. Ours gives "
        "back the masks it chose, a bit a weight; the plain formulas leave zeros and no record.",
        "",
        f"{found['about']}",
        "",
        "| method | speed-up over the plain formulas | seconds, plain | mask agreement | in the first block "
        "| extra memory, plain (MiB) | of it the masks given back (MiB) | one block and its activations (MiB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["side by side"]:
        lines.append(
            f"| {row['method']} | {row['speed-up']:.2f} | {row['seconds']:.1f}, {row['seconds plain']:.1f} "
            f"| {row['mask agreement']:.4f} | {row['in first block']:.6f} "
            f"| {row['extra memory'] / mib:.0f}, {row['extra memory plain'] / mib:.0f} "
            f"| {row['masks'] / mib:.0f} | {row['block and activations'] / mib:.0f} |"
        )
    lines += [
        "",
        "A model of 12 blocks, growing in width:",
        "",
        "| width | method | all blocks (MiB) | one block (MiB) | activations (MiB) | extra memory (MiB) |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["growth"]:
        sizes = [row[k] / mib for k in ("model", "block", "activations", "extra memory")]
        lines.append(f"| {row['width']} | {row['method']} | " + " | ".join(f"{s:.0f}" for s in sizes) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    if os.environ.get(ALLOCATOR) is None:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, ALLOCATOR: str(1 << 20)})
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from secateur.models import open_model
    from secateur.tasks import python_docs

    opened = open_model("smollm2")
    task = python_docs(opened.tokenizer, window=asked.window)
    ids = torch.cat([b.inputs[0] for b in task.batches("calibration", asked.samples)])
    found = {
        "created": now(),
        "settings": vars(asked),
        "machine": about_machine(),
        "versions": about_versions(),
        "side by side": side_by_side(opened.model, ids, asked.repeats),
        "growth": growth((256, 512, 1024)),
    }
    machine = found["machine"]
    found["about"] = (
        f"SmolLM2-135M-Instruct in float32, {asked.samples} windows of {asked.window} tokens, "
        f"{asked.threads} thread(s), {asked.repeats} repeats, on {machine['processor']}, {found['created']}."
    )
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(found, indent=1) + "\n")
    write_text(PAGE, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
