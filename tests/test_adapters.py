"""Adapters: each variant worked by hand, merged as it was seen, zeros in place, nothing left behind."""

import copy

import pytest
import torch
from tiny import make_task, trained
from torch import nn
from torch.nn.utils import parametrize

from secateur.adapters import Lora, LoraPrune, LowRank, MaskLora, Offset, ScaleLora, adapted, check_kept, tied_names
from secateur.cut import weights
from secateur.edit import Gate, apply_
from secateur.errors import BudgetError, ModelError, SettingError, SiteError

WEIGHT = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 4.0]])
KEEP = WEIGHT != 0
A, B = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[1.0], [-1.0]])  # B A = [[1, 2, 3], [-1, -2, -3]]


def low(weight=WEIGHT, a=A, b=B, rank=1):
    found = LowRank(weight, rank)
    with torch.no_grad():
        found.a.copy_(a)
        found.b.copy_(b)
    return found


def test_lora_by_hand():
    adapter = Lora(low(), 0.5)
    wanted = torch.tensor([[1.5, 1.0, 3.5], [-0.5, 2.0, 2.5]])
    assert torch.equal(adapter(WEIGHT), wanted)
    assert torch.equal(adapter.merged(WEIGHT), wanted)


def test_lora_prune_by_hand():
    adapter = LoraPrune(low(), 0.5, KEEP)
    assert torch.equal(adapter(WEIGHT), torch.tensor([[1.5, 1.0, 3.5], [-0.5, 2.0, 2.5]]))
    assert torch.equal(adapter.merged(WEIGHT), torch.tensor([[1.5, 0.0, 3.5], [0.0, 2.0, 2.5]]))


def test_mask_lora_by_hand():
    adapter = MaskLora(low(), 0.5, KEEP)
    wanted = torch.tensor([[1.5, 0.0, 3.5], [0.0, 2.0, 2.5]])
    assert torch.equal(adapter(WEIGHT), wanted)
    assert torch.equal(adapter.merged(WEIGHT), wanted)


def test_scale_lora_by_hand():
    adapter = ScaleLora(low())
    wanted = torch.tensor([[1.0, 0.0, 6.0], [0.0, -6.0, -12.0]])
    assert torch.equal(adapter(WEIGHT), wanted)
    assert torch.equal(adapter.merged(WEIGHT), wanted)


def test_an_offset_adds_up_steps_that_half_precision_would_round_away():
    weight = torch.ones(2, dtype=torch.bfloat16)
    adapter = Offset(weight, torch.tensor([True, False]))
    for _ in range(4):
        with torch.no_grad():
            adapter.change += 2.0**-9  # bfloat16 steps by 2 ** -7 above one
    assert adapter(weight).tolist() == [1.0078125, 1.0]
    assert adapter.merged(weight).dtype == torch.bfloat16


def test_a_kept_weight_that_is_zero_is_trained():
    keep = torch.ones_like(KEEP)
    assert MaskLora(low(), 1.0, keep).merged(WEIGHT)[0, 1] == 2


