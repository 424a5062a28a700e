"""FedTiny (paper 43): adjustments, merges and candidates by hand, costs counted again, bad input; and over Flower."""

import copy
import importlib.util
import logging
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn

import secateur
from secateur.axes import Erk, Random, Uniform
from secateur.cut import weights
from secateur.errors import BudgetError, EvidenceError, ModelError, SettingError, TaskError
from secateur.method import Budget, prune
from secateur.methods.fedtiny import (
    Averaged,
    Device,
    Everything,
    FedTiny,
    GrowFirst,
    Largest,
    Order,
    Pooled,
    PruneFirst,
    Reply,
    Server,
    Untouched,
    answer,
    backward_blocks,
    carried,
    gradients_of,
    largest,
    loss_of,
    masks_of,
    merged,
    proposals,
    state_of,
    statistics_of,
    uses_of,
)
from secateur.tasks import federated, open_task
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Sgd

SMALL = FedTiny(sparsity=0.9, candidates=3, rounds=3, epochs=1, every=1, until=1.0, blocks=3, samples=32)


def bits(*values):
    return torch.tensor(values, dtype=torch.bool)


def divided(clients=4, examples=512, **changes):
    return federated(tiny.toy_images(examples=examples, **changes), clients)


# Gradients on their way


def test_a_device_sends_the_largest_gradients_of_what_is_not_there_by_hand():
    gradient, free = torch.tensor([[9.0, -3.0, 1.0], [2.0, -4.0, 0.5]]), bits(0, 1, 1, 1, 1, 1)
    for piece in (1, 2, 4, 100):  # however much of the layer it sees at a time
        places, values = largest(gradient, free, 2, piece)
        assert places.tolist() == [1, 4]
        assert values.tolist() == [-3.0, -4.0]
    assert largest(gradient, free, 9)[0].tolist() == [1, 2, 3, 4, 5]
    assert len(largest(gradient, bits(0, 0, 0, 0, 0, 0), 2)[0]) == 0


def test_pieces_find_what_a_sort_of_the_whole_finds():
    draw = torch.Generator().manual_seed(0)
    gradient, free = torch.randn(7, 31, generator=draw), torch.rand(7, 31, generator=draw) < 0.8
    want = gradient.abs().masked_fill(~free, -1).reshape(-1).topk(20).indices.sort().values
    assert largest(gradient, free, 20, piece=13)[0].tolist() == want.tolist()


def test_gradients_of_devices_are_merged_by_hand():
    one = (torch.tensor([0, 3], dtype=torch.int32), torch.tensor([1.0, -2.0]))
    two = (torch.tensor([3], dtype=torch.int32), torch.tensor([4.0]))
    # 10 and 30 examples: place 0 is (10 * 1) / 40, place 3 is (10 * -2 + 30 * 4) / 40
    assert merged([one, two], [10, 30], 4).tolist() == [0.25, 0.0, 0.0, 2.5]
    whole = (torch.zeros(0, dtype=torch.int32), torch.tensor([4.0, 0.0, 0.0, 8.0]))
    assert merged([one, whole], [30, 10], 4).tolist() == [1.75, 0.0, 0.0, 0.5]


def test_a_layer_is_adjusted_by_hand():
    size, keep = torch.tensor([5.0, 1.0, 2.0, 0.0, 0.0, 0.0]), bits(1, 1, 1, 0, 0, 0)
    slope = torch.tensor([0.0, 9.0, 0.0, 0.5, -7.0, 3.0])
    # the two steepest that are not there come (4, 5); the two smallest that were there go (1, 2)
    assert GrowFirst().exchanged(size, keep, slope, 2).tolist() == [True, False, False, False, True, True]
    # pruning first, place 1 may come back at once: its gradient is the largest of all
    assert PruneFirst().exchanged(size, keep, slope, 2).tolist() == [True, True, False, False, True, False]


