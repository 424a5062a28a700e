"""Rooms of coloured boxes, and sentences that ask for one of them: what networks for 3D grounding are tried on.

A room is a cloud of points: a floor, two walls, and boxes of five colours and two sizes that stand on the floor. A
sentence names a box by size and colour, or, where several are alike, by what it is nearest to: "the small red box
nearest to the big green one". An answer is right when its box overlaps the one asked for by an intersection over union
(IoU) of 0.25, or 0.5, as in ScanRefer (Chen, Chang, Nießner 2020, arXiv:1912.08830).
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import TaskError, did_you_mean
from secateur.task import Batch, Task, generator
from secateur.tasks.labelled import device_of, digest, evaluating, pieces
from secateur.tasks.learners import AdamW, Learner
from secateur.voxels.matching import MENTIONED, OTHER, TARGET, assigned, diou, focal, overlap
from secateur.voxels.walk import Grounded

COLOURS = {
    "red": (0.85, 0.15, 0.15),
    "green": (0.15, 0.7, 0.2),
    "blue": (0.15, 0.25, 0.85),
    "yellow": (0.9, 0.85, 0.15),
    "purple": (0.6, 0.2, 0.7),
}
SIZES = {"small": (0.3, 0.5), "big": (0.7, 0.9)}
"""Sides in metres, from and to."""
GREY = (0.55, 0.55, 0.55)
WORDS = ("", "the", "box", "nearest", "to", "one", *SIZES, *COLOURS)
"""A word's id is its place; 0 stands behind the end."""
LENGTH = 10
"""Words of the longest sentence."""
SMALL = 0.15
"""Cubic metres below which a box counts as small: between the largest of the small and the smallest of the big."""


def spelt(sentence: str) -> Tensor:
    """Ids of a sentence's words int64 [LENGTH]. Raises TaskError for a word that is not known."""
    words = sentence.split()
    unknown = [word for word in words if word not in WORDS]
    if unknown or not 0 < len(words) <= LENGTH:
        raise TaskError(
            f"the sentence {sentence!r} was to be read",
            f"{unknown[0]!r} is not known" if unknown else f"it has {len(words)} words",
            f"Use up to {LENGTH} of: {', '.join(WORDS[1:])}.",
        )
    return torch.tensor([WORDS.index(word) for word in words] + [0] * (LENGTH - len(words)))


@dataclass(frozen=True, eq=False)
class Rooms:
    """Rooms and the sentences said of them."""

    points: Sequence[Tensor]  # of each room [n, 6]: x y z in metres, r g b in [0, 1]
    boxes: Sequence[Tensor]  # of each room [m, 6]: centre and sides in metres
    asked: Tensor  # int64 [sentences, 3]: the room, the box asked for, the other box that is mentioned or -1
    ids: Tensor  # int64 [sentences, LENGTH]

    def __len__(self) -> int:
        return len(self.asked)


