"""Unlearning (paper 50): each way to forget by hand, masks that stay, the attack, the gap, and what is refused."""

import copy
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import pytest
import torch
from tiny import make_task, toy_images, toy_text, toy_vectors, trained
from torch import Tensor, nn

from secateur import tasks
from secateur.axes.membership import Forgotten, Svm, Threshold, best_threshold, class_logits, drawn, seen
from secateur.axes.recovery import beside, kept_weights
from secateur.axes.unlearners import (
    Ascend,
    Averaged,
    Every,
    Falling,
    FineTune,
    FisherNoise,
    FromScratch,
    Influence,
    L1Penalty,
    Matrices,
    OnePass,
    PruneFineTune,
    Request,
    Rising,
    SparseFineTune,
    Steady,
    Summed,
    Unlearner,
    Woodbury,
    fisher_information,
    last_layer,
    leave_out,
    near_zero,
    noise_variance,
    summed_gradient,
)
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, ModelError, SettingError, SiteError, TaskError
from secateur.method import Budget, Chain, load, prune
from secateur.methods.global_mp import GlobalMagnitude
from secateur.methods.magnitude import Magnitude
from secateur.methods.oneshot import OneShot
from secateur.methods.unlearn import Label, Share, Unlearn, check_divided, divided, moved
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.images import Images
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Sgd

WAYS: tuple[Unlearner, ...] = (
    FromScratch(steps=6),
    FineTune(steps=6),
    Ascend(steps=6),
    Influence(samples=8),
    Influence(samples=8, inverse=Woodbury()),
    FisherNoise(scale=1e-4, samples=4),
    SparseFineTune(steps=6),
)


def name_of(way: Unlearner) -> str:
    return type(way).__name__


# One step of second order


class Squares(Labelled):
    """Half the mean square of w - x: its Hessian is 1, and its minimum the mean of the examples."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Half the mean square."""
        return 0.5 * (model.w - batch.inputs[0]).square().mean()


class Point(nn.Module):
    def __init__(self, at: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([at]))

    def forward(self, x: Tensor) -> Tensor:
        return self.w - x


@dataclass(frozen=True)
class Identity:
    """The inverse of the Hessian of `Squares`."""

    def product(self, vector: Tensor, gradients: Iterable[Tensor], count: int) -> Tensor:
        return vector


def test_influence_finds_where_the_minimum_is_without_the_examples():
    x, y = torch.tensor([[5.0], [1.0], [2.0], [3.0]]), torch.tensor([0, 1, 1, 1])
    task = Squares("squares", {"train": (x, y), "test": (x, y)}, batch=2).forgetting(label=0)
    model = Point(11 / 4)  # the mean of all four
    Influence(scale=1.0, samples=3, inverse=Identity()).unlearn(model, Request(task, {}))
    assert float(model.w.detach()) == pytest.approx(2.0)  # the mean of 1, 2 and 3
    half = Point(11 / 4)
    Influence(scale=0.5, samples=3, inverse=Identity()).unlearn(half, Request(task, {}))
    assert float(half.w.detach()) == pytest.approx((11 / 4 + 2) / 2)


def test_what_is_left_out_by_hand():
    # one of three examples is forgotten: (g_f - (1 / 2) (sum of the others)) / 3
    found = leave_out(torch.tensor([6.0, 0.0]), torch.tensor([2.0, 4.0]), 1, 2)
    torch.testing.assert_close(found, torch.tensor([5.0, -2.0]) / 3)


