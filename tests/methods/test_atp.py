"""Adapters learn under masks that a generator proposes; then what was masked is cut."""

import copy
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from secateur import plan
from secateur.adapters import LowRank
from secateur.axes.hooks import hooked
from secateur.axes.recovery import only
from secateur.edit import Mask, Remove, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError, SiteError, TaskError
from secateur.graph import couple, removals
from secateur.graph.head_dims import RotaryAttention, narrowable_, rotated
from secateur.method import prune
from secateur.methods import atp
from secateur.methods.atp import (
    ATP,
    Guided,
    Proposals,
    Proposing,
    SmallestDirections,
    budget_loss,
    gumbel,
    hard_mask,
    ramp,
    shrunk,
    slice_norms,
    slices,
    soft_mask,
    weights_of,
)
from secateur.methods.slicegpt import SliceGPT
from secateur.models import llama_shaped, load, save
from secateur.site import Part, Site
from secateur.train import Loop, Snapshot, fit

FAST = Proposals(rate=2e-2, samples=16, draws=2)
SMALL = {"steps": 16, "rate": 5e-3, "rank": 2, "dropout": 0.0, "proposals": FAST}

# Two neurons: rows of a [2, 2], columns of b [2, 2].
ROWS = Part("a", (2, 2), torch.tensor([[0], [1]]))
COLUMNS = Part("b", (2, 2), torch.tensor([[0, 1]]))
SITE = Site("n", "channel", (2,), (ROWS, COLUMNS))


def layer(part, weight=((1.0, 0.0), (0.0, 2.0)), a=((1.0, 1.0),), b=((3.0,), (4.0,))):
    low = LowRank(torch.tensor(weight), 1)
    low.a.data, low.b.data = torch.tensor(a), torch.tensor(b)
    return Guided(part, nn.Parameter(torch.tensor(weight)), low)


def logits(model, task):
    with torch.no_grad():
        return task.example.through(model).logits


def ready(model=None, **changes):
    model, task = model or tiny.trained("decoder"), tiny.make_task("decoder")
    method = ATP(**{**SMALL, **changes})
    return model, task, method, method.prepared(model, task)


def loop_of(model, rule, task, steps=16):
    return Loop(model, torch.optim.SGD(rule.parameters(), 0.1), steps, task)


@pytest.fixture(autouse=True)
def _couple_once(monkeypatch):
    """Following a model takes longer than all else here, and says the same of models of one form."""
    monkeypatch.setattr(atp, "couple", coupled)


def coupled(model, example):
    form = tuple((name, tuple(value.shape), value.dtype) for name, value in model.state_dict().items())
    if form not in COUPLINGS:
        COUPLINGS[form] = couple(model, example)
    return COUPLINGS[form]


COUPLINGS = {}


# Equations


def test_a_mask_starts_open_and_its_gradient_is_that_of_the_soft_one():
    logit = torch.tensor([0.0, -3.0, -3.4], requires_grad=True)
    soft = soft_mask(logit, torch.zeros(3))
    # sigmoid(3 / 0.4), sigmoid(0), sigmoid(-1)
    assert soft.tolist() == pytest.approx([1 / (1 + math.exp(-7.5)), 0.5, 1 / (1 + math.e)])
    hard = hard_mask(soft)
    assert hard.tolist() == [1, 1, 0]
    hard.sum().backward()
    assert logit.grad.tolist()[1:] == pytest.approx([0.25 / 0.4, math.e / (1 + math.e) ** 2 / 0.4])


def test_noise_is_gumbels_and_keeps_nearly_all_at_first():
    noise = gumbel((200_000,), torch.Generator().manual_seed(0))
    assert bool(noise.isfinite().all())
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.01)
    assert float(noise.std()) == pytest.approx(math.pi / math.sqrt(6), abs=0.01)
    # P(g > -3) = 1 - exp(-exp(3)): all; at a logit of -3 P(g > 0) = 1 - 1/e
    assert bool(hard_mask(soft_mask(torch.zeros(1), noise)).all())
    half = hard_mask(soft_mask(torch.full((1,), -3.0), noise)).mean()
    assert float(half) == pytest.approx(1 - math.exp(-1), abs=0.01)


