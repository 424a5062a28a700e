"""UNCURL: experts the router scores alike become one."""

import itertools
import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.edit import Merge, apply_
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.evidence import Evidence
from secateur.graph.experts import mixtures, routing
from secateur.method import prune
from secateur.methods.expert_removal import ExpertRemoval
from secateur.methods.uncurl import (
    UNCURL,
    MeanRows,
    RandomClusters,
    ReferenceRows,
    Spectral,
    cosines,
    in_order,
    k_means,
    matching,
    references,
    shares,
    spectral,
    without_offset,
)
from secateur.models import load, save

DRAW = 7


def draw() -> torch.Generator:
    return torch.Generator().manual_seed(DRAW)


def together(assignment: torch.Tensor) -> set[frozenset[int]]:
    return {frozenset((assignment == c).nonzero().reshape(-1).tolist()) for c in range(int(assignment.max()) + 1)}


# The equations, by hand


def test_cosines_by_hand() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, -2.0, 0.0], [0.0, 1.0, 0.0]]).double()
    found = cosines(logits.T @ logits)
    assert found[0, 1] == pytest.approx((2 - 2) / (2**0.5 * 3))
    assert found.diagonal().tolist() == [1, 1, 1]
    assert found[2, :2].tolist() == [0, 0]  # a column that never varies: no NaN


def test_centring_the_gram_is_centring_each_token() -> None:
    logits = torch.randn(50, 6, generator=draw(), dtype=torch.float64) + 100 * torch.randn(
        50, 1, generator=draw(), dtype=torch.float64
    )
    raw = cosines(logits.T @ logits)
    assert float(raw.min()) > 0.999  # what all share drowns the rest
    centred = logits - logits.mean(1, keepdim=True)
    torch.testing.assert_close(without_offset(logits.T @ logits), centred.T @ centred, rtol=1e-6, atol=1e-6)


def test_experts_scored_alike_are_put_together() -> None:
    base = torch.randn(400, 3, generator=draw(), dtype=torch.float64)
    logits = base[:, [0, 1, 2, 0, 1, 2]] + 0.1 * torch.randn(400, 6, generator=draw(), dtype=torch.float64)
    offset = 30 * torch.randn(400, 1, generator=draw(), dtype=torch.float64)
    gram = (logits + offset).T @ (logits + offset)
    seen = Evidence(400, {"logit_gram": gram, "routed": torch.ones(6)})
    assert together(Spectral().of(seen, 3, draw())) == {frozenset({0, 3}), frozenset({1, 4}), frozenset({2, 5})}


def test_spectral_clusters_of_parts_that_are_apart() -> None:
    affinity = torch.block_diag(torch.ones(2, 2), torch.ones(3, 3), torch.ones(1, 1)).double()
    assert spectral(affinity, 3, draw()).tolist() == [0, 0, 1, 1, 1, 2]
    assert spectral(affinity, 6, draw()).tolist() == [0, 1, 2, 3, 4, 5]
    assert spectral(affinity, 1, draw()).tolist() == [0] * 6


def test_clusters_are_never_empty_however_alike_the_points_are() -> None:
    for clusters in range(1, 6):
        found = k_means(torch.ones(5, 2, dtype=torch.float64), clusters, draw())
        assert sorted(set(found.tolist())) == list(range(clusters))


def test_shares_by_hand() -> None:
    found = shares(torch.tensor([3.0, 1.0, 0.0, 0.0, 5.0]), torch.tensor([0, 0, 1, 1, 0]))
    assert found.tolist() == pytest.approx([3 / 9, 1 / 9, 0.5, 0.5, 5 / 9])  # an unused cluster: the plain mean
    assert references(torch.tensor([0, 0, 1, 1, 0]), torch.tensor([3.0, 1.0, 0.0, 0.0, 5.0])) == [4, 2]


@given(st.integers(1, 6), st.integers(0, 10_000))
def test_the_matching_is_the_best_there_is(n: int, seed: int) -> None:
    gain = torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = matching(gain)
    assert sorted(found.tolist()) == list(range(n))
    best = max(sum(float(gain[i, p[i]]) for i in range(n)) for p in itertools.permutations(range(n)))
    assert sum(float(gain[i, found[i]]) for i in range(n)) == pytest.approx(best)


def test_shuffled_neurons_are_found_again() -> None:
    up, down = torch.randn(1, 2, 9, 5, generator=draw()), torch.randn(1, 5, 9, generator=draw())
    order = torch.randperm(9, generator=draw())
    ups, downs = torch.cat([up, up[:, :, order]]).reshape(2, 18, 5), torch.cat([down, down[:, :, order]])
    assert torch.equal(order[in_order(ups, downs, 0, 1)], torch.arange(9))