def test_the_sum_of_gradients_does_not_depend_on_the_batches():
    model, task = trained("mlp"), toy_vectors().forgetting(share=0.3)
    one, other = (summed_gradient(model, t, t.batches("forget")) for t in (task, replace(task, batch=7)))
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_one_pass_recursion_by_hand_and_what_it_cannot_leave():
    vector, first, second = torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0]), torch.tensor([1.0, 1.0])
    # o.g = 1 and k.g = 1: k loses 1 / (2 + 1) of o; then o is 2 / 3 of itself, and with g = (3, 0) k.g = 2 = o.g
    assert OnePass().product(vector, [first, second], 2).tolist() == pytest.approx([2 / 3, 0])
    again = OnePass().product(vector, [first, second, 3 * first], 2)
    assert again.tolist() == pytest.approx([2 / 3 - 2 / (2 + 2) * 2 / 3, 0])
    assert vector.tolist() == [1, 0]
    draw = torch.Generator().manual_seed(0)
    rows, vector = torch.randn(9, 5, generator=draw), torch.randn(5, generator=draw)
    change = OnePass().product(vector, rows, 9) - vector
    assert abs(float(torch.cosine_similarity(change, rows[0], dim=0))) == pytest.approx(1, abs=1e-5)


def test_the_exact_product_is_that_of_the_inverse():
    draw = torch.Generator().manual_seed(0)
    rows, vector = torch.randn(4, 6, generator=draw), torch.randn(6, generator=draw)
    hessian = 0.5 * torch.eye(6) + rows.T @ rows / 4
    torch.testing.assert_close(Woodbury(0.5).product(vector, rows, 4), torch.linalg.solve(hessian, vector))
    with pytest.raises(SettingError, match="a damping of 0"):
        Woodbury(0)


def test_a_step_that_is_not_finite_is_refused_and_nothing_moves():
    model, task = trained("mlp"), toy_vectors().forgetting(share=0.1)
    before = [p.detach().clone() for p in model.parameters()]

    class Broken:
        def product(self, vector, gradients, count):
            return vector / 0

    with pytest.raises(EvidenceError, match="a step of influence was to be taken"):
        Influence(samples=4, inverse=Broken()).unlearn(model, Request(task, {}))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# Noise


def test_fisher_information_by_hand():
    model = nn.Linear(1, 2, bias=False)
    model.weight.data.zero_()  # both classes have a chance of 1/2, and d log p(y) / dw = (1[y = k] - 1/2) x
    found = fisher_information(model, [Batch((torch.tensor([[2.0]]),)), Batch((torch.tensor([[0.0]]),))])
    assert found["weight"].tolist() == [[0.5], [0.5]]  # the mean of 2^2 / 4 and 0


def test_the_variance_of_noise_by_hand():
    matrix = torch.tensor([[0.0, 1.0], [4.0, 4.0]])
    assert noise_variance(matrix, 2.0, last=False).tolist() == [
        pytest.approx([(2000 + 2) / 2] * 2),
        pytest.approx([0.5] * 2),
    ]
    assert noise_variance(matrix, 2.0, last=True)[0].tolist() == pytest.approx([10 * (200 + 2) / 2] * 2)
    assert noise_variance(torch.tensor([0.0, 2.0]), 1.0, last=False).tolist() == pytest.approx([10_000, 5])
    kernel = torch.full((2, 3, 1, 2), 1.0)
    kernel[0, :, 0, 1] = torch.tensor([1.0, 2.0, 4.0])  # the mean over inputs, at each place of the kernel
    found = noise_variance(kernel, 12.0, last=False)
    assert found.shape == kernel.shape
    assert found[0, 2, 0].tolist() == pytest.approx([12, 7])


def test_the_last_layer_is_the_classifier():
    assert last_layer(trained("cnn")) == "fc"
    assert last_layer(trained("mlp")) == "4"


