"""Masks that follow trained scores: a number per weight is trained by the loss, and the best stay.

The forward pass sees z = m * w, with the mask m of the best scores s. Choosing has no gradient, so that of the mask
goes straight through to the scores, at masked places too:

    what a mask is worth    Direct     w * dL/dz: the weights stay as they are
                            Implicit   (w - m * dL/dz / gamma) * dL/dz: the weights answer to the mask
    how scores are read     Plain      s, one per unit
                            Size       |s|, its Euclidean norm over what a unit owns
    how masks follow them   AtOnce     the best of each site
                            Overall    the best of all sites together
                            Swaps      the best of each site, but only a share of the exchanges at a time

Whatever the parts, as many stay in all as at first, at every step. `TrainedMask` is the rule for frozen weights: the
loop's optimizer has the scores and nothing else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from secateur.axes.patterns import keep_top
from secateur.axes.rewinding import apart, pooled
from secateur.axes.rules import Flow, Shadow, StraightThrough, sparsity_of
from secateur.edit import Mask
from secateur.errors import EvidenceError, SettingError, SiteError, did_you_mean
from secateur.site import Part, Site, Tensors
from secateur.train import Loop, Rule

# What a mask is worth


@runtime_checkable
class Slope(Protocol):
    """How the loss would change with a mask that could take any value."""

    def of(self, weight: Tensor, share: Tensor, gradient: Tensor) -> Tensor:
        """dL/dm from the dense weight, the mask m, and dL/dz, which is dense; all like one part, outputs first."""
        ...


@dataclass(frozen=True)
class Direct:
    """The weights stay as they are: w * dL/dz."""

    def of(self, weight: Tensor, share: Tensor, gradient: Tensor) -> Tensor:
        """See Slope."""
        return weight * gradient


@dataclass(frozen=True)
class Implicit:
    """The weights are those that suit the mask best, and would move with it: (w - m * dL/dz / gamma) * dL/dz.

    With w*(m) least of L(m * w) + gamma / 2 |w|^2 and no curvature of L in z, dw*/dm = -dL/dz / gamma on the diagonal
    (Zhang et al. 2022, arXiv:2210.04092, section 4).
    """

    strength: float = 1e-4  # 1 / gamma; 0 is Direct

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise SettingError(
                f"an implicit gradient of strength {self.strength:g} was asked for",
                "it is 1 / gamma for a gamma above 0",
                "Give 0 or more, such as 0.0001.",
            )

    def of(self, weight: Tensor, share: Tensor, gradient: Tensor) -> Tensor:
        """See Slope."""
        return (weight - self.strength * share * gradient) * gradient


# How scores are read


@runtime_checkable
class Read(Protocol):
    """What trained numbers say of units."""

    def ranks(self, site: Site, scores: Mapping[str, Tensor]) -> Tensor:
        """One rank per unit [*site.shape], higher = keep, from a score per element of each part, by the part's key."""
        ...

    def back(self, score: Tensor, slope: Tensor) -> Tensor:
        """What a score learns where the mask of its element should learn `slope`."""
        ...


@dataclass(frozen=True)
class Plain:
    """The score of a unit is the sum over what it owns; of single weights, the score itself."""

    def ranks(self, site: Site, scores: Mapping[str, Tensor]) -> Tensor:
        """See Read."""
        return _over(site, scores)

    def back(self, score: Tensor, slope: Tensor) -> Tensor:
        """The slope itself."""
        return slope


@dataclass(frozen=True)
class Size:
    """Large scores of either sign stay; of units that own many weights, those of a large Euclidean norm."""

    def ranks(self, site: Site, scores: Mapping[str, Tensor]) -> Tensor:
        """See Read."""
        if len(site.parts) == 1 and site.parts[0].owner is None:
            return _over(site, scores).abs()  # the root of a square would lose the smallest to underflow
        return _over(site, {key: score.double().square() for key, score in scores.items()}).sqrt()

    def back(self, score: Tensor, slope: Tensor) -> Tensor:
        """The slope times the score's sign: a score of zero learns nothing."""
        return slope * score.sign()


