"""Devices that share no data choose a sparse network together, and mend its mask while they train it.

Huang, Zhang, Sun, Fang, Yuan, Wu. "Distributed Pruning Towards Tiny Neural Networks in Federated Learning." ICDCS 2023.
arXiv:2212.01977. Two parts around federated averaging with one shared mask:

    adaptive batch-norm selection   the server draws masks whose layers' shares differ; devices send the mean and the
                                    variance that each leaves in its norms, then its loss under the averages of all;
                                    the mask of the least loss is trained
    progressive pruning             every few rounds, in one block of layers, from the output back: devices send the
                                    a_l largest gradients of weights that are not there, and the server grows as many
                                    and prunes as many of the smallest, a_l = alpha / 2 (1 + cos(pi r / R_stop)) n_l

What a device holds and sends is never more than the sparse network and a_l numbers a layer. What is sent of gradients
says something of a device's data: this is no protection of privacy by itself.

`FedTiny.run` is the whole in one process. `Server` and the functions of a device know nothing of how messages are
carried; `secateur.integrations.flower` carries them over Flower.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from math import inf, isfinite
from statistics import fmean
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.axes import Allocation, Cosine, Criterion, Erk, Magnitude, PerMatrix, Schedule, keep_top
from secateur.axes.allocations import check_scoreless, inhabited, rescaled
from secateur.axes.probes import as_in_training
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import Hold, LearningRate, sparsity_of
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, apply_
from secateur.errors import EvidenceError, ModelError, SettingError, TaskError
from secateur.evidence import Evidence, calm
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Around, Batch, Task, generator
from secateur.train import History, Snapshot, fit

Keep = Mapping[str, Tensor]
"""Site name -> bool [*site.shape]."""

Sparse = tuple[Tensor, Tensor]
"""Places in a flattened tensor (int32) and the values there; no places: the values of all, in order."""

PIECE = 1 << 16  # gradients of a layer looked at together
VALUE, PLACE = 4, 4  # bytes of a float32 and of where it is


# What a device sends of its gradients


def largest(gradient: Tensor, free: Tensor, count: int, piece: int = PIECE) -> Sparse:
    """The `count` gradients that are largest in size where `free` is True, seen a piece at a time.

    No more than `count` and a piece are held, so that a device without room for a dense layer can do it.
    """
    flat, open_ = gradient.detach().reshape(-1), free.reshape(-1)
    places, values = torch.zeros(0, dtype=torch.long, device=flat.device), flat[:0]
    for start in range(0, len(flat), piece):
        here = open_[start : start + piece].nonzero().squeeze(1)
        places, values = torch.cat([places, here + start]), torch.cat([values, flat[start : start + piece][here]])
        best = keep_top(values.abs(), min(count, len(values)))
        places, values = places[best], values[best]
    return places.int().cpu(), values.cpu()


@runtime_checkable
class Sending(Protocol):
    """Which gradients of a layer a device sends."""

    def pick(self, gradient: Tensor, free: Tensor, count: int) -> Sparse:
        """Of a layer's gradient, given where there is no weight and how many are to grow."""
        ...

    def bytes(self, count: int, units: int) -> int:
        """What a device holds and sends for a layer of so many units."""
        ...


@dataclass(frozen=True)
class Largest:
    """The largest at weights that are not there, as many as are to grow."""

    def pick(self, gradient: Tensor, free: Tensor, count: int) -> Sparse:
        """See largest."""
        return largest(gradient, free, count)

    def bytes(self, count: int, units: int) -> int:
        """A value and its place each."""
        return count * (VALUE + PLACE)


@dataclass(frozen=True)
class Everything:
    """All of a layer: what the first author's library does, and what a device must have room for then."""

    def pick(self, gradient: Tensor, free: Tensor, count: int) -> Sparse:
        """The flattened gradient."""
        return torch.zeros(0, dtype=torch.int32), gradient.detach().reshape(-1).cpu()

    def bytes(self, count: int, units: int) -> int:
        """A value for every unit."""
        return units * VALUE


# What the server makes of it


def merged(found: Sequence[Sparse], examples: Sequence[int], units: int) -> Tensor:
    """The mean gradient of those devices that answered, each by its examples: float64 [units].

    What a device did not send counts as zero.
    """
    total = torch.zeros(units, dtype=torch.float64)
    for (places, values), share in zip(found, examples, strict=True):
        if len(places) or not len(values):
            total.index_add_(0, places.long(), values.double() * share)
        else:
            total += values.double() * share
    return total / sum(examples)


