"""PERP: zeros stay through training and merging, a small part recovers nearly everything, blocks come nearer."""

import copy
from functools import cache

import pytest
import torch
from tiny import make_task, toy_text, trained
from torch import nn

from secateur import adapters
from secateur.axes import NM
from secateur.axes.recalibration import recalibrate_
from secateur.axes.recovery import Reconstruct, beside, kept_weights
from secateur.axes.subsets import (
    Biases,
    Embeddings,
    Everything,
    Head,
    Lora,
    LoraPrune,
    MaskLora,
    Norms,
    ScaleLora,
    Statistics,
)
from secateur.cut import weights
from secateur.edit import Mask, Update, apply_, load, save
from secateur.errors import BudgetError, ModelError, SettingError, SiteError, TaskError
from secateur.method import Chain, prune
from secateur.methods.magnitude import Magnitude
from secateur.methods.perp import Perp
from secateur.methods.slicegpt import SliceGPT
from secateur.methods.wanda import Wanda
from secateur.models.resnet import CifarResNet
from secateur.recipe import build, method_of, text_of_method
from secateur.task import Batch

WANDA = Wanda(sparsity=0.6, samples=16)


@cache
def pruned(family="decoder"):
    return prune(trained(family), WANDA, make_task(family))


def recovered(method, family="decoder"):
    return method.run(copy.deepcopy(pruned(family).model), make_task(family))


def nll(model):
    return make_task("decoder").measure(model)["nll"]


@cache
def nll_after(*subsets):
    return nll(recovered(Perp(subsets=subsets, steps=100, rate=5e-3)).model)


def test_a_small_part_recovers_nearly_what_everything_does():
    """Of what full retraining wins back, norms alone (0.78 %) win a fifth and rank 4 with them over two thirds."""
    start, full = nll(pruned().model), nll_after(Everything())
    won = start - full
    assert won > 0.4
    assert start - nll(recovered(Perp(subsets=(Norms(),), steps=100, rate=2e-2)).model) > 0.2 * won
    assert start - nll_after(Norms(), MaskLora(rank=4)) > 0.67 * won


def test_what_is_cut_off_when_merged_is_lost():
    mask = nll_after(Norms(), MaskLora(rank=4))
    assert nll_after(Norms(), LoraPrune(rank=4)) > mask + 0.05
    assert nll_after(Norms(), ScaleLora(rank=4)) > mask + 0.05


def test_the_share_trained_is_counted_and_noted():
    method = Perp(subsets=(Norms(),), steps=2)
    done = recovered(method)
    changed = {e.name for e in done.edits if isinstance(e, Update)}
    count = sum(p.numel() for n, p in done.model.named_parameters() if n in changed)
    total = sum(p.numel() for p in done.model.parameters())
    assert count == 5 * 32  # two norms in each of two blocks, and the last
    assert count < 0.01 * total
    assert done.notes[0] == "160 parameters were trained, 0.78% of the model's 20,640: Norms 160"
    rank_2 = recovered(Perp(subsets=(Biases(), MaskLora(rank=2)), steps=1)).notes[0]
    # q and o [32, 32], k and v [16, 32], gate and up [64, 32], down [32, 64]
    assert rank_2.startswith(f"{2 * 2 * (2 * 64 + 2 * 48 + 3 * 96):,} parameters")
    assert "Biases 0, MaskLora 2,048" in rank_2


@pytest.mark.parametrize("family", ["decoder", "cnn", "rnn", "moe", "mlp"])
@pytest.mark.parametrize("subset", [MaskLora(rank=3), LoraPrune(rank=3), ScaleLora(rank=3), Everything()])
def test_zeros_stay_through_momentum_decay_and_merging(family, subset, tmp_path):
    model = trained(family)
    first = Magnitude(sparsity=0.5).run(model, make_task(family))
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    start = copy.deepcopy(model)
    done = Perp(subsets=(Norms(), subset), steps=5, rate=1e-2, decay=0.1).run(model, make_task(family))
    for name, value in done.model.named_parameters():
        if name in zeros:
            assert bool((value[zeros[name]] == 0).all()), name
    now, then = dict(done.model.named_parameters()), dict(start.named_parameters())
    assert not any(torch.equal(e.site.parts[0].read(now), e.site.parts[0].read(then)) for e in first.edits)
    assert not any(hasattr(m, "parametrizations") for m in done.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in done.model.modules())
    assert all(p.requires_grad for p in done.model.parameters())
    save(done.edits, tmp_path / "edits.safetensors")
    apply_(start, load(tmp_path / "edits.safetensors"))
    assert all(torch.equal(v, start.state_dict()[k]) for k, v in done.model.state_dict().items())


