"""Consensus gates (paper 21): what they cost and learn from, what shutting one comes to, and how they are taken out."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from torch import nn

from secateur.axes.gates import (
    HOME,
    ClippedIdentity,
    SigmoidSlope,
    blocks_of,
    gated_blocks,
    gated_units,
    insert_,
    open_for,
    step,
)
from secateur.axes.schedules import Linear, Schedule
from secateur.cli import main
from secateur.edit import Remove, Replace
from secateur.errors import EvidenceError, GraphError, ModelError, SettingError
from secateur.graph import couple
from secateur.method import load, prune
from secateur.methods.polarization import (
    Consensus,
    Hinge,
    Polarization,
    Squared,
    active,
    consensus,
    disagreement,
    harden_,
    polarization,
)
from secateur.models import save
from secateur.models.resnet import CifarResNet
from secateur.task import Batch
from secateur.train import Snapshot, attach, fit

TESTS = Path(__file__).resolve().parents[1]


def gated(model, example, kinds=("layer",), **given):
    """A model with gates in it, and the gates."""
    found, _ = gated_blocks(model, example) if "layer" in kinds else ([], [])
    if "channel" in kinds:
        found = found + gated_units(model, couple(model, example), kinds)[0]
    return insert_(model, found, **given)


def decide(gates, choices):
    """Gates that say the same of every input: 1 or 0 for each of their units."""
    with torch.no_grad():
        for gate, wanted in zip(gates.modules, choices, strict=True):
            gate.last.weight.zero_()
            gate.last.bias.copy_(torch.tensor([1.0 if w else -1.0 for w in wanted]))


def answer(model, example):
    with torch.no_grad():
        out = example.through(model.eval())
    return out if isinstance(out, torch.Tensor) else out.logits


# The terms of the loss


def test_the_terms_by_hand():
    opened = torch.tensor([0.0, 1.0, 0.5, 0.9])
    assert float(polarization(opened)) == pytest.approx((0.25 + 0.09) / 4)
    assert float(polarization(opened[:2])) == 0  # all agree, on or off
    assert disagreement(opened) == pytest.approx(0.6 / 4)
    assert float(active(opened, torch.tensor([1.0, 1.0, 2.0, 0.0]))) == pytest.approx(0.5)
    assert float(Squared()(torch.tensor(0.3), 0.5)) == pytest.approx(0.04)
    assert float(Hinge()(torch.tensor(0.3), 0.5)) == 0
    assert float(Hinge()(torch.tensor(0.7), 0.5)) == pytest.approx(0.2)


def test_a_step_has_the_slope_of_its_surrogate():
    z = torch.tensor([-50.0, -1.0, 0.0, 0.5, 50.0], requires_grad=True)
    found = step(z, SigmoidSlope())
    assert found.tolist() == [0, 0, 0, 1, 1]  # exactly, and shut at 0
    (slope,) = torch.autograd.grad(found.sum(), z, retain_graph=True)
    s = torch.sigmoid(torch.tensor([-4.0, -1.0, 0.0, 0.5, 4.0]))
    wanted = s * (1 - s)
    torch.testing.assert_close(slope[1:], wanted[1:])
    assert float(slope[0]) == 0  # a step down would shut it further
    (slope,) = torch.autograd.grad(-found.sum(), z)
    torch.testing.assert_close(slope[:4], -wanted[:4])  # a gate far shut can still open
    assert float(slope[4]) == 0
    (slope,) = torch.autograd.grad(step(z, ClippedIdentity()).sum(), z)
    assert slope.tolist() == [0, 1, 1, 1, 0]


def test_a_step_can_be_differentiated_twice():
    z = torch.tensor([0.3], requires_grad=True)
    (once,) = torch.autograd.grad((step(z, SigmoidSlope()) * 3).sum(), z, create_graph=True)
    (twice,) = torch.autograd.grad(once.sum(), z)
    s = torch.sigmoid(torch.tensor(0.3))
    assert float(twice) == pytest.approx(3 * float(s * (1 - s) * (1 - 2 * s)))


def test_agreement_does_not_drive_gates_without_end():
    z = torch.tensor([2.0, -2.0], requires_grad=True)
    optimizer = torch.optim.SGD([z], 1.0)
    for _ in range(300):
        optimizer.zero_grad()
        polarization(step(z, SigmoidSlope())).backward()
        optimizer.step()
    assert z.detach().sign().tolist() == [1, -1]
    assert 3 < float(z.detach().abs().min()) <= float(z.detach().abs().max()) < 4.1


def test_polarization_pulls_each_gate_to_the_side_it_leans_to():
    for share, sign in ((0.9, -1), (0.1, 1), (0.5, 0)):
        opened = torch.tensor([share], requires_grad=True)
        (slope,) = torch.autograd.grad(polarization(opened), opened)
        assert float(slope.sign()) == sign


# Gates in a model


@pytest.mark.parametrize("family", ["cnn", "decoder"])
def test_open_gates_change_nothing_to_the_bit(family):
    model, example = tiny.make_model(family), tiny.make_task(family).example
    before = answer(model, example)
    gates = gated(model, example)
    assert torch.equal(answer(model, example), before)  # gates start open
    gates.take_out_()
    assert torch.equal(answer(model, example), before)
    assert not any(HOME in name for name in model.state_dict())


@pytest.mark.parametrize("family", ["cnn", "decoder", "encoder", "vision transformer", "moe"])
def test_a_shut_block_gives_what_the_model_without_it_gives(family):
    model, example = tiny.make_model(family), tiny.make_task(family).example
    gates = gated(model, example)
    decide(gates, [[0], [1]])
    shut = answer(model, example)
    gates.take_out_()
    assert (answer(model, example) - shut).abs().max() > 1e-4
    edits = harden_(model, gates, [torch.tensor([False]), torch.tensor([True])])
    torch.testing.assert_close(answer(model, example), shut)
    assert [e.name for e in edits if isinstance(e, Replace)] == [gates.guarded[0].name]


def test_shut_channels_give_what_the_model_without_them_gives():
    model, example = tiny.trained("cnn"), tiny.make_task("cnn").example
    gates = gated(model, example, ("channel",))
    draw = torch.Generator().manual_seed(0)
    keep = [torch.rand(each.site.units, generator=draw) < 0.6 for each in gates.guarded]
    assert len(keep) == 4
    decide(gates, [k.tolist() for k in keep])
    shut = answer(model, example)
    before = sum(p.numel() for p in tiny.cnn().parameters())
    edits = harden_(model, gates, keep)
    torch.testing.assert_close(answer(model, example), shut)
    assert all(isinstance(e, Remove) for e in edits)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before
    assert (answer(tiny.trained("cnn"), example) - shut).abs().max() > 1e-3


def test_blocks_and_channels_go_together():
    model, example = tiny.trained("cnn"), tiny.make_task("cnn").example
    gates = gated(model, example, ("layer", "channel"))
    keep = [torch.arange(each.site.units) % 2 == 0 for each in gates.guarded]
    keep[0][:], keep[1][:] = False, True
    decide(gates, [k.tolist() for k in keep])
    shut = answer(model, example)
    harden_(model, gates, keep)
    torch.testing.assert_close(answer(model, example), shut)


def test_gates_look_at_each_input():
    model, example = tiny.cnn(), Batch((torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)),))
    gates = gated(model, example, start=0.0)
    opened = torch.zeros(0)
    for seed in range(20):  # some start treats inputs differently
        gates.take_out_()
        gates = gated(model, example, start=0.0, seed=seed)
        answer(model, example)
        opened = gates.opened()
        if bool((opened != opened[0]).any()):
            break
    assert opened.shape == (6, 2)
    assert set(opened.reshape(-1).tolist()) == {0.0, 1.0}
    assert bool((opened != opened[0]).any())


def test_a_copy_of_a_gated_model_has_gates_of_its_own():
    model, example = tiny.cnn(), tiny.make_task("cnn").example
    gates = gated(model, example)
    whole = answer(model, example)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for gate in getattr(other, HOME):
            gate.last.bias.fill_(-9.0)
    assert torch.equal(answer(model, example), whole)
    assert not torch.equal(answer(other, example), whole)
    gates.take_out_()


def test_a_checkpoint_with_gates_does_not_load_into_what_is_left():
    model, example = tiny.cnn(), tiny.make_task("cnn").example
    gates = gated(model, example)
    old = Snapshot.of(model)
    harden_(model, gates, [torch.tensor([False]), torch.tensor([True])])
    with pytest.raises(RuntimeError, match=f"Unexpected key.*{HOME}"):
        old.restore_(model)


def test_blocks_that_change_the_shape_are_left_alone_and_said():
    model = CifarResNet(8)
    example = Batch((torch.zeros(2, 3, 32, 32),))
    assert blocks_of(model) == ["layer1.0", "layer2.0", "layer3.0"]
    found, notes = gated_blocks(model, example)
    assert [each.name for each in found] == ["layer1.0"]
    assert "layer2.0 is not gated: it has no identity path: [2, 16, 32, 32] goes in and [2, 32, 16, 16]" in notes[0]
    assert float(found[0].cost) == 2 * (2 * 32 * 32 * 16 * 16 * 9)  # two convolutions, multiply-adds times two
    with pytest.raises(GraphError, match=r"a gate for layer2\.0 was asked for, but it has no identity path"):
        gated_blocks(model, example, ["layer2.0"])
    with pytest.raises(SettingError, match="no module has that name"):
        gated_blocks(model, example, ["layer9.0"])


class Wave(nn.Module):
    """Residual blocks along one axis, of what is [batch, 5 channels, 16 steps] there."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv1d(1, 5, 3, padding=1)
        self.blocks = nn.ModuleList(WaveBlock() for _ in range(2))
        self.out = nn.Linear(5, 4)

    def forward(self, x):
        x = self.first(x[:, None])
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(-1))


class WaveBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm1d(5), nn.Conv1d(5, 6, 3, padding=1), nn.Conv1d(6, 5, 1)

    def forward(self, x):
        return x + self.b(torch.relu(self.a(self.norm(x))))


@pytest.mark.parametrize("kinds", [("layer",), ("channel",)])
def test_gates_look_at_the_mean_over_steps_where_channels_come_first(kinds):
    model, task = Wave(), tiny.toy_vectors()
    guarded, _ = Polarization(kinds=kinds).guarded(model, task.example)
    assert {each.name: (each.width, each.axis) for each in guarded if "blocks" in each.name} == {
        "blocks.0": (5, 1), "blocks.1": (5, 1)
    }  # fmt: skip
    gate = insert_(model, guarded).modules[-1]
    inputs = []
    gate.first.register_forward_hook(lambda module, args, out: inputs.append(args[0]))
    given = model.blocks[1].a if kinds == ("channel",) else model.blocks[1]
    given.register_forward_pre_hook(lambda module, args: inputs.append(args[0].mean(2)))
    model.eval()(torch.rand(3, 16))
    assert torch.equal(inputs[0], inputs[1])
    prune(Wave(), Polarization(kinds=kinds, steps=5, samples=64), task)


def test_gates_of_linear_layers_look_at_the_last_axis_of_a_picture():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.wide, self.narrow = nn.Conv2d(3, 5, 1), nn.Linear(5, 7), nn.Linear(7, 4)

        def forward(self, x):  # [batch, height, width, channels] in the middle, as ConvNeXt has it
            return self.narrow(torch.relu(self.wide(self.first(x).permute(0, 2, 3, 1)))).mean((1, 2))

    done = prune(Mixed(), Polarization(kinds=("channel",), steps=5, samples=64), tiny.toy_images())
    assert done.model(torch.rand(2, 3, 8, 8)).shape == (2, 4)


