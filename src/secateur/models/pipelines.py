"""Text to image as one network: a text encoder, a denoiser and, in latent diffusion, the decoder of pictures.

A folder in the form of diffusers (model_index.json, a folder per component) is opened component by component with the
classes of diffusers and transformers, from safetensors alone, and saved in the same form. Components keep their names,
so that a tensor of the denoiser is `unet.down_blocks.0...` for every site, edit and report.
"""

import copy
import inspect
import shutil
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import ModelError, SettingError
from secateur.models import hf
from secateur.models.folder import CARD, CODE, PICKLES, RECORD, header, is_ours, plain_name, read_json, sha256
from secateur.outcome import write_text

INDEX = "model_index.json"
LIBRARIES = ("diffusers", "transformers")
"""The only libraries whose classes a folder may name."""

NETWORKS = ("text_encoder", "unet", "vae")
"""The components that a pipeline runs."""

_CONFIGS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "preprocessor_config.json")
"""The files that could name code."""

_KEPT_FILES = (".json", ".txt", ".model", ".safetensors")


class Pipeline(nn.Module):
    """What turns captions into pictures, its components by name.

    `network(input_ids, attention_mask)` gives the text encoder's answer [captions, tokens, width];
    with `sample` [captions, channels, height, width] and `timestep` [captions] as well, the noise that the denoiser
    sees in the sample. `picture` draws.
    """

    def __init__(
        self,
        networks: Mapping[str, nn.Module],
        tokenizer: Any,
        scheduler: Any,
        index: Mapping[str, Any] | None = None,
        kept: Mapping[str, Path] | None = None,
    ) -> None:
        super().__init__()
        for name, network in networks.items():
            self.add_module(name, network)
        self.tokenizer, self.scheduler = tokenizer, scheduler
        self.index = dict(index or {})
        self.kept = dict(kept or {})  # components that are neither run nor pruned, where they lie
        self.names = tuple(networks)
        self.masked = bool(self.index.get("masked_padding", False))  # whether the denoiser is shown zeros for padding
        self.skipped = self.index.get("clip_skip")  # of the text encoder's last layers; None: its last is used
        _check_fit(self)

    @property
    def length(self) -> int:
        """How many tokens a caption is padded to, here and at inference."""
        return int(self.tokenizer.model_max_length)

    @property
    def shape(self) -> tuple[int, int, int]:
        """What is denoised: channels, height, width."""
        config: Any = self.get_submodule("unet").config
        size = config.sample_size
        high, wide = size if isinstance(size, (list, tuple)) else (size, size)
        return int(config.in_channels), int(high), int(wide)

    def tokens(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """Captions as the text encoder takes them, padded as at inference: input_ids, attention_mask [n, length]."""
        found = self.tokenizer(
            list(captions), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        )
        return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    def condition(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the denoiser is told: [captions, tokens, width].

        As diffusers does, a CLIP encoder sees its padding unless its config says otherwise.
        """
        encoder: Any = self.get_submodule("text_encoder")
        seen = attention_mask if self.masked or getattr(encoder.config, "use_attention_mask", False) else None
        if self.skipped is None:
            hidden = encoder(input_ids, attention_mask=seen)[0]
        else:
            answer = encoder(input_ids, attention_mask=seen, output_hidden_states=True)
            hidden = answer.hidden_states[-(int(self.skipped) + 1)]
            inner = getattr(encoder, "text_model", encoder)
            hidden = inner.final_layer_norm(hidden) if hasattr(inner, "final_layer_norm") else hidden
        if self.masked and attention_mask is not None:
            hidden = hidden * attention_mask.unsqueeze(-1)
        return hidden

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        sample: Tensor | None = None,
        timestep: Tensor | None = None,
    ) -> Tensor:
        """See Pipeline."""
        told = self.condition(input_ids, attention_mask)
        if sample is None:
            return told
        return self.get_submodule("unet")(sample, timestep, encoder_hidden_states=told, return_dict=False)[0]

    def unused(self) -> frozenset[str]:
        """Tensors of the text encoder that no picture depends on: a pooler, layers behind the one that is read.

        Found by asking autograd, since a layer may well run and its answer be thrown away.
        """
        encoder = self.get_submodule("text_encoder")
        named = {n: p for n, p in encoder.named_parameters() if p.is_floating_point()}
        learns = [(p, p.requires_grad) for p in named.values()]
        device = next(iter(named.values())).device
        try:
            for p in named.values():
                p.requires_grad_(True)
            with torch.enable_grad():
                told = self.condition(**{k: v.to(device) for k, v in self.tokens(["a"]).items()})
                found = torch.autograd.grad(told.float().sum(), list(named.values()), allow_unused=True)
        finally:
            for p, before in learns:
                p.requires_grad_(before)
        return frozenset(f"text_encoder.{n}" for n, g in zip(named, found, strict=True) if g is None)

    @torch.no_grad()
    def picture(
        self, captions: Sequence[str], seed: int = 0, steps: int = 50, guidance: float = 7.5, batch: int = 32
    ) -> Tensor:
        """A picture for each caption [captions, channels, height, width] in [0, 1], in float32.

        The noise a picture starts from depends on the seed and the caption's place, not on the batch; `guidance` is
        that of Ho and Salimans 2022, arXiv:2207.12598, as diffusers counts it: 1 is none.
        """
        if steps < 1:
            raise SettingError(f"pictures in {steps} steps were asked for", "one is the least", "Give 25, say.")
        unet: Any = self.get_submodule("unet")
        weight = next(unet.parameters())
        noise = torch.randn((len(captions), *self.shape), generator=torch.Generator().manual_seed(seed))
        told = self._told(captions, weight)
        empty = self._told([""], weight)
        drawn = []
        for start in range(0, len(captions), batch):
            x = noise[start : start + batch].to(weight)
            drawn.append(self._denoised(x, told[start : start + batch], empty, seed + start, steps, guidance))
        return torch.cat(drawn)

    def _told(self, captions: Sequence[str], like: Tensor) -> Tensor:
        each = list(dict.fromkeys(captions))
        places = {caption: i for i, caption in enumerate(each)}
        told = [
            self.condition(**{k: v.to(like.device) for k, v in self.tokens(each[i : i + 32]).items()})
            for i in range(0, len(each), 32)
        ]
        return torch.cat(told).to(like.dtype)[[places[caption] for caption in captions]]

    def _denoised(self, x: Tensor, told: Tensor, empty: Tensor, seed: int, steps: int, guidance: float) -> Tensor:
        unet: Any = self.get_submodule("unet")
        scheduler = copy.deepcopy(self.scheduler)  # it keeps where it is
        scheduler.set_timesteps(steps, device=x.device)
        x = x * scheduler.init_noise_sigma
        chance = {"generator": torch.Generator().manual_seed(seed)}
        chance = chance if "generator" in inspect.signature(scheduler.step).parameters else {}
        guided = guidance != 1
        context = torch.cat([empty.expand(len(x), -1, -1), told]) if guided else told
        for t in scheduler.timesteps:
            seen = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            noise = unet(seen, t, encoder_hidden_states=context, return_dict=False)[0]
            if guided:
                plain, asked = noise.chunk(2)
                noise = plain + guidance * (asked - plain)
            x = scheduler.step(noise, t, x, return_dict=False, **chance)[0]
        if "vae" in self.names:
            vae: Any = self.get_submodule("vae")
            x = vae.decode(x.to(next(vae.parameters()).dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (x.float() / 2 + 0.5).clamp(0, 1).cpu()


def _check_fit(pipeline: Pipeline) -> None:
    asked = "a pipeline was to be put together"
    for name in ("text_encoder", "unet"):
        if name not in pipeline.names:
            raise ModelError(
                asked,
                f"it has no {name}: its networks are {', '.join(pipeline.names) or 'none'}",
                "Give a pipeline of the Stable Diffusion 1 and 2 kind: one text encoder and a UNet.",
            )
    unet: Any = pipeline.get_submodule("unet")
    if "text_encoder_2" in pipeline.names or getattr(unet.config, "addition_embed_type", None):
        raise ModelError(
            asked,
            "its denoiser is told more than one text encoder's answer",
            "Give a pipeline of the Stable Diffusion 1 and 2 kind: one text encoder and a UNet.",
        )
    if "vae" in pipeline.names:
        vae: Any = pipeline.get_submodule("vae")
        if vae.config.latent_channels != unet.config.in_channels:
            raise ModelError(
                asked,
                f"its denoiser takes {unet.config.in_channels} channels and its decoder {vae.config.latent_channels}",
                "Give a text-to-image pipeline: those for inpainting and depth take more than noise.",
            )
    if pipeline.length > 100_000:  # what a tokenizer says that was never told
        raise ModelError(
            asked, "its tokenizer does not say how many tokens it pads to", "Set model_max_length in its config."
        )


# Folders


def is_pipeline(folder: Path) -> bool:
    """Whether a folder is in the form of diffusers' pipelines."""
    return (folder / INDEX).is_file()


def open_pipeline(folder: str | Path, dtype: torch.dtype = torch.float32) -> Pipeline:
    """The pipeline of a folder, in evaluation. Raises ModelError unless all of it is there and needs no code."""
    place = Path(folder)
    if is_ours(place):
        check_saved(place)
    index = read_json(place / INDEX)
    found: dict[str, Any] = {}
    kept: dict[str, Path] = {}
    for name, value in index.items():
        if name.startswith("_") or not isinstance(value, list):
            continue
        if len(value) != 2 or value[0] is None or value[1] is None:
            continue  # a component this pipeline does without
        where = place / plain_name(name, f"{INDEX} of {folder}")
        if name in (*NETWORKS, "tokenizer", "scheduler") or name.startswith(("text_encoder", "transformer", "prior")):
            found[name] = _component(where, _class(value, name, folder), dtype)
        else:
            kept[name] = where
    networks = {name: part for name, part in found.items() if isinstance(part, nn.Module)}
    for name in ("tokenizer", "scheduler"):
        if name not in found:
            raise ModelError(f"{folder} was to be opened", f"its {INDEX} names no {name}", "Get the folder again.")
    return Pipeline(networks, found["tokenizer"], found["scheduler"], index, kept).eval()


def _class(value: Sequence[Any], name: str, folder: str | Path) -> Any:
    library, kind = map(str, value)
    asked = f"{name} of {folder} was to be opened"
    if library not in LIBRARIES:
        raise ModelError(
            asked,
            f"its class {kind} is of {library!r}, which may be code of its own",
            "secateur never runs code out of a folder: only classes of diffusers and transformers are built.",
        )
    found = getattr(diffusers() if library == "diffusers" else hf.transformers(), kind, None)
    if not isinstance(found, type) or not hasattr(found, "from_pretrained"):
        raise ModelError(asked, f"{library} has no class {kind!r}", f"Check {INDEX}, or upgrade {library}.")
    return found


def diffusers() -> ModuleType:
    """The diffusers package. Raises ModelError when it is not installed."""
    try:
        return import_module("diffusers")
    except ImportError as error:
        raise ModelError(
            "a text-to-image pipeline was asked for", "diffusers is not installed", "pip install 'secateur[diffusion]'"
        ) from error


def _component(folder: Path, kind: Any, dtype: torch.dtype) -> Any:
    asked = f"{folder} was to be opened"
    if not folder.is_dir():
        raise ModelError(asked, "there is no such folder", "Copy the whole pipeline again.")
    for file in folder.iterdir():
        if file.name in _CONFIGS:
            hf.refuse_code(read_json(file), file)
    options: dict[str, Any] = {"local_files_only": True}
    network = issubclass(kind, nn.Module)
    ours = kind.__module__.startswith("diffusers.")
    if network:
        _check_weights(folder, asked)
        options |= {"use_safetensors": True, "output_loading_info": True}
        options["torch_dtype" if ours else "dtype"] = dtype
    elif not ours:
        options["trust_remote_code"] = False
    try:
        with hf.quiet():
            answer = kind.from_pretrained(str(folder), **options)
    except Exception as error:  # whatever the two libraries raise for files they cannot read
        raise ModelError(asked, f"{kind.__name__} says: {hf.one_line(error)}", "Get the folder again.") from error
    if not network:
        return answer
    part, report = answer
    unknown = [n for n in report.get("unexpected_keys", ()) if not n.endswith("position_ids")]  # older CLIP kept them
    from secateur.models.loading import check_report

    check_report({**report, "unexpected_keys": unknown}, folder)
    return part.eval()


def _check_weights(folder: Path, asked: str) -> None:
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = [p.name for p in sorted(folder.iterdir()) if p.suffix in PICKLES]
        raise ModelError(
            asked,
            f"it holds no safetensors{', and ' + pickles[0] + ' can run code when it is read' if pickles else ''}",
            "Convert it where you trust it: pipeline.save_pretrained(folder, safe_serialization=True).",
        )
    for file in files:
        header(file)


def check_saved(folder: Path) -> dict[str, Any]:
    """The secateur.json of a saved pipeline, after checking every file against it. Raises ModelError."""
    asked = f"the saved pipeline {folder} was to be read"
    about = read_json(folder / RECORD)
    files = about.get("files")
    if not isinstance(files, dict) or INDEX not in files:
        raise ModelError(asked, f"its {RECORD} is not that of a saved pipeline", "Save the pipeline again.")
    there = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if not p.is_dir()}
    for name, path in there.items():
        if path.is_symlink() or path.suffix.lower() in (*PICKLES, *CODE):
            raise ModelError(asked, f"it holds {name}, a link, a pickle or code", "Take that file away.")
    for name, digest in files.items():
        if name not in there:
            raise ModelError(asked, f"{name} is missing", "Copy the whole folder again.")
        if name != CARD and sha256(there[name]) != digest:
            raise ModelError(
                asked, f"{name} is not the file that was saved: its sha256 differs", "Copy the folder again."
            )
    extra = sorted(n for n in there.keys() - files.keys() if n.endswith((".safetensors", ".json")) and n != RECORD)
    if extra:
        raise ModelError(asked, f"it holds {extra[0]}, which was not saved with it", "Take that file away.")
    return about


def write(folder: Path, pipeline: Pipeline) -> dict[str, Any]:
    """Write a pipeline into an empty folder as diffusers does, and read every network back to compare.

    Returns what a record says of how it was saved. Raises ModelError when what was read differs.
    """
    import json

    index = {k: v for k, v in pipeline.index.items() if k.startswith("_") or not isinstance(v, list)}
    for name in pipeline.names:
        network: Any = pipeline.get_submodule(name)
        with hf.quiet():
            network.save_pretrained(str(folder / name), safe_serialization=True)
        index[name] = _named(network)
        dtype = next(p.dtype for p in network.parameters())
        again = _component(folder / name, type(network), dtype).state_dict()
        for key, value in network.state_dict().items():
            if key not in again or not torch.equal(again[key], value.cpu()):
                raise ModelError(
                    f"{name} was to be saved to {folder}", f"{key} was read back with other values", "Save it again."
                )
    for name in ("tokenizer", "scheduler"):
        part = getattr(pipeline, name)
        part.save_pretrained(str(folder / name))
        index[name] = _named(part)
    for name, source in pipeline.kept.items():
        (folder / name).mkdir()
        for file in sorted(source.iterdir()) if source.is_dir() else ():
            if file.suffix in _KEPT_FILES and file.is_file() and not file.is_symlink():
                shutil.copyfile(file, folder / name / file.name)
        index[name] = pipeline.index[name]
    for name, value in pipeline.index.items():
        index.setdefault(name, value)
    write_text(folder / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")
    kind = str(index.get("_class_name", ""))
    stock = bool(kind) and hasattr(diffusers(), kind)
    why = "" if stock else "diffusers has no pipeline of these components; each of them loads with its own class"
    return {
        "kind": "pipeline",
        "class": kind or "Pipeline",
        "library": "diffusers",
        "build": None,
        "stock": stock,
        "why_not": why or None,
        "difference": None,  # tensors were read back and compared; no answers were
        "aliases": {},
    }


def _named(part: Any) -> list[str]:
    return [type(part).__module__.partition(".")[0], type(part).__name__]


def fashion(dtype: torch.dtype = torch.float32) -> Pipeline:
    """MiniLM and a small UNet that draws Fashion-MNIST, 28x28 grey, from the data pack.

    Captions are padded to 10 tokens and the padding is shown to the UNet as zeros. Raises ModelError where the pack
    or the package of MiniLM is not there.
    """
    from secateur.models.opening import data_pack, package_folder

    place = data_pack() / "weights" / "ddpm_fashion"
    if not place.is_dir():
        raise ModelError(
            "the model 'fashion-diffusion' was asked for",
            f"its weights are not at {place}",
            "Set SECATEUR_DATA to the folder of the data pack.",
        )
    hub, kit = hf.transformers(), diffusers()
    text = package_folder("minilm") / "model"
    tokenizer = hub.AutoTokenizer.from_pretrained(str(text), local_files_only=True, trust_remote_code=False)
    tokenizer.model_max_length = 10
    scheduler = kit.DDIMScheduler.from_config(kit.DDPMScheduler.from_pretrained(str(place / "scheduler")).config)
    networks = {
        "text_encoder": _component(text, hub.BertModel, dtype),
        "unet": _component(place, kit.UNet2DConditionModel, dtype),
    }
    return Pipeline(networks, tokenizer, scheduler, {"_class_name": "Pipeline", "masked_padding": True}).eval()
