"""Late rewinding (paper 46): the whole state goes back to step k, twins measure stability, and the claim on digits."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

import secateur.axes.rewinding as rewinding
from secateur.axes.rewinding import (
    Course,
    Rewind,
    Rounds,
    Stay,
    Together,
    magnitudes,
    search,
    shuffled,
    train_whole,
)
from secateur.axes.rules import everything, sparsity_of
from secateur.axes.schedules import Steps
from secateur.cut import weights
from secateur.errors import ResumeError, SettingError, TaskError
from secateur.method import load, prune
from secateur.methods.lottery import Lottery
from secateur.methods.stable_lottery import (
    Apart,
    StableLottery,
    Twins,
    barrier_between,
    check_orders,
    controls,
    ends_apart,
)
from secateur.site import tensors
from secateur.tasks.learners import Adam, Sgd
from secateur.train import Rule, Snapshot, fit


class Spy(Rule):
    """The state as each training's first batch finds it, and the learning rate of every step."""

    def __init__(self):
        self.starts, self.rates = [], []

    def start(self, loop):
        self.starts.append(None)
        self.rates.append([])

    def before_forward(self, loop):
        if self.starts[-1] is None:
            momentum = sum(len(state) for state in loop.optimizer.state.values())
            self.starts[-1] = (loop.step, loop.place, loop.epoch, copy.deepcopy(loop.model.state_dict()), momentum)
        self.rates[-1].append(loop.optimizer.param_groups[0]["lr"])


@pytest.fixture
def spy(monkeypatch):
    found = Spy()

    def watched(model, task, steps, rules, **given):
        return fit(model, task, steps, [*rules, found], **given)

    monkeypatch.setattr(rewinding, "fit", watched)
    return found


def pair(first, second):
    model = nn.Sequential(nn.Linear(2, 2, bias=False))
    states = []
    for values in (first, second):
        model[0].weight.data = torch.tensor(values)
        states.append(Snapshot.of(model))
    return model, states


# Twins


def test_distances_run_over_kept_weights_alone():
    model, (one, other) = pair([[3.0, 4.0], [9.0, 0.0]], [[3.0, 0.0], [-9.0, 4.0]])
    sites = weights(model)
    start = Snapshot.of(nn.Sequential(nn.Linear(2, 2, bias=False)))
    start.model["0.weight"].zero_()
    keep = {"0.weight": torch.tensor([[True, True], [False, False]])}
    assert ends_apart(sites, keep, start, one, other) == Apart(4.0, 0.8, pytest.approx(53.1301, abs=1e-4))  # acos 3/5
    keep = {"0.weight": torch.tensor([[True, False], [False, True]])}
    assert ends_apart(sites, keep, start, one, other) == Apart(4.0, pytest.approx(4 / 3), pytest.approx(53.1301))
    assert ends_apart(sites, keep, start, one, one) == Apart(0.0, 0.0, 0.0)


