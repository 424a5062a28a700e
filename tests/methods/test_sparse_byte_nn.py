"""SparseByteNN: blocks of output channels, and the rearrangement of the whole network that makes them worth more."""

import copy
from dataclasses import replace
from itertools import permutations

import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import prune
from secateur.axes import ChannelBlocks, Taps
from secateur.axes.orders import AsTrained, ByNorm, Clustered, Rows, grown, kept, rearrange_, swapped
from secateur.cut import weights
from secateur.edit import Mask, Rotate, apply_
from secateur.errors import BudgetError, SettingError
from secateur.graph import couple
from secateur.methods.sparse_byte_nn import SparseByteNN
from secateur.models.mobilenet import MobileNet
from secateur.models.resnet import CifarResNet
from secateur.site import tensors
from secateur.task import Batch
from secateur.tasks.labelled import Labelled

IMAGES = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(3))


def pictures() -> Labelled:
    """Pictures whose labels say nothing: for runs that only need something to be trained on."""
    labels = torch.arange(64) % 4
    return Labelled("noise", dict.fromkeys(("train", "val", "test"), (IMAGES, labels)), batch=16)


def lived_in(model: nn.Module) -> nn.Module:
    """A network whose norms have statistics and scales of their own, so that leaving one behind is seen."""
    draw = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias.data):
                tensor.copy_(torch.randn(tensor.shape, generator=draw) * 0.2)
            for tensor in (module.running_var, module.weight.data):
                tensor.copy_(torch.rand(tensor.shape, generator=draw) + 0.5)
    return model.eval()


def mobilenet() -> nn.Module:
    """Four blocks of a MobileNet, 6 to 24 channels wide: no multiple of four in the second."""
    net = tiny.seeded(lambda: MobileNet(3 / 16, 4, stages=((64, 2), (96, 1), (128, 2), (128, 1))), 0)
    return lived_in(net)


def resnet() -> nn.Module:
    """Two blocks a stage, 8 to 32 channels, with shortcuts that pad channels on both sides."""
    return lived_in(tiny.seeded(lambda: CifarResNet(14, width=8, classes=4), 0))


