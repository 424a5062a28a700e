"""Retrain next to nothing: biases, norms and small adapters bring back most of what pruning cost.

Zimmer, Andoni, Spiegel, Pokutta. "PERP: Rethinking the Prune-Retrain Paradigm in the Era of LLMs." 2023.
arXiv:2312.15230, section 3. Of a pruned model W = W * M only a few parameters are trained, the rest is frozen: every
bias, the scales of every norm, the head, and for the pruned matrices a product of low rank that keeps the zeros,

    W + c (B A) * M        (MaskLora; B = 0 and A random at the start, c = alpha / r)

merged at the end, so that no parameter is added and the same weights are zero. `Retrain` minimises the task's loss;
`Reconstruct` goes block after block and minimises |block(x) - dense block(x)|^2, x being what the blocks mended
before it put out.

    Chain((Wanda(sparsity=0.6), Perp()))                   after any method; M is read off the zeros
    Perp(after=Wanda(sparsity=0.6), by=Reconstruct())      the dense blocks are at hand, and M is Wanda's own
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer
from torch.utils._pytree import tree_flatten

from secateur import adapters
from secateur.adapters import LowRank, adapted, check_kept, tied_names
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.schedules import Linear
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, Update
from secateur.errors import ModelError, SettingError, SiteError, TaskError
from secateur.evidence import calm
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, Site, tensors
from secateur.task import Batch, Task, generator
from secateur.train import History, fit
from secateur.walk import stacks, walk

# What is trained


@dataclass(frozen=True, eq=False)
class Place:
    """What a subset chooses from: the model, the matrices that may be adapted, and what of each tensor is kept."""

    model: nn.Module
    matrices: Mapping[str, Part]  # tensor name -> how it is seen
    keep: Mapping[str, Tensor]  # of those tensors that have zeros to keep, as stored
    draw: Callable[[str], torch.Generator]

    def low(self, name: str, rank: int) -> LowRank:
        """A product of low rank for a tensor."""
        part = self.matrices.get(name)
        value = tensors(self.model)[name]
        return LowRank(value, rank, stacked=part is not None and part.index is not None, turned=_turned(part))

    def kept(self, name: str) -> Tensor:
        """What of a tensor is kept: all of it where it has no zeros to keep."""
        found = self.keep.get(name)
        return torch.ones_like(tensors(self.model)[name], dtype=torch.bool) if found is None else found


@dataclass(frozen=True, eq=False)
class Chosen:
    """What a subset wants trained."""

    whole: tuple[str, ...] = ()  # tensors trained as they are
    adapters: Mapping[str, nn.Module] = field(default_factory=dict)  # tensor name -> Adapter
    samples: int = 0  # calibration examples on which batch norms are recalibrated first
    note: str = ""


@runtime_checkable
class Subset(Protocol):
    """A small part of a model to be trained."""

    def choose(self, place: Place) -> Chosen:
        """Which tensors, and behind which adapters."""
        ...


@dataclass(frozen=True)
class Biases:
    """Every bias there is; Llama and its like have none."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        norms = set(_scales(place.model))
        return Chosen(
            tuple(
                n
                for n, p in place.model.named_parameters()
                if p.dim() == 1 and "bias" in n.rpartition(".")[2] and n not in norms
            )
        )


@dataclass(frozen=True)
class Norms:
    """The scales and shifts of every norm, known by what they are: modules whose only parameters are vectors."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(tuple(_scales(place.model)))


@dataclass(frozen=True)
class Statistics:
    """The running mean and variance of batch norms, taken anew before any training: no parameter is trained for it."""

    samples: int = 1024  # calibration examples, or as many as there are

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        norms = [m for m in place.model.modules() if isinstance(m, _BatchNorm)]
        return Chosen(samples=self.samples if norms else 0, note=f"{len(norms)} batch norms were recalibrated")


@dataclass(frozen=True)
class Embeddings:
    """Every embedding, whole; where it is tied to the head, the head with it."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        tied = tied_names(place.model)
        names = [
            f"{n}.weight" for n, m in place.model.named_modules() if isinstance(m, nn.Embedding) and m.weight.dim() == 2
        ]
        shared = [n for n in names if n in tied]
        note = f"{shared[0]} is one tensor with {', '.join(n for n in tied[shared[0]] if n != shared[0])}: both change"
        return Chosen(tuple(names), note=note if shared else "")