@dataclass(frozen=True, eq=False)
class Grounding:
    """Sentences about clouds of points; the metric is the share of answers that overlap by an IoU of 0.25.

    A model takes ids, points and scene by name (see secateur.models.grounder) and answers with Grounded. The loss is
    that of its class and its boxes: of the `nearest` voxels to the box asked for, each is to be sure of it (focal) and
    to say where it is (DIoU), both divided by how many they are. "calibration" is drawn from "train" by the seed.
    """

    name: str
    splits: Mapping[str, Rooms]
    seed: int = 0
    batch: int = 8  # sentences that go through a model together
    samples: int = 64  # calibration sentences, where a method does not say how many
    nearest: int = 32  # voxels that answer for a box
    learner: Learner = field(default_factory=lambda: AdamW(5e-4, (0.9, 0.999), decay=5e-4))
    clients: Sequence[Task] = ()
    metric: str = field(default="acc25", init=False)
    higher_is_better: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        for count in ("batch", "samples", "nearest"):
            if getattr(self, count) < 1:
                raise TaskError(
                    f"{self.name} with {count}={getattr(self, count)} was asked for", "one is the least", "Give 1."
                )
        for split, held in self.splits.items():
            if len(held.asked) != len(held.ids) or len(held.points) != len(held.boxes):
                raise TaskError(
                    f"split {split!r} of {self.name} was given {len(held.asked)} questions of {len(held.points)} rooms",
                    f"there are {len(held.ids)} sentences, and boxes of {len(held.boxes)} rooms",
                    "Give one sentence per question, and boxes for each room.",
                )

    @property
    def example(self) -> Batch:
        """One sentence of the first split."""
        return self._batch(next(iter(self.splits.values())), torch.arange(1))

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """Batches of a split, up to n sentences; raises TaskError when there are fewer."""
        held = self._split("train" if split == "calibration" and split not in self.splits else split)
        n = min(self.samples, len(held)) if split == "calibration" and n is None else n
        if n is not None and n > len(held):
            raise TaskError(
                f"{n:,} sentences of {self.name}'s {split!r} split were asked for",
                f"it holds {len(held):,}",
                "Ask for fewer, or make more rooms.",
            )
        order = torch.arange(len(held))
        if split in ("train", "calibration"):
            purpose = f"train {epoch}" if split == "train" else split
            order = torch.randperm(len(held), generator=generator(self, purpose))
        for place in pieces(order[:n], self.batch):
            yield self._batch(held, place)

    def _split(self, split: str) -> Rooms:
        if split not in self.splits:
            raise TaskError(
                f"split {split!r} of {self.name} was asked for", "it has none", did_you_mean(split, self.splits)
            )
        if not len(self.splits[split]):
            raise TaskError(f"split {split!r} of {self.name} was asked for", "it is empty", "Give it rooms.")
        return self.splits[split]

    def _batch(self, held: Rooms, place: Tensor) -> Batch:
        points, scene, target = [], [], []
        for number, (room, wanted, mentioned) in enumerate(held.asked[place].tolist()):
            boxes = held.boxes[room]
            role = torch.full((len(boxes), 1), float(OTHER))
            role[wanted] = TARGET
            if mentioned >= 0:
                role[mentioned] = MENTIONED
            target.append(torch.cat([torch.full((len(boxes), 1), float(number)), boxes, role], 1))
            points.append(held.points[room])
            scene.append(torch.full((len(points[-1]),), number))
        inputs = {"ids": held.ids[place], "points": torch.cat(points), "scene": torch.cat(scene)}
        return Batch(inputs, torch.cat(target))

    def answered(self, model: nn.Module, batch: Batch) -> Grounded:
        """A model's answer; raises TaskError for any other than Grounded."""
        answer = batch.through(model)
        if not isinstance(answer, Grounded):
            raise TaskError(
                f"{type(model).__name__} was to find boxes by sentences",
                f"its answer is a {type(answer).__name__}",
                "Give a model that answers with secateur.voxels.Grounded, such as grounder.",
            )
        return answer

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """See grounding_loss."""
        batch = batch.to(device_of(model))
        return grounding_loss(self.answered(model, batch), batch.target, self.nearest)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """{"acc25", "acc50", "small acc25" and "relation acc25" where there are such, "voxels", "loss", "sentences"}.

        "voxels" are those of the finest level, a sentence; "small" are boxes of less than 0.15 cubic metres.
        """
        held, device = self._split(split), device_of(model)
        fits, small, related, total, voxels = list[Tensor](), list[Tensor](), list[Tensor](), 0.0, 0
        with evaluating(model):
            for place in pieces(torch.arange(len(held)), self.batch):
                batch = self._batch(held, place).to(device)
                answer = self.answered(model, batch)
                wanted = batch.target[batch.target[:, 7] == TARGET]
                fits.append(overlap(answer.best(), wanted[:, 1:7]).cpu())
                small.append((wanted[:, 4:7].prod(1) < SMALL).cpu())
                related.append(held.asked[place, 2] >= 0)
                total += float(grounding_loss(answer, batch.target, self.nearest)) * len(place)
                voxels += len(answer.scene)
        fit, count = torch.cat(fits), len(held)
        found = {"acc25": _share(fit >= 0.25), "acc50": _share(fit >= 0.5)}
        for name, which in (("small", torch.cat(small)), ("relation", torch.cat(related))):
            if bool(which.any()):
                found[f"{name} acc25"] = _share(fit[which] >= 0.25)
        return found | {"voxels": voxels / count, "loss": total / count, "sentences": float(count)}

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """A fresh optimizer of the task's learner."""
        return self.learner(parameters)

    def fingerprint(self) -> str:
        """A short hash of the rooms, the sentences and the settings."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("splits", "clients")}
        held = dict[str, Tensor]()
        for split, rooms in sorted(self.splits.items()):
            held |= {f"{split} points": torch.cat([*rooms.points]), f"{split} boxes": torch.cat([*rooms.boxes])}
            held |= {f"{split} asked": rooms.asked, f"{split} ids": rooms.ids}
        return digest(plain, held, [c.fingerprint() for c in self.clients])


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def grounding_loss(answer: Grounded, target: Tensor, nearest: int = 32) -> Tensor:
    """Focal loss of how sure voxels are and 1 - DIoU of their boxes, both over the number of voxels that answer.

    `target` is [m, 8]: scene, box, role; see secateur.voxels.matching.
    """
    wanted = target[target[:, 7] == TARGET]
    which = assigned(answer.centres, answer.scene, wanted[:, 1:7], wanted[:, 0].long(), nearest)
    mine = which >= 0
    count = mine.sum().clamp(min=1)
    box = (1 - diou(answer.boxes[mine], wanted[which[mine], 1:7])).sum() / count
    return focal(answer.scores, mine).sum() / count + box


# Rooms


def rooms(
    *,
    train_size: int = 500,
    val_size: int = 60,
    test_size: int = 150,
    sentences: int = 4,
    points: int = 8000,
    side: float = 4.0,
    height: float = 2.5,
    fewest: int = 6,
    most: int = 10,
    colours: int = len(COLOURS),
    relations: float = 0.5,
    seed: int = 0,
    **settings: Any,
) -> Grounding:
    """Rooms of `side` metres with `fewest` to `most` boxes, `points` points and as many `sentences` each.

    The first `colours` of COLOURS are used. `relations` is the share of sentences that need a second box, as far as a
    room has such. No room has 2 or 4 boxes: there would be two of every look, and no sentence names one of them. The
    rooms are the same whatever the seed, which draws the order of training. `settings` are fields of `Grounding`.
    Raises TaskError for sizes that cannot be.
    """
    sizes = {"train": train_size, "val": val_size, "test": test_size}
    if (
        min(*sizes.values(), sentences, points) < 1
        or not 2 <= fewest <= most
        or not 0 <= relations <= 1
        or not 2 <= colours <= len(COLOURS)
    ):
        raise TaskError(
            f"rooms {sizes} of {fewest} to {most} boxes of {colours} colours, {sentences} sentences, were asked for",
            f"every number is one at least, boxes two, colours two to {len(COLOURS)}, and relations a share in [0, 1]",
            "Give other numbers.",
        )
    if not 2 <= side < math.inf or not 1 <= height < math.inf or most * 1.2 > side * side:
        raise TaskError(
            f"rooms of {side:g} x {side:g} x {height:g} m with up to {most} boxes were asked for",
            "a side has 2 m at least, a wall 1 m, and a box wants 1.2 square metres of floor",
            "Give larger rooms, or fewer boxes.",
        )
    if all(2 * _doubled(count) >= count for count in range(fewest, most + 1)):
        raise TaskError(
            f"rooms of {fewest} to {most} boxes were asked for",
            "of 2 boxes, and of 4, there are two of every look, so that no sentence names one of them",
            "Give 3 boxes, or 5 and more.",
        )
    if most > 2 * colours + _doubled(most):
        raise TaskError(
            f"rooms of up to {most} boxes of {colours} colours were asked for",
            f"there are {2 * colours} looks, of which {_doubled(most)} are there twice",
            "Give fewer boxes, or more colours.",
        )
    splits = {
        split: _rooms(split, size, sentences, points, side, height, fewest, most, colours, relations)
        for split, size in sizes.items()
    }
    return Grounding("rooms", splits, seed=seed, **settings)


@lru_cache(maxsize=6)
def _rooms(
    split: str,
    size: int,
    sentences: int,
    points: int,
    side: float,
    height: float,
    fewest: int,
    most: int,
    colours: int,
    share: float,
) -> Rooms:
    draw = torch.Generator().manual_seed({"train": 0, "val": 1, "test": 2}[split])
    clouds, boxes, asked, ids = [], [], list[list[int]](), list[Tensor]()
    for room in range(size):
        looks, held, said = [], torch.zeros(0, 6), list[tuple[str, int, int]]()
        while len(said) < 1:
            count = int(torch.randint(fewest, most + 1, (), generator=draw))
            looks = _looks(count, colours, draw)
            held = _placed(looks, side, draw)
            said = _said(looks, held, sentences, share, draw) if len(held) else []
        clouds.append(_cloud(looks, held, points, side, height, draw))
        boxes.append(held)
        for sentence, wanted, mentioned in said:
            asked.append([room, wanted, mentioned])
            ids.append(spelt(sentence))
    return Rooms(clouds, boxes, torch.tensor(asked), torch.stack(ids))


def _doubled(count: int) -> int:
    """How many looks two of a room's boxes share."""
    return count // 4 + 1


