"""Slices in blocks of inputs: by hand, over many chunks and blocks, every place that a byte can name, and damaged."""

import pytest
import torch

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats import Bitmap, SellBlocked, unpack
from tests.kernels.test_grid import DTYPES


def test_two_blocks_by_hand():
    weight = torch.zeros(3, 300)
    weight[0, 5], weight[1, 0], weight[1, 7], weight[1, 255], weight[2, 256], weight[2, 299] = 1, 2, 3, 4, 5, 6
    packed = SellBlocked().pack(weight)
    rest = list(range(3, 16))
    assert packed.tensors["rows"].tolist() == [[1, 0, 2, *rest], [2, 0, 1, *rest]]  # the fullest of a block first
    assert packed.tensors["offsets"].tolist() == [0, 2, 3]  # three weights, two a step, and two
    assert packed.tensors["columns"][:, :2].tolist() == [[[0, 7], [5, 0]], [[255, 0], [0, 0]], [[0, 43], [0, 0]]]
    assert packed.tensors["values"][:, :2].tolist() == [[[2, 3], [1, 0]], [[4, 0], [0, 0]], [[5, 6], [0, 0]]]
    assert torch.equal(packed.dense(), weight)
    x = torch.arange(300.0).unsqueeze(0)
    for level in kernels.levels():
        with kernels.forced(level):
            assert packed.matmul(x).tolist() == [[5.0, 3 * 7 + 4 * 255, 5 * 256 + 6 * 299]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(256, 256), (257, 513), (300, 256), (530, 700)])
def test_chunks_and_blocks_that_are_whole_and_not(shape, dtype):
    made = torch.Generator().manual_seed(0)
    weight = torch.randint(-2, 3, shape, generator=made) * (torch.rand(shape, generator=made) < 0.1)
    weight[:, -40:] = 0
    weight[-1, -1], weight[260 % shape[0]] = 2, 0
    weight = weight.to(dtype)
    packed = SellBlocked().pack(weight)
    assert torch.equal(packed.dense(), weight)
    assert torch.equal(unpack({"header": packed.header, **packed.tensors}).dense(), weight)
    x = torch.randint(-4, 5, (11, shape[1]), generator=made).to(dtype)
    bias = torch.randint(-4, 5, (shape[0],), generator=made).to(dtype)
    wanted = (x.double() @ weight.double().T + bias).to(dtype)
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x, bias), wanted), level


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_place_of_a_block_is_looked_up_whole(dtype):
    made = torch.Generator().manual_seed(0)
    order = torch.randperm(768, generator=made)
    packed = SellBlocked().pack(torch.eye(768, dtype=dtype)[order])
    x = torch.randn(9, 768, generator=made).to(dtype)  # all bits of a number matter
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x), x[:, order]), level


def test_a_row_that_is_not_finite_leaves_those_read_with_it_alone():
    made = torch.Generator().manual_seed(0)
    weight = torch.randint(1, 4, (300, 520), generator=made) * (torch.rand(300, 520, generator=made) < 0.3)
    packed = SellBlocked().pack(weight.float())
    x = torch.randint(-4, 5, (19, 520), generator=made).float()
    wanted = x @ weight.float().T
    x[3, 519], x[12, 0], x[18, 300] = float("inf"), float("nan"), float("-inf")
    for level in kernels.levels():
        with kernels.forced(level):
            got = packed.matmul(x)
        for row in range(19):
            assert torch.equal(got[row], wanted[row]) == (row not in (3, 12, 18)), (level, row)
            assert bool(got[row].isfinite().any()) == (row not in (3, 12, 18))


def test_it_is_as_small_as_a_bitmap_at_90_percent_and_smaller_above():
    made = torch.Generator().manual_seed(0)
    for sparsity, least, most in ((0.9, 0.95, 1.02), (0.95, 0.7, 0.8)):
        weight = torch.randn(512, 2048, generator=made) * (torch.rand(512, 2048, generator=made) >= sparsity)
        one, other = (format.pack(weight.bfloat16()).nbytes for format in (SellBlocked(), Bitmap()))
        assert least < one / other < most


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        ("rows", (0, 0), 3, "each output of 20 panels once in each block"),
        ("rows", (39, 15), 250, "each output of 20 panels once"),
        ("offsets", 1, 10**6, "do not lead through 40 panels"),
        ("columns", (-1, 15, 1), 200, "its columns reach to 456 of 300 inputs"),
    ],
)
def test_what_leads_out_of_the_matrix_is_refused(name, at, value, said):
    packed = SellBlocked().pack(torch.ones(310, 300))
    damaged = packed.tensors[name].clone()
    damaged[at] = value
    with pytest.raises(FormatError, match=said):
        unpack({"header": packed.header, **packed.tensors, name: damaged})
