"""Convolutions over occupied cells, in plain torch: a table of neighbours, a gather, one matrix product.

Graham, Engelcke, van der Maaten. "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks." 2018.
arXiv:1711.10275: the output of a submanifold convolution has the places of its input. Gwak, Choy, Savarese.
"Generative Sparse Detection Networks." 2020. arXiv:2006.12356, section 3.2: a transposed one makes new places. Each
gives at its places what the dense convolution of torch gives there, with zeros where there is no voxel.
"""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.voxels.sparse import OFFSETS, Voxels, children, half_stride, parents, rows, steps

TAPS = len(OFFSETS)


def gathered(features: Tensor, table: Tensor, weight: Tensor) -> Tensor:
    """Sum over taps of features[table] weight: [n, in], rows int64 [m, taps], [taps, in, out] -> [m, out].

    A row past the end is one of zeros.
    """
    whole = torch.cat([features, features.new_zeros(1, features.shape[1])])
    wide = whole.index_select(0, table.flatten()).view(len(table), -1)  # [m, taps * in]
    return wide @ weight.flatten(0, 1)


class _ConvKernel(nn.Module):
    """A weight [27, in, out], as the axes of a dense kernel [out, in, 3, 3, 3] in another order; no bias.

    What has no convolution in its name and three axes counts as a stack of experts: see secateur.cut.role.
    """

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(TAPS, width_in, width_out))
        # He et al. 2015 with a third of the taps: on surfaces about so many neighbours are there.
        nn.init.normal_(self.weight, std=math.sqrt(2 / (width_in * TAPS / 3)))


class Submanifold(nn.Module):
    """3x3x3 at the places there are: Voxels in, the same places out, as conv3d with padding 1."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.kernel = _ConvKernel(width_in, width_out)

    def forward(self, x: Voxels) -> Voxels:
        """Features [n, in] -> [n, out]."""
        table = x.table("around", steps(OFFSETS * x.stride))
        return x.at(gathered(x.features, table, self.kernel.weight))


class Strided(nn.Module):
    """3x3x3 with a step of two: the cells of twice the stride that hold voxels, as conv3d with padding 1."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.kernel = _ConvKernel(width_in, width_out)

    def forward(self, x: Voxels) -> Voxels:
        """Features [n, in] -> [m, out], stride doubled."""
        keys = parents(x)
        table = rows(x.keys, keys[:, None] + steps(OFFSETS * x.stride).to(keys.device))
        features = gathered(x.features, table, self.kernel.weight)
        return Voxels(keys, features, 2 * x.stride, x.scenes)


class Generative(nn.Module):
    """Transposed 3x3x3 with a step of two: every place a voxel reaches, stride halved, as conv_transpose3d."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.kernel = _ConvKernel(width_in, width_out)

    def forward(self, x: Voxels) -> Voxels:
        """Features [n, in] -> [m, out] at the places of `children`."""
        keys, half = children(x), half_stride(x)
        weight = self.kernel.weight
        told = x.features @ weight.transpose(0, 1).flatten(1)  # [n, 27 * out]: what a voxel says to each place
        table = rows(keys, x.keys[:, None] + steps(OFFSETS * half).to(keys.device))
        features = told.new_zeros(len(keys), weight.shape[2])
        features = features.index_add(0, table.flatten(), told.reshape(-1, weight.shape[2]))
        return Voxels(keys, features, half, x.scenes)


def pooled(x: Voxels) -> Voxels:
    """The largest of each feature in cells of twice the stride: [n, channels] -> [m, channels]."""
    keys = parents(x)
    low = torch.div(x.coords[:, 1:], 2 * x.stride, rounding_mode="floor") * 2 * x.stride
    where = rows(keys, x.keys - steps(x.coords[:, 1:] - low))
    index = where[:, None].expand_as(x.features)
    most = x.features.new_zeros(len(keys), x.features.shape[1])
    most = most.scatter_reduce(0, index, x.features, "amax", include_self=False)
    return Voxels(keys, most, 2 * x.stride, x.scenes)


class Norm(nn.BatchNorm1d):
    """Batch norm over all voxels of a batch; of a single one, which has no variance, by what was seen before."""

    def forward(self, features: Tensor) -> Tensor:
        """[n, channels] -> the same."""
        if self.training and len(features) < 2:
            known = (self.running_mean, self.running_var, self.weight, self.bias)
            return F.batch_norm(features, *known, training=False, eps=self.eps)
        return super().forward(features)


class Normed(nn.Module):
    """A convolution of voxels, a batch norm and ReLU."""

    def __init__(self, convolution: Submanifold | Strided | Generative, width: int) -> None:
        super().__init__()
        self.convolution, self.norm = convolution, Norm(width)

    def forward(self, x: Voxels) -> Voxels:
        """As the convolution."""
        x = self.convolution(x)
        return x.at(F.relu(self.norm(x.features)))


class Residual(nn.Module):
    """A basic block (He et al. 2015, arXiv 1512.03385): two convolutions, the first of which may halve the grid."""

    def __init__(self, width_in: int, width: int, stride: int = 1) -> None:
        super().__init__()
        first = Strided(width_in, width) if stride == 2 else Submanifold(width_in, width)
        self.first, self.second, self.norm = Normed(first, width), Submanifold(width, width), Norm(width)
        self.halves = stride == 2
        self.short = nn.Linear(width_in, width, bias=False) if stride == 2 or width_in != width else None

    def forward(self, x: Voxels) -> Voxels:
        """Features [n, in] -> [m, width]."""
        inner = self.second(self.first(x))
        short = pooled(x).features if self.halves else x.features
        short = short if self.short is None else self.short(short)
        return replace(inner, features=F.relu(self.norm(inner.features) + short))
