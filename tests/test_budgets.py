"""Cuts asked for in the units people deploy: what was asked is what is reached, at widths that may be left."""

import json

import pytest
import tiny
import torch
import transformers as hub
from click.testing import CliRunner
from torch import nn

from secateur.axes import latency
from secateur.axes.allocations import Global
from secateur.axes.budgets import Terms, every_layer, measured_in
from secateur.axes.latency import TOLERANCE, Table
from secateur.cli import main
from secateur.edit import Remove
from secateur.errors import BudgetError, SettingError, SiteError
from secateur.export.serving import served
from secateur.graph import couple
from secateur.method import load, prune
from secateur.methods.l1_norm import L1Norm
from secateur.methods.llm_pruner import LLMPruner
from secateur.methods.spa import Spa
from secateur.models import save
from secateur.models.folder import RECORD
from secateur.outcome import Record, Timing, count_flops
from secateur.plan import plan
from secateur.report import summary
from secateur.task import Batch


def test_what_goes_is_counted_once_by_hand():
    """Two neighbouring layers cut the matrix between them along both its sides."""
    model = nn.Sequential(nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False), nn.Linear(4, 2, bias=False))
    example = Batch((torch.zeros(3, 4),))
    sites = couple(model, example).sites
    counts = {site.name: site.units // 2 for site in sites}
    # 4x8 + 8x4 + 4x2 = 72 weights; 4x4 + 4x2 + 2x2 = 28 are left
    for of, gone, whole in (("weights", 44, 72), ("parameters", 44, 72), ("bytes", 176, 288), ("flops", 88, 144)):
        measure = measured_in(of, model, example, sites)
        assert (measure.gone(counts), measure.whole) == (gone, whole)
    assert measured_in("units", model, example, sites).gone(counts) == 6


def test_the_nearest_that_multiples_allow_by_hand():
    model = nn.Sequential(nn.Linear(4, 32, bias=False), nn.Linear(32, 4, bias=False))
    example = Batch((torch.zeros(1, 4),))
    (site,) = couple(model, example).sites
    found = Terms(0.3, of="parameters", round_to=8).counts(
        model, example, [site], {}, lambda sparsity: every_layer([site], sparsity)
    )
    assert found.counts == {site.name: 24}  # a quarter is nearer to 0.3 than a half
    assert (found.asked, found.reached, found.step) == (0.3, 0.25, 0.25)
    with pytest.raises(BudgetError) as caught:
        Terms(0.99, of="parameters").counts(model, example, [site], {}, lambda s: every_layer([site], s))
    assert str(caught.value) == (
        "a sparsity of 0.99 of the parameters was asked for, but 0.9688 can be reached with one unit left at the "
        "one site.\nAsk for less, protect fewer sites, or add kinds."
    )


SHORT = {
    "l1_norm": ("cnn", {}),
    "thinet": ("cnn", {"each": 0, "recover": 0, "samples": 8}),
    "soft_filter": ("cnn", {"steps": 2, "samples": 8}),
    "slimming": ("cnn", {"steps": 0, "floor": 1}),
    "group_channel": ("cnn", {"steps": 0, "tune": 0, "distil": 0}),
    "flap": ("decoder", {"samples": 8}),
    "cfsp": ("decoder", {"samples": 8, "round_to": 1}),
    "llm_pruner": ("decoder", {"samples": 4, "spare_first": 0, "spare_last": 0}),
}


@pytest.mark.parametrize("name", SHORT)
def test_a_share_of_the_work_is_what_goes(name):
    family, more = SHORT[name]
    model, task = tiny.make_model(family), tiny.make_task(family)
    outcome = prune(model, load(name)(sparsity=0.25, of="flops", **more), task)
    reached = 1 - count_flops(outcome.model, task.example) / count_flops(model, task.example)
    assert reached == pytest.approx(0.25, abs=0.03)
    assert outcome.ledger.of == "flops" and outcome.ledger.sparsity == pytest.approx(reached)
    assert any(note.startswith("0.25 of the flops asked for, ") for note in outcome.notes)


def test_the_work_of_experts_is_counted_and_priced():
    """Two of four experts for each of 16 tokens: a weight of theirs takes part in eight products."""
    model, task = tiny.make_model("moe"), tiny.make_task("moe")
    coupling = couple(model, task.example)
    assert {part.uses for site in coupling.of("channel") for part in site.parts if "experts" in part.name} == {8.0}
    done = prune(model, Spa(sparsity=0.4, of="flops"), task)
    reached = 1 - count_flops(done.model, task.example) / count_flops(model, task.example)
    assert reached == pytest.approx(0.4, abs=0.05)  # neurons go eight at a time there


class Turned(nn.Module):
    """A hidden layer whose weights are stored inputs last, and multiplied as they are not stored."""

    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Linear(4, 8, bias=False), nn.Parameter(torch.ones(2, 8))

    def forward(self, x):
        return torch.relu(self.first(x)) @ self.weight.to(x.dtype).transpose(0, 1)


def test_a_weight_that_is_turned_before_it_multiplies_has_its_work():
    (site,) = couple(Turned(), Batch((torch.zeros(3, 4),))).sites
    assert {part.name: part.uses for part in site.parts} == {"first.weight": 1.0, "weight": 1.0}


def test_heads_take_the_products_of_attention_with_them():
    """Matrices alone would say that less goes than does: a copy is cut and counted."""
    model, task = tiny.decoder(), tiny.make_task("decoder")
    model.set_attn_implementation("eager")  # the fused kernel's products are not counted on a processor
    sites = couple(model, task.example).of("head")
    measure = measured_in("flops", model, task.example, sites)
    half = {site.name: site.units // 2 for site in sites}
    assert measure.tried(half) > measure.gone(half) > 0
    found = prune(model, L1Norm(sparsity=0.2, of="flops", round_to=2), task)
    assert found.ledger.sparsity == pytest.approx(0.2, abs=0.02)


def test_a_plan_of_spa_is_what_spa_does():
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")
    for method in (Spa(sparsity=0.4, of="flops", round_to=2), L1Norm(sparsity=0.4, allocation=Global())):
        planned = plan(method, model, task, priced=False)
        done = prune(model, method, task)
        kept = {row.site: row.units for row in planned.rows}
        kept |= {e.site.name: int(e.keep.sum()) for e in done.edits if isinstance(e, Remove)}
        assert {row.site: row.keep for row in planned.rows} == kept
        assert len({row.keep / row.units for row in planned.rows}) > 1  # not as if uniform
        assert planned.reachable == pytest.approx(done.ledger.sparsity, abs=1e-6)
        assert planned.step > 0


def test_the_same_terms_on_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.__file__.rpartition('/')[0])!r})\nimport tiny\n"
        "net = lambda: tiny.trained('cnn')\ntask = lambda seed=0: tiny.make_task('cnn', seed)\n"
    )
    words = ["own:net", "l1_norm", "--sparsity", "0.3", "--of", "flops", "--round-to", "2", "--task", "own:task"]
    protected = ["--protect", "conv", "--protect", "block2.*"]
    ran = CliRunner().invoke(main, ["plan", *words, *protected, "--no-trial", "--json"])
    assert ran.exit_code == 0, ran.output
    planned = json.loads(ran.stdout)
    assert planned["settings"]["protect"] == ["conv", "block2.*"]
    assert {row["site"] for row in planned["rows"]}.isdisjoint({"conv", "block2.conv1"})
    assert all(row["keep"] % 2 == 0 for row in planned["rows"])
    ran = CliRunner().invoke(main, ["prune", *words, *protected, "--out", "cut", "--no-eval", "--json"])
    assert ran.exit_code == 0, ran.output
    said = json.loads(ran.stdout)
    after, before = said["ledger"]["after"]["flops"], said["ledger"]["before"]["flops"]
    assert 1 - after / before == pytest.approx(planned["reachable"], abs=1e-3)
    told = summary(Record.read(tmp_path / "cut" / RECORD))
    assert "off the work per forward pass of" in told
    ran = CliRunner().invoke(main, ["plan", *words, "--protect", "stem", "--no-trial"])
    assert ran.exit_code == 2
    assert "'stem' was to be protected, but no site, module or tensor has such a name" in " ".join(ran.output.split())


