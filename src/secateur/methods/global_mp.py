"""One threshold for the whole network, and a few weights that every layer may keep.

Gupta et al. "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning."
2022. arXiv:2209.14624. All weights are ranked together by magnitude and the smallest go; at extreme sparsity
that empties whole layers and with them the network, so each layer keeps a minimum (MT, minimum threshold). One-shot,
or along a ramp, which spreads the cut more evenly over early layers; then fine-tuning with the mask held.

Differs: the paper's code reads per-layer sparsities off the global mask, caps and rescales them until they fit; here
the minimum of each layer is kept first and the globally smallest of the rest are removed, until exactly as many are
gone as asked.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Global, Magnitude, PerMatrix
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.axes.schedules import Curve, Power, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, apply_
from secateur.errors import SettingError
from secateur.evidence import Evidence, observe
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Batch, Task, modes_of, restore_modes_
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class GlobalMagnitude(Method):
    """Drop the smallest weights wherever they are, sparing a few in every layer, and fine-tune."""

    sparsity: float = 0.9  # of all prunable weights together
    floor: float = 0.0005  # each layer keeps at least this fraction of ALL prunable weights (MT: 0.05 %); 0: none
    until: float = 0.0  # fraction of the fine-tuning over which the sparsity rises; 0 is one-shot
    curve: Curve = Power(3.0)  # how it rises
    every: int = 50  # optimizer steps between updates of the masks
    steps: int = 500  # of fine-tuning, with the mask held
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        22,
        "Is Complexity Required for Neural Network Pruning? A Case Study on Global Magnitude Pruning",
        arxiv="2209.14624",
        year=2022,
        when="after training",
        needs=("labels", "training"),
        axes="criterion allocation schedule rule",
        criterion=("magnitude",),
        tasks=("classification",),
        schedule=("one-shot", "cubic"),
        allocation=("score-driven",),
        reports="one global threshold is ahead of elaborate allocations, and a minimum per layer prevents collapse",
        checked="tests/methods/test_global_mp.py::test_a_floor_restores_a_network_that_collapsed",
        differs=(
            "exactly as many weights are removed as asked: the paper's code keeps the threshold's own, and its "
            "minimum is capped and rescaled in a loop that need not end",
            "on a ramp a weight once masked is gone",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.7, "steps": 20, "every": 5}

    @property
    def allocation(self) -> Allocation:
        """The budget's way over the layers."""
        return Global(floor=self.floor)

    def schedule(self) -> Schedule:
        """The ramp of the gradual form."""
        return Schedule(end=self.sparsity, until=self.until, curve=self.curve, every=self.every)

    def check(self) -> None:
        """Raise SettingError for a ramp or a floor that cannot be."""
        self.schedule().check_sparsity()
        if not 0 <= self.floor < 1:
            raise SettingError(
                f"a floor of {self.floor:g} was asked for",
                "it is a fraction of all weights, in [0, 1)",
                "Give 0.0005 for the paper's 0.05 %.",
            )
        if self.steps < 0 or (self.until > 0 and self.steps < 1):
            raise SettingError(
                f"{self.steps} steps of fine-tuning were asked for",
                "a ramp needs some to happen in",
                "Give steps above 0, or until=0 for one-shot.",
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Choose at once, or along the ramp; fine-tune what stays."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        # At once for the one-shot form; for the ramp, to refuse floors it could not keep before any data is read.
        masks = masks_of(sites, magnitudes(model, sites), self.allocation, self.sparsity)
        decline = LearningRate(floor=self.rate_floor)
        edits: list[Edit]
        if self.until == 0:
            edits = apply_(model, masks)
            history = fit(model, task, self.steps, [decline, Hold.of(edits)])
        else:
            ramp = Gradual(sites, self.schedule(), allocation=self.allocation, holder=Hold(sites))
            history = fit(model, task, self.steps, [decline, ramp])
            masks = ramp.masks()
            edits = apply_(model, masks)
        empty = [mask.site.name for mask in masks if mask.kept == 0]
        notes = []
        if (flops := flop_sparsity(model, masks, task.example)) is not None:
            notes.append(f"{flops:.2%} of the pruned layers' multiply-adds are with zeros")
        if empty:
            notes.append(f"collapsed: nothing is left of {', '.join(empty)}; a floor prevents that")
        return Outcome(model, edits, history, notes=notes + history.notes)


def magnitudes(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """|w| of every unit of every site."""
    return scores_of(model, sites, Magnitude(), {})


def scores_of(
    model: nn.Module, sites: Sequence[Site], criterion: Criterion, seen: Mapping[str, Evidence]
) -> dict[str, Tensor]:
    """A criterion's scores of every site."""
    named = tensors(model)
    return {site.name: criterion.score(site, named, seen.get(site.name, Evidence())) for site in sites}


def masks_of(
    sites: Sequence[Site], scores: Mapping[str, Tensor], allocation: Allocation, sparsity: float
) -> list[Mask]:
    """The best of each site, as many as an allocation says."""
    counts = allocation.spread(sites, Budget(sparsity), scores)
    return [Mask(site, PerMatrix().select(scores[site.name], counts[site.name])) for site in sites]


@dataclass(frozen=True)
class Taylor:
    """A weight matters if the loss would change without it, to first order: |w * dL/dw|.

    Molchanov et al. 2019, arXiv 1906.10771, equation 8, for single weights; SNIP's score on a trained network.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"grad"})

    def score(self, site: Site, tensors: Mapping[str, Tensor], seen: Evidence) -> Tensor:
        """|w * the summed gradient|."""
        part = site.parts[0]
        return (part.read(tensors).detach() * seen.sums["grad"].to(part.read(tensors).dtype)).abs()


def taylor_scores(model: nn.Module, sites: Sequence[Site], task: Task, samples: int) -> dict[str, Tensor]:
    """First-order Taylor scores on calibration examples: the rival that looks at data."""
    seen = observe(model, sites, task.batches("calibration", samples), Taylor.needs, task.loss)
    return scores_of(model, sites, Taylor(), seen)


def flop_sparsity(model: nn.Module, masks: Sequence[Mask], example: Batch) -> float | None:
    """The fraction of the multiply-adds of masked layers that are with zeros, one forward pass over an example.

    A weight of a convolution is used at every output position, of a transposed one at every input position; one of a
    linear layer, for every token; one of a recurrent layer, at every step. None where a weight is used in a way that is
    not seen, such as a stack of experts.
    """
    seen: dict[str, tuple[int, int | None]] = {}  # module -> numbers in its outputs, and how many are one position's

    def count(name: str) -> Any:
        def hook(module: nn.Module, given: Any, out: Any) -> None:
            recurrent = isinstance(module, nn.RNNBase)
            value = out[0] if recurrent else out
            if isinstance(module, nn.modules.conv._ConvTransposeNd):  # stored inputs first, and used at every input
                value = given[0]
            if isinstance(value, Tensor):
                seen[name] = (seen.get(name, (0, None))[0] + value.numel(), value.shape[-1] if recurrent else None)

        return hook

    hooks = [module.register_forward_hook(count(name)) for name, module in model.named_modules()]
    modes = modes_of(model)
    model.eval()
    try:
        with torch.no_grad():
            example.through(model)
    finally:
        restore_modes_(model, modes)
        for hook in hooks:
            hook.remove()
    total = gone = 0.0
    for mask in masks:
        part = mask.site.parts[0]
        module = part.module
        if module not in seen or part.index is not None:
            return None
        outputs, width = seen[module]
        uses = outputs / (width or part.shape[0])
        total += uses * mask.site.units
        gone += uses * (mask.site.units - mask.kept)
    return gone / total if total else 0.0
