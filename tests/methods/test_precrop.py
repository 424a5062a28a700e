"""Densities in closed form, widths within the budgets, and narrow networks that do as well as masks."""

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from secateur.axes import Erk, SynExp
from secateur.axes.densities import Costs, Limit, best_densities, whole_widths
from secateur.axes.donors import Donor
from secateur.axes.probes import Snip
from secateur.cut import weights
from secateur.edit import Remove
from secateur.errors import BudgetError, ModelError, SettingError
from secateur.graph import couple
from secateur.method import Budget, prune
from secateur.methods.precrop import Branches, Nearest, PreCrop, Programme, Roots
from secateur.methods.random_pruning import RandomPruning
from secateur.models.loading import structure_
from secateur.outcome import count_flops


def chain(*widths, seed=0):
    """3x3 convolutions with batch norms, pooling and a classifier."""

    def make():
        layers = []
        for into, out in zip((3, *widths), widths, strict=False):
            layers += [nn.Conv2d(into, out, 3, padding=1, bias=False), nn.BatchNorm2d(out), nn.ReLU()]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 4))

    return tiny.seeded(make, seed)


def costs_of(model):
    return Costs.of(model, couple(model, tiny.make_task("cnn").example).need("channel"))


def apart(weights_, work):
    """Layers that share no channels, so that widths are densities."""
    n = len(weights_)
    per = np.stack([np.eye(n), np.zeros((n, n))], 1) / 1e9
    fixed = np.stack([np.zeros(n), np.ones(n)], 1)
    return Costs(np.full(n, 1e9), fixed, per, weights_, work, tuple("abcdefgh"[:n]), np.arange(n))


def test_every_layer_that_is_not_full_keeps_as_many_weights_by_hand():
    # 10 + c + c = 50 gives c = 20: the first layer is full
    found = best_densities(np.array([10.0, 40.0, 50.0]), np.ones(3), 50.0, np.inf)
    assert found == pytest.approx([1.0, 0.5, 0.4])
    model = nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 20), nn.Linear(20, 5), nn.Linear(10, 10))
    keep = SynExp().spread(weights(model), Budget(1 - 170 / 250))
    assert list(keep.values()) == [10, 40, 60, 60]  # 10 + 40 + 2 * 60 of 10, 40, 100, 100


def test_without_a_budget_that_binds_all_is_kept():
    assert best_densities(np.array([3.0, 4.0]), np.ones(2), 7.0, 2.0).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("shares", [(0.4, None), (None, 0.3), (0.4, 0.35)])
def test_the_closed_form_is_what_a_numeric_solver_finds(shares):
    draw = np.random.default_rng(0)
    weights_, work = draw.uniform(1, 50, 6), draw.uniform(1, 50, 6)
    most = [np.inf if share is None else share * of.sum() for share, of in zip(shares, (weights_, work), strict=True)]
    limits = [Limit(of, m, "x") for of, m in zip((weights_, work), most, strict=True) if m < np.inf]
    closed = best_densities(weights_, work, *most)
    assert Programme().choose(apart(weights_, work), limits, closed) / 1e9 == pytest.approx(closed, abs=1e-6)
    assert weights_ @ closed <= most[0] * (1 + 1e-9)
    assert work @ closed <= most[1] * (1 + 1e-9)


def test_a_density_is_the_product_of_two_widths():
    # 8 -> 8 -> 8 -> 8: a density of a quarter in the inner layers is half of the channels, not a quarter of them
    costs = costs_of(chain(8, 8, 8))
    wanted = np.array([0.5, 0.25, 0.25, 0.5])
    loose = [Limit(costs.weights, 1e9, "parameters")]
    assert Nearest().choose(costs, loose, wanted) == pytest.approx([4, 4, 4], abs=1e-3)
    assert costs.densities(np.array([4.0, 4.0, 4.0])) == pytest.approx(wanted)
    # roots: between densities of 1/4 and 1 a group keeps sqrt(1/2 * 1) of its channels, before it is scaled
    tight = [Limit(costs.weights, costs.total(np.array([5.0, 4.0, 4.0]), costs.weights), "parameters")]
    found = Roots().choose(costs, tight, wanted)
    assert found[0] / found[1] == pytest.approx((0.5 * 0.25) ** 0.25 / (0.25 * 0.25) ** 0.25, rel=1e-6)


