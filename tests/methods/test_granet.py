"""Weights that leave and come (papers 15, RigL, SET): updates by hand, exact counts, starts from zero, plasticity."""

import copy
import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import Ecoflap, Erk, Global
from secateur.axes.growth import AtRandom, Cleared, NearestZero, Rewire, Smallest, Steepest, Typical, random_masks
from secateur.axes.rules import Gradual, Hold, LearningRate, everything, sparsity_of
from secateur.axes.schedules import Cosine, Linear, Schedule
from secateur.cut import weights
from secateur.errors import BudgetError, EvidenceError, SettingError, SiteError
from secateur.method import Budget, load, prune
from secateur.methods.granet import GraNet, plasticity
from secateur.methods.random_pruning import RandomPruning
from secateur.methods.rigl import RigL
from secateur.methods.set import SparseEvolution
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.learners import Adam, Sgd
from secateur.train import Snapshot, attach, fit

ALL = [
    GraNet(sparsity=0.9, steps=40, every=5),
    GraNet(sparsity=0.9, start=0.0, steps=40, every=5),
    RigL(sparsity=0.9, steps=40, every=5),
    SparseEvolution(sparsity=0.9, steps=40, every=5),
]


def always(fraction, every=1, until=1.0):
    return Schedule(start=fraction, end=fraction, until=until, curve=Linear(), every=every)


class Slopes:
    """A loss with a given gradient at every step, whatever the weights are: sum(w * slope)."""

    seed, name = 0, "slopes"

    def __init__(self, *slopes, rate=0.1):
        self.slopes, self.rate = [torch.tensor([s]) for s in slopes], rate

    def batches(self, split, n=None, epoch=0):
        return [Batch((s,)) for s in self.slopes]

    def loss(self, model, batch):
        return batch.through(model).sum()

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, self.rate, momentum=0.9)


