"""Magnitude, random, Wanda, SparseGPT: by hand, against the plain formulas, and on the real model's layers."""

import pytest
import torch
from tiny import make_model, make_task, mlp, toy_vectors, trained
from torch import Tensor, nn

from secateur import prune
from secateur.axes import (
    NM,
    Blocks,
    ByName,
    ChannelBlocks,
    Global,
    ObsSweep,
    Owl,
    PerMatrix,
    PerRow,
    PerSlab,
    Taps,
    text_of,
)
from secateur.axes.criteria import factor_, wanda_score
from secateur.cut import weights
from secateur.edit import Mask
from secateur.errors import EvidenceError, ModelError, PatternError, SettingError, TaskError
from secateur.evidence import Evidence, observe
from secateur.method import load
from secateur.methods.magnitude import Magnitude
from secateur.methods.oneshot import OneShot
from secateur.methods.random import Random
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.task import Batch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# The published formulas, as plainly as they can be written. Only the choice differs from the authors' code: exactly
# k are dropped, ties by index, where theirs drops all that are not above a threshold.


def plain_wanda(weight: Tensor, inputs: Tensor, sparsity: float) -> Tensor:
    """Section 3 of arXiv:2306.11695: True where kept."""
    score = weight.abs() * inputs.norm(dim=0)
    drop = score.sort(dim=1, stable=True).indices[:, : int(sparsity * weight.shape[1])]
    return torch.ones_like(weight, dtype=torch.bool).scatter(1, drop, False)


def plain_sparsegpt(
    weight: Tensor, gram: Tensor, sparsity: float, block: int, nm: tuple[int, int] | None = None
) -> tuple[Tensor, Tensor]:
    """Algorithm 1 of arXiv:2301.00774: mask and new weights, in float64."""
    weight, hessian = weight.double().clone(), gram.double().clone()
    columns = weight.shape[1]
    dead = hessian.diagonal() == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += torch.eye(columns, dtype=torch.float64) * (0.01 * hessian.diagonal().mean())
    inverse = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    mask = torch.ones_like(weight, dtype=torch.bool)
    for a in range(0, columns, block):
        b = min(a + block, columns)
        if nm is None:
            score = (weight[:, a:b] ** 2 / inverse.diagonal()[a:b] ** 2).flatten()
            drop = score.sort(stable=True).indices[: int(sparsity * score.numel())]
            mask[:, a:b] = torch.ones_like(score, dtype=torch.bool).scatter(0, drop, False).reshape(-1, b - a)
        for j in range(a, b):
            if nm is not None and j % nm[1] == 0:
                group = slice(j, j + nm[1])
                score = weight[:, group] ** 2 / inverse.diagonal()[group] ** 2
                drop = score.sort(dim=1, stable=True).indices[:, : nm[1] - nm[0]]
                mask[:, group] = torch.ones_like(score, dtype=torch.bool).scatter(1, drop, False)
            final = weight[:, j] * mask[:, j]
            error = (weight[:, j] - final) / inverse[j, j]
            weight[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :][None]
            weight[:, j] = final
    return mask, weight


def test_wanda_by_hand() -> None:
    score = wanda_score(torch.tensor([[4.0, -1, 2], [1, 1, 1]]), torch.tensor([1.0, 64, 9]))
    assert score.tolist() == [[4, 8, 6], [1, 8, 3]]
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[3.0, 1.0]])

    class Loud:  # the second input is ten times as loud, so the smaller weight matters more
        name, seed, metric, higher_is_better, clients = "loud", 0, "loss", False, ()
        example = Batch((torch.tensor([[1.0, 10.0]]),))

        def batches(self, split: str, n: int | None = None, epoch: int = 0) -> list[Batch]:
            return [self.example]

        def fingerprint(self) -> str:
            return "loud"

    assert prune(model, Wanda(), Loud()).model.weight.tolist() == [[0, 1]]
    assert prune(model, Magnitude(), Loud()).model.weight.tolist() == [[3, 0]]
    assert model.weight.tolist() == [[3, 1]]  # the caller's model is left alone


