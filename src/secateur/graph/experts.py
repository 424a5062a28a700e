"""Experts of a mixture: which tensors are theirs, who routes to them, and what was routed where.

The mixtures of transformers keep a layer's experts in one module, as stacked tensors [experts, ...], beside a router
whose rows [experts, hidden] score them. An expert is its slice of the stacked tensors and its row of the router: the
two live and die together. Nothing is known by the name of an architecture.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.edit import replacement
from secateur.errors import BudgetError, EvidenceError, GraphError
from secateur.evidence import Evidence, calm, check_finite, merged
from secateur.site import Number, Part, Site
from secateur.task import Batch
from secateur.walk import stacks

ROUTED = frozenset({"routed", "together", "logit", "logit_gram"})
"""What `routing` measures of a layer of experts."""


@dataclass(frozen=True, eq=False)
class Mixture:
    """One layer of experts."""

    site: Site  # a unit per expert: its slice of every stacked tensor, and its row of the router
    experts: str  # the module with the stacked tensors, by its dotted path
    router: str  # the module that routes to them
    top_k: int  # experts a token is sent to
    normalised: bool  # whether the gates of those are rescaled to add up to one

    @property
    def own(self) -> Site:
        """The experts' tensors alone, the router left as it is."""
        parts = tuple(part for part in self.site.parts if part.name.startswith(f"{self.experts}."))
        numbers = tuple(number for number in self.site.numbers if number.module == self.experts)
        return replace(self.site, parts=parts, numbers=numbers)

    @property
    def rows(self) -> Part:
        """The router's weight [experts, hidden]."""
        return next(part for part in self.site.parts if part.name == f"{self.router}.weight")


def mixtures(model: nn.Module) -> list[Mixture]:
    """The layers of experts of a model, in order.

    Raises GraphError when there are none, and for one whose router is not understood: a module beside the experts
    with a row of `weight` for each, and a `top_k`.
    """
    blocks = [name for stack in stacks(model) for name in stack]
    found: list[Mixture] = []
    for path, module in model.named_modules():
        count = _stacked(module)
        if count < 2:
            continue
        block = next((b for b in blocks if path.startswith(b + ".")), "")
        found.append(_mixture(model, path, count, block, first=not found))
    if not found:
        raise GraphError(
            f"experts of {type(model).__name__} were asked for",
            "no layer of it holds any: stacked tensors [experts, ...] with a router beside them",
            "Use a mixture of experts, such as Mixtral, Qwen-MoE or OLMoE, or another method.",
        )
    return found


