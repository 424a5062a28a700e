"""Sparsity-informed adaptive pruning (paper 18): the PQ index, its bound, the rounds they lead, the claim on digits."""

import copy
import math
from itertools import pairwise

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import Uniform, part_of, text_of
from secateur.axes.clipping import Clip
from secateur.axes.pq import (
    Adaptive,
    EachLayer,
    EachNeuron,
    Fraction,
    Indexed,
    Pq,
    PqIndex,
    Turned,
    WholeNetwork,
    drop_smallest,
    gini,
)
from secateur.axes.rewinding import Course, LayerByLayer, Rewind, Rounds, Stay, magnitudes, search
from secateur.axes.rules import Gradual, Hold, everything
from secateur.axes.schedules import Schedule
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, SettingError
from secateur.method import Budget, load, prune
from secateur.methods.sap import Best, Sap, values
from secateur.site import tensors
from secateur.tasks.learners import Sgd
from secateur.train import Snapshot, fit


def index(*numbers, p=0.5, q=1.0):
    return float(PqIndex(p, q).of(torch.tensor(numbers)))


def least(numbers, p=0.5, q=1.0, slack=0.0):
    found = PqIndex(p, q)
    return int(found.least(found.of(torch.tensor(numbers)), torch.tensor(len(numbers)), slack))


# The index


def test_the_index_by_hand():
    # (1, 4): (mean of 1 and 2)^2 = 2.25 over the mean 2.5
    assert index(1.0, -4.0) == pytest.approx(1 - 2.25 / 2.5)
    # (3, 4) with p=1, q=2: 3.5 over the root of 12.5
    assert index(3.0, 4.0, p=1.0, q=2.0) == pytest.approx(1 - 3.5 / math.sqrt(12.5))
    assert index(2.0, 2.0, 2.0) == 0
    assert index(0.0, 0.0) == 0
    assert index(7.0, 0.0, 0.0, 0.0) == pytest.approx(1 - 4 ** (1 / 1 - 1 / 0.5))  # the largest there is, 1 - 1/d


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)])
def test_what_a_measure_of_sparsity_owes(p, q):
    found = PqIndex(p, q)
    w = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.1
    here = float(found.of(w))
    assert float(found.of(1e-30 * w.double())) == pytest.approx(here)  # scale
    assert float(found.of(-1e30 * w)) == pytest.approx(here)
    assert float(found.of(torch.cat([w, w]))) == pytest.approx(here)  # cloning
    assert float(found.of(torch.cat([w, torch.zeros(5)]))) > here  # zeros more
    even = w.clone()
    even[w.argmax()], even[w.argmin()] = w.max() - 0.2, w.min() + 0.2
    assert float(found.of(even)) < here  # Robin Hood
    assert float(found.of(w + 1)) < here  # rising tide


def test_only_live_entries_count():
    w = torch.tensor([[5.0, 0.0, 5.0, 0.0], [1.0, 4.0, 9.0, 0.0], [0.0, 7.0, 0.0, 0.0]])
    live = torch.tensor([[True, False, True, False], [True, True, False, False], [False] * 4])
    assert PqIndex().of(w, live).tolist() == pytest.approx([0, 0.1, 0])  # a row without live entries has 0
    assert float(PqIndex().of(w[0])) == pytest.approx(0.5)  # with all it would grow with the mask


def test_small_powers_of_many_small_numbers_are_summed_in_double_precision():
    w = torch.full((1 << 18,), 1e-38)
    w[::2] *= 4
    assert float(PqIndex().of(w)) == pytest.approx(index(1.0, 4.0), abs=1e-6)
    assert float(PqIndex(0.1, 1.0).of(torch.full((1 << 18,), 3e-7))) == pytest.approx(0, abs=1e-12)


def test_numbers_that_are_not_finite_are_refused():
    with pytest.raises(EvidenceError, match="they hold NaN or infinity"):
        PqIndex().of(torch.tensor([1.0, math.nan]))


def test_the_gini_index_by_hand():
    assert gini(torch.tensor([1.0, -1.0, 1.0])) == pytest.approx(0, abs=1e-6)
    # 1, 2, 3: (-2 + 0 + 6) / (3 * 6)
    assert gini(torch.tensor([3.0, 1.0, -2.0])) == pytest.approx(4 / 18, abs=1e-6)
    assert gini(torch.tensor([3.0, 9.0]), torch.tensor([True, False])) == pytest.approx(0, abs=1e-6)
    assert gini(torch.ones(0)) == 0


