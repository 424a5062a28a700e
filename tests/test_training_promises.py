"""What training promises, whatever surrounds it: wrappers, precisions, averages, optimizers, and taking up again."""

import copy
import math
import shutil

import pytest
import tiny
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from secateur.axes import Erk
from secateur.axes.averaging import SparseAverage
from secateur.axes.growth import Rewire, random_masks
from secateur.axes.patterns import NM
from secateur.axes.rules import Gradual, Hold, Refined, Shadow, StraightThrough, sparsity_of
from secateur.axes.schedules import Cosine, Schedule
from secateur.cut import weights
from secateur.edit import apply_
from secateur.errors import EvidenceError, ResumeError, SettingError
from secateur.integrations.optimizer import PrunedOptimizer
from secateur.method import Budget
from secateur.site import tensors
from secateur.task import forever
from secateur.train import Snapshot, attach, fit

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5),
    "adamw, fused": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.5, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.005, momentum=0.9),
}
RULES = {
    "gradual": lambda sites: Gradual(sites, Schedule(end=0.8, until=0.7, every=3)),
    "gradual, for good": lambda sites: Gradual(sites, Schedule(end=0.8, until=0.7, every=3), holder=Hold(sites)),
    "rewire": lambda sites: rewiring(sites),
    "straight through": lambda sites: gates(sites, StraightThrough()),
    "refined 2:4": lambda sites: gates(sites, Refined(1e-3), NM(2, 4)),
}


def rewiring(sites):
    exchange = Schedule(start=0.3, end=0.0, until=0.8, curve=Cosine(), every=4, falling=True)
    return Rewire(sites, random_masks(sites, Erk().spread(sites, Budget(0.7)), 0), exchange)


def gates(sites, flow, pattern=None):
    """Masks chosen anew before every step."""
    half = Schedule(start=0.5, end=0.5, until=1, every=1)
    return Gradual(sites, half, pattern=pattern, holder=Shadow(sites, flow=flow))


def batches(count, size=32):
    """Inputs and labels, the same every time."""
    draw = torch.Generator().manual_seed(7)
    return [(torch.randn(size, 16, generator=draw), torch.randint(0, 4, (size,), generator=draw)) for _ in range(count)]


def go(model, optimizer, some, *, accumulate=1, autocast=None, each=lambda: None):
    """What a user writes."""
    for x, y in some:
        optimizer.zero_grad()
        for part, labels in zip(x.chunk(accumulate), y.chunk(accumulate), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
                loss = nn.functional.cross_entropy(model(part), labels) / accumulate
            loss.backward()
        optimizer.step()
        each()


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def zeros_are(model, keep):
    named = tensors(model)
    return all(bool((named[name].detach()[~mask] == 0).all()) for name, mask in keep.items())


# Two lines in a loop of one's own, with every optimizer, precision and rule


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_weights_are_zero_and_as_many_as_logged_after_every_step(optimizer, rule, autocast):
    model = tiny.mlp()
    made, sites = OPTIMIZERS[optimizer](model.parameters()), weights(model)
    own = RULES[rule](sites)
    pruner = attach(made, model, own, steps=12)

    def check():
        assert zeros_are(model, own.keep)
        logged = pruner.loop.history.curves["sparsity"][-1][1]
        zeros = sum(int((tensors(model)[s.name] == 0).sum()) for s in sites)
        assert sparsity_of(own.keep) == logged
        masked = round(logged * sum(s.units for s in sites))
        # what grows starts from zero, and stays there while nothing flows through its unit
        assert zeros >= masked if isinstance(own, Rewire) else zeros == masked

    go(model, made, batches(12), accumulate=2, autocast=autocast, each=check)
    pruner.finish()
    assert zeros_are(model, own.keep)


@pytest.mark.parametrize("rule", RULES)
def test_a_half_precision_model_is_pruned_as_exactly(rule):
    model = tiny.mlp().bfloat16()
    made, own = torch.optim.AdamW(model.parameters(), 0.01), RULES[rule](weights(model))
    pruner = attach(made, model, own, steps=10)
    go(model, made, [(x.bfloat16(), y) for x, y in batches(10)])
    pruner.finish()
    assert zeros_are(model, own.keep)
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())


SLOW = pytest.param("gradual", "inductor", marks=pytest.mark.slow)  # machine code is made: half a minute of one core


