"""A network that reads networks makes one easier to prune: train it on a few, then send any of their kind through it.

Liu, Wang, Zhang. "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning." 2025.
arXiv:2506.12041. (Not the MetaPruning of 2019, which generates weights for given widths.) A network is a graph: a node
for each channel of each layer, with its norm and bias, an edge for each kernel from one channel to another, and an edge
of a lone 1 where a shortcut leads past layers. The metanetwork is a graph network that changes nodes and edges, and
what comes out is a network of the same shape. It is trained so that this

    computes well           cross-entropy over training batches, nothing else being trained
    has channels to spare   a pull towards zero on whole groups, gamma = alpha^((I_max - I) / (I_max - I_min)) times
                            the weights, hardest on groups of the smallest norm I

and the gradient of both goes back through the new weights into the metanetwork. Used, it is a step before ordinary
pruning: theta -> metanetwork -> fine-tune -> prune groups by their norm, a few at a time -> fine-tune.
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from math import isfinite
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.func import functional_call

from secateur.axes.budgets import Terms
from secateur.axes.metanetwork import Metanetwork
from secateur.axes.network_graphs import Wiring, wiring
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold, LearningRate
from secateur.edit import Edit, Remove, Update, apply_
from secateur.errors import BudgetError, SettingError
from secateur.graph import couple, left_of, removals
from secateur.method import Card, Method, check_sparsity
from secateur.outcome import Outcome, count_flops
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task, forever, generator, quality
from secateur.train import History, fit, seeded

# What it is trained for


def group_norms(site: Site, named: Tensors) -> Tensor:
    """I = the root of the mean, over a group's tensors, of what they say of each unit in squares; the largest is 1.

    Matrices, kernels and the scales of norms count; biases do not.
    """
    parts = [part for part in site.parts if len(part.shape) > 1 or part.name.endswith("weight")]
    squares = [
        Site(site.name, site.kind, site.shape, (part,)).gather({part.name: named[part.name].detach().square()})
        for part in parts
    ]
    mean = torch.stack(squares).mean(0)
    return (mean / mean.max().clamp(min=1e-30)).sqrt()


@runtime_checkable
class Pull(Protocol):
    """What draws new weights to where they can be pruned: a gradient, without a loss of its own."""

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """By tensor name, for those that are drawn."""
        ...


@dataclass(frozen=True)
class Grouped:
    """Groups as a whole, the weakest hardest: gamma * w with gamma from 1 to alpha."""

    alpha: float = 16.0

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """See Pull. Groups that are all of one norm are left alone: none is weaker."""
        found: dict[str, Tensor] = {}
        for site in sites:
            norm = group_norms(site, named)
            span = norm.max() - norm.min()
            if float(span) <= 1e-12:
                continue
            gamma = self.alpha ** ((norm.max() - norm) / span)
            for part in site.parts:
                if part.name in named and (len(part.shape) > 1 or part.name.endswith("weight")):
                    value = part.read(named).detach()
                    pull = part.expand(gamma.to(value), nobody=0.0) * value
                    found[part.name] = found[part.name] + pull if part.name in found else pull
        return found


@dataclass(frozen=True)
class Single:
    """Every weight of a matrix or kernel by its sign: for pruning single weights, in any pattern."""

    def gradients(self, sites: Sequence[Site], named: Tensors) -> dict[str, Tensor]:
        """See Pull."""
        return {name: value.detach().sign() for name, value in named.items() if value.dim() > 1}


class _Called(nn.Module):
    """A network called with other tensors than its own."""

    def __init__(self, model: nn.Module, given: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.model, self.given = model, dict(given)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.given, args, kwargs)


def meta_gradient(
    metanetwork: Metanetwork,
    wires: Wiring,
    model: nn.Module,
    sites: Sequence[Site],
    task: Task,
    batches: Iterable[Batch],
    pull: Pull,
    strength: float,
) -> float:
    """Give the metanetwork the gradient of one network's loss and pull; the loss, a mean over the batches.

    The network itself stays as it is, its norms in evaluation mode.
    """
    changed = metanetwork.changed(wires, tensors(model))
    leaves = {name: value.detach().requires_grad_() for name, value in changed.items()}
    called, held = _Called(model.eval(), leaves), list(batches)
    total = 0.0
    for batch in held:  # one after the other, so that one batch's activations are in memory
        loss = task.loss(called, batch) / len(held)
        torch.autograd.backward(loss)
        total += float(loss.detach())
    gradients = {name: leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for name, leaf in leaves.items()}
    for name, value in pull.gradients(sites, {**tensors(model), **{k: v.detach() for k, v in leaves.items()}}).items():
        if name in gradients:
            gradients[name] = gradients[name] + strength * value
    torch.autograd.backward(list(changed.values()), [gradients[name] for name in changed])
    return total


@dataclass(frozen=True, eq=False)
class Candidate:
    """A metanetwork at some point of its training."""

    step: int
    state: Mapping[str, Tensor]


@dataclass(frozen=True)
class MetaTraining:
    """How a metanetwork is trained: networks of the kind first, then itself on them, one after the other."""

    networks: int = 4  # that are trained for it to see
    first: int = 400  # optimizer steps of each
    steps: int = 30  # passes over these networks
    batches: int = 4  # training batches of each network's loss
    rate: float = 5e-3  # AdamW's; the authors' is 1e-3, over many more passes
    decay: float = 5e-4
    strength: float = 0.1  # of the pull, beside a mean of the loss; the authors' 10 is beside a sum over 100 batches
    pull: Pull = Grouped()  # single() for pruning single weights
    hidden: int = 16
    layers: int = 3
    step: float = 0.05  # of the change: eta; the authors' is 0.01 to 0.05
    side: int = 3  # of the largest kernel
    looks: int = 6  # points of the training that are tried on held-out data; the best is taken

    def check(self) -> None:
        """Raise SettingError for counts below one and rates that are none."""
        for name in ("networks", "steps", "batches", "hidden", "layers", "side", "looks"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} was given", "one is the least", "Give more.")
        for name in ("rate", "step"):
            if not (isfinite(value := getattr(self, name)) and value > 0):
                raise SettingError(f"{name}={value} was given", "it is above 0", "Leave it out for the default.")
        if self.first < 0 or self.strength < 0 or self.decay < 0 or not self.side % 2:
            raise SettingError(
                f"first={self.first}, strength={self.strength:g}, decay={self.decay:g}, side={self.side} were given",
                "they are 0 or more, and kernels have a middle",
                "Give 0 or more, and an odd side.",
            )

    def seen(self, model: nn.Module, task: Task) -> list[nn.Module]:
        """Networks of a model's architecture from other initial weights, trained on the task."""
        found = []
        for number in range(self.networks):
            other = copy.deepcopy(model)
            reinitialize_(other, generator(task, f"network {number}"))
            fit(other, task, self.first, [LearningRate()], epoch=1000 * (1 + number))
            found.append(other.eval())
        return found

    def train(
        self,
        networks: Sequence[nn.Module],
        task: Task,
        watch: Callable[[int, float], None] | None = None,
    ) -> tuple[Metanetwork, list[Candidate], History]:
        """A metanetwork trained on some networks, and what it was at a few points on the way."""
        self.check()
        history = History()
        with seeded(networks[0], generator(task, "metanetwork").initial_seed()):
            made = Metanetwork(self.hidden, self.layers, self.side, self.step)
        wires = [wiring(network, self.side) for network in networks]
        sites = [couple(network, task.example).of("channel") for network in networks]
        optimizer = torch.optim.AdamW(made.parameters(), self.rate, weight_decay=self.decay)
        data, candidates = forever(task, 500_000), []
        at = {round(self.steps * (look + 1) / self.looks) for look in range(self.looks)}
        for step in range(1, self.steps + 1):
            for wire, network, groups in zip(wires, networks, sites, strict=True):
                batches = [batch for _, _, batch in islice(data, self.batches)]
                optimizer.zero_grad()
                loss = meta_gradient(made, wire, network, groups, task, batches, self.pull, self.strength)
                optimizer.step()
                history.losses.append(loss)
            history.log("loss through the metanetwork", len(history.losses), loss)
            if watch is not None:
                watch(step, loss)
            if step in at:
                candidates.append(Candidate(step, {k: v.clone() for k, v in made.state_dict().items()}))
        return made, candidates, history


