"""Structurally prune anything: any network, by any criterion, before training, after it, or without any.

Wang, Rong, Cao, Cai, Xu, Gu. "Structurally Prune Anything: Any Architecture, Any Framework, Any Time." 2024.
arXiv:2403.18955. Section 3.2 finds which channels are coupled (secateur.graph), 3.3 scores them together, and 3.4,
OBSPA, lets what stays make up for what goes, on real data, other data or noise:

    W_R <- W_R - W_P ([H^-1]_PP)^-1 [H^-1]_PR,   H = X X^T + damp mean(diag(X X^T)) I
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Global, Magnitude, Scores, keep_top
from secateur.axes.budgets import Terms, terms
from secateur.axes.groups import ByMean, JointObs, Normal, check_damp, grouped_scores, member, mend, readers
from secateur.axes.probes import Probe
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.taylor import Combine, Total
from secateur.edit import Edit, Mask, apply_
from secateur.errors import SettingError, did_you_mean
from secateur.evidence import observe
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Kind, Site, tensors
from secateur.task import Batch, Task, generator
from secateur.train import History, fit

KINDS: tuple[Kind, ...] = ("channel", "head", "stream")


class Inputs(Protocol):
    """What is sent through the network to see what reaches its layers."""

    def batches(self, task: Task, samples: int) -> list[Batch]:
        """So many examples."""
        ...


@dataclass(frozen=True)
class Calibration:
    """The task's calibration examples: its own, or those of other data where it was given some."""

    def batches(self, task: Task, samples: int) -> list[Batch]:
        """See Inputs."""
        return list(some(task, samples))


@dataclass(frozen=True)
class Noise:
    """No data: normal noise, or any token, in the shapes of the task's example."""

    batch: int = 64  # examples that go through together

    def __post_init__(self) -> None:
        if self.batch < 1:
            raise SettingError(
                f"noise in batches of {self.batch} was asked for", "one example is the least", "Give 64."
            )

    def batches(self, task: Task, samples: int) -> list[Batch]:
        """See Inputs."""
        return _made(task, samples, self.batch, torch.randn)


@dataclass(frozen=True)
class UniformNoise(Noise):
    """No data: numbers in [0, 1), each as likely as any other, or any token, in the shapes of the task's example."""

    def batches(self, task: Task, samples: int) -> list[Batch]:
        """See Inputs."""
        return _made(task, samples, self.batch, torch.rand)


def _made(task: Task, samples: int, batch: int, numbers: Callable[..., Tensor]) -> list[Batch]:
    draw, example, found = generator(task, "noise"), task.example, []
    for start in range(0, samples, batch):
        rows = min(batch, samples - start)
        found.append(Batch(_like(example.inputs, example.size, rows, draw, numbers)))
    return found


def _like(value: Any, size: int, rows: int, draw: torch.Generator, numbers: Callable[..., Tensor]) -> Any:
    if isinstance(value, dict):
        return {k: _like(v, size, rows, draw, numbers) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_like(v, size, rows, draw, numbers) for v in value)
    if not isinstance(value, Tensor) or not value.dim() or len(value) != size:
        return value
    if value.is_floating_point():
        return numbers(rows, *value.shape[1:], generator=draw).to(value.dtype)
    return value[
        torch.randint(0, size, (rows,), generator=draw)
    ].flatten()[  # tokens that the example has
        torch.randint(0, value[:1].numel() * rows, (rows, *value.shape[1:]), generator=draw)
    ]


class Norms(Protocol):
    """What becomes of the running statistics of batch norms."""

    def settle_(self, model: nn.Module, batches: Sequence[Batch]) -> list[Edit]:
        """Change them, once the network is cut."""
        ...


@dataclass(frozen=True)
class AsTrained:
    """They stay as training left them."""

    def settle_(self, model: nn.Module, batches: Sequence[Batch]) -> list[Edit]:
        """See Norms."""
        return []


@dataclass(frozen=True)
class Anew:
    """They are taken anew, over what is sent through the network."""

    def settle_(self, model: nn.Module, batches: Sequence[Batch]) -> list[Edit]:
        """See Norms."""
        return recalibrate_(model, batches)


@dataclass(frozen=True)
class Mend:
    """What reads the units that go is solved anew for those that stay, block after block (OBSPA)."""

    damp: float = 0.01  # added to the diagonal of the gram, as a share of its mean

    def __post_init__(self) -> None:
        check_damp(self.damp)

    def edits(
        self, model: nn.Module, sites: Sequence[Site], keep: dict[str, Tensor], batches: Sequence[Batch]
    ) -> list[Edit]:
        """Change the network site after site, each seen with those before it changed; masks and new values."""
        found: list[Edit] = []
        done: list[tuple[Site, Tensor]] = []
        for here in _in_turn(sites):
            members = {part.key: member(part) for site in here for part in readers(site)}
            seen = observe(model, list(members.values()), batches, {"gram"})
            for site in here:
                if not bool(keep[site.name].all()):
                    new = mend(site, keep[site.name], tensors(model), seen, self.damp, done)
                    found += apply_(model, [*new, Mask(site, keep[site.name])])
                    done.append((site, keep[site.name]))
        return found


