"""MaskSparsity: only condemned scales are pulled, the threshold carries the plan out, no mask is network slimming."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import make_task, trained

from secateur.axes import Global, Random
from secateur.axes.criteria import Wanda
from secateur.axes.penalties import L1, SmoothL1
from secateur.axes.scales import Absorbed, Below, Energy, scale_names, scaled
from secateur.edit import Mask, Remove, apply_
from secateur.errors import SettingError, SiteError
from secateur.graph import couple, removals
from secateur.method import Budget, prune, tiny
from secateur.methods.mask_sparsity import MaskSparsity, NoMask, Penalty, Ranked, ScaleSize, executed
from secateur.site import tensors
from secateur.tasks.learners import Sgd
from secateur.train import fit


def sites_of(model, task):
    return scaled(model, task.example, couple(model, task.example))[0]


@pytest.fixture(scope="module")
def ours():
    """A trained network, its task, and what the method makes of it with and without a mask in as many steps."""
    model, task = trained("cnn"), make_task("cnn")
    settings = {"steps": 120, "tune": 0}
    masked = prune(model, tiny(MaskSparsity, **settings), task)
    slimmed = prune(model, tiny(MaskSparsity, plan=NoMask(), **settings), task)
    return model, task, masked, slimmed


def test_scales_that_stay_are_left_alone_and_the_cut_costs_nothing(ours):
    model, task, masked, slimmed = ours
    named, sites = tensors(model), sites_of(model, task)
    planned, _ = Ranked().keep(model, task, sites, Budget(0.5, of="units"), Penalty(0.05, L1()))
    removes = [e for e in masked.edits if isinstance(e, Remove)]
    # The threshold takes out what was planned, here all of it.
    assert {e.site.name: e.keep.tolist() for e in removes} == {n: k.tolist() for n, k in planned.items()}
    left = torch.cat([v.detach() for n, v in masked.model.named_parameters() if "bn" in n and n.endswith("weight")])
    dense = torch.cat([named[n].detach() for n in scale_names(sites)])
    assert float(left.mean()) > 0.8 * float(dense.mean())
    all_pulled = torch.cat([v.detach() for n, v in slimmed.model.named_parameters() if "bn" in n and "weight" in n])
    assert float(all_pulled.abs().mean()) < 0.6 * float(dense.mean())
    # And the network that is left is better than that of slimming, before any training after the cut.
    accuracy = [task.measure(done.model, "test")["accuracy"] for done in (masked, slimmed)]
    assert accuracy[0] > 0.9
    assert accuracy[0] > accuracy[1] + 0.05
    assert any("above the threshold 0 of 36 condemned scales" in note for note in masked.notes)


def test_without_a_mask_it_is_network_slimming_step_by_step():
    model, task = trained("cnn"), replace(make_task("cnn"), learner=Sgd(0.05, decay=1e-3))
    plain = copy.deepcopy(model)
    scales = scale_names(sites_of(model, task))
    optimizer = task.optimizer(plain.parameters())
    plain.train()
    for _, batch in zip(range(10), task.batches("train"), strict=False):
        optimizer.zero_grad()
        task.loss(plain, batch).backward()
        for name in scales:
            tensors(plain)[name].grad += 0.02 * tensors(plain)[name].detach().sign()
        optimizer.step()
    done = MaskSparsity(plan=NoMask(), strength=0.02, steps=10, threshold=Below(0.0)).run(copy.deepcopy(model), task)
    for name, value in plain.named_parameters():
        assert torch.equal(dict(done.model.named_parameters())[name], value), name


def test_training_with_the_mask_starts_from_the_dense_weights_whatever_found_it():
    model, task = trained("cnn"), make_task("cnn")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    sites = sites_of(model, task)
    for plan in (Ranked(steps=5), Ranked(Random(3)), Ranked(allocation=Global())):
        keep, history = plan.keep(model, task, sites, Budget(0.5, of="units"), Penalty(0.05, L1()))
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
        units = sum(one.site.units for one in sites)
        assert sum(int(k.sum()) for k in keep.values()) == pytest.approx(units / 2, abs=1)
        assert len(history.losses) == plan.steps
    by_size, _ = Ranked().keep(model, task, sites, Budget(0.5, of="units"), Penalty(0.05, L1()))
    one = sites[0]
    kept = by_size[one.site.name]
    size = one.sizes(tensors(model)).mean(0)
    assert float(size[kept].min()) >= float(size[~kept].max())


def test_masked_equals_removed_and_the_arithmetic_of_the_mask_is_that_of_the_model():
    model, task = trained("cnn"), make_task("cnn")
    sites = sites_of(model, task)
    with torch.no_grad():
        for name in scale_names(sites):
            tensors(model)[name][::2] = 0.0
    keep = executed(sites, tensors(model), Below(), 1)
    assert all(k.tolist() == [False, True] * (len(k) // 2) for k in keep.values())
    masked, cut = copy.deepcopy(model), copy.deepcopy(model)
    apply_(masked, [Mask(one.site, keep[one.site.name]) for one in sites])
    apply_(cut, removals([one.site for one in sites], keep))
    inputs = task.example.inputs
    torch.testing.assert_close(cut(*inputs), masked(*inputs))
    # Half of every width but those of colours and classes: 3, 8, 8, 8, 16, 16, 16, 4 become 3, 4, 4, 4, 8, 8, 8, 4.
    convolutions = 9 * (3 * 4 + 2 * 4 * 4 + 4 * 8 + 2 * 8 * 8)
    assert sum(p.numel() for p in cut.parameters()) == convolutions + 2 * (3 * 4 + 3 * 8) + 8 * 4 + 4
    assert cut.conv.weight.shape == (4, 3, 3, 3)
    assert cut.block2.conv1.weight.shape == (8, 8, 3, 3)


def test_a_threshold_that_takes_everything_leaves_the_largest():
    model, task = trained("cnn"), make_task("cnn")
    sites = sites_of(model, task)
    for least in (1, 3):
        keep = executed(sites, tensors(model), Below(1e9), least)
        assert all(1 <= int(k.sum()) <= least * len(one.members) for one, k in zip(sites, keep.values(), strict=True))


def test_tied_layers_that_disagree_leave_as_many_as_were_asked():
    """One would lose the first half and the other the second: what they agree on is all of them."""
    model = trained("cnn")
    sites, _ = scaled(model, make_task("cnn").example, couple(model, make_task("cnn").example))
    one, named = next(site for site in sites if len(site.members) == 2), tensors(model)
    first, second = (named[part.name].data for part in one.members)
    half = len(first) // 2
    first[:half], first[half:] = 0.001, 1
    second[:half], second[half:] = 2, 0.001
    keep = executed(sites, named, Below(), half)[one.site.name]
    assert keep.tolist() == [True] * half + [False] * half  # the largest on average


def test_notes_say_what_the_threshold_made_of_the_plan():
    model, task = trained("cnn"), make_task("cnn")
    done = prune(model, MaskSparsity(steps=2, strength=0.05), task)
    text = "\n".join(done.notes)
    assert "0 of 48 channels removed by the threshold (0.0%)" in text
    assert "above the threshold 36 of 36 condemned scales, below it 0 of those kept; train for longer" in text
    assert "scales at zero swing by up to 0.025, beyond the threshold of 0.01" in text
    assert "scales below 0.01" in done.history.curves


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"sparsity": 50}, r"Did you mean 0.5"),
        ({"steps": 0}, r"steps=0"),
        ({"tune": -1}, r"tune=-1"),
        ({"strength": 0.0}, r"strength=0"),
        ({"plan": Ranked(steps=-1)}, r"a search of -1 steps"),
        ({"plan": Ranked(Wanda())}, r"a mask by Wanda was asked for, but it needs evidence \(input_square\)"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_trained(settings, says):
    with pytest.raises(SettingError, match=says):
        MaskSparsity(**settings).run(torch.nn.Linear(1, 1), None)


def test_frozen_scales_are_named():
    model, task = trained("cnn"), make_task("cnn")
    model.bn.weight.requires_grad_(False)
    with pytest.raises(SiteError, match=r"the scale bn.weight was to be penalised, but it is frozen"):
        tiny(MaskSparsity).run(model, task)


def test_parts_combine():
    model, task = trained("cnn"), make_task("cnn")
    method = tiny(MaskSparsity, slope=SmoothL1(), threshold=Energy(0.01), constants=Absorbed(), tune=3)
    done = prune(model, method, task)
    assert done.ledger.after.parameters < done.ledger.before.parameters
    assert len(done.history.losses) == method.steps + 3
    assert ScaleSize() == Ranked().criterion
    fit(done.model, task, 1)
