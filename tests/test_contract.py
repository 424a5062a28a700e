"""What every method promises, whatever it is: run over all of them with their tiny settings."""

import ast
import copy
import inspect
import io
import re
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from tiny import FAMILIES, SPECIAL, make_task, trained
from torch import nn

from secateur.edit import Mask, Merge, Remove, Rotate, Update, apply_, load, save
from secateur.errors import SecateurError
from secateur.evidence import observe
from secateur.method import Method, names, prune, settings, tiny
from secateur.method import load as load_method
from secateur.outcome import Outcome, Record, record_schema
from secateur.registry import of_method
from secateur.task import Around

ROOT = Path(__file__).parent.parent
METHODS = names()


def families(method: type[Method]) -> list[str]:
    """The tiny models a method's card says it handles."""
    said = method.card.families
    return [f for f in FAMILIES if "any" in said or f in said] + [f for f in SPECIAL if f in said]


CASES = [(name, family) for name in METHODS for family in families(load_method(name))]
OTHERS = [(name, f) for name in METHODS for f in FAMILIES if f not in families(load_method(name))]


@cache
def run(name: str, family: str) -> Outcome:
    return prune(trained(family), tiny(load_method(name)), make_task(family))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_it_runs_on_every_family_its_card_names_and_leaves_the_callers_model_alone(name: str, family: str) -> None:
    model = trained(family)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    training = model.training
    done = prune(model, tiny(load_method(name)), make_task(family))
    assert done.model is not model
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert model.training == training
    assert done.edits or done.notes


@pytest.mark.parametrize(("name", "family"), OTHERS)
def test_it_refuses_other_families_with_an_error_of_three_parts(name: str, family: str) -> None:
    with pytest.raises(SecateurError) as caught:
        prune(trained(family), tiny(load_method(name)), make_task(family))
    assert caught.value.asked
    assert caught.value.found
    assert caught.value.do


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_same_seed_gives_the_same_result(name: str, family: str) -> None:
    again = prune(trained(family), tiny(load_method(name)), make_task(family))
    first = run(name, family)
    assert [e.describe() for e in again.edits] == [e.describe() for e in first.edits]
    mine, theirs = first.model.state_dict(), again.model.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(v, theirs[k]) for k, v in mine.items())