def line(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def mask(*bits):
    return {"weight": torch.tensor([bits], dtype=torch.bool)}


def test_rigl_worked_by_hand():
    model, task = line(3.0, 1.0, 0.0, 0.0), Slopes([0.1, 0.2, -5.0, 1.0])
    seen = []
    rule = Rewire(weights(model), mask(1, 1, 0, 0), always(0.5, until=0.5), coming=Steepest(), whole=int, instead=True)
    fit(model, task, 2, [rule], watch=lambda loop: seen.append(model.weight.detach().clone()[0].tolist()))
    # step 1: the masks move and the weights do not: 1 goes, and the third comes, with the steepest slope, from zero
    assert seen[0] == [3.0, 0.0, 0.0, 0.0]
    assert rule.keep["weight"].tolist() == [[True, False, True, False]]
    # step 2: both weights take a plain step; momentum starts here
    assert seen[1] == pytest.approx([3.0 - 0.01, 0.0, 0.5, 0.0])


def test_set_worked_by_hand():
    model, task = line(3.0, 0.5, -0.4, -2.0, 0.0, 0.0), Slopes([0.0] * 6)
    rule = Rewire(
        weights(model), mask(1, 1, 1, 1, 0, 0), always(0.5, until=0.5), leaving=NearestZero(), coming=AtRandom()
    )
    fit(model, task, 2, [rule])
    left = rule.keep["weight"][0]
    assert left[0]
    assert left[3]
    assert int(left.sum()) == 4  # the smallest positive and the largest negative went, and two came back somewhere
    drawn = {
        seed: Rewire(weights(model), mask(1, 1, 0, 0, 0, 0), always(0.5, until=0.5), coming=AtRandom(), seed=seed)
        for seed in range(6)
    }
    for one in drawn.values():
        fit(line(3.0, 0.5, 0.0, 0.0, 0.0, 0.0), task, 2, [one])
    assert len({str(one.keep["weight"].tolist()) for one in drawn.values()}) > 1


def test_who_leaves_by_hand():
    (site,) = weights(line(1.0, -0.1, 0.2, -3.0, 0.0, 0.3))
    named, active = tensors(line(1.0, -0.1, 0.2, -3.0, 0.0, 0.3)), mask(1, 1, 1, 1, 0, 1)["weight"]
    assert Smallest().leave(site, named, active, 2).tolist() == [[False, True, True, False, False, False]]
    assert Smallest().leave(site, named, active, 0).sum() == 0
    # three positive, two negative: of three, two and one
    found = NearestZero().leave(site, named, active, 3)
    assert found.tolist() == [[False, True, True, False, False, True]]
    assert NearestZero().leave(site, named, active, 5).tolist() == active.tolist()


def test_a_slope_of_zero_never_brings_what_is_there_already():
    """Fewer gradients than places: an order by |g| alone would pick active weights and lose some."""
    model, task = line(1.0, 2.0, 3.0, 0.0, 0.0, 0.0), Slopes([0.0, 0.0, 9.0, 0.0, 0.0, 0.0], rate=0.0)
    rule = Rewire(weights(model), mask(1, 1, 1, 0, 0, 0), always(0.6, until=0.5))
    fit(model, task, 2, [rule])
    assert int(rule.keep["weight"].sum()) == 3


def test_what_goes_and_comes_back_at_once_keeps_its_value():
    model, task = line(3.0, 1.0, 0.0), Slopes([0.0, 7.0, 0.1], rate=0.0)
    rule = Rewire(weights(model), mask(1, 1, 0), always(0.5, until=0.5))
    fit(model, task, 2, [rule])
    assert model.weight[0].tolist() == [3.0, 1.0, 0.0]
    assert rule.keep["weight"].tolist() == [[True, True, False]]


def test_a_running_mean_of_slopes_remembers():
    last, mean = (
        Rewire(weights(line(3.0, 0.0, 0.0)), mask(1, 0, 0), always(1.0, every=3), coming=Steepest(memory))
        for memory in (0.0, 0.9)
    )
    for rule in (last, mean):
        fit(line(3.0, 0.0, 0.0), Slopes([0.0, 5.0, 0.0], [0.0, 5.0, 0.0], [0.0, 0.0, 1.0], rate=0.0), 4, [rule])
    assert last.keep["weight"].tolist() == [[False, False, True]]
    assert mean.keep["weight"].tolist() == [[False, True, False]]


def test_the_sparsity_of_a_ramp_is_the_cubic_one_worked_by_hand():
    model = tiny.mlp()
    method = GraNet(sparsity=0.75, start=0.5, until=0.8, steps=10, every=2)
    curve = method.run(model, tiny.toy_vectors()).history.curves["sparsity"]
    # s = 0.75 - 0.25 (1 - t / 8)^3 at t = 0, 2, 4, 6, 8
    asked = [0.5, 0.64453125, 0.71875, 0.74609375, 0.75]
    assert curve == list(zip([0, 2, 4, 6, 8], [int(s * 1664) / 1664 for s in asked], strict=True))


def test_the_fraction_exchanged_falls_as_a_cosine():
    ours = GraNet(steps=100, every=10).exchanges()
    assert [ours.value(t, 100) for t in (0, 50, 100)] == pytest.approx([0.5, 0.2525, 0.005])
    theirs = RigL(exchange=0.3, until=0.75, every=10).exchanges()
    # alpha / 2 (1 + cos(pi t / T_end)) at t = 0, T_end / 3, T_end
    assert [theirs.value(t, 100) for t in (0, 25, 75, 90)] == pytest.approx([0.3, 0.225, 0.0, 0.0])


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_the_sparsity_logged_is_there_at_every_step_and_masked_weights_are_zero_everywhere(method):
    model, task = tiny.cnn(), tiny.toy_images()
    sites = weights(model)
    counts = Erk().spread(sites, Budget(getattr(method, "start", method.sparsity)))
    ramp = method.ramp() if isinstance(method, GraNet) else None
    rule = Rewire(
        sites,
        random_masks(sites, counts, 0),
        method.exchanges(),
        ramp=ramp,
        coming=AtRandom() if isinstance(method, SparseEvolution) else Steepest(),
    )
    units = sum(s.units for s in sites)

    def look(loop):
        last = max(t for t in ramp.updates(40) if t <= loop.step) if ramp else 0
        asked = ramp.value(last, 40) if ramp else method.sparsity
        assert sum(int(k.sum()) for k in rule.keep.values()) == units - int(asked * units + 1e-9)
        assert loop.history.curves["sparsity"][-1][1] == pytest.approx(sparsity_of(rule.keep))
        for s in sites:
            gone = ~rule.keep[s.name]
            assert not bool(loop.tensors[s.name][gone].any())
            assert not bool(loop.optimizer.state[loop.tensors[s.name]]["momentum_buffer"][gone].any())
            if ramp is None:  # SET and RigL never change a layer's number
                assert int(rule.keep[s.name].sum()) == counts[s.name]

    before = [{}]

    def fresh(loop):
        look(loop)
        for s in sites:
            if s.name in before[0]:
                came = rule.keep[s.name] & ~before[0][s.name]
                assert not bool(loop.tensors[s.name][came].any())
                assert not bool(loop.optimizer.state[loop.tensors[s.name]]["momentum_buffer"][came].any())
        before[0] = {k: v.clone() for k, v in rule.keep.items()}

    fit(model, task, 40, [rule], Sgd(0.05, decay=5e-4, nesterov=True)(model.parameters()), watch=fresh)
    assert rule.explored > 1 - sparsity_of(rule.keep)


@pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
def test_the_target_is_met_exactly_though_the_interval_does_not_divide_training(method):
    assert load(method.name) is type(method)
    outcome = prune(tiny.cnn(), replace(method, steps=33, every=7), tiny.toy_images())
    units = sum(m.site.units for m in outcome.edits)
    assert sum(m.kept for m in outcome.edits) == units - int(0.9 * units)
    for edit in outcome.edits:
        assert not bool(tensors(outcome.model)[edit.site.name][~edit.keep].any())
    assert any("at some time" in note for note in outcome.notes)


def test_nothing_is_exchanged_after_the_last_step():
    model, task = line(3.0, 1.0, 0.0), Slopes([0.0, 0.0, 7.0])
    rule = Rewire(weights(model), mask(1, 1, 0), always(0.5, every=2))
    fit(model, task, 2, [rule])
    assert rule.keep["weight"].tolist() == [[True, True, False]]


def test_without_exchange_it_is_gradual_magnitude_pruning():
    ours, theirs, task = tiny.cnn(), tiny.cnn(), tiny.toy_images()
    method = GraNet(sparsity=0.8, start=0.0, exchange=0.0, exchange_end=0.0, steps=20, every=4)
    outcome = method.run(ours, task)
    sites = weights(theirs)
    ramp = Gradual(sites, method.ramp(), allocation=Global(), holder=Hold(sites))
    fit(theirs, task, 20, [LearningRate(), ramp])
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(outcome.edits, ramp.masks(), strict=True))


