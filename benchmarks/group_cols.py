"""Products and convolutions whose groups of outputs share their columns, against the fastest dense way torch has.

    python -m benchmarks.group_cols [--rounds 5] [--only 1x1] [--node [--web FOLDER] | --aarch64]

Layers of MobileNet-v1 that look at one pixel, a product as a prompt has it, and 3x3 convolutions; masks are random, of
whole groups. One thread, whose processor time counts; every way is called once before any is called again, medians.
The dense ways are the convolution as a model calls it, with channels last, the product, and of a product oneDNN's with
a weight in its own order, whose columns are rows; and beside them the same kernel on a weight of which nothing is
removed, in groups of 8: a dense kernel of the same quality. With --node the WebAssembly build is timed in Node instead,
by the processor's time for that process, against itself on a whole weight and against onnxruntime-web, where FOLDER is
one that `npm install onnxruntime-web` ran in. With --aarch64 the NEON build runs under qemu-user, which tells nothing
of time: the instructions of a call are counted, by a plugin of qemu.
Writes results/group_cols.json, from which docs/group-cols-speed.md is made; what was not measured is not there.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import kept
from benchmarks.speed import prepacked, product
from secateur import kernels
from secateur.formats import GroupCols, Packed
from secateur.formats.conv import convolve
from secateur.formats.portable import AARCH64, WASM, compile_to, message
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "group_cols.json"
COUNTER = HERE / "instructions.c"
BENCH = HERE / "group_cols.mjs"
PAGE = HERE.parent / "docs" / "group-cols-speed.md"

ROWS = (1, 2, 4, 8)
SPARSITIES = (0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
LAYERS = {  # outputs, inputs, kernel, picture
    "1x1, 128x128, 56x56": (128, 128, 1, (56, 56)),
    "1x1, 256x256, 28x28": (256, 256, 1, (28, 28)),
    "1x1, 512x512, 14x14": (512, 512, 1, (14, 14)),
    "1x1, 1024x1024, 7x7": (1024, 1024, 1, (7, 7)),
    "product, 1024x1024, 128 columns": (1024, 1024, 1, (1, 128)),
    "3x3, 64x64, 56x56": (64, 64, 3, (56, 56)),
    "3x3, 128x128, 28x28": (128, 128, 3, (28, 28)),
    "3x3, 256x256, 14x14": (256, 256, 3, (14, 14)),
}
IN_NODE = ("1x1, 256x256, 28x28", "1x1, 512x512, 14x14", "product, 1024x1024, 128 columns")
ON_AARCH64 = {"1x1, 128x128, 28x28": (128, 128, 1, (28, 28)), "3x3, 64x64, 14x14": (64, 64, 3, (14, 14))}
"""Smaller than what is timed: instructions do not depend on caches, and emulation is slow."""

COUNTED = (0.3, 0.5, 0.7, 0.9)
NODE_GOALS = {0.5: 1.8, 0.7: 2.7, 0.8: 4.0, 0.9: 7.0}
"""What was set out to be reached in Node over onnxruntime-web."""
DENSE = ("convolution", "channels last", "product", "oneDNN")
GOALS = {  # what was set out to be reached, over the best dense way: layers that begin so, rows of a group
    ("product", 1): {0.5: 1.2, 0.7: 1.9, 0.8: 2.7, 0.9: 4.5, 0.95: 7.5},
    ("product", 8): {0.5: 1.75, 0.7: 3.0, 0.8: 4.5, 0.9: 9.0, 0.95: 15.0},
    ("3x3", 1): {0.7: 1.4, 0.8: 2.0, 0.9: 3.3, 0.95: 5.5},
    ("3x3", 8): {0.7: 1.4, 0.8: 2.0, 0.9: 3.3, 0.95: 5.5},
}


def parts(name: str, made: torch.Generator) -> tuple[Tensor, Tensor, tuple[int, int]]:
    outputs, inputs, kernel, size = (LAYERS | ON_AARCH64)[name]
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=made)
    return weight, torch.randn(1, inputs, *size, generator=made), (kernel // 2, kernel // 2)


def packed(weight: Tensor, rows: int, sparsity: float, made: torch.Generator) -> Packed:
    columns = weight[0].numel()
    mask = torch.rand(len(weight) // rows, columns, generator=made) >= sparsity
    return GroupCols(rows).pack(weight, mask.repeat_interleave(rows, 0).view(weight.shape))


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of a call, all ways in turn; of short ones several calls are a turn."""
    repeats = {}
    for name, call in ways.items():
        call()
        start = time.thread_time()
        call()
        repeats[name] = max(1, int(0.003 / max(time.thread_time() - start, 1e-6)))
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, call in ways.items():
            start = time.thread_time()
            for _ in range(repeats[name]):
                call()
            spent[name].append((time.thread_time() - start) / repeats[name])
    return {name: 1e3 * statistics.median(kept) for name, kept in spent.items()}


