"""Edits: what each does to a model, and that a saved list of them replays to the same model."""

import copy

import pytest
import torch
from torch import nn

from secateur.cut import weights
from secateur.edit import Gate, Mask, Merge, Remove, Replace, Rotate, Update, apply_, harden, load, replacement, save
from secateur.errors import ModelError, SiteError
from secateur.graph import channels, removals
from secateur.outcome import Ledger, Size, elements
from secateur.site import Number, Part, Site
from secateur.task import Batch


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Net(nn.Module):
    """Two layers of 6 hidden neurons that knows its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down, self.width = nn.Linear(4, 6), nn.Linear(6, 3), 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)).reshape(-1, self.width))


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


NEURONS = Site(
    "hidden",
    "channel",
    (6,),
    (
        Part("up.weight", (6, 4), torch.arange(6).reshape(6, 1)),
        Part("up.bias", (6,), torch.arange(6)),
        Part("down.weight", (3, 6), torch.arange(6).reshape(1, 6)),
    ),
    (Number("", "width", 1.0),),
)
SINGLE = Site("up.weight", "weight", (6, 4), (Part("up.weight", (6, 4)),))
KEEP = torch.tensor([True, False, True, True, False, True])


def test_a_mask_writes_zeros_and_remembers_one_bit_a_unit() -> None:
    model, keep = net(), draw(6, 4) > 0
    before = model.up.weight.detach().clone()
    edit = Mask(SINGLE, keep)
    apply_(model, edit)
    assert torch.equal(model.up.weight, before * keep)
    assert torch.equal(edit.keep, keep)
    assert len(edit._bits) == 3
    assert edit.describe() == f"mask up.weight: {int(keep.sum())} of 24 weights kept"


def test_mask_then_remove_equals_remove_and_both_give_the_masked_outputs() -> None:
    x, masked, both, cut = draw(5, 4), net(), net(), net()
    apply_(masked, Mask(NEURONS, KEEP))
    apply_(both, [Mask(NEURONS, KEEP), Remove(NEURONS, KEEP)])
    apply_(cut, Remove(NEURONS, KEEP))
    torch.testing.assert_close(cut(x), masked(x))
    assert torch.equal(cut(x), both(x))
    assert (cut.up.out_features, cut.down.in_features, cut.width) == (4, 4, 4)
    assert cut.up.weight.shape == (4, 4)


def test_removal_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(SiteError, match="no smaller tensor holds the rest"):
        Remove(SINGLE, torch.ones(6, 4, dtype=torch.bool))
    with pytest.raises(SiteError, match="one at least must stay"):
        Remove(NEURONS, torch.zeros(6, dtype=torch.bool))
    with pytest.raises(SiteError, match="its units are"):
        Mask(NEURONS, torch.ones(5, dtype=torch.bool))


def test_an_update_sets_values_adds_a_missing_bias_and_nothing_else() -> None:
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    apply_(model, [Update("0.weight", torch.ones(3, 4)), Update("0.bias", torch.ones(3))])
    assert model(torch.ones(1, 4)).tolist() == [[5, 5, 5]]
    with pytest.raises(SiteError, match=r"no tensor has that name[\s\S]*Did you mean 0.weight"):
        apply_(model, Update("0.wieght", torch.ones(3, 4)))
    with pytest.raises(SiteError, match="there is no module 'x'"):
        apply_(model, Update("x.bias", torch.ones(3)))


def test_a_rotation_by_an_orthogonal_matrix_leaves_a_linear_stream_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    names = ("0.weight", "0.bias", "1.weight")
    site = Site(
        "s", "stream", (6,), tuple(Part(n, p.shape, p.owner) for n, p in zip(names, NEURONS.parts, strict=True))
    )
    basis, x = torch.linalg.qr(draw(6, 6).double()).Q, draw(5, 4)
    before = model(x)
    apply_(model, Rotate(site, basis))
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)
    apply_(model, Rotate(site, basis[:, :2]))
    assert model[0].weight.shape == (2, 4)
    with pytest.raises(SiteError, match="6 directions"):
        Rotate(site, torch.eye(5))


def test_a_permutation_is_a_rotation() -> None:
    model, x, order = net(), draw(5, 4), torch.tensor([3, 1, 5, 0, 2, 4])
    before, rows = model(x), model.up.weight.detach().clone()
    apply_(model, Rotate(NEURONS, torch.eye(6)[:, order]))
    torch.testing.assert_close(model(x), before)  # relu commutes with a permutation
    assert torch.equal(model.up.weight, rows[order])


def test_an_order_of_units_moves_all_that_each_owns_and_no_bit_of_it_changes() -> None:
    model, x, order = net(), draw(5, 4), torch.tensor([3, 1, 5, 0, 2, 4])
    other, before = copy.deepcopy(model), model(x)
    edit = Rotate(NEURONS, order)
    apply_(model, edit)
    apply_(other, Rotate(NEURONS, torch.eye(6)[:, order]))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    torch.testing.assert_close(model(x), before)
    apply_(model, Rotate(NEURONS, torch.argsort(order)))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net().parameters(), strict=True))
    assert edit.describe() == "rotate hidden: 6 channels in another order"


def test_an_order_fits_units_of_several_entries_and_leaves_alone_what_is_nobodys() -> None:
    owner = torch.tensor([-1, 0, 0, 1, 1, -1, 2, 2])
    site = Site("wide", "channel", (3,), (Part("weight", (2, 8), owner.reshape(1, 8)),))
    model = nn.Linear(8, 2, bias=False)
    model.weight.data = torch.arange(16.0).reshape(2, 8)
    apply_(model, Rotate(site, torch.tensor([2, 0, 1])))
    assert model.weight[0].tolist() == [0, 6, 7, 1, 2, 5, 3, 4]
    uneven = Site("w", "channel", (3,), (Part("weight", (2, 8), torch.tensor([0, 0, 1, 1, 2, 2, 2, 2]).reshape(1, 8)),))
    with pytest.raises(SiteError, match=r"they own unequal shares of weight \[2, 8\]"):
        apply_(model, Rotate(uneven, torch.tensor([2, 0, 1])))
    with pytest.raises(SiteError, match="it has 3, each to be named once"):
        Rotate(site, torch.tensor([0, 1, 1]))


def test_merging_averages_units() -> None:
    model = net()
    rows = model.up.weight.detach().clone()
    site = Site("up", "expert", (6,), NEURONS.parts[:1])
    apply_(model, Merge(site, torch.tensor([0, 0, 1, 1, 1, 0]), torch.tensor([0.5, 0.25, 1, 0, 0, 0.25])))
    torch.testing.assert_close(model.up.weight[0], 0.5 * rows[0] + 0.25 * rows[1] + 0.25 * rows[5])
    assert torch.equal(model.up.weight[1], rows[2])
    assert model.up.out_features == 2


class Half(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.full((6, 1), 0.5))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return self.level.expand(6, 4)


def test_a_gate_is_seen_by_the_forward_pass_learns_and_hardens() -> None:
    model, x = net(), draw(5, 4)
    plain, gate = model.up.weight.detach().clone(), Half()
    apply_(model, Gate(SINGLE, gate))
    torch.testing.assert_close(model.up.weight, plain / 2)
    model(x).sum().backward()
    assert gate.level.grad is not None
    harden(model)
    torch.testing.assert_close(model.up.weight.detach(), plain / 2)
    assert "up.weight" in model.state_dict()
    assert not any("parametrizations" in k for k in model.state_dict())


def test_tied_tensors_stay_tied() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 6, bias=False), "b": nn.Linear(3, 6, bias=False)})
    model["b"].weight = model["a"].weight
    site = Site("a", "channel", (6,), (Part("a.weight", (6, 3), torch.arange(6).reshape(6, 1)),))
    apply_(model, Remove(site, KEEP))
    assert model["a"].weight is model["b"].weight
    assert model["b"].weight.shape == (4, 3)


@replacement
class Scale(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.by = width, nn.Parameter(torch.ones(width))

    def settings(self) -> dict:
        return {"width": self.width}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.by


def edits() -> list:
    scale = Scale(3)
    scale.by.data = torch.tensor([1.0, 2, 3])
    return [
        Update("down.bias", draw(3)),
        Mask(SINGLE, draw(6, 4) > 0),
        Rotate(NEURONS, torch.eye(6)[:, torch.tensor([5, 4, 3, 2, 1, 0])]),
        Rotate(NEURONS, torch.tensor([1, 0, 2, 5, 4, 3])),
        Remove(NEURONS, KEEP),
        Replace("out", scale),
    ]


def test_saved_edits_replay_to_the_same_model(tmp_path) -> None:
    first, second = net(), net()
    first.out = second.out = nn.Identity()
    apply_(first, edits())
    save(edits(), tmp_path / "edits.safetensors")
    found = load(tmp_path / "edits.safetensors")
    apply_(second, found)
    assert [e.describe() for e in found] == [e.describe() for e in edits()]
    assert {k: v.tolist() for k, v in first.state_dict().items()} == {
        k: v.tolist() for k, v in second.state_dict().items()
    }
    assert second.width == 4
    assert not list(tmp_path.glob("*.partial"))


def test_experts_and_transposed_parts_survive_saving(tmp_path) -> None:
    expert = Site("e", "weight", (3, 2), (Part("w", (3, 2), index=1),))
    turned = Site("t", "weight", (3, 2), (Part("v", (3, 2), turned=True),), block="b.0")
    model = nn.Module()
    model.w, model.v = nn.Parameter(torch.ones(2, 3, 2)), nn.Parameter(torch.ones(2, 3))
    keep = torch.tensor([[True, False], [False, True], [True, True]])
    save([Mask(expert, keep), Mask(turned, keep)], tmp_path / "e")
    apply_(model, load(tmp_path / "e"))
    assert torch.equal(model.w[1] != 0, keep)
    assert bool((model.w[0] == 1).all())
    assert torch.equal(model.v != 0, keep.T)


def test_what_cannot_be_built_again_is_not_saved(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"Linear is not one of[\s\S]*@replacement"):
        save([Replace("out", nn.Linear(2, 2))], tmp_path / "e")
    with pytest.raises(ModelError, match="Harden it first"):
        save([Gate(SINGLE, Half())], tmp_path / "e")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["truncate", "other", "version", "missing"])
def test_a_file_that_is_not_whole_is_refused(tmp_path, damage: str) -> None:
    path = tmp_path / "e"
    save(edits(), path)
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-50])
    elif damage == "other":
        path.write_bytes(b"not safetensors at all")
    elif damage == "version":
        path.write_bytes(path.read_bytes().replace(b'"secateur_edits":"1"', b'"secateur_edits":"9"'))
    else:
        path.unlink()
    with pytest.raises(ModelError, match="edits were to be read"):
        load(path)


def test_an_edit_leaves_copies_alone() -> None:
    model = net()
    twin = copy.deepcopy(model)
    apply_(model, Remove(NEURONS, KEEP))
    assert twin.up.weight.shape == (6, 4)
    assert twin.width == 6


def test_what_was_masked_and_then_made_smaller_is_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    before, size = elements(model), Size(24, 0, 96, None, None)
    (first, _), (channel,) = weights(model, exclude=()), channels(model, Batch((torch.ones(1, 4),)))
    keep = torch.ones(4, 4, dtype=torch.bool)
    keep[:2] = False  # two rows of zeros, of which one then goes
    edits = apply_(model, [Mask(first, keep), *removals([channel], {channel.name: torch.arange(4) > 0})])
    ledger = Ledger.of_run((size, size), edits, before, model)
    assert (ledger.prunable, ledger.removed) == (24, 4 + 2 + 4)  # a row and a column gone, a row of zeros left
