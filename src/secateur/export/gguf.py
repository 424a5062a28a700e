"""A file for llama.cpp: one width for all layers as architecture `llama`, widths of their own as `deci`.

`deci` was made for networks found by search, and takes the number of heads, of key heads and the feed-forward width of
each layer. Its traps: a layer whose width is 0 is passed over whole, attention and all, so that it gets a narrow one of
zeros; it knows no norm of queries and keys; and rows of queries and keys stand in the order of the first Llama.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.errors import ExportError
from secateur.export.exporting import answer, in_float32, missing
from secateur.export.sparse import int8_of
from secateur.models import Opened, hf, llama_shaped

BLOCK = 32
"""Numbers that share a scale in llama.cpp's 8-bit form; a width of zeros is one block."""

EXACT = 2e-3
"""How far answers in float32 may be from the model's, as a share of their length."""

ROUNDED = 0.5
"""The same in 16 and 8 bits, where a twin in float32 has agreed: beyond it what is said is another thing."""

TWIN = 1_000_000_000
"""Numbers up to which a twin in float32 is written."""

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
SPLITS = {LLAMA3: "llama-bpe", LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}"): "qwen2"}
"""How text is split before merging -> the name llama.cpp has for it."""

SAMPLE = "Pruned: it's 2,048 tokens, naïve café — 東京, def f(x):\n\treturn x**2  # ok 👍\n\n"
"""What both tokenizers must cut alike: digits, accents, other scripts, code, spaces."""

NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""What llama.cpp calls the kinds of tokens."""


@dataclass(frozen=True)
class Form:
    """The export to llama.cpp."""

    suffix: str = ".gguf"

    def need(self) -> None:
        """See Target."""
        _gguf()

    def runtime(self) -> str:
        """See Target."""
        return f"llama.cpp (llama-cpp-python {_llama().__version__})"

    def why_not(self, model: nn.Module) -> str:
        """See Target."""
        if why := llama_shaped.why_not(model):
            return why
        found = llama_shaped.shapes(model)
        return "its first layer has no attention, which llama.cpp does not take" if not found[0].heads else ""

    def write(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[str]:
        """See Target."""
        return _written(opened, path, _encoded)

    def answers(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        """See Target. Keys and values are kept in float32, which by default they are not.

        Of a file in 16 or 8 bits a twin is tried as well that holds the very same numbers in float32: it has to agree
        as closely as any, so that all that the file itself is off by is what llama.cpp rounds on the way.
        """
        if _narrow(path) and _counts(path) <= TWIN:
            twin = path.with_name(path.name + ".float32")
            _written(opened, twin, _widened)
            for said, given in zip(self._tried(opened, twin, probes), probes, strict=True):
                off = _off(said, answer(in_float32(opened.model), given).cpu())
                if not off <= EXACT:
                    raise ExportError(
                        f"{opened.source} was to be exported for llama.cpp",
                        f"the same numbers in float32 answer otherwise there, by {off:.2g} of their length",
                        "Nothing was left there. Report this, with the recipe of the model.",
                    )
            twin.unlink()
        return self._tried(opened, path, probes)

    def _tried(self, opened: Opened, path: Path, probes: Sequence[Mapping[str, Tensor]]) -> list[Tensor]:
        most = max(probe["input_ids"].shape[1] for probe in probes)
        with _loaded(path, most) as (model, context):
            if opened.tokenizer is not None:
                _same_tokens(model, opened)
            return [
                torch.stack([_logits(model, context, row.tolist()) for row in probe["input_ids"]]) for probe in probes
            ]

    def tolerance(self, path: Path) -> float:
        """See Target. llama.cpp rounds what flows through a layer to the precision of its weights.

        How far that takes a model in 16 or 8 bits is the model's affair, and stated as the difference: its twin in
        float32 has agreed. Where that would be too large a file, what a model that bears rounding well is off by.
        """
        if not _narrow(path):
            return EXACT
        return ROUNDED if _counts(path) <= TWIN else 0.05


def _narrow(path: Path) -> set[str]:
    """The kinds of matrices in a file that have fewer than 32 bits a number."""
    kinds = {tensor.tensor_type.name for tensor in _gguf().GGUFReader(str(path)).tensors if len(tensor.shape) > 1}
    return kinds & {"Q8_0", "F16", "BF16"}


def _counts(path: Path) -> int:
    """How many numbers a file holds."""
    return sum(int(tensor.n_elements) for tensor in _gguf().GGUFReader(str(path)).tensors)


def _off(said: Tensor, ours: Tensor) -> float:
    return float((said - ours).norm() / ours.norm().clamp(min=1e-12)) if said.shape == ours.shape else float("inf")


def _written(opened: Opened, path: Path, encoded: Callable[[Any, Tensor], tuple[np.ndarray, Any]]) -> list[str]:
    """Write a file whose tensors are encoded so; what the user should know of it."""
    gguf, model = _gguf(), opened.model
    found = llama_shaped.shapes(model)
    alike = len(set(found)) == 1 and found[0].width > 0
    writer = gguf.GGUFWriter(str(path), "llama" if alike else "deci")
    try:
        _describe(writer, opened, found, alike)
        _tokens(writer, opened, model.get_parameter("model.embed_tokens.weight").shape[0])
        kinds: dict[str, str] = {}
        for name, value in _tensors(model).items():
            data, kind = encoded(gguf, value)
            kinds[name] = kind.name
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return _notes(kinds, alike)


def _widened(gguf: Any, value: Tensor) -> tuple[np.ndarray, Any]:
    """What a tensor's bytes stand for, in float32."""
    data, kind = _encoded(gguf, value)
    plain = data if kind == gguf.GGMLQuantizationType.F32 else gguf.quants.dequantize(data, kind)
    return np.ascontiguousarray(plain, dtype=np.float32).reshape(tuple(value.shape)), gguf.GGMLQuantizationType.F32


