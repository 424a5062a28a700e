"""Other run-times at the same weights: ONNX Runtime, OpenVINO, llama.cpp and DeepSparse beside an accelerated model.

    python -m benchmarks.peers [--rounds 9] [--only "mlp 0.9"] [--model smollm2] [--deepsparse /path/to/python]

One example at a time, one thread each: a perceptron of 1024-4096-4096-4096-1024 in float32 under masks at random of
several sparsities, ResNet-20 and MobileNet-v1 for pictures of 32x32 the same way, ResNet-20 four times as wide for 16
of them at a time, and SmolLM2-135M with half of the weights of its layers at zero, one token with nothing before it.
All take turns, round by round; a time is the processor's for all threads of the process. A turn is a few calls, which
find in the caches what others left there, and then as many as take a while, as where one model serves: the two are told
apart. What is not installed is
left out, and the page says why. DeepSparse 1.8 wants older packages than secateur, so it lives in an environment of
its own, and its python is named; it runs there, told by lines when to. Writes results/peers.json, from which
docs/peers-speed.md is made.
"""

import argparse
import copy
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch._inductor.config as inductor
from torch import Tensor, nn

from benchmarks import kept
from benchmarks.whole_models import mask_
from secateur import kernels
from secateur.accelerate import accelerate
from secateur.axes import Taps
from secateur.errors import SecateurError
from secateur.export import gguf, onnx
from secateur.formats import BitmapInt8
from secateur.models import Opened, open_model
from secateur.models.mobilenet import mobilenet
from secateur.models.resnet import CifarResNet, resnet20
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "peers.json"
PAGE = HERE.parent / "docs" / "peers-speed.md"

SIZES = (1024, 4096, 4096, 4096, 1024)
SPARSITIES = (0.5, 0.8, 0.9, 0.95)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet20": resnet20,
    "wide-resnet20": lambda: CifarResNet(20, width=64),
    "mobilenet": mobilenet,
}
PICTURES = {"wide-resnet20": 16}
"""At a time, unless one."""
GOALS = {"resnet20": {0.8: 2.0, 0.9: 3.0, 0.95: 4.6}}
"""What was set out to be reached over ONNX Runtime, of single weights."""
CALLS = 5
"""With which a turn begins, after all others had theirs."""
LONG = 0.05
"""Seconds for which it goes on, with as many calls at least."""

HELD: list[Any] = []
"""What is to be closed after it was timed."""

CHILD = """
import os, sys, time
os.environ["NM_DISABLE_ANALYTICS"] = "True"
import numpy
from deepsparse import Engine
out, sys.stdout = sys.stdout, sys.stderr
given = [numpy.load(path) for path in sys.argv[3:]]
engine = Engine(model=sys.argv[1], batch_size=len(given[0]), num_cores=1)
numpy.save(sys.argv[2], engine.run(given)[0])
print("ready", file=out, flush=True)
for line in sys.stdin:
    start = time.process_time()
    for _ in range(int(line)):
        engine.run(given)
    print(time.process_time() - start, file=out, flush=True)
"""
"""What runs under the other python: loads a graph, answers once into a file, then runs it as often as a line says."""

Ways = dict[str, Callable[[int], float]]
"""A name -> what makes so many calls and returns the seconds of processor time they took."""


def here(call: Callable[[], Any]) -> Callable[[int], float]:
    """Calls in this process."""

    def run(calls: int) -> float:
        with torch.inference_mode():  # as a model is served
            start = time.process_time()
            for _ in range(calls):
                call()
            return time.process_time() - start

    return run


class Without(Exception):
    """A peer that cannot take part, and why."""


def onnx_runtime(path: Path, given: dict[str, np.ndarray]) -> tuple[Callable[[], Any], np.ndarray]:
    try:
        import onnxruntime
    except ImportError as error:
        raise Without("it is not installed") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda: session.run(None, given), session.run(None, given)[0]


def openvino(path: Path, given: dict[str, np.ndarray], precision: str) -> tuple[Callable[[], Any], np.ndarray]:
    try:
        import openvino as vino
    except ImportError as error:
        raise Without("it is not installed") from error
    how = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    model = vino.Core().compile_model(vino.Core().read_model(str(path)), "CPU", how)
    request = model.create_infer_request()
    return lambda: request.infer(given), request.infer(given)[0].copy()


