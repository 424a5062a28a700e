"""Where the time of each method goes: forward passes, gradients, statistics, selection, update; and what it holds.

    python -m benchmarks.methods [--samples 16] [--window 128] [--methods wanda,gblm] [--threads 1]

Each method prunes SmolLM2-135M in a process of its own, on the same windows. A clock stands at every border (a call of
a module, a product seen by the recorder, a score, a choice, an edit), and a moment counts for the innermost of them.
Memory is the most that is held above the opened model. Writes results/methods.json, from which docs/methods-speed.md
is made; `--methods` measures some again and keeps the rest.
"""

import argparse
import ctypes
import gc
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch

from benchmarks import kept
from secateur import edit as edits
from secateur.axes import Rank, patterns, words
from secateur.evidence import Recorder
from secateur.method import load
from secateur.outcome import about_machine, about_versions, now
from secateur.recipe import build

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "methods.json"
PAGE = HERE.parent / "docs" / "methods-speed.md"
ALLOCATOR = "MALLOC_MMAP_THRESHOLD_"  # of the GNU C library: pieces above it are given back when they are freed
PHASES = ("forward", "gradients", "statistics", "selection", "update", "rest")

# What is not its default: half of the weights, heads and neurons where that is what goes, or as the method counts;
# and where a method would train or search for long, a short course of it, which the page names.
SETTINGS: dict[str, dict[str, Any]] = {
    "magnitude": {},
    "random": {},
    "wanda": {},
    "sparsegpt": {},
    "dsnot": {},
    "gblm": {},
    "ecoflap": {"sparsity": 0.5, "allocation": "ecoflap(steepness='zeroth-order(samples=4, draws=1)')"},
    "icbs": {"steps": 10, "least": 0, "every": 0},
    "slicegpt": {"sparsity": 0.25},
    "flap": {"sparsity": 0.2},
    "llm_pruner": {"sparsity": 0.2},
    "cfsp": {"sparsity": 0.2},
    "adapt_pruner": {"sparsity": 0.2, "iterations": 5},
    "shortgpt": {"sparsity": 0.2},
    "perp": {"steps": 10},
}


