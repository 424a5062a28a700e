"""ECoFLaP: the solver by hand, slopes against gradients, no graph and no trace, budgets of towers, where it ends."""

import copy
import gc
import math
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_model, make_task, trained
from torch import Tensor, nn
from two_towers import captioned, clip, trained_clip

from secateur import Budget, prune, walk
from secateur.axes import (
    Ecoflap,
    FirstOrder,
    ObsSweep,
    PerBlock,
    PerMatrix,
    PerSite,
    PerTower,
    ZerothOrder,
    part_of,
    text_of,
)
from secateur.axes import zeroth_order as axis
from secateur.axes.zeroth_order import capped, component, slopes, tower
from secateur.cut import weights
from secateur.errors import BudgetError, EvidenceError, PatternError, SettingError, SiteError
from secateur.evidence import observe
from secateur.methods.ecoflap import ECoFLaP
from secateur.methods.magnitude import Magnitude
from secateur.methods.oneshot import OneShot
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda
from secateur.outcome import Outcome
from secateur.site import Part, Site
from secateur.task import Batch

VISION, TEXT = "vision_model", "text_model"
QUICK = ZerothOrder(samples=32, draws=2)


def site(name: str, units: int, block: str = "") -> Site:
    return Site(name, "weight", (1, units), (Part(name, (1, units)),), block=block)


def lost(done: Outcome, where: str) -> float:
    """The sparsity of what lies in a component."""
    rows = [row for row in done.record.sites if row.site.startswith(where)]
    return 1 - sum(row.kept for row in rows) / sum(row.units for row in rows)


# The solver


def test_the_rest_over_the_floors_goes_by_score_by_hand() -> None:
    # four groups of 100, half to stay, none to lose more than 60: 40 each, and of the 40 left 1/8, 1/8, 2/8, 4/8
    assert capped([1, 1, 2, 4], [100] * 4, 200, [40] * 4) == pytest.approx([45, 45, 50, 60])
    # by the score, not by score times size: the group of 300 gets no more than that of 100
    assert capped([1, 1], [100, 300], 200, [10, 30]) == pytest.approx([90, 110])


def test_what_a_full_group_cannot_take_goes_to_the_others_and_without_scores_by_room() -> None:
    assert capped([1, 1, 1, 97], [100] * 4, 240, [20] * 4) == pytest.approx([140 / 3] * 3 + [100])
    assert capped([0, 0, 0, 5], [100] * 4, 200, [20] * 4) == pytest.approx([100 / 3] * 3 + [100])
    assert capped([0, 0], [100, 50], 75, [0, 0]) == pytest.approx([50, 25])


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(1, 500)), min_size=1, max_size=12),
    st.floats(0, 0.95),
    st.floats(0, 0.3),
)
def test_every_budget_is_met_to_the_weight_between_floor_and_all(groups, sparsity: float, reach: float) -> None:
    sites = [site(f"b{i}.w", n, f"b{i}") for i, (_, n) in enumerate(groups)]
    scores = {s.name: torch.tensor(a) for s, (a, _) in zip(sites, groups, strict=True)}
    most = min(1.0, sparsity + reach)
    total = sum(n for _, n in groups)
    keep = total - int(sparsity * total + 1e-9)
    if 1 - keep / total > most + 1e-6:
        return
    found = Ecoflap(most=most).spread(sites, Budget(sparsity), scores)
    assert sum(found.values()) == keep  # the released code ends above it: it adds what it should take back
    for s in sites:
        assert 0 <= found[s.name] <= s.units
        assert found[s.name] >= math.floor(s.units * (1 - most) - 1e-6) - 1


def test_a_limit_at_the_target_is_uniform_and_one_below_it_is_refused() -> None:
    sites = [site("a.w", 100, "a"), site("b.w", 100, "b")]
    scores = {"a.w": torch.tensor(9.0), "b.w": torch.tensor(1.0)}
    assert Ecoflap(most=0.5).spread(sites, Budget(0.5), scores) == {"a.w": 50, "b.w": 50}
    assert Ecoflap().spread(sites, Budget(0.5), scores) == {"a.w": 58, "b.w": 42}  # floors of 40, 20 shared 9 to 1
    with pytest.raises(BudgetError, match=r"sparsity of 0.5 of the rest was asked for(.|\n)*at most 0.4 there"):
        Ecoflap(most=0.4).spread(sites, Budget(0.5), scores)


