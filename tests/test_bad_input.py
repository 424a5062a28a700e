"""What cannot work is said before it is tried, or where it went wrong: overflow, budgets, data that is too short."""

import pytest
import torch
from tiny import decoder, make_task, trained
from torch import Tensor, nn

from secateur.axes import NM, Gblm, PerMatrix
from secateur.axes.remasking import MaskLinear
from secateur.axes.sweep import gradients
from secateur.cut import weights
from secateur.errors import EvidenceError, SettingError
from secateur.method import Budget, Chain, Method, prune
from secateur.methods.flap import FLAP
from secateur.methods.gblm import GBLMPruner
from secateur.methods.l1_norm import L1Norm
from secateur.methods.magnitude import Magnitude
from secateur.methods.perp import Perp
from secateur.methods.polarization import Polarization
from secateur.methods.progressive_nm import ProgressiveNM
from secateur.methods.shortgpt import ShortGPT
from secateur.methods.slicegpt import SliceGPT
from secateur.methods.sparsegpt import SparseGPT
from secateur.methods.stun import STUN, Together
from secateur.methods.turbo_vbi import TurboVbi
from secateur.methods.wanda import Wanda
from secateur.recipe import build
from secateur.task import Batch


def plain_loss(model: nn.Module, batch: Batch) -> Tensor:
    return batch.through(model).float().sum()


def three(dtype: torch.dtype) -> tuple[nn.Module, Batch]:
    """The gradient is 8,000 times as large before the last layer: 80,000 is more than float16 holds."""
    model = nn.Sequential(*(nn.Linear(1, 1, bias=False) for _ in range(3)))
    for layer, value in zip(model, (0.001, 0.001, 8000.0), strict=True):
        layer.weight.data.fill_(value)
    return model.to(dtype), Batch((torch.full((1, 1), 10_000.0, dtype=dtype),))


def test_a_gradient_that_overflows_is_named_where_it_began() -> None:
    model, batch = three(torch.float16)
    with pytest.raises(EvidenceError, match=r"measured at 1\.weight[\s\S]*gradient overflowed there[\s\S]*bfloat16"):
        gradients(model, weights(model), [batch], Gblm().needs, plain_loss)
    assert all(p.grad is None for p in model.parameters())
    for dtype in (torch.bfloat16, torch.float32):
        model, batch = three(dtype)
        whole = gradients(model, weights(model), [batch], Gblm().needs, plain_loss)
        assert float(whole["1.weight"].sums["grad_square"]) == pytest.approx(80_000.0**2, rel=0.02)


@pytest.mark.parametrize(
    ("method", "setting", "text", "says"),
    [
        (STUN, "distance", "together(scaled=3)", "scaled=3 is not true or false"),
        (TurboVbi, "structure", "grid(sweeps=2.5)", "sweeps=2.5 is not a whole number"),
        (TurboVbi, "structure", "rows(begins=none)", "begins=None is not a number"),
        (TurboVbi, "structure", "rows(begins='0.1')", "begins='0.1' is not a number"),
        (ProgressiveNM, "decay", "mask-linear(beta=true)", "beta=True is not a number or none"),
        (Perp, "by", "reconstruct(samples=0)", "blocks were to be reconstructed on 0 examples"),
        (Polarization, "surrogate", "clipped-identity(limit=0)", "a slope up to 0 was asked for"),
    ],
)
def test_settings_of_parts_are_of_the_kind_they_should_be(method, setting, text, says) -> None:
    with pytest.raises(SettingError, match=says):
        build(method, {setting: text})


def test_settings_of_parts_take_the_words_that_other_settings_take() -> None:
    assert build(STUN, {"distance": "together(scaled=false)"}).distance == Together(scaled=False)
    assert build(ProgressiveNM, {"decay": "mask-linear(beta=none,by=1)"}).decay == MaskLinear(None, 1.0)


@pytest.mark.parametrize("method", [Wanda(samples=-1), Chain((Wanda(sparsity=0.4), Wanda(samples=-1)))])
def test_fewer_examples_than_none_are_refused(method: Method) -> None:
    with pytest.raises(SettingError, match=r"-1 calibration samples were asked for"):
        prune(decoder(), method, make_task("decoder"))


def test_an_input_that_overflows_is_named_where_it_began() -> None:
    model, task = decoder(), make_task("decoder")
    model.model.layers[0].mlp.up_proj.weight.data.fill_(1e30)  # its output times the gate's is read by down
    model.model.layers[0].mlp.gate_proj.weight.data.fill_(1e30)
    with pytest.raises(EvidenceError, match=r"measured at model\.layers\.0\.mlp\.down_proj[\s\S]*before this layer"):
        prune(model, Wanda(samples=4), task)


def test_a_gradient_that_is_not_finite_in_a_whole_model_ends_the_run_and_names_a_layer() -> None:
    model, task = decoder(), make_task("decoder")
    model.model.norm.weight.data.fill_(3e38)  # finite, as the weights must be; the loss is not
    with pytest.raises(EvidenceError, match=r"was measured at model\.layers\.1\.mlp\.down_proj"):
        prune(model, GBLMPruner(samples=2), task)


def test_budgets_of_masks_and_cuts_add_up() -> None:
    half = Wanda(sparsity=0.5)
    assert Chain((L1Norm(sparsity=0.2), L1Norm(sparsity=0.5))).budget() == Budget(1 - 0.8 * 0.5, "units")
    assert Chain((FLAP(sparsity=0.25), half)).budget().sparsity == pytest.approx(1 - 0.75 * 0.5)
    assert Chain((half, SparseGPT(sparsity=0.7))).budget() == Budget(0.7)  # masks count what is zero by then
    assert Chain((half, Perp())).budget() == Budget(0.5)  # a recovery removes nothing
    done = prune(trained("decoder"), Chain((Wanda(samples=4), Magnitude(sparsity=0.7))), make_task("decoder"))
    assert done.ledger.sparsity == pytest.approx(0.7, abs=0.01)
    assert not any("target" in note for note in done.notes)


def test_budgets_that_do_not_add_up_are_left_to_the_links_and_it_is_said() -> None:
    task = make_task("decoder")
    chain = Chain((ShortGPT(sparsity=0.25, samples=4), Wanda(samples=4)))
    assert chain.budget() is None
    note = prune(decoder(layers=4), chain, task).notes[-1]
    assert note == (
        "This chain has no target of its own: a sparsity of units and one of weights do not add up to one; each link "
        "meets its own."
    )
    parts = Chain((Magnitude(sparsity=0.5, include=("attention",)), Magnitude(sparsity=0.3, include=("mlp",))))
    assert parts.budget() is None
    assert "its masks are of different weights" in prune(decoder(), parts, task).notes[-1]


def test_a_mask_after_one_that_is_as_sparse_is_refused() -> None:
    for first, then in ((0.7, 0.5), (0.5, 0.5)):
        with pytest.raises(SettingError, match=rf"mask {then} of the weights after wanda[\s\S]*more than {first}"):
            Chain((Wanda(sparsity=first), Wanda(sparsity=then))).check()
    Chain((Wanda(sparsity=0.5), Wanda(sparsity=0.7))).check()
    Chain((Wanda(sparsity=0.7), Wanda(pattern=NM(2, 4)))).check()  # another pattern has work to do
    Chain((Magnitude(sparsity=0.5, include=("attention",)), Magnitude(sparsity=0.3, include=("mlp",)))).check()
    Chain((Magnitude(sparsity=0.5, pattern=PerMatrix()), SliceGPT(sparsity=0.3))).check()
