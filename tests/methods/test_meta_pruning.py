"""Meta pruning (paper 32): graphs and back exactly, a metanetwork that minds no order of channels, its training."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn
from torch.nn import functional as F

from secateur.axes.metanetwork import Metanetwork, gathered
from secateur.axes.network_graphs import graph_of, network_of, wiring
from secateur.edit import Mask, Remove, Update, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError
from secateur.graph import couple
from secateur.method import prune
from secateur.method import tiny as tinied
from secateur.methods.magnitude import Magnitude
from secateur.methods.meta_pruning import (
    Candidate,
    Grouped,
    Kept,
    MetaPruning,
    MetaTraining,
    Single,
    Trained,
    best,
    group_norms,
    meta_gradient,
    passed_,
    prune_groups_,
)
from secateur.models.resnet import CifarResNet
from secateur.outcome import count_flops
from secateur.site import Part, Site, tensors
from secateur.train import fit


class Projected(nn.Module):
    """A depthwise and a grouped convolution, a shortcut with a convolution, a concatenation."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.depthwise, self.pointwise = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.Conv2d(4, 6, 1)
        self.grouped = nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=2, bias=False)
        self.short, self.last = nn.Conv2d(4, 6, 1), nn.Linear(10, 2)

    def forward(self, x):
        x = F.relu(self.norm(self.first(x)))
        inner = self.grouped(self.pointwise(self.depthwise(x))) + self.short(x)
        return self.last(torch.cat([inner, x], 1).mean((2, 3)))


def awake(seed=0, **settings):
    """A metanetwork with a step large enough to be seen, its last layers of some size."""

    def make():
        made = Metanetwork(step=1.0, **settings)
        for head in (made.node_out, made.edge_out):
            head[-1].reset_parameters()
        return made

    return tiny.seeded(make, seed)


NETWORKS = {
    "mlp": tiny.mlp,
    "cnn": lambda: tiny.trained("cnn"),
    "resnet": lambda: tiny.seeded(lambda: CifarResNet(8, width=4), 1),
    "projected": lambda: tiny.seeded(Projected, 2),
}


# A network as a graph


@pytest.mark.parametrize("name", NETWORKS)
def test_to_a_graph_and_back_is_exact_and_leaves_nothing_out(name):
    model = NETWORKS[name]()
    wires, named = wiring(model), tensors(model)
    back = network_of(wires, *graph_of(wires, named), named)
    assert back.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(back[key], named[key]) for key in back)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in wires.layers)
    assert len(wires.source) == weights + (wires.shortcuts.stop - wires.shortcuts.start)


def test_a_small_graph_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                          nn.Linear(3, 2, bias=False))  # fmt: skip
    with torch.no_grad():
        model[0].weight.copy_(torch.arange(6.0).reshape(3, 2, 1, 1))
        model[0].bias.copy_(torch.tensor([7.0, 8.0, 9.0]))
        model[1].weight.fill_(2.0)
        model[1].running_mean.fill_(5.0)
        model[5].weight.copy_(torch.arange(10.0, 16.0).reshape(2, 3))
    wires = wiring(model)
    nodes, edges = graph_of(wires, tensors(model))
    assert wires.nodes == 2 + 3 + 2
    assert nodes[:2].tolist() == [[1, 0, 0, 1, 0]] * 2  # inputs
    assert nodes[3].tolist() == [2, 0, 5, 1, 8]
    assert nodes[5].tolist() == [1, 0, 0, 1, 0]
    pairs = list(zip(wires.source.tolist(), wires.target.tolist(), edges[:, 4].tolist(), strict=True))
    assert pairs[:6] == [(0, 2, 0), (1, 2, 1), (0, 3, 2), (1, 3, 3), (0, 4, 4), (1, 4, 5)]
    assert pairs[6:] == [(2, 5, 10), (3, 5, 11), (4, 5, 12), (2, 6, 13), (3, 6, 14), (4, 6, 15)]
    assert float(edges.abs().sum()) == float(edges[:, 4].abs().sum())  # a 1x1 kernel stands in the middle


def test_the_last_layer_does_not_come_back_transposed():
    model = nn.Sequential(nn.Linear(3, 3, bias=False))
    wires, named = wiring(model), tensors(model)
    nodes, edges = graph_of(wires, named)
    back = network_of(wires, nodes, edges, named)["0.weight"]
    assert torch.equal(back, model[0].weight)
    assert not torch.equal(back, model[0].weight.T)
    assert float(edges[1, 4]) == float(model[0].weight[0, 1].detach())  # from the second input to the first output