def _over(site: Site, values: Mapping[str, Tensor]) -> Tensor:
    """The sum over what each unit owns of values per element, by part key; parts without any do not count."""
    total: Tensor | None = None
    for part in site.parts:
        if part.key in values:
            alone = Site(site.name, site.kind, site.shape, (Part(part.key, part.shape, part.owner),))
            found = alone.gather({part.key: values[part.key]})
            total = found if total is None else total + found
    assert total is not None, "scores were checked"
    return total


# How masks follow


@runtime_checkable
class Transition(Protocol):
    """From the masks that are and the ranks of all units to the next masks."""

    def step(
        self, sites: Sequence[Site], ranks: Mapping[str, Tensor], keep: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """Masks that keep as many in all, site name -> bool; `progress` is the share of the search gone, in [0, 1]."""
        ...


def swapped(rank: Tensor, keep: Tensor, share: float) -> Tensor:
    """A mask after the best that are out took the places of the worst that are in.

    c pairs would have to be swapped for the highest ranks to be in; ceil(share * c) are, the best for the worst first.
    Units of equal rank never swap, so that ties, of which there are many at the start, move nothing.
    """
    flat, there = rank.reshape(-1), keep.reshape(-1).to(rank.device)
    best = keep_top(flat, int(there.sum())).to(flat.device)
    comes, goes = (best & ~there).nonzero().squeeze(1), (there & ~best).nonzero().squeeze(1)
    comes = comes[flat[comes].argsort(descending=True, stable=True)]
    goes = goes[flat[goes].argsort(stable=True)]
    count = ceil(share * int((flat[comes] > flat[goes]).sum()) - 1e-9)
    found = there.clone()
    found[comes[:count]], found[goes[:count]] = True, False
    return found.reshape(keep.shape)


@dataclass(frozen=True)
class AtOnce:
    """The best of each site are in, as many as were."""

    def step(
        self, sites: Sequence[Site], ranks: Mapping[str, Tensor], keep: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """See Transition."""
        return {site.name: swapped(ranks[site.name], keep[site.name], 1.0) for site in sites}


@dataclass(frozen=True)
class Overall:
    """The best of all sites together are in, as many as were: a site may gain what another loses."""

    floor: float = 0.0  # each site keeps at least this fraction of all units together, or all it has

    def __post_init__(self) -> None:
        if not 0 <= self.floor < 1:
            raise SettingError(
                f"a floor of {self.floor:g} was asked for", "it is a fraction of all units, in [0, 1)", "Give 0.0005."
            )

    def lifted(self, sites: Sequence[Site], ranks: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The ranks, those of the best of each site above all others."""
        least = int(self.floor * sum(site.units for site in sites))
        if not least:
            return ranks
        found = {}
        for site in sites:
            rank = ranks[site.name]
            best = keep_top(rank.reshape(-1), min(least, site.units)).reshape(rank.shape)
            found[site.name] = rank.masked_fill(best.to(rank.device), torch.inf)
        return found

    def step(
        self, sites: Sequence[Site], ranks: Mapping[str, Tensor], keep: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """See Transition."""
        return apart(sites, swapped(pooled(sites, self.lifted(sites, ranks)), pooled(sites, keep), 1.0))


@dataclass(frozen=True)
class Swaps:
    """The best of each site come in a share of the swaps at a time: max(least, (1 - progress)^power).

    A swap is judged as if the other weights stayed; with many at once that no longer holds. Zhang et al. 2021,
    arXiv:2104.08700, section 3.3 (short restriction).
    """

    power: float = 4.0  # how fast the share falls; 0: all swaps, always
    least: float = 0.05  # share at the end

    def __post_init__(self) -> None:
        if not self.power >= 0 or not 0 <= self.least <= 1:
            raise SettingError(
                f"swaps of a share from 1 down to {self.least:g} with a power of {self.power:g} were asked for",
                "a share is in [0, 1], and falls with a power of 0 or more",
                "Give power=4 and least=0.05, or power=0 for no limit.",
            )

    def share(self, progress: float) -> float:
        """The share of the swaps that are made."""
        return max(self.least, (1.0 - progress) ** self.power)

    def step(
        self, sites: Sequence[Site], ranks: Mapping[str, Tensor], keep: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """See Transition."""
        share = self.share(progress)
        return {site.name: swapped(ranks[site.name], keep[site.name], share) for site in sites}


class Scored:
    """Scores of the sites' weights, the masks that follow them, and the dense weights under the masks.

    `scores` has, for each site, a number per element of each of its parts, or of some of them, by the part's key;
    they are copied, so that what they were taken from does not move with them. The masks start as `keep`.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Mapping[str, Tensor]],
        keep: Mapping[str, Tensor],
        *,
        slope: Slope,
        read: Read,
        transition: Transition,
        flow: Flow,
    ) -> None:
        self.holder = Shadow(sites, keep, flow)
        self.slope, self.read, self.transition = slope, read, transition
        self.first = {name: k.bool().clone() for name, k in self.holder.keep.items()}
        self.scores: dict[str, dict[str, nn.Parameter]] = {}
        self._owners: dict[str, list[tuple[Site, Part]]] = {}
        for site in sites:
            self.scores[site.name] = {key: _copied(s) for key, s in _fitting(site, scores).items()}
            for part in site.parts:
                self._owners.setdefault(part.key, []).append((site, part))

    @property
    def sites(self) -> list[Site]:
        """The sites."""
        return self.holder.sites

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks: site name -> bool."""
        return self.holder.keep

    @property
    def overlap(self) -> float:
        """Units kept at first and now, over those kept at either time."""
        both = sum(int((self.first[n].to(k.device) & k).sum()) for n, k in self.keep.items())
        either = sum(int((self.first[n].to(k.device) | k).sum()) for n, k in self.keep.items())
        return both / either if either else 1.0

    def parameters(self) -> list[nn.Parameter]:
        """The scores."""
        return [score for site in self.scores.values() for score in site.values()]

    def start(self, loop: Loop) -> None:
        """Put the dense weights aside and show what the masks leave. Raises SettingError for frozen weights."""
        for site in self.sites:
            for key in self.scores[site.name]:
                part = next(part for part in site.parts if part.key == key)
                if part.name in loop.tensors and not loop.tensors[part.name].requires_grad:
                    raise SettingError(
                        f"scores of {site.name} were to be trained by its gradient",
                        f"{part.name} has requires_grad=False, and gets none",
                        "Set it to True: weights that the optimizer does not have stay as they are.",
                    )
        if not sparsity_of(self.keep):
            loop.log("sparsity", 0.0)
        self.holder.start(loop)

    def learn(self, loop: Loop) -> None:
        """Give every score its gradient, from that of the weights seen: to be called while that is whole.

        Raises EvidenceError, naming the site, where it is not finite.
        """
        named, dense = loop.tensors, self.holder.values()
        for site in self.sites:
            for part in site.parts:
                score = self.scores[site.name].get(part.key)
                if score is None:
                    continue
                whole = named[part.name].grad
                if whole is None:  # nothing of this pass went through it
                    score.grad = torch.zeros_like(score)
                    continue
                gradient = part.view(whole).detach().to(score.dtype)
                if not bool(torch.isfinite(gradient).all()):
                    raise EvidenceError(
                        f"scores of {site.name} were to be trained, after {loop.step} steps",
                        "its gradient holds NaN or infinity",
                        "Lower the learning rate, or look for NaN in the data.",
                    )
                others = self._share(part, gradient, without=site)
                share = others * self._share_of(site, part, gradient)
                weight = part.view(dense[part.name]).to(score.dtype)
                slope = others * self.slope.of(weight, share, gradient)
                score.grad = self.read.back(score.detach(), slope)

    def choose(self, loop: Loop) -> None:
        """Let the masks follow the scores."""
        held = {name: {k: s.detach() for k, s in scores.items()} for name, scores in self.scores.items()}
        ranks = {site.name: self.read.ranks(site, held[site.name]) for site in self.sites}
        before = self.keep
        after = self.transition.step(self.sites, ranks, before, loop.progress)
        self.holder.change(loop, after)
        units = sum(site.units for site in self.sites)
        came = sum(int((k & ~before[name].to(k.device)).sum()) for name, k in after.items())
        loop.log("sparsity", sparsity_of(self.keep))
        loop.log("swapped", came / units if units else 0.0)
        loop.log("overlap", self.overlap)

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.holder.masks()

    def state(self) -> dict[str, Any]:
        """The masks, the dense weights, the scores, and the masks there were at first."""
        scores = {name: {k: s.detach() for k, s in scores.items()} for name, scores in self.scores.items()}
        return {**self.holder.state(), "scores": scores, "first": dict(self.first)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """All of it as it was."""
        self.holder.resume(loop, state)
        self.first = dict(state["first"])
        with torch.no_grad():
            for name, scores in self.scores.items():
                for key, score in scores.items():
                    score.copy_(state["scores"][name][key])

    def _share_of(self, site: Site, part: Part, like: Tensor) -> Tensor:
        return part.expand(self.keep[site.name].to(like.device, like.dtype), nobody=1.0)

    def _share(self, part: Part, like: Tensor, without: Site) -> Tensor:
        """What the other sites on the same tensor leave of it."""
        found = like.new_ones(())
        for site, mine in self._owners[part.key]:
            if site is not without:
                found = found * self._share_of(site, mine, like)
        return found


def _forget(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = None  # nothing else clears it: the optimizer does not know these


def _copied(score: Tensor) -> nn.Parameter:
    # float32: in half precision a score of 1 would not notice what it learns
    return nn.Parameter(score.detach().clone().to(torch.float32))


def _fitting(site: Site, scores: Mapping[str, Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    if site.name not in scores or not scores[site.name]:
        raise SiteError(f"scores of {site.name} were needed", "there are none", did_you_mean(site.name, scores))
    shapes = {part.key: tuple(part.shape) for part in site.parts}
    for key, score in scores[site.name].items():
        if key not in shapes:
            raise SiteError(f"scores of {key} were given", f"{site.name} has no such part", did_you_mean(key, shapes))
        if tuple(score.shape) != shapes[key]:
            raise SiteError(
                f"scores of {tuple(score.shape)} for {key} were given",
                f"it is {shapes[key]}, outputs first",
                "Give one number per element.",
            )
    return scores[site.name]


class TrainedMask(Rule):
    """Search for a mask in weights that never change: the loop's optimizer trains the scores, and nothing else.

        rule = TrainedMask(sites, scores, keep)
        fit(model, task, steps, [rule], optimizer=torch.optim.SGD(rule.parameters(), 0.1, momentum=0.9))

    Weights, biases and norms keep their values to the bit; the running statistics of batch norms move on, as they must:
    a sparse layer's outputs have others. Raises SettingError for an optimizer that lacks a score or has a weight.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        scores: Mapping[str, Mapping[str, Tensor]],
        keep: Mapping[str, Tensor],
        *,
        slope: Slope | None = None,
        read: Read | None = None,
        transition: Transition | None = None,
    ) -> None:
        self.scored = Scored(
            sites,
            scores,
            keep,
            slope=Direct() if slope is None else slope,
            read=Plain() if read is None else read,
            transition=Swaps() if transition is None else transition,
            flow=StraightThrough(),
        )

    @property
    def keep(self) -> dict[str, Tensor]:
        """The masks: site name -> bool."""
        return self.scored.keep

    def masks(self) -> list[Mask]:
        """The masks as edits."""
        return self.scored.masks()

    def values(self) -> Tensors:
        """The dense weights, by tensor name."""
        return self.scored.holder.values()

    def parameters(self) -> list[nn.Parameter]:
        """The scores: what the optimizer is to be built from."""
        return self.scored.parameters()

    def start(self, loop: Loop) -> None:
        """Check who trains what; then show what the masks leave."""
        held = {id(p) for group in loop.optimizer.param_groups for p in group["params"]}
        missing = [p for p in self.parameters() if id(p) not in held]
        trained = [name for name, value in loop.tensors.items() if id(value) in held]
        if missing or trained:
            raise SettingError(
                "a mask was to be searched for in weights that stay as they are",
                f"the optimizer would move {trained[0]}" if trained else "the optimizer does not have the scores",
                "Build the optimizer from the rule's parameters() alone.",
            )
        self.scored.start(loop)
        _forget(loop.model)  # what training left there would be added to the first gradient

    def before_step(self, loop: Loop) -> None:
        """The scores learn from the gradient of the weights seen, which is then let go."""
        self.scored.learn(loop)
        _forget(loop.model)

    def after_step(self, loop: Loop) -> None:
        """The masks follow."""
        self.scored.choose(loop)

    def finish(self, loop: Loop) -> None:
        """The model keeps what the masks leave."""
        self.scored.holder.finish(loop)

    def state(self) -> dict[str, Any]:
        """See Scored."""
        return self.scored.state()

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As it was."""
        self.scored.resume(loop, state)
