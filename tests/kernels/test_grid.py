"""Every format and every variant of its kernels on one grid, against float64 and against the oracle."""

import pytest
import torch

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats import NM, Bitmap, Block, KBlocked, Sell8, Sell16, SellBlocked, unpack

FORMATS = [Bitmap(), Sell16(), Sell8(), SellBlocked(), NM(2, 4), NM(1, 2), NM(3, 8), NM(5, 16)]
FORMATS += [KBlocked(128), KBlocked(256)]
FORMATS += [Block(16, 1), Block(1, 16), Block(8, 2), Block(4, 4), Block(2, 16), Block(3, 4)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One, primes, whole panels and tiles, and what is left over of them.
SHAPES = [(1, 1), (17, 31), (7, 101), (48, 64), (64, 97), (131, 257)]
ROWS = [1, 2, 3, 7, 8, 16, 17, 33, 70]
SPARSITIES = [0.0, 0.5, 0.9, 1.0]
names = {"ids": lambda f: f.name}


def case(format, shape, sparsity, dtype, seed=0):
    """A weight of small whole numbers, so that a sum is exact in any order, and its mask."""
    made = torch.Generator().manual_seed(seed)
    high = format.rows if isinstance(format, Block) else 1
    wide = format.columns if isinstance(format, Block) else format.m if isinstance(format, NM) else 1
    shape = (-(-shape[0] // high) * high, -(-shape[1] // wide) * wide)
    weight = torch.randint(1, 4, shape, generator=made) * (2 * torch.randint(0, 2, shape, generator=made) - 1)
    mask = torch.rand(shape, generator=made) >= sparsity
    if shape[0] > 4 and sparsity < 1:
        mask[2] = False  # an empty row
    return weight.to(dtype), legal(format, mask)


def legal(format, mask):
    """As much of a mask as a format takes."""
    if not isinstance(format, NM):
        return mask
    groups = mask.view(mask.shape[0], -1, format.m)
    return (groups & (groups.cumsum(2) <= format.n)).view(mask.shape)


def inputs(rows, width, dtype, seed=1):
    made = torch.Generator().manual_seed(seed)
    return (torch.randint(-8, 9, (rows, width), generator=made) / 4).to(dtype)


def exact(x, weight, mask, bias):
    y = x.double() @ (weight * mask).double().T
    return (y + bias.double()).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, **names)
def test_the_dense_weight_comes_back(format, dtype):
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            weight, mask = case(format, shape, sparsity, dtype)
            packed = format.pack(weight, mask)
            assert torch.equal(packed.dense(), weight * mask)
            again = unpack({"header": packed.header, **packed.tensors})
            assert again.format == format
            assert torch.equal(again.dense(), weight * mask)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, **names)
def test_every_variant_computes_the_product(format, dtype):
    for shape in SHAPES:
        for sparsity in SPARSITIES:
            weight, mask = case(format, shape, sparsity, dtype)
            packed = format.pack(weight, mask)
            bias = inputs(1, len(weight), dtype, seed=2)[0]
            for rows in ROWS:
                x = inputs(rows, weight.shape[1], dtype)
                for level in kernels.levels():
                    with kernels.forced(level):
                        got = packed.matmul(x, bias)
                    wanted = exact(x, weight, mask, bias)
                    assert torch.equal(got, wanted), f"{level} {shape} {rows} rows at {sparsity}"


def test_many_wide_rows_go_in_turns():
    """Panels of a bitmap are expanded once for as many rows as fit into some megabytes."""
    weight, mask = case(Bitmap(), (35, 40_000), 0.6, torch.bfloat16)
    x = inputs(115, weight.shape[1], torch.bfloat16)
    packed = Bitmap().pack(weight, mask)
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x), exact(x, weight, mask, torch.zeros(len(weight)))), level


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, **names)
def test_variants_round_as_the_oracle_does(format, dtype):
    made = torch.Generator().manual_seed(0)
    _, mask = case(format, (67, 515), 0.6, dtype)
    weight, x = (torch.randn(rows, mask.shape[1], generator=made) for rows in (len(mask), 9))
    weight, x = weight.to(dtype), x.to(dtype)
    packed = format.pack(weight, mask)
    wanted = x.double() @ (weight * mask).double().T
    for level in kernels.levels():
        with kernels.forced(level):
            got = packed.matmul(x)
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error < {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype], level


@pytest.mark.parametrize("format", FORMATS, **names)
def test_threads_do_not_change_the_result(format):
    weight, mask = case(format, (131, 257), 0.5, torch.float32)
    weight = weight * torch.rand(weight.shape, generator=torch.Generator().manual_seed(3))
    packed, x = format.pack(weight, mask), inputs(5, weight.shape[1], torch.float32)
    alone = packed.matmul(x)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            for _ in range(20):
                assert torch.equal(packed.matmul(x), alone)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format", FORMATS, **names)
