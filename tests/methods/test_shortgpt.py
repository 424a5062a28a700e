"""A block that hardly turns the hidden state goes, and the model still knows how long its cache is."""

import copy
import json
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch import nn

from secateur import edit
from secateur.axes.influence import cosine
from secateur.cut import Passing, layers, passing
from secateur.edit import Mask, Replace
from secateur.errors import EvidenceError, GraphError, SettingError
from secateur.method import Chain, prune
from secateur.methods.shortgpt import (
    ClosestRun,
    LeastInfluence,
    Seen,
    ShortGPT,
    angular_distance,
    measured,
    only_stack,
)
from secateur.methods.wanda import Wanda
from secateur.models import load, save
from secateur.walk import stacks


def deep(family: str = "decoder", layers: int = 4) -> nn.Module:
    return getattr(tiny, family)(layers=layers)


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


def quieten(model: nn.Module, layer: int, by: float = 0.0) -> None:
    """Make a block add little to the stream."""
    with torch.no_grad():
        model.model.layers[layer].self_attn.o_proj.weight *= by
        model.model.layers[layer].mlp.down_proj.weight *= by


IDS = torch.tensor([[2, 17, 5, 40, 33, 8, 21, 9], [3, 3, 50, 12, 60, 1, 7, 30]])


class Turn(nn.Module):
    """Rotates what it is given in the plane by an angle."""

    def __init__(self, degrees: float) -> None:
        super().__init__()
        angle = torch.deg2rad(torch.tensor(degrees))
        self.inner = nn.Sequential(nn.Linear(2, 2, bias=False))
        self.inner[0].weight = nn.Parameter(torch.tensor([[angle.cos(), -angle.sin()], [angle.sin(), angle.cos()]]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Turns(nn.Module):
    def __init__(self, *degrees: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Turn(d) for d in degrees])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def plane(samples: int = 3, tokens: int = 4):
    from secateur.task import Batch

    return [Batch((torch.randn(samples, tokens, 2, generator=torch.Generator().manual_seed(0)),))]


def test_block_influence_by_hand():
    # Turns of 60, 90 and 180 degrees: 1 - cos is 0.5, 1 and 2, whatever the tokens.
    model = Turns(60, 90, 180)
    seen, outputs = measured(model, only_stack(model), plane())
    assert seen.influence == pytest.approx((0.5, 1.0, 2.0), abs=1e-6)
    assert outputs == 0
    assert LeastInfluence().gone(seen, 2) == [0, 1]
    # Rows by hand: cosines 0.6 and -1 give an influence of 1.2.
    a, b = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 4.0], [0.0, -5.0]])
    assert cosine(a, b).tolist() == pytest.approx([0.6, -1.0])


def test_angles_by_hand_and_never_nan():
    a = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert angular_distance(a, torch.tensor([[0.0, 3.0], [0.0, -1.0]])) == pytest.approx(0.5)
    assert angular_distance(a, torch.tensor([[2.0, 0.0], [-1.0, 0.0]])) == pytest.approx(0.5)
    ones = torch.full((4, 577), 0.1).half()  # the cosine of a row with itself is above 1 by rounding
    assert 0 <= angular_distance(ones, ones) < 1e-7
    assert cosine(torch.zeros(1, 3), torch.ones(1, 3)).tolist() == [0.0]


def test_the_closest_run_is_of_neighbours_and_may_turn_back():
    # Turns of 80 and then -80 cancel: together they do nothing, though each does much.
    model = Turns(30, 80, -80, 40, 30)
    seen, _ = measured(model, only_stack(model), plane())
    assert ClosestRun().gone(seen, 2) == [1, 2]
    assert sorted(LeastInfluence().gone(seen, 2)) == [0, 4]
    assert ClosestRun().gone(seen, 1) == [0]
    assert ClosestRun().describe(seen, [1, 2]).startswith("angular distance over 2 blocks from: 0 0.6111, 1 0.0000")
    assert ClosestRun().gone(seen, 0) == []


