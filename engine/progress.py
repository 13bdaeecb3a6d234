"""Progress of a run with the time left, on stderr: bars on a terminal, a line now and then in a file."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Progress = Callable[[str, int, int], None]
"""Called with (stage, done, total) as a run goes on."""
QUIET_SECONDS = 30.0
"""Between two lines of progress where stderr is a file: a night's log stays short."""


def stage_of(say: Progress, name: str) -> Callable[[int, int], None]:
    """A function of (done, total) for one stage."""
    return lambda done, total: say(name, done, total)


class ConsoleProgress:
    """Shows ``(stage, done, total)``. Loading is shown in percent, everything else counted."""

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = console or Console(stderr=True)
        self.label = ""
        self.tasks: dict[str, Any] = {}
        self.began: dict[str, tuple[float, int]] = {}
        self.ended: set[str] = set()
        self.last_line = 0.0
        self.bars: Any = self._make_bars() if self.console.is_terminal else None

    def _make_bars(self) -> Any:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns: list[Any] = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        columns += [TextColumn("left:"), TimeRemainingColumn()]
        return Progress(*columns, console=self.console)

    def __enter__(self) -> ConsoleProgress:
        if self.bars is not None:
            self.bars.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.bars is not None:
            self.bars.stop()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if total > 100_000:  # parameters, not steps
            done, total = 100 * done // total, 100
        key = f"{self.label}{stage}"
        if self.bars is None:
            self._line(key, done, total)
            return
        if key not in self.tasks:
            self.tasks[key] = self.bars.add_task(key, total=total)
        self.bars.update(self.tasks[key], completed=done, total=total)

    def _line(self, key: str, done: int, total: int) -> None:
        """A line when a stage ends, and every :data:`QUIET_SECONDS` in a long one."""
        now = time.monotonic()
        began, start = self.began.setdefault(key, (now, done))
        ends = done >= total
        if key in self.ended or (not ends and now - max(began, self.last_line) < QUIET_SECONDS):
            return
        self.last_line = now
        text = f"{key}: {done}/{total}, {duration(now - began)}".replace("/100,", " %,")
        if ends:
            self.ended.add(key)
        elif done > start:
            text += f", {duration((now - began) / (done - start) * (total - done))} left"
        self.console.print(text, soft_wrap=True, highlight=False, markup=False)


def duration(seconds: float) -> str:
    """Seconds in words: 7.2 s, 3 min 20 s, 1 h 5 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"