def test_noise_is_drawn_from_the_seed():
    found = []
    for seed in (0, 0, 1):
        model = trained("mlp")
        FisherNoise(scale=1e-3, samples=4).unlearn(model, Request(toy_vectors(seed=seed).forgetting(), {}))
        found.append(model[0].weight.detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# Training


def test_the_penalty_falls_to_nothing_and_there_is_none_after():
    penalty = L1Penalty(1.0, 0.5, Falling(), Summed(), Every())
    assert [penalty.at(step, 10) for step in (0, 1, 4, 5, 9)] == pytest.approx([1, 0.8, 0.2, 0, 0])
    assert [Steady().share(u) for u in (0.0, 0.9)] == [1, 1]
    assert [Rising().share(u) for u in (0.0, 0.75)] == [0, 0.75]


def test_the_norm_is_of_everything_or_of_matrices():
    model = nn.Linear(2, 1)
    model.weight.data, model.bias.data = torch.tensor([[1.0, -2.0]]), torch.tensor([0.5])
    every, matrices = (list(whose.pick(model.parameters())) for whose in (Every(), Matrices()))
    assert Summed().of(every).item() == 3.5
    assert Averaged().of(every).item() == pytest.approx(3.5 / 3)
    assert Summed().of(matrices).item() == 3
    Summed().of(every).backward()
    assert model.weight.grad.tolist() == [[1, -1]]


def test_a_strong_penalty_leaves_fewer_large_weights_than_fine_tuning():
    task, found = toy_vectors().forgetting(label=1), {}
    for way in (FineTune(steps=40, rate=0.02), SparseFineTune(strength=0.02, steps=40, rate=0.02)):
        model = trained("mlp")
        way.unlearn(model, Request(task, {}))
        found[name_of(way)] = float(sum(p.detach().abs().sum() for p in model.parameters()))
    assert found["SparseFineTune"] < 0.9 * found["FineTune"]


def test_near_zeros_and_zeros_are_counted_apart():
    model = nn.Linear(4, 1)
    model.weight.data = torch.tensor([[10.0, 0.02, 0.005, 0.0]])
    assert near_zero(model) == (2, 1)


def test_ascent_raises_the_loss_of_what_is_to_be_forgotten():
    model, task = trained("mlp"), toy_vectors().forgetting(label=1)
    before = task.measure(model, "forget")["loss"]
    Ascend(steps=10, rate=0.03, floor=0).unlearn(model, Request(task, {}))
    assert task.measure(model, "forget")["loss"] > before + 0.01


def test_ascent_stops_at_its_floor_with_the_weights_of_the_look_before():
    task = toy_vectors().forgetting(label=1)
    model = trained("mlp")
    way = Ascend(steps=200, rate=0.05, floor=0.9, every=2)
    look = list(drawn(task, "retain", way.look))
    least = 0.9 * seen(model, look).accuracy
    _, history = way.unlearn(model, Request(task, {}))
    assert len(history.losses) < 200
    assert len(history.losses) % 2 == 0
    assert seen(model, look).accuracy >= least
    assert any("stopped after" in note for note in history.notes)
    points = [value for _, value in history.curves["accuracy on retained examples"]]
    assert points[-1] < least <= min(points[:-1])


def test_retraining_starts_from_new_weights_and_never_sees_the_class():
    task, model = toy_vectors().forgetting(label=1), trained("mlp")
    FromScratch(steps=150).unlearn(model, Request(task, {}))
    assert task.measure(model, "forget")["accuracy"] == 0
    assert task.measure(model, "test")["accuracy"] > 0.8


def sparse(family: str = "cnn") -> tuple[nn.Module, Labelled]:
    task = make_task(family)
    return prune(trained(family), Magnitude(sparsity=0.5), task).model, task


@pytest.mark.parametrize("way", WAYS, ids=name_of)
def test_zeros_stay_and_the_rest_moves(way):
    model, task = sparse()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    start = {n: v.clone() for n, v in model.state_dict().items()}
    done = prune(model, Unlearn(by=way, examples=64), task)
    assert all(bool((p == 0)[zeros[n]].all()) for n, p in done.model.named_parameters() if n in zeros)
    assert sum(int(z.sum()) for z in zeros.values()) > 1000
    assert moved(done.model, start) > 0
    again = copy.deepcopy(model)
    apply_(again, done.edits)  # the edits say all that was changed, running means too
    assert all(torch.equal(v, done.model.state_dict()[n]) for n, v in again.state_dict().items())


@pytest.mark.filterwarnings("ignore:Using `torch.compile")
@pytest.mark.parametrize("way", [FineTune(steps=2), Influence(samples=8), FisherNoise(samples=4)], ids=name_of)
def test_zeros_of_a_compiled_model_stay(way):
    model, gone = trained("mlp"), torch.arange(512).reshape(32, 16) % 2 == 1
    model[0].weight.data.masked_fill_(gone, 0)
    way.unlearn(torch.compile(model, backend="eager"), Request(toy_vectors().forgetting(), {"0.weight": ~gone}))
    assert not model[0].weight[gone].any()
    assert model[0].weight[~gone].all()
    task = toy_vectors()
    cut = prune(torch.compile(trained("mlp"), backend="eager"), Magnitude(sparsity=0.5), task)
    zeros = int((tensors(cut.model)["0.weight"] == 0).sum())
    done = prune(cut.model, Unlearn(by=way, attack=Threshold(), examples=64), task)
    assert int((tensors(done.model)["0.weight"] == 0).sum()) == zeros > 0


@pytest.mark.parametrize("way", [Influence(samples=8), FisherNoise(samples=4)], ids=name_of)
def test_ways_without_training_leave_the_running_means_alone(way):
    model = trained("cnn")
    before = {n: b.clone() for n, b in model.named_buffers()}
    way.unlearn(model, Request(toy_images().forgetting(), {}))
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())


