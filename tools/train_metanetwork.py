"""Trains a metanetwork on small residual networks, for `secateur prune ... meta_pruning --source "kept(path='...')"`.

    python -m tools.train_metanetwork                    writes ~/.cache/secateur/metanetwork-....safetensors
    python -m tools.train_metanetwork --depth 8 --width 8 --networks 4 --passes 30

Networks of the CIFAR-10 kind on Fashion-MNIST are trained from different initial weights, and the metanetwork on them;
of a few points on the way the one is kept that leaves most of validation accuracy in a network pruned to half of its
multiply-adds. What it took is said, and stands in a JSON file beside it. A metanetwork knows no sizes: one made here
takes deeper and wider networks of 3x3 kernels too, though it was not trained for them.
"""

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from secateur.axes.metanetwork import Metanetwork
from secateur.axes.rewinding import reinitialize_
from secateur.methods.meta_pruning import Grouped, MetaTraining, best
from secateur.models.resnet import CifarResNet
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Sgd
from secateur.tasks.pack import cache

SETTINGS: Mapping[str, Any] = {
    "depth": 8,
    "width": 8,
    "images": 6000,
    "batch": 64,
    "rate": 0.05,
    "networks": 4,
    "first": 240,
    "passes": 24,
    "batches": 2,
    "strength": 0.1,
    "step": 0.05,
    "flops": 0.5,
}


def say(line: str) -> None:
    """Tell whoever watches, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def task_of(settings: Mapping[str, Any], seed: int) -> Task:
    """Fashion-MNIST at these settings."""
    return fashion_mnist(
        train_size=settings["images"], val_size=1000, seed=seed, batch=settings["batch"],
        learner=Sgd(settings["rate"], decay=5e-4),
    )  # fmt: skip


def network(settings: Mapping[str, Any], seed: int) -> CifarResNet:
    """A residual network with initial weights from a seed."""
    model = CifarResNet(settings["depth"], width=settings["width"], channels=1)
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


def metanetwork(settings: Mapping[str, Any], seed: int = 1000) -> tuple[Metanetwork, dict[str, float]]:
    """The metanetwork of these settings, and what it took: as it is kept, or trained now and kept."""
    known = {key: settings[key] for key in SETTINGS}
    digest = hashlib.sha256(json.dumps([known, seed], sort_keys=True).encode()).hexdigest()[:12]
    place = cache() / f"metanetwork-{digest}.safetensors"
    about = place.with_suffix(".json")
    if place.is_file() and about.is_file():
        return Metanetwork.load(place), json.loads(about.read_text())
    training = MetaTraining(
        networks=known["networks"], first=known["first"], steps=known["passes"], batches=known["batches"],
        strength=known["strength"], step=known["step"], pull=Grouped(), looks=8,
    )  # fmt: skip
    task, begun = task_of(known, seed), time.perf_counter()
    networks = training.seen(network(known, seed), task)
    seen = time.perf_counter()
    made, candidates, history = training.train(networks, task)
    step, quality = best(made, candidates, networks[0], task, known["flops"])
    took = {
        "seconds for networks": seen - begun,
        "seconds for the metanetwork": time.perf_counter() - seen,
        "optimizer steps for networks": float(known["networks"] * known["first"]),
        "steps of the metanetwork": float(len(history.losses)),
        "batches of the metanetwork": float(len(history.losses) * known["batches"]),
        "pass taken": float(step),
        "validation accuracy": quality,
        "first loss": history.losses[0],
        "last loss": history.losses[-1],
    }
    place.parent.mkdir(parents=True, exist_ok=True)
    made.save(place)
    partial = about.with_name(f"{about.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(took, indent=1) + "\n")
    os.replace(partial, about)
    return made, took


def main(arguments: list[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, value in SETTINGS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--out", type=Path, help="where to write it as well")
    given = vars(parser.parse_args(arguments))
    out = given.pop("out")
    made, took = metanetwork(given)
    for name, value in took.items():
        say(f"{name:32s} {value:.4g}")
    if out is not None:
        made.save(out)
    say(f"kept in {cache()}" + (f", and as {out}" if out else ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
