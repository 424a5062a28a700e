"""FedTiny over Flower: a strategy for the server, an app for devices, and a grid that needs neither network nor Ray.

    # on the server                                       # on every device
    app = server_app(method, network, task, finish)       app = client_app(method, network, task_of)

`network()` makes the same architecture on both sides; `task` is the server's, `task_of(context)` a device's own.
`finish(outcome)` is called at the end, to save what was trained. In one process, as for a test:

    outcome = federate(method, network(), task, LocalGrid(client_app(method, network, task_of), devices=10))

Messages hold what a mask keeps and nothing else: values and, on the way to a device, their places. Nothing is kept on
a device between rounds, and only a mask while it is judged. Types of message: `query.bn_stats` and `query.bn_loss`
while a mask is chosen, `train`, and `train.adjust` in rounds that ask for gradients.
"""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor, nn

from secateur.cut import weights
from secateur.errors import EvidenceError
from secateur.methods.fedtiny import (
    Device,
    FedTiny,
    Keep,
    Order,
    Reply,
    Server,
    Sparse,
    answer,
    loss_of,
    masks_of,
    statistics_of,
)
from secateur.outcome import Outcome
from secateur.site import Site, Tensors
from secateur.task import Task

PLACES, VALUES = "@places", "@values"
RAISED = 2  # Flower's code for an app that raised
EXAMPLES = "num-examples"
TIMEOUT = 3600.0  # seconds for a device to answer

log = logging.getLogger("flwr")


# What a message holds


def packed(state: Tensors, masks: Keep, places: bool = True) -> ArrayRecord:
    """A state as arrays: of a masked tensor only what is kept [kept], and where that is, unless both sides know."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if name not in masks:
            found[name] = value
            continue
        where = masks[name].reshape(-1).nonzero().squeeze(1)
        found[name] = value.reshape(-1)[where]
        if places:
            found[name + PLACES] = where.int()
    return record_of(found)


def unpacked(
    arrays: ArrayRecord, like: Tensors, masks: Keep | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The state in arrays, with zeros where nothing is kept, and its masks; shapes are those of another state."""
    held, known = tensors_of(arrays), masks or {}
    state, found = {}, {}
    for name, shape in like.items():
        if name not in known and name + PLACES not in held:
            state[name] = held[name].reshape(shape.shape)
            continue
        where = known[name].reshape(-1).nonzero().squeeze(1) if name in known else held[name + PLACES].long()
        whole, mask = torch.zeros(shape.numel(), dtype=held[name].dtype), torch.zeros(shape.numel(), dtype=torch.bool)
        whole[where], mask[where] = held[name], True
        state[name], found[name] = whole.reshape(shape.shape), mask.reshape(shape.shape)
    return state, found


def keep_of(masks: Keep, sites: Sequence[Site]) -> dict[str, Tensor]:
    """The masks of sites, read off those of tensors: site name -> bool [*site.shape]."""
    return {
        site.name: part.view(masks[part.name]) if part.name in masks else torch.ones(site.shape, dtype=torch.bool)
        for site in sites
        for part in site.parts[:1]
    }


def record_of(found: Tensors) -> ArrayRecord:
    """Tensors as a record."""
    return ArrayRecord({name: Array(value.detach().cpu().numpy()) for name, value in found.items()})


def tensors_of(arrays: ArrayRecord) -> dict[str, Tensor]:
    """A record as tensors."""
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in arrays.items()}


def _gradients(arrays: ArrayRecord | None) -> dict[str, Sparse]:
    held = {} if arrays is None else tensors_of(arrays)
    sites = [name.removesuffix(VALUES) for name in held if name.endswith(VALUES)]
    return {site: (held[site + PLACES], held[site + VALUES]) for site in sites}


# A device


