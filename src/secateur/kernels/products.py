"""Products of matrices that are added to a third, by a kernel where torch does not leave out half of them."""

import ctypes

import torch
from torch import Tensor

from secateur import kernels

ITEM = 64
"""Rows of an item: ROWS_OF_AN_ITEM of kernels/product.h."""

BLOCK = 256
"""Rows that go together where torch multiplies and only the lower triangle is wanted."""


class Strided(ctypes.Structure):
    """`Strided` of kernels/product.h."""

    _fields_ = (("data", ctypes.c_void_p), ("apart", ctypes.c_int64), ("step", ctypes.c_int64))


class Product(ctypes.Structure):
    """`Product` of kernels/product.h."""

    _fields_ = (
        ("left", Strided),
        ("right", Strided),
        ("to", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("apart", "rows", "columns", "depth")),
        ("scale", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("fresh", "lower")),
    )


def add_product(
    to: Tensor, left: Tensor, right: Tensor, scale: float = 1.0, *, fresh: bool = False, lower: bool = False
) -> None:
    """to [n, m] += scale * left [n, k] right [m, k]^T, in place; of bfloat16 products and sums are those of float32.

    With `fresh`, what `to` holds does not count; with `lower` only the lower triangle is wanted, and what is above it
    afterwards is not said.
    """
    kernel = _kernel(to, left, right)
    if kernel is not None:
        multiply(kernel, to, left, right, scale, fresh=fresh, lower=lower)
        return
    left, right = left.to(to.dtype), right.to(to.dtype)
    step = BLOCK if lower else max(len(to), 1)
    for a in range(0, len(to), step):
        b = min(a + step, len(to))
        some, own = (to[a:b, :b], right[:b]) if lower else (to, right)
        some.addmm_(left[a:b], own.T, beta=0 if fresh else 1, alpha=scale)


def multiply(
    kernel: kernels.Kernel, to: Tensor, left: Tensor, right: Tensor, scale: float, *, fresh: bool, lower: bool
) -> None:
    """The same by a kernel: `to` in float32, rows in one piece, `left` and `right` of its dtype, rows or columns so."""
    (rows, columns), depth = to.shape, left.shape[1]
    given = (Strided(matrix.data_ptr(), *matrix.stride()) for matrix in (left, right))
    call = Product(*given, to.data_ptr(), to.stride(0), rows, columns, depth, scale, fresh, lower)
    kernels.run(kernel, call, -(-rows // ITEM))


_NAMES = {torch.float32: "product_f32", torch.bfloat16: "product_bf16"}


def _kernel(to: Tensor, left: Tensor, right: Tensor) -> kernels.Kernel | None:
    """What multiplies these, or None where torch has to; the oracle is slower than that."""
    if any(t.device.type != "cpu" for t in (to, left, right)) or to.dtype is not torch.float32 or to.stride(1) != 1:
        return None
    if left.dtype is not right.dtype or left.dtype not in _NAMES or any(1 not in t.stride() for t in (left, right)):
        return None
    kernel = kernels.find(_NAMES[left.dtype])
    return None if kernel is None or kernel.level == "base" else kernel
