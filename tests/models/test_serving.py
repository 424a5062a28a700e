"""Cuts held to what a run-time loads: widths evened out and named, methods that cannot be held refused."""

import json

import pytest
import torch
from click.testing import CliRunner
from small_nets import bert, first, llama, mlp

from secateur.axes import part_of, text_of
from secateur.axes.allocations import Alike, Global
from secateur.cli import main
from secateur.edit import Remove, apply_
from secateur.errors import ExportError, SettingError
from secateur.export.serving import refusal, served
from secateur.method import Budget, Chain
from secateur.methods.adapt_pruner import AdaptPruner
from secateur.methods.compresso import Compresso
from secateur.methods.flap import FLAP, Adaptive, PerLayer
from secateur.methods.int8 import Int8
from secateur.methods.l1_norm import L1Norm
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.loraprune import LoRAPrune
from secateur.methods.pat import Pat
from secateur.methods.slicegpt import SliceGPT
from secateur.methods.wanda import Wanda
from secateur.site import Part, Site


def site(name, units, block):
    return Site(
        name,
        "channel",
        (units,),
        (Part(name, (units, 4), torch.arange(units)[:, None].expand(units, 4)),),
        block=block,
    )


def test_counts_evened_out_by_hand():
    sites = [site(f"h.{i}.mlp", 8, f"h.{i}") for i in range(2)] + [site("h.1.other", 8, "h.1")]
    scores = {"h.0.mlp": torch.arange(8.0), "h.1.mlp": torch.arange(8.0) + 4, "h.1.other": torch.arange(8.0) + 20}
    whole = Global().spread(sites, Budget(0.5), scores)
    assert whole == {"h.0.mlp": 0, "h.1.mlp": 4, "h.1.other": 8}
    part = Alike(Global())
    assert part.spread(sites, Budget(0.5), scores) == {"h.0.mlp": 2, "h.1.mlp": 2, "h.1.other": 8}
    assert part.given_up == ("mlp: 0 to 4 of 8 channels were to stay, layer by layer; 2 stay in each of 2",)
    assert text_of(part) == "alike(around='global')" and part_of("alike(around='global')") == part
    assert Alike(Global()).given_up == ()


def test_only_transformers_restricts_widths():
    for method in (FLAP(), L1Norm(allocation=Global()), LLMPruner(), AdaptPruner()):
        for to in ("gguf", "onnx", "openvino", "sparse"):
            assert served(method, to, llama()) == (method, [])
    for method in (Wanda(), FLAP(allocation=PerLayer()), L1Norm(), Int8()):
        assert served(method, "hf", llama()) == (method, [])


def test_what_transformers_takes_and_what_it_gives_up():
    method, said = served(FLAP(), "hf", llama())
    assert method == FLAP(allocation=Alike(Adaptive()))
    assert said == ["flap gives layers widths of their own; here each gets the mean, as hf loads one width"]
    method, said = served(LLMPruner(), "hf", llama())
    assert (method.spare_first, method.spare_last) == (0, 0) and "the first 4 blocks and the last 2" in said[0]
    method, said = served(LoRAPrune(), "hf", llama())
    assert (method.spare_first, method.spare_last) == (0, 0)
    assert "the first 10% of the blocks and the last 1" in said[0]
    method, said = served(Chain((FLAP(), Int8())), "hf", llama())
    assert isinstance(method.methods[0].allocation, Alike) and len(said) == 1


def test_a_residual_width_is_a_multiple_of_the_heads():
    heads = llama().config.num_attention_heads
    method, said = served(Pat(), "hf", llama())
    assert method.round_to == heads
    assert said == [f"the residual width that pat leaves is a multiple of {heads}, as hf wants one of its heads"]
    assert served(method, "hf", llama()) == (method, [])
    assert served(SliceGPT(), "hf", llama())[0].round_to % heads == 0
    assert served(Pat(), "gguf", llama()) == (Pat(), [])
    with pytest.raises(ExportError, match=rf"multiple of the {heads} heads(.|\n)*kinds="):
        served(Compresso(kinds=("stream",)), "hf", llama())


