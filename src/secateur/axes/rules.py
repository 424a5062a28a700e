"""Behaviour inside a training loop: holding a mask, ramping one up, moving the learning rate, validating.

Two ways to keep masked weights masked, with the same face (`change`, `values`, `masks`), so that what decides and
what holds can be combined freely:

    Hold      masked weights are zero in the model, get no gradient, and the optimizer forgets them: they are gone
    Shadow    the model shows dense * share between steps, and the dense values are kept aside: they can come back

What a masked value of a Shadow learns is its `Flow`:

    Masked            nothing: it keeps its last value to the bit         (Zhu and Gupta 2017)
    Chained           share * gradient: what differentiating the forward pass gives
    StraightThrough   the gradient of the value seen, as if it were not masked
    Refined           the same, and a pull towards zero                   (SR-STE, Zhou et al. 2021)

`Gradual` decides by a schedule, and works with either. Between steps the model is what the next forward pass sees.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from secateur.axes.allocations import Allocation, Uniform, among
from secateur.axes.criteria import Criterion, Magnitude
from secateur.axes.patterns import Pattern, PerMatrix
from secateur.axes.schedules import Cosine, Curve, Schedule
from secateur.edit import Edit, Mask
from secateur.errors import SettingError, SiteError, TaskError, did_you_mean
from secateur.evidence import Evidence
from secateur.method import Budget
from secateur.site import Part, Site, Tensors
from secateur.task import modes_of, restore_modes_
from secateur.train import History, Loop, Rule

__all__ = [
    "Chained",
    "Flow",
    "Gradual",
    "Hold",
    "LearningRate",
    "Masked",
    "Refined",
    "Shadow",
    "StraightThrough",
    "Validate",
    "early_stop",
    "everything",
    "sparsity_of",
    "validation_loss",
]


def everything(sites: Sequence[Site]) -> dict[str, Tensor]:
    """Masks that keep all: site name -> True [*site.shape]."""
    return {site.name: torch.ones(site.shape, dtype=torch.bool) for site in sites}


def sparsity_of(keep: Mapping[str, Tensor]) -> float:
    """The fraction of all units that masks, or shares, take to zero."""
    units = sum(k.numel() for k in keep.values())
    return (units - sum(int(torch.count_nonzero(k)) for k in keep.values())) / units if units else 0.0


@runtime_checkable
class Flow(Protocol):
    """What a dense value learns from the gradient of the value seen."""

    @property
    def held(self) -> bool:
        """Whether masked values are put back after the step, whatever momentum and weight decay did."""
        ...

    def gradient(self, gradient: Tensor, dense: Tensor, share: Tensor) -> Tensor:
        """The gradient the optimizer gets; all three are the same part, outputs first."""
        ...


@dataclass(frozen=True)
class Masked:
    """A masked value gets no gradient and keeps its last value to the bit."""

    held: ClassVar[bool] = True

    def gradient(self, gradient: Tensor, dense: Tensor, share: Tensor) -> Tensor:
        """Gradient where the share is not zero."""
        return gradient.masked_fill(share == 0, 0)


@dataclass(frozen=True)
class Chained:
    """The gradient through the multiplication: share * gradient."""

    held: ClassVar[bool] = False

    def gradient(self, gradient: Tensor, dense: Tensor, share: Tensor) -> Tensor:
        """Share * gradient."""
        return gradient * share.to(gradient.dtype)


@dataclass(frozen=True)
class StraightThrough:
    """Every value learns from the gradient of the value seen (Bengio et al. 2013, arXiv 1308.3432)."""

    held: ClassVar[bool] = False

    def gradient(self, gradient: Tensor, dense: Tensor, share: Tensor) -> Tensor:
        """The gradient itself."""
        return gradient


@dataclass(frozen=True)
class Refined:
    """SR-STE: straight through, with masked values pulled to zero so that masks settle.

    Zhou et al. 2021, arXiv 2102.04010, equation 4.
    """

    strength: float = 2e-4
    held: ClassVar[bool] = False

    def gradient(self, gradient: Tensor, dense: Tensor, share: Tensor) -> Tensor:
        """Gradient + strength * (1 - share) * dense."""
        return gradient + self.strength * (1 - share.to(dense.dtype)) * dense


class _Seat:
    """One tensor (or one expert of a stack of them) and the parts that share it."""

    def __init__(self, parameter: Tensor, site: Site, part: Part) -> None:
        self.parameter, self.part = parameter, part
        self.members = [(site, part)]

    @property
    def value(self) -> Tensor:
        return self.part.view(self.parameter.detach())

    @property
    def gradient(self) -> Tensor | None:
        return None if self.parameter.grad is None else self.part.view(self.parameter.grad)

    def share(self, shares: Mapping[str, Tensor]) -> Tensor:
        """The product of what each site leaves of this tensor, at its own shape."""
        found: Tensor | None = None
        for site, part in self.members:
            units = shares[site.name]
            nobody = units.new_ones(()) if units.dtype != torch.bool else True
            mine = site.expand(units, nobody=nobody)[part.key].to(self.parameter.device)  # type: ignore[arg-type]
            found = (
                mine if found is None else (found & mine if found.dtype == mine.dtype == torch.bool else found * mine)
            )
        assert found is not None
        return found.expand(self.part.shape)


def _seats(sites: Sequence[Site], named: Tensors) -> list[_Seat]:
    found: dict[tuple[int, int | None], _Seat] = {}
    for site in sites:
        for part in site.parts:
            if part.name not in named:
                raise SiteError(
                    f"masks for {site.name} were to be held",
                    f"the model has no tensor {part.name!r}",
                    did_you_mean(part.name, named),
                )
            key = (id(named[part.name]), part.index)
            if key not in found:
                found[key] = _Seat(named[part.name], site, part)
                continue
            other = found[key]
            if other.part.name != part.name or (part.owner is None and other.part.owner is None):
                raise SiteError(
                    f"masks for {other.part.name} and {part.name} were to be held",
                    "they are one tensor (tied weights), which cannot have two masks",
                    "Leave one of them out with exclude=.",
                )
            other.members.append((site, part))
    return list(found.values())


def _checked(sites: Sequence[Site], shares: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The shares of these sites, detached; raises SiteError for one that is missing or of another shape."""
    found = {}
    for site in sites:
        if site.name not in shares:
            raise SiteError(f"a mask for {site.name} was needed", "there is none", did_you_mean(site.name, shares))
        share = shares[site.name]
        if tuple(share.shape) != tuple(site.shape):
            raise SiteError(
                f"a mask of {tuple(share.shape)} for {site.name} was given",
                f"its units are {site.shape}",
                "Give one value per unit.",
            )
        found[site.name] = share.detach()
    return found


