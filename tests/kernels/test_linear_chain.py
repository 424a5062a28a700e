"""Chains of packed linear layers: every variant against the layers one by one, and what a trace finds."""

import copy
import ctypes
import threading

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import kernels
from secateur.chaining import chained, chained_within
from secateur.errors import FormatError
from secateur.formats import NM, Bitmap, BitmapInt8, Block, GroupCols, KBlocked, Sell8, Sell16, SellBlocked
from secateur.formats.linear import SparseLinear
from secateur.formats.linear_chain import LinearChain, packed_chain
from secateur.formats.packed import VALUES
from secateur.formats.planned import RELU
from secateur.formats.program import HELD, LITTLE, SILU, SPAN, Activate, Gate, Product
from secateur.formats.state import made_of

STRANGE = torch.tensor([float("nan"), float("inf"), -float("inf"), 100.0, -100.0, 88.5, -88.5, 1e-20, -0.0, 3e38])


def numbers(count, dtype, seed=0):
    made = torch.Generator().manual_seed(seed)
    x = 4 * torch.randn(count, generator=made)
    x[: min(count, len(STRANGE))] = STRANGE[:count]
    return x.to(dtype)


def activated(x, kind, between=(0.0, 0.0), times=None):
    """By the kernel of this level, into x itself where nothing else is multiplied."""
    y = x.clone() if times is None else torch.full_like(x, 7.0)
    source = y if times is None else x
    call = Activate(
        source.data_ptr(), None if times is None else times.data_ptr(), y.data_ptr(), len(x), kind, *between
    )
    kernel = kernels.find(f"activate_{VALUES[x.dtype]}")
    kernels.run(kernel, call, -(-len(x) // SPAN))
    return y


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("count", [1, 15, 16, 33, SPAN, 2 * SPAN + 7])
def test_every_variant_holds_and_gates_as_torch_does(count, dtype):
    x, times = numbers(count, dtype), numbers(count, dtype, seed=1).flip(0)
    for level in kernels.levels()[:3]:
        with kernels.forced(level):
            assert ctypes.sizeof(Activate) == 48
            torch.testing.assert_close(activated(x, HELD, RELU), F.relu(x), rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(
                activated(x, HELD, (-1, 6)), F.hardtanh(x, -1, 6), rtol=0, atol=0, equal_nan=True
            )
            close = {"rtol": 1e-6 if dtype is torch.float32 else 1e-2, "atol": 1e-30, "equal_nan": True}
            torch.testing.assert_close(activated(x, SILU), F.silu(x), **close)
            torch.testing.assert_close(activated(x, SILU, times=times), F.silu(x) * times, **close)


def layer(inputs, outputs, format, dtype=torch.float32, seed=0, bias=True):
    made = torch.Generator().manual_seed(seed)
    dense = nn.Linear(inputs, outputs, bias=bias, dtype=dtype).requires_grad_(False)
    weight = torch.randint(-2, 3, dense.weight.shape, generator=made)
    if isinstance(format, NM):
        weight = weight.view(outputs, -1, format.m) * (torch.arange(format.m) < format.n)
    dense.weight.copy_(weight.view(outputs, inputs) * (torch.rand(outputs, 1, generator=made) > 0.2) / 2)
    if bias:
        dense.bias.copy_(torch.randint(-2, 3, (outputs,), generator=made))
    return SparseLinear.of(dense, format)


FORMS = [Bitmap(), BitmapInt8(), Sell8(), Sell16(), SellBlocked(), NM(2, 4), Block(1, 16), KBlocked(128)]
FORMS += [GroupCols(1), GroupCols(4)]
STEPS = [Product(0, RELU), Product(0), Gate(1, 2), Product(3, (-3.0, 6.0)), Gate(4), Product(5)]


def perceptron(format=None, dtype=torch.float32):
    format = format or Bitmap()
    sizes = (
        [(48, 32), (48, 32), (32, 20), (20, 7)]
        if not isinstance(format, (NM, Block))
        else [(48, 32), (48, 32), (32, 16), (16, 16)]
    )
    layers = [layer(*size, format, dtype, seed=i, bias=i != 1) for i, size in enumerate(sizes)]
    return LinearChain(layers, STEPS, 1, [6])


def whole(*shape, dtype=torch.float32, seed=3):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", VALUES, ids=str)
@pytest.mark.parametrize("format", FORMS, ids=lambda format: format.name)
def test_every_format_runs_in_one_call_as_layer_by_layer(format, dtype):
    if format.why_not(torch.ones(32, 48, dtype=dtype)) is not None:
        pytest.skip("the format is not for this dtype")
    chain = perceptron(format, dtype)
    close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for level in kernels.levels()[:4]:
        with kernels.forced(level):
            for shape in ((48,), (1, 48), (3, 5, 48), (130, 48), (0, 48)):
                x = whole(*shape, dtype=dtype)
                for _ in range(2):
                    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0], **close)
                plans = [plan for kept in chain._plans.values() for plan in kept if plan.key[-1] == x.shape]
                rows = x.numel() // 48
                written = any(of.packed.writes(rows * of.packed.shape[1]) for of in chain.layers)
                assert [plan.possible for plan in plans] == [rows > 0 and not written]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_is_between_is_nobody_elses(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chain = perceptron()
        rows = LITTLE // 4 // 48
        for count in (1, rows, 4 * rows):  # what lies between them is kept, or taken for each call
            inputs = [whole(count, 48, seed=seed) for seed in range(6)]
            wanted = [chain._one_by_one([x])[0] for x in inputs]
            wrong = []

            def call(i, inputs=inputs, wanted=wanted, wrong=wrong):
                wrong.extend(i for _ in range(20) if not torch.allclose(chain(inputs[i]), wanted[i], atol=1e-5))

            workers = [threading.Thread(target=call, args=(i,)) for i in range(6)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            assert not wrong
            first = chain(inputs[0])
            kept = first.clone()
            chain(inputs[1])
            assert torch.equal(first, kept)
    finally:
        torch.set_num_threads(before)


def test_several_values_are_given_back():
    chain = perceptron()
    both = LinearChain(list(chain.layers), STEPS, 1, [6, 2, 4])
    x = whole(2, 48)
    for got, wanted in zip(both(x), both._one_by_one([x]), strict=True):
        torch.testing.assert_close(got, wanted)
    assert both._plans


def test_changes_are_noticed():
    chain, x = perceptron(), whole(2, 48)
    chain(x)
    other = layer(48, 32, Bitmap(), seed=9)
    chain.layers[0].load_state_dict(other.state_dict())
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0])
    chain.layers[0].bias.mul_(3)
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0])
    chain.layers[0].bias.data = torch.ones(32)
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0])
    chain.layers[0].bias = nn.Parameter(torch.full((32,), 2.0), requires_grad=False)
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0])
    chain.layers[3].bias = None
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0])
    chain.layers[0].bias = nn.Parameter(torch.ones(31), requires_grad=False)
    with pytest.raises(FormatError, match=r"a bias torch.float32 \[31\]"):
        chain(x)
    chain.layers[0].bias = None
    chain.layers[1].values.mul_(2)
    with pytest.raises(FormatError, match="changed after packing"):
        chain(x)


