"""One mask of the residual stream learnt beside adapters, then merged and sliced."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from tiny import decoder, make_model, make_task, trained
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from secateur.axes.hooks import hooked
from secateur.axes.recovery import only
from secateur.edit import Remove, Update, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError, SiteError, TaskError
from secateur.evidence import answered
from secateur.method import prune, tiny
from secateur.methods.pat import (
    Counted,
    Frozen,
    Mixer,
    Pat,
    Settled,
    SharedMask,
    Tuning,
    above_zero,
    identity_loss,
    lift,
    mixed,
    mixing,
    rms_norms,
    slice_,
    soft_mask,
    temperature,
)
from secateur.methods.slicegpt import SliceGPT
from secateur.models import load, save
from secateur.stream import follow
from secateur.train import Snapshot, fit

MASKED = torch.tensor([True, False] * 16)


def mask_of(keep: torch.Tensor, size: float = 0.5, milestone: int = 10) -> SharedMask:
    return SharedMask(torch.where(keep, size, -size), int(keep.sum()), milestone)


def ready(model: nn.Module, task, **changes):
    """A model's stream, norms, mixers that do something, and adapters that do."""
    method, stream = tiny(Pat, **changes), follow(model, task.example)
    mask = mask_of(MASKED)
    mixers, layers = method.mixers(model, stream, mask, task), method.layers(model, task)
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for mixer in mixers.values():
            mixer.scale.copy_(torch.randn(mixer.scale.shape, generator=draw))
        for layer in layers.values():
            layer.low.b.copy_(torch.randn(layer.low.b.shape, generator=draw) * 0.1)
    return stream, rms_norms(model, stream, ""), mask, mixers, layers


# Equations


def test_the_mask_by_hand():
    # S0 = 100: at 10 steps ln 10 / ln 100 = 1/2
    assert temperature(0, 100) == temperature(1, 100) == 1
    assert temperature(10, 100) == pytest.approx(2)
    assert temperature(100, 100) == temperature(500, 100) == math.inf
    assert [lift(step, 100) for step in (0, 20, 50, 80)] == pytest.approx([0.5, 0.3, 0, 0])
    logits = torch.tensor([0.0, math.log(3) / 2])
    assert torch.allclose(soft_mask(logits, 0, 100)[0], torch.tensor(1.0))  # nothing is masked at first
    assert torch.allclose(soft_mask(logits, 10, 100), torch.tensor([0.5 + 0.4, 0.75 + 0.4]))


def test_the_mask_grows_sharp_and_is_exact_from_the_milestone_on():
    mask = SharedMask(torch.tensor([0.1, -0.1, 0.2, 0.3]), 2, 100)
    apart = []
    for mask.step in (1, 10, 50, 90, 99):
        found = mask().detach()
        apart.append(float(found[0] - found[1]))
    assert apart == sorted(apart)
    assert apart[-1] > 0.99
    mask.step = 100
    assert mask().tolist() == [0, 0, 1, 1]  # of three above zero the two largest
    assert mask.settled


def test_the_count_is_straight_through():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0], requires_grad=True)
    found = Counted().count_loss(logits, 3)
    found.backward()
    assert found.item() == 1  # two are above zero
    assert logits.grad.tolist() == [-1, -1, -1, -1]  # too few: all are pushed up
    assert float(above_zero(logits)) == 2
    assert float(Counted(0.5).count_loss(logits, 0)) == 1


def test_settled_pulls_either_side_by_hand():
    logits = torch.tensor([1.0, 0.5, -1.0])
    # |2 - 1| / 1 * 10; ((0.5)^2 + 0) / 2; (0.5)^2
    assert float(Settled().count_loss(logits, 1)) == pytest.approx(10 + 0.125 + 0.25)


def test_a_side_without_logits_is_no_nan():
    logits = torch.zeros(4, requires_grad=True)
    found = Settled().count_loss(logits, 3)
    found.backward()
    assert torch.isfinite(found)
    assert torch.isfinite(logits.grad).all()