@pytest.mark.parametrize("exchange", [GrowFirst(), PruneFirst()])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_an_adjustment_keeps_as_many_whatever_was_sent(exchange, count):
    draw = torch.Generator().manual_seed(count)
    size, keep = torch.rand(40, generator=draw), torch.rand(40, generator=draw) < 0.3
    for shown in (1.0, 0.1, 0.0):  # of the gradients: with none, nothing may move
        slope = torch.randn(40, generator=draw) * (torch.rand(40, generator=draw) < shown)
        new = exchange.exchanged(size, keep, slope, count)
        assert int(new.sum()) == int(keep.sum())
        if not bool(slope.any()):
            assert torch.equal(new, keep)


# Candidates and their norms


def test_candidates_cost_the_same_and_the_first_has_no_noise():
    sites = weights(tiny.cnn())
    counts = Erk().spread(sites, Budget(0.9))
    found = proposals(sites, counts, 6, 0.5, torch.Generator().manual_seed(0))
    assert found[0] == counts
    assert len({tuple(one.values()) for one in found}) == 6
    for one in found:
        assert sum(one.values()) == sum(counts.values())
        assert all(1 <= one[site.name] <= site.units for site in sites)
    assert proposals(sites, counts, 2, 0.0, torch.Generator()) == [counts, counts]


def test_more_candidates_the_sparser():
    assert [FedTiny(sparsity=s).number for s in (0.0, 0.5, 0.9, 0.98, 0.99)] == [1, 1, 1, 5, 10]


def test_norms_of_devices_are_averaged_and_pooled_by_hand():
    one = {"bn.running_mean": torch.tensor([0.0]), "bn.running_var": torch.tensor([1.0])}
    two = {"bn.running_mean": torch.tensor([4.0]), "bn.running_var": torch.tensor([3.0])}
    plain, exact = (kind.merge([one, two], [1, 3]) for kind in (Averaged(), Pooled()))
    assert plain == {"bn.running_mean": torch.tensor([3.0]), "bn.running_var": torch.tensor([2.5])}
    # E[var + mean^2] = (1 + 3 * (3 + 16)) / 4 = 14.5, less 3^2
    assert exact == {"bn.running_mean": torch.tensor([3.0]), "bn.running_var": torch.tensor([5.5])}


def test_statistics_are_those_of_a_devices_own_inputs():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(2)

        def forward(self, x):
            return self.bn(x)

    inputs = torch.tensor([[0.0, 10.0], [2.0, 10.0], [4.0, 16.0]])
    device = Device(Labelled("three", {"train": (inputs, torch.tensor([0, 1, 1]))}, batch=3))
    model = One()
    found = statistics_of(model, device, 3)
    assert found["bn.running_mean"].tolist() == [2.0, 12.0]
    assert found["bn.running_var"].tolist() == [4.0, 12.0]
    assert set(found) == {"bn.running_mean", "bn.running_var"}  # and not how many batches were seen


def test_the_mask_of_the_least_loss_is_trained():
    model, task = tiny.cnn(), divided()
    server = Server(SMALL, model, task)
    masks = server.candidates()
    before = server.masked(masks[1])
    mean = {"bn.running_mean": torch.full((8,), 3.0)}
    server.choose_([(masks[0], {}, 0.7), (masks[1], mean, 0.5), (masks[2], {}, 0.6)])
    assert all(torch.equal(server.keep[name], masks[1][name]) for name in masks[1])
    assert server.state["bn.running_mean"].tolist() == [3.0] * 8
    assert torch.equal(server.state["conv.weight"], before["conv.weight"])
    assert "mask 2 of 3" in server.notes[0]


def test_a_mask_whose_loss_is_not_finite_is_not_chosen():
    server = Server(SMALL, tiny.cnn(), divided())
    masks, nan = server.candidates(), float("nan")
    server.choose_([(masks[0], {}, nan), (masks[1], {}, 0.5), (masks[2], {}, float("inf"))])
    assert torch.equal(server.keep["conv.weight"], masks[1]["conv.weight"])
    with pytest.raises(EvidenceError, match="none of their losses on the devices is finite"):
        server.choose_([(keep, {}, nan) for keep in masks])


