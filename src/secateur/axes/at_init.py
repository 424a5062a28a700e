"""Choose by a probe before any training, then train what is left: what SNIP, GraSP and SynFlow share."""

from collections.abc import Sequence

from torch import nn

from secateur.axes.allocations import Allocation, gaps
from secateur.axes.probes import Probe, masks_by
from secateur.axes.rules import Hold, LearningRate
from secateur.edit import Edit, apply_
from secateur.errors import SettingError
from secateur.outcome import Outcome
from secateur.site import Site
from secateur.task import Task
from secateur.train import fit


def check_training(steps: int, rate_floor: float) -> None:
    """Raise SettingError for a training under a mask that cannot be; none at all, steps=0, can."""
    if steps < 0:
        raise SettingError(f"{steps} steps of training were asked for", "a count cannot be negative", "Give 0 or more.")
    LearningRate(floor=rate_floor)


def trained_from_start(
    model: nn.Module,
    task: Task,
    sites: Sequence[Site],
    probe: Probe,
    allocation: Allocation,
    sparsity: float,
    *,
    steps: int,
    rate_floor: float,
) -> Outcome:
    """Probe the weights as they are, keep the best, train with the mask held; changes the model."""
    reading = probe.read(model, sites, task, sparsity)
    masks = masks_by(sites, reading.scores, allocation, sparsity)
    edits: list[Edit] = apply_(model, masks)
    history = fit(model, task, steps, [LearningRate(floor=rate_floor), Hold.of(edits)])
    notes = [*reading.notes, *gaps(sites, {mask.site.name: mask.keep for mask in masks})]
    return Outcome(model, edits, history, notes=notes + history.notes)
