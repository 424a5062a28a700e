"""What a method would do to a model, and what that would take, before anything is damaged.

The sites come from the same cutters the methods use, by the kinds on the method's card and its own `include` and
`exclude`; counts are the method's own allocation and pattern. Time and memory are measured here: a forward pass over
the task's example and, for methods that go block after block, a trial of the first block on a copy.
"""

import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from secateur import graph
from secateur.axes import Allocation, Scores, Uniform
from secateur.axes.budgets import Met, Terms
from secateur.axes.latency import Priced
from secateur.cut import DEFAULT_EXCLUDE, layers, role, weights
from secateur.errors import PatternError, SecateurError
from secateur.method import Budget, Chain, Method, peak_memory, settings
from secateur.outcome import Size
from secateur.site import Site, tensors
from secateur.task import Task, modes_of, restore_modes_
from secateur.walk import Progress, stacks, watching

TRIAL = 8  # calibration examples of a trial


@dataclass(frozen=True)
class Row:
    """What would be done at one site."""

    site: str
    kind: str
    block: str
    shape: tuple[int, ...]
    units: int
    keep: int | None  # None: decided in the run
    weights: int
    removed: int | None


@dataclass(frozen=True)
class LeftAlone:
    """A tensor that could be thought of and is not pruned."""

    name: str
    role: str
    parameters: int


@dataclass(frozen=True)
class Price:
    """What the pruning itself takes, and how that was estimated."""

    seconds: float | None
    memory_bytes: int | None
    how: str


@dataclass(frozen=True)
class Plan:
    """A dry run."""

    method: str
    settings: dict[str, Any]
    rows: list[Row]
    left: list[LeftAlone]
    frozen: list[str]  # what cannot be taken out whole, and why
    before: Size
    after: Size | None  # estimated; None where the run decides
    asked: float | None  # sparsity
    reachable: float | None  # what the pattern makes of it
    of: str  # what the sparsity is a fraction of
    denominator: str  # the same in words, with the number
    prices: list[Priced] = field(default_factory=list)  # of layers, where time is what was asked for
    step: float = 0.0  # what one step of the widest site is of that: a sparsity is met to within it
    notes: list[str] = field(default_factory=list)
    price: Price | None = None


class _Unread(Mapping[str, Tensor]):
    """Scores that are not there yet: reading one says so."""

    class Asked(Exception):  # noqa: N818  control flow, not an error
        pass

    def __getitem__(self, name: str) -> Tensor:
        raise self.Asked

    def __iter__(self) -> Iterator[str]:
        raise self.Asked

    def __len__(self) -> int:
        raise self.Asked


@dataclass(frozen=True)
class Found:
    """The sites a method would cut."""

    sites: list[Site]
    frozen: list[str] = field(default_factory=list)  # what cannot be taken out whole, and why
    multiples: Mapping[str, int] = field(default_factory=dict)  # site -> what the units that stay are a multiple of


def sites_of(method: Method, model: nn.Module, task: Task) -> Found:
    """The sites a method would cut, by its card and settings.

    None for methods whose units are not in the weights, or are found on the way. Raises SiteError for a selection
    that matches nothing, GraphError for a network whose coupling cannot be followed.
    """
    if (own := getattr(method, "sites_in", None)) is not None:  # a method that knows which it will cut
        return Found(own(model))
    kinds = set(getattr(method, "kinds", None) or method.card.granularity)
    if kinds & {"weight", "block"}:
        include, exclude = selection(method)
        return Found(weights(model, include, exclude))
    found: list[Site] = []
    frozen: list[str] = []
    multiples: dict[str, int] = {}
    if kinds & {"channel", "head", "stream"}:
        coupling = graph.couple(model, task.example)
        found += [site for site in coupling.sites if site.kind in kinds]
        frozen = [str(each).removeprefix("frozen: ") for each in coupling.frozen]
        rounding: int = getattr(method, "round_to", 1)
        multiples = {site.name: lcm(rounding, coupling.multiples.get(site.name, 1)) for site in found}
        if not found:
            coupling.need(*(kind for kind in ("channel", "head", "stream") if kind in kinds))
    if "layer" in kinds:
        found += layers(model)
    if protect := tuple(getattr(method, "protect", ())):
        terms = Terms(0.0, protect=protect)
        free = terms.free(model, found)
        frozen += [f"{site.name}: protected by the settings" for site in found if terms.protects(site)]
        found = free
    return Found(found, frozen, multiples)


