"""Fine-tune a transformer with a penalty on its attention, then drop the smallest weights at once.

Prasetyo, Yudistira, Widodo. "Sparse then Prune: Toward Efficient Vision Transformers." 2023. arXiv:2307.11988.
With A = softmax(Q K^T / sqrt(d)) of shape [batch, heads, tokens, tokens]:

    loss = cross-entropy + lambda R(A)        R(A) = mean over all entries of log(1 + A^2)

then one threshold on |w| over the whole network, with no retraining, at ratios of 0.1 to 0.9.

What it does not do: make attention sparse. The rows of A sum to 1, and the sum of log(1 + a^2) over a row is smallest
where the row is uniform (about 1 / T of T tokens) and largest where one entry is 1 (log 2). To lower it is to FLATTEN
attention, and the notes of a run say by how much. Nor does it do much: R is at most log(2) / T, so that with 50 tokens
and lambda = 0.01 the penalty is less than 1.4e-4 beside a cross-entropy of a tenth or more.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, log
from statistics import fmean
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from secateur.axes import Cosine, Global, PerMatrix
from secateur.axes.rewinding import magnitudes
from secateur.axes.rules import LearningRate, Validate
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Mask, apply_
from secateur.errors import ModelError, SettingError
from secateur.evidence import calm
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Part, Site
from secateur.task import Batch, Task
from secateur.train import Loop, Rule, Snapshot, fit
from secateur.walk import stacks


def log_penalty(attention: Tensor) -> Tensor:
    """R(A): the mean of log(1 + A^2) over all entries, in float32."""
    return torch.log1p(attention.float().square()).mean()


def entropy(attention: Tensor) -> Tensor:
    """The mean over rows of -sum_j a_j log a_j, in nats: 0 for one-hot rows, log(tokens) for uniform ones."""
    return torch.special.entr(attention.float()).sum(-1).mean()


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `F.scaled_dot_product_attention` gives, and the probabilities it hides: [..., heads, tokens, keys].

    Costs memory for every pair of tokens. A row that may look at nothing gets zeros.
    """
    if enable_gqa:
        groups = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
    scores = (query @ key.transpose(-2, -1)) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    blind = (scores == -torch.inf).all(-1, keepdim=True)  # a softmax over nothing is NaN, and so are its gradients
    found = scores.masked_fill(blind, 0).float().softmax(-1).masked_fill(blind, 0).to(value.dtype)
    kept = F.dropout(found, dropout_p) if dropout_p else found
    return kept @ value, found


