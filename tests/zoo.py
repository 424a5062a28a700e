"""A zoo of networks nobody adapted for us: tiny, random, of as many makes as there are.

    model = made("swin"); batch = ZOO["swin"].example()

Each is built from the library's own configuration, with the sizes made small; what the zoo test finds of each is the
table in docs/coverage.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.task import Batch

WORDS = 48


@dataclass(frozen=True)
class Animal:
    """A network and what goes into it."""

    family: str
    make: Callable[[], nn.Module]
    example: Callable[[], Batch]


ZOO: dict[str, Animal] = {}
SLOW = {
    "codegen", "granite", "helium", "m2m100", "mobilenet-v2", "mobilevit", "levit", "nemotron", "pegasus", "persimmon",
    "pvt", "smollm3", "swin2sr", "unet-3d", "conditional-detr", "xglm", "starcoder2", "blip", "focalnet", "qwen2-moe",
    "cohere", "gpt-neo", "roformer",
}  # fmt: skip
"""Not tried in every run of the tests: deep ones, and those whose like is tried."""


def made(name: str) -> nn.Module:
    """The network, with every parameter and statistic at random, so that nothing is zero or one by chance."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ZOO[name].make().eval()
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in [*model.named_parameters(), *model.named_buffers()]:
            if key.endswith("running_var"):
                value.copy_(torch.rand(value.shape, generator=draw) + 0.5)
            elif isinstance(value, nn.Parameter) and value.is_floating_point():
                value.add_(0.1 * torch.randn(value.shape, generator=draw))
    return model


# What goes in


def _drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def _ids(tokens: int = 6, batch: int = 2) -> Tensor:
    return torch.randint(4, WORDS, (batch, tokens), generator=torch.Generator().manual_seed(2))


def words() -> Batch:
    """Token ids [2, 6]."""
    return Batch({"input_ids": _ids()})


def both() -> Batch:
    """Token ids for an encoder and for a decoder."""
    return Batch({"input_ids": _ids(), "decoder_input_ids": _ids(4)})


def pictures(size: int = 16, channels: int = 3) -> Callable[[], Batch]:
    """Pixel values [2, channels, size, size]."""
    return lambda: Batch({"pixel_values": _drawn(2, channels, size, size)})


def tensors(*shape: int) -> Callable[[], Batch]:
    """One tensor of that shape."""
    return lambda: Batch((_drawn(*shape),))


# Networks of transformers

_SMALL: dict[str, Any] = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def hub(name: str, family: str, kind: str, example: Callable[[], Batch], **settings: Any) -> None:
    """A network of transformers, by its class, from its own configuration."""

    def make() -> nn.Module:
        import transformers

        cls = getattr(transformers, kind)
        return cls(cls.config_class(**settings)).float()

    ZOO[name] = Animal(family, make, example)


def language(name: str, kind: str, example: Callable[[], Batch] = words, family: str = "", **settings: Any) -> None:
    """A language model with the usual names for its sizes."""
    hub(name, family or "decoder", kind, example, **{**_SMALL, **settings})


_GPT = {
    "vocab_size": WORDS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
}

