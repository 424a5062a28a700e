"""An ONNX file goes in, a smaller valid one comes out, and it answers as the masked network does."""

import copy
import os
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("onnx", reason="onnx is not installed: pip install 'secateur[onnx]'")
pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: pip install 'secateur[onnx]'")

import onnx as standard
from models.onnx_nets import Answering, Mixed, Padded, exported, graph, normal, seeded
from onnx import helper

from secateur import prune
from secateur.edit import Mask, apply_
from secateur.errors import ModelError, TaskError
from secateur.graph import couple, removals
from secateur.methods.l1_norm import L1Norm
from secateur.models import inspect_file, load, onnx, open_model, save, save_onnx
from secateur.task import Batch
from secateur.tasks import open_task
from secateur.tasks.answers import answers


def cut_and_masked(path: Path, where: Path, exact: bool = False):
    """Cut 30 % of every site in a file, and mask the same: the networks, the files and the coupling."""
    network = onnx.load(path)
    example = network.example()
    assert onnx.difference(onnx.answers(network, example), onnx.run(path, example)) < 1e-5
    coupling = couple(network, Batch(example))
    draw, keep = torch.Generator().manual_seed(0), {}
    for site in coupling.sites:
        if exact and site.name in coupling.inexact:
            continue
        keep[site.name] = torch.ones(site.units, dtype=torch.bool)
        keep[site.name][torch.randperm(site.units, generator=draw)[: max(1, int(0.3 * site.units))]] = False
    masked, cut = copy.deepcopy(network), copy.deepcopy(network)
    apply_(masked, [Mask(s, keep[s.name]) for s in coupling.sites if s.name in keep])
    apply_(cut, removals(coupling.sites, keep))
    onnx.write(masked, where / "masked.onnx")
    onnx.write(cut, where / "cut.onnx")
    return coupling, onnx.run(where / "masked.onnx", example), onnx.run(where / "cut.onnx", example)


