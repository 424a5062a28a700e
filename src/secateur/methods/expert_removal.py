"""Experts taken out whole by a score of each: by how often they are used, by their router's row, at random.

No paper: what merging and clustering experts must beat. By use it is what Chen, Huang, Xie, Jiao, Jiang, Zhou, Li, Wei
("Task-Specific Expert Pruning for Sparse Mixture-of-Experts." 2022. arXiv:2206.00277) start from.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from secateur.axes import Criterion, keep_top, kept_of
from secateur.edit import Edit, Remove, apply_
from secateur.errors import SettingError
from secateur.evidence import Evidence
from secateur.graph.experts import ROUTED, check_left, mixtures, routing
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Task


@dataclass(frozen=True)
class Usage:
    """An expert matters if many tokens are sent to it."""

    needs: ClassVar[frozenset[str]] = frozenset({"routed"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """The share of the tokens that each expert saw [experts]."""
        return seen.mean("routed")


@dataclass(frozen=True)
class RouterNorm:
    """An expert matters if the row of the router that calls it is long."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """The norm of each expert's row of the router [experts]."""
        rows = next(part for part in site.parts if len(part.shape) == 2 and part.name.endswith(".weight"))
        return rows.read(tensors).detach().double().norm(dim=1)


@dataclass(frozen=True, kw_only=True)
class ExpertRemoval(Method):
    """Keep the same number of experts in each layer, those of the best score, and slice the router."""

    sparsity: float = 0.5  # fraction of each layer's experts taken out, in [0, 1)
    samples: int = 128  # calibration sequences of the task
    criterion: Criterion = Usage()  # router-norm, random and magnitude look at no data

    card: ClassVar = Card(
        0,
        "Experts taken out by a score",
        arxiv="2206.00277",
        year=2022,
        granularity=("expert",),
        needs=("calibration",),
        families=("moe",),
        axes="criterion",
        criterion=("activation", "norm", "random"),
        tasks=("language modelling",),
        allocation=("uniform",),
        transfer=("target task",),
        checked="tests/methods/test_expert_removal.py::test_the_least_used_experts_go_with_their_rows",
        differs=("One shot, on routing counts; the paper takes experts out step by step while it fine-tunes.",),
    )
    tiny: ClassVar = {"samples": 8}

    def budget(self) -> Budget:
        """A fraction of the experts."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """See Method."""
        super().check()
        if more := self.criterion.needs - ROUTED:
            raise SettingError(
                f"experts were to be scored by {type(self.criterion).__name__}",
                f"it reads {', '.join(sorted(more))}, which is measured of single matrices",
                "Take usage, router-norm, magnitude or random.",
            )

    def sites_in(self, model: nn.Module) -> list[Site]:
        """The experts of each layer, for plans."""
        return [layer.site for layer in mixtures(model)]

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        layers = mixtures(model)
        for layer in layers:
            check_left(layer, kept_of(layer.site.units, self.sparsity))
        seen: dict[str, Evidence] = {}
        if self.criterion.needs:
            seen = routing(model, layers, task.batches("calibration", self.samples))
        named, edits, notes = tensors(model), list[Edit](), list[str]()
        for layer in layers:
            site = layer.site
            score = self.criterion.score(site, named, seen.get(site.name, Evidence())).cpu()
            keep = keep_top(score, kept_of(site.units, self.sparsity))
            if not bool(keep.all()):
                edits.append(Remove(site, keep))
        if not edits:
            notes.append(f"{self.sparsity:g} of {layers[0].site.units} experts is less than one: none was taken out")
        return Outcome(model, apply_(model, edits), notes=notes)
