"""Regimes of pruned networks: both measurements by hand, where a cell lies, what is advised, and SAM's step."""

import math
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.allocations import Global
from secateur.axes.branching import Candidate, Fall
from secateur.axes.correlation import rank_correlation
from secateur.axes.rewinding import Course
from secateur.axes.rules import Hold
from secateur.axes.schedules import Linear, Steps
from secateur.axes.sharpness import Sam, ascent
from secateur.axes.soup import Refresh
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, ModelError, SettingError, TaskError
from secateur.site import tensors
from secateur.studies.three_regimes import (
    BatchSize,
    Boundaries,
    Cell,
    Cut,
    EarlyStop,
    Grid,
    Knob,
    Meter,
    Radius,
    Rate,
    Regime,
    Retrain,
    advise,
    best,
    calibrated,
    chosen,
    chosen_dense,
    cka,
    connectivity,
    directions,
    drawn,
    family,
    followed,
    joined,
    probe,
    trend,
    widest_gap,
)
from secateur.task import Around
from secateur.train import Rule, Snapshot, attach, fit

QUICK = Meter(points=3, refresh=Refresh(0.2), examples=64)


def cell(setting, density, error, lmc=0.0, similar=1.0, dense=0.1, **more):
    return Cell(setting, density, dense, (error,), (lmc,), (similar,), **more)


# The measurements


def test_connectivity_by_hand():
    # ends 0.1 and 0.3: their mean is 0.2, the farthest from it 0.5
    assert connectivity([0.1, 0.5, 0.3]) == pytest.approx(-0.3)
    # a better path: 0.05 is farther from 0.2 than 0.25
    assert connectivity([0.1, 0.05, 0.25, 0.3]) == pytest.approx(0.15)
    # the ends themselves may be farthest: 0.1 and 0.3 are equally far, and the first counts
    assert connectivity([0.1, 0.2, 0.3]) == pytest.approx(0.1)
    assert connectivity([0.2, 0.2, 0.2]) == 0


def test_cka_by_hand():
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    y = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    # X'Y = diag(2, 0), X'X = diag(2, 0), Y'Y = diag(2, 2): 4 / (2 sqrt(8))
    assert cka(x, y) == pytest.approx(4 / (2 * math.sqrt(8)))
    turned = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    assert cka(y, 3 * y @ turned + 5) == pytest.approx(1)  # blind to rotation, size and offset


def test_cka_equals_that_of_centred_gram_matrices():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(20, c, generator=draw) for c in (3, 5))
    centre = torch.eye(20) - 1 / 20
    k, l = (centre @ z @ z.T @ centre for z in (x, y))  # noqa: E741
    assert cka(x, y) == pytest.approx(float((k * l).sum() / (k.norm() * l.norm())), rel=1e-5)


def test_a_network_that_says_the_same_to_all_is_collapsed():
    same = torch.tensor([[0.3, 0.7]]).expand(9, 2)
    assert math.isnan(cka(same, torch.randn(9, 2, generator=torch.Generator().manual_seed(0))))
    where = Boundaries().place(cell(1, 0.5, 0.9, similar=math.nan))
    assert where.regime is Regime.COLLAPSED
    assert where.regime.direction == 0


def two_copies():
    """Two copies of a network with batch norms, under one mask."""
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    masks = Cut().masks(model, 0.5)
    apply_(model, masks)
    (one, other), _ = Retrain(12).run(model, task, masks, "test", 24)
    return model, task, [m.site for m in masks], one, other


def test_the_line_between_copies_is_walked_sparse_and_with_fresh_statistics():
    model, task, sites, one, other = two_copies()
    seen = []

    class Watched(Around):
        def measure(self, model, split="val"):
            seen.append((split, model.conv.weight.detach().clone(), model.bn.running_mean.clone()))
            return super().measure(model, split)

    found = QUICK.along(model, Watched(task), sites, one, other)
    assert [split for split, _, _ in seen] == ["train"] * 3
    name = "conv.weight"
    ends = one.state.model[name], other.state.model[name]
    assert not torch.equal(*ends)
    for share, (_, weight, mean) in zip((0, 0.5, 1), seen, strict=True):
        assert torch.allclose(weight, (1 - share) * ends[0] + share * ends[1])
        assert bool((weight == 0)[~one.keep[name]].all())
        # the ends are treated as what lies between
        assert not torch.equal(mean, one.state.model["bn.running_mean"])
    assert -1 <= found <= 1
    # of a copy and itself there is no barrier, and the outputs are the same
    lmc, similar = QUICK.pairs(model, task, sites, [one, one], 64)
    assert lmc == (0.0,)
    assert similar == (pytest.approx(1),)


