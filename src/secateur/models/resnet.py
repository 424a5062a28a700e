"""The CIFAR-10 residual networks of 20, 32, 44 and 56 layers, with shortcuts that have no parameters.

He, Zhang, Ren, Sun. "Deep Residual Learning for Image Recognition." 2015. arXiv:1512.03385, section 4.2, option A:
where the width doubles, the shortcut takes every second pixel and pads the new channels with zeros.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SettingError


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width_out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width_out)
        self.stride, self.grown = stride, width_out - width_in

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width_in, height, width] -> [batch, width_out, height / stride, width / stride]."""
        inner = F.relu(self.bn1(self.conv1(x)))
        inner = self.bn2(self.conv2(inner))
        if self.grown:
            before = self.grown // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.grown - before))
        return F.relu(inner + x)


class CifarResNet(nn.Module):
    """Three stages of (depth - 2) / 6 blocks, 16, 32 and 64 channels wide. Images are [batch, 3, 32, 32].

    Smaller ones for measurements on a processor: `width` of the first stage, and `channels` of the images.
    """

    def __init__(self, depth: int = 20, classes: int = 10, width: int = 16, channels: int = 3) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6:
            raise SettingError(
                f"a residual network of depth {depth} was asked for",
                "three equal stages of two-layer blocks need a depth of 6n + 2",
                "Use 20, 32, 44 or 56.",
            )
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = _stage(width, width, blocks, 1)
        self.layer2 = _stage(width, 2 * width, blocks, 2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, 2)
        self.linear = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], normalised -> scores [batch, classes]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(width_in: int, width_out: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(width_in, width_out, stride)
    return nn.Sequential(first, *(BasicBlock(width_out, width_out, 1) for _ in range(blocks - 1)))


def resnet20() -> CifarResNet:
    """The network of 20 layers, with random weights."""
    return CifarResNet(20)


def resnet32() -> CifarResNet:
    """The network of 32 layers, with random weights."""
    return CifarResNet(32)


def resnet56() -> CifarResNet:
    """The network of 56 layers, with random weights."""
    return CifarResNet(56)
