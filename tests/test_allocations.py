"""One budget, spread over sites: totals exact, floors respected, impossible targets refused."""

import itertools

import pytest
import torch

from secateur.axes import Erk, Global, Owl, Uniform, kept_of
from secateur.errors import BudgetError, SettingError
from secateur.method import Budget
from secateur.site import Part, Site


def site(name: str, *shape: int, block: str = "") -> Site:
    return Site(name, "weight", shape, (Part(name, shape),), block=block)


def ranked(sites: list[Site], scale: dict[str, float] | None = None) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {s.name: torch.randn(s.shape, generator=draw) * (scale or {}).get(s.name, 1.0) for s in sites}


SITES = [site("a", 10, 10), site("b", 30, 10), site("c", 4, 5)]


@pytest.mark.parametrize(
    ("units", "sparsity", "kept"), [(10, 0.3, 7), (10, 0.0, 10), (576, 0.5, 288), (3, 0.5, 2), (10, 0.999, 1)]
)
def test_kept_is_all_but_the_floor_of_what_goes(units: int, sparsity: float, kept: int) -> None:
    assert kept_of(units, sparsity) == kept


def test_uniform_gives_every_site_its_share() -> None:
    assert Uniform().spread(SITES, Budget(0.25)) == {"a": 75, "b": 225, "c": 15}


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.9, 0.99])
def test_global_equals_one_sort_of_everything(sparsity: float) -> None:
    scores = {k: v.abs() for k, v in ranked(SITES, {"b": 3.0}).items()}
    found = Global().spread(SITES, Budget(sparsity), scores)
    flat = torch.cat([scores[s.name].reshape(-1) for s in SITES])
    keep = kept_of(len(flat), sparsity)
    best = torch.argsort(flat, stable=True)[len(flat) - keep :]
    edges = [0, 100, 400, 420]
    wanted = [int(((best >= a) & (best < b)).sum()) for a, b in itertools.pairwise(edges)]
    assert list(found.values()) == wanted


def test_global_ranks_negative_scores_and_ties_right() -> None:
    sites = [site("a", 1, 4), site("b", 1, 4)]
    scores = {"a": torch.tensor([[-1.0, 0, 0, 2]]), "b": torch.tensor([[-2.0, -0.0, 0, 1]])}
    # ascending: b0, a0, then the zeros in order a1 a2 b1 b2, then b3, a3
    assert Global().spread(sites, Budget(0.5), scores) == {"a": 1, "b": 3}


def test_a_floor_keeps_a_site_alive_and_the_total_exact() -> None:
    scores = {k: v.abs() for k, v in ranked(SITES, {"c": 1e-6}).items()}
    plain = Global().spread(SITES, Budget(0.9), scores)
    assert plain["c"] == 0  # the layer has collapsed
    floored = Global(floor=0.01).spread(SITES, Budget(0.9), scores)
    assert floored["c"] == 4
    assert sum(floored.values()) == sum(plain.values()) == 42


def test_floors_that_leave_nothing_to_choose_are_refused() -> None:
    with pytest.raises(BudgetError, match=r"the floors alone keep 246 of 420[\s\S]*at most 0.4143"):
        Global(floor=0.3).spread(SITES, Budget(0.9), ranked(SITES))


def test_erk_density_falls_with_size_and_the_total_is_exact() -> None:
    found = Erk().spread(SITES, Budget(0.7))
    density = {s.name: found[s.name] / s.units for s in SITES}
    assert sum(found.values()) == kept_of(420, 0.7) == 126
    assert density["c"] > density["a"] > density["b"]
    raw = {s.name: sum(s.shape) / s.units for s in SITES}
    assert density["a"] / density["b"] == pytest.approx(raw["a"] / raw["b"], rel=0.05)


def test_erk_holds_a_density_above_one_at_one() -> None:
    sites = [site("big", 100, 100), site("small", 2, 2)]
    found = Erk().spread(sites, Budget(0.9))
    assert found["small"] == 4
    assert sum(found.values()) == kept_of(10004, 0.9)


def test_owl_by_hand() -> None:
    sites = [site("x", 1, 10, block="0"), site("y", 1, 10, block="1")]
    calm, loud = torch.ones(1, 10), torch.ones(1, 10)
    loud[0, 0] = 91.0  # mean 10: one of ten is above 5 * mean -> D = 10, against 0
    # raw = [0, 2 * 0.1]; mean 0.1; density = raw - 0.1 + 0.5 = [0.4, 0.6]
    found = Owl(outlier=5.0, reach=0.1).spread(sites, Budget(0.5), {"x": calm, "y": loud})
    assert found == {"x": 4, "y": 6}


def test_owl_of_equal_blocks_is_uniform_and_unequal_sizes_still_meet_the_target() -> None:
    sites = [site("x", 1, 10, block="0"), site("y", 3, 10, block="1")]
    same = {"x": torch.ones(1, 10), "y": torch.ones(3, 10)}
    assert Owl().spread(sites, Budget(0.5), same) == {"x": 5, "y": 15}
    loud = torch.ones(3, 10)
    loud[:, 0] = 91.0
    found = Owl(reach=0.2).spread(sites, Budget(0.5), {"x": torch.ones(1, 10), "y": loud})
    assert sum(found.values()) == 20  # weighted by size, not by block
    found = Owl(reach=0.9).spread(sites, Budget(0.9), {"x": torch.ones(1, 10), "y": loud})
    assert sum(found.values()) == kept_of(40, 0.9)  # clipped to [0.01, 0.99], and still exact


@pytest.mark.parametrize("allocation", [Global(), Owl()], ids=str)
def test_scores_are_asked_for(allocation: object) -> None:
    with pytest.raises(SettingError, match="no scores were given"):
        allocation.spread(SITES, Budget(0.5))


@pytest.mark.parametrize(
    ("value", "hint"), [(30, "Did you mean 0.3"), (1.0, "Did you mean 0.01"), (-0.1, "such as 0.5")]
)
def test_a_sparsity_outside_zero_to_one_is_refused(value: float, hint: str) -> None:
    with pytest.raises(SettingError, match=hint):
        Budget(value)
