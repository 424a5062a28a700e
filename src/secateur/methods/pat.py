"""PAT: while adapters are trained, one mask learns which channels of the residual stream the model can do without.

Liu, Yang, Chen, Zhang, Wang, Du, Du. "PAT: Pruning-Aware Tuning for Large Language Models." AAAI 2025.
arXiv:2408.14721. Whatever writes h to the stream (the embeddings, o_proj, down_proj) goes through a module of its own
first; the mask is the same in all of them:

    z = M * (h + L1 (v * L0 h))                            L0 [r, d], L1 [d, r], v [r]: D = I + L1 diag(v) L0
    M(t) = sigmoid(tau(t) m) + beta(t)                     m [d] are its logits, 0 at first
    tau(t) = 1 / (1 - ln t / ln S0)    beta(t) = max(0.5 - t / S0, 0)
    loss = that of the task + |N - sum 1(m > 0)| + sum |L0 L0^T - I| + |L1^T L1 - I|

From the milestone S0 on the mask is 0 or 1, and the rest is trained behind it. At last D and the adapters are merged
into the weights, and the channels are taken out everywhere. An RMSNorm keeps zeros zero, so what reads the stream
needs nothing but its columns; since d entries with zeros have a smaller mean square than the k that stay, gains grow
by sqrt(d / k), and what is written shrinks by as much, so that eps counts as before. The small model is a plain one.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log, sqrt
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.adapters import LowRank, tied_names
from secateur.axes import Cosine, keep_top, kept_of
from secateur.axes.hooks import Adapted, adaptable, hooked, is_linear
from secateur.axes.recovery import Retrain, only
from secateur.axes.rules import LearningRate
from secateur.cut import DEFAULT_EXCLUDE
from secateur.edit import Edit, Remove, Replace, Update, apply_
from secateur.errors import BudgetError, GraphError, ModelError, SettingError
from secateur.evidence import answered
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, tensors
from secateur.stream import NormKind, Stream, UntiedLinear, follow, rms_norms, whole
from secateur.task import Task, generator
from secateur.train import Loop, Rule, fit

# The equations


def temperature(step: int, milestone: int) -> float:
    """How sharp the mask is after some steps: 1 at first, without bound at the milestone."""
    if step >= milestone:
        return float("inf")
    return 1 / (1 - log(max(step, 1)) / log(milestone))


def lift(step: int, milestone: int) -> float:
    """What is added to the mask: 0.5 at first, so that it is 1 where the logits are 0; nothing from half way on."""
    return max(0.5 - step / milestone, 0.0)


def soft_mask(logits: Tensor, step: int, milestone: int) -> Tensor:
    """M(t) before the milestone: logits [width] -> a factor per channel [width]."""
    return torch.sigmoid(temperature(step, milestone) * logits) + lift(step, milestone)


def above_zero(logits: Tensor) -> Tensor:
    """How many logits are above zero, with the gradient of their sum: straight through."""
    return (logits > 0).to(logits.dtype).sum() + (logits - logits.detach()).sum()


def mixed(flow: Tensor, down: Tensor, scale: Tensor, up: Tensor) -> Tensor:
    """D h = h + L1 (v * L0 h) of rows h: flow [..., width], L0 [rank, width], v [rank], L1 [width, rank]."""
    return flow + (flow @ down.T * scale) @ up.T


def identity_loss(down: Tensor, up: Tensor) -> Tensor:
    """|L0 L0^T - I| + |L1^T L1 - I|: how far L0 [rank, width] and L1 [width, rank] are from only turning."""
    eye = torch.eye(len(down), dtype=down.dtype, device=down.device)
    return torch.linalg.matrix_norm(down @ down.T - eye) + torch.linalg.matrix_norm(up.T @ up - eye)


@runtime_checkable
class Active(Protocol):
    """What is added to the loss, so that as many channels as asked stay."""

    def count_loss(self, logits: Tensor, keep: int) -> Tensor:
        """A scalar, from logits [width] of which `keep` are to be above zero."""
        ...


@dataclass(frozen=True)
class Counted:
    """|N - sum 1(m > 0)|: how many are above zero, and nothing else. The paper's."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def count_loss(self, logits: Tensor, keep: int) -> Tensor:
        """See Active."""
        return self.weight * (above_zero(logits) - keep).abs()


