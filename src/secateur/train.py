"""The one training loop, its six moments, and the whole training state as a value.

    start -> [before_forward -> loss -> before_step -> after_step] * steps -> finish

A `Rule` overrides only the moments it needs. `fit` runs a loop over a task; `attach` gives the same moments to an
optimizer of yours, so that the same rules work in any loop.
"""

import copy
import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from secateur.errors import EvidenceError, ModelError, ResumeError, SettingError, did_you_mean
from secateur.site import Part, Tensors, tensors, unwrapped
from secateur.task import Batch, Task, forever, generator, modes_of, restore_modes_

VERSION = 1


@dataclass
class History:
    """What a training run was like: a loss per step, whatever curves its rules logged, and what they remarked."""

    losses: list[float] = field(default_factory=list)
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name -> (step, value)
    notes: list[str] = field(default_factory=list)
    epoch: int = 0  # the first epoch that was not drawn from: where a next run finds data in a new order
    densities: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # site -> (step, share there from then)

    def log(self, name: str, step: int, value: float) -> None:
        """Add a point to a curve."""
        self.curves.setdefault(name, []).append((step, float(value)))

    def then(self, other: "History") -> "History":
        """This history followed by another, with its steps counted on."""
        offset = len(self.losses)
        notes = self.notes + [note for note in other.notes if note not in self.notes]
        curves = {k: list(v) for k, v in self.curves.items()}
        densities = {k: list(v) for k, v in self.densities.items()}
        joined = History(self.losses + other.losses, curves, notes, max(self.epoch, other.epoch), densities)
        for mine, theirs in ((joined.curves, other.curves), (joined.densities, other.densities)):
            for name, points in theirs.items():
                mine.setdefault(name, []).extend((step + offset, value) for step, value in points)
        return joined


@dataclass
class Loop:
    """Where a training run is: what the rules see, and may change, at each moment."""

    model: nn.Module
    optimizer: Optimizer
    steps: int  # in all
    task: Task | None = None  # None in a loop of the user's own
    rules: Sequence["Rule"] = ()
    batch: Batch | None = None
    step: int = 0  # steps taken so far
    epoch: int = 0
    place: int = 0  # batches of this epoch taken so far
    history: History = field(default_factory=History)
    processes: int = 1  # that train the model together, each on its share of every batch

    @property
    def progress(self) -> float:
        """The share of the steps taken, in [0, 1]."""
        return min(self.step / self.steps, 1.0) if self.steps else 1.0

    @property
    def tensors(self) -> Tensors:
        """The model's tensors by name."""
        return tensors(self.model)

    def log(self, name: str, value: float) -> None:
        """Add a point to a curve of the history at the present step."""
        self.history.log(name, self.step, value)

    def occupied(self, keep: Mapping[str, Tensor]) -> None:
        """Write down the share of units that masks leave at each site, where it is not what it was."""
        for name, mask in keep.items():
            share = int(torch.count_nonzero(mask)) / mask.numel() if mask.numel() else 1.0
            known = self.history.densities.setdefault(name, [])
            if not known or known[-1][1] != share:
                known.append((self.step, share))

    def note(self, text: str) -> None:
        """Remark on the run: in the history, and as a warning where no outcome will show it."""
        if text in self.history.notes:
            return
        self.history.notes.append(text)
        if self.task is None:
            warnings.warn(text, UserWarning, stacklevel=3)

    def agree(self, keep: Mapping[str, Tensor]) -> None:
        """Raise EvidenceError unless all processes that train the model have the same masks.

        Every process decides for itself, from weights that are the same in all: where they are not, masks would
        part in silence, and each process would train another network.
        """
        if self.processes == 1:
            return
        found = hashlib.blake2b(digest_size=7)
        for name in sorted(keep):
            found.update(np.packbits(keep[name].detach().ne(0).cpu().numpy()).tobytes())
        mine = int.from_bytes(found.digest(), "big")
        device = next((p.device for p in self.model.parameters()), None)
        ends = torch.tensor([mine, -mine], device=device)
        group = self.model.process_group if isinstance(self.model, DistributedDataParallel) else None
        dist.all_reduce(ends, dist.ReduceOp.MAX, group)
        if int(ends[0]) != -int(ends[1]):
            raise EvidenceError(
                f"masks were chosen in {self.processes} processes after {self.step} steps",
                "they are not the same in all, so neither are the weights or gradients they were chosen by",
                "Wrap the model in DistributedDataParallel, and give rules the same seed in every process.",
            )

    def reset(self, place: str | Part, where: Tensor | None = None) -> None:
        """Clear what the optimizer remembers of a tensor, or of the elements where a boolean is True.

        The boolean is broadcastable to the tensor, or to the part as it is seen, outputs first.
        """
        name = place if isinstance(place, str) else place.name
        if name not in self.tensors:
            raise SettingError(
                f"the optimizer was to forget {name!r}", "no tensor has that name", did_you_mean(name, self.tensors)
            )
        parameter = self.tensors[name]
        for value in self.optimizer.state.get(parameter, {}).values():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                seen = value if isinstance(place, str) else place.view(value)
                if where is None:
                    seen.zero_()
                else:
                    seen.masked_fill_(where.to(value.device), 0)