def test_what_is_not_finite_propagates_as_in_a_dense_product(format, dtype):
    weight, mask = case(format, (40, 70), 0.5, dtype)
    weight[3, 5], weight[11, 69], weight[20, 0] = float("inf"), float("nan"), float("-inf")
    mask[3, 5] = mask[11, 69] = mask[20, 0] = True
    mask = legal(format, mask)
    packed = format.pack(weight, mask)
    dense = torch.where(mask, weight, torch.zeros((), dtype=dtype))
    for rows in (1, 4, 33):
        for place, value in ((None, 0.0), (5, float("inf")), (69, float("nan")), (0, float("-inf"))):
            x = inputs(rows, weight.shape[1], dtype)
            if place is not None:
                x[rows // 2, place] = value
            wanted = x.double() @ dense.double().T
            for level in kernels.levels():
                with kernels.forced(level):
                    got = packed.matmul(x).double()
                assert torch.equal(got.isnan(), wanted.isnan()), level
                finite = wanted.isfinite()
                assert torch.equal(got[finite], wanted.to(dtype).double()[finite])
                assert torch.equal(got[wanted.isinf()], wanted[wanted.isinf()])


@pytest.mark.parametrize("format", FORMATS, **names)
def test_any_layout_of_the_input_is_taken(format):
    weight, mask = case(format, (48, 64), 0.5, torch.float32)
    packed = format.pack(weight, mask)
    wide = inputs(12, 2 * weight.shape[1], torch.float32)
    bias = torch.zeros(len(weight))
    for x in (wide[:, ::2], wide[:, :64], wide[::3, 64:], wide[:0, :64]):
        assert torch.equal(packed.matmul(x), exact(x, weight, mask, bias))
    x = inputs(6, 64, torch.float32)
    assert torch.equal(packed.matmul(x.view(2, 3, 64)), exact(x, weight, mask, bias).view(2, 3, 48))
    assert packed.matmul(x[0]).shape == (48,)


@pytest.mark.parametrize("format", FORMATS, **names)
def test_what_does_not_fit_is_refused(format):
    weight, mask = case(format, (48, 64), 0.5, torch.float32)
    packed = format.pack(weight, mask)
    with pytest.raises(FormatError, match=r"it takes torch.float32 \[..., 64\] on the CPU"):
        packed.matmul(torch.zeros(2, 64, dtype=torch.bfloat16))
    with pytest.raises(FormatError, match=r"was to multiply torch.float32 \[2, 63\]"):
        packed.matmul(torch.zeros(2, 63))
    with pytest.raises(FormatError, match=r"it takes torch.float32 \[48\], contiguous"):
        packed.matmul(torch.zeros(2, 64), torch.zeros(47))
    with pytest.raises(FormatError, match=r"it is \[48, 4, 16\], not a matrix"):
        format.pack(weight.view(48, 4, 16))
    with pytest.raises(FormatError, match=r"its dtype is torch.float64"):
        format.pack(weight.double())
    with pytest.raises(FormatError, match=r"its mask is torch.bool \[48, 63\]"):
        format.pack(weight, mask[:, 1:])
    packed.tensors["values"][0] += 1
    with pytest.raises(FormatError, match="its tensors were changed after packing"):
        packed.matmul(torch.zeros(2, 64))


@pytest.mark.parametrize("format", FORMATS, **names)
def test_a_packed_weight_that_is_not_whole_is_refused(format):
    weight, mask = case(format, (48, 64), 0.5, torch.float32)
    packed = format.pack(weight, mask)
    whole = {"header": packed.header, **packed.tensors}
    with pytest.raises(FormatError, match="no header"):
        unpack(packed.tensors)
    later = packed.header.clone()
    later[1] += 1
    with pytest.raises(FormatError, match=f"{format.name} is of version {format.version} here"):
        unpack({**whole, "header": later})
    later[0] = 999
    with pytest.raises(FormatError, match="format 999 is not known"):
        unpack({**whole, "header": later})
    with pytest.raises(FormatError, match=r"its values are of strides"):
        unpack({**whole, "values": torch.stack([packed.tensors["values"]] * 2, -1)[..., 0]})
    for name in packed.tensors:
        with pytest.raises(FormatError):
            unpack({key: value for key, value in whole.items() if key != name})
        with pytest.raises(FormatError):
            unpack({**whole, name: packed.tensors[name][:-1]})
        with pytest.raises(FormatError):
            unpack({**whole, name: packed.tensors[name].to(torch.float64)})


@pytest.mark.parametrize("format", FORMATS, **names)
def test_a_gradient_goes_through_the_dense_weight(format):
    weight, mask = case(format, (48, 64), 0.5, torch.float32)
    x = inputs(3, 64, torch.float32).requires_grad_()
    format.pack(weight, mask).matmul(x).sum().backward()
    assert torch.equal(x.grad, (weight * mask).sum(0).expand(3, 64))


def test_sums_of_single_weights_are_rounded_as_torch_rounds_them():
    made = torch.Generator().manual_seed(0)
    x = torch.randn(16, 300, generator=made).mul_(3).to(torch.bfloat16)
    x[:, 299] = 3e38
    weight = torch.zeros(48, 300, dtype=torch.bfloat16)
    first, second = torch.randperm(299, generator=made)[:96].view(2, 48)
    weight[torch.arange(48), first] = weight[torch.arange(48), second] = 1  # two numbers each: their sum is exact
    weight[5] = 0
    weight[5, 299] = 2  # an infinity of finite numbers
    wanted = (x.float() @ weight.float().T).to(torch.bfloat16)
    assert wanted[:, 5].isinf().all()
    for depth in (128, 256):
        packed = KBlocked(depth).pack(weight)
        for level in kernels.levels():
            with kernels.forced(level):
                torch.testing.assert_close(packed.matmul(x), wanted, rtol=0, atol=0)
