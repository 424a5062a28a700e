"""Weights are believed to come in runs: what training says of each is passed to its neighbours, and back.

Xia, Tsang, Lau. "Structured Bayesian Compression for Deep Neural Networks Based on The Turbo-VBI Approach."
IEEE Transactions on Signal Processing 71, 2023. arXiv:2302.10483. Every weight w has a precision rho and a support s:

    w | rho ~ N(0, 1/rho)    rho | s = 1 ~ Gamma(active), mean about 1    rho | s = 0 ~ Gamma(idle), mean far larger

and the supports of a layer are a Markov chain along each row of its matrix, or a field over rows and columns, so that
zeros come in runs and whole rows go. Two modules take turns:

    A   variational inference: q(w) = N(mu, sigma^2) by noisy gradient steps on likelihood and divergence, the
        precisions and supports in closed form, every weight taken for itself
    B   message passing: what A says of each support, in log-odds and without what B had said, goes along the chain;
        what the others say of it comes back as A's next prior

The means are the model's own weights, and biases are plain parameters. There is no target: what stays is what is more
likely active than not. Rows and columns that are left empty are taken out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, lgamma, log
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.adapters import tied_names
from secateur.axes import Global, PerMatrix
from secateur.axes.recalibration import recalibrate_, some
from secateur.axes.rules import Hold, LearningRate, sparsity_of
from secateur.cut import DEFAULT_EXCLUDE, weights
from secateur.edit import Edit, Mask, apply_
from secateur.errors import EvidenceError, GraphError, ModelError, SettingError
from secateur.graph import couple, removals
from secateur.method import Budget, Card, Method, check_sparsity
from secateur.outcome import Outcome
from secateur.site import Site, Tensors, tensors
from secateur.task import Batch, Task
from secateur.train import History, Loop, Rule, fit

# Module B: what a support's neighbours say of it. All chances are log-odds of being active, in float64.


def _check_transitions(begins: float, ends: float) -> None:
    if not (0 < begins < 1 and 0 < ends < 1):
        raise SettingError(
            f"supports that begin with a chance of {begins:g} and end with one of {ends:g} were asked for",
            "both are chances between 0 and 1, and neither of them certain",
            "Give begins=0.1 and ends=0.3, say: a quarter is active, in runs of three.",
        )


def message(said: Tensor, begins: float, ends: float) -> Tensor:
    """What the log-odds of a support say of its neighbour's, beyond the share that is active anyway.

    Of either neighbour, since a chain of two states is the same read backwards.
    """
    share = begins / (begins + ends)
    chance = begins + (1 - begins - ends) * torch.sigmoid(said)
    return torch.logit(chance) - log(share / (1 - share))


@runtime_checkable
class Structure(Protocol):
    """How the supports of a matrix hang together."""

    @property
    def share(self) -> float:
        """The share that is active before anything is seen."""
        ...

    def check(self) -> None:
        """Raise SettingError for chances that are none."""
        ...

    def extrinsic(self, evidence: Tensor) -> tuple[Tensor, float]:
        """What all others say of each support: log-odds [rows, columns], given those of each by itself.

        And what messages still changed by in the last sweep: 0 where the answer is exact.
        """
        ...

    def remarks(self) -> list[str]:
        """What is to be said of these settings."""
        ...


@dataclass(frozen=True)
class Rows:
    """A chain along each row: what one output reads comes in runs. Forward and backward once, exact."""

    begins: float = 0.1  # chance that an active weight follows one that is not: p01
    ends: float = 0.3  # chance that the next weight is not active any more: p10; runs are 1 / ends long on average

    @property
    def share(self) -> float:
        """The share that is active."""
        return self.begins / (self.begins + self.ends)

    def check(self) -> None:
        """See Structure."""
        _check_transitions(self.begins, self.ends)

    def extrinsic(self, evidence: Tensor) -> tuple[Tensor, float]:
        """See Structure."""
        alone = log(self.begins / self.ends)
        found = torch.full_like(evidence, alone)
        for columns in (range(evidence.shape[1]), range(evidence.shape[1] - 1, -1, -1)):
            said = torch.zeros_like(evidence[:, 0])
            for column in columns:
                found[:, column] += said
                said = message(alone + evidence[:, column] + said, self.begins, self.ends)
        return found, 0.0

    def remarks(self) -> list[str]:
        """See Structure."""
        return _uncoupled(self.begins, self.ends)


@dataclass(frozen=True)
class Grid:
    """A field over rows and columns: active weights come in patches. Loopy messages, damped, a limited number of times.

    Each pair of neighbours has the factor P(s, s') / (P(s) P(s')) of the chain, so that without coupling each support
    is by itself and the share is not counted once for every neighbour. With four neighbours a coupling that is mild
    along a row is all or nothing: (1 - begins)(1 - ends) / (begins * ends) is to stay below about 6.
    """

    begins: float = 0.2  # as along a row, in both directions
    ends: float = 0.5
    sweeps: int = 20  # of messages, at most
    damping: float = 0.5  # of each message, how much is the one before
    tolerance: float = 1e-4  # messages that change by less have settled

    @property
    def share(self) -> float:
        """The share that is active."""
        return self.begins / (self.begins + self.ends)

    def check(self) -> None:
        """See Structure."""
        _check_transitions(self.begins, self.ends)
        if self.sweeps < 1 or not 0 <= self.damping < 1:
            raise SettingError(
                f"{self.sweeps} sweeps with a damping of {self.damping:g} were asked for",
                "one sweep is the least, and a damping is in [0, 1)",
                "Give sweeps=20 and damping=0.5.",
            )

    def extrinsic(self, evidence: Tensor) -> tuple[Tensor, float]:
        """See Structure."""
        alone, changed = log(self.begins / self.ends), 0.0
        came = [torch.zeros_like(evidence) for _ in range(4)]  # from the left, the right, above and below
        for _ in range(self.sweeps):
            total = alone + evidence + came[0] + came[1] + came[2] + came[3]
            changed = 0.0
            sent = [
                message(total - came[back], self.begins, self.ends) for back in (1, 0, 3, 2)
            ]  # nobody is told what he said himself
            for way, new in enumerate(_shifted(sent)):
                mixed = self.damping * came[way] + (1 - self.damping) * new
                changed = max(changed, float((mixed - came[way]).abs().max()))
                came[way] = mixed
            if changed < self.tolerance:
                break
        return alone + came[0] + came[1] + came[2] + came[3], changed

    def remarks(self) -> list[str]:
        """See Structure."""
        return _uncoupled(self.begins, self.ends)


def _shifted(sent: Sequence[Tensor]) -> list[Tensor]:
    """Messages where they arrive, given where they were sent from: to the right, the left, down and up."""
    right, left, down, up = (torch.zeros_like(message) for message in sent)
    right[:, 1:], left[:, :-1] = sent[0][:, :-1], sent[1][:, 1:]
    down[1:], up[:-1] = sent[2][:-1], sent[3][1:]
    return [right, left, down, up]


def _uncoupled(begins: float, ends: float) -> list[str]:
    if abs(begins + ends - 1) > 1e-9:
        return []
    return [f"begins + ends = 1: no support says anything of its neighbours, each is active with chance {begins:g}"]


@runtime_checkable
class Exchange(Protocol):
    """What the two modules tell each other, all in log-odds."""

    def sent(self, posterior: Tensor, prior: Tensor) -> Tensor:
        """What A tells B of each support."""
        ...

    def taken(self, extrinsic: Tensor, sent: Tensor) -> Tensor:
        """A's next prior."""
        ...


