"""A packed weight with anything in it: refused, or read and multiplied without a crash, with sanitizers too."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from secateur.errors import FormatError
from secateur.formats import (
    NM,
    Bitmap,
    BitmapInt8,
    Block,
    DepthTaps,
    GroupCols,
    KBlocked,
    Sell8,
    Sell16,
    SellBlocked,
    unpack,
)
from secateur.formats.conv import convolve

FORMATS = [
    DepthTaps(),
    Bitmap(),
    Sell16(),
    Sell8(),
    SellBlocked(),
    BitmapInt8(),
    NM(2, 4),
    NM(1, 8),
    Block(4, 4),
    GroupCols(4),
    KBlocked(),
]


def whole(format, dtype):
    made = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 40, generator=made)
    best = weight.abs().view(20, -1, 8).topk(1, dim=2).indices
    mask = torch.zeros(20, 5, 8, dtype=torch.bool).scatter_(2, best, True).view(20, 40)
    if isinstance(format, DepthTaps):
        weight, mask = weight.view(20, 1, 5, 8), mask.view(20, 1, 5, 8)
    packed = format.pack(weight.to(dtype), mask)
    return {"header": packed.header, **{name: value.clone() for name, value in packed.tensors.items()}}


@pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)
@settings(max_examples=150)
@given(data=st.data())
def test_anything_in_the_tensors_is_refused_or_read(format, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    dtype = torch.float32 if isinstance(format, (GroupCols, DepthTaps)) else dtype  # the only one it has
    tensors = whole(format, dtype)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(["byte", "shorter", "flat", "number"]))
        tensor = tensors[name]
        if how == "byte" and tensor.numel():
            flat = tensor.contiguous().view(-1).view(torch.uint8)
            flat[data.draw(st.integers(0, len(flat) - 1))] = data.draw(st.integers(0, 255))
            tensors[name] = flat.view(tensor.dtype).view(tensor.shape)
        elif how == "shorter" and tensor.dim():
            tensors[name] = tensor[: data.draw(st.integers(0, len(tensor)))].clone()
        elif how == "flat":
            tensors[name] = tensor.flatten()
        elif not tensor.is_floating_point() and tensor.numel():
            number = data.draw(st.sampled_from([-1, 0, 1, 2, 3, 4, 16, 2**31, 2**62]))
            at = data.draw(st.integers(0, tensor.numel() - 1))
            tensor.view(-1)[at] = number if tensor.dtype is torch.int64 else number % 128
    try:
        packed = unpack(tensors)
    except FormatError:
        return
    outputs, inputs = packed.shape
    assert packed.dense().flatten(1).shape == (outputs, inputs)
    for rows in (1, 5, 40):
        assert packed.matmul(torch.ones(rows, inputs, dtype=packed.dtype)).shape == (rows, outputs)
    if isinstance(packed.format, DepthTaps):
        assert convolve(packed, torch.ones(1, outputs, 9, 9), padding=(8, 8)).shape[1] == outputs
