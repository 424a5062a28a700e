"""A whole language model: how many tokens a second it writes and reads, dense as torch has it and accelerated.

    python -m benchmarks.whole_models [--rounds 7] [--threads 1] [--model smollm2]

SmolLM2-135M writes tokens one by one after a prompt that it remembers, and reads a prompt of 512 tokens. Dense: as it
comes in float32 and bfloat16, and in bfloat16 compiled and frozen by torch.compile, which packs its weights for
oneDNN. Accelerated: `secateur.accelerate` for one token, or where it says so for a prompt, with masks at random in all
linear layers but the head, as `secateur prune` leaves it; what time a mask takes does not depend on which weights it
keeps. All take turns in every round; with one thread a time is the processor's for it, so what other programs take is
not counted. Writes results/whole_models.json, from which docs/whole-models-speed.md is made.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import kept
from secateur import kernels
from secateur.accelerate import accelerate
from secateur.formats import NM, Bitmap, BitmapInt8, Format, KBlocked, SellBlocked
from secateur.models import open_model
from secateur.outcome import about_machine, about_versions, now

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "whole_models.json"
PAGE = HERE.parent / "docs" / "whole-models-speed.md"

PROMPT, WRITTEN, WINDOW = 64, 8, 512
"""Tokens that are remembered when writing begins, that are written in a round, and that are read at once."""


@dataclass(frozen=True)
class Way:
    """A form of the model that is timed."""

    name: str
    dtype: torch.dtype
    masked: float | tuple[int, int] | None = None  # a share of each layer's weights, or n of m, that is kept
    formats: tuple[Format, ...] = ()  # that accelerate chooses from; none: the dense model
    compiled: bool = False
    example: int = 1  # tokens that accelerate was given


HALF, BOTH = torch.bfloat16, (Bitmap(), SellBlocked())
MANY = (Bitmap(), KBlocked(128), KBlocked(256))
WAYS = (
    Way("torch, float32", torch.float32),
    Way("torch, bfloat16", HALF),
    Way("torch, bfloat16, compiled", HALF, compiled=True),
    *(Way(f"accelerated, {s:.0%} zeros", HALF, s, BOTH) for s in (0.5, 0.6, 0.7, 0.9)),
    Way("accelerated, 2:4", HALF, (2, 4), (NM(2, 4), Bitmap())),
    Way("accelerated, 50% zeros, 8 bits", HALF, 0.5, (BitmapInt8(),)),
    Way("accelerated, 50% zeros, compiled", HALF, 0.5, BOTH, compiled=True),
    Way("accelerated, 50% zeros, 8 bits, compiled", HALF, 0.5, (BitmapInt8(),), compiled=True),
    *(Way(f"accelerated for prompts, {s:.0%} zeros", HALF, s, MANY, example=WINDOW) for s in (0.5, 0.7)),
    Way("accelerated for prompts, 50% zeros, compiled", HALF, 0.5, MANY, compiled=True, example=WINDOW),
)


@dataclass
class Running:
    """A way made ready: calls that write and read, and what is told of it."""

    write: Callable[[], None]
    read: Callable[[], Any]
    about: dict[str, Any]
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"write": [], "read": []})


def mask_(model: nn.Module, share: float | tuple[int, int]) -> None:
    """Zeros at random in every linear layer but the head."""
    made = torch.Generator().manual_seed(0)
    for layer in model.get_submodule("model.layers").modules():
        if isinstance(layer, nn.Linear):
            noise = torch.rand(layer.weight.shape, generator=made)
            if isinstance(share, float):
                keep = noise >= share
            else:
                groups = noise.view(noise.shape[0], -1, share[1])
                keep = (groups.argsort(2).argsort(2) < share[0]).view(noise.shape)
            layer.weight.data.mul_(keep)


def ready(way: Way, model: str) -> Running:
    """Open the model, give it its form, and call it once."""
    opened = open_model(model, dtype=way.dtype)
    net = opened.model.requires_grad_(False)
    about: dict[str, Any] = {"name": way.name, "bytes": held(net)}
    if way.masked is not None:
        mask_(net, way.masked)
    if way.formats:
        found = accelerate(net, {"input_ids": torch.ones(1, way.example, dtype=torch.int64)}, formats=way.formats)
        net = found.model
        about |= {"bytes": held(net), "chosen": found.chosen, "error": found.error}
    made = torch.Generator().manual_seed(1)
    ids = torch.randint(1000, 40000, (1, WINDOW), generator=made)
    call = torch.compile(net, dynamic=False) if way.compiled else net
    write = writing(net, call, ids, way.compiled)
    return Running(write, lambda: call(input_ids=ids, use_cache=False, logits_to_keep=1), about)


def writing(net: nn.Module, call: Callable[..., Any], ids: Tensor, still: bool) -> Callable[[], None]:
    """A call that writes some tokens after the same prompt each time; with a cache that keeps `still` for compiling."""
    from transformers import DynamicCache, StaticCache

    config: Any = net.config
    past = StaticCache(config=config, max_cache_len=PROMPT + WRITTEN) if still else DynamicCache(config=config)
    net(input_ids=ids[:, :PROMPT], past_key_values=past)

    def write() -> None:
        for place in range(WRITTEN):
            call(input_ids=ids[:, place : place + 1], past_key_values=past)
        if still:
            for layer in past.layers:
                layer.cumulative_length.fill_(PROMPT)
        else:
            past.crop(-WRITTEN)

    return write


def held(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, each once."""
    found = {t.data_ptr(): t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())}
    return sum(found.values())


