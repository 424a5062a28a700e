"""Tiny models and toy tasks, one pair per family: deterministic, made in milliseconds, trained in a second.

    model = make_model("decoder"); task = make_task("decoder"); model = trained("decoder")

The toys can be learnt, so training lowers the loss and pruning raises it.
"""

import copy
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor, nn

from secateur.task import Task
from secateur.tasks.labelled import Labelled
from secateur.tasks.learners import Adam, Sgd
from secateur.tasks.text import Text
from secateur.train import fit

VOCABULARY = 64
CLASSES = 4


def seeded(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose initial weights come from a seed, with the global generator left as it was; in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make().eval()


# Models


def mlp(seed: int = 0) -> nn.Module:
    """Three linear layers, 16 -> 32 -> 32 -> 4."""
    return seeded(
        lambda: nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, CLASSES)),
        seed,
    )


class Residual(nn.Module):
    """Two convolutions with a shortcut round them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(x + self.bn2(self.conv2(inner)))


class Cnn(nn.Module):
    """Conv-bn-relu, residual, strided conv-bn-relu, residual, pooling, linear: [batch, 3, 8, 8] -> [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.block1 = Residual(8)
        self.down, self.down_bn = nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16)
        self.block2 = Residual(16)
        self.fc = nn.Linear(16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block1(torch.relu(self.bn(self.conv(x))))
        x = self.block2(torch.relu(self.down_bn(self.down(x))))
        return self.fc(x.mean(dim=(2, 3)))


def cnn(seed: int = 0) -> nn.Module:
    """Conv-bn-relu with two residual blocks and a linear head."""
    return seeded(Cnn, seed)


def decoder(seed: int = 0, layers: int = 2, **changes: object) -> nn.Module:
    """LlamaForCausalLM: hidden 32, MLP 64, 4 heads over 2 key-value heads, vocabulary 64, tied embeddings."""
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**settings)).float(), seed)


def moe(seed: int = 0, layers: int = 2, experts: int = 4, **changes: object) -> nn.Module:
    """MixtralForCausalLM: hidden 32, 4 experts of 32, two of them per token."""
    from transformers import MixtralConfig, MixtralForCausalLM

    settings: dict[str, object] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "bos_token_id": 0,
        "eos_token_id": 1,
        **changes,
    }
    return seeded(lambda: MixtralForCausalLM(MixtralConfig(**settings)).float(), seed)


def encoder(seed: int = 0, layers: int = 2) -> nn.Module:
    """BertForSequenceClassification: hidden 32, MLP 64, 4 heads; no dropout."""
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        initializer_range=0.15,
    )
    return seeded(lambda: BertForSequenceClassification(config).float(), seed)


def vision_transformer(seed: int = 0, layers: int = 2) -> nn.Module:
    """ViTForImageClassification: images [3, 8, 8], patches of 4, hidden 32, MLP 64, 4 heads; no dropout."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=3,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        initializer_range=0.15,
    )
    return seeded(lambda: ViTForImageClassification(config).float(), seed)


class Rnn(nn.Module):
    """Two GRU layers and a linear head on the last state: [batch, steps, 8] -> [batch, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(8, 24, num_layers=2, batch_first=True)
        self.fc = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.gru(x)[0][:, -1])


def rnn(seed: int = 0) -> nn.Module:
    """A GRU classifier."""
    return seeded(Rnn, seed)


def voxel_network(seed: int = 0) -> nn.Module:
    """A grounder of width 16 with voxels of 12.5 cm: points and sentences to boxes; no dropout."""
    from secateur.models.grounder import Grounder

    return seeded(lambda: Grounder(16, 16, 0.125, ((1, 1), (1, 2), (1, 2)), heads=2, layers=1, dropout=0.0), seed)


# Tasks


def toy_text(vocabulary: int = VOCABULARY, seed: int = 0, window: int = 16, batch: int = 8, **changes: object) -> Text:
    """Sequences in which each token allows four next ones, of unequal chance: 1.09 nats per token at best."""
    draw = torch.Generator().manual_seed(1000)  # the language does not depend on the task's seed
    step = torch.randint(1, vocabulary, (4,), generator=draw)
    chances = torch.tensor([0.6, 0.2, 0.1, 0.1])
    lengths = {"calibration": 2048, "train": 8192, "val": 512, "test": 512}
    choice = torch.multinomial(chances, sum(lengths.values()), replacement=True, generator=draw).tolist()
    tokens, places = [1, 2], step.tolist()
    for c in choice[2:]:
        tokens.append((5 * tokens[-1] + places[c]) % vocabulary)
    cuts = torch.tensor(tokens).split(list(lengths.values()))
    ids = dict(zip(lengths, cuts, strict=True))
    return Text("toy-text", ids, window=window, batch=batch, seed=seed, learner=Adam(5e-3), **changes)  # type: ignore[arg-type]