def test_tensors_of_a_group_share_a_sparsity_and_sums_or_averages_decide_between_groups() -> None:
    sites = [site("a.q", 100, "a"), site("a.k", 300, "a"), site("b.q", 100, "b")]
    scores = {"a.q": torch.tensor(2.0), "a.k": torch.tensor(2.0), "b.q": torch.tensor(4.0)}
    summed = Ecoflap(most=0.6).spread(sites, Budget(0.5), scores)
    assert summed == {"a.q": 46, "a.k": 139, "b.q": 65}  # floors 160 and 40; 50 left, 25 each: 185/400 and 65/100
    average = Ecoflap(most=0.6, average=1.0).spread(sites, Budget(0.5), scores)
    assert average == {"a.q": 43, "a.k": 127, "b.q": 80}  # scores 4/400 and 4/100: 10 and 40
    alone = Ecoflap(most=0.6, per=PerSite()).spread(sites, Budget(0.5), scores)
    assert alone["b.q"] == 65
    assert alone["a.q"] == pytest.approx(52, abs=1)  # 40 + 50 * 2/8


# How steep the loss is


def test_the_mean_slope_is_the_norm_of_the_gradient() -> None:
    model, task = trained("mlp", steps=20), make_task("mlp")
    sites, batches = weights(model), list(task.batches("calibration", 32))
    felt = ZerothOrder(samples=32, draws=300).steepness(model, sites, batches, task)
    norms = FirstOrder(samples=32, power=0, order=2).steepness(model, sites, batches, task)
    for name, norm in norms.items():
        assert felt[name] / norm == pytest.approx(math.sqrt(2 / math.pi), rel=0.15), name
    pair = torch.tensor([[felt[n], norms[n]] for n in norms]).T
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9


def test_over_two_towers_few_draws_rank_tensors_as_gradients_do() -> None:
    model, task = trained_clip(), captioned()
    sites, batches = weights(model), list(task.batches("calibration", 32))
    felt = ZerothOrder(samples=32, draws=16).steepness(model, sites, batches, task)
    norms = FirstOrder(samples=32, power=0, order=2).steepness(model, sites, batches, task)
    pair = torch.tensor([[felt[s.name], norms[s.name]] for s in sites]).log().T
    assert float(torch.corrcoef(pair)[0, 1]) > 0.9
    assert {tower(s) for s in sites} == {f"{VISION}.encoder.layers", f"{TEXT}.encoder.layers"}


def test_first_order_scores_equal_the_plain_formulas() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    sites, batches = weights(model), list(task.batches("calibration", 64))
    assert len(batches) == 2
    grads: list[dict[str, Tensor]] = []
    for batch in batches:
        found = torch.autograd.grad(task.loss(model, batch), [model.get_parameter(s.name) for s in sites])
        grads.append({s.name: g for s, g in zip(sites, found, strict=True)})
    for s in sites:
        w = model.get_parameter(s.name).detach().abs()
        plain = {
            0: sum(g[s.name].abs().sum() for g in grads) / 2,
            1: sum((w * g[s.name].abs()).sum() for g in grads) / 2,
            2: sum((w.square() * g[s.name].square()).sum() for g in grads) / 2,
        }
        for power, expected in plain.items():
            got = FirstOrder(power=power).steepness(model, sites, batches, task)[s.name]
            assert got == pytest.approx(float(expected), rel=1e-5)