@pytest.mark.parametrize(("rule", "backend"), [*((rule, "aot_eager") for rule in RULES), SLOW])
def test_a_compiled_model_trains_under_the_same_masks(rule, backend):
    if backend == "inductor" and shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler for torch.compile to use")
    compared = []
    for compiled in (False, True):
        model = tiny.mlp().double()
        sites = weights(model)
        forward = torch.compile(model, backend=backend) if compiled else model
        made, own = torch.optim.AdamW(forward.parameters(), 0.01), RULES[rule](sites)
        pruner = attach(made, forward, own, steps=8)
        go(forward, made, [(x.double(), y) for x, y in batches(8)])
        pruner.finish()
        assert zeros_are(model, own.keep)
        compared.append(own.keep)
    assert all(torch.equal(compared[0][name], compared[1][name]) for name in compared[0])


def test_what_is_compiled_goes_by_its_plain_names():
    model = tiny.mlp()
    plain = [site.name for site in weights(model)]
    whole = torch.compile(tiny.mlp(), backend="eager")
    assert [site.name for site in weights(whole)] == plain
    part = tiny.mlp()
    part[2] = torch.compile(part[2], backend="eager")
    assert [site.name for site in weights(part)] == plain
    assert Snapshot.of(whole).model.keys() == model.state_dict().keys()
    restored = torch.compile(tiny.mlp(seed=3), backend="eager")
    Snapshot.of(model).restore_(restored)
    assert torch.equal(tensors(restored)["0.weight"], model[0].weight)


@pytest.mark.parametrize("rule", RULES)
def test_accumulated_gradients_choose_the_masks_of_whole_batches(rule):
    compared = []
    for accumulate in (1, 4):
        model = tiny.mlp().double()
        made, own = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), RULES[rule](weights(model))
        pruner = attach(made, model, own, steps=12)
        go(model, made, [(x.double(), y) for x, y in batches(12)], accumulate=accumulate)
        pruner.finish()
        compared.append(own.keep)
    assert all(torch.equal(compared[0][name], compared[1][name]) for name in compared[0])


# Taking up again


@pytest.mark.parametrize("cut", [3, 5, 9])
@pytest.mark.parametrize("rule", RULES)
def test_any_run_goes_on_from_a_file_to_the_bit(rule, cut, tmp_path):
    some = batches(12)
    whole, part, later = tiny.mlp(), tiny.mlp(), tiny.mlp(seed=5)
    made = OPTIMIZERS["adamw"](whole.parameters())
    pruner = attach(made, whole, RULES[rule](weights(whole)), 12)
    go(whole, made, some, autocast=True)
    pruner.finish()

    made = OPTIMIZERS["adamw"](part.parameters())
    pruner = attach(made, part, RULES[rule](weights(part)), 12)
    go(part, made, some[:cut], autocast=True)
    pruner.snapshot().save(tmp_path / "cut")

    snapshot, made = Snapshot.load(tmp_path / "cut"), OPTIMIZERS["adamw"](later.parameters())
    snapshot.restore_(later, made)
    pruner = attach(made, later, RULES[rule](weights(later)), 12, resume_from=snapshot)
    go(later, made, some[cut:], autocast=True)
    pruner.finish()
    assert equal(whole, later)


@pytest.mark.parametrize("weights_first", [True, False])
@pytest.mark.parametrize("rule", RULES)
def test_a_wrapped_optimizer_is_a_checkpoint_by_itself(rule, weights_first, tmp_path):
    some = batches(12)

    def made(model):
        return PrunedOptimizer(OPTIMIZERS["sgd"](model.parameters()), model, RULES[rule](weights(model)), 12)

    whole, part, later = tiny.mlp(), tiny.mlp(), tiny.mlp(seed=5)
    optimizer = made(whole)
    go(whole, optimizer, some)
    history = optimizer.finish()
    assert history.curves["sparsity"]

    optimizer = made(part)
    go(part, optimizer, some[:5])
    torch.save({"model": part.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    found = torch.load(tmp_path / "checkpoint", weights_only=True)

    optimizer = made(later)
    loads = [
        lambda: later.load_state_dict(found["model"]),
        lambda: optimizer.load_state_dict(found["optimizer"]),
    ]
    for load in loads if weights_first else reversed(loads):
        load()
    go(later, optimizer, some[5:])
    optimizer.finish()
    assert equal(whole, later)
    with pytest.raises(ResumeError, match="this state is a plain optimizer's"):
        optimizer.load_state_dict(OPTIMIZERS["sgd"](later.parameters()).state_dict())


def test_a_wrapped_optimizer_serves_schedulers_scalers_and_closures():
    one, two = tiny.mlp(), tiny.mlp()
    plain = torch.optim.SGD(one.parameters(), 0.05, momentum=0.9)
    pruner = attach(plain, one, RULES["gradual"](weights(one)), 8)
    wrapped = PrunedOptimizer(
        torch.optim.SGD(two.parameters(), 0.05, momentum=0.9), two, RULES["gradual"](weights(two)), 8
    )
    falling = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 8) for o in (plain, wrapped)]
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    for i, (x, y) in enumerate(batches(8)):
        plain.zero_grad()
        nn.functional.cross_entropy(one(x), y).backward()
        plain.step()

        def closure(x=x, y=y):
            wrapped.zero_grad()
            loss = nn.functional.cross_entropy(two(x), y)
            loss.backward()
            return loss

        if i % 2:
            assert float(wrapped.step(closure).detach()) > 0
        else:
            wrapped.zero_grad()
            scaler.scale(nn.functional.cross_entropy(two(x), y)).backward()
            scaler.step(wrapped)
            scaler.update()
        for each in falling:
            each.step()
    pruner.finish()
    assert wrapped.finish().curves == pruner.loop.history.curves
    assert equal(one, two)
    assert plain.param_groups[0]["lr"] == wrapped.param_groups[0]["lr"] == 0