def test_costs_are_those_of_the_network_that_is_built():
    model, task = tiny.cnn(), tiny.make_task("cnn")
    coupling = couple(model, task.example)
    costs = Costs.of(model, coupling.need("channel"))
    beside = model.fc.bias.numel()  # of 4 classes: no channel owns it
    assert costs.total(costs.full, costs.weights) + beside == sum(p.numel() for p in model.parameters())
    assert 2 * costs.total(costs.full, costs.work) == count_flops(model, task.example) / task.example.size
    done = prune(model, PreCrop(sparsity=0.6, steps=0), task)
    widths = np.array([e.keep.sum() if isinstance(e, Remove) else e.kept for e in by_site(done, coupling.sites)])
    assert costs.total(widths, costs.weights) + beside == sum(p.numel() for p in done.model.parameters())
    assert 2 * costs.total(widths, costs.work) == count_flops(done.model, task.example) / task.example.size


def by_site(done, sites):
    return [next(e for e in done.edits if e.site.name == site.name) for site in sites]


@pytest.mark.parametrize("widths", [Programme(), Nearest(), Roots()])
@pytest.mark.parametrize(("sparsity", "flops"), [(0.3, 0.0), (0.0, 0.7), (0.6, 0.8)])
def test_every_network_is_within_its_budgets_and_no_wider_than_it_was(widths, sparsity, flops):
    task = tiny.make_task("cnn")
    costs = costs_of(chain(6, 12, 24))
    limits = PreCrop(sparsity=sparsity, flops=flops).limits(costs)
    wanted, _ = PreCrop(sparsity=sparsity, flops=flops).wanted(chain(6, 12, 24), task, costs)
    real = widths.choose(costs, limits, wanted)
    found = whole_widths(costs, limits, real, np.ones(3))
    assert (found >= 1).all()
    assert (found <= costs.full).all()
    for limit in limits:
        assert costs.total(found, limit.of) <= limit.most
    fuller = [found + np.eye(3)[i] for i in range(3) if found[i] < costs.full[i]]
    assert all(any(costs.total(more, lim.of) > lim.most for lim in limits) for more in fuller)  # no channel more fits


def test_the_programme_is_the_best_of_all_widths_there_are():
    costs = costs_of(chain(5, 6, 7))
    limits = [Limit(costs.weights, 0.45 * costs.total(costs.full, costs.weights), "parameters")]
    every = [np.array([a, b, c], float) for a in range(1, 6) for b in range(1, 7) for c in range(1, 8)]
    allowed = [w for w in every if costs.total(w, costs.weights) <= limits[0].most]
    best = max(np.log(costs.densities(w)).sum() for w in allowed)
    real = Programme().choose(costs, limits, np.ones(4))
    assert np.log(costs.densities(real)).sum() >= best  # whole numbers can be no better
    found = whole_widths(costs, limits, real, np.ones(3))
    assert np.log(costs.densities(found)).sum() == pytest.approx(best, abs=0.25)


def test_weights_do_not_change_the_widths_of_synexp_and_do_those_of_snip():
    task = tiny.make_task("cnn")

    def widths(seed, **settings):
        done = PreCrop(steps=0, **settings).run(tiny.cnn(seed), task)
        return next(note for note in done.notes if note.startswith("widths"))

    assert widths(0) == widths(1)
    snip = {"sparsity": 0.8, "densities": Donor(Snip(64)), "widths": Nearest()}
    assert widths(0, **snip) != widths(0, sparsity=0.8)


def test_widths_are_multiples_where_asked_and_shortcuts_stay_where_asked():
    done = PreCrop(steps=0, sparsity=0.5, scope=Branches(), round_to=4).run(tiny.cnn(), tiny.make_task("cnn"))
    whole = sum(p.numel() for p in tiny.cnn().parameters())
    left = sum(p.numel() for p in done.model.parameters())
    assert f"with what no width decides about, {left:,} of {whole:,} parameters are left" in done.notes
    model = done.model
    assert model.conv.out_channels == 8
    assert model.block2.conv2.out_channels == 16
    assert model.block1.conv1.out_channels % 4 == 0
    assert model.block2.conv1.out_channels in (4, 8)