def test_the_loss_of_the_budget_by_hand():
    kept = torch.tensor(0.8, requires_grad=True)
    loss = budget_loss(kept, 0.6)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(0.8 / 0.6))
    assert float(kept.grad) == pytest.approx(1 / 0.8)  # down
    kept = torch.tensor(0.3, requires_grad=True)
    loss = budget_loss(kept, 0.6)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert float(kept.grad) == pytest.approx(-1 / 0.3)  # up
    assert float(budget_loss(torch.tensor(0.6), 0.6)) == 0
    assert math.isfinite(float(budget_loss(torch.tensor(0.0), 0.6)))


def test_what_is_drawn_to_zero_by_hand():
    assert shrunk(torch.tensor([5.0, 1.0, 0.5, 0.0]), 1.0).tolist() == pytest.approx([0.8, 0, 0, 0])
    assert ramp(0.0) == 0
    assert ramp(1.0) == 1
    assert ramp(0.5) == pytest.approx((math.exp(0.5) - 1) / (math.e - 1))


def test_a_unit_owns_rows_of_b_where_it_is_made_and_columns_of_a_where_it_is_read():
    made, read = layer(ROWS), layer(COLUMNS, a=((4.0, 0.0),))
    owned, named = slices(SITE, {"a": made, "b": read})
    # Unit 0: 3 in B of a, 4 in A of b. Unit 1: 4 and 0.
    assert slice_norms(owned, named).tolist() == [5, 4]
    assert owned.cost().tolist() == [2, 2]
    assert slices(SITE, {"a": Guided(ROWS, made.frozen, None)}) is None
    assert [p.name for p in slices(SITE, {"a": made})[0].parts] == ["a.b"]


def test_only_what_is_frozen_is_masked_while_adapters_learn():
    linear, adapted = nn.Linear(2, 2), layer(ROWS)
    linear.weight.data, linear.bias.data = adapted.frozen.data, torch.tensor([10.0, 20.0])
    x = torch.tensor([[1.0, 2.0]])
    linear.register_forward_hook(adapted)
    # W x + b = [11, 24]; B A x = [9, 12]
    assert linear(x).tolist() == [[20, 36]]
    adapted.mask = torch.tensor([0.0, 1.0])
    assert linear(x).tolist() == [[9, 36]]
    adapted.soft = torch.tensor([0.5, 1.0])  # while something is proposed, all of it
    assert linear(x).tolist() == [[10, 36]]
    assert adapted.merged().tolist() == [[4, 3], [4, 6]]


def test_the_smallest_directions_leave_the_product_as_it_was():
    found = layer(ROWS)  # singular values 2 and 1; the smallest is along the first axis
    SmallestDirections().start_(found, torch.Generator())
    assert found.low().abs().tolist() == [[1, 0], [0, 0]]
    assert found.frozen.tolist() == [[0, 0], [0, 2]]
    assert found.merged().tolist() == [[1, 0], [0, 2]]


def test_units_cost_what_they_own_of_each_matrix_with_grouped_queries():
    """d = 32, four query heads over two key-value heads of 8: 4 pairs, 8 dims; 64 neurons."""
    model, _, _, work = ready()
    costs = {site.name: weights_of(site) for site in work.sites if site.block.endswith("0")}
    assert [(name.rpartition(".")[2], len(cost), cost.unique().tolist()) for name, cost in costs.items()] == [
        ("keys", 4, [2 * 32 * (4 + 2)]),
        ("values", 8, [32 * (4 + 2)]),
        ("mlp", 64, [3 * 32]),
    ]
    matrices = [p for name, p in model.named_parameters() if "proj" in name]
    assert work.rule.total == sum(p.numel() for p in matrices)


# Cutting


