"""BiP (paper 45): the mask's gradient against exact bi-level ones, levels kept apart, units of four kinds, a claim."""

import copy
import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.rules import LearningRate, sparsity_of
from secateur.axes.trained_masks import Direct, Implicit
from secateur.cut import weights
from secateur.edit import Mask, Remove
from secateur.errors import BudgetError, EvidenceError, SettingError, SiteError, TaskError
from secateur.method import load as load_method
from secateur.method import prune
from secateur.methods.bip import BiP, Channels, Filters, Inputs, Weights, untracked
from secateur.methods.global_mp import GlobalMagnitude
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot, attach, fit


def ruled(model, **changes):
    method = BiP(**{"sparsity": 0.7, "rate": 0.05, **changes})
    return method.rule(model, method.units.sites(model, tiny.toy_images().example, (), ("head",)))


# The gradient of the mask


def exact(mask, curvature, target, gamma):
    """d/dm of L(m w*(m)) for L(z) = sum of c (z - t)^2 / 2, by differentiating the lower level's own solution."""
    m = mask.clone().requires_grad_(True)
    solved = m * curvature * target / (m.square() * curvature + gamma)
    value = (curvature * (m * solved - target).square() / 2).sum()
    (slope,) = torch.autograd.grad(value, m)
    return slope, solved.detach()


def test_where_the_loss_is_straight_the_formula_is_the_exact_bilevel_gradient():
    """L(z) = c z: w* = -m c / gamma, and dL/dm = -2 m c^2 / gamma."""
    mask, slope, gamma = torch.tensor([1.0, 0.5]), torch.tensor([3.0, -2.0]), 4.0
    solved = -mask * slope / gamma
    found = Implicit(1 / gamma).of(solved, mask, slope)
    assert found.tolist() == pytest.approx([-2 * 9 / 4, -2 * 0.5 * 4 / 4])
    # without the weights' answer it is half of that, and with the authors' (w g)^2 in its place something else
    assert Direct().of(solved, mask, slope).tolist() == pytest.approx([-9 / 4, -0.5 * 4 / 4])
    squared = solved * slope - (solved * slope).square() / gamma
    assert not torch.allclose(squared, found, rtol=0.1)


def test_of_a_quadratic_with_two_weights_it_is_nearer_the_smaller_the_curvature():
    mask, target = torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([2.0, -1.0], dtype=torch.float64)
    errors = []
    for bend in (0.1, 0.01, 0.001):
        curvature = torch.tensor([bend, 2 * bend], dtype=torch.float64)
        wanted, solved = exact(mask, curvature, target, 1.0)
        gradient = curvature * (mask * solved - target)
        found = Implicit(1.0).of(solved, mask, gradient)
        errors.append(float(((found - wanted) / wanted).abs().max()))
        assert errors[-1] < float(((Direct().of(solved, mask, gradient) - wanted) / wanted).abs().max())
    assert errors[0] > 5 * errors[1] > 25 * errors[2]
    assert errors[2] < 0.02


class Slopes:
    """A loss sum(w * slope): one slope for the weights' batches, another for the mask's."""

    seed, name = 0, "slopes"

    def __init__(self, lower, upper):
        self.lower, self.upper = torch.tensor([lower]), torch.tensor([upper])

    def batches(self, split, n=None, epoch=0):
        return [Batch((self.upper if epoch >= 1 << 20 else self.lower,))]

    def loss(self, model, batch):
        return batch.through(model).sum()

    def optimizer(self, parameters):
        return torch.optim.SGD(parameters, 0.1)


def test_a_step_of_each_level_worked_by_hand():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -0.8, 0.5]])
    method = BiP(sparsity=0.34, implicit=0.5, rate=0.1, momentum=0.0, decay=0.0)
    rule = method.rule(model, weights(model))
    assert rule.keep["weight"].tolist() == [[True, True, False]]
    seen = []
    fit(model, Slopes([1.0, 1.0, 1.0], [1.0, 2.0, -4.0]), 2, [rule], watch=lambda _: seen.append(model.weight.tolist()))
    # below: masked weights get no gradient, 1 - 0.1, -0.8 - 0.1, 0.5
    # above: slope (w - m g / 2) g is (0.9 - 0.5) 1, (-0.9 - 1) 2, (0.5 - 0) (-4), times the sign of the score
    scores = [1 - 0.1 * 0.4, -0.8 + 0.1 * -3.8, 0.5 + 0.1 * 2.0]
    assert rule.scored.parameters()[0][0].tolist() == pytest.approx(scores)
    assert rule.passes == 1
    assert seen[0][0] == pytest.approx([0.9, -0.9, 0.0])