def _in_turn(sites: Sequence[Site]) -> list[list[Site]]:
    """Sites of one block together, others one by one, in order."""
    found: list[list[Site]] = []
    for site in sites:
        if found and site.block and found[-1][0].block == site.block:
            found[-1].append(site)
        else:
            found.append([site])
    return found


@dataclass(frozen=True, kw_only=True)
class Spa(Method):
    """Take the coupled channels and heads of lowest score out of any network, wherever they are.

    Before training: criterion=snip, say, and steps. After it: steps to fine-tune, or repair=mend and criterion=
    joint-obs to do without, with data=noise where there is none.
    """

    sparsity: float = 0.3  # fraction of what `of` says that is taken out, in [0, 1)
    of: str = "weights"  # what sparsity is of: weights or units of what is cut; all parameters, flops, bytes, latency
    criterion: Criterion | Probe = Magnitude()  # what makes a weight worth keeping: joint-obs for OBSPA
    combine: Combine = Total()  # what becomes of a unit's shares of several tensors
    normal: Normal = ByMean()  # how the scores of sites are made comparable
    allocation: Allocation = Global()  # how the budget is spent over the sites
    kinds: tuple[str, ...] = ("channel", "head")  # what is taken out: channel, head, stream
    samples: int = 256  # examples that are sent through the network, where any are
    data: Calibration | Noise | UniformNoise = Calibration()  # which: the task's, noise, or uniform-noise
    repair: Mend | None = None  # what makes up for what goes: mend (OBSPA), or nothing
    norms: AsTrained | Anew = AsTrained()  # statistics of batch norms: as-trained, or anew over the same examples
    steps: int = 0  # of training, once cut
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        34,
        "Structurally prune anything: any architecture, any framework, any time",
        arxiv="2403.18955",
        year=2024,
        granularity=("channel", "head", "stream"),
        needs=("calibration",),
        families=("mlp", "cnn", "rnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="criterion allocation solver",
        criterion=("norm", "first-order", "second-order"),
        gradients=("none", "first", "second"),
        choice=("data-free", "data-driven"),
        tasks=("classification", "language modelling"),
        updates=("none", "solved"),
        reports="Without fine-tuning or data, ahead of DFPC on ResNet-50 and VGG-19; DistilBERT and ViT pruned too.",
        checked="tests/methods/test_spa.py::test_a_channel_that_two_others_make_up_for_costs_nothing",
        differs=(
            "Positions with union-find instead of masks sent through the graph one channel at a time: the same sets.",
            "ONNX graphs are read as modules, so that one rule table serves torch and ONNX.",
            "A unit of several columns is scored by their joint block of the inverse, not by each column alone.",
            "Exactly as many units go as meet the budget; scores that are equal go in order.",
        ),
    )
    tiny: ClassVar = {"samples": 8}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation is asked for whatever fraction of the units that takes."""
        return terms(self)

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(
                f"kinds {list(self.kinds)} were asked for",
                "what can be taken out is a channel, a head or the stream",
                did_you_mean(unknown[0] if unknown else "", KINDS),
            )
        if self.samples < 1 or self.steps < 0:
            raise SettingError(
                f"samples={self.samples} and steps={self.steps} were given",
                "samples are 1 at least, steps 0",
                "Take the defaults: 256 and 0.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = coupling.need(*(kind for kind in KINDS if kind in self.kinds))
        sites = self.terms.free(model, found)
        sends = self.repair is not None or isinstance(self.norms, Anew)
        batches = self.data.batches(task, self.samples) if sends or self.reads else []
        scores = self._scores(model, sites, batches, task)

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity), scores)

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        keep = {site.name: keep_top(scores[site.name], met.counts[site.name]) for site in sites}
        edits = [] if self.repair is None else self.repair.edits(model, sites, keep, batches)
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        edits += [Mask(site, keep[site.name]) for site in sites if bool(keep[site.name].all())]
        edits += apply_(model, removals(sites, keep))
        edits += self.norms.settle_(model, batches)
        history: History | None = fit(model, task, self.steps) if self.steps else None
        notes = [str(frozen) for frozen in coupling.frozen]
        notes += [*self.terms.left_alone(found), *met.notes]
        units, gone = sum(site.units for site in sites), sum(site.units - met.counts[site.name] for site in sites)
        notes.append(f"{gone:,} of {units:,} units taken out of {len(sites)} sites")
        return Outcome(model, list(edits), history, notes=notes)

    @property
    def reads(self) -> bool:
        """Whether the criterion looks at data that is sent through the network here; a probe takes its own."""
        return not isinstance(self.criterion, Probe) and bool(self.criterion.needs)

    def scores_in(self, model: nn.Module, sites: Sequence[Site], task: Task, samples: int) -> Scores:
        """One score per unit of each site, by so many examples where the criterion reads any: `plan` reads them too."""
        batches = self.data.batches(task, samples) if self.reads else []
        return self._scores(model, sites, batches, task)

    def _scores(self, model: nn.Module, sites: Sequence[Site], batches: Sequence[Batch], task: Task) -> Scores:
        return grouped_scores(model, sites, self.criterion, self.combine, self.normal, batches, task, self.sparsity)


__all__ = ["Anew", "AsTrained", "Calibration", "JointObs", "Mend", "Noise", "Spa", "UniformNoise"]