def test_what_cannot_be_held_is_refused():
    with pytest.raises(ExportError, match="it decides the width of each layer as it goes") as caught:
        served(AdaptPruner(), "hf", llama())
    assert "Use flap, cfsp, l1_norm or llm_pruner, or serve it by gguf" in str(caught.value)
    with pytest.raises(ExportError, match="BertModel is not built as Llama is"):
        served(Wanda(), "gguf", bert())
    with pytest.raises(ExportError, match="Sequential is no class of transformers"):
        served(Wanda(), "hf", torch.nn.Sequential())
    with pytest.raises(SettingError, match="Did you mean gguf"):
        served(Wanda(), "ggfu", llama())


def test_what_came_out_is_looked_at():
    model = llama()
    apply_(model, [Remove(mlp(model, 1), first(48, 20))])
    assert refusal("hf", model, "layers differ in shape") == "layers differ in shape"
    assert refusal("hf", model, None) == refusal("gguf", model, "layers differ") == ""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model whose second layer is ten times as loud, so that one ranking takes all from the first."""
    place = tmp_path_factory.mktemp("loud") / "net"
    model = llama()
    for value in model.model.layers[1].mlp.parameters():
        value.data *= 10
    model.save_pretrained(place)
    (place.parent / "data.py").write_text(
        "import torch\nfrom secateur.tasks.text import Text\n\n\ndef text(seed=0):\n"
        "    ids = torch.arange(4096) * 7 % 50\n"
        "    cuts = dict(train=ids[:2048], calibration=ids[2048:3072], val=ids[3072:3584], test=ids[3584:])\n"
        "    return Text('toy', cuts, window=16, seed=seed)\n"
    )
    return place


def run(folder, *words, monkeypatch):
    monkeypatch.chdir(folder.parent)
    return CliRunner().invoke(main, [*words, "--task", "data:text"])


def test_prune_for_transformers(folder, tmp_path, monkeypatch):
    words = [
        "l1_norm",
        "--kinds",
        "channel",
        "--sparsity",
        "0.3",
        "--allocation",
        "global",
        "--protect",
        "*embed*,*norm*",
    ]
    free, held = tmp_path / "free", tmp_path / "held"
    assert run(
        folder, "prune", str(folder), *words, "--out", str(free), "--no-eval", monkeypatch=monkeypatch
    ).exit_code in (0, 3)
    ran = run(
        folder, "prune", str(folder), *words, "--out", str(held), "--no-eval", "--serve", "hf", monkeypatch=monkeypatch
    )
    assert ran.exit_code in (0, 3), ran.output
    about = {
        name: json.loads((place / "secateur.json").read_text()) for name, place in (("free", free), ("held", held))
    }
    assert (about["free"]["saved"]["stock"], about["held"]["saved"]["stock"]) == (False, True)
    assert any(note.startswith("serve hf: ") and "stay in each of 2" in note for note in about["held"]["notes"])
    assert "alike(around=" in (held / "recipe.yaml").read_text()


def test_prune_then_int8_and_plan_for_llama_cpp(folder, tmp_path, monkeypatch):
    ran = run(folder, "prune", str(folder), "magnitude", "--sparsity", "0.5", "--then", "int8", "--no-eval",
              "--out", str(tmp_path / "x"), "--serve", "gguf", monkeypatch=monkeypatch)  # fmt: skip
    assert ran.exit_code == 0, ran.output
    ran = CliRunner().invoke(main, ["export", str(tmp_path / "x"), "--to", "sparse", "--json"])
    assert ran.exit_code == 0, ran.output
    assert json.loads(ran.stdout)["notes"][-1] == "14 tensors are kept int8 bitmap"
    ran = run(folder, "plan", str(folder), "flap", "--serve", "hf", "--no-trial", "--json", monkeypatch=monkeypatch)
    assert json.loads(ran.stdout)["given_up"], ran.output
