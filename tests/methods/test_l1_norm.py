"""Small filters go, large ones stay, and the model gets smaller at once."""

import copy

import pytest
import tiny
import torch
from torch import nn

from secateur import edit
from secateur.axes import Global
from secateur.edit import Remove
from secateur.errors import GraphError, SettingError
from secateur.graph import couple
from secateur.method import prune
from secateur.methods.l1_norm import L1Norm, l1_norm
from secateur.site import Part, Site, tensors

FAMILIES = ("mlp", "cnn", "decoder", "encoder", "vision transformer")


def count(model):
    return sum(p.numel() for p in model.parameters())


def test_the_norm_is_of_all_a_unit_owns_but_biases():
    # Unit 0 owns row 0 and the bias 9, and column 0 of the reader; (1 + 2 + 3 + 4) / 4 and (0 + 6 + 1 + 1) / 4.
    owner = torch.arange(2)
    site = Site("a", "channel", (2,), (
        Part("a.weight", (2, 2), owner.reshape(2, 1)),
        Part("a.bias", (2,), owner),
        Part("b.weight", (2, 2), owner.reshape(1, 2)),
    ))  # fmt: skip
    found = l1_norm(site, {
        "a.weight": torch.tensor([[1.0, -2.0], [0.0, 6.0]]),
        "a.bias": torch.tensor([9.0, 9.0]),
        "b.weight": torch.tensor([[3.0, -1.0], [-4.0, 1.0]]),
    })  # fmt: skip
    assert found.tolist() == [2.5, 2.0]


def test_small_filters_go_and_large_ones_stay():
    model = tiny.cnn()
    with torch.no_grad():
        for loud in (1, 4, 6):
            model.block1.conv1.weight[loud] *= 10
    rows = model.block1.conv1.weight[[1, 4, 6]].clone()
    columns = model.block1.conv2.weight[:, [1, 4, 6]].clone()
    outcome = L1Norm(sparsity=0.625, protect=("conv", "down")).run(model, tiny.make_task("cnn"))
    assert torch.equal(outcome.model.block1.conv1.weight, rows)
    assert torch.equal(outcome.model.block1.conv2.weight, columns)
    assert outcome.model.block1.bn1.num_features == 3
    assert outcome.model.conv.out_channels == 8
    assert "left alone: conv" in outcome.notes


@pytest.mark.parametrize("family", FAMILIES)
def test_every_site_loses_the_fraction_asked_for(family):
    model, task = tiny.make_model(family), tiny.make_task(family)
    before = {s.name: s.units for s in couple(model, task.example).of("channel", "head")}
    outcome = prune(model, L1Norm(sparsity=0.25), task)
    after = {s.name: s.units for s in couple(outcome.model, task.example).of("channel", "head")}
    removed = {e.site.name for e in outcome.edits if isinstance(e, Remove)}
    assert removed == {n for n, u in before.items() if int(u * 0.25)}
    assert {e.site.name for e in outcome.edits} == set(before)  # what stays whole is counted too
    for name, units in before.items():
        assert after.get(name, 1) == units - int(units * 0.25)  # a site of one unit is none
    assert count(outcome.model) < count(model)
    assert outcome.ledger.before.flops > outcome.ledger.after.flops
    replayed = copy.deepcopy(model)
    edit.apply_(replayed, outcome.edits)
    for name, value in outcome.model.state_dict().items():
        assert torch.equal(value, replayed.state_dict()[name])


def test_heads_only_and_channels_only():
    model, task = tiny.encoder(), tiny.make_task("encoder")
    for kind, other in (("head", "channel"), ("channel", "head")):
        edits = prune(model, L1Norm(sparsity=0.5, kinds=(kind,)), task).edits
        assert edits
        assert {e.site.kind for e in edits} == {kind} != {other}


def test_widths_are_multiples():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    outcome = prune(model, L1Norm(sparsity=0.3, kinds=("channel",), round_to=16), task)
    assert {layer.mlp.gate_proj.out_features for layer in outcome.model.model.layers} == {48}  # 45 of 64 were asked for
    assert "model.layers.0.mlp keeps 48 of 64 to make a multiple of 16" in outcome.notes


def test_one_threshold_for_all_and_the_same_width_for_all():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    with torch.no_grad():
        for part in model.model.layers[0].mlp.parameters():
            part *= 0.1
    settings = {"sparsity": 0.25, "kinds": ("channel",), "allocation": Global()}
    apart = prune(model, L1Norm(**settings), task).model
    assert [layer.mlp.gate_proj.out_features for layer in apart.model.layers] == [32, 64]
    alike = prune(model, L1Norm(**settings, uniform=True), task).model
    assert [layer.mlp.gate_proj.out_features for layer in alike.model.layers] == [48, 48]


def test_some_unit_always_stays():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    outcome = prune(model, L1Norm(sparsity=0.99, allocation=Global()), task)
    for site in couple(model, task.example).of("channel", "head"):
        removed = [e for e in outcome.edits if isinstance(e, Remove) and e.site.name == site.name]
        assert all(int(e.keep.sum()) >= 1 for e in removed)
    task.loss(outcome.model, task.example)


def test_a_trained_network_keeps_more_with_small_filters_gone_than_with_large_ones():
    """Section 3.1: filters of small norm matter less; the same number of the largest hurts more."""
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    small = prune(model, L1Norm(sparsity=0.25), task).model
    large = copy.deepcopy(model)
    named = tensors(large)
    from secateur.axes import keep_top
    from secateur.graph import removals

    sites = couple(large, task.example).of("channel")
    keep = {s.name: keep_top(-l1_norm(s, named), s.units - int(0.25 * s.units)) for s in sites}
    edit.apply_(large, removals(sites, keep))
    assert count(small) == count(large)

    def loss(m):
        with torch.no_grad():
            return sum(float(task.loss(m.eval(), batch)) for batch in task.batches("val"))

    assert loss(model) <= loss(small) < 0.9 * loss(large)


def test_what_cannot_be_cut_is_refused_with_the_reason():
    with pytest.raises(GraphError, match="sites of kind head were asked for, but none can be taken out"):
        prune(tiny.make_model("rnn"), L1Norm(kinds=("head",)), tiny.make_task("rnn"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"kinds": ("heads",)}, r"kinds \['heads'\] were asked for(.|\n)*Did you mean head\?"),
        ({"kinds": ()}, "what can be taken out is a channel or a head"),
        ({"round_to": 0}, "widths in multiples of 0"),
        ({"sparsity": 1.0}, "the fraction removed"),
    ],
)
def test_settings_are_checked(settings, said):
    with pytest.raises(SettingError, match=said):
        L1Norm(**settings).check()


def test_the_callers_model_is_left_alone():
    model, task = tiny.mlp(), tiny.make_task("mlp")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    outcome = prune(model, L1Norm(sparsity=0.5), task)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(outcome.model[0], nn.Linear)
    assert outcome.model[0].out_features == 16