@dataclass(frozen=True)
class Head:
    """The last linear layer behind an ordinary adapter, or whole where the adapter would be no smaller.

    One tied to the embedding is left alone: merging would change the embedding as well.
    """

    rank: int = 16
    scale: float = 2.0  # c = alpha / r

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        name = _head(place.model)
        if name is None:
            return Chosen()
        if name in tied_names(place.model):
            return Chosen(note=f"{name} is tied to the embedding and was left alone")
        low = place.low(name, self.rank)
        if low.a.numel() + low.b.numel() >= tensors(place.model)[name].numel():
            return Chosen((name,))
        low.start_at_zero_(place.draw(name))
        if name in place.keep:
            return Chosen(adapters={name: adapters.MaskLora(low, self.scale, place.keep[name])})
        return Chosen(adapters={name: adapters.Lora(low, self.scale)})


@dataclass(frozen=True)
class MaskLora:
    """Each matrix W + c (B A) * M, in training as when merged: the paper's best."""

    rank: int = 16
    scale: float = 2.0  # c = alpha / r

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(
            adapters={
                n: adapters.MaskLora(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale, place.kept(n))
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class LoraPrune:
    """Each matrix W + c B A in training; what falls on a zero is cut off when merged."""

    rank: int = 16
    scale: float = 2.0

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(
            adapters={
                n: adapters.LoraPrune(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale, place.kept(n))
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class ScaleLora:
    """Each matrix W * (B A), with B A = 1 at the start."""

    rank: int = 16

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(adapters={n: adapters.ScaleLora(place.low(n, self.rank).start_at_one_()) for n in place.matrices})


@dataclass(frozen=True)
class Lora:
    """Each matrix W + c B A: for models whose units were taken out, since it would fill zeros in."""

    rank: int = 16
    scale: float = 2.0

    def choose(self, place: Place) -> Chosen:
        """See Subset. Raises SettingError where a matrix has zeros."""
        for name in place.matrices:
            if name in place.keep:
                gone = int((~place.keep[name]).sum())
                raise SettingError(
                    "ordinary adapters (lora) were asked for",
                    f"{name} has {gone:,} zeros, which merging would fill in",
                    "Use mask-lora, whose adapters keep them.",
                )
        return Chosen(
            adapters={
                n: adapters.Lora(place.low(n, self.rank).start_at_zero_(place.draw(n)), self.scale)
                for n in place.matrices
            }
        )


@dataclass(frozen=True)
class Everything:
    """All parameters, masks held: full retraining, which the others are compared with."""

    def choose(self, place: Place) -> Chosen:
        """See Subset."""
        return Chosen(tuple(n for n, p in place.model.named_parameters() if p.is_floating_point()))


# By what it is trained


@runtime_checkable
class Way(Protocol):
    """How the chosen parameters are trained."""

    @property
    def dense(self) -> bool:
        """Whether it needs the model as it was before it was pruned."""
        ...

    def mend(self, work: "Work") -> tuple[list[Edit], History]:
        """Train and merge; what changed, and how it went."""
        ...


@dataclass(frozen=True, eq=False)
class Work:
    """All that a way of training needs to know."""

    perp: "Perp"
    model: nn.Module
    task: Task
    chosen: Chosen
    keep: Mapping[str, Tensor]
    dense: nn.Module | None


@dataclass(frozen=True)
class Retrain:
    """By the task's loss, the whole model at once."""

    dense: ClassVar[bool] = False

    def mend(self, work: Work) -> tuple[list[Edit], History]:
        """See Way. Raises TaskError when there is less than one batch to train on."""
        _check_corpus(work.task)
        return _train(work.perp, work.model, work.task, work.chosen, work.keep)


@dataclass(frozen=True)
class Reconstruct:
    """Block after block, towards what the dense block makes of the same inputs; the head stays as it is."""

    samples: int = 128  # calibration examples, the same for every block and in the same order

    dense: ClassVar[bool] = True

    def mend(self, work: Work) -> tuple[list[Edit], History]:
        """See Way. Raises SettingError without a dense model, SiteError without blocks."""
        if work.dense is None:
            raise SettingError(
                "blocks were to be reconstructed",
                "the dense blocks are gone: the model was pruned before",
                "Say what prunes it, after=METHOD, or give the dense model: --dense of `secateur recover`.",
            )
        if not stacks(work.model):
            raise SiteError(
                f"the blocks of {type(work.model).__name__} were to be reconstructed",
                "it has no stack of blocks",
                "Use by=retrain.",
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
            found, trained = _train(work.perp, block.module, rebuild, chosen, keep)
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
        """The mean squared difference."""
        call: Any = batch.inputs
        args, kwargs = call
        found = next(leaf for leaf in tree_flatten(model(*args, **kwargs))[0] if isinstance(leaf, Tensor))
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
    perp: "Perp", model: nn.Module, task: Task, chosen: Chosen, keep: Mapping[str, Tensor]
) -> tuple[list[Edit], History]:
    named = dict(model.named_parameters())
    whole = {name: named[name] for name in chosen.whole}
    held = [n for n in whole if n in keep]
    sites = [Site(n, "weight", tuple(whole[n].shape), (Part(n, tuple(whole[n].shape)),)) for n in held]
    rules = [LearningRate(Linear(), perp.warmup), Hold(sites, {n: keep[n] for n in held})]
    before = {n: b.clone() for n, b in model.named_buffers()}
    # Frozen before the adapters are there, or they would be frozen with the rest.
    with _only(model, whole.values()), adapted(model, chosen.adapters) as merged:
        parameters = [*whole.values(), *(p for a in chosen.adapters.values() for p in a.parameters())]
        optimizer = torch.optim.AdamW(parameters, perp.rate, weight_decay=perp.decay)
        history = fit(model, task, perp.steps, rules, optimizer)
    moved = [(n, b) for n, b in model.named_buffers() if n in before and not torch.equal(b, before[n])]
    changed = [*whole.items(), *((n, b.clone()) for n, b in moved)]  # running statistics of batch norms move as well
    return [*merged, *(Update(n, value.detach()) for n, value in changed)], history


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Batch]) -> list[Edit]:
    """Take the running statistics of every batch norm anew: their mean over some batches, nothing being trained.

    Pruning shifts what reaches a norm; with the old mean and variance most of the accuracy is lost for no reason.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not norms:
        return []
    training = {m: m.training for m in model.modules()}
    momenta = {m: m.momentum for m in norms.values()}
    model.eval()
    try:
        for module in norms.values():
            module.reset_running_stats()
            module.momentum = None  # a plain mean over the batches, whatever their order
            module.train()
        for batch in batches:
            batch.through(model)
    finally:
        for module, momentum in momenta.items():
            module.momentum = momentum
        for each, was in training.items():
            each.training = was
    return [Update(f"{n}.{k}" if n else k, b.clone()) for n, m in norms.items() for k, b in m.named_buffers()]


@contextmanager
def _only(model: nn.Module, chosen: Iterable[nn.Parameter]) -> Iterator[None]:
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


def _some(task: Task, samples: int) -> Iterator[Batch]:
    """Calibration batches of so many examples, or of all there are."""
    seen = 0
    for batch in task.batches("calibration"):
        if seen >= samples:
            return
        seen += batch.size
        yield batch


def _check_corpus(task: Task) -> None:
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


# What is there before


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


def kept_of(model: nn.Module, masks: Iterable[Mask] = ()) -> dict[str, Tensor]:
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
    return dead


def _is_turned(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def _turned(part: Part | None) -> bool:
    return part is not None and part.turned


def _scales(model: nn.Module) -> list[str]:
    """The parameters of norms: of modules that hold vectors and nothing else, one of them a scale."""
    found = []
    known = {name for name, _ in model.named_parameters()}
    for path, module in model.named_modules():
        own = {n: p for n, p in module._parameters.items() if p is not None}
        alone = not any(True for child in module.children() for _ in child.parameters())
        vectors = bool(own) and all(p.dim() == 1 for p in own.values())
        if alone and vectors and not isinstance(module, nn.PReLU) and own.keys() & {"weight", "scale", "gamma"}:
            found += [f"{path}.{n}" if path else n for n in own]
    return [name for name in found if name in known]


def _head(model: nn.Module) -> str | None:
    """The weight of the output layer: as the model says, or the last linear layer outside its blocks."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{block}." for stack in stacks(model) for block in stack)
    last = None
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and (module is output or not path.startswith(inside)):
            last = f"{path}.weight" if path else "weight"
            if module is output:
                return last
    return last


# The method


@dataclass(frozen=True, kw_only=True)
class Perp(Method):
    """Retrain a small part of a pruned model, with its zeros where they are."""

    subsets: tuple[Subset, ...] = (Biases(), Norms(), Head(), MaskLora())  # what is trained; the first to ask has it
    by: Way = Retrain()  # retrain: the task's loss; reconstruct: each block towards the dense one
    steps: int = 1000  # of training; a block's, when reconstructing
    rate: float = 5e-4  # learning rate of AdamW at its peak; the paper searches 5e-6 to 5e-3
    warmup: float = 0.1  # fraction of the steps in which the rate rises; it falls linearly after
    decay: float = 0.0  # weight decay
    after: Method | None = None  # what prunes first; none: the model is pruned already
    include: tuple[str, ...] = ()  # matrices that adapters go on, by name, class or role; () is every one in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        17,
        "PERP: rethinking the prune-retrain paradigm in the era of LLMs",
        arxiv="2312.15230",
        year=2023,
        when="recovery",
        needs=("training",),
        axes="recovery adapters rule",
        reports="OPT-2.7B to 30B: 0.27 to 0.35 % of the parameters suffice to match full retraining after magnitude "
        "pruning; at 50 % OPT-6.7B falls from 10.86 perplexity to 969 before any.",
        checked="tests/methods/test_perp.py::test_a_small_part_recovers_nearly_what_everything_does",
        differs=(
            "masks come from the edits, or from the zeros the model was given; they are never read again after that",
            "the number of examples in a step is the task's batch: there is no accumulation of gradients",
            "with after= a method prunes the whole model before blocks are reconstructed, and not block by block",
            "norms are known by what they hold, where the authors' code lists four classes",
            "the authors' scale_lora stops at a method that does not exist; here it is the paper's W * (B A)",
            "in half precision what is trained is kept in float32 beside the weight",
        ),
    )
    tiny: ClassVar = {"steps": 6, "rate": 5e-3}

    def budget(self) -> Budget | None:
        """That of the method before it, when there is one."""
        return None if self.after is None else self.after.budget()

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        if self.after is not None:
            self.after.check()
        if not self.subsets:
            raise SettingError("a recovery was asked for", "it trains nothing", "Give subsets=norms,mask-lora, say.")
        families = [s for s in self.subsets if isinstance(s, (MaskLora, LoraPrune, ScaleLora, Lora))]
        if len(families) > 1:
            raise SettingError(
                f"{' and '.join(type(s).__name__ for s in families)} were asked for",
                "a matrix takes one adapter",
                "Keep one of them; MaskLora is the paper's best.",
            )
        for subset in self.subsets:
            if getattr(subset, "rank", 1) < 1:
                raise SettingError(f"{subset} was asked for", "a rank is 1 at least", "Give 16, say.")
        if self.steps < 1 or not self.rate > 0 or self.decay < 0:
            raise SettingError(
                f"steps={self.steps}, rate={self.rate:g} and decay={self.decay:g} were asked for",
                "steps start at 1, a rate is above 0 and a decay is not below",
                "Give steps=1000, rate=5e-4 and decay=0.",
            )
        LearningRate(warmup=self.warmup)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises SiteError when nothing is there to train, BudgetError if a zero were filled in."""
        self.check()
        dense, masks = _beside.get()
        edits: list[Edit] = []
        notes: list[str] = []
        if self.after is not None:
            dense = copy.deepcopy(model) if self.by.dense else None
            done = self.after.run(model, task)
            model, edits, notes = done.model, list(done.edits), list(done.notes)
            masks = tuple({e.site.name: e for e in edits if isinstance(e, Mask)}.values())
        keep = kept_of(model, masks)
        chosen, said = self.choose(model, task, keep)
        if chosen.samples:
            edits += recalibrate_(model, _some(task, chosen.samples))
        history = History()
        changed: list[Edit] = []
        if chosen.whole or chosen.adapters:
            changed, history = self.by.mend(Work(self, model, task, chosen, keep, dense))
        check_kept(model, keep)
        gone = sum(int((~k).sum()) for k in keep.values())
        notes += [*said, f"{gone:,} zeros were kept in place" if gone else "no weight was zero: none had to be kept"]
        return Outcome(model, [*edits, *changed], history, notes=notes + history.notes)

    def choose(self, model: nn.Module, task: Task, keep: Mapping[str, Tensor]) -> tuple[Chosen, list[str]]:
        """The union of the subsets, and how large a share of the model each is. Raises SiteError when it is empty."""
        matrices: dict[str, Part] = {}
        if any(isinstance(s, (MaskLora, LoraPrune, ScaleLora, Lora)) for s in self.subsets):
            matrices = {s.parts[0].name: s.parts[0] for s in weights(model, self.include, self.exclude)}
        place = Place(model, matrices, keep, lambda name: generator(task, f"perp {name}"))
        named = dict(model.named_parameters())
        shared = tied_names(model)
        whole: list[str] = []
        behind: dict[str, nn.Module] = {}
        lines, notes = [], []
        total = sum(p.numel() for p in named.values())
        trained = samples = 0
        for subset in self.subsets:
            found = subset.choose(place)
            mine = [n for n in dict.fromkeys(found.whole) if n in named and n not in whole and n not in behind]
            on = {n: a for n, a in found.adapters.items() if n not in whole and n not in behind}
            for name in list(mine):
                half = named[name].element_size() < 4 and named[name].is_floating_point()
                if half and name in shared:
                    notes.append(f"{name} is shared, and is trained in {named[name].dtype} as it is")
                elif half:
                    mine.remove(name)
                    on[name] = adapters.Offset(named[name], keep.get(name))
            count = sum(named[n].numel() for n in mine) + sum(p.numel() for a in on.values() for p in a.parameters())
            lines.append(f"{type(subset).__name__} {count:,}")
            notes += [found.note] if found.note else []
            trained, samples = trained + count, max(samples, found.samples)
            whole += mine
            behind.update(on)
        if not trained and not samples:
            raise SiteError(
                f"{', '.join(type(s).__name__ for s in self.subsets)} of {type(model).__name__} were to be trained",
                "it has none of them",
                "Add another subset, such as mask-lora.",
            )
        share = (
            f"{trained:,} parameters were trained, {trained / total:.2%} of the model's {total:,}: {', '.join(lines)}"
        )
        return Chosen(tuple(whole), behind, samples), [share, *notes]