def test_sites_that_cannot_be_gated_are_said():
    model, example = tiny.make_model("decoder"), tiny.make_task("decoder").example
    found, notes = gated_units(model, couple(model, example), ("channel", "head"))
    assert {each.site.kind for each in found} == {"channel", "head"}
    assert len(found) == 4
    left, notes = gated_units(model, couple(model, example), ("channel",), exclude=("*.layers.0.mlp.*",))
    assert len(left) == 1
    assert any("was left out" in note for note in notes)
    rnn = tiny.make_model("rnn")
    _, notes = gated_units(rnn, couple(rnn, tiny.make_task("rnn").example), ("channel",))
    assert all("is not gated" in note for note in notes)


# Training


def trained_with(model, task, steps=6, **given):
    gates = gated(model, task.example)
    rule = Consensus(gates, 0.5, 8.0, Schedule(end=2.0, until=0.5, curve=Linear(), every=1))
    return gates, fit(model, task, steps, [rule], gates.optimizer(task), **given)


def test_the_loss_is_that_of_the_task_the_budget_and_the_polarization():
    model, task = tiny.cnn(), tiny.toy_images()
    batch = next(iter(task.batches("train")))
    gates = gated(model, task.example, start=0.1)
    plain = float(task.loss(model, batch).detach())
    share = gates.opened().detach().mean(0)
    gates.take_out_()
    again = gated(model, task.example, start=0.1)
    rule = Consensus(again, 0.3, 4.0, Schedule(start=1.5, end=2.0, until=0.5, curve=Linear(), every=1))
    model.eval()  # so that batch norms are those of the plain pass
    history = fit(model, task, 2, [Stay(), rule], again.optimizer(task))
    wanted = plain + 4.0 * (float(share.mean()) - 0.3) ** 2 + 1.5 * float(polarization(share))
    assert history.losses[0] == pytest.approx(wanted, rel=1e-4)


