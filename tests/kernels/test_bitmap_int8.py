"""Eight-bit values in a bitmap: by hand, as close as 8 bits are, and the same in every variant."""

import pytest
import torch

from secateur import kernels
from secateur.errors import FormatError
from secateur.formats import Bitmap, BitmapInt8, unpack
from secateur.formats.linear import SparseLinear
from secateur.methods.int8 import rounded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def case(shape, dtype=torch.float32, seed=0):
    made = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=made).to(dtype), torch.rand(shape, generator=made) < 0.5


def test_eight_bits_by_hand():
    packed = BitmapInt8().pack(torch.tensor([[254.0, 0.0, -3.0], [0.0, 0.0, 0.0]]))
    assert packed.tensors["scales"].tolist() == [2.0, 0.0]
    assert packed.tensors["values"].tolist() == [127, -2]  # -1.5 goes to the even side
    assert packed.tensors["masks"].tolist() == [[[0b101, 0, 0, 0, 0, 0, 0, 0]]]
    assert packed.dense().tolist() == [[254.0, 0.0, -4.0], [0.0, 0.0, 0.0]]
    assert packed.matmul(torch.tensor([[1.0, 10.0, 1.0]])).tolist() == [[250.0, 0.0]]


def test_what_comes_back_is_what_int8_makes_of_it():
    weight, mask = case((37, 53))
    packed = BitmapInt8().pack(weight, mask)
    torch.testing.assert_close(packed.dense(), rounded(weight * mask))
    again = BitmapInt8().pack(packed.dense())
    torch.testing.assert_close(again.dense(), packed.dense())
    assert packed.nbytes < 0.6 * Bitmap().pack(weight.bfloat16(), mask).nbytes + 4 * 37


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_variant_multiplies_what_is_held(dtype):
    for shape in ((1, 1), (17, 31), (48, 64), (131, 257)):
        weight, mask = case(shape, dtype)
        packed = BitmapInt8().pack(weight, mask)
        held = packed.dense().double() if dtype is torch.float32 else None
        whole = packed.tensors["scales"].double().unsqueeze(1)
        plain = held if held is not None else (packed.dense().double() / whole).round() * whole
        bias = case((shape[0], 1), dtype, 1)[0][:, 0].contiguous()
        for rows in (1, 2, 3, 4, 13, 16, 37):
            x = case((rows, shape[1]), dtype, 2)[0]
            wanted = x.double() @ plain.nan_to_num().T + bias.double()
            for level in kernels.levels():
                with kernels.forced(level):
                    got = packed.matmul(x, bias).double()
                scale = wanted.abs().max().clamp(min=1.0)
                allowed = {torch.float32: 1e-5, torch.bfloat16: 4e-3, torch.float16: 1e-3}[dtype]
                assert (got - wanted).abs().max() < allowed * scale, f"{level} {shape} {rows}"


def test_what_is_not_finite_in_the_input_propagates():
    weight, mask = case((20, 30))
    packed = BitmapInt8().pack(weight, mask)
    x = torch.ones(1, 30)
    x[0, 7] = float("inf")
    wanted = torch.nn.functional.linear(x, packed.dense())
    for level in kernels.levels():
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x).isnan(), wanted.isnan())


def ranged(rows, inputs, octaves, dtype=torch.bfloat16):
    """Rows whose numbers lie within so many powers of two, with the largest and the smallest among them."""
    made = torch.Generator().manual_seed(4)
    x = torch.randint(0, octaves + 1, (rows, inputs), generator=made)
    x[:, 0], x[:, -1] = octaves, 0
    sign = 1 - 2 * torch.randint(0, 2, (rows, inputs), generator=made)
    return (sign * 2.0 ** (x.double() - octaves / 2)).to(dtype)


