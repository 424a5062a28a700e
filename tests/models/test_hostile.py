"""Folders that are damaged, or made to do harm: each is refused with what was asked, what is there, what to do."""

import json
import pickle
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_nets import first, llama, mlp

from secateur import edit as edits_file
from secateur.edit import Mask, Remove, Replace, apply_
from secateur.errors import ModelError
from secateur.models import load, load_edits, open_model, save
from secateur.models.folder import header, plain_name, sha256
from secateur.outcome import Outcome
from secateur.site import Part, Site


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder that stock loaders take and one that they do not."""
    place = tmp_path_factory.mktemp("whole")
    for name, widths in (("stock", (32, 32)), ("uneven", (32, 20))):
        model = llama()
        edits = apply_(model, [Remove(mlp(model, i), first(48, w)) for i, w in enumerate(widths)])
        save(Outcome(model, edits), llama(), place / name)
    return place


@pytest.fixture(params=["stock", "uneven"])
def folder(folders, tmp_path, request):
    import shutil

    return shutil.copytree(folders / request.param, tmp_path / request.param)


def edit_json(path, **changes):
    values = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            values.pop(key, None)
        else:
            values[key] = value
    path.write_text(json.dumps(values))


def sign(folder):
    """Make the record agree with the files again: what somebody who means harm would do."""
    record = folder / "secateur.json"
    files = json.loads(record.read_text())["files"]
    edit_json(record, files={name: sha256(folder / name) for name in files if (folder / name).exists()})


def refused(folder, *words):
    for read in (load, open_model):
        with pytest.raises(ModelError) as caught:
            read(folder)
        assert all((caught.value.asked, caught.value.found, caught.value.do))
        for word in words:
            assert word in str(caught.value)


def config_of(folder):
    base = folder / "base_config.json"
    return base if base.exists() else folder / "config.json"


def test_the_whole_folder_loads(folder):
    assert sum(p.numel() for p in load(folder).parameters()) > 0
    sign(folder)
    load(folder)


def test_a_truncated_file(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, "sha256 differs", "Copy the folder again")
    sign(folder)
    refused(folder, "not a whole safetensors file")


def test_altered_bytes(folder):
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(folder, "model.safetensors is not the file that was saved")
    with pytest.raises(ModelError, match="sha256 differs"):
        load_edits(folder)


def rewrite(folder, change):
    path = folder / "model.safetensors"
    values = load_file(path)
    change(values)
    save_file(values, path, metadata={"format": "pt"})
    sign(folder)


def test_a_missing_tensor(folder):
    rewrite(folder, lambda v: v.pop("model.norm.weight"))
    refused(folder, "missing", "model.norm.weight")


def test_an_extra_tensor(folder):
    rewrite(folder, lambda v: v.update(backdoor=torch.zeros(3)))
    refused(folder, "unknown", "backdoor")


def test_a_tensor_of_another_name(folder):
    rewrite(folder, lambda v: v.update(other=v.pop("model.norm.weight")))
    refused(folder, "model.norm.weight")


def test_a_wrong_shape(folder):
    name = "model.layers.0.mlp.up_proj.weight"
    rewrite(folder, lambda v: v.update({name: v[name].reshape(-1, 64).clone()}))
    refused(folder, name)
    rewrite(folder, lambda v: v.update({name: v[name].reshape(-1)[:64].reshape(2, 32).clone()}))
    refused(folder, "[2, 32]", "[32, 32]")


@pytest.mark.parametrize("dtype", [torch.float16, torch.int32])
def test_a_wrong_dtype(folder, dtype):
    rewrite(folder, lambda v: v.update({"model.norm.weight": v["model.norm.weight"].to(dtype)}))
    refused(folder, "model.norm.weight", str(dtype).removeprefix("torch."))


def test_a_link_out_of_the_folder(folder, tmp_path):
    path = folder / "model.safetensors"
    path.rename(tmp_path / "elsewhere.safetensors")
    path.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(folder, "model.safetensors is a link")


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "a/b", "..", "a\\b", "", "C:x", "x\0y", "..x"])
def test_names_that_lead_elsewhere(folder, name):
    files = json.loads((folder / "secateur.json").read_text())["files"]
    edit_json(folder / "secateur.json", files={**files, name: "0"})
    refused(folder, "lead out of the folder")


def test_plain_names_are_accepted():
    assert plain_name("model-00001-of-00002.safetensors", "x") == "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "notes.pkl"])
def test_a_pickle_in_the_folder(folder, name):
    (folder / name).write_bytes(pickle.dumps({"a": 1}))
    refused(folder, name, "can run code")


def test_a_pickle_that_calls_itself_safetensors(folder):
    torch.save({"model.norm.weight": torch.ones(32)}, folder / "model.safetensors")
    sign(folder)
    refused(folder, "pickle")


@pytest.mark.parametrize("name", ["modeling_llama.py", "adapter_config.json"])
def test_code_and_adapters_in_the_folder(folder, name):
    (folder / name).write_text("{}")
    refused(folder, name)


def test_custom_code_in_the_config(folder):
    edit_json(config_of(folder), auto_map={"AutoModelForCausalLM": "modeling_llama.Evil"})
    sign(folder)
    refused(folder, "auto_map", "never runs code")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"attn_implementation": "somebody/kernels"}, "kernels"),
        ({"_attn_implementation": "somebody/kernels"}, "kernels"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantiser"),
        ({"model_type": "evil"}, "does not know"),
        ({"model_type": ["llama"]}, "does not know"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1,000,000,000"),
        ({"num_hidden_layers": -(10**9)}, "num_hidden_layers"),
        ({"vocab_size": 10**12}, "config"),
        ({"hidden_size": 10**30}, "config"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"intermediate_size": 64}, ""),
        ({"num_hidden_layers": 3}, ""),
    ],
)
def test_configs_that_ask_for_something_else(folder, changes, word):
    edit_json(config_of(folder), **changes)
    sign(folder)
    refused(folder, word)


def test_a_class_that_is_no_model(folder):
    for name in ("Trainer", "os", "BertModel", "__doc__", 3):
        record = json.loads((folder / "secateur.json").read_text())
        edit_json(folder / "secateur.json", saved={**record["saved"], "class": name})
        refused(folder, "no model class")


def test_a_config_that_is_not_json(folder):
    config_of(folder).write_text("{nope")
    sign(folder)
    refused(folder, "not JSON")
    config_of(folder).write_text("[1]")
    sign(folder)
    refused(folder, "not an object")
    config_of(folder).write_text("[" * 100_000)
    sign(folder)
    refused(folder, "not JSON")


def test_a_missing_file(folder):
    config_of(folder).unlink()
    refused(folder, "is missing", "Copy the whole folder again")


@pytest.mark.parametrize("changes", [{"schema": 99}, {"saved": {"format": 99}}])
def test_a_newer_version(folder, changes):
    edit_json(folder / "secateur.json", **changes)
    refused(folder, "Upgrade secateur")


@pytest.mark.parametrize(
    "changes", [{"schema": None}, {"saved": None}, {"files": ["x"]}, {"saved": []}, {"schema": "1"}, {"files": {}}]
)
def test_a_record_that_is_not_one(folder, changes):
    edit_json(folder / "secateur.json", **changes)
    refused(folder, "secateur.json")


def test_edits_that_fit_another_model(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders / "uneven", tmp_path / "uneven")
    shutil.copy(folders / "stock" / "edits.safetensors", folder / "edits.safetensors")
    sign(folder)
    refused(folder, "model.layers.1.mlp")
    (folder / "edits.safetensors").write_bytes(b"")
    sign(folder)
    refused(folder, "edits")


def test_edits_that_claim_more_than_they_hold(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders / "uneven", tmp_path / "uneven")
    site = Site("model.norm.weight", "weight", (32,), (Part("model.norm.weight", (32,)),))
    path = folder / "edits.safetensors"

    def write(old, new):
        edits_file.save([Mask(site, first(32, 3)), Replace("x", torch.nn.Identity())], path)
        with safe_open(path, framework="pt") as file:
            about, values = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}
        changed = {k: v.replace(old, new) for k, v in about.items()}
        assert changed != about
        save_file(values, path, metadata=changed)
        sign(folder)

    write('"shape": [32]', '"shape": [1000000000000000]')
    refused(folder, "bytes for 1000000000000000 units")
    write("Identity", "Trainer")
    refused(folder, "not one secateur knows")
    write('"state": {}', '"state": {"weight": "t0"}')
    refused(folder, "Unexpected key")


def test_tied_names_that_are_not_there(folders, tmp_path):
    import shutil

    folder = shutil.copytree(folders / "uneven", tmp_path / "uneven")
    record = json.loads((folder / "secateur.json").read_text())
    for aliases in ({"lm_head.weight": "nowhere"}, {"a": "b"}, ["x"], {"lm_head.weight": 3}, {"x.y": "lm_head.weight"}):
        edit_json(folder / "secateur.json", saved={**record["saved"], "aliases": aliases})
        refused(folder)


def test_a_header_that_claims_too_much(tmp_path):
    path = tmp_path / "x.safetensors"
    text = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 16)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        header(path)
    path.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        header(path)


# Hugging Face folders of other people


@pytest.fixture
def theirs(tmp_path):
    llama().save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


def refused_theirs(folder, *words):
    with pytest.raises(ModelError) as caught:
        open_model(folder)
    for word in words:
        assert word in str(caught.value)


def test_an_index_that_leads_elsewhere(theirs):
    (theirs / "model.safetensors").rename(theirs.parent / "out.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "../out.safetensors"}}
    (theirs / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_theirs(theirs, "lead out of the folder")


def test_only_pickles(theirs):
    (theirs / "model.safetensors").unlink()
    torch.save({}, theirs / "pytorch_model.bin")
    refused_theirs(theirs, "can run code", "safetensors")


def test_code_for_an_unknown_type(theirs):
    edit_json(theirs / "config.json", model_type="mine", auto_map={"AutoModel": "modeling.Mine"})
    refused_theirs(theirs, "never runs code")


def test_code_beside_a_known_type_is_ignored(theirs):
    (theirs / "modeling.py").write_text("raise SystemExit")
    edit_json(theirs / "config.json", auto_map={"AutoModelForCausalLM": "modeling.Mine"})
    assert type(open_model(theirs).model).__name__ == "LlamaForCausalLM"


def test_random_weights_are_never_opened(theirs):
    values = load_file(theirs / "model.safetensors")
    values.pop("model.norm.weight")
    save_file(values, theirs / "model.safetensors", metadata={"format": "pt"})
    refused_theirs(theirs, "missing: model.norm.weight", "would be random")


def test_absurd_sizes(theirs):
    edit_json(theirs / "config.json", num_hidden_layers=10**9)
    refused_theirs(theirs, "num_hidden_layers is 1,000,000,000")
    edit_json(theirs / "config.json", num_hidden_layers=2, vocab_size=10**12)
    refused_theirs(theirs, "1000000000000")


def test_a_truncated_download(theirs):
    path = theirs / "model.safetensors"
    path.write_bytes(path.read_bytes()[: 1 << 12])
    refused_theirs(theirs, "not a whole safetensors file", "download it again")