def test_shortcuts_are_diagonals_and_padded_channels_have_none():
    wires = wiring(CifarResNet(8, width=4))
    short = list(zip(wires.source[wires.shortcuts].tolist(), wires.target[wires.shortcuts].tolist(), strict=True))
    made = {layer.name: layer.nodes.tolist() for layer in wires.layers}
    first = [(made["conv1"][c], made["layer1.0.conv2"][c]) for c in range(4)]
    widened = [(made["layer1.0.conv2"][c], made["layer2.0.conv2"][c + 2]) for c in range(4)]
    assert short[:4] == first
    assert short[4:8] == widened
    projected = wiring(Projected())
    nodes = {layer.name: layer.nodes.tolist() for layer in projected.layers}
    assert set(
        zip(projected.source[projected.shortcuts].tolist(), projected.target[projected.shortcuts].tolist(), strict=True)
    ) == set(zip(nodes["grouped"], nodes["short"], strict=True))
    _, edges = graph_of(wires, tensors(CifarResNet(8, width=4)))
    assert edges[wires.shortcuts].sum(1).tolist() == [1.0] * len(short)


def test_depthwise_and_grouped_layers_have_sparse_edges():
    wires = wiring(Projected())
    layers = {layer.name: layer for layer in wires.layers}
    depthwise = layers["depthwise"]
    assert wires.source[depthwise.edges].tolist() == layers["first"].nodes.tolist()
    grouped = layers["grouped"]
    made = layers["pointwise"].nodes.tolist()
    assert wires.source[grouped.edges].tolist() == made[:3] * 3 + made[3:] * 3
    assert grouped.places.tolist() == [1, 4, 7]  # a 3x1 kernel is a column


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (nn.Sequential(nn.Conv2d(3, 4, 5)), "0 (Conv2d) was to become part of a graph, but its kernels are 5x5"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 2)), "it reads 64 values of 4 channels"),
        (nn.Sequential(nn.ConvTranspose2d(3, 4, 3)), "0 (ConvTranspose2d)"),
        (nn.Sequential(nn.LSTM(3, 4)), "0 (LSTM)"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3)), "what it norms is not what one layer has just made"),
    ],
)
def test_what_is_no_graph_is_named(model, says):
    with pytest.raises(GraphError) as caught:
        wiring(model)
    assert says in str(caught.value)
    assert "Give a network of" in caught.value.do or "give a network of" in caught.value.do


def test_operations_that_have_no_place_in_a_graph_are_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x):
            return torch.fft.fft(self.a(x)).real

    with pytest.raises(GraphError, match="its forward calls fft_fft, which has no place in one"):
        wiring(Odd())


# The metanetwork


def test_what_comes_to_a_node_by_hand():
    found = gathered(torch.tensor([[1.0], [3.0], [7.0]]), torch.tensor([2, 2, 0]), 3)
    assert found[2].tolist() == pytest.approx([2, 1, 3, 1], abs=1e-4)
    assert found[0].tolist() == pytest.approx([7, 0, 7, 7], abs=1e-3)
    assert found[1].tolist() == pytest.approx([0, 0, 0, 0], abs=1e-3)


def test_channels_in_another_order_come_out_in_that_order():
    model = tiny.trained("cnn").double()
    metanetwork = awake().double()
    with torch.no_grad():
        for p in metanetwork.parameters():
            p.mul_(2.0)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    turned = copy.deepcopy(model)
    with torch.no_grad():  # the inner channels of the first block
        turned.block1.conv1.weight.copy_(model.block1.conv1.weight[order])
        turned.block1.conv2.weight.copy_(model.block1.conv2.weight[:, order])
        for key in ("weight", "bias", "running_mean", "running_var"):
            getattr(turned.block1.bn1, key).copy_(getattr(model.block1.bn1, key)[order])
    with torch.no_grad():
        plain = metanetwork.changed(wiring(model), tensors(model))
        moved = metanetwork.changed(wiring(turned), tensors(turned))
    torch.testing.assert_close(moved["block1.conv1.weight"], plain["block1.conv1.weight"][order])
    torch.testing.assert_close(moved["block1.conv2.weight"], plain["block1.conv2.weight"][:, order])
    torch.testing.assert_close(moved["block1.bn1.bias"], plain["block1.bn1.bias"][order])
    torch.testing.assert_close(moved["fc.weight"], plain["fc.weight"])
    assert float((plain["block1.conv1.weight"] - model.block1.conv1.weight).abs().max()) > 1e-2


def test_at_first_a_network_comes_out_as_it_went_in():
    model = tiny.trained("cnn")
    changed = Metanetwork().changed(wiring(model), tensors(model))
    assert all(torch.equal(v, tensors(model)[k]) for k, v in changed.items())


