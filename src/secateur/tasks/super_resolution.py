"""Drawing pictures larger: from one made small by bicubic interpolation, back to what it was.

One convention throughout, as results under others differ by tenths of a decibel: the answer is cut to [0, 1] and
rounded to 8 bits, luma is ITU-R BT.601's (16 to 235) of the colours, and as many pixels as the scale are left out
at each border. PSNR and SSIM (Wang et al. 2004: Gaussian windows of 11 pixels, whole ones) are means over
pictures.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.models.super_resolution import SCALES, Bicubic
from secateur.outcome import Pictures
from secateur.task import Batch, Task, generator
from secateur.tasks import images, pack
from secateur.tasks.labelled import device_of, digest, evaluating
from secateur.tasks.learners import Adam, Learner
from secateur.tasks.prompts import png, strip

PERFECT = 100.0
"""Decibels that a picture counts for at most: one without any error would have infinitely many."""


def smaller(pictures: Tensor, scale: int) -> Tensor:
    """Pictures uint8 [..., 3, h, w] made small by bicubic interpolation, rounded to 8 bits.

    Raises TaskError where the scale does not divide the sides.
    """
    high, wide = pictures.shape[-2:]
    if high % scale or wide % scale:
        raise TaskError(
            f"pictures of {high}x{wide} were to be made {scale} times smaller",
            f"{scale} does not divide both sides",
            f"Cut them to {high - high % scale}x{wide - wide % scale}.",
        )
    stacked = pictures.reshape(-1, *pictures.shape[-3:]).float()
    small = F.interpolate(stacked, (high // scale, wide // scale), mode="bicubic", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8).reshape(*pictures.shape[:-2], high // scale, wide // scale)


def luma(pictures: Tensor) -> Tensor:
    """ITU-R BT.601 luma, 16 to 235, of RGB [..., 3, h, w] in [0, 1]: [..., 1, h, w]."""
    weights = torch.tensor([65.481, 128.553, 24.966], dtype=pictures.dtype, device=pictures.device)
    return 16 + (pictures * weights.view(3, 1, 1)).sum(-3, keepdim=True)


def compared(drawn: Tensor, wanted: Tensor, border: int) -> tuple[Tensor, Tensor]:
    """PSNR in decibels and SSIM of the luma of each picture: [n] each, from RGB [n, 3, h, w] in [0, 1]."""
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError:
        raise TaskError(
            "the structural similarity of pictures was asked for",
            "torchmetrics is not installed",
            "pip install 'secateur[data]'",
        ) from None
    inside = (..., slice(border, -border), slice(border, -border))
    first, second = (luma((x.double().clamp(0, 1) * 255).round() / 255)[inside] for x in (drawn, wanted))
    if min(first.shape[-2:]) < 11:
        raise TaskError(
            f"pictures of {drawn.shape[-2]}x{drawn.shape[-1]} were to be compared, {border} pixels left out all round",
            "what is left is smaller than SSIM's window of 11 pixels",
            "Give larger pictures, or a smaller scale.",
        )
    error = (first - second).square().flatten(1).mean(1)
    psnr = (10 * torch.log10(255**2 / error)).clamp(max=PERFECT)
    whole = structural_similarity_index_measure(
        first.float(), second.float(), data_range=255.0, sigma=1.5, reduction="none", return_full_image=True
    )[1]
    # Where windows reach over the edge the library mirrors the picture; the published code leaves them out.
    ssim = torch.as_tensor(whole)[..., 5:-5, 5:-5].flatten(1).mean(1)
    return psnr, ssim.to(psnr.dtype)


@dataclass(frozen=True, eq=False)
class SuperResolution:
    """Pictures to be drawn from small ones; the loss is the mean absolute difference of their pixels.

    `splits` maps "train", "val", "test" and any other name to pictures: uint8 RGB [N, 3, h, w], or a sequence of
    [3, h, w] of any sizes that the scale divides. "calibration" is drawn from "train" by the seed, unless there is a
    split of that name. A model takes [batch, 3, h / scale, w / scale] in [0, 1].
    """

    name: str
    splits: Mapping[str, Tensor | Sequence[Tensor]]
    scale: int = 2
    patch: int = 64  # pixels a side of the squares that are trained on; no more than pictures have
    seed: int = 0
    batch: int = 16  # pictures that go through a model together
    samples: int = 64  # calibration pictures, where a method does not say how many
    gallery: str = "val"  # split whose first pictures a report shows
    shown: int = 8  # how many
    view: int = 96  # pixels a side that are drawn of each, from its middle
    learner: Learner = field(default_factory=lambda: Adam(2e-4, (0.9, 0.99)))
    clients: Sequence[Task] = ()
    metric: str = field(default="psnr", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.scale not in SCALES:
            raise TaskError(
                f"{self.name} with a scale of {self.scale} was asked for", "pictures grow 2 to 4 times", "Give scale=2."
            )
        for count in ("patch", "batch", "samples", "shown", "view"):
            least = 11 + 2 * self.scale if count == "view" else 1
            if getattr(self, count) < least:
                raise TaskError(
                    f"{self.name} with {count}={getattr(self, count)} was asked for",
                    f"{least} is the least",
                    f"Give {count}={max(least, 32)}, say.",
                )
        if self.patch % self.scale:
            raise TaskError(
                f"{self.name} with patches of {self.patch} pixels was asked for",
                f"the scale of {self.scale} does not divide them",
                f"Give patch={max(self.patch // self.scale, 1) * self.scale}.",
            )
        for split, pictures in self.splits.items():
            for picture in pictures[:1] if isinstance(pictures, Tensor) else pictures:
                if picture.dtype != torch.uint8 or picture.dim() != 3 or len(picture) != 3:
                    raise TaskError(
                        f"split {split!r} of {self.name} was given pictures {list(picture.shape)} of {picture.dtype}",
                        "they are RGB [3, height, width] of 8 bits",
                        "Give uint8 with the colours first.",
                    )
                if picture.shape[-2] % self.scale or picture.shape[-1] % self.scale:
                    raise TaskError(
                        f"split {split!r} of {self.name} was given a picture of {list(picture.shape[-2:])}",
                        f"the scale of {self.scale} does not divide both sides",
                        "Cut its sides to multiples of the scale.",
                    )

    @property
    def example(self) -> Batch:
        """One picture of the first split, for tracing."""
        return self._batch([self._pair(next(iter(self.splits)), 0)])

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of a split, up to n pictures; raises TaskError when there are fewer.

        Those of "train" and "calibration" are patches from anywhere, in training mirrored and turned; the others are
        whole, and only pictures of one size go together.
        """
        held = "train" if split == "calibration" and split not in self.splits else split
        count = self._count(held)
        n = min(self.samples, count) if split == "calibration" and n is None else n
        if n is not None and n > count:
            raise TaskError(
                f"{n:,} pictures of {self.name}'s {split!r} split were asked for",
                f"it holds {count:,}",
                "Ask for fewer, or give more data.",
            )
        if split not in ("train", "calibration"):
            yield from (self._batch(pairs) for pairs in self._whole(held, n))
            return
        draw = generator(self, f"train {epoch}" if split == "train" else "calibration")
        order = torch.randperm(count, generator=draw)[:n].tolist()
        for start in range(0, len(order), self.batch):
            pairs = [self._anywhere(self._pair(held, i), draw) for i in order[start : start + self.batch]]
            if split == "train":
                pairs = [_turned(pair, draw) for pair in pairs]
            for together in _alike(pairs):
                yield self._batch(together)

    def _whole(self, split: str, n: int | None = None) -> Iterator[list[tuple[Tensor, Tensor]]]:
        count = self._count(split) if n is None else n
        for start in range(0, count, self.batch):
            yield from _alike([self._pair(split, i) for i in range(start, min(start + self.batch, count))])

    def _count(self, split: str) -> int:
        if split not in self.splits:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.splits)
            )
        if not len(self.splits[split]):
            raise TaskError(f"split {split!r} of {self.name} was asked for", "it is empty", "Give it pictures.")
        return len(self.splits[split])

    def _pair(self, split: str, place: int) -> tuple[Tensor, Tensor]:
        """A picture made small, and as it is: uint8 [3, h / scale, w / scale] and [3, h, w]."""
        return self._small[split][place], self.splits[split][place]

    @cached_property
    def _small(self) -> dict[str, Tensor | list[Tensor]]:
        made: dict[str, Tensor | list[Tensor]] = {}
        for split, held in self.splits.items():
            if isinstance(held, Tensor):
                made[split] = torch.cat([smaller(some, self.scale) for some in torch.split(held, 1000)])
            else:
                made[split] = [smaller(picture, self.scale) for picture in held]
        return made

    def _cut(self, pair: tuple[Tensor, Tensor], side: int, corner: Sequence[int]) -> tuple[Tensor, Tensor]:
        """A patch of a pair, from one place in both; side and corner are of the small picture."""
        low, high = pair
        top, left = corner
        s, down, right = self.scale, top + side, left + side
        return low[:, top:down, left:right], high[:, s * top : s * down, s * left : s * right]

    def _anywhere(self, pair: tuple[Tensor, Tensor], draw: torch.Generator) -> tuple[Tensor, Tensor]:
        """A patch of a pair, from a place that is drawn."""
        sizes = pair[0].shape[-2:]
        side = min(self.patch // self.scale, *sizes)
        corner = [int(torch.randint(size - side + 1, (), generator=draw)) for size in sizes]
        return self._cut(pair, side, corner)

    def _batch(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Batch:
        low, high = (torch.stack(side).float() / 255 for side in zip(*pairs, strict=True))
        return Batch((low,), high)

    def drawn(self, model: nn.Module, batch: Batch) -> Tensor:
        """What a model draws, float32 [batch, 3, h, w]; raises TaskError for another size than was wanted."""
        answer = batch.through(model)
        answer = getattr(answer, "reconstruction", answer)  # transformers' name for it
        if not isinstance(answer, Tensor) or answer.shape != batch.target.shape:
            found = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise TaskError(
                f"{type(model).__name__} was to draw pictures {self.scale} times as large",
                f"its answer is {found}, and {list(batch.target.shape)} was wanted",
                "Give a model for this scale, or a task with the model's scale.",
            )
        return answer.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean absolute difference of pixels in [0, 1]."""
        batch = batch.to(device_of(model))
        return F.l1_loss(self.drawn(model, batch), batch.target.float())

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"psnr" in decibels, "ssim", "loss", "scale", "pictures"}: of luma, without `scale` pixels at the borders."""
        count, device = self._count(split), device_of(model)
        total = torch.zeros(3, dtype=torch.float64)
        with evaluating(model):
            for pairs in self._whole(split):
                batch = self._batch(pairs).to(device)
                drawn = self.drawn(model, batch)
                psnr, ssim = compared(drawn, batch.target, self.scale)
                loss = (drawn - batch.target).abs().flatten(1).double().mean(1)
                total += torch.stack([psnr.sum(), ssim.sum(), loss.sum()]).cpu()
        values = dict(zip(("psnr", "ssim", "loss"), (total / count).tolist(), strict=True))
        return {**values, "scale": float(self.scale), "pictures": float(count)}

    def references(self) -> list[Pictures]:
        """What a model is to draw, and what interpolation makes of the same small pictures: rows of a report."""
        wanted = [high.float() / 255 for _, high in self._gallery()]
        return [_row(wanted, "as photographed"), self.show(Bicubic(self.scale), "bicubic")]

    def show(self, model: nn.Module, of: str) -> Pictures:
        """What a model draws of the gallery, with its mean PSNR there: a row of a report."""
        pictures, decibels = [], []
        with evaluating(model):
            for pair in self._gallery():
                batch = self._batch([pair]).to(device_of(model))
                drawn = self.drawn(model, batch)
                pictures.append(drawn[0].cpu())
                decibels += compared(drawn, batch.target, self.scale)[0].tolist()
        return _row(pictures, f"{of}, {sum(decibels) / len(decibels):.2f} dB")

    def _gallery(self) -> list[tuple[Tensor, Tensor]]:
        """The middle of the pictures that are shown, squares of one size: small, and as they are."""
        pairs = [self._pair(self.gallery, i) for i in range(min(self.shown, self._count(self.gallery)))]
        side = min(self.view // self.scale, *(size for low, _ in pairs for size in low.shape[-2:]))
        return [self._cut(pair, side, [(size - side) // 2 for size in pair[0].shape[-2:]]) for pair in pairs]

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the pictures and the settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("splits", "clients")}
        held = {
            f"{split} {i}": picture
            for split, pictures in sorted(self.splits.items())
            for i, picture in enumerate([pictures] if isinstance(pictures, Tensor) else pictures)
        }
        return digest(plain, held, [c.fingerprint() for c in self.clients])


def _turned(pair: tuple[Tensor, Tensor], draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Both squares of a pair mirrored or not, and turned by a multiple of 90 degrees."""
    mirrored, quarters = bool(torch.randint(2, (), generator=draw)), int(torch.randint(4, (), generator=draw))
    low, high = (torch.rot90(x, quarters, (1, 2)) for x in pair)
    return (low.flip(2), high.flip(2)) if mirrored else (low, high)


def _alike(pairs: Sequence[tuple[Tensor, Tensor]]) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Neighbours of one size together, in the order they come in."""
    held: list[tuple[Tensor, Tensor]] = []
    for pair in pairs:
        if held and pair[1].shape != held[0][1].shape:
            yield held
            held = []
        held.append(pair)
    if held:
        yield held


def _row(pictures: Sequence[Tensor], of: str) -> Pictures:
    """Squares [3, side, side] in [0, 1] as a row of a report."""
    captions = [f"picture {i + 1}" for i in range(len(pictures))]
    side = pictures[0].shape[-1]
    return Pictures(of, captions, base64.b64encode(png(strip(torch.stack(list(pictures)), most=side))).decode())


# Ready-made

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "china.jpg", "coffee.png", "flower.jpg", "rocket.jpg")


def super_resolution(
    *,
    scale: int = 2,
    side: int | None = None,
    train_size: int = 10_000,
    val_size: int = 1000,
    test_size: int = 1000,
    **settings: Any,
) -> SuperResolution:
    """CIFAR-10's pictures drawn from 2 to 4 times smaller ones, and six photographs of some 500 pixels to look at.

    Pictures are cut to `side` pixels in the middle, by default to the largest multiple of the scale; split
    "photographs" is of whole photographs. `settings` are fields of `SuperResolution`. Source: Krizhevsky 2009,
    Learning Multiple Layers of Features from Tiny Images, as JPEG of quality 75.
    """
    if scale not in SCALES:
        raise TaskError(
            f"super-resolution with a scale of {scale} was asked for", "pictures grow 2 to 4 times", "Give scale=2."
        )
    side = 32 // scale * scale if side is None else side
    if not 1 <= side <= 32:
        raise TaskError(f"pictures of {side} pixels were asked for", "they have 32 at most", "Give side=32.")
    held = images.cifar10(train_size=train_size, val_size=val_size, test_size=test_size).splits
    margin = (32 - side) // 2
    splits: dict[str, Tensor | Sequence[Tensor]] = {
        split: pictures[:, :, margin : margin + side, margin : margin + side] for split, (pictures, _) in held.items()
    }
    splits["photographs"] = [_trimmed(_photograph(_place(name)), scale) for name in PHOTOGRAPHS]
    usual = {"patch": side, "gallery": "photographs", "learner": Adam(2e-3, (0.9, 0.99))}
    return SuperResolution("super-resolution", splits, scale, **{**usual, **settings})


def _place(name: str) -> Path:
    return pack.file(f"sr_test/{name}", "super-resolution")


@lru_cache(maxsize=8)
def _photograph(path: Path) -> Tensor:
    from PIL import Image

    with Image.open(path) as photograph:
        return torch.from_numpy(np.array(photograph.convert("RGB"))).permute(2, 0, 1).contiguous()


def _trimmed(picture: Tensor, scale: int) -> Tensor:
    """A picture without the few rows and columns at its end that the scale does not divide."""
    high, wide = (size // scale * scale for size in picture.shape[-2:])
    return picture[:, :high, :wide]
