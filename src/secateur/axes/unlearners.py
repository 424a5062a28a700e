"""Ways to make a trained network forget some of its training examples, its masked weights staying zero.

    FromScratch      new weights, trained on what is retained: exact, and what the others are measured by
    FineTune         training goes on, on what is retained
    Ascend           the loss of what is to be forgotten is climbed
    Influence        one step to where the minimum would be without the examples, to second order
    FisherNoise      noise, most of it where what is retained hardly depends on a weight
    SparseFineTune   fine-tuning under an L1 penalty that falls: needs no mask
    PruneFineTune    fine-tuning while weights are cut

Jia, Liu, Ram, Yao, Liu, Liu, Sharma, Liu. "Model Sparsity Can Simplify Machine Unlearning." NeurIPS 2023.
arXiv:2304.04934, sections 2 to 4 and appendix B. FisherNoise is of Golatkar, Achille, Soatto 2020, arXiv 1911.04933;
Influence after Izzo et al. 2021, arXiv 2002.10077, and Koh and Liang 2017, arXiv 1703.04730.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from math import isfinite, log
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.allocations import Global
from secateur.axes.membership import class_logits, drawn, seen
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.axes.schedules import Cosine, Curve, Exponential, Schedule
from secateur.cut import weights, without_classifier
from secateur.edit import Mask
from secateur.errors import EvidenceError, SettingError, SiteError, did_you_mean
from secateur.evidence import calm, examples
from secateur.method import check_sparsity
from secateur.site import Part, Site, tensors
from secateur.task import Batch, Forgettable, Task, generator
from secateur.train import History, Loop, Rule, Snapshot, fit


@dataclass(frozen=True, eq=False)
class Request:
    """A task divided into what to forget and what to retain, and which weights may move."""

    task: Forgettable
    keep: Mapping[str, Tensor]  # parameter -> True where it may move; those without a mask are left out

    @property
    def forget(self) -> Task:
        """What is to be forgotten, as training data."""
        return self.task.trained_on("forget")

    @property
    def retain(self) -> Task:
        """What is retained, as training data."""
        return self.task.trained_on("retain")

    def count(self, split: str) -> int:
        """How many examples a split has."""
        return len(self.task.splits[split][-1])

    def hold(self, model: nn.Module) -> Hold:
        """The rule that keeps masked weights at zero. Raises SiteError for a mask of another shape, or of no tensor."""
        named, sites = tensors(model), []
        for name in self.keep:
            if name not in named:
                raise SiteError(
                    f"a mask of {name} was to be held", f"the model has no tensor {name!r}", did_you_mean(name, named)
                )
            shape = tuple(named[name].shape)
            sites.append(Site(name, "weight", shape, (Part(name, shape),)))
        return Hold(sites, self.keep)

    def still_(self, model: nn.Module) -> None:
        """Put masked weights back to zero."""
        named = tensors(model)  # a compiled model's own names have a prefix, and no mask would be found for them
        for name, keep in self.keep.items():
            named[name].data.masked_fill_(~keep.to(named[name].device), 0)


@runtime_checkable
class Unlearner(Protocol):
    """A way to forget."""

    @property
    def steps(self) -> int:
        """Optimizer steps it takes; 0 for one that does not train."""
        ...

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        ...

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """Change the model; masks that are new, and how it went."""
        ...


def _check_training(steps: int, rate: float, momentum: float, decay: float) -> None:
    if steps < 1 or not rate > 0 or not 0 <= momentum < 1 or not decay >= 0:
        raise SettingError(
            f"steps={steps}, rate={rate:g}, momentum={momentum:g} and decay={decay:g} were asked for",
            "steps start at 1, a rate is above 0, a momentum in [0, 1) and a decay not below 0",
            "Give steps=1600, rate=0.01, momentum=0.9 and decay=5e-4, say.",
        )


def _sgd(model: nn.Module, rate: float, momentum: float, decay: float) -> torch.optim.SGD:
    """A fresh optimizer: momentum of an earlier training would move what a mask holds, and what is to stay."""
    moving = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.SGD(moving, rate, momentum=momentum, weight_decay=decay)


@dataclass(frozen=True)
class FromScratch:
    """New weights, trained on what is retained by the task's own optimizer; masks stay as they are.

    They were chosen with what is to be forgotten at hand. To choose them anew, prune on task.trained_on("retain").
    """

    steps: int = 1000  # optimizer steps
    curve: Curve = Cosine()  # how the learning rate falls to zero

    def check(self) -> None:
        """See Unlearner."""
        if self.steps < 1:
            raise SettingError(f"a retraining of {self.steps} steps was asked for", "it takes some", "Give 1000, say.")

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner. Raises ModelError where new weights cannot be drawn."""
        retain = request.retain
        reinitialize_(model, generator(retain, "retrain"))
        return [], fit(model, retain, self.steps, [LearningRate(self.curve), request.hold(model)])


