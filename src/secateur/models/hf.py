"""What is particular to Hugging Face models: finding the class, building one empty, fitting a config to its shapes.

Which config number rules which dimension is not written down per architecture: each number is changed in turn on a
model without storage, and the dimensions that move say what it rules.
"""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError, did_you_mean
from secateur.models.folder import Entry, few
from secateur.task import modes_of, restore_modes_

Shapes = dict[str, tuple[int, ...]]

# In the order in which they may explain a change: a cut of heads before one of the size of each head.
LAYERS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "encoder_layers",
    "decoder_layers",
)
WIDTHS = (
    "hidden_size",
    "n_embd",
    "d_model",
    "intermediate_size",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
    "n_inner",
    "d_ff",
    "ffn_dim",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "num_attention_heads",
    "num_key_value_heads",
    "num_heads",
    "n_head",
    "encoder_attention_heads",
    "decoder_attention_heads",
    "head_dim",
    "d_kv",
    "vocab_size",
)
_COUNT = re.compile(r"layer|depth|block|stage", re.IGNORECASE)
_UNDERSTOOD = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention", "batched_mm", "grouped_mm")


def transformers() -> Any:
    """The transformers package. Raises ModelError when it is not installed."""
    try:
        import transformers as found
    except ImportError as error:
        raise ModelError(
            "a Hugging Face model was asked for", "transformers is not installed", "pip install 'secateur[hf]'"
        ) from error
    return found


def is_hf(model: nn.Module) -> bool:
    """Whether a model is one of transformers' own classes, with a config."""
    return type(model).__module__.startswith("transformers.") and hasattr(model, "config")


def refuse_code(config: Mapping[str, Any], where: Path) -> None:
    """Raise ModelError for a config that names code, or kernels to download."""
    asked = f"the config {where} was to be used"
    for path, key, value in _walk(config):
        if key in ("auto_map", "custom_pipelines") and value:
            raise ModelError(
                asked,
                f"its {path} asks for code of its own to be run",
                "secateur never runs code out of a folder: use a model that transformers knows.",
            )
        if key.endswith(("attn_implementation", "experts_implementation")) and value not in (None, *_UNDERSTOOD):
            raise ModelError(asked, f"its {path} names kernels to be fetched: {value!r}", "Take that line out.")


def refuse_absurd(config: Mapping[str, Any], tensors: int, where: Path) -> None:
    """Raise ModelError for more layers than there are tensors to fill them: building them would never end."""
    for path, key, value in _walk(config):
        sizes = value if isinstance(value, list) else [value]
        for size in sizes:
            whole = isinstance(size, int) and not isinstance(size, bool)
            if whole and _COUNT.search(key) and abs(size) > 64 + tensors:
                raise ModelError(
                    f"the config {where} was to be used",
                    f"its {path} is {size:,} and the weights are {tensors} tensors",
                    "The folder is damaged: get it again.",
                )


def _walk(value: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str, Any]]:
    for key, inner in value.items():
        here = f"{path}{key}"
        yield here, str(key), inner
        if isinstance(inner, Mapping):
            yield from _walk(inner, f"{here}.")


def config_from(values: Mapping[str, Any], where: Path) -> Any:
    """A config object of transformers' own class for its model_type. Raises ModelError when it cannot be."""
    mapping = transformers().models.auto.configuration_auto.CONFIG_MAPPING
    kind = values.get("model_type")
    if not isinstance(kind, str) or kind not in mapping:
        raise ModelError(
            f"the config {where} was to be used",
            f"its model_type is {kind!r}, which transformers {transformers().__version__} does not know",
            did_you_mean(str(kind), list(mapping.keys())) if kind else "Give a folder of a Hugging Face model.",
        )
    try:
        return mapping[kind].from_dict(copy.deepcopy(dict(values)))
    except Exception as error:  # transformers raises a class of its own for each field that does not validate
        raise ModelError(
            f"the config {where} was to be used", f"{kind} does not take it: {one_line(error)}", "Get the folder again."
        ) from error


