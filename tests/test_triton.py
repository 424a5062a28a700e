"""Attention to a packed past in Triton: on a graphics card where one is, else under Triton's interpreter."""

import importlib
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from secateur.axes.cached import PerToken
from secateur.cache.past import Past, Pruning
from secateur.formats import bitmap_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# batch, heads, queries a head, width, tokens: widths that are no power of two, more queries than 16, several runs
SHAPES = [(2, 3, 3, 64, 330), (1, 2, 1, 128, 100), (1, 1, 18, 16, 70), (2, 1, 5, 33, 65)]


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = DEVICE == "cuda" or INTERPRETED


@pytest.fixture(scope="module")
def attend():
    pytest.importorskip("triton", reason="triton is not installed, without which there is no kernel for cards")
    if not HERE:
        pytest.skip("there is no card; test_under_the_interpreter runs this in a process of its own")
    return importlib.import_module("secateur.kernels.bitmap_kv_triton").attend


@pytest.mark.skipif(HERE, reason="the tests below run here")
def test_under_the_interpreter():
    """In a process of its own: triton has to be told before anything imports it, and torch may have done so here."""
    if find_spec("triton") is None:
        pytest.skip("triton is not installed, without which there is no kernel for cards")
    run = [sys.executable, "-m", "pytest", "-x", "-o", "addopts=", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(run, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0 and "passed" in done.stdout, done.stdout[-3000:]


def case(shape, dtype, sparsity=0.7, window=5):
    batch, heads, group, width, tokens = shape
    made = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=made).to(dtype).to(DEVICE)

    past = Past(Pruning(sparsity, 0.5, window=window, keys=PerToken()))
    past.append_(noise(batch, heads, tokens, width), noise(batch, heads, tokens, width))
    past.settle_(noise(batch, heads * group, tokens, width))
    past.append_(noise(batch, heads, 1, width), noise(batch, heads, 1, width))
    bias = torch.zeros(batch, tokens + 1).masked_fill_(torch.rand(batch, tokens + 1, generator=made) > 0.7, -torch.inf)
    return past, 2 * noise(batch, heads * group, 1, width), bias.to(DEVICE)


def exact(past, query, bias=None):
    keys, values = (t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in past.dense())
    scores = query.double() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    return (scores if bias is None else scores + bias[:, None, None]).softmax(-1) @ values


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_attends_as_the_formula_says(attend, shape, dtype):
    past, query, bias = case(shape, dtype)
    for seen in (None, bias):
        got, wanted = attend(past.packed, *past.tail, query, seen, shape[3] ** -0.5), exact(past, query, seen)
        assert got.dtype is dtype
        assert (got.double() - wanted).abs().max() / wanted.abs().max() < CLOSE[dtype]


def test_with_a_long_tail_and_room_for_more(attend):
    past, query, _ = case((1, 2, 2, 16, 582), torch.float32, window=70)
    more = torch.randn(2, 1, 2, 32, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    past.append_(*more)
    past.settle_(query)
    assert past.packed.key_bits.shape[2] > past.packed.tiles
    got = attend(past.packed, *past.tail, query, None, 0.25)
    torch.testing.assert_close(got.double(), exact(past, query), atol=1e-5, rtol=1e-4)


def test_masked_rows_are_zero_and_what_is_not_finite_propagates(attend):
    past, query, bias = case((2, 1, 3, 16, 330), torch.float32)
    bias[0], bias[1, :200] = -torch.inf, -torch.inf
    query[1, 2, 0, 3] = float("nan")
    got = attend(past.packed, *past.tail, query, bias, 0.25)
    assert torch.equal(got[0], torch.zeros_like(got[0]))
    assert bool(got[1, 2].isnan().all())
    torch.testing.assert_close(got[1, :2].double(), exact(past, query, bias)[1, :2], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(DEVICE == "cpu", reason="there is no graphics card here, on which the cache would find the kernel")
def test_on_a_card_the_cache_finds_it(attend):
    past, query, _ = case((1, 2, 3, 64, 330), torch.bfloat16)
    got = bitmap_kv.attend(past.packed, *past.tail, query, None, 0.125)
    assert torch.equal(got, attend(past.packed, *past.tail, query, None, 0.125))
