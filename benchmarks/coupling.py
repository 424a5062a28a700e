"""Whole channels out of networks: SPA here against torch-pruning, on the same networks, to the same multiply-adds.

    pip install --no-deps torch-pruning==1.6.1      (best into an environment of its own)
    python -m benchmarks.coupling [--repeats 3] [--threads 1]

Each side takes the same trained network, in turn: what couples its channels is found, and half of the multiply-adds go
by group magnitude, ranked together; torch-pruning goes in 50 steps until it is there, as its guide does. Both results
are then trained equally long. A network that one side cannot take is named with its reason. Writes
results/coupling.json, from which docs/coupling-speed.md is made.
"""

import argparse
import copy
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from secateur import fit
from secateur.axes.rules import LearningRate
from secateur.methods.spa import Spa
from secateur.models import onnx, open_model
from secateur.models.opening import data_pack
from secateur.outcome import about_machine, about_versions, count_flops, now
from secateur.tasks import Adam, fashion_mnist, open_task

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "coupling.json"
PAGE = HERE.parent / "docs" / "coupling-speed.md"
SPARSITY = 0.5  # of the multiply-adds


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A small residual network with convolutions where the width doubles: nothing that either side finds hard."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn = nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16)
        self.block1, self.down, self.block2 = Block(16), nn.Conv2d(16, 32, 3, 2, 1), Block(32)
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        return self.fc(self.block2(torch.relu(self.down(x))).mean((2, 3)))


