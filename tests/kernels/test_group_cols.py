"""Groups that share columns: by hand, as a product and as a convolution, every variant against float64."""

import copy
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F

from secateur import kernels
from secateur.errors import FormatError, SettingError
from secateur.formats import GroupCols, KBlocked, group_cols, k_blocked, unpack
from secateur.formats.conv import SparseConv2d, arranged, convolve

ROWS = (1, 2, 4, 8, 16)
SHAPES = [(1, 1), (17, 31), (7, 101), (48, 64), (131, 257)]
SPARSITIES = [0.0, 0.6, 0.95, 1.0]


def whole_numbers(shape, seed):
    """Small enough that a sum is exact in any order."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


def case(shape, sparsity, seed=0):
    made = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=made) >= sparsity
    if shape[0] > 20:
        mask[:17] = False  # empty groups, and one that is empty but for a row
    weight = whole_numbers(shape, seed) + 0.5
    return weight, mask, whole_numbers(shape[:1], seed + 1)


def test_a_stream_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0, 6.0], [0.0, 7.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])
    weight = torch.cat([weight, torch.tensor([[0.0, 0.0, 9.0, 0.0]])])
    packed = GroupCols(2).pack(weight, bias=torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    # Two groups of two rows and what is left over; of each its biases, then its columns from the left.
    assert packed.tensors["counts"].tolist() == [2, 1, 1]
    wanted = [0.1, 0.2, 5, 7, 6, 0, 0.3, 0.4, 0, 8, 0.5, 9]
    assert packed.tensors["values"].tolist() == pytest.approx(wanted)
    assert packed.tensors["first"].tolist() == [1]
    assert packed.tensors["steps"].tolist() == [2, -3, 2, -1]  # 1, 3, 0, 2, and back to 1
    assert packed.header.tolist() == [6, 1, 5, 4, 2, 0, 0]
    assert packed.format.density(packed) == 7 / 20
    assert packed.matmul(torch.ones(1, 4)).tolist() == [pytest.approx([11.1, 7.2, 0.3, 8.4, 9.5])]


def test_a_layer_that_keeps_nothing_is_its_bias():
    packed = GroupCols(4).pack(torch.zeros(6, 3, 3, 3), bias=torch.arange(6.0))
    assert (packed.tensors["steps"].numel(), int(packed.tensors["first"])) == (0, 0)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            y = convolve(packed, torch.ones(1, 3, 4, 4), padding=(1, 1))
        assert torch.equal(y, torch.arange(6.0).view(1, 6, 1, 1).expand(1, 6, 4, 4))


@pytest.mark.parametrize("rows", ROWS)
def test_the_dense_weight_comes_back(rows):
    for shape in (*SHAPES, (9, 5, 3, 3), (32, 8, 1, 1)):
        for sparsity in SPARSITIES:
            weight, mask, bias = case(shape, sparsity)
            packed = GroupCols(rows).pack(weight, mask, bias)
            again = unpack({"header": packed.header, **packed.tensors})
            assert torch.equal(again.dense(), weight * mask)
            assert torch.equal(again.format.bias(again), bias)
            assert again.format == packed.format


@pytest.fixture(params=["blocks", "small blocks"])
def blocks(request, monkeypatch):
    """Blocks as they are, or of 31 columns or one channel."""
    if request.param == "small blocks":
        monkeypatch.setattr(group_cols, "DEPTHS", dict.fromkeys(ROWS, 31))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", ROWS)
def test_every_variant_multiplies(rows):
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            weight, mask, bias = case(shape, sparsity)
            packed = GroupCols(rows).pack(weight, mask, bias)
            for count in (1, 3, 17, 70, 300):
                x = whole_numbers((count, shape[1]), 2)
                wanted = (x.double() @ (weight * mask).double().T + 2 * bias).float()
                for level in kernels.levels()[:3]:
                    if level == "base" and count > 70:
                        continue
                    with kernels.forced(level):
                        assert torch.equal(packed.matmul(x, bias), wanted), f"{level} {shape} {count} {sparsity}"


# Outputs, inputs, kernel, picture, stride, padding, dilation.
CONVOLUTIONS = [
    (1, 1, (1, 1), (1, 1), (1, 1), (0, 0), (1, 1)),
    (33, 40, (1, 1), (7, 7), (1, 1), (0, 0), (1, 1)),
    (17, 200, (1, 1), (19, 23), (1, 1), (0, 0), (1, 1)),
    (20, 9, (1, 1), (14, 11), (2, 2), (0, 0), (1, 1)),
    (17, 7, (3, 3), (7, 7), (1, 1), (1, 1), (1, 1)),
    (24, 33, (3, 3), (30, 23), (1, 1), (0, 0), (1, 1)),
    (16, 5, (3, 3), (9, 13), (2, 2), (1, 1), (1, 1)),
    (5, 3, (5, 1), (11, 16), (2, 3), (3, 1), (2, 1)),
    (5, 3, (2, 3), (12, 16), (3, 1), (2, 4), (1, 3)),
    (2, 3, (7, 7), (300, 2), (4, 4), (3, 3), (1, 1)),
    # Shapes that a way of laying pictures out is for, and rows that see nothing of the picture.
    (40, 20, (1, 1), (4, 8), (1, 1), (0, 0), (1, 1)),
    (18, 34, (3, 3), (8, 8), (1, 1), (5, 1), (1, 1)),
    (19, 5, (3, 3), (7, 8), (1, 1), (1, 1), (1, 1)),
    (17, 19, (3, 3), (16, 16), (2, 2), (5, 1), (1, 1)),
    (33, 12, (3, 3), (17, 33), (1, 2), (1, 1), (1, 1)),
    (6, 5, (3, 3), (40, 30), (2, 1), (4, 1), (1, 1)),
    (13, 6, (3, 1), (30, 32), (1, 1), (4, 0), (1, 1)),
    (4, 3, (3, 3), (8, 8), (1, 1), (200, 1), (1, 1)),
    (4, 3, (3, 3), (16, 16), (2, 2), (500, 1), (1, 1)),
    # Chunks of which the last is smaller, and a block laid out that 16 bits cannot say the places of.
    (9, 17, (3, 3), (51, 30), (1, 1), (1, 1), (1, 1)),
    (17, 30, (1, 1), (41, 50), (1, 1), (0, 0), (1, 1)),
    (6, 20, (3, 3), (4, 500), (1, 1), (1, 1), (1, 1)),
]


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("at", CONVOLUTIONS, ids=str)
def test_every_variant_convolves(at, rows):
    outputs, inputs, kernel, size, *pairs = at
    for sparsity in SPARSITIES:
        weight, mask, bias = case((outputs, inputs, *kernel), sparsity)
        packed = GroupCols(rows).pack(weight, mask, bias)
        x = whole_numbers((2, inputs, *size), 3)
        wanted = F.conv2d(x.double(), (weight * mask).double(), bias.double(), *pairs).float()
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                assert torch.equal(convolve(packed, x, *pairs), wanted), f"{level} {sparsity}"
                assert torch.equal(convolve(packed, x, *pairs, (0, 6)), wanted.clamp(0, 6)), f"{level} {sparsity}"


def test_single_outputs_that_share_columns_stand_side_by_side():
    made = torch.Generator().manual_seed(0)
    alike = torch.rand(8, 60, generator=made) > 0.4
    mask = alike.repeat(2, 1)[torch.randperm(16, generator=made)]  # each twice
    packed = KBlocked().pack(torch.randn(16, 60, generator=made), mask)
    first, second = mask[packed.tensors["rows"][0].long()].view(8, 2, 60).unbind(1)
    assert torch.equal(first, second)
    # Then every step has an input for two outputs, and what fills up the shorter pair is alike too.
    assert torch.equal(k_blocked.shared(packed.tensors), packed.tensors["offsets"].diff().int())


def test_in_bfloat16_a_step_has_two_weights_of_each_output():
    weight = torch.arange(1.0, 61).repeat(4, 1).to(torch.bfloat16)
    mask = torch.zeros(4, 60, dtype=torch.bool)
    mask[:2, :23], mask[2:, 10:33], mask[1, 40] = True, True, True
    packed = KBlocked().pack(weight, mask)
    columns, values, offsets = (packed.tensors[name] for name in ("columns", "values", "offsets"))
    assert columns.shape == values.shape == (12, 8)
    assert offsets.tolist() == [0, 12]
    assert torch.equal(values, torch.where(values != 0, columns.long() + 1, 0))  # two of an output, next to one another
    # Of 23 shared columns 22 come in whole steps, and the last step is no shared one.
    assert packed.tensors["rows"].tolist() in ([[1, 0, 2, 3]], [[2, 3, 1, 0]], [[1, 0, 3, 2]], [[3, 2, 1, 0]])
    assert k_blocked.shared(packed.tensors).tolist() == [11]
    assert torch.equal(packed.dense(), weight * mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [40, 90, 120, 300])
def test_rows_of_x_go_in_panels_of_all_widths(rows, dtype):
    weight, mask, bias = (tensor if tensor.dtype is torch.bool else tensor.to(dtype) for tensor in case((37, 300), 0.6))
    x = whole_numbers((rows, 300), 3).to(dtype)
    wanted = F.linear(x.double(), (weight * mask).double(), bias.double()).to(dtype)
    for depth in (128, 256):
        packed = KBlocked(depth).pack(weight, mask)
        for level in kernels.levels():
            with kernels.forced(level):
                assert torch.equal(packed.matmul(x, bias), wanted), level


def test_where_pairs_no_longer_share_columns():
    columns = torch.tensor([[1, 1, 2, 2], [4, 4, 2, 3], [5, 5, 6, 6], [0, 1, 2, 2]], dtype=torch.uint8)
    laid = {"columns": columns, "offsets": torch.tensor([0, 2, 3, 3, 4])}
    assert k_blocked.shared(laid).tolist() == [1, 1, 0, 0]
    assert k_blocked.shared({"columns": columns[:0], "offsets": torch.zeros(3, dtype=torch.int64)}).tolist() == [0, 0]


def test_places_found_for_one_variant_are_not_those_of_another():
    weight, mask, bias = case((24, 33, 3, 3), 0.6)
    packed, x = GroupCols(1).pack(weight, mask, bias), whole_numbers((1, 33, 30, 23), 3)
    wanted = F.conv2d(x, weight * mask, bias)
    for level in (*reversed(kernels.levels()[:3]), *kernels.levels()[:3]):
        with kernels.forced(level):
            assert torch.equal(convolve(packed, x), wanted), level


@pytest.mark.parametrize("rows", ROWS)
def test_variants_round_as_the_oracle_does(rows):
    made = torch.Generator().manual_seed(0)
    weight, x = torch.randn(37, 60, 3, 3, generator=made), torch.randn(1, 60, 12, 12, generator=made)
    mask = torch.rand(weight.shape, generator=made) > 0.6
    packed = GroupCols(rows).pack(weight, mask)
    wanted = F.conv2d(x.double(), (weight * mask).double(), padding=1)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            error = (convolve(packed, x, padding=(1, 1)).double() - wanted).abs().max() / wanted.abs().max()
        assert error < 1e-6, level


@pytest.mark.parametrize(("outputs", "inputs", "count", "sparsity"), [(1500, 40, 3, 0.2), (4700, 20, 130, 0.95)])
def test_more_outputs_than_are_summed_at_once(outputs, inputs, count, sparsity):
    """A weight that keeps more than x has and one that keeps less: their sums are of 256 rows, and of one panel."""
    weight, mask, bias = case((outputs, inputs), sparsity)
    x = whole_numbers((count, inputs), 2)
    wanted = (x.double() @ (weight * mask).double().T + bias.double()).float()
    for packed in (GroupCols(1).pack(weight, mask), GroupCols(8).pack(weight, mask), KBlocked().pack(weight, mask)):
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                assert torch.equal(packed.matmul(x, bias), wanted), f"{level} {packed.format.name}"


@pytest.mark.parametrize("rows", [1, 8])
def test_outputs_are_divided_among_threads(rows):
    weight, mask, bias = case((700, 9, 3, 3), 0.6)
    packed, x = GroupCols(rows).pack(weight, mask, bias), whole_numbers((1, 9, 5, 6), 4)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(4)
        call, _ = arranged(packed, x, (1, 1), (1, 1), (1, 1), 4)
        assert call.parts > 1
        wanted = F.conv2d(x.double(), (weight * mask).double(), bias.double(), padding=1).float()
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                assert torch.equal(convolve(packed, x, padding=(1, 1)), wanted), level
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("sparsity", "deeper"), [(0.8, ()), (0.9, ("avx512bf16",)), (0.97, kernels.LEVELS)])
def test_thin_kernels_lie_in_deeper_blocks_where_that_is_faster(sparsity, deeper):
    made = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (2, 64, 6, 7), generator=made).float()
    weight = torch.randint(1, 4, (8, 64, 3, 3), generator=made) * (torch.rand(8, 64, 3, 3, generator=made) >= sparsity)
    wanted = F.conv2d(x, weight.float(), padding=1)
    for level in kernels.levels():
        with kernels.forced(level):
            packed = GroupCols(1).pack(weight.float())
            assert packed.prepared.weight.depth == (198 if level in deeper else 144)  # 22 and 16 channels of nine taps
            assert torch.equal(convolve(packed, x, padding=(1, 1)), wanted)


def test_a_kernel_of_more_taps_than_a_column_can_name_is_refused():
    with pytest.raises(FormatError, match="65,792 taps, more than 65,535"):
        GroupCols(1).pack(torch.ones(1, 1, 256, 257))


def test_threads_do_not_change_the_result():
    weight, mask, bias = case((67, 20, 3, 3), 0.5)
    weight = weight * torch.rand(weight.shape, generator=torch.Generator().manual_seed(3))
    packed, x = GroupCols(4).pack(weight, mask, bias), whole_numbers((3, 20, 17, 17), 4)
    matrix, rows = GroupCols(4).pack(weight.flatten(1), mask.flatten(1)), whole_numbers((90, 180), 5)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone, product = convolve(packed, x, padding=(1, 1)), matrix.matmul(rows)
        pixels = GroupCols(2).pack(weight[:, :, :1, :1])
        few = convolve(pixels, x)
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(5):
                assert torch.equal(convolve(packed, x, padding=(1, 1)), alone)
                assert torch.equal(convolve(pixels, x), few)
                assert torch.equal(matrix.matmul(rows), product)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kernel", [(1, 1), (3, 3)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2)])
def test_what_is_not_finite_propagates_as_in_a_dense_convolution(kernel, stride):
    weight, mask, bias = case((21, 6, *kernel), 0.5)
    padding = (kernel[0] // 2, kernel[1] // 2)
    packed = GroupCols(4).pack(weight, mask, bias)
    for place, value in (((0, 0, 0, 0), math.inf), ((1, 5, 8, 8), math.nan), ((1, 3, 4, 7), -math.inf)):
        x = whole_numbers((2, 6, 9, 9), 1)
        x[place] = value
        # By hand, since a library may leave a zero out: what each place sees, times every weight.
        seen = F.unfold(x.double(), kernel, 1, padding, stride)  # [2, columns, pixels]
        wanted = ((weight * mask).double().flatten(1) @ seen + bias.view(-1, 1)).view(2, 21, *[-(-9 // stride[0])] * 2)
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                got = convolve(packed, x, stride, padding).double()
            assert torch.equal(got.isnan(), wanted.isnan()), level
            assert torch.equal(got[~wanted.isnan()], wanted[~wanted.isnan()])


def test_what_is_not_finite_propagates_as_in_a_dense_product():
    weight, mask, bias = case((21, 70), 0.5)
    weight[3, 5], weight[20, 0], mask[3, 5], mask[20, 0] = math.inf, math.nan, True, True
    packed = GroupCols(4).pack(weight, mask, bias)
    dense = torch.where(mask, weight, torch.zeros(()))
    for place, value in ((None, 0.0), (5, math.inf), (69, math.nan), (0, -math.inf)):
        x = whole_numbers((40, 70), 1)
        if place is not None:
            x[20, place] = value
        wanted = (x.double() @ dense.double().T + bias).float()
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                got = packed.matmul(x)
            torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True, msg=level)


def test_a_bound_lets_what_is_no_number_through():
    packed = GroupCols(2).pack(torch.ones(2, 1, 1, 1))
    x = torch.tensor([math.nan, -1.0, 3.0, 9.0]).view(1, 1, 2, 2)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            y = convolve(packed, x, between=(0, 6))[0, 1].flatten()
        assert y[0].isnan()
        assert y[1:].tolist() == [0, 3, 6]


def test_what_does_not_fit_is_refused():
    packed = GroupCols(4).pack(torch.ones(8, 3, 3, 3))
    x = torch.ones(1, 3, 8, 8)
    with pytest.raises(FormatError, match=r"it takes torch.float32 \[pictures, 3, high, wide\] on the CPU"):
        convolve(packed, x.double())
    with pytest.raises(
        FormatError, match=r"a group-cols-4 weight \[8, 3, 3, 3\] was to convolve torch.float32 \[1, 4,"
    ):
        convolve(packed, torch.ones(1, 4, 8, 8))
    with pytest.raises(FormatError, match="they are smaller than it"):
        convolve(packed, torch.ones(1, 3, 2, 8))
    with pytest.raises(FormatError, match="it was packed from a matrix"):
        convolve(GroupCols(4).pack(torch.ones(8, 3)), x)
    with pytest.raises(FormatError, match="its dtype is torch.bfloat16"):
        GroupCols(4).pack(torch.ones(8, 3, dtype=torch.bfloat16))
    with pytest.raises(FormatError, match=r"it is \[8, 3, 3\], not a matrix \[out, in\] or a convolution"):
        GroupCols(4).pack(torch.ones(8, 3, 3))
    assert GroupCols(4).why_not(torch.ones(8, 3), torch.ones(8, 3)) is not None
    assert GroupCols(4).why_not(torch.ones(8, 3), torch.ones(8, 2, dtype=torch.bool)) is not None
    assert GroupCols(4).why_not(torch.ones(5, 3)) is None
    with pytest.raises(SettingError, match="groups of 3 outputs were asked for"):
        GroupCols(3)
    with pytest.raises(SettingError, match="a kernel of 3x0 was asked for"):
        GroupCols(4, 3, 0)
    packed.tensors["values"][0] += 1
    with pytest.raises(FormatError, match="its tensors were changed after packing"):
        convolve(packed, x)
    assert convolve(GroupCols(4).pack(torch.ones(8, 3, 3, 3)), x[:0]).shape == (0, 8, 6, 6)


def test_a_stream_that_is_not_whole_is_refused():
    packed = GroupCols(2).pack(torch.ones(5, 3, 2, 2))
    whole = {"header": packed.header, **packed.tensors}
    later = packed.header.clone()
    later[1] += 1
    with pytest.raises(FormatError, match="group-cols-2 is of version 1 here"):
        unpack({**whole, "header": later})
    other = packed.header.clone()
    other[5:] = torch.tensor([5, 1])
    with pytest.raises(FormatError, match="its 12 columns are no whole number of kernels of 5x1"):
        unpack({**whole, "header": other})
    fewer = packed.tensors["counts"].clone()
    fewer[1] -= 1
    with pytest.raises(FormatError, match="its counts speak of 35 columns and 63 values, and there are 36 and 65"):
        unpack({**whole, "counts": fewer})
    back = packed.tensors["steps"].clone()
    back[-1] += 1
    with pytest.raises(FormatError, match="its last step does not lead back to its first column"):
        unpack({**whole, "steps": back})
    for at, step in ((0, 12), (0, -1), (3, 0)):
        wrong = packed.tensors["steps"].clone()
        wrong[at], wrong[at + 1] = step, 1
        with pytest.raises(FormatError, match="its steps do not rise within 12 columns of a group"):
            unpack({**whole, "steps": wrong})
    with pytest.raises(FormatError, match="its steps do not rise"):
        unpack({**whole, "first": torch.tensor([-1])})
    for name in packed.tensors:
        with pytest.raises(FormatError):
            unpack({key: value for key, value in whole.items() if key != name})
        with pytest.raises(FormatError):
            unpack({**whole, name: packed.tensors[name][:-1]})
        with pytest.raises(FormatError):
            unpack({**whole, name: packed.tensors[name].to(torch.float64)})


def layer(**settings):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        conv = nn.Conv2d(12, 10, 3, **settings)
    with torch.no_grad():
        conv.weight[torch.rand(conv.weight.shape, generator=torch.Generator().manual_seed(0)) < 0.6] = 0
    return conv.requires_grad_(False)


X = torch.randn(2, 12, 9, 11, generator=torch.Generator().manual_seed(9))


def test_a_layer_does_what_the_dense_one_does():
    for conv in (
        layer(),
        layer(stride=2, padding=1, bias=False),
        layer(padding="same", dilation=2),
        layer(padding="valid"),
    ):
        sparse = SparseConv2d.of(conv, GroupCols(4))
        torch.testing.assert_close(sparse(X), conv(X))
        assert torch.equal(sparse.dense().weight, conv.weight)
        torch.testing.assert_close(sparse.dense()(X), conv(X))
        torch.testing.assert_close(sparse(X.contiguous(memory_format=torch.channels_last)), conv(X))
    held = SparseConv2d(GroupCols(2).pack(layer().weight), between=(0, 0.5))
    torch.testing.assert_close(held(X), F.conv2d(X, layer().weight).clamp(0, 0.5))


def test_what_is_no_such_convolution_is_refused():
    for conv, why in (
        (layer(padding=1, padding_mode="reflect"), "its padding is reflect, not of zeros"),
        (nn.Conv2d(12, 12, 3, groups=12), "it has 12 groups"),
        (nn.Conv2d(12, 12, 2, padding="same"), "is no whole number"),
    ):
        with pytest.raises(FormatError, match=why):
            SparseConv2d.of(conv, GroupCols(4))


def test_state_goes_through_a_file_to_a_layer_of_another_mask(tmp_path):
    saved = SparseConv2d.of(layer(), GroupCols(4))
    save_file(saved.state_dict(), tmp_path / "layer.safetensors")
    other = SparseConv2d(GroupCols(2).pack(torch.zeros(10, 12, 3, 3)))
    with pytest.raises(FormatError):
        other.load_state_dict({**saved.state_dict(), "header": torch.tensor([6, 77, 10, 108, 4, 3, 3])})
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    assert torch.equal(other(X), saved(X))
    assert torch.equal(copy.deepcopy(other)(X), saved(X))
    other.values.zero_()
    with pytest.raises(FormatError, match="its tensors were changed after packing"):
        other(X)


def test_a_gradient_reaches_the_input():
    conv = layer(padding=1)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    SparseConv2d.of(conv, GroupCols(4))(x).square().sum().backward()
    conv(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    rows = X[0, :, 0].T.contiguous().requires_grad_()
    GroupCols(4).pack(conv.weight[:, :, 0, 0], bias=conv.bias).matmul(rows).sum().backward()
    torch.testing.assert_close(rows.grad, conv.weight[:, :, 0, 0].sum(0).expand(11, 12))


def test_without_kernels_torch_computes_the_same(monkeypatch):
    sparse = SparseConv2d.of(layer(padding=1), GroupCols(4))
    sparse.between = (0, 0.5)
    matrix = GroupCols(4).pack(layer().weight.flatten(1), bias=layer().bias)
    rows = torch.ones(3, 108)
    wanted, product = sparse(X), matrix.matmul(rows)
    monkeypatch.setattr(kernels, "find", lambda name: None)
    torch.testing.assert_close(sparse(X), wanted)
    torch.testing.assert_close(matrix.matmul(rows), product)


def test_compile_and_export_see_one_operator(monkeypatch):
    conv = layer(padding=1, stride=2)
    model = nn.Sequential(SparseConv2d.of(conv, GroupCols(4)), nn.ReLU())
    wanted = conv(X).relu()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), wanted)
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("pictures")},))
        found = [node.target for node in exported.graph.nodes if "secateur" in str(node.target)]
        assert found == [torch.ops.secateur.packed_conv2d.default]
        torch.testing.assert_close(exported.module()(torch.cat([X, X])), torch.cat([wanted, wanted]))
    laid = []
    call = GroupCols.call
    monkeypatch.setattr(GroupCols, "call", lambda self, packed: laid.append(packed) or call(self, packed))
    for ran in (exported.module(), compiled):
        for _ in range(3):
            ran(X)
    assert len(laid) <= 2, "what is laid out for kernels is kept from call to call"
    form = model[0].packed.format
    torch.library.opcheck(
        torch.ops.secateur.packed_conv2d.default,
        (X, [getattr(model[0], name) for name in form.names], model[0]._header, [2, 2, 1, 1, 1, 1], [0.0, 6.0]),
        test_utils=("test_schema", "test_faketensor"),
    )