def test_copies_under_different_masks_are_refused():
    model, task, sites, one, other = two_copies()
    unlike = Candidate(other.state, {name: ~keep for name, keep in other.keep.items()}, other.history)
    with pytest.raises(ModelError, match="their masks differ in conv.weight"):
        QUICK.along(model, task, sites, one, unlike)


# Probes and grids


def test_a_probe_prunes_convolutions_alone_and_leaves_the_model_as_it_was():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    zeros = []

    class Counting(Around):
        def measure(self, model, split="val"):
            if split == "test":
                zeros.append({n: float((p != 0).float().mean()) for n, p in model.named_parameters() if p.dim() > 1})
            return super().measure(model, split)

    found = probe(model, Counting(task), 0.25, Retrain(8, copies=3), meter=QUICK)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (len(found.errors), len(found.lmc), len(found.cka)) == (3, 3, 3)
    assert found.dense == pytest.approx(1 - task.measure(model, "test")["accuracy"])
    assert all(0 <= value <= 1 + 1e-9 for value in found.cka)
    for kept in zeros[1:]:
        assert kept.pop("fc.weight") == 1
        assert list(kept.values()) == [pytest.approx(0.25, abs=0.01)] * len(kept)
    # the same again; other orders of the data make other copies
    assert probe(model, task, 0.25, Retrain(8, copies=3), meter=QUICK) == found
    assert len(set(found.lmc) | set(found.cka)) > 2


def test_one_threshold_keeps_unequal_shares_of_layers():
    masks = Cut(Global()).masks(tiny.trained("cnn"), 0.3)
    units = sum(m.site.units for m in masks)
    assert sum(m.kept for m in masks) == pytest.approx(0.3 * units, abs=1)
    assert len({round(m.kept / m.site.units, 2) for m in masks}) > 1


def test_error_is_told_of_the_last_epochs():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    masks = Cut().masks(model, 0.3)
    apply_(model, masks)
    retrain = Retrain(10, last=2, course=Fall(Linear(), warmup=0.0))
    copies, errors = retrain.run(model, task, masks, "test", 4)
    steps, values = zip(*copies[0].history.curves["error"], strict=True)
    assert steps == (6, 10)
    assert errors[0] == pytest.approx(sum(values) / 2)
    copies[0].state.restore_(model)
    assert values[1] == pytest.approx(1 - task.measure(model, "test")["accuracy"])


def test_a_grid_trains_each_dense_network_once_and_takes_it_from_a_folder(tmp_path):
    model, task = tiny.make_model("cnn"), tiny.make_task("cnn")
    before = {k: v.clone() for k, v in model.state_dict().items()}

    @dataclass(frozen=True)
    class Counted:
        hotter: ClassVar[str] = "earlier"
        colder: ClassVar[str] = "later"

        def temperature(self, setting):
            return -setting

        def train(self, model, task, settings, course):
            trained.append(tuple(settings))
            return EarlyStop().train(model, task, settings, course)

    trained = []
    grid = Grid(Counted(), (4.0, 12.0), (0.1, 0.5), Course(12, Steps(), floor=0.0), Retrain(4), meter=QUICK)
    cells = grid.measure(model, task, tmp_path)
    assert trained == [(4.0, 12.0)]
    assert [(c.setting, c.density) for c in cells] == [(4, 0.1), (4, 0.5), (12, 0.1), (12, 0.5)]
    assert cells[0].dense == cells[1].dense != cells[2].dense
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(list(tmp_path.iterdir())) == 2
    wider = replace(grid, settings=(4.0, 8.0, 12.0), densities=(0.5,))
    assert wider.measure(model, task, tmp_path)[2] == cells[3]
    assert trained[1:] == [(8.0,)]
    # of another seed, course or start nothing is taken
    family(model, tiny.make_task("cnn", seed=1), Counted(), (4.0,), grid.course, tmp_path)
    family(tiny.make_model("cnn", seed=1), task, Counted(), (4.0,), grid.course, tmp_path)
    family(model, task, Counted(), (4.0,), Course(12), tmp_path)
    assert trained[2:] == [(4.0,)] * 3


