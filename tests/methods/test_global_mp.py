"""Global magnitude pruning (paper 22): one exact threshold, floors per layer, collapse, multiply-adds."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import Erk, Global, Uniform
from secateur.cut import weights
from secateur.edit import Mask
from secateur.errors import BudgetError, ModelError, SettingError
from secateur.method import load, prune
from secateur.methods.global_mp import GlobalMagnitude, flop_sparsity, magnitudes, masks_of, taylor_scores
from secateur.site import tensors
from secateur.task import Batch


def two_layers():
    """Eight weights, of which the smaller four are in the first layer."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[0.1, -0.2], [0.3, -0.4]])
    model[1].weight.data = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    return model


def kept(masks):
    return {mask.site.name: mask.kept for mask in masks}


def chosen(model, allocation, sparsity):
    sites = weights(model)
    return masks_of(sites, magnitudes(model, sites), allocation, sparsity)


def test_one_threshold_takes_the_smallest_wherever_they_are():
    assert load("global_mp") is GlobalMagnitude
    masks = chosen(two_layers(), Global(), 0.5)
    assert kept(masks) == {"0.weight": 0, "1.weight": 4}
    assert kept(chosen(two_layers(), Uniform(), 0.5)) == {"0.weight": 2, "1.weight": 2}
    masks = chosen(two_layers(), Global(), 0.625)
    assert masks[1].keep.tolist() == [[False, True], [True, True]]


def test_a_floor_keeps_the_best_of_each_layer_and_the_total_is_still_exact():
    masks = chosen(two_layers(), Global(floor=0.25), 0.5)  # at least 2 of the 8 weights in each layer
    assert kept(masks) == {"0.weight": 2, "1.weight": 2}
    assert masks[0].keep.tolist() == [[False, False], [True, True]]
    masks = chosen(two_layers(), Global(floor=0.125), 0.5)
    assert kept(masks) == {"0.weight": 1, "1.weight": 3}
    assert masks[0].keep.tolist() == [[False, False], [False, True]]


def test_a_layer_smaller_than_its_floor_keeps_all_it_has():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 1, bias=False))
    model[1].weight.data *= 1e-9
    assert kept(chosen(model, Global(floor=0.15), 0.5)) == {"0.weight": 28, "1.weight": 8}


def test_floors_that_leave_nothing_to_remove_are_refused():
    with pytest.raises(BudgetError, match="the floors alone keep 8 of 8"):
        chosen(two_layers(), Global(floor=0.5), 0.5)
    method = GlobalMagnitude(sparsity=0.9, floor=0.2, until=0.5, steps=10)
    with pytest.raises(BudgetError, match="Ask for at most"):
        method.run(two_layers(), task=None)  # before any data is read


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("floor", [0.0, 0.0002])
def test_exactly_as_many_go_as_asked_even_with_many_weights_at_zero(sparsity, floor):
    model = tiny.cnn()
    model.conv.weight.data.zero_()
    model.block1.conv1.weight.data[:] = 0.05
    masks = chosen(model, Global(floor=floor), sparsity)
    units = sum(mask.site.units for mask in masks)
    assert units - sum(kept(masks).values()) == int(sparsity * units + 1e-9)
    assert all(mask.kept >= min(int(floor * units), mask.site.units) for mask in masks)


@pytest.mark.parametrize("until", [0.0, 0.5])
def test_the_mask_is_held_through_fine_tuning(until):
    method = GlobalMagnitude(sparsity=0.8, until=until, steps=20, every=4)
    outcome = prune(tiny.trained("cnn"), method, tiny.toy_images())
    units = sum(mask.site.units for mask in outcome.edits)
    assert sum(mask.site.units - mask.kept for mask in outcome.edits) == int(0.8 * units)
    for mask in outcome.edits:
        assert bool((tensors(outcome.model)[mask.site.name][~mask.keep] == 0).all())
    assert outcome.history.curves["sparsity"][-1][1] == int(0.8 * units) / units
    assert len(outcome.history.losses) == 20


def test_without_fine_tuning_the_other_weights_are_left_as_they_were():
    model = tiny.trained("mlp")
    outcome = prune(model, GlobalMagnitude(sparsity=0.5, steps=0), tiny.toy_vectors())
    for mask in outcome.edits:
        before, after = tensors(model)[mask.site.name], tensors(outcome.model)[mask.site.name]
        assert torch.equal(before[mask.keep], after[mask.keep])


