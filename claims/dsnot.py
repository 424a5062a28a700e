"""DSnoT on SmolLM2-135M: swaps on top of magnitude's and Wanda's choices, in perplexity and in each matrix's output."""

import copy
from statistics import fmean, median
from typing import Any

from claims.harness import Claim, Expectation, Settings
from claims.wanda import beats, perplexity, smollm2, task_of
from secateur.axes import NM, Dsnot, Magnitude, PerRow, Rank, Wanda
from secateur.axes.refiners import lacking
from secateur.cut import weights
from secateur.edit import Mask
from secateur.evidence import Evidence
from secateur.methods.oneshot import OneShot
from secateur.site import Site, Tensors
from secateur.walk import walk

REFINE: dict[str, dict[str, Any]] = {
    "dsnot": {"refine": Dsnot(), "only": ("attention",)},  # as published
    "everywhere": {"refine": Dsnot()},
    "stopping": {"refine": Dsnot(overshoot=False), "only": ("attention",)},  # a row ends before its error turns
    "": {},
}


def method_of(condition: str, samples: int) -> OneShot:
    """`wanda+dsnot@0.6`: the first choice, how it is refined, the target."""
    parts, _, target = condition.partition("@")
    first, _, refined = parts.partition("+")
    pattern = NM(2, 4) if target == "2:4" else PerRow()
    return OneShot(
        sparsity=0.5 if target == "2:4" else float(target),
        samples=samples,
        criterion=Magnitude() if first == "magnitude" else Wanda(),
        pattern=pattern,
        **REFINE[refined],
    )


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    if condition == "matrices":
        return matrices(seed, settings)
    task, model = task_of(seed, settings), copy.deepcopy(smollm2().model)
    model = method_of(condition, settings["samples"]).run(model, task).model
    return {"perplexity": perplexity(model, task)}


def matrices(seed: int, settings: Settings) -> dict[str, float]:
    """After over before, at 60 % from Wanda's choice on the dense model's inputs: |e|, and ||(W - W') X||^2."""
    model, task = smollm2().model, task_of(seed, settings)
    sites = weights(model)
    refiners = {"": Dsnot(), " when stopping": Dsnot(overshoot=False)}
    lack: dict[str, list[float]] = {name: [] for name in refiners}
    error: dict[str, list[float]] = {name: [] for name in refiners}
    for block in walk(model, task.batches("calibration", settings["samples"]), feed="dense"):
        here = block.pick(sites)
        seen = block.observe(here, Dsnot.needs | {"gram"})
        for site in here:
            plain = left(site, block.tensors, seen[site.name], None)
            for name, refiner in refiners.items():
                refined = left(site, block.tensors, seen[site.name], refiner)
                lack[name].append(refined[0] / plain[0])
                error[name].append(refined[1] / plain[1])
    values = {"matrices": float(len(lack[""]))}
    for name in refiners:
        values[f"mean error{name}"] = fmean(lack[name])
        values[f"output error{name}"] = median(error[name])
    return values


def left(site: Site, tensors: Tensors, seen: Evidence, refine: Dsnot | None) -> tuple[float, float]:
    """What a matrix's output lacks: the mean over rows of |e| per token, and ||(W - W') X||^2."""
    (mask,) = Rank(Wanda(), PerRow(), refine).solve(site, tensors, seen, site.units * 2 // 5)
    assert isinstance(mask, Mask)
    weight = tensors[site.name].detach().double()
    gone = weight * ~mask.keep
    missing = lacking(weight * seen.mean("input"), mask.keep).abs().mean()
    return float(missing), float((gone @ seen.sums["gram"] * gone).sum())


CLAIM = Claim(
    name="dsnot",
    number=28,
    says="Swapping weights of a finished mask, by the inputs' means and variances alone, lowers perplexity at high "
    "sparsity: LLaMA-7B at 70 % is 26.79 better than with Wanda's mask; gains at 50 % are small.",
    source="arXiv:2310.08915, abstract",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 32 windows of 256 tokens; calibrated on 16 windows of 256 tokens of "
    "C4 drawn by the seed; evaluated in bfloat16. Swaps in attention, as published, unless said otherwise. The mean "
    "error is that of a matrix's output on average over tokens, which the swaps lower by design; the output error is "
    "||(W - W') X||^2, at the median matrix.",
    conditions=(
        "magnitude@0.6",
        "magnitude+dsnot@0.6",
        "wanda@0.6",
        "wanda+dsnot@0.6",
        "wanda+everywhere@0.6",
        "wanda+stopping@0.6",
        "wanda@2:4",
        "wanda+dsnot@2:4",
        "matrices",
    ),
    once=("magnitude@0.6",),
    settings={"window": 256, "windows": 32, "samples": 16},
    large={"window": 2048, "windows": 140, "samples": 128},
    expects=(
        beats("magnitude+dsnot@0.6", "magnitude@0.6", "Swaps improve magnitude's choice at 60 %"),
        beats("wanda+dsnot@0.6", "wanda@0.6", "Swaps improve Wanda's choice at 60 %"),
        Expectation("The mean error is more than halved", "matrices", 0.5, "mean error", "lower"),
        beats("wanda+dsnot@2:4", "wanda@2:4", "Swaps improve Wanda's choice in groups of 2:4", central=False),
        beats("wanda+everywhere@0.6", "wanda+dsnot@0.6", "Swaps in the MLP help as well", central=False),
        beats("wanda+stopping@0.6", "wanda+dsnot@0.6", "Rows that stop before the sign turns do better", central=False),
        Expectation("The output error falls as well", "matrices", 1.0, "output error", "lower", central=False),
    ),
)
