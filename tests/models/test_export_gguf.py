"""GGUF: read back by somebody else's reader, and tried in llama.cpp where that is installed."""

import numpy as np
import pytest
import torch
import transformers as hub
from small_nets import bert, first, llama, made, mlp
from torch import nn

from secateur.edit import Remove, apply_
from secateur.errors import ExportError
from secateur.export import export
from secateur.export import gguf as gguf_form
from secateur.methods.int8 import rounded
from secateur.models import Opened, llama_shaped, open_model, save
from secateur.models.llama_shaped import Layer, rotary_order, shapes
from secateur.outcome import Outcome

gguf = pytest.importorskip("gguf")


def opened(model, tokenizer=None):
    return Opened(model, tokenizer, "net", "net", "hf", model.config.to_dict())


def uneven():
    model = llama()
    apply_(model, [Remove(mlp(model, i), first(48, w)) for i, w in enumerate((32, 20))])
    return model


def without_a_feed_forward_part():
    """Layer 1 has attention alone."""
    model = llama()
    part = model.model.layers[1].mlp
    part.gate_proj, part.up_proj = nn.Linear(32, 0, bias=False), nn.Linear(32, 0, bias=False)
    part.down_proj = nn.Linear(0, 32, bias=False)
    return model


def qwen():
    config = hub.Qwen2Config(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=False,
    )  # fmt: skip
    model = made(hub.Qwen2ForCausalLM, config)
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(3)
        for name, value in model.named_parameters():
            if name.endswith("bias"):
                value.normal_()
    return model


def stretched():
    """Positions as in Llama 3, and heads whose size does not follow from the others."""
    rope = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 16}  # fmt: skip
    config = hub.LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    return made(hub.LlamaForCausalLM, config)


def eight():
    model = llama()
    for name, value in model.named_parameters():
        if name.endswith("proj.weight"):
            value.data = rounded(value.data)
    return model


MODELS = {"alike": llama, "uneven": uneven, "gone": without_a_feed_forward_part, "biases": qwen,
          "stretched": stretched, "eight": eight}  # fmt: skip


@pytest.mark.parametrize("kind", MODELS)
def test_llama_cpp_answers_alike(kind, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'secateur[llamacpp]'")
    done = export(opened(MODELS[kind]()), "gguf", tmp_path / "x.gguf")
    assert done.difference < (1e-5 if kind != "eight" else 0.02) and done.runtime.startswith("llama.cpp ")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


@pytest.mark.parametrize("kind", ["uneven", "eight"])
def test_what_is_rounded_is_tried_with_the_same_numbers_in_float32(kind, tmp_path, monkeypatch):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'secateur[llamacpp]'")
    model = MODELS[kind]()
    if kind == "uneven":
        model = model.to(torch.bfloat16)
    done = export(opened(model), "gguf", tmp_path / "x.gguf")
    assert 1e-5 < done.difference < 0.1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]
    monkeypatch.setattr(llama_shaped, "rotary_order", lambda value, heads: value)  # rows in the wrong order
    with pytest.raises(ExportError, match="the same numbers in float32 answer otherwise there, by"):
        export(opened(model), "gguf", tmp_path / "y.gguf")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.gguf"]


def read(path):
    reader = gguf.GGUFReader(str(path))
    return {name: field.contents() for name, field in reader.fields.items()}, {t.name: t for t in reader.tensors}


def test_layers_of_different_widths_are_written_layer_by_layer(tmp_path):
    model = uneven()
    export(opened(model), "gguf", tmp_path / "x.gguf", verify=False)
    about, tensors = read(tmp_path / "x.gguf")
    assert about["general.architecture"] == "deci"
    assert about["deci.feed_forward_length"] == [32, 20]
    assert about["deci.attention.head_count"] == [4, 4] and about["deci.attention.head_count_kv"] == [2, 2]
    assert about["deci.attention.key_length"] == 8
    assert list(tensors["blk.1.ffn_down.weight"].shape) == [20, 32]  # inputs first
    query = model.model.layers[1].self_attn.q_proj.weight.detach().numpy()
    assert np.array_equal(
        tensors["blk.1.attn_q.weight"].data, query.reshape(4, 2, 4, 32).swapaxes(1, 2).reshape(32, 32)
    )
    assert np.array_equal(tensors["blk.1.attn_v.weight"].data, model.model.layers[1].self_attn.v_proj.weight.detach())
    assert "output.weight" not in tensors  # tied


def test_a_width_of_nothing_is_written_as_zeros(tmp_path):
    """llama.cpp would pass over the attention of that layer, too."""
    export(opened(without_a_feed_forward_part()), "gguf", tmp_path / "x.gguf", verify=False)
    about, tensors = read(tmp_path / "x.gguf")
    assert about["deci.feed_forward_length"] == [48, 32]
    assert list(tensors["blk.1.ffn_up.weight"].shape) == [32, 32] and not tensors["blk.1.ffn_up.weight"].data.any()


def test_transformers_reads_the_same_model(tmp_path):
    """By its own conversion, which knows nothing of ours: stored tensors, order of rows, vocabulary."""
    model = llama(tied=False)
    export(opened(model), "gguf", tmp_path / "x.gguf", verify=False)
    back = hub.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    ids = torch.arange(14).reshape(2, 7)
    assert torch.equal(back(input_ids=ids).logits, model(input_ids=ids).logits)


