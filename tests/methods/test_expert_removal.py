"""Experts taken out by a score."""

import pytest
import tiny
import torch

from secateur.axes import Magnitude, Random, Wanda
from secateur.edit import Remove
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.graph.experts import mixtures, routing
from secateur.method import prune
from secateur.methods.expert_removal import ExpertRemoval, RouterNorm, Usage


def test_the_least_used_experts_go_with_their_rows() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    layers = mixtures(model)
    seen = routing(model, layers, task.batches("calibration", 8))
    done = prune(model, ExpertRemoval(samples=8), task)
    for layer, edit in zip(layers, done.edits, strict=True):
        assert isinstance(edit, Remove)
        used = seen[layer.site.name].sums["routed"]
        assert float(used[edit.keep].min()) >= float(used[~edit.keep].max())
        rows = model.get_submodule(layer.router).weight
        assert torch.equal(done.model.get_submodule(layer.router).weight, rows[edit.keep])
        assert done.model.get_submodule(layer.experts).num_experts == 2


def test_router_norms_by_hand() -> None:
    model = tiny.moe()
    site = mixtures(model)[0].site
    named = {name: torch.zeros(p.shape) for name, p in model.named_parameters()}
    named["model.layers.0.mlp.gate.weight"][:, :2] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [6.0, 8.0]])
    assert RouterNorm().score(site, named, None).tolist() == [5.0, 1.0, 0.0, 10.0]


@pytest.mark.parametrize("criterion", [Usage(), RouterNorm(), Random(seed=3), Magnitude()])
def test_any_score_of_an_expert_will_do(criterion) -> None:
    done = prune(tiny.moe(), ExpertRemoval(sparsity=0.25, samples=4, criterion=criterion), tiny.make_task("moe"))
    assert [row.kept for row in done.record.sites] == [3, 3]
    assert done.ledger.sparsity == 0.25


def test_refusals() -> None:
    task = tiny.make_task("moe")
    with pytest.raises(SettingError, match="measured of single matrices"):
        prune(tiny.moe(), ExpertRemoval(criterion=Wanda()), task)
    with pytest.raises(BudgetError, match="each token is sent to 2"):
        prune(tiny.moe(), ExpertRemoval(sparsity=0.75), task)
    with pytest.raises(GraphError, match="experts of LlamaForCausalLM"):
        prune(tiny.decoder(), ExpertRemoval(), task)
    done = prune(tiny.moe(), ExpertRemoval(sparsity=0.2), task)
    assert not done.edits
    assert "less than one" in done.notes[0]
