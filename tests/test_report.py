import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from random import Random

import pytest

from secateur import report
from secateur.errors import ModelError, SettingError, TaskError
from secateur.outcome import Damage, Harm, Ledger, Measurement, Record, SiteRow, Size, Timing
from secateur.report import Claim, figures
from secateur.report.charts import damage_by_example, shorten
from secateur.report.compare import half_width, points, shown, speed_up, t95, zero_shot_table
from secateur.report.damage import damage_table
from secateur.report.page import _bundle

HOSTILE = '</script><script>alert("x")</script><b>{{ 7*7 }}</b>'
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
ROLES = (*PROJECTIONS, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
WEIGHTS = 576 * 512


def site_rows(sparsity=0.5, blocks=30, uneven=0.0):
    rows = []
    for b in range(blocks):
        for i, role in enumerate(ROLES):
            here = min(0.99, max(0.0, sparsity + uneven * ((b % 5) - 2 + (i % 3) - 1) / 10))
            gone = round(WEIGHTS * here)
            block = f"model.layers.{b}"
            rows.append(SiteRow(f"{block}.{role}.weight", "weight", block, WEIGHTS, WEIGHTS - gone, WEIGHTS, gone))
    return rows


def record(
    method="wanda",
    sparsity=0.5,
    seed=0,
    quality=34.125,
    before=20.7,
    metric="perplexity",
    blocks=3,
    uneven=0.0,
    stored=None,
    timing=True,
    **changes,
):
    rows = site_rows(sparsity or 0.0, blocks, uneven)
    prunable, removed = sum(r.weights for r in rows), sum(r.removed for r in rows)
    time = Timing(41.5, 0.8, 20, 8, 2, "float32")
    size = Size(prunable + 28_000_000, 12, 4 * (prunable + 28_000_000), 3_210_000_000, 4 * (prunable + 28_000_000))
    ledger = Ledger(
        before=size,
        after=replace(size, zeros=removed + 12, stored_bytes=stored),
        prunable=prunable,
        removed=removed,
        timing_before=time if timing else None,
        timing_after=replace(time, milliseconds=39.25) if timing else None,
    )
    values = {} if quality is None else {"after": quality}
    values |= {} if before is None else {"before": before}
    made = Record(
        schema=1,
        secateur="0.1.0",
        created="2026-01-02T03:04:05+00:00",
        command=f"secateur prune smollm2 {method} --sparsity {sparsity} --seed {seed}",
        method=method,
        settings={"sparsity": sparsity, "samples": 128, "pattern": "row"},
        model={"name": "smollm2", "family": "llama", "fingerprint": "0123456789abcdef"},
        task={
            "name": "wikitext2",
            "seed": seed,
            "metric": metric,
            "higher_is_better": metric == "accuracy",
            "fingerprint": f"feed{seed}",
        },
        ledger=ledger,
        sites=rows,
        measurements=[Measurement(when, "test", {metric: q, "window": 2048.0}) for when, q in values.items()],
        edits={"Mask": len(rows)},
        curves={"loss": [(s, 3 / (s + 1)) for s in range(50)], "sparsity": [(s, 0.5 * s / 50) for s in range(50)]},
        notes=["the head and the embedding were left out"],
        seconds=74.0,
        peak_memory_bytes=1_500_000_000,
        machine={"processor": "Example CPU", "cores": 2, "system": "Linux", "threads": 2},
        versions={"python": "3.11.9", "torch": "2.13.0"},
    )
    return replace(made, **changes)


METHODS = ("magnitude", "wanda", "sparsegpt", "random_pruning", "dsnot", "global_mp")
SPARSITIES = (0.3, 0.4, 0.5, 0.6, 0.7)


def many(blocks=30, stored=True):
    """Six methods at five sparsities with three seeds: 90 runs."""
    draw = Random(5)
    runs = []
    for k, method in enumerate(METHODS):
        for sparsity in SPARSITIES:
            for seed in range(3):
                harm = math.exp((0.4 + 0.35 * abs(k - 2)) * (sparsity / 0.3) ** 2)
                quality = 20.7 * harm * draw.uniform(0.97, 1.03)
                if method == "random_pruning" and sparsity == 0.7:
                    quality = math.inf if seed else math.nan
                kept = int((270e6 - 212e6 * sparsity) * (1 + 0.02 * k)) if stored else None
                runs.append(
                    record(method, sparsity, seed, quality, blocks=blocks, uneven=0.1 * k, stored=kept, timing=k < 4)
                )
    return runs


# Numbers


def test_figures_are_written_to_what_is_known_of_them():
    assert figures.quality(20.7) == "20.70"
    assert figures.quality(0.81234) == "0.8123"
    assert figures.quality(math.nan) == figures.quality(-math.inf) == "diverged"
    assert figures.interval(20.7, 0.123) == "20.70 ± 0.12"
    assert figures.interval(20.7, 0.00123) == "20.70 ± 0.001"
    assert figures.interval(math.inf, 3.0) == "diverged"
    assert figures.percent(0.5) == "50%"
    assert figures.percent(0.99999) == "over 99.99%"
    assert figures.size(269_060_552) == "269.1 MB"
    assert figures.size(None) == figures.quality(None) == "not measured"


def test_interval_is_students():
    # Worked by hand: values 1, 2, 3 have deviation 1, and t for two degrees of freedom is 4.302653.
    assert half_width([1.0, 2.0, 3.0]) == pytest.approx(4.302653 / 3**0.5)
    assert half_width([1.0]) is None
    assert half_width([1.0, math.inf]) is None


def test_quantile_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 4, 9, 12, 13, 29, 100):
        assert t95(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), abs=2e-3)


