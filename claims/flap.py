"""FLAP on SmolLM2-135M: heads and neurons taken out at equal weights, with and without its parts."""

import copy

from claims.harness import Claim, Expectation, Settings
from claims.wanda import perplexity, smollm2
from secateur.methods.flap import FLAP, ColumnNorm, Ifv, PerLayer, Wifn
from secateur.task import Task
from secateur.tasks import wikitext2


def task_of(seed: int, settings: Settings) -> Task:
    return wikitext2(
        smollm2().tokenizer,
        calibration="wikitext2",
        window=settings["window"],
        windows=settings["windows"],
        batch=4,
        seed=seed,
    )


def method_of(condition: str, samples: int) -> FLAP:
    """Wanda-sp and Mag-sp: their scores, the same share of every block, and nothing put back."""
    kind, _, target = condition.partition("@")
    shared = {"sparsity": float(target), "samples": samples}
    if kind == "wanda-sp":
        return FLAP(**shared, score=Wifn(), allocation=PerLayer(), head_power=1.0, compensate=False)
    if kind == "mag-sp":
        return FLAP(**shared, score=ColumnNorm(), allocation=PerLayer(), head_power=1.0, compensate=False)
    if kind == "per-layer":
        return FLAP(**shared, allocation=PerLayer())
    if kind == "no-bias":
        return FLAP(**shared, compensate=False)
    if kind == "ifv":
        return FLAP(**shared, score=Ifv())
    if kind == "wifn":
        return FLAP(**shared, score=Wifn())
    return FLAP(**shared)


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    task, model = task_of(seed, settings), copy.deepcopy(smollm2().model)
    whole = sum(p.numel() for p in model.parameters())
    if condition != "dense":
        model = method_of(condition, settings["samples"]).run(model, task).model
    parameters = sum(p.numel() for p in model.parameters()) / whole
    return {"perplexity": perplexity(model, task), "parameters": parameters}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="flap",
    number=47,
    says="Heads and neurons that fluctuate least can go without retraining, their means put into biases: LLaMA-7B has "
    "WikiText-2 perplexity 12.62 dense, 14.62 without 20 % of its blocks' weights (Wanda-sp 22.12), 17.62 without "
    "30 % (38.88).",
    source="arXiv:2312.11983, table 1",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 32 windows of 256 tokens; the sparsity is of the weights of all "
    "heads and neurons; calibrated on 16 windows of 256 tokens of WikiText-2 drawn by the seed; evaluated in bfloat16. "
    "Wanda-sp and Mag-sp are their scores within FLAP's own removal, scored on dense inputs, every block losing the "
    "same share, no bias added.",
    conditions=(
        "dense",
        "mag-sp@0.2",
        "wanda-sp@0.2",
        "flap@0.2",
        "no-bias@0.2",
        "per-layer@0.2",
        "ifv@0.2",
        "wifn@0.2",
        "flap@0.3",
        "no-bias@0.3",
    ),
    once=("dense", "mag-sp@0.2"),
    settings={"window": 256, "windows": 32, "samples": 16},
    large={"window": 128, "windows": 1000, "samples": 1024},
    expects=(
        beats("flap@0.2", "wanda-sp@0.2", "FLAP has at most five sixths of Wanda-sp's perplexity at 20 %", 1.2),
        beats("flap@0.2", "no-bias@0.2", "Putting the means into biases helps at 20 %"),
        beats("flap@0.3", "no-bias@0.3", "Putting the means into biases helps at 30 %"),
        beats("flap@0.2", "per-layer@0.2", "One budget for all blocks beats the same share for each"),
        beats("flap@0.2", "mag-sp@0.2", "FLAP beats magnitude of columns", central=False),
        beats("flap@0.2", "ifv@0.2", "Weighing fluctuation by the column's norm helps", central=False),
        beats("flap@0.2", "wifn@0.2", "Fluctuation beats Wanda's score under the same budget", central=False),
        beats(
            "flap@0.2",
            "dense",
            "20 % costs at most 1.16 times the dense perplexity, as on LLaMA-7B",
            1 / 1.16,
            central=False,
        ),
    ),
)
