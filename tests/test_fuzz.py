"""Every reader of a file, given files that were damaged at random: it reads them or says why not, in our words."""

import random
import time
import warnings

import pytest
import torch
from tiny import make_model

from secateur import edit as edits_file
from secateur.cut import passing, weights
from secateur.edit import Mask, Replace, Update, apply_
from secateur.errors import SecateurError
from secateur.export import sparse
from secateur.models import inspect_file
from secateur.outcome import Record
from secateur.recipe import read as read_recipe

SECONDS = 1.2
"""For each reader."""


def a_sparse_file(path):
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 16, generator=g)
    grouped = weight.reshape(8, 4, 4).clone()
    grouped[..., :2] = 0
    values = {"a": weight * (weight > 0.4), "b": grouped.reshape(8, 16), "c": torch.ones(3)}
    values["d"] = (weight * 20).round().clamp(-127, 127) / 127 * (weight > 0)
    sparse.write(values, path)


def a_file_of_edits(path):
    model = make_model("decoder")
    site = weights(model)[0]
    keep = torch.rand(site.shape, generator=torch.Generator().manual_seed(0)) > 0.5
    edits = apply_(model, [Mask(site, keep), Update("model.norm.weight", torch.ones(32))])
    edits_file.save([*edits, Replace("model.layers.1", passing(model.model.layers[1]))], path)


def a_recipe(path):
    path.write_text(
        "secateur: '0.1'\nmodel: smollm2\ntask: {name: wikitext2, window: 512}\nseed: 0\nsteps:\n"
        "- {method: wanda, sparsity: 0.5, pattern: '2:4'}\n- method: perp\n  steps: 3\n"
    )


def a_gguf_file(path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b", "c"])
    writer.add_tensor("token_embd.weight", torch.ones(4, 8).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def a_record(path):
    from secateur.outcome import SCHEMA_VERSION, Ledger, Size

    size = Size(3, 1, 12)
    Record(SCHEMA_VERSION, "0", "now", "", "wanda", {}, {"name": "x"}, {}, Ledger(size, size), []).write(path)


READERS = {
    "sparse": ("x.safetensors", a_sparse_file, sparse.read),
    "edits": ("edits.safetensors", a_file_of_edits, edits_file.load),
    "recipe": ("recipe.yaml", a_recipe, read_recipe),
    "gguf": ("x.gguf", a_gguf_file, inspect_file),
    "record": ("secateur.json", a_record, Record.read),
    "inspected": ("y.safetensors", a_sparse_file, inspect_file),
}


def damaged(whole, rng):
    """Some bytes changed, cut off, doubled, or put elsewhere; the beginning, where the lengths stand, most often."""
    data = bytearray(whole)
    for _ in range(rng.choice((1, 1, 2, 8))):
        at = rng.randrange(len(data)) if rng.random() < 0.5 else min(len(data) - 1, int(rng.expovariate(1 / 200)))
        kind = rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice(b'\x00\xff\x7f\x80"{}[],:0919-e\n ')
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 16)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 40)]
        else:
            other = rng.randrange(len(data))
            data[at : at + 8] = data[other : other + 8]
        if not data:
            data = bytearray(b"\x00")
    return bytes(data)


def refusal(read, path):
    """The three parts of what a reader says of a file, or None; anything else it raises goes on."""
    try:
        read(path)
    except SecateurError as error:
        return error.asked, error.found, error.do
    return None


@pytest.mark.parametrize("kind", READERS)
def test_a_damaged_file_is_read_or_refused_in_our_words(kind, tmp_path):
    name, make, read = READERS[kind]
    path = tmp_path / name
    make(path)
    read(path)  # the whole file goes
    whole, rng, tried, refused = path.read_bytes(), random.Random(0), 0, 0
    until = time.monotonic() + SECONDS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while time.monotonic() < until and tried < 2000:
            path.write_bytes(damaged(whole, rng))  # what failed is left here, to look at
            tried += 1
            said = refusal(read, path)
            refused += said is not None
            assert said is None or all(said)
    assert tried > 20 and refused > tried // 4, (tried, refused)