def test_knobs_train_one_network_for_each_setting():
    model, task, course = tiny.make_model("mlp"), tiny.make_task("mlp"), Course(6, Steps(), floor=0.0)

    def moved(knob: Knob, settings):
        found = family(model, task, knob, settings, course)
        return [float((state.model["0.weight"] - model[0].weight.detach()).norm()) for state in found.values()]

    early = moved(EarlyStop(), (2, 6))
    assert early[0] < early[1]
    slow, fast = moved(Rate(), (0.1, 1.0))
    assert slow < fast
    assert fast == pytest.approx(early[1])  # the task's own rate, to the end
    plain, wide = moved(Radius(), (0.0, 0.5))
    assert plain == pytest.approx(fast)
    assert wide != pytest.approx(plain, rel=1e-4)
    small, usual = moved(BatchSize(), (8, task.batch))
    assert usual == pytest.approx(plain)
    assert small != pytest.approx(plain, rel=1e-4)
    hot = {EarlyStop(): 100, BatchSize(): 8, Rate(): 10.0, Radius(): 1.0}
    cold = {EarlyStop(): 200, BatchSize(): 64, Rate(): 1.0, Radius(): 0.0}
    assert all(knob.temperature(hot[knob]) > knob.temperature(cold[knob]) for knob in hot)


# Regimes and advice

EDGES = Boundaries(0.01, 0.9)


@pytest.mark.parametrize(
    ("lmc", "similar", "regime", "setting"),
    [
        (-0.05, 0.95, "I", 100),  # poorly connected, however similar: hotter, which is earlier
        (-0.0101, 0.95, "I", 100),
        (-0.0099, 0.9001, "II-B", 200),
        (-0.0099, 0.8999, "II-A", 400),  # connected and dissimilar: colder
        (0.0, 0.95, "II-B", 200),  # stay
        (0.05, 0.95, "II-B", 200),  # a better path between them is no barrier
        (0.0, math.nan, "collapsed", 200),
    ],
)
def test_what_is_advised_in_each_regime(lmc, similar, regime, setting):
    found = advise(cell(200, 0.1, 0.3, lmc, similar), EDGES, EarlyStop(), (50, 100, 200, 400, 800))
    assert found.placed.regime.value == regime
    assert found.setting == setting
    assert found.placed.connected_by == pytest.approx(lmc + 0.01)
    if regime != "collapsed":
        assert found.placed.similar_by == pytest.approx(similar - 0.9)


def test_advice_is_a_sentence_with_distances():
    found = advise(cell(200, 0.1, 0.3, -0.05, 0.95, proxy=True), EDGES, EarlyStop(), (100, 200))
    assert found.says == (
        "Regime I: LMC -5.00%, -4.00% from its boundary, and CKA 0.9500, +0.0500 from its own; stop training earlier, "
        "100 instead of 200. Measured after a shorter retraining, which is a proxy."
    )
    short = advise(cell(200, 0.1, 0.3, 0.02, 0.95), EDGES, EarlyStop(), (100, 200))
    assert short.says.endswith("from its own; stay. Between copies the error is lower: their retraining was short.")
    end = advise(cell(100, 0.1, 0.3, -0.05), EDGES, EarlyStop(), (100, 200))
    assert end.setting == 100
    assert "stop training earlier, but 100 is the last of those given" in end.says
    assert advise(cell(0.1, 0.1, 0.3, 0.0, 0.2), EDGES, Radius(), (0.0, 0.05, 0.1)).setting == 0.05


def test_boundaries_are_calibrated_by_hand():
    assert widest_gap([0.5, 0.9, math.nan, 0.6, 0.95]) == pytest.approx(0.75)
    cells = [replace(cell(1, 0.1, 0.3, 0, s), lmc=(0.0, 0.02)) for s in (0.5, 0.9)]
    # two deviations of (0, 0.02): 2 * 0.02 / sqrt(2)
    found = calibrated(cells)
    assert found.eps == pytest.approx(0.04 / math.sqrt(2))
    assert found.kappa == pytest.approx(0.7)
    assert calibrated([cell(1, 0.1, 0.3, 0, s) for s in (0.5, 0.9)]).eps == 0.01  # one pair has no deviation
    # a cell behind a barrier has no part in it, unless there are not two others
    barrier = cell(4, 0.1, 0.3, -0.2, 0.1)
    assert calibrated([barrier, cell(1, 0.1, 0.3, 0, 0.9), cell(2, 0.1, 0.3, 0, 0.7)]).kappa == pytest.approx(0.8)
    assert calibrated([barrier, cell(1, 0.1, 0.3, 0, 0.9)]).kappa == pytest.approx(0.5)


