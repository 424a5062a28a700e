"""GBLM: a weight matters if it is large, and what flows into it is loud or the loss is steep along it.

Das, Sun, Ma, Shen. "Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models." 2023.
arXiv:2311.04902, section 3: S = |W| (||X|| + alpha ||G||), compared within each output row. The score is
secateur.axes.Gblm, and without activations secateur.axes.Gradient.
"""

from dataclasses import dataclass, field
from statistics import median
from typing import ClassVar

from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Gblm, Pattern, PerRow, Rank, Uniform
from secateur.axes.criteria import gradient_norm, measured, wanda_score
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import gradients, spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.evidence import Evidence
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, Tensors
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True)
class InverseGradient:
    """The paper's ablation in which steep weights go first: S = |W| ||X|| / Gamma, with the l2 norm."""

    needs: ClassVar[frozenset[str]] = frozenset({"input_square", "grad_square"})

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """One score per weight [out, in, ...]."""
        steepness = gradient_norm(site, seen, 2)
        weight = site.parts[0].read(tensors).double()
        return wanda_score(weight, measured(site, seen, "input_square")) / (100 * steepness + 1e-8)


@dataclass(frozen=True, eq=False)
class _Told:
    """A mix that notes the alpha of each site: it belongs to the calibration set, and no setting says it."""

    mix: Gblm
    alphas: list[float] = field(default_factory=list)

    @property
    def needs(self) -> frozenset[str]:
        """See Criterion."""
        return self.mix.needs

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """See Criterion."""
        terms = self.mix.terms(site, seen)
        self.alphas.append(self.mix.weight(*terms))
        return self.mix.mixed(site, tensors, *terms, self.alphas[-1])

    def notes(self) -> list[str]:
        """The alphas, where they were set at each site."""
        if not self.alphas:
            return []
        low, high = min(self.alphas), max(self.alphas)
        return [
            f"alpha was set at each of {len(self.alphas)} sites: {low:.4g} to {high:.4g}, in the middle "
            f"{median(self.alphas):.4g}; it belongs to this number and length of sequences"
        ]


@dataclass(frozen=True, kw_only=True)
class GBLMPruner(Method):
    """Take the gradients of the dense model, one sequence at a time, then score block after block as Wanda does."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    samples: int = 128  # calibration sequences, as in the paper
    criterion: Criterion = Gblm()  # gradient and inverse-gradient are the paper's ablations
    pattern: Pattern = PerRow()  # n:m gives the paper's N:M results
    allocation: Allocation = Uniform()
    feed: Feed = "pruned"  # inputs come from the blocks pruned before; gradients always from the dense model
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        29,
        "Beyond size: how gradients shape pruning decisions in large language models",
        arxiv="2311.04902",
        year=2023,
        needs=("calibration",),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="criterion pattern allocation",
        criterion=("activation", "first-order"),
        tasks=("language modelling",),
        reports="LLaMA-2-7B, WikiText-2 perplexity at 50 %: 6.86, which is 0.05 to 0.1 below Wanda's.",
        checked="tests/methods/test_gblm.py::test_scores_equal_the_plain_formulas",
        differs=(
            "Unless alpha is given, it is set at each site so that the gradients' mean term is a fixed share (mix) of "
            "the inputs': their units depend on the number and the length of the sequences.",
            "Gradients are summed in float64, where the code's float16 sums overflow at 65,504.",
            "The model is in evaluation mode while gradients are taken, where the code has dropout on.",
        ),
    )
    tiny: ClassVar = {"samples": 4}

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises EvidenceError, naming the layer, where no gradient comes back."""
        sites, told = weights(model, self.include, self.exclude), None
        if isinstance(self.criterion, Gblm) and self.criterion.alpha is None:
            told = _Told(self.criterion)
        solver = Rank(told or self.criterion, self.pattern)
        batches = list(task.batches("calibration", self.samples))
        whole = gradients(model, sites, batches, solver.needs, task.loss)
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(
            model, sites, allocation, Budget(self.sparsity), self.criterion, batches, whole, task, pattern=self.pattern
        )
        edits = sweep(model, sites, solver, keep, batches, self.feed, whole)
        return Outcome(model, edits, notes=notes + (told.notes() if told else []))