def squeezed():
    """A trained MLP whose first layer is a thousandth of its size, made up for by the next: the same function."""
    model = tiny.trained("mlp")
    with torch.no_grad():
        model[0].weight *= 1e-3
        model[0].bias *= 1e-3
        model[2].weight *= 1e3
    return model


def test_a_floor_restores_a_network_that_collapsed():
    """The paper's minimum threshold: at the same sparsity chance without, and most of the accuracy with it."""
    task = tiny.toy_vectors()
    model = squeezed()
    dense = task.measure(model, "test")["accuracy"]
    method = GlobalMagnitude(sparsity=0.5, floor=0.0, steps=0)
    fallen = prune(model, method, task)
    assert "collapsed: nothing is left of 0.weight, 4.weight; a floor prevents that" in fallen.notes
    assert task.measure(fallen.model, "test")["accuracy"] < 0.4  # four classes, chance is 0.25
    held = prune(model, replace(method, floor=0.15), task)
    assert not any("collapsed" in note for note in held.notes)
    assert task.measure(held.model, "test")["accuracy"] > 0.75 * dense


def test_global_is_ahead_of_uniform_before_fine_tuning():
    task = tiny.toy_images()
    model = tiny.trained("cnn")
    found = {}
    for name, allocation in (("global", Global()), ("uniform", Uniform()), ("erk", Erk())):
        pruned = tiny.trained("cnn")
        for mask in chosen(model, allocation, 0.7):
            mask.apply_(pruned)
        found[name] = task.measure(pruned, "test")["loss"]
    assert found["global"] < found["uniform"] - 0.1, found


def test_multiply_adds_are_counted_where_each_weight_is_used():
    conv = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, bias=False), nn.Flatten(), nn.Linear(32, 2, bias=False))
    sites = weights(conv)
    example = Batch((torch.zeros(1, 1, 4, 4),))
    none, all_ = (lambda s: torch.zeros(s.shape, dtype=torch.bool)), (lambda s: torch.ones(s.shape, dtype=torch.bool))
    # 18 weights at 16 positions, and 64 weights once
    assert flop_sparsity(conv, [Mask(sites[0], none(sites[0])), Mask(sites[1], all_(sites[1]))], example) == 288 / 352
    assert flop_sparsity(conv, [Mask(sites[0], all_(sites[0])), Mask(sites[1], none(sites[1]))], example) == 64 / 352
    rnn = tiny.rnn()
    cut = [Mask(s, none(s) if "weight_ih" in s.name else all_(s)) for s in weights(rnn)]
    inputs, states, head = 72 * 8 + 72 * 24, 2 * 72 * 24, 4 * 24
    assert flop_sparsity(rnn, cut, Batch((torch.zeros(3, 10, 8),))) == inputs * 10 / ((inputs + states) * 10 + head)
    up = nn.Sequential(nn.ConvTranspose2d(6, 2, 2, stride=2), nn.Conv2d(2, 3, 1))  # 48 weights at 9 places, 6 at 36
    sites = weights(up)
    cut = [Mask(sites[0], none(sites[0])), Mask(sites[1], all_(sites[1]))]
    seen = flop_sparsity(up, cut, Batch((torch.zeros(1, 6, 3, 3),)))
    assert seen == 48 * 9 / (48 * 9 + 6 * 36)
    moe = tiny.moe()
    assert flop_sparsity(moe, [Mask(s, all_(s)) for s in weights(moe)], tiny.toy_text().example) is None


def test_the_first_order_rival_is_the_product_of_weight_and_gradient():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    sites = weights(model)
    found = taylor_scores(model, sites, task, 32)
    batch = next(iter(task.batches("calibration", 32)))
    model.zero_grad()
    task.loss(model, batch).backward()
    for site in sites:
        weight = tensors(model)[site.name]
        assert torch.allclose(found[site.name].float(), (weight * weight.grad).abs(), atol=1e-6)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"floor": 1.0}, "Give 0.0005 for the paper's 0.05 %"),
        ({"floor": -0.1}, "a floor of -0.1"),
        ({"until": 0.5, "steps": 0}, "a ramp needs some to happen in"),
        ({"until": 2.0}, "training lasts from 0 to 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), GlobalMagnitude(**given), task=None)


def test_weights_that_are_not_numbers_are_refused():
    model = tiny.mlp()
    model[2].weight.data[0, 0] = torch.nan
    with pytest.raises(ModelError, match="2.weight holds NaN"):
        prune(model, GlobalMagnitude(), tiny.toy_vectors())