@runtime_checkable
class Source(Protocol):
    """Where a metanetwork comes from."""

    @property
    def side(self) -> int:
        """Of the largest kernel that it takes."""
        ...

    def check(self) -> None:
        """Raise SettingError for settings that cannot be."""
        ...

    def training_steps(self) -> int:
        """Batches that go forward and back through a network of the kind before there is one."""
        ...

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """One for networks of a model's kind, and what is to be said of it."""
        ...


@dataclass(frozen=True)
class Trained:
    """Trained for this run, which takes longer than all the rest: worth it for more than one network."""

    training: MetaTraining = field(default_factory=MetaTraining)

    @property
    def side(self) -> int:
        """See Source."""
        return self.training.side

    def check(self) -> None:
        """See Source."""
        self.training.check()

    def training_steps(self) -> int:
        """See Source."""
        each = self.training.first + self.training.steps * self.training.batches
        return self.training.networks * each

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """See Source."""
        networks = self.training.seen(model, task)
        made, candidates, history = self.training.train(networks, task)
        step, quality = best(made, candidates, networks[0], task, flops)
        return made, [
            f"the metanetwork was trained on {len(networks)} networks in {len(history.losses)} steps of "
            f"{self.training.batches} batches; that of pass {step} is used: validation {task.metric} {quality:.4g} of "
            f"one of these with {flops:.0%} of its multiply-adds gone, nothing being trained"
        ]


