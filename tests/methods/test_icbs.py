"""iCBS: the quadratic against the loss, annealing against every choice there is, and what a search must never do."""

import copy
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
from tiny import make_model, make_task, trained
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from secateur import prune
from secateur.axes import NM, Dsnot, Magnitude, PerMatrix, PerRow, Random, Wanda
from secateur.axes.curvature import ExactHessian, Fisher, MeanGradient, exact_hessian, mean_loss, own_gradients
from secateur.axes.quadratic import Anneal, Exhaustive, Quadratic
from secateur.cut import weights
from secateur.edit import Mask, apply_, load, save
from secateur.errors import EvidenceError, ModelError, PatternError, SettingError
from secateur.evidence import examples
from secateur.methods.icbs import ICBS, Layer, fixed_sides, quadratic, turns, without_negatives
from secateur.methods.magnitude import Magnitude as ByMagnitude
from secateur.methods.oneshot import OneShot
from secateur.recipe import method_of, text_of_method
from secateur.site import Part, Site
from secateur.walk import journal


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def first(n: int, ones: int) -> Tensor:
    return torch.arange(n) < ones


def site(rows: int, width: int) -> Site:
    return Site("w", "weight", (rows, width), (Part("w", (rows, width)),))


# The quadratic


def test_two_weights_by_hand() -> None:
    """w0 = [2, 1] of which the first is out, g = [1, -1], H = [[2, 1], [1, 4]], c = 1, no ridge.

    dw = [-2, 0] and H dw = [-4, -2], so the linear terms are [2 (-4) - 2 (1), 1 (-2) - 1 (-1)] = [-10, -1], and the
    pairs 1/2 w0 H w0 = [[4, 1], [1, 2]]. The constant is 1/2 (8) + 2 = 6. As it is (1, 0): -6 + 6 = 0. The other way
    round (0, 1): the weights move by [2, -1], g d = 3, 1/2 d H d = 4.
    """
    dense, now = torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0])
    gradient, hessian = torch.tensor([1.0, -1.0]), torch.tensor([[2.0, 1.0], [1.0, 4.0]])
    found = quadratic(dense, now, gradient, hessian, 1.0, 0.0)
    assert found.matrix.tolist() == [[-6, 1], [1, 1]]
    assert found.constant == 6
    assert found.value(torch.tensor([True, False])) == 0
    assert found.value(torch.tensor([False, True])) == 7
    ridged = quadratic(dense, now, gradient, hessian, 0.5, 0.1)
    assert ridged.value(torch.tensor([False, True])) == pytest.approx(0.5 * 3 + 4 + 0.1 * 5)


def test_every_choice_has_the_value_of_its_move() -> None:
    dense, keep, gradient, spread = draw(6), torch.tensor([0, 1, 0, 1, 1, 0]), draw(6, seed=1), draw(20, 6, seed=2)
    hessian, now = spread.T @ spread / 20, dense * keep
    found = quadratic(dense, now, gradient, hessian, 0.75, 1e-3)
    assert torch.equal(found.matrix, found.matrix.T)
    assert found.value(keep == 0) == pytest.approx(0, abs=1e-12)  # nothing moves
    for bits in product([0.0, 1.0], repeat=6):
        x = torch.tensor(bits)
        move = dense * (1 - x) - now
        plain = 0.75 * gradient @ move + move @ hessian @ move / 2 + 1e-3 * move @ move
        assert found.value(x) == pytest.approx(float(plain), abs=1e-12)