def test_the_choice_is_that_of_losses_under_averaged_norms():
    """Done once more from its parts: the loss that the note tells is the least of the three."""
    model, task = tiny.cnn(), divided()
    notes = SMALL.run(copy.deepcopy(model), task).notes
    server, losses = Server(SMALL, model, task), []
    devices = [Device(client) for client in task.clients]
    for keep in server.candidates():
        found = []
        for device in devices:
            model.load_state_dict(server.masked(keep))
            found.append(statistics_of(model, device, 32))
        model.load_state_dict(server.masked(keep, Averaged().merge(found, [d.held()[0] for d in devices])))
        losses.append(sum(loss_of(model, device, 32) for device in devices) / len(devices))
    place = losses.index(min(losses))
    assert f"mask {place + 1} of 3 was chosen: a loss of {losses[place]:.4f}" in notes[0]


# Rounds


def test_blocks_are_taken_from_the_output_back():
    sites = weights(tiny.cnn())
    names = [[site.name for site in block] for block in backward_blocks(sites, 3)]
    assert [name for block in names[::-1] for name in block] == [site.name for site in sites]
    assert "fc.weight" in names[0]
    assert "conv.weight" in names[2]
    assert [len(block) for block in backward_blocks(sites, 99)] == [1] * len(sites)


def test_how_many_grow_is_the_cosine_and_blocks_take_turns():
    method = replace(SMALL, rounds=20, every=2, until=0.6, blocks=2, grow=0.4, candidates=1)
    server = Server(method, tiny.cnn(), divided())
    server.choose_([(server.candidates()[0], {}, 0.0)])
    back, front = ({site.name for site in block} for block in server.blocks)
    for round_ in range(1, 21):
        counts = server.order(round_).counts
        if round_ % 2 or round_ >= 12:  # at 12 the cosine has come to nothing
            assert not counts, round_
            continue
        assert set(counts) <= (back if round_ % 4 == 2 else front)
        for name, count in counts.items():
            there = int(server.keep[name].sum())
            assert count == int(round(0.2 * (1 + math.cos(math.pi * round_ / 12)) * there, 9))
    assert server.order(2).counts
    assert server.order(4).counts


def test_never_more_than_its_budget_and_grown_weights_start_at_zero():
    method, model, task = replace(SMALL, candidates=1), tiny.cnn(), divided()
    server = Server(method, model, task)
    server.choose_([(server.candidates()[0], {}, 0.0)])
    kept = {name: int(keep.sum()) for name, keep in server.keep.items()}
    device = Device(task.clients[0])
    for round_ in (1, 2):
        order, old = server.order(round_), {n: k.clone() for n, k in server.keep.items()}
        model.load_state_dict(server.state)
        reply = answer(model, device, server.sites, server.keep, order, 1, Largest())
        for name, (places, values) in reply.gradients.items():
            assert len(places) == len(values) == order.counts[name]
            assert not bool(old[name].reshape(-1)[places.long()].any())  # of what is not there
        server.take_(order, [reply])
        assert {name: int(keep.sum()) for name, keep in server.keep.items()} == kept
        moved = 0
        for site in server.sites:
            value, keep = server.state[site.parts[0].name], server.keep[site.name]
            assert not bool(value[~keep].any())
            assert not bool(value[keep & ~old[site.name]].any())
            moved += int((keep & ~old[site.name]).sum())
        assert moved == sum(order.counts.values()) > 0


