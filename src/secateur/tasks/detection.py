"""Finding things in pictures: boxes with a class and how sure the model is, held against those that people drew.

How good a model is is its mean average precision: over classes, the area under precision against recall, where a box
counts as found when it overlaps the labelled one by an intersection over union (IoU) of 0.5, each label once. It is
calculated by pycocotools, the reference implementation (Lin et al. 2014, arXiv:1405.0312), on boxes in the pixels of
the pictures as they were taken; overlapping boxes of one class are thinned out beforehand by `thinned`, in one way
for all.

The loss is that of FastestDet (dog-qiuqiu, 2022), written from its description: a label may be answered by its own
cell or the next ones to the right and below; of these cells, those whose boxes fit better than the mean are to be
sure of it; boxes learn by SIoU (Gevorgyan 2022, arXiv:2205.12740), certainty by a smooth absolute difference from the
IoU, classes by their logarithm.
"""

import base64
import io
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
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
from secateur.models.fastestdet import STRIDE, boxes
from secateur.outcome import Pictures
from secateur.task import Batch, Task, generator
from secateur.tasks import pack
from secateur.tasks.labelled import device_of, digest, evaluating, pieces
from secateur.tasks.learners import Learner, Sgd
from secateur.tasks.prompts import png, strip

OVERLAP = 0.45
"""The IoU with a surer box of its class from which on a box is left out."""

COLOURS = {"red": (230, 30, 30), "blue": (40, 70, 240), "green": (10, 150, 60), "orange": (240, 140, 0)}


# Boxes: x1 y1 x2 y2 in the last dimension


def areas(box: Tensor) -> Tensor:
    """Width times height [...]; 0 for what is turned inside out."""
    return (box[..., 2] - box[..., 0]).clamp(min=0) * (box[..., 3] - box[..., 1]).clamp(min=0)


def iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes that are broadcast against each other [..., 4]: [...]."""
    corner, opposite = torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:])
    shared = (opposite - corner).clamp(min=0).prod(-1)
    return shared / (areas(first) + areas(second) - shared).clamp(min=1e-12)


def siou(box: Tensor, wanted: Tensor) -> Tensor:
    """How well boxes fit [n, 4], 1 where they are the same: IoU less half of a cost of distance and one of shape.

    Distance counts the less the more it is along one axis: Gevorgyan 2022, equations 1 to 17, with theta 4.
    """
    middle, aim = (box[:, :2] + box[:, 2:]) / 2, (wanted[:, :2] + wanted[:, 2:]) / 2
    size, right = box[:, 2:] - box[:, :2], wanted[:, 2:] - wanted[:, :2]
    whole = torch.maximum(box[:, 2:], wanted[:, 2:]) - torch.minimum(box[:, :2], wanted[:, :2])
    away = aim - middle
    # The derivative of a root has no value at 0, where boxes are centred alike.
    sine = away[:, 1].abs() / (away.square().sum(1) + 1e-12).sqrt()
    angle = 1 - 2 * torch.sin(torch.arcsin(sine.clamp(0, 1 - 1e-6)) - math.pi / 4).square()
    near = (away / whole.clamp(min=1e-6)).square()
    distance = (1 - torch.exp((angle - 2)[:, None] * near)).sum(1)
    apart = (size - right).abs() / torch.maximum(size, right).clamp(min=1e-6)
    shape = (1 - torch.exp(-apart)).pow(4).sum(1)
    return iou(box, wanted) - (distance + shape) / 2


def thinned(box: Tensor, score: Tensor, label: Tensor, overlap: float = OVERLAP) -> Tensor:
    """Which boxes to keep, surest first: each is left out that overlaps a surer one of its class by so much IoU."""
    order = score.argsort(descending=True, stable=True)
    box, label = box[order], label[order]
    clash = (iou(box[:, None], box[None]) > overlap) & (label[:, None] == label)
    gone = torch.zeros(len(order), dtype=torch.bool, device=box.device)
    for i in range(len(order)):
        if not gone[i]:
            gone[i + 1 :] |= clash[i, i + 1 :]
    return order[~gone]


def found_in(answer: Tensor, least: float = 0.01, most: int = 100) -> list[Tensor]:
    """What a map of answers [batch, 5 + classes, h, w] finds in each picture: [n, 6] of x1 y1 x2 y2 score class.

    Boxes are shares of the picture, the surest first, `most` of them; the score is certainty^0.6 chance^0.4.
    """
    place = boxes(answer).flatten(1, 2).clamp(0, 1)  # [batch, cells, 4]
    chance, label = answer[:, 5:].flatten(2).max(1)  # [batch, cells]
    score = answer[:, 0].flatten(1).clamp(min=0).pow(0.6) * chance.clamp(min=0).pow(0.4)
    found = []
    for box, sure, kind in zip(place, score, label, strict=True):
        seen = sure > least
        box, sure, kind = box[seen], sure[seen], kind[seen]
        keep = thinned(box, sure, kind)[:most]
        found.append(torch.cat([box[keep], sure[keep, None], kind[keep, None].to(box.dtype)], 1))
    return found


def candidates(wanted: Tensor, high: int, wide: int) -> tuple[Tensor, Tensor, Tensor]:
    """Cells that may answer labels [n, 4]: which label, row and column of each pair, int64 [m] each.

    A label's own cell and the next ones to the right, below, and both, as far as there are any: from each of them the
    label's middle is less than a cell away.
    """
    middle = (wanted[:, :2] + wanted[:, 2:]) / 2
    column, row = (middle * torch.tensor([wide, high], device=wanted.device, dtype=wanted.dtype)).long().unbind(1)
    step = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=wanted.device)
    rows, columns = (row[:, None] + step[:, 0]).flatten(), (column[:, None] + step[:, 1]).flatten()
    which = torch.arange(len(wanted), device=wanted.device).repeat_interleave(len(step))
    inside = (rows < high) & (columns < wide)
    return which[inside], rows[inside], columns[inside]


def detection_loss(answer: Tensor, target: Tensor) -> Tensor:
    """FastestDet's loss of a map of answers [batch, 5 + classes, h, w].

    `target` is [n, 6]: which picture, x1 y1 x2 y2 as shares of it, class. Boxes weigh 8, certainty 16, classes 1;
    within certainty, the cells that are to be sure weigh 1/4 together, and all others 3/4.
    """
    high, wide = answer.shape[-2:]
    picture, wanted, kind = target[:, 0].long(), target[:, 1:5], target[:, 5].long()
    which, row, column = candidates(wanted, high, wide)
    sure = answer[:, 0]
    goal, positive = torch.zeros_like(sure), torch.zeros_like(sure, dtype=torch.bool)
    box_loss = class_loss = answer.sum() * 0
    if len(which):
        mine = picture[which]
        box = boxes(answer)[mine, row, column]
        fit = siou(box, wanted[which])
        good = fit.detach() >= fit.detach().mean()
        box_loss = (1 - fit[good]).mean()
        chance = answer[mine[good], 5 + kind[which[good]], row[good], column[good]]
        class_loss = -chance.clamp(min=1e-6).log().mean()
        overlap = iou(box, wanted[which]).detach()[good]
        at = (mine[good] * high + row[good]) * wide + column[good]
        goal.view(-1).scatter_reduce_(0, at, overlap, "amax")
        positive.view(-1)[at] = True
    off = F.smooth_l1_loss(sure, goal, reduction="none")
    sure_loss = 0.25 * _mean(off[positive]) + 0.75 * _mean(off[~positive])
    return 8 * box_loss + 16 * sure_loss + class_loss


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(values.numel(), 1)


def precision(found: Sequence[Tensor], wanted: Sequence[Tensor], classes: Sequence[str]) -> dict[str, float]:
    """Average precisions of boxes found [n, 6] (with score and class) against those labelled [n, 5], in pixels.

    {"map50", "map" (the mean over IoUs of 0.5, 0.55 ... 0.95), "map50 CLASS", "map50 small" below 32x32 pixels,
    "medium", "large" from 96x96}; what has no labels is left out. Raises TaskError without pycocotools.
    """
    try:
        from pycocotools.coco import COCO
        from pycocotools.cocoeval import COCOeval
    except ImportError:
        raise TaskError(
            "average precision was asked for", "pycocotools is not installed", "pip install 'secateur[data]'"
        ) from None
    rows = [(i, *box) for i, held in enumerate(wanted) for box in held.double().tolist()]
    labels = [
        {"id": n, "image_id": i, "bbox": [x, y, r - x, b - y], "area": (r - x) * (b - y), "category_id": int(k)}
        for n, (i, x, y, r, b, k) in enumerate(rows, 1)
    ]
    for label in labels:
        label["iscrowd"] = 0
    answers = [[i, x, y, r - x, b - y, s, k] for i, held in enumerate(found) for x, y, r, b, s, k in held.tolist()]
    with redirect_stdout(io.StringIO()):  # pycocotools says how long it took
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i} for i in range(len(wanted))],
            "categories": [{"id": k, "name": name} for k, name in enumerate(classes)],
            "annotations": labels,
        }
        truth.createIndex()
        given = truth.loadRes(np.array(answers, dtype=np.float64).reshape(-1, 7)) if answers else COCO()
        if not answers:
            given.dataset = {**truth.dataset, "annotations": []}
            given.createIndex()
        judge = COCOeval(truth, given, "bbox")
        judge.evaluate()
        judge.accumulate()
    curve = judge.eval["precision"][..., -1]  # [IoUs, recalls, classes, sizes]
    values = {"map50": _known(curve[0, :, :, 0]), "map": _known(curve[..., 0])}
    values |= {f"map50 {name}": _known(curve[0, :, k, 0]) for k, name in enumerate(classes)}
    values |= {f"map50 {size}": _known(curve[0, :, :, n]) for n, size in enumerate(("small", "medium", "large"), 1)}
    return {name: value for name, value in values.items() if value is not None}


def _known(curve: np.ndarray) -> float | None:
    """The mean where there were labels: elsewhere pycocotools says -1."""
    known = curve[curve > -1]
    return float(known.mean()) if known.size else None


# The task

Split = tuple[Tensor, Sequence[Tensor]]
"""Pictures uint8 RGB [N, 3, height, width], and of each its labels [n, 5]: x1 y1 x2 y2 as shares, class."""


@dataclass(frozen=True, eq=False)
class Detection:
    """Pictures with labelled boxes; the loss is FastestDet's, the metric the mean average precision at IoU 0.5.

    `splits` maps "train", "val", "test" and any other name to pictures and their labels. "calibration" is drawn from
    "train" by the seed, unless there is a split of that name. A model takes BGR [batch, 3, height, width] in [0, 1]
    and answers with a map as secateur.models.fastestdet describes it.
    """

    name: str
    splits: Mapping[str, Split]
    classes: tuple[str, ...]
    taken: tuple[int, int] = (640, 480)  # width and height of the pictures as they were taken: sizes are in its pixels
    seed: int = 0
    batch: int = 8  # pictures that go through a model together
    samples: int = 64  # calibration pictures, where a method does not say how many
    gallery: str = "val"  # split whose first pictures a report shows
    shown: int = 3  # how many
    view: int = 288  # pixels a side of each there
    surest: float = 0.4  # boxes are drawn there that the model is at least so sure of
    learner: Learner = field(default_factory=lambda: Sgd(0.01, decay=5e-4))
    clients: Sequence[Task] = ()
    metric: str = field(default="map50", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for count in ("batch", "samples", "shown", "view"):
            if getattr(self, count) < 1:
                raise TaskError(
                    f"{self.name} with {count}={getattr(self, count)} was asked for", "one is the least", "Give 1."
                )
        for split, (pictures, labels) in self.splits.items():
            asked = f"split {split!r} of {self.name} was given pictures {list(pictures.shape)} of {pictures.dtype}"
            if pictures.dtype != torch.uint8 or pictures.dim() != 4 or pictures.shape[1] != 3:
                raise TaskError(asked, "they are RGB [N, 3, height, width] of 8 bits", "Give uint8, colours first.")
            if any(side % (2 * STRIDE) for side in pictures.shape[2:]):
                raise TaskError(asked, f"{2 * STRIDE} does not divide both sides", "Make them 352x352, say.")
            if len(labels) != len(pictures):
                raise TaskError(asked, f"there are labels of {len(labels)} pictures", "Give labels for each.")
            held = torch.cat([torch.zeros(0, 5), *labels])
            if held.shape[1] != 5 or bool(((held[:, :4] < 0) | (held[:, :4] > 1)).any()):
                raise TaskError(
                    asked, "its boxes are not x1 y1 x2 y2 class, as shares of the picture", "Divide by its sides."
                )
            if len(held) and int(held[:, 4].max()) >= len(self.classes):
                raise TaskError(
                    asked, f"a box is of class {int(held[:, 4].max())} of {len(self.classes)}", "Name every class."
                )

    @property
    def example(self) -> Batch:
        """One picture of the first split, for tracing."""
        return self._batch(next(iter(self.splits)), torch.arange(1), None)

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of a split, up to n pictures; raises TaskError when there are fewer.

        Those of "train" are mirrored either way at random: cells have neither a left nor a top.
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
        order, noise = torch.arange(count), None
        if split == "train":
            noise = generator(self, f"train {epoch}")
            order = torch.randperm(count, generator=noise)
        elif split == "calibration":
            order = torch.randperm(count, generator=generator(self, "calibration"))
        for place in pieces(order[:n], self.batch):
            yield self._batch(held, place, noise)

    def _count(self, split: str) -> int:
        if split not in self.splits:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.splits)
            )
        if not len(self.splits[split][0]):
            raise TaskError(f"split {split!r} of {self.name} was asked for", "it is empty", "Give it pictures.")
        return len(self.splits[split][0])

    def _batch(self, split: str, place: Tensor, noise: torch.Generator | None) -> Batch:
        pictures, labels = self.splits[split]
        seen, target = [], [torch.zeros(0, 6)]
        for i, at in enumerate(place.tolist()):
            picture, held = pictures[at], labels[at].float()
            if noise is not None:
                picture, held = mirrored(picture, held, torch.rand(2, generator=noise) < 0.5)
            seen.append(picture)
            target.append(torch.cat([torch.full((len(held), 1), float(i)), held], 1))
        return Batch((torch.stack(seen).flip(1).float() / 255,), torch.cat(target))

    def answered(self, model: nn.Module, batch: Batch) -> Tensor:
        """A model's map, float32; raises TaskError for an answer of another shape."""
        answer = batch.through(model)
        want = 5 + len(self.classes)
        if not isinstance(answer, Tensor) or answer.dim() != 4 or answer.shape[1] != want:
            found = list(answer.shape) if isinstance(answer, Tensor) else f"a {type(answer).__name__}"
            raise TaskError(
                f"{type(model).__name__} was to find {', '.join(self.classes)}",
                f"its answer is {found}, and [batch, {want}, height, width] was wanted",
                "Give a detector of one map for as many classes, such as fastestdet.",
            )
        return answer.float()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See detection_loss."""
        batch = batch.to(device_of(model))
        return detection_loss(self.answered(model, batch), batch.target)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """What `precision` gives, and {"loss", "pictures"}."""
        count, device, found, total = self._count(split), device_of(model), list[Tensor](), 0.0
        with evaluating(model):
            for place in pieces(torch.arange(count), self.batch):
                batch = self._batch(split, place, None).to(device)
                answer = self.answered(model, batch)
                for i in range(len(place)):  # each by itself, so that the loss does not hang on the size of batches
                    mine = batch.target[batch.target[:, 0] == i]
                    total += float(detection_loss(answer[i : i + 1], torch.cat([mine[:, :1] * 0, mine[:, 1:]], 1)))
                found += [held.cpu() for held in found_in(answer)]
        scale = torch.tensor([*self.taken, *self.taken], dtype=torch.float32)
        in_pixels = [torch.cat([held[:, :4] * scale, held[:, 4:]], 1) for held in found]
        wanted = [torch.cat([held[:, :4] * scale, held[:, 4:]], 1) for held in self.splits[split][1]]
        return {**precision(in_pixels, wanted, self.classes), "loss": total / count, "pictures": float(count)}

    def references(self) -> list[Pictures]:
        """The labels of some pictures: the first row of a report's grid."""
        legend = ", ".join(f"{name} {colour}" for name, colour in zip(self.classes, COLOURS, strict=False))
        return [self._row(f"labelled ({legend})", [held for _, held in self._gallery()])]

    def show(self, model: nn.Module, of: str) -> Pictures:
        """What a model finds in the same pictures: a row of a report."""
        found = []
        with evaluating(model):
            for place in range(len(self._gallery())):
                batch = self._batch(self.gallery, torch.tensor([place]), None).to(device_of(model))
                held = found_in(self.answered(model, batch), least=self.surest)[0].cpu()
                found.append(held[:, [0, 1, 2, 3, 5]])
        return self._row(f"{of}, boxes at least {self.surest:g} sure", found)

    def _gallery(self) -> list[tuple[Tensor, Tensor]]:
        pictures, labels = self.splits[self.gallery]
        return list(zip(pictures[: self.shown], labels, strict=False))

    def _row(self, of: str, labels: Sequence[Tensor]) -> Pictures:
        seen = [drawn(picture, held, self.view) for (picture, _), held in zip(self._gallery(), labels, strict=True)]
        captions = [f"picture {i + 1}" for i in range(len(seen))]
        image = png(strip(torch.stack(seen).float() / 255, most=self.view))
        return Pictures(of, captions, base64.b64encode(image).decode())

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the pictures, the labels and the settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("splits", "clients")}
        held = {}
        for split, (pictures, labels) in sorted(self.splits.items()):
            held[f"{split} pictures"] = pictures
            held |= {f"{split} {i}": label for i, label in enumerate(labels)}
        return digest(plain, held, [c.fingerprint() for c in self.clients])