def test_what_cannot_be_is_said():
    model, task = tiny.make_model("cnn"), tiny.make_task("cnn")
    with pytest.raises(SettingError, match="a sparsity of 'flop' was asked for(.|\n)*Did you mean flops"):
        L1Norm(of="flop").check()
    with pytest.raises(SettingError, match="widths in multiples of 0 were asked for"):
        Spa(round_to=0).check()
    with pytest.raises(SiteError, match="nothing is left of 4 sites that could be cut"):
        prune(model, L1Norm(protect=("*",)), task)
    with pytest.raises(SettingError, match="the 4 first and 2 last blocks were to be spared"):
        LLMPruner(uniform=True).check()


def test_one_width_for_stock_loaders():
    model, task = tiny.trained("decoder"), tiny.make_task("decoder")
    cut = prune(model, Spa(sparsity=0.3, of="parameters", uniform=True), task).model
    assert len({layer.mlp.gate_proj.out_features for layer in cut.model.layers}) == 1
    assert len({layer.self_attn.k_proj.out_features for layer in cut.model.layers}) == 1
    slim, said = served(load("slimming")(), "hf", model)
    assert slim.uniform and said == ["slimming finds widths of its own; here sites alike get the mean of theirs"]


def test_prices_between_those_that_were_timed_by_hand():
    known = Table([2, 4], [4, 8], [[1.0, 3.0], [5.0, 9.0]])
    assert known.at(2, 4) == 1 and known.at(4, 8) == 9
    assert known.at(3, 4) == 3 and known.at(2, 6) == 2
    assert known.at(3, 6) == (1 + 3 + 5 + 9) / 4
    assert known.at(1, 1) == 1  # below the least that was timed
    assert Table([4], [8], [[7.0]]).at(4, 8) == 7