@dataclass(frozen=True)
class Extrinsic:
    """Each module hears what the other has found out, without what it had said itself."""

    def sent(self, posterior: Tensor, prior: Tensor) -> Tensor:
        """Posterior without prior."""
        return posterior - prior

    def taken(self, extrinsic: Tensor, sent: Tensor) -> Tensor:
        """What the others say."""
        return extrinsic


@dataclass(frozen=True)
class Marginal:
    """Each hears all the other believes, its own words among it: what the first author's later program does.

    Evidence is counted twice and more, and beliefs grow firm that nothing supports. For comparison.
    """

    def sent(self, posterior: Tensor, prior: Tensor) -> Tensor:
        """Posterior and prior together."""
        return posterior + prior

    def taken(self, extrinsic: Tensor, sent: Tensor) -> Tensor:
        """What the others say, and what was sent."""
        return extrinsic + sent


# Module A: precisions and supports, given the weights


@dataclass(frozen=True)
class Gamma:
    """A Gamma distribution of precisions, its mean shape / rate."""

    shape: float = 1.0
    rate: float = 1.0

    @property
    def mean(self) -> float:
        """The precision expected."""
        return self.shape / self.rate


@dataclass(frozen=True)
class Priors:
    """What precisions are before the weights are seen, and what a weight adds to that."""

    active: Gamma
    idle: Gamma
    gaussian: float  # c1 = c2 on the paper's card