@pytest.mark.parametrize("biased", [False, True])
def test_pairs_and_dims_that_are_cut_count_as_if_they_were_zero(biased):
    model, task = tiny.decoder(attention_bias=biased), tiny.make_task("decoder")
    before = logits(model, task)
    sites, edits = narrowable_(model, task.example)
    assert len(edits) == 2
    assert torch.allclose(logits(model, task), before, atol=1e-6)
    draw = torch.Generator().manual_seed(0)
    keep = {site.name: torch.rand(site.shape, generator=draw) > 0.4 for site in sites}
    masked = copy.deepcopy(model)
    apply_(masked, [Mask(site, keep[site.name]) for site in sites])
    apply_(model, removals(sites, keep))
    assert torch.allclose(logits(model, task), logits(masked, task), atol=1e-5)
    assert not torch.allclose(logits(model, task), before, atol=0.1)
    attention = model.model.layers[0].self_attn
    pairs, dims = (int(keep[f"model.layers.0.self_attn.{kind}"].sum()) for kind in ("keys", "values"))
    assert (attention.q_proj.out_features, attention.k_proj.out_features) == (8 * pairs, 4 * pairs)
    assert (attention.v_proj.out_features, attention.o_proj.in_features) == (2 * dims, 4 * dims)
    # Token by token, with keys and values from a cache, as all at once.
    said = model.generate(torch.arange(5)[None], max_new_tokens=4, do_sample=False)
    assert torch.equal(model(said).logits[0, 4:-1].argmax(-1), said[0, 5:])


def test_what_was_masked_in_training_is_cut_without_a_change():
    """With a lasso; without one the adapters of what is condemned go on, and the cut takes them."""
    gaps = {}
    for lasso in (4.0, 0.0):
        model, task, method, work = ready(copy.deepcopy(tiny.trained("decoder")), lasso=lasso, steps=40)
        history = method.tuned(model, task, work.rule)
        with hooked(model, work.rule.layers):
            masked = logits(model, task)
        done = method.cut(model, work, history)
        gaps[lasso] = float((logits(done.model, task) - masked).abs().max())
        assert (
            max(float(v.low.b.detach().abs().max()) for v in work.rule.layers.values()) > 1e-3
        )  # else it would be no test
        ends = done.history.curves["condemned"][-1][1]
        assert (ends == 0) == bool(lasso)
        assert not any(hasattr(m, "parametrizations") or m._forward_hooks for m in done.model.modules())
    assert gaps[4.0] < 1e-4
    assert gaps[0.0] > 0.1


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.6])
def test_the_budget_is_met_to_the_cheapest_unit(sparsity):
    done = prune(tiny.trained("decoder"), ATP(**{**SMALL, "sparsity": sparsity}), tiny.make_task("decoder"))
    total = sum(p.numel() for n, p in tiny.trained("decoder").named_parameters() if "proj" in n)
    left = sum(p.numel() for n, p in done.model.named_parameters() if "proj" in n)
    assert 0 <= sparsity - (1 - left / total) < 96 / total
    assert done.history.curves["kept"][-1][1] == pytest.approx(left / total)
    assert len(done.edits) == 2 + 14 + 6


def test_a_site_keeps_its_best_units_whatever_is_proposed():
    model, task, _, work = ready(least=2)
    rule = work.rule
    with torch.no_grad():
        for head in rule.proposer.heads:
            head.weight.copy_(head.weight * 1e-3)
        rule.proposer.norm.bias.fill_(1.0)
        for head in rule.proposer.heads:
            head.weight[:, 0] -= 100.0
            head.weight[2:, 0] -= 1.0
    rule.decide(loop_of(model, rule, task))
    for keep in rule.keep.values():
        assert keep.nonzero().flatten().tolist() == [0, 1]


def test_the_cut_model_is_saved_and_opened_again(tmp_path):
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    before = torch.get_rng_state()
    done = prune(model, ATP(**SMALL), task)
    save(done, model, tmp_path / "small")
    again = load(tmp_path / "small")
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the caller's
    assert isinstance(again.model.layers[0].self_attn, RotaryAttention)
    assert torch.allclose(logits(again, task), logits(done.model, task), atol=1e-5)


