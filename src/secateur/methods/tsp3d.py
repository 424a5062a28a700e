"""Most of a room has nothing to do with a sentence about it: drop those voxels on the way, and put back what is missed.

Guo, Xu, Wang, Feng, Zhou, Lu. "Text-guided Sparse Voxel Pruning for Efficient 3D Visual Grounding." 2025.
arXiv:2502.10392. At levels 2 and 1 voxels and words read each other, and a linear layer says of
each voxel whether to keep it (text-guided pruning, TGP); of the voxels kept, children are made,

    U' = U where p(U) > threshold;   in training: the children with the largest interpolated p

and at the finest level a second predictor adds what the backbone saw there and pruning took, where it belongs to the
target (completion, CBA): target and not there already. Nothing is taken from the weights: what goes are places, chosen
anew for each room and sentence.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from secateur.axes.clipping import Clip
from secateur.axes.rules import LearningRate
from secateur.axes.schedules import Steps
from secateur.edit import Replace, apply_, replacement
from secateur.errors import ModelError, SettingError, TaskError
from secateur.method import Card, Method
from secateur.outcome import Outcome
from secateur.task import Batch, Task, generator, modes_of, restore_modes_
from secateur.train import Loop, Rule, fit, seeded
from secateur.voxels.fusion import BiEncoder, Words
from secateur.voxels.matching import MENTIONED, TARGET, assigned, focal, near
from secateur.voxels.sparse import (
    Voxels,
    best_of_each,
    children,
    interpolated,
    joined,
    looked_up,
    per_scene,
    present,
)
from secateur.voxels.walk import COARSEST, FusedOnce, Walks

MIDDLE, FINEST = 1, 0
"""Levels: pruning happens on the way to each of them."""

# Which voxels to keep


class Selection(Protocol):
    """Which voxels go on, in training and in use."""

    def priority(self, chance: Tensor) -> Tensor:
        """In training: an order among the children, from how likely each is to be kept [n] -> [n]."""
        ...

    def keep(self, level: int, chance: Tensor, scene: Tensor, scenes: int) -> Tensor:
        """In use: which voxels of level 2 or 1 get children, one of each scene at least: [n] -> bool [n]."""
        ...


@dataclass(frozen=True)
class ByText:
    """Voxels that are more likely than a threshold to be of use to the sentence; where none is, the likeliest."""

    coarse: float = 0.7  # threshold at level 2
    fine: float = 0.3  # at level 1

    def __post_init__(self) -> None:
        _probabilities("thresholds", self.coarse, self.fine)

    def priority(self, chance: Tensor) -> Tensor:
        """The chance itself."""
        return chance

    def keep(self, level: int, chance: Tensor, scene: Tensor, scenes: int) -> Tensor:
        """See Selection."""
        above = chance > (self.coarse if level == COARSEST else self.fine)
        return above | best_of_each(chance, scene, 1, scenes)


@dataclass(frozen=True)
class ByChance:
    """As many voxels at random, whatever the sentence: what text guidance is to be better than."""

    coarse: float = 0.5  # share of a scene's voxels that stay at level 2
    fine: float = 0.5  # at level 1
    seed: int = 0  # what they are drawn from in use, the same for every batch

    def __post_init__(self) -> None:
        _probabilities("shares", self.coarse, self.fine)

    def priority(self, chance: Tensor) -> Tensor:
        """Random numbers, from torch's own generator, which training seeds."""
        return torch.rand_like(chance)

    def keep(self, level: int, chance: Tensor, scene: Tensor, scenes: int) -> Tensor:
        """See Selection."""
        drawn = torch.rand(len(chance), generator=torch.Generator().manual_seed(self.seed)).to(chance.device)
        share = self.coarse if level == COARSEST else self.fine
        most = (share * per_scene(scene, scenes)).round().clamp(min=1)
        return best_of_each(drawn, scene, most, scenes)


def _probabilities(what: str, coarse: float, fine: float) -> None:
    if not 0 <= coarse < 1 or not 0 <= fine < 1:
        raise SettingError(
            f"{what} of {coarse:g} and {fine:g} were asked for", "each is in [0, 1)", "Give 0.7 and 0.3, say."
        )


