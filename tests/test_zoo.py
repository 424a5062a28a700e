"""Every network of the zoo is planned, cut, saved, loaded, run and trained; what was found is docs/coverage.json.

    python tests/test_zoo.py            writes docs/coverage.json anew
    python tests/test_zoo.py llama gru  only these rows of it

`make generate` makes docs/coverage.md of it. A network that is cut otherwise than the file says fails its test, so the
table is never older than the code.
"""

import copy
import gc
import json
import re
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn
from zoo import SLOW, ZOO, made

from secateur.edit import Mask, apply_
from secateur.errors import GraphError
from secateur.graph import Coupling, couple, removals
from secateur.graph.trace import answer, plain
from secateur.method import prune
from secateur.methods.l1_norm import L1Norm
from secateur.models import load, save
from secateur.outcome import Outcome, write_text
from secateur.plan import plan
from secateur.site import Site
from secateur.task import Batch

RESULT = Path(__file__).resolve().parents[1] / "docs" / "coverage.json"
SPARSITY = 0.3
QUICK = [name for name in ZOO if name not in SLOW]


@dataclass
class Seen:
    """A task of one batch: all that cutting without data asks of the world."""

    example: Batch
    name = "one-batch"
    seed = 0
    metric = "none"
    higher_is_better = False
    clients = ()

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> list[Batch]:
        return [self.example]

    def measure(self, model: nn.Module, split: str = "val") -> dict[str, float]:
        return {}

    def fingerprint(self) -> str:
        return "one-batch"


def answers(model: nn.Module, batch: Batch) -> list[Tensor]:
    with plain(model):
        return answer(model, batch)


def close(one: list[Tensor], other: list[Tensor], tolerance: float = 1e-3) -> None:
    """The same answers, but for the order of sums."""
    assert [v.shape for v in one] == [v.shape for v in other]
    for a, b in zip(one, other, strict=True):
        assert float((a - b).abs().max()) <= tolerance * max(1e-6, float(a.abs().max()))