@dataclass(frozen=True)
class Settled:
    """The count as a fraction, and logits on either side pulled to +0.5 and -0.5, where the mask is sharp.

    The authors' code, not their paper.
    """

    weight: float = 10.0
    pull: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_weight(self.pull)

    def count_loss(self, logits: Tensor, keep: int) -> Tensor:
        """See Active. A side without logits pulls nowhere: all are at 0 to begin with."""
        found = self.weight * (above_zero(logits) - keep).abs() / keep
        for side, aim in ((logits[logits > 0], 0.5), (logits[logits <= 0], -0.5)):
            if len(side):
                found = found + self.pull * (side - aim).square().mean()
        return found


def check_weight(weight: float) -> None:
    """Raise SettingError for a weight of a loss that is below zero or not finite."""
    if not 0 <= weight < float("inf"):
        raise SettingError(f"a loss of weight {weight:g} was asked for", "a weight is 0 or more", "Give 1, say.")


@runtime_checkable
class Choice(Protocol):
    """Who chooses the channels."""

    learns: ClassVar[bool]  # whether logits are trained

    def logits(self, width: int, keep: int, draw: torch.Generator) -> Tensor:
        """What they are at first: [width]."""
        ...


@dataclass(frozen=True)
class Learned:
    """Training does, from logits of 0."""

    learns: ClassVar = True

    def logits(self, width: int, keep: int, draw: torch.Generator) -> Tensor:
        """See Choice."""
        return torch.zeros(width)


@dataclass(frozen=True)
class Frozen:
    """Chance does, before training; the mask grows sharp as ever. What the paper compares with."""

    size: float = 0.5  # logits are this, or this below zero

    learns: ClassVar = False

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise SettingError(f"frozen logits of ±{self.size:g} were asked for", "a size is above 0", "Give 0.5.")

    def logits(self, width: int, keep: int, draw: torch.Generator) -> Tensor:
        """See Choice."""
        found = torch.full((width,), -self.size)
        found[torch.randperm(width, generator=draw)[:keep]] = self.size
        return found


# While training


class SharedMask:
    """The one mask of all writes, made anew from its logits wherever it is used.

    So a block that is run twice, as with gradient checkpointing, sees the same mask both times.
    """

    def __init__(self, logits: Tensor, keep: int, milestone: int, learns: bool = True) -> None:
        self.logits = nn.Parameter(logits, requires_grad=learns)
        self.keep, self.milestone, self.step = keep, milestone, 0

    @property
    def hard(self) -> Tensor:
        """Exactly as many as asked, those of the largest logits: bool [width]."""
        return keep_top(self.logits.detach(), self.keep)

    @property
    def settled(self) -> bool:
        """Whether the milestone is reached: the mask no longer changes."""
        return self.step >= self.milestone

    def __call__(self) -> Tensor:
        """A factor per channel [width]."""
        if self.settled:
            return self.hard.to(self.logits.dtype)
        return soft_mask(self.logits, self.step, self.milestone)


class Mixer:
    """What a write goes through: an operator of low rank of its own, and then the mask. A forward hook.

    The mask comes last: before the operator, it would be filled in again.
    """

    def __init__(self, low: LowRank, mask: SharedMask) -> None:
        self.low, self.mask = low, mask
        self.scale = nn.Parameter(torch.zeros(low.rank, dtype=low.a.dtype, device=low.a.device))  # v

    def parameters(self) -> list[Tensor]:
        """L0, L1 and v."""
        return [self.low.a, self.low.b, self.scale]

    @torch.no_grad()
    def start_(self, draw: torch.Generator) -> "Mixer":
        """L0 and L1 turn and do no more, and v is zero: D = I, and the identity loss is 0."""
        for value in (self.low.a, self.low.b.T):
            value.copy_(torch.linalg.qr(torch.randn(value.T.shape, generator=draw, dtype=torch.float64)).Q.T)
        self.scale.zero_()
        return self

    def __call__(self, module: nn.Module, given: tuple[Any, ...], out: Tensor) -> Tensor:
        """What is written instead: M * D h, calculated in float32 at least."""
        flow = mixed(out.to(self.scale.dtype), self.low.a, self.scale, self.low.b)
        return (flow * self.mask().to(flow)).to(out.dtype)

    @torch.no_grad()
    def merged(self, rows: Tensor) -> Tensor:
        """D of each row [..., width], float64."""
        return mixed(rows.double(), self.low.a.double(), self.scale.double(), self.low.b.double())