@dataclass(frozen=True)
class Kept:
    """As tools/train_metanetwork.py has written it to a file, which is read once, when settings are checked."""

    path: str = ""

    @cached_property
    def held(self) -> Metanetwork:
        """What the file holds. Raises SettingError where none is named, ModelError where it is no metanetwork."""
        if not self.path:
            raise SettingError("a metanetwork from a file was asked for", "no file is named", "Give kept(path='...').")
        return Metanetwork.load(self.path)

    @property
    def side(self) -> int:
        """See Source."""
        return self.held.side

    def check(self) -> None:
        """Raise SettingError or ModelError for a file that is no metanetwork, before any data is read."""
        _ = self.held

    def training_steps(self) -> int:
        """See Source."""
        return 0

    def metanetwork(self, model: nn.Module, task: Task, flops: float) -> tuple[Metanetwork, list[str]]:
        """See Source."""
        return copy.deepcopy(self.held), [f"the metanetwork is that of {self.path}"]


def best(
    metanetwork: Metanetwork, candidates: Sequence[Candidate], model: nn.Module, task: Task, flops: float
) -> tuple[int, float]:
    """Give a metanetwork the state that leaves most of held-out quality in a network, pruned as it comes out.

    Early states leave little to be pruned, late ones have lost accuracy. Batch norms take their statistics anew,
    nothing is trained, and validation data decides. Returns the step of that state, and the quality.
    """
    tried = []
    for candidate in candidates:
        metanetwork.load_state_dict(dict(candidate.state))
        work = copy.deepcopy(model)
        passed_(work, metanetwork)
        prune_groups_(work, task.example, flops)
        recalibrate_(work, some(task, 512))
        tried.append(quality(task, task.measure(work, "val")))
    place = max(range(len(tried)), key=tried.__getitem__)
    metanetwork.load_state_dict(dict(candidates[place].state))
    return candidates[place].step, abs(tried[place])


# Using it


@torch.no_grad()
def passed_(model: nn.Module, metanetwork: Metanetwork) -> list[Edit]:
    """Send a network through a metanetwork: new values for all that is learnt."""
    wires = wiring(model, metanetwork.side)
    named = tensors(model)
    changed = metanetwork.to(next(model.parameters()).device).changed(wires, named)
    return list(apply_(model, [Update(name, value.to(named[name].dtype)) for name, value in changed.items()]))


def prune_groups_(
    model: nn.Module, example: Batch, flops: float, share: float = 0.005, protect: tuple[str, ...] = ()
) -> tuple[list[Remove], list[str]]:
    """Take out the groups of smallest norm, a share of all units at a time, until a fraction of the work is gone.

    Norms are taken anew each time, over what is left. One unit of each site stays. The edits take out at once what went
    bit by bit. Raises BudgetError where that is too much.
    """
    coupling = couple(model, example)
    free = Terms(flops, protect=protect).free(model, coupling.need("channel"))
    sites: Sequence[Site] = [site for site in free if coupling.multiples.get(site.name, 1) == 1]
    before = count_flops(model, example) or 0
    each = max(1, round(share * sum(site.units for site in sites)))
    first, left = sites, before
    whole = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}
    while left > (1 - flops) * before:
        named = tensors(model)
        scores = {site.name: group_norms(site, named) for site in sites}
        ranked = sorted(
            (float(score), name, unit)
            for name, values in scores.items()
            if len(values) > 1
            for unit, score in enumerate(values)
        )
        keep = {site.name: torch.ones(site.units, dtype=torch.bool) for site in sites}
        gone = 0
        for _, name, unit in ranked:
            if gone < each and int(keep[name].sum()) > 1:
                keep[name][unit], gone = False, gone + 1
        if not gone:
            raise BudgetError(
                f"{flops:.1%} of the multiply-adds were to be taken out with whole channels",
                f"{1 - left / before:.1%} can be, one channel being left at each of {len(sites)} sites",
                f"Ask for flops={int(1e3 * (1 - left / before)) / 1e3:g} at most.",
            )
        apply_(model, removals(sites, keep))
        sites = left_of(sites, keep)
        for name, mask in keep.items():
            whole[name][whole[name].nonzero().squeeze(1)[~mask]] = False
        left = count_flops(model, example) or 0
    return removals(first, whole), [
        f"{1 - left / max(before, 1):.1%} of the multiply-adds are gone, {before / max(left, 1):.2f} times fewer; "
        f"{flops:.1%} were asked for",
        *(str(each_) for each_ in coupling.frozen),
    ]


