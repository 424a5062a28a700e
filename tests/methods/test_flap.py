"""What hardly fluctuates is replaced by its mean, and goes."""

import copy
import json
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur import edit
from secateur.axes import Uniform, keep_top
from secateur.axes.spending import check_affordable, per_block, spend_everywhere
from secateur.edit import Mask, Remove, Update
from secateur.errors import BudgetError, EvidenceError, GraphError, SettingError
from secateur.graph import couple
from secateur.graph.inner import inner, reader
from secateur.method import prune
from secateur.methods.flap import (
    FLAP,
    Adaptive,
    ColumnNorm,
    Ifv,
    PerLayer,
    Wifn,
    Wifv,
    flow_of,
    mended_bias,
    standardised,
)
from secateur.models import load, save
from secateur.plan import check, counts, sites_of
from secateur.site import Part, Site
from secateur.task import Batch

# Three features over two tokens, read by two outputs.
X = torch.tensor([[0.0, 1.0, 0.0], [2.0, 1.0, 4.0]], dtype=torch.float64)
W = torch.tensor([[3.0, 5.0, 1.0], [4.0, 0.0, 0.0]], dtype=torch.float64)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def site_of(owner: list[int], out: int, kind: str = "channel") -> Site:
    units = max(owner) + 1
    parts = (
        Part("a.weight", (len(owner), 2), torch.tensor(owner).reshape(-1, 1)),
        Part("b.weight", (out, len(owner)), torch.tensor(owner).reshape(1, -1)),
    )
    return Site("b", kind, (units,), parts, block="0")


def logits(model: nn.Module, task) -> torch.Tensor:
    with torch.no_grad():
        return task.example.through(model).logits


def loss(model: nn.Module, task) -> float:
    with torch.no_grad():
        return sum(float(task.loss(model, batch)) for batch in task.batches("val"))


def test_scores_by_hand():
    # Means 1, 1, 2 and variances 1, 0, 4; squared column norms 25, 25, 1.
    flow = flow_of([X])
    assert (flow.tokens, flow.mean.tolist(), flow.variance.tolist()) == (2, [1, 1, 2], [1, 0, 4])
    assert Wifv().of(W, flow).tolist() == [25, 0, 4]
    assert Ifv().of(W, flow).tolist() == [1, 0, 4]
    assert ColumnNorm().of(W, flow).tolist() == [5, 5, 1]
    # mean |w| is 3.5, 2.5, 0.5; the root mean squares of the inputs are sqrt 2, 1, sqrt 8.
    torch.testing.assert_close(Wifn().of(W, flow), torch.tensor([3.5 * 2**0.5, 2.5, 0.5 * 8**0.5]).double())
    # (1, 2, 6): mean 3, unbiased variance (4 + 1 + 9) / 2 = 7.
    z = standardised(torch.tensor([1.0, 2.0, 6.0]).double())
    torch.testing.assert_close(z, torch.tensor([-2.0, -1.0, 3.0]).double() / 7**0.5)


def test_the_bias_takes_over_what_is_gone_on_average():
    site = site_of([0, 1, 2], out=2)
    keep = torch.tensor([True, False, False])
    found = mended_bias(site, {"b.weight": W, "b.bias": torch.tensor([10.0, 20.0])}, flow_of([X]), keep)
    assert (found.name, found.value.tolist()) == ("b.bias", [10 + 5 * 1 + 1 * 2, 20])
    assert mended_bias(site, {"b.weight": W}, flow_of([X]), keep).value.tolist() == [7, 0]


