"""What was measured at a site: sums and a count, so that batches, processes and clients can be merged.

`observe` catches what flows into a weight wherever the weight is used, by module or by function, so that the
experts of a stacked tensor, tied weights and transposed layers need no code of their own.

    input         sum of the inputs                            [in]
    input_square  sum of the squared inputs                    [in]
    input_scatter sum of the squared distances of the inputs
                  from the mean of their own example           [in]
    gram          sum of x x^T over the inputs                 [in, in]
    grad          sum over batches of the gradient             [as the weight]
    grad_abs      sum over batches of the gradient's size      [as the weight]
    grad_square   sum over batches of the squared gradient     [as the weight]
    grad_count    how many gradients were summed               []

A convolution's input is the unfolded patch, [in * kh * kw]; a grouped one has a leading axis of groups. Inputs without
an axis of tokens (of an MLP, of an expert) are one example together. Gradients of a batch are those of its mean loss,
in which signs cancel: `examples` makes each example a batch of its own.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from secateur.errors import EvidenceError, SettingError, did_you_mean
from secateur.kernels.products import BLOCK, add_product
from secateur.site import Part, Site, Tensors, tensors
from secateur.task import Batch, logits_of, modes_of, restore_modes_

INPUTS = frozenset({"input", "input_square", "input_scatter", "gram"})
GRADS = frozenset({"grad", "grad_abs", "grad_square", "grad_count"})


@dataclass(frozen=True, eq=False)
class Evidence:
    """Sums in float64 and a count of what they run over: tokens or positions for inputs, batches for gradients."""

    count: int = 0
    sums: Mapping[str, Tensor] = field(default_factory=dict)

    def merge(self, other: "Evidence") -> "Evidence":
        """Both together; order and grouping do not matter."""
        keys = {*self.sums, *other.sums}
        empty = torch.zeros((), dtype=torch.float64)
        return Evidence(self.count + other.count, {k: self.sums.get(k, empty) + other.sums.get(k, empty) for k in keys})

    def beside(self, other: "Evidence") -> "Evidence":
        """With what was measured there in another way, such as gradients; the count stays that of the inputs."""
        return Evidence(self.count or other.count, {**other.sums, **self.sums})

    def mean(self, key: str) -> Tensor:
        """A sum over its count. Raises EvidenceError when nothing was seen."""
        if self.count == 0:
            raise EvidenceError(
                f"the mean of {key} was asked for", "nothing was seen there", "Give calibration data that reaches it."
            )
        return self.sums[key] / self.count


def observe(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Iterable[Batch],
    needs: Iterable[str],
    loss: Callable[[nn.Module, Batch], Tensor] | None = None,
) -> dict[str, Evidence]:
    """Measure at every site over some batches: site name -> Evidence.

    Gradients need the `loss`, and go through the whole model. Raises SettingError for a key that does not exist,
    EvidenceError, naming the site, where a value is not finite or a gradient is asked of a frozen weight.
    """
    wanted = check_needs(needs)
    if wanted & GRADS:
        _check_learns(model, sites)
    recorder = Recorder(sites, tensors(model), wanted & INPUTS)
    grads: dict[str, dict[str, Tensor]] = {}
    count = 0
    with calm(model):
        for batch in batches:
            if wanted & GRADS:
                if loss is None:
                    raise SettingError("gradients were asked for", "no loss was given", "Give observe the task's loss.")
                with torch.enable_grad(), recorder:
                    torch.autograd.backward(loss(model, batch))
                _add_grads(model, sites, wanted, grads)
                count += 1
            else:
                with torch.no_grad(), recorder:
                    batch.through(model)
    found = recorder.evidence()
    for name, sums in grads.items():
        found[name] = found.get(name, Evidence()).beside(Evidence(count, sums))
    found = merged(found)
    check_finite(found)
    return found


_Merge = Callable[[dict[str, Evidence]], dict[str, Evidence]]
_merge: ContextVar[_Merge | None] = ContextVar("merge", default=None)


@contextmanager
def merging(merge: _Merge) -> Iterator[None]:
    """Within this, what was seen here is merged with what was seen elsewhere, by other processes, before it is used."""
    token = _merge.set(merge)
    try:
        yield
    finally:
        _merge.reset(token)


def merged(found: dict[str, Evidence]) -> dict[str, Evidence]:
    """Evidence as it is to be used: that of all who measure together."""
    merge = _merge.get()
    return found if merge is None else merge(found)


@contextmanager
def unshared() -> Iterator[None]:
    """Within this, activations of this process's share of the data may be looked at one by one.

    What is summed up of them is `merged` afterwards, before it is used.
    """
    token = _merge.set(None)
    try:
        yield
    finally:
        _merge.reset(token)


def summed(name: str, add: Callable[[], Evidence]) -> Evidence:
    """What `add` sums up of this process's share of the data, with that of all who measure together."""
    with unshared():
        mine = add()
    return merged({name: mine})[name]


