"""The residual stream: found in any pre-norm decoder, freed of its norms' scales, turned without a change."""

import copy

import pytest
import torch
from tiny import decoder, make_model, seeded, toy_text
from torch import nn

from secateur.edit import Remove, Replace, Rotate, apply_, load, save
from secateur.errors import GraphError
from secateur.stream import (
    Stream,
    StreamLinear,
    StreamNorm,
    add_shortcuts,
    follow,
    fuse,
    second_moments,
    sites,
    whole,
)
from secateur.task import Batch
from secateur.walk import walk

WIDTH = 32
IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))
FF = {"intermediate_size": 64}
GROUPED = {**FF, "num_key_value_heads": 2}

KINDS: dict[str, tuple[str, dict[str, object], int]] = {  # class names without their ending, settings, segments
    "Llama": ("Llama", {**GROUPED, "tie_word_embeddings": True}, 7),
    "Mistral": ("Mistral", GROUPED, 7),
    "Qwen2": ("Qwen2", GROUPED, 7),
    "Qwen3": ("Qwen3", {**GROUPED, "head_dim": 8, "tie_word_embeddings": True}, 7),
    "GPT-2": ("GPT2", {}, 7),
    "OPT": ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "init_std": 0.2}, 7),
    "GPT-NeoX": ("GPTNeoX", FF, 4),
    "GPT-NeoX in sequence": ("GPTNeoX", {**FF, "use_parallel_residual": False}, 7),
    "Phi": ("Phi", {**FF, "partial_rotary_factor": 0.5}, 4),
    "Phi-3": ("Phi3", {**FF, "pad_token_id": 0}, 7),
    "OLMo": ("Olmo", GROUPED, 7),
}


