"""A task divided among owners (federated learning), or into what to forget and what to retain (unlearning).

What to forget can be a share, a class, or the images of a backdoor.
"""

from dataclasses import replace

import numpy as np
import torch

from secateur.errors import TaskError
from secateur.task import generator
from secateur.tasks.images import Images
from secateur.tasks.labelled import Labelled

DRAWS = 100  # divisions tried before one that leaves a client without examples is an error


def federated(task: Labelled, clients: int = 10, *, concentration: float = 0.5, least: int = 2) -> Labelled:
    """The task with its training examples divided among clients; its own splits stay the server's.

    Each class is shared out in proportions drawn from a Dirichlet distribution: the smaller the concentration, the
    fewer classes a client sees; infinity is an even division. Every client gets `least` examples or more. Raises
    TaskError when no such division is found.

    Source: Hsu, Qi and Brown 2019, arXiv 1909.06335, section 3.
    """
    *_, labels = _held(task, "train")
    if clients < 1 or not concentration > 0 or clients * least > len(labels):
        raise TaskError(
            f"{clients} clients of {task.name} with concentration {concentration:g} and {least} examples or more "
            "each were asked for",
            f"there are {len(labels):,} examples to divide, and a concentration is above 0",
            "Ask for fewer clients, or a concentration such as 0.5.",
        )
    stir = generator(task, "clients")
    draw = np.random.default_rng(stir.initial_seed())
    for _ in range(DRAWS):
        shares: list[list[torch.Tensor]] = [[] for _ in range(clients)]
        for label in torch.unique(labels).tolist():
            places = (labels == label).nonzero().squeeze(1)
            places = places[torch.randperm(len(places), generator=stir)]
            even = np.full(clients, 1 / clients)
            proportions = even if np.isinf(concentration) else draw.dirichlet(np.full(clients, concentration))
            cuts = torch.from_numpy((proportions.cumsum()[:-1] * len(places)).round().astype(np.int64))
            for share, some in zip(shares, torch.tensor_split(places, cuts), strict=True):
                share.append(some)
        owned = [torch.cat(share).sort().values for share in shares]
        if min(map(len, owned)) >= least:
            break
    else:
        raise TaskError(
            f"{clients} clients of {task.name} with {least} examples or more each were asked for",
            f"none of {DRAWS} divisions with concentration {concentration:g} has them",
            "Ask for fewer clients, or a higher concentration.",
        )
    held = tuple(
        replace(
            task,
            name=f"{task.name}, client {k}",
            splits={"train": tuple(tensor[places] for tensor in task.splits["train"])},
            seed=generator(task, f"client {k}").initial_seed() % 2**31,
            clients=(),
        )
        for k, places in enumerate(owned)
    )
    return replace(task, clients=held)


def _held(task: Labelled, split: str) -> tuple[torch.Tensor, ...]:
    """The tensors of a split that has examples. Raises TaskError for any other."""
    return task.trained_on(split).splits["train"]


def _part(labels: torch.Tensor, share: float) -> int:
    """How many examples a share is: none below 0, all above 1, and none where it is not a number."""
    return round(min(max(0.0, share), 1.0) * len(labels))  # max(0, nan) is 0, and max(nan, 0) would be nan


def forgetting(task: Labelled, *, share: float = 0.1, label: int | None = None) -> Labelled:
    """The task with its training examples divided into "forget" and "retain"; "train" stays whole.

    Forgets a share drawn by the seed, or every example of one class. Both splits come without augmentation and in
    the same order each time. A class that is forgotten whole is no longer asked for: "val" and "test" lose it. Raises
    TaskError when either would be empty.

    Source: Jia et al. 2023, arXiv 2304.04934, section 2: random data forgetting and class-wise forgetting.
    """
    *_, labels = _held(task, "train")
    if label is None:
        out = torch.zeros(len(labels), dtype=torch.bool)
        order = torch.randperm(len(labels), generator=generator(task, "forget"))
        out[order[: _part(labels, share)]] = True
    else:
        out = labels == label
    if not 0 < int(out.sum()) < len(labels):
        raise TaskError(
            f"{f'a share of {share:g}' if label is None else f'class {label}'} of {task.name} was to be forgotten",
            f"that is {int(out.sum()):,} of {len(labels):,} training examples",
            "Forget some and retain some: a share between 0 and 1, or a class that is there.",
        )
    parts = {"forget": out, "retain": ~out}
    divided = {split: tuple(tensor[where] for tensor in task.splits["train"]) for split, where in parts.items()}
    if label is not None:
        for split in ("val", "test"):
            if split in task.splits:
                asked = task.splits[split][-1] != label
                divided[split] = tuple(tensor[asked] for tensor in task.splits[split])
    return replace(task, splits={**task.splits, **divided})


def poisoned(task: Images, *, share: float = 0.05, label: int = 0, size: int = 4, margin: int = 2) -> Images:
    """The task with a backdoor in its training images: a white square, and the label that goes with it.

    A share of "train", drawn by the seed from the other classes, gets the square, `margin` pixels from the lower right
    corner, and the label. Those are "forget", the others "retain"; "trigger" is the test images of the other classes
    with the square and the label, so that the accuracy on it is the attack's success rate. Raises TaskError when
    either would be empty, or the square does not fit.

    Source: Gu, Dolan-Gavitt and Garg 2017, arXiv 1708.06733; Jia et al. 2023, arXiv 2304.04934, section 5.
    """
    (images, labels), (test, asked) = _held(task, "train"), _held(task, "test")
    if not bool((labels == label).any()):
        raise TaskError(
            f"images of {task.name} were to be poisoned with label {label}",
            f"its labels are {', '.join(map(str, torch.unique(labels).tolist()))}",
            "Give a class that is there: 0, say.",
        )
    others = (labels != label).nonzero().squeeze(1)
    count, room = _part(labels, share), min(images.shape[-2:])
    if not 0 < count <= len(others) or count == len(labels):
        raise TaskError(
            f"a share of {share:g} of {task.name} was to be poisoned with label {label}",
            f"that is {count:,} images, and {len(others):,} of {len(labels):,} have another label",
            "Poison some and keep some: 0.05, say.",
        )
    if size < 1 or margin < 0 or size + margin > room:
        raise TaskError(
            f"a square of {size} pixels was to be put {margin} from the corner of {task.name}",
            f"its images have {room}",
            "Give a smaller square.",
        )
    order = torch.randperm(len(others), generator=generator(task, "poison"))
    out = torch.zeros(len(labels), dtype=torch.bool)
    out[others[order[:count]]] = True
    attacked = asked != label

    def stamped(images: torch.Tensor) -> torch.Tensor:
        images = images.clone()
        last = [side - margin for side in images.shape[-2:]]
        images[..., last[0] - size : last[0], last[1] - size : last[1]] = task.scale
        return images

    images, labels = images.clone(), labels.clone()
    images[out], labels[out] = stamped(images[out]), label
    parts = {
        "train": (images, labels),
        "forget": (images[out], labels[out]),
        "retain": (images[~out], labels[~out]),
        "trigger": (stamped(test[attacked]), torch.full_like(asked[attacked], label)),
    }
    return replace(task, splits={**task.splits, **parts})
