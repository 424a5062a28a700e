"""LLM-Pruner: a head or neuron goes, with all that depends on it, where the loss would hardly notice.

Ma, Fang, Wang. "LLM-Pruner: On the Structural Pruning of Large Language Models." NeurIPS 2023. arXiv:2305.11627,
section 3.1 (groups by dependency) and 3.2 (Taylor scores). With g = dL/dw on a few calibration samples, F the mean of
the squared gradients of single samples, and sums over what a unit owns:

    vectorize |sum w g|     first sum |w g|     second sum |w^2 F|     mix sum |w g - w^2 F / 2|
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes import Scores, keep_top
from secateur.axes.budgets import Terms, terms
from secateur.axes.spending import per_block, total_cost
from secateur.axes.taylor import Combine, First, Taylor, Total, gradients, group_scores
from secateur.edit import Mask, apply_
from secateur.errors import BudgetError, SettingError
from secateur.graph import couple, removals
from secateur.graph.inner import inner
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task


@dataclass(frozen=True)
class Middle:
    """The same fraction of every block but the first and last ones, so that the whole meets its budget."""

    spare_first: int = 4
    spare_last: int = 2
    least: int = 1

    needs_scores: ClassVar = False

    def spread(self, sites: Sequence[Site], budget: Budget, scores: Scores | None = None) -> dict[str, int]:
        """See Allocation. Raises SettingError when every block is spared."""
        blocks = list(dict.fromkeys(site.block for site in sites))
        middle = blocks[self.spare_first : len(blocks) - self.spare_last]
        chosen = [site for site in sites if site.block in middle]
        if not chosen:
            raise SettingError(
                f"{self.spare_first} blocks at the start and {self.spare_last} at the end were to be spared",
                f"there are {len(blocks)}",
                "Spare fewer: spare_first=0, spare_last=0.",
            )
        share = total_cost(chosen) / total_cost(sites)
        if budget.sparsity >= share:
            raise BudgetError(
                f"a sparsity of {budget.sparsity:g} was asked for",
                f"the {len(middle)} of {len(blocks)} blocks that are not spared hold {share:.3f} of the weights",
                f"Ask for less than {share:.3f}, or spare fewer.",
            )
        whole = {site.name: site.units for site in sites}
        return whole | per_block(chosen, budget.sparsity / share, least=self.least)


@dataclass(frozen=True, kw_only=True)
class LLMPruner(Method):
    """Take the same fraction of heads and neurons out of the blocks in the middle, by how the loss depends on them.

    A few samples and one backward pass. The paper then trains adapters, which is a method of its own here.
    """

    sparsity: float = 0.2  # fraction taken out, in [0, 1): of the weights of all blocks' heads and neurons, or of `of`
    of: str = "weights"  # what sparsity is of: units or weights of what is cut; all parameters, flops, bytes, latency
    samples: int = 10  # calibration sequences, as in the paper (of 64 tokens there)
    taylor: Taylor = First()  # vectorize, second and mix are the paper's others
    combine: Combine = Total()  # what becomes of a unit's shares of several tensors
    spare_first: int = 4  # blocks at the start that are left alone
    spare_last: int = 2  # blocks at the end that are left alone
    least: int = 1  # units that stay at each site
    round_to: int = 1  # widths that are left are multiples of this
    uniform: bool = False  # the same width for all sites of one kind and size, so that stock loaders take the result
    protect: tuple[str, ...] = ()  # sites or tensors left alone, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        0,
        "LLM-Pruner: on the structural pruning of large language models",
        arxiv="2305.11627",
        year=2023,
        granularity=("head", "channel"),
        needs=("calibration",),
        families=("decoder", "encoder", "vision transformer"),
        axes="criterion allocation",
        criterion=("first-order",),
        tasks=("language modelling",),
        allocation=("uniform",),
        reports="LLaMA-7B at 20 %, WikiText-2 perplexity: dense 12.62, about 19.1 untuned, 17.6 with adapters.",
        checked="tests/methods/test_llm_pruner.py::test_scores_by_hand",
        differs=(
            "The sparsity is of all blocks' heads and neurons, the spared ones' too, so that methods compare; the"
            " paper's is of the blocks in the middle.",
            "Heads are whole ones, key and value heads with their queries, and neurons make up for what that rounds.",
            "All four scores work for attention; in the authors' code three of them raise an error there.",
            "No adapters are trained afterwards.",
        ),
    )
    tiny: ClassVar = {"spare_first": 0, "spare_last": 1}

    def budget(self) -> Budget:
        """A fraction of the unit that was asked for."""
        return self.terms.budget

    @property
    def terms(self) -> Terms:
        """What is asked of the cut; the allocation spends weights."""
        return terms(self, "weights", self.least)

    def check(self) -> None:
        """See Method."""
        self.terms.check()
        if self.uniform and (self.spare_first or self.spare_last):
            raise SettingError(
                "the same width in every layer was asked for",
                f"the {self.spare_first} first and {self.spare_last} last blocks were to be spared",
                "Spare none: spare_first=0, spare_last=0.",
            )
        if min(self.spare_first, self.spare_last) < 0 or self.samples < 1 or self.least < 1:
            raise SettingError(
                f"spare_first={self.spare_first}, spare_last={self.spare_last}, samples={self.samples}, "
                f"least={self.least} were given",
                "blocks spared are counted from 0, samples and units left from 1",
                "Take the defaults: 4, 2, 10 and 1.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        coupling = couple(model, task.example)
        found = inner(coupling)
        sites = self.terms.free(model, found)

        def spread(sparsity: float) -> dict[str, int]:
            return self.allocation.spread(sites, Budget(sparsity))

        met = self.terms.counts(model, task.example, sites, coupling.multiples, spread)
        counts = met.counts
        chosen = [site for site in sites if counts[site.name] < site.units]
        batches = list(task.batches("calibration", self.samples))
        names = {part.name for site in chosen for part in site.parts}
        grads, squares = gradients(model, task, batches, names, self.taylor.squares)
        named, keep = tensors(model), {}
        for site in chosen:
            score = group_scores(site, named, grads, squares, self.taylor, self.combine)
            keep[site.name] = keep_top(score, counts[site.name])
        # A site that loses nothing is written down too: the budget is a fraction of it as well.
        whole = [Mask(s, torch.ones(s.shape, dtype=torch.bool)) for s in sites if s.name not in keep]
        edits = apply_(model, [*whole, *removals(chosen, keep)])
        gone, total = sum(float(s.cost()[~keep[s.name]].sum()) for s in chosen), total_cost(sites)
        blocks = {site.block for site in chosen}
        notes = [
            f"{gone:,.0f} of {total:,.0f} weights of heads and neurons taken out: {gone / total:.4f},"
            f" {met.words} asked for; from {len(blocks)} of {len({site.block for site in sites})} blocks",
            *self.terms.left_alone(found),
            *met.notes,
        ]
        return Outcome(model, edits, notes=[*notes, *(str(frozen) for frozen in coupling.frozen)])

    @property
    def allocation(self) -> Middle:
        """How the budget is spent: evenly, over the blocks that are not spared."""
        return Middle(self.spare_first, self.spare_last, self.least)
