"""Positions that live and die together: union-find over the entries of dimensions, with products.

Every entry of every dimension is a POSITION, an integer. Two things are said of positions:

    unify(x, y)      x is removed exactly when y is
    join(a, b)       entry (i, j) of a flattened dimension is removed when a[i] or b[j] is

So a dimension of 576 that a reshape splits into 9 heads of 64 becomes 576 products of 9 + 64 positions. Unifying two
products unifies their factors, the way terms are unified in type inference; two products of one size that were split
at different places are split at both. All of it works on whole dimensions at a time, and memory grows with the sum
of the lengths of the dimensions, not with their product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]

_DEEPEST = 24  # a product nested deeper than this is one that contains itself


class Positions:
    """The positions of one model, and what is known of them."""

    def __init__(self) -> None:
        self._count = 0
        self._parent: Ints = np.zeros(1024, np.int64)
        self._left: Ints = np.full(1024, -1, np.int64)  # of a product: its outer factor
        self._right: Ints = np.full(1024, -1, np.int64)  # its inner factor
        self._stride: Ints = np.zeros(1024, np.int64)  # how many inner positions there are
        self._frozen: npt.NDArray[np.bool_] = np.zeros(1024, bool)
        self._marks: npt.NDArray[np.uint8] = np.zeros(1024, np.uint8)
        self.conflicts = 0  # pairs that no common splitting fits: frozen

    def __len__(self) -> int:
        return self._count

    def fresh(self, n: int, frozen: bool = False) -> Ints:
        """New positions [n], tied to nothing."""
        start, end = self._count, self._count + n
        if end > len(self._parent):
            more = max(end, 2 * len(self._parent)) - len(self._parent)
            self._parent = np.concatenate([self._parent, np.zeros(more, np.int64)])
            self._left = np.concatenate([self._left, np.full(more, -1, np.int64)])
            self._right = np.concatenate([self._right, np.full(more, -1, np.int64)])
            self._stride = np.concatenate([self._stride, np.zeros(more, np.int64)])
            self._frozen = np.concatenate([self._frozen, np.zeros(more, bool)])
            self._marks = np.concatenate([self._marks, np.zeros(more, np.uint8)])
        self._count = end
        found = np.arange(start, end)
        self._parent[start:end] = found
        self._frozen[start:end] = frozen
        return found

    def find(self, x: Ints) -> Ints:
        """The one position that stands for each one's class."""
        root = self._parent[x]
        while True:
            above = self._parent[root]
            if np.array_equal(above, root):
                break
            root = above
        self._parent[x] = root
        return root

    def pair(self, outer: Ints, inner: Ints, stride: int | Ints) -> Ints:
        """New positions [n], the k-th removed when outer[k] or inner[k] is; `stride` inner ones to an outer one."""
        found = self.fresh(len(outer))
        self._left[found], self._right[found], self._stride[found] = outer, inner, stride
        return found

    def join(self, factors: Sequence[Ints]) -> Ints:
        """The positions of a dimension that flattens these, outermost first."""
        wide = [f for f in factors if len(f) != 1]
        if not wide:
            return factors[0]
        total = wide[-1]
        for outer in reversed(wide[:-1]):
            if self.all_frozen(outer) and self.all_frozen(total):
                total = self.fresh(len(outer) * len(total), frozen=True)
                continue
            n, m = len(outer), len(total)
            total = self.pair(np.repeat(outer, m), np.tile(total, n), m)
        return total

    def split(self, x: Ints, sizes: Sequence[int]) -> list[Ints]:
        """The positions of the dimensions that one dimension is reshaped to, outermost first."""
        wide = [s for s in sizes if s != 1]
        if len(wide) <= 1:
            found = iter([x])
        elif self.all_frozen(x):
            found = iter([self.fresh(s, frozen=True) for s in wide])
        else:
            factors = [self.fresh(s) for s in wide]
            self.unify(x, self.join(factors))
            found = iter(factors)
        return [next(found) if s != 1 else self.fresh(1) for s in sizes]

    def unify(self, x: Ints, y: Ints) -> None:
        """Say that x[k] is removed exactly when y[k] is, for every k."""
        work = [(x, y)]
        rounds = 0
        while work:
            x, y = work.pop()
            rounds += 1
            x, y = self.find(x), self.find(y)
            apart = x != y
            if not apart.any():
                continue
            x, y = x[apart], y[apart]
            if rounds > 2000:  # only a product that contains itself goes on for ever
                self._give_up(x, y)
                continue
            product_x, product_y = self._left[x] >= 0, self._left[y] >= 0
            both = product_x & product_y
            if not both.all():
                a, b = x[~both], y[~both]
                # A plain position goes under a product, else the later under the earlier: no cycle can arise.
                swap = product_x[~both] | (~product_y[~both] & (a < b))
                child, root = np.where(swap, b, a), np.where(swap, a, b)
                self._hook(child, root)
                work.append((a, b))
            if both.any():
                a, b = x[both], y[both]
                # The one whose inner factor is longer first.
                swap = self._stride[a] < self._stride[b]
                a, b = np.where(swap, b, a), np.where(swap, a, b)
                if len(a) > 64:
                    a, b = np.unique(np.stack([a, b]), axis=1)
                self._match(a, b, work)

    def _match(self, a: Ints, b: Ints, work: list[tuple[Ints, Ints]]) -> None:
        long, short = self._stride[a], self._stride[b]
        unfit = long % short != 0
        if unfit.any():
            self._give_up(a[unfit], b[unfit])
        same, finer = long == short, (long != short) & ~unfit
        if same.any():
            p, q = a[same], b[same]
            work += [(self._left[p], self._left[q]), (self._right[p], self._right[q])]
            # Under the earlier one; a pair that another pair of this batch overrode comes up again.
            self._hook(np.maximum(p, q), np.minimum(p, q))
            work.append((p, q))
        if finer.any():
            p, q = a[finer], b[finer]
            middle = self.fresh(len(p))
            inner = self.pair(middle, self._right[q], self._stride[q])
            outer = self.pair(self._left[p], middle, long[finer] // short[finer])
            work += [(self._right[p], inner), (self._left[q], outer)]
            self._hook(q, p)
            work.append((p, q))

    def _hook(self, child: Ints, root: Ints) -> None:
        self._parent[child] = root
        frozen = self._frozen[child]
        if frozen.any():
            self._frozen[root[frozen]] = True

    def _give_up(self, x: Ints, y: Ints) -> None:
        self.conflicts += len(x)
        self.freeze(x)
        self.freeze(y)

    def freeze(self, x: Ints) -> None:
        """Say that these are never removed."""
        self._frozen[self.find(x)] = True

    def mark(self, x: Ints, bit: int) -> None:
        """Remember something of these, for `leaves`."""
        self._marks[self.find(x)] |= np.uint8(bit)

    def all_frozen(self, x: Ints) -> bool:
        """Whether all are known to stay so far."""
        return bool(self._frozen[self.find(x)].all())

    def settle(self) -> None:
        """Carry what is known of a class to all of it, and from a product that stays to its factors."""
        everything = np.arange(self._count)
        root = self.find(everything)
        frozen = np.zeros(self._count, bool)
        frozen[root[self._frozen[: self._count]]] = True
        marks = np.zeros(self._count, np.uint8)
        np.bitwise_or.at(marks, root, self._marks[: self._count])
        products = np.flatnonzero(self._left[: self._count] >= 0)
        top = root[products]
        for _ in range(_DEEPEST):
            before = int(frozen.sum()), int(marks.sum(dtype=np.int64))
            for side in (self._left, self._right):
                under = root[side[products]]
                frozen[under[frozen[top]]] = True
                np.bitwise_or.at(marks, under, marks[top])
            if (int(frozen.sum()), int(marks.sum(dtype=np.int64))) == before:
                break
        self._frozen[: self._count] = frozen[root]
        self._marks[: self._count] = marks[root]

    def leaves(self, x: Ints) -> Ints:
        """What each is a product of, outermost first: classes [len(x), k], -1 where there are fewer factors."""
        columns = [self.find(x)]
        for _ in range(_DEEPEST):
            opened: list[Ints] = []
            any_product = False
            for column in columns:
                product = (column >= 0) & (self._left[column] >= 0)
                if not product.any():
                    opened.append(column)
                    continue
                any_product = True
                safe = np.where(product, column, 0)
                opened.append(np.where(product, self.find(self._left[safe].clip(min=0)), column))
                opened.append(np.where(product, self.find(self._right[safe].clip(min=0)), -1))
            columns = opened
            if not any_product:
                break
        else:
            self.freeze(x)
            columns = [np.where(self._left[c] >= 0, -1, c) for c in columns]
        found = np.stack(columns, axis=1)
        order = np.argsort(found < 0, axis=1, kind="stable")
        found = np.take_along_axis(found, order, axis=1)
        return found[:, : max(1, int((found >= 0).sum(axis=1).max(initial=1)))]

    def frozen(self, x: Ints) -> npt.NDArray[np.bool_]:
        """Whether each is never removed; after `settle`."""
        return self._frozen[self.find(x)]

    def marked(self, x: Ints, bit: int) -> Any:
        """Whether each was marked; after `settle`."""
        return (self._marks[self.find(x)] & np.uint8(bit)) > 0
