"""N of every M weights, and those that go go slowly: what is seen of them, or how many they are, decays in training.

Bambhaniya, Yazdanbakhsh, Subramanian, Kao, Agrawal, Evci, Krishna. "Progressive Gradient Flow for Robust N:M Sparsity
Training in Transformers." 2024. arXiv:2402.04744, section 3. After a short dense phase either the mask decays (MdGf),

    seen = W (m + (1 - m) D(tau)),      D = e^(-beta tau)   or   max(0, 1 - beta tau)

or the structure does (SdGf): hard masks of 7:8, 4:8, 2:8, 1:8 in turn, or of 8:64, 4:32, 2:16, 1:8. The mask m keeps
the N largest of every M consecutive inputs, chosen anew at every step from the dense weights W. At high sparsity that
is said to be ahead of hard masks from the start (`ste`, `sr_ste`), where what is masked learns from noise.

Differs: masked weights learn by the gradient of what is seen of them, D times the full one, as the paper argues; the
authors' code hands on the full one (`flow`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import nn

from secateur.axes import NM, Pattern
from secateur.axes.remasking import Decay, MaskExponential, Phases, Remask
from secateur.axes.rules import Chained, Flow, LearningRate
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import fit


@dataclass(frozen=True, kw_only=True)
class ProgressiveNM(Method):
    """Train dense, let the masks or their structure set in little by little, and end with hard N:M masks."""

    pattern: Pattern = NM(1, 8)  # n of every m consecutive inputs are KEPT
    decay: Decay = MaskExponential()  # how masks set in; mask-linear, structure-geometric, structure-stepwise
    flow: Flow = Chained()  # what masked weights learn; straight-through: the full gradient, as in the authors' code
    dense: float = 0.05  # fraction of training without masks
    final: float = 0.2  # fraction of training, at its end, with hard masks
    steps: int = 1000  # of training in all
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # what to prune; the paper prunes "mlp" alone, and queries, keys, values on request
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense; m must divide the inputs of the rest

    card: ClassVar = Card(
        25,
        "Progressive Gradient Flow for Robust N:M Sparsity Training in Transformers",
        arxiv="2402.04744",
        year=2024,
        when="during training",
        needs=("labels", "training"),
        axes="pattern schedule rule",
        criterion=("magnitude",),
        tasks=("classification", "language modelling"),
        stage=("score or mask",),
        schedule=("custom",),
        allocation=("uniform",),
        reports="at high sparsity up to 2 % better in vision and 5 % in language than SR-STE and its like",
        checked="tests/methods/test_progressive_nm.py::test_at_high_sparsity_a_decaying_mask_settles_and_a_hard_one_flickers",
        differs=(
            "masked weights learn by D times the gradient, as the paper argues; the authors' code hands on all of it",
            "every matrix is pruned unless include says mlp",
            "biases stay; the authors' sparse layers own one and do not add it",
            "the decay is counted from the end of the dense phase; in the authors' code from a hundredth of it",
            "the frames of a structure share the time before the final phase equally, the last one too, as the code's "
            "comment says; in the code the last starts with fine-tuning, and one whose first epoch is missed is lost",
            "masks are hard at the end however short the final phase; the code leaves e^(-beta tau) of each weight",
            "of equal weights the last stay, as everywhere here",
            "groups run along the inputs; those along the outputs are left out",
        ),
    )
    tiny: ClassVar = {
        "pattern": NM(1, 4),
        "steps": 30,
        "include": (r"re:^(?!conv\.weight|vit\.embeddings)",),  # first layers of 3 channels, which 4 does not divide
    }

    def phases(self) -> Phases:
        """When masks are of which pattern, and how much of a masked weight is left."""
        return Phases(target=self.pattern, decay=self.decay, dense=self.dense, final=self.final)

    def rule(self, sites: Sequence[Site]) -> Remask:
        """The rule of a training loop: `attach(optimizer, model, method.rule(weights(model)), steps)`."""
        return Remask(sites, self.phases(), self.flow)

    def budget(self) -> Budget:
        """1 - n/m of the weights of the layers that are pruned."""
        return Budget(self.phases().aim.fixed)

    def check(self) -> None:
        """Raise SettingError for phases that cannot be, PatternError for a pattern that is not N:M."""
        self.phases()
        if self.steps < 1:
            raise SettingError(
                f"masks that set in over {self.steps} steps were asked for",
                "they need training to happen in",
                "Give steps above 0.",
            )
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Dense, decaying, hard; the masks it ends with are the edits."""
        self.check()
        sites = weights(model, self.include, self.exclude)
        remask = self.rule(sites)
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), remask])
        return Outcome(model, apply_(model, remask.masks()), history, notes=remask.remarks(self.steps) + history.notes)
