"""Each component of a text-to-image pipeline bears another sparsity: find its cliff, and stop before it.

Ramesh, Zhao. "Efficient Pruning of Text-to-Image Models: Insights from Pruning Stable Diffusion." 2024,
arXiv:2411.15113, sections 3 and 4: text encoder and denoiser are masked apart, after training, by magnitude, Wanda or
either with OWL's allocation; the sparsity of each is swept, and then both together.

    secateur prune FOLDER text_to_image --components text_encoder=magnitude@0.475,unet=magnitude@0.35
    secateur prune FOLDER text_to_image --components text_encoder=wanda+owl(outlier=7)@0.5 --search line
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, log10, prod
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import (
    Allocation,
    Criterion,
    Magnitude,
    Pattern,
    PerMatrix,
    PerRow,
    Rank,
    Uniform,
    Wanda,
    keep_top,
    part_of,
    text_of,
)
from secateur.axes.cliffs import Search, Shares, by_itself
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import fitted, spread, sweep
from secateur.cut import weights
from secateur.edit import Edit
from secateur.errors import SettingError, SiteError, did_you_mean
from secateur.evidence import INPUTS
from secateur.method import Budget, Card, Method, check_count, check_sparsity
from secateur.outcome import Outcome, Pictures
from secateur.site import Site, tensors
from secateur.task import Batch, Task
from secateur.train import History


def decibels(kept: float, removed: float) -> float:
    """10 log10 of the energy kept over the energy removed, each a sum of squared weights; infinite if none is."""
    return 10 * log10(kept / removed) if removed > 0 and kept > 0 else inf if removed <= 0 else -inf


def nominal(shares: Mapping[str, float], sizes: Mapping[str, int]) -> float:
    """The paper's overall figure: sparsities weighted by all parameters of their components, dense ones included."""
    return sum(shares[name] * sizes[name] for name in shares) / sum(sizes[name] for name in shares)


@dataclass(frozen=True)
class Band:
    """Not the smallest weights of a matrix go but those above a quantile: which of them carry a cliff?"""

    above: float = 0.0  # quantile below which everything stays

    span = None
    fixed = None

    def __post_init__(self) -> None:
        check_sparsity(self.above, "quantile")

    def select(self, score: Tensor, keep: int, within: Tensor | None = None) -> Tensor:
        """See Pattern."""
        flat = score.reshape(-1).float()
        spared = int(self.above * len(flat) + 1e-9)
        below = ~keep_top(flat, len(flat) - spared)
        allowed = None if within is None else within.reshape(-1)
        return keep_top(flat.masked_fill(below, torch.inf), keep, allowed).reshape(score.shape)

    def nearest(self, shape: tuple[int, ...], keep: int) -> int:
        """Any count that leaves what lies below the band."""
        units = prod(shape)
        return min(max(keep, int(self.above * units + 1e-9)), units)


