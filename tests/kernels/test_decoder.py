"""Blocks of a language model in one call: every kernel against plain torch, and whole models against their blocks."""

import copy
import ctypes
import gc
import math
import sys
import threading

import pytest
import torch
from torch import nn

from secateur import accelerate, kernels
from secateur.cache import OutputAware, sparse_cache
from secateur.chaining import chained_within, decoding, sharing
from secateur.errors import FormatError, ModelError
from secateur.formats import Bitmap, BitmapInt8, SellBlocked
from secateur.formats.decoder import Attend, Decoder, Normalize, Rotate
from secateur.formats.linear import SparseLinear
from secateur.formats.packed import VALUES

transformers = pytest.importorskip("transformers")

DTYPES = [torch.float32, torch.bfloat16]
LEVELS = ["base", "avx2", "avx512", "neon"]


def noise(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def at_every_level():
    for level in LEVELS:
        if level in kernels.levels():
            with kernels.forced(level):
                yield level


def run(name, dtype, call, items):
    kernels.run(kernels.find(f"{name}_{VALUES[dtype]}"), call, items)


def normed(x, weight, epsilon):
    """As transformers writes it."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (2, 16), (1, 33), (5, 64), (1, 576)], ids=str)
def test_norms_are_those_of_transformers(shape, dtype):
    assert ctypes.sizeof(Normalize) == 64
    rows, width = shape
    x, more, weight = noise(*shape, dtype=dtype), noise(*shape, dtype=dtype, seed=1), noise(width, dtype=dtype, seed=2)
    close = {"rtol": 3e-6, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 0}
    for _ in at_every_level():
        for added in (None, more):
            for in_place in (False, True):
                source = x.clone()
                total, y = torch.full_like(x, 7.0), source if in_place and added is None else torch.full_like(x, 7.0)
                at = None if added is None else added.data_ptr()
                pointers = source.data_ptr(), at, total.data_ptr(), weight.data_ptr(), y.data_ptr()
                run("normalize", dtype, Normalize(*pointers, rows, width, 1e-5), rows)
                whole = x if added is None else x + added
                if added is not None:
                    assert torch.equal(total, whole)
                torch.testing.assert_close(y, normed(whole, weight, 1e-5), **close)
        total = x.clone()
        run(
            "normalize",
            dtype,
            Normalize(total.data_ptr(), more.data_ptr(), total.data_ptr(), None, None, *shape, 0),
            rows,
        )
        assert torch.equal(total, x + more)


def turned(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 6, 16, 32, 64, 80])
@pytest.mark.parametrize("alone", [True, False])
def test_rotations_are_those_of_transformers(width, alone, dtype):
    assert ctypes.sizeof(Rotate) == 48
    texts, heads = 3, 5
    x = noise(texts, heads, width, dtype=dtype)
    angle = noise(1 if alone else texts, 1, width, seed=1)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0, "atol": 0}
    for _ in at_every_level():
        found = x.clone()
        pointers = found.data_ptr(), cos.data_ptr(), sin.data_ptr()
        run("rotate", dtype, Rotate(*pointers, heads, width, 0 if alone else width), texts)
        torch.testing.assert_close(found, turned(x, cos, sin), **close)


def attended(query, keys, values, new_keys, new_values, bias, scaling, grows=0):
    """By the kernel of this level; heads of queries [texts, heads, group, width]."""
    texts, heads, group, width = query.shape
    out = torch.full_like(query, 7.0)
    pointers = [t.data_ptr() for t in (query, keys, values, new_keys, new_values)]
    strides = *keys.stride()[:2], *values.stride()[:2]
    at = None if bias is None else bias.data_ptr()
    call = Attend(*pointers, at, out.data_ptr(), keys.shape[2], *strides, grows, heads, group, width, scaling)
    run("attend", query.dtype, call, texts * heads)
    return out


def plainly(query, keys, values, bias, scaling):
    scores = query.double() @ keys.double().transpose(-1, -2) * scaling
    scores = scores if bias is None else scores + bias[:, None, None].double()
    return (scores.softmax(-1).nan_to_num(0.0) @ values.double()).to(query.dtype)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [2, 8, 12, 64, 80, 128])
@pytest.mark.parametrize("group", [1, 3, 5])
def test_attention_is_that_of_plain_torch(group, width, dtype, threads):
    assert ctypes.sizeof(Attend) == 136
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        texts, heads, room = 2, 3, 40
        query = noise(texts, heads, group, width, dtype=dtype)
        held = (
            noise(texts, heads, room, width, dtype=dtype, seed=1),
            noise(texts, heads, room, width, dtype=dtype, seed=2),
        )
        close = {"rtol": 1e-5, "atol": 1e-5} if dtype is torch.float32 else {"rtol": 1e-2, "atol": 1e-3}
        for tokens in (0, 1, 14, 15, 16, 17, 33, 39):
            whole = [t[:, :, : tokens + 1].contiguous() for t in held]
            past = [t[:, :, :tokens] for t in held]  # as a cache that was cropped has it
            fresh = [t[:, :, tokens].contiguous() for t in whole]
            for bias in (None, noise(texts, tokens + 1, seed=3).masked_fill(noise(texts, tokens + 1) > 1, -math.inf)):
                wanted = plainly(query, *whole, bias, 0.3)
                for _ in at_every_level():
                    torch.testing.assert_close(attended(query, *past, *fresh, bias, 0.3), wanted, **close)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_new_token_goes_behind_the_others_where_there_is_room(dtype):
    query, *fresh = (noise(2, 3, *shape, dtype=dtype, seed=4) for shape in ((2, 10), (10,), (10,)))
    for _ in at_every_level():
        keys, values = noise(2, 3, 7, 10, dtype=dtype), noise(2, 3, 6, 10, dtype=dtype)
        before = keys.clone(), values.clone()
        attended(query, keys[:, :, :5], values[:, :, :5], *fresh, None, 0.3, grows=1)
        for held, new, was in zip((keys, values), fresh, before, strict=True):
            was[:, :, 5] = new
            assert torch.equal(held, was)


def test_what_is_not_finite_stays_so_in_an_attention():
    query, keys, values = noise(1, 1, 2, 8), noise(1, 1, 20, 8, seed=1), noise(1, 1, 20, 8, seed=2)
    nothing = torch.full((1, 20), -math.inf)
    for _ in at_every_level():
        for place in (3, 19):
            for strange in (math.nan, math.inf):
                other = values.clone()
                other[0, 0, place, 5] = strange
                found = attended(query, keys[:, :, :19], other[:, :, :19], keys[:, :, 19], other[:, :, 19], None, 1.0)
                assert not found[..., 5].isfinite().any()
                assert found[..., :5].isfinite().all()
                asked = query.clone()
                asked[0, 0, 1, 2] = strange
                found = attended(asked, keys[:, :, :19], values[:, :, :19], keys[:, :, 19], values[:, :, 19], None, 1.0)
                assert found[0, 0, 0].isfinite().all()
                assert found[0, 0, 1].isnan().all()
        found = attended(query, keys[:, :, :19], values[:, :, :19], keys[:, :, 19], values[:, :, 19], nothing, 1.0)
        assert torch.equal(found, torch.zeros_like(found))


def test_small_weights_of_an_attention_are_as_small_as_they_are():
    query, keys = torch.ones(1, 1, 1, 8), torch.zeros(1, 1, 40, 8)
    keys[0, 0, :, 0] = -torch.linspace(0, 120, 40)
    values = torch.zeros(1, 1, 40, 8)
    for place in range(39):
        values.zero_()[0, 0, place] = 1.0
        for _ in at_every_level():
            found = attended(query, keys[:, :, :39], values[:, :, :39], keys[:, :, 39], values[:, :, 39], None, 1.0)
            wanted = plainly(query, keys, values, None, 1.0)
            torch.testing.assert_close(found, wanted, rtol=2e-6, atol=1.2e-38)


KINDS = {
    "Llama": {},
    "Mistral": {"sliding_window": None},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
}


def language_model(
    kind="Llama", dtype=torch.float32, seed=0, format=None, blocks=2, implementation="sdpa", pack=True, **more
):
    """A small model with zeros, its linear layers packed and in chains, and the same with its blocks in one call."""
    settings = {"vocab_size": 50, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    settings |= {"num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 128}
    config = getattr(transformers, f"{kind}Config")(**{**settings, **KINDS[kind], **more})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).to(dtype).eval().requires_grad_(False)
    made = torch.Generator().manual_seed(0)
    packed = {}
    for name, layer in model.named_modules():
        if "norm" in name:
            layer.weight.copy_(1 + 0.2 * torch.randn(layer.weight.shape, generator=made))
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.mul_(4 * (torch.rand(layer.weight.shape, generator=made) > 0.5))
            if layer.bias is not None:
                layer.bias.copy_(torch.randn(layer.bias.shape, generator=made))
            packed |= {layer: SparseLinear.of(layer, format or Bitmap())} if pack else {}
    plain = chained_within(sharing(model, packed))
    return plain, decoding(plain)


def decoder_of(model):
    (found,) = [module for module in model.modules() if isinstance(module, Decoder)]
    return found


@pytest.fixture
def counted(monkeypatch):
    """How often blocks went through in one call."""
    from secateur.formats import decoder

    calls = []
    attended = decoder._Plan.attended

    def count(plan, *given):
        found = attended(plan, *given)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(decoder._Plan, "attended", count)
    return calls


CLOSE = {torch.float32: {"rtol": 1e-4, "atol": 1e-4}, torch.bfloat16: {"rtol": 5e-2, "atol": 8e-2}}


def written(model, texts, count, cache=None):
    """Logits of so many tokens one by one after a prompt of five, and the cache."""
    ids = torch.randint(1, 50, (texts, 5 + count), generator=torch.Generator().manual_seed(3))
    cache = transformers.DynamicCache(config=model.config) if cache is None else cache
    with torch.no_grad():
        model(input_ids=ids[:, :5], past_key_values=cache)
        each = [ids[:, at : at + 1] for at in range(5, 5 + count)]
        found = [model(input_ids=one, past_key_values=cache).logits for one in each]
    return torch.cat(found, 1), cache


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_token_goes_through_all_blocks_in_one_call(kind, dtype, counted):
    plain, fast = language_model(kind, dtype)
    assert decoder_of(fast).agrees()
    counted.clear()
    for texts in (1, 3):
        one, ours = written(plain, texts, 20), written(fast, texts, 20)
        torch.testing.assert_close(ours[0], one[0], **CLOSE[dtype])
        for mine, other in zip(ours[1].layers, one[1].layers, strict=True):
            assert mine.keys.shape == other.keys.shape == (texts, 2, 25, mine.keys.shape[-1])
            torch.testing.assert_close(mine.keys, other.keys, **CLOSE[dtype])
            torch.testing.assert_close(mine.values, other.values, **CLOSE[dtype])
    assert counted == [True] * 40


@pytest.mark.parametrize("format", [Bitmap(), BitmapInt8(), SellBlocked()], ids=lambda format: format.name)
def test_every_format_and_level(format):
    plain, fast = language_model(format=format, dtype=torch.bfloat16)
    for level in kernels.levels():
        with kernels.forced(level):
            torch.testing.assert_close(written(fast, 2, 3)[0], written(plain, 2, 3)[0], **CLOSE[torch.bfloat16])


def test_a_first_token_and_one_without_a_cache(counted):
    plain, fast = language_model()
    ids = torch.tensor([[7], [9]])
    with torch.no_grad():
        torch.testing.assert_close(fast(ids, use_cache=False).logits, plain(ids, use_cache=False).logits)
        one, ours = plain(ids), fast(ids)
        torch.testing.assert_close(ours.logits, one.logits)
        assert ours.past_key_values.get_seq_length() == 1
        for cache in (transformers.DynamicCache(), transformers.DynamicCache(config=fast.config)):
            torch.testing.assert_close(fast(ids, past_key_values=cache).logits, one.logits)
            assert cache.get_seq_length() == 1
    assert counted == [True] * 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_left_out(implementation, counted):
    plain, fast = language_model(implementation=implementation)
    ids = torch.randint(1, 50, (2, 8), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    found = []
    for model in (plain, fast):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            model(ids[:, :6], attention_mask=mask[:, :6], past_key_values=cache)
            for at in (6, 7):
                given = {"attention_mask": mask[:, : at + 1], "past_key_values": cache}
                found.append(model(ids[:, at : at + 1], **given).logits)
    torch.testing.assert_close(torch.cat(found[2:]), torch.cat(found[:2]), **CLOSE[torch.float32])
    assert counted == [True] * 2


def test_texts_are_written_as_before(counted):
    plain, fast = language_model("Qwen3")
    ids = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 9, 2, 6]])
    mask = (ids > 0).long()
    for how in ({"do_sample": False}, {"num_beams": 3}, {"do_sample": False, "attention_mask": mask}):
        one, ours = (m.generate(ids, max_new_tokens=12, pad_token_id=0, **how) for m in (plain, fast))
        assert torch.equal(one, ours)
    assert counted.count(True) > 20


def test_what_a_cache_was_cropped_to_is_what_is_read(counted):
    plain, fast = language_model()
    found = []
    for model in (plain, fast):
        cache = written(model, 1, 6)[1]
        cache.crop(-4)
        found.append(written_on(model, cache))
    torch.testing.assert_close(found[1], found[0], **CLOSE[torch.float32])
    assert counted == [True] * 8


def written_on(model, cache):
    with torch.no_grad():
        return torch.cat([model(torch.tensor([[at]]), past_key_values=cache).logits for at in (8, 9)], 1)


def test_other_caches_and_attentions_are_asked_as_before(counted):
    plain, fast = language_model()
    torch.testing.assert_close(
        written(fast, 1, 3, transformers.StaticCache(config=fast.config, max_cache_len=16))[0],
        written(plain, 1, 3, transformers.StaticCache(config=plain.config, max_cache_len=16))[0],
        **CLOSE[torch.float32],
    )

    class Counting(transformers.DynamicCache):
        """A cache that does something else."""

        updates = 0

        def update(self, *args, **named):
            self.updates += 1
            return super().update(*args, **named)

    cache = written(fast, 1, 3, Counting(config=fast.config))[1]
    assert cache.updates == 8
    with sparse_cache(plain, 0.5, window=2):
        wanted = written(plain, 1, 6)[0]
    with sparse_cache(fast, 0.5, window=2):
        torch.testing.assert_close(written(fast, 1, 6)[0], wanted, **CLOSE[torch.float32])
    assert not any(counted)
    torch.testing.assert_close(written(fast, 1, 3)[0], written(plain, 1, 3)[0], **CLOSE[torch.float32])
    assert counted[-3:] == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("texts", [1, 2])
def test_a_pruned_cache_is_read_in_one_call_too(texts, dtype, counted):
    plain, fast = language_model("Qwen2", dtype, head_dim=8)
    ids = torch.randint(1, 50, (texts, 150), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for given in ({}, {"attention_mask": mask}):
        found = []
        for model in (plain, fast):
            cache = transformers.DynamicCache(config=model.config)
            with sparse_cache(model, 0.5), torch.no_grad():
                model(ids[:, :70], past_key_values=cache, **{name: m[:, :70] for name, m in given.items()})
                for at in range(70, 150):
                    now = {name: m[:, : at + 1] for name, m in given.items()}
                    found.append(model(ids[:, at : at + 1], past_key_values=cache, **now).logits)
                found.append([(layer.past.tokens, layer.past.behind, layer.past.nbytes) for layer in cache.layers])
        one, ours = found[:81], found[81:]
        torch.testing.assert_close(torch.cat(ours[:80]), torch.cat(one[:80]), **CLOSE[dtype])
        assert [each[:2] for each in ours[80]] == [each[:2] for each in one[80]] == [(150, 96)] * 2
        assert counted == [True] * 80
        counted.clear()


def test_a_pruned_cache_that_listens_was_cropped_or_is_read_elsewhere(counted):
    plain, fast = language_model()
    ids = torch.randint(1, 50, (1, 80), generator=torch.Generator().manual_seed(3))
    found = []
    for model in (plain, fast):
        with sparse_cache(model, 0.5, keys=OutputAware()), torch.no_grad():
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :70], past_key_values=cache)
            found.append(model(ids[:, 70:71], past_key_values=cache).logits)
        with sparse_cache(model, 0.5), torch.no_grad():
            cache = transformers.DynamicCache(config=model.config)
            model(ids[:, :70], past_key_values=cache)
            for at in (70, 71, 72):
                model(ids[:, at : at + 1], past_key_values=cache)
            cache.crop(-2)
            found.append(model(ids[:, 73:74], past_key_values=cache).logits)
    assert counted == [False, *[True] * 4]
    torch.testing.assert_close(found[2], found[0], **CLOSE[torch.float32])
    torch.testing.assert_close(found[3], found[1], **CLOSE[torch.float32])
    with pytest.raises(ModelError, match="sees the newest tokens alone"), torch.no_grad():
        fast(ids[:, 74:75], past_key_values=cache)


def test_another_attention_is_the_one_that_computes(counted):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    plain, fast = language_model()

    def half(module, query, key, value, mask, **named):
        found, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **named)
        return found / 2, weights

    ALL_ATTENTION_FUNCTIONS.register("half", half)
    for model in (plain, fast):
        model.config._attn_implementation = "half"
    ids = torch.tensor([[5]])
    with torch.no_grad():
        torch.testing.assert_close(fast(ids).logits, plain(ids).logits)
    assert not any(counted)


def test_a_window_that_slides_is_not_one_that_only_grows(counted):
    plain, fast = language_model("Mistral", sliding_window=4)
    torch.testing.assert_close(written(fast, 1, 6)[0], written(plain, 1, 6)[0], **CLOSE[torch.float32])
    assert not any(counted)


def test_what_else_is_asked_for_is_given(counted):
    plain, fast = language_model(implementation="eager")
    ids = torch.tensor([[5]])
    with torch.no_grad():
        one, ours = (m(ids, output_hidden_states=True, output_attentions=True) for m in (plain, fast))
    assert len(ours.hidden_states) == len(one.hidden_states) == 3
    for mine, other in zip((*ours.hidden_states, *ours.attentions), (*one.hidden_states, *one.attentions), strict=True):
        torch.testing.assert_close(mine, other)
    assert not any(counted)


def test_tensors_that_blocks_are_given_besides(counted):
    plain, fast = language_model()
    ids = torch.tensor([[5]])
    with torch.no_grad():
        for given in ({"cache_position": torch.tensor([0, 1])}, {"cu_seq_lens_q": torch.tensor([0, 1])}):
            torch.testing.assert_close(fast(ids, **given).logits, plain(ids, **given).logits)
    assert counted == [True]


def test_hooks_of_a_block_are_called(counted):
    _, fast = language_model()
    called = []
    handle = decoder_of(fast).blocks[1].mlp.register_forward_hook(lambda *_: called.append(1))
    written(fast, 1, 3)
    assert len(called) == 4
    assert not any(counted)
    handle.remove()
    written(fast, 1, 3)
    assert (len(called), counted) == (4, [True] * 3)


def test_a_layer_that_was_exchanged_is_the_one_that_computes(counted):
    plain, fast = language_model()
    written(fast, 1, 2)
    for model in (plain, fast):
        block = model.model.layers[1] if model is plain else decoder_of(model).blocks[1]
        block.self_attn.o_proj = nn.Linear(48, 48, bias=False)
        nn.init.constant_(block.self_attn.o_proj.weight.requires_grad_(False), 0.1)
    counted.clear()
    torch.testing.assert_close(written(fast, 1, 2)[0], written(plain, 1, 2)[0], **CLOSE[torch.float32])
    assert not any(counted)


def test_norms_and_layers_that_change_are_seen(counted):
    plain, fast = language_model()
    written(fast, 1, 2)
    norm = decoder_of(fast).blocks[0].input_layernorm
    with torch.no_grad():
        norm.weight.mul_(2)  # shared with the other
    torch.testing.assert_close(written(fast, 1, 2)[0], written(plain, 1, 2)[0], **CLOSE[torch.float32])
    norm.weight = nn.Parameter(torch.ones(48), requires_grad=False)
    plain.model.layers[0].input_layernorm.weight = norm.weight
    torch.testing.assert_close(written(fast, 1, 2)[0], written(plain, 1, 2)[0], **CLOSE[torch.float32])
    assert all(counted)
    with torch.no_grad():
        decoder_of(fast).blocks[0].mlp.layers[1].values.mul_(2)
    with pytest.raises(FormatError, match="changed after packing"):
        written(fast, 1, 1)


def test_a_gradient_flows_through_the_blocks(counted):
    _, fast = language_model()
    x = fast.model.embed_tokens(torch.tensor([[5]])).requires_grad_()
    fast(inputs_embeds=x).logits.sum().backward()
    assert x.grad.abs().sum() > 0
    norm = decoder_of(fast).blocks[0].input_layernorm
    norm.weight.requires_grad_(True)
    fast(torch.tensor([[5]])).logits.sum().backward()
    assert norm.weight.grad.abs().sum() > 0
    assert not any(counted)


def test_several_threads_write_at_once():
    _, fast = language_model(dtype=torch.bfloat16)
    wanted, wrong = written(fast, 1, 8)[0], []

    def write():
        wrong.extend(1 for _ in range(5) if not torch.equal(written(fast, 1, 8)[0], wanted))

    workers = [threading.Thread(target=write) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_a_copy_is_its_own_and_a_compiled_one_the_same():
    plain, fast = language_model()
    wanted = written(plain, 1, 3)[0]
    written(fast, 1, 1)
    twin = copy.deepcopy(fast)
    del fast
    gc.collect()
    torch.testing.assert_close(written(twin, 1, 3)[0], wanted, **CLOSE[torch.float32])
    ids = torch.tensor([[5]])
    with torch.no_grad():
        one = torch.compile(twin, backend="aot_eager")(ids, use_cache=False).logits
        torch.testing.assert_close(one, plain(ids, use_cache=False).logits)


def test_blocks_that_are_not_known_or_not_all_packed_stay():
    plain, _ = language_model()
    plain.model.layers[1].self_attn.q_proj = nn.Linear(48, 48, bias=False)
    assert decoding(plain) is plain
    plain, _ = language_model()

    class Other(type(plain.model.layers[0])):
        """A block that may do anything."""

    plain.model.layers[0].__class__ = Other
    assert decoding(plain) is plain
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    assert decoding(gpt2) is gpt2


def test_what_runs_in_one_call_does_so_once():
    _, fast = language_model()
    assert decoding(fast) is fast


def test_accelerate_makes_one_of_the_blocks(monkeypatch):
    from secateur.outcome import Timing

    module = sys.modules[accelerate.__module__]
    monkeypatch.setattr(module, "_medians", lambda turns, _: [1.0 + i for i, turn in enumerate(turns) for _ in turn])
    monkeypatch.setattr(module, "time_pair", lambda *_: [Timing(ms, 0.0, 20, 1, 1, "bfloat16") for ms in (2.0, 1.0)])
    dense, _ = language_model(dtype=torch.bfloat16, pack=False)
    example = {"input_ids": torch.tensor([[5]])}
    found = accelerate(dense, example, formats=(Bitmap(),))
    assert len(decoder_of(found.model).blocks) == 2
    assert found.error < 1e-2
    monkeypatch.setattr(Decoder, "agrees", lambda _: False)
    found = accelerate(dense, example, formats=(Bitmap(),))
    assert not any(isinstance(module, Decoder) for module in found.model.modules())


def test_what_does_not_agree_is_found():
    _, fast = language_model(dtype=torch.bfloat16)
    decoder = decoder_of(fast)
    assert decoder.agrees()
    decoder.blocks[1].self_attn.forward = lambda hidden_states, **_: (hidden_states, None)  # as another version may
    assert not decoder.agrees()


def test_the_copy_reads_its_own_configuration():
    plain, fast = language_model()
    assert decoder_of(fast).blocks[0].self_attn.config is fast.config
    assert fast.config is not plain.config
    assert all(mine is other for mine, other in zip(fast.parameters(), plain.parameters(), strict=True))
