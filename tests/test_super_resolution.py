"""Super-resolution: how pictures are made small, what PSNR and SSIM are taken of, the networks, rows of a report."""

import base64
import io
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import tasks
from secateur.cut import weights
from secateur.errors import SettingError, TaskError
from secateur.method import prune
from secateur.methods.magnitude import Magnitude
from secateur.models import load, open_model, save
from secateur.models.super_resolution import Bicubic, Edsr, SwinIr, WindowAttention, swinir_x2
from secateur.report.page import page
from secateur.report.pictures import grids, size_of
from secateur.task import Around
from secateur.tasks.super_resolution import SuperResolution, compared, luma, smaller

pytest.importorskip("torchmetrics", reason="SSIM is torchmetrics'")


def noise(count=6, side=24, seed=0):
    draw = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, side // 4, side // 4, generator=draw)
    smooth = F.interpolate(coarse, (side, side), mode="bilinear") * 255
    return smooth.round().to(torch.uint8)


def toy(scale=2, **changes):
    splits = {"train": noise(10, 24), "val": noise(6, 24, seed=1)}
    return SuperResolution("noise", splits, scale, **{"patch": 12, "batch": 4, **changes})


class Added(nn.Module):
    """The right picture but for a constant."""

    def __init__(self, by):
        super().__init__()
        self.by = by

    def forward(self, x):
        return F.interpolate(x, scale_factor=2, mode="nearest") + self.by


def test_luma_and_psnr_of_a_case_worked_by_hand():
    # Grey 100 against grey 110: luma differs by (65.481 + 128.553 + 24.966) * 10 / 255 = 8.588; 10 log10(255^2 / 73.76)
    assert float(luma(torch.ones(3, 1, 1))) == pytest.approx(235)
    assert float(luma(torch.zeros(3, 1, 1))) == pytest.approx(16)
    first, second = (torch.full((1, 3, 20, 20), value / 255) for value in (100.0, 110.0))
    assert float(compared(first, second, 2)[0]) == pytest.approx(10 * math.log10(255**2 / (219 * 10 / 255) ** 2))
    assert float(compared(first, first, 2)[0]) == 100
    assert float(compared(first, first, 2)[1]) == pytest.approx(1)


def test_answers_are_rounded_cut_to_the_range_and_compared_without_their_borders():
    wanted = torch.full((1, 3, 20, 20), 1.0)
    drawn = wanted + 0.3  # brighter than white is white
    drawn[..., :2, :] = drawn[..., -2:, :] = 0
    drawn[..., :, :2] = drawn[..., :, -2:] = 0
    drawn[..., 5, 5] = 254.6 / 255
    assert float(compared(drawn, wanted, 2)[0]) == 100
    assert float(compared(drawn, wanted, 1)[0]) < 20


def test_ssim_is_wangs_calculated_directly():
    first, second = noise(1, 32).double() / 255, noise(1, 32, seed=3).double() / 255
    mix = ((0.7 * first + 0.3 * second) * 255).round() / 255
    at = torch.arange(11, dtype=torch.float64) - 5
    bell = torch.exp(-(at**2) / (2 * 1.5**2))
    window = (bell[:, None] * bell[None, :] / bell.sum() ** 2)[None, None]

    def blurred(x):
        return F.conv2d(x, window)

    a, b = (luma(x)[..., 2:-2, 2:-2] for x in (first, mix))
    ma, mb = blurred(a), blurred(b)
    va, vb, cov = blurred(a * a) - ma**2, blurred(b * b) - mb**2, blurred(a * b) - ma * mb
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    direct = ((2 * ma * mb + c1) * (2 * cov + c2) / ((ma**2 + mb**2 + c1) * (va + vb + c2))).mean()
    assert float(compared(first, mix, 2)[1]) == pytest.approx(float(direct), abs=1e-5)