def test_means_and_variances_are_those_of_all_rows_whatever_the_batches():
    # An offset of 1e4 over noise of 1 in float32: the difference of two sums would lose most digits.
    rows = (draw(50, 6) + torch.tensor([0, 0, 0, 0, 1e4, -1e4])).float()
    whole = rows.double()
    for cuts in ([50], [1, 49], [7, 20, 23], [0, 25, 25]):
        flow = flow_of(rows.split(cuts))
        torch.testing.assert_close(flow.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(flow.variance, whole.var(0, unbiased=False), rtol=1e-9, atol=1e-12)


def test_what_is_removed_costs_the_sum_of_its_scores():
    """Section 3: with the mean put back, the squared error of an output is the sum of the scores, for features that
    do not vary together. Features made exactly uncorrelated, so it is exact."""
    x = draw(64, 8)
    x = torch.linalg.qr(x - x.mean(0)).Q * torch.arange(1.0, 9.0) + torch.arange(8.0)
    weight, flow = draw(5, 8, seed=1), flow_of([x[:10], x[10:]])
    keep = torch.tensor([True, False, True, True, False, True, False, True])
    bias = mended_bias(site_of(list(range(8)), out=5), {"b.weight": weight}, flow, keep).value
    error = x @ weight.T - (x[:, keep] @ weight[:, keep].T + bias)
    score = Wifv().of(weight, flow)
    torch.testing.assert_close(error.square().sum(1).mean(), score[~keep].sum(), rtol=1e-10, atol=0)
    without = x @ weight.T - x[:, keep] @ weight[:, keep].T
    assert without.square().sum(1).mean() > 2 * error.square().sum(1).mean()


def test_a_head_is_the_mean_of_its_columns_after_they_are_squared_and_standardised():
    # Two groups of two columns each; the score is the variance: 1, 3 and 5, 9, squared 1, 9, 25, 81.
    site = site_of([0, 0, 1, 1], out=2, kind="head")
    flow = flow_of([torch.tensor([[-1.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 1.0]]) * torch.tensor([1, 3, 5, 9]).sqrt()])
    named = {"b.weight": torch.ones(2, 4)}
    for power, columns in ((2.0, [1.0, 9.0, 25.0, 81.0]), (1.0, [1.0, 3.0, 5.0, 9.0])):
        z = standardised(torch.tensor(columns).double())
        found = FLAP(score=Ifv(), head_power=power).unit_scores(site, named, flow)
        torch.testing.assert_close(found, z.reshape(2, 2).mean(1), rtol=1e-6, atol=1e-6)
    neurons = site_of([0, 1, 2, 3], out=2)
    z = standardised(torch.tensor([1.0, 3.0, 5.0, 9.0]).double())  # neurons are not squared
    torch.testing.assert_close(FLAP(score=Ifv()).unit_scores(neurons, named, flow), z, rtol=1e-6, atol=1e-6)


def test_any_allocation_serves():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, FLAP(sparsity=0.25, samples=8, allocation=Uniform()), task)
    assert [int((~e.keep).sum()) for e in outcome.edits if isinstance(e, Remove)] == [16, 16]
    assert outcome.notes[0].endswith("0.1667, 0.25 asked for")  # a quarter of two heads is none


def test_it_can_be_held_to_neurons():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, FLAP(sparsity=0.25, samples=8, kinds=("channel",)), task)
    assert {e.site.kind for e in outcome.edits if isinstance(e, Remove)} == {"channel"}
    assert outcome.ledger.prunable == 128 * 96
    assert outcome.ledger.removed == 32 * 96
    with pytest.raises(SettingError, match="kinds=layer was given"):
        FLAP(kinds=("layer",)).check()


def test_a_plan_says_what_will_be_left():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    method = FLAP(sparsity=0.4, samples=8, allocation=PerLayer())
    removed = {e.site.name: int(e.keep.sum()) for e in prune(model, method, task).edits if isinstance(e, Remove)}
    assert counts(method, sites_of(method, model, task)) == (removed, True)
    assert not counts(FLAP(), sites_of(FLAP(), model, task))[1]  # scores decide
    with pytest.raises(BudgetError, match="1 unit being left"):
        check(FLAP(sparsity=0.9), model, task)


def test_a_layer_that_is_all_alike_does_not_become_nan():
    assert standardised(torch.full((5,), 0.1).double()).tolist() == [0.0] * 5
    assert standardised(torch.zeros(3).double()).tolist() == [0.0] * 3
    assert standardised(torch.tensor([4.0]).double()).tolist() == [0.0]
    model, task = tiny.decoder(), tiny.make_task("decoder")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.zero_()
    found = prune(model, FLAP(samples=8, sparsity=0.3), task)
    assert all(bool(v.isfinite().all()) for v in found.model.state_dict().values())


