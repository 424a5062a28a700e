"""How numbers are written: the same in the page, the sentence and the model card."""

import math

ABSENT = "not measured"
DIVERGED = "diverged"


def percent(fraction: float | None) -> str:
    """A fraction as a percentage, never rounded onto 0 or 100 when it is neither.

    >>> percent(0.5), percent(0.49984), percent(0.999999), percent(None)
    ('50%', '49.98%', 'over 99.99%', 'not measured')
    """
    if fraction is None:
        return ABSENT
    if 0 < fraction < 5e-5:
        return "under 0.01%"
    if 0.99995 <= fraction < 1:
        return "over 99.99%"
    return f"{100 * fraction:.2f}".rstrip("0").rstrip(".") + "%"


def count(number: float | None) -> str:
    """A whole number, with separators between the thousands."""
    return ABSENT if number is None else f"{round(number):,}"


def quality(number: float | None) -> str:
    """A measured value to four digits; one that is not finite reads "diverged".

    >>> quality(20.7), quality(0.81234), quality(123456.7), quality(float("inf"))
    ('20.70', '0.8123', '123,457', 'diverged')
    """
    if number is None:
        return ABSENT
    if not math.isfinite(number):
        return DIVERGED
    if number == 0:
        return "0"
    exponent = math.floor(math.log10(abs(number)))
    if exponent > 12 or exponent < -5:
        return f"{number:.3e}"
    return f"{number:,.{max(0, 3 - exponent)}f}"


def value(number: float) -> str:
    """A value of which it is not known what it is: whole numbers stay whole."""
    return f"{int(number):,}" if math.isfinite(number) and number == int(number) else quality(number)


def interval(mean: float | None, half: float | None) -> str:
    """A mean and the half-width of its interval, to as many decimals as the mean.

    >>> interval(20.7, 0.123), interval(20.7, None)
    ('20.70 ± 0.12', '20.70')
    """
    shown = quality(mean)
    if half is None or mean is None or not math.isfinite(mean):
        return shown
    decimals = len(shown.partition(".")[2]) if "e" not in shown else 0
    return f"{shown} ± {half:,.{decimals}f}" if round(half, decimals) else f"{shown} ± {half:.1g}"


def size(number: float | None) -> str:
    """Bytes in the largest fitting decimal unit.

    >>> size(269_060_552), size(12)
    ('269.1 MB', '12 bytes')
    """
    if number is None:
        return ABSENT
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if number >= scale:
            return f"{number / scale:,.1f} {unit}"
    return f"{round(number):,} bytes"


def work(number: float | None) -> str:
    """Floating-point operations in the largest fitting unit."""
    if number is None:
        return ABSENT
    for scale, unit in ((1e15, "PFLOPs"), (1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1e3, "kFLOPs")):
        if number >= scale:
            return f"{number / scale:,.2f} {unit}"
    return f"{round(number):,} FLOPs"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
