"""Sparse model soups (paper 06): exact zeros, what varies, greedy choice, batch norms, processes, the claim."""

import copy
import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import tiny
import torch
from click.testing import CliRunner
from test_distributed import ALONE, PLACE, free_port
from torch import nn

from secateur.axes import NM, Uniform
from secateur.axes.branching import AdaptiveFall, Candidate, Decays, Fall, Lengths, Order, Rates, Retraining
from secateur.axes.rules import Gradual, LearningRate
from secateur.axes.schedules import Schedule
from secateur.axes.soup import GreedySoup, Refresh, UniformSoup, basin, merged
from secateur.cli import main
from secateur.cut import weights
from secateur.edit import Mask
from secateur.errors import ModelError, ResumeError, SettingError, SiteError, TaskError
from secateur.graph import channels
from secateur.method import load, prune
from secateur.methods.oneshot import OneShot
from secateur.methods.soups import Phase, Soups, alone
from secateur.site import tensors
from secateur.task import Around
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot, fit

SMALL = Soups(sparsity=0.75, phases=2, replicas=2, steps=6)


def zeros(model, sites):
    named = tensors(model)
    return sum(int((site.parts[0].read(named) == 0).sum()) for site in sites)


def state(**values):
    return Snapshot({name: torch.tensor(value) for name, value in values.items()})


def candidates(*rows, keep=None):
    """Of a 2x3 matrix, its bias and a count, each with the last weight masked."""
    keep = torch.tensor([[True, True, True], [True, True, False]]) if keep is None else keep
    return [
        Candidate(state(weight=[row[:3], [*row[3:], 0.0]], bias=[1.0, row[0]], seen=number + 7), {"weight": keep}, None)
        for number, row in enumerate(rows)
    ]


class Matrix(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 3))

    def forward(self, x):
        return x @ self.weight.T


SITES = weights(Matrix())


# By hand


def test_the_mean_of_two_by_hand():
    soup = merged(SITES, candidates([1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, -3.0, 0.0, 6.0]))
    assert soup.model["weight"].tolist() == [[2.0, 2.0, 0.0], [2.0, 5.5, 0.0]]
    assert soup.model["bias"].tolist() == [1.0, 2.0]
    assert soup.model["seen"].item() == 7  # a count is copied, not averaged
    uneven = merged(SITES, candidates([1.0, 2.0, 3.0, 4.0, 5.0], [3.0, 2.0, -3.0, 0.0, 6.0]), [3, 1])
    assert uneven.model["weight"].tolist() == [[1.5, 2.0, 1.5], [3.0, 5.25, 0.0]]


def test_masks_that_differ_are_not_merged_and_the_tensors_are_named():
    some = candidates([1.0] * 5, [2.0] * 5)
    other = {"weight": torch.tensor([[True, True, False], [True, True, False]])}
    with pytest.raises(ModelError, match="their masks differ in weight"):
        merged(SITES, [some[0], replace(some[1], keep=other)])


def test_a_candidate_that_left_its_mask_is_not_merged():
    some = candidates([1.0] * 5, [2.0] * 5)
    some[1].state.model["weight"][1, 2] = 0.1
    with pytest.raises(ModelError, match="number 1 has weights outside its mask in weight"):
        merged(SITES, some)


def test_the_greedy_soup_by_hand():
    asked = []
    worth = {(2, 0): 0.8, (2, 0, 3): 0.7, (2, 0, 1): 0.85}

    def taste(some):
        asked.append(tuple(some))
        return worth[tuple(some)]

    assert GreedySoup().choose([0.75, 0.5, 0.8, 0.6], taste) == [2, 0, 1]  # a soup as good as before lets it in
    assert asked == [(2, 0), (2, 0, 3), (2, 0, 1)]
    assert UniformSoup().choose([0.0] * 3, taste) == [0, 1, 2]


def test_distances_by_hand():
    about = basin(SITES, candidates([3.0, 0.0, 0.0, 0.0, 0.0], [0.0, 4.0, 0.0, 0.0, 0.0], [3.0, 0.0, 0.0, 0.0, 0.0]))
    assert about.farthest == 5.0
    assert about.pair == (0, 1)
    assert about.mean == pytest.approx(10 / 3)
    assert about.angle == pytest.approx(90)
    assert about.centre == pytest.approx(((2) ** 2 + (8 / 3) ** 2) ** 0.5)


