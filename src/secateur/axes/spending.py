"""One budget of weights over units that cost differently: a head costs as much as many neurons.

The target is met to the cheapest unit: a unit that costs more than what is left to spend is passed over, and cheaper
ones go in its stead.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from secateur.axes.patterns import keep_top
from secateur.errors import BudgetError
from secateur.site import Site


def worst_first(score: Tensor, cost: Tensor, spend: float, spared: Tensor) -> Tensor:
    """Which units go [units], bool: the lowest scores first, each if it costs no more than is left of `spend`."""
    gone = torch.zeros(len(score), dtype=torch.bool)
    costs, kept = cost.tolist(), spared.tolist()
    least = min(costs, default=0.0)
    for unit in torch.argsort(score, stable=True).tolist():
        if spend + 1e-6 < least:
            break
        if not kept[unit] and costs[unit] <= spend + 1e-6:
            gone[unit] = True
            spend -= costs[unit]
    return gone


def total_cost(sites: Sequence[Site]) -> float:
    """What all units of some sites own together, in weights."""
    return sum(float(site.cost().sum()) for site in sites)


def spend_everywhere(
    sites: Sequence[Site], scores: Mapping[str, Tensor], spend: float, least: int = 1
) -> dict[str, int]:
    """How many units to keep, by one list of all units; each site keeps its best `least`. See check_affordable."""
    if not sites:
        return {}
    spared = torch.cat([keep_top(scores[site.name], min(least, site.units)) for site in sites])
    score = torch.cat([scores[site.name] for site in sites])
    gone = worst_first(score, torch.cat([site.cost() for site in sites]), spend, spared)
    parts = torch.split(gone, [site.units for site in sites])
    return {site.name: int((~part).sum()) for site, part in zip(sites, parts, strict=True)}


def check_affordable(sites: Sequence[Site], spend: float, of: float, least: int = 1) -> None:
    """Raise BudgetError when so many weights cannot be taken from sites that each keep `least` units."""
    most = sum(float(site.cost().mean()) * max(0, site.units - least) for site in sites)
    if spend > most + 1e-6:
        raise BudgetError(
            f"{spend:,.0f} of {of:,.0f} weights were to be taken out with whole heads and neurons",
            f"{most:,.0f} can be, {least} unit{'s' if least > 1 else ''} being left at each of {len(sites)} sites",
            f"Ask for a sparsity of at most {int(most / of * 1e4) / 1e4:g}.",
        )


def per_block(sites: Sequence[Site], sparsity: float, heads: float | None = None, least: int = 1) -> dict[str, int]:
    """Units to keep so that every block loses the same fraction of its weights.

    Of its heads a block loses the fraction `heads` (the sparsity when None), rounded to whole heads; its neurons make
    up for the rest. Raises BudgetError when they cannot.
    """
    keep: dict[str, int] = {}
    for block in dict.fromkeys(site.block for site in sites):
        here = [site for site in sites if site.block == block]
        left = sparsity * total_cost(here)
        check_affordable(here, left, total_cost(here), least)
        neurons = [site for site in here if site.kind != "head"]
        room = sum(float(s.cost().mean()) * max(0, s.units - least) for s in neurons)
        for site in here:
            if site.kind != "head":
                continue
            each, spare = float(site.cost().mean()), max(0, site.units - least)
            wanted = round((sparsity if heads is None else heads) * site.units)
            must = -int(-(left - room) // each) if left > room else 0  # what neurons could not make up for
            gone = min(max(wanted, must), spare, int((left + 1e-6) / each))
            keep[site.name], left = site.units - gone, left - gone * each
        for place, site in enumerate(neurons):
            rest = total_cost(neurons[place:])
            each, spare = float(site.cost().mean()), max(0, site.units - least)
            gone = min(int((left * total_cost([site]) / rest + 1e-6) / each), spare)
            keep[site.name], left = site.units - gone, left - gone * each
    return keep
