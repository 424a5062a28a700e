"""Rules in the Trainer of Hugging Face transformers: one callback.

    from secateur.integrations.trainer import PruningCallback
    Trainer(model, arguments, train_dataset=..., callbacks=[PruningCallback(Gradual(sites, schedule))]).train()

The rules sit on the optimizer itself, so that gradient accumulation, clipping and skipped mixed-precision steps come
out as in a loop of one's own. Checkpoints hold the model as the forward pass sees it, and beside it what the rules
remember, so that `train(resume_from_checkpoint=...)` goes on where it was.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import ResumeError, SettingError
from secateur.train import Attached, History, Rule, Snapshot, attach

FILE = "secateur_rules.safetensors"


class PruningCallback(TrainerCallback):
    """Gives each optimizer step of a Trainer the moments of a loop, and its logs the rules' curves."""

    def __init__(self, rules: Rule | Sequence[Rule]) -> None:
        self.rules = (rules,) if isinstance(rules, Rule) else tuple(rules)
        self.history: History | None = None
        self._attached: Attached | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any
    ) -> None:
        """Attach the rules to the optimizer that the Trainer has made."""
        model, optimizer = given.get("model"), given.get("optimizer")
        if not isinstance(model, nn.Module) or optimizer is None:
            raise SettingError(
                "rules were to be attached to a Trainer", "it has no model or optimizer yet", "Let it make them first."
            )
        while not hasattr(optimizer, "register_step_pre_hook") or hasattr(optimizer, "optimizer"):
            optimizer = optimizer.optimizer  # the wrapper that accelerate puts round it
        assert isinstance(optimizer, Optimizer)
        resume_from = None
        if state.global_step:
            place = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / FILE
            if not place.exists():
                raise ResumeError(
                    f"training was to be taken up again at step {state.global_step}",
                    f"{place} is not there, so the masks of that step are not known",
                    "Resume from a checkpoint that was saved with this callback.",
                )
            resume_from = Snapshot.load(place)
        self._attached = attach(optimizer, model, self.rules, state.max_steps, resume_from, processes=args.world_size)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Write what the rules remember beside the checkpoint."""
        if self._attached is None or not state.is_world_process_zero:
            return
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        if folder.is_dir():
            loop = self._attached.loop
            rules = tuple(rule.state() for rule in loop.rules)
            Snapshot({}, step=loop.step, rules=rules, processes=loop.processes).save(folder / FILE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **given: Any,
    ) -> None:
        """Add the present value of each curve, such as the sparsity."""
        if self._attached is None:
            return
        now = {name: points[-1][1] for name, points in self._attached.loop.history.curves.items()}
        for line in (logs, state.log_history[-1] if state.log_history else None):
            if line is not None:
                line.update(now)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **given: Any) -> None:
        """Run the last moment and leave a plain model."""
        if self._attached is not None:
            self.history = self._attached.finish()
            self._attached = None
