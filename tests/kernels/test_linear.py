"""The packed linear layer: state, safetensors, compile, export, and what it refuses."""

import copy
import gc
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from secateur.errors import FormatError
from secateur.formats import Bitmap, DepthTaps, GroupCols, Sell8, Sell16
from secateur.formats.chain import ConvChain, Link
from secateur.formats.conv import SparseConv2d
from secateur.formats.linear import SparseLinear, SparsePointwise
from secateur.formats.linear_chain import LinearChain
from secateur.formats.packed import Packed
from secateur.formats.program import Product

FORMATS = [Bitmap(), Sell16(), Sell8()]
each = pytest.mark.parametrize("format", FORMATS, ids=lambda f: f.name)


def layer(seed=0, keep=0.5, bias=True):
    made = torch.Generator().manual_seed(seed)
    linear = nn.Linear(40, 24, bias=bias)
    mask = torch.rand(24, 40, generator=made) < keep
    linear.weight = nn.Parameter(torch.randn(24, 40, generator=made) * mask)
    if bias:
        linear.bias = nn.Parameter(torch.randn(24, generator=made))
    return linear


X = torch.randn(3, 40, generator=torch.Generator().manual_seed(9))


def test_a_network_may_look_at_the_weight_of_a_packed_layer():
    conv, depthwise, pointwise = nn.Conv2d(8, 12, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 12, 1)
    packed = [
        (layer(), SparseLinear.of(layer(), Bitmap())),
        (conv, SparseConv2d.of(conv, GroupCols(4))),
        (depthwise, SparseConv2d.of(depthwise, DepthTaps())),
        (pointwise, SparsePointwise.of(pointwise, Sell8())),
    ]
    for dense, sparse in packed:
        seen = sparse.weight
        assert (seen.dtype, seen.device, seen.shape) == (torch.float32, torch.device("cpu"), dense.weight.shape)
        assert isinstance(seen, torch.Tensor)
        assert torch.equal(seen + 0, dense.weight) and torch.equal(seen.flatten(1)[0], dense.weight.flatten(1)[0])
        with pytest.raises(FormatError, match="was to change the weight of a packed layer"):
            seen.mul_(2)
        assert sparse.packed.format.name in repr(seen) and "weight" not in sparse.state_dict()


@each
def test_a_layer_does_what_the_dense_one_does(format):
    for linear in (layer(), layer(bias=False)):
        sparse = SparseLinear.of(linear, format)
        torch.testing.assert_close(sparse(X), linear(X))
        assert torch.equal(sparse.dense().weight, linear.weight)
        assert torch.equal(sparse.dense()(X), linear(X))


@each
def test_state_goes_through_a_file_to_a_layer_of_another_mask(format, tmp_path):
    saved = SparseLinear.of(layer(0), format)
    save_file(saved.state_dict(), tmp_path / "layer.safetensors")
    other = SparseLinear.of(layer(1, keep=0.2), format)
    other.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    with torch.no_grad():
        assert torch.equal(other(X), saved(X))
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(other)(X), saved(X))


@each
def test_state_of_another_version_is_refused(format):
    sparse = SparseLinear.of(layer(), format)
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    state["header"][1] = 77
    with pytest.raises(FormatError, match=f"{format.name} is of version {format.version} here"):
        sparse.load_state_dict(state)


@each
def test_a_layer_that_was_changed_is_refused(format):
    sparse = SparseLinear.of(layer(), format)
    sparse.values.zero_()
    with pytest.raises(FormatError, match="its tensors were changed after packing"), torch.no_grad():
        sparse(X)
    with pytest.raises(FormatError):
        SparseLinear.of(layer(), Bitmap()).bfloat16()(X.bfloat16())
    with pytest.raises(FormatError, match=r"its bias is torch.float32 \[23\]"):
        SparseLinear(format.pack(layer().weight), torch.zeros(23))


@each
def test_gradients_reach_the_input_and_the_bias(format):
    linear = layer()
    sparse = SparseLinear.of(linear, format)
    sparse.bias.requires_grad_()
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    sparse(x).square().sum().backward()
    linear(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(sparse.bias.grad, linear.bias.grad)


@each
def test_compile_and_export_see_one_operator(format):
    linear = layer()
    model = nn.Sequential(SparseLinear.of(linear, format), nn.ReLU())
    wanted = linear(X).relu()
    with torch.no_grad():
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), wanted)
        exported = torch.export.export(model, (X,), dynamic_shapes=({0: torch.export.Dim("rows")},))
        found = [node.target for node in exported.graph.nodes if "secateur" in str(node.target)]
        assert found == [torch.ops.secateur.packed_linear.default]
        torch.testing.assert_close(exported.module()(torch.cat([X, X])), torch.cat([wanted, wanted]))
    torch.library.opcheck(
        torch.ops.secateur.packed_linear.default,
        (X, None, [getattr(model[0], name) for name in format.names], model[0]._header),
        test_utils=("test_schema", "test_faketensor"),
    )


