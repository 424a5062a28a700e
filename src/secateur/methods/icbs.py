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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log10
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from secateur.axes import Allocation, Criterion, Pattern, PerMatrix, PerRow, Rank, Refiner, Uniform, Wanda, text_of
from secateur.axes.curvature import Curvature, Fisher, exact_hessian, mean_loss, own_gradients
from secateur.axes.quadratic import Anneal, Quadratic, Search
from secateur.axes.sweep import gradients, spread
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import EvidenceError, PatternError, SettingError
from secateur.evidence import INPUTS, Evidence, calm, examples
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Batch, Task, generator
from secateur.train import History, Snapshot
from secateur.walk import Feed, journal_place, walk

ASIDE = 25  # steps between states put aside, where a run keeps a journal


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
        criterion=("second-order", "search"),
        tasks=("classification", "language modelling"),
        schedule=("custom",),
        gradients=("first", "second"),
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
        watch, draw, aside = Watch(model, task), generator(task, "icbs"), journal_place("search")
        now = Progress(draw)
        if aside is not None and aside.exists():
            now.take_up_(Snapshot.load(aside), model, layers, watch)
            data.rotate(-len(now.history.losses) * min(self.batch, len(data)))
        elif self.every:
            watch.look(now.history)
        history = now.history
        with calm(model):
            while now.left or now.epochs < self.epochs:
                if not now.left:
                    sizes = [layer.site.units for layer in layers]
                    now.left, now.epochs = turns(sizes, self.steps, self.least, draw), now.epochs + 1
                turn = now.left.pop(0)
                batch = [data[i] for i in range(min(self.batch, len(data)))]
                data.rotate(-len(batch))
                self._step(model, task, layers[turn], batch, history, draw)
                if self.every and len(history.losses) % self.every == 0:
                    watch.look(history)
                if aside is not None and len(history.losses) % ASIDE == 0:
                    now.snapshot(layers, watch).save(aside)
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
        for part in walk(model, batches, feed=self.feed):  # not journalled: the search needs the dense weights
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
class Progress:
    """How far a search is, beside the masks: put aside, it goes on as if nothing had happened."""

    draw: torch.Generator
    epochs: int = 0  # begun
    left: list[int] = field(default_factory=list)  # sites still to be looked at in this epoch
    history: History = field(default_factory=History)

    def snapshot(self, layers: Sequence[Layer], watch: "Watch") -> Snapshot:
        """All of it as one value that can be saved."""
        held = {
            "keep": {layer.site.name: layer.keep for layer in layers},
            "tabu": {layer.site.name: layer.tabu for layer in layers},
            "draw": self.draw.get_state(),
            "epochs": self.epochs,
            "left": self.left,
            "seconds": watch.elapsed(),
            "history": asdict(self.history),
        }
        return Snapshot({}, rules=(held,))

    def take_up_(self, snapshot: Snapshot, model: nn.Module, layers: Sequence[Layer], watch: "Watch") -> None:
        """Go back to where `snapshot` was taken, the model and its layers too."""
        held: Mapping[str, Any] = snapshot.rules[0] if snapshot.rules else {}
        for layer in layers:
            layer.place_(model, torch.arange(layer.site.units), held["keep"][layer.site.name])
            layer.tabu = held["tabu"][layer.site.name]
        self.draw.set_state(held["draw"])
        self.epochs, self.left = held["epochs"], list(held["left"])
        self.history = History(**held["history"])
        watch.spent, watch.since = held["seconds"], time.perf_counter()


@dataclass(eq=False)
class Watch:
    """Measures the model as it is being searched, and how long the search took so far; measuring does not count."""

    model: nn.Module
    task: Task
    spent: float = 0.0
    since: float = field(default_factory=time.perf_counter)

    def elapsed(self) -> float:
        """Seconds of searching so far."""
        return self.spent + time.perf_counter() - self.since

    def look(self, history: History) -> None:
        """Log the seconds, and the quality on val, at the step the history has reached."""
        self.spent = self.elapsed()
        step = len(history.losses)
        found = self.task.measure(self.model, "val")
        history.log("seconds", step, self.spent)
        for name in dict.fromkeys([self.task.metric, "loss"]):
            if name in found:
                history.log(f"validation {name}", step, found[name])
        self.since = time.perf_counter()
