"""ShortGPT: a block that hardly turns the hidden state is hardly there; whole blocks go.

Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen. "ShortGPT: Layers in Large Language Models are More Redundant Than You
Expect." 2024. arXiv:2403.03853, section 2, block influence, with x[l] the hidden state that flows into block l:

    BI[l] = 1 - mean over tokens of cos(x[l], x[l+1])

and, for a run of n blocks at once (Gromov, Tirumala, Shapourian, Glorioso, Roberts. "The Unreasonable Ineffectiveness
of the Deeper Layers." 2024. arXiv:2403.17887, section 3), on the last token of each sequence:

    d[l] = arccos(cos(x[l], x[l+n])) / pi
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import kept_of
from secateur.axes.influence import Angle, Turn
from secateur.cut import layers, passing
from secateur.distributed import present, shared
from secateur.edit import Edit, Mask, Replace, apply_
from secateur.errors import EvidenceError, GraphError, SettingError
from secateur.evidence import Evidence, summed
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Batch, Task
from secateur.walk import Block, look


def angular_distance(a: Tensor, b: Tensor) -> float:
    """Mean angle between rows [samples, width], as a share of half a turn: in [0, 1]."""
    return float(Angle().apart(a, b).mean())


@dataclass(frozen=True, eq=False)
class Seen:
    """What was measured of a stack of blocks."""

    influence: tuple[float, ...]  # of each block: 1 - the mean cosine of what flows in and out
    last: tuple[Tensor, ...]  # what flows into each block, and out of the last, at the last token [samples, width]


class Choice(Protocol):
    """Which blocks go."""

    def gone(self, seen: Seen, count: int) -> list[int]:
        """The numbers of `count` blocks, the first to go first."""
        ...

    def describe(self, seen: Seen, gone: Sequence[int]) -> str:
        """What it went by, in a line."""
        ...


@dataclass(frozen=True)
class LeastInfluence:
    """The blocks of lowest influence, all at once, wherever they are."""

    def gone(self, seen: Seen, count: int) -> list[int]:
        """See Choice; of equals the later goes first, for the earlier feeds more blocks."""
        return sorted(range(len(seen.influence)), key=lambda i: (seen.influence[i], -i))[:count]

    def describe(self, seen: Seen, gone: Sequence[int]) -> str:
        """See Choice."""
        return "block influence: " + ", ".join(f"{i} {value:.4f}" for i, value in enumerate(seen.influence))


@dataclass(frozen=True)
class ClosestRun:
    """The run of blocks that together turn the last token's hidden state least."""

    def gone(self, seen: Seen, count: int) -> list[int]:
        """See Choice; of equal runs the first."""
        if not count:
            return []
        start = min(range(len(seen.influence) - count + 1), key=lambda i: _turn(seen, i, count))
        return list(range(start, start + count))

    def describe(self, seen: Seen, gone: Sequence[int]) -> str:
        """See Choice."""
        count = len(gone)
        turns = (f"{i} {_turn(seen, i, count):.4f}" for i in range(len(seen.influence) - count + 1))
        return f"angular distance over {count} block{'s' if count > 1 else ''} from: " + ", ".join(turns)


def _turn(seen: Seen, start: int, count: int) -> float:
    return angular_distance(seen.last[start], seen.last[start + count])


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Method):
    """Take out the blocks that change the hidden state least, all at once. Forward passes only, no retraining."""

    sparsity: float = 0.25  # fraction of the blocks taken out, in [0, 1)
    samples: int = 32  # calibration sequences
    choice: Choice = LeastInfluence()  # closest-run takes neighbours, by the angle over all of them (Gromov et al.)

    card: ClassVar = Card(
        0,
        "ShortGPT: layers in large language models are more redundant than you expect",
        arxiv="2403.03853",
        year=2024,
        granularity=("layer",),
        needs=("calibration",),
        families=("decoder", "encoder", "vision transformer", "moe"),
        axes="criterion allocation",
        criterion=("similarity",),
        tasks=("language modelling",),
        allocation=("score-driven",),
        reports="LLaMA-2-7B without 9 of its 32 blocks: MMLU 45.4 to 44.0.",
        checked="tests/methods/test_shortgpt.py::test_block_influence_by_hand",
        differs=("Cosines are of each token with itself, row by row; the authors' code forms every pair first.",),
    )
    tiny: ClassVar = {"sparsity": 0.5, "samples": 8}

    def budget(self) -> Budget:
        """A fraction of the blocks."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """See Method."""
        super().check()
        if self.samples < 1:
            raise SettingError(f"samples={self.samples} was given", "blocks are compared on data", "Give 32.")

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        site = only_stack(model)
        count = site.units - kept_of(site.units, self.sparsity)
        seen, outputs = measured(model, site, list(task.batches("calibration", self.samples)))
        gone = self.choice.gone(seen, count)
        if not gone:
            notes = [f"{self.sparsity:g} of {site.units} blocks is less than one: nothing was taken out"]
            return Outcome(model, notes=notes)
        keep = torch.ones(site.units, dtype=torch.bool)
        keep[gone] = False
        edits: list[Edit] = [Mask(site, keep)]
        for name in sorted(names_of(site)[i] for i in gone):
            edits.append(Replace(name, passing(model.get_submodule(name), outputs)))
        edits = apply_(model, edits)
        notes = [f"blocks taken out, the first to go first: {', '.join(map(str, gone))}"]
        return Outcome(model, edits, notes=[*notes, self.choice.describe(seen, gone)])


def only_stack(model: nn.Module) -> Site:
    """The one stack of blocks of a model, a unit each. Raises GraphError when there is none, or more than one."""
    found = layers(model)
    if len(found) != 1 or found[0].units < 2:
        said = ", ".join(f"{site.name} of {site.units}" for site in found) or "none"
        raise GraphError(
            f"blocks of {type(model).__name__} were to be taken out",
            f"it has not one stack of them ({said})",
            "Use a model with one list of two or more like blocks, or another method.",
        )
    return found[0]


def names_of(site: Site) -> list[str]:
    """The dotted names of a stack's blocks, in order."""
    found: dict[int, str] = {}
    for part in site.parts:
        assert part.owner is not None
        found[int(part.owner.reshape(-1)[0])] = ".".join(part.name.split(".")[: site.name.count(".") + 2])
    return [found[unit] for unit in range(site.units)]


