"""The tensors of a packed weight as the state of a layer: saved, loaded and replaced like any other."""

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.formats import unpack
from secateur.formats.packed import Packed


def register(layer: nn.Module, packed: Packed) -> None:
    """Make buffers of a layer of the tensors and the header of a packed weight."""
    for name, tensor in {"header": packed.header, **packed.tensors}.items():
        layer.register_buffer(name, tensor)


def now(layer: nn.Module, packed: Packed) -> Packed:
    """The packed weight of a layer, read again when one of its buffers is another tensor by now.

    Raises FormatError when what was put there does not fit.
    """
    names, held = packed.format.names, layer._buffers  # where `getattr` would find them, more slowly
    if all(held.get(name) is packed.tensors[name] for name in names):
        return packed
    return unpack({name: layer.get_buffer(name) for name in ("header", *names)})


def loaded(packed: Packed, state_dict: Mapping[str, Any], prefix: str) -> Packed:
    """A packed weight from a state; what was there when the state has none. Raises FormatError when it is not whole.

    Another mask has another number of values, so what is there is replaced and not filled.
    """
    names = [name for name in ("header", *packed.format.names) if prefix + name in state_dict]
    return unpack({name: state_dict[prefix + name].detach().clone() for name in names}) if names else packed