def test_pictures_are_made_small_as_pillow_does():
    pil = pytest.importorskip("PIL.Image")
    import numpy as np

    picture = noise(1, 48)[0]
    shown = pil.fromarray(picture.permute(1, 2, 0).numpy())
    theirs = torch.from_numpy(np.array(shown.resize((12, 12), pil.Resampling.BICUBIC))).permute(2, 0, 1)
    assert int((smaller(picture, 4).int() - theirs.int()).abs().max()) <= 1
    back = torch.from_numpy(np.array(pil.fromarray(theirs.permute(1, 2, 0).numpy()).resize((48, 48), pil.BICUBIC)))
    ours = (Bicubic(4)(theirs[None].float()).round().clamp(0, 255))[0]
    assert int((ours - back.permute(2, 0, 1)).abs().max()) <= 1
    with pytest.raises(TaskError, match="Cut them to 48x48"):
        smaller(noise(1, 52)[..., :50, :50], 4)


def test_patches_come_from_one_place_in_both_and_are_turned_alike():
    task = toy(scale=2)
    for epoch in range(3):
        for batch in task.batches("train", epoch=epoch):
            (low,), high = batch.inputs, batch.target
            assert low.shape[1:] == (3, 6, 6) and high.shape[1:] == (3, 12, 12)
            mean = F.avg_pool2d(high, 2)
            assert float((low - mean).abs().mean()) < 0.03  # smooth pictures: a wrong place or turn is far off
    first, again = (torch.cat([b.target for b in task.batches("train", epoch=1)]) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, torch.cat([b.target for b in task.batches("train", epoch=2)]))


def test_measurements_are_means_over_pictures_whatever_their_sizes():
    mixed = [noise(1, 24)[0], noise(1, 32)[0], noise(1, 32, seed=5)[0], noise(1, 40)[0]]
    task = SuperResolution("mixed", {"val": mixed}, batch=3)
    found = task.measure(Bicubic(2))
    each = [SuperResolution("one", {"val": [p]}).measure(Bicubic(2)) for p in mixed]
    for key in ("psnr", "ssim", "loss"):
        assert found[key] == pytest.approx(sum(e[key] for e in each) / 4)
    assert (found["pictures"], found["scale"]) == (4, 2)
    assert [len(b.target) for b in task.batches("val")] == [1, 2, 1]


@pytest.mark.parametrize("net", [Edsr, SwinIr])
@pytest.mark.parametrize("scale", [2, 3, 4])
def test_networks_enlarge_by_their_scale_whatever_the_size(net, scale):
    model = net(scale, width=8).eval()
    for high, wide in ((8, 8), (7, 13), (16, 24)):
        assert model(torch.rand(2, 3, high, wide)).shape == (2, 3, scale * high, scale * wide)
    with pytest.raises(SettingError, match="2 to 4"):
        net(5)


def test_attention_stays_in_its_window_and_in_what_was_side_by_side():
    x = torch.randn(2, 8, 8, 8)
    for shift in (0, 2):
        layer = WindowAttention(8, 2, 4, shift).eval()
        changed = x.clone()
        changed[:, 0, 0] += 1  # with windows moved by 2, the first 2x2 pixels are a region of their own
        moved = (layer(changed) - layer(x)).abs().amax((0, 3)) > 1e-7
        side = 4 if shift == 0 else 2
        assert bool(moved[:side, :side].all())
        moved[:side, :side] = False
        assert not bool(moved.any())


def test_what_of_the_networks_is_pruned():
    assert sum(site.units for site in weights(Edsr(2))) == 124_128
    names = [site.name for site in weights(SwinIr(2))]
    assert names[:2] == ["groups.0.plain.attn.qkv.weight", "groups.0.plain.attn.proj.weight"]
    assert not any("places" in name or "tail" in name or "norm" in name for name in names)


