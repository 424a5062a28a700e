"""A model larger than memory: its weights lie in a file, the run is the same, and the limit is a real one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import decoder, make_task, moe, toy_text
from torch import nn

from secateur import prune
from secateur.cli import main
from secateur.edit import Mask
from secateur.errors import ModelError, SettingError
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.models import load, load_edits, open_model, save

HERE = Path(__file__).parent

LIMITED = """
import resource, sys
from pathlib import Path
from tiny import toy_text
from secateur import prune
from secateur.methods.wanda import Wanda
from secateur.models import open_model, save

folder, out, room = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
task = toy_text(batch=2)
import transformers.models.llama.modeling_llama  # what importing takes is there already
held = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmData")) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (held + room, held + room))
opened = open_model(folder, offload=out.parent)
done = prune(opened.model, Wanda(samples=4), task, inplace=True)
save(done, opened, out)
print("pruned", done.ledger.sparsity, flush=True)
try:
    open_model(folder)
except BaseException as error:
    print("refused", type(error).__name__)
"""


def folder_of(model: nn.Module, path: Path) -> Path:
    model.save_pretrained(str(path))
    return path


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits of memory are kept by Linux alone")
def test_a_model_larger_than_the_memory_there_is_is_pruned(tmp_path: Path) -> None:
    """What is mapped from a file can be taken back at any time; what cannot, RLIMIT_DATA limits to half the model."""
    model = decoder(layers=12, hidden_size=512, intermediate_size=1536, head_dim=128, tie_word_embeddings=False)
    folder, room = folder_of(model, tmp_path / "big"), 64 * 2**20
    size = (folder / "model.safetensors").stat().st_size
    assert size > 2 * room
    place = {"PYTHONPATH": f"{HERE}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    # One arena: each thread of the allocator would reserve some of the limit for itself.
    place |= {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(folder), str(tmp_path / "out"), str(room)],
        env={**os.environ, **place}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[0] == "pruned 0.5"
    assert done.stdout.splitlines()[1].startswith("refused")  # the same model does not fit when it is opened as usual
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big", "out"]  # the working file had no name
    plain = {e.site.name: e.keep for e in prune(model, Wanda(samples=4), toy_text(batch=2), inplace=True).edits}
    found = {e.site.name: e.keep for e in load_edits(tmp_path / "out") if isinstance(e, Mask)}
    assert found.keys() == plain.keys()
    assert all(torch.equal(found[name], plain[name]) for name in plain)
    stock = type(model).from_pretrained(str(tmp_path / "out"))
    assert all(torch.equal(v, stock.state_dict()[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("method", [Wanda(samples=8), SparseGPT(samples=16)], ids=lambda m: m.name)
@pytest.mark.parametrize("tied", [True, False])
def test_a_run_on_a_file_is_the_run_in_memory_to_the_bit(method: object, tied: bool, tmp_path: Path) -> None:
    folder = folder_of(decoder(tie_word_embeddings=tied), tmp_path / "model")
    source = (folder / "model.safetensors").read_bytes()
    task = make_task("decoder")
    for name, offload in (("usual", None), ("filed", tmp_path / "scratch")):
        opened = open_model(folder, offload=offload)
        save(prune(opened.model, method, task, inplace=True), opened, tmp_path / name)
        assert (opened.resting is not None and opened.resting.holds(opened.model)) == (offload is not None)
    usual, filed = load(tmp_path / "usual"), load(tmp_path / "filed")
    assert all(torch.equal(v, filed.state_dict()[k]) for k, v in usual.state_dict().items())
    said = [json.loads((tmp_path / n / "secateur.json").read_text())["saved"] for n in ("usual", "filed")]
    assert said[0]["stock"] is said[1]["stock"] is True
    assert said[0]["aliases"] == said[1]["aliases"]
    configs = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("usual", "filed")]
    assert configs[0] == configs[1]
    assert (folder / "model.safetensors").read_bytes() == source  # the model that was opened is left alone
    assert list((tmp_path / "scratch").iterdir()) == []


def test_another_precision_is_the_same_as_when_it_is_opened_in_memory(tmp_path: Path) -> None:
    folder = folder_of(decoder().to(torch.bfloat16), tmp_path / "model")
    for dtype in ("float32", "bfloat16", "float16"):
        usual, filed = open_model(folder, dtype=dtype), open_model(folder, dtype=dtype, offload=tmp_path)
        assert filed.model.config.dtype == usual.model.config.dtype
        there = filed.model.state_dict()
        assert all(torch.equal(v, there[k]) and v.dtype == there[k].dtype for k, v in usual.model.state_dict().items())
        buffers = dict(filed.model.named_buffers())
        assert all(torch.equal(b, buffers[n]) for n, b in usual.model.named_buffers())
        assert next(filed.model.parameters()).requires_grad


def test_shards_are_read_where_they_are(tmp_path: Path) -> None:
    model = decoder()
    model.save_pretrained(str(tmp_path / "model"), max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 2
    filed, usual = open_model(tmp_path / "model", offload=tmp_path), open_model(tmp_path / "model")
    assert all(torch.equal(v, filed.model.state_dict()[k]) for k, v in model.state_dict().items())
    for opened, out in ((filed, "filed"), (usual, "usual")):  # pruned and saved, in one file each
        save(prune(opened.model, Wanda(samples=8), make_task("decoder"), inplace=True), opened, tmp_path / out)
    first, second = load(tmp_path / "filed").state_dict(), load(tmp_path / "usual").state_dict()
    assert all(torch.equal(v, second[k]) for k, v in first.items())
    assert [p.name for p in (tmp_path / "filed").glob("model*.safetensors")] == ["model.safetensors"]


def test_a_cut_leaves_the_file_and_is_saved_as_usual(tmp_path: Path) -> None:
    folder, task = folder_of(decoder(layers=4), tmp_path / "model"), make_task("decoder")
    opened = open_model(folder, offload=tmp_path)
    done = prune(opened.model, ShortGPT(sparsity=0.5, samples=4), task, inplace=True)
    assert opened.resting is not None
    assert not opened.resting.holds(done.model)
    save(done, opened, tmp_path / "out")
    assert all(torch.equal(v, load(tmp_path / "out").state_dict()[k]) for k, v in done.model.state_dict().items())


def test_the_command_line_keeps_weights_in_a_file_beside_the_result(tmp_path: Path) -> None:
    folder = folder_of(decoder(), tmp_path / "model")
    command = ["prune", str(folder), "wanda", "--samples", "8", "--task", "tiny:toy_text", "--no-eval", "--out"]
    for name, more in (("usual", []), ("filed", ["--offload"])):
        done = CliRunner().invoke(main, [*command, str(tmp_path / name), *more])
        assert done.exit_code == 0, done.output
    usual, filed = (tmp_path / n / "model.safetensors" for n in ("usual", "filed"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["filed", "filed.log", "model", "usual", "usual.log"]
    states = [load(p.parent).state_dict() for p in (usual, filed)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


def test_what_cannot_lie_in_a_file_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no Hugging Face folder[\s\S]*without offload"):
        open_model("tiny:decoder", offload=tmp_path)
    folder = folder_of(moe(), tmp_path / "moe")
    with pytest.raises(ModelError, match=r"put together from others[\s\S]*without offload"):
        open_model(folder, offload=tmp_path)  # stored an expert a tensor, and stacked when it is built
    with pytest.raises(SettingError, match=r"were to be on cuda[\s\S]*works on the CPU"):
        open_model(folder, offload=tmp_path, device="cuda")
