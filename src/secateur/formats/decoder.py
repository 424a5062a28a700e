"""Blocks of a language model that run in one call, for one new token of each text.

A packed layer of a small model takes twenty microseconds, and what torch and Python do between the layers of a block
takes as long as all of them: here norms, rotations, attention and sums are steps between products, of all blocks at
once. The blocks are those of transformers (Llama, Mistral, Qwen 2 and 3) and stay what they are: whatever else they are
asked, such as a prompt, they do themselves.
"""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.formats.bitmap_kv import Struct as BitmapKV
from secateur.formats.bitmap_kv import bias_of
from secateur.formats.eager import recorded, transformed
from secateur.formats.linear import SparseLinear
from secateur.formats.linear_chain import LinearChain
from secateur.formats.packed import VALUES, learns
from secateur.formats.pages import empty
from secateur.formats.planned import Planned
from secateur.formats.program import Program

NAMES = "Llama", "Mistral", "Qwen2", "Qwen3"
KNOWN = {f"transformers.models.{name.lower()}.modeling_{name.lower()}": name for name in NAMES}
"""By the module of their code, the name with which its classes begin."""
DENSE, PRUNED = ("sdpa", "eager"), ("secateur",)
"""What transformers calls the attentions that are computed here, to a past as it is and to one that is pruned."""
SAID = ("cache_position",)
"""What blocks are told and do not use."""
SAME = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 0.0}
"""Of the largest number, by which a sum in another order may differ behind the last block: a few roundings."""
PAST = ("keys", "values", "tokens", "keys_text", "keys_head", "values_text", "values_head", "grows")
"""What an attention reads of a cache, as its struct has it."""
_BITMAPS = ("key_bits", "key_values", "value_bits", "value_values")
PACKED = ("tiles", "room", "key_kept", "value_kept", "tail", "tail_room", *_BITMAPS)
"""What it reads besides of one that is packed but for the newest tokens."""
ROOM, MORE = "_secateur_room", 64
"""Where a layer of a cache keeps its memory, and for how many more tokens there is some at the least."""


@dataclass(frozen=True)
class Parts:
    """What a block is made of."""

    first: nn.Module  # the norms
    second: nn.Module
    heads: tuple[nn.Module, nn.Module] | None  # of queries and keys
    linear: tuple[SparseLinear, SparseLinear, SparseLinear, SparseLinear]  # of queries, keys, values and what they find
    gated: LinearChain
    width: int  # of a head
    group: int  # heads of queries for each of keys
    scaling: float
    place: int  # in a cache

    @property
    def norms(self) -> list[nn.Module]:
        """All that it has."""
        return [self.first, self.second, *(self.heads or ())]


def parts_of(block: nn.Module) -> Parts | None:
    """The parts of a block whose linear layers are all packed; None for any other."""
    name = KNOWN.get(type(block).__module__)
    if name is None or type(block).__qualname__ != f"{name}DecoderLayer":
        return None
    found: Any = block
    attention, gated = found.self_attn, found.mlp
    linear = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
    if type(gated) is not LinearChain or (gated.inputs, len(gated.outputs)) != (1, 1):
        return None
    if any(type(layer) is not SparseLinear for layer in linear):
        return None
    parts = Parts(
        first=found.input_layernorm,
        second=found.post_attention_layernorm,
        heads=(attention.q_norm, attention.k_norm) if hasattr(attention, "q_norm") else None,
        linear=linear,
        gated=gated,
        width=attention.head_dim,
        group=attention.num_key_value_groups,
        scaling=attention.scaling,
        place=attention.layer_idx,
    )
    kinds = {(type(attention), f"{name}Attention"), *((type(norm), f"{name}RMSNorm") for norm in parts.norms)}
    if any((kind.__module__, kind.__qualname__) != (type(block).__module__, said) for kind, said in kinds):
        return None
    outputs = [layer.packed.shape[0] for layer in linear[:3]]
    fits = outputs == [parts.group * outputs[1], outputs[1], outputs[1]] and not outputs[1] % parts.width
    return parts if fits and not parts.width % 2 else None


