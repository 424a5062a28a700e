"""Make neural networks smaller and faster by removing parts of them, and know what it cost.

from secateur import prune
from secateur.methods.wanda import Wanda

outcome = prune(model, Wanda(sparsity=0.5), task)      # a copy; outcome.model, outcome.edits, outcome.ledger
"""

from importlib import metadata

from secateur.accelerate import accelerate
from secateur.cache import sparse_cache
from secateur.cut import blocks, layers, weights
from secateur.edit import Edit, Gate, Mask, Merge, Remove, Replace, Rotate, Update, apply_, harden
from secateur.errors import SecateurError
from secateur.evidence import Evidence, observe
from secateur.method import Budget, Card, Chain, Method, prune
from secateur.outcome import Ledger, Outcome, Record
from secateur.site import Part, Site
from secateur.task import Batch, Task
from secateur.train import History, Loop, Rule, Snapshot, attach, fit
from secateur.walk import walk

try:
    __version__ = metadata.version("secateur")
except metadata.PackageNotFoundError:  # a source tree on the path that is not installed
    __version__ = "0+unknown"

__all__ = [
    "Batch",
    "Budget",
    "Card",
    "Chain",
    "Edit",
    "Evidence",
    "Gate",
    "History",
    "Ledger",
    "Loop",
    "Mask",
    "Merge",
    "Method",
    "Outcome",
    "Part",
    "Record",
    "Remove",
    "Replace",
    "Rotate",
    "Rule",
    "SecateurError",
    "Site",
    "Snapshot",
    "Task",
    "Update",
    "accelerate",
    "apply_",
    "attach",
    "blocks",
    "fit",
    "harden",
    "layers",
    "observe",
    "prune",
    "sparse_cache",
    "walk",
    "weights",
]
