"""Blocks that do little lose more neurons, and of each block the quiet ones go."""

import copy
import json
import math

import pytest
import tiny
import torch
from torch import nn

from secateur import edit
from secateur.axes import Uniform
from secateur.axes.influence import Absolute, Angle, Squared, Turn, tokens_of, watched
from secateur.edit import Mask, Remove, Update
from secateur.errors import BudgetError, EvidenceError, GraphError, SettingError
from secateur.graph import couple
from secateur.graph.inner import inner
from secateur.method import prune
from secateur.methods.cfsp import (
    CFSP,
    Even,
    IgLora,
    Importance,
    Inverse,
    Loudness,
    Outgoing,
    Relative,
    Sigmoid,
    Weighted,
    emphasis,
    kept_shares,
    neuron_scores,
    ranks_of,
    whole_widths,
)
from secateur.models import load, save
from secateur.plan import counts, sites_of
from secateur.site import Part, Site
from secateur.task import Batch


def double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


# Two neurons: rows of gate and up [2, 2], columns of down [2, 2].
SITE = Site("n", "channel", (2,), (
    Part("gate.weight", (2, 2), torch.tensor([[0], [1]])),
    Part("up.weight", (2, 2), torch.tensor([[0], [1]])),
    Part("down.weight", (2, 2), torch.tensor([[0, 1]])),
), block="0")  # fmt: skip
NAMED = {
    "gate.weight": double([3, -4], [0, 2]),
    "up.weight": double([1, 0], [1, 1]),
    "down.weight": double([3, 4], [0, -2]),
}
LOUD = double(3, 4)


def scored(fine, named=NAMED, site=SITE):
    return neuron_scores(site, named, LOUD, fine)


def logits(model, task):
    with torch.no_grad():
        return task.example.through(model).logits


def loss(model, task):
    with torch.no_grad():
        return sum(float(task.loss(model, batch)) for batch in task.batches("val"))


def uneven(layers=3):
    """A decoder of which the middle block does next to nothing."""
    model = tiny.decoder(layers=layers)
    with torch.no_grad():
        for name in ("mlp.down_proj", "self_attn.o_proj"):
            model.model.layers[1].get_submodule(name).weight.mul_(0.02)
    return model


# How much a block does


def test_change_by_hand():
    into, out = double([1, 0], [0, 2]), double([1, 1], [0, -2])
    assert Turn().apart(into, out).tolist() == pytest.approx([1 - math.sqrt(0.5), 2])
    assert Angle().apart(into, out).tolist() == pytest.approx([0.25, 1])
    assert Squared().apart(into, out).tolist() == [0.5, 8]
    assert Absolute().apart(into, out).tolist() == [0.5, 2]


def test_an_angle_is_never_nan():
    ones = torch.full((4, 577), 0.1).half()  # the cosine of a row with itself is above 1 by rounding
    assert float(Angle().apart(ones, ones).max()) < 1e-7
    assert Angle().apart(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0.5]


def test_padding_is_no_token_and_passes_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Linear(2, 2)

        def forward(self, x, attention_mask=None):
            return self.block(x)

    model = Twice()
    with torch.no_grad():
        model.block.weight.copy_(double([0, -1], [1, 0]))  # a quarter of a turn
        model.block.bias.zero_()
    x = torch.tensor([[[1.0, 0.0], [3.0, 4.0]], [[0.0, 2.0], [9.0, 9.0]]])
    mask = torch.tensor([[1, 1], [1, 0]])
    with torch.no_grad(), watched(model, ["block"], Angle(), ["block"]) as seen:
        model(x[:1], attention_mask=mask[:1])
        model(x[1:], attention_mask=mask[1:])
    assert seen.change("block") == pytest.approx(0.5)
    assert seen.square("block").tolist() == pytest.approx([10 / 3, 20 / 3])  # of three tokens: 1 + 9, and 16 + 4
    assert not model.block._forward_hooks
    assert not model._forward_pre_hooks
    assert len(tokens_of(x, mask)) == 3
    assert len(tokens_of(x, None)) == 4
    with pytest.raises(EvidenceError, match="no token reached it"):
        seen.change("elsewhere")
    wider = nn.Sequential(nn.Linear(2, 3))
    with pytest.raises(GraphError, match=r"\[1, 2\] goes in and \[1, 3\]"), watched(wider, ["0"], Turn()):
        wider(torch.ones(1, 2))


