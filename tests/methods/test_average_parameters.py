"""Pruning while pre-training (paper 08): the plan, the accountant, the schedule, the law and its twins."""

import itertools
import math

import pytest
import tiny
import torch

from secateur.axes import Global
from secateur.axes.rules import Gradual, Hold
from secateur.cut import weights
from secateur.errors import BudgetError, EvidenceError, SettingError
from secateur.method import load, prune
from secateur.methods.average_parameters import Accountant, AverageParameters, Window, window
from secateur.site import tensors, total_units
from secateur.studies.scaling_law import Law, Run, fit_law, interval, pair, relative_error, twin
from secateur.train import Rule, Snapshot, attach, fit

RELEASED = {0.2: (2500, 8100, 11200), 0.4: (2500, 8875, 13050), 0.6: (2500, 10100, 16375), 0.8: (2500, 12600, 25050)}
"""Start, end and steps of the published 1B models, whose cards give average densities of 0.8919, 0.7651 and 0.3984."""


# The plan


@pytest.mark.parametrize("sparsity", sorted(RELEASED))
def test_the_plan_is_that_of_the_released_models(sparsity):
    found = window(10_000, sparsity)
    assert (found.start, found.end, found.steps) == pytest.approx(RELEASED[sparsity], rel=0.005)


@pytest.mark.parametrize(("sparsity", "stated"), [(0.2, 0.8919), (0.4, 0.7651), (0.8, 0.3984)])
def test_the_average_density_is_that_of_the_released_models_and_no_cubic_ramps(sparsity, stated):
    start, end, steps = RELEASED[sparsity]
    assert Window(start, end, steps, 25, sparsity).average == pytest.approx(stated, rel=0.003)
    cubic = sum(1 - sparsity * (1 - (1 - min(max(t - start, 0) / (end - start), 1)) ** 3) for t in range(steps)) / steps
    assert cubic < 0.98 * stated


def test_densities_by_hand():
    # four events at 4, 6, 8, 10; each leaves a fourth root of a sixteenth, that is a half
    plan = Window(start=4, end=10, steps=16, every=2, sparsity=15 / 16)
    halves = [1.0] * 4 + [1 / 2] * 2 + [1 / 4] * 2 + [1 / 8] * 2 + [1 / 16] * 6
    assert [plan.density(step) for step in range(16)] == pytest.approx(halves)
    assert plan.events == 4
    assert plan.compute == pytest.approx(4 + 1 + 0.5 + 0.25 + 0.375)
    assert plan.average == pytest.approx(6.125 / 16)


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.8, 0.95])
@pytest.mark.parametrize(("begin", "until"), [(0.25, 0.75), (0.0, 0.5), (0.5, 1.0), (0.0, 0.0), (0.5, 0.5)])
def test_every_window_spends_the_same_compute_and_its_share_of_it(sparsity, begin, until):
    plan = window(4000, sparsity, begin, until, every=10)
    assert plan.compute == pytest.approx(4000, rel=0.02 if until == 1 else 1e-3)
    if begin < until:
        before = sum(plan.density(step) for step in range(plan.start))
        by_then = sum(plan.density(step) for step in range(plan.end))
        assert before / plan.compute == pytest.approx(begin, abs=0.01)
        assert by_then / plan.compute == pytest.approx(until, abs=0.03)  # an interval's steps see the event before it
        assert (plan.end - plan.start) % 10 == 0


@pytest.mark.parametrize("begin", [0.0, 0.25])
def test_the_schedule_of_the_ramp_is_the_plan_at_every_step(begin):
    plan = window(300, 0.8, begin, 0.75, every=7)  # 7 divides neither the start nor the budget
    schedule, held = plan.schedule(), 0.0
    for step in range(plan.steps):
        if schedule.due(step, plan.steps):
            held = schedule.value(step, plan.steps)
        assert 1 - held == pytest.approx(plan.density(step)), step
    events = [step for step in schedule.updates(plan.steps) if schedule.value(step, plan.steps) > 0]
    assert events == list(range(plan.start, plan.end + 1, 7))