def test_a_narrowed_attention_is_not_taken_for_one_with_fewer_heads():
    """Half of the pairs and of the dims: as wide as half of the heads."""
    model, task = tiny.decoder(), tiny.make_task("decoder")
    assert llama_shaped.why_not(model) == ""
    sites, _ = narrowable_(model, task.example)
    apply_(model, removals(sites, {site.name: torch.arange(site.units) % 2 == 0 for site in sites}))
    assert "layer 0: dims of its heads may be gone" in llama_shaped.why_not(model)
    assert llama_shaped.per_layer_config(model, model.config) == {}


def test_it_goes_on_from_what_was_cut_before():
    """Heads first, and then dims twice."""
    model, task = copy.deepcopy(tiny.trained("decoder")), tiny.make_task("decoder")
    heads = coupled(model, task.example).of("head")
    apply_(model, removals(heads, {site.name: torch.tensor([True, False]) for site in heads}))
    first = ATP(**SMALL).run(model, task)
    assert len(first.edits) == 2 + 14 + 6
    before = sum(p.numel() for p in first.model.parameters())
    again = ATP(**{**SMALL, "sparsity": 0.2}).run(first.model, task)
    assert len(again.edits) == 14 + 6
    assert sum(p.numel() for p in again.model.parameters()) < before


def test_a_sliced_stream_is_gone_on_from():
    task = tiny.make_task("decoder")
    sliced = prune(tiny.trained("decoder"), SliceGPT(sparsity=0.25, samples=16), task).model
    done = prune(sliced, ATP(**SMALL), task)
    assert done.ledger.sparsity == pytest.approx(0.4, abs=0.01)
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in sliced.parameters())


# Training


def test_only_the_generator_learns_from_a_proposal():
    model, _, _, work = ready()
    rule = work.rule
    before = {k: v.clone() for k, v in model.state_dict().items()}
    low, made = [p.clone() for p in rule.parameters()], [p.clone() for p in rule.proposer.parameters()]
    model.train()
    with only(model, []), hooked(model, rule.layers):
        rule.propose(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(low, rule.parameters(), strict=True))
    assert all(p.grad is None for p in [*rule.parameters(), *model.parameters()])
    assert all(not torch.equal(a, b) for a, b in zip(made, rule.proposer.parameters(), strict=True))
    assert model.training
    assert all(layer.soft is None for layer in rule.layers.values())


def test_a_soft_mask_multiplies_what_a_unit_gives_once():
    """One neuron at 0.25: what down_proj reads of it is 0.25 of what it was, not 0.0625."""
    model, task, _, work = ready()
    rule, site = work.rule, next(s for s in work.sites if s.name.endswith("0.mlp"))
    seen = []
    model.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda m, x: seen.append(x[0]))
    soft = torch.ones(64)
    soft[5] = 0.25
    with hooked(model, rule.layers):
        logits(model, task)
        rule.show({site.name: soft})
        logits(model, task)
    assert torch.allclose(seen[1], seen[0] * soft, atol=1e-6)
    rule.show({"model.layers.0.self_attn.keys": torch.full((4,), 0.5)})
    masked = [name for name, found in rule.layers.items() if found.soft is not None]
    assert masked == ["model.layers.0.self_attn.k_proj.weight"]


def test_what_is_condemned_can_come_back():
    """Its adapters still have gradients, which masked weights would not have."""
    model, task, _, work = ready()
    rule = work.rule
    rule.keep = {name: torch.arange(len(k)) % 2 == 0 for name, k in rule.keep.items()}
    rule.mask()
    for found in rule.layers.values():
        found.low.b.data.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    with only(model, []), hooked(model, rule.layers):
        task.loss(model, next(iter(task.batches("train")))).backward()
    up = rule.layers["model.layers.0.mlp.up_proj.weight"]
    assert up.mask.tolist() == [1.0, 0.0] * 32
    assert bool(up.low.b.grad[1::2].ne(0).all())