def test_magnitude_keeps_the_largest() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    done = prune(model, Magnitude(sparsity=0.75), task)
    for edit in done.edits:
        weight, keep = model.get_parameter(edit.site.name).detach().abs(), edit.keep
        assert int(keep.sum()) == keep.numel() // 4
        assert float(weight[keep].min()) >= float(weight[~keep].max())
    one = prune(model, Magnitude(sparsity=0.75, allocation=Global()), task)
    kept = torch.cat([model.get_parameter(e.site.name).detach().abs()[e.keep] for e in one.edits])
    gone = torch.cat([model.get_parameter(e.site.name).detach().abs()[~e.keep] for e in one.edits])
    assert float(kept.min()) >= float(gone.max())


def test_random_depends_on_the_seed_alone() -> None:
    model = make_model("mlp")
    first, again = (prune(model, Random(), make_task("mlp", seed=1)) for _ in range(2))
    other = prune(model, Random(), make_task("mlp", seed=2))
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(first.edits, again.edits, strict=True))
    assert not all(torch.equal(a.keep, b.keep) for a, b in zip(first.edits, other.edits, strict=True))


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_sparsegpt_equals_the_plain_formulas(block: int, sparsity: float) -> None:
    weight, inputs = draw(24, 48), draw(200, 48, seed=1) @ draw(48, 48, seed=2)
    inputs[:, 5] = 0  # a dead column
    gram = inputs.T @ inputs
    solver = ObsSweep(PerSlab(block), block)
    mask, value = solver.sweep(weight, gram, 24 * 48 - int(sparsity * 24 * 48))
    slabs = [int(sparsity * 24 * min(block, 48 - a)) for a in range(0, 48, block)]
    if sum(slabs) == int(sparsity * 24 * 48):  # the authors round each slab down, we the whole
        plain_mask, plain_value = plain_sparsegpt(weight, gram, sparsity, block)
        assert (mask == plain_mask).float().mean() > 0.995
        same = (mask == plain_mask).all(1)
        torch.testing.assert_close(value[same], plain_value[same].float(), rtol=1e-2, atol=1e-2)
    assert bool((value[~mask] == 0).all())
    assert int(mask.sum()) == 24 * 48 - int(sparsity * 24 * 48)


def test_sparsegpt_by_hand() -> None:
    """Two equal inputs: the one kept takes over what the other did."""
    gram = torch.tensor([[1.0, 0.999], [0.999, 1.0]])
    mask, value = ObsSweep(PerRow(), damp=1e-9).sweep(torch.tensor([[1.0, 3.0]]), gram, 1)
    assert mask.tolist() == [[False, True]]
    assert value[0, 1] == pytest.approx(3.999, abs=1e-3)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)], ids=str)
