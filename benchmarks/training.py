"""What rules cost: a training step under each against a plain one, and the exact selector against torch's.

    python -m benchmarks.training [--parts resnet-20,gpt,selector] [--steps 24] [--threads 1] [--device cpu] [--tiny]

ResNet-20 with SGD and a language model of 10 million weights with AdamW. Each rule trains a network beside a dense
twin, step by step in turn, on the same batches; what counts is the median of the differences. A step that updates masks
is measured apart from one that only holds them, and counts with the share it has when masks move every 100 steps. On
one thread of a processor its own time is taken, which others at work on the machine do not change.
Writes results/training.json, from which docs/training-speed.md is made; `--parts` measures some again and keeps the
rest.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import kept
from secateur.axes import Erk
from secateur.axes.growth import AtRandom, Rewire, random_masks
from secateur.axes.patterns import NM, keep_top
from secateur.axes.remasking import Phases, Remask
from secateur.axes.rules import Gradual, Hold, Refined, Shadow, StraightThrough
from secateur.axes.schedules import Cosine, Schedule
from secateur.cut import weights
from secateur.method import Budget
from secateur.models.resnet import resnet20
from secateur.outcome import about_machine, about_versions, now
from secateur.site import Site
from secateur.train import Rule, attach

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "training.json"
PAGE = HERE.parent / "docs" / "training-speed.md"

EVERY = 100  # steps between updates of the schedules
MEASURED = 4  # the same while measuring, so that there are enough of them
SELDOM, ALWAYS = 0.05, 0.15  # of a plain step: what schedules, and what gates at every step, may cost


@dataclass(frozen=True)
class Entry:
    """A rule, and how often it acts."""

    name: str
    make: Callable[[Sequence[Site]], Rule]
    always: bool = False  # at every step


def ramp(sites: Sequence[Site], holder: Hold | Shadow | None = None) -> Gradual:
    return Gradual(sites, Schedule(start=0.5, end=0.9, until=1, every=MEASURED), holder=holder)


def rewire(sites: Sequence[Site], **parts: object) -> Rewire:
    keep = random_masks(sites, Erk().spread(sites, Budget(0.8)), 0)
    exchange = Schedule(start=0.3, end=0.1, until=1, curve=Cosine(), every=MEASURED, falling=True)
    return Rewire(sites, keep, exchange, **parts)


def gate(sites: Sequence[Site]) -> Gradual:
    flow = StraightThrough()
    return Gradual(sites, Schedule(start=0.8, end=0.8, until=1, every=1), holder=Shadow(sites, flow=flow))


def grouped(sites: Sequence[Site]) -> list[Site]:
    """Those that 4 divides."""
    return [site for site in sites if site.shape[1] % 4 == 0]


RULES = (
    Entry("hold (fine-tuning)", lambda s: Hold(s, random_masks(s, {x.name: x.units // 5 for x in s}, 0))),
    Entry("gradual", ramp),
    Entry("gradual, for good", lambda s: ramp(s, Hold(s))),
    Entry("set", lambda s: rewire(s, coming=AtRandom())),
    Entry("rigl", lambda s: rewire(s, instead=True)),
    Entry(
        "granet",
        lambda s: rewire(s, ramp=Schedule(start=0.8, end=0.9, until=1, every=MEASURED)),
    ),
    Entry("straight through, per matrix", gate, True),
    Entry("sr-ste 2:4", lambda s: Remask(grouped(s), Phases(target=NM(2, 4), dense=0, final=0), Refined()), True),
)


@dataclass(frozen=True)
class Setting:
    """A network, its batches and its optimizer."""

    name: str
    model: nn.Module
    batch: tuple[Tensor, Tensor]
    loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]


def residual(device: str, tiny: bool) -> Setting:
    draw = torch.Generator().manual_seed(0)
    size = 4 if tiny else 128
    batch = (torch.randn(size, 3, 32, 32, generator=draw), torch.randint(0, 10, (size,), generator=draw))
    return Setting(
        f"ResNet-20, {size} images, SGD",
        resnet20().to(device).train(),
        tuple(x.to(device) for x in batch),
        lambda model, pair: F.cross_entropy(model(pair[0]), pair[1]),
        lambda model: torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4),
    )


def language(device: str, tiny: bool) -> Setting:
    from transformers import LlamaConfig, LlamaForCausalLM

    width, layers, size, length = (32, 2, 2, 16) if tiny else (320, 8, 16, 128)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 27 // 10 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=256,
        max_position_embeddings=length,
    )
    model = LlamaForCausalLM(config).to(device).train()
    ids = torch.randint(0, 256, (size, length), generator=torch.Generator().manual_seed(0)).to(device)
    count = sum(p.numel() for p in model.parameters()) / 1e6
    return Setting(
        f"GPT of {count:.1f} M weights, {size} x {length} tokens, fused AdamW",
        model,
        (ids, ids),
        lambda net, pair: net(input_ids=pair[0], labels=pair[1]).loss,
        # Fused: the other takes ten times as long for roots where second moments are zero, as a mask leaves them.
        lambda net: torch.optim.AdamW(net.parameters(), 1e-4, weight_decay=0.1, fused=True),
    )


def clock(device: str) -> float:
    """Seconds; of the processor's time where one thread does the work."""
    if device == "cpu":
        return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()
    torch.cuda.synchronize()
    return time.perf_counter()


