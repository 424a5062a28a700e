"""Sparse pre-training against dense twins, windows of the compute against each other, and one law for both."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes.clipping import Clip
from secateur.axes.rules import LearningRate
from secateur.cut import weights
from secateur.methods.average_parameters import AverageParameters, window
from secateur.site import total_units
from secateur.studies.scaling_law import Run, fit_law, pair, relative_error
from secateur.task import Task
from secateur.tasks.corpora import Characters, c4
from secateur.tasks.learners import AdamW
from secateur.train import fit

LETTERS = ("\n", *map(chr, range(32, 127)))
LEVELS = (0.4, 0.6, 0.8)
WINDOWS = {"0-0": (0.0, 0.0), "0-50": (0.0, 0.5), "50-100": (0.5, 1.0)}
"""Beside 25-75, which is the sparse run at 80 %."""
GRID = ((0.5, 0.3), (0.5, 2.0), (1.0, 0.3), (1.0, 1.0), (1.5, 0.5), (1.5, 2.2))
"""Dense runs of the law: width as a share of the whole network's, and steps as a share of its budget."""


def network(width: int, inner: int, settings: Settings) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        max_position_embeddings=settings["window"],
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def sizes(settings: Settings, widest: int) -> list[tuple[int, int]]:
    """Widths and the MLPs' inner widths: as wide as the heads divide, the inner within a quarter of its usual share."""
    step, found = 2 * settings["heads"], list[tuple[int, int]]()
    for width in range(step, widest + 1, step):
        usual = width * settings["inner"] / settings["width"]
        fine = max(round(usual / 40), 1) * 2
        found += [(width, inner) for inner in range(round(0.8 * usual), round(1.25 * usual) + 1, fine) if inner]
    return found


def drawn(width: int, inner: int, seed: int, settings: Settings) -> nn.Module:
    model = network(width, inner, settings)
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0, 0.02, generator=draw)
    return model.to(settings["device"])


@cache
def _text(length: int, batch: int, windows: int, rate: float) -> Any:
    return c4(Characters(LETTERS), window=length, batch=batch, windows=windows, learner=AdamW(rate, decay=0.01))


def task_of(seed: int, settings: Settings) -> Task:
    held = _text(settings["window"], settings["batch"], settings["windows"], settings["rate"])
    return replace(held, seed=seed)


def measured(model: nn.Module, task: Task, steps: int, average: float, settings: Settings) -> dict[str, float]:
    sites = weights(model)
    left = sum(int(torch.count_nonzero(model.get_parameter(site.name))) for site in sites)
    return {
        "loss": task.measure(model, "val")["nll"],
        "parameters": float(total_units(sites)),
        "average": average,
        "final": float(left),
        "tokens": float(steps * settings["batch"] * settings["window"]),
    }


def dense(width: int, inner: int, steps: int, seed: int, settings: Settings) -> dict[str, float]:
    model, task = drawn(width, inner, seed, settings), task_of(seed, settings)
    fit(model, task, steps, [LearningRate(warmup=0.05, floor=0.1), Clip(1.0)])
    return measured(model, task, steps, float(total_units(weights(model))), settings)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, rest = condition.partition("@")
    budget, width, inner = settings["budget"], settings["width"], settings["inner"]
    if kind == "dense":
        share, length = (float(part) for part in rest.split("x"))
        return dense(round(width * share), round(inner * share), round(budget * length), seed, settings)
    if kind == "twin":
        plan = window(budget, float(rest), every=settings["every"])
        made = pair(lambda size: network(*size, settings), (width, inner), sizes(settings, width), plan)
        assert made.mismatch < 0.02
        small, within = made.size
        return dense(small, within, plan.steps, seed, settings)
    begin, until = WINDOWS.get(kind, (0.25, 0.75))
    model, task = drawn(width, inner, seed, settings), task_of(seed, settings)
    method = AverageParameters(
        sparsity=float(rest), budget_steps=budget, begin=begin, until=until, every=settings["every"]
    )
    outcome = method.run(model, task)
    assert outcome.history is not None
    average = outcome.history.curves["average parameters"][-1][1]
    return measured(model, task, method.window().steps, average, settings)


