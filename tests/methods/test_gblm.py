"""GBLM: by hand, against the plain formulas, and the scales and signs that are easy to get wrong."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from tiny import make_task, toy_text, trained
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import prune
from secateur.axes import NM, Gblm, Gradient, PerRow
from secateur.axes.criteria import gblm_score, gradient_norm
from secateur.axes.sweep import gradients
from secateur.cut import weights
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import Evidence, examples, observe
from secateur.methods.gblm import GBLMPruner, InverseGradient
from secateur.methods.magnitude import Magnitude
from secateur.methods.random import Random
from secateur.methods.wanda import Wanda
from secateur.task import Batch


def plain_scores(model: nn.Module, ids: Tensor, inputs: Tensor, name: str, alpha: float, order: int) -> Tensor:
    """Section 3 of arXiv:2311.04902: one backward pass a sequence, |W| (||X|| / sqrt(N) + alpha ||G||)."""
    model = copy.deepcopy(model)
    weight = model.get_parameter(name)
    found = []
    for sequence in ids:
        model.zero_grad()
        logits = model(sequence[None], use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], sequence[1:]).backward()
        found.append(weight.grad.clone())
    steepness = torch.stack(found).norm(p=order, dim=0)
    loudness = inputs.reshape(-1, inputs.shape[-1]).norm(dim=0) / len(ids) ** 0.5
    return (weight.abs() * (loudness + alpha * steepness)).detach()


def caught(model: nn.Module, ids: Tensor, name: str) -> Tensor:
    """What flows into a matrix [sequences, tokens, in]."""
    held: list[Tensor] = []
    inside = model.get_submodule(name.removesuffix(".weight"))
    hook = inside.register_forward_pre_hook(lambda _, args: held.append(args[0].detach().clone()))
    with torch.no_grad():
        model(ids, use_cache=False)
    hook.remove()
    return held[0]


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("batch", [1, 4])
def test_scores_equal_the_plain_formulas(order: int, batch: int) -> None:
    """N counts sequences, not tokens or batches; gradients are of single sequences."""
    model, task = trained("decoder"), toy_text(batch=batch)
    batches = list(task.batches("calibration", 8))
    ids = torch.cat([b.inputs[0] for b in batches])
    assert ids.shape == (8, 16)
    sites = [s for s in weights(model) if "layers.1" in s.name]
    criterion = Gblm(alpha=100, order=order)
    whole = gradients(model, sites, batches, criterion.needs, task.loss)
    seen = observe(model, sites, batches, {"input_square"})
    for site in sites:
        named = {site.name: model.get_parameter(site.name)}
        ours = criterion.score(site, named, seen[site.name].beside(whole[site.name]))
        plain = plain_scores(model, ids, caught(model, ids, site.name), site.name, 100, order)
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
        assert seen[site.name].beside(whole[site.name]).count == 8 * 16
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.model
def test_the_choice_on_a_layer_of_the_real_model_is_that_of_the_plain_formula(smollm2) -> None:
    """SmolLM2-135M: keys of one block, alpha as published; ties fall by index, and exactly k of a row are dropped."""
    model, name = smollm2.model, "model.layers.7.self_attn.k_proj.weight"
    ids = torch.randint(0, 49152, (3, 48), generator=torch.Generator().manual_seed(0))
    learns = {p: p.requires_grad for p in model.parameters()}
    (site,) = (s for s in weights(model) if s.name == name)

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        logits = batch.through(model).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch.inputs["input_ids"][:, 1:].flatten())

    weight = model.get_parameter(name)
    try:
        for parameter in learns:
            parameter.requires_grad_(parameter is weight)  # the others' gradients would only take time
        batches, criterion = [Batch({"input_ids": ids})], Gblm(alpha=100)
        whole = gradients(model, [site], batches, criterion.needs, loss)[name]
        steep = []
        for sequence in ids:
            logits = model(sequence[None], use_cache=False).logits[0]
            F.cross_entropy(logits[:-1], sequence[1:]).backward()
            steep.append(weight.grad.double())
            weight.grad = None
    finally:
        for parameter, before in learns.items():
            parameter.requires_grad_(before)
    seen = observe(model, [site], batches, {"input_square"})[name].beside(whole)
    score = criterion.score(site, {name: weight.detach()}, seen)
    loud = caught(model, ids, name).double().reshape(-1, site.shape[1]).norm(dim=0) / len(ids) ** 0.5
    plain = weight.detach().double().abs() * (loud + 100 * torch.stack(steep).square().sum(0).sqrt())
    torch.testing.assert_close(score.double(), plain, rtol=1e-4, atol=1e-9)
    for pattern, size in ((PerRow(), site.shape[1]), (NM(2, 4), 4)):
        groups = plain.reshape(-1, size)
        gone = groups.sort(dim=1, stable=True).indices[:, : size // 2]
        wanted = torch.ones_like(groups, dtype=torch.bool).scatter(1, gone, False).reshape(site.shape)
        ours = pattern.select(score, site.units // 2)
        assert int(ours.sum()) == int(wanted.sum()) == site.units // 2
        assert (ours == wanted).double().mean() > 0.9999  # sums in float64 against float32: near ties


def test_gblm_by_hand() -> None:
    score = gblm_score(torch.tensor([[-2.0, 1.0]]), torch.tensor([3.0, 4.0]), torch.tensor([[0.5, 10.0]]))
    assert score.tolist() == [[7, 14]]
    model = nn.Linear(2, 1, bias=False)
    model.weight.data = torch.tensor([[2.0, 1.0]])
    (site,) = weights(model)
    seen = Evidence(6, {"input_square": torch.tensor([8.0, 18.0]).double()}).beside(
        Evidence(2, {"grad_square": torch.tensor([[9.0, 0]]).double(), "grad_count": torch.tensor(2.0).double()})
    )  # two examples of three tokens: A = sqrt(8/2), sqrt(18/2) = 2, 3; Gamma = 3, 0
    named = {"weight": model.weight}
    assert Gblm(alpha=10).score(site, named, seen).tolist() == [[2 * (2 + 30), 3]]
    # mean A 2.5, mean Gamma 1.5: a mix of 0.6 makes alpha 1
    assert Gblm(mix=0.6).score(site, named, seen)[0].tolist() == pytest.approx([2 * (2 + 3), 3])
    assert Gradient().score(site, named, seen).tolist() == [[6, 0]]
    inverse = InverseGradient().score(site, named, seen)
    assert inverse[0, 0] == pytest.approx(2 * 8**0.5 / (300 + 1e-8))
    assert inverse[0, 1] == pytest.approx(18**0.5 / 1e-8)


def test_the_record_says_which_alphas_were_set() -> None:
    task = make_task("decoder")
    done = prune(trained("decoder"), GBLMPruner(samples=8), task)
    (note,) = (note for note in done.notes if "alpha" in note)
    said = re.fullmatch(
        r"alpha was set at each of 14 sites: (\S+) to (\S+), in the middle ([^;]+); it belongs .*", note
    )
    assert said is not None
    low, high, middle = map(float, said.groups())
    assert 0 < low < middle < high
    model, batches = trained("decoder"), list(task.batches("calibration", 8))
    sites = weights(model)[:3]  # of the first block, which is seen dense
    whole = gradients(model, sites, batches, Gblm().needs, task.loss)
    seen = observe(model, sites, batches, {"input_square"})
    for site in sites:
        loudness, steepness = Gblm().terms(site, seen[site.name].beside(whole[site.name]))
        assert low * 0.999 <= float(0.1 * loudness.mean() / steepness.mean()) <= high * 1.001
    for criterion in (Gblm(alpha=100), Gradient()):
        assert not prune(trained("decoder"), GBLMPruner(samples=8, criterion=criterion), task).notes


class Opposed(nn.Module):
    """Two examples whose gradients cancel."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_opposite_gradients_do_not_cancel() -> None:
    model = Opposed()
    sites, batch = weights(model), Batch((torch.tensor([[1.0, 2.0], [-1.0, -2.0]]),))

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch.through(model).mean()

    together = observe(model, sites, [batch], {"grad"}, loss)["fc.weight"]
    assert together.sums["grad"].tolist() == [[0, 0]]
    apart = gradients(model, sites, [batch], {"grad_abs", "grad_square", "grad_count", "gram"}, loss)["fc.weight"]
    assert apart.sums["grad_abs"].tolist() == [[2, 4]]
    assert apart.sums["grad_square"].tolist() == [[2, 8]]
    assert float(apart.sums["grad_count"]) == 2
    assert "gram" not in apart.sums  # inputs are for the walk
    assert gradients(model, sites, [batch], {"gram"}, loss) == {}


