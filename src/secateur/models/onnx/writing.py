"""Writing a network that was read from an ONNX file as one: the same nodes, with the tensors and numbers of now.

What is written is checked with onnx.checker, run by ONNX Runtime and compared with the network before it gets its
name.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import ModelError
from secateur.models.onnx import reading
from secateur.models.onnx.network import Network
from secateur.models.onnx.operators import groups_of

_MOST = 2**31 - 1  # bytes that protobuf takes in one piece


def proto(network: Network, about: Mapping[str, str] | None = None) -> Any:
    """The network as an onnx.ModelProto; `about` goes into its metadata."""
    from onnx import ModelProto, TensorProto, helper, numpy_helper

    found = ModelProto()
    found.CopyFrom(network.bare)
    graph = found.graph
    kinds = {t.name: t.data_type for t in graph.initializer}
    stored: dict[str, list[tuple[np.ndarray, str]]] = {}
    taken = {n for node in graph.node for n in (*node.input, *node.output)} | kinds.keys()
    del graph.initializer[:]

    def store(origin: str, value: np.ndarray) -> str:
        """The name of an initialiser with these values: the constant's own for the first that reads it."""
        known = stored.setdefault(origin, [])
        for other, name in known:
            if other.shape == value.shape and np.array_equal(other, value):
                return name
        name, number = origin, 1
        while known and name in taken:
            name, number = f"{origin}_{number}", number + 1
        taken.add(name)
        known.append((value, name))
        tensor = numpy_helper.from_array(value, name)
        if kinds.get(origin) not in (None, TensorProto.UNDEFINED, tensor.data_type):  # cast when it was opened
            tensor = numpy_helper.from_array(value.astype(helper.tensor_dtype_to_np_dtype(kinds[origin])), name)
        graph.initializer.append(tensor)
        return name

    for step in network.steps:
        node = graph.node[step.node.index]
        for place, slot in enumerate(step.slots):
            if slot.tensor:
                node.input[place] = store(slot.constant, network.tensor(slot.tensor).detach().cpu().numpy())
            elif slot.constant:
                node.input[place] = store(slot.constant, network.numbers(step, place, network.values[slot.constant]))
        _set_attributes(network, step, node)
    kept = {step.node.index for step in network.steps}
    for index in reversed(range(len(graph.node))):
        if index not in kept:  # constants, which are initialisers now
            del graph.node[index]
    names = {t.name for t in graph.initializer}
    for index in reversed(range(len(graph.input))):
        if graph.input[index].name in kinds.keys() | names:  # as before version 4 of the format
            del graph.input[index]
    del graph.value_info[:]  # shapes of before
    found.ir_version = max(4, found.ir_version)
    for key, value in (about or {}).items():
        entry = next((e for e in found.metadata_props if e.key == key), None) or found.metadata_props.add()
        entry.key, entry.value = key, value
    return found


def _set_attributes(network: Network, step: Any, node: Any) -> None:
    from onnx import helper

    now = network.attributes(step).attributes
    changed = {c.attribute for c in step.counts if c.attribute}
    if step.shape and step.node.get("group", 1) != 1:
        weight = network.read(step, 1, {})
        now, changed = {**now, "group": groups_of(weight, step.node.get("group", 1), step.shape)}, {*changed, "group"}
    for name in changed:
        index = next(i for i, a in enumerate(node.attribute) if a.name == name)
        node.attribute[index].CopyFrom(helper.make_attribute(name, now[name]))


def write(network: Network, path: str | Path, about: Mapping[str, str] | None = None) -> float:
    """Write a network to a file; returns how far ONNX Runtime's answer is from its own, relative to the largest.

    Raises ModelError where onnx.checker or ONNX Runtime refuses what was made, or it answers differently; the file is
    then not there.
    """
    asked = f"a network was to be written to {path}"
    onnx, _ = reading.packages(asked)
    target = Path(path)
    partial = target.with_name(f".{target.name}.partial.onnx")
    data = f"{target.name}.data"
    made = proto(network, about)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if made.ByteSize() < _MOST:
            partial.write_bytes(made.SerializeToString())
        else:
            onnx.save_model(made, str(partial), save_as_external_data=True, location=data)
        onnx.checker.check_model(str(partial), full_check=True)
        example = network.example()
        apart = difference(answers(network, example), run(partial, example))
        if not apart <= 1e-3:
            raise ModelError(
                asked,
                f"ONNX Runtime answers otherwise than the network, by {apart:.2g} of the largest answer",
                "Report the file; secateur's reading of one of its nodes is wrong.",
            )
        os.replace(partial, target)
    except Exception as error:
        if isinstance(error, (ModelError, MemoryError)):
            raise
        raise ModelError(asked, f"what was made is refused: {reading._line(error)}", "Report the file.") from error
    finally:
        partial.unlink(missing_ok=True)
    return apart


@torch.no_grad()
def answers(network: Network, example: tuple[Any, ...]) -> list[np.ndarray]:
    """What a network answers, in the order of its outputs."""
    training = network.training
    network.eval()
    try:
        found = network(*example)
    finally:
        network.train(training)
    return [v.numpy() for v in (found.values() if isinstance(found, dict) else [found])]


def run(path: str | Path, example: tuple[Any, ...]) -> list[np.ndarray]:
    """What ONNX Runtime answers for a file."""
    _, runtime = reading.packages(f"{path} was to be run")
    options = runtime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 4, torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    named = {i.name: x.numpy() for i, x in zip(session.get_inputs(), example, strict=True)}
    return list(session.run(None, named))


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """The largest difference of two answers, relative to the largest answer; infinite for other shapes."""
    if [v.shape for v in ours] != [v.shape for v in theirs]:
        return float("inf")
    most = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        a, b = (v[np.isfinite(a)].astype(np.float64) for v in (a, b))
        if a.size:
            most = max(most, float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-6)))
    return most
