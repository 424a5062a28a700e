"""Pruning while adapters are trained, before and after: a small Llama whose residual stream becomes narrower."""

import copy
from collections.abc import Mapping
from functools import lru_cache
from math import ceil

import torch
from torch import nn

from claims.adapt_pruner import character_llama
from claims.harness import Claim, Expectation, Measured, Settings
from secateur.axes import Cosine
from secateur.axes.hooks import hooked
from secateur.axes.recovery import only
from secateur.axes.rules import LearningRate
from secateur.edit import Update, apply_
from secateur.methods.pat import Counted, Frozen, Pat, Settled, SharedMask, Tuning
from secateur.methods.slicegpt import Basis, PcaPerBlock, RawChannels, SliceGPT
from secateur.outcome import time_pair
from secateur.stream import follow
from secateur.task import Task
from secateur.tasks.corpora import tinyshakespeare
from secateur.tasks.learners import AdamW
from secateur.train import fit

BASES: Mapping[str, Basis] = {"directions": PcaPerBlock(), "channels": RawChannels()}


def task_of(seed: int, settings: Settings) -> Task:
    """Shakespeare by characters."""
    return tinyshakespeare(window=64, batch=8, windows=512, seed=seed, learner=AdamW(settings["first_rate"]))


@lru_cache(maxsize=1)
def llama(seed: int, steps: int, rate: float) -> nn.Module:
    """Four blocks of width 48, trained from scratch."""
    task = task_of(seed, {"first_rate": rate})
    model = character_llama(task, seed, blocks=4, key_values=6, width=48)
    fit(model, task, steps, [LearningRate(warmup=0.02, floor=0.1)])
    return model.eval()


def method_of(kind: str, sparsity: float, settings: Settings) -> Pat:
    """All but the paper's own loss of the count have that of the authors' code."""
    return Pat(
        sparsity=sparsity, active=Counted() if kind == "counted" else Settled(),
        choice=Frozen() if kind == "frozen" else Pat.choice,
        operator_rank=settings["operator_rank"], rank=settings["rank"], alpha=2.0 * settings["rank"], dropout=0.0,
        rate=settings["rate"], reach=settings["reach"], clip=1.0, steps=settings["steps"],
    )  # fmt: skip


def trained_by(model: nn.Module, task: Task, method: Pat) -> int:
    """How many parameters a run of the method trains."""
    stream = follow(model, task.example)
    mask = SharedMask(torch.zeros(stream.width), method.width(stream.width), method.turning)
    rule = Tuning(mask, method.mixers(model, stream, mask, task), method.layers(model, task))
    return sum(p.numel() for p in rule.parameters())


def tune_(model: nn.Module, task: Task, least: int, settings: Settings) -> int:
    """Train adapters alone, of the least rank that has as many parameters, and merge them; how many there were."""
    each = sum(sum(layer.part.shape) for layer in Pat(rank=1).layers(model, task).values())
    rank = ceil(least / each)
    layers = Pat(rank=rank, alpha=2.0 * rank, dropout=0.0).layers(model, task)
    mask = SharedMask(torch.zeros(1), 1, 2, learns=False)  # not in place: the rule clips, and does no more
    rule = Tuning(mask, {}, layers, identity=0.0, clip=1.0)
    with only(model, ()), hooked(model, layers):
        optimizer = torch.optim.AdamW(rule.tuned, settings["lora_rate"], weight_decay=0.0)
        fit(model, task, settings["steps"], [LearningRate(Cosine(), Pat.warmup), rule], optimizer)
    apply_(model, [Update(name, layer.merged()) for name, layer in layers.items()])
    return sum(p.numel() for p in rule.tuned)


@lru_cache(maxsize=1)
def tuned_llama(seed: int, least: int, items: tuple[tuple[str, float], ...]) -> tuple[nn.Module, int]:
    """The whole model after its adapters were trained, which three conditions share."""
    settings = dict(items)
    model = copy.deepcopy(llama(seed, int(settings["first"]), settings["first_rate"]))
    count = tune_(model, task_of(seed, settings), least, settings)
    return model, count


def sliced(model: nn.Module, task: Task, basis: str, sparsity: float) -> nn.Module:
    """Before or after training, by principal directions of each segment or by channels of a large mean square."""
    method = SliceGPT(sparsity=sparsity, samples=64, round_to=1, basis=BASES[basis], slice_head=True)
    return method.run(copy.deepcopy(model), task).model