# The sentence


def test_summary_says_what_was_removed_and_that_zeros_save_nothing():
    said = report.summary(record())
    assert said == (
        "wanda removed 50% of the 6,193,152 prunable weights of smollm2; perplexity on wikitext2 went from 20.70 to "
        "34.12 (lower is better); the model takes as much memory and work as before, its zeros being stored as numbers."
    )


def test_summary_of_a_smaller_model_says_how_much():
    run = record()
    small = replace(run.ledger.after, parameters=20_000_000, memory_bytes=80_000_000, zeros=0)
    timed = replace(run.ledger.timing_after, milliseconds=25.0)
    said = report.summary(replace(run, ledger=replace(run.ledger, after=small, timing_after=timed)))
    assert "the model takes 80.0 MB in memory instead of 136.8 MB" in said
    assert "a forward pass took 25.00 ms instead of 41.50 ms" in said


def test_summary_does_not_speak_of_zeros_that_are_not_there():
    run = record()
    grown = replace(run.ledger.before, memory_bytes=200_000_000)
    assert "takes 200.0 MB in memory instead of 136.8 MB" in report.summary(
        replace(run, ledger=replace(run.ledger, after=grown))
    )
    said = report.summary(replace(run, ledger=replace(run.ledger, after=run.ledger.before)))
    assert "the model takes as much memory and work as before" in said
    assert "zeros" not in said
    quick = replace(run.ledger.before, flops=2_568_000_000)
    assert "a forward pass takes 20% less work" in report.summary(replace(run, ledger=replace(run.ledger, after=quick)))


def test_summary_of_what_was_not_measured_and_of_what_diverged():
    assert "perplexity was not measured" in report.summary(record(quality=None))
    assert "the dense model was not measured" in report.summary(record(before=None))
    assert "diverged from 20.70" in report.summary(record(quality=math.nan))


def test_no_speed_up_is_claimed_for_a_masked_dense_model():
    run = record()
    fast = replace(run.ledger, timing_after=replace(run.ledger.timing_after, milliseconds=4.0))
    assert speed_up(fast) is None
    text = report.page([replace(run, ledger=fast)])
    assert "no speed-up: zeros are multiplied too" in text
    assert "times as fast" not in text
    small = replace(fast, after=replace(fast.after, parameters=1000))
    assert speed_up(small) == pytest.approx(41.5 / 4)
    assert "10.38 times as fast" in report.page([replace(run, ledger=small)])


def test_no_speed_up_is_claimed_within_the_spread_or_between_unlike_timings():
    run = record()
    small = replace(run.ledger, after=replace(run.ledger.after, parameters=1000))
    close = replace(small, timing_after=replace(small.timing_after, milliseconds=41.0))
    assert speed_up(close) is None
    threads = replace(small, timing_after=replace(small.timing_after, milliseconds=4.0, threads=8))
    assert speed_up(threads) is None


