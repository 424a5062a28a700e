"""The seven pairs: what is equal on both sides, what each side took, and when a pair counts as reproduced."""

from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import NM, Global
from secateur.axes.gates import gated_units, insert_
from secateur.axes.schedules import Schedule
from secateur.errors import EvidenceError, SettingError
from secateur.graph import couple
from secateur.methods.magnitude import Magnitude
from secateur.methods.random import Random
from secateur.studies import taxonomy
from secateur.studies.taxonomy import (
    PAIRS,
    Compared,
    Dynamic,
    Geometric,
    Ground,
    Inherited,
    Pair,
    Patterns,
    Schedules,
    Side,
    Start,
    Transfer,
    contrasts,
    densities,
    gates_work,
    nm_of,
    pair_of,
    sum_open,
    text,
    total_left,
)
from secateur.tasks.learners import Sgd


def ground(family="mlp", **changes):
    def task(seed, times):
        return replace(tiny.make_task(family, seed=seed), learner=Sgd(0.05 * times))

    examples = len(tiny.make_task(family).splits["train"][-1])
    settings = {
        "start": lambda seed: tiny.make_model(family, seed), "trained": lambda seed: tiny.trained(family, seed),
        "task": task, "examples": examples, "batch": tiny.make_task(family).batch, "epochs": 1.0, "before": 2.0,
        "repeats": 0,
    }  # fmt: skip
    return Ground(**{**settings, **changes})


def side(name, seed, quality, **changes):
    plain = {
        "pair": 2, "metric": "accuracy", "higher": True, "sparsity": 0.5, "denominator": "all parameters",
        "parameters": 0.5, "flops": 0.5, "epochs": 3.0, "before": None, "work": 1.0,
    }  # fmt: skip
    return Side(name=name, seed=seed, quality=quality, **{**plain, **changes})


def by_name(sides):
    return {each.name: each for each in sides}


# By hand


def test_cuts_of_the_same_share_by_hand():
    curve = Geometric(0.75, 2)  # half goes, and half of what is left
    assert curve.after(1) == pytest.approx(0.5)
    assert (curve(0.0), curve(1.0)) == (0.0, 1.0)
    assert Geometric(0.875, 3)(0.5) == pytest.approx((0.75 - 0.5) / (0.875 - 0.5))  # 0.5, 0.75, 0.875


def test_which_pattern_a_sparsity_is():
    assert nm_of(0.5) == NM(2, 4)
    assert nm_of(0.75) == NM(1, 4)
    assert nm_of(0.875) == NM(1, 8)
    assert nm_of(0.9) is None


def test_work_of_gates_by_hand():
    model = taxonomy._Whole(nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 2), nn.ReLU(), nn.Linear(2, 3)))
    task = tiny.make_task("mlp")
    batch = replace(task.example, inputs=(torch.zeros(2, 6),))
    found, _ = gated_units(model, couple(model, batch), ("channel",))
    gates = insert_(model, found, hidden=5)
    # a gate for the 4, which looks at 6 values: 6 x 5 + 5 x 4; one for the 2, at 4: 4 x 5 + 5 x 2; each times two
    assert gates_work(gates) == 2 * (30 + 20 + 20 + 10)
    answers = [torch.tensor([[1.0, 1, 0, 0], [1, 1, 1, 1]]), torch.tensor([[1.0, 0], [1, 1]])]
    # the first example: 6 x 2 of the first matrix, 2 x 1 of the second, 1 x 3 of the third; of the second all
    assert sum_open(gates, answers).tolist() == [2 * (12 + 2 + 3), 2 * (24 + 8 + 6)]


def test_a_contrast_by_hand():
    pair = Schedules()
    sides = [side("many cuts", s, q) for s, q in enumerate((0.80, 0.82, 0.84))]
    sides += [side("one cut", s, q) for s, q in enumerate((0.70, 0.71, 0.72))]
    (found,) = contrasts([pair], sides)
    assert (found.left_mean, found.right_mean) == pytest.approx((0.82, 0.71))
    assert (found.left_sd, found.right_sd) == pytest.approx((0.02, 0.01))
    assert found.difference == pytest.approx(0.11)  # more than twice 0.02
    assert (found.ahead, found.clear, found.reproduced) == ("many cuts", True, True)
    # twice the larger deviation is what counts: 0.03 is more than twice 0.01, and less than twice 0.02
    (near,) = contrasts([pair], [*sides[:3], *(replace(s, quality=s.quality + 0.08) for s in sides[3:])])
    assert (near.clear, near.reproduced) == (False, False)
    (other,) = contrasts([pair], [*sides[:3], *(replace(s, quality=s.quality + 0.2) for s in sides[3:])])
    assert (other.ahead, other.clear, other.reproduced) == ("one cut", True, False)
    losses = [replace(s, higher=False, metric="loss") for s in sides]
    assert contrasts([pair], losses)[0].ahead == "one cut"
    unnamed = replace(found, named="")
    assert unnamed.reproduced is None
    shown = text([found, unnamed])
    assert "many cuts 0.8200 ± 0.0200, one cut 0.7100 ± 0.0100 (accuracy, 3 seeds): many cuts by 0.1100" in shown
    assert "reproduced" in shown and "50.0% of all parameters gone" in shown and "weights came trained" in shown