# Widths


def test_widths_by_hand():
    # Deviations of z: 13.1072 * (0.1, 0, -0.1), whose sigmoids are 0.78766, 0.5 and 0.21234: they sum to 1.5.
    influence = double(0.3, 0.2, 0.1)
    high = 1 / (1 + math.exp(-1.31072))
    worth = [2 * high, 1, 2 * (1 - high)]
    assert emphasis(influence).tolist() == pytest.approx(worth, rel=1e-12)
    assert kept_shares(influence, 0.5).tolist() == pytest.approx([w / 2 for w in worth], rel=1e-12)
    # At 20 % the first would keep 1.26 of itself: deviations are drawn in by (0.25 / 0.57532) / 1.05.
    drawn = kept_shares(influence, 0.2)
    assert drawn.tolist() == pytest.approx([0.8 * (1 + 0.25 / 1.05), 0.8, 0.8 * (1 - 0.25 / 1.05)], rel=1e-12)
    assert float(drawn.max()) < 1
    assert float(drawn.mean()) == pytest.approx(0.8)
    assert emphasis(influence, 0.0).tolist() == [1, 1, 1]


def test_blocks_that_are_alike_and_nothing_to_remove_are_no_division_by_zero():
    assert kept_shares(double(0.2, 0.2), 0.4).tolist() == pytest.approx([0.6, 0.6])
    assert kept_shares(double(0.2), 0.4).tolist() == pytest.approx([0.6])
    assert kept_shares(double(0.9, 0.1), 0.0).tolist() == [1, 1]
    assert kept_shares(double(0.9, 0.1), 1e-17).tolist() == [1, 1]


def test_influence_does_not_depend_on_how_much_text_was_used():
    # The authors: z = (sum over tokens - mean) / 10^4 on 131,072 tokens; ours from means, the same at that size.
    means = double(0.31, 0.12, 0.2)
    sums = means * 131072
    z = (sums - sums.mean()) / 1e4
    torch.testing.assert_close(emphasis(means), torch.sigmoid(z) / torch.sigmoid(z).mean())


def test_whole_widths_by_hand():
    assert whole_widths([700.0, 300.0], [1024, 1024], 128) == [640, 256]  # 700 is nearer to 640, 300 to 256
    assert whole_widths([704.0, 20.0], [1024, 1024], 128) == [768, 128]  # half is up; never none
    assert whole_widths([1020.0], [1024], 128) == [1024]
    # The sum is 800: 896 is one multiple too many; the one furthest above what it wanted gives it up.
    assert whole_widths([704.0, 96.0], [1024, 1024], 128, total=800) == [640, 128]
    assert whole_widths([2.4, 2.4, 2.2], [9, 9, 9], 1, total=7) == [3, 2, 2]
    assert whole_widths([99.0, 99.0], [100, 100], 32, total=150) == [64, 96]  # 100 is no multiple, 96 is
    assert whole_widths([5.0], [100], 32, total=1) == [32]  # what cannot be met is left


def test_widths_between_two_multiples_are_rounded_once():
    class Between:
        needs_scores = True

        def spread(self, sites, budget, scores=None):
            return {"a": 6, "b": 6}

        def exact(self, sites, budget, scores=None):
            return {"a": 5.8, "b": 6.2}

    sites = [Site(name, "channel", (16,), (), block=name) for name in ("a", "b")]
    method = CFSP(allocation=Between(), repair=False)
    assert method.widths(sites, {"a": 0.1, "b": 0.1}, {"a": 4, "b": 4}) == {"a": 4, "b": 8}


def test_the_mean_of_the_widths_is_what_was_asked_for_before_rounding():
    influence = torch.rand(30, generator=torch.Generator().manual_seed(0)).double() * 0.3
    for sparsity in (0.05, 0.2, 0.5, 0.9):
        shares = kept_shares(influence, sparsity)
        assert float(shares.mean()) == pytest.approx(1 - sparsity)
        assert bool((shares.argsort() == influence.argsort()).all())


# Neurons