def test_the_quadratic_is_the_change_of_the_loss() -> None:
    """With the exact Hessian, the whole gradient and no ridge: to the third order in a block of small weights."""
    model, task = trained("mlp"), make_task("mlp")
    here = weights(model)[-1]
    batch = list(examples(task.batches("calibration", 24)))
    value = model.get_parameter(here.name)
    dense = value.detach().clone().reshape(-1)
    places = dense.abs().argsort()[40:48]
    start = torch.tensor([True, False] * 4)
    with torch.no_grad():
        value.view(-1)[places[start]] = 0
    rows, before = own_gradients(model, here, batch, task.loss)
    hessian = exact_hessian(model, here, places, batch, task.loss)
    now = value.detach().reshape(-1)[places].clone()
    found = quadratic(dense[places], now, rows.mean(0)[places], hessian, 1.0, 0.0)
    wanted, real = [], []
    for x in (~start, torch.ones(8, dtype=torch.bool), torch.zeros(8, dtype=torch.bool), first(8, 4)):
        with torch.no_grad():
            value.view(-1)[places] = dense[places] * ~x
        real.append(mean_loss(model, batch, task.loss) - before)
        wanted.append(found.value(x))
    torch.testing.assert_close(torch.tensor(wanted), torch.tensor(real), rtol=0.05, atol=1e-6)
    assert max(map(abs, real)) > 1e-4


def test_only_the_release_loses_what_is_negative() -> None:
    """The paper's code means to drop what is tiny, and drops -10 as well."""
    problem = Quadratic(torch.tensor([[-10.0, 1e-13, -1.0], [1e-13, 2.0, 3.0], [-1.0, 3.0, 4.0]]), 5.0)
    assert without_negatives(problem).matrix.tolist() == [[0, 0, 0], [0, 2, 3], [0, 3, 4]]
    spread = draw(8, 40, seed=1)
    full = quadratic(draw(40), draw(40) * first(40, 20), spread.mean(0), spread.T @ spread / 8, 0.75, 1e-3)
    start = ~first(40, 20)
    right = Anneal().minimise(full.matrix, start, seeded())
    wrong = Anneal().minimise(without_negatives(full).matrix, start, seeded())
    assert full.value(right) < 0
    assert full.value(right) < full.value(wrong)


@pytest.mark.parametrize("family", ["mlp", "cnn", "moe"])
def test_gradients_of_examples_have_the_gradient_of_the_batch_as_their_mean(family: str) -> None:
    model, task = trained(family), make_task(family)
    (whole,) = list(task.batches("calibration", 8))[:1]
    batch = list(examples([whole]))
    for here in weights(model)[::3]:
        rows, mean = own_gradients(model, here, batch, task.loss)
        loss = task.loss(model, whole)
        part = here.parts[0]
        (wanted,) = torch.autograd.grad(loss, model.get_parameter(part.name))
        torch.testing.assert_close(rows.mean(0).reshape(here.shape), part.view(wanted), rtol=1e-3, atol=1e-6)
        assert mean == pytest.approx(float(loss.detach()), rel=1e-5)


def test_curvatures() -> None:
    rows = draw(5, 3)
    torch.testing.assert_close(Fisher().hessian(rows, rows.sum), torch.stack([g.outer(g) for g in rows]).mean(0))
    torch.testing.assert_close(MeanGradient().hessian(rows, rows.sum), rows.mean(0).outer(rows.mean(0)))
    assert int(torch.linalg.matrix_rank(Fisher().hessian(draw(4, 30), rows.sum))) == 4
    model, task = trained("mlp"), make_task("mlp")
    batch, here = list(examples(task.batches("calibration", 4))), weights(model)[-1]
    places = torch.tensor([0, 5, 40])
    exact = exact_hessian(model, here, places, batch, task.loss)
    value, step = model.get_parameter(here.name), 1e-3
    before = own_gradients(model, here, batch, task.loss)[0].mean(0)
    with torch.no_grad():
        value.view(-1)[5] += step
    after = own_gradients(model, here, batch, task.loss)[0].mean(0)
    torch.testing.assert_close(exact[1], ((after - before) / step)[places].double(), rtol=0.02, atol=1e-4)