@runtime_checkable
class Family(Protocol):
    """In which form the beliefs on precision and support are held."""

    def fitted(self, square: Tensor, prior: Tensor, posterior: Tensor, priors: Priors) -> tuple[Tensor, Tensor]:
        """The precision expected, and the support's log-odds, float64.

        Given the weights' expected squares, the support's log-odds before they are seen, and those believed last.
        """
        ...


@dataclass(frozen=True)
class Joint:
    """q(rho, s) = q(rho | s) q(s): one precision if active and one if not. Closed form, the bound's best.

    The log-odds that the weight adds are those of two Student densities, whatever was believed before.
    """

    def fitted(self, square: Tensor, prior: Tensor, posterior: Tensor, priors: Priors) -> tuple[Tensor, Tensor]:
        """See Family."""
        found = prior + self._evidence(square, priors.active, priors) - self._evidence(square, priors.idle, priors)
        active = torch.sigmoid(found)
        mean = [(g.shape + priors.gaussian) / (g.rate + priors.gaussian * square) for g in (priors.active, priors.idle)]
        return active * mean[0] + (1 - active) * mean[1], found

    @staticmethod
    def _evidence(square: Tensor, given: Gamma, priors: Priors) -> Tensor:
        shape, rate = given.shape + priors.gaussian, given.rate + priors.gaussian * square
        return given.shape * log(given.rate) - lgamma(given.shape) + lgamma(shape) - shape * torch.log(rate)


@dataclass(frozen=True)
class MeanField:
    """q(rho) q(s), as the paper has it: turn by turn until both have settled.

    A weight that is taken for active is given the precision of an active one, and that speaks for its being active:
    with shapes of 1 and rates further apart than about 1 to 4, even a weight of zero stays so.
    """

    sweeps: int = 20  # of turns, at most
    tolerance: float = 1e-4  # relative change at which they have settled

    def fitted(self, square: Tensor, prior: Tensor, posterior: Tensor, priors: Priors) -> tuple[Tensor, Tensor]:
        """See Family."""
        on, off, c = priors.active, priors.idle, priors.gaussian
        mean, old = torch.ones_like(square), posterior
        for _ in range(self.sweeps):
            active = torch.sigmoid(posterior)
            shape = active * on.shape + (1 - active) * off.shape + c
            rate = c * square + active * on.rate + (1 - active) * off.rate
            mean, log_mean = shape / rate, torch.digamma(shape) - torch.log(rate)
            old, posterior = posterior, prior + _expected_log(mean, log_mean, on) - _expected_log(mean, log_mean, off)
            if float((posterior - old).abs().max()) <= self.tolerance * float(posterior.abs().max()):
                break
        return mean, posterior


