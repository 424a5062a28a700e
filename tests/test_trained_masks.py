"""Masks that follow trained scores: exchanges by hand, slopes, exact counts, frozen weights, runs taken up again."""

import copy
import itertools

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.rules import LearningRate, sparsity_of
from secateur.axes.trained_masks import AtOnce, Direct, Implicit, Overall, Plain, Size, Swaps, TrainedMask, swapped
from secateur.cut import weights
from secateur.errors import EvidenceError, SettingError, SiteError
from secateur.site import Part, Site, tensors
from secateur.task import Batch
from secateur.tasks.learners import Sgd
from secateur.train import Loop, Snapshot, attach, fit


def line(*values):
    model = nn.Linear(len(values), 1, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([values]))
    return model


def mask(*bits):
    return torch.tensor([bits], dtype=torch.bool)


def searching(model, transition=None, seed=0, kept=0.3, **parts):
    """A rule over every matrix of a model: random first masks, scores of 1 and 0.99."""
    sites, draw = weights(model), torch.Generator().manual_seed(seed)
    keep = {s.name: torch.rand(s.shape, generator=draw) < kept for s in sites}
    scores = {s.name: {s.parts[0].key: 1 - 0.01 * (~keep[s.name]).float()} for s in sites}
    return TrainedMask(sites, scores, keep, transition=transition, **parts)


def learner(rule, rate=0.5, **settings):
    return torch.optim.SGD(rule.parameters(), rate, momentum=0.9, **settings)


# Exchanges


def test_the_best_that_are_out_take_the_places_of_the_worst_that_are_in():
    rank = torch.tensor([[5.0, 1.0, 2.0, 9.0, 3.0, 4.0]])
    there = mask(1, 1, 1, 0, 0, 0)
    assert swapped(rank, there, 1.0).tolist() == [[True, False, False, True, False, True]]
    # of two swaps, one: the best for the worst
    assert swapped(rank, there, 0.5).tolist() == [[True, False, True, True, False, False]]
    assert swapped(rank, there, 0.01).sum() == 3  # never less than one, where there is one to make
    assert swapped(rank, there, 0.01).tolist() == swapped(rank, there, 0.5).tolist()
    assert swapped(rank, there, 0.0).tolist() == there.tolist()


def test_ties_move_nothing_and_stop_nothing():
    rank = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    assert swapped(rank, mask(0, 1, 0, 1, 0, 0), 1.0).tolist() == [[False, True, False, True, False, False]]
    # one is clearly better: the tie among the others, where a threshold finds more out than in, does not block it
    rank = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 2.0]])
    found = swapped(rank, mask(1, 1, 0, 0, 0, 0), 1.0)
    assert found.tolist() == [[False, True, False, False, False, True]]
    assert swapped(rank, found, 1.0).tolist() == found.tolist()


def test_the_share_of_swaps_falls_to_its_least():
    swaps = Swaps(power=4.0, least=0.05)
    assert [swaps.share(p) for p in (0.0, 0.5, 1.0)] == [1.0, 0.0625, 0.05]
    assert [Swaps(power=0).share(p) for p in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]
    for wrong in ({"power": -1.0}, {"least": 1.5}, {"least": -0.1}):
        with pytest.raises(SettingError, match="a share is in"):
            Swaps(**wrong)


def test_one_ranking_of_all_moves_weights_between_sites_and_others_do_not():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    sites = weights(model)
    keep = {"0.weight": torch.tensor([[True, True], [False, False]]), "1.weight": torch.tensor([[True, False]] * 2)}
    ranks = {"0.weight": torch.tensor([[1.0, 2.0], [0.0, 0.0]]), "1.weight": torch.tensor([[5.0, 6.0], [7.0, 8.0]])}
    together = Overall().step(sites, ranks, keep, 0.0)
    assert [int(k.sum()) for k in together.values()] == [0, 4]
    held = Overall(floor=0.125).step(sites, ranks, keep, 0.0)  # of 8 weights, one each
    assert [k.tolist() for k in held.values()] == [[[False, True], [False, False]], [[False, True], [True, True]]]
    with pytest.raises(SettingError, match="a floor of 1"):
        Overall(floor=1.0)
    apart = AtOnce().step(sites, ranks, keep, 0.0)
    assert [k.tolist() for k in apart.values()] == [[[True, True], [False, False]], [[False, False], [True, True]]]


