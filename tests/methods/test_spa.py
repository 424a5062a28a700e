"""SPA: any criterion of coupled units, budgets met in what is left, and OBSPA's mending."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import make_task, trained
from torch import nn

from secateur import prune
from secateur.axes import Gradient, Magnitude, Uniform, Wanda
from secateur.axes.groups import AsTheyAre, ByMean, JointObs, grouped_scores, mended
from secateur.axes.probes import Grasp, Snip, Synflow
from secateur.axes.taylor import Average, Largest, Total
from secateur.errors import BudgetError, EvidenceError, SettingError
from secateur.graph import couple
from secateur.methods.spa import Anew, Mend, Noise, Spa, UniformNoise
from secateur.outcome import count_flops
from secateur.task import Batch
from secateur.tasks.labelled import Labelled


def net(*weights: list[list[float]]) -> nn.Sequential:
    """Linear layers without biases and nothing between them."""
    layers = []
    for rows in weights:
        layer = nn.Linear(len(rows[0]), len(rows), bias=False)
        layer.weight.data = torch.tensor(rows)
        layers.append(layer)
    return nn.Sequential(*layers)


def rows(inputs: torch.Tensor, classes: int = 2) -> Labelled:
    labels = torch.arange(len(inputs)) % classes
    held = (inputs, labels)
    return Labelled("rows", {"train": held, "val": held, "test": held}, batch=8)


def test_a_unit_s_score_is_what_its_shares_are_together():
    model = net([[1.0, 2.0], [0.0, 1.0]], [[3.0, 1.0], [1.0, 1.0]])
    task = rows(torch.randn(8, 2, generator=torch.Generator().manual_seed(0)))
    (site,) = couple(model, task.example).sites
    batches = list(task.batches("calibration", 8))

    def scores(combine, normal):
        found = grouped_scores(model, [site], Magnitude(), combine, normal, batches, task, 0.5)
        return found[site.name].tolist()

    # unit 0 writes |1| + |2| and is read by |3| + |1|; unit 1 writes |0| + |1| and is read by |1| + |1|
    assert scores(Total(), AsTheyAre()) == [7.0, 3.0]
    assert scores(Average(), AsTheyAre()) == [3.5, 1.5]
    assert scores(Largest(), AsTheyAre()) == [4.0, 2.0]
    assert scores(Total(), ByMean()) == pytest.approx([1.4, 0.6])


def test_joint_obs_by_hand():
    """Inputs (1, 0) and (0, 2): the gram is diag(1, 4), so a column costs its square times that, over the inverse."""
    model = net([[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [2.0, 0.0]])
    task = rows(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    (site,) = couple(model, task.example).sites
    batches = list(task.batches("calibration", 2))
    found = grouped_scores(model, [site], JointObs(damp=0.0), Total(), AsTheyAre(), batches, task, 0.5)
    assert found[site.name].tolist() == pytest.approx([5.0, 4.0])


def test_mended_is_least_squares():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(50, 6, generator=draw).double(), torch.randn(3, 6, generator=draw).double()
    x[:, 5] = x[:, 0] - 2 * x[:, 1] + 0.1 * x[:, 5]
    keep = torch.tensor([True, True, True, True, False, False])
    found = mended(weight, x.T @ x, keep)
    wanted = torch.linalg.lstsq(x[:, keep], x @ weight.T).solution.T
    torch.testing.assert_close(found[:, keep], wanted)
    assert bool((found[:, ~keep] == 0).all())


def test_a_channel_that_two_others_make_up_for_costs_nothing():
    """Unit 2 is the sum of units 0 and 1, and the largest: OBSPA takes it and loses nothing, magnitude would not."""
    model = net([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 2.0, 3.0], [2.0, -1.0, 3.0]])
    task = rows(torch.randn(16, 2, generator=torch.Generator().manual_seed(0)))
    x = torch.randn(4, 2)
    before = model(x)
    plain = prune(model, Spa(sparsity=0.3, of="units", samples=16), task)
    method = Spa(sparsity=0.34, of="units", criterion=JointObs(damp=1e-6), repair=Mend(damp=1e-6), samples=16)
    done = prune(model, method, task)
    assert [tuple(p.shape) for p in done.model.parameters()] == [(2, 2), (2, 2)]
    torch.testing.assert_close(done.model(x), before, rtol=1e-4, atol=1e-4)
    assert plain.model[0].weight.shape == (2, 2) or plain.model[0].weight.shape == (3, 2)
    noise = prune(model, replace(method, data=Noise()), task)
    torch.testing.assert_close(noise.model(x), before, rtol=1e-4, atol=1e-4)


class Forked(nn.Module):
    """Two layers side by side, one that reads both, and a shortcut round them."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.both = nn.Linear(4, 6), nn.Linear(4, 6), nn.Linear(12, 4)

    def forward(self, x):
        return x + self.both(torch.cat([torch.sigmoid(self.one(x)), torch.sigmoid(self.two(x))], -1))


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.last = nn.ModuleList([Forked(), Forked()]), nn.Linear(4, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.last(x)


def test_a_matrix_that_reads_two_sites_is_solved_for_what_both_leave():
    """Behind a concatenation, what goes of one site gets no weight again when the other is mended."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Stacked()
    task = rows(torch.randn(64, 4, generator=torch.Generator().manual_seed(1)))
    sites = [site for site in couple(model, task.example).sites if ".one" in site.name or ".two" in site.name]
    assert len(sites) == 4
    assert len({site.block for site in sites}) == 2
    keep = {site.name: torch.arange(site.units) % 2 == 0 for site in sites}
    batches, work = list(task.batches("calibration", 64)), copy.deepcopy(model)
    Mend(damp=1e-9).edits(work, sites, keep, batches)
    alive = torch.arange(12) % 2 == 0
    assert bool((work.blocks[0].both.weight[:, ~alive] == 0).all())
    with torch.no_grad():
        flow = torch.cat([batch.inputs[0] for batch in batches])
        inner = torch.cat([torch.sigmoid(model.blocks[0].one(flow)), torch.sigmoid(model.blocks[0].two(flow))], -1)
        wanted = torch.linalg.lstsq(inner[:, alive].double(), inner.double() @ model.blocks[0].both.weight.double().T)
    torch.testing.assert_close(work.blocks[0].both.weight[:, alive].double(), wanted.solution.T, rtol=1e-3, atol=1e-3)


def test_uniform_noise_is_in_the_unit_interval_and_tokens_are_the_example_s():
    (batch, rest) = UniformNoise(batch=6).batches(make_task("cnn"), 10)
    (pixels,) = batch.inputs
    assert (len(pixels), rest.size, pixels.shape[1:]) == (6, 4, make_task("cnn").example.inputs[0].shape[1:])
    assert 0 <= float(pixels.min()) < 0.02
    assert 0.98 < float(pixels.max()) < 1
    assert float(pixels.mean()) == pytest.approx(0.5, abs=0.05)
    task = make_task("decoder")
    (tokens,), (known,) = UniformNoise().batches(task, 4)[0].inputs, task.example.inputs
    assert set(tokens.flatten().tolist()) <= set(known.flatten().tolist())
    model = trained("cnn")
    method, task = Spa(criterion=JointObs(), repair=Mend(), data=UniformNoise(), samples=16), make_task("cnn")
    done = prune(model, method, task)
    assert bool(done.model(task.example.inputs[0]).isfinite().all())


@pytest.mark.parametrize("make", [JointObs, Mend])
def test_a_damp_that_cannot_be_is_refused(make):
    for damp in (-1.0, float("nan")):
        with pytest.raises(SettingError, match="it adds to a diagonal: 0 or more"):
            make(damp=damp)
    with pytest.raises(SettingError, match="one example is the least"):
        Noise(batch=0)


@pytest.mark.parametrize("settings", [{"criterion": JointObs(damp=0.0)}, {"repair": Mend(damp=0.0)}])
def test_a_gram_without_an_inverse_is_told(settings):
    model = net([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], [[1.0, 2.0, 3.0], [2.0, -1.0, 3.0]])
    task = rows(torch.zeros(4, 2))
    with pytest.raises(EvidenceError, match="1.weight were to be inverted.*is singular"):
        Spa(sparsity=0.34, of="units", samples=4, **settings).run(model, task)


@pytest.mark.parametrize("of", ["weights", "flops", "bytes", "parameters", "units"])
@pytest.mark.parametrize("family", ["cnn", "decoder"])
def test_the_budget_is_met_in_what_is_left(family, of):
    model, task = trained(family), make_task(family)
    done = prune(model, Spa(sparsity=0.4, of=of), task)
    before, after = done.ledger.before, done.ledger.after
    sites = {e.site.name: e for e in done.edits}
    ledger = done.ledger
    if of == "flops":
        total = count_flops(model, task.example)
        reached = 1 - count_flops(done.model, task.example) / total
    elif of == "units":
        reached = ledger.units_removed / ledger.units
    elif of == "bytes":
        reached = 1 - after.memory_bytes / before.memory_bytes
    elif of == "parameters":
        reached = 1 - after.parameters / before.parameters
    else:
        reached = ledger.share
    # a unit of the widest site is the least that can go
    assert reached == pytest.approx(0.4, abs=0.04), (of, len(sites))


@pytest.mark.parametrize(
    "criterion", [Magnitude(), Wanda(), Gradient(), JointObs(), Snip(samples=8), Grasp(per_class=2), Synflow()]
)
def test_any_criterion_is_one_of_groups(criterion):
    model, task = trained("cnn"), make_task("cnn")
    done = prune(model, Spa(criterion=criterion, sparsity=0.3, samples=8), task)
    assert done.ledger.share == pytest.approx(0.3, abs=0.05)
    assert task.measure(done.model)["accuracy"] >= 0


def test_mending_and_fresh_statistics_beat_cutting_alone():
    model, task = trained("cnn"), make_task("cnn")
    losses = {}
    for name, more in {
        "cut": {},
        "mended": {"criterion": JointObs(), "repair": Mend(), "norms": Anew()},
    }.items():
        done = prune(model, Spa(sparsity=0.5, samples=64, **more), task)
        losses[name] = task.measure(done.model)["loss"]
    assert losses["mended"] < losses["cut"] - 0.05


def test_before_training_then_trained():
    model, task = trained("cnn"), make_task("cnn")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            with torch.random.fork_rng():
                torch.manual_seed(1)
                module.reset_parameters()
    done = prune(model, Spa(criterion=Snip(samples=32), sparsity=0.3, steps=60), task, measure="val")
    measured = done.record
    assert measured.measured("after")["loss"] < measured.measured("before")["loss"]
    assert done.history is not None


def test_no_site_vanishes_and_what_is_impossible_is_said_first():
    model, task = trained("mlp"), make_task("mlp")
    done = prune(model, Spa(sparsity=0.9, of="units"), task)
    assert min(p.shape[0] for p in done.model.parameters()) >= 1
    with pytest.raises(BudgetError) as caught:
        prune(model, Spa(sparsity=0.99), task)
    assert caught.value.asked == "a sparsity of 0.99 of the weights was asked for"
    assert "can be reached with one unit left at each of 2 sites" in caught.value.found


def test_protected_sites_and_multiples():
    model, task = trained("cnn"), make_task("cnn")
    done = prune(model, Spa(sparsity=0.3, round_to=4, protect=("conv*",), allocation=Uniform()), task)
    shapes = {n: tuple(p.shape) for n, p in done.model.named_parameters()}
    assert shapes["conv.weight"][0] == 8
    assert all(s[0] % 4 == 0 for n, s in shapes.items() if n != "fc.bias" and not n.startswith("fc"))
    with pytest.raises(SettingError) as caught:
        Spa(of="watts").check()
    assert caught.value.asked == "a sparsity of 'watts' was asked for"


def test_a_tied_tensor_counts_once():
    """Both names of a tied matrix are one tensor; its scores are not doubled."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
            self.b.weight = self.a.weight
            self.c = nn.Linear(4, 2, bias=False)

        def forward(self, x):
            return self.c(self.b(torch.relu(self.a(x))))

    torch.manual_seed(0)
    model, task = Tied(), rows(torch.randn(8, 4))
    sites = couple(model, Batch((torch.randn(2, 4),))).sites
    for site in sites:
        assert len({p.name for p in site.parts}) == len(
            {id(dict(model.named_parameters())[p.name]) for p in site.parts}
        )
    del task


def test_the_model_given_is_not_changed():
    model, task = trained("cnn"), make_task("cnn")
    before = copy.deepcopy(model.state_dict())
    prune(model, Spa(criterion=JointObs(), repair=Mend(), norms=Anew(), samples=16), task)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
