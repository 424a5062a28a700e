"""Masks learnt with adapters on instructions, with a preface and without, against one cut and the same adapters."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from torch import nn

from claims.adapt_pruner import character_llama
from claims.harness import Claim, Expectation, Settings
from secateur.axes.schedules import Cosine
from secateur.methods.compresso import KINDS, Compresso, adapt
from secateur.methods.llm_pruner import LLMPruner
from secateur.tasks import pack
from secateur.tasks.corpora import Characters, read, tinyshakespeare
from secateur.tasks.instructions import Instructions, continued
from secateur.tasks.learners import AdamW
from secateur.tasks.text import Text
from secateur.train import fit

PREFACE = "You are being pruned. Answer as well as before: "
"""48 characters of Shakespeare's alphabet: the model reads 128 at most."""

ADAPTED = ("attention", "mlp")
"""Matrices that adapters go on, in all conditions."""


def text_of(seed: int, settings: Settings) -> Text:
    """Shakespeare by characters."""
    return tinyshakespeare(window=64, batch=8, windows=512, seed=seed, learner=AdamW(settings["first_rate"]))


def task_of(seed: int, settings: Settings) -> Instructions:
    """Of 64 characters of Shakespeare the first half is the instruction, and the second the answer."""
    whole = "".join(read(pack.file("tinyshakespeare.txt.gz", "tinyshakespeare")))
    task = continued(text_of(seed, settings), Characters(sorted(set(whole))), asked=32)
    return replace(task, window=64 + len(PREFACE))  # room for the preface, so that nothing is cut


@lru_cache(maxsize=1)
def llama(seed: int, steps: int, rate: float) -> nn.Module:
    """Four blocks of width 96 with three key-value heads for six, trained from scratch."""
    task = text_of(seed, {"first_rate": rate})
    model = character_llama(task, seed, blocks=4, key_values=3)
    fit(model, task, steps)
    return model.eval()


def method_of(condition: str, settings: Settings) -> Compresso:
    """Masks of everything, with a preface or without; or without masks of hidden channels."""
    return Compresso(
        sparsity=settings["sparsity"],
        prompt=PREFACE if condition == "prompt" else "",
        kinds=("head", "channel") if condition == "no hidden masks" else KINDS,
        include=ADAPTED,
        rank=settings["rank"], alpha=float(settings["rank"]),
        rate=settings["rate"], tune_rate=settings["tune_rate"], mask_rate=settings["mask_rate"],
        warmup=settings["warmup"], steps=settings["steps"], tune=settings["tune"],
    )  # fmt: skip


def one_shot(model: nn.Module, task: Instructions, settings: Settings) -> nn.Module:
    """Cut once by Taylor scores, to the same weights of the blocks; then the same adapters, for all of the steps."""
    cut = LLMPruner(sparsity=settings["sparsity"], samples=64, spare_first=settings["spare"], spare_last=0)
    model = cut.run(model, task).model
    adapt(
        model, task, include=ADAPTED, rank=settings["rank"], alpha=float(settings["rank"]),
        rate=settings["one_shot_rate"], steps=settings["steps"] + settings["tune"], purpose="compresso",
        curve=Cosine(),
    )  # fmt: skip
    return model


def in_blocks(model: nn.Module) -> float:
    """The elements of the matrices of all blocks."""
    return float(sum(p.numel() for n, p in model.named_parameters() if ".layers." in n and p.dim() == 2))


def cell(condition: str, seed: int, settings: Settings) -> Mapping[str, float]:
    task = task_of(seed, settings)
    model = copy.deepcopy(llama(seed, settings["first"], settings["first_rate"]))
    if condition == "dense":
        return {"perplexity": task.measure(model, "test")["perplexity"]}
    whole, before = in_blocks(model), sum(p.numel() for p in model.parameters())
    found: dict[str, float] = {}
    if condition == "one-shot":
        model = one_shot(model, task, settings)
    else:
        done = method_of(condition, settings).run(model, task)
        model = done.model
        assert done.history is not None
        found["expected"] = done.history.curves["expected sparsity"][-1][1]
        found["off target"] = abs(found["expected"] - settings["sparsity"])
    found |= {
        "blocks": in_blocks(model) / whole,
        "parameters": sum(p.numel() for p in model.parameters()) / before,
        "perplexity": task.measure(model, "test")["perplexity"],
    }
    if condition == "prompt":
        found["perplexity with the preface"] = task.prefaced(PREFACE).measure(model, "test")["perplexity"]
    return found


def told(measured: Mapping[str, Mapping[str, float]]) -> Mapping[str, Mapping[str, float]]:
    """The model that learnt with the preface, given it."""
    return {"prompt, given": {"perplexity": measured["prompt"]["perplexity with the preface"]}}


def beats(left: str, right: str, says: str, margin: float | None = None, central: bool = True) -> Expectation:
    return Expectation(says, left, right, "perplexity", "lower", margin, ratio=True, central=central)


def meets(condition: str, central: bool) -> Expectation:
    return Expectation(
        f"The sparsity expected at the end is within 1 % of the target: {condition}",
        condition, 0.01, "off target", "lower", central=central,
    )  # fmt: skip


CLAIM = Claim(
    name="compresso",
    number=51,
    says="Masks of heads, neurons and hidden channels that are learnt with adapters leave a better model than one cut "
    "and the same adapters, and a preface that tells the model of its pruning makes it better still (LLaMA-7B to 5.4B: "
    "up to 2.21 points on commonsense, 11.43 on reading, 7.04 on MMLU above one-shot pruning at equal size).",
    source="arXiv:2310.05015, abstract",
    here="A Llama of 4 blocks, width 96 and 6 heads over 3, trained for 600 steps on Shakespeare by characters; then "
    "30 % of the blocks' weights go, with the same steps of adapters of rank 8 on all matrices for all conditions, "
    "on pairs of 32 characters and the 32 that follow, which are the answers; the perplexity of 512 answers, measured "
    "cut. One-shot is LLM-Pruner's Taylor score and then adapters; it leaves the "
    "first block alone. Settings were chosen on seed 100: of one-shot the rate among three and whether the first "
    "block is left alone, of masks the rates among four, their own rate, the ramp and the steps after the cut.",
    conditions=("dense", "one-shot", "no prompt", "prompt", "no hidden masks"),
    settings={
        "first": 600,
        "first_rate": 2e-3,
        "sparsity": 0.3,
        "rank": 8,
        "steps": 250,
        "tune": 250,
        "warmup": 0.5,
        "mask_rate": 0.1,
        "rate": 3e-3,
        "tune_rate": 3e-3,
        "one_shot_rate": 6e-3,
        "spare": 1,
    },
    large={"first": 5000, "steps": 2000, "tune": 500},
    derive=told,
    expects=(
        beats("no prompt", "one-shot", "Learnt masks beat one cut by Taylor scores and the same adapters"),
        beats("prompt, given", "no prompt", "With the preface, in training and in use, it is better still"),
        meets("no prompt", central=True),
        beats("no prompt", "no hidden masks", "Masks of hidden channels too beat those of heads and neurons alone",
              central=False),
        beats("prompt, given", "prompt", "What was trained with the preface wants it in use", central=False),
        beats("prompt", "no prompt", "The preface in training alone helps", central=False),
        beats("prompt, given", "one-shot", "With the preface it beats one cut", central=False),
        meets("prompt", central=False),
        meets("no hidden masks", central=False),
    ),
)  # fmt: skip