class Asking(nn.Module):
    """A network that asks a layer for the dtype of its weight, as T5 and vision transformers do."""

    def __init__(self, one):
        super().__init__()
        self.one = one

    def forward(self, x):
        return self.one(x.to(self.one.weight.dtype))


@pytest.mark.parametrize(
    ("packed", "x"),
    [
        (lambda: SparseLinear.of(layer(), Bitmap()), X),
        (lambda: SparsePointwise.of(nn.Conv2d(8, 16, 1), Bitmap()), torch.randn(1, 8, 3, 3)),
        (lambda: SparseConv2d.of(nn.Conv2d(3, 16, 3), GroupCols(1)), torch.randn(1, 3, 8, 8)),
    ],
)
def test_a_network_that_asks_for_the_dtype_of_a_weight_is_compiled_and_exported(packed, x):
    model = Asking(packed())
    with torch.no_grad():
        wanted = model(x)
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), wanted)
        for strict in (False, True):
            exported = torch.export.export(model, (x,), strict=strict)
            assert torch.equal(exported.module()(x), wanted)
            left = any("unpacked" in str(node.target) for node in exported.graph.nodes)
            assert not left or strict  # it unpacked for nobody


def test_a_compiled_network_computes_with_the_weight_of_a_packed_layer():
    sparse = SparseLinear.of(layer(), Bitmap())
    compiled = torch.compile(lambda x: sparse(x) + sparse.weight.square().sum(), backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(X), sparse(X) + sparse.packed.dense().square().sum())


@each
def test_an_operator_takes_what_its_layer_made_ready_and_no_other(format, monkeypatch):
    sparse, other = SparseLinear.of(layer(0), format), SparseLinear.of(layer(1), format)
    made = []
    monkeypatch.setattr("secateur.formats.state.Packed", lambda *given: made.append(given) or Packed(*given))

    def called(one, tensors):
        return torch.ops.secateur.packed_linear(X, one.bias, tensors, one._header)

    tensors, others = ([getattr(one, name) for name in format.names] for one in (sparse, other))
    with torch.no_grad():
        assert torch.equal(called(sparse, tensors), sparse(X)) and not made
        mixed = [tensors[0].clone(), *tensors[1:]]  # a layer that nobody holds
        for _ in range(2):
            assert torch.equal(called(sparse, mixed), sparse(X)) and len(made) == 1, "the first tensor keeps it"
        equal = [tensors[0], *(t.clone() for t in tensors[1:])]  # as a compiled graph has it
        for _ in range(2):
            assert torch.equal(called(sparse, equal), sparse(X)) and len(made) == 2, "kept beside that of the layer"
        for _ in range(9):
            called(sparse, [tensors[0], *(t.clone() for t in tensors[1:])])
        assert len(sparse.packed.beside) == 4
        mixed[0].mul_(1)
        with pytest.raises(FormatError, match="changed after packing"):
            called(sparse, mixed)
        gone = weakref.ref(mixed[0])
        del mixed
        made.clear()
        gc.collect()
        assert gone() is None
        assert torch.equal(called(other, others), other(X))
        again = copy.deepcopy(sparse)
        assert torch.equal(called(again, [getattr(again, name) for name in format.names]), sparse(X))


def test_a_sign_that_torch_keeps_as_a_mark_is_seen():
    z = torch.complex(X, X.flip(0)).conj()
    assert z.imag.is_neg() and z.imag.is_contiguous() is False
    marked = torch._neg_view(X)
    linear, conv = layer(), nn.Conv2d(8, 16, 3)
    sparse, chained = SparseLinear.of(linear, Bitmap()), SparseConv2d.of(conv, GroupCols(4))
    pictures = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(sparse(marked), linear(-X))
        torch.testing.assert_close(sparse(z.imag), linear(-X.flip(0)))
        torch.testing.assert_close(chained(torch._neg_view(pictures)), conv(-pictures))
        for chain, x in (
            (LinearChain([sparse], [Product(0)], 1, [1]), X),
            (ConvChain([chained], [Link(0)], 1, [1]), pictures),
        ):
            torch.testing.assert_close(chain(torch._neg_view(x)), chain(-x))
            assert chain(-x).dtype is torch.float32


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float64, "meta"])
def test_a_layer_that_was_converted_says_so(kind):
    sparse = SparseLinear.of(layer(), Bitmap()).to(kind)
    with pytest.raises(FormatError, match=f"its layer was converted or moved since, to {kind}"):
        sparse(X)


def test_layers_are_given_their_input_by_the_name_that_torch_has_for_it():
    linear, point, conv = layer(), nn.Conv2d(8, 16, 1), nn.Conv2d(8, 16, 3)
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        torch.testing.assert_close(SparseLinear.of(linear, Bitmap())(input=X), linear(input=X))
        torch.testing.assert_close(SparsePointwise.of(point, Bitmap())(input=x), point(input=x))
        torch.testing.assert_close(SparseConv2d.of(conv, GroupCols(4))(input=x), conv(input=x))
