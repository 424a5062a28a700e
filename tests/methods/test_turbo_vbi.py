"""Turbo-VBI (paper 23): messages against enumeration, beliefs against integrals, and runs of zeros on digits."""

import copy
import itertools
import math

import pytest
import tiny
import torch
from scipy import integrate, stats
from torch import nn

from secateur.axes import kept_of
from secateur.cut import weights
from secateur.edit import Mask, Remove
from secateur.errors import EvidenceError, ModelError, SettingError
from secateur.method import prune
from secateur.methods.turbo_vbi import (
    Extrinsic,
    Gamma,
    Grid,
    Joint,
    Marginal,
    MeanField,
    Posterior,
    Priors,
    Rows,
    TurboVbi,
    as_matrix,
    empty_units,
    like_kernel,
    message,
    predictions,
    runs,
)
from secateur.site import tensors
from secateur.train import Snapshot, fit

PRIORS = Priors(Gamma(1.0, 1.0), Gamma(1.0, 0.01), 0.5)


def odds(chance):
    return math.log(chance / (1 - chance))


# Module B


def by_enumeration(evidence, begins, ends):
    """What all others say of each support of a grid, from every state of all: [rows, columns]."""
    rows, columns = evidence.shape
    share = begins / (begins + ends)
    alone = [1 - share, share]
    follows = [[1 - begins, begins], [ends, 1 - ends]]
    on, off = torch.zeros_like(evidence), torch.zeros_like(evidence)
    for state in itertools.product((0, 1), repeat=rows * columns):
        s = torch.tensor(state).reshape(rows, columns)
        chance = 1.0
        for i, j in itertools.product(range(rows), range(columns)):
            chance *= alone[s[i, j]]
            if j:
                chance *= follows[s[i, j - 1]][s[i, j]] / alone[s[i, j]]
            if i:
                chance *= follows[s[i - 1, j]][s[i, j]] / alone[s[i, j]]
        chance *= math.exp(float((evidence * s).sum()))
        on, off = on + chance * s, off + chance * (1 - s)
    return torch.log(on / off) - evidence


def test_a_message_by_hand():
    # a quarter is active; after an active one 0.7 are: 0.7 / 0.3 over 0.25 / 0.75
    sure = message(torch.tensor([60.0, -60.0], dtype=torch.float64), 0.1, 0.3)
    assert sure.tolist() == pytest.approx([math.log((0.7 / 0.3) / (0.25 / 0.75)), math.log((0.1 / 0.9) * 3)])
    # who knows nothing beyond the share says nothing
    assert float(message(torch.tensor(odds(0.25)), 0.1, 0.3)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("begins", "ends"), [(0.1, 0.3), (0.4, 0.05), (0.2, 0.9)])
