"""A detector of a few layers and scenes of bright squares and dark bars: made in milliseconds, trained in seconds."""

import torch
from torch import Tensor, nn

from secateur.tasks.detection import Detection
from secateur.tasks.learners import Adam

SIDE = 64


def _layer(width_in: int, width_out: int, stride: int) -> list[nn.Module]:
    conv = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
    return [conv, nn.BatchNorm2d(width_out), nn.ReLU()]


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_layer(width, width, 1), *_layer(width, width, 1)[:2])

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


class Detector(nn.Module):
    """Backbone, neck over two scales, head: [batch, 3, 64, 64] -> [batch, 5 + classes, 4, 4]."""

    def __init__(self, classes: int = 2, width: int = 12) -> None:
        super().__init__()
        self.backbone = nn.Sequential(*_layer(3, width, 2), *_layer(width, width, 2), Block(width))
        self.deeper = nn.Sequential(*_layer(width, 2 * width, 2), *_layer(2 * width, 2 * width, 2))
        self.neck = nn.Sequential(*_layer(3 * width, 2 * width, 1))
        self.head = nn.Conv2d(2 * width, 5 + classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        near = self.backbone(x)
        both = torch.cat([nn.functional.avg_pool2d(near, 4), self.deeper(near)], 1)
        answer = self.head(self.neck(both))
        return torch.cat([answer[:, :1].sigmoid(), answer[:, 1:5], answer[:, 5:].softmax(1)], 1)


def detector(seed: int = 0, width: int = 12) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Detector(width=width).eval()


def scenes(count: int, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Grey noise with one to three things in it: a bright square of 16 to 24 pixels, or a dark bar twice as wide."""
    draw = torch.Generator().manual_seed(seed)
    pictures = torch.randint(90, 166, (count, 3, SIDE, SIDE), generator=draw, dtype=torch.uint8)
    labels = []
    for picture in pictures:
        held = []
        for _ in range(int(torch.randint(1, 4, (), generator=draw))):
            kind = int(torch.randint(2, (), generator=draw))
            high = int(torch.randint(16 - 6 * kind, 25 - 9 * kind, (), generator=draw))
            wide = high * (1 + kind)
            x, y = (int(torch.randint(SIDE - s + 1, (), generator=draw)) for s in (wide, high))
            picture[:, y : y + high, x : x + wide] = 20 if kind else 240
            held.append([x / SIDE, y / SIDE, (x + wide) / SIDE, (y + high) / SIDE, kind])
        labels.append(torch.tensor(held))
    return pictures, labels


def toy(**changes: object) -> Detection:
    splits = {"train": scenes(256, 0), "val": scenes(48, 1), "test": scenes(48, 2)}
    settings = {"taken": (SIDE, SIDE), "batch": 16, "learner": Adam(5e-3), "view": 64, "samples": 32, **changes}
    return Detection("scenes", splits, ("square", "bar"), **settings)  # type: ignore[arg-type]
