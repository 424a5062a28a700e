"""Evidence: what flows into a weight, summed so that grouping does not matter."""

import pytest
import torch
import torch.nn.functional as F
from tiny import make_model, make_task
from torch import nn

from secateur.cut import weights
from secateur.errors import EvidenceError, SettingError
from secateur.evidence import Evidence, observe
from secateur.task import Batch


def vectors(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_three_sums_by_hand() -> None:
    model = nn.Linear(2, 1)
    found = observe(
        model, weights(model), [Batch((torch.tensor([[1.0, 2], [3, 4]]),))], {"input", "input_square", "gram"}
    )
    seen = found["weight"]
    assert seen.count == 2
    assert seen.sums["input"].tolist() == [4, 6]
    assert seen.sums["input_square"].tolist() == [10, 20]
    assert seen.sums["gram"].tolist() == [[10, 14], [14, 20]]
    assert seen.mean("input").tolist() == [2, 3]


def test_evidence_merges_to_the_same_sums_in_any_grouping() -> None:
    model, sites = make_model("mlp"), weights(make_model("mlp"))
    batches = [Batch((vectors(4, 16, seed=i),)) for i in range(6)]
    whole = observe(model, sites, batches, {"gram"})
    parts = [observe(model, sites, group, {"gram"}) for group in (batches[4:], batches[:1], batches[1:4])]
    for site in sites:
        merged = parts[0][site.name].merge(parts[1][site.name]).merge(parts[2][site.name])
        assert merged.count == whole[site.name].count == 24
        torch.testing.assert_close(merged.sums["gram"], whole[site.name].sums["gram"], rtol=1e-6, atol=1e-8)
    assert Evidence().merge(whole["0.weight"]).count == 24


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, stride=2, padding=1),
        nn.Conv2d(4, 6, 3, padding="same", dilation=2),
        nn.Conv2d(4, 6, 4, padding="same"),  # three pixels of padding: one in front, two behind
        nn.Conv2d(4, 6, (2, 3), padding="same"),
        nn.Conv2d(4, 6, (3, 1), groups=2),
        nn.Conv1d(4, 6, 3, padding=2, stride=2),
    ],
    ids=str,
)
def test_a_convolution_is_a_product_with_its_unfolded_input(conv: nn.Module) -> None:
    """The gram explains the output: sum of y^2 = w G w^T, without the bias."""
    x = vectors(3, 4, 9, 9) if isinstance(conv, nn.Conv2d) else vectors(3, 4, 9)
    nn.init.zeros_(conv.bias)
    (site,) = weights(conv)
    gram = observe(conv, [site], [Batch((x,))], {"gram"})[site.name].sums["gram"].float()
    gram = gram if gram.dim() == 3 else gram.unsqueeze(0)
    rows = conv.weight.detach().flatten(1).chunk(len(gram))
    energy = torch.cat([torch.einsum("ri,ij,rj->r", w, g, w) for w, g in zip(rows, gram, strict=True)])
    y = conv(x).detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(energy, y.square().sum(1), rtol=1e-4, atol=1e-4)


class Functional(nn.Module):
    """Weights used by functions, one of them twice, none by a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(vectors(3, 4)), nn.Parameter(vectors(3, 4, seed=1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(F.linear(x, self.w) @ self.w, self.w) + torch.matmul(x, self.v.T)


def test_weights_used_by_functions_and_twice_are_seen_each_time() -> None:
    model = Functional()
    sites = weights(model)
    seen = observe(model, sites, [Batch((vectors(5, 4),))], {"input_square"})
    assert seen["w"].count == 10  # its inputs flowed in twice; read backwards they are its outputs
    assert seen["v"].count == 5


def test_inputs_that_are_shared_are_summed_once() -> None:
    model, task = make_model("decoder"), make_task("decoder")
    seen = observe(model, weights(model), task.batches("calibration", 2), {"gram"})
    attention = "model.layers.0.self_attn."
    q, k, o = (seen[f"{attention}{n}_proj.weight"].sums["gram"] for n in "qko")
    assert q.data_ptr() == k.data_ptr() != o.data_ptr()


def test_gradients_are_those_of_the_loss() -> None:
    model, task = make_model("mlp"), make_task("mlp")
    batches = list(task.batches("calibration", 8))
    seen = observe(model, weights(model), batches, {"grad", "grad_square", "input"}, task.loss)
    total = torch.zeros_like(model[0].weight)
    for batch in batches:
        (grad,) = torch.autograd.grad(task.loss(model, batch), model[0].weight)
        total += grad
    torch.testing.assert_close(seen["0.weight"].sums["grad"].float(), total)
    assert seen["0.weight"].sums["input"].shape == (16,)
    assert all(p.grad is None for p in model.parameters())


def test_errors_say_what_where_and_what_to_do() -> None:
    model = nn.Linear(2, 1)
    with pytest.raises(SettingError, match=r"evidence 'gramm'[\s\S]*Did you mean gram"):
        observe(model, weights(model), [], {"gramm"})
    with pytest.raises(SettingError, match="no loss was given"):
        observe(model, weights(model), [Batch((torch.ones(1, 2),))], {"grad"})
    with pytest.raises(EvidenceError, match=r"weight[\s\S]*NaN or infinity"):
        observe(model, weights(model), [Batch((torch.tensor([[float("nan"), 1]]),))], {"input"})
    with pytest.raises(EvidenceError, match="nothing was seen there"):
        Evidence().mean("input")