def test_equation_8_by_hand():
    # down: rows of norm 5 and 2; |w| / norm: [0.6, 0.8], [0, 1]; columns sum to 0.6 and 1.8; loudness [3, 4] / 5.
    # gate: 7 / 5 and 2 / 2; up: 1 / 1 and 2 / sqrt 2.
    assert scored(Relative()).tolist() == pytest.approx([0.36 + 1.4 + 1, 1.44 + 1 + math.sqrt(2)])
    assert scored(Weighted()).tolist() == [1.5 * 3, 3 * 4]
    assert scored(Outgoing()).tolist() == [1.5, 3]
    assert scored(Loudness(0.5)).tolist() == pytest.approx([math.sqrt(3), 2])


def test_a_neuron_that_sends_on_less_falls_in_equation_8_and_not_in_the_released_score():
    """The degeneracy of the released code: its column sums run over the very axis that is then averaged."""
    draw = torch.Generator().manual_seed(0)
    gate, up, down = (torch.randn(*s, generator=draw, dtype=torch.float64) for s in ((6, 4), (6, 4), (4, 6)))
    loud = torch.rand(6, generator=draw, dtype=torch.float64) + 0.5
    owner = torch.arange(6)
    site = Site("n", "channel", (6,), (
        Part("gate.weight", (6, 4), owner[:, None]), Part("up.weight", (6, 4), owner[:, None]),
        Part("down.weight", (4, 6), owner[None]),
    ), block="0")  # fmt: skip

    def released(down):
        sent = down.abs() * loud
        terms = sent / sent.sum(0) + gate.T.abs() / gate.T.abs().sum(0) + up.T.abs() / up.T.abs().sum(0)
        return (terms * loud).mean(0)

    quiet = down.clone()
    quiet[:, 2] *= 0.01
    named = [{"gate.weight": gate, "up.weight": up, "down.weight": d} for d in (down, quiet)]
    torch.testing.assert_close(released(down), 3 / 4 * loud)
    torch.testing.assert_close(released(quiet), 3 / 4 * loud)
    torch.testing.assert_close(3 / 4 * neuron_scores(site, named[1], loud, Loudness()), released(quiet))
    before, after = (neuron_scores(site, n, loud, Relative()) for n in named)
    assert float(after[2]) < float(before[2])
    assert bool((after[torch.arange(6) != 2] >= before[torch.arange(6) != 2]).all())


def test_rows_of_one_fused_matrix_count_for_the_neuron_they_make():
    fused = Site("n", "channel", (2,), (
        Part("both.weight", (4, 2), torch.tensor([[0], [1], [0], [1]])), SITE.parts[2],
    ), block="0")  # fmt: skip
    named = {**NAMED, "both.weight": torch.cat([NAMED["gate.weight"], NAMED["up.weight"]])}
    assert scored(Relative(), named, fused).tolist() == pytest.approx(scored(Relative()).tolist())


# The method


def test_masked_is_removed_attention_is_left_alone_and_the_budget_is_met():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, CFSP(sparsity=0.3, samples=8, round_to=1), task)
    assert outcome.ledger.units == 128
    assert outcome.ledger.units_removed == 38  # floor of 0.3 * 128
    assert outcome.ledger.removed == 38 * 96
    for mine, theirs in zip(outcome.model.model.layers, model.model.layers, strict=True):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert torch.equal(mine.self_attn.get_submodule(name).weight, theirs.self_attn.get_submodule(name).weight)
        assert mine.mlp.gate_proj.out_features == mine.mlp.up_proj.out_features == mine.mlp.down_proj.in_features
    masked = copy.deepcopy(model)
    edit.apply_(masked, [Mask(e.site, e.keep) if isinstance(e, Remove) else e for e in outcome.edits])
    torch.testing.assert_close(logits(outcome.model, task), logits(masked, task), rtol=1e-5, atol=1e-5)


def test_blocks_that_do_little_keep_less_whatever_order_the_data_comes_in():
    model, task = uneven(), tiny.make_task("decoder")
    sites = inner(couple(model, task.example), ("channel",))
    batches = list(task.batches("calibration", 16))
    method = CFSP(sparsity=0.5, round_to=1)
    there, back = (method.seen(model, sites, b) for b in (batches, batches[::-1]))
    angles = [there.change(site.block) for site in sites]
    assert angles == pytest.approx([back.change(site.block) for site in sites], rel=1e-12)
    assert angles[1] < 0.2 * min(angles[0], angles[2])
    found = method.widths(sites, {s.block: there.change(s.block) for s in sites}, {s.name: 1 for s in sites})
    widths = [found[site.name] for site in sites]
    assert widths[1] < 20 < min(widths[0], widths[2])
    assert sum(widths) == 96


