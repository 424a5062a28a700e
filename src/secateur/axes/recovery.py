"""Train a chosen part of a pruned model back towards what it was, its zeros where they are.

    retrain       by the task's loss, the whole model at once
    reconstruct   block after block, towards what the dense block makes of the same inputs

A method that recovers is a `Recovery`; others take one as a part (`OneShot(recover=Perp())`), and give it the masks and
the dense model that weights alone do not tell of.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from secateur.adapters import adapted, tied_names
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.schedules import Linear
from secateur.axes.subsets import Chosen
from secateur.edit import Edit, Mask, Update
from secateur.errors import ModelError, SettingError, SiteError, TaskError
from secateur.evidence import calm
from secateur.outcome import Outcome
from secateur.site import Part, Site, tensors
from secateur.task import Batch, Task, modes_of, restore_modes_
from secateur.train import History, fit
from secateur.walk import stacks, walk


@runtime_checkable
class Recovery(Protocol):
    """A method that trains a pruned model back, on its own or as the last part of another."""

    @property
    def needs_dense(self) -> bool:
        """Whether it compares with the model as it was before it was pruned."""
        ...

    def fits_masks(self) -> None:
        """Raise SettingError where it could not keep the zeros of masks, before any data is read."""
        ...

    def ready(self, model: nn.Module, task: Task) -> None:
        """Raise SettingError, SiteError or TaskError for a model or task it cannot work on, before any is changed."""
        ...

    def recover(self, model: nn.Module, task: Task, masks: Sequence[Mask], dense: nn.Module | None) -> Outcome:
        """Train what is left of a pruned model: the model, only the edits made here, the history and notes."""
        ...


@dataclass(frozen=True)
class Training:
    """How long and how fast: AdamW, the rate rising for a while and falling linearly after."""

    steps: int
    rate: float
    warmup: float
    decay: float


@runtime_checkable
class Way(Protocol):
    """How the chosen parameters are trained."""

    @property
    def dense(self) -> bool:
        """Whether it needs the model as it was before it was pruned."""
        ...

    def ready(self, model: nn.Module, task: Task) -> None:
        """Raise SiteError or TaskError for a model or task it cannot work on, before either is changed."""
        ...

    def mend(self, work: "Work") -> tuple[list[Edit], History]:
        """Train and merge; what changed, and how it went."""
        ...


@dataclass(frozen=True, eq=False)
class Work:
    """All that a way of training needs to know."""

    training: Training
    model: nn.Module
    task: Task
    chosen: Chosen
    keep: Mapping[str, Tensor]
    dense: nn.Module | None


@dataclass(frozen=True)
class Retrain:
    """By the task's loss, the whole model at once."""

    dense: ClassVar[bool] = False

    def ready(self, model: nn.Module, task: Task) -> None:
        """See Way. Raises TaskError when there is less than one batch to train on."""
        first = next(iter(task.batches("train")), None)
        asked = f"a model was to be retrained on {task.name}"
        if first is None:
            raise TaskError(asked, "its training split is empty", "Give it data.")
        size = getattr(task, "batch", None)
        if isinstance(size, int) and first.size < size:
            raise TaskError(
                asked,
                f"its training split has {first.size} examples, and a batch is {size}",
                f"Give more data, or a batch of {first.size} at most.",
            )

    def mend(self, work: Work) -> tuple[list[Edit], History]:
        """See Way."""
        return _train(work.training, work.model, work.task, work.chosen, work.keep)