class Decoder(Planned["_Plan"]):
    """Blocks of a language model, called as one of them is: for inference, on the CPU."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        """Blocks in their order."""
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **more: Any,
    ) -> Tensor:
        """Hidden states [texts, tokens, width] behind the last block; what the cache holds grows as each block says.

        Raises FormatError as the layers do.
        """
        asked = [name for name, value in more.items() if value is not None and value is not False and name not in SAID]
        if not asked and not recorded() and not transformed(hidden_states, attention_mask):
            found = self._at_once(hidden_states, attention_mask, past_key_values, position_embeddings)
            if found is not None:
                return found
        given = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "position_embeddings": position_embeddings,
        }
        return self.one_by_one(hidden_states, **given, **more)

    def one_by_one(self, hidden_states: Tensor, **given: Any) -> Tensor:
        """The same, each block asked by itself."""
        for block in self.blocks:
            hidden_states = block(hidden_states, **given)
        return hidden_states

    def agrees(self) -> bool:
        """Whether both ways give the same for some numbers, as far as the order of sums lets them.

        Blocks are known by what their classes are called, and another transformers may write them otherwise.
        """
        first = parts_of(self.blocks[0])
        if first is None:
            return False
        made, packed = torch.Generator().manual_seed(0), first.linear[0].packed
        x = torch.randn(1, 1, packed.shape[1], generator=made).to(packed.dtype)
        angle = torch.rand(1, 1, first.width, generator=made)
        angles = angle.cos().to(packed.dtype), angle.sin().to(packed.dtype)
        one = self.one_by_one(x, attention_mask=None, past_key_values=None, position_embeddings=angles).double()
        found = self._at_once(x, None, None, angles)
        return found is not None and float((found.double() - one).abs().max() / one.abs().max()) <= SAME[packed.dtype]

    def extra_repr(self) -> str:
        """How many there are."""
        return f"{len(self.blocks)} in one call"

    def _at_once(self, x: Tensor, mask: Tensor | None, cache: Any, angles: Any) -> Tensor | None:
        """What one call gives, or None where the blocks have to be asked."""
        if x.dim() != 3 or x.shape[1] != 1 or not x.numel() or self.training or learns(x):
            return None
        if not isinstance(angles, tuple) or len(angles) != 2:
            return None
        given = (x, *angles)
        if any(t.dtype is not x.dtype or not t.is_cpu or not t.is_contiguous() or t.is_neg() for t in given):
            return None
        shapes = tuple(tuple(t.shape) for t in given)
        if shapes[1] != shapes[2] or len(shapes[1]) != 3 or shapes[1][0] not in (1, len(x)) or shapes[1][1] != 1:
            return None
        pruned = any(hasattr(layer, "in_one_call") for layer in getattr(cache, "layers", [])[:1])
        key = (torch.get_num_threads(), x.dtype, mask is not None, pruned, *shapes)
        plan = self.taken(key, lambda: _Plan(self, key, shapes))
        if plan is None:
            return None
        try:
            return None if any(plan.hooks) or learns(*plan.parameters) else plan.attended(given, mask, cache)
        finally:
            self.keep(plan)


class Normalize(ctypes.Structure):
    """`Normalize` of kernels/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "more", "sum", "weight", "y")),
        *((name, ctypes.c_int64) for name in ("rows", "width")),
        ("epsilon", ctypes.c_float),
    )


class Rotate(ctypes.Structure):
    """`Rotate` of kernels/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("heads", "width", "apart")),
    )


class Attend(ctypes.Structure):
    """`Attend` of kernels/decoder.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("query", "keys", "values", "new_keys", "new_values", "bias", "out")),
        *((name, ctypes.c_int64) for name in (*PAST[2:], "heads", "group", "width")),
        ("scaling", ctypes.c_float),
    )


