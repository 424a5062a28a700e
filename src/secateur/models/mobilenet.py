"""MobileNet for images of 32x32 pixels: all but the first layer is depthwise 3x3 and 1x1 in turn.

Howard, Zhu, Chen, Kalenichenko, Wang, Weyand, Andreetto, Adam. "MobileNets: Efficient Convolutional Neural Networks for
Mobile Vision Applications." 2017. arXiv:1704.04861, section 3.2, table 1. Differs: the first layer keeps the picture's
size, which is 32 and not 224.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SettingError

STAGES = ((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1))
"""Channels and stride of each block, before the width is multiplied."""


class Separable(nn.Module):
    """Each channel filtered for itself, then all of them mixed in every pixel."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width_in, width_in, 3, stride, 1, groups=width_in, bias=False)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.pointwise = nn.Conv2d(width_in, width_out, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, height, width] -> [batch, width_out, height / stride, width / stride]."""
        return F.relu(self.bn2(self.pointwise(F.relu(self.bn1(self.depthwise(x))))))


class MobileNet(nn.Module):
    """A convolution, 13 separable blocks and a classifier. Images are [batch, channels, 32, 32].

    `width` multiplies every number of channels; smaller networks have fewer `stages`.
    """

    def __init__(
        self,
        width: float = 1.0,
        classes: int = 10,
        channels: int = 3,
        stages: tuple[tuple[int, int], ...] = STAGES,
    ) -> None:
        super().__init__()
        if not 0 < width <= 4:
            raise SettingError(f"a MobileNet {width:g} as wide was asked for", "it is above 0, at most 4", "Give 0.25.")
        widths = [max(1, round(width * out)) for out in (32, *(out for out, _ in stages))]
        self.conv = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(widths[0])
        pairs = zip(widths, widths[1:], (stride for _, stride in stages), strict=False)
        self.blocks = nn.Sequential(*(Separable(i, o, stride) for i, o, stride in pairs))
        self.linear = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], normalised -> scores [batch, classes]."""
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.linear(x.mean((2, 3)))


def mobilenet() -> MobileNet:
    """The network of the paper's widths, with random weights."""
    return MobileNet()


def mobilenet_half() -> MobileNet:
    """Half as wide, with random weights."""
    return MobileNet(0.5)


def mobilenet_quarter() -> MobileNet:
    """A quarter as wide, with random weights."""
    return MobileNet(0.25)
