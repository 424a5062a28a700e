"""What people see: results on standard output, everything else on standard error and in a log."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from secateur.walk import Progress as BlockDone


class Terminal:
    """Where a verb speaks. With `json` standard output holds one JSON value and nothing else."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False) -> None:
        self.quiet, self.as_json = quiet, as_json
        self.aside = Console(stderr=True, quiet=quiet, highlight=False)
        self.result = Console(quiet=quiet or as_json, highlight=False)
        self._log: Path | None = None

    def log_to(self, path: Path, command: str) -> None:
        """From now on write down every line said, after what is there already."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._log = path
        self.note(command)

    def note(self, text: str) -> None:
        """A line for the log alone."""
        if self._log is not None:
            with suppress(OSError), self._log.open("a", encoding="utf-8") as file:
                file.write(f"{datetime.now().astimezone().isoformat(timespec='seconds')}  {text}\n")

    def say(self, text: str, style: str = "") -> None:
        """A line on the way, to standard error."""
        self.aside.print(escape(text), style=style or None, soft_wrap=True)
        self.note(text)

    def show(self, what: Any) -> None:
        """A result, to standard output."""
        self.result.print(escape(what) if isinstance(what, str) else what, soft_wrap=isinstance(what, str))
        if isinstance(what, str):
            self.note(what)

    def emit(self, value: Any) -> None:
        """The JSON value, when it is asked for."""
        if self.as_json:
            sys.stdout.write(json.dumps(finite(value), indent=1, default=str, allow_nan=False) + "\n")

    @contextmanager
    def busy(self, what: str) -> Iterator[None]:
        """Something that takes a while and says nothing."""
        start = time.perf_counter()
        if self.quiet or not self.aside.is_terminal:
            yield
        else:
            with self.aside.status(escape(what)):
                yield
        self.note(f"{what}: {time.perf_counter() - start:.1f} s")

    @contextmanager
    def blocks(self, what: str) -> Iterator["Blocks"]:
        """A bar over the blocks of a model with a line for each, told by what is yielded."""
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeLeft(),
            Memory(),
            console=self.aside,
            transient=True,
            disable=self.quiet or not self.aside.is_terminal,
        )
        with bar:
            yield Blocks(self, bar, what)


class Blocks:
    """Hears of every block that is done."""

    def __init__(self, terminal: Terminal, bar: Progress, what: str) -> None:
        self.terminal, self.bar = terminal, bar
        self.task = bar.add_task(what, total=None)
        self.done = 0  # blocks, those of an earlier run included
        self.total = 0
        self._last = -1

    def __call__(self, block: "BlockDone") -> None:
        """Advance, and say what became of the block."""
        if block.index > self._last + 1 and self.done == 0:
            self.terminal.say(f"taken up again after {block.index} blocks of an earlier run", "dim")
        self._last, self.done, self.total = block.index, block.index + 1, max(block.total, 1)
        self.bar.update(self.task, completed=min(self.done, self.total), total=self.total)
        self.terminal.say(line_of(block))


def line_of(block: "BlockDone") -> str:
    """A block in a line: kept of total, how far its output moved, how long it took."""
    kept = f"{block.kept:>13,} of {block.weights:>13,} kept" if block.weights else " " * 34
    share = f" ({block.kept / block.weights:6.2%})" if block.weights else " " * 9
    moved = "" if block.error is None else f"   error {block.error:.4f}"
    return f"{block.block:<24} {kept}{share}{moved}   {block.seconds:.1f} s"


class TimeLeft(ProgressColumn):
    """How long is left, from the blocks done so far."""

    def render(self, task: Task) -> Text:
        """`1:20 left`."""
        left = task.time_remaining
        return Text("" if left is None else f"{int(left) // 60}:{int(left) % 60:02d} left", style="cyan")


class Memory(ProgressColumn):
    """The most memory the process has held."""

    def render(self, task: Task) -> Text:
        """`peak 1.9 GB`."""
        from secateur.method import peak_memory

        return Text(f"peak {peak_memory() / 1e9:.1f} GB", style="dim")


def explain_error(error: Any, notes: Sequence[str], head: str = "error") -> None:
    """An error in its three parts, on standard error."""
    console = Console(stderr=True, highlight=False)
    parts = [getattr(error, part, "") for part in ("asked", "found", "do")]
    if any(parts):
        console.print(f"[bold red]error[/]  {escape(parts[0])},\n       but {escape(parts[1])}.", soft_wrap=True)
        if parts[2]:
            console.print(f"       [green]{escape(parts[2])}[/]", soft_wrap=True)
    else:
        console.print(f"[bold red]{head}[/]  {escape(str(error))}", soft_wrap=True)
    for note in notes:
        console.print(f"       [green]{escape(note)}[/]", soft_wrap=True)


def table(*heads: str, title: str = "", right: Sequence[str] = (), whole: Sequence[str] = ()) -> Table:
    """An empty table; numbers stand to the `right`, and columns that are `whole` are never broken."""
    made = Table(
        title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="bold dim"
    )
    for head in heads:
        made.add_column(
            head, justify="right" if head in right else "left", overflow="fold", no_wrap=head in whole or head in right
        )
    return made


def finite(value: Any) -> Any:
    """Plain values for JSON: numbers that are not finite as text, since JSON has none."""
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else str(value)
    if isinstance(value, dict):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value
