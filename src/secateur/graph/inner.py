"""What a block of a transformer computes for itself: heads and neurons, each read by one matrix and by nothing else.

A head's values and a neuron's activation leave their block through one matrix (o_proj, down_proj), which adds them to
the residual stream. So whatever is known of a unit's effect on the model is known at that matrix's columns.
"""

from collections.abc import Collection

from secateur.errors import GraphError
from secateur.graph import Coupling
from secateur.site import Part, Site


def inner(coupling: Coupling, kinds: Collection[str] = ("head", "channel")) -> tuple[Site, ...]:
    """The heads and neurons inside the blocks of a model, in order, or those of one kind.

    Raises GraphError when there are none, or when some are not read by one matrix alone (convolutions, experts).
    """
    found = tuple(site for site in coupling.of("head", "channel") if site.block and site.kind in kinds)
    if not found:
        reasons = "; ".join(str(f) for f in coupling.frozen[:5])
        raise GraphError(
            "heads and neurons were to be removed",
            "no repeated blocks hold any" + (f" ({reasons})" if reasons else ""),
            "Use a method for this kind of network: `secateur list` says which.",
        )
    for site in found:
        reader(site)
    return found


def reader(site: Site) -> Part:
    """The matrix that reads a site's units, a column or more each: o_proj of heads, down_proj of neurons."""
    readers = [part for part in site.parts if part.axis == 1 and len(part.shape) == 2]
    read = [part for part in site.parts if part.axis not in (0, None)]
    if len(readers) != 1 or len(read) != 1:
        names = ", ".join(part.key for part in site.parts)
        raise GraphError(
            f"the matrix that reads {site.name} was asked for",
            f"no single matrix does: its units are in {names}",
            "Use a transformer whose MLPs are plain linear layers, or another method.",
        )
    return readers[0]
