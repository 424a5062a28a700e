"""Ready-made tasks; data is opened here and nowhere else.

task = open_task("wikitext2", tokenizer=tokenizer, window=512)
task = open_task("cifar10", train_size=1000)
task = open_task("my/notes.txt", tokenizer=tokenizer)
"""

import inspect
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from secateur.errors import SettingError, TaskError, did_you_mean
from secateur.models.onnx import Network
from secateur.models.pipelines import Pipeline
from secateur.tasks import corpora, images, speech
from secateur.tasks.answers import Answers, answers
from secateur.tasks.captioned import Captioned, fashion_pairs
from secateur.tasks.corpora import Bytes, Characters, Tokenizer, from_path, from_text, python_docs, wikitext2
from secateur.tasks.detection import Detection, bccd
from secateur.tasks.divided import federated, forgetting, poisoned
from secateur.tasks.grammar import reber
from secateur.tasks.images import Images, cifar10, digits, fashion_mnist
from secateur.tasks.labelled import Labelled, device_of, evaluating
from secateur.tasks.learners import Adam, AdamW, Learner, Sgd
from secateur.tasks.prompts import Prompts, fashion_prompts, prompts
from secateur.tasks.rooms import Grounding, rooms
from secateur.tasks.speech import Speech, spoken_digits
from secateur.tasks.super_resolution import SuperResolution, super_resolution
from secateur.tasks.text import Text
from secateur.voxels.walk import Walks

__all__ = [
    "Adam",
    "AdamW",
    "Answers",
    "Bytes",
    "Captioned",
    "Characters",
    "Detection",
    "Grounding",
    "Images",
    "Labelled",
    "Learner",
    "Prompts",
    "Sgd",
    "Speech",
    "SuperResolution",
    "Text",
    "Tokenizer",
    "answers",
    "bccd",
    "cifar10",
    "digits",
    "fashion_mnist",
    "fashion_pairs",
    "fashion_prompts",
    "federated",
    "forgetting",
    "from_path",
    "from_text",
    "names",
    "open_task",
    "poisoned",
    "prompts",
    "python_docs",
    "reber",
    "rooms",
    "spoken_digits",
    "super_resolution",
    "wikitext2",
]

TEXTS: dict[str, Callable[..., Text]] = {
    "c4": corpora.c4,
    "python-docs": python_docs,
    "stackexchange": corpora.stackexchange,
    "tinyshakespeare": corpora.tinyshakespeare,
    "wikitext2": wikitext2,
}
LABELLED: dict[str, Callable[..., Labelled]] = {
    "cifar10": images.cifar10,
    "digits": images.digits,
    "fashion-mnist": images.fashion_mnist,
    "reber": reber,
    "spoken-digits": speech.spoken_digits,
}
KINDS: dict[str, type[Labelled]] = {"reber": Labelled, "spoken-digits": Speech}
"""Those that are not of images."""


SHARES = ("clients", "concentration")
"""Settings by which labelled examples are divided among devices."""

BYTES = 256
"""A model of so many tokens that has no tokenizer reads bytes."""

PAIRED: dict[str, Callable[..., Captioned]] = {"captions": fashion_pairs}


ENLARGED: dict[str, Callable[..., SuperResolution]] = {"super-resolution": super_resolution}


FOUND: dict[str, Callable[..., Detection]] = {"bccd": bccd}


GROUNDED: dict[str, Callable[..., Grounding]] = {"rooms": rooms}


DRAWN: dict[str, Callable[..., Prompts]] = {"fashion-prompts": fashion_prompts, "prompts": prompts}


def names() -> list[str]:
    """Every ready-made task by name, sorted."""
    return sorted([*TEXTS, *LABELLED, *PAIRED, *ENLARGED, *FOUND, *GROUNDED, *DRAWN, "answers"])


