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
        for rows in (1, 2, 3, 8, 13):
            x = case((rows, shape[1]), dtype, 2)[0]
            wanted = x.double() @ plain.nan_to_num().T + bias.double()
            for level in ("base", kernels.level()):
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
    for level in ("base", kernels.level()):
        with kernels.forced(level):
            assert torch.equal(packed.matmul(x).isnan(), wanted.isnan())


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