@dataclass(frozen=True)
class Scope:
    """What is done to one component: `text_encoder=wanda+owl(outlier=7)@0.5`, `unet=magnitude@0.3-0.4`."""

    component: str
    sparsity: float
    criterion: Criterion = Magnitude()
    pattern: Pattern = PerMatrix()
    allocation: Allocation = Uniform()

    @classmethod
    def read(cls, text: str) -> "Scope":
        """A scope as it is written: COMPONENT=PARTS@SPARSITY, the parts joined by +, magnitude if there are none.

        A sparsity written as two quantiles, 0.3-0.4, removes what lies between them. Raises SettingError.
        """
        asked = f"component {text!r} was given"
        shape = re.fullmatch(r"\s*(\w[\w.]*)\s*=\s*(?:(.+)@)?\s*([\d.]+%?)(?:\s*-\s*([\d.]+%?))?\s*", text, re.DOTALL)
        if shape is None:
            raise SettingError(asked, "it cannot be read", "Write it as unet=magnitude@0.35, or unet=0.35.")
        found: dict[str, Any] = {}
        for written in re.split(r"\+(?![^()]*\))", shape[2] or "magnitude"):
            part = part_of(written)
            word = next((w for w, kind in _PARTS.items() if isinstance(part, kind)), None)
            if word is None or word in found:
                raise SettingError(
                    asked,
                    f"{written.strip()!r} is no criterion, pattern or allocation"
                    if word is None
                    else f"it has two of a kind: {text_of(found[word])} and {text_of(part)}",
                    "Give one criterion, and one pattern and one allocation at most: wanda+per-row+owl.",
                )
            found[word] = part
        low = _fraction(shape[3], asked)
        if shape[4] is not None:
            high = _fraction(shape[4], asked)
            if "pattern" in found or high <= low:
                raise SettingError(
                    asked,
                    f"its band runs from {low:g} to {high:g}"
                    if high <= low
                    else f"a band of {low:g} to {high:g} is a pattern, beside {text_of(found['pattern'])}",
                    "Give the lower quantile first, and no other pattern: unet=magnitude@0.3-0.4.",
                )
            found["pattern"], low = Band(low), high - low
        if "pattern" not in found and found.get("criterion", Magnitude()).needs:
            found["pattern"] = PerRow()
        scope = cls(shape[1], low, **found)
        check_pattern(scope.pattern, scope.sparsity)
        return scope

    @property
    def how(self) -> str:
        """Its parts in a few words."""
        named = [text_of(self.criterion), text_of(self.pattern)]
        return "+".join(named + ([] if self.allocation == Uniform() else [text_of(self.allocation)]))


_PARTS: dict[str, type] = {"criterion": Criterion, "pattern": Pattern, "allocation": Allocation}


def _fraction(text: str, asked: str) -> float:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        raise SettingError(asked, f"{text!r} is not a number", "Give a fraction such as 0.35.") from None
    check_sparsity(value)
    return value


@runtime_checkable
class Painter(Protocol):
    """A model made of components, of which the text encoder alone answers to captions."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its components."""
        ...

    def unused(self) -> frozenset[str]:
        """Tensors that no picture depends on."""
        ...


@runtime_checkable
class Draws(Protocol):
    """A task that can show what a model draws."""

    def draw(self, model: nn.Module, of: str, most: int = 10) -> Pictures:
        """A row of pictures."""
        ...


def components(model: nn.Module) -> list[str]:
    """The names that a component may have: a pipeline's networks, or the children of any other model with weights."""
    if isinstance(model, Painter):
        return list(model.names)
    return [name for name, child in model.named_children() if any(p.dim() >= 2 for p in child.parameters())]


def trimmed(batches: Sequence[Batch]) -> Iterator[Batch]:
    """The same captions without their padding, those of one length together."""
    for batch in batches:
        assert isinstance(batch.inputs, Mapping)
        ids, mask = batch.inputs["input_ids"], batch.inputs["attention_mask"].bool()
        lengths = mask.sum(1)
        for length in lengths.unique().tolist():
            rows = lengths == length
            short = ids[rows][mask[rows]].reshape(-1, length)
            yield Batch({"input_ids": short, "attention_mask": torch.ones_like(short)})


