"""Captions to be drawn: for pipelines that turn text into pictures.

Nothing here judges a picture as a person would. `distance` is how far a picture has moved from the one the dense
pipeline draws of the same noise; on Fashion-MNIST a small classifier trained on its photographs stands in for the
networks that papers use: `frechet` is the Frechet distance in its features (for Inception's in FID), `agreement` the
share of pictures that it takes for what the caption says (for CLIPScore). Compare them at equal numbers only.
"""

import base64
import copy
import os
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.models.pipelines import Pipeline
from secateur.outcome import Pictures
from secateur.task import Batch, Task, generator, stream
from secateur.tasks.images import fashion_mnist
from secateur.tasks.labelled import device_of, digest, evaluating, pieces
from secateur.tasks.learners import Adam, Learner
from secateur.tasks.pack import cache

CLASSES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
"""What Fashion-MNIST's labels stand for."""

TEMPLATES = (
    "a photo of {}", "a picture of {}", "an image of {}", "{}", "this is {}", "here is {}", "a small photo of {}",
    "a grey photo of {}", "a good photo of {}", "a photo of {} on black", "{} in a shop", "{} for sale", "look at {}",
)  # fmt: skip
"""Ways to ask for something; the denoiser of the data pack was trained on the first."""

EVERYDAY = (
    "a photo of a cat on a sofa", "a dog running on a beach", "a bowl of fruit on a wooden table",
    "a red bus on a city street", "a man riding a bicycle", "a woman holding an umbrella in the rain",
    "a plate of food with vegetables", "a small boat on a lake", "a train at a station", "two horses in a field",
    "a kitchen with a white stove", "a clock tower under a blue sky", "a child flying a kite", "a stack of books",
    "a snowy mountain at sunset", "a vase of yellow flowers", "a surfer on a wave", "an old car on a country road",
    "a pizza on a table", "a bird sitting on a branch",
)  # fmt: skip
"""Captions for pipelines that come without any."""


def with_article(name: str) -> str:
    """`a sneaker`, `an ankle boot`."""
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


class Dense:
    """The pipeline as it was, kept until its pictures have been drawn."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = copy.deepcopy(pipeline)
        self._drawn: dict[tuple[Any, ...], Tensor] = {}

    def picture(self, captions: Sequence[str], **how: Any) -> Tensor:
        """The dense pipeline's pictures, drawn once."""
        key = (tuple(captions), *sorted(how.items()))
        if key not in self._drawn:
            self._drawn[key] = self._pipeline.picture(captions, **how)
        return self._drawn[key]


