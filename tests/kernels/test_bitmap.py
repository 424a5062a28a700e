"""The bitmap by hand, and what is wrong with one that is not whole."""

import pytest
import torch

from secateur.errors import FormatError
from secateur.formats import Bitmap, unpack


def test_a_bitmap_worked_by_hand():
    weight = torch.tensor([[0.0, 5.0, 0.0], [7.0, 8.0, 0.0]])
    packed = Bitmap().pack(weight)
    # One panel, a step for each input; the bits of a step are the outputs.
    assert packed.tensors["masks"].tolist() == [[[0b10, 0], [0b11, 0], [0, 0]]]
    assert packed.tensors["values"].tolist() == [7.0, 5.0, 8.0]
    assert packed.tensors["offsets"].tolist() == [0, 3]
    assert packed.header.tolist() == [1, 1, 2, 3]
    # With 16 bits a step is two inputs, and its bits go output by output.
    halves = Bitmap().pack(weight.bfloat16())
    assert halves.tensors["masks"].tolist() == [[[0b1110, 0, 0, 0], [0, 0, 0, 0]]]
    assert halves.tensors["values"].tolist() == [5.0, 7.0, 8.0]


def test_a_zero_that_is_kept_stays():
    weight, mask = torch.tensor([[0.0, 2.0]]), torch.tensor([[True, False]])
    packed = Bitmap().pack(weight, mask)
    assert packed.tensors["values"].tolist() == [0.0]
    assert packed.dense().tolist() == [[0.0, 0.0]]


def test_a_bitmap_takes_the_bytes_it_should():
    weight = torch.ones(64, 64, dtype=torch.bfloat16)
    weight[:, ::2] = 0
    assert Bitmap().pack(weight).nbytes == 64 * 64 // 8 + 64 * 32 * 2 + 5 * 8


def test_masks_that_disagree_with_the_values_are_refused():
    packed = Bitmap().pack(torch.eye(20))
    whole = {"header": packed.header, **packed.tensors}
    more = packed.tensors["masks"].clone()
    more[0, 0, 0] = 3
    with pytest.raises(FormatError, match="its masks keep 21 weights, its offsets end at 20 and there are 20 values"):
        unpack({**whole, "masks": more})
    moved = packed.tensors["offsets"].clone()
    moved[1] = 15  # within bounds, and the end is right: only the panel's own count tells
    with pytest.raises(FormatError, match="its masks keep 20 weights"):
        unpack({**whole, "offsets": moved})
    with pytest.raises(FormatError, match="where torch.float16 needs"):
        unpack({**whole, "values": packed.tensors["values"].half()})
