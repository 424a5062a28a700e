"""Small networks that draw a picture larger: a plain residual one, one with attention in windows, and bicubic.

Pictures are RGB in [0, 1], [batch, 3, height, width] -> [batch, 3, scale * height, scale * width].

    Edsr      Lim, Son, Kim, Nah, Lee 2017, arXiv:1707.02921, figure 3: residual blocks without normalisation
    SwinIr    Liang, Cao, Sun, Zhang, Van Gool, Timofte 2021, arXiv:2108.10257, section 3: Swin blocks in groups
    Bicubic   Keys 1981: what both are held against

Both end as the lightweight SwinIR does: one convolution to 3 scale^2 channels, shuffled into pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.errors import SettingError

SCALES = (2, 3, 4)


def _check(scale: int, **counts: int) -> None:
    if scale not in SCALES:
        raise SettingError(f"a network that enlarges {scale} times was asked for", "it is for 2 to 4", "Give scale=2.")
    for name, count in counts.items():
        if count < 1:
            raise SettingError(f"{name}={count} was asked for", "one is the least", f"Give {name}=4, say.")


class Bicubic(nn.Module):
    """Bicubic interpolation with a = -1/2, as Pillow and MATLAB have it; no weights."""

    def __init__(self, scale: int = 2) -> None:
        super().__init__()
        _check(scale)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, h, w] -> [batch, 3, scale h, scale w]."""
        # Without antialias torch interpolates with a = -3/4, which is another picture.
        return F.interpolate(x, scale_factor=self.scale, mode="bicubic", antialias=True)


class Convolved(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, 1, 1)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return x + self.conv2(F.relu(self.conv1(x)))


class Edsr(nn.Module):
    """Convolutions only: 124,000 weights at width 32 with 6 blocks, twice as large."""

    def __init__(self, scale: int = 2, width: int = 32, blocks: int = 6) -> None:
        super().__init__()
        _check(scale, width=width, blocks=blocks)
        self.scale = scale
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.body = nn.Sequential(*(Convolved(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, width, 3, 1, 1)
        self.tail = nn.Conv2d(width, 3 * scale**2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, h, w] -> [batch, 3, scale h, scale w]."""
        x = self.first(x - 0.5)
        x = x + self.last(self.body(x))
        return F.pixel_shuffle(self.tail(x), self.scale) + 0.5


class WindowAttention(nn.Module):
    """Attention within windows of a picture, with a learned bias for how far apart two pixels lie."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.places = nn.Embedding((2 * window - 1) ** 2, heads)  # a bias per head and offset of two pixels
        nn.init.normal_(self.places.weight, std=0.02)
        y, x = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        apart = torch.stack([(p.reshape(-1, 1) - p.reshape(1, -1)) + window - 1 for p in (y, x)])
        self.register_buffer("apart", apart[0] * (2 * window - 1) + apart[1], persistent=False)  # [w^2, w^2]

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width], its sides multiples of the window; the same shape."""
        batch, high, wide, width = x.shape
        size, side = self.window, self.window**2
        bias = self.places(self.apart).permute(2, 0, 1).unsqueeze(0)  # [1, heads, w^2, w^2]
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
            bias = bias + self._apart(high, wide, x)
        x = x.reshape(batch, high // size, size, wide // size, size, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(-1, side, width)  # [batch * windows, w^2, width]
        q, k, v = self.qkv(x).reshape(len(x), side, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        windows = bias.expand(len(x) // len(bias), -1, -1, -1) if len(bias) == 1 else bias.repeat(batch, 1, 1, 1)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=windows)
        x = self.proj(seen.transpose(1, 2).reshape(len(x), side, width))
        x = x.reshape(batch, high // size, wide // size, size, size, width)
        x = x.permute(0, 1, 3, 2, 4, 5).reshape(batch, high, wide, width)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x

    def _apart(self, high: int, wide: int, like: Tensor) -> Tensor:
        """What keeps pixels apart that rolling brought side by side: [windows, 1, w^2, w^2], 0 or very negative."""
        size = self.window

        def regions(length: int) -> Tensor:
            place = torch.arange(length, device=like.device)
            return (place >= length - size).int() + (place >= length - self.shift).int()

        region = 3 * regions(high)[:, None] + regions(wide)[None, :]
        region = region.reshape(high // size, size, wide // size, size).transpose(1, 2).reshape(-1, size**2)
        return (region[:, None, :] != region[:, :, None]).to(like.dtype).mul(-100.0).unsqueeze(1)


class Swin(nn.Module):
    """Attention in windows, then a two-layer perceptron for each pixel, both after a norm and beside a shortcut."""

    def __init__(self, width: int, heads: int, window: int, shift: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window, shift)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, h, w, width]; the same shape."""
        x = x + self.attn(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Group(nn.Module):
    """A pair of Swin blocks, the second with windows moved by half, and a convolution, beside a shortcut."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.plain, self.shifted = Swin(width, heads, window, 0), Swin(width, heads, window, window // 2)
        self.conv = nn.Conv2d(width, width, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, width, h, w]; the same shape."""
        inner = self.shifted(self.plain(x.permute(0, 2, 3, 1)))
        return x + self.conv(inner.permute(0, 3, 1, 2))


class SwinIr(nn.Module):
    """Attention in windows between convolutions: 70,000 weights at width 32 with 2 groups, twice as large."""

    def __init__(self, scale: int = 2, width: int = 32, groups: int = 2, heads: int = 4, window: int = 8) -> None:
        super().__init__()
        _check(scale, width=width, groups=groups, heads=heads, window=window)
        if width % heads or window < 2:
            raise SettingError(
                f"a network of width {width} with {heads} heads and windows of {window} was asked for",
                "heads share the width out equally, and a window is moved by half its size",
                "Give width=32, heads=4 and window=8, say.",
            )
        self.scale, self.window = scale, window
        self.first = nn.Conv2d(3, width, 3, 1, 1)
        self.groups = nn.Sequential(*(Group(width, heads, window) for _ in range(groups)))
        self.norm = nn.LayerNorm(width)
        self.last = nn.Conv2d(width, width, 3, 1, 1)
        self.tail = nn.Conv2d(width, 3 * scale**2, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, 3, h, w] -> [batch, 3, scale h, scale w]; sides are filled up to whole windows inside."""
        high, wide = x.shape[-2:]
        fill = (0, -wide % self.window, 0, -high % self.window)
        x = F.pad(x - 0.5, fill, mode="replicate") if any(fill) else x - 0.5
        x = self.first(x)
        inner = self.norm(self.groups(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        x = F.pixel_shuffle(self.tail(x + self.last(inner)), self.scale) + 0.5
        return x[..., : high * self.scale, : wide * self.scale]


def edsr_x2() -> Edsr:
    """The convolutional network for twice the size, with random weights."""
    return Edsr(2)


def edsr_x3() -> Edsr:
    """For three times the size."""
    return Edsr(3)


def edsr_x4() -> Edsr:
    """For four times the size."""
    return Edsr(4)


def swinir_x2() -> SwinIr:
    """The network with attention for twice the size, with random weights."""
    return SwinIr(2)


def swinir_x3() -> SwinIr:
    """For three times the size."""
    return SwinIr(3)


def swinir_x4() -> SwinIr:
    """For four times the size."""
    return SwinIr(4)
