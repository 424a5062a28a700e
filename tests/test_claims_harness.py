"""The harness of the claims: its statistics against hand-worked cases, its verdicts, and that it can be resumed."""

import json
from dataclasses import asdict, replace

import pytest

from claims import harness
from claims.harness import Claim, Expectation, Journal, conclude, find, interval, judge, measure, sign_test
from secateur.claims import Cell, ClaimResult, claim_schema, results
from secateur.errors import EvidenceError, ModelError, ResumeError, SettingError

BETTER = Expectation("wanda beats magnitude", left="wanda", right="magnitude", metric="perplexity")


def claim(**changes):
    given = {
        "name": "toy",
        "number": 0,
        "says": "Wanda beats magnitude.",
        "source": "a paper",
        "here": "on a toy",
        "conditions": ("magnitude", "wanda"),
        "expects": (BETTER,),
    }
    return Claim(**{**given, **changes})


def seen(wanda, magnitude):
    pairs = enumerate(zip(wanda, magnitude, strict=True))
    return {seed: {"wanda": {"perplexity": w}, "magnitude": {"perplexity": m}} for seed, (w, m) in pairs}


def test_interval_of_three_values_worked_by_hand():
    # mean 2, standard deviation 1, t(2) = 4.3027: 2 -+ 4.3027 / sqrt(3) = 2 -+ 2.4841
    low, high = interval([1.0, 2.0, 3.0])
    assert low == pytest.approx(-0.4841, abs=1e-4)
    assert high == pytest.approx(4.4841, abs=1e-4)
    assert interval([1.0]) == (None, None)


def test_sign_test_worked_by_hand():
    assert sign_test(3, 0) == 0.25  # 2 * (1/2)^3
    assert sign_test(5, 0) == 0.0625
    assert sign_test(4, 1) == 0.375  # 2 * (1 + 5) / 32
    assert sign_test(0, 0) == 1.0


@pytest.mark.parametrize(
    ("low", "high", "margin", "verdict"),
    [
        (0.1, 0.5, 0.0, "holds"),
        (-0.1, 0.5, 0.0, "inconclusive"),
        (-0.5, -0.1, 0.0, "does not hold at this size"),
        (0.1, 0.5, 1.0, "does not hold at this size"),  # there, but smaller than was claimed
        (-0.4, -0.1, -0.5, "holds"),  # worse, but by less than allowed
        (None, None, 0.0, "inconclusive"),
    ],
)
def test_verdict_is_where_the_interval_lies(low, high, margin, verdict):
    assert judge(low, high, margin) == verdict


def test_advantage_is_paired_by_seed():
    # the seeds differ by far more than the methods do: only the pairing shows the difference
    found = find(BETTER, seen(wanda=[10.0, 20.0, 30.0], magnitude=[11.0, 21.1, 30.9]))
    assert found.verdict == "holds"
    assert found.advantage == pytest.approx(1.0)
    assert found.wins == 3
    assert found.sign_p == 0.25
    assert found.low > 0.7


def test_direction_is_that_of_the_metric():
    losing = seen(wanda=[11.0, 21.1, 30.9], magnitude=[10.0, 20.0, 30.0])
    assert find(BETTER, losing).verdict == "does not hold at this size"
    assert find(replace(BETTER, better="higher"), losing).verdict == "holds"


def test_ratio_is_a_factor():
    expected = replace(BETTER, ratio=True, margin=2.0)
    found = find(expected, seen(wanda=[10.0, 20.0, 30.0], magnitude=[40.0, 80.4, 119.0]))
    assert found.advantage == pytest.approx(4.0, rel=0.01)
    assert found.low > 3.9
    assert found.verdict == "holds"
    assert find(replace(expected, margin=5.0), seen([10.0, 20.0], [40.0, 80.4])).verdict == "does not hold at this size"
    with pytest.raises(EvidenceError, match="Compare values that are not positive by difference"):
        find(expected, seen([0.0, 1.0], [1.0, 1.0]))


def test_seeds_that_change_nothing_are_one_measurement():
    same = seen(wanda=[1.0, 1.0, 1.0], magnitude=[2.0, 2.0, 2.0])
    assert find(BETTER, same).verdict == "inconclusive"
    assert find(replace(BETTER, exact=True), same).verdict == "holds"


def test_a_number_can_be_beaten():
    assert find(replace(BETTER, right=5.0), seen([1.0, 2.0, 1.5], [0.0] * 3)).verdict == "holds"


def cells(wanda, magnitude=(20.0, 21.0, 22.0)):
    pairs = {"wanda": wanda, "magnitude": magnitude}
    return [Cell(c, seed, {"perplexity": v}, 1.0) for c, row in pairs.items() for seed, v in enumerate(row)]


