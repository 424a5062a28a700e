"""The published formulas done plainly: what pruning's speed is measured against, in pruning.py.

As their authors' scripts go about it: a hook on every matrix, a full sort, for SparseGPT a factor, an inverse, a
factor of that and a loop over the columns, for DSnoT pointers into sorted lists that are read in turn. Each prunes a
model with `model.model.layers` in place at half of its weights (20 % of its structures), given windows of tokens
[windows, tokens].
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def inputs_of_first(model: nn.Module, ids: Tensor) -> tuple[list[Tensor], dict[str, object]]:
    caught: list[Tensor] = []
    rest: dict[str, object] = {}

    class Caught(Exception):
        pass

    def hook(_: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, object]) -> None:
        caught.append(args[0])
        rest.update(kwargs)
        raise Caught

    handle = model.model.layers[0].register_forward_pre_hook(hook, with_kwargs=True)
    for row in ids:
        try:
            model(row.unsqueeze(0), use_cache=False)
        except Caught:
            pass
    handle.remove()
    return caught, rest


def plain_prune(model: nn.Module, ids: Tensor, start: Callable, add: Callable, finish: Callable) -> None:
    with torch.no_grad():
        xs, kwargs = inputs_of_first(model, ids)
        for block in model.model.layers:
            linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
            state = {n: start(m) for n, m in linears.items()}
            hooks = [
                m.register_forward_pre_hook(lambda _, args, n=n: add(state[n], args[0].reshape(-1, args[0].shape[-1])))
                for n, m in linears.items()
            ]
            for x in xs:
                block(x, **kwargs)
            for handle in hooks:
                handle.remove()
            for name, linear in linears.items():
                finish(linear, state[name])
            xs = [block(x, **kwargs) for x in xs]


def loudness(state: dict[str, Tensor], x: Tensor) -> None:
    """Squares of the inputs [tokens, in], meaned over the sequences so far."""
    count = state["count"]
    state["row"] *= count / (count + 1)
    state["count"] = count + 1
    state["row"] += torch.norm(x.float().t(), p=2, dim=1) ** 2 / (count + 1)


def quiet(linear: nn.Linear) -> dict[str, object]:
    return {"row": torch.zeros(linear.in_features), "count": 0}


def lowest_half(score: Tensor) -> Tensor:
    """The lower half of each row."""
    order = torch.sort(score, dim=-1, stable=True).indices
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order[:, : score.shape[1] // 2], True)


def plain_magnitude(model: nn.Module, ids: Tensor) -> None:
    with torch.no_grad():
        for block in model.model.layers:
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
                score = linear.weight.abs()
                threshold = torch.sort(score.flatten()).values[score.numel() // 2]
                linear.weight[score < threshold] = 0


def plain_wanda(model: nn.Module, ids: Tensor) -> None:
    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        linear.weight[lowest_half(linear.weight.abs() * state["row"].sqrt().reshape(1, -1))] = 0

    plain_prune(model, ids, quiet, loudness, finish)


def plain_gblm(model: nn.Module, ids: Tensor) -> None:
    """Das et al. 2023, alpha = 100: a backward pass for each sequence, then the scores block after block."""
    linears = [m for block in model.model.layers for m in block.modules() if isinstance(m, nn.Linear)]
    steep = {m: torch.zeros_like(m.weight) for m in linears}
    for row in ids:
        logits = model(row.unsqueeze(0), use_cache=False).logits[0]
        F.cross_entropy(logits[:-1], row[1:]).backward()
        for m in linears:
            steep[m] += (100 * m.weight.grad) ** 2
        model.zero_grad()

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        score = linear.weight.abs() * (state["row"].sqrt().reshape(1, -1) + steep[linear].sqrt())
        linear.weight[lowest_half(score)] = 0

    plain_prune(model, ids, quiet, loudness, finish)


def plain_swaps(w: Tensor, mean: Tensor, variance: Tensor, norm: Tensor, threshold: float, rounds: int = 50) -> Tensor:
    """What is gone [out, in] of a matrix after Zhang et al. 2023's swaps from Wanda's choice.

    Two sorted lists of each row, the candidates of one sign at one end and of the other at the other end, and a pointer
    into each end; rows go on until the mean of what they lack is below the threshold.
    """
    contribution, cost = w * mean, w.abs() * norm
    gone = lowest_half(cost)
    grow = torch.sort(torch.where(gone, contribution / variance, 0.0), dim=1).indices  # lacking < 0: from the left
    signed = torch.where(gone, 0.0, torch.sign(contribution) / cost.clamp(min=1e-12))  # cheapest of each sign outermost
    prune = torch.sort(signed, dim=1).indices  # lacking > 0: a negative one, from the left
    lack = (contribution * gone).sum(1)
    columns = w.shape[1]
    place = torch.zeros(4, len(w), dtype=torch.long)  # grow left and right, prune left and right
    active = torch.ones(len(w), dtype=torch.bool)
    every = torch.arange(len(w))
    for _ in range(rounds):
        active &= lack.abs() > threshold
        if not active.any():
            break
        few = lack < 0
        at_grow = torch.where(few, place[0], columns - 1 - place[1])
        at_prune = torch.where(few, columns - 1 - place[3], place[2])
        g, q = grow.gather(1, at_grow[:, None]).squeeze(1), prune.gather(1, at_prune[:, None]).squeeze(1)
        delta = contribution.gather(1, q[:, None]).squeeze(1) - contribution.gather(1, g[:, None]).squeeze(1)
        lack = torch.where(active, lack + delta, lack)
        rows = every[active]
        gone[rows, g[active]], gone[rows, q[active]] = False, True
        place[0] += active & few
        place[1] += active & ~few
        place[2] += active & ~few
        place[3] += active & few
    return gone


def plain_dsnot(model: nn.Module, ids: Tensor) -> None:
    attention = {m for b in model.model.layers for m in b.self_attn.modules() if isinstance(m, nn.Linear)}

    def add(state: dict[str, Tensor], x: Tensor) -> None:
        count = state["count"]
        loudness(state, x)
        for name, value in (("mean", x.mean(0)), ("variance", x.var(0, unbiased=False))):
            state[name] = (state[name] * count + value) / (count + 1)

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        norm = state["row"].sqrt().reshape(1, -1)
        if linear in attention:
            gone = plain_swaps(linear.weight, state["mean"], state["variance"].clamp(min=1e-8), norm, 0.1 / 2048)
        else:
            gone = lowest_half(linear.weight.abs() * norm)
        linear.weight[gone] = 0

    def start(linear: nn.Linear) -> dict[str, object]:
        return quiet(linear) | {n: torch.zeros(linear.in_features) for n in ("mean", "variance")}

    plain_prune(model, ids, start, add, finish)


def plain_flap(model: nn.Module, ids: Tensor, share: float = 0.2) -> None:
    """An et al. 2023: fluctuation times column norms, one list of all heads and neurons, means into biases."""
    config = model.config
    size = config.hidden_size // config.num_attention_heads
    group = size * (config.num_attention_heads // config.num_key_value_heads)  # a key's queries go with it
    seen: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def add(state: dict[str, Tensor], x: Tensor) -> None:
        count = state["count"]
        state["count"] = count + 1
        old = state["mean"].clone()
        state["mean"] += (x.mean(0) - old) / (count + 1)
        state["sum"] += ((x - old) * (x - state["mean"])).sum(0)

    def start(linear: nn.Linear) -> dict[str, object]:
        return {"mean": torch.zeros(linear.in_features), "sum": torch.zeros(linear.in_features), "count": 0}

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        seen.append((linear, state["mean"], state["sum"] / state["count"]))

    plain_prune(model, ids, start, add, finish)
    found = {linear: (mean, spread) for linear, mean, spread in seen}
    scores, costs, places = [], [], []
    for number, block in enumerate(model.model.layers):
        for kind, linear in (("head", block.self_attn.o_proj), ("neuron", block.mlp.down_proj)):
            score = found[linear][1] * linear.weight.detach().norm(dim=0) ** 2
            score = score**2 if kind == "head" else score
            z = (score - score.mean()) / score.std()
            z = z.reshape(-1, group).mean(1) if kind == "head" else z
            scores.append(z)
            each = (2 * group + 2 * size) * config.hidden_size if kind == "head" else 3 * config.hidden_size
            costs.append(torch.full_like(z, each))
            places += [(number, kind, i) for i in range(len(z))]
    order = torch.sort(torch.cat(scores)).indices
    spent = torch.cat(costs)[order].cumsum(0)
    gone = {places[i] for i in order[: int((spent <= share * spent[-1]).sum())].tolist()}
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            for kind, linear, width in (("head", block.self_attn.o_proj, group), ("neuron", block.mlp.down_proj, 1)):
                units = linear.in_features // width
                kept = torch.tensor([(number, kind, i) not in gone for i in range(units)])
                rows = kept.repeat_interleave(width)
                bias = linear.weight[:, ~rows] @ found[linear][0][~rows]
                linear.bias = nn.Parameter(bias if linear.bias is None else linear.bias + bias)
                linear.weight = nn.Parameter(linear.weight[:, rows].clone())
                before = ("q_proj",) if kind == "head" else ("gate_proj", "up_proj")
                parent = block.self_attn if kind == "head" else block.mlp
                for name in before:
                    one = getattr(parent, name)
                    one.weight = nn.Parameter(one.weight[rows].clone())
                for name in ("k_proj", "v_proj") if kind == "head" else ():
                    one = getattr(parent, name)
                    one.weight = nn.Parameter(one.weight[kept.repeat_interleave(size)].clone())


def plain_shortgpt(model: nn.Module, ids: Tensor, share: float = 0.2) -> None:
    """Men et al. 2024: one pass with all hidden states kept; the blocks that turn them least go."""
    count = len(model.model.layers)
    turn = torch.zeros(count)
    with torch.no_grad():
        for row in ids:
            states = model.model(row.unsqueeze(0), use_cache=False, output_hidden_states=True).hidden_states
            for i in range(count):
                turn[i] += 1 - F.cosine_similarity(states[i], states[i + 1], dim=-1).mean()
    gone = set(turn.argsort()[: int(share * count)].tolist())
    model.model.layers = nn.ModuleList(b for i, b in enumerate(model.model.layers) if i not in gone)


def plain_sweep(w: Tensor, h: Tensor) -> Tensor:
    """A matrix [out, in] at 50 % given its damped-to-be gram h, which is changed."""
    w = w.clone()
    columns = w.shape[1]
    dead = h.diagonal() == 0
    h[dead, dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(0.01 * h.diagonal().mean())
    u = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    for a in range(0, columns, 128):
        b = min(a + 128, columns)
        w1, u1 = w[:, a:b].clone(), u[a:b, a:b]
        q1, e1 = torch.zeros_like(w1), torch.zeros_like(w1)
        score = w1**2 / u1.diagonal().reshape(1, -1) ** 2
        order = torch.sort(score.flatten(), stable=True).indices
        gone = torch.zeros(score.numel(), dtype=torch.bool).scatter_(0, order[: score.numel() // 2], True)
        gone = gone.reshape(score.shape)
        for i in range(b - a):
            column, d = w1[:, i], u1[i, i]
            q = column.clone()
            q[gone[:, i]] = 0
            q1[:, i] = q
            e = (column - q) / d
            w1[:, i:] -= e.unsqueeze(1).matmul(u1[i, i:].unsqueeze(0))
            e1[:, i] = e
        w[:, a:b] = q1
        w[:, b:] -= e1.matmul(u[a:b, b:])
    return w


def plain_sparsegpt(model: nn.Module, ids: Tensor) -> None:
    def add(state: dict[str, Tensor], x: Tensor) -> None:
        count = state["count"]
        state["h"] *= count / (count + 1)
        state["count"] = count + 1
        x = (2 / (count + 1)) ** 0.5 * x.t()
        state["h"] += x.matmul(x.t())

    def finish(linear: nn.Linear, state: dict[str, Tensor]) -> None:
        linear.weight.copy_(plain_sweep(linear.weight, state["h"]))

    def start(linear: nn.Linear) -> dict[str, object]:
        return {"h": torch.zeros(linear.in_features, linear.in_features), "count": 0}

    plain_prune(model, ids, start, add, finish)
