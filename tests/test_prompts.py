"""Captions to be drawn, what stands in for FID and CLIPScore, and pictures as files."""

import base64
import io
from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")

from pipelines import pixels, unet
from tiny import make_model

from secateur.errors import SettingError, TaskError
from secateur.outcome import Pictures
from secateur.report.pictures import grids, size_of
from secateur.tasks import open_task
from secateur.tasks.prompts import CLASSES, EVERYDAY, Judge, frechet, png, strip, with_article


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# What stands in for FID and CLIPScore


def exact(mean: Tensor, root: Tensor, n: int = 400) -> Tensor:
    """Features [n, d] whose mean and covariance are exactly those asked for."""
    x = draw(n, len(mean)).double()
    x = x - x.mean(0)
    white = torch.linalg.inv(torch.linalg.cholesky(torch.cov(x.T)))
    return x @ white.T @ root.T.double() + mean.double()


def test_the_frechet_distance_of_two_gaussians_by_hand() -> None:
    a = exact(torch.tensor([0.0, 0.0]), torch.diag(torch.tensor([1.0, 2.0])))
    b = exact(torch.tensor([3.0, 4.0]), torch.diag(torch.tensor([3.0, 2.0])))
    # 25 between the means; (1 - 3)^2 + (2 - 2)^2 between the deviations
    assert frechet(a, b) == pytest.approx(29.0, abs=1e-6)
    assert frechet(a, a) == pytest.approx(0.0, abs=1e-6)


def test_the_frechet_distance_turns_with_its_features() -> None:
    a, b = draw(50, 4, seed=1), 2 * draw(60, 4, seed=2) + 1
    turn = torch.linalg.qr(draw(4, 4, seed=3))[0]
    assert frechet(a @ turn, b @ turn) == pytest.approx(frechet(a, b), rel=1e-5)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6)


def test_fewer_features_than_dimensions_do_not_break_it() -> None:
    assert frechet(draw(5, 32), draw(100, 32, seed=1)) > 0


def test_a_judge_counts_what_it_takes_for_what_was_asked() -> None:
    made = Judge().eval()
    with torch.no_grad():
        made.name.weight.zero_()
        made.name.bias.copy_(torch.arange(10.0))  # everything is an ankle boot
        made.real.copy_(draw(2000, 32))
    found = made.measure(torch.rand(4, 1, 28, 28), torch.tensor([9, 9, 9, 0]))
    assert found["agreement"] == 0.75
    assert found["frechet"] > 0


# Captions


def test_articles() -> None:
    assert [with_article(n) for n in ("sneaker", "ankle boot")] == ["a sneaker", "an ankle boot"]


def test_the_dense_pipeline_has_not_moved_and_a_changed_one_has() -> None:
    model = pixels()
    task = open_task("prompts", model=model, pictures=2, steps=2)
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1.5)  # before anything was measured: the dense one is kept apart
    assert task.measure(model)["distance"] > 0
    fresh = pixels()
    assert task.measure(fresh)["distance"] == 0.0
    assert (task.metric, task.higher_is_better) == ("distance", False)


def test_the_example_goes_through_and_calibration_is_drawn_by_the_seed() -> None:
    model = pixels()
    task, again, other = (open_task("prompts", model=model, pictures=2, steps=2, seed=s) for s in (0, 0, 1))
    assert task.example.through(model).shape == (2, 1, 8, 8)
    ids = [next(iter(t.batches("calibration", 10))).inputs["input_ids"] for t in (task, again, other)]
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    assert task.fingerprint() == again.fingerprint() != other.fingerprint()


def test_captions_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.txt"
    file.write_text("a red cat\n\na blue dog\na green tree\na house\n")
    task = open_task(str(file), model=pixels(), pictures=2, steps=1)
    assert task.splits["calibration"] == ("a red cat", "a blue dog")
    assert task.splits["val"] == ("a green tree", "a house")
    file.write_text("one\n")
    with pytest.raises(TaskError, match="it holds 1"):
        open_task(str(file), model=pixels())


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("prompt", {}, "Did you mean prompts"),
        ("wikitext2", {}, "none of that name that pictures are drawn for"),
        ("prompts", {"pictures": 0}, "one is the least"),
    ],
)
def test_a_task_that_does_not_fit_a_pipeline_is_refused(name: str, settings: dict, says: str) -> None:
    with pytest.raises(TaskError, match=says):
        open_task(name, model=pixels(), **settings)


def test_a_setting_that_does_not_exist_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingError, match="Did you mean pictures"):
        open_task("prompts", model=pixels(), picture=3)


def test_only_pipelines_draw() -> None:
    with pytest.raises(TaskError, match="turns no text into pictures"):
        open_task("prompts", model=make_model("encoder"))
    with pytest.raises(TaskError, match="needs the pipeline"):
        open_task("prompts")


def test_training_and_losses_without_photographs_are_refused() -> None:
    model = pixels()
    task = open_task("prompts", model=model, pictures=1, steps=1)
    with pytest.raises(TaskError, match="no photographs"):
        next(iter(task.batches("train")))
    with pytest.raises(TaskError, match="captions without photographs"):
        task.loss(model, next(iter(task.batches("val"))))


def test_everyday_captions_are_many_and_differ() -> None:
    assert len(set(EVERYDAY)) == len(EVERYDAY) == 20
    assert len(CLASSES) == 10


# Pictures as files


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_reads_back_pixel_by_pixel(channels: int) -> None:
    from PIL import Image

    pictures = torch.rand(3, channels, 4, 5, generator=torch.Generator().manual_seed(0))
    file = png(strip(pictures))
    seen = torch.tensor(list(Image.open(io.BytesIO(file)).getdata())).reshape(4, 15, channels)
    assert torch.equal(seen.to(torch.uint8), strip(pictures))
    assert seen[1, 7, 0] == round(float(pictures[1, 0, 1, 2]) * 255)
    assert size_of(base64.b64encode(file).decode()) == (15, 4)


def test_large_pictures_are_averaged_down() -> None:
    whole = torch.zeros(2, 3, 128, 128)
    whole[:, :, ::2] = 1.0
    small = strip(whole)
    assert small.shape == (64, 128, 3)
    assert bool((small == 128).all())


@pytest.mark.parametrize("text", ["", "?", base64.b64encode(b"GIF89a" * 9).decode(), '"><script>'])
def test_what_is_no_png_is_left_out_of_a_report(text: str) -> None:
    class Run:
        pictures = [Pictures("dense", ["a"], text)]

    assert grids([("x", Run())]) == []  # type: ignore[list-item]


def test_a_denoiser_of_another_kind_is_refused() -> None:
    from secateur.errors import ModelError
    from secateur.models.pipelines import Pipeline

    with pytest.raises(ModelError, match="it has no text_encoder"):
        Pipeline({"unet": unet(1, 8, 16)}, None, None)