def test_seeds_are_joined_cell_by_cell():
    one, other = cell(1, 0.1, 0.3, -0.02, 0.8, 0.1, seeds=(0,)), cell(1, 0.1, 0.5, 0.0, 0.6, 0.2, seeds=(1,))
    (found,) = joined([one, other])
    assert (found.error, found.connected, found.similar) == pytest.approx((0.4, -0.01, 0.7))
    assert found.seeds == (0, 1)
    assert found.dense == pytest.approx(0.15)


def a_map():
    """Two densities, three lengths: at the low density the shortest is best, at the high one the longest."""
    return [
        cell(1, 0.1, 0.30, -0.005, 0.95, dense=0.3),
        cell(2, 0.1, 0.32, -0.03, 0.9, dense=0.2),
        cell(4, 0.1, 0.40, -0.05, 0.9, dense=0.1),
        cell(1, 0.5, 0.20, 0.0, 0.6, dense=0.3),
        cell(2, 0.5, 0.15, 0.0, 0.7, dense=0.2),
        cell(4, 0.5, 0.10, 0.0, 0.98, dense=0.1),
    ]


def test_case_studies_by_hand():
    cells, edges, knob = a_map(), Boundaries(0.01, 0.8), EarlyStop()
    assert best(cells) == {0.1: 1, 0.5: 4}
    assert trend(cells, knob) == pytest.approx(-1)  # the best temperature falls as density rises
    moves = directions(cells, edges, knob)
    assert [m.advice.setting for m in moves] == [1, 1, 2, 2, 4, 4]
    assert [m.gain for m in moves] == pytest.approx([0, 0.02, 0.08, 0.05, 0.05, 0])
    assert followed(cells, edges, knob, 4, 0.1).setting == 1
    assert followed(cells, edges, knob, 1, 0.5).setting == 4
    # two regimes that point at one another: it ends where it would turn round
    ping = [cell(1, 0.1, 0.3, 0.0, 0.5), cell(2, 0.1, 0.3, -0.05, 0.9)]
    assert followed(ping, edges, knob, 2, 0.1).setting == 1
    low, high = cells[:3], cells[3:]
    assert chosen(low, edges).setting == 1
    assert chosen_dense(low).setting == 4
    assert chosen(high, edges).setting == 4
    assert chosen(low[1:], edges).setting == 2  # none is connected: the best connected


def test_cells_of_several_seeds_are_no_map_until_they_are_joined():
    cells = [*a_map(), *(replace(c, errors=(c.error + 0.5,), seeds=(1,)) for c in a_map())]
    for read in (
        lambda some: directions(some, EDGES, EarlyStop()),
        lambda some: followed(some, EDGES, EarlyStop(), 1, 0.1),
        lambda some: trend(some, EarlyStop()),
        lambda some: drawn(some, EDGES, EarlyStop()),
    ):
        with pytest.raises(EvidenceError, match="its 12 cells have 6 places, as those of several seeds do"):
            read(cells)
        read(joined(cells))


def test_a_map_is_drawn_hot_above():
    lines = drawn(a_map(), Boundaries(0.01, 0.8), EarlyStop()).splitlines()
    assert lines[0].split() == ["10.0%", "50.0%"]
    assert lines[1].split() == ["1", "II-B", "30.00%*", "II-A", "20.00%"]
    assert lines[3].split() == ["4", "I", "40.00%", "II-B", "10.00%*"]
    assert lines[4].startswith("eps 1.00% of train error, kappa 0.8000")


def test_rank_correlation_by_hand():
    assert rank_correlation([1, 2, 3], [10, 100, 1000]) == 1
    assert rank_correlation([1, 2, 3], [3, 3, 3]) == 0
    # ranks 1, 2.5, 2.5 against 1, 2, 3
    assert rank_correlation([1, 2, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))


# SAM


def test_ascent_by_hand():
    (step,) = ascent([torch.tensor([1.0, 2.0])], [torch.tensor([3.0, 4.0])], 0.5)
    assert step.tolist() == pytest.approx([0.3, 0.4])
    # adaptive: |theta| g = (3, 8), its norm sqrt(73); theta^2 g = (3, 16)
    (step,) = ascent([torch.tensor([1.0, -2.0])], [torch.tensor([3.0, 4.0])], 0.5, adaptive=True)
    assert step.tolist() == pytest.approx([1.5 / math.sqrt(73), 8 / math.sqrt(73)])
    assert ascent([torch.ones(2)], [torch.zeros(2)], 0.5)[0].tolist() == [0, 0]