def step_of(setting: Setting, model: nn.Module, optimizer: torch.optim.Optimizer, device: str) -> float:
    """Seconds of one step, whole."""
    start = clock(device)
    optimizer.zero_grad()
    setting.loss(model, setting.batch).backward()
    optimizer.step()
    return clock(device) - start


def beside(setting: Setting, entry: Entry, steps: int, device: str) -> dict[str, object]:
    """A rule's network and its dense twin, one step each in turn."""
    plain, ruled = copy.deepcopy(setting.model), copy.deepcopy(setting.model)
    first, second = setting.optimizer(plain), setting.optimizer(ruled)
    for model, optimizer in ((plain, first), (ruled, second)):  # state is made, and caches are warm
        step_of(setting, model, optimizer, device)
    pruner = attach(second, ruled, entry.make(weights(ruled)), 10 * steps + 1)
    dense: list[float] = []
    extra: dict[bool, list[float]] = {False: [], True: []}
    for number in range(steps):
        if number % 2:
            theirs = step_of(setting, plain, first, device)
        ours = step_of(setting, ruled, second, device)
        if not number % 2:
            theirs = step_of(setting, plain, first, device)
        acts = entry.always or (pruner.loop.step % MEASURED == 0 and not entry.name.startswith("hold"))
        dense.append(theirs)
        extra[acts].append(ours - theirs)
    base = statistics.median(dense)
    update = statistics.median(extra[True]) if extra[True] else 0.0
    still = statistics.median(extra[False]) if extra[False] else update
    mean = update if entry.always else still + (update - still if extra[True] else 0.0) / EVERY
    limit = ALWAYS if entry.always else SELDOM
    return {
        "network": setting.name,
        "rule": entry.name,
        "acts": "every step" if entry.always else "never" if not extra[True] else f"every {EVERY} steps",
        "plain step": base,
        "extra, holding": still,
        "extra, updating": update,
        "overhead": mean / base,
        "limit": limit,
        "within": mean / base < limit,
    }


