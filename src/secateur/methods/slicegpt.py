"""SliceGPT: turn the residual stream so that its last directions carry least, then cut them off everywhere.

Ashkboos, Croci, do Nascimento, Hoefler, Hensman. "SliceGPT: Compress Large Language Models by Deleting Rows and
Columns." ICLR 2024. arXiv:2401.15024, section 3: invariance (theorem 1), a basis per block, slicing. Finding the
stream, fusing norms and the matrices on the shortcuts are secateur.stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import floor
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.edit import Edit, Remove, Rotate, apply_
from secateur.errors import BudgetError, EvidenceError, GraphError, SettingError
from secateur.evidence import Evidence, calm, merged, summed
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.stream import Segment, Stream, add_shortcuts, few, follow, fuse, second_moments, sites
from secateur.task import Batch, Task, generator, logits_of
from secateur.walk import Block, walk


class Basis(Protocol):
    """The directions of the stream, those to keep first."""

    own: ClassVar[bool]  # whether each segment has a basis of its own, measured once the ones before are sliced
    measures: ClassVar[bool]  # whether it looks at the second moments

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        """Second moments [width, width], float64 -> orthogonal [width, width], a direction per column."""
        ...


def principal_axes(moments: Tensor, damp: float) -> Tensor:
    """Eigenvectors of second moments [width, width], the loudest direction first: Q in the paper."""
    damped = moments + damp * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)
    return torch.linalg.eigh(damped).eigenvectors.flip(1)


def random_rotation(width: int, draw: torch.Generator) -> Tensor:
    """An orthogonal [width, width], every rotation as likely as any other (Haar)."""
    q, r = torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))
    return q * r.diagonal().sign()


@dataclass(frozen=True)
class PcaPerBlock:
    """Principal axes of each segment as it comes out of the sliced blocks before it: the paper's."""

    own: ClassVar = True
    measures: ClassVar = True
    damp: float = 0.01  # added to the diagonal of the second moments, as a share of its mean

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        """See Basis."""
        return principal_axes(moments, self.damp)


@dataclass(frozen=True)
class PcaGlobal:
    """One set of principal axes for the whole dense stream, each segment counting alike: no shortcut matrices."""

    own: ClassVar = False
    measures: ClassVar = True
    damp: float = 0.01  # added to the diagonal of the second moments, as a share of its mean

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        """See Basis."""
        return principal_axes(moments, self.damp)


@dataclass(frozen=True)
class RawChannels:
    """The stream's own channels, those with the largest mean square first: naive channel deletion."""

    own: ClassVar = False
    measures: ClassVar = True

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        """See Basis."""
        order = moments.diagonal().argsort(descending=True, stable=True)
        return torch.eye(len(moments), dtype=torch.float64)[:, order]


@dataclass(frozen=True)
class RandomBasis:
    """One random rotation for the whole stream, blind to the data."""

    own: ClassVar = False
    measures: ClassVar = False

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        """See Basis."""
        return random_rotation(len(moments), draw)


class Orientation(Protocol):
    """How the directions that are kept lie within their own span: the function does not depend on it."""

    def turn(self, keep: int, draw: torch.Generator) -> Tensor:
        """Orthogonal [keep, keep]."""
        ...


@dataclass(frozen=True)
class Scattered:
    """A random rotation, so that no coordinate is much larger than another, for half precision."""

    def turn(self, keep: int, draw: torch.Generator) -> Tensor:
        """See Orientation."""
        return random_rotation(keep, draw)