def test_the_chain_is_exact(begins, ends):
    evidence = 2 * torch.randn(2, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    found, changed = Rows(begins, ends).extrinsic(evidence)
    for row in range(2):
        torch.testing.assert_close(
            found[row], by_enumeration(evidence[row : row + 1], begins, ends)[0], rtol=0, atol=1e-6
        )
    assert changed == 0


def test_a_chain_drawn_from_the_prior_is_read_through_noise_as_enumeration_reads_it():
    draw, state = torch.Generator().manual_seed(5), []
    for _ in range(12):
        chance = 0.25 if not state else (0.7 if state[-1] else 0.1)
        state.append(int(torch.rand((), generator=draw) < chance))
    evidence = (torch.tensor([state], dtype=torch.float64) - 0.5) * 3 + torch.randn(1, 12, generator=draw).double()
    found, _ = Rows(0.1, 0.3).extrinsic(evidence)
    marginal = torch.sigmoid(found + evidence)
    torch.testing.assert_close(
        marginal, torch.sigmoid(by_enumeration(evidence, 0.1, 0.3) + evidence), rtol=0, atol=1e-6
    )


def test_a_grid_of_one_row_or_column_is_the_chain_and_a_small_one_is_near():
    evidence = torch.randn(1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    exact, _ = Rows(0.1, 0.3).extrinsic(evidence)
    for shape in ((1, 8), (8, 1)):
        found, changed = Grid(0.1, 0.3, sweeps=60, damping=0.0).extrinsic(evidence.reshape(shape))
        torch.testing.assert_close(found.reshape(1, 8), exact)
        assert changed < 1e-4
    patch = 2 * torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    found, _ = Grid(0.2, 0.6).extrinsic(patch)
    truth = by_enumeration(patch, 0.2, 0.6)
    off = (torch.sigmoid(found) - torch.sigmoid(truth)).abs()
    assert float(off.max()) < 0.06  # loopy: near, not exact
    assert float(off.mean()) < 0.5 * float((torch.sigmoid(truth) - 0.25).abs().mean())


def test_without_coupling_nothing_is_said():
    evidence = torch.randn(3, 5, dtype=torch.float64)
    for structure in (Rows(0.25, 0.75), Grid(0.25, 0.75)):
        found, _ = structure.extrinsic(evidence)
        torch.testing.assert_close(found, torch.full_like(found, odds(0.25)))
        assert structure.remarks() == [
            "begins + ends = 1: no support says anything of its neighbours, each is active with chance 0.25"
        ]
    assert Rows().remarks() == []


def test_messages_of_a_grid_stop_and_say_how_far_they_came():
    evidence = torch.randn(20, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    _, changed = Grid(sweeps=1).extrinsic(evidence)
    assert changed > 0.01
    _, settled = Grid(sweeps=200).extrinsic(evidence)
    assert settled < 1e-4


def test_marginals_count_twice_what_extrinsics_count_once():
    weak = torch.full((1, 6), 0.3, dtype=torch.float64)

    def rounds(by):
        prior = torch.full_like(weak, odds(0.25))
        for _ in range(12):
            sent = by.sent(prior + weak, prior)
            prior = by.taken(Rows(0.1, 0.3).extrinsic(sent)[0], sent)
        return prior

    once, _ = Rows(0.1, 0.3).extrinsic(weak)
    torch.testing.assert_close(rounds(Extrinsic()), once)  # a second round adds nothing
    assert float(rounds(Marginal()).abs().min()) > 1e3


# Module A


def student(w, given):
    """The density of a real weight whose precision is Gamma: by integration over the precision."""
    found, _ = integrate.quad(
        lambda r: stats.norm.pdf(w, scale=r**-0.5) * stats.gamma.pdf(r, given.shape, scale=1 / given.rate), 0, math.inf
    )
    return found


@pytest.mark.parametrize("w", [0.05, 0.3, 1.5])
def test_joint_beliefs_are_the_integrals(w):
    prior = torch.tensor([odds(0.25)], dtype=torch.float64)
    square = torch.tensor([w * w], dtype=torch.float64)
    precision, found = Joint().fitted(square, prior, prior, PRIORS)
    truth = math.log(student(w, PRIORS.active) / student(w, PRIORS.idle))
    assert float(found - prior) == pytest.approx(truth, rel=1e-4)
    chance = float(torch.sigmoid(found))
    assert float(precision) == pytest.approx(
        chance * 1.5 / (1 + w * w / 2) + (1 - chance) * 1.5 / (0.01 + w * w / 2), rel=1e-6
    )


def test_a_complex_weight_counts_double():
    priors = Priors(Gamma(1.0, 1.0), Gamma(1.0, 0.01), 1.0)
    zero = torch.zeros(1, dtype=torch.float64)
    _, found = Joint().fitted(torch.tensor([0.09], dtype=torch.float64), zero, zero, priors)
    # the integral of rho exp(-rho w^2) over Gamma(1, b) is b / (b + w^2)^2
    assert float(found) == pytest.approx(math.log((1 / 1.09**2) / (0.01 / 0.1**2)))


def test_one_turn_of_the_mean_field_by_hand():
    half = torch.zeros(1, dtype=torch.float64)
    square = torch.tensor([0.5], dtype=torch.float64)
    precision, found = MeanField(sweeps=1).fitted(square, half, half, PRIORS)
    rate = 0.25 + 0.5 * 1 + 0.5 * 0.01  # half active: shape 1.5
    assert float(precision) == pytest.approx(1.5 / rate)
    assert float(found) == pytest.approx(-math.log(0.01) - 0.99 * 1.5 / rate)  # shapes of 1: E log rho cancels
    # other shapes, and the density written out
    priors = Priors(Gamma(2.0, 1.5), Gamma(0.5, 0.02), 0.5)
    _, found = MeanField(sweeps=1).fitted(square, half, half, priors)
    shape, rate = 0.5 * 2 + 0.5 * 0.5 + 0.5, 0.25 + 0.5 * 1.5 + 0.5 * 0.02
    log_mean = float(torch.digamma(torch.tensor(shape, dtype=torch.float64))) - math.log(rate)
    on = 2 * math.log(1.5) - math.lgamma(2) + log_mean - 1.5 * shape / rate
    off = 0.5 * math.log(0.02) - math.lgamma(0.5) - 0.5 * log_mean - 0.02 * shape / rate
    assert float(found) == pytest.approx(on - off)


def test_with_published_priors_the_mean_field_keeps_even_a_zero():
    nothing, alone = torch.zeros(1, dtype=torch.float64), torch.tensor([odds(0.25)], dtype=torch.float64)
    _, mean_field = MeanField(200).fitted(nothing, alone, nothing, PRIORS)
    _, joint = Joint().fitted(nothing, alone, nothing, PRIORS)
    assert float(mean_field) > 0 > float(joint)
    _, near = MeanField(200).fitted(nothing, alone, nothing, Priors(Gamma(1, 1), Gamma(1, 0.5), 0.5))
    assert float(near) < 0


def test_nothing_overflows():
    squares = torch.tensor([0.0, 1e-300, 1e300], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)
    for family in (Joint(), MeanField()):
        for given in (Gamma(1.0, 1e-12), Gamma(300.0, 1e-3)):
            precision, found = family.fitted(squares, zero - 700, zero, Priors(Gamma(300.0, 300.0), given, 0.5))
            assert bool(precision.isfinite().all())
            assert bool(found.isfinite().all())


# Sampling


def posterior(model, **settings):
    sites = weights(model)
    return Posterior(model, sites, PRIORS, Joint(), 0.25, 1000, **settings)


@pytest.mark.parametrize(
    "layer", [nn.Linear(6, 3), nn.Conv2d(4, 3, 3, padding=1, stride=2, groups=1), nn.Conv1d(4, 6, 3, groups=2)]
)
def test_outputs_have_the_mean_and_the_variance_of_sampled_weights(layer):
    model = nn.Sequential(layer)
    rule = posterior(model, spread=0.5)
    x = torch.randn(2, *((6,) if isinstance(layer, nn.Linear) else (4, 5, 5) if layer.weight.dim() == 4 else (4, 9)))
    hook = layer.register_forward_hook(rule._sample(rule.beliefs[0]))
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        seen = torch.stack([model(x) for _ in range(1500)])
        sigma = rule.beliefs[0].spread.exp()
        plain = layer.weight.clone()
        hook.remove()
        drawn = []
        for _ in range(1500):
            layer.weight.copy_(plain + sigma * torch.randn_like(plain))
            drawn.append(model(x))
        layer.weight.copy_(plain)
    drawn = torch.stack(drawn)
    torch.testing.assert_close(seen.mean(0), drawn.mean(0), atol=0.15, rtol=0.1)
    torch.testing.assert_close(seen.std(0), drawn.std(0), atol=0.03, rtol=0.1)


def test_samples_are_for_training_only_and_hooks_go():
    model, task = tiny.mlp(), tiny.toy_vectors()
    rule = posterior(model)
    seen = []
    fit(model, task, 2, [rule], watch=lambda loop: seen.append([task.measure(loop.model) for _ in range(2)]))
    assert all(first == second for first, second in seen)
    model.train()
    x = next(iter(task.batches("val"))).inputs[0]
    assert torch.equal(model(x), model(x))


def test_sigma_is_trained():
    model, task = tiny.mlp(), tiny.toy_vectors()
    rule = posterior(model)
    before = [b.spread.detach().clone() for b in rule.beliefs]
    fit(model, task, 30, [rule])
    for old, belief in zip(before, rule.beliefs, strict=True):
        moved = (belief.spread.detach() - old).abs()
        assert float(moved.median()) > 0.05
        assert float(moved.std()) > 0


def test_a_training_taken_up_again_is_the_one_that_was_not_interrupted():
    task, kept = tiny.toy_vectors(), []
    whole, again = tiny.mlp(), tiny.mlp(seed=3)
    fit(whole, task, 9, [posterior(whole, every=4)],
        watch=lambda loop: kept.append(Snapshot.of(loop.model, loop)) if loop.step == 5 else None)  # fmt: skip
    fit(again, task, 9, [posterior(again, every=4)], resume_from=kept[0])
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters(), strict=True))


def test_as_many_terms_as_there_are_answers():
    assert predictions(tiny.toy_vectors()) == 1024 - 256
    assert predictions(tiny.toy_text()) == 8192


# What is left


def test_kernels_lie_as_tiles():
    kernel = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    matrix = as_matrix(kernel)
    assert matrix.shape == (4, 6)
    assert torch.equal(matrix[2:4, 4:6], kernel[1, 2])
    for shape in ((2, 3, 2, 2), (4, 5), (4, 2, 3), (2, 3, 2, 2, 2)):
        weight = torch.randn(shape)
        assert torch.equal(like_kernel(as_matrix(weight), shape), weight)


def test_runs_by_hand():
    keep = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 1]], dtype=torch.bool)
    assert runs(keep) == (5, 8 / 5)
    assert runs(torch.zeros(2, 3, dtype=torch.bool)) == (0, 0.0)


