"""Scores that take a pass of their own through the whole model, mostly before it is trained.

    Snip      |w dL/dw|: how much the loss would notice
    Grasp     w (H g): how much the gradient's norm would suffer
    Synflow   |w dR/dw|, R the flow of ones through |w|: no data at all

Each is read off a model at once, for all sites together, and the model is as it was afterwards. What a probe says can
choose a mask, or lend its counts per layer to a choice made otherwise; as a `Given` criterion it goes wherever a
criterion of the weights does.
"""

import copy
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from secateur.axes.allocations import Allocation
from secateur.axes.patterns import PerMatrix, keep_top
from secateur.edit import Mask
from secateur.errors import EvidenceError, ModelError, SettingError, SiteError, did_you_mean
from secateur.evidence import Evidence, calm
from secateur.method import Budget, check_sparsity
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task, generator, logits_of
from secateur.train import seeded


@dataclass(frozen=True, eq=False)
class Reading:
    """What a probe found."""

    scores: Mapping[str, Tensor]  # site name -> [*site.shape], higher = keep
    notes: tuple[str, ...] = ()


@runtime_checkable
class Probe(Protocol):
    """What makes units worth keeping, seen over a whole model."""

    def read(self, model: nn.Module, sites: Sequence[Site], task: Task, sparsity: float) -> Reading:
        """Scores of all sites; a probe that cuts in rounds aims at a sparsity. The model is left as it was."""
        ...


def masks_by(
    sites: Sequence[Site], scores: Mapping[str, Tensor], allocation: Allocation, sparsity: float
) -> list[Mask]:
    """The best of each site, as many as an allocation says."""
    counts = allocation.spread(sites, Budget(sparsity), scores)
    return [Mask(site, PerMatrix().select(scores[site.name], counts[site.name])) for site in sites]


class Given:
    """A criterion whose scores were found beforehand."""

    needs: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, scores: Mapping[str, Tensor]) -> None:
        self.scores = scores

    def score(self, site: Site, tensors: Tensors, seen: Evidence) -> Tensor:
        """The score given for the site. Raises SiteError where there is none."""
        if site.name not in self.scores:
            raise SiteError(
                f"a score of {site.name} was needed", "none was given", did_you_mean(site.name, self.scores)
            )
        return self.scores[site.name]


@dataclass(frozen=True)
class Snip:
    """A connection matters if the loss would notice its going: |dL/dc| at c = 1, where c gates the weight.

    Lee, Ajanthan, Torr 2019, "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv:1810.02340,
    section 4.1: |w dL/dw| on one labelled batch. Batch norms use the batch's own statistics, as in training.
    """

    samples: int = 128  # examples in all

    def read(self, model: nn.Module, sites: Sequence[Site], task: Task, sparsity: float) -> Reading:
        """See Probe. Raises EvidenceError, naming the site, for a gradient that is frozen or not finite."""
        learnt = _learnt(model, sites)
        total = [torch.zeros_like(p) for p in learnt.values()]
        with as_in_training(model, task):
            for batch in task.batches("calibration", _samples(self.samples)):
                for sum_, found in zip(total, _gradients(task.loss(model, batch), learnt), strict=True):
                    sum_ += found * batch.size
        gradient = dict(zip(learnt, total, strict=True))
        named = tensors(model)
        scores = {s.name: (s.parts[0].read(named).detach() * s.parts[0].read(gradient)).abs().float() for s in sites}
        return Reading(_finite(scores, "connection sensitivity"))


