"""Activating while pruning (paper 37): which units fire, which weights go, around any other method, and the claim."""

from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import nn

from secateur.axes import Global, Gradient, PerMatrix
from secateur.axes.rewinding import Course, Stay
from secateur.axes.rules import everything
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, SettingError
from secateur.method import Card, Method, load, prune
from secateur.methods.activating import (
    Activating,
    AnyOrder,
    Firing,
    LeastMoved,
    MostMoved,
    Split,
    dead_rates,
    lowest,
)
from secateur.methods.gradual import GradualPruning
from secateur.methods.magnitude import Magnitude
from secateur.methods.oneshot import OneShot
from secateur.methods.perp import Perp
from secateur.methods.slicegpt import SliceGPT
from secateur.methods.snip import Snip
from secateur.methods.stable_lottery import StableLottery
from secateur.methods.wanda import Wanda
from secateur.outcome import Outcome
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.learners import Adam
from secateur.train import Snapshot

ROWS = torch.tensor([[1.0, -1.0, -1.0], [2.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [3.0, -1.0, 0.0]])


class Called(nn.Module):
    """Three units, each given one of the inputs."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x.clone())


# Which units fire


@pytest.mark.parametrize(
    "function",
    [
        nn.ReLU(),
        nn.ReLU(inplace=True),
        F.relu,
        torch.relu,
        torch.relu_,
        torch.Tensor.relu,
        lambda x: F.relu(x, inplace=True),
        F.relu6,
        F.gelu,
        F.silu,
        nn.LeakyReLU(inplace=True),
    ],
)
def test_a_unit_is_dead_where_it_is_given_nothing_above_zero(function):
    found = dead_rates(Called(function), [Batch((ROWS,))])
    # unit 2 never fires: static 1/3. Off: 1 of 4, 3 of 4 and 4 of 4, so 8 of 12 pairs, of which 4 are unit 2's.
    assert found.total == Firing(3, pytest.approx(1 / 3), pytest.approx(1 / 3))
    assert found.total.dead == pytest.approx(8 / 12)
    assert found.examples == 4


def test_batches_of_any_size_say_the_same_and_layers_are_told_apart():
    model = nn.Sequential(nn.ReLU(), nn.Linear(3, 2, bias=False), nn.ReLU())
    model[1].weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, -1.0, 0.0]])
    whole = dead_rates(model, [Batch((ROWS,))])
    assert whole == dead_rates(model, [Batch((row[None],)) for row in ROWS])
    assert list(whole.layers) == ["0", "2"]
    assert whole.layers["2"] == Firing(2, 0.5, pytest.approx(1 / 8))  # the second unit never; the first once of 4
    assert whole.total.units == 5
    assert whole.total.static == pytest.approx(2 / 5)  # units count, not layers


def test_the_units_of_a_convolution_are_channels_at_positions_and_one_module_may_call_twice():
    class Twice(nn.Module):
        def forward(self, x):
            return F.relu(x) + F.relu(-x)

    x = torch.zeros(2, 3, 4, 5)
    x[0, 0, 0, 0] = 1.0
    found = dead_rates(nn.Sequential(Twice()), [Batch((x,))])
    assert list(found.layers) == ["0", "0#2"]
    assert found.layers["0"] == Firing(60, pytest.approx(59 / 60), pytest.approx(1 / 120))
    assert found.layers["0#2"] == Firing(60, 1.0, 0.0)


def test_reading_dead_rates_leaves_the_model_alone_and_takes_batch_norms_as_they_are():
    model, task = tiny.cnn().train(), tiny.toy_images()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    one = dead_rates(model, task.batches("calibration", 64))
    two = dead_rates(model, replace(task, batch=8).batches("calibration", 64))
    assert one.total == two.total  # a batch's own statistics would depend on its size
    assert model.training
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert set(one.layers) == {"", "#2", "block1", "block1#2", "block2", "block2#2"}
    assert one.functions == ("relu",)


def test_units_whose_number_changes_are_refused():
    model = nn.Sequential(nn.ReLU())
    with pytest.raises(EvidenceError, match=r"there are \[3\] in one batch and \[4\] in another"):
        dead_rates(model, [Batch((torch.zeros(2, 3),)), Batch((torch.zeros(2, 4),))])


# Which weights go


def test_exactly_as_many_go_ties_by_size_and_then_in_order():
    cost = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    size = torch.tensor([3.0, 1.0, 0.5, 1.0, 2.0])
    within = torch.tensor([True, True, True, True, False])
    assert lowest(cost, size, within, 1).tolist() == [False, True, False, False, False]
    assert lowest(cost, size, within, 3).tolist() == [True, True, False, True, False]
    assert lowest(cost, size, within, 0).tolist() == [False] * 5


def one_layer(values):
    model = nn.Sequential(nn.Linear(len(values), 1, bias=False))
    model[0].weight.data = torch.tensor([values])
    return model


def one_round(start, end, **given):
    """The weights that stay of one layer after a round, and what was remarked."""
    origin = Snapshot.of(one_layer(start))
    model = one_layer(end)
    sites = weights(model)
    rounds = Split(Activating(**{"fraction": 0.4, "activating": 0.2, **given}), model, tiny.toy_vectors(), sites)
    keep = rounds.choose(everything(sites), origin)
    return keep["0.weight"].reshape(-1).tolist(), rounds


def test_a_round_takes_the_smallest_and_then_negative_weights_that_hardly_moved():
    start = [0.50, -0.60, 0.10, -0.90, -0.30, 0.70, -0.10, 0.85, -0.45, 0.65]
    end = [0.55, -0.61, 0.01, -0.50, -0.32, 0.75, -0.02, 0.80, -0.80, 0.66]
    # Of ten: the two smallest go (0.01 and -0.02); of the negative ones left, moved by 0.01, 0.4, 0.02 and 0.35,
    # the two that moved least: -0.61 and -0.32. The 0.66 moved as little, and is not negative.
    keep, rounds = one_round(start, end)
    assert keep == [True, False, False, True, False, True, False, True, True, True]
    assert (rounds.gone, rounds.activated, rounds.notes) == (2, 2, [])
    assert one_round(start, end, sign=1)[0] == [False, True, False, True, True, True, False, True, True, False]
    assert one_round(start, end, order=MostMoved())[0] == [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
        True,
        False,
        True,
    ]
    chance = one_round(start, end, order=AnyOrder())[0]
    assert sum(chance) == 6
    assert all(chance[i] for i in (0, 5, 7, 9))


def test_where_too_few_negative_weights_are_left_the_method_takes_the_rest_and_a_note_says_so():
    start = [0.1 * i for i in range(1, 11)]
    end = [0.1, -0.9, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.05]
    keep, rounds = one_round(start, end)
    assert keep == [False, False, False, True, True, True, True, True, True, False]  # 0.05, 0.1; -0.9; 0.2
    assert (rounds.gone, rounds.activated) == (3, 1)
    assert rounds.notes == [
        "round 1: 1 weights of the sign were left of 2 that were to go by AP; magnitude was asked for the other 1"
    ]


def test_weights_that_never_moved_all_tie_and_still_exactly_as_many_go():
    values = [-0.1 * i for i in range(1, 11)]
    assert one_round(values, values)[0] == [False] * 4 + [True] * 6


AROUND = [
    Magnitude(allocation=Global()),
    Magnitude(),
    OneShot(criterion=Gradient(), allocation=Global(), pattern=PerMatrix(), samples=32),
    Snip(samples=32),
    Wanda(samples=32),
]


@pytest.mark.parametrize("around", AROUND, ids=["global", "layer-wise", "global gradient", "snip", "wanda"])
def test_the_method_inside_chooses_as_it_does_alone(around):
    model, task = tiny.cnn(), tiny.toy_images()
    sites = weights(model)
    start = Snapshot.of(tiny.cnn())
    method = Activating(around=around, fraction=0.3, activating=0.1)
    rounds = Split(method, model, task, sites)
    first = rounds._prune(everything(sites), 5755)  # 7,192 less floor(0.2 * 7,192)
    alone = {e.site.name: e.keep for e in prune(model, method.asked(1437 / 7192), task).edits if isinstance(e, Mask)}
    assert {name: mask.tolist() for name, mask in first.items()} == {n: m.tolist() for n, m in alone.items()}
    rounds = Split(method, model, task, sites)
    keep = everything(sites)
    counts = []
    for _ in range(3):
        apply_(model, [Mask(site, keep[site.name]) for site in sites])
        after = rounds.choose(keep, start)
        assert all(not bool((after[name] & ~keep[name]).any()) for name in keep)  # what is gone stays gone
        keep = after
        counts.append(sum(int(mask.sum()) for mask in keep.values()))
    slack = {"magnitude": 21, "wanda": 60}.get(around.name, 0) if around is not AROUND[0] else 0
    left = 7192
    for count in counts:
        left -= int(0.2 * left + 1e-9) + int(0.1 * left + 1e-9)
        assert count == pytest.approx(left, abs=slack)  # one ranking is exact; seven layers round, and Wanda's rows


def test_masked_weights_that_tie_with_others_are_not_brought_back():
    model = one_layer([0.0, 0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    sites = weights(model)
    keep = {"0.weight": torch.tensor([[True, True, False, False] + [True] * 6])}
    rounds = Split(Activating(fraction=0.4, activating=0.0), model, tiny.toy_vectors(), sites)
    after = rounds._prune(keep, 7)["0.weight"].reshape(-1).tolist()
    assert sum(after) == 7
    assert not after[2]
    assert not after[3]


@dataclass(frozen=True, kw_only=True)
class FirstOnly(Method):
    """Masks the first matrix alone."""

    sparsity: float = 0.5

    card: ClassVar = Card(0, "First", venue="here", year=2026)

    def run(self, model, task):
        site = weights(model)[0]
        keep = PerMatrix().select(tensors(model)[site.name].detach().abs(), round((1 - self.sparsity) * site.units))
        return Outcome(model, apply_(model, [Mask(site, keep)]))


def test_what_the_method_inside_does_not_prune_is_left_whole_and_counts_for_nothing():
    outcome = Activating(around=FirstOnly(), rounds=2, fraction=0.5, activating=0.1, steps=5, probe=0).run(
        tiny.mlp(), tiny.toy_vectors()
    )
    kept = {mask.site.name: mask.kept for mask in outcome.edits}
    assert kept == {"0.weight": 512 - 205 - 51 - 102 - 25, "2.weight": 1024, "4.weight": 128}
    assert sum("does not prune 2.weight, 4.weight: left whole" in note for note in outcome.notes) == 1


# Rounds


@dataclass(frozen=True)
class Listening(LeastMoved):
    """Keeps what it is shown."""

    seen: ClassVar[list] = []

    def cost(self, start, end, draw):
        self.seen.append((start.clone(), end.clone()))
        return (end - start).abs()


@pytest.mark.parametrize("rewind", [None, Stay()])
def test_movement_is_that_of_the_rounds_own_training(rewind):
    Listening.seen.clear()
    model, task = tiny.mlp(), tiny.toy_vectors()
    origin = torch.cat([site.parts[0].read(tensors(model)).detach().reshape(-1) for site in weights(model)]).clone()
    given = {} if rewind is None else {"rewind": rewind}
    Activating(rounds=3, fraction=0.3, activating=0.1, steps=8, probe=0, order=Listening(), **given).run(model, task)
    assert len(Listening.seen) == 3
    assert torch.equal(Listening.seen[0][0], origin)
    for (_, ended), (begun, _) in zip(Listening.seen, Listening.seen[1:], strict=False):
        assert torch.equal(begun, ended if rewind else origin)


def test_weights_and_biases_that_stay_go_back_to_where_they_started(monkeypatch):
    import secateur.axes.rewinding as module

    starts, plain = [], module.fit

    def watched(model, task, steps, rules, **given):
        if given.get("resume_from") is not None:
            starts.append(given["resume_from"])
        return plain(model, task, steps, rules, **given)

    monkeypatch.setattr(module, "fit", watched)
    model = tiny.mlp()
    origin = Snapshot.of(model)
    Activating(rounds=2, steps=8, probe=0).run(model, tiny.toy_vectors())
    assert len(starts) == 2
    for start in starts:
        assert start.optimizer is None
        assert all(torch.equal(value, origin.model[name]) for name, value in start.model.items())


@pytest.mark.parametrize("call", [2, 3])
@pytest.mark.parametrize("order", [LeastMoved(), AnyOrder()])
def test_a_run_that_was_killed_is_taken_up_at_its_round(order, call, tmp_path, monkeypatch):
    model, task = tiny.mlp(), tiny.toy_vectors()
    inside = Wanda(samples=32)  # goes through the blocks, and would find those of another round in the journal
    method = Activating(around=inside, rounds=3, fraction=0.3, activating=0.1, steps=8, probe=64, order=order)
    alone = prune(model, method, task)
    plain, calls = Split.choose, []

    def killed(self, *given):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return plain(self, *given)

    monkeypatch.setattr(Split, "choose", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(model, method, task, resume=tmp_path / "journal")
    again = prune(model, method, task, resume=tmp_path / "journal")
    assert len(calls) == 4
    mine, theirs = alone.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert again.notes == alone.notes
    assert again.history.curves == alone.history.curves
    last = prune(model, method, task, resume=tmp_path / "journal")  # killed after the last round, before it was saved
    assert last.notes == alone.notes


def test_the_outcome_says_what_went_how_and_how_the_dead_rates_went():
    outcome = prune(
        tiny.mlp(), Activating(rounds=2, fraction=0.3, activating=0.1, steps=20, probe=64), tiny.toy_vectors()
    )
    units, left, ap = 1664, 1664, 0
    for _ in range(2):
        own, q = int(0.2 * left + 1e-9), int(0.1 * left + 1e-9)
        left, ap = left - own - q, ap + q
    assert sum(mask.kept for mask in outcome.edits) == left
    assert outcome.notes[0] == (
        f"{left / units:.2%} of the weights are left after 2 rounds: {units - left - ap} went by magnitude, {ap} by AP"
    )
    assert any(note.startswith("dead rate on 64 examples over the last training: dynamic ") for note in outcome.notes)
    curves = outcome.history.curves
    assert [step for step, _ in curves["dynamic dead rate"]] == [0, 20, 20, 40, 40, 60]
    assert len(curves["static dead rate"]) == 6
    assert len(curves["negative weights"]) == 3
    assert curves["negative weights"][0][1] > curves["negative weights"][-1][1]  # AP takes only these


def test_networks_without_a_relu_are_remarked_on_and_smooth_ones_explained():
    method, task = Activating(rounds=1, steps=3, probe=32), tiny.toy_vectors()
    plain = method.run(nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 4)), task)
    assert any("no activation like a ReLU was seen" in note for note in plain.notes)
    smooth = method.run(nn.Sequential(nn.Linear(16, 8), nn.SiLU(), nn.Linear(8, 4)), task)
    assert any("silu: dead means a pre-activation at or below zero" in note for note in smooth.notes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"activating": 0.2}, "0.2 of the weights were to go by AP in rounds of 0.2, but it is a part"),
        ({"activating": -0.1}, "-0.1 of the weights were to go by AP"),
        ({"fraction": 1.0}, "a fraction of 1 a round"),
        ({"rounds": 0}, "0 rounds of dropping weights"),
        ({"steps": 0}, "trainings of 0 steps"),
        ({"sign": 0}, "weights of sign 0"),
        ({"probe": -1}, "-1 examples"),
        (
            {"around": StableLottery()},
            "stable_lottery in rounds was asked for, but it trains by itself, and would go back",
        ),
        ({"around": GradualPruning()}, "gradual in rounds was asked for, but it trains by itself"),
        ({"around": Perp()}, "perp in rounds was asked for, but it prunes nothing"),
        ({"around": SliceGPT()}, "it cannot be told a sparsity and answer with masks of single weights"),
        ({"around": Activating()}, "activating in rounds was asked for, but it trains by itself"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    assert load("activating") is Activating
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), Activating(**given), task=None)


def test_units_fire_more_often_with_it_than_without():
    """The paper's claim at toy size: digits, 64-64-32-10, rounds of 50 % down to 12.5 %, a fifth of them by AP."""
    from secateur.tasks.images import digits

    task = digits(flat=True, seed=0, learner=Adam(5e-3), batch=100)
    rates, accuracy = {}, {}
    for q in (0.0, 0.1):
        model = tiny.seeded(
            lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), 0
        )
        method = Activating(rounds=3, fraction=0.5, activating=q, steps=60, warmup=0.0, probe=300)
        outcome = method.run(model, task)
        assert sum(mask.kept for mask in outcome.edits) == pytest.approx(6464 / 8, abs=5)
        rates[q] = outcome.history.curves["dynamic dead rate"][-1][1]
        accuracy[q] = task.measure(model, "test")["accuracy"]
    assert rates[0.1] < rates[0.0] - 0.01, rates
    assert accuracy[0.1] > accuracy[0.0] - 0.01, accuracy


