"""Depthwise convolutions of a few taps: by hand, and every variant against float64 and the oracle."""

import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from secateur import kernels
from secateur.axes import Taps
from secateur.errors import FormatError, SettingError
from secateur.formats import DepthTaps, GroupCols, unpack
from secateur.formats.conv import SparseConv2d, convolve

SPARSITIES = [0.0, 0.6, 0.95, 1.0]
# Channels, kernel, picture, stride, padding, dilation: pictures narrower and wider than vectors of both lengths, of
# several items, and every other pixel of rows that fill a vector or half of one, with some left over and without.
CONVOLUTIONS = [
    (1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (19, (3, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    (5, (3, 3), (30, 23), (1, 1), (1, 1), (1, 1)),
    (3, (3, 3), (70, 61), (1, 1), (0, 0), (1, 1)),
    (6, (3, 3), (9, 13), (2, 2), (1, 1), (1, 1)),
    (4, (3, 3), (56, 66), (2, 2), (1, 1), (1, 1)),
    (7, (5, 5), (14, 17), (1, 1), (2, 2), (1, 1)),
    (3, (5, 5), (12, 40), (2, 2), (2, 2), (1, 1)),
    (5, (5, 1), (11, 16), (2, 3), (3, 1), (2, 1)),
    (5, (2, 3), (12, 16), (3, 1), (2, 4), (1, 3)),
    (2, (7, 7), (90, 2), (4, 4), (3, 3), (1, 1)),
    (9, (3, 3), (2, 2), (1, 1), (1, 1), (1, 1)),
    (5, (3, 3), (4, 4), (2, 2), (1, 1), (1, 1)),
    (4, (3, 3), (16, 32), (2, 2), (1, 1), (1, 1)),
    (3, (3, 3), (5, 16), (2, 2), (1, 1), (1, 1)),
    (3, (3, 3), (9, 47), (1, 2), (0, 2), (2, 1)),
    (2, (3, 3), (130, 40), (1, 1), (1, 1), (1, 1)),
    (2, (3, 3), (300, 64), (2, 2), (1, 1), (1, 1)),
    (3, (3, 3), (12, 14), (1, 1), (0, 0), (1, 1)),
    (2, (3, 3), (600, 10), (1, 1), (1, 1), (1, 1)),
    (2, (3, 3), (900, 13), (2, 2), (1, 1), (1, 1)),
]


def whole_numbers(shape, seed):
    """Small enough that a sum is exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def case(channels, kernel, sparsity, seed=0):
    weight = whole_numbers((channels, 1, *kernel), seed) + 0.5
    mask = torch.rand(weight.shape, generator=torch.Generator().manual_seed(seed)) >= sparsity
    return weight, mask, whole_numbers((channels,), seed + 1)


def test_taps_by_hand():
    weight = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 3.0, 0.0, 0.0], [4.0, 0.0, 5.0, 0.0], [0.0] * 4]).view(
        4, 1, 2, 2
    )
    packed = DepthTaps().pack(weight, bias=torch.tensor([0.5, 0.25, 0.0, 7.0]))
    assert packed.tensors["values"].tolist() == [0.5, 1, 2, 0.25, 3, 0, 4, 5, 7]  # of each channel its bias, its taps
    assert packed.tensors["shapes"].tolist() == [0, 2, 5]
    assert packed.tensors["which"].tolist() == [2, 1, 2, 0]
    assert packed.header.tolist() == [7, 1, 4, 4, 2, 2]
    assert torch.equal(packed.dense(), weight)
    assert convolve(packed, torch.ones(1, 4, 2, 2)).flatten().tolist() == [3.5, 3.25, 9, 7]
    assert packed.matmul(torch.ones(1, 4)).tolist() == [[3.5, 3.25, 9, 7]]
    four = DepthTaps().pack(weight := torch.randn(64, 1, 3, 3), Taps().select(weight.abs(), 64 * 4))
    assert len(four.tensors["shapes"]) <= 8


@pytest.mark.parametrize("at", CONVOLUTIONS, ids=str)
def test_every_variant_convolves(at):
    channels, kernel, size, *pairs = at
    for sparsity in SPARSITIES:
        weight, mask, bias = case(channels, kernel, sparsity)
        packed = DepthTaps().pack(weight, mask, bias)
        again = unpack({"header": packed.header, **packed.tensors})
        assert torch.equal(again.dense(), weight * mask)
        assert torch.equal(again.format.bias(again), bias)
        x = whole_numbers((2, channels, *size), 3)
        wanted = F.conv2d(x.double(), (weight * mask).double(), bias.double(), *pairs, channels).float()
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                assert torch.equal(convolve(packed, x, *pairs), wanted), f"{level} {sparsity}"
                assert torch.equal(convolve(again, x, *pairs, (0, 6)), wanted.clamp(0, 6)), f"{level} {sparsity}"


def test_every_number_of_taps_has_its_loop():
    x = whole_numbers((1, 26, 20, 20), 3)
    weight = whole_numbers((26, 1, 5, 5), 0).abs() + 1
    mask = torch.arange(25) < torch.arange(26).unsqueeze(1)  # no tap, one, two and so on
    packed = DepthTaps().pack(weight, mask.view(26, 1, 5, 5))
    wanted = F.conv2d(x.double(), (weight * mask.view(26, 1, 5, 5)).double(), padding=2, groups=26).float()
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            assert torch.equal(convolve(packed, x, padding=(2, 2)), wanted), level


def test_variants_round_as_the_oracle_does():
    made = torch.Generator().manual_seed(0)
    weight, x = torch.randn(33, 1, 5, 5, generator=made), torch.randn(1, 33, 12, 12, generator=made)
    mask = torch.rand(weight.shape, generator=made) > 0.6
    packed = DepthTaps().pack(weight, mask)
    wanted = F.conv2d(x.double(), (weight * mask).double(), padding=2, groups=33)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            error = (convolve(packed, x, padding=(2, 2)).double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-6, level


def test_threads_do_not_change_the_result():
    weight, mask, bias = case(37, (3, 3), 0.5)
    packed = DepthTaps().pack(weight * 0.3, mask, bias)
    pictures = torch.randn(3, 37, 17, 15), torch.randn(1, 37, 130, 90)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = [convolve(packed, x, padding=(1, 1)) for x in pictures]
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(3):
                assert all(map(torch.equal, alone, (convolve(packed, x, padding=(1, 1)) for x in pictures)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_what_is_not_finite_propagates_as_in_a_dense_convolution(stride):
    weight, mask, bias = case(6, (3, 3), 0.5)
    weight[4, 0, 1, 1], mask[4, 0, 1, 1] = math.inf, True
    packed = DepthTaps().pack(weight, mask, bias)
    dense = torch.where(mask, weight, torch.zeros(())).double()
    for place, value in (((0, 0, 0, 0), math.inf), ((1, 5, 8, 8), math.nan), ((1, 3, 4, 7), -math.inf)):
        x = whole_numbers((2, 6, 9, 9), 1)
        x[place] = value
        # By hand, since a library may leave a zero out: what each place sees, times every weight.
        seen = F.unfold(x.double(), (3, 3), 1, 1, stride).view(2, 6, 9, -1)
        wanted = (dense.view(1, 6, 9, 1) * seen).sum(2) + bias.view(-1, 1)
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                got = convolve(packed, x, stride, (1, 1)).double().flatten(2)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=level)


def layer(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(12, 12, 3, groups=12, **settings)
    with torch.no_grad():
        conv.weight[torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
    return conv.requires_grad_(False)


X = torch.randn(2, 12, 9, 11, generator=torch.Generator().manual_seed(9))


def test_a_layer_does_what_the_dense_one_does(tmp_path, monkeypatch):
    convs = (layer(), layer(stride=2, padding=1, bias=False), layer(padding="same", dilation=2))
    for conv in convs:
        sparse = SparseConv2d.of(conv, DepthTaps())
        torch.testing.assert_close(sparse(X), conv(X))
        torch.testing.assert_close(sparse(X[0]), conv(X[0]))
        torch.testing.assert_close(sparse.dense()(X), conv(X))
        assert torch.equal(sparse.dense().weight, conv.weight)
        assert "12, 12, kernel_size=(3, 3)" in repr(sparse)
        save_file(sparse.state_dict(), tmp_path / "layer.safetensors")
        other = SparseConv2d(DepthTaps().pack(torch.zeros(12, 1, 3, 3)), *pairs_of(sparse))
        other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
        assert torch.equal(other(X), sparse(X))
    y = X.clone().requires_grad_()
    sparse(y).sum().backward()
    assert torch.equal(y.grad, torch.autograd.grad(convs[-1](z := X.clone().requires_grad_()).sum(), z)[0])
    monkeypatch.setattr(kernels, "find", lambda name: None)
    torch.testing.assert_close(sparse(X), convs[-1](X))


def pairs_of(layer):
    return layer.stride, layer.padding, layer.dilation


def test_compile_and_export_see_one_operator():
    conv = layer(padding=1, stride=2)
    model = nn.Sequential(SparseConv2d.of(conv, DepthTaps()), nn.ReLU())
    with torch.no_grad():
        exported = torch.export.export(model, (X,))
        assert [n.target for n in exported.graph.nodes if "secateur" in str(n.target)] == [
            torch.ops.secateur.packed_conv2d.default
        ]
        torch.testing.assert_close(exported.module()(X), conv(X).relu())


def test_what_does_not_fit_is_refused():
    packed = DepthTaps().pack(torch.ones(8, 1, 3, 3))
    with pytest.raises(FormatError, match=r"a depth-taps weight \[8, 1, 3, 3\] was to convolve torch.float32 \[1, 4,"):
        convolve(packed, torch.ones(1, 4, 8, 8))
    with pytest.raises(FormatError, match=r"it is \[8, 2, 3, 3\], not a depthwise convolution"):
        DepthTaps().pack(torch.ones(8, 2, 3, 3))
    with pytest.raises(FormatError, match="its kernels have 64 taps, more than 63"):
        DepthTaps().pack(torch.ones(8, 1, 8, 8))
    with pytest.raises(FormatError, match="its dtype is torch.bfloat16"):
        DepthTaps().pack(torch.ones(8, 1, 3, 3, dtype=torch.bfloat16))
    with pytest.raises(FormatError, match="it is not depthwise: 4 groups of 8 inputs and 8 outputs"):
        SparseConv2d.of(nn.Conv2d(8, 8, 3, groups=4), DepthTaps())
    with pytest.raises(FormatError, match="it has 8 groups"):
        SparseConv2d.of(nn.Conv2d(8, 8, 3, groups=8), GroupCols(4))
    with pytest.raises(SettingError, match="a depthwise kernel of 9x9 was asked for"):
        DepthTaps(9, 9)
    whole = {"header": packed.header, **packed.tensors}
    for name, wrong, why in (
        ("values", packed.tensors["values"][1:], "its shapes speak of 80 values, and there are 79"),
        ("which", packed.tensors["which"] + 1, "a channel has shape 1 of 1"),
        ("shapes", packed.tensors["shapes"] * 2, "its shapes do not rise within 9 taps"),
        ("which", packed.tensors["which"].long(), "are not torch.float32, torch.int64, torch.int16"),
    ):
        with pytest.raises(FormatError, match=why):
            unpack({**whole, name: wrong})
    packed.tensors["values"][0] += 1
    with pytest.raises(FormatError, match="its tensors were changed after packing"):
        convolve(packed, torch.ones(1, 8, 8, 8))
