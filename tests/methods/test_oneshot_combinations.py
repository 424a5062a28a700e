"""Any criterion with any pattern, allocation, solver and refiner: what is legal runs, what is not says why."""

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tiny import make_model, make_task, toy_text, trained
from torch import nn

from secateur.axes import (
    NM,
    Allocation,
    Blocks,
    Criterion,
    Dsnot,
    Erk,
    Gblm,
    Global,
    Gradient,
    Magnitude,
    Obs,
    ObsSweep,
    Owl,
    Pattern,
    PerMatrix,
    PerRow,
    PerSlab,
    Random,
    Rank,
    Refiner,
    Uniform,
    Wanda,
    criteria,
    text_of,
    word_of,
)
from secateur.axes.recovery import Reconstruct, Recovery
from secateur.axes.subsets import Biases, Everything, Lora, LoraPrune, MaskLora, Norms, ScaleLora, Subset
from secateur.axes.sweep import fitted
from secateur.cli import main
from secateur.edit import Mask, Update
from secateur.errors import PatternError, SecateurError, SettingError, SiteError, TaskError
from secateur.method import Chain, Method, load, prune, settings
from secateur.methods.dsnot import DSnoT
from secateur.methods.gblm import GBLMPruner
from secateur.methods.oneshot import OneShot
from secateur.methods.perp import Perp
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.wanda import Wanda as WandaMethod
from secateur.outcome import Outcome
from secateur.recipe import build, settings_of
from secateur.site import Part, Site

CRITERIA = [Magnitude(), Random(), Wanda(), Obs(), Gradient(), Gblm()]
PATTERNS = [PerMatrix(), PerRow(), PerSlab(16), NM(2, 4), Blocks(4, 1)]
ALLOCATIONS = [Uniform(), Erk(), Global(floor=0.002), Owl(outlier=2.0)]
SOLVERS = [Rank(), ObsSweep(block=16)]
REFINERS = [None, Dsnot(rounds=4)]


@cache
def model() -> nn.Module:
    return make_model("decoder")


def method(
    criterion: Criterion, pattern: Pattern, allocation: Allocation, solver: Rank | ObsSweep, refine: Refiner | None
) -> OneShot:
    return OneShot(samples=4, criterion=criterion, pattern=pattern, allocation=allocation, solver=solver, refine=refine)


def legal(made: OneShot) -> bool:
    """What should go together, said once more.

    Swaps keep the counts of rows or groups, and need the dense weights; a sweep has a criterion of its own.
    """
    if made.refine is not None and (isinstance(made.pattern, (Blocks, PerSlab)) or isinstance(made.solver, ObsSweep)):
        return False
    return not isinstance(made.solver, ObsSweep) or made.criterion == Wanda() or made.allocation.needs_scores


EVERY = [method(*parts) for parts in itertools.product(CRITERIA, PATTERNS, ALLOCATIONS, SOLVERS, REFINERS)]
LEGAL = [made for made in EVERY if legal(made)]
ILLEGAL = [made for made in EVERY if not legal(made)]


def name(made: OneShot) -> str:
    parts = (made.criterion, made.pattern, made.allocation, made.solver, made.refine)
    return "-".join("none" if part is None else text_of(part) for part in parts)


def meets(made: OneShot, done: Outcome) -> None:
    masks = [e for e in done.edits if isinstance(e, Mask)]
    assert len(masks) == 14
    for mask in masks:
        assert made.pattern.nearest(mask.site.shape, mask.kept) == mask.kept
        assert torch.equal(mask.keep, made.pattern.select(mask.keep.float(), mask.kept))  # the choice is legal
        assert bool((done.model.get_parameter(mask.site.name)[~mask.keep] == 0).all())
    kept, units = sum(mask.kept for mask in masks), sum(mask.site.units for mask in masks)
    slack = 64 if isinstance(made.pattern, PerRow) else 4  # half a row of the last matrices, a block
    assert abs(kept - units / 2) <= (0 if made.allocation == Uniform() else slack)
    assert any(isinstance(e, Update) for e in done.edits) == isinstance(made.solver, ObsSweep)
    spends = made.pattern.fixed is not None and made.allocation != Uniform()
    assert [note for note in done.notes if "nothing to spend" in note] == done.notes
    assert bool(done.notes) == spends