@pytest.mark.parametrize("moments", [Cleared(), Typical()], ids=lambda m: type(m).__name__)
def test_what_adam_is_told_of_a_grown_weight(moments):
    model, task = line(3.0, 2.0, 1.0, 0.0, 0.0), Slopes([1.0, 2.0, 3.0, 9.0, 0.0])
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, amsgrad=True)
    rule = Rewire(weights(model), mask(1, 1, 1, 0, 0), always(0.3, every=2), moments=moments)
    states = []
    look = lambda loop: states.append(copy.deepcopy(optimizer.state[model.weight]))  # noqa: E731
    fit(model, task, 3, [rule], optimizer, watch=look)
    at = states[1]  # after the update at step 2: the third went, the fourth came
    assert rule.keep["weight"].tolist() == [[True, True, False, True, False]]
    assert at["exp_avg"][0, 2:].tolist() == [0.0, 0.0, 0.0]
    for name in ("exp_avg_sq", "max_exp_avg_sq"):
        second = at[name][0]
        wanted = 0.0 if isinstance(moments, Cleared) else float(second[:2].mean())
        assert second[2:].tolist() == pytest.approx([0.0, wanted, 0.0])


def test_a_gradient_that_is_not_a_number_is_named_before_anything_grows():
    class Torn(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, slope):
            return slope * torch.nan

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.fc2(Torn.apply(self.fc1(x)))

    model = tiny.seeded(Net, 0)
    with pytest.raises(EvidenceError, match=r"step 1 of 20[\s\S]*gradient of fc1\.weight holds NaN or infinity"):
        RigL(sparsity=0.5, steps=20, every=1).run(model, tiny.toy_vectors())