def test_the_angle_is_between_the_ways_gone_and_not_between_the_ends():
    model, (one, other) = pair([[2.0, 1.0], [0.0, 0.0]], [[1.0, 2.0], [0.0, 0.0]])
    start = Snapshot.of(model)
    start.model["0.weight"].copy_(torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    found = ends_apart(weights(model), everything(weights(model)), start, one, other)
    assert found.angle == pytest.approx(90.0)
    assert found.distance == pytest.approx(2**0.5)


def test_a_mask_that_keeps_all_is_stable_to_pruning_and_a_repeated_training_is_the_same():
    model, task, course = tiny.mlp(), tiny.toy_vectors(), Course(20, floor=0.0)
    sites = weights(model)
    early = train_whole(model, task, course, at={5}).at(5)
    twins = Twins(repeat=True, points=1)
    whole = twins.whole(model, task, early, course)
    found = twins.read(model, task, sites, everything(sites), early, course, whole)
    assert found.pruning == Apart(0.0, 0.0, 0.0)
    assert found.noise == 0.0
    assert found.order.distance > 0.01
    assert found.barrier >= 0
    half = {name: torch.rand(mask.shape) < 0.5 for name, mask in everything(sites).items()}
    assert twins.read(model, task, sites, half, early, course, whole).pruning.distance > 0.01


def test_twins_start_from_the_state_with_its_clock_and_an_optimizer_that_has_seen_nothing(spy):
    model, task, course = tiny.mlp(), tiny.toy_vectors(), Course(12, floor=0.0)
    early = train_whole(model, task, course, at={5}).at(5)
    twins, sites = Twins(), weights(model)
    whole = twins.whole(model, task, early, course)
    twins.read(model, task, sites, everything(sites), early, course, whole)
    assert [(step, place, epoch, momentum) for step, place, epoch, _, momentum in spy.starts[1:]] == [
        (5, 5, 100_000, 0),
        (5, 5, 100_000, 0),
        (5, 5, 200_000, 0),
    ]
    assert [len(rates) for rates in spy.rates] == [12, 7, 7, 7]


def test_data_whose_order_cannot_be_repeated_or_changed_is_refused():
    task = tiny.toy_vectors()

    class Careless(type(task)):
        def batches(self, split, n=None, epoch=0):
            for batch in super().batches(split, n, epoch):
                yield replace(batch, inputs=(batch.inputs[0] + torch.rand(()),))

    class Fixed(type(task)):
        def batches(self, split, n=None, epoch=0):
            return super().batches(split, n, 0)

    given = {"name": "toy", "splits": task.splits, "batch": 32}
    with pytest.raises(TaskError, match="its batches differ from one time to the next"):
        check_orders(Careless(**given), 0, Twins.orders)
    with pytest.raises(TaskError, match="the same in every epoch"):
        check_orders(Fixed(**given), 0, Twins.orders)
    check_orders(task, 0, Twins.orders)
    with pytest.raises(TaskError, match="its batches differ"):
        StableLottery(rounds=1, steps=5, rewind=Rewind(1), probe=Twins()).run(tiny.mlp(), Careless(**given))


def test_twins_from_a_state_at_the_end_are_refused():
    model = tiny.mlp()
    late = Snapshot(Snapshot.of(model).model, step=10)
    with pytest.raises(ResumeError, match=r"from step 10 on, but they end at 10"):
        Twins().whole(model, tiny.toy_vectors(), late, Course(10))


def test_there_is_no_barrier_on_a_line_to_itself_and_one_between_permuted_networks():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    one = Snapshot.of(model)
    assert barrier_between(model, task, one, one, 3) == 0.0
    turned = {k: v.clone() for k, v in one.model.items()}  # the same function: hidden units in another order
    order = torch.arange(31, -1, -1)
    turned["0.weight"], turned["0.bias"] = one.model["0.weight"][order], one.model["0.bias"][order]
    turned["2.weight"] = one.model["2.weight"][:, order]
    other = Snapshot(turned)
    other.restore_(model)
    assert task.measure(model)["accuracy"] == pytest.approx(0.97, abs=0.04)
    assert barrier_between(model, task, one, other, 3) > 0.05


def test_batch_norms_are_taken_anew_between_two_ends(monkeypatch):
    import secateur.methods.stable_lottery as module

    seen, plain = [], module.recalibrate_
    monkeypatch.setattr(module, "recalibrate_", lambda model, batches: seen.append(plain(model, batches)))
    model, task = tiny.trained("cnn"), tiny.toy_images()
    one, before = Snapshot.of(model), copy.deepcopy(model.state_dict())
    assert barrier_between(model, task, one, one, 2) < 0.1
    assert len(seen) == 2  # at the points between, and not at the ends, which have statistics of their own
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Going back


def test_everything_goes_back_to_step_k_and_the_course_goes_on_from_there(spy):
    model, task = tiny.cnn(), replace(tiny.toy_images(), learner=Sgd(0.05, momentum=0.9, decay=1e-3))
    other = copy.deepcopy(model)
    method = StableLottery(rounds=2, fraction=0.5, rewind=Rewind(5), steps=20, curve=Steps(), rate_floor=0.0)
    outcome = method.run(model, task)
    taken = []
    fit(other, task, 20, [], watch=lambda loop: taken.append(Snapshot.of(other, loop)))  # the rate is constant till 10
    at_k = taken[4].model
    first, *later = spy.starts
    assert first[0] == 0
    keep = {mask.site.name: mask.keep for mask in outcome.edits}
    for number, (step, place, epoch, state, momentum) in enumerate(later, 1):
        assert (step, place, epoch, momentum) == (5, 5, number, 0)
        for name, value in state.items():  # batch norm's running mean, variance and count, and every bias, too
            if name in keep:
                gone = value == 0
                assert torch.equal(value, at_k[name].masked_fill(gone, 0))
            else:
                assert torch.equal(value, at_k[name]), name
    assert int(at_k["bn.num_batches_tracked"]) == 5
    whole = [0.05] * 10 + [0.005] * 5 + [0.0005] * 5
    assert spy.rates[0] == pytest.approx(whole)
    assert spy.rates[1] == pytest.approx(whole[5:])  # and not whole[:15], which would be five steps more
    assert len(outcome.history.losses) == 20 + 15 + 15


def test_masked_weights_are_zero_at_the_end_though_momentum_and_decay_moved_them():
    model, task = tiny.cnn(), replace(tiny.toy_images(), learner=Sgd(0.05, momentum=0.9, decay=1e-2))
    outcome = prune(model, StableLottery(rounds=2, fraction=0.5, rewind=Rewind(3), steps=12), task)
    left = 7192
    for _ in range(2):
        left -= -(-left // 2)
    assert sum(mask.kept for mask in outcome.edits) == left
    for mask in outcome.edits:
        assert torch.equal(tensors(outcome.model)[mask.site.name] != 0, mask.keep)
    assert f"{left / 7192:.2%} of the weights are left after 2 rounds" in outcome.notes[0]


def test_exactly_as_many_go_as_asked_though_all_tie():
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False))
    for layer in model:
        layer.weight.data.fill_(0.5)
    sites = weights(model)
    keep = Together().drop(sites, magnitudes(model, sites), everything(sites), 0.3)
    assert sparsity_of(keep) == 0.3
    again = Together().drop(sites, magnitudes(model, sites), keep, 0.3)  # ceil(4.2) of 14
    assert sum(int(k.sum()) for k in again.values()) == 9
    assert all(not bool((again[n] & ~keep[n]).any()) for n in keep)


