"""Sparse tensors of voxels: each operation against the dense one of torch, keys, look-ups, and what is refused."""

import pytest
import torch
import torch.nn.functional as F

from secateur.cut import role
from secateur.errors import SettingError, TaskError
from secateur.voxels import sparse
from secateur.voxels.fusion import BiEncoder, Words, padded
from secateur.voxels.layers import Generative, Norm, Residual, Strided, Submanifold, pooled
from secateur.voxels.matching import assigned, diou, focal, near, overlap
from secateur.voxels.sparse import (
    EDGE,
    Voxels,
    added,
    best_of_each,
    children,
    interpolated,
    joined,
    looked_up,
    packed,
    parents,
    present,
    unpacked,
    voxelised,
)

SIDE = 6


def some(seed=0, channels=3, scenes=2, share=0.3, stride=1):
    """Random voxels in two scenes, with negative coordinates too."""
    draw = torch.Generator().manual_seed(seed)
    full = torch.rand(scenes, SIDE, SIDE, SIDE, generator=draw) < share
    coords = full.nonzero()
    coords[:, 1:] = (coords[:, 1:] - SIDE // 2) * stride
    features = torch.randn(len(coords), channels, generator=draw, dtype=torch.float64)
    order = torch.randperm(len(coords), generator=draw)
    return Voxels.of(coords[order], features[order], stride, scenes)


def dense(x, low, side):
    """Features on a grid [scenes, channels, side, side, side] from a lowest coordinate, zeros where none is."""
    grid = x.features.new_zeros(x.scenes, x.features.shape[1], side, side, side)
    scene, place = x.coords[:, 0], (x.coords[:, 1:] - low) // x.stride
    grid[scene, :, place[:, 0], place[:, 1], place[:, 2]] = x.features
    return grid


def at(grid, x, low):
    """Values of a grid at the places of voxels [n, channels]."""
    place = (x.coords[:, 1:] - low) // x.stride
    return grid[x.coords[:, 0], :, place[:, 0], place[:, 1], place[:, 2]]


def kernel(layer, transposed=False):
    """Its weight as that of a dense convolution."""
    weight = layer.kernel.weight.detach()
    cube = weight.view(3, 3, 3, *weight.shape[1:])
    return cube.permute(3, 4, 0, 1, 2) if transposed else cube.permute(4, 3, 0, 1, 2)


def test_a_kernel_is_no_stack_of_experts():
    assert role(torch.nn.Sequential(Submanifold(3, 4)), "0.kernel.weight") == "other"


def test_a_submanifold_convolution_is_the_dense_one_at_its_places():
    x, layer = some(), Submanifold(3, 4).double()
    y = layer(x)
    assert torch.equal(y.keys, x.keys)
    wanted = F.conv3d(dense(x, -3, SIDE), kernel(layer), padding=1)
    torch.testing.assert_close(y.features, at(wanted, x, -3))


def test_a_strided_convolution_is_the_dense_one_at_the_parents():
    x, layer = some(1), Strided(3, 4).double()
    y = layer(x)
    assert y.stride == 2
    assert {tuple(c) for c in y.coords.tolist()} == {
        (s, *(2 * (v // 2) for v in place)) for s, *place in x.coords.tolist()
    }
    wanted = F.conv3d(dense(x, -4, 8), kernel(layer), stride=2, padding=1)
    torch.testing.assert_close(y.features, at(wanted, y, -4))


def test_a_generative_convolution_is_the_dense_transposed_one_at_the_children():
    x, layer = some(2, share=0.05, stride=4), Generative(3, 4).double()
    y = layer(x)
    assert y.stride == 2
    assert torch.equal(y.keys, children(x))
    wanted = F.conv_transpose3d(dense(x, -16, 8), kernel(layer, transposed=True), stride=2, padding=1)
    torch.testing.assert_close(y.features, at(wanted, y, -16))


def test_the_weights_and_features_of_convolutions_have_the_dense_gradients():
    x, layer = some(), Submanifold(3, 4).double()
    x = x.at(x.features.requires_grad_())
    layer(x).features.square().sum().backward()
    features = x.features.detach().clone().requires_grad_()
    weight = kernel(layer).clone().requires_grad_()
    at(F.conv3d(dense(x.at(features), -3, SIDE), weight, padding=1), x, -3).square().sum().backward()
    torch.testing.assert_close(x.features.grad, features.grad)
    torch.testing.assert_close(kernel_of(layer.kernel.weight.grad), weight.grad)


def kernel_of(weight):
    return weight.view(3, 3, 3, *weight.shape[1:]).permute(4, 3, 0, 1, 2)


def test_pooling_takes_the_largest_of_the_voxels_there_are():
    x = some(3)
    y = pooled(x)
    grid = dense(x.at(x.features - 100), -4, 8)  # so that no zero of an empty place is the largest
    grid[grid == 0] = -1000
    torch.testing.assert_close(y.features, at(F.max_pool3d(grid, 2), y, -4) + 100)


def test_a_lonely_voxel_has_twenty_seven_children_and_one_parent():
    x = Voxels.of(torch.tensor([[0, 4, -8, 0]]), torch.ones(1, 1), 4)
    found = unpacked(children(x)).tolist()
    assert len(found) == 27
    assert [0, 2, -10, -2] in found
    assert [0, 6, -6, 2] in found
    assert unpacked(parents(x)).tolist() == [[0, 0, -8, 0]]


def test_points_in_one_cell_are_one_voxel_with_their_mean():
    points = torch.tensor([[0.01, 0.01, 0.01], [0.09, 0.09, 0.09], [-0.01, 0.0, 0.0], [0.01, 0.01, 0.01]])
    x = voxelised(points, torch.tensor([[1.0], [3.0], [5.0], [7.0]]), torch.tensor([0, 0, 0, 1]), 0.1)
    assert x.coords.tolist() == [[0, -1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert x.features[:, 0].tolist() == [5, 2, 7]


def test_keys_are_sorted_by_scene_and_come_back():
    coords = torch.tensor([[0, -EDGE, 5, EDGE], [0, 0, 0, 0], [3, 1, -2, 3]])
    keys = packed(coords)
    assert torch.equal(unpacked(keys), coords)
    assert keys.tolist() == sorted(keys.tolist())


def test_looking_up_gives_the_voxel_or_nothing():
    x = some()
    elsewhere = packed(torch.tensor([[0, 100, 0, 0], [1, 0, 100, 0]]))
    found = looked_up(x, torch.cat([x.keys, elsewhere]))
    assert torch.equal(found[: len(x)], x.features)
    assert not found[len(x) :].any()
    assert present(x, torch.cat([x.keys[:1], elsewhere])).tolist() == [True, False, False]


def test_interpolation_is_exact_on_the_grid_and_a_mean_between():
    x = Voxels.of(torch.tensor([[0, 0, 0, 0], [0, 4, 0, 0]]), torch.tensor([[2.0], [6.0]]), 4)
    wanted = packed(torch.tensor([[0, 0, 0, 0], [0, 2, 0, 0], [0, 4, 2, 0], [0, -2, 0, 0]]))
    assert interpolated(x, wanted)[:, 0].tolist() == [2, 4, 3, 1]  # a place without a voxel counts as 0


def test_adding_leaves_places_as_they_are_and_joining_adds_places():
    x = some()
    half = x.kept(torch.arange(len(x)) % 2 == 0)
    rest = x.kept(torch.arange(len(x)) % 2 == 1)
    assert torch.equal(added(x, half).features[::2], 2 * x.features[::2])
    assert torch.equal(added(x, half).features[1::2], x.features[1::2])
    both = joined(half, rest)
    assert torch.equal(both.keys, x.keys)
    assert torch.equal(both.features, x.features)
    with pytest.raises(TaskError, match="some are there already"):
        joined(half, x)
    with pytest.raises(TaskError, match="stride"):
        joined(half, pooled(x))


def test_a_split_batch_is_the_scenes_one_by_one():
    x = some()
    layer = Submanifold(3, 2).double()
    whole = torch.cat([layer(piece).features for piece in x.split()])
    torch.testing.assert_close(whole, layer(x).features)


def test_the_best_are_taken_of_each_scene_and_ties_go_to_the_first():
    scene = torch.tensor([0, 0, 0, 1, 1])
    score = torch.tensor([1.0, 3.0, 3.0, 0.0, -1.0])
    assert best_of_each(score, scene, 1, 2).tolist() == [False, True, False, True, False]
    assert best_of_each(score, scene, 2, 3).tolist() == [False, True, True, True, True]
    assert best_of_each(score, scene, torch.tensor([3, 1]), 2).tolist() == [True, True, True, True, False]


def test_a_norm_of_one_voxel_does_not_fail_in_training():
    norm = Norm(2)
    assert norm(torch.ones(1, 2)).isfinite().all()
    assert norm(torch.tensor([[1.0, 0.0], [3.0, 1.0]])).mean(0).abs().max() < 1e-6


def test_a_residual_block_halves_the_grid_where_it_is_to():
    x = some()
    assert torch.equal(Residual(3, 3).double()(x).keys, x.keys)
    assert torch.equal(Residual(3, 5, 2).double()(x).keys, parents(x))


def test_padding_comes_back():
    x = some()
    values, absent, where = padded(x.features, x.scene, 3)
    assert values.shape[0] == 3
    assert torch.equal(values.flatten(0, 1)[where], x.features)
    assert absent[2].all()
    assert (~absent).sum() == len(x)


def test_what_a_voxel_reads_does_not_depend_on_the_other_scenes_or_on_padding():
    torch.manual_seed(0)
    x, encoder = some(channels=8), BiEncoder(8, 0.1, layers=2, heads=2, inner=8).double().eval()
    words = Words(torch.randn(2, 5, 8, dtype=torch.float64), torch.tensor([[False] * 3 + [True] * 2, [False] * 5]))
    both, told = encoder(x, words)
    first = x.split()[0]
    alone, heard = encoder(first, Words(words.features[:1, :3], words.absent[:1, :3]))
    torch.testing.assert_close(alone.features, both.features[: len(first)])
    torch.testing.assert_close(heard.features[0], told.features[0, :3])


# Boxes


def test_overlaps_by_hand():
    box = torch.tensor([0.0, 0.0, 0.0, 2.0, 2.0, 2.0])
    moved = torch.tensor([1.0, 0.0, 0.0, 2.0, 2.0, 2.0])
    assert float(overlap(box, moved)) == pytest.approx(4 / 12)
    assert float(diou(box, moved)) == pytest.approx(4 / 12 - 1 / 17)  # the box around both is 3 x 2 x 2
    assert float(diou(box, box)) == pytest.approx(1)


def test_a_focal_loss_is_low_where_the_logit_of_true_is_right():
    lost = focal(torch.tensor([3.0, -3.0, 0.0]), torch.tensor([True, True, False]))
    assert lost[0] < 0.001 < 0.6 < lost[1]
    assert float(lost[2]) == pytest.approx(0.75 * 0.25 * 0.6931, rel=1e-3)


def test_a_voxel_answers_for_the_nearest_of_the_boxes_it_is_near_to():
    centres = torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [2.0, 0, 0], [9.0, 0, 0], [0.0, 0, 0]])
    scene, of = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([0, 0])
    boxes = torch.tensor([[0.4, 0, 0, 1, 1, 1], [2.0, 0, 0, 1, 1, 1.0]])
    assert assigned(centres, scene, boxes, of, nearest=2).tolist() == [0, 0, 1, -1, -1]
    assert assigned(centres, scene, boxes, of, nearest=9).tolist() == [0, 0, 1, 1, -1]


def test_without_boxes_no_voxel_answers_and_none_is_near():
    centres, scene, boxes, of = torch.rand(3, 3), torch.tensor([0, 0, 1]), torch.zeros(0, 6), torch.zeros(0).long()
    assert assigned(centres, scene, boxes, of).tolist() == [-1, -1, -1]
    assert not near(centres, scene, boxes, of, 1.0).any()


def test_a_cube_is_around_the_centre_whatever_the_box():
    centres = torch.tensor([[0.5, 0.5, -0.5], [0.6, 0, 0], [0.0, 0, 0]])
    boxes = torch.tensor([[0.0, 0, 0, 9, 9, 9]])
    assert near(centres, torch.tensor([0, 0, 1]), boxes, torch.tensor([0]), 1.0).tolist() == [True, False, False]


# What is refused


@pytest.mark.parametrize(
    ("points", "size", "error", "says"),
    [
        (torch.zeros(0, 3), 0.1, TaskError, "there are none"),
        (torch.tensor([[float("nan"), 0, 0]]), 0.1, TaskError, "NaN"),
        (torch.zeros(1, 3), 0.0, SettingError, "above 0"),
        (torch.zeros(1, 3), -1.0, SettingError, "above 0"),
        (torch.zeros(1, 3), float("nan"), SettingError, "above 0"),
        (torch.tensor([[1e30, 0, 0]]), 0.1, SettingError, "from the origin"),
        (torch.tensor([[(EDGE + 2) * 0.1, 0, 0]]), 0.1, SettingError, "from the origin"),
    ],
)
def test_clouds_that_cannot_be_are_refused(points, size, error, says):
    with pytest.raises(error, match=says):
        voxelised(points, torch.ones(len(points), 1), torch.zeros(len(points), dtype=torch.int64), size)


def test_a_cloud_of_other_lengths_is_refused():
    with pytest.raises(TaskError, match="rows of features"):
        voxelised(torch.zeros(2, 3), torch.ones(1, 1), torch.zeros(2, dtype=torch.int64), 0.1)


@pytest.mark.parametrize(
    ("coords", "stride", "says"),
    [
        (torch.tensor([[0, 1, 0, 0]]), 2, "multiples"),
        (torch.tensor([[0, 0, 0, 0], [0, 0, 0, 0]]), 1, "twice"),
        (torch.tensor([[0, 0, 0]]), 1, "coordinates are"),
        (torch.tensor([[0.0, 0, 0, 0]]), 1, "coordinates are"),
        (torch.tensor([[5, 0, 0, 0]]), 1, "a scene is number 5"),
    ],
)
def test_places_that_cannot_be_are_refused(coords, stride, says):
    with pytest.raises(TaskError, match=says):
        Voxels.of(coords, torch.ones(len(coords), 1), stride, 2)


def test_coordinates_past_the_packed_range_are_refused():
    with pytest.raises(SettingError, match="coordinates go up to"):
        packed(torch.tensor([[0, EDGE + 1, 0, 0]]))
    with pytest.raises(SettingError, match="scenes up to"):
        packed(torch.tensor([[sparse.SCENES, 0, 0, 0]]))
    with pytest.raises(SettingError, match="no half"):
        children(some())
