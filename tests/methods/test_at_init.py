"""SNIP, GraSP and SynFlow: their scores by hand and by plain formulas, and what they refuse."""

import copy
import itertools
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from secateur.axes import Global, Uniform
from secateur.axes.growth import random_masks
from secateur.axes.probes import Given, Grasp, Snip, Synflow, balanced, hessian_gradient, masks_by
from secateur.axes.rules import Hold, LearningRate
from secateur.cut import weights
from secateur.errors import EvidenceError, ModelError, SettingError, SiteError
from secateur.method import Budget, load, prune
from secateur.task import Batch
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Adam
from secateur.train import fit

PROBES = [Snip(samples=32), Grasp(per_class=4), Synflow(rounds=5)]


class Bowl:
    """Half the squared distance of w . x from a number."""

    seed = 0

    def __init__(self, x, y):
        self.batch = Batch((torch.tensor([x]),), torch.tensor([[y]]))

    @property
    def example(self):
        return self.batch

    def batches(self, split, n=None, epoch=0):
        return [self.batch]

    def loss(self, model, batch):
        return 0.5 * (batch.through(model) - batch.target).square().sum()


def line(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def test_snip_by_hand():
    # w . x = 3, 2 too much: the gradient is 2 x = [2, 4], and |w g| = [6, 0]
    model = line(3.0, 0.0)
    found = Snip(1).read(model, weights(model), Bowl([1.0, 2.0], 1.0), 0.5).scores["weight"]
    assert found.tolist() == [[6.0, 0.0]]


def test_grasp_by_hand():
    # w . x = 3, 2 too much: g = 2 x, H = x x^T, H g = 2 |x|^2 x = [10, 20], w (H g) = [10, -20] with w = [1, -1]
    model = line(1.0, -1.0)
    found = Grasp(1, temperature=1.0).read(model, weights(model), Bowl([1.0, 2.0], -3.0), 0.5).scores["weight"]
    assert found.tolist() == [[10.0, -20.0]]  # the second goes: without it the gradient is larger


def test_synflow_by_hand():
    # two layers: |w2| |w1| from end to end, so that both weights of a path are worth the path
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 0.0]]))
        model[2].weight.copy_(torch.tensor([[-4.0, 5.0]]))
    found = Synflow(1).read(model, weights(model), Bowl([9.0, 9.0], 0.0), 0.5).scores
    assert torch.allclose(found["0.weight"] * 15, torch.tensor([[4.0, 8.0], [15.0, 0.0]], dtype=torch.float64))
    assert torch.allclose(found["2.weight"] * 15, torch.tensor([[12.0, 15.0]], dtype=torch.float64))


def test_hessian_times_gradient_is_the_slope_of_half_the_squared_gradient():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=draw, dtype=torch.float64) * 0.5)
    inputs, labels = torch.randn(12, 4, generator=draw, dtype=torch.float64), torch.arange(12) % 3

    def loss(batch):
        return nn.functional.cross_entropy(batch.through(model), batch.target)

    halves = [Batch((inputs[::2],), labels[::2]), Batch((inputs[1::2],), labels[1::2])]
    learnt = {"w": model[0].weight}
    (found,) = hessian_gradient(loss, learnt, halves)

    def steepness():
        whole = sum(torch.autograd.grad(loss(half), model[0].weight)[0] for half in halves)
        return 0.5 * float(whole.square().sum())

    for place in ((0, 0), (3, 2), (4, 1)):
        with torch.no_grad():
            model[0].weight[place] += 1e-5
            above = steepness_of(steepness)
            model[0].weight[place] -= 2e-5
            below = steepness_of(steepness)
            model[0].weight[place] += 1e-5
        assert (above - below) / 2e-5 == pytest.approx(float(found[place]), rel=1e-5)


def steepness_of(measure):
    with torch.enable_grad():
        return measure()


def test_removing_what_grasp_removes_keeps_the_gradient_larger_than_removing_the_opposite():
    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    scores = Grasp(per_class=16, temperature=1.0).read(model, sites, task, 0.3).scores

    def norm(sign):
        work = copy.deepcopy(model)
        for mask in masks_by(sites, {k: sign * v for k, v in scores.items()}, Global(), 0.1):
            mask.apply_(work)
        loss = sum(task.loss(work, half) for half in balanced(task, 16))
        return sum(float(g.square().sum()) for g in torch.autograd.grad(loss, list(work.parameters())))

    assert norm(1) > norm(-1)


