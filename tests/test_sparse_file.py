"""The sparse file: what it holds comes back number by number, by our reader and by the fifty lines of the guide."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from secateur import stored
from secateur.cli import main
from secateur.errors import ModelError
from secateur.export import sparse
from secateur.methods.int8 import rounded

GUIDE = Path(__file__).parents[1] / "docs" / "guides" / "export.md"


def grouped(weight, n, m):
    """The n largest of each m in a row."""
    groups = weight.reshape(weight.shape[0], -1, m).clone()
    return groups.scatter_(2, groups.abs().argsort(2)[..., : m - n], 0).reshape(weight.shape)


@pytest.fixture(scope="module")
def tensors():
    g = torch.Generator().manual_seed(0)
    found = {}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        w = torch.randn(24, 40, generator=g)
        kept = torch.rand(w.shape, generator=g) > 0.6
        name = str(dtype).removeprefix("torch.")
        found |= {
            f"{name} dense": w.to(dtype),
            f"{name} bitmap": (w * kept).to(dtype),
            f"{name} 2:4": grouped(w, 2, 4).to(dtype),
            f"{name} 1:8": grouped(w, 1, 8).to(dtype),
            f"{name} int8 dense": rounded(w.to(dtype)),
            f"{name} int8 bitmap": rounded((w * kept).to(dtype)),
        }
        experts = torch.randn(3, 6, 40, generator=g)
        experts *= torch.rand(experts.shape, generator=g) > 0.6
        found[f"{name} experts int8 bitmap"] = torch.stack([rounded(expert) for expert in experts.to(dtype)])
    found["kernel bitmap"] = torch.randn(6, 5, 3, 3, generator=g) * (torch.rand(6, 5, 3, 3, generator=g) > 0.8)
    found["vector dense"] = torch.randn(7, generator=g)
    found["nothing dense"] = torch.zeros(0, 4)
    found["number dense"] = torch.tensor(3)
    found["zeros bitmap"] = torch.zeros(5, 7)
    strange = torch.zeros(9, 9)
    strange[1, 1], strange[2, 3] = torch.nan, -torch.inf
    found["strange bitmap"] = strange
    return found


@pytest.fixture
def file(tensors, tmp_path):
    sparse.write(tensors, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_each_tensor_is_kept_in_the_way_that_takes_the_fewest_bytes(tensors, tmp_path):
    layouts = sparse.write(tensors, tmp_path / "x.safetensors")
    for name, layout in layouts.items():
        assert name.endswith(layout), (name, layout)


def test_every_number_comes_back(tensors, file):
    back = sparse.read(file)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        assert back[name].dtype == value.dtype
        assert torch.equal(back[name].nan_to_num(nan=7.0), value.nan_to_num(nan=7.0)), name


def test_the_reader_of_the_guide_reads_the_same(tensors, file):
    text = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert len([line for line in text.splitlines() if line.strip()]) <= 50
    names = {}
    exec(compile(text, str(GUIDE), "exec"), names)
    back = names["read_sparse"](file)
    for name, value in tensors.items():
        wanted = value.float().numpy() if value.is_floating_point() else value.numpy()
        assert back[name].dtype == (np.float32 if value.dtype == torch.bfloat16 else value.numpy().dtype)
        np.testing.assert_array_equal(back[name].astype(wanted.dtype), wanted, err_msg=name)


def test_bytes_by_hand(tmp_path):
    weight = torch.zeros(8, 16)
    weight[:, ::3] = torch.rand(6, generator=torch.Generator().manual_seed(0)) + 1  # 6 of 16 in a row: 3 of 8, no 2:4
    packed, about = sparse.packed("w", weight)
    assert about == {"shape": [8, 16], "dtype": "F32", "layout": "bitmap"}
    assert packed["w.bitmap"][:2].tolist() == [0b01001001, 0b10010010]
    assert packed["w.bitmap"].numel() == 16 and packed["w.values"].numel() == 48


def test_two_of_four_by_hand():
    packed, about = sparse.packed("w", torch.tensor([[0.0, 5, 0, 7, 1, 0, 0, 2]] * 2, dtype=torch.float16))
    assert (about["layout"], about["n"], about["m"]) == ("nm", 2, 4)
    assert packed["w.values"].tolist() == [[5, 7, 1, 2]] * 2
    assert packed["w.places"].tolist() == [0b11001101] * 2  # 1, 3, 0, 3, the first lowest


def test_int8_is_found_in_the_values_alone_and_exactly():
    g = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.randn(16, 64, generator=g).to(dtype)
        assert sparse.int8_of(weight) is None
        found = sparse.int8_of(rounded(weight))
        assert torch.equal(found.dense(dtype), rounded(weight))
        assert int(found.values.abs().amax()) == 127
    spoilt = rounded(torch.randn(16, 64, generator=g))
    spoilt[11, 3] += 1e-4
    assert sparse.int8_of(spoilt) is None


def refused(path, *words):
    with pytest.raises(ModelError) as caught:
        sparse.read(path)
    assert all((caught.value.asked, caught.value.found, caught.value.do))
    for word in words:
        assert word in str(caught.value)


def rewritten(file, **metadata):
    """The same tensors under other words."""
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        about, values = dict(opened.metadata()), {name: opened.get_tensor(name).clone() for name in opened.keys()}
    stored.write(values, file, {**about, **metadata})
    return values, json.loads(about["tensors"])


def test_files_that_do_not_fit_together_are_refused(file, tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    refused(tmp_path / "plain.safetensors", "its format is None, not 'secateur-sparse'", "dense already")
    whole = file.read_bytes()
    rewritten(file, version="2")
    refused(file, "it is of version '2', and this secateur reads version 1", "Upgrade secateur")
    file.write_bytes(whole)
    rewritten(file, tensors="[")
    refused(file, "what it says of its tensors cannot be understood")
    file.write_bytes(whole[:-40])
    refused(file, "not a whole safetensors file")


def test_marks_and_values_must_agree(file):
    values, _ = rewritten(file)
    name = "float32 bitmap"
    values[f"{name}.bitmap"][0] ^= 255
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        about = dict(opened.metadata())
    stored.write(values, file, about)
    refused(file, f"{name} was to be read", "its bitmap marks", "are there", "get it again")


def test_places_must_rise(file):
    values, _ = rewritten(file)
    from safetensors import safe_open

    with safe_open(str(file), framework="pt") as opened:
        about = dict(opened.metadata())
    values["float32 2:4.places"][:] = 0
    stored.write(values, file, about)
    refused(file, "the places in its groups of 4 do not rise")


def test_shapes_must_be_those_that_are_said(file):
    _, said = rewritten(file)
    said["float32 bitmap"]["shape"] = [24, 4000000]
    rewritten(file, tensors=json.dumps(said))
    refused(file, "float32 bitmap.bitmap", "it is uint8 [120] where uint8 [12000000] is said")


def test_densify_writes_what_everybody_reads(tensors, file, tmp_path):
    out = tmp_path / "plain.safetensors"
    ran = CliRunner().invoke(main, ["densify", str(file), "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    plain = load_file(out)
    assert all(torch.equal(plain[n].nan_to_num(nan=7), v.nan_to_num(nan=7)) for n, v in tensors.items())
    again = CliRunner().invoke(main, ["densify", str(file), "--out", str(out)])
    assert again.exit_code == 2 and "something is there already" in again.output
    assert "that is the same file" in CliRunner().invoke(main, ["densify", str(file)]).output


def test_densify_names_what_is_wrong_and_makes_folders(file, tmp_path):
    def said(*words):
        done = CliRunner().invoke(main, ["densify", *map(str, words)])
        return " ".join((done.output + done.stderr).split()) if done.exit_code else ""

    assert "there is no such file" in said(tmp_path / "none.safetensors")
    assert "that is a folder" in said(tmp_path, "--out", tmp_path / "y.safetensors")
    assert said(file, "--out", tmp_path / "new" / "y.safetensors") == ""
    assert sparse.read(file).keys() == load_file(tmp_path / "new" / "y.safetensors").keys()
    (tmp_path / "a.sparse.b.sparse.safetensors").write_bytes(file.read_bytes())
    assert said(tmp_path / "a.sparse.b.sparse.safetensors") == ""
    assert (tmp_path / "a.sparse.b.safetensors").is_file()


def test_a_dtype_without_a_name_in_the_file_is_refused():
    model = torch.nn.Linear(2, 2)
    model.register_buffer("turn", torch.zeros(2, dtype=torch.complex64))
    assert sparse.Form().why_not(model).startswith("turn is torch.complex64, and the file holds F64, ")