def test_a_weight_that_the_optimizer_does_not_have_is_named():
    model = tiny.mlp()
    rule = Rewire(weights(model), everything(weights(model)), always(0.1))
    some = [p for p in model.parameters() if p is not model[2].weight]
    with pytest.raises(SettingError, match=r"2.weight were to leave[\s\S]*does not train it"):
        fit(model, tiny.toy_vectors(), 2, [rule], Sgd(0.1)(some))


def test_one_tensor_cannot_have_two_masks():
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    sites = weights(model)
    model[1].weight = model[0].weight
    with pytest.raises(SiteError, match="one tensor"):
        fit(model, tiny.toy_vectors(), 2, [Rewire(sites, everything(sites), always(0.1))])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: GraNet(sparsity=0.4).check(), "its end is below its start"),
        (lambda: GraNet(sparsity=1.0).check(), "the fraction removed"),
        (lambda: GraNet(exchange=1.5).check(), "a part of what is there"),
        (lambda: GraNet(every=0).check(), "an update every 0 steps"),
        (lambda: GraNet(until=1.2).check(), "training lasts from 0 to 1"),
        (lambda: GraNet(steps=0).check(), "needs training to happen in"),
        (lambda: RigL(until=1.5).check(), "training lasts from 0 to 1"),
        (lambda: RigL(exchange=-0.1).check(), "its end is below its start|a part of what is there"),
        (lambda: RigL(memory=1.0).check(), "a memory of 1"),
        (lambda: RigL(steps=0).check(), "needs one at least"),
        (lambda: SparseEvolution(every=-1).check(), "an update every -1 steps"),
        (lambda: SparseEvolution(sparsity=90).check(), "Did you mean 0.9"),
        (lambda: SparseEvolution(allocation=Global()).check(), "Global was asked for[\\s\\S]*a random choice has none"),
        (lambda: RigL(allocation=Ecoflap()).check(), "Ecoflap was asked for"),
        (lambda: GraNet(allocation=Global()).check(), "by-name"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_too_few_weights_for_every_layer_to_have_one_are_refused():
    with pytest.raises(BudgetError, match="nothing would be left of"):
        RigL(sparsity=0.999, steps=2).run(tiny.mlp(), tiny.toy_vectors())


def rewired(model):
    sites = weights(model)
    keep = random_masks(sites, Erk().spread(sites, Budget(0.5)), 0)
    exchange = Schedule(start=0.4, end=0.1, until=1.0, curve=Cosine(), every=3, falling=True)
    ramp = Schedule(start=0.5, end=0.8, until=0.6, every=3)
    return Rewire(sites, keep, exchange, ramp=ramp, coming=Steepest(0.5))


def test_a_run_taken_up_again_ends_where_it_would_have():
    task, whole, cut, held = tiny.toy_vectors(), tiny.mlp(), tiny.mlp(), []
    straight = rewired(whole)
    fit(whole, task, 20, [straight])
    fit(cut, task, 20, [rewired(cut)], watch=lambda loop: loop.step == 8 and held.append(Snapshot.of(cut, loop)))
    again, rule = tiny.mlp(), rewired(tiny.mlp())
    fit(again, task, 20, [rule], resume_from=held[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert (rule.explored, rule.spent) == (straight.explored, straight.spent)


def test_it_works_in_a_loop_of_ones_own_clipped_and_all():
    model, task = tiny.mlp(), tiny.toy_vectors()
    optimizer = Adam(5e-3)(model.parameters())
    rule = rewired(model)
    pruner = attach(optimizer, model, rule, steps=20)
    for _, batch in zip(range(20), itertools.cycle(task.batches("train")), strict=False):
        optimizer.zero_grad()
        task.loss(model, batch).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    history = pruner.finish()
    assert history.curves["sparsity"][-1][1] == pytest.approx(0.8, abs=1e-3)
    for s in weights(model):
        assert not bool(tensors(model)[s.name][~rule.keep[s.name]].any())


def test_plasticity_cuts_regrows_and_leaves_the_model_alone():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    at_once = plasticity(model, task, 0.9, 0)
    recovered = plasticity(model, task, 0.9, 60)
    regrown = plasticity(model, task, 0.9, 60, regrow=0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert at_once.before == recovered.before == task.measure(model)["accuracy"]
    assert recovered.gain > at_once.gain + 0.05
    assert recovered.kept == pytest.approx(0.1, abs=0.002)
    assert regrown.kept == pytest.approx(0.55, abs=0.002)
    with pytest.raises(SettingError, match="a regrowth of 2"):
        plasticity(model, task, 0.9, 0, regrow=2.0)


def test_gradual_with_regrowth_beats_a_mask_that_never_moves():
    """The paper's order at toy size: digits, an MLP with 3 % of its weights, the same steps."""
    from secateur.tasks.images import digits

    found, task = {}, digits(flat=True, seed=0, learner=Adam(5e-3), batch=64)
    for method in (RandomPruning(sparsity=0.97, steps=200), GraNet(sparsity=0.97, steps=200, every=10)):
        model = tiny.seeded(
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), 0
        )
        method.run(model, task)
        found[method.name] = task.measure(model, "test")["accuracy"]
    assert found["granet"] > found["random_pruning"] + 0.05, found


def test_weights_put_back_without_masks_get_those_the_rule_began_with():
    task, early = tiny.toy_vectors(), []
    model, other = tiny.mlp(), tiny.mlp()
    fit(model, task, 5, watch=lambda loop: loop.step == 3 and early.append(Snapshot.of(model, loop).weights_only()))
    sites = weights(other)
    keep = random_masks(sites, Erk().spread(sites, Budget(0.5)), 0)
    fit(other, task, 5, [Rewire(sites, keep, always(0.0))], resume_from=early[0])
    assert all(not bool(tensors(other)[s.name][~keep[s.name]].any()) for s in sites)


def test_from_the_command_line_to_stock_transformers(tmp_path):
    """A decoder made sparse in training is saved, and transformers loads it with every zero in place."""
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    from secateur.cli import main

    out = tmp_path / "sparse"
    line = ["prune", "tiny:decoder", "granet", "--task", "tiny:toy_text", "--sparsity", "0.8", "--steps", "12"]
    line += ["--every", "3", "--coming", "steepest(memory=0.5)", "--allocation", "er", "--out", str(out)]
    found = CliRunner().invoke(main, line)
    assert found.exit_code == 0, found.output
    model = AutoModelForCausalLM.from_pretrained(out)
    sites = weights(model)
    units = sum(s.units for s in sites)
    zeros = sum(int((tensors(model)[s.name] == 0).sum()) for s in sites)
    assert zeros >= int(0.8 * units)