def test_flow_through_every_layer_of_a_chain_is_the_same():
    layers = [nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 8, bias=False), nn.ReLU()]
    model = tiny.seeded(lambda: nn.Sequential(*layers, nn.Linear(8, 4, bias=False)), 0)
    found = Synflow(1).read(model, weights(model), tiny.toy_vectors(), 0.0).scores
    sums = [float(score.sum()) for score in found.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-9)


def test_synflow_leaves_a_path_where_snip_and_one_round_would_not():
    model, task = tiny.seeded(lambda: chain(16, 100, 100, 100, 4), 0), tiny.toy_vectors()
    sites = weights(model)
    kept = {
        rounds: [
            m.kept for m in masks_by(sites, Synflow(rounds).read(model, sites, task, 0.998).scores, Global(), 0.998)
        ]
        for rounds in (1, 100)
    }
    assert min(kept[100]) > 0
    assert min(kept[1]) < min(kept[100])


def chain(*widths):
    layers = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def test_synflow_says_where_its_theory_does_not_reach():
    curved = tiny.seeded(lambda: nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), 0)
    notes = Synflow(2).read(curved, weights(curved), tiny.toy_vectors(), 0.5).notes
    assert notes == ("synaptic flow is conserved where activations are homogeneous, and gelu is not",)
    assert Synflow(2).read(tiny.mlp(), weights(tiny.mlp()), tiny.toy_vectors(), 0.5).notes == ()
    tokens = tiny.make_model("decoder")
    assert any("tokens" in n for n in Synflow(1).read(tokens, weights(tokens), tiny.toy_text(), 0.5).notes)


@pytest.mark.parametrize("probe", PROBES, ids=lambda p: type(p).__name__)
def test_a_probe_leaves_the_model_as_it_was(probe):
    model = tiny.cnn()
    model.block1.eval()
    model.block2.train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    probe.read(model, weights(model), tiny.toy_images(), 0.5)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (model.training, model.block1.training, model.block2.training) == (False, False, True)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_snip_sees_batch_norms_as_training_does():
    model, task = tiny.cnn(), tiny.toy_images()
    sites = weights(model)
    found = Snip(32).read(model, sites, task, 0.5).scores["conv.weight"]
    work = copy.deepcopy(model).train()
    (batch,) = task.batches("calibration", 32)
    (slope,) = torch.autograd.grad(task.loss(work, batch), work.conv.weight)
    torch.testing.assert_close(found, 32 * (work.conv.weight * slope).abs().detach())


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, slope):
        return 2 * ctx.saved_tensors[0] * slope


class Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.fc2(Twice.apply(self.fc1(x)))


def test_an_operation_without_a_second_derivative_is_named():
    model = tiny.seeded(Fused, 0)
    with pytest.raises(ModelError, match=r"Fused were asked for[\s\S]*Twice has none[\s\S]*the probe snip"):
        Grasp(per_class=2).read(model, weights(model), tiny.toy_vectors(), 0.5)
    Snip(samples=8).read(model, weights(model), tiny.toy_vectors(), 0.5)


def test_fused_attention_runs_unfused_for_grasp_and_is_named_without_that():
    weight = torch.randn(1, 1, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def loss(batch):
        return nn.functional.scaled_dot_product_attention(weight, weight, weight).square().sum()

    with pytest.raises(ModelError, match="scaled_dot_product.*attention.* has none"):
        hessian_gradient(loss, {"w": weight}, [Batch((weight,))])
    model = tiny.make_model("vision transformer")
    Grasp(per_class=1).read(model, weights(model), tiny.toy_images(), 0.5)


def test_a_class_without_enough_examples_is_named():
    task = tiny.toy_vectors()
    x, y = task.splits["train"]
    short = replace(task, splits={**task.splits, "train": (x[y != 2], y[y != 2])})
    with pytest.raises(EvidenceError, match="class 2 has 0 in the training data"):
        Grasp().read(tiny.mlp(), weights(tiny.mlp()), short, 0.5)
    for half in balanced(task, 6):
        assert torch.bincount(half.target).tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("probe", PROBES[:2], ids=lambda p: type(p).__name__)
def test_gradients_that_are_not_numbers_or_not_there_are_named(probe):
    x, y = torch.full((64, 16), torch.nan), torch.arange(64) % 4
    broken = Labelled("broken", {"train": (x, y), "val": (x, y), "test": (x, y)}, samples=32)
    with pytest.raises(EvidenceError, match=r"0.weight was measured[\s\S]*NaN or infinity"):
        probe.read(tiny.mlp(), weights(tiny.mlp()), broken, 0.5)
    frozen = tiny.mlp()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(EvidenceError, match=r"2.weight was asked for[\s\S]*frozen"):
        probe.read(frozen, weights(frozen), tiny.toy_vectors(), 0.5)


def test_flow_that_overflows_is_named():
    model = tiny.mlp().double()
    with torch.no_grad():
        model[0].weight.fill_(1e200)
        model[2].weight.fill_(1e200)
    with pytest.raises(EvidenceError, match="synaptic flow of"):
        Synflow(2).read(model, weights(model), tiny.toy_vectors(), 0.5)


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow", "random_pruning", "granet", "rigl", "set"])
def test_tied_weights_are_one_site_and_stay_tied(name):
    model = tiny.seeded(lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 4)), 0)
    model[2].weight = model[0].weight
    kind = load(name)
    method = replace(kind(), **{**kind.tiny, "steps": 10})
    outcome = prune(model, method, tiny.toy_vectors())
    assert [mask.site.name for mask in outcome.edits] == ["0.weight", "3.weight"]
    assert outcome.model[0].weight is outcome.model[2].weight
    mask = outcome.edits[0]
    assert not bool(outcome.model[2].weight[~mask.keep].any())


