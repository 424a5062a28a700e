"""The walk: blocks in order, the inputs that really reach them, no code per architecture."""

import pytest
import tiny
import torch
import transformers as hf
from torch import nn

from secateur.axes import PerRow, Rank, Wanda
from secateur.axes.sweep import sweep
from secateur.cut import weights
from secateur.edit import Mask, apply_
from secateur.errors import ResumeError, SettingError
from secateur.evidence import observe
from secateur.task import Batch
from secateur.walk import journal, look, stacks, walk, watching

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64)
GQA = dict(SMALL, num_key_value_heads=2)
TEXT = dict(max_position_embeddings=64)

FAMILIES = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**GQA, **TEXT)),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**GQA, **TEXT, sliding_window=4)),
    "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**GQA, **TEXT)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**GQA, **TEXT, head_dim=8)),
    "gpt2": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=64, vocab_size=64)),
    "opt": lambda: hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32, ffn_dim=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=64,
            word_embed_proj_dim=32, max_position_embeddings=64, pad_token_id=1,
        )
    ),
    "phi": lambda: hf.PhiForCausalLM(hf.PhiConfig(**SMALL, **TEXT)),
    "gemma": lambda: hf.GemmaForCausalLM(hf.GemmaConfig(**GQA, **TEXT, head_dim=8)),
    "gemma2": lambda: hf.Gemma2ForCausalLM(hf.Gemma2Config(**GQA, **TEXT, head_dim=8, sliding_window=4)),
    "gpt_neox": lambda: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **TEXT)),
    "bert": lambda: hf.BertModel(hf.BertConfig(**SMALL, **TEXT)),
    "t5": lambda: hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=3, num_heads=4, vocab_size=64)
    ),
    "vit": lambda: hf.ViTForImageClassification(
        hf.ViTConfig(**{k: v for k, v in SMALL.items() if k != "vocab_size"}, image_size=16, patch_size=4)
    ),
    "mixtral": lambda: hf.MixtralForCausalLM(
        hf.MixtralConfig(**GQA, **TEXT, num_local_experts=4, num_experts_per_tok=2)
    ),
    "bloom": lambda: hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=3, n_head=4, vocab_size=64)),
}  # fmt: skip


def batches_for(name: str, n: int = 3) -> list[Batch]:
    draw = torch.Generator().manual_seed(0)
    if name == "vit":
        return [Batch((torch.randn(2, 3, 16, 16, generator=draw),)) for _ in range(n)]
    ids = [torch.randint(0, 64, (2, 12), generator=draw) for _ in range(n)]
    if name == "t5":
        return [Batch({"input_ids": i, "decoder_input_ids": i.flip(1)}) for i in ids]
    return [Batch({"input_ids": i}) for i in ids]