# Slopes and ranks


def test_the_direct_slope_is_the_gradient_of_a_mask_of_real_numbers():
    weight, bits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)), torch.eye(3, 4)
    real = bits.clone().requires_grad_(True)
    seen = (real * weight).detach().requires_grad_(True)
    loss = lambda z: (z.sin() * z).sum()  # noqa: E731
    loss(real * weight).backward()
    loss(seen).backward()
    torch.testing.assert_close(Direct().of(weight, bits, seen.grad), real.grad)


def test_the_implicit_slope_worked_by_hand():
    weight, share, gradient = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 0.0]), torch.tensor([3.0, 3.0])
    # (2 - 0.1 * 1 * 3) * 3 and (2 - 0.1 * 0 * 3) * 3
    assert Implicit(0.1).of(weight, share, gradient).tolist() == pytest.approx([5.1, 6.0])
    assert Implicit(0.0).of(weight, share, gradient).tolist() == Direct().of(weight, share, gradient).tolist()
    for wrong in (-1e-4, float("inf"), float("nan")):
        with pytest.raises(SettingError, match="a gamma above 0"):
            Implicit(wrong)


def test_ranks_of_single_weights_and_of_units_that_own_many():
    single = Site("w", "weight", (1, 3), (Part("w", (1, 3)),))
    scores = {"w": torch.tensor([[3.0, -4.0, 1e-30]])}
    assert Plain().ranks(single, scores)[0].tolist() == pytest.approx([3.0, -4.0, 1e-30])
    assert Size().ranks(single, scores)[0].tolist() == pytest.approx([3.0, 4.0, 1e-30])
    assert float(Size().ranks(single, scores)[0, 2]) > 0  # the root of a square in single precision would be none
    rows = Site("w", "block", (2,), (Part("w", (2, 2), torch.tensor([[0], [1]])),))
    scores = {"w": torch.tensor([[3.0, -4.0], [0.0, 1.0]])}
    assert Size().ranks(rows, scores).tolist() == [5.0, 1.0]
    assert Size().back(scores["w"], torch.ones(2, 2)).tolist() == [[1.0, -1.0], [0.0, 1.0]]


class Pull:
    """The loss sum(w * slope): its gradient is the slope, whatever the weights are."""

    seed, name = 0, "pull"

    def __init__(self, *slope):
        self.slope = torch.tensor([slope])

    def batches(self, split, n=None, epoch=0):
        return [Batch((self.slope,))]

    def loss(self, model, batch):
        return batch.through(model).sum()


def test_a_search_worked_by_hand():
    """Scores learn w * dL/dz at masked places too, and weights do not move."""
    model = line(2.0, 1.0, -3.0)
    scores = {"weight": {"weight": torch.tensor([[1.0, 1.0, 0.99]])}}
    rule = TrainedMask(weights(model), scores, {"weight": mask(1, 1, 0)}, transition=AtOnce())
    seen = []
    fit(
        model,
        Pull(0.1, -0.2, 0.5),
        1,
        [rule],
        torch.optim.SGD(rule.parameters(), 0.1),
        watch=lambda _: seen.append(model.weight.tolist()),
    )
    # 1 - 0.1 * 2 * 0.1, 1 + 0.1 * 1 * 0.2, 0.99 + 0.1 * 3 * 0.5
    assert rule.parameters()[0][0].tolist() == pytest.approx([0.98, 1.02, 1.14])
    assert seen == [[[0.0, 1.0, -3.0]]]
    assert rule.keep["weight"].tolist() == [[False, True, True]]