@pytest.mark.parametrize("name", ["snip", "grasp", "synflow"])
def test_each_meets_its_sparsity_exactly_and_says_what_collapsed(name):
    kind = load(name)
    method = replace(kind(), **{**kind.tiny, "sparsity": 0.9, "steps": 5})
    outcome = prune(tiny.cnn(), method, tiny.toy_images())
    units = sum(mask.site.units for mask in outcome.edits)
    assert sum(mask.kept for mask in outcome.edits) == units - int(0.9 * units)
    assert outcome.ledger.units_removed == int(0.9 * units)
    spared = prune(tiny.cnn(), replace(method, allocation=Global(floor=0.002)), tiny.toy_images())
    assert min(mask.kept for mask in spared.edits) >= int(0.002 * units)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: prune(tiny.mlp(), load("snip")(steps=-1), None), "cannot be negative"),
        (lambda: Grasp(temperature=0.0), "logits are divided by it"),
        (lambda: Snip(0).read(tiny.mlp(), weights(tiny.mlp()), tiny.toy_vectors(), 0.5), "takes one at least"),
        (lambda: Synflow(0).read(tiny.mlp(), weights(tiny.mlp()), tiny.toy_vectors(), 0.5), "takes one at least"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make()


def test_what_a_probe_found_is_a_criterion_anywhere():
    from secateur.axes.rules import Gradual
    from secateur.axes.schedules import Schedule

    model, task = tiny.mlp(), tiny.toy_vectors()
    sites = weights(model)
    scores = Snip(32).read(model, sites, task, 0.5).scores
    ramp = Gradual(sites, Schedule(end=0.5, until=0.5, every=2), criterion=Given(scores), holder=Hold(sites))
    fit(model, task, 10, [ramp])
    wanted = masks_by(sites, scores, Uniform(), 0.5)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(ramp.masks(), wanted, strict=True))
    with pytest.raises(SiteError, match="none was given"):
        Given({}).score(sites[0], {}, None)


def test_each_beats_chance_spent_as_evenly():
    """On scikit-learn's digits at 97 %: ahead of a random mask with the same share everywhere."""
    from secateur.tasks.images import digits

    found = dict.fromkeys(("snip", "grasp", "synflow", "random"), 0.0)
    task = digits(flat=True, seed=0, learner=Adam(5e-3), batch=64)
    for name in found:
        model = tiny.seeded(lambda: chain(64, 100, 100, 10), 0)
        if name == "random":
            sites = weights(model)
            keep = random_masks(sites, Uniform().spread(sites, Budget(0.97)), 0)
            fit(model, task, 150, [LearningRate(), Hold(sites, keep)])
        else:
            load(name)(sparsity=0.97, steps=150).run(model, task)
        found[name] = task.measure(model, "test")["accuracy"]
    assert all(found[name] > found["random"] + 0.02 for name in ("snip", "grasp", "synflow")), found


def test_rounds_of_scoring_are_not_priced_as_trainings():
    from secateur.method import load

    assert load("synflow")(rounds=100, steps=30).training_steps() == 30
    assert load("lottery")(rounds=3, steps=30).training_steps() == 4 * 30