def test_running_statistics_are_seen_and_not_changed():
    model, metanetwork = tiny.trained("cnn"), awake()
    before = {k: v.clone() for k, v in model.named_buffers()}
    plain = metanetwork.changed(wiring(model), tensors(model))["conv.weight"]
    edits = passed_(model, metanetwork)
    assert all(isinstance(e, Update) for e in edits)
    assert {e.name for e in edits} == {name for name, _ in model.named_parameters()}
    assert all(torch.equal(v, before[k]) for k, v in model.named_buffers())
    other = tiny.trained("cnn")
    other.bn.running_mean += 1.0
    assert not torch.equal(metanetwork.changed(wiring(other), tensors(other))["conv.weight"], plain)


def test_one_metanetwork_takes_networks_of_any_size_and_kernels_of_its_own():
    metanetwork = awake()
    for make in NETWORKS.values():
        model = make()
        changed = metanetwork.changed(wiring(model), tensors(model))
        assert all(v.shape == tensors(model)[k].shape and bool(v.isfinite().all()) for k, v in changed.items())
    with pytest.raises(ModelError, match="edges of 5x5 was given"):
        metanetwork.changed(wiring(tiny.mlp(), side=5), tensors(tiny.mlp()))
    passed_(nn.Sequential(nn.Conv2d(1, 2, 5)), awake(side=5))


def test_a_kept_metanetwork_is_the_same(tmp_path):
    metanetwork = awake(hidden=8, layers=2)
    metanetwork.save(tmp_path / "meta.safetensors")
    again = Metanetwork.load(tmp_path / "meta.safetensors")
    model = tiny.mlp()
    first, second = (m.changed(wiring(model), tensors(model)) for m in (metanetwork, again))
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert [p.name for p in tmp_path.iterdir()] == ["meta.safetensors"]
    (tmp_path / "other").write_text("nothing")
    with pytest.raises(ModelError, match="it is none"):
        Metanetwork.load(tmp_path / "other")


# What it is trained for


def two_layers():
    """A group of two units that own a row of one matrix, a column of another and a bias."""
    parts = (
        Part("a", (2, 2), torch.tensor([[0], [1]])),
        Part("b", (1, 2), torch.tensor([[0, 1]])),
        Part("c.bias", (2,), torch.tensor([0, 1])),
    )
    site = Site("group", "channel", (2,), parts)
    named = {
        "a": torch.tensor([[3.0, 4.0], [1.0, 0.0]]),
        "b": torch.tensor([[5.0, 1.0]]),
        "c.bias": torch.tensor([9.0, 9.0]),
    }
    return site, named


def test_norms_and_pull_of_a_group_by_hand():
    site, named = two_layers()
    # (25 + 25) / 2 and (1 + 1) / 2, the larger made 1; biases do not count
    norm = group_norms(site, named)
    assert norm.tolist() == pytest.approx([1.0, math.sqrt(1 / 25)])
    pull = Grouped(alpha=16.0).gradients([site], named)
    assert pull.keys() == {"a", "b"}
    torch.testing.assert_close(pull["a"], torch.tensor([[3.0, 4.0], [16.0, 0.0]]))
    torch.testing.assert_close(pull["b"], torch.tensor([[5.0, 16.0]]))
    assert Single().gradients([site], named)["a"].tolist() == [[1, 1], [1, 0]]


def test_a_group_of_equal_norms_is_left_alone():
    site, named = two_layers()
    assert Grouped().gradients([site], {name: torch.ones_like(value) for name, value in named.items()}) == {}


def test_the_metanetworks_gradient_is_that_of_the_loss_and_the_pull():
    model, task = tiny.trained("mlp").double(), tiny.toy_vectors()
    metanetwork = awake(hidden=4, layers=1).double()
    wires, sites = wiring(model), couple(tiny.trained("mlp"), task.example).of("channel")
    held = [b.to("cpu") for b in list(task.batches("val"))[:2]]
    held = [type(b)((b.inputs[0].double(),), b.target) for b in held]
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loss = meta_gradient(metanetwork, wires, model, sites, task, held, Single(), 0.01)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    ours = [p.grad.clone() for p in metanetwork.parameters()]
    # by the chain rule in one go: the sign's pull is the gradient of the sum of sizes
    changed = metanetwork.changed(wires, tensors(model))
    answers = [F.linear(b.inputs[0], changed["0.weight"], changed["0.bias"]).relu() for b in held]
    answers = [F.linear(a, changed["2.weight"], changed["2.bias"]).relu() for a in answers]
    answers = [F.linear(a, changed["4.weight"], changed["4.bias"]) for a in answers]
    value = sum(F.cross_entropy(a, b.target) for a, b in zip(answers, held, strict=True)) / 2
    whole = value + 0.01 * sum(v.abs().sum() for v in changed.values() if v.dim() > 1)
    theirs = torch.autograd.grad(whole, list(metanetwork.parameters()))
    assert loss == pytest.approx(float(value.detach()), rel=1e-5)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-3)  # the loss is taken in float32