def test_there_is_no_graph_no_backward_pass_and_no_noise_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    model, task = clip(), captioned()
    sites, batches = weights(model), list(task.batches("calibration", 32))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    noises: list[weakref.ref] = []
    plain = torch.randn

    def counted(*args, **kwargs) -> Tensor:
        drawn = plain(*args, **kwargs)
        assert drawn.numel() <= 200  # never a whole tensor of 32 x 32
        noises.append(weakref.ref(drawn))
        return drawn

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a backward pass")

    passes = 0

    class Watched:
        seed = 0

        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            nonlocal passes
            passes += 1
            assert not torch.is_grad_enabled()
            gc.collect()
            assert not [ref for ref in noises if ref() is not None]  # what remains of the noise is its seed
            value = task.loss(model, batch)
            assert value.grad_fn is None
            return value

    monkeypatch.setattr(axis, "CHUNK", 200)
    monkeypatch.setattr(torch, "randn", counted)
    monkeypatch.setattr(torch.autograd, "backward", never)
    monkeypatch.setattr(torch.autograd, "grad", never)
    some = sites[:3]
    ZerothOrder(samples=32, draws=2).steepness(model, some, batches, Watched())
    assert passes == 2 * 2 * len(some) * len(batches)
    assert len(noises) > 2 * passes  # drawn again and again, in pieces
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_beside_the_model_there_is_one_tensor_and_one_piece_of_noise() -> None:
    """The memory of it: nothing that is made while tensors are moved is as large as the largest of them but one."""
    from torch.utils._python_dispatch import TorchDispatchMode

    big, small = nn.Parameter(torch.randn(400, 1000)), nn.Parameter(torch.randn(10, 10))
    alive: dict[int, int] = {}
    peak = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal peak
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in ours:
                key = out.untyped_storage().data_ptr()
                alive[key] = out.untyped_storage().nbytes()
                weakref.finalize(out, alive.pop, key, None)
                peak = max(peak, sum(alive.values()))
            return out

    ours = {big.untyped_storage().data_ptr(), small.untyped_storage().data_ptr()}
    with Watch():
        found = list(slopes(lambda: (big[0, :4] * small[0, :4]).sum().detach(), [big.detach()], [1, 2, 3], 1e-3))
    assert len(found) == 3
    assert peak <= big.nbytes + 6 * 4 * axis.CHUNK  # the copy, and a few pieces


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_moved_is_put_back_bit_for_bit_whatever_happens(dtype: torch.dtype) -> None:
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = weight.clone()
    list(slopes(lambda: weight.float().square().sum(), [weight], range(20), 1e-3))
    assert torch.equal(weight, before)
    calls = iter(range(5))

    def failing() -> Tensor:
        if next(calls) == 3:
            raise RuntimeError("out of memory")
        return weight.float().sum()

    with pytest.raises(RuntimeError, match="out of memory"):
        list(slopes(failing, [weight], range(20), 1e-3))
    assert torch.equal(weight, before)
    drifting = before.clone()  # what adding, taking away twice and adding again would have left
    for seed in range(20):
        for times in (1, -2, 1):
            noise = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)).to(dtype)
            drifting.add_(noise, alpha=times * 1e-3)
    assert not torch.equal(drifting, before)