@dataclass(frozen=True)
class FineTune:
    """Training goes on, on what is retained: what was learnt of the rest fades."""

    steps: int = 1600  # 10 epochs of 40,500 images in batches of 256
    rate: float = 0.01  # constant
    momentum: float = 0.9
    decay: float = 5e-4

    def check(self) -> None:
        """See Unlearner."""
        _check_training(self.steps, self.rate, self.momentum, self.decay)

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner."""
        optimizer = _sgd(model, self.rate, self.momentum, self.decay)
        return [], fit(model, request.retain, self.steps, [request.hold(model)], optimizer)


# Climbing


class Climb(Rule):
    """The loss is climbed, not descended."""

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """-loss."""
        return -value


class Floor(Rule):
    """Ends training where accuracy on some batches falls below a floor, with the weights that were last above it."""

    def __init__(self, batches: Sequence[Batch], floor: float, every: int) -> None:
        self.batches, self.floor, self.every = batches, floor, every
        self.good: Snapshot | None = None

    def start(self, loop: Loop) -> None:
        """Put the weights aside."""
        self.good = Snapshot.of(loop.model)

    def after_step(self, loop: Loop) -> None:
        """Look every so many steps, and after the last."""
        if loop.step % self.every and loop.step != loop.steps:
            return
        accuracy = seen(loop.model, self.batches).accuracy
        loop.log("accuracy on retained examples", accuracy)
        if accuracy >= self.floor:
            self.good = Snapshot.of(loop.model)
            return
        assert self.good is not None
        self.good.restore_(loop.model)
        loop.note(
            f"stopped after {loop.step} of {loop.steps} steps: accuracy on retained examples fell to {accuracy:.3f}, "
            f"below the floor of {self.floor:.3f}; the weights are those of the last look before"
        )
        loop.steps = loop.step


@dataclass(frozen=True)
class Ascend:
    """Gradient ascent on what is to be forgotten: a few small steps, since a few too many ruin the network."""

    steps: int = 90  # 5 epochs of 4,500 images in batches of 256
    rate: float = 1e-4  # constant
    momentum: float = 0.9
    decay: float = 5e-4
    floor: float = 0.5  # stops below this share of the accuracy on retained examples before; 0: never
    every: int = 10  # steps between looks at it
    look: int = 512  # retained examples looked at

    def check(self) -> None:
        """See Unlearner."""
        _check_training(self.steps, self.rate, self.momentum, self.decay)
        if not 0 <= self.floor <= 1 or self.every < 1 or self.look < 1:
            raise SettingError(
                f"floor={self.floor:g}, every={self.every} and look={self.look} were asked for",
                "a floor is a share, in [0, 1], and the others are 1 at least",
                "Give floor=0.5, every=10 and look=512.",
            )

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner."""
        rules: list[Rule] = [request.hold(model), Climb()]
        if self.floor:
            batches = list(drawn(request.task, "retain", self.look))
            rules.append(Floor(batches, self.floor * seen(model, batches).accuracy, self.every))
        return [], fit(model, request.forget, self.steps, rules, _sgd(model, self.rate, self.momentum, self.decay))


# One step of second order


@runtime_checkable
class InverseFisher(Protocol):
    """What an inverse Hessian makes of a vector, the mean of gg^T over examples standing for the Hessian."""

    def product(self, vector: Tensor, gradients: Iterable[Tensor], count: int) -> Tensor:
        """H^-1 v [d], from v [d] and the gradients g [d] of so many examples."""
        ...


@dataclass(frozen=True)
class OnePass:
    """WoodFisher's recursion as the authors run it: two vectors, one pass.

    o = g_1, k = v; then for each further g: k -= (k.g / (n + o.g)) o and o -= (o.g / (n + o.g)) o. As o never leaves
    the direction of g_1, the product is v less a multiple of the first gradient, and a large one where o.g comes near
    -n. `Woodbury` harms what is retained far less, where its n gradients fit into memory.
    """

    def product(self, vector: Tensor, gradients: Iterable[Tensor], count: int) -> Tensor:
        """See InverseFisher."""
        given = iter(gradients)
        product, first = vector.clone(), next(given).clone()
        for gradient in given:
            along = torch.dot(first, gradient)
            product -= torch.dot(product, gradient) / (count + along) * first
            first -= along / (count + along) * first
        return product