@dataclass(frozen=True, eq=False)
class Prompts:
    """Captions for a pipeline to draw, and how far its pictures are from those it drew before it was pruned."""

    name: str
    splits: Mapping[str, tuple[str, ...]]
    pipeline: Pipeline = field(repr=False)  # dense; asked for its tokens and its shape
    dense: Dense = field(repr=False)
    seed: int = 0  # of the noise that pictures start from, and of the order of calibration captions
    pictures: int = 8  # how many are drawn in a measurement
    steps: int = 25  # of the scheduler
    guidance: float = 7.5  # of classifier-free guidance; 1 is none
    batch: int = 32  # captions that go through together
    samples: int = 128  # calibration captions, where a method does not say how many
    judge: "Judge | None" = field(default=None, repr=False)
    learner: Learner = field(default_factory=Adam)
    clients: Sequence[Task] = ()
    higher_is_better: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        for name in ("pictures", "steps", "batch"):
            if getattr(self, name) < 1:
                raise TaskError(
                    f"{name}={getattr(self, name)} of {self.name} was given", "one is the least", f"Give {name}=8."
                )

    @property
    def metric(self) -> str:
        """The Frechet distance where there is a judge, else the distance to the dense pipeline's pictures."""
        return "distance" if self.judge is None else "frechet"

    @property
    def example(self) -> Batch:
        """Two captions with noise to be denoised, for tracing."""
        tokens = self.pipeline.tokens(self._split("val", 1) * 2)
        noise = torch.randn((2, *self.pipeline.shape), generator=stream(0, "example"))
        dtype = next(self.pipeline.parameters()).dtype
        return Batch({**tokens, "sample": noise.to(dtype), "timestep": torch.tensor([500, 100])})

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Captions, padded as at inference; for "train", photographs with noise and the noise as the target."""
        if split == "train":
            yield from self._training(n, epoch)
            return
        if split == "calibration":
            everything = self._split("calibration", None)
            n = min(self.samples, len(everything)) if n is None else n
            order = torch.randperm(len(everything), generator=generator(self, "calibration")).tolist()
            chosen = [everything[i] for i in order[:n]]
        else:
            chosen = list(self._split(split, n))
        if n is not None and n > len(chosen):
            raise TaskError(
                f"{n:,} captions of {self.name}'s {split!r} split were asked for",
                f"it holds {len(chosen):,}",
                "Ask for fewer, or give a longer file of captions.",
            )
        for start in range(0, len(chosen), self.batch):
            yield Batch(self.pipeline.tokens(chosen[start : start + self.batch]))

    def _split(self, split: str, n: int | None) -> tuple[str, ...]:
        if split not in self.splits:
            known = [*self.splits, *(["train"] if self.judge is not None else [])]
            raise TaskError(f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, known))
        return self.splits[split][:n]

    def _training(self, n: int | None, epoch: int) -> Iterator[Batch]:
        if self.judge is None:
            raise TaskError(
                f"{self.name} was to be trained on",
                "it holds captions and no photographs of what they say",
                "Prune without training, or give a task of your own (module:function).",
            )
        photos = fashion_mnist()
        images, labels = photos.splits["train"]
        draw = generator(self, f"train {epoch}")
        scheduler = self.pipeline.scheduler
        for place in pieces(torch.randperm(len(labels), generator=draw)[:n], self.batch):
            clean = images[place].float() / 127.5 - 1
            noise = torch.randn(clean.shape, generator=draw)
            t = torch.randint(scheduler.config.num_train_timesteps, (len(place),), generator=draw)
            tokens = self.pipeline.tokens([TEMPLATES[0].format(with_article(CLASSES[i])) for i in labels[place]])
            yield Batch({**tokens, "sample": scheduler.add_noise(clean, noise, t), "timestep": t}, noise)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean squared error of the predicted noise. Raises TaskError for captions without photographs."""
        if batch.target is None:
            raise TaskError(
                f"a loss of {self.name} was asked for",
                "these are captions without photographs",
                "Use a criterion without gradients, such as magnitude or wanda.",
            )
        batch = batch.to(device_of(model))
        return F.mse_loss(batch.through(model).float(), batch.target.float())

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"distance", "pictures", "steps", "guidance"}, and {"frechet", "agreement"} with a judge.

        `distance` is the root of the mean squared difference of pixels in [0, 1] to the dense pipeline's pictures of
        the same noise, averaged over pictures.
        """
        captions = self._asked(split)
        with evaluating(model):
            drawn = _pipeline(model).picture(captions, **self._how)
        before = self.dense.picture(captions, **self._how)
        apart = (drawn - before).square().flatten(1).mean(1).sqrt()
        found = {"distance": float(apart.mean())}
        if self.judge is not None:
            wanted = torch.tensor([CLASSES.index(_class_of(c)) for c in captions])
            found |= self.judge.measure(drawn, wanted)
        return found | {"pictures": float(len(captions)), "steps": float(self.steps), "guidance": self.guidance}

    def draw(self, model: nn.Module, of: str, most: int = 10) -> Pictures:
        """A row of the report: the first few captions, each from the same noise whatever the model."""
        captions = list(dict.fromkeys(self._asked("val")))[:most]
        with evaluating(model):
            drawn = _pipeline(model).picture(captions, **{**self._how, "batch": len(captions)})
        return Pictures(of, captions, base64.b64encode(png(strip(drawn))).decode())

    def _asked(self, split: str) -> list[str]:
        held = self._split(split, None)
        return [held[i % len(held)] for i in range(self.pictures)]

    @property
    def _how(self) -> dict[str, Any]:
        return {"seed": self.seed, "steps": self.steps, "guidance": self.guidance, "batch": self.batch}

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the captions and the settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        names = ("name", "seed", "pictures", "steps", "guidance", "batch", "samples", "learner")
        plain = {n: getattr(self, n) for n in names}
        return digest(plain, {}, [f"{k}: {c}" for k, held in sorted(self.splits.items()) for c in held])


def _pipeline(model: nn.Module) -> Pipeline:
    if not isinstance(model, Pipeline):
        raise TaskError(
            f"pictures of a {type(model).__name__} were asked for",
            "it turns no text into pictures",
            "Give a diffusers folder, or fashion-diffusion.",
        )
    return model


# Ready-made


def prompts(*, model: nn.Module, file: str | None = None, seed: int = 0, **settings: Any) -> Prompts:
    """Captions of everyday things, or the lines of a text file; the first half calibrates, the rest is drawn.

    `settings` are fields of `Prompts`. Raises TaskError for a model that draws nothing, or fewer than two captions.
    """
    pipeline = _pipeline(model)
    lines: Sequence[str] = EVERYDAY
    if file is not None:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaskError(f"captions were to be read from {file}", str(error), "Give a text file.") from error
        lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) < 2:
        raise TaskError(f"captions of {file} were asked for", f"it holds {len(lines)}", "Give one caption a line.")
    half = len(lines) // 2
    splits = {"calibration": tuple(lines[:half]), "val": tuple(lines[half:]), "test": tuple(lines[half:])}
    name = "prompts" if file is None else Path(file).name
    return Prompts(name, splits, pipeline, Dense(pipeline), seed=seed, **settings)


def fashion_prompts(*, model: nn.Module, seed: int = 0, **settings: Any) -> Prompts:
    """`a photo of a sneaker`: ten kinds of clothes to be drawn in 28x28 pixels, judged by a classifier.

    `settings` are fields of `Prompts`; 100 pictures in 10 steps with guidance 2 unless they say otherwise. The
    classifier is trained on Fashion-MNIST at first use, in about a minute, and kept (see `judge`).
    """
    pipeline = _pipeline(model)
    asked = tuple(TEMPLATES[0].format(with_article(name)) for name in CLASSES)
    splits = {
        "calibration": tuple(t.format(with_article(name)) for t in TEMPLATES for name in CLASSES),
        "val": asked,
        "test": asked,
    }
    usual = {"pictures": 100, "steps": 10, "guidance": 2.0, "batch": 100}
    return Prompts(
        "fashion-prompts", splits, pipeline, Dense(pipeline), seed=seed, judge=judge(), **{**usual, **settings}
    )


def _class_of(caption: str) -> str:
    return max((name for name in CLASSES if caption.endswith(f" {name}")), key=len)


# What stands in for Inception and CLIP


def frechet(first: Tensor, second: Tensor) -> float:
    """The Frechet distance of two sets of features [n, d], [m, d] taken for Gaussians.

    |m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)); Dowson and Landau 1982. Few examples bias it upwards: compare at equal
    numbers only.
    """
    a, b = first.double(), second.double()
    left, right = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(a.shape[1], -1)
    values, vectors = torch.linalg.eigh(left)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ right @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return float(apart + left.trace() + right.trace() - 2 * cross)


class Judge(nn.Module):
    """A small network that tells Fashion-MNIST's ten classes apart: pictures [n, 1, 28, 28] in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.see = nn.Sequential(
            nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(32 * 49, 32), nn.ReLU(),
        )  # fmt: skip
        self.name = nn.Linear(32, len(CLASSES))
        self.register_buffer("real", torch.zeros(2000, 32))  # features of photographs it was not trained on
        self.register_buffer("accuracy", torch.zeros(()))  # on the test photographs

    def forward(self, pictures: Tensor) -> Tensor:
        """Logits [n, 10]."""
        return self.name(self.see((pictures - 0.286) / 0.353))

    @torch.no_grad()
    def measure(self, pictures: Tensor, wanted: Tensor) -> dict[str, float]:
        """{"frechet", "agreement", "judge_accuracy"} of pictures [n, 1, 28, 28] and the classes asked for [n]."""
        features = self.see((pictures - 0.286) / 0.353)
        right = (self.name(features).argmax(-1) == wanted).float().mean()
        real: Any = self.real
        return {
            "frechet": frechet(features, real),
            "agreement": float(right),
            "judge_accuracy": float(self.accuracy),  # type: ignore[arg-type]
        }


