"""ATP: while adapters learn a task, a small network goes on proposing what the model can do without.

Lu, Wang, Bao, Wang, Li, Wu, Jiang, Xu, Wang, Gao. "All-in-One Tuning and Structural Pruning for Domain-Specific LLMs."
2024. arXiv:2412.14426. Units are neurons, rotary pairs of queries and keys, and dims of values, pairs and dims alike in
all heads of a block. Each step of the first part of training

    1. s = sigmoid((logit + g + 3) / 0.4), g Gumbel noise; h = [s >= 0.5], its gradient that of s
       the generator of logits learns  CE(s * (W x + B A x)) + 5 log(max(rho, rho*) / min(rho, rho*))
       rho = weights kept by h / all, rho* what is to be kept; on calibration data, nothing else learns
    2. the generator decides: m in {0, 1}
    3. adapters learn by            y = m * (W x) + B A x
       only what is frozen is masked, so that a unit that is condemned can still come back
    4. slices w of the adapters that condemned units own are drawn to zero:  w <- w max(0, 1 - tau / ||w||)

Then a last decision, without noise, and adapters learn on under it (3 and 4). At the end those slices are zero, so
that merging and cutting changes nothing: a small dense model.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from secateur.adapters import LowRank, tied_names
from secateur.axes import keep_top
from secateur.axes.budgets import Terms
from secateur.axes.hooks import adaptable, hooked
from secateur.axes.recovery import Retrain, only
from secateur.axes.rules import everything
from secateur.axes.spending import worst_first
from secateur.cut import DEFAULT_EXCLUDE
from secateur.edit import Edit, Mask, Update, apply_
from secateur.errors import BudgetError, ModelError, SettingError, SiteError, TaskError
from secateur.graph import Coupling, couple, removals
from secateur.graph.head_dims import head_dims, narrowable_
from secateur.graph.inner import inner
from secateur.method import Budget, Card, Method
from secateur.methods.flap import Adaptive
from secateur.outcome import Outcome
from secateur.site import Part, Site, tensors, unwrapped
from secateur.task import Batch, Task, generator
from secateur.train import History, Loop, Rule, fit, seeded

# Deciding


def gumbel(shape: Sequence[int], draw: torch.Generator) -> Tensor:
    """Standard Gumbel noise, -log(-log U), float32."""
    uniform = torch.rand(tuple(shape), generator=draw).clamp(1e-10, 1 - 1e-7)
    return -(-uniform.log()).log()


def soft_mask(logit: Tensor, noise: Tensor, offset: float = 3.0, temperature: float = 0.4) -> Tensor:
    """sigmoid((logit + g + offset) / T): near 1 for nearly all units at first, when logits are about 0."""
    return torch.sigmoid((logit + noise + offset) / temperature)


def hard_mask(soft: Tensor) -> Tensor:
    """1 where a soft mask is 0.5 or more, else 0; the gradient is that of the soft one."""
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())


def budget_loss(kept: Tensor, wanted: float) -> Tensor:
    """log(max(rho, rho*) / min(rho, rho*)) of two shares: how far off by a factor, 0 where they are equal."""
    kept = kept.clamp(min=1e-6)  # nothing left: a long way off, and not infinitely
    return torch.maximum(kept, kept.new_tensor(wanted)).log() - torch.minimum(kept, kept.new_tensor(wanted)).log()


def weights_of(site: Site) -> Tensor:
    """Elements of matrices that each unit owns [units], float64: 2 d (h + h_kv) for a pair, d (h + h_kv) for a dim.

    h_kv are key-value heads; a neuron with a gate owns 3 d. Biases are not counted.
    """
    return replace(site, parts=tuple(part for part in site.parts if len(part.shape) == 2)).cost().reshape(-1)


class Proposer(nn.Module):
    """From a fixed embedding of each block, through a small transformer, a logit for each unit: higher is kept."""

    places: Tensor

    def __init__(self, sites: Sequence[Site], width: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        blocks = list(dict.fromkeys(site.block for site in sites))
        self.at = {site.name: blocks.index(site.block) for site in sites}
        self.places = nn.Buffer(torch.empty(len(blocks), width))
        nn.init.orthogonal_(self.places)
        # No dropout: it would be noise beside the Gumbel's, that decisions then differ by in training and without.
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleList(nn.Linear(width, site.units, bias=False) for site in sites)

    def forward(self) -> dict[str, Tensor]:
        """Site name -> logits [units]."""
        seen = self.norm(self.encoder(self.places[None])[0])  # [blocks, width]
        return {name: head(seen[at]) for (name, at), head in zip(self.at.items(), self.heads, strict=True)}


# Adapters under masks


class Guided:
    """A linear layer and an adapter: m * (W x + b) + B A x, or s * (W x + b + B A x) while something is proposed."""

    def __init__(self, part: Part, frozen: nn.Parameter, low: LowRank | None, dropout: float = 0.0) -> None:
        self.part, self.frozen, self.low, self.dropout = part, frozen, low, dropout
        self.mask: Tensor | None = None  # m [out]: of what is frozen alone
        self.soft: Tensor | None = None  # s [out]: of all; while it is there m does not count

    def __call__(self, module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """What the layer puts out. A forward hook."""
        if self.mask is not None and self.soft is None:
            out = out * self.mask.to(out)
        if self.low is not None:
            inside = F.linear(given[0].to(self.low.a.dtype), self.low.a)  # [..., r]
            out = out + F.linear(F.dropout(inside, self.dropout, module.training), self.low.b).to(out.dtype)
        return out if self.soft is None else out * self.soft.to(out.dtype)

    @torch.no_grad()
    def merged(self) -> Tensor:
        """W + B A, as it is stored and in the dtype of W."""
        if self.low is None:
            return self.frozen.detach()
        low = self.low()
        return (self.frozen.detach().to(low.dtype) + low).to(self.frozen.dtype)


@runtime_checkable
class Start(Protocol):
    """Where adapters start."""

    def start_(self, layer: Guided, draw: torch.Generator) -> None:
        """Give A and B their first values, and W what keeps W + B A as it was."""
        ...


@dataclass(frozen=True)
class ZeroProduct:
    """B = 0 and A by chance: the usual start."""

    def start_(self, layer: Guided, draw: torch.Generator) -> None:
        """See Start."""
        if layer.low is not None:
            layer.low.start_at_zero_(draw)


@dataclass(frozen=True)
class SmallestDirections:
    """B A = the smallest singular directions of W, which keeps the rest: what W does least with is what is learnt."""

    @torch.no_grad()
    def start_(self, layer: Guided, draw: torch.Generator) -> None:
        """See Start. Changes W."""
        if layer.low is None:
            return
        weight = layer.part.view(layer.frozen.detach())
        u, s, v = torch.linalg.svd(weight.to(layer.low.a.dtype), full_matrices=False)
        root = s[-layer.low.rank :].sqrt()
        layer.low.b.copy_(u[:, -layer.low.rank :] * root)
        layer.low.a.copy_(root[:, None] * v[-layer.low.rank :])
        layer.frozen.copy_(layer.frozen - layer.low().to(layer.frozen.dtype))


def slices(site: Site, layers: Mapping[str, Guided]) -> tuple[Site, dict[str, Tensor]] | None:
    """What a site's units own of adapters, as a site: rows of B where they are made, columns of A where they are read.

    With the tensors by name; None where no layer of it has an adapter.
    """
    parts, named = [], dict[str, Tensor]()
    for part in site.parts:
        layer = layers.get(part.name)
        if layer is None or layer.low is None or part.owner is None or len(part.shape) != 2:
            continue
        owner = part.owner.reshape(-1)
        value = layer.low.b if part.makes else layer.low.a
        name = f"{part.name}.{'b' if part.makes else 'a'}"
        parts.append(Part(name, tuple(value.shape), owner[:, None] if part.makes else owner[None]))
        named[name] = value
    return (replace(site, parts=tuple(parts), numbers=()), named) if parts else None


def slice_norms(owned: Site, named: Mapping[str, Tensor]) -> Tensor:
    """The length of what each unit owns [units], over all its tensors."""
    return owned.gather({name: value.detach().square() for name, value in named.items()}).reshape(-1).sqrt()


def shrunk(norm: Tensor, least: Tensor | float) -> Tensor:
    """max(0, 1 - tau / norm), what a slice is multiplied by: proximal to a group lasso. Zeros stay zeros."""
    return (1 - least / norm.clamp(min=1e-20)).clamp(min=0)


def ramp(progress: float) -> float:
    """(e^x - 1) / (e - 1): from 0 to 1, slowly at first."""
    return math.expm1(progress) / math.expm1(1)


# While training


@dataclass(frozen=True)
class Proposals:
    """How the generator learns and decides."""

    rate: float = 1e-3  # learning rate of AdamW at first
    floor: float = 1e-4  # where a cosine takes it
    weight: float = 5.0  # of the budget's loss, beside the cross-entropy
    offset: float = 3.0  # added to logits, so that nearly all units are kept at first
    temperature: float = 0.4
    draws: int = 4  # of noise, that what is kept is averaged over; the first masks the model
    clip: float = 1.0  # the longest that the generator's gradients together may be
    samples: int = 64  # calibration examples that it learns from, over and over

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        if min(self.rate, self.temperature, self.clip) <= 0 or min(self.floor, self.weight) < 0:
            raise SettingError(
                f"proposals by rate={self.rate:g}, floor={self.floor:g}, weight={self.weight:g}, "
                f"temperature={self.temperature:g} and clip={self.clip:g} were asked for",
                "they are above 0, and floor and weight 0 at least",
                "Take the defaults: 1e-3, 1e-4, 5, 0.4 and 1.",
            )
        if min(self.draws, self.samples) < 1 or not math.isfinite(self.offset):
            raise SettingError(
                f"proposals of draws={self.draws}, samples={self.samples} and offset={self.offset:g} were asked for",
                "the first two are 1 at least, and an offset is a number",
                "Take the defaults: 4, 64 and 3.",
            )


class Proposing(Rule):
    """Steps 1, 2 and 4: proposes and decides before each step until a share of training, draws to zero after each.

    The layers' hooks must be in place: see `hooked`. Curves: "kept" is the share of weights that decisions
    keep; "moved" the share of units that noise-free decisions took another way since the step before; "condemned" the
    length of the adapters' slices that condemned units own, as a share of that of all.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        layers: Mapping[str, Guided],
        task: Task,
        sparsity: float,
        how: Proposals | None = None,
        *,
        until: float = 0.5,
        lasso: float = 4.0,
        least: int = 1,
        clip: float = 1.0,
    ) -> None:
        self.sites, self.layers, self.task = list(sites), layers, task
        self.sparsity, self.until, self.lasso, self.least, self.clip = sparsity, until, lasso, least, clip
        self.how = Proposals() if how is None else how
        self.costs = {site.name: weights_of(site) for site in self.sites}
        self.total = float(sum(cost.sum() for cost in self.costs.values()))
        self.owned = {s.name: found for s in self.sites if (found := slices(s, layers)) is not None}
        self.batches: list[Batch] = list(task.batches("calibration", self.how.samples)) if until > 0 else []
        if until > 0 and not self.batches:
            raise TaskError(
                f"decisions were to be learnt on {task.name}", "its calibration split is empty", "Give it data."
            )
        device = next(iter(layers.values())).frozen.device if layers else None
        with seeded(nn.Module(), generator(task, "atp proposer").initial_seed()):
            self.proposer = Proposer(self.sites).to(device)
        self.optimizer = torch.optim.AdamW(self.proposer.parameters(), self.how.rate)
        self.draw = generator(task, "atp noise")
        self.keep = everything(self.sites)
        self.open = everything(self.sites)  # what would be kept without noise
        self.frozen, self.proposed, self.plain = False, 0, 1.0
        self._check_makers()

    def _check_makers(self) -> None:
        for part in (part for site in self.sites for part in site.parts):
            if part.makes and part.name not in self.layers:
                raise SiteError(
                    f"units that {part.name} makes were to be masked",
                    "it is no layer that was given",
                    "Give a layer for it, without an adapter if need be.",
                )

    def parameters(self) -> list[Tensor]:
        """A and B of every adapter."""
        return [p for layer in self.layers.values() if layer.low is not None for p in layer.low.parameters()]

    def steps(self, steps: int) -> int:
        """How many of the steps have proposals."""
        return round(self.until * steps)

    def before_forward(self, loop: Loop) -> None:
        """Propose and decide; or make the last decision, once."""
        if loop.step < self.steps(loop.steps):
            self.pace(loop.step / self.steps(loop.steps))
            self.propose(unwrapped(loop.model))
            self.decide(loop)
        elif not self.frozen:
            self.settle(loop)

    def pace(self, progress: float) -> None:
        """Set the generator's learning rate: a cosine from the first to the last."""
        last = min(self.how.floor, self.how.rate)
        for group in self.optimizer.param_groups:
            group["lr"] = last + (self.how.rate - last) * (1 + math.cos(math.pi * progress)) / 2

    def propose(self, model: nn.Module) -> float:
        """One step of the generator, the model in eval mode and nothing of it learning; its loss."""
        logits = self.proposer()
        softs = [{name: self.soft(logit) for name, logit in logits.items()} for _ in range(self.how.draws)]
        kept = torch.stack([self.kept({n: hard_mask(s) for n, s in soft.items()}) for soft in softs]).mean()
        batch = self.batches[self.proposed % len(self.batches)].to(kept.device)
        training = {module: module.training for module in model.modules()}
        try:
            self.show(softs[0])
            loss = self.task.loss(model.eval(), batch) + self.how.weight * budget_loss(kept, 1 - self.sparsity)
            learnt = list(self.proposer.parameters())
            for parameter, found in zip(learnt, torch.autograd.grad(loss, learnt), strict=True):
                parameter.grad = found
        finally:
            self.show({})
            for module, was in training.items():
                module.training = was
        torch.nn.utils.clip_grad_norm_(learnt, self.how.clip)
        self.optimizer.step()
        self.proposed += 1
        return float(loss.detach())

    def soft(self, logit: Tensor) -> Tensor:
        """A soft mask with noise of its own."""
        noise = gumbel(logit.shape, self.draw).to(logit.device)
        return soft_mask(logit, noise, self.how.offset, self.how.temperature)

    def kept(self, masks: Mapping[str, Tensor]) -> Tensor:
        """The share of weights that masks keep, with gradient where they have one."""
        found = [(mask * self.costs[name].to(mask)).sum() for name, mask in masks.items()]
        return torch.stack(found).sum() / self.total

    def show(self, soft: Mapping[str, Tensor]) -> None:
        """Let soft masks take part in the forward pass; with none, no more.

        Once a unit: on what the last of its makers puts out, so that k and not q, up and not gate, is multiplied, and
        what the unit gives is multiplied by the mask and not by its square.
        """
        for layer in self.layers.values():
            layer.soft = None
        for site in self.sites:
            if site.name in soft:
                part = [part for part in site.parts if part.makes][-1]
                self.layers[part.name].soft = part.expand(soft[site.name], nobody=1.0).reshape(-1)

    @torch.no_grad()
    def decide(self, loop: Loop) -> None:
        """Masks by the generator and noise; each site keeps its best at least."""
        logits = self.proposer()
        keep = {name: hard_mask(self.soft(logit)).bool() for name, logit in logits.items()}
        self.take(loop, {name: k | keep_top(logits[name], min(self.least, len(k))) for name, k in keep.items()})
        now = {name: (logit + self.how.offset > 0).cpu() for name, logit in logits.items()}
        moved = sum(int((now[name] != was).sum()) for name, was in self.open.items())
        loop.log("moved", moved / sum(len(k) for k in now.values()))
        self.open = now

    @torch.no_grad()
    def settle(self, loop: Loop) -> None:
        """The last decision, without noise: units by their logits, as many as the budget has, each site its best."""
        logits = {name: logit.detach().double().cpu() for name, logit in self.proposer().items()}
        plain = {name: (logit + self.how.offset > 0).double() for name, logit in logits.items()}
        self.plain = float(self.kept(plain))  # before the threshold is moved to where the budget is met
        spared = torch.cat([keep_top(logit, min(self.least, len(logit))) for logit in logits.values()])
        cost = torch.cat([self.costs[name] for name in logits])
        gone = worst_first(torch.cat(list(logits.values())), cost, self.sparsity * self.total, spared)
        parts = torch.split(~gone, [len(logit) for logit in logits.values()])
        self.take(loop, dict(zip(logits, parts, strict=True)))
        self.frozen = True

    def take(self, loop: Loop, keep: Mapping[str, Tensor]) -> None:
        """Take on a decision."""
        self.keep = {name: k.detach().cpu() for name, k in keep.items()}
        loop.agree(self.keep)
        self.mask()
        loop.occupied(self.keep)
        loop.log("kept", float(self.kept({name: k.double() for name, k in self.keep.items()})))

    def mask(self) -> None:
        """Put the masks where the units are made."""
        for site in self.sites:
            for part in site.parts:
                if part.makes:
                    mine = part.expand(self.keep[site.name].float(), nobody=1.0).reshape(-1)
                    self.layers[part.name].mask = mine.to(self.layers[part.name].frozen.device)

    def before_step(self, loop: Loop) -> None:
        """Clip."""
        torch.nn.utils.clip_grad_norm_(self.parameters(), self.clip)

    def after_step(self, loop: Loop) -> None:
        """Draw the slices of condemned units to zero, and say now and then how long they are."""
        self.shrink(loop.optimizer.param_groups[0]["lr"] * ramp(loop.progress))
        if loop.step % max(1, loop.steps // 20) == 0 or loop.step == loop.steps:
            loop.log("condemned", self.condemned())

    @torch.no_grad()
    def shrink(self, step: float) -> None:
        """w <- w max(0, 1 - tau / ||w||) for condemned slices, tau = lasso * step * sqrt(elements of the slice).

        A step of Adam moves a slice by its rate times that root at most: a lasso above 1 wins over any gradient when
        the ramp is at its end.
        """
        if not self.lasso:
            return
        for name, (owned, named) in self.owned.items():
            least = self.lasso * step * owned.cost().reshape(-1).sqrt()
            norm = slice_norms(owned, named)
            factor = torch.where(self.keep[name].to(norm.device), 1.0, shrunk(norm, least.to(norm)))
            for part in owned.parts:
                named[part.name].mul_(part.expand(factor, nobody=1.0))

    def condemned(self) -> float:
        """The length of the slices that condemned units own, as a share of that of all slices; 0 where all are 0."""
        gone, every = 0.0, 0.0
        for name, (owned, named) in self.owned.items():
            squares = slice_norms(owned, named).double().square().cpu()
            gone, every = gone + float(squares[~self.keep[name]].sum()), every + float(squares.sum())
        return math.sqrt(gone / every) if every else 0.0

    def finish(self, loop: Loop) -> None:
        """The last decision, where proposals went on to the end: nothing is trained under it."""
        if not self.frozen:
            self.settle(loop)

    def state(self) -> dict[str, Any]:
        """Adapters, masks, the generator with its optimizer, and where noise and data are."""
        return {
            "low": [p.detach() for p in self.parameters()],
            "keep": dict(self.keep),
            "open": dict(self.open),
            "proposer": self.proposer.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "noise": self.draw.get_state(),
            "proposed": self.proposed,
            "frozen": self.frozen,
            "plain": self.plain,
        }

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As they were."""
        with torch.no_grad():
            for parameter, was in zip(self.parameters(), state["low"], strict=True):
                parameter.copy_(was)
        self.keep = {name: k.bool() for name, k in state["keep"].items()}
        self.open = {name: k.bool() for name, k in state["open"].items()}
        self.proposer.load_state_dict(state["proposer"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.draw.set_state(state["noise"])
        self.proposed, self.frozen, self.plain = int(state["proposed"]), bool(state["frozen"]), float(state["plain"])
        if self.proposed or self.frozen:
            self.mask()


def together(dims: Sequence[Site], channels: Sequence[Site]) -> list[Site]:
    """Dims of heads and neurons in the order of their blocks; of channels only those that are no such dims.

    Where attention was narrowed before, its dims are found as channels as well, head by head.
    """
    theirs = {part.name for site in dims for part in site.parts}
    neurons = [site for site in channels if not any(part.name in theirs for part in site.parts)]
    blocks = list(dict.fromkeys(site.block for site in [*dims, *neurons]))
    return sorted([*dims, *neurons], key=lambda site: blocks.index(site.block))


@dataclass(eq=False)
class Work:
    """What a run trains by, once the model is ready for it."""

    sites: list[Site]  # that may lose units
    rule: Proposing
    coupling: Coupling
    edits: list[Edit]  # made so far
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ATP(Method):
    """Tune adapters while a generator proposes masks and learns from what they cost; then cut, with nothing lost."""

    sparsity: float = 0.4  # fraction of the weights of neurons and of dims of heads that is taken out, in [0, 1)
    rank: int = 8  # of the adapters: r
    dropout: float = 0.1  # of the r numbers inside an adapter
    rate: float = 1e-4  # learning rate of AdamW for adapters; a tiny model wants 1e-3
    clip: float = 1.0  # the longest that the adapters' gradients together may be
    steps: int = 400  # optimizer steps of the adapters
    until: float = 0.5  # fraction of the steps with proposals; then the last decision, and adapters alone
    proposals: Proposals = Proposals()  # how the generator learns and decides
    lasso: float = 4.0  # how hard condemned slices are drawn to zero at the end, in steps of Adam; 0: not at all
    start: Start = ZeroProduct()  # smallest-directions: adapters start as the smallest singular directions
    least: int = 1  # units that stay at each site
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "*.layers.0.*", "*.keys"
    include: tuple[str, ...] = ()  # matrices that adapters go on, by name, class or role; () is every one in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # matrices without adapters

    card: ClassVar = Card(
        30,
        "All-in-One Tuning and Structural Pruning for Domain-Specific LLMs",
        arxiv="2412.14426",
        year=2024,
        when="during training",
        granularity=("channel",),
        needs=("calibration", "labels", "training"),
        families=("decoder",),
        axes="gates budget rule adapters",
        criterion=("learned",),
        tasks=("language modelling",),
        stage=("score or mask", "sparsity regularisation"),
        schedule=("custom",),
        allocation=("learned",),
        learns=("meta-network",),
        fusion=("low-rank",),
        start=("pretrained",),
        transfer=("target task",),
        reports="At 40 % pruned up to 88 % (LLaMA2-7B) and 91 % (LLaMA3-8B) of the dense model's performance on legal "
        "and health tasks is recovered, more than by pruning first and tuning then.",
        checked="tests/methods/test_atp.py::test_what_was_masked_in_training_is_cut_without_a_change",
        differs=(
            "a unit of queries and keys is a rotary pair, dims i and i + e/2: an index cut alone would break the pair",
            "with grouped queries q and o count query heads, k and v key-value heads; the authors' code has one count",
            "a soft mask multiplies what a unit gives once; in the authors' code a neuron's is squared where gate and"
            " up are both masked",
            "the last decision has no noise, and its threshold is moved to where the budget is met: the budget's loss"
            " leaves it a little beside; the authors keep the last masks that were drawn",
            "the group lasso is the proximal step of the authors' later code, in units of a step of Adam; their first"
            " code adds it to the loss with constants set by hand",
            "what is kept is averaged over four draws in the budget's loss, and no dropout is in the generator",
            "adapters are merged before units are taken out, which comes to the same",
        ),
    )
    tiny: ClassVar = {
        "steps": 16,
        "rate": 5e-3,
        "rank": 2,
        "proposals": Proposals(rate=2e-2, samples=16, draws=2),
    }

    def budget(self) -> Budget:
        """A fraction of the weights of what can be cut."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut."""
        return Terms(self.sparsity, "weights", "weights", protect=self.protect, least=self.least)

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        self.terms.check()
        self.proposals.check()
        if min(self.rank, self.steps, self.least) < 1 or min(self.rate, self.clip) <= 0:
            raise SettingError(
                f"rank={self.rank}, steps={self.steps}, least={self.least}, rate={self.rate:g} and clip={self.clip:g}"
                " were given",
                "the first three start at 1, and the others are above 0",
                "Take the defaults: 8, 400, 1, 1e-4 and 1.",
            )
        if not 0 <= self.dropout < 1 or not 0 <= self.until <= 1 or not 0 <= self.lasso < math.inf:
            raise SettingError(
                f"dropout={self.dropout:g}, until={self.until:g} and lasso={self.lasso:g} were given",
                "the first two are fractions, dropout below 1, and a lasso is 0 or more",
                "Take the defaults: 0.1, 0.5 and 4.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises BudgetError where too much would go, GraphError for attention without rotary pairs."""
        self.check()
        Retrain().ready(model, task)
        work = self.prepared(model, task)
        history = self.tuned(model, task, work.rule)
        return self.cut(model, work, history)

    def prepared(self, model: nn.Module, task: Task) -> Work:
        """The sites, and the rule that decides about them; the model's attention can be narrowed from then on."""
        coupling = couple(model, task.example)
        neurons = inner(coupling, ("channel",))
        dims, edits = narrowable_(model, task.example)
        found = together(dims, neurons)
        sites = self.terms.free(model, found)
        self.check_affordable(sites)
        layers = self.layers(model, task, sites)
        rule = Proposing(
            sites, layers, task, self.sparsity, self.proposals,
            until=self.until, lasso=self.lasso, least=self.least, clip=self.clip,
        )  # fmt: skip
        return Work(sites, rule, coupling, edits, self.terms.left_alone(found))

    @property
    def allocation(self) -> Adaptive:
        """How a plan says that the budget is spent: by what is learnt, so that it cannot be told before a run."""
        return Adaptive(least=self.least)

    def sites_in(self, model: nn.Module) -> list[Site]:
        """The sites, for plans. Raises as `prepared`."""
        dims = head_dims(model)  # before a network that takes no tokens is given some
        few = Batch({"input_ids": torch.arange(4, device=next(model.parameters()).device)[None]})
        narrowable_(copy.deepcopy(model, {id(value): value for value in tensors(model).values()}), few)
        return self.terms.free(model, together(dims, inner(couple(model, few), ("channel",))))

    def check_affordable(self, sites: Sequence[Site]) -> None:
        """Raise BudgetError when so many weights cannot go, `least` units being left at each site."""
        costs = [weights_of(site) for site in sites]
        total = sum(float(cost.sum()) for cost in costs)
        most = sum(float(cost.sum() - cost[: self.least].sum()) for cost in costs)
        if self.sparsity * total > most:
            raise BudgetError(
                f"{self.sparsity:g} of {total:,.0f} weights were to be taken out",
                f"{most / total:.4g} can be, {self.least} unit{'s' if self.least > 1 else ''} being left at each of "
                f"{len(sites)} sites",
                "Ask for less, or leave fewer units.",
            )

    def layers(self, model: nn.Module, task: Task, sites: Sequence[Site]) -> dict[str, Guided]:
        """The linear layers that get adapters, and those that make units, by the name of their weight.

        Raises ModelError for a weight that several layers share and for one behind a gate, SiteError where nothing
        gets an adapter.
        """
        adapted = adaptable(model, self.include, self.exclude)
        makers = {part.name: part for site in sites for part in site.parts if part.makes}
        tied, named = tied_names(model), dict(model.named_parameters(remove_duplicate=False))
        found: dict[str, Guided] = {}
        for name, part in {**makers, **adapted}.items():
            asked = f"{name} was to be adapted while units are decided about"
            if parametrize.is_parametrized(model.get_submodule(part.module)):
                raise ModelError(asked, "it is behind a gate or another adapter", "Harden it first.")
            if name in tied:
                raise ModelError(
                    asked, f"it is one tensor with {', '.join(n for n in tied[name] if n != name)}",
                    "Untie them first, or leave what they make alone by protect= and exclude=.",
                )  # fmt: skip
            low = LowRank(named[name], self.rank, turned=part.turned) if name in adapted else None
            found[name] = Guided(part, named[name], low, self.dropout)
            self.start.start_(found[name], generator(task, f"atp {name}"))
        return found

    def tuned(self, model: nn.Module, task: Task, rule: Proposing) -> History:
        """Train the adapters, the rule deciding meanwhile; the model's own weights stay as they are."""
        with only(model, []), hooked(model, rule.layers):
            optimizer = torch.optim.AdamW(rule.parameters(), self.rate, weight_decay=0.0)
            return fit(model, task, self.steps, [rule], optimizer)

    def cut(self, model: nn.Module, work: Work, history: History) -> Outcome:
        """Merge the adapters and take out what was condemned."""
        rule, edits = work.rule, list(work.edits)
        notes = [*self.notes(work), *work.notes, *(str(frozen) for frozen in work.coupling.frozen)]
        made: list[Edit] = [Update(n, layer.merged()) for n, layer in rule.layers.items() if layer.low is not None]
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        made += [Mask(site, rule.keep[site.name]) for site in work.sites if bool(rule.keep[site.name].all())]
        made += removals(work.sites, rule.keep)
        return Outcome(model, [*edits, *apply_(model, made)], history, notes=[*notes, *history.notes])

    def notes(self, work: Work) -> list[str]:
        """What goes, what was trained, and what the cut takes along of the adapters."""
        rule, said = work.rule, list[str]()
        for end, word in ((".keys", "rotary pairs"), (".values", "dims of values"), ("", "neurons")):
            mine = [
                s for s in work.sites if (s.name.endswith(end) if end else not s.name.endswith((".keys", ".values")))
            ]
            if units := sum(site.units for site in mine):
                lost = sum(int((~rule.keep[site.name]).sum()) for site in mine)
                said.append(f"{lost:,} of {units:,} {word}")
        gone = 1 - float(rule.kept({name: keep.double() for name, keep in rule.keep.items()}))
        trained = sum(p.numel() for p in rule.parameters())
        notes = [
            f"{', '.join(said)} were taken out: {gone:.4f} of their weights, {self.sparsity:g} asked for",
            f"{trained:,} parameters of adapters were trained in {self.steps} steps, the generator in {rule.proposed}",
        ]
        if gone:
            notes.append(f"slices of adapters went with them that had {rule.condemned():.2g} of the length of all")
        if rule.proposed:
            notes.append(f"without its threshold moved to the budget the last decision would take {1 - rule.plain:.4f}")
        return notes
