"""gather and expand are adjoint, whatever a unit is."""

import pytest
import torch
from tiny import make_model, make_task
from torch import nn

from secateur import prune
from secateur.cut import blocks, layers, weights
from secateur.errors import ModelError, SiteError
from secateur.methods.magnitude import Magnitude
from secateur.site import Part, Site, tensors


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


CHANNEL = Site(
    "c",
    "channel",
    (3,),
    (
        Part("up", (6, 4), torch.tensor([0, 0, 1, 1, 2, -1]).reshape(6, 1)),  # two rows a unit, one of nobody's
        Part("down", (4, 3), torch.tensor([2, 1, 0]).reshape(1, 3)),
        Part("bias", (3,), torch.arange(3)),
    ),
)
TILES = Site("t", "block", (2, 2), (Part("w", (4, 2), torch.tensor([[0, 1], [0, 1], [2, 3], [2, 3]])),))
SINGLE = Site("s", "weight", (3, 2), (Part("w", (3, 2)),))
EXPERT = Site("e", "weight", (3, 2), (Part("w", (3, 2), index=1),))
TURNED = Site("g", "weight", (3, 2), (Part("w", (3, 2), turned=True),))
SHAPES = {"up": (6, 4), "down": (4, 3), "bias": (3,)}


def whole(site: Site) -> dict[str, torch.Tensor]:
    found = {}
    for part in site.parts:
        shape = tuple(reversed(part.shape)) if part.turned else part.shape
        found[part.name] = draw(*((4, *shape) if part.index is not None else shape))
    return found


@pytest.mark.parametrize("site", [CHANNEL, TILES, SINGLE, EXPERT, TURNED], ids=lambda s: s.name)
def test_gather_and_expand_are_adjoint(site: Site) -> None:
    named, units = whole(site), draw(*site.shape)
    left = float((site.gather(named) * units).sum())
    spread = site.expand(units)
    right = sum(float((part.read(named) * spread[part.key]).sum()) for part in site.parts)
    assert left == pytest.approx(right)


def test_gather_by_hand() -> None:
    named = {"up": torch.ones(6, 4), "down": torch.ones(4, 3), "bias": torch.tensor([1.0, 2, 3])}
    assert CHANNEL.gather(named).tolist() == [8 + 4 + 1, 8 + 4 + 2, 4 + 4 + 3]


def test_cost_counts_what_a_unit_owns() -> None:
    assert CHANNEL.cost("weights").tolist() == [13, 13, 9]
    assert CHANNEL.cost("bytes").tolist() == [52, 52, 36]
    assert CHANNEL.cost("units").tolist() == [1, 1, 1]
    assert TILES.cost().tolist() == [[2, 2], [2, 2]]
    assert SINGLE.cost("flops").tolist() == [[2, 2]] * 3


def test_what_nobody_owns_gets_the_filling() -> None:
    spread = CHANNEL.expand(torch.tensor([1.0, 2, 3]), nobody=7)
    assert spread["up"].reshape(-1).tolist() == [1, 1, 2, 2, 3, 7]


def test_only_units_along_one_axis_can_be_removed() -> None:
    assert CHANNEL.removable
    assert not TILES.removable
    assert not SINGLE.removable


def test_a_name_that_is_not_there_is_said_with_the_nearest() -> None:
    with pytest.raises(SiteError, match=r"no tensor has that name[\s\S]*Did you mean up2"):
        CHANNEL.gather({"up2": torch.ones(1)})


def test_weights_of_a_decoder_are_those_in_its_blocks() -> None:
    model = make_model("decoder")
    names = [s.name for s in weights(model)]
    assert names
    assert all(".layers." in n and "norm" not in n for n in names)
    assert {s.block for s in weights(model)} == {f"model.layers.{i}" for i in range(len(model.model.layers))}


def test_weights_of_a_picture_net_are_all_of_them() -> None:
    model = make_model("cnn")
    wanted = {n for n, p in model.named_parameters() if p.dim() >= 2}
    assert {s.name for s in weights(model)} == wanted


def test_selections_by_glob_class_role_and_expression() -> None:
    model = make_model("decoder")
    assert all("q_proj" in s.name for s in weights(model, include=["*.q_proj"]))
    assert all("mlp" in s.name for s in weights(model, include=["mlp"]))
    assert all("layers.0" not in s.name for s in weights(model, exclude=["re:layers\\.0\\."]))
    assert len(weights(model, include=["*"], exclude=())) == len(weights(model)) + 1  # the tied embedding, once
    with pytest.raises(SiteError, match=r"matches no parameter[\s\S]*Did you mean"):
        weights(model, include=["*.qproj"])
    with pytest.raises(SiteError, match="nothing is left to prune"):
        weights(model, include=["mlp"], exclude=["mlp"])


def test_routers_are_left_alone_and_experts_are_sites() -> None:
    names = [s.name for s in weights(make_model("moe"))]
    assert any("experts.gate_up_proj[0]" in n for n in names)
    assert not any(n.endswith("gate.weight") for n in names)


def test_blocks_and_layers() -> None:
    model = make_model("decoder")
    tiles = blocks(model, (4, 1))
    assert all(s.kind == "block" and s.shape[0] * 4 == s.parts[0].shape[0] for s in tiles)
    with pytest.raises(SiteError, match="do not divide it"):
        blocks(model, (7, 1))
    (stack,) = layers(model)
    assert stack.shape == (len(model.model.layers),)
    assert float(stack.cost().sum()) == sum(p.numel() for p in model.model.layers.parameters())


def test_weights_of_lazy_modules_are_asked_for_once_they_are_there() -> None:
    model, task = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4)), make_task("mlp")
    for ask in (lambda: weights(model), lambda: prune(model, Magnitude(), task), lambda: Magnitude().run(model, task)):
        with pytest.raises(ModelError, match=r"0\.weight has neither shape nor values yet(.|\n)*on an example first"):
            ask()
    task.example.through(model)
    assert [site.shape[0] for site in weights(model)] == [8, 4]


def test_tied_tensors_go_under_each_of_their_names() -> None:
    model = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    model["b"].weight = model["a"].weight
    assert tensors(model)["a.weight"] is tensors(model)["b.weight"]