def client_app(method: FedTiny, network: Callable[[], nn.Module], task_of: Callable[[Context], Task]) -> ClientApp:
    """The app of a device: `task_of` says, by the node's configuration, whose data it has."""
    app = ClientApp()

    def opened(arrays: ArrayRecord) -> tuple[nn.Module, dict[str, Tensor]]:
        model = network()
        state, masks = unpacked(arrays, model.state_dict())
        model.load_state_dict(state)
        return model, masks

    def reply(message: Message, metrics: dict[str, Any], **arrays: ArrayRecord) -> Message:
        return Message(RecordDict({**arrays, "metrics": MetricRecord(metrics)}), reply_to=message)

    def bn_stats(message: Message, context: Context) -> Message:
        device = Device(task_of(context))
        context.state["candidate"] = message.content.array_records["arrays"]  # its loss is asked for next
        model, _ = opened(message.content.array_records["arrays"])
        found = statistics_of(model, device, method.samples)
        return reply(message, {EXAMPLES: device.held()[0]}, arrays=record_of(found))

    def bn_loss(message: Message, context: Context) -> Message:
        device, given = Device(task_of(context)), message.content.array_records
        model, _ = opened(given["arrays"] if "arrays" in given else context.state.pop("candidate"))
        if "statistics" in given:
            model.load_state_dict({**model.state_dict(), **tensors_of(given["statistics"])})
        return reply(message, {EXAMPLES: device.held()[0], "loss": loss_of(model, device, method.samples)})

    def train(message: Message, context: Context) -> Message:
        model, masks = opened(message.content.array_records["arrays"])
        config: dict[str, Any] = dict(message.content.config_records["config"])
        sites = weights(model, method.include, method.exclude)
        counts = dict(zip(config.get("sites", []), config.get("counts", []), strict=True))
        order = Order(config["round"], config["rate"], counts)
        found = answer(
            model, Device(task_of(context)), sites, keep_of(masks, sites), order, method.epochs, method.sends
        )
        record = {"arrays": packed(found.state, masks, places=False)}
        if found.gradients:
            both = {site: dict(zip((PLACES, VALUES), pair, strict=True)) for site, pair in found.gradients.items()}
            record["gradients"] = record_of({site + k: v for site, pair in both.items() for k, v in pair.items()})
        return reply(message, {EXAMPLES: found.examples, "loss": found.loss}, **record)

    app.query("bn_stats")(bn_stats)
    app.query("bn_loss")(bn_loss)
    app.train()(train)
    app.train("adjust")(train)
    return app


# The server


class FedTinyStrategy(Strategy):  # type: ignore[misc, unused-ignore]  # no types where it is missing
    """The server of FedTiny as a strategy: `choose` first, then `start` from what it gives, then `outcome`.

    Devices that fail or do not answer are left out of the averages of their round. Nothing is sent before `least`
    devices are there; EvidenceError is raised where they are not in `timeout` seconds.
    """

    def __init__(
        self, method: FedTiny, model: nn.Module, task: Task, *, least: int = 1, timeout: float = TIMEOUT
    ) -> None:
        method.check()
        self.server, self.least, self.timeout = Server(method, model, task), least, timeout
        self._order: Order | None = None

    def arrays(self) -> ArrayRecord:
        """The network as it is sent now."""
        return packed(self.server.state, self._masks(self.server.keep))

    def choose(self, grid: Grid) -> ArrayRecord:
        """Let devices choose a mask; what training starts from. Raises EvidenceError where none judged all masks."""
        server, method = self.server, self.server.method
        server.pretrain_()
        masks, tried, losses = server.candidates(), [], []
        for keep in masks:
            sent, statistics = packed(server.masked(keep), self._masks(keep)), {}
            there: list[int] | None = None
            if method.number > 1:
                content = {"arrays": sent}
                if method.statistics.asked:
                    replies = self._ask(grid, "query.bn_stats", content)
                    if not replies:
                        break
                    there = [reply.metadata.src_node_id for reply in replies]  # others hold no mask, or an earlier one
                    found = [tensors_of(reply.content.array_records["arrays"]) for reply in replies]
                    statistics = method.statistics.merge(found, [_examples(reply) for reply in replies])
                    content = {"statistics": record_of(statistics)}
                replies = self._ask(grid, "query.bn_loss", content, there)
                losses.append({r.metadata.src_node_id: float(_metric(r, "loss")) for r in replies})
            tried.append((keep, statistics))
        judges = sorted(set.intersection(*(set(one) for one in losses))) if len(losses) == len(masks) else []
        if method.number > 1 and not judges:
            raise EvidenceError(
                f"the best of {len(masks)} masks was to be chosen by devices",
                "no device gave its loss for each of them",
                "See the log for what failed there, or give them more time.",
            )
        means = [fmean(one[node] for node in judges) for one in losses] or [0.0]
        server.choose_([(keep, statistics, mean) for (keep, statistics), mean in zip(tried, means, strict=True)])
        return self.arrays()

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The network for the devices of a round, and what is asked of them."""
        order = self._order = self.server.order(server_round)
        asked: dict[str, Any] = {**config, "round": order.round, "rate": order.rate}
        if order.counts:
            asked.update(sites=list(order.counts), counts=list(order.counts.values()))
        content = RecordDict({"arrays": arrays, "config": ConfigRecord(asked)})
        nodes = self._nodes(grid)
        kind = "train.adjust" if order.counts else "train"
        return [Message(content, nodes[i], kind) for i in self.server.sampled(len(nodes), server_round)]

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The averaged network under its new mask, and the mean loss."""
        server, order = self.server, self._order
        assert order is not None, "a round is configured first"
        masks = self._masks(server.keep)
        found = []
        for reply in self._answered(f"train, round {server_round}", replies):
            state, _ = unpacked(reply.content.array_records["arrays"], server.state, masks)
            loss = float(_metric(reply, "loss"))
            found.append(Reply(_examples(reply), loss, state, _gradients(reply.content.array_records.get("gradients"))))
        server.take_(order, found)
        return self.arrays(), MetricRecord({"loss": server.loss[-1][1]}) if found else None

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Nothing: the network is measured where its task is."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Nothing."""
        return None

    def summary(self) -> None:
        """The settings, in Flower's log."""
        method = self.server.method
        log.info("FedTiny: sparsity %g, %d candidates, %d rounds", method.sparsity, method.number, method.rounds)

    def outcome(self) -> Outcome:
        """The trained network and its masks, as FedTiny.run gives them."""
        return self.server.outcome()

    def _masks(self, keep: Keep) -> dict[str, Tensor]:
        return masks_of(self.server.state, self.server.sites, keep)

    def _ask(
        self, grid: Grid, kind: str, content: Mapping[str, ArrayRecord], nodes: Sequence[int] | None = None
    ) -> list[Message]:
        asked = self._nodes(grid) if nodes is None else nodes
        messages = [Message(RecordDict(dict(content)), node, kind) for node in asked]
        return self._answered(kind, grid.send_and_receive(messages, timeout=self.timeout))

    def _nodes(self, grid: Grid) -> list[int]:
        """The devices that are there, once there are enough."""
        until = time.monotonic() + self.timeout
        while len(found := sorted(grid.get_node_ids())) < self.least:
            if time.monotonic() >= until:
                raise EvidenceError(
                    f"a network was to be trained over {self.least} devices or more",
                    f"{len(found)} were there after {self.timeout:g} seconds",
                    "Start more of them, wait longer, or ask for fewer with least.",
                )
            time.sleep(1)
        return found

    def _answered(self, kind: str, replies: Iterable[Message]) -> list[Message]:
        """Replies without an error, by device; errors are noted."""
        found = sorted(replies, key=lambda reply: reply.metadata.src_node_id)
        for reply in found:
            if reply.has_error():
                self.server.notes.append(f"device {reply.metadata.src_node_id} failed ({kind}): {reply.error.reason}")
                log.warning(self.server.notes[-1])
        return [reply for reply in found if not reply.has_error()]