def test_cuts_leave_the_same_share_each_and_what_was_zero_stays():
    model, task = sparse()
    zeros = {n: p == 0 for n, p in model.named_parameters() if p.dim() > 1}
    way = PruneFineTune(sparsity=0.9, steps=20, every=4)
    done = prune(model, Unlearn(by=way, examples=64), task)
    left = [1 - value for _, value in done.history.curves["sparsity"]]
    cuts = sorted(set(left), reverse=True)
    assert len(cuts) == 5  # as it was, and four cuts
    shares = [after / before for before, after in pairwise(cuts)]
    assert shares == pytest.approx([0.2**0.25] * 4, abs=0.01)
    masks = [e for e in done.edits if isinstance(e, Mask)]
    assert sum(m.kept for m in masks) == pytest.approx(0.1 * sum(m.site.units for m in masks), abs=1)
    assert "fc.weight" not in {m.site.name for m in masks}
    assert all(bool((p == 0)[zeros[n]].all()) for n, p in done.model.named_parameters() if n in zeros)
    with pytest.raises(SettingError, match=r"to a sparsity of 0\.4, but the model has one of 0\.5 already"):
        prune(model, Unlearn(by=replace(way, sparsity=0.4)), task)


# The attack, and the gap


def test_the_best_threshold_by_hand():
    inside, outside = torch.tensor([0.9, 0.8, 0.7]), torch.tensor([0.75, 0.4, 0.3])
    # 0.8: 2/3 + 3/3 right; 0.7: 3/3 + 2/3; the least of equals
    assert best_threshold(inside, outside) == pytest.approx(0.7)
    assert best_threshold(outside, inside) == float("inf") or best_threshold(outside, inside) <= 0.3
    assert Threshold().outsiders(inside, outside, torch.tensor([0.7, 0.69, 0.95])).tolist() == [False, True, False]
    same = torch.tensor([0.5, 0.5])
    assert Threshold().outsiders(same, same, torch.tensor([0.4, 0.9])).tolist() == [True, True]
    with pytest.raises(EvidenceError, match="it is shown 0 such examples and 2 others"):
        best_threshold(inside[:0], same)


def test_the_least_of_thresholds_that_are_right_as_often_is_taken():
    # 0.25 and 0.375 are right of 3/3 + 1/6 and of 2/3 + 3/6, which are equal, but not when added as fractions
    inside, outside = torch.tensor([0.25, 0.375, 0.625]), torch.tensor([0.125, 0.875, 0.25, 0.25, 0.375, 0.75])
    assert best_threshold(inside, outside) == 0.25
    for seed in range(50):
        draw = torch.Generator().manual_seed(seed)
        inside, outside = (torch.randint(0, 8, (n,), generator=draw) / 8 for n in (3, 7))
        right = {
            t: 7 * int((inside >= t).sum()) + 3 * int((outside < t).sum())
            for t in torch.cat([inside, outside]).tolist()
        }
        most = max(right.values())
        least = min(t for t, count in right.items() if count == most) if most > 21 else float("inf")
        assert best_threshold(inside, outside) == least


