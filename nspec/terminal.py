"""What a run says while it works: a line for each step, and a bar with the time left on a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

Progress = Callable[[str, int, int], None]
"""Called with what is done now, how much of it, and out of how much (0: not known)."""


class Display:
    """Speaks on standard error, which leaves standard output to results.

    Args:
        quiet: says nothing (ranks other than 0).
    """

    def __init__(self, quiet: bool = False) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, quiet=quiet, highlight=False, emoji=False)

    def line(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def bar(self, label: str, unit: str = "") -> Iterator[Progress]:
        """A bar that is there while the block runs, on a terminal; elsewhere nothing.

        Args:
            label: what stands before it.
            unit: what is counted, such as ``sentences``.

        Yields:
            The function that moves it; its first argument is shown beside the label.
        """
        from rich import progress

        columns: list[Any] = [
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(),
            progress.MofNCompleteColumn(),
            progress.TextColumn(unit, markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
        ]
        with progress.Progress(
            *columns, console=self.console, transient=True, disable=self.console.quiet or not self.console.is_terminal
        ) as bars:
            task = bars.add_task(label, total=None)
            last = 0

            def move(what: str, done: int, total: int) -> None:
                nonlocal last
                if total != last:  # another step begins, with a time left of its own
                    bars.reset(task, total=total or None)
                    last = total
                bars.update(task, description=" ".join(filter(None, [label, what])), completed=done)

            yield move


def show(*parts: Any) -> None:
    """Puts tables, and text as it stands, on standard output."""
    from rich.console import Console

    # Without a terminal there is no width to fit into; rich would assume 80 columns and break lines.
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False, emoji=False)
    for part in parts:
        console.print(part, soft_wrap=isinstance(part, str), markup=not isinstance(part, str))


def duration(seconds: float) -> str:
    """``3.2 s``, ``4 min 10 s`` or ``2 h 5 min``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