def test_units_that_nothing_makes_or_nothing_reads_are_empty():
    model = tiny.mlp()
    keep = {site.name: torch.ones(site.shape, dtype=torch.bool) for site in weights(model)}
    assert empty_units(model, tiny.toy_vectors().example, keep) == ([], [])
    keep["0.weight"][3] = False  # nothing makes it
    keep["2.weight"][:, 7] = False  # nothing reads it
    keep["4.weight"][:, 5] = False  # of the next layer
    keep["0.weight"][:, 2] = False  # an input nobody reads is no unit
    masks, notes = empty_units(model, tiny.toy_vectors().example, keep)
    assert notes == []
    assert [(~mask.keep).nonzero().flatten().tolist() for mask in masks] == [[3, 7], [5]]


@pytest.mark.parametrize("family", ["mlp", "cnn"])
def test_empty_units_are_taken_out_and_masked_is_removed(family, monkeypatch):
    model, task = tiny.trained(family), tiny.make_task(family)
    method = TurboVbi(rounds=1, steps=4, every=2, samples=64)
    chosen = TurboVbi.chosen

    def emptied(self, posterior, named):
        keep = chosen(self, posterior, named)
        site = posterior.sites[0 if family == "mlp" else 1]  # of the CNN, within a block
        keep[site.name][2:5] = False
        return keep

    monkeypatch.setattr(TurboVbi, "chosen", emptied)
    done = prune(model, method, task)
    removed = [edit for edit in done.edits if isinstance(edit, Remove)]
    assert removed
    monkeypatch.setattr(TurboVbi, "taken_out", lambda self, model, empty: [])
    left = prune(model, method, task)
    x = next(iter(task.batches("val"))).inputs[0]
    torch.testing.assert_close(done.model.eval()(x), left.model.eval()(x), atol=1e-4, rtol=1e-4)
    assert done.ledger.after.parameters < left.ledger.after.parameters == left.ledger.before.parameters
    assert done.ledger.removed == done.ledger.prunable - sum(
        int((p != 0).sum()) if p.dim() > 1 else p.numel()
        for name, p in done.model.named_parameters()
        if name in {part.name for e in done.edits if isinstance(e, (Mask, Remove)) for part in e.site.parts}
    )