def test_sparsegpt_in_groups_equals_the_plain_formulas(nm: tuple[int, int]) -> None:
    weight, inputs = draw(24, 48), draw(200, 48, seed=1) @ draw(48, 48, seed=2)
    gram = inputs.T @ inputs
    mask, value = ObsSweep(NM(*nm), 16).sweep(weight, gram, 24 * 48 * nm[0] // nm[1])
    plain_mask, plain_value = plain_sparsegpt(weight, gram, 0, 16, nm)
    assert torch.equal(mask, plain_mask)
    torch.testing.assert_close(value, plain_value.float(), rtol=1e-3, atol=1e-3)


def reconstruction_error(weight: Tensor, other: Tensor, gram: Tensor) -> float:
    change = (weight - other).double()
    return float((change @ gram.double() * change).sum())


@pytest.mark.parametrize("pattern", [PerRow(), NM(2, 4), PerMatrix(), PerSlab(32), Blocks(4, 1)], ids=str)
def test_a_sweep_leaves_less_error_than_the_mask_alone(pattern: object) -> None:
    weight, inputs = draw(32, 64), draw(300, 64, seed=1) @ draw(64, 64, seed=2)
    gram = inputs.T @ inputs
    mask, value = ObsSweep(pattern, 32).sweep(weight, gram, 32 * 64 // 2)
    assert int(mask.sum()) == 32 * 64 // 2
    assert reconstruction_error(weight, value, gram) < 0.75 * reconstruction_error(weight, weight * mask, gram)


METHODS = [Magnitude, Random, Wanda, SparseGPT]
PATTERNS = [PerMatrix(), PerRow(), PerSlab(16), NM(2, 4), NM(4, 8), Blocks(4, 1), Blocks(2, 4)]


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_every_pattern_is_met_exactly(method: type, pattern: object) -> None:
    done = prune(make_model("decoder"), method(pattern=pattern, **method.tiny), make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.5)
    masks = [e for e in done.edits if isinstance(e, Mask)]
    assert len(masks) == len(weights(make_model("decoder")))
    for edit in masks:
        value = done.model.get_parameter(edit.site.name)
        assert bool((value[~edit.keep] == 0).all())
        assert pattern.nearest(edit.site.shape, edit.kept) == edit.kept


@pytest.mark.parametrize("groups", [1, 2])
def test_groups_of_a_swept_convolution_are_of_neighbouring_channels(groups: int) -> None:
    """As the pattern has it: the plain formulas, with the columns of one place in the kernel side by side."""
    weight, inputs = draw(6, 8 // groups, 3, 3), draw(3, 400, 72 // groups, seed=1)[:groups]
    grams = inputs.mT @ inputs
    site = weights(nn.Conv2d(8, 6, 3, groups=groups))[0]
    seen = Evidence(400, {"gram": grams.double() if groups > 1 else grams[0].double()})
    update, mask = ObsSweep(NM(2, 4), 12).solve(site, {"weight": weight}, seen, weight.numel() // 2)
    assert torch.equal(NM(2, 4).select(mask.keep.float(), mask.kept), mask.keep)
    for own, kept, value, x in zip(*(t.chunk(groups) for t in (weight, mask.keep, update.value)), inputs, strict=True):
        by_place = x.reshape(400, -1, 9).mT.reshape(400, -1)
        plain_mask, plain_value = plain_sparsegpt(own.movedim(1, -1).flatten(1), by_place.T @ by_place, 0, 12, (2, 4))
        assert torch.equal(kept.movedim(1, -1).flatten(1), plain_mask)
        torch.testing.assert_close(value.movedim(1, -1).flatten(1), plain_value.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("block", [7, 128])
@pytest.mark.parametrize("pattern", [ChannelBlocks(4), Taps()], ids=str)
def test_a_sweep_decides_kernels_whole_where_the_pattern_does(pattern: object, block: int) -> None:
    task, sparsity = make_task("cnn"), pattern.fixed or 0.5
    method = SparseGPT(
        sparsity=sparsity, samples=64, block=block, pattern=pattern, exclude=("conv", "down", "head", "fc")
    )
    done = prune(make_model("cnn"), method, task)
    assert done.ledger.sparsity == pytest.approx(sparsity, abs=0.02)
    for mask in (edit for edit in done.edits if isinstance(edit, Mask)):
        assert torch.equal(pattern.select(mask.keep.float(), mask.kept), mask.keep)


@pytest.mark.parametrize("method", [Wanda, SparseGPT], ids=lambda m: m.__name__)
def test_owl_spends_by_block_and_meets_the_total(method: type) -> None:
    settings = {**method.tiny, "allocation": Owl(outlier=2.0, reach=0.2), "pattern": PerMatrix()}
    done = prune(make_model("decoder"), method(**settings), make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.5, abs=1e-3)
    by_block = {r.block: r.kept / r.units for r in done.record.sites}
    assert len(set(by_block.values())) > 1


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.__name__)
def test_what_rows_round_is_made_up_for_and_a_fixed_pattern_says_that_nothing_is_spent(method: type) -> None:
    settings = {**method.tiny, "sparsity": 0.6, "allocation": ByName({"model.layers.0.mlp.up_proj.weight": 0.9})}
    done = prune(make_model("decoder"), method(**settings, pattern=PerRow()), make_task("decoder"))
    units = sum(r.units for r in done.record.sites)
    assert abs(sum(r.kept for r in done.record.sites) - 0.4 * units) <= max(
        s.shape[0] for s in weights(make_model("decoder"))
    )
    done = prune(make_model("decoder"), method(**{**settings, "sparsity": 0.5}, pattern=NM(2, 4)), make_task("decoder"))
    assert done.notes == [
        "2:4 prescribes what every matrix keeps: " + text_of(settings["allocation"]) + " has nothing to spend"
    ]


def test_slabs_are_as_wide_as_blocks() -> None:
    """The slab of columns whose choice is made at once is the block, whatever its width."""
    task = make_task("decoder")
    found = prune(make_model("decoder"), SparseGPT(samples=16, block=16), task)
    same = prune(make_model("decoder"), SparseGPT(samples=16, block=16, pattern=PerSlab(16)), task)
    assert SparseGPT(block=256).solver().pattern == PerSlab(256)
    assert SparseGPT(block=256, pattern=PerSlab(64)).solver().pattern == PerSlab(64)
    assert all(torch.equal(a, b) for a, b in zip(found.model.parameters(), same.model.parameters(), strict=True))


def test_data_beats_magnitude_beats_nothing_on_a_trained_model() -> None:
    """At toy size the order of the field: dense < SparseGPT, Wanda < magnitude < random in loss."""
    task = make_task("decoder")
    dense = trained("decoder")

    def loss(method: object) -> float:
        return task.measure(prune(dense, method, task).model, "val")["nll"]

    found = {m.__name__: loss(m(sparsity=0.5, **({"samples": 32} if hasattr(m, "samples") else {}))) for m in METHODS}
    assert task.measure(dense, "val")["nll"] < found["SparseGPT"]
    assert found["SparseGPT"] < found["Magnitude"] < found["Random"]
    assert found["Wanda"] < found["Random"]


def test_settings_that_cannot_work_are_refused_before_any_data_is_read() -> None:
    class Unread:
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"the task was asked for {name}")

    model = make_model("decoder")
    with pytest.raises(SettingError, match="Did you mean 0.3"):
        prune(model, Wanda(sparsity=30), Unread())
    with pytest.raises(PatternError, match=r"sparsity=0.75"):
        prune(model, SparseGPT(pattern=NM(1, 4)), Unread())
    with pytest.raises(SettingError, match="damp"):
        prune(model, SparseGPT(damp=0), Unread())
    for method in (SparseGPT(block=30, pattern=NM(2, 4)), OneShot(solver=ObsSweep(block=30), pattern=NM(2, 4))):
        with pytest.raises(SettingError, match=r"blocks of 30 columns[\s\S]*would cut them apart[\s\S]*block=32"):
            prune(model, method, Unread())
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match=r"model.layers.1.mlp.up_proj.weight holds NaN"):
        prune(model, Wanda(), Unread())


def test_a_task_that_does_not_fit_the_model_is_refused() -> None:
    with pytest.raises(TaskError, match=r"does not go through the model[\s\S]*shape this model takes"):
        prune(make_model("mlp"), Magnitude(), make_task("cnn"))


def test_too_few_tokens_and_unfit_shapes_are_refused() -> None:
    with pytest.raises(EvidenceError, match=r"too few to tell those inputs apart[\s\S]*at least"):
        prune(make_model("decoder"), SparseGPT(samples=1), make_task("decoder"))
    with pytest.raises(PatternError, match="multiple of 7"):
        prune(make_model("decoder"), Wanda(pattern=NM(1, 7), sparsity=6 / 7), make_task("decoder"))
    site = weights(nn.Linear(4, 4))[0]
    solid = nn.Sequential(nn.Unflatten(1, (1, 4, 2, 2)), nn.Conv3d(1, 2, 2), nn.Flatten(), nn.Linear(6, 4))
    for method in (Wanda(samples=4), SparseGPT(samples=32)):
        with pytest.raises(EvidenceError, match=r"1.weight was to be[\s\S]*a convolution over one or two axes"):
            prune(solid, method, make_task("mlp"))
    with pytest.raises(EvidenceError, match="no calibration token reached it"):
        ObsSweep().solve(site, {"weight": torch.ones(4, 4)}, Evidence(), 8)


@pytest.mark.model
def test_masks_and_weights_equal_the_plain_formulas_on_layers_of_the_real_model(smollm2) -> None:
    """SmolLM2-135M: every kind of matrix of one block, real activations."""
    model = smollm2.model
    draw_ids = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 49152, (8, 256), generator=draw_ids)  # 2,048 tokens: more than the widest input
    sites = [s for s in weights(model) if s.block == "model.layers.7"]
    caught: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(s.name.removesuffix(".weight")).register_forward_pre_hook(
            lambda _, args, name=s.name: caught.__setitem__(name, args[0].reshape(-1, args[0].shape[-1]).clone())
        )
        for s in sites
    ]
    with torch.no_grad():
        model(ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    seen = observe(model, sites, [Batch({"input_ids": ids})], {"input_square", "gram"})
    for site in sites:
        weight, inputs = model.get_parameter(site.name).detach(), caught[site.name]
        ours = PerRow().select(wanda_score(weight, seen[site.name].sums["input_square"]), weight.numel() // 2)
        plain = plain_wanda(weight, inputs, 0.5)
        assert (ours == plain).double().mean() > 0.99999, site.name  # sums in float64 against float32: near ties
        if "k_proj" in site.name or "down_proj" in site.name:
            gram = (inputs.double().T @ inputs.double()).float()
            weight, plain = weight[:96], plain[:96]  # as many rows as the plain loop does in seconds
            mask, value = ObsSweep().sweep(weight, seen[site.name].sums["gram"], weight.numel() // 2)
            plain_mask, plain_value = plain_sparsegpt(weight, gram, 0.5, 128)
            assert (mask == plain_mask).double().mean() > 0.999, site.name
            ours_error = reconstruction_error(weight, value, gram)
            assert ours_error == pytest.approx(reconstruction_error(weight, plain_value.float(), gram), rel=1e-3)
            assert ours_error < reconstruction_error(weight, weight * plain, gram)  # below Wanda's


@pytest.mark.parametrize("size", [1, 7, 16, 45])
def test_the_factor_is_built_in_place_block_by_block(size: int) -> None:
    x = torch.randn(2 * size, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = x.T @ x
    made = gram.clone()
    assert factor_(made, block=16)
    assert torch.equal(made, made.tril())
    assert torch.allclose(made.T @ made, gram, rtol=1e-12, atol=1e-12)
    gram[0, 0] = -1
    assert not factor_(gram, block=16)


@pytest.mark.parametrize("name", ["magnitude", "wanda", "l1_norm"])
def test_of_a_compiled_model_what_it_compiles_is_pruned(name):
    plain, task = mlp(), toy_vectors()
    compiled = torch.compile(plain, backend="eager")
    expected = prune(plain, load(name)(sparsity=0.5), task)
    outcome = prune(compiled, load(name)(sparsity=0.5), task)
    assert type(outcome.model) is type(plain)
    assert outcome.ledger == expected.ledger and outcome.ledger.sparsity == 0.5
    assert all(torch.equal(a, b) for a, b in zip(outcome.model.parameters(), expected.model.parameters(), strict=True))
    prune(compiled, load(name)(sparsity=0.5), task, inplace=True)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), expected.model.parameters(), strict=True))