@dataclass(frozen=True)
class Woodbury:
    """The exact product, (damping I + G^T G / n)^-1 v = (v - G^T (n damping I + G G^T)^-1 G v) / damping.

    G [n, d] holds every gradient in memory. The inverse is that of Singh and Alistarh 2020, arXiv 2004.14340.
    """

    damping: float = 1.0  # what stands on the diagonal before any example was seen

    def __post_init__(self) -> None:
        if not self.damping > 0:
            raise SettingError(
                f"a damping of {self.damping:g} was asked for", "it is above 0, or nothing can be inverted", "Give 1."
            )

    def product(self, vector: Tensor, gradients: Iterable[Tensor], count: int) -> Tensor:
        """See InverseFisher."""
        rows = torch.stack(list(gradients))  # [n, d]
        gram = (rows @ rows.T).double()
        gram.diagonal().add_(count * self.damping)
        share = torch.linalg.solve(gram, (rows @ vector).double()).to(rows.dtype)
        return (vector - rows.T @ share) / self.damping


@dataclass(frozen=True)
class Influence:
    """w + scale H^-1 v: where the minimum would be had the examples never been there (influence unlearning, IU).

    v = (sum of g over D_f - |D_f| / |D_r| sum of g over D_r) / (|D_f| + |D_r|), g being gradients of the loss.
    """

    scale: float = 1.0  # alpha in the paper, which searches it
    samples: int = 1000  # retained examples whose gradients stand for the Hessian, at most
    inverse: InverseFisher = OnePass()
    steps: ClassVar[int] = 0

    def check(self) -> None:
        """See Unlearner."""
        _check_scale(self.scale, self.samples, "1")

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner. Raises EvidenceError where the step is not finite, SiteError for masks that do not fit."""
        request.hold(model)  # which refuses masks that do not fit, before anything moves
        task = request.retain
        moving = [p for p in model.parameters() if p.requires_grad]
        count = min(self.samples, request.count("retain"))
        with calm(model):  # eval mode: the running means of batch norms are left alone
            forget = summed_gradient(model, task, task.batches("forget"))
            retain = summed_gradient(model, task, task.batches("retain"))
            vector = leave_out(forget, retain, request.count("forget"), request.count("retain"))
            singles = islice(examples(task.batches("calibration", count)), count)
            each = (_gradient(model, task, example) for example in singles)
            step = self.scale * self.inverse.product(vector, each, count)
        if not bool(torch.isfinite(step).all()):
            raise EvidenceError(
                "a step of influence was to be taken", "it is not finite", "Lower scale, or give inverse=woodbury."
            )
        before = torch.nn.utils.parameters_to_vector(moving).detach()
        torch.nn.utils.vector_to_parameters(before + step, moving)
        request.still_(model)
        return [], History()


def leave_out(forget: Tensor, retain: Tensor, forgotten: int, retained: int) -> Tensor:
    """v [d]: the gradient at which weights 1/N for all and those of retraining differ.

    From sums of gradients [d] over what is forgotten and what is retained, and how many examples there are of each.
    """
    return (forget - forgotten / retained * retain) / (forgotten + retained)


def _check_scale(scale: float, samples: int, usual: str) -> None:
    if not scale > 0 or not isfinite(scale) or samples < 1:
        raise SettingError(
            f"a scale of {scale:g} and {samples} examples were asked for",
            "a scale is above 0 and finite, and examples are 1 at least",
            f"Give a scale of {usual}, say, and look for the best.",
        )


def _gradient(model: nn.Module, task: Task, batch: Batch) -> Tensor:
    """The gradient of the mean loss over a batch, in one row [d]."""
    moving = [p for p in model.parameters() if p.requires_grad]
    with torch.enable_grad():
        found = torch.autograd.grad(task.loss(model, batch.to(moving[0].device)), moving, allow_unused=True)
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).reshape(-1) for p, g in zip(moving, found, strict=True)]
    )


def summed_gradient(model: nn.Module, task: Task, batches: Iterable[Batch]) -> Tensor:
    """The sum over examples of the gradients of the loss [d]."""
    total: Tensor | None = None
    for batch in batches:
        found = batch.size * _gradient(model, task, batch)
        total = found if total is None else total.add_(found)
    assert total is not None, "a divided task has examples of both kinds"
    return total


# Noise


@dataclass(frozen=True)
class FisherNoise:
    """Noise of a variance that is the inverse of the Fisher information of what is retained (Fisher forgetting, FF)."""

    scale: float = 1e-7  # alpha in the paper, which searches it
    samples: int = 256  # retained examples the information is measured on, one at a time
    steps: ClassVar[int] = 0

    def check(self) -> None:
        """See Unlearner."""
        _check_scale(self.scale, self.samples, "1e-7")

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner. Raises SiteError for masks that do not fit."""
        request.hold(model)  # which refuses masks that do not fit, before anything moves
        count, task = min(self.samples, request.count("retain")), request.retain
        with calm(model):
            found = fisher_information(model, islice(examples(task.batches("calibration", count)), count))
        draw, last = generator(task, "fisher noise"), last_layer(model)
        for name, parameter in model.named_parameters():
            if name not in found:
                continue
            variance = noise_variance(found[name], self.scale, name.rpartition(".")[0] == last)
            noise = torch.randn(parameter.shape, generator=draw).to(parameter)
            parameter.data.add_(variance.sqrt().to(parameter) * noise)
        request.still_(model)
        return [], History()


