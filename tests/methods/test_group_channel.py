"""Group channel pruning: groups and thresholds, merged scales, attention taught again, on a detector with boxes."""

import copy

import pytest
import torch
from detectors import detector, toy
from tiny import make_task, trained

from secateur.axes import Global
from secateur.axes.distillation import Distil, attention, attention_distance
from secateur.axes.scales import Dropped, scale_names, scaled
from secateur.edit import Mask, Remove, Update, apply_
from secateur.errors import ModelError, SettingError
from secateur.graph import couple, removals
from secateur.method import Budget, prune, tiny
from secateur.methods.group_channel import AnyKeeps, GroupChannel, Grouped, Majority, Sparsest, groups_of
from secateur.site import tensors
from secateur.train import fit


def test_groups_are_the_parts_a_network_is_made_of():
    stages = [f"backbone.stage{i}.{j}" for i in (2, 3, 4) for j in range(4)]
    found = groups_of([*stages, "SPP.conv", "head.conv"])
    assert list(dict.fromkeys(found.values())) == [
        "backbone.stage2",
        "backbone.stage3",
        "backbone.stage4",
        "SPP",
        "head",
    ]
    assert set(groups_of(["a", "b", "c"]).values()) == {"a", "b", "c"}
    assert set(groups_of(["only.one"]).values()) == {"only.one"}
    assert groups_of(["x.a.one", "x.a.two", "x.a.one.more"])["x.a.two"] == "x.a.two"


def test_each_group_has_its_own_threshold_worked_by_hand():
    model, task = trained("cnn"), make_task("cnn")
    sites = [one.site for one in scaled(model, task.example, couple(model, task.example))[0]]
    names = [s.name for s in sites]
    assert names == ["conv", "block1.conv1", "down", "block2.conv1"]
    assert [s.units for s in sites] == [8, 8, 16, 16]
    # Of a network whose later scales are all smaller, one threshold takes those, and groups share alike.
    scores = {s.name: torch.arange(s.units) / 100 + (2.0 if i < 2 else 1.0) for i, s in enumerate(sites)}
    half = Budget(0.5, of="units")
    assert Global().spread(sites, half, scores) == dict(zip(names, (8, 8, 4, 4), strict=True))
    assert Grouped().spread(sites, half, scores) == dict(zip(names, (4, 4, 8, 8), strict=True))
    given = Grouped({"block*": 0.25, "down": 0.75}).spread(sites, half, scores)
    # The two blocks have sparsities of their own glob and so one threshold: a quarter of 24, all of the second's.
    assert given == dict(zip(names, (4, 8, 4, 10), strict=True))
    with pytest.raises(SettingError, match=r"a sparsity for 'blok\*' was given, but no site has such a name"):
        Grouped({"blok*": 0.5}).spread(sites, half, scores)
    with pytest.raises(SettingError, match=r"sparsity of a 50 was asked for"):
        Grouped({"a": 50})


def test_tied_scales_are_merged_worked_by_hand():
    sizes = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.2, 0.6], [0.2, 0.1, 0.1]])
    assert Majority().score(sizes).tolist() == pytest.approx([0.2, 0.2, 0.5])  # two of three reach it
    assert Majority().score(sizes[:2]).tolist() == pytest.approx([0.3, 0.9, 0.6])  # one of two is half
    assert AnyKeeps().score(sizes).tolist() == pytest.approx([0.3, 0.9, 0.6])
    assert Sparsest().score(sizes).tolist() == pytest.approx([0.2, 0.1, 0.1])


def test_attention_worked_by_hand():
    features = torch.tensor([[[[3.0, 0.0], [1.0, 0.0]], [[0.0, 0.0], [1.0, 2.0]]]])  # [1, 2, 2, 2]
    # Mean squares 4.5, 0, 1, 2, of length 5.025.
    assert attention(features)[0].tolist() == pytest.approx([v / 25.25**0.5 for v in (4.5, 0, 1, 2)])
    assert attention(torch.zeros(1, 2, 3, 3)).tolist() == [[0.0] * 9]
    assert float(attention_distance(features, 7 * features[:, [1, 0]])) == pytest.approx(0, abs=1e-6)
    one, other = torch.zeros(2, 1, 1, 3, 3).unbind(0)
    one, other = one.clone(), other.clone()
    one[..., 0, 0], other[..., 1, 1] = 5.0, 0.1
    assert float(attention_distance(one, other)) == pytest.approx(2)


def test_a_student_learns_where_its_teacher_looks_and_the_teacher_learns_nothing():
    model, task = trained("cnn"), make_task("cnn")
    teacher = copy.deepcopy(model)
    student = prune(model, tiny(GroupChannel, steps=0, tune=0, distil=0), task).model
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    rule = Distil(teacher, ["block1", "block2"], 50.0)
    history = fit(student, task, 40, [rule])
    curve = [value for _, value in history.curves["attention"]]
    assert len(curve) == 40
    assert sum(curve[-5:]) < 0.6 * sum(curve[:5])
    assert all(torch.equal(v, before[k]) for k, v in teacher.state_dict().items())
    assert not student.block1._forward_hooks
    assert not teacher.block1._forward_hooks
    with pytest.raises(ModelError, match=r"the student has no module of that name"):
        fit(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4)), task, 1, [Distil(teacher, ["block1"])])
    with pytest.raises(ModelError, match=r"Name modules whose outputs are"):
        fit(student, task, 1, [Distil(teacher, ["fc"])])
    with pytest.raises(SettingError, match=r"no layers were named"):
        Distil(teacher, [])