def some(site: Site, multiple: int) -> Tensor:
    """All but three tenths of the units, or of as many whole multiples."""
    gone = max(1, int(SPARSITY * site.units) // multiple) * multiple
    keep = torch.ones(site.units, dtype=torch.bool)
    keep[torch.randperm(site.units, generator=torch.Generator().manual_seed(7))[:gone]] = False
    return keep


def gradients(model: nn.Module, batch: Batch) -> set[str]:
    """Which parameters get a gradient; every one of them finite."""
    model.zero_grad()
    given = batch.through(model)
    leaves = [v for v in torch.utils._pytree.tree_leaves(given) if isinstance(v, Tensor) and v.requires_grad]
    sum(v.float().square().mean() for v in leaves).backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(bool(grad.isfinite().all()) for grad in found.values())
    assert all(grad.shape == model.get_parameter(name).shape for name, grad in found.items())
    return set(found)


def cut(name: str, folder: Path) -> dict[str, Any]:
    """Take a network through all of it; the row of the table. Raises AssertionError where a cut is wrong."""
    torch.manual_seed(0)
    model, batch = made(name), ZOO[name].example()
    parameters = sum(p.numel() for p in model.parameters())
    row: dict[str, Any] = {"family": ZOO[name].family, "network": type(model).__name__}
    try:
        coupling = couple(model, batch)
    except GraphError as error:
        return row | {"verdict": "refused", "why": reasons([error.found])}
    row |= {
        "verdict": "frozen parts" if coupling.frozen else "works",
        "sites": dict(Counter(site.kind for site in coupling.sites)),
        "reach": round(reached(model, coupling), 2),
        "why": reasons([str(frozen) for frozen in coupling.frozen]),
    }
    for site in coupling.of("stream"):
        less = copy.deepcopy(model)
        apply_(less, removals([site], {site.name: some(site, coupling.multiples.get(site.name, 1))}))
        found, whole = answers(less, batch), answers(model, batch)
        assert [v.shape for v in found] == [v.shape for v in whole]
        assert all(bool(v.isfinite().all()) for v in found)
    if not coupling.of("channel", "head"):
        return row | {"left": 1.0, "loads": "not cut"}
    with (
        patch("secateur.graph.couple", return_value=coupling),
        patch("secateur.methods.l1_norm.couple", return_value=coupling),
    ):
        method, task = L1Norm(sparsity=SPARSITY), Seen(batch)
        planned = plan(method, model, task, priced=False)
        done = prune(model, method, task)
    assert {r.site: r.keep for r in planned.rows if r.keep != r.units} == {
        r.site: r.kept for r in done.record.sites if r.kept != r.units
    }
    row["left"] = round(sum(p.numel() for p in done.model.parameters()) / parameters, 2)
    masked_equals_removed(model, batch, coupling, done)
    row["loads"] = saved_and_loaded(name, model, batch, done, folder)
    assert gradients(done.model, batch) == gradients(copy.deepcopy(model), batch)
    return row


def reached(model: nn.Module, coupling: Coupling) -> float:
    """The fraction of the parameters that some site can make smaller."""
    owned = {part.name for site in coupling.sites for part in site.parts}
    sizes = {name.replace("parametrizations.", ""): p.numel() for name, p in model.named_parameters()}
    return sum(n for name, n in sizes.items() if name in owned) / sum(sizes.values())


def reasons(texts: list[str]) -> dict[str, int]:
    """Each reason without where it was found, and how often it is given, whatever the sizes in it."""
    found: dict[str, int] = {}
    first: dict[str, str] = {}
    for text in texts:
        text = re.sub(r"^frozen: (.*?) at .*?: ", r"\1: ", text)
        text = re.sub(r", at /\S*/([\w.]+):\d+: ", r", at \1: ", text)[:200]
        text = first.setdefault(re.sub(r"\d+", "0", text), text)
        found[text] = found.get(text, 0) + 1
    return found


def masked_equals_removed(model: nn.Module, batch: Batch, coupling: Coupling, done: Outcome) -> None:
    """Units at zero and units gone give the same, but where a norm takes statistics over them."""
    keep = {edit.site.name: edit.keep for edit in done.edits}
    exact = [s for s in coupling.sites if s.name in keep and s.name not in coupling.inexact]
    masked, removed = copy.deepcopy(model), done.model
    for site in exact:
        Mask(site, keep[site.name]).apply_(masked)
    if len(exact) < len(keep):
        removed = copy.deepcopy(model)
        apply_(removed, removals(exact, keep))
    close(answers(masked, batch), answers(removed, batch))
    if exact:
        assert any(
            not torch.allclose(a, b, rtol=1e-4)
            for a, b in zip(answers(model, batch), answers(masked, batch), strict=True)
        ), "a cut that is not felt proves nothing"


def saved_and_loaded(name: str, model: nn.Module, batch: Batch, done: Outcome, folder: Path) -> str:
    """Save, load, and answer as before; who can load it."""
    save(done, model, folder / "out")
    back = load(folder / "out", build=lambda: made(name))
    close(answers(done.model, batch), answers(back, batch), 1e-5)
    about = json.loads((folder / "out" / "secateur.json").read_text())["saved"]
    return "transformers" if about["stock"] else "secateur"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_a_network_of_the_zoo_is_cut_as_the_table_says(name: str, tmp_path: Path) -> None:
    assert cut(name, tmp_path) == json.loads(RESULT.read_text())[name], "python tests/test_zoo.py writes the table anew"


@pytest.mark.slow  # 55 core-seconds together: deep ones, and those whose like is among the others
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SLOW))
def test_the_others_of_the_zoo_are_cut_as_the_table_says(name: str, tmp_path: Path) -> None:
    test_a_network_of_the_zoo_is_cut_as_the_table_says(name, tmp_path)


def test_the_table_has_the_zoo_and_nothing_else() -> None:
    assert list(json.loads(RESULT.read_text())) == sorted(ZOO)


def main(names: list[str]) -> None:
    """Write the rows of these networks, or of all."""
    warnings.simplefilter("ignore")
    rows = json.loads(RESULT.read_text()) if names and RESULT.exists() else {}
    for name in names or ZOO:
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = cut(name, Path(folder))
        sys.stdout.write(f"{name}: {rows[name]['verdict']}\n")
        gc.collect()
    write_text(RESULT, json.dumps({n: rows[n] for n in sorted(rows) if n in ZOO}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