def refuse_share(what: str) -> None:
    """Raise SettingError within `merging` for what is no sum, and would be of one share of the data."""
    if _merge.get() is not None:
        raise SettingError(
            f"{what} were to be looked at in several processes",
            "each has only its share of them: what is added up is evidence",
            "Run this method in one process, without torchrun.",
        )


def examples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each example of some batches as a batch of its own, so that gradients can be taken one by one."""
    for batch in batches:
        size = batch.size
        for place in range(size):
            yield Batch(_one(batch.inputs, place, size), _one(batch.target, place, size))


def _one(value: Any, place: int, size: int) -> Any:
    if isinstance(value, Tensor):
        return value[place : place + 1] if value.dim() and len(value) == size else value
    if isinstance(value, Mapping):
        return {k: _one(v, place, size) for k, v in value.items()}
    if isinstance(value, tuple):
        return tuple(_one(v, place, size) for v in value)
    return value[place : place + 1] if isinstance(value, list) and len(value) == size else value


def check_needs(needs: Iterable[str]) -> frozenset[str]:
    """The keys of evidence asked for. Raises SettingError for one that does not exist."""
    wanted = frozenset(needs)
    for key in wanted - INPUTS - GRADS:
        raise SettingError(f"evidence {key!r} was asked for", "nothing measures it", did_you_mean(key, INPUTS | GRADS))
    return wanted


def check_finite(found: Mapping[str, Evidence]) -> None:
    """Raise EvidenceError, naming the site, where a sum holds NaN or infinity: the one where it began.

    That is the first one of inputs, and the last one of gradients, which go the other way.
    """
    for name, key in _not_finite(found, INPUTS):
        raise EvidenceError(
            f"{key} was measured at {name}",
            "it holds NaN or infinity",
            "Look for overflow before this layer; half precision often needs bfloat16 or float32.",
        )
    for name, key in _not_finite({name: found[name] for name in reversed(list(found))}, GRADS):
        raise EvidenceError(
            f"{key} was measured at {name}",
            "it holds NaN or infinity: a gradient overflowed there, or the loss is not finite",
            "Run in bfloat16 or float32 (--dtype float32); float16 ends at 65,504.",
        )


def _not_finite(found: Mapping[str, Evidence], keys: frozenset[str]) -> Iterator[tuple[str, str]]:
    for name, seen in found.items():
        for key in seen.sums.keys() & keys:
            if not bool(torch.isfinite(seen.sums[key]).all()):
                yield name, key


class Recorder(TorchFunctionMode):
    """Sums what flows into the weights of some sites while it is active.

    Weights that are given the very same tensor (q, k and v; gate and up) share one sum, so that it is computed and
    kept once.
    """

    def __init__(self, sites: Sequence[Site], named: Tensors, needs: frozenset[str]) -> None:
        super().__init__()
        self.needs = needs
        self._sites = {site.name: site for site in sites}
        self._at: dict[tuple[Any, ...], str] = {}  # where a weight lies in memory, outputs first -> site
        for site in sites if needs else ():
            for part in site.parts:
                seen = part.read(named)
                if seen.dim() >= 2:
                    self._at[_place(seen)] = site.name
        self._pending: tuple[Tensor, tuple[Any, ...], list[str]] | None = None
        self._sums: dict[tuple[str, ...], dict[str, Tensor]] = {}
        self._counts: dict[tuple[str, ...], int] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note the input of a product with a known weight, then do what was asked."""
        kwargs = kwargs or {}
        place = _PRODUCTS.get(getattr(func, "__name__", ""))
        if place is not None and self.needs:
            x, weight = _argument(args, kwargs, *place[0]), _argument(args, kwargs, *place[1])
            if isinstance(weight, Tensor) and isinstance(x, Tensor):
                # A plain product x @ w has the weight inputs first: as seen, it is the transpose.
                plain = func.__name__ != "linear" and not func.__name__.startswith("conv") and weight.dim() == 2
                name = self._at.get(_place(weight.T if plain else weight))
                if name is not None:
                    self._note(x.detach(), _unfolding(func.__name__, args, kwargs, weight), name)
        return func(*args, **kwargs)

    def __exit__(self, *about: Any) -> None:
        """Leave, with everything seen counted."""
        self._flush()
        super().__exit__(*about)  # type: ignore[no-untyped-call]  # torch leaves it untyped

    def _note(self, x: Tensor, unfolding: tuple[Any, ...], name: str) -> None:
        if self._pending is not None:
            held, how, names = self._pending
            if held.data_ptr() == x.data_ptr() and held.shape == x.shape and how == unfolding:
                names.append(name)
                return
            self._flush()
        self._pending = (x, unfolding, [name])

    def _flush(self) -> None:
        if self._pending is None:
            return
        (x, unfolding, names), self._pending = self._pending, None
        rows = _rows(x, unfolding)  # [groups, tokens, in]
        apart = len(x) if x.dim() > 2 else 1  # examples whose tokens follow one another
        group = tuple(names)
        sums = self._sums.setdefault(group, {})
        self._counts[group] = self._counts.get(group, 0) + rows.shape[1]
        with torch.no_grad():
            for key in self.needs:
                if key == "gram":
                    width = rows.shape[-1]
                    if key not in sums:
                        sums[key] = rows.new_zeros(len(rows), width, width, dtype=torch.float64)
                    for total, own in zip(sums[key], rows, strict=True):
                        add_gram_(total, own)
                    continue
                found = _sum_of(key, rows, apart)
                found = found[0] if rows.shape[0] == 1 else found
                if key in sums:
                    sums[key] += found
                else:
                    sums[key] = found.double()

    def evidence(self) -> dict[str, Evidence]:
        """What was seen: site name -> Evidence. Sites that saw nothing have a count of zero."""
        found: dict[str, Evidence] = {}
        for group, sums in self._sums.items():
            if "gram" in sums:
                for total in sums["gram"]:
                    mirror_(total)
                sums = {**sums, "gram": sums["gram"][0] if len(sums["gram"]) == 1 else sums["gram"]}
            seen = Evidence(self._counts[group], sums)
            for name in dict.fromkeys(group):
                found[name] = found[name].merge(seen) if name in found else seen
        for name in self._sites:
            found.setdefault(name, Evidence())
        return found