def _expected_log(mean: Tensor, log_mean: Tensor, of: Gamma) -> Tensor:
    """The expected log-density of a Gamma, at a precision of which the mean and the mean of the logarithm are known."""
    return of.shape * log(of.rate) - lgamma(of.shape) + (of.shape - 1) * log_mean - of.rate * mean


# What is believed of a network


def as_matrix(weight: Tensor) -> Tensor:
    """A kernel [out, in, height, width] as a matrix [out * height, in * width]; matrices as they are."""
    if weight.dim() < 3:
        return weight
    if weight.dim() == 3:
        return weight.flatten(1)
    return weight.movedim(2, 1).flatten(2).flatten(0, 1)


def like_kernel(matrix: Tensor, shape: Sequence[int]) -> Tensor:
    """Back from `as_matrix` to the shape of the kernel."""
    if len(shape) < 4:
        return matrix.reshape(tuple(shape))
    out, into, high = shape[:3]
    return matrix.reshape(out, high, into, *shape[3:]).movedim(1, 2)


@dataclass(eq=False)
class Belief:
    """What is believed of one site's weights, beside their means, which are the model's own."""

    site: Site
    spread: nn.Parameter  # log sigma, like the weights
    unit: float  # a mean square: in it the priors' precisions are told
    prior: Tensor  # log-odds of being active before the weights are seen, float64
    posterior: Tensor  # and after
    precision: Tensor  # expected, float32

    def square(self, named: Tensors) -> Tensor:
        """The weights' expected squares, float64."""
        mean = self.site.parts[0].read(named).detach().double()
        return mean.square() + (2 * self.spread.detach().double()).exp()


