"""Networks of cells whose operations are still to be chosen: supernets, for a search to make a network of.

Liu, Simonyan, Yang. "DARTS: Differentiable Architecture Search." 2019. arXiv:1806.09055, section 3.1. Cells are
stacked; each reads the two before it. Those at a third and at two thirds of the depth halve the size and double the
channels.
"""

from torch import Tensor, nn

from secateur.axes.cells import SMALL, SearchCell, Seat, Space
from secateur.errors import SettingError


class CellNetwork(nn.Module):
    """A convolution, cells and a classifier of the mean: [batch, channels, height, width] -> [batch, classes].

    `width` is that of the first cells' nodes. As it is built, every operation of every edge counts alike; a search,
    such as the method `dass`, puts cells of one operation an edge in their places.
    """

    def __init__(
        self, width: int = 16, cells: int = 8, space: Space | None = None, classes: int = 10, channels: int = 3
    ) -> None:
        super().__init__()
        space = Space() if space is None else space
        if width < 2 or cells < 1:
            raise SettingError(
                f"a network of {cells} cells, {width} wide, was asked for",
                "it has one cell at least, and two channels in each node",
                "Give 8 cells 16 wide, or 3 that are 8 wide.",
            )
        before = last = 3 * width
        self.stem = nn.Conv2d(channels, last, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(last)
        halve, shrunk, found = {cells // 3, 2 * cells // 3} if cells > 2 else {cells // 2}, False, []
        for place in range(cells):
            width *= 2 if place in halve else 1
            found.append(SearchCell(Seat(before, last, width, place in halve, shrunk), space))
            before, last, shrunk = last, space.nodes * width, place in halve
        self.cells = nn.ModuleList(found)
        self.linear = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], normalised -> scores [batch, classes]."""
        before = last = self.norm(self.stem(x))
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.linear(last.mean((2, 3)))


def cells() -> CellNetwork:
    """The supernet of the paper's searches on CIFAR-10: eight cells of four nodes, 16 wide, eight operations."""
    return CellNetwork()


def cells_small() -> CellNetwork:
    """Three cells of two nodes, 8 wide, five operations, for colour pictures: a search of minutes."""
    return CellNetwork(8, 3, SMALL)


def cells_grey() -> CellNetwork:
    """The same for grey pictures."""
    return CellNetwork(8, 3, SMALL, channels=1)
