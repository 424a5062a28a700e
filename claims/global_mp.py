"""One global threshold against layer-wise allocations and a rival that looks at gradients: ResNet-20 on CIFAR-10."""

from functools import lru_cache

from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import Erk, Global, Uniform
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.axes.schedules import Power, Schedule
from secateur.cut import weights
from secateur.edit import apply_
from secateur.methods.global_mp import flop_sparsity, magnitudes, masks_of, taylor_scores
from secateur.models.resnet import resnet20
from secateur.task import Task
from secateur.tasks import pack
from secateur.tasks.images import cifar10
from secateur.tasks.learners import Sgd
from secateur.train import fit

SPARSITIES = (0.8, 0.9, 0.95, 0.98)
ALLOCATIONS = {"global": Global(), "uniform": Uniform(), "erk": Erk()}
AT_ONCE = tuple(f"{kind}@{s}" for s in SPARSITIES for kind in ALLOCATIONS)
RIVALS = tuple(f"{kind}@0.95" for kind in ("taylor", "gradual uniform", "gradual global"))
COLLAPSE = ("no floor@0.999", "floor@0.999")


def pretrained() -> nn.Module:
    from safetensors.torch import load_file

    model = resnet20()
    path = pack.file("weights/resnet20_cifar10_jpeg.safetensors", "resnet20")
    model.load_state_dict(load_file(str(path)))
    return model


@lru_cache(maxsize=1)
def task_of(seed: int, images: int, test: int) -> Task:
    return cifar10(
        train_size=images,
        val_size=500,
        test_size=test,
        seed=seed,
        batch=128,
        learner=Sgd(0.02, decay=5e-5, nesterov=True),
    )


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    model, task = pretrained(), task_of(seed, settings["images"], settings["test"])
    sites, steps = weights(model), settings["steps"]
    kind, _, text = condition.partition("@")
    if kind == "dense":
        return {"before": task.measure(model, "test")["accuracy"]}
    sparsity = float(text)
    if kind.startswith("gradual"):
        schedule = Schedule(end=sparsity, until=settings["until"], curve=Power(3.0), every=settings["dt"])
        ramp = Gradual(sites, schedule, allocation=ALLOCATIONS[kind.split()[1]], holder=Hold(sites))
        fit(model, task, steps, [LearningRate(), ramp])
        masks = ramp.masks()
        found = {}
    else:
        taylor = kind == "taylor"
        scores = taylor_scores(model, sites, task, settings["samples"]) if taylor else magnitudes(model, sites)
        allocation = {**ALLOCATIONS, "no floor": Global(), "floor": Global(settings["floor"])}.get(kind, Global())
        masks = masks_of(sites, scores, allocation, sparsity)
        edits = apply_(model, masks)
        found = {"before": task.measure(model, "test")["accuracy"]}
        fit(model, task, steps, [LearningRate(), Hold.of(edits)])
    flops = flop_sparsity(model, masks, task.example)
    assert flops is not None
    density = [mask.kept / mask.site.units for mask in masks]
    return {
        **found,
        "accuracy": task.measure(model, "test")["accuracy"],
        "flop sparsity": flops,
        "lowest density": min(density),
        "highest density": max(density),
        "empty layers": float(sum(mask.kept == 0 for mask in masks)),
    }


CLAIM = Claim(
    name="global_mp",
    number=22,
    says="Plain global magnitude pruning with fine-tuning is ahead of elaborate allocations at equal sparsity, and a "
    "minimum per layer of 0.05 % of the weights prevents collapse at extreme sparsity.",
    source="arXiv:2209.14624, abstract and section 4",
    here="ResNet-20 on CIFAR-10 (JPEG copy, 88.3 % top-1), all convolutions and the classifier, fine-tuned for a few "
    "dozen steps of 128 on a subset at an equal budget; first-order Taylor as the elaborate rival. Collapse is shown "
    "at 99.9 %.",
    conditions=("dense", *AT_ONCE, *RIVALS, *COLLAPSE),
    expects=(
        Expectation(
            "before fine-tuning global is ahead of uniform at 80 %", "global@0.8", "uniform@0.8", "before", "higher"
        ),
        Expectation("after it too, at 95 %", "global@0.95", "uniform@0.95", "accuracy", "higher"),
        Expectation("and at 98 %", "global@0.98", "uniform@0.98", "accuracy", "higher"),
        Expectation(
            "global is not behind ERK by more than a point at 95 %",
            "global@0.95",
            "erk@0.95",
            "accuracy",
            "higher",
            margin=-0.01,
        ),
        Expectation(
            "nor behind the first-order rival", "global@0.95", "taylor@0.95", "accuracy", "higher", margin=-0.01
        ),
        Expectation(
            "a floor restores what collapsed at 99.9 %",
            "floor@0.999",
            "no floor@0.999",
            "accuracy",
            "higher",
            central=False,
        ),
        Expectation(
            "uniform saves more multiply-adds at 95 %",
            "uniform@0.95",
            "global@0.95",
            "flop sparsity",
            "higher",
            exact=True,
            central=False,
        ),
        Expectation(
            "a ramp narrows that",
            "gradual global@0.95",
            "global@0.95",
            "flop sparsity",
            "higher",
            central=False,
        ),
        Expectation(
            "a global ramp is ahead of a layer-wise one at 95 %",
            "gradual global@0.95",
            "gradual uniform@0.95",
            "accuracy",
            "higher",
            central=False,
        ),
    ),
    once=("dense",),
    settings={"images": 5000, "test": 2000, "steps": 40, "until": 0.5, "dt": 4, "samples": 512, "floor": 0.0002},
    large={"images": 45_000, "test": 10_000, "steps": 3000, "dt": 50, "samples": 4096},
)
