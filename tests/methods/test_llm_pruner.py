"""What the loss would hardly notice goes, with all that depends on it."""

import copy

import pytest
import tiny
import torch

from secateur import edit
from secateur.axes.spending import total_cost
from secateur.axes.taylor import (
    Average,
    First,
    Foremost,
    Largest,
    Mix,
    Product,
    Second,
    Total,
    Vectorize,
    gradients,
    group_scores,
)
from secateur.edit import Mask, Remove
from secateur.errors import BudgetError, EvidenceError, GraphError, SettingError
from secateur.evidence import examples
from secateur.graph import couple
from secateur.graph.inner import inner
from secateur.method import prune
from secateur.methods.llm_pruner import LLMPruner
from secateur.models import save
from secateur.site import Part, Site, tensors
from secateur.task import Batch

# Two neurons: rows of a [2, 2], columns of b [2, 2].
SITE = Site("n", "channel", (2,), (
    Part("a", (2, 2), torch.tensor([[0], [1]])),
    Part("b", (2, 2), torch.tensor([[0, 1]])),
))  # fmt: skip
WEIGHTS = {"a": torch.tensor([[1.0, 2.0], [3.0, 0.0]]), "b": torch.tensor([[1.0, 1.0], [2.0, -1.0]])}
GRADS = {"a": torch.tensor([[1.0, -1.0], [2.0, 9.0]]), "b": torch.tensor([[3.0, 1.0], [1.0, 1.0]])}
SQUARES = {"a": torch.tensor([[2.0, 1.0], [0.0, 9.0]]), "b": torch.tensor([[0.0, 2.0], [1.0, 4.0]])}


def scored(taylor, combine=None, site=SITE):
    return group_scores(site, WEIGHTS, GRADS, SQUARES, taylor, combine or Total()).tolist()


def loss(model, task):
    with torch.no_grad():
        return sum(float(task.loss(model, batch)) for batch in task.batches("val"))


def test_scores_by_hand():
    # w g:        a [[1, -2], [6, 0]]    b [[3, 1], [2, -1]]      rows of a: -1, 6; columns of b: 5, 0
    assert scored(Vectorize()) == [1 + 5, 6 + 0]
    assert scored(First()) == [3 + 5, 6 + 2]
    # w^2 F:      a [[2, 4], [0, 0]]     b [[0, 2], [4, 4]]
    assert scored(Second()) == [6 + 4, 0 + 6]
    # w g - w^2 F / 2:   a [[0, -4], [6, 0]]   b [[3, 0], [0, -3]]
    assert scored(Mix()) == [4 + 3, 6 + 3]


def test_shares_are_combined_by_hand():
    assert scored(First(), Average()) == [4, 4]
    assert scored(First(), Largest()) == [5, 6]
    assert scored(First(), Product()) == [15, 12]
    assert scored(First(), Foremost()) == [3, 6]


def test_a_head_is_the_sum_of_its_channels_and_a_row_cancels_only_within_itself():
    whole = Site("h", "head", (1,), tuple(Part(p.name, p.shape, p.owner * 0) for p in SITE.parts))
    assert scored(Vectorize(), site=whole) == [12]  # |-1| + |6| + |5| + |0|, not |-1 + 6| + |5 + 0|
    assert scored(First(), site=whole) == [16]


