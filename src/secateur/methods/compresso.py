"""Compresso: masks and adapters learn together from instructions, in front of which the model is told it is pruned.

Guo, Xu, Zhang, Yang. "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language
Models." 2023. arXiv:2310.05015, section 3. Every head, neuron and hidden channel has a logit a, and each step draws
what it is multiplied by (the hard concrete distribution of Louizos et al. 2017, arXiv:1712.01312):

    z = clamp(1.2 sigmoid((log u - log(1 - u) + a) / t) - 0.1, 0, 1)     u uniform, t = 2/3
    P(z > 0) = 1 - sigmoid(t log(0.1 / 1.1) - a)
    size = sum of P over channels * sum over heads and neurons of P * (rows and columns they own)
    loss = that of the answers + l1 (s - target) + l2 (s - target)^2     s = 1 - size / whole

The logits go down that loss with the adapters, l1 and l2 go up it; the weights themselves are frozen. In the end the
lowest logits shut, as many as are expected to be zero, and what is left keeps a soft value, which is multiplied into
the weights: what flows is the same, and the model is small and dense. Then adapters are trained once more.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from math import log
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.adapters import Lora, LowRank, adapted
from secateur.axes import Cosine, Curve, Linear, Schedule
from secateur.axes.hooks import is_linear
from secateur.axes.recovery import Retrain, only
from secateur.axes.rules import LearningRate
from secateur.cut import weights
from secateur.edit import Edit, Mask, Rotate, Update, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError, TaskError, did_you_mean
from secateur.graph import Coupling, couple, removals
from secateur.graph.inner import inner, reader
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Part, Site, Tensors, tensors
from secateur.stream import NormKind, follow, rms_norms
from secateur.task import Task, generator
from secateur.train import History, Loop, Rule, fit

PREFACE = (
    "You are a language model that is being made smaller. Parts of you are taken out while you read this: attention "
    "heads, neurons and channels that you can do without. This saves memory and time for whoever runs you. Answers "
    "should stay as true, clear and complete as they were. Find out which of your parts matter most for a good answer, "
    "and rely on those. Let what is left take over the work of what goes. Do not mention any of this. Read the "
    "instruction below with care, think about what it asks, and answer it as well as you can."
)
"""What stands before every instruction, in our own words."""

LOW, HIGH = -0.1, 1.1
"""How far the concrete distribution is stretched, before it is cut to [0, 1]: gamma and zeta in the paper."""

EDGE = 1e-6
"""How near to 0 and 1 uniform numbers and chances may come."""

BOUND = log(100)
"""How far from 0 a logit may be: P(z > 0) lies in [0.047, 0.998]."""

SOFT = 0.8
"""What the logits are multiplied by where z is not drawn: the authors'."""

KINDS = ("head", "channel", "stream")
"""What may have masks: heads, neurons, hidden channels."""

LEAVE = "Leave the stream whole: kinds=head,channel."
"""What to do where hidden channels cannot be masked."""


# Masks by hard concrete


def drawn(logits: Tensor, uniform: Tensor, temperature: float) -> Tensor:
    """What units are multiplied by, of numbers in (0, 1): [units] -> [units] in [0, 1]; can be differentiated."""
    u = uniform.clamp(EDGE, 1 - EDGE)
    y = torch.sigmoid((u.log() - (1 - u).log() + logits) / temperature)
    return (y * (HIGH - LOW) + LOW).clamp(0, 1)


def open_chance(logits: Tensor, temperature: float) -> Tensor:
    """The probability that what is drawn is not zero: [units]."""
    return (1 - torch.sigmoid(temperature * log(-LOW / HIGH) - logits)).clamp(EDGE, 1 - EDGE)