@pytest.mark.parametrize("criterion", CRITERIA, ids=text_of)
def test_every_legal_combination_runs_and_meets_its_budget(criterion: Criterion) -> None:
    made = [each for each in LEGAL if each.criterion == criterion]
    assert len(made) >= 28
    for each in made:
        try:
            meets(each, prune(model(), each, make_task("decoder")))
        except AssertionError as error:
            raise AssertionError(name(each)) from error


def test_every_other_combination_is_refused_with_the_reason_before_any_data_is_read() -> None:
    assert len(ILLEGAL) + len(LEGAL) == 480
    for each in ILLEGAL:
        with pytest.raises(SecateurError) as caught:
            each.check()
        assert caught.value.do
        reasons = ("would break that pattern", "cannot come back", "a saliency of its own")
        assert any(reason in caught.value.found for reason in reasons), name(each)


def test_every_criterion_is_in_the_matrix() -> None:
    """One that is added has to be tried here too."""
    kinds = {v for v in vars(criteria).values() if isinstance(v, type) and v.__module__ == criteria.__name__}
    assert {type(c) for c in CRITERIA} == {v for v in kinds if hasattr(v, "score")} - {Criterion}


def test_what_a_pattern_rounds_at_one_matrix_the_next_makes_up_for() -> None:
    shapes = ((4, 10), (3, 10), (2, 10), (1, 9))
    sites = [Site(str(i), "weight", shape, (Part(str(i), shape),)) for i, shape in enumerate(shapes)]
    found = fitted(sites, {"0": 18, "1": 16, "2": 9, "3": 9}, PerRow())
    # 18 makes 20, two too many; 14 makes 15, one too many; 8 is even; 9 is all there is
    assert found == {"0": 20, "1": 15, "2": 8, "3": 9}
    assert sum(found.values()) == 52
    assert fitted(sites, {"0": 50, "1": 0, "2": 0, "3": 0}, PerMatrix()) == {"0": 40, "1": 10, "2": 0, "3": 0}


def test_the_reasons_are_given() -> None:
    with pytest.raises(PatternError, match="sparsity=0.5"):
        OneShot(pattern=NM(2, 4), sparsity=0.7).check()
    with pytest.raises(SettingError, match=r"changes the weights as it chooses[\s\S]*criterion=obs"):
        OneShot(solver=ObsSweep(), refine=Dsnot()).check()
    with pytest.raises(SettingError, match=r"uniform looks at no scores[\s\S]*such as owl"):
        OneShot(solver=ObsSweep(), criterion=Gblm()).check()
    with pytest.raises(PatternError, match=r"would break that pattern[\s\S]*per-row"):
        OneShot(pattern=Blocks(4, 1), refine=Dsnot()).check()
    with pytest.raises(SettingError, match="there is no refiner"):
        OneShot(only=("attention",)).check()
    with pytest.raises(SettingError, match=r"a setting beside it[\s\S]*Give criterion=obs instead"):
        OneShot(solver=Rank(Obs())).check()
    with pytest.raises(SettingError, match=r"Give pattern=2:4 instead"):
        OneShot(solver=ObsSweep(NM(2, 4))).check()
    with pytest.raises(SettingError, match="none of the matrices"):
        prune(make_model("mlp"), OneShot(samples=4, refine=Dsnot(), only=("attention",)), make_task("mlp"))


QUICK = {"steps": 2, "rate": 1e-3}


