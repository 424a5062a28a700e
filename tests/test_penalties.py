"""Penalties on the scales of norms: what a step does to each channel, and what cannot be pulled."""

import pytest
import torch
from torch import nn

from secateur.axes.penalties import L2, Condemned, Everywhere, ScalePenalty, SmoothL1, Weakest
from secateur.errors import SettingError, SiteError
from secateur.train import Loop, attach


class Bn(nn.Module):
    """Two norms in a row on features of their own, whose loss is flat in the scales when asked."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.BatchNorm1d(4), nn.BatchNorm1d(2)

    def forward(self, x):
        return torch.cat([self.a(x[:, :4]), self.b(x[:, :2])], 1)


def stepped(pressure, slope=None, scales=(1.0, -2.0, 0.5, 0.0), strength=0.1, progress=0.0):
    """What a step of plain SGD at rate 1 does to the scales, with a loss that is flat."""
    model = Bn()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor(scales))
    rule = ScalePenalty(["a.weight", "b.weight"], strength, pressure, slope)
    loop = Loop(model, torch.optim.SGD(model.parameters(), 1.0), steps=10, step=int(10 * progress))
    rule.start(loop)
    (model(torch.randn(8, 4)).sum() * 0).backward()
    rule.before_step(loop)
    loop.optimizer.step()
    return model.a.weight.tolist(), model.b.weight.tolist()


def close(values):
    return pytest.approx(values, abs=1e-6)


def test_a_penalty_moves_each_scale_by_its_share_worked_by_hand():
    everywhere = stepped(Everywhere())
    assert everywhere == (close([0.9, -1.9, 0.4, 0.0]), close([0.9, 0.9]))  # a scale at zero stays
    keep = {"a.weight": torch.tensor([True, False, False, True])}
    assert stepped(Condemned(keep)) == (close([1.0, -1.9, 0.4, 0.0]), close([1.0, 1.0]))  # no mask, no penalty
    assert stepped(Condemned({n: torch.zeros(k) for n, k in (("a.weight", 4), ("b.weight", 2))})) == everywhere
    # Half of six are weak: 0, 0.5 and, of the three ones, the first.
    weakest = Weakest(share=0.5, leak=0.01, begin=0.4)
    assert stepped(weakest, progress=0.5) == (close([0.9, -1.999, 0.4, 0.0]), close([0.999, 0.999]))
    assert stepped(weakest, progress=0.4) == everywhere
    assert stepped(Everywhere(), L2())[0] == close([0.9, -1.8, 0.45, 0.0])
    assert stepped(Everywhere(), SmoothL1(), (1.0, 0.05, 0.5, 0.0))[0] == close([0.9, 0.045, 0.4, 0.0])


def test_a_penalty_says_what_it_cannot_pull():
    model = Bn()
    model.b.weight.requires_grad_(False)
    loop = Loop(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1), steps=1)
    with pytest.raises(SiteError, match=r"b.weight was to be penalised, but it is frozen"):
        ScalePenalty(["b.weight"], 0.1).start(loop)
    with pytest.raises(SiteError, match=r"no tensor of that name"):
        ScalePenalty(["c.weight"], 0.1).start(loop)
    rule = ScalePenalty(["a.weight"], 0.1, Condemned({"a.weight": torch.ones(3)}))
    rule.start(loop)
    with pytest.raises(SiteError, match=r"no gradient reached it"):
        ScalePenalty(["a.weight"], 0.1).before_step(loop)
    with pytest.raises(SiteError, match=r"a mask of \[3\] for the scale a.weight was given, but that is \[4\]"):
        rule.before_step(loop)
    with pytest.raises(SettingError, match=r"strength 0"):
        ScalePenalty(["a.weight"], 0.0)
    with pytest.raises(SiteError, match=r"there are none"):
        ScalePenalty([], 0.1)
    with pytest.raises(SettingError, match=r"share=2"):
        Weakest(share=2)


def test_a_penalty_counts_once_a_step_however_many_batches_are_gathered():
    model = Bn()
    rule = ScalePenalty(["a.weight"], 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    attach(optimizer, model, [rule], steps=1)
    for _ in range(3):
        (model(torch.randn(8, 4)).sum() * 0).backward()
    optimizer.step()
    assert model.a.weight.tolist() == close([0.9] * 4)
