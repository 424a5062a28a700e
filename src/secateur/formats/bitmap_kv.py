"""Keys and values of past tokens, most of whose elements are gone: one bit an element, and what is left.

A tile is 32 tokens of one head. Of keys, a 32-bit word says which tokens of the tile keep one channel, channel after
channel, so that a lane is a token and scores need no sum across lanes; of values, a word says which of 32 channels
one token keeps, token after token. Bit i is the i-th of the 32, lowest first. All tiles of a cache keep equally many
elements, so that where a tile begins need not be stored:

    key_bits     [batch, heads, tiles, width]           int32
    key_values   [batch, heads, tiles, kept of a tile]  in the type of the cache, channel after channel
    value_bits   [batch, heads, tiles, 32, words]       int32, words = width / 32 rounded up
    value_values [batch, heads, tiles, kept of a tile]  token after token

A format of our own; bitmaps as in Joo, Hosseini, Hadidi, Asgari. "Mustafar." 2025. arXiv:2505.22913, section 3.
"""

import ctypes
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor

from secateur import kernels
from secateur.errors import PatternError
from secateur.formats.eager import recorded, transformed
from secateur.formats.packed import VALUES, pointer
from secateur.formats.pages import empty, in_large_pages

TILE = 32  # tokens, and bits of a word