@pytest.fixture(scope="module")
def found():
    """A detector that finds things, and its task."""
    model, task = detector(), toy(batch=8)
    fit(model, task, 120)
    return model.eval(), task


def test_three_stages_on_a_detector_with_real_boxes(found):
    model, task = found
    method = GroupChannel(sparsity=0.5, steps=40, strength=0.3, tune=0, distil=50, layers=("backbone", "neck"))
    done = prune(model, method, task, measure="test")
    before, after = (done.record.measured(when) for when in ("before", "after"))
    assert done.ledger.sparsity == pytest.approx(0.5, abs=0.03)
    assert done.ledger.after.parameters < 0.45 * done.ledger.before.parameters
    assert done.ledger.after.flops < 0.6 * done.ledger.before.flops
    assert after["map50"] > 0.5 * before["map50"]
    assert {"map50 square", "map50 bar"} <= set(after)
    assert [row.of.split(",")[0] for row in done.record.pictures][1:] == ["before", "after"]
    assert {"scales below 0.01", "attention"} <= set(done.record.curves)
    assert any(note.startswith("channels kept by group: backbone: ") for note in done.notes)
    assert len(done.history.losses) == 90


def test_constants_are_absorbed_before_channels_go(found):
    model, task = found
    settings = {"sparsity": 0.25, "steps": 0, "tune": 0, "distil": 0}
    absorbed, dropped = (
        prune(model, GroupChannel(**settings, **more), task) for more in ({}, {"constants": Dropped()})
    )
    # The same channels go either way; absorbing gives the norms other means first, and the head another bias.
    masks = [[e.keep.tolist() for e in done.edits if isinstance(e, Remove)] for done in (absorbed, dropped)]
    assert masks[0] == masks[1]
    updated = [e.name for e in absorbed.edits if isinstance(e, Update)]
    assert "neck.1.running_mean" in updated
    assert updated[-1] == "head.bias"
    assert not any(isinstance(e, Update) for e in dropped.edits)


def test_masked_equals_removed_on_the_detector(found):
    model, task = found
    sites, others = scaled(model, task.example, couple(model, task.example))
    keep = GroupChannel(sparsity=0.4).keep(model, sites)
    assert others == []
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    apply_(masked, [Mask(one.site, keep[one.site.name]) for one in sites])
    apply_(cut, removals([one.site for one in sites], keep))
    torch.testing.assert_close(cut(*task.example.inputs), masked(*task.example.inputs), rtol=1e-4, atol=1e-5)


def test_as_many_channels_go_as_were_asked_floors_and_sites_that_stay_whole_counted_in():
    model, task = trained("cnn"), make_task("cnn")
    with torch.no_grad():
        model.block1.bn1.weight.mul_(1e-3)
    done = prune(model, GroupChannel(sparsity=0.25, allocation=Global(), steps=0, tune=0, distil=0), task)
    kept = {row.site: (row.kept, row.units) for row in done.record.sites}
    assert kept["block1.conv1"] == (1, 8)
    assert any(stays == units for stays, units in kept.values())
    assert sum(units for _, units in kept.values()) == 48
    assert (done.ledger.units, done.ledger.units_removed) == (
        48,
        12,
    )  # the one that a floor keeps is made up for elsewhere


def test_floors_hold_whatever_the_scales(found):
    model, task = copy.deepcopy(found[0]), found[1]
    sites, _ = scaled(model, task.example, couple(model, task.example))
    with torch.no_grad():
        for name in scale_names(sites)[:1]:
            tensors(model)[name].mul_(1e-6)
    one = GroupChannel(sparsity=0.5, allocation=Global(), floor=0.25).keep(model, sites)
    assert int(one[sites[0].site.name].sum()) >= sites[0].site.units // 4
    many = GroupChannel(sparsity=0.9, floor=0.01, least=16).keep(model, sites)
    assert all(int(k.sum()) == min(16, k.numel()) for k in many.values())  # the authors' floor: 16 of what is narrower


def test_each_stage_can_be_left_out_on_a_classifier():
    model, task = trained("cnn"), make_task("cnn")
    only_cut = prune(model, GroupChannel(steps=0, tune=0, distil=0), task)
    assert only_cut.history.losses == []
    assert only_cut.ledger.sparsity == 0.5
    sparse = prune(model, GroupChannel(steps=3, tune=0, distil=0), task)
    assert len(sparse.history.losses) == 3
    assert "attention" not in sparse.history.curves
    assert GroupChannel(allocation=Grouped({"conv": 0.5})).budget() is None
    both = prune(model, GroupChannel(steps=0, tune=2, distil=2), task)
    assert len(both.history.losses) == 4


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 1.5}, r"sparsity 1.5"),
        ({"floor": 2}, r"Did you mean 0.02"),
        ({"steps": -1}, r"steps=-1"),
        ({"least": 0}, r"least=0"),
        ({"attention": 0.0}, r"attention=0 was given"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(settings, says):
    with pytest.raises(SettingError, match=says):
        GroupChannel(**settings).run(torch.nn.Linear(1, 1), None)


def test_layers_that_are_not_there_are_named():
    with pytest.raises(SettingError, match=r"attention at 'blok\*' was to be distilled, but no module has such a name"):
        tiny(GroupChannel, layers=("blok*",)).run(trained("cnn"), make_task("cnn"))