def test_staying_turns_back_the_clock_alone(spy):
    model, task = tiny.mlp(), tiny.toy_vectors()
    method = StableLottery(rounds=1, fraction=0.1, rewind=Stay(4), steps=10)
    method.run(model, task)
    step, place, _, state, momentum = spy.starts[1]
    assert (step, place, momentum) == (4, 4, 0)
    assert spy.rates[1] == pytest.approx(spy.rates[0][4:])
    end = tiny.mlp()
    train_whole(end, task, method.course)
    kept = state["0.weight"] != 0
    assert torch.equal(state["0.weight"][kept], end.state_dict()["0.weight"][kept])


def test_one_training_serves_many_steps_to_go_back_to():
    task, course = tiny.toy_vectors(), Course(12, floor=0.0)
    model = tiny.mlp()
    sites = weights(model)
    whole = train_whole(model, task, course, at={0, 3, 6})
    assert sorted(whole.states) == [0, 3, 6]

    def drop(keep, start):
        return Together().drop(sites, magnitudes(model, sites), keep, 0.5)

    shared = search(model, task, sites, course, Rewind(6), 2, drop, whole=whole)
    alone = tiny.mlp()
    StableLottery(rounds=2, fraction=0.5, rewind=Rewind(6), steps=12).run(alone, task)
    assert all(torch.equal(v, shared.end.model[k]) for k, v in alone.state_dict().items())
    with pytest.raises(ResumeError, match=r"step 4 were to be gone back to, but those at 0, 3, 6 were put aside"):
        search(model, task, sites, course, Rewind(4), 2, drop, whole=whole)