def test_widths_are_multiples_and_the_report_says_what_was_reached():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    for repair in (True, False):
        outcome = prune(model, CFSP(sparsity=0.3, samples=8, round_to=16, repair=repair), task)
        left = [layer.mlp.gate_proj.out_features for layer in outcome.model.model.layers]
        assert all(width % 16 == 0 for width in left)
        if repair:
            assert sum(left) == 96  # the multiple of 16 nearest to 90
        assert outcome.notes[0].endswith(f"taken out: {1 - sum(left) / 128:.4f}, 0.3 asked for")
        assert "neurons left by block" in outcome.notes[1]


def test_cuts_by_score_hurt_less_than_the_other_way_round():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    settings = {"sparsity": 0.3, "samples": 16, "round_to": 1}
    ours, backwards = (prune(model, CFSP(**settings, score=s), task).model for s in (Relative(), Backwards()))
    dense = loss(model, task)
    assert loss(ours, task) - dense < 0.6 * (loss(backwards, task) - dense)


class Backwards:
    """The best go."""

    def read(self, weight, loud):
        return -Relative().read(weight, loud)

    def made(self, weight):
        return -Relative().made(weight)


def test_layers_without_a_gate_are_cut_in_their_two_matrices():
    for family in ("encoder", "vision transformer"):
        model, task = tiny.trained(family), tiny.make_task(family)
        outcome = prune(model, CFSP(sparsity=0.25, samples=16, round_to=1), task)
        assert outcome.ledger.units_removed == 32
        sites = {e.site.name: e.site for e in outcome.edits if isinstance(e, Remove)}
        assert all(len([p for p in site.parts if len(p.shape) == 2]) == 2 for site in sites.values())


def test_unequal_widths_load_here_and_equal_ones_with_stock_transformers(tmp_path):
    import transformers as hub

    model, task = uneven(), tiny.make_task("decoder")
    outcome = prune(model, CFSP(sparsity=0.5, samples=8, round_to=4), task)
    save(outcome, model, tmp_path / "unequal")
    torch.testing.assert_close(logits(outcome.model, task), logits(load(tmp_path / "unequal"), task))
    outcome = prune(model, CFSP(sparsity=0.5, samples=8, round_to=4, allocation=Uniform()), task)
    save(outcome, model, tmp_path / "equal")
    said = json.loads((tmp_path / "equal" / "secateur.json").read_text())["saved"]
    assert said["stock"], said["why_not"]
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "equal")
    assert stock.config.intermediate_size == 32
    torch.testing.assert_close(logits(outcome.model, task), logits(stock, task), rtol=1e-5, atol=1e-5)


def test_a_plan_says_that_scores_decide():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    method = CFSP(sparsity=0.5, round_to=8)
    assert counts(method, sites_of(method, model, task))[1] is False
    with pytest.raises(SettingError, match="no scores were given"):
        Sigmoid().spread(sites_of(method, model, task).sites, method.budget())


# Recovery


def test_ranks_by_hand():
    assert ranks_of([1.0, 1.0, 1.0], [10, 10, 10], 4) == [4, 4, 4]
    assert ranks_of([1.5, 1.0, 0.5], [10, 10, 10], 4) == [6, 4, 2]
    # 4 * 40 parameters; in proportion 3 to 1 at costs of 10 and 30: scale 160 / 60, so 8 and 2.67, of which one is
    # rounded up only as far as the budget goes: 8 * 10 + 2 * 30 = 140, and 30 more would be too much.
    assert ranks_of([3.0, 1.0], [10, 30], 4) == [8, 2]
    assert ranks_of([100.0, 0.001], [10, 10], 2) == [3, 1]  # one at least, which the other pays for