def make(kind: str, **changes: object) -> nn.Module:
    """A tiny model with random norms: scales of 1 and shifts of 0 would hide a fusion that forgets them."""
    import transformers

    settings = {
        "vocab_size": 64,
        "hidden_size": WIDTH,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    head = "LMHeadModel" if kind == "GPT2" else "ForCausalLM"
    config = getattr(transformers, f"{kind}Config")(**settings)
    return loosen(seeded(lambda: getattr(transformers, f"{kind}{head}")(config).float(), 0))


def loosen(model: nn.Module) -> nn.Module:
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if "norm" in type(module).__name__.lower():
                for value in module.parameters(recurse=False):
                    value.add_(0.3 * torch.randn(value.shape, generator=draw))
    return model


def example() -> Batch:
    return Batch((IDS,))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def rotation(width: int, seed: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(width, width, generator=draw, dtype=torch.float64))[0]


def prepared(model: nn.Module) -> tuple[Stream, list]:
    stream = follow(model, example())
    edits = apply_(model, fuse(model, stream))
    edits += apply_(model, add_shortcuts(model, stream))
    return stream, edits


@pytest.mark.parametrize("kind", KINDS)
def test_fusing_and_turning_every_segment_leaves_the_function_alone(kind: str) -> None:
    name, settings, segments = KINDS[kind]
    model = make(name, **settings)
    before = logits(model)
    stream = follow(model, example())
    assert len(stream.segments) == segments
    assert stream.width == WIDTH
    apply_(model, fuse(model, stream))
    assert float((logits(model) - before).abs().max()) < 1e-4
    apply_(model, add_shortcuts(model, stream))
    assert float((logits(model) - before).abs().max()) < 1e-4
    for number, site in enumerate(sites(model, stream)):
        apply_(model, Rotate(site, rotation(WIDTH, number)))
    assert float((logits(model) - before).abs().max()) < 1e-4
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sliced_model_is_smaller_and_generates_alike_with_and_without_a_cache(kind: str) -> None:
    name, settings, _ = KINDS[kind]
    model = make(name, **settings)
    stream, _ = prepared(model)
    found = sites(model, stream)
    assert stream.reshaped == (name == "GPT2")
    cut = found if stream.reshaped else found[:-1]
    apply_(model, [Rotate(site, rotation(WIDTH, 3)) for site in found])
    apply_(model, [Remove(site, torch.arange(WIDTH) < 24) for site in cut])
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert (module.out_features, module.in_features) == tuple(module.weight.shape)
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    assert table.weight.shape[1] == table.embedding_dim == 24
    mask = torch.ones(2, 6, dtype=torch.int64)
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    model.generation_config.eos_token_id = None
    with_cache = model.generate(IDS[:, :6], use_cache=True, **settings)
    assert torch.equal(with_cache, model.generate(IDS[:, :6], use_cache=False, **settings))
    assert with_cache.shape == (2, 12)


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "Gemma": ("Gemma", {**GROUPED, "head_dim": 8}, r"embed_tokens.weight goes through 'mul'"),
    "Gemma 2": ("Gemma2", {**GROUPED, "head_dim": 8}, r"embed_tokens.weight goes through 'mul'"),
    "Granite": ("Granite", {**GROUPED, "residual_multiplier": 0.5}, r"goes through 'mul'"),
    "OLMo 2": ("Olmo2", GROUPED, r"read by model.layers.0.self_attn.q_proj.weight without a norm"),
    "OPT, norms after": (
        "OPT",
        {"ffn_dim": 64, "word_embed_proj_dim": WIDTH, "do_layer_norm_before": False},
        r"self_attn_layer_norm goes on as the stream: it stands after an addition \(post-norm\)",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_it_refuses_what_a_change_of_basis_would_not_pass_through(kind: str) -> None:
    name, settings, says = REFUSED[kind]
    with pytest.raises(GraphError, match=says) as caught:
        follow(make(name, **settings), example())
    assert "pre-norm decoder" in caught.value.do


@pytest.mark.parametrize(
    ("model", "inputs", "says"),
    [
        ("encoder", IDS, r"bert.embeddings.LayerNorm goes on as the stream"),
        ("moe", IDS, r"the output of model.layers.0.post_attention_layernorm goes through"),
        ("vision transformer", torch.randn(2, 3, 8, 8), "no stream leads from an embedding"),
        ("mlp", torch.randn(2, 16), "no stream leads from an embedding"),
        ("cnn", torch.randn(2, 3, 8, 8), "no stream leads from an embedding"),
    ],
)
def test_it_refuses_models_of_other_families(model: str, inputs: torch.Tensor, says: str) -> None:
    with pytest.raises(GraphError, match=says):
        follow(make_model(model), Batch((inputs,)))


def test_it_refuses_a_model_whose_last_norm_no_layer_reads() -> None:
    with pytest.raises(GraphError, match="no linear layer reads the output of norm"):
        follow(decoder().model, example())


def test_segments_of_a_decoder() -> None:
    stream = follow(decoder(layers=1), example())
    first, middle, last = stream.segments
    assert first.embeddings == ("model.embed_tokens.weight",)
    assert first.norms == ("model.layers.0.input_layernorm",)
    assert first.readers == (tuple(f"model.layers.0.self_attn.{x}_proj.weight" for x in "qkv"),)
    assert middle.writers == ("model.layers.0.self_attn.o_proj.weight",)
    assert middle.readers == (("model.layers.0.mlp.gate_proj.weight", "model.layers.0.mlp.up_proj.weight"),)
    assert last.writers == ("model.layers.0.mlp.down_proj.weight",)
    assert last.readers == (("lm_head.weight",),)


def test_a_parallel_block_has_one_segment_two_writers_and_one_shortcut() -> None:
    model = make("GPTNeoX", **FF)
    stream, _ = prepared(model)
    assert [len(s.writers) for s in stream.segments] == [0, 2, 2, 2]
    assert [len(s.norms) for s in stream.segments] == [2, 2, 2, 1]
    shortcuts = [m for m in model.modules() if isinstance(m, StreamLinear) and m.shortcut is not None]
    assert len(shortcuts) == 3


def test_the_mean_is_taken_out_of_writers_of_layernorm_models_only() -> None:
    opt, llama = make("OPT", **KINDS["OPT"][1]), make("Llama", **GROUPED)
    table = llama.model.embed_tokens.weight.clone()
    down = llama.model.layers[0].mlp.down_proj.weight.clone()
    for model in (opt, llama):
        apply_(model, fuse(model, follow(model, example())))
    layer = opt.model.decoder.layers[0]
    for value in (opt.model.decoder.embed_tokens.weight.T, opt.model.decoder.embed_positions.weight.T,
                  layer.fc2.weight, layer.fc2.bias, layer.self_attn.out_proj.weight):  # fmt: skip
        assert float(value.detach().mean(0).abs().max()) < 1e-6
    assert torch.equal(llama.model.embed_tokens.weight, table)
    assert torch.equal(llama.model.layers[0].mlp.down_proj.weight, down)


def test_a_shared_output_layer_is_untied_before_the_last_norm_goes_into_it() -> None:
    model = loosen(decoder())
    table, scale = model.model.embed_tokens.weight.clone(), model.model.norm.weight.clone()
    apply_(model, fuse(model, follow(model, example())))
    assert torch.equal(model.model.embed_tokens.weight, table)
    torch.testing.assert_close(model.lm_head.weight, table * scale)
    assert model.config.tie_word_embeddings is False
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


def test_a_norm_divides_by_the_width_before_slicing_with_the_eps_it_was_given() -> None:
    x = torch.tensor([[3.0, 4.0]])  # sum of squares 25, over 8 is 3.125
    torch.testing.assert_close(StreamNorm(8, 0.0)(x), x / 3.125**0.5)
    torch.testing.assert_close(StreamNorm(8, 0.875)(x), x / 2)
    model = make("Llama", **GROUPED, rms_norm_eps=1e-2)
    apply_(model, fuse(model, follow(model, example())))
    assert {m.eps for m in model.modules() if isinstance(m, StreamNorm)} == {1e-2}


class OnePlus(nn.Module):
    """A norm with the scale 1 + weight, as Gemma's."""

    eps = 1e-6

    def __init__(self, offset: float) -> None:
        super().__init__()
        self.weight, self.offset = nn.Parameter(torch.linspace(-0.5, 0.5, 8)), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * (self.offset + self.weight)


class OnePlusNorm(OnePlus):
    pass


class Plain(nn.Module):
    """Not from any library: an embedding, two residual layers, an output layer."""

    def __init__(self, offset: float = 1.0, back: bool = False) -> None:
        super().__init__()
        self.table, self.back = nn.Embedding(16, 8), back
        self.norms = nn.ModuleList(OnePlusNorm(offset) for _ in range(3))
        self.up = nn.ModuleList(nn.Linear(8, 12) for _ in range(2))
        self.down = nn.ModuleList(nn.Linear(12, 8) for _ in range(2))
        self.head = nn.Linear(8, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = start = self.table(ids)
        for norm, up, down in zip(self.norms, self.up, self.down, strict=False):
            x = (start if self.back else x) + down(torch.relu(up(norm(x))))
        return self.head(self.norms[2](x))


def test_scales_stored_as_what_exceeds_one_are_fused_too() -> None:
    model, ids = seeded(Plain, 0), IDS % 16
    before = model(ids)
    stream = follow(model, Batch((ids,)))
    apply_(model, fuse(model, stream))
    assert float((model(ids) - before).detach().abs().max()) < 1e-5


def test_it_refuses_a_norm_it_does_not_know_and_an_addition_to_an_earlier_state() -> None:
    strange = seeded(lambda: Plain(offset=2.0), 0)
    with pytest.raises(GraphError, match=r"norms.0 was to be moved.*neither an RMSNorm nor a LayerNorm"):
        fuse(strange, follow(strange, Batch((IDS % 16,))))
    with pytest.raises(GraphError, match="addition 1 goes back to an earlier state"):
        follow(seeded(lambda: Plain(back=True), 0), Batch((IDS % 16,)))


def test_edits_saved_and_replayed_give_the_same_model_and_copies_do_not_share_state(tmp_path) -> None:
    model = loosen(decoder())
    fresh = copy.deepcopy(model)
    stream, edits = prepared(model)
    found = sites(model, stream)
    edits += apply_(model, [Rotate(site, rotation(WIDTH, n)) for n, site in enumerate(found)])
    edits += apply_(model, [Remove(site, torch.arange(WIDTH) < 16) for site in found[:-1]])
    save(edits, tmp_path / "edits.safetensors")
    apply_(fresh, load(tmp_path / "edits.safetensors"))
    assert torch.equal(logits(fresh), logits(model))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, StreamNorm):
                module.width = 1
    assert torch.equal(logits(twin), logits(fresh))
    assert not torch.equal(logits(model), logits(fresh))


@pytest.mark.parametrize("kind", ["Llama", "GPT-NeoX"])
def test_running_a_block_alone_leaves_nothing_behind(kind: str) -> None:
    name, settings, _ = KINDS[kind]
    model = make(name, **settings)
    stream, _ = prepared(model)
    apply_(model, [Remove(site, torch.arange(WIDTH) < 16) for site in sites(model, stream)[:-1]])
    before = logits(model)
    ids = torch.cat([IDS, IDS])
    with torch.no_grad():
        for block in walk(model, [Batch((ids,))]):
            if block.index == block.total - 1:
                list(block.outputs())  # the last block hands a wide stream on, and no norm takes it
    assert torch.equal(logits(model), before)


def test_gradients_flow_through_a_sliced_model_and_it_can_be_copied_afterwards() -> None:
    model = decoder()
    stream, _ = prepared(model)
    apply_(model, [Remove(site, torch.arange(WIDTH) < 16) for site in sites(model, stream)[:-1]])
    toy_text().loss(model, example()).backward()
    assert all(p.grad is not None for p in model.parameters())
    copy.deepcopy(model)


def test_the_stream_as_one_site_keeps_the_same_directions_everywhere() -> None:
    model = loosen(decoder())
    before = logits(model)
    stream = follow(model, example())
    apply_(model, fuse(model, stream))
    site = whole(model, stream)
    assert site.shape == (WIDTH,)
    apply_(model, Rotate(site, rotation(WIDTH, 0)))
    assert float((logits(model) - before).abs().max()) < 1e-4
    # a direction nothing writes to can go: the norms still divide by the old width
    for part in site.parts:
        if part.axis == 0 or "embed" in part.name:
            value = part.read(dict(model.named_parameters()))
            value.data.select(part.axis, 0).zero_()
    there = logits(model)
    apply_(model, Remove(site, torch.arange(WIDTH) > 0))
    torch.testing.assert_close(logits(model), there, atol=1e-5, rtol=0)


def test_second_moments_by_hand_and_without_padding() -> None:
    flow = torch.tensor([[[1.0, 2.0], [3.0, 0.0], [9.0, 9.0]]])
    found, count = second_moments([flow], [torch.tensor([[1, 1, 0]])])
    assert count == 2
    assert found.tolist() == [[10.0, 2.0], [2.0, 4.0]]
    assert second_moments([flow[:, :2]])[0].dtype == torch.float64


def test_a_module_that_joins_names_one_that_is_there() -> None:
    model = decoder()
    with pytest.raises(AttributeError):
        apply_(model, Replace("lm_head", StreamLinear(32, 64, False, "no.such", "model.norm", False)))


@pytest.mark.model
def test_the_real_model_says_the_same_in_another_basis(smollm2) -> None:
    model = copy.deepcopy(smollm2.model)
    model.model.layers = model.model.layers[:6]  # the layers of a real model, few enough to be quick
    ids = torch.tensor([smollm2.tokenizer.encode("The tower is 324 metres tall, about the same height as an")])
    with torch.no_grad():
        before = model(ids).logits
        stream = follow(model, Batch((ids,)))
        apply_(model, fuse(model, stream))
        apply_(model, add_shortcuts(model, stream))
        turn = rotation(stream.width, 0)
        swapped = turn.flip(1)
        apply_(model, [Rotate(s, turn if n % 2 else swapped) for n, s in enumerate(sites(model, stream))])
        after = model(ids).logits
    assert float((after - before).abs().max()) < 1e-3