def _stacked(module: nn.Module) -> int:
    """How many experts a module stacks in tensors of three dimensions; 0 for any other."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return 0
    lengths = {len(p) for p in module._parameters.values() if p is not None and p.dim() == 3}
    return lengths.pop() if len(lengths) == 1 else 0


def _mixture(model: nn.Module, path: str, count: int, block: str, first: bool) -> Mixture:
    parent, _, _ = path.rpartition(".")
    beside = {n: m for n, m in model.get_submodule(parent).named_children() if m is not model.get_submodule(path)}
    routers = [n for n, m in beside.items() if _routes(m, count)]
    if len(routers) != 1:
        raise GraphError(
            f"the router of the {count} experts in {path} was asked for",
            f"beside them are {', '.join(beside) or 'no modules'}: {len(routers)} with a weight of {count} rows and a "
            "top_k",
            "Use a mixture of transformers that routes by a softmax: Mixtral, Qwen-MoE or OLMoE.",
        )
    router = f"{parent}.{routers[0]}" if parent else routers[0]
    gate = model.get_submodule(router)
    parts = [part for p in (path, router) for part in _parts(model.get_submodule(p), p, count)]
    numbers = [Number(p, "num_experts", 1.0) for p in (path, router) if _says(model.get_submodule(p), count)]
    # The whole model counts its experts once, for the loss that balances them: by the first layer.
    numbers += [Number("", "num_experts", 1.0)] if first and _says(model, count) else []
    site = Site(path, "expert", (count,), tuple(parts), tuple(numbers), block)
    return Mixture(site, path, router, int(gate.top_k), bool(getattr(gate, "norm_topk_prob", True)))  # type: ignore[arg-type]


def _routes(module: nn.Module, count: int) -> bool:
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    return isinstance(weight, Tensor) and weight.dim() == 2 and len(weight) == count and isinstance(top_k, int)


def _says(module: nn.Module, count: int) -> bool:
    return getattr(module, "num_experts", None) == count


def _parts(module: nn.Module, path: str, count: int) -> list[Part]:
    named = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return [
        Part(
            f"{path}.{name}",
            tuple(value.shape),
            torch.arange(count).reshape(count, *[1] * (value.dim() - 1)),
            itemsize=value.element_size(),
        )
        for name, value in named.items()
        if value.dim() and len(value) == count
    ]


def check_left(mixture: Mixture, left: int) -> None:
    """Raise BudgetError where fewer experts would be left to route to than each token is sent to."""
    if left < mixture.top_k:
        raise BudgetError(
            f"{left} of {mixture.site.units} experts were to be left in {mixture.site.name}",
            f"each token is sent to {mixture.top_k} of them",
            f"Keep {mixture.top_k} or more in each layer.",
        )


@torch.no_grad()
def routing(model: nn.Module, layers: Sequence[Mixture], batches: Iterable[Batch]) -> dict[str, Evidence]:
    """Where the tokens went, in one forward pass: site name -> Evidence over tokens, padding left out.

        routed      tokens sent to each expert                              [experts]
        together    tokens sent to both of two experts                      [experts, experts]
        logit       sum of what the router gave each expert                 [experts]
        logit_gram  sum over tokens of the products of what it gave them    [experts, experts]

    Raises EvidenceError when no token came through, or where logits are not finite.
    """
    found = {mixture.site.name: Evidence() for mixture in layers}
    real: list[Tensor | None] = [None]

    def note(mixture: Mixture) -> Callable[..., None]:
        count = mixture.site.units

        def hook(_: nn.Module, __: Any, out: Any) -> None:
            logits, chosen = _told(out, mixture)
            mask = real[0]
            if mask is not None and mask.numel() == len(logits):
                logits, chosen = logits[mask.reshape(-1)], chosen[mask.reshape(-1)]
            # float64: what all experts of a token have in common is large, and is taken off later
            logits = logits.double()
            went = F.one_hot(chosen, count).sum(1).clamp(max=1).double()  # [tokens, experts]
            sums = {
                "routed": went.sum(0),
                "together": went.T @ went,
                "logit": logits.sum(0),
                "logit_gram": logits.T @ logits,
            }
            name = mixture.site.name
            found[name] = found[name].merge(Evidence(len(logits), {k: v.cpu() for k, v in sums.items()}))

        return hook

    hooks = [model.get_submodule(mixture.router).register_forward_hook(note(mixture)) for mixture in layers]
    try:
        with calm(model):
            for batch in batches:
                mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, Mapping) else None
                real[0] = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
                batch.through(model)
    finally:
        for handle in hooks:
            handle.remove()
    found = merged(found)
    for name, seen in found.items():
        if not seen.count:
            raise EvidenceError(
                f"{name} was to be judged by what is routed in it", "no token came through", "Give calibration data."
            )
    check_finite(found)
    return found


def _told(out: Any, mixture: Mixture) -> tuple[Tensor, Tensor]:
    """What a router said: logits [tokens, experts] and the experts chosen [tokens, top_k]."""
    said = [value for value in out if isinstance(value, Tensor)] if isinstance(out, tuple) else []
    chosen = [v for v in said if not v.is_floating_point() and v.shape[-1] == mixture.top_k]
    logits = [v for v in said if v.is_floating_point() and v.shape[-1] == mixture.site.units]
    if not chosen or not logits:
        raise GraphError(
            f"what {mixture.router} routes was asked for",
            f"it answers with {', '.join(str(list(v.shape)) for v in said) or type(out).__name__}, not with logits "
            f"[tokens, {mixture.site.units}] and choices [tokens, {mixture.top_k}]",
            "Use a mixture of transformers that routes by a softmax: Mixtral, Qwen-MoE or OLMoE.",
        )
    return logits[0].reshape(-1, mixture.site.units), chosen[0].reshape(-1, mixture.top_k)


@replacement
class ClusterRouter(nn.Module):
    """Routes among the experts there were, and sends each token to what they were merged into.

    Softmax and top-k run over all old experts, so that a token's gates are what they were; those of two old experts
    that are one by now add up, as it is computed twice and summed.
    """

    def __init__(
        self, experts: int, hidden: int, top_k: int, normalised: bool, cast: bool = False, dtype: str = "float32"
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden_dim, self.top_k = experts, hidden, top_k
        self.norm_topk_prob, self.cast = normalised, cast
        self.weight = nn.Parameter(torch.zeros(experts, hidden, dtype=getattr(torch, dtype)))
        self.cluster = nn.Buffer(torch.zeros(experts, dtype=torch.int64))  # old expert -> the one it is part of

    def settings(self) -> dict[str, object]:
        """What it is built from."""
        return {
            "experts": self.num_experts,
            "hidden": self.hidden_dim,
            "top_k": self.top_k,
            "normalised": self.norm_topk_prob,
            "cast": self.cast,
            "dtype": str(self.weight.dtype).removeprefix("torch."),
        }

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [tokens, old experts], gates [tokens, top_k] and experts [tokens, top_k]."""
        logits = F.linear(hidden_states.reshape(-1, self.hidden_dim), self.weight)
        gates, chosen = torch.topk(torch.softmax(logits.float(), dim=-1), self.top_k, dim=-1)
        if self.norm_topk_prob:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        return logits, gates.to(logits.dtype) if self.cast else gates, self.cluster[chosen]


@torch.no_grad()
def cluster_router(model: nn.Module, mixture: Mixture, assignment: Tensor) -> ClusterRouter:
    """A router for merged experts that decides as the one there is.

    Raises GraphError when that one does not decide by a softmax over products with its rows.
    """
    old = model.get_submodule(mixture.router)
    rows = mixture.rows.read(dict(model.named_parameters()))
    dtype = str(rows.dtype).removeprefix("torch.")
    probe = torch.randn(16, rows.shape[1], generator=torch.Generator().manual_seed(0)).to(rows)
    said = old(probe)
    _told(said, mixture)  # logits first, gates last where both are as long
    gates = [v for v in said if v.is_floating_point() and v.shape[-1] == mixture.top_k][-1]
    count, hidden = rows.shape
    cast = gates.dtype == rows.dtype != torch.float32
    new = ClusterRouter(count, hidden, mixture.top_k, mixture.normalised, cast, dtype).to(rows.device)
    new.weight.copy_(rows)
    new.weight.requires_grad_(rows.requires_grad)
    new.cluster.copy_(torch.arange(len(rows)))
    _, ours, chosen = new(probe)
    if not torch.equal(chosen, _told(said, mixture)[1]) or not torch.allclose(ours, gates, rtol=1e-3, atol=1e-5):
        raise GraphError(
            f"{mixture.router} was to go on routing among {mixture.site.units} experts",
            f"a {type(old).__name__} does not decide by a softmax over products with its rows alone",
            "Give router=mean-rows or router=reference-rows, which make it smaller instead.",
        )
    new.cluster.copy_(assignment)
    return new