def test_claim_holds_only_when_every_central_expectation_does():
    weak = replace(BETTER, says="by ten", margin=10.0)
    won = cells(wanda=(15.0, 16.1, 17.0))
    assert conclude(claim(), won).verdict == "holds"
    assert conclude(claim(expects=(BETTER, weak)), won).verdict == "does not hold at this size"
    assert conclude(claim(expects=(BETTER, replace(weak, central=False))), won).verdict == "holds"


def test_figures_carry_every_seed():
    figure = conclude(claim(), cells(wanda=(15.0, 16.0, 17.0))).figures[0]
    assert (figure.condition, figure.metric, figure.mean) == ("magnitude", "perplexity", 21.0)
    assert figure.seeds == {0: 20.0, 1: 21.0, 2: 22.0}


def test_conditions_without_randomness_are_measured_once():
    asked = claim(conditions=("dense", "wanda"), once=("dense",), expects=(replace(BETTER, right="dense"),))
    assert asked.cells() == [("dense", 0), ("wanda", 0), ("wanda", 1), ("wanda", 2)]
    result = conclude(asked, [Cell("dense", 0, {"perplexity": 20.0}), *cells(wanda=(15.0, 16.1, 17.0))[:3]])
    assert result.verdict == "holds"
    dense = next(f for f in result.figures if f.condition == "dense")
    assert dense.seeds == {0: 20.0}
    assert dense.low is None


def test_conditions_can_be_calculated_from_measured_ones():
    def gap(measured):
        return {"gap": {"perplexity": measured["magnitude"]["perplexity"] - measured["wanda"]["perplexity"]}}

    expected = Expectation("the gap is above four", left="gap", right=4.0, metric="perplexity", better="higher")
    assert conclude(claim(derive=gap, expects=(expected,)), cells((15.0, 16.1, 17.0))).verdict == "holds"


def cell(condition, seed, settings):
    return {"perplexity": {"wanda": 10.0, "magnitude": 15.0}[condition] + seed + 0.1 * settings.get("more", 0)}


def test_a_killed_run_goes_on_where_it_was(tmp_path):
    done = []

    def dies(condition, seed, settings):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((condition, seed))
        return cell(condition, seed, settings)

    with pytest.raises(KeyboardInterrupt):
        measure(claim(), dies, where=tmp_path, say=lambda _: None)
    assert len((tmp_path / "toy.partial").read_text().splitlines()) == 4
    asked = []

    def counts(condition, seed, settings):
        asked.append((condition, seed))
        return cell(condition, seed, settings) | {"perplexity": cell(condition, seed, settings)["perplexity"] + 0.01}

    result = measure(claim(), counts, where=tmp_path, say=lambda _: None)
    assert asked == [c for c in claim().cells() if c not in done]
    assert ClaimResult.read(tmp_path / "toy.json") == result
    assert not (tmp_path / "toy.partial").exists()


def test_half_a_line_is_measured_again(tmp_path):
    journal = Journal(tmp_path / "toy.partial", "f")
    first, second = Cell("wanda", 0, {"perplexity": 1.0}), Cell("wanda", 1, {"perplexity": 2.0})
    journal.add(first)
    with (tmp_path / "toy.partial").open("a") as file:
        file.write('{"condition": "wanda", "seed": 1, "values": {"perplexity": 2.0}')
    assert Journal(tmp_path / "toy.partial", "f").cells == [first]
    journal.add(second)
    assert Journal(tmp_path / "toy.partial", "f").cells == [first, second]


def test_two_runs_share_a_journal(tmp_path):
    one, two = Journal(tmp_path / "toy.partial", "f"), Journal(tmp_path / "toy.partial", "f")
    one.add(Cell("wanda", 0, {"perplexity": 1.0}))
    two.add(Cell("magnitude", 0, {"perplexity": 2.0}))
    two.add(Cell("wanda", 0, {"perplexity": 3.0}))
    assert [(c.condition, c.values["perplexity"]) for c in one.cells] == [("wanda", 1.0), ("magnitude", 2.0)]


def test_judging_anew_does_not_claim_to_have_measured(tmp_path):
    measured = replace(measure(claim(), cell, where=tmp_path, say=lambda _: None), created="then", commit="abc")
    measured.write(tmp_path / "toy.json")
    harder = claim(expects=(replace(BETTER, margin=10.0),))
    again = measure(harder, lambda *_: pytest.fail("nothing is missing"), where=tmp_path, say=lambda _: None)
    assert (again.created, again.commit) == ("then", "abc")
    assert again.findings[0].margin == 10.0


