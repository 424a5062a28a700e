"""Blocks that may leave, scores of them by hand, and shallower networks that train as well."""

import copy

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.probes import Grasp, Snip
from secateur.axes.residual import goes_round, removable_blocks, run_blocks
from secateur.axes.rewinding import Course
from secateur.cut import Passing, passing
from secateur.edit import Replace, apply_
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.method import prune
from secateur.methods.layer_lottery import (
    Activity,
    Chance,
    Divergence,
    FeatureRank,
    LayerLottery,
    MeanOf,
    Projection,
    Redrawn,
    Rewound,
    Signed,
    Size,
    SumOf,
    Unlikeness,
    bypassed,
    least_blocks,
    linear_cka,
    projection_importance,
    stages_of,
)
from secateur.task import Batch


class Deep(nn.Module):
    """Three residual blocks 8 wide, a strided convolution, three 16 wide: [batch, 3, 8, 8] -> [batch, 4]."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.first = nn.Sequential(*(tiny.Residual(8) for _ in range(3)))
        self.down, self.down_bn = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.second = nn.Sequential(*(tiny.Residual(16) for _ in range(3)))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = self.first(torch.relu(self.bn(self.conv(x))))
        x = self.second(torch.relu(self.down_bn(self.down(x))))
        return self.fc(x.mean(dim=(2, 3)))


def deep(seed=0):
    return tiny.seeded(Deep, seed)


class Plain(nn.Module):
    """A block without a shortcut."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


def blocks_in(model):
    return removable_blocks(model, tiny.make_task("cnn").example)[0]


def test_the_lowest_leave_and_no_stage_is_left_with_fewer_than_two_by_hand():
    stages, free = [0, 0, 0, 1, 1, 1], [False, True, True, True, True, True]
    # 4 and 3 are lowest, but a second of their stage would leave it with one: then 2
    assert least_blocks([0.0, 9.0, 3.0, 2.0, 1.0, 8.0], stages, free, 2, least=2) == [4, 2]
    assert least_blocks([0.0, 9.0, 3.0, 2.0, 1.0, 8.0], stages, free, 3, least=1) == [4, 3, 2]
    with pytest.raises(BudgetError) as caught:
        least_blocks([1.0] * 6, stages, free, 3, least=2)
    assert str(caught.value) == (
        "3 of 6 blocks were to be taken out, but 2 can be: 2 blocks stay in each of 2 stages, and those that change "
        "the shape do.\nAsk for a sparsity of at most 0.3333, or let fewer stay: least=1."
    )


def test_alike_features_by_hand():
    x = torch.tensor([[1.0], [-1.0], [0.0]])
    assert linear_cka(x, 3 * x + 5) == pytest.approx(1.0)  # scaled and shifted
    # centred: x.y = 1, |x|^2 = 2, |y|^2 = 2: 1 / (2 * 2)
    assert linear_cka(x, torch.tensor([[1.0], [0.0], [-1.0]])) == pytest.approx(0.25)


def test_which_blocks_may_leave_a_network():
    model = deep()
    ran, why = removable_blocks(model, tiny.make_task("cnn").example)
    assert [each.name for each in ran] == [f"{stage}.{i}" for stage in ("first", "second") for i in range(3)]
    assert stages_of(ran) == [0, 0, 0, 1, 1, 1]
    assert why == {"first.0": "it is the first block of the network"}


def test_a_block_that_changes_the_shape_stays_and_so_does_one_without_a_shortcut():
    from secateur.models.resnet import CifarResNet

    model = tiny.seeded(lambda: CifarResNet(14, width=4), 0)
    ran, why = removable_blocks(model, Batch((torch.zeros(2, 3, 32, 32),)))
    assert set(why) == {"layer1.0", "layer2.0", "layer3.0"}
    assert why["layer2.0"].startswith("it has no identity path: [2, 4, 32, 32] goes in and [2, 8, 16, 16]")
    assert stages_of(ran) == [0, 0, 1, 1, 2, 2]
    plain = tiny.seeded(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), Plain(), Plain(), nn.Flatten(), nn.Linear(512, 4)), 0)
    with pytest.raises(GraphError) as caught:
        LayerLottery().run(plain, tiny.make_task("cnn"))
    assert "with its weights at zero, nothing of what goes in comes out" in caught.value.found
    assert caught.value.do == "Use a network of residual blocks, or a method that takes out channels."
    (each,) = run_blocks(deep(), tiny.make_task("cnn").example, ["first.1"])
    assert goes_round(deep().first[1], each)


