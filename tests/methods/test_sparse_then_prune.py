"""Sparse then prune (paper 11): the penalty by hand, its sign and size, taps on every kind of attention, the sweep."""

import copy
import json
from dataclasses import replace
from math import log

import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import nn
from torch.nn import functional as F

from secateur.cli import main
from secateur.errors import ModelError, SettingError
from secateur.method import load, prune
from secateur.methods.sparse_then_prune import (
    All,
    AttentionPenalty,
    AttentionTap,
    Best,
    Last,
    SparseThenPrune,
    attend,
    attention_of,
    entropy,
    log_penalty,
    smallest,
    sweep,
)
from secateur.task import Around, Batch
from secateur.tasks.learners import Sgd
from secateur.train import History, Loop, Snapshot, attach, fit

SMALL = SparseThenPrune(sparsity=0.5, steps=6, validate=3, sweep=(0.3, 0.6))


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# The penalty


def test_the_penalty_by_hand():
    attention = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]]]])
    # log 1.25, log 1.25, log 2, log 1 over four
    assert float(log_penalty(attention)) == pytest.approx((2 * 0.22314355 + 0.69314718) / 4)
    assert float(entropy(attention)) == pytest.approx(0.69314718 / 2)


def test_it_is_smallest_for_flat_rows_and_largest_for_sparse_ones():
    flat, sparse = torch.full((1, 1, 50, 50), 1 / 50), torch.eye(50)[None, None]
    some = normal(200, 1, 50, 50).mul(3).softmax(-1)
    found = [float(log_penalty(each)) for each in some]
    assert float(log_penalty(flat)) < min(found)
    assert max(found) < float(log_penalty(sparse))
    assert float(log_penalty(flat)) == pytest.approx(log(1 + 1 / 2500))  # about 1 / T^2
    assert float(log_penalty(sparse)) == pytest.approx(log(2) / 50)  # at 0.01, 1.4e-4 beside a loss of tenths


def test_the_penalty_flattens_attention():
    assert load("sparse_then_prune") is SparseThenPrune
    task, ends = tiny.toy_images(), {}
    for strength in (0.0, 100.0, -1.0):
        method = SparseThenPrune(strength=strength, layers=All(), steps=25, validate=0, sweep=())
        outcome = method.run(tiny.trained("vision transformer"), task)
        ends[strength] = outcome.history.curves["attention entropy"][-1][1]
        said = any("towards flat attention, not towards sparse" in note for note in outcome.notes)
        assert said == (strength > 0)
    assert ends[-1.0] < ends[0.0] - 0.001
    assert ends[0.0] < ends[100.0] - 0.01
    assert ends[100.0] <= log(5) + 1e-6


def test_the_last_layer_or_the_mean_of_all():
    model, task = tiny.trained("vision transformer"), tiny.toy_images()
    batch = next(iter(task.batches("train")))
    terms = [float(log_penalty(each)) for each in attention_of(model, batch)]
    assert len(terms) == 2
    for layers, wanted in ((Last(), terms[1]), (All(), sum(terms) / 2)):
        rule = AttentionPenalty(2.0, layers)
        loop = Loop(model.train(), torch.optim.SGD(model.parameters(), 0.1), 1, task, (rule,))
        rule.start(loop)
        value = task.loss(model, batch)
        assert float((rule.loss(loop, value) - value).detach()) == pytest.approx(2 * wanted, rel=1e-3)
        rule.finish(loop)


# The tap


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, True, False, True, True]])},
        {"attn_mask": normal(6, 5, seed=3)},
    ],
)
def test_the_formula_gives_what_the_fused_kernel_gives(given):
    query, key, value = normal(2, 4, 6, 8), normal(2, 4, 5, 8, seed=1), normal(2, 4, 5, 3, seed=2)
    out, found = attend(query, key, value, **given)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(query, key, value, **given))
    torch.testing.assert_close(found.sum(-1), torch.ones(2, 4, 6))


def test_grouped_queries_and_rows_that_see_nothing():
    query, key, value = (normal(2, h, 5, 8, seed=h).requires_grad_() for h in (4, 2, 2))
    mask = torch.ones(5, 5, dtype=torch.bool).tril(-1)
    out, found = attend(query, key, value, attn_mask=mask, enable_gqa=True)
    torch.testing.assert_close(
        out[..., 1:, :], F.scaled_dot_product_attention(query, key, value, mask, enable_gqa=True)[..., 1:, :]
    )
    assert not bool(found[..., 0, :].any())
    out.sum().backward()
    assert all(bool(torch.isfinite(each.grad).all()) for each in (query, key, value))


class Written(nn.Module):
    """A model that writes its attention out, with a softmax over classes that is none."""

    def __init__(self, way):
        super().__init__()
        self.qkv, self.out, self.way = nn.Linear(8, 24), nn.Linear(8, 4), way

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        a = self.way(q @ k.transpose(-2, -1) / 2)
        return self.out((a @ v).transpose(1, 2).flatten(2)).softmax(-1).mean(1)


