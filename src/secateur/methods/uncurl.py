"""UNCURL: experts that the router scores alike on a task's tokens are merged into one.

Sarkar, Lausen, Cevher, Zha, Brox, Karypis. "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task
Specific Expert Pruning." NeurIPS ENLSP workshop 2024 (PMLR 262). arXiv:2409.01483. With G [tokens, experts] the
router's logits over the task's tokens and S the cosines between its columns:

    clusters = spectral clustering of the affinity clip(S, 0, 1)
    W[cluster] = sum over its experts e of u[e] W[e] / sum of u[e]         u[e]: the share of tokens sent to e

each expert's neurons first put in the order of those of the cluster's most used one, as in Li, Zhang, Yadav, Sung,
Cheng, Bansal, Chen ("Merge, Then Compress: Demystify Efficient SMoE with Hints from Its Routing Policy." 2023.
arXiv:2310.01334), which the merging builds on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from secateur.axes import kept_of
from secateur.edit import Edit, Merge, Replace, Update, apply_
from secateur.errors import GraphError
from secateur.evidence import Evidence, calm
from secateur.graph.experts import Mixture, check_left, cluster_router, mixtures, routing
from secateur.method import Budget, Card, Method
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Task, generator


def cosines(gram: Tensor) -> Tensor:
    """Between columns whose products are `gram` [experts, experts]: float64, 1 on the diagonal, 0 beside zeros."""
    size = gram.diagonal().clamp(min=0).sqrt()
    # Less than rounding leaves of the largest column counts as nothing: its cosines would be noise, or NaN.
    live = size > 1e-7 * float(size.max())
    size = torch.where(live, size, torch.ones_like(size))
    found = gram / (size[:, None] * size[None, :])
    found = torch.where(live[:, None] & live[None, :], found, torch.zeros_like(found)).clamp(-1, 1)
    return found.fill_diagonal_(1.0)


def without_offset(gram: Tensor) -> Tensor:
    """The gram [experts, experts] of logits after each token's mean over the experts is taken off."""
    rows = gram - gram.mean(0, keepdim=True)
    return rows - rows.mean(1, keepdim=True)


def spectral(affinity: Tensor, clusters: int, draw: torch.Generator, restarts: int = 10) -> Tensor:
    """Cluster of each unit [units], numbered by first appearance, from affinities [units, units] in [0, 1].

    The units' rows in the first eigenvectors of the normalised Laplacian, each brought to length one, are put into
    clusters by k-means (Ng, Jordan, Weiss 2002).
    """
    scale = affinity.sum(1).rsqrt()
    laplacian = torch.eye(len(affinity), dtype=affinity.dtype) - scale[:, None] * affinity * scale[None, :]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :clusters]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    vectors = vectors * torch.where(largest < 0, -1.0, 1.0)  # a vector and its negative are both eigenvectors
    return k_means(vectors / vectors.norm(dim=1, keepdim=True).clamp(min=1e-12), clusters, draw, restarts)


def k_means(points: Tensor, clusters: int, draw: torch.Generator, restarts: int = 10) -> Tensor:
    """Cluster of each point [points], numbered by first appearance, none empty: the best of several starts."""
    best, least = torch.arange(len(points)), float("inf")
    for _ in range(restarts if clusters < len(points) else 0):
        centres = _spread_out(points, clusters, draw)
        label = torch.full((len(points),), -1)
        for _ in range(100):
            squares = (points[:, None] - centres[None]).square().sum(-1)  # [points, clusters]
            found = _none_empty(squares)
            if torch.equal(found, label):
                break
            label = found
            centres = torch.stack([points[label == c].mean(0) for c in range(clusters)])
        cost = float((points - centres[label]).square().sum())
        if cost < least - 1e-12:
            best, least = label, cost
    return numbered(best)


def _spread_out(points: Tensor, clusters: int, draw: torch.Generator) -> Tensor:
    """First centres, each drawn by the squared distance from those before it (k-means++)."""
    chosen = [int(torch.randint(len(points), (), generator=draw))]
    for _ in range(clusters - 1):
        far = (points[:, None] - points[chosen][None]).square().sum(-1).amin(1)
        far[chosen] = 0
        if not float(far.sum()) > 0:  # all that is left lies on a centre
            far = torch.ones_like(far)
            far[chosen] = 0
        chosen.append(int(torch.multinomial(far, 1, generator=draw)))
    return points[chosen].clone()


def _none_empty(squares: Tensor) -> Tensor:
    """The nearest cluster of each point, an empty one given the point that is furthest from its own."""
    label = squares.argmin(1)
    for cluster in range(squares.shape[1]):
        if not bool((label == cluster).any()):
            own = squares.gather(1, label[:, None])[:, 0].clone()
            own[torch.bincount(label, minlength=squares.shape[1])[label] < 2] = -1.0
            label[int(own.argmax())] = cluster
    return label


