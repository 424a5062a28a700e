"""Masks and adapters learn together, and leave a small dense model that answers as the masked one."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import nn

from secateur.axes.schedules import Schedule
from secateur.edit import Remove, Rotate
from secateur.errors import BudgetError, GraphError, ModelError, SettingError, TaskError
from secateur.graph import couple
from secateur.method import prune
from secateur.methods import compresso
from secateur.methods.compresso import (
    BOUND,
    PREFACE,
    Compresso,
    Layout,
    Masks,
    adapt,
    cut_,
    drawn,
    expected_size,
    lay_out,
    masked,
    mend,
    open_chance,
    pressure,
    settled,
    soft,
)
from secateur.models import Opened, load, save
from secateur.site import Site
from secateur.tasks.corpora import Characters
from secateur.tasks.instructions import continued
from secateur.train import Loop, fit

T = 2 / 3
SMALL = {"prompt": "", "steps": 30, "tune": 4, "rank": 2, "alpha": 4.0, "rate": 5e-3, "tune_rate": 5e-3}
WIDTHS = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.15, "bos_token_id": 0, "eos_token_id": 1,
    "pad_token_id": None,
}  # fmt: skip
COUPLINGS = {}


@pytest.fixture(autouse=True)
def _couple_once(monkeypatch):
    """Following a model takes longer than all else here, and says the same of models of one form."""
    monkeypatch.setattr(compresso, "couple", coupled)


def coupled(model, example):
    form = (type(model).__name__, *((name, tuple(value.shape)) for name, value in model.state_dict().items()))
    if form not in COUPLINGS:
        COUPLINGS[form] = couple(model, example)
    return COUPLINGS[form]


def logits(model, task):
    with torch.no_grad():
        return task.example.through(model).logits


def ready(kinds=compresso.KINDS, begin=0.0, until=0.0, sparsity=0.3, model=None, **changes):
    """A model, its task and masks for it."""
    model, task = tiny.trained("decoder") if model is None else model, tiny.make_task("decoder")
    layout, _ = lay_out(model, task, kinds)
    schedule = Schedule(end=sparsity, begin=begin, until=until, curve=compresso.Linear(), every=1)
    return model, task, Masks(layout, schedule, draw=torch.Generator().manual_seed(0), **changes)


def scatter(masks, seed=0):
    """Logits of all sizes, so that some units shut and others keep a soft value."""
    draw = torch.Generator().manual_seed(seed)
    for value in masks.logits.values():
        value.data.copy_(torch.rand(value.shape, generator=draw) * 6 - 2)


def left_in_blocks(model):
    """The elements of the matrices of all blocks."""
    return sum(p.numel() for n, p in model.named_parameters() if "layers" in n and p.dim() == 2)


def two_sites():
    """Two hidden channels; one head that owns 8 rows and columns; two neurons that own 3 each."""
    stream = Site("stream", "stream", (2,), ())
    inside = (Site("h", "head", (1,), ()), Site("n", "channel", (2,), ()))
    rows = {"h": torch.tensor([8.0]).double(), "n": torch.tensor([3.0, 3.0]).double()}
    return Layout(inside, rows, inside, stream, (), (), False, 2)


# Masks


def test_what_is_drawn_by_hand():
    half, ends = torch.full((3,), 0.5), torch.tensor([0.0, 1.0])
    # sigmoid(0) = 1/2, stretched to 1.2 / 2 - 0.1; far out it is cut to [0, 1]
    assert drawn(torch.tensor([0.0, 9.0, -9.0]), half, T).tolist() == pytest.approx([0.5, 1, 0])
    # log 4 / (2/3) = log 8: 8 / 9 * 1.2 - 0.1
    assert float(drawn(torch.tensor([4.0]).log(), half[:1], T)) == pytest.approx(8 / 9 * 1.2 - 0.1)
    assert drawn(torch.zeros(2), ends, T).tolist() == [0, 1]  # numbers at the edge do no harm


def test_chances_by_hand():
    # 1 - r / (1 + r) with r = (0.1 / 1.1)^(2/3)
    r = 11 ** (-2 / 3)
    assert float(open_chance(torch.zeros(1), T)) == pytest.approx(1 / (1 + r))
    edges = open_chance(torch.tensor([-BOUND, BOUND]).double(), T).tolist()
    assert edges == pytest.approx([0.0471, 0.998], abs=5e-4)


def test_chances_are_how_often_masks_are_open():
    values = torch.tensor([-4.6, -3.0, -1.0, 0.0, 1.5, 4.6])
    uniform = torch.rand(200_000, 6, generator=torch.Generator().manual_seed(0))
    often = (drawn(values, uniform, T) > 0).double().mean(0)
    assert torch.allclose(often, open_chance(values.double(), T), atol=4e-3)


def test_what_is_drawn_has_a_gradient_where_it_is_neither_0_nor_1():
    values = torch.tensor([0.0, 9.0], requires_grad=True)
    drawn(values, torch.full((2,), 0.5), T).sum().backward()
    assert float(values.grad[0]) == pytest.approx(1.2 / 4 / T)
    assert float(values.grad[1]) == 0


def test_masks_settle_by_hand():
    # chances 0.998, 0.832, 0.047 and 0.047: 1.924 of 4, so that two shut
    values = torch.tensor([-BOUND, BOUND, 0.0, -BOUND])
    z = settled(values, T)
    assert (z > 0).tolist() == [False, True, True, False]
    assert z[1:3].tolist() == pytest.approx([float(torch.sigmoid(torch.tensor(1.2 * BOUND))), 0.5])
    assert int((settled(torch.full((3,), -BOUND), T) > 0).sum()) == 1  # one stays


# Sizes


def test_the_expected_size_by_hand():
    stream = torch.tensor([1.0, 0.5])
    heads, neurons = torch.tensor([0.5]), torch.tensor([1.0, 0.5])
    inside = [(heads, torch.tensor([8.0])), (neurons, torch.tensor([3.0, 3.0]))]
    assert float(expected_size(stream, inside)) == 1.5 * (4 + 4.5)
    layout = two_sites()
    assert layout.whole == 2 * (8 + 6)
    assert float(layout.sparsity({"stream": stream, "h": heads, "n": neurons})) == pytest.approx(1 - 12.75 / 28)
    assert float(layout.size({"n": neurons})) == 2 * (8 + 4.5)  # what has no masks stays whole


def test_the_expected_size_is_the_mean_of_what_is_drawn():
    layout, draw = two_sites(), torch.Generator().manual_seed(1)
    values = {"stream": torch.tensor([1.0, -1.0]), "h": torch.tensor([0.3]), "n": torch.tensor([-2.0, 2.0])}
    sizes = []
    for _ in range(4000):
        left = {n: (drawn(a, torch.rand(a.shape, generator=draw), T) > 0).double() for n, a in values.items()}
        sizes.append(float(layout.size(left)))
    expected = float(layout.size({n: open_chance(a.double(), T) for n, a in values.items()}))
    assert sum(sizes) / len(sizes) == pytest.approx(expected, rel=0.02)


def test_units_of_grouped_queries_count_with_all_their_rows():
    model, _, masks = ready()
    rows = masks.layout.rows["model.layers.0.self_attn"]
    assert rows.tolist() == [48, 48]  # 16 rows of q, 8 of k, 8 of v and 16 columns of o
    assert masks.layout.rows["model.layers.0.mlp"].unique().tolist() == [3]
    assert masks.layout.whole == left_in_blocks(model)


def test_mending_meets_the_sparsity_to_a_unit_and_shuts_the_lowest():
    layout = two_sites()  # 28 in all
    values = {"stream": torch.tensor([3.0, 2.0]), "h": torch.tensor([1.0]), "n": torch.tensor([0.0, -1.0])}
    keep = {name: torch.ones(len(a), dtype=torch.bool) for name, a in values.items()}
    found = mend(layout, values, keep, 0.2)  # one neuron is 6 of 28
    assert {n: k.tolist() for n, k in found.items()} == {"stream": [True, True], "h": [True], "n": [True, False]}
    opened = mend(layout, values, {**keep, "stream": torch.tensor([False, True])}, 0.0)
    assert all(bool(k.all()) for k in opened.values())
    fewer = mend(layout, values, keep, 0.9)
    assert min(int(k.sum()) for k in fewer.values()) == 1


# The multipliers


def test_the_pressure_by_hand():
    found = pressure(torch.tensor(0.1), 0.3, torch.tensor(-2.0), torch.tensor(5.0))
    assert float(found) == pytest.approx(-2 * -0.2 + 5 * 0.04)


def test_multipliers_go_up_the_loss_and_logits_down_it():
    _, task, masks = ready(cap=0.25)
    optimizer = torch.optim.AdamW(masks.groups(0.1), weight_decay=0.5)
    loop = Loop(nn.Linear(1, 1), optimizer, 100, task)
    before = {name: value.detach().clone().clamp(-BOUND, BOUND) for name, value in masks.logits.items()}
    for step in range(4):
        masks.before_forward(loop)
        optimizer.zero_grad()
        masks.loss(loop, torch.zeros(())).backward()
        optimizer.step()
        loop.step = step + 1
        masks.after_step(loop)
    # nothing is gone and 0.3 should be: l1 falls below 0, l2 rises, each by about the rate a step, and l2 to its cap
    assert float(masks.first.detach()) == pytest.approx(-0.4, abs=0.02)
    assert float(masks.second.detach()) == 0.25
    assert all(bool((value < before[name]).all()) for name, value in masks.logits.items())
    assert all(float(value.detach().abs().max()) <= BOUND + 1e-6 for value in masks.logits.values())


def test_nothing_decays_logits_or_multipliers():
    _, _, masks = ready()
    optimizer = torch.optim.AdamW(masks.groups(0.1), weight_decay=0.5)
    for parameter in masks.parameters():
        parameter.data.fill_(2.0)
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(bool((p == 2).all()) for p in masks.parameters())


def test_more_than_was_asked_turns_the_pressure_round():
    _, task, masks = ready(sparsity=0.1)
    for value in masks.logits.values():
        value.data.fill_(-1.0)
    optimizer = torch.optim.AdamW(masks.groups(0.1))
    loop = Loop(nn.Linear(1, 1), optimizer, 100, task, step=1)
    masks.before_forward(loop)
    masks.loss(loop, torch.zeros(())).backward()
    optimizer.step()
    assert float(masks.first.detach()) > 0


# In training


def test_masks_are_drawn_once_a_step_and_not_before_their_time():
    _, task, masks = ready(begin=0.5, until=1.0)
    loop = Loop(nn.Linear(1, 1), torch.optim.SGD(masks.parameters(), 1.0), 10, task)
    loop.step = 4
    masks.before_forward(loop)
    assert masks.value("stream", True) is None
    assert float(masks.loss(loop, torch.ones(()))) == 1
    loop.step = 5
    masks.before_forward(loop)
    first = masks.value("stream", True)
    assert masks.value("stream", True) is first
    scatter(masks)
    masks.before_forward(loop)
    assert not torch.equal(masks.value("stream", True), first)
    assert torch.equal(masks.value("stream", False), settled(masks.logits["stream"].detach(), T))


def test_with_all_masks_at_one_the_model_is_itself_and_hooks_go():
    model, task, masks = ready()
    before = logits(model, task)
    masks.fixed = {name: torch.ones(len(a)) for name, a in masks.logits.items()}
    with masked(model, masks):
        assert torch.equal(logits(model, task), before)
        masks.fixed["model.layers.0.mlp"] = torch.zeros(64)
        assert not torch.allclose(logits(model, task), before, atol=1e-3)
    assert torch.equal(logits(model, task), before)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_run_is_taken_up_again_with_its_masks():
    _, task, masks = ready()
    loop = Loop(nn.Linear(1, 1), torch.optim.SGD(masks.parameters(), 1.0), 10, task)
    scatter(masks)
    masks.before_forward(loop)
    state = copy.deepcopy(masks.state())
    _, _, again = ready()
    again.resume(loop, state)
    for each in (masks, again):
        each.before_forward(loop)
    assert all(torch.equal(masks.now[name], again.now[name]) for name in masks.now)


# The small model


@pytest.mark.parametrize("kinds", [compresso.KINDS, ("stream",), ("head", "channel"), ("channel",)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_small_model_answers_as_the_masked_one(kinds, tied):
    model = tiny.decoder(tie_word_embeddings=tied)
    for layer in model.model.layers:  # gains that are not all alike
        layer.input_layernorm.weight.data.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(3))
    model, task, masks = ready(kinds, model=model)
    scatter(masks)
    z = masks.settle(0.3)
    assert all(0 < int((value == 0).sum()) < len(value) for name, value in z.items() if len(value) > 2)
    assert any(bool(((value > 0.05) & (value < 0.95)).any()) for value in z.values())
    with masked(model, masks):
        wanted = logits(model, task)
    cut_(model, masks.layout, z)
    assert torch.allclose(logits(model, task), wanted, atol=1e-4)
    size = float(masks.layout.size({n: (v > 0).double() for n, v in z.items()}))
    assert left_in_blocks(model) == pytest.approx(size)
    if "stream" in kinds:
        assert model.model.embed_tokens.weight.shape[1] == int((z["stream"] > 0).sum())
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


# Whole runs


def test_the_sparsity_is_met_to_a_unit_and_expected_on_the_way():
    done = prune(tiny.trained("decoder"), Compresso(**{**SMALL, "steps": 300}), tiny.make_task("decoder"))
    assert left_in_blocks(done.model) / left_in_blocks(tiny.trained("decoder")) == pytest.approx(0.7, abs=0.003)
    reached = done.history.curves["expected sparsity"]
    assert [reached[0][0], reached[-1][0]] == [38, 299]
    assert reached[0][1] < 0.02
    assert reached[-1][1] == pytest.approx(0.3, abs=0.03)
    assert done.history.curves["target sparsity"][-1] == (299, 0.3)


def test_a_large_unit_that_leads_past_the_target_is_made_up_for():
    whole = two_sites()
    layout = replace(whole, rows={**whole.rows, "n": torch.tensor([1.0, 1.0]).double()})  # 20 in all
    values = {"stream": torch.tensor([3.0, 2.0]), "h": torch.tensor([1.0]), "n": torch.tensor([0.0, -1.0])}
    keep = {"stream": torch.tensor([True, False]), "h": torch.tensor([True]), "n": torch.tensor([True, True])}
    found = mend(layout, values, keep, 0.1)  # 10 are left and 18 should be: the channel makes 20, a neuron less 18
    assert {n: k.tolist() for n, k in found.items()} == {"stream": [True, True], "h": [True], "n": [True, False]}


def test_weights_stay_frozen_but_for_adapters_on_queries_and_values(monkeypatch):
    seen = {}

    def look(model, layout, z):
        seen.update({n: p.detach().clone() for n, p in model.named_parameters()})
        return cut_(model, layout, z)

    monkeypatch.setattr(compresso, "cut_", look)
    model = tiny.trained("decoder")
    prune(model, Compresso(**{**SMALL, "tune": 0}), tiny.make_task("decoder"))
    moved = {n for n, p in model.named_parameters() if not torch.equal(seen[n], p)}
    assert moved == {f"model.layers.{i}.self_attn.{m}_proj.weight" for i in range(2) for m in "qv"}


def test_the_fine_tuning_starts_from_the_small_model_and_helps():
    task = tiny.make_task("decoder")
    method = {**SMALL, "steps": 60, "include": ("attention", "mlp")}
    short = prune(tiny.trained("decoder"), Compresso(**{**method, "tune": 0}), task)
    long = prune(tiny.trained("decoder"), Compresso(**{**method, "tune": 60}), task)
    cut = [[e.describe() for e in done.edits if isinstance(e, (Remove, Rotate))] for done in (short, long)]
    assert cut[0] == cut[1]
    assert task.measure(long.model, "val")["nll"] < task.measure(short.model, "val")["nll"] - 0.02
    assert Compresso(**method).training_steps() == 64


def test_units_that_say_nothing_go():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, ::2] = 0
    done = prune(model, Compresso(**{**SMALL, "kinds": ("channel",), "steps": 150, "sparsity": 0.3}), task)
    gone = [~e.keep for e in done.edits if isinstance(e, Remove)]
    dead, alive = (sum(int(g[start::2].sum()) for g in gone) for start in (0, 1))
    assert dead > 2.5 * alive


def test_the_small_model_is_saved_and_opened_again(tmp_path):
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    done = prune(model, Compresso(**SMALL), task)
    save(done, model, tmp_path / "small")
    again = load(tmp_path / "small")
    assert {type(m) for m in again.modules()} == {type(m) for m in model.modules()}  # stock norms too
    assert torch.allclose(logits(again, task), logits(done.model, task), atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_stock_llama_reads_the_small_model_out_of_a_gguf_file(tied, tmp_path):
    pytest.importorskip("gguf")
    from transformers import AutoModelForCausalLM

    from secateur.export import export

    # a large eps, so that one that is not fitted to the narrow stream would show
    model, task, masks = ready(model=tiny.decoder(tie_word_embeddings=tied, rms_norm_eps=0.1))
    scatter(masks)
    z = {name: soft(a.detach(), T) for name, a in masks.logits.items()}
    for value in z.values():
        if len(value) > 2:
            value[: len(value) // 4] = 0  # as many everywhere: stock classes know one width
    cut_(model, masks.layout, z)
    opened = Opened(model, None, "net", "net", "hf", model.config.to_dict())
    export(opened, "gguf", tmp_path / "x.gguf", verify=False)
    back = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="x.gguf", dtype=torch.float32)
    assert type(back).__name__ == "LlamaForCausalLM"
    assert back.config.hidden_size == 24
    assert torch.allclose(logits(back, task), logits(model, task), atol=1e-4)


def test_half_precision_stays_what_it_is():
    model, task = copy.deepcopy(tiny.trained("decoder")).to(torch.bfloat16), tiny.make_task("decoder")
    done = prune(model, Compresso(**SMALL), task)
    assert {p.dtype for p in done.model.parameters()} == {torch.bfloat16}
    assert bool(logits(done.model, task).isfinite().all())


def test_the_stream_can_be_left_whole_and_the_model_keeps_its_norms():
    done = prune(tiny.trained("decoder"), Compresso(**SMALL, kinds=("head", "channel")), tiny.make_task("decoder"))
    assert torch.equal(done.model.model.norm.weight, tiny.trained("decoder").model.norm.weight)
    assert done.model.model.embed_tokens.weight.shape[1] == 32
    assert done.ledger.sparsity == pytest.approx(0.3, abs=0.01)


def test_opt_keeps_its_stream():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(vocab_size=64, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                       max_position_embeddings=128, word_embed_proj_dim=32, dropout=0.0)  # fmt: skip
    model = tiny.seeded(lambda: OPTForCausalLM(config).float(), 0)
    task = tiny.make_task("decoder")
    with pytest.raises(GraphError, match=r"subtracts the mean[\s\S]*kinds=head,channel"):
        prune(model, Compresso(**SMALL), task)
    done = prune(model, Compresso(**SMALL, kinds=("head", "channel")), task)
    assert done.ledger.sparsity == pytest.approx(0.3, abs=0.02)


def test_a_stream_that_cannot_be_followed_stays_whole():
    """Embeddings that are scaled, and norms after each branch."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    model = tiny.seeded(lambda: Gemma2ForCausalLM(Gemma2Config(**WIDTHS)).float(), 0)
    task = tiny.make_task("decoder")
    with pytest.raises(GraphError, match=r"goes through 'mul'[\s\S]*kinds=head,channel"):
        prune(model, Compresso(**SMALL), task)
    model, task, masks = ready(("head", "channel"), model=model)
    scatter(masks)
    z = masks.settle(0.3)
    with masked(model, masks):
        wanted = logits(model, task)
    cut_(model, masks.layout, z)
    assert torch.allclose(logits(model, task), wanted, atol=1e-4)


