"""Networks of timm, where it can be imported: each is coupled, cut by 30 % with nothing frozen, and differentiated."""

import copy
from importlib.util import find_spec

import pytest
import torch

from secateur.edit import Mask, apply_
from secateur.graph import couple, removals
from secateur.task import Batch

if find_spec("timm") is None or find_spec("torchvision") is None:
    pytest.skip("timm is not installed, or not torchvision, which it needs", allow_module_level=True)
timm = pytest.importorskip("timm")

NETWORKS = {
    "resnet18": 64,
    "resnetv2_50": 64,
    "vit_tiny_patch16_224": 224,
    "convnext_atto": 64,
    "mobilenetv3_small_050": 64,
    "efficientnet_b0": 64,
    "regnetx_002": 64,
    "hrnet_w18_small": 64,
    "dla34": 64,
    "fastvit_t8": 64,
}
"""Names, and the sides of pictures."""


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_cut_whole_and_has_gradients(name):
    draw = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, pretrained=False, num_classes=10).eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5, generator=draw)
    example = Batch((torch.randn(2, 3, NETWORKS[name], NETWORKS[name], generator=draw),))
    coupling = couple(model, example)
    assert coupling.sites and not coupling.frozen
    keep = {}
    for site in coupling.sites:
        of = coupling.multiples.get(site.name, 1)
        stays = max(of, int(site.units * 0.7) // of * of)
        keep[site.name] = torch.randperm(site.units, generator=draw) < stays
    cut = copy.deepcopy(model)
    apply_(cut, removals(coupling.sites, keep))
    exact = [site for site in coupling.sites if site.name not in coupling.inexact]
    masked, small = copy.deepcopy(model), copy.deepcopy(model)
    apply_(masked, [Mask(site, keep[site.name]) for site in exact])
    apply_(small, removals(exact, {site.name: keep[site.name] for site in exact}))
    with torch.no_grad():
        assert torch.allclose(masked(*example.inputs), small(*example.inputs), atol=1e-4, rtol=1e-3)
    assert sum(p.numel() for p in cut.parameters()) < 0.7 * sum(p.numel() for p in model.parameters())
    cut.train()(*example.inputs).square().mean().backward()
    assert all(p.grad is not None for p in cut.parameters())