class Rule:
    """Behaviour inside a training loop. Override only the moments you need."""

    def start(self, loop: Loop) -> None:
        """Before the first step."""

    def before_forward(self, loop: Loop) -> None:
        """The batch is known, nothing is computed yet."""

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The loss, on its way to being differentiated: penalties, distillation."""
        return value

    def before_step(self, loop: Loop) -> None:
        """The gradients are ready."""

    def after_step(self, loop: Loop) -> None:
        """The weights have moved, and `loop.step` counts the step just taken."""

    def finish(self, loop: Loop) -> None:
        """After the last step."""

    def parameters(self) -> Sequence[Tensor]:
        """What the rule has trained by the loop's optimizer, beside the weights or in their place, such as scores."""
        return ()

    def state(self) -> dict[str, Any]:
        """What the rule must remember for a run to be taken up again: tensors, numbers and text."""
        return {}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """Take up again from what `state` gave; called after `start`."""


def fit(
    model: nn.Module,
    task: Task,
    steps: int,
    rules: Sequence[Rule] = (),
    optimizer: Optimizer | None = None,
    *,
    epoch: int = 0,
    watch: Callable[[Loop], None] | None = None,
    resume_from: "Snapshot | None" = None,
) -> History:
    """Train a model on a task for a number of optimizer steps; changes the model.

    `epoch` is the first epoch's number, from which the data order is drawn. `watch` is called after each step, for
    measuring; what it sees then is the model as the next forward pass will. `resume_from` takes a run up again at a
    snapshot's step and place in the data: `steps` still counts from the beginning. What is random in the model
    itself (dropout) is drawn from the task's seed, and the caller's generators are left as they were.

    Raises EvidenceError when the loss is not finite, ResumeError for a snapshot that does not belong to this run.
    """
    if steps < 0 or steps != int(steps):
        raise SettingError(
            f"{steps} training steps were asked for",
            f"a count cannot be {'negative' if steps < 0 else 'a fraction'}",
            f"Give {'0 or more' if steps < 0 else int(steps)}.",
        )
    if steps == 0:
        return History(epoch=epoch)
    rules = tuple(rules)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # an Update may share its storage with the record of edits
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = optimizer or task.optimizer(trainable)
    loop = Loop(model, optimizer, steps, task, rules, epoch=epoch, processes=processes_of(model))
    devices = {p.device for p in model.parameters()}
    device = next(iter(devices)) if len(devices) == 1 else None
    modes = modes_of(model)
    model.train()
    try:
        with seeded(model, generator(task, f"fit/{epoch}").initial_seed()):
            _start(loop, resume_from)
            if loop.step < steps:
                _run(loop, task, device, watch)
            for rule in rules:
                rule.finish(loop)
    finally:
        restore_modes_(model, modes)
    loop.history.epoch = loop.epoch + 1
    return loop.history


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Let whatever is random in a model (dropout, initial values) be drawn from a seed.

    The caller's generators, on the processor and on the model's devices, are as they were afterwards.
    """
    cuda = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=cuda):
        torch.set_rng_state(torch.Generator().manual_seed(seed).get_state())
        for device in cuda:
            torch.cuda.set_rng_state(torch.Generator(device).manual_seed(seed).get_state(), device)
        yield


def _start(loop: Loop, resume_from: "Snapshot | None") -> None:
    if resume_from is not None:
        if resume_from.step > loop.steps:
            raise ResumeError(
                f"a run of {loop.steps} steps was to be taken up again",
                f"the snapshot was taken after {resume_from.step}",
                "Give the number of steps of the whole run.",
            )
        resume_from.restore_(loop.model, loop.optimizer)
        loop.step, loop.epoch, loop.place = resume_from.step, resume_from.epoch, resume_from.place
    for rule in loop.rules:
        rule.start(loop)
    if resume_from is not None:
        resume_from.resume(loop)


def _run(loop: Loop, task: Task, device: torch.device | None, watch: Callable[[Loop], None] | None) -> None:
    first, taken = loop.epoch, loop.place
    for epoch, place, batch in forever(task, first):
        if epoch == first and place < taken:
            continue
        loop.epoch, loop.place = epoch, place
        loop.batch = batch if device is None else batch.to(device)
        for rule in loop.rules:
            rule.before_forward(loop)
        value = task.loss(loop.model, loop.batch)
        for rule in loop.rules:
            value = rule.loss(loop, value)
        loop.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(value)
        loop.history.losses.append(_finite(float(value.detach()), loop))
        _finite_gradients(loop)
        for rule in loop.rules:
            rule.before_step(loop)
        loop.optimizer.step()
        loop.step += 1
        loop.place += 1
        for rule in loop.rules:
            rule.after_step(loop)
        if watch is not None:
            watch(loop)
        if loop.step == loop.steps:
            return


def _finite(value: float, loop: Loop) -> float:
    if value != value or value in (float("inf"), float("-inf")):
        raise EvidenceError(
            f"step {loop.step + 1} of {loop.steps} was to be taken",
            f"its loss is {value}",
            "Lower the learning rate, or look for NaN in the data and the weights.",
        )
    return value


def _finite_gradients(loop: Loop) -> None:
    """Raise EvidenceError for a gradient that is not: one step with it, and the weights are lost."""
    found = [p.grad for group in loop.optimizer.param_groups for p in group["params"] if p.grad is not None]
    dense = [gradient for gradient in found if gradient.layout is torch.strided]
    if not dense or bool(torch.isfinite(torch.nn.utils.get_total_norm(dense))):
        return
    name = next((n for n, p in loop.tensors.items() if p.grad is not None and not bool(p.grad.isfinite().all())), None)
    if name is None:  # finite, and so large that their squares are not
        return
    raise EvidenceError(
        f"step {loop.step + 1} of {loop.steps} was to be taken",
        f"the gradient of {name} holds NaN or infinity",
        "Lower the learning rate, clip gradients by their norm, or look for NaN in the data.",
    )


def processes_of(model: nn.Module) -> int:
    """How many processes train a model together, told by DistributedDataParallel around it; 1 without."""
    return model.process_group.size() if isinstance(model, DistributedDataParallel) else 1


class Attached:
    """Rules on an optimizer of the user's own; see `attach`."""

    def __init__(self, loop: Loop, resume_from: "Snapshot | None" = None) -> None:
        self.loop = loop
        if resume_from is not None:
            loop.step = resume_from.step
        for rule in loop.rules:
            rule.start(loop)
        if resume_from is not None:
            resume_from.resume(loop)
        self._skipped = False
        self._hooks = [
            loop.optimizer.register_step_pre_hook(self._before_step),
            loop.optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        self._before_forward()

    def _before_forward(self) -> None:
        if self.loop.step < self.loop.steps:
            for rule in self.loop.rules:
                rule.before_forward(self.loop)

    def loss(self, value: Tensor) -> Tensor:
        """The loss with the rules' penalties; needed only for rules that have any."""
        for rule in self.loop.rules:
            value = rule.loss(self.loop, value)
        return value

    def _before_step(
        self, optimizer: Optimizer, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        # the optimizer itself comes first among what it is given
        closure = named.get("closure", given[1] if len(given) > 1 else None)
        if closure is not None:  # the gradients must be there before the rules look: it is called here, and only once
            with torch.enable_grad():
                value = closure()
            given, named = given[:1], {**named, "closure": lambda: value}
        # a fused optimizer under a gradient scaler is called even for a step that it will skip
        skipped = getattr(self.loop.optimizer, "found_inf", None)
        self._skipped = skipped is not None and bool(skipped)
        if not self._skipped:
            _finite_gradients(self.loop)
            for rule in self.loop.rules:
                rule.before_step(self.loop)
        return (given, named) if closure is not None else None

    def _after_step(self) -> None:
        if self._skipped:
            return
        self.loop.step += 1
        for rule in self.loop.rules:
            rule.after_step(self.loop)
        self._before_forward()

    def snapshot(self) -> "Snapshot":
        """The whole state now, to be saved and resumed from."""
        return Snapshot.of(self.loop.model, self.loop)

    def finish(self) -> History:
        """Run the last moment and take the hooks off; the model is plain again."""
        for hook in self._hooks:
            hook.remove()
        for rule in self.loop.rules:
            rule.finish(self.loop)
        return self.loop.history


def attach(
    optimizer: Optimizer,
    model: nn.Module,
    rules: Rule | Sequence[Rule],
    steps: int,
    resume_from: "Snapshot | None" = None,
    *,
    processes: int | None = None,
) -> Attached:
    """Give an optimizer's steps the moments of a loop: two lines in a training loop of your own.

        pruner = attach(optimizer, model, Gradual(...), steps=1000)
        ...                                        # train as ever; optimizer.step() does the rest
        pruner.finish()

    Counts optimizer steps, so gradient accumulation and skipped mixed-precision steps come out right. Between steps
    the model is what the forward pass sees, so that it can be measured and saved at any time. A model wrapped by
    torch.compile or DistributedDataParallel is given wrapped; tensors keep their plain names. `processes`: how many
    train it together, where something else than DistributedDataParallel adds up the gradients. `resume_from` gives
    the step and the rules' own state of `pruner.snapshot()`; the weights, the optimizer and the data are yours to
    restore first. Raises SettingError when the optimizer does not hold what the rules prune, ResumeError for a
    snapshot of other rules or of another number of processes.
    """
    if steps < 1:
        raise SettingError(f"{steps} training steps were asked for", "rules need one at least", "Give the whole run's.")
    if isinstance(optimizer, LBFGS):
        raise SettingError(
            "rules were to be attached to L-BFGS",
            "one of its steps goes through the loss many times, so that there is no moment before and after it",
            "Use SGD, Adam or another optimizer that steps once per gradient.",
        )
    every = (rules,) if isinstance(rules, Rule) else tuple(rules)
    _check_held(optimizer, model, every)
    number = processes_of(model) if processes is None else processes
    return Attached(Loop(model, optimizer, steps, rules=every, processes=number), resume_from)


def _check_held(optimizer: Optimizer, model: nn.Module, rules: Sequence[Rule]) -> None:
    """Raise SettingError for an optimizer that steps other tensors than those the rules work on."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    named = tensors(model)
    if not any(id(p) in held for p in [*named.values(), *(p for rule in rules for p in rule.parameters())]):
        raise SettingError(
            "an optimizer was to be attached to a model",
            "it holds none of the model's parameters",
            "Build the optimizer from this model's parameters, after any wrapping or cutting.",
        )
    pruned = {part.name for rule in rules for site in getattr(rule, "sites", ()) for part in site.parts}
    for name in sorted(pruned & named.keys()):
        if named[name].requires_grad and id(named[name]) not in held:
            raise SettingError(
                f"weights of {name} were to be pruned while they are trained",
                "the optimizer does not step them: it was built before the model was wrapped or cut, or without them",
                "Build it from this model's parameters; freeze what is not to be trained, or leave it out by exclude.",
            )


@dataclass(frozen=True, eq=False)
class Snapshot:
    """The whole training state at a moment; a value that can be saved, branched, averaged and rewound to.

    Weights and buffers always; of the loop it was taken in, when there was one, the optimizer, the step, the place
    in the data, the generator of dropout and what the rules remember. `weights_only` keeps the place and drops the
    rest: a rewound run starts with a fresh optimizer (Frankle et al. 2019, arXiv 1903.01611).
    """

    model: Mapping[str, Tensor]
    optimizer: Mapping[str, Any] | None = None
    step: int = 0
    epoch: int = 0
    place: int = 0
    rng: Tensor | None = None
    rules: tuple[Mapping[str, Any], ...] | None = None
    processes: int = 1  # that trained together

    @classmethod
    def of(cls, model: nn.Module, loop: Loop | None = None) -> "Snapshot":
        """Copy the state of a model, and of the loop it is in. Raises ModelError for weights not made yet."""
        model = unwrapped(model)
        for name, value in model.state_dict().items():
            if isinstance(value, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)):
                raise ModelError(
                    "a snapshot was to be taken",
                    f"{name} has no values before the first forward pass",
                    "Run the model once first, so that it can be put back to where it started.",
                )
            if not isinstance(value, Tensor):
                raise ModelError("a snapshot was to be taken", f"{name} is not a tensor", "Take it out of state_dict.")
        state = {k: v.detach().clone() for k, v in model.state_dict().items()}
        if loop is None:
            return cls(state)
        rules = tuple(copy.deepcopy(rule.state()) for rule in loop.rules)
        optimizer = copy.deepcopy(loop.optimizer.state_dict())
        rng = torch.get_rng_state()
        return cls(state, optimizer, loop.step, loop.epoch, loop.place, rng, rules, loop.processes)

    @classmethod
    def average(cls, snapshots: Sequence["Snapshot"], weights: Sequence[float] | None = None) -> "Snapshot":
        """The mean of several, in float64; counts of batches and the like are the first one's."""
        if not snapshots:
            raise SettingError("snapshots were to be averaged", "there are none", "Give one at least.")
        share = [1 / len(snapshots)] * len(snapshots) if weights is None else [w / sum(weights) for w in weights]
        if len(share) != len(snapshots):
            raise SettingError(
                f"{len(snapshots)} snapshots were to be averaged", f"there are {len(share)} weights", "Give one each."
            )
        state = {}
        for name, first in snapshots[0].model.items():
            if not first.is_floating_point():
                state[name] = first.clone()
                continue
            total = sum(s.model[name].double() * w for s, w in zip(snapshots, share, strict=True))
            assert isinstance(total, Tensor)
            state[name] = total.to(first.dtype)
        return cls(state)

    def weights_only(self) -> "Snapshot":
        """The same weights at the same place, for a run with a fresh optimizer and fresh rules."""
        return Snapshot(self.model, None, self.step, self.epoch, self.place)

    def restore_(self, model: nn.Module, optimizer: Optimizer | None = None) -> None:
        """Put the weights and buffers back, bit for bit, and the optimizer's state where both are there."""
        unwrapped(model).load_state_dict(dict(self.model))
        if optimizer is not None and self.optimizer is not None:
            optimizer.load_state_dict(copy.deepcopy(dict(self.optimizer)))

    def resume(self, loop: Loop) -> None:
        """Give dropout's generator and the rules back what they had. Raises what `check` raises."""
        self.check(loop)
        if self.rng is not None and loop.task is not None:
            torch.set_rng_state(self.rng)
        if self.rules is not None:
            for rule, state in zip(loop.rules, self.rules, strict=True):
                rule.resume(loop, copy.deepcopy(dict(state)))

    def check(self, loop: Loop) -> None:
        """Raise ResumeError for other rules than a loop has, and for another number of processes.

        A batch would be divided among more or fewer, so that neither the data nor the steps would be those of the run
        that is to go on.
        """
        if self.rules is None:
            return
        if self.processes != loop.processes:
            raise ResumeError(
                f"a run was to be taken up again in {_count(loop.processes)}",
                f"the snapshot was taken in {_count(self.processes)}",
                f"Start {self.processes}, or begin a new run from its weights: snapshot.weights_only().",
            )
        if len(self.rules) != len(loop.rules):
            raise ResumeError(
                f"a run with {len(loop.rules)} rules was to be taken up again",
                f"the snapshot was taken with {len(self.rules)}",
                "Give the same rules in the same order.",
            )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file, whole or not at all; what is not a tensor is JSON in its metadata."""
        from safetensors.torch import save_file

        values: dict[str, Tensor] = {}
        about = {
            "model": _plain(dict(self.model), values),
            "optimizer": _plain(self.optimizer, values),
            "rng": _plain(self.rng, values),
            "rules": _plain(self.rules, values),
            "step": self.step,
            "epoch": self.epoch,
            "place": self.place,
            "processes": self.processes,
        }
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        save_file(values, str(partial), metadata={"secateur_snapshot": str(VERSION), "about": json.dumps(about)})
        os.replace(partial, target)

    @classmethod
    def load(cls, path: str | Path) -> "Snapshot":
        """Read what `save` wrote. Raises ResumeError for any other file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                said = file.metadata() or {}
                if said.get("secateur_snapshot") != str(VERSION):
                    raise ResumeError(
                        f"a snapshot was to be read from {path}",
                        f"it says version {said.get('secateur_snapshot', 'none')}, and this is version {VERSION}",
                        "Start the run anew, or use the version of secateur that wrote it.",
                    )
                about = json.loads(said["about"])
                values = {name: file.get_tensor(name) for name in file.keys()}
            found = {k: _rich(v, values) for k, v in about.items()}
            return cls(**found)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            if isinstance(error, ResumeError):
                raise
            raise ResumeError(
                f"a snapshot was to be read from {path}", f"it is not whole: {error}", "Start the run anew."
            ) from error


def _count(processes: int) -> str:
    return "one process" if processes == 1 else f"{processes} processes"


def _plain(value: Any, values: dict[str, Tensor]) -> Any:
    """JSON for nested tensors, dictionaries, lists, tuples and plain values; the tensors go to `values`."""
    if isinstance(value, Tensor):
        name = f"t{len(values)}"
        values[name] = value.detach().cpu().clone().contiguous()
        return {"tensor": name}
    if isinstance(value, Mapping):
        return {"pairs": [[_plain(k, values), _plain(v, values)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {"tuple": [_plain(v, values) for v in value]}
    if isinstance(value, list):
        return [_plain(v, values) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ResumeError(
        "a snapshot was to be saved", f"it holds a {type(value).__name__}", "Keep tensors, numbers and text in states."
    )


def _rich(value: Any, values: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_rich(v, values) for v in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return values[value["tensor"]]
    if "tuple" in value:
        return tuple(_rich(v, values) for v in value["tuple"])
    return {_rich(k, values): _rich(v, values) for k, v in value["pairs"]}
