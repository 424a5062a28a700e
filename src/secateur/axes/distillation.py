"""What a dense network still teaches the pruned one: where in a picture it looks.

A map of attention is the mean square over the channels of a feature map, so teacher and student may have different
numbers of channels. Zagoruyko and Komodakis 2016, "Paying More Attention to Attention", arXiv:1612.03928, section 3.1.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import ModelError, SettingError, did_you_mean
from secateur.site import unwrapped
from secateur.train import Loop, Rule


def attention(features: Tensor) -> Tensor:
    """Where a feature map [batch, channels, ...] is loud: [batch, positions] of length 1; zeros where all is zero."""
    return F.normalize(features.float().square().mean(1).flatten(1), dim=1, eps=1e-12)


def attention_distance(teacher: Tensor, student: Tensor) -> Tensor:
    """How differently two feature maps look at the same pictures: from 0 to 2, the mean over the batch.

    The sum over positions of squared differences, so that it does not depend on the size of the map.
    """
    return (attention(teacher) - attention(student)).square().sum(1).mean()


class Distil(Rule):
    """The loss gets strength * the mean distance of attention from a teacher's, over some modules by name.

    Chu et al. 2023, arXiv:2306.01526, stage 3. The teacher is in evaluation and gets no gradient. The curve
    "attention" is the distance at each step.
    """

    def __init__(self, teacher: nn.Module, layers: Sequence[str], strength: float = 1.0) -> None:
        if not layers:
            raise SettingError("attention was to be distilled", "no layers were named", "Name some modules.")
        if not strength > 0:
            raise SettingError(
                f"distillation of strength {strength:g} was asked for", "it teaches only when above 0", "Give 1."
            )
        self.teacher, self.layers, self.strength = teacher, tuple(dict.fromkeys(layers)), strength
        self._seen: dict[str, dict[str, Tensor]] = {"teacher": {}, "student": {}}
        self._hooks: list[Any] = []

    def start(self, loop: Loop) -> None:
        """Listen to the modules of both. Raises ModelError for a module that one has not."""
        self.teacher.eval()
        for who, network in (("teacher", unwrapped(self.teacher)), ("student", unwrapped(loop.model))):
            modules = dict(network.named_modules())
            for name in self.layers:
                if name not in modules:
                    raise ModelError(
                        f"attention at {name} was to be distilled",
                        f"the {who} has no module of that name",
                        did_you_mean(name, modules),
                    )
                self._hooks.append(modules[name].register_forward_hook(self._listen(who, name)))

    def _listen(self, who: str, name: str) -> Any:
        return lambda module, args, out: self._seen[who].__setitem__(name, out)

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """Add the distance. Raises ModelError for maps of different sizes."""
        assert loop.batch is not None, "a loss is of a batch"
        with torch.no_grad():
            loop.batch.through(self.teacher)
        distances = []
        for name in self.layers:
            first, second = self._seen["teacher"][name], self._seen["student"][name]
            if first.dim() < 3 or first.shape[2:] != second.shape[2:]:
                raise ModelError(
                    f"attention at {name} was to be distilled",
                    f"the teacher gives {list(first.shape)} there and the student {list(second.shape)}",
                    "Name modules whose outputs are [batch, channels, height, width], of one height and width.",
                )
            distances.append(attention_distance(first, second))
        for seen in self._seen.values():
            seen.clear()
        distance = torch.stack(distances).mean()
        loop.log("attention", float(distance.detach()))
        return value + self.strength * distance

    def finish(self, loop: Loop) -> None:
        """Listen no more."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
