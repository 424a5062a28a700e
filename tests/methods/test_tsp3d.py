"""TSP3D: the sign of the keep logit, selection in training and in use, completion, and a network that really drops."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch

from secateur.edit import apply_, load, save
from secateur.errors import ModelError, SettingError, TaskError
from secateur.method import prune
from secateur.methods.magnitude import Magnitude
from secateur.methods.tsp3d import (
    TSP3D,
    ByChance,
    ByText,
    Completion,
    Seen,
    TextGuided,
    completing,
    completion_loss,
    counted,
    keep_loss,
    keep_targets,
    sampled,
)
from secateur.models import load as load_model
from secateur.models import save as save_model
from secateur.task import Batch
from secateur.voxels.fusion import BiEncoder, Words
from secateur.voxels.matching import focal
from secateur.voxels.sparse import Voxels, children, packed, per_scene
from secateur.voxels.walk import COARSEST

TINY = dict(TSP3D.tiny)


def line(count=4, stride=4, scenes=1, features=None):
    """Voxels in a row along x, in every scene."""
    coords = torch.tensor([[s, i * stride, 0, 0] for s in range(scenes) for i in range(count)])
    features = torch.zeros(len(coords), 8) if features is None else features
    return Voxels.of(coords, features, stride, scenes)


def guide(**changes):
    settings = {"selection": ByText(), "completion": None, "samples": (50, 50), "most": (6, 6), "fewest": 5}
    torch.manual_seed(0)
    return TextGuided(BiEncoder(8, 0.1, 1, 2, 8, 0.0), **{**settings, **changes}).eval()


# The sign of the logit


def test_a_large_keep_logit_keeps_a_voxel():
    x, held = line(), guide()
    held.seen = [Seen(COARSEST, x, torch.tensor([4.0, -4.0, 1.0, 0.5]))]  # chances 0.98, 0.02, 0.73, 0.62
    assert held.thinned(COARSEST, x).coords[:, 1].tolist() == [0, 8]
    assert held.kept == [(2, 4)]
    held.seen = [Seen(1, x, torch.tensor([4.0, -4.0, 1.0, 0.5]))]
    assert held.thinned(1, x).coords[:, 1].tolist() == [0, 8, 12]  # above 0.3


def test_training_a_keep_logit_towards_its_target_raises_it_there():
    logits = torch.zeros(4, requires_grad=True)
    wanted = torch.tensor([True, False, False, True])
    keep_loss(logits, wanted, torch.zeros(4, dtype=torch.int64), 1).backward()
    assert ((logits.grad < 0) == wanted).all()  # a step against the gradient raises what is to stay


def test_in_training_the_children_of_likely_voxels_stay():
    x, held = line(3, stride=4), guide(most=(9, 9)).train()
    held.seen = [Seen(COARSEST, x, torch.tensor([-6.0, -6.0, 6.0]))]
    made = Voxels(children(x), torch.zeros(len(children(x)), 8), 2, 1)
    stay = held.chosen(1, made)
    assert len(stay) == 9
    assert packed(torch.tensor([[0, 8, 0, 0]]))[0] in stay.keys  # the place of the likely voxel itself
    assert stay.coords[:, 1].min() >= 6  # none of the others'


# Selection


def test_a_scene_without_a_likely_voxel_keeps_its_best():
    chance = torch.tensor([0.1, 0.2, 0.9, 0.05, 0.04])
    scene = torch.tensor([0, 0, 1, 2, 2])
    assert ByText(0.7, 0.3).keep(COARSEST, chance, scene, 3).tolist() == [False, True, True, True, False]


def test_chance_keeps_its_share_of_each_scene_and_the_same_every_time():
    scene = torch.arange(3).repeat_interleave(torch.tensor([10, 4, 1]))
    rule, chance = ByChance(coarse=0.5, fine=0.2), torch.zeros(15)
    keep = rule.keep(COARSEST, chance, scene, 3)
    assert per_scene(scene[keep], 3).tolist() == [5, 2, 1]  # half of one voxel is one
    assert torch.equal(keep, rule.keep(COARSEST, chance, scene, 3))
    assert per_scene(scene[rule.keep(1, chance, scene, 3)], 3).tolist() == [2, 1, 1]


def test_at_the_finest_level_the_number_is_drawn_anew():
    x, held = line(3, stride=4), guide(most=(20, 20), fewest=4).train()
    held.seen = [Seen(1, x, torch.zeros(3))]
    made = Voxels(children(x), torch.zeros(len(children(x)), 8), 2, 1)
    counts = {len(held.chosen(0, made)) for _ in range(30)}
    assert len(counts) > 3
    assert min(counts) >= 4 and max(counts) < 20
    held.seen = [Seen(COARSEST, x, torch.zeros(3))]
    assert {len(held.chosen(1, made)) for _ in range(5)} == {20}


def test_sampling_draws_of_each_scene_and_leaves_small_ones_alone():
    x = line(7, scenes=3)
    assert per_scene(sampled(x, 5).scene, 3).tolist() == [5, 5, 5]
    assert sampled(x, 7) is x


# What the predictors learn


def test_keep_targets_are_cubes_around_centres_at_the_right_scenes():
    x = line(4, stride=4, scenes=2)  # centres at 0.2, 0.6, 1.0, 1.4 m
    target = torch.tensor([[0, 0.2, 0.2, 0.2, 9, 9, 9, 0], [1, 1.4, 0.2, 0.2, 0.1, 0.1, 0.1, 2.0]])
    wanted = keep_targets(x, 0.1, target, side=0.9)
    assert wanted.tolist() == [True, True, False, False, False, False, True, True]


def test_a_keep_loss_is_of_each_scene_over_its_positives_or_all():
    logits, scene = torch.zeros(5), torch.tensor([0, 0, 0, 1, 1])
    wanted = torch.tensor([True, False, False, False, False])
    right, wrong = float(focal(logits[:1], wanted[:1])), float(focal(logits[:1], ~wanted[:1]))
    assert float(keep_loss(logits, wanted, scene, 2)) == pytest.approx(((right + 2 * wrong) + (2 * wrong) / 2) / 2)


def test_completion_learns_the_voxels_nearest_to_the_target_alone():
    x = line(4, stride=4)
    target = torch.tensor([[0, 0.2, 0.2, 0.2, 1, 1, 1, 0], [0, 1.4, 0.2, 0.2, 1, 1, 1, 1.0]])
    logits = torch.zeros(4, requires_grad=True)
    completion_loss(logits, x, 0.1, target, nearest=2).backward()
    assert (logits.grad < 0).tolist() == [True, True, False, False]


# Completion


def test_only_likely_candidates_that_are_not_there_come_back():
    x = line(2)
    candidates = line(4)
    chance = torch.tensor([0.9, 0.1, 0.9, 0.1])
    assert completing(x, candidates, chance, 0.15).tolist() == [False, False, True, False]


@pytest.mark.parametrize(("bias", "count"), [(9.0, 4), (-9.0, 2)])
def test_completion_adds_all_that_are_likely_and_may_add_none(bias, count):
    held = guide(completion=Completion())
    torch.nn.init.constant_(held.predictors["completion"].bias, bias)
    words = Words(torch.randn(1, 3, 8), torch.zeros(1, 3, dtype=torch.bool))
    x = line(2, features=torch.ones(2, 8))
    done = held.completed(x, x, line(4, features=torch.randn(4, 8)), words)
    assert len(done) == count
    assert torch.equal(done.features[:2], x.features)  # what was there is as it was
    if count == 4:
        assert done.features[2:].any()


# A network


def pruned(**changes):
    return prune(tiny.trained("voxel network"), TSP3D(**{**TINY, **changes}), tiny.make_task("voxel network"))


@pytest.fixture(scope="module")
def done():
    return pruned()


def test_voxels_are_really_gone_in_use(done):
    task = tiny.make_task("voxel network")
    batch = next(iter(task.batches("val", 2)))
    with torch.no_grad():
        whole = len(batch.through(tiny.trained("voxel network")).scene)
        model = copy.deepcopy(done.model)
        torch.nn.init.constant_(model.guide.predictors["completion"].bias, -9.0)
        assert len(batch.through(model).scene) < whole
        for predictor in ("coarsest", "middle"):  # nothing is likely to be of use: one voxel a scene has children
            torch.nn.init.constant_(model.guide.predictors[predictor].bias, -99.0)
        answer = batch.through(model)
        assert [stay for stay, _ in model.guide.kept] == [2, 2]
        assert len(answer.scene) == 2 * 27
        assert answer.best().shape == (2, 6)
        for predictor in ("coarsest", "middle"):
            torch.nn.init.constant_(model.guide.predictors[predictor].bias, 99.0)
        assert len(batch.through(model).scene) == whole
        found = counted(model, model.guide, [batch])
    assert found == {"coarse": 1.0, "fine": 1.0, "there": whole / 2, "whole": whole / 2}


def test_two_passes_are_the_same_and_leave_the_generator_alone(done):
    batch = next(iter(tiny.make_task("voxel network").batches("val", 2)))
    with torch.no_grad():
        torch.manual_seed(1)
        first = batch.through(done.model)
        drawn = torch.rand(1)
        torch.manual_seed(1)
        assert torch.equal(drawn, torch.rand(1))
        torch.manual_seed(2)
        again = batch.through(done.model)
    assert torch.equal(first.scores, again.scores)
    assert torch.equal(first.boxes, again.boxes)


def test_a_scene_gets_the_same_answer_in_a_batch_and_alone(done):
    task = tiny.make_task("voxel network")
    both = next(iter(task.batches("val", 2)))
    with torch.no_grad():
        together = both.through(done.model).best()
        for number, batch in enumerate(replace(task, batch=1).batches("val", 2)):
            torch.testing.assert_close(batch.through(done.model).best()[0], together[number], rtol=1e-4, atol=1e-4)


def test_the_losses_of_the_predictors_fall_and_are_logged():
    history = pruned(steps=20).history
    for name in ("keep loss 2", "keep loss 1", "completion loss"):
        values = [value for _, value in history.curves[name]]
        assert sum(values[-5:]) < sum(values[:5])


def test_without_completion_there_is_no_second_predictor():
    model = pruned(steps=1, completion=None).model
    assert sorted(model.guide.predictors) == ["coarsest", "middle"]


def test_every_level_has_an_encoder_of_its_own(done):
    first, second = (done.model.guide.encoders[place] for place in ("coarsest", "middle"))
    assert not any(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))
    fresh = TextGuided(first, ByText(), None)
    assert all(torch.equal(v, fresh.encoders["middle"].state_dict()[k]) for k, v in first.state_dict().items())


def test_the_outcome_says_how_many_voxels_there_are(done):
    assert "No weight was removed" in done.notes[0]
    assert done.ledger.after.parameters > done.ledger.before.parameters  # the predictors


def test_a_network_can_be_copied_after_a_pass_with_gradients(done):
    batch = next(iter(tiny.make_task("voxel network").batches("val", 2)))
    batch.through(done.model)
    assert done.model.guide.seen
    assert copy.deepcopy(done.model).guide.seen == []


def test_a_guide_is_saved_and_built_again_with_its_edits(done, tmp_path):
    save(done.edits, tmp_path / "edits.safetensors")
    model = tiny.trained("voxel network")
    apply_(model, load(tmp_path / "edits.safetensors"))
    assert model.guide.settings() == done.model.guide.settings()
    rule = TextGuided(BiEncoder(8, 0.1, 1, 2, 8, 0.0), ByChance(0.2, 0.1), Completion(0.5)).settings()
    again = TextGuided(**rule)
    assert (again.selection, again.completion) == (ByChance(0.2, 0.1), Completion(0.5))


def test_a_pruned_network_is_saved_and_opened_and_answers_the_same(done, tmp_path):
    save_model(done, tiny.trained("voxel network"), tmp_path / "saved")
    again = load_model(tmp_path / "saved", build=tiny.voxel_network)
    batch = next(iter(tiny.make_task("voxel network").batches("val", 2)))
    with torch.no_grad():
        assert torch.equal(batch.through(again).scores, batch.through(done.model.eval()).scores)


def test_weights_of_the_network_can_be_pruned_by_other_methods():
    model, task = tiny.trained("voxel network"), tiny.make_task("voxel network")
    assert prune(model, Magnitude(sparsity=0.3), task).ledger.sparsity == pytest.approx(0.3, abs=0.01)


# What is refused


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": -1}, "steps are 0 or more"),
        ({"samples": (0, 5)}, "of one at least"),
        ({"most": (5,)}, "two numbers"),
        ({"fewest": 200}, "no number to draw"),
        ({"reach": 0.0}, "a side above 0"),
        ({"norm": 0.0}, "a norm is above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, says):
    with pytest.raises(SettingError, match=says):
        TSP3D(**{**TINY, **changes}).check()


def test_parts_that_cannot_be_are_refused():
    with pytest.raises(SettingError, match="thresholds"):
        ByText(1.0, 0.3)
    with pytest.raises(SettingError, match="shares"):
        ByChance(0.5, -0.1)
    with pytest.raises(SettingError, match="threshold is in"):
        Completion(1.0)
    with pytest.raises(SettingError, match="candidate"):
        Completion(0.1, 0)


def test_a_model_without_voxels_is_refused_before_training():
    with pytest.raises(ModelError, match="no network that walks"):
        prune(tiny.mlp(), TSP3D(**TINY), tiny.make_task("mlp"))


def test_a_task_that_does_not_say_where_objects_are_is_refused():
    task = tiny.make_task("voxel network")

    class Blind(type(task)):
        def _batch(self, held, place):
            return Batch(super()._batch(held, place).inputs, torch.zeros(2))

        def loss(self, model, batch):
            return batch.through(model).scores.sum()

    blind = Blind(task.name, task.splits)
    with pytest.raises(TaskError, match="scene, box and role"):
        prune(tiny.trained("voxel network"), TSP3D(**TINY), blind)
