"""A mask is learnt over the weights that answer to it: a step of the weights, then one of the mask, in turns.

Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu. "Advancing Model Pruning via Bi-level Optimization." NeurIPS 2022.
arXiv:2210.04092, section 4:

    min over m of L(m * w*(m))      with w*(m) least of L(m * w) + gamma / 2 |w|^2

The weights step with the mask held, on one batch; scores, from which the mask follows, step on another by
(w - m * dL/dz / gamma) * dL/dz, z = m * w: the second term is how the weights would move with the mask, and it costs no
second derivative, as w and m enter only by their product. Scores start as the weights, so the first mask is that of
magnitude.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes import Curve, keep_top, kept_of
from secateur.axes.recalibration import untracked
from secateur.axes.rewinding import apart, pooled
from secateur.axes.rules import Chained, Hold, LearningRate
from secateur.axes.schedules import Cosine, Steps
from secateur.axes.trained_masks import AtOnce, Implicit, Overall, Scored, Size, Transition
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, Remove, apply_
from secateur.errors import BudgetError, SettingError, SiteError, TaskError
from secateur.graph import channels, removals
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Part, Site, tensors
from secateur.task import Batch, Onward, Task
from secateur.train import History, Loop, Rule, fit

OTHER = 1 << 20  # epochs of the mask's batches are counted from here, so that their order is not that of the weights'


@runtime_checkable
class Units(Protocol):
    """What lives or dies whole."""

    @property
    def transition(self) -> Transition:
        """How many of which site: one budget for all, or the same share of each."""
        ...

    def sites(self, model: nn.Module, example: Batch, include: Sequence[str], exclude: Sequence[str]) -> list[Site]:
        """The sites, cut into such units."""
        ...

    def edits(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Edit]:
        """What a choice does to a model whose masked units are zero."""
        ...


@dataclass(frozen=True)
class Weights:
    """Single weights, the best of all layers together."""

    floor: float = 0.0  # each layer keeps at least this fraction of ALL weights; the paper has none

    @property
    def transition(self) -> Overall:
        """One ranking of all."""
        return Overall(self.floor)

    def sites(self, model: nn.Module, example: Batch, include: Sequence[str], exclude: Sequence[str]) -> list[Site]:
        """Every matrix and kernel."""
        return weights(model, include, exclude)

    def edits(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Edit]:
        """Masks."""
        return [Mask(site, keep[site.name]) for site in sites]


@dataclass(frozen=True)
class Filters:
    """Output filters and rows, the same share of each layer; the last matrix, whose rows are the answers, stays whole.

    Shapes stay: what reads a zero filter is not touched, as every layer has a choice of its own.
    """

    transition: ClassVar[Transition] = AtOnce()

    def sites(self, model: nn.Module, example: Batch, include: Sequence[str], exclude: Sequence[str]) -> list[Site]:
        """Every matrix and kernel but the last matrix, a unit an output."""
        found = weights(model, include, exclude)
        last = next((site for site in reversed(found) if len(site.shape) == 2 and not site.block), None)
        return _sliced([site for site in found if site is not last], 0)

    def edits(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Edit]:
        """Masks."""
        return [Mask(site, keep[site.name]) for site in sites]


@dataclass(frozen=True)
class Inputs:
    """Input channels, the same share of each layer; the first layer, whose inputs are the data, stays whole.

    Shapes stay, as with filters. The reference calls these channels.
    """

    transition: ClassVar[Transition] = AtOnce()

    def sites(self, model: nn.Module, example: Batch, include: Sequence[str], exclude: Sequence[str]) -> list[Site]:
        """Every matrix and kernel but the first, a unit an input; layers of one input (depthwise) stay whole, too."""
        found = weights(model, include, exclude)
        return _sliced([site for site in found[0 if found[0].block else 1 :] if site.shape[1] > 1], 1)

    def edits(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Edit]:
        """Masks."""
        return [Mask(site, keep[site.name]) for site in sites]


@dataclass(frozen=True)
class Channels:
    """Channels and neurons with all that writes and reads them, the same share of each site: taken out in the end."""

    transition: ClassVar[Transition] = AtOnce()

    def sites(self, model: nn.Module, example: Batch, include: Sequence[str], exclude: Sequence[str]) -> list[Site]:
        """Channels as the graph couples them. Raises GraphError for a model that cannot be traced."""
        return list(channels(model, example))

    def edits(self, sites: Sequence[Site], keep: Mapping[str, Tensor]) -> list[Edit]:
        """Removals."""
        return list(removals(sites, keep))


def _sliced(sites: Sequence[Site], axis: int) -> list[Site]:
    """The same sites with a unit per position of one axis of their part."""
    found = []
    for site in sites:
        part, size = site.parts[0], site.shape[axis]
        view = [1] * len(part.shape)
        view[axis] = size
        cut = replace(part, owner=torch.arange(size).reshape(view))
        found.append(replace(site, kind="block", shape=(size,), parts=(cut,)))
    if not found:
        raise SiteError("units of several weights were to be cut", "no layer is left to cut", "Prune single weights.")
    return found


class Bilevel(Rule):
    """Between steps of the weights, a step of the scores of the masks, on a batch of their own.

    The loop's optimizer steps the weights (the lower level), each masked one by what its decay and momentum say; the
    rule has one of its own for the scores (the upper level). `upper` gives the loss of the model on another batch of
    training data; without it the rule draws from the loop's task, in another order. After the last step of the weights
    masks stay: what came then would not be trained. `sites` and `scores` are those of Scored.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Mapping[str, Tensor]],
        keep: Mapping[str, Tensor],
        *,
        implicit: Implicit | None = None,
        transition: Transition | None = None,
        rate: float = 0.1,
        curve: Curve | None = None,
        momentum: float = 0.9,
        decay: float = 1e-4,
        every: int = 1,
        upper: Callable[[nn.Module], Tensor] | None = None,
    ) -> None:
        self.scored = Scored(
            sites,
            scores,
            keep,
            slope=Implicit() if implicit is None else implicit,
            read=Size(),
            transition=Overall() if transition is None else transition,
            flow=Chained(),
        )
        self.optimizer = torch.optim.SGD(self.scored.parameters(), rate, momentum=momentum, weight_decay=decay)
        self.rate = LearningRate(Steps() if curve is None else curve)
        self.base, self.every, self.upper = rate, every, upper
        self.passes = 0  # forward and backward passes of the upper level so far
        self._data = Onward(OTHER)

    @property
    def sites(self) -> list[Site]:
        """The sites."""
        return self.scored.sites

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks: site name -> bool."""
        return self.scored.keep

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.scored.masks()

    def start(self, loop: Loop) -> None:
        """Show what the masks leave. Raises TaskError where there is nothing to draw the masks' batches from."""
        if self.upper is None and loop.task is None:
            raise TaskError(
                "masks were to be learnt on batches of their own",
                "this loop has no task to draw them from",
                "Give upper=, a function from the model to its loss on another batch.",
            )
        self._data = Onward(OTHER + loop.epoch)
        self.scored.start(loop)

    def before_step(self, loop: Loop) -> None:
        """The dense weights go back under the optimizer, with the mask times the gradient."""
        self.scored.holder.before_step(loop)

    def after_step(self, loop: Loop) -> None:
        """The masked weights are seen again; where it is time, the scores step, and the masks follow."""
        self.scored.holder.after_step(loop)
        if loop.step < loop.steps and loop.step % self.every == 0:
            self._step(loop)

    def _step(self, loop: Loop) -> None:
        for parameter in loop.model.parameters():
            parameter.grad = None
        with untracked(loop.model), torch.enable_grad():
            torch.autograd.backward(self._loss(loop))  # not grad(): in several processes the hooks average gradients
        self.optimizer.zero_grad(set_to_none=True)
        self.scored.learn(loop)
        for group in self.optimizer.param_groups:
            group["lr"] = self.base * self.rate.factor(loop.step - 1, loop.steps)
        self.optimizer.step()
        for parameter in loop.model.parameters():
            parameter.grad = None
        self.scored.choose(loop)
        self.passes += 1

    def _loss(self, loop: Loop) -> Tensor:
        if self.upper is not None:
            return self.upper(loop.model)
        assert loop.task is not None, "start was called"
        batch = self._data.next(loop.task).to(next(loop.model.parameters()).device)
        return loop.task.loss(loop.model, batch)

    def finish(self, loop: Loop) -> None:
        """The model keeps what the masks leave."""
        self.scored.holder.finish(loop)
        self._data = Onward(*self._data.place)  # what it draws from is let go

    def state(self) -> dict[str, Any]:
        """Masks, weights, scores and their optimizer, and the place in the data."""
        held = {"optimizer": self.optimizer.state_dict(), "place": list(self._data.place), "passes": self.passes}
        return {**self.scored.state(), **held}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """All of it as it was."""
        self.scored.resume(loop, state)
        self.optimizer.load_state_dict(state["optimizer"])
        self._data, self.passes = Onward(*state["place"]), state["passes"]


