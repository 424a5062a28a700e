"""Interchangeable parts, and the short text each can be written as.

    "2:4"  "4x1"  "per-row"  "owl"  "owl(reach=0.1)"  "global(floor=0.0005)"  "power(power=2)"

The same text serves the command line, recipes and run records. A part moves here when a second method uses it.
"""

import ast
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from types import ModuleType
from typing import Any, get_args

from secateur.axes import (
    allocations,
    branching,
    cached,
    cells,
    cliffs,
    criteria,
    curvature,
    donors,
    gates,
    groups,
    growth,
    influence,
    membership,
    orders,
    patterns,
    penalties,
    pq,
    probes,
    quadratic,
    recovery,
    refiners,
    remasking,
    rewinding,
    rules,
    scales,
    schedules,
    solvers,
    soup,
    subsets,
    taylor,
    trained_masks,
    unlearners,
    zeroth_order,
)
from secateur.axes.allocations import (
    Alike,
    Allocation,
    ByName,
    Er,
    Erk,
    ErkPlus,
    Global,
    Owl,
    Scores,
    SynExp,
    Uniform,
    UniformPlus,
    kept_of,
)
from secateur.axes.criteria import Criterion, Gblm, Gradient, Magnitude, Obs, Random, Wanda
from secateur.axes.patterns import NM, Blocks, ChannelBlocks, Pattern, PerMatrix, PerRow, PerSlab, Taps, keep_top
from secateur.axes.refiners import Dsnot, Refiner
from secateur.axes.schedules import Cosine, Curve, Exponential, Jump, Linear, Power, Schedule
from secateur.axes.solvers import ObsSweep, Rank, Solver
from secateur.axes.zeroth_order import Ecoflap, FirstOrder, PerBlock, PerSite, PerTower, ZerothOrder
from secateur.errors import SettingError, did_you_mean

__all__ = [
    "NM",
    "Alike",
    "Allocation",
    "Blocks",
    "ByName",
    "ChannelBlocks",
    "Cosine",
    "Criterion",
    "Curve",
    "Dsnot",
    "Ecoflap",
    "Er",
    "Erk",
    "ErkPlus",
    "Exponential",
    "FirstOrder",
    "Gblm",
    "Global",
    "Gradient",
    "Jump",
    "Linear",
    "Magnitude",
    "Obs",
    "ObsSweep",
    "Owl",
    "Pattern",
    "PerBlock",
    "PerMatrix",
    "PerRow",
    "PerSite",
    "PerSlab",
    "PerTower",
    "Power",
    "Random",
    "Rank",
    "Refiner",
    "Schedule",
    "Scores",
    "Solver",
    "SynExp",
    "Taps",
    "Uniform",
    "UniformPlus",
    "Wanda",
    "ZerothOrder",
    "keep_top",
    "kept_of",
    "part_of",
    "text_of",
    "word_of",
    "words",
]


PARTS = (
    allocations,
    branching,
    cached,
    cells,
    cliffs,
    criteria,
    curvature,
    donors,
    gates,
    groups,
    growth,
    influence,
    membership,
    orders,
    patterns,
    penalties,
    pq,
    probes,
    quadratic,
    recovery,
    refiners,
    remasking,
    rewinding,
    rules,
    scales,
    schedules,
    solvers,
    soup,
    subsets,
    taylor,
    trained_masks,
    unlearners,
    zeroth_order,
)
"""The modules whose parts go by name everywhere; a method's own go by name in its settings."""


