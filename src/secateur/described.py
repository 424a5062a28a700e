"""Methods that the catalogue knows of and nobody has written here: to be found by a query, never run by accident."""

from secateur.method import Card

DESCRIBED: dict[str, Card] = {
    "optimal_brain_damage": Card(
        0, "Optimal Brain Damage", venue="NeurIPS", year=1989, needs=("labels", "training"),
        criterion=("second-order",), tasks=("classification",), schedule=("custom",), allocation=("score-driven",),
    ),
    "fpgm": Card(
        0, "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
        arxiv="1811.00250", venue="CVPR", year=2019, when="during training", granularity=("channel",),
        needs=("labels", "training"), families=("cnn",), criterion=("similarity",), tasks=("classification",),
        stage=("score or mask",), schedule=("custom",), allocation=("uniform",),
    ),
    "hrank": Card(
        0, "HRank: Filter Pruning using High-Rank Feature Map", arxiv="2002.10179", venue="CVPR", year=2020,
        granularity=("channel",), needs=("labels", "training"), families=("cnn",), criterion=("activation",),
        tasks=("classification",), schedule=("custom",), allocation=("given",),
    ),
    "amc": Card(
        0, "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", arxiv="1802.03494", venue="ECCV",
        year=2018, granularity=("channel",), needs=("labels", "training"), families=("cnn",), criterion=("norm",),
        tasks=("classification",), schedule=("one-shot",), allocation=("learned",), learns=("reinforcement",),
    ),
    "movement": Card(
        0, "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arxiv="2005.07683", venue="NeurIPS", year=2020,
        when="during training", needs=("labels", "training"), families=("encoder",), criterion=("learned",),
        tasks=("classification",), stage=("score or mask",), schedule=("cubic",), allocation=("score-driven",),
        learns=("masks or gates",), transfer=("target task",),
    ),
    "early_bird": Card(
        0, "Drawing early-bird tickets: Towards more efficient training of deep networks", arxiv="1909.11957",
        venue="ICLR", year=2020, when="during training", granularity=("channel",), needs=("labels", "training"),
        families=("cnn",), criterion=("norm scale",), tasks=("classification",), stage=("early in training",),
        schedule=("one-shot",), allocation=("score-driven",), retraining=("finetune",),
    ),
    "runtime_neural_pruning": Card(
        0, "Runtime Neural Pruning", venue="NeurIPS", year=2017, when="at inference", granularity=("channel",),
        needs=("labels", "training"), families=("cnn",), criterion=("learned",), tasks=("classification",),
        schedule=("custom",), allocation=("learned",), learns=("reinforcement",),
    ),
}  # fmt: skip
"""Cards by name. A row that gets a file of its own in `methods/` leaves this list."""