def test_new_weights_are_drawn_for_the_narrow_network_and_no_statistics_are_kept():
    task = tiny.make_task("cnn")
    done = PreCrop(steps=0).run(tiny.trained("cnn"), task)
    assert bool((done.model.bn.running_mean == 0).all())
    bound = (done.model.block2.conv2.in_channels * 9) ** -0.5  # of the module's own uniform distribution
    size = done.model.block2.conv2.weight.abs().max()
    assert 0.8 * bound < size <= bound


def test_budgets_below_the_narrowest_network_are_refused_with_the_least_there_is():
    with pytest.raises(BudgetError) as caught:
        PreCrop(sparsity=0.999, steps=0).run(tiny.cnn(), tiny.make_task("cnn"))
    assert str(caught.value) == (
        "7 of 7,336 parameters were to be left, but the narrowest network there is, with the least channels "
        "everywhere, has 88.\nAsk for a sparsity of at most 0.988."
    )


def test_what_cannot_be_asked_for_is_refused():
    with pytest.raises(SettingError, match="the programme finds widths without looking at densities"):
        PreCrop(densities=Erk()).check()
    with pytest.raises(SettingError, match="flops 1.5 was asked for"):
        PreCrop(flops=1.5).check()
    with pytest.raises(ModelError, match="is neither a convolution nor a linear layer nor a norm"):
        PreCrop().run(tiny.rnn(), tiny.make_task("rnn"))


def test_both_costs_are_reported_whichever_was_limited():
    done = prune(tiny.cnn(), PreCrop(sparsity=0.0, flops=0.5, steps=0), tiny.make_task("cnn"))
    parameters, work = done.notes[:2]
    assert parameters.endswith("of 7,336 parameters are left")
    left, whole = (int(word.replace(",", "")) for word in (work.split()[0], work.split()[2]))
    assert left <= whole / 2
    assert done.ledger.after.flops <= done.ledger.before.flops / 2


def test_preconfig_makes_layers_wider_and_narrower_at_the_same_cost(tmp_path):
    task, model = tiny.make_task("cnn"), chain(4, 24, 4)
    before = costs_of(model)
    # two layers of 4 and 24: with a wide middle, more is gained at the ends than lost in it
    done = prune(model, PreCrop(sparsity=0.0, widest=3.0, steps=2), task)
    widths = [done.model[place].weight.shape[0] for place in (0, 3, 6)]
    assert widths[0] > 4
    assert widths[1] < 24
    assert max(np.array(widths) / [4, 24, 4]) <= 3
    assert done.ledger.after.parameters <= done.ledger.before.parameters
    assert done.ledger.after.flops <= done.ledger.before.flops
    gained = np.log(before.densities(np.array(widths, dtype=float))).sum()
    assert gained > 0.5  # of the logarithm of the synaptic flow
    plain = tiny.seeded(lambda: chain(4, 24, 4), 0)
    structure_(plain, done.edits)  # as a saved result is built again
    plain.load_state_dict(done.model.state_dict())
    x = task.example.inputs[0]
    assert torch.equal(plain.eval()(x), done.model.eval()(x))
    assert PreCrop(sparsity=0.0, widest=2.0).budget() is None
    with pytest.raises(SettingError, match="widest=2 with widths by Nearest was given"):
        PreCrop(widest=2.0, widths=Nearest()).check()
    flat = tiny.seeded(lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 36, 2)), 0)
    with pytest.raises(ModelError, match=r"2.weight has 144 entries for its 4 channels"):
        PreCrop(sparsity=0.0, widest=2.0).run(flat, task)


def test_the_narrow_network_does_as_well_as_masks_of_the_same_densities():
    task, lost = tiny.make_task("cnn"), []
    for seed in range(2):
        narrow = prune(tiny.cnn(seed), PreCrop(sparsity=0.5, widths=Nearest(), steps=150), task)
        masked = prune(tiny.cnn(seed), RandomPruning(sparsity=0.5, allocation=SynExp(), steps=150), task)
        assert narrow.ledger.after.memory_bytes < 0.6 * masked.ledger.after.memory_bytes
        lost.append(*(task.measure(m.model)["loss"] - task.measure(n.model)["loss"] for m, n in [(masked, narrow)]))
    assert torch.tensor(lost).mean() > -0.1
