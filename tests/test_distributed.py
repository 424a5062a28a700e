"""Calibration in two processes: the same masks as in one, and one of them writes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import make_model, make_task

from secateur.axes import NM, Dsnot, Gblm, Owl
from secateur.cli import main
from secateur.cut import weights
from secateur.distributed import Processes, Share, together
from secateur.edit import Edit, Mask
from secateur.edit import load as load_edits
from secateur.errors import SettingError, TaskError
from secateur.evidence import Evidence, merging, observe
from secateur.methods.cfsp import CFSP
from secateur.methods.ecoflap import ECoFLaP
from secateur.methods.expert_removal import ExpertRemoval
from secateur.methods.flap import FLAP
from secateur.methods.oneshot import OneShot
from secateur.methods.shortgpt import ClosestRun, ShortGPT
from secateur.methods.slicegpt import SliceGPT
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.uncurl import UNCURL
from secateur.methods.wanda import Wanda
from secateur.site import tensors
from secateur.walk import walk

HERE = Path(__file__).parent
ALONE = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}

RUNS = {
    "wanda": ("decoder", Wanda(samples=16)),
    "sparsegpt": ("decoder", SparseGPT(samples=16)),
    "all": ("decoder", OneShot(samples=16, criterion=Gblm(), allocation=Owl(outlier=2.0), refine=Dsnot(rounds=4))),
    "groups": ("decoder", OneShot(samples=3, criterion=Gblm(), pattern=NM(2, 4))),  # fewer batches than processes
    "experts": ("moe", Wanda(samples=2)),
}

# Methods that look at activations one by one, or have sums of their own.
WATCHING = {
    "flap": ("decoder", FLAP(samples=16)),
    "shortgpt": ("decoder", ShortGPT(samples=16, sparsity=0.5)),
    "closest run": ("decoder", ShortGPT(samples=16, sparsity=0.5, choice=ClosestRun())),
    "slicegpt": ("decoder", SliceGPT(samples=16)),
    "cfsp": ("decoder", CFSP(samples=16, round_to=8)),
    "ecoflap": ("decoder", ECoFLaP(samples=16)),
    "expert_removal": ("moe", ExpertRemoval(samples=16)),
    "uncurl": ("moe", UNCURL(samples=16)),
}

WORKER = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from test_distributed import RUNS, WATCHING, held
from tiny import make_model, make_task
from secateur.distributed import together
from secateur.edit import save
from secateur.errors import SecateurError
from secateur.walk import walk
from secateur.methods.wanda import Wanda

out = Path(sys.argv[1])
with together() as ours:
    assert ours.count == 2
    for name, (family, method) in RUNS.items():
        model = make_model(family)
        done = method.run(model, ours.share(make_task(family)))
        ours.agree(done.model)
        if ours.first:
            save(done.edits, out / f"{name}.safetensors")
    for name, (family, method) in WATCHING.items():
        done = method.run(make_model(family), ours.share(make_task(family)))
        ours.agree(done.model)
        if ours.first:
            save_file(held(done.model), out / f"{name}.safetensors")
    said = []
    with torch.no_grad():
        model = make_model("mlp")
        model[0].weight[0, 0] += ours.rank
    for attempt in (
        lambda: ours.agree(model),
        lambda: next(walk(model, make_task("mlp").batches("calibration", 4))).calls,
        lambda: Wanda(samples=1).run(make_model("decoder"), ours.share(make_task("decoder"))),
    ):
        try:
            attempt()
        except SecateurError as error:
            said.append(str(error).replace("\\n", " "))
    (out / f"said-{ours.rank}.txt").write_text("\\n".join(said))
"""


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


PLACE = {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}


def started(out: Path, rank: int, port: int) -> subprocess.Popen[str]:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, str(out)], env={**ALONE, **PLACE, **place}, stderr=subprocess.PIPE, text=True
    )


def masks(edits: Iterable[Edit]) -> dict[str, torch.Tensor]:
    return {edit.site.name: edit.keep for edit in edits if isinstance(edit, Mask)}


