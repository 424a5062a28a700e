"""The command line: a verb a file. Nothing heavy is imported before a verb needs it."""

import importlib
import sys
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

import click

BAD_INPUT, MISSED, INTERRUPTED, BUG = 2, 3, 130, 1
"""What the process ends with, when not with 0."""

VERBS = {
    "list": "Every method: its paper, when it runs, what it needs, and whether its claim held here.",
    "explain": "One method: the idea, the settings, what the paper reports, what was measured here.",
    "plan": "A dry run: what would go, what it would cost, and how long it would take. Changes nothing.",
    "prune": "Prune a model and save it, with its record, its recipe and a card.",
    "recover": "Train a pruned model back towards what it was, its zeros in place, and save it.",
    "scratch": "Train a pruned network from new weights, beside fine-tuning it, at equal work.",
    "eval": "Measure how good a model is.",
    "compare": "Several methods side by side, at equal sparsity and over seeds, on one page.",
    "bench": "How fast a model is here, each layer dense or packed as measured; --explain says why.",
    "report": "Runs that were saved, as one page.",
    "export": "Take a model to where it is to run: transformers, llama.cpp, ONNX Runtime, OpenVINO, a sparse file.",
    "densify": "Write the tensors of a sparse file as a plain one.",
    "inspect": "What a file of weights holds: shapes, bytes, zeros.",
}


class Root(click.Group):
    """The verbs, each imported when it is called; errors in three parts and no tracebacks."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which they are met."""
        return [*VERBS]  # `list` here is the verb, once it was imported

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """The verb of a name."""
        return importlib.import_module(f"secateur.cli.{name}").command if name in VERBS else None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The verb to run. Raises UsageError with the nearest name."""
        if args and args[0] not in VERBS:
            from secateur.errors import did_you_mean

            raise click.UsageError(f"There is no verb {args[0]!r}. {did_you_mean(args[0], VERBS)}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The verbs with a line each, without importing them."""
        with formatter.section("Verbs"):
            formatter.write_dl([*VERBS.items()])

    def main(self, args: Sequence[str] | None = None, **options: Any) -> NoReturn:  # type: ignore[override]
        """Run, say what went wrong in three parts, and end the process with what came of it."""
        given = [*(sys.argv[1:] if args is None else args)]
        options["standalone_mode"] = False
        try:
            found = super().main(given, **options)
            code = found if isinstance(found, int) else 0
        except (Exception, KeyboardInterrupt) as error:
            code = _told(error, given)
        sys.exit(code)


def _told(error: BaseException, args: Sequence[str]) -> int:
    """Say what went wrong, and how the process is to end."""
    from secateur.cli.terminal import explain_error

    if "--debug" in args and not isinstance(error, click.exceptions.Exit):
        traceback.print_exception(error)
    if isinstance(error, click.exceptions.Exit):
        return error.exit_code
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        stopped = error.__cause__ or error  # click makes an Abort of the interrupt
        explain_error("", getattr(stopped, "__notes__", ["Nothing was written."]), head="stopped")
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 0  # the reader has gone, as `secateur list | head` does
    if isinstance(error, click.ClickException):
        return _usage(error)
    from secateur.errors import SecateurError

    if isinstance(error, SecateurError):
        explain_error(error, getattr(error, "__notes__", []))
        return getattr(error, "exit_code", BAD_INPUT)
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower() or "alloc" in str(error).lower():
        explain_error(
            f"There is not enough memory: {error}", ["Ask for fewer samples, shorter windows, or --dtype bfloat16."]
        )
        return BUG
    if isinstance(error, OSError):
        explain_error(f"The system refused: {error}", [])
        return BUG
    explain_error(
        f"{type(error).__name__}: {error}",
        ["This is a fault of secateur, or of a function that was given to it. Run again with --debug to see where."],
    )
    return BUG


def _usage(error: click.ClickException) -> int:
    from secateur.cli.terminal import explain_error

    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        error.show()
        return BAD_INPUT
    notes = []
    context = getattr(error, "ctx", None)
    if context is not None:
        notes.append(f"Try '{context.command_path} --help'.")
    explain_error(error.format_message(), notes)
    return BAD_INPUT


@click.command(cls=Root, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="secateur", prog_name="secateur")
def main() -> None:
    """Make neural networks smaller and faster by removing parts of them, and know what it cost.

    secateur prune smollm2 wanda --sparsity 0.5 --out pruned
    """