def test_headline_admits_that_seeds_do_not_tell_two_methods_apart():
    runs = [record(m, seed=s, quality=q + s) for m, q in (("wanda", 30.0), ("dsnot", 30.5)) for s in range(3)]
    assert "so these seeds do not tell them apart" in report.headline(runs)
    apart = [record(m, seed=s, quality=q + s / 9) for m, q in (("wanda", 30.0), ("dsnot", 90.0)) for s in range(3)]
    said = report.headline(apart)
    assert said.startswith(
        "At 50% sparsity of smollm2, wanda has the lowest perplexity on wikitext2 of 2 methods, 30.11 ± 0.28 over 3"
    )
    assert "apart" not in said


def test_a_method_that_is_broken_on_every_seed_is_told_from_one_that_is_not():
    good = [record("wanda", seed=s, quality=30.0 + s / 9) for s in range(3)]
    broken = [record("random", seed=s, quality=q) for s, q in enumerate((2.3e6, 6.5e6, 1.3e8))]
    assert "apart" not in report.headline([*good, *broken])  # of ratios: the linear interval takes in less than nothing


def test_headline_names_a_method_that_missed_its_target():
    run = record("slicegpt", quality=90.0)
    over = replace(run, ledger=replace(run.ledger, removed=round(0.75 * run.ledger.prunable)))
    assert report.headline([record(), over]).endswith("; slicegpt removed 75% instead.")
    assert "instead" not in report.headline([record(), run])
    assert "removed 75% (50% was asked for) of the" in report.summary(over)


def control(seed=0, quality=21.5, name="int8"):
    """A run that was to remove nothing, and did, in fewer bytes."""
    run = record(name, None, seed, quality, stored=70_000_000)
    return replace(run, settings={"exclude": ["head"]})


def without_a_cut(run):
    """A run that removed nothing of what was asked: a quarter of two layers is less than one."""
    return replace(run, ledger=replace(run.ledger, removed=0, after=run.ledger.before), sites=[])


def test_a_recovery_says_what_it_changed_and_that_zeros_stayed():
    ledger = record().ledger
    size = replace(ledger.before, zeros=5000)
    run = record("perp", None, sites=[], edits={"Update": 270})
    run = replace(run, ledger=replace(ledger, prunable=0, removed=0, before=size, after=size))
    assert report.summary(run).startswith(
        "perp removed nothing from smollm2: it changed 270 tensors and kept 5,000 zeros; perplexity on wikitext2"
    )
    fewer = replace(run, ledger=replace(run.ledger, after=replace(size, zeros=4999)))
    assert "kept" not in report.summary(fewer)
    assert report.summary(replace(run, edits={})).startswith("perp ran on smollm2 and removed nothing; ")


def test_headline_does_not_rank_what_removed_nothing():
    short = without_a_cut(record("shortgpt", quality=20.7))
    said = report.headline([record(), record("random", quality=90.0), short, control()])
    assert said.startswith("At 50% sparsity of smollm2, wanda has the lowest perplexity on wikitext2 of 2 methods")
    assert "random has the highest, 90.00" in said
    assert "; shortgpt removed 0% instead" in said
    assert said.endswith("; int8 removes nothing and comes to 21.50 in 70.0 MB instead of 136.8 MB.")


def test_headline_ranks_none_where_all_are_equal():
    said = report.headline([record(quality=21.5), record("random", quality=21.5)])
    assert said.startswith("At 50% sparsity of smollm2, all 2 methods have the same perplexity on wikitext2, 21.50")
    assert "lowest" not in said and "highest" not in said


def test_a_control_alone_is_ranked_and_does_not_move_the_middle():
    assert "int8" in report.headline([control(0), control(1)])
    grid = [record(sparsity=s, quality=20 + s) for s in (0.3, 0.5, 0.7)]
    at = {p.series: p.position for p in shown(points([*grid, control()]))}
    assert at == {"wanda": 0.5, "int8": 0.0}
    assert "at 50% sparsity" in Seen(report.page([*grid, control()])).text


