"""STUN: experts that behave alike go, then weights."""

import json

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.axes import NM, Uniform
from secateur.edit import Mask, Merge, Remove
from secateur.errors import BudgetError, EvidenceError, GraphError, PatternError, SettingError
from secateur.evidence import Evidence
from secateur.graph.experts import mixtures
from secateur.method import prune
from secateur.methods.stun import (
    STUN,
    Both,
    Complete,
    EndPoints,
    RoutedWanda,
    RouterRows,
    Together,
    agglomerate,
    clusters_for,
    kurtosis,
    representatives,
)
from secateur.methods.wanda import Wanda
from secateur.models import load, save

INF = float("inf")


def distances(points: list[float]) -> torch.Tensor:
    where = torch.tensor(points, dtype=torch.float64)
    return (where[:, None] - where[None]).abs()


def labels(found: list[torch.Tensor]) -> list[list[int]]:
    return [assignment.tolist() for assignment in found]


# Stage 1, by hand


def test_agglomeration_by_hand() -> None:
    # 0 -1- 1 -1.5- 2.5 -0.5- 3, and one far away at 10.
    line = distances([0.0, 1.0, 2.5, 3.0, 10.0])
    # Below 1.2: (2.5, 3) then (0, 1); 1.5 is too far.
    assert labels(agglomerate([line], 1.2, [4], EndPoints())) == [[0, 0, 1, 1, 2]]
    # Below 2.7, complete linkage looks at all pairs of {0, 1} and {2.5, 3}: 3 apart, refused.
    assert labels(agglomerate([line], 2.7, [4], Complete())) == [[0, 0, 1, 1, 2]]
    # End points of the edge 1 - 2.5 only: 0 - 2.5 is 2.5, and 1 - 3 is 2: joined.
    assert labels(agglomerate([line], 2.7, [4], EndPoints())) == [[0, 0, 0, 0, 1]]
    # A layer loses two at most; a budget stops earlier.
    assert labels(agglomerate([line], INF, [2], EndPoints())) == [[0, 0, 1, 1, 2]]
    assert labels(agglomerate([line], INF, [4], EndPoints(), removals=1)) == [[0, 1, 2, 2, 3]]


def test_a_refused_edge_blocks_later_joins() -> None:
    # 1 and 2 are close, 0 - 1 joined first; then 1 - 2 is refused as 0 - 2 is too far, and stays refused.
    d = torch.tensor([[0.0, 1.0, 5.0, 9.0], [1.0, 0.0, 2.0, 9.0], [5.0, 2.0, 0.0, 3.0], [9.0, 9.0, 3.0, 0.0]]).double()
    assert labels(agglomerate([d], 4.0, [3], EndPoints())) == [[0, 0, 1, 1]]


def test_ties_go_by_layer_and_number() -> None:
    same = torch.ones(3, 3, dtype=torch.float64)
    assert labels(agglomerate([same, same], 2.0, [2, 2], EndPoints(), removals=3)) == [[0, 0, 0], [0, 0, 1]]


def test_one_threshold_gives_each_layer_its_own_number() -> None:
    near, far = distances([0.0, 0.1, 0.2, 0.3]), distances([0.0, 5.0, 10.0, 15.0])
    found, threshold = clusters_for([near, far], 3, [3, 3], EndPoints())
    assert [int(a.max()) + 1 for a in found] == [1, 4]
    assert threshold <= 5.0
    found, _ = clusters_for([near, far], 4, [3, 3], EndPoints())
    assert [int(a.max()) + 1 for a in found] == [1, 3]
    with pytest.raises(BudgetError, match="7 experts of 8 were to be removed"):
        clusters_for([near, far], 7, [3, 3], EndPoints())


@given(st.integers(0, 10_000), st.integers(0, 9), st.sampled_from([EndPoints(), Complete()]))
def test_the_number_of_experts_is_met_exactly(seed: int, removals: int, linkage) -> None:
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randn(5, 3, generator=draw).round() for _ in range(3)]  # rounded: many ties
    found, _ = clusters_for([RouterRows().between(r, Evidence(), "x") for r in rows], removals, [3, 3, 3], linkage)
    assert sum(len(a) - int(a.max()) - 1 for a in found) == removals
    assert all(len(a) - int(a.max()) - 1 <= 3 for a in found)


@given(st.integers(0, 10_000))
def test_complete_linkage_never_spans_more_than_the_threshold(seed: int) -> None:
    rows = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))
    d = RouterRows().between(rows, Evidence(), "x")
    found = agglomerate([d], 1.0, [7], Complete())[0]
    for cluster in range(int(found.max()) + 1):
        mine = (found == cluster).nonzero().reshape(-1)
        assert float(d[mine][:, mine].max()) < 1.0


