"""Experts taken out and merged in transformers' own mixtures, saved, and loaded by stock loaders."""

import json

import pytest
import tiny
import torch
from torch import nn

from secateur.edit import Mask, Merge, Remove, Replace, apply_
from secateur.errors import BudgetError, EvidenceError, GraphError
from secateur.graph.experts import ClusterRouter, check_left, cluster_router, mixtures, routing
from secateur.models import load, save
from secateur.outcome import Outcome
from secateur.task import Batch

SIZES = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "num_experts_per_tok": 2,
}


def qwen2_moe() -> nn.Module:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        **SIZES, num_experts=6, intermediate_size=48, moe_intermediate_size=16, shared_expert_intermediate_size=24
    )
    return tiny.seeded(lambda: Qwen2MoeForCausalLM(config).float(), 1)


def qwen3_moe() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(**SIZES, num_experts=6, intermediate_size=48, moe_intermediate_size=16, head_dim=8)
    return tiny.seeded(lambda: Qwen3MoeForCausalLM(config).float(), 1)


def olmoe() -> nn.Module:
    from transformers import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(**SIZES, num_experts=6, intermediate_size=16)
    return tiny.seeded(lambda: OlmoeForCausalLM(config).float(), 1)


def mixtral() -> nn.Module:
    return tiny.moe(experts=6)


FAMILIES = [mixtral, qwen2_moe, qwen3_moe, olmoe]
IDS = torch.randint(2, tiny.VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(5))
KEEP = torch.tensor([True, False, True, True, False, True])


def awake(make) -> nn.Module:
    """Routers start at zero in some of these classes: rows that tell experts apart."""
    model = make()
    draw = torch.Generator().manual_seed(2)
    for layer in mixtures(model):
        weight = model.get_submodule(layer.router).weight
        weight.data.copy_(torch.randn(weight.shape, generator=draw))
    return model


@torch.no_grad()
def answer(model: nn.Module) -> torch.Tensor:
    return model(IDS).logits


def close(a: nn.Module, b: nn.Module) -> bool:
    return bool(torch.allclose(answer(a), answer(b), atol=1e-5))


@pytest.mark.parametrize("make", FAMILIES)
def test_an_expert_is_its_slices_and_its_row(make) -> None:
    model = awake(make)
    layers = mixtures(model)
    assert [layer.site.units for layer in layers] == [6, 6]
    assert [p.rpartition(".")[2] for p in (part.name for part in layers[0].own.parts)] == ["gate_up_proj", "down_proj"]
    assert layers[0].rows.name.endswith("gate.weight")
    assert layers[0].top_k == 2
    assert layers[0].normalised == getattr(model.config, "norm_topk_prob", True)
    assert not any("shared" in part.name for part in layers[0].site.parts)


@pytest.mark.parametrize("make", FAMILIES)
def test_removed_experts_are_as_if_the_router_never_chose_them(make) -> None:
    model, blind = awake(make), awake(make)
    apply_(model, [Remove(layer.site, KEEP) for layer in mixtures(model)])
    for layer in mixtures(blind):
        gate = blind.get_submodule(layer.router)

        def forward(hidden, gate=gate):
            logits = torch.nn.functional.linear(hidden.reshape(-1, 32), gate.weight)
            logits = logits.masked_fill(~KEEP, -torch.inf)
            gates, chosen = torch.softmax(logits, -1).topk(2, -1)
            scaled = gates / gates.sum(-1, keepdim=True) if getattr(gate, "norm_topk_prob", True) else gates
            return logits, scaled, chosen

        gate.forward = forward
    assert close(model, blind)
    assert [m.num_experts for m in model.modules() if hasattr(m, "num_experts")] == [4] * 5