def test_masked_is_removed():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, FLAP(sparsity=0.4, samples=16), task)
    masked = copy.deepcopy(model)
    edit.apply_(masked, [Mask(e.site, e.keep) if isinstance(e, Remove) else e for e in outcome.edits])
    torch.testing.assert_close(logits(masked, task), logits(outcome.model, task), rtol=1e-5, atol=1e-5)
    assert outcome.ledger.after.parameters < 0.75 * outcome.ledger.before.parameters
    assert outcome.ledger.after.flops < outcome.ledger.before.flops


def test_transposed_layers_with_biases_of_their_own():
    """GPT-2 stores its matrices inputs first, q, k and v in one, and has a bias everywhere."""
    import transformers as hub

    config = hub.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=4, n_positions=32, bos_token_id=0, eos_token_id=1
    )
    model, task = tiny.seeded(lambda: hub.GPT2LMHeadModel(config), 0), tiny.make_task("decoder")
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.bias += 1
    outcome = prune(model, FLAP(sparsity=0.4, samples=8, allocation=PerLayer()), task)
    assert not any("biases were added" in note for note in outcome.notes)
    assert outcome.model.transformer.h[1].attn.c_attn.weight.shape == (16, 24)
    masked = copy.deepcopy(model)
    edit.apply_(masked, [Mask(e.site, e.keep) if isinstance(e, Remove) else e for e in outcome.edits])
    torch.testing.assert_close(logits(masked, task), logits(outcome.model, task), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["decoder", "encoder", "vision transformer"])
@pytest.mark.parametrize("allocation", [Adaptive(), Adaptive(heads=0.25), PerLayer(), PerLayer(heads=0.5)])
def test_the_budget_of_weights_is_met_to_a_neuron(family, allocation):
    model, task = tiny.make_model(family), tiny.make_task(family)
    sites = inner(couple(model, task.example))
    total = sum(float(s.cost().sum()) for s in sites)
    least = min(float(s.cost().min()) for s in sites)
    outcome = prune(model, FLAP(sparsity=0.35, samples=8, allocation=allocation), task)
    removed = {e.site.name: e for e in outcome.edits if isinstance(e, Remove)}
    gone = sum(float(e.site.cost()[~e.keep].sum()) for e in removed.values())
    blocks = 1 if isinstance(allocation, Adaptive) else 2
    assert 0 <= 0.35 * total - gone < least * blocks
    left = {s.name: s.units for s in inner_or_none(outcome.model, task)}
    for site in sites:
        kept = int(removed[site.name].keep.sum()) if site.name in removed else site.units
        assert kept >= 1
        assert left.get(site.name, 1) == kept  # what is written down is what is gone
    if allocation.heads is not None:
        heads = [s for s in sites if s.kind == "head"]
        cut = sum(int((~removed[s.name].keep).sum()) for s in heads if s.name in removed)
        assert cut == allocation.heads * sum(s.units for s in heads)
    assert (outcome.ledger.prunable, outcome.ledger.removed) == (total, gone)
    assert f"{gone:,.0f} of {total:,.0f} weights" in outcome.notes[0]


def inner_or_none(model, task):
    return [s for s in couple(model, task.example).of("head", "channel") if s.block]


def test_dead_units_go_first_wherever_they_are():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    dead = torch.arange(64) % 4 == 0
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[dead] = 0
    total = sum(float(s.cost().sum()) for s in inner(couple(model, task.example)))
    spend = 40 * 96 / total
    outcome = prune(model, FLAP(sparsity=spend, samples=16, allocation=Adaptive(heads=0.0)), task)
    removed = {e.site.name: e.keep for e in outcome.edits if isinstance(e, Remove)}
    assert not bool(removed["model.layers.1.mlp"][dead].any())
    assert sum(int((~keep).sum()) for keep in removed.values()) == 40
    even = prune(model, FLAP(sparsity=spend, samples=16, allocation=PerLayer(heads=0.0)), task)
    assert [int((~e.keep).sum()) for e in even.edits if isinstance(e, Remove)] == [20, 20]


