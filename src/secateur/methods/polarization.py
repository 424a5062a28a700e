"""Gates that see each input learn to agree with each other; what they all keep shut is then taken out.

Zhi, Babbar, Liu, Sun, Silavong, Shi, Moran. "Learning a Consensus Sub-Network with Polarization Regularization and One
Pass Training." 2023. arXiv:2302.10798. Beside each unit, a residual block or a channel, a small gate looks at the
input and opens or shuts; with g the share of a batch that a gate is open for, and c what its unit costs, training adds

    polarization    mean over gates of g (1 - g)            0 only where a gate treats the whole batch alike
    budget          (sum c g / sum c - (1 - sparsity))^2    the share that is to be left

to the loss, the first more and more strongly. At last gates that are open for at least half of held-out examples are
taken for open, the units of the others are removed with all the gates, and a plain smaller network is left.

During training every unit is computed, open or shut, so that batch norms inside see every input, and nothing is saved
yet; in a causal model a gate looks at the mean over all tokens, later ones too. What is left has no gates to look.

Not to be confused with the polarization of batch-norm scales (Zhuang et al. 2020), which has no gates.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import ClassVar, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.axes.gates import Gates, Guarded, SigmoidSlope, Surrogate, gated_blocks, gated_units, insert_, open_for
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Linear, Schedule
from secateur.cut import passing
from secateur.edit import Edit, Mask, Replace, apply_
from secateur.errors import EvidenceError, GraphError, SettingError, did_you_mean
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Batch, Task, generator
from secateur.train import Loop, Rule, fit

KINDS = ("layer", "channel", "head")


def polarization(opened: Tensor) -> Tensor:
    """Mean of g (1 - g) over gates, g [gates] the share of a batch each is open for: 0 where all agree, 1/4 at most."""
    return (opened * (1 - opened)).mean()


def disagreement(opened: Tensor) -> float:
    """The mean share of examples that a gate treats otherwise than most, in [0, 1/2]: D on the paper's card."""
    return float(torch.minimum(opened, 1 - opened).mean())


def active(opened: Tensor, cost: Tensor) -> Tensor:
    """The share of the cost that is open: sum c g / sum c."""
    return (opened * cost).sum() / cost.sum()


@runtime_checkable
class Pull(Protocol):
    """How far from the budget is how bad."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """The penalty for a share left, where another is wanted."""
        ...


@dataclass(frozen=True)
class Squared:
    """The square of the difference: neither more nor less than wanted."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """(left - wanted)^2."""
        return (left - wanted).square()


@dataclass(frozen=True)
class Hinge:
    """What is above the budget: less is as good."""

    def __call__(self, left: Tensor, wanted: float) -> Tensor:
        """max(0, left - wanted)."""
        return (left - wanted).clamp(min=0)


# Training


class Consensus(Rule):
    """Adds to the loss what holds gates to a budget, and, more and more strongly, to one opinion.

    Curves "open", the share of the cost that is open in the batch, and "disagreement". In several processes the shares
    are those of all their batches together, or each would come to a consensus of its own.
    """

    def __init__(
        self,
        gates: Gates,
        wanted: float,
        strength: float = 2.0,
        polarize: Schedule | None = None,
        pull: Pull | None = None,
        of: str = "units",
    ) -> None:
        if not 0 < wanted <= 1:
            raise SettingError(f"{wanted:g} of the units were to be left", "it is a share in (0, 1]", "Give 0.5.")
        self.gates, self.wanted, self.strength = gates, wanted, strength
        self.polarize = Schedule(end=2.0, until=0.5, curve=Linear(), every=1) if polarize is None else polarize
        self.pull: Pull = Squared() if pull is None else pull
        cost = gates.cost
        self.cost = cost if of == "flops" and bool(cost.sum() > 0) else torch.ones_like(cost)

    def start(self, loop: Loop) -> None:
        """Check that the optimizer trains the gates. Raises SettingError when it does not."""
        held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        inside = [p for gate in self.gates.modules for p in gate.parameters()]
        if not all(id(p) in held for p in inside):
            raise SettingError(
                "gates were to be trained", "the optimizer does not hold them", "Build it after the gates are put in."
            )

    def before_forward(self, loop: Loop) -> None:
        """What was said of the last batch is over."""
        self.gates.forget()

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The loss, the budget's pull and the polarization. Raises EvidenceError for a batch of one example."""
        answers = self.gates.opened()
        if len(answers) < 2 and _processes() < 2:
            raise EvidenceError(
                "gates were to come to a consensus over a batch", "it has one example", "Train with batches of 64."
            )
        opened = shared(answers.float().mean(0))  # half precision would round the share of a large batch
        left = active(opened, self.cost.to(opened))
        loop.log("open", float(left.detach()))
        loop.log("disagreement", disagreement(opened.detach()))
        firmly = self.polarize.value(loop.step, loop.steps)
        return value + self.strength * self.pull(left, self.wanted) + firmly * polarization(opened)