def _looks(count: int, colours: int, draw: torch.Generator) -> list[tuple[str, str]]:
    """Size and colour of each box: some of a few looks that there are several of, the others each once."""
    known = list(itertools.product(SIZES, [*COLOURS][:colours]))
    order = torch.randperm(len(known), generator=draw).tolist()
    doubled = _doubled(count)
    looks = [known[order[i % doubled]] for i in range(2 * doubled)]
    return (looks + [known[i] for i in order[doubled:]])[:count]


def _placed(looks: Sequence[tuple[str, str]], side: float, draw: torch.Generator) -> Tensor:
    """A box of each look on the floor, 10 cm apart at least [m, 6]; none where there was no room."""
    found: list[Tensor] = []
    for size, _ in sorted(looks, key=lambda look: look[0] != "big"):  # the big ones first: they need the room
        low, high = SIZES[size]
        for _ in range(60):
            sides = low + (high - low) * torch.rand(3, generator=draw)
            at = sides[:2] / 2 + 0.05 + (side - sides[:2] - 0.1) * torch.rand(2, generator=draw)
            clear = all(bool(((at - b[:2]).abs() > (sides[:2] + b[3:5]) / 2 + 0.1).any()) for b in found)
            if clear:
                found.append(torch.cat([at, sides[2:] / 2, sides]))
                break
        else:
            return torch.zeros(0, 6)
    order = sorted(range(len(looks)), key=lambda i: looks[i][0] != "big")
    boxes = torch.zeros(len(looks), 6)
    boxes[order] = torch.stack(found)
    return boxes


