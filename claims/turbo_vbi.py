"""Supports in a chain against supports apart and against magnitude: LeNet-300-100 and LeNet-5 on Fashion-MNIST."""

from functools import lru_cache

import torch
from torch import Tensor, nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import Global
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold, LearningRate
from secateur.cut import weights
from secateur.edit import Mask
from secateur.methods.magnitude import Magnitude
from secateur.methods.turbo_vbi import Grid, Marginal, MeanField, Rows, TurboVbi, as_matrix, empty_units, runs
from secateur.task import Task
from secateur.tasks.images import fashion_mnist
from secateur.tasks.learners import Adam
from secateur.train import Snapshot, fit

NETS = ("lenet-300-100", "lenet-5")
ALONE, TOGETHER = Rows(0.25, 0.75), Rows()


def network(name: str, seed: int) -> nn.Module:
    if name == "lenet-5":
        model = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
        )  # fmt: skip
    else:
        model = nn.Sequential(nn.Linear(784, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    reinitialize_(model, torch.Generator().manual_seed(seed))
    return model


@lru_cache(maxsize=4)
def task_of(name: str, seed: int, frozen: tuple) -> Task:
    settings = dict(frozen)
    return fashion_mnist(
        train_size=settings["images"],
        val_size=1000,
        flat=name != "lenet-5",
        seed=seed,
        batch=settings["batch"],
        learner=Adam(settings["rate"]),
    )


@lru_cache(maxsize=4)
def dense(name: str, seed: int, frozen: tuple) -> tuple[Snapshot, int]:
    """The dense network that every condition starts from, and the next unused epoch."""
    model = network(name, seed)
    history = fit(model, task_of(name, seed, frozen), dict(frozen)["first"])
    return Snapshot.of(model), history.epoch


def clusters(model: nn.Module, task: Task, keep: dict[str, Tensor]) -> dict[str, float]:
    """How the weights of masks lie: in runs along the rows, in blocks of 4 x 4, and in how many bytes."""
    found = {"runs": 0.0, "kept": 0.0, "blocks": 0.0, "empty": 0.0, "csr": 0.0, "blocked": 0.0}
    for mask in keep.values():
        matrix = as_matrix(mask)
        rows, columns = matrix.shape
        found["runs"] += runs(matrix)[0]
        kept = int(matrix.sum())
        wide = nn.functional.pad(matrix, (0, -columns % 4, 0, -rows % 4))
        held = wide.unflatten(0, (-1, 4)).unflatten(2, (-1, 4)).any(3).any(1)  # [rows / 4, columns / 4]
        found["kept"] += kept
        found["blocks"] += held.numel()
        found["empty"] += int((~held).sum())
        found["csr"] += 8 * kept + 4 * (rows + 1)  # a value and a column each, and where rows begin
        found["blocked"] += (4 * 16 + 4) * int(held.sum()) + 4 * (held.shape[0] + 1)
    units = sum(mask.numel() for mask in keep.values())
    gone = sum(mask.site.units - mask.kept for mask in empty_units(model, task.example, keep)[0])
    return {
        "sparsity": 1 - found["kept"] / units,
        "run length": found["kept"] / max(found["runs"], 1),
        "empty blocks": found["empty"] / found["blocks"],
        "neurons removed": float(gone),
        "csr kilobytes": found["csr"] / 1000,
        "blocked kilobytes": found["blocked"] / 1000,
    }


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, name = condition.partition(" ")
    kind, found = kind.removesuffix("@found"), kind.endswith("@found")
    frozen = tuple(sorted(settings.items()))
    task, model = task_of(name, seed, frozen), network(name, seed)
    start, epoch = dense(name, seed, frozen)
    start.restore_(model)
    before = network(name, seed)
    asked = settings["sparsity of lenet-5" if name == "lenet-5" else "sparsity"]
    if kind == "magnitude":  # as many more steps densely as the others take with their prior
        steps = settings["rounds"] * settings["steps"]
        epoch = fit(model, task, steps, epoch=epoch).epoch
        edits = Magnitude(sparsity=asked, allocation=Global()).run(model, task).edits
        fit(model, task, settings["recover"], [LearningRate(), Hold.of(edits)], epoch=epoch)
        keep = {e.site.name: e.keep for e in edits if isinstance(e, Mask)}
    else:
        more = {"marginal": {"turbo": Marginal()}, "mean-field": {"family": MeanField()}}.get(kind, {})
        method = TurboVbi(
            structure={"vbi": ALONE, "grid": Grid()}.get(kind, TOGETHER), sparsity=None if found else asked,
            kl=settings["kl"],
            rounds=settings["rounds"], steps=settings["steps"], tune=settings["recover"], **more,
        )  # fmt: skip
        done = method.run(model, task)
        model, sites = done.model, [site.name for site in weights(before)]
        firsts: dict[str, Tensor] = {}
        for edit in done.edits:  # the first mask of each matrix, of its whole size
            if isinstance(edit, Mask) and edit.site.name in sites:
                firsts.setdefault(edit.site.name, edit.keep)
        keep = firsts
    return {"accuracy": task.measure(model, "test")["accuracy"], **clusters(before, task, keep)}


def than(
    left: str, right: str, metric: str, says: str, better: str = "higher", margin: float | None = None, **more: bool
) -> Expectation:
    return Expectation(says, left, right, metric, better, margin, **more)  # type: ignore[arg-type]


MLP, CNN = "lenet-300-100", "lenet-5"
CLAIM = Claim(
    name="turbo_vbi",
    number=23,
    says="With a Markov prior on supports what is left of a network is more regular, in fewer clusters, at higher "
    "compression and equal or better accuracy than with independent or group priors.",
    source="arXiv:2302.10483, abstract and section V (simulations; its tables were not at hand)",
    here="LeNet-300-100 and LeNet-5 on 8,000 pictures of Fashion-MNIST: 320 steps densely, 320 with the prior, 80 with "
    "the masks held. `vbi` is the same without coupling (as many active beforehand), `magnitude` one global ranking "
    "after as many dense steps, each of which takes about half the time. At one sparsity the most likely active "
    "weights stay; `@found` is what the posterior says by itself. Rows of a kernel are outputs by kernel rows. The "
    "weight of the divergence, 0.3, and the sparsities were chosen on another seed.",
    conditions=(
        *(f"{kind} {net}" for net in (MLP, CNN) for kind in ("turbo", "vbi", "magnitude", "turbo@found", "vbi@found")),
        f"grid {MLP}",
        f"marginal@found {MLP}",
        f"mean-field@found {MLP}",
    ),
    expects=(
        than(
            f"turbo {MLP}",
            f"vbi {MLP}",
            "run length",
            "Runs are twice as long as without coupling",
            "higher",
            2.0,
            ratio=True,
        ),
        than(f"turbo {MLP}", f"magnitude {MLP}", "run length", "and as magnitude's", "higher", 2.0, ratio=True),
        than(f"turbo {MLP}", f"vbi {MLP}", "empty blocks", "More blocks of 4 x 4 are empty than without coupling"),
        than(f"turbo {MLP}", f"magnitude {MLP}", "empty blocks", "and than magnitude's"),
        than(
            f"turbo {MLP}",
            f"vbi {MLP}",
            "accuracy",
            "Accuracy is not half a point below that without coupling",
            "higher",
            -0.005,
        ),
        than(f"turbo {CNN}", f"vbi {CNN}", "run length", "Runs are longer in LeNet-5 too", central=False),
        than(
            f"turbo {CNN}", f"vbi {CNN}", "accuracy", "at an accuracy not a point below", "higher", -0.01, central=False
        ),
        than(
            f"turbo {MLP}",
            f"magnitude {MLP}",
            "accuracy",
            "Accuracy is not a point below magnitude's",
            "higher",
            -0.01,
            central=False,
        ),
        than(f"turbo {MLP}", f"vbi {MLP}", "neurons removed", "More neurons are left empty", central=False),
        than(
            f"turbo {MLP}",
            f"vbi {MLP}",
            "blocked kilobytes",
            "It takes less as blocks of 4 x 4",
            "lower",
            central=False,
        ),
        than(f"grid {MLP}", f"turbo {MLP}", "empty blocks", "A grid empties more blocks than rows do", central=False),
        than(f"turbo@found {MLP}", f"mean-field@found {MLP}", "sparsity", "The mean field removes less", central=False),
    ),
    seeds=(0, 1, 2, 3, 4),
    settings={
        "images": 8000,
        "batch": 100,
        "rate": 1e-3,
        "first": 320,
        "rounds": 4,
        "steps": 80,
        "recover": 80,
        "kl": 0.3,
        "sparsity": 0.9,
        "sparsity of lenet-5": 0.7,
    },
    large={"images": 55_000, "first": 5500, "rounds": 10, "steps": 1100, "recover": 1100, "kl": 1.0},
)