def _processes() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def shared(mean: Tensor) -> Tensor:
    """The mean over processes of a value, with gradients that add up right under DistributedDataParallel."""
    if _processes() == 1:
        return mean
    total = mean.detach().clone()
    dist.all_reduce(total)
    # The value is that of all processes, the gradient this one's own: DistributedDataParallel takes the mean of both.
    return mean + (total / _processes() - mean.detach())


def consensus(gates: Gates, share: Tensor, model: nn.Module) -> tuple[list[Tensor], list[str]]:
    """Which units of each gate stay: those open for at least half; and what had to be kept though shut.

    Of a site's channels one stays, and one of a stack whose blocks are all gated: nothing would be left of it.
    """
    keep, notes = [each >= 0.5 for each in gates.apart(share)], []
    shares = gates.apart(share)
    for each, mask, value in zip(gates.guarded, keep, shares, strict=True):
        if each.site.kind != "layer" and not bool(mask.any()):
            mask[value.argmax()] = True
            notes.append(f"every unit of {each.name} is shut: the one that is most often open stays")
    blocks = [i for i, each in enumerate(gates.guarded) if each.site.kind == "layer"]
    if blocks and not any(bool(keep[i].any()) for i in blocks):
        notes.append("collapsed: every gated block is shut; a weaker budget prevents that")
    parents: dict[str, list[int]] = {}
    for i in blocks:
        parents.setdefault(gates.guarded[i].name.rpartition(".")[0], []).append(i)
    for parent, members in parents.items():
        inside = [c for c in model.get_submodule(parent).children() if not getattr(c, "passes_through", False)]
        if len(inside) == len(members) and not any(bool(keep[i].any()) for i in members):
            best = max(members, key=lambda i: float(shares[i]))
            keep[best][:] = True
            notes.append(f"every block of {parent or 'the model'} is shut: {gates.guarded[best].name} stays")
    return keep, notes


def harden_(model: nn.Module, gates: Gates, keep: Sequence[Tensor]) -> list[Edit]:
    """Take the gates out, and with them what they keep shut; the edits, for the record."""
    gates.take_out_()
    pairs = list(zip(gates.guarded, keep, strict=True))
    inner = [each.site for each, _ in pairs if each.site.kind != "layer"]
    edits: list[Edit] = list(removals(inner, {each.name: mask for each, mask in pairs}))
    blocks = [(each, bool(mask.any())) for each, mask in pairs if each.site.kind == "layer"]
    if not all(stays for _, stays in blocks):
        edits.append(Mask(_together([each.site for each, _ in blocks]), torch.tensor([stays for _, stays in blocks])))
        edits += [
            Replace(each.name, passing(model.get_submodule(each.name), each.outputs))
            for each, stays in blocks
            if not stays
        ]
    return apply_(model, edits)


def _together(sites: Sequence[Site]) -> Site:
    """Sites of one block each as one site, a unit each."""
    parts = [
        replace(part, owner=torch.full((1,) * len(part.shape), unit))
        for unit, site in enumerate(sites)
        for part in site.parts
    ]
    return Site("gated blocks", "layer", (len(sites),), tuple(parts))