def _said(
    looks: Sequence[tuple[str, str]], boxes: Tensor, sentences: int, share: float, draw: torch.Generator
) -> list[tuple[str, int, int]]:
    """Different sentences of a room, each with the box asked for and the one mentioned, -1 for none."""
    where: dict[tuple[str, str], list[int]] = {}
    for i, look in enumerate(looks):
        where.setdefault(look, []).append(i)
    alone = {look: held[0] for look, held in where.items() if len(held) == 1}
    plain = [(f"the {size} {colour} box", i, -1) for (size, colour), i in alone.items()]
    related = []
    for (look, held), (other, i) in itertools.product(where.items(), alone.items()):
        if len(held) > 1:
            apart = (boxes[held, :2] - boxes[i, :2]).norm(dim=1)
            near, next_near = apart.sort().values[:2].tolist()
            if next_near - near > 0.3:
                text = f"the {look[0]} {look[1]} box nearest to the {other[0]} {other[1]} one"
                related.append((text, held[int(apart.argmin())], i))
    found = []
    for _ in range(sentences):
        pool = related if related and (not plain or float(torch.rand((), generator=draw)) < share) else plain
        if pool:
            found.append(pool.pop(int(torch.randint(len(pool), (), generator=draw))))
    return found


def _cloud(
    looks: Sequence[tuple[str, str]], boxes: Tensor, points: int, side: float, height: float, draw: torch.Generator
) -> Tensor:
    """Points on floor, walls and boxes, equally dense everywhere [points, 6]; colours vary by a few hundredths."""
    zero, across, up = torch.zeros(3), torch.tensor([side, 0.0, 0.0]), torch.tensor([0.0, 0.0, height])
    along = torch.tensor([0.0, side, 0.0])
    faces = [(zero, across, along, GREY), (zero, across, up, GREY), (zero, along, up, GREY)]
    for (_, name), box in zip(looks, boxes, strict=True):
        low, x, y, z = box[:3] - box[3:] / 2, *torch.diag(box[3:])
        ways = ((low + z, x, y), (low, x, z), (low, y, z), (low + y, x, z), (low + x, y, z))
        faces += [(corner, first, second, COLOURS[name]) for corner, first, second in ways]
    corners, firsts, seconds, colours = zip(*faces, strict=True)
    corner, first, second = torch.stack(corners), torch.stack(firsts), torch.stack(seconds)
    colour = torch.tensor(colours)
    area = first.norm(dim=1) * second.norm(dim=1)
    which = torch.multinomial(area, points, replacement=True, generator=draw)
    share = torch.rand(points, 2, generator=draw)
    place = corner[which] + share[:, :1] * first[which] + share[:, 1:] * second[which]
    place = place + 0.005 * torch.randn(points, 3, generator=draw)
    # Within the room: a wall that wavers about 0 would fill a layer of large voxels on either side.
    place = torch.minimum(place.clamp(min=0), torch.tensor([side, side, height]) - 1e-3)
    return torch.cat([place, (colour[which] + 0.04 * torch.randn(points, 3, generator=draw)).clamp(0, 1)], 1)