def test_gradients_are_those_of_the_batch_and_leave_the_model_alone():
    model, task = tiny.cnn().train(), divided()
    device, sites = Device(task.clients[0]), weights(model)[:2]
    before, grads = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    keep = {site.name: torch.zeros(site.shape, dtype=torch.bool) for site in sites}
    found = gradients_of(model, device, sites, keep, {sites[1].name: 5}, 3, Everything())
    assert list(found) == [sites[1].name]
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())  # norms' statistics too
    assert [p.requires_grad for p in model.parameters()] == grads
    assert all(p.grad is None for p in model.parameters())
    batch = next(iter(device.batches("train", epoch=3)))
    device.loss(model, batch).backward()
    torch.testing.assert_close(found[sites[1].name][1], model.get_parameter(sites[1].name).grad.reshape(-1))


def reply_of(server, examples, value, gradients=None):
    state = {n: torch.full_like(v, value) for n, v in server.state.items()}
    return Reply(examples, 1.0, state, gradients or {})


def test_weights_are_averaged_by_examples_and_counts_of_batches_are_not():
    server = Server(replace(SMALL, candidates=1, sparsity=0.0), tiny.cnn(), divided())
    server.choose_([(server.candidates()[0], {}, 0.0)])
    server.take_(Order(1, 1.0, {}), [reply_of(server, 10, 1.0), reply_of(server, 30, 5.0)])
    assert set(server.state["conv.weight"].reshape(-1).tolist()) == {4.0}
    assert server.state["bn.running_var"].tolist() == [4.0] * 8
    assert server.state["bn.num_batches_tracked"].dtype == torch.int64
    assert int(server.state["bn.num_batches_tracked"]) == 1  # the first one's


def test_devices_that_drop_out_are_left_out():
    server = Server(replace(SMALL, candidates=1), tiny.cnn(), divided())
    server.choose_([(server.candidates()[0], {}, 0.0)])
    keep, state = {n: k.clone() for n, k in server.keep.items()}, dict(server.state)
    order = server.order(1)
    server.take_(order, [])  # nobody
    assert all(torch.equal(v, state[n]) for n, v in server.state.items())
    assert "no device answered in round 1" in server.notes
    name = next(iter(order.counts))
    place = (~keep[name]).reshape(-1).nonzero()[:1, 0]
    sent = {name: (place.int(), torch.tensor([2.0]))}
    server.take_(order, [reply_of(server, 10, 1.0), reply_of(server, 10, 1.0, sent)])
    assert bool(server.keep[name].reshape(-1)[place])  # the one answer there is
    others = [n for n in keep if n != name]
    assert all(torch.equal(server.keep[n], keep[n]) for n in others)  # no answer, no adjustment


def test_what_was_ever_there_is_counted_by_hand():
    server = Server(replace(SMALL, candidates=1), tiny.cnn(), divided())
    server.choose_([(server.candidates()[0], {}, 0.0)])
    order, (name, *_) = server.order(1), server.order(1).counts
    place = (~server.keep[name]).reshape(-1).nonzero()[:1, 0].int()
    whole, there = (sum(x) for x in zip(*((k.numel(), int(k.sum())) for k in server.keep.values()), strict=True))
    for round_ in (1, 2):  # one comes; then none is told of that is not there
        sent = {name: (place, torch.tensor([2.0]))}
        server.take_(replace(order, round=round_), [reply_of(server, 10, 1.0, sent)])
        assert server.explored[-1] == (round_, pytest.approx((there + 1) / whole))
    assert server.outcome().history.curves["explored"] == server.explored
    server.take_(Order(3, 1.0, {}), [reply_of(server, 10, 1.0)])
    assert len(server.explored) == 2  # nothing was adjusted


def test_a_round_of_some_devices_is_another_each_time_and_the_same_again():
    server = Server(replace(SMALL, share=0.5), tiny.cnn(), divided())
    drawn = [server.sampled(10, r) for r in range(1, 6)]
    assert all(len(set(one)) == 5 and one == sorted(one) for one in drawn)
    assert len({tuple(one) for one in drawn}) > 1
    assert drawn == [server.sampled(10, r) for r in range(1, 6)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statistics": Pooled(), "share": 0.5},
        {"statistics": Untouched(), "pretrain": 2},
        {"blocks": 1, "sends": Everything(), "exchange": PruneFirst()},
    ],
)
def test_the_whole_meets_its_budget(changes):
    task = divided(clients=3, examples=400)
    done = prune(tiny.cnn(), replace(SMALL, rounds=2, **changes), task)
    prunable = sum(site.units for site in weights(tiny.cnn()))
    assert done.ledger.removed == int(0.9 * prunable + 1e-9)
    assert len(done.history.curves["loss"]) == 2
    assert all(math.isfinite(v) for _, v in done.history.curves["loss"])