def test_damage_is_averaged_over_the_seeds_and_hostile_texts_stay_text():
    def harmed(seed, flips, differences):
        harm = Harm(1, 2.0, math.inf, 0.5, HOSTILE, HOSTILE, "was", "now")
        found = Damage("test", 2, "windows of 8 tokens", 14, flips, 0.1, 0.05, differences, [harm])
        return replace(record(seed=seed), damage=found)

    runs = [harmed(0, 0.2, [0.1, 0.3]), harmed(1, 0.4, [-0.1, math.inf])]
    (row,) = damage_table(points(runs))
    assert row["flips"] == pytest.approx(0.3)
    assert row["worse"] == pytest.approx(0.75)
    assert row["most"] == math.inf
    page = report.page(runs)
    assert HOSTILE not in page
    seen = Seen(page)
    for words in ("which of 2 windows of 8 tokens got worse", "diverged", "wanda: the 1 that lost most", HOSTILE):
        assert words in seen.text, words
    drawing = damage_by_example(points(runs))
    assert [row["rise"] for row in drawn(drawing.spec)] == [0.1, 0.3]
    assert "left out" not in drawing.caption
    assert "1 whose loss is no longer finite" in damage_by_example(points(runs[1:])).caption


def test_a_page_without_damage_or_questions_has_no_such_section():
    page = report.page([record()])
    assert "<h2>Damage</h2>" not in page
    assert "never trained for" not in page
    assert damage_by_example(points([record()])) is None


def test_questions_are_averaged_over_the_seeds_per_byte_where_that_is_known():
    def asked(seed, after):
        values = {"piqa acc": 0.5, "piqa acc_norm": after, "piqa acc_norm_stderr": 0.05, "piqa questions": 100.0}
        values["piqa chance"] = 0.5
        kept = [Measurement("before", "zero-shot", {**values, "piqa acc_norm": 0.7})]
        kept.append(Measurement("after", "zero-shot", values))
        return replace(record(seed=seed), measurements=[*record().measurements, *kept])

    rows = zero_shot_table([asked(0, 0.6), asked(1, 0.64)])
    assert rows[0] == {"method": "dense", "asked": None, "tasks": {"piqa acc_norm": (pytest.approx(0.7), 1.96 * 0.05)}}
    mean, half = rows[1]["tasks"]["piqa acc_norm"]
    assert mean == pytest.approx(0.62)
    assert half == pytest.approx(12.706205 * 0.02)  # Student's t for two seeds, of a deviation of 0.02 * sqrt(2)
    assert zero_shot_table([record()]) == []
    seen = Seen(report.page([asked(0, 0.6)]))
    assert "piqa: 100 questions, guessing gives 0.5000." in seen.text
    assert "0.6000 ± 0.0980" in seen.text


# Side by side


def test_seeds_are_averaged_with_an_interval():
    rows = report.compare_table([record(seed=s, quality=q) for s, q in enumerate((30.0, 31.0, 32.0))])
    assert len(rows) == 1
    assert rows[0]["quality"] == pytest.approx(31.0)
    assert rows[0]["half_width"] == pytest.approx(4.302653 / 3**0.5)
    assert (rows[0]["method"], rows[0]["asked"], rows[0]["seeds"]) == ("wanda", 0.5, 3)
    assert rows[0]["zeros"] == 6_193_152 // 2 + 12
    assert rows[0]["stored_bytes"] is None
    assert rows[0]["milliseconds"] == 39.25


def test_a_seed_run_twice_counts_once_and_the_newest_holds():
    old, new = record(quality=30.0), record(quality=40.0, created="2026-02-02T00:00:00+00:00")
    for order in ([old, new], [new, old]):
        rows = report.compare_table(order)
        assert (rows[0]["seeds"], rows[0]["quality"], rows[0]["half_width"]) == (1, 40.0, None)


def test_one_method_with_two_patterns_is_two_series():
    unlike = record(settings={"sparsity": 0.5, "samples": 128, "pattern": "2:4"})
    found = [r["method"] for r in report.compare_table([record(), unlike])]
    assert found == ["wanda (pattern=row)", "wanda (pattern=2:4)"]