def test_to_bypass_a_block_is_to_take_it_out_and_norms_do_not_leak():
    # with its convolutions at zero a block still adds the shift of its last norm
    model, example = deep(), tiny.make_task("cnn").example
    with torch.no_grad():
        model.second[1].bn2.bias.fill_(0.7)
        with bypassed(model, "second.1"):
            left_out = example.through(model)
        gone = copy.deepcopy(model)
        apply_(gone, [Replace("second.1", passing(gone.second[1]))])
        assert torch.equal(left_out, example.through(gone))
        for conv in (model.second[1].conv1, model.second[1].conv2):
            conv.weight.zero_()
        assert not torch.allclose(left_out, example.through(model))


def test_signed_terms_before_a_norm_add_up_to_zero_and_grasps_to_the_squared_gradient():
    # L does not change with the scale of w, so that w . g = 0 and, differentiating it, w . (H g) = -|g of w|^2
    model, task = deep().double(), tiny.toy_images()
    from secateur.axes.probes import balanced, hessian_gradient
    from secateur.cut import weights

    sites = [site for site in weights(model) if site.name.startswith("second")]
    size = Snip(64)
    batches = [Batch((b.inputs[0].double(),), b.target) for b in balanced(task, 8)]
    model.train()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps = 1e-12
    learnt = {site.name: model.get_parameter(site.name) for site in sites}

    def loss(batch):
        return nn.functional.cross_entropy(batch.through(model), batch.target)

    product = hessian_gradient(loss, learnt, batches)
    slope = [sum(torch.autograd.grad(loss(b), p)[0] for b in batches) for p in learnt.values()]
    for weight, step, g in zip(learnt.values(), product, slope, strict=True):
        assert float((weight.detach() * g).sum()) == pytest.approx(0.0, abs=1e-9)
        assert float((weight.detach() * step).sum()) == pytest.approx(-float(g.square().sum()), rel=1e-6)
    # of a network as it is, with the norms' small eps: next to nothing beside the sizes
    signed = Signed(64).read(deep(), sites, task, 0.0).scores
    sizes = size.read(deep(), sites, task, 0.0).scores
    for site in sites:
        assert abs(float(signed[site.name].sum())) < 1e-2 * float(sizes[site.name].sum())


def test_a_block_that_does_nothing_is_the_first_to_leave():
    model, task = deep(), tiny.make_task("cnn")
    with torch.no_grad():
        for parameter in model.second[1].parameters():
            parameter.zero_()
    blocks = blocks_in(model)
    place = [each.name for each in blocks].index("second.1")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for score in (MeanOf(Snip(64)), SumOf(Snip(64)), Divergence(64), Unlikeness(64), Size()):
        found = score.score(model, blocks, task)
        assert found[place] == pytest.approx(0.0, abs=1e-9)
        assert min(v for i, v in enumerate(found) if i not in (0, place)) > found[place]
    for score in (MeanOf(), MeanOf(Grasp(4)), FeatureRank(32), Activity(32), Chance()):
        assert len(score.score(model, blocks, task)) == 6
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_features_of_many_columns_are_compared_by_their_rows():
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(12, width, generator=draw) for width in (5, 40))
    a, b = (v.double() - v.double().mean(0) for v in (x, y))
    plain = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert linear_cka(x, y) == pytest.approx(float(plain))
    tokens = x.reshape(3, 4, 5), y.reshape(3, 4, 40)
    assert linear_cka(*tokens) == pytest.approx(float(plain))  # a token is a row, not a part of one


class Talker(nn.Module):
    """Two residual blocks over tokens, whose answer is logits: [batch, tokens, classes]."""

    def __init__(self):
        super().__init__()
        self.first, self.second = tiny.seeded(Slide, 0), tiny.seeded(Slide, 1)

    def forward(self, x):
        return self.second(self.first(x))


