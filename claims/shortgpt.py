"""ShortGPT on SmolLM2-135M: whole blocks taken out by influence, by angle, at random, and from the end."""

import copy
from collections.abc import Sequence

import torch

from claims.harness import Claim, Expectation, Settings
from claims.wanda import perplexity, smollm2, task_of
from secateur.methods.shortgpt import Choice, ClosestRun, LeastInfluence, Seen, ShortGPT
from secateur.outcome import time_pair
from secateur.task import stream


class RandomBlocks:
    """Any blocks, drawn from the seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def gone(self, seen: Seen, count: int) -> list[int]:
        return torch.randperm(len(seen.influence), generator=stream(self.seed, "blocks"))[:count].tolist()

    def describe(self, seen: Seen, gone: Sequence[int]) -> str:
        return "drawn at random"


class LastBlocks:
    """The blocks at the end, but for the very last."""

    def gone(self, seen: Seen, count: int) -> list[int]:
        last = len(seen.influence) - 1
        return list(range(last - count, last))

    def describe(self, seen: Seen, gone: Sequence[int]) -> str:
        return "from the end"


def choice_of(kind: str, seed: int) -> Choice:
    if kind == "random":
        return RandomBlocks(seed)
    if kind == "last":
        return LastBlocks()
    return ClosestRun() if kind == "angular" else LeastInfluence()


def cell(condition: str, seed: int, settings: Settings) -> dict[str, float]:
    kind, _, target = condition.partition("@")
    task, dense = task_of(seed, settings), smollm2().model
    model = copy.deepcopy(dense)
    if kind == "dense":
        return {"perplexity": perplexity(model, task)}
    method = ShortGPT(sparsity=float(target), samples=settings["samples"], choice=choice_of(kind, seed))
    model = method.run(model, task).model
    found = {"parameters": sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in dense.parameters())}
    if condition == "influence@0.3":
        before, after = time_pair(dense, model, task.example, repeats=settings["repeats"])
        found["time"] = after.milliseconds / before.milliseconds
    return {**found, "perplexity": perplexity(model, task)}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="shortgpt",
    number=0,
    says="Blocks that hardly turn the hidden state are redundant: LLaMA-2-7B without the 9 of its 32 blocks of lowest "
    "influence keeps an MMLU of 44.0 of 45.4; blocks chosen by influence are better ones than others to take out.",
    source="arXiv:2403.03853, section 3; angular distance: arXiv:2403.17887, section 3",
    here="SmolLM2-135M-Instruct, WikiText-2 test, 64 windows of 256 tokens, perplexity in place of MMLU, which a model "
    "of this size answers by chance; 3, 6 and 9 of 30 blocks taken out at once, without healing; calibrated on 16 "
    "windows of 256 tokens of C4 drawn by the seed; evaluated in bfloat16, times in float32.",
    conditions=(
        "dense",
        "influence@0.1",
        "angular@0.1",
        "random@0.1",
        "last@0.1",
        "influence@0.2",
        "angular@0.2",
        "random@0.2",
        "last@0.2",
        "influence@0.3",
        "angular@0.3",
        "random@0.3",
    ),
    once=("dense", "last@0.1", "last@0.2"),
    settings={"window": 256, "windows": 64, "samples": 16, "repeats": 6},
    large={"window": 2048, "windows": 140, "samples": 128},
    expects=(
        beats("influence@0.1", "random@0.1", "Blocks of low influence beat blocks at random, 3 of 30"),
        beats("influence@0.2", "random@0.2", "Blocks of low influence beat blocks at random, 6 of 30"),
        beats("influence@0.1", "last@0.1", "Blocks of low influence beat the last but one, 3 of 30", central=False),
        beats("influence@0.2", "last@0.2", "Blocks of low influence beat the last but one, 6 of 30", central=False),
        beats("angular@0.2", "random@0.2", "The run that turns least beats blocks at random, 6 of 30", central=False),
        beats("influence@0.3", "random@0.3", "Low influence beats random, 9 of 30", central=False),
        beats("angular@0.3", "random@0.3", "The run that turns least beats random, 9 of 30", central=False),
        beats(
            "influence@0.3",
            "dense",
            "9 of 30 blocks cost at most half the dense perplexity again",
            1 / 1.5,
            central=False,  # the paper's own loss is in MMLU
        ),
        Expectation("Without 9 of 30 blocks a pass is faster", "influence@0.3", 1.0, "time", "lower", central=False),
    ),
)
