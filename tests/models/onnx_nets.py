"""ONNX files for tests, made node by node as any framework might, and from tiny networks by torch's own exporter."""

import warnings
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto, TensorProto, helper, numpy_helper
from torch import Tensor, nn


def graph(nodes, inputs, outputs, constants, opset=13, domains=(), ir=8) -> ModelProto:
    """A model of nodes; inputs and outputs are name -> shape, constants name -> array."""
    held = [numpy_helper.from_array(np.asarray(v), n) for n, v in constants.items()]
    into = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()]
    out = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()]
    opsets = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, 1) for d in domains)]
    made = helper.make_graph(nodes, "net", into, out, initializer=held)
    return helper.make_model(made, opset_imports=opsets, ir_version=ir)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32) * 0.5


class Padded(nn.Module):
    """A residual block whose shortcut is sliced and padded with zeros, as in the residual networks of CIFAR-10."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.conv1, self.bn = nn.Conv2d(6, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.conv2 = nn.Conv2d(12, 12, 3, padding=1)
        self.fc = nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        inner = self.conv2(torch.relu(self.bn(self.conv1(x))))
        x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 3, 3))
        return self.fc(torch.relu(inner + x).mean((2, 3)))


class Mixed(nn.Module):
    """Grouped and transposed convolutions, split and joined again, a group norm, PReLU, a shuffle, a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.c1, self.c2 = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1, groups=3)
        self.norm, self.up, self.act = nn.GroupNorm(3, 12), nn.ConvTranspose2d(12, 8, 2, 2), nn.PReLU(8)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.wide = nn.Conv2d(8, 10, 1)
        self.gru, self.fc = nn.GRU(10, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.relu(self.c1(x)).split([4, 8], 1)
        x = self.act(self.up(self.norm(self.c2(torch.cat([b, a], 1)))))
        n, c, h, w = x.shape
        x = x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        x = self.wide(torch.relu(self.deep(x)))
        y, _ = self.gru(x.flatten(2).transpose(1, 2)[:, :5])
        return self.fc(y.mean(1))


class Answering(nn.Module):
    """A transformer's first answer, for exporters that want tensors."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(input_ids=ids, attention_mask=mask)[0]


def exported(model: nn.Module, path: Path, *inputs: Tensor, names: tuple[str, ...], opset: int = 17, **more) -> Path:
    """A network as torch's TorchScript exporter writes it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(), inputs, str(path), dynamo=False, opset_version=opset, input_names=list(names), **more
        )
    return path


def seeded(make) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = make().eval()
        for buffer in model.buffers():
            if buffer.is_floating_point() and buffer.dim() == 1:
                buffer.add_(0.1 * torch.rand_like(buffer))
    return model