def test_each_phase_drops_the_same_fraction_of_what_is_left():
    method, model = replace(SMALL, sparsity=0.784, phases=3, steps=2), tiny.mlp()
    sites, seen = weights(model), []
    method.cook(model, tiny.toy_vectors(), sites, watch=seen.append)
    # 1 - 0.216^(p/3): 0.4, 0.64, 0.784 of 1,664 weights
    assert [sum(int((~k).sum()) for k in phase.keep.values()) for phase in seen] == [665, 1064, 1304]
    assert all(not bool((b.keep[n] & ~a.keep[n]).any()) for a, b in pairwise(seen) for n in a.keep)


def test_rates_after_pruning_by_hand():
    course = AdaptiveFall(whole=1000)
    assert course.rate(0.2, 0.25, 100) == pytest.approx(0.4)  # 0.2 / sqrt(0.25)
    assert course.rate(0.01, 0.25, 100) == pytest.approx(0.1)  # no less than 100 of 1,000 steps
    assert course.rate(0.9, 0.25, 100) == 1.0
    assert Fall().rate(0.2, 0.25, 100) == 1.0
    warm = Fall().rule()
    assert [warm.factor(step, 100) for step in (10, 55, 100)] == [1.0, 0.5, 0.0]
    assert warm.factor(4, 100) == pytest.approx(5 / 11)


def test_what_was_lost_by_pruning_is_measured():
    model = Matrix()
    model.weight.data = torch.tensor([[3.0, 0.0, 1.0], [2.0, 0.5, 4.0]])
    keep, shrunk, fraction = SMALL.pruned(model, SITES, {"weight": torch.ones(2, 3, dtype=torch.bool)}, 0.5)
    assert keep["weight"].tolist() == [[True, False, False], [True, False, True]]
    assert shrunk == pytest.approx((1.25 / 30.25) ** 0.5)
    assert fraction == 0.5


# What holds of every soup


@pytest.mark.parametrize("method", [SMALL, replace(SMALL, merge=GreedySoup()), replace(SMALL, replicas=3)])
def test_zeros_are_as_many_as_asked_in_every_candidate_and_in_the_soup(method):
    model = tiny.trained("cnn")
    sites = weights(model)
    end = method.cook(model, tiny.toy_images(), sites)
    units = sum(site.units for site in sites)
    assert zeros(model, sites) == int(0.75 * units)
    assert end.history.curves["sparsity"][-1][1] == int(0.75 * units) / units
    for candidate in end.candidates:
        mine = tiny.make_model("cnn")
        candidate.state.restore_(mine)
        assert zeros(mine, sites) == int(0.75 * units)
        assert all(bool((site.parts[0].read(candidate.state.model)[~end.keep[site.name]] == 0).all()) for site in sites)


def test_momentum_and_weight_decay_do_not_fill_masked_weights():
    task = tiny.toy_vectors()
    task = Labelled("toy", task.splits, learner=Sgd(0.05, momentum=0.9, decay=0.1, nesterov=True))
    outcome = replace(SMALL, vary=Decays((0.0, 0.2))).run(tiny.trained("mlp"), task)
    named = tensors(outcome.model)
    assert all(bool((named[m.site.name][~m.keep] == 0).all()) for m in outcome.edits)
    assert sum(m.site.units - m.kept for m in outcome.edits) == int(0.75 * 1664)


def test_replicas_start_from_the_same_weights_and_see_the_data_in_another_order():
    seen = []

    class Watched(Around):
        def batches(self, split, n=None, epoch=0):
            for batch in self.task.batches(split, n, epoch):
                if split == "train":
                    seen.append((epoch, batch.target.tolist()))
                yield batch

        def loss(self, model, batch):
            if not firsts or seen[-1][0] != firsts[-1][0]:
                firsts.append((seen[-1][0], {k: v.clone() for k, v in model.state_dict().items()}))
            return self.task.loss(model, batch)

    firsts = []
    Soups(sparsity=0.5, phases=1, replicas=3, steps=3).run(tiny.trained("mlp"), Watched(tiny.toy_vectors()))
    orders = {epoch: [t for e, t in seen if e == epoch] for epoch, _ in seen}
    assert len(orders) == len(firsts) == 3
    assert all(a != b for i, a in orders.items() for j, b in orders.items() if i < j)
    first = firsts[0][1]
    assert all(torch.equal(first[k], one[k]) for _, one in firsts for k in first)