def mirrored(picture: Tensor, labels: Tensor, how: Tensor) -> tuple[Tensor, Tensor]:
    """A picture [3, h, w] and its labels [n, 5] turned: left to right where how[0], upside down where how[1]."""
    labels = labels.clone()
    for axis in (0, 1):
        if how[axis]:
            picture = picture.flip(2 - axis)
            labels[:, [axis, axis + 2]] = 1 - labels[:, [axis + 2, axis]]
    return picture, labels


def drawn(picture: Tensor, labels: Tensor, side: int) -> Tensor:
    """A picture uint8 [3, h, w] at `side` x `side` pixels, a frame in its class's colour round each label [n, 5]."""
    whole = F.interpolate(picture[None].float(), (side, side), mode="area")[0].round().to(torch.uint8)
    colours = torch.tensor(list(COLOURS.values()), dtype=torch.uint8)
    for x1, y1, x2, y2, kind in labels.tolist():
        left, right = (min(max(round(x * side), 0), side - 1) for x in (x1, x2))
        top, low = (min(max(round(y * side), 0), side - 1) for y in (y1, y2))
        colour = colours[int(kind) % len(colours)][:, None, None]
        for rows, columns in (
            (slice(top, top + 2), slice(left, right + 1)),
            (slice(max(low - 1, 0), low + 1), slice(left, right + 1)),
            (slice(top, low + 1), slice(left, left + 2)),
            (slice(top, low + 1), slice(max(right - 1, 0), right + 1)),
        ):
            whole[:, rows, columns] = colour
    return whole


