"""The words in which cards describe methods: closed lists, an axis each, so that a catalogue can be asked questions.

Cheng, Zhang, Shi. "A Survey on Deep Neural Network Pruning: Taxonomy, Comparison, Analysis, and Recommendations."
TPAMI 2024. arXiv:2308.06767. The axes are the survey's; the words are ours where it has several for one thing. A method
may have several values on an axis. "unknown" says that nobody looked; "any" that all values will do.
"""

from collections.abc import Iterable

from secateur.errors import SettingError, did_you_mean

UNKNOWN, ANY = "unknown", "any"

AXES: dict[str, tuple[str, ...]] = {
    # when in detail: before; early; the survey's three of "during"; its three of "after"; and the rest
    "stage": (
        "at initialisation", "early in training", "sparsity regularisation", "sparse to sparse", "score or mask",
        "one shot", "prune and finetune", "rewinding", "run time", "recovery",
    ),
    # what a unit is judged by; "activation" is any measure of what flows into or out of it
    "criterion": (
        "magnitude", "norm", "first-order", "second-order", "activation", "norm scale", "similarity", "learned",
        "random", "information", "search", "none",
    ),
    # whether choosing is itself trained or searched for
    "learns": ("none", "masks or gates", "meta-network", "graph network", "reinforcement", "bi-level", "search"),
    "fusion": ("none", "quantisation", "low-rank", "distillation", "architecture search"),
    "gradients": ("none", "first", "second"),  # what is taken of the loss, in choosing and in training
    "updates": ("none", "solved", "trained"),  # what becomes of the weights that stay; solved: without training
    "scope": ("layer-wise", "global", "none"),  # units compared within a layer, or over all
    "allocation": ("uniform", "ER", "ERK", "by shape", "score-driven", "learned", "given", "none"),
    "retraining": ("none", "finetune", "LR-rewind", "weight-rewind", "from scratch"),
    "schedule": ("one-shot", "geometric", "cubic", "linear", "custom"),
    "choice": ("data-free", "data-driven"),  # what units are chosen by, whatever is trained on afterwards
    "start": ("initialised", "pretrained"),  # the weights that pruning begins with
    "input": ("static", "dynamic"),  # the same for every input, or not
    "transfer": ("original task", "target task"),  # what the pruned network is for
    "data": ("none", "unlabelled", "labels"),
    "supervision": ("none", "self-supervised", "semi-supervised", "supervised"),
    "speedup": ("universal", "specific", "none"),  # with dense kernels, or where zeros have kernels
    "pattern": ("unstructured", "N:M", "block", "1xN", "taps", "structured"),
    "models": (
        "MLP", "CNN", "LLM", "BERT", "ViT", "RNN", "MoE", "diffusion", "vision-language", "3D", "GAN", "SR",
    ),
    "tasks": (
        "classification", "language modelling", "detection", "super-resolution", "text to image", "retrieval",
        "unlearning", "speech", "point clouds",
    ),
}  # fmt: skip
"""Every axis, and the words it has."""


def checked(axis: str, values: Iterable[str]) -> None:
    """Raise SettingError, with the nearest word, for a value that an axis does not have."""
    if isinstance(values, str):
        raise SettingError(
            f"{axis} {values!r} was given", "an axis has a tuple of values", f"Write {axis}=({values!r},)."
        )
    known = (*AXES[axis], UNKNOWN, ANY)
    for value in values:
        if value not in known:
            raise SettingError(f"{axis} {value!r} was given", f"no {axis} is called that", did_you_mean(value, known))
