"""What cannot be traced is kept whole and named, or refused; what is unusual is coupled; no count falls to zero."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.edit import Mask, Remove, apply_
from secateur.errors import GraphError, SiteError
from secateur.graph import Coupling, couple, removals
from secateur.method import prune
from secateur.methods.l1_norm import L1Norm
from secateur.task import Batch


def some(units: int) -> Tensor:
    return torch.arange(units) % 3 != 1


def agrees(model: nn.Module, batch: Batch) -> Coupling:
    """Couple a network; every site at once masked equals removed."""
    coupling = couple(model.eval(), batch)
    keep = {site.name: some(site.units) for site in coupling.sites}
    masked, removed = copy.deepcopy(model), copy.deepcopy(model)
    apply_(masked, [Mask(site, keep[site.name]) for site in coupling.sites])
    apply_(removed, removals(coupling.sites, keep))
    with torch.no_grad():
        one, other = batch.through(masked), batch.through(removed)
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    return coupling


class Halving(nn.Module):
    """Halves until all is small: how often depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        while bool(x.abs().max() > 1):
            x = x / 2
        return self.scale(x)


def test_a_module_that_cannot_be_traced_is_kept_whole_and_the_rest_is_cut() -> None:
    model = nn.Sequential(
        nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 8), Halving(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 2)
    )
    coupling = agrees(model, Batch((torch.randn(3, 5) * 9,)))
    assert {s.name: s.units for s in coupling.sites} == {"0": 6, "4": 7}
    (frozen,) = coupling.frozen
    assert str(frozen).startswith("frozen: module Halving at 3: torch.export cannot trace it: ")
    assert "while bool(x.abs().max() > 1)" in frozen.why
    assert "forward" not in vars(model[3])  # as it was


def test_a_network_that_cannot_be_traced_is_refused_with_its_line_and_what_to_do() -> None:
    with pytest.raises(GraphError) as said:
        couple(Halving().eval(), Batch((torch.randn(3, 8) * 9,)))
    assert said.value.asked == "the coupling of a Halving was asked for"
    assert said.value.found.startswith("torch.export cannot trace its forward pass: ")
    assert "test_graph_input.py" in said.value.found
    assert "while bool(x.abs().max() > 1)" in said.value.found
    assert said.value.do == (
        "Put that step into a module of its own, which is then kept whole while the rest is cut; or use a method that "
        "masks weights, which needs no trace."
    )


def test_what_no_exporter_knows_is_named_by_its_line() -> None:
    class Printed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.from_numpy(self.a(x).detach().numpy())

    with pytest.raises(GraphError, match=r"coupling of a Printed was asked for(.|\n)*numpy\(\)"):
        couple(Printed().eval(), Batch((torch.randn(3, 5),)))


def test_a_shape_that_depends_on_data_is_followed_as_far_as_it_goes() -> None:
    class Chosen(nn.Module):
        """Only the rows above zero are worked on."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(5, 6), nn.Linear(6, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.a(x))
            return self.c(F.relu(self.b(x[x.sum(-1) > 0]))).sum(0)

    coupling = agrees(Chosen(), Batch((torch.randn(6, 5),)))
    assert "b" in {s.name for s in coupling.sites}


def test_writing_into_a_part_of_a_tensor_couples_what_it_touches() -> None:
    class Within(nn.Module):
        """Adds into a view of what a layer gave, in place, and overwrites rows."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 2), nn.Linear(5, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            y[:2].add_(self.b(x[:2]))
            y[2] = 0
            y[torch.tensor([3])] = self.d(x[:1])
            return self.c(y.relu_())

    coupling = agrees(Within(), Batch((torch.randn(4, 5),)))
    (site,) = coupling.sites
    assert {part.name for part in site.parts} >= {"a.weight", "b.weight", "c.weight", "d.weight"}


def test_a_module_that_is_used_twice_is_cut_once_for_both() -> None:
    class Twice(nn.Module):
        """One layer sees its own answer; another has two names."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.shared, self.c = nn.Linear(5, 8), nn.Linear(8, 8), nn.Linear(8, 2)
            self.again = self.shared

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return self.c(x + self.again(F.relu(self.shared(x))))

    coupling = agrees(Twice(), Batch((torch.randn(4, 5),)))
    (site,) = coupling.sites
    axes = [(part.name, part.axis) for part in site.parts if part.name.endswith("weight")]
    assert axes == [("a.weight", 0), ("shared.weight", 0), ("shared.weight", 1), ("c.weight", 1)]
    cut = copy.deepcopy(Twice())
    apply_(cut, removals([site], {site.name: some(8)}))
    assert cut.again is cut.shared
    assert cut.shared.weight.shape == (5, 5)


def test_no_count_falls_to_zero() -> None:
    model, batch = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), Batch((torch.randn(3, 5),))
    (site,) = couple(model, batch).sites
    with pytest.raises(SiteError) as said:
        Remove(site, torch.zeros(4, dtype=torch.bool))
    assert str(said.value).startswith("all 4 units of 0 were to be removed, but one at least must stay.")

    class One:
        name, seed, metric, higher_is_better, clients, example = "one", 0, "none", False, (), batch

        def fingerprint(self) -> str:
            return "one"

    cut = prune(model, L1Norm(sparsity=0.99), One()).model
    assert cut[0].out_features == 1