def word_of(kind: type) -> str:
    """The name a part goes by: PerRow -> "per-row", NM -> "nm"."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "-", kind.__name__).lower()


def words(*modules: ModuleType) -> dict[str, type]:
    """Every part by name: those of the axes, and those of the modules given. What is private has none."""
    found: dict[str, type] = {}
    for module in (*PARTS, *modules):
        for value in vars(module).values():
            own = isinstance(value, type) and is_dataclass(value) and value.__module__ == module.__name__
            if own and not value.__name__.startswith("_"):
                found[word_of(value)] = value
    return found


def text_of(part: Any) -> str:
    """A part as text: its name, and those of its fields that are not the default.

    >>> text_of(NM(2, 4)), text_of(Owl(reach=0.1)), text_of(Uniform())
    ('2:4', 'owl(reach=0.1)', 'uniform')
    """
    if isinstance(part, NM):
        return f"{part.n}:{part.m}"
    if isinstance(part, Blocks):
        return f"{part.r}x{part.c}"
    if not is_dataclass(part) or isinstance(part, type):
        return repr(part)
    given = []
    for field in fields(part):
        value = getattr(part, field.name)
        if value != _default(field):
            text = text_of(value) if is_dataclass(value) and not isinstance(value, type) else repr(value)
            plain = re.fullmatch(r"[a-z][a-z0-9_()=.,' -]*|\d+[:x]\d+", text)
            given.append(f"{field.name}={text if not is_dataclass(value) or not plain else repr(text)}")
    return word_of(type(part)) + (f"({', '.join(given)})" if given else "")


def part_of(text: str, known: Mapping[str, type] | None = None) -> Any:
    """The part a text stands for. Raises SettingError, with the nearest name, for one that stands for none.

    A part within a part is written as itself, or between quotes, which "2:4" needs.

    >>> part_of("2:4"), part_of("owl(reach=0.1)")
    (NM(n=2, m=4), Owl(outlier=5.0, reach=0.1))
    """
    known = words() if known is None else known
    text = text.strip()
    if pair := re.fullmatch(r"(\d+):(\d+)", text):
        return NM(int(pair[1]), int(pair[2]))
    if pair := re.fullmatch(r"(\d+)x(\d+)", text):
        return Blocks(int(pair[1]), int(pair[2]))
    shape = re.fullmatch(r"([A-Za-z][\w-]*)\s*(\(.*\))?", text, re.DOTALL)
    if shape is None:
        raise SettingError(f"{text!r} was given", "it names no part", did_you_mean(text, known))
    name = shape[1].replace("_", "-").lower()
    if name not in known:
        raise SettingError(f"{text!r} was given", f"there is no {name!r}", did_you_mean(name, known))
    kind = known[name]
    accepted = {field.name: field for field in fields(kind)}
    given: dict[str, Any] = {}
    for key, value, bare in _keywords(text, shape[2]):
        if key not in accepted:
            raise SettingError(f"{text!r} was given", f"{name} has no field {key!r}", did_you_mean(key, accepted))
        default = _default(accepted[key])
        if bare and not is_dataclass(default) and not isinstance(default, str):
            raise _unread(text)
        _check_kind(text, key, accepted[key].type, value)
        nested = is_dataclass(default) and isinstance(value, str)
        given[key] = part_of(value, known) if nested else value
    return kind(**given)


_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", type(None): "none"}


def _check_kind(text: str, key: str, hint: Any, value: Any) -> None:
    """Raise SettingError for a plain value that is not of the kind a field holds."""
    kinds = get_args(hint) or (hint,)
    if not set(kinds) <= _KINDS.keys():  # parts, and several of anything, see for themselves
        return
    kind = type(value)
    if kind not in kinds and not (kind is int and float in kinds):
        wanted = " or ".join(_KINDS[each] for each in kinds)
        raise SettingError(f"{text!r} was given", f"{key}={value!r} is not {wanted}", f"Give {key} {wanted}.")


_WORDS = {"true": True, "false": False, "none": None}
"""As recipes and the command line write them elsewhere."""


def _keywords(text: str, arguments: str | None) -> list[tuple[str, Any, bool]]:
    """Keys and values, and whether a value is the bare name of a part, as in influence(inverse=woodbury)."""
    if arguments is None:
        return []
    source, found = "f" + arguments, list[tuple[str, Any, bool]]()
    try:
        call = ast.parse(source, mode="eval").body
        assert isinstance(call, ast.Call)
        assert not call.args
        for keyword in call.keywords:
            value = keyword.value
            if isinstance(value, ast.Name) and value.id in _WORDS:
                value = ast.Constant(_WORDS[value.id])
            bare = isinstance(value, ast.Name | ast.Call | ast.BinOp)  # even-nodes is a difference
            given = ast.get_source_segment(source, value) if bare else ast.literal_eval(value)
            found.append((keyword.arg or "", given, bare))
    except (SyntaxError, ValueError, AssertionError):
        raise _unread(text) from None
    return found


def _unread(text: str) -> SettingError:
    return SettingError(
        f"{text!r} was given", "its settings cannot be read", "Write them as name(key=value, key='text')."
    )


def _default(field: Field) -> Any:
    if field.default is not MISSING:
        return field.default
    return field.default_factory() if field.default_factory is not MISSING else MISSING
