"""The lottery ticket hypothesis (paper 48): exact rounds, exact rewinding, honest controls, and the claim on digits."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.rewinding import (
    LayerByLayer,
    Rewind,
    Stay,
    Together,
    magnitudes,
    one_shot,
    reinitialize_,
    shuffled,
)
from secateur.axes.rules import Hold, early_stop, everything
from secateur.cut import weights
from secateur.errors import ModelError, SettingError, SiteError
from secateur.method import load, prune
from secateur.methods.lottery import Lottery, controls, train_ticket, untouched
from secateur.site import tensors
from secateur.tasks.learners import Adam
from secateur.train import Snapshot, fit


def kept(keep):
    return {name: int(mask.sum()) for name, mask in keep.items()}


def sites_and_scores():
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False))
    model[0].weight.data = torch.arange(1.0, 11.0).reshape(2, 5)
    model[1].weight.data = torch.arange(11.0, 21.0).reshape(5, 2)
    sites = weights(model)
    return sites, magnitudes(model, sites)


def test_a_round_drops_the_smallest_of_what_is_left_the_output_layer_at_half_the_rate():
    assert load("lottery") is Lottery
    sites, scores = sites_and_scores()
    first = LayerByLayer().drop(sites, scores, everything(sites), 0.4)
    assert kept(first) == {"0.weight": 6, "1.weight": 8}
    assert first["0.weight"].tolist() == [[False] * 4 + [True], [True] * 5]
    second = LayerByLayer().drop(sites, scores, first, 0.4)
    assert kept(second) == {"0.weight": 4, "1.weight": 6}  # round(2.4) = 2 of 6, round(1.6) = 2 of 8
    assert second["0.weight"].tolist() == [[False] * 5, [False, True, True, True, True]]


def test_together_the_layers_compete():
    sites, scores = sites_and_scores()
    first = Together().drop(sites, scores, everything(sites), 0.3)
    assert kept(first) == {"0.weight": 4, "1.weight": 10}
    assert kept(Together().drop(sites, scores, first, 0.3)) == {"0.weight": 0, "1.weight": 9}  # ceil(4.2) of 14


def test_masked_weights_stay_masked_though_active_ones_are_zero():
    sites, scores = sites_and_scores()
    for scope in (LayerByLayer(), Together()):
        first = scope.drop(sites, scores, everything(sites), 0.4)
        flat = {name: torch.zeros_like(score) for name, score in scores.items()}  # all tie at zero
        second = scope.drop(sites, flat, first, 0.4)
        assert all(not bool((second[n] & ~first[n]).any()) for n in first)


def test_one_weight_always_stays():
    sites, scores = sites_and_scores()
    keep = everything(sites)
    for _ in range(60):
        keep = LayerByLayer(output=1.0).drop(sites, scores, keep, 0.6)
    assert kept(keep) == {"0.weight": 1, "1.weight": 1}
    pool = everything(sites)
    for _ in range(60):
        pool = Together().drop(sites, scores, pool, 0.6)
    assert sum(kept(pool).values()) == 1


def test_rates_for_layers_that_are_not_pruned_are_refused():
    sites, scores = sites_and_scores()
    with pytest.raises(SettingError, match=r"Did you mean 1.weight"):
        LayerByLayer(last="2.weight").drop(sites, scores, everything(sites), 0.2)
    assert kept(LayerByLayer(last="0.weight").drop(sites, scores, everything(sites), 0.2)) == {
        "0.weight": 9,
        "1.weight": 8,
    }


def test_every_training_starts_from_the_same_weights_to_the_bit_and_new_data_orders(monkeypatch):
    import secateur.axes.rewinding as module

    starts = []

    def watched(model, task, steps, rules, **given):
        if given.get("resume_from") is not None:
            given["resume_from"].restore_(model)
        starts.append((copy.deepcopy(model.state_dict()), given.get("epoch"), given.get("resume_from")))
        return fit(model, task, steps, rules, **given)

    monkeypatch.setattr(module, "fit", watched)
    model = tiny.cnn()
    origin = Snapshot.of(model)
    outcome = Lottery(rounds=3, steps=30).run(model, tiny.toy_images())
    assert len(starts) == 4
    for state, _, _ in starts:
        assert all(torch.equal(state[k], origin.model[k]) for k in state)
    epochs = [given.epoch for _, _, given in starts[1:]]
    assert epochs == sorted(set(epochs))
    assert epochs[0] == 2  # 24 batches an epoch: the first training has used epochs 0 and 1
    assert all(given.optimizer is None for _, _, given in starts[1:])
    assert len(outcome.history.losses) == 120


def test_rewinding_to_a_step_goes_back_to_its_weights_and_resumes_its_course():
    model, task = tiny.mlp(), tiny.toy_vectors()
    other = copy.deepcopy(model)
    method = Lottery(rounds=1, steps=10, rewind=Rewind(4), rate_floor=0.0)
    outcome = method.run(model, task)
    assert len(outcome.history.losses) == 10 + 6

    from secateur.axes.rules import LearningRate

    taken = []
    fit(other, task, 10, [LearningRate()], watch=lambda loop: taken.append(Snapshot.of(other, loop)))
    sites = weights(other)
    keep = LayerByLayer().drop(sites, magnitudes(other, sites), everything(sites), 0.2)
    start = replace(taken[3].weights_only(), epoch=1)
    fit(other, task, 10, [LearningRate(), Hold(sites, keep)], resume_from=start)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_staying_goes_on_from_the_trained_weights():
    task = tiny.toy_vectors()
    back, on = tiny.mlp(), tiny.mlp()
    first = Lottery(rounds=2, steps=25, fraction=0.1).run(back, task)
    second = Lottery(rounds=2, steps=25, fraction=0.1, rewind=Stay()).run(on, task)
    assert first.history.losses[25] > 2 * second.history.losses[25]


def test_the_outcome_counts_what_is_left_and_what_never_moved():
    class Blind(nn.Module):
        """Its first four inputs are always zero."""

        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))

        def forward(self, x):
            return self.net(torch.cat([torch.zeros_like(x[:, :4]), x[:, 4:]], dim=1))

    model, task = tiny.seeded(Blind, 0), tiny.toy_vectors()
    outcome = Lottery(rounds=2, steps=20).run(model, task)
    assert "67.50% of the weights are left after 2 rounds" in outcome.notes
    first = next(mask for mask in outcome.edits if mask.site.name == "net.0.weight")
    dead = int(first.keep[:, :4].sum())
    assert dead > 0
    assert f"{dead} of the 108 weights left never moved from where they started" in outcome.notes
    assert [value for _, value in outcome.history.curves["sparsity"]] == [29 / 160, 52 / 160]


def test_masks_hold_and_edits_say_what_is_left():
    outcome = prune(tiny.cnn(), Lottery(rounds=2, steps=12, scope=Together()), tiny.toy_images())
    left = 7192
    for _ in range(2):
        left -= -(-left // 5)
    assert sum(mask.kept for mask in outcome.edits) == left
    for mask in outcome.edits:
        assert torch.equal(tensors(outcome.model)[mask.site.name] != 0, mask.keep)


# Controls


def test_shuffling_and_one_shot_keep_each_layers_count():
    sites, scores = sites_and_scores()
    keep = LayerByLayer().drop(sites, scores, everything(sites), 0.4)
    mixed = shuffled(keep, torch.Generator().manual_seed(0))
    assert kept(mixed) == kept(keep)
    assert any(not torch.equal(mixed[n], keep[n]) for n in keep)
    at_once = one_shot({n: -s for n, s in scores.items()}, keep)
    assert kept(at_once) == kept(keep)
    assert at_once["0.weight"].reshape(-1).tolist() == [True] * 6 + [False] * 4


def test_new_initial_weights_come_from_the_modules_own_distribution_and_the_generator_given():
    model, before = tiny.cnn(), torch.get_rng_state()
    old = copy.deepcopy(model.state_dict())
    reinitialize_(model, torch.Generator().manual_seed(1))
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(model.conv.weight, old["conv.weight"])
    assert float(model.conv.weight.detach().abs().max()) <= (1 / 27) ** 0.5  # torch's bound for 3 * 3 * 3 inputs
    again = tiny.cnn(seed=7)
    reinitialize_(again, torch.Generator().manual_seed(1))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2))

    with pytest.raises(ModelError, match="Bare has no reset_parameters"):
        reinitialize_(Bare(), torch.Generator())


def test_a_start_that_does_not_hold_a_layer_is_refused():
    model = tiny.mlp()
    sites = weights(model)
    with pytest.raises(SiteError, match="the snapshot has no such tensor"):
        untouched(model, Snapshot({}), sites, everything(sites))


def test_models_without_initial_weights_are_refused():
    with pytest.raises(ModelError, match="has no values before the first forward pass"):
        Snapshot.of(nn.Sequential(nn.LazyLinear(4)))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"rounds": 0}, "0 rounds of dropping weights"),
        ({"steps": 0}, "trainings of 0 steps"),
        ({"fraction": 0.0}, "a fraction of 0 a round"),
        ({"fraction": 1.0}, "a fraction of 1 a round"),
        ({"rewind": Rewind(2000)}, "rewinding to step 2000 was asked for, but training has 2000 steps"),
        ({"rewind": Rewind(-1)}, "rewinding to step -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(given, says):
    with pytest.raises(SettingError, match=says):
        prune(tiny.mlp(), Lottery(**given), task=None)


def test_a_ticket_beats_its_controls_on_digits():
    """The paper's contrasts at toy size: digits, 64-100-50-10, 13 % of the weights, 150 steps a training."""
    from secateur.tasks.images import digits

    task = digits(flat=True, seed=0, learner=Adam(1.2e-3), batch=60)
    model = tiny.seeded(
        lambda: nn.Sequential(nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 50), nn.ReLU(), nn.Linear(50, 10)), 0
    )
    start, sites = Snapshot.of(model), weights(model)
    outcome = Lottery(rounds=9, steps=150).run(model, task)
    keep = {mask.site.name: mask.keep for mask in outcome.edits}
    assert 0.13 < sum(kept(keep).values()) / 11900 < 0.15
    draw = torch.Generator().manual_seed(0)
    epoch = outcome.history.epoch
    found = controls(model, task, 150, sites, keep, start, draw, draws=2, epoch=epoch, validate=10)
    lowest = {name: [early_stop(history)[1] for history in histories] for name, histories in found.items()}
    assert len(lowest["reinitialised"]) == len(lowest["random mask"]) == 2
    ticket = lowest["ticket"][0]
    assert all(loss > 1.2 * ticket for loss in lowest["reinitialised"]), lowest
    assert all(loss > 2.0 * ticket for loss in lowest["random mask"]), lowest
    level = lowest["ticket"][0] * 1.3
    reach = {
        name: min((step for step, loss in h[0].curves["validation loss"] if loss <= level), default=10**6)
        for name, h in found.items()
    }
    assert reach["ticket"] < reach["reinitialised"], reach


def test_a_ticket_trained_alone_is_the_last_training_of_the_search():
    model, task = tiny.mlp(), tiny.toy_vectors()
    start, sites = Snapshot.of(model), weights(model)
    outcome = Lottery(rounds=2, steps=20).run(model, task)
    alone = tiny.mlp(seed=3)
    train_ticket(alone, task, 20, sites, {m.site.name: m.keep for m in outcome.edits}, start, epoch=2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