@dataclass(frozen=True)
class Completion:
    """Voxels that the backbone saw and pruning took come back where they are likely to be of the target."""

    threshold: float = 0.15  # how likely
    sample: int = 2400  # of a scene's candidates in training, drawn at random; in use all are looked at

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1 or self.sample < 1:
            raise SettingError(
                f"completion above {self.threshold:g} of {self.sample} candidates was asked for",
                "a threshold is in [0, 1), and one candidate is the least",
                "Give Completion(0.15, 2400), say.",
            )


# What the predictors learn


def keep_targets(x: Voxels, size: float, target: Tensor, side: float) -> Tensor:
    """Which voxels of a level ought to stay: those in a cube of `side` metres around an object's centre, bool [n].

    At level 2 around every object (the scene), at level 1 around the target and what the sentence mentions. `target`
    is [m, 8]: scene, box, role. `side` is for the level that is asked.
    """
    return near(x.centres(size), x.scene, target[:, 1:7], target[:, 0].long(), side)


def keep_loss(logits: Tensor, wanted: Tensor, scene: Tensor, scenes: int) -> Tensor:
    """Focal loss of keep logits, of each scene over its voxels to keep, or all where it has none; the scenes' mean."""
    lost = logits.new_zeros(scenes).index_add(0, scene, focal(logits, wanted))
    positive = logits.new_zeros(scenes).index_add(0, scene, wanted.to(logits.dtype))
    every = per_scene(scene, scenes).to(logits.dtype)
    return (lost / torch.where(positive > 0, positive, every).clamp(min=1)).mean()


def completion_loss(logits: Tensor, x: Voxels, size: float, target: Tensor, nearest: int) -> Tensor:
    """Focal loss of target logits over how many voxels answer for the target: the `nearest` to it, as for the class."""
    wanted = target[target[:, 7] == TARGET]
    mine = assigned(x.centres(size), x.scene, wanted[:, 1:7], wanted[:, 0].long(), nearest) >= 0
    return focal(logits, mine).sum() / mine.sum().clamp(min=1)


def completing(x: Voxels, candidates: Voxels, chance: Tensor, threshold: float) -> Tensor:
    """Which candidates are to come back: likely to be of the target, and not there already: bool [n]."""
    return (chance > threshold) & ~present(x, candidates.keys)


# The guide


@dataclass(frozen=True, eq=False)
class Seen:
    """What a predictor said of the voxels that arrived at a level."""

    level: int
    voxels: Voxels
    logits: Tensor  # [n]: to be kept at levels 2 and 1, of the target at level 0


