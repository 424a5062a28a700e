"""Blocks by hand, and what is none."""

import pytest
import torch

from secateur.errors import FormatError, SettingError
from secateur.formats import Block, unpack


def test_blocks_by_hand():
    weight = torch.zeros(4, 6)
    weight[1, 5], weight[2, 2], weight[3, 1] = 7.0, 8.0, 9.0
    packed = Block(2, 2).pack(weight)
    assert packed.tensors["offsets"].tolist() == [0, 1, 3]
    assert packed.tensors["places"].tolist() == [2, 0, 1]  # in blocks, from the left
    # An input after the other, and of each the outputs.
    assert packed.tensors["values"].tolist() == [[[0, 0], [0, 7]], [[0, 0], [0, 9]], [[8, 0], [0, 0]]]
    assert packed.header.tolist() == [5, 1, 4, 6, 2, 2]
    assert packed.matmul(torch.arange(6.0).view(1, 6)).tolist() == [[0, 35, 16, 9]]


def test_what_is_no_block_is_refused():
    assert Block(4, 4).why_not(torch.ones(6, 8)) == "[6, 8] is no whole number of blocks of 4x4"
    with pytest.raises(SettingError, match="a block has no such side"):
        Block(0, 16)


def test_places_that_do_not_rise_are_refused():
    packed = Block(1, 2).pack(torch.ones(2, 6))
    whole = {"header": packed.header, **packed.tensors}
    for wrong in ([0, 2, 1, 0, 1, 2], [0, 1, 1, 0, 1, 2], [0, 1, 3, 0, 1, 2], [-1, 1, 2, 0, 1, 2]):
        with pytest.raises(FormatError, match="its places do not rise within 3 blocks of a row"):
            unpack({**whole, "places": torch.tensor(wrong, dtype=torch.int32)})
    assert torch.equal(unpack(whole).dense(), torch.ones(2, 6))
