"""How what survives is stored and multiplied: formats of plain tensors, exact inverses of the dense weight.

packed = Bitmap().pack(weight, mask)     # weight [out, in]; Packed has matmul, dense, nbytes, tensors
unpack({"header": packed.header, **packed.tensors})   # the same, from a file
"""

from collections.abc import Mapping

from torch import Tensor

from secateur.errors import FormatError, SettingError
from secateur.formats.bitmap import Bitmap
from secateur.formats.bitmap_int8 import BitmapInt8
from secateur.formats.block import Block
from secateur.formats.depth_taps import DepthTaps
from secateur.formats.group_cols import GroupCols
from secateur.formats.k_blocked import KBlocked
from secateur.formats.nm import NM
from secateur.formats.packed import Format, Packed, whole
from secateur.formats.sell import Sell8, Sell16
from secateur.formats.sell_blocked import SellBlocked

FORMATS: dict[int, type[Format]] = {
    kind.code: kind
    for kind in (Bitmap, Sell16, BitmapInt8, NM, Block, GroupCols, DepthTaps, KBlocked, Sell8, SellBlocked)
}
"""Every format by the number that stands first in its header."""


def unpack(tensors: Mapping[str, Tensor]) -> Packed:
    """A packed weight from its header and tensors, as they come from a file.

    Raises FormatError for a format or version that is not known here, and when the tensors do not fit together.
    """
    header = tensors.get("header")
    if header is None or header.dim() != 1 or len(header) < 4 or header.is_floating_point():
        raise FormatError(
            "a packed weight was to be read",
            f"{', '.join(sorted(tensors)) or 'nothing'} is there and no header",
            "Give the tensors of one layer, the header among them.",
        )
    code, version, outputs, inputs, *settings = (int(n) for n in header)
    kind = FORMATS.get(code)
    try:
        format = None if kind is None else kind(*settings)
    except (SettingError, TypeError):
        format = None
    if format is None or version != format.version:
        known = f"format {code} is not known" if format is None else f"{format.name} is of version {format.version}"
        raise FormatError(
            f"a packed weight of format {code}, version {version}, settings {settings} was to be read",
            f"{known} here",
            "Read it with the secateur that wrote it, or pack the dense weight again.",
        )
    return whole(Packed(format, (outputs, inputs), {k: v for k, v in tensors.items() if k != "header"}))


__all__ = [
    "FORMATS",
    "NM",
    "Bitmap",
    "BitmapInt8",
    "Block",
    "DepthTaps",
    "Format",
    "GroupCols",
    "KBlocked",
    "Packed",
    "Sell8",
    "Sell16",
    "SellBlocked",
    "unpack",
]
