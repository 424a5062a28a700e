"""The command line: what it says, what it refuses, what it ends with, and that a killed run is taken up again."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from command_line import run, said
from safetensors.torch import load_file

from secateur import axes, plan, recipe
from secateur.cli import BAD_INPUT, INTERRUPTED, MISSED, main, opening
from secateur.cli import plan as planning
from secateur.cli import terminal as spoken
from secateur.errors import BudgetError, PatternError, SettingError
from secateur.method import load, names, settings, tiny
from secateur.methods.magnitude import Magnitude
from secateur.methods.wanda import Wanda

TEXT = ("tiny:decoder", "wanda", "--task", "tiny:toy_text", "--samples", "8")
VECTORS = ("tiny:mlp", "magnitude", "--task", "tiny:toy_vectors")


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def same(first, second):
    one, other = weights_of(first), weights_of(second)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# Settings as text


@pytest.mark.parametrize("name", names())
def test_settings_survive_the_command_line_and_back(name, monkeypatch):
    kind = load(name)
    method = tiny(kind)
    for each in (kind(), method):
        given = {k: recipe.text_of_value(getattr(each, k)) for k in recipe.settings_of(kind)}
        args = []
        for key, text in given.items():
            option = f"--{key}".replace("_", "-")
            if recipe.settings_of(kind)[key].hint is bool:
                args.append(option if text == "true" else option.replace("--", "--no-"))
            else:
                args += [option, text]
        caught = Caught()
        monkeypatch.setattr("secateur.cli.opening.recipe_from", caught)
        run("plan", "tiny:mlp", name, *args, code=INTERRUPTED)
        assert caught.method == each


class Caught:
    """Takes the settings that a command line came to, and stops there."""

    def __call__(self, method, given, overrides, then=()):
        self.method = recipe.build(load(method), given)
        raise KeyboardInterrupt


@pytest.mark.parametrize("name", names())
def test_settings_survive_a_recipe_and_text(name):
    method = tiny(load(name))
    assert recipe.method_of({"method": name, **settings(method)}) == method
    assert recipe.method_of({"method": name, "settings": settings(method)}) == method
    assert recipe.method_of(recipe.text_of_method(method)) == method
    again = yaml.safe_load(yaml.safe_dump(recipe.Recipe((method, Wanda())).plain()))
    assert recipe.recipe_of(again).steps == (method, Wanda())


def test_every_setting_is_shown_in_help():
    shown = run("prune", "tiny:decoder", "wanda", "--help").stdout
    assert "Settings of wanda" in shown
    for words in (
        "--sparsity",
        "[default: 0.5]",
        "fraction of the weights set to zero",
        "owl (.outlier, .reach)",
        "pruned|dense",
    ):
        assert words in shown, words
    assert "--sparsity" not in run("prune", "--help").stdout


@pytest.mark.parametrize(
    ("text", "sparsity", "pattern"),
    [
        ({"sparsity": "50%"}, 0.5, axes.PerRow()),
        ({"sparsity": "0.25"}, 0.25, axes.PerRow()),
        ({"sparsity": "2:4"}, 0.5, axes.NM(2, 4)),
        ({"sparsity": "4x1"}, 0.5, axes.Blocks(4, 1)),
        ({"pattern": "1:4"}, 0.75, axes.NM(1, 4)),
    ],
)
def test_sparsity_and_pattern_are_understood(text, sparsity, pattern):
    found = recipe.build(Wanda, text)
    assert (found.sparsity, found.pattern) == (sparsity, pattern)


def test_fields_of_parts_are_dotted():
    found = recipe.build(Wanda, {"allocation": "owl", "allocation.reach": "0.1"})
    assert found.allocation == axes.Owl(reach=0.1)
    with pytest.raises(SettingError, match="Did you mean reach"):
        recipe.build(Wanda, {"allocation": "owl", "allocation.reech": "0.1"})


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ({"sparsty": "0.5"}, "Did you mean sparsity"),
        ({"pattern": "per-rwo"}, "Did you mean per-row"),
        ({"pattern": "owl"}, "it is no pattern"),
        ({"feed": "prund"}, "Did you mean pruned"),
        ({"samples": "1.5"}, "not a whole number"),
        ({"sparsity": "half"}, "not a number"),
        ({"sparsity": "2:4", "pattern": "4:8"}, "its pattern is given as well"),
    ],
)
def test_settings_that_cannot_be(given, advice):
    with pytest.raises(SettingError, match=advice):
        recipe.build(Wanda, given)


def test_parts_within_parts_are_written_as_themselves():
    from secateur.axes.probes import Grasp
    from secateur.axes.unlearners import Influence, Woodbury

    def made(text):
        return recipe.method_of(text)

    for text in ("influence(inverse=woodbury, samples=50)", "influence(inverse='woodbury', samples=50)"):
        assert made(f"unlearn(by={text})").by == Influence(samples=50, inverse=Woodbury())
    assert made("layer_lottery(score=mean-of(probe=grasp(per_class=4)))").score.probe == Grasp(4)
    assert made("lottery(scope=layer-by-layer(last=fc))").scope.last == "fc"
    assert made("fedtiny(exchange=prune-first)") == made("fedtiny(exchange='prune-first')")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("unlearn(by=influence(inverse=erk))", "unlearn.by.inverse=erk was given, but it is no inversefisher"),
        ("unlearn(by=influence(samples=many))", "its settings cannot be read"),
        ("unlearn(by=influence(damping=1))", "influence has no field 'damping'"),
        ("bip(units=weights(floor='a'))", "was given, but floor='a' is not a number"),
        ("icbs(search=anneal(restarts=2.5))", "was given, but restarts=2.5 is not a whole number"),
        ("compresso(curve=l1)", "compresso.curve=l1 was given, but it is no curve"),  # it can be called, on two values
    ],
)
def test_settings_of_parts_that_cannot_be(text, found):
    with pytest.raises(SettingError) as caught:
        recipe.method_of(text)
    assert found in str(caught.value)
    assert "_bypass" not in str(caught.value)  # what is private is no word


# list and explain


def test_list_as_json():
    rows = json.loads(run("list", "--json").stdout)
    assert [row["name"] for row in rows if row["name"] == "wanda"] == ["wanda"]
    assert {row["name"] for row in rows} == set(names())
    assert all({"name", "number", "when", "verdict"} <= row.keys() for row in rows)


@pytest.mark.parametrize(
    "option", [("--needs", "calibration"), ("--when", "after"), ("--granularity", "channel"), ("--family", "cnn")]
)
def test_list_filters(option):
    rows = json.loads(run("list", *option, "--json").stdout)
    assert rows
    key = {"--needs": "needs", "--when": "when", "--granularity": "granularity", "--family": "families"}[option[0]]
    for row in rows:
        assert option[1] in row[key] or "any" in row[key] or row[key] == f"{option[1]} training"
    assert "Did you mean" in said(run("list", option[0], option[1][:-1] + "_", "--json", code=BAD_INPUT))


def test_explain_says_what_there_is():
    about = json.loads(run("explain", "wanda", "--json").stdout)
    assert "equation 1" in about["idea"]
    assert about["arxiv"] == "2306.11695"
    sparsity = about["settings"][0]
    assert (sparsity["name"], sparsity["type"], sparsity["default"]) == ("sparsity", "float", "0.5")
    assert "fraction of the weights" in sparsity["comment"]
    shown = run("explain", "wanda").stdout
    for words in ("2306.11695", "--sparsity", "calibration", "LLaMA"):
        assert words in shown, words
    assert "outlier" in run("explain", "owl").stdout
    assert "number KEPT" in run("explain", "2:4").stdout


def test_explain_knows_every_part_a_setting_names_and_none_that_is_private():
    assert "DARTS" in run("explain", "dense-search").stdout
    chance = json.loads(run("explain", "chance", "--json").stdout)
    takers = {taker for each in (chance, *chance["others"]) for taker in each["takers"]}
    assert {"dass --search", "layer_lottery --score", "loraprune --score"} <= takers
    assert not [word for word in axes.words() if word.startswith("_")]
    for word in ("_look", "nosuchthing"):
        told = said(run("explain", word, code=BAD_INPUT))
        assert "secateur list" in told
        assert "_bypass" not in told
    assert "Did you mean wanda?" in said(run("explain", "WANDA", code=BAD_INPUT))


def test_a_plan_names_blocks_that_are_sites_and_keeps_what_a_recipe_says_of_its_task(tmp_path, monkeypatch):
    rows = [plan.Row(f"layer{i}.0", "channel", f"layer{i}.0", (16,), 16, 12, 100, 25) for i in (1, 2)]
    assert [row["site"] for row in planning.shortened(rows)] == ["2 like layer1.0"]
    given = []
    monkeypatch.setattr(opening, "task_from", lambda opened, name, settings, seed: given.append(settings) or stop())
    path = tmp_path / "r.yaml"
    path.write_text("model: tiny:mlp\ntask: {name: digits, batch: 64}\nsteps:\n- method: magnitude\n")
    for more in ((), ("--task", "digits"), ("--task", "reber")):
        run("plan", path, *more, "--task.size", "3", code=BAD_INPUT)
    assert given == [{"batch": 64, "size": 3}, {"batch": 64, "size": 3}, {"size": 3}]


def stop():
    raise SettingError("a task was asked for", "that is enough", "Go on.")


def test_fields_of_a_part_are_read_by_their_types():
    assert recipe.build(Magnitude, {"allocation": "global(floor=0.01)"}).allocation.floor == 0.01
    with pytest.raises(SettingError, match=r"global\(floor='x'\)[\s\S]*floor='x' is not a number"):
        recipe.build(Magnitude, {"allocation": "global(floor='x')"})
    with pytest.raises(SettingError, match="not a whole number"):
        recipe.build(Magnitude, {"pattern": "blocks(r=1.5)"})


# Bad input


@pytest.mark.parametrize(
    ("args", "advice"),
    [
        (("lits",), "Did you mean list"),
        (("explain", "wnda"), "Did you mean wanda"),
        (("prune", "tiny:decoder", "wnda", "--out", "{}"), "Did you mean wanda"),
        (("prune", "smolm2", "wanda", "--out", "{}"), "Did you mean smollm2"),
        (("prune", "tiny:decodr", "wanda", "--out", "{}"), "Did you mean decoder"),
        (("prune", *TEXT[:2], "--task", "python-doc", "--out", "{}"), "Did you mean python-docs"),
        (("prune", *TEXT, "--sparsty", "0.5", "--out", "{}"), "--sparsity"),
        (("prune", *TEXT, "--sparsity", "30", "--out", "{}"), "Did you mean 0.3"),
        (("prune", *TEXT, "--sparsity", "1", "--out", "{}"), "in [0, 1)"),
        (("prune", *TEXT, "--sparsity=-0.1", "--out", "{}"), "in [0, 1)"),
        (("prune", *TEXT, "--pattern", "2:5", "--out", "{}"), "multiple of 5"),
        (("prune", *TEXT, "--exclude", "mlpp", "--out", "{}"), "Did you mean"),
        (("prune", *TEXT, "--include", "model.layers.9.*", "--out", "{}"), "matches no parameter"),
        (("prune", *TEXT, "--include", "re:(", "--out", "{}"), "is no regular expression"),
        (("prune", *TEXT, "--task.windw", "8", "--out", "{}"), "unexpected keyword argument 'windw'"),
        (("plan", "tiny:mlp", "random", "--task", "digits", "--task.train-siz", "8"), "Did you mean train_size"),
        (("prune", *TEXT, "--device", "cdua", "--out", "{}"), "There are: cpu"),
        (("prune", *TEXT, "--dtype", "float31", "--out", "{}"), "Did you mean float32"),
        (("prune", *TEXT[:2], "--out", "{}"), "Give --task"),
        (("prune", *TEXT), "--out"),
        (("compare", "tiny:mlp", "--methods", "magntude", "--out", "{}"), "Did you mean magnitude"),
        (("report", "{}", "--out", "{}.html"), "record"),
        (("inspect", "{}"), "no such file"),
    ],
)
def test_bad_input_is_refused_with_advice(args, advice, tmp_path):
    found = run(*[a.format(tmp_path / "out") for a in args], code=BAD_INPUT)
    assert advice in said(found)
    assert "Traceback" not in found.stderr
    assert not list(tmp_path.iterdir())


def test_a_shape_a_pattern_does_not_fit_is_named_before_any_data(tmp_path):
    method = Wanda(sparsity=0.6, pattern=axes.NM(2, 5))
    import tiny as toys

    with pytest.raises(PatternError, match=r"q_proj.weight \[32, 32\].*13 more") as caught:
        plan.check(method, toys.decoder(), toys.toy_text())
    assert "exclude=head,embedding,router,norm,model.layers.0.self_attn.q_proj" in caught.value.do


def test_an_infeasible_target_states_what_is_feasible():
    found = run("plan", *VECTORS, "--sparsity", "0.95", "--allocation", "global(floor=0.03)", code=BAD_INPUT)
    assert "Ask for at most 0.9" in said(found)


@pytest.mark.parametrize("text", ["", "   \n"])
def test_empty_text_is_refused(text, tmp_path):
    (tmp_path / "notes.txt").write_text(text)
    found = run("eval", "tiny:decoder", "--task", tmp_path / "notes.txt", code=BAD_INPUT)
    assert "empty" in said(found)


def test_too_few_samples_are_refused(tmp_path):
    found = run("prune", *TEXT[:4], "--samples", "100000", "--out", tmp_path / "out", code=BAD_INPUT)
    assert "Ask for fewer" in said(found)
    assert "before" not in said(found)  # nothing was measured
    assert not (tmp_path / "out").exists()


def test_a_text_with_fewer_windows_than_a_method_takes_by_itself_calibrates_on_all_of_them(tmp_path):
    model = (*TEXT[:4], "--task.window", "64", "--sparsity", "0.5")
    for verb in (("plan", *model), ("prune", *model, "--no-eval", "--out", tmp_path / "out")):
        shown = " ".join(run(*verb).output.split())
        assert "wanda is calibrated on 32 windows of 64 tokens instead of 128: toy-text has no more." in shown
    assert yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())["steps"][0]["samples"] == 32


def test_what_reads_no_examples_runs_on_a_recipe_that_says_more_than_there_are(tmp_path):
    asked = ("oneshot", "--criterion", "magnitude", "--sparsity", "0.5", "--task", "tiny:toy_text", "--no-eval")
    run("prune", "tiny:decoder", *asked, "--out", tmp_path / "a")
    written = tmp_path / "a/recipe.yaml"
    run("prune", written, "--set", "samples=100000", "--no-eval", "--out", tmp_path / "b")


def test_a_folder_that_is_not_ours_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("dear diary")
    assert "secateur did not write it" in said(run("prune", *TEXT, "--out", tmp_path, code=BAD_INPUT))
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


# plan


def test_plan_prices_and_changes_nothing():
    found = json.loads(run("plan", *TEXT, "--json").stdout)
    assert len(found["rows"]) == 14
    assert sum(row["removed"] for row in found["rows"]) == found["after"]["zeros"] == 9216
    assert found["price"]["seconds"] > 0
    assert found["price"]["memory_bytes"] > found["before"]["memory_bytes"]
    assert "of a copy was pruned" in found["price"]["how"]
    assert {each["role"] for each in found["left"]} == {"head", "norm"}
    shown = run("plan", *TEXT, "--no-trial").stdout
    assert "18,432 of the model's 20,640 parameters" in shown
    assert "left alone  head: 2,048 parameters" in shown


def test_plan_of_a_structural_method_counts_what_goes():
    found = json.loads(
        run("plan", "tiny:mlp", "l1_norm", "--task", "tiny:toy_vectors", "--sparsity", "0.5", "--json").stdout
    )
    assert {row["kind"] for row in found["rows"]} == {"channel"}
    # 16 -> 16 -> 16 -> 4: two hidden layers of 32, halved.
    assert found["after"]["parameters"] == (16 + 1) * 16 + (16 + 1) * 16 + (16 + 1) * 4
    assert "32" not in found["denominator"].split()[0]


def test_a_plan_foresees_what_the_cut_comes_to(tmp_path):
    args = ("tiny:cnn", "l1_norm", "--task", "tiny:toy_images", "--sparsity", "0.5", "--json")
    after = json.loads(run("plan", *args).stdout)["after"]
    cut = json.loads(run("prune", *args, "--out", tmp_path / "out").stdout)["ledger"]["after"]
    assert after["parameters"] == cut["parameters"]
    assert after["memory_bytes"] == pytest.approx(cut["memory_bytes"], rel=0.01)
    assert after["flops"] == pytest.approx(cut["flops"], rel=0.02)


def test_plan_says_when_whole_units_miss_the_target():
    shown = run("plan", *TEXT, "--sparsity", "0.51", "--no-trial").stdout
    assert "51.00% was asked for; whole units in this pattern make 50" in shown


# prune


def test_prune_saves_and_says(tmp_path):
    out = tmp_path / "out"
    found = run("prune", *TEXT, "--sparsity", "2:4", "--timing", "--out", out)
    assert "wanda removed 50% of the 18,432 prunable weights" in " ".join(found.stdout.split())
    assert "left alone head: 2,048 parameters" in said(found)
    assert "model.layers.1" in found.stderr
    assert "4,608 of 9,216 kept (50.00%) error 0." in said(found)
    assert {"model.safetensors", "config.json", "recipe.yaml", "secateur.json", "README.md"} <= {
        p.name for p in out.iterdir()
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.log"]
    assert "model.layers.1" in (tmp_path / "out.log").read_text()
    record = json.loads((out / "secateur.json").read_text())
    assert record["command"].startswith("secateur prune tiny:decoder wanda --task tiny:toy_text")
    mask = weights_of(out)["model.layers.0.mlp.up_proj.weight"].reshape(64, 8, 4) != 0
    assert bool((mask.sum(-1) == 2).all())


def test_json_is_all_of_standard_output_and_quiet_is_quiet(tmp_path):
    found = run("prune", *VECTORS, "--json", "--quiet", "--out", tmp_path / "out")
    value = json.loads(found.stdout)
    assert (value["method"], value["missed"]) == ("magnitude", [])
    assert found.stderr == ""


def test_the_seed_and_the_options_reach_the_run(tmp_path):
    args = ("prune", "tiny:mlp", "random", "--task", "tiny:toy_vectors", "--no-eval")
    run(*args, "--seed", "1", "--out", tmp_path / "a")
    run(*args, "--seed", "1", "--out", tmp_path / "b")
    run(*args, "--seed", "2", "--out", tmp_path / "c")
    assert same(tmp_path / "a", tmp_path / "b")
    assert not same(tmp_path / "a", tmp_path / "c")
    record = json.loads((tmp_path / "a/secateur.json").read_text())
    assert record["measurements"] == []
    assert record["task"]["seed"] == 1


@pytest.mark.parametrize("columns", ["80", "100", "140"])
def test_the_list_breaks_no_word(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", columns)
    lines = CliRunner().invoke(main, ["list"]).stdout.splitlines()
    assert all(len(line) <= int(columns) for line in lines)
    words = {word for line in lines for word in line.split()}
    assert {"inconclusive", "calibration,", "structure_selection"} <= words
    assert {"transformer", "training"} <= {word.strip(",") for word in words}
    assert not words & {"e", "n", "ion", "mer", "inconclusiv"}


@pytest.mark.parametrize("given", [("--sparsity", "0.5"), ("--sparsity=0.5",)])
def test_the_value_of_an_option_is_not_taken_for_the_method_that_is_missing(given):
    assert "Missing argument 'METHOD', and --sparsity is no option without one" in said(
        run("plan", "tiny:mlp", *given, code=2)
    )


def test_options_may_stand_anywhere(tmp_path):
    run("prune", "--sparsity", "0.25", "--out", tmp_path / "a", "tiny:mlp", "magnitude", "--task=tiny:toy_vectors")
    assert json.loads((tmp_path / "a/secateur.json").read_text())["settings"]["sparsity"] == 0.25


def test_a_missed_target_ends_with_three(tmp_path, monkeypatch):
    kind = load("magnitude")
    whole = kind.run
    monkeypatch.setattr(kind, "run", lambda self, model, task: whole(replace(self, sparsity=0.2), model, task))
    found = run("prune", *VECTORS, "--out", tmp_path / "out", code=MISSED)
    assert "a sparsity of 0.5 of the weights was asked for" in said(found)
    assert (tmp_path / "out/model.safetensors").exists()


def test_a_fault_is_said_without_a_traceback(tmp_path, monkeypatch):
    def broken(self, model, task):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(load("magnitude"), "run", broken)
    found = run("prune", *VECTORS, "--out", tmp_path / "out", code=1)
    assert "--debug" in found.stderr
    assert "Traceback" not in found.stderr
    assert "Traceback" in run("prune", *VECTORS, "--debug", "--out", tmp_path / "out", code=1).stderr


# Resuming


class Killed(KeyboardInterrupt):
    pass


def test_a_killed_run_is_taken_up_again(tmp_path, monkeypatch):
    args = ("prune", "tiny:decoder", "sparsegpt", "--task", "tiny:toy_text", "--samples", "16")
    run(*args, "--out", tmp_path / "whole")
    told = spoken.Blocks.__call__

    def kill(self, block):
        told(self, block)
        if block.index == 0:
            raise Killed

    monkeypatch.setattr(spoken.Blocks, "__call__", kill)
    found = run(*args, "--out", tmp_path / "out", code=INTERRUPTED)
    assert "1 of 2 blocks are done" in said(found)
    assert "run the same command again" in said(found)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".out.journal", "out.log", "whole", "whole.log"]
    monkeypatch.setattr(spoken.Blocks, "__call__", told)
    before = json.loads((tmp_path / ".out.journal/before.json").read_text())
    (tmp_path / ".out.journal/before.json").write_text(json.dumps({**before, "perplexity": 1.5}))
    other = run(*args, "--seed", "1", "--out", tmp_path / "out", code=BAD_INPUT)
    assert "journal there is of another model" in said(other)
    assert "--fresh" in said(other)
    assert "run the same command again" not in said(other)
    found = run(*args, "--out", tmp_path / "out")
    assert "taken up again after 1 blocks" in said(found)
    assert "model.layers.0 " not in found.stderr
    assert same(tmp_path / "whole", tmp_path / "out")
    assert "before: perplexity 1.500" in said(found)  # not measured twice
    assert not (tmp_path / ".out.journal").exists()


def test_a_fresh_run_forgets_an_earlier_one(tmp_path, monkeypatch):
    args = ("prune", *TEXT, "--no-eval", "--out", tmp_path / "out")
    told = spoken.Blocks.__call__

    def kill(self, block):
        raise Killed

    monkeypatch.setattr(spoken.Blocks, "__call__", kill)
    run(*args, code=INTERRUPTED)
    monkeypatch.setattr(spoken.Blocks, "__call__", told)
    assert "model.layers.0 " in run(*args, "--fresh", "--sparsity", "0.25").stderr


def test_a_folder_that_is_no_journal_is_not_deleted(tmp_path):
    (tmp_path / "j").mkdir()
    (tmp_path / "j/mine.txt").write_text("dear diary")
    run("prune", *TEXT, "--fresh", "--resume", tmp_path / "j", "--out", tmp_path / "out", code=BAD_INPUT)
    assert (tmp_path / "j/mine.txt").exists()


def test_a_killed_chain_is_taken_up_again(tmp_path, monkeypatch):
    file = tmp_path / "steps.yaml"
    file.write_text(
        "- {method: wanda, sparsity: 0.25, samples: 8}\n- {method: sparsegpt, sparsity: 0.5, samples: 16}\n"
    )
    args = ("prune", "tiny:decoder", file, "--task", "tiny:toy_text")
    run(*args, "--out", tmp_path / "whole")
    told, seen = spoken.Blocks.__call__, []

    def kill(self, block):
        told(self, block)
        seen.append(block.index)
        if len(seen) == 3:  # the first block of the second walk
            raise Killed

    monkeypatch.setattr(spoken.Blocks, "__call__", kill)
    run(*args, "--out", tmp_path / "out", code=INTERRUPTED)
    monkeypatch.setattr(spoken.Blocks, "__call__", told)
    run(*args, "--out", tmp_path / "out")
    assert same(tmp_path / "whole", tmp_path / "out")


# Recipes


def test_a_recipe_runs_again(tmp_path):
    run("prune", *TEXT, "--sparsity", "1:4", "--task.window", "8", "--seed", "3", "--out", tmp_path / "a")
    written = tmp_path / "a/recipe.yaml"
    assert yaml.safe_load(written.read_text())["task"] == {"name": "tiny:toy_text", "window": 8}
    run("prune", "tiny:decoder", written, "--out", tmp_path / "b")
    run("prune", written, "--out", tmp_path / "c")
    assert same(tmp_path / "a", tmp_path / "b")
    assert same(tmp_path / "a", tmp_path / "c")
    run("prune", written, "--set", "pattern=2:4", "--set", "task.window=16", "--out", tmp_path / "d")
    found = json.loads((tmp_path / "d/secateur.json").read_text())["settings"]
    assert (found["sparsity"], found["pattern"]) == (0.5, "2:4")


@pytest.mark.parametrize(
    ("text", "advice"),
    [
        ("stps: []", "Did you mean steps"),
        ("steps: []", "it has no steps"),
        ("steps:\n- metod: wanda", "names no method"),
        ("steps:\n- method: wnda", "Did you mean wanda"),
        ("steps:\n- method: wanda\n  sparsty: 0.5", "Did you mean sparsity"),
        ("steps:\n- method: wanda\n  sparsity: 30", "Did you mean 0.3"),
        ("steps:\n- method: wanda\n  sparsity: 0.5\n  sparsity: 0.6", "there is twice"),
        ("steps: [", "not YAML"),
        ("just words", "it holds no steps"),
    ],
)
def test_recipes_that_cannot_be(text, advice, tmp_path):
    (tmp_path / "r.yaml").write_text(text)
    found = run(
        "prune", "tiny:mlp", tmp_path / "r.yaml", "--task", "tiny:toy_vectors", "--out", tmp_path / "o", code=BAD_INPUT
    )
    assert advice.replace("there is twice", "is there twice") in said(found)


def test_a_recipe_reads_patterns_as_patterns():
    assert recipe._loaded("pattern: 2:4", "here") == {"pattern": "2:4"}  # 124 in YAML 1.1
    assert recipe._loaded("a: 1e-3\nb: 0.5\nc: -3\nd: [1, x]", "here") == {"a": 1e-3, "b": 0.5, "c": -3, "d": [1, "x"]}


def test_steps_are_told_apart_by_number():
    value = {"steps": [{"method": "wanda"}, "magnitude"]}
    found = recipe.recipe_of(recipe.overridden(value, ["1.sparsity=0.3", "steps.0.samples=4", "seed=7"]))
    assert (found.steps[0].samples, found.steps[1].sparsity, found.seed) == (4, 0.3, 7)
    with pytest.raises(SettingError, match="Say which"):
        recipe.overridden(value, ["sparsity=0.3"])


# eval, inspect; compare has tests of its own


def test_eval_measures_what_prune_measured(tmp_path):
    run("prune", *TEXT, "--out", tmp_path / "out")
    after = json.loads((tmp_path / "out/secateur.json").read_text())["measurements"][1]["values"]
    found = json.loads(run("eval", tmp_path / "out", "--json").stdout)
    assert found["values"] == pytest.approx(after)
    assert "perplexity" in run("eval", tmp_path / "out").stdout


def test_inspect_counts_zeros(tmp_path):
    run("prune", *TEXT, "--no-eval", "--out", tmp_path / "out")
    found = json.loads(run("inspect", tmp_path / "out", "--json").stdout)
    assert found["zeros"] == pytest.approx(9216 / 20640)
    assert "stock loaders take it" in run("inspect", tmp_path / "out").stdout


def test_a_target_missed_on_the_way_ends_with_three(tmp_path, monkeypatch):
    def miss(self, model, task):
        raise BudgetError("0.5 was asked for", "0.4 is all there is", "Ask for 0.4.")

    monkeypatch.setattr(load("magnitude"), "run", miss)
    run("prune", *VECTORS, "--out", tmp_path / "out", code=MISSED)
    assert not (tmp_path / "out").exists()


def test_without_a_verb_there_is_help():
    found = run(code=BAD_INPUT)
    assert "Verbs:" in found.stderr
    assert "error" not in found.stderr


def test_nothing_slow_is_imported_for_help():
    import subprocess
    import sys

    code = "import sys; import secateur.cli.list, secateur.cli.prune; print('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_the_package_and_the_command_say_one_version():
    import secateur

    said = CliRunner().invoke(main, ["--version"]).output
    assert said.strip().endswith(secateur.__version__)
