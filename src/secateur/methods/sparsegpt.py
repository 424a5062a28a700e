"""SparseGPT: drop the weights that cost least, and let the ones still to come make up for them.

Frantar, Alistarh. "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot." ICML 2023.
arXiv:2301.00774, section 3, algorithm 1. The sweep itself is secateur.axes.ObsSweep.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import Allocation, ObsSweep, Pattern, PerSlab, Uniform, Wanda
from secateur.axes.patterns import check_pattern
from secateur.axes.sweep import spendable, spread, sweep
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.errors import EvidenceError, SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.task import Task
from secateur.walk import Feed


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Method):
    """Choose and mend in one sweep over the columns of each matrix, with the inputs' second moments."""

    sparsity: float = 0.5  # fraction of the weights set to zero, in [0, 1)
    samples: int = 128  # calibration sequences, as in the paper
    block: int = 128  # columns whose choice is made at once
    damp: float = 0.01  # added to the diagonal of the second moments, as a share of its mean
    pattern: Pattern = PerSlab()  # the paper chooses jointly within each slab of columns, which is a block
    allocation: Allocation = Uniform()  # one that looks at scores is given Wanda's, as OWL's authors do
    feed: Feed = "pruned"
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        0,
        "SparseGPT: massive language models can be accurately pruned in one-shot",
        arxiv="2301.00774",
        year=2023,
        needs=("calibration",),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="solver pattern allocation",
        criterion=("second-order",),
        tasks=("language modelling",),
        gradients=("none",),
        updates=("solved",),
        reports="LLaMA-2-7B, WikiText-2 perplexity: dense 5.12, 50 % 6.51, 2:4 10.17 (figures of the Wanda paper).",
        checked="tests/methods/test_oneshot.py::test_sparsegpt_equals_the_plain_formulas",
        differs=("A slab keeps exactly its share, ties by index, where the reference compares with a threshold.",),
    )
    tiny: ClassVar = {"samples": 16}

    def check(self) -> None:
        """See Method."""
        super().check()
        check_pattern(self.pattern, self.sparsity)
        if self.block < 1 or not self.damp > 0:
            raise SettingError(
                f"block={self.block} and damp={self.damp} were asked for",
                "a block has a column at least and damping is above 0",
                "Give block=128 and damp=0.01.",
            )
        self.solver()

    def solver(self) -> ObsSweep:
        """What decides a matrix: slabs are as wide as blocks, unless others are asked for."""
        pattern = PerSlab(self.block) if self.pattern == PerSlab() else self.pattern
        return ObsSweep(pattern, self.block, self.damp)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises EvidenceError when there are fewer calibration tokens than the widest input."""
        sites, solver = weights(model, self.include, self.exclude), self.solver()
        batches = list(task.batches("calibration", self.samples))
        tokens = sum(batch.tokens for batch in batches)
        widest = max(site.shape[-1] for site in sites)
        if 0 < tokens < widest:
            raise EvidenceError(
                f"SparseGPT was to prune {len(sites)} matrices, the widest with {widest} inputs",
                f"the calibration data has {tokens} tokens, too few to tell those inputs apart",
                f"Ask for more samples: at least {-(-widest * self.samples // tokens)}.",
            )
        allocation, notes = spendable(self.allocation, self.pattern)
        keep = spread(
            model, sites, allocation, Budget(self.sparsity), Wanda(), batches, task=task, pattern=self.pattern
        )
        return Outcome(model, sweep(model, sites, solver, keep, batches, self.feed), notes=notes)
