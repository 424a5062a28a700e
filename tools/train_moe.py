"""Makes a mixture of experts out of SmolLM2-135M: its feed-forward layers split, a router tuned to choose.

python tools/train_moe.py                       25 minutes on one core; writes ~/.cache/secateur/smollm2-moe16
python tools/train_moe.py --minutes 2 --out /tmp/moe

Each feed-forward layer is cut into one shared part, which every token goes through, and sixteen experts of like gates
(balanced k-means over the rows of gate_proj). The result is a stock Qwen2Moe: its routing weights are shares of all
experts and are not rescaled, so that with a router that knows nothing each is 1/16, and with the experts' last matrix
times 16 any number of experts adds up to just that part of the layer; all of them are the dense layer, which is
checked. The router starts from the least-squares prediction of how much each expert has to say, and is then tuned on
Python's documentation and C4 in turn to give the dense model's probabilities, with the experts unless --router-only.

The folder is written whole or not at all, and is opened with `open_model(folder)`; about.json in it has the settings
and the perplexities.
"""

import argparse
import copy
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from secateur.models import Opened, open_model
from secateur.task import Batch, Task, forever
from secateur.tasks import python_docs, wikitext2
from secateur.tasks.pack import cache
from secateur.walk import walk

NAME = "smollm2-moe16"


def say(line: str) -> None:
    """Tell whoever watches, at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def balanced(points: Tensor, clusters: int, rounds: int = 10, seed: int = 0) -> Tensor:
    """Cluster of each point [points], all clusters equally large: k-means in which full clusters take no more.

    Those that lose most by not getting their nearest centre choose first.
    """
    each = len(points) // clusters
    if each * clusters != len(points):
        raise ValueError(f"{len(points)} points do not make {clusters} clusters of one size")
    draw = torch.Generator().manual_seed(seed)
    centres = points[torch.randperm(len(points), generator=draw)[:clusters]]
    label = torch.zeros(len(points), dtype=torch.int64)
    for _ in range(rounds):
        far = torch.cdist(points, centres)  # [points, clusters]
        two = far.topk(min(2, clusters), largest=False).values
        order = (two[:, -1] - two[:, 0]).argsort(descending=True).tolist()
        room, before = [each] * clusters, label.clone()
        for point, wishes in zip(order, far[order].argsort(1).tolist(), strict=True):
            label[point] = next(c for c in wishes if room[c])
            room[int(label[point])] -= 1
        if torch.equal(label, before):
            break
        centres = torch.stack([points[label == c].mean(0) for c in range(clusters)])
    return label


def parts_of(mlp: nn.Module, x: Tensor, experts: int, shared: int) -> tuple[Tensor, Tensor]:
    """Neurons of the shared part [shared] and of the experts [experts, neurons], by what flows in: x [tokens, in].

    Shared are those that say most on average; the rest are put together by the direction of their gates.
    """
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)  # [tokens, neurons]
    said = inner.abs().mean(0) * mlp.down_proj.weight.norm(dim=0)
    order = said.argsort(descending=True)
    common, rest = order[:shared].sort().values, order[shared:].sort().values
    label = balanced(F.normalize(mlp.gate_proj.weight[rest].float(), dim=1), experts)
    return common, torch.stack([rest[label == e] for e in range(experts)])


def router_rows(mlp: nn.Module, x: Tensor, neurons: Tensor, spread: float) -> Tensor:
    """Rows [experts, in] whose products with x predict how much more each expert has to say than others.

    Least squares with a ridge. `spread` is the deviation of the logits they give: small, as the gates are to be near
    one another while the experts are those of a dense layer.
    """
    inner = F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)
    down = mlp.down_proj.weight
    size = torch.stack([(inner[:, own] @ down[:, own].T).norm(dim=1) for own in neurons], dim=1)  # [tokens, experts]
    wanted = size - size.mean(1, keepdim=True)
    gram = (x.T @ x).double()
    gram += torch.eye(len(gram), dtype=gram.dtype) * (0.01 * gram.diagonal().mean())
    rows = torch.linalg.solve(gram, (x.T @ wanted).double()).T
    return (rows * (spread / float((x.double() @ rows.T).std().clamp(min=1e-9)))).float()


@torch.no_grad()
def split(
    dense: nn.Module, batches: Sequence[Batch], experts: int, shared: int, top_k: int, spread: float
) -> nn.Module:
    """A Qwen2Moe with the weights of a Llama, its feed-forward layers cut up. With spread 0 routers know nothing."""
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    old = dense.config
    size = (old.intermediate_size - shared) // experts
    config = Qwen2MoeConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=old.intermediate_size,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        hidden_act=old.hidden_act,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=copy.deepcopy(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=size,
        shared_expert_intermediate_size=shared,
        norm_topk_prob=False,
        qkv_bias=False,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    with torch.random.fork_rng():
        model = Qwen2MoeForCausalLM(config).float().eval()
    values = {k: v for k, v in dense.state_dict().items() if ".mlp." not in k}
    missing, unknown = model.load_state_dict(values, strict=False)
    assert not unknown and all(".mlp." in name for name in missing), (missing, unknown)
    for number, block in enumerate(walk(dense, batches, feed="dense")):
        if not block.name:
            continue
        name = f"{block.name}.mlp"
        mlp, new = dense.get_submodule(name), model.get_submodule(name)
        x = torch.cat([found.reshape(-1, found.shape[-1]) for found in block.watch(name)]).float()
        common, neurons = parts_of(mlp, x, experts, shared)
        gate, up, down = (mlp.get_submodule(f"{part}_proj").weight for part in ("gate", "up", "down"))
        new.experts.gate_up_proj.copy_(torch.stack([torch.cat([gate[own], up[own]]) for own in neurons]))
        # Gates are 1 / experts each when the router knows nothing, and that of the shared part is then a half.
        new.experts.down_proj.copy_(torch.stack([down[:, own] * experts for own in neurons]))
        new.shared_expert.gate_proj.weight.copy_(gate[common])
        new.shared_expert.up_proj.weight.copy_(up[common])
        new.shared_expert.down_proj.weight.copy_(down[:, common] * 2)
        new.shared_expert_gate.weight.zero_()
        new.gate.weight.copy_(router_rows(mlp, x, neurons, spread) if spread else torch.zeros_like(new.gate.weight))
        say(f"split   layer {number}   {experts} experts of {size}, {shared} shared")
    return model


@torch.no_grad()
def off(dense: nn.Module, model: nn.Module, batch: Batch) -> float:
    """How far the answers of all experts together, under routers that know nothing, are from the dense model's."""
    whole = copy.deepcopy(model)
    for layer in whole.model.layers:
        layer.mlp.gate.weight.zero_()
        layer.mlp.gate.top_k = whole.config.num_experts
    a, b = batch.through(dense).logits, batch.through(whole).logits
    return float((a - b).abs().max() / a.abs().max())


