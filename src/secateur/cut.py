"""Where sites come from: cutters turn a model into places where something can be removed.

    weights(model)            every weight of every matrix and kernel
    blocks(model, (4, 1))     tiles of them
    layers(model)             whole blocks of a stack; Passing stands where one was
    recurrent(model)          the matrices of recurrent cells, by what they read; gates(model) has each gate apart
    channels, heads           coupled units, in secateur.graph

A selection is a list of patterns: a name glob ("model.layers.*.mlp.*"), a regular expression after "re:", a module
class ("Conv2d"), or a role ("attention", "mlp", "head", "embedding", "router", "norm", "expert").
"""

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod

import torch
from torch import Tensor, nn

from secateur.edit import replacement
from secateur.errors import SiteError, did_you_mean
from secateur.site import Part, Site, module_of, plain, tensors, unwrapped
from secateur.walk import stacks

DEFAULT_EXCLUDE = ("head", "embedding", "router", "norm")
"""What is left alone unless asked for: roles that break a model out of proportion to their size."""

ROLES = ("attention", "mlp", "expert", "head", "embedding", "router", "norm", "other")

_ATTENTION = re.compile(r"attn|attention|\b(q|k|v|o|c_attn|qkv|query|key|value)(_proj|_lin)?\b", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_forward|\bfc\d?\b|intermediate|gate_proj|up_proj|down_proj|\bwi(_\d)?\b|dense", re.IGNORECASE
)
_ROUTER = re.compile(r"\b(router|gate|shared_expert_gate|classifier_router)\b", re.IGNORECASE)


def role(model: nn.Module, name: str, held: Mapping[str, Tensor] | None = None) -> str:
    """What a parameter is for, one of ROLES, by the modules on its path.

    `held` are the model's tensors, which whoever asks about many has looked up once.
    """
    path = module_of(model, name)
    module = model.get_submodule(path)
    value = (tensors(model) if held is None else held)[name]
    output = getattr(model, "get_output_embeddings", lambda: None)()
    if output is not None and any(p is value for p in output.parameters()):
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if value.dim() < 2 or "norm" in type(module).__name__.lower():
        return "norm"
    if "experts" in path.lower() or (value.dim() == 3 and "conv" not in type(module).__name__.lower()):
        return "expert"
    last = path.rpartition(".")[2]
    if _ROUTER.fullmatch(last) or "router" in type(module).__name__.lower():
        return "router"
    if _ATTENTION.search(path.replace(".", " ")):
        return "attention"
    return "mlp" if _MLP.search(path.replace(".", " ")) else "other"