def test_distances_by_hand() -> None:
    rows = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    seen = Evidence(9, {"together": torch.tensor([[5.0, 3.0, 0.0], [3.0, 6.0, 1.0], [0.0, 1.0, 2.0]]).double()})
    assert RouterRows().between(rows, seen, "x")[0].tolist() == [0, 5, 1]
    norm = (25 + 1) ** 0.5
    assert RouterRows(relative=True).between(rows, seen, "x")[0, 1] == pytest.approx(5 / norm)
    assert Together(scaled=False).between(rows, seen, "x")[0].tolist() == [0, -3, 0]
    mean = (3 + 0 + 1) * 2 / 6  # zeros count
    assert Together().between(rows, seen, "x")[0, 1] == pytest.approx(-3 / mean)
    assert Both(mix=2.0).between(rows, seen, "x")[0, 1] == pytest.approx(5 - 2 * 3 / mean)


def test_the_expert_nearest_to_the_mean_stands_for_its_cluster() -> None:
    slabs = [torch.tensor([[0.0], [1.0], [5.0], [7.0], [9.0]]), torch.zeros(5, 2)]
    keep = representatives(slabs, torch.tensor([0, 0, 1, 1, 0]))
    assert keep.tolist() == [False, True, True, False, False]  # means 10/3 and 6: of two as near, the first
    # The tensors count together: what is near in one may be far in the other.
    slabs[1][1] = 100.0
    assert representatives(slabs, torch.tensor([0, 0, 1, 1, 0])).tolist() == [True, False, True, False, False]


def test_kurtosis_by_hand() -> None:
    assert kurtosis([torch.tensor([1.0, -1.0, 0.0]), torch.tensor([1.0, -1.0])]) == pytest.approx(1.0)
    plain = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    assert kurtosis([plain]) == pytest.approx(3.0, abs=0.1)
    cut = torch.where(plain.abs() > 0.67, plain, 0.0)  # unstructured pruning takes the small ones
    assert kurtosis([cut]) < 2


# The method


def test_a_layer_left_with_few_experts_keeps_means() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, STUN(samples=8, experts=0.5, sparsity=0.5), task)
    kinds = [type(e) for e in done.edits if not isinstance(e, Mask)]
    assert kinds == [Merge, Merge]
    edit = done.edits[0]
    name = "model.layers.0.mlp.gate.weight"
    for cluster in range(2):
        mean = model.get_parameter(name)[edit.assignment == cluster].mean(0)
        torch.testing.assert_close(done.model.get_parameter(name)[cluster], mean)
    kept = prune(model, STUN(samples=8, experts=0.5, sparsity=0.5, few=0), task)
    assert [type(e) for e in kept.edits if not isinstance(e, Mask)] == [Remove, Remove]


@pytest.mark.parametrize("experts", [0.0, 0.2, 0.4])
@pytest.mark.parametrize("sparsity", [0.4, 0.6])
def test_the_two_stages_share_one_budget(experts: float, sparsity: float) -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, STUN(samples=8, experts=experts, sparsity=sparsity), task)
    from secateur.cut import weights

    whole = sum(site.units for site in weights(model))
    left = sum(
        int((site.parts[0].read(dict(done.model.named_parameters())) != 0).sum()) for site in weights(done.model)
    )
    assert 1 - left / whole == pytest.approx(sparsity, abs=0.01)
    assert sum(layer.site.units for layer in mixtures(done.model)) == 8 - int(8 * experts)


def test_without_experts_and_owl_it_is_wanda() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    ours = prune(model, STUN(samples=8, experts=0, sparsity=0.5, allocation=Uniform()), task)
    theirs = prune(model, Wanda(samples=8, sparsity=0.5), task)
    mine, other = ours.model.state_dict(), theirs.model.state_dict()
    assert all(torch.equal(mine[k], v) for k, v in other.items())


