"""Layers chosen by what was measured: the same answers, dense where sparse loses, and a table that says why."""

import io
import json
import sys

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console
from torch import nn
from torch.nn.utils import prune

from secateur import accelerate as front
from secateur import candidates, kernels
from secateur.accelerate import Accelerated, Choice, Trial, accelerate, break_even, memory_speed
from secateur.cli import bench, main
from secateur.cli.terminal import Terminal
from secateur.errors import FormatError, SettingError
from secateur.formats import Bitmap, BitmapInt8, DepthTaps, GroupCols, KBlocked
from secateur.formats.chain import ConvChain
from secateur.formats.conv import SparseConv2d
from secateur.formats.linear import SparseLinear, SparsePointwise
from secateur.formats.linear_chain import LinearChain

MODULE = sys.modules[accelerate.__module__]  # the package's name of it is the function
X = torch.randn(1, 256, generator=torch.Generator().manual_seed(0))


class Slow(nn.Module):
    """Layers of which one is dense, one has many zeros, one is not reached, and one stands in two places."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.full, self.thin, self.idle = nn.Linear(256, 256), nn.Linear(256, 512, bias=False), nn.Linear(4, 4)
        self.again = self.thin
        with torch.no_grad():
            self.thin.weight[torch.rand(512, 256, generator=torch.Generator().manual_seed(1)) < 0.97] = 0
            self.idle.weight.zero_()

    def forward(self, x):
        return self.again(self.full(x)) + self.thin(x)


class Clock:
    """Time as it is told: each call takes what its storage costs. A packed one carries its layer as a default."""

    def __init__(self, cost):
        self.cost = cost

    def __call__(self, turns, rounds):
        layers = [(call.__defaults__ or (None,))[-1] for turn in turns for call in turn]
        return [self.cost[isinstance(layer, (SparseLinear, SparseConv2d, SparsePointwise))] for layer in layers]


@pytest.fixture
def cost(monkeypatch):
    """Decides the race: seconds of a dense call, and of a packed one."""

    def decide(dense, packed):
        monkeypatch.setattr(MODULE, "_medians", Clock([dense, packed]))

    return decide


def test_what_wins_is_packed_and_answers_the_same(cost, monkeypatch):
    cost(2.0, 1.0)
    model = Slow()
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    found = accelerate(model, X)
    assert {c.layer: c.chosen for c in found.choices} == {"full": "dense", "thin": "bitmap", "idle": "dense"}
    assert {c.layer: c.why for c in found.choices} == {
        "full": "0% of it is zero, and below 15% no format is faster",
        "thin": "2.00 times as fast as dense",
        "idle": "the example does not reach it",
    }
    assert found.choices[1].trials[0] == Trial("dense", 2000.0, 512 * 256 * 4)
    chain = next(module for module in found.model.modules() if isinstance(module, LinearChain))
    assert [type(layer) for layer in chain.layers] == [SparseLinear] * 2 and chain.layers[0] is chain.layers[1]
    assert isinstance(model.thin, nn.Linear)  # the caller's is as it was
    assert not any(p.requires_grad for p in found.model.parameters())
    torch.testing.assert_close(found.model(X), model(X))
    assert found.error < 1e-5
    assert found.chosen == {"bitmap": 1, "dense": 2}


def timing(milliseconds):
    from secateur.outcome import Timing

    return Timing(milliseconds, 0.0, 20, 1, 1, "float32")


def test_a_whole_weight_is_tried_as_a_bitmap_for_few_rows_of_16_bits(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    few = accelerate(Slow(), X.repeat(16, 1), dtype=torch.bfloat16)
    assert few.choices[0].layer == "full" and few.choices[0].chosen == "bitmap"
    assert [t.name for t in few.choices[0].trials] == ["dense", "bitmap"]  # others would say of each weight where it is
    assert accelerate(Slow(), X.repeat(17, 1), dtype=torch.bfloat16).choices[0].chosen == "dense"


@pytest.mark.parametrize(("zeros", "whole"), [(0.01, True), (0.2, False)])
@pytest.mark.parametrize("format", [Bitmap(), BitmapInt8()], ids=lambda format: format.name)
def test_of_a_weight_with_few_zeros_all_is_kept(format, zeros, whole, cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    made = torch.Generator().manual_seed(0)
    dense = nn.Linear(64, 64).to(torch.bfloat16).requires_grad_(False)
    dense.weight.copy_(
        torch.where(torch.rand(64, 64, generator=made) < zeros, 0.0, torch.randn(64, 64, generator=made))
    )
    packed = (
        accelerate(nn.Sequential(dense), torch.randn(1, 64), dtype=torch.bfloat16, formats=(format,)).model[0].packed
    )
    assert (len(packed.tensors["values"]) == 64 * 64) == whole
    assert torch.equal(packed.dense() == 0, format.pack(dense.weight).dense() == 0)


def test_what_loses_stays_dense(cost):
    cost(1.0, 0.97)  # less than noise
    found = accelerate(Slow(), X)
    assert found.chosen == {"dense": 3}
    assert found.choices[1].why == "bitmap takes 970 ms, dense 1e+03"


class Named(Slow):
    """Its layers are called by keyword."""

    def forward(self, x):
        return self.thin(input=self.full(input=x))


def test_layers_that_are_called_by_keyword_are_packed(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    found = accelerate(Named(), X)
    assert found.chosen == {"bitmap": 1, "dense": 2} and isinstance(found.model.thin, SparseLinear)
    torch.testing.assert_close(found.model(X), Named()(X))


def test_layers_with_hooks_stay_dense_and_their_hooks_are_called(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    model, x = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)).eval(), torch.randn(1, 8, 9, 9)
    for layer in (model[0], model[2]):
        layer.register_forward_hook(lambda layer, args, y: y + 1)
    found = accelerate(model, x)
    torch.testing.assert_close(found.model(x), model(x))
    assert found.choices[0].why == "it has hooks, which nobody would call where it is packed"
    masked = nn.Sequential(nn.Linear(256, 256))  # in torch a mask is a hook, and its outcome in the weight
    prune.random_unstructured(masked[0], "weight", 0.9)
    with torch.no_grad():
        wanted = masked(X)
    found = accelerate(masked, X)
    assert found.chosen == {"bitmap": 1}
    torch.testing.assert_close(found.model(X), wanted)


def test_what_is_no_format_and_a_dtype_that_none_holds_are_named():
    with pytest.raises(SettingError, match="the formats hold 'bitmap', which is none"):
        accelerate(Slow(), X, formats=["bitmap"])
    wide = accelerate(Slow().double(), X.double()).choices[1]
    assert "its dtype is torch.float64" in wide.why


def test_a_model_of_which_nothing_is_packed_takes_the_time_it_took(monkeypatch):
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(20.0)))
    found = accelerate(nn.Linear(8, 8), torch.randn(1, 8))
    assert (found.chosen, found.now, type(found.model)) == ({"dense": 1}, found.dense, nn.Linear)


def test_a_model_that_is_slower_as_a_whole_stays_dense(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(2.5)))
    found = accelerate(Slow(), X)
    assert found.chosen == {"dense": 3}
    assert found.choices[1].why == "the whole model was slower with it: 2.5 ms, dense 2"
    assert found.now is found.dense
    assert isinstance(found.model.thin, nn.Linear)


class Pictures(nn.Module):
    """A convolution of groups, one of single weights, one that is dense, a depthwise one, and a linear layer."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.groups = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.Conv2d(16, 24, 1)
            self.depth, self.single = nn.Conv2d(24, 24, 3, padding="same", groups=24), nn.Conv2d(24, 9, 3, bias=False)
            self.head = nn.Linear(9, 5)
        made = torch.Generator().manual_seed(1)
        with torch.no_grad():
            self.groups.weight *= (torch.rand(6, 16, 1, 1, generator=made) > 0.8).repeat_interleave(4, 0)
            self.single.weight *= torch.rand(self.single.weight.shape, generator=made) > 0.8
            self.depth.weight[:, :, 1] = 0

    def forward(self, x):
        x = self.depth(self.groups(self.first(x).relu()))
        return self.head(self.single(x).mean((-1, -2)))


