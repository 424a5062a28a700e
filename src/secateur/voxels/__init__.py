"""Sparse tensors of voxels, what is calculated on them, and how they and a sentence read each other."""

from secateur.voxels.fusion import BiEncoder, Words
from secateur.voxels.layers import Generative, Norm, Normed, Residual, Strided, Submanifold, pooled
from secateur.voxels.sparse import (
    Voxels,
    added,
    best_of_each,
    children,
    interpolated,
    joined,
    looked_up,
    parents,
    per_scene,
    present,
    voxelised,
)
from secateur.voxels.walk import FusedOnce, Grounded, Guide

__all__ = [
    "BiEncoder",
    "FusedOnce",
    "Generative",
    "Grounded",
    "Guide",
    "Norm",
    "Normed",
    "Residual",
    "Strided",
    "Submanifold",
    "Voxels",
    "Words",
    "added",
    "best_of_each",
    "children",
    "interpolated",
    "joined",
    "looked_up",
    "parents",
    "per_scene",
    "pooled",
    "present",
    "voxelised",
]
