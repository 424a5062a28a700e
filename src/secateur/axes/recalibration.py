"""The running statistics of batch norms: taken anew after pruning, and left alone by passes that should not count."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from secateur.edit import Edit, Update
from secateur.task import Batch, Task, modes_of, restore_modes_


@torch.no_grad()
def recalibrate_(model: nn.Module, batches: Iterable[Batch]) -> list[Edit]:
    """Take the running statistics of every batch norm anew: their mean over some batches, nothing being trained.

    Pruning shifts what reaches a norm; with the old mean and variance most of the accuracy is lost for no reason.
    """
    norms = {n: m for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None}
    if not norms:
        return []
    modes = modes_of(model)
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
        restore_modes_(model, modes)
    return [Update(f"{n}.{k}" if n else k, b.clone()) for n, m in norms.items() for k, b in m.named_buffers()]


def some(task: Task, samples: int) -> Iterator[Batch]:
    """Calibration batches of so many examples, or of all there are."""
    seen = 0
    for batch in task.batches("calibration"):
        if seen >= samples:
            return
        seen += batch.size
        yield batch


@contextmanager
def untracked(model: nn.Module) -> Iterator[None]:
    """Batch norms use a batch's own statistics and do not remember them."""
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    for module in norms:
        module.track_running_stats = False
    try:
        yield
    finally:
        for module in norms:
            module.track_running_stats = True
