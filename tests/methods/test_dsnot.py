"""DSnoT: by hand, against the published procedure written as plain loops, and what it must never do."""

import pytest
import torch
from tiny import make_model, make_task, trained
from torch import Tensor, nn

from secateur import prune
from secateur.axes import NM, Blocks, Dsnot, Magnitude, Obs, PerMatrix, PerRow, PerSlab, Rank, Wanda
from secateur.axes.refiners import lacking, steadiness, swapped_in_groups, swapped_in_rows
from secateur.cut import weights
from secateur.edit import Mask
from secateur.errors import EvidenceError, PatternError, SettingError
from secateur.evidence import Evidence, observe
from secateur.methods.dsnot import DSnoT
from secateur.methods.wanda import Wanda as WandaMethod
from secateur.site import Part, Site
from secateur.task import Batch


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The published procedure, row by row: a sorted list of the candidates of each sign, and a pointer into each that only
# advances. Candidates are lists of their own, so that no pointer can walk into weights that are none.


def sign(value: float) -> int:
    return (value > 0) - (value < 0)


def plain_row(c: list, v: list, omega: list, keep: list, rounds: int, tau: float, overshoot: bool = True) -> list:
    """Section 3 of arXiv:2310.08915 for one row of C, v, |W| ||X|| and the first mask."""
    keep, inputs = list(keep), range(len(c))
    pruned, kept = [j for j in inputs if not keep[j]], [j for j in inputs if keep[j]]
    grow = {s: sorted((j for j in pruned if sign(c[j]) == s), key=lambda j: -s * c[j] / v[j]) for s in (-1, 1)}
    drop = {s: sorted((j for j in kept if sign(c[j]) == -s), key=lambda j: omega[j]) for s in (-1, 1)}
    error = sum(c[j] for j in pruned)
    first = sign(error)
    for _ in range(rounds):
        s = sign(error)
        if abs(error) <= tau or not grow[s] or not drop[s]:
            break
        after = error - c[grow[s][0]] + c[drop[s][0]]
        if not overshoot and sign(after) != first:
            break
        keep[grow[s].pop(0)], keep[drop[s].pop(0)] = True, False
        error = after
    return keep


