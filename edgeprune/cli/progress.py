"""What a long run shows: lines and a progress bar with the time left, on stderr."""

from __future__ import annotations

import logging
import sys

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LOG = logging.getLogger("edgeprune")


class Console:
    """A `Reporter` on stderr: bars on a terminal only, nothing but warnings with -q."""

    def __init__(self) -> None:
        self.console = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.stage = ""

    def say(self, text: str) -> None:
        """One line; a bar that is running ends first."""
        self._close()
        if LOG.isEnabledFor(logging.INFO) or text.startswith("warning"):
            self.console.print(f"  {text}", markup=False)

    def progress(self, stage: str, done: int, total: int) -> None:
        """Draw or move the bar of a stage; it goes when the stage is done."""
        if not self.console.is_terminal or not LOG.isEnabledFor(logging.INFO):
            return
        if self.bar is None or stage != self.stage:
            self._close()
            self.stage = stage
            self.bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self.bar.start()
            self.bar.add_task(stage, total=total)
        self.bar.update(self.bar.task_ids[0], completed=done, total=total)
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
