"""Lottery jackpots (paper 24): frozen weights, searched masks, what is spared, refused and remarked on."""

import copy

import pytest
import tiny
import torch
from torch import nn

from secateur.axes import Global, Magnitude, Random, Uniform
from secateur.axes.probes import Given
from secateur.axes.trained_masks import AtOnce, Swaps
from secateur.cut import weights, without_classifier
from secateur.edit import Mask, Update, apply_, load, save
from secateur.errors import BudgetError, SettingError
from secateur.method import load as load_method
from secateur.method import prune
from secateur.methods.jackpots import Jackpots, doubts, first_scores
from secateur.site import tensors
from secateur.task import Batch


def masks_of(outcome):
    return {edit.site.name: edit.keep for edit in outcome.edits if isinstance(edit, Mask)}


def test_a_searched_mask_recovers_what_a_cut_lost_with_no_weight_changed():
    """The paper's order at toy size: the cut is far off, norms bring some back, and the search most of the rest."""
    model, task = tiny.trained("cnn"), tiny.toy_images()
    dense = {name: value.clone() for name, value in model.named_parameters()}
    found = {}
    for name, steps, samples in (("cut", 0, 0), ("norms", 0, 256), ("searched", 40, 256)):
        outcome = prune(model, Jackpots(sparsity=0.92, steps=steps, samples=samples), task)
        found[name] = task.measure(outcome.model, "test")["loss"]
        keep = masks_of(outcome)
        for key, value in outcome.model.named_parameters():  # to the bit
            assert torch.equal(value, dense[key].masked_fill(~keep[key], 0) if key in keep else dense[key]), key
    assert found["cut"] > 2 * found["norms"]
    assert found["norms"] > 2 * found["searched"]
    assert load_method("jackpots") is Jackpots


def test_the_first_scores_are_one_and_a_little_less():
    keep = torch.tensor([[True, False]])
    assert first_scores(keep, 0.25).tolist() == [[1.0, 0.75]]


def test_the_first_mask_is_the_largest_weights_under_one_threshold():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    method = Jackpots(sparsity=0.8)
    keep, sites, named = method.search(model, task).keep, method.sites(model), dict(model.state_dict())
    assert "fc.weight" not in keep
    threshold = max(float(named[s.name][~keep[s.name]].abs().max()) for s in sites)
    assert threshold <= min(float(named[s.name][keep[s.name]].abs().min()) for s in sites)
    units = sum(s.units for s in sites)
    assert sum(int(k.sum()) for k in keep.values()) == units - int(0.8 * units)


def test_shares_are_by_magnitude_whatever_the_first_mask():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    by_size = Jackpots(sparsity=0.8).search(model, task).keep
    by_chance = Jackpots(sparsity=0.8, start=Random(1)).search(model, task).keep
    given = Jackpots(sparsity=0.8, start=Given({k: -v.float() for k, v in by_size.items()})).search(model, task).keep
    for name, keep in by_size.items():
        assert int(keep.sum()) == int(by_chance[name].sum()) == int(given[name].sum())
        assert not torch.equal(keep, by_chance[name])
        # what was not among the largest comes first
        assert int((given[name] & ~keep).sum()) == min(int(keep.sum()), int((~keep).sum()))


@pytest.mark.parametrize("allocation", [Global(), Uniform()], ids=["global", "uniform"])
def test_the_sparsity_asked_is_there_at_every_logged_step_and_each_layer_keeps_its_number(allocation):
    model, task = tiny.trained("cnn"), tiny.toy_images()
    method = Jackpots(sparsity=0.7, steps=8, allocation=allocation, transition=AtOnce(), rate=5.0)
    counts = {n: int(k.sum()) for n, k in method.search(model, task).keep.items()}
    outcome = prune(model, method, task)
    assert {n: int(k.sum()) for n, k in masks_of(outcome).items()} == counts
    curve = outcome.history.curves["sparsity"]
    assert [step for step, _ in curve] == list(range(9))
    assert len({value for _, value in curve}) == 1
    assert curve[0][1] == pytest.approx(0.7, abs=0.001)
    assert 0 < outcome.history.curves["overlap"][-1][1] < 1


def test_layers_that_stay_whole_have_no_scores_and_nothing_to_search_is_no_error():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    with torch.no_grad():
        model.conv.weight.mul_(1000)
    method = Jackpots(sparsity=0.3, steps=2, samples=0)
    rule = method.search(model, task)
    assert "conv.weight" not in rule.keep
    outcome = prune(model, method, task)
    assert masks_of(outcome)["conv.weight"].all()
    whole = prune(model, Jackpots(sparsity=0.0, steps=2, samples=0), task)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), model.parameters(), strict=True))


def test_a_layer_that_would_be_emptied_is_named_and_a_floor_keeps_it():
    model, task = tiny.cnn(), tiny.toy_images()
    with torch.no_grad():
        model.down.weight.mul_(1e-6)
    with pytest.raises(BudgetError, match=r"nothing would be left of down\.weight[\s\S]*floor"):
        Jackpots(sparsity=0.8, steps=1).run(model, task)
    Jackpots(sparsity=0.8, steps=1, allocation=Global(floor=0.001)).run(model, task)