def deepsparse(python: str, path: Path, given: dict[str, np.ndarray]) -> tuple[Callable[[int], float], np.ndarray]:
    """Calls in the other process, and its first answer."""
    if not python:
        raise Without("no python of an environment with it was named (--deepsparse)")
    files = []
    for name, value in given.items():
        files.append(str(path.with_name(f"{path.stem}.{name}.npy")))
        np.save(files[-1], value)
    answer = str(path.with_name(f"{path.stem}.answer.npy"))
    child = subprocess.Popen(
        [python, "-c", CHILD, str(path), answer, *files],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None and child.stderr is not None
    if child.stdout.readline().strip() != "ready":
        said = child.communicate()[1].strip().splitlines()
        raise Without(f"it stopped: {said[-1][:200] if said else 'without a word'}")

    def run(calls: int) -> float:
        child.stdin.write(f"{calls}\n")
        child.stdin.flush()
        return float(child.stdout.readline())

    return run, np.load(answer)


def mlp(sparsity: float, place: Path, python: str) -> tuple[Ways, dict[str, str], dict[str, float]]:
    """The perceptron at one sparsity: the ways, who is left out and why, and how far answers differ."""
    made = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(SIZES):
        layer = nn.Linear(inputs, outputs)
        layer.weight.data = torch.randn(outputs, inputs, generator=made) * (2 / inputs / (1 - sparsity)) ** 0.5
        layer.weight.data.mul_(torch.rand(outputs, inputs, generator=made) >= sparsity)
        layers += [layer, nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).eval().requires_grad_(False)
    x = torch.randn(1, SIZES[0], generator=made)
    path = place / f"mlp{sparsity}.onnx"
    onnx._trace(model, path, {"x": x})
    fast = accelerate(model, x).model
    wanted, given = model(x).numpy(), {"x": x.numpy()}
    ways: Ways = {"torch": here(lambda: model(x)), "secateur": here(lambda: fast(x))}
    return joined(ways, {"secateur": fast(x).numpy()}, wanted, path, given, python, ("f32",))


def pictures(kind: str, sparsity: float, place: Path, python: str) -> tuple[Ways, dict[str, str], dict[str, float]]:
    """A network for pictures at one sparsity, of single weights, which all run, and of blocks of four outputs."""
    single, blocks = (masked(kind, sparsity, rows) for rows in (1, 4))
    x = torch.randn(PICTURES.get(kind, 1), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    last, turned = copy.deepcopy(single).to(memory_format=torch.channels_last), to_last(x)
    path = place / f"{kind}{sparsity}.onnx"
    onnx._trace(single, path, {"x": x})
    fast, faster = accelerate(single, x), accelerate(blocks, x)
    print(kind, sparsity, fast.chosen, faster.chosen, flush=True)
    wanted, given = single(x).numpy(), {"x": x.numpy()}
    ways: Ways = {
        "torch": here(lambda: single(x)),
        "torch, channels last": here(lambda: last(turned)),
        "secateur": here(lambda: fast.model(x)),
        "secateur, blocks of 4": here(lambda: faster.model(x)),
    }
    ways, left_out, off = joined(ways, {"secateur": fast.model(x).numpy()}, wanted, path, given, python, ("f32",))
    return ways, left_out, off | {"secateur, blocks of 4": faster.error}


def to_last(x: Tensor) -> Tensor:
    return x.to(memory_format=torch.channels_last)


def masked(kind: str, sparsity: float, rows: int) -> nn.Module:
    """A network with zeros at random in all convolutions but the first, in whole blocks of `rows` outputs by one input.

    Depthwise kernels stay dense with single weights; with blocks they keep four taps of nine.
    """
    made = torch.Generator().manual_seed(0)
    model = NETWORKS[kind]().eval().requires_grad_(False)
    first = True
    for layer in model.modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        weight = layer.weight
        keep = torch.ones(weight.shape, dtype=torch.bool)
        if layer.groups > 1 and rows > 1:
            keep = Taps().select(torch.rand(weight.shape, generator=made), weight.numel() // 9 * 4)
        elif layer.groups == 1 and not first:
            noise = torch.rand(
                len(weight) // rows, *weight.shape[1:2], *([1, 1] if rows > 1 else weight.shape[2:]), generator=made
            )
            keep = (noise >= sparsity).repeat_interleave(rows, 0).expand(weight.shape)
        first = False
        fan = weight[0].numel() * float(keep.sum()) / keep.numel()
        weight.data = torch.randn(weight.shape, generator=made) * (2 / fan) ** 0.5 * keep
    return model


def joined(
    ways: Ways,
    answers: dict[str, np.ndarray],
    wanted: np.ndarray,
    path: Path,
    given: dict[str, np.ndarray],
    python: str,
    precisions: tuple[str, ...],
) -> tuple[Ways, dict[str, str], dict[str, float]]:
    """The run-times that take a graph, beside the ways there are."""
    left_out: dict[str, str] = {}
    peers: dict[str, Callable[[], tuple[Callable[[], Any], np.ndarray]]] = {
        "ONNX Runtime": lambda: onnx_runtime(path, given)
    }
    for precision in precisions:
        peers[f"OpenVINO {precision}"] = lambda p=precision: openvino(path, given, p)
    for name, peer in peers.items():
        try:
            call, answers[name] = peer()
            ways[name] = here(call)
        except Without as why:
            left_out[name] = str(why)
    try:
        ways["DeepSparse"], answers["DeepSparse"] = deepsparse(python, path, given)
    except Without as why:
        left_out["DeepSparse"] = str(why)
    off = {name: float(np.abs(said - wanted).max() / np.abs(wanted).max()) for name, said in answers.items()}
    return ways, left_out, off


def smollm2(model: str, place: Path, python: str) -> tuple[Ways, dict[str, str], dict[str, float]]:
    """SmolLM2 with half of its layers' weights at zero: the same numbers everywhere but where 8 or 4 bits are said."""
    opened = open_model(model, dtype="bfloat16")
    net = opened.model.requires_grad_(False)
    mask_(net, 0.5)
    ids = torch.tensor([[504]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    path = place / "smollm2.onnx"
    onnx._trace(net, path, {name: value.repeat(1, 3) for name, value in inputs.items()})

    def said(one: Callable[..., Any]) -> Tensor:
        return one(**inputs, use_cache=False).logits

    inductor.freezing = True
    ways: Ways = {}
    answers: dict[str, np.ndarray] = {}
    for name, formats in (
        ("torch bf16", None),
        ("secateur bf16", {}),
        ("secateur 8 bits", {"formats": (BitmapInt8(),)}),
    ):
        plain = net if formats is None else accelerate(net, inputs, **formats).model
        for form, one in ((name, plain), (f"{name}, compiled", torch.compile(plain, dynamic=False))):
            answers[form] = said(one).float().numpy()
            ways[form] = here(lambda one=one: said(one))
    exact = onnx.in_float32(net)
    wanted = said(exact).numpy()
    given = {name: value.numpy() for name, value in inputs.items()}
    ways, left_out, off = joined(ways, answers, wanted, path, given, python, ("f32", "bf16"))
    try:
        for name, encoded in (("bf16", gguf._encoded), ("Q8_0", in_kind("Q8_0")), ("Q4_0", in_kind("Q4_0"))):
            call, answer = llama(opened, place / f"{name}.gguf", encoded, ids)
            ways[f"llama.cpp {name}"] = here(call)
            off[f"llama.cpp {name}"] = float(np.abs(answer - wanted).max() / np.abs(wanted).max())
    except SecateurError as error:
        left_out["llama.cpp"] = str(error).splitlines()[0]
    return ways, left_out, off


def in_kind(name: str) -> Callable[[Any, Tensor], tuple[np.ndarray, Any]]:
    """Matrices in one of llama.cpp's kinds, vectors in float32."""

    def encoded(package: Any, value: Tensor) -> tuple[np.ndarray, Any]:
        kind = package.GGMLQuantizationType[name if value.ndim > 1 else "F32"]
        plain = value.float().numpy()
        return (package.quants.quantize(plain, kind) if value.ndim > 1 else plain), kind

    return encoded


def llama(
    opened: Opened, path: Path, encoded: Callable[[Any, Tensor], tuple[np.ndarray, Any]], ids: Tensor
) -> tuple[Callable[[], Any], np.ndarray]:
    """One token by llama.cpp, with weights rearranged as it does by itself, but where that ends the process (AMX).

    What was loaded stays until it was timed.
    """
    gguf._written(opened, path, encoded)
    held = gguf._loaded(path, 64, rearranged=kernels.level() != "amx")
    model, context = held.__enter__()
    HELD.append(held)
    tokens = ids[0].tolist()
    return lambda: gguf._logits(model, context, tokens), gguf._logits(model, context, tokens).numpy()


def measured(name: str, ways: Ways, rounds: int) -> dict[str, Any]:
    """Milliseconds of one call of each way, all in turn; the first round is not counted."""
    kept: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for at in range(rounds + 1):
        for way, run in ways.items():
            first = run(CALLS) / CALLS
            calls = max(CALLS, round(LONG / first))
            then = run(calls) / calls
            if at:
                kept[way].append((first, then))
    first, then = ({way: 1e3 * statistics.median(t[i] for t in each) for way, each in kept.items()} for i in (0, 1))
    print(name, {way: f"{ms:.2f} ({first[way]:.2f})" for way, ms in then.items()}, flush=True)
    return {"name": name, "milliseconds": then, "after others": first, "load": os.getloadavg()[0]}


def page(found: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Other run-times at the same weights",
        "",
        "Written by `python -m benchmarks.peers`. One example at a time and one thread; milliseconds are medians of "
        "processor time, over rounds in which all took turns, torch in inference mode. "
        f"A turn is {CALLS} calls, and then as many as take "
        f"{1e3 * LONG:.0f} ms, which count: what serves one model finds of its weights what caches hold. The first few "
        "find there what all others left, and are told apart. `off` is the largest difference of an answer from that "
        "of the model in float32, over the largest number there. What a run-time gains from zeros it gains by itself: "
        "no settings were tried beyond its number of threads and its precision. llama.cpp rearranges weights as it "
        "does by itself (`use_extra_bufts`), but on processors with AMX, where 8-bit ones ended the process.",
        "",
        f"{found['about']} That is of the last run: "
        "what it left out is of earlier ones, with as many rounds as they had.",
    ]
    titles = {
        "mlp": "A perceptron of 1024-4096-4096-4096-1024, float32, masks at random",
        "resnet20": "ResNet-20, one picture of 32x32, float32, masks at random in all convolutions but the first",
        "wide-resnet20": "ResNet-20 four times as wide, 16 pictures at a time, float32, masks as above",
        "mobilenet": "MobileNet-v1, one picture of 32x32, float32, masks at random in its 1x1 convolutions",
        "smollm2": "SmolLM2-135M, half of the weights of its layers at zero, one token with nothing before it",
    }
    for kind, title in titles.items():
        cells = [cell for cell in found["cells"] if cell["name"].startswith(kind)]
        if not cells:
            continue
        lines += ["", f"## {title}", ""]
        if kind in NETWORKS:
            lines += pictures_page(cells, GOALS.get(kind, {}), PICTURES.get(kind, 1))
        elif kind == "mlp":
            lines += perceptron_page(cells, "milliseconds")
            lines += ["", f"The first {CALLS} calls of a turn:", "", *perceptron_page(cells, "after others")]
        else:
            ms, off = cells[0]["milliseconds"], cells[0]["off"]
            ours = [n for n in ms if n.startswith("secateur")]
            lines += ["Compiled: by torch.compile, with frozen weights.", ""]
            lines += ["| run-time | ms a token | first ms | " + " | ".join(f"{n} over it" for n in ours) + " | off |"]
            lines += ["| --- |" + " --- |" * (3 + len(ours))]
            for n, one in ms.items():
                ratios = " | ".join(f"{one / ms[mine]:.2f}" for mine in ours)
                lines.append(f"| {n} | {one:.1f} | {cells[0]['after others'][n]:.1f} | {ratios} | {off[n]:.1g} |")
        missing = {n: why for cell in cells for n, why in cell["left_out"].items()}
        lines += [line for n, why in missing.items() for line in ("", f"{n} is not here: {why.rstrip('.')}.")]
    return "\n".join(lines) + "\n"


def perceptron_page(cells: list[dict[str, Any]], which: str) -> list[str]:
    """Milliseconds of every way, and how many times as long as what was accelerated the others take."""
    names = [n for n in cells[0][which] if n != "secateur"]
    lines = ["| zeros | secateur (ms) | " + " | ".join(f"{n} (ms): over it" for n in names) + " |"]
    lines += ["| --- |" + " --- |" * (len(names) + 1)]
    for cell in sorted(cells, key=lambda cell: cell["name"]):
        ms = cell[which]
        ours = ms["secateur"]
        others = " | ".join(f"{ms[n]:.2f}: {ms[n] / ours:.2f}" if n in ms else "" for n in names)
        lines.append(f"| {float(cell['name'].split()[1]):.0%} | {ours:.2f} | {others} |")
    return lines


def pictures_page(cells: list[dict[str, Any]], goals: dict[float, float], count: int) -> list[str]:
    """Pictures a second of every way, and how many times as fast as each dense one is what was accelerated."""
    dense = [n for n in cells[0]["milliseconds"] if not n.startswith("secateur")]
    ours = ("secateur", "secateur, blocks of 4")
    lines = [
        "Pictures a second. Blocks are of four outputs by one input, a whole kernel where it is 3x3, and depthwise "
        "kernels keep four taps of nine beside them; with single weights they are dense. Only secateur runs blocks.",
        "",
        "| zeros | " + " | ".join([*ours, *dense]) + " |",
        "| --- |" + " --- |" * (len(ours) + len(dense)),
    ]
    cells = sorted(cells, key=lambda cell: cell["name"])
    for cell in cells:
        rates = " | ".join(
            f"{1e3 * count / cell['milliseconds'][n]:.0f}" if n in cell["milliseconds"] else "" for n in (*ours, *dense)
        )
        lines.append(f"| {float(cell['name'].split()[1]):.0%} | {rates} |")
    for which, said in (("milliseconds", ""), ("after others", f", the first {CALLS} calls of a turn")):
        lines += ["", f"How many times as fast as each, single weights and blocks of 4{said}:", ""]
        lines += ["| zeros | " + " | ".join(dense) + " | goal over ONNX Runtime |"]
        lines += ["| --- |" + " --- |" * (len(dense) + 1)]
        for cell in cells:
            ms, sparsity = cell[which], float(cell["name"].split()[1])
            ratios = " | ".join(" and ".join(f"{ms[n] / ms[o]:.2f}" for o in ours) if n in ms else "" for n in dense)
            lines.append(f"| {sparsity:.0%} | {ratios} | {goals.get(sparsity, '')} |")
    return lines


def about(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["runtimes"].items())
    loads = [cell["load"] for cell in found["cells"]]
    return (
        f"{kept.processor(found['machine'])}, {found['machine']['cores']} cores; kernels for {found['level']}, torch "
        f"{found['versions']['torch']}, {versions}; {found['settings']['rounds']} rounds, load "
        f"{min(loads):.0f} to {max(loads):.0f}, {found['created']}."
    )


def runtimes(python: str) -> dict[str, str]:
    """The run-times that are here, with their versions."""
    found = {}
    for package in ("onnxruntime", "openvino", "llama_cpp_python"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if python:
        asked = "from importlib.metadata import version; print(version('deepsparse'))"
        said = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=False)
        found |= {"deepsparse": said.stdout.strip()} if not said.returncode else {}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", default="", help='cells whose name begins so, such as resnet20 or "mlp 0.9"')
    parser.add_argument("--model", default="smollm2", help="a name, or a folder with the same model, opened sooner")
    parser.add_argument("--deepsparse", default="", metavar="PYTHON", help="of an environment that has DeepSparse 1.8")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    result, page_at = kept.here(RESULT, PAGE)
    found = kept.read(result, {"cells": []})
    found |= {
        "created": now(),
        "settings": {"rounds": asked.rounds},
        "machine": about_machine(),
        "versions": about_versions(),
        "runtimes": runtimes(asked.deepsparse) or found.get("runtimes", {}),
        "level": kernels.level(),
    }
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        place = Path(folder)
        jobs: dict[str, Callable[[], tuple[Ways, dict[str, str], dict[str, float]]]] = {
            f"mlp {s}": lambda s=s: mlp(s, place, asked.deepsparse) for s in SPARSITIES
        }
        for kind in NETWORKS:
            jobs |= {f"{kind} {s}": lambda k=kind, s=s: pictures(k, s, place, asked.deepsparse) for s in SPARSITIES}
        jobs["smollm2 0.5"] = lambda: smollm2(asked.model, place, asked.deepsparse)
        jobs = {name: job for name, job in jobs.items() if name.startswith(asked.only)}
        for name, prepare in jobs.items():
            ways, left_out, off = prepare()
            cell = measured(name, ways, asked.rounds) | {"left_out": left_out, "off": off}
            while HELD:
                HELD.pop().__exit__(None, None, None)
            print(left_out, {n: f"{v:.1g}" for n, v in off.items()}, flush=True)
            found["cells"] = [*(c for c in found["cells"] if c["name"] != name), cell]
            found["about"] = about(found)
            kept.write(result, found)
    kept.write_page(page_at, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
