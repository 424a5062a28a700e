"""Training in two processes: the masks of one, in every process the same, and said where they could not be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from test_distributed import ALONE, PLACE, free_port
from test_training_promises import RULES, batches
from torch import nn

from secateur.cut import weights
from secateur.train import attach

WORKER = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from test_distributed_training import shared
from test_training_promises import RULES
from secateur.errors import SecateurError

out = Path(sys.argv[1])
dist.init_process_group("gloo")
rank = dist.get_rank()
for name in RULES:
    keep, model = shared(name, rank)
    save_file({**keep, "weight": model[0].weight.detach()}, out / f"{name}-{rank}.safetensors")
said = []
for attempt in ("apart", "alone"):
    try:
        shared("gradual", rank, **{attempt: True}, out=out)
    except SecateurError as error:
        said.append(str(error).replace("\\n", " "))
(out / f"said-{rank}.txt").write_text("\\n".join(said))
dist.destroy_process_group()
"""


def shared(name, rank, apart=False, alone=False, out=None):
    """Each process its half of every batch; the masks, and the model."""
    inner = tiny.mlp().double()
    wrapped = nn.parallel.DistributedDataParallel(inner)
    if apart:
        with torch.no_grad():
            inner[0].weight[0] += rank  # after the wrapper has made them equal
    optimizer = torch.optim.AdamW(wrapped.parameters(), 0.01)
    rule = RULES[name](weights(wrapped))
    pruner = attach(optimizer, wrapped, rule, 12)
    for i, (x, y) in enumerate(batches(12)):
        optimizer.zero_grad()
        x, y = x.double()[rank::2], y[rank::2]
        with wrapped.no_sync():
            (nn.functional.cross_entropy(wrapped(x[:8]), y[:8]) / 2).backward()
        (nn.functional.cross_entropy(wrapped(x[8:]), y[8:]) / 2).backward()
        optimizer.step()
        if alone and i == 4:  # taken up again by as many as it was not
            other = tiny.mlp().double()
            again = torch.optim.AdamW(other.parameters(), 0.01)
            snapshot = pruner.snapshot()
            snapshot.restore_(other, again)
            attach(again, other, RULES[name](weights(other)), 12, resume_from=snapshot)
    pruner.finish()
    return rule.keep, inner


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch is built without torch.distributed")
def test_two_processes_train_under_the_masks_of_one(tmp_path: Path) -> None:
    port = str(free_port())
    place = {**ALONE, **PLACE, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    running = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(tmp_path)],
            env={**place, "RANK": str(rank), "PATH": os.environ["PATH"]},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    alone = {}
    for name, make in RULES.items():
        model = tiny.mlp().double()
        optimizer, rule = torch.optim.AdamW(model.parameters(), 0.01), make(weights(model))
        pruner = attach(optimizer, model, rule, 12)
        for x, y in batches(12):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.double()), y).backward()
            optimizer.step()
        pruner.finish()
        alone[name] = (rule.keep, model[0].weight.detach())
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    from safetensors.torch import load_file

    for name, (keep, weight) in alone.items():
        first, second = (load_file(tmp_path / f"{name}-{rank}.safetensors") for rank in range(2))
        assert all(torch.equal(first[key], second[key]) for key in first), name
        assert torch.allclose(first.pop("weight"), weight, atol=1e-9), name
        assert all(torch.equal(first[site], keep[site]) for site in keep), name
    for rank in range(2):
        apart, world = (tmp_path / f"said-{rank}.txt").read_text().splitlines()
        assert "masks were chosen in 2 processes" in apart
        assert "DistributedDataParallel" in apart
        assert "again in one process, but the snapshot was taken in 2 processes" in world