def measure(name: str, rounds: int) -> dict[str, object]:
    made = torch.Generator().manual_seed(0)
    weight, x, padding = parts(name, made)
    turned, there = (t.contiguous(memory_format=torch.channels_last) for t in (weight, x))
    ways: dict[str, Callable[[], object]] = {
        "convolution": lambda: F.conv2d(x, weight, padding=padding),
        "channels last": lambda: F.conv2d(there, turned, padding=padding),
    }
    if weight.shape[2] == 1:
        matrix, pixels = weight.flatten(1), x.flatten(2)[0]
        ways["product"] = lambda: torch.mm(matrix, pixels)
    if name.startswith("product"):
        columns, ready = pixels.T.contiguous(), prepacked(matrix, pixels.shape[1])
        ways["oneDNN"] = lambda: product(columns, ready)
    dense = list(ways)
    whole = GroupCols(8).pack(weight)
    ways["whole"] = lambda: convolve(whole, x, padding=padding)
    for rows in ROWS:
        for sparsity in SPARSITIES:
            held = packed(weight, rows, sparsity, made)
            ways[f"{rows} {sparsity}"] = lambda held=held: convolve(held, x, padding=padding)
    found = timed(ways, rounds)
    work = 2e-6 * weight.numel() * (x.numel() // x.shape[1])
    best = min(found[way] for way in dense)
    print(f"{name}: dense {work / best:.0f} GF/s, whole {work / found['whole']:.0f}", flush=True)
    return {"layer": name, "dense": dense, "milliseconds": found, "mega": work, "load": os.getloadavg()[0]}


def in_node(name: str, rounds: int, web: str) -> dict[str, object]:
    made = torch.Generator().manual_seed(0)
    weight, x, padding = parts(name, made)
    cells = {"whole": GroupCols(4).pack(weight)}
    cells |= {f"{rows} {s}": packed(weight, rows, s, made) for rows in (1, 4) for s in SPARSITIES}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        plan = {"program": str(compile_to(place / "convolutions.wasm", WASM)), "rounds": rounds, "web": web}
        plan["messages"] = {cell: str(place / f"{cell}.message") for cell in cells}
        for cell, held in cells.items():
            (place / f"{cell}.message").write_bytes(message(held, x, padding=padding)[0])
        plan["graphs"] = graphs(weight, x, place) if web else {}
        (place / "plan.json").write_text(json.dumps(plan), encoding="utf-8")
        done = subprocess.run(
            ["node", str(BENCH), str(place / "plan.json")], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise SystemExit(done.stderr)
    found = json.loads(done.stdout)
    print(f"{name} in Node: " + ", ".join(f"{cell} {ms:.2f}" for cell, ms in found.items()), flush=True)
    work = 2e-6 * weight.numel() * (x.numel() // x.shape[1])
    cell = {"layer": name, "milliseconds": found, "mega": work, "load": os.getloadavg()[0]}
    return cell | ({"web": web_version(web), "dense": list(plan["graphs"])} if web else {})


def web_version(folder: str) -> str:
    """Of the onnxruntime-web that was installed in a folder."""
    about = Path(folder) / "node_modules" / "onnxruntime-web" / "package.json"
    return str(json.loads(about.read_text(encoding="utf-8"))["version"])


def graphs(weight: Tensor, x: Tensor, place: Path) -> dict[str, dict[str, object]]:
    """The dense layer as a convolution and as a product, for onnxruntime-web, with its input and its outcome."""
    import onnx
    from onnx import helper, numpy_helper

    (place / "x").write_bytes(x.numpy().tobytes())
    (place / "y").write_bytes(F.conv2d(x, weight).numpy().tobytes())
    pixels, number = x.flatten(2)[0], onnx.TensorProto.FLOAT
    found: dict[str, dict[str, object]] = {}
    for cell, kind, given, held, names in (
        ("web, convolution", "Conv", x, weight, ["x", "w"]),
        ("web, product", "MatMul", pixels, weight.flatten(1), ["w", "x"]),
    ):
        shape = [1, len(weight), *x.shape[2:]] if kind == "Conv" else [len(weight), pixels.shape[1]]
        graph = helper.make_graph(
            [helper.make_node(kind, names, ["y"])],
            "layer",
            [helper.make_tensor_value_info("x", number, list(given.shape))],
            [helper.make_tensor_value_info("y", number, shape)],
            [numpy_helper.from_array(held.numpy(), "w")],
        )
        path = place / f"{kind}.onnx"
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
        model.ir_version = 8
        onnx.save(model, str(path))
        ends = {"input": str(place / "x"), "outcome": str(place / "y")}
        found[cell] = {"path": str(path), "shape": list(given.shape), **ends}
    return found


def on_aarch64(name: str) -> dict[str, object]:
    """Instructions of a call: of two calls less those of one, so that reading the message is not among them."""
    made = torch.Generator().manual_seed(0)
    weight, x, padding = parts(name, made)
    found: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        program, plugin = compile_to(place / "group_cols", AARCH64), place / "instructions.so"
        subprocess.run(["gcc", "-shared", "-fPIC", "-O2", str(COUNTER), "-o", str(plugin)], check=True)
        for rows in ROWS:
            cells = {f"whole {rows}": GroupCols(rows).pack(weight)}
            cells |= {f"{rows} {s}": packed(weight, rows, s, made) for s in COUNTED}
            for cell, held in cells.items():
                text, _ = message(held, x, padding=padding)
                once, twice = (counted(plugin, program, text, times) for times in (1, 2))
                found[cell] = twice - once
    print(f"{name} on AArch64: " + ", ".join(f"{cell} {n / 1e6:.2f}" for cell, n in found.items()), flush=True)
    return {"layer": name, "instructions": found, "multiplications": weight.numel() * (x.numel() // x.shape[1])}


def counted(plugin: Path, program: Path, text: bytes, times: int) -> int:
    command = ["qemu-aarch64", "-plugin", str(plugin), str(program), "vectors", str(times)]
    return int(subprocess.run(command, input=text, capture_output=True, check=True).stderr)


def gains(cell: dict) -> tuple[float, dict[tuple[int, float], float]]:
    """The milliseconds of the fastest dense way, and by rows and sparsity how many times as fast each is."""
    spent = cell["milliseconds"]
    dense = min(spent[way] for way in cell.get("dense", ["whole"]))
    keys = [(int(k.split()[0]), float(k.split()[1])) for k in spent if k[0].isdigit()]
    return dense, {key: dense / spent[f"{key[0]} {key[1]}"] for key in keys}


def crossover(gain: dict[float, float]) -> str:
    """The sparsity from which it is faster, on the line between the two that were measured."""
    before = None
    for sparsity, times in sorted(gain.items()):
        if times >= 1:
            if before is None:
                return f"below {sparsity:.0%}"
            at, lost = before
            return f"{at + (sparsity - at) * (1 - lost) / (times - lost):.0%}"
        before = sparsity, times
    return "never"


def table(cells: list[dict], columns: tuple[float, ...]) -> list[str]:
    lines = ["| layer | rows | " + " | ".join(f"{s:.0%}" for s in columns) + " | faster from |"]
    lines.append("| --- | --- |" + " --- |" * (len(columns) + 1))
    for cell in cells:
        _, found = gains(cell)
        for rows in sorted({key[0] for key in found}):
            here = {s: found[rows, s] for s in columns if (rows, s) in found}
            shown = " | ".join(f"{here[s]:.2f}" for s in columns)
            lines.append(f"| {cell['layer']} | {rows} | {shown} | {crossover(here)} |")
    return lines


def page(found: dict) -> str:
    """The tables as Markdown."""
    lines = [
        "# How fast groups that share their columns are",
        "",
        "Written by `python -m benchmarks.group_cols`. How many times as fast as the fastest dense way of torch in the "
        "same run, float32, one picture: the convolution as a model calls it, with channels last, the product, or "
        "where it has a figure below oneDNN's product, with a weight in its own order. "
        "Groups of 1 are single weights, without any pattern. Medians of processor time, all ways in turn. The date "
        "is of the last run; layers that were not in it are of earlier ones.",
        "",
        str(found["about"]),
        "",
        *table(found["cells"], SPARSITIES),
        "",
        "Dense, in thousand millions of operations a second: the ways of torch, and the same kernel on a weight of "
        "which nothing is removed. Sparse kernels count here what they store.",
        "",
        "| layer | convolution | channels last | product | oneDNN | same kernel | groups of 8 at 70% "
        "| single weights at 70% |",
        "| --- |" + " --- |" * 7,
    ]
    for cell in found["cells"]:
        spent, work = cell["milliseconds"], cell["mega"]
        ways = [f"{work / spent[w]:.0f}" if w in spent else "" for w in DENSE]
        rest = [work / spent["whole"], 0.3 * work / spent["8 0.7"], 0.3 * work / spent["1 0.7"]]
        lines.append(f"| {cell['layer']} | " + " | ".join([*ways, *(f"{n:.0f}" for n in rest)]) + " |")
    lines += ["", "What was set out to be reached, and what was:", "", "| layer | rows | sparsity | goal | here |  |"]
    lines.append("| --- | --- | --- | --- | --- | --- |")
    for (start, rows), goals in GOALS.items():
        for cell in (c for c in found["cells"] if c["layer"].startswith(start)):
            _, here = gains(cell)
            for sparsity, goal in goals.items():
                got = here[rows, sparsity]
                said = "reached" if got >= goal else "missed"
                lines.append(f"| {cell['layer']} | {rows} | {sparsity:.0%} | {goal} | {got:.2f} | {said} |")
    if found.get("node"):
        lines += ["", *in_node_page(found["node"], str(found["about_node"]))]
    if found.get("aarch64"):
        lines += ["", *aarch64_page(found["aarch64"], str(found["about_aarch64"]))]
    return "\n".join(lines) + "\n"


def aarch64_page(cells: list[dict], about: str) -> list[str]:
    """Instructions, sparse beside the whole weight of the fewest."""
    lines = [
        "## AArch64, in instructions",
        "",
        "The same source compiled for NEON and run under emulation, which says nothing of time: how many times fewer "
        "instructions a sparse weight takes than a whole one in the same kernel, in groups of as many rows as take "
        "fewest. A vector has four lanes: a whole weight needs a quarter of an instruction a multiplication at least.",
        "",
        about,
        "",
        "| layer | rows | whole, instructions a multiplication | " + " | ".join(f"{s:.0%}" for s in COUNTED) + " |",
        "| --- | --- | --- |" + " --- |" * len(COUNTED),
    ]
    for cell in cells:
        found = cell["instructions"]
        whole = min(found[f"whole {rows}"] for rows in ROWS)
        for rows in ROWS:
            each = found[f"whole {rows}"] / cell["multiplications"]
            fewer = " | ".join(f"{whole / found[f'{rows} {s}']:.2f}" for s in COUNTED)
            lines.append(f"| {cell['layer']} | {rows} | {each:.3f} | {fewer} |")
    return lines


def in_node_page(cells: list[dict], about: str) -> list[str]:
    """What was measured in Node."""
    alone = [{**cell, "dense": ["whole"]} for cell in cells]
    lines = [
        "## WebAssembly in Node",
        "",
        "The same source compiled for WebAssembly, against itself on a weight of which nothing is removed in "
        "groups of 4; medians of the processor's time for the process, all in turn.",
        "",
        about,
        "",
        *table(alone, SPARSITIES),
    ]
    beside = [cell for cell in cells if "web" in cell]
    if not beside:
        return lines
    lines += [
        "",
        f"Against onnxruntime-web {beside[0]['web']} in the same run, one thread, the dense layer as a convolution or "
        "as a product, the faster of the two:",
        "",
        *table(beside, SPARSITIES),
        "",
        "| layer | onnxruntime-web, convolution | product | same kernel | groups of 4 at 70% | single weights at 70% |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in beside:
        spent, work = cell["milliseconds"], cell["mega"]
        dense = [work / spent[way] for way in ("web, convolution", "web, product", "whole")]
        rest = [0.3 * work / spent["4 0.7"], 0.3 * work / spent["1 0.7"]]
        lines.append(f"| {cell['layer']} | " + " | ".join(f"{n:.0f}" for n in [*dense, *rest]) + " |")
    lines += [
        "",
        "In thousand millions of operations a second, sparse ones counting what they store. What was set out to be "
        "reached over onnxruntime-web:",
        "",
        "| layer | rows | sparsity | goal | here |  |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for cell in beside:
        _, here = gains(cell)
        for rows in (1, 4):
            for sparsity, goal in NODE_GOALS.items():
                got = here[rows, sparsity]
                said = "reached" if got >= goal else "missed"
                lines.append(f"| {cell['layer']} | {rows} | {sparsity:.0%} | {goal} | {got:.2f} | {said} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default="", help="layers whose name begins so")
    parser.add_argument("--node", action="store_true", help="the WebAssembly build alone")
    parser.add_argument("--web", default="", metavar="FOLDER", help="with onnxruntime-web in it, for --node")
    parser.add_argument("--aarch64", action="store_true", help="instructions of the NEON build, under qemu-user")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result, place = kept.here(RESULT, PAGE)
    found = kept.read(result, {"cells": [], "node": []})
    if asked.aarch64:
        with torch.no_grad():
            found["aarch64"] = [on_aarch64(name) for name in ON_AARCH64]
        said = subprocess.run([AARCH64[0], "-dumpfullversion"], capture_output=True, text=True, check=True)
        found["about_aarch64"] = f"{AARCH64[0]} {said.stdout.strip()}, {now()}."
        kept.write(result, found)
        kept.write_page(place, page(found))
        return
    kind, names = ("node", IN_NODE) if asked.node else ("cells", tuple(LAYERS))
    with torch.no_grad():
        for name in (n for n in names if n.startswith(asked.only)):
            cell = in_node(name, asked.rounds, asked.web) if asked.node else measure(name, asked.rounds)
            rest = [c for c in found[kind] if c["layer"] != name]
            found[kind] = sorted([*rest, cell], key=lambda c: list(LAYERS).index(c["layer"]))
            machine, loads = about_machine(), [c["load"] for c in found[kind]]
            load = f"{asked.rounds} rounds, load average {min(loads):.0f} to {max(loads):.0f}, {now()}."
            if asked.node:
                engine = subprocess.run(
                    ["node", "--version"], capture_output=True, text=True, check=True
                ).stdout.strip()
                found["about_node"] = f"One thread, Node {engine}, on {kept.processor(machine)}, {load}"
            else:
                found |= {"created": now(), "machine": machine, "versions": about_versions(), "level": kernels.level()}
                found["about"] = (
                    f"One thread, kernels for {kernels.level()}, on {kept.processor(machine)}, "
                    f"torch {torch.__version__}, {load}"
                )
            kept.write(result, found)
    kept.write_page(place, page(found))


if __name__ == "__main__":
    main()
