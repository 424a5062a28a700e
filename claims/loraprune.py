"""Units scored by gradients of adapters, by those of the weights, by weights and by chance; slowly and at once."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from claims.adapt_pruner import character_llama
from claims.harness import Claim, Expectation, Settings
from claims.wanda import smollm2
from secateur.axes.hooks import hooked
from secateur.axes.recovery import only
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Linear
from secateur.graph import couple
from secateur.graph.inner import inner
from secateur.method import Budget
from secateur.methods.loraprune import (
    Chance,
    FullGradient,
    LoRAPrune,
    LowRankGradient,
    Score,
    Shutting,
    WeightSize,
    gradient_bytes,
)
from secateur.site import Site
from secateur.task import Task, generator
from secateur.tasks import python_docs
from secateur.tasks.corpora import tinyshakespeare
from secateur.tasks.learners import AdamW
from secateur.train import Loop, Rule, fit


def task_of(seed: int, settings: Settings) -> Task:
    """Shakespeare by characters."""
    return tinyshakespeare(window=64, batch=8, windows=512, seed=seed, learner=AdamW(settings["first_rate"]))


@lru_cache(maxsize=1)
def llama(seed: int, steps: int, rate: float) -> nn.Module:
    """Five blocks of width 96, trained from scratch, each head with keys and values of its own as in LLaMA-7B."""
    task = task_of(seed, {"first_rate": rate})
    model = character_llama(task, seed, blocks=5, key_values=6)
    fit(model, task, steps)
    return model.eval()


def method_of(condition: str, settings: Settings) -> LoRAPrune:
    """Half of the heads and neurons of the three blocks in the middle; all train the same adapters as long."""
    score: Score = {
        "full": FullGradient(),
        "magnitude": WeightSize(),
        "random": Chance(),
        "lora, no product": LowRankGradient(product=False),
    }.get(condition, LowRankGradient())
    method = LoRAPrune(
        sparsity=0.5, score=score, rank=settings["rank"], steps=settings["steps"], rate=settings["rate"],
        dropout=0.0, spare_first=0.2, spare_last=1,
    )  # fmt: skip
    return replace(method, begin=0.1, until=0.1) if condition == "one-shot" else method


def rank_correlation(left: Tensor, right: Tensor) -> float:
    """Spearman's, of scores without ties."""
    ranks = torch.stack([left.argsort().argsort(), right.argsort().argsort()]).double()
    return float(torch.corrcoef(ranks)[0, 1])


class Beside(Rule):
    """Follows what the gradient of the weights says of the same units in the same run, and how much alike it is."""

    def __init__(self, rule: Shutting) -> None:
        self.rule, self.truth = rule, copy.copy(rule)
        self.truth.score, self.truth.scores = FullGradient(), dict(rule.scores)
        self.found: dict[str, list[float]] = {"head": [], "channel": []}

    def before_step(self, loop: Loop) -> None:
        """After the rule itself has looked, and before what is left is counted anew."""
        self.truth.keep = self.rule.keep
        self.truth.look(loop)
        if self.rule.schedule.due(loop.step, loop.steps):
            for site in self.rule.sites:
                alive = self.rule.keep[site.name]
                pair = (scores[site.name][alive] for scores in (self.rule.scores, self.truth.scores))
                self.found[site.kind].append(rank_correlation(*pair))


def prepared(model: nn.Module, task: Task, method: LoRAPrune) -> Shutting:
    """What a run of the method trains by, with its layers in `layers`."""
    sites = inner(couple(model, task.example))
    counts = method.allocation.spread(sites, Budget(method.sparsity, of="units"))
    cut: list[Site] = [site for site in sites if counts[site.name] < site.units]
    layers = method.layers(model, task, cut)
    draw = generator(task, "loraprune scores")
    return Shutting(cut, counts, layers, method.schedule(), method.score, smooth=method.smooth, draw=draw)


def alike(model: nn.Module, task: Task, method: LoRAPrune) -> dict[str, float]:
    """The rank correlation with the true Taylor scores, the mean over sites and the moments at which units are shut."""
    rule = prepared(model, task, method)
    watcher = Beside(rule)
    with only(model, [layer.frozen for layer in rule.scored.values()]), hooked(model, rule.layers):
        optimizer = torch.optim.AdamW(rule.parameters(), method.rate, weight_decay=0.0)
        fit(model, task, method.steps, [LearningRate(Linear(), method.warmup), rule, watcher], optimizer)
    return {f"correlation of {kind}s": sum(found) / len(found) for kind, found in watcher.found.items()}