# The bound and what follows


@pytest.mark.parametrize(("p", "q"), [(0.5, 1.0), (1.0, 2.0), (0.3, 1.7)])
@pytest.mark.parametrize("alive", [1, 3, 7, 49])
def test_of_equal_numbers_among_zeros_as_many_must_stay(alive, p, q):
    assert least([0.3] * alive + [0.0] * (49 - alive), p, q) == alive


def test_the_bound_is_one():
    """Whatever r entries hold the p-mass up to a slack, r is not below the bound."""
    draw = torch.Generator().manual_seed(1)
    for slack in (0.0, 0.1, 1.0):
        w = torch.rand(40, generator=draw).pow(4)
        mass = w.sort(descending=True).values.pow(0.5)
        need = next(r for r in range(1, 41) if mass[r:].sum() <= slack * mass[:r].sum() + 1e-12)
        assert need >= least(w.tolist(), slack=slack)


def test_the_amount_by_hand():
    w, live = torch.tensor([[7.0, 0.0, 0.0, 0.0, 0.0]]), torch.ones(1, 5, dtype=torch.bool)
    assert Adaptive().share(w, live).tolist() == pytest.approx([0.8])  # one of five must stay
    assert Adaptive().gone(w, live).tolist() == [4]
    assert Adaptive(most=0.5).gone(w, live).tolist() == [2]
    assert Adaptive(scaling=0.5).gone(w, live).tolist() == [2]
    assert Adaptive(scaling=9.0).gone(w, live).tolist() == [4]  # 0.9 of five is 4.5
    even = torch.ones(1, 5)
    assert Adaptive(scaling=9.0).gone(even, live).tolist() == [0]  # all alike: nothing can go
    assert Adaptive(slack=1.0).gone(even, live).tolist() == [3]  # 5 / 2^2 is 1.25, of which two must stay
    assert Adaptive().gone(even, torch.zeros(1, 5, dtype=torch.bool)).tolist() == [0]


def test_a_pool_is_never_emptied():
    w = torch.tensor([[1.0, 0.0, 0.0]])
    live = torch.tensor([[False, True, False]])
    for amount in (Adaptive(scaling=1e9, slack=1e9, most=1 - 1e-12), Fraction(1 - 1e-12)):
        assert amount.gone(w, live).tolist() == [0]
        assert amount.gone(w, ~live).tolist() == [1]


def two_layers():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False))
    model[0].weight.data = torch.tensor([[5.0, 0.1, 0.1, 0.1], [1.0, 1.0, 1.0, 1.0]])
    model[1].weight.data = torch.tensor([[9.0, 8.0], [7.0, 6.0], [5.0, 4.0]])
    sites = weights(model, exclude=())
    return sites, magnitudes(model, sites)


def test_weights_compete_in_the_network_in_their_layer_or_in_their_neuron():
    sites, scores = two_layers()
    kept = {}
    for pool in (WholeNetwork(), EachLayer(), EachNeuron()):
        found = drop_smallest(sites, scores, everything(sites), pool, Fraction(0.5))
        kept[text_of(pool)] = {name: keep.sum(1).tolist() for name, keep in found.items()}
        assert {name: keep.shape for name, keep in found.items()} == {site.name: site.shape for site in sites}
    assert kept["whole-network"] == {"0.weight": [1, 0], "1.weight": [2, 2, 2]}
    assert kept["each-layer"] == {"0.weight": [1, 3], "1.weight": [2, 1, 0]}
    assert kept["each-neuron"] == {"0.weight": [2, 2], "1.weight": [1, 1, 1]}


def test_each_neuron_loses_what_its_own_index_says():
    sites, scores = two_layers()
    found = drop_smallest(sites, scores, everything(sites), EachNeuron(), Adaptive())
    assert found["0.weight"].sum(1).tolist() == [4 - round(4 * float(PqIndex().of(scores["0.weight"][0])) - 0.5), 4]