def measured(model: str, rounds: int, threads: int) -> dict[str, Any]:
    """Every way in turn, round by round; the first is not counted."""
    import torch._inductor.config as inductor

    inductor.freezing = True
    running = []
    for way in WAYS:
        running.append(ready(way, model))
        print(f"{way.name} is ready", flush=True)
    clock = time.thread_time if threads == 1 else time.perf_counter
    loads = []
    for turn in range(rounds + 1):
        for kind in ("write", "read"):
            for each in running:
                start = clock()
                getattr(each, kind)()
                if turn:
                    each.seconds[kind].append(clock() - start)
        loads.append(os.getloadavg()[0])
        print(f"round {turn} of {rounds}", flush=True)
    found = {
        "created": now(),
        "settings": {"rounds": rounds, "threads": threads},
        "machine": about_machine(),
        "versions": about_versions(),
        "level": kernels.level(),
        "load": [min(loads), max(loads)],
        "ways": [
            each.about | {kind: statistics.median(kept) for kind, kept in each.seconds.items()} for each in running
        ],
    }
    return found | {"about": about(found)}


def about(found: dict[str, Any]) -> str:
    machine, settings = found["machine"], found["settings"]
    return (
        f"{kept.processor(machine)}, {machine['cores']} cores; {settings['threads']} thread(s), kernels for "
        f"{found['level']}, torch {found['versions']['torch']}, transformers {found['versions']['transformers']}, "
        f"medians of {settings['rounds']} rounds, load average {found['load'][0]:.0f} to {found['load'][1]:.0f}, "
        f"{found['created']}."
    )


def page(found: dict[str, Any]) -> str:
    """The table as Markdown."""
    dense = [way for way in found["ways"] if "chosen" not in way]
    plain = next(way for way in dense if way["name"] == "torch, bfloat16")
    best = {kind: min(way[kind] for way in dense) for kind in ("write", "read")}
    lines = [
        "# How fast a whole model is",
        "",
        "Written by `python -m benchmarks.whole_models`. SmolLM2-135M writes tokens one by one after a prompt of "
        f"{PROMPT}, and reads a prompt of {WINDOW} at once. No weight of the head is zero, as `secateur prune` leaves "
        "it, and it takes a fifth of the bytes. `accelerate` was given one token as its example, so layers are as "
        f"writing wants them, or where that is said a prompt of {WINDOW}, as reading does. `over eager` is how many "
        "times as fast as the dense model in bfloat16 as it comes, `over the best` as the fastest of the dense ones, "
        "which is frozen and compiled. Accelerated models run as they come where it is not said that they are "
        "compiled too.",
        "",
        str(found["about"]),
        "",
        "| form | megabytes | layers | written tokens a second | over eager | over the best | "
        "read tokens a second | over eager | over the best |",
        "| --- |" + " --- |" * 8,
    ]
    for way in found["ways"]:
        layers = ", ".join(f"{count} {name}" for name, count in way.get("chosen", {}).items())
        cells = [way["name"], f"{way['bytes'] / 1e6:.0f}", layers]
        for kind, tokens in (("write", WRITTEN), ("read", WINDOW)):
            cells += [f"{tokens / way[kind]:.1f}", f"{plain[kind] / way[kind]:.2f}", f"{best[kind] / way[kind]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="smollm2", help="a name, or a folder with the same model, opened sooner")
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    with torch.no_grad():
        found = measured(asked.model, asked.rounds, asked.threads)
    result, place = kept.here(RESULT, PAGE)
    kept.write(result, found)
    kept.write_page(place, page(found))
    print(page(found))


if __name__ == "__main__":
    main()
