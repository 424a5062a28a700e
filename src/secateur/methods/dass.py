"""Choose the operations of a network's cells while its weights are as sparse as they will be in the end.

Mousavi, Loni, Alibeigi, Daneshtalab. "DASS: Differentiable Architecture Search for Sparse Neural Networks." TECS 2023.
arXiv:2207.06968. Cells that do best dense are not those that do best pruned, so alpha, the shares of the operations,
answers to the masked network:

    min over alpha of L_val(m * w*, alpha)      m keeps the k largest |s| of each layer, s being trained

    search      pre-train     dense; in turns a step of alpha on held-out data and one of w on training data
                prune         w and alpha stand still, s is trained: s = sqrt(6 / fan_in) w / max|w| at first
                fine-tune     s stands still; in turns alpha, through the masked network, and w
    network     the cells of the genotype found, from new weights: pre-trained, pruned and fine-tuned the same way

A step of alpha takes the weights as they are (first order), or as a step of theirs would leave them (second order, Liu
et al. 2019, arXiv:1806.09055, section 2.3, equations 6 to 8):

    dL_val(w')/dalpha - xi (dL_train(w+)/dalpha - dL_train(w-)/dalpha) / 2e
    with w' = w - xi dw, the step of momentum, gradient and decay that is about to be taken, and w+- = w +- e dL_val/dw'
"""

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import kept_of
from secateur.axes.cells import Genotype, SearchCell, Seat, Space, derived, drawn
from secateur.axes.clipping import Clip
from secateur.axes.patterns import keep_top
from secateur.axes.recalibration import untracked
from secateur.axes.residual import blocks_of, blocks_site, run_blocks
from secateur.axes.rewinding import reinitialize_
from secateur.axes.rules import Hold, LearningRate
from secateur.axes.trained_masks import AtOnce, Size, TrainedMask
from secateur.cut import weights
from secateur.edit import Edit, Mask, Replace, apply_
from secateur.errors import EvidenceError, GraphError, SettingError, TaskError
from secateur.method import Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, tensors
from secateur.task import Around, Batch, Forgettable, Onward, Task, generator
from secateur.train import History, Loop, Rule, fit, seeded

# Sparse layers


def scaled_scores(weight: Tensor) -> Tensor:
    """First scores of a layer: sqrt(6 / fan_in) w / max|w|, shaped like its weights [out, in, ...].

    Large weights stay at first. A layer of zeros has scores of zero. Sehwag et al. 2020, arXiv:2002.10509, section 3.2.
    """
    largest = weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)
    return (6 / weight[0].numel()) ** 0.5 * weight / largest


@dataclass(frozen=True)
class Layers:
    """Which layers are sparse, and how much of each stays."""

    sparsity: float
    least: float = 0.0  # weights that a layer keeps at least, times its output channels
    exclude: tuple[str, ...] = ()

    def sites(self, model: nn.Module) -> list[Site]:
        """Every kernel and matrix, the classifier among them."""
        return weights(model, exclude=self.exclude)

    def kept(self, site: Site) -> int:
        """Of n weights all but int(sparsity n), or as many as the channels need."""
        return max(kept_of(site.units, self.sparsity), min(site.units, ceil(self.least * site.shape[0])))

    def rule(self, model: nn.Module) -> TrainedMask:
        """What trains the scores: those of largest size stay, and a layer never gives weights to another."""
        sites, named = self.sites(model), tensors(model)
        scores = {site.name: scaled_scores(site.parts[0].read(named).detach()) for site in sites}
        keep = {s.name: keep_top(scores[s.name].abs().reshape(-1), self.kept(s)).reshape(s.shape) for s in sites}
        given = {site.name: {site.parts[0].key: scores[site.name]} for site in sites}
        return TrainedMask(sites, given, keep, read=Size(), transition=AtOnce())


# Architectures