def test_exactly_as_many_go_ties_and_masked_zeros_included():
    sites, scores = two_layers()
    keep = drop_smallest(sites, scores, everything(sites), WholeNetwork(), Fraction(0.5))
    flat = {name: torch.zeros_like(score) for name, score in scores.items()}
    for pool in (WholeNetwork(), EachLayer(), EachNeuron()):
        then = drop_smallest(sites, flat, keep, pool, Fraction(0.5))
        assert all(not bool((then[n] & ~keep[n]).any()) for n in keep)
        rows = zip(pool.rows(sites, keep), pool.rows(sites, then), strict=True)
        assert all((k.sum(1) - t.sum(1)).tolist() == [n // 2 for n in k.sum(1).tolist()] for k, t in rows)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: PqIndex(1.0, 1.0), "p=1 and q=1"),
        (lambda: PqIndex(2.0, 1.0), "0 < p < q"),
        (lambda: PqIndex(0.0, 1.0), "p=0"),
        (lambda: PqIndex(0.5, math.inf), "q=inf"),
        (lambda: Adaptive(slack=-0.1), "a slack of -0.1"),
        (lambda: Adaptive(scaling=0.0), "a scaling of 0 was asked for"),
        (lambda: Adaptive(most=1.0), "1 of a pool was to go in one round"),
        (lambda: Adaptive(most=0.0), "0 of a pool"),
        (lambda: Fraction(1.0), "a fraction of 1 a round"),
        (lambda: Turned(0), "a patience of 0"),
        (lambda: Indexed([], every=-1), "the index every -1 steps"),
        (lambda: Sap(p=2.0).check(), "0 < p < q"),
        (lambda: Sap(most=1.5).check(), "1.5 of a pool"),
        (lambda: Sap(rounds=0).check(), "rounds=0 was given"),
        (lambda: Sap(idle=0).check(), "idle=0 was given"),
        (lambda: Sap(every=0).check(), "every=0 was given"),
        (lambda: Sap(clip=-1.0).check(), "no longer than -1"),
        (lambda: Sap(steps=0).check(), "trainings of 0 steps"),
        (lambda: Sap(rewind=Rewind(2000)).check(), "rewinding to step 2000"),
    ],
)
def test_settings_that_cannot_be_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


# The allocation, for one cut


def test_a_budget_is_spread_by_what_must_stay():
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    model[0].weight.data = torch.zeros(8, 8)
    model[0].weight.data[:2] = 1.0  # 16 of 64 must stay
    model[1].weight.data = torch.ones(8, 8)  # and all 64
    sites = weights(model)
    scores = magnitudes(model, sites)
    assert Pq().spread(sites, Budget(0.5), scores) == {"0.weight": 13, "1.weight": 51}  # one to four, of 64
    assert sum(Pq().spread(sites, Budget(0.1), scores).values()) == 116
    with pytest.raises(SettingError, match="no scores were given"):
        Pq().spread(sites, Budget(0.5))


def test_one_shot_methods_take_the_allocation_by_name():
    kind = load("magnitude")
    known = part_of("pq(index='pq-index(p=1.0, q=2.0)')")
    assert known == Pq(PqIndex(1.0, 2.0))
    model = tiny.trained("mlp")
    done = prune(model, kind(sparsity=0.6, allocation=known), tiny.make_task("mlp"))
    even = prune(model, kind(sparsity=0.6, allocation=Uniform()), tiny.make_task("mlp"))
    assert done.ledger.removed == pytest.approx(even.ledger.removed, abs=3)
    assert [row.kept for row in done.record.sites] != [row.kept for row in even.record.sites]


# The curve, and stopping


def test_the_curve_is_of_live_weights_in_any_training():
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    keep = {s.name: torch.arange(s.units).reshape(s.shape) % 2 == 0 for s in sites}
    history = fit(model, task, 7, [Hold(sites, keep), Indexed(sites, every=3)])
    assert [step for step, _ in history.curves["pq index"]] == [3, 6, 7]
    live = torch.cat([tensors(model)[s.name].detach()[keep[s.name]] for s in sites])
    assert history.curves["pq index"][-1][1] == pytest.approx(float(PqIndex().of(live)))
    assert history.curves["gini"][-1][1] == pytest.approx(gini(live))
    assert history.curves["kept"][-1] == (7, 0.5)
    assert f"pq index of {sites[0].name}" in history.curves


def test_the_curve_sees_the_masks_of_a_gradual_ramp():
    model, task = tiny.mlp(), tiny.toy_vectors()
    ramp = Gradual(weights(model), Schedule(end=0.75, until=0.5, every=2))
    history = fit(model, task, 10, [ramp, Indexed(weights(model), every=5)])
    assert history.curves["kept"][-1][1] == pytest.approx(0.25, abs=0.01)


