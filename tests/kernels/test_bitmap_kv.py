"""Attention to a packed past: every variant against float64, on shapes that fit tiles and that do not."""

import pytest
import torch

from secateur import kernels
from secateur.axes.cached import PerChannel, PerToken
from secateur.cache.attention import attend
from secateur.cache.past import Past, Pruning

CLOSE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# batch, heads, queries a head, width, tokens: one, primes, several chunks of scores, tiles by four, two and one, more
# queries than share a register
SHAPES = [
    (2, 3, 3, 64, 1500),
    (1, 2, 1, 32, 4700),
    (1, 1, 1, 128, 230),
    (1, 1, 2, 64, 2300),
    (1, 1, 4, 40, 1300),
    (1, 2, 4, 128, 90),
    (2, 2, 2, 8, 70),
    (1, 2, 2, 128, 180),
    (1, 1, 7, 80, 200),
    (1, 1, 5, 33, 65),
]


def case(shape, dtype, sparsity=0.7, choice=PerToken(), window=5):  # noqa: B008
    """A past with tokens packed and a window, and the query of the next token."""
    batch, heads, group, width, tokens = shape
    made = torch.Generator().manual_seed(0)

    def noise(*shape):
        return torch.randn(shape, generator=made).to(dtype)

    past = Past(Pruning(sparsity, 0.5, window=window, values=choice))
    past.append_(noise(batch, heads, tokens, width), noise(batch, heads, tokens, width))
    past.settle_(noise(batch, heads * group, tokens, width))
    past.append_(noise(batch, heads, 1, width), noise(batch, heads, 1, width))
    return past, 2 * noise(batch, heads * group, 1, width), torch.rand(batch, 1, 1, tokens + 1, generator=made) > 0.3


def exact(past, query, mask):
    keys, values = (t.double().repeat_interleave(query.shape[1] // t.shape[1], 1) for t in past.dense())
    scores = query.double() @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ values


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_variant_attends(shape, dtype):
    for choice in (PerToken(), PerChannel()):
        past, query, mask = case(shape, dtype, choice=choice)
        for seen in (None, mask):
            wanted = exact(past, query, seen)
            for level in kernels.levels():
                with kernels.forced(level):
                    got = attend(query, past, seen, shape[3] ** -0.5)
                error = (got.double() - wanted).abs().max() / wanted.abs().max()
                assert error < CLOSE[dtype], f"{level}, {choice}"


def test_newest_tokens_of_several_chunks():
    past, query, mask = case((1, 1, 1, 32, 4500), torch.float32, window=4300)
    wanted = exact(past, query, mask)
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, mask, 32**-0.5)
        assert (got.double() - wanted).abs().max() / wanted.abs().max() < CLOSE[torch.float32], level


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.99])
def test_at_any_sparsity(sparsity):
    past, query, mask = case((2, 2, 3, 64, 300), torch.float32, sparsity)
    for level in kernels.levels():
        with kernels.forced(level):
            torch.testing.assert_close(
                attend(query, past, mask, 0.125).double(), exact(past, query, mask), atol=1e-5, rtol=1e-4
            )


def test_a_row_that_may_see_nothing_is_zero_and_masked_tokens_do_not_matter():
    past, query, mask = case((2, 2, 3, 64, 1100), torch.float32)
    mask[0], mask[1, :, :, :600] = False, False
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, mask, 0.125)
        assert torch.equal(got[0], torch.zeros_like(got[0]))
        torch.testing.assert_close(got[1].double(), exact(past, query, mask)[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates(value):
    past, query, _ = case((1, 2, 3, 64, 300), torch.float32)
    query[0, 4, 0, 7] = value
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, None, 0.125)
        assert bool(got[0, 4].isnan().all())
        assert bool(got[0, [0, 1, 2, 3, 5]].isfinite().all())


def test_threads_do_not_change_the_result():
    past, query, mask = case((2, 3, 3, 64, 500), torch.bfloat16)
    alone, before = attend(query, past, mask, 0.125), torch.get_num_threads()
    try:
        for threads in (2, 3, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(attend(query, past, mask, 0.125), alone) for _ in range(10))
    finally:
        torch.set_num_threads(before)


def test_where_there_is_room_for_more_tiles():
    past, query, _ = case((1, 2, 3, 64, 700), torch.float32)
    for step in range(300):
        if past.packed.key_bits.shape[2] > past.packed.tiles:
            break
        new = torch.randn(1, 2, 1, 64, generator=torch.Generator().manual_seed(step))
        past.append_(new, new.flip(-1))
        past.settle_(query)
    assert past.packed.key_bits.shape[2] > past.packed.tiles
    past.append_(new, new)
    torch.testing.assert_close(
        attend(query, past, None, 0.125).double(), exact(past, query, None), atol=1e-5, rtol=1e-4
    )
