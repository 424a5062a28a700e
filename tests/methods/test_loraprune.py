"""Adapters learn, and say on the way which heads and neurons can go."""

import copy
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import tiny
import torch
from torch import nn

from secateur.adapters import LowRank
from secateur.axes import Jump
from secateur.axes.hooks import Adapted, hooked, is_linear
from secateur.axes.schedules import Schedule
from secateur.edit import Remove
from secateur.errors import BudgetError, GraphError, ModelError, SettingError, SiteError, TaskError
from secateur.graph import couple
from secateur.graph.inner import inner
from secateur.method import prune
from secateur.methods import loraprune
from secateur.methods.loraprune import (
    Chance,
    FullGradient,
    Inside,
    LoRAPrune,
    LowRankGradient,
    Shutting,
    WeightSize,
    gradient_bytes,
    smoothed,
    surrogate_gradient,
    unit_length,
    unit_scores,
    weight_scores,
)
from secateur.models import load, save
from secateur.site import Part, Site, tensors
from secateur.train import Loop, attach

SMALL = {"steps": 20, "rate": 5e-3, "every": 3, "rank": 2, "alpha": 4.0, "spare_last": 0}

# Two neurons: rows of a [2, 2], columns of b [2, 2].
ROWS = Part("a", (2, 2), torch.tensor([[0], [1]]))
COLUMNS = Part("b", (2, 2), torch.tensor([[0, 1]]))
SITE = Site("n", "channel", (2,), (ROWS, COLUMNS))
A, B = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
GRAD_A, GRAD_B = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0], [-1.0]])


def adapted(part, weight, scale=1.0):
    low = LowRank(torch.tensor(weight), 1)
    low.a.data, low.b.data, low.a.grad, low.b.grad = A.clone(), B.clone(), GRAD_A.clone(), GRAD_B.clone()
    return Adapted(part, nn.Parameter(torch.tensor(weight)), low, scale)


def logits(model, task):
    with torch.no_grad():
        return task.example.through(model).logits


def loss(model, task):
    with torch.no_grad():
        return sum(float(task.loss(model, batch)) for batch in task.batches("val"))