def test_norms_and_biases_are_left_alone_and_weights_that_are_zero_may_grow():
    model, task = tiny.cnn(), tiny.toy_images()
    with torch.no_grad():
        model.conv.weight[0, 0, 0, 0] = 0.0
    sites = weights(model)
    Course(5).train(model, task, sites, everything(sites))
    assert float(model.conv.weight.detach()[0, 0, 0, 0]) != 0.0  # held by the mask, not by being zero
    assert {mask.site.name for mask in Activating(rounds=1, steps=3, probe=0).run(model, task).edits} == {
        name for name, value in model.named_parameters() if value.dim() > 1
    }


def test_it_goes_around_a_method_from_the_command_line_and_what_is_saved_loads(tmp_path):
    from click.testing import CliRunner
    from safetensors.torch import load_file

    from secateur.cli import main

    settings = [
        "--around",
        "snip(samples=32)",
        "--rounds",
        "2",
        "--steps",
        "8",
        "--probe",
        "32",
        "--order",
        "most-moved",
    ]
    args = ["prune", "tiny:mlp", "activating", "--task", "tiny:toy_vectors", *settings, "--out", str(tmp_path / "out")]
    found = CliRunner().invoke(main, args, terminal_width=200)
    assert found.exit_code == 0, found.output
    assert "went by snip" in found.stderr
    saved = load_file(tmp_path / "out" / "model.safetensors")
    model = tiny.mlp()
    model.load_state_dict(saved)
    gone = sum(int((value == 0).sum()) for name, value in saved.items() if name.endswith("weight"))
    assert gone == 597  # floor(0.18 n) and floor(0.02 n) of 1,664, and again of what was left
