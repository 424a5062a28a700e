"""Decoders built as Llama is, whatever the width of each layer: what run-times with code of their own can take."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.cut import Passing
from secateur.graph.head_dims import RotaryAttention
from secateur.models import hf

KINDS = ("llama", "mistral", "qwen2")
"""Families whose layers are the same but for biases."""

ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Layer:
    """The sizes of one layer."""

    heads: int
    kv_heads: int
    width: int  # of the feed-forward part


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers that do something."""
    return [layer for layer in model.get_submodule("model.layers").children() if not isinstance(layer, Passing)]


def shapes(model: nn.Module) -> list[Layer]:
    """The sizes of every layer, read from its matrices."""
    each = head_size(model)
    return [_sizes(layer, each) for layer in layers_of(model)]


def _sizes(layer: nn.Module, each: int) -> Layer:
    heads, kv_heads = (rows(layer, f"self_attn.{name}") // each for name in ("q_proj", "k_proj"))
    return Layer(heads, kv_heads, rows(layer, "mlp.gate_proj"))


def per_layer_config(model: nn.Module, config: Any) -> dict[int, dict[str, Any]]:
    """In what each layer differs from a config, in the words of transformers' `per_layer_config`; nothing if in none.

    transformers 5 keeps such a table, but its classes still build every layer from the one number of the config: it
    says what the sizes are to whoever builds them. Nothing for models that are not built as Llama is.
    """
    if why_not(model):
        return {}
    each, found = head_size(model), {}
    for place, layer in enumerate(model.get_submodule("model.layers").children()):
        sizes = Layer(0, 0, 0) if isinstance(layer, Passing) else _sizes(layer, each)
        said: dict[str, Any] = {}
        if sizes.heads:
            said |= {"num_attention_heads": sizes.heads, "num_key_value_heads": sizes.kv_heads}
        if sizes.width:
            said |= {"intermediate_size": sizes.width}
        said = {name: size for name, size in said.items() if getattr(config, name, None) != size}
        gone = [name for name, size in (("attention", sizes.heads), ("mlp", sizes.width)) if not size]
        if said or gone:
            found[place] = said | ({"skip": gone} if gone else {})
    return found


def head_size(model: nn.Module) -> int:
    """The dimensions of one head."""
    config: Any = model.config
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def rows(layer: nn.Module, name: str) -> int:
    """The outputs of a linear map in a layer, 0 where it is gone."""
    try:
        found: Any = layer.get_submodule(name)
    except AttributeError:
        return 0
    return found.weight.shape[0] if isinstance(getattr(found, "weight", None), Tensor) else 0


def why_not(model: nn.Module) -> str:
    """Why a model is not built as Llama is, or nothing."""
    if not hf.is_hf(model):
        return f"{type(model).__name__} is no model of transformers"
    config: Any = model.config
    kind = config.model_type
    if kind not in KINDS or not type(model).__name__.endswith("ForCausalLM"):
        return f"{type(model).__name__} is not built as Llama is; {', '.join(KINDS)} are"
    if config.hidden_act != "silu":
        return f"its activation is {config.hidden_act}, and Llama's is silu"
    layer_types = set(getattr(config, "layer_types", None) or ())
    if "sliding_attention" in layer_types or (getattr(config, "sliding_window", None) and kind == "mistral"):
        return "some of its layers see a sliding window only"
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") not in ("default", "linear", "llama3"):
        return f"its positions are scaled by {rope['rope_type']!r}, and default, linear and llama3 can be written down"
    each = head_size(model)
    for place, layer in enumerate(layers_of(model)):
        said = _strange(layer, each)
        if said:
            return f"layer {place}: {said}"
    return ""


def _strange(layer: nn.Module, each: int) -> str:
    """What in a layer is not as in Llama's, or nothing."""
    linear = {f"self_attn.{n}" for n in ATTENTION} | {f"mlp.{n}" for n in FEED_FORWARD}
    known = linear | {"input_layernorm", "post_attention_layernorm", "self_attn", "mlp", "mlp.act_fn", ""}
    extra = [name for name, _ in layer.named_modules() if name not in known]
    if extra:
        return f"it has {extra[0]}, which Llama's layers have not"
    for name in linear:
        try:
            module = layer.get_submodule(name)
        except AttributeError:
            return f"its {name} is gone, with what was around it"
        if not isinstance(module, nn.Linear):
            return f"its {name} is a {type(module).__name__}"
    if isinstance(layer.get_submodule("self_attn"), RotaryAttention):
        return "dims of its heads may be gone, which would be taken for heads"
    query, key, value = (rows(layer, f"self_attn.{n}") for n in ("q_proj", "k_proj", "v_proj"))
    if query % each or key % each or key != value:
        return f"its heads are not of {each} dimensions: queries {query}, keys {key}, values {value}"
    if query and (not key or query % key):
        return f"its {query // each} query heads do not share {key // each} key heads evenly"
    return ""


def rotary_order(value: Tensor, heads: int) -> Tensor:
    """Rows of queries or keys in the order in which neighbours turn together.

    transformers turns the first half of a head against the second, and run-times of the first Llama pairs of rows.
    """
    if not heads:
        return value
    return value.reshape(heads, 2, -1, *value.shape[1:]).transpose(1, 2).reshape(value.shape)


def rotary_factors(model: nn.Module) -> Tensor | None:
    """By what each frequency of the positions was divided; None where they are the plain ones."""
    config: Any = model.config
    own = model.get_buffer("model.rotary_emb.inv_freq").float()
    rope = getattr(config, "rope_parameters", None) or {}
    each = head_size(model)
    plain = 1 / rope.get("rope_theta", 10000.0) ** (torch.arange(0, each, 2, dtype=torch.float32) / each)
    factors = plain / own.cpu()
    return None if torch.allclose(factors, torch.ones_like(factors), rtol=1e-4) else factors
