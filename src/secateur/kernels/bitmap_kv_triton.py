"""Attention of one new token to a packed past on a graphics card, in Triton: tiles are unpacked in registers.

    attend(packed, keys, values, query, bias, scaling)      # as in formats/bitmap_kv.py

The past is cut into runs of tiles, each read by a program of its own for all the queries of a head; what the programs
found is put together as Dao, Haziza, Massa, Sizov do in "Flash-Decoding for long-context inference", 2023. Softmax and
sums are in float32. Imported where triton is installed; with TRITON_INTERPRET=1 set before, it runs on any processor.
"""

# What is inside a kernel is Triton, whose types are not those of Python.
# mypy: ignore-errors

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from secateur.formats.bitmap_kv import BitmapKV

PROGRAMS = 512  # as many as keep a large card busy
ROWS = 16  # queries a program takes, padded: what the matrix units ask for at least


@triton.jit
def _unpacked(bit, values):
    """Bits [a, b], 0 or 1, and the values that are kept, in order -> [a, b] in float32, zeros where none is."""
    before = tl.cumsum(bit, 1) - bit
    in_row = tl.sum(bit, 1)
    start = tl.cumsum(in_row, 0) - in_row
    return tl.load(values + start[:, None] + before, mask=bit == 1, other=0.0).to(tl.float32)


@triton.jit
def _seen(score, most, whole, out, value):
    """One more block of scores [rows, 32] and values [32, width] taken into a running softmax."""
    new = tl.maximum(most, tl.max(score, 1))
    shift = tl.where(new == float("-inf"), 0.0, new)  # nothing may be seen yet
    weight = tl.exp(score - shift[:, None])
    old = tl.exp(most - shift)
    out = out * old[:, None] + tl.dot(weight, value, input_precision="ieee")
    return new, whole * old + tl.sum(weight, 1), out


@triton.jit
def _attend(
    key_bits, key_values, value_bits, value_values, keys, values, query, bias, outs, mosts, wholes,
    heads, group, width, words, tiles, room, key_kept, value_kept, tail, each, scaling,
    biased: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr,
):  # fmt: skip
    item, run = tl.program_id(0), tl.program_id(1)
    runs = tl.num_programs(1)
    row, channel, lane = tl.arange(0, rows), tl.arange(0, padded), tl.arange(0, 32)
    inside, member = channel < width, row < group
    at = (item * group + row)[:, None] * width + channel[None, :]
    asked = tl.load(query + at, mask=member[:, None] & inside[None, :], other=0.0).to(tl.float32) * scaling
    most = tl.full([rows], float("-inf"), tl.float32)
    whole = tl.zeros([rows], tl.float32)
    out = tl.zeros([rows, padded], tl.float32)
    bias += (item // heads).to(tl.int64) * (tiles * 32 + tail)

    first = item.to(tl.int64) * room  # 64 bits: a long past has more elements than 32 can count
    for tile in range(run * each, tl.minimum(run * each + each, tiles)):
        word = tl.load(key_bits + (first + tile) * width + channel, mask=inside, other=0)
        bit = (word[:, None] >> lane[None, :]) & 1  # [width, tokens]
        key = _unpacked(bit, key_values + (first + tile) * key_kept)
        score = tl.dot(asked, key, input_precision="ieee")
        if biased:
            score += tl.load(bias + tile * 32 + lane)[None, :]
        place = value_bits + ((first + tile) * 32 + lane)[:, None] * words + (channel // 32)[None, :]
        word = tl.load(place, mask=inside[None, :], other=0)
        bit = (word >> (channel % 32)[None, :]) & 1  # [tokens, width]
        value = _unpacked(bit, value_values + (first + tile) * value_kept)
        most, whole, out = _seen(score, most, whole, out, value)

    for start in range(0, tl.where(run == runs - 1, tail, 0), 32):  # the newest tokens, as they are
        token = start + lane
        there = token < tail
        at = (item.to(tl.int64) * tail + token)[:, None] * width + channel[None, :]
        both = there[:, None] & inside[None, :]
        key = tl.load(keys + at, mask=both, other=0.0).to(tl.float32)
        score = tl.dot(asked, tl.trans(key), input_precision="ieee")
        if biased:
            score += tl.load(bias + tiles * 32 + token, mask=there, other=0.0)[None, :]
        score = tl.where(there[None, :], score, float("-inf"))
        value = tl.load(values + at, mask=both, other=0.0).to(tl.float32)
        most, whole, out = _seen(score, most, whole, out, value)

    at = (item * runs + run) * rows + row
    tl.store(mosts + at, most)
    tl.store(wholes + at, whole)
    tl.store(outs + at[:, None] * padded + channel[None, :], out)


def attend(
    packed: "BitmapKV", keys: Tensor, values: Tensor, query: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """Attention of one new token, query [batch, query heads, 1, width], to packed tokens and the newest as they are.

    `keys` and `values` [batch, heads, tail, width]; `bias` [batch, tokens] is added to the scores.
    """
    batch, heads, tail, width = keys.shape
    group, padded = query.shape[1] // heads, triton.next_power_of_2(max(width, 16))
    rows = max(ROWS, triton.next_power_of_2(group))
    each = max(1, packed.tiles * batch * heads // PROGRAMS)  # tiles that a program reads
    runs = triton.cdiv(packed.tiles, each)
    outs = torch.empty(batch * heads, runs, rows, padded, device=query.device)
    mosts, wholes = torch.empty(2, batch * heads, runs, rows, device=query.device)
    _attend[(batch * heads, runs)](
        *(t.contiguous() for t in (*packed._tensors(), keys, values, query)),
        query if bias is None else bias.float().contiguous(),
        outs, mosts, wholes,
        heads, group, width, packed.value_bits.shape[-1], packed.tiles, packed.key_bits.shape[2],
        packed.key_values.shape[-1], packed.value_values.shape[-1], tail, each, scaling,
        biased=bias is not None, rows=rows, padded=padded,
    )  # fmt: skip
    most = mosts.amax(1, keepdim=True)
    share = (mosts - most.masked_fill(most == float("-inf"), 0)).exp()  # [batch heads, runs, rows]
    whole = (wholes * share).sum(1)[:, :group, None]
    out = (outs * share[..., None]).sum(1)[:, :group, :width] / whole
    out = out.masked_fill(whole == 0, 0)  # a row of padding attends to nothing
    return out.reshape(query.shape).to(query.dtype)
