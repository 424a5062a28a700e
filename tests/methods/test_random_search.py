"""Random search: what is drawn, what wins, that masked and shrunk agree, and what is refused."""

import copy
import math

import pytest
import torch
from tiny import make_model, make_task, seeded, trained
from torch import nn

from secateur import prune
from secateur.edit import Mask, Remove, apply_
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.graph import couple
from secateur.methods.random_search import (
    AnyNodes,
    EarlyLoss,
    EvenNodes,
    RandomSearch,
    StartingError,
    StartingLoss,
    search,
    sub_network,
)
from secateur.recipe import method_of, text_of_method
from secateur.task import Batch, generator

SHORT = {"sparsity": 0.5, "trials": 12, "samples": 64, "steps": 0}


def stir(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(done) -> dict[str, list[bool]]:
    return {e.site.name: e.keep.tolist() for e in done.edits if isinstance(e, Remove)}


def test_the_winner_is_the_first_of_the_lowest() -> None:
    costs = [3.0, 1.5, math.nan, 1.5, 2.0]
    found = search(5, costs.__getitem__)
    assert found.best == 1
    assert found.costs[:2] == (3.0, 1.5)
    assert search(1, lambda t: math.nan).best == 0


def test_draws_keep_what_they_should_and_depend_on_the_seed_and_the_trial_alone() -> None:
    sizes = {"a": 10, "b": 7, "c": 2}
    even = EvenNodes().choice(sizes, 0.8, stir())
    assert {name: int(k.sum()) for name, k in even.items()} == {"a": 2, "b": 1, "c": 1}
    assert all(int(k.sum()) == sizes[n] for n, k in EvenNodes().choice(sizes, 0.0, stir()).items())
    for seed in range(20):
        free = AnyNodes().choice(sizes, 0.5, stir(seed))
        assert sum(int(k.sum()) for k in free.values()) == 10  # round(9.5), to even
        assert all(bool(k.any()) for k in free.values())
    with pytest.raises(BudgetError, match=r"3 of 1002 nodes[\s\S]*5 draws in a row emptied one[\s\S]*even-nodes"):
        AnyNodes(tries=5).choice({"a": 1000, "b": 1, "c": 1}, 0.999, stir())
    task = make_task("mlp")
    one, again = (EvenNodes().choice(sizes, 0.5, generator(task, "random search 7")) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in sizes)
    other = EvenNodes().choice(sizes, 0.5, generator(task, "random search 8"))
    assert any(not torch.equal(one[name], other[name]) for name in sizes)


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_masked_and_shrunk_agree(family: str) -> None:
    model, task = make_model(family), make_task(family)
    sites = couple(model, task.example).need("channel")
    keep = EvenNodes().choice({s.name: s.units for s in sites}, 0.6, stir())
    small, masked = copy.deepcopy(model), copy.deepcopy(model)
    sub_network(small, sites, keep)
    apply_(masked, [Mask(site, keep[site.name]) for site in sites])
    batch = task.example
    torch.testing.assert_close(batch.through(small), batch.through(masked), rtol=0, atol=1e-6)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in masked.parameters())


def test_the_winner_starts_with_the_loss_it_won_by_and_the_parents_values() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    done = prune(model, RandomSearch(**SHORT), task)
    batches = list(task.batches("train", 64))
    losses = []
    sites = couple(model, task.example).need("channel")
    for trial in range(12):
        small = copy.deepcopy(model)
        keep = EvenNodes().choice({s.name: s.units for s in sites}, 0.5, generator(task, f"random search {trial}"))
        sub_network(small, sites, keep)
        losses.append(StartingLoss().cost(small, task, batches))
    assert StartingLoss().cost(copy.deepcopy(done.model), task, batches) == pytest.approx(min(losses))
    assert f"trial {losses.index(min(losses))} won: {min(losses):.4g}" in done.notes[1]
    assert "768 forward passes" in done.notes[0]
    first = next(e for e in done.edits if isinstance(e, Remove))
    rows = first.keep.nonzero().squeeze(1)
    assert torch.equal(done.model[0].weight, model[0].weight[rows])
    assert done.ledger.sparsity == 0.5
    assert "32 of 64 nodes stay" in done.notes[2]  # and a quarter of the weights between them
    assert done.model[2].weight.numel() == model[2].weight.numel() // 4


def test_one_trial_is_a_plain_random_mask_and_more_trials_start_lower() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    batches = list(task.batches("train", 64))
    starts = []
    for trials in (1, 4, 12):
        done = prune(model, RandomSearch(**{**SHORT, "trials": trials}), task)
        starts.append(StartingLoss().cost(done.model, task, batches))
    assert starts[2] <= starts[1] <= starts[0]
    assert starts[2] < starts[0]


