"""Through a model block after block, holding one block's activations at a time.

The blocks are the entries of the model's stacks (lists of modules of one class); their real arguments are caught
by hooks, so that no architecture needs code of its own. Glue between two stacks (the norm between an encoder and
a decoder) is run by the model itself.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from secateur.edit import Edit, Mask, apply_, load, save
from secateur.errors import ResumeError, SettingError
from secateur.evidence import INPUTS, Evidence, Recorder, calm, check_finite, check_needs, merged, refuse_share
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch

Feed = Literal["pruned", "dense", "repaired"]


@dataclass(frozen=True)
class Progress:
    """One block is done: what the walk tells whoever watches."""

    block: str
    index: int
    total: int
    seconds: float
    kept: int  # of the weights in the block's masks
    weights: int
    error: float | None  # |dense output - output| / |dense output|, on the first batch


def stacks(model: nn.Module) -> list[list[str]]:
    """The model's stacks: for each, the dotted names of its blocks in order.

    A stack is a list of two or more modules of one class with weights in them, not inside another stack.
    """
    found: list[list[str]] = []
    for name, module in model.named_modules():
        if any(name.startswith(block + ".") for stack in found for block in stack):
            continue
        if not isinstance(module, (nn.ModuleList, nn.Sequential)) or not len(module):
            continue
        numbered = [(i, c) for i, c in enumerate(module.children()) if not getattr(c, "passes_through", False)]
        children = [child for _, child in numbered]  # those still there: where one was removed, it is passed over
        alike = len({type(child) for child in children}) == 1
        heavy = all(any(p.dim() >= 2 for p in child.parameters()) for child in children)
        inner = all(any(True for _ in child.children()) for child in children)  # a block, not a bare layer
        if alike and heavy and inner:
            found.append([f"{name}.{i}" if name else str(i) for i, _ in numbered])
    return found


class _Stop(Exception):  # noqa: N818  control flow of a capture, not an error
    pass


@dataclass
class _Call:
    """How one block is called: the shape of its arguments and where each tensor comes from."""

    name: str
    spec: Any
    leaves: list[Any]  # constants that are not tensors, else None
    sources: list[tuple[str, int, int]]  # "first" or "own" and its leaf; "out", blocks back and leaf; "plain"


@dataclass
class Block:
    """One block of the walk, with the inputs that reach it."""

    name: str  # "model.layers.3"; "" for what is in no stack, with the whole model as its module
    index: int
    total: int
    module: nn.Module
    model: nn.Module
    _calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    _batches: Sequence[Batch] = ()
    _before: tuple[str, ...] = ()  # names of the other blocks, when this is the rest
    _outputs: list[Any] | None = None  # taken before any change, when the feed is dense, or when it was looked at
    _looks: bool = False  # whether what it puts out while it is looked at is kept

    def pick(self, sites: Iterable[Site]) -> list[Site]:
        """The sites that lie in this block."""
        if self.name:
            return [s for s in sites if s.parts[0].name.startswith(self.name + ".")]
        return [s for s in sites if not any(s.parts[0].name.startswith(b + ".") for b in self._before)]

    @property
    def tensors(self) -> Tensors:
        """The block's tensors, by their names in the model."""
        if not self.name:
            return tensors(self.model)
        return {f"{self.name}.{k}": v for k, v in tensors(self.module).items()}

    @property
    def inputs(self) -> list[Tensor]:
        """What flows into the block, a tensor per batch: [examples, tokens, width] in a transformer."""
        refuse_share(f"the inputs of {self.name}")
        return [_flow(args, kwargs) for args, kwargs in self._calls]

    @property
    def calls(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What the block is called with, positional and by keyword, a pair per batch: to train it by itself."""
        refuse_share(f"the inputs of {self.name}")
        return list(self._calls)

    @torch.no_grad()
    def outputs(self) -> Iterator[Tensor]:
        """What flows out of the block as it is now, a tensor per batch."""
        refuse_share(f"the outputs of {self.name}")
        for found in self._outputs if self._looks and self._outputs is not None else self._run():
            yield _first_tensor(found)

    def observe(self, sites: Sequence[Site], needs: Iterable[str]) -> dict[str, Evidence]:
        """Measure at sites of the block over everything that flows in: site name -> Evidence."""
        wanted = check_needs(needs)
        if not sites or not wanted:
            return {site.name: Evidence() for site in sites}
        if wanted - INPUTS:
            raise SettingError(
                f"{sorted(wanted - INPUTS)} were asked of a block",
                "gradients go through the whole model",
                "Use observe.",
            )
        recorder = Recorder(sites, self.tensors, wanted)
        with torch.no_grad(), recorder:
            for _ in self._run():
                pass
        seen = merged(recorder.evidence())
        check_finite(seen)
        return seen

    def watch(self, name: str) -> Iterator[Tensor]:
        """What flows into a module inside the block, by its name in the model: a tensor per batch."""
        return (caught[name] for caught in self.watch_all([name]))

    @torch.no_grad()
    def watch_all(self, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
        """What flows into several modules inside the block, in one pass: by name, for each batch."""
        caught: dict[str, Tensor] = {}

        def note(name: str) -> Callable[..., None]:
            return lambda _, args, kwargs: caught.update({name: _flow(args, kwargs)})

        hooks = []
        for name in names:
            refuse_share(f"the inputs of {name}")
            hooks.append(self.model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True))
        try:
            for _ in self._run():
                yield dict(caught)
                caught.clear()
        finally:
            for hook in hooks:
                hook.remove()

    def _run(self) -> Iterator[Any]:
        if not self.name:
            for batch in self._batches:
                yield batch.through(self.model)
            return
        found = []
        for args, kwargs in self._calls:
            out = self.module(*args, **kwargs)
            if self._looks:
                found.append(out)
            yield out
        if self._looks:
            self._outputs = found


def look(model: nn.Module, batches: Iterable[Batch]) -> Iterator[Block]:
    """As `walk`, for those who change nothing: what a block puts out while it is looked at is what goes on.

    So a block that is looked at once runs once. It takes as much memory more as a block's outputs.
    """
    yield from _through(model, list(batches), [], _Journal(False), "pruned", True)


def walk(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    feed: Feed = "pruned",
    edits: list[Edit] | None = None,
) -> Iterator[Block]:
    """Yield the model's blocks in order, each with the inputs that reach it, then the rest of the model as one.

    `feed` says what reaches a block: the outputs of the blocks before it as they are after your edits ("pruned";
    "repaired" says the same when you also mend the block before going on), or as they were before ("dense").
    Give `edits`, the list you record changes in, and a run under `journal` can be taken up again: blocks done in an
    earlier run are replayed from the journal and not yielded.
    """
    if feed not in ("pruned", "dense", "repaired"):
        raise SettingError(f"feed={feed!r} was asked for", "it is pruned, dense or repaired", "Choose one of them.")
    record = [] if edits is None else edits
    yield from _through(model, list(batches), record, _Journal(edits is not None), feed, False)


def _through(
    model: nn.Module, held: list[Batch], record: list[Edit], log: "_Journal", feed: Feed, looks: bool
) -> Iterator[Block]:
    with calm(model):
        plan = _plan(model, held)
        names = [call.name for segment in plan for call in segment]
        index = 0
        for segment in plan:
            states = _capture(model, held, segment)
            for place, call in enumerate(segment):
                block = Block(call.name, index, len(names), model.get_submodule(call.name), model, _looks=looks)
                block._calls = [_arguments(call, state) for state in states]
                yield from _visit(block, record, log, dense=feed == "dense")
                if place + 1 < len(segment):
                    _advance(block, states, segment[place + 1 :])
                block._calls, block._outputs = [], None
                index += 1
        rest = Block("", index, len(names), model, model, _batches=held, _before=tuple(names))
        yield from _visit(rest, record, log, dense=False)


def _visit(block: Block, record: list[Edit], log: "_Journal", dense: bool) -> Iterator[Block]:
    """Hand a block out, or replay it; then write down what was done to it."""
    start, before = time.perf_counter(), len(record)
    if dense:
        with torch.no_grad():
            block._outputs = list(block._run())
    done = log.read(block.index)
    if done is not None:
        record.extend(apply_(block.model, done))
        return
    tell = _watcher.get()
    reference = _sample(block) if tell and block.name else None
    yield block
    log.write(block.index, record[before:])
    if tell is None:
        return
    masks = [edit for edit in record[before:] if isinstance(edit, Mask)]
    kept, weights = sum(m.kept for m in masks), sum(m.site.units for m in masks)
    error = None
    if reference is not None:
        error = float((_sample(block) - reference).norm() / reference.norm().clamp(min=1e-30))
    if block.name or weights:
        seconds = time.perf_counter() - start
        tell(Progress(block.name or "rest", block.index, block.total, seconds, kept, weights, error))


def _sample(block: Block) -> Tensor:
    args, kwargs = block._calls[0]
    with torch.no_grad():
        return _first_tensor(block.module(*args, **kwargs)).double()


@torch.no_grad()
def _plan(model: nn.Module, batches: Sequence[Batch]) -> list[list[_Call]]:
    """Segments of blocks each fed by the one before, found by watching one batch go through."""
    if not batches:
        return []
    blocks = [name for stack in stacks(model) for name in stack]
    order: list[str] = []
    seen: dict[str, tuple[list[Any], Any, list[Any]]] = {}  # name -> leaves in, spec, leaves out
    hooks = []

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            order.append(name)
            leaves, spec = tree_flatten((args, kwargs))
            seen[name] = (leaves, spec, tree_flatten(out)[0])

        return hook

    for name in blocks:
        hooks.append(model.get_submodule(name).register_forward_hook(note(name), with_kwargs=True))
    try:
        _short(batches[0]).through(model)
    finally:
        for handle in hooks:
            handle.remove()
    once = [name for name in order if order.count(name) == 1]  # a block called twice is left to the rest
    segments: list[list[str]] = []
    for name in once:
        previous = segments[-1][-1] if segments else None
        fed = previous is not None and any(
            a is b for a in seen[name][0] if isinstance(a, Tensor) for b in seen[previous][2]
        )
        segments[-1].append(name) if fed else segments.append([name])
    return [[_call(name, segment, seen) for name in segment] for segment in segments]


def _short(batch: Batch) -> Batch:
    """One example is enough to see who calls whom."""
    cut = {k: v[:1] if isinstance(v, Tensor) and v.dim() else v for k, v in _items(batch)}
    inputs = cut if not isinstance(batch.inputs, tuple) else tuple(cut.values())
    return Batch(inputs, batch.target)


def _items(batch: Batch) -> Iterable[tuple[Any, Any]]:
    return batch.inputs.items() if not isinstance(batch.inputs, tuple) else enumerate(batch.inputs)


def _call(name: str, segment: list[str], seen: dict[str, tuple[list[Any], Any, list[Any]]]) -> _Call:
    leaves, spec, _ = seen[name]
    place = segment.index(name)
    first = seen[segment[0]][0]
    sources: list[tuple[str, int, int]] = []
    for number, leaf in enumerate(leaves):
        source = ("plain", 0, 0)
        if isinstance(leaf, Tensor):
            source = ("own", number, 0)
            for back in range(1, place + 1):
                outs = seen[segment[place - back]][2]
                found = next((i for i, out in enumerate(outs) if out is leaf), None)
                if found is not None:
                    source = ("out", back, found)
                    break
            else:
                same = next((i for i, other in enumerate(first) if other is leaf), None)
                if same is not None:
                    source = ("first", same, 0)
        sources.append(source)
    return _Call(name, spec, [None if isinstance(v, Tensor) else v for v in leaves], sources)


@dataclass
class _State:
    """What one batch has at hand on its way through a segment."""

    first: list[Any]  # the leaves the segment's first block was called with
    own: dict[str, list[Any]]  # those of later blocks that nothing else provides
    outs: list[list[Any]]  # outputs of the blocks before, latest first


@torch.no_grad()
def _capture(model: nn.Module, batches: Sequence[Batch], segment: list[_Call]) -> list[_State]:
    """Run every batch up to the segment, keeping the arguments its blocks are called with."""
    wanting = {call.name: call for call in segment[1:] if any(kind == "own" for kind, _, _ in call.sources)}
    first = segment[0].name
    last = list(wanting)[-1] if wanting else first
    states: list[_State] = []
    caught: dict[str, list[Any]] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            leaves = tree_flatten((args, kwargs))[0]
            if name != first:  # what nothing else provides, without the activations
                kinds = [kind for kind, _, _ in wanting[name].sources]
                leaves = [leaf if kind == "own" else None for leaf, kind in zip(leaves, kinds, strict=True)]
            caught[name] = leaves
            if name == last:
                raise _Stop

        return hook

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(note(name), with_kwargs=True) for name in [first, *wanting]
    ]
    try:
        for batch in batches:
            caught.clear()
            with suppress(_Stop):
                batch.through(model)
            states.append(_State(caught[first], {name: caught[name] for name in wanting}, []))
    finally:
        for handle in hooks:
            handle.remove()
    _share(states)
    return states


def _share(states: list[_State]) -> None:
    """Batches often carry equal masks and positions: keep one of each."""
    kept: list[Tensor] = []

    def one(leaf: Any, flow: bool) -> Any:
        if flow or not isinstance(leaf, Tensor):
            return leaf
        for other in kept:
            if other.shape == leaf.shape and other.dtype == leaf.dtype and torch.equal(other, leaf):
                return other
        kept.append(leaf)
        return leaf

    for state in states:
        tensors_in = [i for i, leaf in enumerate(state.first) if isinstance(leaf, Tensor)]
        flow = tensors_in[0] if tensors_in else -1
        state.first = [one(leaf, i == flow) for i, leaf in enumerate(state.first)]
        state.own = {name: [one(leaf, False) for leaf in leaves] for name, leaves in state.own.items()}


def _arguments(call: _Call, state: _State) -> tuple[tuple[Any, ...], dict[str, Any]]:
    leaves = []
    for value, (kind, a, b) in zip(call.leaves, call.sources, strict=True):
        if kind == "plain":
            leaves.append(value)
        elif kind == "first":
            leaves.append(state.first[a])
        elif kind == "out":
            leaves.append(state.outs[a - 1][b])
        else:
            leaves.append(state.own[call.name][a])
    args, kwargs = tree_unflatten(leaves, call.spec)
    return args, kwargs


@torch.no_grad()
def _advance(block: Block, states: list[_State], ahead: list[_Call]) -> None:
    """Run the block as it now is, and keep of its outputs, and of older ones, what blocks ahead will ask for."""
    backs = [a - place for place, call in enumerate(ahead) for kind, a, _ in call.sources if kind == "out"]
    reach = max(backs, default=1)
    needed = {a for call in ahead for kind, a, _ in call.sources if kind == "first"}
    ready = iter(block._outputs) if block._outputs is not None else block._run()
    for number, (state, found) in enumerate(zip(states, ready, strict=True)):
        state.outs = [tree_flatten(found)[0], *state.outs][:reach]
        state.first = [
            leaf if i in needed or not isinstance(leaf, Tensor) else None for i, leaf in enumerate(state.first)
        ]
        block._calls[number] = ((), {})  # its inputs have served
        if block._outputs is not None:
            block._outputs[number] = None


def _flow(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return _first_tensor((args, kwargs))


def _first_tensor(tree: Any) -> Tensor:
    found = next((leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)), None)
    assert found is not None, "a block takes and gives a tensor"
    return found


# Runs that can be taken up again


class _Journal:
    """Edits of finished blocks, a file each, in the folder of `journal`; walks of one run are told apart."""

    def __init__(self, active: bool) -> None:
        found = _folder.get() if active else None
        self.folder: Path | None = found[0] if found else None
        self.number = next(found[1]) if found else 0

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"block-{self.number}-{index:04d}.safetensors"

    def read(self, index: int) -> list[Edit] | None:
        if self.folder is None or not self._path(index).exists():
            return None
        return load(self._path(index))

    def write(self, index: int, edits: Sequence[Edit]) -> None:
        if self.folder is not None:
            save(edits, self._path(index))


_folder: ContextVar[tuple[Path, Iterator[int]] | None] = ContextVar("folder", default=None)
_watcher: ContextVar[Callable[[Progress], None] | None] = ContextVar("watcher", default=None)


@contextmanager
def journal(folder: str | Path | None, fingerprint: str = "") -> Iterator[None]:
    """Within this, walks write each finished block to the folder, and take up what is there.

    The fingerprint says of what model, data and settings the run is. Raises ResumeError when the folder holds the
    journal of another run.
    """
    if folder is None:
        yield
        return
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    about = place / "run.json"
    if about.exists():
        there = json.loads(about.read_text()).get("fingerprint")
        if there != fingerprint:
            raise ResumeError(
                f"a run was to be taken up in {place}",
                "the journal there is of another model, other data or other settings",
                "Use another folder, or delete this one to start anew.",
            )
    elif any(place.iterdir()):
        raise ResumeError(
            f"{place} was to hold a run's journal", "it holds other files", "Give an empty or a new folder."
        )
    else:
        about.write_text(json.dumps({"fingerprint": fingerprint}))
    token = _folder.set((place, count()))
    try:
        yield
    finally:
        _folder.reset(token)


def journal_place(name: str) -> Path | None:
    """A file in the journal of a run for what is not gone through block by block; None without a journal.

    Asked for in the same order, the same files are given, so that a run taken up again finds its own.
    """
    found = _folder.get()
    return None if found is None else found[0] / f"block-{next(found[1])}-{name}.safetensors"


@contextmanager
def unjournalled() -> Iterator[None]:
    """Within this, nothing is written to a journal nor taken from it: for runs inside another that keeps its own."""
    token = _folder.set(None)
    try:
        yield
    finally:
        _folder.reset(token)


@contextmanager
def watching(callback: Callable[[Progress], None] | None) -> Iterator[None]:
    """Within this, walks tell the callback of each block they finish."""
    token = _watcher.set(callback)
    try:
        yield
    finally:
        _watcher.reset(token)