def test_a_search_saved_after_any_round_goes_on_as_if_nothing_had_happened(tmp_path):
    task, course = tiny.toy_images(), Course(10, floor=0.0)
    sites = weights(tiny.cnn())

    def run(model, **given):
        def drop(keep, start):
            return Together().drop(sites, magnitudes(model, sites), keep, 0.3)

        return search(model, task, sites, course, Rewind(2), 3, drop, **given)

    seen = []
    whole = run(tiny.cnn(), watch=seen.append)
    assert [rounds.done for rounds in seen] == [0, 1, 2, 3]
    for rounds in seen:
        path = tmp_path / f"{rounds.done}.safetensors"
        rounds.snapshot().save(path)
        fresh = tiny.cnn(seed=9)
        again = run(fresh, resume_from=Rounds.of(Snapshot.load(path)))
        assert all(torch.equal(again.keep[name], whole.keep[name]) for name in whole.keep)
        assert all(torch.equal(v, whole.end.model[k]) for k, v in fresh.state_dict().items())
        assert again.history.losses == whole.history.losses
        assert again.history.curves == whole.history.curves
    with pytest.raises(ResumeError, match="the snapshot is of one training"):
        Rounds.of(Snapshot.of(tiny.cnn()))


@pytest.mark.parametrize("kind", [StableLottery, Lottery])
def test_a_run_that_was_killed_is_taken_up_at_its_round(kind, tmp_path, monkeypatch):
    model, task, method = tiny.mlp(), tiny.toy_vectors(), kind(rounds=3, fraction=0.3, rewind=Rewind(2), steps=10)
    alone = prune(model, method, task)
    plain, calls = Course.train, []

    def killed(self, *given, **named):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(self, *given, **named)

    monkeypatch.setattr(Course, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(model, method, task, resume=tmp_path / "journal")
    again = prune(model, method, task, resume=tmp_path / "journal")
    assert len(calls) == 5  # the whole network and a round, the one that was killed, and the two that were left
    mine, theirs = alone.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert again.history.losses == alone.history.losses
    assert again.notes == alone.notes


def test_controls_have_the_tickets_sparsity_and_clock():
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)

    def drop(keep, start):
        return Together().drop(sites, magnitudes(model, sites), keep, 0.5)

    found = search(model, task, sites, Course(10), Rewind(3), 1, drop)
    rivals = controls(model, found, torch.Generator().manual_seed(0))
    assert list(rivals) == ["ticket", "random mask", "reinitialised", "rate rewound"]
    assert all(torch.equal(v, found.end.model[k]) for k, v in model.state_dict().items())
    for keep, start in rivals.values():
        assert sparsity_of(keep) == 0.5
        assert (start.step, start.place, start.optimizer) == (3, 3, None)
        assert {n: int(k.sum()) for n, k in keep.items()} == {n: int(k.sum()) for n, k in found.keep.items()}
    start = {name: rival[1].model["0.weight"] for name, rival in rivals.items()}
    assert torch.equal(start["ticket"], start["random mask"])
    assert not torch.equal(start["ticket"], start["reinitialised"])
    assert torch.equal(start["rate rewound"], found.end.model["0.weight"])


# Settings and what is said


def test_the_probe_says_how_far_apart_twins_end_and_leaves_the_ticket_as_it_was():
    plain, probed, task = tiny.mlp(), tiny.mlp(), tiny.toy_vectors()
    given = {"rounds": 1, "fraction": 0.5, "rewind": Rewind(2), "steps": 10}
    first = StableLottery(**given).run(plain, task)
    second = StableLottery(**given, probe=Twins(points=1, repeat=True)).run(probed, task)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), probed.parameters(), strict=True))
    said = second.notes[len(first.notes) :]
    assert len(said) == 8
    assert said[0].startswith("stability to pruning of the ticket: ends ")
    assert said[2] == "two trainings of the ticket that should be one end 0 apart"
    assert "distance by data order of a random mask" in second.history.curves
    assert [step for step, _ in second.history.curves["distance by pruning of the ticket"]] == [2]


