"""Chains of packed convolutions: every variant against the layers one by one in float64, and what a trace finds."""

import copy
import operator
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import kernels
from secateur.chaining import chained
from secateur.errors import FormatError
from secateur.formats import DepthTaps, GroupCols, stretches
from secateur.formats import chain as chain_module
from secateur.formats.chain import ConvChain, Link, _around, _zeros
from secateur.formats.conv import ANY, SHAPES, SparseConv2d
from secateur.formats.planned import RELU, Plan
from secateur.models.resnet import resnet20


def conv(inputs, outputs, size=3, seed=0, **settings):
    """A convolution of whole numbers, three in five of them zero, so that sums are exact in any order."""
    made = torch.Generator().manual_seed(seed)
    layer = nn.Conv2d(inputs, outputs, size, **settings).requires_grad_(False)
    weight = torch.randint(-2, 3, layer.weight.shape, generator=made).float()
    layer.weight.copy_(weight * (torch.rand(weight.shape, generator=made) > 0.4))
    layer.bias.copy_(torch.randint(-2, 3, (outputs,), generator=made).float())
    return layer


def pictures(channels, high, wide, count=2, seed=9):
    made = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, (count, channels, high, wide), generator=made).float()


def reference(layers, links, outputs, *inputs):
    """What a chain should give, in float64."""
    values = [x.double() for x in inputs]
    for layer, link in zip(layers, links, strict=True):
        y = copy.deepcopy(layer).double()(values[link.source])
        if link.more is not None:
            more = values[link.more][..., :: link.step, :: link.step]
            y = y + F.pad(more, (0, 0, 0, 0, *link.around))
        values.append(y.clamp(*link.between))
    return [values[i].float() for i in outputs]