def test_devices_learn_together_and_a_mask_that_moves_learns_more():
    """The claim at toy size: the same rounds from the same weights."""
    task = divided(clients=4, examples=1024)
    common = FedTiny(sparsity=0.9, candidates=1, rounds=8, epochs=1, every=1, until=0.75, blocks=2, grow=0.5)
    start = tiny.cnn()
    moving, fixed = (
        task.measure(replace(common, grow=grow).run(copy.deepcopy(start), task).model, "test")["loss"]
        for grow in (0.5, 0.0)
    )
    assert moving < fixed - 0.05
    assert fixed < task.measure(start, "test")["loss"] - 0.1


# Costs


def test_what_is_carried_by_hand():
    state = {"a": torch.zeros(2, 5), "b": torch.zeros(3), "n": torch.tensor(4)}
    masks = {"a": torch.tensor([[1, 0, 0, 0, 1], [0, 0, 1, 0, 0]], dtype=torch.bool)}
    # b is 12 bytes and n 8; of a three values of 4 bytes, and to a device three places of 4
    assert carried(state, masks) == (44, 32)
    assert Largest().bytes(7, 1000) == 56
    assert Everything().bytes(7, 1000) == 4000


def test_masks_that_keep_all_are_not_sent():
    model = tiny.cnn()
    sites = weights(model)
    keep = {site.name: torch.ones(site.shape, dtype=torch.bool) for site in sites}
    keep[sites[0].name].reshape(-1)[0] = False
    assert list(masks_of(model.state_dict(), sites, keep)) == [sites[0].name]


def test_uses_are_positions():
    model, task = tiny.cnn(), tiny.toy_images()
    found = uses_of(model, weights(model), task.example)
    assert found["conv.weight"] == 64  # 8x8
    assert found["down.weight"] == 16  # 4x4
    assert found["fc.weight"] == 1


def test_a_devices_ledger_is_counted_again():
    task = divided(clients=2, examples=400)
    method = replace(SMALL, candidates=1, rounds=1, until=1.0, every=1, epochs=2, grow=0.5, blocks=1)
    method = replace(method, rounds=2)  # so that round 1 adjusts
    server = Server(method, tiny.cnn(), task)
    server.choose_([(server.candidates()[0], {}, 0.0)])
    order = server.order(1)
    grown = sum(order.counts.values())
    server.take_(order, [reply_of(server, 70, 1.0), reply_of(server, 50, 1.0)])
    cost = server.costs[-1][1]
    kept = sum(int(k.sum()) for k in server.keep.values())
    whole = sum(site.units for site in server.sites)
    rest = sum(v.nbytes for v in server.state.values()) - 4 * whole
    places = kept - 64  # ERK leaves the classifier whole, whose places need not be told
    assert bool(server.keep["fc.weight"].all())
    assert cost.down == 4 * kept + 4 * places + rest
    assert cost.up == 4 * kept + rest + 8 * grown
    assert cost.memory == cost.down + 8 * grown
    forward = sum(2 * int(server.keep[n].sum()) * u for n, u in server.uses.items())
    dense = sum(2 * s.units * server.uses[s.name] for s in server.sites if s.name in order.counts)
    assert cost.flops == 3 * forward * 70 * 2 + (3 * forward + dense) * 32