def _terms(method: Method) -> Terms | None:
    """What a method's settings ask of a cut, for those that cut by them."""
    found = getattr(method, "terms", None)
    return found if isinstance(found, Terms) else None


def selection(method: Method) -> tuple[Sequence[str], Sequence[str]]:
    """What a method includes and excludes."""
    return getattr(method, "include", ()), getattr(method, "exclude", DEFAULT_EXCLUDE)


def check(method: Method, model: nn.Module, task: Task) -> None:
    """Everything that can be refused before data is read: settings, names, shapes, budgets.

    Raises SettingError, SiteError, PatternError or BudgetError.
    """
    for link in links(method):
        link.check()
        laid_out(link, sites_of(link, model, task), model, task, trial=False)


def links(method: Method) -> tuple[Method, ...]:
    """The methods of a chain, or the one."""
    return method.methods if isinstance(method, Chain) else (method,)


def counts(method: Method, found: Found) -> tuple[dict[str, int] | None, bool]:
    """Units to keep at each site, and whether the allocation says so without scores; None where nothing says.

    Raises BudgetError for a budget that cannot be met, PatternError for a shape the pattern does not fit.
    """
    budget, sites = method.budget(), found.sites
    if budget is None or not sites:
        return None, False
    allocation, exact = getattr(method, "allocation", None), True
    if not isinstance(allocation, Allocation):
        allocation = Uniform()
    try:
        keep = allocation.spread(sites, budget, _Unread())
    except _Unread.Asked:
        keep, exact = Uniform().spread(sites, budget), False
    width = getattr(method, "width", None)  # of a stream that was so wide, for methods that cut nothing else
    for site in sites:
        if callable(width) and site.kind == "stream":
            keep[site.name] = width(site.units)
        elif (of := found.multiples.get(site.name, 1)) > 1:
            keep[site.name] = min(site.units, max(round(keep[site.name] / of) * of, of))
    pattern = getattr(method, "pattern", None)
    if pattern is not None and hasattr(pattern, "nearest"):
        misfits = []
        for site in sites:
            try:
                keep[site.name] = pattern.nearest(site.shape, keep[site.name])
            except PatternError as error:
                misfits.append((site, error))
        if misfits:
            site, misfit = misfits[0]
            more = f" (and {len(misfits) - 1} more)" if len(misfits) > 1 else ""
            # As --exclude takes the place of the default, what is left alone by default must stand there again.
            gone = ",".join([*selection(method)[1], *(s.name.removesuffix(".weight") for s, _ in misfits[:3])])
            raise PatternError(
                f"{misfit.asked}, at {site.name} {list(site.shape)}{more}",
                misfit.found,
                f"{misfit.do} Or leave it out: exclude={gone}.",
            )
    return keep, exact


@dataclass(frozen=True)
class Layout:
    """Units to keep at each site, as far as that can be said before a run."""

    keep: dict[str, int] | None  # None where nothing says
    met: Met | None = None  # what is asked and reached, in the unit it was asked in
    guessed: str = ""  # why the run may decide otherwise


def laid_out(method: Method, found: Found, model: nn.Module, task: Task, *, trial: bool) -> Layout:
    """What a method would keep. With `trial`, scores that read data are taken on a few examples.

    Raises as `counts` does.
    """
    terms, sites = _terms(method), found.sites
    if terms is None or not sites or method.budget() is None:
        keep, exact = counts(method, found)
        return Layout(keep, None, "" if keep is None or exact else _AS_IF_UNIFORM)
    own_allocation = getattr(method, "allocation", None)
    allocation: Allocation = own_allocation if isinstance(own_allocation, Allocation) else Uniform()
    scores, guessed = _scores(method, allocation, model, sites, task, trial)

    def spread(sparsity: float) -> Mapping[str, int]:
        budget = Budget(sparsity, of=terms.native or "units")
        return allocation.spread(sites, budget, _Unread() if scores is None else scores)

    own = {name: of for name, of in found.multiples.items() if of > 1}
    try:
        met = terms.counts(model, task.example, sites, own, spread)
    except _Unread.Asked:
        allocation, guessed = Uniform(), _AS_IF_UNIFORM
        met = replace(terms, native=None).counts(model, task.example, sites, own, spread)
    return Layout(met.counts, met, guessed)