@pytest.mark.parametrize("family", ["decoder", "moe"])
def test_fused_attention_and_idle_experts_are_not_in_the_way_of_the_exact_hessian(family: str) -> None:
    """Fused attention has no second derivative, and an expert that sees no token no first."""
    model, task = trained(family).double(), make_task(family)
    model.config._experts_implementation = "eager"  # the grouped product knows no float64
    batch = list(examples(task.batches("calibration", 2)))
    here = next(s for s in weights(model) if s.name.endswith(("q_proj.weight", "q_proj")))
    places, step = torch.tensor([0, 7]), 1e-2  # norms are in float32
    value = model.get_parameter(here.parts[0].name)

    def slope() -> Tensor:
        found = [torch.autograd.grad(task.loss(model, each), value)[0].reshape(-1) for each in batch]
        return torch.stack(found).mean(0)[places]

    found, around = exact_hessian(model, here, places, batch, task.loss), []
    for way in (step, -2 * step):
        with torch.no_grad():
            value.view(-1)[7] += way
        around.append(slope())
    torch.testing.assert_close(found[1], (around[0] - around[1]) / (2 * step), rtol=0.03, atol=1e-5)
    assert float(found[1].abs().max()) > 1e-4
    if family == "moe":
        one = list(examples(task.batches("calibration", 1)))[:1]
        for idle in (s for s in weights(model) if "experts" in s.name):
            assert exact_hessian(model, idle, places, one, task.loss).isfinite().all()