def derive(seen: Measured) -> Mapping[str, Mapping[str, float]]:
    """The law of the dense runs, and how far off it is on sparse ones by each way of counting their parameters."""
    plain = [found for name, found in seen.items() if name.startswith(("dense", "twin"))]
    sparse = [seen[f"sparse@{level}"] for level in LEVELS]
    law = fit_law([Run(found["parameters"], found["tokens"], found["loss"]) for found in plain])
    error = {
        f"law by {way}": {
            "relative error": relative_error(law, [Run(f[key], f["tokens"], f["loss"]) for f in sparse]),
        }
        for way, key in (("average", "average"), ("final", "final"), ("initial", "parameters"))
    }
    compute = [found["average"] * found["tokens"] for found in seen.values()]
    about = {"alpha": law.alpha, "beta": law.beta, "floor": law.E, "residual": law.residual}
    return error | {"law": {**about, "range of compute": max(compute) / min(compute)}}


CLAIM = Claim(
    name="average_parameters",
    number=8,
    says="Pruned between 25 and 75 % of the pre-training compute, a network is as good as a dense one trained on as "
    "many tokens that has as many parameters as it had on average: final losses of four 1B pairs are 2.133 and 2.139, "
    "2.137 and 2.161, 2.182 and 2.209, 2.228 and 2.237; one law in the mean count fits sparse and dense runs.",
    source="arXiv:2501.12486, abstract, and the cards of the released models",
    here="A four-layer Llama on characters of C4, 40, 60 and 80 % sparse at equal compute; dense twins with as many "
    "weights as the sparse ones had on average, on as many tokens; three other windows at 80 %; the law fitted to nine "
    "dense runs over more than a thirtyfold range of compute.",
    conditions=(
        *(f"sparse@{level}" for level in LEVELS),
        *(f"twin@{level}" for level in LEVELS),
        *(f"{name}@0.8" for name in WINDOWS),
        *(f"dense@{width}x{length}" for width, length in GRID),
    ),
    expects=(
        *(
            Expectation(
                f"at {level:.0%} sparse is no more than 0.03 nats behind its dense twin",
                f"sparse@{level}",
                f"twin@{level}",
                "loss",
                "lower",
                margin=-0.03,
            )
            for level in LEVELS
        ),
        Expectation(
            "the sparse network is under two thirds of its twin in the end",
            "sparse@0.8",
            "twin@0.8",
            "final",
            "lower",
            margin=1.5,
            ratio=True,
            exact=True,
        ),
        Expectation("25-75 beats 50-100", "sparse@0.8", "50-100@0.8", "loss", "lower"),
        Expectation("25-75 beats pruning at initialisation", "sparse@0.8", "0-0@0.8", "loss", "lower", central=False),
        Expectation(
            "25-75 is no more than 0.02 nats behind 0-50",
            "sparse@0.8",
            "0-50@0.8",
            "loss",
            "lower",
            margin=-0.02,
            central=False,
        ),
        Expectation(
            "the mean count predicts sparse runs better than the final one",
            "law by average",
            "law by final",
            "relative error",
            "lower",
        ),
        Expectation(
            "the mean count predicts sparse runs better than the initial one",
            "law by average",
            "law by initial",
            "relative error",
            "lower",
        ),
    ),
    settings={
        "width": 64,
        "inner": 176,
        "layers": 4,
        "heads": 4,
        "window": 64,
        "batch": 16,
        "windows": 192,
        "budget": 400,
        "every": 10,
        "rate": 4e-3,
        "device": "cpu",
    },
    large={
        "width": 320,
        "inner": 864,
        "layers": 8,
        "window": 256,
        "batch": 64,
        "budget": 1500,
        "every": 20,
        "rate": 1e-3,
        "device": "cuda",
    },
    derive=derive,
)