@replacement
class TextGuided(nn.Module):
    """The guide of a pruned network: see secateur.voxels.walk.Guide. In training children are chosen after they were
    made, by rank; in use voxels are dropped before they have any, by threshold, and nothing is drawn at random."""

    def __init__(
        self,
        encoder: Mapping[str, Any] | BiEncoder,
        selection: Selection | str,
        completion: Completion | str | None,
        samples: tuple[int, int] = (320, 3200),
        most: tuple[int, int] = (4000, 4000),
        fewest: int = 1200,
    ) -> None:
        super().__init__()
        first = encoder if isinstance(encoder, BiEncoder) else None
        asked = first.settings() if first is not None else dict(encoder)  # type: ignore[arg-type]
        self.selection: Selection = _part(selection) if isinstance(selection, str) else selection
        self.completion: Completion | None = _part(completion) if isinstance(completion, str) else completion
        self.samples, self.most, self.fewest = tuple(samples), tuple(most), fewest
        places = ("coarsest", "middle", *(() if self.completion is None else ("completion",)))
        self.encoders = nn.ModuleDict({place: BiEncoder(**asked) for place in places})
        if first is not None:  # one encoder is built, and copied: each goes on with weights of its own
            for copy in self.encoders.values():
                copy.load_state_dict(first.state_dict())
        self.predictors = nn.ModuleDict({place: nn.Linear(asked["width"], 1) for place in places})
        self.asked = asked
        self.seen: list[Seen] = []  # of the last pass
        self.kept: list[tuple[int, int]] = []  # of the last pass in use: voxels with children, of how many

    def settings(self) -> dict[str, Any]:
        """What builds it again."""
        from secateur.axes import text_of

        return {
            "encoder": self.asked,
            "selection": text_of(self.selection),
            "completion": None if self.completion is None else text_of(self.completion),
            "samples": list(self.samples),
            "most": list(self.most),
            "fewest": self.fewest,
        }

    def __getstate__(self) -> dict[str, Any]:
        """Without what was seen, which hangs on a graph and cannot be copied."""
        return {**self.__dict__, "seen": [], "kept": []}

    def read(self, level: int, x: Voxels, words: Words) -> tuple[Voxels, Words]:
        """Voxels and words exchange what they know, and each voxel gets its keep logit."""
        if level == COARSEST:
            self.seen, self.kept = [], []
        place = "coarsest" if level == COARSEST else "middle"
        if self.training:
            x = sampled(x, self.samples[COARSEST - level])
        x, words = self.encoders[place](x, words)
        self.seen.append(Seen(level, x, self.predictors[place](x.features)[:, 0]))
        return x, words

    def thinned(self, level: int, x: Voxels) -> Voxels:
        """In use, those that are likely to be wanted."""
        if self.training:
            return x
        keep = self.selection.keep(level, self._chance(x).features[:, 0], x.scene, x.scenes)
        self.kept.append((int(keep.sum()), len(x)))
        return x.kept(keep)

    def chosen(self, level: int, x: Voxels) -> Voxels:
        """In training, the children that stand highest by the chance of the voxels around them, of each scene."""
        if not self.training:
            return x
        chance = interpolated(self._chance(None), x.keys)[:, 0].detach()
        most = self.most[MIDDLE - level]
        if level == FINEST:  # another number at every step, since in use nobody knows how many pass a threshold
            most = int(torch.randint(min(self.fewest, most - 1), most, ()))
        return x.kept(best_of_each(self.selection.priority(chance), x.scene, most, x.scenes))

    def _chance(self, x: Voxels | None) -> Voxels:
        """How likely each voxel of the last level is to be kept, as a feature [n, 1]."""
        last = self.seen[-1]
        return (last.voxels if x is None else x).at(last.logits.sigmoid()[:, None])

    def completed(self, x: Voxels, made: Voxels, seen: Voxels, words: Words) -> Voxels:
        """With voxels that the backbone saw, where the second predictor says that they are of the target."""
        if self.completion is None:
            return x
        candidates = sampled(seen, self.completion.sample) if self.training else seen
        candidates, _ = self.encoders["completion"](candidates, words)
        logits = self.predictors["completion"](candidates.features)[:, 0]
        self.seen.append(Seen(FINEST, candidates, logits))
        back = candidates.kept(completing(x, candidates, logits.sigmoid(), self.completion.threshold))
        if not len(back):
            return x
        return joined(x, back.at(back.features + looked_up(made, back.keys)))


def _part(text: str) -> Any:
    """A selection or completion by its text, as a saved edit has it."""
    from secateur.axes import part_of, word_of

    return part_of(text, {word_of(kind): kind for kind in (ByText, ByChance, Completion)})


def sampled(x: Voxels, most: int) -> Voxels:
    """At most so many voxels of each scene, drawn at random from torch's own generator."""
    if int(per_scene(x.scene, x.scenes).max()) <= most:
        return x
    return x.kept(best_of_each(torch.rand(len(x), device=x.keys.device), x.scene, most, x.scenes))