def test_the_operator_by_hand():
    down, up = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[0.0], [0.0], [1.0]])
    # L0 h = 3, times v = 2, into the third channel
    assert mixed(torch.tensor([1.0, 2.0, 5.0]), down, torch.tensor([2.0]), up).tolist() == [1, 2, 11]
    # |2 - 1| + |1 - 1|
    assert float(identity_loss(down, up)) == pytest.approx(1)


def test_an_operator_starts_as_the_identity_and_turning():
    model, task = make_model("decoder"), make_task("decoder")
    stream = follow(model, task.example)
    mixers = tiny(Pat).mixers(model, stream, mask_of(MASKED), task)
    assert list(mixers) == ["model.embed_tokens", *(
        f"model.layers.{i}.{name}" for i in range(2) for name in ("self_attn.o_proj", "mlp.down_proj"))]  # fmt: skip
    flow = torch.randn(3, 32)
    for mixer in mixers.values():
        assert torch.equal(mixed(flow, mixer.low.a, mixer.scale, mixer.low.b), flow)
        assert float(identity_loss(mixer.low.a, mixer.low.b)) < 1e-5
    tuning = Tuning(mixers["model.embed_tokens"].mask, mixers, {})
    with mixing(model, mixers):
        tuning.mask.logits.data.zero_()
        assert torch.allclose(answered(model, task.example), answered(make_model("decoder"), task.example), atol=1e-5)


def test_the_mask_comes_after_the_operator():
    mask = mask_of(torch.tensor([True, True, False]), milestone=1)
    mask.step = 1
    low = tiny_low(torch.ones(1, 3), torch.ones(3, 1))
    mixer = Mixer(low, mask)
    mixer.scale.data.fill_(1.0)
    assert mixer(nn.Identity(), (), torch.tensor([1.0, 2.0, 3.0])).tolist() == [7, 8, 0]


def tiny_low(down: torch.Tensor, up: torch.Tensor):
    from secateur.adapters import LowRank

    low = LowRank(torch.empty(3, 3), len(down))
    low.a.data, low.b.data = down, up
    return low


# The small model


def test_the_sliced_model_says_what_the_masked_one_said():
    model, task = trained("decoder"), make_task("decoder")
    model = copy.deepcopy(model)
    stream, norms, mask, mixers, layers = ready(model, task)
    mask.step = mask.milestone
    with hooked(model, layers), mixing(model, mixers):
        masked = answered(model, task.example)
    dense = answered(model, task.example)
    apply_(model, [Update(name, layer.merged()) for name, layer in layers.items()])
    edits = slice_(model, stream, norms, mixers, mask.hard)
    assert model.model.embed_tokens.weight.shape == (64, 16)
    assert isinstance(edits[-1], Remove)
    assert float((answered(model, task.example) - masked).abs().max()) < 1e-4
    assert float((dense - masked).abs().max()) > 1  # so that it means something


def test_large_eps_and_gains_that_are_not_one_are_kept():
    model, task = decoder(rms_norm_eps=0.05, tie_word_embeddings=False, attention_bias=True), make_task("decoder")
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                value.copy_(torch.linspace(0.5, 2.0, len(value)))
    stream, norms, mask, mixers, _ = ready(model, task)
    mask.step = mask.milestone
    with mixing(model, mixers):
        masked = answered(model, task.example)
    slice_(model, stream, norms, mixers, mask.hard)
    assert float((answered(model, task.example) - masked).abs().max()) < 1e-4


