"""iCBS: improve a mask where it matters to the loss, one small block of weights at a time; no weight is updated.

"Scalable iterative pruning of large language and vision models using block coordinate descent." 2024. arXiv:2411.17796;
after Combinatorial Brain Surgeon. Of a layer's weights w0, those left out are zero in w. A block holds some of what
was left out and some of what was kept; x_i = 1 leaves weight i of it out. With dw = w - w0, a choice x moves the
weights by

    d  =  w0 (1 - x) - w  =  -(dw + x w0)
    dL =  c g^T d + 1/2 d^T H d + ridge |d|^2

where g is the mean gradient at the weights as they are and H the mean of the examples' own g g^T. That is x^T Q x plus
a constant, to be minimised with as many ones as the block had left out before.
"""

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import comb, log10
from typing import ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Pattern, PerMatrix, PerRow, Rank, Refiner, Uniform, Wanda, text_of
from secateur.axes.sweep import gradients, spread
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, PatternError, SettingError
from secateur.evidence import INPUTS, Evidence, calm, examples
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Batch, Task, generator
from secateur.train import History
from secateur.walk import Feed, walk


@dataclass(frozen=True, eq=False)
class Quadratic:
    """The loss as a function of which weights of a block are left out: x^T matrix x + constant, x in {0, 1}^n."""

    matrix: Tensor  # [block, block], symmetric, float64; Q in the paper
    constant: float

    def value(self, x: Tensor) -> float:
        """Its value for a choice [block], True where a weight is left out."""
        x = x.to(self.matrix.dtype)
        return float(x @ self.matrix @ x) + self.constant


def quadratic(
    dense: Tensor, now: Tensor, gradient: Tensor, hessian: Tensor, multiplier: float, ridge: float
) -> Quadratic:
    """How the loss changes with a block: w0, w and g [block], H [block, block]; c_g and lambda of the paper.

    Q = 1/2 w0 H w0 + diag(w0 (H dw) - c w0 g + ridge w0 (2 dw + w0)), the constant is the move back to w0.
    """
    dense, now, gradient, hessian = (t.detach().double().cpu() for t in (dense, now, gradient, hessian))
    change = now - dense  # dw
    pull = hessian @ change
    linear = dense * pull - multiplier * dense * gradient + ridge * dense * (2 * change + dense)
    matrix = dense[:, None] * hessian * dense / 2 + linear.diag()
    constant = change @ pull / 2 - multiplier * (gradient @ change) + ridge * (change @ change)
    return Quadratic((matrix + matrix.T) / 2, float(constant))


def without_negatives(problem: Quadratic) -> Quadratic:
    """What the authors' release minimises: it means to drop entries of no size, and drops all below 1e-12."""
    return Quadratic(problem.matrix.masked_fill(problem.matrix <= 1e-12, 0), problem.constant)


# How the loss bends


@runtime_checkable
class Curvature(Protocol):
    """What stands for the second derivatives of the loss in a block."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """[block, block], from each example's gradient [examples, block], or from calling `exact`."""
        ...


@dataclass(frozen=True)
class Fisher:
    """The mean over examples of g g^T: the paper's choice. Its rank is at most the number of examples."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        return gradients.T @ gradients / len(gradients)


@dataclass(frozen=True)
class MeanGradient:
    """The mean gradient's own g g^T: of rank one."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        mean = gradients.mean(0)
        return mean[:, None] * mean


@dataclass(frozen=True)
class ExactHessian:
    """The second derivatives themselves, a backward pass for each weight of the block: for small blocks."""

    def hessian(self, gradients: Tensor, exact: Callable[[], Tensor]) -> Tensor:
        """See Curvature."""
        return exact()


# How a choice is found


@runtime_checkable
class Search(Protocol):
    """How x^T Q x is minimised over x in {0, 1}^n with a given number of ones."""

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """A choice [n] with as many True as `start`, no worse than it; matrix [n, n] is symmetric, float64."""
        ...