class Struct(ctypes.Structure):
    """`BitmapKV` of kernels/bitmap_kv.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("heads", "group", "width", "tiles", "room")),
        *((name, ctypes.c_int64) for name in ("key_kept", "value_kept", "tail", "tail_room")),
        *((name, ctypes.c_void_p) for name in ("key_bits", "key_values", "value_bits", "value_values")),
        *((name, ctypes.c_void_p) for name in ("keys", "values", "query", "bias", "out")),
        ("scaling", ctypes.c_float),
    )


@dataclass
class BitmapKV:
    """The packed past of one layer: `tiles` of 32 tokens are in use, of as many as there is room for."""

    key_bits: Tensor
    key_values: Tensor
    value_bits: Tensor
    value_values: Tensor
    tiles: int

    @property
    def tokens(self) -> int:
        """How many tokens are packed."""
        return self.tiles * TILE

    @property
    def width(self) -> int:
        """Channels of a head."""
        return self.key_bits.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes held, the room that is not in use yet among them."""
        return sum(t.numel() * t.element_size() for t in self._tensors())

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.key_bits, self.key_values, self.value_bits, self.value_values

    def dense(self) -> tuple[Tensor, Tensor]:
        """Keys and values [batch, heads, tokens, width], zeros where elements are gone."""
        bits, values = self.key_bits[:, :, : self.tiles], self.key_values[:, :, : self.tiles]
        keys = _filled(_unpacked(bits), values).transpose(-1, -2).flatten(2, 3)
        bits, values = self.value_bits[:, :, : self.tiles], self.value_values[:, :, : self.tiles]
        kept = _unpacked(bits).flatten(-2)[..., : self.width]  # [batch, heads, tiles, 32, width]
        return keys, _filled(kept, values).flatten(2, 3)

    def append_(self, more: "BitmapKV") -> None:
        """Put tiles behind those that are there. Room grows by an eighth at a time."""
        needed = self.tiles + more.tiles
        if needed > self.key_bits.shape[2]:
            room = max(needed, self.key_bits.shape[2] + self.key_bits.shape[2] // 8)
            self.key_bits, self.key_values, self.value_bits, self.value_values = (
                _with_room(t, self.tiles, room) for t in self._tensors()
            )
        for mine, theirs in zip(self._tensors(), more._tensors(), strict=True):
            if mine.shape[-1] != theirs.shape[-1]:
                raise PatternError(
                    f"tiles with {theirs.shape[-1]} elements kept were to be packed behind others",
                    f"those keep {mine.shape[-1]}",
                    "Prune every token of a cache to the same sparsity.",
                )
            mine[:, :, self.tiles : needed] = theirs[:, :, : more.tiles]
        self.tiles = needed

    def select(self, rows: Tensor) -> "BitmapKV":
        """The same for other rows of the batch: a beam that went on, a batch that was repeated."""
        a, b, c, d = (t.index_select(0, rows.to(t.device)) for t in self._tensors())
        return BitmapKV(a, b, c, d, self.tiles)


def attend(
    packed: BitmapKV, keys: Tensor, values: Tensor, query: Tensor, bias: Tensor | None, scaling: float
) -> Tensor | None:
    """Attention of one new token, query [batch, query heads, 1, width], to packed tokens and the newest as they are.

    `keys` and `values` [batch, heads, tail, width]; `bias` [batch, tokens] is added to the scores. None where no
    kernel is compiled, or the dtype or device has none. On an NVIDIA card it is Triton's. Where pairs of bfloat16 are
    multiplied without a matrix unit, the softmax of a token that has less than 1/1024 of the whole so far may be
    rounded to bfloat16, as torch rounds all of them.
    """
    if query.is_cuda and query.dtype in VALUES and find_spec("triton"):
        from secateur.kernels import bitmap_kv_triton

        with torch.cuda.device(query.device):
            return bitmap_kv_triton.attend(packed, keys, values, query, bias, scaling)
    kernel = kernels.find(f"bitmap_kv_attend_{VALUES.get(query.dtype)}")
    parts = (*packed._tensors(), keys, values, query)
    if kernel is None or recorded() or transformed(keys, values, query, bias):
        return None
    if any(t.device.type != "cpu" for t in parts) or keys.dtype is not query.dtype:
        return None
    batch, heads, tail, width = keys.shape
    keys, values, query = (t.resolve_neg().contiguous() for t in (keys, values, query))
    out = torch.empty_like(query)
    bias = None if bias is None else bias.float().contiguous()
    call = Struct(
        heads,
        query.shape[1] // heads,
        width,
        packed.tiles,
        packed.key_bits.shape[2],
        packed.key_values.shape[-1],
        packed.value_values.shape[-1],
        *(tail, tail),
        *(pointer(t) for t in (*packed._tensors(), keys, values, query)),
        None if bias is None else pointer(bias),
        pointer(out),
        scaling,
    )
    kernels.run(kernel, call, batch * heads)
    return out


def bias_of(mask: Tensor | None, tokens: int) -> Tensor | None:
    """A mask [batch, 1, 1, tokens], True attends, as what is added to the scores of one token, [batch, tokens]."""
    if mask is None:
        return None
    row = mask[:, 0, 0, :tokens]
    if row.dtype != torch.bool:
        return row
    return torch.zeros_like(row, dtype=torch.float32).masked_fill_(~row, float("-inf"))


def pack(keys: Tensor, values: Tensor, keep_keys: Tensor, keep_values: Tensor) -> BitmapKV:
    """Pack tokens [batch, heads, tokens, width] by boolean choices of the same shape.

    Raises PatternError where tokens do not fill their tiles, or tiles keep different numbers.
    """
    tokens, width = keys.shape[2:]
    if tokens % TILE:
        raise PatternError(f"{tokens} tokens were to be packed", f"a tile has {TILE}", "Leave the rest unpacked.")
    by_channel = _tiled(keep_keys).transpose(-1, -2)  # [batch, heads, tiles, width, 32]
    by_token = _tiled(keep_values)  # [batch, heads, tiles, 32, width]
    words = -(-width // TILE)
    padded = torch.nn.functional.pad(by_token, (0, words * TILE - width))
    a, b, c, d = in_large_pages(
        [
            _packed(by_channel),
            _kept(_tiled(keys).transpose(-1, -2), by_channel, "keys"),
            _packed(padded.reshape(*padded.shape[:-1], words, TILE)),
            _kept(_tiled(values), by_token, "values"),
        ]
    )
    return BitmapKV(a, b, c, d, tokens // TILE)


def _tiled(x: Tensor) -> Tensor:
    """[batch, heads, tokens, width] as [batch, heads, tiles, 32, width]."""
    return x.reshape(*x.shape[:2], -1, TILE, x.shape[-1])


def _packed(bits: Tensor) -> Tensor:
    """Booleans [..., 32] as int32 words [...], the first in the lowest bit."""
    weight = torch.arange(TILE, device=bits.device, dtype=torch.int64)
    words = (bits.long() << weight).sum(-1)
    return (words - ((words >> 31) << 32)).to(torch.int32)  # the highest bit is the sign


def _unpacked(words: Tensor) -> Tensor:
    shift = torch.arange(TILE, device=words.device, dtype=torch.int32)
    return ((words.unsqueeze(-1) >> shift) & 1).bool()


def _kept(x: Tensor, keep: Tensor, what: str) -> Tensor:
    """What is kept of each tile [batch, heads, tiles, a, b], in order: [batch, heads, tiles, kept]."""
    counts = keep.flatten(3).sum(-1)
    each = int(counts.flatten()[0])
    if bool((counts != each).any()):
        raise PatternError(
            f"{what} were to be packed, with equally many kept in every {TILE} tokens of a head",
            f"there are from {int(counts.min())} to {int(counts.max())}",
            "Keep the same number of each token, or of each channel of a group.",
        )
    return x[keep].reshape(*x.shape[:3], each)


def _filled(keep: Tensor, values: Tensor) -> Tensor:
    out = torch.zeros(keep.shape, dtype=values.dtype, device=values.device)
    out[keep] = values.reshape(-1)
    return out


def _with_room(old: Tensor, used: int, room: int) -> Tensor:
    new = empty((*old.shape[:2], room, *old.shape[3:]), old)
    new[:, :, :used] = old[:, :, :used]
    return new
