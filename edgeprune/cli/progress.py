"""What a long run shows on stderr: lines and a progress bar with the time left, one each where several run at once."""

from __future__ import annotations

import logging
import sys
import threading
from dataclasses import dataclass

from rich.console import Console as RichConsole
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

LOG = logging.getLogger("edgeprune")


class Console:
    """A `Reporter` on stderr: bars on a terminal only, nothing but warnings with -q. Threads may share it."""

    def __init__(self) -> None:
        self.console = RichConsole(file=sys.stderr, highlight=False, soft_wrap=True)
        self.progress_bars: Progress | None = None
        self.tasks: dict[str, tuple[str, TaskID]] = {}  # of each view the stage and its bar
        self.lock = threading.RLock()

    def view(self, name: str) -> View:
        """What one of several tells: its lines start with its name, its bar stands beside those of the others."""
        return View(self, name)

    def say(self, text: str, view: str = "") -> None:
        """One line; a bar of the same view ends first."""
        with self.lock:
            self._close(view)
            if LOG.isEnabledFor(logging.INFO) or text.startswith("warning"):
                self.console.print(f"  {view}: {text}" if view else f"  {text}", markup=False)

    def progress(self, stage: str, done: int, total: int, view: str = "") -> None:
        """Draw or move the bar of a stage; it goes when the stage is done."""
        if not self.console.is_terminal or not LOG.isEnabledFor(logging.INFO):
            return
        with self.lock:
            if view in self.tasks and self.tasks[view][0] != stage:
                self._close(view)
            if self.progress_bars is None:
                self.progress_bars = self._bars()
                self.progress_bars.start()
            if view not in self.tasks:
                self.tasks[view] = (stage, self.progress_bars.add_task(stage, total=total))
            self.progress_bars.update(self.tasks[view][1], completed=done, total=total)
            if done >= total:
                self._close(view)

    def _bars(self) -> Progress:
        return Progress(
            TextColumn("  {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )

    def _close(self, view: str) -> None:
        if view in self.tasks and self.progress_bars is not None:
            self.progress_bars.remove_task(self.tasks.pop(view)[1])
        if not self.tasks and self.progress_bars is not None:
            self.progress_bars.stop()
            self.progress_bars = None


@dataclass(frozen=True)
class View:
    """A `Reporter`: one of several on the same console."""

    console: Console
    name: str

    def say(self, text: str) -> None:
        """A line that starts with the name."""
        self.console.say(text, self.name)

    def progress(self, stage: str, done: int, total: int) -> None:
        """The bar of this view."""
        self.console.progress(stage, done, total, self.name)