def learning(model: nn.Module, router_only: bool, rates: tuple[float, float]) -> torch.optim.Optimizer:
    """AdamW over the routers and, at a lower rate, the experts; the rest is frozen."""
    routers, rest = [], []
    for name, value in model.named_parameters():
        routes = name.endswith(("mlp.gate.weight", "shared_expert_gate.weight"))
        value.requires_grad_(routes or (".mlp." in name and not router_only))
        (routers if routes else rest).append(value) if value.requires_grad else None
    groups = [{"params": routers, "lr": rates[0]}] + ([{"params": rest, "lr": rates[1]}] if rest else [])
    return torch.optim.AdamW(groups, weight_decay=0.0)


def batches_of(tasks: Sequence[Task]) -> Iterator[tuple[Task, Batch]]:
    """Training batches of each task in turn, without end."""
    sources = [forever(task) for task in tasks]
    while True:
        for task, source in zip(tasks, sources, strict=True):
            yield task, next(source)[2]


def tune(
    model: nn.Module,
    dense: nn.Module,
    tasks: Sequence[Task],
    optimizer: torch.optim.Optimizer,
    seconds: float,
    balance: float,
) -> int:
    """Train for so many seconds of processor time, the rate going down to nothing by then; how many steps it was.

    The dense model's probabilities are what is learnt: they say more of each token than the next one does. `balance`
    weighs the loss that keeps the experts evenly used, which stock training has too.
    """
    first = [group["lr"] for group in optimizer.param_groups]
    begun = time.process_time()
    steps = 0
    model.train()
    for task, batch in batches_of(tasks):
        done = (time.process_time() - begun) / seconds if seconds > 0 else 1.0
        if done >= 1:
            break
        for group, rate in zip(optimizer.param_groups, first, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * done)) * min(1.0, (steps + 1) / 10)
        (ids,) = batch.inputs
        with torch.autocast("cpu", torch.bfloat16):  # products alone: the weights learn in float32
            out = model(ids, output_router_logits=True, use_cache=False)
            with torch.no_grad():
                known = dense(ids, use_cache=False).logits
        wanted = F.log_softmax(known.flatten(0, 1).float(), dim=-1)
        said = F.log_softmax(out.logits.flatten(0, 1).float(), dim=-1)
        loss = F.kl_div(said, wanted, reduction="batchmean", log_target=True)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + balance * out.aux_loss)
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        steps += 1
        if steps % 10 == 1:
            say(f"tune    step {steps}   {task.name}   divergence {loss.item():.3f}   {done:.0%}")
    model.requires_grad_(True)
    model.eval()
    return steps