def test_a_run_shows_what_was_wanted_bicubic_before_and_after():
    task, model = toy(shown=3, view=20), Edsr(2, width=8, blocks=1)
    outcome = prune(model, Magnitude(sparsity=0.9), task, measure="val")
    rows = outcome.record.pictures
    assert [row.of.split(",")[0] for row in rows] == ["as photographed", "bicubic", "before", "after"]
    assert all(size_of(row.png) == (60, 20) and row.captions == ["picture 1", "picture 2", "picture 3"] for row in rows)
    assert len({row.png for row in rows}) == 4
    assert "dB" in rows[1].of
    (grid,) = grids([("magnitude", outcome.record)])
    assert [row.height for row in grid.rows] == [120] * 4
    assert outcome.record.measured("after")["psnr"] < 40

    text = page([outcome.record])
    assert text.count("data:image/png;base64,") == 4
    assert rows[3].png in text
    pytest.importorskip("PIL.Image").open(io.BytesIO(base64.b64decode(rows[0].png))).load()


def test_a_task_around_it_can_be_looked_at_too():
    around = Around(toy(shown=1))
    outcome = prune(Edsr(2, width=8, blocks=1), Magnitude(sparsity=0.5), around)
    assert len(outcome.pictures) == 4


def test_a_pruned_network_is_saved_and_opened_again(tmp_path):
    opened = open_model("secateur.models.super_resolution:swinir_x2")
    outcome = prune(opened.model, Magnitude(sparsity=0.5), toy(), name="swinir_x2")
    save(outcome, opened, tmp_path / "pruned")
    again = load(tmp_path / "pruned")
    assert type(again) is type(swinir_x2())
    assert all(torch.equal(v, outcome.model.state_dict()[k]) for k, v in again.state_dict().items())


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: toy(scale=5), "pictures grow 2 to 4 times"),
        (lambda: SuperResolution("odd", {"val": noise(1, 24)}, 3, patch=32), "Give patch=30"),
        (lambda: SuperResolution("odd", {"val": noise(1, 20)}, 3, patch=30), "does not divide both sides"),
        (lambda: SuperResolution("real", {"val": noise(1, 24).float()}), "of 8 bits"),
        (lambda: toy(view=8), "15 is the least"),
        (lambda: toy(batch=0), "batch=0"),
        (lambda: toy().measure(Edsr(3, 8, 1)), "Give a model for this scale"),
        (lambda: list(toy().batches("val", 7)), "it holds 6"),
        (lambda: list(toy().batches("vall")), "Did you mean val"),
        (lambda: compared(torch.rand(1, 3, 12, 12), torch.rand(1, 3, 12, 12), 2), "SSIM's window"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(TaskError, match=says):
        make()


def test_fingerprints_follow_pictures_and_settings():
    assert toy().fingerprint() == toy().fingerprint()
    assert len({toy().fingerprint(), toy(batch=5).fingerprint(), toy(scale=3, patch=12).fingerprint()}) == 3


def test_the_ready_made_task_takes_the_models_scale(data):
    task = tasks.open_task(
        "super-resolution", model=Edsr(3, 8, 1), train_size=20, val_size=10, test_size=10, learning_rate=1e-3
    )
    assert (task.scale, task.learner.rate) == (3, 1e-3)
    assert [len(task.splits[s]) for s in ("train", "val", "test", "photographs")] == [20, 10, 10, 6]
    assert task.splits["val"].shape[-1] == 30
    with pytest.raises(TaskError, match="Give a model for this scale"):
        tasks.open_task("super-resolution", model=Edsr(3, 8, 1), scale=2, train_size=20, val_size=10, test_size=10)
    with pytest.raises(SettingError, match="Did you mean scale"):
        tasks.open_task("super-resolution", scales=2)


def test_the_convention_is_the_literatures(data):
    """Bicubic interpolation has 28.12 dB on these six photographs at four times, IMDN's table says so too."""
    task = tasks.open_task("super-resolution", scale=4, train_size=8, val_size=8, test_size=8)
    assert task.measure(Bicubic(4), "photographs")["psnr"] == pytest.approx(28.12, abs=0.01)