def _examples(reply: Message) -> int:
    return int(_metric(reply, EXAMPLES))


def _metric(reply: Message, name: str) -> Any:
    return reply.content.metric_records["metrics"][name]


def federate(
    method: FedTiny, model: nn.Module, task: Task, grid: Grid, *, least: int = 1, timeout: float = TIMEOUT
) -> Outcome:
    """The whole of FedTiny over a grid; the model is changed. Raises what FedTiny.run and the strategy raise."""
    strategy = FedTinyStrategy(method, model, task, least=least, timeout=timeout)
    strategy.start(grid, strategy.choose(grid), num_rounds=method.rounds, timeout=timeout)
    return strategy.outcome()


def server_app(
    method: FedTiny,
    network: Callable[[], nn.Module],
    task: Task,
    finish: Callable[[Outcome], None],
    *,
    least: int = 1,
    timeout: float = TIMEOUT,
) -> ServerApp:
    """The app of the server; `finish` is given the outcome."""
    app = ServerApp()

    def main(grid: Grid, context: Context) -> None:
        finish(federate(method, network(), task, grid, least=least, timeout=timeout))

    app.main()(main)
    return app


class LocalGrid(Grid):  # type: ignore[misc, unused-ignore]  # no types where it is missing
    """Devices in this process: the app answers every message at once, one after another.

    Node k + 1 has "partition-id" k in its configuration and a state of its own. What an app raises comes back as an
    error, as it would over a network.
    """

    def __init__(self, app: ClientApp, devices: int) -> None:
        _identify()
        self.app = app
        self.contexts = {
            k + 1: Context(0, k + 1, {"partition-id": k, "num-partitions": devices}, RecordDict(), {})
            for k in range(devices)
        }
        self._replies: dict[str, Message] = {}
        self._run: Any = None

    def set_run(self, run: Any) -> None:
        """Remember the run; nothing depends on it here."""
        self._run = run

    @property
    def run(self) -> Any:
        """What was set."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A message to a node."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """1 up to the number of devices."""
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have messages answered; the names by which their replies can be pulled."""
        names = []
        for message in messages:
            names.append(str(len(self._replies)))
            self._replies[names[-1]] = self._answer(message)
        return names

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies."""
        return [self._replies[name] for name in message_ids]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """The replies to messages, in their order."""
        return [self._answer(message) for message in messages]

    def _answer(self, message: Message) -> Message:
        try:
            return self.app(message, self.contexts[message.metadata.dst_node_id])
        except Exception as error:  # whatever a device's own code may raise: the others go on
            return Message(Error(RAISED, f"{type(error).__name__}: {error}"), reply_to=message)


def _identify() -> None:
    """Give this process the identity that Flower's messages bear, where Flower itself has given it none."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:  # before 1.41 messages bear none
        return
    for name, value in {"task_id": 1, "run_id": 1, "node_id": 1}.items():
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, value)
