"""Exports: written, tried in the run-time, and only then there; what a run-time does not take is refused with why."""

import importlib
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from small_nets import first, llama, mlp, vit
from tiny import moe
from torch import nn

from secateur.cli import main
from secateur.cut import weights
from secateur.edit import Mask, Remove, apply_
from secateur.errors import ExportError, SettingError
from secateur.export import densify, export, exporting, target_named
from secateur.methods.int8 import rounded
from secateur.models import Opened, hf, open_model, save
from secateur.models.folder import header
from secateur.outcome import Outcome, Record
from secateur.report.ledger import lines


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Saved models: layers alike, layers of different widths, half of the weights masked, and that in 8 bits."""
    place = tmp_path_factory.mktemp("saved")
    for name, widths in (("stock", (32, 32)), ("uneven", (32, 20))):
        model = llama()
        save(Outcome(model, apply_(model, [Remove(mlp(model, i), first(48, w)) for i, w in enumerate(widths)])),
             llama(), place / name)  # fmt: skip
    for name in ("masked", "eight"):
        model = llama()
        masks = [Mask(site, _upper(model, site)) for site in weights(model)]
        edits = apply_(model, masks)
        if name == "eight":
            for site in weights(model):
                value = model.get_parameter(site.name)
                value.data = rounded(value.data)
        save(Outcome(model, edits), llama(), place / name)
    return place


def _upper(model, site):
    value = model.get_parameter(site.name).detach().abs()
    return value > value.median()


def refused(*words, what, **options):
    with pytest.raises((ExportError, SettingError)) as caught:
        export(what, **options)
    assert all((caught.value.asked, caught.value.found, caught.value.do))
    for word in words:
        assert word in str(caught.value)


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def test_a_sparse_file_is_smaller_and_says_so_in_the_record(folders, tmp_path):
    done = export(folders / "masked", "sparse", tmp_path / "x.safetensors")
    assert done.difference == 0 and done.bytes < 0.75 * done.dense_bytes  # embeddings are whole, and half of it all
    kept = export(folders / "eight", "sparse", tmp_path / "y.safetensors")
    assert kept.bytes < done.bytes
    densify(tmp_path / "y.safetensors", tmp_path / "plain.safetensors")
    wanted, plain = load_file(folders / "eight" / "model.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert all(torch.equal(plain[name], value) for name, value in wanted.items())
    record = Record.read(folders / "eight" / "secateur.json")
    assert [each.path for each in record.exports] == [str(tmp_path / "y.safetensors")]
    line = next(line for line in lines(record) if line.name == "bytes as sparse")
    assert "answers alike" in line.how and line.change.endswith("less")
    open_model(folders / "eight")  # the record is whole still


def test_a_folder_says_in_its_config_in_what_its_layers_differ(folders):
    hub = pytest.importorskip("transformers")
    said = json.loads((folders / "uneven" / "config.json").read_text())
    assert said["model_type"] == "secateur-llama"  # whose classes would build every layer alike
    assert said["per_layer_config"] == {"0": {"intermediate_size": 32}, "1": {"intermediate_size": 20}}
    config = hub.LlamaConfig.from_dict({**said, "model_type": "llama"})
    assert [config.per_layer_config[place].intermediate_size for place in (0, 1)] == [32, 20]
    assert "per_layer_config" not in json.loads((folders / "stock" / "config.json").read_text())


def test_biases_that_came_along_are_not_why_layers_differ(tmp_path):
    model, before = llama(), llama()
    edits = apply_(model, [Remove(mlp(model, 1), first(48, 20))])
    down = model.model.layers[1].mlp.down_proj
    down.bias = nn.Parameter(torch.ones(32))  # as methods add that make up for what is gone
    config, why = hf.fit_config(type(model), before.config, hf.shapes_of(model), hf.kept_layers(model, before))
    assert config is None and edits
    assert (
        why == "layers differ in shape: model.layers.1.mlp.gate_proj.weight is [20, 32] where one config gives [48, 32]"
    )


def test_onnx_takes_layers_of_different_widths_and_answers_alike(folders, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    done = export(folders / "uneven", "onnx", tmp_path / "x.onnx")
    assert done.difference < 1e-5 and done.runtime.startswith("ONNX Runtime ")
    session = runtime.InferenceSession(str(tmp_path / "x.onnx"), providers=["CPUExecutionProvider"])
    ids = np.arange(21, dtype=np.int64).reshape(3, 7)
    said = session.run(["logits"], {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    ours = open_model(folders / "uneven").model(input_ids=torch.from_numpy(ids)).logits
    assert np.abs(said - ours.detach().numpy()).max() < 1e-5
    assert left(tmp_path) == ["x.onnx"]


def test_onnx_keeps_eight_bits(folders, tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    done = export(folders / "eight", "onnx", tmp_path / "x.onnx")
    assert done.notes[0] == "14 matrices are kept in 8 bits with a scale a row"
    types = {c.data_type for c in onnx.load(str(tmp_path / "x.onnx")).graph.initializer if c.name.endswith(".int8")}
    assert types == {onnx.TensorProto.INT8}
    assert done.difference < 1e-5
    assert done.bytes < export(folders / "masked", "onnx", tmp_path / "y.onnx").bytes


def test_an_embedding_tied_to_the_head_stands_once_in_a_graph(folders, tmp_path, monkeypatch):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(importlib.import_module("secateur.export.onnx"), "LARGE", 50 * 32)
    done = export(folders / "uneven", "onnx", tmp_path / "x.onnx")
    held = [c.name for c in onnx.load(str(tmp_path / "x.onnx")).graph.initializer if sorted(c.dims) == [32, 50]]
    assert len(held) == 1 and done.difference < 1e-5


def test_experts_go_to_onnx_and_their_eight_bits_to_a_sparse_file(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = moe()
    for site in weights(model):
        seen = site.parts[0].view(dict(model.named_parameters())[site.parts[0].name].data)
        seen.copy_(rounded(seen))
    way = model.config._experts_implementation
    opened = Opened(model, tokenizer=None, kind="text", name="moe", source="moe", config=model.config.to_dict())
    done = export(opened, "onnx", tmp_path / "x.onnx")
    assert done.difference < 1e-5 and model.config._experts_implementation == way
    kept = export(opened, "sparse", tmp_path / "x.safetensors").notes
    assert any(note.endswith("kept int8 dense") for note in kept)
    experts = header(tmp_path / "x.safetensors")["model.layers.0.mlp.experts.down_proj.scale"]
    assert experts.shape == model.model.layers[0].mlp.experts.down_proj.shape[:2]


def test_a_network_that_cannot_be_traced_is_refused_in_three_lines(tmp_path, capfd):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")

    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return torch.histc(self.linear(x), bins=4)

    opened = Opened(Counts(), tokenizer=None, kind="image", name="counts", source="counts", config={})
    refused("was to be traced", "histc", what=opened, to="onnx", out=tmp_path / "x.onnx", example=(1, 4))
    told = capfd.readouterr()
    assert (told.out, left(tmp_path)) == ("", [])  # no graph, which torch writes past Python


def test_openvino_loads_what_was_cut(folders, tmp_path):
    pytest.importorskip("openvino")
    pytest.importorskip("onnx")
    done = export(folders / "eight", "openvino", tmp_path / "x")
    assert done.difference < 1e-5 and done.runtime.startswith("OpenVINO ")
    assert left(tmp_path / "x") == ["openvino_model.bin", "openvino_model.xml", "secateur-export.json"]


def test_a_network_that_is_no_language_model(tmp_path):
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    assert export(Opened(vit(), None, "vit", "vit", "hf", vit().config.to_dict()), "onnx", tmp_path / "v.onnx").bytes
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    opened = Opened(net, None, "net", "net", "python")
    assert export(opened, "onnx", tmp_path / "n.onnx", example=(1, 3, 8, 8)).difference < 1e-5
    refused("it does not say what an input looks like", "--example 1x3x32x32",
            what=opened, to="onnx", out=tmp_path / "m.onnx")  # fmt: skip


def test_transformers_takes_layers_that_are_alike(folders, tmp_path):
    done = export(folders / "stock", "hf", tmp_path / "x", dtype="bfloat16")
    assert done.difference == 0
    assert {entry.dtype for entry in header(tmp_path / "x" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "x" / "config.json").read_text())["intermediate_size"] == 32
    refused(
        "stock transformers has no such model",
        "is [32, 32] where one config gives [48, 32]",
        "Cut every layer alike",
        what=folders / "uneven",
        to="hf",
        out=tmp_path / "y",
    )
    assert left(tmp_path) == ["x"]


def test_answers_that_differ_leave_nothing(folders, tmp_path, monkeypatch):
    form = target_named("sparse")
    say = type(form).answers
    monkeypatch.setattr(type(form), "answers", lambda *args: [value + 1 for value in say(*args)])
    with pytest.raises(ExportError, match="its answers there differ by .* of their length, and 0 is allowed") as caught:
        export(folders / "stock", "sparse", tmp_path / "x.safetensors")
    assert caught.value.exit_code == 3 and left(tmp_path) == []
    monkeypatch.setattr(type(form), "answers", lambda *args: [value * torch.nan for value in say(*args)])
    refused("its answers there differ by nan", what=folders / "stock", to="sparse", out=tmp_path / "x.safetensors")


def test_what_is_there_is_not_written_over(folders, tmp_path):
    (tmp_path / "x").mkdir()
    out = tmp_path / "x.safetensors"
    out.write_text("mine")
    refused("something is there already", what=folders / "stock", to="sparse", out=out)
    export(folders / "stock", "sparse", out, overwrite=True)
    refused("not exported by secateur", what=folders / "stock", to="hf", out=tmp_path / "x", overwrite=True)
    for _ in range(2):
        export(folders / "stock", "hf", tmp_path / "y", overwrite=True)
    assert left(tmp_path) == ["x", "x.safetensors", "y"]


def test_a_run_time_that_is_missing_is_named_with_its_extra(folders, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    import sys

    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    out = tmp_path / "x.onnx"
    refused("onnxruntime is not installed", "pip install 'secateur[onnx]'", "--unverified",
            what=folders / "stock", to="onnx", out=out)  # fmt: skip
    done = export(folders / "stock", "onnx", out, verify=False)
    assert done.difference is None and done.runtime == "" and out.exists()
    monkeypatch.setitem(sys.modules, "onnx", None)
    refused("onnx is not installed", what=folders / "stock", to="onnx", out=tmp_path / "y.onnx", verify=False)


def test_names_and_shapes_are_checked(folders):
    refused("an export to 'onxn' was asked for", "Did you mean onnx?", what=folders / "stock", to="onxn")
    for text, said in (("3x", "it is no shape"), ("0x3", "it is no shape")):
        ran = CliRunner().invoke(main, ["export", str(folders / "stock"), "--to", "onnx", "--example", text])
        assert ran.exit_code == 2 and said in ran.output


def test_default_names(folders):
    assert exporting.default_out("a/pruned", "onnx") == "pruned.onnx"  # nothing is there of that name
    assert exporting.default_out(str(folders / "stock"), "hf") == f"{folders / 'stock'}-hf"
    assert exporting.default_out("smollm2", "sparse") == "smollm2.sparse.safetensors"


def test_the_command_line(folders, tmp_path):
    out = tmp_path / "x.safetensors"
    ran = CliRunner().invoke(main, ["export", str(folders / "masked"), "--to", "sparse", "--out", str(out)])
    assert ran.exit_code == 0 and "answers as the model does (difference 0)" in ran.output, ran.output
    ran = CliRunner().invoke(main, ["export", str(folders / "masked"), "--to", "sparse", "--out", f"{out}2", "--json"])
    assert json.loads(ran.stdout)["target"] == "sparse"
    ran = CliRunner().invoke(main, ["export", str(folders / "nowhere"), "--to", "sparse"])
    assert ran.exit_code == 2