def held(model: nn.Module, task: Task, method: LoRAPrune) -> Mapping[str, float]:
    """Bytes of the gradients that scores read, as they lie there after a step: of adapters, and of the weights."""
    rule = prepared(model, task, method)
    layers = rule.scored.values()
    with only(model, [layer.frozen for layer in layers]), hooked(model, rule.layers):
        batch = next(iter(task.batches("train")))
        task.loss(model, batch).backward()
        grads = [[layer.low.a.grad, layer.low.b.grad] for layer in layers if layer.low is not None]
        small = sum(g.numel() * g.element_size() for pair in grads for g in pair if g is not None)
        whole = [layer.frozen.grad for layer in layers]
        large = sum(g.numel() * g.element_size() for g in whole if g is not None)
    assert (small, large) == (gradient_bytes(layers, False), gradient_bytes(layers, True))
    return {"bytes": float(small), "bytes of the weights": float(large), "share": small / large}


def cell(condition: str, seed: int, settings: Settings) -> Mapping[str, float]:
    if condition == "memory of SmolLM2":
        opened = smollm2()
        task = python_docs(opened.tokenizer, window=64, seed=seed)
        return held(copy.deepcopy(opened.model), task, LoRAPrune(rank=settings["rank"]))
    task = task_of(seed, settings)
    model = copy.deepcopy(llama(seed, settings["first"], settings["first_rate"]))
    if condition == "dense":
        return {"perplexity": task.measure(model, "test")["perplexity"]}
    if condition == "alike":
        return alike(model, task, method_of(condition, settings))
    before = sum(p.numel() for p in model.parameters())
    model = method_of(condition, settings).run(model, task).model
    left = sum(p.numel() for p in model.parameters()) / before
    return {"perplexity": task.measure(model, "test")["perplexity"], "parameters": left}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="loraprune",
    number=38,
    says="Heads and neurons scored by the gradients of adapters, and shut little by little while these are trained, "
    "leave a better small model than LLM-Pruner's one cut by the gradients of all weights (LLaMA-7B at 50 %: "
    "WikiText-2 perplexity 30.12 against 38.12), with half the memory.",
    source="arXiv:2305.18403, abstract and table 1",
    here="A Llama of 5 blocks, width 96 and 6 heads, trained for 600 steps on Shakespeare by characters, 8 windows of "
    "64; then half of the heads and neurons of the 3 blocks in the middle go in 200 steps of adapters of rank 8 "
    "on the same text, the same for all conditions, measured cut on 512 windows. Steps, sizes and the learning "
    "rate (the better of two both for the paper's score and for chance) were chosen on seed 100. Gradients are "
    "counted on SmolLM2-135M.",
    conditions=(
        "dense",
        "lora",
        "full",
        "magnitude",
        "random",
        "one-shot",
        "lora, no product",
        "alike",
        "memory of SmolLM2",
    ),
    once=("memory of SmolLM2",),
    seeds=(0, 1, 2),
    settings={"first": 600, "first_rate": 2e-3, "steps": 200, "rate": 3e-3, "rank": 8},
    large={"first": 5000, "steps": 1000},
    expects=(
        beats("lora", "full", "Adapters' gradients do within 3 % as well as those of the weights", 1 / 1.03),
        beats("lora", "magnitude", "Adapters' gradients beat magnitude"),
        beats("lora", "random", "Adapters' gradients beat chance"),
        beats("lora", "one-shot", "Little by little beats all at once after a tenth of the steps"),
        Expectation(
            "On SmolLM2 gradients of adapters take less than 5 % of what those of the weights take",
            "memory of SmolLM2",
            0.05,
            "share",
            "lower",
            exact=True,
        ),
        beats("lora", "lora, no product", "The product gB gA does within 1 % no harm", 1 / 1.01, central=False),
        Expectation(
            "Neurons are ranked much as by the gradients of the weights", "alike", 0.5, "correlation of channels",
            "higher", central=False,
        ),
        Expectation(
            "Heads are ranked much as by the gradients of the weights", "alike", 0.5, "correlation of heads",
            "higher", central=False,
        ),
    ),
)  # fmt: skip
