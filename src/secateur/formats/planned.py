"""Modules that run many kernels in one call, and the plans they keep for inputs of the same shapes.

A small layer takes microseconds, and so does a call of it from Python, ten times as many where a large weight has just
gone through the caches: what a network would spend between its layers is spent once for all of them here.
"""

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor, nn
from torch.nn import functional as F

from secateur import kernels
from secateur.formats.conv import ANY, SHAPES

RELU = (0.0, float("inf"))
_version = operator.attrgetter("_version")


class Plan:
    """What runs inputs of some shapes in one call, as long as the tensors it was made for are as they were."""

    def __init__(self, key: tuple[Any, ...]) -> None:
        """A plan for what has the same key; `possible` says whether there is one. Two threads must not run one."""
        self.key = key
        self.possible = True
        self.kernels: dict[str, kernels.Kernel | None] = {}
        self._held: list[dict[str, Any]] = []  # what modules have,
        self._there: list[dict[str, Any]] = []  # and what they had
        self._likened: list[tuple[dict[str, Any], str, Any]] = []  # what could be equal to another, by where it is
        self._packed: list[Tensor] = []
        self._versions: list[int] = []
        self._pointed: list[Tensor] = []
        self._pointers: list[int] = []

    def within(self, held: dict[str, Any]) -> None:
        """What a module has, of its own or others: if it comes to have anything else, this holds no more."""
        self._held.append(held)
        self._there.append(dict(held))
        self._likened += [(held, name, value) for name, value in held.items() if _likens(value)]

    def watch(self, buffers: dict[str, Tensor | None], names: Sequence[str]) -> None:
        """Tensors of a packed weight, by their names where a module holds them."""
        self.within(buffers)
        tensors = [buffers[name] for name in names]
        # Tensors of inference mode count no versions, and cannot be changed outside it.
        counted = [t for t in tensors if t is not None and not t.is_inference()]
        self._packed += counted
        self._versions += [t._version for t in counted]

    def point(self, parameters: dict[str, Any]) -> None:
        """Parameters that what runs points to, whatever their numbers become."""
        self.within(parameters)
        there = [tensor for tensor in parameters.values() if tensor is not None]
        self._pointed += there
        self._pointers += [tensor.data_ptr() for tensor in there]

    def need(self, names: Sequence[str]) -> None:
        """Kernels by name; the plan is not possible without one."""
        self.kernels |= {name: kernels.find(name) for name in names}
        self.possible = self.possible and all(kernel is not None for kernel in self.kernels.values())

    def holds(self) -> bool:
        """Whether the tensors are those it was made for, as they were."""
        # Loops in C: a large weight has mostly just gone through the caches, and each look is one at memory. To
        # dictionaries the same object is equal; whether another tensor is, torch refuses to say.
        try:
            if self._held != self._there:
                return False
        except RuntimeError:
            return False
        for held, name, value in self._likened:
            if held[name] is not value:
                return False
        if list(map(_version, self._packed)) != self._versions:
            return False
        if [tensor.data_ptr() for tensor in self._pointed] != self._pointers:
            return False
        return all(map(operator.is_, map(kernels.find, self.kernels), self.kernels.values()))


def _likens(value: Any) -> bool:
    """Whether another object may be equal to this one: to a tensor of one number, and to what says so itself."""
    if type(value) is Tensor or type(value) is nn.Parameter:
        return value.numel() == 1
    equal: Any = type(value).__eq__
    return equal is not object.__eq__


P = TypeVar("P", bound=Plan)


class Planned(nn.Module, Generic[P]):
    """A module that keeps its plans by key, those not in use: a call takes one out, so that threads share none."""

    def __init__(self) -> None:
        """Nothing is kept yet, and inputs have no names."""
        super().__init__()
        self.names: tuple[str, ...] = ()  # by which inputs may be given too
        self._plans: dict[tuple[Any, ...], list[P]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def in_order(self, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Inputs of which some are given by name. Raises TypeError, as functions do, for other names."""
        left = self.names[len(inputs) :]
        if set(left) != set(named):
            raise TypeError(
                f"{type(self).__name__} takes {', '.join(self.names) or 'no names'}, not {', '.join(named)}"
            )
        return (*inputs, *(named[name] for name in left))

    def taken(self, key: tuple[Any, ...], make: Callable[[], P]) -> P | None:
        """A plan that holds and no other thread has, made where none is kept; None where it is not possible."""
        plan = self._kept(key) or make()
        if plan.possible:
            return plan
        self.keep(plan)
        return None

    def keep(self, plan: P) -> None:
        """A plan that was taken."""
        same = self._plans.get(plan.key)
        if same is not None:
            same.append(plan)
            return
        if len(self._plans) >= SHAPES:
            self._plans.clear()
        self._plans.setdefault(plan.key, []).append(plan)

    def _kept(self, key: tuple[Any, ...]) -> P | None:
        plans = self._plans.get(key, [])
        while True:
            try:
                plan = plans.pop()
            except IndexError:  # asking first would leave another thread time to take it
                return None
            if plan.holds():
                return plan


def bounded(y: Tensor, between: tuple[float, float]) -> Tensor:
    """A value held between bounds, with the gradients of ReLU and ReLU6 where one is met, which are not clamp's."""
    if between == ANY:
        return y
    return F.relu(y) if between == RELU else F.hardtanh(y, *between)
