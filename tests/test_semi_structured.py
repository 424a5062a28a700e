"""2:4 on a graphics card: what it takes is told anywhere, and the product is tried where there is one."""

import pytest
import torch
from torch import nn

from secateur.errors import FormatError
from secateur.semi_structured import semi_structured_, why_not


def two_of_four(rows=64, columns=128, dtype=torch.bfloat16):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    groups = weight.reshape(-1, 4)
    return groups.scatter(1, groups.abs().argsort(1)[:, :2], 0).reshape(rows, columns).to(dtype)


def test_what_the_hardware_takes():
    assert why_not(two_of_four()) == ""
    assert why_not(two_of_four().float()) == "it is float32, and float16 and bfloat16 are multiplied so"
    assert why_not(two_of_four(48)) == "it is [48, 128], and its sides are to be multiples of 32 and 64"
    assert why_not(torch.ones(2)) == "it has 1 axes, and a matrix has 2"
    spoilt = two_of_four()
    spoilt[3, :4] = 1
    assert why_not(spoilt) == "of four weights in a row up to 4 are not zero, and 2 may be"


def test_without_a_card_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("a card is here")
    with pytest.raises(FormatError, match=r"layers were to be multiplied as 2:4, but torch sees no NVIDIA card here"):
        semi_structured_(nn.Linear(4, 4))


@pytest.fixture
def card():
    """Asked for when a test runs, not when it is collected: a driver that fails is a failure of that test alone."""
    if not torch.cuda.is_available():
        pytest.skip("2:4 tensors need an NVIDIA card, and torch sees none")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip(f"{torch.cuda.get_device_name()} has no sparse tensor cores")
    return "cuda"


def test_the_product_is_that_of_the_dense_layer(card):
    model = nn.Sequential(nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 64)).bfloat16().to(card)
    model[0].weight.data = two_of_four().to(card)
    x = torch.randn(64, 128, device=card, dtype=torch.bfloat16)
    with torch.no_grad():
        wanted = model(x)
        changed, left = semi_structured_(model)
        assert changed == ["0"] and left == {"2": "of four weights in a row up to 4 are not zero, and 2 may be"}
        assert torch.allclose(model(x), wanted, rtol=0.02, atol=0.02)