def test_more_batches_do_not_change_the_balance():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    wires, held = wiring(model), list(task.batches("val"))[:1]
    found = []
    for batches in (held, held * 3):
        metanetwork = awake(hidden=4, layers=1)
        meta_gradient(metanetwork, wires, model, [], task, batches, Single(), 0.1)
        found.append([p.grad for p in metanetwork.parameters()])
    for once, thrice in zip(*found, strict=True):
        torch.testing.assert_close(once, thrice, atol=1e-5, rtol=1e-4)


def test_the_state_that_leaves_most_of_validation_is_taken():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    metanetwork = Metanetwork(hidden=4, layers=1)
    calm = {k: torch.zeros_like(v) for k, v in metanetwork.state_dict().items()}
    wild = {k: v.clone() for k, v in calm.items()}
    wild["edge_out.3.bias"] = torch.full_like(wild["edge_out.3.bias"], 1e3)
    step, quality = best(metanetwork, [Candidate(1, wild), Candidate(2, calm)], model, task, 0.3)
    assert step == 2
    assert quality > 0.8
    assert all(torch.equal(v, calm[k]) for k, v in metanetwork.state_dict().items())


# Using it


def test_groups_go_until_the_work_has():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    before = count_flops(model, task.example)
    fresh = copy.deepcopy(model)
    edits, notes = prune_groups_(model, task.example, 0.4, share=0.02)
    apply_(fresh, edits)  # at once what went bit by bit
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), fresh.parameters(), strict=True))
    left = count_flops(model, task.example) / before
    assert 0.5 < left <= 0.6
    assert all(isinstance(e, Remove) for e in edits)
    assert notes[0] == (
        f"{1 - left:.1%} of the multiply-adds are gone, {1 / left:.2f} times fewer; 40.0% were asked for"
    )
    assert bool(model(task.example.inputs[0]).isfinite().all())


def test_more_than_can_go_is_refused():
    with pytest.raises(BudgetError, match="one channel being left at each of"):
        prune_groups_(tiny.mlp(), tiny.toy_vectors().example, 0.999, share=0.2)


def test_any_method_can_prune_what_comes_out_and_its_zeros_stay():
    method = tinied(MetaPruning, around=Magnitude(sparsity=0.6))
    done = prune(tiny.trained("mlp"), method, tiny.toy_vectors())
    masks = [e for e in done.edits if isinstance(e, Mask)]
    assert len(masks) == 3
    for mask in masks:
        value = mask.site.parts[0].read(tensors(done.model))
        assert bool((value[~mask.keep] == 0).all())
    assert done.ledger.sparsity == pytest.approx(0.6, abs=1e-3)


def test_kernels_as_large_as_the_metanetwork_takes_are_taken(tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 6, 5, padding=2), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.AdaptiveAvgPool2d(1),
                            nn.Flatten(), nn.Linear(6, 4))  # fmt: skip
    with pytest.raises(GraphError, match="its kernels are 5x5, and an edge has room for 3x3"):
        tinied(MetaPruning).run(copy.deepcopy(net), tiny.toy_images())
    awake(side=5, hidden=4, layers=1).save(tmp_path / "five.safetensors")
    training = MetaTraining(networks=1, first=2, steps=1, batches=1, hidden=4, layers=1, looks=1, side=5)
    for source in (Trained(training), Kept(str(tmp_path / "five.safetensors"))):
        before = copy.deepcopy(net)
        done = tinied(MetaPruning, source=source).run(before, tiny.toy_images())
        assert done.edits[0].name == "0.weight"