def numbered(label: Tensor) -> Tensor:
    """The same clusters, numbered in the order in which they first appear."""
    order: dict[int, int] = {}
    return torch.tensor([order.setdefault(int(c), len(order)) for c in label])


def shares(usage: Tensor, assignment: Tensor) -> Tensor:
    """What each unit weighs in its cluster, [units], adding up to one: its usage; in an unused cluster, equally."""
    clusters = int(assignment.max()) + 1
    usage = usage.double()
    total = torch.zeros(clusters, dtype=torch.float64).index_add(0, assignment, usage)
    size = torch.bincount(assignment, minlength=clusters).double()
    return torch.where(total[assignment] > 0, usage / total.clamp(min=1e-300)[assignment], 1 / size[assignment])


def matching(gain: Tensor) -> Tensor:
    """Which column each row is given so that the sum of the gains [n, n] is the largest there is: [n], a permutation.

    The shortest augmenting path of each row in turn (Jonker and Volgenant 1987): n^3 at worst, a second for 1,000.
    """
    cost = -gain.double().cpu().numpy()
    n = len(cost)
    row_price, column_price = np.zeros(n + 1), np.zeros(n + 1)
    row_of = np.zeros(n + 1, dtype=np.int64)  # of each column, both counted from 1; 0 is none
    for row in range(1, n + 1):
        row_of[0], column = row, 0
        shortest, before = np.full(n + 1, np.inf), np.zeros(n + 1, dtype=np.int64)
        done = np.zeros(n + 1, dtype=bool)
        while True:
            done[column] = True
            here = row_of[column]
            reduced = cost[here - 1] - row_price[here] - column_price[1:]
            nearer = ~done[1:] & (reduced < shortest[1:])
            shortest[1:][nearer] = reduced[nearer]
            before[1:][nearer] = column
            nearest = int(np.where(done, np.inf, shortest)[1:].argmin()) + 1
            step = shortest[nearest]
            row_price[row_of[done]] += step
            column_price[done] -= step
            shortest[~done] -= step
            column = nearest
            if not row_of[column]:
                break
        while column:
            row_of[column] = row_of[before[column]]
            column = int(before[column])
    given = np.empty(n, dtype=np.int64)
    given[row_of[1:] - 1] = np.arange(n)
    return torch.from_numpy(given)


def in_order(up: Tensor, down: Tensor, reference: int, member: int) -> Tensor:
    """The neurons of one expert in the order of those of another they are most like: a permutation [neurons].

    `up` [experts, ..., neurons, hidden] holds the matrices into the neurons, `down` [experts, hidden, neurons] the one
    out of them: the sum of the products of all that a neuron owns is the largest there is.
    """
    into = up.reshape(len(up), -1, down.shape[-1], up.shape[-1]).double()
    gain = torch.einsum("gnh,gmh->nm", into[reference], into[member])
    return matching(gain + down[reference].double().T @ down[member].double())


class Clustering(Protocol):
    """Which experts become one."""

    def of(self, seen: Evidence, clusters: int, draw: torch.Generator) -> Tensor:
        """The cluster of each expert [experts], from what was routed; exactly so many clusters, none empty."""
        ...


@dataclass(frozen=True)
class Spectral:
    """By the router's logits over the task: experts it scores alike."""

    centred: bool = True  # each token's mean logit taken off first: what all share makes raw cosines all near one
    restarts: int = 10  # of k-means

    def of(self, seen: Evidence, clusters: int, draw: torch.Generator) -> Tensor:
        """See Clustering."""
        gram = seen.sums["logit_gram"]
        affinity = cosines(without_offset(gram) if self.centred else gram).clamp(min=0)
        return spectral(affinity, clusters, draw, self.restarts)


@dataclass(frozen=True)
class RandomClusters:
    """Any experts, in clusters as even as can be: the control."""

    def of(self, seen: Evidence, clusters: int, draw: torch.Generator) -> Tensor:
        """See Clustering."""
        count = len(seen.sums["routed"])
        return numbered((torch.arange(count) % clusters)[torch.randperm(count, generator=draw)])


class Routing(Protocol):
    """What becomes of the router."""

    def edits(self, model: nn.Module, layer: Mixture, assignment: Tensor, usage: Tensor) -> list[Edit]:
        """Edits that merge the experts and make the router fit, none applied yet."""
        ...

    def left(self, layer: Mixture, clusters: int) -> None:
        """Raise BudgetError where so few merged experts cannot be routed to."""
        ...


