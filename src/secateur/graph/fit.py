"""Trying sites on the model: the numbers modules keep about themselves, and whether a cut is right."""

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor, nn

from secateur.edit import Mask, _set_tensor
from secateur.graph.trace import Frozen, answer, culprit, plain
from secateur.site import Kind, Number, Part, Site, module_of, tensors
from secateur.task import Batch

# Attributes that count units by their very name: tried first, and together.
_COUNTS = {
    "head": re.compile(
        r"(num|n)_?(attention_?|query_?|key_?value_?|kv_?|self_?)*heads?|heads|all_head_size|split_size|inner_dim"
    ),
    "channel": re.compile(r"(intermediate|ffn|inner|mlp)_(size|dim|features|channels)|hidden_(dim|features|channels)"),
    "stream": re.compile(r"hidden_size|embed_dim|hidden_dim|d_model|n_embd"),
}


def fit(
    model: nn.Module, example: Batch, sites: Sequence[Site], inexact: frozenset[str]
) -> tuple[list[Site], list[Frozen], dict[str, int]]:
    """The sites that can be cut, with the numbers that must change; those that cannot, with the reason; and those of
    which only a multiple of some number may stay."""
    trial = _Trial(model, example, inexact)
    trial.shorten()
    found: list[Site] = []
    failed: dict[str, str] = {}
    learned: dict[tuple, _Learned | str] = {}
    for site in sites:
        root = _root(model, site)
        # Sites that look alike in modules of one class are tried once.
        looks = tuple((part.name[len(root) :], _width(part)) for part in site.parts)
        alike = (site.kind, type(model.get_submodule(root)), site.units, looks)
        if alike not in learned:
            learned[alike] = _learn(model, trial, site, root)
            if isinstance(learned[alike], str) and site.units > _MULTIPLE and site.units % _MULTIPLE == 0:
                # Some kernels (grouped products of experts) take rows of whole 16 bytes only.
                trial.multiples[site.name] = _MULTIPLE
                found_whole = _learn(model, trial, site, root)
                learned[alike] = learned[alike] if isinstance(found_whole, str) else found_whole
        rule = learned[alike]
        if isinstance(rule, str):
            failed[site.name] = rule
        else:
            more = tuple(Number(_under(root, path), a, per) for path, a, per in rule.numbers)
            found.append(replace(site, numbers=(*site.numbers, *more)))
            trial.multiples[site.name] = rule.multiple
    found += _tied(model, trial, [site for site in sites if site.name in failed], failed)
    good = list(found)
    trial.example = example  # what the first tokens taught holds for all of them
    exact = [site for site in good if site.name not in inexact]  # of which the answer can be compared
    if (len(exact) < len(good) and exact and trial.complaint(exact)) or (good and trial.complaint(good)):
        # One that passed for another like it does not: each on its own.
        for site in good:
            if own := trial.complaint([site]):
                failed[site.name] = own
        good = [site for site in good if site.name not in failed]
        if good and trial.complaint(good):
            together: list[Site] = []
            for site in good:
                if trial.complaint([*together, site]):
                    failed[site.name] = "it cannot be cut along with the sites before it"
                else:
                    together.append(site)
            good = together
    multiples = {site.name: m for site in good if (m := trial.multiples[site.name]) > 1}
    return good, [Frozen(f"{s.kind} site", s.name, failed[s.name]) for s in sites if s.name in failed], multiples


_MULTIPLE = 8


def _tied(model: nn.Module, trial: "_Trial", sites: Sequence[Site], failed: dict[str, str]) -> list[Site]:
    """Sites that the code ties by a number alone, so that neither can be cut without the other; no longer failed.

    A strided convolution inside attention whose answer is reshaped to the width of its input is an example.
    """
    found: list[Site] = []
    for first in sites:
        if first.name not in failed:
            continue
        taken = {(part.key, part.axis) for part in first.parts}
        others = [
            site for site in sites
            if site is not first and site.name in failed and site.units == first.units
            and not taken & {(part.key, part.axis) for part in site.parts}
        ]  # fmt: skip
        groups = (
            [[first, *others], *([first, other] for other in others[:2])] if len(others) > 1 else [[first, *others]]
        )
        for group in groups if others else ():
            # Named for one whose norm counts its units, where there is one: zeroing it is not removing it.
            name = next((site.name for site in group if site.name in trial.inexact), first.name)
            kind: Kind = "stream" if any(site.kind == "stream" for site in group) else first.kind
            both = replace(
                first, name=name, kind=kind, parts=tuple(p for site in group for p in site.parts),
                numbers=tuple(n for site in group for n in site.numbers),
                block=first.block if len({site.block for site in group}) == 1 else "",
            )  # fmt: skip
            root, trial.multiples[name] = _root(model, both), 1
            rule = _learn(model, trial, both, root)
            if isinstance(rule, _Learned):
                more = tuple(Number(_under(root, path), a, per) for path, a, per in rule.numbers)
                found.append(replace(both, numbers=(*both.numbers, *more)))
                for site in group:
                    del failed[site.name]
                break
    return found