def test_each_layer_has_its_own_number_and_comes_back(tmp_path) -> None:
    model, task = tiny.moe(experts=6), tiny.make_task("moe")
    gate = model.model.layers[0].mlp.gate.weight.data
    gate[3:] = gate[:3] * 1.001
    done = prune(model, STUN(samples=8, experts=0.25, sparsity=0.4), task)
    assert [layer.site.units for layer in mixtures(done.model)] == [3, 6]
    save(done, model, tmp_path / "out")
    assert not json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]["stock"]
    back = load(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(task.example.through(back).logits, task.example.through(done.model).logits)


def test_equal_numbers_load_with_the_stock_class(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, STUN(samples=8, experts=0.5, sparsity=0.5), task)
    save(done, model, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]["stock"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(
            task.example.through(stock).logits, task.example.through(done.model).logits, atol=1e-5, rtol=1e-5
        )


def test_an_expert_no_token_reached_is_ranked_by_size_and_named() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    done = prune(model, STUN(samples=1, experts=0, sparsity=0.5), Few(task))
    named = next(note for note in done.notes if note.startswith("no token reached"))
    site = named.removeprefix("no token reached ").split(",")[0].split(":")[0].strip()
    mask = next(e for e in done.edits if isinstance(e, Mask) and e.site.name == site)
    weight = mask.site.parts[0].read(dict(model.named_parameters())).detach()
    for row, keep in zip(weight.abs(), mask.keep, strict=True):
        assert float(row[keep].min()) >= float(row[~keep].max())


class Few:
    """A task whose calibration is one token twice: no more than two experts a layer see any."""

    def __init__(self, task) -> None:
        self.task = task

    def __getattr__(self, name: str):
        return getattr(self.task, name)

    def batches(self, split: str, n: int | None = None, epoch: int = 0):
        for batch in self.task.batches(split, n, epoch):
            yield type(batch)((torch.full_like(batch.inputs[0][:1, :1], 5),))


def test_the_score_is_wandas_over_the_tokens_that_came() -> None:
    model = tiny.moe()
    from secateur.cut import weights

    site = next(s for s in weights(model) if s.name.endswith("down_proj[1]"))
    named = dict(model.named_parameters())
    square = torch.rand(32, dtype=torch.float64)
    one = RoutedWanda().score(site, named, Evidence(4, {"input_square": 4 * square}))
    two = RoutedWanda().score(site, named, Evidence(9, {"input_square": 9 * square}))
    torch.testing.assert_close(one, two)
    weight = named["model.layers.0.mlp.experts.down_proj"][1].detach().abs()
    torch.testing.assert_close(one, weight * square.sqrt().float())
    torch.testing.assert_close(RoutedWanda().score(site, named, Evidence()), weight)


def test_twins_go_and_nothing_else_changes() -> None:
    model, task = tiny.trained("moe"), tiny.make_task("moe")
    layer = mixtures(model)[0]
    for part in layer.site.parts:
        value = part.read(dict(model.named_parameters())).data
        value[3] = value[1].clone()
    done = prune(model, STUN(samples=8, experts=0.125, sparsity=0.2), task)
    edit = done.edits[0]
    assert isinstance(edit, Remove)
    assert edit.site.name == layer.site.name
    assert edit.keep.tolist() == [True, True, True, False]  # of twins the first


def test_refusals() -> None:
    task = tiny.make_task("moe")
    with pytest.raises(BudgetError, match="the experts alone are 0.4"):
        prune(tiny.moe(), STUN(experts=0.5, sparsity=0.3), task)
    with pytest.raises(BudgetError, match="4 can be: a layer keeps as many as a token is sent to"):
        prune(tiny.moe(), STUN(experts=0.75, sparsity=0.8), task)
    with pytest.raises(SettingError, match="one at least must stay"):
        prune(tiny.moe(), STUN(most=4), task)
    with pytest.raises(SettingError, match="experts 1.2 was asked for"):
        prune(tiny.moe(), STUN(experts=1.2), task)
    with pytest.raises((SettingError, PatternError)):
        prune(tiny.moe(), STUN(sparsity=0.5, pattern=NM(2, 4)), task)
    with pytest.raises(GraphError, match="experts of LlamaForCausalLM"):
        prune(tiny.decoder(), STUN(), task)
    alone = tiny.moe(num_experts_per_tok=1)
    with pytest.raises(EvidenceError, match="no token is sent to two of them"):
        prune(alone, STUN(samples=4, distance=Together()), task)


def test_gates_that_are_not_rescaled_are_named() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_experts=4, num_experts_per_tok=2, intermediate_size=48, moe_intermediate_size=16,
        shared_expert_intermediate_size=24, pad_token_id=0,
    )  # fmt: skip
    model = tiny.seeded(lambda: Qwen2MoeForCausalLM(config).float(), 1)
    for layer in mixtures(model):
        torch.nn.init.normal_(model.get_submodule(layer.router).weight, generator=torch.Generator().manual_seed(0))
    done = prune(model, STUN(samples=4, experts=0.25, sparsity=0.4, most=1), tiny.make_task("moe"))
    assert any("gates are shares of all experts" in note for note in done.notes)
    assert [layer.site.units for layer in mixtures(done.model)] == [3, 3]
