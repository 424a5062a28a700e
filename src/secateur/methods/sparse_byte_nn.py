"""A kernel that has loaded an input wants several outputs to use it: prune in blocks of output channels, rearranged.

Xu, Liu, Xu, Wang, Li, Yan, Li, Fu, Pan, Chen. "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on
Fine-Grained Group Sparsity." 2023. arXiv:2310.19509. The weight [out, in, k, k] of a layer is cut into blocks of N
consecutive output channels at one input channel,

    B(g, i) = W[gN : (g + 1)N, i],    score = sum |B(g, i)|

and the best (1 - s) of a layer's blocks stay. Before that the whole network is rearranged: channels of every coupled
set are put in the order in which rows that are large at the same inputs share a block, with the norms, biases,
depthwise kernels and following inputs that belong to them, so that the function is the same and blocks stay contiguous.
Depthwise 3x3 kernels may keep four taps of nine, in one of a fixed set of shapes. Then the network is fine-tuned with
its masks held. What is left goes to `GroupCols(N)` and its kernels, by `secateur.accelerate`, where those are faster.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from secateur.axes import Allocation, ChannelBlocks, Magnitude, Pattern, Rank, Uniform
from secateur.axes.orders import AsTrained, Clustered, Order, rearrange_
from secateur.axes.rules import Gradual, Hold, LearningRate
from secateur.axes.schedules import Power, Schedule
from secateur.cut import DEFAULT_EXCLUDE, weights, without_classifier
from secateur.edit import Edit, Mask, apply_
from secateur.errors import BudgetError, GraphError, SettingError
from secateur.evidence import Evidence
from secateur.graph import couple
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, module_of, tensors
from secateur.task import Task
from secateur.train import Rule, fit


def without_stem(sites: Sequence[Site]) -> list[Site]:
    """All but the first layer, where that is a convolution: it reads the picture."""
    return list(sites[1:] if len(sites) > 1 and len(sites[0].shape) > 2 else sites)


def filters(model: nn.Module, site: Site) -> bool:
    """Whether a layer is a depthwise convolution: each channel has a kernel of its own."""
    module = model.get_submodule(module_of(model, site.parts[0].name))
    return isinstance(module, nn.modules.conv._ConvNd) and module.groups == module.in_channels > 1


def blockable(model: nn.Module, site: Site) -> bool:
    """Whether consecutive rows of a layer are outputs that read the same inputs."""
    module = model.get_submodule(module_of(model, site.parts[0].name))
    return not isinstance(module, nn.modules.conv._ConvNd) or (module.groups == 1 and not module.transposed)


def norm_kept(masks: Sequence[Mask], model: nn.Module) -> float:
    """The share of all |W| that masks keep, of the weights as they are."""
    named, kept, total = tensors(model), 0.0, 0.0
    for mask in masks:
        size = mask.site.parts[0].read(named).detach().abs().double().cpu()
        kept, total = kept + float(size[mask.keep].sum()), total + float(size.sum())
    return kept / total if total else 1.0


@dataclass(frozen=True, kw_only=True)
class SparseByteNN(Method):
    """Rearrange the channels, keep the best blocks of N outputs by one input, fine-tune what is left."""

    sparsity: float = 0.3  # fraction of each layer's blocks set to zero
    n: int = 4  # output channels of a block: N; 1, 2, 4, 8 and 16 have kernels
    order: Order = Clustered()  # of the channels of each coupled set; by-norm is that of 1xN; as-trained moves nothing
    depthwise: Pattern | None = None  # of depthwise kernels: taps keeps four of nine; none leaves them dense
    steps: int = 1000  # of training, masks held; 0: none
    until: float = 0.0  # fraction of training over which the sparsity rises, as a cubic; 0: pruned at once, before it
    every: int = 100  # optimizer steps between choices while it rises
    rate_floor: float = 0.0  # learning rate at the end of its cosine, as a fraction of that at the start; 1: constant
    allocation: Allocation = Uniform()
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is all but the first and the last layer
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        19,
        "SparseByteNN: A Novel Mobile Inference Acceleration Framework Based on Fine-Grained Group Sparsity",
        arxiv="2310.19509",
        year=2023,
        granularity=("block",),
        needs=("labels", "training"),
        axes="pattern order allocation rule",
        criterion=("norm",),
        tasks=("classification",),
        schedule=("one-shot", "cubic"),
        reports="MobileNet-v1 on a Snapdragon 855 at 30 %: 1.27 times as fast as dense, 1.29 times as fast as MNN's "
        "sparse engine, 0.224 points of accuracy lost",
        checked="tests/methods/test_sparse_byte_nn.py::test_fewer_rows_a_block_and_rearranged_rows_keep_more",
        differs=(
            "no code of it was published: the blocks are taken to be those of 1xN (arXiv:2105.14713), and the shapes "
            "of depthwise kernels those usual in kernel pattern pruning",
            "the rearrangement stays in the model, where the code of 1xN undoes it and leaves blocks of scattered rows",
            "rows that no block of N is left for are blocks of one and lose their own share",
            "depthwise channels of equal shape are not put side by side: no kernel here asks for that",
        ),
    )
    tiny: ClassVar = {"steps": 0}

    def check(self) -> None:
        """Raise SettingError or PatternError for settings that cannot be."""
        self.ramp().check_sparsity()
        ChannelBlocks(self.n)
        LearningRate(floor=self.rate_floor)
        if self.steps < 0:
            raise SettingError(f"{self.steps} steps were asked for", "a count cannot be negative", "Give 0 or more.")
        if self.until > 0 and not self.steps:
            raise SettingError(
                f"a sparsity that rises until {self.until:g} of training was asked for",
                "there are no steps of training",
                "Give steps above 0, or until=0.",
            )

    def ramp(self) -> Schedule:
        """The sparsity over training."""
        return Schedule(start=0.0, end=self.sparsity, until=self.until, curve=Power(3), every=self.every)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Rearrange, choose blocks, fine-tune with the choice held."""
        self.check()
        sites, kernels, notes = self.sites(model)
        solver = Rank(Magnitude(), ChannelBlocks(self.n))
        keep = self.kept(model, sites)
        before = norm_kept(self.masks(model, sites, solver, keep), model)
        edits: list[Edit] = []
        if not isinstance(self.order, AsTrained):
            moved, remarks = self.rearrange_(model, task, sites, keep)
            edits, notes = [*edits, *moved], notes + remarks
        masks = self.masks(model, sites, solver, keep)
        notes.append(
            f"the blocks of {self.n} that stay at {self.sparsity:g} hold {norm_kept(masks, model):.4g} of the L1 norm "
            f"of their layers, and {before:.4g} before {len(edits)} coupled sets were put in another order"
        )
        taps = [mask for site in kernels for mask in self.taps(model, site)]
        first = apply_(model, taps if self.until else [*masks, *taps])
        history, held = None, [Hold.of(first)] if first else []
        if self.steps:
            rising = Gradual(sites, self.ramp(), None, self.allocation, ChannelBlocks(self.n), Hold(sites))
            rules: list[Rule] = [LearningRate(floor=self.rate_floor), *held, *([rising] if self.until else [])]
            history = fit(model, task, self.steps, rules)
            masks = rising.masks() if self.until else masks
        edits += [*apply_(model, masks), *taps]
        notes += [stored(model, [*masks, *taps]), *(history.notes if history else [])]
        return Outcome(model, edits, history, notes=notes)

    def sites(self, model: nn.Module) -> tuple[list[Site], list[Site], list[str]]:
        """Layers that are cut in blocks, depthwise kernels that are cut in shapes, and remarks on what stays dense."""
        found = weights(model, self.include, self.exclude)
        inner = found if self.include else without_classifier(without_stem(found))
        kernels = [site for site in inner if filters(model, site)]
        sites = [site for site in inner if blockable(model, site)]
        if not sites:
            raise BudgetError(
                f"blocks of {self.n} output channels of {len(found)} layers were to be removed",
                "the first and the last layer, depthwise, grouped and transposed kernels stay dense, with none left",
                "Name what to prune with include, or use another method.",
            )
        taken = {*sites, *(kernels if self.depthwise is not None else [])}
        dense = [site.name for site in found if site not in taken]
        return (
            sites,
            kernels if self.depthwise is not None else [],
            [f"left dense: {', '.join(dense)}"] if dense else [],
        )

    def kept(self, model: nn.Module, sites: Sequence[Site]) -> dict[str, int]:
        """Weights that stay of each layer, in whole blocks. Raises BudgetError where nothing would."""
        named, pattern = tensors(model), ChannelBlocks(self.n)
        size = {site.name: Magnitude().score(site, named, Evidence()) for site in sites}
        counts = self.allocation.spread(sites, Budget(self.sparsity), size)
        found = {site.name: pattern.nearest(site.shape, counts[site.name]) for site in sites}
        if empty := [name for name, count in found.items() if not count]:
            raise BudgetError(
                f"blocks of {self.n} output channels were to be kept at a sparsity of {self.sparsity:g}",
                f"nothing would be left of {', '.join(empty)}, and the network would be cut in two",
                "Ask for less, for smaller blocks, or leave it out with exclude.",
            )
        return found

    def rearrange_(
        self, model: nn.Module, task: Task, sites: Sequence[Site], keep: dict[str, int]
    ) -> tuple[Sequence[Edit], list[str]]:
        """Put channels in the order asked for; a remark, and nothing moved, for a model that cannot be traced."""
        try:
            coupled = couple(model, task.example).of("channel", "stream")
        except GraphError as error:
            return [], [f"nothing was rearranged, since the model could not be traced: {error.found}"]
        return rearrange_(model, task.example, coupled, sites, keep, self.n, self.order)

    def masks(self, model: nn.Module, sites: Sequence[Site], solver: Rank, keep: dict[str, int]) -> list[Mask]:
        """The best blocks of each layer as it lies now."""
        named = tensors(model)
        found = [edit for site in sites for edit in solver.solve(site, named, Evidence(), keep[site.name])]
        return [edit for edit in found if isinstance(edit, Mask)]

    def taps(self, model: nn.Module, site: Site) -> list[Edit]:
        """Depthwise kernels in the pattern asked for."""
        assert self.depthwise is not None, "there are no kernels to cut otherwise"
        keep = site.units - int(self.sparsity * site.units)
        return Rank(Magnitude(), self.depthwise).solve(site, tensors(model), Evidence(), keep)


def stored(model: nn.Module, masks: Sequence[Edit]) -> str:
    """What a packed format has to hold: all of a kept block, the zeros in it too."""
    named, held, units, zeros = tensors(model), 0, 0, 0
    for mask in masks:
        assert isinstance(mask, Mask)
        value = mask.site.parts[0].read(named).detach().cpu()
        held, units = held + mask.kept, units + mask.site.units
        zeros += int((value[mask.keep] == 0).sum())
    total = sum(torch.numel(p) for p in model.parameters())
    return (
        f"{held:,} of {units:,} weights of pruned layers are stored, {zeros:,} zeros in kept blocks among them: a "
        f"stored density of {held / units:.4g}; {units / total:.1%} of all {total:,} parameters are in those layers"
    )
