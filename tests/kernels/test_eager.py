"""Packed layers where torch records, intercepts or transforms what is computed: never numbers that it does not see."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from secateur.formats import Bitmap, GroupCols
from secateur.formats.chain import ConvChain, Link
from secateur.formats.conv import SparseConv2d, convolve
from secateur.formats.linear import SparseLinear
from secateur.formats.linear_chain import LinearChain
from secateur.formats.planned import RELU
from secateur.formats.program import Product


def seeded(make):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().requires_grad_(False)


def linear(inputs, outputs):
    return SparseLinear.of(seeded(lambda: nn.Linear(inputs, outputs)), Bitmap())


def convolution():
    return SparseConv2d.of(seeded(lambda: nn.Conv2d(4, 4, 3, padding=1)), GroupCols(4))


def chain():
    return LinearChain([linear(32, 16), linear(16, 8)], [Product(0, RELU), Product(1)], 1, [2])


def product():
    packed = linear(32, 16).packed
    return lambda x: packed.matmul(x)


def slide():
    packed = convolution().packed
    return lambda x: convolve(packed, x, padding=(1, 1))


LAYERS = {
    "linear": (lambda: linear(32, 16), (3, 32)),
    "linear chain": (chain, (3, 32)),
    "convolution": (convolution, (2, 4, 9, 9)),
    "convolutions": (lambda: ConvChain([convolution(), convolution()], [Link(0), Link(1, 0)], 1, [2]), (2, 4, 9, 9)),
    "product": (product, (3, 32)),
    "slide": (slide, (2, 4, 9, 9)),
}


@pytest.fixture(params=LAYERS)
def case(request):
    """What computes, numbers, and others."""
    make, shape = LAYERS[request.param]
    made = torch.Generator().manual_seed(1)
    return make(), torch.randn(shape, generator=made), torch.randn(shape, generator=made)


def alike(one, other):
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_trace_computes_with_what_it_is_given(case):
    layer, x, other = case
    with torch.no_grad():
        alike(torch.jit.trace(layer, (x,), check_trace=False)(other), layer(other))
        alike(make_fx(layer)(x)(other), layer(other))


def test_batches_and_derivatives_of_torch_func(case):
    layer, x, other = case
    both = torch.stack([x, other])
    torch.func.grad(lambda a: layer(a).sum())(x)  # what is kept of that can be used elsewhere
    with torch.no_grad():
        alike(torch.vmap(layer)(both), torch.stack([layer(x), layer(other)]))
    step = torch.func.jvp(layer, (x,), (other,))[1]
    with forward_ad.dual_level(), torch.no_grad():
        found = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, other))).tangent
    given = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(layer(given).sum(), given)
    alike(step, found)
    alike(torch.func.grad(lambda a: layer(a).sum())(x), backward)
    alike(step.sum(), (backward * other).sum())
    recorded = make_fx(lambda a, b: torch.func.jvp(layer, (a,), (b,))[1])(x, other)
    alike(recorded(x, other), step)


def test_what_has_no_numbers_is_not_read(case):
    layer, x, _ = case
    with torch.no_grad():
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            found = layer(mode.from_tensor(x))
        assert found.shape == layer(x).shape
        alike(torch.vmap(layer)(x.unsqueeze(0))[0], layer(x))  # a dense weight was kept that is made of something


def test_a_mode_keeps_the_gradient(case):
    layer, x, _ = case
    given = x.clone().requires_grad_()
    with FlopCounterMode(display=False):
        layer(given).sum().backward()
    assert given.grad.abs().sum() > 0
    with torch.no_grad(), FlopCounterMode(display=False):
        alike(layer(x), layer(x))


def test_another_class_of_tensor_is_seen_by_its_own_code(case):
    layer, x, _ = case

    class Doubled(torch.Tensor):
        """Whose outcomes are twice as large."""

        calls = 0

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            Doubled.calls += 1
            return super().__torch_function__(func, types, args, kwargs or {})

    with torch.no_grad():
        alike(layer(x.as_subclass(Doubled)).as_subclass(torch.Tensor), layer(x))
    assert Doubled.calls