def test_its_price_counts_every_step_it_takes():
    method = TurboVbi(rounds=3, steps=7, every=5, tune=4, samples=64)
    done = method.run(tiny.mlp(), tiny.toy_vectors())
    assert method.training_steps() == len(done.history.losses) == 25


def test_it_reports_what_it_reached():
    done = prune(tiny.trained("mlp"), TurboVbi(rounds=2, steps=20, every=5, samples=64), tiny.toy_vectors())
    assert TurboVbi().budget() is None
    assert done.notes[0].startswith("a sparsity of ")
    assert "% was found; " in done.notes[0]
    found = float(done.notes[0].split()[3].rstrip("%")) / 100
    masks = {e.site.name: e for e in done.edits if isinstance(e, Mask) and e.site.kind == "weight"}
    first = [e for e in done.edits if isinstance(e, Mask)][:3]
    assert len(masks) == 3
    assert found == pytest.approx(1 - sum(e.kept for e in first) / sum(e.site.units for e in first), abs=1e-4)


def test_a_sparsity_is_met_by_rank_and_said_to_be_asked_for():
    done = prune(tiny.trained("mlp"), TurboVbi(sparsity=0.7, rounds=1, steps=10, samples=64), tiny.toy_vectors())
    first = [e for e in done.edits if isinstance(e, Mask)][:3]
    assert sum(e.kept for e in first) == kept_of(sum(e.site.units for e in first), 0.7)
    assert done.notes[0].startswith("a sparsity of 69.95%") and "was asked for, the most likely active" in done.notes[0]


