import copy
import errno
import json
import os
import sys

import pytest
import tiny
import torch
import transformers as hub
import yaml
from safetensors.torch import load_file
from small_nets import PassOn, bert, first, gpt2, groups, linears, llama, mixtral, mlp, neurons, part, small, t5, vit

from secateur import method as methods
from secateur import recipe
from secateur.edit import Gate, Mask, Remove, Replace, Update, apply_
from secateur.errors import ModelError
from secateur.models import Opened, fingerprint, index_maps, inspect_file, load, load_edits, open_model, save
from secateur.models.hf import answer, cast_, example_inputs
from secateur.outcome import Outcome, Record
from secateur.site import Part, Site


def cut(model, edits):
    """A copy with the edits made, and its outcome."""
    work = copy.deepcopy(model)
    return Outcome(work, apply_(work, edits))


def saved(folder):
    return json.loads((folder / "secateur.json").read_text())["saved"]


def same(one, other, bits=True):
    """Whether two models hold the same bits under the same names, and answer the same.

    Answers to 1e-6: where a tensor lies in memory decides in which order a processor adds it up.
    """
    inputs = example_inputs(one)
    first, second = one.state_dict(), other.state_dict()
    equal = all(torch.equal(first[name], second[name]) for name in first.keys() & second.keys())
    ours, theirs = answer(one, inputs), answer(other, inputs)
    return (equal or not bits) and ours.shape == theirs.shape and float((ours - theirs).abs().max()) < 1e-6


def check(model, edits, folder, kind, **config):
    """Save; stock transformers and secateur must answer exactly as the cut model does."""
    outcome = cut(model, edits)
    save(outcome, model, folder)
    about = saved(folder)
    assert about["stock"], about["why_not"]
    stock, report = kind.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert same(outcome.model, stock)
    assert same(outcome.model, load(folder))
    assert not same(model, outcome.model)
    found = json.loads((folder / "config.json").read_text())
    assert {k: found[k] for k in config} == config
    return outcome


