"""What a graph tells of the recurrent network wired by it, before anything is trained.

Darji. "Investigating Sparsity in Recurrent Neural Networks." 2021. arXiv:2407.20601, sections 3.2 and 5.2: draw random
graphs, train a network whose layers and masks come from each, and predict its accuracy from the graph's properties.
The paper's strongest correlations are with the variance of closeness (-0.67 for GRU) and the number of sources (+0.74).

    rows = [draw(kind, gru, task, steps, i, draws) for i in range(40)]
    predictions(rows), correlations(rows)

Needs networkx, and scikit-learn for the regressions.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from secateur.axes.clipping import Clip
from secateur.axes.correlation import rank_correlation
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold
from secateur.axes.wirings import Wiring, properties
from secateur.edit import apply_
from secateur.errors import SettingError
from secateur.method import Card
from secateur.methods.recurrent import Flat
from secateur.models.recurrent import Cell, WiredClassifier
from secateur.task import Task
from secateur.train import fit

CARD = Card(
    20, "Investigating Sparsity in Recurrent Neural Networks", arxiv="2407.20601", year=2021, when="before training",
    needs=("labels", "training"), families=("rnn",), criterion=("random",), tasks=("classification",),
    allocation=("by shape",),
)  # fmt: skip

LEAST = 20
"""Graphs a regression is made on at least: a tenth of them is what it is judged by."""


@dataclass(frozen=True)
class Drawn:
    """A graph that was drawn, and how good the network wired by it became."""

    kind: str  # "barabasi_albert"
    known: dict[str, float]  # properties of the graph, by name
    quality: float  # of the trained network, by the task's metric on "test"
    unread: int = 0  # nodes from which no edges lead to the last layer


def draw(
    kind: Callable[[int, torch.Generator], Wiring],
    cell: Cell,
    task: Task,
    steps: int,
    generator: torch.Generator,
    nodes: tuple[int, int] = (10, 50),
    vocabulary: int = 128,
    classes: int = 2,
    device: str = "cpu",
) -> Drawn:
    """Draw a graph of a random size, train the network it wires with its masks held, and measure it."""
    size = int(torch.randint(nodes[0], nodes[1] + 1, (), generator=generator))
    wiring = kind(size, generator)
    model = WiredClassifier(wiring, cell, vocabulary, classes)
    reinitialize_(model, generator)  # where it is made, so that every device starts from the same values
    model.to(device)
    edits = apply_(model, model.masks())
    fit(model, task, steps, [Flat(), Hold.of(edits), Clip(5.0)])
    quality = task.measure(model, "test")[task.metric]
    return Drawn(kind.__name__, properties(wiring), quality, len(wiring.unread))


def predictions(rows: Sequence[Drawn], splits: int = 10, seed: int = 0) -> dict[str, float]:
    """R2 of three regressors that predict quality from properties scaled to [0, 1], on a tenth left out.

    Bayesian ridge, random forest, AdaBoost. The mean over several splits: of one, a tenth of a hundred graphs is ten,
    and its R2 says little. Raises SettingError for fewer than 20 graphs, or a quality that is the same for all.
    """
    if len(rows) < LEAST or len({row.quality for row in rows}) < 2:
        raise SettingError(
            f"quality was to be predicted from {len(rows)} graphs",
            f"a tenth of them would judge it; there must be {LEAST} at least, and they must differ in quality",
            "Draw more graphs, or train for fewer steps.",
        )
    try:
        from sklearn.ensemble import AdaBoostRegressor, RandomForestRegressor
        from sklearn.linear_model import BayesianRidge
        from sklearn.metrics import r2_score
        from sklearn.model_selection import train_test_split
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import MinMaxScaler
    except ImportError:
        raise SettingError(
            "a regression on graphs was asked for",
            "scikit-learn is not installed",
            "Install it: pip install 'secateur[studies]'.",
        ) from None

    names = sorted(rows[0].known)
    inputs, target = [[row.known[name] for name in names] for row in rows], [row.quality for row in rows]
    found: dict[str, list[float]] = {}
    for split in range(splits):
        parts = train_test_split(inputs, target, test_size=0.1, random_state=seed + split)
        seen, left, known, asked = parts
        makers = {
            "bayesian ridge": BayesianRidge(),
            "random forest": RandomForestRegressor(random_state=seed),
            "adaboost": AdaBoostRegressor(random_state=seed),
        }
        for name, made in makers.items():
            regressor = make_pipeline(MinMaxScaler(), made).fit(seen, known)
            found.setdefault(name, []).append(float(r2_score(asked, regressor.predict(left))))
    return {name: fmean(values) for name, values in found.items()}


def correlations(rows: Sequence[Drawn]) -> dict[str, float]:
    """Spearman's rank correlation of each property with quality; 0 for a property that is the same for all."""
    quality = [row.quality for row in rows]
    return {name: rank_correlation([row.known[name] for row in rows], quality) for name in rows[0].known}
