"""FastestDet: a detector of 240,000 weights, a ShuffleNetV2 with one map of answers and no anchors.

Ma, Zhang, Zheng, Sun. "ShuffleNet V2." 2018. arXiv:1807.11164, section 4: a unit works on every second channel and
puts the others through as they are. The neck and the head are those of FastestDet (dog-qiuqiu, 2022): three feature
maps brought to one size, depthwise 5x5 convolutions, and for each cell of 16x16 pixels one answer.

A picture is BGR in [0, 1], [batch, 3, height, width]; the answer is [batch, 5 + classes, height / 16, width / 16]:
how sure that there is something, four numbers of its box (see `boxes`), and a chance for each class.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SettingError

STRIDE = 16
"""Pixels a side of a cell of the answer."""


def _conv(width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    conv = nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(width_out)]


def _conv_relu(width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    return [*_conv(width_in, width_out, kernel, stride, groups), nn.ReLU()]


def _branch(width_in: int, inner: int, width_out: int, stride: int) -> nn.Sequential:
    layers = [*_conv_relu(width_in, inner), *_conv(inner, inner, 3, stride, inner), *_conv_relu(inner, width_out)]
    return nn.Sequential(*layers)


class ShuffleUnit(nn.Module):
    """Every second channel goes through as it is, the others through a branch: [batch, width, h, w], the same shape."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch_main = _branch(width // 2, width // 2, width // 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Even channels first, then what the branch makes of the odd ones."""
        return torch.cat([x[:, 0::2], self.branch_main(x[:, 1::2])], 1)


class HalvingUnit(nn.Module):
    """Two branches over all channels: [batch, width_in, h, w] -> [batch, width_out, h / 2, w / 2]."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.branch_main = _branch(width_in, width_out // 2, width_out - width_in, 2)
        self.branch_proj = nn.Sequential(*_conv(width_in, width_in, 3, 2, width_in), *_conv_relu(width_in, width_in))

    def forward(self, x: Tensor) -> Tensor:
        """The projection first."""
        return torch.cat([self.branch_proj(x), self.branch_main(x)], 1)


class Backbone(nn.Module):
    """Three stages, 48, 96 and 192 channels wide at strides of 8, 16 and 32."""

    def __init__(self) -> None:
        super().__init__()
        self.first_conv = nn.Sequential(*_conv_relu(3, 24, 3, 2))
        self.stage2, self.stage3, self.stage4 = _stage(24, 48, 4), _stage(48, 96, 8), _stage(96, 192, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The map of each stage."""
        first = self.stage2(F.max_pool2d(self.first_conv(x), 3, 2, 1))
        second = self.stage3(first)
        return first, second, self.stage4(second)


def _stage(width_in: int, width_out: int, units: int) -> nn.Sequential:
    return nn.Sequential(HalvingUnit(width_in, width_out), *(ShuffleUnit(width_out) for _ in range(units - 1)))


class Pointwise(nn.Module):
    """A 1x1 convolution with norm and activation."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv1x1 = nn.Sequential(*_conv_relu(width_in, width_out))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, h, w] -> [batch, width_out, h, w]."""
        return self.conv1x1(x)


class Pyramid(nn.Module):
    """Sees each place at three sizes: one, two and three depthwise 5x5 convolutions side by side, and a shortcut."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.Conv1x1 = Pointwise(width_in, width)
        self.S1, self.S2, self.S3 = (_deep(width, n) for n in (1, 2, 3))
        self.output = nn.Sequential(*_conv(3 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, h, w] -> [batch, width, h, w]."""
        x = self.Conv1x1(x)
        return F.relu(x + self.output(torch.cat([self.S1(x), self.S2(x), self.S3(x)], 1)))


def _deep(width: int, layers: int) -> nn.Sequential:
    return nn.Sequential(*(layer for _ in range(layers) for layer in _conv_relu(width, width, 5, 1, width)))


class Head(nn.Module):
    """A depthwise 5x5 and a 1x1 convolution: [batch, width, h, w] -> [batch, answers, h, w]."""

    def __init__(self, width: int, answers: int) -> None:
        super().__init__()
        self.conv5x5 = nn.Sequential(*_conv_relu(width, width, 5, 1, width), *_conv(width, answers))

    def forward(self, x: Tensor) -> Tensor:
        """The answers, without an activation."""
        return self.conv5x5(x)


class DetectHead(nn.Module):
    """Three heads side by side: something or nothing, where, and which class."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.conv1x1 = Pointwise(width, width)
        self.obj_layers, self.reg_layers, self.cls_layers = (Head(width, n) for n in (1, 4, classes))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, h, w] -> [batch, 5 + classes, h, w]."""
        x = self.conv1x1(x)
        return torch.cat([self.obj_layers(x).sigmoid(), self.reg_layers(x), self.cls_layers(x).softmax(1)], 1)


class FastestDet(nn.Module):
    """The detector for some number of classes; see the module."""

    def __init__(self, classes: int = 80) -> None:
        super().__init__()
        if classes < 1:
            raise SettingError(f"a detector of {classes} classes was asked for", "one is the least", "Give classes=3.")
        self.backbone, self.SPP, self.detect_head = Backbone(), Pyramid(48 + 96 + 192, 96), DetectHead(96, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, height, width], sides multiples of 32 -> [batch, 5 + classes, height / 16, width / 16]."""
        first, second, third = self.backbone(x)
        together = torch.cat([F.avg_pool2d(first, 3, 2, 1), second, F.interpolate(third, scale_factor=2.0)], 1)
        return self.detect_head(self.SPP(together))


def boxes(answer: Tensor) -> Tensor:
    """The box of every cell, x1 y1 x2 y2 as shares of the picture: [batch, 5 + classes, h, w] -> [batch, h, w, 4].

    A cell's centre may lie up to one cell from its corner to either side: x = (column + tanh(t)) / w, and so for y;
    width and height are sigmoids, as shares of the whole picture.
    """
    high, wide = answer.shape[-2:]
    row = torch.arange(high, device=answer.device, dtype=answer.dtype)[:, None]
    column = torch.arange(wide, device=answer.device, dtype=answer.dtype)
    x, y = (answer[:, 1].tanh() + column) / wide, (answer[:, 2].tanh() + row) / high
    half_wide, half_high = answer[:, 3].sigmoid() / 2, answer[:, 4].sigmoid() / 2
    return torch.stack([x - half_wide, y - half_high, x + half_wide, y + half_high], -1)


def fastestdet() -> FastestDet:
    """The detector of blood cells: red ones, white ones, platelets. Random weights."""
    return FastestDet(3)