def test_only_what_was_chosen_moves():
    before = {n: p.clone() for n, p in pruned().model.named_parameters()}
    done = recovered(Perp(subsets=(Norms(),), steps=3, rate=1e-2, decay=0.1))
    for name, value in done.model.named_parameters():
        assert torch.equal(value, before[name]) == ("norm" not in name), name


def test_groups_of_two_in_four_stay():
    done = prune(trained("decoder"), Chain((Wanda(pattern=NM(2, 4), samples=8), Perp(steps=5))), make_task("decoder"))
    for site in weights(done.model):
        value = site.parts[0].read(dict(done.model.named_parameters()))
        assert bool(((value.reshape(-1, 4) == 0).sum(1) == 2).all()), site.name
    assert done.ledger.sparsity == 0.5


def test_masks_by_hand():
    """A matrix keeps its zeros, a bias only those of a dead unit; edits know which zero was a kept weight."""
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    model[0].weight.data = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 5.0]])
    model[0].bias.data = torch.tensor([0.0, 0.0, 1.0])
    model[1].weight.data = torch.tensor([1.0, 0.0, 0.0])
    model[1].bias.data = torch.tensor([0.0, 0.0, 1.0])
    keep = kept_weights(model)
    assert keep["0.weight"].tolist() == [[True, False], [False, False], [False, True]]
    assert keep["0.bias"].tolist() == [True, False, True]
    assert keep["1.weight"].tolist() == [True, False, True]
    (site,) = (s for s in weights(model) if s.name == "0.weight")
    mask = Mask(site, torch.tensor([[True, True], [False, False], [False, True]]))
    tied = trained("decoder")
    tied.lm_head.weight.data[3, 4] = 0
    assert list(kept_weights(tied)) == ["model.embed_tokens.weight"]  # one tensor, counted once
    assert kept_weights(model, [mask])["0.weight"].tolist() == [[True, True], [False, False], [False, True]]


def test_edits_beside_a_model_let_a_kept_zero_be_trained():
    model = trained("mlp")
    (site, *_) = weights(model)
    keep = torch.ones(site.shape, dtype=torch.bool)
    keep[:, :4] = False
    mask = Mask(site, keep)
    apply_(model, mask)
    model[0].weight.data[0, 5] = 0  # kept, and zero by chance
    with beside(edits=[mask]):
        done = Perp(subsets=(MaskLora(),), steps=5, rate=1e-2).run(copy.deepcopy(model), make_task("mlp"))
    assert done.model[0].weight[0, 5] != 0
    assert bool((done.model[0].weight[:, :4] == 0).all())
    assert not any(isinstance(e, Mask) for e in done.edits)  # it removed nothing
    alone = Perp(subsets=(MaskLora(),), steps=5, rate=1e-2).run(model, make_task("mlp"))
    assert alone.model[0].weight[0, 5] == 0


def test_a_method_before_it_gives_its_masks_and_its_budget():
    done = prune(trained("decoder"), Perp(after=WANDA, steps=3), make_task("decoder"))
    chained = prune(trained("decoder"), Chain((WANDA, Perp(steps=3))), make_task("decoder"))
    assert Perp(after=WANDA).budget() == WANDA.budget()
    assert done.ledger.sparsity == pytest.approx(0.6, abs=0.02)
    assert all(torch.equal(v, chained.model.state_dict()[k]) for k, v in done.model.state_dict().items())


def test_a_sliced_model_is_recovered_by_ordinary_adapters():
    task = make_task("decoder")
    done = Chain((SliceGPT(sparsity=0.25, samples=16), Perp(subsets=(Norms(), Lora()), steps=5))).run(
        trained("decoder"), task
    )
    assert done.model(task.example.inputs[0]).logits.isfinite().all()
    with pytest.raises(SettingError, match="which merging would fill in"):
        recovered(Perp(subsets=(Lora(),), steps=1))


