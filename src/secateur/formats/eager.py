"""Whether kernels may be handed what tensors point to: not where torch records, or transforms, what is computed.

Where it records, what is called has to be an operator, which it sees; where it transforms, as torch.func does, one of
torch's own, whose derivatives and batches it knows.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

# By names of their own: these are asked for each layer, of which a small one takes a few microseconds.
_compiling, _tracing_state, _modes = (
    torch.compiler.is_compiling,
    torch._C._get_tracing_state,
    torch._C._len_torch_dispatch_stack,
)
_interpreter, _Parameter = torch._C._functorch.peek_interpreter_stack, nn.Parameter


def recorded() -> bool:
    """Whether torch records or intercepts calls: a compiler, an export, a trace, or a mode such as FlopCounterMode."""
    return _compiling() or _tracing_state() is not None or _modes() > 0


def traced() -> bool:
    """Whether torch.jit.trace records them, which knows fewer kinds of operators than the others."""
    return _tracing_state() is not None


def transformed(*tensors: Tensor | None) -> bool:
    """Whether there is more to tensors than their numbers: torch.func, forward-mode derivatives, or another class.

    Of no tensors: whether torch.func or a forward-mode derivative is at work at all.
    """
    for tensor in tensors:
        if tensor is not None and type(tensor) is not Tensor and type(tensor) is not _Parameter:
            return True
    return _interpreter() is not None or forward_ad._current_level >= 0


@contextmanager
def unseen() -> Iterator[None]:
    """While it lasts, no mode and no transform has to do with what is called: it is made once, and kept."""
    with temporarily_clear_interpreter_stack(), _disable_current_modes():
        yield
