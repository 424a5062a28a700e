"""Filters: what convolutions write, each a unit that goes with all that reads it."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.errors import GraphError
from secateur.graph import couple
from secateur.site import Part, Site, Tensors
from secateur.task import Batch


def writers(site: Site) -> list[Part]:
    """The matrices and kernels whose outputs a site's units are; a depthwise one has the channels of what it reads."""
    return [p for p in site.parts if p.axis == 0 and len(p.shape) > 1 and (len(p.shape) == 2 or p.shape[1] > 1)]


def readers(site: Site) -> list[Part]:
    """The matrices and kernels whose inputs a site's units are."""
    return [p for p in site.parts if p.axis == 1 and len(p.shape) > 1]


def filters(model: nn.Module, example: Batch) -> tuple[list[Site], list[str]]:
    """The sites of channels that convolutions alone write, and what is frozen and why.

    Raises GraphError where there are none.
    """
    coupling = couple(model, example)
    found = [s for s in coupling.of("channel") if writers(s) and all(len(part.shape) > 2 for part in writers(s))]
    if not found:
        raise GraphError(
            f"filters of {type(model).__name__} were to be taken out",
            "it has no convolution whose outputs can be",
            "Use it for CNNs; l1_norm takes out neurons and heads of other networks.",
        )
    return found, [str(frozen) for frozen in coupling.frozen]


def alone(sites: Sequence[Site]) -> list[Site]:
    """Those that one layer writes and one layer reads: neither on a shortcut nor in several branches."""
    return [site for site in sites if len(writers(site)) == len(readers(site)) == 1]


def read_alone(model: nn.Module, example: Batch) -> tuple[list[Site], list[str]]:
    """Those of `alone` that a plain convolution or a linear layer reads, and why others are left alone.

    Raises GraphError where there are none.
    """
    every, notes = filters(model, example)
    single = alone(every)
    sites = [site for site in single if _plain(model.get_submodule(readers(site)[0].module))]
    if not sites:
        raise GraphError(
            f"filters of {type(model).__name__} were to be taken out by what the next layer notices",
            "none is written by one layer and read by one",
            "Use soft_filter or l1_norm, which take out filters of tied layers too.",
        )
    return sites, notes + [
        f"{site.name} is left alone: "
        + ("what reads it is neither linear nor a plain 2-d convolution" if site in single else SEVERAL)
        for site in every
        if site not in sites
    ]


SEVERAL = "several layers write or read it"


def _plain(module: nn.Module) -> bool:
    """Whether each of a layer's outputs reads all that flows in."""
    return isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)


def patches(module: nn.Module, given: Tensor) -> Tensor:
    """What meets each weight of a layer at each position of its output: [n, in, taps of the kernel, positions]."""
    if isinstance(module, nn.Conv2d):
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        padded = F.pad(given, module._reversed_padding_repeated_twice, mode)  # "same" is a number of its own there
        unfolded = F.unfold(padded, module.kernel_size, module.dilation, 0, module.stride)
        return unfolded.reshape(len(given), given.shape[1], -1, unfolded.shape[-1])
    return given.reshape(len(given), -1, given.shape[-1]).transpose(1, 2).unsqueeze(2)


def filter_norm(site: Site, tensors: Tensors) -> Tensor:
    """The Euclidean norm of each filter; of tied layers, of all its filters together [*site.shape]."""
    total = torch.zeros(site.shape)
    for part in writers(site):
        square = {part.name: tensors[part.name].detach().square()}
        total = total + Site(site.name, site.kind, site.shape, (part,)).gather(square).cpu()
    return total.sqrt()
