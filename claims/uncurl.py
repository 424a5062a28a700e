"""UNCURL against experts taken out by use and at random, on a mixture over characters; --large: on a split SmolLM2."""

import copy
from functools import lru_cache

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import Random
from secateur.errors import EvidenceError
from secateur.method import Method
from secateur.methods.expert_removal import ExpertRemoval, RouterNorm
from secateur.methods.uncurl import UNCURL, MeanRows, RandomClusters
from secateur.models import Opened, open_model
from secateur.tasks import AdamW, Text, open_task, python_docs, wikitext2
from secateur.tasks.pack import cache
from secateur.train import fit

SPLIT = "smollm2-moe16"  # what tools/train_moe.py writes, in the folder of cached models


@lru_cache(maxsize=1)
def mixture(name: str) -> Opened:
    """The mixture that settings name: one of open_model's, or the one made by tools/train_moe.py."""
    if name != SPLIT:
        return open_model(name)
    folder = cache() / SPLIT
    if not (folder / "config.json").exists():
        raise EvidenceError(
            f"the mixture {SPLIT} was to be measured",
            f"it is not in {cache()}",
            "Make it first: python tools/train_moe.py, 25 minutes on one core.",
        )
    return open_model(folder)


def size_of(settings: Settings) -> dict[str, int]:
    return {name: settings[name] for name in ("window", "windows", "batch")}


def general(seed: int, settings: Settings) -> Text:
    """What the mixture was trained on: Shakespeare, or the text of the web with WikiText-2 to be measured on."""
    tokenizer = mixture(settings["model"]).tokenizer
    if tokenizer is not None:
        return wikitext2(tokenizer, seed=seed, **size_of(settings))
    found = open_task("tinyshakespeare", seed=seed, **size_of(settings))
    assert isinstance(found, Text)
    return found


def special(seed: int, settings: Settings) -> Text:
    """A task of its own: Python's documentation."""
    from secateur.tasks import Characters
    from secateur.tasks.corpora import read
    from secateur.tasks.pack import file

    tokenizer = mixture(settings["model"]).tokenizer
    if tokenizer is None:
        text = "".join(read(file("tinyshakespeare.txt.gz", "tinyshakespeare")))
        tokenizer = Characters(sorted(set(text)))
    return python_docs(tokenizer, seed=seed, learner=AdamW(settings["rate"]), **size_of(settings))


def method_of(kind: str, factor: int, seed: int, samples: int) -> Method:
    sparsity = 1 - 1 / factor
    if kind == "usage":
        return ExpertRemoval(sparsity=sparsity, samples=samples)
    if kind == "norm":
        return ExpertRemoval(sparsity=sparsity, samples=samples, criterion=RouterNorm())
    if kind == "random":
        return ExpertRemoval(sparsity=sparsity, samples=samples, criterion=Random(seed))
    merged = UNCURL(sparsity=sparsity, samples=samples)
    others = {
        "uncurl": merged,
        "rows": UNCURL(sparsity=sparsity, samples=samples, router=MeanRows()),
        "unaligned": UNCURL(sparsity=sparsity, samples=samples, align=False),
        "any": UNCURL(sparsity=sparsity, samples=samples, clustering=RandomClusters()),
    }
    return others[kind]


def quality(model: nn.Module, task: Text) -> dict[str, float]:
    return {"perplexity": task.measure(model, "test")["perplexity"]}


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    torch.set_grad_enabled(True)
    name, _, tuned = condition.partition("+")
    kind, _, factor = name.partition("@")
    task = special(seed, settings) if tuned else general(seed, settings)
    model = copy.deepcopy(mixture(settings["model"]).model)
    if kind != "dense":
        model = method_of(kind, int(factor), seed, settings["samples"]).run(model, task).model
    found = {"parameters": float(sum(p.numel() for p in model.parameters()))}
    if tuned:
        found["before"] = quality(model, task)["perplexity"]
        fit(model, task, settings["steps"])
    return {**found, **quality(model, task)}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="uncurl",
    number=12,
    says="For a task, merging experts whose router logits are alike halves their number, sometimes quarters it, without"
    " loss after fine-tuning; taking out the experts that the task uses least loses accuracy (SuperGLUE, mixtures "
    "of 8 to 128 experts).",
    source="arXiv:2409.01483, abstract; the figures come from a summary, not from the paper's own tables",
    here="A Mixtral of 8 experts, two a token, over the characters of Tiny Shakespeare, 1.8 M parameters. Without "
    "tuning: Shakespeare's held-out tenth. Tuned (+tuned): Python's documentation as a task of its own, experts "
    "chosen on it, then 60 steps of 8 windows; calibrated on 32 windows of 128 drawn by the seed. --large: "
    "SmolLM2-135M split into 16 experts a layer, four a token (tools/train_moe.py), WikiText-2 and Python's "
    "documentation. The small mixture trained from scratch that the paper compares with is not measured.",
    conditions=(
        "dense",
        "uncurl@2",
        "rows@2",
        "usage@2",
        "norm@2",
        "random@2",
        "any@2",
        "unaligned@2",
        "uncurl@4",
        "usage@4",
        "random@4",
        "uncurl@8",
        "dense+tuned",
        "uncurl@2+tuned",
        "usage@2+tuned",
        "random@2+tuned",
        "uncurl@4+tuned",
        "usage@4+tuned",
    ),
    once=("dense", "norm@2"),
    settings={
        "model": "char-mixtral",
        "window": 128,
        "windows": 200,
        "batch": 8,
        "samples": 32,
        "steps": 60,
        "rate": 1e-3,
    },
    large={"model": SPLIT, "window": 256, "windows": 16, "batch": 2, "samples": 16, "steps": 6, "rate": 1e-4},
    expects=(
        beats("uncurl@2", "usage@2", "Merging beats taking out the least used, half the experts left"),
        beats("uncurl@2", "random@2", "Merging beats taking out any, half the experts left"),
        beats(
            "uncurl@2+tuned", "usage@2+tuned", "After fine-tuning on a task, merging beats taking out the least used"
        ),
        beats("uncurl@2+tuned", "dense+tuned", "Half the experts cost at most a twentieth after fine-tuning", 1 / 1.05),
        beats("uncurl@4", "usage@4", "Merging beats taking out the least used, a quarter left", central=False),
        beats("uncurl@4+tuned", "usage@4+tuned", "The same after fine-tuning, a quarter left", central=False),
        beats("uncurl@2", "any@2", "Clusters by the router's logits beat any clusters", central=False),
        beats("uncurl@2", "unaligned@2", "Putting neurons in order helps", central=False),
        beats("uncurl@2", "rows@2", "Keeping the whole router is better than merging its rows", central=False),
        beats("usage@2", "random@2", "Usage says more than chance", central=False),
        beats("usage@2", "norm@2", "Usage says more than the norm of the router's rows", central=False),
        beats("uncurl@4", "uncurl@8", "A factor of 8 costs more than one of 4", central=False),
    ),
)