def test_decisions_are_made_until_a_share_of_training_and_stay_then():
    model, task, _, work = ready(until=0.5, steps=12)
    rule, masks = work.rule, []
    with only(model, []), hooked(model, rule.layers):
        optimizer = torch.optim.AdamW(rule.parameters(), 5e-3)
        fit(model, task, 12, [rule], optimizer, watch=lambda loop: masks.append(dict(rule.keep)))
    assert rule.proposed == 6
    same = [all(torch.equal(a[n], b[n]) for n in a) for a, b in pairwise(masks)]
    assert same[6:] == [True] * 5
    assert not all(same[:6])
    assert rule.optimizer.param_groups[0]["lr"] < 0.1 * FAST.rate


@pytest.mark.parametrize("until", [0.0, 1.0])
def test_proposals_never_and_to_the_end(until):
    done = prune(tiny.trained("decoder"), ATP(**{**SMALL, "until": until}), tiny.make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.4, abs=0.01)
    assert len(done.history.curves.get("moved", [])) == 16 * until


def test_the_generator_spares_what_counts():
    """Half of the neurons give next to nothing: mostly these go."""
    model, task = copy.deepcopy(tiny.trained("decoder")), tiny.make_task("decoder")
    with torch.no_grad():
        for block in model.model.layers:
            for matrix in (block.mlp.up_proj.weight, block.mlp.down_proj.weight.T):
                matrix[::2] *= 0.03
    done = prune(
        model,
        ATP(
            **{**SMALL, "steps": 60, "until": 1.0, "protect": ("*self_attn*",), "proposals": replace(FAST, weight=1.0)}
        ),
        task,
    )
    keeps = [e.keep for e in done.edits if isinstance(e, Remove)]
    assert len(keeps) == 2
    assert sum(int(k[1::2].sum()) for k in keeps) > 1.4 * sum(int(k[::2].sum()) for k in keeps)


def test_condemned_slices_shrink_by_a_step_of_adam_and_others_are_left():
    made, read = layer(ROWS), layer(COLUMNS, a=((4.0, 0.0),))
    rule = Proposing([SITE], {"a": made, "b": read}, tiny.make_task("decoder"), 0.5, FAST, until=0.0, lasso=2.0)
    rule.keep = {"n": torch.tensor([False, True])}
    rule.shrink(0.5)  # tau = 2 * 0.5 * sqrt(2), of a slice of length 5
    left = 1 - math.sqrt(2) / 5
    assert made.low.b.flatten().tolist() == pytest.approx([3 * left, 4])
    assert read.low.a.flatten().tolist() == pytest.approx([4 * left, 0])
    assert rule.condemned() == pytest.approx(5 * left / math.hypot(5 * left, 4))
    rule.shrink(10.0)
    rule.shrink(10.0)
    assert rule.condemned() == 0
    assert bool(made.low.b.isfinite().all())


def test_calibration_data_decides_and_test_data_is_not_read():
    class Watching:
        def __init__(self, task):
            self.task, self.asked = task, set()

        def __getattr__(self, name):
            return getattr(self.task, name)

        def batches(self, split, n=None, epoch=0):
            self.asked.add(split)
            return self.task.batches(split, n, epoch)

    task = Watching(tiny.make_task("decoder"))
    ATP(**SMALL).run(copy.deepcopy(tiny.trained("decoder")), task)
    assert task.asked == {"calibration", "train"}


def test_a_run_is_taken_up_again_where_it_was():
    def start():
        model, task, _, work = ready(copy.deepcopy(tiny.trained("decoder")))
        optimizer = torch.optim.AdamW(work.rule.parameters(), 5e-3)
        return model, task, work.rule, optimizer

    def train(stop, resume=None):
        model, task, rule, optimizer = start()
        taken = []

        def watch(loop):
            if loop.step == stop:
                taken.append(Snapshot.of(model, loop))

        with only(model, []), hooked(model, rule.layers):
            fit(model, task, 12, [rule], optimizer, watch=watch, resume_from=resume)
        return rule, taken

    for stop in (4, 9):  # while it is decided, and after
        whole, taken = train(stop)
        again, _ = train(-1, taken[0])
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
        assert all(torch.equal(keep, again.keep[name]) for name, keep in whole.keep.items())
        assert (again.proposed, again.frozen) == (6, True)


