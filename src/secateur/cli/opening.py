"""The model, the task and the method that a command line asks for."""

import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur.errors import SettingError, TaskError, did_you_mean
from secateur.method import check_fits, load, names
from secateur.models import Opened, open_model
from secateur.models.onnx import Network
from secateur.recipe import Recipe, build, is_recipe, read
from secateur.task import Around, Batch, Task
from secateur.tasks import names as task_names
from secateur.tasks import open_task

USUAL_TASKS = {
    "resnet20": "cifar10",
    "resnet32": "cifar10",
    "resnet56": "cifar10",
    "cells": "cifar10",
    "cells-grey": "fashion-mnist",
    "cells-small": "cifar10",
    "fastestdet": "bccd",
    "vgg": "cifar10",
    "mobilenet": "cifar10",
    "mobilenet-half": "cifar10",
    "mobilenet-quarter": "cifar10",
    "vit-tiny": "cifar10",
    "grounder": "rooms",
    "gru": "reber",
    "lstm": "reber",
    "gpt": "wikitext2",
    "vit-fashion": "fashion-mnist",
    "char-mixtral": "tinyshakespeare",
    "fashion-diffusion": "fashion-prompts",
}
"""What the models that have a name of their own were trained on, or are to be."""


class Moved(Around):
    """A task whose batches are on a device."""

    def __init__(self, task: Task, device: torch.device) -> None:
        super().__init__(task)
        self.device = device

    @property
    def example(self) -> Batch:
        """See Task."""
        return self.task.example.to(self.device)

    @property
    def clients(self) -> Sequence[Task]:
        """See Task."""
        return tuple(Moved(client, self.device) for client in self.task.clients)

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterable[Batch]:
        """See Task."""
        return (batch.to(self.device) for batch in self.task.batches(split, n, epoch))


def set_threads(threads: int | None) -> None:
    """Use so many threads, when a number is given."""
    if threads is not None:
        torch.set_num_threads(threads)


def device_named(device: str | None) -> torch.device:
    """A device that is there. Raises SettingError for any other."""
    name = device or "cpu"
    try:
        found = torch.device(name)
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        kinds = [
            "cpu",
            *(["cuda"] if torch.cuda.is_available() else []),
            *(["mps"] if torch.backends.mps.is_available() else []),
        ]
        reason = str(error).splitlines()[0].rstrip(".")
        raise SettingError(
            f"device {name!r} was asked for", f"it cannot be used ({reason})", did_you_mean(name, kinds)
        ) from None
    return found


def model_from(
    what: str, *, dtype: str | None, device: str | None, online: bool, offload: Path | None = None
) -> Opened:
    """Open a model as `open_model` does, on a device."""
    where = device_named(device)
    return open_model(what, dtype=dtype or "float32", device=where, offline=not online, offload=offload)


def task_from(opened: Opened, name: str | None, given: Mapping[str, Any], seed: int) -> Task:
    """The task asked for, or the model's usual one. Raises TaskError when neither is known or they do not fit."""
    name = name or usual_task(opened)
    task: Task
    function = re.fullmatch(r"([A-Za-z_][\w.]*):([A-Za-z_]\w*)", name)
    if function and not Path(name).exists():
        task = _task_of(name, function[1], function[2], opened, given, seed)
    else:
        task = open_task(name, tokenizer=opened.tokenizer, model=opened.model, seed=seed, **given)
    device = next((p.device for p in opened.model.parameters()), torch.device("cpu"))
    task = task if device.type == "cpu" else Moved(task, device)
    check_fits(opened.model, task)
    return task


def usual_task(opened: Opened) -> str:
    """The task a model is measured on when none is named."""
    if opened.name in USUAL_TASKS:
        return USUAL_TASKS[opened.name]
    if opened.family == "clip":
        return "captions"
    if opened.kind == "pipeline":
        return "prompts"
    if isinstance(opened.model, Network):
        return "answers"
    if opened.tokenizer is not None:
        return "python-docs"
    advice = f"Give --task: {', '.join(task_names())}, a text file, or module:function."
    raise TaskError(f"{opened.name} was to be run without a task", "it is no model whose usual data is known", advice)