# The method


def paired(shuffle: bool) -> nn.Module:
    """Experts 2 and 3 are 0 and 1 again, perhaps with their neurons in another order; so are their rows, nearly."""
    model = tiny.trained("moe")
    for layer in mixtures(model):
        order = torch.randperm(32, generator=draw()) if shuffle else torch.arange(32)
        experts, gate = model.get_submodule(layer.experts), model.get_submodule(layer.router)
        up, down = experts.gate_up_proj.data, experts.down_proj.data
        up[2:] = up[:2].reshape(2, 2, 32, 32)[:, :, order].reshape(2, 64, 32)
        down[2:] = down[:2][:, :, order]
        gate.weight.data[2:] = gate.weight.data[:2] * 1.01
    return model


@torch.no_grad()
def logits(model: nn.Module) -> torch.Tensor:
    return tiny.make_task("moe").example.through(model).logits


def test_an_expert_merged_with_its_own_permutation_is_itself() -> None:
    model, task = paired(shuffle=True), tiny.make_task("moe")
    done = prune(model, UNCURL(samples=16), task)
    assert all(together(e.assignment) == {frozenset({0, 2}), frozenset({1, 3})} for e in merges(done.edits))
    torch.testing.assert_close(logits(done.model), logits(model), atol=1e-4, rtol=1e-4)
    broken = prune(model, UNCURL(samples=16, align=False), task)
    assert not torch.allclose(logits(broken.model), logits(model), atol=0.1)


def merges(edits) -> list[Merge]:
    return [edit for edit in edits if isinstance(edit, Merge)]


def test_merged_weights_are_the_means_by_usage() -> None:
    model, task = paired(shuffle=False), tiny.make_task("moe")
    layer = mixtures(model)[0]
    usage = routing(model, [layer], task.batches("calibration", 8))[layer.site.name].sums["routed"]
    done = prune(model, UNCURL(samples=8, align=False, router=MeanRows()), task)
    assignment = merges(done.edits)[0].assignment
    for name in (f"{layer.experts}.down_proj", f"{layer.router}.weight"):
        old, new = model.get_parameter(name).double(), done.model.get_parameter(name)
        for cluster in range(2):
            mine = assignment == cluster
            weight = (usage * mine / usage[mine].sum()).reshape(-1, *[1] * (old.dim() - 1))
            torch.testing.assert_close(new[cluster].double(), (old * weight).sum(0), atol=1e-6, rtol=1e-5)


class OneToken:
    """A task whose calibration is one token, again and again: two experts of a layer see it and no other does."""

    def __init__(self, task) -> None:
        self.task = task

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def batches(self, split: str, n: int | None = None, epoch: int = 0):
        for batch in self.task.batches(split, n, epoch):
            yield type(batch)((torch.full_like(batch.inputs[0][:1, :1], 5),))


def test_an_expert_that_saw_no_token_weighs_nothing_and_is_named() -> None:
    model, task = tiny.trained("moe"), OneToken(tiny.make_task("moe"))
    layer = mixtures(model)[0]
    used = routing(model, [layer], task.batches("calibration", 8))[layer.site.name].sums["routed"]
    unused = (used == 0).nonzero().reshape(-1).tolist()
    assert len(unused) == 2
    done = prune(model, UNCURL(sparsity=0.75, samples=8, align=False), task)
    assert done.notes[0].endswith(f"no token of the task was sent to {unused[0]}, {unused[1]}")
    name = f"{layer.experts}.down_proj"
    seen = model.get_parameter(name)[used > 0].mean(0)
    torch.testing.assert_close(done.model.get_parameter(name)[0], seen)