@lru_cache(maxsize=1)
def judge(epochs: int = 3) -> Judge:
    """The judge, trained on 55,000 photographs from a fixed seed, or as it was kept."""
    from safetensors.torch import load_file, save_file

    photos, place = fashion_mnist(), cache() / f"fashion-judge-{epochs}.safetensors"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = Judge()
    if place.is_file():
        made.load_state_dict(load_file(str(place)))
        return made.eval()
    images, labels = photos.splits["train"]
    optimizer, order = torch.optim.Adam(made.parameters(), 1e-3), stream(0, "judge")
    for _ in range(epochs):
        for pick in pieces(torch.randperm(len(labels), generator=order), 128):
            optimizer.zero_grad()
            F.cross_entropy(made(images[pick].float() / 255), labels[pick].long()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    shown, named = photos.splits["test"]
    with torch.no_grad():
        right = torch.cat([made(x.float() / 255).argmax(-1) for x in pieces(shown, 1000)]) == named
        made.accuracy.fill_(right.float().mean())  # type: ignore[operator]
        made.real.copy_(made.see((shown[:2000].float() / 255 - 0.286) / 0.353))  # type: ignore[operator]
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{place.name}.{os.getpid()}.partial")
    save_file(made.state_dict(), str(partial))
    os.replace(partial, place)
    return made.eval()


# Pictures as a file


def strip(pictures: Tensor, most: int = 64) -> Tensor:
    """Pictures [n, channels, height, width] in [0, 1] side by side: uint8 [height, n * width, channels].

    Larger ones than `most` pixels a side are averaged down.
    """
    side = max(pictures.shape[-2:])
    if side > most:
        size = [max(1, round(s * most / side)) for s in pictures.shape[-2:]]
        pictures = F.interpolate(pictures, size=size, mode="area")
    whole = (pictures.clamp(0, 1) * 255).round().to(torch.uint8)
    return whole.permute(2, 0, 3, 1).reshape(whole.shape[2], -1, whole.shape[1]).contiguous()


def png(pixels: Tensor) -> bytes:
    """A PNG of pixels uint8 [height, width, 1 or 3]."""
    high, wide, channels = pixels.shape
    rows = torch.cat([torch.zeros(high, 1, dtype=torch.uint8), pixels.reshape(high, -1)], 1)  # no filter, row by row

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", wide, high, 8, {1: 0, 3: 2}[channels], 0, 0, 0)
    body = zlib.compress(rows.numpy().tobytes(), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
