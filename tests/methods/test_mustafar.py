"""A cache pruned as text grows: the choice by hand, the packed form, attention on it, and what generate makes of it."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import decoder, make_task, moe, trained
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import secateur
from secateur.axes.cached import Anything, Channels, HeavyHitters, Newest, OutputAware, PerChannel, PerToken, kept
from secateur.cache import Eviction, Past, Pruning, SparseCache, evicting_cache, sparse_cache
from secateur.cache.attention import attend
from secateur.edit import Replace, apply_, load, save
from secateur.errors import ModelError, PatternError, SettingError
from secateur.formats.bitmap_kv import BitmapKV, pack
from secateur.method import prune
from secateur.methods.mustafar import Mustafar, token_bytes
from secateur.models import Opened
from secateur.models import load as secateur_load
from secateur.models import save as secateur_save

CHOICES = [PerToken(), OutputAware(), Channels(), PerChannel(), Anything()]


def words(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 64, shape, generator=torch.Generator().manual_seed(seed))


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_steps(model: torch.nn.Module, ids: torch.Tensor, prefill: int):
    """Logits of a text whose first tokens are the prompt and whose others come one at a time, and the cache."""
    with torch.no_grad():
        out = model(ids[:, :prefill], use_cache=True)
        logits, past = [out.logits], out.past_key_values
        for i in range(prefill, ids.shape[1]):
            out = model(ids[:, i : i + 1], past_key_values=past, use_cache=True)
            logits.append(out.logits)
    return torch.cat(logits, 1), past


# What stays


def test_the_choice_by_hand() -> None:
    key = torch.tensor([[[[3.0, -4.0, 1.0, -2.0, 0.5], [1.0, 1.0, 1.0, 1.0, 1.0]]]])
    keep = PerToken().select(key, 0.5)  # floor(2.5) = 2 go: the smallest, and of equals the first
    assert keep.tolist() == [[[[True, True, False, True, False], [False, False, True, True, True]]]]
    heard = torch.tensor([[[[0.1, 0.1, 9.0, 9.0, 9.0]]]])
    loud = OutputAware().select(key, 0.5, heard)  # .3, .4, 9, 18, 4.5
    assert loud[0, 0, 0].tolist() == [False, False, True, True, True]
    whole = Channels().select(key, 0.5)  # energies 5, 8.5, 1, 2.5, .625
    assert whole.tolist() == [[[[True, True, False, True, False]] * 2]]


def test_whole_channels_go_by_the_squares_of_keys_and_queries() -> None:
    """ThinK: the energy of a channel's keys times that of the last queries in it, of all heads that share the keys."""
    keys, values, query = noise(0, 1, 2, 64, 16), noise(1, 1, 2, 64, 16), noise(2, 1, 4, 64, 16)
    query[:, :, -1, :4] *= 9  # one loud query: sums of sizes, squared, would rank otherwise
    past = Pruning(0.5, 0.5, window=32, chunk=32, keys=Channels(), values=OutputAware()).begin()
    past.append_(keys, values)
    past.settle_(query)
    newest = query[:, :, -32:].unflatten(1, (2, 2)).double()
    energy = keys[:, :, :32].double().square().mean(2) * newest.square().sum((2, 3))
    best = energy.topk(8, -1).indices
    found, kept_values = past.dense()
    assert found[:, :, :32].ne(0).all(2).nonzero()[:, -1].tolist() == best.sort(-1).values.flatten().tolist()
    loud = values[:, :, :32].abs().double() * newest.abs().sum((2, 3)).unsqueeze(2)
    assert torch.equal(kept_values[:, :, :32] != 0, loud >= loud.topk(8, -1).values[..., -1:])


@pytest.mark.parametrize(("width", "sparsity", "left"), [(128, 0.7, 39), (64, 0.7, 20), (64, 0.5, 32), (5, 0.99, 1)])
def test_exactly_the_floor_goes_and_one_stays_at_least(width: int, sparsity: float, left: int) -> None:
    assert kept(width, sparsity) == left
    x = noise(0, 1, 2, 32, width)
    assert set(PerToken().select(x, sparsity).sum(-1).flatten().tolist()) == {left}