@dataclass(frozen=True, kw_only=True)
class MetaPruning(Method):
    """Send the network through a metanetwork, fine-tune, prune as usual, fine-tune again."""

    source: Source = Trained()  # of the metanetwork: trained(), kept(path='...')
    flops: float = 0.5  # fraction of multiply-adds to be taken out, in [0, 1); 2.3 times fewer, as in the paper: 0.565
    share: float = 0.005  # of all channels that go at a time
    around: Method | None = None  # what prunes in the place of whole groups: magnitude, say, of any pattern
    settle: int = 300  # optimizer steps of fine-tuning between metanetwork and pruning
    tune: int = 300  # and after pruning
    samples: int = 512  # examples on which batch norms take their statistics anew where nothing is fine-tuned
    protect: tuple[str, ...] = ()  # sites or tensors that whole groups spare, by name: "conv1", "*.layers.0.*"

    card: ClassVar = Card(
        32,
        "Meta Pruning via Graph Metanetworks: A Universal Meta Learning Framework for Network Pruning",
        arxiv="2506.12041",
        year=2025,
        when="around training",
        granularity=("channel",),
        needs=("labels", "training"),
        families=("mlp", "cnn"),
        axes="graph metanetwork criterion method",
        criterion=("norm",),
        tasks=("classification",),
        stage=("prune and finetune",),
        schedule=("one-shot",),
        allocation=("score-driven",),
        retraining=("finetune",),
        learns=("meta-network", "graph network"),
        reports="ResNet-56 on CIFAR-10 at 2.9 times fewer multiply-adds and VGG-19 on CIFAR-100 at 9 times, as good as "
        "or ahead of group norms with a sparse regulariser",
        checked="tests/methods/test_meta_pruning.py::test_what_comes_out_has_weaker_groups_and_is_ahead_where_most_goes",
        differs=(
            "shortcuts with a convolution have nodes of their own, so that a node has one norm; the authors' has two",
            "a shortcut without parameters is its diagonal alone; their edges of zeros between all pairs are left out",
            "the loss is a mean over batches, theirs a sum that grows with their number: a strength of 0.1 comes to "
            "their 10 beside 100 batches",
            "groups that are all of one norm are not pulled: gamma would be 0/0",
            "the point of meta-training is chosen on validation data, among a few; theirs on test data",
            "networks for meta-training are not pruned a little beforehand",
            "the last layers of the metanetwork start at zero: before its training a network comes out as it went in",
            "no vision transformers: a graph here has convolutions and linear layers",
        ),
    )
    tiny: ClassVar = {
        "source": Trained(MetaTraining(networks=1, first=10, steps=2, batches=1, hidden=8, layers=1, looks=1)),
        "flops": 0.3,
        "share": 0.05,
        "settle": 5,
        "tune": 5,
    }

    def check(self) -> None:
        """Raise SettingError for fractions and counts that cannot be."""
        self.source.check()
        check_sparsity(self.flops, "flops")
        if not 0 < self.share <= 1:
            raise SettingError(f"share={self.share} was given", "it is a share in (0, 1]", "Give 0.005.")
        for name in ("settle", "tune", "samples"):
            if getattr(self, name) < 0:
                raise SettingError(f"{name}={getattr(self, name)} was given", "a count cannot be negative", "Give 0.")
        if self.around is not None:
            self.around.check()
            if self.protect:
                raise SettingError(
                    f"protect={self.protect} was given, and pruning by {self.around.name}",
                    "whole groups are protected, and it is the other method that prunes",
                    f"Say it there: {self.around.name} has exclude or protect of its own.",
                )

    def training_steps(self) -> int | None:
        """See Method."""
        inside = 0 if self.around is None or "training" not in self.around.card.needs else self.around.training_steps()
        return None if inside is None else self.source.training_steps() + self.settle + self.tune + inside

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Metanetwork, fine-tuning, pruning, fine-tuning."""
        self.check()
        wiring(model, self.source.side)  # a network that is no graph is refused before anything is trained
        metanetwork, notes = self.source.metanetwork(model, task, self.flops)
        edits = passed_(model, metanetwork)
        history = fit(model, task, self.settle, [LearningRate()])
        if not self.settle:
            edits += recalibrate_(model, some(task, self.samples))
        if self.around is None:
            pruned, said = prune_groups_(model, task.example, self.flops, self.share, self.protect)
            edits, notes, rules = edits + list(pruned), notes + said, []
        else:
            done = self.around.run(model, task)
            edits, notes, rules = edits + done.edits, notes + done.notes, [Hold.of(done.edits)]
        if self.tune:
            rest = fit(model, task, self.tune, [LearningRate(), *rules], epoch=history.epoch)
            history = history.then(rest)
        else:
            edits += recalibrate_(model, some(task, self.samples))
        return Outcome(model, edits, history, notes=notes + history.notes)
