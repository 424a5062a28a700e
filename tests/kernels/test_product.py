"""The compiled products against float64, at every level of this machine, and what is never written."""

import pytest
import torch

from secateur import kernels
from secateur.evidence import add_gram_, mirror_
from secateur.kernels.products import add_product, multiply

SHAPES = ((1, 1, 1), (8, 48, 128), (9, 49, 129), (64, 1, 33), (1, 64, 2), (100, 77, 13), (130, 97, 0), (33, 40, 270))
LARGE = ((781, 50, 31), (70, 60, 1100))  # more rows, and more numbers of each, than are laid out at once


def matrix(rows, columns, dtype, turned, made):
    """With rows in one piece or columns, and what lies about it not a number."""
    shape = (columns, rows) if turned else (rows, columns)
    room = torch.full((shape[0] + 2, shape[1] + 3), float("nan"), dtype=dtype)
    room[1:-1, 1:-2] = torch.randn(shape, generator=made).to(dtype)
    found = room[1:-1, 1:-2]
    return found.T if turned else found


def levels(dtype):
    """Each variant of the kernel once."""
    found = {}
    for level in kernels.levels():
        with kernels.forced(level):
            kernel = kernels.find("product_f32" if dtype is torch.float32 else "product_bf16")
            found[kernel.level] = kernel
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [(False, False), (True, True), (False, True), (True, False)])
def test_a_product_is_that_of_float64_and_nothing_else_is_written(dtype, turned):
    made = torch.Generator().manual_seed(0)
    for rows, columns, depth in (*SHAPES, *LARGE):
        left, right = (matrix(n, depth, dtype, t, made) for n, t in zip((rows, columns), turned, strict=True))
        before = matrix(rows, columns, torch.float32, False, made)
        size = (before.double().abs() + left.double().abs() @ right.double().abs().T).add(1)
        for level, kernel in levels(dtype).items():
            for fresh, scale in ((False, -0.5), (True, 2.0)):
                room = torch.full((rows + 2, columns + 5), float("nan"))
                to = room[1:-1, 2:-3]
                to.copy_(before if not fresh else float("inf"))
                multiply(kernel, to, left, right, scale, fresh=fresh, lower=False)
                wanted = (0 if fresh else before.double()) + scale * (left.double() @ right.double().T)
                assert ((to - wanted).abs() / size).max() < 1e-5, (level, rows, columns, depth, fresh)
                to.fill_(float("nan"))
                assert room.isnan().all(), (level, rows, columns, depth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_lower_triangle_is_whole(dtype):
    made = torch.Generator().manual_seed(1)
    for size, depth in ((1, 3), (47, 20), (100, 5), (1700, 3)):
        x = matrix(depth, size, dtype, False, made)
        wanted = (x.double().T @ x.double()).tril()
        for level, kernel in levels(dtype).items():
            to = torch.full((size, size), float("inf"))
            multiply(kernel, to, x.T, x.T, 1.0, fresh=True, lower=True)
            assert (to.tril() - wanted).abs().max() < 1e-4, (level, size)


def test_what_is_not_a_number_stays_so_in_its_row_and_column():
    for dtype in (torch.float32, torch.bfloat16):
        for kernel in levels(dtype).values():
            left, right = torch.ones(20, 40, dtype=dtype), torch.ones(50, 40, dtype=dtype)
            left[3, 7], right[5, 39] = float("nan"), float("inf")
            to = torch.empty(20, 50)
            multiply(kernel, to, left, right, 1.0, fresh=True, lower=False)
            assert to[3].isnan().all() and to[:3, 5].isinf().all()
            to[3], to[:, 5] = 40, 40
            assert (to == 40).all()


@pytest.mark.parametrize("lower", [False, True])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_change_nothing(threads, lower):
    made = torch.Generator().manual_seed(0)
    left = torch.randn(900, 200, generator=made)
    right = left if lower else torch.randn(90, 200, generator=made)
    before = torch.get_num_threads()
    found = []
    try:
        for n in (1, threads):
            torch.set_num_threads(n)
            to = torch.zeros(900, len(right))
            add_product(to, left, right, lower=lower)
            found.append(to.tril() if lower else to)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_torch_does_the_same_where_there_is_no_kernel(dtype, monkeypatch):
    x = torch.randn(37, 530, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = []
    for kernel in (None, *kernels.levels()):
        with monkeypatch.context() as patched:
            if kernel is None:
                patched.setattr(kernels, "find", lambda name: None)
            else:
                patched.setenv(kernels.FORCED, kernel)
                kernels._found.cache_clear()
            total = torch.zeros(530, 530, dtype=torch.float64)
            add_gram_(total, x)
            add_gram_(total, x[:5])
            mirror_(total)
            found.append(total)
        kernels._found.cache_clear()
    wanted = x.double().T @ x.double() + x[:5].double().T @ x[:5].double()
    for total in found:
        torch.testing.assert_close(total, wanted, rtol=1e-4, atol=1e-4)
        assert torch.equal(total, total.T)