def _notes(kinds: Mapping[str, str], alike: bool) -> list[str]:
    notes = [] if alike else ["its layers differ, so it is of the architecture deci, which takes sizes for each"]
    packed = sum(kind == "Q8_0" for kind in kinds.values())
    if packed:
        notes.append(f"{packed} matrices are kept in 8 bits (Q8_0), their row's scale rounded to float16 in each block")
    return notes


def _describe(writer: Any, opened: Opened, found: Sequence[llama_shaped.Layer], alike: bool) -> None:
    config: Any = opened.model.config
    each = llama_shaped.head_size(opened.model)
    rope = getattr(config, "rope_parameters", None) or {}
    one = found[0]
    writer.add_name(opened.name)
    writer.add_context_length(config.max_position_embeddings)
    # As it is by now: a stream that was cut may be narrower than the config says.
    writer.add_embedding_length(opened.model.get_parameter("model.embed_tokens.weight").shape[1])
    writer.add_block_count(len(found))
    writer.add_feed_forward_length(one.width if alike else [layer.width or BLOCK for layer in found])
    writer.add_head_count(one.heads if alike else [layer.heads for layer in found])
    writer.add_head_count_kv(one.kv_heads if alike else [layer.kv_heads for layer in found])
    writer.add_key_length(each)
    writer.add_value_length(each)
    writer.add_rope_dimension_count(each)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(float(config.rms_norm_eps))
    writer.add_vocab_size(opened.model.get_parameter("model.embed_tokens.weight").shape[0])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor under llama.cpp's name, as a file holds it."""
    named = model.state_dict()
    found = {
        "token_embd.weight": named["model.embed_tokens.weight"],
        "output_norm.weight": named["model.norm.weight"],
    }
    if "lm_head.weight" not in hf.aliases_of(model):
        found["output.weight"] = named["lm_head.weight"]
    factors = llama_shaped.rotary_factors(model)
    if factors is not None:
        found["rope_freqs.weight"] = factors
    for place, (layer, sizes) in enumerate(zip(llama_shaped.layers_of(model), llama_shaped.shapes(model), strict=True)):
        for name, value in _layer(layer.state_dict(), sizes).items():
            found[f"blk.{place}.{name}"] = value
    return {name: value.detach().cpu().contiguous() for name, value in found.items()}