def test_noise_follows_the_seed_of_the_task_and_leaves_the_global_one_alone() -> None:
    model = clip()
    sites = weights(model)[:2]

    def felt(seed: int) -> dict[str, float]:
        batches = list(captioned().batches("calibration", 32))
        return QUICK.steepness(model, sites, batches, captioned(seed))

    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = felt(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(6)
    assert felt(0) == first
    assert felt(1) != first


def test_dropout_is_off_and_the_mode_comes_back() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.fc, self.idle = nn.Dropout(0.5), nn.Linear(16, 4), nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(self.drop(x))

    model, task = Noisy().train(), make_task("mlp")
    sites = weights(model, exclude=())
    felt = QUICK.steepness(model, sites, list(task.batches("calibration", 32)), task)
    assert felt["idle.weight"] == 0  # with dropout on, two passes would differ without any reason
    assert felt["fc.weight"] > 0
    assert model.training


def test_moving_whole_blocks_takes_fewer_passes_and_keeps_the_sum() -> None:
    model, task = trained_clip(), captioned()
    sites, batches = weights(model), list(task.batches("calibration", 32))
    counted = Counting(task)
    felt = ZerothOrder(draws=8, together=PerBlock()).steepness(model, sites, batches, counted)
    assert counted.passes == 2 * 8 * 5 * len(batches)
    norms = FirstOrder(power=0, order=2).steepness(model, sites, batches, task)
    for block in {s.block for s in sites}:
        mine = sum(felt[s.name] for s in sites if s.block == block)
        whole = math.sqrt(sum(norms[s.name] ** 2 for s in sites if s.block == block))
        assert 0.3 < mine / whole / math.sqrt(2 / math.pi) < 2.5


class Counting:
    """A task that counts the losses asked of it."""

    def __init__(self, task) -> None:
        self.task, self.seed, self.passes = task, task.seed, 0

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        self.passes += 1
        return self.task.loss(model, batch)


def test_a_loss_that_feels_nothing_or_is_not_finite_is_an_error() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    sites, batches = weights(model), list(task.batches("calibration", 32))

    class Flat(Counting):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return torch.zeros(())

    class Broken(Counting):
        def loss(self, model: nn.Module, batch: Batch) -> Tensor:
            return torch.tensor(torch.nan)

    scores = Ecoflap(QUICK).scores_of(model, sites, batches, Flat(task))
    with pytest.raises(EvidenceError, match=r"at 3 sites, but it is 0 at all of them(.|\n)*larger step"):
        Ecoflap().spread(sites, Budget(0.5), scores)
    with pytest.raises(EvidenceError, match=r"while 0.weight is moved, but its slope is nan"):
        QUICK.steepness(model, sites, batches, Broken(task))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert any(QUICK.steepness(model, sites, batches, task).values())  # frozen weights can be felt all the same
    with pytest.raises(EvidenceError, match="it is frozen"):
        FirstOrder().steepness(model, sites, batches, task)


def test_settings_that_cannot_work_are_refused() -> None:
    for bad in ({"draws": 0}, {"step": 0.0}, {"samples": 0}, {"power": 3}):
        with pytest.raises(SettingError):
            ZerothOrder(**bad)
    with pytest.raises(SettingError, match="a norm of order 3"):
        FirstOrder(order=3)
    with pytest.raises(SettingError, match="at most 1.5 of a group"):
        Ecoflap(most=1.5)
    with pytest.raises(SettingError, match="prescribes what every matrix keeps"):
        prune(make_model("decoder"), ECoFLaP(pattern=part_of("2:4")), make_task("decoder"))


# Two towers


def test_the_walk_goes_through_both_towers_and_sees_what_the_whole_model_sees() -> None:
    model, task = trained_clip(), captioned()
    sites, batches = weights(model), list(task.batches("calibration", 64))
    whole = observe(model, sites, batches, {"input_square"})
    met = []
    for block in walk(model, batches, feed="dense"):
        met.append(block.name)
        for name, seen in block.observe(block.pick(sites), {"input_square"}).items():
            assert seen.count == whole[name].count
            torch.testing.assert_close(seen.sums["input_square"], whole[name].sums["input_square"])
    assert len([name for name in met if name.startswith(VISION)]) == 3
    assert len([name for name in met if name.startswith(TEXT)]) == 2


def test_both_towers_are_pruned_out_of_one_budget_block_by_block() -> None:
    done = prune(trained_clip(), ECoFLaP(sparsity=0.6, samples=32, allocation=Ecoflap(QUICK)), captioned())
    assert done.ledger.sparsity == pytest.approx(0.6, abs=0.005)
    blocks = {row.block for row in done.record.sites}
    assert len(blocks) == 5
    for block in blocks:
        rows = [row for row in done.record.sites if row.block == block]
        each = [1 - row.kept / row.units for row in rows]
        assert max(each) - min(each) < 0.04  # a block shares a sparsity, up to whole rows
        assert max(each) <= 0.7 + 0.04
    assert max(lost(done, b) for b in blocks) - min(lost(done, b) for b in blocks) > 0.05


def test_towers_may_have_budgets_of_their_own_and_the_rest_makes_up_for_the_total() -> None:
    model, task = trained_clip(), captioned()
    one = ECoFLaP(sparsity=0.6, samples=32, allocation=Ecoflap(QUICK, towers=(f"{VISION}=0.5",)))
    done = prune(model, one, task)
    assert lost(done, VISION) == pytest.approx(0.5, abs=0.01)
    assert lost(done, TEXT) == pytest.approx(0.75, abs=0.01)  # 3 blocks at 0.5 and 2 at 0.75 make 0.6
    both = Ecoflap(QUICK, towers=(f"{VISION}=0.6", f"{TEXT}=0.6"))  # the paper's option of a budget per model
    done = prune(model, ECoFLaP(sparsity=0.6, samples=32, allocation=both), task)
    assert lost(done, VISION) == pytest.approx(0.6, abs=0.01)
    assert lost(done, TEXT) == pytest.approx(0.6, abs=0.01)
    towers = Ecoflap(QUICK, per=PerTower())
    done = prune(model, ECoFLaP(sparsity=0.6, samples=32, allocation=towers), task)
    assert len({round(lost(done, row.block), 2) for row in done.record.sites}) == 2


@pytest.mark.parametrize(
    ("towers", "most", "error", "text"),
    [
        ((f"{VISION}=0.1",), None, BudgetError, r"between 0.0600 and 0.4600, whatever the rest keeps"),
        ((f"{VISION}=0.5", f"{TEXT}=0.5"), None, BudgetError, r"these make 0.5000\.\nAsk for a sparsity of 0.5000"),
        ((f"{VISION}=0.5",), 0.7, BudgetError, r"0.75 of text_model.encoder.layers(.|\n)*at most 0.7 there"),
        (("vision=0.5",), None, SiteError, r"'vision' was named(.|\n)*Did you mean vision_model"),
        (("visual_projection=0.5",), None, SiteError, r"nothing that is to be pruned lies in it"),
        ((f"{VISION}=0.6", f"{VISION}.encoder.layers.0=0.6"), None, SettingError, r"lies in two of them"),
    ],
)
def test_budgets_that_do_not_fit_together_are_refused_before_the_model_is_run(towers, most, error, text) -> None:
    sites = weights(clip())

    class Unread(dict):
        def __missing__(self, name: str) -> Tensor:
            raise AssertionError("the model was run")

    with pytest.raises(error, match=text):
        Ecoflap(towers=towers, most=most).spread(sites, Budget(0.6), Unread())


@pytest.mark.parametrize("text", ["vision_model", "=0.5", "vision_model=half", "vision_model=1.2"])
def test_a_budget_of_a_tower_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SettingError):
        Ecoflap(towers=(text,))
    with pytest.raises(SettingError, match="has one already"):
        Ecoflap(towers=("a=0.5", "a=0.6"))