@dataclass(frozen=True)
class IndexMap:
    """The router stays as it is, and a table sends its choices to what they were merged into: exact."""

    def edits(self, model: nn.Module, layer: Mixture, assignment: Tensor, usage: Tensor) -> list[Edit]:
        """See Routing."""
        merge = Merge(layer.own, assignment, shares(usage, assignment))
        return [merge, Replace(layer.router, cluster_router(model, layer, assignment))]

    def left(self, layer: Mixture, clusters: int) -> None:
        """See Routing: gates of one merged expert add up, so that any number will do."""


@dataclass(frozen=True)
class MeanRows:
    """The router gets a row per merged expert, the mean of its rows by usage: stock loaders take the model."""

    def edits(self, model: nn.Module, layer: Mixture, assignment: Tensor, usage: Tensor) -> list[Edit]:
        """See Routing."""
        return [Merge(layer.site, assignment, shares(usage, assignment))]

    def left(self, layer: Mixture, clusters: int) -> None:
        """See Routing."""
        check_left(layer, clusters)


@dataclass(frozen=True)
class ReferenceRows:
    """The router keeps the row of the most used expert of each cluster: stock loaders take the model."""

    def edits(self, model: nn.Module, layer: Mixture, assignment: Tensor, usage: Tensor) -> list[Edit]:
        """See Routing."""
        rows = layer.rows.read(tensors(model)).detach()[references(assignment, usage)]
        return [Merge(layer.site, assignment, shares(usage, assignment)), Update(layer.rows.name, rows.clone())]

    def left(self, layer: Mixture, clusters: int) -> None:
        """See Routing."""
        check_left(layer, clusters)


def references(assignment: Tensor, usage: Tensor) -> list[int]:
    """The most used expert of each cluster, the first of equals."""
    found = []
    for cluster in range(int(assignment.max()) + 1):
        members = (assignment == cluster).nonzero().reshape(-1)
        found.append(int(members[usage[members].argmax()]))
    return found


@dataclass(frozen=True, kw_only=True)
class UNCURL(Method):
    """Put each layer's experts into clusters by what the router says of a task's tokens, and merge each into one.

    Forward passes only. The paper fine-tunes afterwards: `secateur recover`, or `fit`.
    """

    sparsity: float = 0.5  # fraction of each layer's experts merged away: 0.5 is the paper's factor 2, 0.75 its 4
    samples: int = 128  # calibration sequences of the task
    clustering: Clustering = Spectral()  # random-clusters is the control
    align: bool = True  # neurons put in the order of the most used expert's before they are averaged
    router: Routing = IndexMap()  # mean-rows and reference-rows make it smaller, for stock loaders

    card: ClassVar = Card(
        12,
        "Revisiting SMoE language models by evaluating inefficiencies with task specific expert pruning",
        arxiv="2409.01483",
        year=2024,
        granularity=("expert",),
        needs=("calibration",),
        families=("moe",),
        axes="evidence merge",
        criterion=("similarity",),
        tasks=("language modelling",),
        allocation=("uniform",),
        updates=("solved",),
        transfer=("target task",),
        reports="Mixtures of 8 to 128 experts on SuperGLUE: at a factor of 2, sometimes 4, as good as a mixture of "
        "that size trained from scratch, where taking out the least used loses accuracy.",
        checked="tests/methods/test_uncurl.py::test_an_expert_merged_with_its_own_permutation_is_itself",
        differs=(
            "Logits are centred token by token before they are compared, for what a token's share makes raw cosines "
            "all near one; spectral(centred=False) does without.",
            "The reference of a cluster is its most used expert; the code the merging builds on takes the first.",
            "An expert that saw no token weighs nothing in its cluster; a cluster that saw none is averaged equally.",
        ),
    )
    tiny: ClassVar = {"samples": 8}

    def budget(self) -> Budget:
        """A fraction of the experts."""
        return Budget(self.sparsity, of="units")

    def sites_in(self, model: nn.Module) -> list[Site]:
        """The experts of each layer, for plans."""
        return [layer.own if isinstance(self.router, IndexMap) else layer.site for layer in mixtures(model)]

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """See Method."""
        self.check()
        layers = mixtures(model)
        for layer in layers:
            self.router.left(layer, kept_of(layer.site.units, self.sparsity))
            if self.align:
                neurons_of(layer, tensors(model))
        seen = routing(model, layers, task.batches("calibration", self.samples))
        edits, notes = list[Edit](), list[str]()
        for layer in layers:
            clusters = kept_of(layer.site.units, self.sparsity)
            if clusters == layer.site.units:
                notes.append(f"{layer.site.name}: {self.sparsity:g} of {clusters} experts is less than one")
                continue
            evidence = seen[layer.site.name]
            usage = evidence.sums["routed"]
            draw = generator(task, f"uncurl {layer.site.name}")
            assignment = self.clustering.of(evidence, clusters, draw)
            merged = self.aligned(model, layer, assignment, usage) if self.align else []
            edits += apply_(model, [*self.router.edits(model, layer, assignment, usage), *merged])
            notes.append(said(layer, assignment, usage))
        if not isinstance(self.router, IndexMap) and not all(layer.normalised for layer in layers):
            notes.append("gates are shares of all experts and are not rescaled: with fewer experts each is larger")
        return Outcome(model, edits, notes=notes)

    def aligned(self, model: nn.Module, layer: Mixture, assignment: Tensor, usage: Tensor) -> list[Edit]:
        """The merged experts' values, each expert's neurons first put in the order of the cluster's reference.

        Raises GraphError where putting neurons in another order would change what an expert does.
        """
        named = tensors(model)
        up_name, down_name = neurons_of(layer, named)
        up, down = named[up_name].detach(), named[down_name].detach()
        halves = up.reshape(len(up), -1, down.shape[-1], up.shape[-1])  # [experts, gate and up, neurons, hidden]
        weight = shares(usage, assignment)
        into, out = torch.zeros_like(halves, dtype=torch.float64), torch.zeros_like(down, dtype=torch.float64)
        proven = False
        for expert, cluster in enumerate(assignment.tolist()):
            reference = references(assignment, usage)[cluster]
            order = torch.arange(down.shape[-1])
            if expert != reference:
                order = in_order(up, down, reference, expert).to(up.device)
                if not proven and not torch.equal(order.cpu(), torch.arange(len(order))):
                    check_order(model, layer, (up_name, down_name), expert, order)
                    proven = True
            into[cluster] += weight[expert] * halves[expert][:, order].double()
            out[cluster] += weight[expert] * down[expert][:, order].double()
        clusters = int(assignment.max()) + 1
        shape = (clusters, *up.shape[1:])
        return [
            Update(up_name, into[:clusters].reshape(shape).to(up.dtype)),
            Update(down_name, out[:clusters].to(down.dtype).clone()),
        ]


