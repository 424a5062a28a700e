"""Slimming, soft filters, ThiNet, regression, sparse structure selection: by hand, as properties, and on toy images."""

import copy

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import keep_top
from secateur.axes.filters import alone, filter_norm, filters, read_alone, readers
from secateur.axes.residual import removable_blocks
from secateur.edit import apply_
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.graph import removals
from secateur.method import load, prune
from secateur.methods.regression import Regression, brought, lasso, seen_at, solved, told_from
from secateur.methods.slimming import Slimming
from secateur.methods.soft_filter import SoftFilter, Softly
from secateur.methods.structure_selection import (
    Factors,
    Proximal,
    StructureSelection,
    factors_of_blocks,
    factors_of_filters,
    soft,
)
from secateur.methods.thinet import ThiNet, contributions, gram_of, least_noticed, scales
from secateur.site import tensors
from secateur.train import Loop


def example():
    return tiny.make_task("cnn").example


def test_filters_go_that_the_next_layer_does_not_notice_by_hand():
    # alone, channel 1 costs least (1); with it gone, 0 and 2 cost 4 each; and together, as they cancel, nothing
    gram = torch.tensor([[4.0, 0.0, -4.0], [0.0, 1.0, 0.0], [-4.0, 0.0, 4.0]])
    assert least_noticed(gram, 3) == [1, 0, 2]
    assert least_noticed(torch.tensor([[4.0, -3.0, 0.0], [-3.0, 4.0, 0.0], [0.0, 0.0, 5.0]]), 2) == [0, 1]
    # 0 = 1: what is left of the pair is doubled, and what has nothing to do with it stays
    alike = torch.tensor([[2.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]], dtype=torch.float64)
    assert scales(alike, torch.tensor([True, False, True])).tolist() == pytest.approx([2.0, 1.0])


def test_each_choice_is_the_cheapest_there_is():
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=draw, dtype=torch.float64)
    gone = least_noticed(x.T @ x, 4)
    for place, chosen in enumerate(gone):
        before = gone[:place]
        costs = {c: float(x[:, [*before, c]].sum(1).square().sum()) for c in range(6) if c not in before}
        assert min(costs, key=costs.get) == chosen