def test_a_component_that_is_not_there_is_refused_with_the_nearest() -> None:
    with pytest.raises(SiteError, match=r"'visoin_model' was named(.|\n)*Did you mean vision_model"):
        prune(clip(), ECoFLaP(samples=4, whole=("visoin_model",)), captioned())
    with pytest.raises(SiteError, match="This model has no towers"):
        component(weights(make_model("mlp")), "vision_model")


def test_a_tower_may_be_ranked_by_matrix_and_the_other_by_row() -> None:
    done = prune(
        trained_clip(), ECoFLaP(sparsity=0.6, samples=32, allocation=Ecoflap(QUICK), whole=(VISION,)), captioned()
    )
    uneven = {e.site.name for e in done.edits if len(set(e.keep.sum(1).tolist())) > 1}
    assert uneven
    assert all(name.startswith(VISION) for name in uneven)
    assert done.ledger.sparsity == pytest.approx(0.6, abs=0.005)


def test_the_fine_stage_may_be_sparsegpt() -> None:
    method = ECoFLaP(sparsity=0.6, samples=64, allocation=Ecoflap(QUICK), solver=ObsSweep(), pattern=PerMatrix())
    done = prune(trained_clip(), method, captioned())
    assert done.ledger.sparsity == pytest.approx(0.6, abs=0.001)
    assert any(type(edit).__name__ == "Update" for edit in done.edits)


# As an allocation