def test_uniform_neurons_load_with_stock_transformers(tmp_path):
    model = llama()
    edits = [Remove(mlp(model, i), torch.arange(48) % 3 > 0) for i in range(2)]
    check(model, edits, tmp_path / "out", hub.AutoModelForCausalLM, intermediate_size=32, hidden_size=32)
    about = saved(tmp_path / "out")
    assert about["index"]["model.layers.0.mlp"] == [i for i in range(48) if i % 3 > 0]
    assert about["difference"] == 0.0
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_uniform_heads_get_an_explicit_head_dim(tmp_path):
    model = llama(tied=False)
    work = copy.deepcopy(model)
    edits = [Remove(groups(model, i), first(2, 1)) for i in range(2)]
    outcome = Outcome(work, apply_(work, edits))
    save(outcome, model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (2, 1, 8)
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(work, stock)
    assert same(work, load(tmp_path / "out"))


def test_heterogeneous_widths_load_with_secateur_and_fail_loudly_elsewhere(tmp_path):
    model = llama()
    outcome = cut(model, [Remove(mlp(model, 0), first(48, 40)), Remove(mlp(model, 1), first(48, 20))])
    save(outcome, model, tmp_path / "out")
    assert not saved(tmp_path / "out")["stock"]
    assert "differ in shape" in saved(tmp_path / "out")["why_not"]
    back = load(tmp_path / "out")
    assert same(outcome.model, back)
    assert back.lm_head.weight is back.model.embed_tokens.weight
    assert back.model.layers[1].mlp.gate_proj.out_features == 20
    with pytest.raises(ValueError, match="secateur-llama"):
        hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_removed_layers_shorten_the_config(tmp_path):
    config = hub.Qwen2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, use_sliding_window=True, sliding_window=4, max_window_layers=2,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = hub.Qwen2ForCausalLM(config).eval()
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 2
    outcome = cut(model, [Replace("model.layers.1", PassOn())])
    with torch.no_grad():
        assert outcome.model(torch.zeros(1, 8, dtype=torch.long)).logits.isfinite().all()
    save(outcome, model, tmp_path / "out")
    about = saved(tmp_path / "out")
    assert about["stock"], about["why_not"]
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["num_hidden_layers"] == 3
    assert found["layer_types"] == ["full_attention", "sliding_attention", "sliding_attention"]
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert same(outcome.model, stock, bits=False)  # its layers are numbered anew
    assert same(stock, load(tmp_path / "out"))


@pytest.mark.parametrize(
    ("make", "layer", "count"),
    [(llama, "model.layers.0", "num_hidden_layers"), (gpt2, "transformer.h.1", "n_layer"),
     (bert, "encoder.layer.1", "num_hidden_layers"), (vit, "vit.layers.0", "num_hidden_layers"),
     (mixtral, "model.layers.0", "num_hidden_layers")],
)  # fmt: skip
def test_every_family_can_lose_a_layer(tmp_path, make, layer, count):
    model = make()
    outcome = cut(model, [Replace(layer, PassOn())])
    save(outcome, model, tmp_path / "out")
    assert saved(tmp_path / "out")["stock"], saved(tmp_path / "out")["why_not"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())[count] == 1
    assert same(outcome.model, load(tmp_path / "out"), bits=False)


def test_a_layer_taken_out_of_the_list_itself(tmp_path):
    model = llama(layers=3)
    work = copy.deepcopy(model)
    del work.model.layers[1]
    save(Outcome(work), model, tmp_path / "out")
    assert saved(tmp_path / "out")["stock"], saved(tmp_path / "out")["why_not"]
    assert same(work, load(tmp_path / "out"))


def test_several_dtypes_come_back_as_they_were(tmp_path):
    model = llama()
    work = cut(model, [Remove(mlp(model, 0), first(48, 20))]).model
    work.model.norm.weight.data = work.model.norm.weight.data.double()
    save(Outcome(work, [Remove(mlp(model, 0), first(48, 20))]), model, tmp_path / "out")
    assert load(tmp_path / "out").model.norm.weight.dtype == torch.float64


def test_the_card_may_be_edited(tmp_path):
    save(Outcome(small()), small(), tmp_path / "out")
    (tmp_path / "out" / "README.md").write_text("my words")
    load(tmp_path / "out", build=small)


def test_a_removed_layer_beside_uneven_widths(tmp_path):
    model = llama(layers=3)
    edits = [Replace("model.layers.1", PassOn()), Remove(mlp(model, 2), first(48, 30))]
    outcome = cut(model, edits)
    save(outcome, model, tmp_path / "out")
    assert not saved(tmp_path / "out")["stock"]
    assert same(outcome.model, load(tmp_path / "out"))


def test_zeros_and_new_values_survive(tmp_path):
    model = llama()
    name = "model.layers.0.mlp.up_proj.weight"
    site = Site(name, "weight", (48, 32), (Part(name, (48, 32)),))
    keep = torch.rand(48, 32, generator=torch.Generator().manual_seed(0)) > 0.5
    edits = [Mask(site, keep), Update("model.norm.weight", torch.full((32,), 0.5))]
    outcome = check(model, edits, tmp_path / "out", hub.AutoModelForCausalLM)
    back = load(tmp_path / "out")
    assert torch.equal(back.get_parameter(name) != 0, keep)
    again = copy.deepcopy(model)
    apply_(again, load_edits(tmp_path / "out"))
    assert same(outcome.model, again)
    found = {t["name"]: t for t in inspect_file(tmp_path / "out")["tensors"]}
    assert found[name]["zeros"] == pytest.approx(float((~keep).float().mean()))


def test_added_biases_load_with_stock_transformers(tmp_path):
    model = llama()
    edits = [Remove(mlp(model, i), first(48, 32)) for i in range(2)]
    edits += [Update(f"model.layers.{i}.mlp.down_proj.bias", torch.arange(32.0) / 32) for i in range(2)]
    outcome = check(model, edits, tmp_path / "out", hub.AutoModelForCausalLM, intermediate_size=32, mlp_bias=True)
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert not found["model.layers.0.mlp.up_proj.bias"].any()
    uneven = cut(model, [Remove(mlp(model, 1), first(48, 32)), edits[2]])
    save(uneven, model, tmp_path / "uneven")
    assert not saved(tmp_path / "uneven")["stock"]
    assert same(uneven.model, load(tmp_path / "uneven"))
    assert outcome.model.model.layers[0].mlp.up_proj.bias is None


def test_gpt2_with_turned_weights(tmp_path):
    model = gpt2()
    edits = []
    for i in range(2):
        path = f"transformer.h.{i}.mlp"
        up = part(model, f"{path}.c_fc.weight", 0, 64, turned=True)
        bias = part(model, f"{path}.c_fc.bias", 0, 64)
        down = part(model, f"{path}.c_proj.weight", 1, 64, turned=True)
        edits.append(Remove(Site(path, "channel", (64,), (up, bias, down)), first(64, 40)))
    check(model, edits, tmp_path / "out", hub.AutoModelForCausalLM, n_inner=40)


def test_bert(tmp_path):
    model = bert()
    edits = []
    for i in range(2):
        path = f"encoder.layer.{i}"
        names = [(f"{path}.intermediate.dense.weight", 0), (f"{path}.intermediate.dense.bias", 0)]
        edits.append(Remove(linears([*names, (f"{path}.output.dense.weight", 1)], model, 24, path), first(24, 9)))
    check(model, edits, tmp_path / "out", hub.AutoModel, intermediate_size=9)


def test_vit(tmp_path):
    model = vit()
    fc1, fc2 = _vit_mlp(model)
    edits = []
    for i in range(2):
        path = fc1.replace(".0.", f".{i}.").rpartition(".")[0]
        names = [(f"{path}.weight", 0), (f"{path}.bias", 0), (fc2.replace(".0.", f".{i}."), 1)]
        edits.append(Remove(linears(names, model, 24, path), first(24, 16)))
    check(model, edits, tmp_path / "out", hub.AutoModelForImageClassification, intermediate_size=16)


def _vit_mlp(model):
    up = next(n for n, p in model.named_parameters() if tuple(p.shape) == (24, 16) and ".0." in n)
    down = next(n for n, p in model.named_parameters() if tuple(p.shape) == (16, 24) and ".0." in n)
    return up, down


def test_t5(tmp_path):
    model = t5()
    edits = []
    for i in range(2):
        for side, layer in (("encoder", 1), ("decoder", 2)):
            path = f"{side}.block.{i}.layer.{layer}.DenseReluDense"
            edits.append(
                Remove(linears([(f"{path}.wi.weight", 0), (f"{path}.wo.weight", 1)], model, 24, path), first(24, 10))
            )
    check(model, edits, tmp_path / "out", hub.AutoModelForSeq2SeqLM, d_ff=10)


def test_experts_of_a_mixtral(tmp_path):
    model = mixtral()
    edits = []
    for i in range(2):
        path = f"model.layers.{i}.mlp"
        names = [f"{path}.experts.gate_up_proj", f"{path}.experts.down_proj", f"{path}.gate.weight"]
        site = Site(path, "expert", (4,), tuple(part(model, n, 0, 4) for n in names))
        edits.append(Remove(site, torch.tensor([True, False, True, True])))
    work = copy.deepcopy(model)
    outcome = Outcome(work, apply_(work, edits))
    for module in work.modules():
        for name in ("num_experts", "num_local_experts"):
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, 3)
    save(outcome, model, tmp_path / "out")
    about = saved(tmp_path / "out")
    assert about["stock"], about["why_not"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_local_experts"] == 3
    assert same(work, hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert same(work, load(tmp_path / "out"))


def test_heads_of_a_bert_are_not_stock(tmp_path):
    model = bert()
    edits = []
    for i in range(2):
        path = f"encoder.layer.{i}.attention"
        names = [(f"{path}.self.{n}.{w}", 0) for n in ("query", "key", "value") for w in ("weight", "bias")]
        parts = [part(model, n, a, 2) for n, a in [*names, (f"{path}.output.dense.weight", 1)]]
        edits.append(Remove(Site(path, "head", (2,), tuple(parts)), first(2, 1)))
    work = copy.deepcopy(model)
    outcome = Outcome(work, apply_(work, edits))
    for layer in work.encoder.layer:
        layer.attention.self.num_attention_heads, layer.attention.self.all_head_size = 1, 8
    save(outcome, model, tmp_path / "out")
    assert not saved(tmp_path / "out")["stock"]
    assert load(tmp_path / "out").encoder.layer[0].attention.self.query.out_features == 8


def test_bfloat16_and_untied_heads_come_back(tmp_path):
    model = cast_(llama(), torch.bfloat16)
    outcome = cut(model, [Remove(mlp(model, i), first(48, 32)) for i in range(2)])
    outcome.model.lm_head.weight = torch.nn.Parameter(outcome.model.lm_head.weight.detach() * 2)
    save(outcome, model, tmp_path / "out")
    back = load(tmp_path / "out")
    assert saved(tmp_path / "out")["stock"], saved(tmp_path / "out")["why_not"]
    assert {p.dtype for p in back.parameters()} == {torch.bfloat16}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    assert same(outcome.model, back)


def test_a_network_of_the_users_needs_its_function(tmp_path):
    model = small()
    outcome = cut(model, [Remove(neurons(model), torch.arange(8) != 3)])
    opened = Opened(model, None, "small", "small_nets:small", "python", build="small_nets:small", builder=small)
    save(outcome, opened, tmp_path / "out")
    with pytest.raises(ModelError, match="code is never imported because a folder names it"):
        load(tmp_path / "out")
    back = load(tmp_path / "out", build=small)
    x = torch.ones(2, 6)
    assert torch.equal(back(x), outcome.model(x))
    assert back.heads == 7
    assert not (tmp_path / "out" / "config.json").exists()
    again = open_model(f"small_nets:small::{tmp_path / 'out'}")
    assert torch.equal(again.model(x), outcome.model(x))


def test_cutting_a_saved_model_again_keeps_the_original_numbers(tmp_path):
    model = llama()
    save(cut(model, [Remove(mlp(model, 0), torch.arange(48) % 2 == 0)]), model, tmp_path / "one")
    opened = open_model(tmp_path / "one")
    assert opened.kind == "secateur"
    second = cut(opened.model, [Remove(mlp(opened.model, 0), first(24, 3))])
    save(second, opened, tmp_path / "two")
    assert saved(tmp_path / "two")["index"]["model.layers.0.mlp"] == [0, 2, 4]
    assert len(saved(tmp_path / "two")["lineage"]) == 2
    assert same(second.model, load(tmp_path / "two"))
    even = cut(second.model, [Remove(mlp(second.model, 1), first(48, 3))])
    save(even, open_model(tmp_path / "two"), tmp_path / "three")
    assert saved(tmp_path / "three")["stock"]
    assert same(even.model, hub.AutoModelForCausalLM.from_pretrained(tmp_path / "three"))


def test_the_small_files(tmp_path):
    model = llama()
    outcome = cut(model, [Remove(mlp(model, i), first(48, 32)) for i in range(2)])
    outcome.notes.append("two layers were cut alike")
    save(outcome, model, tmp_path / "out", recipe={"steps": [{"method": "magnitude", "settings": {"sparsity": 0.5}}]})
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names >= {"model.safetensors", "config.json", "generation_config.json", "recipe.yaml", "edits.safetensors"}
    assert names >= {"secateur.json", "README.md"}
    record = Record.read(tmp_path / "out" / "secateur.json")
    assert set(record.files) == names - {"secateur.json"}
    assert record.ledger.after.stored_bytes == (tmp_path / "out" / "model.safetensors").stat().st_size
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["steps"][0]["settings"] == {"sparsity": 0.5}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "two layers were cut alike" in card
    assert "LlamaForCausalLM.from_pretrained" in card
    assert "nan" not in card.lower()
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~_umask()
    assert {p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()} == {0o666 & ~_umask()}
    before = fingerprint(tmp_path / "out")
    save(outcome, model, tmp_path / "out", overwrite=True)
    assert fingerprint(tmp_path / "out") != before  # another recipe
    assert not [p for p in tmp_path.iterdir() if p.name != "out"]


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_a_saved_network_says_what_one_picture_looks_like(tmp_path):
    model, task = tiny.make_model("cnn"), tiny.make_task("cnn")
    save(methods.prune(model, methods.load("magnitude")(), task), model, tmp_path / "out")
    there = open_model("tiny:cnn", checkpoint=tmp_path / "out")
    assert there.example_hint == {"x": (1, *task.example.inputs[0].shape[1:])}


def test_a_real_run_comes_back_with_modules_that_were_put_in(tmp_path):
    model, task = tiny.make_model("decoder"), tiny.make_task("decoder")
    method = methods.tiny(methods.load("slicegpt"))
    outcome = methods.prune(model, method, task, measure="val", timing=True, name="tiny decoder")
    save(outcome, model, tmp_path / "out")
    assert saved(tmp_path / "out")["modules"] == ["secateur.stream"]
    assert "stock layers also have" in saved(tmp_path / "out")["why_not"]
    assert same(outcome.model, load(tmp_path / "out"))
    again = copy.deepcopy(model)
    apply_(again, load_edits(tmp_path / "out"))
    assert same(outcome.model, again)
    run = recipe.read(tmp_path / "out" / "recipe.yaml")
    assert run.steps == (method,)
    assert (run.task, run.seed) == (task.name, task.seed)
    card = (tmp_path / "out" / "README.md").read_text()
    measured = outcome.record.measured("after")[task.metric]
    assert f"{measured:.4g}" in card
    assert "| milliseconds (batch" in card


def test_only_our_own_modules_are_imported(tmp_path):
    save(Outcome(small()), small(), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    record["saved"]["modules"] = ["this", "secateur.nowhere", "secateur.models.folder", "secateur..os", 3]
    (tmp_path / "out" / "secateur.json").write_text(json.dumps(record))
    load(tmp_path / "out", build=small)
    assert "this" not in sys.modules


def test_folders_that_are_not_ours_are_left_alone(tmp_path):
    model = small()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(ModelError, match="secateur did not write it"):
            save(Outcome(model), model, tmp_path / "theirs", overwrite=overwrite)
    assert (tmp_path / "theirs" / "thesis.txt").read_text() == "mine"
    save(Outcome(model), model, tmp_path / "ours")
    with pytest.raises(ModelError, match="a saved model is there"):
        save(Outcome(model), model, tmp_path / "ours")
    (tmp_path / "link").symlink_to(tmp_path / "ours")
    with pytest.raises(ModelError, match="secateur did not write it"):
        save(Outcome(model), model, tmp_path / "link", overwrite=True)


@pytest.mark.parametrize("where", ["tensors", "text", "rename"])
def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch, where):
    model = small()
    save(Outcome(model), model, tmp_path / "out")
    before = fingerprint(tmp_path / "out")

    def full(*_args, **_more):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "tensors":
        monkeypatch.setattr("safetensors.torch.save_file", full)
    elif where == "text":
        monkeypatch.setattr("secateur.models.saving.write_text", full)
    else:
        real = os.rename

        def rename(source, target):
            return full() if ".partial-" in str(source) else real(source, target)

        monkeypatch.setattr("secateur.models.saving.os.rename", rename)
    with pytest.raises(ModelError, match="No space left on device") as caught:
        save(Outcome(model), model, tmp_path / "out", overwrite=True)
    assert "Make room" in caught.value.do
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert fingerprint(tmp_path / "out") == before


def test_changes_without_an_edit_and_open_gates_are_refused(tmp_path):
    model = llama()
    outcome = cut(model, [Remove(mlp(model, 0), first(48, 30))])
    outcome.edits.clear()
    with pytest.raises(ModelError, match="do not lead to it"):
        save(outcome, model, tmp_path / "out")
    net = small()
    gated = cut(net, [Gate(neurons(net), torch.nn.Identity())])
    with pytest.raises(ModelError, match="Harden it first"):
        save(gated, net, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_index_maps_follow_one_site_through_several_cuts():
    model = small()
    site = neurons(model)
    one = Remove(site, torch.arange(8) != 0)
    smaller = Site("up", "channel", (7,), site.parts)
    assert index_maps([one, Mask(smaller, first(7, 2))]) == {"up": [1, 2]}
