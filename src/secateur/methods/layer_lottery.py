"""Layer tickets: whole residual blocks leave an untrained network, and what is left trains as well as all of it.

Jordao, de Araujo, Maia, Pedrini. "When Layers Play the Lottery, all Tickets Win at Initialization." 2023.
arXiv:2301.10835, section 3. One pass scores every block, the lowest leave at once, and a network that is really
shallower is trained. The blocks are chosen before training, or, as lottery tickets are, after it, and those that stay
go back to their values at an early step. A stage keeps two blocks, and blocks that change the shape stay.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.allocations import kept_of
from secateur.axes.probes import Probe, Reading, as_in_training
from secateur.axes.recalibration import some
from secateur.axes.residual import Ran, blocks_site, first_tensor, removable_blocks
from secateur.axes.rewinding import Course, Rewind, reinitialize_, train_whole
from secateur.cut import passing
from secateur.edit import Edit, Mask, Replace, apply_
from secateur.errors import BudgetError, ModelError, SettingError
from secateur.method import Budget, Card, Method, check_count, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Part, Site
from secateur.task import Task, generator, quality
from secateur.train import History, Snapshot

# What makes a block worth keeping


@dataclass(frozen=True)
class Signed:
    """w dL/dw with its sign, larger stays: what goes first is what the loss, to first order, would rise most without.

    The paper, section 3, calls it GraSP. Weights that a batch norm follows can be scaled without any effect, so that
    their terms add up to zero: over a whole layer they say nothing, and the norm's own do.
    """

    samples: int = 128  # examples in all

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")

    def read(self, model: nn.Module, sites: Sequence[Site], task: Task, sparsity: float) -> Reading:
        """See Probe."""
        learnt = [model.get_parameter(site.parts[0].name) for site in sites]
        total = [torch.zeros_like(p) for p in learnt]
        with as_in_training(model, task):
            for batch in task.batches("calibration", self.samples):
                found = torch.autograd.grad(task.loss(model, batch), learnt, allow_unused=True)
                for sum_, slope in zip(total, found, strict=True):
                    sum_ += 0 if slope is None else slope * batch.size
        scores = [(p.detach() * slope).float() for p, slope in zip(learnt, total, strict=True)]
        return Reading({site.name: score for site, score in zip(sites, scores, strict=True)})


@runtime_checkable
class BlockScore(Protocol):
    """One number per block, higher = keep."""

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """In the order of the blocks. The model is left as it was."""
        ...


@dataclass(frozen=True)
class MeanOf:
    """The mean over a block's parameters of a probe's scores: snip, signed (GraSP in the paper's words) or grasp."""

    probe: Probe = Signed()

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""
        return [float(value.double().mean()) for value in _by_block(model, blocks, task, self.probe)]


@dataclass(frozen=True)
class SumOf:
    """The sum over a block's parameters of a probe's scores, which grows with the width of its stage."""

    probe: Probe = Signed()

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""
        return [float(value.double().sum()) for value in _by_block(model, blocks, task, self.probe)]


def _by_block(model: nn.Module, blocks: Sequence[Ran], task: Task, probe: Probe) -> list[Tensor]:
    """A probe's scores of all the parameters of each block, in a row; norms too."""
    inside = {
        block.name: [f"{block.name}.{key}" for key, _ in model.get_submodule(block.name).named_parameters()]
        for block in blocks
    }
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    sites = [Site(n, "weight", shapes[n], (Part(n, shapes[n]),)) for names in inside.values() for n in names]
    found = probe.read(model, sites, task, 0.0).scores
    return [torch.cat([found[name].reshape(-1) for name in names]) for names in inside.values()]


@dataclass(frozen=True)
class Size:
    """The mean size of a block's weights. It ranks whole stages, not blocks: a control that must lose."""

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""
        found = []
        for block in blocks:
            values = [p.detach().abs().reshape(-1) for p in model.get_submodule(block.name).parameters()]
            found.append(float(torch.cat(values).double().mean()))
        return found


@dataclass(frozen=True)
class Chance:
    """Any block is as good as another: the control every score must beat."""

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore; drawn from the task's seed."""
        return torch.rand(len(blocks), generator=generator(task, "blocks by chance")).tolist()


@dataclass(frozen=True)
class Divergence:
    """How far the answers move without the block: the mean of sum q (log q - log p), q without it and p with it.

    The mean is over answers: examples, tokens of a language model, pixels of a map.
    """

    samples: int = 256

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""

        def apart(whole: Tensor, without: Tensor) -> float:
            p, q = (torch.log_softmax(_per_answer(x).double(), 1) for x in (whole, without))
            return float((q.exp() * (q - p)).sum(1).mean())

        return _without_each(model, blocks, task, self.samples, "", apart)


@dataclass(frozen=True)
class Unlikeness:
    """How much else the last features say without the block: 1 - CKA of them, with and without it.

    Kornblith, Norouzi, Lee, Hinton 2019, arXiv:1905.00414: ||X^T Y||^2 / (||X^T X|| ||Y^T Y||), columns centred.
    """

    samples: int = 256

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""
        last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not last:
            raise ModelError(
                f"the last features of {type(model).__name__} were to be compared",
                "no linear layer reads them",
                "Use another score, such as divergence.",
            )
        return _without_each(model, blocks, task, self.samples, last[-1], lambda x, y: 1 - linear_cka(x, y))


def _per_answer(logits: Tensor) -> Tensor:
    """[batch, classes], [batch, tokens, classes] or [batch, classes, height, width] -> [answers, classes]."""
    return (logits.movedim(1, -1) if logits.dim() > 3 else logits).flatten(0, -2)


def linear_cka(x: Tensor, y: Tensor) -> float:
    """How alike two sets of features are, in [0, 1]: x [..., d], y [..., e], of the same examples, or of their tokens.

    Kernels of rows [n, n] say the same as those of columns, and the smaller ones are made.
    """
    x, y = (value.flatten(0, -2).double() for value in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    if len(x) < max(x.shape[1], y.shape[1]):
        first, second = x @ x.T, y @ y.T  # ||X^T Y||^2 = <X X^T, Y Y^T>, and ||X^T X|| = ||X X^T||
        below = torch.linalg.norm(first) * torch.linalg.norm(second)
        return float((first * second).sum() / below) if float(below) > 0 else 1.0
    below = torch.linalg.norm(x.T @ x) * torch.linalg.norm(y.T @ y)
    return float((x.T @ y).square().sum() / below) if float(below) > 0 else 1.0


@dataclass(frozen=True)
class FeatureRank:
    """How many directions what a block gives has: the mean rank of its feature maps, of all they could have (HRank)."""

    samples: int = 64

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""

        def rank(out: Tensor) -> Tensor:
            maps = (
                out if out.dim() > 2 else out.unsqueeze(1)
            )  # [batch, channels, height, width] or [batch, rows, width]
            return torch.linalg.matrix_rank(maps.double()).double() / max(maps.shape[-2:])

        return [float(rank(out).mean()) for out in _outputs(model, blocks, task, self.samples)]


@dataclass(frozen=True)
class Activity:
    """How large what a block gives is, on the mean (expectedABS)."""

    samples: int = 64

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore."""
        return [float(out.abs().double().mean()) for out in _outputs(model, blocks, task, self.samples)]


@dataclass(frozen=True)
class Projection:
    """How much a block's features say of the labels: their importance in a projection by partial least squares.

    The mean over features (averaged over pixels) of VIP^2 = d sum_a (s_a w_ja^2) / sum_a s_a, with d features of all
    blocks together, w the weights of component a and s_a the variance of the labels that it explains.
    """

    samples: int = 256
    components: int = 2

    def __post_init__(self) -> None:
        check_count(self.samples, "samples")
        check_count(self.components, "components")

    def score(self, model: nn.Module, blocks: Sequence[Ran], task: Task) -> list[float]:
        """See BlockScore. Raises SettingError where scikit-learn is not installed, or examples have no label each."""
        targets = [batch.target for batch in some(task, self.samples)]
        if not all(isinstance(t, Tensor) and t.dim() == 1 and not t.is_floating_point() for t in targets):
            raise SettingError(
                f"blocks were to be scored by what they say of the labels of {task.name}",
                "its examples have no label each",
                "Use another score, such as divergence.",
            )
        outs = _outputs(model, blocks, task, self.samples)
        features = [out.flatten(2).mean(2) if out.dim() > 3 else out.flatten(1, -2).mean(1) if out.dim() > 2 else out
                    for out in outs]  # fmt: skip
        found = projection_importance(torch.cat(features, 1).cpu(), torch.cat(targets).cpu(), self.components)
        return [float(value.mean()) for value in torch.split(found, [value.shape[1] for value in features])]


def projection_importance(features: Tensor, labels: Tensor, components: int) -> Tensor:
    """VIP^2 of each of some features [n, d] for labels [n]: 1 on the mean. See Projection."""
    try:
        from sklearn.cross_decomposition import PLSRegression
    except ImportError:
        raise SettingError(
            "blocks were to be scored by a projection",
            "scikit-learn is not installed",
            "Install it: pip install 'secateur[studies]', or use another score.",
        ) from None
    wanted = nn.functional.one_hot(labels).double().numpy()
    found = PLSRegression(components).fit(features.double().numpy(), wanted)
    explained = torch.from_numpy((found.x_scores_**2).sum(0) * (found.y_loadings_**2).sum(0))
    share = torch.from_numpy(found.x_weights_).square() @ explained / explained.sum()
    return share * len(share)


@torch.no_grad()
def _outputs(model: nn.Module, blocks: Sequence[Ran], task: Task, samples: int) -> list[Tensor]:
    """What each block gives for some examples, in order."""
    kept: dict[str, list[Tensor]] = {block.name: [] for block in blocks}

    def keep(name: str) -> Callable[..., None]:
        return lambda module, args, out: kept[name].append(first_tensor([out]))  # type: ignore[arg-type]

    hooks = [model.get_submodule(name).register_forward_hook(keep(name)) for name in kept]
    try:
        with as_in_training(model, task), torch.no_grad():
            for batch in some(task, samples):
                batch.to(next(model.parameters()).device).through(model)
    finally:
        for hook in hooks:
            hook.remove()
    return [torch.cat(values) for values in kept.values()]


@contextmanager
def bypassed(model: nn.Module, name: str) -> Iterator[None]:
    """The model without a block: what it answers is what it was given."""

    def hand_on(module: nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> Any:
        x = first_tensor([*args, *kwargs.values()])
        return x if isinstance(out, Tensor) else type(out)((x, *out[1:]))

    hook = model.get_submodule(name).register_forward_hook(hand_on, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@torch.no_grad()
def _without_each(
    model: nn.Module,
    blocks: Sequence[Ran],
    task: Task,
    samples: int,
    reader: str,
    apart: Callable[[Tensor, Tensor], float],
) -> list[float]:
    """How far what a layer reads is from what it reads without each block; of no name, what the model answers."""
    device = next(model.parameters()).device
    batches = [batch.to(device) for batch in some(task, samples)]

    def read() -> Tensor:
        found: list[Tensor] = []
        hook = model.get_submodule(reader).register_forward_pre_hook(lambda m, args: found.append(args[0]))
        try:
            with as_in_training(model, task), torch.no_grad():  # each time anew, so that dropout draws the same
                answers = [first_tensor(_values(batch.through(model))) for batch in batches]
        finally:
            hook.remove()
        return torch.cat(found if reader else [a for a in answers if a is not None])

    found = []
    whole = read()
    for block in blocks:
        with bypassed(model, block.name) if not block.why_not else _as_it_is():
            found.append(apart(whole, read()))
    return found


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _values(answer: Any) -> Iterable[Any]:
    return [answer["logits"]] if isinstance(answer, Mapping) and "logits" in answer else [answer]


# When blocks are chosen, and where those that stay go back to


@dataclass(frozen=True, eq=False)
class Cut:
    """How a ticket is chosen and cut."""

    choose: Callable[[], list[str]]  # the blocks that leave, for the model as it is
    remove_: Callable[[Sequence[str]], list[Edit]]


@runtime_checkable
class Ticket(Protocol):
    """When blocks are chosen, and where training starts without them."""

    def check(self, course: Course) -> None:
        """Raise SettingError for a step that the course does not have."""
        ...

    def train(self, model: nn.Module, task: Task, course: Course, cut: Cut) -> tuple[list[Edit], History, list[str]]:
        """Choose, cut and train the model; the edits, how it went, and remarks."""
        ...


@dataclass(frozen=True)
class AtStart:
    """Chosen before training, which then is the only one."""

    def check(self, course: Course) -> None:
        """See Ticket."""
        course.check(Rewind())

    def train(self, model: nn.Module, task: Task, course: Course, cut: Cut) -> tuple[list[Edit], History, list[str]]:
        """See Ticket."""
        edits = cut.remove_(cut.choose())
        return edits, course.train(model, task), []


@dataclass(frozen=True)
class Rewound:
    """Chosen after a training of the whole; the weights, and the clock, go back to a step, 0 being the start."""

    step: int = 0

    def check(self, course: Course) -> None:
        """See Ticket."""
        course.check(Rewind(self.step))

    def train(self, model: nn.Module, task: Task, course: Course, cut: Cut) -> tuple[list[Edit], History, list[str]]:
        """See Ticket."""
        whole = train_whole(model, task, course, {self.step})
        dense, gone = task.measure(model), cut.choose()
        early = whole.at(self.step)
        early.restore_(model)
        edits = cut.remove_(gone)
        start = replace(Snapshot.of(model), step=early.step, epoch=early.epoch, place=early.place)
        return edits, whole.history.then(course.train(model, task, start=start)), [_won(model, task, dense)]


@dataclass(frozen=True)
class Redrawn:
    """Chosen after a training of the whole; those that stay draw new initial weights."""

    def check(self, course: Course) -> None:
        """See Ticket."""
        course.check(Rewind())

    def train(self, model: nn.Module, task: Task, course: Course, cut: Cut) -> tuple[list[Edit], History, list[str]]:
        """See Ticket."""
        history = course.train(model, task)
        dense, gone = task.measure(model), cut.choose()
        edits = cut.remove_(gone)
        reinitialize_(model, generator(task, "initial weights"))
        return edits, history.then(course.train(model, task)), [_won(model, task, dense)]


def _won(model: nn.Module, task: Task, dense: Mapping[str, float]) -> str:
    now = task.measure(model)
    verb = "wins" if quality(task, now) >= quality(task, dense) else "does not win"
    of = f"{now[task.metric]:.4g} on val, and {dense[task.metric]:.4g} of the whole network"
    return f"the ticket {verb}: {task.metric} {of}"


def least_blocks(
    scores: Sequence[float], stages: Sequence[int], free: Sequence[bool], count: int, least: int
) -> list[int]:
    """The blocks of lowest score that may leave, the first to leave first; no stage is left with fewer than `least`.

    Raises BudgetError, with the most there can be, where so many cannot.
    """
    left = {stage: stages.count(stage) for stage in stages}
    most = sum(
        max(0, min(sum(f for f, s in zip(free, stages, strict=True) if s == stage), size - least))
        for stage, size in left.items()
    )
    if count > most:
        raise BudgetError(
            f"{count} of {len(scores)} blocks were to be taken out",
            f"{most} can be: {least} blocks stay in each of {len(left)} stages, and those that change the shape do",
            f"Ask for a sparsity of at most {most / len(scores):.4f}, or let fewer stay: least=1.",
        )
    gone: list[int] = []
    for place in sorted(range(len(scores)), key=lambda i: (scores[i], i)):
        if len(gone) < count and free[place] and left[stages[place]] > least:
            gone.append(place)
            left[stages[place]] -= 1
    return gone


@dataclass(frozen=True, kw_only=True)
class LayerLottery(Method):
    """Score all residual blocks at once, take out the lowest, train the shallower network."""

    sparsity: float = 0.2  # fraction of the residual blocks taken out, in [0, 1)
    score: BlockScore = MeanOf()  # what makes a block worth keeping: mean-of(probe='snip'), divergence, chance, ...
    ticket: Ticket = AtStart()  # when blocks are chosen: at-start, rewound(step=100), redrawn
    least: int = 2  # blocks that stay in each stage
    steps: int = 1000  # of each training; there are two where blocks are chosen after one
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start

    card: ClassVar = Card(
        41,
        "When Layers Play the Lottery, all Tickets Win at Initialization",
        arxiv="2301.10835",
        year=2023,
        when="before training",
        granularity=("layer",),
        needs=("labels", "training"),
        families=("cnn", "decoder", "encoder", "vision transformer", "moe"),
        axes="probe graph rule",
        criterion=("first-order", "similarity", "random"),
        tasks=("classification",),
        allocation=("score-driven",),
        retraining=("from scratch",),
        reports="ResNet-32 on CIFAR-10 without 1 to 5 of its 15 blocks: +0.08 to -1.00 points chosen by SNIP before "
        "training, +0.40 to +0.12 by GraSP; 1.1 to 1.6 times faster training",
        checked="tests/methods/test_layer_lottery.py::test_a_shallower_network_trains_as_well_on_toy_images",
        differs=(
            "how scores of weights become one of a block is not spelled out in the paper: here the mean over all its "
            "parameters, norms too, as signed terms of weights before a norm add up to zero",
            "no code was published for it: which blocks may leave follows the authors' earlier repository",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "least": 0, "steps": 15}

    @property
    def course(self) -> Course:
        """One training."""
        return Course(self.steps, floor=self.rate_floor)

    def budget(self) -> Budget:
        """A fraction of the blocks."""
        return Budget(self.sparsity, of="units")

    def check(self) -> None:
        """Raise SettingError for a fraction, a stage or a training that cannot be."""
        check_sparsity(self.sparsity)
        if self.least < 0:
            raise SettingError(
                f"{self.least} blocks were to stay in each stage", "a count cannot be negative", "Give 2, or 1."
            )
        self.ticket.check(self.course)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Score, choose, take out, train."""
        self.check()
        device = next(model.parameters()).device
        blocks, why = removable_blocks(model, task.example.to(device))
        free, stages = [block.name not in why for block in blocks], stages_of(blocks)
        count = len(blocks) - kept_of(len(blocks), self.sparsity)
        least_blocks([0.0] * len(blocks), stages, free, count, self.least)  # before anything is trained
        said: list[str] = []

        def choose() -> list[str]:
            scores = self.score.score(model, blocks, task)
            gone = least_blocks(scores, stages, free, count, self.least)
            said.append("scores: " + ", ".join(f"{b.name} {s:.3g}" for b, s in zip(blocks, scores, strict=True)))
            return [blocks[place].name for place in gone]

        def remove_(names: Sequence[str]) -> list[Edit]:
            said.append(f"taken out: {', '.join(names) or 'no block'}")
            keep = torch.tensor([block.name not in names for block in blocks])
            edits: list[Edit] = [Mask(blocks_site(model, [block.name for block in blocks]), keep)]
            edits += [
                Replace(block.name, passing(model.get_submodule(block.name), block.outputs))
                for block in blocks
                if block.name in names
            ]
            return apply_(model, edits)

        edits, history, notes = self.ticket.train(model, task, self.course, Cut(choose, remove_))
        stays = [f"{name} stays: {reason}" for name, reason in why.items()]
        return Outcome(model, edits, history, notes=[*said, *notes, *stays, *history.notes])


def stages_of(blocks: Sequence[Ran]) -> list[int]:
    """The stage of each block: a new one begins where the shape of what blocks give changes."""
    found: list[int] = []
    for place, block in enumerate(blocks):
        shape = None if block.answer is None else block.answer.shape
        before = blocks[place - 1].answer if place else None
        same = before is not None and before.shape == shape
        found.append(found[-1] + (0 if same else 1) if found else 0)
    return found