class Clock:
    """Seconds by phase; a moment counts for the phase that was entered last."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(PHASES, 0.0)
        self._stack = ["rest"]
        self._since = time.perf_counter()

    def _turn(self) -> None:
        at = time.perf_counter()
        self.seconds[self._stack[-1]] += at - self._since
        self._since = at

    def around(self, phase: str, action: Callable[..., Any]) -> Callable[..., Any]:
        """The action, with its time counted for a phase; calls of a phase within itself cost nothing more."""

        @wraps(action)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._stack[-1] == phase:
                return action(*args, **kwargs)
            self._turn()
            self._stack.append(phase)
            try:
                return action(*args, **kwargs)
            finally:
                self._turn()
                self._stack.pop()

        return timed

    def watch(self) -> None:
        """Put the clock at the borders, in this process."""
        # Clocks are put round what is there already, by its own name: no type allows that.
        torch.nn.Module.__call__ = self.around("forward", torch.nn.Module.__call__)  # type: ignore[method-assign]
        torch.autograd.backward = self.around("gradients", torch.autograd.backward)  # type: ignore[assignment]
        torch.autograd.grad = self.around("gradients", torch.autograd.grad)  # type: ignore[assignment]
        Recorder._note = self.around("statistics", Recorder._note)  # type: ignore[method-assign]
        Recorder._flush = self.around("statistics", Recorder._flush)  # type: ignore[method-assign]
        for name in ("PerMatrix", "PerRow", "PerSlab", "NM", "Blocks"):
            kind = getattr(patterns, name)
            kind.select = self.around("selection", kind.select)
        for part in words().values():
            for action, phase in (("score", "selection"), ("refine", "selection"), ("solve", "update")):
                if action in vars(part) and part is not Rank:
                    setattr(part, action, self.around(phase, vars(part)[action]))
        for kind in (edits.Mask, edits.Update, edits.Rotate, edits.Remove, edits.Merge, edits.Replace):
            kind.apply_ = self.around("update", kind.apply_)  # type: ignore[method-assign, attr-defined]

    def total(self) -> dict[str, float]:
        """Seconds by phase until now."""
        self._turn()
        return dict(self.seconds)


def measure(name: str, samples: int, window: int, threads: int) -> dict[str, Any]:
    """One method, in this process."""
    from secateur.models import open_model
    from secateur.tasks import open_task

    torch.set_num_threads(threads)
    opened = open_model("smollm2")
    task = open_task("python-docs", tokenizer=opened.tokenizer, window=window)
    kind = load(name)
    given = dict(SETTINGS[name])
    if "samples" in kind.__dataclass_fields__:  # type: ignore[attr-defined]  # methods are dataclasses, which `load` does not say
        given["samples"] = samples
    method = build(kind, given)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    held = _held("VmRSS")
    clock = Clock()
    clock.watch()
    method.check()
    method.run(opened.model, task)
    seconds = clock.total()
    return {
        "method": name,
        "settings": given,
        "seconds": sum(seconds.values()),
        "phases": seconds,
        "extra memory": _held("VmHWM") - held,
    }


def _held(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# Where the time of each method goes",
        "",
        "Written by `python -m benchmarks.methods`. Each method in a process of its own; seconds of one run on a "
        "shared machine, so that shares say more than sums. Scoring and refining count as selection, the sweep of "
        "SparseGPT as update but for its choices, and what a method works out by itself as rest. Rows "
        "may be of several runs.",
        "",
        str(found["about"]),
        "",
        "| method | settings | seconds | " + " | ".join(PHASES) + " | extra memory (MiB) |",
        "| --- | --- | --- | " + "--- | " * (len(PHASES) + 1),
    ]
    for row in found["rows"]:
        given = ", ".join(f"{k}={v}" for k, v in row["settings"].items())
        shares = " | ".join(f"{row['phases'][p] / max(row['seconds'], 1e-9):.0%}" for p in PHASES)
        lines.append(
            f"| {row['method']} | {given} | {row['seconds']:.1f} | {shares} | {row['extra memory'] / (1 << 20):.0f} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", default=",".join(SETTINGS))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        print(json.dumps(measure(asked.one, asked.samples, asked.window, asked.threads)))
        return
    result, place = kept.here(RESULT, PAGE)
    rows = {row["method"]: row for row in kept.read(result, {"rows": []})["rows"]}
    for name in asked.methods.split(","):
        importlib.import_module(f"secateur.methods.{name}")  # a wrong name, before anything is run
        command = [sys.executable, "-m", "benchmarks.methods", "--one", name]
        for option in ("samples", "window", "threads"):
            command += [f"--{option}", str(getattr(asked, option))]
        done = subprocess.run(
            command,
            cwd=HERE.parent,
            env={**os.environ, ALLOCATOR: str(1 << 20)},
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            print(f"{name}: {(done.stderr.strip() or 'it was ended').splitlines()[-1]}", file=sys.stderr)
            continue
        rows[name] = json.loads(done.stdout.strip().splitlines()[-1])
        print(f"{name:14s} {rows[name]['seconds']:8.1f} s  {rows[name]['extra memory'] >> 20} MiB", flush=True)
        keep(rows, asked)
    print(place.read_text(encoding="utf-8"))


def keep(rows: dict[str, dict[str, Any]], asked: argparse.Namespace) -> None:
    """Write what there is, so that a run that is cut off loses nothing."""
    machine = about_machine()
    found = {
        "created": now(),
        "settings": {k: getattr(asked, k) for k in ("samples", "window", "threads")},
        "machine": machine,
        "versions": about_versions(),
        "about": f"SmolLM2-135M-Instruct in float32, {asked.samples} windows of {asked.window} tokens of Python's "
        f"documentation, {asked.threads} thread(s), on {machine['processor']}.",
        "rows": [rows[name] for name in SETTINGS if name in rows],
    }
    result, place = kept.here(RESULT, PAGE)
    kept.write(result, found)
    kept.write_page(place, page(found))


if __name__ == "__main__":
    main()
