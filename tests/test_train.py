"""The training loop, its moments in three homes, and snapshots that restore and resume to the bit."""

import copy
import math

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.allocations import Global
from secateur.axes.rules import Gradual, Hold, LearningRate, Shadow, everything
from secateur.axes.schedules import Schedule
from secateur.cut import weights
from secateur.errors import EvidenceError, ModelError, ResumeError, SettingError
from secateur.site import tensors
from secateur.task import forever
from secateur.tasks.learners import AdamW
from secateur.train import History, Loop, Rule, Snapshot, attach, fit


class Diary(Rule):
    """Writes down each moment."""

    def __init__(self):
        self.seen = []

    def start(self, loop):
        self.seen.append(("start", loop.step))

    def before_forward(self, loop):
        self.seen.append(("before_forward", loop.step))

    def loss(self, loop, value):
        self.seen.append(("loss", loop.step))
        return value

    def before_step(self, loop):
        assert all(p.grad is not None for p in loop.model.parameters())
        self.seen.append(("before_step", loop.step))

    def after_step(self, loop):
        self.seen.append(("after_step", loop.step))

    def finish(self, loop):
        self.seen.append(("finish", loop.step))


def noisy(seed=0):
    """An MLP with batch norm and dropout: buffers and randomness of its own."""
    return tiny.seeded(
        lambda: nn.Sequential(nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 4)), seed
    )