def test_heads_that_a_norm_runs_over_are_refused():
    from transformers import Olmo2Config, Olmo2ForCausalLM

    model = tiny.seeded(lambda: Olmo2ForCausalLM(Olmo2Config(**WIDTHS)).float(), 0)
    with pytest.raises(GraphError, match=r"statistics over all of them[\s\S]*without head"):
        lay_out(model, tiny.make_task("decoder"), ("head", "channel"))
    layout, _ = lay_out(model, tiny.make_task("decoder"), ("channel",))
    assert len(layout.gated) == 2


# The preface


def test_the_preface_stands_before_every_example_of_both_trainings(monkeypatch):
    text = tiny.make_task("decoder")
    letters = [chr(33 + i) for i in range(64)]
    task = continued(text, Characters(letters), asked=8)
    seen = []

    def look(model, task, steps, *more, **named):
        seen.append([batch.inputs[0] for batch in task.batches("train", 8)])
        return fit(model, task, steps, *more, **named)

    monkeypatch.setattr(compresso, "fit", look)
    done = prune(tiny.trained("decoder"), Compresso(**{**SMALL, "steps": 4, "prompt": "#$%"}), task)
    assert len(seen) == 2
    assert all(bool((ids[:, :3] == torch.tensor([2, 3, 4])).all()) for run in seen for ids in run)
    assert any("preface" in note for note in done.notes)
    bare = prune(tiny.trained("decoder"), Compresso(**{**SMALL, "steps": 4}), task)
    assert not bool((seen[2][0][:, :3] == torch.tensor([2, 3, 4])).all())
    assert not any("preface" in note for note in bare.notes)
    assert len(PREFACE.split(". ")) >= 8