def test_reconstruction_brings_blocks_nearer_to_dense_ones():
    method = Perp(after=WANDA, by=Reconstruct(samples=16), subsets=(Norms(), MaskLora(rank=4)), steps=40, rate=5e-3)
    done = prune(trained("decoder"), method, make_task("decoder"))
    before = dict(done.history.curves["block error before"])
    after = dict(done.history.curves["block error after"])
    assert before.keys() == {0, 1}
    assert all(after[i] < 0.7 * before[i] for i in before)
    assert nll(done.model) < nll(pruned().model) - 0.1
    norm = next(e for e in done.edits if isinstance(e, Update))
    assert norm.name.startswith("model.layers.0.")
    last = dict(done.model.named_parameters())["model.norm.weight"]
    assert torch.equal(last, dict(trained("decoder").named_parameters())["model.norm.weight"])  # in no block


def test_blocks_are_reconstructed_without_dropout_as_their_targets_are():
    def run(dropout):
        model = trained("encoder")
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = dropout
        method = Perp(after=WANDA, by=Reconstruct(samples=16), subsets=(Norms(), MaskLora(rank=4)), steps=6)
        return prune(model, method, make_task("encoder")).history

    found, same = run(0.5), run(0.0)
    assert found.losses[-1] < found.losses[0]
    assert found.losses == same.losses
    assert found.curves["block error after"] == same.curves["block error after"]


def test_batch_norms_follow_what_reaches_them_while_blocks_are_reconstructed():
    model = CifarResNet(14, width=4, classes=4)
    method = Perp(after=Magnitude(sparsity=0.5), by=Reconstruct(samples=16), subsets=(Norms(),), steps=2)
    done = prune(model, method, make_task("cnn"))
    before = dict(model.named_buffers())
    moved = [n for n, b in done.model.named_buffers() if n.endswith("running_mean") and not torch.equal(b, before[n])]
    assert any(name.startswith("layer1.0.") for name in moved)


def test_a_norm_that_multiplies_by_one_and_its_scale_is_not_gone_where_that_is_zero():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([0.0, 0.5, 0.0]))

        def forward(self, x):
            return x * (1 + self.weight)

    model = nn.Sequential(nn.Linear(3, 3), OnePlus(), nn.RMSNorm(3), nn.LayerNorm(3), nn.BatchNorm2d(3)).train()
    with torch.no_grad():
        for norm in model[2:]:
            norm.weight[1] = 0.0
    keep = kept_weights(model)
    assert sorted(keep) == ["2.weight", "3.bias", "3.weight", "4.bias", "4.weight"]
    assert all(k.tolist() == [True, False, True] for k in keep.values())
    assert all(module.training for module in model.modules())


def test_a_target_is_what_the_dense_block_makes_of_mended_inputs():
    """With nothing pruned the target is what the block puts out: dense inputs elsewhere would show as an error."""
    model, task = trained("decoder"), make_task("decoder")
    dense = copy.deepcopy(model)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(0.5)  # only the first block differs
    with beside(dense=dense):
        done = Perp(by=Reconstruct(samples=8), subsets=(Norms(),), steps=1, rate=1e-9).run(model, task)
    first, second = (value for _, value in done.history.curves["block error before"])
    assert first > 1e-3
    assert second < 1e-10


def test_batch_norms_take_their_statistics_anew_and_the_edits_say_so():
    done = recovered(Perp(subsets=(Biases(), Norms(), Head()), steps=4), "cnn")
    names = {e.name for e in done.edits}
    assert {"bn.running_mean", "bn.running_var", "bn.weight", "bn.bias", "fc.bias", "fc.weight"} <= names
    assert "conv.weight" not in names


def test_statistics_are_a_plain_mean_over_the_batches():
    """Two batches with means 1 and 3, variances 0 and 0 in one channel: mean 2, whatever the old one was."""
    model = nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 1)).eval()
    model[0].running_mean.fill_(7)
    batches = [Batch((torch.full((4, 1), value),)) for value in (1.0, 3.0)]
    edits = recalibrate_(model, batches)
    assert model[0].running_mean.tolist() == [2.0]
    assert model[0].running_var.tolist() == [0.0]
    assert model[0].momentum == 0.1
    assert not model[0].training
    assert [e.name for e in edits] == ["0.running_mean", "0.running_var", "0.num_batches_tracked"]


