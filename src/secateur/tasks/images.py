"""Image classification on data of three sizes: digits (seconds), Fashion-MNIST (minutes), CIFAR-10 (an hour)."""

import io
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.errors import TaskError
from secateur.tasks import pack
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Adam, Sgd


@dataclass(frozen=True, eq=False)
class Images(Labelled):
    """Images stored as whole numbers [N, channels, height, width]; a model is given (x / scale - mean) / std."""

    scale: float = 255.0  # the largest stored value
    mean: tuple[float, ...] = (0.0,)  # per channel
    std: tuple[float, ...] = (1.0,)
    augment: int = 0  # pixels of padding that training images are cropped from, and flipped; 0 for none
    flat: bool = False  # give [batch, pixels], for networks that take vectors

    def prepare(self, inputs: tuple[Tensor, ...], noise: torch.Generator | None) -> tuple[Tensor, ...]:
        """Crop and flip where there is noise, then normalise: float32."""
        (images,) = inputs
        if noise is not None and self.augment:
            images = crop_and_flip(images, self.augment, noise)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (self.mean, self.std))
        ready = (images.float() / self.scale - mean) / std
        return (ready.flatten(1) if self.flat else ready,)


def crop_and_flip(images: Tensor, pad: int, noise: torch.Generator) -> Tensor:
    """Each image moved by up to `pad` pixels over black, and mirrored with chance one half; same shape and type.

    Source: He et al. 2015, arXiv 1512.03385, section 4.2.
    """
    count, channels, height, width = images.shape
    down, right = torch.randint(2 * pad + 1, (2, count), generator=noise)
    mirrored = torch.rand(count, generator=noise) < 0.5
    columns = torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + right[:, None]
    rows = torch.arange(height) + down[:, None]
    wide = F.pad(images, (pad, pad, pad, pad))
    return wide[
        torch.arange(count)[:, None, None, None],
        torch.arange(channels)[:, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def digits(
    *, train_size: int | None = None, val_size: int = 300, test_size: int | None = None, **settings: Any
) -> Images:
    """1,797 handwritten digits of 8x8 pixels, from scikit-learn: 1,197 to train, 300 for val, 300 for test.

    `settings` are fields of `Images`. Source: Alpaydin and Kaynak 1998, UCI Machine Learning Repository.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError(
            "task 'digits' was asked for", "scikit-learn is not installed", "pip install 'secateur[data]'"
        ) from None
    found = load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    inputs = torch.tensor(found.images, dtype=torch.uint8).unsqueeze(1)[order]
    labels = torch.tensor(found.target, dtype=torch.uint8)[order]
    splits = _cut("digits", (inputs[300:], labels[300:]), (inputs[:300], labels[:300]), train_size, val_size, test_size)
    return Images("digits", splits, **{"scale": 16.0, "mean": (0.305,), "std": (0.376,), "learner": Adam(), **settings})


def fashion_mnist(
    *, train_size: int | None = None, val_size: int = 5000, test_size: int | None = None, **settings: Any
) -> Images:
    """Fashion-MNIST, 70,000 pictures of clothes, 28x28 grey; val is the last 5,000 of the training images.

    Source: Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747.
    """
    train, test = (_fashion(pack.file("fashion_mnist.npz", "fashion-mnist"), split) for split in ("train", "test"))
    splits = _cut("fashion-mnist", train, test, train_size, val_size, test_size)
    return Images("fashion-mnist", splits, **{"mean": (0.2860,), "std": (0.3530,), "learner": Adam(), **settings})


def cifar10(
    *, train_size: int | None = None, val_size: int = 5000, test_size: int | None = None, **settings: Any
) -> Images:
    """CIFAR-10, 60,000 photographs, 32x32 RGB, stored as JPEG; val is the last 5,000 of the training images.

    Only the images asked for are decoded: 50,000 take about 10 s. Training images are cropped and flipped.
    Source: Krizhevsky 2009, Learning Multiple Layers of Features from Tiny Images.
    """
    path = pack.file("cifar10_jpeg.npz", "cifar10")
    if train_size is not None and 0 <= train_size + val_size < 50_000:
        first, last = _cifar(path, "train", 0, train_size), _cifar(path, "train", 50_000 - val_size, 50_000)
        train = (torch.cat([first[0], last[0]]), torch.cat([first[1], last[1]]))
    else:
        train = _cifar(path, "train", 0, 50_000)
    test = _cifar(path, "test", 0, 10_000 if test_size is None else test_size)
    splits = _cut("cifar10", train, test, train_size, val_size, test_size)
    standard = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "augment": 4}
    return Images("cifar10", splits, **{**standard, "learner": Sgd(0.1, decay=1e-4), **settings})


Pair = tuple[Tensor, Tensor]  # images and labels


def _cut(
    name: str, train: Pair, test: Pair, train_size: int | None, val_size: int, test_size: int | None
) -> dict[str, tuple[Tensor, ...]]:
    """Hold the last of the training images out for val, then take the first of each as many as asked."""
    left = len(train[1]) - val_size
    sizes = {
        "train": (train_size, left),
        "val": (val_size, len(train[1]) - 1),
        "test": (test_size, len(test[1])),
    }
    for split, (size, most) in sizes.items():
        if size is not None and not 1 <= size <= most:
            raise TaskError(
                f"{size:,} images of {name}'s {split!r} split were asked for",
                f"there can be 1 to {most:,}",
                f"Give a {split}_size in that range.",
            )
    first = left if train_size is None else train_size
    return {
        "train": (train[0][:first], train[1][:first]),
        "val": (train[0][left:], train[1][left:]),
        "test": (test[0][:test_size], test[1][:test_size]),
    }


@lru_cache(maxsize=2)
def _fashion(path: Path, split: str) -> Pair:
    with np.load(path) as held:
        return torch.from_numpy(held[f"{split}_x"]).unsqueeze(1), torch.from_numpy(held[f"{split}_y"])


@lru_cache(maxsize=4)
def _cifar(path: Path, split: str, start: int, stop: int) -> Pair:
    try:
        from PIL import Image
    except ImportError:
        raise TaskError(
            "task 'cifar10' was asked for", "pillow is not installed", "pip install 'secateur[data]'"
        ) from None
    with np.load(path) as held:
        stream, offset, label = (held[f"{split}_{part}"] for part in ("jpeg", "offset", "label"))
    images = [
        np.asarray(Image.open(io.BytesIO(stream[offset[i] : offset[i + 1]].tobytes())).convert("RGB"))
        for i in range(start, min(stop, len(label)))
    ]
    inputs = np.stack(images) if images else np.zeros((0, 32, 32, 3), np.uint8)
    return torch.from_numpy(inputs).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(label[start:stop])