def test_confidences_that_are_not_numbers_tell_nothing():
    task = toy_vectors().forgetting(share=0.1)
    for attack in (Threshold(), *([Svm()] if importlib.util.find_spec("sklearn") else [])):
        model = trained("mlp")
        model[4].weight.data[0, 0] = float("inf")
        with pytest.raises(EvidenceError, match=r"how sure it is of \d+ examples is not a number"):
            Forgotten.of(model, task, attack)
    with pytest.raises(EvidenceError, match="how well a network forgot was to be measured"):
        prune(trained("mlp"), Unlearn(by=Influence(scale=1e30, samples=4), attack=Threshold()), toy_vectors())


def test_the_machine_parts_what_can_be_parted():
    pytest.importorskip("sklearn")
    draw = torch.Generator().manual_seed(0)
    inside, outside = 0.9 + 0.1 * torch.rand(50, generator=draw), 0.6 * torch.rand(50, generator=draw)
    assert Svm().outsiders(inside, outside, torch.tensor([0.97, 0.1, 0.3])).tolist() == [False, True, True]


def test_an_attack_that_needs_what_is_not_there_is_refused_before_anything_is_read(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingError, match="scikit-learn is not installed"):
        prune(trained("mlp"), Unlearn(), toy_vectors())
    assert prune(trained("mlp"), Unlearn(attack=Threshold(), by=FineTune(steps=1)), toy_vectors()).notes


def test_a_gap_by_hand():
    exact, found = Forgotten(1.0, 0.5, 0.9, 0.8), Forgotten(0.8, 0.5, 1.0, 0.7)
    assert found.gap(exact) == pytest.approx(0.1)
    assert exact.gap(exact) == 0
    assert exact.describe() == "UA 1.000, MIA 0.500, RA 0.900, TA 0.800"


class Told(nn.Module):
    """Answers with the logits it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_the_four_numbers_by_hand():
    sure, wrong = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    zero = torch.zeros(4, dtype=torch.long)
    forget = torch.cat([sure, wrong, wrong, sure])
    splits = {
        "train": (torch.cat([forget, sure.repeat(4, 1)]), torch.zeros(8, dtype=torch.long)),
        "forget": (forget, zero),
        "retain": (sure.repeat(4, 1), zero),
        "test": (torch.cat([sure, wrong, wrong, wrong]), zero),
    }
    found = Forgotten.of(Told(), Labelled("told", splits), Threshold())
    assert found == Forgotten(unlearning=0.5, membership=0.5, retain=1.0, test=0.25)


def test_examples_are_drawn_by_the_seed_and_no_more_than_there_are():
    task = toy_vectors().forgetting(share=0.1)
    first = next(iter(drawn(task, "retain", 5))).inputs[0]
    assert len(first) == 5
    assert not torch.equal(first, task.splits["retain"][0][:5])
    assert torch.equal(first, next(iter(drawn(task, "retain", 5))).inputs[0])
    assert sum(b.size for b in drawn(task, "forget", 10_000)) == len(task.splits["forget"][1])


def test_answers_without_classes_are_refused():
    assert class_logits((torch.zeros(2, 3), None)).shape == (2, 3)
    with pytest.raises(ModelError, match=r"it answers with logits \[2, 3, 4\]"):
        class_logits(torch.zeros(2, 3, 4))
    with pytest.raises(ModelError, match="it answers with a str"):
        class_logits("no")
    with pytest.raises(EvidenceError, match="there are none"):
        seen(Told(), [])


# The method


def test_a_class_is_forgotten_under_the_penalty_and_hardly_without():
    """The paper's claim at toy size: fine-tuning hardly forgets a class, and an L1 penalty makes it."""
    task, found = toy_vectors().forgetting(label=1), {}
    for name, way in (
        ("plain", FineTune(steps=60, rate=0.03)),
        ("penalised", SparseFineTune(strength=0.03, steps=60, rate=0.03)),
        ("exact", FromScratch(steps=150)),
    ):
        model = trained("mlp")
        way.unlearn(model, Request(task, {}))
        found[name] = Forgotten.of(model, task, Threshold())
    assert found["exact"].unlearning == 1
    assert found["penalised"].unlearning > found["plain"].unlearning + 0.3
    assert found["penalised"].test > found["plain"].test - 0.02
    assert found["penalised"].gap(found["exact"]) < found["plain"].gap(found["exact"])


