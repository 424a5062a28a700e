"""Rules inside an optimizer: for training loops that are not yours, but take an optimizer of yours.

    optimizer = PrunedOptimizer(torch.optim.AdamW(model.parameters()), model, Gradual(sites, schedule), steps=1000)

Learning-rate schedulers, gradient scalers and loops that step with a closure work on it as on the optimizer inside. Its
`state_dict` holds what the rules remember, so that a checkpoint of it is one of them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from secateur.errors import ResumeError
from secateur.train import Attached, History, Rule, Snapshot, attach


class PrunedOptimizer(Optimizer):
    """An optimizer whose steps are those of another, with the moments of a loop around them.

    Raises what `attach` raises.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module,
        rules: Rule | Sequence[Rule],
        steps: int,
        *,
        processes: int | None = None,
    ) -> None:
        # Optimizer's own is not called: parameters, state and hooks are those of the optimizer inside.
        self.optimizer = optimizer
        self.attached: Attached = attach(optimizer, model, rules, steps, processes=processes)

    @property
    def state(self) -> Any:  # type: ignore[override]
        """What the optimizer inside remembers of each parameter."""
        return self.optimizer.state

    @property
    def param_groups(self) -> list[dict[str, Any]]:  # type: ignore[override]
        """The groups of the optimizer inside."""
        return self.optimizer.param_groups

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """The defaults of the optimizer inside."""
        return self.optimizer.defaults

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of the optimizer inside; a closure is called first, for the gradients."""
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """See torch.optim.Optimizer."""
        self.optimizer.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """See torch.optim.Optimizer."""
        self.optimizer.add_param_group(param_group)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """See torch.optim.Optimizer."""
        return self.optimizer.register_step_pre_hook(hook)

    def register_step_post_hook(self, hook: Any) -> Any:
        """See torch.optim.Optimizer."""
        return self.optimizer.register_step_post_hook(hook)

    def loss(self, value: Tensor) -> Tensor:
        """The loss with the rules' penalties; needed only for rules that have any."""
        return self.attached.loss(value)

    def state_dict(self) -> dict[str, Any]:
        """The state of the optimizer inside, and beside it the step, the processes and what the rules remember."""
        loop = self.attached.loop
        rules = [rule.state() for rule in loop.rules]
        return {**self.optimizer.state_dict(), "secateur": [loop.step, loop.processes, rules]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up again from what `state_dict` gave. Raises ResumeError where the rules' state is not in it."""
        plain = dict(state_dict)
        if "secateur" not in plain:
            raise ResumeError(
                "a pruned run was to be taken up again",
                "this state is a plain optimizer's, so the masks of that step are not known",
                "Load the state_dict of a PrunedOptimizer.",
            )
        step, processes, rules = plain.pop("secateur")
        loop = self.attached.loop
        snapshot = Snapshot({}, step=step, rules=tuple(rules), processes=processes)
        snapshot.check(loop)
        self.optimizer.load_state_dict(plain)
        loop.step = step
        snapshot.resume(loop)

    def finish(self) -> History:
        """Run the last moment and leave a plain model; the optimizer inside goes on without rules."""
        return self.attached.finish()

    def __repr__(self) -> str:
        return f"PrunedOptimizer({self.optimizer!r})"