def test_each_kind_of_variation_changes_one_thing():
    given = Retraining(100, 4, 0.5)
    assert Order().of(0, given) == given
    assert [Order().of(n, given).epoch for n in (1, 2)] == [100_004, 200_004]
    assert replace(Order().of(1, given), epoch=4) == given
    assert Decays((0.0, 0.1, 0.2)).of(2, given) == replace(given, decay=0.2)
    assert Lengths((0.5, 1.0, 1.5)).of(0, given) == replace(given, steps=50)
    assert Rates((0.5, 1.0, 2.0)).of(2, given) == replace(given, rate=1.0)
    made = Retraining(1, 0, 0.5, 0.3).optimizer(tiny.mlp(), tiny.toy_vectors())
    assert made.param_groups[0]["lr"] == 0.025
    assert made.param_groups[0]["weight_decay"] == 0.3


def test_a_variation_that_varies_nothing_is_remarked_on():
    class Fixed(Around):
        def batches(self, split, n=None, epoch=0):
            return self.task.batches(split, n, 0)

    notes = replace(SMALL, phases=1).run(tiny.trained("mlp"), Fixed(tiny.toy_vectors())).notes
    assert any("the replicas are all alike: Order changes nothing" in note for note in notes)


def test_candidates_that_left_their_basin_are_remarked_on():
    task = tiny.toy_vectors()
    wild = Labelled("toy", task.splits, learner=Sgd(1.0))
    outcome = Soups(sparsity=0.3, phases=1, replicas=2, steps=60).run(tiny.mlp(), wild)
    assert any("they left the basin they share" in note for note in outcome.notes)
    calm = Soups(sparsity=0.5, phases=1, replicas=2, steps=40).run(tiny.trained("mlp"), task)
    assert not any("basin" in note for note in calm.notes)


def test_the_test_split_is_never_looked_at():
    class Sealed(Around):
        def batches(self, split, n=None, epoch=0):
            assert split != "test"
            return self.task.batches(split, n, epoch)

        def measure(self, model, split="val"):
            assert split != "test"
            return self.task.measure(model, split)

    replace(SMALL, merge=GreedySoup()).run(tiny.trained("mlp"), Sealed(tiny.toy_vectors()))


def test_norms_and_embeddings_are_left_dense():
    outcome = replace(SMALL, steps=2).run(tiny.trained("encoder"), tiny.toy_sentences())
    assert all("embeddings" not in m.site.name and "LayerNorm" not in m.site.name for m in outcome.edits)
    words = outcome.model.bert.embeddings.word_embeddings.weight
    assert int((words == 0).sum()) == 32  # the row of the padding, as before