class Tuning(Rule):
    """Sharpens the mask with each step, adds what the paper adds to the loss, and clips gradients.

    The hooks of its layers and mixers must be in place: see `hooked` and `mixing`.
    """

    def __init__(
        self,
        mask: SharedMask,
        mixers: Mapping[str, Mixer],
        layers: Mapping[str, Adapted],
        *,
        active: Active | None = None,
        identity: float = 1.0,
        clip: float = 0.3,
    ) -> None:
        self.mask, self.mixers, self.layers = mask, mixers, layers
        self.active: Active = Counted() if active is None else active
        self.identity, self.clip = identity, clip
        self.above = 0  # logits above zero when the milestone was reached

    @property
    def tuned(self) -> list[Tensor]:
        """All that is trained but the mask."""
        low = [p for layer in self.layers.values() if layer.low is not None for p in layer.low.parameters()]
        return [*low, *(p for mixer in self.operators for p in mixer.parameters())]

    @property
    def operators(self) -> list[Mixer]:
        """The mixers, each once."""
        return list(dict.fromkeys(self.mixers.values()))

    def parameters(self) -> list[Tensor]:
        """The adapters, the mixers and, where it learns, the mask."""
        return [*self.tuned, *([self.mask.logits] if self.mask.logits.requires_grad else [])]

    def start(self, loop: Loop) -> None:
        """The mask as it is at first."""
        loop.occupied({"stream": torch.ones_like(self.mask.hard)})
        self.move(loop)

    def before_forward(self, loop: Loop) -> None:
        """The mask as it is in this step."""
        self.move(loop)

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """What the task says, the count and the identity."""
        if self.identity:
            apart = [identity_loss(mixer.low.a, mixer.low.b) for mixer in self.operators]
            value = value + self.identity * torch.stack(apart).sum()
        if self.mask.logits.requires_grad and not self.mask.settled:
            value = value + self.active.count_loss(self.mask.logits, self.mask.keep)
        return value

    def before_step(self, loop: Loop) -> None:
        """Clip. The mask apart: the count's gradient is as long as the width, and would shrink all others with it."""
        torch.nn.utils.clip_grad_norm_(self.tuned, self.clip)
        if self.mask.logits.grad is not None:
            loop.log("channels above zero", float((self.mask.logits > 0).sum()))

    def after_step(self, loop: Loop) -> None:
        """What is measured now is what the next step sees."""
        self.move(loop)

    def move(self, loop: Loop) -> None:
        """Bring the mask to the loop's step."""
        before, self.mask.step = self.mask.settled, loop.step
        if self.mask.settled and not before:
            self.above = int((self.mask.logits > 0).sum())
            loop.agree({"stream": self.mask.hard})
            loop.occupied({"stream": self.mask.hard})
            loop.log("sparsity", 1 - self.mask.keep / len(self.mask.logits))

    def state(self) -> dict[str, Any]:
        """All that is trained, and the count."""
        return {"values": [p.detach() for p in (*self.tuned, self.mask.logits)], "above": self.above}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As it was."""
        with torch.no_grad():
            for parameter, was in zip((*self.tuned, self.mask.logits), state["values"], strict=True):
                parameter.copy_(was)
        self.move(loop)
        self.above = state["above"]


@contextmanager
def mixing(model: nn.Module, mixers: Mapping[str, Mixer]) -> Iterator[None]:
    """Within this, whatever the modules of these names put out goes through their mixers."""
    hooks = [model.get_submodule(name).register_forward_hook(mixer) for name, mixer in mixers.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# The small model


INSTEAD = "Use a decoder with RMSNorm, such as Llama, or slicegpt, which rewrites such norms."


def slice_(
    model: nn.Module, stream: Stream, norms: Mapping[str, NormKind], mixers: Mapping[str, Mixer], keep: Tensor
) -> list[Edit]:
    """Merge the mixers into what they follow, and take channels out everywhere; changes the model.

    An output layer that shares the embeddings' table gets a weight of its own first: what is written is mixed, and what
    is read is not. Embeddings become E D^T, writers D W, gains g sqrt(d / k), writes smaller by as much.
    """
    site, narrow = whole(model, stream), sqrt(int(keep.sum()) / stream.width)
    edits: list[Edit] = []
    shared = shared_readers(model, stream)
    for name in shared:
        edits += apply_(model, untied(model, name, keep))
    site = replace(site, parts=tuple(part for part in site.parts if part.name not in shared))
    named = tensors(model)
    for part in site.parts:
        mixer = mixers.get(part.module)
        written = part.axis == (1 if part.name in stream.segments[0].embeddings else 0)
        if mixer is None or not written:
            continue
        seen = part.view(named[part.name].detach())
        rows = seen.movedim(part.axis or 0, -1)  # what is written last: rows of the stream
        value = (mixer.merged(rows) * narrow).movedim(-1, part.axis or 0)
        stored = value.transpose(0, -1) if part.turned else value
        edits += apply_(model, Update(part.name, stored.contiguous().to(seen.dtype)))
    gains = []
    for name, kind in norms.items():
        old = named[name].detach()
        edits += apply_(model, Update(name, kind.times(old, 1 / narrow)))
        gains.append(Part(name, tuple(old.shape), torch.arange(stream.width), itemsize=old.element_size()))
    return [*edits, *apply_(model, Remove(replace(site, parts=(*site.parts, *gains)), keep))]


def shared_readers(model: nn.Module, stream: Stream) -> list[str]:
    """The weights that read a stream and are one tensor with a table of embeddings that begins it."""
    tied = tied_names(model)
    tables = {name for table in stream.segments[0].embeddings for name in tied.get(table, ())}
    return [n for segment in stream.segments for readers in segment.readers for n in readers if n in tables]


def untied(model: nn.Module, name: str, keep: Tensor) -> Replace:
    """A linear layer with a weight of its own that reads the channels that stay, where it shared another's."""
    path = name.rpartition(".")[0]
    old: Any = model.get_submodule(path)
    left, bias = old.weight.detach()[:, keep.to(old.weight.device)], old.bias
    own = UntiedLinear(left.shape[1], left.shape[0], bias is not None, device=left.device, dtype=left.dtype)
    own.load_state_dict({"weight": left} if bias is None else {"weight": left, "bias": bias})
    return Replace(path, own.train(old.training))


