"""Slices with distances of 8 bits: by hand, over gaps that a distance does not reach, and damaged."""

import pytest
import torch

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats import Bitmap, Sell8, Sell16, unpack


def test_distances_by_hand():
    weight = torch.zeros(2, 600)
    weight[0, 0], weight[0, 300], weight[0, 599], weight[1, 7] = 1.0, 2.0, 3.0, 4.0
    packed = Sell8().pack(weight)
    assert packed.tensors["offsets"].tolist() == [0, 5]
    assert packed.tensors["columns"][:, :3].tolist() == [[0, 7, 0], [255, 0, 0], [45, 0, 0], [255, 0, 0], [44, 0, 0]]
    assert packed.tensors["values"][:, :3].tolist() == [[1, 4, 0], [0, 0, 0], [2, 0, 0], [0, 0, 0], [3, 0, 0]]
    assert packed.tensors["rows"].tolist() == [list(range(16))]
    assert torch.equal(packed.dense(), weight)
    x = torch.arange(600.0).unsqueeze(0)
    for level in kernels.levels():
        with kernels.forced(level):
            assert packed.matmul(x).tolist() == [[600.0 + 3 * 599, 28.0]]


@pytest.mark.parametrize("format", [Sell8(), Sell16()])
def test_outputs_are_sorted_by_how_many_weights_they_keep(format):
    kept = torch.tensor([1, 3, 0, 9, *[2] * 14])
    weight = torch.where(torch.arange(12) < kept.unsqueeze(1), torch.arange(1.0, 13), torch.zeros(()))
    packed = format.pack(weight)
    first, last = packed.tensors["rows"].tolist()
    assert first == [3, 1, *range(4, 18)]  # the fullest, then in the order they had
    assert last == [0, 2, *range(18, 32)]  # what is no output comes last
    assert packed.tensors["offsets"].tolist() == [0, 9, 10]  # 9 and 9 steps without
    assert torch.equal(packed.dense(), weight)
    x, bias = torch.arange(12.0).unsqueeze(0), torch.arange(18.0)
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x, bias), x @ weight.T + bias)


@pytest.mark.parametrize("format", [Sell8(), Sell16()])
@pytest.mark.parametrize(
    ("at", "row", "said"),
    [((0, 0), 1, "each output of 2 panels once"), ((0, 0), 32, "each output"), ((1, 0), 31, "each output")],
)
def test_rows_that_are_not_every_output_are_refused(format, at, row, said):
    packed = format.pack(torch.eye(18))
    rows = packed.tensors["rows"].clone()
    rows[at] = row
    with pytest.raises(FormatError, match=said):
        unpack({"header": packed.header, **packed.tensors, "rows": rows})


def test_rows_that_name_what_is_no_output_before_its_end_are_refused():
    packed = Sell8().pack(torch.eye(18))
    rows = packed.tensors["rows"].flatten().clone()
    rows[[3, 20]] = rows[[20, 3]]
    with pytest.raises(FormatError, match="something that is no output before its outputs"):
        unpack({"header": packed.header, **packed.tensors, "rows": rows.view(2, 16)})


@pytest.mark.parametrize("gap", [254, 255, 256, 509, 510, 511])
def test_gaps_are_bridged(gap):
    weight = torch.zeros(17, 1200, dtype=torch.bfloat16)
    weight[:, gap] = 1.0
    weight[3, 2 * gap] = 2.0
    weight[16, 1199] = 3.0
    packed = Sell8().pack(weight)
    assert torch.equal(packed.dense(), weight)
    x = torch.randint(-8, 9, (3, 1200), generator=torch.Generator().manual_seed(0)).bfloat16()
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x), x @ weight.T)


def test_more_inputs_than_sixteen_bits_name():
    weight = torch.zeros(1, 40_000)
    weight[0, 39_999] = 1.0
    assert "32767" in Sell16().why_not(weight)
    packed = Sell8().pack(weight)
    assert torch.equal(packed.dense(), weight)
    assert packed.matmul(torch.arange(40_000.0).unsqueeze(0)).item() == 39_999


def test_it_is_smaller_than_its_neighbours_at_95_percent():
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 1024, generator=made) * (torch.rand(256, 1024, generator=made) >= 0.95)
    sizes = {format.name: format.pack(weight).nbytes for format in (Sell8(), Sell16(), Bitmap())}
    assert sizes["sell8"] < min(sizes["sell16"], sizes["bitmap"])


def test_distances_that_lead_out_of_the_matrix_are_refused():
    packed = Sell8().pack(torch.eye(20))
    whole = {"header": packed.header, **packed.tensors}
    columns = packed.tensors["columns"].clone()
    columns[0, 0] = 20
    with pytest.raises(FormatError, match="its columns reach to 20 of 20 inputs"):
        unpack({**whole, "columns": columns})
    with pytest.raises(FormatError, match=r"its columns are torch.int16"):
        unpack({**whole, "columns": packed.tensors["columns"].to(torch.int16)})
