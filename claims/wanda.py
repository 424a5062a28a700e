"""The one-shot baselines on SmolLM2-135M: magnitude, Wanda, SparseGPT, OWL, in WikiText-2 perplexity."""

import copy
from functools import lru_cache

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from secateur.axes import NM, Owl, Pattern, PerMatrix, PerRow, PerSlab
from secateur.method import Method
from secateur.methods.magnitude import Magnitude
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.models import Opened, open_model
from secateur.task import Task
from secateur.tasks import wikitext2


@lru_cache(maxsize=1)
def smollm2() -> Opened:
    return open_model("smollm2")


def task_of(seed: int, settings: Settings) -> Task:
    return wikitext2(smollm2().tokenizer, window=settings["window"], windows=settings["windows"], batch=4, seed=seed)


def perplexity(model: nn.Module, task: Task) -> float:
    """In bfloat16, which leaves the third digit alone and takes half the time."""
    return task.measure(model.to(torch.bfloat16), "test")["perplexity"]


def method_of(condition: str, samples: int) -> Method:
    kind, _, target = condition.partition("@")
    pattern = NM(*map(int, target.split(":"))) if ":" in target else None
    sparsity = 0.5 if pattern else float(target)

    def unless_grouped(other: Pattern) -> Pattern:
        return pattern or other

    if kind == "magnitude":
        return Magnitude(sparsity=sparsity, pattern=unless_grouped(PerMatrix()))
    if kind == "sparsegpt":
        return SparseGPT(sparsity=sparsity, pattern=unless_grouped(PerSlab()), samples=samples)
    if kind == "owl":
        return Wanda(sparsity=sparsity, allocation=Owl(), samples=samples)
    return Wanda(sparsity=sparsity, pattern=unless_grouped(PerRow()), samples=samples)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model = task_of(seed, settings), copy.deepcopy(smollm2().model)
    if condition != "dense":
        model = method_of(condition, settings["samples"]).run(model, task).model
    return {"perplexity": perplexity(model, task)}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="wanda",
    number=0,
    says="At 50 % Wanda is far better than magnitude and close to SparseGPT, without any weight update: LLaMA-2-7B has "
    "WikiText-2 perplexity 5.12 dense, 14.89 by magnitude, 6.42 by Wanda, 6.51 by SparseGPT; groups of 2:4 cost more; "
    "spending by outliers (OWL) helps at high sparsity (LLaMA-7B at 70 %: 85.77 to 24.55).",
    source="arXiv:2306.11695, table 3 and README; arXiv:2310.05175, README",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 64 windows of 256 tokens; calibrated on 32 windows of 256 tokens of "
    "C4 drawn by the seed; evaluated in bfloat16.",
    conditions=(
        "dense",
        "magnitude@0.5",
        "magnitude@2:4",
        "wanda@0.5",
        "sparsegpt@0.5",
        "wanda@2:4",
        "sparsegpt@2:4",
        "wanda@0.6",
        "owl@0.6",
        "wanda@0.7",
        "owl@0.7",
    ),
    once=("dense", "magnitude@0.5", "magnitude@2:4"),
    settings={"window": 256, "windows": 64, "samples": 32},
    large={"window": 2048, "windows": 140, "samples": 128},
    expects=(
        beats("wanda@0.5", "magnitude@0.5", "Wanda has less than half the perplexity of magnitude at 50 %", 2.0),
        beats(
            "wanda@2:4", "magnitude@2:4", "Wanda has less than half the perplexity of magnitude in groups of 2:4", 2.0
        ),
        beats("sparsegpt@0.5", "wanda@0.5", "SparseGPT is no worse than Wanda at 50 %"),
        beats("dense", "sparsegpt@0.5", "The dense model is better than either"),
        beats("wanda@0.5", "wanda@2:4", "2:4 costs Wanda more than unstructured"),
        beats("sparsegpt@0.5", "sparsegpt@2:4", "2:4 costs SparseGPT more than unstructured"),
        beats("owl@0.6", "wanda@0.6", "OWL helps Wanda at 60 %", central=False),
        beats("owl@0.7", "wanda@0.7", "OWL helps Wanda at 70 %", central=False),
    ),
)