def test_links_of_a_chain_compose_their_sparsities():
    links = {"methods": [{"method": "stun", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.2}]}
    assert report.compare_table([record("stun+wanda", settings=links)])[0]["asked"] == pytest.approx(0.6)
    masks = {"methods": [{"method": "magnitude", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.75}]}
    assert report.compare_table([record("magnitude+wanda", settings=masks)])[0]["asked"] == 0.75  # zeros count once
    own = {"methods": [{"method": "mine", "sparsity": 0.5}, {"method": "wanda", "sparsity": 0.2}]}
    assert report.compare_table([record("mine+wanda", settings=own)])[0]["asked"] == pytest.approx(0.6)


def test_a_method_without_a_target_stands_where_it_arrived():
    rows = report.compare_table([record("turbo_vbi", settings={"strength": s}) for s in (0.1, 0.2)])
    assert [(r["method"], r["asked"], r["reached"]) for r in rows] == [("turbo_vbi", None, 0.5)] * 2


def test_one_lost_seed_is_not_averaged_away():
    rows = report.compare_table([record(seed=0, quality=30.0), record(seed=1, quality=math.nan)])
    assert (rows[0]["quality"], rows[0]["diverged"], rows[0]["half_width"]) == (math.inf, 1, None)


def test_ninety_runs_are_thirty_points():
    runs = many()
    found = points(runs)
    assert [len(p.records) for p in found] == [3] * 30
    assert [(p.series, p.asked) for p in shown(found)] == [(m, 0.5) for m in METHODS]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"task": {**record().task, "name": "ptb"}}, "they are of different tasks: 'wikitext2' and 'ptb'"),
        ({"task": {**record().task, "metric": "accuracy"}}, "different metrics: 'perplexity' and 'accuracy'"),
        ({"model": {"name": "gpt2"}}, "different models: 'smollm2' and 'gpt2'"),
        ({"task": {**record().task, "fingerprint": "beef"}}, "those of seed 0 did not see the same data"),
        ({"measurements": [Measurement("after", "val", {"perplexity": 3.0})]}, "on different splits: test, val"),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(changes, text):
    for call in (report.page, report.compare_table, report.headline):
        with pytest.raises(TaskError) as caught:
            call([record(), replace(record("magnitude"), **changes)])
        assert text in str(caught.value)
        assert str(caught.value).startswith("2 runs ")
        assert caught.value.do


def test_no_records_are_refused():
    with pytest.raises(SettingError, match="there are no run records"):
        report.page([])


