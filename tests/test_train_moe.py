"""The script that makes a mixture of experts out of a dense model: what it cuts adds up again."""

import importlib.util
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "tools" / "train_moe.py"
spec = importlib.util.spec_from_file_location("train_moe", SCRIPT)
assert spec is not None and spec.loader is not None
train_moe = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_moe)


def test_all_experts_together_are_the_dense_layer(capsys) -> None:
    dense, task = tiny.trained("decoder"), tiny.make_task("decoder")
    batches = list(task.batches("calibration", 8))
    model = train_moe.split(dense, batches, experts=6, shared=16, top_k=2, spread=0.3)
    assert model.config.num_experts == 6
    assert model.model.layers[0].mlp.experts.gate_up_proj.shape == (6, 16, 32)
    assert train_moe.off(dense, model, task.example) < 1e-4
    assert "6 experts of 8, 16 shared" in capsys.readouterr().out


def test_tuning_lowers_the_loss_and_leaves_the_rest_alone(capsys) -> None:
    dense, task = tiny.trained("decoder"), tiny.make_task("decoder")
    model = train_moe.split(dense, list(task.batches("calibration", 8)), experts=6, shared=16, top_k=1, spread=0.3)
    before, query = task.measure(model)["nll"], model.model.layers[0].self_attn.q_proj.weight.clone()
    rows = model.model.layers[0].mlp.gate.weight.clone()
    steps = train_moe.tune(
        model, dense, [task], train_moe.learning(model, False, (1e-2, 1e-2)), seconds=1.0, balance=0.01
    )
    assert steps > 1
    assert task.measure(model)["nll"] < before
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, query)
    assert not torch.equal(model.model.layers[0].mlp.gate.weight, rows)
    assert all(p.requires_grad for p in model.parameters())


class Words:
    """A tokenizer that writes a file, as they do."""

    def save_pretrained(self, folder) -> None:
        (Path(folder) / "words.json").write_text("{}")


def test_a_whole_run_writes_a_folder_that_the_stock_class_loads(tmp_path, monkeypatch, capsys) -> None:
    from transformers import AutoModelForCausalLM

    dense = tiny.trained("decoder")
    monkeypatch.setattr(train_moe, "open_model", lambda _: SimpleNamespace(model=dense, tokenizer=Words()))
    for name in ("wikitext2", "python_docs"):
        monkeypatch.setattr(train_moe, name, lambda _, **__: tiny.make_task("decoder"))
    out = ["--out", str(tmp_path / "moe"), "--minutes", "0.01", "--tokens", "64", "--window", "16", "--shared", "16"]
    monkeypatch.setattr(sys, "argv", ["train_moe", *out, "--experts", "6", "--top-k", "2"])
    train_moe.main()
    about = json.loads((tmp_path / "moe" / "about.json").read_text())
    assert about["steps"] >= 1
    assert set(about["perplexity"]) == {"dense", "split", "tuned"}
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert stock.config.num_experts == 6
    assert (tmp_path / "moe" / "words.json").exists()
    assert not list(tmp_path.glob(".moe*"))
    assert train_moe.cache().name == "secateur" or "SECATEUR_CACHE" in os.environ
    assert "all experts, even gates" in capsys.readouterr().out


def test_clusters_are_of_one_size_and_of_like_points() -> None:
    draw = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(5, 3, generator=draw) * 0.1 + 9 * torch.eye(3)[c] for c in range(3)])
    label = train_moe.balanced(points, 3)
    assert torch.bincount(label).tolist() == [5, 5, 5]
    skewed = torch.cat([points[:5], points[:5] * 1.01, points[10:]])
    assert torch.bincount(train_moe.balanced(skewed, 3)).tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="do not make 4 clusters"):
        train_moe.balanced(points, 4)


def test_a_router_predicts_who_has_most_to_say() -> None:
    dense = tiny.trained("decoder")
    mlp = dense.model.layers[0].mlp
    x = torch.randn(400, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, neurons = train_moe.parts_of(mlp, x, 6, 16)
        rows = train_moe.router_rows(mlp, x, neurons, spread=0.3)
        inner = torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
        said = torch.stack([(inner[:, own] @ mlp.down_proj.weight[:, own].T).norm(dim=1) for own in neurons], 1)
    logits = x @ rows.T
    assert float(logits.std()) == pytest.approx(0.3, rel=0.01)
    hits = (logits.argmax(1) == said.argmax(1)).float().mean()
    assert float(hits) > 1.5 / 6
