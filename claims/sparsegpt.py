"""What SparseGPT's update buys on each matrix of SmolLM2-135M: the error of its output, beside Wanda's."""

from statistics import median

import torch

from claims.harness import Claim, Expectation, Settings
from claims.wanda import smollm2, task_of
from secateur.axes import ObsSweep, PerRow, Rank, Wanda
from secateur.cut import weights
from secateur.edit import Mask, Update
from secateur.walk import walk


def error(change: torch.Tensor, gram: torch.Tensor) -> float:
    """||(W - W') X||^2 from the gram of the inputs."""
    return float((change.double() @ gram * change.double()).sum())


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    model, task = smollm2().model, task_of(seed, settings)
    sites = weights(model)
    swept, ranked = ObsSweep(), Rank(Wanda(), PerRow())
    ratios: list[float] = []
    for block in walk(model, task.batches("calibration", settings["samples"]), feed="dense"):
        here = block.pick(sites)
        seen = block.observe(here, {"gram", "input_square"})
        for site in here:
            weight, gram = block.tensors[site.name].detach(), seen[site.name].sums["gram"]
            (update, _) = swept.solve(site, block.tensors, seen[site.name], site.units // 2)
            (mask,) = ranked.solve(site, block.tensors, seen[site.name], site.units // 2)
            assert isinstance(update, Update)
            assert isinstance(mask, Mask)
            ratios.append(error(weight - update.value, gram) / error(weight * ~mask.keep, gram))
    return {
        "share of matrices better": sum(r < 1 for r in ratios) / len(ratios),
        "median error ratio": median(ratios),
        "worst error ratio": max(ratios),
        "matrices": float(len(ratios)),
    }


CLAIM = Claim(
    name="sparsegpt",
    number=0,
    says="Updating the weights that stay, by second-order information of the inputs, leaves less error in every "
    "matrix's output than choosing a mask alone.",
    source="arXiv:2301.00774, section 3",
    here="All 210 matrices in the blocks of SmolLM2-135M-Instruct at 50 %, each on the inputs of the dense model: "
    "32 windows of 256 tokens of C4 drawn by the seed. Perplexities are in the claim of wanda.",
    conditions=("matrices",),
    settings={"window": 256, "windows": 64, "samples": 32},
    large={"window": 2048, "windows": 140, "samples": 128},
    expects=(
        Expectation(
            "SparseGPT's error is below Wanda's on every matrix",
            "matrices",
            1.0,
            "share of matrices better",
            "higher",
            -1e-9,
            exact=True,
        ),
        Expectation("At the median it is below three quarters", "matrices", 0.75, "median error ratio", "lower"),
    ),
)