def test_of_equals_the_later_goes_first():
    seen = Seen((0.5, 0.1, 0.1, 0.1), ())
    assert LeastInfluence().gone(seen, 2) == [3, 2]


def test_the_quiet_blocks_go_and_what_is_left_says_the_same():
    model, task = deep(), tiny.make_task("decoder")
    quieten(model, 1)
    quieten(model, 3, by=1e-3)
    outcome = prune(model, ShortGPT(sparsity=0.5, samples=8), task)
    assert outcome.notes[0] == "blocks taken out, the first to go first: 1, 3"
    assert outcome.notes[1].startswith("block influence: 0 0.")
    assert [e.name for e in outcome.edits if isinstance(e, Replace)] == ["model.layers.1", "model.layers.3"]
    one = prune(model, ShortGPT(sparsity=0.25, samples=8), task)
    torch.testing.assert_close(logits(one.model, IDS), logits(model, IDS))
    assert outcome.ledger.sparsity == 0.5
    assert (outcome.ledger.units, outcome.ledger.units_removed) == (4, 2)
    assert outcome.ledger.removed * 2 == outcome.ledger.prunable
    assert outcome.ledger.removed == outcome.ledger.before.parameters - outcome.ledger.after.parameters
    assert outcome.ledger.after.flops < outcome.ledger.before.flops


def test_masked_is_removed():
    """A pre-norm block whose weights are zero hands on what it gets."""
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    outcome = prune(model, ShortGPT(sparsity=0.5, samples=8), task)
    masked = copy.deepcopy(model)
    edit.apply_(masked, [e for e in outcome.edits if isinstance(e, Mask)])
    assert torch.equal(logits(masked, IDS), logits(outcome.model, IDS))


@pytest.mark.parametrize("gone", [[0], [0, 1], [1], [3], [0, 2]])
def test_it_generates_with_a_cache_what_it_generates_without(gone):
    """The pitfall: a cache asks its first layer how long it is, and that layer may be gone."""
    model = deep()
    edit.apply_(model, [Replace(f"model.layers.{i}", Passing()) for i in gone])
    settings = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with torch.no_grad():
        cached = model.generate(IDS, use_cache=True, **settings)
        plain = model.generate(IDS, use_cache=False, **settings)
        beams = model.generate(IDS, use_cache=True, num_beams=2, **settings)
    assert torch.equal(cached, plain)
    assert beams.shape == cached.shape
    used = [layer.self_attn.layer_idx for i, layer in enumerate(model.model.layers) if i not in gone]
    assert used == list(range(4 - len(gone)))


def in_two(model: nn.Module) -> torch.Tensor:
    """Logits of the last tokens, given in a second call that goes on from the cache of the first."""
    with torch.no_grad():
        first = model(IDS[:, :5], use_cache=True)
        return model(IDS[:, 5:], past_key_values=first.past_key_values, use_cache=True).logits


def test_a_second_call_goes_on_where_the_first_stopped():
    model = deep()
    unnumbered = copy.deepcopy(model)
    unnumbered.model.layers[0] = Passing()  # not by an edit, so that nothing is numbered anew
    edit.apply_(model, Replace("model.layers.0", Passing()))
    assert torch.equal(logits(model, IDS), logits(unnumbered, IDS))
    torch.testing.assert_close(in_two(model), logits(model, IDS)[:, 5:])
    assert (in_two(unnumbered) - logits(unnumbered, IDS)[:, 5:]).abs().max() > 0.01  # which is what would be lost


def test_layers_of_several_types_keep_to_the_entries_of_their_own():
    class Layer(nn.Module):
        def __init__(self, number: int) -> None:
            super().__init__()
            self.attention = nn.Linear(2, 2)
            self.attention.layer_idx = number

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(i) for i in range(6)])
    model.config = SimpleNamespace(layer_types=["sliding", "sliding", "full"] * 2)
    edit.apply_(model, [Replace("layers.0", Passing()), Replace("layers.2", Passing())])
    left = {i: layer.attention.layer_idx for i, layer in enumerate(model.layers) if isinstance(layer, Layer)}
    assert left == {1: 0, 3: 1, 4: 3, 5: 2}  # sliding ones share 0, 1, 3, 4 in order; full ones 2, 5