@pytest.mark.parametrize("octaves", [5, 20, 22, 23, 50, 54, 55, 120])
def test_numbers_of_any_range_are_summed_as_floats_are_or_better(octaves):
    weight, mask = case((40, 150), torch.bfloat16)
    packed = BitmapInt8().pack(weight, mask)
    plain = packed.tensors["scales"].double().unsqueeze(1)
    plain = (packed.dense().double() / plain).round() * plain
    for rows in (1, 5, 18):
        x = ranged(rows, 150, octaves)
        wanted, size = x.double() @ plain.T, x.double().abs() @ plain.abs().T
        for level in kernels.levels():
            with kernels.forced(level):
                got = packed.matmul(x).double()
            off = (got - wanted).abs() - 4e-3 * wanted.abs()
            assert (off < 1e-6 * size).all(), f"{level} {rows}"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_output_that_drops_the_largest_input_keeps_its_last_bit(dtype):
    packed = BitmapInt8().pack(torch.tensor([[0.0, 127.0, 0.0], [127.0, 127.0, 0.0]], dtype=dtype))
    small = 1 + torch.finfo(dtype).eps
    wanted = torch.tensor(127 * small, dtype=torch.float64).to(dtype)
    for octave in range(15 if dtype is torch.float16 else 120):
        for rows in (1, 4):
            x = torch.tensor([[2.0**octave, small, 0.0]], dtype=dtype).repeat(rows, 1)
            for level in kernels.levels():
                with kernels.forced(level):
                    assert (packed.matmul(x)[:, 0] == wanted).all(), f"{level} 2^{octave}"


def test_whole_numbers_are_added_up_exactly():
    if "amx" not in kernels.levels():
        pytest.skip(f"this processor reaches {kernels.level()}")
    x = torch.tensor([[2.0**20, 3.0, -(2.0**20), 5.0]])
    packed = BitmapInt8().pack(torch.full((17, 4), 127.0))
    for rows in (1, 9):
        assert (packed.matmul(x.repeat(rows, 1)) == 8 * 127).all()
    x = torch.tensor([[2.0**35, 3.0, -(2.0**35), 5.0]])  # which a sum of floats loses
    for rows in (1, 9):
        assert (packed.matmul(x.repeat(rows, 1)) == 8 * 127).all()


def test_a_row_that_digits_do_not_hold_leaves_the_others_alone():
    weight, mask = case((40, 70), torch.bfloat16)
    packed = BitmapInt8().pack(weight, mask)
    x = case((37, 70), torch.bfloat16, 2)[0]
    x[3, 5], x[4, 6], x[20, 0], x[21, 0], x[36, 69] = float("nan"), float("inf"), 2.0**120, 2.0**-120, float("-inf")
    x[9], x[10, 4] = 0, 2.0**30
    alone = torch.cat([packed.matmul(row[None]) for row in x])
    assert alone[3].isnan().all() and alone[4].isnan().any() and alone[9].eq(0).all()
    assert alone[torch.tensor([0, 9, 10, 20, 21, 35])].isfinite().all()
    for level in kernels.levels():
        with kernels.forced(level):
            alone = torch.cat([packed.matmul(row[None]) for row in x])
            torch.testing.assert_close(packed.matmul(x), alone, equal_nan=True, rtol=0, atol=0)


def test_what_eight_bits_cannot_hold_is_refused():
    with pytest.raises(FormatError, match="some of its weights are not finite"):
        BitmapInt8().pack(torch.tensor([[1.0, float("nan")]]))
    packed = BitmapInt8().pack(torch.eye(20))
    whole = {"header": packed.header, **packed.tensors}
    with pytest.raises(FormatError, match=r"its values are torch.int8 and its scales \[19\]"):
        unpack({**whole, "scales": packed.tensors["scales"][1:]})
    with pytest.raises(FormatError, match="its values are torch.float32"):
        unpack({**whole, "values": packed.tensors["values"].float()})
    assert torch.equal(unpack(whole).dense(), torch.eye(20))


def test_a_layer_holds_it():
    linear = torch.nn.Linear(30, 20)
    sparse = SparseLinear.of(linear, BitmapInt8())
    x = torch.ones(2, 30)
    with torch.no_grad():
        torch.testing.assert_close(sparse(x), sparse.dense()(x))
