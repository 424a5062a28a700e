"""A packed weight written out by a kernel is the one that was packed, and is multiplied with many rows."""

import pytest
import torch

from secateur import kernels
from secateur.formats import NM, BitmapInt8, Sell8, Sell16, SellBlocked
from tests.kernels.test_grid import SHAPES, SPARSITIES, case, exact, inputs, names

FORMATS = [Sell16(), Sell8(), SellBlocked(), NM(2, 4), NM(1, 2), NM(3, 8), NM(5, 16), BitmapInt8()]


def written(packed, level):
    """What the kernel of a level writes over memory that held something else."""
    with kernels.forced(level):
        kernel = kernels.find(packed.prepared.expand)
        if kernel is None:
            pytest.skip("nothing is compiled here")
        return packed.written(kernel, torch.full(packed.shape, float("nan"), dtype=packed.dtype))


@pytest.mark.parametrize("format", FORMATS, **names)
def test_the_weight_is_written_out_by_every_variant(format):
    for shape in [*SHAPES, (33, 130)]:
        for sparsity in SPARSITIES:
            weight, mask = case(format, shape, sparsity, torch.bfloat16)
            packed = format.pack(weight, mask)
            for level in kernels.levels():
                assert torch.equal(written(packed, level), packed.dense()), f"{level} {shape} at {sparsity}"


@pytest.mark.parametrize("format", FORMATS, **names)
def test_scales_and_signs_come_out_as_torch_has_them(format):
    made = torch.Generator().manual_seed(0)
    _, mask = case(format, (40, 96), 0.6, torch.bfloat16)
    weight = torch.randn(mask.shape, generator=made).to(torch.bfloat16)
    packed = format.pack(weight, mask)
    for level in kernels.levels():
        assert torch.equal(written(packed, level), packed.dense())


@pytest.mark.parametrize("format", FORMATS, **names)
def test_many_rows_go_through_the_weight_that_was_written(format, monkeypatch):
    weight, mask = case(format, (48, 64), 0.5, torch.bfloat16)
    packed = format.pack(weight, mask)
    calls = []
    monkeypatch.setattr(type(packed), "written", lambda self, kernel, into: calls.append(kernel) or self.dense())
    at = {"amx"} if isinstance(format, BitmapInt8) else {"avx512bf16", "amx"}  # levels where the dense product wins
    assert set(packed.prepared.many) == at
    bias = inputs(1, 48, torch.bfloat16, seed=2)[0]
    for level in kernels.levels():
        least = packed.prepared.many.get(level, 100)
        few, many = inputs(least - 1, 64, torch.bfloat16), inputs(least, 64, torch.bfloat16)
        with kernels.forced(level):
            calls.clear()
            packed.matmul(few, bias)
            assert not calls
            got = packed.matmul(many, bias)
            assert bool(calls) == (level in at and kernels.library() is not None)
        if not isinstance(format, BitmapInt8):
            assert torch.equal(got, exact(many, weight, mask, bias))


@pytest.mark.parametrize("format", FORMATS, **names)
def test_an_infinity_spoils_its_own_row_alone_at_any_width(format):
    for width in (64, 80, 112):
        weight, mask = case(format, (40, width), 0.5, torch.bfloat16)
        packed = format.pack(weight, mask)
        x = inputs(2 * packed.prepared.many["amx"] + 3, weight.shape[1], torch.bfloat16)
        x[7, 5] = float("inf")
        for level in kernels.levels():
            with kernels.forced(level):
                assert packed.matmul(x).isfinite().all(1).logical_not().nonzero().tolist() == [[7]], (width, level)