@pytest.mark.parametrize("make", FAMILIES)
def test_equal_counts_load_with_the_stock_class(make, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model, whole = awake(make), awake(make)
    edits = apply_(model, [Remove(layer.site, KEEP) for layer in mixtures(model)])
    save(Outcome(model, edits), whole, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert about["stock"], about["why_not"]
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert type(stock) is type(model)
    assert stock.num_experts == 4
    assert close(model, stock)
    assert close(model, load(tmp_path / "out"))
    with torch.no_grad():  # the loss that balances experts counts them by the config
        assert torch.isfinite(stock(IDS, labels=IDS, output_router_logits=True).loss)
        assert torch.isfinite(model(IDS, labels=IDS, output_router_logits=True).loss)


@pytest.mark.parametrize("make", FAMILIES)
def test_unequal_counts_load_with_secateur(make, tmp_path) -> None:
    model, whole = awake(make), awake(make)
    keeps = [KEEP, torch.tensor([False, False, True, True, False, True])]
    edits = apply_(model, [Remove(layer.site, keep) for layer, keep in zip(mixtures(model), keeps, strict=True)])
    save(Outcome(model, edits), whole, tmp_path / "out")
    about = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert not about["stock"]
    assert "differ in shape" in about["why_not"]
    back = load(tmp_path / "out")
    assert [layer.site.units for layer in mixtures(back)] == [4, 3]
    assert close(model, back)


@pytest.mark.parametrize("make", FAMILIES)
def test_a_router_that_maps_to_clusters_decides_as_before(make, tmp_path) -> None:
    model, whole = awake(make), awake(make)
    layers = mixtures(model)
    for layer in layers:  # an expert and its copies: merged, nothing may change
        for part in layer.own.parts:
            value = part.read(dict(model.named_parameters())).data
            value[3:] = value[:3].clone()
        for part in layer.own.parts:
            dict(whole.named_parameters())[part.name].data.copy_(dict(model.named_parameters())[part.name].data)
    before = answer(model)
    assignment = torch.tensor([0, 1, 2, 0, 1, 2])
    edits = []
    for layer in layers:
        router = cluster_router(model, layer, assignment)
        edits += apply_(model, [Merge(layer.own, assignment, torch.full((6,), 0.5)), Replace(layer.router, router)])
    torch.testing.assert_close(answer(model), before, atol=1e-5, rtol=1e-5)
    save(Outcome(model, edits), whole, tmp_path / "out")
    assert close(model, load(tmp_path / "out"))


def test_gates_of_experts_that_became_one_add_up() -> None:
    router = ClusterRouter(3, 2, 2, normalised=False)
    router.weight.data.copy_(torch.tensor([[2.0, 0.0], [1.0, 0.0], [-9.0, 0.0]]))
    router.cluster.copy_(torch.tensor([0, 0, 1]))
    _, gates, chosen = router(torch.tensor([[1.0, 0.0]]))
    assert chosen.tolist() == [[0, 0]]
    whole = torch.softmax(torch.tensor([2.0, 1.0, -9.0]), 0)
    torch.testing.assert_close(gates.sum(), whole[0] + whole[1])


def test_masked_then_removed_is_removed() -> None:
    plain, both = awake(olmoe), awake(olmoe)
    for layer in mixtures(plain):
        apply_(plain, Remove(layer.site, KEEP))
        apply_(both, [Mask(layer.site, KEEP), Remove(layer.site, KEEP)])
    assert all(torch.equal(a, b) for a, b in zip(plain.state_dict().values(), both.state_dict().values(), strict=True))


def test_what_is_routed_is_counted_over_real_tokens_in_any_grouping() -> None:
    model = awake(mixtral)
    layers = mixtures(model)
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    padded = routing(model, layers, [Batch({"input_ids": IDS, "attention_mask": mask})])
    apart = routing(model, layers, [Batch((IDS[:1],)), Batch((IDS[1:, :7],))])
    for layer in layers:
        one, two = padded[layer.site.name], apart[layer.site.name]
        assert one.count == two.count == 19
        assert float(one.sums["routed"].sum()) == 2 * 19
        assert torch.equal(one.sums["together"].diagonal(), one.sums["routed"])
        for key, value in one.sums.items():
            torch.testing.assert_close(two.sums[key], value, rtol=1e-5, atol=1e-4)


def test_refusals() -> None:
    with pytest.raises(GraphError, match="no layer of it holds any"):
        mixtures(tiny.decoder())
    model = awake(mixtral)
    layer = mixtures(model)[0]
    with pytest.raises(BudgetError, match="each token is sent to 2"):
        check_left(layer, 1)
    check_left(layer, 2)
    with pytest.raises(EvidenceError, match="no token came through"):
        routing(model, [layer], [])
    model.model.layers[0].mlp.gate = nn.Linear(32, 6, bias=False)  # without a top_k
    with pytest.raises(GraphError, match="the router of the 6 experts in model.layers.0.mlp.experts"):
        mixtures(model)


def test_a_router_of_another_kind_is_not_taken_over() -> None:
    model = awake(mixtral)
    layer = mixtures(model)[0]
    gate = model.get_submodule(layer.router)

    def by_sigmoid(hidden):
        logits = torch.nn.functional.linear(hidden, gate.weight)
        gates, chosen = torch.sigmoid(logits).topk(2, -1)
        return logits, gates, chosen

    gate.forward = by_sigmoid
    with pytest.raises(GraphError, match="does not decide by a softmax"):
        cluster_router(model, layer, torch.tensor([0, 0, 1, 1, 2, 2]))