def widths(model):
    """Neurons and key-value heads of each block."""
    return [(b.mlp.up_proj.out_features, b.self_attn.k_proj.out_features // 8) for b in model.model.layers]


def ready(family="decoder", **changes):
    """A model, its task, the sites that are to be cut and the layers they are scored by."""
    model, task = tiny.trained(family), tiny.make_task(family)
    method = LoRAPrune(**{**SMALL, "dropout": 0.0, **changes})
    sites = list(inner(coupled(model, task.example)))
    counts = Inside(0.0, 0).spread(sites, method.budget())
    cut = [site for site in sites if counts[site.name] < site.units]
    return model, task, method, cut, counts, method.layers(model, task, cut)


@pytest.fixture(autouse=True)
def _couple_once(monkeypatch):
    """Following a model takes longer than all else here, and says the same of models of one form."""
    monkeypatch.setattr(loraprune, "couple", coupled)


def coupled(model, example):
    form = tuple((name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items())
    if form not in COUPLINGS:
        COUPLINGS[form] = couple(model, example)
    return COUPLINGS[form]


COUPLINGS = {}


# Equations


def test_the_surrogate_gradient_by_hand():
    # gB A = [[2, 4], [-1, -2]]    B gA = [[3, 0], [1, 0]]    gB gA = [[2, 0], [-1, 0]]
    assert surrogate_gradient(A, B, GRAD_A, GRAD_B).tolist() == [[3, 4], [1, -2]]
    assert surrogate_gradient(A, B, GRAD_A, GRAD_B, product=False).tolist() == [[5, 4], [0, -2]]
    # It is what a step of rate 1 takes from the product.
    assert torch.equal(B @ A - (B - GRAD_B) @ (A - GRAD_A), surrogate_gradient(A, B, GRAD_A, GRAD_B))


def test_the_product_is_of_second_order_in_the_gradient():
    by_tenth = surrogate_gradient(A, B, GRAD_A / 10, GRAD_B / 10)
    first = surrogate_gradient(A, B, GRAD_A, GRAD_B, product=False) / 10
    assert torch.allclose(by_tenth, first - GRAD_B @ GRAD_A / 100)


def test_squares_and_sizes_rank_units_differently():
    gradient, weight = torch.tensor([[3.0, 0.0, 0.0], [1.5, -1.5, 1.5]]), torch.ones(2, 3)
    assert weight_scores(gradient, weight).sum(1).tolist() == [9, 6.75]
    assert weight_scores(gradient, weight, 1.0).sum(1).tolist() == [3, 4.5]


def test_scores_of_units_by_hand():
    layers = {"a": adapted(ROWS, [[1.0, 0.0], [0.0, 2.0]]), "b": adapted(COLUMNS, [[0.0, 1.0], [1.0, 0.0]], scale=0.0)}
    both, draw = torch.ones(2, dtype=torch.bool), torch.Generator()
    # a: W + B A = [[4, 6], [1, 4]]; G of it: [[12, 24], [1, -8]]; squares by rows: 720, 65
    # b: W alone, c being 0: [[0, 1], [1, 0]]; G of it: [[0, 4], [1, 0]]; squares by columns: 1, 16
    a, b = torch.tensor([720.0, 65.0]).double(), torch.tensor([1.0, 16.0]).double()
    wanted = a / (720**2 + 65**2) ** 0.5 + b / (1 + 16**2) ** 0.5
    assert torch.allclose(unit_scores(SITE, layers, LowRankGradient(), both, draw), wanted)
    # Sizes instead of squares: 36 and 9 by rows, 1 and 4 by columns.
    wanted = torch.tensor([36.0, 9.0]).double() / 1377**0.5 + torch.tensor([1.0, 4.0]).double() / 17**0.5
    assert torch.allclose(unit_scores(SITE, layers, LowRankGradient(power=1.0), both, draw), wanted)
    # A unit that is shut is worth nothing, and takes nothing from the others.
    assert unit_scores(SITE, layers, LowRankGradient(), torch.tensor([True, False]), draw).tolist() == [2, 0]
    # Weights alone: 52 and 17 by rows, 1 and 1 by columns.
    wanted = torch.tensor([52.0, 17.0]).double() / (52**2 + 17**2) ** 0.5 + 0.5**0.5
    assert torch.allclose(unit_scores(SITE, layers, WeightSize(), both, draw), wanted)


def test_a_matrix_without_an_adapter_adds_nothing():
    layer, both = adapted(ROWS, [[1.0, 0.0], [0.0, 2.0]]), torch.ones(2, dtype=torch.bool)
    alone = unit_scores(SITE, {"a": layer}, LowRankGradient(), both, torch.Generator())
    assert torch.allclose(alone, unit_length(torch.tensor([720.0, 65.0]).double()))
    layer.low.a.grad = None  # an adapter that no gradient reached
    assert unit_scores(SITE, {"a": layer}, LowRankGradient(), both, torch.Generator()).tolist() == [0, 0]


def test_lengths_of_very_small_scores_are_one_as_well():
    assert torch.allclose(unit_length(torch.tensor([3e-30, 4e-30]).double()), torch.tensor([0.6, 0.8]).double())
    assert unit_length(torch.zeros(2)).tolist() == [0, 0]


def test_the_mean_by_hand():
    first = smoothed(torch.zeros(1), torch.ones(1), 0.9)
    assert float(first) == pytest.approx(0.1)
    assert float(smoothed(first, torch.tensor([2.0]), 0.9)) == pytest.approx(0.29)


def test_the_ramp_by_hand():
    ramp = LoRAPrune().schedule()
    # u = (50 - 10) / 80: 0.5 - 0.5 (1 - 0.5)^3
    assert [ramp.value(t, 100) for t in (10, 50, 90, 99)] == pytest.approx([0, 0.4375, 0.5, 0.5])
    assert ramp.updates(100) == [*range(10, 90, 10), 90]


def test_units_left_on_the_way_are_rounded_as_at_the_end():
    heads, neurons = Site("h", "head", (3,), ()), Site("n", "channel", (11,), ())
    rule = Shutting([], {"h": 2, "n": 6}, {}, Schedule(end=0.5))
    assert [rule.count(heads, s) for s in (0, 0.3, 0.34, 0.5)] == [3, 3, 2, 2]
    assert [rule.count(neurons, s) for s in (0, 0.25, 0.4375, 0.5)] == [11, 9, 7, 6]
    rounded = Shutting([], {"n": 8}, {}, Schedule(end=0.5))  # 8 of 11 as a multiple of 8: a way of 3
    assert [rounded.count(neurons, s) for s in (0, 0.25, 0.5)] == [11, 10, 8]


# Layers


def test_a_layer_with_an_adapter_is_its_merged_weight_and_masked_outputs_are_zero():
    draw = torch.Generator().manual_seed(0)
    layer = nn.Linear(3, 4)
    low = LowRank(layer.weight, 2).start_at_zero_(draw)
    low.b.data.normal_(generator=draw)
    found = Adapted(Part("weight", (4, 3)), layer.weight, low, 0.5)
    x = torch.randn(5, 3, generator=draw)
    with hooked(layer, {"weight": found}):
        found.mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        out = layer(x)
    merged = nn.functional.linear(x, found.merged(), layer.bias)
    assert torch.allclose(out[:, [0, 2, 3]], merged[:, [0, 2, 3]], atol=1e-6)
    assert bool((out[:, 1] == 0).all())  # its bias too
    assert not layer._forward_hooks


def test_a_weight_stored_inputs_first_is_seen_outputs_first():
    from transformers.pytorch_utils import Conv1D

    draw, layer = torch.Generator().manual_seed(0), Conv1D(4, 3)
    low = LowRank(layer.weight, 2, turned=True).start_at_zero_(draw)
    low.b.data.normal_(generator=draw)
    found = Adapted(Part("weight", (4, 3), turned=True), layer.weight, low, 0.5)
    x = torch.randn(5, 3, generator=draw)
    with hooked(layer, {"weight": found}):
        out = layer(x)
    assert found.merged().shape == (3, 4)
    assert found.weight().shape == (4, 3)
    assert torch.allclose(out, x @ found.merged() + layer.bias, atol=1e-6)


def test_dropout_falls_on_what_is_learnt_alone_and_only_in_training():
    layer = nn.Linear(3, 4)
    found = Adapted(Part("weight", (4, 3)), layer.weight, LowRank(layer.weight, 2).start_at_one_(), 1.0, 0.999)
    x = torch.ones(1, 3)
    with hooked(layer, {"weight": found}):
        assert torch.equal(layer.train()(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert torch.allclose(layer.eval()(x), nn.functional.linear(x, layer.weight + 1, layer.bias))


# Whole runs


@pytest.mark.parametrize("family", ["decoder", "encoder", "vision transformer"])
def test_the_small_model_answers_as_the_masked_one(family, monkeypatch):
    seen, finish = {}, Shutting.finish

    def look(rule, loop):
        finish(rule, loop)
        seen["logits"], seen["keep"] = logits(loop.model.eval(), loop.task), dict(rule.keep)
        seen["moved"] = max(float(layer.low.b.detach().abs().max()) for layer in rule.layers.values())

    monkeypatch.setattr(Shutting, "finish", look)
    task = tiny.make_task(family)
    done = prune(tiny.make_model(family), LoRAPrune(**SMALL), task)
    assert seen["moved"] > 1e-3  # else merging would be no test
    assert torch.allclose(logits(done.model, task), seen["logits"], atol=1e-4)
    cut = {e.site.name: e.keep for e in done.edits if isinstance(e, Remove)}
    assert cut.keys() == seen["keep"].keys()
    assert all(torch.equal(keep, seen["keep"][name]) for name, keep in cut.items())
    assert not any(hasattr(m, "parametrizations") or m._forward_hooks for m in done.model.modules())


@pytest.mark.parametrize("until", [0.9, 1.0])
def test_the_sparsity_is_met_exactly_whatever_the_steps_divide(until):
    done = prune(tiny.trained("decoder"), LoRAPrune(**{**SMALL, "every": 7, "until": until}), tiny.make_task("decoder"))
    assert widths(done.model) == [(32, 1), (32, 1)]
    reached = [value for _, value in done.history.curves["sparsity"]]
    assert reached == sorted(reached)
    assert reached[-1] == pytest.approx(0.5)


def test_one_shot_is_one_cut_at_its_moment():
    method = LoRAPrune(**{**SMALL, "begin": 0.1, "until": 0.1})
    done = prune(tiny.trained("decoder"), method, tiny.make_task("decoder"))
    assert [step for step, _ in done.history.curves["sparsity"]] == [2]
    assert widths(done.model) == [(32, 1), (32, 1)]
    jump = LoRAPrune(**SMALL, curve=Jump()).schedule()
    assert [jump.value(t, 20) for t in (2, 17, 18)] == [0, 0, 0.5]


def test_blocks_at_the_ends_are_left_alone():
    model, task = tiny.decoder(layers=5), tiny.make_task("decoder")
    done = prune(model, LoRAPrune(**{**SMALL, "steps": 4, "spare_first": 0.2, "spare_last": 1}), task)
    assert widths(done.model) == [(64, 2), (32, 1), (32, 1), (32, 1), (64, 2)]
    assert done.ledger.sparsity == pytest.approx(0.5)  # of the blocks that are not spared
    assert not torch.equal(done.model.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)
    sites = [Site(str(i), "head", (4,), (), block=str(i)) for i in range(30)]
    assert Inside().blocks(sites) == [str(i) for i in range(3, 29)]


def test_query_heads_go_with_the_key_value_head_they_read():
    """Query heads 0 and 1 read the first key-value head, 2 and 3 the second."""
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :16] *= 1e-3  # what query heads 0 and 1 say hardly counts
            layer.self_attn.v_proj.weight[:8] *= 1e-3
    done = prune(model, LoRAPrune(**SMALL), task)
    cut = [e for e in done.edits if isinstance(e, Remove) and e.site.kind == "head"]
    assert [e.keep.tolist() for e in cut] == [[False, True]] * 2
    layer = done.model.model.layers[0].self_attn
    assert (layer.q_proj.out_features, layer.k_proj.out_features, layer.o_proj.in_features) == (16, 8, 16)


def test_units_that_say_nothing_go_and_it_costs_little():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix in (layer.mlp.up_proj.weight, layer.mlp.down_proj.weight.T):
                matrix[::2] *= 0.05
    method = {**SMALL, "protect": ("*self_attn*",)}
    done = prune(model, LoRAPrune(**method), task)
    keeps = [e.keep for e in done.edits if isinstance(e, Remove)]
    assert all(int(keep[1::2].sum()) >= 28 for keep in keeps)
    chance = prune(model, LoRAPrune(**method, score=Chance()), task)
    assert loss(done.model, task) < loss(chance.model, task) - 0.1


def scores_of(score, model, task, method, cut, counts, layers):
    """What units are worth after one pass of training data."""
    rule = Shutting(cut, counts, layers, method.schedule(), score, clip=1e9)
    for layer in layers.values():
        layer.frozen.requires_grad_(True)
    with hooked(model, layers):
        for batch in task.batches("train", 64):
            task.loss(model, batch).backward()
    rule.look(Loop(model, torch.optim.SGD(rule.parameters(), 1.0), 1, task))
    torch.optim.SGD(rule.parameters(), 1.0).zero_grad()
    return torch.cat([rule.scores[site.name] for site in cut])


def test_with_as_many_ranks_as_inputs_the_surrogate_is_the_gradient_and_with_fewer_it_ranks_much_alike():
    *given, layers = ready(rank=8)
    exact = scores_of(FullGradient(), *given, layers)
    ranks = torch.stack([v.argsort().argsort() for v in (exact, scores_of(LowRankGradient(), *given, layers))])
    assert float(torch.corrcoef(ranks.double())[0, 1]) > 0.6
    *given, layers = ready(rank=1000)
    for layer in layers.values():
        layer.low.a = nn.Parameter(torch.eye(layer.part.shape[1]))
        layer.low.b = nn.Parameter(torch.zeros(layer.part.shape))
    assert torch.allclose(scores_of(LowRankGradient(), *given, layers), exact, rtol=1e-4)


def test_only_adapters_have_gradients_unless_the_score_reads_the_weights():
    held = {}

    @dataclass(frozen=True)
    class Look:
        whole: ClassVar = False

        def of(self, layer, draw):
            held[layer.part.name] = (layer.frozen.grad is not None, layer.low.b.grad is not None)
            return torch.ones(layer.part.shape)

    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    prune(model, LoRAPrune(**{**SMALL, "steps": 2}, score=Look()), task)
    assert len(held) == 14
    assert set(held.values()) == {(False, True)}
    done = prune(model, LoRAPrune(**SMALL, score=FullGradient()), task)
    assert all(p.grad is None and p.requires_grad for p in done.model.parameters())
    *_, layers = ready()
    small, large = (gradient_bytes(layers.values(), whole) for whole in (False, True))
    weights = [tensors(model)[name] for name in layers]
    assert large == 4 * sum(w.numel() for w in weights)
    assert small == 4 * sum(2 * (w.shape[0] + w.shape[1]) for w in weights)


def test_scores_follow_optimizer_steps_and_what_is_shut_gets_no_gradient():
    """Two batches are accumulated before each step, in a loop of one's own."""
    model, task, method, cut, counts, layers = ready(begin=0.0, until=0.5)
    rule = Shutting(cut, counts, layers, method.schedule())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    looks, look = [], rule.look
    rule.look = lambda loop: (looks.append(loop.step), look(loop))
    optimizer = torch.optim.AdamW(rule.parameters(), 5e-3)
    shut = []
    with hooked(model, layers):
        pruner = attach(optimizer, model, rule, steps=4)
        for i, batch in enumerate(task.batches("train", 64)):
            task.loss(model, batch).backward()
            if i % 2:
                optimizer.step()
                shut.append({name: ~keep for name, keep in rule.keep.items()})
                optimizer.zero_grad()
            if i == 7:
                break
        task.loss(model, batch).backward()
        pruner.finish()
    assert looks == [0, 1, 2, 3]
    for earlier, later in pairwise(shut):
        assert all(bool((later[name] >= gone).all()) for name, gone in earlier.items())
    for site in cut:
        assert int(rule.keep[site.name].sum()) == counts[site.name]
        for part in site.parts:
            if part.makes:
                gone = part.expand(~rule.keep[site.name]).reshape(-1)
                assert bool(layers[part.name].low.b.grad[gone].eq(0).all())
                assert bool(layers[part.name].low.b.grad[~gone].ne(0).any())


def test_what_is_shut_stays_shut_whatever_it_would_be_worth():
    model, task, method, cut, counts, layers = ready()
    rule = Shutting(cut, counts, layers, method.schedule())
    loop = Loop(model, torch.optim.SGD(rule.parameters(), 1.0), 20, task)
    rule.scores = {s.name: torch.arange(s.units).double() for s in cut}
    rule.shut(loop, 0.25)
    gone = {name: ~keep for name, keep in rule.keep.items()}
    rule.scores = {name: -values for name, values in rule.scores.items()}
    rule.shut(loop, 0.5)
    assert not any(bool((rule.keep[name] & before).any()) for name, before in gone.items())
    assert {name: int(keep.sum()) for name, keep in rule.keep.items()} == {s.name: counts[s.name] for s in cut}


def test_scores_that_are_not_finite_are_left_out():
    @dataclass(frozen=True)
    class Broken:
        whole: ClassVar = False

        def of(self, layer, draw):
            return torch.full(layer.part.shape, torch.nan)

    model, task, method, cut, counts, layers = ready()
    rule = Shutting(cut, counts, layers, method.schedule(), Broken())
    loop = Loop(model, torch.optim.SGD(rule.parameters(), 1.0), 1, task)
    rule.look(loop)
    assert all(bool((values == 0).all()) for values in rule.scores.values())
    assert loop.history.notes == ["scores that are not finite were left out of the means"]


def test_a_run_is_taken_up_again_with_scores_masks_and_adapters():
    model, task, method, cut, counts, layers = ready()
    rule = Shutting(cut, counts, layers, method.schedule())
    loop = Loop(model, torch.optim.SGD(rule.parameters(), 1.0), 20, task)
    rule.scores = {s.name: torch.arange(s.units).double() for s in cut}
    rule.shut(loop, 0.5)
    layers[next(iter(layers))].low.b.data.fill_(3.0)
    state = copy.deepcopy(rule.state())
    *_, fresh = ready()
    again = Shutting(cut, counts, fresh, method.schedule())
    again.resume(loop, state)
    with hooked(model, layers):
        first = logits(model, task)
    with hooked(model, fresh):
        assert torch.equal(logits(model, task), first)
    assert all(torch.equal(again.scores[name], values) for name, values in rule.scores.items())


def test_half_precision_stays_what_it_is():
    model, task = tiny.trained("decoder").to(torch.bfloat16), tiny.make_task("decoder")
    done = prune(model, LoRAPrune(**SMALL), task)
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    assert widths(done.model) == [(32, 1), (32, 1)]


def test_budgets_of_other_units_and_widths_in_multiples_are_met():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    done = prune(model, LoRAPrune(**SMALL | {"sparsity": 0.3, "of": "parameters"}), task)
    assert done.ledger.after.parameters == pytest.approx(0.7 * done.ledger.before.parameters, rel=0.05)
    done = prune(model, LoRAPrune(**SMALL | {"sparsity": 0.3, "round_to": 8, "protect": ("*self_attn*",)}), task)
    assert widths(done.model) == [(40, 2), (48, 2)]  # 45 each were asked for


def test_the_small_model_is_saved_and_opened_again(tmp_path):
    model, task = tiny.decoder(layers=3), tiny.make_task("decoder")
    done = prune(model, LoRAPrune(**{**SMALL, "steps": 4, "spare_last": 1}), task)
    save(done, model, tmp_path / "small")
    again = load(tmp_path / "small")
    assert widths(again) == [(32, 1), (32, 1), (64, 2)]
    assert torch.allclose(logits(again, task), logits(done.model, task), atol=1e-5)


# Bad input


def refused(error, found, family="decoder", model=None, **changes):
    with pytest.raises(error, match=found):
        prune(model or tiny.trained(family), LoRAPrune(**{**SMALL, **changes}), tiny.make_task(family))


def test_adapters_that_some_matrices_lack_are_told_of():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    done = prune(model, LoRAPrune(**SMALL, include=("*.v_proj", "*.up_proj")), task)
    assert widths(done.model) == [(32, 1), (32, 1)]
    assert any("no say in what goes" in note and "layers.0.mlp.gate_proj" in note for note in done.notes)
    refused(SettingError, "none of its matrices has one", include=("*.mlp.up_proj",))
    with pytest.raises(SiteError, match="a makes them and is no layer"):
        Shutting([SITE], {"n": 1}, {"b": adapted(COLUMNS, [[1.0, 0.0], [0.0, 2.0]])}, Schedule(end=0.5))
    done = prune(model, LoRAPrune(**SMALL, include=("*.mlp.up_proj",), protect=("*self_attn*",)), task)
    assert widths(done.model) == [(32, 2), (32, 2)]
    with pytest.raises(SiteError, match="none of the matrices chosen is that of a linear layer"):
        LoRAPrune().layers(nn.Sequential(nn.Conv2d(3, 4, 3)), task, [])


def test_a_target_that_cannot_be_met_is_refused():
    refused(BudgetError, "1 would be left, and 2 must be", least=2)
    refused(BudgetError, "it takes none", sparsity=0.01)
    refused(BudgetError, "it takes none", sparsity=0.0)
    refused(SettingError, "there are 2", spare_first=0.5, spare_last=1)


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"steps": 0},
        {"alpha": 0.0},
        {"rate": 0.0},
        {"clip": 0.0},
        {"dropout": 1.0},
        {"smooth": 1.0},
        {"spare_first": 1.0},
        {"spare_last": -1},
        {"sparsity": 1.0},
        {"start": 0.6},
        {"begin": 0.9, "until": 0.1},
        {"every": 0},
        {"of": "pounds"},
        {"least": 0},
        {"warmup": 1.0},
        {"round_to": 0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(SettingError):
        LoRAPrune(**wrong).check()


@pytest.mark.parametrize("kind", [LowRankGradient, FullGradient, WeightSize])
def test_a_power_is_above_zero(kind):
    with pytest.raises(SettingError, match="a power is above 0"):
        kind(power=0.0)


def test_networks_without_heads_and_neurons_of_their_own_are_refused():
    for family in ("cnn", "moe"):
        with pytest.raises(GraphError, match=r"were to be removed|reads"):
            LoRAPrune(**SMALL).run(tiny.make_model(family), tiny.make_task(family))


def test_projections_that_are_not_layers_of_their_own_are_refused():
    attention = nn.MultiheadAttention(8, 2)
    part = Part("attn.in_proj_weight", (24, 8), torch.arange(24).reshape(24, 1) // 4 % 2)
    model = nn.ModuleDict({"attn": attention, "linear": nn.Linear(8, 8)})
    with pytest.raises(ModelError, match="MultiheadAttention holds it"):
        LoRAPrune().layers(model, tiny.make_task("decoder"), [Site("h", "head", (2,), (part,))])
    assert not is_linear(attention.out_proj)


def test_shared_and_gated_weights_are_refused():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="it is one tensor with"):
        LoRAPrune().layers(model, task, [])
    model = tiny.decoder()
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match="behind a gate"):
        LoRAPrune().layers(model, task, [])


def test_a_task_without_a_batch_to_train_on_is_refused():
    with pytest.raises(TaskError, match="a batch is 10000"):
        prune(tiny.trained("decoder"), LoRAPrune(**SMALL), tiny.toy_text(batch=10000))


def test_heads_that_a_norm_runs_over_are_refused_and_can_be_left_alone():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    config = Olmo2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=0, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    model, task = tiny.seeded(lambda: Olmo2ForCausalLM(config).float(), 0), tiny.make_task("decoder")
    with pytest.raises(GraphError, match=r"statistics over all of them(.|\n)*protect="):
        LoRAPrune(**SMALL).run(copy.deepcopy(model), task)
    done = LoRAPrune(**SMALL, protect=("*self_attn*",)).run(model, task)
    assert {edit.site.kind for edit in done.edits if isinstance(edit, Remove)} == {"channel"}