def test_ties_go_by_place() -> None:
    same = torch.ones(1, 1, 1, 8)
    assert PerToken().select(same, 0.5)[0, 0, 0].tolist() == [False] * 4 + [True] * 4


# The packed form


@pytest.mark.parametrize("width", [16, 32, 64, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_and_unpacking_are_inverse(width: int, dtype: torch.dtype) -> None:
    keys, values = noise(1, 2, 3, 96, width).to(dtype), noise(2, 2, 3, 96, width).to(dtype)
    keys[0, 0, 5] = 0.0  # true zeros that are kept
    keep = [PerToken().select(x, s) for x, s in ((keys, 0.5), (values, 0.7))]
    packed = pack(keys, values, *keep)
    back = packed.dense()
    assert torch.equal(back[0], keys * keep[0])
    assert torch.equal(back[1], values * keep[1])


def test_bytes_are_what_the_formula_says() -> None:
    rule = Pruning(0.7, 0.7)
    x = noise(0, 1, 3, 320, 64).bfloat16()
    keep = PerToken().select(x, 0.7)
    packed = pack(x, x, keep, keep)
    assert packed.nbytes == 3 * 320 * token_bytes(64, rule, 2) == 3 * 320 * 96  # dense: 256 a token and head
    past = Past(rule)
    past.append_(x, x)
    past.settle_(noise(1, 1, 9, 320, 64))
    assert past.packed is not None
    assert past.packed.tokens == 288
    assert past.nbytes == 3 * (288 * 96 + 32 * 256)


def test_tiles_are_appended_and_room_grows_by_an_eighth() -> None:
    x = noise(0, 1, 2, 320, 32)
    keep = PerToken().select(x, 0.5)
    packed = pack(x[:, :, :256], x[:, :, :256], keep[:, :, :256], keep[:, :, :256])
    packed.append_(pack(x[:, :, 256:], x[:, :, 256:], keep[:, :, 256:], keep[:, :, 256:]))
    assert (packed.tiles, packed.key_bits.shape[2]) == (10, 10)
    assert torch.equal(packed.dense()[0], x * keep)
    packed.append_(pack(x[:, :, :32], x[:, :, :32], keep[:, :, :32], keep[:, :, :32]))
    assert (packed.tiles, packed.key_bits.shape[2]) == (11, 11)


def test_what_cannot_be_packed_is_refused() -> None:
    x = noise(0, 1, 1, 40, 16)
    keep = PerToken().select(x, 0.5)
    with pytest.raises(PatternError, match="40 tokens were to be packed, but a tile has 32"):
        pack(x, x, keep, keep)
    uneven = keep.clone()[:, :, :32]
    uneven[0, 0, 0] = True
    two = torch.cat([uneven, keep[:, :, :32]], 1)
    with pytest.raises(PatternError, match="keys were to be packed, with equally many kept in every 32 tokens"):
        pack(
            torch.cat([x[:, :, :32]] * 2, 1), torch.cat([x[:, :, :32]] * 2, 1), two, torch.cat([keep[:, :, :32]] * 2, 1)
        )
    packed = pack(x[:, :, :32], x[:, :, :32], keep[:, :, :32], keep[:, :, :32])
    more = PerToken().select(x[:, :, :32], 0.8)
    with pytest.raises(PatternError, match="Prune every token of a cache to the same sparsity"):
        packed.append_(pack(x[:, :, :32], x[:, :, :32], more, more))


# Attention


@pytest.mark.parametrize("choice", CHOICES, ids=lambda c: type(c).__name__)
def test_pruned_attention_is_that_of_the_masked_cache(choice) -> None:
    rule = Pruning(0.7, 0.5, window=8, keys=choice)
    past, keys, values = Past(rule), noise(0, 2, 2, 200, 16), noise(1, 2, 2, 200, 16)
    past.append_(keys, values)
    past.settle_(noise(2, 2, 6, 200, 16))
    assert past.packed is not None
    assert past.packed.tokens == 192
    query = noise(3, 2, 6, 1, 16)
    past.append_(noise(4, 2, 2, 1, 16), noise(5, 2, 2, 1, 16))
    lean_keys, lean_values = (t.double().repeat_interleave(3, 1) for t in past.dense())
    weights = (query.double() @ lean_keys.transpose(-1, -2) / 4).softmax(-1)
    assert float((attend(query, past, None, 0.25) - weights @ lean_values).abs().max()) < 1e-5
    assert float((lean_keys[:, :, :192] == 0).double().mean()) >= 0.66


@pytest.mark.parametrize(
    ("make", "choice", "prefills"),
    [
        (decoder, PerToken(), (20,)),
        (decoder, OutputAware(), (70,)),
        (decoder, Channels(), (70,)),
        (decoder, PerChannel(), (70,)),
        (decoder, Anything(), (70,)),
        (moe, OutputAware(), (60,)),
    ],
)
def test_one_pass_as_decoded_is_decoding(make, choice, prefills) -> None:
    model, ids = make(), words(0, 2, 98)
    with sparse_cache(model, 0.5, keys=choice) as cache, torch.no_grad():
        for prefill in prefills:
            cache.prefill = prefill
            steps, past = in_steps(model, ids, prefill)
            torch.testing.assert_close(model(ids).logits, steps, atol=1e-5, rtol=1e-4)
            assert past.layers[0].past.packed.tokens == 64
        lean = model(ids).logits
    assert float((model(ids).logits.detach() - lean).abs().max()) > 0.01  # and it does something


def test_without_sparsity_nothing_changes() -> None:
    model, ids = decoder(), words(0, 1, 100)
    with torch.no_grad():
        dense = model(ids).logits
        with sparse_cache(model, 0.0):
            torch.testing.assert_close(in_steps(model, ids, 50)[0], dense, atol=1e-5, rtol=1e-4)


def test_a_text_shorter_than_the_window_is_not_pruned() -> None:
    model, ids = decoder(), words(0, 1, 30)
    with torch.no_grad(), sparse_cache(model, 0.9):
        lean = in_steps(model, ids, 20)[0]
    torch.testing.assert_close(lean, model(ids).logits.detach(), atol=1e-5, rtol=1e-4)


def test_what_is_pruned_stays_as_it_is_and_each_token_is_pruned_after_it_was_seen() -> None:
    past, rule = Past(Pruning(0.5, 0.5, window=4)), Pruning(0.5, 0.5, window=4)
    x = noise(0, 1, 1, 80, 16)
    past.append_(x[:, :, :1], x[:, :, :1])
    past.settle_(x[:, :, :1])
    snapshots = []
    for i in range(1, 80):
        past.append_(x[:, :, i : i + 1], x[:, :, i : i + 1])
        seen = past.dense()[0]
        behind = int(rule.behind(torch.tensor(i)))
        assert torch.equal(seen[:, :, behind:], x[:, :, behind : i + 1])  # as it is until it has left the window
        past.settle_(x[:, :, i : i + 1])
        snapshots.append(past.dense()[0])
    assert torch.equal(snapshots[-1][:, :, :32], snapshots[40][:, :, :32])
    assert int(rule.behind(torch.tensor(80))) == 64 == past.packed.tokens


def test_left_padding_is_not_attended_to() -> None:
    model, ids = decoder(), words(0, 1, 60)
    padded = torch.cat([torch.zeros(1, 32, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 32, dtype=torch.long), torch.ones(1, 60, dtype=torch.long)], 1)
    other = torch.cat([torch.full((1, 32), 7), ids], 1)  # what stands in the padding is nobody's business
    dense = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    with sparse_cache(model, 0.0):
        mine = model.generate(padded, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0)
    assert torch.equal(mine, dense)
    with sparse_cache(model, 0.7), torch.no_grad():
        logits = []
        for text in (padded, other):
            out = model(text, attention_mask=mask, use_cache=True)
            longer = torch.cat([mask, torch.ones(1, 1, dtype=torch.long)], 1)
            past = out.past_key_values
            logits.append(model(ids[:, :1], attention_mask=longer, past_key_values=past, use_cache=True).logits)
    torch.testing.assert_close(*logits)


# In the hands of transformers


HOW = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(
    ("make", "before"), [(sparse_cache, "sdpa"), (sparse_cache, "flex_attention"), (evicting_cache, "eager")]
)
def test_with_nothing_pruned_generate_gives_what_it_gave(make, before: str) -> None:
    """Under any attention the model had: beams, padding, tokens taken back by speculation."""
    model, ids = trained("decoder"), words(0, 2, 60)
    ids[0, :20] = 0
    mask = torch.ones_like(ids)
    mask[0, :20] = 0
    ways = [
        {"attention_mask": mask},
        {"attention_mask": mask, "num_beams": 3, "max_new_tokens": 8},
        {"attention_mask": mask, "num_return_sequences": 2, "do_sample": True, "top_k": 1},
    ]
    dense = [model.generate(ids, **{**HOW, **way}) for way in ways]
    alone = {"assistant_model": decoder(seed=1)}, {"prompt_lookup_num_tokens": 5}
    dense += [model.generate(ids[1:], **HOW, **way) for way in alone]
    model.set_attn_implementation(before)
    with make(model, 0.0, window=24):
        lean = [model.generate(ids, **{**HOW, **way}) for way in ways]
        lean += [model.generate(ids[1:], **HOW, **way) for way in alone]
    assert model.config._attn_implementation == before
    assert all(torch.equal(a, b) for a, b in zip(dense, lean, strict=True))


def test_layers_with_a_sliding_window_stay_as_they_are() -> None:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Gemma3ForCausalLM(config).eval()
    ids = words(0, 2, 70)
    with torch.no_grad():
        dense = model(ids).logits
        with sparse_cache(model, 0.0) as cache:
            steps, past = in_steps(model, ids, 40)
            assert [type(layer).__name__ for layer in past.layers] == ["DynamicSlidingWindowLayer", "PrunedLayer"]
            torch.testing.assert_close(steps, dense, atol=1e-5, rtol=1e-4)
        with sparse_cache(model, 0.6) as cache:
            cache.prefill = 40
            steps, _ = in_steps(model, ids, 40)
            torch.testing.assert_close(model(ids).logits, steps, atol=1e-5, rtol=1e-4)


def test_attention_that_asks_for_more_is_refused_by_name_in_layers_of_a_sliding_window_too() -> None:
    """Gemma 2 caps its scores in every layer, and slides in the first."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    model, ids = Gemma2ForCausalLM(config).eval(), words(0, 1, 40)
    for given in ({}, {"use_cache": True}):
        with (
            sparse_cache(model, 0.5),
            pytest.raises(ModelError, match=r"Gemma2Attention[\s\S]*softcap, which that cannot do"),
        ):
            model(ids, **given)


def test_generate_fills_a_pruned_cache_and_the_model_is_as_it_was_afterwards() -> None:
    model, ids = decoder(), words(0, 2, 70)
    before = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
    with secateur.sparse_cache(model, 0.9):
        out = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
        layer = out.past_key_values.layers[0]
        assert layer.past.packed.tokens == 32
        assert layer.get_seq_length() == 89
        beams = model.generate(ids, max_new_tokens=8, num_beams=3, do_sample=False, pad_token_id=0)
        assert beams.shape == (2, 78)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0), before)


def test_a_second_prompt_goes_on_from_a_pruned_cache() -> None:
    model, ids = decoder(), words(0, 1, 110)
    with sparse_cache(model, 0.5), torch.no_grad():
        out = model(ids[:, :70], use_cache=True)
        more = model(ids[:, 70:80], past_key_values=out.past_key_values, use_cache=True)
        steps, _ = in_steps(model, ids[:, :80], 70)
    torch.testing.assert_close(more.logits, steps[:, 70:], atol=1e-5, rtol=1e-4)


def test_the_newest_tokens_can_be_taken_back_and_packed_ones_cannot() -> None:
    model, ids = decoder(), words(0, 1, 80)
    with sparse_cache(model, 0.5), torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        past.crop(-10)
        assert past.get_seq_length() == 70
        with pytest.raises(ModelError, match="the newest 60 tokens of a pruned cache were to be taken back"):
            past.crop(-60)
        with pytest.raises(ModelError, match="Give minus the number of tokens that are to go"):
            past.crop(60)  # which some mean as how many are left
        assert past.get_seq_length() == 70


def test_a_cache_that_was_begun_without_it_is_refused() -> None:
    model, ids = decoder(), words(0, 1, 10)
    past = model(ids, use_cache=True).past_key_values
    with sparse_cache(model, 0.5), pytest.raises(ModelError, match="it holds 10 tokens that another run put there"):
        model(ids[:, :1], past_key_values=past)


def test_a_cache_of_fixed_size_is_refused() -> None:
    model, ids = decoder(), words(0, 1, 10)
    with sparse_cache(model, 0.5), pytest.raises(ModelError, match="Leave cache_implementation out"):
        model.generate(ids, max_new_tokens=4, cache_implementation="static", pad_token_id=0)


def test_a_model_with_nothing_but_sliding_windows_is_refused() -> None:
    config = {"sliding_window": 16, "num_key_value_heads": 2, "num_attention_heads": 4, "num_hidden_layers": 2}
    model = MistralForCausalLM(MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=64, **config))
    with sparse_cache(model, 0.5), pytest.raises(ModelError, match="every layer has a sliding window"):
        model.generate(words(0, 1, 40), max_new_tokens=4, pad_token_id=0)


def test_a_cache_that_is_pruned_already_is_refused() -> None:
    model, ids = decoder(), words(0, 1, 10)
    with sparse_cache(model, 0.5), pytest.raises(ModelError, match="it is pruned already"), sparse_cache(model, 0.9):
        pass
    assert model.config._attn_implementation != "secateur"
    apply_(model, [Replace("sparse_cache", SparseCache())])
    with pytest.raises(ModelError, match="it is pruned already"), evicting_cache(model, 0.9):
        pass
    assert model(ids, use_cache=True).past_key_values.layers[0].past.pruning == Pruning()


@pytest.mark.parametrize("cached", [True, False])
def test_what_attention_cannot_do_is_refused_in_layers_with_a_sliding_window_too(cached: bool) -> None:
    config = {"sliding_window": 16, "num_key_value_heads": 2, "num_attention_heads": 4, "num_hidden_layers": 2}
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    gemma = Gemma2ForCausalLM(Gemma2Config(**sizes, **config))
    sinks = GptOssForCausalLM(GptOssConfig(**sizes, **config, num_local_experts=2, num_experts_per_tok=1))
    for model, asks in ((gemma, "softcap"), (sinks, "s_aux")):
        with (
            sparse_cache(model, 0.5) as cache,
            cache.in_use(),
            pytest.raises(ModelError, match=f"it asks for {asks}, which that cannot do"),
        ):
            model(words(0, 1, 40), use_cache=cached)


def test_a_model_that_does_not_read_through_the_interface_is_refused() -> None:
    with (
        pytest.raises(ModelError, match="not a language model of transformers whose attention can be exchanged"),
        sparse_cache(torch.nn.Linear(2, 2), 0.5),
    ):
        pass


def test_a_pruned_cache_is_read_by_its_attention_alone(monkeypatch) -> None:
    model, ids = decoder(), words(0, 1, 80)
    with sparse_cache(model, 0.5), torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
        model.set_attn_implementation("eager")
        with pytest.raises(ModelError, match="its attention was set to eager since, which cannot read one"):
            model(ids[:, :1], past_key_values=past)
    with pytest.raises(ModelError, match="the attention of this model sees the newest tokens alone"):
        model(ids[:, :1], past_key_values=past)
    monkeypatch.setattr(model.model.layers[1].self_attn, "forward", own_attention(model.model.layers[1].self_attn))
    with (
        sparse_cache(model, 0.5),
        pytest.raises(ModelError, match="it computes attention itself, and would see the newest tokens alone"),
    ):
        model(ids, use_cache=True)


def own_attention(layer):
    def forward(hidden_states, past_key_values=None, **more):
        past_key_values.update(*noise(0, 2, 1, 2, hidden_states.shape[1], 8), layer.layer_idx)
        return torch.zeros_like(hidden_states), None

    return forward


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"key_sparsity": 1.0}, "a sparsity is the fraction removed"),
        ({"window": -1}, "it is negative"),
        ({"chunk": 48}, "Give a multiple of 32"),
        ({"keys": "per-token"}, "'per-token' was to choose what stays of a cache, but it is no choice"),
        ({"chunk": 96, "keys": PerChannel(64)}, "Give a multiple of 64"),
    ],
)
def test_settings_that_cannot_be(settings: dict, text: str) -> None:
    with pytest.raises(SettingError, match=text):
        Pruning(**settings)


# Whole tokens


@pytest.mark.parametrize("by", [HeavyHitters(), Newest(2)], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("prefill", [1, 20, 70])
def test_eviction_in_one_pass_is_eviction_step_by_step(by, prefill: int) -> None:
    model, ids = decoder(), words(0, 2, 98)
    with evicting_cache(model, 0.5, window=8, chunk=16, by=by) as cache, torch.no_grad():
        cache.prefill = prefill
        steps, past = in_steps(model, ids, prefill)
        torch.testing.assert_close(model(ids).logits, steps, atol=1e-5, rtol=1e-4)
        left = past.layers[0].past.keys
        assert left.shape[2] == 40 + 18  # of the 80 behind the window, half; and the rest
        assert past.get_seq_length() == 98
        lean = model(ids).logits
    assert float((model(ids).logits.detach() - lean).abs().max()) > 0.01


def test_which_tokens_are_forgotten_by_hand() -> None:
    past = Eviction(0.5, window=1, chunk=4).begin()
    keys = torch.tensor([3.0, 0, 2, 0, 1]).reshape(1, 1, 5, 1)
    past.append_(keys, torch.arange(5.0).reshape(1, 1, 5, 1))
    out = past.attend(torch.ones(1, 1, 1, 1), None, 1.0)  # the newest asks: tokens 0 and 2 are what it looks at
    weights = torch.tensor([3.0, 0, 2, 0, 1]).softmax(0)
    torch.testing.assert_close(float(out), float(weights @ torch.arange(5.0)))
    past.settle_(torch.ones(1, 1, 1, 1))
    assert past.values.flatten().tolist() == [0, 2, 4]
    out = past.attend(torch.ones(1, 1, 1, 1), None, 1.0)  # what is gone gets nothing
    weights = torch.tensor([3.0, 2, 1]).softmax(0)
    torch.testing.assert_close(float(out), float(weights @ torch.tensor([0.0, 2, 4])))
    places, got = torch.arange(6).reshape(1, 1, 6), torch.tensor([[[0.0, 1, 1, 1, 1, 1]]])
    assert Newest(1).score(got, places).flatten().tolist() == [-1, float("inf"), 2, 3, 4, 5]  # padding goes first


def test_generate_with_whole_tokens_forgotten() -> None:
    model, ids = decoder(), words(0, 1, 60)
    padded = torch.cat([torch.zeros(1, 32, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 32, dtype=torch.long), torch.ones(1, 60, dtype=torch.long)], 1)
    how = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    dense = model.generate(padded, attention_mask=mask, **how)
    with evicting_cache(model, 0.0):
        assert torch.equal(model.generate(padded, attention_mask=mask, **how), dense)
    with evicting_cache(model, 0.75, window=8):
        out = model.generate(padded, attention_mask=mask, return_dict_in_generate=True, **how)
        layer = out.past_key_values.layers[0]
        assert layer.past.keys.shape[2] == 16 + 39  # a quarter of 64, of the 103 there were
        assert int(layer.past._places.min()) >= 32  # padding was forgotten first
        assert model.generate(ids, num_beams=2, **how).shape == (1, 72)
        layer.crop(-3)
        assert (layer.get_seq_length(), layer.past.keys.shape[2]) == (100, 52)
        with pytest.raises(ModelError, match="the newest 37 tokens of a pruned cache were to be taken back"):
            layer.crop(-37)


def test_an_evicting_cache_is_built_again_from_its_settings() -> None:
    cache = SparseCache(3, Eviction(0.5, window=4, by=Newest(2)))
    again = SparseCache(**cache.settings())
    assert (again.prefill, again.pruning) == (3, cache.pruning)
    with pytest.raises(SettingError, match=r"sparsity 1.0 was asked for"):
        Eviction(1.0)
    with pytest.raises(SettingError, match=r"chunks of 0 tokens were asked for"):
        Eviction(chunk=0)


# The method


def test_the_method_changes_no_weight_and_its_edit_brings_the_cache_back(tmp_path: Path) -> None:
    model, task = trained("decoder"), make_task("decoder")
    done = prune(model, Mustafar(sparsity=0.5, window=4, keys=OutputAware()), task)
    assert done.ledger.after.parameters == done.ledger.before.parameters
    assert done.ledger.removed == 0
    assert done.ledger.after.flops == done.ledger.before.flops  # not that of measuring as if it had been decoded
    save(done.edits, tmp_path / "edits.safetensors")
    again = copy.deepcopy(model)
    apply_(again, load(tmp_path / "edits.safetensors"))
    assert isinstance(again.sparse_cache, SparseCache)
    assert again.sparse_cache.pruning == Pruning(0.5, 0.5, window=4, keys=OutputAware())
    ids = words(0, 1, 48)
    assert torch.equal(again(ids).logits, done.model(ids).logits)
    assert not torch.equal(again(ids).logits, model(ids).logits)


def test_a_saved_folder_is_loaded_with_its_cache_pruned(tmp_path: Path) -> None:
    model, ids = trained("decoder"), words(0, 1, 60)
    done = prune(model, Mustafar(sparsity=0.6, window=4), make_task("decoder"))
    folder = Opened(model, None, "net", "net", "hf", model.config.to_dict())
    secateur_save(done, folder, tmp_path / "lean")
    again = secateur_load(tmp_path / "lean")
    assert again.sparse_cache.pruning.key_sparsity == 0.6
    out = again.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0, return_dict_in_generate=True)
    assert out.past_key_values.layers[0].past.packed.tokens == 32
    stock = LlamaForCausalLM.from_pretrained(tmp_path / "lean")
    assert torch.equal(stock(ids).logits, model(ids).logits)


def test_a_higher_sparsity_costs_more_and_whole_channels_cost_more_still() -> None:
    """The claim at toy size: what the logits lose by elements is less than by channels, at the same bytes."""
    model, ids = trained("decoder"), words(3, 8, 100)
    with torch.no_grad():
        dense = model(ids).logits

        def lost(sparsity: float, choice) -> float:
            with sparse_cache(model, sparsity, window=1, keys=choice, values=choice):
                return float((model(ids).logits - dense).square().mean())

        half, most = lost(0.5, PerToken()), lost(0.75, PerToken())
        assert 0 < 1.5 * half < most
        assert 1.5 * half < lost(0.5, Channels())
        assert 1.2 * most < lost(0.75, Channels())


def test_it_packs_the_same_bits_as_a_plain_loop() -> None:
    x = noise(0, 1, 1, 32, 40)
    keep = PerToken().select(x, 0.5)
    packed: BitmapKV = pack(x, x, keep, keep)
    for channel in range(40):
        word = sum(1 << t for t in range(32) if keep[0, 0, t, channel])
        assert int(packed.key_bits[0, 0, 0, channel]) & 0xFFFFFFFF == word
    for token in range(32):
        word = sum(1 << c for c in range(32) if keep[0, 0, token, c])
        assert int(packed.value_bits[0, 0, 0, token, 0]) & 0xFFFFFFFF == word
    assert packed.value_values[0, 0, 0].tolist() == x[0, 0][keep[0, 0]].tolist()
    assert replace(packed).tokens == 32
