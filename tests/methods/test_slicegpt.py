"""SliceGPT: the function kept, then the loudest directions of the stream."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import decoder, make_model, make_task, seeded, toy_text, trained
from torch import nn

from secateur.edit import Remove, Rotate
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.method import Chain, prune, tiny
from secateur.methods.pat import Pat
from secateur.methods.slicegpt import (
    PcaGlobal,
    PcaPerBlock,
    RandomBasis,
    RawChannels,
    SliceGPT,
    Sorted,
    principal_axes,
    random_rotation,
)
from secateur.methods.sparsegpt import SparseGPT
from secateur.plan import plan
from secateur.stream import few, follow, fuse
from secateur.task import Batch

IDS = torch.randint(0, 64, (3, 14), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def sliced(sparsity: float = 0.25, model: nn.Module | None = None, **changes: object):
    given = trained("decoder") if model is None else model
    return prune(given, tiny(SliceGPT, sparsity=sparsity, **changes), make_task("decoder"))


def quality(model: nn.Module) -> float:
    return make_task("decoder").measure(model)["perplexity"]


def test_principal_axes_by_hand() -> None:
    # x is (1, 1) three times and (1, -1) once: moments [[4, 2], [2, 4]], loudest along the diagonal
    moments = torch.tensor([[4.0, 2.0], [2.0, 4.0]], dtype=torch.float64)
    axes = principal_axes(moments, damp=0.01)
    half = 0.5**0.5
    torch.testing.assert_close(axes.abs(), torch.full((2, 2), half, dtype=torch.float64))
    assert float(axes[0, 0] * axes[1, 0]) > 0 > float(axes[0, 1] * axes[1, 1])
    raw = RawChannels().axes(torch.diag(torch.tensor([1.0, 3.0, 2.0]).double()), torch.Generator())
    assert raw.argmax(0).tolist() == [1, 2, 0]


def test_a_random_rotation_is_one_and_is_drawn_from_its_generator() -> None:
    first = random_rotation(5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(first @ first.T, torch.eye(5, dtype=torch.float64))
    assert torch.equal(first, random_rotation(5, torch.Generator().manual_seed(0)))
    assert not torch.equal(first, random_rotation(5, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("basis", [PcaPerBlock(), PcaGlobal(), RawChannels(), RandomBasis()])
def test_at_full_width_the_logits_are_the_dense_ones(basis) -> None:
    model = trained("decoder")
    done = sliced(0.0, model, basis=basis)
    assert float((logits(done.model) - logits(model)).abs().max()) < 1e-4
    assert quality(done.model) == pytest.approx(quality(model), rel=1e-5)


def projected(model: nn.Module, bases: list[torch.Tensor]) -> torch.Tensor:
    """The dense model, its stream projected on the kept directions after each addition: an independent reference."""
    handles, at = [], {}
    spans = [(b @ b.T).float() for b in bases]

    def keep(norm: nn.Module, key: int) -> None:
        handles.append(norm.register_forward_pre_hook(lambda _, args: at.update({key: args[0]})))

    def project(module: nn.Module, number: int) -> None:
        def hook(_, args, out):
            x = at[number]
            return (x + out) @ spans[number] - x  # the model adds x

        handles.append(module.register_forward_hook(hook))

    handles.append(model.model.embed_tokens.register_forward_hook(lambda _, args, out: out @ spans[0]))
    for place, layer in enumerate(model.model.layers):
        keep(layer.input_layernorm, 2 * place + 1)
        keep(layer.post_attention_layernorm, 2 * place + 2)
        project(layer.self_attn.o_proj, 2 * place + 1)
        if 2 * place + 2 < len(spans):
            project(layer.mlp.down_proj, 2 * place + 2)
    found = logits(model)
    for handle in handles:
        handle.remove()
    return found


def test_it_equals_the_dense_model_with_its_stream_projected() -> None:
    model = trained("decoder")
    done = sliced(0.25, model)
    bases = [edit.matrix[:, :24] for edit in done.edits if isinstance(edit, Rotate)]
    assert len(bases) == 4  # the last of five segments is not sliced
    assert not torch.equal(logits(model), logits(done.model))
    torch.testing.assert_close(logits(done.model), projected(model, bases), atol=1e-4, rtol=0)


def test_a_segment_is_measured_after_those_before_it_were_sliced() -> None:
    model, task = trained("decoder"), make_task("decoder")
    done = prune(model, tiny(SliceGPT, sparsity=0.5, orientation=Sorted()), task)
    bases = [edit.matrix[:, :16] for edit in done.edits if isinstance(edit, Rotate)]
    # the stream before the second norm, in the dense model with only the embeddings projected
    seen = []
    span = (bases[0] @ bases[0].T).float()
    probe = copy.deepcopy(model)
    probe.model.embed_tokens.register_forward_hook(lambda _, args, out: out @ span)
    probe.model.layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        for batch in task.batches("calibration", 16):
            batch.through(probe)
    rows = torch.cat([x.reshape(-1, 32) for x in seen]).double()
    axes = principal_axes(rows.T @ rows, damp=0.01)[:, :16]
    torch.testing.assert_close(bases[1] @ bases[1].T, axes @ axes.T, atol=1e-4, rtol=0)


def test_principal_axes_beat_deleting_channels() -> None:
    model = trained("decoder")
    dense = quality(model)
    found = {
        type(basis): quality(sliced(0.25, model, basis=basis).model)
        for basis in (PcaPerBlock(), PcaGlobal(), RawChannels(), RandomBasis())
    }
    assert dense < found[PcaPerBlock] < found[PcaGlobal] < found[RawChannels]
    assert found[PcaPerBlock] < 1.3 * dense
    assert found[RawChannels] > 1.5 * found[PcaPerBlock]
    assert found[RandomBasis] > 1.5 * found[PcaPerBlock]


def test_every_tensor_that_touches_the_stream_is_smaller() -> None:
    done = sliced(0.25)
    shapes = {name: tuple(value.shape) for name, value in done.model.named_parameters()}
    assert shapes == {
        "model.embed_tokens.weight": (64, 24),
        **{
            f"model.layers.{i}.{name}": shape
            for i, last in ((0, 24), (1, 32))
            for name, shape in (
                ("self_attn.q_proj.weight", (32, 24)),
                ("self_attn.k_proj.weight", (16, 24)),
                ("self_attn.v_proj.weight", (16, 24)),
                ("self_attn.o_proj.weight", (24, 32)),
                ("self_attn.o_proj.shortcut", (24, 24)),
                ("mlp.gate_proj.weight", (64, 24)),
                ("mlp.up_proj.weight", (64, 24)),
                ("mlp.down_proj.weight", (last, 64)),
                ("mlp.down_proj.shortcut", (last, 24)),
            )
        },
        "lm_head.weight": (64, 32),
    }


def test_the_head_is_sliced_when_asked() -> None:
    done = sliced(0.25, slice_head=True)
    assert tuple(done.model.lm_head.weight.shape) == (64, 24)
    assert tuple(done.model.model.layers[1].mlp.down_proj.shortcut.shape) == (24, 24)


def test_one_basis_for_all_needs_no_shortcut_but_the_last() -> None:
    done = sliced(0.25, basis=PcaGlobal())
    assert [n for n, _ in done.model.named_parameters() if "shortcut" in n] == ["model.layers.1.mlp.down_proj.shortcut"]
    done = sliced(0.25, basis=PcaGlobal(), slice_head=True)
    assert not [n for n, _ in done.model.named_parameters() if "shortcut" in n]


def test_orientation_does_not_change_the_function() -> None:
    first, second = sliced(0.25), sliced(0.25, orientation=Sorted())
    assert not torch.equal(first.model.lm_head.weight, first.model.model.embed_tokens.weight)
    assert not torch.allclose(first.model.model.embed_tokens.weight, second.model.model.embed_tokens.weight)
    torch.testing.assert_close(logits(first.model), logits(second.model), atol=1e-4, rtol=0)


def test_it_reports_the_width_it_reached_and_what_became_of_the_parameters() -> None:
    done = sliced(0.3)  # floor(0.7 * 32) = 22, and 16 is the multiple of 8 below
    after = sum(p.numel() for p in done.model.parameters())
    assert done.notes[0] == (
        "residual width 32 -> 16: 0.5 of it removed, 0.3 asked for; "
        f"parameters 20,640 -> {after:,} ({after / 20640 - 1:+.1%})"
    )
    assert all(edit.site.kind == "stream" for edit in done.edits if isinstance(edit, Remove))
    assert SliceGPT(sparsity=0.25).width(576) == 432
    assert SliceGPT(sparsity=0.2).width(576) == 456
    assert SliceGPT(sparsity=0.3, round_to=1).width(10) == 7
    assert SliceGPT(sparsity=0.0).width(30) == 30


def test_it_says_when_there_are_fewer_tokens_than_directions() -> None:
    few_tokens = replace(toy_text(), window=8)
    done = prune(trained("decoder"), SliceGPT(sparsity=0.25, samples=2), few_tokens)
    assert done.notes[1] == "16 calibration tokens cannot tell 32 directions apart: some were kept by chance"
    assert len(sliced().notes) == 1


def test_padding_is_left_out_of_the_moments() -> None:
    class Padded:
        """The toy task in batches with eight tokens of padding, of a content that must not matter."""

        def __init__(self, fill: int) -> None:
            self.inner, self.fill = toy_text(), fill

        def __getattr__(self, name: str):
            return getattr(self.inner, name)

        def batches(self, split: str, n: int | None = None, epoch: int = 0):
            for batch in self.inner.batches(split, n, epoch):
                (ids,) = batch.inputs
                mask = torch.cat([torch.ones_like(ids), torch.zeros(len(ids), 8, dtype=torch.int64)], 1)
                yield Batch({"input_ids": nn.functional.pad(ids, (0, 8), value=self.fill), "attention_mask": mask})

    plain = sliced(0.5).edits
    for fill in (3, 7):
        padded = prune(trained("decoder"), tiny(SliceGPT, sparsity=0.5), Padded(fill)).edits
        for mine, theirs in zip(plain, padded, strict=True):
            if isinstance(mine, Rotate):
                torch.testing.assert_close(mine.matrix, theirs.matrix, atol=1e-4, rtol=0)


def test_it_generates_and_half_precision_works() -> None:
    done = sliced(0.25)
    done.model.generation_config.eos_token_id = None
    given = {"max_new_tokens": 8, "do_sample": False, "attention_mask": torch.ones(3, 5, dtype=torch.int64)}
    out = done.model.generate(IDS[:, :5], pad_token_id=0, use_cache=True, **given)
    assert torch.equal(out, done.model.generate(IDS[:, :5], pad_token_id=0, use_cache=False, **given))
    half = sliced(0.25, trained("decoder").bfloat16())
    assert half.model.lm_head.weight.dtype == torch.bfloat16
    assert quality(half.model) < 1.1 * quality(done.model)


def test_a_model_that_reshapes_to_its_first_width_has_its_head_sliced() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=1)
    done = sliced(0.25, seeded(lambda: GPT2LMHeadModel(config).float(), 0))
    assert done.notes[1] == "the output layer was sliced too: the model reshapes what it reads to its first width"
    assert tuple(done.model.lm_head.weight.shape) == (64, 24)
    assert logits(done.model).shape == (3, 14, 64)


def test_a_run_that_was_cut_off_is_taken_up_and_ends_the_same(tmp_path) -> None:
    method, task = tiny(SliceGPT, sparsity=0.25), make_task("decoder")
    whole = prune(trained("decoder"), method, task, resume=tmp_path)
    again = prune(trained("decoder"), method, task, resume=tmp_path)
    assert torch.equal(logits(whole.model), logits(again.model))
    assert [e.describe() for e in whole.edits] == [e.describe() for e in again.edits]


def test_a_saved_model_opens_as_it_was(tmp_path) -> None:
    from secateur.models import load, save

    model = trained("decoder")
    done = sliced(0.25, model)
    save(done, model, tmp_path / "saved")
    assert torch.equal(logits(load(tmp_path / "saved")), logits(done.model))


def test_another_method_can_follow_it() -> None:
    model, task = trained("decoder"), make_task("decoder")
    done = prune(model, Chain((tiny(SliceGPT), tiny(SparseGPT, sparsity=0.1))), task)
    assert "model.layers.0.self_attn.o_proj.shortcut" in {row.site for row in done.record.sites}
    assert quality(done.model) < 1.5 * quality(sliced().model)
    with pytest.raises(GraphError, match="what is added to it after addition 0"):
        prune(model, Chain((tiny(SliceGPT), tiny(SliceGPT))), task)


def test_it_compiles_into_one_graph() -> None:
    model = sliced(0.25).model
    graph = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(graph), logits(model))


def test_it_refuses_settings_and_models_it_cannot_serve() -> None:
    with pytest.raises(BudgetError, match=r"sparsity of 0.9 of a residual width of 32.*no multiple of 8") as caught:
        sliced(0.9)
    assert "0.75 at most" in caught.value.do
    with pytest.raises(SettingError, match="round_to=0"):
        sliced(round_to=0)
    with pytest.raises(SettingError, match="Did you mean 0.25"):
        sliced(25)
    with pytest.raises(GraphError, match="post-norm"):
        prune(make_model("encoder"), tiny(SliceGPT), make_task("encoder"))


def test_it_refuses_a_model_that_does_something_unseen() -> None:
    model = decoder(tie_word_embeddings=False)
    model.model.layers[0].input_layernorm.weight.data.mul_(3)
    plain, query = model.lm_head.forward, model.model.layers[0].self_attn.q_proj
    model.lm_head.forward = lambda x: plain(x) * query.weight.abs().mean()  # a weight that fusing changes
    with pytest.raises(GraphError, match=r"its answers changed by 2 of their size"):
        prune(model, tiny(SliceGPT), make_task("decoder"), inplace=True)


def test_fusing_twice_changes_nothing_more() -> None:
    model = trained("decoder")
    for edit in fuse(model, follow(model, few(Batch((IDS,))))):
        edit.apply_(model)
    before = logits(model)
    for edit in fuse(model, follow(model, few(Batch((IDS,))))):
        edit.apply_(model)
    torch.testing.assert_close(logits(model), before)


def test_nothing_is_drawn_from_the_callers_generator() -> None:
    model, task = trained("decoder"), make_task("decoder")
    before = torch.get_rng_state()
    prune(model, SliceGPT(sparsity=0.25, samples=8, round_to=1), task)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", [SliceGPT(sparsity=0.3, samples=8, round_to=4), Pat(sparsity=0.3, round_to=4)])
def test_a_plan_rounds_the_width_as_the_run_does(method: SliceGPT | Pat) -> None:
    found = plan(method, trained("decoder"), make_task("decoder"), priced=False)
    assert [row.keep for row in found.rows] == [20]  # of 32; the nearest multiple of 4 would be 24
    assert found.reachable == pytest.approx(12 / 32)