def test_a_step_of_sam_takes_the_gradient_uphill():
    model, task = nn.Linear(16, 4), tiny.make_task("mlp")
    start, taken = {k: v.detach().clone() for k, v in model.state_dict().items()}, []

    class Seen(Rule):
        def before_step(self, loop):
            taken.append(loop.batch)

    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    fit(model, task, 1, [Sam(0.3), Seen()], optimizer)
    twin = nn.Linear(16, 4)
    twin.load_state_dict(start)
    first = torch.autograd.grad(task.loss(twin, taken[0]), list(twin.parameters()))
    norm = torch.cat([g.reshape(-1) for g in first]).norm()
    with torch.no_grad():
        for p, g in zip(twin.parameters(), first, strict=True):
            p.add_(0.3 * g / norm)
    second = torch.autograd.grad(task.loss(twin, taken[0]), list(twin.parameters()))
    for name, g in zip(("weight", "bias"), second, strict=True):
        assert torch.allclose(model.state_dict()[name], start[name] - 0.1 * g, atol=1e-6)


def test_sam_keeps_masks_and_statistics():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    (site, *_) = sites = weights(model, ("Conv2d",))
    keep = {s.name: torch.arange(s.units).reshape(s.shape) % 2 == 0 for s in sites}
    apply_(model, [Mask(s, keep[s.name]) for s in sites])
    start = Snapshot.of(model)
    uphill = []

    class Watched(Around):
        def loss(self, model, batch):
            uphill.append(int((tensors(model)[site.name] != 0).sum()))
            return super().loss(model, batch)

    fit(model, Watched(task), 2, [Sam(0.5), Hold(sites, keep)])
    assert uphill == [int(keep[site.name].sum())] * 4  # on the way uphill too
    ended = Snapshot.of(model)
    start.restore_(model)
    fit(model, task, 1, [Sam(0.5), Hold(sites, keep)])
    with_sam = model.bn.running_mean.clone()
    start.restore_(model)
    fit(model, task, 1, [Hold(sites, keep)])
    assert torch.equal(with_sam, model.bn.running_mean)  # learnt from the first pass alone
    assert int(model.bn.num_batches_tracked) == int(start.model["bn.num_batches_tracked"]) + 1
    assert bool((ended.model[site.name][~keep[site.name]] == 0).all())