@dataclass(frozen=True, kw_only=True)
class BiP(Method):
    """Learn the mask and the weights in turns, in one phase, from a trained network to any sparsity."""

    sparsity: float = 0.9  # of all prunable weights together; of the units of each layer, where units are larger
    units: Units = Weights()  # what goes whole: weights, filters, inputs; channels: with all that reads them, for real
    implicit: float = 1e-4  # how far the weights are taken to move with the mask: 1 / gamma; 0: not at all
    rate: float = 0.1  # learning rate of the scores
    curve: Curve = Steps()  # how it falls: tenfold at half and at three quarters
    momentum: float = 0.9  # of the scores
    decay: float = 1e-4  # weight decay of the scores
    every: int = 1  # steps of the weights between two of the mask
    steps: int = 1000  # of the weights; each with one of the mask is two passes forward and back
    rate_floor: float = 0.0  # learning rate of the weights at the end of its cosine, as a fraction of that at the start
    tune: int = 0  # steps of the weights alone afterwards, the mask held: for less than 1 % of the weights
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        45,
        "Advancing Model Pruning via Bi-level Optimization",
        arxiv="2210.04092",
        venue="NeurIPS",
        year=2022,
        when="during training",
        granularity=("weight", "block"),
        needs=("labels", "training"),
        axes="trained masks rule schedule",
        criterion=("learned",),
        start=("pretrained",),
        tasks=("classification",),
        stage=("score or mask",),
        schedule=("one-shot",),
        allocation=("score-driven",),
        learns=("bi-level",),
        reports="finds tickets ahead of iterative magnitude pruning's in most of five networks on four data sets, in "
        "one phase, two to seven times as fast at equal accuracy and sparsity",
        checked="tests/methods/test_bip.py::test_a_learnt_mask_is_ahead_of_the_first_at_equal_passes",
        differs=(
            "scores are a copy of the weights; in the authors' code they share storage, so that each step of one moves "
            "the other",
            "the implicit term is the paper's, m g g; the authors' code multiplies two gradients over all parameters, "
            "which is (w g)^2 at the scores",
            "each level's optimizer has its own parameters; in the authors' code both have all, and frozen ones still "
            "decay",
            "norms and biases are trained by the lower level alone, and the mask's passes leave the running statistics "
            "be",
            "the mask's learning rate starts at its own value; the authors' starts at the weights'",
            "a mask step follows a weight step, and none the last one, as what came then would not be trained",
            "channels are also cut with all that writes and reads them, and then taken out; the paper masks",
        ),
    )
    tiny: ClassVar = {"sparsity": 0.5, "steps": 12}

    def budget(self) -> Budget:
        """Of weights, or of units where these are larger."""
        return Budget(self.sparsity, of="weights" if isinstance(self.units, Weights) else "units")

    def check(self) -> None:
        """Raise SettingError for a search that cannot be."""
        self.budget()
        Implicit(self.implicit)
        LearningRate(Cosine(), floor=self.rate_floor)
        if self.steps < 1 or self.every < 1 or self.tune < 0:
            raise SettingError(
                f"{self.steps} steps, with one of the mask every {self.every}, and {self.tune} of fine-tuning were "
                "asked for",
                "the mask is learnt in steps, and counts are not negative",
                "Give steps and every above 0.",
            )
        if not self.rate > 0:
            raise SettingError(f"a rate of {self.rate:g} was asked for", "scores move by it", "Give 0.1, say.")
        if not 0 <= self.momentum < 1 or not self.decay >= 0:
            raise SettingError(
                f"momentum={self.momentum:g} and decay={self.decay:g} of the scores were asked for",
                "a momentum is in [0, 1) and a decay not below 0",
                "Give 0.9 and 0.0001, as the paper does.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Start from magnitude, learn, and leave what the last mask says."""
        self.check()
        sites = self.units.sites(model, task.example, self.include, self.exclude)
        rule = self.rule(model, sites)
        history = fit(model, task, self.steps, [LearningRate(floor=self.rate_floor), rule])
        edits = apply_(model, self.units.edits(sites, rule.keep))
        notes = [
            f"{rule.scored.overlap:.2%} of what was kept at first, by magnitude, or in the end was kept at both times",
            f"{self.steps + rule.passes:,} passes forward and back: {self.steps:,} of the weights, {rule.passes:,} of "
            "the mask",
        ]
        if self.tune:
            hold = [] if any(isinstance(edit, Remove) for edit in edits) else [Hold.of(edits)]
            rest = [LearningRate(floor=self.rate_floor), *hold]
            history = history.then(fit(model, task, self.tune, rest, epoch=history.epoch))
        return Outcome(model, edits, history, notes=notes + _remarks(history, rule, sites))

    def rule(self, model: nn.Module, sites: Sequence[Site], **given: Any) -> Bilevel:
        """The rule, its scores those of a model's weights and its masks by magnitude: for a loop of one's own.

        `given` goes to Bilevel, such as `upper`. Raises BudgetError where nothing would be left of a site.
        """
        named = tensors(model)
        gated = [_of_parameters(site, named) for site in sites]
        scores = {
            site.name: {p.key: p.view(named[p.name]).detach() for p in site.parts if len(p.shape) > 1} for site in gated
        }
        ranks = {site.name: Size().ranks(site, scores[site.name]) for site in gated}
        transition = self.units.transition
        if isinstance(transition, Overall):
            row = pooled(gated, transition.lifted(gated, ranks))
            keep = apart(gated, keep_top(row, kept_of(len(row), self.sparsity)))
        else:
            keep = {s.name: keep_top(ranks[s.name].reshape(-1), kept_of(s.units, self.sparsity)) for s in gated}
            keep = {s.name: keep[s.name].reshape(s.shape) for s in gated}
        if not any(bool(k.any()) for k in keep.values()):
            raise BudgetError(
                f"a sparsity of {self.sparsity:g} was asked for", "not one weight would be left", "Ask for less."
            )
        return Bilevel(
            gated,
            scores,
            keep,
            implicit=Implicit(self.implicit),
            transition=transition,
            rate=self.rate,
            curve=self.curve,
            momentum=self.momentum,
            decay=self.decay,
            every=self.every,
            **given,
        )


def _of_parameters(site: Site, named: Mapping[str, Tensor]) -> Site:
    """A site without its share of buffers: the statistics of norms go their own way while training goes on."""
    parts: tuple[Part, ...] = tuple(part for part in site.parts if isinstance(named[part.name], nn.Parameter))
    return replace(site, parts=parts)


def _remarks(history: History, rule: Bilevel, sites: Sequence[Site]) -> list[str]:
    empty = [site.name for site in sites if not bool(rule.keep[site.name].any())]
    return [f"collapsed: nothing is left of {', '.join(empty)}"] * bool(empty) + history.notes