def test_half_precision_stays_what_it_is():
    model = copy.deepcopy(tiny.trained("decoder")).to(torch.bfloat16)
    done = prune(model, ATP(**SMALL), tiny.make_task("decoder"))
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    assert done.ledger.sparsity == pytest.approx(0.4, abs=0.01)


def test_adapters_may_start_as_the_smallest_directions():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    _, _, _, work = ready(copy.deepcopy(model), start=SmallestDirections())
    merged = work.rule.layers["model.layers.0.mlp.up_proj.weight"].merged()
    assert torch.allclose(merged, model.model.layers[0].mlp.up_proj.weight, atol=1e-5)
    done = prune(model, ATP(**SMALL, start=SmallestDirections(), lasso=20.0), task)
    assert done.history.curves["condemned"][-1][1] == 0


# Attention


def test_pairs_turn_as_in_the_whole_head():
    x, cos, sin = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0]]), torch.tensor([[1.0]])
    assert rotated(x, cos, sin).tolist() == [[-2, 1]]  # a quarter turn


def test_masks_of_flash_attention_are_refused():
    model, _, _, _ = ready(copy.deepcopy(tiny.trained("decoder")))
    attention = model.model.layers[0].self_attn
    hidden, tables = torch.zeros(1, 3, 32), (torch.zeros(1, 3, 8), torch.zeros(1, 3, 8))
    with pytest.raises(ModelError, match="not \\[batch, heads, queries, keys\\]"):
        attention(hidden, tables, torch.ones(1, 3))
    causal = torch.ones(3, 3, dtype=torch.bool).tril()[None, None]
    assert torch.equal(attention(hidden, tables, causal)[0], attention(hidden, tables)[0])


def test_eager_masks_hide_as_they_did():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    model.set_attn_implementation("eager")
    padded = {"input_ids": torch.arange(12).reshape(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    padded["attention_mask"][0, :2] = 0
    before = model(**padded).logits
    narrowable_(model, task.example)
    assert torch.allclose(model(**padded).logits[0, 2:], before[0, 2:], atol=1e-5)
    assert torch.allclose(model(**padded).logits[1], before[1], atol=1e-5)


def test_biases_of_queries_keys_and_values_go_with_their_units():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    model = tiny.seeded(lambda: Qwen2ForCausalLM(config).float(), 0)
    done = prune(model, ATP(**SMALL), tiny.make_task("decoder"))
    attention = done.model.model.layers[0].self_attn
    assert len(attention.v_proj.bias) == attention.v_proj.out_features < 16
    assert attention.o_proj.bias is None


def another(kind, **changes):
    """A decoder of another kind, as wide as the others here."""
    import transformers

    settings = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.15, "bos_token_id": 0,
        "eos_token_id": 1, "pad_token_id": None, **changes,
    }  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(**settings)
    return tiny.seeded(lambda: getattr(transformers, f"{kind}ForCausalLM")(config).float(), 0)


@pytest.mark.parametrize(
    ("kind", "changes", "said"),
    [
        ("Qwen3", {"head_dim": 8}, "Qwen3Attention does more than turn queries and keys"),  # norms of both
        ("Gemma2", {"head_dim": 8}, "Gemma2Attention does more than turn queries and keys"),  # a cap on scores
        ("StableLm", {"partial_rotary_factor": 0.25}, "turns 2 of the 8 dims of a head"),
    ],
)
def test_attention_that_does_more_is_refused_and_left_as_it_was(kind, changes, said):
    model, task = another(kind, **changes), tiny.make_task("decoder")
    held, before = model.model.layers[0].self_attn, logits(model, task)
    for ask in (lambda: ATP(**SMALL).run(model, task), lambda: ATP(**SMALL).sites_in(model)):
        with pytest.raises(GraphError, match=said):
            ask()
        assert model.model.layers[0].self_attn is held
        assert torch.equal(logits(model, task), before)


def test_a_cap_that_is_off_is_none():
    model, task = another("Gemma2", head_dim=8, attn_logit_softcapping=None), tiny.make_task("decoder")
    assert narrowable_(model, task.example)[1]


# Plans


def test_a_plan_knows_its_units_and_may_protect_them():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    method = ATP(**SMALL, protect=("*.keys",))
    found = plan.sites_of(method, model, task)
    assert [(site.name.rpartition(".")[2], site.units) for site in found.sites] == [("values", 8), ("mlp", 64)] * 2
    assert "shown as if uniform" in plan.laid_out(method, found, model, task, trial=False).guessed
    done = prune(model, method, task)
    assert done.ledger.sparsity == pytest.approx(0.4, abs=0.01)
    assert done.model.model.layers[0].self_attn.q_proj.out_features == 32


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"rank": 0},
        {"steps": 0},
        {"rate": 0.0},
        {"clip": 0.0},
        {"dropout": 1.0},
        {"until": 1.1},
        {"lasso": -1.0},
        {"lasso": math.inf},
        {"least": 0},
        {"sparsity": 1.0},
        {"proposals": Proposals(rate=0.0)},
        {"proposals": Proposals(temperature=0.0)},
        {"proposals": Proposals(draws=0)},
        {"proposals": Proposals(samples=0)},
        {"proposals": Proposals(weight=-1.0)},
        {"proposals": Proposals(offset=math.inf)},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(SettingError):
        ATP(**wrong).check()