def test_examples_cuts_inputs_and_targets_alike() -> None:
    x, y = torch.arange(6).reshape(3, 2), torch.arange(3)
    plain = list(examples([Batch((x, "same"), y)]))
    assert [b.inputs[0].tolist() for b in plain] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [b.target.tolist() for b in plain] == [[0], [1], [2]]
    assert all(b.inputs[1] == "same" for b in plain)
    boxes = [{"box": 0}, {"box": 1}, {"box": 2}]
    named = list(examples([Batch({"x": x, "scale": torch.tensor(2.0)}, boxes)]))
    assert [b.inputs["x"].tolist() for b in named] == [[[0, 1]], [[2, 3]], [[4, 5]]]
    assert [b.target for b in named] == [[{"box": 0}], [{"box": 1}], [{"box": 2}]]


def test_large_gradients_do_not_overflow() -> None:
    """|100 g| summed over 128 sequences passes 65,504, which the authors' half precision cannot hold."""
    model = nn.Linear(2, 1, bias=False).half()
    (site,) = weights(model)
    batches = [Batch((torch.full((128, 2), 30.0).half(),))]
    needs = Gblm(order=1).needs
    whole = gradients(model, [site], batches, needs, lambda m, b: 100 * b.through(m).sum())["weight"]
    assert whole.sums["grad_abs"].tolist() == [[128 * 3000.0] * 2]
    seen = Evidence(128, {"input_square": torch.full((2,), 900.0 * 128).double()}).beside(whole)
    score = Gblm(alpha=100, order=1).score(site, {"weight": model.weight}, seen)
    assert bool(torch.isfinite(score).all())


