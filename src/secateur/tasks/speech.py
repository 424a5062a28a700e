"""Spoken digits as log-mel frames: sequences of unequal length, for recurrent networks."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.errors import TaskError
from secateur.tasks import pack
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Adam

FRAMES = 100  # a second of speech at a hop of 10 ms: longer recordings are cut


@dataclass(frozen=True, eq=False)
class Speech(Labelled):
    """Recordings as frames [N, 100, bands] uint8 and lengths [N]; a model is given frames in [-1, 1], lengths."""

    def prepare(self, inputs: tuple[Tensor, ...], noise: torch.Generator | None) -> tuple[Tensor, ...]:
        """Frames / 255 * 2 - 1, zero behind the end, and how many frames there are (int64)."""
        frames, length = inputs
        inside = torch.arange(frames.shape[1]) < length[:, None]
        return (frames.float() / 255 * 2 - 1) * inside.unsqueeze(-1), length.long()


def spoken_digits(*, train_size: int | None = None, val_size: int = 300, **settings: Any) -> Speech:
    """The Free Spoken Digit Dataset: 3,000 recordings of ten digits by six speakers, 40 bands a frame.

    "test" is the first five takes of each digit and speaker (300), "val" is drawn from the rest, the same each time.
    `settings` are fields of `Labelled`. Source: Jackson et al., github.com/Jakobovski/free-spoken-digit-dataset.
    """
    with np.load(pack.file("fsdd_logmel.npz", "spoken-digits")) as held:
        frames, lengths, digit, take = (torch.from_numpy(held[k]) for k in ("frames", "length", "digit", "index"))
    cut = frames.split(lengths.tolist())  # type: ignore[no-untyped-call]
    short = [recording[:FRAMES] for recording in cut]
    whole = torch.nn.utils.rnn.pad_sequence([*short, torch.zeros(FRAMES, frames.shape[1])], batch_first=True)[:-1]
    tensors = (whole.to(torch.uint8), lengths.clamp(max=FRAMES).to(torch.int64), digit)
    test = take < 5
    rest = (~test).nonzero().squeeze(1)
    rest = rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(0))]
    left = len(rest) - val_size
    first = left if train_size is None else train_size
    if not (1 <= val_size < len(rest) and 1 <= first <= left):
        raise TaskError(
            f"{first:,} recordings to train on and {val_size:,} for val were asked for",
            f"there are {len(rest):,} beside the test split",
            "Give a smaller train_size or val_size.",
        )
    places = {"train": rest[:first], "val": rest[left:], "test": test.nonzero().squeeze(1)}
    splits = {split: tuple(tensor[place] for tensor in tensors) for split, place in places.items()}
    return Speech("spoken-digits", splits, **{"batch": 32, "learner": Adam(), **settings})