def cell(condition: str, seed: int, settings: Settings) -> Mapping[str, float]:
    task, whole = task_of(seed, settings), llama(seed, settings["first"], settings["first_rate"])
    kind, _, target = condition.partition("@")
    least = trained_by(whole, task, method_of("pat", 0.25, settings))
    items = tuple((key, float(value)) for key, value in sorted(settings.items()))
    found: dict[str, float] = {}
    if kind == "dense":
        model = whole
    elif kind == "lora":
        model, found["trained"] = tuned_llama(seed, least, items)
    elif kind.endswith("then lora"):
        model = sliced(whole, task, kind.partition(",")[0], float(target))
        found["trained"] = tune_(model, task, least, settings)
    elif kind.startswith("lora, then"):
        model = sliced(tuned_llama(seed, least, items)[0], task, kind.rpartition(" ")[2], float(target))
    else:
        done = method_of(kind, float(target), settings).run(copy.deepcopy(whole), task)
        model, found["trained"] = done.model, least - (48 if kind == "frozen" else 0)
        said = next(note for note in done.notes if note.startswith("sliced"))
        found["logits"] = float(said.removeprefix("sliced, no logit moves by more than ").partition(" ")[0])
        first, second = time_pair(whole, model, task.example, repeats=60)
        found["time"] = second.milliseconds / first.milliseconds
    found["parameters"] = sum(p.numel() for p in model.parameters()) / sum(p.numel() for p in whole.parameters())
    return {**found, "perplexity": task.measure(model, "test")["perplexity"]}


def better_of_two(found: Measured) -> Mapping[str, Mapping[str, float]]:
    """Before and after, the better way of pruning: chosen on what is measured, so in its favour."""
    best = {}
    pairs = {
        "prune, then lora@0.25": [f"{basis}, then lora@0.25" for basis in BASES],
        "lora, then prune@0.25": [f"lora, then {basis}@0.25" for basis in BASES],
    }
    for name, conditions in pairs.items():
        tried = [found[c] for c in conditions if c in found]
        if len(tried) == len(conditions):
            best[name] = min(tried, key=lambda values: values["perplexity"])
    return best


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


CLAIM = Claim(
    name="pat",
    number=27,
    says="Channels of the residual stream chosen while adapters are trained leave a better model than pruning before "
    "or after, and one about as good as adapters on the whole model (Llama2-7B, 25 % of the width, mean of 14 tasks: "
    "60.02; SliceGPT, then LoRA 52.98; LoRA on the whole 58.76; with a frozen mask 54.97).",
    source="arXiv:2408.14721, main results and ablation",
    here="A Llama of 4 blocks, width 48 and 6 heads, trained for 1,500 steps on Shakespeare by characters, 8 windows "
    "of 64; then 25 % of its width goes, and adapters are trained for 300 steps on the same text, in all "
    "conditions at least as many parameters as PAT trains; measured sliced on 512 windows. Pruned by SliceGPT before "
    "or after: directions are principal axes of each segment, channels those of a large mean square, and the better of "
    "the two counts. Learning rates were chosen on seed 100, of LoRA and of PAT apart, and for PAT the loss of the "
    "authors' code, which was better there than the paper's (counted).",
    conditions=(
        "dense",
        "lora",
        *(f"{basis}, then lora@0.25" for basis in BASES),
        *(f"lora, then {basis}@0.25" for basis in BASES),
        "pat@0.25",
        "frozen@0.25",
        "counted@0.25",
    ),
    derive=better_of_two,
    seeds=(0, 1, 2),
    settings={
        "first": 1500,
        "first_rate": 4e-3,
        "steps": 300,
        "operator_rank": 16,
        "rank": 8,
        "lora_rate": 4e-3,
        "rate": 1.6e-2,
        "reach": 4.0,
    },
    large={"first": 6000, "steps": 3000},
    expects=(
        beats("pat@0.25", "prune, then lora@0.25", "PAT beats pruning before the adapters at 25 %"),
        beats("prune, then lora@0.25", "lora, then prune@0.25", "Pruning before beats pruning after at 25 %"),
        beats("pat@0.25", "lora", "PAT at 25 % is within 5 % of adapters on the whole model", 1 / 1.05),
        beats("pat@0.25", "frozen@0.25", "A mask that learns beats one drawn by chance at 25 %"),
        Expectation(
            "The sliced model says what the masked one said, to 0.001 a logit",
            "pat@0.25",
            1e-3,
            "logits",
            "lower",
            exact=True,
        ),
        beats("pat@0.25", "channels, then lora@0.25", "PAT beats channels cut before at 25 %", central=False),
        beats("pat@0.25", "counted@0.25", "Pulling logits apart, as the code does, helps", central=False),
    ),
)
