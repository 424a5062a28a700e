"""Pictures and what they show in words, for models with a tower for each (CLIP and its kin)."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.task import Batch, Task, generator, stream
from secateur.tasks import images
from secateur.tasks.corpora import Tokenizer
from secateur.tasks.labelled import device_of, digest, evaluating, pieces
from secateur.tasks.learners import AdamW, Learner

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""What pictures are normalised with in CLIP (Radford et al. 2021, arXiv:2103.00020), per channel."""

FASHION = (
    ("t-shirt", "tee shirt", "short sleeved top"),
    ("trousers", "pair of trousers", "pair of long pants"),
    ("pullover", "sweater", "knitted pullover"),
    ("dress", "gown", "long dress"),
    ("coat", "overcoat", "long coat"),
    ("sandal", "open shoe", "pair of sandals"),
    ("shirt", "buttoned shirt", "shirt with buttons"),
    ("sneaker", "trainer", "sports shoe"),
    ("bag", "handbag", "bag with a handle"),
    ("ankle boot", "boot", "short boot"),
)
"""Ways to name each class of Fashion-MNIST; the first is what pictures are measured against."""

TEMPLATES = ("a picture of a {}{}", "a {}{}", "this is a {}{}", "the photo shows a {}{}", "one {} on its own{}")
VIEWS = ("", " upside down", " as a negative", " upside down as a negative")
"""How a picture is shown, in words; see `shown`."""


@dataclass(frozen=True, eq=False)
class Captioned:
    """Finding a picture's caption among all captions; the loss is the cross-entropy over them.

    A picture is shown in one of a few views, and its caption says what it is and how it is shown. A batch holds
    pictures and all captions, `pixel_values` [batch, 3, size, size] and `input_ids` [captions, tokens], so that the
    loss goes through both towers, and the target is the place of each picture's own. In calibration and training a
    caption is worded in ways drawn by the seed, elsewhere in the first way.
    """

    name: str
    splits: Mapping[str, tuple[Tensor, Tensor]]  # pictures uint8 [N, 1 or 3, height, width] and classes [N]
    ids: Tensor  # [ways, classes * views, tokens], int64
    mask: Tensor  # the same shape: 1 where there is a token
    views: int = 4  # ways a picture is shown in: as it is, upside down, as a negative, both
    size: int = 224  # height and width the model takes
    seed: int = 0
    batch: int = 64  # pictures that go through a model together
    samples: int = 128  # calibration examples, where a method does not say how many
    learner: Learner = field(default_factory=lambda: AdamW(1e-5))
    clients: Sequence[Task] = ()
    metric: str = field(default="accuracy", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if self.batch < 1 or not 1 <= self.views <= len(VIEWS):
            raise TaskError(
                f"{self.name} with batches of {self.batch} and {self.views} views was asked for",
                f"a batch holds one picture at least, and there are {len(VIEWS)} views",
                "Give batch=64 and views=4.",
            )
        classes = max(int(labels.max()) for _, labels in self.splits.values() if len(labels)) + 1
        if self.ids.shape != self.mask.shape or self.ids.shape[1] != classes * self.views:
            raise TaskError(
                f"{self.name} was given {self.ids.shape[1]} captions",
                f"{classes} classes in {self.views} views have {classes * self.views}",
                "Give a caption for each class in each view, views of a class one after another.",
            )

    @property
    def example(self) -> Batch:
        """Two pictures of the first split and all captions, for tracing."""
        return next(self._batches(next(iter(self.splits)), torch.arange(2), None))

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of a split, up to n pictures; raises TaskError when there are fewer."""
        held = "train" if split == "calibration" and split not in self.splits else split
        count = len(self._split(held)[1])
        if split == "calibration" and n is None:
            n = min(self.samples, count)
        if n is not None and n > count:
            raise TaskError(
                f"{n:,} pictures of {self.name}'s {split!r} split were asked for",
                f"it holds {count:,}",
                "Ask for fewer, or give more data.",
            )
        order, noise = torch.arange(count), None
        if split in ("train", "calibration"):
            noise = generator(self, f"train {epoch}" if split == "train" else "calibration")
            order = torch.randperm(count, generator=noise)
        return self._batches(held, order[:n], noise)

    def _batches(self, split: str, order: Tensor, noise: torch.Generator | None) -> Iterator[Batch]:
        pictures, labels = self._split(split)
        fixed = torch.randint(self.views, (len(labels),), generator=stream(0, f"views {split}"))
        ways, captions, _ = self.ids.shape
        for place in pieces(order, self.batch):
            view, way = fixed[place], torch.zeros(captions, dtype=torch.int64)
            if noise is not None:
                view = torch.randint(self.views, (len(place),), generator=noise)
                way = torch.randint(ways, (captions,), generator=noise)
            target = labels[place].long() * self.views + view
            ids, mask = (words[way, torch.arange(captions)] for words in (self.ids, self.mask))
            ready = _prepared(shown(pictures[place], view), self.size)
            # As many pictures as captions could not be told apart when examples are taken one by one.
            for some in pieces(torch.arange(len(place)), captions - 1) if len(place) == captions else [slice(None)]:
                inputs = {"pixel_values": ready[some], "input_ids": ids, "attention_mask": mask}
                yield Batch(inputs, target[some])

    def _split(self, split: str) -> tuple[Tensor, Tensor]:
        if split not in self.splits:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.splits)
            )
        return self.splits[split]

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of each picture's own caption, in float32."""
        batch = batch.to(device_of(model))
        return F.cross_entropy(likeness(batch.through(model)).float(), batch.target)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"accuracy" in [0, 1] among all captions, "classes" the same where only what is shown counts, "loss"}."""
        count, device = len(self._split(split)[1]), device_of(model)
        right, kind, total = 0, 0, 0.0
        with evaluating(model):
            for each in self._batches(split, torch.arange(count), None):
                batch = each.to(device)
                logits = likeness(batch.through(model)).float()
                found = logits.argmax(-1)
                right += int((found == batch.target).sum())
                kind += int((found // self.views == batch.target // self.views).sum())
                total += float(F.cross_entropy(logits, batch.target, reduction="sum"))
        return {
            "accuracy": right / count,
            "classes": kind / count,
            "loss": total / count,
            "captions": float(self.ids.shape[1]),
            "examples": float(count),
        }

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the pictures, the captions and the settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        apart = ("splits", "clients", "ids", "mask")
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in apart}
        held = {f"{split} {i}": t for split, pair in sorted(self.splits.items()) for i, t in enumerate(pair)}
        return digest(plain, {**held, "ids": self.ids, "mask": self.mask}, [c.fingerprint() for c in self.clients])


def shown(pictures: Tensor, view: Tensor) -> Tensor:
    """Each picture in its view: 0 as it is, 1 upside down, 2 as a negative, 3 both; same shape and type."""
    over, negative = (view % 2 == 1).view(-1, 1, 1, 1), (view >= 2).view(-1, 1, 1, 1)
    turned = torch.where(over, pictures.flip(-2), pictures)
    return torch.where(negative, 255 - turned, turned)


def _prepared(pictures: Tensor, size: int) -> Tensor:
    """What the model is given for stored pictures: three channels, its size, normalised: float32."""
    ready = pictures.float() / 255
    if ready.shape[-2:] != (size, size):
        ready = F.interpolate(ready, (size, size), mode="bilinear", antialias=True)
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (MEAN, STD))
    return (ready.expand(-1, 3, -1, -1) - mean) / std


def likeness(answer: Any) -> Tensor:
    """How alike each picture and each caption are [pictures, captions], of a model's answer."""
    found = answer.get("logits_per_image") if isinstance(answer, Mapping) else None
    found = getattr(answer, "logits_per_image", None) if found is None else found
    if not isinstance(found, Tensor):
        raise TaskError(
            "pictures were to be compared with their captions",
            f"the model's answer is a {type(answer).__name__} without logits_per_image",
            "Give a model that compares pictures and text, such as CLIP.",
        )
    return found