def settled(logits: Tensor, temperature: float) -> Tensor:
    """What units are multiplied by where nothing is drawn: 0 for as many as are expected to be, else a soft value.

    One at least stays.
    """
    closed = round(len(logits) - float(open_chance(logits.double(), temperature).sum()))
    z = soft(logits, temperature)
    z[logits.argsort(stable=True)[: min(closed, len(logits) - 1)]] = 0
    return z


def soft(logits: Tensor, temperature: float) -> Tensor:
    """The soft value of units that stay: sigmoid(0.8 a / t), [units]."""
    return torch.sigmoid(SOFT * logits / temperature)


def expected_size(stream: Tensor, inside: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The elements expected in the matrices of the blocks, float64.

    `stream`: the chances of the hidden channels [width]. `inside`: of each site the chances of its units [units], and
    how many rows and columns of matrices, each as long as the stream is wide, a unit owns [units].
    """
    return stream.double().sum() * torch.stack([(a.double() * rows).sum() for a, rows in inside]).sum()


def pressure(sparsity: Tensor, target: float, first: Tensor, second: Tensor) -> Tensor:
    """The Lagrangian l1 (s - target) + l2 (s - target)^2: a scalar."""
    off = sparsity - target
    return first * off + second * off.square()


# Where masks are


@dataclass(frozen=True, eq=False)
class Layout:
    """The heads and neurons of a model, its hidden channels, and which of them have masks."""

    inside: tuple[Site, ...]  # heads and neurons of all blocks, with masks or without
    rows: Mapping[str, Tensor]  # site -> rows and columns that a unit owns, each as long as the stream is wide [units]
    gated: tuple[Site, ...]  # those of them with masks
    stream: Site | None  # the hidden channels, in all that reads and writes them; None: without masks
    written: tuple[Part, ...]  # those of its parts that write
    norms: Mapping[str, NormKind]  # those it is read through, by their gains; the last is before the output layer
    tied: bool  # whether the output layer is the embedding's matrix
    width: int  # of the stream

    @property
    def masked(self) -> list[Site]:
        """Every site with masks, the hidden channels first."""
        return [*([] if self.stream is None else [self.stream]), *self.gated]

    @property
    def whole(self) -> float:
        """The elements of the matrices of all blocks."""
        return float(self.size({}))

    def size(self, of: Tensors) -> Tensor:
        """The elements expected by the chances of sites, or left by masks of 0 and 1; others stay whole: float64."""
        device = next((value.device for value in of.values()), torch.device("cpu"))
        ones = {site.name: torch.ones(site.units, device=device) for site in self.inside}
        stream = torch.ones(self.width, device=device)
        if self.stream is not None:
            stream = of.get(self.stream.name, stream)
        return expected_size(stream, [(of.get(n, one), self.rows[n].to(device)) for n, one in ones.items()])

    def sparsity(self, of: Tensors) -> Tensor:
        """The same as the fraction that goes."""
        return 1 - self.size(of) / self.whole


def lay_out(model: nn.Module, task: Task, kinds: Sequence[str]) -> tuple[Layout, Coupling]:
    """Find what can have masks in a decoder; of hidden channels in a pre-norm one.

    Raises GraphError for a model whose blocks cannot be followed, or whose stream where that is to have masks,
    ModelError for layers that masks cannot be put round.
    """
    coupling = couple(model, task.example)
    inside = inner(coupling)
    width, named = reader(inside[0]).shape[0], tensors(model)
    rows = {site.name: _rows(site, width) for site in inside}
    gated = tuple(site for site in inside if site.kind in kinds)
    for site in gated:
        _check_called(model, reader(site).module)
    coupling.check_exact(gated, lambda site: f"Leave them whole: give kinds= without {site.kind}.")
    if "stream" not in kinds:  # nor need it be one that can be followed
        return Layout(inside, rows, gated, None, (), {}, False, width), coupling
    try:
        stream = follow(model, task.example)
    except GraphError as why:
        raise GraphError(why.asked, why.found, LEAVE) from None
    tables = [name for segment in stream.segments for name in segment.embeddings]
    writers = [name for segment in stream.segments for name in segment.writers]
    for name in writers:
        _check_called(model, name.rpartition(".")[0])
    norms = rms_norms(model, stream, LEAVE)
    numbers = coupling.need("stream")[0].numbers
    readers = [name for segment in stream.segments for names in segment.readers for name in names]
    own = [name for name in readers if not any(named[name] is named[table] for table in tables)]
    biases = [name for w in writers if (name := w.rpartition(".")[0] + ".bias") in named]
    written = [_part(named, name, 1) for name in tables] + [_part(named, name, 0) for name in (*writers, *biases)]
    gains = [_part(named, gain, 0) for gain in norms]
    parts = (*written, *gains, *(_part(named, name, 1) for name in own))
    site = Site("stream", "stream", (width,), parts, numbers)
    return Layout(inside, rows, gated, site, tuple(written), norms, len(own) < len(readers), width), coupling


def _rows(site: Site, width: int) -> Tensor:
    """How many rows and columns of matrices each unit of a site owns, float64 [units]."""
    total = torch.zeros(site.units, dtype=torch.float64)
    for part in site.parts:
        if len(part.shape) < 2:  # biases are not counted
            continue
        assert part.axis is not None and part.owner is not None, "inner sites are removable"
        if part.shape[1 - part.axis] != width:
            raise GraphError(
                f"the size of {site.name} was to be told by its units and the hidden channels",
                f"{part.name} {list(part.shape)} has no side of {width}, the width of the stream",
                "Use a decoder whose blocks read and write the stream by plain matrices, or another method.",
            )
        owner = part.owner.reshape(-1)
        total += torch.bincount(owner[owner >= 0], minlength=site.units).double()
    return total


def _part(named: Tensors, name: str, axis: int) -> Part:
    """Which hidden channel owns which entry along an axis of a tensor."""
    shape = tuple(named[name].shape)
    grid = [1] * len(shape)
    grid[axis] = shape[axis]
    return Part(name, shape, torch.arange(shape[axis]).reshape(grid), itemsize=named[name].element_size())


def _check_called(model: nn.Module, name: str) -> None:
    module = model.get_submodule(name)
    asked = f"what flows through {name} was to be masked"
    if parametrize.is_parametrized(module):
        raise ModelError(asked, "it is behind a gate or another adapter", "Harden it first.")
    if not is_linear(module) or not isinstance(module, nn.Linear):
        raise ModelError(
            asked,
            f"it is a {type(module).__name__}, and no plain linear layer",
            "Use a decoder of the Llama, Mistral or Qwen kind, or another method.",
        )


# While training


class Masks(Rule):
    """Draws masks anew in each step, and moves their logits so that what is expected to be left meets a target.

    Until the schedule begins nothing is masked. Its hooks must be in place: see `masked`. In evaluation nothing is
    drawn: masks are what they would settle as.
    """

    def __init__(
        self,
        layout: Layout,
        schedule: Schedule,
        *,
        start: float = 0.01,
        temperature: float = 2 / 3,
        cap: float = 100.0,
        draw: torch.Generator | None = None,
        device: torch.device | None = None,
    ) -> None:
        self.layout, self.schedule = layout, schedule
        self.temperature, self.cap = temperature, cap
        self.draw = torch.Generator() if draw is None else draw
        first = {"channel": log((1 - start) / start)}  # heads and hidden channels start at 10, as the authors have it
        self.logits = {
            site.name: nn.Parameter(torch.full((site.units,), first.get(site.kind, 10.0), device=device))
            for site in layout.masked
        }
        self.first = nn.Parameter(torch.zeros((), device=device))  # lambda 1, of either sign
        self.second = nn.Parameter(torch.zeros((), device=device))  # lambda 2
        self.now: dict[str, Tensor] | None = None  # what was drawn for this step; None: nothing is masked
        self.fixed: dict[str, Tensor] | None = None  # masks that have been decided on

    def parameters(self) -> list[nn.Parameter]:
        """The logits and both multipliers."""
        return [*self.logits.values(), self.first, self.second]

    def groups(self, rate: float) -> list[dict[str, Any]]:
        """For an optimizer: logits go down, multipliers up, and neither is decayed."""
        plain = {"lr": rate, "weight_decay": 0.0}
        return [
            {"params": list(self.logits.values()), **plain},
            {"params": [self.first, self.second], **plain, "maximize": True},
        ]

    @property
    def chances(self) -> dict[str, Tensor]:
        """The probability of each unit that it is not zero: site -> [units], float64."""
        return {name: open_chance(logits.double(), self.temperature) for name, logits in self.logits.items()}

    def value(self, name: str, training: bool) -> Tensor | None:
        """What the units of a site are multiplied by now [units]; None for nothing."""
        if self.fixed is not None:
            return self.fixed[name]
        if self.now is None:
            return None
        return self.now[name] if training else settled(self.logits[name].detach(), self.temperature)

    def before_forward(self, loop: Loop) -> None:
        """Draw, once for all of a step."""
        if loop.step >= self.schedule.window(loop.steps)[0]:
            uniform = {n: torch.rand(a.shape, generator=self.draw).to(a.device) for n, a in self.logits.items()}
            self.now = {name: drawn(a, uniform[name], self.temperature) for name, a in self.logits.items()}

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """Add the pressure towards the target of this step."""
        if self.now is None:
            return value
        sparsity, target = self.layout.sparsity(self.chances), self.schedule.value(loop.step, loop.steps)
        loop.log("expected sparsity", float(sparsity.detach()))
        loop.log("target sparsity", target)
        return value + pressure(sparsity, target, self.first, self.second).to(value)

    @torch.no_grad()
    def after_step(self, loop: Loop) -> None:
        """Keep logits within bounds, and the second multiplier too: all it ever gets is a square, so it only grows."""
        for logits in self.logits.values():
            logits.clamp_(-BOUND, BOUND)
        self.second.clamp_(0, self.cap)

    @torch.no_grad()
    def settle(self, sparsity: float) -> dict[str, Tensor]:
        """Masks to keep: zeros and soft values, so many zeros that the sparsity is met to a unit. And use them."""
        logits = {name: a.detach().cpu() for name, a in self.logits.items()}
        keep = {name: settled(a, self.temperature) > 0 for name, a in logits.items()}
        mended = mend(self.layout, logits, keep, sparsity)
        self.fixed = {
            name: torch.where(mended[name], soft(a, self.temperature), 0.0).to(self.logits[name].device)
            for name, a in logits.items()
        }
        return {name: z.cpu() for name, z in self.fixed.items()}

    def state(self) -> dict[str, Any]:
        """Logits, multipliers and the generator."""
        return {"values": [p.detach() for p in self.parameters()], "draw": self.draw.get_state()}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As they were."""
        with torch.no_grad():
            for parameter, was in zip(self.parameters(), state["values"], strict=True):
                parameter.copy_(was)
        self.draw.set_state(state["draw"])


def mend(layout: Layout, logits: Tensors, keep: Mapping[str, Tensor], sparsity: float) -> dict[str, Tensor]:
    """Shut or open as few units as it takes to come as near to a sparsity as one can: the lowest, or the highest.

    Rounding at each site leaves another sparsity than all together were expected to have. A unit that would lead away
    from the target is passed over, and one at each site stays. Returns masks, True keeps [units].
    """
    found = {name: mask.clone() for name, mask in keep.items()}
    wanted = (1 - sparsity) * layout.whole
    channels = layout.width if layout.stream is None else int(found[layout.stream.name].sum())
    rows = float(layout.size({n: k.double() for n, k in found.items() if n in layout.rows})) / layout.width
    every = sorted(
        ((float(logits[s.name][i]), s, i) for s in layout.masked for i in range(s.units)), key=lambda row: row[0]
    )
    moved = True
    while moved:  # a large unit may lead past the target, from where small ones lead back
        moved, shut = False, channels * rows > wanted
        for _, site, unit in every if shut else reversed(every):
            mine, sign = found[site.name], -1 if shut else 1
            if bool(mine[unit]) != shut or (shut and int(mine.sum()) == 1):
                continue
            whole = site is layout.stream
            more = (channels + sign, rows) if whole else (channels, rows + sign * float(layout.rows[site.name][unit]))
            if abs(more[0] * more[1] - wanted) < abs(channels * rows - wanted):
                mine[unit] = not shut
                (channels, rows), moved = more, True
    return found


class Masking:
    """Multiplies what a layer reads, or what it puts out, by masks. A forward hook, or one before it."""

    def __init__(self, masks: Masks, name: str, owner: Part | None) -> None:
        self.masks, self.name, self.owner = masks, name, owner

    def factor(self, module: nn.Module, like: Tensor) -> Tensor | None:
        """One factor per entry of the last axis; None for nothing to do."""
        z = self.masks.value(self.name, module.training)
        if z is None:
            return None
        return (z if self.owner is None else self.owner.expand(z, nobody=1.0).reshape(-1)).to(like)

    def reads(self, module: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Mask what is read."""
        z = self.factor(module, given[0])
        return None if z is None else (given[0] * z, *given[1:])

    def writes(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
        """Mask what is put out."""
        z = self.factor(module, out)
        return None if z is None else out * z


@contextmanager
def masked(model: nn.Module, masks: Masks) -> Iterator[None]:
    """Within this, masks take part in the forward pass; afterwards the model is as it was.

    Heads and neurons are masked where o_proj and down_proj read them, and hidden channels where something is written
    to the stream, which therefore is masked everywhere. A norm divides by the width that the stream has unmasked.
    """
    layout, hooks = masks.layout, []
    for site in layout.gated:
        part = reader(site)
        here = Masking(masks, site.name, part)
        hooks.append(model.get_submodule(part.module).register_forward_pre_hook(here.reads))
    if layout.stream is not None:
        here = Masking(masks, layout.stream.name, None)
        for name in dict.fromkeys(part.module for part in layout.written):
            hooks.append(model.get_submodule(name).register_forward_hook(here.writes))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The small model


def cut_(model: nn.Module, layout: Layout, z: Tensors) -> list[Edit]:
    """Multiply masks [units] into the weights, and take out what is zero; the model answers as the masked one did.

    Heads and neurons are multiplied into the columns that read them, hidden channels into what writes them, which with
    the gains of norms makes up for the narrower stream too: see `rms_norms`. Of an embedding that is the output layer
    too, the last gain takes back what the embedding was multiplied by.
    """
    keep = {name: value > 0 for name, value in z.items()}
    edits: list[Edit] = []
    named = tensors(model)
    for site in layout.gated:
        part = reader(site)
        seen = part.read(named).detach()
        value = seen.double() * part.expand(z[site.name].double(), nobody=1.0).to(seen.device)
        edits.append(Update(part.name, (value.T.contiguous() if part.turned else value).to(seen.dtype)))
    stream = layout.stream
    if stream is not None:
        scale, narrow = z[stream.name].double(), (int(keep[stream.name].sum()) / layout.width) ** 0.5
        written = Site("stream written", "stream", stream.shape, layout.written)
        edits.append(Rotate(written, (scale * narrow).to(z[stream.name].dtype).diag()))
        for name, kind in layout.norms.items():
            last = layout.tied and name == list(layout.norms)[-1]
            factor = 1 / (narrow * torch.where(scale > 0, scale * narrow, 1)) if last else 1 / narrow
            edits.append(Update(name, kind.times(named[name].detach(), factor)))
    sites = [*([] if stream is None else [stream]), *layout.inside]
    # A site that loses nothing is written down too: the budget is a fraction of it as well.
    edits += [
        Mask(s, torch.ones(s.shape, dtype=torch.bool)) for s in sites if s.name not in keep or bool(keep[s.name].all())
    ]
    return apply_(model, [*edits, *removals(sites, keep)])


# Adapters


def adapt(
    model: nn.Module,
    task: Task,
    *,
    include: Sequence[str],
    rank: int,
    alpha: float,
    rate: float,
    steps: int,
    purpose: str,
    curve: Curve | None = None,
    masks: Masks | None = None,
    mask_rate: float = 0.1,
    epoch: int = 0,
) -> tuple[list[Edit], History]:
    """Train adapters, and masks with them where there are any, and merge the adapters: what changed, how it went.

    The rate stays, or falls along a curve where one is given; that of the masks stays.
    """
    low = {}
    for site in weights(model, include, exclude=()):
        part = site.parts[0]
        value = tensors(model)[part.name]
        start = LowRank(value, rank, stacked=part.index is not None, turned=part.turned)
        low[part.name] = Lora(start.start_at_zero_(generator(task, f"{purpose} {part.name}")), alpha / rank)
    rules: list[Rule] = [] if curve is None else [LearningRate(curve)]
    rules += [] if masks is None else [masks]
    inside = nullcontext() if masks is None else masked(model, masks)
    with only(model, []), adapted(model, low) as merged:
        groups = [{"params": [p for each in low.values() for p in each.parameters()], "lr": rate}]
        groups += [] if masks is None else masks.groups(mask_rate)
        optimizer = torch.optim.AdamW(groups, rate, weight_decay=0.0)
        with inside:
            history = fit(model, task, steps, rules, optimizer, epoch=epoch)
    return merged, history


@runtime_checkable
class Prefaced(Protocol):
    """A task that puts text before every example."""

    def prefaced(self, preface: str) -> Task:
        """The same task with a preface; "" for none."""
        ...


@dataclass(frozen=True, kw_only=True)
class Compresso(Method):
    """Learn masks of heads, neurons and hidden channels with adapters, on instructions with a preface; cut; train on.

    Afterwards give the model the same preface: `task.prefaced(PREFACE)` measures it so.
    """

    sparsity: float = 0.3  # fraction of the matrices of all blocks taken out, in [0, 1); embeddings do not count
    prompt: str = PREFACE  # what the task puts before every example; "" for nothing
    kinds: tuple[str, ...] = KINDS  # what has masks: head, channel (of the MLP), stream (hidden channels)
    rank: int = 8  # of the adapters
    alpha: float = 8.0  # what is learnt counts alpha / rank
    include: tuple[str, ...] = ("*.q_proj", "*.v_proj")  # matrices that adapters go on, by name, class or role
    rate: float = 5e-5  # learning rate of AdamW for the adapters while masks are learnt; a tiny model wants 1e-3
    mask_rate: float = 0.1  # the same for the masks' logits and both multipliers
    steps: int = 400  # optimizer steps before the cut; the paper's are 8 epochs
    first: float = 0.125  # fraction of them in which adapters are trained alone
    warmup: float = 0.5  # fraction of them in which the target rises, after that
    curve: Curve = Linear()  # how it rises; power is the authors' other one
    start: float = 0.01  # the chance of a neuron to be masked at the start, roughly
    temperature: float = 2 / 3  # of the hard concrete distribution
    cap: float = 100.0  # the most that the second multiplier may be
    tune: int = 150  # optimizer steps after the cut; the paper's are 3 epochs
    tune_rate: float = 4e-4  # learning rate of the adapters after the cut, falling along a cosine

    card: ClassVar = Card(
        51,
        "Compresso: Structured Pruning with Collaborative Prompting Learns Compact Large Language Models",
        arxiv="2310.05015",
        year=2023,
        when="during training",
        granularity=("head", "channel", "stream"),
        needs=("labels", "training"),
        families=("decoder",),
        axes="gates rule adapters task",
        criterion=("learned",),
        tasks=("language modelling",),
        stage=("score or mask",),
        schedule=("linear",),
        allocation=("learned",),
        retraining=("finetune",),
        learns=("masks or gates",),
        fusion=("low-rank",),
        start=("pretrained",),
        reports="LLaMA-7B cut to 5.4B: reading comprehension 2.62 % above the whole model; at equal size up to 2.21 "
        "(commonsense), 11.43 (reading), 7.04 (MMLU) and 4.81 points (BBH) above one-shot pruning.",
        checked="tests/methods/test_compresso.py::test_chances_are_how_often_masks_are_open",
        differs=(
            "the preface is in our own words",
            "with grouped queries a unit is a key-value head with all the query heads that read it, and counts with the"
            " rows it owns",
            "heads and neurons are masked once, where o_proj and down_proj read them; the authors' code multiplies gate"
            " and up by the neurons' masks, gate before its activation",
            "hidden channels are taken out of embedding and head too, and norms stay stock ones, what is written and"
            " gains making up for the width; a tied embedding stays tied",
            "after rounding, units nearest to the edge are shut or opened until the sparsity is met to a unit, and one"
            " unit of each site stays",
            "the second multiplier has a cap, as what moves it is a square",
            "sizes are calculated in float64 as a product of sums",
            "the adapters' rate is constant while masks are learnt",
            "the fine-tuning comes after the cut, with new adapters: the same function to start from, at less cost",
            "whole layers have no masks, and OPT keeps its stream: its norms subtract a mean (kinds=head,channel)",
        ),
    )
    tiny: ClassVar = {"prompt": "", "steps": 30, "tune": 6, "rate": 5e-3, "rank": 2, "alpha": 4.0, "tune_rate": 5e-3}

    def training_steps(self) -> int:
        """Those before the cut and those after it."""
        return self.steps + self.tune

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        check_sparsity(self.sparsity)
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(
                f"masks of {list(self.kinds)} were asked for",
                f"what can have masks is {', '.join(KINDS)}",
                did_you_mean(unknown[0] if unknown else "", KINDS),
            )
        if min(self.rank, self.steps) < 1 or self.tune < 0:
            raise SettingError(
                f"rank={self.rank}, steps={self.steps} and tune={self.tune} were given",
                "the first two start at 1, the third at 0",
                "Take the defaults: 8, 400 and 150.",
            )
        positive = ("alpha", "rate", "mask_rate", "temperature", "cap", "tune_rate")
        if wrong := [name for name in positive if not getattr(self, name) > 0]:
            raise SettingError(
                f"{wrong[0]}={getattr(self, wrong[0]):g} was given",
                "it is above 0",
                f"Take the default: {getattr(type(self), wrong[0]):g}.",
            )
        if not 0 < self.start < 1 or min(self.first, self.warmup) < 0 or self.first + self.warmup > 1:
            raise SettingError(
                f"start={self.start:g}, first={self.first:g} and warmup={self.warmup:g} were given",
                "the first lies between 0 and 1, and the others are parts of training, together not above 1",
                "Take the defaults: 0.01, 0.125 and 0.5.",
            )
        if self.first >= 1:
            raise SettingError(
                "adapters were to be trained alone in all of the steps",
                "none is left to learn masks in",
                "Take the default: 0.125.",
            )

    def schedule(self) -> Schedule:
        """The target, from nothing to the sparsity."""
        until = self.first + self.warmup
        return Schedule(end=self.sparsity, begin=self.first, until=until, curve=self.curve, every=1)

    def budget(self) -> Budget:
        """A fraction of the weights of all blocks' matrices; a ledger counts the embeddings' columns too."""
        return Budget(self.sparsity)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises TaskError for a task that takes no preface, BudgetError for more than masks can take."""
        self.check()
        task = self.prefaced(task)
        Retrain().ready(model, task)
        layout, coupling = lay_out(model, task, self.kinds)
        device = next(model.parameters()).device
        masks = Masks(
            layout, self.schedule(), start=self.start, temperature=self.temperature, cap=self.cap,
            draw=generator(task, "compresso masks"), device=device,
        )  # fmt: skip
        self.check_target(masks)
        how: Any = {"include": self.include, "rank": self.rank, "alpha": self.alpha}
        edits, history = adapt(
            model, task, **how, rate=self.rate, steps=self.steps, purpose="compresso", masks=masks,
            mask_rate=self.mask_rate,
        )  # fmt: skip
        z = masks.settle(self.sparsity)
        edits = [*edits, *cut_(model, layout, z)]
        notes = self.notes(masks, z)
        if self.tune:
            found, more = adapt(
                model, task, **how, rate=self.tune_rate, steps=self.tune, purpose="compresso after", curve=Cosine(),
                epoch=history.epoch,
            )  # fmt: skip
            edits, history = [*edits, *found], history.then(more)
        notes += [str(frozen) for frozen in coupling.frozen]
        return Outcome(model, edits, history, notes=[*notes, *history.notes])

    def prefaced(self, task: Task) -> Task:
        """The task with the preface before its examples. Raises TaskError for one that has no place for it."""
        if not self.prompt:
            return task
        if not isinstance(task, Prefaced):
            raise TaskError(
                f"a preface was to stand before every example of {task.name}",
                "its examples are no instructions, to be read by a tokenizer",
                'Give a task of secateur.tasks.instructions, or do without: prompt="".',
            )
        return task.prefaced(self.prompt)

    def check_target(self, masks: Masks) -> None:
        """Raise BudgetError for a sparsity that is out of reach of bounded logits."""
        lowest = {name: open_chance(torch.full_like(a, -BOUND), self.temperature) for name, a in masks.logits.items()}
        most = float(masks.layout.sparsity(lowest))
        if self.sparsity > most:
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} was asked for",
                f"masks of {', '.join(self.kinds)} can be expected to take out {most:.3f} at most",
                f"Ask for {int(most * 100) / 100:g} at most, or give more kinds masks.",
            )

    def notes(self, masks: Masks, z: Tensors) -> list[str]:
        """What went, what had been expected, and what rounding made of it."""
        layout = masks.layout
        words = {"stream": "hidden channels", "head": "heads", "channel": "neurons"}
        gone = {kind: [int((z[s.name] == 0).sum()) for s in layout.masked if s.kind == kind] for kind in words}
        units = {kind: sum(s.units for s in layout.masked if s.kind == kind) for kind in words}
        said = [f"{sum(gone[k]):,} of {units[k]:,} {word} ({sum(gone[k]) / units[k]:.1%})"
                for k, word in words.items() if units[k]]  # fmt: skip
        left = float(layout.sparsity({name: (value > 0).double() for name, value in z.items()}))
        rounded = {n: settled(a.detach().cpu(), masks.temperature) for n, a in masks.logits.items()}
        plain = float(layout.sparsity({n: (value > 0).double() for n, value in rounded.items()}))
        expected = float(layout.sparsity({n: a.detach().cpu() for n, a in masks.chances.items()}))
        notes = [
            f"{', '.join(said)} taken out: {left:.4f} of the blocks' weights, {self.sparsity:g} asked for",
            f"expected when training ended: {expected:.4f}; rounded at each site: {plain:.4f}; multipliers"
            f" {float(masks.first.detach()):.3g} and {float(masks.second.detach()):.3g}",
        ]
        if abs(expected - self.sparsity) > 0.01:
            notes.append("what masks were expected to take out is not within 1 % of the target: give more steps")
        if self.prompt:
            notes.append("trained with a preface before every example: give it the same in use")
        return notes
