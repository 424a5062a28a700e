"""Cuts that a run-time will take: the method held to them before it runs, and what that gives up said aloud."""

from collections.abc import Sequence
from dataclasses import fields, replace
from math import lcm

from torch import nn

from secateur.axes.allocations import Alike, Allocation
from secateur.errors import ExportError
from secateur.export.exporting import target_named
from secateur.method import Chain, Method
from secateur.models import hf

WIDTHS = {"channel", "head"}
"""Kinds of units whose number a run-time may want to be the same in every layer."""


def served(method: Method, to: str, model: nn.Module) -> tuple[Method, list[str]]:
    """A method that leaves shapes which a target loads, and what it has to give up for that.

    llama.cpp, ONNX Runtime, OpenVINO and the sparse file take any widths; stock transformers one for all layers, and a
    residual width that is a multiple of the heads.
    Raises ExportError, before data is read, for a model that the target does not take as it is, and for a method
    whose widths cannot be held to one.
    """
    if why := target_named(to).why_not(model):
        raise ExportError(f"{method.name} was to leave a model for {to}", why, "Serve it by another run-time.")
    if to != "hf":
        return method, []
    if isinstance(method, Chain):
        found = [served(link, to, model) for link in method.methods]
        return Chain(tuple(link for link, _ in found)), [said for _, given in found for said in given]
    kinds = set(getattr(method, "kinds", None) or method.card.granularity)
    said: list[str] = []
    if "stream" in kinds:
        method, said = _whole_heads(method, model)
    if not WIDTHS & kinds:
        return method, said
    method, more = _alike(method)
    return method, [*said, *more]


def _whole_heads(method: Method, model: nn.Module) -> tuple[Method, list[str]]:
    """The residual width held to a multiple of the heads: transformers asks that, even where heads keep theirs."""
    heads = getattr(getattr(model, "config", None), "num_attention_heads", None)
    if not isinstance(heads, int):
        return method, []
    round_to = getattr(method, "round_to", None)
    if not isinstance(round_to, int):
        raise ExportError(
            f"{method.name} was to leave a residual width that hf loads",
            f"that is a multiple of the {heads} heads, and {method.name} leaves any width",
            "Leave the stream whole, by kinds=, or serve it by gguf, onnx or openvino, which take any width.",
        )
    if round_to % heads == 0:
        return method, []
    multiple = lcm(round_to, heads)
    changed = replace(method, round_to=multiple)  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
    return changed, [
        f"the residual width that {method.name} leaves is a multiple of {multiple}, as hf wants one of its heads"
    ]


def _alike(method: Method) -> tuple[Method, list[str]]:
    own = {field.name for field in fields(method)}  # type: ignore[arg-type]  # methods are dataclasses, which `Method` does not say
    allocation = getattr(method, "allocation", None) if "allocation" in own else None
    if isinstance(allocation, Alike):
        return method, []
    if isinstance(allocation, Allocation):
        if not allocation.needs_scores:
            return method, []  # a share of every site alike
        changed = replace(method, allocation=Alike(allocation))  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
        return changed, [
            f"{method.name} gives layers widths of their own; here each gets the mean, as hf loads one width"
        ]
    if {"spare_first", "spare_last"} <= own:
        first, last = getattr(method, "spare_first"), getattr(method, "spare_last")  # noqa: B009  fields of some methods
        start = f"the first {first:.0%} of the blocks" if isinstance(first, float) else f"the first {first} blocks"
        changed = replace(method, spare_first=0, spare_last=0)  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
        said = f"{method.name} would leave {start} and the last {last} alone; here they are cut like the rest"
        return changed, [said] if first or last else []
    if "uniform" in own:
        changed = replace(method, uniform=True)  # type: ignore[type-var]  # methods are dataclasses, which `Method` does not say
        return changed, [f"{method.name} finds widths of its own; here sites alike get the mean of theirs"]
    raise ExportError(
        f"{method.name} was to leave every layer the same width, as hf loads them",
        "it decides the width of each layer as it goes",
        "Use flap, cfsp, l1_norm or llm_pruner, or serve it by gguf, onnx or openvino, which take any widths.",
    )


def given_up(method: Method) -> list[str]:
    """What was given up in the run, with the numbers, by each link of a method."""
    links: Sequence[Method] = method.methods if isinstance(method, Chain) else (method,)
    parts = [getattr(link, "allocation", None) for link in links]
    return [said for part in parts if isinstance(part, Alike) for said in part.given_up]


def refusal(to: str, model: nn.Module, why_not_stock: str | None) -> str:
    """Why a target does not load what came out, or nothing; `why_not_stock` is what saving found for transformers."""
    if to == "hf":
        return (why_not_stock or "") if hf.is_hf(model) else f"{type(model).__name__} is no class of transformers"
    return target_named(to).why_not(model)