def test_n_of_m_and_uniform_shares():
    outcome = replace(SMALL, sparsity=0.5, pattern=NM(2, 4), allocation=Uniform()).run(
        tiny.trained("mlp"), tiny.toy_vectors()
    )
    assert all(bool((m.keep.reshape(-1, 4).sum(1) == 2).all()) for m in outcome.edits)
    named = tensors(outcome.model)
    assert all(int((named[m.site.name] == 0).sum()) == m.site.units // 2 for m in outcome.edits)


# Batch norms


def test_statistics_are_taken_anew_as_training_sees_the_data():
    seen = []

    class Watched(Around):
        def batches(self, split, n=None, epoch=0):
            for batch in self.task.batches(split, n, epoch):
                seen.append(split)
                yield batch

    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.norm = nn.Dropout(0.5), nn.BatchNorm1d(16)

        def forward(self, x):
            return self.norm(self.drop(x))

    model, task = Dropping(), Watched(tiny.toy_vectors())
    before = Snapshot.of(model)
    after = Refresh(1.0).restore_(model, before, task)
    inputs = torch.cat([b.inputs[0] for b in task.task.batches("train")])
    torch.testing.assert_close(after.model["norm.running_mean"], inputs.mean(0), rtol=0, atol=1e-5)
    assert set(seen) == {"train"}
    seen.clear()
    Refresh(0.25).restore_(model, before, task)
    assert len(seen) == 24 + 6 + 1  # counted, used, and one looked at
    assert Refresh(0.0).restore_(model, before, task) is before
    assert torch.equal(model.norm.running_mean, torch.zeros(16))


def test_a_model_without_batch_norms_is_not_run_for_statistics():
    class Refusing(Around):
        def batches(self, split, n=None, epoch=0):
            raise AssertionError

    Refresh().restore_(tiny.mlp(), Snapshot.of(tiny.mlp()), Refusing(tiny.toy_vectors()))


# Processes and resuming

WORKER = """
import sys
from pathlib import Path
import tiny
from test_soups import PARALLEL
from secateur.cli import main
from secateur.cut import weights
from secateur.distributed import together
from secateur.train import Snapshot

with together() as ours:
    model = tiny.make_model("cnn")
    retrained = []
    import secateur.axes.branching as soups
    fit = soups.fit
    soups.fit = lambda *given, **named: retrained.append(1) or fit(*given, **named)
    end = PARALLEL.cook(model, ours.share(tiny.toy_images()), weights(model))
    ours.agree(model)
    Snapshot.of(model).save(Path(sys.argv[1]) / f"{ours.rank}.safetensors")
    (Path(sys.argv[1]) / f"{ours.rank}.txt").write_text(f"{len(retrained)} {len(end.history.losses)}")
"""

PARALLEL = Soups(sparsity=0.75, phases=1, replicas=3, steps=2, merge=GreedySoup())


def test_two_processes_retrain_side_by_side_and_give_what_one_gives(tmp_path):
    port = str(free_port())
    here = {"PYTHONPATH": f"{Path(__file__).parent}{os.pathsep}{PLACE['PYTHONPATH']}", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env={**ALONE, **here, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": str(r), "WORLD_SIZE": "2"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for r in range(2)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as there: sums over threads round differently
    try:
        model = tiny.make_model("cnn")
        PARALLEL.cook(model, tiny.toy_images(), weights(model))
    finally:
        torch.set_num_threads(threads)
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    for rank in range(2):
        theirs = Snapshot.load(tmp_path / f"{rank}.safetensors").model
        assert all(torch.equal(value, theirs[name]) for name, value in model.state_dict().items())
    assert [(tmp_path / f"{r}.txt").read_text() for r in range(2)] == ["2 2", "1 2"]  # of three retrainings


def test_a_run_that_was_cut_off_goes_on_as_if_nothing_had_happened(tmp_path):
    task, method = tiny.toy_images(), replace(SMALL, phases=3)

    def keep_second(phase):
        if phase.done == 2:
            phase.snapshot().save(tmp_path / "phase.safetensors")

    whole = tiny.trained("cnn")
    end = method.cook(whole, task, weights(whole), watch=keep_second)
    other = tiny.make_model("cnn", seed=5)
    at = Phase.of(Snapshot.load(tmp_path / "phase.safetensors"))
    again = method.cook(other, task, weights(other), resume_from=at)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), other.state_dict().values(), strict=True))
    assert again.history == end.history
    with pytest.raises(ResumeError, match="of one training"):
        Phase.of(Snapshot.of(other))


# Within the masks of others


def test_it_is_the_recovery_of_another_method():
    soups = Soups(replicas=2, steps=5)
    outcome = prune(tiny.trained("mlp"), OneShot(sparsity=0.75, recover=soups), tiny.toy_vectors())
    named = tensors(outcome.model)
    masks = [e for e in outcome.edits if isinstance(e, Mask)]
    assert masks
    assert all(bool((named[m.site.name][~m.keep] == 0).all()) for m in masks)
    assert "candidates in the soup" in outcome.history.curves


def test_it_follows_pruning_while_training():
    model, task = tiny.mlp(), tiny.toy_vectors()
    ramp = Gradual(weights(model), Schedule(end=0.75, until=0.6, every=5))
    fit(model, task, 40, [LearningRate(), ramp])
    outcome = Soups(replicas=3, steps=5).recover(model, task, ramp.masks(), None)
    assert zeros(model, weights(model)) == 384 + 768 + 96
    assert len(outcome.history.losses) == 5


def test_channels_stay_out_of_the_soup():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    masks = [Mask(s, torch.arange(s.units) % 2 == 0) for s in channels(model, task.example)]
    assert masks
    Soups(replicas=2, steps=4).recover(model, task, masks, None)
    named = tensors(model)
    for mask in masks:
        gone = mask.site.expand(~mask.keep)
        for part in mask.site.parts:
            value = part.read(named)
            assert bool((value[gone[part.key].expand_as(value)] == 0).all())