class _Plan(Program):
    """The structs of all steps of all blocks for one token of so many texts."""

    def __init__(self, decoder: Decoder, key: tuple[Any, ...], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__(key, key[1], key[0])
        self.texts, self._masked, self._pruned = shapes[0][0], bool(key[2]), bool(key[3])
        of_all = [module for module in decoder.modules() if module is not decoder]
        for module in of_all:
            if module._modules:
                self.within(module._modules)
        self.hooks = [each for at in of_all for each in (at._forward_hooks, at._forward_pre_hooks)]
        self.parameters = list(decoder.parameters())
        found = [parts_of(block) for block in decoder.blocks]
        self.parts = [parts for parts in found if parts is not None]
        attentions: list[Any] = [getattr(block, "self_attn", None) for block in decoder.blocks]
        self._config: Any = getattr(attentions[0], "config", None) if attentions else None
        alike = bool(found) and len(found) == len(self.parts) and all(at.config is self._config for at in attentions)
        alike &= not any("forward" in module.__dict__ for module in of_all)  # what was put in place of a class's own
        self.possible &= alike and len({parts.place for parts in self.parts}) == len(self.parts)
        if self.possible:
            self._add_all(shapes)

    def attended(self, given: Sequence[Tensor], mask: Tensor | None, cache: Any) -> Tensor | None:
        """All blocks, in order; None where their attention is another, or cannot be computed from such a cache."""
        if self._config._attn_implementation not in (PRUNED if self._pruned else DENSE):
            return None
        rooms: list[Any] | None = [None] * len(self.parts) if cache is None else self._rooms(cache)
        if rooms is None:
            return None
        past = [(0,) * len(PAST) if room is None else room.pointers() for room in rooms]
        bias = None if mask is None else self._bias(mask, {0 if room is None else room.tokens for room in rooms})
        if mask is not None and bias is None:
            return None
        x = given[0]
        found = x.new_empty(x.shape)
        fresh = x.new_empty(self._fresh)
        apart = fresh.stride(0) * fresh.element_size()
        pointers = [t.data_ptr() for t in (*given, found)]
        pointers += [] if bias is None else [bias.data_ptr()]
        pointers += range(fresh.data_ptr(), fresh.data_ptr() + apart * len(fresh), apart)
        pointers += [number for each in past for number in each]
        self.start(pointers, x)
        if cache is not None:
            mine = fresh.unbind()
            for parts, key, value, room in zip(self.parts, mine[::2], mine[1::2], rooms, strict=True):
                if room is None:
                    cache.update(key, value, parts.place)
                else:
                    room.grown(cache.layers[parts.place])
        return found

    def _rooms(self, cache: Any) -> list[Any] | None:
        """Where each block's keys and values are, with room for more, if there are any; None for another cache."""
        if not _is(cache, "DynamicCache") or cache.offloading:
            return None
        found: list[Any] = []
        for parts in self.parts:
            layer: Any = cache.layers[parts.place] if parts.place < len(cache.layers) else None
            if self._pruned:
                found.append(layer.in_one_call() if hasattr(layer, "in_one_call") else None)
                if found[-1] is None or not self._takes(*found[-1].held):
                    return None
            elif layer is None or (_is(layer, "DynamicLayer") and (not layer.is_initialized or not layer.keys.numel())):
                found.append(None)
            elif _is(layer, "DynamicLayer") and self._takes(layer.keys, layer.values):
                found.append(Room.of(layer))
            else:
                return None
        return found

    def _takes(self, keys: Tensor, values: Tensor) -> bool:
        """Whether keys and values are such as would be added to them."""
        texts, heads, _, width = self._fresh[1:]
        shape = texts, heads, keys.shape[2] if keys.dim() == 4 else 0, width
        for t in (keys, values):
            if t.dtype is not self.dtype or not t.is_cpu or t.is_neg() or t.shape != shape:
                return False
        return not learns(keys, values)

    def _bias(self, mask: Tensor, tokens: set[int]) -> Tensor | None:
        """What is added to the scores of each text, [texts, tokens and the new one]; None for another mask."""
        if len(tokens) > 1 or not isinstance(mask, Tensor) or mask.shape[1:] != (1, 1, 1 + tokens.pop()):
            return None
        if len(mask) not in (1, self.texts) or not mask.is_cpu:
            return None
        row = bias_of(mask, mask.shape[3])
        assert row is not None, "there is a mask"
        return row.float().expand(self.texts, -1).contiguous() if row.is_floating_point() else None

    def _add_all(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """The steps of all blocks, and what is between them."""
        x, *angles = (self.value(shape) for shape in shapes)
        bias = [self.value(())] if self._masked else []
        state, more = x, None  # what goes through all blocks, and what is still to be added to it
        fresh, past = list[int](), list[int]()
        for parts in self.parts:
            for layer in (*parts.linear, *parts.gated.layers):
                assert isinstance(layer, SparseLinear)
                self.take(layer)
            state, normed = self._add_norm(parts.first, state, more)
            each = [self.add_product(layer, normed) for layer in parts.linear[:3]]
            of = {name: self.value(()) for name in (*PAST, *(PACKED if self._pruned else ()))}
            found = self._add_attention(parts, each, angles, of, bias)
            state, normed = self._add_norm(parts.second, state, self.add_product(parts.linear[3], found))
            layers: Any = parts.gated.layers
            more = self.add_steps(parts.gated.steps, layers, [normed])[parts.gated.outputs[0]]
            fresh += each[1:]
            past += of.values()
        state, _ = self._add_norm(None, state, more)
        first = self.parts[0]
        self._fresh = (len(fresh), self.texts, first.linear[1].packed.shape[0] // first.width, 1, first.width)
        self.possible &= len({self.shapes[value] for value in fresh}) == len({parts.width for parts in self.parts}) == 1
        self.possible &= self.shapes[state] == shapes[0]
        if self.possible:
            self.lay_out([x, *angles, state, *bias, *fresh, *past])

    def _add_norm(self, norm: nn.Module | None, state: int, more: int | None) -> tuple[int, int]:
        """What is added to a state, and the norm of it, if there is one: the state that goes on, and the normed."""
        shape = self.shapes[state]
        call, values, normed = Normalize(rows=self.texts, width=shape[-1]), {"x": state}, -1
        if more is not None:
            self.possible &= self.shapes[more] == shape
            values |= {"more": more, "sum": self.value(shape)}
        if norm is not None:
            self._weigh(call, norm)
            normed = values["y"] = self.value(shape)
        self.step(f"normalize_{VALUES[self.dtype]}", call, self.texts, **values)
        return values.get("sum", state), normed

    def _add_attention(
        self, parts: Parts, each: Sequence[int], angles: Sequence[int], past: Mapping[str, int], bias: Sequence[int]
    ) -> int:
        """From queries, keys and values, turned by angles as they lie, to what they find."""
        heads = [self.shapes[value][-1] // parts.width for value in each]
        called = VALUES[self.dtype]
        for value, count, norm in zip(each[:2], heads, parts.heads or (None, None), strict=False):
            if norm is not None:
                normalize = Normalize(rows=self.texts * count, width=parts.width)
                self._weigh(normalize, norm)
                self.step(f"normalize_{called}", normalize, self.texts * count, x=value, y=value)
            apart = parts.width if self.shapes[angles[0]][0] > 1 else 0
            self.possible &= self.shapes[angles[0]][-1] == parts.width
            rotate = Rotate(heads=count, width=parts.width, apart=apart)
            self.step(f"rotate_{called}", rotate, self.texts, x=value, cos=angles[0], sin=angles[1])
        items = self.texts * heads[1]
        sizes = {"heads": heads[1], "group": parts.group, "width": parts.width, "scaling": parts.scaling}
        found = self.value(self.shapes[each[0]])
        asked = {"query": each[0], "out": found, **({"bias": bias[0]} if bias else {})}
        grows = {"new_keys": each[1], "new_values": each[2], **{name: past[name] for name in PAST}}
        if self._pruned:
            packed = {name: past[name] for name in ("keys", "values", *PACKED)}
            self.step(f"append_{called}", Attend(**sizes), items, **grows)
            self.step(f"bitmap_kv_attend_{called}", BitmapKV(**sizes), items, **asked, **packed)
        else:
            self.step(f"attend_{called}", Attend(**sizes), items, **asked, **grows)
        return found

    def _weigh(self, call: Normalize, norm: nn.Module) -> None:
        """The weight of a norm, whatever its numbers become."""
        weight: Any = norm.weight
        plain = weight.dtype is self.dtype and weight.is_cpu and weight.is_contiguous() and not weight.is_neg()
        self.possible &= plain and weight.shape == (call.width,)
        self.point(norm._parameters)
        call.weight, call.epsilon = weight.data_ptr(), norm.variance_epsilon


@dataclass
class Room:
    """Keys and values that a layer of a cache has, and memory behind them, so that they are not copied for each token.

    What lies behind them is written once: who holds fewer of them, such as a cache that was cut back, gets a room of
    its own when it grows, since others may have what was there.
    """

    keys: Tensor  # [texts, heads, room, width]
    values: Tensor
    tokens: int

    @classmethod
    def of(cls, layer: Any, most: int = 0) -> "Room":
        """The room of a layer, made where it has none, or no more: for `most` tokens, or a quarter more than it has."""
        keys, values, tokens = layer.keys, layer.values, layer.keys.shape[2]
        found: Room | None = getattr(layer, ROOM, None)
        if found is not None and found.tokens == tokens < found.keys.shape[2]:
            alike = (found.keys.data_ptr(), found.values.data_ptr()) == (keys.data_ptr(), values.data_ptr())
            if alike and found.keys.stride() == keys.stride() and found.values.stride() == values.stride():
                return found
        shape = (*keys.shape[:2], max(most, tokens + 1) if most else tokens + max(MORE, tokens // 4), keys.shape[3])
        made = cls(empty(shape, keys), empty(shape, values), tokens)
        made.keys.narrow(2, 0, tokens).copy_(keys)
        made.values.narrow(2, 0, tokens).copy_(values)
        setattr(layer, ROOM, made)
        return made

    def pointers(self) -> tuple[int, ...]:
        """What `PAST` says of it."""
        strides = *self.keys.stride()[:2], *self.values.stride()[:2]
        return self.keys.data_ptr(), self.values.data_ptr(), self.tokens, *strides, 1

    def grown(self, layer: Any) -> None:
        """A token is added, as the kernel wrote it."""
        self.tokens += 1
        layer.keys, layer.values = self.keys.narrow(2, 0, self.tokens), self.values.narrow(2, 0, self.tokens)


def _is(value: Any, name: str) -> bool:
    """Whether it is of this class of transformers, and of none that is made from it."""
    return (type(value).__module__, type(value).__qualname__) == ("transformers.cache_utils", name)
