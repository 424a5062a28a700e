"""Time and memory of pruning itself: methods here against their published formulas done plainly (plain.py).

    python -m benchmarks.pruning [--samples 16] [--repeats 3] [--threads 1] [--methods wanda,flap]

Each side prunes the same SmolLM2-135M on the same windows, in turn, and the masks are compared. Memory is the most
that is held above what the model itself takes, for which the allocator is told to give large pieces back at once:
it would otherwise keep them, for either side, by what went before. A second table grows the width of a 12-block model.
Writes results/pruning.json, from which docs/pruning-speed.md is made; `--methods` and `--samples`
measure some again, or for another number of windows, and keep the rest.
"""

import argparse
import copy
import ctypes
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import kept, plain
from secateur.axes import Gblm
from secateur.edit import Edit, Mask
from secateur.method import Method
from secateur.methods.dsnot import DSnoT
from secateur.methods.flap import FLAP
from secateur.methods.gblm import GBLMPruner
from secateur.methods.magnitude import Magnitude
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.outcome import about_machine, about_versions, now
from secateur.task import Batch

HERE = Path(__file__).resolve().parent
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"  # of the GNU C library: pieces above it are given back when they are freed
RESULT = HERE / "results" / "pruning.json"
PAGE = HERE.parent / "docs" / "pruning-speed.md"

Side = Callable[[nn.Module, Tensor], object]

# Ours with the settings of the plain formulas, for so many windows, and the plain formulas.
SIDES: dict[str, tuple[Callable[[int], Method], Side]] = {
    "magnitude": (lambda n: Magnitude(), plain.plain_magnitude),
    "wanda": (lambda n: Wanda(samples=n), plain.plain_wanda),
    "sparsegpt": (lambda n: SparseGPT(samples=n), plain.plain_sparsegpt),
    "gblm": (lambda n: GBLMPruner(samples=n, criterion=Gblm(alpha=100)), plain.plain_gblm),
    "dsnot": (lambda n: DSnoT(samples=n), plain.plain_dsnot),
    "flap": (lambda n: FLAP(samples=n), plain.plain_flap),
    "shortgpt": (lambda n: ShortGPT(samples=n, sparsity=0.2), plain.plain_shortgpt),
}


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

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross-entropy of the next token."""
        logits = batch.through(model).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.inputs[0][:, 1:].flatten())


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


def side_by_side(name: str, model: nn.Module, ids: Tensor, repeats: int) -> dict[str, object]:
    """One method and its plain formulas, in turn, on copies of a model."""
    block = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    kind, formulas = SIDES[name]
    times: tuple[list[float], list[float]] = ([], [])
    peaks: tuple[list[int], list[int]] = ([], [])
    masks: list[dict[str, Tensor]] = [{}, {}]
    left = [0, 0]
    record = 0
    for _ in range(repeats):
        for side, run in enumerate((ours(kind(len(ids))), formulas)):
            work = copy.deepcopy(model)
            seconds, peak, found = peak_above(lambda run=run, work=work: run(work, ids))
            times[side].append(seconds)
            peaks[side].append(peak)
            masks[side] = zeros(work)
            left[side] = sum(int(kept.sum()) for kept in masks[side].values())
            if side == 0:  # what a run gives back, one bit a weight, is held to the end
                record = sum(-(-e.site.units // 8) for e in found if isinstance(e, Mask))
            del found
    assert abs(left[0] - left[1]) < 0.01 * left[1], (name, left)  # both sides did as much
    shapes = [{k: m.shape for k, m in found.items()} for found in (*masks, zeros(model))]
    whole = shapes[0] == shapes[1] == shapes[2]
    same = [float((masks[0][k] == masks[1][k]).float().mean()) for k in masks[0]] if whole else []
    first = [s for k, s in zip(masks[0], same, strict=True) if ".0." in k] if same else []
    return {
        "method": name,
        "windows": len(ids),
        "speed-up": statistics.median(b / a for a, b in zip(*times, strict=True)),
        "seconds": statistics.median(times[0]),
        "seconds plain": statistics.median(times[1]),
        "mask agreement": statistics.fmean(same) if same else None,  # where whole structures went there is none
        "in first block": statistics.fmean(first) if first else None,
        "extra memory": statistics.median(peaks[0]),
        "masks": record,
        "extra memory plain": statistics.median(peaks[1]),
        "block and activations": block + ids.numel() * model.config.hidden_size * 4,
    }


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


def agreement(share: float | None, digits: int) -> str:
    return "structures" if share is None else f"{share:.{digits}f}"


def page(found: dict[str, object]) -> str:
    """The tables as Markdown."""
    mib = 1 << 20
    lines = [
        "# How fast pruning itself is",
        "",
        "Written by `python -m benchmarks.pruning`. Medians of runs in turn; a speed-up above 1 is ours. Ours gives "
        "back the masks it chose, a bit a weight; the plain formulas leave zeros and no record. FLAP here follows the "
        "graph of any model and tries its cut, which takes as long for one window as for its default of 1024; the "
        "plain formulas know a Llama's modules by name. The date is of the last run; rows that were not in it are of "
        "earlier ones.",
        "",
        f"{found['about']}",
        "",
        "| method | windows | speed-up over the plain formulas | seconds, plain | mask agreement | in the first block "
        "| extra memory, plain (MiB) | of it the masks given back (MiB) | one block and its activations (MiB) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["side by side"]:
        lines.append(
            f"| {row['method']} | {row['windows']} | {row['speed-up']:.2f} "
            f"| {row['seconds']:.1f}, {row['seconds plain']:.1f} "
            f"| {agreement(row['mask agreement'], 4)} | {agreement(row['in first block'], 6)} "
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
    parser.add_argument("--methods", default=",".join(SIDES))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    from secateur.models import open_model
    from secateur.tasks import python_docs

    opened = open_model("smollm2")
    task = python_docs(opened.tokenizer, window=asked.window)
    ids = torch.cat([b.inputs[0] for b in task.batches("calibration", asked.samples)])
    result, place = kept.here(RESULT, PAGE)
    before = kept.read(result, {})
    rows = {(row["method"], row["windows"]): row for row in before.get("side by side", [])}
    for name in asked.methods.split(","):
        rows[name, len(ids)] = row = side_by_side(name, opened.model, ids, asked.repeats)
        print(f"{name:12s} {row['speed-up']:.2f}", flush=True)
    found = {
        "created": now(),
        "settings": {k: v for k, v in vars(asked).items() if k != "methods"},
        "machine": about_machine(),
        "versions": about_versions(),
        "side by side": [rows[key] for key in sorted(rows, key=lambda key: (list(SIDES).index(key[0]), key[1]))],
        "growth": growth((256, 512, 1024)),
    }
    machine = found["machine"]
    found["about"] = (
        f"SmolLM2-135M-Instruct in float32, windows of {asked.window} tokens, "
        f"{asked.threads} thread(s), {asked.repeats} repeats, on {machine['processor']}, {found['created']}."
    )
    kept.write(result, found)
    kept.write_page(place, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