def test_eight_bits_are_kept(tmp_path):
    model = eight()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = 0
    done = export(opened(model), "gguf", tmp_path / "x.gguf", verify=False)
    _, tensors = read(tmp_path / "x.gguf")
    found = tensors["blk.0.ffn_up.weight"]
    assert found.tensor_type.name == "Q8_0"
    values = gguf.dequantize(found.data, found.tensor_type)
    np.testing.assert_allclose(values, model.model.layers[0].mlp.up_proj.weight.detach(), rtol=2**-10)
    assert values[3, 5] == 0
    # 12 of 14: the columns of the down projections are 48, which is not a multiple of 32
    assert done.notes == ["12 matrices are kept in 8 bits (Q8_0), their row's scale rounded to float16 in each block"]


def test_rows_that_turn_together_become_neighbours():
    assert rotary_order(torch.arange(8), 2).tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert shapes(uneven()) == [Layer(4, 2, 32), Layer(4, 2, 20)]


def byte_level(splits=None):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = pre_tokenizers.ByteLevel.alphabet()
    words = ["<s>", "</s>", *sorted(letters), "Ġt", "he", "Ġthe"]
    made_ = Tokenizer(
        models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[("Ġ", "t"), ("h", "e"), ("Ġt", "he")])
    )
    made_.pre_tokenizer, made_.decoder = (
        splits or pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    return hub.PreTrainedTokenizerFast(tokenizer_object=made_, bos_token="<s>", eos_token="</s>")


def sentence_piece():
    from tokenizers import Tokenizer, decoders, models, normalizers

    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    words = ["<unk>", "<s>", "</s>", *bytes_, "▁", *"abcdehtrun:'s,", "▁t", "he", "▁the"]
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he")]
    vocabulary = {w: i for i, w in enumerate(words)}
    made_ = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made_.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made_.decoder = decoders.ByteFallback()
    return hub.PreTrainedTokenizerFast(tokenizer_object=made_, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def with_vocabulary(tokenizer):
    config = hub.LlamaConfig(
        vocab_size=len(tokenizer) + 3, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return opened(made(hub.LlamaForCausalLM, config), tokenizer)


@pytest.mark.parametrize("tokenizer", [byte_level, sentence_piece])
def test_llama_cpp_cuts_text_alike(tokenizer, tmp_path):
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed: pip install 'secateur[llamacpp]'")
    ours = tokenizer()
    export(with_vocabulary(ours), "gguf", tmp_path / "x.gguf")
    with gguf_form._loaded(tmp_path / "x.gguf", 64) as (model, _):
        for text in ("the hat", "  the\nthe", "x the"):
            assert gguf_form._cut(model, text) == ours(text, add_special_tokens=False)["input_ids"]


def test_the_vocabulary_is_written_whole(tmp_path):
    tokenizer = byte_level()
    export(with_vocabulary(tokenizer), "gguf", tmp_path / "x.gguf", verify=False)
    about, _ = read(tmp_path / "x.gguf")
    assert about["tokenizer.ggml.model"] == "gpt2" and about["tokenizer.ggml.pre"] == "gpt-2"
    assert about["tokenizer.ggml.tokens"][-4:] == ["Ġthe", *(f"[PAD{len(tokenizer) + i}]" for i in range(3))]
    assert about["tokenizer.ggml.merges"] == ["Ġ t", "h e", "Ġt he"]
    assert (about["tokenizer.ggml.bos_token_id"], about["tokenizer.ggml.eos_token_id"]) == (0, 1)
    assert about["tokenizer.ggml.token_type"][:3] == [3, 3, 1]


def refused(model, *words, tmp_path):
    with pytest.raises(ExportError) as caught:
        export(model, "gguf", tmp_path / "x.gguf", verify=False)
    assert all((caught.value.asked, caught.value.found, caught.value.do))
    for word in words:
        assert word in str(caught.value)
    assert not [*tmp_path.iterdir()]


def test_what_llama_cpp_does_not_take_is_refused(tmp_path):
    refused(opened(bert()), "BertModel is not built as Llama is; llama, mistral, qwen2 are", tmp_path=tmp_path)
    model = llama()
    model.model.layers[1].self_attn.q_norm = nn.LayerNorm(8)
    refused(opened(model), "layer 1: it has self_attn.q_norm, which Llama's layers have not", tmp_path=tmp_path)
    model = llama()
    model.config.hidden_act = "gelu"
    refused(opened(model), "its activation is gelu, and Llama's is silu", tmp_path=tmp_path)
    from tokenizers import pre_tokenizers

    odd = byte_level(pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.ByteLevel()]))
    refused(with_vocabulary(odd), "it splits text by Metaspace, ByteLevel in a way whose name", tmp_path=tmp_path)


def test_a_saved_folder_goes_the_same_way(tmp_path):
    model = llama()
    edits = apply_(model, [Remove(mlp(model, i), first(48, w)) for i, w in enumerate((32, 20))])
    save(Outcome(model, edits), llama(), tmp_path / "saved")
    done = export(tmp_path / "saved", "gguf", dtype="float16", verify=False)
    assert done.path == str(tmp_path / "saved.gguf") and done.dtype == "float16"
    assert {t.tensor_type.name for t in read(done.path)[1].values() if len(t.shape) > 1} == {"F16"}
    assert open_model(tmp_path / "saved").model is not None