def test_every_judge_and_draw_is_minimised() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    batches = list(task.batches("train", 64))
    for judge in (StartingError(), EarlyLoss(3)):
        one, best = (prune(model, RandomSearch(**{**SHORT, "trials": t}, judge=judge), task).model for t in (1, 12))
        assert judge.cost(copy.deepcopy(best), task, batches) <= judge.cost(copy.deepcopy(one), task, batches)
    free = prune(model, RandomSearch(**SHORT, draw=AnyNodes()), task)
    assert sum(sum(k) for k in kept(free).values()) == 32
    with pytest.raises(SettingError, match="no label each"):
        StartingError().cost(model, task, [Batch(task.example.inputs)])


def test_errors_are_counted_by_hand() -> None:
    model = nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    batch = Batch((torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [0.0, 3.0]]),), torch.tensor([0, 0, 0, 1]))
    assert StartingError().cost(model, make_task("mlp"), [batch]) == 0.25


def test_rescaling_keeps_the_size_of_sums() -> None:
    """A thousand nodes of value one, of which a tenth stay: their sum comes to 100, and rescaled to 1000."""
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 1000), nn.ReLU(), nn.Linear(1000, 1, bias=False)), 0)
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(1)
        model[2].weight.fill_(1)
    x = Batch((torch.ones(2, 4),))
    sites = couple(model, x).need("channel")
    keep = EvenNodes().choice({s.name: s.units for s in sites}, 0.9, stir())
    for rescale, wanted in ((False, 100.0), (True, 1000.0)):
        small = copy.deepcopy(model)
        edits = sub_network(small, sites, keep, rescale)
        assert x.through(small).flatten().tolist() == pytest.approx([wanted, wanted], rel=1e-5)
        again = copy.deepcopy(model)
        apply_(again, edits)
        assert x.through(again).flatten().tolist() == pytest.approx([wanted, wanted], rel=1e-5)


class Beside(nn.Module):
    """Two layers side by side, 8 and 4 wide, that one matrix reads, with the input beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other, self.out = nn.Linear(3, 8), nn.Linear(3, 4), nn.Linear(15, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.cat([self.one(x).relu(), x, self.other(x).relu()], 1))  # type: ignore[no-any-return]


def test_rescaling_leaves_what_reads_other_layers_alone() -> None:
    """A matrix that reads two layers and the input: each layer's columns get that layer's factor, the others none."""
    model = seeded(Beside, 0)
    dense = model.out.weight.detach().clone()
    sites = couple(model, Batch((torch.ones(2, 3),))).need("channel")
    keep = {site.name: torch.arange(site.units) < (2 if site.units == 8 else 3) for site in sites}
    sub_network(model, sites, keep, rescale=True)
    wanted = torch.cat([4 * dense[:, :2], dense[:, 8:11], 4 / 3 * dense[:, 11:14]], 1)
    torch.testing.assert_close(model.out.weight.detach(), wanted)


def test_the_winner_learns_and_its_curve_is_kept() -> None:
    done = prune(make_model("mlp"), RandomSearch(**{**SHORT, "steps": 60}), make_task("mlp"), measure="test")
    curve = [value for _, value in done.record.curves["training loss"]]
    assert len(curve) == 60
    assert sum(curve[-10:]) < sum(curve[:10])
    assert done.record.measured("after")["accuracy"] > done.record.measured("before")["accuracy"] + 0.2


def test_a_search_does_no_better_than_chance_on_a_toy() -> None:
    """The paper's finding at toy size: over six seeds, accuracy after training is within three points of one draw's."""
    gaps = []
    for seed in range(6):
        model, task = make_model("mlp", seed), make_task("mlp", seed)
        found = [
            prune(model, RandomSearch(sparsity=0.75, trials=t, samples=64, steps=150), task, measure="test")
            for t in (1, 10)
        ]
        one, best = (done.record.measured("after")["accuracy"] for done in found)
        gaps.append(best - one)
    assert abs(sum(gaps) / len(gaps)) < 0.03


def test_settings_as_people_write_them() -> None:
    method = method_of("random_search(draw=any-nodes, judge='early-loss(steps=3)', trials=5)")
    assert method == RandomSearch(draw=AnyNodes(), judge=EarlyLoss(3), trials=5)
    assert method_of(text_of_method(method)) == method


def test_what_cannot_be_searched_is_refused() -> None:
    task = make_task("mlp")
    with pytest.raises(SettingError, match="sparsity 1 was asked for"):
        prune(trained("mlp"), RandomSearch(sparsity=1), task)
    with pytest.raises(SettingError, match="trials=0 was asked for"):
        prune(trained("mlp"), RandomSearch(trials=0), task)
    with pytest.raises(GraphError, match="none can be taken out"):
        prune(nn.Linear(16, 4), RandomSearch(**SHORT), task)  # no hidden layer