def selected(model: nn.Module, names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Those of some parameter names that any pattern matches. Raises SiteError for a pattern that matches nothing."""
    found: set[str] = set()
    everything = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    classes = {type(m).__name__ for m in model.modules()}
    held = tensors(model)
    for pattern in patterns:
        if pattern in ROLES:
            found |= {n for n in names if role(model, n, held) == pattern}
            continue
        hits = [n for n in everything if _matches(model, n, pattern, classes)]
        if not hits:
            raise SiteError(
                f"{pattern!r} was given to choose sites",
                "it matches no parameter, module class or role",
                did_you_mean(pattern, {_anywhere(n) for n in everything} | classes | set(ROLES)),
            )
        found |= set(hits)
    return [n for n in names if n in found]


def _matches(model: nn.Module, name: str, pattern: str, classes: set[str]) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.search(pattern[3:], name) is not None
        except re.error as error:
            raise SiteError(
                f"{pattern!r} was given to choose sites",
                f"what follows re: is no regular expression: {error}",
                "Mend it, or leave re: out for a glob such as *.mlp.*",
            ) from None
    if pattern in classes:
        return type(model.get_submodule(name.rpartition(".")[0])).__name__ == pattern
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name.removesuffix(".weight"), pattern)


def _anywhere(name: str) -> str:
    """The glob for modules that go by the last word of a name, wherever they are."""
    return "*." + name.removesuffix(".weight").rpartition(".")[2]


def weights(model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = DEFAULT_EXCLUDE) -> list[Site]:
    """A site for every matrix and kernel, each element a unit: [out, in] or [out, in, kh, kw].

    In a model with stacks of attention blocks only what lies in the blocks is taken, as the language-model papers do;
    elsewhere everything is. `include` and `exclude` are selections; stacked experts give a site each. Raises
    SiteError when nothing is left.
    """
    model = unwrapped(model)
    named = tensors(model)
    found = stacks(model)
    blocks_ = [name for stack in found for name in stack]
    candidates: list[str] = []
    seen: set[int] = set()
    for name, value in model.named_parameters(remove_duplicate=False):
        name = plain(name)
        if value.dim() < 2 or id(value) in seen or not value.is_floating_point():
            continue
        seen.add(id(value))
        candidates.append(name)
    attention = any(role(model, name) == "attention" for name in candidates)
    if blocks_ and attention and not include:
        candidates = [n for n in candidates if any(n.startswith(b + ".") for b in blocks_)]
    if include:
        candidates = selected(model, candidates, include)
    if exclude:
        gone = set(selected(model, candidates, exclude))
        candidates = [n for n in candidates if n not in gone]
    sites = [site for name in candidates for site in _sites_of(model, name, named[name], blocks_)]
    if not sites:
        raise SiteError(
            f"weights of {type(model).__name__} were to be cut (include={list(include)}, exclude={list(exclude)})",
            "nothing is left to prune",
            "Widen include or narrow exclude; `secateur plan` prints what there is.",
        )
    return sites


def _sites_of(model: nn.Module, name: str, value: Tensor, blocks_: Sequence[str]) -> Iterator[Site]:
    module = model.get_submodule(name.rpartition(".")[0])
    block = next((b for b in blocks_ if name.startswith(b + ".")), "")
    turned = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
    if value.dim() == 3 and not isinstance(module, nn.modules.conv._ConvNd):
        for index in range(len(value)):
            shape = tuple(value.shape[1:])
            part = Part(name, shape, index=index, itemsize=value.element_size())
            yield Site(part.key, "weight", shape, (part,), block=block)
        return
    shape = tuple(reversed(value.shape)) if turned else tuple(value.shape)
    part = Part(name, shape, turned=turned, itemsize=value.element_size())
    yield Site(name, "weight", shape, (part,), block=block)


def without_classifier(sites: Sequence[Site]) -> list[Site]:
    """All but the last matrix, where that stands alone behind the others and is not in a stack of blocks."""
    last = sites[-1]
    alone = len(sites) > 1 and len(last.shape) == 2 and not last.block and last.parts[0].index is None
    return list(sites[:-1] if alone else sites)


def blocks(
    model: nn.Module, size: tuple[int, int], include: Sequence[str] = (), exclude: Sequence[str] = DEFAULT_EXCLUDE
) -> list[Site]:
    """A site for every matrix, its units tiles of r x c weights: [out / r, in / c].

    Raises SiteError for a matrix that the tiles do not divide.
    """
    r, c = size
    out = []
    for site in weights(model, include, exclude):
        part = site.parts[0]
        rows, columns = part.shape[0], prod(part.shape[1:])
        if len(part.shape) != 2 or rows % r or columns % c:
            raise SiteError(
                f"{site.name} {list(part.shape)} was to be cut into {r}x{c} blocks",
                "they do not divide it",
                "Leave it out with exclude, or choose another size.",
            )
        grid = (rows // r, columns // c)
        owner = torch.arange(grid[0] * grid[1]).reshape(grid)
        owner = owner.repeat_interleave(r, 0).repeat_interleave(c, 1)
        out.append(replace(site, kind="block", shape=grid, parts=(replace(part, owner=owner),)))
    return out


def layers(model: nn.Module) -> list[Site]:
    """A site for each stack, its units whole blocks: [blocks]; to be removed by replacing them by the identity."""
    out = []
    for stack in stacks(model):
        parts = []
        for unit, name in enumerate(stack):
            for key, value in model.get_submodule(name).named_parameters():
                owner = torch.full((1,) * value.dim(), unit)
                parts.append(Part(f"{name}.{key}", tuple(value.shape), owner, itemsize=value.element_size()))
        out.append(Site(stack[0].rpartition(".")[0], "layer", (len(stack),), tuple(parts)))
    return out


GATES = {"RNN": ("state",), "GRU": ("reset", "update", "new"), "LSTM": ("input", "forget", "cell", "output")}
"""The gates of each kind of recurrent cell, in the order in which their rows are stacked."""

RECURRENT_ROLES = {"input-to-hidden": "weight_ih", "hidden-to-hidden": "weight_hh", "projection": "weight_hr"}
"""What a recurrent cell's matrices read from, and how their names begin: weight_ih_l0, weight_hh_l1_reverse."""


def recurrent(model: nn.Module, roles: Sequence[str] = ("input-to-hidden", "hidden-to-hidden")) -> list[Site]:
    """A site for every matrix of a recurrent cell that has one of some roles: [gates * hidden, in]; never a bias.

    Sees RNN, GRU and LSTM, in all their layers and both directions, and the cells of one step. Raises SiteError where
    there is no recurrent cell, or none with such a matrix.
    """
    found = [
        Site(name, "weight", shape, (Part(name, shape, itemsize=value.element_size()),))
        for name, value, _ in _recurrent(model, roles)
        for shape in (tuple(value.shape),)
    ]
    return _some(model, found, f"{' and '.join(roles)} matrices")


def gates(
    model: nn.Module, names: Sequence[str], roles: Sequence[str] = ("input-to-hidden", "hidden-to-hidden")
) -> list[Site]:
    """A site for each of some gates of every matrix that has one of some roles: [hidden, in].

    `names` are of GATES: "reset", "forget" and so on. Raises SiteError for a gate that no cell of the model has.
    """
    there = {gate for _, _, kind in _recurrent(model, roles) for gate in GATES[kind]}
    for gate in names:
        if there and gate not in there:
            raise SiteError(
                f"gate {gate!r} was asked for", "no recurrent cell of the model has it", did_you_mean(gate, there)
            )
    found = []
    for name, value, kind in _recurrent(model, roles):
        if ".weight_hr" in f".{name}":  # what an LSTM's projection writes is no longer a gate's
            continue
        hidden, width = value.shape[0] // len(GATES[kind]), value.shape[1]
        for place, gate in enumerate(GATES[kind]):
            if gate in names:
                owner = torch.full(tuple(value.shape), -1)
                owner[place * hidden : (place + 1) * hidden] = torch.arange(hidden * width).reshape(hidden, width)
                part = Part(name, tuple(value.shape), owner, itemsize=value.element_size())
                found.append(Site(f"{name}[{gate}]", "weight", (hidden, width), (part,)))
    return _some(model, found, f"gates {', '.join(names)} of {' and '.join(roles)} matrices")


def _recurrent(model: nn.Module, roles: Sequence[str]) -> Iterator[tuple[str, Tensor, str]]:
    """Name, tensor and kind of cell of every matrix of some roles, tied ones once."""
    for role_ in roles:
        if role_ not in RECURRENT_ROLES:
            raise SiteError(
                f"the {role_!r} matrices of recurrent cells were asked for",
                "there is no such role",
                did_you_mean(role_, RECURRENT_ROLES),
            )
    starts = tuple(RECURRENT_ROLES[role_] for role_ in roles)
    seen: set[int] = set()
    for path, module in model.named_modules():
        if not isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
            continue
        kind = next(k for k in ("GRU", "LSTM", "RNN") if k in (getattr(module, "mode", "") or type(module).__name__))
        for key, value in module.named_parameters(recurse=False):
            if key.startswith(starts) and id(value) not in seen:
                seen.add(id(value))
                yield (f"{path}.{key}" if path else key), value, kind


def _some(model: nn.Module, sites: list[Site], what: str) -> list[Site]:
    if not sites:
        raise SiteError(
            f"{what} of {type(model).__name__} were to be cut",
            "it has no recurrent cell with any",
            "Give a model with nn.RNN, nn.GRU or nn.LSTM in it, or choose other roles.",
        )
    return sites


@replacement
class Passing(nn.Module):
    """Where a block was: hands on the hidden state, whatever else it is given."""

    passes_through = True

    def __init__(self, outputs: int = 0, attention_type: str = "") -> None:
        super().__init__()
        self.outputs = outputs  # how many values the block gave back, the hidden state first; 0: it, bare
        if attention_type:
            self.attention_type = attention_type  # some models ask a block which mask it wants

    def settings(self) -> dict[str, object]:
        """What it is built from."""
        return {"outputs": self.outputs, "attention_type": getattr(self, "attention_type", "")}

    def forward(self, *args: object, **kwargs: object) -> object:
        """The first tensor it is given, in the form in which the block answered."""
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (x, *[None] * (self.outputs - 1)) if self.outputs else x

    def join_(self, model: nn.Module) -> None:
        """Number the layers that still work without gaps, as they index the cache of keys and values.

        A cache asks its first entry how long it is, and would find it empty for ever if that layer were gone. Where
        layers are of several types (sliding, full), each type keeps to the entries of its own.
        """
        path = next(name for name, module in model.named_modules() if module is self).rpartition(".")[0]
        here = list(model.get_submodule(path).children())
        config = getattr(model, "config", None)
        types = getattr(getattr(config, "text_config", None) or config, "layer_types", None)
        if not isinstance(types, (list, tuple)) or len(types) != len(here):
            types = [""] * len(here)
        for kind in set(types):
            places = [i for i, found in enumerate(types) if found == kind]
            working = [here[i] for i in places if not getattr(here[i], "passes_through", False)]
            for place, layer in zip(places, working, strict=False):
                for module in layer.modules():
                    if isinstance(getattr(module, "layer_idx", None), int):
                        module.layer_idx = place  # type: ignore[assignment]


def passing(block: nn.Module, outputs: int = 0) -> Passing:
    """What to put where a block was, given how many values it gives back (0: a bare tensor)."""
    return Passing(outputs, str(getattr(block, "attention_type", "") or ""))