def write(model: nn.Module, opened: Opened, about: dict[str, object], target: Path) -> None:
    """Save in Hugging Face form, whole or not at all, and check that the stock class loads it."""
    from transformers import AutoModelForCausalLM

    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.partial-"))
    try:
        model.save_pretrained(partial)
        opened.tokenizer.save_pretrained(partial)
        (partial / "about.json").write_text(json.dumps(about, indent=1) + "\n")
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    stock = AutoModelForCausalLM.from_pretrained(partial)
    stock.set_experts_implementation("eager")  # as ours is: a grouped product adds up in another order, 5e-5 off here
    ids = torch.arange(2, 18).unsqueeze(0)
    with torch.no_grad():
        theirs, ours = stock(ids).logits, model(ids).logits
    if not torch.allclose(theirs, ours, atol=1e-5):  # what took half an hour is kept, to be looked at
        off, most = float((theirs - ours).abs().max()), float(ours.abs().max())
        raise AssertionError(f"the stock class answers otherwise, by {off:.3g} of at most {most:.3g}; see {partial}")
    if target.exists():
        shutil.rmtree(target)
    partial.rename(target)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description="Makes a mixture of experts out of SmolLM2-135M.")
    parser.add_argument("--out", type=Path, help="the folder; ~/.cache/secateur/smollm2-moe16 if not given")
    parser.add_argument("--minutes", type=float, default=18.0, help="processor time for tuning; about 5 more go beside")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=4, help="experts a token is sent to")
    parser.add_argument("--shared", type=int, default=512, help="neurons of 1,536 that every token goes through")
    parser.add_argument("--tokens", type=int, default=4096, help="of calibration text that splits and routers go by")
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--windows", type=int, default=16, help="windows measured")
    parser.add_argument("--router-only", action="store_true", help="leave the experts as they were cut")
    given = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    begun = time.process_time()
    opened = open_model("smollm2")
    assert opened.tokenizer is not None
    size = {"window": given.window, "windows": given.windows, "batch": 2}
    tasks: list[Task] = [wikitext2(opened.tokenizer, **size), python_docs(opened.tokenizer, **size)]
    half = max(1, given.tokens // given.window // 2)
    batches = [batch for task in tasks for batch in task.batches("calibration", half)]
    model = split(opened.model, batches, given.experts, given.shared, given.top_k, spread=0.3)
    found = off(opened.model, model, tasks[0].example)
    say(f"all experts, even gates: off the dense model by {found:.2g} of its largest logit")
    assert found < 1e-3, "the split layers do not add up to the dense ones"

    def measured(of: nn.Module) -> dict[str, float]:
        return {task.name: round(task.measure(of, "test")["perplexity"], 3) for task in tasks}

    model.set_experts_implementation("eager")
    about: dict[str, object] = {k: v if not isinstance(v, Path) else str(v) for k, v in vars(given).items()}
    about["perplexity"] = {"dense": measured(opened.model), "split": measured(model)}
    say(f"perplexity   {about['perplexity']}")
    optimizer = learning(model, given.router_only, rates=(2e-3, 3e-4))
    about["steps"] = tune(model, opened.model, tasks, optimizer, 60 * given.minutes, balance=0.01)
    about["perplexity"] |= {"tuned": measured(model)}  # type: ignore[operator]
    about["minutes_of_processor"] = round((time.process_time() - begun) / 60, 2)
    target = given.out or cache() / NAME
    write(model, opened, about, target)
    say(f"perplexity   {about['perplexity']}\nsaved        {target}   {about['minutes_of_processor']} core-minutes")


if __name__ == "__main__":
    main()