def test_the_shortcut_of_a_cifar_resnet_is_cut_with_what_pads_it(tmp_path):
    path = exported(seeded(Padded), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",), opset=11)
    coupling, masked, cut = cut_and_masked(path, tmp_path)
    assert onnx.difference(masked, cut) < 1e-5
    assert sorted(s.units for s in coupling.sites) == [
        3,
        3,
        6,
        12,
    ]  # what pads on either side, what passes, what is inside
    assert any(".counts." in p.name for s in coupling.sites for p in s.parts)
    before, after = (standard.load(str(tmp_path / n)) for n in ("net.onnx", "cut.onnx"))
    shapes = {t.name: list(t.dims) for t in after.graph.initializer}
    assert sum(np.prod(s) for s in shapes.values()) < 0.75 * sum(np.prod(t.dims) for t in before.graph.initializer)
    standard.checker.check_model(after, full_check=True)


def test_what_torch_has_no_operator_for_is_run_frozen_and_named(tmp_path):
    path = exported(seeded(Mixed), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",))
    coupling, masked, cut = cut_and_masked(path, tmp_path, exact=True)
    assert onnx.difference(masked, cut) < 1e-5
    assert [(f.what, f.why) for f in coupling.frozen] == [("onnx.GRU", "there is no rule for this operator")]
    assert "gru" in coupling.frozen[0].where
    assert len(coupling.sites) >= 2


@pytest.mark.parametrize("fixed", [True, False], ids=["fixed shapes", "open shapes"])
def test_heads_and_neurons_of_transformers(tmp_path, fixed):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1, intermediate_size=24,
        vocab_size=50, max_position_embeddings=32, attn_implementation="eager", use_cache=False,
    )  # fmt: skip
    ids, mask = torch.randint(0, 50, (1, 16)), torch.ones(1, 16, dtype=torch.long)
    axes = {} if fixed else {"dynamic_axes": {n: {0: "batch", 1: "tokens"} for n in ("ids", "mask")}}
    model = Answering(seeded(lambda: LlamaForCausalLM(config)))
    path = exported(model, tmp_path / "net.onnx", ids, mask, names=("ids", "mask"), **axes)
    coupling, masked, cut = cut_and_masked(path, tmp_path, exact=True)
    assert {(s.kind, s.units) for s in coupling.sites} >= {("head", 2), ("channel", 24)}
    assert onnx.difference(masked, cut) < 1e-5
    if not fixed:
        more = (torch.randint(0, 50, (3, 5)), torch.ones(3, 5, dtype=torch.long))
        again = onnx.run(tmp_path / "cut.onnx", more)
        assert again[0].shape == (3, 5, 50)


@pytest.mark.data
@pytest.mark.parametrize("name", ["face_slim320", "fastestdet_coco"])
def test_files_from_elsewhere_are_cut_and_answer_as_the_masked_network(name, data, tmp_path):
    path = data / "weights" / f"{name}.onnx"
    coupling, masked, cut = cut_and_masked(path, tmp_path)
    assert not coupling.frozen
    assert onnx.difference(masked, cut) < 1e-5
    assert os.path.getsize(tmp_path / "cut.onnx") < 0.65 * os.path.getsize(path)


def test_a_vector_that_two_layers_share_by_chance_is_not_tied(tmp_path):
    """Exporters store equal vectors once; cutting one layer must not cut the other."""
    nodes = [
        helper.make_node("Gemm", ["x", "a", "zero"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b", "zero"], ["k"], transB=1),
        helper.make_node("Relu", ["k"], ["s"]),
        helper.make_node("Gemm", ["s", "c"], ["y"], transB=1),
    ]
    made = graph(nodes, {"x": [1, 5]}, {"y": [1, 2]}, {
        "a": normal(8, 5), "b": normal(8, 8, seed=1), "c": normal(2, 8, seed=2), "zero": np.zeros(8, np.float32),
    })  # fmt: skip
    standard.save(made, str(tmp_path / "net.onnx"))
    network = onnx.load(tmp_path / "net.onnx")
    sites = couple(network, Batch(network.example())).sites
    assert [site.units for site in sites] == [8, 8]
    apply_(network, removals(sites, {sites[0].name: torch.arange(8) > 2}))
    onnx.write(network, tmp_path / "cut.onnx")
    shapes = {t.name: list(t.dims) for t in standard.load(str(tmp_path / "cut.onnx")).graph.initializer}
    assert shapes == {"a": [5, 5], "b": [8, 5], "c": [2, 8], "zero": [5], "zero_1": [8]}


def test_from_a_file_to_a_smaller_file_with_its_record(tmp_path):
    path = exported(seeded(Padded), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",))
    opened = open_model(path)
    task = open_task("answers", model=opened.model, samples=8)
    done = prune(opened.model, L1Norm(sparsity=0.5), task, measure="val")
    beside = save_onnx(done, opened, tmp_path / "smaller.onnx")
    assert beside == tmp_path / "smaller.json"
    assert done.ledger.after.parameters < 0.6 * done.ledger.before.parameters
    assert done.record.measured("after")["difference"] > done.record.measured("before")["difference"] == 0
    found = inspect_file(tmp_path / "smaller.onnx")
    assert found["format"] == "onnx" and found["metadata"]["method"] == "l1_norm"
    assert found["metadata"]["opset"] == {"ai.onnx": 17}
    again = open_model(tmp_path / "smaller.onnx")
    x = again.model.example()
    assert onnx.difference(onnx.answers(done.model, x), onnx.answers(again.model, x)) < 1e-6
    with pytest.raises(ModelError, match=r"smaller.onnx is there already"):
        save_onnx(done, opened, tmp_path / "smaller.onnx")
    with pytest.raises(ModelError, match=r"it exists and secateur did not write it"):
        save_onnx(done, opened, path, overwrite=True)
    folder = save(done, opened, tmp_path / "folder")
    assert onnx.difference(onnx.answers(load(folder), x), onnx.answers(done.model, x)) < 1e-6


def test_it_trains_towards_the_answers_of_the_whole_network(tmp_path):
    from secateur import fit

    path = exported(seeded(Padded), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",),
                    dynamic_axes={"x": {0: "batch"}})  # fmt: skip
    network = onnx.load(path)
    task = answers(network, samples=32)
    prune(network, L1Norm(sparsity=0.5), task, inplace=True)
    before = task.measure(network)["difference"]
    fit(network, task, steps=60, optimizer=torch.optim.Adam(network.parameters(), 1e-2))
    assert task.measure(network)["difference"] < 0.8 * before


def test_inputs_of_a_file(tmp_path):
    path = exported(seeded(Padded), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",))
    network = onnx.load(path)
    np.savez(tmp_path / "inputs.npz", x=normal(6, 3, 8, 8))
    task = open_task("answers", model=network, inputs=str(tmp_path / "inputs.npz"))
    assert [len(list(task.batches(split))) for split in ("calibration", "val")] == [3, 3]
    np.savez(tmp_path / "other.npz", a=normal(6, 3, 8, 8), b=normal(6, 3))
    with pytest.raises(TaskError) as caught:
        open_task("answers", model=network, inputs=str(tmp_path / "other.npz"))
    assert caught.value.found == "it holds a, b, and not 'x'"


# Bad input


def one_gemm(**more):
    return graph([helper.make_node("Gemm", ["x", "a"], ["y"], transB=1)], {"x": [1, 4]}, {"y": [1, 3]},
                 {"a": normal(3, 4)}, **more)  # fmt: skip


def refused(tmp_path: Path, model) -> ModelError:
    path = tmp_path / "net.onnx"
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(ModelError) as caught:
        open_model(path)
    assert caught.value.asked == f"{path} was to be opened"
    assert caught.value.do
    return caught.value


def test_external_data_that_is_missing_short_or_elsewhere(tmp_path):
    made = one_gemm()
    standard.save(made, str(tmp_path / "net.onnx"), save_as_external_data=True, location="net.data", size_threshold=0)
    assert open_model(tmp_path / "net.onnx").model.example()
    whole = (tmp_path / "net.onnx").read_bytes()
    (tmp_path / "net.data").write_bytes(b"\0" * 8)
    assert refused(tmp_path, whole).found == "net.data has 8 bytes, and a ends at 48"
    (tmp_path / "net.data").unlink()
    error = refused(tmp_path, whole)
    assert error.found == "a and others lie in 'net.data', and there is no such file beside it"
    assert error.do == f"Put net.data into {tmp_path.resolve()}."
    away = standard.ModelProto.FromString(whole)
    for entry in away.graph.initializer[0].external_data:
        entry.value = "../net.data" if entry.key == "location" else entry.value
    assert refused(tmp_path, away).found == "a lies in '../net.data', which is not beside the file"


def test_an_opset_that_is_too_old_or_too_new(tmp_path):
    assert refused(tmp_path, one_gemm(opset=6)).found == "it is of opset 6, and the oldest that is read is 7"
    newest = standard.defs.onnx_opset_version()
    found = refused(tmp_path, one_gemm(opset=newest + 1)).found
    assert found == f"it is of opset {newest + 1}, and onnx {standard.__version__} knows {newest}"


def test_a_node_of_an_unknown_domain_is_named(tmp_path):
    node = helper.make_node("Blend", ["x"], ["y"], name="mix", domain="acme")
    error = refused(tmp_path, graph([node], {"x": [1, 4]}, {"y": [1, 4]}, {}, domains=("acme",)))
    assert error.found == ("node 'mix' is a Blend of the domain 'acme', which neither ONNX nor ONNX Runtime knows")


def test_a_node_of_onnx_runtime_s_own_is_run_and_frozen(tmp_path):
    nodes = [
        helper.make_node("Gemm", ["x", "a"], ["h"], transB=1),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Gemm", ["r", "b"], ["k"], transB=1),
        helper.make_node("QuickGelu", ["k"], ["s"], name="act", domain="com.microsoft", alpha=1.5),
        helper.make_node("Gemm", ["s", "c"], ["y"], transB=1),
    ]
    made = graph(nodes, {"x": [1, 5]}, {"y": [1, 2]}, {
        "a": normal(8, 5), "b": normal(6, 8, seed=1), "c": normal(2, 6, seed=2)
    }, domains=("com.microsoft",))  # fmt: skip
    (tmp_path / "net.onnx").write_bytes(made.SerializeToString())
    coupling, masked, cut = cut_and_masked(tmp_path / "net.onnx", tmp_path)
    assert [site.units for site in coupling.sites] == [8]
    assert [f.what for f in coupling.frozen] == ["onnx.com_microsoft_QuickGelu"]
    assert onnx.difference(masked, cut) < 1e-6


def test_a_loop_is_named_and_a_broken_file_refused(tmp_path):
    body = helper.make_graph([helper.make_node("Identity", ["c"], ["d"])], "body", [], [])
    node = helper.make_node("If", ["x"], ["y"], name="branch", then_branch=body, else_branch=body)
    assert refused(tmp_path, graph([node], {"x": [1]}, {"y": [1]}, {})).found == (
        "node 'branch' is a If, which holds a graph of its own"
    )
    assert refused(tmp_path, b"not a graph at all").found.startswith("it is not a whole ONNX file")
    assert refused(tmp_path, one_gemm().SerializeToString()[:40]).found


def test_from_the_command_line(tmp_path, monkeypatch):
    import json

    from click.testing import CliRunner

    from secateur.cli import main

    monkeypatch.chdir(tmp_path)
    exported(seeded(Padded), tmp_path / "net.onnx", torch.randn(1, 3, 8, 8), names=("x",))

    def said(*args):
        found = CliRunner().invoke(main, args)
        assert found.exit_code == 0, found.output
        return found.output

    task = ("--task.samples", "4")
    assert "4 sites" in said("plan", "net.onnx", "spa", "--sparsity", "0.3", *task)
    text = said("prune", "net.onnx", "spa", "--sparsity", "0.3", "--of", "flops", "--out", "smaller.onnx", *task)
    assert "smaller.json, smaller.onnx" in text
    record = json.loads((tmp_path / "smaller.json").read_text())
    ledger = record["ledger"]
    assert ledger["after"]["flops"] == pytest.approx(0.7 * ledger["before"]["flops"], rel=0.06)
    assert ledger["after"]["stored_bytes"] == os.path.getsize("smaller.onnx")
    assert record["saved"]["kind"] == "onnx"
    assert "smaller.onnx: onnx" in said("inspect", "smaller.onnx")


def test_numbers_are_gathered_element_by_element():
    from secateur.models.onnx.network import _of_numbers
    from secateur.models.onnx.operators import Node

    node = Node(0, "GatherElements", "pick", ("a", "b"), ("c",), {"axis": 1}, 17)
    (found,) = _of_numbers(node, 17, [np.arange(8).reshape(2, 4), np.array([[3, -1, 0]])])
    assert found.tolist() == [[3, 3, 0]]
