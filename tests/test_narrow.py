"""Attention of torch that is narrower than what it reads: the same as torch's own where both can be."""

import copy

import pytest
import tiny
import torch
from torch import nn

from secateur.edit import apply_
from secateur.graph import couple, removals
from secateur.narrow import NarrowAttention
from secateur.task import Batch

DRAW = torch.Generator().manual_seed(0)


def made(**settings):
    return tiny.seeded(lambda: nn.MultiheadAttention(12, 3, **settings), 0).eval()


@pytest.mark.parametrize("settings", [{}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 7}])
@pytest.mark.parametrize("weights", [True, False])
def test_it_is_torchs_own_where_nothing_is_missing(settings, weights):
    plain = made(**settings)
    narrow = copy.deepcopy(plain)
    narrow.__class__ = NarrowAttention
    shape = (2, 4) if settings.get("batch_first") else (4, 2)
    q = torch.randn(*shape, 12, generator=DRAW)
    k, v = (torch.randn(*shape, settings.get(n, 12), generator=DRAW) for n in ("kdim", "vdim"))
    hide = torch.tensor([[False, True, False, False], [False] * 4])
    causal = torch.ones(4, 4).triu(1).bool()
    each = torch.randn(6, 4, 4, generator=DRAW)
    for mask, padding in ((None, None), (causal, hide), (each, None), (causal.float() * -9, hide)):
        with torch.no_grad():
            wanted, found = (
                m(q, k, v, key_padding_mask=padding, need_weights=weights, attn_mask=mask) for m in (plain, narrow)
            )
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-4, atol=1e-5)
        assert (found[1] is None) == (not weights)
        if weights:
            torch.testing.assert_close(found[1], wanted[1], rtol=1e-4, atol=1e-5)
    if not settings:
        one = [x[:, 0] for x in (q, k, v)]
        torch.testing.assert_close(narrow(*one)[0], plain(*one)[0], rtol=1e-4, atol=1e-5)


def test_heads_go_and_masked_equals_removed_through_torchs_own_shortcuts():
    def make():
        layer = nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, dropout=0.0)
        return nn.TransformerEncoder(layer, 2)

    model = tiny.seeded(make, 0).eval()
    x = torch.randn(2, 5, 12, generator=DRAW)
    sites = couple(model, Batch((x,))).of("head")
    assert [(site.name, site.units) for site in sites] == [("layers.0.self_attn", 4), ("layers.1.self_attn", 4)]
    keep = {site.name: torch.tensor([True, False, True, True]) for site in sites}
    zeroed = copy.deepcopy(model)
    with torch.no_grad():
        for layer in zeroed.layers:
            layer.self_attn.out_proj.weight[:, 3:6] = 0
    apply_(model, removals(sites, keep))
    assert all(type(layer.self_attn) is NarrowAttention and layer.self_attn.num_heads == 3 for layer in model.layers)
    hide = torch.tensor([[False] * 3 + [True] * 2, [False] * 5])
    with torch.no_grad():
        for padding in (None, hide):
            wanted, found = (m(x, src_key_padding_mask=padding) for m in (zeroed, model))
            kept = slice(None) if padding is None else ~hide
            torch.testing.assert_close(found[kept], wanted[kept], rtol=1e-4, atol=1e-5)
    model.train()(x).sum().backward()
    assert model.layers[0].self_attn.in_proj_weight.grad.shape == (27, 12)