_AS_IF_UNIFORM = "The allocation reads scores: each site's share is decided in the run, and shown as if uniform."


def _scores(
    method: Method, allocation: Allocation, model: nn.Module, sites: Sequence[Site], task: Task, trial: bool
) -> tuple[Scores | None, str]:
    """Scores for an allocation that reads some, and what is not sure of them; None where they come with the run."""
    scores_in = getattr(method, "scores_in", None)
    if scores_in is None or not allocation.needs_scores:
        return None, ""
    samples = getattr(method, "samples", 0)
    if not getattr(method, "reads", False):
        return scores_in(model, sites, task, samples), ""
    if not trial:
        return None, ""
    few = min(TRIAL, samples)
    said = f"Scores of {few} of {samples} calibration examples say what each site keeps; the run reads them all."
    return scores_in(model, sites, task, few), said if few < samples else ""


def plan(method: Method, model: nn.Module, task: Task, *, priced: bool = True, trial: bool = True) -> Plan:
    """A dry run of a method. Raises as `check` does; the model is not changed.

    `priced` says what the pruning takes as well; `trial` prunes the first block of a copy for it, without which time is
    estimated from a forward pass.
    """
    method.check()
    before = Size.of(model, task.example)
    first, *rest = links(method)
    found = sites_of(first, model, task)
    sites = found.sites
    layout = laid_out(first, found, model, task, trial=priced and trial)
    keep = layout.keep
    for link in rest:
        laid_out(link, sites_of(link, model, task), model, task, trial=False)
    rows = [_row(site, None if keep is None else keep[site.name]) for site in sites]
    budget, notes = first.budget(), []
    if not sites:
        notes.append("What is removed is found in the run: no sites can be listed before it.")
    elif keep is None:
        notes.append("This method has no target: what stays is decided in the run.")
    elif layout.guessed:
        notes.append(layout.guessed)
    if rest:
        notes.append(f"Only the first of {1 + len(rest)} steps is laid out; the others see the model it leaves.")
    asked = None if budget is None else budget.sparsity
    of = "weights" if budget is None else budget.of
    reachable = _reachable(sites, keep, of) if layout.met is None else layout.met.reached
    if asked is not None and reachable is not None and abs(reachable - asked) > 0.005:
        notes.append(f"{asked:.2%} was asked for; whole units in this pattern make {reachable:.2%}.")
    return Plan(
        method.name,
        settings(method),
        rows,
        left_alone(first, model, sites),
        found.frozen,
        before,
        _after(model, before, sites, keep),
        asked,
        reachable,
        of,
        denominator(model, sites, of),
        [] if layout.met is None else list(layout.met.prices),
        0.0 if layout.met is None else layout.met.step,
        [*notes, *(() if layout.met is None else layout.met.notes)],
        price(method, model, task, trial=trial) if priced else None,
    )


def _row(site: Site, keep: int | None) -> Row:
    each = site.cost("weights") if any(part.owner is not None for part in site.parts) else None
    whole = site.units if each is None else round(float(each.sum()))
    gone = None if keep is None else round(whole * (1 - keep / site.units))
    return Row(site.name, site.kind, site.block, site.shape, site.units, keep, whole, gone)


def _reachable(sites: Sequence[Site], keep: Mapping[str, int] | None, of: str) -> float | None:
    if keep is None or not sites:
        return None
    if of == "units" or all(part.owner is None for site in sites for part in site.parts):
        total = sum(site.units for site in sites)
        return 1 - sum(keep[site.name] for site in sites) / total
    costs = {site.name: float(site.cost(of).sum()) for site in sites}  # type: ignore[arg-type]
    total_cost = sum(costs.values())
    return 1 - sum(costs[s.name] * keep[s.name] / s.units for s in sites) / total_cost if total_cost else None