class Posterior(Rule):
    """The beliefs on a network's weights, and module A as behaviour in a training loop.

    In training every matrix gives a sample of its output: the mean it would give, and a variance of sigma^2 times the
    squares of its inputs. The loss gets the divergence from the prior, over as many examples as there are. Sigma has an
    Adam of its own, in logarithms: the weights' learning rate, whatever optimizer they have, would hardly move it.
    Every so many steps precisions and supports are brought up to date.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sequence[Site],
        priors: Priors,
        family: Family,
        share: float,
        examples: int,
        *,
        kl: float = 1.0,
        spread: float = 0.1,
        rate: float = 0.02,
        every: int = 20,
    ) -> None:
        self.sites = list(sites)
        self.priors, self.family = priors, family
        self.kl, self.examples, self.every = kl, examples, every
        self.beliefs: list[Belief] = []
        named = tensors(model)
        for site in self.sites:
            mean = _sampled(model, site, named)
            unit = max(float(mean.double().square().mean()), 1e-12)
            start = torch.full(mean.shape, log(spread) + 0.5 * log(unit), device=mean.device)
            odds = torch.full(mean.shape, log(share / (1 - share)), dtype=torch.float64, device=mean.device)
            precision = torch.ones(mean.shape, device=mean.device)
            belief = Belief(site, nn.Parameter(start), unit, torch.zeros_like(odds), odds, precision)
            self.beliefs.append(belief)
        self.adam = torch.optim.Adam([b.spread for b in self.beliefs], rate)
        self._hooks: list[RemovableHandle] = []
        self._heard: set[str] = set()
        self.infer(named)

    def start(self, loop: Loop) -> None:
        """Let every matrix give samples in training."""
        self._heard = set()
        for belief in self.beliefs:
            module = loop.model.get_submodule(belief.site.name.rpartition(".")[0])
            self._hooks.append(module.register_forward_hook(self._sample(belief)))

    def _sample(self, belief: Belief) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
            if not module.training:
                return out
            self._heard.add(belief.site.name)
            variance = (2 * belief.spread).exp().to(out.dtype)
            squares = args[0].square()
            if isinstance(module, nn.Linear):
                wide = nn.functional.linear(squares, variance)
            else:
                wide = module._conv_forward(squares, variance, None)  # type: ignore[operator]  # sites are linear layers and convolutions
            return out + wide.clamp(min=1e-10).sqrt() * torch.randn_like(out)

        return hook

    def before_forward(self, loop: Loop) -> None:
        """Precisions and supports, now and then."""
        if loop.step % self.every == 0:
            self.infer(loop.tensors)

    def loss(self, loop: Loop, value: Tensor) -> Tensor:
        """The loss and the divergence of the weights from their prior."""
        named = loop.tensors
        total = value.new_zeros(())
        for belief in self.beliefs:
            mean, spread = belief.site.parts[0].read(named), belief.spread
            squares = mean.square() + (2 * spread).exp()
            total = total + (0.5 * belief.precision * squares - spread - 0.5 * belief.precision.log() - 0.5).sum()
        loop.log("divergence", float(total.detach()))
        return value + self.kl / self.examples * total

    def before_step(self, loop: Loop) -> None:
        """Sigma moves. Raises ModelError for a matrix that gave no sample: something else reads its weights."""
        silent = [b.site.name for b in self.beliefs if b.site.name not in self._heard]
        if silent:
            raise ModelError(
                f"samples of what {silent[0]} puts out were to be drawn",
                "its module is not called when the network runs",
                f"Leave it out with exclude={silent[0].removesuffix('.weight')}.",
            )
        self.adam.step()
        self.adam.zero_grad()

    def finish(self, loop: Loop) -> None:
        """Plain outputs again, and beliefs up to date."""
        self.take_off()
        self.infer(loop.tensors)

    def take_off(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def infer(self, named: Tensors) -> None:
        """Precisions and supports, given the weights as they are."""
        for belief in self.beliefs:
            precision, belief.posterior = self.family.fitted(
                belief.square(named) / belief.unit, belief.prior, belief.posterior, self.priors
            )
            belief.precision = (precision / belief.unit).float()

    @torch.no_grad()
    def exchange(self, structure: Structure, by: Exchange, named: Tensors) -> float:
        """Module B: supports hear from their neighbours; the largest change of a message in its last sweep."""
        worst = 0.0
        for belief in self.beliefs:
            sent = by.sent(belief.posterior, belief.prior)
            found, changed = structure.extrinsic(as_matrix(sent))
            belief.prior = by.taken(like_kernel(found, sent.shape), sent)
            worst = max(worst, changed)
        self.infer(named)
        return worst

    def active(self) -> dict[str, Tensor]:
        """The log-odds of being active, by site."""
        return {belief.site.name: belief.posterior for belief in self.beliefs}

    def state(self) -> dict[str, Any]:
        """Beliefs, and sigma's optimizer."""
        held = [{k: getattr(b, k) for k in ("unit", "prior", "posterior", "precision")} for b in self.beliefs]
        return {"beliefs": held, "spread": [b.spread.detach() for b in self.beliefs], "adam": self.adam.state_dict()}

    def resume(self, loop: Loop, state: Mapping[str, Any]) -> None:
        """All of it as it was."""
        for belief, held, spread in zip(self.beliefs, state["beliefs"], state["spread"], strict=True):
            for key, value in held.items():
                setattr(belief, key, value)
            belief.spread.data.copy_(spread)
        self.adam.load_state_dict(dict(state["adam"]))


def _sampled(model: nn.Module, site: Site, named: Tensors) -> Tensor:
    """A site's weights. Raises ModelError for one whose output cannot be sampled by its mean and variance."""
    part = site.parts[0]
    module = model.get_submodule(part.name.rpartition(".")[0])
    known = isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d))
    if not known or part.index is not None or part.owner is not None:
        raise ModelError(
            f"samples of what {site.name} puts out were to be drawn",
            f"{type(module).__name__} is no linear layer or convolution, whose mean and variance are known",
            f"Leave it out with exclude={type(module).__name__}, or give a network of these.",
        )
    return part.read(named).detach()