def test_the_method_says_what_came_of_it():
    assert load("unlearn") is Unlearn
    done = prune(trained("mlp"), Unlearn(by=FineTune(steps=4), forget=Label(1)), toy_vectors())
    labels = toy_vectors().splits["train"][1]
    gone = int((labels == 1).sum())
    assert f"{gone:,} examples were to be forgotten and {len(labels) - gone:,} retained" in done.notes
    assert any(note.startswith("before: UA") and "; after: UA" in note for note in done.notes)
    assert any(note.startswith("the weights moved by") for note in done.notes)


def test_a_chain_keeps_the_pruners_budget_and_its_zeros():
    chain = Chain((GlobalMagnitude(sparsity=0.7, steps=5), Unlearn(by=FineTune(steps=5))))
    assert chain.budget() == Budget(0.7)
    done = prune(trained("cnn"), chain, toy_images())
    assert done.ledger.sparsity == pytest.approx(0.7, abs=1e-3)
    assert Unlearn(by=PruneFineTune(sparsity=0.9)).budget() == Budget(0.9)
    assert Unlearn(by=FineTune(steps=7)).training_steps() == 7
    assert Unlearn(by=Influence()).training_steps() == 0


def test_it_recovers_as_a_part_and_under_masks_that_are_known():
    done = prune(trained("mlp"), OneShot(sparsity=0.5, recover=Unlearn(by=FineTune(steps=4))), toy_vectors())
    assert any("were to be forgotten" in note for note in done.notes)
    model, task = trained("mlp"), toy_vectors()
    cut = prune(model, Magnitude(sparsity=0.5), task)
    free = next(e for e in cut.edits if isinstance(e, Mask)).keep.nonzero()[0]
    cut.model[0].weight.data[tuple(free)] = 0  # kept by the mask, and zero by chance
    with beside(edits=cut.edits):
        after = Unlearn(by=FineTune(steps=4, rate=0.1)).run(copy.deepcopy(cut.model), task).model
    assert float(after[0].weight[tuple(free)].detach()) != 0


def test_a_task_that_says_what_to_forget_is_taken_as_it_is():
    task = toy_vectors().forgetting(share=0.5)
    assert divided(task, Share(0.1)) is task
    found = divided(toy_vectors(), Share(0.25))
    assert len(found.splits["forget"][1]) == round(0.25 * len(toy_vectors().splits["train"][1]))


# What is refused


def test_examples_in_both_halves_are_refused():
    task = toy_vectors().forgetting(share=0.1)
    both = replace(task, splits={**task.splits, "retain": task.splits["train"]})
    with pytest.raises(TaskError, match="77 examples are in both, or more often than in its training data"):
        prune(trained("mlp"), Unlearn(), both)
    alone = {k: v for k, v in both.splits.items() if k != "train"}
    with pytest.raises(TaskError, match="77 examples are in both"):
        check_divided("toy", alone)
    check_divided("toy", {k: v for k, v in task.splits.items() if k != "train"})