@pytest.mark.parametrize("package", ["jinja2", "vl_convert"])
def test_what_is_not_installed_is_named(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    _bundle.cache_clear()
    with pytest.raises(
        ModelError, match=rf"{package} is not installed\.\nInstall it: pip install 'secateur\[report\]'"
    ):
        report.page([record()])


# The page


class Seen(HTMLParser):
    """What is on a page: text, elements, and every address that something would be loaded from."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.loads, self.words, self._inside = [], [], [], []
        self.feed(text)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self._inside.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "srcset", "action", "data", "xlink:href") and v]

    def handle_endtag(self, tag):
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data):
        if not {"script", "style"} & set(self._inside):
            self.words.append(data)


def charts(text):
    return [
        json.loads(t) for t in re.findall(r'<script type="application/json" data-chart(?:="")?>(.*?)</script>', text)
    ]


def drawn(spec):
    """Every data value in a specification."""
    kept = list(spec.get("datasets", {}).values())
    for layer in [spec, *spec.get("layer", [])]:
        kept.append(layer.get("data", {}).get("values", []))
    return [row for rows in kept for row in rows]


def test_page_of_one_run_has_its_numbers():
    seen = Seen(report.page([record(stored=70_000_000)]))
    for part in (
        "perplexity on wikitext2 went from 20.70 to 34.12 (lower is better)",
        "50% sparsity of the 6,193,152 weights in the sites that could have been cut",
        "zeros among them 12 3,096,588",
        "bytes in memory 136.8 MB 136.8 MB the same",
        "stored bytes 136.8 MB 70.0 MB 48.82% less",
        "3.21 GFLOPs",
        "41.50 ms (spread 0.80 ms) 39.25 ms",
        "batch 8, 2 threads, float32",
        "secateur prune smollm2 wanda --sparsity 0.5 --seed 0",
        "the head and the embedding were left out",
        "Example CPU",
        "all 21 sites",
        "One seed each: no interval is known.",
    ):
        assert part in seen.text, part
    assert seen.loads == []


def test_page_comes_in_the_promised_order():
    seen = Seen(report.page([record()], extra=[Claim("Sun 2023", "7.26 at 50%", "34.12", arxiv="2306.11695")]))
    places = [
        seen.text.index(h)
        for h in (
            "wanda removed 50%",
            "Quality against size",
            "Results",
            "What was cut",
            "What it costs",
            "Curves",
            "Notes of the run",
            "To make it again",
            "Where it was measured",
            "What the paper claims",
            "arXiv:2306.11695",
        )
    ]
    assert places == sorted(places)


def test_same_records_give_the_same_page():
    assert report.page([record()]) == report.page([record()])


def test_missing_values_are_named_and_not_made_up():
    bare = replace(
        record(quality=None, before=None, timing=False, blocks=0),
        ledger=Ledger(Size(10, 0, 40), Size(10, 0, 40)),
        command="",
        curves={},
        notes=[],
        machine={},
        versions={},
        peak_memory_bytes=None,
        settings={},
        task={},
        model={},
    )
    seen = Seen(report.page([bare]))
    assert "No quality was measured" in seen.text
    assert "time per forward pass not measured not measured" in seen.text
    assert "stored bytes not measured not measured" in seen.text
    assert "No site was cut." in seen.text
    assert "The machine was not recorded." in seen.text
    assert "None" not in seen.text
    assert "nan" not in seen.text.lower()


def test_hostile_names_stay_text():
    run = record(
        HOSTILE,
        model={"name": HOSTILE, "family": HOSTILE},
        notes=[HOSTILE],
        command=HOSTILE,
        settings={HOSTILE: HOSTILE, "sparsity": 0.5},
        machine={"processor": HOSTILE},
        sites=[SiteRow(f"{HOSTILE}.{i}", HOSTILE, HOSTILE, 10, 5, 10, 5) for i in range(2)],
        curves={HOSTILE: [(0, 1.0), (1, 2.0)]},
        files={HOSTILE: "00"},
    )
    other = replace(run, method=HOSTILE + "2")
    for text in (report.page([run], HOSTILE, [Claim(HOSTILE, HOSTILE)]), report.page([run, other])):
        assert HOSTILE not in text
        assert "<b>{{" not in text
        seen = Seen(text)
        assert seen.tags.count("b") == 0
        assert seen.tags.count("script") == 2 + len(charts(text))  # the drawing code, and nothing slipped in
        assert HOSTILE in "".join(seen.words)  # shown as it is
        assert "49" not in re.sub(
            r"\d{3,}|\d+\.\d+", "", seen.text.split("Where it was measured")[0].split("Results")[0]
        )


def test_page_forbids_itself_the_network():
    text = report.page([record()])
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', text).group(1)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_runs_that_diverged_are_marked_and_the_chart_stands():
    runs = [record(sparsity=s, quality=q) for s, q in ((0.3, 25.0), (0.5, math.inf), (0.7, math.nan))]
    text = report.page(runs)
    assert "diverged" in Seen(text).text
    for spec in charts(text):
        assert "NaN" not in json.dumps(spec)
        assert "Infinity" not in json.dumps(spec)
    rows = drawn(charts(text)[0])
    assert sorted(r["told"] for r in rows if "told" in r and "diverged" in r["told"]) == ["diverged in 1 of 1"] * 2
    assert [r["y"] for r in rows if r.get("told") == "25.00"] == [25.0]


def test_chart_of_nothing_but_divergence_can_be_drawn():
    text = report.page([record(quality=math.nan, before=math.nan)])
    assert len(charts(text)) >= 2


def test_perplexity_is_drawn_on_a_logarithmic_scale_and_accuracy_is_not():
    def scale_of(runs):
        found = [
            layer["encoding"]["y"]["scale"].get("type")
            for layer in charts(report.page(runs))[0]["layer"]
            if "scale" in layer["encoding"].get("y", {})
        ]
        return set(found)

    assert scale_of([record()]) == {"log"}
    assert scale_of([record(metric="accuracy", quality=0.5, before=0.8)]) == {None}


def test_interval_reaching_below_zero_does_not_break_the_logarithm():
    runs = [record(seed=s, quality=q) for s, q in enumerate((10.0, 12.0, 500.0))]
    spec = charts(report.page(runs))[0]
    assert all(r["low"] > 0 for r in drawn(spec) if "low" in r)


def test_comparison_has_five_points_per_method_with_intervals():
    text = report.page(many())
    by_sparsity, by_size = charts(text)[:2]
    rows = [r for r in drawn(by_sparsity) if "low" in r]
    for method in METHODS:
        mine = {r["x"] for r in rows if r["series"] == method}
        assert len(mine) == (4 if method == "random_pruning" else 5)
    assert all(r["low"] < r["y"] < r["high"] for r in rows)
    assert any(r.get("told") == "dense 20.70" for r in drawn(by_sparsity))
    assert "stored size (MB)" in json.dumps(by_size)
    assert len(text) < 3_000_000


def test_sites_of_a_regular_network_are_drawn_block_by_block():
    heat = charts(report.page([record(blocks=30)]))[2]
    cells = [r for r in drawn(heat) if "kept" in r]
    assert len(cells) == 210
    assert {c["x"] for c in cells} == {str(b) for b in range(30)}
    assert {c["y"] for c in cells} == set(ROLES)
    assert {round(c["kept"], 3) for c in cells} == {0.5}


def test_blocks_lose_the_name_they_share():
    assert shorten(["model.layers.0", "model.layers.1", ""]) == {
        "model.layers.0": "0",
        "model.layers.1": "1",
        "": "elsewhere",
    }
    assert shorten(["features"]) == {"features": "features"}


def test_sites_of_an_irregular_network_are_bars():
    rows = [SiteRow(f"conv{i}.weight", "weight", "", 100, 100 - i, 100, i) for i in range(20)]
    bars = [r for r in drawn(charts(report.page([record(sites=rows)]))[2]) if "kept" in r]
    assert [b["name"] for b in bars] == [r.site for r in rows]
    assert bars[7]["kept"] == pytest.approx(0.93)


def test_page_is_written_whole(tmp_path):
    path = tmp_path / "out.html"
    report.write([record()], path)
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["out.html"]


def test_a_record_read_back_gives_the_same_page(tmp_path):
    run = record(quality=math.inf)
    run.write(tmp_path / "secateur.json")
    assert report.page([Record.read(tmp_path / "secateur.json")]) == report.page([run])


# The model card


@pytest.fixture(scope="module")
def chromium():
    for name in ("chromium", "chromium-browser", "google-chrome", "chrome"):
        if found := shutil.which(name):
            return found
    pytest.skip("no Chromium was found")


def browse(chromium, page: Path, profile: Path):
    """The page's elements after its scripts have run."""
    done = subprocess.run(
        [
            chromium,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={profile}",
            "--virtual-time-budget=10000",
            "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(profile)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.browser
@pytest.mark.parametrize("runs", ["one", "ninety", "hostile"])
def test_page_works_in_a_browser_without_a_network(chromium, tmp_path, runs):
    records = {
        "one": lambda: [record(blocks=30, uneven=0.5, stored=70_000_000)],
        "ninety": many,
        "hostile": lambda: [record(HOSTILE, curves={}), record(HOSTILE + "2", curves={})],
    }[runs]()
    page = tmp_path / "page.html"
    report.write(records, page)
    dom = browse(chromium, page, tmp_path / "profile")
    seen = Seen(dom)
    drawings = len(charts(dom))
    assert drawings >= 3
    assert dom.count('class="marks"') == drawings, "every chart is drawn"
    assert "could not be drawn" not in seen.text
    assert "dense 20.70" in seen.text  # only the drawn chart says it in these words
    for row in report.compare_table(records):
        assert figures.interval(row["quality"], row["half_width"]) in seen.text
    outside = [address for address in seen.loads if not address.startswith(("#", "data:"))]
    assert outside == []