@dataclass(frozen=True, kw_only=True)
class Polarization(Method):
    """Train weights and gates together until the gates agree; take out what they keep shut. One pass of training."""

    sparsity: float = 0.5  # of the units, or of their multiply-adds, that training aims to shut: 1 - rho
    of: str = "units"  # what that is a share of: units or flops
    kinds: tuple[str, ...] = ("layer",)  # what is gated: layer (whole blocks), channel, head
    strength: float = 2.0  # of the budget in the loss: lambda_act
    pull: Pull = Squared()  # how far from the budget is how bad; hinge minds only what is above
    polarize: float = 2.0  # of the polarization in the loss, at its strongest: lambda_polar
    ramp: float = 0.5  # fraction of training over which it rises from 0, so that gates may try things early
    hidden: int = 16  # width of each gate's own small network
    start: float = 2.0  # the gates' first bias: all open
    gate_rate: float = 1.0  # learning rate of the gates, as a multiple of the weights'
    surrogate: Surrogate = SigmoidSlope()  # what the step learns from
    steps: int = 2000  # of training, weights and gates together
    recover: int = 0  # optimizer steps of fine-tuning what is left
    samples: int = 512  # held-out examples on which the consensus is found
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    include: tuple[str, ...] = ()  # blocks to gate, by name; () is all that keep the shape of what they are given
    exclude: tuple[str, ...] = ()  # channels and heads to leave alone, by name

    card: ClassVar = Card(
        21,
        "Learning a Consensus Sub-Network with Polarization Regularization and One Pass Training",
        arxiv="2302.10798",
        year=2023,
        when="during training",
        granularity=KINDS,
        needs=("labels", "training"),
        families=("cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="rule gate graph",
        criterion=("learned",),
        start=("initialised", "pretrained"),
        tasks=("classification",),
        stage=("sparsity regularisation",),
        schedule=("custom",),
        allocation=("learned",),
        learns=("masks or gates",),
        reports="half of the connections of networks for CIFAR-10 and CIFAR-100 go at less than 1 % of accuracy, in "
        "one pass of training",
        checked="tests/methods/test_polarization.py::test_gates_agree_and_hardening_costs_nothing_on_toy_images",
        differs=(
            "reconstructed from the paper's description, without code: the gate's surrogate gradient, the ramp of the "
            "polarization and the squared distance to a budget are choices made here",
            "a gate may be pulled open again however far shut, but is not pushed further: beyond 4 the sigmoid's slope "
            "is held inwards, and there is none outwards",
            "a shut block hands on its input, which is the same as adding nothing where blocks end as they begin",
            "what is left of a stack or of a layer is one unit at least",
        ),
    )
    tiny: ClassVar = {"steps": 40, "strength": 8.0, "gate_rate": 4.0, "samples": 64}

    def budget(self) -> Budget | None:
        """What training aims at, and the consensus decides; none for multiply-adds, which are those gated alone."""
        return Budget(self.sparsity, of="units") if self.of == "units" else None

    def check(self) -> None:
        """Raise SettingError for a budget, strengths or a training that cannot be."""
        check_sparsity(self.sparsity)
        if self.of not in ("units", "flops"):
            raise SettingError(f"a sparsity of {self.of} was asked for", "it is of units or of flops",
                               did_you_mean(self.of, ("units", "flops")))  # fmt: skip
        unknown = [kind for kind in self.kinds if kind not in KINDS]
        if unknown or not self.kinds:
            raise SettingError(f"gates for {list(self.kinds)} were asked for", "layers, channels and heads have them",
                               did_you_mean(unknown[0] if unknown else "", KINDS))  # fmt: skip
        for name in ("steps", "hidden", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} was given", "one is the least", "Give more.")
        for name in ("strength", "polarize", "recover"):
            value = getattr(self, name)
            if not (isfinite(value) and value >= 0):
                raise SettingError(f"{name}={value} was given", "it is 0 or more", "Give 2, say.")
        if not (isfinite(self.gate_rate) and self.gate_rate > 0):
            raise SettingError(f"gate_rate={self.gate_rate} was given", "a learning rate is above 0", "Give 1.")
        if not isfinite(self.start):
            raise SettingError(f"start={self.start} was given", "a bias is a number", "Give 2: all open at first.")
        assert self.schedule()
        LearningRate(floor=self.rate_floor)

    def training_steps(self) -> int:
        """See Method."""
        return self.steps + self.recover

    def schedule(self) -> Schedule:
        """How strongly polarization counts as training goes on."""
        return Schedule(end=self.polarize, until=self.ramp, curve=Linear(), every=1)

    def guarded(self, model: nn.Module, example: Batch) -> tuple[list[Guarded], list[str]]:
        """What is to be gated, and why other units are not. Raises GraphError when nothing can be."""
        found, notes = gated_blocks(model, example, self.include) if "layer" in self.kinds else ([], [])
        if {"channel", "head"} & set(self.kinds):
            coupling = couple(model, example)
            more, why = gated_units(model, coupling, self.kinds, self.exclude)
            found, notes = found + more, notes + why + [str(frozen) for frozen in coupling.frozen]
        if not found:
            raise GraphError(
                f"gates for each {' and '.join(self.kinds)} of {type(model).__name__} were asked for",
                f"there is none that can be left out ({'; '.join(notes[:4]) or 'no two blocks are alike'})",
                "Gate other kinds, or name blocks that keep the shape of what they are given with include=.",
            )
        return found, notes

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Train with gates, find the consensus on held-out data, take out what is shut."""
        self.check()
        device = next(model.parameters()).device
        guarded, notes = self.guarded(model, task.example.to(device))
        gates = insert_(
            model, guarded, hidden=self.hidden, start=self.start, surrogate=self.surrogate,
            seed=generator(task, "gates").initial_seed(),
        )  # fmt: skip
        try:
            rule = Consensus(gates, 1 - self.sparsity, self.strength, self.schedule(), self.pull, self.of)
            rules = [LearningRate(floor=self.rate_floor), rule]
            history = fit(model, task, self.steps, rules, gates.optimizer(task, self.gate_rate))
            dynamic = task.measure(model, "val")[task.metric]
            share = open_for(model, gates, _some(task, "val", self.samples))
            keep, why = consensus(gates, share, model)
        finally:
            gates.take_out_()
        edits = harden_(model, gates, keep)
        if disagreement(share) > 0:  # norms behind a gate that was not always open saw what no longer comes
            edits += recalibrate_(model, (batch.to(device) for batch in some(task, self.samples)))
        hardened = task.measure(model, "val")[task.metric]
        if self.recover:
            history = history.then(fit(model, task, self.recover, [LearningRate()], epoch=history.epoch))
        left, cost = torch.cat(keep).double(), gates.cost
        history.log(f"validation {task.metric} with gates", self.steps, dynamic)
        history.log(f"validation {task.metric} hardened", self.steps, hardened)
        history.log("held-out disagreement", self.steps, disagreement(share))
        notes.append(
            f"{int(left.sum())} of {len(left)} gated units are left, {float(active(left, cost)):.1%} of their "
            f"multiply-adds; {1 - self.sparsity:.1%} of the {'multiply-adds' if self.of == 'flops' else 'units'} were "
            "aimed at"
        )
        notes.append(f"disagreement {disagreement(share):.4f}: the share of examples that gates treat against the rest")
        notes.append(f"validation {task.metric} {dynamic:.4g} with the gates, {hardened:.4g} without them")
        return Outcome(model, edits, history, notes=notes + why + history.notes)


def _some(task: Task, split: str, samples: int) -> Iterable[Batch]:
    """Batches of a split, as long as there are not that many examples yet."""
    seen = 0
    for batch in task.batches(split):
        if seen >= samples:
            return
        seen += batch.size
        yield batch
