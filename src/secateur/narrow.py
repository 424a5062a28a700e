"""What torch's own modules compute once units were taken out of them, where their code knows one width only."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class NarrowAttention(nn.MultiheadAttention):
    """nn.MultiheadAttention whose heads together are narrower than what it reads and writes.

    torch's own takes the width of a head from that of its input. The parameters and their names are the same; a module
    becomes one in its place when heads are taken out. Keys and values that are added (`add_bias_kv`, `add_zero_attn`)
    are not supported.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: [tokens, batch, width], with batch first, or of one example without it.

        `is_causal` is a hint about `attn_mask`, which is used. A mask for each head is one for the heads that are left.
        """
        alone, given = query.dim() == 2, [query, key, value]
        if alone:
            given = [x.unsqueeze(0) for x in given]
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            given = [x.transpose(0, 1) for x in given]
        q, k, v = (
            # [batch, tokens, width] -> [batch, heads, tokens, dim]
            F.linear(x, weight, bias).reshape(*x.shape[:2], self.num_heads, -1).transpose(1, 2)
            for x, weight, bias in zip(given, self._weights(), self._biases(), strict=True)
        )
        added = None if attn_mask is None else _added(attn_mask, q)
        if added is not None and added.dim() == 3:
            added = added.reshape(len(q), -1, *added.shape[1:])
        if key_padding_mask is not None:
            hidden = _added(key_padding_mask, q)[:, None, None]
            added = hidden if added is None else added + hidden
        dropped = self.dropout if self.training else 0.0
        seen: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
            seen = F.dropout((scores if added is None else scores + added).softmax(-1), dropped)
            found = seen @ v
            seen = seen.mean(1) if average_attn_weights else seen
        else:
            found = F.scaled_dot_product_attention(q, k, v, added, dropped)
        out = self.out_proj(found.transpose(1, 2).flatten(2))
        if alone:
            return out.squeeze(0), None if seen is None else seen.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), seen

    def _weights(self) -> tuple[Tensor, ...]:
        if self.in_proj_weight is not None:
            return self.in_proj_weight.chunk(3)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _biases(self) -> tuple[Tensor | None, ...]:
        return (None, None, None) if self.in_proj_bias is None else self.in_proj_bias.chunk(3)


def _added(mask: Tensor, like: Tensor) -> Tensor:
    """What is added to scores: minus infinity where a boolean mask hides."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -torch.inf)
    return mask.to(like.dtype)


def refit_attention_(model: nn.Module, path: str) -> None:
    """Make an nn.MultiheadAttention of a model go by the widths its tensors now have; those around it take no shortcut.

    torch has shortcuts for whole layers and stacks of them, which read widths of their own.
    """
    module: nn.MultiheadAttention = model.get_submodule(path)  # type: ignore[assignment]
    stacked = module.in_proj_weight is not None
    width = module.out_proj.weight.shape[0]
    inner = len(module.in_proj_weight) // 3 if stacked else len(module.q_proj_weight)
    module.embed_dim, module.num_heads = width, inner // module.head_dim
    module.kdim, module.vdim = (
        (module.in_proj_weight.shape[1],) * 2
        if stacked
        else (module.k_proj_weight.shape[1], module.v_proj_weight.shape[1])
    )
    added = module.bias_k is not None or module.add_zero_attn
    if inner == width or added or type(module) not in (nn.MultiheadAttention, NarrowAttention):
        return
    module.__class__ = NarrowAttention
    module._qkv_same_embed_dim = False
    pieces = path.split(".")
    for i in range(len(pieces)):
        around = model.get_submodule(".".join(pieces[:i]))
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False
