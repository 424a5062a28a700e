"""Scales of norms: which ones scale a site, thresholds, agreement of tied layers, and constants taken over."""

import copy

import pytest
import torch
from detectors import detector
from tiny import make_model, make_task
from torch import nn

from secateur.axes.scales import (
    Absorbed,
    Below,
    Dropped,
    Energy,
    agreed,
    below,
    channels_kept,
    norms_after,
    scale_names,
    scaled,
)
from secateur.edit import apply_
from secateur.errors import SettingError, SiteError
from secateur.graph import couple, removals
from secateur.site import tensors
from secateur.task import Batch


def test_thresholds_worked_by_hand():
    scale = torch.tensor([0.005, -0.01, 0.02, 3.0])
    assert below(scale, Below(0.01)).tolist() == [True, True, False, False]
    assert below(scale / 1000, Below(0.01)).tolist() == [True, True, True, False]  # the largest stays
    assert below(scale / 1000, Below(0.01), least=2).tolist() == [True, True, False, False]
    # Squares 1, 4, 9, 16 of 30: the running sum passes a fifth (6) at the third, so between 2 and 3.
    assert Energy(0.2).of(torch.tensor([-2.0, 1.0, 4.0, 3.0])) == 2.5
    assert Energy(0.01).of(torch.tensor([-2.0, 1.0, 4.0, 3.0])) == 0.0  # the first alone is more
    assert Energy(0.2).of(torch.tensor([1e-4, 2e-4])) == 1.0
    with pytest.raises(SettingError, match=r"a share of 1"):
        Energy(1.0)
    with pytest.raises(SettingError, match=r"a threshold of -1"):
        Below(-1)


def test_tied_layers_take_out_what_most_of_them_would_worked_by_hand():
    flags = torch.tensor(
        [
            [1, 1, 1, 0, 0],
            [1, 1, 0, 1, 0],
            [1, 0, 1, 1, 1],
        ]
    ).bool()
    # Votes 3, 2, 2, 2, 1 and the most reluctant would take out 3: four channels have two votes at least.
    assert agreed(flags).tolist() == [True, True, True, True, False]
    assert agreed(flags[:1]).tolist() == flags[0].tolist()
    assert agreed(torch.tensor([[1, 1, 1], [0, 0, 0]]).bool()).tolist() == [False] * 3  # one wants none
    assert agreed(torch.tensor([[1, 0, 0], [0, 1, 1]]).bool()).tolist() == [True] * 3  # one vote each, one needed


class Separable(nn.Module):
    """Convolution, depthwise convolution, convolution; a convolution whose norm was folded away."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6)
        self.depth, self.bn2 = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6)
        self.point, self.bn3 = nn.Conv2d(6, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.folded, self.fc = nn.Conv2d(5, 4, 1), nn.Linear(4, 2)

    def forward(self, x):
        x = torch.relu(self.bn2(self.depth(torch.relu(self.bn(self.conv(x))))))
        x = torch.relu(self.folded(torch.relu(self.bn3(self.point(x)))))
        return self.fc(x.mean((2, 3)))


def shaken(model, seed=0):
    """A model whose norms have scales, shifts and statistics of all sizes."""
    draw = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for value, low, high in ((module.weight, 0.5, 1.5), (module.bias, -0.5, 0.8), (module.running_mean, -1, 1)):
                value.data.copy_(low + (high - low) * torch.rand(value.shape, generator=draw))
            module.running_var.copy_(0.5 + torch.rand(module.running_var.shape, generator=draw))
    return model.eval()


def test_members_follow_what_makes_channels_and_depthwise_norms_have_no_say():
    model = shaken(Separable())
    example = Batch((torch.rand(2, 3, 6, 6),))
    assert norms_after(model, example) == {"conv": "bn", "depth": "bn2", "point": "bn3"}
    sites, others = scaled(model, example, couple(model, example))
    assert [[part.name for part in one.members] for one in sites] == [["bn.weight"], ["bn3.weight"]]
    assert others == ["folded"]
    tied, _ = scaled(make_model("cnn"), make_task("cnn").example, couple(make_model("cnn"), make_task("cnn").example))
    first = next(one for one in tied if one.site.name == "conv")
    assert [part.name for part in first.members] == ["bn.weight", "block1.bn2.weight"]
    named = {name: value.detach().clone() for name, value in tensors(make_model("cnn")).items()}
    named["bn.weight"], named["block1.bn2.weight"] = torch.arange(8.0), -torch.arange(8.0) * 2
    assert torch.equal(first.sizes(named), torch.stack([torch.arange(8.0), torch.arange(8.0) * 2]))
    keep = {one.site.name: torch.arange(one.site.units) > 2 for one in tied}
    assert channels_kept(tied, keep, named)["block1.bn2.weight"].tolist() == [False] * 3 + [True] * 5
    assert len(scale_names(tied)) == len(set(scale_names(tied))) == 6


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (nn.Identity(), r"it has no batch norms"),
        (nn.BatchNorm2d(4, affine=False), r"its norms have no scales \(affine=False\)"),
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4)), r"none of its layers goes straight into a norm with scales"),
    ],
)
def test_a_network_whose_norms_scale_nothing_is_refused(norm, says):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Conv2d(4, 2, 3)).eval()
    example = Batch((torch.rand(1, 3, 8, 8),))
    with pytest.raises(SiteError, match=says):
        scaled(model, example, couple(model, example))


def cut(model, example, share, constants, seed=0):
    """The network with a share of its channels off at zero scale, and what is left when they are taken out."""
    sites, _ = scaled(model, example, couple(model, example, verify=False))
    draw = torch.Generator().manual_seed(seed)
    keep = {one.site.name: torch.rand(one.site.units, generator=draw) >= share for one in sites}
    for kept in keep.values():
        kept[0] = True
    quiet = copy.deepcopy(model)
    with torch.no_grad():
        for name, kept in channels_kept(sites, keep, tensors(quiet)).items():
            tensors(quiet)[name].mul_(kept)
    small = copy.deepcopy(quiet)
    apply_(small, constants.edits(small, sites, keep, example))
    apply_(small, removals([one.site for one in sites], keep))
    fresh = torch.rand(4, *example.inputs[0].shape[1:], generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        return float((small(fresh) - quiet(fresh)).abs().mean() / quiet(fresh).abs().mean())


class Constant(nn.Module):
    """A shift that goes through an activation, pooling, a concatenation with a shortcut, and to two readers."""

    def __init__(self):
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.b, self.nb = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.c = nn.Conv2d(12, 5, 1, bias=False)  # no norm behind it, and no bias yet
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = torch.nn.functional.max_pool2d(torch.nn.functional.leaky_relu(self.na(self.a(x)), 0.1), 2)
        y = torch.relu(x + self.nb(self.b(x)))
        return self.fc(torch.relu(self.c(torch.cat([x, y], 1))).mean((2, 3)))


def test_constants_are_absorbed_exactly_where_there_are_no_borders():
    torch.manual_seed(1)
    model, example = shaken(Constant()), Batch((torch.rand(2, 3, 12, 12),))
    assert cut(model, example, 0.5, Dropped()) > 0.05
    assert cut(model, example, 0.5, Absorbed()) < 1e-5


def test_borders_take_part_of_a_constant_and_most_of_the_rest_is_saved():
    torch.manual_seed(0)
    example = Batch((torch.rand(2, 3, 64, 64),))
    model = shaken(detector())
    dropped, absorbed = (cut(model, example, 0.4, kind) for kind in (Dropped(), Absorbed()))
    assert absorbed < 0.5 * dropped