def test_other_settings_are_refused(tmp_path):
    assert measure(claim(), cell, only=["wanda"], where=tmp_path, say=lambda _: None) is None
    with pytest.raises(ResumeError, match="Give --fresh to measure anew"):
        measure(claim(settings={"more": 1}), cell, where=tmp_path, say=lambda _: None)
    assert measure(claim(settings={"more": 1}), cell, fresh=True, where=tmp_path, say=lambda _: None) is not None


def test_a_further_seed_keeps_what_was_measured(tmp_path):
    measure(claim(), cell, where=tmp_path, say=lambda _: None)
    said = []
    result = measure(claim(seeds=(0, 1, 2, 3)), cell, where=tmp_path, say=said.append)
    assert len(said) == 2
    assert len(result.cells) == 8


def test_a_seed_that_another_machine_measured_says_so(tmp_path):
    here = measure(claim(), cell, where=tmp_path, say=lambda _: None)
    assert here.processors == [here.machine["processor"]]
    replace(here, machine=here.machine | {"processor": "another"}).write(tmp_path / "toy.json")
    old = tmp_path / "toy.json"  # as results were written before cells named their processor
    plain = json.loads(old.read_text())
    for row in plain["cells"]:
        del row["processor"]
    old.write_text(json.dumps(plain))
    result = measure(claim(seeds=(0, 1, 2, 3)), cell, where=tmp_path, say=lambda _: None)
    assert result.processors == ["another", here.machine["processor"]]
    assert {c.seed for c in result.cells if c.processor == "another"} == {0, 1, 2}


def test_large_settings_lie_beside_the_others(tmp_path):
    asked = claim(settings={"more": 0, "kept": 1}, large={"more": 5})
    result = measure(asked, cell, large=True, where=tmp_path, say=lambda _: None)
    assert result.large
    assert result.settings == {"more": 5, "kept": 1}
    assert (tmp_path / "toy.large.json").exists()
    assert result.fingerprint != asked.fingerprint(large=False)


def test_what_cannot_be_judged_is_refused(tmp_path):
    with pytest.raises(EvidenceError, match="it is inf"):
        measure(claim(), lambda *_: {"perplexity": float("inf")}, where=tmp_path)
    with pytest.raises(SettingError, match="Did you mean wanda"):
        measure(claim(), cell, only=["wnda"], where=tmp_path)
    with pytest.raises(SettingError, match="Did you mean wanda"):
        measure(claim(expects=(replace(BETTER, left="wandaa"),)), cell, where=tmp_path)
    with pytest.raises(SettingError, match="its cell does not return it"):
        measure(claim(expects=(replace(BETTER, metric="accuracy"),)), cell, where=tmp_path, say=lambda _: None)


def test_result_follows_its_published_schema(tmp_path):
    jsonschema = pytest.importorskip("jsonschema")
    measure(claim(), cell, where=tmp_path, say=lambda _: None)
    written = json.loads((tmp_path / "toy.json").read_text())
    jsonschema.validate(written, claim_schema())
    written["verdict"] = "surely"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, claim_schema())
    (tmp_path / "toy.json").write_text(json.dumps(written))
    with pytest.raises(ModelError, match="Measure it again"):
        ClaimResult.read(tmp_path / "toy.json")


@pytest.mark.parametrize("name", harness.names())
def test_every_claim_can_be_judged(name):
    found, module = harness.load(name)
    harness.check(found)
    assert callable(module.cell)
    json.dumps(found.sized(large=True))
    assert len(found.seeds) >= 3 or all(e.exact for e in found.expects if e.central)


@pytest.mark.parametrize("path", sorted(harness.RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_every_verdict_is_the_harness_s(path):
    """Concluding again from the cells of a result gives its verdict and findings: none was edited."""
    result = ClaimResult.read(path)
    found, _ = harness.load(result.name)
    assert result.fingerprint == found.fingerprint(result.large), "measure it again: its settings have changed"
    again = conclude(found, result.cells, result.large)
    assert again.verdict == result.verdict
    for here, there in zip(again.findings, result.findings, strict=True):
        one, other = asdict(here), asdict(there)
        if found.derive is not None and not {here.left, here.right} <= {*found.conditions}:
            # What is fitted to cells ends elsewhere in its last digits on another processor.
            for name in ("advantage", "low", "high", "seeds"):
                assert one.pop(name) == pytest.approx(other.pop(name), rel=1e-5, abs=1e-8), f"{here.says}: {name}"
        assert one == other


def test_results_are_found_from_the_package():
    measured = {p.stem for p in harness.RESULTS.glob("*.json") if not p.stem.endswith(".large")}
    assert set(results()) == measured