@pytest.mark.parametrize("subset", [Norms(), MaskLora(rank=2), LoraPrune(rank=2), ScaleLora(rank=2), Everything()])
@pytest.mark.parametrize("pattern", [PerRow(), NM(2, 4), Blocks(4, 1)], ids=text_of)
def test_whatever_chose_the_zeros_a_recovery_keeps_them(pattern: Pattern, subset: Subset) -> None:
    for solver, refine in itertools.product(SOLVERS, REFINERS):
        made = OneShot(
            samples=4, pattern=pattern, solver=solver, refine=refine, recover=Perp(subsets=(subset,), **QUICK)
        )
        if not legal(made):
            continue
        done = prune(model(), made, make_task("decoder"))
        plain = prune(model(), replace(made, recover=None), make_task("decoder"))
        masks = [e for e in done.edits if isinstance(e, Mask)]
        assert [m.describe() for m in masks] == [e.describe() for e in plain.edits if isinstance(e, Mask)]
        assert all(bool((done.model.get_parameter(m.site.name)[~m.keep] == 0).all()) for m in masks)
        assert done.ledger.sparsity == plain.ledger.sparsity
        assert len(done.history.losses) == 2
        changed = {e.name for e in done.edits[len(plain.edits) :]}
        assert changed
        assert not all(torch.equal(done.model.get_parameter(n), plain.model.get_parameter(n)) for n in changed)
        assert any("zeros were kept in place" in note for note in done.notes)