@pytest.fixture
def watch(monkeypatch, tmp_path):
    """A clock under which a matrix takes a millisecond for each thousand of its weights, and little is left over."""
    asked = []

    def call(layer, out, into):
        asked.append((layer.name, out, into))
        return lambda: out * into / 1000

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(latency.Layer, "call", call)
    monkeypatch.setattr(latency, "milliseconds", lambda call: call())
    monkeypatch.setattr(latency, "_whole", lambda model, example: _time(model))
    monkeypatch.setattr(latency, "share", lambda first, second, example: _time(second) / _time(first))
    return asked


def _time(model):
    return sum(p.numel() for p in model.parameters() if p.dim() > 1) / 1000 + 0.5  # half a millisecond of overhead


def test_a_share_of_the_time_is_priced_tried_and_remembered(watch, tmp_path):
    model, task = tiny.mlp(), tiny.make_task("mlp")
    done = prune(model, L1Norm(sparsity=0.3, of="latency"), task)
    assert 1 - _time(done.model) / _time(model) == pytest.approx(0.3, abs=TOLERANCE)
    assert done.ledger.timing_before is not None  # and taken again, with a real clock
    assert ("2", 24, 8) in watch and ("0", 16, 16) in watch
    assert ("2", 16, 16) not in watch  # as large as one that was timed
    (file,) = (tmp_path / "cache" / "latency").iterdir()
    assert any(key.startswith("network ") for key in json.loads(file.read_text())["times"])
    watch.clear()
    again = plan(L1Norm(sparsity=0.3, of="latency"), model, task, priced=False)
    assert watch == []  # all of it is known
    assert {row.site: row.keep for row in again.rows} == {
        e.site.name: int(e.keep.sum()) for e in done.edits if isinstance(e, Remove)
    }
    middle = next(price for price in again.prices if price.layer == "2")
    assert middle.widths == (32, 32) and middle.milliseconds == pytest.approx(1.024)
    assert middle.milliseconds_kept < middle.milliseconds
    assert (16, 16, 0.256) in middle.candidates


def test_a_time_that_is_missed_fails_the_command(watch, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text(
        f"import sys\nsys.path.insert(0, {str(tiny.__file__.rpartition('/')[0])!r})\nimport tiny\n"
        "net = lambda: tiny.mlp()\ntask = lambda seed=0: tiny.make_task('mlp', seed)\n"
    )
    took = Timing(1.0, 0.0, 20, 8, 1, "float32")
    monkeypatch.setattr("secateur.method.time_pair", lambda *_: (took, took))
    words = ["prune", "own:net", "l1_norm", "--of", "latency", "--task", "own:task", "--out", "cut", "--no-eval"]
    ran = CliRunner().invoke(main, words)
    assert ran.exit_code == 3
    said = " ".join(ran.output.split())
    assert "a sparsity of 0.3 of the latency was asked for, but 0 was reached, 0.05 away being tolerated." in said


def test_heads_that_go_are_told_to_a_stock_class_whose_config_knows_no_head_dim(tmp_path):
    """Six heads of 8 in 48: with four left the class would take them for heads of 12."""
    config = hub.Qwen2Config(
        vocab_size=tiny.VOCABULARY, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, max_position_embeddings=64,
    )  # fmt: skip
    model, task = tiny.seeded(lambda: hub.Qwen2ForCausalLM(config), 0), tiny.make_task("decoder")
    outcome = prune(model, Spa(sparsity=0.3, of="parameters", uniform=True, kinds=("head", "channel")), task)
    assert outcome.ledger.sparsity == pytest.approx(0.3, abs=0.01)  # neurons make up for what heads are too wide for
    save(outcome, model, tmp_path / "cut")
    stock = hub.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert type(stock) is hub.Qwen2ForCausalLM
    assert (stock.config.num_attention_heads, stock.config.num_key_value_heads, stock.config.head_dim) == (4, 2, 8)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(stock(ids).logits, outcome.model(ids).logits, rtol=1e-4, atol=1e-5)