WAYS = {
    "F.softmax": lambda x: F.softmax(x, dim=-1),
    "torch.softmax": lambda x: torch.softmax(x, -1),
    "method": lambda x: x.softmax(dim=3),
    "module": nn.Softmax(dim=-1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_softmax_of_ones_own_is_seen_once_and_others_are_not(way):
    (found,) = attention_of(Written(WAYS[way]), Batch((normal(3, 5, 8),)))
    assert found.shape == (3, 2, 5, 5)
    torch.testing.assert_close(found.sum(-1), torch.ones(3, 2, 5))


def test_many_heads_of_torch_are_seen_and_answer_as_before():
    layer = tiny.seeded(lambda: nn.MultiheadAttention(8, 2, batch_first=True), 0)
    x = normal(3, 5, 8)
    for asked in ({"need_weights": False}, {}, {"average_attn_weights": False}):
        plain = layer(x, x, x, **asked)
        with AttentionTap() as tap:
            tapped = layer(x, x, x, **asked)
        torch.testing.assert_close(tapped[0], plain[0])
        assert (tapped[1] is None) == (plain[1] is None)
        if plain[1] is not None:
            torch.testing.assert_close(tapped[1], plain[1])
        assert [each.shape for each in tap.seen] == [(3, 2, 5, 5)]
    stack = tiny.seeded(lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2), 0)
    assert len(attention_of(stack, Batch((x,)))) == 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["vision transformer", "decoder", "encoder"])
def test_every_layer_of_transformers_is_seen_whatever_computes_it(family, implementation):
    model, task = tiny.make_model(family), tiny.make_task(family)
    model.config._attn_implementation = implementation
    batch = next(iter(task.batches("val")))
    with torch.no_grad():
        plain = batch.through(model).logits
        with AttentionTap() as tap:
            torch.testing.assert_close(batch.through(model).logits, plain, rtol=1e-4, atol=1e-4)
    assert len(tap.seen) == 2
    assert all(each.shape[1] == 4 for each in tap.seen)


def test_the_tap_is_off_in_eval_mode_and_gone_after_training():
    model, task = tiny.trained("vision transformer"), tiny.toy_images()
    rule = AttentionPenalty(0.01)
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), 1, task, (rule,))
    rule.start(loop)
    task.example.through(model.eval())
    assert not rule._seen
    task.example.through(model.train())
    assert len(rule._seen) == 1
    rule.finish(loop)
    assert not model._forward_hooks
    assert not model._forward_pre_hooks


def test_a_pass_that_fails_leaves_no_tap_behind():
    model, task = tiny.trained("vision transformer").train(), tiny.toy_images()
    rule = AttentionPenalty(0.01)
    rule.start(Loop(model, torch.optim.SGD(model.parameters(), 0.1), 1, task, (rule,)))
    with pytest.raises(ValueError, match="channel"):
        model(torch.zeros(2, 1, 8, 8))
    assert not rule._open
    assert torch.overrides._get_current_function_mode() is None


def test_two_lines_in_a_loop_of_ones_own_with_accumulated_gradients():
    model, task = tiny.trained("vision transformer").train(), tiny.toy_images()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    pruner = attach(optimizer, model, AttentionPenalty(1.0), steps=2)
    batches = iter(task.batches("train"))
    for _ in range(2):
        for _ in range(2):
            pruner.loss(task.loss(model, next(batches))).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(pruner.finish().curves["attention penalty"]) == 4


def test_it_has_a_second_derivative_though_fused_attention_has_none():
    model, task = tiny.trained("vision transformer").train(), tiny.toy_images()
    rule = AttentionPenalty(1.0, All())
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), 1, task, (rule,))
    rule.start(loop)
    value = rule.loss(loop, task.loss(model, next(iter(task.batches("train")))))
    weight = model.vit.layers[0].attention.q_proj.weight if hasattr(model.vit, "layers") else next(model.parameters())
    (slope,) = torch.autograd.grad(value, weight, create_graph=True)
    (second,) = torch.autograd.grad(slope.square().sum(), weight)
    assert bool(second.any())
    rule.finish(loop)


@pytest.mark.parametrize("family", ["mlp", "cnn", "rnn"])
def test_a_model_without_attention_is_refused_before_it_is_trained(family):
    model = tiny.trained(family)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="no softmax attention was found"):
        SMALL.run(model, tiny.make_task(family))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(ModelError, match="no softmax attention was found"):
        fit(model, tiny.make_task(family), 1, [AttentionPenalty()])


# What is pruned


def test_patches_blocks_and_classifier_compete_and_positions_and_norms_do_not():
    model = tiny.trained("vision transformer")
    names = {site.name for site in SMALL.sites(model)}
    matrices = {n for n, p in model.named_parameters() if n.endswith("weight") and p.dim() >= 2}
    assert names == matrices
    assert "classifier.weight" in names
    assert any("patch_embeddings" in name for name in names)
    assert not any("position" in name or "cls_token" in name for name in names)
    more = {site.name for site in replace(SMALL, norms=True).sites(model)} - names
    assert len(more) == 4  # two in each of two blocks, and not the last of all
    assert all("norm" in name for name in more)


