"""What a detector loses to cuts of 10 to 50 %, nothing trained after: this library beside torch-pruning, one network.

    python -m benchmarks.detection [FOLDER]

FOLDER holds torch-pruning, installed by `pip install --no-deps --target FOLDER torch-pruning==1.6.1`: it is not a
dependency. Torch-Pruning's issue 147 reports a detector that fell from a mean average precision of 79 to 26 at 10 %.
FastestDet on the 72 test pictures of BCCD; each tool decides its channels by its own means, at the same fraction of
every layer, and what parameters that leaves is a column. Writes benchmarks/results/detection.json and its page.
"""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from secateur import prune
from secateur.axes.scales import Dropped
from secateur.methods.group_channel import GroupChannel
from secateur.methods.l1_norm import L1Norm
from secateur.models import open_model
from secateur.outcome import about_machine, about_versions
from secateur.tasks.detection import Detection, bccd

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "detection.json"
PAGE = HERE.parent / "docs" / "detection-cut.md"


def ours(model: nn.Module, task: Detection, sparsity: float) -> dict[str, Callable[[], nn.Module]]:
    still = {"sparsity": sparsity, "steps": 0, "tune": 0, "distil": 0, "floor": 0.0}
    return {
        "group_channel": lambda: prune(model, GroupChannel(**still), task).model,
        "group_channel, constants dropped": lambda: (
            prune(model, GroupChannel(**still, constants=Dropped()), task).model
        ),
        "l1_norm": lambda: prune(model, L1Norm(sparsity=sparsity), task).model,
    }


def theirs(model: nn.Module, task: Detection, sparsity: float) -> dict[str, Callable[[], nn.Module]]:
    import torch_pruning as tp

    def run(importance: object) -> nn.Module:
        work = copy.deepcopy(model)
        answers = [
            head.conv5x5[3] for head in (getattr(work.detect_head, f"{n}_layers") for n in ("obj", "reg", "cls"))
        ]
        pruner = tp.pruner.BasePruner(
            work, task.example.inputs[0], importance=importance, pruning_ratio=sparsity, ignored_layers=answers
        )
        pruner.step()
        return work

    return {
        "torch-pruning, magnitude": lambda: run(tp.importance.GroupMagnitudeImportance(p=2)),
        "torch-pruning, scales of norms": lambda: run(tp.importance.BNScaleImportance()),
    }


def main() -> None:
    torch.set_num_threads(1)
    if len(sys.argv) > 1:
        sys.path.append(sys.argv[1])
    task, model = bccd(train_size=1, val_size=1, shown=1), open_model("fastestdet").model
    rows = [{"run": "dense", "sparsity": 0.0, **looked(model, task), "seconds": 0.0}]
    for sparsity in (0.1, 0.2, 0.3, 0.5):
        makers = ours(model, task, sparsity)
        makers |= theirs(model, task, sparsity) if len(sys.argv) > 1 else {}
        for name, make in makers.items():
            start = time.perf_counter()
            try:
                made = make()
            except Exception as error:  # a tool that refuses the network is a row as well
                rows.append({"run": name, "sparsity": sparsity, "failed": f"{type(error).__name__}: {error}"[:300]})
            else:
                seconds = time.perf_counter() - start
                rows.append({"run": name, "sparsity": sparsity, **looked(made, task), "seconds": seconds})
            print(rows[-1], flush=True)
    found = {"rows": rows, "machine": about_machine(), "versions": about_versions()}
    result, place = kept.here(RESULT, PAGE)
    kept.write(result, found)
    kept.write_page(place, page(found))


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = [
        "# What a detector loses to a cut",
        "",
        "Written by `python -m benchmarks.detection`. FastestDet on the 72 test pictures of BCCD, nothing trained "
        "after the cut; average precision at IoU 0.5, of all classes and of platelets.",
        "",
        "| run | sparsity of channels | parameters | precision | platelets |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        start = f"| {row['run']} | {row['sparsity']:.0%} |"
        if "failed" in row:
            lines.append(f"{start} does not take the network: {row['failed']} | | |")
        else:
            lines.append(f"{start} {row['parameters']:,} | {row['map50']:.3f} | {row['map50 Platelets']:.3f} |")
    return "\n".join(lines) + "\n"


def looked(model: nn.Module, task: Detection) -> dict[str, float]:
    with torch.no_grad():
        answer = model(*task.example.inputs)
    assert answer.shape == (1, 8, 22, 22), "it must still answer for every cell"
    return {**task.measure(model, "test"), "parameters": sum(p.numel() for p in model.parameters())}


if __name__ == "__main__":
    main()
