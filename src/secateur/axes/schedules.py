"""How a knob moves through training: a value at every moment, and the steps on which to act.

A `Schedule` goes from `start` to `end` while progress goes from `begin` to `until`; a `Curve` says how. The window is
in fractions of the training, so that a schedule outlives a change of its length; `every` is in optimizer steps.

    Power(3)      the cubic ramp: fast while there is much to spare, slow at the end
    Linear()      the same speed throughout
    Cosine()      slow, fast, slow
    Exponential   fast at first, by a constant factor per step
    Jump()        nothing until the end of the window, then all at once: one-shot
    Steps()       by a factor at each of some moments: the learning rate of residual networks
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from secateur.errors import SettingError
from secateur.method import check_sparsity

__all__ = ["Cosine", "Curve", "Exponential", "Jump", "Linear", "Power", "Schedule", "Steps"]


@runtime_checkable
class Curve(Protocol):
    """How much of the way has been gone at a share u of the window: 0 at 0, and 1 at 1."""

    def __call__(self, u: float) -> float:
        """The share of the way from start to end, for u in [0, 1]."""
        ...


@dataclass(frozen=True)
class Power:
    """1 - (1 - u)^power: the polynomial ramp, cubic by default (Zhu and Gupta 2017, arXiv 1710.01878, equation 1)."""

    power: float = 3.0

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise SettingError(
                f"a power of {self.power:g} was asked for", "a ramp's power is above 0", "Give 3 for the cubic ramp."
            )

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return 1 - (1 - u) ** self.power


@dataclass(frozen=True)
class Linear:
    """U itself: the same speed throughout."""

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return u


@dataclass(frozen=True)
class Cosine:
    """(1 - cos(pi u)) / 2: slow, fast, slow."""

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return (1 - math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Exponential:
    """(1 - e^(-rate u)) / (1 - e^(-rate)): fast at first."""

    rate: float = 5.0

    def __post_init__(self) -> None:
        if not self.rate > 0:
            raise SettingError(
                f"a rate of {self.rate:g} was asked for", "an exponential's rate is above 0", "Give 5, say."
            )

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return math.expm1(-self.rate * u) / math.expm1(-self.rate)


@dataclass(frozen=True)
class Jump:
    """0 until the end of the window, then 1: one-shot, on its last step."""

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return 1.0 if u >= 1 else 0.0


@dataclass(frozen=True)
class Steps:
    """1 - by^n after n of some moments: a learning rate that falls tenfold at half and at three quarters.

    He, Zhang, Ren, Sun 2015, arXiv 1512.03385, section 4.2.
    """

    at: tuple[float, ...] = (0.5, 0.75)
    by: float = 0.1

    def __post_init__(self) -> None:
        if not self.at or any(not 0 < moment <= 1 for moment in self.at) or list(self.at) != sorted(set(self.at)):
            raise SettingError(
                f"steps at {self.at} were asked for",
                "they are moments of the window, in (0, 1] and rising",
                "Give (0.5, 0.75), say.",
            )
        if not 0 < self.by < 1:
            raise SettingError(
                f"steps by a factor of {self.by:g} were asked for", "each leaves a part, in (0, 1)", "Give 0.1."
            )

    def __call__(self, u: float) -> float:
        """The share of the way gone."""
        return 1.0 if u >= 1 else 1 - self.by ** sum(u >= moment for moment in self.at)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A value for every moment of training, and the steps on which it is acted on.

    Acts at t0, t0 + every, t0 + 2 every ..., and always at t1, whatever `every` divides: without that last step the
    value aimed at is never reached. t0 and t1 are the window in steps, rounded. Raises SettingError for a window
    that is empty or outside training, for `every` below 1, and for an end below the start that was not asked for by
    `falling`.
    """

    end: float
    start: float = 0.0
    begin: float = 0.0  # fraction of training at which the value leaves `start`
    until: float = 0.7  # fraction of training at which it reaches `end`
    curve: Curve = Power(3.0)
    every: int = 100  # optimizer steps between updates
    falling: bool = False  # an end below the start is meant

    def __post_init__(self) -> None:
        if not (math.isfinite(self.start) and math.isfinite(self.end)):
            raise SettingError(
                f"a schedule from {self.start} to {self.end} was asked for", "its ends are not finite", "Give numbers."
            )
        if not 0 <= self.begin <= 1 or not 0 <= self.until <= 1:
            raise SettingError(
                f"a schedule from {self.begin:g} to {self.until:g} of training was asked for",
                "training lasts from 0 to 1",
                "Give begin and until as fractions of the steps, such as 0.1 and 0.7.",
            )
        if self.begin > self.until:
            raise SettingError(
                f"a schedule was to begin at {self.begin:g} of training",
                f"it ends at {self.until:g}",
                "Let begin be at or before until.",
            )
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise SettingError(
                f"an update every {self.every} steps was asked for",
                "updates are one step apart at least",
                "Give a whole number of optimizer steps, such as 100.",
            )
        if self.end < self.start and not self.falling:
            raise SettingError(
                f"a schedule from {self.start:g} to {self.end:g} was asked for",
                "its end is below its start",
                "Swap them, or say falling=True if that is meant.",
            )
        for u, share in ((0.0, 0.0), (1.0, 1.0)):
            if self.begin < self.until and abs(self.curve(u) - share) > 1e-9:
                raise SettingError(
                    f"the curve {self.curve} was given",
                    f"it is {self.curve(u):g} at {u:g}",
                    "A curve is 0 at 0 and 1 at 1.",
                )

    def at(self, progress: float) -> float:
        """The value at a fraction of training."""
        if progress >= self.until:
            return self.end
        if progress <= self.begin:
            return self.start
        return self._between((progress - self.begin) / (self.until - self.begin))

    def window(self, steps: int) -> tuple[int, int]:
        """The first and the last step on which to act, counted from 0, in a training of so many."""
        return round(self.begin * steps), round(self.until * steps)

    def value(self, step: int, steps: int) -> float:
        """The value at a step: exactly `start` at the window's first step and `end` at its last."""
        first, last = self.window(steps)
        if step >= last:
            return self.end
        if step <= first:
            return self.start
        return self._between((step - first) / (last - first))

    def due(self, step: int, steps: int) -> bool:
        """Whether to act before taking this step, counted from 0; never after the window's end."""
        first, last = self.window(steps)
        return step == last or (first <= step < last and (step - first) % self.every == 0)

    def updates(self, steps: int) -> list[int]:
        """Every step on which to act."""
        first, last = self.window(steps)
        return [*range(first, last, self.every), last]

    def check_sparsity(self) -> None:
        """Raise SettingError unless every value is a sparsity, in [0, 1)."""
        check_sparsity(self.start, "start")
        check_sparsity(self.end, "sparsity")

    def late(self) -> str | None:
        """A warning when less than a tenth of training is left after the window, or None.

        What was removed last then has no time to be made up for, and quality is badly underestimated.
        """
        left = 1 - self.until
        if left >= 0.1 - 1e-9 or self.start == self.end:
            return None
        return (
            f"the schedule ends at {self.until:g} of training: {left:.0%} is left to recover in, and less than 10 % "
            "underestimates what the model can do"
        )

    def _between(self, u: float) -> float:
        return self.end + (self.start - self.end) * (1 - self.curve(u))