@pytest.mark.parametrize(
    ("error", "settings", "text"),
    [
        (SettingError, {"begin": 0.8, "until": 0.2}, "not above the second"),
        (SettingError, {"until": 1.5}, "fractions"),
        (SettingError, {"every": 0}, "whole"),
        (SettingError, {"sparsity": 1.0}, r"in \[0, 1\)"),
        (BudgetError, {"budget_steps": 20, "every": 100}, "no room for two events"),
        (SettingError, {"norm": 0}, "above 0"),
        (SettingError, {"warmup": 2.0}, "warm-up"),
    ],
)
def test_windows_that_cannot_be_are_refused_before_any_data_is_read(error, settings, text):
    with pytest.raises(error, match=text):
        AverageParameters(**settings).check()


# The run


class Zeros(Rule):
    """Which weights are zero at each step, and the gradients and moments of those that are."""

    def __init__(self, sites):
        self.sites, self.seen, self.stray = sites, [], 0.0

    def before_step(self, loop):
        for site in self.sites:
            value = tensors(loop.model)[site.name]
            self.stray += float(value.grad[value == 0].abs().sum())

    def after_step(self, loop):
        self.seen.append({site.name: tensors(loop.model)[site.name].detach() == 0 for site in self.sites})


def test_weights_go_as_planned_over_all_layers_together_and_never_come_back():
    model, task = tiny.decoder(), tiny.toy_text()
    method = AverageParameters(sparsity=0.75, budget_steps=40, every=3)
    plan, sites = method.window(), weights(model)
    ramp = Gradual(sites, plan.schedule(), allocation=Global(), holder=Hold(sites))
    zeros, count = Zeros(sites), Accountant(sites, ramp)
    fit(model, task, plan.steps, [ramp, zeros, count])
    units, spent = total_units(sites), 0
    for step, seen in enumerate(zeros.seen):
        gone = sum(int(mask.sum()) for mask in seen.values())
        assert gone == int((1 - plan.density(step)) * units + 1e-6), step
        spent += units - gone
    for before, after in itertools.pairwise(zeros.seen):
        assert all(bool((after[name] | ~before[name]).all()) for name in before)
    assert count.average == spent / plan.steps
    assert count.average / units == pytest.approx(plan.average, abs=1e-4)
    assert zeros.stray == 0
    shares = {round(float(seen.float().mean()), 3) for seen in zeros.seen[-1].values()}
    assert len(shares) > 1  # one threshold over all, not the same share of each


def test_the_method_says_what_it_had_on_average_and_what_is_left():
    assert load("average_parameters") is AverageParameters
    model, task = tiny.decoder(), tiny.toy_text()
    outcome = prune(model, AverageParameters(sparsity=0.6, budget_steps=30, every=3), task)
    units = total_units(weights(model))
    assert outcome.ledger.units_removed == int(0.6 * units)
    plan = AverageParameters(sparsity=0.6, budget_steps=30, every=3).window()
    assert len(outcome.history.losses) == plan.steps > 30
    (_, average), *_ = outcome.history.curves["average parameters"]
    assert average / units == pytest.approx(plan.average, abs=1e-4)
    assert f"{average:,.0f} weights on average" in outcome.notes[1]
    assert not any("head" in site.name or "embed" in site.name for site in weights(model))


def test_a_sparsity_of_nothing_is_dense_training_and_the_accountant_counts_all():
    outcome = prune(tiny.mlp(), AverageParameters(sparsity=0.0, budget_steps=20, every=2), tiny.toy_vectors())
    assert len(outcome.history.losses) == 20
    assert outcome.history.curves["average parameters"] == [(20, 1664.0)]
    assert outcome.ledger.units_removed == 0


def test_a_run_taken_up_again_in_the_middle_of_the_window_is_the_one_that_was_not_interrupted():
    def rules(model):
        sites = weights(model)
        ramp = Gradual(sites, window(20, 0.75, every=2).schedule(), allocation=Global(), holder=Hold(sites))
        return [ramp, Accountant(sites, ramp)]

    steps, task, kept = window(20, 0.75, every=2).steps, tiny.toy_vectors(), []
    whole, part = tiny.mlp(), tiny.mlp()
    first = rules(whole)
    fit(
        whole,
        task,
        steps,
        first,
        watch=lambda loop: kept.append(Snapshot.of(loop.model, loop)) if loop.step == 9 else 0,
    )
    second = rules(part)
    fit(part, task, steps, second, resume_from=kept[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), part.parameters(), strict=True))
    assert first[1].average == second[1].average


