"""Random pruning (paper 02): shares by rules of the shapes, exact counts, donors of shares, masks that never move."""

import itertools

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import ByName, Er, Erk, ErkPlus, Global, Uniform, UniformPlus, kept_of, part_of, text_of, words
from secateur.axes.allocations import gaps, inhabited
from secateur.axes.donors import Donor
from secateur.axes.growth import random_masks
from secateur.axes.probes import Grasp, Snip, Synflow, masks_by
from secateur.axes.rules import LearningRate
from secateur.cut import weights
from secateur.errors import BudgetError, SettingError
from secateur.method import Budget, load, prune
from secateur.methods import random_pruning
from secateur.methods.random_pruning import RandomPruning
from secateur.site import Part, Site, tensors
from secateur.tasks.learners import Adam, Sgd
from secateur.train import fit


def site(name: str, *shape: int) -> Site:
    return Site(name, "weight", shape, (Part(name, shape),))


# 216, 1,152 and 160 weights: 1,528
SITES = [site("conv1", 8, 3, 3, 3), site("conv2", 16, 8, 3, 3), site("fc", 10, 16)]


def network(*widths, seed=0):
    def make():
        layers = []
        for a, b in itertools.pairwise(widths):
            layers += [nn.Linear(a, b), nn.ReLU()]
        return nn.Sequential(*layers[:-1])

    return tiny.seeded(make, seed)


def test_uniform_plus_by_hand():
    # keeps 1,528 - 1,069 = 459; less 216 of conv1, 243 for 1,312: 213.4 and 29.6
    assert UniformPlus().spread(SITES, Budget(0.7)) == {"conv1": 216, "conv2": 213, "fc": 30}
    # keeps 276; less 216 and a fifth of 160, 28
    assert UniformPlus().spread(SITES, Budget(0.82)) == {"conv1": 216, "conv2": 28, "fc": 32}
    # where there is no kernel nothing stays dense
    flat = [site("a", 10, 10), site("b", 10, 10)]
    assert UniformPlus().spread(flat, Budget(0.5)) == {"a": 50, "b": 50}


def test_uniform_plus_refuses_what_its_ends_alone_exceed():
    with pytest.raises(BudgetError, match=r"conv1, fc keep 248 of 1,528 weights[\s\S]*to 0.8377"):
        UniformPlus().spread(SITES, Budget(0.9))


def test_er_and_erk_by_hand():
    two = [site("wide", 10, 10, 3, 3), site("narrow", 5, 5, 3, 3)]  # 900 and 225
    # ER: 20/100 and 10/25 -> weights 180 : 90; keeps 113 of 1,125
    assert Er().spread(two, Budget(0.9)) == {"wide": 75, "narrow": 38}
    # ERK: 26/900 and 16/225 -> 26 : 16
    assert Erk().spread(two, Budget(0.9)) == {"wide": 70, "narrow": 43}
    assert Erk(power=0.0).spread(two, Budget(0.9)) == {"wide": 90, "narrow": 23}


def test_erk_plus_gives_the_classifier_its_own_share():
    found = ErkPlus().spread(SITES, Budget(0.8))
    assert found["fc"] == 160
    assert sum(found.values()) == kept_of(1528, 0.8)
    alone = Erk().spread(SITES[:2], Budget(1 - (kept_of(1528, 0.8) - 160) / 1368))
    assert {k: found[k] for k in alone} == alone
    assert ErkPlus(classifier=0.9).spread(SITES, Budget(0.8))["fc"] == 16
    with pytest.raises(BudgetError, match="fc keep 160"):
        ErkPlus().spread(SITES, Budget(0.95))


def test_the_last_matrix_of_a_stack_of_blocks_is_no_classifier():
    """Of a language model the sites are those in its blocks: the last projection is like that of the block before."""
    sites = weights(tiny.make_model("decoder"))
    for rule, plain in ((ErkPlus(), Erk()), (UniformPlus(), Uniform())):
        found, same = rule.spread(sites, Budget(0.9)), plain.spread(sites, Budget(0.9))
        assert all(abs(found[site.name] - same[site.name]) <= 1 for site in sites)


def test_shares_by_name_leave_the_rest_to_the_others():
    found = ByName({"conv2": 0.75}).spread(SITES, Budget(0.7))
    assert found["conv2"] == 288
    assert sum(found.values()) == 459
    assert found["conv1"] / 216 == pytest.approx(found["fc"] / 160, abs=0.01)
    with pytest.raises(SettingError, match=r"no site has that name[\s\S]*conv2"):
        ByName({"conv3": 0.5}).spread(SITES, Budget(0.7))
    with pytest.raises(BudgetError, match="conv2 keep 1,152"):
        ByName({"conv2": 0.0}).spread(SITES, Budget(0.7))
    with pytest.raises(SettingError, match="it is a fraction"):
        ByName({"conv2": 1.5})


@pytest.mark.parametrize("rule", [Er(), Erk(), Erk(power=0.5), Uniform()], ids=text_of)
@pytest.mark.parametrize("sparsity", [0.0, 0.001, 0.5, 0.95, 0.999])
def test_no_rule_keeps_more_than_there_is_or_misses_its_total(rule, sparsity):
    found = rule.spread(SITES, Budget(sparsity))
    assert all(0 <= found[s.name] <= s.units for s in SITES)
    slack = 0 if rule != Uniform() else 3
    assert abs(sum(found.values()) - kept_of(1528, sparsity)) <= slack


def test_a_layer_keeps_one_weight_at_least_and_the_total_stays():
    assert inhabited(SITES, {"conv1": 0, "conv2": 9, "fc": 0}) == {"conv1": 1, "conv2": 7, "fc": 1}
    with pytest.raises(BudgetError, match=r"nothing would be left of fc[\s\S]*at most 0.998037"):
        inhabited(SITES, {"conv1": 1, "conv2": 1, "fc": 0})