@dataclass(frozen=True)
class Sorted:
    """Left as the basis has them, the loudest first."""

    def turn(self, keep: int, draw: torch.Generator) -> Tensor:
        """See Orientation."""
        return torch.eye(keep, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class SliceGPT(Method):
    """Fuse the norms, give each segment of the stream its principal axes, delete the last ones.

    No gradient, no retraining. Attention heads, MLP width and cache keep their sizes.
    """

    sparsity: float = 0.25  # fraction of the residual width removed, in [0, 1): not of the parameters
    samples: int = 128  # calibration sequences, as in the paper
    round_to: int = 8  # what the width that is left is a multiple of
    basis: Basis = PcaPerBlock()
    orientation: Orientation = Scattered()
    slice_head: bool = False  # whether the output layer is sliced as well, which costs more quality

    card: ClassVar = Card(
        39,
        "SliceGPT: compress large language models by deleting rows and columns",
        arxiv="2401.15024",
        year=2024,
        granularity=("stream",),
        needs=("calibration",),
        families=("decoder",),
        axes="evidence edit",
        criterion=("activation",),
        tasks=("language modelling",),
        allocation=("uniform",),
        updates=("solved",),
        reports="LLaMA-2-7B, WikiText-2 perplexity: dense 5.47; 20 % 6.64, 25 % 7.24, 30 % 8.12 of the width sliced.",
        checked="tests/methods/test_slicegpt.py::test_principal_axes_beat_deleting_channels",
        differs=(
            "The mean is taken out of embeddings for LayerNorm models only: with RMSNorm it changes the function.",
            "The norms' eps is the model's own, where the reference writes 1e-5.",
            "The random orientation is uniform over rotations (Haar), where the reference rotates by the QR of a"
            " matrix of uniform numbers.",
            "A model that reshapes the last norm's output to its first width (GPT-2) has its head sliced too.",
            "The LoRA recovery that the paper adds is not part of it.",
        ),
    )
    tiny: ClassVar = {"samples": 16}

    def budget(self) -> Budget:
        """A fraction of the residual width."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """See Method."""
        super().check()
        if self.round_to < 1 or self.samples < 1:
            raise SettingError(
                f"round_to={self.round_to} and samples={self.samples} were asked for",
                "both count from 1",
                "Give round_to=8 and samples=128.",
            )

    def width(self, whole: int) -> int:
        """Directions that stay of a stream of a width: rounded down. Raises BudgetError when none do."""
        keep = floor((1 - self.sparsity) * whole + 1e-9)
        keep = keep if keep == whole else keep // self.round_to * self.round_to
        if keep < 1:
            most = 1 - self.round_to / whole
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} of a residual width of {whole} was asked for",
                f"no multiple of {self.round_to} is left",
                f"Ask for {max(most, 0):g} at most, or for a smaller round_to.",
            )
        return keep

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises GraphError for a model whose residual stream cannot be followed."""
        stream = follow(model, task.example)
        keep, head = self.width(stream.width), self.slice_head or stream.reshaped
        batches = list(task.batches("calibration", self.samples))
        before = sum(p.numel() for p in model.parameters())
        edits = self._prepare(model, task.example, stream, head)
        everywhere = sites(model, stream)
        sliced = everywhere if head else everywhere[:-1]
        tokens = 0

        def basis(moments: Tensor, name: str) -> Tensor:
            draw = generator(task, f"slicegpt {name}")
            axes = self.basis.axes(moments, draw)
            turned = torch.zeros(stream.width, stream.width, dtype=torch.float64)  # what goes is zero until the end
            turned[:, :keep] = axes[:, :keep] @ self.orientation.turn(keep, draw)
            return turned

        if self.basis.own:
            for block in walk(model, batches):  # the first is enough to see what the embeddings give
                moments, tokens = _moments(block, stream.segments[0], batches)
                break
            edits += apply_(model, Rotate(sliced[0], basis(moments, sliced[0].name)))
            # A segment is measured in the basis it was born with, since its shortcut still leads out of the one
            # before, and after everything before it was sliced.
            for block in walk(model, batches, edits=edits):
                for site in block.pick(sliced[1:]):
                    moments, _ = _moments(block, stream.segments[everywhere.index(site)], batches)
                    edits += apply_(model, Rotate(site, basis(moments, site.name)))
        else:
            moments = torch.zeros(stream.width, stream.width, dtype=torch.float64)
            if self.basis.measures:
                moments, tokens = pooled_moments(model, stream, batches)
            turned = basis(moments, "stream")
            edits += apply_(model, [Rotate(site, turned) for site in sliced])
        if keep < stream.width:
            left = torch.arange(stream.width) < keep
            edits += apply_(model, [Remove(site, left) for site in sliced])
        after = sum(p.numel() for p in model.parameters())
        notes = [
            f"residual width {stream.width} -> {keep}: {1 - keep / stream.width:.4g} of it removed,"
            f" {self.sparsity:g} asked for; parameters {before:,} -> {after:,} ({after / before - 1:+.1%})"
        ]
        if stream.reshaped and not self.slice_head:
            notes.append("the output layer was sliced too: the model reshapes what it reads to its first width")
        if self.basis.measures and 0 < tokens < stream.width:
            notes.append(
                f"{tokens:,} calibration tokens cannot tell {stream.width:,} directions apart: some were kept by chance"
            )
        return Outcome(model, edits, notes=notes)

    def _prepare(self, model: nn.Module, example: Batch, stream: Stream, head: bool) -> list[Edit]:
        """Fuse the norms and make room for the shortcuts, neither of which may change what the model says."""
        short = few(example)
        last = len(stream.segments) - 1
        with torch.no_grad(), calm(model):
            said = logits_of(short.through(model)).double()
            edits = apply_(model, fuse(model, stream))
            edits += apply_(model, add_shortcuts(model, stream, None if self.basis.own else () if head else (last,)))
            off = float((logits_of(short.through(model)).double() - said).norm() / said.norm().clamp(min=1e-30))
        if not off < (1e-3 if next(model.parameters()).dtype in (torch.float32, torch.float64) else 0.1):
            raise GraphError(
                f"the norms of {type(model).__name__} were to be fused",
                f"its answers changed by {off:.2g} of their size, so that it does something with its stream unseen",
                "Use a plain pre-norm decoder, or another method.",
            )
        return edits


def _moments(block: Block, segment: Segment, batches: Sequence[Batch]) -> tuple[Tensor, int]:
    """Second moments of a segment written in a block: from before the norm in it, or from what flows out of it."""
    inside = not block.name or segment.norms[0].startswith(block.name + ".")

    def add() -> Evidence:
        flows = block.watch(segment.norms[0]) if inside else block.outputs()
        moments, tokens = second_moments(flows, _masks(batches))
        return Evidence(tokens, {"moments": moments})

    seen = summed(segment.norms[0], add)
    _refuse_infinite(seen.sums["moments"], segment.norms[0])
    return seen.sums["moments"].cpu(), seen.count


@torch.no_grad()
def pooled_moments(model: nn.Module, stream: Stream, batches: Sequence[Batch]) -> tuple[Tensor, int]:
    """Second moments [width, width] of the stream as it is, each segment but the last brought to a trace of 1; tokens.

    The last is left out because it usually stays whole.
    """
    found: dict[str, tuple[Tensor, int]] = {}
    caught: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: caught.update({name: args[0]})

    names = [segment.norms[0] for segment in stream.segments[:-1]]
    hooks = [model.get_submodule(name).register_forward_pre_hook(note(name)) for name in names]
    try:
        with calm(model):
            for batch, mask in zip(batches, _masks(batches), strict=True):
                batch.through(model)
                for name, flow in caught.items():
                    more, tokens = second_moments([flow], [mask])
                    before, count = found.get(name, (torch.zeros((), dtype=torch.float64), 0))
                    found[name] = (before + more, count + tokens)
    finally:
        for handle in hooks:
            handle.remove()
    every = merged({name: Evidence(tokens, {"moments": moments}) for name, (moments, tokens) in found.items()})
    for name, seen in every.items():
        _refuse_infinite(seen.sums["moments"], name)
    total = torch.stack([seen.sums["moments"] / seen.sums["moments"].trace() for seen in every.values()]).sum(0)
    return total.cpu(), max(seen.count for seen in every.values())


def _masks(batches: Sequence[Batch]) -> list[Tensor | None]:
    return [b.inputs.get("attention_mask") if isinstance(b.inputs, Mapping) else None for b in batches]


def _refuse_infinite(moments: Tensor, norm: str) -> None:
    if not bool(torch.isfinite(moments).all()):
        raise EvidenceError(
            f"the stream was measured before {norm}",
            "it holds NaN or infinity",
            "Half precision often overflows here: use bfloat16 or float32.",
        )
