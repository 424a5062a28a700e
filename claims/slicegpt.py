"""SliceGPT on SmolLM2-135M: bases for the residual stream at equal width, in WikiText-2 perplexity."""

import copy
from functools import lru_cache

import torch
from torch import Tensor, nn

from claims.harness import Claim, Expectation, Settings
from secateur.methods.slicegpt import (
    Basis,
    PcaGlobal,
    PcaPerBlock,
    RandomBasis,
    RawChannels,
    SliceGPT,
    pooled_moments,
)
from secateur.models import Opened, open_model
from secateur.outcome import time_pair
from secateur.stream import follow, fuse
from secateur.tasks import wikitext2
from secateur.tasks.text import Text


@lru_cache(maxsize=1)
def smollm2() -> Opened:
    return open_model("smollm2")


def task_of(seed: int, settings: Settings, calibration: str = "wikitext2") -> Text:
    return wikitext2(
        smollm2().tokenizer,
        calibration="c4" if calibration == "c4" else "wikitext2",
        window=settings["window"],
        windows=settings["windows"],
        batch=4,
        seed=seed,
    )


def perplexity(model: nn.Module, task: Text) -> float:
    """In bfloat16, which leaves the third digit alone and takes half the time."""
    return task.measure(model.to(torch.bfloat16), "test")["perplexity"]


@lru_cache(maxsize=1)
def moments_of(seed: int, window: int, samples: int) -> Tensor:
    """Second moments of the whole dense stream, which two of the baselines share."""
    task = task_of(seed, {"window": window, "windows": 1})
    model = copy.deepcopy(smollm2().model)
    stream = follow(model, task.example)
    for edit in fuse(model, stream):
        edit.apply_(model)
    return pooled_moments(model, stream, list(task.batches("calibration", samples)))[0]


class Known:
    """A basis for the whole stream, of moments that are known already."""

    own, measures = False, False

    def __init__(self, basis: Basis, moments: Tensor) -> None:
        self.basis, self.moments = basis, moments

    def axes(self, moments: Tensor, draw: torch.Generator) -> Tensor:
        return self.basis.axes(self.moments, draw)


def basis_of(kind: str, seed: int, settings: Settings) -> Basis:
    if kind in ("global", "raw"):
        moments = moments_of(seed, settings["window"], settings["samples"])
        return Known(PcaGlobal() if kind == "global" else RawChannels(), moments)
    return RandomBasis() if kind == "random" else PcaPerBlock()


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, target = condition.partition("@")
    task, dense = task_of(seed, settings, kind), smollm2().model
    if kind == "dense":
        return {"perplexity": perplexity(copy.deepcopy(dense), task)}
    method = SliceGPT(sparsity=float(target or 0), samples=settings["samples"], basis=basis_of(kind, seed, settings))
    model = method.run(copy.deepcopy(dense), task).model
    whole = sum(p.numel() for p in dense.parameters())
    found = {"parameters": sum(p.numel() for p in model.parameters()) / whole}
    if kind == "exact":
        batch = next(iter(task.batches("test", 4)))
        with torch.no_grad():
            off = batch.through(model).logits - batch.through(dense).logits
        found["logit_change"] = float(off.abs().max())
        alone = task_of(seed, {**settings, "windows": 8})  # float32: bfloat16 would add its own rounding
        before, after = (alone.measure(m, "test")["perplexity"] for m in (dense, model))
        found["perplexity_change"] = abs(after / before - 1)
        return found
    if kind == "pca":
        first, second = time_pair(dense, model, task.example, repeats=settings["repeats"])
        found["time"] = second.milliseconds / first.milliseconds
    return {**found, "perplexity": perplexity(model, task)}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="slicegpt",
    number=39,
    says="A transformer's function is the same in any basis of its residual stream; in the principal axes of each "
    "block's signal a quarter of the directions can be deleted at little cost: LLaMA-2-7B has WikiText-2 perplexity "
    "5.47 dense, 6.64 with 20 %, 7.24 with 25 % and 8.12 with 30 % of the width sliced.",
    source="arXiv:2401.15024, theorem 1 and table 1",
    here="SmolLM2-135M-Instruct (width 576, 30 blocks), WikiText-2 test, 64 windows of 256 tokens; calibrated on 32 "
    "windows of 256 tokens of the validation split (c4: of C4) drawn by the seed; evaluated in bfloat16, the exact "
    "condition and times in float32. One basis for the whole stream: principal axes of it (global), its own channels "
    "by mean square (raw), a random rotation (random).",
    conditions=(
        "dense",
        "exact",
        "pca@0.1",
        "pca@0.2",
        "pca@0.25",
        "pca@0.3",
        "global@0.2",
        "global@0.3",
        "raw@0.2",
        "raw@0.3",
        "random@0.2",
        "random@0.3",
        "c4@0.25",
    ),
    once=("dense", "exact"),
    settings={"window": 256, "windows": 64, "samples": 32, "repeats": 6},
    large={"window": 2048, "windows": 140, "samples": 128},
    expects=(
        Expectation(
            "Fused and turned at full width, no logit moves by 0.001",
            "exact",
            1e-3,
            "logit_change",
            "lower",
            exact=True,
        ),
        Expectation(
            "Fused and turned at full width, the perplexity stays",
            "exact",
            1e-4,
            "perplexity_change",
            "lower",
            exact=True,
        ),
        beats("pca@0.2", "global@0.2", "A basis per block beats one for all at 20 %"),
        beats("pca@0.3", "global@0.3", "A basis per block beats one for all at 30 %"),
        beats(
            "global@0.2", "raw@0.2", "Principal axes have at most two thirds of raw channels' perplexity at 20 %", 1.5
        ),
        beats(
            "global@0.3", "raw@0.3", "Principal axes have at most two thirds of raw channels' perplexity at 30 %", 1.5
        ),
        beats("raw@0.2", "random@0.2", "Raw channels beat a random basis at 20 %", central=False),
        beats("raw@0.3", "random@0.3", "Raw channels beat a random basis at 30 %", central=False),
        beats(
            "pca@0.1",
            "dense",
            "10 % costs at most 1.32 times the dense perplexity",
            1 / 1.32,
            central=False,
        ),
        beats(
            "pca@0.25",
            "dense",
            "25 % costs at most 1.32 times the dense perplexity, as on LLaMA-2-7B",
            1 / 1.32,
            central=False,
        ),
        beats("pca@0.25", "c4@0.25", "Calibrating on the domain that is measured helps", central=False),
        Expectation("25 % of the width makes a forward pass faster", "pca@0.25", 1.0, "time", "lower", central=False),
    ),
)