def fisher_information(model: nn.Module, singles: Iterable[Batch]) -> dict[str, Tensor]:
    """The diagonal F of every parameter: the mean over examples of sum over classes y of p(y) (d log p(y) / dw)^2."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total = {name: torch.zeros_like(p) for name, p in named.items()}
    count = 0
    for batch in singles:
        with torch.enable_grad():
            chances = class_logits(batch.to(next(iter(named.values())).device).through(model)).float().log_softmax(-1)
            for chance in chances[0]:
                found = torch.autograd.grad(chance, list(named.values()), retain_graph=True, allow_unused=True)
                for name, gradient in zip(named, found, strict=True):
                    if gradient is not None:
                        total[name] += float(chance.detach().exp()) * gradient.square()
        count += 1
    return {name: value / max(count, 1) for name, value in total.items()}


def noise_variance(information: Tensor, scale: float, last: bool) -> Tensor:
    """The variance of each weight's noise: scale / (F + 1e-8), no more than scale * 1000 (in the last layer 100).

    The same for all inputs of an output, and ten times as much in the last layer, in norms and in biases.
    """
    found = scale * (1 / (information + 1e-8)).clamp(max=1e2 if last else 1e3)
    if found.dim() > 1:
        found = found.mean(dim=1, keepdim=True).expand_as(found)
    return 10 * found if last or found.dim() == 1 else found


def last_layer(model: nn.Module) -> str:
    """The path of the module that holds the last matrix: the classifier."""
    return [name for name, p in model.named_parameters() if p.dim() > 1][-1].rpartition(".")[0]


# Sparsity made while forgetting


@runtime_checkable
class Pull(Protocol):
    """How strong a penalty is over the part of training in which there is one."""

    def share(self, u: float) -> float:
        """The share of the strength at u in [0, 1)."""
        ...


@dataclass(frozen=True)
class Falling:
    """1 - u: the paper's best."""

    def share(self, u: float) -> float:
        """See Pull."""
        return 1 - u


@dataclass(frozen=True)
class Steady:
    """The same throughout."""

    def share(self, u: float) -> float:
        """See Pull."""
        return 1.0


@dataclass(frozen=True)
class Rising:
    """From nothing to all of it."""

    def share(self, u: float) -> float:
        """See Pull."""
        return u


@runtime_checkable
class Size(Protocol):
    """The L1 norm of a network."""

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """A scalar that can be differentiated."""
        ...


@dataclass(frozen=True)
class Summed:
    """The sum of |w|: the paper's. A strength that suits one size of model does not suit another."""

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """See Size."""
        return torch.stack([p.abs().sum() for p in parameters]).sum()


@dataclass(frozen=True)
class Averaged:
    """The mean of |w|, so that a strength does not depend on how many weights there are."""

    def of(self, parameters: Sequence[Tensor]) -> Tensor:
        """See Size."""
        return Summed().of(parameters) / sum(p.numel() for p in parameters)