def test_convolutions_are_packed_in_groups_that_are_full(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    model, x = Pictures(), torch.randn(1, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    found = accelerate(model, x)
    assert {c.layer: c.chosen for c in found.choices} == {
        "first": "group-cols-4",  # whole, but small
        "groups": "group-cols-1",  # as fast as any here, and the first
        "depth": "depth-taps",
        "single": "group-cols-1",
        "head": "dense",
    }
    by_name = {c.layer: c for c in found.choices}
    tried = [t.name for t in by_name["groups"].trials]
    dense = ["dense", "dense, as a product", "dense, channels last"]
    assert tried == [*dense, "group-cols-1", "group-cols-2", "group-cols-4"]
    assert [t.name for t in by_name["single"].trials] == ["dense", "dense, channels last", "group-cols-1"]
    assert [t.name for t in by_name["depth"].trials] == ["dense", "dense, channels last", "depth-taps"]
    groups = accelerate(model, x, formats=[GroupCols(1)])
    assert {c.layer: c.why for c in groups.choices}["depth"] == "group-cols-1: it has 24 groups"
    assert (by_name["single"].shape, by_name["single"].rows) == ((9, 24, 3, 3), 49)
    chain = found.model
    assert [type(layer) for layer in chain.layers] == [SparseConv2d] * 4 and chain.links[0].between == (0, float("inf"))
    torch.testing.assert_close(found.model(x), model(x))
    # One picture without a batch, and channels last, are seen as such.
    assert accelerate(model.single, torch.randn(24, 9, 9)).choices[0].rows == 49
    last = accelerate(model, x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last.model(x), model(x))


@pytest.mark.parametrize(("packed", "whole", "chosen"), [(3.0, 1.0, True), (3.0, 1.98, False), (5.0, 1.0, False)])
def test_a_chain_may_make_up_for_what_its_layers_lose(cost, monkeypatch, packed, whole, chosen):
    # By itself a packed layer takes longer than the 2.0 of a dense one, and more than twice as long is not tried.
    cost(2.0, packed)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(whole)))
    model, x = Pictures(), torch.randn(1, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    found = accelerate(model, x)
    by_name = {c.layer: c for c in found.choices}
    assert (by_name["single"].chosen == "group-cols-1") is chosen
    assert ("in a chain" in by_name["single"].why) is chosen
    assert any(isinstance(module, ConvChain) for module in found.model.modules()) is chosen
    assert by_name["head"].chosen == "dense"
    torch.testing.assert_close(found.model(x), model(x))


class Small(nn.Module):
    """Ends in a layer that sees four pixels, too few to fill a vector."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.last = nn.Conv2d(3, 16, 3, padding=1, stride=2), nn.Conv2d(16, 24, 1)
        with torch.no_grad():
            self.last.weight *= torch.rand(self.last.weight.shape, generator=torch.Generator().manual_seed(1)) > 0.8

    def forward(self, x):
        return self.last(self.first(x).relu())


@pytest.mark.parametrize(("whole", "chosen"), [(1.0, "group-cols-1"), (1.98, "bitmap")])
def test_a_chain_may_want_another_format_than_a_layer_by_itself(cost, monkeypatch, whole, chosen):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(whole)))
    model, x = Small(), torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    found = accelerate(model, x)
    by_name = {c.layer: c for c in found.choices}
    tried = [t.name for t in by_name["last"].trials]
    assert "bitmap" in tried and "group-cols-1" in tried  # as fast as one another, and the bitmap is the first
    assert by_name["last"].chosen == chosen
    assert ("in a chain" in by_name["last"].why) is (chosen == "group-cols-1")
    chains = [module for module in found.model.modules() if isinstance(module, ConvChain)]
    assert [len(chain.layers) for chain in chains] == ([2] if chosen == "group-cols-1" else [1])
    torch.testing.assert_close(found.model(x), model(x))


class Sly(Pictures):
    """Does something else where it is traced."""

    def forward(self, x):
        first = super().forward(x)
        return first, first * (2 if isinstance(x, torch.fx.Proxy) else 1)


def test_a_chain_that_answers_otherwise_is_not_taken(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    model, x = Sly(), torch.randn(1, 3, 18, 18, generator=torch.Generator().manual_seed(0))
    found = accelerate(model, x)
    assert isinstance(found.model, Sly) and isinstance(found.model.single, SparseConv2d)
    for got, want in zip(found.model(x), model(x), strict=True):
        torch.testing.assert_close(got, want)


def test_a_convolution_that_loses_to_any_dense_way_stays(monkeypatch):
    ways = {"dense": 3.0, "dense, channels last": 1.0, "group-cols-1": 2.0}
    names = []

    def medians(turns, rounds):
        layers = [(call.__defaults__ or (None,))[-1] for turn in turns for call in turn]
        names.extend(layers)
        dense = iter(["dense", "dense, channels last"])
        return [ways["group-cols-1"] if isinstance(at, SparseConv2d) else ways[next(dense)] for at in layers]

    monkeypatch.setattr(MODULE, "_medians", medians)
    found = accelerate(Pictures().single, torch.randn(1, 24, 9, 9))
    assert found.chosen == {"dense": 1}
    assert found.choices[0].why == "group-cols-1 takes 2e+03 ms, dense, channels last 1e+03"
    assert len(names) == 3


class Normed(nn.Module):
    """Norms behind convolutions, one of which is seen by something else too, and one that is called twice."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1, bias=bias) for bias in (False, True))
            self.seen, self.twice = (nn.Conv2d(4, 4, 1) for _ in range(2))
            self.norms = nn.ModuleList(nn.BatchNorm2d(4) for _ in range(4))
            for norm in self.norms:
                for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                    nn.init.uniform_(value, 0.5, 1.5)

    def forward(self, x):
        x = self.norms[1](self.second(self.norms[0](self.first(x)).relu()))
        x = self.seen(x)
        x = x + self.norms[2](x)
        return self.norms[3](self.twice(self.norms[3](self.twice(x))))


class Asks(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_batch_norms_go_into_the_convolutions_before_them(cost, monkeypatch):
    cost(2.0, 5.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    model, x = Normed().eval(), torch.randn(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = accelerate(model, x)
    assert [type(norm) for norm in found.model.norms] == [nn.Identity] * 2 + [nn.BatchNorm2d] * 2
    torch.testing.assert_close(found.model(x), model(x))
    assert found.error < 1e-6
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # A model that was slower so stays, and one whose code asks for numbers is not traced.
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(1.0), timing(2.0)))
    assert isinstance(accelerate(model, x).model.norms[0], nn.BatchNorm2d)
    assert isinstance(MODULE._folded(nn.Sequential(model, Asks()))[0].norms[0], nn.BatchNorm2d)


def test_a_pointwise_convolution_of_few_pixels_is_tried_as_a_linear_layer(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    made = torch.Generator().manual_seed(0)
    conv, x = nn.Conv2d(40, 24, 1), torch.randn(3, 40, 2, 2, generator=made)
    with torch.no_grad():
        conv.weight *= torch.rand(conv.weight.shape, generator=made) > 0.8
    found = accelerate(nn.Sequential(conv), x)
    assert found.chosen == {"bitmap": 1}
    packed = found.model[0]
    assert isinstance(packed, SparsePointwise)
    torch.testing.assert_close(packed(x), conv(x))
    torch.testing.assert_close(packed(x[0]), conv(x[0]))
    torch.testing.assert_close(packed.dense()(x), conv(x))
    assert accelerate(nn.Sequential(conv), torch.randn(4, 40, 2, 2)).choices[0].trial("bitmap") is None
    with pytest.raises(FormatError, match="it looks at more than one pixel"):
        SparsePointwise.of(nn.Conv2d(4, 4, 1, stride=2), Bitmap())


def test_linear_layers_with_rows_enough_are_tried_in_groups(cost):
    cost(2.0, 1.0)
    found = accelerate(Slow(), torch.randn(16, 256), formats=[GroupCols(2), GroupCols(1)])
    assert [t.name for t in found.choices[1].trials] == ["dense", "group-cols-1"]
    few = accelerate(Slow(), torch.randn(15, 256), formats=[GroupCols(1)])
    assert few.choices[1].why == "group-cols-1: 15 rows leave its lanes empty"
    assert accelerate(Slow(), torch.randn(4, 256), formats=[KBlocked(128)]).choices[1].trial("k-blocked-128")
    few = accelerate(Slow(), torch.randn(3, 256), formats=[KBlocked(128)])
    assert few.choices[1].why == "k-blocked-128: 3 rows leave its lanes empty"


def test_single_weights_in_bfloat16_beside_a_matrix_unit_are_tried_where_few_are_left_for_few_rows(cost, monkeypatch):
    cost(2.0, 1.0)

    def why(rows, dtype=torch.bfloat16, kept=1.0):
        model = Slow().to(dtype)
        with torch.no_grad():
            model.thin.weight[:, : int(256 * (1 - kept))] = 1
        return accelerate(model, torch.randn(rows, 256).to(dtype), formats=[KBlocked(256)]).choices[1]

    monkeypatch.setattr(candidates.kernels, "level", lambda: "amx")
    assert [t.name for t in why(16).trials] == ["dense", "k-blocked-256"]
    assert [t.name for t in why(64).trials] == ["dense", "k-blocked-256"]
    assert why(65).why == "k-blocked-256: in bfloat16 it is for up to 64 rows beside a matrix unit"
    assert why(16, torch.float16).why == "k-blocked-256: it is for float32 and bfloat16"
    found = why(16, kept=0.5).why
    assert found == "k-blocked-256: beside a matrix unit it is for 80% zeros and more, and 48% are"
    monkeypatch.setattr(candidates.kernels, "level", lambda: "avx512bf16")
    assert [t.name for t in why(65, kept=0.5).trials] == ["dense", "k-blocked-256"]
    assert why(16, torch.float16).why == "k-blocked-256: it is for float32 and bfloat16"


def test_the_break_even_of_a_convolution(monkeypatch):
    ask = iter([(1.0, 1.3), (1.0, 1.1), (1.0, 0.9)])
    monkeypatch.setattr(MODULE, "_medians", lambda turns, _: [call() for turn in turns for call in turn] and next(ask))
    slid = MODULE.Slide(2, (9, 7), (2, 1), (1, 1), (1, 1))
    assert break_even((10, 3, 3, 3), 70, torch.float32, GroupCols(4), slid) == pytest.approx(0.4)
    assert break_even((10, 3), 70, torch.bfloat16, GroupCols(4)) is None
    depthwise = MODULE.Slide(2, (9, 7), (2, 1), (1, 1), (1, 1), 10)
    ask = iter([(1.0, 1.3), (1.0, 1.1), (1.0, 0.9)])
    assert break_even((10, 1, 3, 3), 70, torch.float32, DepthTaps(), depthwise) == pytest.approx(0.4)
    assert break_even((10, 1, 3, 3), 70, torch.float32, GroupCols(4), depthwise) is None
    assert break_even((10, 3), 70, torch.float32, DepthTaps()) is None


class AsksItsLayer(nn.Module):
    """Takes the dtype of its input from a layer, as vision transformers do."""

    def __init__(self):
        super().__init__()
        self.thin = Slow().thin

    def forward(self, x):
        return self.thin(x.to(self.thin.weight.dtype))


def test_a_network_that_asks_a_layer_for_its_dtype(cost, monkeypatch):
    cost(2.0, 1.0)
    monkeypatch.setattr(MODULE, "time_pair", lambda *_: (timing(2.0), timing(1.0)))
    model = AsksItsLayer()
    found = accelerate(model, X.double())
    assert found.chosen == {"bitmap": 1}
    torch.testing.assert_close(found.model(X.double()), model(X.double()))


def test_a_real_race_in_another_dtype_gives_back_the_threads():
    before = torch.get_num_threads()
    found = front(Slow(), (X,), dtype=torch.bfloat16, threads=2)
    assert torch.get_num_threads() == before
    assert found.now.threads == 2
    assert found.error < 2e-2
    assert [t.name for t in found.choices[1].trials] == ["dense", "bitmap", "sell-blocked"]
    assert found.level == kernels.level()


def test_what_cannot_be_accelerated_is_refused():
    with pytest.raises(SettingError, match="Sequential has no linear layer"):
        accelerate(nn.Sequential(nn.ReLU()), X)
    with pytest.raises(SettingError, match="threads are 0"):
        accelerate(Slow(), X, threads=0)
    with pytest.raises(SettingError, match="it lies on meta"):
        accelerate(Slow().to("meta"), X)


def test_the_break_even_lies_where_the_lines_cross(monkeypatch):
    ask = iter([(1.0, 1.3), (1.0, 1.1), (1.0, 0.9)])  # seconds dense and packed, at 10, 30 and 50 %
    monkeypatch.setattr(MODULE, "_medians", lambda *_: next(ask))
    assert break_even((32, 32), 1, torch.float32, Bitmap()) == pytest.approx(0.4)


def test_a_turn_is_taken_some_times_and_the_last_counts(monkeypatch):
    now, made = [0.0], []

    def call(name, seconds):
        def made_anew():
            made.append(name)
            now[0] += seconds if made.count(name) % MODULE.PASSES == 0 else 100

        return made_anew

    monkeypatch.setattr(MODULE, "_clock", lambda: lambda: now[0])
    assert MODULE._medians([[call("a", 1.0), call("b", 2.0)], [call("c", 3.0)]], 3) == pytest.approx([1.0, 2.0, 3.0])
    assert made == [*"abababccc"] * 3


def test_memory_is_read_whole():
    assert memory_speed(2**20 + 100) > 1e8


def test_bench_says_what_was_chosen_and_why(monkeypatch):
    monkeypatch.setattr(MODULE, "memory_speed", lambda: 1e10)
    args = ["bench", "tiny:decoder", "--task", "tiny:toy_text", "--explain"]
    shown = CliRunner().invoke(main, args, terminal_width=200)
    assert shown.exit_code == 0, shown.output
    assert "no format is faster" in " ".join(shown.stdout.split())
    asked = CliRunner().invoke(main, [*args, "--json"])
    told = json.loads(asked.stdout)
    assert told["level"] == kernels.level()
    assert told["layers"][0]["chosen"] == "dense"
    assert set(told) >= {"dense", "now", "error", "memory_bytes_per_second", "break_even"}


def test_the_table_of_bench_fits_into_80_columns(monkeypatch):
    layers = [f"model.layers.{place}.self_attn.q_proj" for place in (0, 29)] + ["lm_head"]
    trials = (Trial("dense", 12.345, 56_623_104), Trial("bitmap-int8", 6.789, 31_850_496))
    choices = [Choice(n, (49152, 576), 1, 0.5, "bitmap-int8", "1.82 times as fast as dense", trials) for n in layers]
    choices[2] = Choice("lm_head", (49152, 576), 1, 0.0, "dense", "bitmap takes 13 ms, dense 12", trials)
    lone = nn.Linear(2, 2)
    found = Accelerated(lone, tuple(choices), timing(2.0), timing(1.0), 0.0, "amx")
    speaker, told = Terminal(), {"memory_bytes_per_second": 1e10, "break_even": {"49152x576 at 1": {"bitmap": 0.4}}}
    speaker.result = Console(width=80, file=io.StringIO())
    bench._explain(speaker, found, told)
    lines = speaker.result.file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) == 9  # a line a layer
    assert lines[1].split() == [
        "…ers.0.self_attn.q_proj",
        "49152x576",
        "50%",
        "12.345",
        "6.789",
        "bitmap-int8",
        "47%",
    ]
    assert "dense: lm_head, as bitmap takes 13 ms, dense 12" in lines


def test_a_format_that_does_not_exist_is_refused_with_the_nearest():
    found = CliRunner().invoke(main, ["bench", "tiny:decoder", "--formats", "bitmap-int"], terminal_width=200)
    assert found.exit_code == 2
    assert "Did you mean bitmap-int8?" in " ".join(found.stderr.split())
