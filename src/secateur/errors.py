"""Every error of secateur, each in three parts: what was asked, what is there, what to do.

SecateurError
├── SettingError      a setting out of range, or a name that does not exist
├── SiteError         a selection that matches nothing, or a tensor that is not there
├── PatternError      a pattern that does not fit a shape or a count
├── BudgetError       a target that cannot be met, or was not
├── EvidenceError     data that cannot support the method: too little of it, or not finite
├── TaskError         data that is missing or unusable
├── ModelError        a model that cannot be opened, saved or understood
├── GraphError        a network whose coupling cannot be followed
├── FormatError       a weight that a format cannot hold, or a packed one that is not whole
├── KernelError       compiled kernels that cannot be built, loaded or called
├── ExportError       a form that a run-time does not take, or answers differently in
└── ResumeError       a run that cannot be taken up again
"""

from collections.abc import Iterable
from difflib import get_close_matches


class SecateurError(Exception):
    """What was asked, what is there, what to do."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        super().__init__(asked, found, do)
        self.asked, self.found, self.do = asked, found, do

    def __str__(self) -> str:
        return f"{self.asked}, but {self.found}.\n{self.do}"


class SettingError(SecateurError, ValueError):
    """A setting out of range, or a name that does not exist."""


class SiteError(SecateurError, LookupError):
    """A selection that matches nothing, or a tensor that is not there."""


class PatternError(SecateurError, ValueError):
    """A pattern that does not fit a shape or a count."""


class BudgetError(SecateurError, ValueError):
    """A target that cannot be met, or was not."""


class EvidenceError(SecateurError, ValueError):
    """Data that cannot support the method: too little of it, or not finite."""


class TaskError(SecateurError, ValueError):
    """Data that is missing or unusable."""


class ModelError(SecateurError, ValueError):
    """A model that cannot be opened, saved or understood."""


class GraphError(SecateurError, ValueError):
    """A network whose coupling cannot be followed."""


class FormatError(SecateurError, ValueError):
    """A weight that a format cannot hold, or a packed one that is not whole."""


class KernelError(SecateurError, RuntimeError):
    """Compiled kernels that cannot be built, loaded or called."""


class ExportError(SecateurError, ValueError):
    """A form that a run-time does not take, or answers differently in."""


class ResumeError(SecateurError, ValueError):
    """A run that cannot be taken up again."""


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """The advice for a name that does not exist: the nearest one, or all of them.

    >>> did_you_mean("wandaa", ["wanda", "magnitude"])
    'Did you mean wanda? There are: magnitude, wanda.'
    """
    known = sorted(set(names))
    shown = ", ".join(known[:40]) + (", ..." if len(known) > 40 else "")
    return nearest(name, known) + f"There are: {shown or 'none'}."


def nearest(name: str, names: Iterable[str]) -> str:
    """The question whether the nearest name was meant, however it is written; nothing where none is near.

    >>> nearest("Wanda", ["wanda", "magnitude"])
    'Did you mean wanda? '
    """
    known = sorted(set(names))
    near = get_close_matches(name, known, n=1)
    if not near:
        plain = {each.lower(): each for each in reversed(known)}
        near = [plain[each] for each in get_close_matches(name.lower(), sorted(plain), n=1)]
    return f"Did you mean {near[0]}? " if near else ""