def test_gradients_are_of_the_mean_loss_and_squares_of_single_samples():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    name = "model.layers.0.mlp.down_proj.weight"
    batches = list(task.batches("calibration", 12))
    assert [b.size for b in batches] == [8, 4]
    grads, squares = gradients(model, task, batches, {name}, squares=True)
    single = []
    for batch in batches:
        for row in batch.inputs[0]:
            model.zero_grad()
            task.loss(model, Batch((row[None],), batch.target)).backward()
            single.append(model.get_parameter(name).grad.clone())
    model.zero_grad(set_to_none=True)
    torch.testing.assert_close(grads[name], torch.stack(single).mean(0), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(squares[name], torch.stack(single).square().mean(0), rtol=1e-4, atol=1e-9)
    whole, none = gradients(model, task, batches, {name}, squares=False)
    torch.testing.assert_close(whole[name], grads[name], rtol=1e-4, atol=1e-7)
    assert not none
    assert all(p.grad is None for p in model.parameters())


def test_single_samples_carry_their_labels():
    batch = Batch({"x": torch.arange(6).reshape(3, 2), "scale": 2}, torch.tensor([7, 8, 9]))
    found = list(examples([batch]))
    assert [b.target.tolist() for b in found] == [[7], [8], [9]]
    assert [b.inputs["x"].tolist() for b in found] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert found[0].inputs["scale"] == 2


def test_weights_that_do_not_train_can_be_scored():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    model.requires_grad_(False)
    prune(model, LLMPruner(spare_first=0, spare_last=0), task, inplace=True)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("taylor", [Vectorize(), First(), Second(), Mix()])
def test_masked_is_removed_and_the_budget_is_met(taylor):
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    sites = inner(couple(model, task.example))
    settings = {"sparsity": 0.3, "spare_first": 0, "spare_last": 0, "taylor": taylor}
    outcome = prune(model, LLMPruner(**settings), task)
    assert 0 <= 0.3 * total_cost(sites) - outcome.ledger.removed < 2 * 96  # a neuron in each of two blocks
    assert outcome.ledger.prunable == total_cost(sites)
    masked = copy.deepcopy(model)
    edit.apply_(masked, [Mask(e.site, e.keep) if isinstance(e, Remove) else e for e in outcome.edits])
    with torch.no_grad():
        ours, theirs = (task.example.through(m).logits for m in (outcome.model, masked))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_blocks_at_both_ends_are_spared_and_the_rest_makes_up_for_them():
    model, task = tiny.decoder(layers=5), tiny.make_task("decoder")
    outcome = prune(model, LLMPruner(sparsity=0.2, spare_first=2, spare_last=1), task)
    touched = {e.site.block for e in outcome.edits if isinstance(e, Remove)}
    assert touched == {"model.layers.2", "model.layers.3"}
    assert abs(outcome.ledger.share - 0.2) < 0.01
    assert outcome.ledger.prunable == 5 * (2 * 1536 + 64 * 96)
    assert outcome.notes[0].endswith("taken out: 0.2000, 0.2 asked for; from 2 of 5 blocks")


def test_a_unit_without_effect_goes_and_the_chosen_hurt_less_than_the_others():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    deaf = torch.arange(64) % 8 == 0
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, deaf] = 0
            layer.mlp.gate_proj.weight[deaf] *= 20  # large, and without effect
    settings = {"sparsity": 0.25, "spare_first": 0, "spare_last": 0}
    outcome = prune(model, LLMPruner(**settings), task)
    for found in outcome.edits:
        if isinstance(found, Remove) and found.site.kind == "channel":
            assert not bool(found.keep[deaf].any())
    backwards = prune(model, LLMPruner(**settings, combine=Backwards()), task)
    dense = loss(model, task)
    assert loss(outcome.model, task) - dense < 0.5 * (loss(backwards.model, task) - dense)


class Backwards:
    """What matters most goes first."""

    def of(self, parts):
        return -parts.sum(0)


def test_equal_blocks_load_with_stock_transformers(tmp_path):
    import json

    import transformers as hub

    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, LLMPruner(sparsity=0.3, spare_first=0, spare_last=0), task)
    save(outcome, model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert said["stock"], said["why_not"]
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        ours, theirs = (task.example.through(m).logits for m in (outcome.model, stock))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_done_is_refused():
    model, task = tiny.decoder(), tiny.make_task("decoder")
    with pytest.raises(SettingError, match=r"4 blocks at the start and 2 at the end .* there are 2"):
        LLMPruner().run(model, task)
    with pytest.raises(BudgetError, match=r"the 1 of 2 blocks that are not spared hold 0\.500 of the weights"):
        LLMPruner(sparsity=0.6, spare_first=0, spare_last=1).run(model, task)
    with pytest.raises(BudgetError, match="can be, 1 unit being left"):
        LLMPruner(sparsity=0.9, spare_first=0, spare_last=0).run(model, task)
    with pytest.raises(SettingError, match="spare_first=-1"):
        LLMPruner(spare_first=-1).check()
    with pytest.raises(GraphError, match="no repeated blocks"):
        LLMPruner().run(tiny.mlp(), tiny.make_task("mlp"))
    with pytest.raises(GraphError, match="experts"):
        LLMPruner().run(tiny.moe(), tiny.make_task("moe"))
    with pytest.raises(EvidenceError, match="there are no calibration samples"):
        gradients(model, task, [], set(tensors(model)), squares=False)
