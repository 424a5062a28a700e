"""Blocks of a network that could be left out: what flows in and out of each, and whether anything flows round it.

A block can be left out where it hands on what it is given in the shape it has, by a path of its own beside its weights:
without the block what follows still fits, and still sees what came before.
"""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import GraphError
from secateur.evidence import calm
from secateur.site import Part, Site
from secateur.task import Batch


def blocks_of(model: nn.Module) -> list[str]:
    """The dotted names of a model's like blocks: outermost modules, no containers, of a class met more than once."""
    inner = {
        name: module
        for name, module in model.named_modules()
        if name
        and not isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict))
        and any(True for _ in module.children())
        and any(p.dim() > 1 for p in module.parameters())
    }
    found: list[str] = []
    for name, module in inner.items():
        alike = sum(type(other) is type(module) for other in inner.values())
        if alike > 1 and not any(name.startswith(block + ".") for block in found):
            found.append(name)
    return found


def first_tensor(values: Iterable[Any]) -> Tensor | None:
    """The first tensor among values, tuples and lists of them looked into."""
    for value in values:
        if isinstance(value, Tensor):
            return value
        if isinstance(value, (tuple, list)) and (found := first_tensor(value)) is not None:
            return found
    return None


@dataclass(frozen=True, eq=False)
class Ran:
    """A block in a forward pass of an example."""

    name: str
    calls: int  # in one pass
    given: Tensor | None  # the first tensor it was given, in its last call
    answer: Tensor | None  # and the first it gave back
    outputs: int  # how many values it gives back; 0: a bare tensor
    arguments: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def why_not(self) -> str:
        """Why what follows would not fit without it; "" where it would."""
        if self.calls != 1:
            return f"it runs {self.calls} times in a forward pass"
        if self.given is None or self.answer is None or self.given.shape != self.answer.shape:
            shapes = [list(t.shape) if t is not None else None for t in (self.given, self.answer)]
            return f"it has no identity path: {shapes[0]} goes in and {shapes[1]} comes out"
        return ""


@torch.no_grad()
def run_blocks(model: nn.Module, example: Batch, names: Sequence[str]) -> list[Ran]:
    """What some blocks do in a forward pass of an example, in evaluation, in the order in which they first run."""
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any], Any]]] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda m, args, kwargs, out, name=name: calls.setdefault(name, []).append((args, kwargs, out)),
            with_kwargs=True,
        )
        for name in names
    ]
    try:
        with calm(model):  # a cache among the arguments would be full when a block is run again
            example.through(model)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for name in [*calls, *(name for name in names if name not in calls)]:
        args, kwargs, out = calls[name][-1] if name in calls else ((), {}, None)
        outputs = len(out) if isinstance(out, (tuple, list)) else 0
        given, answer = first_tensor([*args, *kwargs.values()]), first_tensor([out])
        found.append(Ran(name, len(calls.get(name, [])), given, answer, outputs, (args, kwargs)))
    return found


@torch.no_grad()
def goes_round(block: nn.Module, ran: Ran) -> bool:
    """Whether what a block is given reaches what it answers by another way than through its matrices and kernels.

    With those at zero, a block without a shortcut gives the same whatever it is given. Its weights are left alone.
    """
    twin = copy.deepcopy(block).eval()
    for parameter in twin.parameters():
        if parameter.dim() > 1:
            parameter.zero_()
    args, kwargs = ran.arguments
    given = ran.given
    assert given is not None, "a block that was not run has no shortcut to be asked about"
    other = given + torch.randn(given.shape, generator=torch.Generator().manual_seed(0)).to(given)

    def swapped(value: Any) -> Any:
        return other if value is given else value

    once = first_tensor([twin(*args, **kwargs)])
    again = first_tensor([twin(*[swapped(a) for a in args], **{k: swapped(v) for k, v in kwargs.items()})])
    return once is not None and again is not None and not torch.equal(once, again)


def removable_blocks(model: nn.Module, example: Batch) -> tuple[list[Ran], dict[str, str]]:
    """A model's blocks in the order in which they run, and why some of them cannot be left out.

    The first block stays: it makes the hidden state out of what is no longer the input. Raises GraphError, saying why,
    where none can be left out.
    """
    ran = run_blocks(model, example, blocks_of(model))
    why: dict[str, str] = {}
    for place, each in enumerate(ran):
        reason = each.why_not
        if not reason and not goes_round(model.get_submodule(each.name), each):
            reason = "it has no identity path: with its weights at zero, nothing of what goes in comes out"
        if not reason and place == 0:
            reason = "it is the first block of the network"
        if reason:
            why[each.name] = reason
    if len(why) == len(ran):
        said = "; ".join(f"{name}: {reason}" for name, reason in list(why.items())[:3]) or "no two blocks are alike"
        raise GraphError(
            f"blocks of {type(model).__name__} were to be left out",
            f"there is none that can be ({said})",
            "Use a network of residual blocks, or a method that takes out channels.",
        )
    return ran, why


def blocks_site(model: nn.Module, names: Sequence[str], name: str = "blocks") -> Site:
    """Blocks as one site, a unit each, owning all parameters of a block: [blocks]."""
    parts = [
        Part(f"{block}.{key}", tuple(p.shape), torch.full((1,) * p.dim(), unit), itemsize=p.element_size())
        for unit, block in enumerate(names)
        for key, p in model.get_submodule(block).named_parameters()
    ]
    return Site(name, "layer", (len(names),), tuple(parts))