class Predict(Rule):
    """Adds to the task's loss what the predictors get wrong: a third of the keep losses, and the completion's."""

    def __init__(self, guide: TextGuided, size: float, sides: tuple[float, float], nearest: int) -> None:
        self.guide, self.size, self.sides, self.nearest = guide, size, sides, nearest

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """See Rule. Raises TaskError for a task whose batches do not say where objects are."""
        assert loop.batch is not None
        target = checked_target(loop.batch)
        for seen in self.guide.seen:
            x = seen.voxels
            if seen.level == FINEST:
                extra = completion_loss(seen.logits, x, self.size, target, self.nearest)
            else:
                mine = target if seen.level == COARSEST else target[target[:, 7] <= MENTIONED]
                wanted = keep_targets(x, self.size, mine, self.sides[COARSEST - seen.level])
                extra = keep_loss(seen.logits, wanted, x.scene, x.scenes) / 3
            loop.log("completion loss" if seen.level == FINEST else f"keep loss {seen.level}", float(extra.detach()))
            value = value + extra
        return value


def checked_target(batch: Batch) -> Tensor:
    """The objects of a batch [m, 8]. Raises TaskError where it does not say where they are."""
    target = batch.target
    if not isinstance(target, Tensor) or target.dim() != 2 or target.shape[1] != 8:
        found = f"are {list(target.shape)}" if isinstance(target, Tensor) else f"are a {type(target).__name__}"
        raise TaskError(
            "keep predictors were to be trained",
            f"the labels {found}, and scene, box and role [m, 8] were wanted",
            "Give a task of grounding, such as rooms.",
        )
    return target


