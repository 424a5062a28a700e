"""What accuracy alone does not say: whether a classifier knows when it is wrong, and what a little noise does to it."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import TaskError
from secateur.task import Task, logits_of, stream
from secateur.tasks.labelled import Labelled, device_of, evaluating

CALIBRATION, NOISY = "calibration error", "accuracy under noise"
"""What the values are called."""

BINS = 15  # of confidence, as Guo et al. have them
NOISE = 0.5  # standard deviation of the noise, as a fraction of that of the input


def calibration_error(probabilities: Tensor, labels: Tensor, bins: int = BINS) -> float:
    """How far confidence is from being right, over bins of confidence: [n, classes] and [n] to a number in [0, 1].

    sum_b (n_b / n) |accuracy_b - confidence_b|. Guo, Pleiss, Sun, Weinberger 2017, arXiv:1706.04599, equation 3. Raises
    TaskError for no examples.
    """
    if not len(labels):
        raise TaskError("a calibration error was asked for", "there are no examples", "Give one at least.")
    sure, said = probabilities.double().max(1)
    right = (said == labels).double()
    place = (sure * bins).ceil().long().clamp(1, bins) - 1
    apart = torch.zeros(bins, dtype=torch.float64, device=sure.device).index_add_(0, place, right - sure)
    return float(apart.abs().sum() / len(labels))


class Noisy(nn.Module):
    """A model whose inputs of numbers carry Gaussian noise, `size` times as large as each varies, drawn by a seed."""

    def __init__(self, model: nn.Module, size: float, seed: int) -> None:
        super().__init__()
        self.model, self.size = model, size
        self.noise = stream(seed, "noise on inputs")

    def forward(self, *inputs: Tensor) -> Any:
        """What the model answers to inputs with noise."""
        return self.model(*(self._with(x) if x.is_floating_point() else x for x in inputs))

    def _with(self, x: Tensor) -> Tensor:
        noise = torch.randn(x.shape, generator=self.noise).to(x)
        return x + self.size * x.std() * noise


def robustness(model: nn.Module, task: Task, split: str, noise: float = NOISE) -> dict[str, float]:
    """{CALIBRATION, NOISY} of a classifier on a split; nothing for another task.

    Where inputs are not numbers, as tokens are, there is no noise to add, and that value is left out.
    """
    if not isinstance(task, Labelled):
        return {}
    found = {CALIBRATION: _calibration(model, task, split)}
    if any(isinstance(x, Tensor) and x.is_floating_point() for x in task.example.inputs):
        found[NOISY] = task.measure(Noisy(model, noise, task.seed), split)["accuracy"]
    return found


def _calibration(model: nn.Module, task: Labelled, split: str) -> float:
    device, answers, labels = device_of(model), [], []
    with evaluating(model):
        for batch in task.batches(split):
            batch = batch.to(device)
            answers.append(F.softmax(logits_of(batch.through(model)).float(), -1))
            labels.append(batch.target)
    return calibration_error(torch.cat(answers), torch.cat(labels))