class Architecture:
    """The shares of operations of each kind of cell: alpha [edges, operations], and Adam for it.

    Cells see alpha, and the model does not have it among its parameters: no optimizer of weights can move it.
    """

    def __init__(self, model: nn.Module, draw: torch.Generator, rate: float = 3e-4, decay: float = 1e-3) -> None:
        device = next(model.parameters()).device
        cells = [module for module in model.modules() if isinstance(module, SearchCell)]
        self.spaces = {cell.seat.kind: cell.space for cell in cells}
        self.alpha: dict[str, Tensor] = {}
        for kind in sorted(self.spaces):
            space = self.spaces[kind]
            first = 1e-3 * torch.randn(space.edges, len(space.operations), generator=draw)
            self.alpha[kind] = first.to(device)
        for cell in cells:
            cell.alpha = self.alpha[cell.seat.kind]
        self.optimizer = torch.optim.Adam(self.alpha.values(), rate, betas=(0.5, 0.999), weight_decay=decay)

    def step(self, gradients: Callable[[Sequence[Tensor]], Sequence[Tensor]]) -> None:
        """Move alpha by the gradients that a function of it gives. At other times it has none, and stands still.

        Raises EvidenceError for gradients that are not finite.
        """
        alphas = list(self.alpha.values())
        try:
            for alpha in alphas:
                alpha.requires_grad_(True)
            found = gradients(alphas)
            if not all(bool(torch.isfinite(gradient).all()) for gradient in found):
                raise EvidenceError(
                    "a step of alpha was to be taken",
                    "its gradient holds NaN or infinity",
                    "Lower the learning rate of the weights, or look for NaN in the held-out data.",
                )
            for alpha, gradient in zip(alphas, found, strict=True):
                alpha.grad = gradient
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        finally:
            for alpha in alphas:
                alpha.requires_grad_(False)

    def state(self) -> dict[str, Any]:
        """Alpha and what Adam remembers of it."""
        return {"alpha": dict(self.alpha), "optimizer": self.optimizer.state_dict()}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Both as they were; cells see the same tensors as before."""
        for kind, alpha in self.alpha.items():
            alpha.copy_(state["alpha"][kind])
        self.optimizer.load_state_dict(state["optimizer"])

    def entropy(self, kind: str) -> float:
        """Of the shares of a kind's operations, in nats, the mean over edges: log(operations) where all count alike."""
        share = self.alpha[kind].detach().softmax(1)
        return float(torch.special.entr(share).sum(1).mean())

    def genotype(self) -> Genotype:
        """The operations of largest share."""
        return Genotype(**{k: derived(a.softmax(1), self.spaces[k].operations) for k, a in self.alpha.items()})


@runtime_checkable
class Answer(Protocol):
    """How weights are taken to answer to alpha, in the gradient of the loss on held-out data."""

    def gradients(self, loop: Loop, alphas: Sequence[Tensor], held: Callable[[], Tensor]) -> list[Tensor]:
        """dL/dalpha, like alphas. The weights, their gradients and the norms' statistics are left as they were."""
        ...


@dataclass(frozen=True)
class AsTheyAre:
    """Not at all: first order, one pass."""

    def gradients(self, loop: Loop, alphas: Sequence[Tensor], held: Callable[[], Tensor]) -> list[Tensor]:
        """See Answer."""
        with untracked(loop.model), torch.enable_grad():
            return _slopes(held(), alphas)


@dataclass(frozen=True)
class Unrolled:
    """By the step that they are about to take: second order, four passes more."""

    size: float = 0.01  # of the change of all weights together, by which the second derivative is taken

    def __post_init__(self) -> None:
        if not self.size > 0:
            raise SettingError(f"a change of weights of {self.size:g} was asked for", "it is above 0", "Give 0.01.")

    def gradients(self, loop: Loop, alphas: Sequence[Tensor], held: Callable[[], Tensor]) -> list[Tensor]:
        """See Answer."""
        task, batch = loop.task, loop.batch
        assert task is not None, "a search has a task"
        assert batch is not None, "a batch is known before the forward pass"
        with untracked(loop.model), torch.enable_grad():
            stepping, rate = stepped(loop.optimizer), float(loop.optimizer.param_groups[0]["lr"])
            masks = [mask for rule in loop.rules if isinstance(rule, Hold) for mask in rule.masks()]
            named = tensors(loop.model)
            stays = {id(named[m.site.parts[0].name]): m.keep for m in masks}
            return unrolled_gradient(
                alphas,
                list(stepping),
                rate,
                lambda: task.loss(loop.model, batch),
                held,
                self.size,
                moves=lambda w, gradient: stepping[w](gradient),
                stays=lambda w: stays[id(w)].to(w.device) if id(w) in stays else None,
            )


