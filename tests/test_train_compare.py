"""Comparisons of training: equal steps, baselines always there, done once, in processes, on Ray, and what was spent."""

import json

import pytest
import tiny
import torch
from command_line import run, said

from secateur.axes import Erk
from secateur.cli import BAD_INPUT, training
from secateur.cli.dense import Dense, redrawn_
from secateur.cut import weights
from secateur.errors import SettingError
from secateur.method import prune
from secateur.methods.gradual import GradualPruning
from secateur.methods.set import SparseEvolution
from secateur.models.recurrent import RecurrentClassifier
from secateur.outcome import Record
from secateur.report.compare import points
from secateur.tasks.grammar import reber

GRID = ("compare", "tiny:mlp", "--task", "tiny:toy_vectors", "--epochs", "0.5")


def records_of(page):
    folder = page.with_name(page.stem + "-records")
    return [Record.read(p) for p in sorted(folder.glob("*.json")) if not p.name.endswith(".failed.json")]


@pytest.fixture(autouse=True)
def _drawing():
    pytest.importorskip("altair", reason="the report's packages are not installed: pip install 'secateur[report]'")


def test_methods_are_trained_alike_beside_their_baselines_and_only_once(tmp_path):
    out = tmp_path / "page.html"
    args = (*GRID, "--methods", "set", "--sparsity", "0.5,80%", "--seeds", "2", "--out", out)
    found = json.loads(run(*args, "--json").stdout)
    rows = {(row["method"], row["asked"]): row for row in found["table"]}
    assert set(rows) == {(m, s) for m in ("set", "random_pruning", "gradual", "dense") for s in (0.5, 0.8)} | {
        ("dense", 0.0)
    }
    assert found["failures"] == []
    assert {row["seeds"] for row in rows.values()} == {2}
    assert all(row["half_width"] is not None for row in rows.values())
    assert found["dense"] == pytest.approx(rows["dense", 0.0]["quality"])

    records = records_of(out)
    assert {r.settings["steps"] for r in records} == {12}  # half of 24 batches
    last = {(r.method, r.settings["sparsity"]): r.curves["training compute"][-1] for r in records}
    assert {step for step, _ in last.values()} == {12}
    whole = last["dense", 0.0][1]
    assert whole == 12 * 3 * 32 * 2 * (16 * 32 + 32 * 32 + 32 * 4)
    assert last["set", 0.8][1] < last["set", 0.5][1] < last["gradual", 0.5][1] < whole
    assert last["dense", 0.8][1] < 0.25 * whole
    erk = next(r for r in records if r.method == "random_pruning")
    assert erk.settings["allocation"] == "erk"

    page = out.read_text()
    for words in ("Quality against training compute", "Layer densities over training: set", "Quality against sparsity"):
        assert words in page, words
    assert "18 runs of 12 steps, 18 of them done before" in said(run(*args))
    one = sorted((tmp_path / "page-records").glob("set-*.json"))[0]
    before = json.loads(one.read_text())
    one.unlink()
    assert "18 runs of 12 steps, 17 of them done before" in said(run(*args, "--jobs", "2"))
    after = json.loads(one.read_text())  # made in another process, to the same numbers
    assert after["curves"] == before["curves"]
    assert after["measurements"] == before["measurements"]


def test_five_operating_points_and_three_seeds_unless_asked_otherwise():
    found = training.asked("rigl", training.LEVELS, (), 40)
    by_name = {name: [m.sparsity for m in found if m.name == name] for name in {m.name for m in found}}
    five = [0.5, 0.8, 0.9, 0.95, 0.98]
    assert by_name == {"rigl": five, "random_pruning": five, "gradual": five, "dense": [0.0, *five]}
    assert {m.steps for m in found} == {40}
    assert training.SEEDS == 3
    assert {m.allocation for m in found if m.name == "random_pruning"} == {Erk()}
    assert {m.every for m in found if m.name == "rigl"} == {2}  # a schedule that fits so short a training


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("--methods", "wanda", "--epochs", "1"), "it does not train"),
        (("--methods", "set(steps=3)", "--epochs", "1"), "it is told how many it takes"),
        (("--methods", "set", "--epochs", "1", "--set", "sample=3"), "none of the methods has such a setting"),
        (("--methods", "set", "--epochs", "1", "--curves", "tensorbord"), "Did you mean tensorboard"),
        (("--methods", "magnitude", "--jobs", "2"), "it is for comparisons of training"),
    ],
)
def test_what_cannot_be_compared_is_refused(args, words, tmp_path):
    found = run(
        "compare", "tiny:mlp", "--task", "tiny:toy_vectors", *args, "--out", tmp_path / "p.html", code=BAD_INPUT
    )
    assert words in said(found)