_TOKENS = 16  # enough to see whether a cut is right: the whole example is for what is offered in the end


def _tokens(value: object) -> bool:
    """Whether this is a table of whole numbers, texts by tokens."""
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


@dataclass(frozen=True)
class _Learned:
    numbers: tuple[tuple[str, str, float], ...]  # path below the root, attribute, per unit
    multiple: int = 1


def _root(model: nn.Module, site: Site) -> str:
    """The module that holds every part."""
    shared = []
    for pieces in zip(*(module_of(model, part.name).split(".") for part in site.parts), strict=False):
        if len(set(pieces)) > 1:
            break
        shared.append(pieces[0])
    return ".".join(shared)


def _width(part: Part) -> int:
    """How many entries of a part a unit owns."""
    assert part.owner is not None, "graph sites are removable"
    return int((part.owner == 0).sum())


def _under(root: str, path: str) -> str:
    return ".".join(p for p in (root, path) if p)


def _learn(model: nn.Module, trial: "_Trial", site: Site, root: str) -> _Learned | str:
    """Numbers with which a cut is right, or why there are none."""
    paths = _around(model, site, root)
    asked = {_under(root, path) for path in paths}
    candidates = _counts(model, site, root, paths)
    named = [c for c in candidates if _COUNTS[site.kind].fullmatch(c[1])]
    others = [c for c in candidates if c not in named]
    tries = [named, []] if named else [[]]
    tries += [[c] for c in candidates]
    tries += [list(pair) for pair in combinations(candidates, 2)]
    tries += [[*named, c] for c in others] if len(named) > 1 else []
    first = ""
    tries = tries[:40]
    if kept := _config_counts(model, site, root, paths):
        tries += [[*named, *kept], kept]
    for numbers in tries:
        made = tuple(Number(_under(root, path), attribute, per) for path, attribute, per in numbers)
        why = trial.complaint([replace(site, numbers=(*site.numbers, *made))])
        if not why:
            return _Learned(tuple(numbers), trial.multiples.get(site.name, 1))
        first = first or why
        if trial.raised is not None and trial.raised not in asked and _inside(trial.raised, root):
            # A module without weights counts the units too: it was its code that failed.
            asked.add(trial.raised)
            tries += [[*numbers, c] for c in _counts(model, site, root, {trial.raised[len(root) :].strip(".")})]
    return first


def _inside(path: str, root: str) -> bool:
    return not root or path == root or path.startswith(root + ".")


def _around(model: nn.Module, site: Site, root: str) -> set[str]:
    """The paths below the root of the modules around a site's parts."""
    paths = {""}
    for part in site.parts:
        pieces = module_of(model, part.name)[len(root) :].strip(".").split(".")
        paths |= {".".join(pieces[:i]) for i in range(1, len(pieces) + 1)}
    return paths