def test_the_smallest_of_the_whole_network_go_exactly_as_many_as_asked():
    model = tiny.trained("vision transformer")
    outcome = prune(model, SMALL, tiny.toy_images())
    units = sum(mask.site.units for mask in outcome.edits)
    assert sum(mask.kept for mask in outcome.edits) == units - units // 2
    assert len({round(mask.kept / mask.site.units, 3) for mask in outcome.edits}) > 3  # one threshold, many shares
    assert any("one threshold took" in note for note in outcome.notes)
    kept = torch.cat([outcome.model.get_parameter(m.site.name)[m.keep].abs() for m in outcome.edits])
    whole = smallest(tiny.trained("vision transformer"), SMALL.sites(model), 0.5)
    gone = torch.cat([model.get_parameter(m.site.name)[~m.keep].abs() for m in whole])
    left = torch.cat([model.get_parameter(m.site.name)[m.keep].abs() for m in whole])
    assert float(gone.max()) <= float(left.min())
    assert bool((kept > 0).all())


def test_each_ratio_of_a_sweep_starts_from_the_whole_model():
    model, task = tiny.trained("vision transformer"), tiny.toy_images()
    before, sites = Snapshot.of(model).model, SMALL.sites(model)
    there = sweep(model, task, sites, (0.2, 0.9))
    back = sweep(model, task, sites, (0.9, 0.2))
    assert there == back
    assert there[0.2] > there[0.9]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with pytest.raises(SettingError, match="the fraction removed"):
        sweep(model, task, sites, (0.2, 1.0))


def test_the_weights_of_the_lowest_validation_loss_are_pruned():
    model = tiny.mlp()
    rule, states = Best(), {}
    loop = Loop(model, torch.optim.SGD(model.parameters(), 0.1), 4, history=History())
    for step, loss in enumerate((0.5, 0.3, 0.3, 0.9), 1):
        loop.step = step
        with torch.no_grad():
            model[0].weight.fill_(step)
        loop.log("validation loss", loss)
        rule.after_step(loop)
        states[step] = copy.deepcopy(rule.state())
    again = Best()
    again.resume(loop, states[3])
    again.after_step(loop)
    for each in (rule, again):
        with torch.no_grad():
            model[0].weight.fill_(9)
        each.finish(loop)
        assert each.step == 2
        assert float(model[0].weight.detach().mean()) == 2  # the first of equals


def test_without_the_penalty_it_is_plain_fine_tuning():
    task = tiny.toy_images()
    model, other = tiny.trained("vision transformer"), tiny.trained("vision transformer")
    replace(SMALL, strength=0.0, validate=0, sweep=()).run(model, task)
    from secateur.axes import Cosine
    from secateur.axes.rules import LearningRate
    from secateur.edit import apply_

    fit(other, task, 6, [LearningRate(Cosine(), 0.1)])
    apply_(other, smallest(other, SMALL.sites(other), 0.5))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_run_taken_up_again_is_the_run_that_was_not_interrupted(tmp_path):
    task = tiny.toy_images()
    whole, other = tiny.trained("vision transformer"), tiny.make_model("vision transformer")

    def keep(loop):
        if loop.step == 3:
            Snapshot.of(whole, loop).save(tmp_path / "snapshot.safetensors")

    def rules():
        return [AttentionPenalty(1.0), Best()]

    fit(whole, task, 6, rules(), Sgd(0.05)(whole.parameters()), watch=keep)
    start = Snapshot.load(tmp_path / "snapshot.safetensors")
    fit(other, task, 6, rules(), Sgd(0.05)(other.parameters()), resume_from=start)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), other.parameters(), strict=True))


def test_what_the_command_line_saves_is_loaded_by_stock_transformers(tmp_path):
    from transformers import ViTForImageClassification

    out = tmp_path / "out"
    verb = ["prune", "tiny:vision_transformer", "sparse_then_prune", "--task", "tiny:toy_images", "--steps", "3"]
    done = CliRunner().invoke(main, [*verb, "--layers", "all", "--sparsity", "0.6", "--json", "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["settings"]["layers"] == "all"
    model = ViTForImageClassification.from_pretrained(out)
    sites = SMALL.sites(model)
    zeros = sum(int((model.get_parameter(site.name) == 0).sum()) for site in sites)
    assert zeros == int(0.6 * sum(site.units for site in sites))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"strength": float("nan")}, "it is not finite"),
        ({"strength": float("inf")}, "it is not finite"),
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"sweep": (0.5, 1.0)}, "sweep's sparsity"),
        ({"steps": 0}, "one step at least"),
        ({"validate": -1}, "no negative number"),
        ({"warmup": 1.0}, "a warm-up of 1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.vision_transformer(), SparseThenPrune(**given), task=None)


def test_a_run_that_ends_early_leaves_no_hooks() -> None:
    model, task = tiny.decoder(), tiny.make_task("decoder")

    class Ends(Around):
        def loss(self, model, batch):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(model, SparseThenPrune(steps=2), Ends(task), inplace=True)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
