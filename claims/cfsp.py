"""CFSP on SmolLM2-135M: neurons taken out by one forward pass, coarse and fine, and won back by adapters."""

import copy
from dataclasses import replace

from claims.flap import task_of
from claims.harness import Claim, Expectation, Settings
from claims.wanda import perplexity, smollm2
from secateur.axes import Uniform
from secateur.method import Method
from secateur.methods.cfsp import CFSP, Even, IgLora, Importance, Relative
from secateur.methods.flap import FLAP, ColumnNorm, PerLayer, Wifn
from secateur.outcome import time_pair


def method_of(condition: str, settings: Settings) -> Method:
    """The baselines are scores within FLAP's removal, restricted to neurons; only FLAP itself mends biases."""
    kind, _, target = condition.partition("@")
    shared = {"sparsity": float(target), "samples": settings["samples"]}
    alike = {**shared, "kinds": ("channel",), "allocation": PerLayer(), "compensate": False}
    if kind == "mag-sp":
        return FLAP(**alike, score=ColumnNorm())
    if kind == "wanda-sp":
        return FLAP(**alike, score=Wifn())
    if kind == "flap":
        return FLAP(**shared, kinds=("channel",))
    ours = CFSP(**shared, round_to=settings["round_to"])
    if kind == "fine":
        return replace(ours, allocation=Uniform())
    if kind == "equation 8":
        return replace(ours, score=Relative())
    lora = IgLora(rank=settings["rank"], steps=settings["steps"], rate=settings["rate"])
    if kind == "cfsp+lora":
        return replace(ours, recovery=replace(lora, by=Even()))
    if kind == "cfsp+ig-lora":
        return replace(ours, recovery=replace(lora, by=Importance()))
    return ours


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, dense = task_of(seed, settings), smollm2().model
    if condition == "dense":
        return {"perplexity": perplexity(copy.deepcopy(dense), task)}
    model, method = copy.deepcopy(dense), method_of(condition, settings)
    if isinstance(method, CFSP) and method.recovery is not None:  # calibrated and trained on shorter windows
        shorter = replace(task, window=settings["train_window"], batch=settings["batch"])
        model = method.run(model, shorter).model
    else:
        model = method.run(model, task).model
    before, after = time_pair(dense, model, task.example, repeats=5)
    return {
        "parameters": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters()),
        "speed": before.milliseconds / after.milliseconds,
        "perplexity": perplexity(model, task),
    }


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="cfsp",
    number=7,
    says="Neurons of feed-forward layers, chosen by one forward pass with widths that follow how much each block does, "
    "go at less cost than by magnitude, Wanda or FLAP at 20 to 50 %, and the model is up to about 1.5 times as fast; "
    "adapters whose rank follows the blocks' importance win back more than equal ones.",
    source="arXiv:2409.13199, abstract",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 24 windows of 256 tokens, in bfloat16; the sparsity is of neurons "
    "of feed-forward layers, widths are multiples of 32; calibrated on 16 windows of 256 tokens of WikiText-2 drawn by "
    "the seed. Magnitude and Wanda are FLAP's column scores within its removal, the same share of every block, no bias "
    "added; equation 8 is as others transcribe it; FLAP is whole, restricted to neurons. Adapters: rank 8 on average, "
    "12 steps of 2 windows of 96 tokens of C4, the same parameters in both. Speed: a forward pass over 128 tokens, "
    "beside the dense model.",
    conditions=(
        "dense",
        "mag-sp@0.3",
        "wanda-sp@0.3",
        "flap@0.3",
        "fine@0.3",
        "cfsp@0.3",
        "equation 8@0.3",
        "fine@0.5",
        "cfsp@0.5",
        "cfsp+lora@0.5",
        "cfsp+ig-lora@0.5",
    ),
    once=("dense", "mag-sp@0.3"),
    settings={
        "window": 256,
        "windows": 24,
        "samples": 16,
        "round_to": 32,
        "train_window": 96,
        "batch": 2,
        "rank": 8,
        "steps": 12,
        "rate": 5e-4,
    },
    large={
        "windows": 280,
        "samples": 128,
        "round_to": 128,
        "train_window": 256,
        "batch": 4,
        "steps": 200,
        "rate": 1e-4,
    },
    expects=(
        beats("cfsp@0.3", "fine@0.3", "Widths that follow the blocks beat the same width everywhere at 30 %"),
        beats("cfsp@0.5", "fine@0.5", "Widths that follow the blocks beat the same width everywhere at 50 %"),
        beats("cfsp@0.3", "wanda-sp@0.3", "CFSP beats Wanda at 30 %"),
        beats("cfsp@0.3", "mag-sp@0.3", "CFSP beats magnitude at 30 %"),
        beats("cfsp@0.3", "flap@0.3", "CFSP beats FLAP, restricted to neurons, at 30 %"),
        beats("cfsp+ig-lora@0.5", "cfsp+lora@0.5", "Ranks that follow the blocks beat equal ranks at equal parameters"),
        beats("fine@0.3", "wanda-sp@0.3", "Activity is no worse than Wanda at equal widths", 0.99, central=False),
        beats("equation 8@0.3", "cfsp@0.3", "Equation 8 beats the released score, activity alone", central=False),
        beats("cfsp+ig-lora@0.5", "cfsp@0.5", "Adapters halve the perplexity at 50 %", 2.0, central=False),
        Expectation(
            "Half of the neurons gone is faster", "cfsp@0.5", 1.1, "speed", "higher", ratio=True, central=False
        ),
    ),
)