language("llama", "LlamaForCausalLM", num_key_value_heads=2)
language("mistral", "MistralForCausalLM", num_key_value_heads=2, sliding_window=4)
language("qwen2", "Qwen2ForCausalLM", num_key_value_heads=2)
language("qwen3", "Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8)
language("gemma", "GemmaForCausalLM", num_key_value_heads=1, head_dim=8)
language("gemma2", "Gemma2ForCausalLM", num_key_value_heads=2, head_dim=8)
language("gemma3", "Gemma3ForCausalLM", num_key_value_heads=2, head_dim=8)
language("phi", "PhiForCausalLM")
language("phi3", "Phi3ForCausalLM", num_key_value_heads=2)
language("cohere", "CohereForCausalLM", num_key_value_heads=2, use_qk_norm=True)
language("olmo2", "Olmo2ForCausalLM", num_key_value_heads=2)
language("stablelm", "StableLmForCausalLM", num_key_value_heads=2, qk_layernorm=True, use_parallel_residual=True)
language("starcoder2", "Starcoder2ForCausalLM", num_key_value_heads=2)
language("granite", "GraniteForCausalLM", num_key_value_heads=2)
language("glm4", "Glm4ForCausalLM", num_key_value_heads=2, head_dim=8)
language("smollm3", "SmolLM3ForCausalLM", num_key_value_heads=2)
language("nemotron", "NemotronForCausalLM", num_key_value_heads=2)
language("gpt-neox", "GPTNeoXForCausalLM")
language("falcon", "FalconForCausalLM", multi_query=True)
language("persimmon", "PersimmonForCausalLM")
language("helium", "HeliumForCausalLM", num_key_value_heads=2, head_dim=8)
hub("gpt2", "decoder", "GPT2LMHeadModel", words, **_GPT)
hub("gptj", "decoder", "GPTJForCausalLM", words, **_GPT, rotary_dim=4)
hub("codegen", "decoder", "CodeGenForCausalLM", words, **{**_GPT, "n_head": 4}, rotary_dim=4)
hub("gpt-bigcode", "decoder", "GPTBigCodeForCausalLM", words, **_GPT)
hub(
    "gpt-neo",
    "decoder",
    "GPTNeoForCausalLM",
    words,
    vocab_size=WORDS,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    attention_types=[[["global", "local"], 1]],
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_id=1,
)
hub(
    "opt",
    "decoder",
    "OPTForCausalLM",
    words,
    vocab_size=WORDS,
    hidden_size=32,
    ffn_dim=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=32,
    word_embed_proj_dim=32,
    pad_token_id=2,
    bos_token_id=0,
    eos_token_id=1,
)
hub(
    "bloom",
    "decoder",
    "BloomForCausalLM",
    words,
    vocab_size=WORDS,
    hidden_size=32,
    n_layer=2,
    n_head=4,
    bos_token_id=0,
    eos_token_id=1,
)
hub("mpt", "decoder", "MptForCausalLM", words, vocab_size=WORDS, d_model=32, n_layers=2, n_heads=4, max_seq_len=32)
hub(
    "xglm",
    "decoder",
    "XGLMForCausalLM",
    words,
    vocab_size=WORDS,
    d_model=32,
    ffn_dim=48,
    num_layers=2,
    attention_heads=4,
    max_position_embeddings=32,
    bos_token_id=0,
    eos_token_id=1,
    pad_token_id=2,
)

language("mixtral", "MixtralForCausalLM", family="mixture of experts", num_key_value_heads=2, num_local_experts=4)
language(
    "qwen2-moe",
    "Qwen2MoeForCausalLM",
    family="mixture of experts",
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=48,
)
language(
    "qwen3-moe",
    "Qwen3MoeForCausalLM",
    family="mixture of experts",
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    head_dim=8,
)
language(
    "olmoe",
    "OlmoeForCausalLM",
    family="mixture of experts",
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
)
language(
    "deepseek-v3",
    "DeepseekV3ForCausalLM",
    family="mixture of experts",
    num_key_value_heads=4,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    v_head_dim=8,
    n_group=2,
    topk_group=1,
    first_k_dense_replace=1,
)
language(
    "gpt-oss",
    "GptOssForCausalLM",
    family="mixture of experts",
    num_key_value_heads=2,
    num_local_experts=4,
    num_experts_per_tok=2,
    head_dim=8,
)

language("mamba", "MambaForCausalLM", family="state space", state_size=4)
language(
    "mamba2",
    "Mamba2ForCausalLM",
    family="state space",
    state_size=4,
    num_heads=4,
    head_dim=16,
    n_groups=1,
    expand=2,
    chunk_size=4,
)

_TYPES = {"type_vocab_size": 2}
language("bert", "BertForSequenceClassification", family="encoder", num_labels=3)
language("roberta", "RobertaForMaskedLM", family="encoder")
language("distilbert", "DistilBertForMaskedLM", family="encoder", dim=32, hidden_dim=48, n_layers=2, n_heads=4)
language("albert", "AlbertForMaskedLM", family="encoder", embedding_size=16)
language("electra", "ElectraForMaskedLM", family="encoder", embedding_size=16)
language(
    "deberta-v2",
    "DebertaV2ForMaskedLM",
    family="encoder",
    relative_attention=True,
    pos_att_type=["p2c", "c2p"],
    position_buckets=8,
)
language("mpnet", "MPNetForMaskedLM", family="encoder")
language("modernbert", "ModernBertForMaskedLM", family="encoder", local_attention=4, cls_token_id=0, sep_token_id=1)
language("roformer", "RoFormerForMaskedLM", family="encoder", embedding_size=32)
language(
    "squeezebert",
    "SqueezeBertForMaskedLM",
    family="encoder",
    embedding_size=32,
    q_groups=2,
    k_groups=2,
    v_groups=2,
    post_attention_groups=1,
    intermediate_groups=2,
    output_groups=2,
)
language("convbert", "ConvBertForMaskedLM", family="encoder", embedding_size=32, head_ratio=2, conv_kernel_size=3)
language("fnet", "FNetForMaskedLM", family="encoder")
language("esm", "EsmForMaskedLM", family="encoder", position_embedding_type="rotary", mask_token_id=3)

_PAIR = {
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 32,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
hub(
    "t5",
    "encoder-decoder",
    "T5ForConditionalGeneration",
    both,
    vocab_size=WORDS,
    d_model=32,
    d_ff=48,
    d_kv=8,
    num_heads=4,
    num_layers=1,
    decoder_start_token_id=0,
    feed_forward_proj="gated-gelu",
)
hub("bart", "encoder-decoder", "BartForConditionalGeneration", both, **_PAIR)
hub("marian", "encoder-decoder", "MarianMTModel", both, **_PAIR)
hub("pegasus", "encoder-decoder", "PegasusForConditionalGeneration", both, **_PAIR)
hub("blenderbot", "encoder-decoder", "BlenderbotForConditionalGeneration", both, **_PAIR)
hub("m2m100", "encoder-decoder", "M2M100ForConditionalGeneration", both, **_PAIR)


def spoken() -> Batch:
    """Mel spectra and token ids."""
    return Batch({"input_features": _drawn(2, 8, 16), "decoder_input_ids": _ids(4)})


_SIGHT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
    "num_labels": 3,
}
hub("vit", "vision transformer", "ViTForImageClassification", pictures(), **_SIGHT)
hub("deit", "vision transformer", "DeiTForImageClassification", pictures(), **_SIGHT)
hub("beit", "vision transformer", "BeitForImageClassification", pictures(), **_SIGHT, use_relative_position_bias=True)
hub(
    "dinov2",
    "vision transformer",
    "Dinov2ForImageClassification",
    pictures(),
    **{**_SIGHT, "mlp_ratio": 2},
    use_swiglu_ffn=True,
)
hub(
    "vit-mae",
    "vision transformer",
    "ViTMAEModel",
    lambda: Batch({"pixel_values": _drawn(2, 3, 16, 16), "noise": _drawn(2, 16)}),
    **_SIGHT,
)
hub(
    "yolos",
    "detector",
    "YolosForObjectDetection",
    pictures(),
    **{**_SIGHT, "image_size": [16, 16]},
    num_detection_tokens=3,
)
hub(
    "swin",
    "vision transformer",
    "SwinForImageClassification",
    pictures(),
    image_size=16,
    patch_size=2,
    embed_dim=16,
    depths=[2, 1],
    num_heads=[2, 4],
    window_size=4,
    num_labels=3,
)
hub(
    "swinv2",
    "vision transformer",
    "Swinv2ForImageClassification",
    pictures(),
    image_size=16,
    patch_size=2,
    embed_dim=16,
    depths=[2, 1],
    num_heads=[2, 4],
    window_size=4,
    num_labels=3,
)
hub(
    "segformer",
    "segmentation",
    "SegformerForSemanticSegmentation",
    pictures(32),
    depths=[1, 1],
    num_encoder_blocks=2,
    hidden_sizes=[16, 32],
    sr_ratios=[2, 1],
    num_attention_heads=[2, 4],
    mlp_ratios=[2, 2],
    patch_sizes=[7, 3],
    strides=[4, 2],
    decoder_hidden_size=24,
    num_labels=3,
)
hub(
    "convnext",
    "convolutional",
    "ConvNextForImageClassification",
    pictures(32),
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_stages=2,
    num_labels=3,
)
hub(
    "convnextv2",
    "convolutional",
    "ConvNextV2ForImageClassification",
    pictures(32),
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_stages=2,
    num_labels=3,
)
hub(
    "resnet",
    "convolutional",
    "ResNetForImageClassification",
    pictures(32),
    embedding_size=8,
    hidden_sizes=[16, 32],
    depths=[1, 2],
    layer_type="bottleneck",
    num_labels=3,
)
hub(
    "regnet",
    "convolutional",
    "RegNetForImageClassification",
    pictures(32),
    embedding_size=8,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    groups_width=4,
    layer_type="y",
    num_labels=3,
)
hub(
    "mobilenet-v2",
    "convolutional",
    "MobileNetV2ForImageClassification",
    pictures(32),
    depth_multiplier=0.25,
    num_labels=3,
)
hub(
    "efficientnet",
    "convolutional",
    "EfficientNetForImageClassification",
    pictures(32),
    width_coefficient=0.25,
    depth_coefficient=0.3,
    hidden_dim=320,
    kernel_sizes=[3, 5],
    in_channels=[32, 32],
    out_channels=[32, 48],
    strides=[1, 2],
    num_block_repeats=[1, 1],
    expand_ratios=[1, 4],
    depthwise_padding=[],
    num_labels=3,
)
hub(
    "bit",
    "convolutional",
    "BitForImageClassification",
    pictures(32),
    embedding_size=32,
    hidden_sizes=[32, 64],
    depths=[1, 1],
    num_groups=8,
    num_labels=3,
)
hub(
    "mobilevit",
    "hybrid",
    "MobileViTForImageClassification",
    pictures(32),
    hidden_sizes=[16, 24, 32],
    neck_hidden_sizes=[8, 8, 16, 16, 24, 24, 32],
    num_attention_heads=4,
    image_size=32,
    num_labels=3,
)
hub(
    "poolformer",
    "hybrid",
    "PoolFormerForImageClassification",
    pictures(32),
    hidden_sizes=[16, 32],
    depths=[1, 1],
    num_encoder_blocks=2,
    patch_sizes=[7, 3],
    strides=[4, 2],
    padding=[2, 1],
    num_labels=3,
)
hub(
    "pvt",
    "vision transformer",
    "PvtForImageClassification",
    pictures(32),
    image_size=32,
    num_encoder_blocks=2,
    depths=[1, 1],
    sequence_reduction_ratios=[2, 1],
    hidden_sizes=[16, 32],
    patch_sizes=[4, 2],
    strides=[4, 2],
    num_attention_heads=[2, 4],
    mlp_ratios=[2, 2],
    num_labels=3,
)
hub(
    "levit",
    "hybrid",
    "LevitForImageClassification",
    pictures(32),
    image_size=32,
    hidden_sizes=[16, 24, 32],
    num_attention_heads=[2, 2, 2],
    depths=[1, 1, 1],
    key_dim=[4, 4, 4],
    mlp_ratio=[2, 2, 2],
    num_labels=3,
)
hub(
    "focalnet",
    "hybrid",
    "FocalNetForImageClassification",
    pictures(32),
    image_size=32,
    embed_dim=16,
    hidden_sizes=[16, 32],
    depths=[1, 1],
    focal_levels=[2, 2],
    focal_windows=[3, 3],
    num_labels=3,
)
hub(
    "swin2sr",
    "super-resolution",
    "Swin2SRForImageSuperResolution",
    pictures(),
    image_size=16,
    embed_dim=16,
    depths=[1, 1],
    num_heads=[2, 2],
    window_size=4,
    upscale=2,
    num_feat=8,
)


def _resnet_backbone() -> Any:
    from transformers import ResNetConfig

    return ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )


def _detr() -> nn.Module:
    import transformers

    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet_backbone(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        num_labels=3,
    )
    return transformers.DetrForObjectDetection(config)


ZOO["detr"] = Animal("detector", _detr, pictures(32))


def _conditional_detr() -> nn.Module:
    import transformers

    config = transformers.ConditionalDetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=_resnet_backbone(),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_queries=5,
        num_labels=3,
    )
    return transformers.ConditionalDetrForObjectDetection(config)


ZOO["conditional-detr"] = Animal("detector", _conditional_detr, pictures(32))

_TOWERS = {
    "text_config": {**_SMALL, "projection_dim": 16},
    "vision_config": {**_SIGHT, "projection_dim": 16},
    "projection_dim": 16,
}


def captioned() -> Batch:
    """Pictures and token ids."""
    return Batch({"input_ids": _ids(), "pixel_values": _drawn(2, 3, 16, 16)})


hub("clip", "two towers", "CLIPModel", captioned, **_TOWERS)
hub(
    "siglip",
    "two towers",
    "SiglipModel",
    captioned,
    text_config={**_SMALL, "projection_size": 32},
    vision_config=_SIGHT,
)
hub("blip", "two towers", "BlipForImageTextRetrieval", captioned, **_TOWERS)

hub(
    "whisper",
    "speech",
    "WhisperForConditionalGeneration",
    spoken,
    **{
        **_PAIR,
        "num_mel_bins": 8,
        "max_source_positions": 8,
        "max_target_positions": 16,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
)
hub(
    "wav2vec2",
    "speech",
    "Wav2Vec2ForCTC",
    lambda: Batch({"input_values": _drawn(2, 200)}),
    **_SMALL,
    conv_dim=[16, 16],
    conv_kernel=[5, 3],
    conv_stride=[4, 2],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
hub(
    "wavlm",
    "speech",
    "WavLMForCTC",
    lambda: Batch({"input_values": _drawn(2, 200)}),
    **_SMALL,
    conv_dim=[16, 16],
    conv_kernel=[5, 3],
    conv_stride=[4, 2],
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
hub(
    "ast",
    "speech",
    "ASTForAudioClassification",
    lambda: Batch({"input_values": _drawn(2, 16, 8)}),
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    patch_size=4,
    frequency_stride=4,
    time_stride=4,
    max_length=16,
    num_mel_bins=8,
    num_labels=3,
)
hub(
    "videomae",
    "video",
    "VideoMAEForVideoClassification",
    lambda: Batch({"pixel_values": _drawn(2, 4, 3, 16, 16)}),
    **_SIGHT,
    num_frames=4,
    tubelet_size=2,
)
hub(
    "patchtst",
    "time series",
    "PatchTSTForPrediction",
    lambda: Batch({"past_values": _drawn(2, 16, 2)}),
    num_input_channels=2,
    context_length=16,
    patch_length=4,
    patch_stride=4,
    d_model=32,
    ffn_dim=48,
    num_attention_heads=4,
    num_hidden_layers=2,
    prediction_length=4,
)


# Networks of diffusers


def diffuser(name: str, kind: str, example: Callable[[], Batch], **settings: Any) -> None:
    """A network of diffusers, by its class."""

    def make() -> nn.Module:
        import diffusers

        return getattr(diffusers, kind)(**settings)

    ZOO[name] = Animal("diffusion", make, example)


def noisy(*shape: int) -> Callable[[], Batch]:
    """A noisy sample and its time."""
    return lambda: Batch({"sample": _drawn(*shape), "timestep": torch.tensor([3.0] * shape[0])})


def described() -> Batch:
    """A noisy sample, its time, and a caption."""
    return Batch(
        {"sample": _drawn(2, 4, 8, 8), "timestep": torch.tensor([3, 4]), "encoder_hidden_states": _drawn(2, 5, 16)}
    )


diffuser(
    "unet-2d",
    "UNet2DModel",
    noisy(2, 3, 8, 8),
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)
diffuser(
    "unet-2d-condition",
    "UNet2DConditionModel",
    described,
    sample_size=8,
    layers_per_block=1,
    norm_num_groups=4,
    block_out_channels=(8, 16),
    attention_head_dim=4,
    cross_attention_dim=16,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
)
diffuser(
    "autoencoder-kl",
    "AutoencoderKL",
    lambda: Batch({"sample": _drawn(2, 3, 16, 16)}),
    block_out_channels=(8, 16),
    norm_num_groups=4,
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
    sample_size=16,
)
diffuser(
    "dit",
    "DiTTransformer2DModel",
    lambda: Batch(
        {"hidden_states": _drawn(2, 4, 8, 8), "timestep": torch.tensor([3, 4]), "class_labels": torch.tensor([0, 1])}
    ),
    num_attention_heads=4,
    attention_head_dim=8,
    in_channels=4,
    num_layers=2,
    sample_size=8,
    num_embeds_ada_norm=4,
    norm_num_groups=4,
)


def joint() -> Batch:
    """A noisy sample, a caption as tokens and as one vector, and the time."""
    return Batch(
        {
            "hidden_states": _drawn(2, 4, 8, 8),
            "encoder_hidden_states": _drawn(2, 5, 16),
            "pooled_projections": _drawn(2, 12),
            "timestep": torch.tensor([3, 4]),
        }
    )


diffuser(
    "sd3",
    "SD3Transformer2DModel",
    joint,
    sample_size=8,
    patch_size=2,
    in_channels=4,
    out_channels=4,
    num_layers=2,
    attention_head_dim=8,
    num_attention_heads=2,
    joint_attention_dim=16,
    caption_projection_dim=16,
    pooled_projection_dim=12,
    pos_embed_max_size=8,
)
diffuser(
    "pixart",
    "PixArtTransformer2DModel",
    lambda: Batch(
        {
            "hidden_states": _drawn(2, 4, 8, 8),
            "timestep": torch.tensor([3, 4]),
            "encoder_hidden_states": _drawn(2, 5, 16),
            "added_cond_kwargs": {},
        }
    ),
    sample_size=8,
    num_attention_heads=2,
    attention_head_dim=8,
    cross_attention_dim=16,
    caption_channels=16,
    num_layers=2,
    use_additional_conditions=False,
    norm_num_groups=4,
    in_channels=4,
    out_channels=8,
)
diffuser(
    "unet-3d",
    "UNet3DConditionModel",
    lambda: Batch(
        {"sample": _drawn(1, 4, 2, 8, 8), "timestep": torch.tensor([3]), "encoder_hidden_states": _drawn(1, 5, 16)}
    ),
    sample_size=8,
    block_out_channels=(8, 16),
    layers_per_block=1,
    norm_num_groups=4,
    attention_head_dim=4,
    cross_attention_dim=16,
    down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
    up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
)


# Networks of plain torch


class Recurrent(nn.Module):
    """An embedding of vectors, recurrent layers, a linear layer on the last step."""

    def __init__(self, layers: nn.RNNBase, told: int) -> None:
        super().__init__()
        self.embed, self.layers, self.fc = nn.Linear(5, layers.input_size), layers, nn.Linear(told, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layers(self.embed(x))[0][:, -1])


class Translator(nn.Module):
    """An LSTM reads, its last state starts another that writes, with attention to what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.read = nn.Embedding(WORDS, 6), nn.LSTM(6, 8, batch_first=True)
        self.write, self.fc = nn.LSTM(6, 8, batch_first=True), nn.Linear(16, WORDS)

    def forward(self, read: Tensor, write: Tensor) -> Tensor:
        seen, state = self.read(self.embed(read))
        said, _ = self.write(self.embed(write), state)
        looked = (said @ seen.transpose(1, 2)).softmax(-1) @ seen
        return self.fc(torch.cat([said, looked], -1))


class Tagger(nn.Module):
    """Convolutions over characters, a bidirectional GRU over words, cells that step over what it says."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gru = nn.Conv1d(5, 8, 3, padding=1), nn.GRU(8, 6, bidirectional=True, batch_first=True)
        self.cell, self.fc = nn.GRUCell(12, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.gru(F.relu(self.conv(x)).transpose(1, 2))
        state, said = None, []
        for step in x.unbind(1):
            state = self.cell(step, state)
            said.append(self.fc(state))
        return torch.stack(said, 1)


class UNet(nn.Module):
    """Down by pooling, up by transposed convolutions, concatenation across."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.down, self.deep = self.twice(3, 8), nn.MaxPool2d(2), self.twice(8, 16)
        self.up, self.outside, self.out = nn.ConvTranspose2d(16, 8, 2, 2), self.twice(16, 8), nn.Conv2d(8, 2, 1)

    @staticmethod
    def twice(i: int, o: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(i, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU(), nn.Conv2d(o, o, 3, padding=1), nn.ReLU()
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.inside(x)
        return self.out(self.outside(torch.cat([x, self.up(self.deep(self.down(x)))], 1)))


class Waves(nn.Module):
    """1-d: dilated convolutions with a gate, a residual stream and a skip stream (WaveNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Conv1d(1, 8, 1)
        self.gated = nn.ModuleList(nn.Conv1d(8, 12, 2, dilation=2**i, padding=2**i) for i in range(3))
        self.back = nn.ModuleList(nn.Conv1d(6, 8, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(6, 10, 1) for _ in range(3))
        self.end = nn.Sequential(nn.ReLU(), nn.Conv1d(10, 7, 1), nn.ReLU(), nn.Conv1d(7, 4, 1))

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.start(x), 0
        for gated, back, skip in zip(self.gated, self.back, self.skip, strict=True):
            value, gate = gated(x)[..., : x.shape[-1]].chunk(2, 1)
            y = torch.tanh(value) * torch.sigmoid(gate)
            x, skips = x + back(y), skips + skip(y)
        return self.end(skips)


class Separable(nn.Module):
    """1-d: depthwise and pointwise convolutions with a layer norm over channels (ConvTasNet)."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.wide = nn.Conv1d(2, 8, 1), nn.Conv1d(8, 16, 1)
        self.norm, self.act = nn.GroupNorm(1, 16), nn.PReLU(16)
        self.depth, self.narrow, self.fc = (
            nn.Conv1d(16, 16, 3, padding=1, groups=16),
            nn.Conv1d(16, 8, 1),
            nn.Linear(8, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.start(x)
        x = x + self.narrow(self.depth(self.act(self.norm(self.wide(x)))))
        return self.fc(x.mean(-1))


class Volumes(nn.Module):
    """3-d: convolutions, pooling, a shortcut, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv3d(1, 6, 3, padding=1), nn.BatchNorm3d(6), nn.Conv3d(6, 6, 3, padding=1)
        self.pool, self.up, self.c = nn.AvgPool3d(2), nn.ConvTranspose3d(6, 5, 2, 2), nn.Conv3d(5, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        x = self.pool(x + self.b(x))
        return self.c(F.elu(self.up(x)))


class Transposed(nn.Module):
    """Transposed convolutions, one of them depthwise and one in groups (the generator of a GAN)."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.a = nn.Linear(6, 8 * 4 * 4), nn.ConvTranspose2d(8, 12, 4, 2, 1)
        self.norm, self.depth = nn.BatchNorm2d(12), nn.ConvTranspose2d(12, 12, 3, 1, 1, groups=12)
        self.groups, self.out = nn.ConvTranspose2d(12, 8, 4, 2, 1, groups=2), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(self.start(x).unflatten(1, (-1, 4, 4)))
        return torch.tanh(self.out(F.leaky_relu(self.groups(self.depth(F.relu(self.norm(x)))), 0.2)))


class Inception(nn.Module):
    """Branches of several widths side by side, twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.fc = self.branches(3), self.branches(15), nn.Linear(15, 3)

    @staticmethod
    def branches(i: int) -> nn.ModuleList:
        three = nn.Sequential(nn.Conv2d(i, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1))
        pooled = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(i, 4, 1))
        return nn.ModuleList([nn.Conv2d(i, 5, 1), three, pooled])

    def forward(self, x: Tensor) -> Tensor:
        for branches in (self.first, self.second):
            x = F.relu(torch.cat([branch(x) for branch in branches], 1))
        return self.fc(F.adaptive_max_pool2d(x, 1).flatten(1))


class Pyramid(nn.Module):
    """A feature pyramid: top down by interpolation, one head shared by the levels."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 12, 3, 2, 1)
        self.l1, self.l2 = nn.Conv2d(8, 10, 1), nn.Conv2d(12, 10, 1)
        self.tower, self.out = nn.Sequential(nn.Conv2d(10, 9, 3, padding=1), nn.ReLU()), nn.Conv2d(9, 5, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one = F.relu(self.c1(x))
        two = F.relu(self.c2(one))
        top = self.l2(two)
        low = self.l1(one) + F.interpolate(top, scale_factor=2)
        return self.out(self.tower(low)), self.out(self.tower(top))


class Mixer(nn.Module):
    """Patches mixed across places, then across channels."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, 12, 4, 4)
        self.n1, self.a1, self.a2 = nn.LayerNorm(12), nn.Linear(16, 10), nn.Linear(10, 16)
        self.n2, self.b1, self.b2 = nn.LayerNorm(12), nn.Linear(12, 20), nn.Linear(20, 12)
        self.fc = nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.a2(F.gelu(self.a1(self.n1(x).transpose(1, 2)))).transpose(1, 2)
        x = x + self.b2(F.gelu(self.b1(self.n2(x))))
        return self.fc(x.mean(1))


class Filmed(nn.Module):
    """A vector scales and shifts the channels of pictures; instance norm; a highway round one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.film = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Linear(4, 16)
        self.carry, self.change, self.fc = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor, told: Tensor) -> Tensor:
        scale, shift = self.film(told)[..., None, None].chunk(2, 1)
        x = (F.relu(self.norm(self.conv(x))) * (1 + scale) + shift).mean((2, 3))
        gate = torch.sigmoid(self.carry(x))
        return self.fc(gate * F.relu(self.change(x)) + (1 - gate) * x)


class Deformed(nn.Module):
    """Where to look is computed, and the picture is sampled there (a spatial transformer)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.where = nn.Conv2d(3, 8, 3, padding=1), nn.Linear(8, 6)
        self.after, self.fc = nn.Conv2d(8, 6, 3, padding=1), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv(x))
        grid = F.affine_grid(self.where(x.mean((2, 3))).view(-1, 2, 3), list(x.shape), align_corners=False)
        return self.fc(self.after(F.grid_sample(x, grid, align_corners=False)).amax((2, 3)))


class Bits(nn.Module):
    """Sorts its numbers one by one in a loop whose length depends on them: nothing that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        while bool(x.abs().max() > 1):
            x = x / 2
        return self.b(x)


def torch_net(name: str, family: str, make: Callable[[], nn.Module], example: Callable[[], Batch]) -> None:
    """A network of torch alone."""
    ZOO[name] = Animal(family, make, example)


def graphed(name: str) -> Callable[[], nn.Module]:
    """A network that the tests of the graph know."""

    def make() -> nn.Module:
        import test_graph

        return getattr(test_graph, name)()

    return make


def steps() -> Batch:
    """Vectors [2, 4, 5]."""
    return Batch((_drawn(2, 4, 5),))


def encoder() -> nn.Module:
    """torch's own transformer encoder."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, activation="gelu")
    return nn.Sequential(nn.Linear(5, 8), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(8, 3))


def vgg() -> nn.Module:
    """Convolutions one after another, flattened into linear layers."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 10, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(40, 16),
        nn.ReLU(),
        nn.Dropout(),
        nn.Linear(16, 3),
    )


torch_net("gru", "recurrent", lambda: Recurrent(nn.GRU(6, 8, batch_first=True), 8), steps)
torch_net("gru-layers", "recurrent", lambda: Recurrent(nn.GRU(6, 8, 3, batch_first=True, dropout=0.1), 8), steps)
torch_net("lstm", "recurrent", lambda: Recurrent(nn.LSTM(6, 8, batch_first=True), 8), steps)
torch_net(
    "lstm-both-ways", "recurrent", lambda: Recurrent(nn.LSTM(6, 8, 2, batch_first=True, bidirectional=True), 16), steps
)
torch_net("lstm-projected", "recurrent", lambda: Recurrent(nn.LSTM(6, 8, batch_first=True, proj_size=4), 4), steps)
torch_net("rnn-relu", "recurrent", lambda: Recurrent(nn.RNN(6, 8, nonlinearity="relu", batch_first=True), 8), steps)
torch_net("translator", "recurrent", Translator, lambda: Batch((_ids(4), _ids(3))))
torch_net("tagger", "recurrent", Tagger, tensors(2, 5, 4))
torch_net("torch-encoder", "encoder", encoder, steps)
torch_net("fused-attention", "encoder", graphed("FusedAttention"), steps)
torch_net(
    "mlp",
    "perceptron",
    lambda: nn.Sequential(nn.Linear(5, 8), nn.GELU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)),
    tensors(3, 5),
)
torch_net("mixer", "perceptron", Mixer, tensors(2, 3, 16, 16))
torch_net("vgg", "convolutional", vgg, tensors(2, 3, 16, 16))
torch_net("inverted-residuals", "convolutional", graphed("MobileNet"), tensors(2, 3, 8, 8))
torch_net("densenet", "convolutional", graphed("DenseNet"), tensors(2, 3, 8, 8))
torch_net("shufflenet", "convolutional", graphed("ShuffleNet"), tensors(2, 3, 8, 8))
torch_net("shufflenet-v2", "convolutional", graphed("ShuffleV2"), tensors(2, 3, 8, 8))
torch_net("squeeze-excite", "convolutional", graphed("SqueezeExcite"), tensors(2, 3, 8, 8))
torch_net("resnext", "convolutional", graphed("Grouped"), tensors(2, 3, 8, 8))
torch_net("upsampler", "super-resolution", graphed("Upsampler"), tensors(2, 3, 8, 8))
torch_net("inception", "convolutional", Inception, tensors(2, 3, 8, 8))
torch_net("unet", "segmentation", UNet, tensors(2, 3, 8, 8))
torch_net("pyramid", "detector", Pyramid, tensors(2, 3, 16, 16))
torch_net("wavenet", "1-d", Waves, tensors(2, 1, 12))
torch_net("separable", "1-d", Separable, tensors(2, 2, 12))
torch_net("volumes", "3-d", Volumes, tensors(2, 1, 4, 4, 4))
torch_net("generator", "generative", Transposed, tensors(2, 6))
torch_net("filmed", "convolutional", Filmed, lambda: Batch((_drawn(2, 3, 8, 8), _drawn(2, 4))))
torch_net("spatial-transformer", "convolutional", Deformed, tensors(2, 3, 8, 8))
torch_net("a loop that depends on data", "none", Bits, tensors(3, 5))