def test_a_different_order_of_batches_gives_the_same_evidence() -> None:
    from secateur.cut import weights

    model, task = trained("decoder"), make_task("decoder")
    batches = list(task.batches("calibration", 16))
    there = observe(model, weights(model), batches, {"gram"})
    back = observe(model, weights(model), batches[::-1], {"gram"})
    for name, seen in there.items():
        torch.testing.assert_close(seen.sums["gram"], back[name].sums["gram"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("name", "family"), CASES)
def test_it_meets_its_budget_to_a_unit_a_site_or_says_why_not(name: str, family: str) -> None:
    method, done = tiny(load_method(name)), run(name, family)
    budget = method.budget()
    if budget is None:
        assert done.notes, "a method without a target reports what it reached"
        return
    kinds = {row.kind for row in done.record.sites}
    if kinds <= {"weight"} and not done.notes:
        rows = done.record.sites
        slack = sum(max(1, _rows_of(done, row.site)) for row in rows)  # a pattern by rows rounds once a row
        assert abs(sum(r.units - r.kept for r in rows) - budget.sparsity * sum(r.units for r in rows)) <= slack
    elif not done.notes:
        for row in done.record.sites:
            assert abs((row.units - row.kept) - budget.sparsity * row.units) <= 1 + 1e-9, row


def _rows_of(done: Outcome, site: str) -> int:
    found = next(e.site for e in done.edits if isinstance(e, (Mask, Remove)) and e.site.name == site)
    return found.shape[0]


@pytest.mark.parametrize(("name", "family"), CASES)
def test_its_edits_saved_loaded_and_replayed_give_the_same_model(name: str, family: str, tmp_path: Path) -> None:
    done, model = run(name, family), trained(family)
    if done.history is not None and not replays(name):
        pytest.skip("trains after its last edit: the weights are saved, the edits say what was cut")
    save(done.edits, tmp_path / "edits.safetensors")
    apply_(model, load(tmp_path / "edits.safetensors"))
    mine, theirs = done.model.state_dict(), model.state_dict()
    assert mine.keys() == theirs.keys()
    for key, value in mine.items():
        torch.testing.assert_close(theirs[key], value, msg=key)


def replays(name: str) -> bool:
    """Whether a method's edits hold the weights as well: those that train do not."""
    return "training" not in load_method(name).card.needs


@pytest.mark.parametrize(("name", "family"), CASES)
def test_masks_are_what_the_weights_say_and_masked_then_removed_is_removed(name: str, family: str) -> None:
    done = run(name, family)
    last = {e.site.name: e for e in done.edits if isinstance(e, Mask)}
    structural = any(isinstance(e, Remove) for e in done.edits)
    for edit in last.values():
        if structural or not stands(edit, done.model):
            continue  # the tensors have other shapes by now, or are gone
        named = dict(done.model.named_parameters())
        gone = edit.site.expand(~edit.keep)
        for part in edit.site.parts:
            value = part.read(named)
            assert bool((value[gone[part.key].expand_as(value)] == 0).all()), edit.describe()
    for edit in done.edits:
        if isinstance(edit, Remove):
            plain, both = trained(family), trained(family)
            try:
                apply_(plain, edit)
            except (IndexError, RuntimeError, SecateurError):
                break  # an edit that needs the ones before it
            apply_(both, [Mask(edit.site, edit.keep), edit])
            assert all(
                torch.equal(a, b) for a, b in zip(plain.state_dict().values(), both.state_dict().values(), strict=True)
            )


def stands(mask: Mask, model: nn.Module) -> bool:
    """Whether every tensor that a mask zeroed is there still: not so where its blocks were then replaced."""
    named = dict(model.named_parameters())
    return all(part.name in named for part in mask.site.parts)


@pytest.mark.parametrize("name", METHODS)
def test_its_settings_survive_text_and_back(name: str) -> None:
    from secateur.axes import part_of, words

    method = tiny(load_method(name))
    known = words(inspect.getmodule(type(method)))
    for key, value in settings(method).items():
        original = getattr(method, key)
        if isinstance(value, str) and not isinstance(original, str):
            assert part_of(value, known) == original, key


@pytest.mark.parametrize(("name", "family"), CASES)
def test_the_ledger_agrees_with_a_count_of_the_model(name: str, family: str) -> None:
    done = run(name, family)
    parameters = list(done.model.parameters())
    assert done.ledger.after.parameters == sum(p.numel() for p in parameters)
    assert done.ledger.after.zeros == sum(int((p == 0).sum()) for p in parameters)
    assert done.ledger.after.memory_bytes >= sum(p.numel() * p.element_size() for p in parameters)
    masked = [e for e in done.edits if isinstance(e, Mask)]
    if masked and all(stands(e, done.model) for e in masked) and not any(isinstance(e, Remove) for e in done.edits):
        assert done.ledger.after.memory_bytes == done.ledger.before.memory_bytes  # a mask saves no bytes, and says none
        assert done.ledger.after.zeros >= done.ledger.removed


@pytest.mark.parametrize("name", METHODS)
def test_its_card_says_where_it_comes_from_and_what_pins_it(name: str) -> None:
    card = load_method(name).card
    assert card.title
    assert card.arxiv or card.venue
    assert 1980 < card.year <= 2026
    assert card.axes
    assert not card.arxiv or re.fullmatch(r"\d{4}\.\d{4,5}", card.arxiv)
    file, _, test = card.checked.partition("::")
    assert (ROOT / file).is_file(), card.checked
    tests = {n.name for n in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(n, ast.FunctionDef)}
    assert test in tests, card.checked


@pytest.mark.parametrize(("name", "family"), [(n, families(load_method(n))[0]) for n in METHODS])
def test_running_neither_prints_nor_touches_files(name: str, family: str, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    out, err, model = io.StringIO(), io.StringIO(), copy.deepcopy(trained(family))
    with redirect_stdout(out), redirect_stderr(err):
        tiny(load_method(name)).run(model, make_task(family))
    assert (out.getvalue(), err.getvalue()) == ("", "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "family"), [(n, families(load_method(n))[0]) for n in METHODS])
def test_its_record_is_valid_by_the_published_schema_and_reads_back(name: str, family: str, tmp_path: Path) -> None:
    import json

    import jsonschema

    record = run(name, family).record
    record.write(tmp_path / "secateur.json")
    jsonschema.validate(json.loads((tmp_path / "secateur.json").read_text()), record_schema())
    again = Record.read(tmp_path / "secateur.json")
    assert again.ledger == record.ledger
    assert again.sites == record.sites
    assert again.settings == json.loads(json.dumps(record.settings))


@pytest.mark.parametrize(("name", "family"), CASES)
def test_its_ledger_counts_each_weight_once(name: str, family: str) -> None:
    ledger = run(name, family).ledger
    assert ledger.removed <= ledger.prunable <= ledger.before.parameters
    assert ledger.units_removed <= ledger.units
    assert ledger.after.parameters >= ledger.before.parameters - ledger.removed


# That cards keep to the code: see secateur.registry


AXES = {name: of_method(name, load_method(name)).axes for name in METHODS}


class Watched(Around):
    """A task that notes which splits it is asked for, and gives a loss that nothing can be differentiated by."""

    def __init__(self, task) -> None:
        super().__init__(task)
        self.asked: list[str] = []

    def batches(self, split, n=None, epoch=0):
        self.asked.append(split)
        return self.task.batches(split, n, epoch)

    def loss(self, model, batch):
        return self.task.loss(model, batch).detach()

    def measure(self, model, split="val"):
        self.asked.append(split)
        return self.task.measure(model, split)


@pytest.mark.parametrize("name", [n for n in METHODS if AXES[n]["data"] == {"none"}])
def test_one_that_says_it_needs_no_data_asks_for_none(name: str) -> None:
    family = families(load_method(name))[0]
    task = Watched(make_task(family))
    tiny(load_method(name)).run(trained(family), task)
    assert not task.asked, f"{name} says that it needs no data, and asks for {task.asked}"


@pytest.mark.parametrize("name", [n for n in METHODS if AXES[n]["gradients"] == {"none"}])
def test_one_that_says_it_takes_no_gradient_takes_none_and_does_not_train(name: str) -> None:
    family = families(load_method(name))[0]
    task = Watched(make_task(family))
    tiny(load_method(name)).run(trained(family), task)
    assert "train" not in task.asked, f"{name} says that it does not train"


@pytest.mark.parametrize("name", [n for n in METHODS if AXES[n]["updates"] == {"none"}])
def test_one_that_says_it_updates_nothing_leaves_what_stays_as_it_was(name: str) -> None:
    family = families(load_method(name))[0]
    done, before = run(name, family), dict(trained(family).named_parameters())
    assert not any(isinstance(e, (Merge, Rotate)) for e in done.edits)
    for key, value in done.model.named_parameters():
        old = before.get(key)
        if old is not None and old.shape == value.shape:
            assert bool(((value == old) | (value == 0)).all()), f"{name} changed {key}"
    added = [e.name for e in done.edits if isinstance(e, Update) and e.name not in before]
    assert not added, f"{name} added {added}"


@pytest.mark.parametrize(
    ("name", "family"),
    [(n, families(load_method(n))[0]) for n in METHODS if "universal" in AXES[n]["speedup"]],
)
def test_one_that_says_dense_kernels_suffice_leaves_fewer_parameters_or_places(name: str, family: str) -> None:
    done, method = run(name, family), tiny(load_method(name))
    if AXES[name]["granularity"] == {"voxel"}:  # places go, and no weight does: what remains is less work
        before, after = done.ledger.before.flops, done.ledger.after.flops
        assert before is not None and after is not None and after < before
        return
    if method.budget() is None and hasattr(method, "strength"):  # how much goes is not asked for: pull hard
        done = prune(trained(family), replace(method, strength=100 * method.strength), make_task(family))
    assert sum(p.numel() for p in done.model.parameters()) < sum(p.numel() for p in trained(family).parameters())