def test_what_cannot_be_differentiated_twice_is_named() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):  # type: ignore[no-untyped-def]
            return x * 2

        @staticmethod
        @once_differentiable
        def backward(ctx, g):  # type: ignore[no-untyped-def]
            return g * 2

    class Net(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(super().forward(x))  # type: ignore[no-any-return, no-untyped-call]

    net, task = Net(*make_model("mlp")), make_task("mlp")
    batch = list(examples(task.batches("calibration", 1)))
    with pytest.raises(ModelError, match=r"exact Hessian of Net were asked for(.|\n)*Once(.|\n)*curvature=fisher"):
        exact_hessian(net, weights(net)[0], torch.tensor([0]), batch, task.loss)


# The search


@pytest.mark.parametrize("ones", [3, 6, 9])
def test_annealing_finds_what_trying_everything_finds(ones: int) -> None:
    for seed in range(4):
        matrix = draw(12, 12, seed=seed)
        matrix = matrix + matrix.T
        start = first(12, ones)
        best = Quadratic(matrix, 0.0).value(Exhaustive().minimise(matrix, start, seeded()))
        found = Anneal().minimise(matrix, start, seeded(seed))
        assert int(found.sum()) == ones
        assert Quadratic(matrix, 0.0).value(found) == pytest.approx(best)


def test_annealing_is_never_worse_than_the_start_and_repeats_itself() -> None:
    for seed in range(3):
        matrix, start = draw(60, 60, seed=seed), first(60, 20)
        matrix = 1e-9 * (matrix + matrix.T)  # a scale of the loss, not of one
        held = matrix.clone()
        short = Anneal(restarts=1, hot=1e-3, cold=2e-3)  # far too hot to find anything
        assert Quadratic(matrix, 0.0).value(short.minimise(matrix, start, seeded())) <= Quadratic(matrix, 0.0).value(
            start
        )
        assert torch.equal(
            Anneal(restarts=2).minimise(matrix, start, seeded(1)), Anneal(restarts=2).minimise(matrix, start, seeded(1))
        )
        assert torch.equal(matrix, held)
        few, many = (Quadratic(matrix, 0.0).value(Anneal(r).minimise(matrix, start, seeded())) for r in (1, 10))
        assert many <= few < Quadratic(matrix, 0.0).value(start)


def test_nothing_to_choose_is_left_as_it_is() -> None:
    matrix = draw(4, 4)
    for start in (first(4, 0), first(4, 4)):
        assert torch.equal(Anneal().minimise(matrix + matrix.T, start, seeded()), start)
    assert torch.equal(Anneal().minimise(torch.zeros(4, 4), first(4, 2), seeded()), first(4, 2))
    with pytest.raises(SettingError, match=r"leave 20 of 40[\s\S]*Use anneal"):
        Exhaustive().minimise(torch.eye(40), first(40, 20), seeded())
    with pytest.raises(SettingError, match="inverse temperatures are above 0"):
        Anneal(growth=1.0)


# The block


def test_the_surest_of_either_side_are_fixed() -> None:
    score = torch.tensor([[1.0, 2, 3, 4], [5, 6, 7, 8]])
    keep = score > 4
    assert fixed_sides(score, keep, 0.5, 0.25).tolist() == [[False, False, True, True], [True, True, True, False]]
    assert bool(fixed_sides(score, keep, 0, 0).all())


def test_a_block_is_the_best_of_what_is_out_and_the_worst_of_what_is_in() -> None:
    keep = torch.tensor([[False, False, False, False], [True, True, True, True]]).reshape(-1)
    score = torch.tensor([1.0, 4, 3, 2, 8, 5, 6, 7])
    layer = Layer(site(2, 4), torch.ones(8), keep, torch.ones(8, dtype=torch.bool))
    assert layer.pick(score, 4).tolist() == [1, 2, 5, 6]
    assert layer.pick(score, 5).tolist() == [1, 2, 5, 6, 7]
    layer.remember(torch.tensor([1, 2, 5, 6]), 0.5)
    assert layer.pick(score, 4).tolist() == [3, 0, 7, 4]
    layer.remember(torch.tensor([3, 0, 7, 4]), 0.5)  # four of eight rest: the first four are free again
    assert layer.tabu.tolist() == [3, 0, 7, 4]
    assert layer.pick(score, 4).tolist() == [1, 2, 5, 6]
    layer.remember(torch.tensor([1, 5]), 0.75)
    assert layer.tabu.tolist() == [3, 0, 7, 4, 1, 5]
    assert layer.pick(score, 6).tolist() == [2, 3, 0, 6, 7, 4]  # where a side runs out, what rested longest
    layer.free[:] = torch.tensor([1, 1, 0, 0, 1, 0, 0, 0], dtype=torch.bool)
    assert layer.pick(score, 3).tolist() == [0, 1, 4]  # all that is free, tabu or not
    layer.free[4] = False
    assert layer.pick(score, 2).tolist() == []  # nothing to swap with


def test_larger_layers_have_more_turns_and_each_has_some() -> None:
    order = turns([10, 1000, 100_000], 18, 1, seeded())
    assert [order.count(i) for i in range(3)] == [2, 6, 10]
    assert order != sorted(order)
    assert sorted(turns([10, 1000, 100_000], 4, 5, seeded())) == [0] * 5 + [1] * 5 + [2] * 5
    assert sorted(turns([7, 7, 7], 5, 0, seeded())) in ([0, 0, 1, 1, 2], [0, 0, 1, 2, 2], [0, 1, 1, 2, 2])
    assert len(turns([1, 1], 3, 0, seeded())) == 3


# The method

SHORT = {"samples": 64, "block": 64, "batch": 32, "search": Anneal(restarts=2), "every": 0}


def masks(model: nn.Module, method: ICBS, family: str = "mlp") -> dict[str, Tensor]:
    return {e.site.name: e.keep for e in prune(model, method, make_task(family)).edits if isinstance(e, Mask)}


@pytest.mark.parametrize("start", [Magnitude(), Wanda(), Random()], ids=lambda c: type(c).__name__)
def test_more_steps_lower_the_loss_at_the_same_count_per_layer(start: object) -> None:
    """The paper's claim at toy size: at 80 % the loss on new examples falls, further with more steps."""
    model, task = trained("mlp"), make_task("mlp")
    before = prune(model, OneShot(sparsity=0.8, samples=64, criterion=start), task)
    dense = {here.name: model.get_parameter(here.name) for here in weights(model)}
    losses = [task.measure(before.model, "test")["loss"]]
    for steps in (6, 30):
        done = prune(model, ICBS(sparsity=0.8, start=start, steps=steps, **SHORT), task)
        for old, new in zip(before.edits, done.edits, strict=True):
            assert int(new.keep.sum()) == int(old.keep.sum())
            value = done.model.get_parameter(new.site.name)
            assert torch.equal(value[new.keep], dense[new.site.name][new.keep])  # nothing but the mask has changed
            assert not bool(value[~new.keep].any())
        losses.append(task.measure(done.model, "test")["loss"])
    assert losses[2] < losses[1] < losses[0]
    assert losses[2] < 0.7 * losses[0]


def test_what_is_fixed_never_changes_sides() -> None:
    model, score = trained("mlp"), {here.name: here for here in weights(trained("mlp"))}
    method = ICBS(
        sparsity=0.8, start=Magnitude(), pattern=PerMatrix(), steps=20, fix_lowest=0.8, fix_highest=0.6, **SHORT
    )
    old = {e.site.name: e.keep for e in prune(model, ByMagnitude(sparsity=0.8), make_task("mlp")).edits}
    changed = 0
    for name, new in masks(model, method).items():
        free = fixed_sides(model.get_parameter(name).abs(), old[name], 0.8, 0.6)
        assert bool(free[new != old[name]].all())
        changed += int((new != old[name]).sum())
        assert score[name].shape == tuple(new.shape)
    assert changed


def test_a_step_is_predicted_by_the_quadratic_more_often_than_not() -> None:
    done = prune(trained("mlp"), ICBS(sparsity=0.8, start=Magnitude(), steps=30, **SHORT), make_task("mlp"))
    curves = done.record.curves
    predicted, real = (dict(curves[name]) for name in ("predicted change", "change of the batch's loss"))
    assert predicted.keys() == real.keys()
    assert all(value < 0 for value in predicted.values())  # never worse than to leave things as they are
    assert sum(value < 0 for value in real.values()) > 0.7 * len(real)
    assert len(curves["batch loss"]) == len(done.history.losses) == 30
    assert f"in {len(real)} of 30 steps" in done.notes[0]


def test_taking_moves_back_leaves_no_step_worse() -> None:
    settings = {**SHORT, "batch": 64, "block": 512}  # every step sees the same examples
    done = prune(trained("mlp"), ICBS(sparsity=0.9, start=Random(), steps=20, undo=True, **settings), make_task("mlp"))
    losses = done.history.losses
    assert all(b <= a + 1e-6 for a, b in pairwise(losses))
    assert losses[-1] < losses[0]


def test_the_quality_is_followed_over_steps_and_seconds() -> None:
    done = prune(trained("mlp"), ICBS(sparsity=0.8, steps=7, **{**SHORT, "every": 3}), make_task("mlp"))
    curves = done.record.curves
    for name in ("seconds", "validation accuracy", "validation loss"):
        assert [step for step, _ in curves[name]] == [0, 3, 6, 7]
    seconds = [value for _, value in curves["seconds"]]
    assert seconds == sorted(seconds)
    assert curves["validation accuracy"][-1][1] == make_task("mlp").measure(done.model, "val")["accuracy"]
    assert "seconds" not in prune(trained("mlp"), ICBS(steps=2, **SHORT), make_task("mlp")).record.curves


def test_a_report_draws_the_quality_against_time() -> None:
    charts = pytest.importorskip("secateur.report.charts")
    compare = pytest.importorskip("secateur.report.compare")
    done = prune(trained("mlp"), ICBS(steps=4, **{**SHORT, "every": 2}), make_task("mlp"))
    drawn = {d.title: d.spec for d in charts.curves(compare.points([done.record]))}
    assert "validation accuracy" in drawn
    assert "seconds" not in drawn
    assert "batch loss against time" not in drawn  # the clock was not looked at in every step
    timed = drawn["validation accuracy against time"]
    (rows,) = timed["datasets"].values() if "datasets" in timed else (timed["data"]["values"],)
    assert [row["seconds"] for row in rows] == [value for _, value in done.record.curves["seconds"]]
    assert [row["value"] for row in rows] == [value for _, value in done.record.curves["validation accuracy"]]


def test_every_part_can_be_another() -> None:
    model = trained("mlp")
    plain = masks(model, ICBS(sparsity=0.7, steps=6, **SHORT))
    for change in (
        {"curvature": MeanGradient()},
        {"refine": Dsnot()},
        {"released": True},
        {"search": Exhaustive(), "block": 10},
        {"curvature": ExactHessian(), "block": 8, "batch": 4},
        {"tabu": 0.0},
    ):
        found = masks(model, ICBS(**{"sparsity": 0.7, "steps": 6, **SHORT, **change}))
        assert any(not torch.equal(found[name], plain[name]) for name in plain), change
        assert all(int(found[name].sum()) == int(plain[name].sum()) for name in plain)


def test_settings_as_people_write_them() -> None:
    method = method_of("icbs(start=magnitude, search='anneal(restarts=2)', curvature=mean-gradient, refine=dsnot)")
    assert method == ICBS(start=Magnitude(), search=Anneal(restarts=2), curvature=MeanGradient(), refine=Dsnot())
    assert method_of(text_of_method(method)) == method


def test_dropout_is_off_and_comes_back() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 4)).train()
    first_, second = (masks(copy.deepcopy(model), ICBS(steps=6, **SHORT)) for _ in range(2))
    assert all(torch.equal(first_[name], second[name]) for name in first_)
    assert prune(model, ICBS(steps=2, **SHORT), make_task("mlp")).model.training


