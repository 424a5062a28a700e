"""Settings as people write them, on the command line and in recipes, to methods and back.

    model: smollm2
    task: {name: python-docs, window: 256}
    seed: 0
    steps:
    - method: wanda
      sparsity: 50%
      allocation: owl(reach=0.1)

A setting may be typed (0.5, true, [a, b]) or text ("50%", "2:4", "a,b"); a field of a part is written inside it,
`owl(reach=0.1)`, or as a key of its own, `allocation.reach: 0.1`; a part within a part as itself,
`influence(inverse=woodbury)`.
"""

import ast
import inspect
import io
import json
import re
import sys
import tokenize
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union

from secateur.axes import part_of, text_of, words
from secateur.errors import SecateurError, SettingError, did_you_mean
from secateur.method import Chain, Method, load, names, settings

SUFFIXES = (".yaml", ".yml", ".json")
"""What a recipe's file name ends in."""


@dataclass(frozen=True)
class Setting:
    """One field of a method or of a part, as people meet it."""

    name: str
    hint: Any  # its type
    written: str  # its type as the source has it
    default: Any  # MISSING where there is none
    comment: str  # what stands beside it in the source

    @property
    def choices(self) -> tuple[str, ...]:
        """The words it may be, where they are listed in its type."""
        return tuple(str(v) for kind in _members(self.hint) if _origin(kind) is Literal for v in typing.get_args(kind))

    @property
    def part(self) -> Any:
        """The kind of part it holds, or None for a plain value."""
        return next((kind for kind in _members(self.hint) if _is_part(kind)), None)

    @property
    def has_fields(self) -> bool:
        """Whether what it holds, a part or a method, has settings of its own."""
        methods = (kind for kind in _members(self.hint) if isinstance(kind, type) and issubclass(kind, Method))
        return self.part is not None or any(methods)


@cache
def settings_of(kind: type) -> Mapping[str, Setting]:
    """The fields of a method or a part, by name in the order they are written."""
    hints = typing.get_type_hints(kind)
    written = {k: v for owner in reversed(kind.__mro__) if is_dataclass(owner) for k, v in _source(owner).items()}
    found = {}
    for each in fields(kind):
        if not each.init:
            continue
        default = each.default_factory() if each.default_factory is not MISSING else each.default
        shown, comment = written.get(each.name, (str(each.type), ""))
        found[each.name] = Setting(each.name, hints[each.name], shown, default, comment)
    return types.MappingProxyType(found)


def _source(kind: type) -> dict[str, tuple[str, str]]:
    """Each field's type as it is written, and the comment that stands on its line."""
    try:
        text = inspect.cleandoc("\n" + inspect.getsource(kind))
    except (OSError, TypeError):
        return {}
    comments = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type == tokenize.COMMENT
    }
    found = {}
    body = ast.parse(text).body[0]
    for line in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            beside = comments.get(line.end_lineno or line.lineno) or comments.get(line.lineno, "")
            found[line.target.id] = (ast.unparse(line.annotation), beside)
    return found


def fitting(hint: Any, known: Mapping[str, type]) -> dict[str, type]:
    """The parts by name that a setting of this type can hold."""
    kinds = [kind for kind in _members(hint) if _is_part(kind)]
    return {name: part for name, part in known.items() if any(_fits(part, kind) for kind in kinds)}


def method_of(value: Any) -> Method:
    """The method that a mapping {"method": name, settings...}, a name, or `name(key=value, ...)` stands for.

    Raises SettingError, with the nearest name, for a method or setting that does not exist or cannot be.
    """
    if isinstance(value, Method):
        return value
    if isinstance(value, str):
        name, given = _called(value)
        return build(load(name), given)
    if not isinstance(value, Mapping) or not isinstance(value.get("method"), str):
        raise SettingError(
            f"a step {json.dumps(value, default=str)} was given", "it names no method", "Write method: NAME in it."
        )
    rest = {k: v for k, v in value.items() if k not in ("method", "settings")}
    inner = value.get("settings", {})
    if not isinstance(inner, Mapping):
        raise SettingError(
            f"settings {inner!r} of {value['method']} were given", "they are no mapping", "Write key: value lines."
        )
    both = sorted(rest.keys() & inner.keys())
    if both:
        raise SettingError(
            f"{', '.join(both)} of {value['method']} was given", "it stands there twice", "Write it once."
        )
    if "methods" in {**rest, **inner} and len({**rest, **inner}) == 1:
        return Chain(tuple(method_of(v) for v in {**rest, **inner}["methods"]))
    return build(load(value["method"]), {**rest, **inner})