def test_without_a_mask_there_is_nothing_to_recover_in():
    with pytest.raises(SiteError, match="there is none"):
        Soups().recover(tiny.mlp(), tiny.toy_vectors(), [], None)


# Bad input


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"replicas": 1}, "the mean of one is itself"),
        ({"sparsity": 0.0}, "nothing would be pruned"),
        ({"sparsity": 1.0}, "the fraction removed"),
        ({"phases": 0}, "one of each at least"),
        ({"steps": 0}, "one of each at least"),
        ({"recalibrate": 1.5}, "that is a share"),
        ({"vary": Decays((0.0, 0.1))}, "those are 2"),
        ({"vary": Rates((1.0, 1.0, 2.0))}, "no two are alike"),
        ({"vary": Lengths((0.0, 1.0, 2.0))}, "a positive number"),
        ({"course": Fall(warmup=1.0)}, "a warm-up of 1"),
    ],
)
def test_settings_that_make_no_soup_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), Soups(**given), task=None)


def test_a_greedy_soup_needs_held_out_data():
    splits = {name: held for name, held in tiny.toy_vectors().splits.items() if name != "val"}
    task = Labelled("toy", splits, learner=Sgd(0.05))
    with pytest.raises(TaskError, match="no validation split"):
        replace(SMALL, merge=GreedySoup()).run(tiny.mlp(), task)
    assert "sparsity" in SMALL.run(tiny.mlp(), task).history.curves  # a uniform one does not


def test_weight_decay_cannot_vary_where_there_is_none():
    class Plain(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {"lr": 0.1})

    class Bare(Around):
        def optimizer(self, parameters):
            return Plain(parameters)

    with pytest.raises(SettingError, match="Plain has none"):
        replace(SMALL, vary=Decays((0.0, 0.1))).run(tiny.mlp(), Bare(tiny.toy_vectors()))


def test_from_the_command_line_with_settings_as_text(tmp_path):
    verb = ["prune", "tiny:mlp", "soups", "--task", "tiny:toy_vectors", "--steps", "3", "--phases", "2", "--json"]
    more = ["--merge", "greedy-soup", "--vary", "decays(values=(0, 1e-4, 1e-3))", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*verb, *more])
    assert done.exit_code == 0, done.output
    record = json.loads(done.stdout)
    assert record["settings"]["vary"] == "decays(values=(0, 0.0001, 0.001))"
    assert record["ledger"]["removed"] == int(0.95 * 1664)
    assert "candidates in the soup" in record["curves"]


# The claim


def test_a_soup_beats_its_candidates_and_longer_retraining():
    """80 % of a small net's weights, small noisy batches: loss on held-out data, mean of two seeds."""
    assert load("soups") is Soups
    held, dense = tiny.toy_vectors().splits, tiny.trained("mlp")
    method, found = (
        Soups(sparsity=0.8, phases=1, replicas=4, steps=100),
        {"soup": 0.0, "candidates": 0.0, "longer": 0.0},
    )
    for seed in range(2):
        task = Labelled("toy", held, learner=Sgd(0.1), batch=8, seed=seed)
        model, other = copy.deepcopy(dense), copy.deepcopy(dense)
        sites = weights(model)
        end = method.cook(model, task, sites)
        found["soup"] += task.measure(model, "test")["loss"] / 2
        for candidate in end.candidates:
            candidate.state.restore_(model)
            found["candidates"] += task.measure(model, "test")["loss"] / 8
        alone(other, task, sites, method, 400)  # as many steps as all four
        found["longer"] += task.measure(other, "test")["loss"] / 2
        assert zeros(other, sites) == int(0.8 * 1664)
    assert found["soup"] < 0.8 * found["candidates"], found
    assert found["soup"] < 0.8 * found["longer"], found


def test_the_mean_of_runs_that_were_pruned_apart_is_not_sparse():
    task, model = tiny.toy_vectors(), tiny.trained("mlp")
    sites, start, ends = weights(model), Snapshot.of(model), []
    for number in range(3):
        start.restore_(model)
        ends.append(alone(model, task, sites, replace(SMALL, steps=30), epoch=1000 * number).state)
        assert zeros(model, sites) == int(0.75 * 1664)
    Snapshot.average(ends).restore_(model)
    assert zeros(model, sites) < int(0.75 * 1664)