class Stay:
    """Keeps the model in evaluation mode."""

    def __getattr__(self, name):
        return (lambda loop, value: value) if name == "loss" else lambda loop: loop.model.eval()


def test_a_budget_of_multiply_adds_is_another_than_one_of_units():
    model, example = CifarResNet(14), Batch((torch.zeros(2, 3, 32, 32),))
    gates = gated(model, example)
    assert [each.name for each in gates.guarded] == ["layer1.0", "layer1.1", "layer2.1", "layer3.1"]
    opened = torch.tensor([1.0, 0.0, 0.0, 1.0])
    assert float(active(opened, Consensus(gates, 0.5).cost)) == 0.5
    assert float(active(opened, Consensus(gates, 0.5, of="flops").cost)) == pytest.approx(0.5)
    halves = gated_units(tiny.cnn(), couple(tiny.cnn(), tiny.toy_images().example), ("channel",))[0]
    costs = [float(each.cost.sum()) for each in halves]
    assert min(costs) > 0
    assert len(set(costs)) > 1
    gates.take_out_()


def test_a_run_taken_up_again_is_the_one_that_was_not_interrupted(tmp_path):
    task, taken = tiny.toy_images(), []
    whole, again = tiny.cnn(), tiny.cnn()

    def watch(loop):
        if loop.step == 3:
            Snapshot.of(whole, loop).save(tmp_path / "three")
        taken.append(loop.step)

    first, history = trained_with(whole, task, watch=watch)
    second, then = trained_with(again, task, resume_from=Snapshot.load(tmp_path / "three"))
    assert taken == [1, 2, 3, 4, 5, 6]
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert then.losses == history.losses[3:]
    assert first.modules
    assert second.modules


def test_in_a_loop_of_ones_own():
    model, task = tiny.cnn(), tiny.toy_images()
    gates = gated(model, task.example)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = attach(optimizer, model, Consensus(gates, 0.5, 8.0), steps=4)
    model.train()
    for batch in list(task.batches("train"))[:4]:
        loss = pruner.loss(task.loss(model, batch))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(pruner.finish().curves["open"]) == 4