@dataclass(frozen=True, kw_only=True)
class TextToImage(Method):
    """Mask each component by parts and at a sparsity of its own, in one shot, or search how much each bears.

    No retraining. Any model with named children will do as a pipeline of them.
    """

    components: tuple[str, ...] = ("text_encoder=magnitude@0.475", "unet=magnitude@0.35")  # NAME=PARTS@SPARSITY
    search: Search | None = None  # how the sparsities are found, instead of those given
    samples: int = 128  # calibration captions of wanda and owl, padded as at inference
    ignore_padding: bool = False  # whether scores leave out what flows through padding
    split: str = "val"  # where a search measures
    show: int = 10  # pictures in a row of the report; 0 draws none
    include: tuple[str, ...] = ()  # by name, class or role; () is every linear layer: Linear,Conv2d adds convolutions
    exclude: tuple[str, ...] = ()  # what to leave alone

    card: ClassVar = Card(
        26,
        "Efficient pruning of text-to-image models: insights from pruning Stable Diffusion",
        arxiv="2411.15113",
        year=2024,
        needs=("calibration",),
        families=("encoder",),
        axes="criterion pattern allocation",
        criterion=("magnitude", "activation"),
        tasks=("text to image",),
        allocation=("uniform",),
        models=("diffusion",),
        reports="Stable Diffusion 2, FID on 10,000 captions: dense 18.07; text encoder 47.5 % and UNet 35 % by "
        "magnitude 18.1, 60 % and 47.5 % 140; by itself the text encoder falls behind 57.5 %, the UNet behind 35 %.",
        checked="tests/methods/test_text_to_image.py::test_two_components_by_hand",
        differs=(
            "Exactly the asked number of weights goes: in the published code a sparsity that rounds to no weight "
            "zeroes the whole matrix.",
            "Linear layers are found by isinstance, where the published code asks for the exact type and misses "
            "subclasses; convolutions stay dense unless included.",
            "Weights that no picture depends on (a pooler, layers behind the one that is read) are not pruned and not "
            "counted: their zeros would look free.",
            "Calibration takes as many captions as asked, where the published buffer holds 128 whatever is asked.",
            "OWL's densities meet the budget in weights, where the published ones meet it as a mean over blocks; its M "
            "is 5 unless owl(outlier=7), the paper's, is given.",
        ),
    )
    tiny: ClassVar = {"components": ("bert=wanda@0.5",), "samples": 8, "show": 0}

    def check(self) -> None:
        """See Method. Raises SettingError for a component that cannot be read or searched, or is named twice."""
        check_count(self.samples, "calibration samples")
        check_count(self.show, "pictures in a row", least=0)
        for scope in self.scopes():
            if self.search is not None and (isinstance(scope.pattern, Band) or scope.pattern.fixed is not None):
                raise SettingError(
                    f"the sparsity of {scope.component} was to be searched",
                    f"{text_of(scope.pattern)} "
                    + ("spares what lies below it" if scope.pattern.fixed is None else "prescribes it")
                    + ", whatever sparsity is tried",
                    "Search with per-matrix or per-row, or give sparsities without search.",
                )

    def budget(self) -> None:
        """Each component has a sparsity of its own; what they make together is in the notes."""
        return

    def scopes(self) -> tuple[Scope, ...]:
        """The components, read. Raises SettingError."""
        found = tuple(Scope.read(text) for text in self.components)
        names = [scope.component for scope in found]
        twice = next((n for n in names if names.count(n) > 1), None)
        if twice or not found:
            raise SettingError(
                f"components {', '.join(self.components) or 'without any'} were given",
                f"{twice} is named twice" if twice else "there is nothing to prune",
                "Name each component once, such as unet=magnitude@0.35.",
            )
        return found

    def sites_in(self, model: nn.Module) -> list[Site]:
        """The sites of all components. Raises as `sites_of`."""
        return [site for scope in self.scopes() for site in self.sites_of(model, scope)]

    def sites_of(self, model: nn.Module, scope: Scope) -> list[Site]:
        """The sites of one component: its linear layers, or what is included.

        Raises SiteError for a component that is not there or holds nothing to prune, SettingError for parts it cannot
        be scored by.
        """
        known = components(model)
        if scope.component not in known:
            raise SiteError(
                f"component {scope.component!r} was to be pruned",
                f"{type(model).__name__} has none of that name",
                did_you_mean(scope.component, known),
            )
        needs = scope.criterion.needs
        if needs - INPUTS or (needs and isinstance(model, Painter) and scope.component != "text_encoder"):
            raise SettingError(
                f"{scope.component} was to be pruned by {text_of(scope.criterion)}",
                "it needs gradients" if needs - INPUTS else "captions flow through the text encoder alone",
                "Use magnitude there.",
            )
        inside, unused = f"{scope.component}.", _unused(model)
        sites: list[Site] = []
        if self.include:
            sites = [s for s in weights(model, self.include, self.exclude) if s.parts[0].name.startswith(inside)]
        else:
            component = model.get_submodule(scope.component)
            names = tuple(f"{inside}{n}.weight" for n, m in component.named_modules() if n and isinstance(m, nn.Linear))
            names += (f"{inside}weight",) if isinstance(component, nn.Linear) else ()
            sites = weights(model, names, self.exclude) if names else []
        sites = [site for site in sites if site.parts[0].name not in unused]
        if not sites:
            raise SiteError(
                f"component {scope.component!r} was to be pruned",
                "nothing of it is left: it has no linear layers, or they are excluded",
                "Widen include: Linear,Conv2d takes convolutions as well.",
            )
        return sites

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        scopes = self.scopes()
        bench = _Bench(self, model, task, scopes, {s.component: self.sites_of(model, s) for s in scopes})
        notes = [note for scope in scopes for note in bench.about(scope)]
        shares = {scope.component: scope.sparsity for scope in scopes}
        bench.show("dense")
        if self.search is not None:
            shares = self.search.find(bench.trial, bench.sizes, notes)
            notes.append("found: " + ", ".join(f"{name} {share:g}" for name, share in shares.items()))
        elif len(scopes) > 1:
            for name, share in shares.items():
                with bench.pruned(by_itself(bench.sizes, name, share)):
                    bench.show(f"{name} {share:.4g}")
        edits = bench.prune_(shares)
        bench.show("together" if len(scopes) > 1 else f"{scopes[0].component} {scopes[0].sparsity:.4g}")
        notes += bench.totals(shares, edits)
        history = History(curves=bench.curves) if bench.curves else None
        return Outcome(model, edits, history, notes=notes, pictures=bench.rows)


