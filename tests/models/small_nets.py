"""Tiny random Hugging Face models and hand-made sites for the tests of opening and saving."""

import torch
import transformers as hub
from torch import Tensor, nn

from secateur.edit import replacement
from secateur.site import Number, Part, Site


def llama(tied: bool = True, layers: int = 2, seed: int = 0) -> nn.Module:
    config = hub.LlamaConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    return made(hub.LlamaForCausalLM, config, seed)


def made(kind: type, config: object, seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(config).eval()


def gpt2() -> nn.Module:
    return made(hub.GPT2LMHeadModel, hub.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def bert() -> nn.Module:
    config = hub.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    return made(hub.BertModel, config)


def vit() -> nn.Module:
    config = hub.ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=16,
        patch_size=4,
        num_channels=1,
        num_labels=5,
    )
    return made(hub.ViTForImageClassification, config)


def t5() -> nn.Module:
    config = hub.T5Config(
        vocab_size=50, d_model=16, d_ff=24, d_kv=8, num_heads=2, num_layers=2, decoder_start_token_id=0
    )
    return made(hub.T5ForConditionalGeneration, config)


def mixtral() -> nn.Module:
    config = hub.MixtralConfig(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=64,
    )
    return made(hub.MixtralForCausalLM, config)


def part(model: nn.Module, name: str, axis: int, units: int, turned: bool = False, each: int | None = None) -> Part:
    """The part of a tensor whose positions along an axis belong to units in turn."""
    tensor = model.get_parameter(name)
    shape = tuple(reversed(tensor.shape)) if turned else tuple(tensor.shape)
    owner = torch.arange(units).repeat_interleave(each or shape[axis] // units)
    owner = owner.reshape([-1 if d == axis else 1 for d in range(len(shape))])
    return Part(name, shape, owner, turned=turned)


def mlp(model: nn.Module, layer: int) -> Site:
    """The neurons of one gated MLP of a Llama."""
    path = f"model.layers.{layer}.mlp"
    units = model.get_parameter(f"{path}.gate_proj.weight").shape[0]
    parts = [part(model, f"{path}.{n}_proj.weight", axis, units) for n, axis in (("gate", 0), ("up", 0), ("down", 1))]
    return Site(path, "channel", (units,), tuple(parts))


def groups(model: nn.Module, layer: int) -> Site:
    """The key-value groups of one attention of a Llama: a key head and the query heads that read it."""
    path = f"model.layers.{layer}.self_attn"
    units = model.config.num_key_value_heads
    parts = [part(model, f"{path}.{n}_proj.weight", 0, units) for n in ("q", "k", "v")]
    return Site(path, "head", (units,), (*parts, part(model, f"{path}.o_proj.weight", 1, units)))


def first(units: int, keep: int) -> Tensor:
    return torch.arange(units) < keep


def linears(pairs: list[tuple[str, int]], model: nn.Module, units: int, name: str, turned: bool = False) -> Site:
    return Site(name, "channel", (units,), tuple(part(model, n, axis, units, turned) for n, axis in pairs))


@replacement
class PassOn(nn.Module):
    """A layer that hands on its input, whatever else it is given."""

    passes_through = True

    def forward(self, x: Tensor, *rest: object, **more: object) -> Tensor:
        return x


class Small(nn.Module):
    """A network of the user's, with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 3)
        self.heads = 8

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


def small() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Small()


def not_a_model() -> str:
    return "no"


def neurons(model: nn.Module) -> Site:
    parts = (part(model, "up.weight", 0, 8), part(model, "up.bias", 0, 8), part(model, "down.weight", 1, 8))
    return Site("up", "channel", (8,), parts, (Number("", "heads", 1.0),))
