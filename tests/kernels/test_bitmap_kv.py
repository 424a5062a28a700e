"""Attention to a packed past: every variant against float64, on shapes that fit tiles and that do not."""

import pytest
import torch

from secateur import kernels
from secateur.axes.cached import PerChannel, PerToken
from secateur.cache.attention import attend
from secateur.cache.past import Past, Pruning

CLOSE = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 6e-4}
# batch, heads, queries a head, width, tokens: one, primes, several chunks of scores, tiles by four, two and one, more
# queries than share a register or a tile, more words than there are tiles for sums
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
    (1, 2, 8, 128, 1200),
    (1, 1, 9, 96, 300),
    (1, 1, 6, 160, 200),
]
LONG = [(1, 1, 3, 64, 9000), (1, 1, 4, 30, 9000), (1, 1, 5, 96, 6000), (1, 1, 7, 128, 5000), (1, 1, 8, 128, 5000)]


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


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, dtype) for shape in SHAPES for dtype in CLOSE), *((shape, torch.bfloat16) for shape in LONG)],
)
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


def test_tokens_that_are_all_masked_by_the_lowest_float_count_alike():
    """As in a dense softmax: what is added is the same for all, and large beyond any score."""
    past, query, _ = case((1, 2, 3, 64, 300), torch.float32)
    lowest = torch.full((1, 1, 1, 301), torch.finfo(torch.float32).min)
    wanted = past.dense()[1].double().mean(2, keepdim=True).repeat_interleave(3, 1)
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, lowest, 0.125).double()
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4, msg=level)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_propagates(value, dtype):
    past, query, _ = case((1, 2, 3, 64, 300), dtype)
    query[0, 4, 0, 7] = value
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, None, 0.125)
        assert bool(got[0, 4].isnan().all())
        assert bool(got[0, [0, 1, 2, 3, 5]].isfinite().all())


@pytest.mark.parametrize("width", [64, 160])
def test_infinity_in_the_cache_does_not_reach_its_neighbours(width):
    """A token that a query turns from entirely, one that it turns to, and a channel without bound."""
    made = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 1, 1, 96, width, generator=made).bfloat16()
    query = torch.randn(1, 4, 1, width, generator=made).bfloat16()
    query[0, :2, 0, 3], query[0, 2:, 0, 3] = -1, 1
    for place in ("keys", "values"):
        own = [keys.clone(), values.clone()]
        own[place == "values"][0, 0, 9, 3] = float("inf")
        past = Past(Pruning(0.5, 0.5, window=0))
        past.append_(*own)
        past.settle_(query.expand(-1, -1, 2, -1))
        wanted = exact(past, query, None)
        for level in kernels.levels():
            with kernels.forced(level):
                got = attend(query, past, None, width**-0.5).double()
            there = wanted.isfinite()
            assert torch.equal(got.isfinite(), there), f"{level}, {place}"
            assert torch.equal(got.isnan(), wanted.isnan()), f"{level}, {place}"
            torch.testing.assert_close(got[there], wanted[there], atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("group", [2, 4, 8])
def test_weights_of_tokens_are_not_rounded_to_bfloat16(group):
    """One token has most of the weight, and of the rest nothing is lost: what comes out is rounded once."""
    past, query, _ = case((1, 1, group, 64, 640), torch.bfloat16)
    wanted = exact(past, query, None)
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, None, 0.125).double()
        # Half of the last of eight bits, and what sums of floats and the lower halves leave.
        assert bool(((got - wanted).abs() <= wanted.abs() * 2**-8 + 2e-5).all()), level


@pytest.mark.parametrize("width", [32, 64, 96, 128])
@pytest.mark.parametrize("group", [1, 3, 4, 8])
def test_of_two_tokens_that_cancel_among_thousands_nothing_is_lost(group, width):
    """Most tokens weigh next to nothing and may be rounded; two weigh much, with opposite values, and one has none."""
    made = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(2, 1, 1, 6100, width, generator=made) / 4).bfloat16()
    query = torch.zeros(1, group, 1, width)
    query[..., :8] = 2 + torch.rand(1, group, 1, 8, generator=made) / 16
    query = query.bfloat16()
    value = torch.randn(width, generator=made).bfloat16()
    for token, large, sign in ((100, 9.0, 0), (3001, 8.0, 1), (5000, 7.9, -1)):
        keys[0, 0, token], values[0, 0, token] = 0, sign * value
        keys[0, 0, token, :8] = large * width**0.5 / 16  # a score of a little more than `large`
    past = Past(Pruning(0.5, 0.25, window=7))
    past.append_(keys, values)
    past.settle_(query.expand(-1, -1, 2, -1))
    wanted = exact(past, query, None)
    for level in kernels.levels():
        with kernels.forced(level):
            got = attend(query, past, None, width**-0.5).double()
        assert bool(((got - wanted).abs() <= wanted.abs() * 2**-8 + 2e-5).all()), level


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