def test_its_price_counts_what_the_metanetwork_takes():
    training = MetaTraining(networks=3, first=100, steps=10, batches=2)
    assert MetaPruning(source=Trained(training), settle=5, tune=7).training_steps() == 3 * (100 + 20) + 12
    assert MetaPruning(source=Kept("x"), settle=5, tune=7).training_steps() == 12
    assert MetaPruning(source=Kept("x"), settle=5, tune=7, around=Magnitude()).training_steps() == 12


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"flops": 1.0}, "a flops is the fraction removed"),
        ({"share": 0.0}, "it is a share in"),
        ({"settle": -1}, "a count cannot be negative"),
        ({"source": Kept()}, "no file is named"),
        ({"around": Magnitude(), "protect": ("0",)}, "it is the other method that prunes"),
        ({"source": Trained(MetaTraining(networks=0))}, "one is the least"),
        ({"source": Trained(MetaTraining(side=4))}, "kernels have a middle"),
        ({"source": Trained(MetaTraining(rate=0.0))}, "it is above 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        MetaPruning(**settings).check()


def test_a_kept_metanetwork_is_read_and_refused_before_any_data_is(tmp_path):
    path = tmp_path / "meta.safetensors"
    with pytest.raises(ModelError, match=f"(?s)was to be read from {path}.*it is none"):
        MetaPruning(source=Kept(str(path))).check()
    Metanetwork(hidden=4, layers=1).save(path)
    method = MetaPruning(source=Kept(str(path)), flops=0.1, settle=0, tune=0)
    method.check()
    path.unlink()  # run opens no file
    done = prune(tiny.mlp(), method, tiny.toy_vectors())
    assert done.notes[0] == f"the metanetwork is that of {path}"
    assert MetaPruning(source=Kept(str(path))) == MetaPruning(source=Kept(str(path)))


def test_what_comes_out_has_weaker_groups_and_is_ahead_where_most_goes():
    """At toy size: an MLP on clusters, a metanetwork trained on three others, 87 % of the multiply-adds taken out."""
    task, model = tiny.toy_vectors(), tiny.trained("mlp")
    training = MetaTraining(networks=3, first=150, steps=15, batches=2, layers=2, looks=1, strength=0.1)
    metanetwork, _, history = training.train(training.seen(model, task), task)
    assert len(history.losses) == 45

    def weak(network):
        named = tensors(network)
        norms = torch.cat([group_norms(s, named) for s in couple(network, task.example).of("channel")])
        return float(norms.quantile(0.25))

    passed, plain = copy.deepcopy(model), copy.deepcopy(model)
    passed_(passed, metanetwork)
    for network in (passed, plain):
        fit(network, task, 24, epoch=50)
    assert weak(passed) < 0.7 * weak(plain)
    assert task.measure(passed, "test")["accuracy"] > 0.95
    for network in (passed, plain):
        prune_groups_(network, task.example, 0.87, share=0.02)
    assert task.measure(passed, "test")["accuracy"] > task.measure(plain, "test")["accuracy"] + 0.08


@pytest.mark.parametrize("name", ["resnet20", "resnet56"])
def test_trained_residual_networks_of_the_pack_become_graphs_and_back(name, data):
    from secateur.models import open_model

    model = open_model(name).model
    wires, named = wiring(model), tensors(model)
    nodes, edges = graph_of(wires, named)
    back = network_of(wires, nodes, edges, named)
    assert back.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(back[key], named[key]) for key in back)
    assert len(edges) > 29_000
    if name == "resnet20":  # a metanetwork trained on small networks takes it too
        passed_(model, Metanetwork(hidden=4, layers=1))
        assert bool(model(torch.zeros(1, 3, 32, 32)).isfinite().all())


def test_a_residual_network_of_the_pack_is_pruned_with_a_kept_metanetwork(data, tmp_path):
    from secateur.models import open_model
    from secateur.tasks.images import cifar10
    from secateur.tasks.learners import Sgd

    task = cifar10(train_size=32, val_size=16, test_size=64, batch=16, learner=Sgd(0.001))
    Metanetwork(hidden=4, layers=1).save(tmp_path / "meta.safetensors")
    method = MetaPruning(source=Kept(str(tmp_path / "meta.safetensors")), flops=0.1, share=0.03, settle=1, tune=1)
    done = prune(open_model("resnet20").model, method, task)
    assert done.ledger.after.flops <= 0.9 * done.ledger.before.flops
    assert done.ledger.after.parameters < done.ledger.before.parameters
    assert done.notes[0] == f"the metanetwork is that of {tmp_path / 'meta.safetensors'}"
    assert bool(done.model.eval()(task.example.inputs[0]).isfinite().all())


def test_the_tool_trains_once_and_keeps(data, tmp_path, monkeypatch):
    from tools.train_metanetwork import SETTINGS, metanetwork

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    small = {"width": 4, "images": 64, "networks": 1, "first": 1, "passes": 1, "batches": 1}
    made, took = metanetwork({**SETTINGS, **small})
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".safetensors"]
    assert max(p.stat().st_size for p in tmp_path.iterdir()) < 200_000
    again, told = metanetwork({**SETTINGS, **small})
    assert told == took
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in made.state_dict().items())
