"""Rules: masks that hold to the bit, shadows that come back, ramps that are where they say, learning rates."""

import copy
import itertools

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.allocations import Global, Uniform
from secateur.axes.criteria import Wanda
from secateur.axes.patterns import NM, Blocks, PerMatrix, PerRow
from secateur.axes.rules import (
    Chained,
    Gradual,
    Hold,
    LearningRate,
    Masked,
    Refined,
    Shadow,
    StraightThrough,
    Validate,
    early_stop,
    everything,
    sparsity_of,
)
from secateur.axes.schedules import Jump, Linear, Schedule
from secateur.cut import blocks, weights
from secateur.edit import Mask
from secateur.errors import BudgetError, PatternError, SettingError, SiteError, TaskError
from secateur.site import tensors
from secateur.tasks.labelled import Labelled
from secateur.train import History, Loop, attach, fit

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, 0.01, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
}


def half(sites, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {site.name: torch.rand(site.shape, generator=draw) < 0.5 for site in sites}


def one_layer(weight):
    """A linear layer without bias, whose loss is what the caller makes it."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


# Hold


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_held_weights_are_zero_after_every_step_and_the_optimizer_forgets_them(optimizer):
    model, task = tiny.mlp(), tiny.toy_vectors()
    fit(model, task, 5)
    sites = weights(model)
    keep = half(sites)
    made = OPTIMIZERS[optimizer](model.parameters())
    fit(model, task, 3, optimizer=made)  # the optimizer has momentum for every weight before the mask comes
    assert any(bool(v.any()) for s in made.state.values() for v in s.values() if v.dim() == 2)
    rule = Hold(sites, keep)

    def check(loop):
        for site in sites:
            value = loop.tensors[site.name]
            assert bool((value[~keep[site.name]] == 0).all())
            assert bool((value[keep[site.name]] != 0).all())
            for state in made.state[value].values():
                if state.dim() == 2:
                    assert not bool(state[~keep[site.name]].any())

    fit(model, task, 12, [rule], made, watch=check)


def test_held_weights_get_no_gradient_so_that_its_norm_counts_only_the_others():
    layer = one_layer([[1.0, 2.0, 3.0]])
    site = weights(layer)[0]
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    pruner = attach(optimizer, layer, Hold([site], {"weight": torch.tensor([[True, False, True]])}), 1)
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert layer.weight.grad.tolist() == [[1.0, 0.0, 1.0]]
    assert layer.weight.tolist() == [[0.5, 0.0, 2.5]]
    pruner.finish()


def test_masks_of_edits_are_held_together():
    model = tiny.mlp()
    site = weights(model)[0]
    first, second = half([site])[site.name], half([site], 1)[site.name]
    rule = Hold.of([Mask(site, first), Mask(site, second)])
    assert torch.equal(rule.keep[site.name], first & second)
    assert [mask.kept for mask in rule.masks()] == [int((first & second).sum())]


def test_stacked_experts_and_transposed_layers_are_held():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    gpt = tiny.seeded(lambda: GPT2LMHeadModel(config), 0)
    for model in (tiny.moe(), gpt):
        sites = weights(model)
        keep = half(sites)
        fit(model, tiny.toy_text(), 3, [Hold(sites, keep)])
        for site in sites:
            zero = site.parts[0].read(tensors(model)) == 0
            assert torch.equal(zero, ~keep[site.name]), site.name


@pytest.mark.parametrize("rule", [Hold, Shadow])
def test_masks_that_do_not_fit_are_refused(rule):
    model = tiny.mlp()
    sites = weights(model)
    with pytest.raises(SiteError, match=r"a mask for 2.weight was needed"):
        rule(sites, {"0.weight": torch.ones(32, 16, dtype=torch.bool)})
    with pytest.raises(SiteError, match=r"a mask of \(16, 32\) for 0.weight was given, but its units are \(32, 16\)"):
        rule(sites[:1], {"0.weight": torch.ones(16, 32, dtype=torch.bool)})
    with pytest.raises(SiteError, match="the model has no tensor '0.weight'"):
        fit(nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(16, 4))), tiny.toy_vectors(), 1, [rule(sites)])


def test_tied_weights_cannot_have_two_masks():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    sites = weights(model)
    model[1].weight = model[0].weight
    with pytest.raises(SiteError, match="they are one tensor"):
        Hold(sites).start(Loop(model, torch.optim.SGD(model.parameters(), 0.1), 1))


# Shadow


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_masked_weight_of_a_shadow_keeps_its_last_value_to_the_bit(optimizer):
    model, task = tiny.mlp(), tiny.toy_vectors()
    fit(model, task, 5)
    sites, named = weights(model), tensors(model)
    keep, before = half(sites), {site.name: named[site.name].detach().clone() for site in sites}
    made = OPTIMIZERS[optimizer](model.parameters())
    fit(model, task, 2, optimizer=made)
    before = {site.name: tensors(model)[site.name].detach().clone() for site in sites}
    rule = Shadow(sites, keep)

    def check(loop):
        for site in sites:
            gone = ~keep[site.name]
            assert bool((loop.tensors[site.name][gone] == 0).all())
            dense = rule.values()[site.name]
            assert torch.equal(dense[gone], before[site.name][gone])
            assert not torch.equal(dense[~gone], before[site.name][~gone])

    fit(model, task, 10, [rule], made, watch=check)


def effective_gradient(weight, share, x):
    """dL/dw of L = (x . (w * share))^2 / 2 with respect to w * share, by hand: (x . (w * share)) x."""
    seen = weight * share
    return (x * seen).sum() * x


@pytest.mark.parametrize(
    ("flow", "expected"),
    [
        (Masked(), lambda g, w, s: g * (s != 0)),
        (Chained(), lambda g, w, s: g * s),
        (StraightThrough(), lambda g, w, s: g),
        (Refined(0.1), lambda g, w, s: g + 0.1 * (1 - s) * w),
    ],
)
@pytest.mark.parametrize("share", [[1.0, 0.0, 1.0], [1.0, 0.25, 0.0]])
def test_each_flow_learns_what_its_equation_says(flow, expected, share):
    layer = one_layer([[1.0, -2.0, 3.0]])
    x, w, s = torch.tensor([[1.0, 2.0, 0.5]]), torch.tensor([[1.0, -2.0, 3.0]]), torch.tensor([share])
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    rule = Shadow(weights(layer), {"weight": s}, flow)
    pruner = attach(optimizer, layer, rule, 5)
    assert torch.equal(layer.weight.detach(), w * s)
    (layer(x).pow(2).sum() / 2).backward()
    arrived = layer.weight.grad.clone()
    assert torch.allclose(arrived, effective_gradient(w, s, x))
    optimizer.step()
    step = w - 0.1 * expected(arrived, w, s)
    assert torch.allclose(rule.values()["weight"], step)
    assert torch.allclose(layer.weight.detach(), step * s)
    pruner.finish()
    assert torch.allclose(layer.weight.detach(), step * s)


def test_the_chained_flow_is_what_differentiating_the_product_gives():
    layer, x = one_layer([[1.0, -2.0, 3.0]]), torch.tensor([[1.0, 2.0, 0.5]])
    share = torch.tensor([[1.0, 0.25, 0.0]])
    w = layer.weight.detach().clone().requires_grad_()
    (((x * (w * share)).sum()) ** 2 / 2).backward()
    rule = Shadow(weights(layer), {"weight": share}, Chained())
    pruner = attach(torch.optim.SGD(layer.parameters(), 0.1), layer, rule, 2)
    (layer(x).pow(2).sum() / 2).backward()
    pruner.loop.optimizer.step()
    assert torch.allclose(layer.weight.grad, w.grad)


def test_the_gradient_that_arrives_is_dense_before_the_shadow_masks_it():
    model, task, seen = tiny.mlp(), tiny.toy_vectors(), {}
    sites = weights(model)
    keep = half(sites)

    from secateur.train import Rule

    class Look(Rule):
        def before_step(self, loop):
            seen.update({s.name: loop.tensors[s.name].grad.clone() for s in sites})

    fit(model, task, 1, [Look(), Shadow(sites, keep)])
    assert all(bool((seen[s.name][~keep[s.name]] != 0).any()) for s in sites)


def test_two_sites_on_one_tensor_leave_what_both_leave():
    layer = one_layer([[1.0, 2.0], [3.0, 4.0]])
    rows = blocks(layer, (1, 2))[0]
    from dataclasses import replace

    rows = replace(rows, name="rows")
    columns = replace(blocks(layer, (2, 1))[0], name="columns")
    keep = {"rows": torch.tensor([[True], [False]]), "columns": torch.tensor([[False, True]])}
    for rule in (Hold([rows, columns], keep), Shadow([rows, columns], keep)):
        copied = copy.deepcopy(layer)
        rule.start(Loop(copied, torch.optim.SGD(copied.parameters(), 0.1), 1))
        assert copied.weight.tolist() == [[0.0, 2.0], [0.0, 0.0]]


# Gradual


def count_zeros(model, sites):
    named = tensors(model)
    return {s.name: int((s.gather({p.name: named[p.name].detach().abs() for p in s.parts}) == 0).sum()) for s in sites}


@pytest.mark.parametrize("holder", [Hold, Shadow])
@pytest.mark.parametrize("allocation", [Uniform(), Global(), Global(floor=0.05)])
def test_the_sparsity_asked_is_the_sparsity_that_is_there_at_every_logged_step(holder, allocation):
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    schedule = Schedule(end=0.83, begin=0.1, until=0.7, every=4)
    rule = Gradual(sites, schedule, allocation=allocation, holder=holder(sites))
    units, there = sum(s.units for s in sites), {}

    def count(loop):
        there[loop.step] = count_zeros(model, sites)

    history = fit(model, task, 40, [rule], OPTIMIZERS["momentum"](model.parameters()), watch=count)
    logged = history.curves["sparsity"]
    assert [step for step, _ in logged] == [4, 8, 12, 16, 20, 24, 28]
    for step, value in logged:
        zeros = there[step + 1]  # chosen before that step, counted after it
        asked = schedule.value(step, 40)
        assert value == sum(zeros.values()) / units
        if isinstance(allocation, Uniform):
            assert zeros == {s.name: int(asked * s.units + 1e-9) for s in sites}
        else:
            assert sum(zeros.values()) == int(asked * units + 1e-9)
    assert there[40] == there[29]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_ramp_that_zeroes_is_monotone_and_one_that_holds_values_is_not(optimizer):
    churn = {}
    for holder in (Hold, Shadow):
        model, task = tiny.mlp(), tiny.toy_vectors()
        sites = weights(model)
        rule = Gradual(sites, Schedule(end=0.7, until=0.8, every=2), holder=holder(sites))
        masks, back = [everything(sites)], 0

        def watch(loop, rule=rule, masks=masks):
            masks.append({k: v.clone() for k, v in rule.keep.items()})

        fit(model, task, 60, [rule], OPTIMIZERS[optimizer](model.parameters()), watch=watch)
        for old, new in itertools.pairwise(masks):
            back += sum(int((new[k] & ~old[k]).sum()) for k in new)
        churn[holder] = back
    assert churn[Hold] == 0
    assert churn[Shadow] > 0


def test_a_masked_weight_comes_back_with_its_value_when_the_others_shrink():
    layer = one_layer([[1.0, 2.0, 3.0, 4.0]])
    site = weights(layer)[0]
    rule = Gradual([site], Schedule(start=0.5, end=0.5, until=1, every=1), holder=Shadow([site]))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    pruner = attach(optimizer, layer, rule, 3)
    assert layer.weight.tolist() == [[0, 0, 3, 4]]
    layer.weight.grad = torch.tensor([[5.0, 5.0, 2.5, 0.5]])  # 3 -> 0.5, below the held 1 and 2
    optimizer.step()
    assert layer.weight.tolist() == [[0, 2, 0, 3.5]]
    pruner.finish()


@pytest.mark.filterwarnings("ignore:the schedule ends", "ignore:training stopped")
def test_an_active_weight_that_is_zero_is_not_confused_with_a_masked_one():
    layer = one_layer([[5.0, 6.0, 0.0, 0.0]])
    site = weights(layer)[0]
    rule = Gradual([site], Schedule(start=0.25, end=0.5, until=1.0, every=1, curve=Jump()), holder=Hold([site]))
    optimizer = torch.optim.SGD(layer.parameters(), 1.0)
    pruner = attach(optimizer, layer, rule, 2)
    first = rule.keep["weight"].clone()
    layer.weight.grad = torch.tensor([[6.0, 6.0, 0.0, 0.0]])
    optimizer.step()  # [-1, 0, 0, 0]: the active zeros tie with the masked one
    assert not bool((rule.keep["weight"] & ~first).any())
    assert int(rule.keep["weight"].sum()) == 3
    pruner.finish()


@pytest.mark.parametrize("pattern", [PerMatrix(), PerRow(), NM(1, 4), Blocks(4, 1)])
def test_every_choice_on_the_way_is_legal_for_its_pattern(pattern):
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    rule = Gradual(sites, Schedule(end=0.75, until=0.6, every=3), pattern=pattern)

    def legal(loop):
        for site in sites:
            keep = rule.keep[site.name]
            count = int(keep.sum())
            assert pattern.nearest(site.shape, count) == count
            assert torch.equal(pattern.select(keep.float(), count), keep)

    fit(model, task, 20, [rule], watch=legal)


def test_a_ramp_that_ends_with_training_still_reaches_its_target():
    model = tiny.mlp()
    sites = weights(model)
    rule = Gradual(sites, Schedule(end=0.9, until=1.0, every=7))
    history = fit(model, tiny.toy_vectors(), 20, [rule])
    assert history.curves["sparsity"][-1] == (20, sparsity_of(rule.keep))
    assert count_zeros(model, sites) == {s.name: int(0.9 * s.units + 1e-9) for s in sites}
    assert any("0% is left to recover in" in note for note in history.notes)


def test_training_that_stops_early_says_what_was_reached():
    model = tiny.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = attach(optimizer, model, Gradual(weights(model), Schedule(end=0.9, every=1)), 100)
    with pytest.warns(UserWarning, match="training stopped after 0 of 100 steps, before the schedule's end at 70"):
        history = pruner.finish()
    assert len(history.notes) == 1


def test_a_layer_that_is_emptied_is_named():
    model = tiny.mlp()
    model[2].weight.data *= 1e-6
    history = fit(model, tiny.toy_vectors(), 5, [Gradual(weights(model), Schedule(end=0.9, until=0.0), None, Global())])
    assert any("2.weight keeps nothing from a sparsity of 0.9 on; a floor prevents that" in n for n in history.notes)
    with pytest.raises(BudgetError, match="the floors alone keep"):
        fit(model, tiny.toy_vectors(), 5, [Gradual(weights(model), Schedule(end=0.9), None, Global(floor=0.3))])


def test_ramps_that_cannot_work_are_refused():
    sites = weights(tiny.mlp())
    with pytest.raises(SettingError, match="the fraction removed"):
        Gradual(sites, Schedule(end=1.0))
    with pytest.raises(SettingError, match=r"it needs evidence \(input_square\)"):
        Gradual(sites, Schedule(end=0.5), Wanda())
    with pytest.raises(SiteError, match="there are no sites to prune"):
        Gradual([], Schedule(end=0.5))


# Learning rates and validation


def test_learning_rates_follow_their_curve_from_their_own_starting_values():
    model, task = tiny.mlp(), tiny.toy_vectors()
    optimizer = torch.optim.SGD(
        [{"params": model[0].parameters(), "lr": 0.4}, {"params": model[2].parameters(), "lr": 0.1}]
    )
    seen = []
    rule = LearningRate(Linear(), warmup=0.2, floor=0.1)
    fit(model, task, 10, [rule], optimizer, watch=lambda loop: seen.append([g["lr"] for g in optimizer.param_groups]))
    factors = [1 / 3, 2 / 3, *(0.1 + 0.9 * (1 - u / 8) for u in range(8))]
    assert [a for a, _ in seen] == pytest.approx([0.4 * f for f in factors])
    assert [b for _, b in seen] == pytest.approx([0.1 * f for f in factors])
    first = len(seen)
    fit(model, task, 10, [rule], optimizer, watch=lambda loop: seen.append([g["lr"] for g in optimizer.param_groups]))
    assert seen[first:] == seen[:first]  # a second run does not start from where the first one ended


def test_learning_rates_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match="a warm-up of 1"):
        LearningRate(warmup=1.0)
    with pytest.raises(SettingError, match="a floor of 2"):
        LearningRate(floor=2.0)


def test_validation_is_the_mean_over_examples_and_disturbs_nothing():
    task = tiny.toy_vectors()
    uneven = Labelled(task.name, task.splits, batch=100, learner=task.learner)  # 128 to validate: 100 and 28
    one, two = tiny.mlp(), tiny.mlp()
    history = fit(one, uneven, 7, [Validate(3)])
    fit(two, uneven, 7)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert [step for step, _ in history.curves["validation loss"]] == [3, 6, 7]
    found = uneven.measure(one, "val")
    assert history.curves["validation loss"][-1][1] == pytest.approx(found["loss"], rel=1e-6)
    assert history.curves["validation accuracy"][-1][1] == found["accuracy"]


def test_early_stopping_is_the_first_lowest_raw_value():
    history = History(curves={"validation loss": [(100, 0.5), (200, 0.3), (300, 0.4), (400, 0.3)]})
    assert early_stop(history) == (200, 0.3)
    with pytest.raises(SettingError, match="nothing was logged under it"):
        early_stop(History())


def test_validation_needs_a_task():
    model = tiny.mlp()
    with pytest.raises(TaskError, match="this loop has no task"):
        attach(torch.optim.SGD(model.parameters(), 0.1), model, Validate(), 5)
    with pytest.raises(SettingError, match="validation every 0 steps"):
        Validate(0)


def test_held_weights_stay_zero_under_an_optimizer_that_moves_everything():
    class Restless(torch.optim.SGD):
        def step(self, closure=None):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.add_(1.0)

    model = tiny.mlp()
    sites = weights(model)
    keep = half(sites)
    fit(model, tiny.toy_vectors(), 1, [Hold(sites, keep)], Restless(model.parameters(), 0.1))
    assert all(bool((tensors(model)[s.name][~keep[s.name]] == 0).all()) for s in sites)


def test_what_is_gone_for_good_cannot_be_asked_back():
    model = tiny.mlp()
    sites = weights(model)
    falling = Schedule(start=0.8, end=0.5, until=1.0, every=1, falling=True)
    with pytest.raises(PatternError, match="units were to be kept among those allowed"):
        fit(model, tiny.toy_vectors(), 5, [Gradual(sites, falling, holder=Hold(sites))])
    history = fit(model, tiny.toy_vectors(), 5, [Gradual(sites, falling, holder=Shadow(sites))])
    assert history.curves["sparsity"][-1][1] == 0.5