def test_the_accountant_counts_in_a_loop_of_the_users_own():
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites, plan = weights(model), window(12, 0.5, every=2)
    ramp = Gradual(sites, plan.schedule(), allocation=Global(), holder=Hold(sites))
    count = Accountant(sites, ramp)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, weight_decay=0.1)
    pruner = attach(optimizer, model, [ramp, count], plan.steps)
    batch = next(iter(task.batches("train")))
    for _ in range(plan.steps):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        optimizer.step()
    pruner.finish()
    assert count.steps == plan.steps
    assert count.average / 1664 == pytest.approx(plan.average, abs=2e-3)
    assert count.active == 832


# The law


TRUE = Law(A=40.0, alpha=0.4, B=300.0, beta=0.5, E=1.5)


def made(sizes=(1e4, 3e4, 1e5, 3e5), lengths=(1e5, 4e5, 2e6), noise=0.0):
    draw = torch.Generator().manual_seed(0)
    return [
        Run(n, d, TRUE.loss(n, d) * math.exp(noise * float(torch.randn((), generator=draw))))
        for n in sizes
        for d in lengths
    ]


def test_a_law_is_found_again_from_runs_that_follow_it():
    pytest.importorskip("scipy")
    law = fit_law(made())
    assert [law.alpha, law.beta, law.E] == pytest.approx([0.4, 0.5, 1.5], rel=0.02)
    assert law.residual < 1e-4
    assert relative_error(law, made(sizes=(1e6,), lengths=(1e7,))) < 2e-3


def test_one_bad_run_does_not_move_the_law():
    pytest.importorskip("scipy")
    runs = made()
    runs[5] = Run(runs[5].parameters, runs[5].tokens, 1.5 * runs[5].loss)
    assert fit_law(runs).alpha == pytest.approx(0.4, rel=0.1)


def test_the_interval_holds_the_truth_and_is_wider_where_runs_are_noisier():
    pytest.importorskip("scipy")
    still, noisy = (interval(made(noise=noise), {"B": 300.0, "beta": 0.5}, draws=12) for noise in (1e-4, 3e-2))
    assert noisy["alpha"][0] <= 0.4 <= noisy["alpha"][1]
    assert noisy["alpha"][1] - noisy["alpha"][0] > still["alpha"][1] - still["alpha"][0]
    assert still["beta"] == (0.5, 0.5)


def test_too_few_runs_or_one_length_are_refused_unless_what_cannot_be_told_is_fixed():
    pytest.importorskip("scipy")
    with pytest.raises(EvidenceError, match="takes 6 runs"):
        fit_law(made(sizes=(1e4, 1e5), lengths=(1e5, 1e6)))
    one = made(sizes=(1e4, 2e4, 4e4, 8e4, 2e5, 4e5), lengths=(1e6,))
    with pytest.raises(EvidenceError, match="one length"):
        fit_law(one)
    law = fit_law(one, fixed={"B": 0.0, "beta": 1.0})
    assert law.B == 0.0
    flat = law.loss(1e12, 1e6)
    assert flat == pytest.approx(1.5 + 300 / 1e6**0.5, rel=0.02)
    with pytest.raises(EvidenceError, match="finite loss"):
        fit_law([*made(), Run(1e5, 1e6, math.nan)])
    with pytest.raises(SettingError, match="Did you mean alpha"):
        fit_law(made(), fixed={"alpa": 0.5})


def test_a_twin_is_the_dense_network_nearest_in_prunable_weights():
    def make(width):
        return tiny.decoder(hidden_size=width, intermediate_size=2 * width)

    size, count = twin(make, (16, 32, 48), 15_000)
    assert size == 32
    assert count == total_units(weights(make(32)))
    with pytest.raises(SettingError, match="no sizes"):
        twin(make, (), 15_000)


def test_a_pair_has_equal_tokens_and_nearly_equal_parameters_and_so_equal_compute():
    def make(size):
        width, inner = size
        return tiny.decoder(hidden_size=width, intermediate_size=inner)

    plan = window(1000, 0.8, every=10)
    found = pair(make, (32, 64), [(w, i) for w in (16, 24, 32) for i in range(24, 65, 4)], plan)
    whole = total_units(weights(make((32, 64))))
    assert found.average == pytest.approx(plan.average * whole)
    assert found.mismatch < 0.03
    dense, sparse = found.parameters * plan.steps, sum(plan.density(t) * whole for t in range(plan.steps))
    assert dense == pytest.approx(sparse, rel=0.03)
    assert 0.2 * whole < 0.6 * found.parameters  # in the end the sparse one is much the smaller