# Zeros survive


@pytest.mark.parametrize("decay", [0.9, None])
@pytest.mark.parametrize("rule", RULES)
def test_zeros_survive_averages_over_steps(rule, decay):
    model = tiny.mlp()
    made, own = OPTIMIZERS["adamw"](model.parameters()), RULES[rule](weights(model))
    average = AveragedModel(model, multi_avg_fn=SparseAverage(decay), use_buffers=True)
    plain = AveragedModel(model)
    pruner = attach(made, model, own, 12)

    def each():
        average.update_parameters(model)
        plain.update_parameters(model)
        assert zeros_are(average.module, own.keep)

    go(model, made, batches(12), each=each)
    pruner.finish()
    average.update_parameters(model)
    assert zeros_are(average.module, own.keep)
    assert not equal(average.module, model)
    if rule.startswith("gradual"):
        assert not zeros_are(plain.module, own.keep)  # a plain average remembers what was there


def test_an_average_is_that_of_the_steps_since_a_weight_was_zero():
    now = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 0.0]]), torch.tensor([[5.0, 6.0]])]
    mean, moving = torch.zeros(1, 2), torch.zeros(1, 2)
    mean.copy_(now[0])
    moving.copy_(now[0])
    for count, value in enumerate(now[1:], 1):
        SparseAverage(None)([mean], [value], count)
        SparseAverage(0.5)([moving], [value], count)
    assert torch.allclose(mean, torch.tensor([[3.0, 2.0]]))  # (1 + 3 + 5) / 3; 0 and a third of the way to 6
    assert torch.allclose(moving, torch.tensor([[3.5, 3.0]]))
    counts = torch.tensor(3)
    SparseAverage()([counts], [torch.tensor(8)], 5)
    assert int(counts) == 8
    with pytest.raises(SettingError, match=r"it is in \[0, 1\)"):
        SparseAverage(1.0)


@pytest.mark.parametrize("rule", RULES)
def test_zeros_survive_saving_in_the_middle_and_at_the_end(rule, tmp_path):
    from safetensors.torch import load_file, save_file

    model = tiny.mlp()
    made, own = OPTIMIZERS["adamw"](model.parameters()), RULES[rule](weights(model))
    pruner = attach(made, model, own, 12)
    go(model, made, batches(7))
    masks = {name: keep.clone() for name, keep in own.keep.items()}
    save_file(model.state_dict(), tmp_path / "middle")
    go(model, made, batches(5))
    pruner.finish()
    before = copy.deepcopy(model)
    apply_(model, own.masks())
    assert equal(model, before)  # the edits say what the model already is
    save_file(model.state_dict(), tmp_path / "end")
    for name, keep in ((tmp_path / "middle", masks), (tmp_path / "end", own.keep)):
        other = tiny.mlp(seed=1)
        other.load_state_dict(load_file(name))
        assert zeros_are(other, keep)