@dataclass(frozen=True)
class Exhaustive:
    """Try every choice: for blocks of 20 weights at most."""

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """See Search; the first of equals."""
        n, ones = len(start), int(start.sum())
        if comb(n, ones) > 200_000:
            raise SettingError(
                f"every way to leave {ones} of {n} weights out was to be tried",
                f"there are {comb(n, ones):.2g}",
                "Use anneal, or a block of 20.",
            )
        places = torch.tensor(list(combinations(range(n), ones))).reshape(-1, ones)
        every = torch.zeros(len(places), n, dtype=matrix.dtype).scatter_(1, places, 1.0)
        best = ((every @ matrix) * every).sum(1).argmin()
        return every[best].bool()


@dataclass(frozen=True)
class Anneal:
    """Swap a one and a zero at random; swaps that cost are accepted ever more seldom. The best that was met wins.

    Simulated annealing at inverse temperatures from `hot` to `cold`, on Q scaled to entries of size one on average. A
    sweep offers each weight a partner of the other value, drawn at random. A run ends when a whole temperature accepts
    nothing. Every restart begins at the choice as it stands, so that the result is never worse.
    """

    restarts: int = 10  # 20 for language models in the paper
    hot: float = 1e-3
    cold: float = 100.0
    growth: float = 1.1  # of the inverse temperature, from one to the next
    sweeps: int = 1  # at each temperature

    def __post_init__(self) -> None:
        if min(self.restarts, self.sweeps) < 1 or not 0 < self.hot <= self.cold or self.growth <= 1:
            raise SettingError(
                f"annealing {self.restarts} times from {self.hot:g} to {self.cold:g} by {self.growth:g} was asked for",
                "inverse temperatures are above 0 and grow, and there is one run and one sweep at least",
                "Give hot=0.001, cold=100, growth=1.1.",
            )

    def minimise(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """See Search."""
        n, ones = len(start), int(start.sum())
        sizes = matrix.abs()
        if ones in (0, n) or not bool(sizes.any()):
            return start.clone()
        scaled = matrix / sizes[sizes > 0].mean()
        found = [self._run(scaled, start, draw) for _ in range(self.restarts)]

        def energy(x: Tensor) -> float:  # anew, of Q as it was: sums of many small changes drift
            x = x.to(matrix.dtype)
            return float(x @ matrix @ x)

        return min([start, *found], key=energy)

    def _run(self, matrix: Tensor, start: Tensor, draw: torch.Generator) -> Tensor:
        """One run. What is looked at in the inner loop is in lists and views of memory: tensors cost microseconds."""
        n = len(start)
        pairs = 2 * matrix
        pairs.fill_diagonal_(0)
        # What it costs to turn a one on, the others being as they are; of a one, what it cost.
        price = (matrix.diagonal() + pairs @ start.to(matrix.dtype)).numpy()
        rows = pairs.numpy()
        seen, couple = price.data, rows.data
        x = bytearray(start.to(torch.uint8).numpy().tobytes())
        members = [[i for i in range(n) if not x[i]], [i for i in range(n) if x[i]]]  # of each value
        place = [0] * n
        for side in members:
            for at, i in enumerate(side):
                place[i] = at
        energy = lowest = 0.0
        best = bytes(x)
        beta = self.hot
        while beta <= self.cold:
            accepted = 0
            for _ in range(self.sweeps):
                chance = torch.rand(2, n, generator=draw, dtype=torch.float64)
                limits = (-chance[0].clamp(min=1e-300).log() / beta).tolist()
                partners = chance[1].tolist()
                for i in range(n):
                    others = members[1 - x[i]]
                    j = others[int(partners[i] * len(others))]
                    on, off = (j, i) if x[i] else (i, j)
                    change = seen[on] - seen[off] - couple[on, off]
                    if change > limits[i]:
                        continue
                    price += rows[on]
                    price -= rows[off]
                    x[on], x[off] = 1, 0
                    a, b = place[on], place[off]
                    members[0][a], members[1][b], place[off], place[on] = off, on, a, b
                    accepted += 1
                    energy += change
                    if energy < lowest - 1e-12:
                        lowest, best = energy, bytes(x)
            if not accepted:
                break
            beta *= self.growth
        return torch.frombuffer(bytearray(best), dtype=torch.uint8).bool()


# What is in a block


def fixed_sides(score: Tensor, keep: Tensor, lowest: float, highest: float) -> Tensor:
    """Which weights may still change sides, bool like keep.

    Of those left out the fraction `lowest` with the lowest scores may not, nor of those kept the fraction `highest`
    with the highest.
    """
    free = torch.ones(keep.numel(), dtype=torch.bool)
    flat, kept = score.detach().reshape(-1).cpu(), keep.reshape(-1)
    for side, share, down in ((~kept, lowest, False), (kept, highest, True)):
        places = side.nonzero().squeeze(1)
        order = flat[places].argsort(descending=down, stable=True)
        free[places[order[: int(share * len(places))]]] = False
    return free.reshape(keep.shape)


@dataclass(eq=False)
class Layer:
    """One site while it is searched: its dense weights, what is kept by now, what may change, what was looked at."""

    site: Site
    dense: Tensor  # flat, w0
    keep: Tensor  # bool, flat
    free: Tensor  # bool, flat
    tabu: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))  # places, the oldest first

    def pick(self, score: Tensor, block: int) -> Tensor:
        """Places of the block to decide next [<= block], those left out first: their best beside the worst kept.

        `score` [units] is what the loss says of a weight now. What is tabu comes only where nothing else of its side
        is left, the oldest first. Empty where one of the sides has nothing to offer.
        """
        if int(self.free.sum()) <= block:
            out, kept = ((self.free & side).nonzero().squeeze(1) for side in (~self.keep, self.keep))
        else:
            out = self._best(score, ~self.keep, block // 2)
            kept = self._best(-score, self.keep, block - block // 2)
        if not len(out) or not len(kept):
            return out[:0]
        return torch.cat([out, kept])

    def _best(self, score: Tensor, side: Tensor, most: int) -> Tensor:
        open_ = self.free & side
        open_[self.tabu] = False
        places = open_.nonzero().squeeze(1)
        order = score[places].argsort(descending=True, stable=True)
        chosen = places[order[:most]]
        again = self.tabu[side[self.tabu]][: most - len(chosen)]
        return torch.cat([chosen, again])

    def remember(self, places: Tensor, share: float) -> None:
        """A block was decided: it stays tabu until a fraction of the free weights was decided after it."""
        most = round(share * int(self.free.sum()))
        older = self.tabu[~torch.isin(self.tabu, places)]
        self.tabu = torch.cat([older, places])
        self.tabu = self.tabu[max(len(self.tabu) - most, 0) :]

    def place_(self, model: nn.Module, places: Tensor, keep: Tensor) -> None:
        """Decide some places [block], in the model too: what is kept comes back as it was."""
        self.keep[places] = keep
        seen = self.site.parts[0].read(tensors(model))
        value = (self.dense[places] * keep).to(seen.device)
        with torch.no_grad():
            seen[torch.unravel_index(places.to(seen.device), self.site.shape)] = value


def turns(sizes: Sequence[int], steps: int, least: int, draw: torch.Generator) -> list[int]:
    """An epoch: which site is looked at in each step, more often where there are more weights, in a random order.

    As log10 of the number of weights says, `least` times each; an epoch is longer than `steps` where that asks for it.
    """
    share = [max(log10(size), 0.01) for size in sizes]
    exact = [steps * s / sum(share) for s in share]
    counts = [max(least, int(e)) for e in exact]
    for i in sorted(range(len(sizes)), key=lambda i: counts[i] - exact[i])[: max(steps - sum(counts), 0)]:
        counts[i] += 1
    order = [i for i, count in enumerate(counts) for _ in range(count)]
    return [order[i] for i in torch.randperm(len(order), generator=draw).tolist()]


# What the loss says of a site


def own_gradients(
    model: nn.Module, site: Site, batch: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]
) -> tuple[Tensor, float]:
    """Each example's gradient at a site [examples, units], float32, and the mean loss.

    One example at a time: a mean over a batch has lost them. Raises EvidenceError for a frozen or unused weight.
    """
    part = site.parts[0]
    value = tensors(model)[part.name]
    if not value.requires_grad:
        raise EvidenceError(
            f"the gradient of {site.name} was asked for",
            "it is frozen (requires_grad is False)",
            "Call requires_grad_(True) on it, or leave it out with exclude.",
        )
    rows, total = torch.zeros(len(batch), site.units), 0.0
    for place, example in enumerate(batch):
        with torch.enable_grad():
            found = loss(model, example)
            (whole,) = torch.autograd.grad(found, value, allow_unused=True)
        total += float(found.detach())
        if whole is not None:  # an expert may see no token
            rows[place] = part.view(whole).reshape(-1).float().cpu()
    if not bool(torch.isfinite(rows.sum())):  # of whichever example: a sum keeps it
        raise EvidenceError(
            f"the gradient of {site.name} was measured",
            "it holds NaN or infinity",
            "Look for overflow; half precision often needs bfloat16 or float32.",
        )
    return rows, total / len(batch)


def mean_loss(model: nn.Module, batch: Sequence[Batch], loss: Callable[[nn.Module, Batch], Tensor]) -> float:
    """The mean over examples of the loss of the model as it is."""
    with torch.no_grad():
        return sum(float(loss(model, example)) for example in batch) / len(batch)


def exact_hessian(
    model: nn.Module,
    site: Site,
    places: Tensor,
    batch: Sequence[Batch],
    loss: Callable[[nn.Module, Batch], Tensor],
) -> Tensor:
    """The mean over examples of the second derivatives of the loss at some places of a site [block, block]."""
    part = site.parts[0]
    value = tensors(model)[part.name]
    total = torch.zeros(len(places), len(places), dtype=torch.float64)
    with torch.enable_grad():
        for example in batch:
            (whole,) = torch.autograd.grad(loss(model, example), value, create_graph=True)
            slope = part.view(whole).reshape(-1)[places.to(whole.device)]
            for i, each in enumerate(slope):
                (row,) = torch.autograd.grad(each, value, retain_graph=True)
                total[i] += part.view(row).reshape(-1)[places.to(row.device)].double().cpu()
    total /= len(batch)
    return (total + total.T) / 2


# The method


@dataclass(frozen=True, kw_only=True)
class ICBS(Method):
    """Prune by any criterion, then decide small blocks anew by what the loss says of them, layer by layer, for long.

    The count of each layer stays; weights come back as they were. More steps, better masks: the history holds the
    quality against the steps and against the seconds. A step needs the gradients of `batch` examples at one layer,
    that many times its size in memory.
    """

    sparsity: float = 0.5  # fraction of the weights set to zero, in (0, 1); the paper's cases are 0.7 and 0.9
    samples: int = 128  # calibration examples, with their labels
    start: Criterion = Wanda()  # what makes the first choice: magnitude and random are in the paper too
    pattern: Pattern = PerRow()  # of the first choice, per-row or per-matrix; swaps keep the count of the matrix only
    allocation: Allocation = Uniform()
    refine: Refiner | None = None  # what improves the first choice before the search, such as dsnot
    steps: int = 100  # blocks decided in an epoch: 300 in the paper
    epochs: int = 1  # 10 in the paper
    least: int = 1  # steps at each site in an epoch: 10 for language models in the paper, which makes it longer
    block: int = 1024  # weights decided together: 1024 for a small network, 4096 for language models in the paper
    batch: int = 16  # examples a step looks at: 200 for a small network in the paper
    multiplier: float = 0.75  # of the gradient; c_g in the paper
    ridge: float = 1e-3  # on the move, as a region of trust: the Fisher of few examples leaves most directions free
    tabu: float = 0.4  # fraction of a layer's free weights that were decided last, and rest
    fix_lowest: float = 0.42  # of what was left out first, the lowest scores stay out for good
    fix_highest: float = 0.35  # of what was kept first, the highest scores stay for good
    curvature: Curvature = Fisher()  # mean-gradient and exact-hessian are in the paper too
    search: Search = Anneal()
    undo: bool = False  # whether a move is taken back when the loss of its own batch rises; not in the paper
    released: bool = False  # whether negative entries of Q are dropped, as the authors' release does by mistake
    every: int = 25  # steps between measurements on val; 0 for none
    feed: Feed = "pruned"  # what reaches a block while the first choice is made
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave alone

    card: ClassVar = Card(
        44,
        "Scalable iterative pruning of large language and vision models using block coordinate descent",
        arxiv="2411.17796",
        year=2024,
        needs=("calibration", "labels"),
        families=("mlp", "cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="criterion pattern allocation refiner curvature search",
        reports="An MLP on Fashion-MNIST with a tenth of its weights: 60.7 % accuracy by magnitude, 69.5, 77.3 and "
        "82.6 % after 1, 2 and 10 epochs of 3 steps.",
        checked="tests/methods/test_icbs.py::test_the_quadratic_is_the_change_of_the_loss",
        differs=(
            "Entries of Q are never dropped for being negative, as all are in the authors' release, which loses every "
            "favourable interaction; released=true brings that back.",
            "The constant is dw^T H dw / 2, where the release sums H_ij dw_j^2, so that the change of the loss it logs "
            "is wrong; the choice is the same.",
            "Where all of a side is tabu, its oldest are looked at again, where the release looks at fewer.",
            "Gradients of examples are taken one at a time, and energies in float64.",
        ),
    )
    tiny: ClassVar = {"samples": 8, "steps": 6, "block": 32, "batch": 4, "search": Anneal(restarts=2), "every": 3}

    def check(self) -> None:
        """Raise SettingError or PatternError for settings that cannot work."""
        super().check()
        if self.sparsity == 0:
            raise SettingError("a sparsity of 0 was asked for", "nothing would be left out", "Give 0.5, say.")
        if not isinstance(self.pattern, (PerRow, PerMatrix)):
            raise PatternError(
                f"a choice in the pattern {text_of(self.pattern)} was to be searched by swaps",
                "a swap of two single weights anywhere in a matrix would break that pattern",
                "Use per-row or per-matrix.",
            )
        if self.refine is not None:
            self.refine.fits(self.pattern)
        for name, least in {
            "samples": 1,
            "steps": 1,
            "epochs": 1,
            "least": 0,
            "block": 2,
            "batch": 1,
            "every": 0,
        }.items():
            if getattr(self, name) < least:
                raise SettingError(f"{name}={getattr(self, name)} was asked for", f"{least} is the least", "Give more.")
        for name in ("tabu", "fix_lowest", "fix_highest"):
            if not 0 <= getattr(self, name) < 1:
                raise SettingError(
                    f"{name}={getattr(self, name)} was asked for", "it is a fraction, in [0, 1)", "Give 0.4, say."
                )
        if self.ridge < 0 or self.multiplier < 0:
            raise SettingError(
                f"ridge={self.ridge:g} and multiplier={self.multiplier:g} were asked for",
                "either is 0 or more",
                "Give ridge=0.001 and multiplier=0.75.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method. Raises EvidenceError where what is left out is zero already, so that nothing can come back."""
        self.check()
        batches = list(task.batches("calibration", self.samples))
        layers = self._first(model, task, batches)
        first = [layer.keep.clone() for layer in layers]
        data = deque(examples(batches))
        history, watch, draw = History(), Watch(model, task), generator(task, "icbs")
        if self.every:
            watch.look(history)
        with calm(model):
            for _ in range(self.epochs):
                for turn in turns([layer.site.units for layer in layers], self.steps, self.least, draw):
                    batch = [data[i] for i in range(min(self.batch, len(data)))]
                    data.rotate(-len(batch))
                    self._step(model, task, layers[turn], batch, history, draw)
                    if self.every and len(history.losses) % self.every == 0:
                        watch.look(history)
        if self.every and len(history.losses) % self.every:
            watch.look(history)
        masks = [Mask(layer.site, layer.keep.reshape(layer.site.shape)) for layer in layers]
        came = sum(int((layer.keep & ~old).sum()) for layer, old in zip(layers, first, strict=True))
        changes = [change for _, change in history.curves.get("change of the batch's loss", [])]
        notes = [
            f"{came:,} weights came back and as many went, in {len(changes)} of {len(history.losses)} steps; "
            f"in {sum(change < 0 for change in changes)} of them the loss of the batch fell"
        ]
        return Outcome(model, list(apply_(model, masks)), history, notes=notes)

    def _first(self, model: nn.Module, task: Task, batches: Sequence[Batch]) -> list["Layer"]:
        """The first choice, block after block, each applied before the next is looked at."""
        sites = weights(model, self.include, self.exclude)
        rank = Rank(self.start, self.pattern, self.refine)
        whole = gradients(model, sites, batches, rank.needs, task.loss)
        keep = spread(model, sites, self.allocation, Budget(self.sparsity), self.start, batches, whole)
        layers: list[Layer] = []

        def decide(site: Site, named: Mapping[str, Tensor], seen: Evidence) -> None:
            seen = seen.beside(whole.get(site.name, Evidence()))
            dense = site.parts[0].read(named).detach().clone()
            score = self.start.score(site, named, seen)
            (mask,) = rank.solve(site, named, seen, keep[site.name])
            assert isinstance(mask, Mask)
            chosen = mask.keep
            if mask.kept < site.units and not bool(dense.cpu()[~chosen].any()):
                raise EvidenceError(
                    f"the choice at {site.name} was to be searched",
                    "the weights it leaves out are zero already, so that none can come back",
                    "Start from the dense model.",
                )
            free = fixed_sides(score, chosen, self.fix_lowest, self.fix_highest)
            layers.append(Layer(site, dense.reshape(-1).cpu(), chosen.reshape(-1), free.reshape(-1)))
            apply_(model, mask)

        inputs = rank.needs & INPUTS
        if not inputs:
            for site in sites:
                decide(site, tensors(model), Evidence())
            return layers
        for part in walk(model, batches, feed=self.feed):  # not journalled: a run taken up again begins anew
            here = part.pick(sites)
            seen = part.observe(here, inputs)
            for site in here:
                decide(site, part.tensors, seen[site.name])
        return layers

    def _step(
        self,
        model: nn.Module,
        task: Task,
        layer: Layer,
        batch: Sequence[Batch],
        history: History,
        draw: torch.Generator,
    ) -> None:
        """One block: look at the loss, choose, and put weights back or take them out."""
        rows, before = own_gradients(model, layer.site, batch, task.loss)
        step = len(history.losses)
        history.losses.append(before)
        history.log("batch loss", step, before)
        gradient = rows.mean(0)
        places = layer.pick((layer.dense.float() * gradient).abs(), self.block)
        if not len(places):
            return
        hessian = self.curvature.hessian(
            rows[:, places].double(), lambda: exact_hessian(model, layer.site, places, batch, task.loss)
        )
        dense, keep = layer.dense[places], layer.keep[places]
        problem = quadratic(dense, dense * keep, gradient[places], hessian, self.multiplier, self.ridge)
        asked = without_negatives(problem) if self.released else problem
        out = self.search.minimise(asked.matrix, ~keep, draw)
        layer.remember(places, self.tabu)
        if torch.equal(out, ~keep):
            return
        layer.place_(model, places, ~out)
        after = mean_loss(model, batch, task.loss)
        history.log("predicted change", step, problem.value(out))
        history.log("change of the batch's loss", step, after - before)
        if self.undo and not after <= before:
            layer.place_(model, places, keep)


@dataclass(eq=False)
class Watch:
    """Measures the model as it is being searched, and how long the search took so far; measuring does not count."""

    model: nn.Module
    task: Task
    spent: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def look(self, history: History) -> None:
        """Log the seconds, and the quality on val, at the step the history has reached."""
        self.spent += time.perf_counter() - self.since
        step = len(history.losses)
        found = self.task.measure(self.model, "val")
        history.log("seconds", step, self.spent)
        for name in dict.fromkeys([self.task.metric, "loss"]):
            if name in found:
                history.log(f"validation {name}", step, found[name])
        self.since = time.perf_counter()