@dataclass(frozen=True, kw_only=True)
class TSP3D(Method):
    """Train a network that finds objects by sentences to drop voxels by the text, and then to do so in use."""

    steps: int = 1000  # of training, all weights together
    selection: Selection = ByText()  # which voxels stay; ByChance() is the control
    completion: Completion | None = field(default_factory=Completion)  # None: what pruning took stays away
    samples: tuple[int, int] = (320, 3200)  # voxels a scene that read the text at levels 2 and 1 in training
    most: tuple[int, int] = (4000, 4000)  # children a scene that stay in training, at levels 1 and 0
    fewest: int = 1200  # at level 0 their number is drawn from here to the most
    reach: float = 3.25  # side of the cube around an object in which voxels are to stay, in cells of the level
    nearest: int = 32  # voxels that are to be of the target, for completion
    norm: float = 10.0  # gradients are clipped to it
    curve: Steps = Steps()  # the learning rate's way down

    card: ClassVar = Card(
        1,
        "Text-guided Sparse Voxel Pruning for Efficient 3D Visual Grounding",
        arxiv="2502.10392",
        year=2025,
        when="at inference",
        granularity=("voxel",),
        needs=("labels", "training"),
        families=("voxel network",),
        axes="criterion rule growth",
        criterion=("learned",),
        tasks=("point clouds",),
        schedule=("custom",),
        allocation=("score-driven",),
        learns=("masks or gates",),
        start=("initialised",),
        reports="ScanRefer, accuracy at IoU 0.25 and 0.5: 56.45 and 46.71 at 12.43 frames a second; without pruning "
        "44.87 and 29.05 at 14.58, without completion 54.63 and 44.91 at 12.84; 7 % of the voxels are left.",
        checked="tests/methods/test_tsp3d.py::test_a_large_keep_logit_keeps_a_voxel",
        differs=(
            "A logit is that of keeping; in the published code it is that of dropping, since its loss takes class 0 "
            "for the foreground.",
            "What is interpolated at the children is the chance to be kept, not the logit: a place without voxels has "
            "no chance, where a logit of 0 would be one half.",
            "A scene whose voxels all fall below a threshold keeps its best, where the published code stops.",
            "In use nothing is drawn at random: completion looks at all candidates, not at 2,400.",
            "The cube's side is in cells of the level, 3.25 for the published 13 times a quarter, since a smaller "
            "network has other strides.",
            "Sentences are read by an embedding and a GRU that are trained along, where the paper's encoder is frozen.",
        ),
    )
    tiny: ClassVar = {
        "steps": 6,
        "samples": (40, 120),
        "most": (120, 200),
        "fewest": 60,
        "completion": Completion(sample=120),
        "nearest": 8,
    }

    def budget(self) -> None:
        """None: no weight goes, and how many voxels do is up to each sentence."""
        return

    def check(self) -> None:
        """Raise SettingError for counts below one, an empty range and a cube without a side."""
        counts = (*self.samples, *self.most, self.fewest, self.nearest)
        if self.steps < 0 or min(counts) < 1 or len(self.samples) != 2 or len(self.most) != 2:
            raise SettingError(
                f"{self.steps} steps with {self.samples} samples and {self.most} children were asked for",
                "steps are 0 or more, samples and children two numbers, of one at least",
                "Give samples (320, 3200) and most (4000, 4000), say.",
            )
        if self.fewest >= self.most[1]:
            raise SettingError(
                f"between {self.fewest} and {self.most[1]} children at the finest level were asked for",
                "that leaves no number to draw",
                "Give fewest below the second of most.",
            )
        if not self.reach > 0:
            raise SettingError(
                f"a reach of {self.reach:g} cells was asked for", "a cube has a side above 0", "Give 3.25, say."
            )
        Clip(self.norm)

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Put the guide in, train it with the network, and count what it drops."""
        self.check()
        encoder = checked_encoder(model)
        with seeded(model, generator(task, "tsp3d").initial_seed()):
            guide = TextGuided(encoder, self.selection, self.completion, self.samples, self.most, self.fewest)
        guide.to(next(model.parameters()).device).train(model.training)
        assert isinstance(model, Walks)
        sides = tuple(self.reach * model.strides[level] * model.size for level in (COARSEST, MIDDLE))
        edits = apply_(model, [Replace("guide", guide)])
        rules = [LearningRate(self.curve), Predict(guide, model.size, sides, self.nearest), Clip(self.norm)]  # type: ignore[arg-type]
        history = fit(model, task, self.steps, rules)
        return Outcome(model, edits, history, notes=self.notes(model, guide, task))

    def notes(self, model: nn.Module, guide: TextGuided, task: Task) -> list[str]:
        """What is dropped for a few sentences of the task."""
        found = counted(model, guide, list(task.batches("calibration", None)))
        coarse, fine, there, whole = (found[name] for name in ("coarse", "fine", "there", "whole"))
        return [
            f"No weight was removed. Of the voxels of level 2 {coarse:.1%} have children, of level 1 {fine:.1%}; level "
            f"0 has {there:,.0f} voxels a sentence, where without pruning it has {whole:,.0f}: {there / whole:.1%}.",
            "Training kept children by rank, use drops voxels by threshold; quality and time are those of use.",
        ]


def checked_encoder(model: nn.Module) -> BiEncoder:
    """What reads the text at the coarsest level of a network. Raises ModelError where there is none to prune by."""
    guide = getattr(model, "guide", None)
    if not isinstance(model, Walks) or not isinstance(guide, (FusedOnce, TextGuided)):
        raise ModelError(
            f"voxels of {type(model).__name__} were to be pruned by text",
            "it is no network that walks from coarse voxels to fine ones with a guide",
            "Give one for grounding, such as grounder.",
        )
    encoder = guide.encoder if isinstance(guide, FusedOnce) else guide.encoders["coarsest"]
    assert isinstance(encoder, BiEncoder)
    return encoder


def counted(model: nn.Module, guide: TextGuided, batches: list[Batch]) -> dict[str, float]:
    """Shares of voxels that have children in use, and how many are at the finest level, a sentence.

    {"coarse", "fine": shares at levels 2 and 1, "there": voxels at level 0, "whole": as many without pruning}.
    """
    modes, device = modes_of(model), next(model.parameters()).device
    kept, every, there, whole, sentences = [0, 0], [0, 0], 0, 0, 0
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                answer = batch.to(device).through(model)
                for place, (stay, count) in enumerate(guide.kept):
                    kept[place] += stay
                    every[place] += count
                first = guide.seen[0].voxels
                middle = Voxels(children(first), first.features[:0], first.stride // 2, first.scenes)
                whole += len(children(middle))
                there += len(answer.scene)
                sentences += answer.scenes
    finally:
        restore_modes_(model, modes)
    guide.seen, guide.kept = [], []
    shares = {name: kept[i] / max(every[i], 1) for i, name in enumerate(("coarse", "fine"))}
    return {**shares, "there": there / sentences, "whole": whole / sentences}
