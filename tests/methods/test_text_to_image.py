"""Components pruned apart: by hand, the pitfalls of the published code, sweeps and searches, folders in and out."""

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from math import inf
from pathlib import Path

import pytest
import torch
from tiny import make_task, trained
from torch import nn

pytest.importorskip("diffusers")

from pipelines import pixels, stable_diffusion

from secateur import prune
from secateur.axes import NM, Owl, PerMatrix, PerRow, Wanda
from secateur.axes.cliffs import AtBudget, Line, cliff, lost
from secateur.cli import main as command
from secateur.edit import Mask
from secateur.errors import PatternError, SecateurError, SettingError, SiteError, TaskError
from secateur.evidence import observe
from secateur.methods.text_to_image import Band, Scope, TextToImage, components, decibels, nominal, trimmed
from secateur.plan import plan
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks import open_task


def quick(model: nn.Module, **settings: object):
    return open_task("prompts", model=model, pictures=2, steps=2, **settings)


# By hand


class Two(nn.Module):
    """Two components of one matrix each."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.net = nn.Sequential(nn.Linear(4, 1, bias=False)), nn.Sequential(nn.Linear(4, 2, bias=False))
        with torch.no_grad():
            self.text[0].weight.copy_(torch.tensor([[4.0, -1.0, 3.0, 2.0]]))
            self.net[0].weight.copy_(torch.tensor([[1.0, -5.0, 2.0, 8.0], [-3.0, 4.0, 7.0, -6.0]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.text(x) + self.net(x)


def test_two_components_by_hand() -> None:
    method = TextToImage(components=("text=0.5", "net=0.25"), show=0)
    done = prune(Two(), method, make_task_of_four())
    assert done.model.text[0].weight.tolist() == [[4.0, 0.0, 3.0, 0.0]]
    assert done.model.net[0].weight.tolist() == [[0.0, -5.0, 0.0, 8.0], [-3.0, 4.0, 7.0, -6.0]]
    # energy: text 25 kept over 5 removed; overall (0.5 * 4 + 0.25 * 8) / 12 by whole components, 4 of 12 zeros
    assert any("text: 2 weights are zero, 50.0% of the component" in n and "7.0 dB" in n for n in done.notes)
    assert any("overall 33.3%" in n and "4 of 12 parameters are really zero" in n for n in done.notes)


def make_task_of_four():
    from secateur.tasks.labelled import Labelled

    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    return Labelled("four", {s: (x, torch.zeros(16, dtype=torch.int64)) for s in ("train", "val", "test")})


def test_the_published_overall_figure() -> None:
    share = nominal({"text_encoder": 0.475, "unet": 0.35}, {"text_encoder": 340, "unet": 866})
    assert share == pytest.approx(0.385, abs=5e-4)


def test_decibels_by_hand() -> None:
    assert decibels(100.0, 1.0) == pytest.approx(20.0)
    assert decibels(1.0, 0.0) == inf
    assert decibels(0.0, 1.0) == -inf


def test_a_sparsity_that_rounds_to_no_weight_removes_none() -> None:
    done = prune(Two(), TextToImage(components=("text=0.2", "net=0.1"), show=0), make_task_of_four())
    assert torch.equal(done.model.text[0].weight, Two().text[0].weight)  # the published index would be -1: all gone
    assert int((done.model.net[0].weight == 0).sum()) == 0


@pytest.mark.parametrize("low", [0.0, 0.25, 0.5])
def test_a_band_removes_what_lies_between_two_quantiles(low: float) -> None:
    score = torch.tensor([[8.0, 1.0, 5.0, 3.0], [2.0, 7.0, 6.0, 4.0]])
    keep = Band(low).select(score, 6)
    gone = sorted(score[~keep].tolist())
    assert gone == [8 * low + 1, 8 * low + 2]


def test_bands_of_a_matrix_are_disjoint_and_together_are_all_of_it() -> None:
    score = torch.randint(5, (6, 7), generator=torch.Generator().manual_seed(1)).float()  # many ties
    cuts = [0.0, 0.3, 0.55, 1.0]
    total = torch.zeros_like(score)
    for low, high in pairwise(cuts):
        count = int(high * 42 + 1e-9) - int(low * 42 + 1e-9)
        total += (~Band(low).select(score, 42 - count)).float()
    assert torch.equal(total, torch.ones_like(score))


def test_a_band_never_reaches_below_its_quantile() -> None:
    assert Band(0.5).nearest((2, 4), 1) == 4


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("text=0.5-0.75", r"band\(above=0.5\) spares what lies below it"),
        ("text=magnitude+2:4@0.5", "2:4 prescribes it"),
    ],
)
def test_a_pattern_that_decides_the_sparsity_cannot_be_searched(text: str, says: str) -> None:
    for search in (Line(), AtBudget()):
        with pytest.raises(SettingError, match=f"sparsity of text was to be searched, but {says}"):
            prune(Two(), TextToImage(components=(text, "net=0.25"), search=search, show=0), make_task_of_four())


# How components are written


@pytest.mark.parametrize(
    ("text", "scope"),
    [
        ("unet=0.35", Scope("unet", 0.35)),
        ("unet=35%", Scope("unet", 0.35)),
        ("unet=magnitude@0.35", Scope("unet", 0.35)),
        ("text_encoder=wanda@0.5", Scope("text_encoder", 0.5, Wanda(), PerRow())),
        ("a=wanda+per-matrix+owl(outlier=7)@0.5", Scope("a", 0.5, Wanda(), PerMatrix(), Owl(outlier=7))),
        ("a=magnitude+2:4@0.5", Scope("a", 0.5, pattern=NM(2, 4))),
        ("a=0.25-0.5", Scope("a", 0.25, pattern=Band(0.25))),
    ],
)
def test_a_component_as_it_is_written(text: str, scope: Scope) -> None:
    assert Scope.read(text) == scope


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("unet", SettingError, "it cannot be read"),
        ("unet=magnitude@1.5", SettingError, "fraction removed"),
        ("unet=35", SettingError, "Did you mean 0.35"),
        ("unet=magnitud@0.5", SettingError, "Did you mean magnitude"),
        ("unet=magnitude+wanda@0.5", SettingError, "two of a kind"),
        ("unet=rank@0.5", SettingError, "is no criterion, pattern or allocation"),
        ("unet=0.5-0.3", SettingError, "its band runs from 0.5 to 0.3"),
        ("unet=magnitude+2:4@0.3-0.4", SettingError, "is a pattern, beside 2:4"),
        ("unet=magnitude+2:4@0.3", SecateurError, "always removes 0.5"),
    ],
)
def test_a_component_that_cannot_be_read_is_refused(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises((error, PatternError), match=says):
        TextToImage(components=(text,)).check()


def test_a_component_named_twice_is_refused() -> None:
    with pytest.raises(SettingError, match="unet is named twice"):
        TextToImage(components=("unet=0.3", "unet=0.4")).check()


# What is covered


def test_a_name_the_pipeline_does_not_have_is_refused_with_the_nearest() -> None:
    model = pixels()
    with pytest.raises(SiteError, match="Did you mean text_encoder"):
        TextToImage(components=("text_encodr=0.5",)).run(model, quick(model))


@pytest.mark.parametrize("criterion", ["wanda", "gblm"])
def test_a_criterion_that_a_component_cannot_be_scored_by_is_refused(criterion: str) -> None:
    model = pixels()
    with pytest.raises(SettingError, match="unet was to be pruned by"):
        TextToImage(components=(f"unet={criterion}@0.5",)).run(model, quick(model))


def test_convolutions_stay_dense_unless_included_and_both_are_said() -> None:
    model = pixels()
    method = TextToImage(components=("unet=0.5",), show=0)
    done = prune(model, method, quick(model))
    cut = {e.site.name for e in done.edits}
    linear = {f"unet.{n}.weight" for n, m in model.unet.named_modules() if isinstance(m, nn.Linear)}
    assert cut == linear
    assert any("convolutions stay dense" in note for note in done.notes)
    for name, module in done.model.unet.named_modules():
        if isinstance(module, nn.Conv2d):
            assert bool((module.weight != 0).all()), name
    wide = prune(model, replace(method, include=("Linear", "Conv2d")), quick(model))
    assert {f"unet.{n}.weight" for n, m in model.unet.named_modules() if isinstance(m, nn.Conv2d)} <= {
        e.site.name for e in wide.edits
    }


class Wide(nn.Linear):
    """A subclass, as adapters and quantisers make them."""


def test_subclasses_of_linear_layers_are_found() -> None:
    model = pixels()
    first = model.unet.time_embedding.linear_1
    wide = Wide(first.in_features, first.out_features)
    wide.load_state_dict(first.state_dict())
    model.unet.time_embedding.linear_1 = wide
    done = prune(model, TextToImage(components=("unet=0.5",), show=0), quick(model))
    assert any("time_embedding.linear_1" in e.site.name for e in done.edits)


def test_weights_no_picture_depends_on_are_neither_pruned_nor_counted() -> None:
    model = pixels()
    done = prune(model, TextToImage(components=("text_encoder=0.5",), show=0), quick(model))
    assert not any("pooler" in e.site.name for e in done.edits)
    assert any("left out, as no picture depends on them: text_encoder.pooler" in n for n in done.notes)
    assert done.ledger.share == pytest.approx(0.5)


def test_layers_behind_the_one_that_is_read_are_left_out(tmp_path: Path) -> None:
    from secateur.models.pipelines import open_pipeline

    model = open_pipeline(stable_diffusion(tmp_path / "sd"))
    method = TextToImage(components=("text_encoder=0.5",), show=0)
    assert any(".2." in s.name for s in method.sites_in(model))
    model.skipped = 1
    assert not any("layers.2." in s.name for s in method.sites_in(model))


def test_any_model_is_a_pipeline_of_its_children() -> None:
    assert components(trained("encoder")) == ["bert", "classifier"]
    done = prune(trained("encoder"), TextToImage(components=("classifier=0.5",), show=0), make_task("encoder"))
    assert {e.site.name for e in done.edits} == {"classifier.weight"}


# Calibration


def test_calibration_captions_are_padded_as_at_inference_unless_padding_is_ignored() -> None:
    model = pixels()
    tokens = model.tokens(["a cat", "the red house of a dog"])
    assert tokens["input_ids"].shape == (2, model.length)
    short = list(trimmed([Batch(tokens)]))
    assert sorted(b.inputs["input_ids"].shape for b in short) == [(1, 4), (1, 8)]
    assert not any((b.inputs["input_ids"] == 0).any() for b in short)
    site = TextToImage(components=("text_encoder=0.5",)).sites_in(model)[0]
    loud, quiet = (observe(model, [site], found, {"input_square"})[site.name] for found in ([Batch(tokens)], short))
    assert (loud.count, quiet.count) == (16, 12)  # 4 of the 16 places are padding
    method = TextToImage(components=("text_encoder=wanda@0.5",), samples=8, show=0)
    both = [prune(model, replace(method, ignore_padding=flag), quick(model)) for flag in (False, True)]
    assert any(not torch.equal(a.keep, b.keep) for a, b in zip(both[0].edits, both[1].edits, strict=True))


def test_wanda_scores_the_text_encoder_by_rows_on_captions() -> None:
    model = pixels()
    task = quick(model)
    done = prune(model, TextToImage(components=("text_encoder=wanda@0.5",), samples=10, show=0), task)
    first = done.edits[0]
    seen = observe(model, [first.site], list(task.batches("calibration", 10)), {"input_square"})[first.site.name]
    score = Wanda().score(first.site, tensors(model), seen)
    assert torch.equal(first.keep, PerRow().select(score, first.kept))


def test_owl_spends_by_wandas_scores_and_meets_the_total() -> None:
    model = pixels()
    text = "text_encoder=magnitude+owl(outlier=2)@0.6"
    done = prune(model, TextToImage(components=(text,), samples=10, show=0), quick(model))
    kept = {row.kept / row.units for row in done.record.sites}
    assert len(kept) > 1
    assert done.ledger.share == pytest.approx(0.6, abs=1e-3)


def test_more_captions_than_there_are_is_refused_with_what_to_do() -> None:
    model = pixels()
    with pytest.raises(TaskError, match="it holds 10"):
        prune(model, TextToImage(components=("text_encoder=wanda@0.5",), show=0), quick(model))


# Sweeps and searches


def test_a_cliff_by_hand() -> None:
    points = [(0.2, 18.0), (0.4, 19.0), (0.6, 27.0), (0.7, 200.0), (0.8, 18.0)]
    assert cliff(points, dense=18.0, ruined=218.0, tolerance=0.05) == 0.6
    assert cliff(points, dense=18.0, ruined=218.0, tolerance=0.01) == 0.4
    assert cliff(points, dense=18.0, ruined=218.0, tolerance=0.0) == 0.2
    assert cliff([(0.1, 30.0)], dense=18.0, ruined=30.0, tolerance=0.1) == 0.0
    assert cliff([(0.1, 0.8), (0.2, 0.3)], dense=0.9, ruined=0.1, tolerance=0.2) == 0.1  # higher is better


def test_losing_nothing_of_nothing() -> None:
    assert lost(5.0, 5.0, 5.0) == 0.0


def fragile(text: float, unet: float):
    """A quality (lower is better) that is flat up to a cliff for each component, then rises."""

    def trial(shares: Mapping[str, float]) -> float:
        over = max(shares["text"] - text, 0) + max(shares["unet"] - unet, 0)
        return 18 + 1000 * over + 20 * shares["text"] * shares["unet"]

    return trial


def test_the_papers_search_finds_each_cliff_and_goes_back_along_the_line() -> None:
    notes: list[str] = []
    grid = tuple(i / 20 for i in range(1, 17))
    found = Line(grid=grid, tolerance=0.005, step=0.05).find(fragile(0.55, 0.35), {"text": 340, "unet": 866}, notes)
    assert notes[0].endswith("0.55")
    assert notes[1].endswith("0.35")
    assert found["text"] - found["unet"] == pytest.approx(0.2)  # along the line
    assert found["text"] < 0.55  # both at their cliffs cost more together than either alone
    assert fragile(0.55, 0.35)(found) <= 18 + 0.005 * 450


def test_a_budget_is_spent_where_it_hurts_least() -> None:
    sizes, notes = {"text": 400, "unet": 800}, []
    trial = fragile(0.7, 0.3)
    found = AtBudget(sparsity=0.4, grid=(0.2, 0.4, 0.6, 0.7)).find(trial, sizes, notes)
    assert (found["text"] * 400 + found["unet"] * 800) / 1200 == pytest.approx(0.4)
    assert found["text"] > 0.55
    assert trial(found) < trial({"text": 0.4, "unet": 0.4})


@pytest.mark.parametrize("grid", [(), (0.4, 0.2), (0.5, 1.2)])
def test_a_grid_that_does_not_rise_is_refused(grid: tuple[float, ...]) -> None:
    with pytest.raises(SettingError):
        Line(grid=grid)


def test_a_search_leaves_a_pipeline_pruned_as_it_found_with_its_sweeps_recorded() -> None:
    model = pixels()
    method = TextToImage(
        components=("text_encoder=0.5", "unet=0.5"), search=Line(grid=(0.3, 0.9), tolerance=0.5, step=0.1), show=2
    )
    done = prune(model, method, quick(model), measure="val")
    found = next(n for n in done.notes if n.startswith("found: "))
    shares = dict(pair.split() for pair in found.removeprefix("found: ").split(", "))
    rows = {name: [r for r in done.record.sites if r.site.startswith(name)] for name in shares}
    for name, share in shares.items():
        if float(share):
            gone = sum(r.units - r.kept for r in rows[name]) / sum(r.units for r in rows[name])
            assert gone == pytest.approx(float(share), abs=0.02)
        else:
            assert not rows[name]
    assert {"distance, text_encoder alone, by percent removed", "distance, unet alone, by percent removed"} == set(
        done.record.curves
    )
    assert [row.of for row in done.record.pictures] == [
        "dense", "text_encoder 0.3", "text_encoder 0.9", "unet 0.3", "unet 0.9", "together",
    ]  # fmt: skip


def test_trials_put_every_weight_back() -> None:
    model = pixels()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    method = TextToImage(
        components=("text_encoder=wanda@0.5", "unet=0.5"), search=Line((0.9,), 0.0, 0.5), samples=8, show=1
    )
    done = method.run(model, quick(model))
    assert "together they bear nothing within the tolerance: all was left dense" in done.notes
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# Folders and the command line


def main(words: list[str]) -> int:
    with pytest.raises(SystemExit) as ended:
        command(words)
    return int(ended.value.code or 0)


def test_the_same_command_prunes_a_stable_diffusion_folder(tmp_path: Path, capsys) -> None:
    from diffusers import StableDiffusionPipeline

    folder = stable_diffusion(tmp_path / "sd")
    words = ["prune", str(folder), "text_to_image", "--out", str(tmp_path / "out")]
    words += ["--components", "text_encoder=magnitude@0.475,unet=magnitude@0.35"]
    words += ["--task.pictures", "2", "--task.steps", "2", "--show", "2", "--json"]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)
    assert {m["when"] for m in said["measurements"]} == {"before", "after"}
    assert said["measurements"][0]["values"]["distance"] == 0.0
    assert said["measurements"][1]["values"]["distance"] > 0.0
    pipe = StableDiffusionPipeline.from_pretrained(str(tmp_path / "out"), local_files_only=True, use_safetensors=True)
    query = pipe.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight
    assert int((query == 0).sum()) == int(0.35 * query.numel())
    fc1 = next(m for n, m in pipe.text_encoder.named_modules() if n.endswith("layers.0.mlp.fc1")).weight
    assert int((fc1 == 0).sum()) == int(0.475 * fc1.numel())
    assert bool((pipe.unet.conv_in.weight != 0).all())
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "page.html"), "--quiet"]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4  # dense, each alone, together
    assert "text_encoder 0.475" in page


def test_a_misspelt_component_is_bad_input_on_the_command_line(tmp_path: Path, capsys) -> None:
    folder = stable_diffusion(tmp_path / "sd")
    words = ["prune", str(folder), "text_to_image", "--out", str(tmp_path / "out"), "--components", "unett=0.5"]
    assert main([*words, "--task.pictures", "1", "--task.steps", "1"]) == 2
    assert "Did you mean unet?" in capsys.readouterr().err


def test_a_plan_lists_what_would_be_cut() -> None:
    model = pixels()
    found = plan(TextToImage(components=("unet=0.5",)), model, quick(model), priced=False)
    assert all(row.site.startswith("unet.") for row in found.rows)
    assert any(each.name == "unet.conv_in.weight" for each in found.left)


def test_masks_are_the_only_edits() -> None:
    model = pixels()
    done = TextToImage(components=("text_encoder=0.5", "unet=0.3"), show=0).run(model, quick(model))
    assert all(isinstance(e, Mask) for e in done.edits)
