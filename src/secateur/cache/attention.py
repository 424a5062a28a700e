"""Attention of new tokens to a past that is partly pruned: on the packed form, and all at once without a cache.

Joo, Hosseini, Hadidi, Asgari. "Mustafar: Promoting Unstructured Sparsity for KV Cache Pruning in LLM Inference."
2025. arXiv:2505.22913, section 3: with K~, V~ what is left of tokens behind the window,

    p = softmax([q K~', q K_window'] / sqrt(d))        o = p_1 V~ + p_2 V_window        (softmax in float32)
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.cache.past import Past, Pruning, heard_by
from secateur.formats import bitmap_kv


def attend(query: Tensor, past: Past, mask: Tensor | None, scaling: float) -> Tensor:
    """New tokens' query [batch, query heads, new, width] against the past they belong to -> the same shape.

    `mask` [batch, 1, new, tokens] is boolean, True attends, or added to the scores; None: each token sees all up to
    itself.
    """
    if past.packed is not None and query.shape[2] == 1 and not (torch.is_grad_enabled() and query.requires_grad):
        out = bitmap_kv.attend(past.packed, *past.tail, query, bitmap_kv.bias_of(mask, past.tokens), scaling)
        if out is not None:
            return out
    keys, values = past.dense()
    q = _grouped(query, keys.shape[1])  # [batch, heads, group, new, width]
    scores = torch.einsum("bhgqd,bhkd->bhgqk", q.float(), keys.float()) * scaling
    weights = _softmax(scores, mask, query.shape[2])
    return torch.einsum("bhgqk,bhkd->bhgqd", weights, values.float()).flatten(1, 2).to(query.dtype)


def attend_as_decoded(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float, pruning: Pruning, prefill: int
) -> Tensor:
    """What each token of a text would have got, had it been decoded with the cache: all of them in one pass.

    Tokens before `prefill` see everything as it is, as the prompt does. Query [batch, query heads, tokens, width].
    """
    tokens = keys.shape[2]
    lean_keys, lean_values = pruned_as_decoded(query, keys, values, pruning, prefill)
    q = _grouped(query, keys.shape[1]).float()
    dense = torch.einsum("bhgqd,bhkd->bhgqk", q, keys.float())
    lean = torch.einsum("bhgqd,bhkd->bhgqk", q, lean_keys.float())
    place = torch.arange(tokens, device=query.device)
    bound = torch.where(place >= prefill, pruning.behind(place), torch.zeros_like(place))
    gone = place[None, :] < bound[:, None]  # [query, key]: packed by the time it is asked
    weights = _softmax(torch.where(gone, lean, dense) * scaling, mask, tokens)
    out = torch.einsum("bhgqk,bhkd->bhgqd", weights * gone, lean_values.float())
    out += torch.einsum("bhgqk,bhkd->bhgqd", weights * ~gone, values.float())
    return out.flatten(1, 2).to(query.dtype)


def pruned_as_decoded(
    query: Tensor, keys: Tensor, values: Tensor, pruning: Pruning, prefill: int
) -> tuple[Tensor, Tensor]:
    """Keys and values as they are once packed, decided piece by piece as decoding would."""
    tokens, heads = keys.shape[2], keys.shape[1]
    lean_keys, lean_values = keys.clone(), values.clone()
    powers = {pruning.keys.listens, pruning.values.listens} - {0}
    loud = {power: heard_by(query, heads, power) for power in powers}  # [batch, heads, tokens, width]

    def decide_(start: int, end: int, asked: Mapping[int, Tensor]) -> None:
        for whole, lean, choice, sparsity in (
            (keys, lean_keys, pruning.keys, pruning.key_sparsity),
            (values, lean_values, pruning.values, pruning.value_sparsity),
        ):
            piece = whole[:, :, start:end]
            lean[:, :, start:end] = piece * choice.select(piece, sparsity, asked.get(choice.listens))

    prompt = int(pruning.behind(torch.tensor(prefill)))
    if prompt:  # the prompt, at once: its last queries speak for all
        last = slice(max(0, prefill - max(1, pruning.window)), prefill)
        decide_(0, prompt, {power: heard[:, :, last].sum(2, keepdim=True) for power, heard in loud.items()})
    for start in range(prompt, tokens - pruning.chunk - pruning.window + 1, pruning.chunk):
        end = start + pruning.chunk
        # A token hears the queries from its own on, until it is packed; one of the prompt, those after the prompt.
        since = torch.arange(start, end, device=query.device).clamp(min=prefill)
        until = end + pruning.window
        later = {power: heard[:, :, :until].flip(2).cumsum(2).flip(2) for power, heard in loud.items()}
        decide_(start, end, {power: heard[:, :, since] for power, heard in later.items()})
    return lean_keys, lean_values


def _grouped(query: Tensor, heads: int) -> Tensor:
    return query.unflatten(1, (heads, -1))  # type: ignore[no-untyped-call]  # torch has none


def _softmax(scores: Tensor, mask: Tensor | None, new: int) -> Tensor:
    """Scores [batch, heads, group, new, tokens] to weights, in float32."""
    tokens = scores.shape[-1]
    if mask is None:
        place = torch.arange(tokens, device=scores.device)
        mask = place[None, :] <= place[tokens - new :, None]
    else:
        mask = mask[:, :, :, :tokens].unsqueeze(2)  # [batch, 1, 1, new, tokens]
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    return scores.softmax(-1).nan_to_num(0.0)  # a row of padding attends to nothing