def neurons_of(layer: Mixture, named: Tensors) -> tuple[str, str]:
    """The tensors into and out of the neurons: [experts, gate and up, hidden] and [experts, hidden, neurons].

    Raises GraphError for experts that are stored in another way.
    """
    found = [p.name for p in layer.own.parts]
    down = next((n for n in found if n.endswith("down_proj")), None)
    up = next((n for n in found if n.endswith(("gate_up_proj", "up_proj"))), None)
    good = down is not None and up is not None and len(found) == 2
    if good:
        assert up is not None and down is not None
        above, below = named[up].shape, named[down].shape
        good = above[2] == below[1] and above[1] in (below[2], 2 * below[2])
    if not good:
        raise GraphError(
            f"neurons of {layer.site.name} were to be put in order",
            f"its tensors are {', '.join(f'{n} {list(named[n].shape)}' for n in found)}",
            "Give align=False, or use experts of gate_up_proj [experts, 2 neurons, hidden] and down_proj "
            "[experts, hidden, neurons].",
        )
    assert up is not None and down is not None
    return up, down


@torch.no_grad()
def check_order(model: nn.Module, layer: Mixture, names: Sequence[str], expert: int, order: Tensor) -> None:
    """Raise GraphError unless an expert does the same with its neurons in another order."""
    named = tensors(model)
    up, down = (named[name] for name in names)
    probe = torch.randn(2, up.shape[-1], generator=torch.Generator().manual_seed(0)).to(up)
    chosen = torch.full((2, 1), expert, device=up.device)
    gates = torch.ones(2, 1, dtype=up.dtype, device=up.device)
    module = model.get_submodule(layer.experts)
    kept = up[expert].clone(), down[expert].clone()
    with calm(model):
        before = module(probe, chosen, gates)
        try:
            halves = kept[0].reshape(-1, down.shape[-1], up.shape[-1])
            up[expert] = halves[:, order].reshape(up.shape[1:])
            down[expert] = kept[1][:, order]
            after = module(probe, chosen, gates)
        finally:
            up[expert], down[expert] = kept
    if not float((after - before).norm()) <= 0.02 * float(before.norm()) + 1e-6:
        raise GraphError(
            f"neurons of {layer.site.name} were put in another order",
            "its experts then answer differently, so they are not stored as they seem",
            "Give align=False.",
        )


def said(layer: Mixture, assignment: Tensor, usage: Tensor) -> str:
    """Which experts of a layer became one, and which were never used, in a line."""
    clusters: Mapping[int, list[int]] = {c: [] for c in range(int(assignment.max()) + 1)}
    for expert, cluster in enumerate(assignment.tolist()):
        clusters[cluster].append(expert)
    line = f"{layer.site.name}: " + " ".join("+".join(map(str, members)) for members in clusters.values())
    unused = [str(e) for e in (usage == 0).nonzero().reshape(-1).tolist()]
    return line + (f"; no token of the task was sent to {', '.join(unused)}" if unused else "")