@pytest.mark.parametrize("rule", ["gradual, for good", "rewire"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_optimizer_remembers_nothing_of_what_is_gone(optimizer, rule):
    model = tiny.mlp()
    made, own = OPTIMIZERS[optimizer](model.parameters()), RULES[rule](weights(model))
    pruner = attach(made, model, own, 12)

    def check():
        for name, keep in own.keep.items():
            value = tensors(model)[name]
            for held in made.state[value].values():
                if isinstance(held, torch.Tensor) and held.shape == value.shape:
                    assert bool((held[~keep] == 0).all())

    go(model, made, batches(12), each=check)
    pruner.finish()


# Bad input


def test_an_optimizer_built_before_the_model_was_wrapped_is_refused():
    model = tiny.mlp()
    made = torch.optim.SGD(model.parameters(), 0.1)
    nn.utils.parametrizations.weight_norm(model[0])  # puts two new tensors in place of the weight
    sites = weights(tiny.mlp())
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    with pytest.raises(SettingError, match=r"weights of 2\.weight were to be pruned[\s\S]*built before the model"):
        attach(made, model, Hold([s for s in sites if s.name == "2.weight"]), 5)
    model[2].weight.requires_grad_(False)  # frozen: nothing steps it
    attach(made, model, Hold([s for s in sites if s.name == "2.weight"]), 5).finish()


def test_an_optimizer_that_goes_through_the_loss_many_times_is_refused():
    model = tiny.mlp()
    with pytest.raises(SettingError, match="no moment before and after"):
        attach(torch.optim.LBFGS(model.parameters()), model, RULES["gradual"](weights(model)), 5)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_stops_the_run_before_the_step_and_names_the_layer(bad):
    model = tiny.mlp()
    made = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = attach(made, model, RULES["gradual"](weights(model)), 5)
    (x, y), *_ = batches(1)
    nn.functional.cross_entropy(model(x), y).backward()
    model[2].weight.grad[3, 1] = bad
    before = copy.deepcopy(model)
    with pytest.raises(EvidenceError, match=r"step 1 of 5[\s\S]*gradient of 2\.weight holds NaN or infinity"):
        made.step()
    assert equal(model, before)
    with pytest.warns(UserWarning, match="training stopped after 0 of 5 steps"):
        pruner.finish()

    class Spoilt(nn.Module):
        """A finite loss whose gradient is not."""

        def __init__(self):
            super().__init__()
            self.inner = tiny.mlp()

        def forward(self, x):
            return self.inner(x) + torch.sqrt(torch.zeros_like(x[:, :1]) * self.inner[0].bias[0])

    with pytest.raises(EvidenceError, match=r"step 1 of 3[\s\S]*gradient of inner\.0\.bias"):
        fit(Spoilt(), tiny.toy_vectors(), 3)


def test_a_run_in_another_number_of_processes_is_not_taken_up_again(tmp_path):
    model = tiny.mlp()
    made = OPTIMIZERS["sgd"](model.parameters())
    pruner = attach(made, model, RULES["gradual"](weights(model)), 8)
    go(model, made, batches(3))
    snapshot = pruner.snapshot()
    assert snapshot.processes == 1
    from dataclasses import replace

    replace(snapshot, processes=4).save(tmp_path / "four")
    taken = Snapshot.load(tmp_path / "four")
    other = tiny.mlp()
    made = OPTIMIZERS["sgd"](other.parameters())
    with pytest.raises(ResumeError, match=r"again in one process, but[\s\S]*taken in 4 processes[\s\S]*weights_only"):
        attach(made, other, RULES["gradual"](weights(other)), 8, resume_from=taken)
    with pytest.raises(ResumeError, match="taken in 4 processes"):
        fit(tiny.mlp(), tiny.toy_vectors(), 8, [RULES["gradual"](weights(other))], resume_from=taken)
    fit(tiny.mlp(), tiny.toy_vectors(), 8, [RULES["gradual"](weights(other))], resume_from=taken.weights_only())


def test_batches_of_a_loop_follow_each_other(tmp_path):
    """The place in the data is part of what is taken up again: the second half sees what was not seen."""
    task, seen = tiny.toy_vectors(), []
    places = [(epoch, place) for (epoch, place, _), _ in zip(forever(task), range(30), strict=False)]

    def take(loop):
        seen.append((loop.epoch, loop.place))
        if loop.step == 26:
            Snapshot.of(loop.model, loop).save(tmp_path / "cut")

    fit(tiny.mlp(), task, 30, watch=take)
    first = list(seen)
    seen.clear()
    fit(tiny.mlp(), task, 30, watch=take, resume_from=Snapshot.load(tmp_path / "cut"))
    assert first[26:] == seen
    assert [(epoch, place - 1) for epoch, place in first] == places
