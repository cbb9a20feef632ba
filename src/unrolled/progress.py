"""What a person sees while something runs: a rich bar on a terminal, plain lines elsewhere. Always on stderr."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rich.progress import Progress, TaskID

__all__ = ["Bar", "Silent", "Watcher", "open_bar"]

_PATIENCE = 2.0  # seconds: what takes less shows no bar


class Watcher(Protocol):
    """Where a running piece of work tells how far it is."""

    def start(self, what: str, total: float, done: float = 0) -> None:
        """A new piece of work: its name and size, in any unit; `done` of it is done already."""

    def update(self, done: float, note: str = "") -> None:
        """So much of it is done, absolute; `note` is what else to show beside it."""

    def say(self, line: str) -> None:
        """A line that stays."""

    def stop(self) -> None:
        """The piece of work has ended."""


class Silent:
    """A Watcher that shows nothing."""

    def start(self, what: str, total: float, done: float = 0) -> None: ...

    def update(self, done: float, note: str = "") -> None: ...

    def say(self, line: str) -> None: ...

    def stop(self) -> None: ...


def open_bar(stream: TextIO | None = None) -> Bar:
    """A Watcher for people, on stderr or the stream given."""
    return Bar(stream if stream is not None else sys.stderr)


class Bar:
    """A progress bar with the time left on a terminal; elsewhere a plain line every ten seconds.

    Work of less than two seconds shows nothing.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._terminal = stream.isatty()
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._what, self._total, self._done, self._first = "", 1.0, 0.0, 0.0
        self._began = self._spoke = 0.0

    def start(self, what: str, total: float, done: float = 0) -> None:
        self.stop()
        self._what, self._total, self._done, self._first = what, max(total, 1e-9), done, done
        self._began = self._spoke = time.monotonic()

    def update(self, done: float, note: str = "") -> None:
        now = time.monotonic()
        self._done = done
        if self._terminal:
            if self._progress is None and now - self._began >= _PATIENCE:
                self._open()
            if self._progress is not None and self._task is not None:
                self._progress.update(self._task, completed=done, note=note, left=self._left(now))
        elif now - self._spoke >= 10:
            self._spoke = now
            shown = [f"{self._what} {100 * done / self._total:.0f} %", note, self._left(now)]
            self.say("  ".join(part for part in shown if part))

    def _left(self, now: float) -> str:
        """The time left at the speed so far; empty while nothing has been done."""
        rate = (self._done - self._first) / max(now - self._began, 1e-9)
        return f"{_clock((self._total - self._done) / rate)} left" if rate > 0 else ""

    def say(self, line: str) -> None:
        if self._progress is not None:
            self._progress.console.print(line, markup=False, highlight=False, soft_wrap=True)
        else:
            print(line, file=self._stream, flush=True)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._progress = self._task = None

    def _open(self) -> None:
        from rich.console import Console, RenderableType
        from rich.progress import BarColumn, Progress, TextColumn
        from rich.text import Text

        class TwoLines(Progress):
            """The bar, and below it the note: side by side they would not fit into 80 columns."""

            def get_renderables(self) -> Iterable[RenderableType]:
                yield self.make_tasks_table(self.tasks)
                for task in self.tasks:
                    if task.fields["note"]:
                        yield Text(task.fields["note"], style="cyan", no_wrap=True, overflow="ellipsis")

        self._progress = TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:3.0f} %"),
            TextColumn("{task.fields[left]}"),
            console=Console(file=self._stream),
            transient=True,
        )
        self._task = self._progress.add_task(self._what, total=self._total, completed=int(self._done), note="", left="")
        self._progress.start()


def _clock(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    whole = int(seconds)
    hours, minutes = divmod(whole // 60, 60)
    return f"{hours}:{minutes:02}:{whole % 60:02}" if hours else f"{minutes}:{whole % 60:02}"