def test_a_turn_is_a_fall_and_then_a_rise():
    rule = Turned(patience=2)
    assert not rule.over([])
    assert not rule.over([0.3, 0.4, 0.5])  # it never fell
    assert not rule.over([0.3, 0.2, 0.1, 0.15])
    assert rule.over([0.3, 0.2, 0.1, 0.15, 0.12])
    assert not rule.over([0.3, 0.2, 0.1, 0.15, 0.09])
    assert not Turned(2, rise=0.1).over([0.3, 0.2, 0.1, 0.15, 0.15])
    assert not Turned(2, fall=0.25).over([0.3, 0.2, 0.1, 0.15, 0.15])


# The method


def test_a_run_keeps_its_masks_and_logs_the_index_round_by_round():
    assert load("sap") is Sap
    model, task = tiny.mlp(), tiny.toy_vectors()
    done = prune(model, Sap(rounds=3, steps=15, every=5), task)
    curves = done.history.curves
    assert [step for step, _ in curves["pq index"]] == [15, 30, 45, 60]
    kept = [value for _, value in curves["kept"]]
    assert kept[0] == 1
    assert kept == sorted(set(kept), reverse=True)
    assert sum(e.kept for e in done.edits) / sum(e.site.units for e in done.edits) == pytest.approx(kept[-1])
    assert len(done.edits) == 3  # the classifier too
    for edit in done.edits:
        assert torch.equal(tensors(done.model)[edit.site.name] != 0, edit.keep)
    assert f"{kept[-1]:.2%} of the weights are left after 3 rounds" in done.notes
    assert any("after each training: 100.00%" in note for note in done.notes)


def test_the_share_that_goes_is_what_the_index_of_the_trained_weights_says():
    model, task = tiny.mlp(), tiny.toy_vectors()
    seen = []
    method = Sap(rounds=2, steps=15, every=15)

    def watch(now: Rounds):
        sites = weights(model, exclude=())
        sizes = torch.cat([s.reshape(-1) for s in magnitudes(model, sites).values()])
        live = torch.cat([now.keep[s.name].reshape(-1) for s in sites])
        share = float(Adaptive().share(sizes[None], live[None]))
        seen.append((int(live.sum()), math.floor(int(live.sum()) * share + 1e-9)))

    method.search(model, task, watch=watch)
    assert [n for n, _ in seen[1:]] == [n - gone for n, gone in seen[:-1]]


def test_every_training_starts_from_the_first_weights_batch_norm_included():
    model, task = tiny.cnn(), tiny.toy_images()
    origin, starts = Snapshot.of(model), []
    Sap(rounds=2, steps=4, every=4).search(model, task, watch=lambda now: starts.append(now.start))
    assert len(starts) == 3
    assert all(torch.equal(start.model[k], origin.model[k]) for start in starts for k in origin.model)
    ends = []
    Sap(rounds=1, steps=4, every=4, rewind=Stay()).search(
        model, task, watch=lambda now: ends.append((now.start, now.end))
    )
    assert torch.equal(ends[1][0].model["conv.weight"], ends[0][1].model["conv.weight"])


def test_a_search_taken_up_again_is_the_one_that_was_not_interrupted(tmp_path):
    method, task = Sap(rounds=3, steps=12, every=4), tiny.toy_vectors()
    whole, half, kept = tiny.mlp(), tiny.mlp(), []
    last = method.search(whole, task)
    method.search(half, task, watch=lambda now: kept.append(now))
    kept[1].snapshot().save(tmp_path / "round")
    again = tiny.mlp(seed=5)
    then = method.search(again, task, resume_from=Rounds.of(Snapshot.load(tmp_path / "round")))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))
    assert then.history.curves["pq index"] == last.history.curves["pq index"]


def test_it_stops_when_nothing_goes_any_more():
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    model[0].weight.data.fill_(0.5)  # all alike, and a learning rate of nothing
    task = tiny.toy_vectors()
    task = type(task)(task.name, task.splits, seed=0, batch=32, learner=Sgd(0.0))
    done = Sap(rounds=9, steps=2, every=2, idle=2).run(model, task)
    assert len(done.history.losses) == 3 * 2
    assert any("stopped after 2 of 9 rounds: nothing went in 2 rounds" in note for note in done.notes)
    assert all(bool(e.keep.all()) for e in done.edits)