def test_a_device_holds_far_less_than_with_whole_gradients():
    method = replace(SMALL, sparsity=0.95, candidates=1, rounds=1, until=1.0)
    method, task = replace(method, rounds=2), divided(clients=2, examples=300)
    ours, theirs = (
        max(v for _, v in replace(method, sends=s).run(tiny.cnn(), task).history.curves["device memory"])
        for s in (Largest(), Everything())
    )
    assert theirs > 2 * ours


# Bad input


def test_a_model_without_batch_norms_is_told_what_to_do():
    task = federated(tiny.toy_vectors(), 3)
    with pytest.raises(ModelError, match=r"MLP|Sequential has no batch norm that keeps any(.|\n)*statistics=untouched"):
        SMALL.run(tiny.mlp(), task)
    for changes in ({"statistics": Untouched()}, {"candidates": 1}):
        assert replace(SMALL, rounds=1, **changes).run(tiny.mlp(), task).edits


def test_fewer_weights_than_layers_is_refused():
    with pytest.raises(BudgetError, match="weights were to be left in 7 layers"):
        replace(SMALL, sparsity=0.9995).run(tiny.cnn(), divided())


def test_a_device_of_one_example_is_refused_and_a_batch_of_one_is_skipped():
    task = divided()
    x, y = task.clients[0].splits["train"]
    lonely = replace(task.clients[0], name="lonely", splits={"train": (x[:1], y[:1])})
    with pytest.raises(TaskError, match=r"lonely was to train(.|\n)*federated\(task, least=2\)"):
        SMALL.run(tiny.cnn(), replace(task, clients=(lonely,)))
    odd = Device(replace(lonely, splits={"train": (x[:33], y[:33])}, batch=32))
    assert odd.held() == (32, 1)


@pytest.mark.parametrize("concentration", [0.0, -1.0, float("nan")])
def test_a_concentration_that_is_none_is_refused(concentration):
    with pytest.raises(TaskError, match="a concentration is above 0"):
        federated(tiny.toy_images(), 3, concentration=concentration)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sparsity": 1.0}, "fraction removed"),
        ({"rounds": 0}, "rounds 0 was asked for"),
        ({"epochs": 0}, "epochs 0"),
        ({"blocks": 0}, "blocks 0"),
        ({"candidates": 0}, "0 candidates were asked for"),
        ({"noise": 1.0}, "noise 1 was asked for"),
        ({"grow": -0.1}, "grow -0.1"),
        ({"share": 0.0}, "share of 0 of the devices"),
        ({"every": 0}, "an update every 0 steps"),
        ({"until": 1.5}, "training lasts from 0 to 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, told):
    with pytest.raises(SettingError, match=told):
        replace(SMALL, **changes).check()


def test_an_allocation_that_needs_scores_is_refused():
    from secateur.axes import Global

    with pytest.raises(SettingError, match="looks at scores"):
        replace(SMALL, allocation=Global()).check()


def test_a_gradient_that_is_not_finite_is_named():
    model, task = tiny.cnn(), divided()
    device, sites = Device(task.clients[0]), weights(model)
    keep = {site.name: torch.zeros(site.shape, dtype=torch.bool) for site in sites}
    with torch.no_grad():
        model.fc.weight.fill_(float("inf"))
    with pytest.raises(EvidenceError, match="conv.weight were to grow by the gradients of toy-images, client 0"):
        gradients_of(model, device, sites, keep, {"conv.weight": 2}, 0, Largest())


def test_a_task_that_is_not_divided_is_one_device_and_says_so():
    done = replace(SMALL, rounds=1, candidates=1, allocation=Uniform(), criterion=Random(1)).run(
        tiny.cnn(), tiny.toy_images(examples=300)
    )
    assert "toy-images is not divided among devices: one held all the data" in done.notes


def test_a_task_by_name_is_divided_where_clients_are_asked_for():
    pytest.importorskip("sklearn", reason="the digits are scikit-learn's")
    task = open_task("digits", clients="3", concentration="0.7", learning_rate="0.02")
    assert len(task.clients) == 3
    assert {client.learner.rate for client in task.clients} == {0.02}
    assert sum(len(client.splits["train"][1]) for client in task.clients) == 1197
    assert not open_task("digits").clients
    with pytest.raises(SettingError, match="clients 'many' of task 'digits' was given(.|\n)*not a number"):
        open_task("digits", clients="many")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"clients": "2.5"}, "clients 2.5 of task 'digits' was given, but it is not a whole number above 0"),
        ({"clients": "0"}, "clients 0 of"),
        ({"clients": "none"}, "clients None of"),
        ({"clients": "true"}, "clients True of"),
        ({"clients": "3", "concentration": "none"}, "concentration None of task 'digits' was given, but it is not a"),
        ({"clients": "3", "concentration": "nan"}, "concentration nan of"),
        ({"concentration": "-1"}, "concentration -1 of"),
    ],
)
def test_shares_that_cannot_be_are_refused_before_data_is_read(given, told, monkeypatch):
    monkeypatch.setitem(secateur.tasks.LABELLED, "digits", lambda **_: pytest.fail("data was read"))
    with pytest.raises(SettingError, match=told):
        open_task("digits", **given)