def text_of_method(method: Method) -> str:
    """A method as text: its name, and those of its settings that are not the default."""
    own = {k: v.default for k, v in settings_of(type(method)).items()}
    given = [f"{k}={_quoted(value)}" for k in own if (value := getattr(method, k)) != own[k]]
    return method.name + (f"({', '.join(given)})" if given else "")


def _quoted(value: Any) -> str:
    text = text_of_value(value)
    plain = value is None or (re.fullmatch(r"[\w.:%-]+", text) and text != "None")
    return "None" if value is None else text if plain else repr(text)


def text_of_value(value: Any) -> str:
    """A setting as the text that stands for it."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float, str)):
        return str(value)
    if isinstance(value, (tuple, list)):
        return ",".join(text_of_value(v) for v in value)
    if isinstance(value, Mapping):
        return ",".join(f"{k}={text_of_value(v)}" for k, v in value.items())
    return text_of_method(value) if isinstance(value, Method) else str(text_of(value))


def build(kind: type[Method], values: Mapping[str, Any]) -> Method:
    """A method from settings as people write them; dotted keys are fields of its parts.

    `sparsity` may be a pattern (2:4, 4x1), and a pattern that prescribes a sparsity sets it when none is given.
    Raises SettingError, with the nearest name, for a setting that does not exist or a value that is not of its type.
    """
    name = kind.__module__.rpartition(".")[2]
    accepted, known = settings_of(kind), words(sys.modules[kind.__module__])
    given: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    plain = {str(k).replace("-", "_"): v for k, v in values.items()}
    sparsity = plain.get("sparsity")
    if isinstance(sparsity, str) and re.fullmatch(r"\s*\d+\s*[:x]\s*\d+\s*", sparsity):
        if "pattern" not in accepted or "pattern" in plain:
            raise SettingError(
                f"sparsity {sparsity} of {name} was given",
                "its pattern is given as well" if "pattern" in accepted else "it takes no pattern",
                "Give the sparsity as a fraction, such as 0.5.",
            )
        plain["pattern"] = plain.pop("sparsity").replace(" ", "")
    for key, value in plain.items():
        head, _, rest = key.partition(".")
        if head not in accepted:
            raise SettingError(
                f"setting {key!r} of {name} was given", "it has none of that name", did_you_mean(head, accepted)
            )
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            given[head] = value_of(f"{name}.{head}", accepted[head].hint, value, known)
    for head, changes in inner.items():
        base = given[head] if head in given else accepted[head].default
        given[head] = _changed(f"{name}.{head}", base, changes, known)
    pattern = given.get("pattern")
    if "sparsity" in accepted and "sparsity" not in plain and getattr(pattern, "fixed", None) is not None:
        given["sparsity"] = pattern.fixed  # type: ignore[union-attr]
    missing = [k for k, s in accepted.items() if s.default is MISSING and k not in given]
    if missing:
        raise SettingError(f"{name} was asked for", f"it needs {', '.join(missing)}", "Give it a value.")
    try:
        return kind(**given)
    except SecateurError:
        raise
    except (TypeError, ValueError, AssertionError) as error:
        raise SettingError(f"{name} with {plain} was asked for", f"it says: {error}", "Give another value.") from error


def _changed(where: str, part: Any, changes: Mapping[str, Any], known: Mapping[str, type]) -> Any:
    """A part with some of its fields given as text."""
    if not is_dataclass(part) or isinstance(part, type):
        raise SettingError(
            f"{where}.{next(iter(changes))} was given",
            f"{where} is {part!r}, which has no fields",
            "Give the part first.",
        )
    if isinstance(part, Method):
        return build(type(part), {**settings(part), **changes})
    accepted, given = settings_of(type(part)), {}
    inner: dict[str, dict[str, Any]] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in accepted:
            raise SettingError(
                f"{where}.{head} was given",
                f"{text_of(part)} has no field {head!r}",
                did_you_mean(head, accepted) if accepted else "It has no fields at all: choose another part first.",
            )
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            given[head] = value_of(f"{where}.{head}", accepted[head].hint, value, known)
    for head, more in inner.items():
        given[head] = _changed(f"{where}.{head}", given.get(head, getattr(part, head)), more, known)
    return replace(part, **given)


def value_of(where: str, hint: Any, value: Any, known: Mapping[str, type]) -> Any:
    """A value of a type, from what people write for it. Raises SettingError naming `where` for anything else."""
    kinds = _members(hint)
    text = value.strip() if isinstance(value, str) else None
    if type(None) in kinds and (value is None or (text is not None and text.lower() in ("none", "null"))):
        return None
    problems = []
    for kind in kinds:
        if kind is type(None):
            continue
        try:
            return _one(where, kind, value, text, known)
        except SettingError as error:
            problems.append(error)
    numeric = text is not None and re.match(r"[-+.\d]", text)
    raise problems[0] if len(problems) == 1 or numeric else problems[-1]


def _one(where: str, kind: Any, value: Any, text: str | None, known: Mapping[str, type]) -> Any:
    origin = _origin(kind)
    if isinstance(kind, type) and issubclass(kind, Method):
        return method_of(value)
    if _is_part(kind):
        return _part(where, kind, value, known)
    if origin is Literal:
        choices = {str(c): c for c in typing.get_args(kind)}
        if str(value) in choices:
            return choices[str(value)]
        raise SettingError(
            f"{where}={value!r} was given", "it is not one of its words", did_you_mean(str(value), choices)
        )
    if origin in (tuple, list, Sequence) or kind in (tuple, list):
        return _many(where, kind, value, text, known)
    if origin in (dict, Mapping) and text is not None:
        pairs = dict(item.partition("=")[::2] for item in _split(text))
        inside = (typing.get_args(kind) or (str, str))[1]
        return {k.strip(): value_of(f"{where}.{k}", inside, v, known) for k, v in pairs.items()}
    if kind is bool:
        spelt = {
            "true": True,
            "yes": True,
            "on": True,
            "1": True,
            "false": False,
            "no": False,
            "off": False,
            "0": False,
        }
        if isinstance(value, bool):
            return value
        if text is not None and text.lower() in spelt:
            return spelt[text.lower()]
        raise SettingError(f"{where}={value!r} was given", "it is true or false", "Give one of them.")
    if kind is float or kind is int:
        return _number(where, kind, value, text)
    if kind is str and isinstance(value, str):
        return value
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(kind, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a type that brings a configuration of its own
        adapter = TypeAdapter(kind)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise SettingError(
            f"{where}={value!r} was given",
            error.errors()[0]["msg"][0].lower() + error.errors()[0]["msg"][1:],
            "Give another.",
        ) from None


def _number(where: str, kind: type, value: Any, text: str | None) -> Any:
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    if plain and (kind is float or value == int(value)):
        return kind(value)
    what = "a number" if kind is float else "a whole number"
    if text is not None:
        try:
            if kind is float and text.endswith("%"):
                return float(text[:-1]) / 100
            return kind(text)
        except ValueError:
            pass
    example = "0.5 or 50%" if kind is float else "128"
    raise SettingError(f"{where}={value!r} was given", f"it is not {what}", f"Give one, such as {example}.")


def _many(where: str, kind: Any, value: Any, text: str | None, known: Mapping[str, type]) -> Any:
    inside = typing.get_args(kind) or (str, ...)
    make = list if _origin(kind) is list or kind is list else tuple
    given = _split(text) if text is not None else value
    if not isinstance(given, (list, tuple)):
        raise SettingError(f"{where}={value!r} was given", "it is a list", "Give it as a,b or [a, b].")
    if make is list or (len(inside) == 2 and inside[1] is Ellipsis):
        return make(value_of(where, inside[0], v, known) for v in given)
    if len(inside) != len(given):
        raise SettingError(
            f"{where}={value!r} was given",
            f"it takes {len(inside)} values, not {len(given)}",
            "Separate them by commas.",
        )
    return tuple(value_of(where, k, v, known) for k, v in zip(inside, given, strict=True))


def _part(where: str, kind: Any, value: Any, known: Mapping[str, type]) -> Any:
    if isinstance(value, str):
        fit = fitting(kind, known)
        try:
            part = part_of(value, known)
        except SettingError as error:
            # Only what fits is worth suggesting.
            name = re.split(r"[(\s]", value.strip())[0].replace("_", "-").lower()
            if name in known:
                raise
            raise SettingError(f"{where}={value} was given", error.found, did_you_mean(name, fit)) from None
        except (TypeError, ValueError) as error:
            if isinstance(error, SecateurError):
                raise
            raise SettingError(
                f"{where}={value} was given", f"it cannot be made: {error}", "Give its fields."
            ) from None
        value = part
        if not _fits(type(part), kind):
            raise SettingError(
                f"{where}={text_of(part)} was given", f"it is no {kind.__name__.lower()}", did_you_mean("", fit)
            )
        _check_held(where, part, known)
    elif isinstance(value, Mapping) or not is_dataclass(value):
        raise SettingError(
            f"{where}={value!r} was given",
            f"it is no {kind.__name__.lower()}",
            did_you_mean("", fitting(kind, known)),
        )
    return value


def _check_held(where: str, part: Any, known: Mapping[str, type]) -> None:
    """Raise SettingError where a part read from text holds text for a number, or a part of another kind."""
    kind: type = type(part)
    for name, setting in settings_of(kind).items():
        value, kinds = getattr(part, name), _members(setting.hint)
        if is_dataclass(value) and not isinstance(value, type):
            if setting.part is not None and not any(_is_part(k) and _fits(type(value), k) for k in kinds):
                raise SettingError(
                    f"{where}.{name}={text_of(value)} was given",
                    f"it is no {setting.part.__name__.lower()}",
                    did_you_mean("", fitting(setting.hint, known)),
                )
            _check_held(f"{where}.{name}", value, known)
        elif (isinstance(value, str) and str not in kinds and not setting.choices) or (
            isinstance(value, float) and int in kinds and float not in kinds
        ):
            value_of(f"{where}.{name}", setting.hint, repr(value), known)  # which says what it should be


def _is_part(kind: Any) -> bool:
    if not isinstance(kind, type) or issubclass(kind, Method):
        return False
    return bool(getattr(kind, "_is_protocol", False)) or is_dataclass(kind)


def _fits(part: type, kind: type) -> bool:
    """Whether a part is of a kind: a class it is of, or a protocol all of whose members it has."""
    if not getattr(kind, "_is_protocol", False):
        return issubclass(part, kind)
    wanted = {n for n in dir(kind) if not n.startswith("_")} | set(inspect.get_annotations(kind))
    if "__call__" in kind.__dict__:  # that a part can be called says little: its arguments are to be the same
        wanted.add("__call__")
        called = getattr(part, "__call__", None)  # noqa: B004  not whether, but how
        if called is None or [*inspect.signature(called).parameters] != [*inspect.signature(kind.__call__).parameters]:
            return False
    held = {f.name for f in fields(part)} | set(dir(part))
    return wanted <= held


def _origin(kind: Any) -> Any:
    found = typing.get_origin(kind)
    return {typing.Sequence: Sequence}.get(found, found)


def _members(hint: Any) -> tuple[Any, ...]:
    if _origin(hint) in (Union, types.UnionType):
        return tuple(inner for kind in typing.get_args(hint) for inner in _members(kind))
    return (hint,)


def _split(text: str) -> list[str]:
    """Text at its commas, but for those within brackets or quotes."""
    found, start, depth, quote = [], 0, 0, ""
    for place, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"":
            quote = sign
        elif sign in "([{":
            depth += 1
        elif sign in ")]}":
            depth -= 1
        elif sign == "," and depth == 0:
            found.append(text[start:place].strip())
            start = place + 1
    last = text[start:].strip()
    return [*found, last] if last or found else []


def _called(text: str) -> tuple[str, dict[str, Any]]:
    shape = re.fullmatch(r"\s*([A-Za-z][\w-]*)\s*(?:\((.*)\))?\s*", text, re.DOTALL)
    if shape is None:
        raise SettingError(f"method {text!r} was asked for", "there is none of that name", did_you_mean(text, names()))
    name = shape[1].replace("-", "_") if shape[1] not in names() else shape[1]
    given: dict[str, Any] = {}
    for item in _split(shape[2] or ""):
        key, sign, value = item.partition("=")
        if not sign:
            raise SettingError(
                f"method {text!r} was given", f"{item!r} is no setting", "Write name(key=value, key=value)."
            )
        value = value.strip()
        quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
        given[key.strip()] = ast.literal_eval(value) if quoted else None if value == "None" else value
    return name, given


def split_methods(text: str) -> list[str]:
    """`wanda,sparsegpt(block=64)` as its methods."""
    return [item for item in _split(text) if item]


# Recipes


@dataclass(frozen=True)
class Recipe:
    """What to run on what: methods in order, and where known the model, the data and the seed."""

    steps: tuple[Method, ...]
    model: str = ""
    task: str = ""
    task_settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int | None = None
    dtype: str | None = None
    device: str | None = None

    @property
    def method(self) -> Method:
        """The one method, or the chain of them."""
        return self.steps[0] if len(self.steps) == 1 else Chain(self.steps)

    def plain(self) -> dict[str, Any]:
        """The recipe as plain values, as `read` takes them."""
        from secateur.outcome import about_versions

        found: dict[str, Any] = {"secateur": about_versions().get("secateur", "0")}
        if self.model:
            found["model"] = self.model
        if self.task:
            found["task"] = {"name": self.task, **self.task_settings}
        found |= {k: v for k in ("seed", "dtype", "device") if (v := getattr(self, k)) is not None}
        return found | {"steps": [{"method": m.name, **settings(m)} for m in self.steps]}


KEYS = ("secateur", "model", "task", "steps", "seed", "dtype", "device")
ABOUT_TASK = ("name", "seed", "metric", "higher_is_better", "fingerprint")  # of a record: known from the task itself


def is_recipe(what: str) -> bool:
    """Whether a name is that of a recipe's file."""
    return what.lower().endswith(SUFFIXES)