def _after(model: nn.Module, before: Size, sites: Sequence[Site], keep: Mapping[str, int] | None) -> Size | None:
    """The size to come: zeros for single weights, fewer parameters for whole units (overlaps counted once)."""
    if keep is None or not sites:
        return None
    if all(site.kind in ("weight", "block") for site in sites):
        gone = sum(_row(site, keep[site.name]).removed or 0 for site in sites)
        return replace(before, zeros=max(before.zeros, gone))
    kept: dict[str, float] = {}  # tensor -> the fraction that stays: two sites may cut one tensor along two axes
    held: dict[str, tuple[int, int, float]] = {}
    for site in sites:
        for part in site.parts:
            elements = 1
            for size in part.shape:
                elements *= size
            owned = 1.0 if part.owner is None else float((part.owner >= 0).double().mean())
            kept[part.name] = kept.get(part.name, 1.0) * (1 - owned * (1 - keep[site.name] / site.units))
            held[part.name] = (
                elements,
                elements * part.itemsize,
                2 * part.uses * elements if len(part.shape) > 1 else 0,
            )
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    parameters = sum(held[n][0] * (1 - kept[n]) for n in held if n in trained)
    memory, work = (sum(held[n][i] * (1 - kept[n]) for n in held) for i in (1, 2))
    cut = sum(h[2] for h in held.values())
    flops = None if before.flops is None or not cut else round(before.flops * (1 - work / cut) if work < cut else 0)
    return replace(
        before,
        parameters=before.parameters - round(parameters),
        memory_bytes=before.memory_bytes - round(memory),
        flops=flops,
    )


def left_alone(method: Method, model: nn.Module, sites: Sequence[Site]) -> list[LeftAlone]:
    """Every parameter that no site owns, tied ones once, in the order of the model."""
    named = tensors(model)
    taken = {id(named[part.name]) for site in sites for part in site.parts if part.name in named}
    found, seen = [], set()
    for name, value in model.named_parameters(remove_duplicate=False):
        plain = name.replace("parametrizations.", "").removesuffix(".original") if "parametrizations." in name else name
        if id(value) in taken or id(value) in seen:
            continue
        seen.add(id(value))
        found.append(LeftAlone(plain, "bias" if plain.endswith("bias") else role(model, plain), value.numel()))
    return found


def denominator(model: nn.Module, sites: Sequence[Site], of: str) -> str:
    """What a sparsity is a fraction of, in words with the number."""
    if not sites:
        return "what the method finds"
    parameters = sum(p.numel() for p in model.parameters())
    kind = sites[0].kind
    units = sum(site.units for site in sites)
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}  # a norm's statistics are not
    own = {part.name: part for site in sites for part in site.parts if part.name in trained or kind == "weight"}
    elements = sum(site.units for site in sites) if kind == "weight" else 0
    if not elements:
        for part in own.values():
            size = 1
            for length in part.shape:
                size *= length
            elements += size
    share = f"{elements:,} of the model's {parameters:,} parameters ({elements / parameters:.1%})"
    where = f"in {len(sites):,} site{'s' * (len(sites) != 1)}"
    if kind == "weight":
        return f"the {units:,} weights {where}, {share}" if of == "weights" else f"the {of} of {where[3:]}"
    if of in ("units", "weights"):
        return f"the {f'{units:,} {kind}s' if of == 'units' else 'weights'} {where}, which touch {share}"
    return f"{_WHOLE[of]} of the whole model; what is cut is {where}, which touch {share}"


_WHOLE = {
    "parameters": "the parameters",
    "flops": "the work of a forward pass",
    "bytes": "the bytes in memory",
    "latency": "the time of a forward pass",
}


# What the pruning takes