@pytest.mark.parametrize("router", [MeanRows(), ReferenceRows()])
def test_a_router_with_a_row_per_cluster_loads_with_the_stock_class(router, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, UNCURL(samples=8, router=router), task)
    save(done, model, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert about["stock"], about["why_not"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.num_local_experts == 2
    torch.testing.assert_close(logits(stock), logits(done.model), atol=1e-5, rtol=1e-5)


def test_an_index_map_loads_with_secateur_and_may_have_fewer_experts_than_a_token_has(tmp_path) -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, UNCURL(sparsity=0.75, samples=8), task)
    assert done.model.model.layers[0].mlp.experts.num_experts == 1
    save(done, model, tmp_path / "out")
    torch.testing.assert_close(logits(load(tmp_path / "out")), logits(done.model), atol=1e-5, rtol=1e-5)


def test_it_learns_on_through_the_router_that_stays() -> None:
    done = prune(tiny.trained("moe"), UNCURL(samples=8), tiny.make_task("moe"))
    logits_of = tiny.make_task("moe").example.through(done.model).logits
    logits_of.square().mean().backward()
    assert float(done.model.model.layers[0].mlp.gate.weight.grad.abs().sum()) > 0


def test_merging_beats_taking_out_and_any_clusters_on_experts_that_are_alike() -> None:
    model, task = paired(shuffle=True), tiny.make_task("moe")

    def perplexity(method) -> float:
        return task.measure(prune(model, method, task).model)["perplexity"]

    ours = perplexity(UNCURL(samples=16))
    assert ours < 1.01 * task.measure(model)["perplexity"]
    assert perplexity(UNCURL(samples=16, align=False)) > 1.05 * ours
    others = [frozenset({0, 1}), frozenset({2, 3})]
    seed = next(s for s in range(20) if _all_wrong(model, s, others))
    assert perplexity_with(model, UNCURL(samples=16, clustering=RandomClusters()), seed) > 1.05 * ours
    assert perplexity(ExpertRemoval(samples=16)) >= 0.999 * ours


def _all_wrong(model: nn.Module, seed: int, clusters: list[frozenset[int]]) -> bool:
    method = UNCURL(samples=16, clustering=RandomClusters())
    done = prune(model, method, tiny.make_task("moe", seed=seed))
    return all(together(e.assignment) != {frozenset({0, 2}), frozenset({1, 3})} for e in merges(done.edits))


def perplexity_with(model: nn.Module, method: UNCURL, seed: int) -> float:
    task = tiny.make_task("moe", seed=seed)
    return task.measure(prune(model, method, task).model)["perplexity"]


def test_nothing_to_merge_is_said() -> None:
    done = prune(tiny.moe(), UNCURL(sparsity=0.1, samples=4), tiny.make_task("moe"))
    assert not done.edits
    assert "less than one" in done.notes[0]


def test_a_plan_lists_the_experts() -> None:
    from secateur.plan import plan

    found = plan(UNCURL(), tiny.moe(), tiny.make_task("moe"), priced=False)
    assert [(row.units, row.keep) for row in found.rows] == [(4, 2), (4, 2)]


def test_refusals() -> None:
    task = tiny.make_task("moe")
    with pytest.raises(SettingError, match="0 calibration samples were asked for"):
        prune(tiny.moe(), UNCURL(samples=0), task)
    with pytest.raises(BudgetError, match="each token is sent to 2"):
        prune(tiny.moe(), UNCURL(sparsity=0.75, router=MeanRows()), task)
    with pytest.raises(GraphError, match="experts of LlamaForCausalLM"):
        prune(tiny.decoder(), UNCURL(), task)


def test_experts_stored_in_another_way_are_refused_unless_left_in_order() -> None:
    model, task = tiny.moe(), tiny.make_task("moe")
    experts = model.model.layers[0].mlp.experts
    experts.gate_up_proj_bias = nn.Parameter(torch.zeros(4, 64))
    with pytest.raises(GraphError, match="Give align=False"):
        prune(model, UNCURL(samples=4), task)
    assert prune(model, UNCURL(samples=4, align=False), task).edits


def test_interleaved_neurons_are_found_out() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    for layer in model.model.layers:
        kind = type(layer.mlp.experts)

        class Interleaved(kind):  # type: ignore[misc, valid-type]
            def forward(self, hidden, index, weight):
                out = torch.zeros_like(hidden)
                for token, (chosen, gates) in enumerate(zip(index, weight, strict=True)):
                    for expert, gate in zip(chosen.tolist(), gates, strict=True):
                        both = self.gate_up_proj[expert] @ hidden[token]
                        inner = torch.nn.functional.silu(both[::2]) * both[1::2]
                        out[token] += gate * (self.down_proj[expert] @ inner)
                return out

        layer.mlp.experts.__class__ = Interleaved
    with pytest.raises(GraphError, match="not stored as they seem"):
        UNCURL(samples=4).run(model, task)


def test_edits_are_not_applied_twice_to_what_the_caller_holds() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, UNCURL(samples=8), task)
    again = tiny.trained("moe")
    apply_(again, done.edits)
    torch.testing.assert_close(logits(again), logits(done.model))