def make(name: str) -> nn.Module:
    return tiny.seeded(FAMILIES[name], 0)


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_every_family_is_walked_with_the_activations_it_really_has(name: str) -> None:
    model, batches = make(name), batches_for(name)
    sites = weights(model)
    plain = observe(model, sites, batches, {"input_square"})
    met, found = [], {}
    for block in walk(model, batches):
        here = block.pick(sites)
        found.update(block.observe(here, {"input_square"}))
        met += [site.name for site in here]
        if block.name:
            assert len(block.inputs) == len(batches)
    assert sorted(met) == sorted(site.name for site in sites)  # each site in exactly one block
    assert any(site.block for site in sites)
    for site in sites:
        assert found[site.name].count == plain[site.name].count > 0, site.name
        torch.testing.assert_close(
            found[site.name].sums["input_square"], plain[site.name].sums["input_square"], rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("name", ["llama", "t5", "gemma2", "mixtral"])
def test_a_pruned_walk_feeds_what_the_pruned_blocks_put_out(name: str) -> None:
    """After the walk, the inputs every site was judged on are those of the finished model."""
    model, batches = make(name), batches_for(name)
    sites, seen = weights(model), {}
    for block in walk(model, batches):
        here = block.pick(sites)
        for site in here:
            keep = torch.ones(site.shape, dtype=torch.bool)
            keep[:, ::2] = False
            apply_(model, Mask(site, keep))
        seen.update(block.observe(here, {"input"}))
    after = observe(model, sites, batches, {"input"})
    for site in sites:
        torch.testing.assert_close(seen[site.name].sums["input"], after[site.name].sums["input"], rtol=1e-4, atol=1e-4)


def test_a_dense_walk_feeds_what_the_dense_blocks_put_out() -> None:
    model, batches = make("llama"), batches_for("llama")
    sites = weights(model)
    dense, seen = observe(model, sites, batches, {"input"}), {}
    for block in walk(model, batches, feed="dense"):
        here = block.pick(sites)
        seen.update(block.observe(here, {"input"}))
        for site in here:
            apply_(model, Mask(site, torch.zeros(site.shape, dtype=torch.bool)))
    for site in sites:
        torch.testing.assert_close(seen[site.name].sums["input"], dense[site.name].sums["input"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "t5", "bloom"])
def test_a_block_that_is_looked_at_once_runs_once_and_what_comes_is_the_same(name: str) -> None:
    model, batches = make(name), batches_for(name)
    counts: dict[str, int] = {}
    with torch.no_grad():
        wanted = {b.name: [*b.inputs, *b.outputs()] for b in walk(model, batches) if b.name}
    for block in wanted:
        model.get_submodule(block).register_forward_hook(
            lambda *_, name=block: counts.update({name: counts.get(name, 0) + 1})
        )
    last = {stack[-1] for stack in stacks(model)}
    seen = set()
    for block in look(model, batches):
        if not block.name:
            continue
        before = counts.get(block.name, 0)
        given = [*block.inputs, *block.outputs()]
        again = list(block.outputs())
        assert counts[block.name] == before + len(batches)
        assert all(torch.equal(a, b) for a, b in zip(given, wanted[block.name], strict=True))
        assert all(torch.equal(a, b) for a, b in zip(again, given[len(batches) :], strict=True))
        seen.add(block.name)
    assert seen == set(wanted)
    if len(stacks(model)) == 1:  # where there are two the first runs again for what the second is given
        # Once more for one example, to see the order of blocks. The last one is also run on by the model itself.
        assert all(counts[name] == 1 + len(batches) for name in seen - last), counts


def test_watch_gives_what_flows_into_a_module() -> None:
    model, batches = make("llama"), batches_for("llama")
    caught = []
    hook = model.model.layers[1].mlp.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            batch.through(model)
    hook.remove()
    for block in walk(model, batches):
        if block.name == "model.layers.1":
            for found, real in zip(block.watch("model.layers.1.mlp"), caught, strict=True):
                torch.testing.assert_close(found, real)


def test_experts_of_a_stacked_tensor_each_see_their_own_tokens() -> None:
    model, batches = make("mixtral"), batches_for("mixtral")
    sites = [s for s in weights(model) if "gate_up_proj" in s.name and s.block == "model.layers.0"]
    seen = observe(model, sites, batches, {"input_square"})
    assert len(sites) == 4
    assert sum(seen[s.name].count for s in sites) == 2 * 3 * 2 * 12  # top-2 of every token of three batches


def test_the_model_is_left_as_it_was() -> None:
    model = make("llama").train()
    model.config.use_cache = True
    before = {k: v.clone() for k, v in model.state_dict().items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    for block in walk(model, batches_for("llama")):
        block.observe(block.pick(weights(model)), {"gram"})
        assert torch.is_grad_enabled()  # a method may train between the blocks
    assert model.training
    assert model.config.use_cache is True
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_wrong_feed_is_refused() -> None:
    with pytest.raises(SettingError, match="pruned, dense or repaired"):
        next(iter(walk(make("llama"), batches_for("llama"), feed="wet")))


def test_stacks_are_found_and_bare_layers_are_not() -> None:
    assert stacks(make("t5")) == [[f"encoder.block.{i}" for i in range(3)], [f"decoder.block.{i}" for i in range(3)]]
    assert stacks(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))) == []


class Killed(Exception):
    pass


def run(model: nn.Module, folder: object, die_at: int | None = None) -> list[object]:
    def watch(progress: object) -> None:
        if progress.index == die_at:
            raise Killed

    sites = weights(model)
    solver = Rank(Wanda(), PerRow())
    with journal(folder, "a run"), watching(watch):
        return sweep(model, sites, solver, {s.name: s.units // 2 for s in sites}, batches_for("llama"))


def test_a_run_cut_off_at_any_block_ends_as_if_it_had_not_been(tmp_path) -> None:
    whole = make("llama")
    run(whole, tmp_path / "whole")
    for die_at in range(3):
        folder = tmp_path / f"cut{die_at}"
        with pytest.raises(Killed):
            run(make("llama"), folder, die_at)
        again = make("llama")
        edits = run(again, folder)
        assert len(edits) == len(weights(again))  # replayed ones are in the record too
        assert all(
            torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True)
        )


def test_a_journal_of_another_run_is_refused(tmp_path) -> None:
    with journal(tmp_path / "j", "one"):
        pass
    with (
        pytest.raises(ResumeError, match="another model, other data or other settings"),
        journal(tmp_path / "j", "two"),
    ):
        pass
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("x")
    with pytest.raises(ResumeError, match="other files"), journal(tmp_path / "full", "one"):
        pass