@pytest.mark.parametrize("by", [Importance(), Even(), Inverse()])
def test_adapters_take_no_more_than_plain_lora_and_follow_what_blocks_do(by):
    model, task = uneven(), tiny.make_task("decoder")
    recovery = IgLora(rank=4, steps=4, by=by, contrast=0.3)
    method = CFSP(sparsity=0.5, samples=8, round_to=1, allocation=Sigmoid(0.3), recovery=recovery)
    outcome = prune(model, method, task)
    said = next(n for n in outcome.notes if n.startswith("ranks of the adapters"))
    ranks = [int(pair.split()[1]) for pair in said.partition(": ")[2].split(", ")]
    cut = [layer.mlp.gate_proj.out_features for layer in outcome.model.model.layers]
    cost = [32 + 32 + 2 * (32 + 16) + 64 + 3 * (32 + w) for w in cut]  # q, k, v, o and the three of the MLP
    spent = sum(r * c for r, c in zip(ranks, cost, strict=True))
    assert 0 <= 4 * sum(cost) - spent < 2 * min(cost)
    assert f"{spent:,} parameters were trained" in " ".join(outcome.notes)
    want = {Importance: ranks[1] < min(ranks[0], ranks[2]), Even: ranks == [4, 4, 4], Inverse: ranks[1] > ranks[0]}
    assert want[type(by)], ranks


def test_recovery_lowers_the_loss_and_its_edits_replay():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    settings = {"sparsity": 0.5, "samples": 16, "round_to": 1}
    untuned = prune(model, CFSP(**settings), task)
    tuned = prune(model, CFSP(**settings, recovery=IgLora(rank=4, steps=60, rate=1e-2)), task)
    assert tuned.ledger.after.parameters == untuned.ledger.after.parameters  # merged
    dense = loss(model, task)
    assert loss(tuned.model, task) - dense < 0.7 * (loss(untuned.model, task) - dense)
    assert any(isinstance(e, Update) for e in tuned.edits)
    again = copy.deepcopy(model)
    edit.apply_(again, tuned.edits)
    torch.testing.assert_close(logits(tuned.model, task), logits(again, task))


def test_what_cannot_be_done_is_refused():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    for wrong in (-0.1, 1.0, 20):
        with pytest.raises(SettingError, match=f"sparsity {wrong} was asked for"):
            CFSP(sparsity=wrong).check()
    with pytest.raises(SettingError, match=r"multiples of 128 .* has 64 neurons"):
        CFSP().run(model, task)
    with pytest.raises(BudgetError, match="without any of its 64 units"):
        CFSP(sparsity=0.99, round_to=1, allocation=Sigmoid(contrast=50.0)).run(uneven(), task)
    with pytest.raises(SettingError, match="samples=0"):
        CFSP(samples=0).check()
    with pytest.raises(SettingError, match="rank=0"):
        CFSP(recovery=IgLora(rank=0)).check()
    with pytest.raises(GraphError, match="no repeated blocks"):
        CFSP().run(tiny.mlp(), tiny.make_task("mlp"))
    with pytest.raises(EvidenceError, match="no calibration samples"):
        CFSP().seen(model, inner(couple(model, task.example), ("channel",)), [])
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] = torch.inf
    with pytest.raises(EvidenceError, match="holds NaN or infinity"):
        CFSP(round_to=1, samples=8).run(model, task)


def test_examples_with_a_mask_go_through_by_keyword():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    sites = inner(couple(model, task.example), ("channel",))
    (batch,) = task.batches("calibration", 4)
    ids = batch.inputs[0]
    longer = torch.cat([ids, torch.zeros(4, 5, dtype=ids.dtype)], 1)
    mask = (torch.arange(longer.shape[1]) < ids.shape[1]).long().expand(4, -1)
    plain = CFSP().seen(model, sites, [batch])
    padded = CFSP().seen(model, sites, [Batch({"input_ids": longer, "attention_mask": mask})])
    for site in sites:
        assert padded.change(site.block) == pytest.approx(plain.change(site.block), rel=1e-5)


def test_the_command_line_prunes_and_what_it_wrote_loads(tmp_path):
    from click.testing import CliRunner

    from secateur.cli import main

    args = [
        "prune",
        "tiny:decoder",
        "cfsp",
        "--task",
        "tiny:toy_text",
        "--sparsity",
        "30%",
        "--out",
        str(tmp_path / "out"),
    ]
    args += ["--round-to", "8", "--samples", "8", "--score", "weighted", "--recovery", "ig-lora(rank=2, steps=2)"]
    found = CliRunner().invoke(main, args)
    assert found.exit_code == 0, found.output
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["method"] == "cfsp"
    again = load(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) == record["ledger"]["after"]["parameters"] < 20640