def apart(model: nn.Module, sites: Sequence[Site]) -> tuple[list[Site], list[str]]:
    """The sites whose weights are one module's alone, and a remark on the others.

    What is read in several places would be sampled in one of them alone. Raises ModelError where no site is left.
    """
    tied = tied_names(model)
    own = [site for site in sites if site.parts[0].name not in tied]
    shared = [site.name for site in sites if site.parts[0].name in tied]
    if not own:
        raise ModelError(
            f"the weights of {', '.join(shared)} were to be given a prior",
            "each is one tensor in several modules",
            "Untie them first.",
        )
    return own, [f"left dense, as several modules share them: {', '.join(shared)}"] if shared else []


# What is left


def runs(keep: Tensor) -> tuple[int, float]:
    """How many runs of kept weights the rows of a mask [rows, columns] have, and how long they are on average."""
    first = keep & ~nn.functional.pad(keep[:, :-1], (1, 0))
    count = int(first.sum())
    return count, int(keep.sum()) / count if count else 0.0


def empty_units(model: nn.Module, example: Batch, keep: Mapping[str, Tensor]) -> tuple[list[Mask], list[str]]:
    """Whole units to be taken out, as masks of their sites: what makes them is all masked, or all that reads them is.

    And what stands in the way, in words: a network that cannot be followed keeps its empty rows and columns.
    """
    if all(bool(mask.flatten(1).any(1).all()) and bool(mask.movedim(1, 0).flatten(1).any(1).all())
           for mask in keep.values()):  # fmt: skip
        return [], []
    try:
        coupling = couple(model, example)
    except GraphError as error:
        return [], [f"empty rows and columns are left in place: {error.found}"]
    found = []
    for site in coupling.of("channel"):
        sides: list[dict[str, Tensor]] = [{}, {}]  # what makes the units, and what reads them
        for part in site.parts:
            if len(part.shape) > 1:
                sides[0 if part.makes else 1][part.key] = keep.get(part.name, torch.ones(part.shape)).float().cpu()
        left = torch.ones(site.shape, dtype=torch.bool)
        for side in sides:
            parts = tuple(part for part in site.parts if part.key in side)
            if parts:
                left &= Site(site.name, site.kind, site.shape, parts).gather(side) > 0
        if site.name in coupling.inexact or bool(left.all()):
            continue
        if not bool(left.any()):
            left[0] = True  # the network would be cut in two
        if (of := coupling.multiples.get(site.name, 1)) > 1:
            short = -int(left.sum()) % of
            left[(~left).nonzero().squeeze(1)[:short]] = True
        found.append(Mask(site, left))
    return found, []


