"""Patterns keep exactly what they were told, or raise."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur.axes import NM, Blocks, ChannelBlocks, PerMatrix, PerRow, PerSlab, Taps, keep_top
from secateur.axes.patterns import check_pattern
from secateur.errors import PatternError

INF = float("inf")


def kept(score: list[float], keep: int) -> list[bool]:
    return keep_top(torch.tensor(score), keep).tolist()


def test_ties_go_by_index_the_first_dropped_first() -> None:
    assert kept([1, 1, 1, 1], 2) == [False, False, True, True]
    assert kept([2, 1, 1, 1, 0], 2) == [True, False, False, True, False]
    assert kept([0.0, -0.0, 0.0], 1) == [False, False, True]


def test_none_all_and_one() -> None:
    assert kept([3, 1, 2], 0) == [False, False, False]
    assert kept([3, 1, 2], 3) == [True, True, True]
    assert kept([3, 1, 2], 1) == [True, False, False]
    assert kept([], 0) == []


def test_infinities_rank_and_nan_is_an_error() -> None:
    assert kept([INF, -INF, 0], 1) == [True, False, False]
    with pytest.raises(PatternError, match="NaN"):
        kept([1.0, float("nan")], 1)


@pytest.mark.parametrize("keep", [-1, 4])
def test_a_count_that_is_not_there_is_an_error(keep: int) -> None:
    with pytest.raises(PatternError, match="there are 3"):
        kept([1, 2, 3], keep)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.data())
def test_the_selector_is_a_stable_sort(values: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(0, len(values)))
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    wanted = [i in set(order[len(values) - keep :]) for i in range(len(values))]
    assert kept([float(v) for v in values], keep) == wanted
    half = keep_top(torch.tensor(values, dtype=torch.bfloat16), keep)
    assert half.tolist() == wanted


def test_rows_are_selected_each_for_itself() -> None:
    score = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [5, 5, 5, 5]])
    assert keep_top(score, 2).tolist() == [
        [False, False, True, True],
        [True, True, False, False],
        [False, False, True, True],
    ]


def test_only_what_is_within_is_kept() -> None:
    score, within = torch.tensor([9.0, 1, 2, 3]), torch.tensor([False, True, True, True])
    assert keep_top(score, 2, within).tolist() == [False, False, True, True]
    with pytest.raises(PatternError, match="only 3 are allowed"):
        keep_top(score, 4, within)


PATTERNS = [PerMatrix(), PerRow(), PerSlab(3), PerSlab(128), NM(2, 4), NM(1, 4), NM(4, 8), Blocks(4, 1), Blocks(2, 2)]
PATTERNS += [ChannelBlocks(n) for n in (1, 3, 4, 16)]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("shape", [(8, 16), (4, 8, 2, 2)], ids=str)
@pytest.mark.parametrize("keep", [0, 1, 33, 64, 128])
def test_every_pattern_keeps_exactly_the_nearest_count(pattern: object, shape: tuple[int, ...], keep: int) -> None:
    score = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    near = pattern.nearest(shape, keep)
    chosen = pattern.select(score, near)
    assert chosen.shape == score.shape
    assert chosen.dtype == torch.bool
    assert int(chosen.sum()) == near
    assert pattern.nearest(shape, near) == near


def groups_of(chosen: Tensor, m: int) -> Tensor:
    return chosen.movedim(1, -1).reshape(-1, m).sum(1)


def test_n_of_m_runs_over_input_features() -> None:
    chosen = NM(2, 4).select(torch.tensor([[1.0, 4, 2, 3, 8, 7, 6, 5]]), 4)
    assert chosen.tolist() == [[False, True, False, True, True, True, False, False]]
    kernel = torch.rand(4, 8, 3, 3, generator=torch.Generator().manual_seed(1))
    assert set(groups_of(NM(1, 4).select(kernel, 72), 4).tolist()) == {1}


def test_blocks_live_or_die_whole() -> None:
    score = torch.tensor([[1.0, 9], [1, 0], [5, 0], [5, 0]])
    assert Blocks(2, 1).select(score, 4).tolist() == [[False, True], [False, True], [True, False], [True, False]]


def test_blocks_of_output_channels_are_whole_kernels_and_the_last_rows_are_alone() -> None:
    score = torch.tensor([[1.0, 9], [2, 0], [5, 1], [1, 6], [0, 3]])  # blocks of two: 3, 9 and 6, 7; a row alone: 0, 3
    assert ChannelBlocks(2).select(score, 5).tolist() == [[False, True]] * 2 + [[False, True]] * 2 + [[False, True]]
    kernels = score[:4].reshape(4, 2, 1, 1).expand(4, 2, 3, 3)
    chosen = ChannelBlocks(2).select(kernels, 18)
    assert chosen[:, :, 1, 1].tolist() == [[False, True]] * 2 + [[False, False]] * 2
    assert torch.equal(chosen, chosen[:, :, :1, :1].expand(4, 2, 3, 3))
    within = torch.ones(4, 2, dtype=torch.bool)
    within[0, 1] = False  # a block of which one is not allowed is not
    assert ChannelBlocks(2).select(score[:4], 2, within).tolist() == [[False, False]] * 2 + [[False, True]] * 2


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 6), st.sampled_from([(), (3,), (2, 2)]), st.data())
def test_a_nearest_count_of_channel_blocks_is_its_own(n: int, rows: int, inputs: int, kernel: tuple, data) -> None:
    shape, pattern = (rows, inputs, *kernel), ChannelBlocks(n)
    keep = data.draw(st.integers(0, torch.Size(shape).numel()))
    near = pattern.nearest(shape, keep)
    assert pattern.nearest(shape, near) == near
    assert abs(near - keep) <= (n + 1) / 2 * torch.Size(kernel).numel()
    chosen = pattern.select(torch.rand(shape, generator=torch.Generator().manual_seed(0)), near)
    assert int(chosen.sum()) == near


@given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 6), st.data())
def test_with_fewer_to_keep_no_more_blocks_of_either_kind_stay(n: int, rows: int, inputs: int, data) -> None:
    pattern, keep = ChannelBlocks(n), data.draw(st.integers(1, rows * inputs))
    more, fewer = pattern.counts((rows, inputs), keep), pattern.counts((rows, inputs), keep - 1)
    assert fewer[0] <= more[0] and fewer[1] <= more[1]
    assert pattern.counts((rows, inputs), rows * inputs) == (rows // n * inputs, rows % n * inputs)


def test_blocks_of_four_come_evenly_among_the_kernels_of_two_rows_that_are_alone() -> None:
    # three blocks at 1/6, 1/2 and 5/6 of the way, six kernels at 1/12, 3/12, ...; 1, 5, 6, 7, 11, 12, 13, 17, 18 stay
    found = [ChannelBlocks(4).counts((6, 3), keep) for keep in (1, 2, 3, 4, 6, 7, 12, 14, 15, 17)]
    assert found == [(0, 1), (0, 1), (1, 1), (1, 1), (1, 2), (1, 3), (2, 4), (2, 5), (3, 5), (3, 5)]


def test_a_kernel_keeps_four_taps_in_the_shape_that_holds_most() -> None:
    corner = torch.tensor([[9.0, 8, 0], [1, 5, 2], [0, 3, 9]])  # the square at the left top: 23; no other above 19
    beside = torch.tensor([[0.0, 4, 0], [4, 1, 4], [0, 3, 0]])  # the centre and all beside it but the last
    chosen = Taps().select(torch.stack([corner, beside]).reshape(2, 1, 3, 3), 8)
    assert chosen[0, 0].int().tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 0]]
    assert chosen[1, 0].int().tolist() == [[0, 1, 0], [1, 1, 1], [0, 0, 0]]
    with pytest.raises(PatternError, match=r"the shape is \[2, 1, 5, 5\]"):
        Taps().nearest((2, 1, 5, 5), 8)
    with pytest.raises(PatternError, match="no shape left"):
        Taps().select(torch.ones(1, 1, 3, 3), 4, torch.zeros(1, 1, 3, 3, dtype=torch.bool))


def test_shapes_and_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(PatternError, match="a block has 18"):
        ChannelBlocks(2).select(torch.rand(4, 2, 3, 3), 9)
    with pytest.raises(PatternError, match=r"the shape is \[4\]"):
        ChannelBlocks(2).nearest((4,), 2)
    with pytest.raises(PatternError, match="a block has one at least"):
        ChannelBlocks(0)
    with pytest.raises(PatternError, match=r"multiple of 4.*\[64, 30\]"):
        NM(2, 4).nearest((64, 30), 960)
    with pytest.raises(PatternError, match="it keeps 8"):
        NM(2, 4).select(torch.rand(2, 8), 7)
    with pytest.raises(PatternError, match="4 to divide the rows"):
        Blocks(4, 1).nearest((6, 4), 4)
    with pytest.raises(PatternError, match="there are 3 rows"):
        PerRow().select(torch.rand(3, 4), 7)
    with pytest.raises(PatternError, match="0 < n <= m"):
        NM(5, 4)
    with pytest.raises(PatternError, match=r"sparsity=0.75"):
        check_pattern(NM(1, 4), 0.5)
