"""The compiled choice and the compiled sweep, against the formulas they stand for, at every level of this machine."""

import pytest
import torch

from secateur import kernels
from secateur.axes import NM, PerRow, keep_top
from secateur.axes.criteria import gram_factor
from secateur.axes.patterns import PerSlab
from secateur.axes.solvers import Columns, ObsSweep
from secateur.errors import PatternError


def plain(score, keep):
    """By a stable sort: of equals the first go."""
    order = score.sort(dim=-1, stable=True).indices
    return torch.ones_like(score, dtype=torch.bool).scatter_(-1, order[..., : score.shape[-1] - keep], False)


def scores(kind, shape):
    made = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=made)
    if kind == "ties":
        return (2 * x).round() * torch.where(torch.rand(shape, generator=made) > 0.5, 1.0, -1.0)  # both zeros, too
    if kind == "alike":
        return torch.full(shape, -2.5)
    if kind == "far apart":
        x = x * 10.0 ** torch.randint(-37, 38, shape, generator=made)
        x[..., 0], x[..., -1] = float("-inf"), float("inf")
    return x


@pytest.mark.parametrize("kind", ["any", "ties", "alike", "far apart"])
def test_exactly_those_that_a_stable_sort_would_keep(kind):
    for shape in ((1, 1), (5, 2), (67, 4), (33, 8), (9, 16), (4, 3), (3, 17), (7, 101), (2, 1030), (1, 40001)):
        score = scores(kind, shape)
        for keep in {0, 1, shape[1] // 3, shape[1] // 2, shape[1] - 1, shape[1]}:
            wanted = plain(score, keep)
            for level in kernels.levels():
                with kernels.forced(level):
                    assert torch.equal(keep_top(score, keep), wanted), f"{level} {shape} {keep}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_16_bits_are_ranked_as_they_are_piece_by_piece(dtype):
    for shape in ((3, 50, 4099), (1, 300001)):
        score = scores("any", shape).to(dtype).transpose(0, -1).contiguous().transpose(0, -1)
        wanted = plain(score.float(), shape[-1] // 3)
        for level in kernels.levels():
            with kernels.forced(level):
                assert torch.equal(keep_top(score, shape[-1] // 3), wanted), f"{level} {shape}"
        score[0, ..., 7] = float("nan")
        with pytest.raises(PatternError, match="some scores are NaN"):
            keep_top(score, 5)


@pytest.mark.parametrize("width", [4, 16, 50, 40000])
def test_a_score_that_is_no_number_is_refused(width):
    for place in (0, width - 1):
        score = scores("any", (3, width))
        score[2, place] = float("nan")
        for level in kernels.levels():
            with kernels.forced(level), pytest.raises(PatternError, match="some scores are NaN"):
                keep_top(score, width // 2)


def test_groups_are_the_same_with_and_without_a_kernel(monkeypatch):
    score = scores("ties", (64, 96))
    for n, m in ((2, 4), (4, 8), (1, 16), (3, 6), (1, 2)):
        pattern = NM(n, m)
        here = pattern.select(score, 64 * 96 * n // m)
        with monkeypatch.context() as patched:
            patched.setattr(kernels, "find", lambda name: None)
            assert torch.equal(pattern.select(score, 64 * 96 * n // m), here)


@pytest.mark.parametrize("pattern", [PerSlab(), NM(2, 4), PerRow()], ids=lambda pattern: type(pattern).__name__)
@pytest.mark.parametrize("rows", [1, 16, 37, 70])
def test_the_sweep_is_that_of_the_formula(rows, pattern, monkeypatch):
    made = torch.Generator().manual_seed(rows)
    weight, inputs = torch.randn(rows, 152, generator=made), torch.randn(400, 152, generator=made)
    inputs[:, [3, 77]] = 0
    gram = (inputs.T @ inputs).double()
    solver = ObsSweep(pattern, block=64)
    with monkeypatch.context() as patched:
        patched.setattr(kernels, "find", lambda name: None)
        mask, value = solver.sweep(weight, gram, rows * 76)
    for level in kernels.levels():
        with kernels.forced(level):
            found = solver.sweep(weight, gram, rows * 76)
        assert (found[0] == mask).float().mean() > 0.999
        same = (found[0] == mask).all(1)
        torch.testing.assert_close(found[1][same], value[same], atol=1e-4, rtol=1e-3)
        assert not found[1][~found[0]].any() and not found[1][:, [3, 77]].any()
    assert gram_factor(gram, 0.01)[0].stride(1) == 1


@pytest.mark.parametrize("columns", [1, 4, 7, 8, 9, 16, 17, 40, 130])
def test_columns_in_turn_are_those_of_float64_and_nothing_else_is_written(columns):
    made = torch.Generator().manual_seed(columns)
    factor = torch.randn(columns, columns + 3, generator=made)[:, :columns].tril(-1) / 8
    factor.diagonal().fill_(1.5)
    factor = torch.cat([factor, torch.full((columns, 5), float("nan"))], 1)[:, :columns]
    for rows in (1, 16, 17, 32, 33, 70):
        room = torch.full((3, rows + 2, columns + 6), float("nan"))
        plain, push, change = (part[1:-1, 2 : columns + 2] for part in room)
        for part in (plain, push):
            part.copy_(torch.randn(rows, columns, generator=made))
        stays = torch.rand(rows, columns, generator=made) > 0.5
        asked = push.clone()
        w, due = plain.double(), push.double()
        free = w + torch.linalg.solve_triangular(factor.double(), due.T, upper=False).T
        lost = torch.zeros_like(w)
        for j in range(columns):
            mended = w[:, j] + (due[:, j] + lost[:, :j] @ factor.double()[j, :j]) / factor[j, j].double()
            lost[:, j] = w[:, j] - mended * stays[:, j]
        for level in kernels.levels():
            with kernels.forced(level):
                push.copy_(asked)
                some = Columns(plain, push, factor)
                score = torch.empty(rows, columns)
                some.run(kernels.find("sweep_f32"), None, score)
                for each in (score, some.saliency()):
                    torch.testing.assert_close(each.double(), (1.5 * free).square(), atol=1e-3, rtol=1e-3)
                assert torch.equal(push, asked), level
                some.settle(stays, change)
            torch.testing.assert_close(change.double(), lost, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(push.double(), w - lost, atol=1e-4, rtol=1e-4)
            assert not push[~stays].any()
            assert int(room.isfinite().sum()) == 3 * rows * columns, level