def refused(error, found, family="decoder", **changes):
    with pytest.raises(error, match=found):
        prune(tiny.trained(family), ATP(**{**SMALL, **changes}), tiny.make_task(family))


def test_a_target_that_cannot_be_met_is_refused():
    refused(BudgetError, "2 units being left at each of 6 sites", sparsity=0.97, least=2)


def test_other_networks_are_refused():
    for family in ("encoder", "cnn", "moe"):
        with pytest.raises(GraphError):
            ATP(**SMALL).run(tiny.make_model(family), tiny.make_task(family))


def test_shared_gated_and_unadapted_weights_are_refused():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match="it is one tensor with"):
        ATP(**SMALL).layers(model, task, [])
    model = tiny.decoder()
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.up_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match="behind a gate"):
        ATP(**SMALL).layers(model, task, [])
    with pytest.raises(SiteError, match="none of the matrices chosen"):
        ATP().layers(nn.Sequential(nn.Conv2d(3, 4, 3)), task, [])
    with pytest.raises(SiteError, match="units that a makes were to be masked"):
        Proposing([SITE], {"b": layer(COLUMNS)}, task, 0.5, FAST)


def test_matrices_without_adapters_are_masked_all_the_same():
    done = prune(tiny.trained("decoder"), ATP(**SMALL, include=("*.v_proj",)), tiny.make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.4, abs=0.01)


def test_tasks_without_data_are_refused():
    task = tiny.make_task("decoder")
    bare = replace(task, ids={**task.ids, "calibration": task.ids["calibration"][:0]})
    with pytest.raises(TaskError, match="calibration"):
        prune(tiny.trained("decoder"), ATP(**SMALL), bare)
    with pytest.raises(TaskError, match="a batch is 10000"):
        prune(tiny.trained("decoder"), ATP(**SMALL), tiny.toy_text(batch=10000))


def test_the_same_seed_decides_the_same_in_every_process():
    """Masks come from the task's seed alone; `Loop.agree` would say where they part."""
    one, two = ready()[3].rule, ready()[3].rule
    assert all(torch.equal(a, b) for a, b in zip(one.proposer.parameters(), two.proposer.parameters(), strict=True))
    assert torch.equal(one.soft(torch.zeros(5)), two.soft(torch.zeros(5)))
    assert not torch.equal(one.soft(torch.zeros(5)), one.soft(torch.zeros(5)))