@dataclass(frozen=True)
class Reconstruct:
    """Block after block, towards what the dense block makes of the same inputs; the head stays as it is."""

    samples: int = 128  # calibration examples, the same for every block and in the same order

    dense: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise SettingError(
                f"blocks were to be reconstructed on {self.samples} examples", "one is the least", "Give 128, say."
            )

    def ready(self, model: nn.Module, task: Task) -> None:
        """See Way. Raises SiteError without blocks, TaskError without examples."""
        if not stacks(model):
            raise SiteError(
                f"the blocks of {type(model).__name__} were to be reconstructed",
                "it has no stack of blocks",
                "Use by=retrain.",
            )
        if next(iter(task.batches("calibration", 1)), None) is None:
            raise TaskError(
                f"blocks were to be reconstructed on {task.name}", "its calibration split is empty", "Give it data."
            )

    def mend(self, work: Work) -> tuple[list[Edit], History]:
        """See Way. Raises SettingError without a dense model."""
        if work.dense is None:
            raise SettingError(
                "blocks were to be reconstructed",
                "the dense blocks are gone: the model was pruned before",
                "Say what prunes it, after=METHOD, or give the dense model: --dense of `secateur recover`.",
            )
        edits: list[Edit] = []
        history = History()
        batches = list(work.task.batches("calibration", self.samples))
        for block in walk(work.model, batches, feed="repaired", edits=edits):
            chosen = _inside(work.chosen, block.name)
            if not block.name or not (chosen.whole or chosen.adapters):
                continue
            # What is wanted is the dense block's answer to what reaches THIS block, not to the dense model's inputs.
            with calm(work.dense):
                wanted = list(replace(block, module=work.dense.get_submodule(block.name)).outputs())
            rebuild = _Rebuild(block.name, work.task.seed, block.calls, wanted)
            before = rebuild.error(block.module)
            start = f"{block.name}."
            keep = {n.removeprefix(start): k for n, k in work.keep.items() if n.startswith(start)}
            found, trained = _train(work.training, block.module, rebuild, chosen, keep)
            edits += [Update(f"{block.name}.{e.name}", e.value) for e in found if isinstance(e, Update)]
            trained.log("block error before", block.index, before)
            trained.log("block error after", block.index, rebuild.error(block.module))
            losses = History(history.losses + trained.losses, history.curves, history.notes)
            for name, points in trained.curves.items():
                losses.curves.setdefault(name, []).extend(points)
            history = losses
        return edits, history


@dataclass(frozen=True, eq=False)
class _Rebuild:
    """One block as a task: its inputs, and what it should make of them."""

    name: str
    seed: int
    calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]]
    wanted: Sequence[Tensor]
    metric: str = "error"
    higher_is_better: bool = False
    clients: Sequence[Task] = ()

    @property
    def example(self) -> Batch:
        """See Task."""
        return Batch(self.calls[0], self.wanted[0])

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterator[Batch]:
        """See Task; always in the same order, as the paper has it."""
        for call, wanted in zip(self.calls, self.wanted, strict=True):
            yield Batch(call, wanted)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The mean squared difference. Without dropout, which the dense block's answer is without as well."""
        call: Any = batch.inputs
        args, kwargs = call
        modes = modes_of(model)
        model.eval()
        for module in modes:
            if isinstance(module, _BatchNorm):  # pruning shifts what reaches it: its statistics are to follow
                module.training = modes[module]
        try:
            answer = model(*args, **kwargs)
        finally:
            restore_modes_(model, modes)
        found = next(leaf for leaf in tree_flatten(answer)[0] if isinstance(leaf, Tensor))
        if found.shape != batch.target.shape:
            raise ModelError(
                f"{self.name} was to be reconstructed",
                f"it puts out {list(found.shape)}, and the dense block {list(batch.target.shape)}",
                "Use by=retrain: the stream itself was cut.",
            )
        return (found.float() - batch.target.float()).square().mean()

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """|block - dense|^2 / |dense|^2 over all inputs."""
        apart = sum(float(self.loss(model, b)) * b.target.numel() for b in self.batches("train"))
        return apart / max(sum(float(w.double().square().sum()) for w in self.wanted), 1e-30)

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        """See Task."""
        return {"error": self.error(model)}

    def optimizer(self, parameters: Iterable[Any]) -> Optimizer:
        """See Task."""
        return torch.optim.AdamW(parameters)

    def fingerprint(self) -> str:
        """See Task."""
        return self.name


def _inside(chosen: Chosen, block: str) -> Chosen:
    """What of a choice lies in a block, by the names it has there."""
    start = f"{block}."
    whole = tuple(n.removeprefix(start) for n in chosen.whole if n.startswith(start))
    return Chosen(whole, {n.removeprefix(start): a for n, a in chosen.adapters.items() if n.startswith(start)})


def _train(
    training: Training, model: nn.Module, task: Task, chosen: Chosen, keep: Mapping[str, Tensor]
) -> tuple[list[Edit], History]:
    named = dict(model.named_parameters())
    whole = {name: named[name] for name in chosen.whole}
    held = [n for n in whole if n in keep]
    sites = [Site(n, "weight", tuple(whole[n].shape), (Part(n, tuple(whole[n].shape)),)) for n in held]
    rules = [LearningRate(Linear(), training.warmup), Hold(sites, {n: keep[n] for n in held})]
    before = {n: b.clone() for n, b in model.named_buffers()}
    # Frozen before the adapters are there, or they would be frozen with the rest.
    with only(model, whole.values()), adapted(model, chosen.adapters) as merged:
        parameters = [*whole.values(), *(p for a in chosen.adapters.values() for p in a.parameters())]
        optimizer = torch.optim.AdamW(parameters, training.rate, weight_decay=training.decay)
        history = fit(model, task, training.steps, rules, optimizer)
    moved = [(n, b) for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])]
    changed = [*whole.items(), *((n, b.clone()) for n, b in moved)]  # running statistics of batch norms move as well
    return [*merged, *(Update(n, value.detach()) for n, value in changed)], history