def held(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Every tensor, those that share storage apart, by name."""
    return {name: value.detach().clone().contiguous() for name, value in tensors(model).items()}


def test_two_processes_give_the_masks_of_one(tmp_path: Path) -> None:
    port = free_port()
    running = [started(tmp_path, rank, port) for rank in range(2)]
    alone = {n: masks(method.run(make_model(f), make_task(f)).edits) for n, (f, method) in RUNS.items()}
    for process in running:
        _, said = process.communicate(timeout=600)
        assert process.returncode == 0, said
    whole = {n: held(method.run(make_model(f), make_task(f)).model) for n, (f, method) in WATCHING.items()}
    for name, one in alone.items():
        two = masks(load_edits(tmp_path / f"{name}.safetensors"))
        assert len(one) >= 14
        assert one.keys() == two.keys()
        assert all(torch.equal(one[site], two[site]) for site in one), name
    for name, model in whole.items():
        two = load_file(tmp_path / f"{name}.safetensors")
        assert {n: v.shape for n, v in model.items()} == {n: v.shape for n, v in two.items()}, name
        for key, value in model.items():
            torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6, msg=f"{name}: {key}")
    for rank in range(2):
        differ, alone_only, short = (tmp_path / f"said-{rank}.txt").read_text().splitlines()
        assert "they end with different weights" in differ
        assert "each has only its share of them" in alone_only
        assert "Run this method in one process" in alone_only
        assert "Ask for 2 samples at least" in short


def test_torchrun_prunes_from_the_command_line_and_the_first_process_writes(tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "secateur"]
    verb = ["prune", "tiny:decoder", "wanda", "--task", "tiny:toy_text", "--samples", "16", "--json", "--out"]
    command = [*launch, *verb, str(tmp_path / "two")]
    two = subprocess.run(command, env={**ALONE, **PLACE}, capture_output=True, text=True, timeout=600, check=False)
    assert two.returncode == 0, two.stderr
    one = CliRunner().invoke(main, [*verb, str(tmp_path / "one")])
    assert one.exit_code == 0, one.output
    record = json.loads(two.stdout)  # one process speaks
    assert "calibrated in 2 processes" in record["notes"]
    assert record["measurements"][1]["values"] == json.loads(one.stdout)["measurements"][1]["values"]
    first, both = (masks(load_edits(tmp_path / out / "edits.safetensors")) for out in ("one", "two"))
    assert all(torch.equal(first[site], both[site]) for site in first)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one", "one.log", "two", "two.log"]


def test_a_share_is_every_so_manieth_batch_and_only_of_calibration() -> None:
    task = make_task("decoder")
    shares = [Share(task, Processes(rank, 3)) for rank in range(3)]
    whole = [b.inputs[0] for b in task.batches("calibration", 40)]
    dealt = [[b.inputs[0] for b in share.batches("calibration", 40)] for share in shares]
    assert sum(len(part) for part in dealt) == len(whole)
    assert all(torch.equal(dealt[i % 3][i // 3], batch) for i, batch in enumerate(whole))
    single = [b.size for share in shares for b in share.batches("calibration", 4)]
    assert single == [1, 1, 1, 1]  # one batch of four, dealt out by examples
    assert len(list(shares[1].batches("train", 40))) == len(list(task.batches("train", 40)))
    assert shares[1].fingerprint() == task.fingerprint()
    with pytest.raises(TaskError, match=r"2 calibration examples were asked for[\s\S]*3 samples at least"):
        shares[0].batches("calibration", 2)


def test_what_was_seen_is_merged_before_it_is_used() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    batches = list(task.batches("calibration", 16))
    plain = observe(model, weights(model), batches, {"input_square"})

    def doubled(found: dict[str, Evidence]) -> dict[str, Evidence]:
        return {name: seen.merge(seen) for name, seen in found.items()}

    with merging(doubled):
        twice = observe(model, weights(model), batches, {"input_square"})
        with pytest.raises(SettingError, match=r"inputs of model.layers.0[\s\S]*without torchrun"):
            next(walk(make_model("decoder"), make_task("decoder").batches("calibration", 4))).calls  # noqa: B018
    for name, seen in plain.items():
        assert twice[name].count == 2 * seen.count
        assert torch.equal(twice[name].sums["input_square"], 2 * seen.sums["input_square"])


def test_one_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    task = make_task("mlp")
    with together() as ours:
        assert ours == Processes()
        assert ours.alone
        assert ours.share(task) is task
        ours.agree(make_model("mlp"))
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(SettingError, match="WORLD_SIZE=two"), together():
        pass