def class_for(config: Any, where: Path | str) -> Any:
    """The model class a config's `architectures` names, or the automatic one for its type."""
    hub = transformers()
    for name in getattr(config, "architectures", None) or ():
        found = getattr(hub, name, None) if isinstance(name, str) and name.isidentifier() else None
        if _fits(found, config):
            return found
    for auto in ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForImageClassification", "AutoModel"):
        mapping = getattr(hub, auto)._model_mapping
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise ModelError(
        f"a model was to be opened from {where}",
        f"transformers has no class for {getattr(config, 'architectures', None)}",
        "Name one of transformers' own classes under architectures in config.json.",
    )


def class_named(name: object, config: Any, where: Path) -> Any:
    """The model class of transformers of a name, for a config. Raises ModelError when they do not belong together."""
    hub = transformers()
    found = getattr(hub, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not _fits(found, config):
        raise ModelError(
            f"a model was to be built from {where}",
            f"{name!r} is no model class of transformers for a {type(config).__name__}",
            "Get the folder again.",
        )
    return found


def _fits(found: Any, config: Any) -> bool:
    """Whether something is a model class of transformers that takes this config."""
    model = transformers().PreTrainedModel
    return isinstance(found, type) and issubclass(found, model) and getattr(found, "config_class", None) is type(config)


@contextmanager
def _uninitialised() -> Iterator[None]:
    transformers()
    from transformers.initialization import no_init_weights  # type: ignore[import-untyped,unused-ignore]

    with no_init_weights():
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and load reports on the terminal: what they say is checked, and raised, by us."""
    log = transformers().utils.logging
    bars, level = log.is_progress_bar_enabled(), log.get_verbosity()
    log.disable_progress_bar()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


def skeleton(kind: Any, config: Any) -> nn.Module:
    """A model without storage: shapes only."""
    with quiet(), _uninitialised(), torch.device("meta"):
        model = kind(copy.deepcopy(config))
    model.tie_weights()
    return model


def empty(kind: Any, config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A model with storage and no values yet; buffers that are computed, not stored, are right."""
    config = copy.deepcopy(config)
    config.dtype = dtype
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with quiet(), _uninitialised():
            model = kind(config).eval()
        model.tie_weights()
        return model
    except RuntimeError as error:  # not enough memory
        raise ModelError(
            f"a {kind.__name__} was to be built", f"torch refused: {one_line(error)}", "Use a machine with more memory."
        ) from error
    finally:
        torch.set_default_dtype(before)


def cast_(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Give every stored floating-point tensor a dtype, as stock loaders do; the same model.

    Tables that are computed (rotary frequencies) keep their precision, which `model.to(dtype)` would take away.
    """
    lasting = set(model.state_dict())
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name in lasting and buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)
    if hasattr(model, "config"):
        model.config.dtype = dtype
    return model


def fill_(model: nn.Module, values: Mapping[str, Tensor], aliases: Mapping[str, str]) -> None:
    """Give a model its tensors, which become its own storage, and tie what was tied. Names are exact."""
    model.load_state_dict({**values, **{alias: values[name] for alias, name in aliases.items()}}, assign=True)
    for alias, name in aliases.items():
        owner, _, attribute = alias.rpartition(".")
        source, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), attribute, getattr(model.get_submodule(source), key))


def aliases_of(model: nn.Module) -> dict[str, str]:
    """Names of tensors that are another's by a second name -> the first name."""
    first: dict[tuple[Any, ...], str] = {}
    found = {}
    for name, value in model.state_dict(keep_vars=True).items():
        identity = id(value) if value.is_meta or not value.numel() else (value.data_ptr(), value.shape, value.stride())
        if identity in first:
            found[name] = first[identity]
        first.setdefault(identity, name)  # type: ignore[arg-type]
    return found


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What goes into a file: every parameter and lasting buffer, tied ones once, each contiguous."""
    second = aliases_of(model)
    return {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items() if name not in second}


def shapes_of(model: nn.Module) -> Shapes:
    """Every stored tensor's shape, tied ones under each name."""
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def entries_of(model: nn.Module, without: Mapping[str, str]) -> dict[str, Entry]:
    """Every stored tensor's shape and dtype, but for second names."""
    return {
        name: Entry(tuple(value.shape), value.dtype)
        for name, value in model.state_dict().items()
        if name not in without
    }


# Layers that let everything pass


def is_passing(module: nn.Module) -> bool:
    """Whether a module hands on what it gets: an identity, by any of the names the library gives it."""
    return isinstance(module, nn.Identity) or bool(getattr(module, "passes_through", False))


def kept_layers(model: nn.Module, whole: nn.Module) -> dict[str, list[int]]:
    """Lists of layers that got shorter, or have layers that let everything pass -> the layers that still work."""
    found = {}
    for path, layers in whole.named_modules():
        if not isinstance(layers, nn.ModuleList):
            continue
        try:
            now = model.get_submodule(path)
        except AttributeError:
            continue
        if not isinstance(now, nn.ModuleList):
            continue
        if len(now) < len(layers):
            found[path] = _original_numbers(now, len(layers))
        elif len(now) == len(layers) and any(
            is_passing(m) and not is_passing(n) for m, n in zip(now, layers, strict=True)
        ):
            found[path] = [i for i, m in enumerate(now) if not is_passing(m)]
    return found


def _original_numbers(layers: nn.ModuleList, many: int) -> list[int]:
    """Where the layers of a shortened list stood: from what they say of themselves, else the first ones."""
    said = []
    for layer in layers:
        numbers = (getattr(module, "layer_idx", None) for module in layer.modules())
        said.append(next((n for n in numbers if isinstance(n, int)), -1))
    rising = all(0 <= a < b for a, b in zip(said, [*said[1:], many], strict=True))
    return said if said and rising else list(range(len(layers)))


def renumbered(name: str, kept: Mapping[str, Sequence[int]], shortened: Sequence[str] = ()) -> str | None:
    """A tensor's name once passing layers are gone; None for a tensor of one that is. Shortened lists are done."""
    for path, layers in kept.items():
        if path in shortened or not name.startswith(f"{path}."):
            continue
        number, _, rest = name[len(path) + 1 :].partition(".")
        if number.isdigit():
            return f"{path}.{layers.index(int(number))}.{rest}" if int(number) in layers else None
    return name


# A config true to the shapes


def fit_config(kind: Any, config: Any, target: Shapes, kept: Mapping[str, Sequence[int]]) -> tuple[Any | None, str]:
    """A config with which the stock class has these shapes, or None and why there is none.

    The stock class may have biases that the shapes have not, since one number switches on several: they are zero.
    """
    why = "no config number explains the shapes"
    for sizes_last in (True, False):
        fitted, why_not = _fit(kind, copy.deepcopy(config), target, kept, sizes_last)
        if fitted is not None:
            return fitted, ""
        why = why_not if sizes_last else why
    return None, why


def _fit(
    kind: Any, config: Any, target: Shapes, kept: Mapping[str, Sequence[int]], sizes_last: bool
) -> tuple[Any, str]:
    invented = _spell_out(kind, config)
    if kept and not _fit_layers(kind, config, kept):
        return None, f"no config number gives the layers {few(kept)} their count"
    now = _with_biases(kind, config, shapes_of(skeleton(kind, config)), target)
    if now != target:
        order = sorted(WIDTHS, key=lambda k: (k in ("head_dim", "d_kv")) is sizes_last)
        for key in order:
            size = getattr(config, key, None)
            if not isinstance(size, int) or isinstance(size, bool) or size < 1 or now == target:
                continue
            slopes = _slopes(kind, config, key, size, now)
            wanted = _explained(slopes, now, target)
            if wanted is None or wanted == 0 or size + wanted < 1:
                continue
            setattr(config, key, size + wanted)
            try:
                config.validate() if hasattr(config, "validate") else None
                now = shapes_of(skeleton(kind, config))
            except Exception as error:  # each architecture has its own rules, and its own exceptions
                return None, f"{type(config).__name__} refuses {key}={size + wanted}: {one_line(error)}"
    needed = {n: s for n, s in now.items() if n in target or not n.endswith(".bias")}
    if needed != target:
        return None, _mismatch(needed, target)
    for key, value in invented.items():  # what was spelled out and turned out not to matter goes again
        heads = getattr(config, "num_attention_heads", 0)
        width = getattr(config, "hidden_size", 0)
        if key == "head_dim" and getattr(config, key) == value and heads and width == value * heads:
            if hasattr(type(config), key):
                setattr(config, key, None)
            else:
                delattr(config, key)
    return config, ""


def _with_biases(kind: Any, config: Any, now: Shapes, target: Shapes) -> Shapes:
    """Switch on the biases that were added to a model; those that come along with them are left to be zero."""
    for flag in [k for k, v in vars(config).items() if v is False and "bias" in k]:
        if not any(name.endswith(".bias") for name in target.keys() - now.keys()):
            break
        tried = copy.deepcopy(config)
        setattr(tried, flag, True)
        found = shapes_of(skeleton(kind, tried))
        if len(target.keys() - found.keys()) < len(target.keys() - now.keys()):
            setattr(config, flag, True)
            now = found
    return now


def _spell_out(kind: Any, config: Any) -> dict[str, Any]:
    """Write down sizes that follow from others when left out, so that they stay when the others change."""
    invented = {}
    heads, width = getattr(config, "num_attention_heads", None), getattr(config, "hidden_size", None)
    defaults = {
        "head_dim": width // heads if isinstance(heads, int) and heads and isinstance(width, int) else None,
        "num_key_value_heads": heads,
        "n_inner": 4 * getattr(config, "n_embd", 0) or None,
    }
    before = shapes_of(skeleton(kind, config))
    for key, value in defaults.items():
        if hasattr(config, key) and getattr(config, key) is None and value is not None:
            setattr(config, key, value)
            if shapes_of(skeleton(kind, config)) == before:
                invented[key] = value
            else:
                setattr(config, key, None)
    # Some configs know no head_dim, and their classes read one all the same: it must then be told, and not guessed.
    if not hasattr(config, "head_dim") and (value := defaults["head_dim"]) is not None:
        config.head_dim = 2 * value
        try:
            read = shapes_of(skeleton(kind, config)) != before
        except Exception:  # it is read, and does not fit: not a number to change
            read = False
        if read:
            config.head_dim = invented["head_dim"] = value
        else:
            del config.head_dim
    return invented


def _fit_layers(kind: Any, config: Any, kept: Mapping[str, Sequence[int]]) -> bool:
    def lists(of: nn.Module) -> dict[str, int]:
        return {path: len(m) for path, m in of.named_modules() if isinstance(m, nn.ModuleList) and path in kept}

    whole = lists(skeleton(kind, config))
    fitted = set()
    for key in LAYERS:
        size = getattr(config, key, None)
        if (
            not isinstance(size, int)
            or size < 1
            or not isinstance(getattr(type(config), key, None), (int, property, type(None)))
        ):
            continue
        for path in kept:
            if path in fitted or whole.get(path) != size:
                continue
            tried = copy.deepcopy(config)
            _shorten(tried, key, size, list(kept[path]))
            try:
                found = lists(skeleton(kind, tried))
            except Exception:  # a number that cannot be changed alone is not the one
                continue
            if found.get(path) == len(kept[path]):
                _shorten(config, key, size, list(kept[path]))
                fitted |= {p for p in kept if found.get(p) == len(kept[p])}
                whole = found
    return fitted == set(kept)


def _shorten(config: Any, key: str, size: int, layers: Sequence[int]) -> None:
    setattr(config, key, len(layers))
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == size and "layer" in name:
            setattr(config, name, [value[i] for i in layers])


def _slopes(kind: Any, config: Any, key: str, size: int, now: Shapes) -> dict[tuple[str, int], Fraction]:
    """Dimension -> by how much it grows when a config number grows by one."""
    for other in (2 * size, 3 * size, size // 2, size + 1, 1):
        if other < 1 or other == size:
            continue
        tried = copy.deepcopy(config)
        try:
            setattr(tried, key, other)
            found = shapes_of(skeleton(kind, tried))
        except Exception:  # numbers that do not divide; another is tried
            continue
        if found.keys() != now.keys() or any(len(found[n]) != len(now[n]) for n in now):
            continue
        return {
            (name, axis): Fraction(found[name][axis] - now[name][axis], other - size)
            for name in now
            for axis in range(len(now[name]))
            if found[name][axis] != now[name][axis]
        }
    return {}


def _explained(slopes: Mapping[tuple[str, int], Fraction], now: Shapes, target: Shapes) -> int | None:
    """The one change of a number that brings every dimension it rules to where it should be."""
    wanted = set()
    for (name, axis), slope in slopes.items():
        if name not in target and name.endswith(".bias"):
            continue  # it will be zero, of whatever length
        if name not in target or len(target[name]) != len(now[name]):
            return None
        wanted.add(Fraction(target[name][axis] - now[name][axis]) / slope)
    if len(wanted) != 1:
        return None
    change = wanted.pop()
    return int(change) if change.denominator == 1 else None


def _mismatch(stock: Shapes, target: Shapes) -> str:
    missing, extra = stock.keys() - target.keys(), target.keys() - stock.keys()
    if missing:
        return f"stock layers also have {few(missing)}"
    if extra:
        return f"stock layers have no {few(extra)}"
    for name, shape in target.items():
        if stock[name] != shape:
            return f"layers differ in shape: {name} is {list(shape)} where one config gives {list(stock[name])}"
    return ""


# A small input


def example_hint(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The names and shapes of a small input, from a model's config; empty when it does not say."""
    config = getattr(model, "config", None)
    main = getattr(model, "main_input_name", None)
    if config is None or main is None:
        return {}
    if main == "pixel_values":
        size = getattr(config, "image_size", 32)
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        return {main: (1, getattr(config, "num_channels", 3), high, wide)}
    if main == "input_ids":
        shapes: dict[str, tuple[int, ...]] = {main: (1, 8)}
        sees = getattr(config, "vision_config", None)
        if getattr(config, "model_type", None) == "clip" and sees is not None:  # a tower for pictures, one for text
            shapes["pixel_values"] = (1, sees.num_channels, sees.image_size, sees.image_size)
        if getattr(config, "is_encoder_decoder", False):
            shapes["decoder_input_ids"] = (1, 6)
        return shapes
    return {}


def example_inputs(model: nn.Module) -> dict[str, Tensor]:
    """A small input with fixed values; empty when the config does not say what one looks like."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)
    first = next(model.parameters())
    for name, shape in example_hint(model).items():
        if name == "pixel_values":
            value = torch.randn(shape, generator=generator).to(first.dtype)
        else:
            text = getattr(model.config, "text_config", model.config)
            value = torch.randint(0, max(2, int(getattr(text, "vocab_size", 2))), shape, generator=generator)
        made[name] = value.to(first.device)
    return made


def answer(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """The first tensor a model says to an input, in evaluation."""
    modes = modes_of(model)
    model.eval()
    try:
        with torch.no_grad():
            out = model(**inputs, **({"use_cache": False} if "input_ids" in inputs and _caches(model) else {}))
    finally:
        restore_modes_(model, modes)
    found = getattr(out, "logits", None)
    if found is None:
        found = getattr(out, "last_hidden_state", None)
    if found is None:
        found = out[0] if not isinstance(out, Tensor) else out
    assert isinstance(found, Tensor), "a model of transformers answers with a tensor"
    return found.float()


def _caches(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "use_cache", False))


def one_line(error: BaseException) -> str:
    """What an exception says, on one line and not too long."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines)[:300] or type(error).__name__