@pytest.mark.parametrize("shape", [(4, 3), (4, 2, 3, 3), (4, 3, 1, 1)])
def test_starts_change_nothing_and_can_move(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    zero = LowRank(weight, 2).start_at_zero_(torch.Generator().manual_seed(1))
    assert torch.equal(Lora(zero, 2.0)(weight), weight)
    Lora(zero, 2.0)(weight).square().sum().backward()
    assert zero.b.grad.abs().sum() > 0
    torch.testing.assert_close(ScaleLora(LowRank(weight, 2).start_at_one_())(weight), weight)


def test_a_turned_weight_and_stacked_experts_have_the_ranks_of_their_matrices():
    turned = LowRank(torch.zeros(5, 3), 2, turned=True)  # stored [in, out]
    assert (turned.a.shape, turned.b.shape) == ((2, 5), (3, 2))
    assert turned().shape == (5, 3)
    stacked = LowRank(torch.zeros(4, 5, 3), 2, stacked=True)
    assert (stacked.a.shape, stacked.b.shape) == ((4, 2, 3), (4, 5, 2))
    with torch.no_grad():
        stacked.a.normal_()
        stacked.b.normal_()
    for expert in range(4):
        torch.testing.assert_close(stacked()[expert], stacked.b[expert] @ stacked.a[expert])


def test_a_rank_above_the_smaller_side_is_cut_to_it():
    assert LowRank(WEIGHT, 16).rank == 2
    with pytest.raises(SettingError, match="a rank is 1 at least"):
        LowRank(WEIGHT, 0)


@pytest.mark.parametrize("kind", ["lora", "mask", "scale"])
@pytest.mark.parametrize("family", ["decoder", "cnn", "rnn", "moe"])
def test_merged_is_what_the_forward_pass_saw_and_nothing_is_left(family, kind):
    model, task = trained(family), make_task(family)
    batch = task.example
    parts = {s.parts[0].name: s.parts[0] for s in weights(model)}
    keys, named = list(model.state_dict()), dict(model.named_parameters())
    classes = {n: type(m) for n, m in model.named_modules()}
    draw = torch.Generator().manual_seed(3)
    put = {}
    for name, part in parts.items():
        product = LowRank(named[name], 3, stacked=part.index is not None).start_at_zero_(draw)
        with torch.no_grad():
            product.b.normal_(0, 0.1, generator=draw)
        keep = torch.rand(named[name].shape, generator=draw) < 0.5
        put[name] = {
            "lora": lambda p=product: Lora(p, 2.0),
            "mask": lambda p=product, k=keep: MaskLora(p, 2.0, k),
            "scale": lambda p=product: ScaleLora(p),
        }[kind]()
    fresh = copy.deepcopy(model)
    with torch.no_grad():
        before = task.loss(model, batch)
        with adapted(model, put) as edits:
            seen = task.loss(model, batch)
        merged = task.loss(model, batch)
    assert not torch.equal(before, seen)
    torch.testing.assert_close(merged, seen, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == keys
    assert {n: type(m) for n, m in model.named_modules()} == classes
    assert all(dict(model.named_parameters())[n] is p for n, p in named.items())
    assert [e.name for e in edits] == list(put)
    apply_(fresh, edits)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in fresh.state_dict().items())


def test_an_error_inside_takes_the_adapters_out_unmerged():
    model = nn.Sequential(nn.Linear(3, 2))
    before = model[0].weight.detach().clone()
    with pytest.raises(KeyError), adapted(model, {"0.weight": Lora(low(), 1.0)}):
        raise KeyError
    assert torch.equal(model[0].weight, before)
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


def test_what_cannot_be_adapted_is_refused():
    model = trained("decoder")
    product = LowRank(model.get_input_embeddings().weight, 2)
    assert tied_names(model)["lm_head.weight"] == ["model.embed_tokens.weight", "lm_head.weight"]
    with (
        pytest.raises(ModelError, match="one tensor with model.embed_tokens.weight"),
        adapted(model, {"lm_head.weight": Lora(product, 1.0)}),
    ):
        pass
    with pytest.raises(SiteError, match="Did you mean"), adapted(model, {"lm_heat.weight": Lora(product, 1.0)}):
        pass
    with pytest.raises(SiteError, match="it is no matrix"):
        LowRank(torch.zeros(3), 1)
    gated = nn.Sequential(nn.Linear(3, 2))
    (site,) = weights(gated)
    apply_(gated, Gate(site, nn.Sigmoid()))
    with pytest.raises(ModelError, match="behind a gate"), adapted(gated, {"0.weight": Lora(low(), 1.0)}):
        pass
    assert parametrize.is_parametrized(gated[0])


def test_filled_zeros_are_named():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    model[0].weight.data = WEIGHT.clone()
    check_kept(model, {"0.weight": KEEP})
    model[0].weight.data[0, 1] = 1
    with pytest.raises(BudgetError, match="1 of them are filled in, 1 in 0.weight"):
        check_kept(model, {"0.weight": KEEP})