def test_with_accumulated_gradients_in_half_precision():
    model, task = tiny.cnn(), tiny.toy_images()
    gates = gated(model, task.example)
    optimizer = gates.optimizer(task)
    pruner = attach(optimizer, model, Consensus(gates, 0.5, 8.0), steps=2)
    model.train()
    before = gates.modules[0].last.weight.detach().clone()
    for place, batch in enumerate(list(task.batches("train"))[:4]):
        with torch.autocast("cpu", torch.bfloat16):
            loss = pruner.loss(task.loss(model, batch)) / 2
        loss.backward()
        if place % 2:
            optimizer.step()
            optimizer.zero_grad()
    assert [step for step, _ in pruner.finish().curves["open"]] == [0, 0, 1, 1]
    assert not torch.equal(before, gates.modules[0].last.weight)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_gates_are_trained_by_the_tasks_optimizer_without_decay_of_biases():
    model, task = tiny.cnn(), tiny.toy_images()
    gates = gated(model, task.example)
    optimizer = gates.optimizer(task, rate=3.0)
    weights, matrices, biases = optimizer.param_groups
    assert (matrices["lr"], biases["lr"]) == (3 * weights["lr"],) * 2
    assert biases["weight_decay"] == 0
    assert len(matrices["params"]) == len(biases["params"]) == 4
    assert len(weights["params"]) == len(list(tiny.cnn().parameters()))


def test_what_cannot_be_trained_is_refused():
    model, task = tiny.cnn(), tiny.toy_images(batch=1)
    early = task.optimizer(model.parameters())
    gates = gated(model, task.example)
    with pytest.raises(SettingError, match="Build it after the gates are put in"):
        fit(model, task, 1, [Consensus(gates, 0.5)], early)
    with pytest.raises(EvidenceError, match="it has one example"):
        fit(model, task, 1, [Consensus(gates, 0.5)], gates.optimizer(task))
    with pytest.raises(ModelError, match="has some already"):
        gated(model, task.example)
    for wanted in (0.0, 1.1):
        with pytest.raises(SettingError, match="it is a share in"):
            Consensus(gates, wanted)
    gates.forget()
    with pytest.raises(GraphError, match=r"block1 has not been run"):
        gates.opened()
    with pytest.raises(EvidenceError, match="there are no examples"):
        open_for(model, gates, [])


WORKER = """
import sys, torch, torch.distributed as dist
from secateur.methods.polarization import polarization, shared
rank = int(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=rank, world_size=2)
mine = torch.tensor([[0.0, 1.0], [1.0, 1.0]][rank], requires_grad=True)  # shares of its own batch
found = shared(mine)
polarization(found).backward()
gradient = mine.grad.clone()
dist.all_reduce(gradient)  # the mean that DistributedDataParallel takes
print(found.tolist(), (gradient / 2).tolist())
dist.barrier()  # so that neither leaves while the other still waits for it
dist.destroy_process_group()
"""


def test_two_processes_come_to_one_consensus(tmp_path):
    """Alone each agrees with itself; together the first gate is at one half."""
    place = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")} | {"OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path / "meet"), str(rank)], env=place, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in running:
        said, wrong = process.communicate(timeout=300)
        assert process.returncode == 0, wrong
        # d/dg of the mean over two gates of g (1 - g) is (1 - 2 g) / 2: 0 at one half, -1/2 at 1
        assert said.strip() == "[0.5, 1.0] [0.0, -0.5]"


# Hardening


def test_most_decide_and_nothing_is_left_empty():
    model, example = tiny.make_model("decoder", 0), tiny.make_task("decoder").example
    gates = gated(model, example, ("layer", "channel"))
    blocks = sum(each.site.kind == "layer" for each in gates.guarded)
    assert blocks == 2
    share = torch.full((len(gates.cost),), 0.5, dtype=torch.float64)
    keep, notes = consensus(gates, share, model)
    assert all(bool(k.all()) for k in keep)
    assert notes == []
    share[:2] = torch.tensor([0.2, 0.4])
    share[2:] = 0.1
    share[5] = 0.3
    keep, notes = consensus(gates, share, model)
    assert [k.tolist() for k in keep[:2]] == [[False], [True]]
    assert keep[2].nonzero().tolist() == [[3]]
    assert notes[0].startswith("every unit of")
    assert any(note.startswith("collapsed: every gated block is shut") for note in notes)
    assert "every block of model.layers is shut: model.layers.1 stays" in notes
    gates.take_out_()