def equal(a, b):
    """Whether two models are the same to the bit, buffers included."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def ramp(model, holder=None, until=0.7, every=3, **settings):
    sites = weights(model)
    return Gradual(sites, Schedule(end=0.8, until=until, every=every), holder=holder and holder(sites), **settings)


# fit


def test_the_six_moments_come_in_order():
    diary = Diary()
    fit(tiny.mlp(), tiny.toy_vectors(), 2, [diary])
    assert diary.seen == [
        ("start", 0),
        ("before_forward", 0),
        ("loss", 0),
        ("before_step", 0),
        ("after_step", 1),
        ("before_forward", 1),
        ("loss", 1),
        ("before_step", 1),
        ("after_step", 2),
        ("finish", 2),
    ]


def test_training_lowers_the_loss_and_leaves_the_mode_alone():
    model, seen = tiny.mlp(), []
    history = fit(model, tiny.toy_vectors(), 60, watch=lambda loop: seen.append(loop.step))
    assert sum(history.losses[-10:]) < 0.7 * sum(history.losses[:10])
    assert seen == list(range(1, 61))
    assert not model.training
    assert history.epoch == 3  # 24 batches an epoch: 60 steps have drawn from epochs 0, 1 and 2


def test_dropout_is_drawn_from_the_tasks_seed_and_the_callers_generator_is_left_alone():
    results = []
    for outside in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(outside)
            before = torch.get_rng_state()
            model = noisy()
            fit(model, tiny.toy_vectors(), 5)
            assert torch.equal(torch.get_rng_state(), before)
            results.append(model)
    assert equal(*results)
    other = noisy()
    fit(other, tiny.toy_vectors(seed=1), 5)
    assert not equal(results[0], other)


def test_no_steps_change_nothing_and_negative_ones_are_refused():
    model = tiny.mlp()
    before = copy.deepcopy(model)
    assert fit(model, tiny.toy_vectors(), 0).losses == []
    assert equal(model, before)
    with pytest.raises(SettingError, match="-1 training steps"):
        fit(model, tiny.toy_vectors(), -1)
    with pytest.raises(SettingError, match=r"2.5 training steps(.|\n)*fraction(.|\n)*Give 2"):
        fit(model, tiny.toy_vectors(), 2.5)


def test_a_loss_that_is_not_finite_stops_the_run_at_once():
    class Spoil(Rule):
        def loss(self, loop, value):
            return value * math.nan if loop.step == 2 else value

    with pytest.raises(EvidenceError, match="step 3 of 5 was to be taken, but its loss is nan"):
        fit(tiny.mlp(), tiny.toy_vectors(), 5, [Spoil()])


def test_histories_follow_each_other_with_steps_counted_on():
    first, second = History([1.0, 2.0], {"a": [(1, 0.5)]}, ["x"]), History([3.0], {"a": [(1, 0.7)]}, ["x", "y"])
    joined = first.then(second)
    assert joined.losses == [1.0, 2.0, 3.0]
    assert joined.curves == {"a": [(1, 0.5), (3, 0.7)]}
    assert joined.notes == ["x", "y"]


# The same rules in a loop of one's own


def own_loop(model, task, steps, rules, accumulate=1):
    """What a user writes: batches in halves when accumulating."""
    optimizer = task.optimizer(model.parameters())
    pruner = attach(optimizer, model, rules, steps)
    model.train()
    for _, _, batch in forever(task):
        optimizer.zero_grad()
        inputs, labels = batch.inputs[0], batch.target
        for x, y in zip(inputs.chunk(accumulate), labels.chunk(accumulate), strict=True):
            (nn.functional.cross_entropy(model(x), y) / accumulate).backward()
        optimizer.step()
        if pruner.loop.step == steps:
            break
    history = pruner.finish()
    model.eval()
    return history


@pytest.mark.parametrize("holder", [Hold, Shadow])
@pytest.mark.parametrize("allocation", [None, Global()])
def test_attach_gives_the_same_weights_as_fit(holder, allocation):
    task = tiny.toy_vectors()
    task = type(task)(task.name, task.splits, batch=32, learner=AdamW(1e-2, decay=0.1))
    one, two = tiny.mlp(), tiny.mlp()
    first = fit(one, task, 30, [ramp(one, holder, allocation=allocation)])
    second = own_loop(two, task, 30, [ramp(two, holder, allocation=allocation)])
    assert equal(one, two)
    assert first.curves == second.curves
    assert sum(int((p == 0).sum()) for p in one.parameters() if p.dim() == 2) >= 0.79 * 1664


def test_gradient_accumulation_counts_optimizer_steps():
    one, two = tiny.mlp(), tiny.mlp()
    first = own_loop(one, tiny.toy_vectors(), 20, ramp(one))
    second = own_loop(two, tiny.toy_vectors(), 20, ramp(two), accumulate=4)
    assert [step for step, _ in second.curves["sparsity"]] == [0, 3, 6, 9, 12, 14]
    assert first.curves == second.curves


@pytest.mark.parametrize("fused", [False, True])
def test_a_skipped_mixed_precision_step_does_not_move_the_schedule(fused):
    model = tiny.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, fused=fused)
    pruner = attach(optimizer, model, ramp(model, every=1), steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    for i in range(4):
        optimizer.zero_grad()
        scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
        before = copy.deepcopy(model)
        if i == 2:
            model[0].weight.grad[0, 0] = math.inf
        scaler.step(optimizer)
        scaler.update()
        assert equal(model, before) == (i == 2)
    assert pruner.loop.step == 3
    assert pruner.loop.history.curves["sparsity"][-1][0] == 3


def test_between_steps_the_model_is_what_the_forward_pass_sees():
    model, task = tiny.mlp(), tiny.toy_vectors()
    optimizer = task.optimizer(model.parameters())
    pruner = attach(optimizer, model, Hold(weights(model), {n: k.bool() for n, k in half(model).items()}), 5)
    zeros = [(p == 0).sum() for p in model.parameters() if p.dim() == 2]
    assert [int(z) for z in zeros] == [256, 512, 64]
    pruner.finish()


def half(model):
    """Masks that keep every second weight."""
    return {s.name: (torch.arange(s.units) % 2).reshape(s.shape) for s in weights(model)}


def test_finishing_takes_the_hooks_off():
    model = tiny.mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    keep = {name: k.bool() for name, k in half(model).items()}
    pruner = attach(optimizer, model, Hold(weights(model), keep), 1)
    x, y = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 4
    for plain in (False, True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        assert bool((model[4].weight[~keep["4.weight"]] != 0).any()) == plain
        if not plain:
            pruner.finish()


def test_an_optimizer_of_another_model_is_refused():
    with pytest.raises(SettingError, match="it holds none of the model's parameters"):
        attach(torch.optim.SGD(tiny.mlp().parameters(), 0.1), tiny.mlp(), Diary(), 5)
    model = tiny.mlp()
    with pytest.raises(SettingError, match="0 training steps"):
        attach(torch.optim.SGD(model.parameters(), 0.1), model, Diary(), 0)


# Snapshots


@pytest.mark.parametrize("holder", [Hold, Shadow])
def test_a_run_taken_up_again_ends_in_the_same_weights_to_the_bit(holder, tmp_path):
    task = tiny.toy_vectors()
    task = type(task)(task.name, task.splits, batch=32, learner=AdamW(1e-2, decay=0.1))

    def rules(model):
        return [LearningRate(warmup=0.1), ramp(model, holder)]

    whole, part, later = noisy(), noisy(), noisy(seed=5)

    def take(loop):
        if loop.step == 27:  # in the second epoch of 24 batches
            Snapshot.of(loop.model, loop).save(tmp_path / "at27")

    fit(whole, task, 40, rules(whole))
    fit(part, task, 40, rules(part), watch=take)
    assert equal(whole, part)
    snapshot = Snapshot.load(tmp_path / "at27")
    assert (snapshot.step, snapshot.epoch, snapshot.place) == (27, 1, 3)
    history = fit(later, task, 40, rules(later), resume_from=snapshot)
    assert equal(whole, later)
    assert len(history.losses) == 13


def test_attach_can_be_taken_up_again():
    task = tiny.toy_vectors()
    whole, part = tiny.mlp(), tiny.mlp()
    own_loop(whole, task, 20, ramp(whole))

    optimizer = task.optimizer(part.parameters())
    pruner = attach(optimizer, part, ramp(part), 20)
    batches = [batch for (_, _, batch), _ in zip(forever(task), range(20), strict=False)]
    for i, batch in enumerate(batches):
        if i == 11:
            snapshot = Snapshot.of(part, pruner.loop)
            part = tiny.mlp(seed=9)
            optimizer = task.optimizer(part.parameters())
            snapshot.restore_(part, optimizer)
            pruner = attach(optimizer, part, ramp(part), 20, resume_from=snapshot)
        optimizer.zero_grad()
        task.loss(part, batch).backward()
        optimizer.step()
    pruner.finish()
    assert equal(whole, part)


def test_rewinding_is_exact_for_weights_and_buffers_and_starts_a_fresh_optimizer():
    model, task = noisy(), tiny.toy_vectors()
    start = Snapshot.of(model)
    first, second = copy.deepcopy(model), model
    fit(first, task, 10)
    fit(second, task, 10)
    start.restore_(second)
    assert equal(second, noisy())
    fit(second, task, 10)  # momentum of the first training would show here
    assert equal(first, second)


def test_weights_only_keeps_the_place_and_forgets_the_optimizer():
    taken = []
    fit(tiny.mlp(), tiny.toy_vectors(), 5, watch=lambda loop: taken.append(Snapshot.of(loop.model, loop)))
    bare = taken[-1].weights_only()
    assert (bare.step, bare.place, bare.optimizer, bare.rules, bare.rng) == (5, 5, None, None, None)


def test_a_snapshot_is_a_value_later_training_does_not_change():
    model = tiny.mlp()
    snapshot = Snapshot.of(model)
    before = {k: v.clone() for k, v in snapshot.model.items()}
    fit(model, tiny.toy_vectors(), 3)
    assert all(torch.equal(before[k], snapshot.model[k]) for k in before)


def test_a_saved_snapshot_reads_back_whole(tmp_path):
    taken = []
    model, task = noisy(), tiny.toy_vectors()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    fit(
        model,
        task,
        3,
        [LearningRate(), ramp(model)],
        optimizer,
        watch=lambda loop: taken.append(Snapshot.of(model, loop)),
    )
    taken[-1].save(tmp_path / "s")
    back = Snapshot.load(tmp_path / "s")

    def same(a, b):
        if isinstance(a, torch.Tensor):
            return a.dtype == b.dtype and torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (list, tuple)):
            return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
        return a == b

    for name in ("model", "optimizer", "step", "epoch", "place", "rng", "rules"):
        assert same(getattr(taken[-1], name), getattr(back, name)), name
    assert not list(tmp_path.glob("*.partial"))


def test_snapshots_average_in_the_mean_and_keep_zeros():
    a, b = tiny.cnn(), tiny.cnn(seed=1)
    for model in (a, b):
        model.conv.weight.data[0] = 0
    mean = Snapshot.average([Snapshot.of(a), Snapshot.of(b)])
    assert torch.allclose(mean.model["fc.weight"], (a.fc.weight + b.fc.weight) / 2)
    assert bool((mean.model["conv.weight"][0] == 0).all())
    third = Snapshot.average([Snapshot.of(a), Snapshot.of(b)], weights=[3, 1])
    assert torch.allclose(third.model["fc.weight"], 0.75 * a.fc.weight + 0.25 * b.fc.weight)
    assert third.model["bn.num_batches_tracked"].dtype == torch.int64
    with pytest.raises(SettingError, match="there are none"):
        Snapshot.average([])


def test_snapshots_that_do_not_fit_are_refused(tmp_path):
    model, task, taken = tiny.mlp(), tiny.toy_vectors(), []
    fit(model, task, 4, [ramp(model)], watch=lambda loop: taken.append(Snapshot.of(model, loop)))
    with pytest.raises(ResumeError, match="the snapshot was taken after 4"):
        fit(tiny.mlp(), task, 3, resume_from=taken[-1])
    with pytest.raises(ResumeError, match="the snapshot was taken with 1"):
        fit(tiny.mlp(), task, 8, resume_from=taken[-1])
    (tmp_path / "bad").write_bytes(b"not a snapshot")
    with pytest.raises(ResumeError, match="it is not whole"):
        Snapshot.load(tmp_path / "bad")
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, str(tmp_path / "other"))
    with pytest.raises(ResumeError, match="it says version none"):
        Snapshot.load(tmp_path / "other")
    with pytest.raises(ModelError, match="has no values before the first forward pass"):
        Snapshot.of(nn.LazyLinear(4))


# loop.reset


@pytest.mark.parametrize("make", [lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), torch.optim.Adam])
def test_reset_forgets_the_elements_it_is_told_to(make):
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    loop = Loop(model, optimizer, 1)
    where = torch.tensor([[True, False, False], [False, False, True]])
    before = {k: v.clone() for k, v in optimizer.state[model.weight].items() if v.shape == where.shape}
    assert before
    loop.reset("weight", where)
    for key, old in before.items():
        assert torch.equal(optimizer.state[model.weight][key], old.masked_fill(where, 0))
    loop.reset("weight")
    assert all(not bool(optimizer.state[model.weight][key].any()) for key in before)
    with pytest.raises(SettingError, match="Did you mean weight"):
        loop.reset("wieght")


# The same rules in the Trainer of transformers


class Rows(torch.utils.data.Dataset):
    def __init__(self):
        draw = torch.Generator().manual_seed(3)
        self.ids = torch.randint(2, 64, (64, 12), generator=draw)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.ids[i]}


def trainer(model, folder, rules, **changes):
    pytest.importorskip("accelerate", reason="the Trainer of transformers needs accelerate")
    from transformers import Trainer, TrainingArguments

    from secateur.integrations.trainer import PruningCallback

    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "learning_rate": 1e-2,
        "weight_decay": 0.1,
        "report_to": [],
        "logging_steps": 4,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        **changes,
    }
    callback = PruningCallback(rules)
    return Trainer(model, TrainingArguments(**settings), train_dataset=Rows(), callbacks=[callback]), callback


def test_the_trainer_gives_the_same_masks_as_a_loop_of_ones_own(tmp_path):
    one, two = tiny.decoder(), tiny.decoder()
    rule = ramp(one)
    run, callback = trainer(one, tmp_path, rule)
    seen, step = [], run.training_step

    def record(model, inputs, num_items_in_batch=None):
        seen.append((inputs, num_items_in_batch))
        return step(model, inputs, num_items_in_batch)

    run.training_step = record
    run.train()
    assert [step for step, _ in callback.history.curves["sparsity"]] == [0, 3, 6, 8]
    for site in weights(one):
        assert int((tensors(one)[site.name] == 0).sum()) == int(0.8 * site.units)
    assert run.state.log_history[-2]["sparsity"] == pytest.approx(0.8, abs=1e-3)

    again, _ = trainer(two, tmp_path, [])
    again.create_optimizer_and_scheduler(12)
    own = ramp(two)
    pruner = attach(again.optimizer, two, own, 12)
    two.train()
    for first, second in zip(seen[::2], seen[1::2], strict=True):
        again.optimizer.zero_grad()
        for inputs, items in (first, second):
            two(**inputs, num_items_in_batch=items).loss.backward()
        torch.nn.utils.clip_grad_norm_(two.parameters(), 1.0)
        again.optimizer.step()
        again.lr_scheduler.step()
    pruner.finish()
    assert all(torch.equal(rule.keep[name], own.keep[name]) for name in own.keep)


def test_a_trainer_resumed_from_a_checkpoint_ends_in_the_same_weights(tmp_path):
    one, two, three = tiny.decoder(), tiny.decoder(), tiny.decoder(seed=4)
    whole, _ = trainer(one, tmp_path / "a", ramp(one))
    whole.train()
    part, _ = trainer(two, tmp_path / "b", ramp(two), save_strategy="steps", save_steps=7)
    part.train()
    assert (tmp_path / "b" / "checkpoint-7" / "secateur_rules.safetensors").exists()
    later, callback = trainer(three, tmp_path / "b", ramp(three), save_strategy="steps", save_steps=7)
    later.train(resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-7"))
    assert equal(one, three)
    (tmp_path / "b" / "checkpoint-7" / "secateur_rules.safetensors").unlink()
    with pytest.raises(ResumeError, match="the masks of that step are not known"):
        trainer(three, tmp_path / "b", ramp(three))[0].train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-7")
        )
    assert everything(weights(one)).keys() == callback.rules[0].keep.keys()
