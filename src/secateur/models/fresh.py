"""Small networks with random weights, to be trained and compared: they finish on two cores.

`secateur compare vgg --methods rigl,granet --epochs 2` takes each from new weights. The widths are ours.
"""

from collections import OrderedDict

import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models import recurrent

PLAN = ((32, 1), (64, 1), (128, 2), (256, 2))
"""Channels, and how many convolutions, of each stage of the VGG."""


class Vgg(nn.Module):
    """Stages of 3x3 convolutions with batch norms, each halved by a maximum, and a classifier on the mean.

    Simonyan, Zisserman. "Very Deep Convolutional Networks for Large-Scale Image Recognition." 2014. arXiv:1409.1556,
    section 2. Differs: batch norms, and one layer where the paper has three to classify. Images are
    [batch, channels, 32, 32].
    """

    def __init__(self, plan: tuple[tuple[int, int], ...] = PLAN, classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        stages = []
        for width, count in plan:
            layers: OrderedDict[str, nn.Module] = OrderedDict()
            for number in range(1, count + 1):
                layers[f"conv{number}"] = nn.Conv2d(channels, width, 3, 1, 1, bias=False)
                layers[f"bn{number}"] = nn.BatchNorm2d(width)
                layers[f"relu{number}"] = nn.ReLU()
                channels = width
            stages.append(nn.Sequential(layers))
        self.stages = nn.ModuleList(stages)
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width], normalised -> scores [batch, classes]."""
        for stage in self.stages:
            x = F.max_pool2d(stage(x), 2)
        return self.linear(x.mean((2, 3)))


def vgg() -> Vgg:
    """Six convolutions, 1.1 million weights."""
    return Vgg()


def vit_tiny() -> nn.Module:
    """A ViT of transformers: six layers of width 96 on patches of 4x4 of 32x32 pixels, 0.7 million weights."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=32,
        patch_size=4,
        hidden_size=96,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def gpt() -> nn.Module:
    """A GPT-2 of transformers that reads bytes: four layers of width 128, windows of up to 256, 0.9 million weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=256,
        n_positions=256,
        n_embd=128,
        n_layer=4,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def gru() -> nn.Module:
    """Three layers of 50 gated units that say whether a string is of a grammar."""
    return recurrent.RecurrentClassifier(recurrent.gru)


def lstm() -> nn.Module:
    """The same of long short-term memory."""
    return recurrent.RecurrentClassifier(recurrent.lstm)