def test_a_recovery_is_what_a_chain_would_have_made_and_knows_the_dense_blocks() -> None:
    task, dense = make_task("decoder"), trained("decoder")
    perp = Perp(steps=3, rate=1e-3)
    first = prune(dense, OneShot(samples=4, recover=perp), task)
    chained = prune(dense, Chain((OneShot(samples=4), perp)), task)
    assert all(torch.equal(v, chained.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    rebuilt = prune(dense, OneShot(samples=8, recover=Perp(by=Reconstruct(samples=8), steps=30, rate=5e-3)), task)
    before, after = (dict(rebuilt.history.curves[f"block error {when}"]) for when in ("before", "after"))
    assert all(0 < after[i] < before[i] for i in before)


RECOVERIES: list[tuple[Method, str, str]] = [
    (WandaMethod(), "it prunes.", "recover=perp"),
    (Perp(after=WandaMethod()), "it prunes first, by wanda", "without after"),
    (Perp(subsets=(Norms(), Lora())), "merging them would fill the zeros in", "Use mask-lora"),
    (Perp(subsets=()), "it trains nothing", "subsets=norms,mask-lora"),
    (Perp(steps=0), "steps start at 1", "steps=1000"),
]


@pytest.mark.parametrize(("recover", "found", "do"), RECOVERIES, ids=lambda x: x if isinstance(x, str) else "")
def test_a_recovery_that_could_not_be_is_refused_before_any_data_is_read(recover: Method, found: str, do: str) -> None:
    with pytest.raises(SettingError) as caught:
        OneShot(recover=recover).check()
    assert found in str(caught.value)
    assert do in caught.value.do
    assert isinstance(recover, Recovery) == (recover.name == "perp")


def test_a_recovery_that_could_not_work_is_refused_before_anything_is_pruned() -> None:
    """Pruning takes hours and recovery comes last: what it lacks is said first."""

    def refused(recover: Perp, kind: type[SecateurError], match: str, family: str = "decoder", task=None) -> None:
        model = make_model(family)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        with pytest.raises(kind, match=match):
            prune(model, OneShot(samples=4, recover=recover), task or make_task(family), inplace=True)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    short = toy_text(batch=8)
    ids = {**short.ids, "train": short.ids["train"][: 3 * short.window]}
    few = type(short)("short", ids, window=short.window, batch=8)
    refused(Perp(**QUICK), TaskError, r"3 examples, and a batch is 8[\s\S]*a batch of 3 at most", task=few)
    nothing = "model.layers.*.mpl.*"
    refused(Perp(include=(nothing,), **QUICK), SiteError, r"mpl[\s\S]*it matches no parameter")
    refused(Perp(by=Reconstruct(), **QUICK), SiteError, "it has no stack of blocks", "mlp")
    with pytest.raises(SiteError, match="it has none of them"):  # what there is to train is known when it is pruned
        prune(make_model("decoder"), OneShot(samples=4, recover=Perp(subsets=(Biases(),))), make_task("decoder"))


def test_published_methods_are_combinations() -> None:
    """The same parts give the same edits, whichever method they are given to."""
    task, dense = make_task("decoder"), trained("decoder")

    def same(first: object, second: object) -> bool:
        one, other = prune(dense, first, task), prune(dense, second, task)
        states = zip(one.model.state_dict().values(), other.model.state_dict().values(), strict=True)
        return all(torch.equal(a, b) for a, b in states)

    assert same(WandaMethod(samples=4), OneShot(samples=4))
    assert same(GBLMPruner(samples=4, pattern=NM(2, 4)), OneShot(samples=4, criterion=Gblm(), pattern=NM(2, 4)))
    assert same(DSnoT(samples=4), OneShot(samples=4, refine=Dsnot(), only=("attention",)))
    assert same(SparseGPT(samples=8), OneShot(samples=8, pattern=PerSlab(), solver=ObsSweep()))
    assert not same(DSnoT(samples=4), WandaMethod(samples=4))


def test_parts_written_as_text_are_those_of_python() -> None:
    typed = {"criterion": "gblm", "pattern": "2:4", "allocation": "owl", "refine": "dsnot"}
    made = build(OneShot, typed)
    assert made == OneShot(criterion=Gblm(), pattern=NM(2, 4), allocation=Owl(), refine=Dsnot())
    assert build(OneShot, settings(made)) == made
    changed = build(OneShot, {**typed, "criterion.alpha": "10", "refine.rounds": "5", "refine.threshold": "1e-4"})
    assert changed.criterion == Gblm(alpha=10)
    assert changed.refine == Dsnot(rounds=5, threshold=1e-4)
    assert build(OneShot, {"solver": "obs-sweep(block=64)"}).solver == ObsSweep(block=64)
    assert build(DSnoT, {"start": "obs", "refine.overshoot": "no", "only": "mlp"}).refine == Dsnot(overshoot=False)
    assert type(build(GBLMPruner, {"criterion": "inverse-gradient"}).criterion).__name__ == "InverseGradient"
    assert build(GBLMPruner, {"criterion": "gblm(alpha=100)"}).criterion == Gblm(alpha=100.0)
    with pytest.raises(SettingError, match="Did you mean gblm"):
        build(OneShot, {"criterion": "gbml"})
    assert set(settings_of(OneShot)) >= {"criterion", "pattern", "allocation", "solver", "refine", "only"}
    assert word_of(Dsnot) == "dsnot"
    mended = build(OneShot, {**typed, "recover": "perp(steps=9, subsets='norms,mask-lora(rank=4)')"})
    assert mended.recover == Perp(steps=9, subsets=(Norms(), MaskLora(rank=4)))
    assert build(OneShot, settings(mended)) == mended
    assert build(OneShot, {"recover": "perp", "recover.steps": "9"}).recover == Perp(steps=9)
    with pytest.raises(SettingError, match="Did you mean perp"):
        build(OneShot, {"recover": "prep"})
    assert load("oneshot") is OneShot


def test_the_parts_are_options_of_the_command_line(tmp_path: Path) -> None:
    parts = ["--criterion", "gblm", "--pattern", "2:4", "--allocation", "owl", "--refine", "dsnot", "--samples", "4"]
    parts += ["--recover", "perp", "--recover.steps", "3"]
    command = ["prune", "tiny:decoder", "oneshot", *parts, "--task", "tiny:toy_text", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*command, "--refine.rounds", "9", "--no-eval"])
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "out" / "secateur.json").read_text())
    assert record["settings"]["refine"] == "dsnot(rounds=9)"
    assert record["ledger"]["removed"] * 2 == record["ledger"]["prunable"]
    assert any("nothing to spend" in note for note in record["notes"])
    assert record["settings"]["recover"]["steps"] == 3
    assert any("zeros were kept in place" in note for note in record["notes"])
    again = CliRunner().invoke(main, ["prune", "tiny:decoder", "oneshot", "--recover", "wanda", "--out", "x"])
    assert again.exit_code == 2
    assert "recover=perp" in again.output