def read(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A recipe's file, YAML or JSON, with `key=value` overrides. Raises SettingError for anything it may not hold."""
    place = Path(path)
    try:
        text = place.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = [p.name for p in place.parent.glob("*") if p.name.endswith(SUFFIXES)] if place.parent.is_dir() else []
        raise SettingError(
            f"recipe {path} was asked for", "there is no such file", did_you_mean(place.name, near)
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingError(f"recipe {path} was asked for", f"it cannot be read: {error}", "Give a text file.") from None
    return recipe_of(overridden(_loaded(text, str(path)), overrides), str(path))


def recipe_of(value: Any, where: str = "the recipe") -> Recipe:
    """A recipe from plain values: a mapping with steps, one step, or a list of steps. Raises SettingError otherwise."""
    if isinstance(value, (list, tuple)):
        value = {"steps": value}
    if isinstance(value, Mapping) and "method" in value:
        value = {k: v for k, v in value.items() if k in KEYS} | {
            "steps": [
                {k: v for k, v in value.items() if k not in KEYS or (k == "seed" and "seed" in _fields_of(value))}
            ]
        }
    if not isinstance(value, Mapping):
        raise SettingError(f"{where} was given", "it holds no steps", "Write steps: and a list of methods.")
    for key in value:
        if key not in KEYS:
            raise SettingError(
                f"key {key!r} of {where} was given", "a recipe has none of that name", did_you_mean(str(key), KEYS)
            )
    steps = value.get("steps")
    if not isinstance(steps, (list, tuple)) or not steps:
        raise SettingError(f"{where} was given", "it has no steps", "Write steps: and a list of methods.")
    task = value.get("task") or {}
    if isinstance(task, str):
        task = {"name": task}
    if not isinstance(task, Mapping):
        raise SettingError(f"task {task!r} of {where} was given", "it is no name", "Write task: {name: python-docs}.")
    seed = value.get("seed", task.get("seed"))
    if seed is not None:
        seed = _number("seed", int, seed, str(seed))
    return Recipe(
        tuple(method_of(step) for step in steps),
        str(value.get("model") or ""),
        str(task.get("name") or ""),
        {k: v for k, v in task.items() if k not in ABOUT_TASK},
        seed,
        None if value.get("dtype") is None else str(value["dtype"]),
        None if value.get("device") is None else str(value["device"]),
    )


def _fields_of(step: Mapping[str, Any]) -> Mapping[str, Setting]:
    return settings_of(load(step["method"])) if isinstance(step.get("method"), str) else {}


def overridden(value: Any, overrides: Sequence[str]) -> Any:
    """Plain values of a recipe with `key=value` changes: `seed=1`, `task.window=128`, `steps.1.rounds=2`.

    A key that is not the recipe's own is a setting of its one step, or of the numbered one.
    """
    value = json.loads(json.dumps(value, default=str))
    for text in overrides:
        key, sign, new = text.partition("=")
        key = key.strip()
        if not sign or not key:
            raise SettingError(f"--set {text} was given", "it is not key=value", "Write --set sparsity=0.3.")
        if isinstance(value, list):
            value = {"steps": value}
        if not isinstance(value, dict):
            break
        head, _, rest = key.partition(".")
        if head in KEYS and head != "steps":
            if rest and head == "task":
                held = value.get("task") or {}
                value["task"] = {**({"name": held} if isinstance(held, str) else held), rest: _scalar(new)}
            else:
                value[head] = _scalar(new)
            continue
        _override_step(value, key, new)
    return value


def _override_step(value: dict[str, Any], key: str, new: str) -> None:
    if "method" in value:
        step = value
    else:
        steps = value.get("steps")
        steps = steps if isinstance(steps, list) else []
        number = re.fullmatch(r"(?:steps\.)?(\d+)\.(.+)", key)
        if number is None and len(steps) != 1:
            raise SettingError(
                f"--set {key}={new} was given",
                f"the recipe has {len(steps)} steps",
                f"Say which: steps.0.{key} up to steps.{max(len(steps) - 1, 0)}.{key}.",
            )
        place, key = (int(number[1]), number[2]) if number else (0, key)
        if place >= len(steps):
            raise SettingError(
                f"--set steps.{place}.{key} was given", f"the recipe has {len(steps)} steps", "Count from 0."
            )
        if isinstance(steps[place], str):
            steps[place] = {"method": steps[place]}
        step = steps[place]
    target = step["settings"] if isinstance(step.get("settings"), dict) else step
    for held in (key, key.replace("_", "-"), key.replace("-", "_")):
        target.pop(held, None)
    head = key.partition(".")[0]
    if head == "pattern" and "sparsity" in target and "." not in key:
        target.pop("sparsity") if _fixes(new) else None
    target[key] = new


def _fixes(pattern: str) -> bool:
    return re.fullmatch(r"\s*\d+:\d+\s*", pattern) is not None


def _scalar(text: str) -> Any:
    return _loaded(text, "--set") if re.fullmatch(r"[-+\w.]*", text) else text


def _loaded(text: str, where: str) -> Any:
    """YAML without base sixty, in which 2:4 is 124, and without keys that are there twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                if key.value in seen:
                    line = key.start_mark.line + 1
                    raise SettingError(f"{where} was given", f"{key.value!r} is there twice (line {line})", "Keep one.")
                seen.add(key.value)
            return super().construct_mapping(node, deep)

    usual = yaml.SafeLoader.yaml_implicit_resolvers
    Loader.yaml_implicit_resolvers = {
        sign: [(tag, regex) for tag, regex in held if tag not in (_INT, _FLOAT)] for sign, held in usual.items()
    }
    Loader.add_implicit_resolver(_INT, re.compile(r"[-+]?\d+$"), list("-+0123456789"))
    real = r"[-+]?(\d+\.\d*|\.\d+)([eE][-+]?\d+)?$|[-+]?\d+[eE][-+]?\d+$|[-+]?\.(inf|Inf|INF)$"
    Loader.add_implicit_resolver(_FLOAT, re.compile(real), list("-+.0123456789"))
    try:
        return yaml.load(text, Loader)  # a SafeLoader with less
    except yaml.YAMLError as error:
        raise SettingError(
            f"{where} was given", f"it is not YAML: {_line(error)}", "Mind the indents and colons."
        ) from None


_INT, _FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
