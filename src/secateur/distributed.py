"""Several processes calibrate one model together: each goes through a share of the batches, and evidence is added.

    torchrun --nproc-per-node 2 -m secateur prune smollm2 wanda --out pruned

    with together() as ours:
        done = prune(model, Wanda(), ours.share(task))
        ours.agree(done.model)

Evidence is sums and a count, so that what the processes saw, added, is what one of them would have seen. Every process
holds the whole model and takes the same decisions from the same sums; only the passes over the data are divided. What a
method sums of activations by itself goes through `secateur.evidence.summed`.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn

from secateur.errors import EvidenceError, SettingError, TaskError
from secateur.evidence import Evidence, examples, merging
from secateur.site import tensors
from secateur.task import Around, Batch, Task

_Item = tuple[dict[str, Tensor], object]

PATIENCE = timedelta(days=1)  # how long one process waits for another: the first may be measuring, or saving


@dataclass(frozen=True)
class Processes:
    """This process among those that work together."""

    rank: int = 0
    count: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks and writes."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.count == 1

    def share(self, task: Task) -> Task:
        """The task with this process's share of the calibration data; all the rest is as it was."""
        return task if self.alone else Share(task, self)

    def agree(self, model: nn.Module) -> None:
        """Raise EvidenceError unless every process holds the same model by now."""
        if self.alone:
            return
        mine = _digest(model)
        found = _gathered(mine, self.count)
        if any(each != found[0] for each in found):
            raise EvidenceError(
                f"a model was pruned in {self.count} processes",
                "they end with different weights: the method looked at calibration data by itself, and not as evidence",
                "Run it in one process.",
            )


class Share(Around):
    """A task of whose calibration batches every so-manieth is this process's; all the rest is everybody's."""

    def __init__(self, task: Task, ours: Processes) -> None:
        super().__init__(task)
        self.ours = ours

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterable[Batch]:
        """See Task. Raises TaskError when there is less than one example for each process."""
        found = self.task.batches(split, n, epoch)
        if split != "calibration":
            return found
        held = list(found)
        if len(held) < self.ours.count:
            held = list(examples(held))
        if len(held) < self.ours.count:
            raise TaskError(
                f"{self.task.name} was to be shared out over {self.ours.count} processes",
                f"{len(held)} calibration examples were asked for",
                f"Ask for {self.ours.count} samples at least, or start fewer processes.",
            )
        return held[self.ours.rank :: self.ours.count]


@contextmanager
def together() -> Iterator[Processes]:
    """Within this, evidence is that of all processes which torchrun started; of this one alone, where it did not.

    Raises SettingError for a count and a rank that cannot be.
    """
    count, rank = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    if count == 1:
        yield Processes()
        return
    started = not dist.is_initialized()
    if started:
        dist.init_process_group("gloo", rank=rank, world_size=count, timeout=PATIENCE)
    try:
        token = _present.set(Processes(rank, count))
        try:
            with merging(lambda found: _added(found, count)):
                yield _present.get()
        finally:
            _present.reset(token)
    finally:
        if started:
            dist.destroy_process_group()


_present: ContextVar[Processes] = ContextVar("present", default=Processes())  # noqa: B039  a frozen value


def present() -> Processes:
    """The processes that work together here: those of `together`, and outside it this one alone."""
    return _present.get()


def shared(mine: Mapping[int, _Item], count: int) -> list[_Item]:
    """Every item of a list whose i-th was made by process i mod count, the same in all; `mine` is what this one made.

    An item is tensors by name and a value that JSON could hold. Every process must ask at the same moment.
    """
    ours = present()
    if ours.alone:
        return [mine[number] for number in range(count)]
    shapes: dict[int, tuple[dict[str, tuple[tuple[int, ...], torch.dtype]], object]] = {}
    about = {
        number: ({name: (tuple(v.shape), v.dtype) for name, v in held.items()}, said)
        for number, (held, said) in mine.items()
    }
    for each in _gathered(about, ours.count):
        shapes.update(each)  # type: ignore[call-overload]
    found: list[_Item] = []
    for number in range(count):
        kinds, said = shapes[number]
        tensors_: dict[str, Tensor] = {}
        for name, (shape, dtype) in kinds.items():
            here = number in mine
            value = mine[number][0][name].detach().cpu().contiguous() if here else torch.empty(shape, dtype=dtype)
            if value.numel():  # sent as bytes, so that it may be of any type
                dist.broadcast(value.reshape(-1).view(torch.uint8), src=number % ours.count)
            tensors_[name] = value
        found.append((tensors_, said))
    return found


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise SettingError(f"{name}={text} was given", "it is no count of processes", "Start with torchrun.")
    return int(text)


def _gathered(mine: object, count: int) -> list[object]:
    found: list[object] = [None] * count
    dist.all_gather_object(found, mine)
    return found


def _added(found: dict[str, Evidence], count: int) -> dict[str, Evidence]:
    """What all processes saw at each site, the same in every process."""
    met: dict[int, str] = {}
    # Sites that read one input share one sum: it is sent once. Experts may have seen tokens here and none elsewhere.
    mine = {
        name: (seen.count, {k: tuple(v.shape) for k, v in seen.sums.items()}, met.setdefault(id(seen), name))
        for name, seen in found.items()
    }
    theirs: list[dict[str, tuple[int, dict[str, tuple[int, ...]], str]]] = _gathered(mine, count)  # type: ignore[assignment]
    alike = len({str([(n, shapes, first) for n, (_, shapes, first) in each.items()]) for each in theirs}) == 1
    done: dict[str, Evidence] = {}
    for name in theirs[0]:  # in the order of the first process: all must send in one order
        first = mine[name][2]
        if alike and first in done:
            done[name] = done[first]
            continue
        shapes = {key: shape for each in theirs for key, shape in each[name][1].items()}
        sums = {key: _total(found[name].sums.get(key), shapes[key]) for key in sorted(shapes)}
        done[name] = Evidence(sum(each[name][0] for each in theirs), sums)
    return {name: done[name] for name in found}


def _total(mine: Tensor | None, shape: tuple[int, ...]) -> Tensor:
    """The sum over all processes of what each saw, zero where it saw nothing."""
    if mine is None:
        total = torch.zeros(shape, dtype=torch.float64)
        dist.all_reduce(total)
        return total
    total = mine.detach().double().cpu().contiguous().clone()
    dist.all_reduce(total)
    return total.to(mine.device)


def _digest(model: nn.Module) -> str:
    """A hash of every tensor's bytes."""
    found = hashlib.sha256()
    for name, value in tensors(model).items():
        found.update(f"{name}{tuple(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