def test_a_mask_that_moves_shows_weights_that_were_kept_aside():
    model = nn.Linear(3, 1, bias=False)
    model.weight.data = torch.tensor([[1.0, -0.8, 0.5]])
    method = BiP(sparsity=0.34, implicit=0.0, rate=1.0, momentum=0.0, decay=0.0)
    rule = method.rule(model, weights(model))
    seen = []
    fit(model, Slopes([0.0] * 3, [0.0, 0.0, -4.0]), 2, [rule], watch=lambda _: seen.append(model.weight.tolist()))
    assert rule.keep["weight"].tolist() == [[True, False, True]]
    assert seen[0] == [[1.0, 0.0, 0.5]]


# Levels kept apart


def test_scores_do_not_share_storage_with_weights_and_neither_step_moves_the_other():
    model, task = tiny.cnn(), tiny.toy_images()
    rule = ruled(model, decay=0.0)
    scores = [s.clone() for s in rule.scored.parameters()]
    assert {s.data_ptr() for s in rule.scored.parameters()}.isdisjoint(p.data_ptr() for p in model.parameters())
    fit(model, task, 1, [rule])  # one step below, and none above after the last
    assert all(torch.equal(a, b) for a, b in zip(scores, rule.scored.parameters(), strict=True))
    dense, bias = [], []

    def look(loop):
        dense.append([d.clone() for d in rule.scored.holder.values().values()])
        bias.append(model.bn.weight.detach().clone())

    model, still = tiny.cnn(), Sgd(0.0, decay=0.1)
    rule = ruled(model)
    fit(model, task, 4, [rule], still(list(model.parameters())), watch=look)
    assert all(torch.equal(a, b) for a, b in zip(dense[0], dense[-1], strict=True))
    assert torch.equal(bias[0], bias[-1])
    assert not all(torch.equal(a, b) for a, b in zip(scores, rule.scored.parameters(), strict=True))


def test_the_masks_passes_leave_running_statistics_be():
    task, one, other = tiny.toy_images(), tiny.cnn(), tiny.cnn()
    fit(one, task, 3, [(rule := ruled(one, rate=1e-12))], Sgd(0.0)(one.parameters()))  # masks that do not move
    fit(other, task, 3, [ruled(other, every=100)], Sgd(0.0)(other.parameters()))
    assert rule.passes == 2
    assert int(one.bn.num_batches_tracked) == 3
    assert torch.equal(one.bn.running_mean, other.bn.running_mean)
    model = tiny.cnn().train()
    with untracked(model):
        model(torch.zeros(2, 3, 8, 8))
    assert int(model.bn.num_batches_tracked) == 0
    assert model.bn.track_running_stats


def test_each_level_has_batches_in_an_order_of_its_own():
    model, task, orders = tiny.cnn(), tiny.toy_images(), {"lower": [], "upper": []}

    class Watching:
        seed, name = task.seed, task.name

        def batches(self, split, n=None, epoch=0):
            for batch in task.batches(split, n, epoch):
                orders["upper" if epoch >= 1 << 20 else "lower"].append(batch.target.tolist())
                yield batch

        loss, optimizer = staticmethod(task.loss), staticmethod(task.optimizer)

    fit(model, Watching(), 4, [ruled(model)])
    assert len(orders["lower"]) == 4
    assert len(orders["upper"]) == 3
    assert all(a != b for a, b in zip(orders["lower"], orders["upper"], strict=False))


# Units


@pytest.mark.parametrize("units", [Weights(), Filters(), Inputs()], ids=lambda u: type(u).__name__)
def test_the_sparsity_asked_is_there_at_every_logged_step(units):
    model, task = tiny.trained("cnn"), tiny.toy_images()
    method = BiP(sparsity=0.6, units=units, steps=6)
    rule = method.rule(model, units.sites(model, task.example, (), ("head",)))
    counts = {n: int(k.sum()) for n, k in rule.keep.items()}

    def look(loop):
        now = {n: int(k.sum()) for n, k in rule.keep.items()}
        assert now == counts if not isinstance(units, Weights) else sum(now.values()) == sum(counts.values())
        assert loop.history.curves["sparsity"][-1][1] == pytest.approx(sparsity_of(rule.keep))
        for site in rule.sites:
            part = site.parts[0]
            gone = part.expand(~rule.keep[site.name]).expand(part.shape)
            assert not bool(part.read(loop.tensors).detach()[gone].any())

    fit(model, task, 6, [LearningRate(), rule], watch=look)
    units_ = sum(site.units for site in rule.sites)
    if isinstance(units, Weights):
        assert sum(counts.values()) == units_ - int(0.6 * units_)
    else:
        assert counts == {s.name: s.units - int(0.6 * s.units) for s in rule.sites}