@runtime_checkable
class Exchange(Protocol):
    """Which weights of a layer go and which come, as many of each."""

    def exchanged(self, size: Tensor, keep: Tensor, slope: Tensor, count: int) -> Tensor:
        """The new mask of a layer; sizes of its weights, mask and mean gradients are [units]."""
        ...


@dataclass(frozen=True)
class GrowFirst:
    """Grow where the gradient is steepest, then prune the smallest of those that were there: what grew stays."""

    def exchanged(self, size: Tensor, keep: Tensor, slope: Tensor, count: int) -> Tensor:
        """See Exchange. No weight grows without a gradient, so that fewer may change than was asked."""
        free = ~keep & (slope != 0)
        count = min(count, int(free.sum()), int(keep.sum()))
        return (keep & ~keep_top(-size, count, keep)) | keep_top(slope.abs(), count, free)


@dataclass(frozen=True)
class PruneFirst:
    """Prune the smallest, then grow among all that are not there: what has just gone may come back."""

    def exchanged(self, size: Tensor, keep: Tensor, slope: Tensor, count: int) -> Tensor:
        """See Exchange."""
        count = min(count, int((~keep & (slope != 0)).sum()), int(keep.sum()))
        stay = keep & ~keep_top(-size, count, keep)
        return stay | keep_top(slope.abs(), count, ~stay & (slope != 0))