def test_layers_without_gradient_are_named() -> None:
    class Unused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x) + 0 * self.unused(x)

    model, batch = Unused(), Batch((torch.ones(2, 4),))
    sites, needs = weights(model), Gblm().needs

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return batch.through(model).sum()

    whole = gradients(model, sites, [batch], needs, loss)
    with pytest.raises(EvidenceError, match=r"unused.weight[\s\S]*every one of them is zero"):
        gradient_norm(sites[1], whole["unused.weight"], 2)
    model.unused.weight.requires_grad_(False)
    with pytest.raises(EvidenceError, match=r"unused.weight[\s\S]*it is frozen[\s\S]*requires_grad_\(True\)"):
        gradients(model, sites, [batch], needs, loss)
    with pytest.raises(EvidenceError, match="no calibration token reached it"):
        Gblm().score(sites[0], {"used.weight": model.used.weight}, whole["used.weight"])
    with pytest.raises(SettingError, match="it is 1 or 2"):
        Gblm(order=3)
    with pytest.raises(SettingError, match="0 or more"):
        Gblm(alpha=-1)


def test_gradients_are_of_the_dense_model_in_evaluation_mode() -> None:
    model, task = trained("decoder"), make_task("decoder")
    first = prune(model, GBLMPruner(samples=4), task)
    model.train()
    model.config.attention_dropout = 0.5
    for module in model.modules():
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
    again = prune(model, GBLMPruner(samples=4), task)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(first.edits, again.edits, strict=True))
    # the gradient of the last matrix is that before anything was pruned
    site = weights(model)[-1]
    batches = list(task.batches("calibration", 4))
    whole = gradients(model, [site], batches, Gradient().needs, task.loss)[site.name]
    alone = prune(model, GBLMPruner(samples=4, criterion=Gradient()), task)
    keep = PerRow().select(Gradient().score(site, {site.name: model.get_parameter(site.name)}, whole), site.units // 2)
    assert torch.equal(alone.edits[-1].keep, keep)


def test_the_batch_size_does_not_matter_and_the_mix_does() -> None:
    model = trained("decoder")

    def keep(method: GBLMPruner, batch: int = 8) -> Tensor:
        task = toy_text(batch=batch)
        return torch.cat([e.keep.reshape(-1) for e in prune(model, method, task).edits])

    method = GBLMPruner(samples=8)
    assert (keep(method) == keep(method, batch=2)).double().mean() > 0.999
    loud, steep = keep(replace(method, criterion=Gblm(mix=0))), keep(replace(method, criterion=Gblm(mix=1e6)))
    assert torch.equal(loud, keep(Wanda(samples=8)))
    assert not torch.equal(steep, loud)


@pytest.mark.parametrize("pattern", [PerRow(), NM(2, 4)], ids=str)
def test_it_beats_chance_and_magnitude_on_a_trained_model(pattern: object) -> None:
    task, dense = make_task("decoder"), trained("decoder")

    def loss(method: object) -> float:
        return task.measure(prune(dense, method, task).model, "val")["nll"]

    found = {
        "gblm": loss(GBLMPruner(samples=32, pattern=pattern)),
        "gradient": loss(GBLMPruner(samples=32, pattern=pattern, criterion=Gradient())),
        "inverse": loss(GBLMPruner(samples=32, pattern=pattern, criterion=InverseGradient())),
        "magnitude": loss(Magnitude(pattern=pattern)),
        "random": loss(Random(pattern=pattern)),
    }
    assert found["gblm"] < found["random"]
    assert found["gradient"] < found["inverse"]
