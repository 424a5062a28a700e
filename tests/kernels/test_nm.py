"""N:M by hand, and what it does not hold."""

import pytest
import torch

from secateur.errors import FormatError, SettingError
from secateur.formats import NM, unpack


def test_two_of_four_by_hand():
    packed = NM(2, 4).pack(torch.tensor([[0.0, 5.0, 0.0, 7.0, 0.0, 0.0, 3.0, 0.0]]))
    assert packed.tensors["values"][0, :, :, 0].tolist() == [[5.0, 7.0], [3.0, 0.0]]
    # The first output is in the lowest 2 bits of the first byte; what is missing is a zero at place 0.
    assert packed.tensors["places"][0, :, :, 0].tolist() == [[1, 3], [2, 0]]
    assert packed.header.tolist() == [4, 1, 1, 8, 2, 4]
    assert packed.matmul(torch.arange(8.0).view(1, 8)).tolist() == [[5 + 21 + 18]]


def test_places_of_all_outputs_lie_beside_one_another():
    weight = torch.zeros(16, 16)
    weight[torch.arange(16), torch.arange(16)] = 1 + torch.arange(16.0)
    packed = NM(1, 16).pack(weight)
    assert packed.tensors["places"].flatten().tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(packed.dense(), weight)


def test_it_takes_the_bytes_it_should():
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    weight[:, ::2] = 1
    assert NM(2, 4).pack(weight).nbytes == 32 * 32 * 2 + 32 * 32 // 4


def test_what_is_no_such_pattern_is_refused():
    assert NM(2, 4).why_not(torch.ones(4, 6)) == "its 6 inputs are no whole number of groups of 4"
    assert NM(2, 4).why_not(torch.ones(4, 8)) == "a group of 4 inputs keeps 4"
    assert NM(2, 4).why_not(torch.ones(4, 8), torch.tensor([True, False]).repeat(4, 4)) is None
    with pytest.raises(FormatError, match="packed as 2:4, but a group of 4 inputs keeps 4"):
        NM(2, 4).pack(torch.ones(4, 8))
    for n, m in ((0, 4), (4, 4), (2, 6)):
        with pytest.raises(SettingError, match=f"the format {n}:{m} was asked for"):
            NM(n, m)


def test_a_place_beyond_its_group_is_refused():
    packed = NM(1, 8).pack(torch.eye(16))
    for settings in ([1, 6], [8, 8], [1, 8, 1]):
        header = torch.tensor([*packed.header[:4].tolist(), *settings])
        with pytest.raises(FormatError, match="format 4 is not known here"):
            unpack({"header": header, **packed.tensors})
    with pytest.raises(FormatError, match="a place is beyond its group of 8"):
        unpack({"header": packed.header, **packed.tensors, "places": packed.tensors["places"] | 0x88})
