"""Each lesson has a comparison that breaks it and one that does not; passports say what the records say."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur import prune
from secateur.errors import SettingError, TaskError
from secateur.method import Chain, load, names
from secateur.outcome import Exported, Timing
from secateur.report.compare import points
from secateur.report.lessons import findings, passport
from secateur.studies.ten_lessons import Passport, lint
from secateur.tasks.robustness import Noisy, calibration_error, robustness
from tests.test_cli import run, said
from tests.tiny import mlp, toy_text, toy_vectors

PLAIN = Passport(
    name="ours", method="ours", asked=0.5, sparsity=0.5, denominator="prunable weights", origin="dense-to-sparse",
    when="during training", pattern=frozenset({"weight"}), execution="smaller", seeds=3, quality=0.8, parameters=500,
    steps=100, compute=50.0, mean_density=0.75, peak_density=1.0,
)  # fmt: skip
TWIN = replace(PLAIN, name="dense", method="dense", sparsity=0.0, origin="dense", parameters=505, quality=0.7)
RANDOM = replace(PLAIN, name="random", method="random", quality=0.6)
MAGNITUDE = replace(PLAIN, name="magnitude", method="magnitude", quality=0.7)
WHOLE = (PLAIN, TWIN, RANDOM, MAGNITUDE)


def lessons(*passports: Passport, dense: float | None = 0.9, **more: float) -> dict[int, str]:
    """The lessons that say more than a remark, and what."""
    return {f.lesson: f.message for f in lint(passports, dense, **more) if f.level != "info"}


def test_a_sound_comparison_is_let_be() -> None:
    assert lessons(*WHOLE) == {}
    assert lint([]) == []


BROKEN = {
    1: (PLAIN, RANDOM, MAGNITUDE),
    2: (*WHOLE, replace(PLAIN, name="channels", method="channels", pattern=frozenset({"channel"}))),
    4: (*WHOLE, replace(PLAIN, name="starts sparse", origin="sparse-to-sparse", compute=10.0, peak_density=0.5)),
    5: (*WHOLE, replace(PLAIN, name="moves", updates=9, explored=1.0)),
    6: (*WHOLE, replace(PLAIN, name="early", when="before training", compute=None)),
    8: (replace(PLAIN, seeds=1), *WHOLE[1:]),
    9: (PLAIN, TWIN, RANDOM),
    10: (PLAIN, TWIN, replace(RANDOM, quality=0.892), replace(MAGNITUDE, quality=0.7)),
}


@pytest.mark.parametrize("lesson", BROKEN)
def test_what_breaks_a_lesson_is_told_with_a_remedy(lesson: int) -> None:
    found = [f for f in lint(BROKEN[lesson], 0.9) if f.lesson == lesson and f.level != "info"]
    assert found
    assert all(f.message and f.remedy.endswith((".", "`")) for f in found)


def test_a_dense_network_of_another_size_is_no_twin() -> None:
    assert 1 not in lessons(*WHOLE)
    told = lessons(PLAIN, replace(TWIN, parameters=550), RANDOM, MAGNITUDE)[1]
    assert told.startswith("the dense networks beside ours at 50%, random at 50%")
    assert told.endswith("differ from them in size, by up to 10%")
    assert "itself was not measured" in lessons(*WHOLE, dense=None)[1]
    posted = [replace(p, origin="post-training", steps=None) for p in (PLAIN, RANDOM, MAGNITUDE)]
    assert lessons(*posted) == {}, "nobody trains a small network beside a pruned one that was not trained"


def test_a_masked_network_that_is_said_to_be_faster_is_an_error() -> None:
    first, *_ = lint([replace(PLAIN, execution="masked", faster=True), *WHOLE[1:]], 0.9)
    assert (first.level, first.lesson) == ("error", 2)
    assert 2 not in lessons(replace(PLAIN, faster=True), *WHOLE[1:])


def test_who_starts_sparse_is_not_called_pruned() -> None:
    sparse = replace(PLAIN, name="rigl", origin="sparse-to-sparse", peak_density=0.5)
    assert [f.message for f in lint([sparse, TWIN], 0.9) if f.lesson == 3] == [
        "rigl: trained sparse from the start, not pruned"
    ]
    assert not [f for f in lint(WHOLE, 0.9) if f.lesson == 3]


def test_origins_may_be_ranked_at_equal_cost() -> None:
    sparse = replace(PLAIN, name="rigl", origin="sparse-to-sparse", peak_density=0.5)
    assert 4 not in lessons(*WHOLE, replace(sparse, compute=52.0))
    assert "never held more than 50% of the weights" in lessons(*WHOLE, replace(sparse, compute=40.0))[4]
    assert "cost is not known" in lessons(*WHOLE, replace(sparse, compute=None))[4]


def test_origins_are_ranked_at_one_sparsity() -> None:
    low = [replace(p, name=p.name + "!", asked=0.3, sparsity=0.3, compute=90.0) for p in (PLAIN, RANDOM, MAGNITUDE)]
    low.append(replace(TWIN, asked=0.3))
    early = replace(PLAIN, name="rigl", origin="sparse-to-sparse", compute=50.0)
    assert 4 not in lessons(*WHOLE, *low, early), "at 50 % all took as much, and at 30 % all began dense"
    apart = replace(PLAIN, name="granet", compute=80.0), replace(early, name="granet", asked=0.3, sparsity=0.3)
    told = lessons(*WHOLE, *low, early, *apart)[4]
    assert "granet at 50% began dense" not in told and "granet at 50%" in told and "granet at 30% sparse" in told


@pytest.mark.parametrize(
    ("sparsity", "updates", "explored", "told"),
    [
        (0.8, 10, 0.4, False),
        (0.8, 9, 0.4, True),
        (0.8, 50, 0.39, True),
        (0.8, 50, None, False),
        (0.5, 50, 0.7, False),  # twice of a half is all there is
    ],
)
def test_a_mask_that_moves_tries_twice_what_it_keeps(
    sparsity: float, updates: int, explored: float | None, told: bool
) -> None:
    moving = replace(PLAIN, name="rigl", asked=sparsity, sparsity=sparsity, updates=updates, explored=explored)
    assert (5 in lessons(*WHOLE, moving)) is told


def test_what_was_trained_is_not_held_against_what_was_not() -> None:
    plain = [replace(p, origin="post-training") for p in (RANDOM, MAGNITUDE)]
    untrained = replace(PLAIN, name="wanda", method="wanda", origin="post-training", quality=0.72)
    assert "wanda is 0.02 ahead of magnitude" in str(lint([*WHOLE, untrained, *plain], 0.9))
    assert "nothing of random masks and magnitude" in lessons(*WHOLE, untrained)[9]
    assert "--epochs" in next(f.remedy for f in lint([PLAIN, TWIN, *plain], 0.9) if f.lesson == 9)


def test_masks_are_called_simulated() -> None:
    assert [f.lesson for f in lint([replace(PLAIN, execution="masked"), *WHOLE[1:]], 0.9) if f.lesson == 7] == [7]
    assert not [f for f in lint(WHOLE, 0.9) if f.lesson == 7]


@pytest.mark.parametrize(
    "change", [{"sparsity": 0.498}, {"steps": 90, "compute": 45.0}, {"seeds": 2}], ids=["sparsity", "steps", "seeds"]
)
def test_budgets_are_met_and_equal(change: dict[str, float]) -> None:
    assert 8 in lessons(replace(PLAIN, **change), *WHOLE[1:])


def test_a_budget_is_of_steps_or_of_operations() -> None:
    cheap = replace(PLAIN, name="rigl", origin="sparse-to-sparse", steps=200)
    assert not {4, 8} & lessons(*WHOLE, cheap).keys(), "twice the steps of half the cost"
    (remark,) = (f for f in lint([*WHOLE, cheap], 0.9) if f.lesson == 8)
    assert remark.message.endswith("trained for fewer steps than the longest of 200, and as many operations")
    for compute in (25.0, 100.0):
        assert lessons(*WHOLE, replace(cheap, compute=compute))[8].endswith("fewer steps than the longest of 200")
    assert 8 in lessons(*WHOLE, replace(cheap, compute=None))


def test_what_removed_nothing_is_no_dense_twin() -> None:
    nothing = replace(PLAIN, name="nothing", sparsity=0.0, parameters=1000)
    assert lessons(nothing, *WHOLE)[8].startswith("nothing at 50% reached 0.00% of the prunable weights where 50.00%")


def test_structures_are_not_held_against_masks_of_single_weights() -> None:
    channels = replace(PLAIN, name="channels", method="channels", pattern=frozenset({"channel"}), quality=0.3)
    assert 9 not in lessons(*WHOLE, channels)
    assert 9 not in lessons(channels, TWIN)


def test_the_gain_is_over_the_better_baseline() -> None:
    assert [f.message for f in lint(WHOLE, 0.9) if f.lesson == 9] == [
        "at 50% ours is 0.1 ahead of magnitude, the best that needs no method"
    ]
    assert "behind magnitude" in lessons(replace(PLAIN, quality=0.65), *WHOLE[1:])[9]
    unsure = [replace(p, half=0.05) for p in (replace(PLAIN, quality=0.65), *WHOLE[1:])]
    assert 9 not in lessons(*unsure)
    falling = [replace(p, quality=20 - 10 * (p.quality or 0)) for p in WHOLE]  # a perplexity
    assert 9 not in lessons(*falling, dense=11.0, higher=False)


def test_noise_that_takes_more_than_of_dense_is_told() -> None:
    assert (
        "takes 0.100 of the accuracy of ours at 50%, 0.050"
        in lessons(replace(PLAIN, noisy=0.7), *WHOLE[1:], dense_noisy=0.85)[10]
    )
    assert 10 not in lessons(replace(PLAIN, noisy=0.74), *WHOLE[1:], dense_noisy=0.85)


def test_a_sparsity_of_nothing_said_is_refused() -> None:
    with pytest.raises(SettingError, match="it is not said what it is a fraction of"):
        replace(PLAIN, denominator="")


# From records


def recorded(name: str, seed: int = 0, **settings: object):
    outcome = prune(mlp(), load(name)(**settings), toy_vectors(seed=seed), measure="val", timing=False)
    return outcome.record


def test_passports_say_what_the_records_say() -> None:
    gradual = recorded("gradual", sparsity=0.5, steps=40, every=5)
    rigl = recorded("rigl", sparsity=0.5, steps=40, every=5)
    magnitude = recorded("magnitude", sparsity=0.5)
    before, _, after = (passport(p) for p in points([gradual, rigl, magnitude]))
    moving = passport(points([rigl])[0])
    assert (before.origin, before.when, before.execution) == ("dense-to-sparse", "during training", "masked")
    assert (after.origin, after.steps, after.updates) == ("post-training", None, None)
    assert moving.updates == 5 and 0.5 < moving.explored <= 1
    assert after.parameters == magnitude.ledger.after.parameters - magnitude.ledger.after.zeros
    assert after.denominator == "prunable weights" and after.pattern == {"weight"}


def test_who_starts_sparse_is_known_without_curves_of_density() -> None:
    rigl = recorded("rigl", sparsity=0.5, steps=10, every=5)
    for record in (rigl, replace(rigl, curves={}), recorded("set", sparsity=0.5, steps=10, every=5)):
        assert passport(points([record])[0]).origin == "sparse-to-sparse"
    devices = replace(rigl, method="fedtiny", settings={"sparsity": 0.5, "pretrain": 0})
    assert passport(points([devices])[0]).origin == "sparse-to-sparse"
    whole = replace(devices, settings={"sparsity": 0.5, "pretrain": 100})
    assert passport(points([whole])[0]).origin == "dense-to-sparse"
    assert passport(points([recorded("granet", sparsity=0.9, steps=20, every=5)])[0]).origin == "dense-to-sparse"


def test_the_card_says_who_starts_sparse() -> None:
    rigl = replace(recorded("rigl", sparsity=0.5, steps=10, every=5), curves={}, settings={"sparsity": 0.5})
    during = [name for name in names() if load(name).card.when == "during training"]
    found = {n for n in during if passport(points([replace(rigl, method=n)])[0]).origin == "sparse-to-sparse"}
    assert found == {"set", "rigl", "fedtiny"}  # not granet, which may start dense


def test_a_chain_of_masks_was_asked_for_the_largest() -> None:
    masks = Chain((load("magnitude")(sparsity=0.5), load("wanda")(sparsity=0.75)))
    chain = prune(mlp(), masks, toy_vectors(), measure="val", timing=False).record
    assert not [f for f in findings([chain, recorded("magnitude", sparsity=0.5)]) if "was asked for" in f.message]


def test_a_run_that_removed_nothing_is_told_of() -> None:
    record = recorded("magnitude", sparsity=0.5)
    nothing = replace(record, method="mine", ledger=replace(record.ledger, removed=0, after=record.ledger.before))
    assert passport(points([nothing])[0]).origin == "post-training"
    assert any("mine at 50% reached 0.00%" in f.message for f in findings([record, nothing]))


def test_noise_is_compared_with_accuracy_alone() -> None:
    plain = recorded("magnitude", sparsity=0.5)
    noisy = {"before": 0.35, "after": 0.1}
    measured = [replace(m, values={**m.values, "accuracy under noise": noisy[m.when]}) for m in plain.measurements]
    both = [replace(plain, measurements=measured), replace(plain, method="mine", measurements=measured)]
    assert [f for f in findings(both) if f.lesson == 10 and "noise" in f.message]
    losses = [replace(r, task={**r.task, "metric": "loss", "higher_is_better": False}) for r in both]
    assert not [f for f in findings(losses) if f.lesson == 10 and "noise" in f.message]


def test_what_was_packed_is_not_simulated() -> None:
    record = recorded("magnitude", sparsity=0.5)
    made = Exported("sparse", "here", 1, 2, "float32", 0.0, "secateur", "now")
    assert passport(points([replace(record, exports=[made])])[0]).execution == "packed"


def test_a_masked_run_is_never_said_to_be_faster() -> None:
    record = recorded("magnitude", sparsity=0.5)
    slow, fast = (Timing(ms, 0.1, 20, 2, 1, "float32") for ms in (2.0, 1.0))
    timed = replace(record, ledger=replace(record.ledger, timing_before=slow, timing_after=fast))
    assert not passport(points([timed])[0]).faster


def test_one_run_is_compared_with_nothing() -> None:
    assert findings([recorded("magnitude", sparsity=0.5)]) == []


def test_a_comparison_tells_the_lessons_and_strict_fails(tmp_path: Path) -> None:
    args = ["compare", "tests.tiny:mlp", "--task", "tests.tiny:toy_vectors", "--methods", "wanda", "--no-timing"]
    found = json.loads(run(*args, "--out", tmp_path / "a.html", "--json").stdout)
    assert 8 in {f["lesson"] for f in found["lessons"]}
    assert "lesson 8: " in run(*args, "--out", tmp_path / "a.html").stdout
    assert "but it breaks 8" in said(run(*args, "--out", tmp_path / "a.html", "--strict", code=2))
    page = (tmp_path / "a.html").read_text()
    assert "Before these are ranked" in page and "masked-dense (simulated)" in page
    places = tmp_path / "a-records"
    assert "it breaks" in said(run("report", places, "--out", tmp_path / "b.html", "--strict", code=2))


# Robustness


def test_calibration_error_by_hand() -> None:
    # Bins (0.5, 0.5667], (0.7333, 0.8], (0.9333, 1]: one right of two, the one right, the one wrong.
    said = torch.tensor([[0.55, 0.45], [0.45, 0.55], [0.2, 0.8], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1, 0])
    expected = (abs(1 - 2 * 0.55) + abs(1 - 0.8) + abs(0 - 1.0)) / 4
    assert calibration_error(said, labels) == pytest.approx(expected)
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0
    with pytest.raises(TaskError, match="there are no examples"):
        calibration_error(torch.zeros(0, 2), torch.zeros(0))


def test_noise_is_drawn_by_the_seed_and_as_large_as_asked() -> None:
    x = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))
    first, again, other = (Noisy(nn.Identity(), 0.5, seed)(x) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert float((first - x).std()) == pytest.approx(0.5 * float(x.std()), rel=0.03)
    assert torch.equal(Noisy(nn.Identity(), 0.5, 0)(torch.arange(3)), torch.arange(3))


def test_robustness_is_for_classifiers() -> None:
    found = robustness(mlp(), toy_vectors(), "val")
    assert set(found) == {"calibration error", "accuracy under noise"} and 0 <= found["calibration error"] <= 1
    assert robustness(mlp(), toy_text(), "val") == {}