class Slide(nn.Module):
    """A residual block over the last axis, 3 wide, with dropout."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3, bias=False))

    def forward(self, x):
        return x + self.inner(x)


def test_divergence_is_of_each_token_and_dropout_is_the_same_with_and_without_a_block():
    model = Talker()
    x = torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(2))

    class Spoken:
        name, seed, example = "spoken", 0, Batch((x,))

        def batches(self, split, n=None, epoch=0):
            return [Batch((x,))]

    with torch.no_grad():
        model.second.inner[1].weight.zero_()
    blocks = run_blocks(model, Batch((x,)), ["first", "second"])
    first, second = Divergence(6).score(model, blocks, Spoken())
    assert second == 0.0  # it does nothing, whatever dropout draws before it
    model.first.inner[0].p = 0.0
    first = Divergence(6).score(model, blocks, Spoken())[0]
    p, q = (v.double().log_softmax(-1) for v in (model.first(x), x))
    by_hand = (q.exp() * (q - p)).sum(-1).mean()
    assert first == pytest.approx(float(by_hand.detach()))


def test_a_cache_of_keys_and_values_is_not_in_the_way_of_blocks():
    model = tiny.make_model("decoder")
    model.config.use_cache = True
    model.set_attn_implementation("eager")  # a full cache would be longer than the mask
    example = tiny.make_task("decoder").example
    ran, why = removable_blocks(model, example)
    assert [each.name for each in ran if each.name not in why] == ["model.layers.1"]
    assert model.config.use_cache is True


def test_scores_that_cannot_be_made_are_refused():
    for score in (Signed, Divergence, Unlikeness, FeatureRank, Activity, Projection):
        with pytest.raises(SettingError, match="0 samples were asked for, but it takes 1 at least"):
            score(samples=0)
    pytest.importorskip("sklearn")
    with pytest.raises(SettingError, match="its examples have no label each"):
        LayerLottery(sparsity=0.5, least=0, steps=1, score=Projection(8)).run(
            tiny.make_model("decoder"), tiny.make_task("decoder")
        )


def test_size_ranks_stages_and_not_blocks():
    # wider layers start with smaller weights: whatever the seed, the wide stage leaves first
    for seed in range(3):
        found = Size().score(deep(seed), blocks_in(deep(seed)), tiny.make_task("cnn"))
        assert max(found[3:]) < min(found[:3])


def test_what_features_say_of_the_labels_is_their_importance_in_a_projection():
    pytest.importorskip("sklearn")
    draw, labels = torch.Generator().manual_seed(0), torch.arange(60) % 3
    noise = torch.randn(60, 2, generator=draw)
    features = torch.cat([labels[:, None] + 0.1 * noise[:, :1], noise[:, 1:]], 1)
    telling, idle = projection_importance(features, labels, 2).tolist()
    assert telling + idle == pytest.approx(2)  # 1 on the mean
    assert telling > 1.5
    model, task = deep(), tiny.make_task("cnn")
    found = Projection(64).score(model, blocks_in(model), task)
    assert 8 * sum(found[:3]) + 16 * sum(found[3:]) == pytest.approx(3 * 8 + 3 * 16)


@pytest.mark.parametrize("score", [MeanOf(Snip(64)), Chance()])
def test_what_is_left_is_shallower_and_says_what_left(score):
    task = tiny.make_task("cnn")
    done = prune(deep(), LayerLottery(sparsity=1 / 3, score=score, steps=5), task)
    gone = [edit.name for edit in done.edits if isinstance(edit, Replace)]
    assert len(gone) == 2
    assert sum(isinstance(m, Passing) for m in done.model.modules()) == 2
    assert sorted(next(n for n in done.notes if n.startswith("taken out: "))[11:].split(", ")) == gone
    assert done.ledger.after.flops < done.ledger.before.flops
    assert done.ledger.sparsity == pytest.approx(1 / 3)


def test_rewound_weights_train_as_they_did_and_from_the_step_gone_back_to():
    task, whole = tiny.make_task("cnn"), deep()
    Course(6, floor=0.0).train(whole, task)
    again = LayerLottery(sparsity=0.0, ticket=Rewound(0), steps=6).run(deep(), task)
    assert len(again.history.losses) == 12
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.model.parameters(), strict=True))
    later = LayerLottery(sparsity=0.0, ticket=Rewound(4), steps=6).run(deep(), task)
    assert len(later.history.losses) == 6 + 2
    fresh = LayerLottery(sparsity=0.0, ticket=Redrawn(), steps=6).run(deep(), task)
    assert not torch.equal(fresh.model.conv.weight, whole.conv.weight)
    assert any(note.startswith("the ticket wins: accuracy") for note in again.notes)  # it is the whole network's twin


def test_a_step_that_training_does_not_have_is_refused_before_it_starts():
    with pytest.raises(SettingError, match="rewinding to step 6 was asked for"):
        LayerLottery(ticket=Rewound(6), steps=6).check()
    with pytest.raises(SettingError, match="-1 blocks were to stay in each stage"):
        LayerLottery(least=-1).check()


def test_a_shallower_network_trains_as_well_on_toy_images():
    task, whole = tiny.make_task("cnn"), deep()
    Course(80, floor=0.0).train(whole, task)
    done = LayerLottery(sparsity=1 / 3, score=MeanOf(Snip(64)), steps=80).run(deep(), task)
    assert task.measure(done.model)["accuracy"] > task.measure(whole)["accuracy"] - 0.05


def test_resnet20_loses_blocks_before_training_and_is_saved_and_loaded(data, tmp_path):
    from secateur.models import load, open_model, save
    from secateur.tasks.images import cifar10

    opened = open_model("resnet20")
    task = cifar10(train_size=64, val_size=32, test_size=16, batch=32)
    done = prune(opened.model, LayerLottery(sparsity=2 / 9, score=MeanOf(Snip(32)), steps=2), task)
    folder = save(done, opened, tmp_path / "ticket")
    again = load(folder)
    x = task.example.inputs[0]
    with torch.no_grad():
        assert torch.equal(again(x), done.model.eval()(x))
    assert sum(isinstance(m, Passing) for m in again.modules()) == 2