def plain_groups(c: list, v: list, score: list, keep: list, m: int, rounds: int, tau: float) -> list:
    """The same for n:m: the partner is the lowest first score in the grown weight's group."""
    keep = list(keep)
    pruned = [j for j in range(len(c)) if not keep[j]]
    unused = {j for j in range(len(c)) if keep[j]}
    error = sum(c[j] for j in pruned)
    first = sign(error)
    for g in sorted((j for j in pruned if sign(c[j]) == first), key=lambda j: -first * c[j] / v[j])[:rounds]:
        if abs(error) <= tau:
            break
        partners = [j for j in unused if j // m == g // m]
        if not partners:
            continue
        q = min(partners, key=lambda j: score[j])
        after = error - c[g] + c[q]
        if sign(after) != first:
            break
        keep[g], keep[q] = True, False
        unused.remove(q)
        error = after
    return keep


def layer(rows: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C, variances, costs and scores of a layer whose inputs have means that matter: [rows, width] each."""
    weight, mean = draw(rows, width, seed=seed), draw(width, seed=seed + 1)
    spread = draw(width, seed=seed + 2).abs() + 0.1
    norm = (mean.square() + spread).sqrt()
    return weight * mean, spread.expand(rows, width), weight.abs() * norm, weight.abs()


@pytest.mark.parametrize("start", ["per row", "anywhere"])
@pytest.mark.parametrize("overshoot", [True, False])
@pytest.mark.parametrize(("rounds", "tau"), [(50, 0.0), (50, 0.3), (3, 0.01)])
def test_rows_equal_the_published_procedure(start: str, overshoot: bool, rounds: int, tau: float) -> None:
    for seed in range(3):
        c, v, omega, _ = layer(24, 40, seed=10 * seed)
        pattern = PerRow() if start == "per row" else PerMatrix()
        keep = pattern.select(omega, 24 * 16)
        ours = swapped_in_rows(c, c / v, omega, keep, rounds, tau, overshoot)
        lists = (t.tolist() for t in (c, v, omega, keep))
        plain = [plain_row(*row, rounds, tau, overshoot) for row in zip(*lists, strict=True)]
        assert ours.tolist() == plain
        assert torch.equal(ours.sum(1), keep.sum(1))
        assert not torch.equal(ours, keep)


@pytest.mark.parametrize("nm", [(2, 4), (1, 4), (4, 8)], ids=str)
@pytest.mark.parametrize(("rounds", "tau"), [(50, 0.0), (50, 0.3), (2, 0.01)])
def test_groups_equal_the_published_procedure(nm: tuple[int, int], rounds: int, tau: float) -> None:
    for seed in range(3):
        c, v, _, score = layer(24, 40, seed=10 * seed)
        keep = NM(*nm).select(score, 24 * 40 * nm[0] // nm[1])
        ours = swapped_in_groups(c, c / v, score, keep, nm[1], rounds, tau)
        lists = (t.tolist() for t in (c, v, score, keep))
        assert ours.tolist() == [plain_groups(*row, nm[1], rounds, tau) for row in zip(*lists, strict=True)]
        assert bool((ours.reshape(24, -1, nm[1]).sum(2) == nm[0]).all())
        assert not torch.equal(ours, keep)


def site(rows: int, width: int) -> Site:
    return Site("w", "weight", (rows, width), (Part("w", (rows, width)),))


def test_one_swap_by_hand() -> None:
    """W = [3, 2, -2, 1], mean input 1 each: without inputs 1 and 3 the output lacks 2 + 1 = 3.

    Input 1 comes back, for it would give most for its variance (2/1 against 1/1); of what is kept only -2 adds to the
    output when it goes. The row then lacks 1 - 2 = -1, and nothing that was left out at first is negative.
    """
    inputs = torch.tensor(
        [[[0.0, 0, 0, 0], [2, 2, 2, 2]]]
    )  # one example of two tokens, each input of mean 1, variance 1
    model = nn.Linear(4, 1, bias=False)
    seen = observe(model, weights(model), [Batch((inputs,))], Dsnot.needs)["weight"]
    assert seen.mean("input").tolist() == [1, 1, 1, 1]
    assert seen.mean("input_scatter").tolist() == [1, 1, 1, 1]
    first = Mask(site(1, 4), torch.tensor([[True, False, True, False]]))
    tensors = {"w": torch.tensor([[3.0, 2, -2, 1]])}
    score = tensors["w"].abs()
    found = Dsnot().refine(first, score, PerRow(), tensors, seen)
    assert found.keep.tolist() == [[True, True, False, False]]
    strict = Dsnot(overshoot=False).refine(first, score, PerRow(), tensors, seen)
    assert strict.keep.tolist() == [[True, False, True, False]]
    assert Dsnot(threshold=3.0).refine(first, score, PerRow(), tensors, seen).keep.tolist() == first.keep.tolist()
    steady = Evidence(seen.count, {**seen.sums, "input_scatter": torch.tensor([2.0, 40, 2, 2])})
    found = Dsnot().refine(first, score, PerRow(), tensors, steady)  # 2/20 < 1/1: input 3 comes back instead
    assert found.keep.tolist() == [[True, False, False, True]]


def test_variance_is_within_each_example_and_does_not_depend_on_grouping() -> None:
    model, x = nn.Linear(3, 2), draw(6, 5, 3).float() + 10
    sites, needs = weights(model), {"input_scatter"}
    whole = observe(model, sites, [Batch((x,))], needs)["weight"]
    parts = observe(model, sites, [Batch((x[:1],)), Batch((x[1:],))], needs)["weight"]
    wanted = x.double().var(1, unbiased=False).mean(0)
    torch.testing.assert_close(whole.mean("input_scatter"), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(parts.mean("input_scatter"), wanted, rtol=1e-5, atol=1e-6)
    conv, image = nn.Conv2d(2, 4, 1, groups=2), draw(3, 2, 4, 4).float()
    seen = observe(conv, weights(conv), [Batch((image,))], needs)["weight"]
    wanted = image.double().flatten(2).var(2, unbiased=False).mean(0)[:, None]
    torch.testing.assert_close(seen.mean("input_scatter"), wanted, rtol=1e-5, atol=1e-6)


def evidence(inputs: Tensor) -> Evidence:
    """Of inputs [examples, tokens, in]."""
    model = nn.Linear(inputs.shape[-1], 1)
    return observe(model, weights(model), [Batch((inputs.float(),))], Dsnot.needs | {"gram"})["weight"]


def test_the_length_of_the_examples_does_not_matter() -> None:
    """The same tokens twice: sums double, and a threshold on sums would stop later."""
    x, weight = draw(4, 20, 32) + draw(32, seed=1), draw(16, 32, seed=2).float()
    first = Mask(site(16, 32), PerRow().select(weight.abs(), 16 * 16))
    once, twice = evidence(x), evidence(torch.cat([x, x], 1))
    for threshold in (0.0, 0.5, 2.0):
        refiner = Dsnot(threshold=threshold)
        found = [refiner.refine(first, weight.abs(), PerRow(), {"w": weight}, seen).keep for seen in (once, twice)]
        assert torch.equal(*found)


@pytest.mark.parametrize("start", [Magnitude(), Wanda(), Obs()], ids=lambda c: type(c).__name__)
@pytest.mark.parametrize("pattern", [PerRow(), PerMatrix(), NM(2, 4), NM(1, 8)], ids=str)
def test_any_choice_gets_better_on_average_and_as_large(start: object, pattern: object) -> None:
    """On inputs with a mean, what the rows lack falls, and each row or group keeps as many as before."""
    x, weight = draw(8, 64, 256) + draw(256, seed=1), draw(24, 256, seed=2).float()
    seen, tensors, here = evidence(x), {"w": weight}, site(24, 256)
    keep = pattern.nearest((24, 256), 24 * 77)
    (before,) = Rank(start, pattern).solve(here, tensors, seen, keep)
    (after,) = Rank(start, pattern, Dsnot()).solve(here, tensors, seen, keep)
    (strict,) = Rank(start, pattern, Dsnot(overshoot=False)).solve(here, tensors, seen, keep)
    width = pattern.m if isinstance(pattern, NM) else 256
    kept = [mask.keep.reshape(24, -1, width).sum(2) for mask in (before, after, strict)]
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[0], kept[2])
    contribution = weight.double() * seen.mean("input")
    lack = [lacking(contribution, mask.keep).abs() for mask in (before, after, strict)]
    assert float(lack[1].mean()) < 0.5 * float(lack[0].mean())
    if not isinstance(pattern, NM):  # a partner in a group may pull the wrong way
        assert bool((lack[2] <= lack[0]).all())


def test_narrow_layers_without_candidates_keep_their_rows_whole() -> None:
    """Nothing left out has the sign that is lacking, or nothing kept has the other: no swap, not half of one."""
    c = torch.tensor([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0], [0.0, 0.0, 3.0]])
    keep = torch.tensor([[True, True, False], [False, True, True], [True, False, False]])
    found = swapped_in_rows(c, c, c.abs(), keep, 50, 0.0)
    assert found.tolist() == [[True, True, False], [True, False, True], [True, False, False]]


def test_dead_and_constant_inputs_give_no_nan() -> None:
    x = draw(4, 10, 16)
    x[..., 3], x[..., 5] = 0, 2
    weight, seen = draw(8, 16, seed=1).float(), evidence(x)
    first = Mask(site(8, 16), PerRow().select(weight.abs(), 64))
    found = Dsnot().refine(first, weight.abs(), PerRow(), {"w": weight}, seen).keep
    assert torch.equal(found[:, 3], first.keep[:, 3])  # what is always zero lacks nowhere
    assert bool(torch.isfinite(steadiness(seen.sums["input_scatter"])).all())
    assert bool((steadiness(torch.zeros(4)) == 1).all())
    silent = Evidence(seen.count, {**seen.sums, "input": torch.zeros(16, dtype=torch.float64)})
    same = Dsnot().refine(first, weight.abs(), PerRow(), {"w": weight}, silent).keep
    assert torch.equal(same, first.keep)  # inputs of mean zero: no row is active


def test_groups_of_a_convolution_run_over_its_input_channels() -> None:
    conv, image = nn.Conv2d(8, 6, 3, bias=False), draw(2, 8, 9, 9).float() + 1
    (here,) = weights(conv)
    needs = Dsnot.needs | Wanda.needs
    seen = observe(conv, [here], [Batch((image,))], needs)["weight"]
    tensors = {"weight": conv.weight.detach()}
    (before,) = Rank(Wanda(), NM(2, 4)).solve(here, tensors, seen, 216)
    (after,) = Rank(Wanda(), NM(2, 4), Dsnot(threshold=0)).solve(here, tensors, seen, 216)
    assert not torch.equal(before.keep, after.keep)
    assert bool((after.keep.movedim(1, -1).reshape(-1, 4).sum(1) == 2).all())


def test_only_attention_is_refined_unless_told_otherwise() -> None:
    model, task = trained("decoder"), make_task("decoder")
    plain = {e.site.name: e.keep for e in prune(model, WandaMethod(samples=8), task).edits}
    settings = {"samples": 8, "feed": "dense"}  # on the dense model's inputs, so that sites do not see one another
    plain = {e.site.name: e.keep for e in prune(model, WandaMethod(**settings), task).edits}

    def changed(method: DSnoT) -> set[str]:
        return {e.site.name for e in prune(model, method, task).edits if not torch.equal(e.keep, plain[e.site.name])}

    assert changed(DSnoT(**settings))
    assert all("self_attn" in name for name in changed(DSnoT(**settings)))
    assert any("mlp" in name for name in changed(DSnoT(only=(), **settings)))
    with pytest.raises(SettingError, match=r"none of the matrices[\s\S]*only=\(\)"):
        prune(make_model("mlp"), DSnoT(samples=8), make_task("mlp"))
    assert prune(make_model("mlp"), DSnoT(samples=8, only=()), make_task("mlp")).ledger.sparsity == 0.5


def test_what_cannot_be_refined_is_refused() -> None:
    weight, seen = draw(4, 8).float(), evidence(draw(2, 5, 8))
    first = Mask(site(4, 8), PerRow().select(weight.abs(), 16))
    with pytest.raises(EvidenceError, match=r"zero already[\s\S]*before the choice is applied"):
        Dsnot().refine(first, weight.abs(), PerRow(), {"w": weight * first.keep}, seen)
    with pytest.raises(EvidenceError, match="no calibration token reached it"):
        Dsnot().refine(first, weight.abs(), PerRow(), {"w": weight}, Evidence())
    for pattern in (Blocks(4, 1), PerSlab()):
        with pytest.raises(PatternError, match="would break that pattern"):
            DSnoT(pattern=pattern).check()
    with pytest.raises(PatternError, match="sparsity=0.5"):
        DSnoT(pattern=NM(2, 4), sparsity=0.7).check()
    with pytest.raises(SettingError, match="one round at least"):
        Dsnot(rounds=0)


@pytest.mark.parametrize("seed", range(3))
def test_magnitudes_choice_gains_where_inputs_have_a_mean(seed: int) -> None:
    """The paper's claim at toy size: at 70 % the output of the layer itself gets nearer, not only its mean."""
    x = 0.5 * draw(16, 64, 256, seed=seed) + draw(256, seed=seed + 10)
    weight, seen = draw(32, 256, seed=seed + 20).float(), evidence(x)
    here, gram = site(32, 256), seen.sums["gram"]

    def error(refine: Dsnot | None) -> float:
        (mask,) = Rank(Magnitude(), PerRow(), refine).solve(here, {"w": weight}, seen, 32 * 77)
        gone = weight.double() * ~mask.keep
        return float((gone @ gram * gone).sum())

    assert error(Dsnot()) < 0.75 * error(None)
    assert error(Dsnot(overshoot=False)) < 0.4 * error(None)  # rows that stop in time gain more


@pytest.mark.model
def test_a_layer_of_the_real_model_equals_the_published_procedure(smollm2) -> None:
    """SmolLM2-135M: keys of one block, real inputs, unstructured at 60 % and in groups."""
    model = smollm2.model
    ids = torch.randint(0, 49152, (4, 64), generator=torch.Generator().manual_seed(0))
    here = next(s for s in weights(model) if s.name == "model.layers.7.self_attn.k_proj.weight")
    seen = observe(model, [here], [Batch({"input_ids": ids})], Dsnot.needs)[here.name]
    named = {here.name: model.get_parameter(here.name).detach()}
    weight = named[here.name].double()
    c, v = weight * seen.mean("input"), steadiness(seen.sums["input_scatter"]).expand_as(weight)
    omega = weight.abs() * seen.sums["input_square"].sqrt()
    threshold = Dsnot().threshold
    for pattern in (PerRow(), NM(2, 4)):
        keep = pattern.nearest(here.shape, here.units * 2 // 5)
        (before,) = Rank(Wanda(), pattern).solve(here, named, seen, keep)
        (after,) = Rank(Wanda(), pattern, Dsnot()).solve(here, named, seen, keep)
        score = Wanda().score(here, named, seen).double()
        price = omega if isinstance(pattern, PerRow) else score
        lists = zip(*(t[:64].tolist() for t in (c, v, price, before.keep)), strict=True)
        if isinstance(pattern, PerRow):
            plain = [plain_row(*row, 50, threshold) for row in lists]
        else:
            plain = [plain_groups(*row, 4, 50, threshold) for row in lists]
        assert (after.keep[:64] == torch.tensor(plain)).double().mean() > 0.9999
        assert float(lacking(c, after.keep).abs().mean()) < 0.7 * float(lacking(c, before.keep).abs().mean())
