"""Pruned networks trained from new weights: how long, from what, and with what account of the work."""

import copy
import json

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.schedules import Steps
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import ModelError, SettingError
from secateur.method import prune
from secateur.methods.expert_removal import ExpertRemoval
from secateur.methods.l1_norm import L1Norm
from secateur.methods.magnitude import Magnitude
from secateur.methods.shortgpt import ShortGPT
from secateur.outcome import count_flops
from secateur.studies.rethinking import (
    BUDGETS,
    FineTune,
    Recipe,
    ScratchAll,
    ScratchB,
    ScratchE,
    Work,
    advantages,
    audit,
    fresh_,
    held,
    table,
    ticket,
    work_of,
)
from secateur.task import Around
from secateur.train import Loop, fit


def test_how_long_each_arm_trains_by_hand():
    recipe, work = Recipe(10), Work(dense=500.0, pruned=200.0, batch=4)
    assert ScratchE().steps(recipe, work) == 10
    assert ScratchB().steps(recipe, work) == 25  # 10 * 500 / 200
    assert ScratchB(most=2).steps(recipe, work) == 20
    assert FineTune().steps(recipe, work) == 2  # a quarter, the whole part
    # dense 10 * 500 and fine-tuning 2 * 200, in steps of 200
    assert ScratchAll().steps(recipe, work) == 27
    # the pruner's own 4 steps of the dense network come on top
    before = Work(500.0, 200.0, 4, before=Work(500.0, 200.0, 4).of_steps(4, 500.0))
    assert ScratchAll().steps(recipe, before) == 37