_PRODUCTS: dict[str, tuple[tuple[int, str], tuple[int, str]]] = {
    # function -> where its input and its weight stand among the arguments
    "linear": ((0, "input"), (1, "weight")),
    "conv1d": ((0, "input"), (1, "weight")),
    "conv2d": ((0, "input"), (1, "weight")),
    "addmm": ((1, "mat1"), (2, "mat2")),
    "mm": ((0, "input"), (1, "mat2")),
    "matmul": ((0, "input"), (1, "other")),
    "__matmul__": ((0, "self"), (1, "other")),
}


def _place(weight: Tensor) -> tuple[Any, ...]:
    return (weight.data_ptr(), tuple(weight.shape), weight.stride())


def _argument(args: tuple[Any, ...], kwargs: Mapping[str, Any], place: int, name: str) -> Any:
    return args[place] if len(args) > place else kwargs.get(name)


def _unfolding(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], weight: Tensor) -> tuple[Any, ...]:
    if not name.startswith("conv"):
        return ()
    one = weight.dim() - 2

    def pair(value: Any) -> tuple[int, ...]:
        found = (value,) * one if isinstance(value, int) else tuple(value)
        return found if one == 2 else (1, *found) if name == "conv1d" else found

    stride = _argument(args, kwargs, 3, "stride") or 1
    padding = _argument(args, kwargs, 4, "padding")
    dilation = _argument(args, kwargs, 5, "dilation") or 1
    groups = _argument(args, kwargs, 6, "groups") or 1
    kernel = tuple(weight.shape[2:]) if one == 2 else (1, *weight.shape[2:])
    more = (0, 0)  # "same" pads an odd number unevenly: one more behind
    if isinstance(padding, str):
        reach = [d * (k - 1) if padding == "same" else 0 for d, k in zip(pair(dilation), kernel, strict=True)]
        pads, more = tuple(r // 2 for r in reach), (reach[0] % 2, reach[1] % 2)
    else:
        pads = (
            (0, padding or 0)
            if one == 1 and isinstance(padding or 0, int)
            else (0, *padding)
            if one == 1
            else pair(padding or 0)
        )
    return (kernel, pair(stride), pads, pair(dilation), groups, more)


def _rows(x: Tensor, unfolding: tuple[Any, ...]) -> Tensor:
    """What meets the weight, a row per token or position: [groups, tokens, in]."""
    if not unfolding:
        return x.reshape(1, -1, x.shape[-1])
    kernel, stride, padding, dilation, groups, more = unfolding
    x = x.unsqueeze(2) if x.dim() == 3 else x
    x = F.pad(x, (0, more[1], 0, more[0])) if any(more) else x
    patches = F.unfold(x, kernel, dilation=dilation, padding=padding, stride=stride)  # [n, in*kh*kw, positions]
    n, width, positions = patches.shape
    patches = patches.reshape(n, groups, width // groups, positions)
    return patches.permute(1, 0, 3, 2).reshape(groups, n * positions, width // groups)


def add_gram_(total: Tensor, rows: Tensor) -> None:
    """Add the sum of x x^T over rows [n, in] to the lower triangle of a total [in, in] in float64.

    Products and sums of a batch are those of float32, of bfloat16 too: the products of two such numbers are exact.
    What stands above the triangle is not said: `mirror_` puts it right when all is summed.
    """
    rows = rows if rows.dtype in (torch.float32, torch.float64, torch.bfloat16) else rows.float()
    found = rows.new_empty(total.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
    add_product(found, rows.T, rows.T, fresh=True, lower=True)
    for a in range(0, len(total), BLOCK):
        b = a + BLOCK
        total[a:b, :b] += found[a:b, :b]


def mirror_(total: Tensor) -> None:
    """Make a matrix symmetrical: what stands below the diagonal counts."""
    for a in range(0, len(total), BLOCK):
        b = a + BLOCK
        total[a:b, b:] = total[b:, a:b].T
        square = total[a:b, a:b]
        square.copy_(square.tril() + square.tril(-1).T)


def _sum_of(key: str, rows: Tensor, examples: int) -> Tensor:
    rows = rows if rows.dtype in (torch.float32, torch.float64) else rows.float()
    if key == "input_scatter":  # centred first: the difference of two large sums would lose a small variance
        each = rows.reshape(rows.shape[0], examples, -1, rows.shape[-1])
        return (each - each.mean(2, keepdim=True)).square().sum((1, 2), dtype=torch.float64)
    if key == "input_square":
        return rows.square().sum(1, dtype=torch.float64)
    return rows.sum(1, dtype=torch.float64)


def _check_learns(model: nn.Module, sites: Sequence[Site]) -> None:
    named = tensors(model)
    for site in sites:
        if not site.parts[0].read(named).requires_grad:
            raise EvidenceError(
                f"the gradient of {site.name} was asked for",
                "it is frozen (requires_grad is False)",
                "Call requires_grad_(True) on it, or leave it out with exclude.",
            )


def _add_grads(
    model: nn.Module, sites: Sequence[Site], wanted: frozenset[str], found: dict[str, dict[str, Tensor]]
) -> None:
    named = tensors(model)
    for site in sites:
        part: Part = site.parts[0]
        whole = named[part.name].grad
        seen = (torch.zeros(part.shape) if whole is None else part.view(whole)).double()
        sums = found.setdefault(site.name, {})
        for key in sorted(wanted & GRADS):
            if key not in sums:
                shape = () if key == "grad_count" else seen.shape
                sums[key] = torch.zeros(shape, dtype=torch.float64, device=seen.device)
            _ADD[key](sums[key], seen)
    for parameter in model.parameters():
        parameter.grad = None


# In place and without a tensor between: float64 takes twice the room, and this is done for every example.
_ADD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "grad": lambda total, seen: total.add_(seen),
    "grad_abs": lambda total, seen: total.add_(seen.abs()),
    "grad_square": lambda total, seen: total.addcmul_(seen, seen),
    "grad_count": lambda total, seen: total.add_(1),
}


@contextmanager
def calm(model: nn.Module) -> Iterator[nn.Module]:
    """The model in eval mode, keeping no cache, with experts run one by one; as it was, afterwards."""
    modes = modes_of(model)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    kept = [(c, k, getattr(c, k)) for c in configs for k in ("use_cache", "_experts_implementation") if hasattr(c, k)]
    model.eval()
    for config, key, _ in kept:
        setattr(config, key, False if key == "use_cache" else "eager")
    try:
        yield model
    finally:
        for config, key, value in kept:
            setattr(config, key, value)
        restore_modes_(model, modes)


@torch.no_grad()
def answered(model: nn.Module, batch: Batch) -> Tensor:
    """A model's logits for a batch, in float64: in eval mode, on the model's device."""
    with calm(model):
        return logits_of(batch.to(next(model.parameters()).device).through(model)).double()