@pytest.mark.parametrize("kind", [OneShot, Wanda, SparseGPT])
def test_any_one_shot_method_takes_it(kind: type) -> None:
    changes = {**kind.tiny, "sparsity": 0.6, "allocation": Ecoflap(ZerothOrder(draws=1))}
    done = prune(trained("decoder"), kind(**changes), make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.6, abs=0.02)
    assert len({round(lost(done, f"model.layers.{i}."), 2) for i in range(2)}) == 2


def test_it_goes_with_a_criterion_that_needs_no_data_and_is_refused_by_a_method_without_any() -> None:
    done = prune(
        trained("decoder"),
        OneShot(samples=4, criterion=part_of("magnitude"), allocation=Ecoflap(QUICK)),
        make_task("decoder"),
    )
    assert done.ledger.sparsity == pytest.approx(0.5, abs=0.02)
    with pytest.raises(SettingError, match=r"follows the loss over calibration data(.|\n)*Use oneshot"):
        prune(trained("decoder"), Magnitude(allocation=Ecoflap()), make_task("decoder"))
    with pytest.raises(SettingError, match="nothing to say how steep the loss is"):
        Ecoflap().spread(weights(make_model("mlp")), Budget(0.5))


def test_it_can_be_written_as_text() -> None:
    for part in (Ecoflap(), Ecoflap(FirstOrder(power=2), per=PerTower(), most=0.7, towers=("a=0.4", "b=0.5"))):
        assert part_of(text_of(part)) == part
    assert text_of(Ecoflap()) == "ecoflap"


def test_more_spread_out_budgets_prune_better_than_uniform_ones_where_towers_differ() -> None:
    """The claim at toy size: one tower does nothing that could not be left out, and ECoFLaP finds that."""
    model, task = trained_clip(), captioned()
    blocks = [
        m for name, m in model.named_modules() if name.startswith(f"{VISION}.encoder.layers.") and name.count(".") == 3
    ]
    for block in blocks[1:]:  # what these blocks add is made small, so that their weights hardly matter
        for linear in (block.self_attn.out_proj, block.mlp.fc2):
            linear.weight.data *= 0.02
            linear.bias.data *= 0.02
    quality = {}
    for seed in range(3):
        here = replace(task, seed=seed)
        even = prune(model, Wanda(sparsity=0.8, samples=64), here).model
        spread = prune(model, ECoFLaP(sparsity=0.8, samples=64, allocation=Ecoflap(most=0.95)), here).model
        quality[seed] = (task.measure(spread)["loss"], task.measure(even)["loss"])
    assert all(ours < theirs for ours, theirs in quality.values()), quality


# Saved, and from the command line


def test_a_pruned_clip_loads_with_stock_transformers(tmp_path: Path) -> None:
    from transformers import CLIPModel

    from secateur.models import open_model, save

    trained_clip().save_pretrained(tmp_path / "dense")
    opened = open_model(tmp_path / "dense")
    task = captioned()
    done = prune(opened.model, ECoFLaP(sparsity=0.6, samples=16, allocation=Ecoflap(QUICK)), task, inplace=True)
    save(done, opened, tmp_path / "pruned")
    again = CLIPModel.from_pretrained(tmp_path / "pruned").eval()
    batch = task.example
    with torch.no_grad():
        ours, theirs = (batch.through(m).logits_per_image for m in (done.model, again))
    torch.testing.assert_close(ours, theirs)
    zeros = sum(int((p == 0).sum()) for p in again.parameters())
    assert zeros >= done.ledger.removed


def test_the_callers_model_is_left_alone() -> None:
    model = trained_clip()
    before = copy.deepcopy(model.state_dict())
    prune(model, ECoFLaP(samples=8, allocation=Ecoflap(QUICK)), captioned())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pattern_of_rows_keeps_the_total() -> None:
    done = prune(trained_clip(), ECoFLaP(sparsity=0.55, samples=8, allocation=Ecoflap(QUICK)), captioned())
    rows = max(row.units for row in done.record.sites)
    assert abs(done.ledger.removed - 0.55 * done.ledger.prunable) <= rows / 32
    with pytest.raises(PatternError):
        prune(trained_clip(), ECoFLaP(pattern=part_of("2:4"), sparsity=0.6), captioned())