def price(method: Method, model: nn.Module, task: Task, *, trial: bool = True) -> Price:
    """Time and memory of a run, measured in small."""
    forward, hidden, logits = _forward(model, task)
    rows = task.example.size
    each = forward / max(rows, 1)
    own = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    seconds, held = 0.0, 0
    how = [f"a forward pass over one example takes {each * 1e3:,.0f} ms here ({torch.get_num_threads()} threads)"]
    for link in links(method):
        needs, samples = set(link.card.needs), getattr(link, "samples", None)
        if "training" in needs:
            steps = link.training_steps()
            if steps is None:
                return Price(None, None, "; ".join([*how, "how long it trains is decided in the run"]))
            size = next((b.size for b in task.batches("train")), 1)
            # Back through a network costs about twice the way forward.
            seconds += 3 * each * size * steps
            held += 3 * own  # gradients and the optimizer's two moments
            how.append(f"{steps:,} training steps of {size} examples at three forward passes each")
        elif "calibration" in needs and samples:
            blocks = sum(len(stack) for stack in stacks(model))
            found = _trial(link, model, task) if trial and blocks else None
            part, said = _walked(samples, each, blocks, found)
            seconds += part
            held += 2 * samples * hidden // max(rows, 1)
            how.append(said)
        else:
            seconds += 2 * each
    peak = peak_memory() + held + logits
    return Price(seconds, peak, "; ".join([*how, "measuring the quality before and after is not in it"]))


def _walked(samples: int, each: float, blocks: int, found: "_Tried | None") -> tuple[float, str]:
    """Seconds of a walk: to measure and to go on, each example goes through every block twice."""
    if found is None:
        return 2 * samples * each, f"{samples} calibration examples go through every block twice"
    share = each / blocks
    deciding = max(0.0, found.block - found.samples * share)
    total = found.setup + blocks * (deciding + 2 * samples * share)
    return total, (
        f"the first of {blocks} blocks of a copy was pruned with {found.samples} examples in {found.block:.1f} s; "
        f"{samples} examples go through every block twice"
    )


@torch.no_grad()
def _forward(model: nn.Module, task: Task) -> tuple[float, int, int]:
    """Seconds of a forward pass over the example, bytes that flow into the first block, bytes of the answer."""
    example, hidden = task.example.to(next(model.parameters()).device), 0
    found = stacks(model)

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        nonlocal hidden
        hidden = sum(t.numel() * t.element_size() for t in tree_flatten((args, kwargs))[0][:1] if isinstance(t, Tensor))

    hook = model.get_submodule(found[0][0]).register_forward_pre_hook(note, with_kwargs=True) if found else None
    modes = modes_of(model)
    model.eval()
    try:
        answer = example.through(model)
        spent = float("inf")
        for _ in range(2):  # the quicker of two, since others may use the machine
            start = time.perf_counter()
            example.through(model)
            spent = min(spent, time.perf_counter() - start)
    finally:
        restore_modes_(model, modes)
        if hook is not None:
            hook.remove()
    out = sum(
        t.numel() * t.element_size()
        for t in tree_flatten(dict(answer) if isinstance(answer, dict) else answer)[0]
        if isinstance(t, Tensor)
    )
    return spent, hidden, out


@dataclass(frozen=True)
class _Tried:
    """What the first block of a copy took."""

    setup: float  # seconds before it
    block: float  # seconds in it
    samples: int


class _Enough(Exception):  # noqa: N818  the first block is done
    pass


def _trial(method: Method, model: nn.Module, task: Task) -> _Tried | None:
    """The first block pruned on a copy with a few examples; None where that says nothing."""
    samples = min(TRIAL, getattr(method, "samples", TRIAL))
    work = copy.deepcopy(model)
    inside = 0.0

    def stop(done: Progress) -> None:
        nonlocal inside
        inside = done.seconds
        raise _Enough

    start = time.perf_counter()
    try:
        with watching(stop):
            replace(method, samples=samples).run(work, task)  # type: ignore[type-var]
    except _Enough:
        return _Tried(time.perf_counter() - start - inside, inside, samples)
    except (SecateurError, RuntimeError):
        return None  # too little data for this method, say: a forward pass must do
    return None


__all__ = [
    "Found",
    "LeftAlone",
    "Plan",
    "Price",
    "Row",
    "check",
    "counts",
    "denominator",
    "left_alone",
    "links",
    "plan",
    "price",
    "sites_of",
]