def test_filters_spare_the_answers_and_inputs_the_data():
    model, example = tiny.cnn(), tiny.toy_images().example
    filters = {site.name: site.shape for site in Filters().sites(model, example, (), ())}
    inputs = {site.name: site.shape for site in Inputs().sites(model, example, (), ())}
    assert "fc.weight" not in filters
    assert filters["conv.weight"] == (8,)
    assert filters["down.weight"] == (16,)
    assert "conv.weight" not in inputs
    assert inputs["fc.weight"] == (16,)
    assert inputs["down.weight"] == (8,)
    with pytest.raises(SiteError, match="no layer is left to cut"):
        Filters().sites(nn.Linear(4, 4), example, (), ())


def test_a_filter_is_worth_the_norm_of_its_scores():
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[0].weight.data = torch.tensor([[3.0, 4.0], [-6.0, 0.0], [2.0, 2.0]])
    method = BiP(sparsity=0.5, units=Filters())
    sites = Filters().sites(model, tiny.toy_vectors().example, (), ())
    assert method.rule(model, sites).keep["0.weight"].tolist() == [True, True, False]  # norms 5, 6 and 2.8


def test_channels_are_taken_out_and_the_small_network_is_the_masked_one():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    method = BiP(sparsity=0.5, units=Channels(), steps=8)
    work = copy.deepcopy(model)
    sites = Channels().sites(work, task.example, (), ())
    rule = method.rule(work, sites)
    fit(work, task, 8, [LearningRate(), rule])
    work.eval()
    (inputs,) = next(iter(task.batches("val"))).inputs
    masked = work(inputs)
    outcome = prune(model, method, task)
    assert all(isinstance(edit, Remove) for edit in outcome.edits)
    torch.testing.assert_close(outcome.model.eval()(inputs), masked, rtol=1e-4, atol=1e-4)
    assert outcome.ledger.after.parameters < 0.5 * outcome.ledger.before.parameters
    assert outcome.model.conv.out_channels == 4
    assert method.budget().of == "units"
    tuned = prune(model, replace(method, tune=4), task)
    assert len(tuned.history.losses) == 12


def test_two_sites_that_share_a_kernel_each_learn_what_the_other_leaves():
    """A kernel's rows go with one site and its columns with another: z = a b w."""
    model, task = tiny.trained("cnn"), tiny.toy_images()
    rule = BiP(sparsity=0.5, units=Channels(), implicit=0.01).rule(model, Channels().sites(model, task.example, (), ()))
    shared = [key for key, owners in rule.scored._owners.items() if len(owners) > 1 and key.endswith("weight")]
    assert "down.weight" in shared
    work, seen = copy.deepcopy(model), {}
    rule = BiP(sparsity=0.5, units=Channels(), implicit=0.01).rule(work, Channels().sites(work, task.example, (), ()))
    learn = rule.scored.learn

    def watched(loop):
        learn(loop)
        for site, part in rule.scored._owners["down.weight"]:
            seen[part.axis] = rule.scored.scores[site.name]["down.weight"].grad.clone()
        owners = {part.axis: (site, part) for site, part in rule.scored._owners["down.weight"]}
        seen["mask"] = {
            axis: part.expand(rule.keep[site.name].float()).expand(part.shape) for axis, (site, part) in owners.items()
        }
        seen["gradient"] = dict(work.named_parameters())["down.weight"].grad.clone()
        seen["weight"] = rule.scored.holder.values()["down.weight"]
        site = owners[0][0]
        seen["sign"] = rule.scored.scores[site.name]["down.weight"].detach().sign()

    rule.scored.learn = watched
    fit(work, task, 2, [rule])
    a, b, g, w = seen["mask"][0], seen["mask"][1], seen["gradient"], seen["weight"]
    slope = (w - 0.01 * a * b * g) * g
    torch.testing.assert_close(seen[0], b * slope * seen["sign"])
    torch.testing.assert_close(seen[1], a * slope * seen["sign"])


# The run


@pytest.mark.parametrize("units", [Weights(), Channels()], ids=lambda u: type(u).__name__)
def test_a_run_taken_up_again_ends_where_it_would_have(units, tmp_path):
    task, whole, cut, again = tiny.toy_images(), tiny.trained("cnn"), tiny.trained("cnn"), tiny.trained("cnn")
    fit(whole, task, 8, [LearningRate(), (straight := ruled(whole, units=units))])

    def put_aside(loop):
        if loop.step == 3:
            Snapshot.of(cut, loop).save(tmp_path / "run.safetensors")

    fit(cut, task, 8, [LearningRate(), ruled(cut, units=units)], watch=put_aside)
    rule = ruled(again, units=units)
    fit(again, task, 8, [LearningRate(), rule], resume_from=Snapshot.load(tmp_path / "run.safetensors"))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(straight.scored.parameters(), rule.scored.parameters(), strict=True))
    assert rule.passes == straight.passes == 7


