"""A cloud on a grid, of which only the occupied cells are kept: sorted integer keys, and a row of features for each.

Choy, Gwak, Savarese. "4D Spatio-Temporal ConvNets." 2019. arXiv:1904.08755, section 3: coordinates are multiples of the
tensor's stride, and everything that is done with neighbours is a look-up of coordinates. Here a place is one int64,
scene first; a step along an axis is the same number added to every key, and a look-up is a search in sorted keys.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from secateur.errors import SettingError, TaskError

BITS = 16
MIDDLE = 1 << (BITS - 1)
EDGE = MIDDLE - 1024
"""No coordinate is further from 0 than this, so that a step of up to 1,023 cells never runs into the next axis."""
SCENES = 1 << (63 - 3 * BITS)

OFFSETS = torch.cartesian_prod(*[torch.arange(-1, 2)] * 3)
"""The 27 steps of a 3x3x3 kernel [27, 3], in the order of the last three axes of a dense kernel."""
CORNERS = torch.cartesian_prod(*[torch.arange(2)] * 3)
"""The eight corners of a cell [8, 3]."""


def packed(coords: Tensor) -> Tensor:
    """One int64 for each place: scene, x, y, z int64 [..., 4] -> [...]. Raises SettingError past the range."""
    scene, place = coords[..., 0], coords[..., 1:]
    if coords.numel() and (int(place.abs().max()) > EDGE or int(scene.min()) < 0 or int(scene.max()) >= SCENES):
        raise SettingError(
            f"voxels up to {int(place.abs().max()):,} from the origin in {int(scene.max()) + 1:,} scenes were given",
            f"coordinates go up to {EDGE:,} and scenes up to {SCENES:,}",
            "Move the cloud to the origin, take larger voxels, or smaller batches.",
        )
    return _join(scene, place + MIDDLE)


def unpacked(keys: Tensor) -> Tensor:
    """Scene, x, y, z of keys: int64 [...] -> [..., 4]."""
    mask = (1 << BITS) - 1
    axes = [((keys >> (BITS * shift)) & mask) - MIDDLE for shift in (2, 1, 0)]
    return torch.stack([keys >> (3 * BITS), *axes], -1)


def steps(offsets: Tensor) -> Tensor:
    """What is added to a key to go along the axes: int64 [k, 3] -> [k]."""
    return _join(torch.zeros_like(offsets[:, 0]), offsets)


def _join(scene: Tensor, axes: Tensor) -> Tensor:
    return ((scene * (1 << BITS) + axes[..., 0]) * (1 << BITS) + axes[..., 1]) * (1 << BITS) + axes[..., 2]


def rows(keys: Tensor, wanted: Tensor) -> Tensor:
    """Where each wanted key stands among sorted ones [n], n where it does not: int64, shaped as wanted."""
    if not len(keys):
        return torch.zeros_like(wanted)
    at = torch.searchsorted(keys, wanted)
    return torch.where(keys[at.clamp(max=len(keys) - 1)] == wanted, at, len(keys))


def per_scene(scene: Tensor, scenes: int) -> Tensor:
    """How many voxels each scene has: [n] -> [scenes]."""
    return torch.bincount(scene, minlength=scenes)


@dataclass(frozen=True, eq=False)
class Voxels:
    """Occupied cells of a batch of scenes, sorted by place, each once; `of` makes one in any order."""

    keys: Tensor  # int64 [n], rising
    features: Tensor  # [n, channels]
    stride: int  # voxels a side of a cell: all coordinates are multiples of it
    scenes: int  # how many there are in the batch, empty ones too
    tables: dict[str, Tensor] = field(default_factory=dict, repr=False)  # look-ups among these very places

    @classmethod
    def of(cls, coords: Tensor, features: Tensor, stride: int = 1, scenes: int | None = None) -> "Voxels":
        """From scene, x, y, z int64 [n, 4] in any order. Raises TaskError for what is no such tensor."""
        asked = f"{len(coords):,} voxels at a stride of {stride} were given"
        if coords.dim() != 2 or coords.shape[1] != 4 or coords.is_floating_point() or len(features) != len(coords):
            raise TaskError(
                asked,
                f"coordinates are {list(coords.shape)} of {coords.dtype} for features {list(features.shape)}",
                "Give integers [n, 4], scene first, and a row of features for each.",
            )
        if bool((coords[:, 1:] % stride).any()):
            raise TaskError(asked, "not all coordinates are multiples of it", "Divide by it, round down, multiply.")
        keys, order = packed(coords.long()).sort()
        if bool((keys[1:] == keys[:-1]).any()):
            raise TaskError(asked, "a place is there twice", "Give each place once, or use voxelised.")
        count = scenes if scenes is not None else int(coords[:, 0].max()) + 1 if len(coords) else 0
        if len(keys) and int(keys[-1] >> (3 * BITS)) >= count:
            raise TaskError(asked, f"a scene is number {int(coords[:, 0].max())} of {count}", "Say how many there are.")
        return cls(keys, features[order], stride, count)

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def coords(self) -> Tensor:
        """Scene, x, y, z: int64 [n, 4]."""
        return unpacked(self.keys)

    @property
    def scene(self) -> Tensor:
        """The scene of each: int64 [n]."""
        return self.keys >> (3 * BITS)

    def centres(self, size: float) -> Tensor:
        """The middle of each cell in metres, where a voxel has `size` a side: [n, 3]."""
        return (self.coords[:, 1:].to(self.features.dtype) + self.stride / 2) * size

    def at(self, features: Tensor) -> "Voxels":
        """Other features at the same places, look-ups shared."""
        return replace(self, features=features)

    def kept(self, keep: Tensor) -> "Voxels":
        """Those where a boolean [n] is True."""
        return replace(self, keys=self.keys[keep], features=self.features[keep], tables={})

    def split(self) -> list["Voxels"]:
        """Each scene by itself, as scene 0 of one."""
        counts = per_scene(self.scene, self.scenes).tolist()
        first = torch.arange(self.scenes, device=self.keys.device) << (3 * BITS)
        pieces = zip(torch.split(self.keys, counts), torch.split(self.features, counts), first, strict=True)
        return [Voxels(keys - base, features, self.stride, 1) for keys, features, base in pieces]

    def table(self, name: str, make: Tensor) -> Tensor:
        """Rows of the neighbours at some steps [n, k], looked up once."""
        if name not in self.tables:
            self.tables[name] = rows(self.keys, self.keys[:, None] + make.to(self.keys.device))
        return self.tables[name]


def voxelised(points: Tensor, features: Tensor, scene: Tensor, size: float, scenes: int | None = None) -> Voxels:
    """A voxel for each cell of `size` metres that holds points, with the mean of their features.

    `points` [n, 3] in metres, `features` [n, channels], `scene` int64 [n]; floor(p / size) is a point's cell. Raises
    SettingError for a size that is not above 0 or cells past the range, TaskError for an empty cloud, for points that
    are not finite and for tensors of different lengths.
    """
    if not size > 0:
        raise SettingError(f"voxels of {size:g} m a side were asked for", "a side is above 0", "Give 0.05, say.")
    asked = f"a cloud of {len(points):,} points was to be put on a grid"
    if not len(points):
        raise TaskError(asked, "there are none", "Give every scene points.")
    if len(features) != len(points) or len(scene) != len(points):
        raise TaskError(
            asked, f"there are {len(features):,} rows of features and {len(scene):,} scenes", "Give one for each."
        )
    if not bool(points.isfinite().all()) or not bool(features.isfinite().all()):
        raise TaskError(asked, "they hold NaN or infinity", "Leave out points that were not measured.")
    cell = torch.floor(points.double() / size)
    if float(cell.abs().max()) > EDGE:  # before they are integers: those of points far away would wrap
        raise SettingError(
            f"voxels of {size:g} m a side were asked for",
            f"a point is {float(cell.abs().max()):,.0f} of them from the origin, and coordinates go up to {EDGE:,}",
            "Move the cloud to the origin, or take larger voxels.",
        )
    keys, where = torch.unique(packed(torch.cat([scene[:, None], cell.long()], 1)), return_inverse=True)
    total = torch.zeros(len(keys), features.shape[1], dtype=features.dtype, device=features.device)
    count = torch.zeros(len(keys), 1, dtype=features.dtype, device=features.device)
    total.index_add_(0, where, features)
    count.index_add_(0, where, torch.ones_like(features[:, :1]))
    return Voxels(keys, total / count, 1, int(scene.max()) + 1 if scenes is None else scenes)


def looked_up(voxels: Voxels, keys: Tensor) -> Tensor:
    """Features at places of the grid, 0 where there is no voxel: keys [...] -> [..., channels]."""
    nothing = torch.zeros_like(voxels.features[:1]) if len(voxels) else voxels.features.new_zeros(1, _wide(voxels))
    return torch.cat([voxels.features, nothing])[rows(voxels.keys, keys)]


def _wide(voxels: Voxels) -> int:
    return voxels.features.shape[1]


def interpolated(voxels: Voxels, keys: Tensor) -> Tensor:
    """Features at places of a finer grid, trilinear between the eight voxels around, absent ones being 0.

    Where a place is that of a voxel the value is its own: keys [m] -> [m, channels].
    """
    coords, stride = unpacked(keys), voxels.stride
    low = torch.div(coords[:, 1:], stride, rounding_mode="floor") * stride
    share = (coords[:, 1:] - low).to(voxels.features.dtype) / stride  # [m, 3]
    corner = packed(torch.cat([coords[:, :1], low], 1))
    found = torch.zeros(len(keys), _wide(voxels), dtype=voxels.features.dtype, device=keys.device)
    for step, offset in zip(steps(CORNERS * stride).tolist(), CORNERS.to(keys.device), strict=True):
        weight = torch.where(offset == 1, share, 1 - share).prod(1, keepdim=True)
        found = found + weight * looked_up(voxels, corner + step)
    return found


def added(voxels: Voxels, other: Voxels) -> Voxels:
    """Features plus those of another tensor at the same places, where it has any."""
    return voxels.at(voxels.features + looked_up(other, voxels.keys))


def joined(first: Voxels, more: Voxels) -> Voxels:
    """The voxels of both, sorted. Raises TaskError where they share a place or have another stride."""
    if first.stride != more.stride or first.scenes != more.scenes:
        raise TaskError(
            f"voxels at a stride of {more.stride} in {more.scenes} scenes were to be added",
            f"those there have a stride of {first.stride}, in {first.scenes} scenes",
            "Join tensors of one level.",
        )
    keys, order = torch.cat([first.keys, more.keys]).sort()
    if bool((keys[1:] == keys[:-1]).any()):
        raise TaskError(
            f"{len(more):,} voxels were to be added", "some are there already", "Leave those out: see present."
        )
    return replace(first, keys=keys, features=torch.cat([first.features, more.features])[order], tables={})


def present(voxels: Voxels, keys: Tensor) -> Tensor:
    """Whether there is a voxel at each place: keys [m] -> bool [m]."""
    return rows(voxels.keys, keys) < len(voxels)


def parents(voxels: Voxels) -> Tensor:
    """The cells of twice the stride that hold voxels: sorted keys."""
    coords, stride = voxels.coords, 2 * voxels.stride
    low = torch.div(coords[:, 1:], stride, rounding_mode="floor") * stride
    return torch.unique(packed(torch.cat([coords[:, :1], low], 1)))


def children(voxels: Voxels) -> Tensor:
    """The places of half the stride at a voxel and next to it on either side, 27 of a lonely one: sorted keys.

    Raises SettingError for voxels that have no halves.
    """
    half = half_stride(voxels)
    return torch.unique(voxels.keys[:, None] + steps(OFFSETS * half).to(voxels.keys.device))


def half_stride(voxels: Voxels) -> int:
    """That of the children. Raises SettingError for an odd one."""
    if voxels.stride % 2:
        raise SettingError(
            f"voxels were to be divided from a stride of {voxels.stride}", "it has no half", "Start at an even one."
        )
    return voxels.stride // 2


def best_of_each(score: Tensor, scene: Tensor, most: int | Sequence[int] | Tensor, scenes: int) -> Tensor:
    """Whether each is among the `most` best of its scene, ties by place: score [n], scene [n] -> bool [n].

    `most` is one number, or one for each scene.
    """
    order = score.argsort(descending=True, stable=True)
    order = order[scene[order].argsort(stable=True)]  # by scene, the best first
    start = per_scene(scene, scenes).cumsum(0) - per_scene(scene, scenes)
    ranked = scene[order]
    place = torch.arange(len(score), device=score.device) - start[ranked]
    limit = torch.as_tensor(most, device=score.device).expand(scenes)
    keep = torch.zeros(len(score), dtype=torch.bool, device=score.device)
    keep[order] = place < limit[ranked]
    return keep