@pytest.mark.parametrize("steps", [8, 9])
def test_the_rate_falls_at_the_fractions_even_of_odd_lengths(steps):
    model, task = tiny.mlp(), tiny.make_task("mlp")
    seen = []

    def watch(loop: Loop):
        seen.append(loop.optimizer.param_groups[0]["lr"])

    fit(model, task, steps, [ScratchE().rate(Recipe(steps))], watch=watch)
    base = task.optimizer(model.parameters()).param_groups[0]["lr"]
    firsts = [next(i for i, rate in enumerate(seen) if rate < base * by * 1.01) for by in (0.1, 0.01)]
    assert firsts == [-(-steps // 2), -(-3 * steps // 4)]
    seen.clear()
    fit(model, task, 3, [FineTune().rate(Recipe(steps))], watch=watch)
    assert seen == pytest.approx([base * 0.01] * 3)  # the last rate of the recipe, all along


def test_masked_layers_count_by_the_share_that_stays():
    model, task = tiny.mlp(), tiny.make_task("mlp")  # 16 -> 32 -> 32 -> 4
    assert work_of(model, task) == 2 * (16 * 32 + 32 * 32 + 32 * 4) == count_flops(model, task.example) / 2
    done = Magnitude(sparsity=0.75).run(model, task)
    hold = held(model, done.edits)
    assert work_of(model, task, hold) == 2 * (16 * 32 + 32 * 32 + 32 * 4) / 4


def test_layers_of_several_weights_count_by_what_stays_of_all_of_them():
    model, task = tiny.rnn(), tiny.make_task("rnn")
    whole = work_of(model, task)
    done = Magnitude(sparsity=0.75, exclude=()).run(model, task)
    hold = held(model, done.edits)
    assert len([site for site in hold.sites if site.parts[0].module == "gru"]) == 4
    assert work_of(model, task, hold) == pytest.approx(whole / 4, rel=0.01)


def test_experts_count_whether_whole_or_masked():
    model, task = tiny.make_model("moe"), tiny.make_task("moe")
    tokens, width = 16, 32  # two blocks; q and o, k and v of half the width, a router to 4, and 2 experts for a token
    attention = 2 * width * width + 2 * width * width // 2
    experts = 2 * 3 * width * 32
    each = 2 * (attention + 4 * width + experts) + width * 64
    assert work_of(model, task) == 2 * tokens * each == count_flops(model, task.example) / task.example.size
    done = Magnitude(sparsity=0.5, include=("expert",)).run(model, task)
    left = work_of(model, task, held(model, done.edits))
    assert left == pytest.approx(2 * tokens * (each - experts), rel=1e-6)


def test_new_weights_under_a_mask_are_larger_as_fewer_lead_on():
    model = tiny.seeded(lambda: nn.Sequential(nn.Linear(64, 256), nn.BatchNorm1d(256), nn.Linear(256, 4)), 0)
    (first, _) = weights(model)
    draw = torch.Generator().manual_seed(0)
    keep = torch.rand(first.shape, generator=draw) < 0.25
    hold = held(model, apply_(model, [Mask(first, keep)]))
    with torch.no_grad():
        model[1].running_mean.fill_(3.0)
    fresh_(model, hold, draw)
    weight = model[0].weight.detach()
    assert bool((weight[~keep] == 0).all())
    # n = nnz / inputs = 16,384 / 4 / 64 = 64 outputs an input leads to: a deviation of sqrt(2 / 64)
    assert float(weight[keep].std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    assert bool((model[1].running_mean == 0).all())


def test_buffers_that_are_shape_stay_and_statistics_do_not():
    class Picks(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("index", torch.tensor([2, 0]))
            self.linear = nn.Linear(2, 4)

        def forward(self, x):
            return self.linear(x[:, self.index])

    model = tiny.seeded(Picks, 0)
    old = model.linear.weight.detach().clone()
    fresh_(model, held(model, []), torch.Generator().manual_seed(1))
    assert model.index.tolist() == [2, 0]
    assert not torch.equal(model.linear.weight, old)


OUTCOMES = {
    "channels": ("cnn", L1Norm(sparsity=0.5)),
    "weights": ("cnn", Magnitude(sparsity=0.8)),
    "blocks": ("decoder", ShortGPT(sparsity=0.5, samples=8)),
    "experts": ("moe", ExpertRemoval()),
}


@pytest.mark.parametrize("what", OUTCOMES)
def test_any_outcome_is_trained_anew_and_left_as_it_was(what):
    family, method = OUTCOMES[what]
    task = tiny.make_task(family)
    dense = tiny.trained(family)
    whole = work_of(dense, task)
    done = prune(dense, method, task)
    before = {k: v.clone() for k, v in done.model.state_dict().items()}
    shapes = {k: v.shape for k, v in done.model.named_parameters()}
    arms = audit(done.model, done.edits, task, Recipe(4), whole, split="val")
    assert [arm.name for arm in arms] == [budget.name for budget in BUDGETS]
    assert all(torch.equal(v, before[k]) for k, v in done.model.state_dict().items())
    twin = fresh_(copy.deepcopy(done.model), held(done.model, done.edits), torch.Generator().manual_seed(0))
    assert {k: v.shape for k, v in twin.named_parameters()} == shapes
    moved = [k for k, v in twin.named_parameters() if v.dim() > 1 and not torch.equal(v, before[k])]
    assert moved
    tune, e, b, every = arms
    assert e.work == e.total <= b.work <= every.work
    one = every.work / every.steps
    assert tune.total - one < every.total <= tune.total  # as much work as pruning took, to a step
    assert whole * 4 * 3 * 8 <= tune.total  # batches of 8 at least


def test_masks_are_held_through_every_arm_and_the_same_seed_gives_the_same_arms():
    class Counting(Around):
        def measure(self, model, split="val"):
            zeros.append([int((p == 0).sum()) for p in model.parameters() if p.dim() > 1])
            return super().measure(model, split)

    zeros, task, model = [], tiny.make_task("mlp"), tiny.trained("mlp")
    done = prune(model, Magnitude(sparsity=0.9), task)
    gone = [int((~keep).sum()) for keep in held(done.model, done.edits).keep.values()]
    first, again = (
        audit(done.model, done.edits, Counting(task), Recipe(6), work_of(model, task), split="val") for _ in range(2)
    )
    assert first == again
    assert zeros == [gone] * 8


def test_a_ticket_has_the_pruned_shape_and_the_weights_training_started_from():
    task, start = tiny.make_task("cnn"), tiny.cnn()
    done = prune(tiny.trained("cnn"), L1Norm(sparsity=0.5), task)
    found = ticket(start, done.edits)
    assert {k: v.shape for k, v in found.named_parameters()} == {k: v.shape for k, v in done.model.named_parameters()}
    keep = next(e.keep for e in done.edits if e.site.name == "conv")
    assert torch.equal(found.conv.weight, start.conv.weight[keep])


def test_rows_are_means_over_seeds_and_differences_are_of_pairs():
    task = tiny.make_task("mlp")
    done = prune(tiny.trained("mlp"), L1Norm(sparsity=0.5), task)
    arms = []
    for seed in range(2):
        arms += audit(done.model, done.edits, tiny.FAMILIES["mlp"][1](seed=seed), Recipe(5), 1e4, split="val")
    rows = {row.name: row for row in table(arms, "accuracy")}
    assert rows["scratch-B"].seeds == 2
    assert rows["scratch-B"].steps == int(5 * 1e4 / work_of(done.model, task))
    found = advantages(arms, "accuracy", "scratch-B", "fine-tune")
    assert sum(found) / 2 == pytest.approx(rows["scratch-B"].mean - rows["fine-tune"].mean)


def test_a_narrow_network_from_new_weights_does_as_well_as_one_that_is_fine_tuned():
    task, dense = tiny.make_task("cnn"), tiny.trained("cnn")
    done = prune(dense, L1Norm(sparsity=0.5), task)
    arms = audit(
        done.model, done.edits, task, Recipe(100), work_of(dense, task), budgets=[FineTune(), ScratchE()], split="val"
    )
    tune, scratch = (arm.values["accuracy"] for arm in arms)
    assert scratch > tune - 0.02


def test_a_recipe_that_cannot_be_is_refused():
    with pytest.raises(SettingError, match="a dense training of 0 steps"):
        Recipe(0)
    assert Recipe(3, Steps((0.5,))).last == pytest.approx(0.1)


def test_the_verb_trains_a_saved_resnet20_from_new_weights(data, tmp_path):
    from click.testing import CliRunner

    from secateur.cli.prune import command as prune_command
    from secateur.cli.scratch import command, dense_work
    from secateur.outcome import Record

    small = ["--task.train_size", "64", "--task.val_size", "32", "--task.test_size", "16", "--task.batch", "32"]
    folder, out = tmp_path / "pruned", tmp_path / "arms.json"
    run = CliRunner().invoke(prune_command, ["resnet20", "magnitude", "--out", str(folder), "--no-eval", *small])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(
        command, [str(folder), "--epochs", "1", "--seeds", "1", "--arms", "fine-tune,scratch-b", "--out", str(out)]
    )
    assert run.exit_code == 0, run.output
    told = json.loads(out.read_text())
    assert [arm["name"] for arm in told["arms"]] == ["fine-tune", "scratch-B"]
    work = told["work per example"]
    assert work["dense"] / work["pruned"] == pytest.approx(2, rel=0.02)  # half of all weights are masked
    assert told["arms"][1]["steps"] == int(2 * work["dense"] / work["pruned"])
    record = Record.read(folder / "secateur.json")
    assert dense_work(record, record.ledger.after.flops / 2) == record.ledger.before.flops / 2


def test_what_the_verb_cannot_do_it_says_before_it_opens_anything(tmp_path):
    from secateur.cli.recover import refuse_unpruned
    from secateur.cli.scratch import budgets_named, refuse_epochs

    with pytest.raises(SettingError) as caught:
        budgets_named("fine-tune,scratch-C")
    assert str(caught.value).startswith(
        "the arm 'scratch-C' was asked for, but there is none of that name.\nDid you mean"
    )
    with pytest.raises(SettingError, match="a dense training of 0 epochs was given"):
        refuse_epochs(0)
    with pytest.raises(ModelError):
        refuse_unpruned(str(tmp_path / "nothing"))