def test_scores_are_copies_of_what_they_were_taken_from():
    model = tiny.mlp()
    sites = weights(model)
    scores = {s.name: {s.parts[0].key: tensors(model)[s.name]} for s in sites}
    rule = TrainedMask(sites, scores, {s.name: torch.ones(s.shape) > 0 for s in sites}, read=Size())
    for site, score in zip(sites, rule.parameters(), strict=True):
        assert score.data_ptr() != tensors(model)[site.name].data_ptr()
        assert torch.equal(score, tensors(model)[site.name])


# The rule


@pytest.mark.parametrize("family", ["mlp", "cnn", "rnn", "decoder", "moe", "vision transformer"])
@pytest.mark.parametrize("transition", [Swaps(), Overall()], ids=["swaps", "overall"])
def test_as_many_stay_at_every_step_and_no_weight_is_changed(family, transition):
    model, task = tiny.make_model(family), tiny.make_task(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    rule = searching(model, transition)
    sites, counts, first = weights(model), {n: int(k.sum()) for n, k in rule.keep.items()}, dict(rule.keep)

    def look(loop):
        assert sum(int(k.sum()) for k in rule.keep.values()) == sum(counts.values())
        assert loop.history.curves["sparsity"][-1] == (loop.step, sparsity_of(rule.keep))
        for site in sites:
            if isinstance(transition, Swaps):
                assert int(rule.keep[site.name].sum()) == counts[site.name]
            part = site.parts[0]
            seen, dense = part.read(loop.tensors), part.read(before)
            assert torch.equal(seen, dense.masked_fill(~rule.keep[site.name], 0))

    fit(model, task, 5, [LearningRate(), rule], learner(rule, rate=5.0), watch=look)
    assert any(not torch.equal(first[n], k) for n, k in rule.keep.items())
    pruned = {part.name for site in sites for part in site.parts}
    for name, value in model.named_parameters():
        assert value.grad is None
        assert name in pruned or torch.equal(value, before[name]), name


def test_batch_norms_keep_their_scale_and_move_their_statistics():
    model = tiny.cnn()
    scale, mean = model.bn.weight.clone(), model.bn.running_mean.clone()
    rule = searching(model)
    fit(model, tiny.toy_images(), 3, [rule], learner(rule))
    assert torch.equal(model.bn.weight, scale)
    assert not torch.equal(model.bn.running_mean, mean)


def test_an_optimizer_that_would_move_weights_or_lacks_the_scores_is_refused():
    model = tiny.mlp()
    rule = searching(model)
    with pytest.raises(SettingError, match=r"would move 0\.weight[\s\S]*parameters\(\) alone"):
        fit(model, tiny.toy_vectors(), 2, [rule])
    both = torch.optim.SGD([*rule.parameters(), model[4].bias], 0.1)
    with pytest.raises(SettingError, match=r"would move 4\.bias"):
        fit(model, tiny.toy_vectors(), 2, [rule], both)
    with pytest.raises(SettingError, match="does not have the scores"):
        fit(model, tiny.toy_vectors(), 2, [rule], torch.optim.SGD(rule.parameters()[:1], 0.1))


def test_weights_that_get_no_gradient_are_named():
    model = tiny.mlp()
    model[2].weight.requires_grad_(False)
    rule = searching(model)
    with pytest.raises(SettingError, match=r"2\.weight has requires_grad=False"):
        fit(model, tiny.toy_vectors(), 2, [rule], learner(rule))


def test_scores_that_do_not_fit_are_refused():
    sites = weights(line(1.0, 2.0))
    keep = {"weight": mask(1, 0)}
    for scores, says in (
        ({}, "scores of weight were needed"),
        ({"weight": {"wait": torch.zeros(1, 2)}}, "no such part"),
        ({"weight": {"weight": torch.zeros(2, 1)}}, "Give one number per element"),
    ):
        with pytest.raises(SiteError, match=says):
            TrainedMask(sites, scores, keep)


def test_a_gradient_that_is_not_a_number_is_named_before_a_mask_follows_it():
    model = tiny.mlp()
    rule = searching(model)
    loop = Loop(model, learner(rule), 3, rules=(rule,))
    rule.start(loop)
    keep = {n: k.clone() for n, k in rule.keep.items()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model[2].weight.grad[0, 0] = torch.nan
    with pytest.raises(EvidenceError, match=r"2\.weight were to be trained[\s\S]*NaN or infinity"):
        rule.before_step(loop)
    assert all(torch.equal(keep[n], k) for n, k in rule.keep.items())


def test_a_run_taken_up_again_ends_where_it_would_have(tmp_path):
    task, whole, cut, again = tiny.toy_images(), tiny.cnn(), tiny.cnn(), tiny.cnn()
    straight = searching(whole)
    fit(whole, task, 12, [LearningRate(), straight], learner(straight))
    rule = searching(cut)

    def put_aside(loop):
        if loop.step == 5:
            Snapshot.of(cut, loop).save(tmp_path / "run.safetensors")

    fit(cut, task, 12, [LearningRate(), rule], learner(rule), watch=put_aside)
    rule = searching(again, seed=3)  # other first masks: all that matters is in the snapshot
    start = Snapshot.load(tmp_path / "run.safetensors")
    fit(again, task, 12, [LearningRate(), rule], learner(rule), resume_from=start)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in whole.state_dict().items())
    assert rule.scored.overlap == straight.scored.overlap < 1
    assert all(torch.equal(a, b) for a, b in zip(straight.parameters(), rule.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_it_works_in_a_loop_of_ones_own_with_accumulation_autocast_and_compile(kind):
    """Two batches a step are one of twice the size: in a loop of one's own, in bfloat16 where autocast says so."""
    task, model, other = tiny.toy_vectors(), tiny.mlp(), tiny.mlp()
    make = {"sgd": learner, "adamw": lambda rule: torch.optim.AdamW(rule.parameters(), 0.01)}[kind]
    rule = searching(model)
    optimizer = make(rule)
    compiled = torch.compile(model, backend="aot_eager")
    pruner = attach(optimizer, model, rule, steps=6)
    batches = list(itertools.islice(itertools.cycle(task.batches("train")), 12))
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        for batch in (first, second):
            with torch.autocast("cpu", torch.bfloat16):
                loss = task.loss(compiled, batch) / 2
            loss.backward()
        optimizer.step()
    history = pruner.finish()
    assert [step for step, _ in history.curves["sparsity"]] == list(range(7))
    assert len({value for _, value in history.curves["sparsity"]}) == 1
    for site in weights(model):
        expected = tensors(other)[site.name].masked_fill(~rule.keep[site.name], 0)
        assert torch.equal(tensors(model)[site.name], expected)
    assert rule.scored.overlap < 1


def test_searching_by_more_data_at_once_is_the_same_whether_it_is_accumulated_or_not():
    task, one, two = tiny.toy_vectors(), tiny.mlp(), tiny.mlp()
    batches = list(itertools.islice(task.batches("train"), 4))
    found = []
    for model, size in ((one, 1), (two, 2)):
        rule = searching(model, AtOnce())
        optimizer = learner(rule)
        pruner = attach(optimizer, model, rule, steps=2)
        for pair in (batches[:2], batches[2:]):
            optimizer.zero_grad()
            if size == 2:
                for batch in pair:
                    (task.loss(model, batch) / 2).backward()
            else:
                (sum(task.loss(model, batch) for batch in pair) / 2).backward()
            optimizer.step()
        pruner.finish()
        found.append(rule)
    for a, b in zip(found[0].parameters(), found[1].parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_search_lowers_the_loss_from_a_random_mask():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    rule = searching(model, Swaps(power=0))
    rule_model = copy.deepcopy(model)
    for site in weights(rule_model):
        tensors(rule_model)[site.name].data.masked_fill_(~rule.keep[site.name], 0)
    before = task.measure(rule_model)["loss"]
    fit(model, task, 40, [LearningRate(), rule], learner(rule))
    assert task.measure(model)["loss"] < 0.5 * before


def test_attached_to_an_optimizer_of_weights_it_says_what_to_build():
    model = tiny.mlp()
    with pytest.raises(SettingError, match="Build the optimizer"):
        attach(Sgd(0.1)(model.parameters()), model, searching(model), steps=3)