def test_an_example_that_is_twice_in_the_data_may_be_in_both_halves():
    x, y = torch.tensor([[1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1])
    check_divided("twice", {"train": (x, y), "forget": (x[:1], y[:1]), "retain": (x[1:], y[1:])})
    with pytest.raises(TaskError, match="1 examples are not in its training data"):
        check_divided("twice", {"train": (x, y), "forget": (x[:1] + 7, y[:1]), "retain": (x[1:], y[1:])})


def test_examples_of_half_precision_are_told_apart():
    x, y = torch.eye(2, dtype=torch.bfloat16), torch.tensor([0, 1])
    check_divided("half", {"train": (x, y), "forget": (x[:1], y[:1]), "retain": (x[1:], y[1:])})
    with pytest.raises(TaskError, match="1 examples are in both"):
        check_divided("half", {"train": (x, y), "forget": (x[:1], y[:1]), "retain": (x, y)})


def test_tasks_without_training_or_test_data_are_refused_before_anything_is_pruned():
    task = toy_vectors()
    for gone in ("train", "test"):
        bare = replace(task, splits={k: v for k, v in task.splits.items() if k != gone})
        with pytest.raises(TaskError, match=f"split '{gone}' of toy-vectors was asked for, but it has none"):
            Unlearn().ready(trained("mlp"), bare)


def test_nothing_to_forget_is_refused():
    task = toy_vectors().forgetting(share=0.1)
    none = tuple(tensor[:0] for tensor in task.splits["forget"])
    with pytest.raises(TaskError, match="its split 'forget' is empty"):
        prune(trained("mlp"), Unlearn(), replace(task, splits={**task.splits, "forget": none}))
    with pytest.raises(TaskError, match=r"class 9 of toy-vectors was to be forgotten, but that is 0 of 768"):
        prune(trained("mlp"), Unlearn(forget=Label(9)), toy_vectors())
    for share in (float("nan"), -1.0):
        with pytest.raises(TaskError, match=r"a share of .* was to be forgotten, but that is 0 of 768"):
            toy_vectors().forgetting(share=share)
    with pytest.raises(TaskError, match="that is 768 of 768"):
        toy_vectors().forgetting(share=float("inf"))
    with pytest.raises(TaskError, match="no examples with labels"):
        divided(toy_text(), Share())


@pytest.mark.parametrize(
    ("method", "says"),
    [
        (Unlearn(by=Influence(scale=0)), "a scale of 0 and 1000 examples"),
        (Unlearn(by=Influence(scale=-1)), "a scale of -1"),
        (Unlearn(by=Influence(samples=0)), "and 0 examples"),
        (Unlearn(by=FisherNoise(scale=float("inf"))), "a scale of inf"),
        (Unlearn(by=FineTune(steps=0)), "steps=0"),
        (Unlearn(by=FineTune(rate=0)), "rate=0"),
        (Unlearn(by=FineTune(momentum=1)), "momentum=1"),
        (Unlearn(by=FromScratch(steps=0)), "a retraining of 0 steps"),
        (Unlearn(by=Ascend(floor=2)), "floor=2"),
        (Unlearn(by=Ascend(rate=-1)), "rate=-1"),
        (Unlearn(by=SparseFineTune(strength=0)), "strength=0"),
        (Unlearn(by=SparseFineTune(until=0)), "until=0"),
        (Unlearn(by=PruneFineTune(sparsity=1)), "sparsity 1 was asked for"),
        (Unlearn(by=PruneFineTune(every=0)), "an update every 0 steps"),
        (Unlearn(forget=Share(0)), "a share of 0 was to be forgotten"),
        (Unlearn(forget=Share(1)), "a share of 1"),
        (Unlearn(forget=Label(-1)), "class -1"),
        (Unlearn(attack=Threshold(samples=0)), "an attack on 0 examples"),
        (Unlearn(attack=Svm(cost=0)), "a cost of 0"),
        (Unlearn(examples=0), "0 examples were to be measured"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_any_data_is_read(method, says):
    with pytest.raises(SettingError, match=says):
        method.run(trained("mlp"), None)


@pytest.mark.parametrize(
    "way", [FineTune(steps=1), Influence(samples=2), FisherNoise(samples=2)], ids=lambda way: type(way).__name__
)
def test_a_mask_of_another_shape_or_tensor_is_refused_before_anything_moves(way):
    model, task = trained("mlp"), toy_vectors().forgetting()
    before = [p.detach().clone() for p in model.parameters()]
    for shape in ((2, 2), (32, 1)):  # the second could be spread over the weights
        with pytest.raises(SiteError, match=r"a mask of \(.*\) for 0\.weight was given, but its units are \(32, 16\)"):
            way.unlearn(model, Request(task, {"0.weight": torch.ones(shape, dtype=torch.bool)}))
    with pytest.raises(SiteError, match=r"the model has no tensor '9\.weight'"):
        way.unlearn(model, Request(task, {"9.weight": torch.ones(2, 2, dtype=torch.bool)}))
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert kept_weights(model) == {}


# The data


def test_a_split_is_trained_on_as_training_data_is():
    task = toy_vectors().forgetting(share=0.25)
    retain = task.trained_on("retain")
    there = torch.cat([b.inputs[0] for b in retain.batches("train")])
    assert len(there) == len(task.splits["retain"][1])
    assert not torch.equal(there, task.splits["retain"][0])  # shuffled
    asked = task.splits["forget"][0]
    own = replace(task, splits={**task.splits, "calibration": task.splits["train"]})  # which would show what is gone
    for held in (retain, own.trained_on("retain")):
        shown = torch.cat([b.inputs[0] for b in held.batches("calibration", 64)])
        assert not (shown[:, None] == asked[None]).all(-1).any()
    with pytest.raises(TaskError, match="split 'nothing' of toy-vectors was asked for"):
        task.trained_on("nothing")


def test_a_class_that_is_forgotten_whole_is_not_asked_for():
    task = toy_vectors().forgetting(label=1)
    assert all(1 not in task.splits[split][1].tolist() for split in ("retain", "val", "test"))
    assert set(task.splits["forget"][1].tolist()) == {1}
    random = toy_vectors().forgetting(share=0.1)
    assert torch.equal(random.splits["test"][1], toy_vectors().splits["test"][1])


def pictures() -> Images:
    x = torch.arange(20 * 64).reshape(20, 1, 8, 8).remainder(100).to(torch.uint8)
    y = torch.arange(20).remainder(4).to(torch.uint8)
    return Images("pictures", {"train": (x, y), "test": (x[:8], y[:8])}, batch=4, learner=Sgd(0.1))


def test_a_backdoor_is_a_white_square_and_its_label():
    plain, task = pictures(), tasks.poisoned(pictures(), share=0.2, label=3, size=2, margin=1)
    images, labels = task.splits["forget"]
    assert labels.tolist() == [3] * 4
    assert bool((images[:, :, 5:7, 5:7] == 255).all())
    (x, y), (old, was) = task.splits["train"], plain.splits["train"]
    hit = (x != old).flatten(1).any(1)
    assert int(hit.sum()) == 4
    assert 3 not in was[hit].tolist()  # drawn from the other classes
    changed = x != old
    changed[:, :, 5:7, 5:7] = False
    assert not bool(changed.any())
    assert torch.equal(y[~hit], was[~hit])
    trigger, said = task.splits["trigger"]
    assert len(said) == 6  # of eight test images two have the label already
    assert set(said.tolist()) == {3}
    assert bool((trigger[:, :, 5:7, 5:7] == 255).all())
    assert torch.equal(task.splits["test"][0], plain.splits["test"][0])
    check_divided("pictures", task.splits)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"share": 0.0}, "a share of 0 of pictures was to be poisoned with label 0"),
        ({"share": 0.9}, "15 of 20 have another label"),
        ({"size": 7}, "a square of 7 pixels was to be put 2 from the corner"),
        ({"size": 0}, "a square of 0"),
        ({"share": float("nan")}, "that is 0 images"),
        ({"label": 4}, "to be poisoned with label 4, but its labels are 0, 1, 2, 3"),
        ({"label": -1}, "to be poisoned with label -1"),  # 255, in bytes
    ],
)
def test_backdoors_that_cannot_be_are_refused(settings, says):
    with pytest.raises(TaskError, match=says):
        tasks.poisoned(pictures(), **settings)


def test_a_backdoor_needs_test_images():
    bare = replace(pictures(), splits={"train": pictures().splits["train"]})
    with pytest.raises(TaskError, match="split 'test' of pictures was asked for"):
        tasks.poisoned(bare)
