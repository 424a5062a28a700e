"""How long it takes to find out what couples in a network, and how much memory: real sizes, random weights.

    python -m benchmarks.graph

Following the graph is told apart from trying every site on the model, which costs a forward pass or more each. A second
table makes a decoder deeper. Writes results/graph.json, from which docs/graph-speed.md is made.
"""

import argparse
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import kept
from secateur.graph import couple
from secateur.graph.trace import follow
from secateur.outcome import about_machine, about_versions, now
from secateur.task import Batch

HERE = Path(__file__).resolve().parent
RESULT = HERE / "results" / "graph.json"
PAGE = HERE.parent / "docs" / "graph-speed.md"


def smollm2() -> tuple[nn.Module, Batch]:
    """SmolLM2-135M, by its sizes."""
    return decoder(30, 576, 1536, 9, 3, 49152)


def decoder(layers: int, hidden: int, inner: int, heads: int, groups: int, words: int) -> tuple[nn.Module, Batch]:
    """A Llama of any size, and 16 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval(), Batch({"input_ids": torch.arange(16)[None]})


def resnet152() -> tuple[nn.Module, Batch]:
    """A ResNet-152, and a picture of 64 pixels."""
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(depths=[3, 8, 36, 3], hidden_sizes=[256, 512, 1024, 2048], layer_type="bottleneck")
    return ResNetForImageClassification(config).eval(), Batch({"pixel_values": torch.randn(1, 3, 64, 64)})


NETWORKS = {"SmolLM2-135M": smollm2, "ResNet-152": resnet152}
DEPTHS = (4, 8, 16, 32)


def positions(model: nn.Module, example: Batch) -> tuple[float, int, int]:
    """Seconds to follow a network, bytes of Python's and NumPy's that takes at most, and its positions."""
    start = time.perf_counter()
    follow(model, example)
    seconds = time.perf_counter() - start
    tracemalloc.start()
    network = follow(model, example)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return seconds, peak, len(network.tracing.positions)


def measured() -> dict[str, Any]:
    """Both tables."""
    rows = []
    for name, make in NETWORKS.items():
        torch.manual_seed(0)
        model, example = make()
        seconds, _, count = positions(model, example)
        start, cpu = time.perf_counter(), time.process_time()
        coupling = couple(model, example)
        rows.append(
            {
                "network": name,
                "parameters": sum(p.numel() for p in model.parameters()),
                "positions": count,
                "sites": len(coupling.sites),
                "follow": seconds,
                "couple": time.perf_counter() - start,
                "couple cpu": time.process_time() - cpu,
            }
        )
    deep = []
    for layers in DEPTHS:
        seconds, peak, count = positions(*decoder(layers, 64, 192, 4, 2, 256))
        deep.append({"layers": layers, "positions": count, "follow": seconds, "bytes": peak})
    return {
        "created": now(),
        "threads": torch.get_num_threads(),
        "machine": about_machine(),
        "versions": about_versions(),
        "networks": rows,
        "deep": deep,
    }


def page(found: dict[str, Any]) -> str:
    """The page of the benchmark."""
    lines = [
        "<!-- Written by tools/generate.py: do not edit. -->",
        "# How long it takes to find out what couples",
        "",
        f"Measured on {found['machine'].get('processor', 'an unknown machine')} with {found['threads']} threads, by "
        "`python -m benchmarks.graph`. Following is torch.export and the rules of its operators; coupling is that, "
        "and every site tried on the model. Seconds of the processor leave out what other programs took.",
        "",
        "| network | parameters | positions | sites | follow, s | couple, s | of the processor, s |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['network']} | {r['parameters']:,} | {r['positions']:,} | {r['sites']} | {r['follow']:.1f} | "
        f"{r['couple']:.1f} | {r['couple cpu']:.1f} |"
        for r in found["networks"]
    ]
    lines += [
        "",
        "Memory grows with the graph: a decoder of 64 wide, made deeper.",
        "",
        "| layers | positions | follow, s | most memory of following, MB | KB a layer |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['layers']} | {r['positions']:,} | {r['follow']:.1f} | {r['bytes'] / 1e6:.1f} | "
        f"{r['bytes'] / r['layers'] / 1e3:.0f} |"
        for r in found["deep"]
    ]
    return "\n".join([*lines, ""])


def main() -> None:
    argparse.ArgumentParser(description=__doc__).parse_args()
    result, place = kept.here(RESULT, PAGE)
    found = measured()
    kept.write(result, found)
    kept.write_page(place, page(found))


if __name__ == "__main__":
    main()