# Ready-made

CELLS = ("RBC", "WBC", "Platelets")


def bccd(
    *,
    side: int = 352,
    train_size: int | None = None,
    val_size: int | None = None,
    test_size: int | None = None,
    **settings: Any,
) -> Detection:
    """364 photographs of blood, 640x480, with 4,886 boxes of red cells, white cells and platelets.

    Pictures are brought to `side` x `side` pixels, and only those asked for are decoded; `settings` are fields of
    `Detection`. 205 are for training, 87 for val and 72 for test, as published; the weights `fastestdet` of the data
    pack were trained on train and val, so that only test is new to them. Source: Shenggan, BCCD Dataset, 2018, MIT
    licence.
    """
    if side < 64 or side % (2 * STRIDE):
        raise TaskError(
            f"pictures of {side} pixels a side were asked for",
            f"sides are multiples of {2 * STRIDE}, 64 at least",
            f"Give side={max(64, round(side / (2 * STRIDE)) * 2 * STRIDE)}.",
        )
    path = pack.file("bccd_detection.npz", "bccd")
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    splits = {split: _bccd(path, number, side, sizes[split]) for number, split in enumerate(sizes)}
    return Detection("bccd", splits, CELLS, **{"gallery": "test", **settings})


@lru_cache(maxsize=6)
def _bccd(path: Path, number: int, side: int, size: int | None) -> Split:
    try:
        from PIL import Image
    except ImportError:
        raise TaskError(
            "task 'bccd' was asked for", "pillow is not installed", "pip install 'secateur[data]'"
        ) from None
    with np.load(path) as held:
        stream, offset, split, box, of = (held[k] for k in ("jpeg", "offset", "split", "box", "box_image"))
    mine = np.flatnonzero(split == number).tolist()
    if size is not None and not 1 <= size <= len(mine):
        raise TaskError(
            f"{size:,} pictures of bccd were asked for", f"there can be 1 to {len(mine)}", "Give a size in that range."
        )
    seen, labels = [], []
    for i in mine[:size]:
        with Image.open(io.BytesIO(stream[offset[i] : offset[i + 1]].tobytes())) as photograph:
            wide, high = photograph.size
            whole = photograph.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
        seen.append(np.asarray(whole))
        drawn_by_hand = torch.from_numpy(box[of == i].astype(np.float32))
        shares = drawn_by_hand / torch.tensor([wide, high, wide, high, 1.0])
        labels.append(torch.cat([shares[:, :4].clamp(0, 1), shares[:, 4:]], 1))
    return torch.from_numpy(np.stack(seen)).permute(0, 3, 1, 2).contiguous(), labels