class AttentionTap(TorchFunctionMode):
    """Within this, attention probabilities are seen: one tensor per attention, in the order they are made.

    Fused kernels never form them, so they are computed by the formula. Seen are `scaled_dot_product_attention`,
    `nn.MultiheadAttention`, and a softmax over the last axis of [batch, heads, tokens, keys] or [batch, tokens,
    tokens] in a model's own code, in each case before dropout; only that of nn.MultiheadAttention is seen after it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Do what was asked, and keep the probabilities."""
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            out, found = attend(*args, **kwargs)
            self.seen.append(found)
            return out
        if name == "multi_head_attention_forward":
            return self._many_heads(func, args, kwargs)
        out = func(*args, **kwargs)
        if name == "softmax" and isinstance(out, Tensor):
            axis = kwargs.get("dim", args[1] if len(args) > 1 else None)
            square = out.dim() == 3 and out.shape[-1] == out.shape[-2]
            if axis in (-1, out.dim() - 1) and (out.dim() > 3 or square):
                self.seen.append(out)
        return out

    def _many_heads(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = inspect.signature(F.multi_head_attention_forward).bind(*args, **kwargs)
        given.apply_defaults()
        asked, averaged = given.arguments["need_weights"], given.arguments["average_attn_weights"]
        given.arguments.update(need_weights=True, average_attn_weights=False)
        out, found = func(*given.args, **given.kwargs)
        self.seen.append(found)
        if not asked:
            return out, None
        return out, found.mean(-3) if averaged else found


def attention_of(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The attention probabilities of each layer for a batch, in eval mode and without gradients.

    Raises ModelError for a model that has no attention.
    """
    with calm(model), torch.no_grad(), AttentionTap() as tap:
        batch.to(next(model.parameters()).device).through(model)
    return _some(tap.seen, model)


def _some(seen: list[Tensor], model: nn.Module) -> list[Tensor]:
    if not seen:
        raise ModelError(
            f"the attention of {type(model).__name__} was to be looked at",
            "no softmax attention was found in its forward pass",
            "Give a transformer whose attention goes through scaled_dot_product_attention, nn.MultiheadAttention or "
            "a softmax over the last axis; flex attention and compiled kernels hide theirs.",
        )
    return seen


@runtime_checkable
class Layers(Protocol):
    """The layers whose attention is penalised."""

    def pick(self, seen: Sequence[Tensor]) -> Sequence[Tensor]:
        """Those of all, in the order of the forward pass."""
        ...


@dataclass(frozen=True)
class Last:
    """The last alone: what the authors' code does, which overwrites the value in its loop over the blocks."""

    def pick(self, seen: Sequence[Tensor]) -> Sequence[Tensor]:
        """See Layers."""
        return seen[-1:]


@dataclass(frozen=True)
class All:
    """The mean over all, as the paper's text can be read."""

    def pick(self, seen: Sequence[Tensor]) -> Sequence[Tensor]:
        """See Layers."""
        return seen


class AttentionPenalty(Rule):
    """Adds strength * R(A) to the loss; the model is tapped while it trains, and never in eval mode.

    Raises ModelError at the first loss of a model without attention.
    """

    def __init__(self, strength: float = 0.01, layers: Layers | None = None) -> None:
        if not isfinite(strength):
            raise SettingError(
                f"an attention penalty of {strength} was asked for", "it is not finite", "Give 0.01, say."
            )
        self.strength = strength
        self.layers: Layers = Last() if layers is None else layers
        self._seen: list[Tensor] = []
        self._open: list[AttentionTap] = []
        self._hooks: list[RemovableHandle] = []

    def start(self, loop: Loop) -> None:
        """Look into the model's forward passes from now on."""
        self._hooks = [
            loop.model.register_forward_pre_hook(self._enter),
            loop.model.register_forward_hook(self._leave, always_call=True),
        ]

    def _enter(self, module: nn.Module, given: Any) -> None:
        self._seen = []
        if module.training and torch.is_grad_enabled():
            self._open.append(AttentionTap())
            self._open[-1].__enter__()  # type: ignore[no-untyped-call]  # a mode of torch's, which leaves it untyped

    def _leave(self, module: nn.Module, given: Any, out: Any) -> None:
        if self._open:
            tap = self._open.pop()
            tap.__exit__(None, None, None)  # type: ignore[no-untyped-call]  # the same
            self._seen = list(self.layers.pick(tap.seen))

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """Loss + strength * the mean of R over the layers."""
        terms = [log_penalty(each) for each in _some(self._seen, loop.model)]
        self._seen = []
        penalty = torch.stack(terms).mean()
        loop.log("attention penalty", float(penalty.detach()))
        return value + self.strength * penalty.to(value.device)

    def finish(self, loop: Loop) -> None:
        """Look no more."""
        self.unhook()

    def unhook(self) -> None:
        """Take the hooks off the model, as must be done when training ends early too."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._seen = [], []


class Best(Rule):
    """Ends with the weights of the lowest validation loss, the first of equals; goes after a `Validate`."""

    def __init__(self) -> None:
        self.loss_, self.step, self._model = float("inf"), 0, dict[str, Tensor]()

    def after_step(self, loop: Loop) -> None:
        """Put the weights aside where they are the best so far."""
        points = loop.history.curves.get("validation loss", [])
        if points and points[-1][0] == loop.step and points[-1][1] < self.loss_:
            self.loss_, self.step = points[-1][1], loop.step
            self._model = dict(Snapshot.of(loop.model).model)

    def finish(self, loop: Loop) -> None:
        """Put them back."""
        if self._model:
            Snapshot(self._model).restore_(loop.model)

    def state(self) -> dict[str, Any]:
        """The best weights so far."""
        return {"loss": self.loss_, "step": self.step, "model": dict(self._model)}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """As they were."""
        self.loss_, self.step, self._model = state["loss"], state["step"], dict(state["model"])


def smallest(model: nn.Module, sites: Sequence[Site], sparsity: float) -> list[Mask]:
    """Masks of the smallest weights of all sites together, exactly as many as asked."""
    scores = magnitudes(model, sites)
    counts = Global().spread(sites, Budget(sparsity), scores)
    return [Mask(site, PerMatrix().select(scores[site.name], counts[site.name])) for site in sites]


def sweep(
    model: nn.Module, task: Task, sites: Sequence[Site], sparsities: Sequence[float], split: str = "val"
) -> dict[float, float]:
    """The task's metric at each of some sparsities, each pruned from the weights as they are; the model is left alone.

    Raises SettingError for a sparsity outside [0, 1).
    """
    for sparsity in sparsities:
        check_sparsity(sparsity)
    whole, found = Snapshot.of(model), {}
    try:
        for sparsity in sparsities:
            apply_(model, smallest(model, sites, sparsity))
            found[sparsity] = task.measure(model, split)[task.metric]
            whole.restore_(model)
    finally:
        whole.restore_(model)
    return found


@dataclass(frozen=True, kw_only=True)
class SparseThenPrune(Method):
    """Fine-tune with a penalty on attention, then drop the smallest weights of the whole network at once."""

    sparsity: float = 0.5  # of all prunable weights together
    strength: float = 0.01  # lambda, of the penalty on attention; 0 is plain fine-tuning
    layers: Layers = Last()  # whose attention is penalised
    steps: int = 1000  # optimizer steps of fine-tuning
    warmup: float = 0.1  # fraction of them in which the learning rate rises, before its cosine
    validate: int = 100  # steps between validations; the weights that do best are pruned. 0: the last ones are
    sweep: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # sparsities tried on held-out data
    norms: bool = False  # norms in the blocks compete, too, as in the authors' code
    include: tuple[str, ...] = (r"re:weight$",)  # what to prune, by name, class or role; () is matrices in the blocks
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        11,
        "Sparse then Prune: Toward Efficient Vision Transformers",
        arxiv="2307.11988",
        year=2023,
        when="after training",
        needs=("labels", "training"),
        families=("decoder", "encoder", "vision transformer", "moe"),
        axes="rule criterion allocation",
        criterion=("magnitude",),
        tasks=("classification",),
        stage=("sparsity regularisation",),
        schedule=("one-shot",),
        allocation=("score-driven",),
        retraining=("none",),  # what is trained comes before the cut
        reports="with the penalty ViT-B/16 keeps 0.3 to 1.8 points more accuracy, averaged over pruning ratios of 0.1 "
        "to 0.9, on CIFAR-10, CIFAR-100 and ImageNet-100",
        checked="tests/methods/test_sparse_then_prune.py::test_the_penalty_flattens_attention",
        differs=(
            "the best weights are those of the lowest validation loss, not of the lowest training loss",
            "norms are left dense unless asked for: their weights are near 1, and small ones are whole channels",
            "the heads of language models are left dense, being their embeddings as a rule",
            "each sparsity of a sweep is pruned from the whole model, where the authors' code prunes one in place",
        ),
    )
    tiny: ClassVar = {"steps": 10, "validate": 5, "sweep": (0.3, 0.6)}

    def check(self) -> None:
        """Raise SettingError for settings that cannot work."""
        super().check()
        AttentionPenalty(self.strength, self.layers)
        LearningRate(Cosine(), self.warmup)
        for sparsity in self.sweep:
            check_sparsity(sparsity, "sweep's sparsity")
        if self.steps < 1 or self.validate < 0:
            raise SettingError(
                f"{self.steps} steps with a validation every {self.validate} were asked for",
                "it takes one step at least, and the other is no negative number",
                "Give steps=1000 and validate=100, say.",
            )

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """Fine-tune, go back to the best weights, prune them once."""
        self.check()
        before = _entropy(model, task.example)  # raises for a model without attention, before it is trained
        sites = self.sites(model)
        rules: list[Rule] = [LearningRate(Cosine(), self.warmup)]
        penalty = AttentionPenalty(self.strength, self.layers)
        if self.strength:
            rules.append(penalty)
        if self.validate:
            rules += [Validate(self.validate), Best()]
        try:
            history = fit(model, task, self.steps, rules)
        finally:
            penalty.unhook()
        after, step = _entropy(model, task.example), len(history.losses)
        history.log("attention entropy", 0, before)
        history.log("attention entropy", step, after)
        tokens = attention_of(model, task.example)[-1].shape[-1]
        notes = [
            f"attention has an entropy of {after:.4f} nats after and {before:.4f} before training, of {log(tokens):.4f}"
            + (": the penalty pulls towards flat attention, not towards sparse" if self.strength > 0 else "")
        ]
        if self.sweep:
            found = sweep(model, task, sites, self.sweep)
            notes.append(
                f"{task.metric} on held-out data is {fmean(found.values()):.4g} on average at sparsities of "
                f"{min(found):g} to {max(found):g}: " + ", ".join(f"{v:.4g}" for v in found.values())
            )
        masks = smallest(model, sites, self.sparsity)
        edits = apply_(model, masks)
        shares = {mask.site.name: 1 - mask.kept / mask.site.units for mask in masks}
        least, most = min(shares, key=lambda n: shares[n]), max(shares, key=lambda n: shares[n])
        notes.append(f"one threshold took {shares[least]:.2%} of {least} and {shares[most]:.2%} of {most}")
        return Outcome(model, edits, history, notes=notes + history.notes)

    def sites(self, model: nn.Module) -> list[Site]:
        """What competes: matrices and kernels, and the norms of the blocks where asked for."""
        found = weights(model, self.include, self.exclude)
        return [*found, *_norms(model)] if self.norms else found


def _norms(model: nn.Module) -> list[Site]:
    """A site for the weight of every norm inside a block."""
    inside = tuple(f"{block}." for stack in stacks(model) for block in stack)
    found = []
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" not in type(module).__name__.lower() or not isinstance(weight, Tensor) or weight.dim() != 1:
            continue
        if name.startswith(inside):
            shape, where = tuple(weight.shape), f"{name}.weight"
            found.append(Site(where, "weight", shape, (Part(where, shape, itemsize=weight.element_size()),)))
    return found


def _entropy(model: nn.Module, batch: Batch) -> float:
    """The mean entropy of attention over layers, heads and tokens, in nats."""
    return fmean(float(entropy(each)) for each in attention_of(model, batch))