@dataclass(frozen=True)
class Grasp:
    """A weight matters if the gradient's norm would suffer by its going: w (H g), larger stays.

    Wang, Zhang, Grosse 2020, "Picking Winning Tickets Before Training by Preserving Gradient Flow", arXiv:2002.07376,
    section 4.1, equation 8 (with the sign turned: there a high score goes). g is the gradient and H the Hessian of the
    loss at logits over a temperature, on as many examples of each class, in two halves. Without classes, as many
    examples as ten classes would give. Attention runs unfused meanwhile, as fused kernels have no second derivative.
    """

    per_class: int = 10  # examples of each class; 25 and more for few classes
    temperature: float = 200.0  # the logits are divided by: far from one-hot answers the Hessian says more

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingError(
                f"a temperature of {self.temperature:g} was asked for", "logits are divided by it", "Give 200."
            )

    def read(self, model: nn.Module, sites: Sequence[Site], task: Task, sparsity: float) -> Reading:
        """See Probe.

        Raises EvidenceError for a class without enough examples and for values that are not finite, ModelError, with
        its name, for an operation that cannot be differentiated twice.
        """
        learnt = _learnt(model, sites)
        halves = balanced(task, _samples(self.per_class))
        with as_in_training(model, task), cooled(model, self.temperature), sdpa_kernel(SDPBackend.MATH):
            product = hessian_gradient(lambda batch: task.loss(model, batch), learnt, halves, type(model).__name__)
        found = dict(zip(learnt, product, strict=True))
        named = tensors(model)
        scores = {s.name: (s.parts[0].read(named).detach() * s.parts[0].read(found)).float() for s in sites}
        return Reading(_finite(scores, "the Hessian times the gradient"))


def hessian_gradient(
    loss: Callable[[Batch], Tensor], learnt: Mapping[str, Tensor], batches: Sequence[Batch], name: str = "a model"
) -> list[Tensor]:
    """H g, both summed over batches, without forming H: the gradient of (g held fixed) . g. One per tensor.

    Raises ModelError, with its name, for an operation that cannot be differentiated twice.
    """
    asked = f"GraSP scores of {name} were asked for", "the probe snip"
    held = [torch.zeros_like(p) for p in learnt.values()]
    for batch in batches:
        for sum_, found in zip(held, _gradients(loss(batch), learnt), strict=True):
            sum_ += found
    product = [torch.zeros_like(p) for p in learnt.values()]
    for batch in batches:
        value = loss(batch)
        refuse_once_differentiable(value, *asked)
        with twice_differentiable(*asked):
            slope = _gradients(value, learnt, again=True)
            along = torch.stack([(h * s).sum() for h, s in zip(held, slope, strict=True)]).sum()
            for sum_, found in zip(product, _gradients(along, learnt), strict=True):
                sum_ += found
    return product


@contextmanager
def twice_differentiable(asked: str, instead: str) -> Iterator[None]:
    """Within this, an operation without a second derivative is a ModelError with its name.

    `asked` says what was to be had of the model, `instead` what does without second derivatives.
    """
    try:
        yield
    except RuntimeError as error:
        said = re.search(r"derivative for '?([\w:]+)'? is not implemented", str(error))
        if said is None:
            raise
        raise _refusal(said[1].removeprefix("aten::"), asked, instead) from error


def _refusal(which: str, asked: str, instead: str) -> ModelError:
    return ModelError(
        asked,
        f"they take second derivatives, and {which} has none",
        f"Use a plain implementation of it (attn_implementation='eager' in transformers), or {instead}.",
    )