def test_what_does_not_fit_is_refused_as_by_the_layers():
    chain = perceptron()
    with pytest.raises(FormatError, match="float64"):
        chain(whole(2, 48, dtype=torch.float64))
    with pytest.raises(FormatError, match=r"it takes torch.float32 \[..., 48\]"):
        chain(whole(2, 47))
    turned = whole(48, 2).T
    torch.testing.assert_close(chain(turned), chain(turned.contiguous()))
    mixed = LinearChain(
        [layer(48, 32, Bitmap()), layer(32, 8, Bitmap(), torch.bfloat16)], [Product(0), Product(1)], 1, [2]
    )
    with pytest.raises(FormatError, match="bfloat16"):
        mixed(whole(2, 48))


def test_infinities_go_through():
    chain, x = perceptron(), whole(3, 48)
    x[1, 5] = float("inf")
    torch.testing.assert_close(chain(x), chain._one_by_one([x])[0], equal_nan=True)
    assert chain(x).isnan().any() and chain(x)[0].isfinite().all()


def test_gradients_flow_and_a_copy_is_its_own():
    chain, x = perceptron(), whole(2, 48).requires_grad_()
    chain(x).square().sum().backward()
    mine, x.grad = x.grad, None
    chain._one_by_one([x])[0].square().sum().backward()
    torch.testing.assert_close(mine, x.grad)
    assert not chain._plans
    chain.layers[0].bias.requires_grad_()
    chain(x.detach()).sum().backward()
    assert chain.layers[0].bias.grad is not None
    twin = copy.deepcopy(chain)
    with torch.no_grad():
        torch.testing.assert_close(twin(x), chain(x))
    assert chain._plans and copy.deepcopy(chain)._plans == {}


@pytest.mark.parametrize("format", [Bitmap(), GroupCols(4)], ids=lambda format: format.name)
def test_compile_and_export_see_one_operator(format, monkeypatch):
    chain, x = perceptron(format), whole(2, 48)
    both = LinearChain(list(chain.layers), STEPS, 1, [6, 2])
    laid = []
    call = type(format).call
    monkeypatch.setattr(type(format), "call", lambda self, packed: laid.append(packed) or call(self, packed))
    with torch.no_grad():
        for one in (chain, both):
            wanted = one(x) if one is both else (one(x),)
            compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
            exported = torch.export.export(one, (x,), dynamic_shapes=((({0: torch.export.Dim("rows")}),),))
            found = [node.target for node in exported.graph.nodes if "secateur" in str(node.target)]
            assert found == [torch.ops.secateur.packed_chain.default]
            before = len(laid)
            for ran in (compiled, exported.module()):
                for rows in (x, torch.cat([x, x]), x):
                    got = ran(rows)
                    for y, want in zip(got if one is both else (got,), wanted, strict=True):
                        torch.testing.assert_close(y[:2], want)
            assert len(laid) <= before + 2 * len(chain.layers), "what is laid out for kernels is kept from call to call"
    torch.library.opcheck(
        torch.ops.secateur.packed_chain.default, ([x], *both._as_given()), test_utils=("test_schema", "test_faketensor")
    )