def test_a_block_is_answered_for_in_the_form_it_had():
    x = torch.ones(1, 2)
    assert passing(nn.Identity())(x, mask=None) is x
    assert Passing()(hidden_states=x) is x
    assert passing(nn.Identity(), 2)(None, x) == (x, None)
    block = nn.Identity()
    block.attention_type = "sliding_attention"
    assert passing(block).attention_type == "sliding_attention"
    assert passing(block, 1).settings() == {"outputs": 1, "attention_type": "sliding_attention"}


def test_blocks_that_answer_with_a_tuple(tmp_path):
    import transformers as hub

    config = hub.BloomConfig(vocab_size=64, hidden_size=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=1)
    model = tiny.seeded(lambda: hub.BloomForCausalLM(config), 0)
    outcome = prune(model, ShortGPT(sparsity=0.34, samples=8), tiny.make_task("decoder"))
    assert logits(outcome.model, IDS).isfinite().all()
    assert outcome.ledger.units_removed == 1


def test_saved_it_has_fewer_layers_and_stock_transformers_takes_it(tmp_path):
    import transformers as hub

    model, task = deep(), tiny.make_task("decoder")
    quieten(model, 0, by=1e-3)
    outcome = prune(model, ShortGPT(sparsity=0.25, samples=8), task)
    assert [e.name for e in outcome.edits if isinstance(e, Replace)] == ["model.layers.0"]
    save(outcome, model, tmp_path / "out")
    said = json.loads((tmp_path / "out" / "secateur.json").read_text())["saved"]
    assert said["stock"], said["why_not"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(stock, IDS), logits(outcome.model, IDS))
    assert sum(p.numel() for p in stock.parameters()) == outcome.ledger.after.parameters
    back = load(tmp_path / "out")
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert torch.equal(back.generate(IDS, **settings), outcome.model.generate(IDS, **settings))


def test_other_methods_can_follow():
    model, task = deep(), tiny.make_task("decoder")
    chain = Chain(
        (ShortGPT(sparsity=0.5, samples=8), Wanda(sparsity=0.5, samples=8), ShortGPT(sparsity=0.5, samples=8))
    )
    outcome = prune(model, chain, task)
    (left,) = stacks(outcome.model)
    assert len(left) == 1
    assert layers(outcome.model)[0].units == 1
    assert logits(outcome.model, IDS).isfinite().all()


@pytest.mark.parametrize("family", ["encoder", "vision_transformer"])
def test_encoders_lose_blocks_too(family):
    model, task = deep(family), tiny.make_task(family.replace("_", " "))
    outcome = prune(model, ShortGPT(sparsity=0.5, samples=16, choice=ClosestRun()), task)
    assert outcome.ledger.units_removed == 2
    task.loss(outcome.model, task.example)


def test_less_than_a_block_is_nothing_and_is_said():
    model, task = deep(), tiny.make_task("decoder")
    outcome = prune(model, ShortGPT(sparsity=0.2, samples=8), task)
    assert not outcome.edits
    assert outcome.notes == ["0.2 of 4 blocks is less than one: nothing was taken out"]


def test_what_cannot_be_done_is_refused():
    task = tiny.make_task("decoder")
    with pytest.raises(GraphError, match=r"blocks of Cnn were to be taken out, but it has not one stack of them"):
        ShortGPT().run(tiny.cnn(), tiny.make_task("cnn"))
    with pytest.raises(SettingError, match="in \\[0, 1\\)"):
        ShortGPT(sparsity=1.0).check()
    with pytest.raises(SettingError, match="0 calibration samples"):
        ShortGPT(samples=0).check()
    model = deep()
    with pytest.raises(EvidenceError, match="there are no calibration samples"):
        measured(model, only_stack(model), [])
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(EvidenceError, match=r"model\.layers\.2 was compared .* NaN or infinity"):
        ShortGPT(samples=8).run(model, task)