def test_the_budget_is_spent_worst_first_and_what_no_longer_fits_is_passed_over():
    # Neurons own 2 + 2 weights, heads 8 + 8: with 12 to spend the head at -2 is too dear, three neurons are not.
    heads = replace(site_of([0, 0, 0, 0, 1, 1, 1, 1], out=2, kind="head"), name="heads")
    neurons = site_of([0, 1, 2, 3, 4], out=2)
    scores = {"heads": torch.tensor([-2.0, 1.0]), "b": torch.tensor([0.5, -1.0, 0.0, 3.0, 0.2])}
    assert heads.cost().tolist() == [16, 16]
    assert neurons.cost().tolist() == [4] * 5

    def gone(spend: float, least: int = 1) -> list[int]:
        keep = spend_everywhere([heads, neurons], scores, spend, least)
        return [2 - keep["heads"], 5 - keep["b"]]

    assert gone(12) == [0, 3]
    assert gone(16) == [1, 0]
    assert gone(27) == [1, 2]
    assert gone(36) == [1, 4]  # the other head, at 1, stays: it is the last
    assert gone(36, least=2) == [0, 3]
    check_affordable([heads, neurons], 32, 52)
    with pytest.raises(BudgetError, match=r"32 can be, 1 unit .* 2 sites.\nAsk for a sparsity of at most 0.6153"):
        check_affordable([heads, neurons], 33, 52)


def test_every_block_loses_the_same_and_neurons_make_up_for_whole_heads():
    heads = replace(site_of([0, 0, 0, 0, 1, 1, 1, 1], out=2, kind="head"), name="heads")
    neurons = site_of(list(range(10)), out=2)  # 72 weights in all
    assert per_block([heads, neurons], 0.5) == {"heads": 1, "b": 5}  # 36 = 16 + 5 * 4
    assert per_block([heads, neurons], 0.25) == {"heads": 2, "b": 6}  # 18: half a head is none
    assert per_block([heads, neurons], 0.5, heads=0.0) == {"heads": 2, "b": 1}
    assert per_block([heads, neurons], 0.7, heads=0.0) == {"heads": 1, "b": 2}  # too much for neurons alone
    with pytest.raises(BudgetError, match="52 can be"):
        per_block([heads, neurons], 0.75)


def test_what_flows_is_what_flows_in_the_dense_model():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    batches = list(task.batches("calibration", 16))
    sites = inner(couple(model, task.example))
    flows = FLAP().flows(model, sites, batches)
    caught: list[torch.Tensor] = []
    down = model.model.layers[1].mlp.down_proj
    hook = down.register_forward_pre_hook(lambda _, args: caught.append(args[0].reshape(-1, 64)))
    with torch.no_grad():
        for batch in batches:
            batch.through(model)
    hook.remove()
    rows = torch.cat(caught).double()
    torch.testing.assert_close(flows["model.layers.1.mlp"].mean, rows.mean(0))
    torch.testing.assert_close(flows["model.layers.1.mlp"].variance, rows.var(0, unbiased=False))
    assert reader(sites[1]).name == "model.layers.0.mlp.down_proj.weight"


def test_first_positions_and_padding_can_be_left_out():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    sites = inner(couple(model, task.example))
    (ids,) = next(iter(task.batches("calibration", 4))).inputs
    whole = FLAP().flows(model, sites, [Batch({"input_ids": ids})])
    later = FLAP(skip=1).flows(model, sites, [Batch({"input_ids": ids})])
    name = sites[1].name
    assert (whole[name].tokens, later[name].tokens) == (ids.numel(), ids.numel() - len(ids))
    mask = torch.ones_like(ids)
    mask[:, -6:] = 0
    padded = FLAP().flows(model, sites, [Batch({"input_ids": ids, "attention_mask": mask})])
    short = FLAP().flows(model, sites, [Batch({"input_ids": ids[:, :-6]})])
    torch.testing.assert_close(padded[name].mean, short[name].mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(padded[name].variance, short[name].variance, rtol=1e-5, atol=1e-6)


def test_putting_the_means_back_helps_and_so_does_choosing_by_fluctuation():
    """The paper's two claims on a trained toy: the bias is worth a share of the loss, and least is better than most."""
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    settings = {"sparsity": 0.2, "samples": 64}
    mended = loss(prune(model, FLAP(**settings), task).model, task)
    bare = loss(prune(model, FLAP(**settings, compensate=False), task).model, task)
    worst = loss(prune(model, FLAP(**settings, score=Backwards(), head_power=1.0), task).model, task)
    dense = loss(model, task)
    assert dense < mended < bare < worst
    assert mended - dense < 0.92 * (bare - dense)
    assert mended - dense < 0.3 * (worst - dense)


class Backwards:
    """The most fluctuating first."""

    def of(self, weight, flow):
        return -Wifv().of(weight, flow)


def test_equal_widths_load_with_stock_transformers(tmp_path):
    import transformers as hub

    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, FLAP(sparsity=0.4, samples=8, allocation=PerLayer()), task)
    save(outcome, model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert said["stock"], said["why_not"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["attention_bias"]
    assert config["mlp_bias"]
    assert config["num_key_value_heads"] == 1
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock, task), logits(outcome.model, task), rtol=1e-5, atol=1e-5)