def test_it_stops_where_the_index_turned():
    class After:
        """Stands in for a turn after the second round."""

        def over(self, values):
            return len(values) == 3

    done = Sap(rounds=9, steps=3, every=3, stopping=After()).run(tiny.mlp(), tiny.toy_vectors())
    assert len(done.history.losses) == 3 * 3
    assert any("stopped after 2 of 9 rounds: the index has turned" in note for note in done.notes)


def test_any_search_in_rounds_can_be_stopped_by_the_index():
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites, seen = weights(model), []

    class Third:
        def over(self, drawn):
            seen.append(len(drawn))
            return len(drawn) == 3

    found = search(
        model, task, sites, Course(4), Rewind(0), 9,
        lambda keep, start: LayerByLayer().drop(sites, magnitudes(model, sites), keep, 0.2),
        more=[Indexed(sites)], over=lambda now: Third().over(values(now, "pq index")),
    )  # fmt: skip
    assert found.done == 2
    assert seen == [1, 2, 3]
    again = search(
        model, task, sites, Course(4), Rewind(0), 9, lambda keep, start: keep, resume_from=found,
        over=lambda now: Third().over(values(now, "pq index")),
    )  # fmt: skip
    assert again.done == 2  # nor does it go on when taken up again


def test_a_training_ends_with_its_best_weights():
    model, task = tiny.mlp(), tiny.toy_vectors()
    best, seen = Best(5), {}

    def watch(loop):
        if loop.step % 5 == 0:
            seen[loop.step] = copy.deepcopy(model.state_dict())
        if loop.step == 10:
            with torch.no_grad():
                model[0].weight.zero_()  # from here on it is worse

    history = fit(model, task, 12, [best], optimizer=torch.optim.SGD(model.parameters(), 0.05), watch=watch)
    points = history.curves["validation accuracy"]
    assert [step for step, _ in points] == [5, 10, 12]
    step = max(points, key=lambda point: (point[1], -point[0]))[0]
    assert step != 12
    assert all(torch.equal(v, seen[step][k]) for k, v in model.state_dict().items() if step == 5)
    assert task.measure(model, "val")["accuracy"] == max(v for _, v in points)


def test_masked_gradients_are_no_part_of_the_norm_that_is_clipped():
    model = nn.Sequential(nn.Linear(16, 4, bias=False))
    sites = weights(model)
    keep = {sites[0].name: torch.arange(64).reshape(4, 16) < 3}
    norms = []

    class Look(Clip):
        def before_step(self, loop):
            super().before_step(loop)
            norms.append(float(loop.model[0].weight.grad.norm()))

    fit(model, tiny.toy_vectors(), 2, [Hold(sites, keep), Look(1e-3)])
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-2)  # all of it is the gradient of what is left


def test_the_edits_are_masks_a_stock_copy_takes():
    model, task = tiny.cnn(), tiny.toy_images()
    done = prune(model, Sap(rounds=1, steps=6, every=6, pool=EachNeuron()), task)
    fresh = tiny.cnn(seed=9)
    fresh.load_state_dict(done.model.state_dict())
    assert task.measure(fresh) == task.measure(done.model)
    assert all(isinstance(e, Mask) for e in apply_(fresh, done.edits))


def test_fewer_rounds_than_the_lottery_to_the_same_sparsity_on_digits():
    """At toy size: digits, 64-64-32-10, 114 steps a training, PQ index (1, 2), against 20 % a round."""
    from secateur.tasks.images import digits

    task = digits(flat=True, batch=64, learner=Sgd(0.1, decay=5e-4, nesterov=True))
    model = tiny.seeded(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), 0
    )
    quality = []
    found = Sap(p=1.0, q=2.0, rounds=4, steps=114, every=19).search(
        model, task, watch=lambda now: quality.append(task.measure(model, "test")["accuracy"])
    )
    kept, drawn = values(found, "kept"), values(found, "pq index")
    assert kept[4] < 0.28  # the lottery's 0.8^4 is 0.41, and takes 6 rounds to 0.26
    shares = [1 - b / a for a, b in pairwise(kept)]
    assert shares == sorted(shares, reverse=True)  # less and less
    assert drawn == sorted(drawn, reverse=True)  # the first fall of the index
    assert min(quality) > quality[0] - 0.03