@torch.no_grad()
def measured(model: nn.Module, site: Site, batches: Sequence[Batch]) -> tuple[Seen, int]:
    """What the blocks of a stack do, each fed by whole ones before it; and in how many values a block answers.

    Raises GraphError for blocks that do not hand on a hidden state of one shape, EvidenceError where there is no data
    or it is not finite.
    """
    if not batches:
        raise EvidenceError("blocks were to be compared", "there are no calibration samples", "Give calibration data.")
    names = names_of(site)
    influence: list[float] = []
    last: list[list[Tensor]] = []  # by block, then by batch
    with answers(model, names[0]) as outputs:
        for block in look(model, batches):
            if block.name not in names:
                continue
            ends: list[Tensor] = []
            after: list[Tensor] = []

            def add(block: Block = block, ends: list[Tensor] = ends, after: list[Tensor] = after) -> Evidence:
                turned, tokens = 0.0, 0
                for into, out in zip(block.inputs, block.outputs(), strict=True):
                    if into.shape != out.shape:
                        raise GraphError(
                            f"{block.name} was to be compared with what it is given",
                            f"{list(into.shape)} goes in and {list(out.shape)} comes out",
                            "Use a model whose blocks hand on a hidden state of one shape.",
                        )
                    found = Turn().apart(into.reshape(-1, into.shape[-1]), out.reshape(-1, out.shape[-1]))
                    turned, tokens = turned + float(found.sum()), tokens + len(found)
                    ends.append(_last(into))
                    after.append(_last(out))
                return Evidence(tokens, {"turn": torch.tensor(turned, dtype=torch.float64)})

            influence.append(float(summed(block.name, add).mean("turn")))
            last.append(ends)
            if len(influence) == len(names):
                last.append(after)
    if len(influence) != len(names):
        raise GraphError(
            f"the {len(names)} blocks of {site.name} were to be compared",
            f"{len(influence)} of them run once in a forward pass",
            "Use a model that runs its blocks one after another.",
        )
    wrong = next((name for name, value in zip(names, influence, strict=True) if value != value), None)
    if wrong is not None:
        raise EvidenceError(
            f"{wrong} was compared with what it is given",
            "the hidden states hold NaN or infinity",
            "Half precision often overflows here: use bfloat16 or float32.",
        )
    return Seen(tuple(influence), _together(last)), outputs[0]


def _together(last: Sequence[Sequence[Tensor]]) -> tuple[Tensor, ...]:
    """Rows of each block's batches, by block, under one another; of all processes that calibrate together."""
    ours, batches = present(), len(last[0])
    mine = {
        ours.rank + place * ours.count: ({str(i): rows[place] for i, rows in enumerate(last)}, None)
        for place in range(batches)
    }
    held = shared(mine, summed("batches", lambda: Evidence(batches)).count)
    return tuple(torch.cat([each[str(i)] for each, _ in held]) for i in range(len(last)))


def _last(x: Tensor) -> Tensor:
    """The last position of each sequence [samples, width]."""
    return x[:, -1].double() if x.dim() == 3 else x.double()


@contextmanager
def answers(model: nn.Module, name: str) -> Iterator[list[int]]:
    """In how many values a block answers each time it is called meanwhile; 0 for a bare tensor."""
    found: list[int] = []

    def note(_: nn.Module, __: object, out: object) -> None:
        found.append(len(out) if isinstance(out, (tuple, list)) else 0)

    hook = model.get_submodule(name).register_forward_hook(note)
    try:
        yield found
    finally:
        hook.remove()
