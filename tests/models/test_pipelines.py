"""Text-to-image pipelines: opened from diffusers' folders, run as diffusers runs them, saved so that it reads them."""

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")

from pipelines import pixels, stable_diffusion, stock

from secateur.errors import ModelError
from secateur.models import load, open_model, save
from secateur.models.pipelines import Pipeline, open_pipeline
from secateur.outcome import Outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd") / "model")


def test_its_pictures_are_those_that_diffusers_draws_of_the_same_folder(folder: Path) -> None:
    ours = open_model(folder)
    assert (ours.kind, set(ours.model.names)) == ("pipeline", {"vae", "text_encoder", "unet"})
    captions = ["a photo of a cat", "the red house"]
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    for guidance in (1.0, 5.0):
        mine = ours.model.picture(captions, seed=3, steps=4, guidance=guidance)
        pipe = stock()
        pipe.set_progress_bar_config(disable=True)
        theirs = pipe(
            captions, latents=noise, num_inference_steps=4, guidance_scale=guidance, output_type="pt"
        ).images  # fmt: skip
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


def test_what_is_saved_loads_with_stock_diffusers_and_with_us(folder: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    opened = open_model(folder)
    with torch.no_grad():
        opened.model.unet.down_blocks[1].attentions[0].transformer_blocks[0].attn1.to_q.weight.zero_()
    place = save(Outcome(opened.model), opened, tmp_path / "out")
    pipe = StableDiffusionPipeline.from_pretrained(str(place), use_safetensors=True, local_files_only=True)
    again = open_model(place).model
    for mine, theirs in ((again.unet, pipe.unet), (again.text_encoder, pipe.text_encoder), (again.vae, pipe.vae)):
        for key, value in theirs.state_dict().items():
            assert torch.equal(mine.state_dict()[key], value), key
    assert isinstance(load(place), Pipeline)
    assert json.loads((place / "secateur.json").read_text())["saved"]["stock"] is True
    assert "StableDiffusionPipeline" in (place / "README.md").read_text()
    assert not [p for p in place.rglob("*") if p.suffix in (".bin", ".pt", ".pkl")]


def test_a_pipeline_diffusers_has_no_class_for_says_so(tmp_path: Path) -> None:
    model = pixels()
    place = save(Outcome(model), model, tmp_path / "out")
    again = open_model(place).model
    assert torch.equal(again.picture(["a cat"], steps=3), model.picture(["a cat"], steps=3))
    assert again.masked
    saved = json.loads((place / "secateur.json").read_text())["saved"]
    assert (saved["stock"], saved["kind"]) == (False, "pipeline")


def test_a_picture_depends_on_its_seed_and_place_and_not_on_the_batch() -> None:
    model = pixels()
    captions = ["a cat", "a dog", "a cat"]
    one, two = (model.picture(captions, steps=2, batch=n) for n in (1, 3))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)
    assert not torch.equal(one[0], one[2])
    assert not torch.equal(one, model.picture(captions, seed=1, steps=2, batch=1))


def test_tensors_that_no_picture_depends_on_are_named() -> None:
    model = pixels()
    assert model.unused() == {"text_encoder.pooler.dense.weight", "text_encoder.pooler.dense.bias"}
    assert all(p.requires_grad for p in model.parameters())


def test_where_an_earlier_layer_is_read_the_layers_behind_it_are_unused(folder: Path) -> None:
    model = open_pipeline(folder)
    assert not any("layers.2" in name for name in model.unused())
    model.skipped = 1
    assert any("layers.2.mlp.fc1.weight" in name for name in model.unused())
    assert not any("layers.1." in name for name in model.unused())
    model.skipped = None


def test_code_named_in_a_config_is_refused_and_other_files_are_not_read(folder: Path, tmp_path: Path) -> None:
    other = shutil.copytree(folder, tmp_path / "other")
    (other / "text_encoder" / "data_config.json").write_text("[]")  # as sentence encoders come with
    assert open_model(other).kind == "pipeline"
    file = other / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"auto_map": {"AutoModel": "mine.Net"}}))
    with pytest.raises(ModelError, match="asks for code of its own"):
        open_model(other)


@pytest.mark.data
@pytest.mark.usefixtures("data")
def test_the_small_pipeline_of_the_pack_opens_by_name() -> None:
    model = open_model("fashion-diffusion").model
    assert (model.shape, model.length, model.masked) == ((1, 28, 28), 10, True)
    assert model.picture(["a photo of a sneaker"], steps=1).shape == (1, 1, 28, 28)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"unet": ["my_code", "Net"]}, "may be code of its own"),
        ({"unet": ["diffusers", "NoSuchModel"]}, "has no class 'NoSuchModel'"),
        ({"unet": [None, None]}, "it has no unet"),
        ({"../unet": ["diffusers", "UNet2DConditionModel"]}, "may lead out of the folder"),
    ],
)
def test_an_index_that_cannot_be_followed_is_refused(folder: Path, tmp_path: Path, change: dict, says: str) -> None:
    bad = shutil.copytree(folder, tmp_path / "bad")
    index = json.loads((bad / "model_index.json").read_text())
    (bad / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(ModelError, match=says):
        open_model(bad)


def test_pickles_missing_tensors_and_altered_files_are_refused(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    bad = shutil.copytree(folder, tmp_path / "pickle")
    (bad / "unet" / "diffusion_pytorch_model.safetensors").rename(bad / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ModelError, match="can run code"):
        open_model(bad)
    bad = shutil.copytree(folder, tmp_path / "short")
    file = bad / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    held.pop("conv_in.weight")
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="missing"):
        open_model(bad)
    model = pixels()
    saved = save(Outcome(model), model, tmp_path / "saved")
    file = saved / "unet" / "diffusion_pytorch_model.safetensors"
    held = load_file(file)
    held["conv_in.bias"] += 1
    save_file(held, file, metadata={"format": "pt"})
    with pytest.raises(ModelError, match="sha256 differs"):
        open_model(saved)