class Dense(nn.Module):
    """Concatenations, depthwise convolutions and a flattened end."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, 2, 1)
        self.deep, self.point = nn.Conv2d(16, 16, 3, 1, 1, groups=16), nn.Conv2d(16, 24, 1)
        self.late = nn.Conv2d(40, 32, 3, 2, 1)
        self.fc1, self.fc2 = nn.Linear(32 * 49, 48), nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = torch.cat([x, torch.relu(self.point(torch.relu(self.deep(x))))], 1)
        x = torch.relu(self.late(x)).flatten(1)
        return self.fc2(torch.relu(self.fc1(x)))


def ours(model: nn.Module, task: Any) -> nn.Module:
    return Spa(sparsity=SPARSITY, of="flops").run(model, task).model


def theirs(model: nn.Module, task: Any) -> nn.Module:
    import torch_pruning as tp

    example = task.example
    given = example.inputs if isinstance(example.inputs, dict) else example.inputs[0]
    whole = count_flops(model, example) or 0
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    pruner = tp.pruner.BasePruner(
        model, given, importance=tp.importance.GroupMagnitudeImportance(), global_pruning=True, pruning_ratio=0.9,
        iterative_steps=50, ignored_layers=last,
    )  # fmt: skip
    for _ in range(50):
        if (count_flops(model, example) or 0) <= (1 - SPARSITY) * whole:
            return model
        pruner.step()
    raise RuntimeError("its multiply-adds do not go down to the target")


SIDES: dict[str, Callable[[nn.Module, Any], nn.Module]] = {"ours": ours, "torch-pruning": theirs}


def cases(steps: int) -> list[tuple[str, nn.Module, Any, str]]:
    """Name, trained network, its task, and the metric (\"\" where only coverage is looked at)."""
    found = []
    clothes = fashion_mnist(train_size=12_000, test_size=2000, batch=128, learner=Adam(2e-3))
    for name, make in (("residual CNN, Fashion-MNIST", Residual), ("concat and depthwise CNN, Fashion-MNIST", Dense)):
        torch.manual_seed(0)
        model = make()
        fit(model, clothes, steps, [LearningRate()])
        found.append((name, model, clothes, "accuracy"))
    photos = open_task("cifar10", train_size=2000, val_size=500, test_size=1000, learning_rate=0.02)
    found.append(("ResNet-20, CIFAR-10 (slice and pad)", open_model("resnet20").model, photos, "accuracy"))
    found.append(("the same weights in the data pack's own module", pack(), photos, "accuracy"))
    vit = open_model("vit-fashion").model
    found.append(("ViT, Fashion-MNIST (transformers)", vit, open_task("fashion-mnist", model=vit, test_size=500), ""))
    detector = onnx.load(data_pack() / "weights" / "face_slim320.onnx")
    found.append(("face_slim320.onnx", detector, open_task("answers", model=detector, samples=4), ""))
    return found


def pack() -> nn.Module:
    """ResNet-20 as the data pack builds it: the same slice and pad, written otherwise."""
    from safetensors.torch import load_file

    sys.path.insert(0, str(data_pack()))
    import models

    model = models.ResNetCifar(20)
    model.load_state_dict(load_file(str(data_pack() / "weights" / "resnet20_cifar10_jpeg.safetensors")))
    return model.eval()


def run(side: str, model: nn.Module, task: Any) -> tuple[nn.Module, float]:
    if side == "torch-pruning" and isinstance(model, onnx.Network):
        raise TypeError("it takes torch modules, not ONNX files")
    work = copy.deepcopy(model).eval()
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        done = SIDES[side](work, task)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        task.example.through(done.eval())
    return done, seconds


def measure(repeats: int, steps: int, tuning: int) -> list[dict[str, Any]]:
    rows = []
    for name, model, task, metric in cases(steps):
        whole = count_flops(model, task.example) or 1
        row: dict[str, Any] = {"network": name, "dense": task.measure(model, "test")[metric] if metric else None}
        times: dict[str, list[float]] = {side: [] for side in SIDES}
        for repeat in range(repeats):
            for side in SIDES:
                if "why" in row.get(side, {}):
                    continue
                try:
                    done, seconds = run(side, model, task)
                except Exception as error:  # whatever either side raises is the finding
                    row[side] = {"why": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
                    continue
                times[side].append(seconds)
                if repeat:
                    continue
                row[side] = {"flops": (count_flops(done, task.example) or 0) / whole}
                if metric:
                    row[side]["before"] = task.measure(done, "test")[metric]
                    fit(done, task, tuning, [LearningRate()])
                    row[side]["after"] = task.measure(done, "test")[metric]
        for side, taken in times.items():
            if taken:
                row[side]["seconds"] = statistics.median(taken)
        rows.append(row)
        print(json.dumps(row), flush=True)
    return rows


def page(found: dict[str, Any]) -> str:
    lines = [
        "# Cutting whole channels: SPA here and torch-pruning", "",
        "Written by `python -m benchmarks.coupling`. Half of the multiply-adds of each network were asked for, by "
        "group magnitude ranked over the whole network, on the same trained weights; both results were then trained "
        "equally long. Neither side is told anything of a network, such as which layers are attention; torch-pruning "
        "takes transformers when it is. One seed: a difference of a few points says little. Seconds are medians of "
        "runs in turn, from the trained network to the cut one.", "",
        f"torch-pruning {found['torch-pruning']}, torch {found['versions']['torch']}, {found['threads']} thread(s), "
        f"{found['repeats']} repeats, {found['tuning']} steps of fine-tuning, on {found['machine']['processor']}, "
        f"{found['when']}.", "",
        "| network | side | multiply-adds left | accuracy, dense | after the cut | after fine-tuning | seconds |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]  # fmt: skip
    for row in found["rows"]:
        for side in ("ours", "torch-pruning"):
            got = row[side]
            if "why" in got:
                why = got["why"].replace("|", "\\|")
                lines.append(f"| {row['network']} | {side} | refused: {why} | {_share(row['dense'])} | | | |")
                continue
            lines.append(
                f"| {row['network']} | {side} | {got['flops']:.3f} | {_share(row['dense'])} | "
                f"{_share(got.get('before'))} | {_share(got.get('after'))} | {got['seconds']:.2f} |"
            )
    return "\n".join(lines) + "\n"


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--tuning", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    from importlib.metadata import version

    rows = measure(given.repeats, given.steps, given.tuning)
    found = {
        "when": now(), "machine": about_machine(), "versions": about_versions(), "threads": given.threads,
        "repeats": given.repeats, "steps": given.steps, "tuning": given.tuning, "sparsity": SPARSITY,
        "torch-pruning": version("torch-pruning"), "rows": rows,
    }  # fmt: skip
    result, _ = kept.here(RESULT, PAGE)
    kept.write(result, found)


if __name__ == "__main__":
    main()
