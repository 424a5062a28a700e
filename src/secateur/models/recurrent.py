"""Classifiers of token sequences by recurrent networks: stacked layers, and layers wired by a graph.

Darji. "Investigating Sparsity in Recurrent Neural Networks." 2021. arXiv:2407.20601: an embedding, recurrent layers,
and a linear layer on the last time step. Strings are padded behind their end, and the last step is often padding.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from secateur.axes.wirings import Wiring
from secateur.cut import GATES
from secateur.edit import Mask
from secateur.site import Part, Site

Cell = Callable[[int, int], nn.RNNBase]
"""A recurrent layer from the width of its input and its own: [batch, steps, in] -> [batch, steps, hidden]."""


def tanh(inputs: int, hidden: int) -> nn.RNNBase:
    """A layer of the plain cell, h' = tanh(W x + U h)."""
    return nn.RNN(inputs, hidden, nonlinearity="tanh", batch_first=True)


def relu(inputs: int, hidden: int) -> nn.RNNBase:
    """A layer of the plain cell, h' = relu(W x + U h)."""
    return nn.RNN(inputs, hidden, nonlinearity="relu", batch_first=True)


def gru(inputs: int, hidden: int) -> nn.RNNBase:
    """A layer of gated recurrent units (Cho et al. 2014, arXiv 1406.1078)."""
    return nn.GRU(inputs, hidden, batch_first=True)


def lstm(inputs: int, hidden: int) -> nn.RNNBase:
    """A layer of long short-term memory (Hochreiter, Schmidhuber 1997)."""
    return nn.LSTM(inputs, hidden, batch_first=True)


CELLS: dict[str, Cell] = {"tanh": tanh, "relu": relu, "gru": gru, "lstm": lstm}
"""The four kinds, by name."""


class RecurrentClassifier(nn.Module):
    """Token ids [batch, steps] -> embedding -> recurrent layers -> last step -> scores [batch, classes]."""

    def __init__(self, cell: Cell = gru, vocabulary: int = 128, width: int = 50, layers: int = 3, classes: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(cell(width, width) for _ in range(layers))
        self.out = nn.Linear(width, classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, steps] -> scores [batch, classes]."""
        x = self.embedding(ids)
        for layer in self.layers:
            x, _ = layer(x)
        return self.out(x[:, -1])


class WiredClassifier(nn.Module):
    """A recurrent layer for each layer of a wiring, and one for each pair of layers that edges skip between.

    What reads the layer before is masked by the edges between the two, the same for every gate; a skipping layer has a
    recurrence of its own, and its output is added to that of the layer it leads to. The first layer reads the
    embedding, as wide as itself, and what a layer remembers of itself is dense. The masks are edits, in `masks()`: the
    network is dense until they are applied, and stays sparse in training while they are held.
    """

    def __init__(self, wiring: Wiring, cell: Cell = gru, vocabulary: int = 128, classes: int = 2) -> None:
        super().__init__()
        sizes = [len(layer) for layer in wiring.layers]
        self.wiring, self.pairs = wiring, wiring.skips
        self.embedding = nn.Embedding(vocabulary, sizes[0])
        self.layers = nn.ModuleList(cell(sizes[max(depth - 1, 0)], size) for depth, size in enumerate(sizes))
        self.skips = nn.ModuleDict({f"{a}-{b}": cell(sizes[a], sizes[b]) for a, b in self.pairs})
        self.out = nn.Linear(sizes[-1], classes)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [batch, steps] -> scores [batch, classes]."""
        x = self.embedding(ids)
        done: list[Tensor] = []
        for depth, layer in enumerate(self.layers):
            x, _ = layer(x)
            for a, b in self.pairs:
                if b == depth:
                    x = x + self.skips[f"{a}-{b}"](done[a])[0]  # a new tensor: the old one is needed for the gradient
            done.append(x)
        return self.out(x[:, -1])

    def masks(self) -> list[Mask]:
        """The edges, as masks of the matrices that read one layer for another: bool [gates * hidden, in]."""
        found = [
            self._mask(f"layers.{depth}", self.layers[depth], self.wiring.between(depth - 1, depth))
            for depth in range(1, len(self.layers))
        ]
        for a, b in self.pairs:
            found.append(self._mask(f"skips.{a}-{b}", self.skips[f"{a}-{b}"], self.wiring.between(a, b)))
        return found

    def _mask(self, path: str, layer: nn.Module, edges: Tensor) -> Mask:
        weight = layer.weight_ih_l0
        assert isinstance(weight, Tensor)
        kind = next(k for k in ("GRU", "LSTM", "RNN") if k in type(layer).__name__)
        shape = tuple(weight.shape)
        part = Part(f"{path}.weight_ih_l0", shape, itemsize=weight.element_size())
        return Mask(Site(part.name, "weight", shape, (part,)), torch.cat([edges] * len(GATES[kind])))


def tanh_classifier() -> RecurrentClassifier:
    """Three layers of 50 plain cells with tanh, with random weights."""
    return RecurrentClassifier(tanh)


def relu_classifier() -> RecurrentClassifier:
    """Three layers of 50 plain cells with relu, with random weights."""
    return RecurrentClassifier(relu)


def gru_classifier() -> RecurrentClassifier:
    """Three layers of 50 gated recurrent units, with random weights."""
    return RecurrentClassifier(gru)


def lstm_classifier() -> RecurrentClassifier:
    """Three layers of 50 LSTM cells, with random weights."""
    return RecurrentClassifier(lstm)