def test_it_works_in_a_loop_of_ones_own():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    batches = itertools.cycle(task.batches("train"))
    optimizer = Sgd(0.01, decay=1e-3)(model.parameters())
    method = BiP(sparsity=0.8)
    rule = method.rule(model, weights(model), upper=lambda net: task.loss(net, next(batches)))
    model.train()
    pruner = attach(optimizer, model, rule, steps=6)
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = task.loss(model, next(batches))
        loss.backward()
        optimizer.step()
    pruner.finish()
    assert rule.passes == 5
    for site in weights(model):
        assert not bool(tensors(model)[site.name][~rule.keep[site.name]].any())
    with pytest.raises(TaskError, match="Give upper="):
        attach(optimizer, model, method.rule(model, weights(model)), steps=2)


def test_a_gradient_that_is_not_a_number_is_named():
    model, task = tiny.mlp(), tiny.toy_vectors()
    torn = lambda net: net(torch.full((2, 16), torch.inf)).sum()  # noqa: E731
    rule = BiP(sparsity=0.5).rule(model, weights(model), upper=torn)
    with pytest.raises(EvidenceError, match=r"were to be trained, after 1 steps[\s\S]*NaN or infinity"):
        fit(model, task, 3, [rule])


def test_a_learnt_mask_is_ahead_of_the_first_at_equal_passes():
    """The paper's order at toy size: 5 % of the weights, the mask of magnitude fine-tuned twice as long."""
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    learnt = prune(model, BiP(sparsity=0.95, steps=40), task)
    held = prune(model, GlobalMagnitude(sparsity=0.95, floor=0.0, steps=79), task)
    loss = [task.measure(outcome.model, "test")["loss"] for outcome in (learnt, held)]
    assert loss[0] < 0.9 * loss[1], loss
    assert any("79 passes" in note for note in learnt.notes)
    assert load_method("bip") is BiP


def test_a_network_of_which_a_layer_is_gone_is_remarked_on_and_a_floor_keeps_it():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    with torch.no_grad():
        model.down.weight.mul_(1e-6)
    gone = prune(model, BiP(sparsity=0.9, steps=1), task)
    assert any("collapsed: nothing is left of down.weight" in note for note in gone.notes)
    held = prune(model, BiP(sparsity=0.9, steps=3, units=Weights(floor=0.001)), task)
    kept = {edit.site.name: edit.kept for edit in held.edits if isinstance(edit, Mask)}
    assert min(kept.values()) >= int(0.001 * sum(edit.site.units for edit in held.edits))


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: BiP(sparsity=1.0), "the fraction removed"),
        (lambda: BiP(implicit=-1e-4), "a gamma above 0"),
        (lambda: BiP(steps=0), "0 steps"),
        (lambda: BiP(every=0), "every 0"),
        (lambda: BiP(tune=-1), "-1 of fine-tuning"),
        (lambda: BiP(rate=0.0), "a rate of 0"),
        (lambda: BiP(rate_floor=2.0), "a floor of 2"),
        (lambda: BiP(momentum=1.0), "momentum=1 and decay=0.0001 of the scores"),
        (lambda: BiP(decay=-1.0), "a decay not below 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make().check()


def test_frozen_weights_and_a_budget_of_nothing_are_refused():
    model = tiny.mlp()
    model[2].weight.requires_grad_(False)
    with pytest.raises(SettingError, match=r"2\.weight has requires_grad=False"):
        BiP(sparsity=0.5, steps=2).run(model, tiny.toy_vectors())
    with pytest.raises(BudgetError, match="not one weight would be left"):
        BiP(sparsity=0.9, units=Filters()).rule(model, [])


def test_from_the_command_line_to_stock_transformers(tmp_path):
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    from secateur.cli import main

    out = tmp_path / "sparse"
    line = ["prune", "tiny:decoder", "bip", "--task", "tiny:toy_text", "--sparsity", "0.6", "--steps", "3"]
    line += ["--units", "filters", "--curve", "steps(by=0.5)", "--out", str(out)]
    found = CliRunner().invoke(main, line)
    assert found.exit_code == 0, found.output
    model = AutoModelForCausalLM.from_pretrained(out)
    for site in weights(model):
        rows = (tensors(model)[site.name] == 0).all(1)
        assert int(rows.sum()) == int(0.6 * len(rows))