def test_the_core_does_without_flower():
    package = Path(secateur.__file__).parent
    taken = re.compile(r"^\s*(import|from) flwr\b", re.MULTILINE)
    found = [p.name for p in package.rglob("*.py") if taken.search(p.read_text(encoding="utf-8"))]
    assert found == ["flower.py"]


# Over Flower

over_flower = pytest.mark.skipif(
    importlib.util.find_spec("flwr") is None, reason="Flower is not installed: pip install 'secateur[flower]'"
)


def app_of(method, task, fail=()):
    """The app of devices, some of which fail at some types of message."""
    from secateur.integrations.flower import client_app

    logging.getLogger("flwr").setLevel(logging.ERROR)

    def task_of(context):
        place = int(context.node_config["partition-id"])
        if place in fail:
            raise RuntimeError("out of battery")
        return task.clients[place]

    return client_app(method, tiny.cnn, task_of)


@over_flower
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"statistics": Untouched(), "share": 0.5},
        {"candidates": 1, "blocks": 1, "sends": Everything(), "exchange": PruneFirst()},
        {"sparsity": 0.0, "candidates": 1},
    ],
)
def test_over_flower_it_is_the_same_to_the_bit(changes):
    from secateur.integrations.flower import LocalGrid, federate

    task, method = divided(clients=3, examples=400), replace(SMALL, rounds=2, **changes)
    here = method.run(tiny.cnn(), task)
    there = federate(method, tiny.cnn(), task, LocalGrid(app_of(method, task), 3))
    mine, theirs = here.model.state_dict(), there.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())
    assert here.notes == there.notes
    assert here.history.curves == there.history.curves