@contextmanager
def only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
    """Within this, these parameters are trained and no others."""
    before = {p: p.requires_grad for p in model.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
            parameter.grad = None


_beside: ContextVar[tuple[nn.Module | None, tuple[Mask, ...]]] = ContextVar("beside", default=(None, ()))


@contextmanager
def beside(*, dense: nn.Module | None = None, edits: Iterable[Edit] = ()) -> Iterator[None]:
    """Within this, masks are those among some edits, and dense blocks those of a model.

    What a folder knows of its model and the weights alone do not: a weight that is kept and happens to be zero may
    be trained, and a reconstruction has its target.
    """
    masks = {edit.site.name: edit for edit in edits if isinstance(edit, Mask)}
    token = _beside.set((dense, tuple(masks.values())))
    try:
        yield
    finally:
        _beside.reset(token)


def recovered(done: Outcome, by: Recovery, task: Task, dense: nn.Module | None) -> Outcome:
    """What a method did, and what a recovery made of it: the masks are those among the method's edits."""
    masks = {edit.site.name: edit for edit in done.edits if isinstance(edit, Mask)}
    found = by.recover(done.model, task, tuple(masks.values()), dense)
    history = done.history if found.history is None else found.history
    if done.history is not None and found.history is not None:
        history = done.history.then(found.history)
    return Outcome(found.model, [*done.edits, *found.edits], history, notes=[*done.notes, *found.notes])


def known_beside() -> tuple[nn.Module | None, tuple[Mask, ...]]:
    """The dense model and the masks that are known beside the weights, where `beside` gave any."""
    return _beside.get()


def kept_weights(model: nn.Module, masks: Iterable[Mask] = ()) -> dict[str, Tensor]:
    """What stays trainable of each parameter that has zeros to keep: True where it does, as stored.

    A zero in a matrix is kept, unless masks of that matrix say otherwise; a zero in a bias or a norm is kept when
    the whole unit is zero, since biases are often zero and mean nothing by it.
    """
    found: dict[str, Tensor] = {}
    tied, named = tied_names(model), tensors(model)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and parameter.dim():
            zero = parameter.detach() == 0
            if parameter.dim() == 1:
                zero &= _dead(model.get_submodule(name.rpartition(".")[0]), len(zero))
            found[name] = zero
    said: dict[str, Tensor] = {}
    for mask in masks:
        gone = mask.site.expand(~mask.keep)
        for part in mask.site.parts:
            name = tied.get(part.name, [part.name])[0]
            if name not in found or tuple(part.view(found[name]).shape) != part.shape:
                continue  # cut since then: its zeros are read off
            zeros = said.setdefault(name, torch.zeros_like(found[name]))
            part.view(zeros).logical_or_(gone[part.key].to(zeros.device).expand(part.shape))
    found.update({name: zeros & (named[name].detach() == 0) for name, zeros in said.items()})
    return {name: ~zero for name, zero in found.items() if bool(zero.any())}


def _dead(module: nn.Module, units: int) -> Tensor:
    """Which outputs of a module have every weight and bias zero: [units]."""
    dead: Tensor | None = None
    for parameter in module._parameters.values():
        if parameter is None or parameter.dim() == 0:
            continue
        seen = parameter.detach()
        seen = seen.transpose(0, -1) if _is_turned(module) and seen.dim() == 2 else seen
        if len(seen) != units:
            continue
        here = (seen.reshape(units, -1) == 0).all(1)
        dead = here if dead is None else dead & here
    assert dead is not None, "the vector itself has that length"
    vectors = all(p is None or p.dim() == 1 for p in module._parameters.values())
    return dead & ~_answers(module, units) if vectors and bool(dead.any()) else dead


def _answers(module: nn.Module, units: int) -> Tensor:
    """Which outputs of a norm are not zero whatever its scale: [units]. Those of Gemma multiply by 1 + scale."""
    like = next(p for p in module.parameters() if p is not None)
    probe = torch.randn(4, units, generator=torch.Generator().manual_seed(0)).to(like)
    was_training = module.training
    try:
        with torch.no_grad():
            found = module.eval()(probe)
    except (RuntimeError, TypeError, ValueError):  # one that takes pictures, say
        found = None
    finally:
        module.train(was_training)
    if not isinstance(found, Tensor) or found.shape != probe.shape:
        return torch.zeros(units, dtype=torch.bool, device=like.device)
    return (found != 0).any(0)


def _is_turned(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