def open_task(
    name: str,
    *,
    tokenizer: Tokenizer | None = None,
    model: nn.Module | None = None,
    seed: int = 0,
    **settings: Any,
) -> Text | Labelled | Captioned | SuperResolution | Detection | Grounding | Prompts | Answers:
    """A ready-made task by name, or one over a text file or folder by path.

    `settings` are the scalars of the task (window, batch, windows, samples; train_size, val_size, test_size, flat,
    augment; scale, patch, side) and `learning_rate`; numbers may come as text. Labelled examples are divided among
    `clients` in shares of a `concentration`: see federated. With a `model`, the window is cut to what it can take, the
    scale is the model's, and the data is checked against it. Raises TaskError for an unknown name or data that does not
    fit, SettingError for an unknown setting.
    """
    given = {key: _scalar(value) for key, value in settings.items()}
    if name == "answers":
        return _answered(model, seed, given)
    if name in DRAWN or isinstance(model, Pipeline):
        return _drawn(name, model, seed, given)
    rate, shares = given.pop("learning_rate", None), {}
    if name in LABELLED:
        _check(name, given, LABELLED[name], KINDS.get(name, Images))
        _refuse(name, model, text=name == "reber")
        shares = _shares(name, {key: given.pop(key) for key in SHARES if key in given})
        task: Text | Labelled | Captioned | SuperResolution | Detection | Grounding = LABELLED[name](seed=seed, **given)
    elif name in ENLARGED:
        _check(name, given, ENLARGED[name], SuperResolution)
        _refuse(name, model, text=False)
        scale = getattr(model, "scale", None)
        task = ENLARGED[name](seed=seed, **{**({"scale": scale} if isinstance(scale, int) else {}), **given})
    elif name in FOUND:
        _check(name, given, FOUND[name], Detection)
        _refuse(name, model, text=False)
        task = FOUND[name](seed=seed, **given)
    elif name in GROUNDED:
        _check(name, given, GROUNDED[name], Grounding)
        task = GROUNDED[name](seed=seed, **given)
    elif name in PAIRED:
        _check(name, given, PAIRED[name], Captioned)
        size = _sides(name, model)
        task = PAIRED[name](tokenizer, seed=seed, **({"size": size} if size else {}), **given)
    elif name in TEXTS or (name.strip() and Path(name).exists()):
        make: Callable[..., Text] = TEXTS.get(name, from_path)
        _check(name, given, make, Text)
        _refuse(name, model, text=True)
        longest = _config(model, "max_position_embeddings")
        if tokenizer is None and _config(model, "vocab_size") == BYTES:
            tokenizer = Bytes()
        if "window" not in given and longest:
            usual = inspect.signature(make).parameters.get("window")
            given["window"] = min(longest, usual.default if usual else 512)
        first = (tokenizer,) if name in TEXTS else (name, tokenizer)
        task = make(*first, seed=seed, **given)
    else:
        advice = did_you_mean(name, names()) + " Or give the path of a text file or folder."
        raise TaskError(f"task {name!r} was asked for", "there is none of that name, nor a file", advice)
    if model is not None:
        _fits(task, model)
    if rate is not None:
        task = replace(task, learner=replace(task.learner, rate=float(rate)))  # type: ignore[type-var]
    return federated(cast(Labelled, task), **shares) if shares else task