class Flattened(nn.Module):
    """A convolution with a bias whose 2x2 pixels are laid out flat for a linear layer, and one of two groups."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(3, 8, 3, 16, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.three, self.four, self.five = nn.Conv2d(8, 12, 3, 1, 1), nn.Linear(48, 10), nn.Linear(10, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.three(torch.relu(self.two(torch.relu(self.one(x))))))
        return self.five(torch.relu(self.four(x.flatten(1))))


NETS = {"mobilenet": mobilenet, "resnet": resnet, "flattened": lambda: tiny.seeded(Flattened, 0)}


def masks_of(outcome) -> dict[str, torch.Tensor]:
    return {e.site.name: e.keep for e in outcome.edits if isinstance(e, Mask)}


# By hand


def test_two_rows_that_are_large_at_the_same_inputs_come_to_share_a_block() -> None:
    rows = torch.tensor([[9.0, 0, 1], [0, 9, 1], [9, 0, 1], [0, 9, 1]])
    layer = Rows(rows, torch.arange(4), n=2, keep=4)
    assert kept([layer], torch.arange(4)) == 18  # every block holds 9, 9 and 2, and two of six stay
    order = Clustered().of([layer], 4)
    assert sorted(map(sorted, [order[:2].tolist(), order[2:].tolist()])) == [[0, 2], [1, 3]]
    assert kept([layer], order) == 36
    assert ByNorm().of([Rows(rows * torch.tensor([[1.0], [3], [2], [4]]), torch.arange(4), 2, 4)], 4).tolist() == [
        3, 1, 2, 0,
    ]  # fmt: skip
    assert AsTrained().of([layer], 4) is None


def test_a_set_that_several_layers_write_gets_one_order_for_what_they_keep_together() -> None:
    one = torch.tensor([[1.0, 0], [0, 1], [1, 0], [0, 1]])  # wants 0 with 2
    two = torch.tensor([[5.0, 0], [5, 0], [0, 5], [0, 5]])  # wants 0 with 1, and weighs more
    layers = [Rows(size, torch.arange(4), 2, 4) for size in (one, two)]
    order = Clustered().of(layers, 4)
    assert kept(layers, order) == kept(layers, torch.arange(4)) == 20 + 2
    assert kept(layers, torch.tensor([0, 2, 1, 3])) == 4 + 10


def test_rows_of_another_set_in_the_same_block_are_reckoned_with() -> None:
    # Rows 1 and 2 are this set's; rows 0 and 3 are not. With row 2 beside row 0, both blocks are worth keeping whole.
    rows = torch.tensor([[9.0, 0], [0, 9], [9, 0], [0, 9]])
    layer = Rows(rows, torch.tensor([1, 2]), n=2, keep=4)
    assert Clustered().of([layer], 2).tolist() == [1, 0]
    assert torch.equal(layer.moved(torch.tensor([1, 0])), rows[[0, 2, 1, 3]])


# Properties


@given(st.integers(0, 10_000), st.sampled_from([(8, 5, 2), (6, 9, 4), (7, 4, 3), (12, 6, 4)]), st.integers(1, 9))
@settings(max_examples=30)
def test_an_order_is_a_permutation_and_clusters_never_keep_less(seed: int, size: tuple[int, int, int], tenths: int):
    rows, inputs, n = size
    draw = torch.Generator().manual_seed(seed)
    layers = [Rows(torch.rand(rows, inputs, generator=draw), torch.arange(rows), n, rows * inputs * tenths // 10)]
    layers.append(replace(layers[0], size=torch.rand(rows, inputs, generator=draw), n=2))
    plain = torch.arange(rows)
    for order in (Clustered().of(layers, rows), grown(layers, rows), swapped(layers, plain), ByNorm().of(layers, rows)):
        assert order.sort().values.tolist() == plain.tolist()
    assert kept(layers, Clustered().of(layers, rows)) >= kept(layers, plain)


def test_clusters_come_near_the_best_of_all_orders_and_ahead_of_norms() -> None:
    ours, norms, best, plain = 0.0, 0.0, 0.0, 0.0
    for seed in range(6):
        size = torch.rand(6, 5, generator=torch.Generator().manual_seed(seed)) ** 2
        layer = [Rows(size, torch.arange(6), 2, 14)]
        ours, norms = ours + kept(layer, Clustered().of(layer, 6)), norms + kept(layer, ByNorm().of(layer, 6))
        plain += kept(layer, torch.arange(6))
        best += max(kept(layer, torch.tensor(p)) for p in permutations(range(6)) if p[0] < p[1] and p[2] < p[3])
    assert plain < norms < ours
    assert ours >= 0.98 * best


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("order", [Clustered(), ByNorm()], ids=["clustered", "by norm"])
def test_a_rearranged_network_computes_what_it_did(name: str, order) -> None:
    model = NETS[name]()
    other, example = copy.deepcopy(model), Batch((IMAGES[:4],))
    coupled = couple(other, example).of("channel", "stream")
    sites = [s for s in weights(other) if s.shape[0] > 4 and (len(s.shape) == 2 or s.shape[1] > 4)]
    keep = {site.name: site.units // 2 // 36 * 36 for site in sites}
    keep = {site.name: ChannelBlocks(4).nearest(site.shape, keep[site.name]) for site in sites}
    edits, left = rearrange_(other, example, coupled, sites, keep, 4, order)
    assert len(edits) >= 2
    assert not left
    changed = {part.name for edit in edits for part in edit.site.parts}
    assert all(not torch.equal(tensors(other)[n], tensors(model)[n]) for n in changed if tensors(model)[n].dim() > 1)
    with torch.no_grad():
        assert float((model(IMAGES) - other(IMAGES)).abs().max()) <= 1e-5
    # what goes in and what comes out keep their order
    ends = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    first, last = ends[0], ends[-1]
    names = {id(p): n for n, p in model.named_parameters()}
    for edit in edits:
        for part in edit.site.parts:
            assert not (part.name == names[id(first.weight)] and part.axis == 1)
            assert not (part.name == names[id(last.weight)] and part.axis == 0)


def test_statistics_left_behind_would_be_seen() -> None:
    model, example = mobilenet(), Batch((IMAGES[:4],))
    site = couple(model, example).of("channel")[1]
    lame = replace(site, parts=tuple(p for p in site.parts if "running_mean" not in p.name))
    sites = [s for s in weights(model) if s.shape[1] > 1]
    keep = {s.name: ChannelBlocks(4).nearest(s.shape, s.units // 2) for s in sites}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    edits, left = rearrange_(model, example, [lame], sites, keep, 4, Clustered())
    assert edits == []
    assert left == [f"{site.name} stays in its order: in another the model's answer would change"]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", NETS)
def test_blocks_are_contiguous_counts_are_met_and_the_ends_stay_dense(name: str) -> None:
    model = NETS[name]()
    done = prune(model, SparseByteNN(sparsity=0.5, steps=0), pictures())
    masks = masks_of(done)
    for keep in masks.values():
        rows = len(keep) // 4 * 4
        blocks = keep[:rows].reshape(rows // 4, 4, keep.shape[1], -1)
        assert torch.equal(blocks, blocks[:, :1, :, :1].expand_as(blocks))
        assert int(keep.sum()) == ChannelBlocks(4).nearest(keep.shape, keep.numel() // 2)
    dense = {"mobilenet": {"conv.weight", "linear.weight", *(f"blocks.{i}.depthwise.weight" for i in range(4))},
             "resnet": {"conv1.weight", "linear.weight"},
             "flattened": {"one.weight", "two.weight", "five.weight"}}[name]  # fmt: skip
    assert dense | masks.keys() == {s.name for s in weights(model)}
    assert not dense & masks.keys()
    again = copy.deepcopy(model)
    apply_(again, done.edits)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), done.model.parameters(), strict=True))


def test_what_is_stored_counts_the_zeros_of_kept_blocks() -> None:
    model = nn.Sequential(nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 4))
    model[0].weight.data = torch.ones(8, 6)
    model[0].weight.data[0, :] = 0  # a row of zeros, each in a block that is kept or not with three others
    task = Labelled("noise", {s: (torch.randn(8, 6), torch.arange(8) % 4) for s in ("train", "val", "test")}, batch=4)
    done = prune(model, SparseByteNN(sparsity=0.5, steps=0, order=AsTrained()), task)
    assert int(masks_of(done)["0.weight"].sum()) == 24  # the second block row: its sums are 4, those of the first 3
    done = prune(model, SparseByteNN(sparsity=0.25, steps=0, order=AsTrained()), task)
    assert any(n.startswith("36 of 48 weights of pruned layers are stored, 3 zeros in kept blocks") for n in done.notes)
    assert any("a stored density of 0.75" in n for n in done.notes)


# Depthwise kernels, training, settings


def test_depthwise_kernels_keep_four_taps_when_asked() -> None:
    done = prune(mobilenet(), SparseByteNN(depthwise=Taps(), steps=0, n=8), pictures())
    masks = masks_of(done)
    for i in range(4):
        keep = masks[f"blocks.{i}.depthwise.weight"]
        assert set(keep.flatten(1).sum(1).tolist()) == {4}
        assert bool(keep[:, 0, 1, 1].all())
        weight = tensors(done.model)[f"blocks.{i}.depthwise.weight"]
        assert int((weight != 0).sum()) == 4 * len(keep)


@pytest.mark.parametrize("until", [0.0, 0.5])
def test_masks_are_held_in_training_and_a_rising_sparsity_ends_where_it_should(until: float) -> None:
    method = SparseByteNN(sparsity=0.5, until=until, steps=6, every=1, depthwise=Taps())
    done = prune(mobilenet(), method, pictures())
    for name, keep in masks_of(done).items():
        weight = tensors(done.model)[name]
        assert bool((weight[~keep] == 0).all())
        if "depthwise" not in name:
            assert int(keep.sum()) == ChannelBlocks(4).nearest(keep.shape, keep.numel() // 2)
    levels = [value for _, value in done.history.curves["sparsity"]]
    assert len(set(levels)) > 3 if until else len(levels) >= 1
    assert any(isinstance(e, Rotate) for e in done.edits)
    before = prune(mobilenet(), replace(method, steps=0, until=0.0), pictures())
    assert not torch.equal(before.model.linear.weight, done.model.linear.weight)  # it was trained


@pytest.mark.parametrize("n", [4, 8])
def test_a_rising_sparsity_gets_along_with_rows_that_no_block_is_left_for(n: int) -> None:
    net = nn.Sequential(nn.Linear(16, 18), nn.ReLU(), nn.Linear(18, 18), nn.ReLU(), nn.Linear(18, 4))
    task = tiny.toy_vectors()
    done = prune(net, SparseByteNN(sparsity=0.7, n=n, steps=60, until=0.8, every=2), task)
    for keep in masks_of(done).values():
        assert int(keep.sum()) == ChannelBlocks(n).nearest(keep.shape, keep.numel() - int(0.7 * keep.numel()))


def test_named_layers_are_pruned_whatever_they_are() -> None:
    done = prune(mobilenet(), SparseByteNN(include=("conv", "linear"), steps=0, n=2), pictures())
    assert masks_of(done).keys() == {"conv.weight", "linear.weight"}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SettingError, match="there are no steps of training"):
        SparseByteNN(until=0.5, steps=0).check()
    with pytest.raises(BudgetError, match="with none left"):
        prune(mobilenet(), SparseByteNN(include=("*depthwise*",), steps=0), pictures())
    with pytest.raises(BudgetError, match=r"nothing would be left of blocks.2.pointwise"):
        prune(mobilenet(), SparseByteNN(sparsity=0.995, n=8, steps=0), pictures())


# The claim


def test_fewer_rows_a_block_and_rearranged_rows_keep_more() -> None:
    model, task = tiny.trained("cnn"), tiny.make_task("cnn")

    def held(n: int, order) -> float:
        notes = prune(model, SparseByteNN(sparsity=0.5, n=n, order=order, steps=0), task).notes
        return float(next(n for n in notes if " hold " in n).split(" hold ")[1].split()[0])

    one, moved, four, eight = held(1, AsTrained()), held(4, Clustered()), held(4, AsTrained()), held(8, AsTrained())
    assert one > moved > four > eight
    assert moved - four > 0.1 * (one - four)


def test_resnet20_keeps_its_function_and_more_of_its_norm_when_rearranged(data) -> None:
    from secateur.models import open_model

    model = open_model("resnet20").model
    other, example = copy.deepcopy(model), Batch((IMAGES[:2],))
    coupled, sites = couple(other, example).of("channel"), weights(other)[1:-1]
    keep = {site.name: ChannelBlocks(4).nearest(site.shape, site.units // 2) for site in sites}
    edits, left = rearrange_(other, example, coupled, sites, keep, 4, Clustered())
    assert len(edits) >= 9
    assert not left
    with torch.no_grad():
        assert float((model(IMAGES) - other(IMAGES)).abs().max()) <= 1e-5 * float(model(IMAGES).abs().max())

    def held(net: nn.Module, n: int) -> float:
        total = 0.0
        for site in sites:
            size = tensors(net)[site.name].detach().abs()
            total += float(
                size[ChannelBlocks(n).select(size, ChannelBlocks(n).nearest(site.shape, keep[site.name]))].sum()
            )
        return total

    assert held(model, 1) > held(other, 4) > held(model, 4) > held(model, 8)


def test_the_command_line_prunes_resnet20_and_the_folder_opens_again(data, tmp_path) -> None:
    from click.testing import CliRunner

    from secateur.cli.prune import command
    from secateur.models import open_model

    folder = tmp_path / "pruned"
    small = ["--task.train_size", "32", "--task.val_size", "16", "--task.test_size", "16"]
    given = ["--steps", "0", "--n", "8", "--order", "by-norm", "--sparsity", "50%"]
    run = CliRunner().invoke(command, ["resnet20", "sparse_byte_nn", "--out", str(folder), "--no-eval", *small, *given])
    assert run.exit_code == 0, run.output
    opened = open_model(folder)
    masks = [e for e in opened.edits if isinstance(e, Mask)]
    assert len(masks) == 18
    named = tensors(opened.model)
    assert all(bool((named[e.site.name][~e.keep] == 0).all()) for e in masks)


def test_the_mobilenet_is_that_of_the_paper() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in MobileNet(classes=1000).parameters()) == 4_231_976  # the paper says 4.2 million
    assert mobilenet()(IMAGES[:2]).shape == (2, 4)
    with pytest.raises(SettingError, match="a MobileNet 0 as wide"):
        MobileNet(0)


@pytest.mark.parametrize(("name", "sparsity"), [("mobilenet", 0.5), ("resnet", 0.3)])
def test_what_is_left_is_packed_in_groups_and_answers_as_before(name: str, sparsity: float, tmp_path) -> None:
    from secateur.accelerate import accelerate
    from secateur.formats import GroupCols
    from secateur.formats.conv import SparseConv2d
    from secateur.models import load, save

    done = prune(NETS[name](), SparseByteNN(sparsity=sparsity, steps=0), pictures())
    folder = save(done, NETS[name](), tmp_path / "pruned")
    model = load(folder, build=NETS[name])
    masks, packed = masks_of(done), copy.deepcopy(model)
    for site, keep in masks.items():  # every layer, whatever is faster here
        path = site.removesuffix(".weight")
        layer = SparseConv2d.of(model.get_submodule(path), GroupCols(4))
        rows = len(keep) // 4 * 4
        columns = int(keep[:rows].reshape(-1, 4, *keep.shape[1:])[:, 0].sum()) + int(keep[rows:].sum())
        assert int(layer.packed.tensors["counts"].sum()) == columns  # the blocks are the groups: none is torn
        parent, _, last = path.rpartition(".")
        setattr(packed.get_submodule(parent), last, layer)
    with torch.no_grad():
        torch.testing.assert_close(packed(IMAGES), model(IMAGES), rtol=1e-4, atol=1e-5)
    found = accelerate(model, IMAGES[:2], threads=1)
    assert found.error < 1e-4
    tried = {c.layer for c in found.choices if c.trial("group-cols-4") is not None}
    first = {c.layer for c in found.choices if c.layer in tried and c.sparsity == 0}  # whole, but small
    assert {name.removesuffix(".weight") for name in masks} == tried - first and len(first) == 1
    others = {c.chosen for c in found.choices if c.layer not in tried}
    assert "dense" in others and others <= {"dense", "depth-taps"}  # depthwise kernels, whole