def _labelled(name: str, inputs: Tensor, labels: Tensor, seed: int, rate: float, batch: int) -> Labelled:
    cuts = [len(labels) - 256, 128, 128]
    splits = {
        split: (x, y)
        for split, x, y in zip(("train", "val", "test"), inputs.split(cuts), labels.split(cuts), strict=True)
    }
    return Labelled(name, splits, seed=seed, batch=batch, samples=64, learner=Sgd(rate))


def toy_vectors(seed: int = 0, batch: int = 32, size: int = 16, examples: int = 1024) -> Labelled:
    """Two noisy clusters for each of four classes, so that no linear layer tells them apart: [batch, 16]."""
    draw = torch.Generator().manual_seed(1001)
    centres = torch.randn(2, CLASSES, size, generator=draw) * 1.2
    labels = torch.randint(CLASSES, (examples,), generator=draw)
    side = torch.randint(2, (examples,), generator=draw)
    inputs = centres[side, labels] + torch.randn(examples, size, generator=draw)
    return _labelled("toy-vectors", inputs, labels, seed, 0.05, batch)


def toy_images(seed: int = 0, batch: int = 32, examples: int = 1024) -> Labelled:
    """A pattern of 4x4 pixels, one of four, somewhere in a noisy image: [batch, 3, 8, 8]."""
    draw = torch.Generator().manual_seed(1002)
    patterns = torch.randn(CLASSES, 3, 4, 4, generator=draw) * 1.5
    labels = torch.randint(CLASSES, (examples,), generator=draw)
    inputs = 0.5 * torch.randn(examples, 3, 8, 8, generator=draw)
    for i, (row, column) in enumerate(torch.randint(5, (examples, 2), generator=draw).tolist()):
        inputs[i, :, row : row + 4, column : column + 4] += patterns[labels[i]]
    return _labelled("toy-images", inputs, labels, seed, 0.05, batch)


def toy_sequences(seed: int = 0, batch: int = 32, steps: int = 10, examples: int = 1024) -> Labelled:
    """One of four shapes over time under noise: [batch, 10, 8]."""
    draw = torch.Generator().manual_seed(1003)
    shapes = torch.randn(CLASSES, steps, 8, generator=draw)
    labels = torch.randint(CLASSES, (examples,), generator=draw)
    inputs = shapes[labels] + torch.randn(examples, steps, 8, generator=draw)
    return _labelled("toy-sequences", inputs, labels, seed, 0.2, batch)


def toy_sentences(seed: int = 0, batch: int = 32, length: int = 12, examples: int = 1024) -> Labelled:
    """Token ids whose class is the quarter of the vocabulary most of them are from: int64 [batch, 12]."""
    draw = torch.Generator().manual_seed(1004)
    labels = torch.randint(CLASSES, (examples,), generator=draw)
    quarter = VOCABULARY // CLASSES
    loud = torch.rand(examples, length, generator=draw) < 0.5
    inside = torch.randint(quarter, (examples, length), generator=draw) + quarter * labels[:, None]
    inputs = torch.where(loud, inside, torch.randint(VOCABULARY, (examples, length), generator=draw))
    return _labelled("toy-sentences", inputs, labels, seed, 0.02, batch)


def toy_rooms(seed: int = 0, batch: int = 4) -> Task:
    """Eight rooms of two metres with two or three boxes, and a sentence or two on each."""
    from secateur.tasks.rooms import rooms

    settings = {"val_size": 3, "test_size": 2, "points": 600, "side": 2.4, "height": 1.0, "fewest": 3, "most": 4}
    return rooms(train_size=8, sentences=2, seed=seed, batch=batch, samples=4, learner=Adam(3e-3), **settings)  # type: ignore[arg-type]


FAMILIES: dict[str, tuple[Callable[..., nn.Module], Callable[..., Task]]] = {
    "mlp": (mlp, toy_vectors),
    "cnn": (cnn, toy_images),
    "decoder": (decoder, toy_text),
    "encoder": (encoder, toy_sentences),
    "vision transformer": (vision_transformer, toy_images),
    "rnn": (rnn, toy_sequences),
    "moe": (moe, toy_text),
}
"""By the family words of `method.Card.families`."""

SPECIAL: dict[str, tuple[Callable[..., nn.Module], Callable[..., Task]]] = {"voxel network": (voxel_network, toy_rooms)}
"""Those that "any" does not stand for: `method.SPECIAL_FAMILIES`."""


def make_model(family: str, seed: int = 0) -> nn.Module:
    """A fresh tiny model of a family."""
    return {**FAMILIES, **SPECIAL}[family][0](seed=seed)


def make_task(family: str, seed: int = 0) -> Task:
    """The toy task that fits a family."""
    return {**FAMILIES, **SPECIAL}[family][1](seed=seed)


@lru_cache
def _trained(family: str, seed: int, steps: int) -> nn.Module:
    model = make_model(family, seed)
    fit(model, make_task(family, seed), min(steps, 10) if family in SPECIAL else steps)
    return model.eval()


def trained(family: str, seed: int = 0, steps: int = 150) -> nn.Module:
    """A tiny model trained on its toy task; each caller gets a copy."""
    return copy.deepcopy(_trained(family, seed, steps))