def _shares(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """How examples are to be divided. Raises SettingError for what is no number of clients, or no concentration."""
    clients, concentration = given.get("clients", 1), given.get("concentration", 1.0)
    if isinstance(clients, bool) or not isinstance(clients, int) or clients < 1:
        raise SettingError(
            f"clients {clients!r} of task {name!r} was given",
            "it is not a whole number above 0",
            "Give one, such as 8.",
        )
    if isinstance(concentration, bool) or not isinstance(concentration, (int, float)) or not concentration > 0:
        raise SettingError(
            f"concentration {concentration!r} of task {name!r} was given",
            "it is not a number above 0",
            "Give 0.5, say.",
        )
    return given


def _answered(model: nn.Module | None, seed: int, given: dict[str, Any]) -> Answers:
    """The answers of the network of an ONNX file."""
    if not isinstance(model, Network):
        raise TaskError(
            "task 'answers' was asked for",
            "it asks the network of an ONNX file for answers",
            f"Give such a file, or one of: {', '.join(names())}.",
        )
    rate = given.pop("learning_rate", None)
    for key in given:
        if key not in ("inputs", "samples"):
            raise SettingError(
                f"setting {key!r} of task 'answers' was given",
                "it has none of that name",
                did_you_mean(key, ["inputs", "samples", "learning_rate"]),
            )
    task = answers(model, seed=seed, **given)
    return task if rate is None else replace(task, learner=replace(cast(Any, task.learner), rate=float(rate)))


def _drawn(name: str, model: nn.Module | None, seed: int, given: dict[str, Any]) -> Prompts:
    """Captions for a pipeline to draw: a ready-made task, or the lines of a text file."""
    rate = given.pop("learning_rate", None)
    if model is None:
        raise TaskError(
            f"task {name!r} was asked for", "it needs the pipeline that draws", "Give open_task its model as well."
        )
    if name not in DRAWN and not Path(name).is_file():
        raise TaskError(
            f"task {name!r} was asked for",
            "there is none of that name that pictures are drawn for, nor a file of captions",
            did_you_mean(name, DRAWN),
        )
    file = {} if name in DRAWN else {"file": name}
    made: Callable[..., Prompts] = DRAWN.get(name, prompts)
    known = {f.name for f in fields(Prompts) if f.init} - {"name", "splits", "pipeline", "dense", "judge", "clients"}
    for key in given:
        if key not in known - {"learner", "seed"}:
            raise SettingError(
                f"setting {key!r} of task {name!r} was given",
                "it has none of that name",
                did_you_mean(key, [*known - {"learner", "seed"}, "learning_rate"]),
            )
    task = made(model=model, seed=seed, **file, **given)
    return task if rate is None else replace(task, learner=replace(cast(Any, task.learner), rate=float(rate)))


def _scalar(value: Any) -> Any:
    """Text as the number, truth value or nothing it spells, if it spells one."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "false": False, "none": None, "null": None}
    if value.lower() in words:
        return words[value.lower()]
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value


def _check(
    name: str,
    given: dict[str, Any],
    make: Callable[..., Any],
    kind: type[Text] | type[Labelled] | type[Captioned] | type[SuperResolution] | type[Detection] | type[Grounding],
) -> None:
    """Raise SettingError for a setting that a task does not have."""
    inner = {"name", "ids", "mask", "size", "splits", "clients", "scale", "mean", "std", "seed", "classes", "taken"}
    known = {f.name for f in fields(kind) if f.init} - inner
    own = inspect.signature(make).parameters.values()
    known |= {p.name for p in own if p.kind is p.KEYWORD_ONLY}
    known |= set(SHARES) if issubclass(kind, Labelled) else set()
    for key, value in given.items():
        if key in known and key != "calibration" and isinstance(value, str):
            raise SettingError(
                f"{key} {value!r} of task {name!r} was given", "it is not a number", "Give one, such as 128."
            )
        if key not in known:
            raise SettingError(
                f"setting {key!r} of task {name!r} was given",
                "it has none of that name",
                did_you_mean(key, [*known, "learning_rate"]),
            )


def _sides(name: str, model: nn.Module | None) -> int | None:
    """Height and width of the pictures a model of two towers takes. Raises TaskError for a model of another kind."""
    if model is None:
        return None
    sees, reads = _config(model, "vision_config"), _config(model, "text_config")
    if sees is None or reads is None:
        raise TaskError(
            f"task {name!r} was asked for",
            f"{type(model).__name__} does not take pictures and text together",
            "Give a model with a tower for each, such as CLIP.",
        )
    size = getattr(sees, "image_size", None)
    return size if isinstance(size, int) else None


def _config(model: nn.Module | None, key: str) -> Any:
    config = getattr(model, "config", None)
    return getattr(config, key, None)


def _refuse(name: str, model: nn.Module | None, *, text: bool) -> None:
    """Raise TaskError for text with a network that takes images, the other way round, and either with clouds."""
    if model is None:
        return
    if isinstance(model, Walks):
        raise TaskError(
            f"task {name!r} was asked for",
            f"{type(model).__name__} takes clouds of points with sentences",
            f"Give one of: {', '.join(sorted(GROUNDED))}.",
        )
    sees = _config(model, "num_channels") is not None or any(isinstance(m, nn.Conv2d) for m in model.modules())
    reads = any(isinstance(m, nn.Embedding) for m in model.modules())
    if text and sees and not reads:
        raise TaskError(
            f"task {name!r} was asked for",
            f"{type(model).__name__} takes images",
            f"Give one of: {', '.join(sorted(LABELLED))}.",
        )
    if not text and reads and not sees:
        raise TaskError(
            f"task {name!r} was asked for",
            f"{type(model).__name__} takes token ids",
            f"Give one of: {', '.join(sorted(TEXTS))}, or the path of a text.",
        )


def _fits(task: Text | Labelled | Captioned | SuperResolution | Detection | Grounding, model: nn.Module) -> None:
    """Raise TaskError when a model has no room for the task's tokens, classes or pixels."""
    if isinstance(task, Detection):
        with evaluating(model):
            task.answered(model, task.example.to(device_of(model)))
        return
    if isinstance(task, Grounding):
        if not isinstance(model, Walks):
            raise TaskError(
                f"task {task.name!r} was asked for",
                f"{type(model).__name__} takes no clouds of points with sentences",
                "Give a model for grounding, such as grounder.",
            )
        return
    if isinstance(task, SuperResolution):
        with evaluating(model):
            task.drawn(model, task.example.to(device_of(model)))
        return
    if isinstance(task, Captioned):
        text = _config(model, "text_config")
        words, most = getattr(text, "vocab_size", None), int(task.ids.max())
        longest = getattr(text, "max_position_embeddings", None) or task.ids.shape[-1]
        if (words is not None and most >= words) or task.ids.shape[-1] > longest:
            raise TaskError(
                f"task {task.name!r} was asked for",
                f"captions have up to {task.ids.shape[-1]} tokens, the largest {most:,}, and the model takes {longest} "
                f"and knows {words:,}",
                "Give the tokenizer that belongs to the model.",
            )
        return
    if isinstance(task, Text):
        words, most = _config(model, "vocab_size"), max(int(stream.max()) for stream in task.ids.values())
        if words is not None and most >= words:
            raise TaskError(
                f"task {task.name!r} was asked for",
                f"the tokenizer gives token {most:,} and the model knows {words:,} tokens",
                "Give the tokenizer that belongs to the model.",
            )
        return
    size, channels = _config(model, "image_size"), _config(model, "num_channels")
    shape = tuple(task.splits["test"][0].shape)
    if isinstance(size, int) and channels is not None and shape[1:] != (channels, size, size):
        raise TaskError(
            f"task {task.name!r} was asked for",
            f"its images are {list(shape[1:])} and the model takes {[channels, size, size]}",
            "Choose a task whose images fit.",
        )