def test_one_seed_decides_nothing():
    with pytest.raises(EvidenceError, match="both sides were run with 1 seed"):
        contrasts([Schedules()], [side("many cuts", 0, 0.8), side("one cut", 0, 0.7), side("one cut", 1, 0.7)])


def test_a_side_without_a_denominator_is_refused():
    with pytest.raises(SettingError, match="it is not said what it is a fraction of"):
        side("one cut", 0, 0.5, denominator="")


def test_what_cannot_be_is_refused():
    with pytest.raises(SettingError, match="there are seven"):
        pair_of(8)
    with pytest.raises(SettingError, match="needs a second task"):
        pair_of(6)
    with pytest.raises(SettingError, match="that is no contrast"):
        Schedules(cuts=1)
    with pytest.raises(SettingError, match="each is to be above 0"):
        ground(epochs=0)
    with pytest.raises(SettingError, match="sparsity 1 was asked for"):
        ground(sparsity=1)
    with pytest.raises(SettingError, match="it is not known for how long"):
        Start().run(ground(before=None), 0)
    with pytest.raises(SettingError, match="a cut needs one"):
        Schedules(cuts=50).run(ground(epochs=0.1), 0)


def test_every_pair_says_what_it_is():
    for number in PAIRS:
        pair = pair_of(number, target=lambda seed, times: tiny.make_task("mlp", seed=seed))
        assert isinstance(pair, Pair)
        assert str(pair.number) == number
        assert pair.factor and pair.fixed
        assert all(isinstance(each, Compared) and each.named in ("", each.left, each.right) for each in pair.compared)


# Both sides have the same


def test_patterns_remove_as_many_parameters_and_in_one_side_as_much_work():
    sides = by_name(Patterns().run(ground("cnn"), 0))
    weights, pattern, channels = sides["weights"], sides["N:M"], sides["channels"]
    assert weights.parameters == pattern.parameters
    assert channels.parameters == pytest.approx(weights.parameters, abs=0.08)  # whole channels of a small network
    assert sides["channels, equal flops"].flops == pytest.approx(weights.flops, abs=0.08)
    assert {each.denominator for each in sides.values()} == {"all parameters"}
    assert {each.epochs for each in sides.values()} == {1.0}
    assert "N:M" not in by_name(Patterns().run(ground("mlp", sparsity=0.9), 0))


def test_many_cuts_end_where_one_does_and_cost_more():
    many, one = Schedules(cuts=3).run(ground("mlp", sparsity=0.8), 0)
    assert (many.name, one.name) == ("many cuts", "one cut")
    assert many.parameters == one.parameters
    assert many.epochs == one.epochs
    assert many.work > one.work


def test_work_of_cuts_is_that_of_what_each_left():
    given = ground("mlp", sparsity=0.75, epochs=1.0)  # 24 steps
    assert given.steps == 24
    plain = side("many cuts", 0, 0.5, flops=0.25, epochs=1.0, work=100.0)
    two = Schedule(start=0.5, end=0.75, begin=0.0, until=0.5, curve=Geometric(0.75, 2), every=12)
    # 12 steps at half the weights, 12 at a quarter: a quarter more in the first half than at the end
    spent = taxonomy.as_cut(plain, two, given).work - 100
    assert spent == pytest.approx(3 * given.examples * 0.25 / 2)
    late = taxonomy.as_cut(plain, Schedule(end=0.75, begin=0.5, until=0.5), given).work - 100
    assert late == pytest.approx(3 * given.examples * 0.75 / 2)  # all of it for 12 steps
    assert taxonomy.as_cut(plain, Schedule(start=0.75, end=0.75, begin=0.0, until=0.0), given).work == pytest.approx(
        100
    )