def test_other_widths_load_with_secateur(tmp_path):
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, FLAP(sparsity=0.3, samples=8), task)
    assert any(isinstance(e, Update) and e.name.endswith("down_proj.bias") for e in outcome.edits)
    save(outcome, model, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out"), task), logits(outcome.model, task), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_is_refused_before_any_data_is_read():
    model, task = tiny.decoder(), tiny.make_task("decoder")

    class Silent(type(task)):
        def batches(self, *_, **__):
            raise AssertionError("data was read")

    silent = copy.copy(task)
    object.__setattr__(silent, "__class__", Silent)
    with pytest.raises(BudgetError, match=r"(?s)1 unit being left at each of 4 sites.*at most 0\.\d+"):
        FLAP(sparsity=0.9).run(copy.deepcopy(model), silent)
    with pytest.raises(BudgetError, match="the whole budget is"):
        FLAP(sparsity=0.1, allocation=Adaptive(heads=0.9)).run(copy.deepcopy(model), silent)
    for wrong in (-0.1, 1.0, 30):
        with pytest.raises(SettingError, match="in \\[0, 1\\)"):
            FLAP(sparsity=wrong).check()
    with pytest.raises(SettingError, match="heads -1 was asked for"):
        Adaptive(heads=-1)
    with pytest.raises(SettingError, match="least=0"):
        PerLayer(least=0)
    with pytest.raises(GraphError, match="no single matrix does: its units are in .*experts.gate_up_proj"):
        FLAP().run(tiny.moe(), tiny.make_task("moe"))
    with pytest.raises(GraphError, match="no repeated blocks hold any"):
        FLAP().run(tiny.cnn(), tiny.make_task("cnn"))


def test_no_data_is_an_error():
    model = tiny.decoder()
    sites = inner(couple(model, tiny.make_task("decoder").example))
    with pytest.raises(EvidenceError, match="0 tokens reached it"):
        FLAP().flows(model, sites, [])


@pytest.mark.model
def test_one_layer_of_smollm2_by_the_plain_formula(smollm2):
    """Scores of a real MLP against the formula written out, and what the bias is worth there."""
    text = "The tower is 324 metres tall, about the same height as an 81-storey building. " * 8
    ids = smollm2.tokenizer(text, return_tensors="pt").input_ids
    down = smollm2.model.model.layers[12].mlp.down_proj
    caught: list[torch.Tensor] = []
    hook = down.register_forward_pre_hook(lambda _, args: caught.append(args[0][0].detach()))
    with torch.no_grad():
        smollm2.model(ids)
    hook.remove()
    x, weight = caught[0].double(), down.weight.detach().double()
    plain = torch.stack([((x[:, j] - x[:, j].mean()) ** 2).mean() * (weight[:, j] ** 2).sum() for j in range(1536)])
    site = site_of(list(range(1536)), out=576)
    flow = flow_of(caught[0].split(50))
    found = FLAP().unit_scores(site, {"b.weight": down.weight}, flow)
    torch.testing.assert_close(found, (plain - plain.mean()) / plain.std(), rtol=1e-6, atol=1e-9)
    keep = torch.ones(1536, dtype=torch.bool)
    keep[plain.argsort()[:307]] = False
    assert torch.equal(keep_top(found, 1536 - 307), keep)
    bias = mended_bias(site, {"b.weight": down.weight}, flow, keep).value.double()
    gone = x[:, ~keep] @ weight[:, ~keep].T
    assert (gone - bias).square().mean() < gone.square().mean()