def _counts(model: nn.Module, site: Site, root: str, paths: Iterable[str]) -> list[tuple[str, str, float]]:
    """Whole numbers that some modules keep, and that some of a site's widths could be."""
    widths = {_width(part) for part in site.parts}
    found = []
    for path in sorted(paths):
        module = model.get_submodule(_under(root, path))
        if type(module).__module__.startswith("torch.nn.modules"):
            continue  # `Remove` sets these itself
        for attribute, value in vars(module).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < site.units or attribute.startswith("_"):
                continue
            if value % site.units == 0 and any(width % (value // site.units) == 0 for width in widths):
                found.append((path, attribute, float(value // site.units)))
    return [c for c in found if c[1] not in ("nf", "nx")]


def _config_counts(model: nn.Module, site: Site, root: str, paths: Iterable[str]) -> list[tuple[str, str, float]]:
    """Counts of units that modules read from a config they share with others: each gets a copy of its own."""
    found = []
    for path in sorted(paths):
        module = model.get_submodule(_under(root, path))
        config = getattr(module, "config", None)
        if config is None or not hasattr(config, "__dict__") or hasattr(module, "save_pretrained"):
            continue
        for attribute, value in vars(config).items():
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= site.units
            if whole and value % site.units == 0 and _COUNTS[site.kind].fullmatch(attribute):
                found.append((path, f"config.{attribute}", float(value // site.units)))
    return found


class _Trial:
    """Cuts a model, compares it with the masked one, and puts it back."""

    def __init__(self, model: nn.Module, example: Batch, inexact: frozenset[str]) -> None:
        self.model, self.example, self.inexact = model, example, inexact
        self.multiples: dict[str, int] = {}
        self._masked: tuple[list[object], list[Tensor]] = [], []  # what was masked last, and the answer then
        self.raised: str | None = None  # the module whose own code failed, when the last complaint was of a failure

    def shorten(self) -> None:
        """Keep the first tokens of the example's texts only, where the model takes that."""
        whole, inputs = self.example, self.example.inputs
        values = list(inputs.values()) if isinstance(inputs, Mapping) else list(inputs)
        short = [v[:, :_TOKENS] if _tokens(v) else v for v in values]
        if all(a.shape == b.shape for a, b in zip(values, short, strict=True) if _tokens(a)):
            return
        self.example = Batch(dict(zip(inputs, short, strict=True)) if isinstance(inputs, Mapping) else tuple(short))
        with plain(self.model):
            try:
                self.masked([], {})
            except Exception:  # whatever the model's own code raises: a table of positions, a mask of another shape
                self.example = whole

    def complaint(self, sites: Sequence[Site]) -> str:
        """What is wrong with cutting these, or "" when nothing is."""
        from secateur.graph import removals

        self.raised = None
        keep = {site.name: _some(site.units, self.multiples.get(site.name, 1)) for site in sites}
        exact = not any(site.name in self.inexact for site in sites)
        with plain(self.model):
            masked = self.masked(sites if exact else [], keep)
            with _restored(self.model):
                try:
                    for edit in removals(sites, keep):
                        edit.apply_(self.model)
                    cut = answer(self.model, self.example)
                except Exception as error:  # whatever the model's own code raises becomes the reason
                    self.raised = culprit(self.model, error)
                    line = next((s for s in str(error).splitlines() if s.strip()), type(error).__name__)
                    return f"without some of its units the forward pass fails: {line.strip()[:200]}"
        if [v.shape for v in masked] != [v.shape for v in cut]:
            return "without some of its units the model gives another shape"
        if exact and not all(close(a, b) for a, b in zip(masked, cut, strict=True)):
            return "without some of its units the model gives something else than with those at zero"
        return ""

    def masked(self, sites: Sequence[Site], keep: dict[str, Tensor]) -> list[Tensor]:
        """The answer with what is not kept at zero; remembered while other numbers are tried for the same cut."""
        what: list[object] = [
            self.example,
            *(thing for s in sites for thing in (s.parts, self.multiples.get(s.name, 1))),
        ]
        if [id(thing) for thing in what] != [id(thing) for thing in self._masked[0]]:
            with _restored(self.model):
                self.mask(sites, keep)
                self._masked = what, answer(self.model, self.example)
        return self._masked[1]

    def mask(self, sites: Sequence[Site], keep: dict[str, Tensor]) -> None:
        """Zero what is not kept, in copies of the tensors."""
        named = tensors(self.model)
        for name in {part.name for site in sites for part in site.parts}:
            _set_tensor(self.model, name, named[name].detach().clone(), named)
        for site in sites:
            Mask(site, keep[site.name]).apply_(self.model)


def _some(units: int, multiple: int) -> Tensor:
    """About two thirds of the units, in no order that a model could share: a multiple of them, else an odd number."""
    gone = max(1, units // 3 // multiple) * multiple
    gone += multiple == 1 and units > 3 and (units - gone) % 2 == 0  # else what needs a multiple would seem not to
    order = torch.randperm(units, generator=torch.Generator().manual_seed(units))
    keep = torch.ones(units, dtype=torch.bool)
    keep[order[:gone]] = False
    return keep


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two answers are one but for rounding: by 1e-3 of the largest in float32, 5e-2 in less."""
    tolerance = {torch.float64: 1e-6, torch.float32: 1e-3}.get(a.dtype, 5e-2)
    a, b = a.double(), b.double()
    return bool((a - b).abs().max() <= tolerance * a.abs().max().clamp(min=1e-6)) if a.numel() else True


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Every module's class, tensors and numbers as they were, afterwards."""
    kept = [(m, type(m), dict(vars(m)), dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    try:
        yield
    finally:
        for module, kind, attributes, parameters, buffers in kept:
            module.__class__ = kind
            vars(module).clear()
            vars(module).update(attributes)
            module._parameters.clear()
            module._parameters.update(parameters)
            module._buffers.clear()
            module._buffers.update(buffers)