@runtime_checkable
class Statistics(Protocol):
    """Which statistics a candidate's norms have when its loss is taken."""

    @property
    def asked(self) -> bool:
        """Whether devices are asked for theirs."""
        ...

    def merge(self, found: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Of those that devices sent, each with its examples: buffer name -> tensor [channels]."""
        ...


@dataclass(frozen=True)
class Averaged:
    """Means and variances averaged by examples, as in the paper: how far devices' means are apart is lost."""

    asked: ClassVar[bool] = True

    def merge(self, found: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Averages in float64."""
        return dict(Snapshot.average([Snapshot(one) for one in found], [float(n) for n in examples]).model)


@dataclass(frozen=True)
class Pooled:
    """Mean and variance of all devices' inputs together: E[var + mean^2] - E[mean]^2."""

    asked: ClassVar[bool] = True

    def merge(self, found: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Exact but for the unbiased variance that norms keep."""
        out = Averaged().merge(found, examples)
        for name, variance in out.items():
            if name.endswith("running_var"):
                beside = name.removesuffix("var") + "mean"
                squares = Averaged().merge([{name: one[beside].double() ** 2} for one in found], examples)[name]
                out[name] = (variance.double() + squares - out[beside].double() ** 2).to(variance.dtype)
        return out


@dataclass(frozen=True)
class Untouched:
    """The server's own: candidates are chosen by their losses alone, for models without batch norms too."""

    asked: ClassVar[bool] = False

    def merge(self, found: Sequence[Tensors], examples: Sequence[int]) -> dict[str, Tensor]:
        """Nothing."""
        return {}


def proposals(
    sites: Sequence[Site], counts: Mapping[str, int], number: int, noise: float, draw: torch.Generator
) -> list[dict[str, int]]:
    """Counts per site of several candidates, all of the same total: the first as given, the others with noise.

    A layer's density is multiplied by 1 + u, u uniform in [-noise, noise], all are scaled to the total again, those
    that would be above one held there, and every layer keeps a weight.
    """
    budget, found = sum(counts.values()), [dict(counts)]
    while len(found) < number:
        factor = 1 + noise * (2 * torch.rand(len(sites), generator=draw, dtype=torch.float64) - 1)
        raw = {s.name: counts[s.name] / s.units * f for s, f in zip(sites, factor.tolist(), strict=True)}
        found.append(inhabited(sites, rescaled(sites, raw, budget)))
    return found


def backward_blocks(sites: Sequence[Site], number: int) -> list[list[Site]]:
    """Consecutive layers in so many blocks, nearly as many in each, the block of the output first."""
    number = min(number, len(sites))
    cuts = [round(i * len(sites) / number) for i in range(number + 1)]
    return [list(sites[a:b]) for a, b in pairwise(cuts)][::-1]


# What a device does; its model is changed


class Device(Around):
    """A client's own data in batches of two examples or more: a batch norm cannot train on one."""

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """See Task."""
        return (batch for batch in self.task.batches(split, n, epoch) if batch.size > 1)

    def held(self) -> tuple[int, int]:
        """Examples and batches of an epoch. Raises TaskError where there is no batch."""
        sizes = [batch.size for batch in self.batches("train")]
        if not sizes:
            raise TaskError(
                f"{self.name} was to train a network by itself",
                "it has no batch of two examples, and batch norms cannot train on one",
                "Give every device two at least: federated(task, least=2).",
            )
        return sum(sizes), len(sizes)


@dataclass(frozen=True, eq=False)
class Order:
    """What a round asks of every device."""

    round: int  # from 1
    rate: float  # a factor of the task's own learning rate
    counts: Mapping[str, int]  # site -> weights that are to grow; empty: no gradients are asked for


@dataclass(frozen=True, eq=False)
class Reply:
    """What a device sends back."""

    examples: int
    loss: float  # the mean over its last epoch
    state: Tensors
    gradients: Mapping[str, Sparse]  # by site


def statistics_of(model: nn.Module, device: Task, samples: int) -> dict[str, Tensor]:
    """Mean and variance that some of a device's examples leave in every batch norm, nothing being trained."""
    where = _place(model)
    recalibrate_(model, (batch.to(where) for batch in some(device, samples)))
    return {
        f"{path}.{name}" if path else name: getattr(module, name).detach().cpu().clone()
        for path, module in norms(model).items()
        for name in ("running_mean", "running_var")
    }


def loss_of(model: nn.Module, device: Task, samples: int) -> float:
    """The mean loss over the same examples, norms as they are in use."""
    where = _place(model)
    with torch.no_grad(), calm(model):
        found = [(batch.size, float(device.loss(model, batch.to(where)))) for batch in some(device, samples)]
    return sum(size * loss for size, loss in found) / sum(size for size, _ in found)


def answer(
    model: nn.Module, device: Device, sites: Sequence[Site], keep: Keep, order: Order, epochs: int, sends: Sending
) -> Reply:
    """A round of a device: epochs of its own data with the mask held, then, where asked, gradients of one batch.

    The optimizer is fresh, so that what has grown starts without momentum.
    """
    examples, batches = device.held()
    optimizer = device.optimizer([p for p in model.parameters() if p.requires_grad])
    for group in optimizer.param_groups:
        group["lr"] *= order.rate
    epoch = (order.round - 1) * (epochs + 1)  # the last of them is that of the gradients
    history = fit(model, device, epochs * batches, [Hold(sites, keep)], optimizer, epoch=epoch)
    gradients = gradients_of(model, device, sites, keep, order.counts, epoch + epochs, sends) if order.counts else {}
    return Reply(examples, fmean(history.losses[-batches:]), state_of(model), gradients)


def gradients_of(
    model: nn.Module,
    device: Task,
    sites: Sequence[Site],
    keep: Keep,
    counts: Mapping[str, int],
    epoch: int,
    sends: Sending,
) -> dict[str, Sparse]:
    """What a device sends of the gradients of one batch: site -> places and values.

    A layer's gradient is let go of as soon as it was looked at. Raises EvidenceError where one is not finite.
    """
    named = tensors(model)
    found: dict[str, Sparse] = {}
    asked: dict[str, list[Site]] = {}
    for site in sites:
        if site.name in counts:
            asked.setdefault(site.parts[0].name, []).append(site)

    def look(parameter: Tensor) -> None:
        assert parameter.grad is not None
        for site in asked[names[id(parameter)]]:
            seen = site.parts[0].view(parameter.grad)
            if not bool(torch.isfinite(seen).all()):
                raise EvidenceError(
                    f"weights of {site.name} were to grow by the gradients of {device.name}",
                    "they hold NaN or infinity",
                    "Lower the learning rate, or look for NaN in the data.",
                )
            free = ~keep[site.name].to(seen.device)
            found[site.name] = sends.pick(seen, free, counts[site.name])
        parameter.grad = None

    names = {id(named[name]): name for name in asked}
    with _only(model, [named[name] for name in asked], look), as_in_training(model, device):
        batch = next(iter(device.batches("train", epoch=epoch))).to(_place(model))
        torch.autograd.backward(device.loss(model, batch))
    return {site.name: found[site.name] for site in sites if site.name in found}


@contextmanager
def _only(model: nn.Module, wanted: Sequence[Tensor], look: Any) -> Iterator[None]:
    """Gradients of some parameters alone, each handed to a function when it is there."""
    trained = {p: p.requires_grad for p in model.parameters()}
    hooks = []
    try:
        for parameter in trained:
            parameter.requires_grad_(any(parameter is one for one in wanted))
        hooks = [each.register_post_accumulate_grad_hook(look) for each in wanted]  # type: ignore[no-untyped-call]  # torch leaves it untyped
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, was in trained.items():
            parameter.requires_grad_(was)
            parameter.grad = None


def _place(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def norms(model: nn.Module) -> dict[str, nn.Module]:
    """Every batch norm that keeps statistics, by path."""
    return {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """A copy of parameters and buffers, for sending."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


# What it costs


def masks_of(state: Tensors, sites: Sequence[Site], keep: Keep) -> dict[str, Tensor]:
    """Which elements of each tensor are there, for those that are not whole: tensor name -> bool as it is stored."""
    found: dict[str, Tensor] = {}
    for site in sites:
        for part in site.parts:
            whole = found.setdefault(part.name, torch.ones_like(state[part.name], dtype=torch.bool))
            part.view(whole).copy_(part.expand(keep[site.name]))
    return {name: whole for name, whole in found.items() if not bool(whole.all())}


def carried(state: Tensors, masks: Keep) -> tuple[int, int]:
    """Bytes of a state with its places (to a device, and held there), and without (back: the server knows them)."""
    kept = sum(int(mask.sum()) for mask in masks.values())
    values = sum(v.nbytes for n, v in state.items() if n not in masks)
    values += sum(int(mask.sum()) * state[name].element_size() for name, mask in masks.items())
    return values + PLACE * kept, values


def uses_of(model: nn.Module, sites: Sequence[Site], example: Batch) -> dict[str, float]:
    """How often a weight of each site is multiplied for one example: positions of a convolution, 1 in a matrix."""
    outputs: dict[str, float] = {}

    def hook(path: str) -> Any:
        def count(module: nn.Module, given: Any, out: Any) -> None:
            if isinstance(out, Tensor):
                outputs[path] = outputs.get(path, 0.0) + out.numel() / example.size

        return count

    paths = {site.parts[0].module for site in sites}
    hooks = [model.get_submodule(path).register_forward_hook(hook(path)) for path in sorted(paths)]
    try:
        with torch.no_grad(), calm(model):
            example.to(_place(model)).through(model)
    finally:
        for each in hooks:
            each.remove()
    return {site.name: outputs.get(site.parts[0].module, 1.0) / site.parts[0].shape[0] for site in sites}


@dataclass(frozen=True)
class Cost:
    """What a round costs a device, the one with most examples; activations and the optimizer's state are left out."""

    down: int  # bytes it is sent
    up: int  # bytes it sends
    memory: int  # bytes of weights, places, and of gradients of weights that are not there
    flops: float  # of training: forward, backward, and whole gradients of the layers that are asked for


# The server


class Server:
    """The sparse network that is sent out, its mask, and what becomes of the replies.

    Whoever carries the messages calls `pretrain_`, `candidates`, `choose_`, in every round `order` and `take_`, and
    `outcome` at the end. The model given is where devices of the same process work; `state` is what is sent.
    """

    def __init__(self, method: "FedTiny", model: nn.Module, task: Task) -> None:
        self.method, self.model, self.task = method, model, task
        self.sites = weights(model, method.include, method.exclude)
        if method.number > 1 and method.statistics.asked and not norms(model):
            raise ModelError(
                f"the best of {method.number} masks was to be chosen by the statistics of batch norms",
                f"{type(model).__name__} has no batch norm that keeps any",
                "Choose by losses alone, statistics=untouched, or take the first mask, candidates=1.",
            )
        self.counts = inhabited(self.sites, method.allocation.spread(self.sites, Budget(method.sparsity)))
        self.blocks = backward_blocks(self.sites, method.blocks)
        self.uses = uses_of(model, self.sites, task.example)
        self.state: dict[str, Tensor] = state_of(model)
        self.keep: dict[str, Tensor] = {}
        self.costs: list[tuple[int, Cost]] = []  # by round; the choice is round 0
        self.loss: list[tuple[int, float]] = []
        self.notes: list[str] = []
        self.moved = 0  # weights exchanged so far
        self.ever: dict[str, Tensor] = {}  # weights that were there at some time
        self.explored: list[tuple[int, float]] = []  # their fraction, after each adjustment

    def pretrain_(self) -> None:
        """Train on the server's own data, where that was asked for."""
        fit(self.model, self.task, self.method.pretrain)
        self.state = state_of(self.model)

    def candidates(self) -> list[dict[str, Tensor]]:
        """Masks to choose from, the best of each layer by the criterion: as many as the counts of each say."""
        named = tensors(self.model)
        score = {site.name: self.method.criterion.score(site, named, Evidence()) for site in self.sites}
        draw, method = generator(self.task, "candidates"), self.method
        counts = proposals(self.sites, self.counts, method.number, method.noise, draw)
        select = PerMatrix().select
        return [{s.name: select(score[s.name], each[s.name]).cpu() for s in self.sites} for each in counts]

    def masked(self, keep: Keep, statistics: Tensors | None = None) -> dict[str, Tensor]:
        """The server's state under a mask, with statistics of norms where they are given."""
        masks = masks_of(self.state, self.sites, keep)
        found = {n: v.masked_fill(~masks[n], 0) if n in masks else v for n, v in self.state.items()}
        return {**found, **(statistics or {})}

    def choose_(self, found: Sequence[tuple[Keep, Tensors, float]]) -> None:
        """Begin with the mask of the least loss, among masks, statistics of their norms, and mean losses.

        Raises EvidenceError where no loss is finite.
        """
        keep, statistics, loss = min(found, key=lambda one: one[2] if isfinite(one[2]) else inf)
        if not isfinite(loss):
            raise EvidenceError(
                f"the best of {len(found)} masks was to be chosen",
                "none of their losses on the devices is finite",
                "Look for NaN in the weights, the statistics of the norms and the data.",
            )
        place = next(i for i, one in enumerate(found) if one[0] is keep)
        sent = sum(v.nbytes for v in statistics.values())
        down = sum(carried(self.state, masks_of(self.state, self.sites, one))[0] + sent for one, _, _ in found)
        if len(found) > 1:
            self.notes.append(
                f"mask {place + 1} of {len(found)} was chosen: a loss of {loss:.4f} on the devices, against "
                f"{found[0][2]:.4f} without noise and {max(one[2] for one in found):.4f} at most"
            )
            self.costs.append((0, Cost(down, len(found) * (sent + VALUE), self._memory(keep, {}), 0.0)))
        self.state, self.keep, self.ever = self.masked(keep, statistics), dict(keep), dict(keep)

    def order(self, round_: int) -> Order:
        """What a round asks for: where masks are due to move, gradients of the next block of layers."""
        method, counts = self.method, {}
        schedule = method.exchanges()
        if schedule.due(round_, method.rounds):
            share = schedule.value(round_, method.rounds)
            for site in self.blocks[(round_ // method.every - 1) % len(self.blocks)]:
                there = int(self.keep[site.name].sum())
                counts[site.name] = min(int(round(share * there, 9)), site.units - there)
        rate = LearningRate(floor=method.rate_floor).factor(round_ - 1, method.rounds)
        return Order(round_, rate, {name: count for name, count in counts.items() if count})

    def sampled(self, devices: int, round_: int) -> list[int]:
        """Which devices take part in a round, in order."""
        some_ = max(1, round(self.method.share * devices))
        return sorted(torch.randperm(devices, generator=generator(self.task, f"round {round_}"))[:some_].tolist())

    def take_(self, order: Order, replies: Sequence[Reply]) -> None:
        """Average what came back, by examples, and move the masks; without a reply all stays as it was."""
        self.costs.append((order.round, self._cost(order, replies)))
        if not replies:
            self.notes.append(f"no device answered in round {order.round}")
            return
        examples = [reply.examples for reply in replies]
        shares = [float(n) for n in examples]
        self.state = dict(Snapshot.average([Snapshot(reply.state) for reply in replies], shares).model)
        self.loss.append((order.round, sum(r.loss * r.examples for r in replies) / sum(examples)))
        adjusted = False
        for site in self.sites:
            answered = [r for r in replies if site.name in r.gradients]
            if site.name in order.counts and answered:
                sparse, by = [r.gradients[site.name] for r in answered], [r.examples for r in answered]
                self._exchange(site, merged(sparse, by, site.units), order.counts[site.name])
                adjusted = True
        if adjusted:
            self.explored.append((order.round, 1 - sparsity_of(self.ever)))
        self.state = self.masked(self.keep)

    def _exchange(self, site: Site, slope: Tensor, count: int) -> None:
        size = site.parts[0].read(self.state).detach().abs().float().reshape(-1)
        old = self.keep[site.name].reshape(-1)
        new = self.method.exchange.exchanged(size, old, slope.float(), count)
        self.moved += int((new & ~old).sum())
        self.keep[site.name] = new.reshape(site.shape)
        self.ever[site.name] = self.ever[site.name] | self.keep[site.name]

    def _memory(self, keep: Keep, counts: Mapping[str, int]) -> int:
        units = {site.name: site.units for site in self.sites}
        held = carried(self.state, masks_of(self.state, self.sites, keep))[0]
        return held + sum(self.method.sends.bytes(count, units[name]) for name, count in counts.items())

    def _cost(self, order: Order, replies: Sequence[Reply]) -> Cost:
        units = {site.name: site.units for site in self.sites}
        down, up = carried(self.state, masks_of(self.state, self.sites, self.keep))
        up += sum(self.method.sends.bytes(count, units[name]) for name, count in order.counts.items())
        most = max((reply.examples for reply in replies), default=0)
        forward = sum(2 * int(self.keep[name].sum()) * uses for name, uses in self.uses.items())
        whole = sum(2 * units[name] * self.uses[name] for name in order.counts)
        batch = min(most, getattr(self.task, "batch", most))
        flops = 3 * forward * most * self.method.epochs + (3 * forward + whole) * batch * bool(order.counts)
        return Cost(down, up, self._memory(self.keep, order.counts), flops)

    def outcome(self) -> Outcome:
        """The trained network, in the model; its masks as edits, and curves by round."""
        self.model.load_state_dict(self.state)
        edits: list[Edit] = apply_(self.model, [Mask(site, self.keep[site.name]) for site in self.sites])
        curves = {
            "loss": list(self.loss),
            "bytes down": [(r, float(cost.down)) for r, cost in self.costs],
            "bytes up": [(r, float(cost.up)) for r, cost in self.costs],
            "device memory": [(r, float(cost.memory)) for r, cost in self.costs],
            "device flops": [(r, cost.flops) for r, cost in self.costs],
            **({"explored": list(self.explored)} if self.explored else {}),
        }
        trained = [cost for round_, cost in self.costs if round_]
        if trained:
            self.notes.append(
                f"{self.moved:,} weights were exchanged; a device received {max(c.down for c in trained):,} and sent "
                f"{max(c.up for c in trained):,} bytes a round, and held {max(c.memory for c in trained):,} of weights "
                "and gradients, at most"
            )
        return Outcome(self.model, edits, History(curves=curves), notes=self.notes)


@dataclass(frozen=True, kw_only=True)
class FedTiny(Method):
    """Train one sparse network over many devices, its mask chosen and mended by what they say."""

    sparsity: float = 0.95  # of all prunable weights together, throughout
    allocation: Allocation = Erk()  # each layer's share before noise
    criterion: Criterion = Magnitude()  # which weights of a layer a mask keeps
    candidates: int | None = None  # masks to choose from; None: 0.1 over the density; 1: no choice
    noise: float = 0.5  # how much larger or smaller a candidate may make a layer's density, as a fraction
    statistics: Statistics = Averaged()  # what candidates' norms hold when their losses are compared
    samples: int = 128  # examples by which a device judges a candidate
    rounds: int = 300  # of training: R
    epochs: int = 5  # a device trains on its own data in each: E
    share: float = 1.0  # fraction of the devices that take part in a round
    grow: float = 0.3  # fraction of a layer exchanged at first, falling to none as a cosine: alpha
    until: float = 1 / 3  # fraction of the rounds after which masks are fixed: R_stop / R
    every: int = 10  # rounds between adjustments: Delta R
    blocks: int = 5  # of layers, one of which is adjusted at a time
    exchange: Exchange = GrowFirst()  # which weights go and come
    sends: Sending = Largest()  # what devices send of their gradients
    pretrain: int = 0  # optimizer steps on the server's own training data before anything is pruned
    rate_floor: float = 0.01  # learning rate of the last round, as a fraction of the first's
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        43,
        "Distributed Pruning Towards Tiny Neural Networks in Federated Learning",
        arxiv="2212.01977",
        venue="ICDCS",
        year=2023,
        when="during training",
        needs=("labels", "training"),
        families=("cnn",),
        axes="allocation criterion rule schedule",
        criterion=("magnitude", "first-order"),
        start=("initialised", "pretrained"),
        tasks=("classification",),
        stage=("sparse to sparse",),
        schedule=("custom",),
        reports="at extreme sparsity 2.61 points more accuracy than the best rival, with 95.91 % less computation and "
        "94.01 % less memory on a device",
        checked="tests/methods/test_fedtiny.py::test_a_layer_is_adjusted_by_hand",
        differs=(
            "the first candidate has no noise, so that one candidate is the plain allocation",
            "learning rates fall as a cosine over the rounds",
            "autograd makes the whole gradient of a layer for a moment; the ledger counts what a device holds that "
            "goes through it in pieces",
            "the first author's library sends whole gradients of all layers and prunes before it grows: "
            "blocks=1, sends=everything, exchange=prune-first",
            "its selection averages the norms' scales and shifts, which a forward pass leaves alone; here it is their "
            "means and variances, as the paper has it",
        ),
    )
    tiny: ClassVar = {
        "sparsity": 0.75, "candidates": 3, "rounds": 4, "epochs": 1, "every": 1, "until": 0.75, "blocks": 2
    }  # fmt: skip

    @property
    def number(self) -> int:
        """How many masks there are to choose from: the sparser, the more."""
        return max(1, round(0.1 / (1 - self.sparsity))) if self.candidates is None else self.candidates

    def exchanges(self) -> Schedule:
        """The fraction of a layer exchanged, by round: alpha / 2 (1 + cos(pi r / R_stop))."""
        return Schedule(start=self.grow, end=0.0, until=self.until, curve=Cosine(), every=self.every, falling=True)

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        self.budget()
        check_scoreless(self.allocation)
        LearningRate(floor=self.rate_floor)
        for name, least in {"rounds": 1, "epochs": 1, "blocks": 1, "samples": 2, "pretrain": 0}.items():
            if getattr(self, name) < least:
                raise SettingError(f"{name} {getattr(self, name)} was asked for", f"{least} is the least", "Give more.")
        if self.number < 1:
            raise SettingError(f"{self.number} candidates were asked for", "one is the least", "Give 1 or more.")
        for name, value in {"noise": self.noise, "grow": self.grow}.items():
            if not 0 <= value < 1:
                raise SettingError(f"{name} {value:g} was asked for", "it is a fraction, in [0, 1)", "Give 0.3, say.")
        if not 0 < self.share <= 1:
            raise SettingError(
                f"a share of {self.share:g} of the devices was asked for", "it is in (0, 1]", "Give 1 for all of them."
            )
        self.exchanges()

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Choose a mask, then train it in rounds, all devices in this process; the last mask is the edits.

        A task without clients is one device that holds all the data. Raises ModelError for a model without batch norms
        to choose by, TaskError for a device without data, BudgetError for fewer weights than layers.
        """
        self.check()
        server = Server(self, model, task)
        devices = [Device(client) for client in task.clients or (task,)]
        sizes = [device.held()[0] for device in devices]
        server.pretrain_()
        tried = []
        for keep in server.candidates():
            model.load_state_dict(server.masked(keep))
            statistics = self._statistics(model, devices, sizes) if self._chooses else {}
            model.load_state_dict(server.masked(keep, statistics))
            losses = [loss_of(model, device, self.samples) for device in devices] if self._chooses else [0.0]
            tried.append((keep, statistics, fmean(losses)))
        server.choose_(tried)
        for round_ in range(1, self.rounds + 1):
            order, replies = server.order(round_), []
            for place in server.sampled(len(devices), round_):
                model.load_state_dict(server.state)
                replies.append(answer(model, devices[place], server.sites, server.keep, order, self.epochs, self.sends))
            server.take_(order, replies)
        if not task.clients:
            server.notes.append(f"{task.name} is not divided among devices: one held all the data")
        return server.outcome()

    @property
    def _chooses(self) -> bool:
        return self.number > 1

    def _statistics(self, model: nn.Module, devices: Sequence[Device], sizes: Sequence[int]) -> dict[str, Tensor]:
        """Every device's statistics of a candidate's norms, merged."""
        if not self.statistics.asked:
            return {}
        start, found = state_of(model), []
        for device in devices:
            model.load_state_dict(start)
            found.append(statistics_of(model, device, self.samples))
        return self.statistics.merge(found, sizes)