def _layer(named: Mapping[str, Tensor], sizes: llama_shaped.Layer) -> dict[str, Tensor]:
    found = {"ffn_norm.weight": named["post_attention_layernorm.weight"]}
    turned = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.kv_heads}
    words = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down"}  # fmt: skip
    if sizes.heads:
        found["attn_norm.weight"] = named["input_layernorm.weight"]
    for name, value in named.items():
        owner, _, kind = name.rpartition(".")
        if owner not in words or (owner.startswith("self_attn") and not sizes.heads):
            continue
        value = llama_shaped.rotary_order(value, turned[owner]) if owner in turned else value
        if not sizes.width and owner.startswith("mlp") and not (owner == "mlp.down_proj" and kind == "bias"):
            shape = [BLOCK if size == 0 else size for size in value.shape]
            value = value.new_zeros(shape)  # a width of 0 would pass over the attention, too
        found[f"{words[owner]}.{kind}"] = value
    return found


def _encoded(gguf: Any, value: Tensor) -> tuple[np.ndarray, Any]:
    """A tensor's bytes and what llama.cpp calls their kind: vectors in float32, matrices as they are."""
    kinds = gguf.GGMLQuantizationType
    if value.ndim < 2:
        return value.float().numpy(), kinds.F32
    found = int8_of(value)
    if found is not None and value.shape[1] % BLOCK == 0:
        return _blocks(found.values, found.scale), kinds.Q8_0
    if value.dtype == torch.bfloat16:
        return value.view(torch.uint16).numpy().view(np.uint8), kinds.BF16
    if value.dtype == torch.float16:
        return value.numpy(), kinds.F16
    return value.float().numpy(), kinds.F32


def _blocks(values: Tensor, scale: Tensor) -> np.ndarray:
    """int8 rows with a scale each as blocks of 32, which have the scale before them: [rows, bytes]."""
    rows = values.numpy().reshape(values.shape[0], -1, BLOCK).view(np.uint8)
    before = np.broadcast_to(scale.numpy().astype(np.float16).view(np.uint8).reshape(-1, 1, 2), (*rows.shape[:2], 2))
    return np.ascontiguousarray(np.concatenate([before, rows], axis=2).reshape(values.shape[0], -1))


# The tokenizer


def _tokens(writer: Any, opened: Opened, vocabulary: int) -> None:
    tokenizer = opened.tokenizer
    if tokenizer is None:
        writer.add_tokenizer_model("no_vocab")
        return
    asked = f"the tokenizer of {opened.source} was to be written for llama.cpp"
    backend = getattr(tokenizer, "_tokenizer", None) or getattr(tokenizer, "backend_tokenizer", None)
    said = json.loads(backend.to_str()) if backend is not None else {}
    kind = said.get("model") or {}
    if kind.get("type") != "BPE":
        raise ExportError(
            asked, f"it is of the kind {kind.get('type')}, and BPE can be written", "Use another run-time."
        )
    merges = [" ".join(pair) if isinstance(pair, list) else pair for pair in kind["merges"]]
    words = {number: word for word, number in kind["vocab"].items()}
    types = dict.fromkeys(words, NORMAL)
    for added in said.get("added_tokens") or ():
        words[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER
    if kind.get("byte_fallback"):
        types |= {n: BYTE for n, word in words.items() if len(word) == 6 and word.startswith("<0x") and word[5] == ">"}
        if tokenizer.unk_token_id is not None:
            types[tokenizer.unk_token_id] = UNKNOWN
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        ranks = {word.replace(" ", ""): -float(rank) for rank, word in reversed(list(enumerate(merges)))}
        writer.add_token_scores([ranks.get(words.get(n, ""), 0.0) for n in range(vocabulary)])
        before = json.dumps([said.get("normalizer"), said.get("pre_tokenizer")])
        writer.add_add_space_prefix('"Prepend"' in before or '"prepend_scheme": "first"' in before)
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_splitting(said.get("pre_tokenizer"), asked))
        writer.add_token_merges(merges)
    writer.add_token_list([words.get(n, f"[PAD{n}]") for n in range(vocabulary)])
    writer.add_token_types([types.get(n, UNUSED) for n in range(vocabulary)])
    for kind_of in ("bos", "eos", "unk", "pad"):
        if (number := getattr(tokenizer, f"{kind_of}_token_id")) is not None:
            getattr(writer, f"add_{kind_of}_token_id")(number)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)


