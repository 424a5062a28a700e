"""What a recurrent cell reads and what it remembers are two matrices: prune them together, or apart, or by gate.

Darji. "Investigating Sparsity in Recurrent Neural Networks." 2021. arXiv:2407.20601, sections 3.1 and 5.1:

    a = x (W_ih * M_ih)' + b_ih,  c = h (W_hh * M_hh)' + b_hh,  M = |W| >= the p-th percentile of all |W| chosen

over all recurrent layers together; evaluated at once, and again as training goes on with the mask held. Gated cells do
without much of what they remember, plain ones do not.

Differs: exactly as many weights go as asked, where a percentile and `>=` keep one more at 100 %; a role that is to go
whole is named in `drop`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes import Allocation, Global, Magnitude, PerMatrix
from secateur.axes.clipping import Clip
from secateur.axes.rules import Hold, LearningRate, Validate
from secateur.cut import RECURRENT_ROLES, gates, recurrent
from secateur.edit import Edit, Mask, apply_
from secateur.errors import SettingError, did_you_mean
from secateur.evidence import Evidence
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Task
from secateur.train import History, Loop, Rule, fit


@dataclass(frozen=True, kw_only=True)
class RecurrentPruning(Method):
    """Drop the smallest weights of recurrent matrices, chosen by what they read and by gate, and retrain the rest."""

    sparsity: float = 0.8  # of the matrices chosen; those named in `drop` are not among them
    roles: tuple[str, ...] = ("input-to-hidden", "hidden-to-hidden")  # which matrices; also "projection"
    gates: tuple[str, ...] = ()  # only these gates' rows: "reset", "forget", ...; () is the whole matrix
    drop: tuple[str, ...] = ()  # roles of which no weight stays, as at 100 %
    allocation: Allocation = Global()  # one threshold over all matrices chosen; Uniform() is one for each
    steps: int = 0  # of retraining, with the mask held
    every: int = 0  # steps between validations, the first right after pruning; 0: none
    norm: float = 5.0  # gradients are clipped to it
    rate_floor: float = 1.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant

    card: ClassVar = Card(
        20,
        "Investigating Sparsity in Recurrent Neural Networks",
        arxiv="2407.20601",
        year=2021,
        when="after training",
        needs=("labels", "training"),
        families=("rnn",),
        axes="criterion allocation rule",
        criterion=("magnitude",),
        tasks=("classification",),
        schedule=("one-shot",),
        reports="without retraining all four cells bear 60 % and one epoch makes up for 90 %; GRU and LSTM "
        "recover from the loss of every hidden-to-hidden weight, plain cells do not",
        checked="tests/methods/test_recurrent.py::test_the_threshold_is_of_all_matrices_chosen_together",
        differs=(
            "exactly floor(p n) of n weights go, where the paper's percentile interpolates and keeps one more at 100 %",
            "the paper's text says that the threshold is of a layer, its code pools all layers: the code is the "
            "default, the text is allocation=uniform",
            "all matrices of a role can be dropped whole, and gates pruned apart",
            "biases are never chosen",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.6, "steps": 20, "every": 10}

    def budget(self) -> Budget | None:
        """The sparsity of the matrices or gates chosen; None where others go whole, which is no sparsity below one."""
        if self.drop:
            return None
        return Budget(self.sparsity, "units" if self.gates else "weights")  # the other gates' weights do not count

    def check(self) -> None:
        """Raise SettingError for roles that are not there or asked for twice, and for counts below zero."""
        Budget(self.sparsity)
        for role in (*self.roles, *self.drop):
            if role not in RECURRENT_ROLES:
                raise SettingError(
                    f"the {role!r} matrices of recurrent cells were asked for",
                    "there is no such role",
                    did_you_mean(role, RECURRENT_ROLES),
                )
        if not self.roles and not self.drop:
            raise SettingError("recurrent pruning was asked for", "no role is named", "Name one in roles or drop.")
        both = sorted(set(self.roles) & set(self.drop))
        if both:
            raise SettingError(
                f"the {both[0]} matrices were to be pruned to {self.sparsity:g} and dropped whole",
                "only one of the two can be",
                "Take the role out of roles, or out of drop.",
            )
        if self.gates and not self.roles:
            raise SettingError(
                f"gates {', '.join(self.gates)} were to be pruned",
                "no role says of which matrices",
                'Name "hidden-to-hidden", say, in roles.',
            )
        if min(self.steps, self.every) < 0:
            raise SettingError(
                f"{self.steps} steps with a validation every {self.every} were asked for",
                "counts cannot be negative",
                "Give 0 or more.",
            )
        Clip(self.norm)
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Choose, mask, look at what is left, and retrain with the mask held."""
        self.check()
        masks = chosen(model, self.sites(model), self.sparsity, self.allocation) if self.roles else []
        masks += [Mask(site, torch.zeros(site.shape, dtype=torch.bool)) for site in self.dropped(model)]
        edits: list[Edit] = apply_(model, masks)
        history, watch = History(), list[Rule]()
        if self.every:
            watch = [Validate(self.every)]
            seen = task.measure(model, "val")
            for name in {task.metric, "loss"} & seen.keys():
                history.log(f"validation {name}", 0, seen[name])
        rules = [LearningRate(floor=self.rate_floor), Flat(), Hold.of(edits), Clip(self.norm), *watch]
        history = history.then(fit(model, task, self.steps, rules))
        flatten_(model)
        return Outcome(model, edits, history, notes=[*by_role(masks), *history.notes])

    def sites(self, model: nn.Module) -> list[Site]:
        """Where weights are chosen: matrices, or gates of them."""
        return gates(model, self.gates, self.roles) if self.gates else recurrent(model, self.roles)

    def sites_in(self, model: nn.Module) -> list[Site]:
        """All that will be masked: for a plan."""
        return [*(self.sites(model) if self.roles else []), *self.dropped(model)]

    def dropped(self, model: nn.Module) -> list[Site]:
        """The matrices that go whole."""
        return recurrent(model, self.drop) if self.drop else []


def chosen(model: nn.Module, sites: Sequence[Site], sparsity: float, allocation: Allocation) -> list[Mask]:
    """Masks that keep the largest weights, as many at each site as an allocation says."""
    named = tensors(model)
    scores = {site.name: Magnitude().score(site, named, Evidence()) for site in sites}
    counts = allocation.spread(sites, Budget(sparsity), scores)
    return [Mask(site, PerMatrix().select(scores[site.name], counts[site.name])) for site in sites]


def by_role(masks: Sequence[Mask]) -> list[str]:
    """What share of each role's weights went: one threshold over two roles takes more of the one with smaller weights.

    A line per role, of those matrices or gates that were chosen from.
    """
    found = []
    for role, start in RECURRENT_ROLES.items():
        mine = [mask for mask in masks if mask.site.name.rpartition(".")[2].startswith(start)]
        if units := sum(mask.site.units for mask in mine):
            gone = units - sum(mask.kept for mask in mine)
            found.append(f"{role}: {gone:,} of {units:,} weights are zero, {gone / units:.2%}")
    return found


class Flat(Rule):
    """The weights of each recurrent layer lie in one piece of memory, as fused kernels on a GPU want them."""

    def start(self, loop: Loop) -> None:
        """Put them together: training has just given every parameter storage of its own."""
        flatten_(loop.model)


def flatten_(model: nn.Module) -> None:
    """Put the weights of each recurrent layer into one piece of memory; values stay, and a CPU does nothing."""
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