class Grouped(nn.Module):
    """A convolution in groups reads the first one, and a linear layer reads that through a pooling."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.grouped, self.last = nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(torch.relu(self.grouped(x)).mean((2, 3)))


@pytest.mark.parametrize("method", [ThiNet, Regression])
def test_what_a_grouped_convolution_reads_is_left_alone(method):
    task = tiny.make_task("cnn")
    done = prune(tiny.seeded(Grouped, 0), method(samples=16, recover=0), task)
    assert "second is left alone: what reads it is neither linear nor a plain 2-d convolution" in done.notes
    assert (done.model.first.out_channels, done.model.second.out_channels) == (4, 8)


def test_factors_of_what_a_grouped_convolution_reads_fold_in():
    model = tiny.seeded(Grouped, 0)
    factors = [f for f in factors_of_filters(model, filters(model, example())[0]) if f.name == "second"]
    (each,) = factors
    with torch.no_grad():
        each.value.copy_(torch.tensor([0.0, 1.5]))  # channel 0 of every pair, and channel 1
    handles, x = each.hook_(model), example().inputs[0]
    with torch.no_grad():
        wanted = model(x)
    for handle in handles:
        handle.remove()
    apply_(model, each.fold(model, torch.tensor([False, True])))
    apply_(model, removals([each.site], {each.name: torch.tensor([False, True])}))
    assert model.grouped.weight.shape == (8, 1, 3, 3)
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"stride": 1, "padding": 1},
        {"stride": 2, "padding": 1},
        {"padding": "same", "dilation": 2},
        {"padding": (2, 1), "padding_mode": "reflect"},
    ],
)
def test_contributions_add_up_to_the_output_without_bias(settings):
    conv = tiny.seeded(lambda: nn.Conv2d(5, 4, 3, **settings), 0)
    given = torch.randn(3, 5, 8, 8, generator=torch.Generator().manual_seed(1))
    model = tiny.cnn()
    site = next(s for s in filters(model, example())[0] if s.name == "block1.conv1")
    part = readers(site)[0]
    owner = torch.arange(5).reshape(1, 5, 1, 1)
    mine = type(part)("weight", (4, 5, 3, 3), owner)
    found = contributions(conv, mine, 5, given, 7, torch.Generator().manual_seed(2))
    draw = torch.Generator().manual_seed(2)
    out = (conv(given) - conv.bias.view(1, -1, 1, 1)).flatten(2)
    at = torch.randint(out.shape[2], (3, 7), generator=draw)
    output = torch.randint(4, (3, 7), generator=draw)
    expected = out[torch.arange(3)[:, None], output, at].reshape(-1)
    torch.testing.assert_close(found.sum(1), expected, rtol=1e-4, atol=1e-5)


def copied_cnn():
    """A trained network in which the last eight filters of a block are copies of the first, and its task."""
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    block = model.block2
    with torch.no_grad():
        block.conv1.weight[8:] = block.conv1.weight[:8]
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(block.bn1, name)[8:] = getattr(block.bn1, name)[:8]
        block.conv2.weight[:, 8:] = block.conv2.weight[:, :8]
    return model, task


def test_filters_that_others_copy_go_and_nothing_changes():
    model, task = copied_cnn()
    block = model.block2
    wanted = copy.deepcopy(model).eval()
    (site,) = [s for s in alone(filters(model, task.example)[0]) if s.name == "block2.conv1"]
    part = readers(site)[0]
    gram = gram_of(model, part, 16, task.batches("calibration", 64), 8, torch.Generator().manual_seed(0))
    keep = torch.ones(16, dtype=torch.bool)
    keep[8:] = False
    factor = torch.ones(16, dtype=torch.float64)
    factor[keep] = scales(gram, keep)
    assert factor[:8].tolist() == pytest.approx([2.0] * 8, abs=1e-3)
    with torch.no_grad():
        block.conv2.weight.mul_(part.expand(factor).float())
        apply_(model, removals([site], {site.name: keep}))
        x = task.example.inputs[0]
        torch.testing.assert_close(model.eval()(x), wanted(x), rtol=1e-3, atol=1e-3)


def test_the_output_is_told_from_channels_and_weights_are_solved_by_hand():
    # beta = soft(c / g, lambda / g) where channels have nothing to do with one another
    gram, cross = torch.diag(torch.tensor([2.0, 2.0, 2.0])), torch.tensor([6.0, -4.0, 1.0])
    assert lasso(gram, cross, 2.0, torch.zeros(3)).tolist() == pytest.approx([2.0, -1.0, 0.0])
    assert told_from(gram, cross, 2).tolist() == [True, True, False]
    # two channels of two taps each, a third column nobody's: y = x W and all is told
    weight = torch.tensor([[1.0, 0.0, 2.0, 1.0, 5.0]])
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 2.0, 1.0, 1.0, 0.0]])
    owner = torch.tensor([0, 0, 1, 1, -1])
    both, told = brought(weight, owner, 2, x.T @ x, x.T @ (x @ weight.T))
    assert both.tolist() == [[1.0, 2.0], [2.0, 13.0]]  # Z is [[1, 2], [0, 3]]
    assert told.tolist() == [3.0, 15.0]  # with [3, 3], what is left of y without nobody's column
    # a channel that is twice another: the other's weight grows by half of what went
    alike = torch.tensor([[1.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    ones = torch.ones(1, 2, dtype=torch.float64)
    new = solved(ones, torch.tensor([False, True]), alike, alike @ ones.T, 1e-9)
    assert new.tolist() == [[0.0, pytest.approx(1.5)]]


def test_channels_that_others_copy_go_and_the_next_layer_is_solved_so_that_nothing_changes():
    model, task = copied_cnn()
    with torch.no_grad():
        model.block2.conv2.weight[:, 8:] *= 0.5  # a pull on both is cheaper on the louder
    wanted = copy.deepcopy(model).eval()
    (site,) = [s for s in alone(filters(model, task.example)[0]) if s.name == "block2.conv1"]
    part = readers(site)[0]
    draw = torch.Generator().manual_seed(0)
    gram, cross = seen_at(model, wanted, part, task.batches("calibration", 64), 8, draw)
    weight, owner = model.block2.conv2.weight.detach().flatten(1).double(), torch.arange(16).repeat_interleave(9)
    keep = told_from(*brought(weight, owner, 16, gram, cross), 8)
    assert keep.tolist() == [True] * 8 + [False] * 8
    new = solved(weight, keep[owner], gram, cross, 1e-9).reshape(16, 16, 3, 3)
    with torch.no_grad():
        model.block2.conv2.weight.copy_(new)
        apply_(model, removals([site], {site.name: keep}))
        x = task.example.inputs[0]
        torch.testing.assert_close(model.eval()(x), wanted(x), rtol=1e-3, atol=1e-3)


def test_regression_mends_what_norms_alone_break():
    task, model = tiny.make_task("cnn"), tiny.trained("cnn")
    done = prune(model, Regression(sparsity=0.5, samples=64, recover=0), task)
    sites, _ = read_alone(model, task.example)
    cut = copy.deepcopy(model)
    keep = {s.name: keep_top(filter_norm(s, tensors(model)), s.units // 2) for s in sites}
    apply_(cut, removals(sites, keep))
    assert task.measure(done.model)["loss"] < task.measure(cut)["loss"]
    assert {row.site: row.kept for row in done.record.sites} == {s.name: s.units // 2 for s in sites}
    with pytest.raises(SettingError, match="damp=0 was given, but a gram of few samples has no inverse"):
        Regression(damp=0.0).check()


def test_a_filter_that_was_zeroed_may_come_back():
    model, task = tiny.cnn(), tiny.make_task("cnn")
    sites, _ = filters(model, task.example)
    (site,) = [s for s in sites if s.name == "block1.conv1"]
    with torch.no_grad():
        for unit in range(8):
            model.block1.conv1.weight[unit].fill_(unit + 1.0)
    assert filter_norm(site, tensors(model)).tolist() == pytest.approx([(u + 1) * 72**0.5 for u in range(8)])
    rule = Softly([site], 0.25)
    loop = Loop(model, task.optimizer(model.parameters()), 10, task)
    rule.zero_(loop)
    assert rule.keep[site.name].tolist() == [False, False, *[True] * 6]
    assert bool((model.block1.conv1.weight[:2] == 0).all())
    assert bool((model.block1.bn1.weight == 1).all())  # the norm lets gradients through
    with torch.no_grad():
        model.block1.conv1.weight[0].fill_(9.0)
    rule.zero_(loop)
    assert rule.keep[site.name].tolist() == [True, False, False, *[True] * 5]
    assert loop.history.curves["returned"] == [(0, 0.5)]


def test_soft_filters_are_zeroed_once_an_epoch_and_gone_at_last():
    class Counting(Softly):
        def zero_(self, loop):
            super().zero_(loop)
            steps.append(loop.step)

    from secateur.train import fit

    steps, model, task = [], tiny.cnn(), tiny.make_task("cnn")
    sites, _ = filters(model, task.example)
    fit(model, task, 55, [Counting(sites, 0.5)])  # 24 batches an epoch
    assert steps == [24, 48, 55]
    done = prune(tiny.cnn(), SoftFilter(sparsity=0.5, steps=20, every=5), task)
    assert done.model.block1.conv1.out_channels == 4
    assert done.model.block2.conv2.out_channels == 8
    assert done.ledger.sparsity == 0.5


def test_a_step_of_factors_by_hand():
    assert soft(torch.tensor([0.5, -0.5, 0.1]), 0.2).tolist() == pytest.approx([0.3, -0.3, 0.0])
    model, task = tiny.mlp(), tiny.make_task("mlp")
    value = torch.tensor([1.0, 0.01], requires_grad=True)
    rule = Proximal([Factors("a", None, value, ())], strength=1.0, momentum=0.5)
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), 10, task)
    value.grad = torch.tensor([2.0, 0.0])
    rule.after_step(loop)
    # z = soft(1 - 0.2, 0.1) = 0.7; v = 0.7 - 1 = -0.3; l = 0.7 - 0.15; and the second is zero, carried past it
    assert value.tolist() == pytest.approx([0.55, -0.005])
    rule.finish(loop)
    assert value.tolist() == pytest.approx([0.7, 0.0])


@pytest.mark.parametrize("kind", ["channel", "layer"])
def test_a_factor_of_zero_is_the_unit_gone_and_others_fold_in(kind):
    from secateur.methods.structure_selection import _blocks_out

    model, draw = tiny.trained("cnn"), torch.Generator().manual_seed(0)
    if kind == "channel":
        factors = factors_of_filters(model, filters(model, example())[0])
    else:
        ran, why = removable_blocks(model, example())
        factors, notes = factors_of_blocks(model, [each for each in ran if each.name not in why])
        assert [f.scaled[0][0] for f in factors] == ["block2.bn2"]
        assert notes == []
    for each in factors:
        with torch.no_grad():
            each.value.copy_(torch.rand(len(each.value), generator=draw) + 0.5)
            each.value[: len(each.value) // 2 + (kind == "layer")] = 0
    x = example().inputs[0]
    handles = [handle for each in factors for handle in each.hook_(model)]
    with torch.no_grad():
        wanted = model(x)
    for handle in handles:
        handle.remove()
    keep = {each.name: each.value.detach() != 0 for each in factors}
    for each in factors:
        apply_(model, each.fold(model, keep[each.name]))
    apply_(model, removals([each.site for each in factors if kind == "channel"], keep))
    apply_(model, _blocks_out(model, [each for each in factors if kind == "layer"], keep))
    with torch.no_grad():
        torch.testing.assert_close(model(x), wanted, rtol=1e-4, atol=1e-4)


def test_more_strength_takes_more_out_and_every_layer_keeps_one():
    task, left = tiny.make_task("cnn"), []
    for strength in (0.1, 1.0):
        done = prune(tiny.cnn(), StructureSelection(strength=strength, steps=40), task)
        left.append(sum(p.numel() for p in done.model.parameters()))
        assert min(m.out_channels for m in done.model.modules() if isinstance(m, nn.Conv2d)) >= 1
    assert left[1] < left[0]


def test_the_smallest_scales_anywhere_go_and_no_layer_may_vanish():
    task = tiny.make_task("cnn")

    def loud(small):
        model = tiny.cnn()
        with torch.no_grad():
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.weight.fill_(1.0)
            model.block2.bn1.weight[:small] = 0.01
            model.bn.weight[0] = 0.001  # its stage has another layer, which is loud
        return model

    done = Slimming(sparsity=12 / 48, steps=0).run(loud(12), task)
    assert done.model.block2.conv1.out_channels == 4
    assert done.model.conv.out_channels == 8
    with pytest.raises(BudgetError) as caught:
        Slimming(sparsity=16 / 48, steps=0).run(loud(16), task)
    assert str(caught.value).startswith(
        "a sparsity of 0.333333 by one threshold over all scales was asked for, but every channel of block2.conv1 is "
        "below it"
    )
    spared = Slimming(sparsity=16 / 48, steps=0, floor=2).run(loud(16), task)
    assert spared.model.block2.conv1.out_channels == 2
    assert sum(int((~e.keep).sum()) for e in spared.edits) == 16
    assert sum(e.site.units for e in spared.edits) == 48


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("soft_filter", {"sparsity": 0.3, "steps": 80, "every": 4}),
        ("slimming", {"sparsity": 0.3, "strength": 0.01, "steps": 40, "recover": 30}),
        ("thinet", {"sparsity": 0.3, "samples": 64, "each": 5, "recover": 40}),
        ("regression", {"sparsity": 0.3, "samples": 64, "recover": 40}),
        ("structure_selection", {"strength": 0.2, "steps": 60, "recover": 80}),
    ],
)
def test_each_leaves_a_smaller_network_that_still_knows_toy_images(name, settings):
    task, model = tiny.make_task("cnn"), tiny.trained("cnn")
    done = prune(model, load(name)(**settings), task)
    assert done.ledger.after.parameters < 0.85 * done.ledger.before.parameters
    assert task.measure(done.model)["accuracy"] > task.measure(model)["accuracy"] - 0.1


def test_what_has_no_filters_is_refused_and_settings_that_cannot_be():
    with pytest.raises(GraphError) as caught:
        filters(tiny.mlp(), tiny.make_task("mlp").example)
    assert str(caught.value) == (
        "filters of Sequential were to be taken out, but it has no convolution whose outputs can be.\n"
        "Use it for CNNs; l1_norm takes out neurons and heads of other networks."
    )
    with pytest.raises(SettingError, match="places=0 was given, but 1 is the least"):
        ThiNet(places=0).check()
    with pytest.raises(SettingError, match="filters and residual blocks have them"):
        StructureSelection(kinds=("head",)).check()
    with pytest.raises(SettingError, match="a strength of 0 and a momentum of 0.9"):
        StructureSelection(strength=0.0).check()