class OneMore(nn.Module):
    """An RMSNorm whose gain is stored as what exceeds one, as Gemma's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.linspace(-0.5, 0.5, width)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


class OneMoreRMSNorm(OneMore):
    pass


def test_a_gain_stored_as_what_exceeds_one_is_scaled_with_the_one():
    model, task = decoder(), make_task("decoder")
    for layer in model.model.layers:
        layer.input_layernorm, layer.post_attention_layernorm = OneMoreRMSNorm(32), OneMoreRMSNorm(32)
    stream, norms, mask, mixers, _ = ready(model, task)
    mask.step = mask.milestone
    with mixing(model, mixers):
        masked = answered(model, task.example)
    slice_(model, stream, norms, mixers, mask.hard)
    half = torch.linspace(-0.5, 0.5, 32)[MASKED]
    assert torch.allclose(model.model.layers[0].input_layernorm.weight, (1 + half) * 2**0.5 - 1)
    assert float((answered(model, task.example) - masked).abs().max()) < 1e-4


def test_a_shared_table_is_mixed_where_it_is_written_only():
    model, task = copy.deepcopy(trained("decoder")), make_task("decoder")
    stream, norms, mask, mixers, _ = ready(model, task)
    before = model.lm_head.weight.detach().clone()
    slice_(model, stream, norms, mixers, mask.hard)
    assert torch.equal(model.lm_head.weight, before[:, MASKED])
    mixer = mixers["model.embed_tokens"]
    wanted = mixer.merged(before)[:, MASKED] * 0.5**0.5
    assert torch.allclose(model.model.embed_tokens.weight.double(), wanted, atol=1e-6)
    assert not model.config.tie_word_embeddings


# Training


@pytest.fixture(scope="module")
def done():
    return prune(trained("decoder"), tiny(Pat), make_task("decoder"))


def test_it_ends_with_a_plain_smaller_model_and_tells_the_cost_of_untying(done):
    shapes = {tuple(p.shape) for n, p in done.model.named_parameters() if "norm" in n}
    assert shapes == {(24,)}
    assert not any(module._forward_hooks for module in done.model.modules())
    assert all(p.requires_grad for p in done.model.parameters())
    assert any("has one of its own: 1,536 parameters" in note for note in done.notes)  # 64 words, 24 channels
    assert any(note.startswith("sliced, no logit moves by more than") for note in done.notes)
    assert any("24 largest stayed" in note for note in done.notes)
    assert done.history.densities["stream"] == [(0, 1.0), (10, 0.75)]
    assert done.ledger.after.parameters == sum(p.numel() for p in done.model.parameters())


def test_a_saved_one_is_a_stock_model(done, tmp_path):
    from transformers import AutoModelForCausalLM

    save(done, trained("decoder"), tmp_path / "m")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    example = make_task("decoder").example
    assert stock.config.hidden_size == 24
    assert stock.config.head_dim == 8
    assert torch.allclose(answered(stock, example), answered(load(tmp_path / "m"), example), atol=1e-4)
    assert torch.allclose(answered(stock, example), answered(done.model, example), atol=1e-4)


def test_frozen_channels_are_drawn_by_chance_and_stay():
    first = Frozen().logits(8, 6, torch.Generator().manual_seed(0))
    assert sorted(first.tolist()) == [-0.5, -0.5] + [0.5] * 6
    assert not torch.equal(first, Frozen().logits(8, 6, torch.Generator().manual_seed(1)))
    done = prune(trained("decoder"), tiny(Pat, choice=Frozen()), make_task("decoder"))
    kept = next(e.keep for e in done.edits if isinstance(e, Remove))
    again = prune(trained("decoder"), tiny(Pat, choice=Frozen(), steps=3), make_task("decoder"))
    assert torch.equal(kept, next(e.keep for e in again.edits if isinstance(e, Remove)))
    assert "channels above zero" not in done.history.curves


def test_a_mask_that_learns_leaves_out_what_is_silent():
    # a quarter of the channels are written nothing to: they are what can go
    task = make_task("decoder")
    model = copy.deepcopy(trained("decoder"))
    silent = torch.arange(32) % 4 == 0
    with torch.no_grad():
        model.model.embed_tokens.weight[:, silent] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[silent] = 0
            layer.mlp.down_proj.weight[silent] = 0
    loss = {}
    for name, choice in (("learned", tiny(Pat).choice), ("frozen", Frozen())):
        method = tiny(Pat, choice=choice, steps=60, active=Settled(1.0, 0.1))
        done = prune(model, method, task)
        kept = next(e.keep for e in done.edits if isinstance(e, Remove))
        loss[name] = (int((kept & silent).sum()), task.measure(done.model)["perplexity"])
    assert loss["learned"][0] < loss["frozen"][0]
    assert loss["learned"][1] < loss["frozen"][1]


def test_a_block_run_twice_sees_the_same_mask():
    model, task = decoder(), make_task("decoder")
    _, _, mask, mixers, _ = ready(model, task)
    mask.step = 3
    layer = model.model.layers[0].mlp
    x = torch.randn(1, 4, 32, requires_grad=True)
    found = []
    with mixing(model, mixers):
        for run in (lambda: layer(x), lambda: checkpoint(layer, x, use_reentrant=False)):
            mask.logits.grad = None
            run().square().sum().backward()
            found.append(mask.logits.grad.clone())
    assert torch.allclose(*found)


def test_a_run_is_taken_up_again_where_it_was():
    task = make_task("decoder")

    def start():
        model = copy.deepcopy(trained("decoder"))
        _, _, mask, mixers, layers = ready(model, task)
        rule = Tuning(mask, mixers, layers)
        return model, rule, torch.optim.SGD(rule.parameters(), 1e-3)

    kept = []
    model, rule, optimizer = start()
    with only(model, ()), hooked(model, rule.layers), mixing(model, rule.mixers):
        fit(model, task, 12, [rule], optimizer,
            watch=lambda loop: kept.append(Snapshot.of(loop.model, loop)) if loop.step == 7 else None)  # fmt: skip
    again, other, optimizer = start()
    with only(again, ()), hooked(again, other.layers), mixing(again, other.mixers):
        fit(again, task, 12, [other], optimizer, resume_from=kept[0])
    assert all(torch.equal(a, b) for a, b in zip(rule.parameters(), other.parameters(), strict=True))
    assert (rule.above, other.mask.settled) == (other.above, True)


def test_the_mask_is_left_alone_from_the_milestone_on():
    task, model = make_task("decoder"), copy.deepcopy(trained("decoder"))
    _, _, mask, mixers, layers = ready(model, task)
    rule, seen = Tuning(mask, mixers, layers), []
    with only(model, ()), hooked(model, layers), mixing(model, mixers):
        optimizer = torch.optim.AdamW(rule.parameters(), 1e-2)
        fit(model, task, 14, [rule], optimizer, watch=lambda loop: seen.append(mask.logits.detach().clone()))
    assert not torch.equal(seen[8], seen[9])
    assert all(torch.equal(seen[9], later) for later in seen[10:])


def test_half_precision_trains_in_float32():
    model, task = copy.deepcopy(trained("decoder")).to(torch.bfloat16), make_task("decoder")
    done = prune(model, tiny(Pat, steps=6), task)
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    _, _, mask, mixers, layers = ready(model, task)
    assert {p.dtype for p in Tuning(mask, mixers, layers).parameters()} == {torch.float32}


# Bad input


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"rank": 0}, "the first three start at 1"),
        ({"operator_rank": 0}, "the first three start at 1"),
        ({"round_to": 0}, "the first three start at 1"),
        ({"steps": 2}, "steps at 3"),
        ({"rate": 0.0}, "they are above 0"),
        ({"reach": -1.0}, "they are above 0"),
        ({"clip": 0.0}, "they are above 0"),
        ({"milestone": 0.0}, "a milestone is a fraction"),
        ({"dropout": 1.0}, "a milestone is a fraction"),
        ({"warmup": 1.0}, "a warm-up of 1"),
        ({"identity": -1.0}, "a weight is 0 or more"),
    ],
)
def test_settings_that_cannot_work(changes, said):
    with pytest.raises(SettingError, match=said):
        tiny(Pat, **changes).check()


def test_parts_that_cannot_work():
    with pytest.raises(SettingError, match="a weight is 0 or more"):
        Counted(-1.0)
    with pytest.raises(SettingError, match="a weight is 0 or more"):
        Settled(1.0, float("nan"))
    with pytest.raises(SettingError, match="a size is above 0"):
        Frozen(0.0)


@pytest.mark.parametrize(("changes", "said"), [
    ({"sparsity": 0.01}, "it takes no channel"),
    ({"sparsity": 0.0}, "it takes no channel"),
    ({"sparsity": 0.9, "round_to": 8}, "no channel is left"),
])  # fmt: skip
def test_a_width_that_cannot_be(changes, said):
    with pytest.raises(BudgetError, match=said):
        tiny(Pat, **changes).run(make_model("decoder"), make_task("decoder"))
    assert tiny(Pat, sparsity=0.3, round_to=8).width(32) == 16
    with pytest.raises(BudgetError, match=r"no channel is left.\nGive a smaller round_to"):
        tiny(Pat, round_to=64).width(32)


def test_the_callers_generator_is_left_alone():
    before = torch.get_rng_state()
    tiny(Pat, steps=3).run(copy.deepcopy(trained("decoder")), make_task("decoder"))
    assert torch.equal(torch.get_rng_state(), before)


def test_layer_norms_are_refused():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=64, hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    with pytest.raises(GraphError, match=r"subtracts the mean .*\n.*RMSNorm"):
        tiny(Pat).run(OPTForCausalLM(config).eval(), make_task("decoder"))


def test_scaled_embeddings_are_refused():
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    with pytest.raises(GraphError, match=r"embed_tokens.weight goes through 'mul'"):
        tiny(Pat).run(GemmaForCausalLM(config).eval(), make_task("decoder"))


def test_matrices_that_cannot_be_adapted():
    model, task = make_model("decoder"), make_task("decoder")
    stream, mask = follow(model, task.example), mask_of(MASKED)
    with pytest.raises(SiteError):
        tiny(Pat, include=("norm",), exclude=()).layers(model, task)
    mlp = model.model.layers[0].mlp
    mlp.up_proj.weight = mlp.gate_proj.weight
    with pytest.raises(ModelError, match=r"put on .*gate_proj.weight, but it is shared.*\n.*exclude=model.layers.0"):
        tiny(Pat).layers(model, task)
    parametrize.register_parametrization(mlp.down_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match=r"what model.layers.0.mlp.down_proj writes"):
        tiny(Pat).mixers(model, stream, mask, task)


def test_an_adapter_goes_beside_the_weight_of_a_layer_only():
    done = prune(trained("decoder"), tiny(SliceGPT), make_task("decoder"))
    found = tiny(Pat).layers(done.model, make_task("decoder"))
    assert "model.layers.0.self_attn.o_proj.weight" in found
    assert not any(name.endswith("shortcut") for name in found)
    assert "model.layers.1.mlp.down_proj.weight" not in found  # what it makes is handed to the last norm, of full width
    assert len(found) == 13


def test_too_little_data_is_told_before_training():
    task = make_task("decoder")
    short = replace(task, ids={**task.ids, "train": task.ids["train"][: task.window]})
    with pytest.raises(TaskError):
        tiny(Pat).run(make_model("decoder"), short)


def test_a_model_that_does_something_else_with_its_stream_is_not_handed_back():
    method = tiny(Pat)
    said = torch.randn(4, 5).double()
    method.compare(make_model("decoder"), said * 1e-5, said)
    with pytest.raises(GraphError, match="does something with its stream unseen"):
        method.compare(make_model("decoder"), said * 0.01, said)


def test_a_loop_logs_how_many_are_above_zero(done):
    points = done.history.curves["channels above zero"]
    assert [step for step, _ in points] == list(range(10))
