"""What takes filters out, on the trained ResNet-20 of the data pack and a few of its photographs: cut, saved, loaded.

Most claims are of such networks too, and take minutes; here each method has to go through one, in seconds.
"""

import pytest
import torch

from secateur.axes.groups import JointObs
from secateur.method import prune
from secateur.methods.mask_sparsity import Below, MaskSparsity
from secateur.methods.precrop import Nearest, PreCrop
from secateur.methods.regression import Regression
from secateur.methods.slimming import Slimming
from secateur.methods.soft_filter import SoftFilter
from secateur.methods.spa import Anew, Mend, Spa
from secateur.methods.structure_selection import StructureSelection
from secateur.methods.thinet import ThiNet

METHODS = {
    # a method, and how much of the accuracy of the dense network is left, where weights are inherited and hardly tuned
    "precrop": (PreCrop(sparsity=0.5, steps=1), 0.0),
    "precrop to a budget of multiply-adds": (PreCrop(sparsity=0.0, flops=0.5, widths=Nearest(), steps=1), 0.0),
    "slimming": (Slimming(sparsity=0.1, strength=1e-4, floor=1, steps=2, recover=1), 0.3),
    "thinet": (ThiNet(sparsity=0.25, samples=16, places=8, each=0, recover=1), 0.6),
    "regression": (Regression(sparsity=0.25, samples=16, places=16, recover=1), 0.6),
    "soft_filter": (SoftFilter(sparsity=0.1, steps=2, every=1, samples=64), 0.3),
    "structure_selection": (StructureSelection(strength=500.0, steps=2), 0.0),
    "mask_sparsity": (MaskSparsity(sparsity=0.3, strength=20.0, steps=4, threshold=Below(0.2)), 0.0),
    "spa": (Spa(sparsity=0.3, of="flops", criterion=JointObs(), repair=Mend(), norms=Anew(), samples=64), 0.7),
}


@pytest.fixture(scope="module")
def photographs(data):
    from secateur.tasks.images import cifar10
    from secateur.tasks.learners import Sgd

    return cifar10(train_size=64, val_size=16, test_size=64, batch=32, learner=Sgd(0.001))


@pytest.mark.parametrize("name", METHODS)
def test_a_trained_residual_network_is_cut_saved_and_loaded(name, photographs, tmp_path):
    from secateur.models import load, open_model, save

    method, least = METHODS[name]
    opened = open_model("resnet20")
    done = prune(opened.model, method, photographs)
    before, after = done.ledger.before, done.ledger.after
    assert after.parameters < before.parameters
    assert after.flops < before.flops
    if (budget := method.budget()) is not None:
        units = sum(row.units for row in done.record.sites)
        reached = {"weights": 1 - after.parameters / before.parameters, "flops": 1 - after.flops / before.flops,
                   "units": done.ledger.units_removed / units}[budget.of]  # fmt: skip
        assert reached == pytest.approx(budget.sparsity, abs=0.03)
    dense = photographs.measure(opened.model, "test")["accuracy"]
    assert photographs.measure(done.model, "test")["accuracy"] >= least * dense
    again = load(save(done, opened, tmp_path / "cut"))
    x = photographs.example.inputs[0]
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(x), done.model.eval()(x))