def selector(count: int, repeats: int, device: str) -> list[dict[str, object]]:
    """Half of so many scores kept, by each of them in turn; scores with and without ties."""
    draw = torch.Generator().manual_seed(0)
    rows = []
    for kind, score in (
        ("no two alike", torch.randn(count, generator=draw).abs()),
        ("in 256 steps", torch.randint(0, 256, (count,), generator=draw).float()),
    ):
        score, keep = score.to(device), count // 2

        def top(score: Tensor = score, keep: int = keep) -> Tensor:
            mask = torch.zeros_like(score, dtype=torch.bool)
            mask[torch.topk(score, keep, sorted=False).indices] = True
            return mask

        def threshold(score: Tensor = score, keep: int = keep) -> Tensor:
            return score > torch.kthvalue(score, len(score) - keep).values

        ways = {
            "secateur keep_top": lambda score=score, keep=keep: keep_top(score, keep),
            "torch.topk": top,
            "torch.kthvalue": threshold,
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        kept = {}
        for _ in range(repeats):
            for name, way in ways.items():
                start = clock(device)
                mask = way()
                times[name].append(clock(device) - start)
                kept[name] = int(mask.sum())
        for name in ways:
            rows.append(
                {
                    "scores": kind,
                    "count": count,
                    "way": name,
                    "seconds": statistics.median(times[name]),
                    "kept": kept[name],
                    "asked": keep,
                }
            )
    groups = torch.randn(count // 4 * 4, generator=draw).abs().reshape(-1, 4).to(device)
    times_of = []
    for _ in range(repeats):
        start = clock(device)
        mask = NM(2, 4).select(groups, groups.numel() // 2)
        times_of.append(clock(device) - start)
    rows.append(
        {
            "scores": "2 of every 4",
            "count": groups.numel(),
            "way": "secateur NM(2, 4)",
            "seconds": statistics.median(times_of),
            "kept": int(mask.sum()),
            "asked": groups.numel() // 2,
        }
    )
    return rows


def page(found: dict[str, object]) -> str:
    """The tables as Markdown."""
    lines = [
        "# What rules cost in training",
        "",
        "Written by `python -m benchmarks.training`. Each rule's network and a dense twin take steps in turn; medians "
        f"of the differences. Schedules act every {EVERY} steps, and may cost {SELDOM:.0%} of a plain step in the "
        f"mean; gates act at every step, and may cost {ALWAYS:.0%}.",
        "",
        *(f"{part}: {found['parts'][part]['about']}" for part in NETWORKS if part in found["parts"]),
        "",
        "| network | rule | acts | plain step (ms) | more, holding (ms) | more, updating (ms) | overhead | within |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in [row for part in NETWORKS for row in found["parts"].get(part, {"rows": []})["rows"]]:
        times = " | ".join(f"{1e3 * row[k]:.1f}" for k in ("plain step", "extra, holding", "extra, updating"))
        verdict = f"{row['limit']:.0%}" if row["within"] else f"NOT {row['limit']:.0%}"
        lines.append(
            f"| {row['network']} | {row['rule']} | {row['acts']} | {times} | {row['overhead']:.1%} | {verdict} |"
        )
    lines += [
        "",
        "Half of the scores kept. Ours keeps exactly as many as asked, and always the same ones of equals; a threshold "
        f"does not, where scores are equal. {found['parts'].get(SELECTOR, {'about': ''})['about']}",
        "",
        "| scores | how many | by | milliseconds | kept of those asked |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in found["parts"].get(SELECTOR, {"rows": []})["rows"]:
        lines.append(
            f"| {row['scores']} | {row['count']:,} | {row['way']} | {1e3 * row['seconds']:.0f} "
            f"| {row['kept']:,} of {row['asked']:,} |"
        )
    return "\n".join(lines) + "\n"


NETWORKS = {"resnet-20": residual, "gpt": language}
SELECTOR = "selector"


def measured(part: str, asked: argparse.Namespace) -> list[dict[str, object]]:
    """The rows of one part."""
    if part == SELECTOR:
        return selector(10_000 if asked.tiny else 10_000_000, asked.repeats, asked.device)
    torch.manual_seed(0)
    setting = NETWORKS[part](asked.device, asked.tiny)
    return [beside(setting, entry, asked.steps, asked.device) for entry in RULES]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parts", default=",".join([*NETWORKS, SELECTOR]))
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="small networks, nothing written: to see that it runs")
    asked = parser.parse_args()
    parts = asked.parts.split(",")
    if unknown := set(parts) - {*NETWORKS, SELECTOR}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: there are {', '.join([*NETWORKS, SELECTOR])}")
    torch.set_num_threads(asked.threads)
    machine = about_machine()
    place = machine["processor"] if asked.device == "cpu" else torch.cuda.get_device_name()
    result, page_at = kept.here(RESULT, PAGE)
    rows = {} if asked.tiny else kept.read(result, {"parts": {}})["parts"]
    for part in parts:
        many = f"{asked.repeats} repeats" if part == SELECTOR else f"{asked.steps} steps of each"
        about = f"float32, {asked.threads} thread(s), {many}, on {place}, {now()}."
        rows[part] = {"about": about, "rows": measured(part, asked)}
    found = {"settings": vars(asked), "machine": machine, "versions": about_versions(), "parts": rows}
    print(page(found))
    if asked.tiny:
        return
    kept.write(result, found)
    kept.write_page(page_at, page(found))


if __name__ == "__main__":
    main()