def _unused(model: nn.Module) -> frozenset[str]:
    return model.unused() if isinstance(model, Painter) else frozenset()


@dataclass(eq=False)
class _Bench:
    """A model whose components can be pruned, measured and put back."""

    method: TextToImage
    model: nn.Module
    task: Task
    scopes: Sequence[Scope]
    sites: Mapping[str, list[Site]]
    rows: list[Pictures] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _values: dict[tuple[float, ...], float] = field(default_factory=dict)
    _calibration: list[Batch] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """How many weights of each component can be pruned."""
        return {name: sum(site.units for site in sites) for name, sites in self.sites.items()}

    @property
    def whole(self) -> dict[str, int]:
        """How many parameters each component has."""
        return {name: sum(p.numel() for p in self.model.get_submodule(name).parameters()) for name in self.sites}

    def batches(self) -> list[Batch]:
        """Calibration captions, once read."""
        if self._calibration is None:
            found = list(self.task.batches("calibration", self.method.samples))
            bare = self.method.ignore_padding and isinstance(self.model, Painter)
            self._calibration = list(trimmed(found)) if bare else found
        return self._calibration

    def prune_(self, shares: Shares) -> list[Edit]:
        """Prune the components, each at its share."""
        edits: list[Edit] = []
        for scope in self.scopes:
            if shares[scope.component] > 0:
                edits += self._prune_one(replace(scope, sparsity=shares[scope.component]))
        return edits

    def _prune_one(self, scope: Scope) -> list[Edit]:
        sites, solver = self.sites[scope.component], Rank(scope.criterion, scope.pattern)
        # As published, OWL looks at Wanda's scores whatever is ranked by then, where there are captions to score with.
        heard = scope.component == "text_encoder" or not isinstance(self.model, Painter)
        look: Criterion = Wanda() if scope.allocation.needs_scores and heard else scope.criterion
        needs = solver.needs | (look.needs if scope.allocation.needs_scores else frozenset())
        batches = self.batches() if needs else []
        keep = spread(self.model, sites, scope.allocation, Budget(scope.sparsity), look, batches)
        if scope.allocation != Uniform():
            keep = fitted(sites, keep, scope.pattern)
        return sweep(self.model, sites, solver, keep, batches)

    def pruned(self, shares: Shares) -> "_Lent":
        """The model pruned so within a `with`, and as it was behind it."""
        return _Lent(self, shares)

    def trial(self, shares: Shares) -> float:
        """The metric of the model pruned so, lower is better; each configuration is measured once."""
        key = tuple(shares[name] for name in self.sites)
        sign = -1.0 if self.task.higher_is_better else 1.0
        if key not in self._values:
            moved = [name for name in self.sites if shares[name] > 0]
            with self.pruned(shares):
                self._values[key] = sign * self.task.measure(self.model, self.method.split)[self.task.metric]
                if len(moved) == 1:
                    self.show(f"{moved[0]} {shares[moved[0]]:.4g}")
            for name in moved if len(moved) == 1 else []:
                curve = self.curves.setdefault(f"{self.task.metric}, {name} alone, by percent removed", [])
                curve.append((round(100 * shares[name]), sign * self._values[key]))
        return self._values[key]

    def show(self, of: str) -> None:
        """Draw a row of pictures, if the task can."""
        if self.method.show and isinstance(self.task, Draws):
            self.rows.append(self.task.draw(self.model, of, self.method.show))

    def about(self, scope: Scope) -> list[str]:
        """What of a component is covered."""
        name, sites = scope.component, self.sites[scope.component]
        component = self.model.get_submodule(name)
        unused = sorted(n for n in _unused(self.model) if n.startswith(f"{name}.") and n.endswith("weight"))
        taken = {site.parts[0].name for site in sites}
        convolutions = sum(
            f"{name}.{n}.weight" not in taken
            for n, m in component.named_modules()
            if isinstance(m, nn.modules.conv._ConvNd)
        )
        size, whole = self.sizes[name], self.whole[name]
        text = f"{name}: {size:,} weights of {len(sites)} layers can be pruned, {size / whole:.1%} of its {whole:,}"
        text += f", by {scope.how}" + (f"; its {convolutions} convolutions stay dense" if convolutions else "")
        more = [f"{name}: left out, as no picture depends on them: {', '.join(unused)}"] if unused else []
        return [text, *more]

    def totals(self, shares: Shares, edits: Sequence[Edit]) -> list[str]:
        """The paper's overall figure, the zeros there really are, and the energy that is gone."""
        named, whole = tensors(self.model), self.whole
        removed = dict.fromkeys(self.sites, 0)
        notes = []
        for name, sites in self.sites.items():
            masks = [e for e in edits if getattr(e, "site", None) in sites]
            removed[name] = sum(e.site.units - e.kept for e in masks)  # type: ignore[attr-defined]
            kept = sum(float(site.parts[0].read(named).detach().double().square().sum()) for site in sites)
            gone = self.energy[name] - kept
            if removed[name]:
                notes.append(
                    f"{name}: {removed[name]:,} weights are zero, {removed[name] / whole[name]:.1%} of the component; "
                    f"energy kept over removed {decibels(kept, gone):.1f} dB"
                )
        every, true = sum(whole.values()), sum(removed.values())
        notes.append(
            f"overall {nominal(shares, whole):.1%} as the paper counts (sparsities weighted by whole components); "
            f"{true:,} of {every:,} parameters are really zero, {true / every:.1%}"
        )
        return notes

    def __post_init__(self) -> None:
        named = tensors(self.model)
        self.energy = {
            name: sum(float(site.parts[0].read(named).detach().double().square().sum()) for site in sites)
            for name, sites in self.sites.items()
        }


class _Lent:
    """Prunes on entering; puts back every weight on leaving."""

    def __init__(self, bench: _Bench, shares: Shares) -> None:
        self.bench, self.shares = bench, shares
        self.held: dict[str, Tensor] = {}

    def __enter__(self) -> None:
        named = tensors(self.bench.model)
        moved = [site for name, sites in self.bench.sites.items() if self.shares[name] > 0 for site in sites]
        self.held = {part.name: named[part.name].detach().clone() for site in moved for part in site.parts}
        self.bench.prune_(self.shares)

    def __exit__(self, *about: object) -> None:
        named = tensors(self.bench.model)
        with torch.no_grad():
            for name, value in self.held.items():
                named[name].copy_(value)