def test_batch_norms_alone_are_recalibrated_without_training():
    task = make_task("cnn")
    model = trained("cnn")
    Magnitude(sparsity=0.7).run(model, task)
    before = task.measure(model)["accuracy"]
    parameters = [p.clone() for p in model.parameters()]
    done = Perp(subsets=(Statistics(),)).run(model, task)
    assert all(torch.equal(a, b) for a, b in zip(parameters, done.model.parameters(), strict=True))
    assert task.measure(done.model)["accuracy"] > before
    assert done.history.losses == []
    with pytest.raises(SiteError, match="it has none of them"):
        recovered(Perp(subsets=(Statistics(),)))


def test_a_tied_head_is_left_alone_with_a_note_and_embeddings_take_it_along():
    done = recovered(Perp(subsets=(Norms(), Head()), steps=1))
    assert "lm_head.weight is tied to the embedding and was left alone" in done.notes
    both = recovered(Perp(subsets=(Embeddings(),), steps=1))
    assert any("one tensor with lm_head.weight: both change" in note for note in both.notes)


def test_half_precision_is_trained_in_float32():
    model, task = copy.deepcopy(pruned().model).to(torch.bfloat16), make_task("decoder")
    zeros = {n: p == 0 for n, p in model.named_parameters()}
    before = nll(model)
    done = Perp(subsets=(Norms(), MaskLora(rank=4)), steps=60, rate=5e-3).run(model, task)
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    assert nll(done.model) < before - 0.2
    assert all(bool((p[zeros[n]] == 0).all()) for n, p in done.model.named_parameters() if p.dim() > 1)


def test_what_cannot_be_is_refused():
    task = make_task("decoder")
    with pytest.raises(SettingError, match="it trains nothing"):
        Perp(subsets=()).check()
    with pytest.raises(SettingError, match="a matrix takes one adapter"):
        Perp(subsets=(MaskLora(), ScaleLora())).check()
    with pytest.raises(SettingError, match="a rank is 1 at least"):
        Perp(subsets=(MaskLora(rank=0),)).check()
    with pytest.raises(SettingError, match="steps start at 1"):
        Perp(steps=0).check()
    for wrong in ({"rate": float("inf")}, {"decay": float("nan")}):
        with pytest.raises(SettingError, match="a rate is above 0 and a decay is not below"):
            Perp(**wrong).check()
    with pytest.raises(SiteError, match="it matches no parameter"):
        recovered(Perp(include=("model.layers.*.mpl.*",), steps=1))
    with pytest.raises(SiteError, match="it has none of them"):
        recovered(Perp(subsets=(Biases(),), steps=1))
    with pytest.raises(SettingError, match="the dense blocks are gone"):
        recovered(Perp(by=Reconstruct(), steps=1))
    with pytest.raises(SiteError, match="it has no stack of blocks"):
        Perp(by=Reconstruct(), after=Magnitude(), steps=1).run(trained("mlp"), make_task("mlp"))
    short = toy_text(batch=8)
    few = {**short.ids, "train": short.ids["train"][: 3 * short.window]}
    with pytest.raises(TaskError, match="has 3 examples, and a batch is 8"):
        Perp(steps=1).run(trained("decoder"), type(task)("short", few, window=16, batch=8))
    shared = trained("decoder")
    shared.model.layers[1].mlp.up_proj.weight = shared.model.layers[0].mlp.up_proj.weight
    with pytest.raises(ModelError, match=r"one tensor with model.layers.1.mlp.up_proj.weight"):
        Perp(steps=1).run(shared, task)


def test_a_merge_that_fills_zeros_is_refused(monkeypatch):
    monkeypatch.setattr(adapters.MaskLora, "merged", lambda self, weight: weight + 1)
    with pytest.raises(BudgetError, match="are filled in"):
        recovered(Perp(subsets=(MaskLora(),), steps=1))


def test_subsets_are_written_short():
    found = build(Perp, {"subsets": "norms,mask-lora(rank=8)", "by": "reconstruct(samples=4)", "after": "wanda"})
    assert found == Perp(subsets=(Norms(), MaskLora(rank=8)), by=Reconstruct(samples=4), after=Wanda())
    assert method_of(text_of_method(found)) == found