def test_a_layer_of_which_nothing_is_active_is_refused():
    with pytest.raises(EvidenceError) as caught:
        TurboVbi(structure=Rows(1e-6, 0.9), rounds=1, steps=2).run(tiny.trained("mlp"), tiny.toy_vectors())
    assert str(caught.value) == (
        "the weights of 0.weight that are likely active were to stay, but none is: the network would be cut in two.\n"
        "Lower kl=1, train longer, let more begin in structure=, or leave it out with exclude=."
    )


def test_weights_that_two_modules_share_have_no_prior():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    model[2].weight = model[0].weight
    done = prune(model, TurboVbi(rounds=1, steps=5, samples=64), tiny.toy_vectors())
    assert "left dense, as several modules share them: 0.weight" in done.notes
    assert [edit.site.name for edit in done.edits if isinstance(edit, Mask)][:1] == ["4.weight"]
    assert done.model[2].weight is done.model[0].weight
    assert bool((done.model[0].weight != 0).all())
    model[4] = nn.Identity()
    with pytest.raises(ModelError, match=r"weights of 0\.weight were to be given a prior, but each is one tensor"):
        prune(model, TurboVbi(rounds=1, steps=5, samples=64), tiny.toy_vectors())


def test_networks_it_cannot_sample_are_refused_before_data_is_read():
    with pytest.raises(ModelError, match="GRU is no linear layer or convolution, whose mean and variance are known"):
        TurboVbi().run(tiny.rnn(), tiny.toy_sequences())

    class Aside(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 4)

        def forward(self, x):
            return x @ self.inner.weight.T

    with pytest.raises(ModelError, match="its module is not called when the network runs"):
        TurboVbi(steps=2).run(Aside(), tiny.toy_vectors())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"structure": Rows(0.0, 0.3)}, "both are chances between 0 and 1"),
        ({"structure": Grid(sweeps=0)}, "one sweep is the least"),
        ({"idle": Gamma(1.0, 2.0)}, "idle weights are those that are held near zero"),
        ({"active": Gamma(0.0, 1.0)}, "shape and rate of a Gamma are above 0"),
        ({"rounds": 0}, "one is the least"),
        ({"kl": -1.0}, "it is 0 or more"),
        ({"spread": 0.0}, "it is above 0"),
        ({"sparsity": 1.0}, "fraction removed"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, says):
    with pytest.raises(SettingError, match=says):
        TurboVbi(**settings).check()


def test_runs_are_longer_with_the_chain_than_without_on_digits():
    """At toy size: digits, 64-64-32-10, equal sparsity and steps; accuracy within two points of supports apart."""
    from secateur.tasks.images import digits
    from secateur.tasks.learners import Adam

    task = digits(flat=True, batch=64, learner=Adam(3e-3))
    dense = tiny.seeded(
        lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), 0
    )
    fit(dense, task, 114)
    long, right = {}, {}
    for name, structure in (("chain", Rows()), ("alone", Rows(0.25, 0.75))):
        method = TurboVbi(structure=structure, sparsity=0.7, kl=0.3, rounds=3, steps=57, tune=57)
        done = prune(copy.deepcopy(dense), method, task)
        first = [e for e in done.edits if isinstance(e, Mask)][:3]
        counts = [runs(e.keep)[0] for e in first]
        long[name] = sum(e.kept for e in first) / sum(counts)
        right[name] = task.measure(done.model, "test")["accuracy"]
    assert long["chain"] > 1.4 * long["alone"]
    assert right["chain"] > right["alone"] - 0.02
    assert right["chain"] > 0.9


def test_a_trained_residual_network_of_the_pack_runs(data):
    from secateur.models import open_model
    from secateur.tasks.images import cifar10
    from secateur.tasks.learners import Sgd

    task = cifar10(train_size=48, val_size=16, test_size=64, batch=16, learner=Sgd(0.01))
    model = open_model("resnet20").model
    done = prune(model, TurboVbi(rounds=1, steps=2, every=1, samples=16, kl=0.05), task)
    assert "% was found" in done.notes[0]
    assert bool(done.model(task.example.inputs[0]).isfinite().all())
    assert 0 < done.ledger.sparsity < 1
    assert sum(isinstance(e, Mask) and e.site.kind == "weight" for e in done.edits) >= len(weights(model))
    assert tensors(done.model).keys() == tensors(model).keys()