def test_a_layer_of_experts_is_searched_expert_by_expert(tmp_path) -> None:
    model, task = trained("moe"), make_task("moe")
    method = ICBS(
        sparsity=0.5, samples=16, steps=12, block=64, batch=4, search=Anneal(restarts=1), include=("expert",), every=0
    )
    done = prune(model, method, task)
    assert sum(int((e.keep == 0).sum()) for e in done.edits) == sum(e.site.units for e in done.edits) // 2
    save(done.edits, tmp_path / "edits.safetensors")
    again = copy.deepcopy(model)
    apply_(again, load(tmp_path / "edits.safetensors"))
    for mine, theirs in zip(done.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_searched_is_refused() -> None:
    task, model = make_task("mlp"), trained("mlp")
    pruned = prune(model, ByMagnitude(sparsity=0.8), task).model
    with pytest.raises(EvidenceError, match=r"zero already[\s\S]*Start from the dense model"):
        prune(pruned, ICBS(sparsity=0.7, start=Magnitude(), pattern=PerMatrix(), **SHORT), task)
    with pytest.raises(PatternError, match="would break that pattern"):
        prune(model, ICBS(pattern=NM(2, 4)), task)
    with pytest.raises(SettingError, match="nothing would be left out"):
        prune(model, ICBS(sparsity=0.0), task)
    with pytest.raises(SettingError, match="block=1 was asked for"):
        prune(model, ICBS(block=1), task)
    with pytest.raises(SettingError, match=r"tabu=1.5 was asked for[\s\S]*fraction"):
        prune(model, ICBS(tabu=1.5), task)
    with pytest.raises(SettingError, match="either is 0 or more"):
        prune(model, ICBS(ridge=-1.0), task)
    frozen = make_model("mlp")
    frozen[0].weight.requires_grad_(False)
    with pytest.raises(EvidenceError, match=r"0.weight[\s\S]*frozen"):
        prune(frozen, replace(ICBS(steps=6, **SHORT), pattern=PerRow()), task)


def test_a_search_that_was_cut_off_goes_on_where_it_was(tmp_path, monkeypatch):
    from secateur.methods import icbs

    monkeypatch.setattr(icbs, "ASIDE", 2)
    method = replace(ICBS(), **{**ICBS.tiny, "steps": 6, "epochs": 2, "every": 5})
    whole = method.run(make_model("mlp"), make_task("mlp"))
    step, seen = ICBS._step, []

    def breaks(self, *given):
        seen.append(1)
        if len(seen) == 8:
            raise KeyboardInterrupt
        return step(self, *given)

    monkeypatch.setattr(ICBS, "_step", breaks)
    with pytest.raises(KeyboardInterrupt), journal(tmp_path / "j", "one"):
        method.run(make_model("mlp"), make_task("mlp"))
    with journal(tmp_path / "j", "one"):
        again = method.run(make_model("mlp"), make_task("mlp"))
    steps = len(whole.history.losses)
    assert len(seen) == 8 + steps - 6  # 6 of the 7 steps that were done had been put aside
    assert again.history.losses == whole.history.losses
    for one, two in zip(whole.edits, again.edits, strict=True):
        assert torch.equal(one.keep, two.keep)
    curve = "validation accuracy"
    assert again.history.curves[curve] == whole.history.curves[curve]