def test_a_task_without_a_place_for_a_preface_is_refused():
    with pytest.raises(TaskError, match=r"no instructions[\s\S]*prompt="):
        prune(tiny.trained("decoder"), Compresso(**{**SMALL, "prompt": "Mind."}), tiny.make_task("decoder"))


# Bad input


@pytest.mark.parametrize(
    "wrong",
    [
        {"sparsity": 1.0},
        {"kinds": ()},
        {"kinds": ("heads",)},
        {"rank": 0},
        {"steps": 0},
        {"tune": -1},
        {"alpha": 0.0},
        {"rate": 0.0},
        {"mask_rate": -0.1},
        {"temperature": 0.0},
        {"cap": 0.0},
        {"tune_rate": 0.0},
        {"start": 0.0},
        {"start": 1.0},
        {"first": -0.1},
        {"first": 0.6, "warmup": 0.5},
        {"first": 1.0, "warmup": 0.0},
    ],
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(SettingError):
        Compresso(**wrong).check()


def test_a_target_out_of_reach_of_bounded_logits_is_refused():
    with pytest.raises(BudgetError, match=r"take out 0\.6\d+ at most"):
        prune(tiny.trained("decoder"), Compresso(**{**SMALL, "kinds": ("channel",)}, sparsity=0.7),
              tiny.make_task("decoder"))  # fmt: skip


def test_layers_that_masks_cannot_be_put_round_are_refused():
    model = tiny.decoder()
    nn.utils.parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", nn.Identity())
    with pytest.raises(ModelError, match="behind a gate"):
        compresso._check_called(model, "model.layers.0.mlp.down_proj")
    with pytest.raises(ModelError, match="no plain linear layer"):
        compresso._check_called(model, "model.norm")


def test_matrices_that_are_not_there_are_refused():
    from secateur.errors import SiteError

    with pytest.raises(SiteError, match="matches no parameter"):
        adapt(tiny.decoder(), tiny.make_task("decoder"), include=("*.query",), rank=2, alpha=2.0, rate=1e-3, steps=1,
              purpose="test")  # fmt: skip


def test_soft_values_by_hand():
    assert soft(torch.zeros(1), T).tolist() == [0.5]