def test_going_back_to_a_late_step_is_remarked_on():
    late = StableLottery(rounds=1, rewind=Rewind(3), steps=10).run(tiny.mlp(), tiny.toy_vectors())
    assert any("step 3 is 30% of training: past a fifth of it" in note for note in late.notes)
    early = StableLottery(rounds=1, rewind=Rewind(2), steps=10).run(tiny.mlp(), tiny.toy_vectors())
    assert not any("fine-tuning" in note for note in early.notes)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rounds": 0}, "0 rounds of dropping weights"),
        ({"fraction": 0.0}, "a fraction of 0 a round"),
        ({"fraction": 1.0}, "a fraction of 1 a round"),
        ({"steps": 0}, "trainings of 0 steps"),
        ({"steps": 200}, "rewinding to step 200 was asked for, but training has 200 steps"),
        ({"rewind": Rewind(-1)}, "rewinding to step -1"),
        ({"warmup": 1.0}, "a warm-up of 1 was asked for"),
        ({"rate_floor": 2.0}, "a floor of 2 was asked for"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    assert load("stable_lottery") is StableLottery
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), StableLottery(**given), task=None)


def test_a_barrier_at_fewer_than_no_points_is_refused():
    with pytest.raises(SettingError, match="a barrier at -1 points"):
        Twins(points=-1)


def test_twins_of_a_ticket_are_closer_than_those_of_a_random_mask():
    """The paper's contrasts at toy size: digits, 64-100-50-10, 16 % of the weights, rewound to step 20 of 100."""
    from secateur.tasks.images import digits

    task = digits(flat=True, seed=0, learner=Adam(1.2e-3), batch=60)
    model = tiny.seeded(
        lambda: nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)), 0
    )
    sites, course, twins = weights(model), Course(100, floor=0.0), Twins()

    def drop(keep, start):
        return Together().drop(sites, magnitudes(model, sites), keep, 0.6)

    found = search(model, task, sites, course, Rewind(20), 2, drop)
    whole = twins.whole(model, task, found.early, course)
    ticket = twins.read(model, task, sites, found.keep, found.early, course, whole)
    mask = shuffled(found.keep, torch.Generator().manual_seed(0))
    chance = twins.read(model, task, sites, mask, found.early, course, whole)
    assert ticket.pruning.share < 0.8 * chance.pruning.share
    assert ticket.order.share < 0.8 * chance.order.share
    assert ticket.pruning.angle < chance.pruning.angle - 5
    ticket.ends[0].restore_(model)
    good = task.measure(model, "test")["accuracy"]
    chance.ends[0].restore_(model)
    assert good > task.measure(model, "test")["accuracy"]


def test_it_runs_from_the_command_line_and_what_is_saved_loads(tmp_path):
    from click.testing import CliRunner
    from safetensors.torch import load_file

    from secateur.cli import main

    settings = ["--rounds", "2", "--fraction", "0.5", "--steps", "8", "--rewind.step", "2", "--curve", "steps"]
    args = [
        "prune",
        "tiny:mlp",
        "stable_lottery",
        "--task",
        "tiny:toy_vectors",
        *settings,
        "--out",
        str(tmp_path / "out"),
    ]
    found = CliRunner().invoke(main, [*args, "--probe", "twins"], terminal_width=200)
    assert found.exit_code == 0, found.output
    assert "stability to data order of a random mask" in found.stderr
    saved = load_file(tmp_path / "out" / "model.safetensors")
    tiny.mlp().load_state_dict(saved)
    assert sum(int(torch.count_nonzero(v)) for n, v in saved.items() if n.endswith("weight")) == 1664 // 4
