"""Gradual pruning (paper 05): the ramp, exact targets, weights that come back, large sparse against small dense."""

import copy
import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import NM, Global
from secateur.axes.allocations import SynExp, among
from secateur.axes.rules import LearningRate
from secateur.cut import weights
from secateur.errors import SettingError
from secateur.method import load, prune
from secateur.methods.gradual import GradualPruning
from secateur.site import tensors
from secateur.tasks.learners import Adam
from secateur.train import fit


def network(*widths, seed=0):
    def make():
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return tiny.seeded(make, seed)


def zeros(model):
    return {site.name: int((tensors(model)[site.name] == 0).sum()) for site in weights(model)}


def test_it_is_found_by_name_and_pruning_leaves_the_callers_model_alone():
    assert load("gradual") is GradualPruning
    model = tiny.mlp()
    before = copy.deepcopy(model)
    outcome = prune(model, GradualPruning(sparsity=0.75, steps=20, every=3), tiny.toy_vectors())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))
    assert zeros(outcome.model) == {"0.weight": 384, "2.weight": 768, "4.weight": 96}
    assert outcome.ledger.sparsity == 0.75


def test_the_curve_of_sparsity_is_the_cubic_one_worked_by_hand():
    model = tiny.mlp()
    method = GradualPruning(sparsity=0.75, begin=0.0, until=0.8, steps=10, every=2)
    outcome = method.run(model, tiny.toy_vectors())
    # s = 0.75 (1 - (1 - t / 8)^3) at t = 0, 2, 4, 6, 8
    asked = [0.0, 0.43359375, 0.65625, 0.73828125, 0.75]
    units = {"0.weight": 512, "2.weight": 1024, "4.weight": 128}
    exact = [sum(int(s * n) for n in units.values()) / 1664 for s in asked]
    assert outcome.history.curves["sparsity"] == list(zip([0, 2, 4, 6, 8], exact, strict=True))


def test_a_share_that_rounding_raises_goes_to_a_layer_that_has_room_where_nothing_comes_back():
    assert among({"a": 5, "b": 2, "c": 3}, {"a": 4, "b": 2, "c": 9}) == {"a": 4, "b": 2, "c": 4}
    assert among({"a": 5, "b": 5}, {"a": 4, "b": 3}) == {"a": 4, "b": 3}
    method = GradualPruning(sparsity=0.85, until=0.9, steps=60, every=1, revive=False, allocation=SynExp())
    outcome = method.run(network(16, 18, 10, 14, 4), tiny.toy_vectors())
    assert sum(zeros(outcome.model).values()) == int(0.85 * 664)


@pytest.mark.parametrize("revive", [True, False])
def test_the_target_is_met_exactly_though_the_interval_does_not_divide_the_window(revive):
    method = GradualPruning(sparsity=0.8, steps=30, every=7, revive=revive)
    outcome = method.run(tiny.mlp(), tiny.toy_vectors())
    assert outcome.history.curves["sparsity"][-1][0] == 21
    assert zeros(outcome.model) == {"0.weight": 409, "2.weight": 819, "4.weight": 102}
    assert [mask.site.units - mask.kept for mask in outcome.edits] == [409, 819, 102]


def test_it_says_which_variant_it_was_and_both_sparsities():
    told = GradualPruning(sparsity=0.5, steps=10).run(tiny.mlp(), tiny.toy_vectors()).notes
    assert "832 weights are zero: 50.00% of the 1,664 in pruned layers, 48.04% of all 1,732 parameters" in told
    assert "masked weights kept their values and could come back" in told
    gone = GradualPruning(sparsity=0.5, steps=10, revive=False).run(tiny.mlp(), tiny.toy_vectors()).notes
    assert "masked weights were gone" in gone


