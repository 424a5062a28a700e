"""A little goes, then all is looked at again; and what is left is trained in between."""

import copy
import json

import pytest
import tiny
import torch
from torch import nn

from secateur import edit
from secateur.axes.spending import total_cost
from secateur.edit import Mask, Remove
from secateur.errors import BudgetError, GraphError, SettingError, TaskError
from secateur.graph import couple, left_of, removals
from secateur.graph.inner import inner
from secateur.method import Budget, prune
from secateur.methods.adapt_pruner import (
    AdaptPruner,
    Bent,
    ByLargest,
    ByRank,
    Distil,
    advanced,
    counts_at,
    learning_factor,
)
from secateur.models import load, save
from secateur.plan import counts, sites_of
from secateur.site import Part, Site, tensors
from secateur.task import Batch
from secateur.train import Loop

SMALL = {"samples": 8, "iterations": 10, "amplitude": 0.1}


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


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


def left(model):
    """Neurons and key-value heads of each block."""
    return [(b.mlp.up_proj.out_features, b.self_attn.k_proj.out_features // 8) for b in model.model.layers]


# One step


def test_a_step_by_hand():
    # Changes 0.1, 0.2, 0.6: less their mean 0.3 they are -0.2, -0.1, 0.3; over the largest -2/3, -1/3, 1.
    importance = ByLargest().of(double(0.1, 0.2, 0.6))
    assert importance.tolist() == pytest.approx([-2 / 3, -1 / 3, 1])
    # With the amplitude as large as the step, the block that does most stands still, and none goes twice as fast.
    gone = advanced(double(0.5, 0.98, 0.3), importance, 0.02, 0.02)
    assert gone.tolist() == pytest.approx([0.5 + 0.02 * 5 / 3, 0.99, 0.3])
    assert advanced(double(0.01), double(1.0), 0.02, 0.1).tolist() == [0]
    assert advanced(double(0.5), double(-1.0), 0.02, 0.02, 0.25).tolist() == pytest.approx([0.51])


def test_blocks_that_are_alike_are_treated_alike():
    assert ByLargest().of(torch.full((3,), 0.1).double()).tolist() == [0, 0, 0]
    assert ByLargest().of(double(0.4)).tolist() == [0]
    assert ByRank().of(double(0.2, 9.0, 0.2, 0.1)).tolist() == pytest.approx([0, 1, 0, -1])
    assert ByRank().of(double(0.4)).tolist() == [0]


def test_whole_heads_wait_until_enough_is_due_and_nothing_grows_back():
    heads = Site("h", "head", (3,), (), block="0")
    neurons = Site("n", "channel", (100,), (), block="0")
    start = {"h": 3, "n": 100}

    def at(gone, sites=(heads, neurons)):
        return list(counts_at(sites, start, {"0": gone}).values())

    assert at(0.32) == [3, 68]
    assert at(0.34) == [2, 66]
    assert at(0.99) == [1, 1]
    cut = (Site("h", "head", (2,), (), block="0"), Site("n", "channel", (60,), (), block="0"))
    assert at(0.1, cut) == [2, 60]


def test_sites_of_a_cut_model_are_those_that_would_be_found_again():
    model, task = tiny.decoder(num_key_value_heads=4), tiny.make_task("decoder")
    sites = inner(couple(model, task.example))
    draw = torch.Generator().manual_seed(0)
    keep = {s.name: torch.rand(s.units, generator=draw) < 0.5 for s in sites if s.kind == "channel"}
    keep[next(s.name for s in sites if s.kind == "head")] = torch.tensor([False, True, False, True])
    edit.apply_(model, removals(sites, keep))
    ours, again = left_of(sites, keep), inner(couple(model, task.example))
    assert [(s.name, s.kind, s.units) for s in ours] == [(s.name, s.kind, s.units) for s in again]
    named = tensors(model)
    for mine, theirs in zip(ours, again, strict=True):
        found = {p.name: p for p in theirs.parts}
        for part in mine.parts:
            assert part.shape == tuple(named[part.name].shape)
            assert torch.equal(part.owner, found[part.name].owner)
        assert float(mine.cost().sum()) == float(theirs.cost().sum())
    assert left_of(sites, {})[0].parts[0].shape == sites[0].parts[0].shape


def test_query_heads_go_with_the_key_value_head_they_read():
    """Neighbours read one: 0 and 1 the first, 2 and 3 the second. The authors' shared code pools 0 and 2, 1 and 3."""
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[:, :16] *= 1e-3  # what query heads 0 and 1 say hardly counts
    method = AdaptPruner(sparsity=0.6, **{**SMALL, "amplitude": 0.0})
    outcome = prune(model, method, task)
    cut = [e for e in outcome.edits if isinstance(e, Remove) and e.site.kind == "head"]
    assert len(cut) == 2
    assert all(e.keep.tolist() == [False, True] for e in cut)
    for e in cut:
        query = next(p for p in e.site.parts if "q_proj" in p.name)
        assert query.owner.reshape(-1).tolist() == [0] * 16 + [1] * 16


# Pruning alone


@pytest.mark.parametrize("amplitude", [0.1, 0.0])
def test_small_cuts_come_to_one_and_the_budget_is_met(amplitude):
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    sites = inner(couple(model, task.example))
    outcome = prune(model, AdaptPruner(sparsity=0.3, **{**SMALL, "amplitude": amplitude}), task)
    total = total_cost(sites)
    assert 0 <= outcome.ledger.removed - 0.3 * total <= 3 * 96
    assert outcome.ledger.prunable == total
    assert outcome.history is None
    whole = sum(p.numel() for p in model.parameters())
    assert outcome.ledger.after.parameters == whole - outcome.ledger.removed
    assert f"{outcome.ledger.after.parameters:,} parameters are left, after" in outcome.notes[0]
    again, masked = copy.deepcopy(model), copy.deepcopy(model)
    edit.apply_(again, outcome.edits)
    torch.testing.assert_close(logits(outcome.model, task), logits(again, task))
    edit.apply_(masked, [Mask(e.site, e.keep) if isinstance(e, Remove) else e for e in outcome.edits])
    torch.testing.assert_close(logits(outcome.model, task), logits(masked, task), rtol=1e-5, atol=1e-5)


def test_blocks_that_do_little_lose_more_and_the_reverse_with_the_sign_turned():
    task = tiny.make_task("decoder")
    widths = {}
    for amplitude in (0.1, 0.0, -0.1):
        method = AdaptPruner(sparsity=0.25, **{**SMALL, "amplitude": amplitude})
        widths[amplitude] = [w for w, _ in left(prune(uneven(), method, task).model)]
    assert widths[0.1][1] < min(widths[0.1][0], widths[0.1][2])
    assert max(widths[0.0]) - min(widths[0.0]) <= 1
    assert widths[-0.1][1] > max(widths[-0.1][0], widths[-0.1][2])


def test_many_small_steps_hurt_less_than_the_same_cut_the_other_way_round():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    ours = prune(model, AdaptPruner(sparsity=0.3, **SMALL), task).model
    backwards = prune(model, AdaptPruner(sparsity=0.3, **SMALL, combine=Backwards()), task).model
    dense = loss(model, task)
    assert loss(ours, task) - dense < 0.5 * (loss(backwards, task) - dense)


class Backwards:
    """What matters most goes first."""

    def of(self, parts):
        return -parts.sum(0)


def test_a_number_of_parameters_counts_the_embeddings():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    whole = sum(p.numel() for p in model.parameters())
    outcome = prune(model, AdaptPruner(parameters=whole - 3000, **SMALL), task)
    assert 0 <= whole - 3000 - outcome.ledger.after.parameters <= 3 * 96
    assert AdaptPruner(parameters=5).budget() is None
    embeddings = model.get_input_embeddings().weight.numel()
    with pytest.raises(BudgetError, match=r"100 parameters were asked for.*(?s:.)*a unit stays at each site"):
        AdaptPruner(parameters=100, **SMALL).run(copy.deepcopy(model), task)
    with pytest.raises(BudgetError, match=f"{embeddings:,} parameters were asked for"):
        AdaptPruner(parameters=embeddings, **SMALL).run(copy.deepcopy(model), task)
    with pytest.raises(BudgetError, match="Ask for less than"):
        AdaptPruner(parameters=whole, **SMALL).run(copy.deepcopy(model), task)


def test_steps_that_do_not_reach_the_size_are_an_error():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    with pytest.raises(BudgetError, match="are gone when the steps are used up"):
        AdaptPruner(sparsity=0.5, samples=8, iterations=2, ceiling=0.2, amplitude=0.0).run(model, task)
    with pytest.raises(BudgetError, match="1 unit being left"):
        AdaptPruner(sparsity=0.99, **SMALL).run(tiny.decoder(), task)


def test_unequal_blocks_go_through_save_and_load(tmp_path):
    model, task = uneven(), tiny.make_task("decoder")
    outcome = prune(model, AdaptPruner(sparsity=0.4, **SMALL), task)
    found = left(outcome.model)
    assert len({heads for _, heads in found}) == 2
    save(outcome, model, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]["stock"]
    again = load(tmp_path / "out")
    assert left(again) == found
    torch.testing.assert_close(logits(outcome.model, task), logits(again, task))
    ids = task.example.inputs[0][:, :5]
    ours, theirs = (m.generate(ids, max_new_tokens=4, do_sample=False) for m in (outcome.model, again))  # with a cache
    assert torch.equal(ours, theirs)


def test_a_plan_says_that_scores_decide_and_one_look_is_an_allocation():
    model, task = tiny.decoder(layers=3), tiny.make_task("decoder")
    method = AdaptPruner(sparsity=0.25, **SMALL)
    found = sites_of(method, model, task)
    assert counts(method, found)[1] is False
    sites = inner(couple(model, task.example))
    does = dict(zip([f"model.layers.{i}" for i in range(3)], (0.5, 0.1, 0.3), strict=True))
    scores = {s.name: torch.full((s.units,), does[s.block]) for s in sites}
    keep = Bent().spread(sites, Budget(0.25), scores)
    neurons = [keep[s.name] for s in sites if s.kind == "channel"]
    assert neurons[0] == 64
    assert neurons[1] < neurons[2] < 64
    spent = sum(float(s.cost().mean()) * (s.units - keep[s.name]) for s in sites)
    assert 0 <= spent - 0.25 * total_cost(sites) <= 1600
    with pytest.raises(SettingError, match="no scores were given"):
        Bent().spread(sites, Budget(0.25))


# Training in between


def test_one_learning_rate_curve_by_hand():
    # 20 steps: two of warm-up, and the last four fall towards a tenth.
    found = [learning_factor(step, 20, 0.1, 0.2, 0.1) for step in range(20)]
    assert found[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found[3:17] == [1.0] * 14
    assert found[17:] == pytest.approx([0.1 + 0.9 * 3 / 4, 0.1 + 0.9 / 2, 0.1 + 0.9 / 4])
    assert [learning_factor(s, 5, 0.0, 0.0, 0.0) for s in range(5)] == [1.0] * 5


def test_stages_share_one_curve_and_one_stream_of_text():
    model, task = tiny.trained("decoder"), Telling(tiny.make_task("decoder"))
    settings = {**SMALL, "warmup": 0.2, "decay": 0.3, "steps": 10}
    outcome = prune(model, AdaptPruner(sparsity=0.3, stages=3, **settings), task)
    rates = [value for _, value in outcome.history.curves["learning rate"]]
    wanted = [5e-3 * learning_factor(step, 10, 0.2, 0.3, 0.0) for step in range(10)]
    assert rates == pytest.approx(wanted)
    assert [step for step, _ in outcome.history.curves["learning rate"]] == list(range(10))
    assert len(outcome.history.losses) == 10
    ours = task.trained
    task.trained = []
    prune(model, AdaptPruner(sparsity=0.3, stages=1, **settings), task)
    assert all(torch.equal(a, b) for a, b in zip(ours, task.trained, strict=True))
    assert len({tuple(rows.flatten().tolist()) for rows in ours}) == 10


class Telling:
    """A task that remembers what was trained on."""

    def __init__(self, task):
        self.task, self.trained = task, []

    def __getattr__(self, name):
        return getattr(self.task, name)

    def loss(self, model, batch):
        if model.training:
            self.trained.append(batch.inputs[0])
        return self.task.loss(model, batch)


def test_every_stage_reaches_its_size_and_training_wins_back_what_was_lost():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    cut = prune(model, AdaptPruner(sparsity=0.4, **SMALL), task)
    accel = prune(model, AdaptPruner(sparsity=0.4, stages=4, steps=60, **SMALL), task)
    assert abs(accel.ledger.removed - cut.ledger.removed) <= 3 * 96
    dense = loss(model, task)
    assert loss(accel.model, task) - dense < 0.5 * (loss(cut.model, task) - dense)
    assert any("heads" in note and "neurons" in note for note in accel.notes)


def test_distillation_by_hand():
    class Fixed(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = nn.Parameter(torch.tensor(values))

        def forward(self, x):
            return self.values.expand(len(x), -1)

    student, teacher = Fixed([0.0, 0.0]), Fixed([0.0, 2.0])
    rule = Distil(teacher, 0.25, 2.0)
    handle = rule.watch(student)
    student(torch.ones(3, 1))
    loop = Loop(student, torch.optim.SGD(student.parameters(), 0.1), 1, batch=Batch((torch.ones(3, 1),)))
    p = torch.tensor([0.0, 1.0]).softmax(0)
    apart = float((p * (p.log() - torch.tensor(0.5).log())).sum())
    assert float(rule.loss(loop, torch.tensor(8.0)).detach()) == pytest.approx(0.75 * 8 + 0.25 * 4 * apart)
    handle.remove()
    rule._answer = {"hidden": 1}
    with pytest.raises(TaskError, match="without logits"):
        rule.loss(loop, torch.tensor(1.0))


def test_a_student_learns_from_the_model_it_was():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    method = AdaptPruner(sparsity=0.3, stages=2, steps=4, distil=1.0, **SMALL)
    outcome = prune(model, method, task)
    assert not outcome.model._forward_hooks
    assert max(outcome.history.losses) >= 0  # a divergence, however small


def test_what_cannot_be_done_is_refused():
    for wrong, said in (
        ({"sparsity": 1.0}, "sparsity 1.0 was asked for"),
        ({"iterations": 0}, "iterations=0"),
        ({"stages": 5, "steps": 3}, "there are 5 stages"),
        ({"ceiling": 0.0}, "ceiling=0"),
        ({"warmup": 0.6, "decay": 0.6}, "share one training"),
        ({"distil": 1.5}, "distil=1.5"),
        ({"warmup": float("nan")}, "warmup=nan"),
        ({"amplitude": float("nan")}, "amplitude=nan"),
    ):
        with pytest.raises(SettingError, match=said):
            AdaptPruner(**wrong).check()
    with pytest.raises(GraphError, match="no repeated blocks"):
        AdaptPruner(**SMALL).run(tiny.mlp(), tiny.make_task("mlp"))


def test_half_precision_does_not_underflow():
    part = Part("a", (2, 2), torch.tensor([[0], [1]]))
    from secateur.axes.taylor import First, Total, group_scores

    site = Site("n", "channel", (2,), (part,))
    small = {"a": torch.full((2, 2), 1e-4, dtype=torch.float16)}
    assert group_scores(site, small, small, small, First(), Total()).min() > 0


def test_the_command_line_prunes_and_what_it_wrote_loads(tmp_path):
    from click.testing import CliRunner

    from secateur.cli import main

    args = [
        "prune",
        "tiny:decoder",
        "adapt-pruner",
        "--task",
        "tiny:toy_text",
        "--sparsity",
        "30%",
        "--out",
        str(tmp_path / "out"),
    ]
    args += [
        "--iterations",
        "10",
        "--amplitude",
        "0.1",
        "--samples",
        "8",
        "--scale",
        "by-rank",
        "--stages",
        "2",
        "--steps",
        "2",
    ]
    found = CliRunner().invoke(main, args)
    assert found.exit_code == 0, found.output
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["method"] == "adapt_pruner"
    again = load(tmp_path / "out")
    assert sum(p.numel() for p in again.parameters()) == record["ledger"]["after"]["parameters"] < 20640