def worded(names: Sequence[Sequence[str]], views: int) -> list[list[str]]:
    """The captions of all classes in all views, in each way of wording them: [ways][classes * views]."""
    most = max(map(len, names))
    return [
        [template.format(nouns[number % len(nouns)], VIEWS[view]) for nouns in names for view in range(views)]
        for number in range(most)
        for template in TEMPLATES
    ]


def tokens_of(texts: Sequence[Sequence[str]], tokenizer: Tokenizer) -> tuple[Tensor, Tensor]:
    """Token ids and mask of texts [ways][captions]: int64 [ways, captions, tokens], padded at the end."""
    rows = []
    for text in (text for way in texts for text in way):
        found = tokenizer.encode(text)
        rows.append(torch.tensor(list(getattr(found, "ids", found)), dtype=torch.int64))
    fill = getattr(tokenizer, "pad_token_id", None) or 0
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    shape = (len(texts), len(texts[0]), -1)
    return ids.reshape(shape), mask.reshape(shape)


def fashion_pairs(
    tokenizer: Tokenizer | None,
    *,
    train_size: int | None = None,
    val_size: int = 5000,
    test_size: int | None = None,
    views: int = 4,
    **settings: Any,
) -> Captioned:
    """Fashion-MNIST with captions: what the garment is, and whether it is shown upside down or as a negative.

    There are 40 captions, or 10 with views=1. `settings` are fields of `Captioned`. Raises TaskError without a
    tokenizer or without the pictures. Source: Xiao, Rasul and Vollgraf 2017, arXiv 1708.07747; the captions are ours.
    """
    if tokenizer is None:
        raise TaskError(
            "task 'captions' was asked for", "there is no tokenizer", "Give the folder of a model that has its own."
        )
    if not 1 <= views <= len(VIEWS):
        raise TaskError(f"captions of {views} views were asked for", f"there are {len(VIEWS)}", "Give views=4.")
    held = images.fashion_mnist(train_size=train_size, val_size=val_size, test_size=test_size).splits
    pairs = {split: (pictures, labels) for split, (pictures, labels) in held.items()}
    ids, mask = tokens_of(worded(FASHION, views), tokenizer)
    return Captioned("captions", pairs, ids, mask, views=views, **settings)
