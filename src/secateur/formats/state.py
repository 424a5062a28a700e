"""The tensors of a packed weight as the state of a layer: saved, loaded and replaced like any other."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import FormatError
from secateur.formats import FORMATS, unpack
from secateur.formats.packed import Packed

_HELD: WeakValueDictionary[int, Packed] = WeakValueDictionary()
"""The id of the first tensor of a layer -> what the layer made ready for calls, while there is the layer."""
MOST = 4  # packed weights that are kept for one first tensor, and chains that begin with one


class Unpacked(Tensor):
    """The weight of a packed layer, for networks that ask a layer's weight for its dtype, its device or its shape.

    It is unpacked only when something is computed with it, each time anew. Raises FormatError where it is written to.
    """

    packed: Packed

    @staticmethod
    def __new__(cls, packed: Packed, shape: Sequence[int]) -> "Unpacked":
        """A packed weight in the shape that the dense layer has it in."""
        made: Unpacked = Tensor._make_wrapper_subclass(
            cls, tuple(shape), dtype=packed.dtype, device=torch.device("cpu")
        )
        made.packed = packed
        return made

    def __repr__(self) -> str:  # type: ignore[override]  # that of a tensor takes an argument
        return f"{type(self).__name__}({self.packed.format.name}, {list(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it as no method of the class
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        def dense(weight: Unpacked) -> Tensor:
            return weight.packed.dense().reshape(weight.shape)

        if func._schema.is_mutable:  # which would change what is unpacked, and nothing else
            raise FormatError(
                f"{func} was to change the weight of a packed layer",
                "what is packed stays as it is",
                "Change the weight of `layer.dense()` and pack it again.",
            )
        given, named = tree_map_only(cls, dense, (args, kwargs or {}))
        return func(*given, **named)


def weight_of(layer: Any, shape: Callable[[Packed], Sequence[int]]) -> Tensor:
    """What a network finds that asks a packed layer for its weight, of a shape that goes by what is packed.

    While torch.compile or torch.export look on, buffers have no numbers to be read again, and an operator unpacks it,
    which a compiler leaves out where only a dtype was asked for. An export would not: without `strict` dtype, device
    and shape can be asked for, and no more.
    """
    if not torch.compiler.is_dynamo_compiling():
        packed = layer._packed if torch.compiler.is_compiling() else layer.packed
        return Unpacked(packed, shape(packed))
    tensors = [getattr(layer, name) for name in layer._packed.format.names]
    made: Tensor = torch.ops.secateur.unpacked.default(tensors, layer._header, list(shape(layer._packed)))
    return made


def register(layer: nn.Module, packed: Packed) -> None:
    """Make buffers of a layer of the tensors and the header of a packed weight."""
    for name, tensor in {"header": packed.header, **packed.tensors}.items():
        layer.register_buffer(name, tensor)
    first = packed.tensors[packed.format.names[0]]
    held = _HELD.get(id(first))
    # One that was made beside it shares the first tensor, and is found through it.
    if held is None or all(tensor is packed.tensors.get(name) for name, tensor in held.tensors.items()):
        _HELD[id(first)] = packed


def made_of(tensors: Sequence[Tensor], header: Sequence[int]) -> Packed:
    """The packed weight that tensors make in the order of their names, with what was made ready for it before.

    It is that of the layer which holds them, or kept beside it: a compiled graph puts one tensor in place of several
    equal ones. Where there is no layer, as in a graph that was loaded, the first tensor keeps it.
    """
    first, said = tensors[0], (header[0], *header[2:])
    held = _HELD.get(id(first))
    kept = getattr(first, "_secateur_packed", []) if held is None else [held, *held.beside]
    for packed in kept:
        form = packed.format
        same = said == (form.code, *packed.shape, *form.settings)
        if same and all(packed.tensors[name] is t for name, t in zip(form.names, tensors, strict=True)):
            return packed
    code, _, outputs, inputs, *settings = header
    kind = FORMATS[code](*settings)
    made = Packed(kind, (outputs, inputs), dict(zip(kind.names, tensors, strict=True)))
    if held is not None:
        held.beside.insert(0, made)
        held.beside[MOST:] = []
    else:
        first._secateur_packed = [made]  # type: ignore[attr-defined]  # tensors take any
    return made


def now(layer: nn.Module, packed: Packed) -> Packed:
    """The packed weight of a layer, read again when one of its buffers is another tensor by now.

    Raises FormatError when what was put there does not fit.
    """
    names, held = packed.format.names, layer._buffers  # where `getattr` would find them, more slowly
    if all(held.get(name) is packed.tensors[name] for name in names):
        return packed
    given = {name: layer.get_buffer(name) for name in ("header", *names)}
    converted = {given[name].dtype for name in names} - {tensor.dtype for tensor in packed.tensors.values()}
    moved = {tensor.device.type for tensor in given.values()} - {"cpu"}
    try:
        if not moved:
            return unpack(given)
    except FormatError:
        if not converted:
            raise
    raise FormatError(
        f"a {packed.format.name} weight {packed.dtype} {list(packed.shape)} was to be used",
        f"its layer was converted or moved since, to {', '.join(sorted(map(str, moved or converted)))}",
        "Convert the dense model and pack it again; what is packed multiplies on the CPU.",
    )


def loaded(packed: Packed, state_dict: Mapping[str, Any], prefix: str) -> Packed:
    """A packed weight from a state; what was there when the state has none. Raises FormatError when it is not whole.

    Another mask has another number of values, so what is there is replaced and not filled.
    """
    names = [name for name in ("header", *packed.format.names) if prefix + name in state_dict]
    return unpack({name: state_dict[prefix + name].detach().clone() for name in names}) if names else packed


_OPERATORS: Any = torch.library.Library("secateur", "FRAGMENT")  # type: ignore[no-untyped-call]  # torch has no types
_OPERATORS.define("unpacked(Tensor[] tensors, int[] header, int[] shape) -> Tensor", tags=torch.Tag.pt2_compliant_tag)


def _unpacked(tensors: Sequence[Tensor], header: Sequence[int], shape: Sequence[int]) -> Tensor:
    return made_of(tensors, header).dense().reshape(list(shape))


_OPERATORS.impl("unpacked", _unpacked, "CPU")


@torch.library.register_fake("secateur::unpacked")  # type: ignore[untyped-decorator]  # nor here
def _(tensors: Sequence[Tensor], header: Sequence[int], shape: Sequence[int]) -> Tensor:
    names = FORMATS[header[0]].names
    return tensors[names.index("scales" if "scales" in names else "values")].new_empty(list(shape))