@dataclass(frozen=True, kw_only=True)
class Pat(Method):
    """Train adapters and one mask of the residual stream together, and end with a model of a smaller width.

    Heads, neurons and the cache keep their sizes.
    """

    sparsity: float = 0.25  # fraction of the residual width removed, in [0, 1): not of the parameters
    round_to: int = 1  # what the width that is left is a multiple of; stock transformers may want that of heads
    active: Active = Counted()  # holds the count of channels: the paper's; settled is that of the authors' code
    choice: Choice = Learned()  # who chooses channels: learned, or frozen for chance
    operator_rank: int = 32  # of the operator before each write: r; the paper has 200 of a width of 4096
    identity: float = 1.0  # weight of the identity loss of the operators; 0 leaves it out
    rank: int = 20  # of the adapters
    alpha: float = 4.0  # adapters count alpha / rank
    dropout: float = 0.05  # of what flows into an adapter
    rate: float = 5e-5  # learning rate of AdamW at its peak; a tiny model wants 1e-2
    reach: float = 0.4  # how far a logit of the mask may come by the milestone: its rate is this over the steps there
    warmup: float = 0.03  # fraction of the steps in which rates rise; they fall along a cosine after
    clip: float = 0.3  # the longest that gradients together may be, but for the mask's
    steps: int = 400  # optimizer steps; the paper has 23,000 of 128 samples
    milestone: float = 1 / 3  # fraction of the steps after which the mask is 0 or 1: S0
    include: tuple[str, ...] = ()  # matrices that adapters go on, by name, class or role; () is every one in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # matrices without adapters

    card: ClassVar = Card(
        27,
        "PAT: Pruning-Aware Tuning for Large Language Models",
        arxiv="2408.14721",
        year=2025,
        when="during training",
        granularity=("stream",),
        needs=("training",),
        families=("decoder",),
        axes="rule adapters edit",
        criterion=("learned",),
        tasks=("language modelling",),
        stage=("score or mask",),
        schedule=("custom",),
        allocation=("uniform",),
        learns=("masks or gates",),
        fusion=("low-rank",),
        start=("pretrained",),
        reports="Llama2-7B, mean of 14 tasks: LoRA 58.76 whole; 20 % of the width removed 61.04, 25 % 60.02, 30 % 57.81"
        " (SliceGPT, then LoRA: 57.81, 52.98, 50.91), and 1.33 times as fast.",
        checked="tests/methods/test_pat.py::test_the_sliced_model_says_what_the_masked_one_said",
        differs=(
            "from the milestone on exactly as many channels stay as asked, those of the largest logits, whatever the"
            " count above zero is by then; the paper has sigmoid(1e6 m), whose logits get no gradient either",
            "L0 and L1 start orthonormal and v at zero, where the authors' code starts with L1 = 0: D = I in both, but"
            " the identity loss, which that code has for L0 alone, would pull L1, and D with it, away from there",
            "v scales the r directions of the operator, as in the paper; in the authors' code it scales the d channels"
            " that are put out, and is left out when the operator is merged",
            "the identity loss is summed over all operators; in the authors' code only the last block's counts",
            "the mask has a learning rate of its own, in proportion to the steps it has: at the paper's length that of"
            " everything else",
            "gradients of the mask are not clipped along with the others, which the count's would shrink to nothing",
            "a frozen mask is drawn by chance; in the authors' code it is the first channels",
            "what is written shrinks by sqrt(k / d) as gains grow, which keeps the share of eps",
        ),
    )
    tiny: ClassVar = {
        "steps": 30, "rate": 3e-3, "reach": 2.0, "operator_rank": 4, "rank": 2, "active": Counted(0.1), "clip": 1.0,
    }  # fmt: skip

    def budget(self) -> Budget:
        """A fraction of the residual width."""
        return Budget(self.sparsity, of="units")

    @property
    def turning(self) -> int:
        """The step from which the mask is 0 or 1: 2 at least, or there were no logarithm to divide by."""
        return max(2, round(self.milestone * self.steps))

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        super().check()
        LearningRate(warmup=self.warmup)
        check_weight(self.identity)
        if min(self.rank, self.operator_rank, self.round_to) < 1 or self.steps < 3:
            raise SettingError(
                f"rank={self.rank}, operator_rank={self.operator_rank}, round_to={self.round_to} and"
                f" steps={self.steps} were given",
                "the first three start at 1, and steps at 3",
                "Take the defaults: 20, 32, 1 and 400.",
            )
        if min(self.alpha, self.rate, self.reach, self.clip) <= 0:
            raise SettingError(
                f"alpha={self.alpha:g}, rate={self.rate:g}, reach={self.reach:g} and clip={self.clip:g} were given",
                "they are above 0",
                "Take the defaults: 4, 5e-5, 0.4 and 0.3.",
            )
        if not 0 < self.milestone <= 1 or not 0 <= self.dropout < 1:
            raise SettingError(
                f"milestone={self.milestone:g} and dropout={self.dropout:g} were given",
                "a milestone is a fraction of the steps, in (0, 1], and dropout one in [0, 1)",
                "Take the defaults: 0.33 and 0.05.",
            )

    def width(self, whole: int) -> int:
        """Channels that stay of so many, rounded down. Raises BudgetError where none do, or all."""
        keep = kept_of(whole, self.sparsity) // self.round_to * self.round_to
        if keep < 1 or kept_of(whole, self.sparsity) == whole:
            most = 1 - self.round_to / whole
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} of a residual width of {whole}, in multiples of {self.round_to}, was"
                " asked for",
                f"{'no channel is left' if keep < 1 else 'it takes no channel'}",
                f"Ask for {1 / whole:.4g} at least and {most:.4g} at most." if most > 0 else "Give a smaller round_to.",
            )
        return keep

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises GraphError for a stream that cannot be followed, or that goes through other norms."""
        self.check()
        Retrain().ready(model, task)
        stream = follow(model, task.example)
        norms, keep = rms_norms(model, stream, INSTEAD), self.width(stream.width)
        before = sum(p.numel() for p in model.parameters())
        logits = self.choice.logits(stream.width, keep, generator(task, "pat mask"))
        mask = SharedMask(logits.to(next(model.parameters()).device), keep, self.turning, self.choice.learns)
        mixers, layers = self.mixers(model, stream, mask, task), self.layers(model, task)
        rule = Tuning(mask, mixers, layers, active=self.active, identity=self.identity, clip=self.clip)
        groups: list[dict[str, Any]] = [{"params": rule.tuned}]
        if self.choice.learns:
            groups.append({"params": [mask.logits], "lr": self.reach / self.turning})
        with only(model, ()), hooked(model, layers), mixing(model, mixers):
            optimizer = torch.optim.AdamW(groups, self.rate, weight_decay=0.0)
            history = fit(model, task, self.steps, [LearningRate(Cosine(), self.warmup), rule], optimizer)
            masked = answered(model, task.example)
        shared = shared_readers(model, stream)
        edits = apply_(model, [Update(name, layer.merged()) for name, layer in layers.items()])
        edits += slice_(model, stream, norms, mixers, mask.hard)
        off = answered(model, task.example) - masked
        self.compare(model, off, masked)
        after = sum(p.numel() for p in model.parameters())
        notes = [
            f"residual width {stream.width} -> {keep}: {1 - keep / stream.width:.4g} of it removed,"
            f" {self.sparsity:g} asked for; parameters {before:,} -> {after:,} ({after / before - 1:+.1%})",
            f"{sum(p.numel() for p in rule.parameters()):,} parameters were trained, and merged",
            f"sliced, no logit moves by more than {float(off.abs().max()):.2g} from what the masked model said",
        ]
        if self.choice.learns:
            notes.append(
                f"{rule.above} logits of the mask were above zero at step {self.turning}: the {keep} largest stayed"
            )
        if shared:
            own = sum(tensors(model)[name].numel() for name in shared)
            notes.append(f"the output layer shared the embeddings' table, and has one of its own: {own:,} parameters")
        return Outcome(model, edits, history, notes=[*notes, *history.notes])

    def compare(self, model: nn.Module, off: Tensor, masked: Tensor) -> None:
        """Raise GraphError where the sliced model does not say what the masked one said."""
        apart = float(off.norm() / masked.norm().clamp(min=1e-30))
        if not apart < (1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1):
            raise GraphError(
                f"masked channels of {type(model).__name__} were to be taken out",
                f"its answers changed by {apart:.2g} of their size, so that it does something with its stream unseen",
                "Use a plain pre-norm decoder with RMSNorm, or another method.",
            )

    def mixers(self, model: nn.Module, stream: Stream, mask: SharedMask, task: Task) -> dict[str, Mixer]:
        """What each write goes through, by the name of the module; tables of embeddings that are added up share one.

        Raises ModelError for a writer that is not called as a linear layer.
        """
        found: dict[str, Mixer] = {}
        draw = generator(task, "pat operators")
        like = next(model.parameters())
        for segment in stream.segments:
            paths = [name.rpartition(".")[0] for name in (*segment.embeddings, *segment.writers)]
            for path in paths:
                module = model.get_submodule(path)
                if not (is_linear(module) or isinstance(module, nn.Embedding)) or parametrize.is_parametrized(module):
                    raise ModelError(
                        f"what {path} writes to the stream was to be masked",
                        f"a {type(module).__name__} holds its weight, or a gate is before it",
                        "Use a model whose projections are plain linear layers, or harden its gates.",
                    )
            for path in paths if segment.writers else paths[:1]:
                low = LowRank(like.new_empty(stream.width, stream.width), self.operator_rank)
                found[path] = Mixer(low, mask).start_(draw)
            if not segment.writers:
                found.update(dict.fromkeys(paths[1:], found[paths[0]]))
        return found

    def layers(self, model: nn.Module, task: Task) -> dict[str, Adapted]:
        """The linear layers that get adapters, by the name of their weight.

        Raises SiteError where there are none, ModelError for one that is shared or behind a gate.
        """
        parts = adaptable(model, self.include, self.exclude).values()
        named, tied = dict(model.named_parameters(remove_duplicate=False)), tied_names(model)
        found = {}
        for part in parts:
            if part.name in tied or parametrize.is_parametrized(model.get_submodule(part.module)):
                raise ModelError(
                    f"an adapter was to be put on {part.name}",
                    "it is shared with another layer, or behind a gate",
                    f"Leave it out with exclude={part.module}, untie it or harden the gate.",
                )
            low = LowRank(named[part.name], self.rank, turned=part.turned)
            low.start_at_zero_(generator(task, f"pat {part.name}"))
            found[part.name] = Adapted(part, named[part.name], low, self.alpha / self.rank, self.dropout)
        return found