@pytest.mark.parametrize("rows", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("size", [(32, 32), (9, 16), (5, 8), (7, 13), (4, 64), (1, 1)])
def test_every_variant_adds_and_holds(size, rows):
    # A block with its shortcut, one that halves the picture, and a 1x1 with a sum of its own.
    layers = [
        conv(5, 17, padding=1),
        conv(17, 5, padding=1, seed=1),
        conv(5, 19, padding=1, stride=2, seed=2),
        conv(19, 19, 1, seed=3),
    ]
    links = [Link(0, None, between=RELU), Link(1, 0, between=(-9.0, 20.0)), Link(2, 2, 2, (3, 11)), Link(3, 3)]
    packed = [SparseConv2d.of(layer, GroupCols(rows)) for layer in layers]
    x = pictures(5, *size)
    outputs = [2, 4]
    wanted = reference(layers, links, outputs, x)
    for level in kernels.levels()[:3]:
        for threads in (1, 2):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with kernels.forced(level):
                    chain = ConvChain(packed, links, 1, outputs)
                    for found, want in zip(chain(x), wanted, strict=True):
                        assert torch.equal(found, want), (level, threads)
                    assert kernels.find("group_cols_conv_f32") is None or next(iter(chain._plans.values()))[0].possible
            finally:
                torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("size", [(16, 16), (40, 24), (19, 15)])
def test_sums_of_many_outputs_are_added_to_and_held(size, rows):
    """Where planes are whole kilobytes apart sums lie elsewhere, up to groups of 4, and otherwise in their place."""
    layers = [conv(5, 72, padding=1), conv(72, 72, 1, seed=1), conv(72, 72, padding=1, seed=2)]
    links = [Link(0, None, between=RELU), Link(1, 1), Link(2, 1, between=(-90.0, 200.0))]
    packed, x, outputs = [SparseConv2d.of(layer, GroupCols(rows)) for layer in layers], pictures(5, *size), [2, 3]
    wanted = reference(layers, links, outputs, x)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            for found, want in zip(ConvChain(packed, links, 1, outputs)(x), wanted, strict=True):
                assert torch.equal(found, want), level


@pytest.mark.parametrize("rows", [1, 4, 8])
@pytest.mark.parametrize("size", [(40, 45), (33, 30), (8, 8), (6, 7), (3, 3), (1, 40), (70, 3)])
@pytest.mark.parametrize(
    "settings",
    [
        {"size": 3, "padding": 1},
        {"size": 5, "padding": 2},
        {"size": 3, "padding": 2, "dilation": 2},
        {"size": (3, 1), "padding": (1, 0)},
        {"size": 3, "padding": 0},
        {"size": 4, "padding": 2},
    ],
    ids=str,
)
def test_values_with_zeros_around_them(settings, size, rows):
    """Several calls with other pictures, each of more pieces than one: what is between rows must stay zero."""
    if "(3" not in str(settings) and min(size) < 5:
        size = (max(5, size[0]), max(5, size[1]))
    layers = [
        conv(3, 9, seed=1, **settings),
        conv(9, 13, seed=2, **settings),
        conv(13, 13, padding=1, seed=3),
        conv(13, 7, padding=1, stride=2, seed=4),
        conv(7, 7, padding=1, seed=5),
    ]
    links = [
        Link(0, between=RELU),
        Link(1, between=(-50.0, 300.0)),
        Link(2, 2, between=RELU),
        Link(3),
        Link(4, 4, between=RELU),
    ]
    packed = [SparseConv2d.of(layer, GroupCols(rows)) for layer in layers]
    for level in kernels.levels()[:3]:
        for threads in (1, 3):
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            try:
                with kernels.forced(level):
                    chain = ConvChain(packed, links, 1, [5])
                    for seed in (1, 2):
                        x = pictures(3, *size, seed=seed)
                        assert torch.equal(chain(x), reference(layers, links, [5], x)[0]), (level, threads)
            finally:
                torch.set_num_threads(before)


# A few pictures at a time

COUNTS = {1: 7, 2: 8, 3: 49}
"""Pictures for so many threads: of 49 the last share is smaller."""


def few(monkeypatch, cache):
    """As if the second cache had so many bytes, and weights none, which would be read more often."""
    monkeypatch.setattr(stretches, "second_cache", lambda: cache)
    monkeypatch.setattr(
        chain_module, "Layer", lambda values, makes, weight: stretches.Layer(values, makes, weight // 1000)
    )


def at_a_time(chain):
    """How many pictures went through each stretch of the only plan, and how many layers it has."""
    ((plan,),) = chain._plans.values()
    structs = plan._structs[1]
    return [(s.count, s.together) for s in structs if isinstance(s, stretches.Stretch)]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("size", [(16, 16), (9, 16), (5, 8), (7, 13)])
@pytest.mark.parametrize("some", [1, 2])
@pytest.mark.parametrize("threads", COUNTS)
def test_a_few_pictures_at_a_time_give_the_same(monkeypatch, threads, some, size, rows):
    layers = [
        conv(5, 17, padding=1),
        conv(17, 17, padding=1, seed=1),
        conv(17, 17, padding=1, seed=2),
        conv(17, 19, padding=1, stride=2, seed=3),
        conv(19, 19, 1, seed=4),
        conv(19, 19, padding=1, seed=5),
    ]
    links = [
        Link(0, between=RELU),
        Link(1, 1, between=(-9.0, 90.0)),
        Link(2, 1, between=RELU),
        Link(3, 1, 2, (1, 1)),
        Link(4, 4),
        Link(5, 4, between=(-500.0, 500.0)),
    ]
    packed = [SparseConv2d.of(layer, GroupCols(rows)) for layer in layers]
    few(monkeypatch, some * 4 * 51 * size[0] * size[1] * 3 // 2)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for level in kernels.levels()[:3]:
            with kernels.forced(level):
                for outputs in ([6], [2, 6]):
                    chain = ConvChain(packed, links, 1, outputs)
                    for seed in (1, 2):
                        x = pictures(5, *size, count=COUNTS[threads], seed=seed)
                        found = chain(x) if len(outputs) > 1 else (chain(x),)
                        for y, want in zip(found, reference(layers, links, outputs, x), strict=True):
                            assert torch.equal(y, want), (level, outputs)
                    if kernels.find("conv_stretch") is not None:
                        assert at_a_time(chain)[0][1] == some
    finally:
        torch.set_num_threads(before)


def test_values_of_a_stretch_take_the_room_of_the_pictures_on_their_way(monkeypatch):
    layers = [conv(8, 8, padding=1, seed=seed) for seed in range(4)]
    packed = [SparseConv2d.of(layer, GroupCols(1)) for layer in layers]
    links = [Link(i) for i in range(4)]
    x = pictures(8, 16, 16, count=16)

    def room(cache):
        few(monkeypatch, cache)
        chain = ConvChain(packed, links, 1, [4])
        assert torch.equal(chain(x), reference(layers, links, [4], x)[0])
        ((plan,),) = chain._plans.values()
        return sum({t.data_ptr(): t.untyped_storage().nbytes() for t in plan._structs[2]}.values())

    if kernels.find("conv_stretch") is not None:
        assert room(2 * 8 * 16 * 16 * 4 * 3 // 2) < room(2**30) / 8


def test_what_is_not_finite_stays_in_its_picture(monkeypatch):
    layers = [conv(3, 4, padding=1), conv(4, 3, padding=1, seed=1)]
    packed = [SparseConv2d.of(layer, GroupCols(1)) for layer in layers]
    few(monkeypatch, 7 * 6 * 16 * 4 * 3 // 2)
    x = pictures(3, 6, 16, count=5)
    x[1, 1, 2, 3], x[3, 0, 4, 9] = float("nan"), float("inf")
    want = layers[1](F.relu(layers[0](x)))
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            chain = ConvChain(packed, [Link(0, between=RELU), Link(1)], 1, [2])
            torch.testing.assert_close(chain(x), want, equal_nan=True)
            assert kernels.find("conv_stretch") is None or at_a_time(chain) == [(2, 1)]


def test_how_many_pictures_go_through_a_layer_at_a_time(monkeypatch):
    monkeypatch.setattr(stretches, "second_cache", lambda: 400)  # of which 300 count
    large, small = stretches.Layer(300, 100, 10), stretches.Layer(30, 10, 1000)
    # 16 times 3 of what is made comes and goes, or the weight is read for every picture.
    assert stretches.at_once([large, large], 16, 1) == [1, 1]
    assert stretches.at_once([small, small], 16, 1) == [16, 16]
    # What the large ones hand on goes through memory, but what the small ones do not: 160 bytes fit.
    assert stretches.at_once([large, large, small, small], 16, 1) == [1, 1, 16, 16]
    # One thread would have two of three, or another none; of many more than there are threads it does not matter.
    assert stretches.at_once([large, large], 3, 2) == stretches.at_once([large, large], 3, 4) == [3, 3]
    assert stretches.at_once([large, large], 4, 2) == stretches.at_once([large, large], 17, 2) == [1, 1]
    assert stretches.at_once([large, large], 16, stretches.ROOMS + 1) == [16, 16]
    # Four of 75 bytes fit, and a weight is read a quarter as often.
    middle = stretches.Layer(75, 25, 40)
    assert stretches.at_once([middle, middle], 16, 1) == [4, 4]
    assert stretches.at_once([middle, middle], 16, 8) == [2, 2]
    assert stretches.at_once([middle, middle], 24, 3) == [4, 4]


def test_the_second_cache_is_known_or_guessed(monkeypatch, tmp_path):
    for name, level, size in (("index0", "1", "32K"), ("index1", "2", "512K"), ("index2", "3", "9000K")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "level").write_text(level + "\n")
        (tmp_path / name / "size").write_text(size + "\n")
    ask = stretches.second_cache.__wrapped__
    monkeypatch.setattr(stretches, "CACHES", tmp_path)
    assert ask() == 512 * 1024
    (tmp_path / "index1" / "size").write_text("much\n")
    assert ask() == stretches.UNKNOWN
    monkeypatch.setattr(stretches, "CACHES", tmp_path / "none")
    assert ask() == stretches.UNKNOWN


def test_a_value_keeps_the_zeros_of_what_it_is_made_from():
    """Its reader, which skips pixels, lays it out anew: the zeros are for the layer that makes it."""
    layers = [conv(3, 8, padding=1), conv(8, 8, padding=1, seed=1), conv(8, 6, padding=1, stride=2, seed=2)]
    layers[1].weight *= torch.rand(layers[1].weight.shape, generator=torch.Generator().manual_seed(3)) < 0.1
    links = [Link(0, between=RELU), Link(1, 1, between=RELU), Link(2)]
    packed = [SparseConv2d.of(layer, GroupCols(1)) for layer in layers]
    chain = ConvChain(packed, links, 1, [3])
    if kernels.find("group_cols_conv_f32") is not None:
        assert _around(chain, [layer.packed for layer in packed], [3]) == [0, 1, 1, 0]
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            chain = ConvChain(packed, links, 1, [3])
            for seed in (1, 2):
                x = pictures(3, 11, 14, seed=seed)
                assert torch.equal(chain(x), reference(layers, links, [3], x)[0]), level


@pytest.mark.parametrize(("loads", "elsewhere"), [(3, 1), (6, 1), (10, 0)])
def test_how_often_a_pixel_is_loaded_says_whether_it_lies_anew(loads, elsewhere):
    weight = torch.zeros(32, 4, 3, 3)
    weight[: 3 * loads, :, 0, 0] = 1  # of each of three copies of an input, so many loads
    conv = nn.Conv2d(4, 32, 3, padding=1, bias=False).requires_grad_(False)
    conv.weight.copy_(weight)
    layer = SparseConv2d.of(conv, GroupCols(1))
    for level in kernels.levels():
        with kernels.forced(level):
            wanted = int(loads == 3) if level == "avx512bf16" else elsewhere
            assert _zeros(layer, layer.packed) == wanted, level


def test_what_reads_without_gaps_gets_none():
    layers = [
        conv(3, 8, padding=1),
        conv(8, 8, padding=1, seed=1),
        conv(8, 8, 1, seed=2),
        conv(8, 8, padding=1, groups=8, seed=3),
        conv(8, 8, padding=1, seed=4),
    ]
    links = [Link(0), Link(1), Link(2, 1, between=RELU), Link(2, 2), Link(4, 3)]
    formats = [GroupCols(2), GroupCols(2), GroupCols(2), DepthTaps(), GroupCols(2)]
    packed = [SparseConv2d.of(layer, format) for layer, format in zip(layers, formats, strict=True)]
    x = pictures(3, 9, 11)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            chain = ConvChain(packed, links, 1, [3, 5])
            for found, want in zip(chain(x), reference(layers, links, [3, 5], x), strict=True):
                assert torch.equal(found, want), level


def test_depthwise_layers_are_links_too():
    layers = [conv(20, 20, padding=1, groups=20), conv(20, 20, padding=1, groups=20, stride=2, seed=1)]
    links = [Link(0, 0, between=RELU), Link(1, 1, 2)]
    packed = [SparseConv2d.of(layer, DepthTaps()) for layer in layers]
    x = pictures(20, 11, 33)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            assert torch.equal(ConvChain(packed, links, 1, [2])(x), reference(layers, links, [2], x)[0]), level


def test_what_is_not_finite_goes_through_sums_and_bounds():
    layers = [conv(3, 4, padding=1), conv(4, 3, padding=1, seed=1)]
    links = [Link(0, between=RELU), Link(1, 0, between=RELU)]
    packed = [SparseConv2d.of(layer, GroupCols(2)) for layer in layers]
    x = pictures(3, 6, 16, count=1)
    x[0, 1, 2, 3], x[0, 0, 4, 9] = float("nan"), float("inf")
    inner = F.relu(layers[0](x))
    want = F.relu(layers[1](inner) + x)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            torch.testing.assert_close(ConvChain(packed, links, 1, [2])(x), want, equal_nan=True)


def small():
    layers = [conv(3, 8, padding=1), conv(8, 8, padding=1, seed=1)]
    links = [Link(0, between=RELU), Link(1, 1)]
    return layers, links, ConvChain([SparseConv2d.of(layer, GroupCols(4)) for layer in layers], links, 1, [2])


def test_a_chain_answers_whatever_it_is_given():
    layers, links, chain = small()
    for size in range(3, 6 + SHAPES):  # more shapes than it keeps memory for, each twice
        for _ in range(2):
            x = pictures(3, size, 5)
            assert torch.equal(chain(x), reference(layers, links, [2], x)[0])
    assert len(chain._plans) <= SHAPES
    x = pictures(3, 6, 6)
    one = chain(x[0])
    assert torch.equal(one, chain(x)[0]), "one picture without a batch"
    assert torch.equal(chain(x.to(memory_format=torch.channels_last)), chain(x))
    assert chain(pictures(3, 6, 6, count=0)).shape == (0, 8, 6, 6)
    with torch.inference_mode():
        assert torch.equal(chain(x), reference(layers, links, [2], x)[0])
    with pytest.raises(FormatError, match="float64"):
        chain(x.double())
    with pytest.raises(FormatError, match=r"it takes torch.float32 \[pictures, 3"):
        chain(pictures(4, 6, 6))


def test_what_is_given_back_is_nobody_elses():
    _, _, chain = small()
    first = chain(pictures(3, 6, 6))
    kept = first.clone()
    chain(pictures(3, 6, 6, seed=1))
    assert torch.equal(first, kept)


def test_threads_may_call_at_once():
    layers, links, chain = small()
    inputs = [pictures(3, 12, 12, seed=i) for i in range(6)]
    wanted = [reference(layers, links, [2], x)[0] for x in inputs]
    wrong = []

    def call(i):
        wrong.extend(i for _ in range(40) if not torch.equal(chain(inputs[i]), wanted[i]))

    workers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_changed_weight_is_noticed():
    layers, links, chain = small()
    x = pictures(3, 6, 6)
    chain(x)
    other = SparseConv2d.of(conv(8, 8, padding=1, seed=7), GroupCols(4))
    chain.layers[1].load_state_dict(other.state_dict())
    layers[1] = conv(8, 8, padding=1, seed=7)
    assert torch.equal(chain(x), reference(layers, links, [2], x)[0])
    chain.layers[0].values.mul_(2)
    with pytest.raises(FormatError, match="changed after packing"):
        chain(x)


def test_a_copy_is_its_own():
    layers, links, chain = small()
    x = pictures(3, 6, 6)
    chain(x)
    twin = copy.deepcopy(chain)
    assert twin._plans == {}
    assert torch.equal(twin(x), reference(layers, links, [2], x)[0])


def test_a_gradient_reaches_the_input_of_a_chain():
    layers, _, chain = small()
    x = pictures(3, 6, 6).requires_grad_()
    chain(x).square().sum().backward()
    mine, x.grad = x.grad, None
    inner = F.relu(layers[0](x))
    (layers[1](inner) + inner).square().sum().backward()
    torch.testing.assert_close(mine, x.grad)


def test_without_kernels_layers_are_asked_one_by_one(monkeypatch):
    layers, links, chain = small()
    monkeypatch.setattr(kernels, "find", lambda name: None)
    x = pictures(3, 6, 6)
    torch.testing.assert_close(chain(x), reference(layers, links, [2], x)[0])
    assert torch.equal(chain(x), chain(x))


def test_export_sees_the_operators_of_the_layers():
    _, _, chain = small()
    x = pictures(3, 6, 6)
    program = torch.export.export(chain, (x,))
    targets = [str(node.target) for node in program.graph.nodes]
    assert sum("packed_conv2d" in target for target in targets) == 2
    torch.testing.assert_close(program.module()(x), chain(x))


# What a trace finds


def packed_(model):
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Conv2d:
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, SparseConv2d.of(layer, GroupCols(4)))
    return model


def test_a_residual_network_is_one_chain():
    model = resnet20().eval().requires_grad_(False)
    for module in model.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    want = model(x)
    found = chained(packed_(copy.deepcopy(model)))
    assert isinstance(found, ConvChain) and found.head is not None
    links = found.links
    assert len(links) == 19 and sum(link.more is not None for link in links) == 9
    assert [(link.step, link.around) for link in links if link.step > 1] == [(2, (8, 8)), (2, (16, 16))]
    torch.testing.assert_close(found(x), want, rtol=1e-4, atol=1e-4)
    assert not found.training


class Ends(nn.Module):
    """Two convolutions and an end."""

    def __init__(self, pool, features=9):
        super().__init__()
        self.one, self.two, self.pool = conv(3, 5, padding=1), conv(5, 9, padding=1, seed=1), pool
        self.head = nn.Linear(features, 4)

    def forward(self, x):
        return self.head(self.pool(F.relu(self.two(F.relu(self.one(x))))))


HEADS = {
    "mean": lambda y: y.mean((2, 3)),
    "mean of named axes": lambda y: torch.mean(y, dim=[-1, -2]),
    "kept axes": lambda y: y.mean((2, 3), keepdim=True).flatten(1),
    "pooled": lambda y: torch.flatten(F.adaptive_avg_pool2d(y, 1), 1),
    "modules": nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
}


@pytest.mark.parametrize("size", [(7, 5), (8, 32), (1, 1), (6, 17)])
@pytest.mark.parametrize("pool", HEADS.values(), ids=HEADS)
def test_a_network_that_ends_in_means_and_a_linear_layer_is_one_call(pool, size):
    model = Ends(pool).eval().requires_grad_(False)
    x = pictures(3, *size, count=3)
    want = copy.deepcopy(model).double()(x.double()).float()
    found = chained(packed_(copy.deepcopy(model)))
    assert isinstance(found, ConvChain)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            for _ in range(2):
                torch.testing.assert_close(found(x), want)
    strange = x.clone()
    strange[1, 0, 0, 0] = float("inf")
    torch.testing.assert_close(found(strange), model(strange), equal_nan=True)
    assert found(x[:0]).shape == (0, 4)


OTHERS = {
    "one axis": (lambda y: y.mean(2), 6),
    "axes without a flattening": (lambda y: y.mean((2, 3), keepdim=True), 1),
    "other axes": (lambda y: y.mean((1, 2)), 6),
    "larger pools": (lambda y: F.adaptive_avg_pool2d(y, 2).flatten(1), 36),
    "flattened from the start": (lambda y: F.adaptive_avg_pool2d(y, 1).flatten(0).view(-1, 9), 9),
    "a maximum": (lambda y: y.amax((2, 3)), 9),
    "another reader": (lambda y: y.mean((2, 3)) + y.sum((2, 3)), 9),
}


@pytest.mark.parametrize(("pool", "features"), OTHERS.values(), ids=OTHERS)
def test_other_ends_are_torchs(pool, features):
    model = Ends(pool, features).eval().requires_grad_(False)
    x = pictures(3, 6, 6)
    found = chained(packed_(copy.deepcopy(model)))
    assert found.get_submodule("chain_0").head is None
    torch.testing.assert_close(found(x), model(x))


def test_a_head_is_watched_and_learns():
    model = Ends(HEADS["mean"]).eval()
    x = pictures(3, 6, 6)
    found = chained(packed_(copy.deepcopy(model)))
    head = found.head
    with torch.no_grad():
        torch.testing.assert_close(found(x), model(x))
        head.weight.mul_(2)
        model.head.weight.mul_(2)
        torch.testing.assert_close(found(x), model(x))
        head.bias = nn.Parameter(torch.ones(4))
        model.head.bias = nn.Parameter(torch.ones(4))
        torch.testing.assert_close(found(x), model(x))
    found(x).sum().backward()
    model(x).sum().backward()
    torch.testing.assert_close(head.weight.grad, model.head.weight.grad)
    x.requires_grad_()
    found(x).sum().backward()
    kept, x.grad = x.grad, None
    model(x).sum().backward()
    torch.testing.assert_close(kept, x.grad)


class Between(nn.Module):
    """Two convolutions with something of torch's between them that needs the first, and a third that needs it not."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 3, padding=1), conv(3, 3, padding=1), conv(3, 3, padding=1, seed=3)

    def forward(self, x):
        y = self.one(x)
        other = self.three(x)
        return self.two(torch.sin(y)) + other, y


def test_a_head_that_was_exchanged_is_the_one_that_computes():
    model = Ends(HEADS["mean"]).eval().requires_grad_(False)
    x = pictures(3, 6, 6)
    found = chained(packed_(copy.deepcopy(model)))
    found(x)
    found.head = model.head = nn.Linear(9, 4).requires_grad_(False)
    torch.testing.assert_close(found(x), model(x))


class Alike(nn.Identity):
    """A module that is equal to all of its kind."""

    def __eq__(self, other):
        return isinstance(other, Alike)

    def __hash__(self):
        return 1


@pytest.mark.parametrize("other", [torch.ones(1), torch.ones(3), torch.ones(0), None, nn.Identity(), Alike()])
@pytest.mark.parametrize("name", ["one", "more", "none", "nothing", "module", "alike"])
def test_a_plan_holds_for_what_modules_have_and_nothing_else(name, other):
    held = {
        "one": torch.ones(1),
        "more": torch.ones(3),
        "none": torch.ones(0),
        "nothing": None,
        "module": nn.Identity(),
        "alike": Alike(),
    }
    plan = Plan(())
    plan.within({"first": torch.ones(2)})
    plan.within(held)
    assert plan.holds()
    before = held[name]
    held[name] = other
    assert plan.holds() == (other is before)
    held[name] = before
    assert plan.holds()
    held["another"] = None
    assert not plan.holds()


def test_what_needs_a_chain_from_outside_ends_it():
    model = Between()
    x = pictures(3, 8, 8)
    want = model(x)
    found = chained(packed_(copy.deepcopy(model)))
    chains = [m for m in found.modules() if isinstance(m, ConvChain)]
    assert [len(chain.links) for chain in chains] == [2, 1]  # one and three, then two with its sum
    assert chains[1].links[0].more is not None and chains[1].links[0].between == ANY
    for got, wanted in zip(found(x), want, strict=True):
        torch.testing.assert_close(got, wanted)


class Written(nn.Module):
    """What is written to after it was made, and read after that."""

    def __init__(self, how):
        super().__init__()
        self.one, self.two, self.how = conv(3, 3, padding=1), conv(3, 3, padding=1, seed=1), how

    def forward(self, x):
        y = self.one(x)
        self.how(y)
        return self.two(y)


@pytest.mark.parametrize(
    "how", [lambda y: F.relu(y, inplace=True), lambda y: y.mul_(2), lambda y: operator.setitem(y, 0, 1.0)]
)
def test_values_that_are_written_to_are_left_alone(how):
    model = packed_(Written(how))
    assert chained(model) is model


class Shared(nn.Module):
    """A shortcut through a module that hands on what it is given, written to before the convolution reads it."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.same, self.relu = conv(3, 3), conv(3, 3, seed=1), nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.one(x)
        return self.relu(self.same(y)), self.two(y)


def test_what_a_module_hands_on_is_the_same_value():
    model = packed_(Shared())
    assert chained(model) is model


class Named(nn.Module):
    """Convolutions called by keyword, and one that nothing reads."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = conv(3, 3, padding=1), conv(3, 3, seed=1), conv(3, 3, seed=2)

    def forward(self, x):
        y = F.relu(self.one(x))
        self.three(y)
        return self.two(input=y)


def test_calls_by_keyword_and_for_nothing_are_no_obstacle():
    model = packed_(Named())
    for layer in (model.one, model.two, model.three):
        layer.forward = (lambda inner: lambda input: inner(input))(layer.forward)
    x = pictures(3, 8, 8)
    torch.testing.assert_close(chained(model)(x), model(x))


def test_what_writes_to_its_own_is_a_link():
    model = packed_(nn.Sequential(conv(3, 4, padding=1), nn.ReLU(inplace=True), nn.Identity(), conv(4, 3), nn.ReLU6()))
    x = pictures(3, 8, 8)
    found = chained(model)
    assert [link.between for link in found.links] == [RELU, (0.0, 6.0)]
    torch.testing.assert_close(found(input=x), model(x))
    with pytest.raises(TypeError, match="ConvChain takes input, not y"):
        found(y=x)
    torch.testing.assert_close(found(x), model(x))


class Broadcast(nn.Module):
    """A sum with what is of another shape, which a trace does not show."""

    def __init__(self):
        super().__init__()
        self.one, self.two = conv(3, 4, padding=1), conv(4, 4, padding=1)

    def forward(self, x, scale):
        return self.two(self.one(x) + scale)


def test_a_sum_of_another_shape_is_torchs():
    model = packed_(Broadcast())
    x, scale = pictures(3, 8, 8), torch.arange(4.0).view(4, 1, 1).expand(1, 4, 1, 1).contiguous()
    found = chained(model)
    assert found is not model
    for _ in range(2):
        torch.testing.assert_close(found(x, scale), model(x, scale))


def test_a_model_that_cannot_be_traced_stays_as_it_is():
    class Asks(nn.Module):
        def __init__(self):
            super().__init__()
            self.one = conv(3, 3)

        def forward(self, x):
            return self.one(x) if x.sum() > 0 else x

    model = packed_(Asks())
    assert chained(model) is model
    whole = nn.Sequential(nn.Linear(3, 3))
    assert chained(whole) is whole
