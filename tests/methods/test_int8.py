"""Eight bits: the rounding by hand, the bytes counted, and that nothing else moves."""

import pytest
import torch
from tiny import decoder, make_task, mlp, toy_vectors

from secateur import prune
from secateur.cut import weights
from secateur.methods.int8 import Int8, rounded
from secateur.outcome import stored_bytes


def test_rounding_by_hand():
    # The row's largest is 1.27, so that a step is 0.01: 0.123 goes to 0.12, 0.126 to 0.13.
    row = torch.tensor([[1.27, 0.123, -0.126, 0.0], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[1.27, 0.12, -0.13, 0.0], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(rounded(row), expected)


def test_no_weight_moves_by_more_than_half_a_step_and_a_second_time_changes_nothing():
    weight = torch.randn(16, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    found = rounded(weight)
    step = weight.flatten(1).abs().amax(1) / 127
    assert bool(((found - weight).flatten(1).abs().amax(1) <= step / 2 * 1.0001).all())
    torch.testing.assert_close(rounded(found), found)
    assert all(len(row.unique()) <= 255 for row in found.flatten(1))


def test_stored_bytes_by_hand():
    model = mlp()  # 16 -> 32 -> 32 -> 4: 1,664 weights in 68 rows, 68 biases, float32
    assert stored_bytes(model) == 4 * (1664 + 68)
    done = prune(model, Int8(), toy_vectors())
    assert done.ledger.after.stored_bytes == 1664 + 4 * 68 + 4 * 68  # a byte a weight, a scale a row, the biases
    assert done.ledger.before.stored_bytes is None
    assert done.ledger.removed == 0
    assert done.ledger.after.memory_bytes == done.ledger.before.memory_bytes  # simulated, and said so
    assert "8 bits" in done.notes[0]


def test_tied_embeddings_and_what_is_excluded_stay():
    model = decoder()
    done = prune(model, Int8(), make_task("decoder"))
    before, after = model.state_dict(), done.model.state_dict()
    rounded_names = {site.name.removesuffix(".weight") for site in weights(model)}
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same == (name.removesuffix(".weight") not in rounded_names), name
    assert stored_bytes(model) == 4 * sum(p.numel() for p in model.parameters())  # the tied head once


def test_stacked_experts_are_rounded_by_their_own_rows():
    from tiny import moe

    model = moe()
    done = prune(model, Int8(), make_task("moe"))
    name = next(n for n, p in model.named_parameters() if p.dim() == 3)
    value = dict(model.named_parameters())[name][1]
    torch.testing.assert_close(dict(done.model.named_parameters())[name][1], rounded(value))


def test_a_selection_that_matches_nothing_is_refused():
    from secateur.errors import SiteError

    with pytest.raises(SiteError, match="matches no parameter"):
        prune(mlp(), Int8(include=("attnetion",)), toy_vectors())