# What cannot be


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Retrain(10, copies=1), "1 retrained copies were asked for, but it takes two to be connected"),
        (lambda: Retrain(0), "0 steps of retraining"),
        (lambda: Meter(points=2), "two points are the ends themselves"),
        (lambda: Boundaries(-0.1, 0.5), "boundaries of -0.1 in LMC"),
        (lambda: Sam(-1.0), "a radius of -1 was asked for"),
        (lambda: Grid(EarlyStop(), (), (0.5,), Course(5), Retrain(5)), "one of both is empty"),
        (lambda: Grid(EarlyStop(), (5.0,), (0.0,), Course(5), Retrain(5)), "a density of 0 was asked for"),
        (lambda: Grid(EarlyStop(), (5.0,), (20.0,), Course(5), Retrain(5)), "Did you mean 0.2?"),
        (lambda: Cut().masks(tiny.cnn(), 1.01), r"the share of weights that stay, in \(0, 1\]"),
        (lambda: Meter(refresh=Refresh(-0.5)), "statistics of batch norms were to be taken anew on a share of -0.5"),
        (lambda: Meter(refresh=Refresh(2.0)), "on a share of 2"),
        (lambda: Retrain(10).short(3.0), "a retraining 3 times as long was to stand for one of 10 steps"),
        (lambda: Retrain(10).short(0.0), "a proxy is shorter"),
        (
            lambda: advise(cell(math.nan, 0.1, 0.3), EDGES, EarlyStop(), (1.0, 2.0)),
            "the cell does not say at which one",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_a_density_of_one_prunes_nothing():
    assert all(m.kept == m.site.units for m in Cut().masks(tiny.cnn(), 1.0))


def test_statistics_that_cannot_be_taken_anew_are_refused_before_anything_is_trained():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    with pytest.raises(SettingError, match="every pair would look unconnected"):
        Meter(refresh=Refresh(0.0)).check(model, replace(task, splits={}))
    bare = replace(task, splits={key: value for key, value in task.splits.items() if key != "train"})
    with pytest.raises(TaskError, match="split 'train' of toy-images was asked for"):
        probe(model, bare, 0.5, Retrain(2))

    class Empty(Around):
        def batches(self, split, n=None, epoch=0):
            return []

    with pytest.raises(TaskError, match="its training split is empty"):
        probe(model, Empty(task), 0.5, Retrain(2))


def test_tasks_that_tell_no_error_or_one_order_are_refused():
    with pytest.raises(TaskError, match="a barrier is told in a share of examples"):
        probe(tiny.make_model("decoder"), tiny.make_task("decoder"), 0.5, Retrain(2))

    class Still(Around):
        def batches(self, split, n=None, epoch=0):
            return self.task.batches(split, n, 0)

    with pytest.raises(TaskError, match="its batches are the same in every epoch"):
        probe(tiny.make_model("cnn"), Still(tiny.make_task("cnn")), 0.5, Retrain(2))
    with pytest.raises(TaskError, match="it has no batch to set"):
        BatchSize().train(tiny.mlp(), Around(tiny.make_task("mlp")), (8,), Course(2))
    with pytest.raises(SettingError, match="a network stopped after 20 steps was asked for, but its training has 5"):
        EarlyStop().train(tiny.mlp(), tiny.make_task("mlp"), (20,), Course(5))


@pytest.mark.parametrize(
    ("knob", "wrong", "says"),
    [
        (Rate(), -1.0, "a learning rate of -1 times the task's was asked for"),
        (Rate(), math.nan, "a learning rate of nan"),
        (BatchSize(), 16.5, r"batches of 16\.5 examples were asked for"),
        (BatchSize(), math.inf, "batches of inf"),
        (EarlyStop(), math.nan, "a network stopped after nan steps was asked for"),
        (Radius(), -1.0, "a radius of -1 was asked for"),
    ],
)
def test_settings_of_knobs_that_cannot_be_are_refused_before_any_training(knob, wrong, says):
    class Unread(Around):
        def batches(self, split, n=None, epoch=0):
            raise AssertionError("data was read")

        batch = 8

    with pytest.raises(SettingError, match=says):
        family(tiny.mlp(), Unread(tiny.make_task("mlp")), knob, (1.0, wrong), Course(2))


def test_a_model_is_as_it_was_after_a_training_that_failed():
    model, before = tiny.make_model("mlp"), tiny.make_model("mlp").state_dict()
    with pytest.raises(EvidenceError, match="was to be taken"):
        family(model, tiny.make_task("mlp"), Rate(), (1e30,), Course(20))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_settings_that_hardly_differ_are_kept_apart_in_a_folder(tmp_path):
    model, task, close = tiny.make_model("mlp"), tiny.make_task("mlp"), (0.12345671, 0.12345672)
    found = family(model, task, Rate(), close, Course(2), tmp_path)
    again = family(model, task, Rate(), close, Course(2), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    assert all(torch.equal(found[s].model["0.weight"], again[s].model["0.weight"]) for s in close)


def test_maps_that_tell_nothing_are_refused():
    with pytest.raises(
        EvidenceError, match=r"to be followed from 7 at a density of 0\.1, but the map has 1, 2, 4 there"
    ):
        followed(a_map(), EDGES, EarlyStop(), 7, 0.1)
    with pytest.raises(EvidenceError, match="they have 1 different values of CKA"):
        calibrated([cell(1, 0.1, 0.3), cell(2, 0.1, 0.3)])
    with pytest.raises(EvidenceError, match="copies of all of them are collapsed"):
        chosen([cell(1, 0.1, 0.9, similar=math.nan)], EDGES)


def test_sam_goes_first_and_needs_a_task():
    model, task = tiny.mlp(), tiny.make_task("mlp")
    with pytest.raises(SettingError, match="a rule that holds masks comes before it"):
        fit(model, task, 1, [Hold(weights(model)), Sam()])
    with pytest.raises(TaskError, match="this loop has no task"):
        attach(torch.optim.SGD(model.parameters(), 0.1), model, Sam(), 5)


def test_a_short_retraining_says_that_it_is_one():
    retrain = Retrain(100)
    assert not retrain.proxy
    short = retrain.short(0.2).short(0.5)
    assert (short.steps, short.whole, short.proxy) == (10, 100, True)
    assert probe(tiny.trained("cnn"), tiny.make_task("cnn"), 0.5, Retrain(20).short(0.1), meter=QUICK).proxy