def _splitting(said: Mapping[str, Any] | None, asked: str) -> str:
    """What llama.cpp calls the way in which a tokenizer splits text before it merges."""
    steps = [said] if said and said.get("type") != "Sequence" else list((said or {}).get("pretokenizers") or ())
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"]:
        pattern = (steps[0].get("pattern") or {}).get("Regex")
        if pattern in SPLITS:
            return SPLITS[pattern]
    raise ExportError(
        asked,
        f"it splits text by {', '.join(map(str, kinds)) or 'nothing'} in a way whose name there is not known",
        "Convert it with llama.cpp's own tools, or open the model without its tokenizer.",
    )


def _same_tokens(model: Any, opened: Opened) -> None:
    """Raise ExportError when llama.cpp cuts text otherwise than the model's tokenizer does."""
    ours = opened.tokenizer(SAMPLE, add_special_tokens=False)["input_ids"]
    theirs = _cut(model, SAMPLE)
    if theirs != ours:
        place = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), 0)
        near = opened.tokenizer.decode(ours[max(0, place - 2) : place + 3])
        raise ExportError(
            f"{opened.source} was to be exported for llama.cpp",
            f"its tokenizer cuts text otherwise there, near {near!r}",
            "Report this, with the name of the model.",
        )


def _cut(model: Any, text: str) -> list[int]:
    """A text's tokens, as llama.cpp cuts it."""
    llama, raw = _llama(), text.encode()
    found = (llama.llama_token * (4 * len(raw) + 8))()
    many = llama.llama_tokenize(llama.llama_model_get_vocab(model), raw, len(raw), found, len(found), False, False)
    return list(found[:many])


def _gguf() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise missing("gguf", "gguf", "a GGUF file was to be written") from error
    return gguf


@cache
def _unheard(llama: Any) -> Any:
    """Where llama.cpp's messages go; kept, since it calls back whenever it likes."""
    return llama.llama_log_callback(lambda level, text, data: None)


@contextmanager
def _loaded(path: Path, most: int, rearranged: bool = False) -> Iterator[tuple[Any, Any]]:
    """A model and a context of so many tokens, by llama.cpp's own interface.

    Weights stay as the file has them, unless they may be rearranged: for AMX, 8-bit ones end the process on some
    virtual machines.
    """
    llama = _llama()
    llama.llama_log_set(_unheard(llama), None)
    how = llama.llama_model_default_params()
    how.n_gpu_layers, how.use_extra_bufts = 0, rearranged
    model = llama.llama_model_load_from_file(str(path).encode(), how)
    if not model:
        raise ExportError(f"{path.name} was to be loaded by llama.cpp", "it refuses the file", "Report this.")
    room = llama.llama_context_default_params()
    room.n_ctx = room.n_batch = room.n_ubatch = max(64, most)
    room.n_threads = room.n_threads_batch = torch.get_num_threads()
    room.type_k = room.type_v = 0  # float32
    room.flash_attn_type = 0
    context = llama.llama_init_from_model(model, room)
    try:
        yield model, context
    finally:
        llama.llama_free(context)
        llama.llama_model_free(model)


def _logits(model: Any, context: Any, tokens: Sequence[int]) -> Tensor:
    """What llama.cpp says after each token: [tokens, vocabulary]."""
    llama = _llama()
    llama.llama_memory_clear(llama.llama_get_memory(context), True)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    try:
        batch.n_tokens = len(tokens)
        for place, token in enumerate(tokens):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if llama.llama_decode(context, batch):
            raise ExportError("a GGUF file was to be tried in llama.cpp", "it fails on a few tokens", "Report this.")
        wide = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        said = np.ctypeslib.as_array(llama.llama_get_logits(context), shape=(len(tokens), wide))
        return torch.from_numpy(said.copy())
    finally:
        llama.llama_batch_free(batch)


def _llama() -> Any:
    try:
        import llama_cpp  # type: ignore[import-untyped,unused-ignore]  # no types, or not installed
    except ImportError as error:
        raise missing("llama-cpp-python", "llamacpp", "a GGUF file was to be tried in llama.cpp") from error
    return llama_cpp