def test_a_ramp_that_ends_too_late_is_remarked_on():
    notes = GradualPruning(sparsity=0.5, until=0.95, steps=20).run(tiny.mlp(), tiny.toy_vectors()).notes
    assert any("5% is left to recover in" in note for note in notes)
    quiet = GradualPruning(sparsity=0.5, until=0.9, steps=20).run(tiny.mlp(), tiny.toy_vectors()).notes
    assert not any("to recover in" in note for note in quiet)


def test_a_tiny_layer_keeps_a_weight():
    model = network(16, 2, 4)
    outcome = GradualPruning(sparsity=0.97, steps=10, every=2).run(model, tiny.toy_vectors())
    assert {mask.site.name: mask.kept for mask in outcome.edits} == {"0.weight": 1, "2.weight": 1}


def test_layers_can_be_left_dense():
    model = tiny.cnn()
    outcome = GradualPruning(sparsity=0.9, steps=10, every=2, exclude=("conv", "fc")).run(model, tiny.toy_images())
    assert {mask.site.name for mask in outcome.edits}.isdisjoint({"conv.weight", "fc.weight"})
    assert not bool((model.conv.weight == 0).any())
    assert not bool((model.fc.weight == 0).any())


def test_it_composes_with_other_patterns_and_allocations():
    outcome = GradualPruning(sparsity=0.75, steps=10, every=2, pattern=NM(1, 4)).run(tiny.mlp(), tiny.toy_vectors())
    assert any("always removes 0.75: from the schedule's first update on" in note for note in outcome.notes)
    for mask in outcome.edits:
        assert bool((mask.keep.reshape(-1, 4).sum(1) == 1).all())
    whole = GradualPruning(sparsity=0.75, steps=10, every=2, allocation=Global()).run(tiny.mlp(), tiny.toy_vectors())
    assert sum(mask.kept for mask in whole.edits) == 416
    assert len({mask.kept / mask.site.units for mask in whole.edits}) == 3


@pytest.mark.parametrize("family", ["cnn", "decoder", "rnn", "moe"])
def test_it_takes_every_family(family):
    method = replace(GradualPruning(), **GradualPruning.tiny)
    outcome = method.run(tiny.make_model(family), tiny.make_task(family))
    units, kept = sum(m.site.units for m in outcome.edits), sum(m.kept for m in outcome.edits)
    assert abs((units - kept) / units - method.sparsity) < len(outcome.edits) / units


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"sparsity": 90}, "Did you mean 0.9"),
        ({"sparsity": 0.5, "start": 0.6}, "its end is below its start"),
        ({"begin": 0.8, "until": 0.3}, "begin at 0.8 of training"),
        ({"until": 1.5}, "training lasts from 0 to 1"),
        ({"every": 0}, "an update every 0 steps"),
        ({"power": 0}, "power is above 0"),
        ({"steps": 0}, "it needs training to happen in"),
        ({"rate_floor": 3}, "a floor of 3"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), GradualPruning(**given), task=None)


def test_large_sparse_beats_small_dense():
    """The paper's claim on scikit-learn's digits: 5 % of 17,024 weights against a dense net with no fewer, 851."""
    from secateur.tasks.images import digits

    task = digits(flat=True, seed=0, learner=Adam(1e-2), batch=64)
    sparse, dense = network(64, 128, 64, 10), network(64, 11, 8, 10)
    ramp = GradualPruning(sparsity=0.95, steps=600, every=20, begin=0.05, until=0.5)
    ramp.run(sparse, task)
    fit(dense, task, 600, [LearningRate()])
    at_once = network(64, 128, 64, 10)
    replace(ramp, begin=0.5).run(at_once, task)
    nonzero = sum(int((p != 0).sum()) for p in sparse.parameters() if p.dim() == 2)
    assert nonzero <= 852 <= sum(p.numel() for p in dense.parameters() if p.dim() == 2)
    found = {n: task.measure(m, "test")["accuracy"] for n, m in (("s", sparse), ("d", dense), ("o", at_once))}
    assert found["s"] > found["d"] + 0.01, found
    assert found["s"] > found["o"] + 0.02, found