def test_a_dense_network_of_the_same_size_is_no_larger_and_hardly_smaller():
    model, task = tiny.cnn(), tiny.make_task("cnn")
    whole = sum(p.numel() for p in model.parameters())
    prunable = sum(site.units for site in weights(model))
    for sparsity in (0.5, 0.9):
        done = prune(model, Dense(sparsity=sparsity, steps=2), task)
        count = sum(p.numel() for p in done.model.parameters())
        aim = whole - sparsity * prunable
        assert 0.6 * aim < count <= aim + 1
        assert all(bool((p != 0).any()) for p in done.model.parameters() if p.dim() > 1)
    assert sum(p.numel() for p in prune(model, Dense(steps=2), task).model.parameters()) == whole


def test_new_weights_are_those_of_the_seed():
    one, two, three = tiny.mlp(), tiny.mlp(seed=1), tiny.mlp()
    redrawn_(one, 0)
    redrawn_(two, 0)
    redrawn_(three, 1)
    assert torch.equal(one[0].weight, two[0].weight)
    assert not torch.equal(one[0].weight, three[0].weight)


def test_what_was_spent_is_counted_layer_by_layer_as_density_moves():
    model, task = tiny.mlp(), tiny.toy_vectors()
    done = prune(model, GradualPruning(sparsity=0.5, begin=0.5, until=0.5, steps=10, every=1), task)
    curves = training.spent(model, done, task)
    per_step = 3 * 32 * 2 * 1664
    assert dict(curves["training compute"])[5] == pytest.approx(5 * per_step)
    assert curves["training compute"][-1] == (10, pytest.approx(7.5 * per_step))
    assert curves["density of 0.weight"][-1] == (5, 0.5)
    held = prune(model, SparseEvolution(sparsity=0.75, steps=10, every=2), task)
    assert training.spent(model, held, task)["training compute"][-1][1] == pytest.approx(2.5 * per_step, rel=0.2)


def test_the_matrices_of_a_recurrent_layer_share_its_work():
    model = RecurrentClassifier(width=8, layers=1)
    task = reber(train_size=64, val_size=16, test_size=16, shortest=5, longest=20, batch=16)
    done = prune(model, GradualPruning(sparsity=0.5, begin=0.5, until=0.5, steps=10, every=1), task)
    curve = dict(training.spent(model, done, task)["training compute"])
    assert curve[10] == pytest.approx(1.5 * curve[5], rel=0.02)  # half of the work for half of the steps


def job(**changes):
    method = GradualPruning(sparsity=0.5, steps=4, every=1)
    import os
    import sys

    paths = tuple(path or os.getcwd() for path in sys.path)
    return training.Job(
        "tiny:mlp", method, "tiny:toy_vectors", {}, 0, "val", folder=os.getcwd(), paths=paths, **changes
    )


def test_runs_go_to_a_ray_cluster_of_two_workers_to_the_same_records(tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # or a token is left in the home folder
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "60")
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'secateur[ray]'")
    try:
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    except Exception as error:  # it says so in no other class
        pytest.skip(f"no local Ray starts here: {str(error).splitlines()[0]}")
    args = (*GRID, "--methods", "set", "--sparsity", "0.5", "--seeds", "1")
    try:
        assert ray.cluster_resources()["CPU"] == 2
        found = run(*args, "--ray", "auto", "--out", tmp_path / "there.html")
    finally:
        ray.shutdown()
    assert "5 runs of 12 steps, 0 of them done before" in said(found)
    run(*args, "--out", tmp_path / "here.html")
    there, here = (records_of(tmp_path / f"{name}.html") for name in ("there", "here"))
    assert [r.method for r in there] == ["dense", "dense", "gradual", "random_pruning", "set"]
    for one, two in zip(there, here, strict=True):
        assert (one.method, one.settings, one.curves, one.sites) == (two.method, two.settings, two.curves, two.sites)
        assert one.measurements == two.measurements
        assert one.ledger.after == two.ledger.after


def test_a_cluster_without_ray_is_refused():
    try:
        import ray  # noqa: F401
    except ImportError:
        with pytest.raises(SettingError, match="ray is not installed"):
            list(training.results([job()], 1, "auto"))
    else:
        pytest.skip("ray is installed")


def test_curves_go_to_tensorboard(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path = tmp_path / "one.json"
    path.write_text(training.run(job()))
    training.writer("tensorboard")(Record.read(path), tmp_path / "curves" / "one.json")
    board = EventAccumulator(str(tmp_path / "curves" / "one")).Reload()
    assert {"sparsity", "training compute", "density/0.weight", "after/accuracy"} <= set(board.Tags()["scalars"])
    assert [e.value for e in board.Scalars("sparsity")][-1] == pytest.approx(0.5)


@pytest.mark.parametrize("to", ["tensorboard", "wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_refused(to):
    from importlib.util import find_spec

    if find_spec(to) is not None:
        pytest.skip(f"{to} is installed")
    with pytest.raises(SettingError, match=f"{to} is not installed"):
        training.writer(to)


def test_points_of_training_are_comparable(tmp_path):
    paths = []
    for seed in (0, 1):
        path = tmp_path / f"{seed}.json"
        path.write_text(training.run(training.replace(job(), seed=seed)))
        paths.append(path)
    (point,) = points(training.with_dense([Record.read(p) for p in paths]))
    assert point.half is not None
