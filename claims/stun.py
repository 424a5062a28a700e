"""STUN against Wanda and OWL alone at equal sparsity, on a mixture over characters; --large: on a split SmolLM2."""

import copy

import torch
from torch import nn

from claims.harness import Claim, Expectation, Settings
from claims.uncurl import SPLIT, general, mixture, quality
from secateur.axes import Owl, Random, Uniform
from secateur.axes.patterns import keep_top
from secateur.cut import weights
from secateur.edit import Remove, apply_
from secateur.evidence import Evidence
from secateur.graph.experts import mixtures
from secateur.methods.oneshot import OneShot
from secateur.methods.stun import STUN, RoutedWanda, Together, kurtosis
from secateur.site import tensors, total_units
from secateur.task import Task


def experts_for(model: nn.Module, sparsity: float, share: float) -> float:
    """The fraction of the experts that is a share of what a sparsity takes of the weights, or all that can go."""
    sites = weights(model)
    inside = sum(s.units for s in sites if ".experts." in s.name)
    layers = mixtures(model)
    most = 1 - sum(layer.top_k for layer in layers) / sum(layer.site.units for layer in layers)
    return min(share * sparsity * total_units(sites) / inside, most)


def stun(model: nn.Module, sparsity: float, share: float, settings: Settings, **parts: object) -> STUN:
    experts = experts_for(model, sparsity, share)
    return STUN(sparsity=sparsity, experts=experts, samples=settings["samples"], **parts)


def left(model: nn.Module) -> float:
    """Weights that are there and not zero, of those that could be pruned."""
    named = tensors(model)
    return float(sum(int((site.parts[0].read(named) != 0).sum()) for site in weights(model)))


def reversed_(model: nn.Module, task: Task, sparsity: float, share: float, settings: Settings) -> nn.Module:
    """Weights first, then experts: the same fractions in the other order."""
    method = stun(model, sparsity, share, settings)
    layers, batches = mixtures(model), list(task.batches("calibration", settings["samples"]))
    total, removals = total_units(weights(model)), method.removals(mixtures(model))
    each = sum(s.units for s in weights(model) if ".experts." in s.name) / sum(x.site.units for x in layers)
    first = 1 - (1 - sparsity) / (1 - removals * each / total)
    model = (
        OneShot(sparsity=first, samples=settings["samples"], criterion=RoutedWanda(), allocation=Owl())
        .run(model, task)
        .model
    )
    apply_(model, method.expert_edits(model, mixtures(model), removals, batches, []))
    return model


def at_random(model: nn.Module, task: Task, seed: int, sparsity: float, share: float, settings: Settings) -> nn.Module:
    """As many experts as STUN takes, any of them, as evenly as can be; then the same weights."""
    whole, layers = total_units(weights(model)), mixtures(model)
    removals = stun(model, sparsity, share, settings).removals(layers)
    for place, layer in enumerate(layers):
        fewer = removals * (place + 1) // len(layers) - removals * place // len(layers)
        score = Random(seed).score(layer.site, {}, Evidence())
        apply_(model, Remove(layer.site, keep_top(score, layer.site.units - fewer)))
    here = total_units(weights(model))
    rest = 1 - (1 - sparsity) * whole / here
    return STUN(sparsity=rest, experts=0.0, samples=settings["samples"]).run(model, task).model


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    torch.set_grad_enabled(True)
    name, _, target = condition.partition("@")
    kind, _, share = name.partition(":")
    task, dense = general(seed, settings), mixture(settings["model"]).model
    model, before = copy.deepcopy(dense), left(dense)
    if kind != "dense":
        sparsity, x = float(target), float(share or settings["share"])
        if kind == "wanda":
            model = stun(model, sparsity, 0.0, settings, allocation=Uniform()).run(model, task).model
        elif kind == "owl":
            model = stun(model, sparsity, 0.0, settings).run(model, task).model
        elif kind == "reverse":
            model = reversed_(model, task, sparsity, x, settings)
        elif kind == "random":
            model = at_random(model, task, seed, sparsity, x, settings)
        elif kind == "together":
            model = stun(model, sparsity, x, settings, distance=Together()).run(model, task).model
        else:
            model = stun(model, sparsity, x, settings).run(model, task).model
    named = tensors(model)
    found = {
        "sparsity": 1 - left(model) / before,
        "kurtosis": kurtosis(site.parts[0].read(named).detach() for site in weights(model)),
        "parameters": float(sum(p.numel() for p in model.parameters())),
    }
    return {**found, **quality(model, task)}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="stun",
    number=16,
    says="Experts first, weights second beats weights alone at equal sparsity: Snowflake Arctic at 40 % has 70.28 on "
    "GSM8K (dense 70.74) where OWL alone has 63.76, Mixtral-8x7B-Instruct at 65 % has 25.09 and 1.29; with a share"
    " of experts between none and all the best.",
    source="arXiv:2409.06211, abstract and tables (by way of a public note)",
    here="A Mixtral of 8 experts a layer over the characters of Tiny Shakespeare, perplexity on its held-out tenth; a "
    "fifth of what goes is experts (or the share after the colon, as far as a token's experts are left), by router"
    " rows, the rest by OWL; calibrated on 32 windows of 128 drawn by the seed; one set of weights, where the "
    "paper's redundancy differs from model to model. --large: SmolLM2-135M split into 16 experts a layer "
    "(tools/train_moe.py), WikiText-2.",
    conditions=(
        "dense",
        "wanda@0.4",
        "owl@0.4",
        "stun@0.4",
        "wanda@0.6",
        "owl@0.6",
        "stun:0.1@0.6",
        "stun@0.6",
        "stun:0.5@0.6",
        "stun:1@0.6",
        "together@0.6",
        "random@0.6",
        "reverse@0.6",
    ),
    once=("dense",),
    settings={"model": "char-mixtral", "window": 128, "windows": 200, "batch": 8, "samples": 32, "share": 0.2},
    large={"model": SPLIT, "window": 256, "windows": 16, "batch": 2, "samples": 16},
    expects=(
        beats("stun@0.4", "owl@0.4", "STUN beats OWL alone at 40 %"),
        beats("stun@0.6", "owl@0.6", "STUN beats OWL alone at 60 %"),
        beats("stun@0.4", "wanda@0.4", "STUN beats Wanda alone at 40 %", central=False),
        beats("stun@0.6", "wanda@0.6", "STUN beats Wanda alone at 60 %", central=False),
        beats("stun@0.6", "stun:1@0.6", "A fifth of the sparsity by experts beats all of it", central=False),
        beats("stun:0.1@0.6", "stun:0.5@0.6", "A tenth by experts beats a half", central=False),
        beats(
            "stun@0.6", "random@0.6", "Experts that behave alike are better ones to take out than any", central=False
        ),
        beats("stun@0.6", "reverse@0.6", "Experts first beats weights first", central=False),
        beats("stun@0.6", "together@0.6", "Router rows say as much as shared tokens", 0.98, central=False),
    ),
)