def test_outputs_to_which_nothing_leads_are_told():
    keep = {"a": torch.tensor([[True, False], [False, False]]), "b": torch.zeros(2, 2, dtype=torch.bool)}
    told = gaps([site("a", 2, 2), site("b", 2, 2)], keep)
    assert told == ["collapsed: nothing is left of b", "no weight leads to 1 outputs in 1 layers, 1 of them in a"]


def test_every_rule_can_be_written_as_text():
    for rule in (UniformPlus(), ErkPlus(classifier=0.5), ByName({"fc": 0.5}), Er(power=2.0), Donor(Grasp(per_class=3))):
        assert part_of(text_of(rule), words(random_pruning)) == rule


def test_it_keeps_as_many_as_asked_by_the_rule_and_any_of_them():
    assert load("random_pruning") is RandomPruning
    first, second = (
        prune(tiny.cnn(), RandomPruning(sparsity=0.8, steps=0), tiny.toy_images(seed=seed)) for seed in (0, 1)
    )
    sites = weights(tiny.cnn())
    wanted = Erk().spread(sites, Budget(0.8))
    for outcome in (first, second):
        assert {mask.site.name: mask.kept for mask in outcome.edits} == wanted
    assert any(not torch.equal(a.keep, b.keep) for a, b in zip(first.edits, second.edits, strict=True))


@pytest.mark.parametrize("probe", [Snip(samples=32), Grasp(per_class=4), Synflow(rounds=5)], ids=lambda p: text_of(p))
def test_a_donor_lends_its_counts_and_not_its_places(probe):
    model, task = tiny.cnn(), tiny.toy_images()
    sites = weights(model)
    donor = masks_by(sites, probe.read(model, sites, task, 0.8).scores, Global(), 0.8)
    outcome = RandomPruning(sparsity=0.8, allocation=Donor(probe), steps=0).run(model, task)
    wanted = inhabited(sites, {mask.site.name: mask.kept for mask in donor})
    assert {mask.site.name: mask.kept for mask in outcome.edits} == wanted
    assert any(not torch.equal(a.keep, b.keep) for a, b in zip(donor, outcome.edits, strict=True))


def test_the_mask_holds_at_every_step_whatever_momentum_and_decay_do():
    from secateur.axes.rules import Hold

    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    keep = random_masks(sites, Erk().spread(sites, Budget(0.9)), 0)

    def look(loop):
        for s in sites:
            assert not bool(loop.tensors[s.name][~keep[s.name]].any())
            state = loop.optimizer.state[loop.tensors[s.name]]
            assert not bool(state["momentum_buffer"][~keep[s.name]].any())

    optimizer = Sgd(0.05, decay=5e-4, nesterov=True)(model.parameters())
    fit(model, task, 10, [Hold(sites, keep)], optimizer, watch=look)


def test_rescaled_weights_make_outputs_as_loud_as_dense_ones():
    model, task = network(400, 300, 10), tiny.toy_vectors(size=400)
    RandomPruning(sparsity=0.9, rescale=True, steps=0, allocation=Erk()).run(model, task)
    for s in weights(model):
        value = tensors(model)[s.name].detach()
        share = float((value.detach() != 0).float().mean())
        kept = value[value != 0]
        assert float(kept.std()) == pytest.approx((2 / (value.shape[1] * share)) ** 0.5, rel=0.1)
        # over all inputs, zeros among them, the variance is that of a dense start
        assert float(value.square().mean()) == pytest.approx(2 / value.shape[1], rel=0.2)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"steps": -1}, "cannot be negative"),
        ({"allocation": Global()}, "a random choice has none"),
        ({"rate_floor": 2.0}, "a floor of 2"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), RandomPruning(**given), task=None)


def test_the_gap_to_dense_shrinks_with_width():
    """The paper's claim on scikit-learn's digits: 5 % of the weights, hidden layers 16 and 128 wide, two draws."""
    from secateur.tasks.images import digits

    gap = {}
    for width in (16, 128):
        lost = []
        for seed in range(2):
            task = digits(flat=True, seed=seed, learner=Adam(5e-3), batch=64)
            dense, sparse = network(64, width, width, 10, seed=seed), network(64, width, width, 10, seed=seed)
            fit(dense, task, 200, [LearningRate()])
            RandomPruning(sparsity=0.95, steps=200).run(sparse, task)
            lost.append(task.measure(dense, "test")["accuracy"] - task.measure(sparse, "test")["accuracy"])
        gap[width] = sum(lost) / 2
    assert gap[128] < gap[16] - 0.1, gap
    assert gap[128] < 0.2, gap


def test_a_donor_and_shares_by_name_from_the_command_line(tmp_path):
    from click.testing import CliRunner

    from secateur.cli import main

    line = ["prune", "tiny:mlp", "random_pruning", "--task", "tiny:toy_vectors", "--sparsity", "0.8", "--steps", "2"]
    for place, allocation in enumerate(
        ("donor(probe='synflow(rounds=3)')", "by-name(sparsities=(('4.weight', 0.5),))")
    ):
        out = str(tmp_path / str(place))
        found = CliRunner().invoke(main, [*line, "--allocation", allocation, "--out", out])
        assert found.exit_code == 0, found.output
    found = CliRunner().invoke(
        main, [*line, "--allocation", "by-name(sparsities=(('5.weight', 0.5),))", "--out", str(tmp_path / "other")]
    )
    assert found.exit_code != 0
    assert "no site has that name" in " ".join(found.output.split())