@runtime_checkable
class Whose(Protocol):
    """Which parameters are penalised."""

    def pick(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """Those of all."""
        ...


@dataclass(frozen=True)
class Every:
    """All of them, norms and biases too: the paper's."""

    def pick(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """See Whose."""
        return list(parameters)


@dataclass(frozen=True)
class Matrices:
    """Matrices and kernels alone, which bear a stronger penalty."""

    def pick(self, parameters: Iterable[Tensor]) -> list[Tensor]:
        """See Whose."""
        return [p for p in parameters if p.dim() > 1]


class L1Penalty(Rule):
    """The loss + strength * share(t / T') * |w|_1 in the first T' steps, and the loss alone after them."""

    def __init__(self, strength: float, until: float, pull: Pull, size: Size, whose: Whose) -> None:
        self.strength, self.until, self.pull, self.size, self.whose = strength, until, pull, size, whose

    def at(self, step: int, steps: int) -> float:
        """The strength at a step, counted from 0."""
        last = round(self.until * steps)
        return self.strength * self.pull.share(step / last) if step < last else 0.0

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The penalised loss."""
        strength = self.at(loop.step, loop.steps)
        if not strength:
            return value
        return value + strength * self.size.of(self.whose.pick(p for p in loop.model.parameters() if p.requires_grad))


@dataclass(frozen=True)
class SparseFineTune:
    """Fine-tuning on what is retained under an L1 penalty that falls to nothing: pruning and forgetting at once."""

    strength: float = 5e-4  # gamma at the start; goes with the size of the model, and is to be searched
    until: float = 0.8  # fraction of the steps with a penalty
    pull: Pull = Falling()  # how it changes over them
    size: Size = Summed()  # the L1 norm
    whose: Whose = Every()  # which parameters are penalised
    steps: int = 1600  # 10 epochs of 40,500 images in batches of 256
    rate: float = 0.01  # constant
    momentum: float = 0.9
    decay: float = 5e-4

    def check(self) -> None:
        """See Unlearner."""
        _check_training(self.steps, self.rate, self.momentum, self.decay)
        if not self.strength > 0 or not isfinite(self.strength) or not 0 < self.until <= 1:
            raise SettingError(
                f"strength={self.strength:g} and until={self.until:g} were asked for",
                "a penalty is above 0 and finite, and lasts for a part of training, in (0, 1]",
                "Give strength=5e-4 and until=0.8; without a penalty it is by=fine-tune.",
            )

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner."""
        penalty = L1Penalty(self.strength, self.until, self.pull, self.size, self.whose)
        optimizer = _sgd(model, self.rate, self.momentum, self.decay)
        return [], fit(model, request.retain, self.steps, [request.hold(model), penalty], optimizer)


def near_zero(model: nn.Module, share: float = 1e-3) -> tuple[int, int]:
    """How many weights of matrices and kernels are below a share of their tensor's largest, and how many are zero."""
    near = none = 0
    for parameter in model.parameters():
        if parameter.dim() > 1:
            size = parameter.detach().abs()
            near += int((size < share * size.max()).sum())
            none += int((size == 0).sum())
    return near, none


@dataclass(frozen=True)
class PruneFineTune:
    """Fine-tuning on what is retained, with the same share of what is left cut again and again, by magnitude.

    One threshold for all matrices and kernels but the classifier; what is gone stays gone.
    """

    sparsity: float = 0.95  # of those weights together, at the end, zeros that were there included
    every: int = 320  # steps between cuts: 2 epochs of 40,500 images in batches of 256
    until: float = 0.8  # fraction of the steps at which the last cut is made
    steps: int = 1600
    rate: float = 0.01  # constant
    momentum: float = 0.9
    decay: float = 5e-4

    def check(self) -> None:
        """See Unlearner."""
        _check_training(self.steps, self.rate, self.momentum, self.decay)
        check_sparsity(self.sparsity)
        Schedule(end=self.sparsity, until=self.until, every=self.every)

    def schedule(self, start: float) -> Schedule:
        """How the sparsity rises: each cut leaves the same share of what the one before left.

        Raises SettingError where as much is gone already.
        """
        if not start < self.sparsity:
            raise SettingError(
                f"weights were to be cut to a sparsity of {self.sparsity:g}",
                f"the model has one of {start:.4g} already",
                "Ask for more, or use by=fine-tune.",
            )
        rate = log((1 - start) / (1 - self.sparsity))
        return Schedule(
            start=start, end=self.sparsity, until=self.until, every=self.every, curve=Exponential(rate)
        )  # fmt: skip

    def unlearn(self, model: nn.Module, request: Request) -> tuple[list[Mask], History]:
        """See Unlearner."""
        sites = without_classifier(weights(model))
        keep = {
            site.name: site.parts[0].view(request.keep[site.parts[0].name])
            if site.parts[0].name in request.keep
            else torch.ones(site.shape, dtype=torch.bool)
            for site in sites
        }
        units = sum(site.units for site in sites)
        there = 1 - sum(int(k.sum()) for k in keep.values()) / units
        ramp = Gradual(sites, self.schedule(there), allocation=Global(), holder=Hold(sites, keep))
        rest = Request(request.task, {n: k for n, k in request.keep.items() if n not in {s.name for s in sites}})
        optimizer = _sgd(model, self.rate, self.momentum, self.decay)
        history = fit(model, request.retain, self.steps, [rest.hold(model), ramp], optimizer)
        return ramp.masks(), history
