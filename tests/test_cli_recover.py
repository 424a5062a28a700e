"""`secateur recover`: from a pruned folder to a better one with the same zeros."""

import json
from pathlib import Path

import pytest
import torch
from command_line import run, said
from safetensors.torch import load_file, save_file

from secateur.cli import BAD_INPUT
from secateur.cli.recover import check_zeros
from secateur.errors import BudgetError
from secateur.models import load, load_edits
from secateur.outcome import Record

QUICK = ("--steps", "3", "--rate", "5e-3", "--task", "tiny:toy_text", "--no-eval", "--quiet")


def tensors(folder):
    return load_file(Path(folder) / "model.safetensors")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    out = tmp_path_factory.mktemp("pruned") / "pruned"
    run("prune", "tiny:decoder", "wanda", "--samples", "8", "--task", "tiny:toy_text", "--out", out, "--no-eval")
    return out


def test_recovering_keeps_every_zero_and_says_what_was_done(pruned, tmp_path):
    out = tmp_path / "better"
    run("recover", pruned, "perp", "--out", out, *QUICK)
    before, after = tensors(pruned), tensors(out)
    assert before.keys() == after.keys()
    masked = [e.site.name for e in load_edits(pruned)]
    assert masked
    for name in masked:
        assert torch.equal(before[name] == 0, after[name] == 0), name
        assert not torch.equal(before[name], after[name]), name
    record = Record.read(out / "secateur.json")
    assert record.command.startswith("secateur recover ")
    assert record.ledger.removed == 0
    assert record.ledger.before.zeros == record.ledger.after.zeros > 0
    assert any("parameters were trained" in note for note in record.notes)
    lineage = json.loads((out / "secateur.json").read_text())["saved"]["lineage"]
    assert [step["method"] for step in lineage] == ["wanda", "perp"]
    loaded = load(out)
    assert all(torch.equal(v, after[k]) for k, v in loaded.state_dict().items() if k in after)


def test_a_recovered_folder_can_be_recovered_again(pruned, tmp_path):
    run("recover", pruned, "perp", "--out", tmp_path / "one", *QUICK)
    run("recover", tmp_path / "one", "perp", "--subsets", "norms", "--out", tmp_path / "two", *QUICK)
    before, after = tensors(pruned), tensors(tmp_path / "two")
    for edit in load_edits(pruned):
        assert torch.equal(before[edit.site.name] == 0, after[edit.site.name] == 0)


@pytest.mark.parametrize("dense", [(), ("--dense", "tiny:decoder")])
def test_blocks_are_reconstructed_towards_the_model_the_folder_came_from(pruned, tmp_path, dense):
    out = tmp_path / "rebuilt"
    run("recover", pruned, "perp", "--by", "reconstruct(samples=8)", "--out", out, *dense, *QUICK)
    curves = Record.read(out / "secateur.json").curves
    first = [value for _, value in curves["block error before"]]
    last = [value for _, value in curves["block error after"]]
    assert len(first) == 2
    assert all(b < a for a, b in zip(first, last, strict=True))


def test_what_cannot_be_recovered_is_refused(pruned, tmp_path):
    assert "there is no such folder" in said(run("recover", tmp_path / "no", "perp", "--out", "x", code=BAD_INPUT))
    assert "no folder that secateur saved" in said(run("recover", tmp_path, "perp", "--out", "x", code=BAD_INPUT))
    found = said(run("recover", pruned, "wanda", "--out", tmp_path / "x", code=BAD_INPUT))
    assert "it prunes" in found
    assert "perp" in found
    found = said(run("recover", pruned, "perp", "--after", "wanda", "--out", tmp_path / "x", code=BAD_INPUT))
    assert "it prunes first, by wanda" in found
    found = said(run("recover", pruned, "perp", "--subsets", "mask-lorra", "--out", tmp_path / "x", code=BAD_INPUT))
    assert "Did you mean mask-lora" in found
    found = said(run("recover", pruned, "perp", "--subsets", "lora", "--out", tmp_path / "x", *QUICK, code=BAD_INPUT))
    assert "which merging would fill in" in found
    assert not (tmp_path / "x").exists()


def test_a_recovered_folder_is_not_the_dense_model(pruned, tmp_path):
    run("recover", pruned, "perp", "--out", tmp_path / "one", *QUICK)
    found = run(
        "recover", tmp_path / "one", "perp", "--by", "reconstruct", "--out", tmp_path / "two", *QUICK, code=BAD_INPUT
    )
    assert "which was pruned itself" in said(found)


def test_zeros_that_are_filled_on_disk_are_found(pruned, tmp_path):
    values = tensors(pruned)
    name = load_edits(pruned)[0].site.name
    place = (values[name] == 0).nonzero()[0]
    values[name][tuple(place)] = 1
    save_file(values, str(tmp_path / "model.safetensors"))
    with pytest.raises(BudgetError, match="1 weights of .* are no longer zero"):
        check_zeros(pruned, tmp_path)
