"""Taking a model to where it is to run, and trying it there: no file is left that answers differently."""

from secateur.export.exporting import TARGETS, Target, export, target_named
from secateur.export.sparse import densify

__all__ = ["TARGETS", "Target", "densify", "export", "target_named"]