def test_seeds_are_run_and_judged_in_one_table():
    pairs = [Schedules(cuts=2), pair_of(5)]
    sides = taxonomy.run(pairs, ground("mlp", sparsity=0.6), (0, 1))
    assert [each.seed for each in sides] == [0] * 5 + [1] * 5
    found = contrasts(pairs, sides)
    assert [(each.pair, each.decides) for each in found] == [(2, True), (5, True), (5, False), (5, False)]
    shown = text(found)
    assert len([line for line in shown.splitlines() if line.startswith("      ")]) == 5  # each side's costs once


def test_what_weights_are_chosen_by_changes_no_share():
    sides = pair_of(3).run(ground("mlp", sparsity=0.75), 0)
    assert [each.name for each in sides] == ["magnitude", "synflow", "snip", "wanda"]
    assert len({each.parameters for each in sides}) == 1
    assert len({each.flops for each in sides}) == 1
    assert len({each.quality for each in sides}) > 1


def test_initial_weights_get_as_many_epochs_after_the_cut_and_in_a_third_side_in_all():
    sides = by_name(Start(samples=64).run(ground("mlp", sparsity=0.9), 0))
    trained, initial, long = sides["trained"], sides["initial"], sides["initial, as long in all"]
    assert (trained.epochs, trained.before) == (1.0, 2.0)
    assert (initial.epochs, initial.before) == (1.0, 0.0)
    assert long.epochs == trained.epochs + trained.before
    assert trained.parameters == pytest.approx(initial.parameters, abs=1e-3)
    assert trained.work > long.work > initial.work


def test_new_weights_get_equal_epochs_or_equal_work():
    sides = by_name(Inherited().run(ground("cnn"), 0))
    tuned, e, b = (sides[name] for name in ("fine-tune", "scratch-E", "scratch-B"))
    assert e.epochs == pytest.approx(tuned.epochs)
    assert b.epochs == pytest.approx(e.epochs / e.flops, rel=0.1)
    assert b.epochs * b.flops == pytest.approx(1.0, rel=0.1)  # as much work as an epoch of the dense network
    assert tuned.quality > e.quality
    assert (tuned.before, e.before) == (2.0, 0.0)


def test_a_change_of_task_differs_in_when_alone():
    def other(seed, times):
        return replace(tiny.make_task("mlp", seed=seed + 100), learner=Sgd(0.05 * times))

    early, late = Transfer(other).run(ground("mlp", sparsity=0.75), 0)
    assert (early.name, late.name) == ("prune, then adapt", "adapt, then prune")
    assert early.parameters == late.parameters
    assert early.epochs == late.epochs
    assert late.work > early.work


def test_gates_are_counted_and_the_static_side_has_as_much_work():
    dynamic, static = Dynamic(hidden=2).run(ground("mlp", epochs=4.0), 0)
    assert dynamic.denominator == "multiply-adds without gates"
    assert dynamic.flops > 1 - dynamic.sparsity  # by what the gates take
    assert static.flops == pytest.approx(dynamic.flops, abs=0.08)
    assert dynamic.parameters > 1  # all are there, and the gates
    given = ground("mlp", epochs=4.0)
    shut_all_along = 3 * given.examples * (given.epochs * dynamic.flops + given.before)
    open_all_along = 3 * given.examples * (given.epochs * (dynamic.flops + dynamic.sparsity) + given.before)
    assert shut_all_along < dynamic.work < open_all_along  # gates start open, and training pays for that
    assert static.parameters < 1


def test_gates_dearer_than_what_they_shut_are_refused():
    with pytest.raises(EvidenceError, match="of the dense network's"):
        Dynamic(hidden=200).run(ground("mlp", epochs=0.2), 0)


def test_the_model_of_the_ground_is_left_alone():
    model = tiny.trained("mlp")
    before = {name: p.clone() for name, p in model.named_parameters()}
    densities(model, tiny.make_task("mlp"), {"magnitude": Magnitude()})
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_times_are_taken_when_asked_for():
    given = ground("mlp", repeats=3)
    found = taxonomy.cut_and_tuned(1, "weights", Magnitude(), given, 0)
    assert found.time is not None and found.time > 0
    assert found.flops == pytest.approx(0.5, abs=0.05)


def test_densities_of_layers_at_one_global_sparsity():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    methods = {
        "magnitude": Magnitude(sparsity=0.8, allocation=Global()), "random": Random(sparsity=0.8, allocation=Global()),
    }  # fmt: skip
    found = densities(model, task, methods)
    assert found["magnitude"].keys() == found["random"].keys()
    for each in found.values():
        assert total_left(each, model) == pytest.approx(0.2, abs=1e-3)
    assert found["magnitude"] != found["random"]