def test_gates_agree_and_hardening_costs_nothing_on_toy_images():
    """The paper's contrast at toy size: with polarization what the gates do is what the network without them does."""
    assert load("polarization") is Polarization
    task = tiny.toy_images()
    done = prune(tiny.trained("cnn"), Polarization(steps=60, strength=8.0, gate_rate=4.0), task, measure="test")
    assert any(isinstance(edit, Replace) for edit in done.edits)
    assert done.history.curves["disagreement"][-1][1] == 0
    assert any(note.startswith("disagreement 0.0000") for note in done.notes)
    curves = done.history.curves
    assert curves["validation accuracy with gates"] == curves["validation accuracy hardened"]
    assert curves["held-out disagreement"] == [(60, 0.0)]
    assert done.record.measured("after")["accuracy"] > done.record.measured("before")["accuracy"] - 0.02
    assert not any(HOME in name for name in done.model.state_dict())
    assert done.ledger.after.flops < 0.8 * done.ledger.before.flops
    assert done.ledger.after.parameters < done.ledger.before.parameters
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in done.model.modules())


def test_too_strong_a_budget_closes_everything_and_is_said():
    task = tiny.toy_images()
    done = prune(tiny.trained("cnn"), Polarization(sparsity=0.99, steps=40, strength=400.0), task)
    assert any(note.startswith("collapsed") for note in done.notes)
    assert task.loss(done.model, task.example).isfinite()


def test_batch_norms_take_their_statistics_anew_where_gates_did_not_agree():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    done = prune(model, Polarization(kinds=("channel",), steps=30, strength=8.0, gate_rate=4.0, polarize=0.0), task)
    disagreed = not any(note.startswith("disagreement 0.0000") for note in done.notes)
    assert disagreed == any(edit.describe().startswith("update") for edit in done.edits)
    assert disagreed


def test_saved_it_has_fewer_layers_and_stock_transformers_takes_it(tmp_path):
    import transformers as hub

    whole, task = tiny.trained("decoder"), tiny.make_task("decoder")
    done = prune(whole, Polarization(steps=20, strength=20.0, gate_rate=4.0, samples=16), task)
    assert len([e for e in done.edits if isinstance(e, Replace)]) == 1
    save(done, whole, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert said["stock"], said["why_not"]
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(answer(stock, task.example), answer(done.model, task.example))
    assert sum(p.numel() for p in stock.parameters()) == done.ledger.after.parameters


@pytest.mark.parametrize("name", ["polarization", "sap"])
def test_from_the_command_line(name, tmp_path):
    settings = {
        "polarization": ["--steps", "30", "--strength", "8", "--gate-rate", "4"],
        "sap": ["--rounds", "1", "--steps", "30"],
    }[name]
    command = ["prune", "tiny:cnn", name, "--task", "tiny:toy_images", *settings, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["method"] == name
    assert record["settings"]["steps"] == 30


@pytest.mark.parametrize("family", ["mlp", "rnn"])
def test_models_without_blocks_are_refused(family):
    with pytest.raises(GraphError, match="no two blocks are alike"):
        Polarization(steps=1).run(tiny.make_model(family), tiny.make_task(family))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"sparsity": 1.0}, "sparsity 1.0 was asked for"),
        ({"of": "unit"}, "Did you mean units"),
        ({"kinds": ("layers",)}, "Did you mean layer"),
        ({"kinds": ()}, "gates for"),
        ({"steps": 0}, "steps=0 was given"),
        ({"strength": -1.0}, "strength=-1.0"),
        ({"polarize": float("nan")}, "polarize=nan"),
        ({"gate_rate": 0.0}, "gate_rate=0.0"),
        ({"start": float("nan")}, "start=nan"),
        ({"ramp": 1.5}, "a schedule from 0 to 1.5"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.cnn(), Polarization(**given), task=None)


def test_nn_sequential_blocks_are_found_inside_and_containers_are_not():
    model = nn.Sequential(tiny.Residual(4), nn.Sequential(tiny.Residual(4), tiny.Residual(4)))
    assert blocks_of(model) == ["0", "1.0", "1.1"]