def test_the_classifier_is_spared_where_there_is_one():
    names = lambda sites: [site.name for site in sites]  # noqa: E731
    assert names(without_classifier(weights(tiny.mlp()))) == ["0.weight", "2.weight"]
    assert names(without_classifier(weights(tiny.rnn())))[-1] != "fc.weight"
    decoder = weights(tiny.make_model("decoder"))
    assert names(without_classifier(decoder)) == names(decoder)  # its last matrix is in a block
    alone = weights(nn.Linear(4, 4))
    assert names(without_classifier(alone)) == names(alone)
    assert names(Jackpots(spare_classifier=False).sites(tiny.mlp())) == ["0.weight", "2.weight", "4.weight"]


def test_norms_have_the_statistics_of_the_final_mask():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    outcome = prune(model, Jackpots(sparsity=0.9, steps=5, samples=100), task)
    fresh = copy.deepcopy(outcome.model)
    inputs = []
    fresh.bn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    from secateur.axes.recalibration import some

    with torch.no_grad():
        for batch in some(task, 100):
            batch.through(fresh)
    mean = torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0)
    torch.testing.assert_close(outcome.model.bn.running_mean, mean, rtol=1e-4, atol=1e-5)
    assert sum(isinstance(edit, Update) for edit in outcome.edits) == 3 * 6


def test_its_edits_alone_make_the_network_again(tmp_path):
    """Masks and the norms' statistics are all there is: no weight moved."""
    model, task = tiny.trained("cnn"), tiny.toy_images()
    outcome = prune(model, Jackpots(sparsity=0.8, steps=6, samples=64), task)
    save(outcome.edits, tmp_path / "edits.safetensors")
    again = copy.deepcopy(model)
    apply_(again, load(tmp_path / "edits.safetensors"))
    for key, value in outcome.model.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


def test_fine_tuning_keeps_the_mask_and_lowers_the_loss():
    model, task = tiny.trained("cnn"), tiny.toy_images()
    searched = prune(model, Jackpots(sparsity=0.95, steps=10), task)
    tuned = prune(model, Jackpots(sparsity=0.95, steps=10, tune=20), task)
    keep = masks_of(tuned)
    assert all(torch.equal(keep[name], k) for name, k in masks_of(searched).items())
    for name, k in keep.items():
        value = tensors(tuned.model)[name]
        assert not bool(value[~k].any())
        assert not torch.equal(value, tensors(searched.model)[name])
    assert len(tuned.history.losses) == 30
    assert task.measure(tuned.model)["loss"] < task.measure(searched.model)["loss"]


def test_a_network_that_guesses_is_remarked_on():
    task = tiny.toy_images()
    assert doubts(tiny.trained("cnn"), task) == []
    (remark,) = doubts(tiny.cnn(), task)
    assert "is it trained?" in remark
    assert remark in prune(tiny.cnn(), Jackpots(sparsity=0.5, steps=1), task).notes
    assert doubts(tiny.trained("decoder"), tiny.toy_text()) == []
    assert "guessing among 64" in doubts(tiny.make_model("decoder"), tiny.toy_text())[0]


def test_outputs_that_are_no_choice_are_not_judged():
    class Level(tiny.Cnn):
        def forward(self, x):
            return super().forward(x)[:, 0]

    class Fit:
        seed, name = 0, "fit"

        def batches(self, split, n=None, epoch=0):
            return [Batch((torch.zeros(2, 3, 8, 8),))]

        def loss(self, model, batch):
            return batch.through(model).square().mean()

    assert doubts(Level(), Fit()) == []


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Jackpots(sparsity=1.0), "the fraction removed"),
        (lambda: Jackpots(sparsity=90), "Did you mean 0.9"),
        (lambda: Jackpots(steps=-1), "-1 steps of search"),
        (lambda: Jackpots(tune=-1), "-1 steps of fine-tuning"),
        (lambda: Jackpots(samples=-1), "-1 examples"),
        (lambda: Jackpots(rate=0.0), "a rate of 0"),
        (lambda: Jackpots(margin=-0.01), "a margin of -0.01"),
        (lambda: Jackpots(tune_rate=float("nan")), "a tune_rate of nan"),
        (lambda: Jackpots(momentum=1.0), "a momentum of 1 was asked for, but it is 0 or more, below 1"),
        (lambda: Jackpots(decay=-0.1), "a decay of -0.1"),
    ],
)
def test_settings_that_cannot_work_are_refused(make, says):
    with pytest.raises(SettingError, match=says):
        make().check()


def test_a_mask_that_starts_with_the_largest_weights_is_ahead_of_one_that_starts_anywhere():
    model, task = tiny.trained("mlp"), tiny.toy_vectors()
    loss = {
        type(start).__name__: task.measure(
            prune(model, Jackpots(sparsity=0.8, steps=15, start=start, transition=Swaps()), task).model
        )["loss"]
        for start in (Magnitude(), Random(0))
    }
    assert loss["Magnitude"] < loss["Random"], loss


def test_from_the_command_line_to_stock_transformers(tmp_path):
    from click.testing import CliRunner
    from transformers import AutoModelForCausalLM

    from secateur.cli import main

    out = tmp_path / "sparse"
    line = ["prune", "tiny:decoder", "jackpots", "--task", "tiny:toy_text", "--sparsity", "0.6", "--steps", "4"]
    line += ["--transition", "swaps(power=0)", "--start", "random", "--allocation", "uniform", "--out", str(out)]
    found = CliRunner().invoke(main, line)
    assert found.exit_code == 0, found.output
    model = AutoModelForCausalLM.from_pretrained(out)
    before = tensors(tiny.decoder())
    for site in weights(model):
        value = tensors(model)[site.name]
        assert int((value == 0).sum()) == int(0.6 * site.units)
        assert torch.equal(value, before[site.name].masked_fill(value == 0, 0))