@dataclass(frozen=True, kw_only=True)
class TurboVbi(Method):
    """Train with a prior on which weights stay together; take what is more likely idle than active. No target."""

    structure: Structure = Rows()  # how supports hang together: rows(), grid()
    turbo: Exchange = Extrinsic()  # what the modules tell each other; marginal() counts twice, for comparison
    family: Family = Joint()  # of beliefs on precisions and supports; mean-field() is the paper's
    active: Gamma = Gamma(1.0, 1.0)  # precision of active weights, in units of their layer's mean square at the start
    idle: Gamma = Gamma(1.0, 0.01)  # and of those that are not
    gaussian: float = 0.5  # what a weight adds to a precision's shape and rate: 1/2 for real ones, 1 for complex
    kl: float = 1.0  # of the divergence in the loss: kappa
    spread: float = 0.1  # sigma at the start, in units of the layer's root mean square
    spread_rate: float = 0.02  # learning rate of its logarithm
    rounds: int = 8  # of module A, then B
    steps: int = 250  # optimizer steps of module A in each
    every: int = 20  # steps between two looks at precisions and supports
    tune: int = 0  # optimizer steps of fine-tuning with the masks held
    samples: int = 512  # examples on which batch norms take their statistics anew
    small: float = 0.0  # weights smaller than this go too, whatever is believed of them
    sparsity: float | None = None  # None: what is believed idle; else the most idle of all go, whatever is believed
    include: tuple[str, ...] = ()  # what to prune, by name, class or role; () is every matrix
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE  # what to leave dense

    card: ClassVar = Card(
        23,
        "Structured Bayesian Compression for Deep Neural Networks Based on The Turbo-VBI Approach",
        arxiv="2302.10483",
        venue="IEEE Transactions on Signal Processing",
        year=2023,
        when="during training",
        needs=("labels", "training"),
        families=("mlp", "cnn", "encoder", "vision transformer", "decoder"),
        axes="rule prior graph",
        criterion=("learned",),
        start=("initialised", "pretrained"),
        tasks=("classification",),
        stage=("sparsity regularisation",),
        schedule=("custom",),
        allocation=("learned",),
        learns=("masks or gates",),
        reports="higher compression at equal or better accuracy than VBI and dropout with independent or group priors, "
        "and non-zeros in clusters, for LeNet-5 and AlexNet; no target can be set: what is reached is what is found",
        checked="tests/methods/test_turbo_vbi.py::test_runs_are_longer_with_the_chain_than_without_on_digits",
        differs=(
            "q(rho, s) is one distribution by default: with q(rho) q(s), family=mean-field(), and the published shapes "
            "and rates an active weight stays active even at zero",
            "precisions are in units of each layer's mean square at the start, so that one prior suits every layer",
            "the modules exchange extrinsic messages; the first author's later program sends marginals, as marginal()",
            "a real weight adds 1/2 to shape and rate of a precision; that program adds 1, as for complex signals",
            "sigma is trained, in logarithms and by an Adam of its own; that program keeps it at almost nothing",
            "the pair factors of a grid are divided by the shares, so that it is independent where nothing is coupled",
            "batch norms take their statistics anew at the end: in training they see samples",
        ),
    )
    tiny: ClassVar = {"rounds": 2, "steps": 15, "every": 5, "samples": 64}

    def check(self) -> None:
        """Raise SettingError for priors and counts that cannot be."""
        self.structure.check()
        if self.sparsity is not None:
            check_sparsity(self.sparsity)
        for name in ("active", "idle"):
            given: Gamma = getattr(self, name)
            if not (given.shape > 0 and given.rate > 0 and isfinite(given.shape) and isfinite(given.rate)):
                raise SettingError(
                    f"{name}={given} was given", "shape and rate of a Gamma are above 0", "Give 1 and 1."
                )
        if self.idle.mean <= self.active.mean:
            raise SettingError(
                f"precisions of {self.idle.mean:g} for idle weights and {self.active.mean:g} for active were asked for",
                "idle weights are those that are held near zero",
                "Give idle=gamma(shape=1, rate=0.01), a precision of 100.",
            )
        for name in ("rounds", "steps", "every", "samples"):
            if getattr(self, name) < 1:
                raise SettingError(f"{name}={getattr(self, name)} was given", "one is the least", "Give more.")
        for name in ("kl", "tune", "small"):
            if not (isfinite(value := getattr(self, name)) and value >= 0):
                raise SettingError(f"{name}={value} was given", "it is 0 or more", "Give 0, or leave it out.")
        for name in ("gaussian", "spread", "spread_rate"):
            if not (isfinite(value := getattr(self, name)) and value > 0):
                raise SettingError(f"{name}={value} was given", "it is above 0", "Leave it out for the default.")

    def training_steps(self) -> int:
        """See Method."""
        return self.rounds * self.steps + self.tune

    def run(self, model: nn.Module, task: Task) -> Outcome:
        """A, B, A, B, ...; then masks, fine-tuning, and what is empty out."""
        self.check()
        sites, shared = apart(model, weights(model, self.include, self.exclude))
        posterior = Posterior(
            model, sites, Priors(self.active, self.idle, self.gaussian), self.family, self.structure.share,
            predictions(task), kl=self.kl, spread=self.spread, rate=self.spread_rate, every=self.every,
        )  # fmt: skip
        optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad])
        history, residual = History(), 0.0
        for _ in range(self.rounds):
            try:
                found = fit(model, task, self.steps, [posterior], optimizer, epoch=history.epoch)  # A
            finally:
                posterior.take_off()
            history = history.then(found)
            residual = posterior.exchange(self.structure, self.turbo, tensors(model))  # B
            history.log("active", len(history.losses), 1 - sparsity_of(_likely(posterior.active())))
        keep = self.chosen(posterior, tensors(model))
        edits: list[Edit] = list(apply_(model, [Mask(site, keep[site.name]) for site in sites]))
        empty, notes = empty_units(model, task.example, keep)
        edits += apply_(model, empty)
        if self.tune:
            rules = [LearningRate(), Hold.of(edits)]
            history = history.then(fit(model, task, self.tune, rules, epoch=history.epoch))
        edits += self.taken_out(model, empty)
        edits += recalibrate_(model, some(task, self.samples))
        said = self.remarks(sites, keep, empty, residual)
        return Outcome(model, edits, history, notes=said + shared + notes + history.notes)

    def chosen(self, posterior: Posterior, named: Tensors) -> dict[str, Tensor]:
        """What stays. Raises EvidenceError, naming the layer, where that is nothing."""
        sites, odds = posterior.sites, posterior.active()
        if self.sparsity is not None:
            counts = Global().spread(sites, Budget(self.sparsity), odds)
            return {site.name: PerMatrix().select(odds[site.name], counts[site.name]) for site in sites}
        keep = _likely(odds)
        for site in sites:
            keep[site.name] &= site.parts[0].read(named).detach().abs() >= self.small
            if not bool(keep[site.name].any()):
                raise EvidenceError(
                    f"the weights of {site.name} that are likely active were to stay",
                    "none is: the network would be cut in two",
                    f"Lower kl={self.kl:g}, train longer, let more begin in structure=, or leave it out with exclude=.",
                )
        return keep

    def taken_out(self, model: nn.Module, empty: Sequence[Mask]) -> list[Edit]:
        """Take out units that are masked whole, and say of the smaller matrices what is zero in them."""
        if not empty:
            return []
        cut = removals([mask.site for mask in empty], {mask.site.name: mask.keep for mask in empty})
        edits: list[Edit] = list(apply_(model, cut))
        named = tensors(model)
        smaller = weights(model, self.include, self.exclude)
        return edits + list(apply_(model, [Mask(site, site.parts[0].read(named) != 0) for site in smaller]))

    def remarks(
        self, sites: Sequence[Site], keep: Mapping[str, Tensor], empty: Sequence[Mask], residual: float
    ) -> list[str]:
        """What was reached."""
        matrices = [as_matrix(keep[site.name]) for site in sites]
        count = sum(runs(matrix)[0] for matrix in matrices)
        kept = sum(int(matrix.sum()) for matrix in matrices)
        what = "was found" if self.sparsity is None else "was asked for, the most likely active weights being kept"
        notes = [
            f"a sparsity of {sparsity_of(keep):.2%} {what}; {kept:,} weights stay in {count:,} runs along the rows, "
            f"{kept / max(count, 1):.2f} long on average"
        ]
        if empty:
            gone = sum(mask.site.units - mask.kept for mask in empty)
            notes.append(f"{gone:,} units were left empty and are taken out")
        if residual > 0:
            notes.append(f"messages still changed by {residual:.2g} in the last sweep")
        return notes + self.structure.remarks()


def _likely(odds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value >= 0 for name, value in odds.items()}


def predictions(task: Task) -> int:
    """How many terms the likelihood of a training split has: examples, or tokens where those are their own target."""
    return sum(b.tokens if b.target is None and b.tokens else b.size for b in task.batches("train"))