def _task_of(name: str, module: str, attribute: str, opened: Opened, given: Mapping[str, Any], seed: int) -> Task:
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)  # as `python -m` does: a script beside the user is what they mean
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except ModuleNotFoundError as error:
        raise TaskError(
            f"task {name!r} was asked for", f"there is no module {error.name!r}", "Check the name."
        ) from None
    finally:
        if added and here in sys.path:
            sys.path.remove(here)
    if not callable(found):
        raise TaskError(f"task {name!r} was asked for", f"{module} has no function {attribute!r}", "Check the name.")
    accepted = inspect.signature(found).parameters
    offered = {"seed": seed, "model": opened.model, "tokenizer": opened.tokenizer}
    known = {k: v for k, v in offered.items() if k in accepted}
    open_ended = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for key in given:
        if key not in accepted and not open_ended:
            raise SettingError(
                f"setting {key!r} of task {name!r} was given", "it has none of that name", did_you_mean(key, accepted)
            )
    try:
        made = found(**known, **{k: _scalar(v) for k, v in given.items()})
    except TypeError as error:
        raise SettingError(
            f"task {name!r} with {dict(given)} was asked for", f"it says: {error}", "Check the names after --task."
        ) from error
    if not isinstance(made, Task):
        raise TaskError(
            f"task {name!r} was asked for", f"{attribute} returned a {type(made).__name__}", "Return a Task."
        )
    return made


def scalars(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as typed on a command line, with numbers and truth values as such."""
    return {key: _scalar(value) for key, value in given.items()}


def _scalar(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    spelt = {"true": True, "false": False, "none": None}
    if value.lower() in spelt:
        return spelt[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def recipe_from(method: str, given: Mapping[str, Any], overrides: Sequence[str], then: Sequence[str] = ()) -> Recipe:
    """What METHOD, its options, --set and --then ask for, as a recipe. Raises SettingError, with the nearest name."""
    later = tuple(build(load(name.replace("-", "_")), {}) for name in then)
    first = _first(method, given, overrides)
    return replace(first, steps=(*first.steps, *later))


def served_recipe(recipe: Recipe, serve: str | None, model: torch.nn.Module) -> tuple[Recipe, list[str]]:
    """A recipe held to what --serve loads, and what that gives up. Raises ExportError where it cannot be."""
    if serve is None:
        return recipe, []
    from secateur.export.serving import served

    found = [served(step, serve, model) for step in recipe.steps]
    return replace(recipe, steps=tuple(step for step, _ in found)), [said for _, given in found for said in given]


def calibrated_recipe(
    recipe: Recipe, method: str, given: Mapping[str, Any], overrides: Sequence[str], task: Task
) -> tuple[Recipe, list[str]]:
    """A recipe calibrated on all windows of a text that has fewer than a method takes by itself, and a note of that.

    What a recipe file says stays as it is. Raises TaskError, before anything is measured, where the command line asks
    for more.
    """
    from secateur.tasks.text import Text

    if not isinstance(task, Text) or is_recipe(method):
        return recipe, []
    asked = {*given, *(text.partition("=")[0].strip() for text in overrides)}
    there = len(task.ids.get("calibration", ())) // task.window
    steps, notes = list(recipe.steps), list[str]()
    for i, step in enumerate(steps):
        wanted = getattr(step, "samples", None)
        if "calibration" not in step.card.needs or not isinstance(wanted, int):
            continue
        if i == 0 and "samples" in asked:
            next(task.batches("calibration", wanted))
        elif 0 < there < wanted:
            steps[i] = replace(step, samples=there)  # type: ignore[type-var]  # Method does not say it is a dataclass
            notes.append(
                f"{step.name} is calibrated on {there:,} windows of {task.window:,} tokens instead of {wanted:,}: "
                f"{task.name} has no more."
            )
    return replace(recipe, steps=tuple(steps)), notes


def _first(method: str, given: Mapping[str, Any], overrides: Sequence[str]) -> Recipe:
    changes = [*(f"{key}={value}" for key, value in given.items()), *overrides]
    if is_recipe(method):
        return read(method, changes)
    name = method if method in names() else method.replace("-", "_")
    kind, values = load(name), dict(given)
    for text in overrides:
        key, sign, value = text.partition("=")
        if not sign:
            raise SettingError(f"--set {text} was given", "it is not key=value", "Write --set sparsity=0.3.")
        values[key.strip()] = value
    return Recipe((build(kind, values),))


__all__ = [
    "Moved",
    "calibrated_recipe",
    "device_named",
    "model_from",
    "recipe_from",
    "served_recipe",
    "set_threads",
    "task_from",
    "usual_task",
]