class Hold(Rule):
    """Masked weights are exactly zero after every step, whatever momentum and weight decay do.

    Their gradients are masked and the optimizer's state of them is cleared, so that nothing drifts between steps.
    Once gone a weight cannot come back.
    """

    def __init__(self, sites: Sequence[Site], keep: Mapping[str, Tensor] | None = None) -> None:
        self.sites = list(sites)
        self.keep = _checked(self.sites, everything(self.sites) if keep is None else keep)
        self._seats: list[_Seat] = []
        self._stays: list[Tensor | None] = []

    @classmethod
    def of(cls, edits: Iterable[Edit]) -> "Hold":
        """The masks among edits, held: for fine-tuning what a one-shot method has pruned."""
        masks = [edit for edit in edits if isinstance(edit, Mask)]
        keep: dict[str, Tensor] = {}
        for mask in masks:
            keep[mask.site.name] = mask.keep & keep.get(mask.site.name, mask.keep)
        return cls(list({mask.site.name: mask.site for mask in masks}.values()), keep)

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return [Mask(site, self.keep[site.name]) for site in self.sites]

    def start(self, loop: Loop) -> None:
        """Zero what is masked."""
        self._seats = _seats(self.sites, loop.tensors)
        self.change(loop, self.keep)
        if (sparsity := sparsity_of(self.keep)) > 0:
            loop.log("sparsity", sparsity)

    def change(self, loop: Loop, keep: Mapping[str, Tensor]) -> None:
        """Put other masks in place; what they bring back starts from zero."""
        self.keep = {name: k.bool() for name, k in _checked(self.sites, keep).items()}
        loop.agree(self.keep)
        loop.occupied(self.keep)
        self._stays = _stays(seat.share(self.keep) for seat in self._seats)
        for seat, stays in zip(self._seats, self._stays, strict=True):
            if stays is not None:
                _clear_(seat.value, stays)
                loop.reset(seat.part, stays == 0)

    def values(self) -> Tensors:
        """The weights themselves."""
        return {seat.part.name: seat.parameter.detach() for seat in self._seats}

    def before_step(self, loop: Loop) -> None:
        """Masked weights get no gradient."""
        for seat, stays in zip(self._seats, self._stays, strict=True):
            if stays is not None and (gradient := seat.gradient) is not None:
                _clear_(gradient, stays)

    def after_step(self, loop: Loop) -> None:
        """Masked weights are zero again."""
        for seat, stays in zip(self._seats, self._stays, strict=True):
            if stays is not None:
                _clear_(seat.value, stays)

    def state(self) -> dict[str, Any]:
        """The masks."""
        return {"keep": dict(self.keep)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """The masks as they were; what the optimizer remembers was restored with it."""
        self.keep = _checked(self.sites, state["keep"])
        self._stays = _stays(seat.share(self.keep) for seat in self._seats)
        self.after_step(loop)


def _stays(shares: Iterable[Tensor]) -> list[Tensor | None]:
    """Masks as `_clear_` takes them; None where everything stays, so that a step has nothing to do."""
    return [None if bool(share.all()) else _bits(share) for share in shares]


def _bits(share: Tensor) -> Tensor:
    """All bits set where a boolean is True and none elsewhere: int8, which widens to any word by its sign."""
    return share.to(torch.int8).neg_()


_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _clear_(value: Tensor, stays: Tensor) -> None:
    """Zero what does not stay. Masking the bits takes a seventh of the time that `masked_fill_` does on random masks.

    Unlike a product it leaves no negative zeros, and none of what is not finite.
    """
    value.view(_WORDS[value.element_size()]).bitwise_and_(stays)


class Shadow(Rule):
    """The forward pass sees dense * share, and the optimizer steps the dense values, which are kept aside.

    The gradient that arrives is that of the value SEEN, at every position, masked ones too; `flow` says what the
    dense value learns from it. A rule that needs it whole (growing by gradient, scores) goes before this one and
    reads `parameter.grad` in `before_step`. A share is a boolean, or a number for soft masks.
    """

    def __init__(
        self, sites: Sequence[Site], keep: Mapping[str, Tensor] | None = None, flow: Flow | None = None
    ) -> None:
        self.sites = list(sites)
        self.keep = _checked(self.sites, everything(self.sites) if keep is None else keep)
        self.flow: Flow = Masked() if flow is None else flow
        self._seats: list[_Seat] = []
        self._shares: list[Tensor] = []
        self._stays: list[Tensor | None] = []
        self._dense: list[Tensor] = []
        self._still = False

    def masks(self) -> list[Mask]:
        """The masks as edits; a soft share keeps what is not zero."""
        return [Mask(site, self.keep[site.name] != 0) for site in self.sites]

    def start(self, loop: Loop) -> None:
        """Put the dense values aside and show what the masks leave."""
        self._seats = _seats(self.sites, loop.tensors)
        self._dense, self._shares, self._still = [seat.value.clone() for seat in self._seats], [], False
        self.change(loop, self.keep)
        if (sparsity := sparsity_of(self.keep)) > 0:
            loop.log("sparsity", sparsity)

    def change(self, loop: Loop, keep: Mapping[str, Tensor]) -> None:
        """Put other masks in place; what they bring back has its last value.

        Where masked values are held, the optimizer forgets what it knew of those newly masked.
        """
        self._gather()
        old = self._shares
        self.keep = _checked(self.sites, keep)
        loop.agree(self.keep)
        loop.occupied(self.keep)
        self._share()
        for i, (seat, share) in enumerate(zip(self._seats, self._shares, strict=True)):
            if self.flow.held:
                newly = share == 0 if not old else (share == 0) & (old[i] != 0)
                loop.reset(seat.part, newly)
        self._show()

    def values(self) -> Tensors:
        """The dense values, masked ones included, by tensor name and as the tensors are stored."""
        self._gather()
        found: dict[str, Tensor] = {}
        for seat, dense in zip(self._seats, self._dense, strict=True):
            if seat.part.name not in found:
                found[seat.part.name] = seat.parameter.detach().clone()
            seat.part.view(found[seat.part.name]).copy_(dense)
        return found

    def before_step(self, loop: Loop) -> None:
        """The dense values go back under the optimizer, with the gradient their flow gives them."""
        if self._still:
            for seat, stays in zip(self._seats, self._stays, strict=True):
                if stays is not None and (gradient := seat.gradient) is not None:
                    _clear_(gradient, stays)
            return
        for seat, dense, share in zip(self._seats, self._dense, self._shares, strict=True):
            if (gradient := seat.gradient) is not None:
                learnt = self.flow.gradient(gradient, dense, share)
                if learnt is not gradient:
                    gradient.copy_(learnt)
            seat.value.copy_(dense)

    def after_step(self, loop: Loop) -> None:
        """The dense values are put aside again, and their share shown."""
        if self._still:
            for seat, stays in zip(self._seats, self._stays, strict=True):
                if stays is not None:
                    _clear_(seat.value, stays)
            return
        for seat, dense, share in zip(self._seats, self._dense, self._shares, strict=True):
            dense.copy_(torch.where(share == 0, dense, seat.value) if self.flow.held else seat.value)
        self._show()

    def finish(self, loop: Loop) -> None:
        """The model keeps what the forward pass sees; the dense values are let go."""
        self._dense, self._still = [], False

    def state(self) -> dict[str, Any]:
        """The masks and the dense values."""
        self._gather()
        return {"keep": dict(self.keep), "dense": list(self._dense)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """The masks and dense values as they were."""
        self.keep = _checked(self.sites, state["keep"])
        self._share()
        for dense, was in zip(self._dense, state["dense"], strict=True):
            dense.copy_(was)
        self._show()

    def _share(self) -> None:
        # Where masked values stand still, those seen and those kept aside change places only when masks do: between
        # changes a step costs no copies of the model.
        self._shares = [seat.share(self.keep) for seat in self._seats]
        self._still = isinstance(self.flow, Masked) and all(share.dtype == torch.bool for share in self._shares)
        self._stays = _stays(self._shares) if self._still else []

    def _gather(self) -> None:
        """Bring what was put aside up to date with the values seen."""
        if not self._still or not self._dense:
            return
        for seat, dense, share in zip(self._seats, self._dense, self._shares, strict=True):
            torch.where(share, seat.value, dense, out=dense)

    def _show(self) -> None:
        for seat, dense, share in zip(self._seats, self._dense, self._shares, strict=True):
            if share.dtype == torch.bool:
                seat.value.copy_(dense)
                _clear_(seat.value, _bits(share))
            else:
                torch.mul(dense, share, out=seat.value)


class Gradual(Rule):
    """Remove more and more while training goes on, by a schedule.

    At each update the sites are scored, the schedule's sparsity at that step is spread over them, and the best are
    kept, exactly as many as asked. After the schedule's end the masks never change. With a `Shadow` (the default)
    weights are scored by their dense values and can come back; with `Hold` they are gone.
    Zhu and Gupta 2017, arXiv 1710.01878, section 3.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        schedule: Schedule,
        criterion: Criterion | None = None,
        allocation: Allocation | None = None,
        pattern: Pattern | None = None,
        holder: "Hold | Shadow | None" = None,
    ) -> None:
        schedule.check_sparsity()
        self.sites = list(sites)
        if not self.sites:
            raise SiteError("a gradual ramp was asked for", "there are no sites to prune", "Widen include=.")
        self.schedule = schedule
        self.criterion: Criterion = Magnitude() if criterion is None else criterion
        self.allocation: Allocation = Uniform() if allocation is None else allocation
        self.pattern: Pattern = PerMatrix() if pattern is None else pattern
        self.holder = Shadow(self.sites) if holder is None else holder
        if self.criterion.needs:
            raise SettingError(
                f"a gradual ramp by {type(self.criterion).__name__} was asked for",
                f"it needs evidence ({', '.join(sorted(self.criterion.needs))}), and a ramp scores the weights alone",
                "Use a criterion of the weights, such as Magnitude().",
            )

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks: site name -> bool."""
        return self.holder.keep

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.holder.masks()

    def start(self, loop: Loop) -> None:
        """Say what the schedule means for this run."""
        if (late := self.schedule.late()) is not None:
            loop.note(late)
        if self.pattern.fixed is not None and self.schedule.start != self.schedule.end:
            loop.note(
                f"{self.pattern} always removes {self.pattern.fixed:g}: from the schedule's first update on, not "
                "little by little"
            )
        self.holder.start(loop)

    def before_forward(self, loop: Loop) -> None:
        """Choose anew when the schedule says so."""
        if self.schedule.due(loop.step, loop.steps):
            self.update(loop, self.schedule.value(loop.step, loop.steps))

    def update(self, loop: Loop, sparsity: float) -> None:
        """Choose what stays at a sparsity, now."""
        values = {**loop.tensors, **self.holder.values()}
        scores = {site.name: self.criterion.score(site, values, Evidence()) for site in self.sites}
        within: Mapping[str, Tensor | None] = dict.fromkeys(scores)
        if isinstance(self.holder, Hold):  # what is gone must not win a tie against a weight that happens to be zero
            within = {name: keep.to(scores[name].device) for name, keep in self.keep.items()}
            scores = {
                name: score.masked_fill(~self.keep[name].to(score.device), -torch.inf) for name, score in scores.items()
            }
        counts = self.allocation.spread(self.sites, Budget(sparsity), scores)
        if isinstance(self.holder, Hold) and not self.schedule.falling:
            counts = among(counts, {name: int(keep.sum()) for name, keep in self.keep.items()})
        keep = {}
        for site in self.sites:
            count = self.pattern.nearest(site.shape, counts[site.name])
            if count == 0:
                loop.note(f"{site.name} keeps nothing from a sparsity of {sparsity:.3g} on; a floor prevents that")
            keep[site.name] = self.pattern.select(scores[site.name], count, within[site.name])
        self.holder.change(loop, keep)
        loop.log("sparsity", sparsity_of(self.keep))

    def before_step(self, loop: Loop) -> None:
        """As the holder does."""
        self.holder.before_step(loop)

    def after_step(self, loop: Loop) -> None:
        """As the holder does."""
        self.holder.after_step(loop)

    def finish(self, loop: Loop) -> None:
        """The last update, where the schedule ends with training; a remark when training stopped before it."""
        last = self.schedule.window(loop.steps)[1]
        if loop.step == last == loop.steps:
            self.update(loop, self.schedule.end)
        if loop.step < last and self.schedule.value(loop.step, loop.steps) != self.schedule.end:
            loop.note(
                f"training stopped after {loop.step} of {loop.steps} steps, before the schedule's end at {last}: the "
                f"sparsity is {sparsity_of(self.keep):.4g}, not {self.schedule.end:g}"
            )
        self.holder.finish(loop)

    def state(self) -> dict[str, Any]:
        """What the holder remembers."""
        return self.holder.state()

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As the holder does."""
        self.holder.resume(loop, state)


class LearningRate(Rule):
    """Move every learning rate from its own starting value down along a curve, after a linear warm-up.

    The rate of a step is set before it: base * warmed, then base * (floor + (1 - floor)(1 - curve(u))).
    """

    def __init__(self, curve: Curve | None = None, warmup: float = 0.0, floor: float = 0.0) -> None:
        if not 0 <= warmup < 1:
            raise SettingError(
                f"a warm-up of {warmup:g} was asked for", "it is a fraction of training, in [0, 1)", "Give 0.1, say."
            )
        if not 0 <= floor <= 1:
            raise SettingError(
                f"a floor of {floor:g} was asked for", "it is a fraction of the learning rate, in [0, 1]", "Give 0."
            )
        self.curve: Curve = Cosine() if curve is None else curve
        self.warmup, self.floor = warmup, floor
        self._base: list[float] = []

    def factor(self, step: int, steps: int) -> float:
        """What the learning rate is multiplied by at a step, counted from 0."""
        warm = round(self.warmup * steps)
        if step < warm:
            return (step + 1) / (warm + 1)
        u = (step - warm) / max(steps - warm, 1)
        return self.floor + (1 - self.floor) * (1 - self.curve(min(u, 1.0)))

    def start(self, loop: Loop) -> None:
        """Remember where each learning rate starts."""
        self._base = [float(group.setdefault("initial_lr", group["lr"])) for group in loop.optimizer.param_groups]

    def before_forward(self, loop: Loop) -> None:
        """Set the learning rates of the step to come."""
        for base, group in zip(self._base, loop.optimizer.param_groups, strict=True):
            group["lr"] = base * self.factor(loop.step, loop.steps)

    def state(self) -> dict[str, Any]:
        """Where the learning rates started."""
        return {"base": list(self._base)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """Start from the same ones."""
        self._base = list(state["base"])


class Validate(Rule):
    """Measure on held-out data as training goes on: curves "validation loss" and "validation <metric>".

    The loss is the mean over examples, raw: no smoothing, so that its minimum is what Frankle and Carbin (2019) call
    the early-stopping iteration.
    """

    def __init__(self, every: int = 100, split: str = "val", n: int | None = None) -> None:
        if every < 1:
            raise SettingError(f"validation every {every} steps was asked for", "steps are whole", "Give 1 or more.")
        self.every, self.split, self.n = every, split, n

    def start(self, loop: Loop) -> None:
        """Check that there is something to validate on."""
        if loop.task is None:
            raise TaskError("validation was asked for", "this loop has no task", "Validate in your own loop.")

    def after_step(self, loop: Loop) -> None:
        """Measure every so many steps, and after the last."""
        if loop.step % self.every and loop.step != loop.steps:
            return
        assert loop.task is not None
        modes = modes_of(loop.model)
        loop.model.eval()
        found = loop.task.measure(loop.model, self.split)
        loop.log(f"validation {loop.task.metric}", found[loop.task.metric])
        same = "loss" in found and self.n is None  # a second pass over the data would give it again
        loop.log("validation loss", found["loss"] if same else validation_loss(loop, self.split, self.n))
        restore_modes_(loop.model, modes)


def validation_loss(loop: Loop, split: str = "val", n: int | None = None) -> float:
    """The mean loss over the examples of a split, the model as it is."""
    assert loop.task is not None
    total, examples = 0.0, 0
    device = next((p.device for p in loop.model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        for batch in loop.task.batches(split, n):
            total += float(loop.task.loss(loop.model, batch.to(device))) * batch.size
            examples += batch.size
    if not examples:
        raise TaskError(f"a loss on {split} was asked for", "it has no examples", "Give it data.")
    return total / examples


def early_stop(history: History, curve: str = "validation loss") -> tuple[int, float]:
    """The step at which a curve is lowest, the first of equals, and its value there."""
    if not history.curves.get(curve):
        raise SettingError(
            f"the lowest point of {curve!r} was asked for", "nothing was logged under it", "Train with Validate()."
        )
    return min(history.curves[curve], key=lambda point: (point[1], point[0]))