@over_flower
def test_messages_are_as_large_as_the_ledger_says():
    from secateur.integrations.flower import LocalGrid, federate

    task, method = divided(clients=2, examples=300), replace(SMALL, rounds=2, candidates=1, grow=0.5)
    seen = []

    class Watched(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            sent = list(messages)
            replies = super().send_and_receive(sent, timeout=timeout)
            for message, reply in zip(sent, replies, strict=True):
                seen.append((message.metadata.message_type, size(message), size(reply)))
            return replies

    def size(message):
        return sum(a.numpy().nbytes for record in message.content.array_records.values() for a in record.values())

    done = federate(method, tiny.cnn(), task, Watched(app_of(method, task), 2))
    down, up = done.history.curves["bytes down"], done.history.curves["bytes up"]
    assert [kind for kind, _, _ in seen] == ["train.adjust"] * 2 + ["train"] * 2
    assert [d for _, d, _ in seen] == [v for _, v in down for _ in range(2)]
    assert [u for _, _, u in seen] == [v for _, v in up for _ in range(2)]


@over_flower
def test_a_device_that_fails_is_left_out_and_named():
    from secateur.integrations.flower import LocalGrid, federate

    task, method = divided(clients=3, examples=400), replace(SMALL, rounds=2)
    done = federate(method, tiny.cnn(), task, LocalGrid(app_of(method, task, fail={1}), 3))
    assert any("device 2 failed (train, round 1): RuntimeError: out of battery" in note for note in done.notes)
    without = replace(task, clients=(task.clients[0], task.clients[2]))
    want = method.run(tiny.cnn(), without).model.state_dict()
    assert all(torch.equal(value, want[name]) for name, value in done.model.state_dict().items())
    with pytest.raises(EvidenceError, match="no device gave its loss for each of them"):
        federate(method, tiny.cnn(), task, LocalGrid(app_of(method, task, fail={0, 1, 2}), 3))
    with pytest.raises(EvidenceError, match="over 5 devices or more(.|\n)*3 were there after 0 seconds"):
        federate(method, tiny.cnn(), task, LocalGrid(app_of(method, task), 3), least=5, timeout=0)


@over_flower
def test_a_device_that_did_not_see_a_mask_does_not_judge_it_and_keeps_none():
    from secateur.integrations.flower import LocalGrid, federate

    task, method = divided(clients=3, examples=400), replace(SMALL, rounds=1)
    asked = []

    class Lossy(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            sent = list(messages)
            kinds = [message.metadata.message_type for message in sent]
            if kinds[:1] == ["query.bn_stats"] and asked.count("query.bn_stats") == 3:  # of the second mask
                sent = sent[:-1]  # the last device does not get it
            asked.extend(kinds)
            return super().send_and_receive(sent, timeout=timeout)

    grid = Lossy(app_of(method, task), 3)
    federate(method, tiny.cnn(), task, grid)
    assert asked.count("query.bn_stats") == 9
    assert asked.count("query.bn_loss") == 8
    assert not any(context.state.array_records for context in grid.contexts.values())


@over_flower
def test_the_apps_of_server_and_devices_run_whole():
    from flwr.app import Context, RecordDict

    from secateur.integrations.flower import LocalGrid, server_app

    task, method, ends = divided(clients=2, examples=300), replace(SMALL, rounds=1), []
    app = server_app(method, tiny.cnn, task, ends.append)
    app(LocalGrid(app_of(method, task), 2), Context(1, 1, {}, RecordDict(), {}))
    assert len(ends) == 1
    assert sum(int(e.keep.sum()) for e in ends[0].edits) == sum(site.units for site in weights(tiny.cnn())) - int(
        0.9 * sum(site.units for site in weights(tiny.cnn())) + 1e-9
    )


@over_flower
def test_a_state_packed_and_unpacked_is_the_same():
    from secateur.integrations.flower import keep_of, packed, unpacked

    model = tiny.cnn()
    sites = weights(model)
    keep = {site.name: torch.rand(site.shape, generator=torch.Generator().manual_seed(1)) < 0.2 for site in sites}
    keep[sites[0].name][:] = True
    server = Server(replace(SMALL, candidates=1), model, divided())
    state, masks = server.masked(keep), masks_of(state_of(model), sites, keep)
    again, found = unpacked(packed(state, masks), model.state_dict())
    assert all(torch.equal(value, again[name]) for name, value in state.items())
    assert all(torch.equal(mask, found[name]) for name, mask in masks.items())
    assert all(torch.equal(mask, keep[name]) for name, mask in keep_of(found, sites).items())
    back, _ = unpacked(packed(state, masks, places=False), model.state_dict(), masks)
    assert all(torch.equal(value, back[name]) for name, value in state.items())


def test_the_loss_falls_over_rounds_with_the_learner_of_the_task():
    task = divided(clients=2, examples=400)
    fast = replace(task, clients=tuple(replace(c, learner=Sgd(0.1)) for c in task.clients))
    curve = [
        v for _, v in replace(SMALL, candidates=1, sparsity=0.5, rounds=4).run(tiny.cnn(), fast).history.curves["loss"]
    ]
    assert curve[-1] < curve[0]
