"""2:4 on NVIDIA's sparse tensor cores, through the semi-structured tensors that torch has: for graphics cards only.

    from secateur.semi_structured import semi_structured_

    changed, left = semi_structured_(model)      # layers that are multiplied as 2:4, and why the others are not

Two of four weights are skipped by the hardware, which pays for many rows of large matrices only: on an H200 1.3 times
as fast at 8192 x 8192 and 4096 rows, and many times slower than dense at few rows (LOG.md). Measure first.
"""

import torch
from torch import Tensor, nn

from secateur.errors import FormatError

DTYPES = (torch.float16, torch.bfloat16)
ROWS, COLUMNS = 32, 64
"""What the kernels want the sides of a matrix to be multiples of, in 16 bits."""


def why_not(weight: Tensor) -> str:
    """Why a weight [out, in] cannot be multiplied as 2:4, or nothing. Where it lies is not looked at."""
    if weight.ndim != 2:
        return f"it has {weight.ndim} axes, and a matrix has 2"
    if weight.dtype not in DTYPES:
        return f"it is {str(weight.dtype).removeprefix('torch.')}, and float16 and bfloat16 are multiplied so"
    if weight.shape[0] % ROWS or weight.shape[1] % COLUMNS:
        return f"it is {list(weight.shape)}, and its sides are to be multiples of {ROWS} and {COLUMNS}"
    most = int((weight.reshape(-1, 4) != 0).sum(1).max())
    return f"of four weights in a row up to {most} are not zero, and 2 may be" if most > 2 else ""


def semi_structured_(model: nn.Module) -> tuple[list[str], dict[str, str]]:
    """Let every linear layer whose weight is 2:4 be multiplied as such; returns their names, and why not the others.

    Tied weights are left as they are. Raises FormatError without a graphics card that has sparse tensor cores, and
    when no layer is 2:4.
    """
    asked = "layers were to be multiplied as 2:4"
    if not torch.cuda.is_available():
        raise FormatError(asked, "torch sees no NVIDIA card here", "Use secateur.accelerate, which is for processors.")
    if torch.cuda.get_device_capability() < (8, 0):
        name = torch.cuda.get_device_name()
        raise FormatError(asked, f"{name} has no sparse tensor cores", "Use a card of the Ampere generation or later.")
    from torch.sparse import to_sparse_semi_structured  # a torch built without it is told the rest all the same

    counts: dict[int, int] = {}
    for _, value in model.named_parameters(remove_duplicate=False):
        counts[id(value)] = counts.get(id(value), 0) + 1
    changed, left = [], dict[str, str]()
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        why = why_not(module.weight)
        if not why and counts[id(module.weight)] > 1:
            why = "its weight is another layer's as well"
        if not why and module.weight.device.type != "cuda":
            why = f"its weight is on {module.weight.device}"
        if why:
            left[name] = why
            continue
        module.weight = nn.Parameter(to_sparse_semi_structured(module.weight.detach()), requires_grad=False)
        changed.append(name)
    if not changed:
        first, why = next(iter(left.items()), ("there is none", "no linear layer is there"))
        raise FormatError(asked, f"{first}: {why}", "Prune with --pattern 2:4, and open it in bfloat16 on the card.")
    return changed, left