def refuse_once_differentiable(value: Tensor, asked: str, instead: str) -> None:
    """Raise ModelError for an operation behind a value that says it can be differentiated once.

    Asked for the second derivative with respect to given tensors alone, autograd goes round it in silence.
    """
    seen: set[Any] = set()
    todo: list[Any] = [value.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        step = getattr(getattr(type(node), "_forward_cls", None), "backward", None)
        while step is not None:
            code = getattr(step, "__code__", None)
            if code is not None and code.co_filename == once_differentiable.__code__.co_filename:
                raise _refusal(type(node).__name__.removesuffix("Backward"), asked, instead)
            step = getattr(step, "__wrapped__", None)
        todo += [following for following, _ in node.next_functions]


@dataclass(frozen=True)
class Synflow:
    """A weight matters by what flows through it from end to end when nothing cancels: no data, no layer collapse.

    Tanaka, Kunin, Yamins, Ganguli 2020, "Pruning neural networks without any data by iteratively conserving synaptic
    flow", arXiv:2006.05467, section 6 and algorithm 1: with every parameter replaced by its size and an input of ones,
    |w dR/dw| for R the sum of the outputs; in rounds, round k keeping the fraction (1 - sparsity)^(k / rounds).
    """

    rounds: int = 100  # n in the paper

    def read(self, model: nn.Module, sites: Sequence[Site], task: Task, sparsity: float) -> Reading:
        """See Probe; what went in an earlier round has -inf. Scores are relative to the highest.

        Raises EvidenceError when the flow is not finite even in float64.
        """
        check_sparsity(sparsity)
        rounds = _samples(self.rounds)
        twin = copy.deepcopy(model).double().eval()  # float64: the product of many layers overflows float32
        with torch.no_grad():
            for value in tensors(twin).values():
                if value.is_floating_point():
                    value.requires_grad_(False).abs_()
        named = tensors(twin)
        learnt = {part.name: named[part.name].requires_grad_(True) for site in sites for part in site.parts}
        weight = {site.name: site.parts[0].read(named) for site in sites}
        ones, tokens = _ones(task.example)
        keep = torch.ones(sum(site.units for site in sites), dtype=torch.bool)
        score = torch.empty(0)
        curved = Curved()
        for k in range(1, rounds + 1):
            with calm(twin), curved, sdpa_kernel(SDPBackend.MATH):
                flow = dict(zip(learnt, _gradients(logits_of(ones.through(twin)).double().sum(), learnt), strict=True))
            found = {site.name: (weight[site.name].detach() * site.parts[0].read(flow)).abs() for site in sites}
            score = torch.cat([_finite(found, "synaptic flow")[site.name].reshape(-1).cpu() for site in sites])
            score = score.masked_fill(~keep, -torch.inf)
            if k < rounds:
                left = len(keep) - int((1 - (1 - sparsity) ** (k / rounds)) * len(keep) + 1e-9)
                keep = keep_top(score, left)
                with torch.no_grad():
                    for site, alive in zip(sites, _apart(keep, sites), strict=True):
                        weight[site.name].mul_(alive.reshape(site.shape).to(weight[site.name].device))
        score = score / max(float(score.max()), 1e-300)
        scores = {site.name: part.reshape(site.shape) for site, part in zip(sites, _apart(score, sites), strict=True)}
        return Reading(scores, tuple(_doubts(curved.seen, tokens)))


def _apart(flat: Tensor, sites: Sequence[Site]) -> tuple[Tensor, ...]:
    return torch.split(flat, [site.units for site in sites])


def _doubts(curved: Collection[str], tokens: bool) -> Iterator[str]:
    if curved:
        yield (
            f"synaptic flow is conserved where activations are homogeneous, and {', '.join(sorted(curved))} "
            f"{'is' if len(curved) == 1 else 'are'} not"
        )
    if tokens:
        yield "inputs are tokens, which cannot be ones: synaptic flow was read on those of one example"


class Curved(TorchFunctionMode):
    """Notes which functions were called that do not scale with their input."""

    ACTIVATIONS: ClassVar = {"gelu", "silu", "sigmoid", "tanh", "softplus", "elu", "selu", "celu", "mish", "hardswish"}
    NORMS: ClassVar = {"layer_norm", "group_norm", "rms_norm", "rsqrt"}
    OTHERS: ClassVar = {"softmax", "scaled_dot_product_attention", "gru", "lstm", "rnn_tanh"}
    NAMES: ClassVar = ACTIVATIONS | NORMS | OTHERS

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the name, then do what was asked."""
        if (name := getattr(func, "__name__", "")) in self.NAMES:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _ones(example: Batch) -> tuple[Batch, bool]:
    """One example of ones in place of numbers, and whether there are token ids, which stay what they are."""
    tokens = False

    def one(value: Any) -> Any:
        nonlocal tokens
        if not isinstance(value, Tensor) or value.dim() == 0:
            return value
        if value.is_floating_point():
            return torch.ones_like(value[:1], dtype=torch.float64)
        tokens = True
        return value[:1]

    if isinstance(example.inputs, Mapping):
        return Batch({key: one(value) for key, value in example.inputs.items()}), tokens
    return Batch(tuple(one(value) for value in example.inputs)), tokens


@contextmanager
def as_in_training(model: nn.Module, task: Task) -> Iterator[None]:
    """The model in training mode, dropout drawn from the task's seed; its mode and buffers come back after."""
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    try:
        with calm(model), seeded(model, generator(task, "probe").initial_seed()), torch.enable_grad():
            model.train()
            yield
    finally:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])


