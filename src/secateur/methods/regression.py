"""Channel regression: keep the channels from which the next layer's output can be told, and solve its weights anew.

He, Zhang, Sun. "Channel Pruning for Accelerating Very Deep Neural Networks." ICCV 2017. arXiv:1707.06168, section 3.1.
With X what flows into the next layer of the network as it is by now, Y what that layer gave in the dense network, and
X_c W_c what channel c brings to it, layer after layer and in two steps:

    beta    argmin 1/2 |Y - sum_c beta_c X_c W_c|^2 + lambda |beta|_1, lambda falling until enough beta_c are not 0
    W       argmin |Y - sum_c X_c W_c|^2 over the channels that stay

Both need X^T X and X^T Y alone, so that no sample is kept.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.axes import keep_top, kept_of
from secateur.axes.filters import patches, read_alone, readers
from secateur.axes.recalibration import some
from secateur.axes.rules import LearningRate
from secateur.edit import Edit, Update, apply_
from secateur.errors import EvidenceError, SettingError
from secateur.graph import left_of, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Part, tensors
from secateur.task import Batch, Task, generator, modes_of, restore_modes_
from secateur.train import History, fit


def lasso(gram: Tensor, cross: Tensor, strength: float, start: Tensor, rounds: int = 200) -> Tensor:
    """argmin 1/2 b^T G b - c^T b + strength |b|_1 [channels], by accelerated proximal gradient from some start.

    Beck and Teboulle 2009, "A Fast Iterative Shrinkage-Thresholding Algorithm", section 4.
    """
    step = 1 / float(torch.linalg.matrix_norm(gram, 2))
    beta, ahead, weight = start, start, 1.0
    for _ in range(rounds):
        moved = F.softshrink(ahead - step * (gram @ ahead - cross), step * strength)
        after = (1 + (1 + 4 * weight**2) ** 0.5) / 2
        ahead = moved + (weight - 1) / after * (moved - beta)
        beta, weight = moved, after
    return beta


def told_from(gram: Tensor, cross: Tensor, count: int) -> Tensor:
    """The `count` channels from which the output is told best: bool [channels].

    The pull falls from where it leaves none until so many are not 0; of more, those of the largest beta.
    """
    strength, beta = float(cross.abs().max()), torch.zeros_like(cross)
    for _ in range(60):
        strength *= 0.8
        beta = lasso(gram, cross, strength, beta)
        if int((beta != 0).sum()) >= count:
            break
    return keep_top(beta.abs(), count)


def brought(weight: Tensor, owner: Tensor, units: int, gram: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
    """The gram of what units bring to an output, over places and outputs [units, units], and their products with it.

    weight [out, columns]; owner [columns], -1: nobody's; gram [columns, columns] and cross [columns, out] of what flows
    into it. With Z_c = X_c W_c, sum Z_c Z_d is the sum of X^T X * W^T W over the columns of both.
    """
    mine = owner >= 0
    pairs = (gram * (weight.T @ weight))[mine][:, mine]
    rows = pairs.new_zeros(units, pairs.shape[1]).index_add(0, owner[mine], pairs)
    both = pairs.new_zeros(units, units).index_add(1, owner[mine], rows)
    rest = cross - gram[:, ~mine] @ weight[:, ~mine].T  # what nobody owns is there whatever goes
    return both, pairs.new_zeros(units).index_add(0, owner[mine], (rest * weight.T).sum(1)[mine])


def solved(weight: Tensor, stays: Tensor, gram: Tensor, cross: Tensor, damp: float) -> Tensor:
    """Weights [out, columns] of least squares for the columns that stay, drawn to what they were; 0 elsewhere."""
    inside, old = gram[stays][:, stays], weight[:, stays].T
    ridge = damp * float(inside.diagonal().mean()) * torch.eye(len(inside), dtype=gram.dtype)
    new = torch.zeros_like(weight)
    new[:, stays] = (old + torch.linalg.solve(inside + ridge, cross[stays] - inside @ old)).T
    return new


@torch.no_grad()
def seen_at(
    model: nn.Module, dense: nn.Module, part: Part, batches: Iterable[Batch], places: int, draw: torch.Generator
) -> tuple[Tensor, Tensor]:
    """X^T X [columns, columns] and X^T Y [columns, out], float64, at random places of a layer's output, without bias.

    Raises EvidenceError where nothing flows in.
    """
    name = part.module
    module, whole = model.get_submodule(name), dense.get_submodule(name)
    given, gave = list[Tensor](), list[Tensor]()
    hooks = [
        module.register_forward_pre_hook(lambda m, args: given.append(args[0])),
        whole.register_forward_hook(lambda m, args, out: gave.append(out)),
    ]
    gram, cross = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    modes = modes_of(model)
    try:
        model.eval()
        for batch in batches:
            given.clear()
            gave.clear()
            batch.through(model)
            batch.through(dense)
            for value, out in zip(given, gave, strict=True):
                flat = patches(module, value).flatten(1, 2)  # [n, columns, positions]
                target = out.flatten(2) if isinstance(whole, nn.Conv2d) else out.reshape(len(out), -1, out.shape[-1]).mT
                if whole.bias is not None:
                    target = target - whole.bias[:, None]  # type: ignore[index]
                at = torch.randint(flat.shape[-1], (len(flat), places), generator=draw)
                each = torch.arange(len(flat))[:, None]
                x, y = (seen[each, :, at].flatten(0, 1).double() for seen in (flat, target))  # [n * places, ...]
                gram, cross = gram + x.T @ x, cross + x.T @ y
    finally:
        for hook in hooks:
            hook.remove()
        restore_modes_(model, modes)
    if not bool(gram.any()):
        raise EvidenceError(
            f"what flows into {part.name} was to be measured", "nothing does", "Give calibration data that reaches it."
        )
    return gram, cross


@dataclass(frozen=True, kw_only=True)
class Regression(Method):
    """Layer after layer, keep the channels that a LASSO keeps, solve the next layer's weights, and train at the end."""

    sparsity: float = 0.5  # fraction of the channels of each layer, in [0, 1)
    samples: int = 256  # examples
    places: int = 10  # of the next layer's output, in each example
    damp: float = 0.01  # how much the solved weights are drawn to what they were, as a share of the gram's diagonal
    recover: int = 500  # optimizer steps at the end
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start

    card: ClassVar = Card(
        0,
        "Channel Pruning for Accelerating Very Deep Neural Networks",
        arxiv="1707.06168",
        venue="ICCV",
        year=2017,
        granularity=("channel",),
        needs=("calibration", "labels", "training"),
        families=("cnn",),
        axes="solver",
        criterion=("activation",),
        tasks=("classification",),
        schedule=("custom",),
        allocation=("uniform",),
        updates=("solved", "trained"),
        reports="VGG-16 five times faster on ImageNet with 0.3 points more top-5 error, ResNet-50 twice with 1.4",
        checked="tests/methods/test_filter_methods.py::test_the_output_is_told_from_channels_and_weights_are_solved_by_hand",
        differs=(
            "channels that several layers write or read, as on shortcuts, are left alone; the paper samples what the "
            "first layer of a block reads",
            "solved weights are drawn a little to what they were, as few samples would be fitted too well",
            "beta is found once for each strength of the pull, and is not put into the weights: they are solved anew",
        ),
    )
    tiny: ClassVar = {"samples": 32, "places": 4, "recover": 8}

    def budget(self) -> Budget:
        """A fraction of the channels."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """Raise SettingError for a fraction, samples or training that cannot be."""
        check_sparsity(self.sparsity)
        for name, least in (("samples", 1), ("places", 1), ("recover", 0)):
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} was given", f"{least} is the least", "Give more.")
        if not self.damp > 0:
            raise SettingError(f"damp={self.damp:g} was given", "a gram of few samples has no inverse", "Give 0.01.")
        LearningRate(floor=self.rate_floor)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Of each layer in turn: measure, choose, solve, take out; then train."""
        self.check()
        sites, notes = read_alone(model, task.example)
        dense, draw, edits = copy.deepcopy(model).eval(), generator(task, "places"), list[Edit]()
        for place in range(len(sites)):
            site = sites[place]
            (part,) = readers(site)
            stays = max(1, kept_of(site.units, self.sparsity))
            if stays == site.units:
                continue
            gram, cross = seen_at(model, dense, part, some(task, self.samples), self.places, draw)
            value = tensors(model)[part.name].detach()
            weight, taps = value.flatten(1).double().cpu(), value[0, 0].numel()
            owner = part.owned().reshape(-1).cpu().repeat_interleave(taps)
            keep = told_from(*brought(weight, owner, site.units, gram.cpu(), cross.cpu()), stays)
            columns = (owner < 0) | keep[owner.clamp(min=0)]
            new = solved(weight, columns, gram.cpu(), cross.cpu(), self.damp).reshape(value.shape).to(value)
            edits += apply_(model, [Update(part.name, new), *removals([site], {site.name: keep})])
            sites = list(left_of(sites, {site.name: keep}))
        history = History()
        if self.recover:
            history = fit(model, task, self.recover, [LearningRate(floor=self.rate_floor)])
        return Outcome(model, edits, history, notes=notes + history.notes)