def stepped(optimizer: torch.optim.Optimizer) -> dict[Tensor, Callable[[Tensor], Tensor]]:
    """For each parameter of an SGD the direction of its next step, from its gradient: momentum, gradient and decay."""

    def direction(parameter: Tensor, momentum: float, decay: float) -> Callable[[Tensor], Tensor]:
        buffer = optimizer.state.get(parameter, {}).get("momentum_buffer")
        past = 0.0 if buffer is None else momentum * buffer
        return lambda gradient: past + gradient + decay * parameter.detach()

    return {
        parameter: direction(parameter, group.get("momentum", 0.0), group.get("weight_decay", 0.0))
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def unrolled_gradient(
    alphas: Sequence[Tensor],
    parameters: Sequence[Tensor],
    rate: float,
    train: Callable[[], Tensor],
    held: Callable[[], Tensor],
    size: float = 0.01,
    moves: Callable[[Tensor, Tensor], Tensor] = lambda weight, gradient: gradient,
    stays: Callable[[Tensor], Tensor | None] = lambda weight: None,
) -> list[Tensor]:
    """dL_held(w - rate dw(alpha), alpha)/dalpha, its second derivative by a difference of first ones.

    `train` and `held` are losses at the present values of weights and alphas. `moves` gives dw from a weight and its
    gradient, `stays` a boolean of what of a weight is not masked. Weights are as they were afterwards.
    """
    before = [weight.detach().clone() for weight in parameters]
    keeps = [stays(weight) for weight in parameters]

    def put(steps: Sequence[Tensor], by: float) -> None:
        with torch.no_grad():
            for weight, was, step in zip(parameters, before, steps, strict=True):
                weight.copy_(was + by * step)

    def under(values: Sequence[Tensor]) -> list[Tensor]:
        return [v if keep is None else v * keep for v, keep in zip(values, keeps, strict=True)]

    try:
        slopes = _slopes(train(), parameters)
        put(under([moves(weight, slope) for weight, slope in zip(parameters, slopes, strict=True)]), -rate)
        found = _slopes(held(), [*alphas, *parameters])
        first, beyond = found[: len(alphas)], under(found[len(alphas) :])
        norm = float(torch.stack([slope.norm() for slope in beyond]).norm())
        if not norm > 0:
            return first
        by = size / norm
        put(beyond, by)
        above = _slopes(train(), alphas)
        put(beyond, -by)
        below = _slopes(train(), alphas)
        return [f - rate * (a - b) / (2 * by) for f, a, b in zip(first, above, below, strict=True)]
    finally:
        with torch.no_grad():
            for weight, was in zip(parameters, before, strict=True):
                weight.copy_(was)


def _slopes(loss: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of a loss, zero where it does not depend on an input; no `.grad` is touched."""
    found = torch.autograd.grad(loss, list(inputs), allow_unused=True)
    return [torch.zeros_like(x) if g is None else g.detach() for x, g in zip(inputs, found, strict=True)]


class Architect(Rule):
    """Before each step of the weights, one of alpha on a batch of held-out data. Goes after LearningRate."""

    def __init__(self, architecture: Architecture, held: Task, answer: Answer) -> None:
        self.architecture, self.held, self.answer = architecture, held, answer
        self._data = Onward(0)

    def start(self, loop: Loop) -> None:
        """Held-out data is drawn from the loop's epoch on."""
        self._data = Onward(loop.epoch)

    def before_forward(self, loop: Loop) -> None:
        """Move alpha."""
        batch = self._data.next(self.held).to(next(loop.model.parameters()).device)
        self.architecture.step(
            lambda alphas: self.answer.gradients(loop, alphas, lambda: self.held.loss(loop.model, batch))
        )

    def after_step(self, loop: Loop) -> None:
        """Log how far alpha is from a choice."""
        if loop.step % 10 == 0 or loop.step == loop.steps:
            for kind in self.architecture.alpha:
                loop.log(f"entropy of {kind} cells", self.architecture.entropy(kind))

    def state(self) -> dict[str, Any]:
        """Alpha, its optimizer, and the place in the held-out data."""
        return {**self.architecture.state(), "place": list(self._data.place)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """All of it as it was."""
        self.architecture.resume(state)
        self._data = Onward(*state["place"])


class _Other(Around):
    """A task that trains on another of its splits, in the order in which that comes."""

    def __init__(self, task: Task, split: str) -> None:
        super().__init__(task)
        self.split = split

    def batches(self, split: str, n: int | None = None, epoch: int = 0) -> Iterable[Batch]:
        """See Task."""
        return self.task.batches(self.split if split == "train" else split, n, epoch)


def divided(task: Task, share: float) -> tuple[Task, Task]:
    """Tasks whose "train" is what the weights and what alpha is trained on: a share of the examples is held out.

    With a share of 0 alpha is trained on "val". Raises TaskError where either would be empty, SettingError for a task
    that cannot be divided.
    """
    if share == 0:
        held = task.trained_on("val") if isinstance(task, Forgettable) else _Other(task, "val")
        if next(iter(held.batches("train")), None) is None:
            raise TaskError(
                f"cells were to be chosen by the validation data of {task.name}", "there is none", "Give it examples."
            )
        return task, held
    if not isinstance(task, Forgettable):
        raise SettingError(
            f"a share of {share:g} of the training examples of {task.name} was to be held out",
            "it cannot be divided",
            "Choose cells by its validation data: held=0.",
        )
    count = len(task.splits["train"][-1]) if "train" in task.splits else 0
    if not 0 < round(share * count) < count:
        raise TaskError(
            f"a share of {share:g} of the training examples of {task.name} was to be held out",
            f"that is {round(share * count)} of {count}, and neither part may be empty",
            "Give more examples, or choose cells by its validation data: held=0.",
        )
    halves = task.forgetting(share=share)
    return halves.trained_on("retain"), halves.trained_on("forget")


# Stages


@dataclass(frozen=True)
class Stages:
    """Optimizer steps of the three stages, and their rates, each falling as a cosine."""

    pretrain: int = 2000
    prune: int = 1000
    tune: int = 2000
    rate: float = 0.025  # of pre-training
    score_rate: float = 0.1  # of the scores
    tune_rate: float = 0.025  # of fine-tuning
    floor: float = 0.04  # of each rate at its end, as a fraction
    momentum: float = 0.9
    decay: float = 1e-3  # weight decay of weights; scores have none
    clip: float = 5.0  # the longest a gradient may be

    def check(self) -> None:
        """Raise SettingError for steps and rates that cannot be."""
        if min(self.pretrain, self.prune, self.tune) < 0:
            raise SettingError(
                f"stages of {self.pretrain}, {self.prune} and {self.tune} steps were asked for",
                "a count cannot be negative",
                "Give 0 or more.",
            )
        for name in ("rate", "score_rate", "tune_rate"):
            _positive(name, getattr(self, name))
        if not 0 <= self.momentum < 1:
            raise SettingError(f"a momentum of {self.momentum:g} was asked for", "it is in [0, 1)", "Give 0.9, or 0.")
        _decay("decay", self.decay)
        LearningRate(floor=self.floor)
        Clip(self.clip)

    @property
    def steps(self) -> int:
        """Of all three."""
        return self.pretrain + self.prune + self.tune

    def dense(self, model: nn.Module, task: Task, steps: int, rules: Sequence[Rule] = ()) -> History:
        """Weights trained, nothing masked."""
        rules = [LearningRate(floor=self.floor), *rules, Clip(self.clip)]
        return fit(model, task, steps, rules, self._sgd(model, self.rate))

    def run(
        self, model: nn.Module, task: Task, layers: Layers, rules: Sequence[Rule] = ()
    ) -> tuple[list[Mask], History]:
        """Pre-train, prune and fine-tune a model; the masks, which its weights are under. `rules` see the weights move.

        Each stage has an optimizer of its own for what it trains, and nothing else moves: no gradient outlives one.
        """
        history = self.dense(model, task, self.pretrain, rules)
        rule = layers.rule(model)
        scores = torch.optim.SGD(rule.parameters(), self.score_rate, momentum=self.momentum)
        falling = LearningRate(floor=self.floor)
        history = history.then(fit(model, task, self.prune, [falling, rule], scores, epoch=history.epoch))
        masks = rule.masks()
        apply_(model, masks)
        rules = [LearningRate(floor=self.floor), *rules, Hold.of(masks), Clip(self.clip)]
        sgd = self._sgd(model, self.tune_rate)
        return masks, history.then(fit(model, task, self.tune, rules, sgd, epoch=history.epoch))

    def _sgd(self, model: nn.Module, rate: float) -> torch.optim.SGD:
        trained = [p for p in model.parameters() if p.requires_grad]
        return torch.optim.SGD(trained, rate, momentum=self.momentum, weight_decay=self.decay)


def _positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise SettingError(f"a {name} of {value:g} was asked for", "it is above 0", f"Leave {name} as it is.")


def _decay(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise SettingError(f"a {name} of {value:g} was asked for", "it is 0 or more", f"Leave {name} as it is.")


# Searches


@runtime_checkable
class Search(Protocol):
    """Where a genotype comes from."""

    def check(self) -> None:
        """Raise SettingError for settings that cannot be."""
        ...

    def training_steps(self) -> int:
        """Steps of the weights."""
        ...

    def find(self, model: nn.Module, task: Task, layers: Layers) -> tuple[Genotype, History, list[str]]:
        """A genotype for the cells of a model, which may be changed; how it went, and remarks."""
        ...


@dataclass(frozen=True)
class SparseSearch:
    """In three stages, the operations chosen at the final sparsity: DASS."""

    stages: Stages = Stages()
    answer: Answer = AsTheyAre()  # how weights answer to alpha: as-they-are (first order), unrolled (second)
    rate: float = 3e-4  # learning rate of alpha, by Adam
    decay: float = 1e-3  # weight decay of alpha
    held: float = 0.5  # share of the training examples that alpha is trained on; 0: the validation data

    def check(self) -> None:
        """See Search."""
        self.stages.check()
        _check_alpha(self.rate, self.decay, self.held)

    def training_steps(self) -> int:
        """See Search."""
        return self.stages.steps

    def find(self, model: nn.Module, task: Task, layers: Layers) -> tuple[Genotype, History, list[str]]:
        """See Search."""
        mine, held = divided(task, self.held)
        found = Architecture(model, generator(task, "alpha"), self.rate, self.decay)
        history = self.train(model, mine, layers, Architect(found, held, self.answer))
        return found.genotype(), history, _sureness(found)

    def train(self, model: nn.Module, task: Task, layers: Layers, architect: Architect) -> History:
        """Weights in stages, the architect following them."""
        return self.stages.run(model, task, layers, [architect])[1]


@dataclass(frozen=True)
class DenseSearch(SparseSearch):
    """The same without masks: DARTS, as a baseline. All its steps are of one stage, at the rate of pre-training."""

    def train(self, model: nn.Module, task: Task, layers: Layers, architect: Architect) -> History:
        """Weights dense throughout."""
        return self.stages.dense(model, task, self.stages.steps, [architect])


@dataclass(frozen=True)
class Chance:
    """Drawn by the task's seed: what any search must be ahead of."""

    def check(self) -> None:
        """See Search."""

    def training_steps(self) -> int:
        """See Search."""
        return 0

    def find(self, model: nn.Module, task: Task, layers: Layers) -> tuple[Genotype, History, list[str]]:
        """See Search."""
        spaces = {m.seat.kind: m.space for m in model.modules() if isinstance(m, SearchCell)}
        draw = generator(task, "genotype")
        return Genotype(**{kind: drawn(spaces[kind], draw) for kind in sorted(spaces)}), History(), []


@dataclass(frozen=True)
class Known:
    """A genotype of an earlier search, as its notes write it: for a larger network, or other data."""

    genotype: str = ""

    def check(self) -> None:
        """See Search."""
        Genotype.read(self.genotype)

    def training_steps(self) -> int:
        """See Search."""
        return 0

    def find(self, model: nn.Module, task: Task, layers: Layers) -> tuple[Genotype, History, list[str]]:
        """See Search."""
        return Genotype.read(self.genotype), History(), []


def _check_alpha(rate: float, decay: float, held: float) -> None:
    _positive("rate", rate)
    _decay("decay", decay)
    if not 0 <= held < 1:
        raise SettingError(
            f"a share of {held:g} of the training examples was to be held out",
            "it is a fraction, in [0, 1)",
            "Give 0.5, or 0 for the validation data.",
        )


def _sureness(found: Architecture) -> list[str]:
    return [
        f"entropy of the shares of {kind} cells' operations: {found.entropy(kind):.3f} nats of "
        f"{log(len(found.spaces[kind].operations)):.3f} where all count alike"
        for kind in found.alpha
    ]


# Cells in a network


def searched(model: nn.Module, task: Task, space: Space) -> dict[str, SearchCell]:
    """The cells of a network that are to be searched, by name: its own, or of any other those for its blocks.

    A cell can take the place of a block that maps one feature map to one of the same size or half of it, in channels
    that are a multiple of the nodes; it reads its map twice. Raises GraphError, saying why, where there is none.
    """
    own = {name: module for name, module in model.named_modules() if isinstance(module, SearchCell)}
    if own:
        return own
    like = next(model.parameters())
    found, why = {}, []
    for ran in run_blocks(model, task.example.to(like.device), blocks_of(model)):
        args, named = ran.arguments
        read = sum(isinstance(value, Tensor) for value in (*args, *named.values()))
        seat = _seat(ran.given, ran.answer, space.nodes) if ran.calls == 1 and not ran.outputs else None
        if seat is None or read > 1:
            shapes = [None if value is None else list(value.shape) for value in (ran.given, ran.answer)]
            why.append(f"{ran.name} maps {shapes[0]} to {shapes[1]}" if read < 2 else f"{ran.name} reads {read} maps")
            continue
        with seeded(model, generator(task, f"cell {ran.name}").initial_seed()):
            found[ran.name] = SearchCell(seat, space).to(like)
    if not found:
        raise GraphError(
            f"cells of {space.nodes} nodes were to take the place of blocks of {type(model).__name__}",
            f"there is no block that they could stand for ({'; '.join(why[:2]) or 'no two modules are alike'})",
            "Give a network of cells, such as secateur.models.cells:cells, or one of convolutional blocks.",
        )
    return found


def _seat(given: Tensor | None, answer: Tensor | None, nodes: int) -> Seat | None:
    """Where a cell would stand for a block, by the shapes of what it reads and gives; None where none could."""
    if given is None or answer is None or given.dim() != 4 or answer.dim() != 4 or answer.shape[1] % nodes:
        return None
    same, half = given.shape[2:], [-(-size // 2) for size in given.shape[2:]]
    if list(answer.shape[2:]) not in (list(same), half) or answer.shape[1] // nodes < 2:
        return None
    reduces = list(answer.shape[2:]) != list(same)
    return Seat(given.shape[1], given.shape[1], answer.shape[1] // nodes, reduces)


@dataclass(frozen=True, kw_only=True)
class DASS(Method):
    """Search for cells at the final sparsity, then train, prune and fine-tune the network of those found."""

    layer_sparsity: float = 0.99  # of each layer of the network found, in [0, 1)
    search: Search = SparseSearch()  # sparse-search; dense-search, chance or known(genotype='...')
    final: Stages = Stages(tune_rate=0.01, decay=4e-4)  # of the network found
    space: Space = Space()  # of cells that are put into a network that has none
    least: float = 0.0  # a layer keeps at least so many weights times its output channels: 1 is a mean of one for each
    exclude: tuple[str, ...] = ()  # layers that stay dense, such as "*.depthwise"

    card: ClassVar = Card(
        4,
        "DASS: Differentiable Architecture Search for Sparse neural networks",
        arxiv="2207.06968",
        venue="TECS",
        year=2023,
        when="during training",
        granularity=("layer", "weight"),
        needs=("labels", "training"),
        families=("cnn",),
        axes="cells trained masks rule",
        criterion=("learned",),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("one-shot",),
        allocation=("uniform",),
        retraining=("from scratch", "finetune"),
        learns=("bi-level", "search"),
        fusion=("architecture search",),
        reports="CIFAR-10 at 99 %: 81.35 % where a pruned MobileNet-v2 has 73.44 %, and 3.87 times as fast; cells "
        "found dense lose their lead once pruned",
        checked="tests/methods/test_dass.py::test_alpha_answers_to_the_masked_network",
        differs=(
            "weights, scores and alpha have an optimizer each; in the authors' code that of the weights has all three, "
            "so that alpha also steps on the training loss",
            "first order is the default; the paper's second order is sparse-search(answer='unrolled')",
            "alpha stands still while masks are searched, as in the authors' default trainer, and masks follow at once",
            "scores are not decayed, which would scale a layer's alike",
            "no auxiliary head, drop-path or cutout, and the network found has as many cells and channels as the one "
            "searched: known(...) trains a genotype in a larger one",
            "pools keep their norm without weights in the network found",
            "also for networks of convolutional blocks, which cells of one map take the places of",
        ),
    )
    tiny: ClassVar = {
        "layer_sparsity": 0.8,
        "search": SparseSearch(stages=Stages(4, 2, 3)),
        "final": Stages(6, 3, 4),
        "space": Space(2, ("none", "skip_connect", "sep_conv_3x3")),
        "least": 1.0,
    }

    @property
    def layers(self) -> Layers:
        """How much of which layer stays."""
        return Layers(self.layer_sparsity, self.least, self.exclude)

    def budget(self) -> None:
        """None: the sparsity is of a network that is yet to be found, not of the one that is given."""
        return

    def training_steps(self) -> int:
        """Of the search and of the network found."""
        return self.search.training_steps() + self.final.steps

    def sites_in(self, model: nn.Module) -> list[Site]:
        """None that could be known before the search."""
        return []

    def check(self) -> None:
        """Raise SettingError for a sparsity, a search or a training that cannot be."""
        check_sparsity(self.layer_sparsity, "layer_sparsity")
        if not 0 <= self.least < float("inf"):
            raise SettingError(f"least={self.least:g} was given", "it is 0 or more", "Give 1, or leave it out.")
        self.search.check()
        self.final.check()

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Find a genotype, build its cells in, and train, prune and fine-tune."""
        self.check()
        cells = searched(model, task, self.space)
        supernet = copy.deepcopy(model)
        for name, cell in cells.items():
            apply_(supernet, Replace(name, copy.deepcopy(cell)))
            reinitialize_(supernet.get_submodule(name), generator(task, f"search {name}"))
        self._trainable(supernet)
        genotype, history, notes = self.search.find(supernet, task, self.layers)
        edits = self.built_(model, task, cells, genotype)
        masks, trained = self.final.run(model, task, self.layers)
        said = [f"genotype: {genotype}", f"{genotype.share:.0%} of its edges have an operation with weights"]
        said += [*notes, *_left(masks), *self._unused(cells)]
        history = history.then(trained)
        return Outcome(model, [*edits, *masks], history, notes=said + history.notes)

    def _trainable(self, model: nn.Module) -> None:
        """Raise SettingError for a layer whose mask could not be learnt."""
        named = tensors(model)
        for site in self.layers.sites(model):
            if not named[site.parts[0].name].requires_grad:
                raise SettingError(
                    "a sparse network was to be searched for and trained",
                    f"{site.name} has requires_grad=False, so that its mask could not be learnt",
                    "Set it to True, or leave the layer dense by exclude.",
                )

    def built_(self, model: nn.Module, task: Task, cells: Mapping[str, SearchCell], genotype: Genotype) -> list[Edit]:
        """Put the cells of a genotype in the places of those searched, or of blocks, with new weights."""
        names = list(cells)
        gone = blocks_site(model, names, "cells")
        edits: list[Edit] = [Mask(gone, torch.zeros(len(names), dtype=torch.bool))]
        like = next(model.parameters())  # on its device, and as precise
        for name, cell in cells.items():
            with seeded(model, generator(task, f"found {name}").initial_seed()):
                edits.append(Replace(name, cell.found(genotype).to(like)))
        return apply_(model, edits)

    def _unused(self, cells: Mapping[str, SearchCell]) -> list[str]:
        """A remark where `space` was given, and is not what the cells of the network choose from."""
        other = next((cell.space for cell in cells.values() if cell.space != self.space), None)
        if other is None or self.space == Space():
            return []
        return [f"the network has cells of its own, with {other.nodes} nodes and {len(other.operations)} operations"]


def _left(masks: Sequence[Mask]) -> list[str]:
    """What is left in all, and which layers have channels without a weight."""
    kept, units = sum(mask.kept for mask in masks), sum(mask.site.units for mask in masks)
    said = [f"{kept:,} of {units:,} weights of the network found are left: a sparsity of {1 - kept / units:.4f}"]
    dead = {m.site.name: int((~m.keep.flatten(1).any(1)).sum()) for m in masks}
    channels = sum(m.site.shape[0] for m in masks)
    if lost := sum(dead.values()):
        worst = max(masks, key=lambda m: dead[m.site.name] / m.site.shape[0]).site
        said.append(
            f"{lost:,} of {channels:,} output channels have no weight left, most of them in {worst.name}: "
            f"{dead[worst.name]} of {worst.shape[0]}"
        )
    return said
