"""Dims of attention heads as units, the same ones in every head of a block.

    keys     dims i and i + e/2 of a head, which a rotary embedding turns together: q_proj and k_proj make them
    values   one dim of a head: v_proj makes it, o_proj reads it

Stock attention knows one width for queries, keys and values, and turns all its pairs. `RotaryAttention` computes the
same from the widths that its tensors have, and holds which pairs are left.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import skip_init

from secateur.edit import Edit, Replace, apply_, replacement
from secateur.errors import GraphError, ModelError
from secateur.evidence import answered
from secateur.site import Part, Site
from secateur.task import Batch
from secateur.walk import stacks

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@replacement
class RotaryAttention(nn.Module):
    """Causal attention with rotary embeddings whose pairs of queries and keys, and dims of values, may be fewer.

    In the place of one of transformers, with the same names. What it multiplies scores by stays as it was for whole
    heads. Answers no attention weights.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear
    pairs: Tensor

    def __init__(
        self,
        sizes: Sequence[int],
        biases: Sequence[bool],
        pairs: int,
        scaling: float,
        layer: int = 0,
        dropout: float = 0.0,
        dtype: str = "float32",
    ) -> None:
        super().__init__()
        width, queries, keys, values, read = sizes
        self.scaling, self.layer_idx, self.dropout = scaling, layer, dropout
        shapes = ((width, queries), (width, keys), (width, values), (read, width))
        for name, (into, out), biased in zip(PROJECTIONS, shapes, biases, strict=True):
            # What it holds is given: first values of its own would be drawn from the caller's generator.
            held = skip_init(nn.Linear, into, out, bias=biased, dtype=getattr(torch, dtype))  # type: ignore[no-untyped-call]  # torch leaves it untyped
            setattr(self, name, held)
        self.pairs = nn.Buffer(torch.arange(pairs))  # which of the embedding's pairs are left

    @classmethod
    def of(cls, attention: nn.Module) -> "RotaryAttention":
        """One that holds the projections of an attention of transformers."""
        held = [attention.get_submodule(name) for name in PROJECTIONS]
        q, k, v, o = (layer for layer in held if isinstance(layer, nn.Linear))
        new = cls(
            (q.in_features, q.out_features, k.out_features, v.out_features, o.in_features),
            [layer.bias is not None for layer in (q, k, v, o)],
            int(attention.head_dim) // 2,  # type: ignore[arg-type]  # is_rotary saw that it is there, and a config holds a number
            float(attention.scaling),  # type: ignore[arg-type]  # the same
            int(getattr(attention, "layer_idx", 0)),
            float(getattr(attention, "attention_dropout", 0.0)),
            str(q.weight.dtype).removeprefix("torch."),
        ).to(q.weight.device)
        for name, layer in zip(PROJECTIONS, held, strict=True):
            setattr(new, name, layer)
        return new.train(attention.training)

    def settings(self) -> dict[str, object]:
        """What it is built from."""
        q, k, v, o = self.q_proj, self.k_proj, self.v_proj, self.o_proj
        return {
            "sizes": [q.in_features, q.out_features, k.out_features, v.out_features, o.in_features],
            "biases": [layer.bias is not None for layer in (q, k, v, o)],
            "pairs": len(self.pairs),
            "scaling": self.scaling,
            "layer": self.layer_idx,
            "dropout": self.dropout,
            "dtype": str(q.weight.dtype).removeprefix("torch."),
        }

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """[batch, tokens, width], of cosines and sines [batch, tokens, e] -> [batch, tokens, width].

        Raises ModelError for a mask that is no matrix of queries and keys, as flash attention has it, GraphError for
        an embedding that turns part of each head.
        """
        if attention_mask is not None and attention_mask.dim() != 4:
            raise ModelError(
                "a narrowed attention was to be computed",
                f"its mask is {list(attention_mask.shape)}, not [batch, heads, queries, keys]",
                'Open the model with attn_implementation="sdpa" or "eager".',
            )
        lead, width = hidden_states.shape[:-1], 2 * len(self.pairs)
        if width > position_embeddings[0].shape[-1]:
            raise GraphError(
                "dims of attention heads were to be cut",
                f"the rotary embedding turns {position_embeddings[0].shape[-1]} of the {width} dims of a head",
                "Use a method that takes out whole heads.",
            )
        q = self.q_proj(hidden_states).reshape(*lead, -1, width).transpose(1, 2)  # [batch, heads, tokens, 2 pairs]
        k = self.k_proj(hidden_states).reshape(*lead, -1, width).transpose(1, 2)
        v = self.v_proj(hidden_states).reshape(*lead, k.shape[1], -1).transpose(1, 2)
        cos, sin = (table.index_select(-1, self.pairs)[:, None] for table in position_embeddings)
        q, k = rotated(q, cos, sin), rotated(k, cos, sin)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        if (each := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(each, 1), v.repeat_interleave(each, 1)
        out = F.scaled_dot_product_attention(
            q, k, v, attention_mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=attention_mask is None and q.shape[2] > 1,
            scale=self.scaling,
        )  # fmt: skip
        return self.o_proj(out.transpose(1, 2).reshape(*lead, -1)), None


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each dim of the first half turned with its partner in the second: [..., 2 pairs], cos and sin [..., pairs]."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def is_rotary(module: nn.Module) -> bool:
    """Whether a module has the projections of an attention of transformers and is given a rotary embedding."""
    linear = all(isinstance(getattr(module, name, None), nn.Linear) for name in PROJECTIONS)
    plain = linear and hasattr(module, "head_dim") and hasattr(module, "scaling")
    return plain and "position_embeddings" in inspect.signature(module.forward).parameters


def head_dims(model: nn.Module, uses: float = 1.0) -> list[Site]:
    """The pairs and the dims of values of each rotary attention, `PATH.keys` and `PATH.values`, block after block.

    `uses` is tokens per example. Raises GraphError where a model has no such attention in its blocks.
    """
    found = [
        (path, block)
        for block in (name for stack in stacks(model) for name in stack)
        for path in (f"{block}.{name}".removesuffix(".") for name, _ in model.get_submodule(block).named_modules())
        if isinstance(model.get_submodule(path), RotaryAttention) or is_rotary(model.get_submodule(path))
    ]
    if not found:
        raise GraphError(
            f"dims of the heads of {type(model).__name__} were to be cut",
            "no block of it has an attention with q_proj, k_proj, v_proj, o_proj and a rotary embedding",
            "Use a method that takes out whole heads: `secateur list` says which.",
        )
    return [site for path, block in found for site in sites_of(model.get_submodule(path), path, block, uses)]


@torch.no_grad()
def narrowable_(model: nn.Module, example: Batch) -> tuple[list[Site], list[Edit]]:
    """Put a RotaryAttention in the place of every rotary attention: what `head_dims` then gives, and the edits.

    Raises GraphError where there is none, and where the model answers differently with the new ones: norms of queries
    and keys, pairs of neighbours, scores that are capped. The model is then as it was.
    """
    paths = [site.name.removesuffix(".keys") for site in head_dims(model) if site.name.endswith(".keys")]
    whole = {path: model.get_submodule(path) for path in paths}
    edits: list[Edit] = [
        Replace(path, RotaryAttention.of(held)) for path, held in whole.items() if not isinstance(held, RotaryAttention)
    ]
    before = answered(model, example)
    try:
        apply_(model, edits)
        # A cap is not seen in the answers of a model whose scores happen to be small.
        if any(map(_caps, whole.values())) or not _alike(before, answered(model, example), next(model.parameters())):
            raise GraphError(
                f"dims of the heads of {type(model).__name__} were to be cut",
                f"its {type(whole[paths[0]]).__name__} does more than turn queries and keys and attend",
                "Use a method that takes out whole heads.",
            )
    except GraphError:
        for path, held in whole.items():
            model.set_submodule(path, held)
        raise
    return head_dims(model, example.tokens / example.size), edits


def _caps(attention: nn.Module) -> bool:
    """Whether an attention says that it caps its scores, as Gemma 2 does."""
    return any("softcap" in name and value is not None for name, value in vars(attention).items())


def _alike(before: Tensor, after: Tensor, like: Tensor) -> bool:
    """Whether two answers [..., words] are the same, but for how sums are rounded."""
    slack = 1e-4 if like.dtype in (torch.float32, torch.float64) else 1e-2
    return torch.allclose(before, after, rtol=slack, atol=slack * float(before.abs().max()))


def sites_of(attention: nn.Module, path: str, block: str, uses: float = 1.0) -> list[Site]:
    """The pairs and the dims of values of one attention; what holds the pairs is cut with them, where it is there."""
    q, k, v, o = (attention.get_submodule(name) for name in PROJECTIONS)
    assert isinstance(q, nn.Linear) and isinstance(k, nn.Linear), "is_rotary looked"
    assert isinstance(v, nn.Linear) and isinstance(o, nn.Linear), "is_rotary looked"
    held = attention.pairs if isinstance(attention, RotaryAttention) else None
    pairs = int(attention.head_dim) // 2 if held is None else len(held)  # type: ignore[arg-type]  # the same
    heads, key_values = q.out_features // (2 * pairs), k.out_features // (2 * pairs)
    dims = v.out_features // key_values
    pair, dim = torch.arange(2 * pairs) % pairs, torch.arange(dims)
    keys = [
        *_made(q, f"{path}.q_proj", pair.repeat(heads), uses),
        *_made(k, f"{path}.k_proj", pair.repeat(key_values), uses),
    ]
    if held is not None:
        keys.append(Part(f"{path}.pairs", (pairs,), torch.arange(pairs), uses=0.0, itemsize=held.element_size()))
    size = o.weight.element_size()
    values = [
        *_made(v, f"{path}.v_proj", dim.repeat(key_values), uses),
        Part(f"{path}.o_proj.weight", tuple(o.weight.shape), dim.repeat(heads)[None], uses=uses, itemsize=size),
    ]
    return [
        Site(f"{path}.keys", "channel", (pairs,), tuple(keys), block=block),
        Site(f"{path}.values", "channel", (dims,), tuple(values), block=block),
    ]


def _made(layer: nn.Linear, path: str, owner: Tensor, uses: float) -> list[Part]:
    shape, size = tuple(layer.weight.shape), layer.weight.element_size()
    found = [Part(f"{path}.weight", shape, owner[:, None], uses=uses, itemsize=size)]
    if layer.bias is not None:
        found.append(Part(f"{path}.bias", shape[:1], owner, uses=0.0, itemsize=size))
    return found