@contextmanager
def cooled(model: nn.Module, temperature: float) -> Iterator[None]:
    """The model's logits divided by a temperature."""

    def cool(module: nn.Module, given: Any, out: Any) -> Any:
        if isinstance(out, Tensor):
            return out / temperature
        if isinstance(out, tuple):
            return (out[0] / temperature, *out[1:])
        out["logits"] = logits_of(out) / temperature
        return out

    hook = model.register_forward_hook(cool)
    try:
        yield
    finally:
        hook.remove()


def balanced(task: Task, per_class: int) -> list[Batch]:
    """As many training examples of each class, in two halves; of data without classes, ten times as many of any.

    Raises EvidenceError for a class that has fewer.
    """
    rows: dict[int, list[Batch]] = {}
    expected = set(range(int(getattr(task, "classes", 0))))
    for batch in task.batches("train"):
        target = batch.target
        if not isinstance(target, Tensor) or target.is_floating_point() or target.dim() != 1:
            return _halves([_picked(b, torch.arange(b.size)) for b in task.batches("calibration", 10 * per_class)])
        for label in torch.unique(target).tolist():
            found = rows.setdefault(label, [])
            short = per_class - sum(b.size for b in found)
            if short > 0:
                found.append(_picked(batch, (target == label).nonzero().squeeze(1)[:short]))
        if expected and all(sum(b.size for b in rows.get(label, [])) >= per_class for label in expected):
            break
    for label in sorted(expected | rows.keys()):
        count = sum(b.size for b in rows.get(label, []))
        if count < per_class:
            raise EvidenceError(
                f"{per_class} examples of each class were to be gathered",
                f"class {label} has {count} in the training data",
                "Give more data, or ask for fewer per class.",
            )
    return _halves([batch for label in sorted(rows) for batch in rows[label]])


def _picked(batch: Batch, places: Tensor) -> Batch:
    def pick(value: Any) -> Any:
        return value[places] if isinstance(value, Tensor) and value.dim() and len(value) == batch.size else value

    if isinstance(batch.inputs, Mapping):
        return Batch({key: pick(value) for key, value in batch.inputs.items()}, pick(batch.target))
    return Batch(tuple(pick(value) for value in batch.inputs), pick(batch.target))


def _halves(batches: Sequence[Batch]) -> list[Batch]:
    """All examples together, every other one in each half."""
    first = batches[0]

    def join(values: Sequence[Any]) -> Any:
        return torch.cat(list(values)) if isinstance(values[0], Tensor) and values[0].dim() else values[0]

    inputs: tuple[Any, ...] | Mapping[str, Any]
    if isinstance(first.inputs, Mapping):
        inputs = {key: join([b.inputs[key] for b in batches]) for key in first.inputs}  # type: ignore[call-overload]  # all batches have inputs of one kind
    else:
        inputs = tuple(join(values) for values in zip(*(b.inputs for b in batches), strict=True))
    whole = Batch(inputs, join([b.target for b in batches]))
    places = torch.arange(whole.size)
    return [_picked(whole, half) for half in (places[::2], places[1::2]) if len(half)]


def _learnt(model: nn.Module, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The tensors the sites are in, by name. Raises EvidenceError for one that is frozen."""
    named = tensors(model)
    found = {part.name: named[part.name] for site in sites for part in site.parts}
    for name, value in found.items():
        if not value.requires_grad:
            raise EvidenceError(
                f"the gradient of {name} was asked for",
                "it is frozen (requires_grad is False)",
                "Call requires_grad_(True) on it, or leave it out with exclude.",
            )
    return found


def _gradients(value: Tensor, learnt: Mapping[str, Tensor], again: bool = False) -> list[Tensor]:
    """The gradient of each tensor, zero where the value does not depend on it; `again`: to be differentiated."""
    parameters = list(learnt.values())
    if not value.requires_grad:
        return [torch.zeros_like(p) for p in parameters]
    found = torch.autograd.grad(value, parameters, create_graph=again, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]


def _finite(scores: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    for name, score in scores.items():
        if not bool(torch.isfinite(score).all()):
            raise EvidenceError(
                f"{what} of {name} was measured",
                "it holds NaN or infinity",
                "Look for overflow, and for NaN in the data and the weights.",
            )
    return scores


def _samples(count: int) -> int:
    if count < 1:
        raise SettingError(f"{count} were asked for", "a probe takes one at least", "Give 1 or more.")
    return count