def test_an_operator_makes_a_chain_of_what_nobody_holds():
    chain, x = perceptron(), whole(2, 48)
    tensors, biases, *numbers = chain._as_given()
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(packed_chain([x], tensors, biases, *numbers)[0], chain(x))
        held = chain.layers[0].packed
        assert len(held.chains) == 1
        mine = [t.clone() for t in tensors]
        torch.testing.assert_close(packed_chain([x], mine, biases, *numbers)[0], chain(x))
        assert len(held.chains) == 1
        for _ in range(9):
            packed_chain([x], tensors, [None if b is None else b.clone() for b in biases], *numbers)
        assert len(held.chains) == 4
        first = len(held.format.names)
        equal = [tensors[0], *(t.clone() for t in tensors[1:])]  # as a compiled graph has it
        torch.testing.assert_close(packed_chain([x], equal, biases, *numbers)[0], chain(x))
        assert made_of(tensors[:first], chain.layers[0]._header) is held, "its chain is beside that of the layer"
        other = [None if b is None else b + 1 for b in biases]
        assert not torch.allclose(packed_chain([x], tensors, other, *numbers)[0], chain(x))


class Gated(nn.Module):
    """The gated part of a block of a language model; what calls it takes more than one value."""

    def __init__(self, act=None):
        super().__init__()
        self.gate, self.up, self.down = (layer(a, b, Bitmap(), seed=a) for a, b in ((16, 24), (16, 24), (24, 16)))
        self.act = act or nn.SiLU()

    def forward(self, x):
        return self.down(self.act(self.gate(x)) * self.up(x))


class Block2(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.mlp, self.out = Gated(**settings), layer(16, 16, Sell8())

    def forward(self, x, mask=None):
        if mask is not None:
            x = x * mask
        return x + self.out(self.mlp(x))


@pytest.mark.parametrize("act", [None, lambda x: F.silu(x, inplace=False)], ids=["module", "function"])
def test_the_gated_part_of_a_model_is_a_chain(act):
    model, x = Block2(act=act).eval(), whole(3, 16)
    assert chained(model) is model, "it is called in two ways, of which a trace knows one"
    found = chained_within(model)
    assert isinstance(found.mlp, LinearChain) and found.mlp.steps == (Product(0), Product(0), Gate(1, 2), Product(3))
    assert isinstance(found.out, SparseLinear) and not found.mlp.training and isinstance(model.mlp, Gated)
    assert found.mlp.layers[0].values is model.mlp.gate.values, "nothing is copied"
    torch.testing.assert_close(found(x, x), model(x, x))
    torch.testing.assert_close(found(x), model(x))


@pytest.mark.parametrize("act", [nn.GELU(), nn.SiLU(inplace=True), lambda x: F.silu(x) + 1])
def test_what_is_no_chain_is_left(act):
    model = Block2(act=act).eval()
    assert chained_within(model) is model
    torch.testing.assert_close(chained(model.mlp)(whole(3, 16)), model.mlp(whole(3, 16)))


def test_what_is_hooked_is_left():
    model = Block2()
    model.mlp.register_forward_hook(lambda *_: None)
    assert chained_within(model) is model


def test_a_perceptron_is_one_chain():
    model = nn.Sequential(
        nn.Flatten(), layer(16, 24, Bitmap()), nn.ReLU(inplace=True), nn.Dropout(), layer(24, 16, Sell8()), nn.ReLU6(),
        layer(16, 4, Bitmap()),
    ).eval()  # fmt: skip
    found = chained(model)
    chain = next(module for module in found.modules() if isinstance(module, LinearChain))
    assert chain.steps == (Product(0, RELU), Product(1, (0.0, 6.0)), Product(2)) and not found.training
    x = whole(3, 4, 4)
    torch.testing.assert_close(found(x), model(x))
    alone = nn.Sequential(nn.Tanh(), layer(16, 24, Bitmap()), nn.Tanh())
    assert chained(alone) is alone


class Wired(nn.Module):
    """What is read in several places, in another order, and of what torch makes between."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (layer(16, 16, Bitmap(), seed=i) for i in range(3))

    def forward(self, x):
        y = self.one(x).relu()
        z = torch.tanh(y)
        return self.two(z) + self.three(y) * F.silu(y), y


def test_what_needs_a_chain_from_outside_ends_it():
    model, x = Wired(), whole(3, 16)
    found = chained(model)
    chains = [module for module in found.modules() if isinstance(module, LinearChain)]
    assert [len(chain.steps) for chain in chains] == [1, 3]
    for got, wanted in zip(found(x), model(x), strict=True):
        torch.testing.assert_close(got, wanted)
